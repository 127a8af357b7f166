"""What tables say of the methods in their rows (methods.yaml), for records that do not say it themselves."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from repro.config import load_yaml
from repro.errors import UserError

METHODS = Path(__file__).with_name("methods.yaml")


@cache
def load_notes(path: Path = METHODS) -> list[dict[str, Any]]:
    """Read and check a file of notes.

    Raises:
        UserError: an entry lacks its experiment, methods or note, or has other keys.
    """
    entries = load_yaml(path)
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict) or not {"experiment", "methods", "note"} <= set(entry) <= {
            "experiment", "methods", "note", "source"
        }:  # fmt: skip
            raise UserError(f"{path}: entry {number} must hold experiment, methods and note, and may hold source")
    found: list[dict[str, Any]] = entries
    return found


def notes_of(experiment: str, family: str, settings: Mapping[str, Any]) -> list[str]:
    """The notes on a method, each with its source: `family` is its name in tables, "GCNII + LayerNorm (symmetric)"."""
    parts = set(re.split(r" \+ | \(", family))
    values = defaultdict(lambda: "none", {name: value for name, value in settings.items() if value is not None})
    return [
        entry["note"].format_map(values) + (f" ({entry['source']})" if "source" in entry else "")
        for entry in load_notes()
        if entry["experiment"] == experiment and parts & set(entry["methods"])
    ]
