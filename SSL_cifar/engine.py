"""The trainer: one step, the loop over epochs, what a checkpoint holds, the record. It knows no method's name."""

from __future__ import annotations

import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor
from tqdm import tqdm

from repro import progress as shared_progress
from repro.errors import UserError
from repro.files import write_atomic
from repro.images.data import load_data
from repro.images.loader import BadImages
from repro.parallel import all_names, gather, sync_batch_norm
from repro.run.run import Run
from repro.seeding import seed_everything
from repro.weights import to_safetensors
from SSL_cifar import backbones, diagnostics, methods
from SSL_cifar.augment import Augment
from SSL_cifar.batches import Batches
from SSL_cifar.config import Config
from SSL_cifar.evaluation import Evaluation
from SSL_cifar.methods.base import Batch, Method, Out
from SSL_cifar.optim import build_optimizer, parameters, set_rates

CHECK_EVERY = 20  # steps: reading the loss waits for the device


def accelerator_for(config: Config) -> Accelerator:
    """Devices, processes and autocast. Buffers are not broadcast: each process keeps the same banks by itself."""
    handler = DistributedDataParallelKwargs(broadcast_buffers=False)
    return Accelerator(
        mixed_precision=config.precision, cpu=config.cpu, kwargs_handlers=[handler], step_scheduler_with_optimizer=False
    )


@dataclass
class Progress(shared_progress.Progress):
    """Where a run is; all that a checkpoint holds besides the method and its optimizer."""

    images: int = 0  # training images
    logs: dict[str, Tensor] = field(default_factory=dict)  # the method's numbers of this epoch's steps, added up
    last: dict[str, float] = field(default_factory=dict)  # means of the last whole epoch

    def add(self, loss: Tensor, logs: dict[str, Tensor], images: int, seconds: float, processor_seconds: float) -> None:
        """Count a step."""
        self.step += 1
        self.loss_sum = self.loss_sum.to(loss) + loss
        self.logs = {k: v.detach() + (self.logs[k].to(v) if k in self.logs else 0) for k, v in logs.items()}
        self.images_total += images
        self.train_seconds += seconds
        self.processor_seconds += processor_seconds

    def next_epoch(self) -> None:
        """Start counting anew."""
        self.epoch, self.step, self.loss_sum, self.logs = self.epoch + 1, 0, torch.zeros(()), {}


class Clock:
    """Time since it was made."""

    def __init__(self) -> None:
        self.started = time.monotonic(), time.process_time()

    def lap(self) -> tuple[float, float]:
        """Seconds by the clock, and of this process on its processor."""
        return time.monotonic() - self.started[0], time.process_time() - self.started[1]


