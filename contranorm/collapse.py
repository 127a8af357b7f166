"""Metrics of dimensional collapse, and a probe that records them for every layer of a model.

All take features (N, D) or (B, N, D) and return one float: for a batch, the mean over its samples. Each docstring says
which value means collapsed and what N isotropic Gaussian rows of width D give ("healthy").
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    import pandas as pd


def _batched(x: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The samples of x as float64 (N, D) tensors, padding dropped."""
    if x.dim() not in (2, 3) or not x.is_floating_point():
        raise ValueError(f"features must be a float tensor (N, D) or (B, N, D), got {x.dtype} {tuple(x.shape)}")
    batch = x.detach().double()
    batch = batch if x.dim() == 3 else batch.unsqueeze(0)
    if mask is None:
        samples = list(batch)
    else:
        if mask.dtype != torch.bool or mask.shape != x.shape[:-1]:
            raise ValueError(f"mask must be bool of shape {tuple(x.shape[:-1])}, got {mask.dtype} {tuple(mask.shape)}")
        samples = [rows[keep] for rows, keep in zip(batch, mask.reshape(batch.shape[:2]), strict=True)]
    if not samples or any(len(sample) == 0 for sample in samples):
        raise ValueError("a sample without rows has no collapse metric: B or N is 0, or the mask leaves nothing")
    return samples


def _mean(values: list[Tensor]) -> float:
    return float(torch.stack(values).mean())


def mean_cosine_similarity(x: Tensor, mask: Tensor | None = None) -> float:
    """Mean of cos(x_i, x_j) over all pairs i ≠ j, without forming them: (‖Σ x̂_i‖² - Σ ‖x̂_i‖²) / (N(N - 1)).

    Collapsed: 1. Healthy: 0. A single row has no pair and counts as 1; a zero row has cosine 0 with all others.
    """
    values = []
    for rows in _batched(x, mask):
        unit = F.normalize(rows, dim=-1)
        n = unit.shape[0]
        total = unit.sum(dim=0).square().sum() - unit.square().sum()
        values.append(total / (n * (n - 1)) if n > 1 else total.new_ones(()))
    return _mean(values)


def singular_spectrum(x: Tensor, *, centre: bool = False) -> Tensor:
    """Singular values of x divided by their sum, in descending order; (min(N, D),), a batch gives (B, min(N, D)).

    Collapsed: mass on the first few. Healthy: nearly flat (Marchenko-Pastur). All-zero features give zeros. With
    `centre`, the mean row is subtracted first, so that a common offset does not count.
    """
    rows = torch.stack(_batched(x, None))
    if centre:
        rows = rows - rows.mean(dim=-2, keepdim=True)
    values = _singular_values(rows)
    total = values.sum(dim=-1, keepdim=True)
    spectrum: Tensor = values / total.where(total > 0, 1.0)
    return spectrum if x.dim() == 3 else spectrum.squeeze(0)


def _singular_values(rows: Tensor) -> Tensor:
    """Of each matrix (..., N, D); NaN where an entry is not finite, on which LAPACK raises."""
    finite = rows.isfinite().flatten(-2).all(dim=-1)
    values: Tensor = torch.linalg.svdvals(rows.where(finite[..., None, None], 0.0))
    return values.where(finite[..., None], torch.nan)


def effective_rank(x: Tensor, mask: Tensor | None = None, *, centre: bool = False, power: Literal[1, 2] = 1) -> float:
    """exp(H(a / Σa)), H the entropy and a = σ^power of the singular values σ (Roy and Vetterli, EUSIPCO 2007).

    Power 1 is the usual effective rank (RankMe's); power 2 weighs the eigenvalues of the second-moment matrix, with
    `centre` those of the covariance: the mean row is subtracted first.

    Collapsed: 1. Healthy: close to min(N, D). All-zero features have effective rank 0 by convention. Finite at
    singular values of exactly zero.
    """
    values = []
    for rows in _batched(x, mask):
        weights = _singular_values(rows - rows.mean(dim=0) if centre else rows) ** power
        total = weights.sum()
        values.append(torch.special.entr(weights / total).sum().exp() if total > 0 else total)
    return _mean(values)


