"""Settings: what is refused, and what the message names."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from gnn.config import Config, DataName
from gnn.data import SOURCES
from repro.config import CellLabel, parse_config, to_yaml
from repro.errors import UserError


def parse(*argv: str) -> Config:
    return parse_config(Config, [*argv, "--output_dir=x"], prog="gnn.main")


def test_the_reference_flags_mean_what_they_say() -> None:
    line = (
        "--data citeseer --model GIN --hid 64 --lr 0.01 --dropout 0.5 --epochs 7 --wd 0 --nlayer 16 --residual 2 "
        "--norm_mode CN --norm_scale 0.8 --use_layer_norm --missing_rate 30 --temp 0.5 --seed 3 --protocol standard"
    )
    config = parse(*line.split())
    assert (config.data, config.model, config.hid, config.lr, config.dropout) == ("citeseer", "GIN", 64, 0.01, 0.5)
    assert (config.epochs, config.wd, config.nlayer, config.residual) == (7, 0.0, 16, 2)
    assert (config.norm_mode, config.scale, config.use_layer_norm) == ("CN", 0.8, True)
    assert (config.missing_rate, config.tau, config.seed, config.protocol) == (30.0, 0.5, 3, "standard")
    assert parse("--norm-mode", "PN", "--missing-rate", "5").norm_mode == "PN"  # dashes as well


def test_released_flags_of_other_models_and_features() -> None:
    config = parse("--model", "DeepGAT", "--nhead", "8", "--no_fea_norm")
    assert (config.model, config.nhead, config.fea_norm) == ("DeepGAT", 8, False)
    assert (parse().nhead, parse().fea_norm) == (1, True)


def test_a_missing_default_data_root_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not there may be downloaded; only a folder that was asked for must exist."""
    monkeypatch.setenv("CONTRANORM_DATA", "/nowhere/at/all")
    assert parse().data_root == "/nowhere/at/all"


