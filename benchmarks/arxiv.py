"""A training step of RevGAT on a generated graph of ogbn-arxiv's size: seconds and peak memory of every variant.

    python -m benchmarks.arxiv --json out/arxiv.json

Random edges and features; each variant runs in a fresh process: forward, backward and optimizer step. The memory is the
largest resident size during them beyond what the process held before the first. The convolution alone is measured on
half of the graph, by its sparse product and edge by edge. `--fraction 0.1` takes a tenth of the nodes and edges; what
needs more memory than is free is left out, and named.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.common import goal, report
from gnn.arxiv import models
from gnn.arxiv.config import Config as RunSettings
from gnn.arxiv.data import Counts
from gnn.arxiv.loss import log_cross_entropy, one_hot
from gnn.layers import Adjacency
from repro.config import parse_config
from repro.errors import UserError, run_main

NORMS: dict[str, dict[str, Any]] = {
    "none": {},
    "D-ContraNorm": {"norm": "ContraNorm", "scale": 1.0},
    "node-wise, linear, degree 1": {
        "norm": "ContraNorm", "scale": 1.0, "axis": "tokens", "implementation": "linear", "degree": 1
    },
}  # fmt: skip
CONVOLUTIONS = ("sparse product", "edge by edge")


@dataclass(frozen=True)
class Variant:
    """One measured program: a training step of the network, or (`convolution`) of its first layer alone."""

    norm: str = "none"
    layers: int = 2
    reversible: bool = True
    convolution: str = ""
    nodes: int = Counts.nodes
    edges: int = Counts.edges
    features: int = Counts.features
    hidden: int = 256
    steps: int = 1

    def expected_gib(self) -> float:
        """Rough peak, to leave out what would not fit, in tensors of all nodes (or edges) by 768."""
        if self.convolution:
            rows = 2.8 * 2 * self.edges if self.convolution == "edge by edge" else 7 * self.nodes
        else:
            node_wise = self.norm not in ("none", "D-ContraNorm")
            per_layer = 3.0 if node_wise else 0.0 if self.reversible else 3.5 if self.norm == "none" else 5.0
            rows = self.nodes * (10 + 4 * node_wise + 7 * (self.layers > 2) + per_layer * (self.layers - 2))
        return rows * 3 * self.hidden * 4 / 2**30


@dataclass
class Config:
    """Settings of the benchmark."""

    json: str | None = None
    """file for the result"""
    fraction: float = 1.0
    """share of ogbn-arxiv's nodes and edges"""
    features: int = 128
    """input features: 128 as OGB's, 768 as GIANT-XRT's"""
    steps: int = 1
    """timed steps of each variant; several come after one to warm up"""
    measure: str | None = None
    """internal: measure this one variant (JSON) in this process, and print the result as JSON"""

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1 or self.steps < 1 or self.features < 1:
            raise ValueError("--fraction must be in (0, 1], --steps and --features at least 1")


