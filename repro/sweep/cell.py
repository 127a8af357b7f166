"""A cell of a sweep: one command line and its run folder."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from repro.config import LOCATION_FIELDS
from repro.errors import UserError

SLUG_LENGTH = 120  # with the 9 characters of the hash far below the 255 that file systems allow
_PYTHON = re.compile(r"(.*/)?python(3(\.\d+)?)?$")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")


@dataclass(frozen=True)
class Cell:
    """One command of a sweep."""

    line: str  # normalised; the identity of the cell
    argv: tuple[str, ...]  # what is executed (never through a shell), with the run folder in it
    folder: Path
    named: bool = False  # the line has an --output_dir of its own


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
    unnamed = ("python", "torchrun", "accelerate", "launch", "-m", "-u", "--standalone")
    for name, value in _pairs(word for word in words if word not in unnamed):
        if value is None:
            parts.append(name)
        elif name == "config" or (not name and "/" in value):
            parts.append(Path(value).stem)
        elif not name or "/" not in value:
            parts.append(f"{name}{value}" if re.fullmatch(r"[-+.,\deE]+", value) else value)
    text = re.sub(r"[^A-Za-z0-9._=+-]+", "_", "-".join(parts)).strip("-_.")
    return text[:SLUG_LENGTH].rstrip("-_.") or "cell"


def _pairs(words: Iterable[str]) -> Iterator[tuple[str, str | None]]:
    """The flags of a line with their values: None for a switch; other words have no name ('')."""
    name = ""
    for word in words:
        if not word.startswith("--"):
            yield name, word
            name = ""
            continue
        if name:
            yield name, None
        name, equals, value = word[2:].partition("=")
        if equals:
            yield name, value
            name = ""
    if name:
        yield name, None


def make_cell(line: str, results: Path, where: str = "line", *, runs_here: bool = True) -> Cell | None:
    """The cell of one line, or None for a blank line or a comment.

    Without `runs_here` the program need not be on this machine.

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
    beside = str(Path(sys.executable).parent)  # where torchrun is
    program = sys.executable if words[0] == "python" else shutil.which(words[0], path=beside) or shutil.which(words[0])
    if program is None and runs_here:
        raise UserError(f"{where}: {words[0]!r} is no program on this machine (lines do not go through a shell)")
    named = [value for name, value in _pairs(words) if name in ("output_dir", "output-dir")]
    if named and not named[-1]:
        raise UserError(f"{where}: --output_dir without a folder in {text!r}")
    argv = (program or words[0], *words[1:])
    if named and named[-1]:
        return Cell(text, argv, Path(named[-1]), named=True)
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


def processes(cell: Cell) -> int | None:
    """How many processes the command starts by torchrun or accelerate, each for a GPU; None: one for each there is."""
    names = ("nproc_per_node", "num_processes")
    given = [value for name, value in _pairs(cell.argv) if name.replace("-", "_") in names and value]
    return 1 if not given else int(given[-1]) if given[-1].isdigit() else None


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
    program = tuple(value for name, value in _pairs(words) if not name and value)
    flags: dict[str, str | float] = {}
    for name, value in _pairs(words):
        name = name.replace("-", "_")
        if value is None:
            name, value = name.removeprefix("no_"), "false" if name.startswith("no_") else "true"
        try:
            flags[name] = float(value)
        except ValueError:
            flags[name] = value.lower() if value.lower() in ("true", "false") else value
    return program, frozenset(item for item in flags.items() if item[0] not in ("", *LOCATION_FIELDS, "device"))
