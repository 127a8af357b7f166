from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import yaml
from torch import nn

from contranorm import ContraNorm, effective_rank, mean_cosine_similarity
from ViT_imagenet.models import collapse_by_block, contra_norm_sites

MODELS = timm.list_models("deit*_contranorm")
PLAIN = [name.removesuffix("_contranorm") for name in MODELS]


def small(name: str, **kwargs: object) -> nn.Module:
    """Depth 1 and few classes: what is asked of every model does not depend on either."""
    torch.manual_seed(0)
    return timm.create_model(name, depth=1, num_classes=5, **kwargs)


def images_for(model: nn.Module, number: int = 2) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(number, 3, *model.patch_embed.img_size)


def test_the_papers_and_the_configs_models_are_registered(root: Path) -> None:
    files = (root / "ViT_imagenet" / "configs").glob("*.yaml")
    configs = [yaml.safe_load(path.read_text()) for path in files if path.stem != "tuning"]
    paper = [f"deit_{size}{kind}_patch16_224" for size in ("tiny", "small") for kind in ("", "_distilled")]
    assert {*paper, *(config["model"] for config in configs)} == set(PLAIN) <= set(timm.list_models())


@pytest.mark.parametrize("name", PLAIN)
def test_a_step_below_rounding_is_the_plain_deit_bit_for_bit(name: str) -> None:
    plain, contra = small(name).eval(), small(f"{name}_contranorm", scale=1e-30).eval()
    assert list(plain.state_dict()) == list(contra.state_dict())
    contra.load_state_dict(plain.state_dict())
    images = images_for(plain, 1)
    with torch.inference_mode():
        assert torch.equal(plain(images), contra(images))


@pytest.mark.parametrize("name", MODELS)
def test_an_image_does_not_feel_the_others_of_its_batch(name: str) -> None:
    model = small(name, scale=0.5).eval()
    images = images_for(model)
    other = images.clone()
    other[1] = 3 * torch.randn_like(other[1])
    with torch.inference_mode():
        first, second = model(images), model(other)
    torch.testing.assert_close(first[0], second[0], rtol=0, atol=1e-5)
    assert not torch.allclose(first[1], second[1], atol=1e-3)


@pytest.mark.parametrize("kind", ["", "_distilled"])
@pytest.mark.parametrize("last_norm", ["contra", "vanilla"])
@pytest.mark.parametrize("learnable", [False, True])
def test_every_parameter_gets_a_gradient(kind: str, last_norm: str, learnable: bool) -> None:
    name = f"deit_tiny{kind}_patch16_224_contranorm"
    model = timm.create_model(
        name, img_size=32, depth=2, num_classes=5, scale=0.3, last_norm=last_norm,
        learnable=learnable, positive=learnable,
    )  # fmt: skip
    out = model(images_for(model))
    sum(o.square().sum() for o in (out if isinstance(out, tuple) else (out,))).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_every_norm_is_contranorm_and_the_last_one_on_request_plain() -> None:
    model = timm.create_model("deit_micro_patch8_32_contranorm", depth=3, scale=0.3)
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    assert contra_norm_sites(model) == norms
    assert len(norms) == 7
    assert {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)} == {1e-6}
    assert not any(m.identity for m in model.modules() if isinstance(m, ContraNorm))
    plain_end = timm.create_model("deit_micro_patch8_32_contranorm", depth=3, scale=0.3, last_norm="vanilla")
    assert contra_norm_sites(plain_end) == norms[:-1]
    assert list(plain_end.state_dict()) == list(model.state_dict())


def test_scale_has_no_default() -> None:
    with pytest.raises(TypeError, match="scale"):
        timm.create_model("deit_tiny_patch16_224_contranorm")


def test_switches_arrive_in_every_layer() -> None:
    model = timm.create_model(
        "deit_micro_patch8_32_contranorm",
        depth=1,
        scale=0.3,
        tau=0.5,
        identity=True,
        symmetric=True,
        contra_pre_norm=True,
    )
    for layer in (m for m in model.modules() if isinstance(m, ContraNorm)):
        assert (layer.scale, layer.tau, layer.identity, layer.symmetric, layer.pre_norm) == (0.3, 0.5, True, True, True)


