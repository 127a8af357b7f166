"""The two backbones against transformers' own, and against twins built from hooks on them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AlbertForMaskedLM,
    AlbertForTokenClassification,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForMaskedLM,
    BertForTokenClassification,
    PreTrainedModel,
)

import BERT_glue as bg
from BERT_glue.sites import DIGITS, FEED_FORWARD_SITES, SITES

ARCHITECTURES = ("bert", "albert")
CLASSIFIERS = {
    "bert": bg.ContraNormBertForSequenceClassification,
    "albert": bg.ContraNormAlbertForSequenceClassification,
}


def with_sites(vanilla: PreTrainedModel, **settings: Any) -> PreTrainedModel:
    """The ContraNorm model with the vanilla model's weights."""
    config = bg.with_contranorm(vanilla.config, **settings)
    config._attn_implementation = vanilla.config._attn_implementation
    model = CLASSIFIERS[vanilla.config.model_type](config)
    model.load_state_dict(vanilla.state_dict())  # strict: the keys are the same
    return model.eval()


def batch(lengths: tuple[int, ...] = (9, 5, 2), width: int | None = None) -> dict[str, Tensor]:
    """Sentences of the given lengths, padded to `width` with tokens that are not zero, so that leaks show."""
    width = width or max(lengths)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 60, (len(lengths), 64), generator=generator)[:, :width].clone()
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, length:] = 61
        mask[row, :length] = 1
    types = (torch.arange(width) > 3).long().expand_as(ids).clone()
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


# -- an independent ContraNorm, sentence by sentence, and the places in the vanilla model where each site lies --------


def slow_contranorm(x: Tensor, mask: Tensor, *, s: float, tau: float, identity: bool, axis: str) -> Tensor:
    """The equations of the method, one sentence at a time, over its real tokens only."""
    rows = []
    for sentence, keep in zip(x, mask.bool(), strict=True):
        h = sentence[keep]
        unit = h / h.pow(2).sum(1, keepdim=True).sqrt()
        if axis == "tokens":
            weights = torch.exp(unit @ unit.T / tau)
            contrast = (weights / weights.sum(1, keepdim=True)) @ h
        else:
            weights = torch.exp(unit.T @ unit / tau)
            contrast = h @ (weights / weights.sum(1, keepdim=True))
        out = sentence.clone()
        out[keep] = (1 + s if identity else 1) * h - s * contrast
        rows.append(out)
    return torch.stack(rows)


def places(model: PreTrainedModel) -> list[dict[str, tuple[nn.Module, str]]]:
    """Per layer: site → the vanilla module whose first input ("pre") or output ("post") is the normalized value."""
    if model.config.model_type == "bert":
        return [
            {
                "layer_input": (layer, "pre"),
                "attention_context": (layer.attention.output.dense, "pre"),
                "attention_output": (layer.attention.output.dropout, "post"),
                "attention_sum": (layer.attention.output.LayerNorm, "pre"),
                "attention_norm": (layer.attention.output.LayerNorm, "post"),
                "ffn_output": (layer.output.dropout, "post"),
                "ffn_sum": (layer.output.LayerNorm, "pre"),
                "ffn_norm": (layer.output.LayerNorm, "post"),
            }
            for layer in model.bert.encoder.layer
        ]
    return [
        {
            "layer_input": (layer, "pre"),
            "attention_context": (layer.attention.dense, "pre"),
            "attention_output": (layer.attention.output_dropout, "post"),
            "attention_sum": (layer.attention.LayerNorm, "pre"),
            "attention_norm": (layer.attention.LayerNorm, "post"),
            "ffn_output": (layer.ffn_output, "post"),
            "ffn_sum": (layer.full_layer_layer_norm, "pre"),
            "ffn_norm": (layer.full_layer_layer_norm, "post"),
        }
        for group in model.albert.encoder.albert_layer_groups
        for layer in group.albert_layers
    ]


def hook_twin(vanilla: PreTrainedModel, sites: list[str], step: Callable[[Tensor], Tensor]) -> None:
    """Turn the vanilla model into the twin: `step` is applied at the sites, from outside."""
    for layer in places(vanilla):
        for site in sites:
            module, when = layer[site]
            if when == "pre":
                module.register_forward_pre_hook(lambda _, args: (step(args[0]), *args[1:]))
            else:
                module.register_forward_hook(lambda _, args, output: step(output))


