"""The three experiments as a user runs them, each against its slow way: a Table 3 cell, a GLUE epoch, a DeiT epoch.

    python -m benchmarks.end_to_end --data_root data --json out/e2e.json

Cells are ordinary runs of the three mains in a temporary folder, a few epochs or steps of them; an epoch's time is the
difference of a longer and a shorter run, so that loading does not count. Work whose data is not there is left out, with
a message.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.benchmark import timer
from tqdm import tqdm

import gnn.main
import ViT_imagenet.main
from benchmarks.common import DEVICE, Rows, goal, has_bfloat16, names_in, report
from BERT_glue.config import parse
from BERT_glue.data import make_loader
from BERT_glue.efficiency import UsedRows
from BERT_glue.train import TrainingSetup, make_accelerator, prepare, train_batch
from repro.config import default_data_root, parse_config
from repro.errors import UserError, run_main
from repro.seeding import seed_everything

# part -> the data that it needs
PARTS = {"cell": "graphs/planetoid/Cora/raw", "glue": "glue/rte", "deit": "images/cifar10"}


BATCH = 32
COMMON = ["--model_name_or_path", "minilm", "--task_name", "rte", "--pos", "7", "--scale", "0.01", "--seed", "0"]
OFF = ["--no_group_by_length", "--no_compact_embeddings", "--no_skip_unread_tokens", "--no_fused_optimizer"]
OFF += ["--no_cheap_dropout"]
# way -> the flag that it adds to those before it
WAYS = {
    "float32, unbucketed": "",
    "+ bucketed": "--group_by_length",
    "+ compact embeddings": "--compact_embeddings",
    "+ fused optimizer": "--fused_optimizer",
    "+ unread tokens skipped": "--skip_unread_tokens",
    "+ cheap dropout": "--cheap_dropout",
}


@dataclass
class Config:
    """Settings of the benchmark."""

    only: str = ",".join(PARTS)
    """parts, separated by commas"""
    json: str | None = None
    """file for the result"""
    data_root: str = field(default_factory=default_data_root)
    """folder with graphs/, glue/ and images/"""
    depth: int = 16
    """layers of the Table 3 cell"""
    steps: int = 20
    """optimizer steps of the GLUE measurement, besides one to warm up"""
    images: int = 2000
    """training images of the DeiT measurement"""


def run_quietly(main: Any, arguments: list[str], folder: Path) -> Rows:
    """Run a main; the lines of its metrics.jsonl, and its record last."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        main([*arguments, "--output_dir", str(folder)])
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in [*lines, (folder / "record.json").read_text(encoding="utf-8")]]


def table3_cell(config: Config, scratch: Path) -> tuple[Rows, Rows]:
    """Seconds of an epoch of a Cora cell: the reference's order of work, and ours, exact and linear."""
    common = ["--config", "gnn/configs/cora.yaml", "--data_root", config.data_root, "--nlayer", str(config.depth)]
    common += ["--norm_mode", "CN", "--norm_scale", "1.0", "--use_layer_norm", "--checkpoint_every", "1000"]
    ways = {
        "plain, validation pass every epoch": ["--implementation", "plain", "--eval_every", "1"],
        "exact": ["--implementation", "auto"],
        "linear, degree 1": ["--implementation", "linear", "--degree", "1"],
        "linear, degree 2": ["--implementation", "linear"],
    }
    rows: Rows = []
    for way, flags in ways.items():
        few, many = (2, 10) if "plain" in flags else (5, 45)
        short, long = (
            run_quietly(gnn.main.main, [*common, *flags, "--epochs", str(n)], scratch / f"{way}-{n}")[-1]["seconds"]
            for n in (few, many)
        )
        row = {"work": f"Cora, depth {config.depth}, one epoch", "way": way, "seconds": (long - short) / (many - few)}
        rows.append(row | {"times faster": (rows or [row])[0]["seconds"] / row["seconds"]})
    return rows, [goal_of_the_best("Table 3 cell: times faster than plain", rows, 5)]


def goal_of_the_best(name: str, rows: Rows, target: float) -> dict[str, Any]:
    """The goal that the best way must reach."""
    best = max(rows, key=lambda row: float(row["times faster"]))
    return goal(f"{name} ({best['way']})", best["times faster"], target, at_least=True)


