"""What self-supervised training adds to a step: each piece against its plain form, side by side, on one core.

    python -m benchmarks.ssl --json out/ssl.json

augment: one call for a batch against torchvision image by image; filter: Gram matrix in float64 against the singular
value decomposition; bank: one gather and one scatter against a loop over samples; arcl: finding the worst pair without
gradient and running it again against all views with gradient; memory: what NT-Xent, filter and bank take; step: the
share of a training step of the small networks that is not forward, backward and optimizer. On a CPU the time is that of
the processor, which others' work on the machine does not lengthen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms as T
from tqdm import tqdm

from benchmarks.common import DEVICE, Rows, alternate_ms, goal, names_in, peak_extra_mb, report
from contranorm import spectral_filter
from repro.config import parse_config
from repro.errors import run_main
from SSL_cifar import backbones, methods
from SSL_cifar.augment import PRESETS, Augment
from SSL_cifar.banks import IndexBank
from SSL_cifar.main import parse
from SSL_cifar.methods.base import Batch, Method, nt_xent_terms
from SSL_cifar.optim import build_optimizer

CONFIGS = Path(methods.__file__).parents[1] / "configs"
# Goal → (part, row, whether at least), the ratio to reach.
FASTER = {
    ("augment", "32 pixels"): 5.0,
    ("augment", "64 pixels"): 3.0,
    ("filter", "256 x 2048"): 2.0,
    ("bank", "256 of 10,000 rows x 2048"): 5.0,
    ("arcl", "8 views"): 1.0,
}
CLOCK = {} if DEVICE == "cuda" else {"clock": time.process_time}
BANK_ROWS = 50_000  # of `memory`: CIFAR's images
OUTSIDE = 0.1  # most of a step
STEPS = {
    "rdm_simsiam": "siamese_cpu.yaml --pred_location target --sigma -1",
    "simsiam_multi": "siamese_cpu.yaml --epochs 16 --plain_epochs 5",
    "simclr_attn": "contrast_cpu.yaml",
}


@dataclass
class Config:
    """Settings of the benchmark."""

    only: str = "augment,filter,bank,arcl,memory,step"
    """parts, separated by commas"""
    json: str | None = None
    """file for the result"""
    rounds: int = 5
    """timings of each form, taken in turns"""
    threads: int = 1
    """cores; the goals are for one"""
    images: int = 256
    """in a batch"""


Forms = dict[str, Callable[[], object]]


def against(part: str, case: str, fast: Callable[[], object], plain: Forms, config: Config) -> Rows:
    """The fast form and its plain ones, with how many times faster it is than each."""
    times = alternate_ms({"fast": fast, **plain}, rounds=config.rounds, **CLOCK)
    rows: Rows = [{"part": part, "case": case, "form": "this repository's", "ms": times["fast"]}]
    return rows + [
        {"part": part, "case": case, "form": name, "ms": times[name], "times slower": times[name] / times["fast"]}
        for name in plain
    ]


def augment(config: Config) -> Iterator[Rows]:
    """SimCLR's recipe for CIFAR: crop, flip, jitter, grey."""
    preset = PRESETS["solo_cifar"]
    for side in (32, 64):
        pixels = np.random.default_rng(0).integers(0, 256, (config.images, side, side, 3)).astype(np.uint8)
        batched = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        own = Augment("solo_cifar", side, "CIFAR10", views=1)
        one_by_one = T.Compose(
            [
                T.RandomResizedCrop(side, scale=preset.scale, interpolation=T.InterpolationMode.BICUBIC),
                T.RandomHorizontalFlip(preset.flip),
                T.RandomApply([T.ColorJitter(*preset.jitter)], preset.jittered),
                T.RandomGrayscale(preset.grey),
                T.ToTensor(),
                T.Normalize(own.mean, own.std),
            ]
        )
        images = [Image.fromarray(image) for image in pixels]
        yield against(
            "augment",
            f"{side} pixels",
            lambda own=own, batched=batched: own(batched, own.draw(0, len(batched))),
            {"torchvision, image by image": lambda f=one_by_one, i=images: torch.stack([f(image) for image in i])},
            config,
        )


