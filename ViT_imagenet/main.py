"""Train or evaluate a DeiT, ContraNorm or plain: `python -m ViT_imagenet.main --scale 0.1 --output_dir out/run`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save
from timm.data import Mixup
from timm.utils import ModelEmaV3

from repro.checkpoint import write_atomic
from repro.config import parse_config
from repro.errors import Interrupted, UserError, run_main
from repro.run import Run
from repro.seeding import seed_everything
from ViT_imagenet import setup
from ViT_imagenet.config import Config
from ViT_imagenet.data import ImageData, load_data
from ViT_imagenet.distill import DistillationLoss, build_teacher
from ViT_imagenet.engine import Progress, Trainer, evaluate
from ViT_imagenet.loader import BadImages, EvalBatches, TrainBatches, eval_transform, make_loader, train_transform
from ViT_imagenet.models import collapse_by_block


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and do one run."""
    config = parse_config(Config, argv, prog="ViT_imagenet.main", description=str(__doc__))
    if config.mixed_precision == "fp16" and (config.cpu or not torch.cuda.is_available()):
        raise UserError("--mixed_precision fp16 needs a GPU: use bf16 or no")
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=config.cpu)
    run = Run(config.output_dir, "ViT_imagenet", config, main=accelerator.is_main_process)
    if run.done:
        with run:
            return
    data = load_data(config)
    seed_everything(config.seed)
    model = start_model(config, data)
    with run:  # bad input has been told by now, and nothing has been written
        if config.eval:
            evaluate_only(config, accelerator, run, data, model)
        else:
            train(config, accelerator, run, data, model)
    if accelerator.num_processes > 1:
        torch.distributed.destroy_process_group()


def start_model(config: Config, data: ImageData) -> torch.nn.Module:
    """The model with the weights it starts from; `--resume` in training is `restore`'s business."""
    model = setup.build_model(config, len(data.classes))
    if config.finetune:
        setup.load_weights(model, config.finetune, reset_head=config.reset_head, new_steps=True)
    elif config.resume and config.eval:
        setup.load_weights(model, config.resume, reset_head=False)
    return model


def report_start(
    config: Config, accelerator: Accelerator, data: ImageData, model: torch.nn.Module, batches: TrainBatches
) -> None:
    """Say what is about to happen."""
    parameters = sum(p.numel() for p in model.parameters())
    accelerator.print(f"model: {config.model}, depth {config.depth}, {parameters:,} parameters on {accelerator.device}")
    accelerator.print(setup.describe_norms(model))
    accelerator.print(
        f"data: {data.name}, {len(data.train):,} training images, {len(data.test):,} of {data.test_split!r}, "
        f"{len(data.classes)} classes"
    )
    scaled = "as given" if config.unscaled_lr else f"{config.lr:g} x {batches.effective} / 512"
    accelerator.print(
        f"batch: {config.batch_size} x {config.accumulate} x {accelerator.num_processes} processes = "
        f"{batches.effective}; lr {setup.peak_lr(config, batches.effective):.3g} ({scaled}); "
        f"{batches.steps} steps an epoch, {config.epochs} epochs"
    )


def test_loader(config: Config, accelerator: Accelerator, data: ImageData, size: int) -> Any:
    """This process's share of the evaluation images."""
    batches = EvalBatches(len(data.test), config.batch_size, accelerator.process_index, accelerator.num_processes)
    pin = accelerator.device.type == "cuda"
    return make_loader(data.test, batches, eval_transform(config, size), size, config, pin_memory=pin)


def evaluate_only(config: Config, accelerator: Accelerator, run: Run, data: ImageData, model: torch.nn.Module) -> None:
    """`--eval`: one pass over the evaluation images, and a record."""
    accelerator.print(setup.describe_norms(model))
    bad = BadImages(config.on_bad_image)
    model.to(accelerator.device)
    metrics = evaluate(model, test_loader(config, accelerator, data, side(model)), accelerator, bad)
    accelerator.print(f"test accuracy {metrics['test_accuracy']:.4f} over {metrics['test_images']} images")
    run.finish(metrics, protocol=protocol(config, data), selection="the weights given", bad_images=list(bad.names))


def side(model: torch.nn.Module) -> int:
    """Side of the images that the model takes."""
    return int(model.patch_embed.img_size[0])  # type: ignore[union-attr, index]


def protocol(config: Config, data: ImageData) -> str:
    """How the accuracy was measured; a table never mixes two."""
    part = "" if config.max_test_samples is None else f", {len(data.test)} of its images"
    return f"{data.name} {data.test_split} split{part}, top-1, centre crop"


def build_trainer(
    config: Config, accelerator: Accelerator, data: ImageData, model: torch.nn.Module, batches: TrainBatches
) -> Trainer:
    """Everything that a step needs."""
    classes = len(data.classes)
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
        config, accelerator, model, optimizer, scheduler, loss, mixup, ema, BadImages(config.on_bad_image)
    )  # fmt: skip


