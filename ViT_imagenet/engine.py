"""One epoch of training, and the evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
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
from ViT_imagenet import setup
from ViT_imagenet.config import Config
from ViT_imagenet.data import ImageData
from ViT_imagenet.distill import DistillationLoss, build_teacher
from ViT_imagenet.evaluation import evaluate, test_loader
from ViT_imagenet.loader import BadImages, Sample, TrainBatches, derive_seed, make_loader, train_transform
from ViT_imagenet.models import image_side

_LOOK_EVERY = 20  # steps
_MIXUP, _MODEL = 2, 3  # what a derived seed is for; 0 and 1 are the order and the augmentation, see loader.py


@dataclass
class Progress:
    """Where a run is; all that a checkpoint holds besides weights and optimizer."""

    epoch: int = 0
    step: int = 0  # finished steps of this epoch
    steps_per_epoch: int = 0
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
    batches: TrainBatches
    loader: DataLoader[Sample]  # training images, this process's share
    tests: DataLoader[Sample]  # evaluation images, this process's share

    @property
    def plain_model(self) -> nn.Module:
        """The model without accelerate's wrapping."""
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        return model

    def state(self, progress: Progress) -> dict[str, Any]:
        """What a checkpoint holds. No generator state: see `loader.derive_seed`."""
        scaler = self.accelerator.scaler
        return {
            "model": self.plain_model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "progress": asdict(progress),
        }

    def load(self, state: dict[str, Any], where: str) -> Progress:
        """Put a checkpoint from `where` in place; the inverse of `state`.

        Raises:
            UserError: it is of another model, or in the middle of an epoch of another length.
        """
        setup.check_fit(self.plain_model, state["model"], where)
        progress = Progress(**state["progress"])
        if progress.step and progress.steps_per_epoch != self.batches.steps:
            raise UserError(
                f"{where} stands at step {progress.step} of {progress.steps_per_epoch} of an epoch, which has "
                f"{self.batches.steps} steps here: keep the effective batch and the data, or use --finetune"
            )
        self.plain_model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None and state["ema"] is not None:
            self.ema.module.load_state_dict(state["ema"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.bad_images = BadImages(self.config.on_bad_image, progress.bad_images)
        progress.steps_per_epoch = self.batches.steps
        return progress

    def test(self) -> dict[str, float]:
        """Metrics of the weights and, where it is kept, of their moving average."""
        metrics = evaluate(self.plain_model, self.tests, self.accelerator, self.bad_images)
        if self.ema is not None:
            averaged = evaluate(self.ema.module, self.tests, self.accelerator, self.bad_images)
            metrics["test_accuracy_ema"] = averaged["test_accuracy"]
        return metrics

    def batch_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Loss of one micro-batch; images (B, 3, H, W), labels (B,) or, mixed, (B, C)."""
        outputs = self.model(images)
        if isinstance(self.loss, DistillationLoss):
            return self.loss(images, outputs, labels)
        if isinstance(outputs, tuple):  # a distilled student trained without a teacher
            return (self.loss(outputs[0].float(), labels) + self.loss(outputs[1].float(), labels)) / 2
        return self.loss(outputs.float(), labels)

    def train_epoch(self, progress: Progress, after_step: Callable[[], None]) -> None:
        """Train from `progress.step` to the end of the epoch; `after_step` runs when a step is complete."""
        self.model.train()
        batches = self.batches
        batches.epoch, batches.start_step = progress.epoch, progress.step
        steps = range(progress.step, batches.steps)
        stream = iter(self.loader)
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


def build_trainer(config: Config, accelerator: Accelerator, model: nn.Module, data: ImageData) -> Trainer:
    """Everything that a step needs.

    Raises:
        UserError: too few images for one step, a teacher that does not fit.
    """
    batches = TrainBatches(len(data.train), config, accelerator.process_index, accelerator.num_processes)
    classes = len(data.classes)
    size, pin = image_side(model), accelerator.device.type == "cuda"
    loader = make_loader(data.train, batches, train_transform(config, size), size, config, pin_memory=pin)
    loss = setup.base_loss(config)
    if config.distillation_type != "none":
        if not hasattr(model, "set_distilled_training"):
            raise UserError(f"--distillation_type needs a distilled model, {config.model} has no distillation token")
        teacher = build_teacher(config, classes).to(accelerator.device)
        loss = DistillationLoss(
            loss, teacher, config.distillation_type, config.distillation_alpha, config.distillation_tau
        )
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)  # type: ignore[operator]
    model.to(accelerator.device, memory_format=torch.channels_last if config.channels_last else torch.preserve_format)
    ema = ModelEmaV3(model, decay=config.model_ema_decay) if config.model_ema else None
    optimizer = setup.build_optimizer(model, config, batches.effective)
    scheduler = setup.build_scheduler(optimizer, config, batches.steps)
    mixup = None
    if config.mixes:
        mixup = Mixup(
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            cutmix_minmax=config.cutmix_minmax,
            prob=config.mixup_prob,
            switch_prob=config.mixup_switch_prob,
            mode=config.mixup_mode,
            label_smoothing=config.smoothing,
            num_classes=classes,
        )
    model, optimizer = accelerator.prepare(model, optimizer)
    return Trainer(
        config=config,
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        loss=loss,
        mixup=mixup,
        ema=ema,
        bad_images=BadImages(config.on_bad_image),
        batches=batches,
        loader=loader,
        tests=test_loader(config, accelerator, data, size),
    )
