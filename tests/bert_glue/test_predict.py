"""`python -m BERT_glue.predict`: label, probabilities and text for what a user gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from BERT_glue.main import main
from BERT_glue.predict import main as predict
from repro.errors import UserError


@pytest.fixture(scope="module")
def runs(tmp_path_factory: Any, backbones: dict[str, Path], glue_root: Path) -> dict[str, Path]:
    """Saved models of a pair task, a single-sentence task with ContraNorm, and a regression, by task."""
    root = tmp_path_factory.mktemp("runs")
    for task, more in {"rte": [], "sst2": ["--pos", "7", "--scale", "0.1"], "stsb": []}.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        flags = ["--model_name_or_path", str(backbones["bert"]), "--data_root", str(glue_root), "--max_length", "24"]
        flags += ["--max_train_steps", "1", "--save_model", *more]
        main([*flags, "--task_name", task, "--output_dir", str(root / task)])
    return {task: root / task for task in ("rte", "sst2", "stsb")}


def printed(capsys: Any, *arguments: str) -> list[list[str]]:
    capsys.readouterr()
    predict(arguments)
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()]


def test_a_sentence(runs: dict[str, Path], capsys: Any) -> None:
    header, first, second = printed(capsys, "--model", str(runs["sst2"]), "--text", "the cat sat", "--text", "a dog")
    assert header == ["label", "negative", "positive", "sentence"]
    model = AutoModelForSequenceClassification.from_pretrained(runs["sst2"] / "model")
    tokenizer = AutoTokenizer.from_pretrained(runs["sst2"] / "model")
    assert type(model).__name__ == "ContraNormBertForSequenceClassification"
    with torch.no_grad():
        expected = model(**tokenizer("a dog", return_tensors="pt")).logits.softmax(-1)[0]
    assert [float(p) for p in second[1:3]] == pytest.approx(expected.tolist(), abs=1e-4)
    assert second[0] == model.config.id2label[int(expected.argmax())]
    assert [line[3] for line in (first, second)] == ["the cat sat", "a dog"]


def test_pairs(runs: dict[str, Path], capsys: Any, tmp_path: Path) -> None:
    model = ["--model", str(runs["rte"] / "model")]
    header, two = printed(capsys, *model, "--text", "the cat sat", "--text", "a cat")
    assert header == ["label", "entailment", "not_entailment", "sentence1", "sentence2"]
    _, tab = printed(capsys, *model, "--text", "the cat sat\ta cat")
    assert two == tab and two[3:] == ["the cat sat", "a cat"]
    (tmp_path / "texts.tsv").write_text("the cat sat\ta cat\n\nred\tblue " + "big " * 99 + "\n" + "a\tb\n" * 70)
    lines = printed(capsys, *model, "--file", str(tmp_path / "texts.tsv"))
    assert len(lines) == 73 and lines[1] == two
    (tmp_path / "texts.tsv").write_text("the cat sat\na cat\n")  # two texts, not a pair
    with pytest.raises(UserError, match="got 1: the cat sat"):
        predict([*model, "--file", str(tmp_path / "texts.tsv")])


def test_scores(runs: dict[str, Path], capsys: Any) -> None:
    header, line = printed(capsys, "--model", str(runs["stsb"]), "--text", "the cat\ta cat")
    assert header == ["score", "sentence1", "sentence2"] and float(line[0]) == float(line[0])


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        ("rte", ["--text", "alone"], "takes two texts .*, got 1: alone"),
        ("sst2", ["--text", "a\tb"], "takes one text, got 2"),
        ("rte", ["--text", " "], "no text given"),
        ("rte", ["--file", "nowhere.txt"], "--file nowhere.txt: "),
        ("nowhere", ["--text", "a"], "no such folder"),
        ("backbone", ["--text", "a"], "no trained classifier there"),
    ],
)
def test_refusals(
    runs: dict[str, Path], backbones: dict[str, Path], task: str, arguments: list[str], message: str
) -> None:
    folder = backbones["bert"] if task == "backbone" else runs.get(task, Path("nowhere"))
    with pytest.raises(UserError, match=message):
        predict(["--model", str(folder), *arguments])


def test_as_a_command(runs: dict[str, Path]) -> None:
    command = [sys.executable, "-m", "BERT_glue.predict", "--model", str(runs["sst2"]), "--text", "a dog"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("label\tnegative\tpositive\tsentence\n") and result.stdout.count("\n") == 2
