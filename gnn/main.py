"""Train one graph network: `python -m gnn.main --data cora --nlayer 8 --norm_mode CN --norm_scale 1 ...`."""

from __future__ import annotations

from collections.abc import Sequence

from gnn.config import Config
from repro.config import parse_config
from repro.errors import run_main


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    config = parse_config(Config, argv, prog="gnn.main", description="Node classification with deep graph networks.")
    from gnn.train import train  # after parsing: a typing error is told at once, not after torch and PyG have loaded

    train(config)


if __name__ == "__main__":
    run_main(main)
