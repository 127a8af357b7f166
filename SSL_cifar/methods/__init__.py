"""The methods, each in a file of its own, found by the file's name."""

from __future__ import annotations

import importlib
from pathlib import Path

from repro.errors import UserError
from SSL_cifar.methods.base import Method

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in ("__init__", "base"))


def load(name: str) -> type[Method]:
    """The one class of `methods/<name>.py` that is a method.

    Raises:
        UserError: there is no such file.
    """
    if name not in NAMES:
        raise UserError(f"--method {name}: choose one of {', '.join(NAMES)}")
    module = importlib.import_module(f"{__name__}.{name}")
    (found,) = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    return found
