"""One training step of the three experiments' models: vanilla, ContraNorm in its plain form, ContraNorm as it comes.

    python -m benchmarks.training_step --json out/step.json
    python -m benchmarks.training_step --only variants --rounds 25 --json out/variants.json    # DeiT-tiny, its rivals

Random inputs at the experiments' shapes; forward, backward and optimizer step. BERT has two of its twelve layers: the
ratio is that of a layer. bfloat16 is measured where the machine multiplies it in hardware, or when asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from unittest import mock

import timm
import torch
from torch import Tensor, nn
from torch.utils.benchmark import timer
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification

import ViT_imagenet.models  # noqa: F401 - registered with timm
from benchmarks.common import DEVICE, Rows, alternate_ms, goal, has_bfloat16, names_in, report
from BERT_glue import ContraNormBertConfig, ContraNormBertForSequenceClassification
from gnn.config import Config as GraphConfig
from gnn.layers import Adjacency
from gnn.models import build_model
from gnn.sparse import Pattern, Sparse
from repro.config import parse_config
from repro.cost import multiply_adds
from repro.errors import run_main
from ViT_imagenet.attention import apply_variant

Models = dict[str, tuple[nn.Module, Callable[[nn.Module], Tensor]]]  # variant -> the model, and its loss on one batch
MODELS = ("gcn", "bert", "deit")
IMAGE = 224  # side of DeiT's images in pixels
VARIANTS = ("attn_scale", "feat_scale", "layer_scale", "gfsa", "neutreno", "resformer", "patch_diversity")


@dataclass
class Config:
    """Settings of the benchmark."""

    only: str = ",".join(MODELS)
    """models, separated by commas; `variants` is DeiT-tiny with each rival of ContraNorm"""
    json: str | None = None
    """file for the result"""
    rounds: int = 9
    """timings of each variant, taken in turns; medians of fewer differ by some per cent from run to run"""
    bf16: bool = False
    """measure bfloat16 autocast also where the processor only emulates it"""
    batch: int = 64
    """images in a DeiT batch; BERT's is half of it"""


def training_step(model: nn.Module, loss_of: Callable[[nn.Module], Tensor], dtype: torch.dtype) -> Callable[[], None]:
    """Forward, backward and a step of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    model.train()

    def run() -> None:
        with nullcontext() if dtype == torch.float32 else torch.autocast(DEVICE, dtype=dtype):
            loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def deit(batch: int) -> Models:
    """DeiT-tiny at 224 x 224, 12 layers, every norm."""
    images, labels = torch.randn(batch, 3, IMAGE, IMAGE, device=DEVICE), torch.randint(0, 100, (batch,), device=DEVICE)

    def loss_of(model: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(model(images), labels)

    name = "deit_tiny_patch16_224"
    vanilla = timm.create_model(name, num_classes=100).to(DEVICE)
    contra = timm.create_model(f"{name}_contranorm", num_classes=100, scale=0.1).to(DEVICE)
    return {"vanilla": (vanilla, loss_of), "contranorm": (contra, loss_of)}


def variants(batch: int) -> Models:
    """DeiT-tiny as in `deit`, and with each of ContraNorm's rivals."""
    built = deit(batch)
    loss_of = built["vanilla"][1]

    def with_own_loss(model: nn.Module) -> Tensor:
        return loss_of(model) + getattr(model, "auxiliary_loss", 0.0)

    for name in VARIANTS:
        model = timm.create_model("deit_tiny_patch16_224", num_classes=100)
        apply_variant(model, name)
        built[name] = (model.to(DEVICE), with_own_loss)
    return built


