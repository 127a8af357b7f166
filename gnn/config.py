"""All settings of a node-classification run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from contranorm.options import ContraNormOptions
from repro.config import CellLabel, RunConfig

DataName = Literal[
    "cora", "citeseer", "pubmed", "chameleon", "squirrel", "texas", "wisconsin", "cornell", "actor", "dblp",
    "coauthor_cs", "digits",
]  # fmt: skip
ModelName = Literal["DeepGCN", "SGC", "DeepGAT", "GIN"]
NormName = Literal[  # in the order in which tables list them
    "None", "LN", "PN", "PN-SI", "PN-SCS", "BatchNorm", "DiffGroupNorm", "MeanSubtractionNorm", "GraphNorm",
    "MessageNorm", "CN",
]  # fmt: skip
PAIR_NORMS = ("PN", "PN-SI", "PN-SCS")
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
    """Architecture. Table 3 uses DeepGCN."""

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

    epochs: int = 200
    """Full-batch steps, as in the reference."""

    residual: int = 0
    """Add the features of k layers before, every k hidden layers; 0 = off, as in Table 3."""

    dropedge: float = 0.0
    """Share of the edges left out of each training step (DropEdge); 0 = off, as in Table 3. Self-loops stay."""

    norm_mode: NormName = "None"
    """Norm after the convolution of every hidden layer; None is vanilla, CN is ContraNorm. LN here is rows centred and
    L2-normalized, no parameters. PN, PN-SI and PN-SCS take --scale too (unset: 1)."""

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
        if not self.lr > 0 or not self.wd >= 0:
            raise ValueError(f"--lr must be > 0 and --wd >= 0, got {self.lr} and {self.wd}")
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
        if self.model == "SGC" and self.residual:
            raise ValueError("--residual: SGC has one linear layer and nothing to add a residual to; leave it at 0")

    def _check_norm(self) -> None:
        """No flag is read and then ignored: a scale or switch without a norm that uses it is refused."""
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
        if self.norm_mode in PAIR_NORMS:
            self.scale = 1.0 if self.scale is None else self.scale
        elif self.scale is not None:
            raise ValueError(f"--scale has no effect with --norm_mode {self.norm_mode}: leave it out")

    def label(self) -> CellLabel:
        """The cell of a table that this run belongs to."""
        method, scale = ("vanilla" if self.norm_mode == "None" else self.norm_mode), self.scale
        if self.norm_mode == "CN":
            method = self.step_name("" if self.identity else "Eq. 6")
        elif scale not in (None, 1):
            method += f" s={scale:g}"
        if self.use_layer_norm:
            method += " + LayerNorm"
        eq6 = self.norm_mode == "CN" and not self.identity
        order = (get_args(NormName).index(self.norm_mode), int(eq6), scale or 0, int(self.use_layer_norm))
        return CellLabel(self.data, self.model, method, order, depth=self.nlayer, scale=scale)
