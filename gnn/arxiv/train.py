"""Training of one RevGAT: full-batch RMSprop with label reuse and distillation, resumable at any epoch."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from contranorm import CollapseProbe
from gnn.arxiv.config import Config
from gnn.arxiv.data import load
from gnn.arxiv.loss import distillation, learning_rate, log_cross_entropy, one_hot
from gnn.arxiv.models import RevGAT
from gnn.arxiv.norms import FeatureContraNorm
from gnn.arxiv.teacher import Teacher, load_teacher, save_predictions
from gnn.data import Graph
from gnn.layers import Adjacency
from gnn.sparse import Sparse
from gnn.train import choose_device
from repro.errors import UserError
from repro.run.run import Run
from repro.seeding import rng_state, seed_everything, set_rng_state

SPARSE_BELOW = 0.2  # share of nonzero features under which the sparse product is the faster one
HISTORY = 50  # points of the activity's course that a record keeps


@dataclass(frozen=True)
class TrainingSetup:
    """What the training loop needs, checked before anything is written; on the device.

    Attributes:
        config: the settings.
        graph: labels y (N,) and the three sets of nodes.
        features: (N, F), sparse where that pays; raw, never row-normalized (they are signed, with sums near 0).
        adjacency: the graph, both directions of each edge and loops.
        teacher: of a student.
    """

    config: Config
    graph: Graph
    features: Tensor | Sparse
    adjacency: Adjacency
    teacher: Teacher | None

    def shown(self, nodes: Tensor) -> Tensor:
        """(N, C): the labels of `nodes`, one-hot, as the network's label channels."""
        return one_hot(self.graph.y, nodes, self.graph.classes)

    def inputs(self, labels: Tensor | None) -> list[Tensor | Sparse]:
        """The parts of the network's input."""
        return [self.features] if labels is None else [self.features, labels]


def prepare(config: Config) -> TrainingSetup:
    """Load and check everything that a run needs.

    Raises:
        UserError: bad data, a teacher that does not fit, or a GPU was asked for and there is none.
    """
    device = choose_device(config.device)
    graph = load(config)
    teacher = load_teacher(config, len(graph.y), graph.classes) if config.mode == "student" else None
    if teacher is not None:
        teacher = dataclasses.replace(teacher, logits=teacher.logits.to(device))
    for name in ("x", "y", "edge_index", "train", "validation", "test"):
        setattr(graph, name, getattr(graph, name).to(device))
    adjacency = Adjacency.from_edges(graph.edge_index, len(graph.y))
    features = Sparse.from_dense(graph.x) if (graph.x != 0).float().mean() < SPARSE_BELOW else graph.x
    return TrainingSetup(config, graph, features, adjacency, teacher)


def train(setup: TrainingSetup, run: Run) -> None:
    """Train from the run's last checkpoint, or the beginning, to its record."""
    config, graph = setup.config, setup.graph
    seed_everything(config.seed)
    channels = graph.classes if config.use_labels else 0
    model = RevGAT(config, setup.features.shape[1] + channels, graph.classes).to(graph.y.device)
    print(model.describe())
    optimizer = torch.optim.RMSprop(model.parameters(), lr=config.lr, weight_decay=config.wd)
    sha256 = setup.teacher.sha256 if setup.teacher else None
    best: dict[str, Any] = {"epoch": 0, "metrics": {"validation_loss": math.inf}}
    start, history = 0, {"epoch": [], **{name: [] for name in ACTIVITY}}
    if (found := run.restore()) is not None:
        start, state = found
        if state["teacher"] != sha256:
            raise UserError(f"--teacher {config.teacher}: not the predictions with which {run.folder} began")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        set_rng_state(state["rng"])
        best, history = state["best"], state["history"]
    elif isinstance(model.norms[0], FeatureContraNorm):
        evaluate(model, setup)
        note(history, 0, model)  # at initialization

    for epoch in tqdm(range(start + 1, config.n_epochs + 1), initial=start, total=config.n_epochs):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.lr, epoch)
        loss = training_step(model, optimizer, setup)
        metrics, logits = evaluate(model, setup)
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at epoch {epoch}: a smaller --lr or --scale may hold")
        if metrics["validation_loss"] < best["metrics"]["validation_loss"]:
            best = {"epoch": epoch, "metrics": metrics, "logits": logits, "model": copy.deepcopy(model.state_dict())}
        run.log({"epoch": epoch, "loss": loss, **metrics, **activity(model)})
        if epoch % math.ceil(config.n_epochs / HISTORY) == 0:
            note(history, epoch, model)
        if epoch % config.checkpoint_every == 0 or epoch == config.n_epochs or run.stop_requested:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng_state()}
            run.checkpoint(epoch, state | {"best": best, "history": history, "teacher": sha256})
    finish(setup, run, model, best, history)
    accuracy = best["metrics"]["test_accuracy"]
    print(f"test accuracy {accuracy:.4f} (epoch {best['epoch']}), {run.folder / 'record.json'}")


