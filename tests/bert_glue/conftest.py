"""Tiny random backbones, their tokenizer, and data in the layouts that the trainer reads."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
)

WORDS = "the a cat dog sat ran on under mat tree did not who what all some is was big small red blue".split()
TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # large enough that every site matters in the logits
}
VANILLA = {
    "bert": (BertConfig, BertForSequenceClassification),
    "albert": (AlbertConfig, AlbertForSequenceClassification),
}


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Converted and tokenized rows go to a folder of this test session, here and in processes it starts."""
    cache = str(tmp_path_factory.mktemp("datasets"))
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    os.environ["HF_DATASETS_CACHE"] = cache


@pytest.fixture(autouse=True)
def quiet_and_fresh() -> None:
    """No log lines; accelerate keeps its settings in a singleton, which must not leak from one run to the next."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    AcceleratorState._reset_state(reset_partial_state=True)


def make_vanilla(architecture: str, attention: str = "sdpa", **changes: Any) -> transformers.PreTrainedModel:
    """A tiny random vanilla classifier."""
    config_class, model_class = VANILLA[architecture]
    own = {"embedding_size": 16} if architecture == "albert" else {}
    config = config_class(**(TINY | own | changes))
    config._attn_implementation = attention
    torch.manual_seed(0)
    return model_class(config).eval()


@pytest.fixture(scope="session")
def vanilla() -> Any:
    return make_vanilla


def write_backbone(folder: Path, architecture: str, **changes: Any) -> Path:
    """A checkpoint folder with weights and a word-piece tokenizer."""
    changes = {"initializer_range": 0.05, "max_position_embeddings": 128} | changes
    make_vanilla(architecture, **changes).base_model.save_pretrained(folder)  # no head: fine-tuning makes its own
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def backbone_writer() -> Any:
    return write_backbone


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a tiny BERT and a tiny ALBERT, without dropout so that runs can be compared."""
    root = tmp_path_factory.mktemp("backbones")
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    heads = {"bert": {"classifier_dropout": 0.0}, "albert": {"classifier_dropout_prob": 0.0}}
    return {name: write_backbone(root / name, name, **still, **heads[name]) for name in VANILLA}


def sentence(i: int, length: int) -> str:
    return " ".join(WORDS[(i * 7 + 3 * j) % len(WORDS)] for j in range(length))


@pytest.fixture(scope="session")
def glue_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with small random splits of every GLUE task and of the diagnostic set."""
    from BERT_glue.tasks import TASKS

    root = tmp_path_factory.mktemp("data")
    rows = {"train": 22, "validation": 11, "test": 9}
    for name, task in {**TASKS, "ax": TASKS["mnli"]}.items():
        folder = root / "glue" / name
        folder.mkdir(parents=True)
        splits = ["test"] if name == "ax" else ["train", *task.validation.values(), *task.server_files]
        for split in splits:
            kind = split.split("_")[0]
            table: dict[str, list[Any]] = {
                column: [sentence(i + 31 * k, 2 + (i * 5 + k) % 9) for i in range(rows[kind])]
                for k, column in enumerate(task.sentences)
            }
            if kind == "test":
                labels = [-1.0 if not task.labels else -1] * rows[kind]
            elif task.labels:
                labels = [(i * i + i // 3) % len(task.labels) for i in range(rows[kind])]
            else:
                labels = [(i * 13 % 51) / 10 for i in range(rows[kind])]
            table["label"] = labels
            table["idx"] = list(range(rows[kind]))
            pd.DataFrame(table).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return root


@pytest.fixture
def record() -> Any:
    """Reads record.json of a run's folder."""
    return lambda folder: json.loads((Path(folder) / "record.json").read_text())


@pytest.fixture
def lines() -> Any:
    """Reads metrics.jsonl, without the columns that measure time."""

    def read(folder: Path) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if "seconds" not in k} for line in found]

    return read
