"""GLUE's splits and own files: loaded, checked, tokenized, batched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from huggingface_hub.errors import StrictDataclassError
from torch.utils.data import DataLoader, Sampler
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from BERT_glue.config import Config
from BERT_glue.tasks import TASKS, Task
from repro.errors import UserError
from repro.holdout import split_off

TEXT = ("string", "large_string")


@dataclass
class Splits:
    """What one run reads: raw text with a column `label` (int, or float for regression)."""

    task: Task
    train: Dataset | None
    validation: dict[str, Dataset]  # suffix of the metrics → rows
    test: dict[str, Dataset]  # name of the TSV file → rows


def load_splits(config: Config) -> Splits:
    """The splits that a run needs, from --data_root, the Hub, or own files; a UserError for whatever is wrong there."""
    if config.task_name is None:
        return _own_splits(config)
    task = TASKS[config.task_name]
    train = _glue_split(config, "train", task) if config.num_train_epochs > 0 else None
    if train is not None and config.hold_out is not None:
        train, held = (train.select(part) for part in split_off(len(train), config.hold_out))
        validation = {"": held}
    else:
        validation = {suffix: _glue_split(config, split, task) for suffix, split in task.validation.items()}
    test = {}
    if config.do_predict:
        test = {file: _glue_split(config, split, task, labelled=False) for split, file in task.server_files.items()}
        folder = Path(config.data_root) / "glue" / "ax"
        if config.task_name == "mnli" and folder.is_dir():  # GLUE's diagnostic set is predicted by the MNLI model
            test["AX"] = _glue_split(config, "test", task, labelled=False, name="ax")
    return Splits(task, train, validation, test)


def _glue_split(config: Config, split: str, task: Task, *, labelled: bool = True, name: str | None = None) -> Dataset:
    name = name or str(config.task_name)
    folder = Path(config.data_root) / "glue" / name
    if folder.is_dir():
        files = sorted(str(path) for path in folder.glob(f"{split}-*.parquet"))
        if not files:
            there = ", ".join(sorted({path.name.split("-")[0] for path in folder.glob("*.parquet")})) or "no split"
            raise UserError(f"{folder}: task {name} has no {split} split there (found: {there}); add {split}-*.parquet")
        rows = _load("parquet", files, str(folder))
    else:
        try:
            rows = load_dataset("nyu-mll/glue", name, split=split)
        except Exception as error:  # the Hub's client raises many kinds: offline, time-outs, proxies, missing files
            raise UserError(
                f"GLUE task {name} is neither in {folder} nor to be had from the Hugging Face Hub "
                f"({type(error).__name__}: {reason(error)}); set --data_root"
            ) from error
    where = f"{folder} ({split})"
    _check_texts(rows, task.sentences, where)
    if labelled:
        _check_labels(rows, len(task.labels), where)
    return rows


def _own_splits(config: Config) -> Splits:
    """Own CSV or JSON files; integer or text labels are classes, fractional ones a regression."""
    paths = {"train": config.train_file if config.num_train_epochs > 0 else None, "validation": config.validation_file}
    raw = {split: _own_file(path) for split, path in paths.items() if path}
    for split, rows in raw.items():
        _check_column(rows, "label", str(paths[split]))
        if any(value is None or value == "" for value in rows["label"]):
            raise UserError(f"{paths[split]}: rows without a label")
    first = next(iter(raw.values()))
    sentences = _text_columns(first)
    regression = all(isinstance(value, float) for value in first["label"])
    names = () if regression else tuple(str(v) for v in sorted(set(first["label"])))
    for split, rows in raw.items():
        where = str(paths[split])
        _check_texts(rows, sentences, where)
        if regression:
            if not all(isinstance(value, (int, float)) for value in rows["label"]):
                raise UserError(f"{where}: labels that are not numbers, where the training labels are")
            raw[split] = rows.cast_column("label", Value("float32"))
            _check_labels(raw[split], 0, where)
            continue
        foreign = sorted({str(value) for value in rows["label"]} - set(names))
        if foreign:
            raise UserError(f"{where}: label {foreign[0]!r} does not occur in the training data ({', '.join(names)})")
        numbers = [names.index(str(value)) for value in rows["label"]]
        raw[split] = rows.remove_columns("label").add_column("label", numbers)
    test = {}
    if config.do_predict and config.test_file:
        rows = _own_file(config.test_file)
        _check_texts(rows, sentences, config.test_file)
        test = {Path(config.test_file).stem: rows.select_columns(list(sentences))}
    return Splits(Task(sentences, names), raw.get("train"), {"": raw["validation"]}, test)


def _own_file(path: str) -> Dataset:
    kind = {".csv": "csv", ".json": "json", ".jsonl": "json"}.get(Path(path).suffix.lower())
    if kind is None:
        raise UserError(f"{path}: own data must be .csv, .json or .jsonl")
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    if not text or (kind == "csv" and "\n" not in text):
        raise UserError(f"{path}: {'no rows below the header' if text else 'the file is empty'}")
    return _load(kind, [path], path, **({"keep_default_na": False} if kind == "csv" else {}))


def _load(kind: str, files: list[str], where: str, **options: Any) -> Dataset:
    try:
        rows = load_dataset(kind, data_files={"rows": files}, **options).get("rows")
    except (DatasetGenerationError, ValueError, OSError) as error:
        raise UserError(f"{where}: not readable as {kind}: {reason(error.__cause__ or error)}") from error
    if not rows:
        raise UserError(f"{where}: no rows")
    return rows


def reason(error: BaseException) -> str:
    """The first line of a library's error; the last of a strict dataclass's, where the reason stands."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if isinstance(error, StrictDataclassError) else 0].strip()[:300]


