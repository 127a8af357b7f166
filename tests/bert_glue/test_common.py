"""What Hugging Face's common model tests ask of a model, asked of all our classes and of the vanilla class beside each.

`ModelTesterMixin` is not part of the installed package; the tests here are the like of it. Head pruning is left out:
transformers 5 has none.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import BERT_glue as bg
from tests.bert_glue.conftest import TINY

HEADS = "Model ForSequenceClassification ForMaskedLM ForTokenClassification ForQuestionAnswering ForMultipleChoice"
CLASSES = [f"Bert{head}" for head in [*HEADS.split(), "ForPreTraining", "ForNextSentencePrediction"]]
CLASSES += [f"Albert{head}" for head in [*HEADS.split(), "ForPreTraining"]]
SITES = {"sites": ["attention_sum", "ffn_norm"], "scale": 0.1}
every_class = pytest.mark.parametrize("name", CLASSES)


def vanilla_config(name: str, **changes: Any) -> transformers.PretrainedConfig:
    own = {"embedding_size": 16} if name.startswith("Albert") else {}
    config_class = transformers.AlbertConfig if own else transformers.BertConfig
    return config_class(**(TINY | own | changes))


def build(
    name: str, attention: str = "sdpa", sites: bool = True, implementation: str = "auto", **changes: Any
) -> tuple[PreTrainedModel, ...]:
    """The vanilla model and ours, of the same seed."""
    models = []
    for prefix, module in (("", transformers), ("ContraNorm", bg)):
        config = vanilla_config(name, **changes)
        if prefix:
            config = bg.with_contranorm(config, implementation=implementation, **(SITES if sites else {}))
        config._attn_implementation = attention
        torch.manual_seed(0)
        models.append(getattr(module, prefix + name)(config).eval())
    return tuple(models)


def batch(name: str, labels: bool = False) -> dict[str, Tensor]:
    """Three sentences of 9, 5 and 7 tokens; twice as many for multiple choice."""
    generator = torch.Generator().manual_seed(1)
    shape = (3, 2, 9) if "MultipleChoice" in name else (3, 9)
    ids = torch.randint(5, 60, shape, generator=generator)
    mask = torch.ones_like(ids)
    mask[1, ..., 5:] = mask[2, ..., 7:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": (torch.arange(9) > 3).long().expand_as(ids)}
    if not labels:
        return inputs
    one = torch.tensor([0, 1, 1])
    if name.endswith("QuestionAnswering"):
        return inputs | {"start_positions": one, "end_positions": one + 2}
    if name.endswith("PreTraining"):
        return inputs | {"labels": ids, ("next_sentence" if name[0] == "B" else "sentence_order") + "_label": one}
    return inputs | {"labels": ids if "MaskedLM" in name else ids % 2 if "Token" in name else one}


def tensors(output: Any) -> list[Tensor]:
    """All tensors of a model's output, in its order."""
    if isinstance(output, Tensor):
        return [output]
    return [tensor for value in output.to_tuple() if isinstance(value, Tensor) for tensor in [value]]


def largest_difference(one: Any, other: Any) -> float:
    pairs = list(zip(tensors(one), tensors(other), strict=True))
    assert pairs
    return max((a - b).abs().max().item() for a, b in pairs)


# -- building, saving, loading -----------------------------------------------------------------------------------------


@every_class
def test_initialization_is_the_vanilla_models(name: str) -> None:
    theirs, ours = build(name)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert theirs._no_split_modules <= ours._no_split_modules
    assert ours.all_tied_weights_keys == theirs.all_tied_weights_keys


@every_class
def test_without_sites_it_is_the_vanilla_model(name: str) -> None:
    theirs, ours = build(name, sites=False)
    inputs = batch(name, labels=name[-5:] != "Model")
    assert largest_difference(ours(**inputs), theirs(**inputs)) == 0
    _, ours = build(name)
    assert largest_difference(ours(**inputs), theirs(**inputs)) > 1e-3


@every_class
def test_save_and_load(name: str, tmp_path: Path) -> None:
    theirs, ours = build(name)
    ours.save_pretrained(tmp_path)
    _, has_head, task = name.partition("For")
    auto = getattr(transformers, f"AutoModelFor{task}" if has_head else "AutoModel")
    for kind in (type(ours), auto):
        loaded, info = kind.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is type(ours) and not any(info.values())
        assert bg.active_sites(loaded) == bg.active_sites(ours)
        pairs = zip(loaded.state_dict().values(), ours.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert largest_difference(loaded(**batch(name)), ours(**batch(name))) < 1e-6
    half = auto.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert tensors(half(**batch(name)))[0].dtype == torch.bfloat16
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(auto.from_config(config)) is type(ours)


@every_class
def test_a_vanilla_folder_is_refused_unless_sites_are_named(name: str, tmp_path: Path) -> None:
    theirs, ours = build(name)
    theirs.save_pretrained(tmp_path)
    kind = type(ours)
    with pytest.raises(ValueError, match=r"has no ContraNorm: say where .* or sites=\[\] for none"):
        kind.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match=f"{kind.__name__} needs a ContraNorm.*with_contranorm"):
        kind.from_pretrained(tmp_path, config=theirs.config)
    with pytest.raises(TypeError, match="needs a ContraNorm"):
        kind(theirs.config)
    with pytest.raises(Exception, match="sites without scale"):
        kind.from_pretrained(tmp_path, sites=["ffn_sum"])
    loaded, info = kind.from_pretrained(tmp_path, **SITES, output_loading_info=True)
    assert not any(info.values())
    assert largest_difference(loaded(**batch(name)), ours(**batch(name))) < 1e-6
    loaded = kind.from_pretrained(tmp_path, sites=[])
    assert largest_difference(loaded(**batch(name)), theirs(**batch(name))) < 1e-6
    loaded.save_pretrained(tmp_path / "again")
    assert kind.from_pretrained(tmp_path / "again").config.sites == []


