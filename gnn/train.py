"""Training of one graph network: full-batch Adam, resumable at any epoch."""

from __future__ import annotations

import copy
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from contranorm import CollapseProbe, singular_spectrum
from gnn.config import Config
from gnn.data import Graph, features, half_hop, load_graph
from gnn.layers import Adjacency, GraphNetwork
from gnn.models import build_model, describe
from gnn.sparse import Sparse
from repro.cost import multiply_adds
from repro.errors import UserError
from repro.files import write_atomic
from repro.run.run import Run
from repro.seeding import rng_state, seed_everything, set_rng_state

SPARSE_BELOW = 0.2  # share of nonzero features under which the sparse product is the faster one
ONE_THREAD_BELOW = 10_000  # nodes: a second thread is then no faster, and far slower beside other work (README.md)
SELECTION = {"reference": "last epoch", "standard": "best validation accuracy"}


@dataclass(frozen=True)
class TrainingSetup:
    """What a run trains on: made, and checked, before anything is written."""

    config: Config
    device: torch.device
    graph: Graph
    adjacency: Adjacency
    features: Tensor | Sparse  # (N, F) on the device, sparse where that is faster


def prepare(config: Config) -> TrainingSetup:
    """Read the graph and bring it to its device.

    Raises:
        UserError: bad data, or a GPU was asked for and there is none.
    """
    device = choose_device(config.device)
    graph = load_graph(config.data, config.data_root, split=config.split)
    if len(graph.y) < ONE_THREAD_BELOW:
        torch.set_num_threads(1)
    x = features(graph, missing_rate=config.missing_rate, seed=config.seed, normalize=config.fea_norm)
    if config.half_hop is not None:
        alpha = 0.5 if config.half_hop_alpha is None else config.half_hop_alpha
        graph, x = half_hop(graph, x, p=config.half_hop, alpha=alpha, seed=config.seed)
    x = x.to(device)
    symmetric, directed = config.propagation == "symmetric", graph.slow is not None
    edges = graph.edge_index.to(device)
    sparse = (x != 0).float().mean() < SPARSE_BELOW
    return TrainingSetup(
        config=config,
        device=device,
        graph=graph,
        adjacency=Adjacency.from_edges(edges, len(graph.y), symmetric=symmetric, directed=directed),
        features=Sparse.from_dense(x) if sparse else x,
    )


def train(setup: TrainingSetup, run: Run) -> None:
    """Train from the run's last checkpoint, or the beginning, to its record."""
    config, graph, x, adjacency = setup.config, setup.graph, setup.features, setup.adjacency
    seed_everything(config.seed)
    model = build_model(config, x.shape[1], graph.classes).to(setup.device)
    print(describe(model, config))
    untrained = collapse_by_layer(model, setup) if config.probe else {}
    optimizer = torch.optim.Adam(model.parameter_groups(config), lr=config.lr, weight_decay=config.wd)
    best: dict[str, Any] = {"validation": -1.0, "epoch": 0, "model": None}
    start = 0
    if (found := run.restore()) is not None:
        start, state = found
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        set_rng_state(state["rng"])
        best = state["best"]

    labels, nodes = graph.y.to(setup.device), graph.train.to(setup.device)
    every = config.eval_every or (1 if config.protocol == "standard" else config.epochs)
    bar = tqdm(range(start + 1, config.epochs + 1), initial=start, total=config.epochs)
    taken = []  # seconds of each epoch's training step
    for epoch in bar:
        begun = time.perf_counter()
        model.train()
        loss = F.cross_entropy(model(x, adjacency)[nodes], labels[nodes])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        line: dict[str, Any] = {"epoch": epoch, "loss": loss.item()}
        taken.append(time.perf_counter() - begun)
        bar.set_postfix(loss=f"{line['loss']:.3f}", refresh=False)
        last = epoch == config.epochs
        if epoch % every == 0 or last:
            line |= accuracies(model, setup)
            if config.protocol == "standard" and line["validation_accuracy"] > best["validation"]:
                best = {"validation": line["validation_accuracy"], "epoch": epoch}
                best["model"] = copy.deepcopy(model.state_dict())
        run.log(line)
        if epoch % config.checkpoint_every == 0 or last or run.stop_requested:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng_state()}
            run.checkpoint(epoch, state | {"best": best})

    if best["model"] is not None:
        model.load_state_dict(best["model"])
    masks = {"train": graph.train, "validation": graph.validation, "test": graph.test_nodes(config.protocol)}
    record = run.finish(
        accuracies(model, setup),
        protocol=config.protocol,
        selection=SELECTION[config.protocol],
        epoch=best["epoch"] or config.epochs,
        parameters=sum(p.numel() for p in model.parameters()),
        multiply_adds=multiply_adds(model.eval(), x, adjacency),
        epoch_seconds=statistics.median(taken) if taken else None,  # None: resumed after the last one
        norm=describe(model, config),
        nodes={name: int(mask.sum()) for name, mask in masks.items()},
        **(collapse_by_layer(model, setup, csv=run.folder / "probe.csv") if config.probe else {}),
        **{f"{name}_untrained": values for name, values in untrained.items()},
    )
    accuracy = float(record["metrics"]["test_accuracy"])
    print(f"test accuracy {accuracy:.4f} ({config.protocol} protocol), {run.folder / 'record.json'}")


def choose_device(name: str) -> torch.device:
    """The device that `--device` names; a UserError where there is no GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def accuracies(model: nn.Module, setup: TrainingSetup) -> dict[str, float]:
    """Fractions of right answers on the test and validation nodes; NaN where training has diverged."""
    model.eval()
    graph = setup.graph
    logits = model(setup.features, setup.adjacency).cpu()  # (N, classes)
    nodes = {"test_accuracy": graph.test_nodes(setup.config.protocol), "validation_accuracy": graph.validation}
    if not logits.isfinite().all():  # argmax would answer with a class all the same
        return dict.fromkeys(nodes, math.nan)
    right = logits.argmax(dim=1) == graph.y  # (N,)
    return {name: right[mask].double().mean().item() for name, mask in nodes.items()}


@torch.no_grad()
def collapse_by_layer(model: GraphNetwork, setup: TrainingSetup, csv: Path | None = None) -> dict[str, Any]:
    """What `--probe` puts into the record, the metrics also into a file.

    Returns:
        collapse: lists by metric over the hidden layers' outputs, and the layers' numbers, from 1.
        spectrum: singular values of the last one's, as shares of their sum, in descending order.
    """
    model.eval()
    layers = [f"layers.{i}" for i in range(len(model.layers))]
    last = CollapseProbe(model, layers[-1:], metrics={"spectrum": singular_spectrum})
    with CollapseProbe(model, layers) as probe, last:
        model(setup.features, setup.adjacency)
    frame = probe.frame().drop(columns=["call", "module"])
    frame["layer"] += 1
    if csv is not None:
        write_atomic(csv, frame.to_csv(index=False).encode())
    spectrum = [value for values in last.frame()["spectrum"] for value in values.tolist()]
    return {"collapse": frame.to_dict("list"), "spectrum": spectrum}
