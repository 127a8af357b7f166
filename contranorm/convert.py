"""ContraNorm in any torch, timm or Hugging Face model: `replace_layer_norms`, and `revert` to the vanilla model.

Example:
    ```
    model = AutoModel.from_pretrained("answerdotai/ModernBERT-base")
    replace_layer_norms(model, scale=0.1, names="layers.*.mlp_norm")
    model(**tokenizer(texts, padding=True, return_tensors="pt"))  # the attention_mask reaches every ContraNorm
    ```
"""

from __future__ import annotations

import functools
import inspect
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from contranorm.layer import ContraNorm, Switches

# Arguments of a forward that say which tokens are padding: torch's are True there, the others are True at real tokens.
PADDING_ARGUMENTS = ("src_key_padding_mask", "key_padding_mask")
MASK_ARGUMENTS = (*PADDING_ARGUMENTS, "attention_mask")

_PER_HEAD = re.compile(
    r"(q|k|qk|query|key)_?(layer_?)?(norm|ln)|(layer_?)?(norm|ln)_?(q|k|qk|query|key)", re.IGNORECASE
)
# Models of transformers whose attention does not tell that it is causal, and those whose features are not (B, N, D).
_CAUSAL = re.compile(r"(Bloom|Mpt|CodeGen|OpenAIGPT|GPTNeoXJapanese|Rwkv|XGLM|(LED|FSMT|BigBirdPegasus)Decoder)\w*")
_OTHER_AXES = re.compile(r"(XLNet|SqueezeBert|FSMTEncoder)\w*")
_POOLED = re.compile(r"fc_norm|heads?|head_dist|pooler|attn_pool|classifier|pre_logits")


def replace_layer_norms(
    model: nn.Module,
    scale: float,
    names: str | Iterable[str] | None = None,
    *,
    verbose: bool = True,
    **switches: Unpack[Switches],
) -> list[str]:
    """Put ContraNorm in the place of LayerNorms, in place: LayerNorm(x) becomes LayerNorm(x - s·A·x).

    The parameters stay the very same tensors under the same names: optimizers and checkpoints of the vanilla model fit
    (`learnable` adds one `step` per norm). Padding is left out of the contrast: for the length of a forward, the
    `attention_mask` or `src_key_padding_mask` that the model is called with reaches every ContraNorm in it. It must be
    (B, N), or a larger mask that hides the same tokens from all tokens. Convert the model that is called, not a part.

    Args:
        model: any module that has nn.LayerNorm (or sub-classes, such as timm's) in it.
        scale: ContraNorm's step s.
        names: which norms, as in `model.named_modules()`: a name or a pattern such as "layers.*.norm1" (a * matches
            dots, too), or several; "!head.*" leaves norms out. By default all that see the tokens of a sequence.
        verbose: print what was replaced, and what was not and why.
        **switches: those of `ContraNorm`.

    Returns:
        The names of the norms replaced.

    Raises:
        ValueError: a pattern without a LayerNorm, or with one that would contrast the wrong axis; nothing to replace;
            bad switches. The model is then unchanged.
    """
    given = [names] if isinstance(names, str) else list(names or ())
    patterns = [pattern for pattern in given if not pattern.startswith("!")]
    by_default = names is None or (bool(given) and not patterns)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    for name in _matching(norms, [pattern[1:] for pattern in given if pattern.startswith("!")]):
        del norms[name]
    wanted = list(norms) if by_default else _matching(norms, patterns)
    refused = {name: reason for name in wanted if (reason := _refusal(model, name, norms[name]))}
    if refused and not by_default:
        raise ValueError(_by_reason(refused))
    chosen = [name for name in wanted if name not in refused]
    if not chosen:
        raise ValueError(
            f"no LayerNorm of {type(model).__name__} can be replaced: {_by_reason(refused) or 'it has none'}"
        )
    if getattr(getattr(model, "config", None), "chunk_size_feed_forward", 0):
        raise ValueError("config.chunk_size_feed_forward > 0 shows a norm a part of the tokens only: set it to 0")

    earlier = (module.padding for module in model.modules() if isinstance(module, ConvertedNorm))
    padding = next(earlier, None) or Padding()  # one for all norms, also of several calls
    replacements = {norms[name]: ConvertedNorm(norms[name], name, padding, scale, switches) for name in chosen}
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):  # a norm that is shared stays shared
            if isinstance(child, nn.LayerNorm) and child in replacements:
                setattr(parent, attribute, replacements[child])
    padding.follow(model)
    if verbose:
        print(f"ContraNorm ({scale=}) in place of {len(chosen)} LayerNorms: {', '.join(chosen)}")
        if refused:
            print(f"left as they are: {_by_reason(refused)}")
    return chosen


