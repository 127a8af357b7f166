"""Tune every method with one budget: print trials for repro.sweep, then choose by validation and print the final runs.

    python -m repro.tune --space SPACE.yaml --data cora --depths 2 8 | python -m repro.sweep --results R/tuning
    python -m repro.tune --space SPACE.yaml --data cora --depths 2 8 --choose R/tuning --output R/tuning.json |
        python -m repro.sweep --results R/runs

One quasi-random list of `--trials` points (scrambled Halton, scipy) serves every method, data set and depth: its first
coordinates are the settings that all methods share, the others a method's own, or those that are left to tune where it
has none. Trials run on seeds of their own, with the space's `trial_flags`, say `--hold_out 0.1` where a data set has no
validation set of its own; the point of the highest mean of the validation metric is chosen, the first of several. Test
numbers are not looked at.
"""  # noqa: D301

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import qmc

from repro.config import load_yaml, parse_config
from repro.errors import UserError, run_main
from repro.files import write_atomic
from repro.report.records import iterate_records
from repro.sweep.cell import Canonical, canonical


@dataclass
class Config:
    """What to tune, and with which budget."""

    space: str
    """YAML file: the command, the validation metric, and what is searched, for all methods and for each."""
    data: list[str]
    """Data sets."""
    depths: list[int]
    """Numbers of layers."""
    methods: list[str] = field(default_factory=list)
    """Methods of the space; unset: all."""
    trials: int = 8
    """Settings per method, data set and depth, the same number for all."""
    tuning_seeds: list[int] = field(default_factory=lambda: [100])
    """Seeds of the trials: none that the final runs have."""
    flags: str = ""
    """Appended to every line."""
    draw: int = 0
    """Seed of the quasi-random list."""
    choose: list[str] | str = field(default_factory=list)
    """Folders or files with the records of all trials: choose by them, and print the final runs."""
    seeds: list[int] = field(default_factory=lambda: list(range(10)))
    """Seeds of the final runs."""
    output: str | None = None
    """With --choose: JSON file for the choice and all trials."""

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ValueError(f"--trials must be at least 1, got {self.trials}")
        for name in ("data", "depths", "tuning_seeds", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is empty: name at least one")
        if both := sorted(set(self.seeds) & set(self.tuning_seeds)):
            raise ValueError(f"--seeds and --tuning_seeds share {both[0]}: a choice is tested on seeds it has not seen")
        if self.output and not self.choose:
            raise ValueError("--output belongs to --choose: there is no choice to write before the trials have run")


@dataclass(frozen=True)
class Range:
    """Where a setting is searched."""

    scale: str  # "linear", "log" or "integer"
    low: float
    high: float

    def at(self, u: float) -> float:
        """The value at 0 ≤ u < 1, in three digits."""
        if self.scale == "integer":
            return math.floor(self.low + (self.high - self.low + 1) * u)
        if self.scale == "log":
            return float(f"{self.low * (self.high / self.low) ** u:.3g}")
        return float(f"{self.low + (self.high - self.low) * u:.3g}")


@dataclass(frozen=True)
class Method:
    """A row of the table: fixed flags, and the ranges that are searched, the shared ones first."""

    name: str
    flags: str
    search: dict[str, Range]

    def settings(self, point: Iterable[float]) -> dict[str, float]:
        """Flag → value at a point of the unit cube."""
        return {name: within.at(float(u)) for (name, within), u in zip(self.search.items(), point, strict=False)}


@dataclass(frozen=True)
class Space:
    """What a space file says."""

    command: str  # with {data} and {depth}
    metric: str
    methods: list[Method]
    trial_flags: str = ""  # of the trials, not of the final runs


def load_space(path: Path) -> Space:
    """Read and check a space file.

    Raises:
        UserError: a key is missing or unknown, the metric is one of a test set, or a range is none.
    """
    content = load_yaml(path)
    needed = {"command", "metric", "search", "methods"}
    if not isinstance(content, dict) or not needed <= set(content) <= {*needed, "trial_flags"}:
        raise UserError(f"{path}: must hold the keys command, metric, search and methods, and may hold trial_flags")
    for name in ("search", "methods"):
        if not isinstance(content[name], dict) or not (content[name] or name == "search"):
            raise UserError(f"{path}: {name} must be a mapping{'' if name == 'search' else ' with a method or more'}")
    try:
        str(content["command"]).format(data="", depth=0)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"{path}: command may hold {{data}} and {{depth}} in braces, not {error}") from error
    if missing := [name for name in ("{data}", "{depth}") if name not in str(content["command"])]:
        raise UserError(f"{path}: command lacks {missing[0]}")
    metric = str(content["metric"])
    if "test" in metric:
        raise UserError(f"{path}: metric {metric}: a choice by test numbers is none; name a validation metric")
    methods = []
    for name, method in content["methods"].items():
        if not isinstance(method, dict) or not set(method) <= {"flags", "search"}:
            raise UserError(f"{path}: {name} may hold flags and search")
        if not isinstance(method.get("search", {}), dict):
            raise UserError(f"{path}: {name}: search must be a mapping")
        ranges = {**content["search"], **method.get("search", {})}
        found = {flag: _range(value, f"{path}: {name}: {flag}") for flag, value in ranges.items()}
        methods.append(Method(name, str(method.get("flags", "")), found))
    return Space(str(content["command"]), metric, methods, str(content.get("trial_flags", "")))


