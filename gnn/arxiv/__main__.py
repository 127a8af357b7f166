"""Train one RevGAT: `python -m gnn.arxiv --mode teacher ...`, then `--mode student --teacher FOLDER ...`."""

from __future__ import annotations

from collections.abc import Sequence

from gnn.arxiv.config import Config
from repro.config import parse_config
from repro.errors import run_main

PRELOAD = ("gnn.arxiv.train",)  # what a process that starts many runs imports beforehand


def train_cell(config: Config) -> None:
    """Train one teacher or student; its folder ends with a record.json."""
    from gnn.arxiv.train import prepare, train
    from repro.run import run

    run.train_cell("arxiv", config, prepare, train)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    # `train_cell` imports torch and PyG, so that a typing error is reported before they load.
    train_cell(parse_config(Config, argv, prog="gnn.arxiv", description="RevGAT with ContraNorm on ogbn-arxiv."))


if __name__ == "__main__":
    run_main(main)