def feature_variance(x: Tensor, mask: Tensor | None = None) -> float:
    """‖H - mean row‖² / (N·D): the variance of a feature over the rows, averaged over features.

    Collapsed: 0. Healthy: the variance of the Gaussian (times 1 - 1/N).
    """
    return _mean([(rows - rows.mean(dim=0)).square().mean() for rows in _batched(x, mask)])


def uniformity(x: Tensor, mask: Tensor | None = None, *, t: float = 2.0) -> float:
    """Log of the mean over pairs i ≠ j of exp(-t‖x̂_i - x̂_j‖²) (Wang and Isola, ICML 2020).

    Collapsed: 0. Healthy: close to -2t for large D (-4 at t = 2); lower is more uniform.
    """
    values = []
    for rows in _batched(x, mask):
        unit = F.normalize(rows, dim=-1)
        n = unit.shape[0]
        if n == 1:
            values.append(unit.new_zeros(()))
            continue
        total = unit.new_zeros(())
        for start in range(0, n, 1024):  # N x N never in memory at once
            distances = torch.cdist(unit[start : start + 1024], unit)
            distances.diagonal(start).fill_(torch.inf)  # i = j
            total = total + distances.square_().mul_(-t).exp_().sum()
        values.append((total.clamp_min(torch.finfo(total.dtype).tiny) / (n * (n - 1))).log())
    return _mean(values)


def attention_similarity(attention: Tensor) -> float:
    """Mean cosine similarity between the attention rows of different tokens, averaged over heads and samples.

    Collapsed: 1 (all tokens attend to the same mixture). Lower is healthier; one-hot rows on distinct tokens give 0.
    For weights (N, N), (H, N, N) or (B, H, N, N), rows summing to 1.
    """
    if attention.dim() not in (2, 3, 4) or attention.shape[-1] != attention.shape[-2]:
        raise ValueError(f"attention must be (..., N, N) with up to four axes, got {tuple(attention.shape)}")
    return mean_cosine_similarity(attention.reshape(-1, *attention.shape[-2:]))


METRICS: dict[str, Callable[..., float]] = {
    "mean_cosine": mean_cosine_similarity,
    "effective_rank": effective_rank,
    "variance": feature_variance,
}


class CollapseProbe:
    """Records collapse metrics of the outputs of chosen sub-modules, one row per module and forward pass.

    Example:
        ```
        with CollapseProbe(model, ["layers.0", "layers.1"]) as probe:
            model(x)
        print(probe.frame())     # columns: call, layer, module, mean_cosine, effective_rank, variance
        ```

    Args:
        model: any module.
        layers: a name as in `model.named_modules()`, several, or a mapping from a label to a name; in order of depth.
        metrics: name → function of features, a module's output or the first of a tuple, and of the probe's `mask`.

    Raises:
        ValueError: a name that the model does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | Iterable[str] | Mapping[str, str],
        *,
        metrics: Mapping[str, Callable[..., float]] = METRICS,
    ) -> None:
        layers = [layers] if isinstance(layers, str) else layers
        names = dict(layers) if isinstance(layers, Mapping) else {name: name for name in layers}
        known = dict(model.named_modules())
        if missing := [name for name in names.values() if name not in known]:
            raise ValueError(
                f"no module named {missing[0]!r} in {type(model).__name__}; there are {list(known)[1:12]} …"
            )
        self.modules = {label: known[name] for label, name in names.items()}
        self.metrics = dict(metrics)
        self.mask: Tensor | None = None
        self._rows: list[dict[str, Any]] = []
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> CollapseProbe:
        for position, (label, module) in enumerate(self.modules.items()):
            hook = functools.partial(self._record, position, label)
            self._handles.append(module.register_forward_hook(hook))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _record(self, position: int, label: str, module: nn.Module, inputs: Any, output: Any) -> None:
        features = output if isinstance(output, Tensor) else output[0]
        masked = {} if self.mask is None else {"mask": self.mask}
        values = {name: metric(features, **masked) for name, metric in self.metrics.items()}
        self._rows.append({"layer": position, "module": label, **values})

    def frame(self) -> pd.DataFrame:
        """One row per module and forward pass: call, layer, module, then one column per metric."""
        import pandas as pd  # here, so that a training without a probe starts sooner

        frame = pd.DataFrame(self._rows, columns=["layer", "module", *self.metrics])
        frame.insert(0, "call", frame.groupby("module").cumcount())
        return frame
