"""Several seeds of one cell, one after another in one process: the libraries and the graph are loaded once.

Each seed is an ordinary run in its own folder, with the numbers that it has alone.
"""

from __future__ import annotations

from gnn.config import CommandLine
from gnn.train import Problem, fit
from repro.run.group import SeedGroup, told
from repro.run.run import Run


def train_seeds(asked: CommandLine) -> None:
    """Train the seeds that have no record yet; the folder ends with a record.json that sums them up.

    Args:
        asked: the settings, with `seeds`.
    """
    configs = asked.runs()
    group = SeedGroup(asked.output_dir, "gnn", asked)
    # A finished group needs no data; the others read it before there are folders: bad data leaves none.
    problem = None if group.trained else Problem(configs[0])
    with group:
        if group.done:
            return
        for config, folder in zip(configs, group.folders, strict=True):
            group.leave_if_asked()
            with Run(folder, "gnn", config, report_to=config.report_to) as run:
                if not run.done and problem is not None:
                    fit(run, config, problem)
            group.leave_if_asked(run)
        print(f"{told(group.summarize(), 'test_accuracy')}, {group.folder / 'record.json'}")