def network_step(variant: Variant, adjacency: Adjacency, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Forward, backward and optimizer step of the whole network, label channels included."""
    classes = Counts.classes
    settings = RunSettings(
        output_dir="unused", n_layers=variant.layers, n_hidden=variant.hidden, reversible=variant.reversible,
        **NORMS[variant.norm],
    )  # fmt: skip
    model = models.RevGAT(settings, x.shape[1] + classes, classes).to(x.device).train()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=settings.lr)
    labels = one_hot(y, torch.rand(len(y), device=x.device) < 0.27, classes)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        log_cross_entropy(model([x, labels], adjacency), y).backward()
        optimizer.step()

    return step


def convolution_step(variant: Variant, adjacency: Adjacency, x: Tensor) -> Callable[[], None]:
    """Forward and backward of the attention alone: 3 heads, all edges; f and scores are given."""
    conv = models.GraphAttention(x.shape[1], variant.hidden, 3, use_norm=True, attn_dst=False).to(x.device)
    (graph,) = models.layer_graphs(adjacency, 1, 0.0)
    with torch.no_grad():
        f = models.project([x], conv.weight).view(len(x), 3, variant.hidden)
        source = (f * conv.attention_source).sum(dim=-1)
    f.requires_grad_()
    source.requires_grad_()

    def step() -> None:
        if variant.convolution == "sparse product":
            out = conv.by_source(f, source, graph)
        else:
            out = conv.by_edge(f, source, None, graph)
        torch.autograd.grad(out, [f, source], f.detach())

    return step


def measure(variant: Variant) -> dict[str, float]:
    """Seconds of a step, by the clock and of processor time, and MiB beyond what the process held before the first."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    edges = torch.randint(0, variant.nodes, (2, variant.edges), device=device)
    adjacency = Adjacency.from_edges(edges, variant.nodes)
    x = torch.randn(variant.nodes, variant.features, device=device)
    y = torch.randint(0, Counts.classes, (variant.nodes,), device=device)
    make = convolution_step(variant, adjacency, x) if variant.convolution else None
    step = make or network_step(variant, adjacency, x, y)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    before = reset_peak(device)
    if variant.steps > 1:
        step()  # to warm up
    wait()
    start, worked = time.perf_counter(), time.process_time()
    for _ in range(variant.steps):
        step()
    wait()
    seconds, worked = time.perf_counter() - start, time.process_time() - worked
    per_step = {"seconds": seconds / variant.steps, "CPU seconds": worked / variant.steps}
    return {**per_step, "MiB": peak_mib(device) - before}


def reset_peak(device: torch.device) -> float:
    """Start the peak again from the present size, and return that in MiB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    return peak_mib(device)


def peak_mib(device: torch.device) -> float:
    """Largest size since `reset_peak`, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def in_fresh_process(variant: Variant) -> dict[str, float]:
    """`measure` in a process of its own, in which freed tensors go back to the system at once."""
    command = [sys.executable, "-m", "benchmarks.arxiv", "--measure", json.dumps(asdict(variant))]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"{variant}: {reason}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def variants(config: Config) -> list[Variant]:
    """All that are measured."""
    size = Variant(
        nodes=round(config.fraction * Counts.nodes), edges=round(config.fraction * Counts.edges),
        features=config.features, steps=config.steps,
    )  # fmt: skip
    half = replace(size, nodes=size.nodes // 2, edges=size.edges // 2)  # all edges one by one would take 20 GiB
    chosen = [replace(half, convolution=name) for name in CONVOLUTIONS]
    for norm in NORMS:
        chosen.append(replace(size, norm=norm))  # two layers: no reversible block
        for reversible in (True, False) if "linear" not in norm else (True,):
            chosen.append(replace(size, norm=norm, layers=5, reversible=reversible))
    return chosen


def check_goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sparse product against the edges; time is the processor's on a CPU, where other programs may be running."""
    clock = "seconds" if torch.cuda.is_available() else "CPU seconds"
    found = {row["what"]: row for row in rows}
    if not set(CONVOLUTIONS) <= set(found):
        return []
    product, edges = (found[name] for name in CONVOLUTIONS)
    return [
        goal("sparse product: times faster than edge by edge", edges[clock] / product[clock], 3, at_least=True),
        goal("sparse product: share of edge by edge's memory", product["MiB"] / edges["MiB"], 0.2, at_least=False),
    ]


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(Config, argv, prog="benchmarks.arxiv", description=__doc__ or "")
    if config.measure:
        print(json.dumps(measure(Variant(**json.loads(config.measure)))))
        return
    rows = []
    for variant in tqdm(variants(config), desc="variants"):
        what = variant.convolution or variant.norm
        free = psutil.virtual_memory().available / 2**30
        if not torch.cuda.is_available() and variant.expected_gib() > 0.9 * free:
            tqdm.write(f"{what}, {variant.layers} layers, reversible {variant.reversible} left out: it takes about "
                       f"{variant.expected_gib():.0f} GiB, {free:.0f} are free")  # fmt: skip
            continue
        layers, reversible = (1, None) if variant.convolution else (variant.layers, variant.reversible)
        row: dict[str, Any] = {"what": what, "nodes": variant.nodes, "layers": layers, "reversible": reversible}
        row |= in_fresh_process(variant)
        tqdm.write(str(row))
        rows.append(row)
    report("arxiv", rows, check_goals(rows), config.json)


if __name__ == "__main__":
    run_main(main)