def training_step(model: RevGAT, optimizer: torch.optim.Optimizer, setup: TrainingSetup) -> float:
    """One epoch: show a random part of the training labels, predict the rest; the loss."""
    config, graph = setup.config, setup.graph
    model.train()
    optimizer.zero_grad(set_to_none=True)
    drawn = graph.train & (torch.rand(len(graph.y), device=graph.y.device) < config.mask_rate)
    predicted = graph.train & ~drawn if config.use_labels else drawn
    labels = setup.shown(drawn) if config.use_labels else None
    for _ in range(config.n_label_iters):
        with torch.no_grad():
            fill(labels, ~drawn, model(setup.inputs(labels), setup.adjacency))
    logits = model(setup.inputs(labels), setup.adjacency)
    loss = log_cross_entropy(logits[predicted], graph.y[predicted])
    if setup.teacher is not None:
        taught = distillation(logits, setup.teacher.logits, config.temp)
        loss = (1 - config.alpha) * loss + config.alpha * taught
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.no_grad()
def evaluate(model: RevGAT, setup: TrainingSetup) -> tuple[dict[str, float], Tensor]:
    """Loss and accuracy of the three sets with all training labels shown, and the logits (N, C)."""
    graph = setup.graph
    model.eval()
    labels = setup.shown(graph.train) if setup.config.use_labels else None
    logits = model(setup.inputs(labels), setup.adjacency)
    for _ in range(setup.config.n_label_iters):
        fill(labels, ~graph.train, logits)
        logits = model(setup.inputs(labels), setup.adjacency)
    metrics = {}
    for name in ("train", "validation", "test"):
        nodes = getattr(graph, name)
        metrics[f"{name}_loss"] = log_cross_entropy(logits[nodes], graph.y[nodes]).item()
        metrics[f"{name}_accuracy"] = (logits[nodes].argmax(dim=1) == graph.y[nodes]).double().mean().item()
    return metrics, logits


def fill(labels: Tensor | None, nodes: Tensor, logits: Tensor) -> None:
    """Put predicted probabilities in the place of the labels of `nodes` that are not shown."""
    if labels is not None:
        labels[nodes] = logits[nodes].softmax(dim=1)


# -- what is recorded besides the metrics ------------------------------------------------------------------------------

ACTIVITY = ("relative_move", "off_diagonal")  # of each D-ContraNorm: ‖y - x‖ / ‖x‖, and the mean of 1 - A_aa


def activity(model: RevGAT) -> dict[str, list[float]]:
    """How much each D-ContraNorm did in the last evaluation, by layer; empty without it."""
    found = [norm.activity for norm in model.norms if isinstance(norm, FeatureContraNorm)]
    return {name: list(values) for name, values in zip(ACTIVITY, zip(*found, strict=True), strict=False)}


def note(history: dict[str, Any], epoch: int, model: RevGAT) -> None:
    """Add the activity of this epoch to its course over training."""
    if now := activity(model):
        for name, value in {"epoch": epoch, **now}.items():
            history[name].append(value)


def finish(setup: TrainingSetup, run: Run, model: RevGAT, best: dict[str, Any], history: dict[str, Any]) -> None:
    """Write the predictions of a teacher, then the record."""
    config, graph = setup.config, setup.graph
    if not best["epoch"]:
        raise UserError("the validation loss was never a number: a smaller --lr or --scale may hold")
    model.load_state_dict(best["model"])
    layers = list(range(1, len(model.norms) + 1))
    extra: dict[str, Any] = {}
    if config.mode == "teacher":
        extra["predictions"] = save_predictions(run.folder, best["logits"])
    if setup.teacher is not None:
        extra["teacher"] = setup.teacher.summary
    if config.probe:
        extra["collapse"] = {"layer": layers, **collapse(model, setup)}
    if history["epoch"]:
        evaluate(model, setup)  # at the chosen epoch
        extra |= {"activity": {"layer": layers, **activity(model)}, "activity_history": history}
    run.finish(
        best["metrics"],
        protocol="ogb",
        selection="lowest validation loss",
        epoch=best["epoch"],
        parameters=sum(p.numel() for p in model.parameters()),
        architecture=model.describe(),
        input_features={"name": config.features, "columns": setup.features.shape[1]},
        nodes={name: int(getattr(graph, name).sum()) for name in ("train", "validation", "test")},
        edges=len(setup.adjacency.pattern.row),
        **extra,
    )


def collapse(model: RevGAT, setup: TrainingSetup) -> dict[str, list[float]]:
    """Collapse metrics of what leaves each norm, by layer, in the last forward pass of an evaluation."""
    with CollapseProbe(model, [f"norms.{i}" for i in range(len(model.norms))]) as probe:
        evaluate(model, setup)
    frame = probe.frame()
    last = frame[frame["call"] == frame["call"].max()]
    return {str(name): last[name].tolist() for name in probe.metrics}
