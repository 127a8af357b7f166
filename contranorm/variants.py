"""Variants of attention as settings: their flags, their names in tables, and what a table says was run.

The settings of an experiment whose layers attend inherit `VariantOptions`, and narrow `variant` to what it has.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

# Flag's value → name in tables, and the footnote: where the released code differs from its paper or from other rows.
VARIANTS: dict[str, tuple[str, str]] = {
    "attn_scale": ("AttnScale", "released with a recipe of 500 epochs"),
    "feat_scale": (
        "FeatScale", "its paper adds each term once, its released code twice; released with a recipe of 500 epochs"
    ),
    "layer_scale": ("LayerScale", ""),
    "gfsa": (
        "GFSA", "its authors search K in 2..10 for each language task, a larger budget than its rivals', and their "
        "vision code defaults to 500 epochs and reports the best epoch on the test images",
    ),
    "neutreno": ("NeuTRENO", ""),
    "resformer": ("ResFormer", "published for language models"),
    "patch_diversity": (
        "patch diversity", "the paper's cosine and contrastive losses without its patch-wise CutMix; its released code "
        "has no cosine loss",
    ),
}  # fmt: skip


def argument(variant: str, default: Any, symbol: str) -> Any:
    """A dataclass field that belongs to one variant: unset elsewhere, `default` there, and `symbol` in tables."""
    return field(default=None, metadata={"variant": variant, "default": default, "symbol": symbol})


@dataclass(kw_only=True)
class VariantOptions:
    """A variant of attention and its arguments, each of which belongs to one variant alone."""

    variant: str | None = None
    """Another remedy against oversmoothing, alone or beside ContraNorm; none is the model as published."""

    gfsa_order: int | None = argument("gfsa", 4, "K")
    """GFSA's K, at least 2: the power of A that is estimated. Unset: 4."""

    gfsa_w0: float | None = argument("gfsa", 0.0, "w0")
    """GFSA's fixed weight of the identity. Unset: 0, as released for images; its language tasks have one each."""

    neutreno_lambda: float | None = argument("neutreno", 0.6, "λ")
    """NeuTRENO's weight of the first block's values. Unset: 0.6, as released; 0 is vanilla."""

    resformer_share: float | None = argument("resformer", 0.5, "share")
    """ResFormer's share of the first block's values, the rest being the block's own. Unset: 0.5; 0 is vanilla."""

    def check_variant(self) -> None:
        """Refuse another variant's arguments, and set the defaults of this one's.

        Raises:
            ValueError: the message starts with the flag's name.
        """
        if self.variant == "none":
            self.variant = None
        for f in fields(self):
            owner = f.metadata.get("variant")
            if owner is None:
                continue
            value = getattr(self, f.name)
            if owner != self.variant:
                if value is not None:
                    raise ValueError(f"--{f.name} belongs to --variant {owner}, not {self.variant or 'none'}: drop one")
            elif value is None:
                setattr(self, f.name, f.metadata["default"])
        if self.gfsa_order is not None and self.gfsa_order < 2:
            raise ValueError(f"--gfsa_order must be at least 2, got {self.gfsa_order}")
        if self.resformer_share is not None and not 0 <= self.resformer_share <= 1:
            raise ValueError(f"--resformer_share must be between 0 and 1, got {self.resformer_share}")
        if self.neutreno_lambda is not None and not 0 <= self.neutreno_lambda < float("inf"):
            raise ValueError(f"--neutreno_lambda must be at least 0, got {self.neutreno_lambda}")

    def variant_arguments(self) -> dict[str, Any]:
        """The variant's arguments by short name, say {"order": 4, "w0": 0.0}; `lamb` where Python forbids lambda."""
        own = [f.name for f in fields(self) if f.metadata.get("variant") == self.variant is not None]
        short = {name: name.removeprefix(f"{self.variant}_").replace("lambda", "lamb") for name in own}
        return {short[name]: getattr(self, name) for name in own}

    def variant_name(self) -> str:
        """What tables call it: "GFSA", with the arguments that are not the default, "GFSA K=10"; "" without one."""
        if self.variant is None:
            return ""
        own = [f for f in fields(self) if f.metadata.get("variant") == self.variant]
        changed = [(f, getattr(self, f.name)) for f in own if getattr(self, f.name) != f.metadata["default"]]
        words = [f.metadata["symbol"] + ("" if value is True else f"={value:g}") for f, value in changed]
        return " ".join([VARIANTS[self.variant][0], *words])

    def variant_note(self, *more: str) -> str:
        """What to say below a table that shows it: how the release differs, and what this run has (`more` included)."""
        if self.variant is None or not VARIANTS[self.variant][1]:
            return ""
        words = {True: "{0}", False: "not {0}"}
        own = [words.get(value, "{0} {1:g}").format(name, value) for name, value in self.variant_arguments().items()]
        here = [*own, *more]
        return f"{self.variant_name()}: {VARIANTS[self.variant][1]}" + (f"; here {', '.join(here)}" if here else "")

    def family(self, method: str) -> str | None:
        """What tables call the runs of a method whatever its settings, where these were chosen (`tuning_trials`).

        None elsewhere, where a row is one setting, and where that only takes ContraNorm's scale.
        """
        if self.variant is None or getattr(self, "tuning_trials", None) is None:
            return None
        scale = getattr(self, "scale", None)
        name = method.replace(self.variant_name(), VARIANTS[self.variant][0])
        return name if scale is None else name.replace(f" s={scale:g}", "")

    def method(self, step: str, *order: float) -> tuple[str, tuple[float, ...]]:
        """What tables call a run, and its place there: vanilla, ContraNorm's steps, variants, and both together.

        Args:
            step: ContraNorm's name, as `ContraNormOptions.step_name` gives it; "" without ContraNorm.
            *order: the place among the runs with ContraNorm, say its scale.
        """
        name = " + ".join(filter(None, [step, self.variant_name()])) or "vanilla"
        place = [None, *VARIANTS].index(self.variant)
        if step:
            return name, (3, place, *order) if place else (1, *order)
        return name, (2, place) if place else (0,)