def test_defaults_are_table_3() -> None:
    config = parse()
    assert (config.hid, config.dropout, config.lr, config.wd, config.epochs) == (32, 0.6, 5e-3, 5e-4, 200)
    assert (config.protocol, config.residual, config.dropedge, config.missing_rate) == ("reference", 0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--data karate", "data"),
        ("--model GCNIII", "model"),
        ("--norm_mode RMS", "norm_mode"),
        ("--colour red", "colour"),
        ("--nlayer two", "nlayer"),
        ("--nlayer -3", "--nlayer must be at least 1, got -3"),
        ("--nlayer 0", "--nlayer must be at least 1, got 0"),
        ("--hid 0", "--hid must be at least 1"),
        ("--epochs 0", "--epochs must be at least 1"),
        ("--residual -1", "--residual must be at least 0"),
        ("--dropout 1", r"--dropout must be in \[0, 1\), got 1.0"),
        ("--dropedge 1.5", r"--dropedge must be in \[0, 1\)"),
        ("--lr 0", "--lr must be > 0"),
        ("--lr nan", "lr"),
        ("--missing_rate 101", "--missing_rate is a percentage"),
        ("--tau 0 --norm_mode CN --norm_scale 1", "--tau must be > 0"),
        ("--eval_every 0", "--eval_every must be at least 1"),
        ("--norm_mode CN", "--norm_mode CN needs --scale"),
        ("--norm_mode CN --scale 0", "--scale must be > 0, got 0.0"),
        ("--norm_mode CN --norm_scale 0", "--scale must be > 0, got 0.0"),
        ("--norm_mode LN --scale 1", "--scale has no effect with --norm_mode LN"),
        ("--scale 1", "--scale has no effect with --norm_mode None"),
        ("--norm_mode PN --tau 2", "--tau belongs to --norm_mode CN, not PN"),
        ("--norm_mode PN --no_identity", "--identity belongs to --norm_mode CN, not PN"),
        ("--identity", "--identity belongs to --norm_mode CN, not None"),
        ("--symmetric", "--symmetric belongs to --norm_mode CN"),
        ("--implementation plain", "--implementation belongs to --norm_mode CN"),
        ("--implementation sdpa --norm_mode CN --scale 1", "implementation"),
        ("--implementation fused --norm_mode CN --scale 1", "implementation"),
        ("--degree 1", "--degree belongs to --norm_mode CN"),
        ("--degree 1 --norm_mode CN --scale 1", "--degree belongs to --implementation linear, not auto"),
        ("--degree 3 --norm_mode CN --scale 1 --implementation linear", "--degree must be 1 or 2, got 3"),
        ("--axis features --norm_mode CN --scale 1", "--axis features compares features"),
        ("--positive --norm_mode CN --scale 1", "--positive needs learnable"),
        ("--data cora --split 3", "--split: cora has one split"),
        ("--data texas --split 10", "--split must be 0 to 9"),
        ("--model SGC --residual 2", "--residual: SGC has no such skips"),
        ("--nhead 2", "--nhead: DeepGCN has no attention heads"),
        ("--model DeepGAT --nhead 0", "--nhead must be at least 1, got 0"),
        ("--model DeepGAT --nhead 5", "--hid must be a multiple of --nhead, got 32 and 5"),
        ("--alpha 0.1", "--alpha belongs to --model GCNII, or --connection residual or initial: leave it out"),
        ("--connection jumping_cat --alpha 0.1", "--alpha belongs to"),
        ("--model G2 --theta 0.5", "--theta belongs to --model GCNII: leave it out"),
        ("--conv_wd 0.01", "--conv_wd belongs to --model GCNII"),
        ("--model GCNII --gate_power 2", "--gate_power belongs to --model G2"),
        ("--half_hop_alpha 0.5", "--half_hop_alpha belongs to --half_hop: leave it out"),
        ("--model GCNII --alpha 1.5", r"--alpha must be in \[0, 1\], got 1.5"),
        ("--half_hop -1", r"--half_hop must be in \[0, 1\], got -1.0"),
        ("--model G2 --gate_power 0.5", "--gate_power must be at least 1, got 0.5"),
        ("--model GCNII --conv_wd -1", "--conv_wd must be at least 0, got -1.0"),
        ("--model GIN --propagation symmetric", "--propagation symmetric: GIN weighs edges itself"),
        ("--model GCNII --connection initial", "--connection initial: GCNII has none; leave it out"),
        ("--connection dense", "--connection dense: choose one of residual, initial"),
        ("--connection initial --nlayer 1", "--connection initial joins hidden layers: --nlayer must be at least 2"),
        ("--connection initial --residual 1", "--residual: beside --connection initial; leave it at 0"),
        ("--nlayer 1 --norm_mode CN --scale 1", "--norm_mode CN stands on hidden layers: --nlayer must be at least 2"),
        ("--nlayer 1 --use_layer_norm", "--use_layer_norm stands on hidden layers"),
        ("--nlayer 2 --norm_mode MessageNorm", "--norm_mode MessageNorm stands .*: --nlayer must be at least 3"),
        ("--nlayer 2 --residual 1", "--residual 1 skips hidden layers: it needs --nlayer 3"),
        ("--seed -1", "--seed must be 0 to 4294967295, got -1"),
        ("--seed 99999999999999999999", "--seed must be 0 to 4294967295"),
        ("--data_root /nowhere/at/all", "--data_root /nowhere/at/all: no such folder"),
    ],
)
def test_nonsense_is_refused(argv: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        parse(*argv.split())
    assert "\n" not in str(error.value)


def test_unknown_yaml_key(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("nlayer: 4\ncolour: red\n")
    with pytest.raises(UserError, match="colour"):
        parse("--config", str(path))


def test_the_command_line_wins_over_yaml(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("nlayer: 4\nnorm_mode: PN\n")
    config = parse("--nlayer", "6", "--config", str(path))
    assert (config.nlayer, config.norm_mode) == (6, "PN")


@pytest.mark.parametrize("flags", [{"norm_mode": "CN", "scale": 0.2}, {"norm_mode": "PN"}, {}])
def test_a_config_survives_its_yaml(flags: dict[str, Any], tmp_path: Path, config: Any) -> None:
    mine = config(**flags, use_layer_norm=True, eval_every=5)
    path = tmp_path / "args.yaml"
    path.write_text(to_yaml(mine))
    assert parse_config(Config, ["--config", str(path)], prog="gnn.main") == mine


def test_what_is_unset_becomes_the_released_form() -> None:
    assert parse("--norm_mode", "CN", "--scale", "1").identity is True
    assert parse("--norm_mode", "CN", "--scale", "1", "--no_identity").identity is False
    assert parse().identity is None and parse().scale is None
    assert parse("--norm_mode", "PN").scale == 1.0


@pytest.mark.parametrize(
    ("flags", "method", "family", "order", "scale"),
    [
        ("", "vanilla", "vanilla", (0, 0, 0, 0), None),
        ("--use_layer_norm", "vanilla + LayerNorm", "", (0, 0, 0, 1), None),
        ("--norm_mode CN --scale 1 --tau 0.5 --pre_norm", "ContraNorm (tau=0.5, pre-norm) s=1",
         "ContraNorm (tau=0.5, pre-norm)", (10, 0, 1, 0), 1),
        ("--norm_mode LN", "LN", "", (1, 0, 0, 0), None),
        ("--norm_mode PN", "PN", "", (2, 0, 1, 0), 1.0),
        ("--norm_mode PN-SI --scale 5 --use_layer_norm", "PN-SI s=5 + LayerNorm", "PN-SI + LayerNorm", (3, 0, 5, 1), 5),
        ("--norm_mode BatchNorm", "BatchNorm", "", (5, 0, 0, 0), None),
        ("--norm_mode DiffGroupNorm", "DGN lambda=0.01", "DGN", (6, 0, 0.01, 0), 0.01),
        ("--norm_mode CN --scale 1.0 --use_layer_norm", "ContraNorm s=1 + LayerNorm", "ContraNorm + LayerNorm",
         (10, 0, 1, 1), 1.0),
        ("--norm_mode CN --scale 0.2", "ContraNorm s=0.2", "ContraNorm", (10, 0, 0.2, 0), 0.2),
        ("--norm_mode CN --scale 0.5 --no_identity", "ContraNorm (Eq. 6) s=0.5", "ContraNorm (Eq. 6)",
         (10, 1, 0.5, 0), 0.5),
        ("--connection residual --alpha 0.3", "residual connection alpha=0.3", "residual connection",
         (9.125, 0, 0, 0, 0), 0.3),
        ("--connection initial", "initial connection alpha=0.5", "initial connection", (9.25, 0, 0, 0, 1), 0.5),
        ("--connection jumping_cat", "jumping knowledge", "", (9.375, 0, 0, 0, 2), None),
        ("--connection jumping_max", "jumping knowledge (max)", "", (9.5, 0, 0, 0, 3), None),
        ("--model GCNII --theta 0.6 --propagation symmetric", "GCNII alpha=0.1, theta=0.6 (symmetric)",
         "GCNII (symmetric)", (9.625, 0, 0, 0, 4, 9), 0.1),
        ("--model G2 --gate_power 3", "G2 p=3", "G2", (9.75, 0, 0, 0, 5), 3),
        ("--half_hop 0.7 --use_layer_norm", "Half-Hop p=0.7 + LayerNorm", "Half-Hop + LayerNorm",
         (9.875, 0, 0, 1, 6), 0.7),
        ("--model GCNII --norm_mode CN --scale 1", "ContraNorm s=1 + GCNII alpha=0.1", "ContraNorm + GCNII",
         (10, 0, 1, 0, 4), 1),
    ],
)  # fmt: skip
def test_labels(flags: str, method: str, family: str, order: tuple[float, ...], scale: float | None) -> None:
    model = [] if "--model" in flags else ["--model", "DeepGCN"]
    config = parse("--data", "texas", *model, "--nlayer", "8", *flags.split())
    expected = CellLabel("texas", config.model, method, order, depth=8, scale=scale, family=family or method)
    assert config.label() == expected


def test_execution_fields_are_fields() -> None:
    assert set(Config.EXECUTION_FIELDS) <= {f.name for f in dataclasses.fields(Config)}


@pytest.mark.parametrize("name", get_args(DataName))
def test_every_data_set_has_a_config_file(name: str, root: Path) -> None:
    path = root / "gnn/configs" / f"{name}.yaml"
    config = parse("--config", str(path))
    assert config.data == name
    assert set(yaml.safe_load(path.read_text())) >= {"data", "model", "hid", "dropout", "lr", "wd", "epochs"}


def test_every_name_can_be_loaded() -> None:
    assert set(get_args(DataName)) == {*SOURCES, "digits"}
