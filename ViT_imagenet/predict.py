"""What a trained model sees in images: `python -m ViT_imagenet.predict --model out/cifar10 --image photo.jpg`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from repro.config import default_data_root, parse_config
from repro.errors import UserError, run_main


@dataclass
class Config:
    """Which model, which images."""

    model: str
    """Folder of a finished training run."""
    image: list[str] | str
    """The image, or several: `--image a.jpg`, `--image '[a.jpg, b.png]'`."""
    top: int = 5
    """How many classes are printed for each, the most probable first."""
    ema: bool = False
    """Take the moving average of the weights."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if self.top < 1:
            raise ValueError(f"--top must be at least 1, got {self.top}")


def main(argv: Sequence[str] | None = None) -> None:
    """Print one line per image and class: label, probability, file."""
    config = parse_config(Config, argv, prog="python -m ViT_imagenet.predict", description=str(__doc__))
    folder = Path(config.model)
    weights = folder / ("model_ema.safetensors" if config.ema else "model.safetensors")
    if not weights.exists():
        raise UserError(f"--model {folder}: no {weights.name} there: name the folder of a finished training run")
    import torch

    from repro.images.data import BadImageError, decode
    from ViT_imagenet import config as training
    from ViT_imagenet import factory
    from ViT_imagenet.loader import eval_transform
    from ViT_imagenet.models import image_side

    settings = folder / "args.yaml"
    elsewhere = ["--config", str(settings), "--data_root", default_data_root()]  # the run's may be gone
    trained = parse_config(training.Config, elsewhere, prog=str(settings))
    trained = replace(trained, pretrained=False, reset_head=False)  # the weights are the run's own
    classes = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
    model = factory.build_model(trained, len(classes)).eval()
    factory.load_weights(model, str(weights), reset_head=False)
    transform = eval_transform(trained, image_side(model))
    for name in [config.image] if isinstance(config.image, str) else config.image:
        try:
            image = transform(decode(name))
        except BadImageError as error:
            raise UserError(f"--image {error}: not readable as an image") from error
        with torch.inference_mode():
            probabilities = model(image.unsqueeze(0)).float().softmax(dim=1)[0]  # (C,)
        for probability, number in zip(*probabilities.topk(min(config.top, len(classes))), strict=True):
            print(f"{classes[number]}\t{probability:.4f}\t{name}")


if __name__ == "__main__":
    run_main(main)