def train(config: Config, accelerator: Accelerator, run: Run, data: ImageData, model: torch.nn.Module) -> None:
    """All epochs, from the last checkpoint on, and the record."""
    batches = TrainBatches(len(data.train), config, accelerator.process_index, accelerator.num_processes)
    report_start(config, accelerator, data, model, batches)
    trainer = build_trainer(config, accelerator, data, model, batches)
    size = side(trainer.plain_model)
    pin = accelerator.device.type == "cuda"
    loader = make_loader(data.train, batches, train_transform(config, size), size, config, pin_memory=pin)
    tests = test_loader(config, accelerator, data, size)
    progress = restore(config, run, trainer)
    metrics: dict[str, float] = {}

    def save_state() -> None:
        progress.bad_images = list(trainer.bad_images.names)
        run.checkpoint(progress.epoch * batches.steps + progress.step, state_of(trainer, progress))

    def after_step() -> None:
        stop = agreed(accelerator, run.stop_requested)
        due = config.checkpoint_every and progress.step % config.checkpoint_every == 0
        if (due or stop) and progress.step < batches.steps:
            save_state()
            if stop:  # asked of another process; this one leaves with it
                raise Interrupted(15)

    while progress.epoch < config.epochs:
        batches.epoch, batches.start_step = progress.epoch, progress.step
        trainer.train_epoch(batches, loader, progress, after_step)
        epoch = progress.epoch
        line = {
            "epoch": epoch,
            "train_loss": float(progress.loss_sum) / batches.steps,
            "lr": trainer.optimizer.param_groups[0]["lr"],
            "images_per_second": progress.images_total / max(progress.train_seconds, 1e-9),
        }
        if (epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs:
            metrics = evaluate(trainer.plain_model, tests, accelerator, trainer.bad_images)
            if trainer.ema is not None:
                averaged = evaluate(trainer.ema.module, tests, accelerator, trainer.bad_images)
                metrics["test_accuracy_ema"] = averaged["test_accuracy"]
            progress.best = max(progress.best, metrics["test_accuracy"])
            line.update(metrics)
        run.log(line)
        accelerator.print(", ".join(f"{k} {v:.4g}" for k, v in line.items()))
        progress.epoch, progress.step, progress.loss_sum = epoch + 1, 0, torch.zeros(())
        save_state()

    finish(config, accelerator, run, data, trainer, progress, metrics, tests)


def agreed(accelerator: Accelerator, stop: bool) -> bool:
    """True when any process was asked to stop: all must leave at the same step."""
    if accelerator.num_processes == 1:
        return stop
    flag = torch.tensor(float(stop), device=accelerator.device)
    return bool(accelerator.reduce(flag, reduction="sum") > 0)


def state_of(trainer: Trainer, progress: Progress) -> dict[str, Any]:
    """What a checkpoint holds. No generator state: see `loader.derive_seed`."""
    scaler = trainer.accelerator.scaler
    return {
        "model": trainer.plain_model.state_dict(),
        "ema": None if trainer.ema is None else trainer.ema.module.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "progress": asdict(progress),
    }


def restore(config: Config, run: Run, trainer: Trainer) -> Progress:
    """Put the last checkpoint of this folder, or the one of `--resume`, in place."""
    found = run.restore()
    state = found[1] if found else setup.read_state(config.resume) if config.resume else None
    if state is None:
        return Progress()
    setup.check_fit(trainer.plain_model, state["model"], config.resume or config.output_dir)
    trainer.plain_model.load_state_dict(state["model"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    if trainer.ema is not None and state["ema"] is not None:
        trainer.ema.module.load_state_dict(state["ema"])
    if trainer.accelerator.scaler is not None and state["scaler"] is not None:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])
    progress = Progress(**state["progress"])
    trainer.bad_images = BadImages(config.on_bad_image, progress.bad_images)
    return progress


def finish(
    config: Config, accelerator: Accelerator, run: Run, data: ImageData, trainer: Trainer, progress: Progress,
    metrics: dict[str, float], tests: Any,
) -> None:  # fmt: skip
    """The last weights and the record."""
    extra: dict[str, Any] = {}
    if config.probe:
        batch = next(iter(tests))
        images = batch.image[batch.usable].to(accelerator.device)
        extra["collapse"] = collapse_by_block(trainer.plain_model, images).to_dict("records")
    if run.main:
        folder = Path(config.output_dir)
        write_atomic(folder / "model.safetensors", save(contiguous(trainer.plain_model)))
        if trainer.ema is not None:
            write_atomic(folder / "model_ema.safetensors", save(contiguous(trainer.ema.module)))
    if not metrics:  # interrupted between the last epoch and the record
        metrics = evaluate(trainer.plain_model, tests, accelerator, trainer.bad_images)
    metrics["best_epoch_test_accuracy"] = progress.best
    run.finish(
        metrics,
        protocol=protocol(config, data),
        selection="last epoch",
        images_per_second=progress.images_total / max(progress.train_seconds, 1e-9),
        images_per_processor_second=progress.images_total / max(progress.processor_seconds, 1e-9),
        train_seconds=progress.train_seconds,
        processor_seconds=progress.processor_seconds,
        parameters=sum(p.numel() for p in trainer.plain_model.parameters()),
        processes=accelerator.num_processes,
        bad_images=list(trainer.bad_images.names),
        **extra,
    )
    accelerator.print(f"test accuracy {metrics['test_accuracy']:.4f}; {run.folder / 'record.json'}")


def contiguous(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict in the layout that safetensors takes."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
