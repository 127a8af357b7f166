"""Train a classifier on a finished run: `python -m SSL_cifar.linear --model out/run --output_dir out/linear`.

Every run's own record holds a logistic regression. These are the published protocols, image by image augmented, for
comparison with other work. One process.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import load_file
from timm.data import create_transform
from timm.optim import Lars, param_groups_layer_decay
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import transforms as T
from tqdm import tqdm

from repro.config import CellLabel, RunConfig, default_data_root, load_yaml, parse_config
from repro.errors import UserError, run_main
from repro.files import write_atomic
from repro.images.data import load_data
from repro.images.loader import Augmented, BadImages, SampleRef, make_loader
from repro.run.run import Run, train_cell
from repro.seeding import derive_seed, seed_everything
from repro.weights import to_safetensors
from SSL_cifar import backbones, methods
from SSL_cifar.augment import Augment
from SSL_cifar.config import Config
from SSL_cifar.evaluation import Evaluation
from SSL_cifar.main import parse
from SSL_cifar.methods.base import Method

PRELOAD = ("SSL_cifar.linear",)  # what a process that starts many runs imports once for all of them
ORDER, AUGMENTATION, DROPOUT = 0, 1, 2  # what a derived seed is for


@dataclass(frozen=True)
class Protocol:
    """How a classifier is trained; the fields that have flags are the flags' defaults."""

    epochs: int
    batch_size: int
    lr: float
    opt: str
    schedule: str  # steps: a tenth at 60 % and again at 80 %; linear: to 0; cosine: to 0, after the warm-up
    per_256: bool = False  # lr is multiplied by batch_size / 256
    weight_decay: float = 0.0
    warmup: float = 0.0  # share of the epochs
    batch_norm: bool = False  # non-affine, before the classifier
    finetune: bool = False
    smoothing: float = 0.0


PROTOCOLS = {
    # bash_files/linear/imagenet-100 of Rank-Differential-Mechanism; its BYOL runs have lr 0.3
    "offline": Protocol(100, 256, 30.0, "sgd", "steps"),
    # GRAPH-ATTENTION/configs/cifar_eval.yaml of Message-Passing-Contrastive-Learning: 8,000 steps of 1,024 images
    "simclr": Protocol(163, 1024, 0.1, "sgd", "linear", weight_decay=1e-4),
    # main_linprobe.py and main_finetune.py of ClusterMIM
    "mae_lin": Protocol(90, 512, 0.1, "lars", "cosine", per_256=True, warmup=10 / 90, batch_norm=True),
    "mae_ft": Protocol(
        50, 64, 1e-3, "adamw", "cosine", per_256=True, weight_decay=0.05, warmup=5 / 50, finetune=True, smoothing=0.1
    ),
}
LAYER_DECAY, DROP_PATH, ERASE, RAND_AUGMENT = 0.75, 0.1, 0.25, "rand-m9-mstd0.5-inc1"  # of mae_ft


