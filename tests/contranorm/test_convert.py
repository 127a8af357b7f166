"""ContraNorm in other people's models: what is replaced, what is refused, and the padding mask on its way."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from contranorm import ContraNorm, contra_norm
from contranorm.convert import real_tokens, replace_layer_norms, revert

SIZE = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50)
TEXT = {
    "bert": SIZE,
    "roberta": SIZE,
    "albert": SIZE | dict(embedding_size=16),
    "modernbert": SIZE | dict.fromkeys(["pad_token_id", "cls_token_id", "sep_token_id"], 0),
    "distilbert": dict(dim=16, n_layers=2, n_heads=2, hidden_dim=32, vocab_size=50),
}
IMAGE = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32)
TIMM = dict(img_size=32, patch_size=8, depth=2, embed_dim=32, num_heads=2)


def text_model(kind: str, auto=AutoModel) -> nn.Module:
    torch.manual_seed(0)
    return auto.from_config(AutoConfig.for_model(kind, **TEXT[kind])).double().eval()


def image_model(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    if name in ("vit", "dinov2"):
        return AutoModel.from_config(AutoConfig.for_model(name, **IMAGE, patch_size=8)).double().eval()
    return timm.create_model(name, **(TIMM | kwargs)).double().eval()


def output(result) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result[0]


IDS = torch.randint(5, 50, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(7) < torch.tensor([[7], [4]])).long()


@pytest.mark.parametrize("kind", TEXT)
def test_text_models(kind):
    vanilla = text_model(kind)
    model = copy.deepcopy(vanilla)
    names = replace_layer_norms(model, 0.5, verbose=False)
    assert names and all(isinstance(model.get_submodule(name), ContraNorm) for name in names)
    assert list(model.state_dict()) == list(vanilla.state_dict())
    model.load_state_dict(vanilla.state_dict(), strict=True)
    with torch.no_grad():
        padded = output(model(IDS, attention_mask=MASK))
        alone = output(model(IDS[1:, :4]))
        plain = output(vanilla(IDS, attention_mask=MASK))
        torch.testing.assert_close(padded[1, :4], alone[0], rtol=0, atol=1e-6)
        assert (padded - plain).abs().max() > 0.01
        assert revert(model) == names
        assert torch.equal(output(model(IDS, attention_mask=MASK)), plain)
    assert repr(model) == repr(vanilla) and not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    "name", ["vit", "dinov2", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224"]
)
def test_image_models(name):
    vanilla = image_model(name)
    model = copy.deepcopy(vanilla)
    names = replace_layer_norms(model, 0.5, verbose=False)
    assert list(model.state_dict()) == list(vanilla.state_dict())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        both, plain = output(model(x)), output(vanilla(x))
        torch.testing.assert_close(output(model(x[1:]))[0], both[1], rtol=0, atol=1e-6)
        assert (both - plain).abs().max() > 1e-3
        assert revert(model) == names and torch.equal(output(model(x)), plain)


def test_each_norm_becomes_the_step_and_the_norm():
    model = nn.Sequential(nn.LayerNorm(8, eps=1e-3)).double()
    nn.init.normal_(model[0].weight)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    want = model(contra_norm(x, 0.3, tau=0.5))
    replace_layer_norms(model, 0.3, "0", tau=0.5, verbose=False)
    torch.testing.assert_close(model(x), want)


def test_names_are_patterns_and_the_report_says_what_happened(capsys):
    model = image_model("vit_tiny_patch16_224", qk_norm=True, global_pool="avg")
    assert replace_layer_norms(model, 0.1, ["blocks.*.norm1", "blocks.1.norm2"]) == [
        "blocks.0.norm1",
        "blocks.1.norm1",
        "blocks.1.norm2",
    ]
    assert "in place of 3 LayerNorms: blocks.0.norm1" in capsys.readouterr().out
    revert(model)
    replace_layer_norms(model, 0.1)
    report = capsys.readouterr().out
    assert "k_norm (it sees the queries or keys of each head" in report
    assert "fc_norm (it sees pooled vectors" in report


def test_a_pattern_may_leave_norms_out():
    model = text_model("bert")
    every = replace_layer_norms(model, 0.5, verbose=False)
    revert(model)
    rest = replace_layer_norms(model, 0.5, "!embeddings.*", verbose=False)
    assert set(every) - set(rest) == {"embeddings.LayerNorm"}
    revert(model)
    only = replace_layer_norms(model, 0.5, ["encoder.layer.*.output.*", "!*.1.*", "!*.attention.*"], verbose=False)
    assert only == ["encoder.layer.0.output.LayerNorm"]
    revert(model)
    with pytest.raises(ValueError, match="no LayerNorm is named 'head'"):
        replace_layer_norms(model, 0.5, "!head")


def test_parameters_stay_the_same_tensors_and_a_learnable_step_comes_and_goes():
    model = text_model("bert")
    before = dict(model.named_parameters())
    names = replace_layer_norms(model, 0.1, learnable=True, verbose=False)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert set(after) - set(before) == {f"{name}.step" for name in names}
    model.to(torch.float32)
    revert(model)
    assert model.embeddings.LayerNorm.weight.dtype == torch.float32
    assert list(model.state_dict()) == list(before)


def test_norms_may_be_replaced_in_several_calls():
    model = text_model("bert")
    want = output(model(IDS, attention_mask=MASK))
    first = replace_layer_norms(model.encoder, 0.5, "*attention*", verbose=False)
    second = replace_layer_norms(model, 0.1, "encoder.layer.?.output.LayerNorm", verbose=False)
    assert {model.encoder.get_submodule(name).scale for name in first} == {0.5}
    padded = output(model(IDS, attention_mask=MASK))
    torch.testing.assert_close(padded[1, :4], output(model(IDS[1:, :4]))[0], rtol=0, atol=1e-6)
    assert set(revert(model)) == {*second, *(f"encoder.{name}" for name in first)}
    assert torch.equal(output(model(IDS, attention_mask=MASK)), want)


class Norm(nn.Module):
    def __init__(self, pool: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.pool = pool

    def forward(self, x, attention_mask=None):
        return self.norm(x.mean(dim=1) if self.pool else x)


REFUSED = [
    (lambda: nn.TransformerEncoderLayer(8, 2), "norm1", "batch_first=False"),
    (lambda: nn.Transformer(8, 2, 1, 1, batch_first=True), "decoder.*norm1", "tokens that follow"),
    (lambda: image_model("vit_tiny_patch16_224", qk_norm=True), "*q_norm", "each head"),
    (lambda: image_model("vit_tiny_patch16_224", global_pool="avg"), "fc_norm", "mix the samples of a batch"),
    (lambda: timm.create_model("convnext_atto"), "stem.1", "images"),
    (lambda: text_model("modernbert", AutoModelForSequenceClassification), "head.norm", "pooled"),
    (lambda: nn.Sequential(nn.LayerNorm((4, 8))), "0", "several dimensions"),
    (lambda: nn.Sequential(ContraNorm(8, 0.1)), "0", "already"),
    (lambda: nn.Sequential(nn.RMSNorm(8), nn.LayerNorm(8)), "0", "no LayerNorm is named '0'; there are 1"),
    (lambda: nn.LayerNorm(8), None, "use ContraNorm"),
    (lambda: nn.Sequential(nn.Linear(8, 8)), None, "it has none"),
    (lambda: nn.Sequential(nn.LayerNorm(8)), "norm*", "no LayerNorm is named 'norm*'"),
]


@pytest.mark.parametrize("make, names, reason", REFUSED)
def test_refusals_say_why_and_change_nothing(make, names, reason):
    model = make()
    before = repr(model)
    with pytest.raises(ValueError) as error:
        replace_layer_norms(model, 0.1, names)
    assert reason in str(error.value)
    assert repr(model) == before


def test_causal_models_are_refused():
    tiny = AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0)
    with pytest.raises(ValueError, match="causal"):
        replace_layer_norms(AutoModel.from_config(tiny), 0.1)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    replace_layer_norms(model, 0.1, verbose=False)
    with pytest.raises(ValueError, match="causal mask"):
        model(torch.randn(2, 5, 8), mask=nn.Transformer.generate_square_subsequent_mask(5))
    assert model(torch.randn(2, 5, 8)).shape == (2, 5, 8)  # the refused call leaves nothing behind


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("bloom", dict(hidden_size=16, n_layer=1, n_head=2)),
        ("mpt", dict(d_model=16, n_layers=1, n_heads=2)),
        ("openai-gpt", dict(n_embd=16, n_layer=1, n_head=2)),
        ("xlnet", dict(d_model=16, n_layer=1, n_head=2, d_inner=32)),  # (N, B, D)
    ],
)
def test_models_of_transformers_that_hide_how_they_work_are_refused(kind, fields):
    model = AutoModel.from_config(AutoConfig.for_model(kind, vocab_size=50, **fields))
    with pytest.raises(ValueError, match="causal" if kind != "xlnet" else "mix the samples"):
        replace_layer_norms(model, 0.5)


def test_a_causal_mask_is_refused_where_a_converted_norm_would_see_it_only():
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    for mask in (causal, causal < 0):
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        layer(torch.randn(2, 5, 8), src_mask=mask)
        replace_layer_norms(layer, 0.5, verbose=False)
        with pytest.raises(ValueError, match="causal mask"):
            layer(torch.randn(2, 5, 8), src_mask=mask)
        layer(torch.randn(2, 5, 8), src_mask=torch.zeros(5, 5))  # hides nothing
    text = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    clip = AutoModel.from_config(
        AutoConfig.for_model("clip", text_config=text, vision_config=IMAGE | dict(patch_size=8))
    )
    replace_layer_norms(clip, 0.5, "vision_model.encoder.*", verbose=False)
    clip(input_ids=IDS, pixel_values=torch.randn(2, 3, 32, 32))  # the text's attention is causal, and vanilla


def test_pooled_vectors_that_no_name_gives_away_are_refused_at_the_first_forward():
    model = Norm(pool=True)
    replace_layer_norms(model, 0.1, verbose=False)
    with pytest.raises(ValueError, match=r"^norm: .*\[2, 8\].*leave it out"):
        model(torch.randn(2, 5, 8))


def test_chunked_feed_forwards_are_refused():
    model = AutoModel.from_config(AutoConfig.for_model("bert", **SIZE, chunk_size_feed_forward=2))
    with pytest.raises(ValueError, match="chunk_size_feed_forward"):
        replace_layer_norms(model, 0.1)


# -- the padding mask ------------------------------------------------------------------------------------------------

REAL = torch.tensor([[True, True, True], [True, False, False]])
ADDED = torch.zeros(2, 3).masked_fill(~REAL, -torch.inf)


@pytest.mark.parametrize(
    "mask, padding",
    [
        (REAL, False),
        (~REAL, True),
        (REAL.long(), False),
        (REAL.double(), False),
        (ADDED, True),
        (ADDED, False),
        (ADDED.clamp_min(torch.finfo(torch.float32).min), False),
        (ADDED[:, None, None], False),
        (ADDED[:, None, None].expand(2, 4, 3, 3), False),
        (REAL[:, None, None], False),
    ],
)
def test_masks_as_models_take_them(mask, padding):
    assert torch.equal(real_tokens(mask, padding=padding), REAL)


def test_masks_that_hide_nothing():
    assert real_tokens(torch.zeros(2, 1, 3, 3), padding=False).all()
    assert real_tokens(torch.zeros(2, 3), padding=False).all()  # added to the scores


@pytest.mark.parametrize(
    "mask, padding, reason",
    [
        (torch.ones(2, 1, 3, 3).tril().bool(), False, "from each token"),
        (torch.full((2, 3), 0.5), False, "1 at real"),
        (torch.full((2, 3), -1.0), True, "-inf"),
        (torch.ones(3), False, r"got \(3,\)"),
        ({"full_attention": REAL}, False, "got dict"),
        (torch.nested.nested_tensor([torch.ones(3), torch.ones(1)], layout=torch.jagged), False, "got NestedTensor"),
    ],
)
def test_masks_that_are_none_of_padding(mask, padding, reason):
    with pytest.raises(ValueError, match=reason):
        real_tokens(mask, padding=padding)


class Classifier(nn.Module):
    """A model of one's own, whose layers know the mask under torch's name, checkpointed or not."""

    def __init__(self, give_mask: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
        self.layers = nn.ModuleList([layer, copy.deepcopy(layer)])
        self.give_mask = give_mask
        self.recompute = False

    def forward(self, x, attention_mask=None):
        padding = None if attention_mask is None or not self.give_mask else ~attention_mask
        for layer in self.layers:
            if self.recompute:
                x = checkpoint(layer, x, src_key_padding_mask=padding, use_reentrant=False)
            else:
                x = layer(x, src_key_padding_mask=padding)
        return x


def gradients(model: nn.Module, forward) -> list[torch.Tensor]:
    model.zero_grad()
    forward().square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


class Featurizer(nn.Module):
    """As sentence-transformers: the mask is in a dict, and the inner model's own hooks are passed by."""

    def __init__(self) -> None:
        super().__init__()
        self.model = text_model("bert")

    def forward(self, features):
        return self.model.forward(**features)[0]


