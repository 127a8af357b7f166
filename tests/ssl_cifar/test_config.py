"""The command line: what is refused, in one line, before anything is written; methods, labels, documents."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from repro.config import _help_of
from repro.errors import UserError, run_main
from SSL_cifar import methods, plan
from SSL_cifar.augment import PRESETS
from SSL_cifar.config import Config
from SSL_cifar.linear import PROTOCOLS
from SSL_cifar.main import chosen_method, main, parse

RDM = "--method rdm_simsiam"


def settings(line: str) -> Config:
    return parse([*line.split(), "--output_dir=x"])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "no --method: choose one of .*simsiam_multi"),
        ("--method simsam", "--method simsam: choose one of"),
        ("--method simsiam --beta 1", "--beta is a flag of --method simclr_attn, not of simsiam: leave it out"),
        (f"{RDM} --pred_hidden_dim 5", "--pred_hidden_dim is a flag of --method byol or simsiam"),
        ("--method simclr --betta 1", "unknown flag --betta"),
        (f"{RDM} --pred_type log --pred_location target", "filter of the online side"),
        (f"{RDM} --pred_type log_1 --sigma 2", "log_1 takes no --sigma: leave it out"),
        (f"{RDM} --pred_location target --sigma -1.5", "sigma must be at least -1"),
        (f"{RDM} --sigma .nan", "sigma must be finite"),
        (f"{RDM} --pred_location target --sigma 1", "collapses: take the other sign, or add --negative_control"),
        (f"{RDM} --sigma -1", "collapses: take the other sign"),
        (f"{RDM} --pred_type contranorm", "collapses: take the other sign"),
        (f"{RDM} --pred_type contranorm --sigma -1 --pred_location target", "collapses: take the other sign"),
        (f"{RDM} --negative_control", "--negative_control is for the sign that collapses"),
        ("--method simsiam_multi --lam 1.5", "--lam must be between 0 and 1"),
        ("--method simsiam_multi --lam -1e-1", "--lam must be between 0 and 1, got -0.1"),
        ("--method simsiam_multi --epochs 51", "--plain_epochs 51 must be .* below --epochs 51, to use it"),
        ("--method simsiam_multi --plain_epochs 0", "at least 1, to fill the bank"),
        ("--method simclr --temperature 0", "--temperature must be above 0"),
        ("--method moco --temperature -1", "--temperature must be above 0"),
        ("--method simclr_attn --beta -1", "--beta must not be negative"),
        ("--method moco --queue_size 100", "--queue_size 100 does not hold the 256 keys"),
        ("--method byol --base_tau_momentum 1.1", "--base_tau_momentum must be between 0 and 1"),
        ("--method arcl --num_views 1", "--num_views 1: a pair needs at least two"),
        ("--method arcl --base moco --reading swap", "--reading has no meaning with --base moco"),
        ("--method arcl --queue_size 512", "--queue_size has no meaning with --base simclr"),
        ("--method arcl --recompute --align average", "--recompute is for --reading select"),
        ("--method mae", "--method mae works on patches: give --backbone vit_"),
        ("--method simsiam --backbone vit_micro --width 16", "--width has no meaning with --backbone vit_micro"),
        ("--method simsiam --patch_size 8", "--patch_size has no meaning with --backbone resnet18"),
        ("--method simsiam --backbone vit_micro --patch_size 5", "not a multiple of --patch_size 5"),
        ("--method simsiam --batch_size 1", "--batch_size 1: images are compared within a batch"),
        ("--method simsiam --epochs 0", "--epochs must be at least 1"),
        ("--method simsiam --lr 0", "--lr must be above 0"),
        ("--method simsiam --lr .nan", "--lr must be above 0"),
        ("--method simsiam --warmup_epochs -1", "--warmup_epochs must not be negative"),
        ("--method simsiam --proj_output_dim 0", "--proj_output_dim at least 1"),
        ("--method simsiam --pred_lr_factor 0", "--pred_lr_factor above 0"),
        ("--method simsiam --class_list f", "--class_list chooses class folders"),
        ("--method simsiam --augment simclr", "choose one of solo_cifar"),
    ],
)
def test_refused(line: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        settings(line)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--data_path /nowhere", "--data_path /nowhere: no such folder"),
        ("--data_path EMPTY", "no CIFAR10 there .*--download"),
        ("--data_root ROOT --data_set CIFAR100", "no data for --data_set CIFAR100"),
        ("--batch_size 25", "24 training images do not fill one batch of 25"),
        ("--pred_location target", "--negative_control"),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_no_folder(
    more: str, said: str, quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    more = more.replace("EMPTY", str(tmp_path / "empty")).replace("ROOT", str(tmp_path))
    flags = [*quick, *RDM.split(), "--stem=s2", "--width=4"]
    if "--data_root" in more:
        at = flags.index("--data_path")
        flags = flags[:at] + flags[at + 2 :]
    with pytest.raises(SystemExit) as left:
        run_main(lambda: main([*flags, *more.split(), f"--output_dir={tmp_path / 'run'}"]))
    assert left.value.code == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(said, told), told
    assert not (tmp_path / "run").exists()


def test_images_of_several_sizes_are_not_cached(
    quick: list[str], make_folders: Callable[..., Path], tmp_path: Path
) -> None:
    from PIL import Image

    folder = make_folders()
    with Image.open(folder / "train" / "n02" / "1.jpeg") as image:
        image.resize((16, 16)).save(folder / "train" / "n02" / "1.jpeg")
    flags = [*quick, "--method=simclr", "--stem=s2", "--width=4", f"--data_path={folder}", "--data_set=FOLDER"]
    with pytest.raises(UserError, match="of several: give --no_cache"):
        main([*flags, f"--output_dir={tmp_path / 'a'}"])
    main([*flags, "--no_cache", "--num_workers=0", "--epochs=1", f"--output_dir={tmp_path / 'b'}"])
    assert (tmp_path / "b" / "record.json").exists()


def test_the_method_is_found_on_the_command_line_or_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("method: byol\nepochs: 3\n")
    assert chosen_method(["--method", "moco"]) == chosen_method(["--method=moco"]) == "moco"
    assert chosen_method(["--config", str(path)]) == chosen_method([f"--config={path}"]) == "byol"
    assert chosen_method(["--config", str(path), "--method", "moco"]) == "moco"
    assert chosen_method([]) is None
    config = settings(f"--config {path}")
    assert (type(config), config.method, config.epochs) == (methods.load("byol").Settings, "byol", 3)


def test_a_negative_sigma_with_an_exponent_is_a_number() -> None:
    assert settings(f"{RDM} --sigma -1e-1 --pred_location target").sigma == -0.1


def test_the_cell_names_the_method_with_its_knob() -> None:
    labels = {
        "--method simsiam": "SimSiam",
        "--method simsiam_multi": "SimSiam-Multi λ=0.5",
        "--method simclr_attn --temperature 0.7": "SimCLR-Attn β=1 τ=0.7",
        f"{RDM} --pred_location target --sigma -1": "RDM-SimSiam target poly σ=-1",
        f"{RDM} --pred_type log_2": "RDM-SimSiam online log_2",
        f"{RDM} --pred_location target --negative_control": "RDM-SimSiam target poly σ=1 (negative control)",
        "--method rdm_byol": "RDM-BYOL online poly σ=1",
        "--method arcl": "ArCL m=4 τ=0.5",
        "--method arcl --align average --base moco": "AAL m=4 MoCo τ=0.5",
    }
    for line, method in labels.items():
        assert settings(line).label().method == method
        assert settings(line).label().data == "CIFAR10"


def test_every_setting_says_why_and_execution_fields_are_fields() -> None:
    for name in methods.NAMES:
        kind = methods.load(name).Settings
        texts = _help_of(kind)
        assert [field.name for field in dataclasses.fields(kind) if not texts.get(field.name)] == []
        assert set(kind.EXECUTION_FIELDS) <= set(kind.__dataclass_fields__)


def test_rdm_byols_projector_is_byols() -> None:
    config = settings("--method rdm_byol")
    assert (config.proj_hidden_dim, config.proj_output_dim, config.base_tau_momentum) == (4096, 256, 0.99)


def test_no_method_is_named_outside_its_file() -> None:
    """Nor flag: what a method has of its own stands in its file, and in those that build on it."""
    room = Path(methods.__file__).parent.parent
    own = {"lam", "beta", "sigma", "plain_epochs", "queue_size", "negative_control", "num_views", "pred_location"}
    for path in room.glob("*.py"):
        text = path.read_text()
        for name in [f'"{name}"' for name in methods.NAMES if name not in {*PRESETS, *PROTOCOLS}] + [
            f".{flag}" for flag in own
        ]:
            assert name not in text, (path.name, name)


def test_the_cost_of_a_data_set_of_unknown_size() -> None:
    line = "--method simclr --data_set FOLDER --stem s2 --width 4"
    with pytest.raises(UserError, match="--data_set FOLDER: of unknown size: give --max_train_samples"):
        plan.gpu_hours(settings(line), 20.0)
    assert plan.gpu_hours(settings(f"{line} --max_train_samples 10"), 20.0) > 0
