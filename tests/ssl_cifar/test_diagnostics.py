"""The diagnostics of known features: isotropic, collapsed, invariant; and of a vision transformer's layers."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from contranorm import effective_rank, spectral_filter
from SSL_cifar.diagnostics import collect, rank_difference


class Known:
    """A method whose features are the flattened image through a matrix, and whose embedding halves them."""

    def __init__(self, matrix: torch.Tensor | None = None, backbone: nn.Module | None = None) -> None:
        self.matrix = matrix
        self.backbone = backbone or nn.Identity()
        self.nll: torch.Tensor | None = None

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.backbone(images) if self.matrix is None else images.flatten(1) @ self.matrix

    def likelihood(self, images: torch.Tensor) -> torch.Tensor | None:
        return self.nll

    def project(self, h: torch.Tensor) -> torch.Tensor | None:
        return None if self.matrix is None else h[:, : h.shape[1] // 2]


def batches(noise: float, size: int = 2, images: int = 600, views: int = 4):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, 3, size, size, generator=generator)
    for part in x.split(200):
        yield part, [part + noise * torch.randn(part.shape, generator=generator) for _ in range(views)]


def test_isotropic_features():
    numbers, arrays = collect(Known(torch.eye(12)), batches(0.0))
    assert numbers["erank_cov_h"] == pytest.approx(12, rel=0.02)
    assert numbers["erank_cov_z"] == pytest.approx(6, rel=0.02)
    assert numbers["erank_sv_h"] > numbers["erank_cov_h"]  # the flatter of the two spectra
    assert numbers["top_share_h"] == pytest.approx(1 / 12, rel=0.3)
    assert (numbers["directions_h"], numbers["directions_z"]) == (12, 6)
    assert numbers["feature_similarity_h"] == pytest.approx(0, abs=0.01)
    assert numbers["alignment"] == pytest.approx(0, abs=1e-5) == numbers["worst_alignment"]
    assert numbers["uniformity"] < -2.5
    assert len(arrays["spectrum"]) == 12 and arrays["spectrum"][0] == 1
    assert len(arrays["spectrum_z"]) == 6


@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_collapse_to_a_line_is_seen_whether_centred_or_not(offset):
    method = Known(torch.outer(torch.linspace(1, 2, 12), torch.ones(12)))
    plain = method.features
    method.features = lambda images: plain(images) + offset
    numbers, arrays = collect(method, batches(0.1))
    assert numbers["erank_cov_h"] == pytest.approx(1, abs=1e-3) == numbers["top_share_h"]
    assert numbers["directions_h"] == 1
    assert arrays["spectrum"][1] < 1e-3


def test_constant_features_have_no_rank():
    numbers, arrays = collect(Known(torch.zeros(12, 12)), batches(0.1))
    assert numbers["erank_cov_h"] == 0 and numbers["top_share_h"] == 1 and not any(arrays["spectrum"])


def test_the_worst_pair_of_views_is_further_apart_than_the_mean():
    few, many = (collect(Known(torch.eye(12)), batches(0.5, views=views))[0] for views in (2, 4))
    assert few["worst_alignment"] == pytest.approx(few["alignment"])
    assert many["worst_alignment"] > 1.2 * many["alignment"]
    assert many["alignment"] == pytest.approx(few["alignment"], rel=0.1)


@pytest.mark.parametrize("class_token", [True, False])
def test_a_vision_transformer_is_measured_by_layer(class_token):
    vit = VisionTransformer(
        img_size=8, patch_size=4, embed_dim=12, depth=3, num_heads=2, num_classes=0, class_token=class_token,
        global_pool="token" if class_token else "avg",
    ).eval()  # fmt: skip
    with torch.no_grad():
        vit.pos_embed.normal_(std=1.0)
        vit.blocks[0].attn.qkv.weight.normal_()
        vit.blocks[1].attn.qkv.weight[:12] = 0  # queries of zero: every token attends to the same mixture
    fused = [block.attn.fused_attn for block in vit.blocks]
    numbers, arrays = collect(Known(backbone=vit), batches(0.1, size=8, images=4))
    assert [len(row) for row in arrays["attention_similarity"]] == [2, 2, 2]
    assert arrays["attention_similarity"][1] == pytest.approx([1, 1])
    assert min(arrays["attention_similarity"][0]) < 0.99
    assert len(arrays["token_similarity"]) == 3 and all(-1 < value < 1 for value in arrays["token_similarity"])
    assert "erank_cov_z" not in numbers and "spectrum_z" not in arrays
    assert [block.attn.fused_attn for block in vit.blocks] == fused


def test_rank_difference_has_the_sign_of_the_filter():
    z = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 0.1, 8)
    up, down = (spectral_filter(z, "poly", sigma, location="target") for sigma in (-1, 1))
    assert rank_difference(z, up) > 1
    assert rank_difference(z, down) < -0.5
    assert rank_difference(z, z) == 0
    assert rank_difference(z, up) == effective_rank(up, centre=True, power=2) - effective_rank(z, centre=True, power=2)


def test_likelihood_by_prefix():
    method = Known(torch.eye(12))
    assert "next_token_nll" not in collect(method, batches(0.1))[0]
    method.nll = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    numbers, arrays = collect(method, batches(0.1))
    assert arrays["prefix_nll"] == [2, 4] and numbers["next_token_nll"] == 3