def test_the_mask_in_a_dict_of_features():
    model = Featurizer()
    replace_layer_norms(model, 0.5, verbose=False)
    got = model({"input_ids": IDS, "attention_mask": MASK})[1, :4]
    want = model({"input_ids": IDS[1:, :4], "attention_mask": MASK[1:, :4]})[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_the_rest_of_a_model_reverted_in_part_keeps_its_mask():
    model = text_model("bert")
    replace_layer_norms(model, 0.5, verbose=False)
    assert revert(model.encoder.layer[0])
    got = output(model(IDS, attention_mask=MASK))[1, :4]
    torch.testing.assert_close(got, output(model(IDS[1:, :4]))[0], rtol=0, atol=1e-6)
    revert(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_threads_have_masks_of_their_own():
    """Two requests to one served model: the second begins and ends while the first waits within its first layer."""
    model = text_model("bert")
    replace_layer_norms(model, 0.5, verbose=False)
    calls = [lambda: output(model(IDS, attention_mask=MASK)), lambda: output(model(IDS))]
    alone = [call() for call in calls]
    main, inner = threading.current_thread(), []

    def other_request(*_):
        if threading.current_thread() is main and not inner:
            inner.append(None)
            thread = threading.Thread(target=lambda: inner.append(calls[1]()))
            thread.start()
            thread.join()

    model.encoder.layer[0].register_forward_pre_hook(other_request)
    torch.testing.assert_close(calls[0](), alone[0], rtol=0, atol=0)
    torch.testing.assert_close(inner[1], alone[1], rtol=0, atol=0)
    assert not torch.equal(*alone)


def test_padding_moves_no_real_token_of_a_torch_model():
    model = Classifier().eval()
    replace_layer_norms(model, 0.5, "layers.*.norm1", verbose=False)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([[6], [2]])
    torch.testing.assert_close(model(x, mask)[1, :2], model(x[1:, :2])[0], rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["bert", "modernbert", "distilbert"])
def test_checkpointed_layers_see_the_same_mask_again(kind, reentrant):
    model = text_model(kind).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    replace_layer_norms(model, 0.5, verbose=False)

    def forward():
        result = output(model(IDS, attention_mask=MASK))
        output(model(IDS[:, :3]))  # as of a second tower: another mask before the backward pass
        return result

    want = gradients(model, forward)
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()  # reentrant checkpoints need an input with a gradient
    for got, expected in zip(gradients(model, forward), want, strict=True):
        torch.testing.assert_close(got, expected)
    revert(model)
    functions = [getattr(module, "_gradient_checkpointing_func", None) for module in model.modules()]
    assert not any(type(function).__module__.startswith("contranorm") for function in functions)


def test_torchs_own_checkpoint_sees_the_mask_again_or_says_that_it_cannot():
    x = torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(6) < torch.tensor([[6], [2]])
    model = Classifier()
    replace_layer_norms(model, 0.5, verbose=False)
    want = gradients(model, lambda: model(x, mask))
    model.recompute = True
    for got, expected in zip(gradients(model, lambda: model(x, mask)), want, strict=True):
        torch.testing.assert_close(got, expected)
    model.give_mask = False
    with pytest.raises(RuntimeError, match="computed again by gradient checkpointing"):
        gradients(model, lambda: model(x, mask))


def test_a_mask_does_not_outlive_its_forward():
    model = Norm(pool=False)
    replace_layer_norms(model, 0.5, verbose=False)
    x = torch.randn(2, 6, 8)
    want = model(x)
    assert not torch.equal(model(x, torch.arange(6) < torch.tensor([[6], [2]])), want)
    assert torch.equal(model(x), want)
    with pytest.raises(ValueError, match=r"norm: .*\(2, 5\), which does not fit \(2, 6, 8\)"):
        model(x, torch.ones(2, 5, dtype=torch.bool))
    assert torch.equal(model(x), want)


# -- the model as an object ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_models_of_their_own(clone):
    model = text_model("bert")
    want = output(model(IDS, attention_mask=MASK))
    replace_layer_norms(model, 0.5, verbose=False)
    moved = output(model(IDS, attention_mask=MASK))
    other = clone(model)
    assert torch.equal(output(other(IDS, attention_mask=MASK)), moved)
    revert(other)
    assert torch.equal(output(other(IDS, attention_mask=MASK)), want)
    assert torch.equal(output(model(IDS, attention_mask=MASK)), moved)


@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
def test_torch_compile():
    model = text_model("distilbert")
    del model.transformer.layer[1]
    replace_layer_norms(model, 0.5, "transformer*", verbose=False)
    want = output(model(IDS, attention_mask=MASK))
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(output(compiled(IDS, attention_mask=MASK)), want)
    torch.testing.assert_close(output(compiled(IDS)), output(model(IDS)))


def test_a_saved_model_loads_as_vanilla(tmp_path):
    model = text_model("bert")
    want = output(model(IDS))
    replace_layer_norms(model, 0.5, verbose=False)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(AutoModel.from_pretrained(tmp_path).double().eval()(IDS)), want)
