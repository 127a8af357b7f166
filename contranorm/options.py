"""ContraNorm's switches, spelled once: the settings of every experiment that can carry the layer inherit them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, Literal, get_args

Axis = Literal["tokens", "features"]
Implementation = Literal["auto", "plain", "fused", "blocked", "sdpa", "linear"]
Filter = Literal["poly", "log", "log_1", "log_2", "contranorm"]
Location = Literal["online", "target"]


def check_positive(name: str, value: Any) -> None:
    """Refuse what is not a finite number > 0.

    Raises:
        ValueError: the message starts with the name.
    """
    if isinstance(value, bool) or not isinstance(value, Real):  # NumPy's floats are Real too
        raise ValueError(f"{name} must be > 0, a number, got {value!r}")
    if not 0 < float(value) < math.inf:
        reason = ": 0 would be no step at all, and a negative one pulls rows together" if name == "scale" else ""
        raise ValueError(f"{name} must be {'finite' if value == math.inf else '> 0'}, got {value}{reason}")


def check_switches(
    *,
    axis: str = "tokens",
    symmetric: bool = False,
    learnable: bool = False,
    positive: bool = False,
    implementation: str = "auto",
    degree: int = 2,
) -> None:
    """Refuse values that no form of the step has.

    Raises:
        ValueError: the message starts with the switch's name.
    """
    for name, value, known in (("axis", axis, Axis), ("implementation", implementation, Implementation)):
        if value not in get_args(known):
            raise ValueError(f"{name} must be one of {', '.join(get_args(known))}; got {value!r}")
    if degree not in (1, 2):
        raise ValueError(f"degree must be 1 or 2, got {degree}")
    if positive and not learnable:
        raise ValueError("positive needs learnable: it trains the logarithm of the step")
    if symmetric and axis == "tokens" and implementation in ("fused", "sdpa"):
        raise ValueError(f"implementation {implementation} has no symmetric form: use blocked")


def check_filter(kind: str, sigma: float, location: str) -> None:
    """Refuse spectral filters that are not defined, see `contranorm.spectral_filter`.

    Raises:
        ValueError: what is wrong, and why.
    """
    for name, value, known in (("kind", kind, Filter), ("location", location, Location)):
        if value not in get_args(known):
            raise ValueError(f"{name} must be one of {', '.join(get_args(known))}; got {value!r}")
    if kind.startswith("log") and location == "target":
        raise ValueError(f"{kind} is a filter of the online side: a target has poly or contranorm")
    if not math.isfinite(sigma):
        raise ValueError(f"sigma must be finite, got {sigma}")
    if kind == "poly" and sigma < -1:
        raise ValueError(f"sigma must be at least -1, got {sigma}: below, the smallest directions become the largest")
    if kind == "contranorm" and sigma > 1:
        raise ValueError(
            f"sigma must be at most 1 with contranorm, got {sigma}: above, the largest direction is flipped"
        )


@dataclass(kw_only=True)
class ContraNormOptions:
    """The form of the step, as flags; `switches()` gives them to the layers and to `contra_norm` by name."""

    scale: float | None = field(default=None, metadata={"aliases": ("norm_scale",)})
    """The step s, > 0. It has no default: 0 would silently be no ContraNorm at all."""

    tau: float = field(default=1.0, metadata={"aliases": ("temp",)})
    """Temperature of the softmax, > 0; the paper uses 1."""

    identity: bool | None = None
    """(1+s)·x - s·A·x in place of Eq. 6's x - s·A·x. Unset: the form of this experiment's released code."""

    scaled_identity: bool = False
    """s·x - s·A·x in place of both: what the released code computes with a learnable step."""

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
    """Degree of linear's polynomial, 1 or 2: 1 is the faster. Where its error bound is above 10 %, 2 is taken in its
    place, and the exact form where that does not hold either."""

    def switches(self) -> dict[str, Any]:
        """Every switch but the scale, by name. An unset `identity` is None: the experiment decides what that means."""
        names = [f.name for f in fields(ContraNormOptions) if f.name != "scale"]
        return {name: getattr(self, name) for name in names}

    def step_name(self, form: str = "") -> str:
        """What tables call the step, say "ContraNorm (Eq. 6) s=0.5"; `form` is named where it is not the usual one."""
        form = "scaled identity" if self.scaled_identity else form
        return f"{'D-' if self.axis == 'features' else ''}ContraNorm{f' ({form})' if form else ''} s={self.scale:g}"

    def changed_switches(self) -> list[str]:
        """The names of those that differ from their default: without ContraNorm none of them may be given."""
        return [f.name for f in fields(ContraNormOptions) if getattr(self, f.name) != f.default]

    def check_switches(self) -> None:
        """Refuse values that make no sense, alone or together.

        Raises:
            ValueError: the message starts with the flag's name.
        """
        try:
            if self.scale is not None:
                check_positive("scale", self.scale)
            check_positive("tau", self.tau)
            checked = ("axis", "symmetric", "learnable", "positive", "implementation", "degree")
            check_switches(**{name: getattr(self, name) for name in checked})
            if self.positive and self.scale is None:
                raise ValueError("positive needs a scale to start from")
            if self.degree != 2 and self.implementation != "linear":
                raise ValueError(f"degree belongs to --implementation linear, not {self.implementation}: leave it out")
            if self.axis == "features" and self.implementation != "auto":
                raise ValueError("implementation belongs to --axis tokens, not features: leave it out")
        except ValueError as error:
            raise ValueError(f"--{error}") from error
