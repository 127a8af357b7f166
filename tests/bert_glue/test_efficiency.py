"""Less work, same training: embedding rows and last-block tokens that nothing reads, the fused optimizer."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification

import BERT_glue as bg
import BERT_glue.train as training
from BERT_glue.config import parse
from BERT_glue.efficiency import (
    UsedRows,
    compact_embeddings,
    reads_all_tokens,
    skip_unread_tokens,
    trained_tokens,
    used_tokens,
)
from BERT_glue.main import main as main_once
from BERT_glue.train import parameter_groups
from repro.errors import UserError
from repro.run.run import Run

USED = torch.tensor([0, 2, 3, 7, 40, 63])  # of the tiny vocabulary's 64; 0 is padding


def main(arguments: list[str]) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    main_once(arguments)


def batch(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = USED[torch.randint(1, len(USED), (4, 6), generator=generator)]
    mask = torch.ones_like(ids)
    ids[0, 4:] = mask[0, 4:] = 0  # padding
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 1, 0])}


def test_lookup_and_gradient_are_the_embeddings() -> None:
    table = nn.Embedding(64, 5, padding_idx=0)
    rows = UsedRows(table, USED)
    tokens = batch(0)["input_ids"]
    weight = torch.randn(4, 6, 5)
    for module in (table, rows):
        (module(tokens) * weight).sum().backward()
    assert torch.equal(rows(tokens), table(tokens))
    assert rows.weight.shape == (6, 5)
    assert torch.equal(rows.weight.grad, table.weight.grad[USED])
    assert rows.weight.grad[0].abs().max() == 0  # padding, as nn.Embedding has it
    with pytest.raises(IndexError):
        rows(torch.tensor([[1]]))


def test_state_is_the_whole_table() -> None:
    table = nn.Embedding(64, 5, padding_idx=0)
    rows = UsedRows(table, USED)
    assert list(rows.state_dict()) == ["weight"] and torch.equal(rows.state_dict()["weight"], table.weight)
    other = nn.Embedding(64, 5)
    rows.load_state_dict(other.state_dict())
    assert torch.equal(rows.state_dict()["weight"], other.weight) and torch.equal(rows.weight, other.weight[USED])
    for odd in ({}, {"weight": torch.zeros(6, 5)[:3]}, {"weight": other.weight, "more": other.weight}):
        with pytest.raises(RuntimeError, match=r"Missing key|size mismatch|Unexpected key"):
            rows.load_state_dict(odd)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("architecture", ["bert", "albert"])
def test_training_is_bit_identical(vanilla: Any, architecture: str, fused: bool | None) -> None:
    """Dropout is on, and the moments of AdamW are compared besides the weights."""
    whole = vanilla(architecture).train()
    compact = copy.deepcopy(whole)
    compact_embeddings(compact, USED)
    moments = []
    for model in (whole, compact):
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.0), lr=1e-2, fused=fused)
        for step in range(3):
            torch.manual_seed(step)
            model(**batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        moments.append(optimizer.state[model.get_input_embeddings().weight])
    theirs, ours = whole.state_dict(), compact.state_dict()
    assert list(theirs) == list(ours) and all(torch.equal(theirs[name], ours[name]) for name in theirs)
    unused = [i for i in range(64) if i not in USED]
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(moments[0][name][USED], moments[1][name]) and moments[1][name].abs().max() > 0
        assert moments[0][name][unused].abs().max() == 0
    assert list(trained_tokens(compact)) == list(USED) and trained_tokens(whole) is None


def test_a_saved_compact_model_is_the_vanilla_model(vanilla: Any, tmp_path: Path) -> None:
    model = vanilla("bert")
    compact_embeddings(model, USED)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert isinstance(again.get_input_embeddings(), nn.Embedding)
    inputs = {k: v for k, v in batch(0).items() if k != "labels"}
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)
    assert torch.equal(
        again.get_input_embeddings().weight, model.state_dict()["bert.embeddings.word_embeddings.weight"]
    )


def test_a_compact_table_does_not_grow(vanilla: Any) -> None:
    model = vanilla("bert")
    compact_embeddings(model, USED)
    with pytest.raises(TypeError):
        model.resize_token_embeddings(70)


def test_used_tokens_are_those_of_all_rows() -> None:
    rows = datasets.Dataset.from_dict({"input_ids": [[2, 9, 3], [2, 3], [2, 5, 5, 3]], "labels": [0, 1, 0]})
    assert used_tokens([rows, rows.select([1])], [0, 4]).tolist() == [0, 2, 3, 4, 5, 9]
    assert used_tokens([rows.select([1])], []).tolist() == [2, 3]


@pytest.mark.parametrize("sites", [[], ["attention_sum"], ["layer_input", "attention_norm"]])
def test_skipping_unread_tokens_changes_no_number(vanilla: Any, sites: list[str]) -> None:
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    whole = vanilla("bert", **still)
    if sites:
        built = bg.ContraNormBertForSequenceClassification(bg.with_contranorm(whole.config, sites=sites, scale=0.1))
        built.load_state_dict(whole.state_dict())
        whole = built
    whole.train()
    less = copy.deepcopy(whole)
    skip_unread_tokens(less)
    seen = []
    less.base_model.encoder.layer[-1].output.dense.register_forward_hook(lambda *a: seen.append(a[2].shape))
    for model in (whole, less):
        model(**batch(0)).loss.backward()
    torch.testing.assert_close(less(**batch(0)).logits, whole(**batch(0)).logits)
    assert {shape[1] for shape in seen} == {1}
    for (name, ours), (_, theirs) in zip(less.named_parameters(), whole.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_skipping_needs_a_last_block_of_its_own(vanilla: Any) -> None:
    for model in (vanilla("albert"), vanilla("bert", chunk_size_feed_forward=2)):
        assert re.search("one and the same|in chunks", reads_all_tokens(model))
    assert reads_all_tokens(vanilla("bert")) is None


SMALL = ["--per_device_train_batch_size", "4", "--learning_rate", "1e-3", "--task_name", "rte"]


@pytest.fixture
def command(backbones: dict[str, Path], glue_root: Path) -> Any:
    def build(output_dir: Path, *more: str, backbone: str = "bert") -> list[str]:
        fixed = ["--model_name_or_path", str(backbones[backbone]), "--num_train_epochs", "1", "--pos", "0", *SMALL]
        return [*fixed, "--data_root", str(glue_root), "--output_dir", str(output_dir), *more]

    return build


ALL_OFF = ["--no_compact_embeddings", "--no_skip_unread_tokens", "--no_fused_optimizer"]


@pytest.mark.parametrize("backbone", ["bert", "albert"])
def test_runs_agree_with_and_without(command: Any, tmp_path: Path, record: Any, lines: Any, backbone: str) -> None:
    """Compact embeddings bit for bit, all of it within rounding; the saved model is vanilla transformers' own."""
    ways = {"off": ALL_OFF, "compact": ["--compact_embeddings", *ALL_OFF[1:]], "on": []}
    saved = {}
    for way, flags in ways.items():
        main(command(tmp_path / way, *flags, "--save_model", "--do_predict", backbone=backbone))
        saved[way] = load_file(tmp_path / way / "model" / "model.safetensors")
    off, on = record(tmp_path / "off"), record(tmp_path / "on")
    assert lines(tmp_path / "compact") == lines(tmp_path / "off")
    assert off["parameters"] == on["parameters"] == sum(w.numel() for w in saved["off"].values())
    assert off["trained_tokens"] is None and 5 < on["trained_tokens"] < 64
    for name, theirs in saved["off"].items():
        assert torch.equal(saved["compact"][name], theirs), name
        torch.testing.assert_close(saved["on"][name], theirs, atol=1e-5, rtol=0)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "on" / "model")
    assert type(model).__name__ == f"{'Bert' if backbone == 'bert' else 'Albert'}ForSequenceClassification"


