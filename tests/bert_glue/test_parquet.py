"""GLUE's parquet files with damaged bytes, swapped columns, wrong types and impossible values."""

from __future__ import annotations

import io
import random
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest

from BERT_glue.config import Config
from BERT_glue.data import load_splits
from repro.errors import UserError

INPUTS = 50


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, cut, emptied, halves swapped, a hole of zeros, or noise in the middle or at the end."""
    where = rng.randrange(len(data))
    noise = rng.randbytes(rng.randint(1, 64))
    kind = rng.randrange(7)
    if kind == 0:
        changed = bytearray(data)
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    choices = [b"", data[:where], data[where:] + data[:where], data[:where] + bytes(64) + data[where + 64 :]]
    choices += [data[:where] + noise + data[where:], data + noise]
    return choices[kind - 1]


def _tables(rng: np.random.Generator) -> list[pd.DataFrame]:
    """RTE's columns, told wrongly in every way."""
    n = 20
    good = pd.DataFrame(
        {
            "sentence1": [f"one {i}" for i in range(n)],
            "sentence2": ["two"] * n,
            "label": rng.integers(0, 2, n),
            "idx": range(n),
        }
    )
    return [
        good.rename(columns={"sentence1": "label", "label": "sentence1"}),
        good.rename(columns={"sentence1": "sentence2", "sentence2": "sentence1"}),
        good.drop(columns="label"),
        good.drop(columns="sentence2"),
        good.assign(label=2**40),
        good.assign(label=-7),
        good.assign(label="yes"),
        good.assign(label=0.5),
        good.assign(label=np.nan),
        good.assign(sentence1=1.5),
        good.assign(sentence1=None),
        good.assign(sentence1=[["a", "b"]] * n),
        good.assign(sentence1=[b"\xff\xfe"] * n),
        good.iloc[:0],
        good.assign(label=[[1, 0]] * n),
    ]


def test_mutated_parquet_is_refused_in_one_line_or_is_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.disable_progress_bars()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data" / "glue" / "rte"
    folder.mkdir(parents=True)
    rng = random.Random(4)
    good = pd.DataFrame({"sentence1": ["a b c"] * 40, "sentence2": ["d"] * 40, "label": [0, 1] * 20, "idx": range(40)})
    for split in ("train", "validation"):
        good.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    file = folder / "train-00000-of-00001.parquet"
    whole = file.read_bytes()
    contents = []
    for frame in _tables(np.random.default_rng(0)):
        buffer = io.BytesIO()
        frame.to_parquet(buffer)
        contents.append(buffer.getvalue())
    contents += [mutate(whole, rng) for _ in range(INPUTS - len(contents))]
    config = Config(
        model_name_or_path="bert", task_name="rte", data_root=str(tmp_path / "data"), output_dir=str(tmp_path / "out")
    )
    refused = 0
    for content in contents:
        file.write_bytes(content)
        try:
            load_splits(config)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused >= 13 and not (tmp_path / "out").exists()
