"""Rivals of ContraNorm in a DeiT: vanilla at their vanilla setting, what they add, what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.layers import LayerScale
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn import functional as F

import ViT_imagenet.models  # noqa: F401 - registers the models
from repro.config import parse_config
from repro.errors import UserError, run_main
from ViT_imagenet.attention import ATTENTION, NEW_PARAMETERS, apply_variant, describe_variant
from ViT_imagenet.config import Config
from ViT_imagenet.diversity import contrastive_loss, cosine_loss, patch_diversity
from ViT_imagenet.main import main
from ViT_imagenet.models import collapse_by_block

# Variant → the arguments at which it is vanilla, where its parameters alone do not say so.
VANILLA: dict[str, dict[str, Any]] = {
    "attn_scale": {},
    "feat_scale": {},
    "gfsa": {},
    "neutreno": {"lamb": 0.0},
    "resformer": {"share": 0.0},
    "layer_scale": {"init": 1.0},
    "patch_diversity": {"weight": 0.0},
}
ADDED = {
    "attn_scale": {"attn.lamb": 4},
    "feat_scale": {"attn.t1": 128, "attn.t2": 128},
    "gfsa": {"attn.w_k": 4},
    "layer_scale": {"ls1.gamma": 128, "ls2.gamma": 128},
}  # names in a block → length
every_variant = pytest.mark.parametrize("variant", VANILLA)


def build(variant: str | None, depth: int = 3, model: str = "deit_micro_patch8_32", **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    built = timm.create_model(model, depth=depth, num_classes=5, drop_path_rate=0.1)
    if variant is not None:
        apply_variant(built, variant, **arguments)
    return built


def strengthen(model: nn.Module, by: float = 0.3) -> nn.Module:
    """Move what a variant has added away from where it starts."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(NEW_PARAMETERS):
                parameter.add_(by)
    return model


def images(number: int = 4, side: int = 32) -> Tensor:
    return torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(1))


def ten_losses(model: nn.Module, frozen: bool = True) -> list[float]:
    """Losses of ten steps of training, with stochastic depth; a variant's own parameters stay where they are."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (frozen and name.endswith(NEW_PARAMETERS)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    torch.manual_seed(5)
    losses = []
    for step in range(10):
        loss = F.cross_entropy(model(images() + step), torch.tensor([0, 1, 2, 3]))
        loss = loss + getattr(model, "auxiliary_loss", 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# -- vanilla -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vanilla_losses() -> list[float]:
    return ten_losses(build(None))


@every_variant
def test_at_the_vanilla_setting_ten_steps_are_vanillas_bit_for_bit(variant: str, vanilla_losses: list[float]) -> None:
    assert ten_losses(build(variant, **VANILLA[variant])) == vanilla_losses


@every_variant
def test_away_from_it_they_are_not(variant: str, vanilla_losses: list[float]) -> None:
    assert ten_losses(strengthen(build(variant)), frozen=False) != vanilla_losses


@every_variant
@pytest.mark.parametrize("model", ["deit_micro_patch8_32", "deit_tiny_distilled_patch16_224"])
def test_outputs_and_gradients_are_vanillas_bit_for_bit(variant: str, model: str) -> None:
    results = []
    for kind, arguments in ((None, {}), (variant, VANILLA[variant])):
        built = build(kind, depth=2, model=model, **arguments).eval()
        built.set_distilled_training(True) if hasattr(built, "set_distilled_training") else None
        out = built(images(1, built.patch_embed.img_size[0]))
        out.square().sum().backward()
        grads = {name: p.grad for name, p in built.named_parameters() if not name.endswith(NEW_PARAMETERS)}
        results.append({"out": out, **grads})
    assert list(results[0]) == list(results[1])
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@every_variant
def test_nothing_is_drawn_and_a_seed_gives_the_plain_weights(variant: str) -> None:
    plain = build(None)
    state = torch.get_rng_state()
    model = build(variant)  # of the same seed
    assert torch.equal(torch.get_rng_state(), state)
    added = {f"blocks.{i}.{name}": (n,) for i in range(3) for name, n in ADDED.get(variant, {}).items()}
    mine, theirs = model.state_dict(), plain.state_dict()
    assert {name: tuple(mine[name].shape) for name in mine if name not in theirs} == added
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    groups = param_groups_weight_decay(model, 0.05)
    undecayed = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    assert {name for name, p in model.named_parameters() if name in added and id(p) in undecayed} == set(added)


def test_layer_scale_is_timms_init_values() -> None:
    ours = build("layer_scale", init=1e-3)
    torch.manual_seed(0)
    theirs = timm.create_model("deit_micro_patch8_32", depth=3, num_classes=5, drop_path_rate=0.1, init_values=1e-3)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert isinstance(ours.blocks[1].ls2, LayerScale)
    with torch.inference_mode():
        assert torch.equal(ours.eval()(images()), theirs.eval()(images()))


# -- the forms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ATTENTION)
def test_the_fused_kernel_and_formed_weights_agree(variant: str) -> None:
    model = strengthen(build(variant)).eval()
    with torch.inference_mode():
        fused = model(images())
        for block in model.blocks:
            block.attn.fused_attn = False
        torch.testing.assert_close(model(images()), fused, atol=2e-5, rtol=1e-5)


@every_variant
def test_an_image_does_not_feel_the_others_of_its_batch(variant: str) -> None:
    model = strengthen(build(variant)).eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(images())[:1], model(images()[:1]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["neutreno", "resformer"])
def test_the_first_values_are_those_of_the_same_pass(variant: str) -> None:
    """Against a twin that takes the first block's values with a hook; gradients reach them too."""
    model = build(variant).eval()
    plain = build(None).eval()
    kept: list[Tensor] = []

    def values(attention: nn.Module, x: Tensor) -> Tensor:
        return attention.qkv(x).reshape(*x.shape[:2], 3, 4, 32).permute(2, 0, 3, 1, 4)[2]

    def twin(attention: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        q, k, v = attention.qkv(x).reshape(*x.shape[:2], 3, 4, 32).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / 32**0.5).softmax(-1)
        if attention is plain.blocks[0].attn:
            kept[:] = [v]
            return output
        mixed = weights @ v + 0.6 * (kept[0] - v) if variant == "neutreno" else weights @ (kept[0] + v) / 2
        return attention.proj(mixed.transpose(1, 2).reshape(x.shape))

    for block in plain.blocks:
        block.attn.register_forward_hook(twin)
    model(images() * 2)  # another pass before
    outs = [built(images()) for built in (model, plain)]
    torch.testing.assert_close(*outs, atol=2e-5, rtol=1e-4)
    for out in outs:
        out.square().sum().backward()
    torch.testing.assert_close(
        model.blocks[0].attn.qkv.weight.grad, plain.blocks[0].attn.qkv.weight.grad, atol=1e-4, rtol=1e-3
    )