def glue_epoch(config: Config, scratch: Path) -> tuple[Rows, Rows]:
    """RTE examples per second with MiniLM and ContraNorm: the plain loop, and each improvement on top of the last.

    All ways train on the same examples, drawn once, and take their steps in turn, so that a slow minute of the machine
    hits all of them. Nothing is written to `scratch`.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    ways = {}
    flags = [*COMMON, "--data_root", config.data_root, "--output_dir", str(scratch), *OFF]
    for name, flag in WAYS.items():
        flags += [flag] if flag else []
        ways[name] = build(flags, config.steps)
    if has_bfloat16():
        ways["+ bfloat16"] = build(flags, config.steps, bfloat16=True)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(config.steps + 1):
        for name, (_, step) in ways.items():
            taken[name].append(step())
    seconds = {name: sum(times[1:]) for name, times in taken.items()}
    rows: Rows = [
        {
            "work": "RTE, MiniLM",
            "way": name,
            "examples a second": BATCH * config.steps / seconds[name],
            "times faster": next(iter(seconds.values())) / seconds[name],
            "weights, gradients, moments MB": state_mb(setup),
        }
        for name, (setup, _) in ways.items()
    ]
    return rows, [goal_of_the_best("GLUE epoch: examples per second, times the slow way", rows, 2.5)]


def build(flags: list[str], steps: int, bfloat16: bool = False) -> tuple[TrainingSetup, Callable[[], float]]:
    """A setup with these flags, and a timed step on the warm-up's batch, then on those of the drawn examples."""
    config = parse(flags)
    accelerator = make_accelerator(config)
    setup = prepare(config, accelerator)
    assert setup.train is not None
    rows: Any = setup.train.dataset
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: (steps + 1) * BATCH].tolist()
    grouped = config.group_by_length
    first, setup.train = (
        accelerator.prepare(make_loader(part, setup.tokenizer, BATCH, shuffle=True, group_by_length=grouped))
        for part in (rows.select(drawn[:BATCH]), rows.select(drawn[BATCH:]))
    )
    seed_everything(config.seed)
    setup.model.train()
    batches = itertools.chain.from_iterable(map(enumerate, (first, setup.train)))

    def step() -> float:
        number, batch = next(batches)
        start = timer()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bfloat16):
            train_batch(setup, batch, number)
        return timer() - start

    return setup, step


def state_mb(setup: TrainingSetup) -> float:
    """Memory of the parameters, their gradients, and the optimizer's state, in MiB."""
    tensors = [t for p in setup.model.parameters() for t in (p, p)]
    tensors += [module.rest for module in setup.model.modules() if isinstance(module, UsedRows)]
    tensors += [t for state in setup.optimizer.state.values() for t in state.values()]
    return sum(t.nbytes for t in tensors) / 2**20


def deit_epoch(config: Config, scratch: Path) -> tuple[Rows, Rows]:
    """Images per second of the CIFAR-10 configuration, vanilla and with ContraNorm."""
    common = ["--config", "ViT_imagenet/configs/cifar10_cpu.yaml", "--epochs", "1", "--max_test_samples", "100"]
    common += ["--data-path", str(Path(config.data_root) / "images" / "cifar10"), "--seed", "0"]
    common += ["--max-train-samples", str(config.images)]
    ways = {"vanilla": ["--norm", "vanilla"], "ContraNorm": ["--scale", "0.1"]}
    run = functools.partial(run_quietly, ViT_imagenet.main.main)
    rate = {w: run([*common, *flags], scratch / w)[0]["images_per_second"] for w, flags in ways.items()}
    rows = [
        {"work": "CIFAR-10, cifar10_cpu.yaml", "way": way, "images a second": r, "times faster": r / rate["vanilla"]}
        for way, r in rate.items()
    ]
    return rows, []


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(Config, argv, prog="benchmarks.end_to_end", description=__doc__ or "")
    rows: Rows = []
    goals: Rows = []
    for name in tqdm(names_in(config.only, PARTS), desc="parts"):
        if not (Path(config.data_root) / PARTS[name]).exists():
            tqdm.write(f"{name} left out: no {PARTS[name]} below --data_root {config.data_root}")
            continue
        measure = {"cell": table3_cell, "glue": glue_epoch, "deit": deit_epoch}[name]
        with tempfile.TemporaryDirectory() as scratch:
            more_rows, more_goals = measure(config, Path(scratch))
        rows += more_rows
        goals += more_goals
    if not rows:
        raise UserError(f"--data_root {config.data_root}: none of the data is there; nothing was measured")
    report("end_to_end", rows, goals, config.json)


if __name__ == "__main__":
    run_main(main)
