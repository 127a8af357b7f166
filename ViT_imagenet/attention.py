"""DeiT's rivals of ContraNorm that change a block: AttnScale, FeatScale, GFSA, NeuTRENO, ResFormer, LayerScale.

`apply_variant(model, "gfsa", order=4)` turns a built DeiT into one of them: attention layers change their class and get
a parameter more, so the plain DeiT's weights and names stay, and its checkpoints load. What is added starts at a
constant: no random number is drawn, and a seed gives the plain DeiT's weights.

| variant | paper | here; what differs in the released code |
| --- | --- | --- |
| attn_scale | Wang et al., ICLR 2022 | λ per head from 0; the release stores A' and trains 500 epochs |
| feat_scale | Wang et al., ICLR 2022 | t₁, t₂ from 0, terms once; the release adds both twice (`doubled`), 500 epochs |
| gfsa | Choi et al., NeurIPS 2024 | K = 4, w₀ = 0, w_K from 0; the release forms A·A, 500 epochs, best epoch |
| neutreno | Nguyen et al., NeurIPS 2023 | λ = 0.6, from the second block on; as released |
| resformer | Zhou et al., arXiv 2410.17897 | ½ v₀ + ½ v from the second block on; released for language models |
| layer_scale | Touvron et al., ICCV 2021 | timm's LayerScale, γ from 1e-5 (CaiT S24; 1e-6 in CaiT S36 and DeiT III) |

Equations and sources: `contranorm.attention`. Vectors, which all parameters here are, get no weight decay from timm.
"""

from __future__ import annotations

from typing import Any

from timm.layers import Attention, LayerScale
from timm.models import VisionTransformer, register_notrace_module
from torch import Tensor, nn

from contranorm import attention as forms
from contranorm.attention import Operator
from ViT_imagenet.diversity import add_patch_diversity

NEW_PARAMETERS = (".lamb", ".t1", ".t2", ".w_k", ".gamma")  # ends of names that no plain DeiT's state dict has


@register_notrace_module  # timm's torch.fx feature extraction takes it as a whole
class VariantAttention(Attention):
    """timm's attention, with what is made of A and v left to `mix`."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, D) → (B, N, D)."""
        if attn_mask is not None or is_causal:
            raise ValueError(f"{type(self).__name__} is for all tokens of an image: it takes no attention mask")
        batch, tokens, _ = x.shape
        heads = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)  # each (B, H, N, d)
        x = self.mix(self.q_norm(q), self.k_norm(k), v)
        x = self.norm(x.transpose(1, 2).reshape(batch, tokens, self.attn_dim))
        return self.proj_drop(self.proj(x))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What attention puts out per head, (B, H, N, d)."""
        return self.attend(q, k)(v)

    def attend(self, q: Tensor, k: Tensor, mask: None = None) -> Operator:
        """A as timm computes it: by the fused kernel, or formed once, which lets a probe see it."""
        dropout = self.attn_drop.p if self.training else 0.0
        if self.fused_attn and not dropout:
            return forms.FusedAttention(q, k)
        weights = self.attn_drop(((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1))  # (B, H, N, N)
        return lambda values: weights @ values


class AttnScaleAttention(VariantAttention):
    """AttnScale; `lamb` is λ, (H,)."""

    def set_up(self) -> None:
        """Add the parameter."""
        self.lamb = nn.Parameter(self.qkv.weight.new_zeros(self.num_heads))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(1+λ) A v - λ mean(v)."""
        return forms.attn_scale(q, k, v, self.lamb, attend=self.attend)


class FeatScaleAttention(VariantAttention):
    """FeatScale; `t1` and `t2` are (D,)."""

    def set_up(self, doubled: bool = False) -> None:
        """Add the parameters."""
        self.doubled = doubled
        self.t1, self.t2 = (nn.Parameter(self.proj.weight.new_zeros(self.proj.out_features)) for _ in range(2))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """FeatScale of the plain layer's output."""
        return forms.feat_scale(super().forward(x, attn_mask, is_causal), self.t1, self.t2, doubled=self.doubled)


class GFSAAttention(VariantAttention):
    """GFSA; `w_k` is w_K, (H,)."""

    def set_up(self, order: int = 4, w0: float = 0.0) -> None:
        """Add the parameter."""
        self.order, self.w0 = order, w0
        self.w_k = nn.Parameter(self.qkv.weight.new_zeros(self.num_heads))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(w₀ + A + w_K (A + (K-1)(A² - A))) v."""
        return forms.gfsa(q, k, v, self.w_k, order=self.order, w0=self.w0, attend=self.attend)


class FirstValues:
    """The first block's values, (B, H, N, d), on their way to the later blocks of one forward pass."""

    values: Tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> FirstValues:
        return FirstValues()  # the blocks of a copied model share one of their own