class Trainer:
    """A method with its data and optimizer; making one writes nothing, and refuses what does not fit together."""

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
        self.data = load_data(replace(config, cache=False))  # `Pixels` keeps what is to be kept
        self.bad_images = BadImages(config.on_bad_image)
        seed_everything(config.seed)
        method = methods.load(config.method)(config, backbones.build(config), len(self.data.train))  # type: ignore[arg-type]
        augment = Augment(config.augment, config.crop_size, config.data_set, method.views)
        self.batches = Batches(self.data.train, config, augment, self.bad_images, rank=rank, world=world, device=device)
        self.evaluation = Evaluation(
            self.data, config, augment, self.bad_images,
            train_pixels=self.batches.pixels, rank=rank, world=world, device=device,
        )  # fmt: skip
        self.method: Method = sync_batch_norm(method.to(device))  # type: ignore[assignment]
        self.optimizer = build_optimizer(self.method, config)
        with warnings.catch_warnings():
            # Its new name, forward_sync_buffers, is younger than the oldest torch that is supported.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self.wrapped, self.optimizer = accelerator.prepare(self.method, self.optimizer)
        self.progress = Progress(steps_per_epoch=self.batches.steps, images=self.batches.images)

    def step(self, views: list[Tensor], batch: Batch, number: int) -> tuple[Tensor, dict[str, Tensor], Out, Batch]:
        """One step, the `number`-th of the run: loss, the method's numbers, and the rows of all processes."""
        torch.manual_seed(batch.seed)  # of what a method draws without a generator
        set_rates(self.optimizer, self.config, number, self.batches.steps)
        self.optimizer.zero_grad()
        out = {name: gather(rows) for name, rows in self.wrapped(views, batch).items()}
        whole = batch.gathered()
        loss, logs = self.method.loss(out, whole)
        self.accelerator.backward(loss)
        self.optimizer.step()
        out = {name: rows.detach() for name, rows in out.items()}
        with torch.no_grad():
            self.method.after_step(out, whole, (number + 1) / (self.batches.steps * self.config.epochs))
        return loss.detach(), logs, out, whole

    def train(self, run: Run) -> None:
        """All epochs, from the last checkpoint on, and the record."""
        config, progress, steps = self.config, self.progress, self.batches.steps
        self.report_start()
        self.restore(run)
        for epoch in range(progress.epoch, config.epochs):
            self.method.train()
            bar = tqdm(
                self.batches.epoch(epoch, progress.step), f"epoch {epoch}", initial=progress.step, total=steps,
                unit="step", disable=not self.accelerator.is_main_process,
            )  # fmt: skip
            clock = Clock()
            for views, batch in bar:
                last = progress.step + 1 == steps
                try:
                    loss, logs, out, whole = self.step(views, batch, epoch * steps + progress.step)
                except torch.linalg.LinAlgError as error:  # of a filter whose batch is not finite
                    raise UserError(self.diverged("a spectrum is not finite", epoch)) from error
                if progress.step % CHECK_EVERY == 0 or last:
                    if not loss.isfinite():
                        raise UserError(self.diverged(f"the loss is {float(loss)}", epoch))
                    bar.set_postfix(loss=f"{float(loss):.3f}", refresh=False)
                progress.add(loss, logs, config.batch_size, *clock.lap())
                due = config.checkpoint_every and progress.step % config.checkpoint_every == 0
                if not last and (run.agree_to_stop() or due):
                    self.save(run)
                clock = Clock()
            with torch.no_grad():
                pair = self.method.online_target(out, whole)
            self.method.after_epoch()
            self.log_epoch(run, epoch, {} if pair is None else {"rank_difference": diagnostics.rank_difference(*pair)})
            progress.next_epoch()
            self.save(run)
        self.finish(run)

    def diverged(self, what: str, epoch: int) -> str:
        """Why a run ends that no longer learns."""
        return (
            f"{what} at epoch {epoch}, step {self.progress.step}: lower --lr {self.config.lr:g}, or lengthen "
            f"--warmup_epochs {self.config.warmup_epochs:g}"
        )

    def log_epoch(self, run: Run, epoch: int, found: dict[str, float]) -> None:
        """One line of metrics."""
        config, progress, steps = self.config, self.progress, self.batches.steps
        progress.last = {"train_loss": float(progress.loss_sum) / steps}
        progress.last |= {f"train_{name}": float(value) / steps for name, value in progress.logs.items()} | found
        line = {"epoch": epoch, **progress.last, "lr": self.optimizer.param_groups[0]["lr"]}
        line["images_per_second"] = progress.images_per_second
        if config.knn_every and (epoch + 1) % config.knn_every == 0 and epoch + 1 < config.epochs:
            line |= self.evaluation.quick(self.method)
        run.log(line)
        self.accelerator.print(", ".join(f"{k} {v:.4g}" for k, v in line.items()))

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds. No generator state: every draw is a function of (seed, epoch, step, place)."""
        return {
            "model": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
        }

    def load(self, state: dict[str, Any], where: str) -> None:
        """Put a checkpoint in place.

        Raises:
            UserError: it is of another number of images or steps.
        """
        theirs = state["progress"]
        for name, here in (("images", self.batches.images), ("steps_per_epoch", self.batches.steps)):
            if theirs[name] != here:
                raise UserError(
                    f"{where} was trained with {theirs[name]} {name.replace('_', ' ')}, the data here give {here}: "
                    "use the same data, or another --output_dir"
                )
        self.method.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        vars(self.progress).update(theirs)
        self.bad_images.names |= dict.fromkeys(self.progress.bad_images)

    def restore(self, run: Run) -> None:
        """Go on from the run's last checkpoint, where it has one."""
        if (found := run.restore()) is not None:
            self.load(found[1], self.config.output_dir)

    def save(self, run: Run) -> None:
        """Write a checkpoint, on all processes at the same step; they leave together when one was asked to stop."""
        run.agree_to_stop()
        self.progress.bad_images = all_names(self.bad_images.names)
        run.checkpoint(self.progress.epoch * self.batches.steps + self.progress.step, self.state())

    def report_start(self) -> None:
        """Say what is about to be trained."""
        config, say = self.config, self.accelerator.print
        scaled = "as given" if config.unscaled_lr else f"{config.lr:g} x {config.batch_size} / 256"
        say(
            f"method: {config.label().method}; backbone: {config.backbone}, {parameters(self.method):,} trained "
            f"parameters with the heads, on {self.accelerator.device}"
        )
        say(
            f"data: {self.data.name}, {self.batches.images:,} training images, {len(self.evaluation.test):,} of "  # type: ignore[arg-type]
            f"{self.data.test_split!r}, {len(self.data.classes)} classes; {self.method.views} views ({config.augment})"
        )
        say(
            f"batch: {self.batches.share} x {self.accelerator.num_processes} processes = {config.batch_size}; lr "
            f"{config.peak_lr:.3g} ({scaled}); {self.batches.steps} steps per epoch, {config.epochs} epochs"
        )

    def finish(self, run: Run) -> None:
        """Evaluate, keep the weights, and write the record."""
        config, progress, data = self.config, self.progress, self.data
        numbers, arrays = self.evaluation.full(self.method)
        if run.main:
            kept = {k: v for k, v in self.method.state_dict().items() if not k.startswith(self.method.scratch)}
            write_atomic(run.folder / "model.safetensors", to_safetensors(kept))
        part = "" if config.max_test_samples is None else f", {config.max_test_samples} of its images"
        run.finish(
            numbers | progress.last,
            protocol=f"{data.name} {data.test_split} split{part}, frozen features: k-NN and logistic regression",
            selection="last epoch",
            **arrays,
            images_per_second=progress.images_per_second,
            images_per_processor_second=progress.images_total / max(progress.processor_seconds, 1e-9),
            train_seconds=progress.train_seconds,
            processor_seconds=progress.processor_seconds,
            parameters=parameters(self.method),
            backbone_parameters=parameters(self.method.backbone),
            processes=self.accelerator.num_processes,
            train_images=self.batches.images,
            bad_images=all_names(self.bad_images.names),
        )
        said = ", ".join(f"{k} {v:.4g}" for k, v in numbers.items() if k.endswith("accuracy"))
        self.accelerator.print(f"{said}; {run.folder / 'record.json'}")
