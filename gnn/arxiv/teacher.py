"""A teacher's predictions: written when its run ends, and checked before a student learns from them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from gnn.arxiv.config import Config
from repro.errors import UserError
from repro.files import write_atomic

FILE = "predictions.safetensors"


@dataclass(frozen=True)
class Teacher:
    """What a student needs of its teacher.

    Attributes:
        logits: (N, C), at the teacher's chosen epoch.
        sha256: of the file.
        summary: what the student's record says about it.
    """

    logits: Tensor
    sha256: str
    summary: dict[str, Any]


def save_predictions(folder: Path, logits: Tensor) -> dict[str, str]:
    """Write logits (N, C) into a run's folder; what its record says about the file."""
    content = save({"logits": logits.cpu().contiguous()})
    write_atomic(folder / FILE, content)
    return {"file": FILE, "sha256": hashlib.sha256(content).hexdigest()}


def load_teacher(config: Config, nodes: int, classes: int) -> Teacher:
    """The teacher of `config`, of N nodes and C classes.

    Raises:
        UserError: no finished teacher there, of other data or features or another seed, or a changed file.
    """
    folder = Path(config.teacher or "")
    where = f"--teacher {folder}"
    try:
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        theirs, predictions = record["config"], record["predictions"]
        content = (folder / FILE).read_bytes()
        known = {name: theirs[name] for name in ("mode", "data", "seed", "features")}
    except FileNotFoundError as error:
        raise UserError(f"{where}: no finished teacher there ({Path(error.filename).name} is missing)") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: its record.json is not that of a teacher of this experiment ({error!r})") from error
    if known["mode"] != "teacher":
        raise UserError(f"{where}: a {known['mode']}, not a teacher")
    for name in ("data", "seed", "features"):
        if known[name] != getattr(config, name):
            raise UserError(f"{where}: trained with --{name} {known[name]}, this run has {getattr(config, name)}")
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != predictions.get("sha256"):
        raise UserError(f"{where}: {FILE} is not what the record says (sha256 {sha256[:12]}…): train it again")
    try:
        logits = load(content)["logits"]
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{where}: {FILE} holds no logits ({error})") from error
    if logits.shape != (nodes, classes):
        raise UserError(f"{where}: predictions of {tuple(logits.shape)}, this graph needs {(nodes, classes)}")
    summary = {
        "sha256": sha256,
        "features": known["features"],
        "method": (record.get("cell") or {}).get("method"),
        "epoch": record.get("epoch"),
        "metrics": record["metrics"],
    }
    return Teacher(logits, sha256, summary)