def _range(value: Any, where: str) -> Range:
    scale, *bounds = value if isinstance(value, list) and value else [None]
    numbers = [float(bound) for bound in bounds if isinstance(bound, (int, float)) and math.isfinite(bound)]
    low, high = numbers if len(numbers) == len(bounds) == 2 else (1.0, 0.0)
    whole = low.is_integer() and high.is_integer()
    known = {"linear": True, "log": low > 0, "integer": whole}
    if not isinstance(scale, str) or not known.get(scale) or not low < high:
        kinds = "[linear, LOW, HIGH], [log, LOW, HIGH] with 0 < LOW, or [integer, LOW, HIGH]"
        raise UserError(f"{where}: must be {kinds}, got {value!r}")
    return Range(scale, low, high)


@dataclass(frozen=True)
class Task:
    """One cell of the final table, with its T settings."""

    data: str
    depth: int
    method: Method
    settings: list[dict[str, float]]

    def trial(self, config: Config, space: Space, settings: dict[str, float], seed: int) -> str:
        """The command of one trial."""
        return self.line(space, settings, space.trial_flags, f"--seed {seed}", config.flags)

    def line(self, space: Space, settings: dict[str, float], *more: str) -> str:
        """The command of one run."""
        words = [space.command.format(data=self.data, depth=self.depth), self.method.flags]
        words += [f"--{name} {value:g}" for name, value in settings.items()]
        return " ".join(filter(None, [*words, *more]))


def tasks_of(config: Config, space: Space) -> list[Task]:
    """All cells, in order of data set, depth and method."""
    known = {method.name: method for method in space.methods}
    if unknown := [name for name in config.methods if name not in known]:
        raise UserError(f"--methods {unknown[0]}: {config.space} has {', '.join(known)}")
    chosen = [known[name] for name in config.methods] if config.methods else space.methods
    dimensions = max(len(method.search) for method in space.methods)  # of all, so that a part draws the same points
    points = qmc.Halton(dimensions, rng=np.random.default_rng(config.draw)).random(config.trials)
    return [
        Task(data, depth, method, [method.settings(point) for point in points])
        for data, depth, method in itertools.product(config.data, config.depths, chosen)
    ]


def choose(config: Config, space: Space, tasks: list[Task]) -> list[dict[str, Any]]:
    """Each task's trials with their validation numbers, and the settings of the highest mean.

    Raises:
        UserError: a trial has no record, or its record no such metric.
    """
    found: dict[Canonical, tuple[str, dict[str, Any]]] = {}
    for where, record in iterate_records(config.choose, as_written=True):
        found[canonical(str(record.get("command", "")))] = where, record["metrics"]
    missing: list[str] = []
    choices = []
    for task in tasks:
        trials = []
        for settings in task.settings:
            lines = [task.trial(config, space, settings, seed) for seed in config.tuning_seeds]
            missing += [line for line in lines if canonical(line) not in found]
            values = [_validation(space, *found[canonical(line)]) for line in lines if canonical(line) in found]
            trials.append({"settings": settings, "validation": values})
        best = max(trials, key=_mean)
        cell = {"data": task.data, "depth": task.depth, "method": task.method.name}
        choices.append({**cell, "chosen": best["settings"], "trials": trials})
    if missing:
        raise UserError(f"{len(missing)} trials have no record in {config.choose}: run them first, say {missing[0]!r}")
    return choices


def _validation(space: Space, where: str, metrics: dict[str, Any]) -> float | str:
    """The validation number of a run; "nan", as records have it, where training diverged."""
    if space.metric not in metrics:
        raise UserError(
            f"{where}: no {space.metric} in its metrics: hold out a part of train, test is not to choose by"
        )
    value: float | str = metrics[space.metric]
    return value


def _mean(trial: dict[str, Any]) -> float:
    """Mean over the tuning seeds; a diverged run makes its trial the last choice."""
    values = [float(value) for value in trial["validation"]]
    return sum(values) / len(values) if values and all(map(math.isfinite, values)) else -math.inf


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(Config, argv, prog="python -m repro.tune", description=__doc__ or "")
    space = load_space(Path(config.space))
    tasks = tasks_of(config, space)
    if not config.choose:
        for task, settings, seed in ((t, s, seed) for t in tasks for s in t.settings for seed in config.tuning_seeds):
            print(task.trial(config, space, settings, seed))
        return
    choices = choose(config, space, tasks)
    if config.output:
        content = {
            **{name: getattr(config, name) for name in ("trials", "tuning_seeds", "draw", "flags")},
            "space": dataclasses.asdict(space),
            "cells": choices,
        }
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(config.output), (json.dumps(content, indent=1) + "\n").encode())
    for (task, choice), seed in itertools.product(zip(tasks, choices, strict=True), config.seeds):
        budget = f"--tuning_trials {config.trials}"
        print(task.line(space, choice["chosen"], budget, f"--seed {seed}", config.flags))


if __name__ == "__main__":
    run_main(main)
