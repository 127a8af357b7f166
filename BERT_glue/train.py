"""Fine-tuning: what it needs, the loop, evaluation, and a state that a checkpoint holds whole."""

from __future__ import annotations

import copy
import math
import sys
import time
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, gather_object
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from BERT_glue.config import Config
from BERT_glue.data import load_splits, make_loader, tokenize
from BERT_glue.efficiency import apply_speedups, read_all_tokens, trained_tokens
from BERT_glue.metric import glue_metrics
from BERT_glue.models import load_backbone
from BERT_glue.predict import as_predictions
from BERT_glue.tasks import Task
from contranorm import attention_similarity
from contranorm.collapse import METRICS, singular_spectrum
from repro.cost import multiply_adds
from repro.errors import UserError
from repro.parallel import check_processes
from repro.run.run import Run
from repro.seeding import rng_state, seed_everything, set_rng_state

PAPER_MAX_LENGTH = 128
PROBED_ROWS = 64


@dataclass
class TrainingSetup:
    """Everything that training needs, checked before the run's folder is touched, and placed on its device."""

    config: Config
    accelerator: Accelerator
    task: Task
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    parameters: int  # of the model as it is saved; fewer may be trained
    train: DataLoader[Any] | None
    validation: dict[str, DataLoader[Any]]  # suffix of the metrics → batches
    test: dict[str, DataLoader[Any]]  # name of the TSV file → batches
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    total_steps: int


@dataclass
class Progress:
    """How far training is."""

    loss_sum: Tensor  # over this epoch's batches in this process
    epoch: int = 0
    batches: int = 0  # done in this epoch, per process
    step: int = 0  # optimizer steps done
    seconds: float = 0.0  # spent training in this epoch
    curve: list[dict[str, Any]] = field(default_factory=list)  # one line per epoch
    metrics: dict[str, float] = field(default_factory=dict)  # of the last epoch


# -- before training ---------------------------------------------------------------------------------------------------


def make_accelerator(config: Config) -> Accelerator:
    """One process or, under torchrun, several; the order of examples is the same either way."""
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # without it torchrun's processes ignore each other on CPUs
            mixed_precision=config.mixed_precision,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed),
        )
    except ValueError as error:
        raise UserError(f"--mixed_precision {config.mixed_precision}: {error}") from error
    check_processes(accelerator.num_processes)
    accelerator.gradient_accumulation_steps = config.accumulation(accelerator.num_processes)
    return accelerator


