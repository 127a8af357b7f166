"""All settings of a RevGAT run; flags carry the names of the released code, defaults are its published student's."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from contranorm.options import Axis, ContraNormOptions
from repro.config import CellLabel, RunConfig

DataName = Literal["ogbn-arxiv", "dblp", "coauthor_cs", "cora"]
GIANT = "graphs/ogb/giant_xrt/X.all.xrt-emb.npy"  # below the data root


@dataclass(kw_only=True)
class Config(ContraNormOptions, RunConfig):
    """RevGAT on ogbn-arxiv: a teacher, or a student that also learns from a finished teacher's predictions."""

    EXECUTION_FIELDS: ClassVar[tuple[str, ...]] = (
        *RunConfig.EXECUTION_FIELDS, "teacher", "reversible", "device", "checkpoint_every", "probe",
    )  # fmt: skip

    data: DataName = "ogbn-arxiv"
    """The graph. The others are stand-ins under the same protocol, with a split of ogbn-arxiv's shares."""

    features: Literal["auto", "giant", "raw"] = "auto"
    """Node features of ogbn-arxiv: GIANT-XRT's 768, which the published numbers need, or OGB's 128. auto takes the
    first if their file is below the data root; the record says which were used."""

    mode: Literal["teacher", "student"] = "teacher"
    """teacher: labels only. student: labels and the predictions of --teacher."""

    teacher: str | None = None
    """Folder of the finished teacher, of the same data and seed."""

    n_layers: int = 2
    """Convolutions, the output layer included. The published network has 2, and so no reversible block; 5 has 3."""

    n_hidden: int = 256
    """Width of a head; the hidden features have n_heads times as many columns."""

    n_heads: int = 3
    """Attention heads of the hidden layers; the output layer has one."""

    group: int = 2
    """Groups of columns in a reversible block."""

    dropout: float = 0.75
    """Dropout rate inside the blocks (one mask for all) and before the output layer."""

    input_drop: float = 0.25
    """Dropout rate of features and labels."""

    edge_drop: float = 0.3
    """Share of the edges left out of each convolution in training, drawn anew for each."""

    use_norm: bool = True
    """Scale a convolution's features by degree^-1/2 before the attention and by degree^1/2 after it."""

    no_attn_dst: bool = True
    """Attention scores from the source node alone: the convolution is then one sparse product."""

    use_labels: bool = True
    """Feed a random part of the training labels to the network, which predicts the rest."""

    mask_rate: float = 0.5
    """With --use_labels the share of training labels shown, without it the share of training nodes in the loss."""

    n_label_iters: int = 1
    """Passes that fill the labels not shown with predictions, before the pass that counts."""

    n_epochs: int = 1000
    """Full-batch steps."""

    lr: float = 0.002
    """RMSprop's learning rate, reached linearly over the first 50 epochs."""

    wd: float = 0.0
    """RMSprop's weight decay."""

    alpha: float = 0.95
    """Share of the distillation term in a student's loss."""

    temp: float = 0.7
    """Temperature of the distillation, not of ContraNorm (that is --tau)."""

    norm: Literal["none", "ContraNorm"] = "none"
    """ContraNorm after every layer but the last. It is off only by this flag, never by a scale of 0."""

    scale: float | None = field(default=None, metadata={"aliases": ("norm_scale", "dcn_scale")})
    """The step s; 1 in the published run."""

    tau: float = 1.0  # declared again to drop its alias `temp`, which is the distillation's here
    """Temperature of ContraNorm's softmax; 1 in the published run."""

    scaled_tau: bool = False
    """Multiply tau by nodes / columns, the mean of the similarities' diagonal. Without it the softmax over features is
    close to the identity matrix on graphs of many nodes, and the layer does nothing (this project's own variant)."""

    identity: bool | None = field(default=None, metadata={"aliases": ("dcn_use_scale",)})
    """(1+s)·x - s·x·A in place of x - s·x·A. Unset: on, as published."""

    axis: Axis = "features"
    """features: D-ContraNorm, as published. tokens: the nodes, neighbours left out of the softmax."""

    implementation: Literal["auto", "plain", "blocked", "linear"] = "auto"
    """How ContraNorm over the nodes is computed; fused and sdpa cannot leave neighbours out."""

    pre_norm: bool = field(default=False, metadata={"aliases": ("dcn_use_norm",)})
    """Rows of unit length in place of x everywhere."""

    dcn_use_mean: bool = False
    """Subtract each node's mean over its columns first."""

    reversible: bool = True
    """Recompute the inputs of reversible blocks in the backward pass: memory does not grow with depth."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU when there is one."""

    checkpoint_every: int = 20
    """Epochs between checkpoints."""

    probe: bool = False
    """Record collapse metrics of every layer (mean cosine, effective rank, variance) at the chosen epoch."""

    def __post_init__(self) -> None:
        if self.features == "auto":  # settled here, so that a run's folder says what it was trained on
            giant = self.data == "ogbn-arxiv" and (Path(self.data_root) / GIANT).is_file()
            self.features = "giant" if giant else "raw"
        for name, low in [
            ("n_layers", 2), ("n_hidden", 1), ("n_heads", 1), ("group", 2), ("n_label_iters", 0), ("n_epochs", 1),
            ("checkpoint_every", 1),
        ]:  # fmt: skip
            if getattr(self, name) < low:
                raise ValueError(f"--{name} must be at least {low}, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must be 0 to {2**32 - 1}, got {self.seed}")
        for name in ("dropout", "input_drop", "edge_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("lr", "temp", "tau"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} must be > 0, got {getattr(self, name)}")
        if not 0 < self.mask_rate < 1 or not 0 <= self.alpha <= 1 or not self.wd >= 0:
            raise ValueError("--mask_rate must be in (0, 1), --alpha in [0, 1], --wd at least 0")
        if self.n_hidden % self.group:
            raise ValueError(f"--n_hidden {self.n_hidden} must be a multiple of --group {self.group}")
        if self.n_label_iters and not self.use_labels:
            raise ValueError("--n_label_iters belongs to --use_labels: set it to 0")
        if self.features == "giant" and self.data != "ogbn-arxiv":
            raise ValueError(f"--features giant: GIANT-XRT's features are those of ogbn-arxiv, not of {self.data}")
        if (self.mode == "student") != (self.teacher is not None):
            raise ValueError("--teacher and --mode student belong together: name a finished teacher's folder")
        self._check_norm()

    def _check_norm(self) -> None:
        """No flag is read and then ignored."""
        changed = [name for name in self.changed_switches() if name != "axis" or self.axis != "features"]
        if self.norm == "none":
            own = [name for name in ("scale", "scaled_tau", "dcn_use_mean") if getattr(self, name)]
            if changed := [name for name in changed if name != "axis"] + own:
                raise ValueError(f"--{changed[0]} belongs to --norm ContraNorm: leave it out")
            return
        if self.scale is None or not self.scale > 0:
            raise ValueError("--norm ContraNorm needs --scale > 0 (published: 1)")
        for name in ("learnable", "positive", "scaled_identity"):
            if name in changed:
                raise ValueError(f"--{name} is not offered here: leave it out")
        if self.axis == "features":
            if given := [name for name in ("symmetric", "implementation", "degree") if name in changed]:
                raise ValueError(f"--{given[0]} belongs to --axis tokens: leave it out")
            return
        if self.scaled_tau or self.dcn_use_mean:
            raise ValueError("--scaled_tau and --dcn_use_mean belong to --axis features: leave them out")
        if self.degree not in (1, 2) or (self.degree != 2 and self.implementation != "linear"):
            raise ValueError("--degree is 1 or 2, and belongs to --implementation linear")
        if self.data == "ogbn-arxiv" and (self.implementation, self.degree) != ("linear", 1):
            raise ValueError(
                "--axis tokens on ogbn-arxiv needs --implementation linear --degree 1: the exact form takes half an "
                "hour a step on two cores"
            )

    @property
    def keeps_identity(self) -> bool:
        """`identity`, on where it is not given."""
        return self.identity is not False

    def label(self) -> CellLabel:
        """The cell of a table that this run belongs to."""
        giant, distilled = self.features == "giant", self.mode == "student"
        model = "GIANT-XRT+" * giant + "RevGAT" + "+KD" * distilled
        if self.norm == "none":
            return CellLabel(self.data, model, "vanilla", depth=self.n_layers)
        method = ("D-" if self.axis == "features" else "") + "ContraNorm"
        method += "" if self.keeps_identity else " (Eq. 6)"
        method += f" s={self.scale:g}"
        ratio = " N/D" if self.tau != 1 else "N/D"
        if self.tau != 1 or self.scaled_tau:
            method += " tau=" + f"{self.tau:g}" * (self.tau != 1) + ratio * self.scaled_tau
        method += " symmetric" * self.symmetric + " pre-norm" * self.pre_norm + " centred" * self.dcn_use_mean
        order = (1 if self.axis == "features" else 2, float(not self.keeps_identity), float(self.scaled_tau), self.tau)
        return CellLabel(self.data, model, method, (*order, self.scale or 0.0), self.n_layers, self.scale)
