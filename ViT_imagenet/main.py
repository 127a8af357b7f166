"""Train or evaluate a DeiT, ContraNorm or plain: `python -m ViT_imagenet.main --scale 0.1 --output_dir out/run`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save

from repro.config import parse_config
from repro.errors import Interrupted, UserError, run_main
from repro.files import write_atomic
from repro.run.run import Run
from repro.seeding import seed_everything
from ViT_imagenet import setup
from ViT_imagenet.config import Config
from ViT_imagenet.data import ImageData, load_data
from ViT_imagenet.engine import Progress, Trainer, build_trainer
from ViT_imagenet.evaluation import evaluate, test_loader
from ViT_imagenet.loader import BadImages
from ViT_imagenet.models import collapse_by_block, image_side


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and do one run."""
    config = parse_config(Config, argv, prog="ViT_imagenet.main", description=str(__doc__))
    if config.mixed_precision == "fp16" and (config.cpu or not torch.cuda.is_available()):
        raise UserError("--mixed_precision fp16 needs a GPU: use bf16 or no")
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=config.cpu)
    main_process = accelerator.is_main_process
    run = Run(config.output_dir, "ViT_imagenet", config, main=main_process, report_to=config.report_to)
    if run.done:
        with run:
            return
    data = load_data(config)
    seed_everything(config.seed)
    model = start_model(config, data)
    # Bad input is told before the folder is entered: nothing has been written by then.
    if config.eval:
        with run:
            evaluate_only(config, accelerator, run, data, model)
    else:
        trainer = build_trainer(config, accelerator, model, data)
        with run:
            report_start(config, data, trainer)
            train(config, run, data, trainer)
    if accelerator.num_processes > 1:
        torch.distributed.destroy_process_group()


def start_model(config: Config, data: ImageData) -> torch.nn.Module:
    """The model with the weights it starts from; `--resume` in training is `train`'s business."""
    model = setup.build_model(config, len(data.classes))
    if config.finetune:
        setup.load_weights(model, config.finetune, reset_head=config.reset_head, new_steps=True)
    elif config.resume and config.eval:
        setup.check_same_model(config)
        setup.load_weights(model, config.resume, reset_head=False)
    return model


def report_start(config: Config, data: ImageData, trainer: Trainer) -> None:
    """Say what is about to happen."""
    accelerator, batches, model = trainer.accelerator, trainer.batches, trainer.plain_model
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


def evaluate_only(config: Config, accelerator: Accelerator, run: Run, data: ImageData, model: torch.nn.Module) -> None:
    """`--eval`: one pass over the evaluation images, and a record."""
    accelerator.print(setup.describe_norms(model))
    bad = BadImages(config.on_bad_image)
    model.to(accelerator.device)
    metrics = evaluate(model, test_loader(config, accelerator, data, image_side(model)), accelerator, bad)
    accelerator.print(f"test accuracy {metrics['test_accuracy']:.4f} over {metrics['test_images']} images")
    run.finish(
        metrics, protocol=protocol(config, data), selection="the weights given", bad_images=all_names(accelerator, bad)
    )


def protocol(config: Config, data: ImageData) -> str:
    """How the accuracy was measured; a table never mixes two."""
    part = "" if config.max_test_samples is None else f", {len(data.test)} of its images"
    return f"{data.name} {data.test_split} split{part}, top-1, centre crop"


def train(config: Config, run: Run, data: ImageData, trainer: Trainer) -> None:
    """All epochs, from the last checkpoint on, and the record."""
    accelerator = trainer.accelerator
    found = run.restore()
    progress = Progress(steps_per_epoch=trainer.batches.steps)
    if found is not None:
        progress = trainer.load(found[1], config.output_dir)
    elif config.resume:
        progress = trainer.load(setup.read_state(config.resume), config.resume)
    metrics: dict[str, float] = {}

    def save_state() -> None:
        stop = agreed(accelerator, run.stop_requested)
        progress.bad_images = all_names(accelerator, trainer.bad_images)
        run.checkpoint(progress.epoch * progress.steps_per_epoch + progress.step, trainer.state(progress))
        if stop:  # asked of another process; this one leaves with it
            raise Interrupted(signal.SIGTERM)

    def after_step() -> None:
        due = config.checkpoint_every and progress.step % config.checkpoint_every == 0
        if progress.step < progress.steps_per_epoch and (agreed(accelerator, run.stop_requested) or due):
            save_state()

    while progress.epoch < config.epochs:
        trainer.train_epoch(progress, after_step)
        epoch = progress.epoch
        line = {
            "epoch": epoch,
            "train_loss": float(progress.loss_sum) / progress.steps_per_epoch,
            "lr": trainer.optimizer.param_groups[0]["lr"],
            "images_per_second": progress.images_total / max(progress.train_seconds, 1e-9),
        }
        if (epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs:
            metrics = trainer.test()
            progress.best = max(progress.best, metrics["test_accuracy"])
            line.update(metrics)
        run.log(line)
        accelerator.print(", ".join(f"{k} {v:.4g}" for k, v in line.items()))
        progress.epoch, progress.step, progress.loss_sum = epoch + 1, 0, torch.zeros(())
        save_state()

    finish(config, run, data, trainer, progress, metrics)


def all_names(accelerator: Accelerator, bad_images: BadImages) -> list[str]:
    """The bad images that any process has met."""
    names = list(bad_images.names)
    if accelerator.num_processes > 1:
        names = [name for part in gather_object([names]) for name in part]
    return list(dict.fromkeys(names))


def agreed(accelerator: Accelerator, stop: bool) -> bool:
    """True when any process was asked to stop: all must leave at the same step."""
    if accelerator.num_processes == 1:
        return stop
    flag = torch.tensor(float(stop), device=accelerator.device)
    return bool(accelerator.reduce(flag, reduction="sum") > 0)


def finish(
    config: Config, run: Run, data: ImageData, trainer: Trainer, progress: Progress, metrics: dict[str, float]
) -> None:
    """The last weights and the record."""
    accelerator = trainer.accelerator
    extra: dict[str, Any] = {}
    if config.probe:
        batch = next(iter(trainer.tests))
        images = batch.image[batch.usable].to(accelerator.device)
        extra["collapse"] = collapse_by_block(trainer.plain_model, images).to_dict("records")
    if run.main:
        folder = Path(config.output_dir)
        write_atomic(folder / "model.safetensors", save(contiguous(trainer.plain_model)))
        if trainer.ema is not None:
            write_atomic(folder / "model_ema.safetensors", save(contiguous(trainer.ema.module)))
    metrics = metrics or trainer.test()  # empty when interrupted between the last epoch and the record
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
        bad_images=all_names(accelerator, trainer.bad_images),
        **extra,
    )
    accelerator.print(f"test accuracy {metrics['test_accuracy']:.4f}; {run.folder / 'record.json'}")


def contiguous(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict in the layout that safetensors takes."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