def prepare(config: Config, accelerator: Accelerator) -> TrainingSetup:
    """Load and check data and model, before anything is written; a UserError for whatever does not fit."""
    with accelerator.main_process_first():  # the others find the tokenized rows in the cache
        splits = load_splits(config)
        seed_everything(config.seed)  # the head's first weights
        model, tokenizer = load_backbone(config, splits.task)
        length = config.max_length or min(PAPER_MAX_LENGTH, model.config.max_position_embeddings)
        tokenizer.model_max_length = length  # saved with the model, so that predictions cut texts as training did

        def encode(rows: Dataset) -> Dataset:
            pad, workers = config.pad_to_max_length, config.preprocessing_num_workers
            return tokenize(rows, splits.task, tokenizer, length, pad=pad, workers=workers)

        rows = encode(splits.train) if splits.train else None
        validation = {suffix: encode(split) for suffix, split in splits.validation.items()}
        test = {file: encode(split) for file, split in splits.test.items()}
    parameters = sum(p.numel() for p in model.parameters())
    read = [rows, *validation.values(), *test.values()] if rows else []
    apply_speedups(config, model, read, tokenizer.all_special_ids)

    groups = parameter_groups(model, config.weight_decay)
    # None, not False: PyTorch then still joins the tensors of a step where it can
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=config.fused_optimizer or None)

    def loader(rows: Dataset, size: int, **how: bool) -> DataLoader[Any]:
        return accelerator.prepare(make_loader(rows, tokenizer, size, seed=config.seed, **how))

    train, steps, size = None, 0, config.per_device_eval_batch_size
    if rows:
        by_length = config.group_by_length
        train = loader(rows, config.per_device_train_batch_size, shuffle=True, group_by_length=by_length)
        steps = math.ceil(len(train) / accelerator.gradient_accumulation_steps) * config.num_train_epochs
    validation = {suffix: loader(rows, size) for suffix, rows in validation.items()}
    test = {file: loader(rows, size) for file, rows in test.items()}
    steps = min(steps, config.max_train_steps or steps)
    scheduler = get_scheduler(config.lr_scheduler_type, optimizer, config.num_warmup_steps, steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    return TrainingSetup(
        config, accelerator, splits.task, model, tokenizer, parameters, train, validation, test, optimizer, scheduler,
        steps,
    )  # fmt: skip


def describe_batch(setup: TrainingSetup) -> str:
    """One line: the effective batch, what it is made of, and the number of steps."""
    share, processes = setup.config.per_device_train_batch_size, setup.accelerator.num_processes
    passes = setup.accelerator.gradient_accumulation_steps
    batch = f"{share} x {passes} x {processes} processes = {share * passes * processes}"
    return f"batch: {batch}; {setup.total_steps} steps, {setup.config.num_train_epochs} epochs"


def parameter_groups(model: PreTrainedModel, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices are decayed; biases, LayerNorm weights and learnable steps, which are vectors, are not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


# -- training ----------------------------------------------------------------------------------------------------------


def train(setup: TrainingSetup, run: Run) -> Progress:
    """Fine-tune to the last step, from the run's last checkpoint if it has one; `metrics` are those after it."""
    config, accelerator, loader = setup.config, setup.accelerator, setup.train
    every, quiet = config.checkpointing_steps, not accelerator.is_main_process
    seed_everything(config.seed + accelerator.process_index)  # dropout differs between processes
    p = restore(setup, run)
    with tqdm(
        total=setup.total_steps, initial=p.step, unit="step", disable=quiet, file=sys.stderr, mininterval=1
    ) as bar:
        # a checkpoint within the last epoch may have all steps done and the evaluation still to come
        while p.step < setup.total_steps or p.batches:
            clock = time.monotonic()
            setup.model.train()
            loader.set_epoch(p.epoch)  # before skipping: a skipping loader does not reach the sampler of two processes
            for batch in accelerator.skip_first_batches(loader, p.batches) if p.batches else loader:
                if p.step >= setup.total_steps:
                    break
                p.loss_sum += train_batch(setup, batch, p.batches)  # read once per epoch: a GPU is not waited for
                p.batches += 1
                p.seconds, clock = p.seconds + time.monotonic() - clock, time.monotonic()
                if accelerator.sync_gradients:
                    setup.scheduler.step()
                    p.step += 1
                    if bar.update():  # the display is due, once a second at most
                        bar.set_description(f"loss {p.loss_sum.item() / p.batches:.4f}", refresh=False)
                    if run.agree_to_stop() or (every and p.step % every == 0):
                        run.checkpoint(p.step, checkpoint_state(setup, p))

            loss = accelerator.reduce(p.loss_sum / p.batches, "mean").item()
            if not math.isfinite(loss):
                raise UserError(f"the loss is {loss} in epoch {p.epoch + 1}: try a lower --learning_rate")
            p.metrics = evaluate(setup)
            line = {"epoch": p.epoch + 1, "step": p.step, "loss": loss, "lr": setup.scheduler.get_last_lr()[0]}
            p.curve.append({**line, **p.metrics, "train_seconds": round(p.seconds, 3)})
            run.log(p.curve[-1])
            bar.set_description(f"loss {loss:.4f}")
            bar.set_postfix(epoch=p.epoch + 1, score=f"{p.metrics['score']:.4f}")
            p.epoch, p.batches, p.seconds = p.epoch + 1, 0, 0.0
            p.loss_sum.zero_()
            run.agree_to_stop()  # so that all processes leave at this checkpoint, or none
            run.checkpoint(p.step, checkpoint_state(setup, p))
    p.metrics = p.metrics or evaluate(setup)
    return p


def train_batch(setup: TrainingSetup, batch: dict[str, Tensor], number: int) -> Tensor:
    """The loss of batch `number` of its epoch, after backward and, at the end of a group, the optimizer's step."""
    # accelerate divides the gradient by the group's nominal size: an epoch's last group may be shorter
    size = setup.accelerator.gradient_accumulation_steps
    weight = size / min(size, len(setup.train) - number // size * size)
    with setup.accelerator.accumulate(setup.model):
        loss = setup.model(**batch).loss
        setup.accelerator.backward(loss * weight)
        setup.optimizer.step()
        setup.optimizer.zero_grad()
    return loss.detach()


@torch.no_grad()
def predict(setup: TrainingSetup, loader: DataLoader[Any]) -> tuple[Tensor, ...]:
    """Predictions and labels of all rows, each row once, on every process; labels are 0 where the rows have none."""
    setup.model.eval()
    predictions, references = [], []
    for batch in loader:
        labels = batch.pop("labels", None)
        values = as_predictions(setup.model(**batch).logits, setup.task)  # (B,)
        labels = torch.zeros_like(values) if labels is None else labels
        values, labels = setup.accelerator.gather_for_metrics((values, labels))
        predictions.append(values.cpu())
        references.append(labels.cpu())
    return torch.cat(predictions), torch.cat(references)


def evaluate(setup: TrainingSetup) -> dict[str, float]:
    """GLUE's metrics on the validation split (MNLI: on both, apart), and their mean as `score`."""
    name = setup.config.task_name or ("classification" if setup.task.labels else "regression")
    metrics: dict[str, float] = {}
    for suffix, loader in setup.validation.items():
        found = glue_metrics(name, *predict(setup, loader))
        metrics |= {key + suffix: value for key, value in found.items()}
    return {**metrics, "score": sum(metrics.values()) / len(metrics)}


def multiply_adds_per_example(setup: TrainingSetup) -> int:
    """Multiply-adds of the forward pass of one example of the longest length, padding none."""
    model, tokenizer = setup.accelerator.unwrap_model(setup.model).eval(), setup.tokenizer
    tokens = torch.full((1, tokenizer.model_max_length), tokenizer.cls_token_id, device=model.device)
    return multiply_adds(model, tokens)


@torch.no_grad()
def collapse_by_layer(setup: TrainingSetup) -> dict[str, Any]:
    """What `--probe` puts into the record, padding left out.

    Returns:
        collapse: lists by metric over the layers' outputs, and the layers' numbers, from 1.
        spectrum: singular values of the last one's tokens, as shares of their sum, in descending order; mean over
            the examples, of which shorter ones have fewer.
    """
    model = copy.deepcopy(setup.accelerator.unwrap_model(setup.model)).eval()
    read_all_tokens(model)
    model.set_attn_implementation("eager")  # the other ones return no maps
    loader = next(iter(setup.validation.values()))
    rows = [loader.dataset[i] for i in range(min(PROBED_ROWS, len(loader.dataset)))]
    batch = loader.collate_fn(rows).to(model.device)
    mask = batch["attention_mask"].bool()  # (B, N)
    output = model(**batch, output_hidden_states=True, output_attentions=True)
    lists = {name: [metric(x, mask) for x in output.hidden_states[1:]] for name, metric in METRICS.items()}

    def similarity(maps: Tensor) -> float:  # (B, H, N, N)
        return fmean(attention_similarity(map_[:, keep][..., keep]) for map_, keep in zip(maps, mask, strict=True))

    lists["attention_similarity"] = [similarity(maps) for maps in output.attentions]
    last = [singular_spectrum(x[keep]) for x, keep in zip(output.hidden_states[-1], mask, strict=True)]
    return {
        "collapse": {"layer": list(range(1, len(output.attentions) + 1)), **lists},
        "spectrum": pad_sequence(last, batch_first=True).mean(dim=0).tolist(),
    }


# -- checkpoints -------------------------------------------------------------------------------------------------------


def checkpoint_state(setup: TrainingSetup, progress: Progress) -> dict[str, Any]:
    """All that decides how training continues; each process adds its random generators and its sum of losses."""
    model = setup.accelerator.unwrap_model(setup.model)
    shared = dict(vars(progress))
    own = {"rng": rng_state(), "loss_sum": shared.pop("loss_sum").cpu()}
    return {
        "tokens": trained_tokens(model),
        "model": model.state_dict(),
        "optimizer": setup.optimizer.state_dict(),
        "scheduler": setup.scheduler.state_dict(),
        "progress": shared,
        "processes": gather_object([own]),
    }


def restore(setup: TrainingSetup, run: Run) -> Progress:
    """Load the run's last checkpoint, if it has one, into the setup; says how far it was."""
    progress = Progress(torch.zeros((), device=setup.accelerator.device))
    found = run.restore()
    if found is None:
        return progress
    state = found[1]
    there, here = len(state["processes"]), setup.accelerator.num_processes
    if there != here:
        raise UserError(f"{run.folder} was started with {there} processes, this is {here}: use as many as before")
    model = setup.accelerator.unwrap_model(setup.model)
    old, new = state["tokens"], trained_tokens(model)
    if (old is None) != (new is None) or (old is not None and not torch.equal(old, new)):
        raise UserError(f"{run.folder} was started on texts with other words: use the same data as before")
    own = state["processes"][setup.accelerator.process_index]
    model.load_state_dict(state["model"])
    setup.optimizer.load_state_dict(state["optimizer"])
    setup.scheduler.load_state_dict(state["scheduler"])
    set_rng_state(own["rng"])
    return Progress(progress.loss_sum.copy_(own["loss_sum"]), **state["progress"])
