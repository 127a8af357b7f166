"""Rivals of ContraNorm inside BERT's and ALBERT's attention: vanilla at their vanilla setting, and padding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForSequenceClassification, PreTrainedModel

import BERT_glue as bg
from BERT_glue.attention import PARAMETERS
from BERT_glue.config import Config, parse
from BERT_glue.dropout import use_cheap_dropout
from BERT_glue.main import main
from BERT_glue.models import describe
from repro.errors import UserError, run_main

from .test_models import ARCHITECTURES, CLASSIFIERS, batch

# Variant → the arguments at which it is vanilla while its parameters are 0.
VANILLA: dict[str, dict[str, Any]] = {
    "attn_scale": {},
    "gfsa": {},
    "neutreno": {"neutreno_lambda": 0.0},
    "resformer": {"resformer_share": 0.0},
}
every_variant = pytest.mark.parametrize("variant", VANILLA)
both = pytest.mark.parametrize("architecture", ARCHITECTURES)


def with_variant(vanilla: PreTrainedModel, variant: str, by: float = 0.0, **settings: Any) -> PreTrainedModel:
    """The variant with the vanilla model's weights; its own parameters are moved `by` so much from 0."""
    config = bg.with_contranorm(vanilla.config, **({"sites": []} | settings), variant=variant)
    config._attn_implementation = vanilla.config._attn_implementation
    torch.manual_seed(0)
    model = CLASSIFIERS[vanilla.config.model_type](config)
    odd = model.load_state_dict(vanilla.state_dict(), strict=False)
    assert odd.unexpected_keys == []
    name = PARAMETERS.get(variant)
    layers = vanilla.config.num_hidden_layers if vanilla.config.model_type == "bert" else 1  # ALBERT shares one
    assert len(odd.missing_keys) == (layers if name else 0)
    assert all(key.endswith(f".{name}") for key in odd.missing_keys)
    with torch.no_grad():
        for key in odd.missing_keys:
            model.get_parameter(key).add_(by)
    return model.eval()