def whitened_by_svd(z: Tensor) -> Tensor:
    """U Vᵀ, what the filter gives for σ = -1."""
    u, _, vh = torch.linalg.svd(z, full_matrices=False)
    return u @ vh


def filters(config: Config) -> Iterator[Rows]:
    """The target of RDM with σ = -1."""
    for n, d in ((256, 2048), (256, 512), (256, 256)):
        z = torch.randn(n, d, device=DEVICE)
        plain: Forms = {
            "SVD, float32": lambda z=z: whitened_by_svd(z),
            "SVD, float64": lambda z=z: whitened_by_svd(z.double()),
        }
        yield against(
            "filter", f"{n} x {d}", lambda z=z: spectral_filter(z, "poly", -1, location="target"), plain, config
        )


def bank(config: Config) -> Iterator[Rows]:
    """SimSiam-Multi's targets: both views mixed with the last epoch's rows, and this epoch's rows kept."""
    rows, dim = 10_000, 2048
    kept = IndexBank(rows, dim).to(DEVICE)
    index = torch.randperm(rows)[: config.images].to(DEVICE)
    first, second = (torch.randn(config.images, dim, device=DEVICE) for _ in range(2))

    def fast() -> list[Tensor]:
        past = kept.read(index)
        kept.write(index, second)
        return [torch.lerp(one, past, 0.5) for one in (first, second)]

    def loop() -> list[Tensor]:
        mixed = [torch.empty_like(first), torch.empty_like(second)]
        for i, row in enumerate(index):  # as in the authors' code
            kept.present[row] = second[i]
            mixed[0][i] = 0.5 * first[i] + 0.5 * kept.past[row]
            mixed[1][i] = 0.5 * second[i] + 0.5 * kept.past[row]
        return mixed

    yield against("bank", f"{config.images} of {rows:,} rows x {dim}", fast, {"loop over samples": loop}, config)


def built(name: str, flags: str, config: Config) -> tuple[Method, Augment]:
    """A method of the small preset, and what makes its views."""
    words = f"--method {name} --config {CONFIGS}/{flags} --output_dir unused --batch_size {config.images}".split()
    settings = parse(words)
    method = methods.load(name)(settings, backbones.build(settings), 10_000).to(DEVICE)
    return method, Augment(settings.augment, settings.crop_size, settings.data_set, method.views)


def batch_for(method: Method, config: Config) -> Batch:
    """What is known of a batch of the first images."""
    index = torch.arange(config.images, device=DEVICE)
    boxes = torch.rand(config.images, method.views, 4, device=DEVICE) / 2
    return Batch(index, boxes, boxes[..., 0] > 0, 0, 0, config.images)


def arcl(config: Config) -> Iterator[Rows]:
    """Forward and backward of ArCL."""
    for views in (4, 8):
        ways: Forms = {}
        for name, flag in (("recompute", " --recompute"), ("all views with gradient", "")):
            method, _ = built("arcl", f"contrast_cpu.yaml --num_views {views}{flag}", config)
            images = [torch.randn(config.images, 3, 32, 32, device=DEVICE) for _ in range(views)]
            batch = batch_for(method, config)

            def run(method: Method = method, images: list[Tensor] = images, batch: Batch = batch) -> None:
                method.loss(method(images, batch), batch)[0].backward()

            ways[name] = run
        yield against("arcl", f"{views} views", ways.pop("recompute"), ways, config)


