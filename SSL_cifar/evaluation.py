"""What a run's features are worth: k-NN, a linear classifier on frozen features, and the collapse diagnostics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor

from repro.images.data import ImageData, Images
from repro.images.loader import Augmented, BadImages, make_loader
from repro.parallel import gather
from SSL_cifar import diagnostics
from SSL_cifar.augment import Augment
from SSL_cifar.batches import Pixels, ViewRef
from SSL_cifar.config import Config
from SSL_cifar.methods.base import Method
from SSL_cifar.shifts import SHIFTS

NEIGHBOURS, KNN_TAU = 20, 0.07  # of the weighted k-NN (Wu et al., CVPR 2018)
PROBE_STEPS = 100  # of L-BFGS
DIAGNOSED, DIAGNOSTIC_VIEWS = 2000, 4  # test images, views of each
BATCH = 256

Labelled = tuple[Tensor, Tensor]  # features (n, D), labels (n,)
Seen = tuple[Tensor, Tensor, Tensor]  # images (b, 1 + V, 3, S, S): unaugmented, then views; labels; usable


class _Half(Augmented):
    """Half of a data set as evaluation sees it: `see` makes one image of (1, 3, H, W) and its row of `draws`."""

    def __init__(self, source: Images, see: Any, draws: Tensor | None, size: int) -> None:
        super().__init__(source, pil_to_tensor, size)
        self.see, self.draws = see, draws
        self.blank = self.blank.expand(1 if draws is None else 1 + draws.shape[1], 3, size, size)

    def prepare(self, image: Image.Image, ref: ViewRef) -> Tensor:  # type: ignore[override]
        draws = None if self.draws is None else self.draws[ref.row : ref.row + 1]
        seen: Tensor = self.see(self.transform(image)[None], draws)[0]
        return seen


class Evaluation:
    """Evaluates a method's features on both halves of a data set.

    Args:
        data: the data set.
        config: settings of the run.
        augment: of the run.
        bad_images: gets to know what cannot be decoded.
        train_pixels: training images in memory, where training keeps them.
        rank: number of this process; each computes the features of its share of the images.
        world: how many there are.
        device: of the method.
    """

    def __init__(
        self, data: ImageData, config: Config, augment: Augment, bad_images: BadImages, *,
        train_pixels: Pixels | None, rank: int, world: int, device: torch.device,
    ) -> None:  # fmt: skip
        self.config, self.augment, self.bad_images = config, augment, bad_images
        self.views = Augment(config.augment, config.crop_size, config.data_set, DIAGNOSTIC_VIEWS)
        self.rank, self.world, self.device = rank, world, device
        self.classes = len(data.classes)
        self.train: Images | Pixels = train_pixels or data.train
        self.test: Images | Pixels = Pixels(data.test, bad_images) if config.cache else data.test

    def see(self, images: Tensor, draws: Tensor | None, shift: str | None = None) -> Tensor:
        """Images (b, 3, H, W), uint8, unaugmented and, with draws, as views: (b, 1 [+ V], 3, S, S)."""
        change = {} if shift is None else {"change": SHIFTS[shift]}
        clean = self.augment.clean(images, self.config.eval_crop_ratio, **change)[:, None]
        return clean if draws is None else torch.cat([clean, self.views(images, draws)[0]], 1)

    def batches(
        self, half: Images | Pixels, places: Sequence[int], draws: Tensor | None = None, shift: str | None = None
    ) -> Iterator[Seen]:
        """The images of a half at `places`; draws: (len(places), V, DRAWS)."""
        see = partial(self.see, shift=shift)
        chunks = [list(range(start, min(start + BATCH, len(places)))) for start in range(0, len(places), BATCH)]
        if isinstance(half, Pixels):
            for rows in chunks:
                part = [places[row] for row in rows]
                chosen = None if draws is None else draws[rows].to(self.device)
                labels = half.labels[part]
                yield see(half.images[part].to(self.device), chosen), labels, torch.ones_like(labels).bool()
            return
        refs = [[ViewRef(places[row], None, row) for row in rows] for rows in chunks]
        dataset = _Half(half, see, draws, self.config.crop_size)
        for sample in make_loader(dataset, refs, self.config, pin_memory=False):  # type: ignore[arg-type]
            self.bad_images.add(sample.bad)
            yield sample.image.to(self.device), sample.label, sample.usable

    @torch.no_grad()
    def features(
        self, method: Method, half: Images | Pixels, shift: str | None = None, *, layers: bool = False
    ) -> Labelled:
        """Features in float32 and labels of all images of a half that can be decoded, on every process.

        With `layers` those of every layer, (n, L, D).
        """
        extract: Callable[[Tensor], Any] = method.layers if layers else method.features
        n = len(half)  # type: ignore[arg-type]
        share = -(-n // self.world)
        places = [min(place, n - 1) for place in range(self.rank * share, (self.rank + 1) * share)]
        parts = []
        for images, labels, usable in self.batches(half, places, shift=shift):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                features = extract(images[:, 0]).float()
            parts.append((features, labels.to(self.device), usable.to(self.device, torch.uint8)))
        features, labels, usable = (gather(torch.cat(part))[:n] for part in zip(*parts, strict=True))
        return features[usable.bool()], labels[usable.bool()]

    def knn(self, train: Labelled, test: Labelled) -> float:
        """Accuracy of the weighted k-NN on the test images."""
        predicted = knn_predict(*train, test[0], self.classes, chunk=self.config.knn_chunk)
        return accuracy(predicted, test[1])

    def quick(self, method: Method) -> dict[str, float]:
        """The k-NN accuracy, for learning curves."""
        method.eval()
        found = self.knn(self.features(method, self.train), self.features(method, self.test))
        method.train()
        return {"knn_accuracy": found}

    def full(self, method: Method) -> tuple[dict[str, float], dict[str, list[Any]]]:
        """What a record holds: numbers, and the diagnostics' arrays."""
        method.eval()
        train, test = self.features(method, self.train), self.features(method, self.test)
        numbers = {"knn_accuracy": self.knn(train, test), "test_images": len(test[1])}
        if self.config.probe:
            classifier = linear_probe(train, self.classes)
            numbers["linear_accuracy"] = accuracy(classifier(test[0]), test[1])
            numbers |= self.best_layer(method)
            for name in SHIFTS if self.config.shifts else ():
                shifted = self.features(method, self.test, name)
                numbers[f"linear_accuracy_{name}"] = accuracy(classifier(shifted[0]), shifted[1])
            if self.config.shifts:
                numbers["shifted_accuracy"] = sum(numbers[f"linear_accuracy_{name}"] for name in SHIFTS) / len(SHIFTS)
        found, arrays = diagnostics.collect(method, self._diagnosed())
        method.train()
        return numbers | found, arrays

    def best_layer(self, method: Method) -> dict[str, float]:
        """Linear accuracy of the layer that is best on a tenth of the training images, held out; {} without layers."""
        size = self.config.crop_size
        if method.layers(torch.zeros(1, 3, size, size, device=self.device)) is None:
            return {}
        (x, y), (queries, labels) = (self.features(method, half, layers=True) for half in (self.train, self.test))
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).to(y.device)
        held, kept = order[: len(y) // 10], order[len(y) // 10 :]
        scores = [
            accuracy(linear_probe((x[kept, layer], y[kept]), self.classes)(x[held, layer]), y[held])
            for layer in range(x.shape[1])
        ]
        best = max(range(len(scores)), key=scores.__getitem__)
        found = linear_probe((x[:, best], y), self.classes)(queries[:, best])
        return {"best_layer": best + 1, "linear_accuracy_best_layer": accuracy(found, labels)}

    def _diagnosed(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """The same test images, and the same views of them, in every run: (b, 3, S, S), unaugmented and four views."""
        n = len(self.test.places if isinstance(self.test, Pixels) else self.test)  # type: ignore[arg-type]
        numbers = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:DIAGNOSED]
        draws = self.views.draw(0, len(numbers))
        if isinstance(self.test, Pixels):  # images have the same views with and without --cache
            rows = self.test.places[numbers]
            good = self.test.numbers[rows] == numbers
            numbers, draws = rows[good], draws[good]
        for images, _, usable in self.batches(self.test, numbers.tolist(), draws):
            clean, *views = images[usable.to(images.device)].unbind(1)
            yield clean, views


def knn_predict(features: Tensor, labels: Tensor, queries: Tensor, classes: int, *, chunk: int) -> Tensor:
    """Weighted k-NN (Wu et al., CVPR 2018): each of the 20 nearest votes with exp(cos / 0.07).

    Args:
        features: (n, D) of the training images.
        labels: (n,).
        queries: (m, D).
        classes: how many there are.
        chunk: queries at a time.

    Returns:
        (m,) predicted classes.
    """
    features, queries = F.normalize(features, dim=1), F.normalize(queries, dim=1)
    predicted = []
    for part in queries.split(chunk):
        cosine, nearest = (part @ features.T).topk(min(NEIGHBOURS, len(features)), dim=1)  # (chunk, k)
        votes = cosine.new_zeros(len(part), classes)
        votes.scatter_add_(1, labels[nearest], (cosine / KNN_TAU).exp())
        predicted.append(votes.argmax(dim=1))
    return torch.cat(predicted)


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of predictions, (n,), that are the labels."""
    return float((predicted == labels).float().mean())


def linear_probe(train: Labelled, classes: int) -> Callable[[Tensor], Tensor]:
    """Logistic regression on standardized features, as a function of features (m, D) that gives classes (m,).

    The sum of the cross-entropies plus half the squared weights (scikit-learn's default, C = 1), by L-BFGS from zero.
    """
    mean, std = train[0].mean(dim=0), train[0].std(dim=0)
    std = std.clamp(min=1e-6)
    x = (train[0] - mean) / std
    layer = nn.Linear(x.shape[1], classes).to(x)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=PROBE_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(x), train[1]) + layer.weight.square().sum() / (2 * len(x))
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return torch.no_grad()(lambda features: layer((features - mean) / std).argmax(dim=1))
