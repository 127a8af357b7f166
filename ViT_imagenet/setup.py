"""What a run is made of: model, weights to start from, optimizer, schedule, loss."""

from __future__ import annotations

import re
from pathlib import Path
from pickle import UnpicklingError  # what torch.load(weights_only=True) raises; nothing is unpickled
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models.vision_transformer import checkpoint_filter_fn
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from contranorm import ContraNorm
from repro.checkpoint import list_checkpoints, read_checkpoint
from repro.errors import UserError
from ViT_imagenet.config import FUSED_OPTIMIZERS, Config
from ViT_imagenet.models import SUFFIX, contra_norm_sites


def build_model(config: Config, num_classes: int) -> nn.Module:
    """The model of the config.

    Raises:
        UserError: unknown name, input size that the patch size does not divide, ContraNorm not where it should be.
    """
    name = config.model.removesuffix(SUFFIX)
    if config.norm == "layer" and name != config.model:
        raise UserError(f"--model {config.model} has ContraNorm, --norm layer has none: drop one of the two")
    if config.norm == "contra":
        name += SUFFIX
    if not timm.is_model(name):
        known = ", ".join(sorted(n.removesuffix(SUFFIX) for n in timm.list_models(f"deit_*{SUFFIX}")))
        raise UserError(f"--model {config.model}: not known with --norm {config.norm}; there are {known}")
    size = config.input_size or side_of(name)
    patch = int(re.search(r"patch(\d+)", name).group(1)) if "patch" in name else 1  # type: ignore[union-attr]
    if size % patch:
        raise UserError(f"--input-size {size} is not a multiple of the patch size {patch} of {name}")
    settings: dict[str, Any] = {}
    if config.norm == "contra":
        settings = {
            "scale": config.scale,
            "tau": config.temp,
            "identity": config.identity,
            "symmetric": config.dual_norm,
            "contra_pre_norm": config.pre_norm,
            "learnable": config.learnable,
            "positive": config.positive,
            "last_norm": config.last_norm,
        }
    try:
        model: nn.Module = timm.create_model(
            name,
            pretrained=config.pretrained and not config.reset_head,
            num_classes=num_classes,
            img_size=size,
            depth=config.depth,
            drop_rate=config.drop,
            drop_path_rate=config.drop_path,
            **settings,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"--model {config.model}: {error}") from error
    _check_sites(model, config)
    return model


def side_of(name: str) -> int:
    """Image side that a model was made for."""
    cfg = timm.get_pretrained_cfg(name)
    return int(cfg.input_size[-1]) if cfg else 224


def _check_sites(model: nn.Module, config: Config) -> None:
    """What was asked for is what was built: two norms a block, and the final one."""
    expected = 0 if config.norm == "layer" else 2 * config.depth + (config.last_norm == "contra")
    sites = contra_norm_sites(model)
    if len(sites) != expected:
        raise UserError(f"--model {config.model} has {len(sites)} ContraNorm sites, {expected} were asked for")


def describe_norms(model: nn.Module) -> str:
    """One line: which norms are ContraNorm."""
    sites = contra_norm_sites(model)
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    if not sites:
        return f"norms: none of {len(norms)} is ContraNorm (vanilla)"
    one = next(m for m in model.modules() if isinstance(m, ContraNorm))
    rest = [name for name in norms if name not in sites]
    return (
        f"norms: {len(sites)} of {len(norms)} are ContraNorm, {sites[0]} .. {sites[-1]} (scale={one.scale}, "
        f"tau={one.tau}, identity={one.identity}, symmetric={one.symmetric}, pre_norm={one.pre_norm}, "
        f"learnable={one.learnable})" + (f"; plain: {', '.join(rest)}" if rest else "")
    )


def read_weights(path: str) -> dict[str, torch.Tensor]:
    """State dict from a run folder, a checkpoint folder, a .safetensors file, or a .pth that holds tensors only.

    Raises:
        UserError: nothing readable there.
    """
    place = Path(path)
    try:
        if place.is_dir():
            if (place / "model.safetensors").exists():
                return load_file(place / "model.safetensors")
            return dict(_read_newest(place)["model"])
        if place.suffix == ".safetensors":
            return load_file(place)
        tree = torch.load(place, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError, EOFError, UnpicklingError) as error:
        raise UserError(f"{path}: no weights readable there ({error})") from error
    return dict(tree.get("model", tree))


