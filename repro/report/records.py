"""Records of finished runs, read back: one JSON file or line each, one row of a DataFrame each."""

from __future__ import annotations

import dataclasses
import glob
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from repro.config import LOCATION_FIELDS, CellLabel
from repro.errors import UserError
from repro.report.notes import notes_of
from repro.report.upgrade import upgrade

REQUIRED = ("experiment", "protocol", "selection", "metrics", "config")
# What differs between two runs of the same cell that computed the same numbers.
VOLATILE_KEYS = (
    "seconds", "epoch_seconds", "seconds_per_epoch", "peak_rss_mb", "peak_cuda_mb", "command", "environment", "finished"
)  # fmt: skip
CELL_FIELDS = tuple(field.name for field in dataclasses.fields(CellLabel))
HELD = 0.9  # of the sum of the singular values
_RESERVED = ("path", "experiment", "protocol", "selection", "seed", "settings", *CELL_FIELDS)


def check_record(record: Any, where: str) -> dict[str, Any]:
    """The record as it was written; a UserError where a required part is missing or of the wrong type."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: not a run's record (a {type(record).__name__}, not a mapping)")
    missing = [name for name in REQUIRED if name not in record]
    if missing:
        raise UserError(f"{where}: not a run's record: {', '.join(missing)} missing")
    for name in ("metrics", "config", "cell", "environment"):
        if not isinstance(record.get(name) or {}, dict):
            raise UserError(f"{where}: damaged record: {name} is no mapping")
    if not isinstance((record.get("cell") or {}).get("order") or [], list):
        raise UserError(f"{where}: damaged record: the cell's order is no list")
    for name in ("curve", "collapse", "collapse_untrained"):
        columns = record.get(name)
        if not columns or not isinstance(columns, dict):  # schema 1 had a list here
            continue
        if not all(isinstance(v, list) for v in columns.values()) or len(set(map(len, columns.values()))) > 1:
            raise UserError(f"{where}: damaged record: {name} is not lists of one length")
        if name == "curve" and "epoch" not in columns:
            raise UserError(f"{where}: damaged record: curve has no epoch")
    return record


def find_records(places: str | Path | Iterable[str | Path]) -> list[Path]:
    """Record files in folders (searched to any depth), named files, and glob patterns; a UserError where none is."""
    found: dict[Path, None] = {}
    for place in [places] if isinstance(places, (str, Path)) else places:
        files: list[Path] = []
        for path in map(Path, sorted(glob.glob(str(place), recursive=True))):
            files += sorted([*path.rglob("record.json"), *path.rglob("records.jsonl")]) if path.is_dir() else [path]
        if not files:
            raise UserError(f"{place}: no record.json or records.jsonl there")
        found.update(dict.fromkeys(files))
    return list(found)


def iterate_records(
    places: str | Path | Iterable[str | Path], *, as_written: bool = False
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) for each run's record, in the current schema or `as_written`; a `.jsonl` file holds one per line.

    Raises:
        UserError: a file cannot be read, is not a record, or is of a newer schema.
    """
    for path in find_records(places):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
        lines = path.suffix == ".jsonl"
        parts = [(f"{path}:{n}", part) for n, part in enumerate(text.splitlines(), 1)] if lines else [(str(path), text)]
        for where, part in parts:
            if lines and not part.strip():
                continue
            try:
                record = json.loads(part)
            except ValueError as error:
                raise UserError(f"{where}: damaged record: {error}") from error
            if isinstance(record, dict) and "runs" in record and "config" not in record:
                continue  # the summary that once stood above the runs of several seeds
            record = check_record(record, where)
            yield where, record if as_written else upgrade(record, where)


def load_records(places: str | Path | Sequence[str | Path]) -> pd.DataFrame:
    """One row per record.

    Columns:
        data, model, method, order, depth, scale: the record's cell.
        family: the method without its scale, "ContraNorm + LayerNorm" for "ContraNorm s=1 + LayerNorm".
        note: what to say below a table, one note a line: the record's own, else those of methods.yaml.
        metrics.<name>: numbers, fractions. Of a probe also the last layer's value of each collapse metric; and
            dimensions, the number of singular values of the last features that hold 90 % of their sum. Both also
            before training, as `<name>_untrained`.
        the config's fields and the record's other values by their own name, or as `config.<name>` and `record.<name>`
            where that names another column.
        settings: names of the config's columns that decide what was computed; execution_fields: those that say how.
        path: where the record was read.

    Raises:
        UserError: nothing there, or a damaged record.
    """
    found = list(iterate_records(places))
    if not found:  # but summaries of several seeds
        raise UserError(f"{places}: holds no run's record: name the folder above")
    configured = {name for _, record in found for name in record["config"]}
    frame = pd.DataFrame([_row(where, record, configured) for where, record in found], dtype=object)
    for name in frame.columns:
        if name.startswith("metrics."):
            frame[name] = pd.to_numeric(frame[name], errors="coerce")
    return frame


