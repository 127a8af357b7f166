"""Cheap dropout: the distribution of the draws, the arithmetic around them, and models that differ in nothing else."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import BERT_glue as bg
from BERT_glue import dropout
from BERT_glue.config import parse
from BERT_glue.dropout import ATTENTION, CheapDropout, attend, cheap_dropout, dropout_factor, use_cheap_dropout
from BERT_glue.train import make_accelerator, prepare


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 64, (4, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0  # padding
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 1, 0])}


@pytest.mark.parametrize("p", [0.1, 0.6])
def test_draws_have_the_rate_and_are_independent(p: float) -> None:
    torch.manual_seed(0)
    n = 1_000_000
    factor = dropout_factor(torch.empty(n), p)
    share = 1 - round(p * 65536) / 65536
    assert abs(share - (1 - p)) <= 1 / 131072
    assert factor.unique().tolist() == pytest.approx([0, 1 / share])
    keep = (factor > 0).double()
    sigma = (share * (1 - share)) ** 0.5
    assert abs(keep.mean() - share) < 5 * sigma / n**0.5
    assert abs(factor.double().mean() - 1) < 5 * sigma / share / n**0.5  # unbiased
    centred = (keep - share) / sigma
    for lag in (1, 2, 3, 4, 5, 64):  # four elements share one draw of 64 bits
        assert abs((centred[lag:] * centred[:-lag]).mean()) < 5 / n**0.5
    for place in range(4):
        assert abs(keep[place::4].mean() - share) < 5 * sigma / (n / 4) ** 0.5


def test_every_level_of_the_bits_is_on_its_side_of_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the 65536 values once: the share is exact, at the lowest and the highest rate too."""
    bits = torch.arange(-32768, 32768).to(torch.int16)
    monkeypatch.setattr(Tensor, "random_", lambda self, low, high: self.copy_(bits.view(torch.int64)))
    for p in (1 / 65536, 0.1, 0.5, 65535 / 65536):
        factor = dropout_factor(torch.empty(65536, dtype=torch.float64), p)
        assert int((factor == 0).sum()) == round(p * 65536)
        assert factor.mean().item() == pytest.approx(1, abs=1e-12)


def test_gradient_is_the_factor_and_a_seed_repeats() -> None:
    x = torch.randn(3, 5, 7, requires_grad=True)  # a number of elements that four does not divide
    upstream = torch.randn(3, 5, 7)
    torch.manual_seed(3)
    y = cheap_dropout(x, 0.3)
    (y * upstream).sum().backward()
    torch.manual_seed(3)
    factor = dropout_factor(x, 0.3)
    assert torch.equal(y, x * factor) and torch.equal(x.grad, upstream * factor)
    assert not torch.equal(cheap_dropout(x, 0.3), y)
    assert cheap_dropout(x.bfloat16(), 0.3).dtype == torch.bfloat16


def test_identity_where_nothing_is_dropped() -> None:
    x = torch.randn(9)
    assert CheapDropout(0.4).eval()(x) is x and CheapDropout(0.0).train()(x) is x
    assert torch.equal(CheapDropout(1.0).train()(x), torch.zeros(9))
    assert CheapDropout(0.4).train()(x.to("meta")).device.type == "meta"  # not a CPU: PyTorch's own


