"""The training loop, evaluation, and a state that a checkpoint holds whole."""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from BERT_glue.config import Config
from BERT_glue.data import Task
from BERT_glue.economy import trained_tokens
from BERT_glue.glue_metric import GlueMetric
from BERT_glue.predict import as_predictions
from repro.errors import Interrupted, UserError
from repro.run.run import Run
from repro.seeding import rng_state, set_rng_state


@dataclass
class Job:
    """Everything that training needs, checked before the run's folder is touched."""

    task: Task
    metric_name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: DataLoader[Any] | None
    validation: dict[str, DataLoader[Any]]
    test: dict[str, DataLoader[Any]]
    parameters: int
    """Of the model as it is saved; fewer may be trained."""


@dataclass
class Progress:
    """How far training is."""

    epoch: int = 0
    batches: int = 0  # done in this epoch, per process
    step: int = 0  # optimizer steps done
    seconds: float = 0.0  # spent training in this epoch
    curve: list[dict[str, Any]] = field(default_factory=list)  # one line per epoch
    metrics: dict[str, float] = field(default_factory=dict)  # of the last epoch


@torch.no_grad()
def predict(
    model: PreTrainedModel, loader: DataLoader[Any], accelerator: Accelerator, task: Task
) -> tuple[Tensor, ...]:
    """Predictions and labels of all rows, each row once, on every process; labels are 0 where the rows have none."""
    model.eval()
    predictions, references = [], []
    for batch in loader:
        labels = batch.pop("labels", None)
        values = as_predictions(model(**batch).logits, task)  # (B,)
        labels = torch.zeros_like(values) if labels is None else labels
        values, labels = accelerator.gather_for_metrics((values, labels))
        predictions.append(values.cpu())
        references.append(labels.cpu())
    return torch.cat(predictions), torch.cat(references)


def evaluate(model: PreTrainedModel, job: Job, accelerator: Accelerator) -> dict[str, float]:
    """GLUE's metrics on the validation split (MNLI: on both, apart), and their mean as `score`."""
    metrics: dict[str, float] = {}
    for suffix, loader in job.validation.items():
        predictions, references = predict(model, loader, accelerator, job.task)
        measure = GlueMetric(config_name=job.metric_name, keep_in_memory=True)
        found = measure.compute(predictions=predictions, references=references)
        metrics |= {key + suffix: value for key, value in found.items()}
    return {**metrics, "score": sum(metrics.values()) / len(metrics)}