@every_class
def test_copies_and_pickles(name: str) -> None:
    _, ours = build(name)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is type(ours)
        assert largest_difference(copied(**batch(name)), ours(**batch(name))) < 1e-6


@every_class
def test_forward_takes_what_the_vanilla_one_takes(name: str) -> None:
    theirs, ours = build(name)
    ours_, theirs_ = (list(inspect.signature(model.forward).parameters) for model in (ours, theirs))
    decoders = ("encoder_hidden_states", "encoder_attention_mask", "past_key_values", "use_cache")
    assert ours_ == (theirs_ if name[-5:] != "Model" else [each for each in theirs_ if each not in decoders])


@every_class
def test_embeddings_resize(name: str) -> None:
    theirs, ours = build(name)
    before = ours(**batch(name))
    for model in (theirs, ours):
        model.resize_token_embeddings(70)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (theirs, ours)]
    assert shapes[0] == shapes[1]
    assert ours.config.vocab_size == ours.get_input_embeddings().num_embeddings == 70
    after = ours(**batch(name))
    old = [a[..., :64] if a.shape[-1] == 70 else a for a in tensors(after)]
    assert all(torch.equal(a, b) for a, b in zip(old, tensors(before), strict=True))
    ours(**batch(name) | {"input_ids": torch.full_like(batch(name)["input_ids"], 69)})


@pytest.mark.parametrize("name", [name for name in CLASSES if name.endswith(("MaskedLM", "PreTraining"))])
def test_output_embeddings_are_tied_to_the_input(name: str, tmp_path: Path) -> None:
    theirs, ours = build(name)
    ours.save_pretrained(tmp_path)
    ours.resize_token_embeddings(70)
    for model in (theirs, ours, type(ours).from_pretrained(tmp_path)):
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    _, untied = build(name, tie_word_embeddings=False)
    assert untied.get_output_embeddings().weight is not untied.get_input_embeddings().weight


# -- outputs -----------------------------------------------------------------------------------------------------------


@every_class
def test_attentions_and_hidden_states(name: str) -> None:
    theirs, ours = build(name, "eager")
    inputs = batch(name) | {"output_attentions": True, "output_hidden_states": True}
    a, b = ours(**inputs), theirs(**inputs)
    for kind in ("attentions", "hidden_states"):
        assert [x.shape for x in a[kind]] == [x.shape for x in b[kind]]
    assert len(a.attentions) == 2 and len(a.hidden_states) == 3
    assert all(torch.allclose(x.sum(-1), torch.ones(())) for x in a.attentions)
    assert [torch.equal(x, y) for x, y in zip(a.hidden_states, b.hidden_states, strict=True)] == [True, False, False]
    ours.config.output_attentions = True
    assert len(ours(**batch(name)).attentions) == 2


@every_class
def test_gradients_reach_hidden_states_and_attentions(name: str) -> None:
    _, ours = build(name, "eager")
    output = ours(**batch(name), output_attentions=True, output_hidden_states=True)
    kept = [*output.hidden_states[:-1], output.attentions[0]]
    for tensor in kept:
        tensor.retain_grad()
    tensors(output)[0].sum().backward()
    assert all(tensor.grad.abs().max() > 0 for tensor in kept)


@every_class
def test_tuple_and_dictionary_say_the_same(name: str) -> None:
    theirs, ours = build(name)
    inputs = batch(name) | {"output_hidden_states": True}
    as_tuple, as_dict = ours(**inputs, return_dict=False), ours(**inputs)
    assert type(as_dict) is type(theirs(**inputs)) and len(as_tuple) == len(as_dict.to_tuple())
    assert torch.equal(as_tuple[0], as_dict[0])
    assert all(torch.equal(a, b) for a, b in zip(as_tuple[-1], as_dict.hidden_states, strict=True))


@every_class
def test_evaluation_is_deterministic(name: str) -> None:
    _, ours = build(name)
    assert largest_difference(ours(**batch(name)), ours(**batch(name))) == 0


