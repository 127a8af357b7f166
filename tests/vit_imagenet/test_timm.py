"""What timm's own tests ask of a model, of ours and of the vanilla ones: the same test runs on both."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.models._features_fx import create_feature_extractor
from torch import Tensor, nn

from contranorm import ContraNorm
from ViT_imagenet import models

SIDE = 32
BASES = ("deit_micro_patch8_32", "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224")


@pytest.fixture(params=[base + suffix for base in BASES for suffix in ("", models.SUFFIX)])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, SIDE, SIDE)


def build(name: str, *, train: bool = False, **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    if name.endswith(models.SUFFIX):
        kwargs["scale"] = 0.3
    return timm.create_model(name, **{"num_classes": 5, "depth": 2, "img_size": SIDE, **kwargs}).train(train)


def tokens(model: nn.Module) -> int:
    return model.patch_embed.num_patches + model.num_prefix_tokens


def test_forward_and_backward(name: str, images: Tensor) -> None:
    model = build(name)
    logits = model(images)
    assert logits.shape == (2, 5) and logits.isfinite().all()
    outputs = model.train()(images)
    sum(part.square().sum() for part in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_default_cfg(name: str) -> None:
    cfg = build(name).default_cfg
    assert cfg["architecture"] == name.removesuffix(models.SUFFIX)  # whose weights fit
    assert cfg["input_size"] == ((3, 32, 32) if "32" in name else (3, 224, 224))
    classifiers = (cfg["classifier"],) if isinstance(cfg["classifier"], str) else cfg["classifier"]
    names = build(name).state_dict().keys()
    assert all(f"{part}.weight" in names for part in (*classifiers, cfg["first_conv"]))


def test_classifier_reset_and_left_out(name: str, images: Tensor) -> None:
    model = build(name)
    model.reset_classifier(0)
    assert model(images).shape == (2, model.num_features)
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    headless = build(name, num_classes=0)
    assert headless(images).shape == (2, model.num_features)
    features = headless.forward_features(images)
    assert features.shape == (2, tokens(headless), model.num_features)
    assert headless.forward_head(features, pre_logits=True).shape == (2, model.num_features)


def test_state_dict_goes_round(name: str, images: Tensor, tmp_path: Path) -> None:
    model, other = build(name), build(name)
    nn.init.constant_(other.head.weight, 0.0)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    other.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True))
    assert torch.equal(other(images), model(images))
    assert torch.equal(copy.deepcopy(model)(images), model(images))


def test_parameter_groups(name: str) -> None:
    model = build(name)
    grouped = group_parameters(model, model.group_matcher())
    assert sum(map(len, grouped.values())) == len(list(model.parameters()))
    assert {"pos_embed", "cls_token"} <= set(model.no_weight_decay())


@pytest.mark.parametrize("feature_cls", [None, "getter", "hook", "fx"])
def test_features_only(name: str, images: Tensor, feature_cls: str | None) -> None:
    chosen = {} if feature_cls is None else {"feature_cls": feature_cls}
    extractor = build(name, depth=4, features_only=True, **chosen)
    maps = extractor(images)
    assert len(maps) == 3 == len(extractor.feature_info.channels())
    assert all(part.isfinite().all() for part in maps)
    if feature_cls in (None, "getter"):
        side = SIDE // extractor.model.patch_embed.patch_size[0]
        assert all(part.shape[2:] == (side, side) for part in maps)
    ours = [module for module in extractor.modules() if isinstance(module, ContraNorm)]
    assert len(ours) in ((8, 9) if name.endswith(models.SUFFIX) else (0,))  # "hook" keeps the final norm, unused


def test_features_of_chosen_blocks(name: str, images: Tensor) -> None:
    first = build(name, depth=4, features_only=True, out_indices=(0, 2))(images)
    _, every = build(name, depth=4).forward_intermediates(images)
    assert all(torch.equal(a, b) for a, b in zip(first, (every[0], every[2]), strict=True))


def test_forward_intermediates(name: str, images: Tensor) -> None:
    model = build(name, depth=4)
    last, every = model.forward_intermediates(images, indices=[1, 3])
    assert torch.equal(last, model.forward_features(images))
    assert len(every) == 2 and all(part.shape[:2] == (2, model.num_features) for part in every)
    normed = model.forward_intermediates(images, norm=True, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(normed[-1], last[:, model.num_prefix_tokens :])
    assert model.prune_intermediate_layers(1, prune_head=True) == [3]
    assert build(name, depth=4).prune_intermediate_layers([1], prune_norm=True) == [1]


def test_fx_feature_extraction_by_timm(name: str, images: Tensor) -> None:
    model = build(name)
    (features,) = create_feature_extractor(model, {"blocks.1": "out"})(images).values()
    assert torch.equal(model.norm(features), model.forward_features(images))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(name: str, images: Tensor, reentrant: bool) -> None:
    gradients = []
    for recompute in (False, True):
        model = build(name, train=True, drop_path_rate=0.5)
        model.set_grad_checkpointing(recompute)
        torch.manual_seed(2)
        outputs = model(images.clone().requires_grad_(reentrant))
        sum(part.square().sum() for part in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


def test_other_image_sizes(name: str) -> None:
    model = build(name)
    model.set_input_size((64, 64))
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)
    assert build(name, dynamic_img_size=True)(torch.randn(1, 3, 64, 48)).shape == (1, 5)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace(name: str, images: Tensor) -> None:
    model = build(name)
    with torch.no_grad():
        traced = torch.jit.trace(model, images)
        torch.testing.assert_close(traced(images), model(images))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_jit_script(name: str, images: Tensor) -> None:
    model = build(name)
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(images), model(images))


def test_symbolic_trace(name: str, images: Tensor) -> None:
    model = build(name)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(images), model(images))


def test_export_with_a_dynamic_batch(name: str, images: Tensor) -> None:
    model = build(name)
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    more = torch.randn(3, 3, SIDE, SIDE)
    torch.testing.assert_close(exported(more), model(more))


def test_compile_without_a_break(name: str, images: Tensor) -> None:
    model = build(name)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images))


def test_meta_device(name: str, images: Tensor) -> None:
    with torch.device("meta"):
        model = build(name)
    assert model(images.to("meta")).shape == (2, 5)
