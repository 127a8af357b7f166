"""Train one graph network: `python -m gnn.main --data cora --nlayer 8 --norm_mode CN --scale 1 --output_dir out/a`."""

from __future__ import annotations

from collections.abc import Sequence

from gnn.config import Config
from repro.config import parse_config
from repro.errors import run_main

PRELOAD = ("gnn.train",)  # what a process that starts many runs imports beforehand


def train_cell(config: Config) -> None:
    """Train and test one cell; its folder ends with a record.json."""
    from gnn.train import prepare, train
    from repro.run import run

    run.train_cell("gnn", config, prepare, train)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    # `train_cell` imports torch and PyG, so that a typing error is reported before they load.
    train_cell(parse_config(Config, argv, prog="gnn.main", description="Node classification with deep graph networks."))


if __name__ == "__main__":
    run_main(main)
