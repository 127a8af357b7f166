"""What a run survives: a Markdown table of what the reliability tests measured.

RELIABILITY_FIGURES=results/reliability/figures.json python -m pytest tests/reliability
python -m benchmarks.reliability
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.table import markdown
from repro.config import parse_config
from repro.errors import UserError, run_main

KILLED = ("of_the_sweep", "of_a_cell", "of_a_server", "of_everything")


@dataclass
class Config:
    """Which figures."""

    figures: str = "results/reliability/figures.json"
    """JSON file that the tests wrote."""


def rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """(what was done, what came of it) for every figure that is there."""
    found: list[tuple[str, str]] = []
    if kills := figures.get("kills"):
        found.append((
            f"{kills['kills']} SIGKILLs at random moments over a {kills['cells']}-cell sweep ("
            + ", ".join(f"{kills[name]} {name.replace('_', ' ')}" for name in KILLED if name in kills)
            + ")",
            f"{kills['lost']} cells lost, {kills['run_again_after_record']} run again after their record, "
            f"{kills['differing_records']} records differ from the undisturbed sweep's",
        ))  # fmt: skip
    if shared := figures.get("two_sweeps"):
        found.append((
            f"two sweeps at once over one folder of {shared['cells']} cells", f"{shared['cell_starts']} cell starts"
        ))  # fmt: skip
    for name, failure in (("write_deaths", "death before"), ("write_errors", "disk full at")):
        if points := figures.get(name):
            found.append((
                f"{failure} every write of a run, {points['points']} of them",
                f"{points['resumed_equal']} resumed with equal records",
            ))  # fmt: skip
    if damage := figures.get("checkpoint_damage"):
        found.append((
            f"a checkpoint of {damage['bytes']} bytes: a bit flipped at, and the file cut at, every offset",
            f"{damage['noticed']} of {damage['damages']} damages noticed",
        ))  # fmt: skip
    for kind, outcomes in sorted(figures.get("mutated_inputs", {}).items()):
        results = ", ".join(f"{number} {name}" for name, number in sorted(outcomes.items()) if name != "inputs")
        found.append((f"{outcomes['inputs']} mutated {kind}", f"{results}; 0 tracebacks, hangs or executed code"))
    if processes := figures.get("one of two processes killed"):
        found.append((
            "one of two processes under torchrun killed",
            f"the other ended after {processes['seconds until the other ended']} s; resumed to the undisturbed result",
        ))  # fmt: skip
    return found


def main(argv: list[str] | None = None) -> None:
    """Print the table as Markdown."""
    config = parse_config(Config, argv, prog="benchmarks.reliability", description=__doc__ or "")
    path = Path(config.figures)
    try:
        found = rows(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file (RELIABILITY_FIGURES={path} pytest tests/reliability)") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: not a file of reliability figures ({error})") from error
    print(markdown([{"Done to it": done, "Result": result} for done, result in found]))


if __name__ == "__main__":
    run_main(main)
