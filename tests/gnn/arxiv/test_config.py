"""Settings: published defaults, released names, labels of table cells, and what is refused."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from gnn.arxiv.__main__ import main
from gnn.arxiv.config import GIANT, Config
from repro.config import LOCATION_FIELDS, parse_config
from repro.errors import UserError

Make = Callable[..., Config]
RELEASED = (
    "--n-layers 2 --n-hidden 256 --n-heads 3 --dropout 0.75 --input-drop 0.25 --edge-drop 0.3 --use-norm --use-labels "
    "--no-attn-dst --n-label-iters 1 --mask-rate 0.5 --n-epochs 1000 --lr 0.002 --wd 0 --alpha 0.95 --temp 0.7 "
    "--group 2 --seed 0 --dcn_scale 1 --tau 1 --dcn_use_scale"
)


def parse(line: str) -> Config:
    return parse_config(Config, line.split(), prog="gnn.arxiv")


def test_the_published_student_by_the_released_flags() -> None:
    given = parse(f"--output_dir x --mode student --teacher t --norm ContraNorm {RELEASED}")
    defaults = Config(output_dir="x", mode="student", teacher="t", norm="ContraNorm", scale=1.0, identity=True)
    assert given == defaults
    assert given.temp == 0.7 and given.tau == 1  # --temp is the distillation's
    other = parse("--output_dir x --norm ContraNorm --dcn_scale 2 --dcn_use_norm --dcn_use_mean --no_dcn_use_scale")
    assert (other.scale, other.pre_norm, other.dcn_use_mean, other.keeps_identity) == (2, True, True, False)


@pytest.mark.parametrize("name", ["ogbn-arxiv", "dblp", "coauthor_cs", "cora"])
def test_configs(name: str, root: Path) -> None:
    config = parse(f"--config {root}/gnn/arxiv/configs/{name}.yaml --output_dir x")
    assert config == Config(output_dir="x", data=name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "model", "method"),
    [
        ({}, "RevGAT", "vanilla"),
        ({"norm": "ContraNorm", "scale": 1.0}, "RevGAT", "D-ContraNorm s=1"),
        ({"norm": "ContraNorm", "scale": 1.0, "scaled_tau": True}, "RevGAT", "D-ContraNorm s=1 tau=N/D"),
        ({"norm": "ContraNorm", "scale": 1.0, "tau": 0.5, "scaled_tau": True}, "RevGAT",
         "D-ContraNorm s=1 tau=0.5 N/D"),
        ({"norm": "ContraNorm", "scale": 0.5, "tau": 4.0, "identity": False}, "RevGAT",
         "D-ContraNorm (Eq. 6) s=0.5 tau=4"),
        ({"norm": "ContraNorm", "scale": 1.0, "axis": "tokens"}, "RevGAT", "ContraNorm s=1"),
        ({"mode": "student", "teacher": "t"}, "RevGAT+KD", "vanilla"),
    ],
)  # fmt: skip
def test_label(settings: dict[str, object], model: str, method: str, config: Make) -> None:
    label = config(**settings).label()
    assert (label.data, label.model, label.method, label.depth) == ("cora", model, method, 4)
    assert (label.order == (0,)) == (method == "vanilla")


def test_giant_features_where_their_file_is(tmp_path: Path, config: Make) -> None:
    assert config(data="ogbn-arxiv").features == "raw"
    (tmp_path / GIANT).parent.mkdir(parents=True)
    (tmp_path / GIANT).touch()
    found = config(data="ogbn-arxiv", mode="student", teacher="t")
    assert found.features == "giant" and found.label().model == "GIANT-XRT+RevGAT+KD"  # as published
    assert config(data="ogbn-arxiv", features="raw").label().model == "RevGAT"
    assert config(data="dblp").features == "raw"


def test_where_and_how_a_run_is_computed_does_not_tell_cells_apart() -> None:
    assert {"teacher", "reversible", "device", "probe"} <= set(Config.EXECUTION_FIELDS)
    assert "implementation" not in Config.EXECUTION_FIELDS  # linear is an approximation
    assert set(Config.EXECUTION_FIELDS) >= {name for name in LOCATION_FIELDS if name != "data_path"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--attn-drop 0.1", "attn_drop"),
        ("--mode student", "--teacher"),
        ("--teacher t", "--mode student"),
        ("--scale 1", "--scale belongs to --norm ContraNorm"),
        ("--tau 2", "--tau belongs to --norm ContraNorm"),
        ("--scaled_tau", "--scaled_tau belongs to --norm ContraNorm"),
        ("--norm ContraNorm", "needs --scale > 0"),
        ("--norm ContraNorm --scale 0", "needs --scale > 0"),
        ("--norm ContraNorm --scale 1 --implementation linear", "--implementation belongs to --axis tokens"),
        ("--norm ContraNorm --scale 1 --symmetric", "--symmetric belongs to --axis tokens"),
        ("--norm ContraNorm --scale 1 --learnable", "--learnable is not offered"),
        ("--norm ContraNorm --scale 1 --scaled_identity", "--scaled_identity is not offered"),
        ("--norm ContraNorm --scale 1 --axis tokens --implementation fused --data cora", "implementation"),
        ("--seed -1", "--seed must be 0 to 4294967295, got -1"),
        ("--norm ContraNorm --scale 1 --axis tokens", "linear --degree 1"),
        ("--norm ContraNorm --scale 1 --axis tokens --scaled_tau", "--axis features"),
        ("--norm ContraNorm --scale 1 --tau 0", "--tau must be > 0"),
        ("--n_layers 1", "--n_layers must be at least 2"),
        ("--n_hidden 255", "multiple of --group"),
        ("--no_use_labels", "--n_label_iters"),
        ("--dropout 1", "--dropout must be in"),
        ("--mask_rate 0", "--mask_rate"),
        ("--data dblp --features giant", "not of dblp"),
        ("--data pubmed", "pubmed"),
    ],
)
def test_refused(line: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(f"--output_dir x {line}")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_bad_input_is_one_line_and_exit_code_2(python: str, tmp_path: Path) -> None:
    for line, message in [
        ("--attn-drop 0.1", "attn_drop"),
        (f"--features giant --data_root {tmp_path}", "could not be fetched"),
    ]:
        command = [python, "-m", "gnn.arxiv", *line.split(), "--output_dir", str(tmp_path / "run")]
        environment = {"PATH": "", "XDG_CACHE_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9"}
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and message in done.stderr
        assert not (tmp_path / "run").exists()


def test_a_student_without_a_teacher(tmp_path: Path) -> None:
    line = f"--mode student --data cora --teacher {tmp_path}/none --output_dir {tmp_path}/run"
    with pytest.raises(UserError, match="no finished teacher"):
        main(line.split())
    assert not (tmp_path / "run").exists()