def _text_columns(rows: Dataset) -> tuple[str, ...]:
    """sentence1 and sentence2 where they are there, else the first one or two text columns."""
    if {"sentence1", "sentence2"} <= set(rows.column_names):
        return ("sentence1", "sentence2")
    texts = [name for name in rows.column_names if name != "label" and _kind(rows, name) in TEXT]
    if not texts:
        raise UserError(f"no column of text (found: {', '.join(rows.column_names)})")
    return tuple(texts[:2])


def _check_column(rows: Dataset, name: str, where: str) -> None:
    if name not in rows.column_names:
        raise UserError(f"{where}: no column {name!r} (found: {', '.join(rows.column_names)})")


def _check_texts(rows: Dataset, names: tuple[str, ...], where: str) -> None:
    for name in names:
        _check_column(rows, name, where)
        if (kind := _kind(rows, name)) not in TEXT:
            raise UserError(f"{where}: column {name!r} holds {kind}, not text")
        if any(value is None for value in rows[name]):
            raise UserError(f"{where}: column {name!r} has rows without text")


def _kind(rows: Dataset, name: str) -> str:
    return str(getattr(rows.features[name], "dtype", type(rows.features[name]).__name__))


def _check_labels(rows: Dataset, count: int, where: str) -> None:
    """Labels must be 0 … count - 1; finite numbers for regression (count 0)."""
    _check_column(rows, "label", where)
    values = rows["label"][:]
    if not (kind := _kind(rows, "label")).startswith(("int", "uint", "float")) or any(v is None for v in values):
        raise UserError(f"{where}: column 'label' holds {kind}, or has rows without a number")
    labels = torch.as_tensor(values)
    if count and (labels.is_floating_point() or labels.min() < 0 or labels.max() >= count):
        raise UserError(f"{where}: labels from {labels.min()} to {labels.max()}, the task has 0 to {count - 1}")
    if not count and not labels.isfinite().all():
        raise UserError(f"{where}: labels that are not finite numbers")


def tokenize(
    rows: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int, *, pad: bool = False,
    workers: int = 1,
) -> Dataset:  # fmt: skip
    """Rows of input_ids, attention_mask, token_type_ids and, where the rows have them, labels.

    The result is cached under a fingerprint of the rows, the tokenizer and the settings: a second run reads it.
    """
    padding = "max_length" if pad else False

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [batch[name] for name in task.sentences]
        columns = dict(tokenizer(*texts, truncation=True, max_length=max_length, padding=padding))
        if "label" in batch:
            columns["labels"] = batch["label"]
        return columns

    # what decides how a text is encoded, without the truncation and padding of the tokenizer's last call
    definition = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    return rows.map(
        encode,
        batched=True,
        remove_columns=rows.column_names,
        num_proc=workers if workers > 1 else None,
        new_fingerprint=Hasher.hash((rows._fingerprint, definition, task.sentences, max_length, padding)),
        desc="tokenizing",
    )


class BucketSampler(Sampler[int]):
    """Every index once per epoch, examples of similar length side by side.

    A random order is cut into chunks of batches; each chunk is sorted by length, and its batches are shuffled. The
    order depends on seed and epoch alone.
    """

    CHUNK = 50  # batches

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = torch.as_tensor(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        batches: list[torch.Tensor] = []
        for piece in order.split(self.batch_size * self.CHUNK):
            sorted_piece = piece[self.lengths[piece].argsort(descending=True, stable=True)]
            batches += sorted_piece.split(self.batch_size)
        last = [batches.pop()] if len(batches[-1]) < self.batch_size else []  # the short batch stays the last one
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        for batch in shuffled + last:
            yield from batch.tolist()


def make_loader(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int, *, seed: int = 0, shuffle: bool = False,
    group_by_length: bool = False,
) -> DataLoader[Any]:  # fmt: skip
    """Batches padded to their longest example. No global random generator is used or moved."""
    sampler = None
    if shuffle and group_by_length:
        sampler = BucketSampler([len(ids) for ids in rows["input_ids"]], batch_size, seed)
    return DataLoader(
        rows,
        batch_size=batch_size,
        shuffle=shuffle and sampler is None,
        sampler=sampler,
        collate_fn=DataCollatorWithPadding(tokenizer),
        generator=torch.Generator().manual_seed(seed),
    )
