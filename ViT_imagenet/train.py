"""Training and evaluation: what they need, the loop, what a checkpoint holds, the record."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
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

from repro import progress as shared_progress
from repro.cost import multiply_adds
from repro.errors import UserError
from repro.files import write_atomic
from repro.images.data import ImageData, load_data
from repro.images.loader import Augmented, BadImages, Sample, eval_batches, make_loader
from repro.parallel import all_names
from repro.run.run import Run
from repro.seeding import derive_seed, seed_everything
from repro.weights import read_state, to_safetensors
from ViT_imagenet import factory
from ViT_imagenet.attention import describe_variant
from ViT_imagenet.config import Config
from ViT_imagenet.loader import TrainBatches, eval_transform, train_transform
from ViT_imagenet.models import collapse_by_block, image_side

CHECK_EVERY = 20  # steps: reading the loss waits for the device
MIXUP, MODEL = 2, 3  # what a derived seed is for; 0 and 1 are the order and the augmentation, see loader.py


@dataclass(kw_only=True)
class EvaluationSetup:
    """What an evaluation needs, checked before anything is written."""

    config: Config
    accelerator: Accelerator
    data: ImageData
    model: nn.Module
    tests: DataLoader[Sample]  # evaluation images, this process's share
    bad_images: BadImages

    @property
    def plain_model(self) -> nn.Module:
        """The model without accelerate's wrapping."""
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        return model

    @property
    def accuracy(self) -> str:
        """The metric of the evaluation images, those of the test set unless --hold_out puts others in their place."""
        return "test_accuracy" if self.config.hold_out is None else "validation_accuracy"


@dataclass(kw_only=True)
class TrainingSetup(EvaluationSetup):
    """What the training loop needs; model and optimizer as prepared by accelerate."""

    optimizer: Any
    scheduler: Scheduler
    loss: nn.Module
    mixup: Mixup | None
    ema: ModelEmaV3 | None
    batches: TrainBatches
    loader: DataLoader[Sample]  # training images, this process's share


@dataclass
class Progress(shared_progress.Progress):
    """Where a run is; all that a checkpoint holds besides weights and optimizer."""

    best: float = 0.0  # best test accuracy of any epoch so far


def prepare_evaluation(config: Config, accelerator: Accelerator) -> EvaluationSetup:
    """Data, and the model with the weights that it starts from; a UserError where something does not fit."""
    data = load_data(config, hold_out=config.hold_out)
    seed_everything(config.seed)
    if config.resume:
        factory.check_same_model(config)
    model = factory.build_model(config, len(data.classes))
    if config.finetune:
        factory.load_weights(model, config.finetune, reset_head=config.reset_head, new_steps=True)
    elif config.resume and config.eval:  # in training, `restore` takes the whole state
        factory.load_weights(model, config.resume, reset_head=False)
    size = image_side(model)
    batches = eval_batches(len(data.test), config.batch_size, accelerator.process_index, accelerator.num_processes)
    pin = accelerator.device.type == "cuda"
    tests = make_loader(Augmented(data.test, eval_transform(config, size), size), batches, config, pin_memory=pin)
    return EvaluationSetup(
        config=config, accelerator=accelerator, data=data, model=model.to(accelerator.device), tests=tests,
        bad_images=BadImages(config.on_bad_image),
    )  # fmt: skip


