"""Weights and training states of other runs, as files: safetensors, checkpoints, or a .pth that holds tensors only."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError  # what torch.load(weights_only=True) raises; nothing is unpickled
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from repro.checkpoint import list_checkpoints, read_checkpoint
from repro.errors import UserError


def read_weights(path: str) -> dict[str, torch.Tensor]:
    """State dict from a run folder, a checkpoint folder, a .safetensors file, or a .pth that holds tensors only."""
    place = Path(path)
    try:
        if place.is_dir():
            if (place / "model.safetensors").exists():
                return load_file(place / "model.safetensors")
            return _tensors(_read_newest(place))
        if place.suffix == ".safetensors":
            return load_file(place)
        return _tensors(torch.load(place, map_location="cpu", weights_only=True))
    except (OSError, ValueError, RuntimeError, SafetensorError, EOFError, UnpicklingError) as error:
        raise UserError(f"{path}: no weights readable there ({error})") from error


def _tensors(tree: Any) -> dict[str, torch.Tensor]:
    """The state dict that a file holds, as it is or under "model"."""
    state = tree.get("model", tree) if isinstance(tree, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError("it holds no state dict")
    return state


def read_state(path: str) -> dict[str, Any]:
    """The whole training state of a run folder or checkpoint folder, for `--resume`."""
    try:
        return dict(_read_newest(Path(path)))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--resume {path}: no checkpoint to resume from ({error}); finished runs keep only weights, for --finetune"
        ) from error


def _read_newest(place: Path) -> Any:
    """The state in a checkpoint folder, or in the newest one of a run folder."""
    inside = list_checkpoints(place / "checkpoints") or list_checkpoints(place)
    found = [place] if place.name.startswith("step-") else inside
    if not found:
        raise ValueError("neither model.safetensors nor a checkpoint")
    return read_checkpoint(found[-1])["state"]


def to_safetensors(state: dict[str, torch.Tensor]) -> bytes:
    """A state dict as a safetensors file."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})