@pytest.mark.parametrize("form", ["none", "padding", "nowhere", "float"])
def test_attention_is_sdpa_but_for_the_draws(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a factor of ones, values and gradients are sdpa's; a token may attend nowhere."""
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(2, 3, 5, 4, generator=generator, requires_grad=True) for _ in range(3)]
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[0, :, :, 3:] = False
    if form == "nowhere":
        mask[1, :, 2:] = False
    bias = {"none": None, "float": torch.zeros(mask.shape).masked_fill(~mask, -1e9)}.get(form, mask)
    layer = nn.Module()
    layer.is_causal = False
    monkeypatch.setattr(dropout, "dropout_factor", lambda x, p: torch.ones_like(x))
    rate = 0.0 if form == "float" else 0.5  # a float mask goes to sdpa, draws and all
    ours, weights = attend(layer, *qkv, bias, dropout=rate, scaling=0.7)
    theirs, _ = sdpa_attention_forward(layer, *qkv, bias, dropout=0.0, scaling=0.7)
    assert (weights is None) == (form == "float")  # sdpa has none
    torch.testing.assert_close(ours, theirs)
    if form == "nowhere":
        assert ours[1, 2:].abs().max() == 0
    upstream = torch.randn(ours.shape, generator=generator)
    for one, other in zip(
        torch.autograd.grad(ours, qkv, upstream), torch.autograd.grad(theirs, qkv, upstream), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_what_attention_leaves_to_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(dropout, "sdpa_attention_forward", lambda *a, **k: calls.append(k))
    layer = nn.Module()
    x, bias = torch.randn(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    layer.is_causal = False
    attend(layer, x, x, x, None, dropout=0.0, scaling=1.0)
    attend(layer, x, x, x, bias, dropout=0.5, scaling=1.0)
    attend(layer, x, x, x, None, dropout=0.5)
    attend(layer, x, x, x, None, dropout=0.5, scaling=1.0, is_causal=True)
    layer.is_causal = True  # a decoder's
    attend(layer, x, x, x, None, dropout=0.5, scaling=1.0)
    assert [call["dropout"] for call in calls] == [0.0, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["bert", "albert", "contranorm_bert", "contranorm_albert"])
def test_models_evaluate_as_before_and_save_as_vanilla(
    vanilla: Any, tmp_path: Path, name: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "classifier_dropout_prob": 0.1}
    model = vanilla(name.removeprefix("contranorm_"), attention, **rates)
    if name.startswith("contranorm_"):
        config = bg.with_contranorm(model.config, sites=["attention_sum"], scale=0.1)
        config._attn_implementation = attention
        built = bg.ContraNormBertForSequenceClassification if "_bert" in name else None
        built = built or bg.ContraNormAlbertForSequenceClassification
        weights, model = model.state_dict(), built(config).eval()
        model.load_state_dict(weights)
    cheap = copy.deepcopy(model)
    use_cheap_dropout(cheap)
    assert cheap.config._attn_implementation == (ATTENTION if attention == "sdpa" else "eager")
    kinds = {type(module) for module in cheap.modules() if isinstance(module, nn.Dropout)}
    assert kinds == {CheapDropout} and list(cheap.state_dict()) == list(model.state_dict())
    assert [str(m.p) for m in cheap.modules() if isinstance(m, nn.Dropout)] == [
        str(m.p) for m in model.modules() if isinstance(m, nn.Dropout)
    ]
    with torch.no_grad():
        assert torch.equal(cheap(**batch()).logits, model(**batch()).logits)

    factors = []
    draw = dropout_factor
    monkeypatch.setattr(dropout, "dropout_factor", lambda x, p: factors.append(tuple(x.shape)) or draw(x, p))
    cheap.train()
    logits = []
    for _ in range(2):
        torch.manual_seed(5)
        logits.append(cheap(**batch()).logits)
    assert torch.equal(*logits) and not torch.equal(logits[0], model(**batch()).logits)
    hidden, weights_ = factors.count((4, 7, 32)), factors.count((4, 4, 7, 7))
    # each of two passes: two layers, which in BERT drop out two times, and the embeddings, narrower in ALBERT
    assert hidden == (2 * 2 if "albert" in name else 2 * (2 * 2 + 1))
    assert weights_ == (2 * 2 if attention == "sdpa" else 0)
    assert factors.count((4, 32)) == 2  # before the classifier

    cheap.save_pretrained(tmp_path)
    assert ATTENTION not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(again) is type(model) and again.config._attn_implementation == "sdpa"
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**batch()).logits, model(**batch()).logits)


def test_training_has_the_distribution_of_pytorchs_dropout(vanilla: Any) -> None:
    """Mean and spread of a logit over many draws."""
    model = vanilla("bert", initializer_range=0.1, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2).train()
    cheap = copy.deepcopy(model)
    use_cheap_dropout(cheap)
    row = {name: value[:1].repeat(2000, *[1] * (value.dim() - 1)) for name, value in batch().items()}
    torch.manual_seed(0)
    with torch.no_grad():
        theirs, ours = model(**row).logits, cheap(**row).logits  # (2000, 2)
    error = theirs.std(0) / 2000**0.5
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 5 * 2**0.5 * error).all()
    assert ((ours.std(0) / theirs.std(0) - 1).abs() < 5 / 2000**0.5).all()


@pytest.mark.parametrize(
    ("flag", "gpu", "on"), [([], False, True), ([], True, False), (["--cheap_dropout"], True, True)]
)
def test_on_by_default_on_a_cpu(
    backbones: dict[str, Path], glue_root: Path, tmp_path: Path, monkeypatch: Any, flag: list[str], gpu: bool, on: bool
) -> None:
    fixed = ["--model_name_or_path", str(backbones["bert"]), "--task_name", "rte", "--data_root", str(glue_root)]
    config = parse([*fixed, "--output_dir", str(tmp_path / "run"), *flag])
    accelerator = make_accelerator(config)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
    model = prepare(config, accelerator).model
    assert (model.config._attn_implementation == ATTENTION) is on
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    off = prepare(parse([*fixed, "--output_dir", str(tmp_path / "run"), "--no_cheap_dropout"]), accelerator).model
    assert off.config._attn_implementation == "sdpa"
    assert not any(isinstance(module, CheapDropout) for module in off.modules())