@every_class
def test_rows_do_not_see_each_other(name: str) -> None:
    _, ours = build(name)
    inputs = batch(name)
    together = tensors(ours(**inputs))
    for row in range(3):
        for a, b in zip(tensors(ours(**{k: v[row : row + 1] for k, v in inputs.items()})), together, strict=True):
            torch.testing.assert_close(a, b[row : row + 1], atol=1e-5, rtol=1e-5)


@every_class
def test_sdpa_is_eager(name: str) -> None:
    (_, eager), (_, sdpa) = build(name, "eager"), build(name, "sdpa")
    assert sdpa.config._attn_implementation == "sdpa"
    assert largest_difference(sdpa(**batch(name)), eager(**batch(name))) < 1e-4
    sdpa.set_attn_implementation("eager")
    assert largest_difference(sdpa(**batch(name)), eager(**batch(name))) == 0


@every_class
def test_embeddings_may_be_given_in_place_of_tokens(name: str) -> None:
    theirs, ours = build(name)
    inputs = batch(name)
    ids = inputs.pop("input_ids")
    for model in (theirs, ours):
        given = model(**inputs, inputs_embeds=model.get_input_embeddings()(ids))
        assert largest_difference(given, model(**inputs, input_ids=ids)) == 0


@every_class
def test_feed_forward_in_chunks(name: str) -> None:
    sites = {"sites": ["attention_sum"], "scale": 0.1}
    kind, config = getattr(bg, f"ContraNorm{name}"), vanilla_config(name)
    models = []
    for size in (0, 3):
        torch.manual_seed(0)
        models.append(kind(bg.with_contranorm(config, **sites, chunk_size_feed_forward=size)).eval())
    assert largest_difference(*(model(**batch(name)) for model in models)) < 1e-4


# -- training ----------------------------------------------------------------------------------------------------------


def gradients(model: PreTrainedModel, name: str) -> dict[str, Tensor]:
    torch.manual_seed(3)  # the same dropout
    output = model.train()(**batch(name, labels=name[-5:] != "Model"))
    (output.loss if "loss" in output else tensors(output)[0].square().mean()).backward()
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@every_class
def test_training_reaches_the_same_parameters(name: str) -> None:
    theirs, ours = build(name)
    found = gradients(ours, name)
    assert list(found) == list(gradients(theirs, name))
    assert all(gradient.isfinite().all() for gradient in found.values())


@every_class
@pytest.mark.parametrize("how", ["config", "reentrant", "not reentrant"])
def test_gradient_checkpointing_changes_no_gradient(name: str, how: str) -> None:
    theirs, ours = build(name)
    assert ours.supports_gradient_checkpointing is theirs.supports_gradient_checkpointing
    if not theirs.supports_gradient_checkpointing:
        with pytest.raises(ValueError, match="does not support activation checkpointing"):
            ours.activation_checkpointing_enable()
        return
    expected = gradients(ours, name)
    if how == "config":
        _, again = build(name, gradient_checkpointing=True)
    else:
        _, again = build(name)
        again.activation_checkpointing_enable({"use_reentrant": how == "reentrant"})
    assert again.is_activation_checkpointing
    assert all(layer.gradient_checkpointing for layer in again.base_model.encoder.layer)
    found = gradients(again, name)
    assert list(found) == list(expected)
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key])


# -- export ------------------------------------------------------------------------------------------------------------


@every_class
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace(name: str) -> None:
    inputs = tuple(batch(name).values())
    for model in build(name, implementation="auto"):
        model.config.return_dict = False
        traced = torch.jit.trace(model, inputs)
        torch.testing.assert_close(traced(*inputs)[0], model(*inputs)[0])


# a class takes seconds: by default the bodies, and the heads that this project trains
EXPORTED = ("Model", "ForSequenceClassification")
every_class_in_time = pytest.mark.parametrize(
    "name", [name if name.endswith(EXPORTED) else pytest.param(name, marks=pytest.mark.slow) for name in CLASSES]
)


@every_class_in_time
def test_export_with_dynamic_shapes(name: str) -> None:
    inputs = batch(name)
    tokens = torch.export.Dim("tokens", max=64)
    shapes = {key: {0: torch.export.Dim("rows"), inputs[key].dim() - 1: tokens} for key in inputs}
    fewer = {key: value[:2, ..., :6] for key, value in inputs.items()}
    for model in build(name, implementation="auto"):
        exported = torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()
        for values in (inputs, fewer):
            assert largest_difference(exported(**values), model(**values)) < 1e-5


@every_class_in_time
def test_compile_without_a_break(name: str) -> None:
    for model in build(name, implementation="auto"):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert largest_difference(compiled(**batch(name)), model(**batch(name))) < 1e-5


def test_symbolic_trace_fails_for_vanilla_too() -> None:
    """Should transformers' models learn it, ours must as well."""
    for model in build("BertModel"):
        with pytest.raises((ValueError, TypeError), match=r"co_varnames is too small|Proxy|symbolically traced"):
            torch.fx.symbolic_trace(model)
