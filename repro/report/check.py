"""Rebuild every committed table, figure, page and README block from the committed records, and fail on any difference.

`python -m repro.report.check` from the repository's root; `--write` brings everything up to date instead. Figures hold
the command that draws them, generated blocks name theirs, and a record without commit, versions, seed or command is
refused (one of schema 1 is listed).
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from repro.config import parse_config
from repro.errors import UserError, run_main
from repro.files import write_atomic
from repro.report import page, readme
from repro.report.records import find_records, iterate_records

FIGURES = (".svg", ".png")


@dataclass
class Config:
    """What to check."""

    results: str = "results"
    """Folder of committed records, tables, figures and the page."""
    write: bool = False
    """Write what differs instead of failing."""


def missing_from(record: dict[str, Any]) -> list[str]:
    """What a record lacks of commit, versions, seed, and a command that could be run again."""
    environment = record.get("environment") or {}
    command = str(record.get("command") or "")
    has = {
        "commit": environment.get("commit"),
        "versions": environment.get("versions"),
        "seed": record.get("seed") is not None,
        "command": " -m " in command or ".py" in command,
    }
    return [name for name, value in has.items() if not value]


def check_records(results: Path) -> Iterator[tuple[bool, str]]:
    """(Refused, message) for each file with records that lack something; those of schema 1 are listed only."""
    lacking: dict[tuple[str, bool, str], int] = {}
    for where, record in iterate_records(results, as_written=True):
        if names := missing_from(record):
            key = re.sub(r":\d+$", "", where), record.get("schema", 1) > 1, ", ".join(names)
            lacking[key] = lacking.get(key, 0) + 1
    for (file, refused, lacks), count in lacking.items():
        yield refused, f"{file}: {count} records{'' if refused else ' of schema 1'} without {lacks}"


def command_of(path: Path) -> str:
    """The command inside a figure; nothing for another program's."""
    if path.suffix == ".svg":
        return page.command_in(path)
    with Image.open(path) as image:
        return str(image.info.get("Description", ""))


def check_figures(results: Path, write: bool) -> Iterator[str]:
    """Figures that differ from what their command draws, or hold none.

    The commands run in a copy of the results without figures, beside links to all else: they draw what they say.
    """
    by_command: dict[str, list[Path]] = {}
    for path in sorted(path for path in results.rglob("*") if path.suffix in FIGURES):
        by_command.setdefault(command_of(path), []).append(path)
    for path in by_command.pop("", []):
        yield f"{path}: holds no command that draws it"
    with tempfile.TemporaryDirectory() as folder:
        for entry in Path().iterdir():
            if entry.name != results.parts[0]:
                (Path(folder) / entry.name).symlink_to(entry.resolve())
        shutil.copytree(results, Path(folder) / results, ignore=shutil.ignore_patterns(*(f"*{e}" for e in FIGURES)))
        for command, paths in by_command.items():
            try:
                readme.run_block(command, Path(folder))
            except UserError as error:
                yield f"{paths[0]}: {error}"
                continue
            for path in paths:
                fresh = Path(folder) / path
                if not fresh.exists():
                    yield f"{path}: not drawn by its command: {command}"
                elif fresh.read_bytes() != path.read_bytes():
                    yield f"{path}: differs from what its command draws"
                    if write:
                        write_atomic(path, fresh.read_bytes())


def check_pages(results: Path, write: bool) -> Iterator[str]:
    """Markdown files with generated blocks that differ, here and two levels down, and anywhere below the results."""
    rooms = (path for pattern in ("*.md", "*/README.md", "*/*/README.md") for path in Path().glob(pattern))
    for path in sorted({*rooms, *results.rglob("*.md")}):
        text = path.read_text(encoding="utf-8")
        new, changed = readme.regenerate(text, Path.cwd())
        yield from (f"{path}: differs: {command}" for command in changed)
        if write and new != text:
            write_atomic(path, new.encode())
    for name, text in zip(("index.html", "index.json"), page.build(results), strict=True):
        path = results / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            yield f"{path}: differs from what repro.report.page writes"
            if write:
                write_atomic(path, text.encode())


def main(argv: list[str] | None = None) -> int:
    """Entry point; the exit code."""
    config = parse_config(Config, argv, prog="python -m repro.report.check", description=__doc__ or "")
    results = Path(os.path.relpath(config.results))
    if not results.parts or results.parts[0] == "..":
        raise UserError(f"--results {config.results}: not a folder below this one: call it from the repository's root")
    find_records(config.results)
    failed = False
    for refused, message in check_records(results):
        print(("refused: " if refused else "listed: ") + message)
        failed |= refused
    for message in [*check_figures(results, config.write), *check_pages(results, config.write)]:
        print(message, file=sys.stderr if config.write else sys.stdout)
        failed |= not config.write or "differs" not in message
    print("up to date" if not failed else "not up to date; --write rewrites what differs")
    return int(failed)


if __name__ == "__main__":
    run_main(main)
