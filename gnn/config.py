"""All settings of a node-classification run."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from repro.config import default_data_root

DataName = Literal[
    "cora", "citeseer", "pubmed", "chameleon", "squirrel", "texas", "wisconsin", "cornell", "actor", "dblp",
    "coauthor_cs", "digits",
]  # fmt: skip
ModelName = Literal["DeepGCN", "SGC", "DeepGAT", "GIN"]
NormName = Literal[
    "None", "LN", "PN", "PN-SI", "PN-SCS", "CN", "BatchNorm", "DiffGroupNorm", "MeanSubtractionNorm", "GraphNorm",
    "MessageNorm",
]  # fmt: skip
SCALED_NORMS = ("PN", "PN-SI", "PN-SCS", "CN")
TEN_SPLITS = ("chameleon", "squirrel", "texas", "wisconsin", "cornell", "actor")


@dataclass
class Config:
    """Node classification with deep graph networks (Table 3). Flags carry the reference's names."""

    output_dir: str
    """Folder of this run: args.yaml, metrics.jsonl, record.json. The same command again resumes it."""

    data: DataName = "cora"
    """The graph. Cora is the paper's first; `digits` is embedded and needs no file."""

    model: ModelName = "DeepGCN"
    """Architecture. Table 3 uses DeepGCN."""

    hid: int = 32
    """Width of the hidden layers; 32 as in the reference."""

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
    """Norm after the convolution of every hidden layer. LN here is rows centred and L2-normalized, no parameters."""

    norm_scale: float | None = None
    """Scale of PN, PN-SI, PN-SCS (unset: 1) and CN (required: a default of 0 would silently mean no ContraNorm)."""

    use_layer_norm: bool = False
    """One nn.LayerNorm, shared by all hidden layers, after the norm; Table 3's ContraNorm cells use it."""

    tau: float = 1.0
    """Temperature of ContraNorm's softmax; the reference has no other than 1."""

    identity: bool = True
    """ContraNorm as (1+s)·x - s·A·x, the released graph code; --no_identity: the paper's Eq. 6, x - s·A·x. With the
    LayerNorm behind it, a scale s of the first is s/(1+s) of the second, which ends at 1 where the first never does."""

    implementation: Literal["auto", "plain", "blocked", "linear"] = "auto"
    """How ContraNorm is computed: plain stores the N x N matrix, blocked never does, linear approximates in time linear
    in N; auto chooses an exact one."""

    degree: int = 2
    """Degree of the polynomial of `--implementation linear`, 1 to 3: 1 is by far the fastest, 3 the most exact."""

    missing_rate: float = 0.0
    """Percent (0 to 100) of the nodes outside the training set whose features are erased; 0 as in Table 3."""

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
    """Write collapse metrics of every layer (mean cosine, effective rank, variance) to probe.csv and the record."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU when there is one. Published numbers of this project name theirs."""

    report_to: str = "none"
    """Also log to tensorboard, wandb, trackio or mlflow, whichever is installed; metrics.jsonl is always written."""

    data_root: str = field(default_factory=default_data_root)
    """Folder with graphs/..., read first and never written; default $CONTRANORM_DATA, else data/."""

    def __post_init__(self) -> None:
        for name, low in [("hid", 1), ("nlayer", 1), ("epochs", 1), ("residual", 0), ("checkpoint_every", 1)]:
            if getattr(self, name) < low:
                raise ValueError(f"--{name} must be at least {low}, got {getattr(self, name)}")
        for name, high in [("dropout", 1.0), ("dropedge", 1.0)]:
            if not 0 <= getattr(self, name) < high:
                raise ValueError(f"--{name} must be in [0, 1), got {getattr(self, name)}")
        if not self.lr > 0 or not self.wd >= 0:
            raise ValueError(f"--lr must be > 0 and --wd >= 0, got {self.lr} and {self.wd}")
        if not 0 <= self.missing_rate <= 100:
            raise ValueError(f"--missing_rate is a percentage, 0 to 100, got {self.missing_rate}")
        if not self.tau > 0:
            raise ValueError(f"--tau must be > 0, got {self.tau}")
        if self.eval_every is not None and self.eval_every < 1:
            raise ValueError(f"--eval_every must be at least 1, got {self.eval_every}")
        self._check_norm()
        if self.split is not None and self.data not in TEN_SPLITS:
            raise ValueError(f"--split: {self.data} has one split; those with ten are {', '.join(TEN_SPLITS)}")
        if self.split is not None and not 0 <= self.split <= 9:
            raise ValueError(f"--split must be 0 to 9, got {self.split}")
        if self.model == "SGC" and self.residual:
            raise ValueError("--residual: SGC has one linear layer and nothing to add a residual to; leave it at 0")

    def _check_norm(self) -> None:
        """No flag is read and then ignored: a scale or temperature without a norm that uses it is refused."""
        if self.norm_mode == "CN" and (self.norm_scale is None or self.norm_scale == 0):
            raise ValueError("--norm_mode CN needs --norm_scale other than 0 (0 would be no ContraNorm at all)")
        if self.norm_mode not in SCALED_NORMS and self.norm_scale is not None:
            raise ValueError(f"--norm_scale has no effect with --norm_mode {self.norm_mode}: leave it out")
        if self.degree not in (1, 2, 3):
            raise ValueError(f"--degree must be 1, 2 or 3, got {self.degree}")
        if self.degree != 2 and self.implementation != "linear":
            raise ValueError(f"--degree belongs to --implementation linear, not {self.implementation}: leave it out")
        if self.norm_mode != "CN" and (self.tau != 1.0 or self.implementation != "auto" or not self.identity):
            raise ValueError(
                f"--tau, --no_identity and --implementation belong to --norm_mode CN, not {self.norm_mode}: leave out"
            )


@dataclass
class CommandLine(Config):
    """What `python -m gnn.main` takes: the settings of one run, or of one run for each of several seeds."""

    seed: int | None = None  # type: ignore[assignment]  # to tell whether it was given
    """Seed of weights, dropout, DropEdge and erased features (unset: 0). Splits do not depend on it."""

    seeds: list[int] | int | str | None = None
    """Several seeds in place of `--seed`, say 0,1,2: trained one after another in this process, which loads libraries
    and graph once; each in its own folder below the output folder (seed0, seed1, ...), as if it were run alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds is None:
            return
        if self.seed is not None:
            raise ValueError("--seed and --seeds do not go together: leave one of them out")
        self.seeds = parse_seeds(self.seeds)

    def runs(self) -> list[Config]:
        """The settings of each run, as each one's own command line would give them."""
        common = {f.name: getattr(self, f.name) for f in fields(Config)}
        if self.seeds is None:
            return [Config(**common | {"seed": self.seed or 0})]
        folders = {seed: str(Path(self.output_dir) / f"seed{seed}") for seed in self.seeds}
        return [Config(**common | {"seed": seed, "output_dir": folder}) for seed, folder in folders.items()]


def parse_seeds(given: list[int] | int | str) -> list[int]:
    """Seeds from `0,1,2`, `[0, 1, 2]` or a single number.

    Raises:
        ValueError: none, one of them twice, or no whole number.
    """
    if isinstance(given, str):
        try:
            given = [int(word) for word in given.split(",")] if given.strip() else []
        except ValueError:
            raise ValueError(f"--seeds must be whole numbers separated by commas, got {given!r}") from None
    seeds = [given] if isinstance(given, int) else given
    if not seeds:
        raise ValueError("--seeds is empty: name the seeds, say --seeds 0,1,2")
    if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
        raise ValueError(f"--seeds names {twice[0]} twice")
    return seeds