def test_a_copy_has_first_values_of_its_own() -> None:
    model = build("neutreno").eval()
    expected = model(images())
    other = copy.deepcopy(model)  # after a pass, which has left values
    assert len({id(block.attn.first) for block in other.blocks}) == 1
    assert other.blocks[0].attn.first is not model.blocks[0].attn.first
    assert torch.equal(other(images()), expected)


@pytest.mark.parametrize("variant", ["neutreno", "resformer"])
def test_nothing_of_a_pass_is_kept_beyond_it(variant: str) -> None:
    model = build(variant)
    model(images()).sum().backward()
    assert not vars(model.blocks[-1].attn.first)


@every_variant
def test_contranorm_stands_beside_it(variant: str) -> None:
    model = strengthen(build(None))
    both = timm.create_model("deit_micro_patch8_32_contranorm", depth=3, num_classes=5, scale=0.3)
    apply_variant(both, variant)
    both.load_state_dict(model.state_dict(), strict=False)
    out = strengthen(both)(images())
    (out.square().sum() + getattr(both, "auxiliary_loss", 0.0)).backward()
    assert [n for n, p in both.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("variant", ATTENTION)
def test_probe_sees_every_block(variant: str) -> None:
    frame, spectrum = collapse_by_block(strengthen(build(variant)), images())
    assert sum(spectrum) == pytest.approx(1, rel=1e-5)
    assert list(frame["layer"]) == [1, 2, 3]
    assert frame["attention_similarity"].between(0, 1.0001).all()


@pytest.mark.parametrize("variant", ["attn_scale", "gfsa", "neutreno"])
def test_bfloat16(variant: str) -> None:
    model = strengthen(build(variant))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images())
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_what_is_no_plain_deit_is_refused() -> None:
    model = build("gfsa")
    with pytest.raises(ValueError, match="replaces timm's Attention, not GFSAAttention"):
        apply_variant(model, "attn_scale")
    with pytest.raises(ValueError, match="takes no attention mask"):
        model(images(), attn_mask=torch.ones(17, 17, dtype=torch.bool))
    for variant in ("neutreno", "resformer"):
        model = build(variant)
        model.set_grad_checkpointing(False)
        with pytest.raises(ValueError, match="the first block's values travel to later ones"):
            model.set_grad_checkpointing()


