"""What a list of commands would reproduce, and what it would cost: `... | python -m SSL_cifar.plan`.

One line for each command, whatever its seeds: the published accuracy that its runs will stand beside
(repro/report/paper.yaml), and an estimate of its GPU hours from the operations of one forward pass.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from repro.config import parse_config
from repro.errors import UserError, run_main
from repro.report.published import Entry, load_entries
from SSL_cifar import backbones, methods
from SSL_cifar.config import Config
from SSL_cifar.main import parse
from SSL_cifar.methods.base import Batch

IMAGES = {"CIFAR10": 50_000, "CIFAR100": 50_000, "IMNET100": 126_689}  # of the training sets
PROGRAM = ["-m", "SSL_cifar.main"]
BACKWARD = 2  # operations of a backward pass, in forward passes


@dataclass
class Settings:
    """How fast the device is."""

    tflops: float = 20.0
    """10^12 operations a second that a GPU sustains, for the estimate."""

    def __post_init__(self) -> None:
        if not self.tflops > 0:
            raise ValueError(f"--tflops must be above 0, got {self.tflops}")


def forward_operations(config: Config) -> float:
    """Floating-point operations of a method's forward pass over all views of one image."""
    rows = 2
    with torch.device("meta"):
        method = methods.load(config.method)(config, backbones.build(config), rows)
        images = torch.empty(rows, 3, config.crop_size, config.crop_size)
        index, boxes = torch.zeros(rows, dtype=torch.long), torch.zeros(rows, method.views, 4)
        batch = Batch(index, boxes, torch.zeros(rows, method.views, dtype=torch.bool), 0, 0, rows)
        with FlopCounterMode(display=False) as counter:
            method([images] * method.views, batch)
    return counter.get_total_flops() / rows


def gpu_hours(config: Config, tflops: float) -> float:
    """Estimate of a run's hours: forward and backward passes alone, at `tflops` sustained.

    Raises:
        UserError: it is not known how many training images the data set has.
    """
    images = config.max_train_samples or IMAGES.get(config.data_set)
    if images is None:
        raise UserError(f"--data_set {config.data_set}: of unknown size: give --max_train_samples")
    return (1 + BACKWARD) * forward_operations(config) * images * config.epochs / (tflops * 1e12) / 3600


def published(config: Config, entries: Iterable[Entry]) -> Entry | None:
    """The number that runs of these settings stand beside."""
    label = config.label()
    cell = vars(config) | {
        "experiment": "SSL_cifar", "data": label.data, "model": label.model, "method": label.method,
        "train_images": config.max_train_samples or IMAGES.get(config.data_set),
    }  # fmt: skip
    return next((entry for entry in entries if entry.fits(cell)), None)


def lines(commands: Iterable[str], tflops: float) -> Iterator[str]:
    """A line for each command without its seed and folder, then the sums."""
    seeds: dict[str, list[str]] = {}
    for command in commands:
        words = shlex.split(command, comments=True)
        kept, seed = list[str](), ""
        while words:
            word = words.pop(0)
            if word == "--seed":
                seed = words.pop(0)
            elif word == "--output_dir":
                words.pop(0)
            else:
                kept.append(word)
        if kept:
            seeds.setdefault(shlex.join(kept), []).append(seed)
    entries, total, found = load_entries(), 0.0, 0
    for command, drawn in seeds.items():
        words = shlex.split(command)
        told = f"seeds {' '.join(drawn)}" if any(drawn) else "one run"
        at = next((i for i in range(len(words)) if words[i : i + 2] == PROGRAM), None)
        centres = words[words.index("--center_path") + 1] if "--center_path" in words else None
        if at is None:
            told += "; no training"
        elif centres is not None and not Path(centres).exists():
            told += "; none published; hours not known before its tokens"
        else:
            config = parse([*words[at + 2 :], "--output_dir=unused"])
            entry, hours = published(config, entries), gpu_hours(config, tflops)
            total, found = total + hours * len(drawn), found + (entry is not None)
            told += f"; {'none published' if entry is None else f'published {100 * entry.mean:.1f}'}"
            told += f"; {hours:.1f} GPU hours each"
        yield f"{command}  # {told}"
    yield f"{found} published accuracies; {total:.0f} GPU hours, an estimate at {tflops:g} TFLOP/s, nothing measured"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: commands on standard input."""
    config = parse_config(Settings, argv, prog="python -m SSL_cifar.plan", description=__doc__ or "")
    for line in lines(sys.stdin, config.tflops):
        print(line)


if __name__ == "__main__":
    run_main(main)
