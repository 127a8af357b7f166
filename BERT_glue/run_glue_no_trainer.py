"""Fine-tune BERT or ALBERT on a GLUE task, with ContraNorm at a site of every layer or without.

Example:
    ```
    python -m BERT_glue.run_glue_no_trainer --model_name_or_path minilm --task_name rte --pos 7 --scale 0.01 \
        --output_dir out/rte
    ```
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader

from BERT_glue.build import describe, load_backbone
from BERT_glue.config import Config, parse
from BERT_glue.data import load_splits, make_loader, tokenize
from BERT_glue.dropout import use_cheap_dropout
from BERT_glue.economy import compact_embeddings, reads_all_tokens, skip_unread_tokens, trained_tokens, used_tokens
from BERT_glue.predict import write_predictions
from BERT_glue.sites import active_sites
from BERT_glue.training import Job, Trainer, predict
from repro.errors import UserError, run_main
from repro.run.run import Run
from repro.seeding import seed_everything

PAPER_MAX_LENGTH = 128


def make_accelerator(config: Config) -> Accelerator:
    """One process or, under torchrun, several; the order of examples is the same either way."""
    trackers = [] if config.report_to == "none" else config.report_to.split(",")
    installed = {str(kind) for kind in get_available_trackers()}
    if not installed.issuperset(trackers):
        there = ", ".join(sorted(installed)) or "no tracker"
        raise UserError(f"--report_to {config.report_to}: not installed (found: {there}); pip install it, or say none")
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # without it torchrun's processes ignore each other on CPUs
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed),
            log_with=trackers or None,
            project_dir=config.output_dir,
        )
    except ValueError as error:
        raise UserError(
            f"--mixed_precision {config.mixed_precision}, --report_to {config.report_to}: {error}"
        ) from error
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", "1")):
        raise UserError(
            f"started as one of {os.environ['WORLD_SIZE']} processes that do not find each other; use torchrun"
        )
    return accelerator


def prepare(config: Config, accelerator: Accelerator) -> Job:
    """Load and check data and model, before anything is written.

    Raises:
        UserError: whatever does not fit.
    """
    with accelerator.main_process_first():  # the others find the tokenized rows in the cache
        splits = load_splits(config)
        seed_everything(config.seed)  # the head's first weights
        model, tokenizer = load_backbone(config, splits.task)
        length = config.max_length or min(PAPER_MAX_LENGTH, model.config.max_position_embeddings)

        def loader(rows: datasets.Dataset, *, train: bool = False) -> DataLoader[Any]:
            size = config.per_device_train_batch_size if train else config.per_device_eval_batch_size
            workers, pad = config.preprocessing_num_workers, config.pad_to_max_length
            encoded = tokenize(rows, splits.task, tokenizer, length, pad=pad, workers=workers)
            bucket = train and config.group_by_length
            return make_loader(encoded, tokenizer, size, seed=config.seed, shuffle=train, group_by_length=bucket)

        job = Job(
            task=splits.task,
            metric_name=config.task_name or ("classification" if splits.task.labels else "regression"),
            model=model,
            tokenizer=tokenizer,
            train=None if splits.train is None else loader(splits.train, train=True),
            validation={suffix: loader(rows) for suffix, rows in splits.validation.items()},
            test={file: loader(rows) for file, rows in splits.test.items()},
            parameters=sum(p.numel() for p in model.parameters()),
        )
        economize(config, job)
        return job


def economize(config: Config, job: Job) -> None:
    """Leave out work that training does not need, as far as the settings allow.

    Raises:
        UserError: asked for where it would change numbers.
    """
    reason = reads_all_tokens(job.model)
    if config.skip_unread_tokens and reason:
        raise UserError(f"--skip_unread_tokens: {reason}; leave the flag out")
    if config.skip_unread_tokens is not False and not reason:
        skip_unread_tokens(job.model)
    on_cpu = not torch.accelerator.is_available()
    if config.cheap_dropout or (config.cheap_dropout is None and on_cpu):
        use_cheap_dropout(job.model)
    if config.compact_embeddings and job.train is not None:
        loaders = [job.train, *job.validation.values(), *job.test.values()]
        rows = [loader.dataset for loader in loaders]
        compact_embeddings(job.model, used_tokens(rows, job.tokenizer.all_special_ids))


def protocol(config: Config) -> str:
    """How the numbers are measured; runs cut short or on own files never share a table's cell with full ones."""
    where = "GLUE validation set" if config.task_name else f"own validation file {config.validation_file}"
    return where if config.max_train_steps is None else f"{where}, {config.max_train_steps} steps"


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate, and leave record.json in the run's folder."""
    config = parse(sys.argv[1:] if argv is None else argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    accelerator = make_accelerator(config)
    finished = (Path(config.output_dir) / "record.json").exists()
    job = None if finished else prepare(config, accelerator)
    with Run(config.output_dir, "BERT_glue", config, main=accelerator.is_main_process) as run:
        if job is None or run.done:
            return
        accelerator.print(describe(job.model))
        accelerator.init_trackers("BERT_glue", {k: v for k, v in vars(config).items() if v is not None})
        sites, tokens = active_sites(job.model), trained_tokens(job.model)
        seed_everything(config.seed + accelerator.process_index)  # dropout differs between processes
        trainer = Trainer(config, job, accelerator, run)
        found = run.restore()
        if found is not None:
            trainer.load_state(found[1])
        metrics = trainer.train()

        predictions = {
            file: predict(trainer.model, loader, accelerator, job.task)[0] for file, loader in job.test.items()
        }
        if accelerator.is_main_process:
            if predictions:
                write_predictions(run.folder / "predictions", predictions, job.task)
            if config.save_model:
                accelerator.unwrap_model(trainer.model).save_pretrained(run.folder / "model")
                job.tokenizer.save_pretrained(run.folder / "model")
        curve = trainer.progress.curve
        run.finish(
            metrics,
            protocol=protocol(config),
            selection="last epoch",
            task=config.task_name or Path(str(config.validation_file)).stem,
            model=Path(config.model_name_or_path).name,
            norm="ContraNorm" if sites else "none",
            best_epoch=max(curve, key=lambda line: line["score"]) if curve else None,
            seconds_per_epoch=[line["train_seconds"] for line in curve],
            processes=accelerator.num_processes,
            parameters=job.parameters,
            trained_tokens=None if tokens is None else len(tokens),
            sites=sites,
        )
        accelerator.print("  ".join(f"{key} {value:.4f}" for key, value in metrics.items()))
    accelerator.end_training()


if __name__ == "__main__":
    run_main(main)