def revert(model: nn.Module) -> list[str]:
    """Undo `replace_layer_norms`: the vanilla modules come back, with their parameters as trained by now.

    Returns:
        The names of the norms put back; none for a vanilla model.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, ConvertedNorm)}
    for norm in found.values():
        norm.padding.norms -= 1
    for padding in {id(norm.padding): norm.padding for norm in found.values()}.values():
        if not padding.norms:  # reverted in part, the model's other norms still need the mask
            padding.forget(model)
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):
            if isinstance(child, ConvertedNorm):
                setattr(parent, attribute, child.__dict__["vanilla"].train(child.training))
                child._parameters.pop("step", None)
    return list(found)


def _matching(norms: dict[str, nn.LayerNorm], patterns: list[str]) -> list[str]:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in norms):
            raise ValueError(f"no LayerNorm is named {pattern!r}; there are {', '.join(norms) or 'none'}")
    return [name for name in norms if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _by_reason(refused: dict[str, str]) -> str:
    names: dict[str, list[str]] = {}
    for name, reason in refused.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(names[reason])} ({reason})" for reason in names)


def _refusal(model: nn.Module, name: str, norm: nn.LayerNorm) -> str | None:
    """Why ContraNorm in this place would contrast what it must not, or None."""
    *path, last = name.split(".")
    ancestors = [model.get_submodule(".".join(path[:depth])) for depth in range(len(path), -1, -1)]
    if not name:
        return "the model is itself a LayerNorm: use ContraNorm"
    if isinstance(norm, ContraNorm):
        return "it is ContraNorm already"
    if len(norm.normalized_shape) != 1:
        return f"it normalizes several dimensions, {tuple(norm.normalized_shape)}: there is no axis of tokens"
    if "2d" in type(norm).__name__.lower():
        return f"{type(norm).__name__} sees images (B, C, H, W), not tokens"
    if _PER_HEAD.fullmatch(last):
        return "it sees the queries or keys of each head: contrasting them would mix heads, not tokens"
    if any(_POOLED.fullmatch(part) for part in (*path, last)):
        return "it sees pooled vectors: contrasting them would mix the samples of a batch"
    if any(isinstance(module, nn.TransformerDecoder | nn.TransformerDecoderLayer) for module in ancestors):
        return "a decoder's token would see the tokens that follow it"
    if any(_CAUSAL.fullmatch(type(module).__name__) for module in ancestors):
        return "its attention is causal: a token would see the tokens that follow it"
    if any(_OTHER_AXES.fullmatch(type(module).__name__) for module in ancestors):
        return "its features are not (B, N, D): contrasting them would mix the samples, or the features"
    for module in ancestors:  # the nearest attention tells how this part of the model works
        attention = [m for m in module.modules() if isinstance(m, nn.MultiheadAttention) or hasattr(m, "is_causal")]
        if any(getattr(m, "is_causal", False) is True for m in attention):
            return "its attention is causal: a token would see the tokens that follow it"
        if any(isinstance(m, nn.MultiheadAttention) and not m.batch_first for m in attention):
            return "its attention has batch_first=False, (N, B, D): contrasting would mix the samples of a batch"
        if attention:
            break
    return None


class ConvertedNorm(ContraNorm):
    """ContraNorm in the place of a LayerNorm, around it: the vanilla module still does the normalizing.

    timm's fast norm, norms in float32 and hooks on the vanilla module therefore work as before.
    """

    def __init__(self, vanilla: nn.LayerNorm, name: str, padding: Padding, scale: float, switches: Switches) -> None:
        (dim,) = vanilla.normalized_shape
        like = next(vanilla.parameters(), torch.empty(0))
        affine = vanilla.elementwise_affine
        super().__init__(
            dim, scale, eps=vanilla.eps, elementwise_affine=affine, device=like.device, dtype=like.dtype, **switches
        )
        step = self._parameters.get("step")
        self._parameters = vanilla._parameters  # one dict for both: .to() and load_state_dict reach both
        if step is not None:
            self.step = step
        self.__dict__["vanilla"] = vanilla  # not as a sub-module, which would appear in the state dict
        self.name = name
        self.padding = padding
        padding.norms += 1
        self.train(vanilla.training)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """As ContraNorm's; without a mask, it is the one that the model was called with."""
        if x.is_nested:  # nn.TransformerEncoder without gradients: padding is gone already
            rows = [super(ConvertedNorm, self).forward(sequence.unsqueeze(0)).squeeze(0) for sequence in x.unbind()]
            return torch.nested.as_nested_tensor(rows, layout=x.layout)
        mask = self.padding.mask_for(x, self.name) if mask is None else mask
        try:
            return super().forward(x, mask)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}; leave it out: names='!{self.name}'") from error

    def normalize(self, x: Tensor) -> Tensor:
        """The vanilla norm."""
        normalized: Tensor = self.__dict__["vanilla"](x)
        return normalized


