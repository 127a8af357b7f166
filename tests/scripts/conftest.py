"""What the tests of the shell scripts share."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.image_sets import datasets_cache, make_parquet  # noqa: F401

Hear = Callable[..., tuple[list[str], list[list[str]]]]


@pytest.fixture
def hear(root: Path, tmp_path: Path) -> Hear:
    """Runs a script with an interpreter that only writes down its arguments and its input.

    `hear("gnn/run.sh", *arguments, **variables)` gives (arguments of each call of the interpreter, the words of each
    line piped into it).
    """
    program, heard = tmp_path / "python", tmp_path / "heard"
    program.write_text(f'#!/usr/bin/env bash\nprintf "ARGS %s\\n" "$*" >> {heard}\n[ -t 0 ] || cat >> {heard}\n')
    program.chmod(0o755)

    def run(script: str, *arguments: str, **variables: str) -> tuple[list[str], list[list[str]]]:
        heard.unlink(missing_ok=True)
        subprocess.run(
            ["bash", str(root / script), *arguments], check=True, cwd="/", stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHON": str(program), **variables},
        )  # fmt: skip
        said = heard.read_text().splitlines()
        calls = [line.removeprefix("ARGS ") for line in said if line.startswith("ARGS ")]
        return calls, [shlex.split(line) for line in said if not line.startswith("ARGS ")]

    return run