def prepare(config: Config, accelerator: Accelerator) -> TrainingSetup:
    """Everything that `train` needs; a UserError where something does not fit."""
    shared = prepare_evaluation(config, accelerator)
    model, data = shared.model, shared.data
    batches = TrainBatches(len(data.train), config, accelerator.process_index, accelerator.num_processes)
    size, pin = image_side(model), accelerator.device.type == "cuda"
    loader = make_loader(Augmented(data.train, train_transform(config, size), size), batches, config, pin_memory=pin)
    loss = factory.build_loss(config, model, len(data.classes)).to(accelerator.device)
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)  # type: ignore[operator]
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema = ModelEmaV3(model, decay=config.model_ema_decay) if config.model_ema else None
    optimizer = factory.build_optimizer(model, config, batches.effective)
    scheduler = factory.build_scheduler(optimizer, config, batches.steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    return TrainingSetup(
        **{**vars(shared), "model": model}, optimizer=optimizer, scheduler=scheduler, loss=loss,
        mixup=factory.build_mixup(config, len(data.classes), size), ema=ema, batches=batches, loader=loader,
    )  # fmt: skip


def train(setup: TrainingSetup, run: Run) -> None:
    """All epochs, from the last checkpoint on, and the record."""
    config, accelerator, batches = setup.config, setup.accelerator, setup.batches
    report_start(setup)
    untrained = collapse(setup) if config.probe else {}
    progress, metrics = restore(setup, run), {}
    for epoch in range(progress.epoch, config.epochs):
        setup.model.train()
        batches.epoch, batches.start_step = epoch, progress.step
        stream = iter(setup.loader)
        if not config.sched_on_updates:
            setup.scheduler.step(epoch)
        steps = range(progress.step, batches.steps)
        bar = tqdm(steps, f"epoch {epoch}", disable=not accelerator.is_main_process, unit="step")
        for step in bar:
            started, processor = time.monotonic(), time.process_time()
            if config.sched_on_updates:
                setup.scheduler.step_update(epoch * batches.steps + step)
            loss = torch.zeros((), device=accelerator.device)
            setup.optimizer.zero_grad()
            for micro in range(batches.accumulate):
                images, labels = load_batch(setup, next(stream), epoch, step)
                torch.manual_seed(derive_seed(config.seed, epoch, MODEL, step, micro, accelerator.process_index))
                last = micro == batches.accumulate - 1
                with nullcontext() if last else accelerator.no_sync(setup.model):
                    part = batch_loss(setup, images, labels) / batches.accumulate
                    accelerator.backward(part)
                loss += part.detach()
            if config.clip_grad is not None:
                accelerator.clip_grad_norm_(setup.model.parameters(), config.clip_grad)
            setup.optimizer.step()
            if setup.ema is not None:
                setup.ema.update(setup.plain_model)
            loss = accelerator.reduce(loss, reduction="mean")
            if step % CHECK_EVERY == 0:
                check_finite(loss, epoch, step)
                bar.set_postfix(loss=f"{float(loss):.3f}", refresh=False)
            progress.step = step + 1
            progress.loss_sum += loss
            progress.images_total += batches.effective
            progress.train_seconds += time.monotonic() - started
            progress.processor_seconds += time.process_time() - processor
            due = config.checkpoint_every and progress.step % config.checkpoint_every == 0
            if progress.step < batches.steps and (run.agree_to_stop() or due):
                save_progress(setup, run, progress)
        line = {
            "epoch": epoch,
            "train_loss": float(progress.loss_sum) / batches.steps,
            "lr": setup.optimizer.param_groups[0]["lr"],
            "images_per_second": progress.images_per_second,
        }
        if (epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs:
            metrics = evaluate_with_ema(setup)
            progress.best = max(progress.best, metrics[setup.accuracy])
            line |= metrics
        run.log(line)
        accelerator.print(", ".join(f"{k} {v:.4g}" for k, v in line.items()))
        progress.epoch, progress.step, progress.loss_sum = epoch + 1, 0, torch.zeros_like(progress.loss_sum)
        save_progress(setup, run, progress)
    metrics = metrics or evaluate_with_ema(setup)  # empty: stopped after the last epoch
    finish(setup, run, progress, metrics, untrained)


def load_batch(setup: TrainingSetup, batch: Sample, epoch: int, step: int) -> tuple[Tensor, Tensor]:
    """One micro-batch on the device: images (B, 3, H, W), labels (B,) or, mixed, (B, C)."""
    setup.bad_images.add(batch.bad)
    images, labels = (t.to(setup.accelerator.device, non_blocking=True) for t in (batch.image, batch.label))
    if setup.config.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    if setup.mixup is not None:  # every share of the step is mixed with the same weight, see TrainBatches
        np.random.seed(derive_seed(setup.config.seed, epoch, MIXUP, step))
        images, labels = setup.mixup(images, labels)
    return images, labels


def batch_loss(setup: TrainingSetup, images: Tensor, labels: Tensor) -> Tensor:
    """Loss of one micro-batch, the model's own auxiliary loss included."""
    outputs = setup.model(images)
    if isinstance(setup.loss, factory.DistillationLoss):
        loss = setup.loss(images, outputs, labels)
    elif isinstance(outputs, tuple):  # a distilled student trained without a teacher
        loss = (setup.loss(outputs[0].float(), labels) + setup.loss(outputs[1].float(), labels)) / 2
    else:
        loss = setup.loss(outputs.float(), labels)
    auxiliary: Tensor | float = vars(setup.plain_model).pop("auxiliary_loss", 0.0)  # the model's own, of this pass
    return loss + auxiliary


def check_finite(loss: Tensor, epoch: int, step: int) -> None:
    """End a run that has diverged."""
    if not loss.isfinite():
        raise UserError(f"the loss is {float(loss)} at epoch {epoch}, step {step}: lower --lr, or --clip-grad 1")


def training_state(setup: TrainingSetup, progress: Progress) -> dict[str, Any]:
    """What a checkpoint holds. No generator state: see `repro.seeding.derive_seed`."""
    scaler = setup.accelerator.scaler
    return {
        "model": setup.plain_model.state_dict(),
        "ema": None if setup.ema is None else setup.ema.module.state_dict(),
        "optimizer": setup.optimizer.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "progress": asdict(progress),
    }


def load_training_state(setup: TrainingSetup, state: dict[str, Any], where: str) -> Progress:
    """Put a checkpoint in place; a UserError if it is of another model, or in mid-epoch of another length."""
    factory.check_fit(setup.plain_model, state["model"], where)
    progress = Progress(**state["progress"])
    if progress.step and progress.steps_per_epoch != setup.batches.steps:
        raise UserError(
            f"{where} stands at step {progress.step} of {progress.steps_per_epoch} of an epoch, which has "
            f"{setup.batches.steps} steps here: keep the effective batch and the data, or use --finetune"
        )
    setup.plain_model.load_state_dict(state["model"])
    setup.optimizer.load_state_dict(state["optimizer"])
    if setup.ema is not None:  # the average of a run that kept none starts from its weights
        setup.ema.module.load_state_dict(state["model"] if state["ema"] is None else state["ema"])
    if setup.accelerator.scaler is not None and state["scaler"] is not None:
        setup.accelerator.scaler.load_state_dict(state["scaler"])
    setup.bad_images = BadImages(setup.config.on_bad_image, progress.bad_images)
    return progress


def restore(setup: TrainingSetup, run: Run) -> Progress:
    """Where to resume: the run's own checkpoint, else `--resume`'s, else the start."""
    progress = Progress()
    if (found := run.restore()) is not None:
        progress = load_training_state(setup, found[1], setup.config.output_dir)
    elif setup.config.resume:
        state = read_state(setup.config.resume)
        progress = load_training_state(setup, state, setup.config.resume)
    progress.steps_per_epoch = setup.batches.steps
    progress.loss_sum = progress.loss_sum.to(setup.accelerator.device)
    return progress


def save_progress(setup: TrainingSetup, run: Run, progress: Progress) -> None:
    """Write a checkpoint, on all processes at the same step; they leave together when one was asked to stop."""
    run.agree_to_stop()
    progress.bad_images = all_names(setup.bad_images.names)
    run.checkpoint(progress.epoch * progress.steps_per_epoch + progress.step, training_state(setup, progress))


@torch.inference_mode()
def evaluate(setup: EvaluationSetup, model: nn.Module) -> dict[str, float]:
    """Accuracies (fractions) and mean cross-entropy over all processes' images, each counted once, bad ones not at all.

    `model` is not the one wrapped for several processes: their batches differ in number.
    """
    accelerator = setup.accelerator
    model.eval()
    sums = torch.zeros(4, device=accelerator.device)  # correct, correct in 5, loss, images
    for batch in tqdm(setup.tests, "evaluation", disable=not accelerator.is_main_process, leave=False):
        setup.bad_images.add(batch.bad)
        images, labels = (t[batch.usable].to(accelerator.device, non_blocking=True) for t in (batch.image, batch.label))
        if len(labels) == 0:
            continue
        with accelerator.autocast():
            logits = model(images).float()  # (B, C)
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)  # (B, 5)
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([ranked[:, 0].sum(), ranked.sum(), loss, loss.new_tensor(len(labels))])
    correct, top5, loss_sum, images_seen = accelerator.reduce(sums, reduction="sum").tolist()
    count = max(images_seen, 1.0)
    kind = setup.accuracy.removesuffix("_accuracy")
    metrics = {setup.accuracy: correct / count, f"{kind}_top5": top5 / count, f"{kind}_loss": loss_sum / count}
    return metrics | {f"{kind}_images": int(images_seen)}


def evaluate_with_ema(setup: TrainingSetup) -> dict[str, float]:
    """Metrics of the weights and, where it is kept, the accuracy of their moving average."""
    metrics = evaluate(setup, setup.plain_model)
    if setup.ema is not None:
        metrics[f"{setup.accuracy}_ema"] = evaluate(setup, setup.ema.module)[setup.accuracy]
    return metrics


def evaluate_only(setup: EvaluationSetup, run: Run) -> None:
    """`--eval`: one pass over the evaluation images, and a record."""
    setup.accelerator.print(factory.describe_norms(setup.model))
    metrics = evaluate(setup, setup.model)
    setup.accelerator.print(f"{setup.accuracy} {metrics[setup.accuracy]:.4f} over {len(setup.data.test):,} images")
    run.finish(
        metrics,
        protocol=protocol(setup),
        selection="the weights given",
        bad_images=all_names(setup.bad_images.names),
    )


def report_start(setup: TrainingSetup) -> None:
    """Say what is about to be trained."""
    config, data, batches, say = setup.config, setup.data, setup.batches, setup.accelerator.print
    say(f"model: {config.model}, depth {config.depth}, {parameters(setup):,} parameters on {setup.accelerator.device}")
    say(factory.describe_norms(setup.plain_model))
    if config.variant:
        say(f"variant: {config.variant_name()}; {describe_variant(setup.plain_model)}")
    say(
        f"data: {data.name}, {len(data.train):,} training images, {len(data.test):,} of {data.test_split!r}, "
        f"{len(data.classes)} classes"
    )
    scaled = "as given" if config.unscaled_lr else f"{config.lr:g} x {batches.effective} / 512"
    say(
        f"batch: {config.batch_size} x {batches.accumulate} x {setup.accelerator.num_processes} processes = "
        f"{batches.effective}; lr {factory.peak_lr(config, batches.effective):.3g} ({scaled}); "
        f"{batches.steps} steps per epoch, {config.epochs} epochs"
    )


def collapse(setup: TrainingSetup) -> dict[str, Any]:
    """What `--probe` puts into the record: `collapse`, lists by metric over the blocks; the last one's `spectrum`."""
    batch = next(iter(setup.tests))
    images = batch.image[batch.usable].to(setup.accelerator.device)
    frame, spectrum = collapse_by_block(setup.plain_model, images)
    return {"collapse": frame.to_dict("list"), "spectrum": spectrum}


def finish(
    setup: TrainingSetup, run: Run, progress: Progress, metrics: dict[str, float], untrained: dict[str, Any]
) -> None:
    """The last weights and the record."""
    measured = collapse(setup) if setup.config.probe else {}
    if run.main:
        write_atomic(run.folder / "classes.json", json.dumps(setup.data.classes).encode())  # for ViT_imagenet.predict
        write_atomic(run.folder / "model.safetensors", to_safetensors(setup.plain_model.state_dict()))
        if setup.ema is not None:
            write_atomic(run.folder / "model_ema.safetensors", to_safetensors(setup.ema.module.state_dict()))
    run.finish(
        metrics | {f"best_epoch_{setup.accuracy}": progress.best},
        protocol=protocol(setup),
        selection="last epoch",
        images_per_second=progress.images_per_second,
        images_per_processor_second=progress.images_total / max(progress.processor_seconds, 1e-9),
        train_seconds=progress.train_seconds,
        processor_seconds=progress.processor_seconds,
        parameters=parameters(setup),
        multiply_adds=multiply_adds_per_image(setup),
        processes=setup.accelerator.num_processes,
        bad_images=all_names(setup.bad_images.names),
        **measured,
        **{f"{name}_untrained": values for name, values in untrained.items()},
    )
    setup.accelerator.print(f"{setup.accuracy} {metrics[setup.accuracy]:.4f}; {run.folder / 'record.json'}")


def protocol(setup: EvaluationSetup) -> str:
    """How the accuracy was measured; a table never mixes two."""
    data = setup.data
    part = "" if setup.config.max_test_samples is None else f", {len(data.test)} of its images"
    share = "" if setup.config.hold_out is None else f" {setup.config.hold_out:g} of train"
    return f"{data.name} {data.test_split}{share or ' split'}{part}, top-1, centre crop"


def parameters(setup: EvaluationSetup) -> int:
    """How many the model has."""
    return sum(p.numel() for p in setup.plain_model.parameters())


def multiply_adds_per_image(setup: EvaluationSetup) -> int:
    """Multiply-adds of the forward pass of one image."""
    model, side = setup.plain_model.eval(), image_side(setup.plain_model)
    return multiply_adds(model, torch.zeros(1, 3, side, side, device=setup.accelerator.device))
