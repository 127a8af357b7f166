"""Figures show the numbers of the records, one curve per label, and refuse what they cannot draw."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from repro.errors import UserError
from repro.report import figures
from repro.report.figures import COLLAPSE, Config, _share_out, _style, draw, draw_collapse, draw_depth, figure_of
from repro.report.records import load_records

PNG = b"\x89PNG\r\n"


@pytest.fixture
def graph_runs(write_records):
    """Two norms, three depths, two seeds, one data set; returns the folder."""
    for method, values in {"ContraNorm s=1 + LayerNorm": (0.8, 0.75, 0.7), "vanilla": (0.8, 0.5, 0.2)}.items():
        for depth, value in zip((2, 4, 16), values, strict=True):
            folder = write_records([value, value + 0.02], data="cora", depth=depth, method=method,
                                   scale=1.0 if "s=1" in method else None, order=[int("s=1" in method)])  # fmt: skip
    return folder


def test_curves_hold_mean_and_spread_of_each_depth(graph_runs):
    axes = Figure().subplots()
    draw_depth(load_records(graph_runs), Config(records=graph_runs), [axes])
    curves = dict(zip([h.get_label() for h in axes.containers], axes.containers, strict=True))
    assert list(curves) == ["vanilla", "ContraNorm s=1 + LayerNorm"]
    for label, expected in (("vanilla", [81, 51, 21]), ("ContraNorm s=1 + LayerNorm", [81, 76, 71])):
        line, _, (bars,) = curves[label].lines
        assert list(line.get_xdata()) == [2, 4, 16]
        assert list(line.get_ydata()) == pytest.approx(expected)
        spread = np.std([0, 2], ddof=1)
        drawn = np.array([segment[:, 1] for segment in bars.get_segments()], dtype=float)
        np.testing.assert_allclose(drawn, [(y - spread, y + spread) for y in expected])
    assert [t.get_text() for t in axes.get_xticklabels()] == ["2", "4", "16"]
    assert axes.get_ylabel() == "test accuracy (%)" and axes.get_xlabel() == "depth (layers)"


def test_curves_can_be_told_apart_without_colour():
    looks = [(s["marker"], s["linestyle"]) for s in map(_style, range(14))]
    assert len(set(looks)) == 14


@pytest.mark.parametrize(("ending", "start"), [("png", PNG), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_files_are_the_same_each_time(graph_runs, tmp_path, ending, start):
    paths = [tmp_path / "deep" / f"{name}.{ending}" for name in "ab"]
    for path in paths:
        assert draw(Config(records=graph_runs, output=str(path))) == [path]
    first, second = (p.read_bytes() for p in paths)
    assert first.startswith(start) and len(first) > 5000
    assert first == second


def test_one_figure_for_each_data_set(graph_runs, write_records, tmp_path, capsys):
    write_records([0.5], data="dblp", depth=2, method="vanilla")
    output = tmp_path / "depth.png"
    with pytest.raises(UserError, match="mixes data: cora, dblp"):
        draw(Config(records=graph_runs, output=str(output)))
    assert not output.exists()
    figures.main(["--records", graph_runs, "--output", str(output), "--each", "data"])
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["depth-cora.png", "depth-dblp.png"]
    assert "depth-cora.png" in capsys.readouterr().err
    (path,) = draw(Config(records=graph_runs, output=str(output), where={"data": "dblp"}))
    assert path == output and output.read_bytes().startswith(PNG)


def test_several_fields_make_one_label(write_records, tmp_path):
    for norm, scale in (("layer", None), ("contra", 0.1), ("contra", 0.2)):
        for depth in (12, 24):
            folder = write_records([0.5], model="tiny", method=norm, norm=norm, scale=scale, depth=depth)
    (path,) = draw(Config(records=folder, output=str(tmp_path / "x.svg"), x="depth", label="norm,scale", each="model"))
    assert path.name == "x-tiny.svg"
    assert [path.read_text().count(f"<!-- {name} -->") for name in ("contra 0.1", "contra 0.2", "layer")] == [1, 1, 1]


def test_many_curves_are_shared_out_over_panels(write_records):
    assert [len(part) for n in (1, 8, 9, 14, 17) for part in _share_out(list(range(n)))] == [1, 8, 5, 4, 7, 7, 6, 6, 5]
    for number in range(9):
        folder = write_records([0.5], data="cora", method=f"m{number}", order=[number], depth=2)
    panels = figure_of(load_records(folder), Config(records=folder), "").axes
    labels = [panel.get_legend_handles_labels()[1] for panel in panels]
    assert labels == [["m0", "m1", "m2", "m3", "m4"], ["m5", "m6", "m7", "m8"]]
    assert len({panel.get_ylim() for panel in panels}) == 1


def collapse_runs(write_records, methods=("CN",)):
    by_metric = {"mean_cosine": [0.5, 0.9], "effective_rank": [8.0, 2.0], "variance": [1.0, 1e-9]}
    for method in methods:
        for seed in (0, 1):
            lists = {name: [v * (1 + seed) for v in values] for name, values in by_metric.items()}
            collapse = {"layer": [1, 2], **lists, "attention_similarity": [0.1, None]}
            extra = {"collapse": collapse}
            folder = write_records([0.5], seeds=[seed], extra=extra, data="cora", method=method, probe=True)
    return folder, by_metric


def test_collapse_per_layer_is_the_mean_over_seeds(write_records, tmp_path):
    folder, by_metric = collapse_runs(write_records)
    frame = load_records(folder)
    figure = Figure()
    axes = figure.subplots(1, 3)
    draw_collapse(frame, Config(records=folder), list(axes))
    figure.draw_without_rendering()
    for panel, name in zip(axes, COLLAPSE, strict=True):
        np.testing.assert_allclose(panel.lines[0].get_xdata(), [1, 2])
        np.testing.assert_allclose(panel.lines[0].get_ydata(), np.multiply(by_metric[name], 1.5))
        assert all(float(tick).is_integer() for tick in panel.get_xticks())
        low, high = panel.get_ylim()
        assert low < min(panel.lines[0].get_ydata()) and max(panel.lines[0].get_ydata()) < high
    write_records([0.5], data="cora", method="CN", probe=False, seeds=[7])  # a run without a probe does not count
    (path,) = draw(Config(records=folder, kind="collapse", output=str(tmp_path / "c.png"), each="data"))
    assert path.name == "c-cora.png" and path.read_bytes().startswith(PNG)
    collapse_runs(write_records, [f"m{n}" for n in range(9)])
    draw(Config(records=folder, kind="collapse", output=str(tmp_path / "many.svg")))


def test_collapse_needs_a_probe_and_one_depth(write_records, tmp_path):
    folder = write_records([0.5], data="cora", method="CN", depth=2)
    with pytest.raises(UserError, match="--probe"):
        draw(Config(records=folder, kind="collapse", output=str(tmp_path / "c.png")))
    for depth in (2, 4):
        lists = {"mean_cosine": [0.5] * depth, "effective_rank": [2] * depth, "variance": [1] * depth}
        extra = {"collapse": {"layer": list(range(1, depth + 1)), **lists}}
        folder = write_records([0.5], extra=extra, data="cora", method="CN", depth=depth, folder="probed")
    with pytest.raises(UserError, match="different depth in one curve"):
        draw(Config(records=folder, kind="collapse", output=str(tmp_path / "c.png")))
    assert not (tmp_path / "c.png").exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--output", "x.jpg"], "ending must be"),
        (["--label", "colour"], "colour: no field"),
        (["--each", "colour"], "colour: no field"),
        (["--where", "{data: pubmed}"], "no record is left"),
        (["--x", "colour"], "colour: no field"),
        (["--metric", "f1"], "there are test_accuracy"),
        (["--kind", "pie"], "kind"),
    ],
)
def test_wrong_names_are_told_and_nothing_is_written(graph_runs, tmp_path, monkeypatch, flags, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=told):
        figures.main(["--records", graph_runs, *flags])
    assert list(tmp_path.glob("*.png")) == []
