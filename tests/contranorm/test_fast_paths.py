"""Paths of torch, timm and transformers that read a LayerNorm's weights without calling it must not skip ContraNorm."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from contranorm import ContraNorm
from contranorm.convert import replace_layer_norms

BERT = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
PADDING = torch.arange(5) >= torch.tensor([[5], [3], [2]])


def encoder_layer(**kwargs) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **kwargs)


def vit(**kwargs) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=16, num_heads=2, **kwargs)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    "TransformerEncoderLayer": (encoder_layer, lambda m: m(X)),
    "TransformerEncoderLayer, norm first": (lambda: encoder_layer(norm_first=True), lambda m: m(X)),
    "TransformerEncoderLayer, padded": (encoder_layer, lambda m: m(X, src_key_padding_mask=PADDING)[~PADDING]),
    "TransformerEncoder": (lambda: nn.TransformerEncoder(encoder_layer(), 2), lambda m: m(X)),
    "TransformerEncoder, packed to nested tensors": (
        lambda: nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=True),
        lambda m: m(X, src_key_padding_mask=PADDING)[~PADDING],
    ),
    "Transformer": (lambda: nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True), lambda m: m(X, X)),
    "timm ViT": (vit, lambda m: m(X.new_ones(2, 3, 32, 32) + X.mean())),
    "BERT": (lambda: BertModel(BertConfig(**BERT)), lambda m: m(torch.arange(10).view(2, 5)).last_hidden_state),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_the_same_output_with_and_without_gradients_and_not_that_of_layer_norm(name):
    torch.manual_seed(0)
    make, call = MODELS[name]
    vanilla = make().eval()
    model = copy.deepcopy(vanilla)
    replace_layer_norms(model, 0.5, verbose=False)
    with_gradients = call(model).detach()
    with torch.no_grad():
        torch.testing.assert_close(call(model), with_gradients)
        difference = (call(vanilla) - with_gradients).abs().max()
    with torch.inference_mode():
        torch.testing.assert_close(call(model), with_gradients)
    assert difference > 0.01


def by_hand(model: nn.Module) -> nn.Module:
    """ContraNorm set as an attribute, without `replace_layer_norms` and its hooks."""
    for layer in [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)]:
        layer.norm1, layer.norm2 = ContraNorm(8, 0.5), ContraNorm(8, 0.5)
    return model.eval()


@pytest.mark.parametrize("copied", [False, True])
def test_a_norm_that_was_set_by_hand_is_called_as_well(copied):
    torch.manual_seed(0)
    model = by_hand(encoder_layer())
    model = copy.deepcopy(model) if copied else model
    want = model(X).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(X), want)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_norm_that_was_set_by_hand_refuses_nested_tensors():
    model = by_hand(nn.TransformerEncoder(encoder_layer(), 1, enable_nested_tensor=True))
    with torch.no_grad(), pytest.raises(ValueError, match="replace_layer_norms, which carries the padding mask"):
        model(X, src_key_padding_mask=PADDING)


@pytest.mark.parametrize("fast", [False, True])
def test_timms_fast_norm_is_the_one_behind_the_step(fast):
    before = timm.layers.is_fast_norm()
    timm.layers.set_fast_norm(fast)
    try:
        torch.manual_seed(0)
        model = vit().eval()
    finally:
        timm.layers.set_fast_norm(before)
    x = torch.randn(2, 3, 32, 32)
    replace_layer_norms(model, 0.5, verbose=False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model.norm(model.forward_features(x)).dtype == (torch.bfloat16 if fast else torch.float32)
