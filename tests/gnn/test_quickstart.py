"""The quickstart: which cells, which table, which pictures; a second time repeats nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import pandas as pd
import pytest

from gnn import quickstart
from gnn.quickstart import ROWS, QuickConfig, cells, main, table
from repro.errors import UserError

pytestmark = pytest.mark.usefixtures("small_digits")


def in_this_process(configs: Any, jobs: int) -> None:
    """Stands for the pool, whose processes would load torch anew."""
    for config in configs:
        if not (Path(config.output_dir) / "record.json").exists():
            quickstart.run_cell(config)


def test_cells_are_six_norms_by_four_depths_by_two_seeds() -> None:
    runs = cells(QuickConfig())
    assert len(runs) == len(ROWS) * 4 * 2
    assert len({config.output_dir for _, config in runs}) == len(runs)
    assert {config.nlayer for _, config in runs} == {2, 4, 8, 16}
    assert all(config.probe == (config.nlayer == 16) and config.epochs == 100 for _, config in runs)
    contra = [config for label, config in runs if label.startswith("ContraNorm")]
    assert {(c.norm_mode, c.norm_scale, c.use_layer_norm) for c in contra} == {("CN", 1.0, True)}
    fair = {(c.norm_mode, c.use_layer_norm) for _, c in runs}
    assert {("PN", False), ("PN", True), ("None", False), ("None", True)} <= fair  # the LayerNorm's share is shown


def test_table_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "run_all", in_this_process)
    argv = ["--depths", "[2, 4]", "--epochs", "3", "--output_dir", str(tmp_path)]
    main(argv)
    first = capsys.readouterr().out
    assert all(label in first for label in ROWS)
    pictures = [Path(line) for line in first.splitlines() if line.endswith(".png")]
    assert len(pictures) == 2
    for picture in pictures:
        assert matplotlib.image.imread(picture)[..., :3].std() > 0.01  # something is drawn

    records = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("record.json")}
    assert len(records) == len(ROWS) * 2 * 2
    main(argv)
    assert capsys.readouterr().out == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("record.json")} == records

    accuracies = [
        json.loads((tmp_path / f"digits/runs/PN-depth4-epochs3-seed{seed}/record.json").read_text())["metrics"]
        for seed in (0, 1)
    ]
    mean = 50 * sum(a["test_accuracy"] for a in accuracies)
    (row,) = [line for line in first.splitlines() if line.startswith("PairNorm  ")]
    assert f"{mean:.1f} ±" in row


def test_one_seed_has_no_spread() -> None:
    frame = pd.DataFrame({"norm": ["none"] * 2, "depth": [2, 4], "seed": [0, 0], "accuracy": [81.25, 40.0]})
    assert "±" not in table(frame) and "81.2" in table(frame) and "40.0" in table(frame)


def test_processes_of_the_pool_write_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the other process has the real digits
    runs = [config for label, config in cells(QuickConfig(depths=[2], seeds=1, epochs=1, output_dir=str(tmp_path)))]
    quickstart.run_all(runs[:2], jobs=1)
    assert len(list(tmp_path.rglob("record.json"))) == 2


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("--depths=[1]", "--depths needs numbers of at least 2"),
        ("--depths=[]", "--depths needs numbers of at least 2"),
        ("--seeds=0", "--seeds and --jobs must be at least 1"),
        ("--data=karate", "data"),
    ],
)
def test_nonsense_is_refused(argv: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        main([argv, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