class _Calls(threading.local):
    """Of one thread: a server may run several forwards of one model at once.

    Attributes:
        masks: one entry per call under way of a module that takes a mask, outermost first; the last one counts.
    """

    def __init__(self) -> None:
        self.masks: list[Tensor | None] = []

    def __reduce__(self) -> Any:  # a copy starts empty
        return _Calls, ()


class Padding:
    """The padding mask of the forward that is under way in one converted model, and the hooks that learn it.

    Attributes:
        calls: the calling thread's masks.
        norms: how many norms ask for them.
        seen: the last forward had a mask; of all threads, as those of a backward pass are others.
    """

    def __init__(self) -> None:
        self.calls = _Calls()
        self.handles: list[RemovableHandle] = []
        self.norms = 0
        self.seen = False

    def mask_for(self, x: Tensor, name: str) -> Tensor | None:
        """The mask for x (B, N, D), bool (B, N) or None.

        Raises:
            ValueError: the model's mask is not one for x.
            RuntimeError: a checkpointed block is computed again, and its mask is not known there.
        """
        if not self.calls.masks:
            self._refuse_to_guess(name)
            return None
        mask = self.calls.masks[-1]
        if mask is not None and mask.shape != x.shape[:-1]:
            raise ValueError(
                f"{name}: the model's padding mask is {tuple(mask.shape)}, which does not fit {tuple(x.shape)}"
            )
        return mask

    def _refuse_to_guess(self, name: str) -> None:
        if self.seen and torch._C._current_graph_task_id() != -1:  # in a backward pass
            raise RuntimeError(
                f"{name}: computed again by gradient checkpointing, where the model's padding mask is not known: give "
                "the mask to the module that is checkpointed, as attention_mask or src_key_padding_mask"
            )

    def follow(self, model: nn.Module) -> None:
        """Hook every module that takes a mask or images, and those that checkpoint."""
        self.forget(model)
        for module in model.modules():
            parameters = list(inspect.signature(module.forward).parameters)
            if module is model or {*MASK_ARGUMENTS, "pixel_values"} & set(parameters):
                enter = functools.partial(self.enter, parameters)
                self.handles += [
                    module.register_forward_pre_hook(enter, with_kwargs=True),
                    module.register_forward_hook(self.leave, always_call=True),
                ]
            if hasattr(module, "gradient_checkpointing"):
                self.handles.append(module.register_forward_pre_hook(self.checkpoint_with_mask, prepend=True))

    def forget(self, model: nn.Module) -> None:
        """Take the hooks away again."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        for module in model.modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            if isinstance(function, _CheckpointWithMask):
                module._gradient_checkpointing_func = function.function  # type: ignore[assignment]

    def enter(self, parameters: list[str], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """A call begins: its own mask counts, unless one from further outside does already."""
        masks = self.calls.masks
        outer = masks[-1] if masks else None
        outermost = not masks
        masks.append(outer)
        given = dict(zip(parameters, args, strict=False)) | kwargs
        for value in list(given.values()):  # sentence-transformers: one dict of features
            given |= dict(value) if isinstance(value, Mapping) else {}
        causal = given.get("is_causal") is True or _is_causal(given.get("src_mask"))
        if causal and any(isinstance(m, ConvertedNorm) for m in module.modules()):  # not CLIP's text, beside its images
            raise ValueError(f"{type(module).__name__} is called with a causal mask: a token would see later ones")
        name = next((name for name in MASK_ARGUMENTS if given.get(name) is not None), None)
        if name is None and "pixel_values" in given:  # the text's mask says nothing about the image's tokens
            masks[-1] = None
        elif name is not None and outer is None and (outermost or _is_two_dimensional(given[name])):
            masks[-1] = real_tokens(given[name], padding=name in PADDING_ARGUMENTS)
            self.seen = True
        elif outermost:
            self._refuse_to_guess(type(module).__name__)
            self.seen = False

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """A call ends, be it by an exception."""
        del self.calls.masks[-1:]

    def checkpoint_with_mask(self, module: nn.Module, args: Any) -> None:
        """Have a Hugging Face layer that is checkpointed see today's mask again when it is computed again."""
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None and not isinstance(function, _CheckpointWithMask):
            module._gradient_checkpointing_func = _CheckpointWithMask(self, function)  # type: ignore[assignment]