def test_other_variants_take_gradient_checkpointing() -> None:
    grads = []
    for checkpointing in (False, True):
        model = strengthen(build("gfsa")).eval()
        model.set_grad_checkpointing(checkpointing)
        model(images()).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# -- patch diversity ---------------------------------------------------------------------------------------------------


def wave(offset: float) -> Tensor:
    return torch.sin(torch.arange(1, 25, dtype=torch.float64) + offset).reshape(1, 6, 4)


def test_known_numbers_of_patch_diversity() -> None:
    p, h = wave(0), wave(1)
    assert cosine_loss(h).item() == pytest.approx(0.580063710, abs=1e-9)
    assert contrastive_loss(p, h).item() == pytest.approx(0.251370497, abs=1e-9)
    assert patch_diversity(p, h).item() == pytest.approx(0.831434207, abs=1e-9)
    collapsed = h[:, :1].expand(1, 6, 4)
    assert cosine_loss(collapsed).item() == pytest.approx(1)
    assert contrastive_loss(p, collapsed).item() == pytest.approx(torch.tensor(2.0).log().item())
    assert cosine_loss(torch.eye(4).double()[None]).item() == pytest.approx(0)


def test_slow_oracle_and_gradients_of_patch_diversity() -> None:
    p, h = wave(0).requires_grad_(), wave(1).requires_grad_()
    cosines, contrasts = [], []
    for i in range(6):
        others = [j for j in range(6) if j != i]
        cosines += [F.cosine_similarity(h[0, i], h[0, j], dim=0).abs() for j in others]
        near, far = (p[0, i] @ h[0, i]).exp(), (p[0, i] @ h[0, others].mean(0)).exp()
        contrasts.append(-(near / (near + far)).log())
    expected = torch.stack(cosines).mean() + torch.stack(contrasts).mean()
    assert patch_diversity(p, h).item() == pytest.approx(expected.item())
    assert torch.autograd.gradcheck(lambda h: patch_diversity(p, h), (h,))
    assert torch.autograd.grad(patch_diversity(p, h), p, allow_unused=True) == (None,)  # p is detached


def test_auxiliary_loss_is_of_patches_and_of_training_only() -> None:
    model = build("patch_diversity", weight=0.5)
    seen: dict[int, Tensor] = {}
    for number in (0, 2):
        model.blocks[number].register_forward_hook(lambda b, i, out, number=number: seen.update({number: out}))
    model.train()(images())
    assert model.auxiliary_loss.item() == pytest.approx(0.5 * patch_diversity(seen[0][:, 1:], seen[2][:, 1:]).item())
    model.eval()(images())
    assert model.auxiliary_loss == 0.0
    assert build("patch_diversity", depth=1).train()(images()).isfinite().all()  # the first block is the last


# -- the command line --------------------------------------------------------------------------------------------------


def parse(*flags: str) -> Config:
    return parse_config(Config, [*flags, "--output_dir=x"], prog="ViT_imagenet.main")


@pytest.mark.parametrize(
    ("flags", "method", "order"),
    [
        ("--norm vanilla --variant none", "vanilla", (0,)),
        ("--norm vanilla --variant attn_scale", "AttnScale", (2, 1)),
        ("--norm vanilla --variant gfsa --gfsa_order 10", "GFSA K=10", (2, 4)),
        ("--norm vanilla --variant feat_scale --feat_scale_doubled", "FeatScale doubled", (2, 2)),
        ("--norm vanilla --variant layer_scale --layer-scale-init 1e-6", "LayerScale γ=1e-06", (2, 3)),
        ("--norm vanilla --variant neutreno --neutreno_lambda 0.6", "NeuTRENO", (2, 5)),
        ("--scale 0.1 --variant gfsa", "ContraNorm s=0.1 + GFSA", (3, 4, 0.1)),
        ("--scale 0.1", "ContraNorm s=0.1", (1, 0.1)),
    ],
)
def test_labels(flags: str, method: str, order: tuple[float, ...]) -> None:
    label = parse(*flags.split()).label()
    assert (label.method, label.order) == (method, order)
    assert (label.scale == 0.1) == ("ContraNorm" in method)