@dataclass(kw_only=True)
class LinearConfig(RunConfig):
    """A classifier on top of a finished run."""

    EXECUTION_FIELDS: ClassVar[tuple[str, ...]] = (*RunConfig.EXECUTION_FIELDS, "data_path", "num_workers", "cpu")

    model: str
    """Folder of the finished run of SSL_cifar.main."""
    seed: int | None = None  # type: ignore[assignment]  # never None once made
    """Seed of everything that is drawn; unset: the finished run's."""
    pretrain_epochs: int | None = None
    """Of the finished run, which says it: classifiers on different pre-trainings are never averaged. Leave it out."""
    pretrain_settings: str | None = None
    """The same for its other settings that are not the defaults. Leave it out."""
    protocol: Literal["offline", "simclr", "mae_lin", "mae_ft"] = "offline"
    """offline: SGD, a tenth at 60 % and 80 % of the epochs. simclr: SGD, linearly to 0, from a zero classifier.
    mae_lin: LARS, BatchNorm before the classifier. mae_ft: fine-tuning of a ViT."""
    epochs: int | None = None
    """Unset: the protocol's."""
    batch_size: int | None = None
    """Unset: the protocol's."""
    lr: float | None = None
    """Unset: the protocol's. offline takes 30 for SimSiam and 0.3 for BYOL."""
    data_path: str | None = None
    """Where the images are now; unset: where the run had them, or the data set's folder below --data_root."""
    num_workers: int = 4
    """Processes that decode and augment; 0 does it in the training process."""
    cpu: bool = False
    """Use the CPU even where there is a GPU."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        for name in ("epochs", "batch_size", "lr"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"--{name} must be above 0, got {getattr(self, name)}")
        for name in ("num_workers", "seed"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"--{name} must not be negative, got {getattr(self, name)}")
        if self.chosen.finetune and not self.trained.backbone.startswith("vit"):
            raise ValueError(f"--protocol {self.protocol} is for ViTs, {self.model} has a {self.trained.backbone}")
        if self.seed is None:
            self.seed = self.trained.seed
        found = {"pretrain_epochs": self.trained.epochs, "pretrain_settings": _changed(self.trained)}
        for name, value in found.items():
            if getattr(self, name) not in (None, value):
                raise ValueError(f"--{name} {getattr(self, name)}: {self.model} has {value}: leave it out")
            setattr(self, name, value)

    @functools.cached_property
    def trained(self) -> Config:
        """The settings of the finished run."""
        folder = Path(self.model)
        if not (folder / "model.safetensors").exists():
            raise UserError(f"--model {folder}: no model.safetensors there: name the folder of a finished run")
        path, root_given = folder / "args.yaml", self.data_root != default_data_root()
        theirs = load_yaml(path)
        words = ["--config", str(path)]
        gone = isinstance(theirs, dict) and not Path(str(theirs.get("data_root"))).is_dir()
        if root_given or self.data_path is not None or gone:  # `parse` refuses a folder that is not there any more
            words.append(f"--data_root={self.data_root}")
        config = parse(words, prog=str(path))
        data_path = config.data_path if self.data_path is None else self.data_path
        if self.data_path is None and root_given and data_path is not None and not Path(data_path).is_dir():
            data_path = None  # the data set's folder below the new root
        return replace(config, num_workers=self.num_workers, cache=False, data_path=data_path)

    @property
    def chosen(self) -> Protocol:
        """The protocol, with what the flags change of it."""
        changed = {name: getattr(self, name) for name in ("epochs", "batch_size", "lr")}
        return replace(PROTOCOLS[self.protocol], **{k: v for k, v in changed.items() if v is not None})

    def label(self) -> CellLabel:
        """That of the finished run."""
        return self.trained.label()


def _changed(trained: Config) -> str:
    """The settings that decide what a run computes and are not the defaults, in words; but method, epochs and seed."""
    apart = (*trained.EXECUTION_FIELDS, "method", "epochs", "seed")
    values = {field.name: getattr(trained, field.name) for field in fields(trained) if field.name not in apart}
    defaults = {field.name: field.default for field in fields(trained)}
    return " ".join(f"{name}={value}" for name, value in values.items() if value != defaults[name])


def rate(protocol: Protocol, done: float) -> float:
    """Learning rate when the share `done` of the training is over."""
    peak = protocol.lr * (protocol.batch_size / 256 if protocol.per_256 else 1)
    if protocol.schedule == "steps":
        return peak * 0.1 ** ((done >= 0.6) + (done >= 0.8))
    if protocol.schedule == "linear":
        return peak * (1 - done)
    if done < protocol.warmup:
        return peak * done / protocol.warmup
    return peak * (1 + math.cos(math.pi * (done - protocol.warmup) / (1 - protocol.warmup))) / 2


def load_method(config: LinearConfig) -> Method:
    """The finished run's method with its weights; frozen, unless it is fine-tuned."""
    trained, finetune = config.trained, config.chosen.finetune
    backbone = backbones.build(trained, **({"drop_path_rate": DROP_PATH} if finetune else {}))
    method = methods.load(trained.method)(trained, backbone, images=1)
    scratch = {name: value for name, value in method.state_dict().items() if name.startswith(method.scratch or "/")}
    method.load_state_dict(load_file(Path(config.model) / "model.safetensors") | scratch)
    method.requires_grad_(False)
    if finetune:
        backbone.reset_classifier(0, "avg")  # type: ignore[operator]  # a ViT's: the mean of the patches is classified
        backbone.requires_grad_(True)
    return method