def read_state(path: str) -> dict[str, Any]:
    """The whole training state of a run folder or checkpoint folder, for `--resume`.

    Raises:
        UserError: no whole checkpoint there.
    """
    try:
        return dict(_read_newest(Path(path)))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--resume {path}: no checkpoint to go on from ({error}); finished runs keep only weights, for --finetune"
        ) from error


def _read_newest(place: Path) -> Any:
    """The state in a checkpoint folder, or in the newest one of a run folder."""
    if place.name.startswith("step-"):
        return read_checkpoint(place)["state"]
    found = list_checkpoints(place / "checkpoints") or list_checkpoints(place)
    if not found:
        raise ValueError("neither model.safetensors nor a checkpoint")
    return read_checkpoint(found[-1])["state"]


def load_weights(model: nn.Module, path: str, *, reset_head: bool, new_steps: bool = False) -> None:
    """Load weights, position embeddings interpolated to the model's grid.

    Args:
        model: gets the weights.
        path: as in `read_weights`.
        reset_head: leave the model's new classifier as it is.
        new_steps: leave learnable steps of ContraNorm as they are where the weights, a plain DeiT's, have none.

    Raises:
        UserError: other classes, other depth or width; names the first tensor that does not fit.
    """
    mine = model.state_dict()
    theirs = checkpoint_filter_fn(read_weights(path), model)
    if reset_head:
        heads = ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")
        theirs = {k: v for k, v in theirs.items() if k not in heads} | {k: mine[k] for k in heads if k in mine}
    if new_steps:
        theirs = {k: v for k, v in mine.items() if k.endswith(".step")} | theirs
    check_fit(model, theirs, path)
    model.load_state_dict(theirs)


def check_fit(model: nn.Module, weights: dict[str, torch.Tensor], path: str) -> None:
    """Raise a UserError that names what is different when `weights` from `path` are not the model's."""
    mine = model.state_dict()
    head = "head.weight"
    if head in weights and head in mine and weights[head].shape[0] != mine[head].shape[0]:
        raise UserError(
            f"{path} has {weights[head].shape[0]} classes, the data {mine[head].shape[0]}: use the data it was trained "
            "on, or --finetune with --reset-head"
        )
    odd = [k for k in {**mine, **weights} if k not in mine or k not in weights or mine[k].shape != weights[k].shape]
    if odd:
        told = [tuple(d[odd[0]].shape) if odd[0] in d else "missing" for d in (weights, mine)]
        raise UserError(f"{path} does not fit the model: {odd[0]} is {told[0]} there, {told[1]} here")


def build_optimizer(model: nn.Module, config: Config, effective_batch: int) -> torch.optim.Optimizer:
    """The optimizer, from timm: no weight decay on biases, norms, tokens and position embeddings."""
    if config.opt not in list_optimizers():
        raise UserError(f"--opt {config.opt}: timm has {', '.join(list_optimizers()[:12])}, …")
    adaptive = {"eps": config.opt_eps, "betas": config.opt_betas} if "adam" in config.opt else {}
    fused = {"fused": True} if config.fused_optimizer and config.opt in FUSED_OPTIMIZERS else {}
    return create_optimizer_v2(
        model,
        opt=config.opt,
        lr=peak_lr(config, effective_batch),
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        **adaptive,
        **fused,
    )


def peak_lr(config: Config, effective_batch: int) -> float:
    """The rate after the warm-up: lr per 512 images, as in DeiT."""
    return config.lr if config.unscaled_lr else config.lr * effective_batch / 512


def build_scheduler(optimizer: torch.optim.Optimizer, config: Config, steps_per_epoch: int) -> Scheduler:
    """Cosine with warm-up; a function of the epoch, or of the step with `sched_on_updates`."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.sched,
        num_epochs=config.epochs,
        warmup_epochs=min(config.warmup_epochs, config.epochs),
        warmup_lr=config.warmup_lr,
        min_lr=config.min_lr,
        step_on_epochs=not config.sched_on_updates,
        updates_per_epoch=steps_per_epoch,
    )
    return scheduler


def base_loss(config: Config) -> nn.Module:
    """Cross-entropy against what the batch carries: mixed targets, smoothed labels, or labels."""
    if config.mixes:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(config.smoothing) if config.smoothing else nn.CrossEntropyLoss()
