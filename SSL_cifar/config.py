"""Settings that all methods share; a method's own flags stand in its file, as `Settings`, which sub-classes this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from repro.config import CellLabel
from repro.images.config import DataSet, ImageFields


@dataclass(kw_only=True)
class Config(ImageFields):
    """Self-supervised pre-training with one method."""

    EXECUTION_FIELDS: ClassVar[tuple[str, ...]] = (
        *ImageFields.EXECUTION_FIELDS, "cpu", "checkpoint_every", "knn_every", "knn_chunk", "probe",
        "shifts",
    )  # fmt: skip
    TITLE: ClassVar[str] = ""  # the method's name in tables
    ORDER: ClassVar[float] = 0  # its place among the methods of a table
    NEEDS_VIT: ClassVar[bool] = False  # whether the method works on patches

    method: str
    """Name of a file in SSL_cifar/methods; its own flags are those of its `Settings`."""

    # -- data
    data_set: DataSet = "CIFAR10"
    """As in ViT_imagenet."""
    crop_size: int = 32
    """Side of the images that the network gets, in pixels."""
    eval_crop_ratio: float = 1.0
    """Evaluation resizes the shorter side to crop_size / this and crops the centre; 1 keeps small images whole. For 224
    pixels: 0.875."""
    augment: Literal[
        "solo_cifar", "solo_cifar_byol", "solo_imagenet", "solo_imagenet_byol", "simclr_cifar", "simclr_imagenet",
        "moco_v2", "mae", "none",
    ] = "solo_cifar"  # fmt: skip
    """How views are made of an image; the presets are in augment.py, each with its source."""

    # -- network
    backbone: Literal["resnet18", "resnet50", "vit_micro", "vit_tiny", "vit_small", "vit_base"] = "resnet18"
    """vit_micro is 192 wide with 4 blocks, for CPUs; the others have their usual sizes."""
    stem: Literal["cifar", "cifar_pad2", "s2", "imagenet"] = "cifar_pad2"
    """Of a ResNet: a 3x3 convolution without max-pooling, with padding 1 or (the authors') 2, or with stride 2 (for
    CPUs); imagenet is 7x7 with stride 2 and max-pooling."""
    width: int = 64
    """Channels of a ResNet's first stage. 64 is ResNet's; 16 is for CPUs."""
    patch_size: int = 4
    """Side of a ViT's patches, in pixels."""

    # -- optimization
    epochs: int = 200
    """Passes over the training images; the last incomplete batch of a pass is left out, as by the authors."""
    batch_size: int = 256
    """Images of a step, over all processes: the losses depend on the whole batch, so it is not accumulated."""
    opt: Literal["sgd", "lars", "larc", "adamw"] = "sgd"
    """larc is LARS whose trust ratio never enlarges a step, the authors' choice for BYOL. sgd decays every weight, as
    the authors' does; the others leave biases and norms alone."""
    lr: float = 0.5
    """Learning rate per 256 images of a step, unless --unscaled_lr."""
    unscaled_lr: bool = False
    """Take --lr as it is."""
    weight_decay: float = 1e-5
    """The authors' value for CIFAR."""
    momentum: float = 0.9
    """Of sgd, lars and larc."""
    trust_coeff: float = 0.02
    """Of lars and larc; the authors' for BYOL. SimCLR's is 0.001."""
    warmup_epochs: float = 10.0
    """The rate rises linearly for so long, then falls to 0 along a cosine, step by step."""
    warmup_lr: float = 3e-5
    """Where the warm-up begins."""

    # -- how it runs
    precision: Literal["no", "bf16"] = "no"
    """bf16: autocast of the network. Losses, filters and banks stay in float32 or float64."""
    cpu: bool = False
    """Use the CPU even where there is a GPU."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 saves at the end of each epoch."""
    knn_every: int = 0
    """Epochs between k-NN evaluations; 0 evaluates at the end only."""
    knn_chunk: int = 1024
    """Test images that k-NN compares with all training images at a time: memory, not numbers."""
    probe: bool = True
    """Train a linear classifier on the frozen features at the end. k-NN is always evaluated."""
    shifts: bool = False
    """Test that classifier also on images that are rotated, grey, blurred, of another hue, or noisy (shifts.py)."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        self.check_image_fields()
        for name in ("epochs", "width", "patch_size", "crop_size", "knn_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        for name in ("checkpoint_every", "knn_every", "warmup_epochs", "warmup_lr", "weight_decay", "momentum", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name} must not be negative, got {getattr(self, name)}")
        for name in ("lr", "trust_coeff"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} must be above 0, got {getattr(self, name)}")
        if not 0 < self.eval_crop_ratio <= 1:
            raise ValueError(f"--eval_crop_ratio must be above 0 and at most 1, got {self.eval_crop_ratio}")
        if self.batch_size < 2:
            raise ValueError(f"--batch_size {self.batch_size}: images are compared within a batch: at least 2")
        if self.shifts and not self.probe:
            raise ValueError("--shifts tests the linear classifier, which --no_probe leaves out: drop one of the two")
        vit = self.backbone.startswith("vit")
        if self.NEEDS_VIT and not vit:
            raise ValueError(f"--method {self.method} works on patches: give --backbone vit_..., not {self.backbone}")
        unused = ("stem", "width") if vit else ("patch_size",)
        for name in unused:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"--{name} has no meaning with --backbone {self.backbone}: leave it out")
        if vit and self.crop_size % self.patch_size:
            raise ValueError(f"--crop_size {self.crop_size} is not a multiple of --patch_size {self.patch_size}")
        self.check()

    def check(self) -> None:
        """Refuse what makes no sense for the method; a ValueError in one line."""

    def knob(self) -> tuple[str, float]:
        """What is varied of the method: words that follow its title in tables, and their sort key."""
        return "", 0.0

    def vit_options(self) -> dict[str, Any]:
        """What the method needs a ViT to be like: keywords of timm's VisionTransformer."""
        return {}

    @property
    def peak_lr(self) -> float:
        """The rate after the warm-up."""
        return self.lr if self.unscaled_lr else self.lr * self.batch_size / 256

    def label(self) -> CellLabel:
        """Data set, backbone, and the method with what is varied of it."""
        words, key = self.knob()
        method = f"{self.TITLE} {words}".strip()
        return CellLabel(data=self.data_set, model=self.backbone, method=method, order=(self.ORDER, key))
