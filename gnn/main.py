"""Train one graph network: `python -m gnn.main --data cora --nlayer 8 --norm_mode CN --norm_scale 1 ...`.

With `--seeds 0,1,2` in place of `--seed`, one after another for each seed.
"""

from __future__ import annotations

from collections.abc import Sequence

from gnn.config import CommandLine
from repro.config import parse_config
from repro.errors import run_main


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    asked = parse_config(
        CommandLine, argv, prog="gnn.main", description="Node classification with deep graph networks."
    )
    # Imported after parsing: a typing error is told at once, not after torch and PyG have loaded.
    if asked.seeds is None:
        from gnn.train import train

        train(*asked.runs())
    else:
        from gnn.seeds import train_seeds

        train_seeds(asked)


if __name__ == "__main__":
    run_main(main)
