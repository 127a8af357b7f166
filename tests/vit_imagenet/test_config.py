from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from torch import nn

from repro import tune
from repro.config import CellLabel, parse_config, to_yaml
from repro.errors import UserError
from ViT_imagenet.config import Config
from ViT_imagenet.factory import build_mixup, build_model, check_same_model, describe_norms

PROG = "ViT_imagenet.main"


def parse(*flags: str) -> Config:
    return parse_config(Config, [*flags, "--output_dir=x"], prog=PROG)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("", "--norm contra needs a step"),
        ("--scale 0", "--norm contra needs a step"),
        ("--norm vanilla --scale 0.1", "--scale has no meaning"),
        ("--norm vanilla --dual-norm", "--symmetric has no meaning"),
        ("--norm vanilla --scale 0", "--scale has no meaning"),
        ("--norm vanilla --no-identity", "--identity has no meaning"),
        ("--norm vanilla --pre-norm", "--pre_norm has no meaning"),
        ("--norm vanilla --temp 0.5", "--tau has no meaning"),
        ("--norm vanilla --axis features", "--axis has no meaning"),
        ("--norm vanilla --learnable", "--learnable has no meaning"),
        ("--norm vanilla --implementation plain", "--implementation has no meaning"),
        ("--scale 0.1 --positive", "--positive needs learnable"),
        ("--scale 0.1 --depth 0", "--depth must be at least 1"),
        ("--scale 0.1 --batch-size 3", "must be even"),
        ("--scale 0.1 --drop-path 1.5", "--drop_path must be between"),
        ("--scale 0.1 --temp 0", "--tau must be > 0"),
        ("--scale 0.1 --distillation-type soft", "go together"),
        ("--scale 0.1 --teacher-model regnety_160", "go together"),
        ("--scale 0.1 --opt lamb", "--no_fused_optimizer"),
        ("--scale 0.1 --eval", "needs weights"),
        ("--scale 0.1 --finetune a --resume b", "give one"),
        ("--scale 0.1 --reset-head", "--reset_head needs"),
        ("--scale 0.1 --data-set CIFAR10 --class-list f", "chooses class folders"),
        ("--scale 0.1 --bce-loss", "needs --smoothing 0"),
        ("--scale 0.1 --src", "--src belongs to --three_augment"),
        ("--scale 0.1 --effective-batch 100", "must be a multiple of --batch_size 64"),
        ("--scale 0.1 --effective-batch 128 --accumulate 2", "leave that out"),
        ("--scale 0.1 --finetune a --eval --reset-head", "would evaluate an untrained head"),
        ("--scale 0.1 --train-interpolation foo", "--train_interpolation foo: choose one of nearest, .*random"),
        ("--scale 0.1 --color-jitter -1", "--color_jitter must be at least 0"),
        ("--scale 0.1 --opt-betas [2,3]", r"--opt_betas must be at least 0 and below 1, got \[2.0, 3.0\]"),
        ("--scale 0.1 --opt-eps -1", "--opt_eps must be at least 0"),
        ("--scale 0.1 --momentum -1", "--momentum must be at least 0"),
        ("--scale 0.1 --weight-decay -1", "--weight_decay must be at least 0"),
        ("--scale 0.1 --warmup-lr -1", "--warmup_lr must be at least 0"),
        ("--scale 0.1 --min-lr .nan", "--min_lr must be at least 0 and finite"),
        ("--scale 0.1 --mixup -0.1", "--mixup must be at least 0"),
        ("--scale 0.1 --cutmix -1", "--cutmix must be at least 0"),
        ("--scale 0.1 --cutmix-minmax [3,1]", r"--cutmix_minmax must rise and lie in \[0, 1\]"),
        ("--scale 0.1 --cutmix-minmax [0.5,2]", "--cutmix_minmax must rise"),
        ("--scale 0.1 --data-set MARS", "MARS"),
        ("--scale 0.1 --scael 2", "scael"),
    ],
)
def test_refused(flags: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(*flags.split())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--model deit_tiny_patch16_225", "not known"),
        ("--model resnet18", "not known"),
        ("--model deit_tiny_patch16_224 --input-size 225", "225 is not a multiple of the patch size 16"),
    ],
)
def test_models_refused(flags: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_model(parse("--scale=0.1", *flags.split()), 10)


def test_a_cutmix_range_without_a_whole_pixel_is_refused() -> None:
    config = parse("--scale=0.1", "--cutmix-minmax=[0.5,0.51]")
    assert build_mixup(config, 10, 224) is not None
    with pytest.raises(UserError, match="less than a pixel wide, of 32"):
        build_mixup(config, 10, 32)


@pytest.mark.parametrize("reset", [False, True])
def test_pretrained_weights_are_loaded_with_and_without_their_head(
    reset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_ones(model: nn.Module, **_: object) -> None:
        for parameter in model.parameters():
            nn.init.ones_(parameter)

    monkeypatch.setattr("timm.models._builder.load_pretrained", load_ones)
    flags = ["--pretrained", *(["--reset_head"] if reset else [])]
    model = build_model(parse("--scale=0.1", "--model=deit_micro_patch8_32", *flags), 1000)
    assert all((p == 1).all() for name, p in model.named_parameters() if not name.startswith("head"))
    assert bool((model.head.weight == 1).all()) is not reset


def test_pretrained_weights_of_other_classes_need_a_new_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda model, **_: None)
    flags = ["--scale=0.1", "--model=deit_micro_patch8_32", "--pretrained"]
    with pytest.raises(UserError, match="has 1000 classes, the data 10: add --reset-head"):
        build_model(parse(*flags), 10)
    assert build_model(parse(*flags, "--reset_head"), 10).head.out_features == 10


def test_dropout_is_where_deits_timm_had_it() -> None:
    model = build_model(parse("--norm=vanilla", "--model=deit_micro_patch8_32", "--depth=1", "--drop=0.3"), 10)
    dropped = [name for name, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p == 0.3]
    assert dropped == ["pos_drop", "blocks.0.attn.proj_drop", "blocks.0.mlp.drop1", "blocks.0.mlp.drop2"]


@pytest.mark.parametrize(
    ("flags", "form"),
    [
        ("", "(scale=0.1)"),
        ("--axis=features", "(scale=0.1, axis=features)"),
        ("--scaled_identity --tau=0.5", "(scale=0.1, tau=0.5, scaled_identity=True)"),
    ],
)
def test_the_form_of_the_step_is_told(flags: str, form: str) -> None:
    model = build_model(parse("--scale=0.1", "--model=deit_micro_patch8_32", "--depth=1", *flags.split()), 10)
    assert describe_norms(model) == f"norms: 3 of 3 are ContraNorm, blocks.0.norm1 .. norm {form}"


@pytest.mark.parametrize("place", [".", "model.safetensors", "checkpoints/step-0000000002"])
def test_another_model_is_not_resumed(place: str, tmp_path: Path) -> None:
    resume = f"--resume={tmp_path / place}"
    written = tmp_path / "args.yaml"
    written.write_text(to_yaml(parse("--norm=vanilla")))
    check_same_model(parse("--norm=vanilla", resume))
    with pytest.raises(UserError, match="trained with norm='vanilla', not 'contra'"):
        check_same_model(parse("--scale=0.1", resume))
    settings = yaml.safe_load(to_yaml(parse("--scale=0.1")))
    del settings["scaled_identity"]  # from before this switch
    written.write_text(yaml.safe_dump(settings))
    check_same_model(parse("--scale=0.1", resume))
    with pytest.raises(UserError, match="trained with scaled_identity=False, not True"):
        check_same_model(parse("--scale=0.1", "--scaled_identity", resume))
    written.write_text("model: deit_tiny_patch16_224\n")  # of timm's own training script
    check_same_model(parse("--scale=0.1", resume))


def test_an_unknown_model_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"there are deit_micro_patch8_32, .*deit_tiny_patch16_224$"):
        build_model(parse("--scale=0.1", "--model=deit_huge"), 10)