def _row(where: str, record: dict[str, Any], configured: set[str]) -> dict[str, Any]:
    cell = dict.fromkeys(CELL_FIELDS) | (record.get("cell") or {})
    cell["order"] = tuple(cell["order"] or ())
    method, scale = cell["method"], cell["scale"]
    own = {name: f"config.{name}" if name in _RESERVED else name for name in record["config"]}
    ignored = {*record.get("execution_fields", ()), "seed"}
    family = cell["family"] or (method if scale is None else str(method).replace(f" s={scale:g}", ""))
    row = {
        "path": where,
        "seed": None,
        **cell,
        "family": family,
        "note": cell["note"] or "\n".join(notes_of(record["experiment"], str(family), record["config"])),
        "settings": tuple(column for name, column in own.items() if name not in ignored and name == column),
    }
    for name, value in record.items():
        if name == "metrics":
            row |= {f"metrics.{key}": _number(inner) for key, inner in value.items()}
        elif name == "config":
            row |= {own[key]: _number(inner) for key, inner in value.items()}
        elif name in ("experiment", "protocol", "selection", "seed"):
            row[name] = value
        elif name != "cell":
            row[f"record.{name}" if name in configured or name in _RESERVED else name] = value
    return row | {f"metrics.{name}": value for name, value in _of_probe(record).items()}


def _of_probe(record: dict[str, Any]) -> dict[str, Any]:
    """What a run's probe says of its last layer."""
    found: dict[str, Any] = {}
    for state in ("", "_untrained"):
        by_layer, spectrum = record.get(f"collapse{state}"), record.get(f"spectrum{state}")
        if isinstance(by_layer, dict) and all(by_layer.values()):  # a network of one layer has no hidden one
            found |= {f"{name}{state}": _number(values[-1]) for name, values in by_layer.items() if name != "layer"}
        values = [_number(value) for value in spectrum or ()]
        if np.sum(values) > 0:  # neither NaN nor all zero
            shares = np.cumsum(values) / np.sum(values)
            found[f"dimensions{state}"] = 1 + int(np.argmax(shares >= HELD))
    return found


def curve_of(path: str, packed: Any = None) -> dict[str, list[Any]]:
    """A run's metrics per epoch, lists by name: packed in its record, else of the metrics.jsonl beside it; or empty."""
    if isinstance(packed, dict):
        return packed
    file = Path(path).with_name("metrics.jsonl")
    if not path.endswith("record.json") or not file.exists():
        return {}
    curve = pd.read_json(file, lines=True)
    if "epoch" in curve:
        curve["epoch"] += 1 - min(1, curve["epoch"].min())  # counted from 1
    return {str(name): values.tolist() for name, values in curve.items()} if "epoch" in curve else {}


def comparable(record: dict[str, Any]) -> dict[str, Any]:
    """The record without times, machine and folders: what two runs of one cell and seed must agree in."""
    kept = {name: value for name, value in record.items() if name not in VOLATILE_KEYS}
    kept["config"] = {name: value for name, value in record["config"].items() if name not in LOCATION_FIELDS}
    return kept


def _number(value: Any) -> Any:
    """NaN and infinities, which a record holds as strings, as numbers again."""
    return float(value) if value in ("nan", "inf", "-inf") else value


@dataclasses.dataclass
class RecordsConfig:
    """What a command that shows records is given first, also without a flag (`records_flag`)."""

    records: list[str] | str = dataclasses.field(default_factory=list)
    """Folders, files (record.json, records.jsonl) or glob patterns; also as the first words, without the flag."""

    def __post_init__(self) -> None:
        if not self.records:
            raise ValueError("--records is missing: name a folder of runs")


def records_flag(argv: Sequence[str] | None) -> list[str]:
    """The arguments, with places of records named before the first flag written as `--records`."""
    words = list(sys.argv[1:] if argv is None else argv)
    places = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    return [*([f"--records={json.dumps(places)}"] if places else []), *words[len(places) :]]
