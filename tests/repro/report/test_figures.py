"""Figures show the numbers of the records, one line per label that is told apart without colour."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from repro.errors import UserError
from repro.report import figures
from repro.report.figures import (
    COLLAPSE,
    KINDS,
    MAX_LINES,
    ROUNDING,
    Config,
    Series,
    draw,
    figure_of,
    share_out,
    style_of,
)
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


def panels_of(folder, kind="depth", **settings):
    settings = {"label": "method", **settings}
    return KINDS[kind](load_records(folder), Config(records=folder, kind=kind, **settings))


def axes_of(folder, kind="depth", **settings):
    figure = figure_of(load_records(folder), Config(records=folder, kind=kind, **settings), "")
    figure.draw_without_rendering()
    return figure, figure.axes


def named(*labels):
    return [Series(label, [1], [1], [1], [1], [1]) for label in labels]


# -- what is drawn -----------------------------------------------------------------------------------------------------


def test_lines_hold_mean_and_spread_of_each_depth(graph_runs):
    ((panel,),) = panels_of(graph_runs)
    assert [line.label for line in panel.series] == ["vanilla", "ContraNorm s=1 + LayerNorm"]
    spread = np.std([0, 2], ddof=1)
    for line, expected in zip(panel.series, ([81, 51, 21], [81, 76, 71]), strict=True):
        assert line.x == [2, 4, 16] and line.mean == pytest.approx(expected) and line.n == [2, 2, 2]
        assert line.low == pytest.approx(np.subtract(expected, spread))
        assert line.high == pytest.approx(np.add(expected, spread))
    figure, (axes,) = axes_of(graph_runs)
    assert [t.get_text() for t in axes.get_xticklabels()] == ["2", "4", "16"]
    assert axes.get_ylabel() == "test accuracy (%)" and axes.get_xlabel() == "depth (layers)"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["vanilla (n = 2)", "ContraNorm s=1 + LayerNorm (n = 2)"]
    assert "one standard deviation" in legend.get_title().get_text()


def test_the_method_is_drawn_last_and_thicker(graph_runs):
    _, (axes,) = axes_of(graph_runs)
    lines = axes.get_lines()
    assert [line.get_label() for line in lines] == ["vanilla", "ContraNorm s=1 + LayerNorm"]
    assert lines[1].get_linewidth() > 1.5 * lines[0].get_linewidth() and lines[1].zorder > lines[0].zorder


def test_lines_are_told_apart_without_colour():
    labels = [f"m{n}" for n in range(24)] + [f"ContraNorm s={n}" for n in range(8)]
    looks = [style_of(label, labels) for label in labels]
    assert len({(s["marker"], s["linestyle"]) for s in looks}) == 32
    assert len({style_of(label, labels[:13])["marker"] for label in labels[:13]}) == 13  # as many as Table 3 has norms
    assert len({s["color"] for s in looks[:7]}) == 7 and {s["color"] for s in looks[:24]}.isdisjoint(
        s["color"] for s in looks[24:]
    )


def test_published_cells_are_open_markers(write_records):
    for depth, value in ((2, 0.8), (4, 0.7), (64, 0.1)):
        folder = write_records([value, value], data="cora", model="DeepGCN", depth=depth, method="vanilla", order=[0],
                               hid=32, epochs=200, protocol="reference", extra={"experiment": "gnn"})  # fmt: skip
    ((panel,),) = panels_of(folder)
    assert panel.series[0].published == [(2.0, pytest.approx(81.75)), (4.0, pytest.approx(72.61))]
    figure, (axes,) = axes_of(folder)
    opened = [line for line in axes.get_lines() if line.get_markerfacecolor() == "#ffffff"]
    assert [line.get_ydata()[0] for line in opened] == pytest.approx([81.75, 72.61])
    assert [t.get_text() for t in figure.legends[0].get_texts()][-1] == "published"


def test_many_lines_are_shared_out_over_panels(write_records):
    def sizes(*labels):
        return [len(part) for part in share_out(named(*labels))]

    counts = [sizes(*(f"m{i}" for i in range(n))) for n in (1, 8, 9, 14, 17)]
    assert counts == [[1], [8], [5, 4], [7, 7], [6, 6, 5]]
    table3 = [f"{norm}{end}" for norm in "abcde" for end in ("", " + LayerNorm")] + ["ContraNorm + LayerNorm"]
    without, with_it = share_out(named(*table3))
    assert [line.label for line in without] == [*"abcde", "ContraNorm + LayerNorm"]  # the method is in every panel
    assert [line.label for line in with_it] == [f"{n} + LayerNorm" for n in [*"abcde", "ContraNorm"]]
    for number in range(9):
        folder = write_records([0.5], data="cora", method=f"m{number}", order=[number], depth=2)
    _, axes = axes_of(folder)
    drawn = [[line.get_label() for line in ax.get_lines()] for ax in axes]
    assert drawn == [["m0", "m1", "m2", "m3", "m4"], ["m5", "m6", "m7", "m8"]] and max(map(len, drawn)) <= MAX_LINES
    assert len({ax.get_ylim() for ax in axes}) == 1


def collapse_runs(write_records, methods=("CN",), variance=(1.0, 1e-9)):
    by_metric = {"mean_cosine": [0.5, 0.9], "effective_rank": [8.0, 2.0], "variance": list(variance)}
    for method in methods:
        for seed in (0, 1):
            lists = {name: [v * (1 + seed) for v in values] for name, values in by_metric.items()}
            collapse = {"layer": [1, 2], **lists, "attention_similarity": [0.1, None]}
            extra = {"collapse": collapse}
            folder = write_records([0.5], seeds=[seed], extra=extra, data="cora", method=method, probe=True)
    return folder, by_metric


@pytest.mark.parametrize("least", [1e-9, 1e-30, 0.0, 0.5])
def test_collapse_per_layer_is_the_mean_over_seeds_and_nothing_is_clipped(write_records, least):
    folder, by_metric = collapse_runs(write_records, variance=(1.0, least))
    ((*panels, attention),) = panels_of(folder, "collapse")
    for panel, name in zip(panels, by_metric, strict=True):
        assert panel.series[0].x == [1, 2]
        assert panel.series[0].mean == pytest.approx(np.multiply(by_metric[name], 1.5))
        assert panel.series[0].low == pytest.approx(by_metric[name])
        assert panel.series[0].high == pytest.approx(np.multiply(by_metric[name], 2))
    assert attention.series[0].x == [1]  # where it was measured
    _, axes = axes_of(folder, "collapse")
    assert axes[2].get_yscale() == {0.0: "symlog", 0.5: "linear"}.get(least, "log")
    for ax, name in zip(axes, COLLAPSE, strict=True):
        assert all(float(tick).is_integer() for tick in ax.get_xticks())
        low, high = ax.get_ylim()
        for line in ax.get_lines()[:1]:
            pixels = ax.transData.transform([(1, y) for y in (low, *line.get_ydata(), high)])[:, 1]
            assert (np.diff(np.sort(pixels)) > 0).sum() >= len(line.get_ydata()), name  # each apart from the edges
    ticks = [t.get_text() for t in axes[2].get_yticklabels()]
    assert len(ticks) == len(set(ticks))


def test_collapse_of_runs_without_a_probe_and_of_several_depths(write_records, tmp_path):
    folder, _ = collapse_runs(write_records)
    write_records([0.5], data="cora", method="CN", probe=False, seeds=[7])  # a run without a probe does not count
    (path,) = draw(Config(records=folder, kind="collapse", output=str(tmp_path / "c.png"), each="data"))
    assert path.name == "c-cora.png" and path.read_bytes().startswith(PNG)
    collapse_runs(write_records, [f"m{n}" for n in range(9)])
    draw(Config(records=folder, kind="collapse", output=str(tmp_path / "many.svg")))
    folder = write_records([0.5], data="cora", method="CN", depth=2, folder="bare")
    with pytest.raises(UserError, match="--probe"):
        draw(Config(records=folder, kind="collapse", output=str(tmp_path / "d.png")))
    for depth in (2, 4):
        lists = {"mean_cosine": [0.5] * depth, "effective_rank": [2] * depth, "variance": [1] * depth}
        extra = {"collapse": {"layer": list(range(1, depth + 1)), **lists}}
        folder = write_records([0.5], extra=extra, data="cora", method="CN", depth=depth, folder="probed")
    with pytest.raises(UserError, match="different depth in one curve"):
        draw(Config(records=folder, kind="collapse", output=str(tmp_path / "d.png")))
    assert not (tmp_path / "d.png").exists()


def test_collapse_before_and_after_training_are_rows_of_one_figure(write_records):
    def lists(cosine):
        return {"layer": [1, 2], "mean_cosine": cosine, "effective_rank": [2, 2], "variance": [1, 1]}

    extra = {"collapse_untrained": lists([0.1, 0.2]), "collapse": lists([0.5, 0.6])}
    folder = write_records([0.5], data="cora", method="vanilla", depth=2, extra=extra)
    before, after = panels_of(folder, "collapse")
    assert {panel.title for panel in before} == {"before training"} and before[0].series[0].mean == [0.1, 0.2]
    assert {panel.title for panel in after} == {"after training"} and after[0].series[0].mean == [0.5, 0.6]


def test_both_forms_of_the_step_are_on_one_axis(write_records):
    def write(method, value, scale=None, **more):
        return write_records([value, value], data="cora", depth=16, method=f"{method} + LayerNorm", scale=scale,
                             validation=0, **more)  # fmt: skip

    for s in (1.0, 4.0):
        folder = write(f"ContraNorm s={s:g}", 0.5 + s / 100, s, identity=True, order=[10, 0, s, 1])
    write("ContraNorm (Eq. 6) s=0.5", 0.6, 0.5, identity=False, order=[10, 1, 0.5, 1])
    write("vanilla", 0.1, identity=None, order=[0, 0, 0, 1])
    write("PN-SI s=5", 0.2, 5.0, identity=None, order=[3, 0, 5, 1])  # another kind of scale
    write_records([0.9], data="cora", depth=16, method="LN", identity=None, validation=0)  # without the LayerNorm
    ((panel,),) = panels_of(folder, "scale", label="family")
    lines = {line.label: (line.x, line.mean) for line in panel.series}
    assert panel.title == "depth 16" and lines == {
        "vanilla + LayerNorm": ([0, 1], [pytest.approx(10)] * 2),
        "ContraNorm + LayerNorm": ([0.5, 0.8], [pytest.approx(51), pytest.approx(54)]),
        "ContraNorm (Eq. 6) + LayerNorm": ([0.5], [pytest.approx(60)]),
    }
    plain = write_records([0.5], data="cora", method="vanilla", depth=2, folder="plain")
    with pytest.raises(UserError, match="no record has a scale"):
        panels_of(plain, "scale")


def test_curves_are_those_of_metrics_jsonl_or_packed(write_records):
    for method, packed in (("vanilla", False), ("ContraNorm", True)):
        curve = {"epoch": [0, 1, 2], "train_loss": [3.0, 2.0, 1.0], "test_accuracy": [None, 0.4, 0.6]}
        folder = write_records(
            [0.5, 0.5], data="cora", method=method, depth=2, extra={"curve": curve} if packed else {}
        )
        if not packed:
            lines = [dict(zip(curve, values, strict=True)) for values in zip(*curve.values(), strict=True)]
            for record in Path(folder).rglob("record.json"):
                record.with_name("metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ((loss, accuracy),) = panels_of(folder, "curves")
    assert (loss.ylabel, accuracy.ylabel, loss.xlabel) == ("training loss", "test accuracy (%)", "epoch")
    assert {line.label for line in loss.series} == {"vanilla", "ContraNorm"}
    for line in accuracy.series:
        assert line.mean == pytest.approx([40, 60]) and line.n == [2, 2]
    for number in range(9):  # one of them without an accuracy: as many lines of loss are shared out over two panels
        curve = {"epoch": [1, 2], "loss": [2.0, 1.0], **({"test_accuracy": [0.4, 0.6]} if number else {})}
        many = write_records([0.5], data="cora", method=f"m{number}", folder="many", extra={"curve": curve})
    panels = [panel for row in panels_of(many, "curves") for panel in row]
    drawn = [(panel.ylabel, line.label) for panel in panels for line in panel.series]
    assert len(drawn) == len(set(drawn)) == 9 + 8
    bare = write_records([0.5], data="cora", method="vanilla", depth=2, folder="bare")
    with pytest.raises(UserError, match="no run has a metrics.jsonl"):
        panels_of(bare, "curves")
    once = write_records(
        [0.5], folder="once", data="d", method="m", order=[1], extra={"curve": {"epoch": [1], "loss": [2.0]}}
    )
    with pytest.raises(UserError, match="one epoch each"):
        panels_of(once, "curves")


def test_singular_values_are_drawn_relative_to_the_largest(write_records, tmp_path):
    spectra = {"spectrum_untrained": [4.0, 2.0, 1.0], "spectrum": [4.0, 0.4, 0.0]}
    folder = write_records([0.5], data="cora", method="vanilla", depth=2, extra=spectra)
    ((before, after),) = panels_of(folder, "spectrum")
    assert before.title == "before training" and before.series[0].mean == [1, 0.5, 0.25] and before.log
    assert after.series[0].mean == [1, 0.1, ROUNDING] and before.series[0].x == [1, 2, 3]  # 0 is drawn too
    draw(Config(records=folder, kind="spectrum", output=str(tmp_path / "s.svg")))
    bare = write_records([0.5], data="cora", method="vanilla", depth=2, folder="bare")
    with pytest.raises(UserError, match="no record holds spectrum"):
        draw(Config(records=bare, kind="spectrum", output=str(tmp_path / "t.svg")))


def test_likelihood_by_prefix(write_records, tmp_path):
    folder = write_records([0.5, 0.6], data="CIFAR10", method="AR", extra={"prefix_nll": [3.0, 2.0, 1.5]})
    ((panel,),) = panels_of(folder, "prefix")
    (line,) = panel.series
    assert line.x == [1, 2, 3] and line.mean == [3, 2, 1.5] and line.n == [2, 2, 2]
    draw(Config(records=folder, kind="prefix", output=str(tmp_path / "p.svg")))
    bare = write_records([0.5], data="CIFAR10", method="AR", folder="bare")
    with pytest.raises(UserError, match="no record holds prefix_nll"):
        draw(Config(records=bare, kind="prefix", output=str(tmp_path / "q.svg")))


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ending", "start"), [("png", PNG), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_files_are_the_same_each_time(graph_runs, tmp_path, ending, start):
    paths = [tmp_path / "deep" / f"{name}.{ending}" for name in "ab"]
    for path in paths:
        assert draw(Config(records=graph_runs, output=str(path))) == [path]
    first, second = (p.read_bytes() for p in paths)
    assert first.startswith(start) and len(first) > 5000
    assert first == second


def test_without_an_ending_both_formats_are_written_and_hold_their_command(graph_runs, tmp_path):
    words = ["--records", graph_runs, "--output", str(tmp_path / "depth"), "--each", "data"]
    figures.main(words)
    svg, png = tmp_path / "depth-cora.svg", tmp_path / "depth-cora.png"
    command = shlex.join(["python", "-m", "repro.report.figures", *words])
    assert re.search(r"<dc:description>(.*?)</dc:description>", svg.read_text())[1] == command
    with Image.open(png) as image:
        assert image.info["Description"] == command
    assert matplotlib.__version__ not in svg.read_text() and ">vanilla (n = 2)<" in svg.read_text()


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
    assert [path.read_text().count(f">{name} (n = 1)<") for name in ("contra 0.1", "contra 0.2", "layer")] == [1, 1, 1]


def test_only_the_scale_chosen_on_validation_is_drawn(write_records, tmp_path):
    for scale, validation, test in ((1.0, 0.5, 0.9), (5.0, 0.8, 0.6)):
        folder = write_records([{"test_accuracy": test, "validation_accuracy": validation}], data="cora", depth=2,
                               method=f"ContraNorm s={scale:g}", scale=scale, order=[scale])  # fmt: skip
    output = tmp_path / "best.svg"
    figures.main([folder, "--best", "scale", "--by", "validation_accuracy", "--output", str(output)])
    assert ">ContraNorm (n = 1)<" in output.read_text() and "s=5" not in output.read_text()
    with pytest.raises(UserError, match="validation metric"):
        figures.main([folder, "--best", "scale", "--by", "test_accuracy"])


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


def test_long_names_stand_below_each_other(graph_runs):
    frame = load_records(graph_runs)
    config = Config(records=graph_runs, label="method")
    assert figure_of(frame, config, "").legends[0]._ncols == 2
    frame["method"] = frame["method"].str.pad(60, fillchar="x")
    assert figure_of(frame, config, "").legends[0]._ncols == 1