def test_a_contranorm_name_and_vanilla_contradict_each_other() -> None:
    with pytest.raises(UserError, match="has ContraNorm, --norm vanilla has none"):
        build_model(parse("--norm=vanilla", "--model=deit_tiny_patch16_224_contranorm"), 10)


def test_the_references_spellings() -> None:
    flags = (
        "--model deit_small_patch16_224 --depth 24 --scale 0.2 --dual-norm --pre-norm --temp 0.5 --learnable --positive"
    )
    config = parse(
        *flags.split(), *"--identity --batch-size 8 --data-path d --data-set IMNET100 --input-size 64".split()
    )
    assert (config.scale, config.tau, config.symmetric, config.pre_norm) == (0.2, 0.5, True, True)
    assert (config.learnable, config.positive, config.identity, config.input_size) == (True, True, True, 64)
    assert parse("--scale=0.1", "--unscale-lr").unscaled_lr
    deit3 = parse("--scale=0.1", *"--ThreeAugment --src --bce-loss --smoothing 0".split())
    assert (deit3.three_augment, deit3.src, deit3.bce_loss) == (True, True, True)


def test_a_run_says_which_cell_it_belongs_to() -> None:
    contra = parse("--scale=0.1", "--data_set=CIFAR", "--depth=24")
    assert contra.identity is False
    assert contra.label() == CellLabel(
        "CIFAR100", "deit_tiny_patch16_224", "ContraNorm s=0.1", order=(1, 0.1), depth=24, scale=0.1
    )
    vanilla = parse("--norm=vanilla")
    assert vanilla.label() == CellLabel("IMNET", "deit_tiny_patch16_224", "vanilla", order=(0,), depth=12)
    assert parse("--scale=0.1", "--axis=features").label().method == "D-ContraNorm s=0.1"
    assert set(Config.EXECUTION_FIELDS) <= set(Config.__dataclass_fields__)