def test_timms_own_norm_layer_argument_works() -> None:
    norm = partial(ContraNorm, scale=0.2, eps=1e-6)
    plain = timm.create_model("deit_micro_patch8_32", depth=2, norm_layer=norm)
    ours = timm.create_model("deit_micro_patch8_32_contranorm", depth=2, scale=0.2)
    ours.load_state_dict(plain.state_dict())
    images = images_for(plain)
    with torch.inference_mode():
        assert torch.equal(plain.eval()(images), ours.eval()(images))


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"global_pool": "avg"}, "mix the images"),
        ({"global_pool": "map"}, "class token"),
        ({"qk_norm": True}, "per-head"),
        ({"scale_attn_norm": True}, "attn"),
        ({"scale_mlp_norm": True}, "mlp"),
        ({"norm_layer": nn.LayerNorm}, "chooses its norm"),
        ({"last_norm": "none"}, "last_norm"),
    ],
)
def test_other_places_are_refused_with_the_reason(kwargs: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        timm.create_model("deit_micro_patch8_32_contranorm", depth=1, scale=0.1, **kwargs)


def test_pooling_in_a_plain_model_is_refused_by_the_layer() -> None:
    norm = partial(ContraNorm, scale=0.2)
    model = timm.create_model("deit_micro_patch8_32", depth=1, norm_layer=norm, global_pool="avg")
    with pytest.raises(ValueError, match="global_pool='avg'"):
        model(images_for(model))


def test_bf16_stays_finite_at_depth_24() -> None:
    model = timm.create_model("deit_micro_patch8_32_contranorm", depth=24, num_classes=5, scale=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(10 * images_for(model))
    logits.float().square().mean().backward()
    assert logits.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["deit_micro_patch8_32", "deit_tiny_distilled_patch16_224_contranorm"])
def test_probe_sees_every_block_and_not_the_final_norm(name: str) -> None:
    kwargs = {"scale": 0.5} if name.endswith("contranorm") else {}
    model = timm.create_model(name, depth=3, num_classes=5, **kwargs).train()
    images = images_for(model, 3)
    fused = [block.attn.fused_attn for block in model.blocks]
    frame, spectrum = collapse_by_block(model, images)
    assert list(frame["layer"]) == [1, 2, 3]
    assert [block.attn.fused_attn for block in model.blocks] == fused
    assert model.training
    with torch.no_grad():  # an independent way to the features of block 1: run the stem and two blocks by hand
        model.eval()
        tokens = model._pos_embed(model.patch_embed(images))
        tokens = model.blocks[1](model.blocks[0](tokens))
        last = model.blocks[2](tokens)
    assert frame["mean_cosine"][1] == pytest.approx(mean_cosine_similarity(tokens), abs=1e-5)
    assert frame["effective_rank"][1] == pytest.approx(effective_rank(tokens), rel=1e-4)
    assert frame["attention_similarity"].between(0, 1.0001).all()
    singular = torch.linalg.svdvals(last)
    assert spectrum == pytest.approx((singular / singular.sum(dim=1, keepdim=True)).mean(dim=0).tolist(), rel=1e-3)
    nn.init.constant_(model.norm.weight, 7.0)
    again, same = collapse_by_block(model, images)
    assert again.equals(frame) and same == spectrum


def test_contranorm_lowers_the_mean_cosine_of_the_blocks() -> None:
    """What the layer is for, on one set of weights."""
    plain = small("deit_micro_patch8_32").eval()
    contra = small("deit_micro_patch8_32_contranorm", scale=1.0).eval()
    contra.load_state_dict(plain.state_dict())
    features = {}
    for name, model in (("plain", plain), ("contra", contra)):
        with torch.inference_mode():
            features[name] = model.norm(model.blocks(model._pos_embed(model.patch_embed(images_for(model)))))
    assert mean_cosine_similarity(features["contra"]) < mean_cosine_similarity(features["plain"])