class _CheckpointWithMask:
    """transformers' checkpointing function: hooks are outside of what it computes twice, so the mask goes along."""

    def __init__(self, padding: Padding, function: Callable[..., Any]) -> None:
        self.padding = padding
        self.function = function

    def __call__(self, compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        masks = list(self.padding.calls.masks)

        def compute_with_mask(*args: Any, **kwargs: Any) -> Any:
            calls = self.padding.calls
            before, calls.masks = calls.masks, masks
            try:
                return compute(*args, **kwargs)
            finally:
                calls.masks = before

        return self.function(compute_with_mask, *args, **kwargs)


def _is_causal(mask: Any) -> bool:
    if not _is_two_dimensional(mask) or torch.compiler.is_compiling():
        return False
    hidden = mask if mask.dtype == torch.bool else mask == -torch.inf
    return len(mask) > 1 and torch.equal(hidden, torch.ones_like(hidden).triu(1))


def _is_two_dimensional(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 2


def real_tokens(mask: Any, *, padding: bool) -> Tensor:
    """The bool (B, N) that is True at real tokens, of a mask as models take it.

    Args:
        mask: (B, N), bool, 0 and 1, or 0 and -inf to be added to scores; or (B, 1 or heads, 1 or N, N) with equal rows.
        padding: a bool mask is True at padding, as in torch; otherwise it, and 1, stands for real tokens.

    Raises:
        ValueError: it is none of these.
    """
    if not isinstance(mask, Tensor) or mask.is_nested or mask.dim() not in (2, 4):
        got = f"{tuple(mask.shape)}" if isinstance(mask, Tensor) and not mask.is_nested else type(mask).__name__
        raise ValueError(f"the padding mask must be (B, N), got {got}")
    if mask.dim() == 4:
        rows = mask[:, :1, :1]
        if not bool((mask == rows).all()):
            raise ValueError(f"{tuple(mask.shape)} hides other tokens from each token: give a padding mask (B, N)")
        mask, padding = rows[:, 0, 0], mask.is_floating_point()  # added to the scores, or True where these count
    zero: Tensor = mask == 0
    if mask.dtype == torch.bool or not mask.is_floating_point():
        return zero if padding else ~zero
    lowest = mask <= torch.finfo(mask.dtype).min
    if padding or bool(lowest.any()) or bool(zero.all()):  # added to the scores
        if not bool((zero | lowest).all()):
            raise ValueError("a float padding mask must be 0 at real tokens and -inf at the others")
        return zero
    if not bool((zero | (mask == 1)).all()):
        raise ValueError("a float attention mask must be 1 at real tokens and 0 at the others")
    return ~zero