def test_the_command_line_loads_without_torch(python: str, root: Path) -> None:
    code = "import ViT_imagenet.main, sys; assert not {'torch', 'timm'} & sys.modules.keys()"
    subprocess.run([python, "-c", code], cwd=root, check=True)


def test_every_setting_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    from repro.config import _help_of

    texts = _help_of(Config)
    assert [name for name in Config.__dataclass_fields__ if not texts.get(name)] == []


ROOM = Path(__file__).parents[2] / "ViT_imagenet"


SPACE = ROOM / "configs/tuning.yaml"  # for repro.tune


@pytest.mark.parametrize("path", sorted({*ROOM.glob("configs/*.yaml")} - {SPACE}), ids=lambda p: p.stem)
def test_config_files_are_datasheets_that_parse(path: Path) -> None:
    config = parse("--config", str(path), "--scale=0.1")
    assert config.norm == "contra"
    assert "scale" not in yaml.safe_load(path.read_text()), "a step in a file would be a hidden default"
    for word in ("hardware", "time", "expect", "command"):
        assert f"# {word}" in path.read_text().lower()


def documented_lines() -> list[str]:
    """The flags of every ViT_imagenet.main line in the README, the config files and the docstrings."""
    found = []
    for path in [ROOM / "README.md", *ROOM.glob("configs/*.yaml"), *ROOM.glob("*.py")]:
        text = re.sub(r"(\\\n|\n#  )\s*", " ", path.read_text())  # a line that goes on in the next
        found += re.findall(r"ViT_imagenet\.main( +-[^\n`\"#|(]*)", text)
    return [line for line in found if not re.search(r"[$\[{…]|\.\.\.", line)]


@pytest.mark.parametrize("line", documented_lines())
def test_documented_lines_parse_and_their_files_exist(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOM.parent)
    flags = shlex.split(line)
    needed = [] if {"--scale", "--norm"} & set(flags) else ["--scale=0.1"]
    parse(*flags, *needed)  # a config that is not there is refused


@pytest.mark.parametrize("flag", ["data_root", "data_path"])
def test_a_named_folder_that_is_not_there_is_refused_before_torch_is_loaded(
    flag: str, tmp_path: Path, python: str, root: Path
) -> None:
    code = (
        "import sys; from ViT_imagenet.main import main; from repro.errors import UserError\n"
        f"try: main(['--scale=0.1', '--{flag}={tmp_path / 'gone'}', '--output_dir={tmp_path / 'run'}'])\n"
        "except UserError as error: print(error); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([python, "-c", code], cwd=root, check=True, capture_output=True, text=True)
    assert done.stdout == f"--{flag} {tmp_path / 'gone'}: no such folder\n"
    assert not (tmp_path / "run").exists()


def test_the_tuning_space_prints_lines_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    tune.main(["--space", str(SPACE), "--data", "CIFAR10", "--depths", "6", "--trials", "2"])
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    configs = [parse_config(Config, [*line[3:], "--output_dir=x"], prog="x") for line in lines]
    assert all(line[:3] == ["python", "-m", "ViT_imagenet.main"] for line in lines)
    assert all((c.data_set, c.depth, c.hold_out, c.seed) == ("CIFAR10", 6, 0.1, 100) for c in configs)
    variants = dict.fromkeys(c.variant for c in configs)
    assert [*variants] == [
        None, "attn_scale", "feat_scale", "layer_scale", "gfsa", "neutreno", "resformer", "patch_diversity"
    ]  # fmt: skip
    final = [parse_config(Config, [*line[3:], "--tuning_trials=2", "--output_dir=x"], prog="x") for line in lines]
    labels = [c.label() for c in final]
    assert [label.family for label in labels[8:10]] == ["GFSA", "GFSA"] and labels[8].method != labels[9].method
    assert configs[8].label().family is None  # a row of its own setting
    assert labels[-1].method.startswith("ContraNorm s=") and labels[-1].family is None
