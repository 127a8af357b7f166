"""What a run is made of: model, weights to start from, optimizer, schedule, Mixup, loss."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models.vision_transformer import checkpoint_filter_fn
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.nn import functional as F

from contranorm import ContraNorm
from contranorm.options import ContraNormOptions
from repro.config import load_yaml
from repro.errors import UserError
from repro.weights import read_weights
from ViT_imagenet.attention import NEW_PARAMETERS, apply_variant
from ViT_imagenet.config import Config
from ViT_imagenet.models import SUFFIX, contra_norm_sites

SAME_SWITCHES = (  # what weights go with
    "tau", "identity", "scaled_identity", "axis", "symmetric", "pre_norm", "learnable", "positive",
)  # fmt: skip


def build_model(config: Config, num_classes: int) -> nn.Module:
    """The model of the config.

    Raises:
        UserError: unknown name, input size that the patch size does not divide, ContraNorm not where it should be,
            pretrained weights of another number of classes.
    """
    name = config.model.removesuffix(SUFFIX)
    if config.norm == "vanilla" and name != config.model:
        raise UserError(f"--model {config.model} has ContraNorm, --norm vanilla has none: drop one of the two")
    settings: dict[str, Any] = {}
    if config.norm == "contra":
        name += SUFFIX
        settings = {"scale": config.scale, **config.switches(), "last_norm": config.last_norm}
        settings["contra_pre_norm"] = settings.pop("pre_norm")
    if not timm.is_model(name):
        known = ", ".join(n.removesuffix(SUFFIX) for n in timm.list_models(f"deit_*{SUFFIX}"))
        raise UserError(f"--model {config.model}: not known with --norm {config.norm}; there are {known}")
    patch = int(found[1]) if (found := re.search(r"patch(\d+)", name)) else 1
    if config.input_size and config.input_size % patch:
        raise UserError(f"--input-size {config.input_size} is not a multiple of the patch size {patch} of {name}")
    if config.pretrained and not config.reset_head:  # timm would drop the head that does not fit and say nothing
        theirs = timm.get_pretrained_cfg_value(config.model.removesuffix(SUFFIX), "num_classes")
        if theirs is not None and theirs != num_classes:
            raise UserError(f"--pretrained has {theirs} classes, the data {num_classes}: add --reset-head")
    try:
        model = timm.create_model(
            name,
            pretrained=config.pretrained,
            num_classes=num_classes,
            img_size=config.input_size,
            depth=config.depth,
            pos_drop_rate=config.drop,  # timm's drop_rate is now the classifier's input alone
            proj_drop_rate=config.drop,
            drop_path_rate=config.drop_path,
            **settings,
        )
        if config.pretrained and config.reset_head:
            model.reset_classifier(num_classes)
        if config.variant is not None:
            apply_variant(model, config.variant, **config.variant_arguments())
        model.set_grad_checkpointing(config.grad_checkpointing)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"--model {config.model}: {error}") from error
    return model


def describe_norms(model: nn.Module) -> str:
    """One line: which norms are ContraNorm, with the scale and every switch that is not at its default."""
    sites = contra_norm_sites(model)
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    if not sites:
        return f"norms: none of {len(norms)} is ContraNorm (vanilla)"
    one = next(m for m in model.modules() if isinstance(m, ContraNorm))
    rest = [name for name in norms if name not in sites]
    switches = {f.name: f.default or False for f in fields(ContraNormOptions)}  # unset identity is False here
    form = [f"{name}={getattr(one, name)}" for name, usual in switches.items() if getattr(one, name) != usual]
    return f"norms: {len(sites)} of {len(norms)} are ContraNorm, {sites[0]} .. {sites[-1]} ({', '.join(form)})" + (
        f"; plain: {', '.join(rest)}" if rest else ""
    )


def load_weights(model: nn.Module, path: str, *, reset_head: bool, new_steps: bool = False) -> None:
    """Load weights, position embeddings interpolated to the model's grid.

    Args:
        model: gets the weights.
        path: as in `read_weights`.
        reset_head: leave the model's new classifier as it is.
        new_steps: leave what ContraNorm and variants add as it is where the weights, a plain DeiT's, have none.

    Raises:
        UserError: other classes, other depth or width; names the first tensor that does not fit.
    """
    mine = model.state_dict()
    theirs = checkpoint_filter_fn(read_weights(path), model)
    if reset_head:
        heads = ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")
        theirs = {k: v for k, v in theirs.items() if k not in heads} | {k: mine[k] for k in heads if k in mine}
    if new_steps:
        theirs = {k: v for k, v in mine.items() if k.endswith((".step", *NEW_PARAMETERS))} | theirs
    check_fit(model, theirs, path)
    model.load_state_dict(theirs)


def check_same_model(config: Config) -> None:
    """Raise a UserError when `--resume` names a run of another model, whose keys may be the same.

    Weights alone do not tell which norm they were trained with; the args.yaml of their run folder does.
    """
    place = Path(str(config.resume)).absolute()  # the run folder, a file in it, or RUN/checkpoints/step-N
    written = [path for folder in (place, *place.parents[:2]) if (path := folder / "args.yaml").is_file()]
    theirs = load_yaml(written[0]) if written else None
    if not isinstance(theirs, dict) or "norm" not in theirs:  # timm's own training writes an args.yaml as well
        return
    defaults = {f.name: f.default for f in fields(config)}  # of what a run did not know yet
    arguments = [f.name for f in fields(config) if "variant" in f.metadata]
    for name in ("model", "depth", "norm", "last_norm", "scale", *SAME_SWITCHES, "variant", *arguments):
        if (value := theirs.get(name, defaults[name])) != getattr(config, name):
            raise UserError(
                f"--resume {config.resume} was trained with {name}={value!r}, not {getattr(config, name)!r}"
            )


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
        shapes = [tuple(d[odd[0]].shape) if odd[0] in d else "missing" for d in (weights, mine)]
        raise UserError(f"{path} does not fit the model: {odd[0]} is {shapes[0]} there, {shapes[1]} here")


def build_optimizer(model: nn.Module, config: Config, effective_batch: int) -> torch.optim.Optimizer:
    """The optimizer, from timm: no weight decay on biases, norms, tokens and position embeddings."""
    if config.opt not in list_optimizers():
        raise UserError(f"--opt {config.opt}: timm has {', '.join(list_optimizers()[:12])}, …")
    fused = {"fused": True} if config.fused_optimizer else {}
    return create_optimizer_v2(model, **{**optimizer_kwargs(config), "lr": peak_lr(config, effective_batch)}, **fused)


def peak_lr(config: Config, effective_batch: int) -> float:
    """The rate after the warm-up: lr per 512 images, as in DeiT."""
    return config.lr if config.unscaled_lr else config.lr * effective_batch / 512


def build_scheduler(optimizer: torch.optim.Optimizer, config: Config, steps_per_epoch: int) -> Scheduler:
    """Cosine with warm-up; a function of the epoch, or of the step with `sched_on_updates`."""
    settings = scheduler_kwargs(config) | {"warmup_epochs": min(config.warmup_epochs, config.epochs)}
    return create_scheduler_v2(optimizer, **settings, updates_per_epoch=steps_per_epoch)[0]


def build_mixup(config: Config, num_classes: int, size: int) -> Mixup | None:
    """Mixup and CutMix from timm for images of size x size pixels, or None when both are off."""
    if not config.mixes:
        return None
    if config.cutmix_minmax and len({int(size * share) for share in config.cutmix_minmax}) == 1:
        raise UserError(f"--cutmix_minmax {list(config.cutmix_minmax)} is less than a pixel wide, of {size}: widen it")
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        cutmix_minmax=config.cutmix_minmax,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        mode=config.mixup_mode,
        label_smoothing=config.smoothing,
        num_classes=num_classes,
    )


def build_loss(config: Config, model: nn.Module, num_classes: int) -> nn.Module:
    """Cross-entropy against what the batch carries (mixed targets or labels), and distillation.

    Raises:
        UserError: distillation into a model without the token for it, a teacher that does not fit.
    """
    if config.bce_loss:
        return BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0)
    loss = SoftTargetCrossEntropy() if config.mixes else LabelSmoothingCrossEntropy(config.smoothing)
    if config.distillation_type == "none":
        return loss
    if not hasattr(model, "set_distilled_training"):
        raise UserError(f"--distillation_type needs a distilled model, {config.model} has no distillation token")
    teacher = build_teacher(config, num_classes)
    return DistillationLoss(loss, teacher, config.distillation_type, config.distillation_alpha, config.distillation_tau)


class DistillationLoss(nn.Module):
    """Distillation from a teacher (Touvron et al., ICML 2021) into the student's second token.

    (1 - α)·base(logits, target) + α·distillation(logits of the distillation token, teacher).

    Hard: cross-entropy with the teacher's most likely class. Soft: τ²·KL(teacher ‖ student) at temperature τ, the mean
    over images (DeiT's code divides by the number of classes too, which all but switches it off at 1,000).
    """

    def __init__(self, base: nn.Module, teacher: nn.Module, kind: str, alpha: float, tau: float) -> None:
        super().__init__()
        self.base = base
        self.teacher = teacher.eval().requires_grad_(False)
        self.kind = kind
        self.alpha = alpha
        self.tau = tau

    def forward(self, images: Tensor, outputs: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        """Loss of one batch; images (B, 3, H, W), outputs two (B, C), target (B,) or (B, C)."""
        logits, distilled = outputs
        with torch.no_grad():
            taught = self.teacher(images).float()  # (B, C)
        if self.kind == "hard":
            second = F.cross_entropy(distilled.float(), taught.argmax(dim=1))
        else:
            student = F.log_softmax(distilled.float() / self.tau, dim=1)
            second = self.tau**2 * F.kl_div(
                student, F.log_softmax(taught / self.tau, dim=1), reduction="batchmean", log_target=True
            )
        return (1 - self.alpha) * self.base(logits, target) + self.alpha * second


def build_teacher(config: Config, num_classes: int) -> nn.Module:
    """The teacher of the config with its weights."""
    if not timm.is_model(config.teacher_model):
        raise UserError(f"--teacher_model {config.teacher_model}: timm has no such model")
    if config.teacher_path is None:
        raise UserError("--teacher_model needs --teacher_path: an untrained teacher teaches nothing")
    teacher: nn.Module = timm.create_model(config.teacher_model, num_classes=num_classes)
    load_weights(teacher, config.teacher_path, reset_head=False)
    return teacher