def parameter_groups(model: PreTrainedModel, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices are decayed; biases and LayerNorm weights, which are vectors, are not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


class Trainer:
    """Fine-tuning from the current state to the last step, with a checkpoint that continues it bit for bit.

    Args:
        config: the run's settings.
        job: model and loaders; the loaders are prepared for this process.
        accelerator: placement, mixed precision and processes.
        run: where lines and checkpoints go.
    """

    def __init__(self, config: Config, job: Job, accelerator: Accelerator, run: Run) -> None:
        self.config, self.job, self.accelerator, self.run = config, job, accelerator, run
        groups = parameter_groups(job.model, config.weight_decay)
        # None, not False: PyTorch then still joins the tensors of a step where it can
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=config.fused_optimizer or None)
        self.model, self.optimizer = accelerator.prepare(job.model, optimizer)
        self.loader = accelerator.prepare(job.train) if job.train is not None else []
        job.validation = {suffix: accelerator.prepare(loader) for suffix, loader in job.validation.items()}
        job.test = {file: accelerator.prepare(loader) for file, loader in job.test.items()}
        steps = -(-len(self.loader) // config.gradient_accumulation_steps) * config.num_train_epochs
        self.total_steps = min(steps, config.max_train_steps or steps)
        self.scheduler = get_scheduler(config.lr_scheduler_type, optimizer, config.num_warmup_steps, self.total_steps)
        self.progress = Progress()
        self.loss_sum = torch.zeros((), device=accelerator.device)  # over this epoch's batches in this process
        self.mark = time.monotonic()

    def train(self) -> dict[str, float]:
        """Train to the last step; the metrics after it."""
        quiet = not self.accelerator.is_main_process
        with tqdm(
            total=self.total_steps, initial=self.progress.step, unit="step", disable=quiet, file=sys.stderr
        ) as bar:
            # a checkpoint within the last epoch may have all steps done and the evaluation still to come
            while self.progress.step < self.total_steps or self.progress.batches:
                self.train_epoch(bar)
                self.end_epoch()
                bar.set_postfix(epoch=self.progress.epoch, score=f"{self.progress.metrics['score']:.4f}")
        return self.progress.metrics or evaluate(self.model, self.job, self.accelerator)

    def train_epoch(self, bar: tqdm[Any]) -> None:
        """The batches of this epoch that are not done yet."""
        p, every = self.progress, self.config.checkpointing_steps
        self.mark = time.monotonic()
        self.model.train()
        self.loader.set_epoch(p.epoch)  # before skipping: a skipping loader does not reach the sampler of two processes
        batches = self.accelerator.skip_first_batches(self.loader, p.batches) if p.batches else self.loader
        for batch in batches:
            if p.step >= self.total_steps:
                break
            self.loss_sum += self.train_batch(batch)  # read once per epoch: a GPU is not waited for
            p.batches += 1
            if self.accelerator.sync_gradients:
                self.scheduler.step()
                p.step += 1
                bar.update()
                stop = self.stop_requested()
                if stop or (every and p.step % every == 0):
                    self.save(stop)

    def train_batch(self, batch: dict[str, Tensor]) -> Tensor:
        """Forward, backward and, at the end of a group of batches, the optimizer's step; returns the loss."""
        with self.accelerator.accumulate(self.model):
            loss = self.model(**batch).loss
            self.accelerator.backward(loss * self.accumulation_weight())
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()

    def accumulation_weight(self) -> float:
        """Makes a gradient the mean over its batches in an epoch's last group too, which may be shorter.

        accelerate divides by gradient_accumulation_steps whatever the group's length.
        """
        size = self.config.gradient_accumulation_steps
        first = self.progress.batches // size * size
        return size / min(size, len(self.loader) - first)

    def end_epoch(self) -> None:
        """Evaluate, log, and checkpoint the beginning of the next epoch."""
        p = self.progress
        p.seconds += time.monotonic() - self.mark
        loss = self.accelerator.reduce(self.loss_sum / p.batches, "mean").item()
        p.metrics = evaluate(self.model, self.job, self.accelerator)
        line = {"epoch": p.epoch + 1, "step": p.step, "loss": loss, "lr": self.scheduler.get_last_lr()[0]}
        line |= {**p.metrics, "train_seconds": round(p.seconds, 3)}
        p.curve.append(line)
        self.run.log(line)
        self.accelerator.log({k: v for k, v in line.items() if k != "step"}, step=p.step)
        p.epoch, p.batches, p.seconds = p.epoch + 1, 0, 0.0
        self.loss_sum.zero_()
        self.mark = time.monotonic()
        self.save(self.stop_requested())

    def stop_requested(self) -> bool:
        """True once any process was told to stop: all must leave at the same step."""
        if self.accelerator.num_processes == 1:
            return self.run.stop_requested
        flag = torch.tensor(int(self.run.stop_requested), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum").item())

    def save(self, stop: bool) -> None:
        """Checkpoint, then leave if told to."""
        self.run.checkpoint(self.progress.step, self.state())
        if stop:  # the signal reached another process only
            raise Interrupted(signal.SIGTERM)

    def state(self) -> dict[str, Any]:
        """All that decides how training goes on; each process adds its random generators and sums."""
        now = time.monotonic()
        mine = {"rng": rng_state(), "loss_sum": self.loss_sum.cpu()}
        progress = {**vars(self.progress), "seconds": self.progress.seconds + now - self.mark}
        return {
            "tokens": trained_tokens(self.accelerator.unwrap_model(self.model)),
            "model": self.accelerator.unwrap_model(self.model).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "progress": progress,
            "processes": gather_object([mine]),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Inverse of `state`.

        Raises:
            UserError: the run was begun with another number of processes, or with other texts.
        """
        there, here = len(state["processes"]), self.accelerator.num_processes
        if there != here:
            raise UserError(
                f"{self.run.folder} was begun with {there} processes, this is {here}: use as many as before"
            )
        model = self.accelerator.unwrap_model(self.model)
        old, new = state["tokens"], trained_tokens(model)
        if (old is None) != (new is None) or (old is not None and not torch.equal(old, new)):
            raise UserError(f"{self.run.folder} was begun with texts of other words: use the same data as before")
        mine = state["processes"][self.accelerator.process_index]
        model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.progress = Progress(**state["progress"])
        self.loss_sum.copy_(mine["loss_sum"])
        set_rng_state(mine["rng"])
