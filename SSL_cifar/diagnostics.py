"""Signs of collapse in what a method has learned: ranks and spectra, alignment and uniformity, similarity of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from contranorm import (
    CollapseProbe,
    attention_similarity,
    effective_rank,
    mean_cosine_similarity,
    singular_spectrum,
    uniformity,
)
from SSL_cifar.methods.base import Method

SMALL_DIRECTION = 1e-3  # of the largest singular value


def rank_difference(online: Tensor, target: Tensor) -> float:
    """Rank of the target minus that of the online output in a training batch, both (N, D).

    The rank is that of the covariance (`effective_rank`, centred, power 2). Collapsing: 0 or less. Healthy: above 0;
    "Towards a Unified Theoretical Understanding of Non-contrastive Learning via Rank Differential Mechanism", Zhuo,
    Wang, Ma, Wang, ICLR 2023.
    """
    return effective_rank(target, centre=True, power=2) - effective_rank(online, centre=True, power=2)


@torch.inference_mode()
def collect(
    method: Method, batches: Iterable[tuple[Tensor, list[Tensor]]]
) -> tuple[dict[str, float], dict[str, list[Any]]]:
    """Numbers and arrays of a method in eval mode, over batches of (images, augmented views of the same images).

    h are the features, z the embedding where the method has one; D and d their widths. Of h and z:

    - `erank_cov`, `erank_sv`: rank of the covariance, and of the singular values of centred features; `_uncentred` of z
      as it is, which is what a filter sees. Collapsed: 1. Healthy: towards D, d.
    - `top_share`: share of the variance in the first direction. Collapsed: 1.
    - `directions`: number of singular values above a thousandth of the largest. Collapsed: 1.
    - `feature_similarity`: mean cosine of two images. Collapsed: 1.

    Of the embedding (h where there is none), at unit length:

    - `alignment`: mean squared distance of two views of an image; `worst_alignment`: mean over images of the largest.
      0 is invariance, and also collapse: read it beside `uniformity` (collapsed: 0, healthy: towards -4).

    Of methods with tokens, `next_token_nll`: mean negative log-likelihood of a token given those before it, in nats.

    The arrays: `prefix_nll`, the same by the number of those before it; `spectrum` of h and `spectrum_z`, singular
    values of centred features over the largest; and of a vision transformer, by layer, `token_similarity`, mean cosine
    of the patch tokens of an image, and, by layer and head, `attention_similarity`, mean cosine of attention rows (for
    both, 1 is oversmoothed).
    """
    features: list[Tensor] = []
    by_view: list[list[Tensor]] = []
    likelihoods: list[Tensor] = []
    layers: list[dict[str, list[Any]]] = []
    for images, views in batches:
        with _layer_similarity(method.backbone) as similarity:
            features.append(method.features(images).float())
        layers += [similarity] if similarity else []
        likelihoods += [nll for nll in [method.likelihood(images)] if nll is not None]
        by_view.append([method.features(view).float() for view in views])
    h = torch.cat(features)
    h_views = [torch.cat(view) for view in zip(*by_view, strict=True)]
    z, z_views = method.project(h), [method.project(view) for view in h_views]
    numbers = _of_one("h", h)
    arrays: dict[str, list[Any]] = {"spectrum": _spectrum(h)}
    if z is not None:
        numbers |= _of_one("z", z)
        numbers["erank_cov_z_uncentred"] = effective_rank(z, power=2)
        numbers["erank_sv_z_uncentred"] = effective_rank(z)
        arrays["spectrum_z"] = _spectrum(z)
    embedded = [view for view in z_views if view is not None] or h_views
    numbers |= _alignment(embedded)
    numbers["uniformity"] = uniformity(h if z is None else z)
    if likelihoods:
        by_prefix = torch.cat(likelihoods).double().mean(dim=0)  # (T - 1,)
        numbers["next_token_nll"], arrays["prefix_nll"] = float(by_prefix.mean()), by_prefix.tolist()
    for name in layers[0] if layers else ():
        arrays[name] = torch.tensor([batch[name] for batch in layers]).mean(dim=0).tolist()
    return numbers, arrays


def _of_one(name: str, x: Tensor) -> dict[str, float]:
    """The numbers of one matrix of features (N, D)."""
    spectrum = torch.tensor(_spectrum(x))
    variance = spectrum.square()
    return {
        f"erank_cov_{name}": effective_rank(x, centre=True, power=2),
        f"erank_sv_{name}": effective_rank(x, centre=True),
        f"top_share_{name}": float(variance[0] / variance.sum()) if variance.any() else 1.0,
        f"directions_{name}": int((spectrum > SMALL_DIRECTION).sum()),
        f"feature_similarity_{name}": mean_cosine_similarity(x),
    }


def _spectrum(x: Tensor) -> list[float]:
    values = singular_spectrum(x, centre=True)
    return (values / values[0].clamp_min(torch.finfo(values.dtype).tiny)).tolist()


def _alignment(views: list[Tensor]) -> dict[str, float]:
    """Mean and, per image, largest squared distance 2 - 2 cos over the pairs of views, each (N, d)."""
    unit = F.normalize(torch.stack(views, dim=1), dim=-1)  # (N, V, d)
    first, second = torch.triu_indices(len(views), len(views), offset=1)
    distances = 2 - 2 * (unit @ unit.mT)[:, first, second]  # (N, pairs)
    return {"alignment": float(distances.mean()), "worst_alignment": float(distances.amax(dim=1).mean())}


@contextmanager
def _layer_similarity(backbone: nn.Module) -> Iterator[dict[str, list[Any]]]:
    """Filled when the block ends, with the similarities by layer of a vision transformer's one pass inside it."""
    found: dict[str, list[Any]] = {}
    if not isinstance(backbone, VisionTransformer):
        yield found
        return
    blocks = [f"blocks.{layer}" for layer in range(len(backbone.blocks))]
    maps = {block: f"{block}.attn.attn_drop" for block in blocks}  # its output are the weights, (B, heads, N, N)
    fused = [block.attn.fused_attn for block in backbone.blocks]
    first = backbone.num_prefix_tokens
    try:
        for block in backbone.blocks:
            block.attn.fused_attn = False  # the fused kernel never forms the weights
        patches = {"value": lambda tokens: mean_cosine_similarity(tokens[:, first:])}
        heads = {"value": lambda weights: [attention_similarity(head) for head in weights.unbind(dim=1)]}
        with CollapseProbe(backbone, blocks, metrics=patches) as tokens:
            with CollapseProbe(backbone, maps, metrics=heads) as attention:
                yield found
    finally:
        for block, value in zip(backbone.blocks, fused, strict=True):
            block.attn.fused_attn = value
    found["token_similarity"] = tokens.frame()["value"].tolist()
    found["attention_similarity"] = attention.frame()["value"].tolist()
