"""The shell of gnn/: what it would run, that each line trains, and the way from lines to a table and a figure."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gnn import data as graphs
from gnn import train as training
from gnn.config import CommandLine, Config
from gnn.main import main
from gnn.pyg import Data
from repro.config import parse_config
from repro.report import figures, tables
from repro.sweep import sweep

NORMS = ("None", "LN", "PN", "PN-SI", "PN-SCS")


Hear = Callable[..., tuple[list[str], list[list[str]]]]  # the fixture's type


def parse(words: list[str], root: Path, monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The runs that a line asks for."""
    monkeypatch.chdir(root)  # lines name configs relative to the repository
    flags = words[words.index("gnn.main") + 1 :]
    flags = flags if "--output_dir" in flags else [*flags, "--output_dir=x"]
    return parse_config(CommandLine, flags, prog="gnn.main").runs()


@pytest.fixture
def one_small_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every data set becomes a graph of 60 nodes."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    x = torch.rand(60, 12, generator=generator)
    edges = torch.randint(0, 60, (2, 240), generator=generator)
    masks = [torch.arange(60) // 20 == part for part in range(3)]
    data = Data(x=x, y=y, edge_index=edges, train_mask=masks[0], val_mask=masks[1], test_mask=masks[2])
    monkeypatch.setattr(training, "load_graph", lambda name, *args, **kwargs: graphs.as_graph(name, data))


def test_one_cell(hear: Hear, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "gnn/run_baselines.sh"
    (call,), _ = hear(script, "cora", "8", "CN", "1.0", "3", "--", "--use_layer_norm", "--epochs", "7")
    (config,) = parse(call.split(), root, monkeypatch)
    assert (config.data, config.nlayer, config.norm_mode, config.norm_scale, config.seed) == ("cora", 8, "CN", 1.0, 3)
    assert config.use_layer_norm and config.epochs == 7
    (call,), _ = hear(script, DATA="texas", NLAYER="16", NORM="PN")
    (other,) = parse(call.split(), root, monkeypatch)
    assert (other.data, other.nlayer, other.norm_mode, other.norm_scale, other.seed) == ("texas", 16, "PN", None, 0)
    assert other.output_dir != config.output_dir
    (call,), _ = hear(script, "cora", "2", SEED="0,1,2")
    assert [run.seed for run in parse(call.split(), root, monkeypatch)] == [0, 1, 2]


def test_the_sweep_is_table_3(hear: Hear, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, lines = hear("gnn/run_different_baselines.sh", "--dry-run", JOBS="3")
    assert calls == ["-m repro.sweep --results results/table3/runs --jobs 3 --cluster local --dry-run"]
    assert len(lines) == len({tuple(words) for words in lines}) == 4 * 5 * (2 * len(NORMS) + 4)
    runs = [parse(words, root, monkeypatch) for words in lines]
    assert all([run.seed for run in cell] == [0, 1, 2, 3, 4] for cell in runs)
    configs = [cell[0] for cell in runs]
    assert {c.data for c in configs} == {"cora", "citeseer", "chameleon", "squirrel"}
    assert {c.nlayer for c in configs} == {2, 4, 8, 16, 32}
    assert all((c.protocol, c.epochs, c.hid) == ("reference", 200, 32) for c in configs)
    per_cell = Counter((c.norm_mode, c.norm_scale, c.use_layer_norm) for c in configs)
    expected = {(norm, None, layer_norm) for norm in NORMS for layer_norm in (False, True)}
    assert set(per_cell) == expected | {("CN", scale, True) for scale in (0.2, 0.5, 0.8, 1.0)}
    assert set(per_cell.values()) == {4 * 5}


def test_variables_choose_the_cells(hear: Hear, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"DATASETS": "digits", "DEPTHS": "3", "NORMS": "PN CN", "SCALES": "0.2", "SEEDS": "7", "RESULTS": "/r"}
    calls, lines = hear(
        "gnn/run_different_baselines.sh",
        **chosen,
        PROTOCOL="standard",
        FLAGS="--probe",
        CLUSTER="slurm",
    )
    assert calls == ["-m repro.sweep --results /r --jobs 2 --cluster slurm"]
    configs = [config for words in lines for config in parse(words, root, monkeypatch)]
    assert len(configs) == 3 and all(c.probe and c.seed == 7 and c.nlayer == 3 for c in configs)
    assert {c.protocol for c in configs} == {"standard"}


def test_seeds_together_or_one_by_one(hear: Hear, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways ask for the same runs; auto goes on as the sweep began, and keeps all processes busy."""
    few = {"DATASETS": "cora", "DEPTHS": "2 4", "NORMS": "None", "SEEDS": "0  1 2", "RESULTS": str(tmp_path / "runs")}

    def asked(**variables: str) -> list[list[str]]:
        return hear("gnn/run_different_baselines.sh", **few | variables)[1]

    def settings(lines: list[list[str]]) -> list[dict[str, Any]]:
        runs = [vars(config) | {"output_dir": ""} for words in lines for config in parse(words, root, monkeypatch)]
        return sorted(runs, key=str)

    one_by_one, together = asked(SEEDS_TOGETHER="0"), asked(SEEDS_TOGETHER="1")
    assert (len(one_by_one), len(together)) == (12, 4)
    assert all(words[-2] == "--seed" for words in one_by_one)
    assert all(words[-2:] == ["--seeds", "0,1,2"] for words in together)
    assert settings(one_by_one) == settings(together)

    assert asked() == asked(JOBS="2") == one_by_one and asked(JOBS="1") == together  # 4 cells for 2 processes are few
    assert asked(JOBS="1", SEEDS="0") == asked(SEEDS_TOGETHER="0", SEEDS="0")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/sweep.txt").write_text("python -m gnn.main --data cora --seed 0\n")
    assert asked(JOBS="1") == one_by_one
    (tmp_path / "runs/sweep.txt").write_text("python -m gnn.main --data cora --seeds 0,1,2 --epochs 3\n")
    assert asked(JOBS="2") == together
    assert asked(JOBS="2", SEEDS="0 1") == asked(SEEDS_TOGETHER="0", SEEDS="0 1")
    with pytest.raises(subprocess.CalledProcessError) as refused:
        asked(SEEDS_TOGETHER="yes")
    assert refused.value.returncode == 2


def test_every_distinct_line_trains(
    hear: Hear, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_small_graph: None
) -> None:
    """Every combination of norm, scale, LayerNorm and depth of the default sweep, each data set once."""
    _, lines = hear("gnn/run_different_baselines.sh", SEEDS="0")
    monkeypatch.chdir(root)
    first = lines[: len(lines) // 4]
    others = {words[words.index("--config") + 1]: words for words in lines}
    chosen = [*first, *others.values()]
    assert len(chosen) == 5 * 14 + 4
    for number, words in enumerate(chosen):
        main([*words[3:], "--epochs=1", "--device=cpu", f"--output_dir={tmp_path / str(number)}"])
        record = json.loads((tmp_path / str(number) / "record.json").read_text())
        assert 0 <= record["metrics"]["test_accuracy"] <= 1


def test_table3_calls_what_exists(hear: Hear, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "scripts/reproduce_table3.sh"
    calls, lines = hear(script, DATASETS="cora texas", DEPTHS="2", NORMS="None", SEEDS="0", RESULTS="/r/runs")
    assert len(lines) == 4
    parsed: list[Any] = []
    for call in calls[1:]:
        words = shlex.split(call.replace("{data: ", "'{data: ").replace("}", "}'"))
        module = {"repro.report.tables": tables, "repro.report.figures": figures}[words[1]]
        parsed.append(parse_config(module.Config, words[2:], prog=words[1]))
    assert [c.output for c in parsed] == ["/r/table3.md", "/r/table3_chosen.md", "/r/depth.png"]
    for flag in ("--dry-run", "--status"):
        assert len(hear(script, flag)[0]) == 1


@pytest.mark.parametrize("together", ["0", "1"])
def test_from_lines_to_table_and_figures(
    together: str,
    hear: Hear,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    one_small_graph: None,
) -> None:
    """The folders and records that a sweep leaves are what repro.report.tables and repro.report.figures read."""
    chosen = {"DATASETS": "digits", "DEPTHS": "2 4", "NORMS": "None PN CN", "SCALES": "0.2 1.0", "SEEDS": "0 1"}
    _, lines = hear("gnn/run_different_baselines.sh", **chosen, SEEDS_TOGETHER=together, FLAGS="--epochs 2 --probe")
    assert len(lines) == {"0": 24, "1": 12}[together]
    runs = tmp_path / "runs"
    cells, _ = sweep.read_cells([shlex.join(words) for words in lines], runs)
    monkeypatch.chdir(root)
    for cell in cells:
        main(list(cell.argv[3:]))
    assert {sweep.status(cell).state for cell in cells} == {"done"}
    capsys.readouterr()
    tables.main(["--preset", "table3", "--records", str(runs)])
    text = capsys.readouterr().out
    rows = [line.split("|")[2].strip() for line in text.splitlines() if line.startswith("| digits")]
    assert rows == [
        "None", "None + LayerNorm", "PN", "PN + LayerNorm", "CN s=0.2 + LayerNorm", "CN s=1 + LayerNorm",
    ]  # fmt: skip
    assert "nlayer 2" in text and "nlayer 4" in text and text.count("(2)") == 2 * len(rows)
    best = "--rows data,norm_mode,use_layer_norm --best norm_scale --by validation_accuracy".split()
    tables.main(["--preset", "table3", "--records", str(runs), *best])
    assert capsys.readouterr().out.count("| CN ") == 1
    for kind, where in (("depth", "{data: digits}"), ("collapse", '{data: digits, nlayer: "4"}')):
        picture = tmp_path / f"{kind}.png"
        figures.main(["--records", str(runs), "--kind", kind, "--where", where, "--output", str(picture)])
        assert picture.stat().st_size > 5000


def test_which_python(root: Path, tmp_path: Path) -> None:
    """PYTHON of the caller, else the repository's .venv, else the one on PATH."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/python.sh").write_text((root / "scripts/python.sh").read_text())
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "VENV")}

    def chosen(**variables: str) -> str:
        shell = "set -euo pipefail; source scripts/python.sh; bash -c 'echo $PYTHON'"
        done = subprocess.run(
            ["bash", "-c", shell], cwd=tmp_path, env=clean | variables, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert chosen() == "python"
    assert chosen(PYTHON=sys.executable) == sys.executable
    interpreter = tmp_path / ".venv/bin/python"
    interpreter.parent.mkdir(parents=True)
    interpreter.symlink_to(sys.executable)
    assert chosen() == str(interpreter)
    assert chosen(PYTHON=sys.executable) == sys.executable
    interpreter.unlink()
    (tmp_path / "other/bin").mkdir(parents=True)
    (tmp_path / "other/bin/python").symlink_to(sys.executable)
    assert chosen(VENV=str(tmp_path / "other")) == str(tmp_path / "other/bin/python")