# -- vanilla -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["sdpa", "eager", "cheap"])
@every_variant
@both
def test_at_the_vanilla_setting_logits_and_gradients_are_vanilla_bit_for_bit(
    vanilla: Any, architecture: str, variant: str, backend: str
) -> None:
    """Dropout included, but for GFSA under sdpa: it then forms A, to multiply the same one twice."""
    p = 0.0 if (variant, backend) == ("gfsa", "sdpa") else 0.2
    dropout = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": p}
    theirs = vanilla(architecture, "eager" if backend == "eager" else "sdpa", **dropout)
    ours = with_variant(theirs, variant, **VANILLA[variant])
    assert torch.equal(ours(**batch()).logits, theirs(**batch()).logits)
    gradients = []
    for model in (ours, theirs):
        if backend == "cheap":
            use_cheap_dropout(model)
        torch.manual_seed(7)
        loss = model.train()(**batch(), labels=torch.tensor([0, 1, 1])).loss
        loss.backward()
        named = {name: p.grad for name, p in model.named_parameters() if not name.endswith((".lamb", ".w_k"))}
        gradients.append([loss.detach(), *named.values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@every_variant
@both
def test_away_from_it_they_are_not(vanilla: Any, architecture: str, variant: str) -> None:
    theirs = vanilla(architecture)
    ours = with_variant(theirs, variant, by=0.3)
    assert (ours(**batch()).logits - theirs(**batch()).logits).abs().max() > 1e-3


# -- padding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@every_variant
@both
def test_padding_never_moves_a_logit(vanilla: Any, architecture: str, variant: str, attention: str) -> None:
    ours = with_variant(vanilla(architecture, attention), variant, by=0.3).double()
    alone = ours(**{k: v[1:2, :5] for k, v in batch().items()}).logits
    unmasked = ours(**{k: v[1:2, :5] for k, v in batch().items() if k != "attention_mask"}).logits
    for other in (unmasked, ours(**batch()).logits[1:2], ours(**batch(width=40)).logits[1:2]):
        assert (other - alone).abs().max() < 1e-6
    inputs = batch()
    inputs["input_ids"][1, 5:] = 7  # other words where there is padding
    assert (ours(**inputs).logits[1] - alone[0]).abs().max() < 1e-6


def test_a_mask_with_other_axes_is_refused(vanilla: Any) -> None:
    inputs = batch() | {"attention_mask": torch.ones(3, 1, 9, 9, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"needs the \(B, N\) attention mask"):
        with_variant(vanilla("bert"), "attn_scale")(**inputs)


# -- dropout and GFSA --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["sdpa", "eager", "cheap"])
def test_gfsa_multiplies_one_dropped_a_twice(vanilla: Any, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With w_K = 1, K = 2 and values of ones, A' v = A A 1: rows of the dropped A tell the products apart."""
    theirs = vanilla("bert", "eager" if backend == "eager" else "sdpa", attention_probs_dropout_prob=0.5)
    ours = with_variant(theirs, "gfsa", gfsa_order=2)
    if backend == "cheap":
        use_cheap_dropout(ours)
    from contranorm import attention as forms

    seen: list[torch.Tensor] = []

    def twice(q: Any, k: Any, v: Any, w_k: Any, mask: Any, *, attend: Any, **others: Any) -> torch.Tensor:
        a = attend(q, k, mask)
        ones = torch.ones_like(v)
        seen.extend([a(ones), a(ones)])
        return a(v)

    monkeypatch.setattr(forms, "gfsa", twice)
    ours.train()(**batch())
    assert len(seen) == 4  # two layers
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3])
    assert seen[0].std() > 0.1  # dropout is on


# -- the first layer's values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["neutreno", "resformer"])
@both
def test_gradient_checkpointing_is_refused_where_values_travel(vanilla: Any, architecture: str, variant: str) -> None:
    ours = with_variant(vanilla(architecture), variant)
    with pytest.raises(ValueError, match="does not support activation checkpointing"):
        ours.activation_checkpointing_enable()
    with pytest.raises(StrictDataclassError, match="takes the first layer's values along"):
        bg.with_contranorm(vanilla(architecture).config, sites=[], variant=variant, gradient_checkpointing=True)


def test_other_variants_take_gradient_checkpointing(vanilla: Any) -> None:
    losses = []
    for on in (False, True):
        ours = with_variant(vanilla("bert"), "gfsa", by=0.3).train()
        if on:
            ours.activation_checkpointing_enable()
        torch.manual_seed(3)
        loss = ours(**batch(), labels=torch.tensor([0, 1, 1])).loss
        loss.backward()
        losses.append([loss.detach(), *(p.grad for p in ours.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))


# -- Hugging Face contracts --------------------------------------------------------------------------------------------


@every_variant
@both
def test_save_and_load(vanilla: Any, architecture: str, variant: str, tmp_path: Path) -> None:
    settings = {"sites": ["attention_sum"], "scale": 0.1, **VANILLA[variant]}
    ours = with_variant(vanilla(architecture), variant, by=0.3, **settings)
    ours.save_pretrained(tmp_path)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(ours) and not any(info.values())
    assert loaded.config.variant == variant and loaded.config.variant_arguments() == ours.config.variant_arguments()
    assert (loaded(**batch()).logits - ours(**batch()).logits).abs().max() < 1e-6
    assert "in every layer" in describe(ours) and "attention_sum" in describe(ours)
    ours.config.scaled_identity = True
    assert "ContraNorm s·x - s·A·x" in describe(ours)


def test_attention_maps_are_softmaxes(vanilla: Any) -> None:
    ours = with_variant(vanilla("bert", "eager"), "gfsa", by=0.3)
    maps = ours(**batch(), output_attentions=True).attentions
    assert len(maps) == 2
    torch.testing.assert_close(maps[0].sum(-1), torch.ones_like(maps[0][..., 0]))


def test_unknown_variants_are_refused(vanilla: Any) -> None:
    with pytest.raises(StrictDataclassError, match="unknown variant 'feat_scale'; the variants are attn_scale, gfsa"):
        bg.with_contranorm(vanilla("bert").config, sites=[], variant="feat_scale")


# -- the command line --------------------------------------------------------------------------------------------------

WHERE = ["--model_name_or_path=bert-base-uncased", "--task_name=rte", "--output_dir=x"]


def settings(*flags: str) -> Config:
    return parse([*WHERE, *flags])


def test_labels_and_footnotes() -> None:
    label = settings("--variant=gfsa", "--gfsa_order=10", "--gfsa_w0=0.05").label()
    assert (label.method, label.order, label.scale) == ("GFSA K=10 w0=0.05", (2, 4), None)
    assert "K in 2..10" in label.note and label.note.endswith("here order 10, w0 0.05")
    label = settings("--variant=neutreno", "--pos=7", "--scale=0.1").label()
    assert (label.method, label.scale) == ("ContraNorm s=0.1 + NeuTRENO", 0.1)
    assert settings("--variant=none", "--pos=0").label().method == "vanilla"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--variant gfas", "did you mean gfsa"),
        ("--variant feat_scale", "choose one of none, attn_scale, gfsa, neutreno, resformer"),
        ("--variant attn_scale --gfsa_order 4", "--gfsa_order belongs to --variant gfsa, not attn_scale"),
        ("--neutreno_lambda 0.4", "--neutreno_lambda belongs to --variant neutreno, not none"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    flags: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        run_main(lambda: main([*WHERE[:2], f"--output_dir={tmp_path / 'a'}", *flags.split()]))
    assert left.value.code == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said in told
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("variant", VANILLA)
def test_ten_steps_at_the_vanilla_setting_are_vanillas(
    variant: str, backbone_writer: Any, glue_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the whole program, with dropout; the variant's own parameter is held where it starts."""
    from BERT_glue import train

    real = train.parameter_groups

    def without_new(model: PreTrainedModel, weight_decay: float) -> list[dict[str, Any]]:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.endswith((".lamb", ".w_k")))
        return real(model, weight_decay)

    monkeypatch.setattr(train, "parameter_groups", without_new)
    folder = backbone_writer(tmp_path / "bert", "bert")
    flags = [f"--model_name_or_path={folder}", "--task_name=rte", f"--data_root={glue_root}", "--num_train_epochs=5"]
    flags += ["--per_device_train_batch_size=11", "--learning_rate=1e-3"]
    vanilla = [f"--{name}={value}" for name, value in VANILLA[variant].items()]
    for name, more in (("plain", ["--pos=0"]), ("variant", [f"--variant={variant}", *vanilla])):
        main([*flags, *more, "--save_model", f"--output_dir={tmp_path / name}"])
    plain, ours = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("plain", "variant")
    )
    assert plain[-1]["step"] == 10
    assert [(line["loss"], line["score"]) for line in plain] == [(line["loss"], line["score"]) for line in ours]
    record = json.loads((tmp_path / "variant" / "record.json").read_text())
    assert record["sites"] == {} and record["multiply_adds"] > 0
    if variant == "gfsa":
        with pytest.raises(UserError, match="was trained with --variant gfsa: add it"):
            main([*flags, "--pos=0", f"--model_name_or_path={tmp_path / 'variant' / 'model'}",
                  f"--output_dir={tmp_path / 'b'}"])  # fmt: skip
