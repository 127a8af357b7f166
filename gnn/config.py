"""All settings of a node-classification run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from contranorm.options import ContraNormOptions
from repro.config import CellLabel, RunConfig

DataName = Literal[
    "cora", "citeseer", "pubmed", "chameleon", "squirrel", "texas", "wisconsin", "cornell", "actor", "dblp",
    "coauthor_cs", "digits",
]  # fmt: skip
ModelName = Literal["DeepGCN", "SGC", "DeepGAT", "GIN", "GCNII", "G2"]
ConnectionName = Literal["residual", "initial", "jumping_cat", "jumping_max"]
NormName = Literal[  # in the order in which tables list them
    "None", "LN", "PN", "PN-SI", "PN-SCS", "BatchNorm", "DiffGroupNorm", "MeanSubtractionNorm", "GraphNorm",
    "MessageNorm", "CN",
]  # fmt: skip
PAIR_NORMS = ("PN", "PN-SI", "PN-SCS")
SCALES = dict.fromkeys(PAIR_NORMS, 1.0) | {"DiffGroupNorm": 0.01}  # norm with a scale → what it is when unset
RIVALS = (*get_args(ConnectionName), "GCNII", "G2", "Half-Hop")  # in the order of tables, between norms and ContraNorm
TEN_SPLITS = ("chameleon", "squirrel", "texas", "wisconsin", "cornell", "actor")


@dataclass(kw_only=True)
class Config(ContraNormOptions, RunConfig):
    """Node classification with deep graph networks (Table 3). Flags carry the reference's names."""

    EXECUTION_FIELDS: ClassVar = (
        *RunConfig.EXECUTION_FIELDS, "device", "implementation", "checkpoint_every", "eval_every", "probe",
    )  # fmt: skip

    data: DataName = "cora"
    """The graph. Cora is the paper's first; `digits` is embedded and needs no file."""

    model: ModelName = "DeepGCN"
    """Architecture. Table 3 uses DeepGCN. GCNII and G2 (gradient gating) have a linear layer before and after nlayer
    convolutions of theirs."""

    propagation: Literal["random_walk", "symmetric"] = "random_walk"
    """What a convolution multiplies with: random_walk, D^-1 (A+I), as the released code; symmetric,
    D^-1/2 (A+I) D^-1/2, as GCN and GCNII were published."""

    hid: int = 32
    """Width of the hidden layers; 32 as in the reference."""

    nhead: int = 1
    """Attention heads of DeepGAT's hidden layers, side by side: each is hid / nhead wide."""

    nlayer: int = 2
    """Number of convolutions, the output layer included; for SGC, of propagation steps. Table 3: 2 4 8 16 32."""

    dropout: float = 0.6
    """Dropout rate before each convolution; .6 as in the reference."""

    lr: float = 5e-3
    """Adam's learning rate, as in the reference."""

    wd: float = 5e-4
    """Adam's weight decay (L2 in the gradient, all parameters), as in the reference."""

    conv_wd: float | None = None
    """GCNII's weight decay of the convolutions' matrices; its authors: 0.01. Unset: --wd."""

    epochs: int = 200
    """Full-batch steps, as in the reference."""

    residual: int = 0
    """Add the features of k layers before, every k hidden layers; 0 = off, as in Table 3."""

    connection: ConnectionName | None = None
    """What joins the hidden layers of DeepGCN, DeepGAT and GIN: residual and initial mix a share --alpha of the
    previous or the first one into each; jumping_* shows the output layer all of them, side by side or their maximum."""

    alpha: float | None = None
    """Share of the first features in GCNII (unset: 0.1), of the other layer with --connection residual or initial
    (unset: 0.5)."""

    theta: float | None = None
    """GCNII's theta: layer l has a share log(theta/l + 1) of its matrix. Unset: 0.5, the authors'."""

    gate_power: float | None = None
    """Exponent p >= 1 of gradient gating. Unset: 2."""

    half_hop: float | None = None
    """Half-Hop: the share of the nodes, 0 to 1, whose messages take two steps. Unset: none."""

    half_hop_alpha: float | None = None
    """Weight of the source in the features of Half-Hop's slow nodes. Unset: 0.5."""

    dropedge: float = 0.0
    """Share of the edges left out of each training step (DropEdge); 0 = off, as in Table 3. Self-loops stay."""

    norm_mode: NormName = "None"
    """Norm after the convolution of every hidden layer; None is vanilla, CN is ContraNorm. LN here is rows centred and
    L2-normalized, no parameters. PN, PN-SI and PN-SCS take --scale too (unset: 1), and so does DiffGroupNorm, whose
    lambda it is (unset: 0.01, PyG's; its authors take 0.001 to 0.03 by depth)."""

    use_layer_norm: bool = False
    """One nn.LayerNorm, shared by all hidden layers, after the norm; Table 3's ContraNorm cells use it."""

    implementation: Literal["auto", "plain", "blocked", "linear"] = "auto"
    """How ContraNorm is computed: plain stores the N x N matrix, blocked never does, linear approximates in time linear
    in N; auto chooses an exact one."""

    missing_rate: float = 0.0
    """Percent (0 to 100) of the nodes outside the training set whose features are erased; 0 as in Table 3."""

    fea_norm: bool = True
    """Divide each node's features by their sum, as in Table 3; --no_fea_norm takes them as they are."""

    protocol: Literal["reference", "standard"] = "reference"
    """reference: test on all nodes outside train and validation, after the last epoch (Table 3). standard: the data
    set's own test nodes, at the epoch of best validation accuracy."""

    split: int | None = None
    """Which of the ten splits, 0 to 9, for chameleon, squirrel, texas, wisconsin, cornell, actor (unset: 0)."""

    seed: int = 0
    """Seed of weights, dropout, DropEdge and erased features. Splits do not depend on it."""

    eval_every: int | None = None
    """Evaluate every that many epochs. Unset: only after the last (reference), or after each (standard selects)."""

    checkpoint_every: int = 50
    """Epochs between checkpoints: 50 costs well under 1 % of a run and loses seconds at most."""

    probe: bool = False
    """Collapse metrics of every hidden layer before and after training (mean cosine, effective rank, variance), and the
    last one's singular spectrum, in the record; those after training in probe.csv too."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU when there is one. Graphs of fewer than 10,000 nodes get one CPU thread: a
    second one is no faster there, and slows down whatever else the machine runs."""

    def __post_init__(self) -> None:
        for name in ("hid", "nhead", "nlayer", "epochs", "residual", "checkpoint_every", "eval_every"):
            value, low = getattr(self, name), 0 if name == "residual" else 1
            if value is not None and value < low:
                raise ValueError(f"--{name} must be at least {low}, got {value}")
        for name in ("dropout", "dropedge"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must be 0 to {2**32 - 1}, got {self.seed}")
        if not self.lr > 0 or not self.wd >= 0:
            raise ValueError(f"--lr must be > 0 and --wd >= 0, got {self.lr} and {self.wd}")
        self._check_rivals()
        if not 0 <= self.missing_rate <= 100:
            raise ValueError(f"--missing_rate is a percentage, 0 to 100, got {self.missing_rate}")
        self._check_norm()
        if self.split is not None and self.data not in TEN_SPLITS:
            raise ValueError(f"--split: {self.data} has one split; those with ten are {', '.join(TEN_SPLITS)}")
        if self.split is not None and not 0 <= self.split <= 9:
            raise ValueError(f"--split must be 0 to 9, got {self.split}")
        if self.nhead > 1 and self.model != "DeepGAT":
            raise ValueError(f"--nhead: {self.model} has no attention heads; leave it at 1, or take --model DeepGAT")
        if self.hid % self.nhead:
            raise ValueError(f"--hid must be a multiple of --nhead, got {self.hid} and {self.nhead}")

    def _check_rivals(self) -> None:
        """Each argument belongs to a method; without it, it is refused."""
        mixing, gcn2 = self.connection in ("residual", "initial"), self.model == "GCNII"
        belongs = {
            "alpha": (gcn2 or mixing, "--model GCNII, or --connection residual or initial"),
            "theta": (gcn2, "--model GCNII"),
            "conv_wd": (gcn2, "--model GCNII"),
            "gate_power": (self.model == "G2", "--model G2"),
            "half_hop_alpha": (self.half_hop is not None, "--half_hop"),
        }
        for name, (used, where) in belongs.items():
            if getattr(self, name) is not None and not used:
                raise ValueError(f"--{name} belongs to {where}: leave it out")
        for name in ("alpha", "half_hop", "half_hop_alpha"):
            if (value := getattr(self, name)) is not None and not 0 <= value <= 1:
                raise ValueError(f"--{name} must be in [0, 1], got {value}")
        for name, low in (("theta", 0), ("conv_wd", 0), ("gate_power", 1)):
            if (value := getattr(self, name)) is not None and not low <= value < math.inf:
                raise ValueError(f"--{name} must be at least {low}, got {value}")
        if self.propagation == "symmetric" and self.model in ("DeepGAT", "GIN"):
            raise ValueError(f"--propagation symmetric: {self.model} weighs edges itself; leave it out")
        if self.connection and self.model in ("SGC", "GCNII", "G2"):
            raise ValueError(f"--connection {self.connection}: {self.model} has none; leave it out")
        if self.connection and self.nlayer < 2:
            raise ValueError(f"--connection {self.connection} joins hidden layers: --nlayer must be at least 2")
        if self.residual and (self.connection or self.model in ("SGC", "GCNII", "G2")):
            reason = f"beside --connection {self.connection}" if self.connection else f"{self.model} has no such skips"
            raise ValueError(f"--residual: {reason}; leave it at 0")
        if self.residual and self.nlayer < self.residual + 2:
            raise ValueError(f"--residual {self.residual} skips hidden layers: it needs --nlayer {self.residual + 2}")

    def _check_norm(self) -> None:
        """No flag is read and then ignored: a scale or switch without a norm that uses it is refused."""
        norm = f"--norm_mode {self.norm_mode}" if self.norm_mode != "None" else "--use_layer_norm" * self.use_layer_norm
        least = 3 if self.norm_mode == "MessageNorm" else 2  # which stands between hidden layers
        if norm and self.nlayer < least and self.model in ("DeepGCN", "DeepGAT", "GIN"):  # their last layer has none
            raise ValueError(f"{norm} stands on hidden layers: --nlayer must be at least {least}")
        if self.norm_mode == "CN":
            if self.scale is None:
                raise ValueError("--norm_mode CN needs --scale: a default of 0 would be no ContraNorm at all")
            self.check_switches()
            if self.axis != "tokens":
                raise ValueError("--axis features compares features, not the nodes of a graph: leave it out")
            self.identity = True if self.identity is None else self.identity  # the released graph code's form
            return
        if switches := [name for name in self.changed_switches() if name != "scale"]:
            raise ValueError(f"--{switches[0]} belongs to --norm_mode CN, not {self.norm_mode}: leave it out")
        if self.norm_mode in SCALES:
            self.scale = SCALES[self.norm_mode] if self.scale is None else self.scale
        elif self.scale is not None:
            raise ValueError(f"--scale has no effect with --norm_mode {self.norm_mode}: leave it out")

    def label(self) -> CellLabel:
        """The cell of a table that this run belongs to."""
        rivals = self._rivals()
        named = [*self._norm(), *rivals.values(), *([("LayerNorm", None)] if self.use_layer_norm else [])]
        if self.norm_mode == "None" and not rivals:
            named.insert(0, ("vanilla", None))
        suffix = " (symmetric)" if self.propagation == "symmetric" else ""
        eq6 = self.norm_mode == "CN" and not self.identity
        places = [RIVALS.index(name) for name in rivals]
        place = get_args(NormName).index(self.norm_mode)
        if rivals and not place:
            place = get_args(NormName).index("CN") - 1 + (1 + places[0]) / (1 + len(RIVALS))
        order = (place, int(eq6), self.scale or 0, int(self.use_layer_norm), *places, *([9] if suffix else []))
        method = " + ".join(f"{name} {knob}" if knob else name for name, knob in named) + suffix
        family = " + ".join(name for name, _ in named) + suffix
        scale = self.scale if self.scale is not None or not rivals else self._strengths()[next(iter(rivals))]
        return CellLabel(self.data, self.model, method, order, self.nlayer, scale, family)

    def _norm(self) -> list[tuple[str, str | None]]:
        """The norm's name in tables and its setting, where it is not the usual one."""
        if self.norm_mode == "None":
            return []
        if self.norm_mode == "CN":
            unusual = {f"tau={self.tau:g}": self.tau != 1, "symmetric": self.symmetric, "pre-norm": self.pre_norm,
                       "learnable": self.learnable}  # fmt: skip
            forms = ["Eq. 6"] * (not self.identity) + [form for form, given in unusual.items() if given]
            name, knob = self.step_name(", ".join(forms)).rsplit(" ", 1)
            return [(name, knob)]
        if self.norm_mode == "DiffGroupNorm":
            return [("DGN", f"lambda={self.scale:g}")]
        return [(self.norm_mode, None if self.scale in (None, 1) else f"s={self.scale:g}")]

    def _strengths(self) -> dict[str, float | None]:
        """What tables give as each rival's strength."""
        mixed = 0.5 if self.alpha is None else self.alpha
        return {
            "residual": mixed,
            "initial": mixed,
            "jumping_cat": None,
            "jumping_max": None,
            "GCNII": 0.1 if self.alpha is None else self.alpha,
            "G2": 2.0 if self.gate_power is None else self.gate_power,
            "Half-Hop": self.half_hop,
        }

    def _rivals(self) -> dict[str, tuple[str, str | None]]:
        """Those of RIVALS that are in use: name in tables, and setting."""
        strengths = {name: f"{value:g}" for name, value in self._strengths().items() if value is not None}
        theta = "" if self.theta in (None, 0.5) else f", theta={self.theta:g}"
        known = {
            "residual": ("residual connection", f"alpha={strengths['residual']}"),
            "initial": ("initial connection", f"alpha={strengths['initial']}"),
            "jumping_cat": ("jumping knowledge", None),
            "jumping_max": ("jumping knowledge (max)", None),
            "GCNII": ("GCNII", f"alpha={strengths['GCNII']}{theta}"),
            "G2": ("G2", f"p={strengths['G2']}"),
            "Half-Hop": ("Half-Hop", f"p={strengths.get('Half-Hop')}"),
        }
        used = (self.connection, self.model, None if self.half_hop is None else "Half-Hop")
        return {name: known[name] for name in RIVALS if name in used}