def test_what_would_change_numbers_is_refused(command: Any, tmp_path: Path) -> None:
    decay = ["--output_dir", "x", "--model_name_or_path", "y", "--task_name", "rte", "--weight_decay", "0.1"]
    with pytest.raises(UserError, match=r"--compact_embeddings leaves .* --weight_decay 0\.1"):
        parse([*decay, "--compact_embeddings"])
    assert parse(decay).compact_embeddings is False
    assert parse(decay[:-2]).compact_embeddings is True
    for more, reason in (
        ({"backbone": "albert"}, "ALBERT's blocks"),
        ({}, "site ffn_sum contrasts all tokens"),
    ):
        site = [] if more else ["--pos", "8", "--scale", "0.1"]
        with pytest.raises(UserError, match=f"--skip_unread_tokens: {reason}"):
            main(command(tmp_path / "run", *site, "--skip_unread_tokens", **more))
    assert not (tmp_path / "run").exists()


def test_a_run_resumes_on_the_same_texts_only(command: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Moments belong to rows: other texts would give them to other words."""
    state = training.checkpoint_state
    with monkeypatch.context() as patch:
        patch.setattr(training, "checkpoint_state", lambda *a: state(*a) | {"tokens": torch.tensor([0, 1])})
        patch.setattr(Run, "finish", lambda *a, **k: sys.exit(9))
        with pytest.raises(SystemExit):
            main(command(tmp_path / "run", "--max_train_steps", "1"))
    with pytest.raises(UserError, match="was started on texts with other words"):
        main(command(tmp_path / "run", "--max_train_steps", "1"))


def test_benchmark_takes_the_same_examples_every_way(
    backbones: dict[str, Path], glue_root: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from benchmarks import end_to_end

    common = ["--model_name_or_path", str(backbones["bert"]), *SMALL, "--pos", "7", "--scale", "0.1"]
    monkeypatch.setattr(end_to_end, "COMMON", common)
    monkeypatch.setattr(end_to_end, "BATCH", 4)
    seen: dict[int, list[torch.Tensor]] = {}
    train_batch = training.train_batch

    def watch(setup: training.TrainingSetup, batch: dict[str, torch.Tensor], number: int) -> torch.Tensor:
        seen.setdefault(id(setup), []).append(batch["input_ids"])
        return train_batch(setup, batch, number)

    monkeypatch.setattr(end_to_end, "train_batch", watch)
    rows, _ = end_to_end.glue_epoch(end_to_end.Config(data_root=str(glue_root), steps=3), tmp_path / "run")
    assert [row["way"] for row in rows][: len(end_to_end.WAYS)] == list(end_to_end.WAYS)
    assert rows[0]["times faster"] == 1 and all(row["examples a second"] > 0 for row in rows)
    memory = [row["weights, gradients, moments MB"] for row in rows]
    assert memory[0] == memory[1] > memory[2]
    texts = [sorted(str(ids[ids > 0].tolist()) for batch in batches[1:] for ids in batch) for batches in seen.values()]
    assert len(texts) == len(rows) and len(texts[0]) == 12 and all(text == texts[0] for text in texts)
    assert not (tmp_path / "run").exists()