def test_footnotes_say_what_was_run() -> None:
    doubled = parse(*"--norm vanilla --variant feat_scale --feat_scale_doubled --epochs 500".split()).label().note
    assert "its paper adds each term once, its released code twice" in doubled
    assert doubled.endswith("here doubled, 500 epochs")
    assert "K in 2..10" in parse(*"--norm vanilla --variant gfsa".split()).label().note
    assert parse("--norm=vanilla").label().note == parse("--scale=0.1").label().note == ""


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--variant gfas", "--variant gfas: choose one of none, .*did you mean gfsa"),
        ("--variant attn_scale --gfsa_order 4", "--gfsa_order belongs to --variant gfsa, not attn_scale"),
        ("--gfsa_w0 0.1", "--gfsa_w0 belongs to --variant gfsa, not none"),
        ("--variant gfsa --no_feat_scale_doubled", "--feat_scale_doubled belongs to --variant feat_scale"),
        ("--variant gfsa --gfsa_order 1", "--gfsa_order must be at least 2, got 1"),
        ("--variant resformer --resformer_share 1.5", "--resformer_share must be between 0 and 1"),
        ("--variant neutreno --neutreno_lambda -1", "--neutreno_lambda must be at least 0"),
        ("--variant layer_scale --layer_scale_init .inf", "--layer_scale_init must be at least 0 and finite"),
        ("--variant patch_diversity --patch_diversity_weight -1", "--patch_diversity_weight must be at least 0"),
        ("--variant neutreno --grad_checkpointing", "--grad_checkpointing computes each block alone"),
        ("--variant patch_diversity --grad_checkpointing", "drop one of the two"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    flags: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        run_main(lambda: main(["--norm=vanilla", *flags.split(), f"--output_dir={tmp_path / 'a'}"]))
    assert left.value.code == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    with pytest.raises(UserError, match=said):
        parse("--norm=vanilla", *flags.split())
    assert not (tmp_path / "a").exists()
    assert told


def test_a_run_starts_from_vanilla_weights_and_its_record_says_what_it_was(
    quick: list[str], parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = timm.create_model("deit_micro_patch8_32", depth=2, num_classes=3)
    torch.save({"model": plain.state_dict()}, tmp_path / "plain.pth")
    flags = [*quick, f"--data_path={parquet}", "--epochs=1", "--variant=gfsa"]
    main([*flags, f"--finetune={tmp_path / 'plain.pth'}", "--grad_checkpointing", f"--output_dir={tmp_path / 'r'}"])
    assert "variant: GFSA; attention: GFSAAttention; 2 new parameters, blocks.0.attn.w_k" in capsys.readouterr().out
    record = json.loads((tmp_path / "r" / "record.json").read_text())
    assert record["cell"]["method"] == "ContraNorm s=0.1 + GFSA"
    assert record["config"]["gfsa_order"] == 4 and record["config"]["neutreno_lambda"] is None
    assert record["multiply_adds"] > 0
    assert load_file(tmp_path / "r" / "model.safetensors")["blocks.1.attn.w_k"].any()  # it has learned
    main([*flags, "--eval", f"--resume={tmp_path / 'r'}", f"--output_dir={tmp_path / 'e'}"])
    with pytest.raises(UserError, match="trained with gfsa_order=4, not 3"):
        main([*flags, "--gfsa_order=3", "--eval", f"--resume={tmp_path / 'r'}", f"--output_dir={tmp_path / 's'}"])


def test_the_loop_adds_the_models_own_loss(quick: list[str], parquet: Path, tmp_path: Path) -> None:
    flags = [*quick, f"--data_path={parquet}", "--epochs=1"]
    losses = {}
    for weight in (0, 1):
        more = ["--variant=patch_diversity", f"--patch_diversity_weight={weight}"]
        main([*flags, *more, f"--output_dir={tmp_path / str(weight)}"])
        losses[weight] = json.loads((tmp_path / str(weight) / "metrics.jsonl").read_text())["train_loss"]
    main([*flags, f"--output_dir={tmp_path / 'plain'}"])
    assert json.loads((tmp_path / "plain" / "metrics.jsonl").read_text())["train_loss"] == losses[0] < losses[1] - 0.3


def test_describe_reads_the_model() -> None:
    assert describe_variant(build(None)) == "attention: Attention; 0 new parameters"
    assert describe_variant(build("feat_scale")).endswith("6 new parameters, blocks.0.attn.t1 .. blocks.2.attn.t2")