def memory(config: Config) -> Iterator[Rows]:
    """Largest memory beyond the inputs, forward and backward where there is one."""

    def contrast(n: int) -> None:
        z = [torch.randn(n, 128, requires_grad=True, device=DEVICE) for _ in range(2)]
        sum(nt_xent_terms(*z, 0.5)).mean().backward()  # type: ignore[union-attr]

    def online(n: int, d: int) -> None:
        spectral_filter(
            torch.randn(n, d, requires_grad=True, device=DEVICE), "poly", 1, location="online"
        ).sum().backward()

    cases: dict[tuple[str, str], Callable[[], object]] = {
        ("NT-Xent", "2 x 256 rows"): lambda: contrast(256),
        ("NT-Xent", "2 x 1,024 rows"): lambda: contrast(1024),
        ("filter online", "256 x 2048"): lambda: online(256, 2048),
        ("bank", f"{BANK_ROWS:,} x 2048, float32"): lambda: IndexBank(BANK_ROWS, 2048).to(DEVICE),
        ("bank", f"{BANK_ROWS:,} x 512, bfloat16"): lambda: IndexBank(BANK_ROWS, 512, torch.bfloat16).to(DEVICE),
    }
    for (form, case), function in cases.items():
        yield [{"part": "memory", "case": case, "form": form, "extra MiB": peak_extra_mb(function)}]


def step(config: Config) -> Iterator[Rows]:
    """A whole training step of the small networks, and its forward, backward and optimizer alone."""
    images = torch.randint(0, 256, (config.images, 3, 32, 32), dtype=torch.uint8, device=DEVICE)
    for name, flags in STEPS.items():
        method, views = built(name, flags, config)
        optimizer, batch = build_optimizer(method, method.settings), batch_for(method, config)
        fixed = list(views(images, views.draw(0, len(images)).to(DEVICE))[0].unbind(1))
        while getattr(method, "epochs_done", 99) < getattr(method.settings, "plain_epochs", 0):
            method.after_epoch()  # to where the bank is read

        def whole() -> None:
            made, boxes, flips = views(images, views.draw(0, len(images)).to(DEVICE))  # noqa: B023
            known = Batch(batch.index, boxes, flips, 0, 0, len(images))  # noqa: B023
            out = method(list(made.unbind(1)), known)  # noqa: B023
            method.loss(out, known)[0].backward()  # noqa: B023
            optimizer.step()  # noqa: B023
            optimizer.zero_grad()  # noqa: B023
            with torch.no_grad():
                method.after_step({k: v.detach() for k, v in out.items()}, known, 0.5)  # noqa: B023

        def network() -> None:
            out = [o for o in method(fixed, batch).values() if o.requires_grad]  # noqa: B023
            torch.autograd.backward(out, [torch.ones_like(o) for o in out])
            optimizer.step()  # noqa: B023
            optimizer.zero_grad()  # noqa: B023

        times = alternate_ms({"whole": whole, "network": network}, rounds=config.rounds, **CLOCK)
        share = max(0.0, 1 - times["network"] / times["whole"])
        yield [{"part": "step", "case": name, "form": "whole step", "ms": times["whole"], "share outside": share}]


PARTS = {"augment": augment, "filter": filters, "bank": bank, "arcl": arcl, "memory": memory, "step": step}


def check_goals(rows: Rows) -> Rows:
    """How many times faster than the fastest plain form; the share of a step outside the network."""
    goals = []
    for (part, case), target in FASTER.items():
        ratios = [r["times slower"] for r in rows if (r["part"], r["case"]) == (part, case) and "times slower" in r]
        if ratios:
            goals.append(goal(f"{part}, {case}: times faster", min(ratios), target, at_least=True))
    shares = [row["share outside"] for row in rows if row["part"] == "step"]
    if shares:
        goals.append(goal("step: largest share outside the network", max(shares), OUTSIDE, at_least=False))
    return goals


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(Config, argv, prog="benchmarks.ssl", description=__doc__ or "")
    names = names_in(config.only, PARTS)
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    rows: Rows = []
    for name in tqdm(names, desc="parts"):
        for measured in PARTS[name](config):
            rows += measured
    report("ssl", rows, check_goals(rows), config.json)


if __name__ == "__main__":
    run_main(main)