def train_transform(config: LinearConfig, augment: Augment) -> Callable[[Any], Tensor]:
    """PIL image to a normalized one (3, S, S), augmented as the protocol has it."""
    size, bicubic = augment.size, T.InterpolationMode.BICUBIC
    if config.chosen.finetune:
        transform: Callable[[Any], Tensor] = create_transform(
            size, is_training=True, auto_augment=RAND_AUGMENT, re_prob=ERASE, re_mode="pixel", mean=augment.mean,
            std=augment.std, interpolation="bicubic",
        )  # fmt: skip
        return transform
    crop: list[Any] = [T.RandomResizedCrop(size, interpolation=bicubic)]
    if config.protocol == "simclr":
        crop = [T.Resize((size, size), bicubic), T.RandomCrop(size, padding=size // 8, padding_mode="reflect")]
    return T.Compose([*crop, T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(augment.mean, augment.std)])


class Classifier(nn.Module):
    """A linear layer on a method's features."""

    def __init__(self, config: LinearConfig, method: Method, classes: int) -> None:
        super().__init__()
        self.protocol = config.chosen
        self.method = method
        size = config.trained.crop_size
        with torch.no_grad():
            width = method.eval().features(torch.zeros(1, 3, size, size)).shape[1]
        layer = nn.Linear(width, classes)
        nn.init.normal_(layer.weight, std=0.0 if config.protocol == "simclr" else 0.01)
        nn.init.zeros_(layer.bias)
        self.head = nn.Sequential(*([nn.BatchNorm1d(width, affine=False)] if self.protocol.batch_norm else []), layer)

    def train(self, mode: bool = True) -> Classifier:
        """A frozen method stays in eval mode: BatchNorm keeps to its running statistics."""
        super().train(mode)
        self.method.train(mode and self.protocol.finetune)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of images (B, 3, S, S)."""
        logits: Tensor = self.head(self.method.features(images))
        return logits

    def optimizer(self) -> torch.optim.Optimizer:
        """The protocol's."""
        lr, decay, finetune = self.protocol.lr, self.protocol.weight_decay, self.protocol.finetune
        layer = self.head[-1]
        groups: list[dict[str, Any]] = [
            # Without always_adapt, timm's LARS is plain SGD where nothing decays. As in MAE, it leaves biases alone.
            {"params": [layer.weight], "weight_decay": decay, "always_adapt": True},
            {"params": [layer.bias], "weight_decay": 0.0 if finetune else decay},
        ]
        if finetune:
            backbone = self.method.backbone
            kept = backbone.no_weight_decay()  # type: ignore[operator]  # a ViT's: its class token and positions
            groups += param_groups_layer_decay(backbone, decay, kept, layer_decay=LAYER_DECAY)
        if self.protocol.opt == "adamw":
            return torch.optim.AdamW(groups, lr=lr)
        if self.protocol.opt == "sgd":
            return torch.optim.SGD(groups, lr=lr, momentum=0.9)
        return Lars(groups, lr=lr, momentum=0.9)

    def trained_state(self) -> dict[str, Tensor]:
        """What training changes."""
        state = self.state_dict()
        return state if self.protocol.finetune else {k: v for k, v in state.items() if k.startswith("head.")}


class Training:
    """A classifier with its data; making one writes nothing, and refuses what does not fit together."""

    def __init__(self, config: LinearConfig) -> None:
        self.config, self.protocol, trained = config, config.chosen, config.trained
        self.data, self.bad_images = load_data(trained), BadImages(trained.on_bad_image)
        self.images = len(self.data.train)  # type: ignore[arg-type]
        self.steps = self.images // self.protocol.batch_size
        if self.steps == 0:
            raise UserError(f"{self.images} training images do not fill one batch of {self.protocol.batch_size}")
        self.device = torch.device("cuda" if torch.cuda.is_available() and not config.cpu else "cpu")
        seed_everything(config.seed)
        augment = Augment(trained.augment, trained.crop_size, trained.data_set, 1)
        self.classifier = Classifier(config, load_method(config), len(self.data.classes)).to(self.device)
        self.optimizer = self.classifier.optimizer()
        self.source = Augmented(self.data.train, train_transform(config, augment), augment.size)
        self.evaluation = Evaluation(
            self.data, trained, augment, self.bad_images, train_pixels=None, rank=0, world=1, device=self.device
        )

    def run(self, run: Run) -> None:
        """All epochs, from the last checkpoint on, and the record."""
        start, state = run.restore() or (0, None)
        if state is not None:
            self.classifier.load_state_dict(self.classifier.state_dict() | state["classifier"])
            self.optimizer.load_state_dict(state["optimizer"])
        for epoch in range(start, self.protocol.epochs):
            run.log({"epoch": epoch, "train_loss": self.epoch(epoch)})
            state = {"classifier": self.classifier.trained_state(), "optimizer": self.optimizer.state_dict()}
            run.checkpoint(epoch + 1, state)
        accuracy, count = self.test()
        write_atomic(run.folder / "classifier.safetensors", to_safetensors(self.classifier.trained_state()))
        name = "finetune_accuracy" if self.protocol.finetune else "linear_accuracy"
        run.finish(
            {name: accuracy, "test_images": count},
            protocol=f"{self.data.name} {self.data.test_split} split, {self.config.protocol}",
            selection="last epoch",
            pretrained=asdict(self.config.trained),
            bad_images=list(self.bad_images.names),
        )
        print(f"{name} {accuracy:.4f}; {run.folder / 'record.json'}")

    def epoch(self, epoch: int) -> float:
        """One pass over the training images; the mean loss."""
        seed, size = self.config.seed, self.protocol.batch_size
        generator = torch.Generator().manual_seed(derive_seed(seed, epoch, ORDER))
        order = torch.randperm(self.images, generator=generator)[: self.steps * size].tolist()
        refs = [SampleRef(index, derive_seed(seed, epoch, AUGMENTATION, index)) for index in order]
        batches = [refs[start : start + size] for start in range(0, len(refs), size)]
        loader = make_loader(self.source, batches, self.config.trained, pin_memory=self.device.type == "cuda")
        self.classifier.train()
        loss_sum = 0.0
        for step, sample in enumerate(tqdm(loader, f"epoch {epoch}", unit="step")):
            self.bad_images.add(sample.bad)
            torch.manual_seed(derive_seed(seed, epoch, DROPOUT, step))
            lr = rate(self.protocol, (epoch + step / self.steps) / self.protocol.epochs)
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            logits = self.classifier(sample.image.to(self.device))
            loss = F.cross_entropy(logits, sample.label.to(self.device), label_smoothing=self.protocol.smoothing)
            if not loss.isfinite():
                raise UserError(
                    f"the loss is {loss.item()} at epoch {epoch}, step {step}: lower --lr {self.protocol.lr:g}"
                )
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss_sum += loss.item()
        return loss_sum / self.steps

    @torch.no_grad()
    def test(self) -> tuple[float, int]:
        """Accuracy on the test images, and how many there are."""
        self.classifier.eval()
        right = total = 0
        for images, labels, usable in self.evaluation.batches(self.data.test, range(len(self.data.test))):  # type: ignore[arg-type]
            found = self.classifier(images[:, 0]).argmax(dim=1).cpu() == labels
            right, total = right + int(found[usable].sum()), total + int(usable.sum())
        return right / max(total, 1), total


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train one classifier."""
    config = parse_config(LinearConfig, argv, prog="python -m SSL_cifar.linear", description=str(__doc__))
    train_cell("SSL_cifar", config, Training, Training.run)


if __name__ == "__main__":
    run_main(main)
