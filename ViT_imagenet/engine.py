"""One epoch of training, and the evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from repro.errors import UserError
from ViT_imagenet.config import Config
from ViT_imagenet.distill import DistillationLoss
from ViT_imagenet.loader import BadImages, Sample, TrainBatches, derive_seed

_LOOK_EVERY = 20  # steps
_MIXUP, _MODEL = 2, 3  # what a derived seed is for; 0 and 1 are the order and the augmentation, see loader.py


@dataclass
class Progress:
    """Where a run is; all that a checkpoint holds besides weights and optimizer."""

    epoch: int = 0
    step: int = 0  # finished steps of this epoch
    loss_sum: Tensor = field(default_factory=lambda: torch.zeros(()))  # mean losses of this epoch's steps, added up
    train_seconds: float = 0.0  # in training, evaluation left out
    processor_seconds: float = 0.0  # of the main process, workers left out
    images_total: int = 0
    best: float = 0.0  # best test accuracy of any epoch so far
    bad_images: list[str] = field(default_factory=list)


@dataclass
class Trainer:
    """The parts of a run and the way they work together for one epoch."""

    config: Config
    accelerator: Accelerator
    model: nn.Module  # as prepared by accelerate
    optimizer: Any  # as prepared by accelerate
    scheduler: Scheduler
    loss: nn.Module
    mixup: Mixup | None
    ema: ModelEmaV3 | None
    bad_images: BadImages

    @property
    def plain_model(self) -> nn.Module:
        """The model without accelerate's wrapping."""
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        return model

    def batch_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Loss of one micro-batch; images (B, 3, H, W), labels (B,) or, mixed, (B, C)."""
        outputs = self.model(images)
        if isinstance(self.loss, DistillationLoss):
            return self.loss(images, outputs, labels)
        if isinstance(outputs, tuple):  # a distilled student trained without a teacher
            return (self.loss(outputs[0].float(), labels) + self.loss(outputs[1].float(), labels)) / 2
        return self.loss(outputs.float(), labels)

    def train_epoch(
        self, batches: TrainBatches, loader: DataLoader[Sample], progress: Progress, after_step: Callable[[], None]
    ) -> None:
        """Train from `progress.step` to the end of the epoch; `after_step` runs when a step is complete."""
        self.model.train()
        steps = range(progress.step, batches.steps)
        stream = iter(loader)
        if not self.config.sched_on_updates:
            self.scheduler.step(progress.epoch)
        progress.loss_sum = progress.loss_sum.to(self.accelerator.device)
        bar = tqdm(steps, f"epoch {progress.epoch}", disable=not self.accelerator.is_main_process, unit="step")
        for step in bar:
            started, processor = time.monotonic(), time.process_time()
            if self.config.sched_on_updates:
                self.scheduler.step_update(progress.epoch * batches.steps + step)
            loss = self._step(stream, progress.epoch, step)
            progress.step = step + 1
            progress.loss_sum += loss
            progress.images_total += batches.effective
            if step % _LOOK_EVERY == 0:
                self._look(loss, progress, bar)
            progress.train_seconds += time.monotonic() - started
            progress.processor_seconds += time.process_time() - processor
            after_step()

    def _look(self, loss: Tensor, progress: Progress, bar: tqdm[int]) -> None:
        """Show the loss, and end a run that has diverged. Now and then only: reading it waits for the device."""
        value = float(loss)
        bar.set_postfix(loss=f"{value:.3f}", refresh=False)
        if not math.isfinite(value):
            raise UserError(
                f"the loss is {value} at epoch {progress.epoch}, step {progress.step}: lower --lr, or --clip-grad 1"
            )

    def _step(self, stream: Any, epoch: int, step: int) -> Tensor:
        """One optimizer step over `accumulate` micro-batches; its mean loss over all processes, on the device."""
        config, accelerator = self.config, self.accelerator
        total = torch.zeros((), device=accelerator.device)
        self.optimizer.zero_grad()
        for micro in range(config.accumulate):
            batch: Sample = next(stream)
            self.bad_images.add(batch.bad)
            images, labels = batch.image.to(accelerator.device, non_blocking=True), batch.label
            labels = labels.to(accelerator.device, non_blocking=True)
            if config.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            if self.mixup is not None:  # every share of the step is mixed with the same weight, see TrainBatches
                np.random.seed(derive_seed(config.seed, epoch, _MIXUP, step))
                images, labels = self.mixup(images, labels)
            torch.manual_seed(derive_seed(config.seed, epoch, _MODEL, step, micro, accelerator.process_index))
            last = micro == config.accumulate - 1
            with nullcontext() if last else accelerator.no_sync(self.model):
                loss = self.batch_loss(images, labels) / config.accumulate
                accelerator.backward(loss)
            total += loss.detach()
        if config.clip_grad is not None:
            accelerator.clip_grad_norm_(self.model.parameters(), config.clip_grad)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.plain_model)
        reduced: Tensor = accelerator.reduce(total, reduction="mean")
        return reduced


@torch.inference_mode()
def evaluate(
    model: nn.Module, loader: DataLoader[Sample], accelerator: Accelerator, bad_images: BadImages
) -> dict[str, float]:
    """Accuracy and loss over all images of all processes' loaders, each counted once.

    Args:
        model: not wrapped for several processes: their batches differ in number.
        loader: this process's share of the images.
        accelerator: for the device, autocast, and the sum over processes.
        bad_images: takes note of the undecodable, which are not counted.

    Returns:
        test_accuracy, test_top5 (fractions), test_loss (mean cross-entropy), test_images (how many were counted).
    """
    model.eval()
    sums = torch.zeros(4, device=accelerator.device)  # correct, correct in 5, loss, images
    for batch in tqdm(loader, "evaluation", disable=not accelerator.is_main_process, leave=False):
        bad_images.add(batch.bad)
        keep = batch.usable
        images = batch.image[keep].to(accelerator.device, non_blocking=True)
        labels = batch.label[keep].to(accelerator.device, non_blocking=True)
        if len(labels) == 0:
            continue
        with accelerator.autocast():
            logits = model(images).float()  # (B, C)
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)  # (B, 5)
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([ranked[:, 0].sum(), ranked.sum(), loss, loss.new_tensor(len(labels))])
    correct, top5, loss_sum, images_seen = accelerator.reduce(sums, reduction="sum").tolist()
    count = max(images_seen, 1.0)
    return {
        "test_accuracy": correct / count,
        "test_top5": top5 / count,
        "test_loss": loss_sum / count,
        "test_images": int(images_seen),
    }
