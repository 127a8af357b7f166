"""The page holds every table and figure, whole and offline, and whatever records stand below the results are in."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from repro.errors import UserError
from repro.report import figures, page
from repro.report.page import inline_svg, with_classes

GNN = {"model": "DeepGCN", "hid": 32, "epochs": 200, "protocol": "reference", "selection": "last epoch"}


@pytest.fixture
def results(write_records, tmp_path):
    """A folder of results: a Table 3 of two depths, a new experiment, and a figure."""
    for method, values, order in (
        ("vanilla", [0.81, 0.82, 0.83], [0]),
        ("ContraNorm s=1 + LayerNorm", [0.79, 0.80, 0.81], [10, 0, 1, 1]),
    ):
        for depth in (2, 4):
            curve = {"epoch": [1, 2], "loss": [2.0, 1.0], "validation_accuracy": [None, 0.5]}
            write_records(values, folder="results/table3", data="cora", method=method, depth=depth, order=order,
                          scale=1.0 if "s=1" in method else None, model="DeepGCN", hid=32, epochs=200,
                          protocol="reference", extra={"experiment": "gnn", "curve": curve})  # fmt: skip
    write_records([0.7, 0.72], folder="results/later", metric="probe", data="stl<10>", method="rival", order=[3],
                  extra={"experiment": "self-supervised"}, lr=0.1)  # fmt: skip
    write_records([0.9, 0.91], folder="results/later", metric="probe", data="stl<10>", method="rival", order=[3],
                  extra={"experiment": "self-supervised"}, lr=0.2)  # fmt: skip
    folder = tmp_path / "results"
    (folder / "empty").mkdir()
    figures.main([str(folder / "table3"), "--output", str(folder / "table3" / "depth.svg")])
    return folder


def built(results):
    page.main(["--results", str(results)])
    return (results / "index.html").read_text(), json.loads((results / "index.json").read_text())


def test_every_record_s_number_is_in_a_cell_with_its_runs(results):
    _, index = built(results)
    later, table3 = index["tables"]
    assert (table3["name"], table3["experiment"], table3["heads"]) == ("table3", "gnn", ["2", "4"])
    assert [row["label"] for row in table3["rows"]] == ["vanilla", "ContraNorm s=1 + LayerNorm"]
    cell = table3["rows"][0]["cells"][0]
    assert (cell["mean"], cell["std"], cell["n"], cell["text"]) == (0.82, 0.01, 3, "82.00 ± 1.00")
    assert [(run["seed"], run["value"]) for run in cell["runs"]] == [(0, 0.81), (1, 0.82), (2, 0.83)]
    assert cell["command"] == "python" and cell["commits"] == ["unknown"]
    assert all((results.parent / run["record"]).is_file() for run in cell["runs"])
    assert cell["runs"][0]["curve"] == {"epoch": [1, 2], "loss": [2, 1], "validation_accuracy": [None, 0.5]}
    assert {p["kind"]: (p["value"], p["agrees"]) for p in cell["published"]} == {
        "published": ("81.75", True), "re-run by others": ("80.68 ± 0.09 (5)", True),
        "reference code as run": ("81.73 ± 0.26 (5)", True),
    }  # fmt: skip
    against = table3["rows"][1]["cells"][0]["against"]
    assert (against["row"], against["difference"], against["n"], against["p"]) == ("vanilla", -0.02, 3, None)
    assert table3["sentence"].startswith("Of 20 cells published by the authors, 4 have been run here")
    # An experiment that this code has never heard of, with a setting that no cell may mix.
    assert (later["metric"], later["columns"], later["heads"]) == ("probe", "data", ["stl<10>"])
    assert [row["label"] for row in later["rows"]] == ["rival · lr 0.1", "rival · lr 0.2"]


class Checker(HTMLParser):
    """Collects what a browser would load, and that every element is closed."""

    def __init__(self):
        super().__init__()
        self.loads, self.open, self.ids = [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.loads += [v for k, v in attrs.items() if k in ("src", "href", "xlink:href", "action")]
        self.ids += [attrs["id"]] if "id" in attrs and tag != "path" else []
        if tag not in ("meta", "link", "br", "input", "use", "path", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in ("use", "path", "rect"):
            while self.open.pop() != tag:
                pass


def test_the_page_is_whole_and_loads_nothing(results):
    html, index = built(results)
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    assert all(target.startswith(("#", "data:")) for target in checker.loads)
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"|"http://www.w3.org/[^"]*"', "", html)
    assert html.count("<svg") >= 1 and ">vanilla (n = 3)<" in html and "#000000" not in html
    assert index["figures"] == [{"path": "table3/depth.svg", "command": index["figures"][0]["command"]}]
    assert index["figures"][0]["command"].startswith("python -m repro.report.figures ")
    data = json.loads(re.search(r'id="cells">(.*?)</script>', html, re.DOTALL)[1])
    parts, data = data["parts"], data["cells"]
    assert len(parts) == len({json.dumps(part) for part in parts})
    for cell in data:
        assert all((results / ".." / parts[run["record"][0]]).exists() for run in cell["runs"])
        assert all(isinstance(parts[other["source"]], str) for other in cell["published"])
        assert all(isinstance(parts[run["curve"]["epoch"]], list) for run in cell["runs"] if run["curve"])
    buttons = [int(n) for n in re.findall(r'data-cell="(\d+)"', html)]
    assert sorted(buttons) == list(range(len(data))) and data[0]["data"] == "stl<10>"
    assert "stl<10>" not in html and "stl&lt;10&gt;" in html
    for name, values in {"data": ["cora", "stl&lt;10&gt;"], "depth": ["2", "4"]}.items():
        options = re.search(rf'<select name="{name}">(.*?)</select>', html, re.DOTALL)[1]
        assert re.findall("<option>(.*?)</option>", options) == values
    assert html.count('<button type="button">') >= 6 and "prefers-color-scheme: dark" in html and "viewport" in html


def test_a_reversed_order_and_an_agreement_are_marked(results, write_records):
    def marks():
        html, index = built(results)
        cells = [cell for table in index["tables"] for row in table["rows"] for cell in row["cells"] if cell]
        turned = {(cell["method"], cell["depth"]): cell["reversed"] for cell in cells if cell["reversed"]}
        return [html.count(f"{mark}</span>") - 1 for mark in "✓✗⇄"], turned  # one each in the legend

    contra = "ContraNorm s=1 + LayerNorm", "4"
    assert marks() == ([3, 1, 1], {contra: ["vanilla"]})  # published: 72.61 without, 77.02 with
    for depth, values in ((2, [0.1, 0.11, 0.12]), (4, [0.95, 0.96, 0.97])):
        write_records(values, folder="results/table3", data="cora", method="PN-SI", depth=depth, order=[3], hid=32,
                      epochs=200, model="DeepGCN", protocol="reference", extra={"experiment": "gnn"})  # fmt: skip
    assert marks() == ([3, 3, 1], {contra: ["vanilla", "PN-SI"]})


def test_the_same_records_give_the_same_page(results, tmp_path):
    first = built(results)
    shutil.copytree(results, tmp_path / "copy" / "results")
    assert built(tmp_path / "copy" / "results") == first


def test_no_records_are_told(tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="no record"):
        page.main(["--results", str(tmp_path)])


def test_the_committed_page_is_small(root):
    assert (root / "results" / "index.html").stat().st_size < 3e6  # test_check holds it to the records


def test_a_figure_takes_the_page_s_colours():
    path = '<path d="" style="stroke: #000000; fill: #ffffff"/>'
    svg = f'<svg width="10pt" height="5pt" viewBox="0 0 10 5"><metadata>x</metadata><g id="a">{path}</g></svg>'
    assert inline_svg(f'<?xml version="1.0"?>\n{svg}') == (
        '<svg style="max-width: calc(1.4px * 10)" viewBox="0 0 10 5"><g><path d="" '
        'style="stroke: currentColor; fill: var(--paper)"/></g></svg>'
    )
    assert Path(page.__file__).with_name("page.html").is_file()


def test_a_figure_is_written_short():
    marks = "\n".join(f'<use xlink:href="#m" x="{x}.123456" style="fill: #0072b2"/>' for x in range(3))
    text = "<text style=\"font-size: 8px; font-family: 'DejaVu Sans', sans-serif; text-anchor: start\">2.50 s</text>"
    assert inline_svg(f"<svg>{marks}\n{text}</svg>") == (
        '<svg><g style="fill: #0072b2"><use href="#m" x="0.1"/><use href="#m" x="1.1"/><use href="#m" x="2.1"/></g>'
        '<text style="font-size: 8px; font-family: sans-serif; text-anchor: start">2.50 s</text></svg>'
    )


def test_figures_share_the_rules_of_their_styles():
    styled = {name: f'<svg><g style="fill: red"/><g style="stroke: {name}"/></svg>' for name in ("blue", "red")}
    figures, rules = with_classes(styled)
    assert figures == {
        "blue": '<svg><g class="s0"/><g class="s1"/></svg>', "red": '<svg><g class="s0"/><g class="s2"/></svg>'
    }  # fmt: skip
    assert rules.splitlines() == [".s0 { fill: red }", ".s1 { stroke: blue }", ".s2 { stroke: red }"]


def test_notes_and_budgets(results, write_records):
    """A method's footnote stands by its table, and a run of another length is not compared with vanilla."""
    for method, epochs, note in (("vanilla", 300, ""), ("GFSA", 500, "GFSA: as run <here>"), ("AttnScale", 300, "")):
        write_records([0.7, 0.72], folder="results/vit", data="IMNET100", method=method, depth=24, epochs=epochs,
                      order=[len(method)], note=note, extra={"experiment": "ViT_imagenet"})  # fmt: skip
    text, index = built(results)
    (table,) = [table for table in index["tables"] if table["name"] == "vit"]
    assert table["notes"] == ["GFSA: as run <here>"] and "<p>GFSA: as run &lt;here&gt;</p>" in text
    compared = {row["label"]: "against" in cell for row in table["rows"] for cell in row["cells"] if cell}
    assert compared == {"vanilla": False, "GFSA": False, "AttnScale": True}
    assert all("notes" not in other for other in index["tables"] if other is not table)


def test_a_rival_that_is_a_model_of_its_own_is_compared_with_vanilla(results, write_records):
    for order, (method, model) in enumerate({"vanilla": "DeepGCN", "GCNII": "GCNII"}.items()):
        write_records([0.7, 0.72], folder="results/rivals", data="cora", method=method, model=model, depth=16,
                      order=[order], tuning_trials=8)  # fmt: skip
    (table,) = [table for table in built(results)[1]["tables"] if table["name"] == "rivals"]
    (cell,) = [cell for row in table["rows"] for cell in row["cells"] if cell and row["label"] == "GCNII"]
    assert cell["against"]["row"] == "vanilla" and cell["against"]["n"] == 2
