"""Training of one graph network: full-batch Adam, resumable at any epoch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from contranorm import CollapseProbe
from gnn.config import Config
from gnn.data import Graph, features, load_graph
from gnn.models import Adjacency, build_model, describe
from gnn.sparse import Sparse
from repro.errors import UserError
from repro.files import write_atomic
from repro.run.run import Run
from repro.seeding import rng_state, seed_everything, set_rng_state

SPARSE_BELOW = 0.2  # share of nonzero features under which the sparse product is the faster one
SELECTION = {"reference": "last epoch", "standard": "best validation accuracy"}


class Problem:
    """What the runs of one command share: a graph on its device, its adjacency, and the features.

    Args:
        config: data, split, device, missing_rate.

    Raises:
        UserError: bad data, or a GPU was asked for and there is none.
    """

    def __init__(self, config: Config) -> None:
        self.device = choose_device(config.device)
        self.graph = load_graph(config.data, config.data_root, split=config.split)
        self.adjacency = Adjacency.from_edges(self.graph.edge_index, len(self.graph.y)).to(self.device)
        self._features: Tensor | Sparse | None = None

    def features(self, config: Config) -> Tensor | Sparse:
        """(N, F) on the device, sparse where that pays; made once unless erased, which each seed does its own way."""
        if self._features is not None and not config.missing_rate:
            return self._features
        x = features(self.graph, missing_rate=config.missing_rate, seed=config.seed)
        sparse = (x != 0).float().mean() < SPARSE_BELOW
        self._features = Sparse.from_dense(x).to(self.device) if sparse else x.to(self.device)
        return self._features


def train(config: Config, *, quiet: bool = False) -> None:
    """Train and test one cell; its folder ends with a record.json.

    Args:
        config: the settings.
        quiet: no progress bar and no printed lines (several runs at once).
    """
    finished = (Path(config.output_dir) / "record.json").exists()  # needs no data to say so
    problem = None if finished else Problem(config)  # before Run: bad data leaves no folder
    with Run(config.output_dir, "gnn", config, report_to=config.report_to) as run:
        if not run.done and problem is not None:
            fit(run, config, problem, quiet=quiet)


def fit(run: Run, config: Config, problem: Problem, *, quiet: bool = False) -> None:
    """Train from the run's last checkpoint, or the beginning, to its record."""
    graph, adjacency, device = problem.graph, problem.adjacency, problem.device
    x = problem.features(config)
    seed_everything(config.seed)
    model = build_model(config, x.shape[1], graph.classes).to(device)
    if not quiet:
        print(describe(model, config))
    labels, nodes = graph.y.to(device), graph.train.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, weight_decay=config.wd)
    best: dict[str, Any] = {"validation": -1.0, "epoch": 0, "model": None}

    start = 0
    if (found := run.restore()) is not None:
        start, state = found
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        set_rng_state(state["rng"])
        best = state["best"]

    every = config.eval_every or (1 if config.protocol == "standard" else config.epochs)
    for epoch in tqdm(range(start + 1, config.epochs + 1), initial=start, total=config.epochs, disable=quiet):
        model.train()
        loss = F.cross_entropy(model(x, adjacency)[nodes], labels[nodes])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        line: dict[str, Any] = {"epoch": epoch, "loss": loss.item()}
        last = epoch == config.epochs
        if epoch % every == 0 or last:
            line |= accuracies(model, x, adjacency, graph, config.protocol)
            if config.protocol == "standard" and line["validation_accuracy"] > best["validation"]:
                best = {"validation": line["validation_accuracy"], "epoch": epoch}
                best["model"] = copy.deepcopy(model.state_dict())
        run.log(line)
        if epoch % config.checkpoint_every == 0 or last or run.stop_requested:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng_state()}
            run.checkpoint(epoch, state | {"best": best})

    if best["model"] is not None:
        model.load_state_dict(best["model"])
    extra: dict[str, Any] = {"epoch": best["epoch"] or config.epochs}
    if config.probe:
        extra["probe"] = probe(model, x, adjacency, run)
    record = run.finish(
        accuracies(model, x, adjacency, graph, config.protocol),
        protocol=config.protocol,
        selection=SELECTION[config.protocol],
        parameters=sum(p.numel() for p in model.parameters()),
        norm=describe(model, config),
        nodes={
            "train": int(graph.train.sum()),
            "validation": int(graph.validation.sum()),
            "test": int(graph.test_nodes(config.protocol).sum()),
        },
        **extra,
    )
    if not quiet:
        accuracy = record["metrics"]["test_accuracy"]
        print(f"test accuracy {accuracy:.4f} ({config.protocol} protocol), {run.folder / 'record.json'}")


def choose_device(name: str) -> torch.device:
    """The device that `--device` names.

    Raises:
        UserError: a GPU was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def accuracies(
    model: nn.Module, x: Tensor | Sparse, adjacency: Adjacency, graph: Graph, protocol: str
) -> dict[str, float]:
    """Fractions of right answers on the test and validation nodes."""
    model.eval()
    right = model(x, adjacency).argmax(dim=1).cpu() == graph.y  # (N,)
    nodes = {"test_accuracy": graph.test_nodes(protocol), "validation_accuracy": graph.validation}
    return {name: right[mask].double().mean().item() for name, mask in nodes.items()}


@torch.inference_mode()
def probe(model: nn.Module, x: Tensor | Sparse, adjacency: Adjacency, run: Run) -> dict[str, list[float]]:
    """Collapse metrics of each hidden layer's output: to probe.csv, and as lists by layer for the record."""
    model.eval()
    with CollapseProbe(model, model.probed()) as collapse:  # type: ignore[operator]
        model(x, adjacency)
    frame = collapse.frame().drop(columns=["call", "module"])
    frame["layer"] += 1
    write_atomic(run.folder / "probe.csv", frame.to_csv(index=False).encode())
    return {str(name): frame[name].tolist() for name in frame.columns if name != "layer"}
