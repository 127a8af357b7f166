"""A cell of a sweep: one command line and its run folder."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from repro.config import LOCATION_FIELDS
from repro.errors import UserError

SLUG_LENGTH = 120  # with the 9 characters of the hash far below the 255 that file systems allow
_PYTHON = re.compile(r"(.*/)?python(3(\.\d+)?)?$")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")


@dataclass(frozen=True)
class Cell:
    """One command of a sweep.

    Attributes:
        line: the command, normalised; the identity of the cell.
        argv: what is executed (never through a shell), with the run folder in it.
        folder: the run folder.
    """

    line: str
    argv: tuple[str, ...]
    folder: Path


def normalise(line: str) -> list[str]:
    """The words of a command line; comments go, and any Python interpreter at its head becomes `python`."""
    words = shlex.split(line, comments=True)
    if words and _PYTHON.match(words[0]):
        words[0] = "python"
    return words


def past_interpreter_flags(words: Sequence[str]) -> int:
    """Where the flags that follow `python` at the head of a command end: at `-m`, `-c` or a script."""
    at = 1
    while at < len(words) and words[at].startswith("-") and words[at] not in ("-m", "-c", "-"):
        at += 2 if words[at] in ("-W", "-X") else 1
    return at


def slug(words: list[str]) -> str:
    """A readable folder name: the program, then the values, with their flag's name where the value is a bare number."""
    parts: list[str] = []
    name = ""
    for word in words:
        if word in ("python", "torchrun", "accelerate", "launch", "-m", "-u", "--standalone"):
            continue
        if word.startswith("--") and "=" in word:
            name, _, word = word[2:].partition("=")
        elif word.startswith("--"):
            if name:
                parts.append(name)  # a switch
            name = word[2:]
            continue
        is_path = "/" in word
        if not name:
            parts.append(Path(word).stem if is_path else word)
        elif name == "config":
            parts.append(Path(word).stem)
        elif not is_path:
            parts.append(f"{name}{word}" if re.fullmatch(r"[-+.,\deE]+", word) else word)
        name = ""
    if name:
        parts.append(name)
    text = re.sub(r"[^A-Za-z0-9._=+-]+", "_", "-".join(parts)).strip("-_.")
    return text[:SLUG_LENGTH].rstrip("-_.") or "cell"


def _output_dir(words: list[str]) -> str | None:
    """The run folder that the line itself names; the last one wins, as for every flag."""
    found = None
    for index, word in enumerate(words):
        flag, _, value = word.partition("=")
        if flag in ("--output_dir", "--output-dir"):
            found = value if "=" in word else (words[index + 1] if index + 1 < len(words) else "")
    return found


def _program(word: str, where: str) -> str:
    """Where the head of a line is found: this interpreter, a script beside it, or a program on PATH."""
    if word == "python":
        return sys.executable
    beside = Path(sys.executable).parent / word
    found = str(beside) if "/" not in word and os.access(beside, os.X_OK) else shutil.which(word)
    if found is None:
        raise UserError(f"{where}: {word!r} is no program on this machine (lines do not go through a shell)")
    return found


def make_cell(line: str, results: Path, where: str = "line") -> Cell | None:
    """The cell of one line, or None for a blank line or a comment.

    Raises:
        UserError: unbalanced quotes, a line that needs a shell, an unknown program, `--output_dir` without a value.
    """
    try:
        words = normalise(line)
    except ValueError as error:
        raise UserError(f"{where}: {error} in {line.strip()!r}") from error
    if not words:
        return None
    if _ASSIGNMENT.match(words[0]):
        raise UserError(f"{where}: {words[0]!r} sets a variable, but lines do not go through a shell: export it before")
    text = shlex.join(words)
    named = _output_dir(words)
    if named == "":
        raise UserError(f"{where}: --output_dir without a folder in {text!r}")
    argv = [_program(words[0], where), *words[1:]]
    if named is not None:
        return Cell(text, tuple(argv), Path(named))
    folder = results / f"{slug(words)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return Cell(text, (*argv, "--output_dir", str(folder)), folder)


def read_cells(lines: Iterable[str], results: Path) -> tuple[list[Cell], int]:
    """All cells of a list of lines, and how many lines were repeated (and left out).

    Raises:
        UserError: a line that cannot be used, or two different lines that name one run folder.
    """
    cells: dict[str, Cell] = {}
    folders: dict[str, str] = {}
    repeated = 0
    for number, line in enumerate(lines, start=1):
        cell = make_cell(line, results, f"line {number}")
        if cell is None:
            continue
        if cell.line in cells:
            repeated += 1
            continue
        folder = os.path.abspath(cell.folder)
        if folder in folders:
            raise UserError(f"line {number}: its --output_dir {cell.folder} is also that of {folders[folder]!r}")
        folders[folder] = cell.line
        cells[cell.line] = cell
    return list(cells.values()), repeated


Canonical = tuple[tuple[str, ...], frozenset[tuple[str, str | float]]]


def canonical(line: str) -> Canonical:
    """What a command computes, however it is written: (program, its flags).

    Flags of the interpreter, places and the device are left out, `--a=b` is `--a b`, `-` in a name is `_`, a switch is
    `true` and `--no_x` is `x` at `false`; of a repeated flag the last counts, and 1 equals 1.0.

    Raises:
        ValueError: unbalanced quotes.
    """
    words = normalise(line)
    if words[:1] == ["python"]:
        words = words[past_interpreter_flags(words) :]
    program: list[str] = []
    flags: dict[str, str | float] = {}
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            program.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if not equals and words and not words[0].startswith("--"):
            value = words.pop(0)
        elif not equals:
            name, value = (name[3:], "false") if name.startswith("no_") else (name, "true")
        try:
            flags[name] = float(value)
        except ValueError:
            flags[name] = value.lower() if value.lower() in ("true", "false") else value
    return tuple(program), frozenset(item for item in flags.items() if item[0] not in (*LOCATION_FIELDS, "device"))
