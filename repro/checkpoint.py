"""Checkpoints that a crash cannot hurt: safetensors and JSON, checksummed, renamed into place, the last two kept.

A checkpoint is any nest of dicts, lists, tuples, numbers, strings, None and tensors (what `state_dict()` returns).
Nothing in it is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from repro.files import fsync_folder

KEEP = 2
_FILES = ("tensors.safetensors", "state.json")


def _encode(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """`node` as JSON; tensors go to `tensors`. Containers that JSON lacks are written as {"__kind__": ...}."""
    if isinstance(node, torch.Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = node.detach().cpu().contiguous().clone()
        return {"__tensor__": name}
    if isinstance(node, dict):
        return {"__dict__": [[_encode(k, tensors), _encode(v, tensors)] for k, v in node.items()]}
    if isinstance(node, tuple):
        return {"__tuple__": [_encode(v, tensors) for v in node]}
    if isinstance(node, list):
        return [_encode(v, tensors) for v in node]
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    raise TypeError(f"a checkpoint cannot hold a {type(node).__name__}")


def _decode(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(node, list):
        return [_decode(v, tensors) for v in node]
    if isinstance(node, dict):
        ((kind, body),) = node.items()
        if kind == "__tensor__":
            return tensors[body]
        if kind == "__tuple__":
            return tuple(_decode(v, tensors) for v in body)
        return {_decode(k, tensors): _decode(v, tensors) for k, v in body}
    return node


def _manifest(contents: dict[str, bytes]) -> bytes:
    return json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in sorted(contents.items())}).encode()


def save_checkpoint(folder: Path, step: int, state: Any) -> Path:
    """Write `state` as `folder/step-XXXXXXXXXX`, then drop all but the last two.

    Args:
        folder: the run's checkpoint folder; made if missing, in a folder that is there.
        step: number of the step (or epoch) that `state` is the end of; orders the checkpoints.
        state: nest of dicts, lists, tuples, numbers, strings, None and tensors.

    Raises:
        TypeError: `state` holds something else.
        OSError: disk full, folder read-only; the checkpoints that were there stay whole.
    """
    folder.mkdir(exist_ok=True)  # not its parents: a run's folder that was taken away is not made again
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_encode(state, tensors))
    contents = {_FILES[0]: save(tensors), _FILES[1]: text.encode()}
    target = folder / f"step-{step:010d}"
    temporary = folder / f".tmp-{target.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        for name, data in [*contents.items(), ("manifest.json", _manifest(contents))]:
            with open(temporary / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        fsync_folder(temporary)
        if target.exists():  # the same step again, after a fall-back to an older checkpoint
            shutil.rmtree(target)
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_folder(folder)
    paths = list_checkpoints(folder)
    kept = [p for p in paths if p.name <= target.name][-KEEP:]  # a later step is a damaged one, after a fall-back
    for leftover in [p for p in paths if p not in kept] + list(folder.glob(".tmp-step-*")):
        shutil.rmtree(leftover, ignore_errors=True)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders below `folder`, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def read_checkpoint(path: Path) -> Any:
    """Read one checkpoint folder.

    Raises:
        ValueError: a byte of it is not what was written, or a file is missing.
    """
    try:
        contents = {name: (path / name).read_bytes() for name in _FILES}
        if (path / "manifest.json").read_bytes() != _manifest(contents):
            raise ValueError(f"{path}: checksum mismatch")
        return _decode(json.loads(contents["state.json"]), load(contents["tensors.safetensors"]))
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def load_checkpoint(folder: Path) -> tuple[int, Any] | None:
    """The newest whole checkpoint as (step, state), or None when there is none.

    A damaged checkpoint is named on stderr and the one before it is used.
    """
    for path in reversed(list_checkpoints(folder)):
        try:
            return int(path.name.removeprefix("step-")), read_checkpoint(path)
        except ValueError as error:
            print(f"warning: damaged checkpoint skipped: {error}", file=sys.stderr)
    return None
