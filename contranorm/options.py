"""ContraNorm's switches, spelled once: the settings of every experiment that can carry the layer inherit them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from contranorm.functional import Axis, Implementation


@dataclass(kw_only=True)
class ContraNormOptions:
    """The form of the step, as flags; `switches()` gives them to `contra_norm` and the layers by name."""

    scale: float | None = field(default=None, metadata={"aliases": ("norm_scale",)})
    """The step s, > 0. It has no default: 0 would silently be no ContraNorm at all."""

    tau: float = field(default=1.0, metadata={"aliases": ("temp",)})
    """Temperature of the softmax, > 0; the paper uses 1."""

    identity: bool | None = None
    """(1+s)·x - s·A·x in place of Eq. 6's x - s·A·x. Unset: the form of this experiment's released code."""

    axis: Axis = "tokens"
    """What is contrasted: tokens (or nodes), or features, the paper's D-ContraNorm."""

    symmetric: bool = field(default=False, metadata={"aliases": ("dual_norm",)})
    """Both gradient terms: A + softmax over columns in place of A."""

    pre_norm: bool = False
    """Rows of unit length in place of x everywhere."""

    learnable: bool = False
    """Train one step per feature, starting from the scale."""

    positive: bool = False
    """With --learnable: train the step's logarithm, so that it stays > 0."""

    implementation: Implementation = "auto"
    """How it is computed: auto chooses an exact kernel by shape; linear approximates in time linear in N."""

    degree: int = 2
    """Degree of linear's polynomial, 1 or 2: 1 is the faster, 2 the more exact."""

    def switches(self) -> dict[str, Any]:
        """Every switch but the scale, by name."""
        names = [f.name for f in fields(ContraNormOptions) if f.name != "scale"]
        return {name: getattr(self, name) for name in names}

    def changed_switches(self) -> list[str]:
        """The names of those that differ from their default: without ContraNorm none of them may be given."""
        return [f.name for f in fields(ContraNormOptions) if getattr(self, f.name) != f.default]
