"""Train one graph network: `python -m gnn.main --data cora --nlayer 8 --norm_mode CN --scale 1 --output_dir out/a`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gnn.config import Config
from repro.config import parse_config
from repro.errors import run_main
from repro.run.track import is_done

PRELOAD = ("gnn.train",)  # what a process that starts many runs imports beforehand


def train_cell(config: Config) -> None:
    """Train and test one cell; its folder ends with a record.json."""
    from gnn.train import prepare, train
    from repro.run.run import Run

    finished = is_done(Path(config.output_dir))
    setup = None if finished else prepare(config)  # before Run: bad data leaves no folder; a finished run needs none
    with Run(config.output_dir, "gnn", config, report_to=config.report_to) as run:
        if setup is not None and not run.done:
            train(setup, run)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    # `train_cell` imports torch and PyG, so that a typing error is reported before they load.
    train_cell(parse_config(Config, argv, prog="gnn.main", description="Node classification with deep graph networks."))


if __name__ == "__main__":
    run_main(main)
