"""Settings of one DeiT run; the flags have the reference's names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from contranorm.options import ContraNormOptions
from contranorm.variants import VariantOptions, argument
from repro.config import CellLabel
from repro.holdout import check_hold_out
from repro.images.config import ImageFields

FUSED_OPTIMIZERS = ("adam", "adamw", "sgd")


@dataclass(kw_only=True)
class Config(ContraNormOptions, VariantOptions, ImageFields):
    """Training, evaluation and fine-tuning of DeiT with or without ContraNorm, or one of its rivals."""

    EXECUTION_FIELDS: ClassVar[tuple[str, ...]] = (
        *ImageFields.EXECUTION_FIELDS, "implementation", "cpu", "channels_last", "fused_optimizer",
        "checkpoint_every", "eval_every", "probe", "grad_checkpointing",
    )  # fmt: skip

    # -- model
    model: str = "deit_tiny_patch16_224"
    """timm name of the DeiT, without suffix: --norm decides which norms it gets."""
    depth: int = 12
    """Blocks. The paper trains 12, 16 and 24."""
    norm: Literal["contra", "vanilla"] = "contra"
    """contra puts ContraNorm at every norm; vanilla is the DeiT as published. --scale 0 is refused: it would be a
    second, hidden name for vanilla."""
    last_norm: Literal["contra", "vanilla"] = "contra"
    """The final norm. contra as in the reference: `every` norm of the network."""
    variant: (
        Literal["none", "attn_scale", "feat_scale", "layer_scale", "gfsa", "neutreno", "resformer", "patch_diversity"]
        | None
    ) = None
    """Another remedy against oversmoothing, with --norm vanilla or beside ContraNorm; unset or none is neither."""
    feat_scale_doubled: bool | None = argument("feat_scale", False, "doubled")
    """Add FeatScale's terms twice, as the released code does; unset: once."""
    layer_scale_init: float | None = argument("layer_scale", 1e-5, "γ")
    """Where LayerScale's γ starts. Unset: 1e-5, CaiT S24's; CaiT S36 and DeiT III take 1e-6; 1 starts as vanilla."""
    patch_diversity_weight: float | None = argument("patch_diversity", 1.0, "weight")
    """Weight of the patch-diversity losses in the loss. Unset: 1, as for the class loss; 0 is vanilla."""
    input_size: int | None = None
    """Image side in pixels; by default the one in the model's name. The patch size must divide it."""
    drop: float = 0.0
    """Dropout after the position embeddings and, in every block, after attention's projection and both layers of the
    MLP; none before the head. This is what the flag did in the timm of DeiT's code, 0.3.2. DeiT uses none."""
    drop_path: float = 0.1
    """Stochastic depth, rising from 0 to this over the blocks. DeiT's value."""

    hold_out: float | None = None
    """Share of the training images, the same for every seed, that is not trained on and evaluated in place of the test
    images, as validation: to choose settings by (repro.tune). Unset: none."""

    # -- optimization
    epochs: int = 300
    """DeiT's value."""
    batch_size: int = 64
    """Images per process and micro-batch. DeiT: 64 on each of 16 GPUs."""
    accumulate: int = 1
    """Micro-batches per step. The effective batch is batch_size x accumulate x processes."""
    effective_batch: int | None = None
    """Images per step, whatever the number of processes: --accumulate follows from it. A multiple of batch_size x
    processes."""
    lr: float = 5e-4
    """Learning rate per 512 images: it is multiplied by effective batch / 512, as in DeiT, unless --unscaled-lr."""
    unscaled_lr: bool = field(default=False, metadata={"aliases": ("unscale_lr",)})
    """Take --lr as it is."""
    min_lr: float = 1e-5
    """Where the cosine ends. DeiT's value."""
    warmup_lr: float = 1e-6
    """Where the warm-up begins. DeiT's value."""
    warmup_epochs: int = 5
    """DeiT's value."""
    sched: Literal["cosine"] = "cosine"
    """Learning-rate schedule. The recipe has this one."""
    sched_on_updates: bool = False
    """Change the rate at every step instead of every epoch (DeiT): better for runs of few epochs."""
    opt: str = "adamw"
    """Name of a timm optimizer."""
    opt_eps: float = 1e-8
    """Epsilon of the Adam family."""
    opt_betas: tuple[float, float] = (0.9, 0.999)
    """Betas of the Adam family."""
    momentum: float = 0.9
    """For the optimizers that use it (sgd)."""
    weight_decay: float = 0.05
    """Not on biases, norms, tokens and position embeddings. DeiT's value."""
    clip_grad: float | None = None
    """Largest norm of the gradient. DeiT does not clip."""
    model_ema: bool = True
    """Keep an exponential moving average of the weights and evaluate it too."""
    model_ema_decay: float = 0.99996
    """DeiT's value, for 300 epochs of ImageNet: short runs need a smaller one."""

    # -- augmentation
    repeated_aug: bool = True
    """Each image three times per step, differently augmented; an epoch sees a third of the images. DeiT's default."""
    color_jitter: float = 0.3
    """Only in use without --aa."""
    aa: str = "rand-m9-mstd0.5-inc1"
    """timm's RandAugment or AutoAugment policy; `none` for none."""
    train_interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random"] = "bicubic"
    """Of the random resized crop. DeiT's value."""
    eval_crop_ratio: float = 0.875
    """Evaluation resizes to input_size / this and crops the centre. DeiT's value; 1 keeps small images whole."""
    reprob: float = 0.25
    """Probability of random erasing. DeiT's value."""
    remode: Literal["const", "rand", "pixel"] = "pixel"
    """What random erasing writes. DeiT's value."""
    recount: int = 1
    """Rectangles erased."""
    mixup: float = 0.8
    """Mixup's alpha; 0 switches it off. DeiT's value."""
    cutmix: float = 1.0
    """CutMix's alpha; 0 switches it off. DeiT's value."""
    cutmix_minmax: tuple[float, float] | None = None
    """Range of CutMix's box sides, as shares of the image's; replaces --cutmix."""
    mixup_prob: float = 1.0
    """Share of batches that are mixed."""
    mixup_switch_prob: float = 0.5
    """Share of the mixed batches that get CutMix when both are on."""
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    """One draw per batch, per pair of images, or per image."""
    smoothing: float = 0.1
    """Label smoothing. DeiT's value."""
    bce_loss: bool = False
    """Binary cross-entropy, every class of a mixed image a full target, as in DeiT III. Needs --smoothing 0."""
    three_augment: bool = field(default=False, metadata={"aliases": ("ThreeAugment",)})
    """DeiT III's augmentation in place of --aa and --reprob: greyscale, solarization or blur, then --color-jitter."""
    src: bool = False
    """With --three_augment: a random crop of the resized image in place of the random resized crop."""

    # -- distillation
    teacher_model: str | None = None
    """timm name of the teacher. DeiT's is regnety_160."""
    teacher_path: str | None = None
    """Its weights: safetensors, or a .pth that holds tensors only."""
    distillation_type: Literal["none", "soft", "hard"] = "none"
    """hard: the teacher's decision as a second label; soft: its probabilities at --distillation-tau."""
    distillation_alpha: float = 0.5
    """Weight of the teacher's share."""
    distillation_tau: float = 1.0
    """Temperature of soft distillation."""

    # -- starting points
    pretrained: bool = False
    """Start from timm's weights of the plain DeiT (downloads)."""
    finetune: str | None = None
    """Start from these weights; position embeddings are interpolated to --input-size."""
    reset_head: bool = False
    """With --finetune or --pretrained: a new head for a data set with other classes, to be trained."""
    resume: str | None = None
    """A run folder, checkpoint folder or weights file to resume from. A run resumes in its own --output_dir without
    this flag."""
    eval: bool = False
    """Only evaluate the weights given by --resume, --finetune or --pretrained."""

    # -- how it runs
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast. bf16 on recent GPUs; on CPUs without AMX it is slower than float32."""
    grad_checkpointing: bool = False
    """Compute each block again in the backward pass in place of keeping its features: slower, for less memory."""
    channels_last: bool = False
    """Memory layout of the images: helps the patch embedding on GPUs."""
    fused_optimizer: bool = True
    """One kernel for the whole optimizer step, for adam, adamw and sgd."""
    cpu: bool = False
    """Use the CPU even where there is a GPU."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 saves at the end of each epoch."""
    eval_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    probe: bool = False
    """Before and after training, record collapse metrics after every block and the last one's singular spectrum, on one
    batch of evaluation images."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if self.norm == "contra":
            if not self.scale:
                raise ValueError("--norm contra needs a step, such as --scale 0.1; the vanilla DeiT is --norm vanilla")
            self.identity = bool(self.identity)  # Eq. 6 unless asked for: the released form for images
            self.check_switches()
        else:
            if given := self.changed_switches():
                raise ValueError(f"--norm vanilla has no ContraNorm, so --{given[0]} has no meaning: drop one of them")
            self.last_norm = "vanilla"
        self.check_variant()
        check_hold_out(self.hold_out)
        if self.grad_checkpointing and self.variant in ("neutreno", "resformer", "patch_diversity"):
            raise ValueError(
                f"--grad_checkpointing computes each block alone, but --variant {self.variant} takes the first block's "
                "features along to later ones: drop one of the two"
            )
        for name in ("layer_scale_init", "patch_diversity_weight", "weight_decay", "min_lr", "warmup_lr", "opt_eps",
                     "momentum", "color_jitter", "mixup", "cutmix"):  # fmt: skip
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"--{name} must be at least 0 and finite, got {getattr(self, name)}")
        self.check_image_fields()
        for name in ("depth", "epochs", "batch_size", "accumulate", "eval_every", "recount"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        for name in ("checkpoint_every", "warmup_epochs", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must not be negative, got {getattr(self, name)}")
        for name in ("drop", "drop_path", "reprob", "mixup_prob", "mixup_switch_prob", "distillation_alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} must be between 0 and 1, got {getattr(self, name)}")
        if not 0 <= self.smoothing < 1 or not 0 <= self.model_ema_decay < 1:
            raise ValueError("--smoothing and --model_ema_decay must be at least 0 and below 1")
        if not all(0 <= beta < 1 for beta in self.opt_betas):
            raise ValueError(f"--opt_betas must be at least 0 and below 1, got {list(self.opt_betas)}")
        if self.cutmix_minmax is not None and not 0 <= self.cutmix_minmax[0] < self.cutmix_minmax[1] <= 1:
            raise ValueError(f"--cutmix_minmax must rise and lie in [0, 1], got {list(self.cutmix_minmax)}")
        if self.effective_batch is not None and (self.accumulate != 1 or self.effective_batch % self.batch_size):
            raise ValueError(
                f"--effective_batch {self.effective_batch} must be a multiple of --batch_size {self.batch_size}, and "
                "--accumulate follows from it: leave that out"
            )
        if self.bce_loss and (self.smoothing or self.distillation_type != "none"):
            raise ValueError(
                "--bce_loss needs --smoothing 0, since every class above 0 is a target, and no distillation"
            )
        if self.src and not self.three_augment:
            raise ValueError("--src belongs to --three_augment: add it, or leave --src out")
        for name in ("lr", "effective_batch", "eval_crop_ratio", "distillation_tau", "input_size",
                     "clip_grad"):  # fmt: skip
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"--{name} must be above 0, got {getattr(self, name)}")
        if self.mixes and self.batch_size % 2:
            raise ValueError(f"Mixup and CutMix pair images: --batch_size must be even, got {self.batch_size}")
        if (self.distillation_type != "none") != (self.teacher_model is not None):
            raise ValueError("--distillation_type soft or hard and --teacher_model go together")
        if self.teacher_path and not self.teacher_model:
            raise ValueError("--teacher_path needs --teacher_model")
        if self.fused_optimizer and self.opt not in FUSED_OPTIMIZERS:
            raise ValueError(f"--opt {self.opt} has no fused step: add --no_fused_optimizer")
        if self.eval and not (self.resume or self.finetune or self.pretrained):
            raise ValueError("--eval needs weights: --resume, --finetune or --pretrained")
        if self.reset_head and not (self.finetune or self.pretrained):
            raise ValueError("--reset_head needs --finetune or --pretrained")
        if self.reset_head and self.eval:
            raise ValueError("--eval with --reset_head would evaluate an untrained head: drop one of the two")
        if sum(map(bool, (self.resume, self.finetune, self.pretrained))) > 1:
            raise ValueError("--resume, --finetune and --pretrained are different starting points: give one")

    def label(self) -> CellLabel:
        """Data set, model and depth; vanilla, ContraNorm with its step, the variant, or both of these."""
        method, order = self.method(self.step_name() if self.norm == "contra" else "", self.scale or 0)
        note = self.variant_note(f"{self.epochs} epochs")
        return CellLabel(self.data_set, self.model, method, order, self.depth, self.scale, self.family(method), note)

    @property
    def mixes(self) -> bool:
        """Whether Mixup or CutMix is on."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None