def bert(batch: int) -> Models:
    """BERT-base's layers, 32 x 128 tokens, site attention_sum."""
    tokens = torch.randint(0, 1000, (batch // 2, 128), device=DEVICE)
    inputs = {"input_ids": tokens, "labels": tokens[:, 0] % 2, "attention_mask": torch.ones_like(tokens)}

    def loss_of(model: nn.Module) -> Tensor:
        return model(**inputs).loss

    size = {"num_hidden_layers": 2, "vocab_size": 1000}
    vanilla = BertForSequenceClassification(BertConfig(**size)).to(DEVICE)
    settings = ContraNormBertConfig(**size, sites=["attention_sum"], scale=0.01)
    contra = ContraNormBertForSequenceClassification(settings).to(DEVICE)
    return {"vanilla": (vanilla, loss_of), "contranorm": (contra, loss_of)}


def gcn(batch: int) -> Models:
    """A GCN of 16 layers on a random graph of Cora's size, ContraNorm on every hidden layer."""
    nodes, features = 2708, 1433
    adjacency = Adjacency.from_edges(torch.randint(0, nodes, (2, 5278)).to(DEVICE), nodes)
    codes = torch.unique(torch.randint(0, nodes * features, (49216,))).to(DEVICE)
    pattern = Pattern(codes // features, codes % features, (nodes, features))
    x = Sparse(pattern, torch.rand(codes.numel()).to(DEVICE))
    labels = torch.randint(0, 7, (140,), device=DEVICE)

    def loss_of(model: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(model(x, adjacency)[:140], labels)

    contra = ["--norm_mode", "CN", "--norm_scale", "1.0"]
    variants = {
        "vanilla": ["--norm_mode", "None"],
        "contranorm": contra,
        "linear, degree 1": [*contra, "--implementation", "linear", "--degree", "1"],
    }
    common = ["--output_dir", "unused", "--nlayer", "16", "--use_layer_norm"]
    configs = {name: parse_config(GraphConfig, [*common, *flags], prog=name) for name, flags in variants.items()}
    return {name: (build_model(config, features, 7).to(DEVICE), loss_of) for name, config in configs.items()}


def measure(name: str, dtype: torch.dtype, config: Config) -> Rows:
    """Vanilla, plain, fast (as the model comes) and what else there is, side by side."""
    built = {"gcn": gcn, "bert": bert, "deit": deit}[name](config.batch)
    steps = {label: training_step(model, loss_of, dtype) for label, (model, loss_of) in built.items()}
    fast = steps["contranorm"]

    def plain() -> None:
        with mock.patch("contranorm.kernels.choose", return_value="plain"):  # what implementation="plain" does
            fast()

    ways = {"vanilla": steps.pop("vanilla"), "plain": plain, "fast": steps.pop("contranorm")} | steps
    times = alternate_ms(ways, rounds=config.rounds)
    common = {"model": name, "dtype": str(dtype).removeprefix("torch.")}
    vanilla = times["vanilla"]
    return [common | {"variant": label, "ms": ms, "times vanilla": ms / vanilla} for label, ms in times.items()]


def measure_variants(dtype: torch.dtype, config: Config) -> Rows:
    """Vanilla and its rivals side by side, with parameters and the multiply-adds of one image.

    The limits are a few per cent: on a CPU, time is that of this process, which other programs disturb less.
    """
    built = variants(config.batch)
    steps = {label: training_step(model, loss_of, dtype) for label, (model, loss_of) in built.items()}
    times = alternate_ms(steps, rounds=config.rounds, clock=timer if DEVICE == "cuda" else time.process_time)
    image = torch.zeros(1, 3, IMAGE, IMAGE, device=DEVICE)
    rows = []
    for label, (model, _) in built.items():
        size = sum(p.numel() for p in model.parameters())
        cost = {"parameters": size, "GMAC an image": multiply_adds(model.eval(), image) / 1e9}
        row = {"model": "variants", "dtype": str(dtype).removeprefix("torch."), "variant": label, "ms": times[label]}
        rows.append(row | {"times vanilla": times[label] / times["vanilla"]} | cost)
    return rows


def check_goals(rows: Rows) -> Rows:
    """Ratios to vanilla against their goals."""
    targets = {"deit bfloat16": 1.15, "deit float32": 1.3, "bert float32": 1.04, "bert bfloat16": 1.04}
    fast = {f"{row['model']} {row['dtype']}": row["times vanilla"] for row in rows if row["variant"] == "fast"}
    name = "{}: ContraNorm step, times vanilla"
    goals = [goal(name.format(k), fast[k], target, at_least=False) for k, target in targets.items() if k in fast]
    limits = {"attn_scale": 1.05, "feat_scale": 1.05, "neutreno": 1.05, "resformer": 1.05, "gfsa": 1.15}
    rivals = [row for row in rows if row["model"] == "variants" and row["variant"] in limits]
    title = "deit {dtype}: {variant} step, times vanilla"
    return goals + [
        goal(title.format(**row), row["times vanilla"], limits[row["variant"]], at_least=False) for row in rivals
    ]


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(Config, argv, prog="benchmarks.training_step", description=__doc__ or "")
    names = names_in(config.only, (*MODELS, "variants"))
    dtypes = [torch.float32, torch.bfloat16] if has_bfloat16() or config.bf16 else [torch.float32]
    if len(dtypes) == 1:
        print("bfloat16 left out: this processor only emulates it (--bf16 measures it all the same)")
    torch.manual_seed(0)
    jobs = [(name, dtype) for name in names for dtype in dtypes if (name, dtype) != ("gcn", torch.bfloat16)]
    rows: Rows = []
    for name, dtype in tqdm(jobs, desc="models"):
        rows += measure_variants(dtype, config) if name == "variants" else measure(name, dtype, config)
    report("training_step", rows, check_goals(rows), config.json)


if __name__ == "__main__":
    run_main(main)