class FirstValuesAttention(VariantAttention):
    """What NeuTRENO and ResFormer share: the first block is plain and leaves its values for the later ones."""

    first: FirstValues
    is_first: bool
    is_last: bool

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The plain block; or the later one's form."""
        if self.is_first:
            self.first.values = v
            return self.attend(q, k)(v)
        out = self.mix_first(q, k, v, self.first.values)
        if self.is_last:
            del self.first.values  # not kept beyond the pass
        return out

    def mix_first(self, q: Tensor, k: Tensor, v: Tensor, v0: Tensor) -> Tensor:
        """What a later block puts out, (B, H, N, d); v0 are the first one's values."""
        raise NotImplementedError


class NeuTRENOAttention(FirstValuesAttention):
    """NeuTRENO; no parameter."""

    def set_up(self, lamb: float = 0.6) -> None:
        """Keep λ."""
        self.lamb = lamb

    def mix_first(self, q: Tensor, k: Tensor, v: Tensor, v0: Tensor) -> Tensor:
        """A v + λ (v₀ - v)."""
        return forms.neutreno(q, k, v, v0, self.lamb, attend=self.attend)


class ResFormerAttention(FirstValuesAttention):
    """ResFormer; no parameter."""

    def set_up(self, share: float = 0.5) -> None:
        """Keep the share of v₀."""
        self.share = share

    def mix_first(self, q: Tensor, k: Tensor, v: Tensor, v0: Tensor) -> Tensor:
        """A (share·v₀ + (1 - share)·v)."""
        return forms.resformer(q, k, v, v0, self.share, attend=self.attend)


ATTENTION: dict[str, type[VariantAttention]] = {
    "attn_scale": AttnScaleAttention,
    "feat_scale": FeatScaleAttention,
    "gfsa": GFSAAttention,
    "neutreno": NeuTRENOAttention,
    "resformer": ResFormerAttention,
}


def change_attention(model: VisionTransformer, kind: type[VariantAttention], **arguments: Any) -> None:
    """Make every block's attention one of `kind`, with the weights that it has.

    Raises:
        ValueError: the model's attention is not timm's `Attention`.
    """
    first = FirstValues()
    for number, block in enumerate(model.blocks):
        if type(block.attn) is not Attention:
            raise ValueError(f"{kind.__name__} replaces timm's Attention, not {type(block.attn).__name__}")
        block.attn.__class__ = kind
        if issubclass(kind, FirstValuesAttention):
            block.attn.first, block.attn.is_first = first, number == 0
            block.attn.is_last = number == len(model.blocks) - 1
        block.attn.set_up(**arguments)
    if issubclass(kind, FirstValuesAttention):
        model.set_grad_checkpointing = _refuse_checkpointing


def _refuse_checkpointing(enable: bool = True) -> None:
    if enable:
        raise ValueError(
            "gradient checkpointing computes each block alone, but here the first block's values travel to later ones"
        )


def add_layer_scale(model: VisionTransformer, init: float = 1e-5) -> None:
    """Both branches of every block end in timm's LayerScale, as with timm's `init_values=init`."""
    for block in model.blocks:
        weight = block.attn.proj.weight
        for name in ("ls1", "ls2"):
            setattr(block, name, LayerScale(len(weight), init, device=weight.device, dtype=weight.dtype))


def apply_variant(model: VisionTransformer, variant: str, **arguments: Any) -> None:
    """Turn a DeiT into a variant; its own weights, and the random generator, stay as they are.

    Args:
        model: as timm or this package builds it.
        variant: one of `--variant`'s.
        **arguments: the variant's own: order, w0; lamb; share; doubled; init; weight.

    Raises:
        ValueError: a block that is none of a plain DeiT's.
    """
    if variant in ATTENTION:
        change_attention(model, ATTENTION[variant], **arguments)
    else:
        {"layer_scale": add_layer_scale, "patch_diversity": add_patch_diversity}[variant](model, **arguments)


def describe_variant(model: nn.Module) -> str:
    """One line: what the blocks' attention is, and which parameters no plain DeiT has."""
    kinds = dict.fromkeys(type(m).__name__ for m in model.modules() if isinstance(m, Attention))
    new = [name for name, _ in model.named_parameters() if name.endswith(NEW_PARAMETERS)]
    return f"attention: {', '.join(kinds)}; {len(new)} new parameters" + (f", {new[0]} .. {new[-1]}" if new else "")