# -- parity ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_sites_logits_are_vanilla_bit_for_bit(vanilla: Any, architecture: str, attention: str) -> None:
    dropout = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    theirs = vanilla(architecture, attention, **dropout)
    ours = with_sites(theirs)
    inputs = batch()
    assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)
    gradients = []
    for model in (ours, theirs):
        torch.manual_seed(7)
        loss = model.train()(**inputs, labels=torch.tensor([0, 1, 1])).loss
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_state_dict_keys_are_vanilla(vanilla: Any, architecture: str) -> None:
    theirs = vanilla(architecture)
    ours = with_sites(theirs, sites=list(SITES), scale=0.1)
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("axis", ["tokens", "features"])
@pytest.mark.parametrize("site", [*SITES, "all"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_site_equals_a_twin_made_of_hooks(vanilla: Any, architecture: str, site: str, axis: str) -> None:
    sites = list(SITES) if site == "all" else [site]
    plain, twin = vanilla(architecture), vanilla(architecture)
    identity = architecture == "bert"  # the defaults of the two configurations
    ours = with_sites(plain, sites=sites, scale=0.3, tau=0.7, axis=axis)
    assert ours.config.identity == identity
    inputs = batch()
    mask = inputs["attention_mask"]
    hook_twin(twin, sites, lambda x: slow_contranorm(x, mask, s=0.3, tau=0.7, identity=identity, axis=axis))
    logits = ours(**inputs).logits
    torch.testing.assert_close(logits, twin(**inputs).logits, atol=2e-5, rtol=2e-5)
    # the value after the last LayerNorm is read at [CLS]; every site must reach it
    assert not torch.allclose(logits, plain(**inputs).logits, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_equals_the_twin_too(vanilla: Any, architecture: str) -> None:
    plain, twin = vanilla(architecture), vanilla(architecture)
    ours = with_sites(plain, sites=["attention_sum"], scale=0.3, identity=False).train()
    inputs = batch() | {"labels": torch.tensor([1, 0, 1])}
    mask = inputs["attention_mask"]
    hook_twin(
        twin.train(),
        ["attention_sum"],
        lambda x: slow_contranorm(x, mask, s=0.3, tau=1.0, identity=False, axis="tokens"),
    )
    for model in (ours, twin):
        torch.manual_seed(3)  # the same dropout
        model(**inputs).loss.backward()
    for (name, a), b in zip(ours.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


# -- padding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_changes_nothing_unless_asked_to(vanilla: Any, architecture: str, site: str, attention: str) -> None:
    theirs = vanilla(architecture, attention)
    ours = with_sites(theirs, sites=[site], scale=0.5)
    alone = ours(**{k: v[1:2, :5] for k, v in batch().items()}).logits  # no padding: the backend's mask may be None
    unmasked = ours(input_ids=batch()["input_ids"][1:2, :5], token_type_ids=batch()["token_type_ids"][1:2, :5]).logits
    with_longer = ours(**batch()).logits[1:2]
    padded_further = ours(**batch(width=20)).logits[1:2]
    for other in (unmasked, with_longer, padded_further):
        assert (other - alone).abs().max() < 1e-5

    reference = with_sites(theirs, sites=[site], scale=0.5, include_padding=True)
    alone = reference(**{k: v[1:2, :5] for k, v in batch().items()}).logits
    assert (reference(**batch(width=20)).logits[1:2] - alone).abs().max() > 1e-4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_axis_ignores_padding_too(vanilla: Any, architecture: str) -> None:
    ours = with_sites(vanilla(architecture), sites=["attention_sum"], scale=0.5, axis="features")
    alone = ours(**{k: v[1:2, :5] for k, v in batch().items()}).logits
    assert (ours(**batch(width=20)).logits[1:2] - alone).abs().max() < 1e-5


def test_a_mask_with_other_axes_is_refused(vanilla: Any) -> None:
    ours = with_sites(vanilla("bert"), sites=["attention_sum"], scale=0.5)
    inputs = batch()
    inputs["attention_mask"] = torch.ones(3, 1, 9, 9, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"needs the \(B, N\) attention mask"):
        ours(**inputs)


# -- Hugging Face contracts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_save_and_load_by_auto_classes(vanilla: Any, architecture: str, tmp_path: Any) -> None:
    ours = with_sites(vanilla(architecture), sites=["ffn_sum", "attention_sum"], scale=0.2, tau=2, axis="features")
    ours.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is type(ours)
    assert loaded.config.sites == ["ffn_sum", "attention_sum"]
    assert bg.active_sites(loaded) == bg.active_sites(ours)
    assert torch.equal(loaded(**batch()).logits, ours(**batch()).logits)
    for auto in (AutoModel, AutoModelForMaskedLM, AutoModelForTokenClassification):
        assert bg.active_sites(auto.from_pretrained(tmp_path))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_vanilla_checkpoint_loads_with_nothing_missing(vanilla: Any, architecture: str, tmp_path: Any) -> None:
    theirs = vanilla(architecture)
    theirs.save_pretrained(tmp_path)
    config = bg.with_contranorm(theirs.config, sites=["attention_sum"], scale=0.2)
    ours, info = CLASSIFIERS[architecture].from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("theirs_class", "ours_class"),
    [
        (BertForMaskedLM, bg.ContraNormBertForMaskedLM),
        (BertForTokenClassification, bg.ContraNormBertForTokenClassification),
        (AlbertForMaskedLM, bg.ContraNormAlbertForMaskedLM),
        (AlbertForTokenClassification, bg.ContraNormAlbertForTokenClassification),
    ],
)
def test_other_heads_are_vanilla_without_sites(vanilla: Any, theirs_class: Any, ours_class: Any) -> None:
    architecture = "albert" if "Albert" in theirs_class.__name__ else "bert"
    theirs = theirs_class(vanilla(architecture).config).eval()
    ours = ours_class(bg.with_contranorm(theirs.config)).eval()
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(**batch()).logits, theirs(**batch()).logits)
    active = ours_class(bg.with_contranorm(theirs.config, sites=["attention_norm"], scale=0.3)).eval()
    active.load_state_dict(theirs.state_dict())
    assert not torch.allclose(active(**batch()).logits, theirs(**batch()).logits, atol=1e-4)
    if "MaskedLM" in ours_class.__name__:
        assert active.get_output_embeddings().weight is active.get_input_embeddings().weight


def test_gradient_checkpointing_changes_no_gradient(vanilla: Any) -> None:
    ours = with_sites(vanilla("bert"), sites=["attention_sum", "ffn_norm"], scale=0.3).train()
    inputs = batch() | {"labels": torch.tensor([1, 0, 1])}
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            ours.activation_checkpointing_enable()
        ours.zero_grad()
        torch.manual_seed(3)
        ours(**inputs).loss.backward()
        gradients.append([p.grad.clone() for p in ours.parameters()])
    assert ours.is_activation_checkpointing
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_albert_has_no_gradient_checkpointing_like_its_parent(vanilla: Any) -> None:
    theirs = vanilla("albert")
    assert not theirs.supports_gradient_checkpointing
    with pytest.raises(ValueError, match="does not support activation checkpointing"):
        with_sites(theirs).activation_checkpointing_enable()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hidden_states_and_attentions_are_captured(vanilla: Any, architecture: str) -> None:
    theirs = vanilla(architecture, "eager")
    for settings in ({}, {"sites": ["attention_sum"], "scale": 0.3}):
        ours = with_sites(theirs, **settings)
        a = ours(**batch(), output_hidden_states=True, output_attentions=True)
        b = theirs(**batch(), output_hidden_states=True, output_attentions=True)
        assert [tuple(x.shape) for x in a.hidden_states] == [tuple(x.shape) for x in b.hidden_states]
        assert [tuple(x.shape) for x in a.attentions] == [tuple(x.shape) for x in b.attentions]
        pairs = [*zip(a.hidden_states, b.hidden_states, strict=True), *zip(a.attentions, b.attentions, strict=True)]
        same = [torch.equal(x, y) for x, y in pairs]
        assert all(same) if not settings else same[0] and not all(same)
    as_tuple = ours(**batch(), return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], a.logits)


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_learnable_step_starts_at_the_scale_and_is_saved(
    vanilla: Any, architecture: str, positive: bool, tmp_path: Any
) -> None:
    theirs = vanilla(architecture)
    theirs.save_pretrained(tmp_path / "vanilla")
    settings = {"sites": ["attention_sum"], "scale": 0.3}
    config = bg.with_contranorm(theirs.config, **settings, learnable=True, positive=positive)
    ours, info = CLASSIFIERS[architecture].from_pretrained(
        tmp_path / "vanilla", config=config, output_loading_info=True
    )
    assert info["missing_keys"] and all(key.endswith("sites.attention_sum.step") for key in info["missing_keys"])
    torch.testing.assert_close(ours(**batch()).logits, with_sites(theirs, **settings)(**batch()).logits)
    steps = [p for name, p in ours.named_parameters() if name.endswith(".step")]
    ours(**batch()).logits.sum().backward()
    assert all(p.shape == (32,) and p.grad.abs().max() > 0 for p in steps)
    with torch.no_grad():
        steps[0].mul_(1.5)
    ours.save_pretrained(tmp_path / "ours")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    assert torch.equal(loaded(**batch()).logits, ours(**batch()).logits)


def test_a_configuration_saved_before_there_were_more_switches_loads(vanilla: Any, tmp_path: Any) -> None:
    ours = with_sites(vanilla("albert"), sites=["ffn_sum"], scale=0.2)
    ours.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    new = ("symmetric", "pre_norm", "learnable", "positive", "implementation", "degree")
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in new}))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.switches() == ours.config.switches() and loaded.config.identity is False
    assert torch.equal(loaded(**batch()).logits, ours(**batch()).logits)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config_class", [bg.ContraNormBertConfig, bg.ContraNormAlbertConfig])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sites": ["attention"], "scale": 0.1}, "unknown site 'attention'"),
        ({"sites": ["ffn_sum", "ffn_sum"], "scale": 0.1}, "twice"),
        ({"sites": ["ffn_sum"]}, "scale"),
        ({"sites": "ffn_sum", "scale": 0.1}, "sites"),
        ({"scale": "0.1"}, "scale"),
        ({"tau": 0.0}, "tau must be > 0"),
        ({"axis": "rows"}, r"'axis' expected one of \('tokens', 'features'\), got rows"),
        ({"symmetric": 1}, "symmetric"),
        ({"positive": True, "scale": 0.1}, "positive needs learnable"),
        ({"include_padding": "yes"}, "include_padding"),
    ],
)
def test_settings_are_strict(config_class: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        config_class(**settings)
    assert type(caught.value).__name__.startswith("StrictDataclass")


@pytest.mark.parametrize("site", FEED_FORWARD_SITES)
def test_feed_forward_chunks_are_refused_with_a_feed_forward_site(vanilla: Any, site: str) -> None:
    theirs = vanilla("bert", chunk_size_feed_forward=3)
    with pytest.raises(Exception, match="chunk_size_feed_forward=0"):
        bg.with_contranorm(theirs.config, sites=[site], scale=0.1)
    ours = with_sites(theirs)  # without one they work as in the parent
    assert torch.equal(ours(**batch()).logits, theirs(**batch()).logits)


def test_decoders_and_other_architectures_are_refused(vanilla: Any) -> None:
    from transformers import RobertaConfig

    with pytest.raises(Exception, match="decoder"):
        bg.with_contranorm(vanilla("bert").config, is_decoder=True)
    with pytest.raises(ValueError, match="not into model type 'roberta'"):
        bg.with_contranorm(RobertaConfig())


def test_every_digit_names_every_site_once() -> None:
    for digits in DIGITS.values():
        assert sorted(digits) == list(range(1, 9))
        assert sorted(digits.values()) == sorted(SITES)
    assert DIGITS["bert"][7] == "attention_sum" and DIGITS["albert"][4] == "attention_sum"


def test_sites_are_read_off_the_model_not_off_its_configuration(vanilla: Any) -> None:
    ours = with_sites(vanilla("bert"), sites=["attention_sum"], scale=0.3)
    assert bg.active_sites(ours) == {f"bert.encoder.layer.{i}": ["attention_sum"] for i in range(2)}
    del ours.bert.encoder.layer[1].sites["attention_sum"]
    assert bg.active_sites(ours) == {"bert.encoder.layer.0": ["attention_sum"]}
    assert math.isclose(ours.config.scale, 0.3)
