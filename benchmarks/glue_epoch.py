"""An RTE epoch with MiniLM and ContraNorm, as the program trains it: what each improvement adds to the last.

All ways train on the same examples, drawn once, and take their steps in turn, so that a slow minute of the machine
hits all of them.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.common import DEVICE, Rows, has_bfloat16, synchronize
from BERT_glue.config import parse
from BERT_glue.data import make_loader
from BERT_glue.efficiency import UsedRows
from BERT_glue.train import TrainingSetup, make_accelerator, prepare, train_batch
from repro.seeding import seed_everything

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
class Way:
    """One set of flags, ready to train."""

    setup: TrainingSetup
    batches: Any
    precision: contextlib.AbstractContextManager[Any]
    seconds: list[float] = field(default_factory=list)

    def step(self) -> None:
        """One batch, timed."""
        number, batch = next(self.batches)
        synchronize()
        start = time.perf_counter()
        with self.precision:
            train_batch(self.setup, batch, number)
        synchronize()
        self.seconds.append(time.perf_counter() - start)


def measure(data_root: str, steps: int, scratch: Path) -> Rows:
    """One row per way.

    Args:
        data_root: with glue/rte.
        steps: timed optimizer steps; one more comes before them.
        scratch: folder that the settings name; nothing is written there.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    ways = {}
    flags = [*COMMON, "--data_root", data_root, "--output_dir", str(scratch), *OFF]
    for name, flag in WAYS.items():
        flags += [flag] if flag else []
        ways[name] = build(flags, steps)
    if has_bfloat16():
        ways["+ bfloat16"] = build(flags, steps, torch.autocast(DEVICE, torch.bfloat16))
    for _ in range(steps + 1):
        for way in ways.values():
            way.step()
    slow = sum(next(iter(ways.values())).seconds[1:])
    return [
        {
            "work": "RTE, MiniLM",
            "way": name,
            "examples a second": BATCH * steps / sum(way.seconds[1:]),
            "times faster": slow / sum(way.seconds[1:]),
            "weights, gradients, moments MB": state_mb(way.setup),
        }
        for name, way in ways.items()
    ]


def build(flags: list[str], steps: int, precision: contextlib.AbstractContextManager[Any] | None = None) -> Way:
    """A setup with these flags; its batches are the warm-up's and those of the drawn examples."""
    config = parse(flags)
    accelerator = make_accelerator(config)
    setup = prepare(config, accelerator)
    assert setup.train is not None
    rows: Any = setup.train.dataset
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: (steps + 1) * BATCH].tolist()
    first, setup.train = (
        accelerator.prepare(
            make_loader(rows.select(part), setup.tokenizer, BATCH, shuffle=True, group_by_length=config.group_by_length)
        )
        for part in (drawn[:BATCH], drawn[BATCH:])
    )
    seed_everything(config.seed)
    setup.model.train()

    def batches() -> Any:
        for loader in (first, setup.train):
            yield from enumerate(loader)

    return Way(setup, batches(), precision or contextlib.nullcontext())


def state_mb(setup: TrainingSetup) -> float:
    """Memory of the parameters, their gradients, and the optimizer's state, in MiB."""
    tensors = [t for p in setup.model.parameters() for t in (p, p)]
    tensors += [module.rest for module in setup.model.modules() if isinstance(module, UsedRows)]
    tensors += [t for state in setup.optimizer.state.values() for t in state.values()]
    return sum(t.nbytes for t in tensors) / 2**20
