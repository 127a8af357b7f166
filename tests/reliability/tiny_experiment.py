"""A tiny resumable experiment: `python -m tiny_experiment --seed 0 --steps 5 --output_dir DIR`."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from repro.config import CellLabel, RunConfig
from repro.errors import run_main
from repro.run.run import Run
from repro.seeding import rng_state, seed_everything, set_rng_state

PRELOAD = ("torch", "repro.run.run")


@dataclass(kw_only=True)
class Config(RunConfig):
    """Settings of the tiny experiment."""

    steps: int = 5
    """Steps, with a checkpoint after each."""

    def label(self) -> CellLabel:
        return CellLabel(data="random", model="linear", method="vanilla")


def experiment(config: Config, pause: float = 0.0, leash: Path | None = None) -> None:
    """Least squares by SGD with momentum on random batches: every step depends on all the state before it.

    A step takes `pause` seconds more. With `leash`, a file that holds a number, the run with seed s waits at step t
    until the number is at least t(s + 1).
    """
    with Run(config.output_dir, "tiny", config) as run:
        if run.done:
            return
        seed_everything(config.seed)
        weight = torch.randn(8, requires_grad=True)
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        start, last = 0, float("nan")
        if (found := run.restore()) is not None:
            start, state = found
            with torch.no_grad():
                weight.copy_(state["weight"])
            optimizer.load_state_dict(state["optimizer"])
            set_rng_state(state["rng"])
            last = state["last"]
        for step in range(start + 1, config.steps + 1):
            batch = torch.randn(16, 8)
            loss = (batch @ weight - batch.sum(dim=1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            last = loss.item()
            run.log({"epoch": step, "loss": last})
            time.sleep(pause)
            while leash is not None and step * (config.seed + 1) > float(leash.read_text()):
                time.sleep(0.01)
            state = {"weight": weight.detach(), "optimizer": optimizer.state_dict(), "rng": rng_state(), "last": last}
            run.checkpoint(step, state)
        run.finish({"loss": last, "weight": weight.tolist()}, protocol="tiny", selection="last step")


def main() -> None:
    """Train; notes each start, and whether there was a record by then."""
    given = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    config = Config(output_dir=given["--output_dir"], seed=int(given["--seed"]), steps=int(given["--steps"]))
    folder = Path(config.output_dir)
    with open(folder / "starts.txt", "a") as file:
        file.write("again\n" if (folder / "record.json").exists() else "start\n")
    leash = os.environ.get("TINY_LEASH")
    experiment(config, float(os.environ.get("TINY_PAUSE", "0")), Path(leash) if leash else None)


if __name__ == "__main__":
    run_main(main)
