"""One dataclass per experiment becomes its command line: YAML defaults, command line wins, unknown keys refused."""

from __future__ import annotations

import abc
import argparse
import dataclasses
import os
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import jsonargparse
import yaml
from docstring_parser import parse_from_object

from repro.errors import UserError

T = TypeVar("T")
# Fields that say where and how a run is done, not what it computes: they may differ when a run is resumed.
LOCATION_FIELDS = ("output_dir", "data_root", "data_path", "report_to")
# What jsonargparse and YAML raise for a bad flag or file. ValueError: not UTF-8, or an integer of thousands of digits;
# RecursionError: a list that holds itself.
_UNREADABLE = (
    argparse.ArgumentError, jsonargparse.ArgumentError, TypeError, ValueError, OverflowError, RecursionError,
    yaml.YAMLError,
)  # fmt: skip


def default_data_root() -> str:
    """Folder that holds the data sets: $CONTRANORM_DATA, else `data/`."""
    return os.environ.get("CONTRANORM_DATA", "data")


@dataclasses.dataclass(frozen=True)
class CellLabel:
    """Where a run stands in tables and figures, in words that are the same for every experiment.

    Attributes:
        data: data set or task.
        model: architecture or checkpoint.
        method: what is compared: "vanilla", "ContraNorm s=1 + LayerNorm", "PairNorm", ...
        order: sort key of the method among the others of a table; vanilla is (0,).
        depth: number of layers, where it is varied or chosen.
        scale: the method's strength, where it has one.
    """

    data: str
    model: str
    method: str
    order: tuple[float, ...] = (0,)
    depth: int | None = None
    scale: float | None = None


@dataclasses.dataclass(kw_only=True)
class RunConfig(abc.ABC):
    """What the settings of every experiment have in common; a subclass adds its own and its cell's label."""

    EXECUTION_FIELDS: ClassVar[tuple[str, ...]] = ("output_dir", "data_root", "report_to")
    """Fields that say how a run is computed, not what: runs that differ in them alone share a table's cell."""

    output_dir: str
    """Folder of this run: args.yaml, metrics.jsonl, record.json. Re-running the command resumes it."""

    seed: int = 0
    """Seed of everything that is drawn; the same seed gives the same number on the same processor."""

    data_root: str = dataclasses.field(default_factory=default_data_root)
    """Folder that holds all data sets, read first and never written; default $CONTRANORM_DATA, else data/."""

    report_to: str = "none"
    """Also log to tensorboard, wandb, trackio or mlflow, whichever is installed; metrics.jsonl is always written."""

    @abc.abstractmethod
    def label(self) -> CellLabel:
        """The cell of a table that this run belongs to."""


def _help_of(cls: type) -> dict[str, str]:
    """Field name → the string literal under the field, which says why its default is what it is."""
    bases = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]  # a field keeps its base's text
    return {p.arg_name: p.description or "" for base in bases for p in parse_from_object(base).params}


def _is_bool(hint: object) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return bool in typing.get_args(hint)
    return hint is bool


def build_parser(cls: type, *, prog: str, description: str = "") -> jsonargparse.ArgumentParser:
    """A parser with one flag per field of dataclass `cls`.

    Every flag can be written with dashes or underscores (`--batch-size`, `--batch_size`), and by the names in its
    field's metadata "aliases"; a YAML key is the field's name. A bool is a switch: `--flag` / `--no_flag`, or
    `--flag=false`. `--config FILE` reads YAML defaults, `--print_config` prints the resulting YAML.
    """
    parser = jsonargparse.ArgumentParser(prog=prog, description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of defaults; flags on the command line win")
    hints = typing.get_type_hints(cls)
    texts = _help_of(cls)
    for field in dataclasses.fields(cls):
        if field.default_factory is not dataclasses.MISSING:
            default: Any = field.default_factory()
        else:
            default = field.default
        spellings = [field.name, *field.metadata.get("aliases", ())]
        names = dict.fromkeys(f"--{s}" for name in spellings for s in (name, name.replace("_", "-")))
        text = texts.get(field.name, "")
        if _is_bool(hints[field.name]):
            text += f" [switch: --{field.name} or --no_{field.name}]"
        settings: dict[str, Any] = {"help": text.strip() or None}
        if default is dataclasses.MISSING:
            settings["required"] = True
        else:
            settings["default"] = default
        parser.add_argument(*names, type=hints[field.name], **settings)
    return parser


def _expand_switches(cls: type, argv: Sequence[str]) -> list[str]:
    """Write `--flag` as `--flag=true` and `--no_flag` as `--flag=false`, and put `--config` first so that flags win.

    jsonargparse's ActionYesNo does the first for one spelling of a flag only, and not for a switch that may be unset.
    """
    hints = typing.get_type_hints(cls)
    switches = [f for f in dataclasses.fields(cls) if _is_bool(hints[f.name])]
    bools = {name: f.name for f in switches for name in (f.name, *f.metadata.get("aliases", ()))}
    configs: list[str] = []
    rest: list[str] = []
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        name = token.lstrip("-").replace("-", "_")
        if token == "--config" and tokens:
            configs += [token, tokens.pop(0)]
        elif token.startswith("--config="):
            configs.append(token)
        elif token.startswith("--") and name in bools:
            literal = tokens and tokens[0].lower() in ("true", "false")
            rest.append(f"--{bools[name]}={tokens.pop(0).lower() if literal else 'true'}")
        elif token.startswith(("--no_", "--no-")) and name.removeprefix("no_") in bools:
            rest.append(f"--{bools[name.removeprefix('no_')]}=false")
        else:
            rest.append(token)
    return configs + rest


def parse_config(cls: type[T], argv: Sequence[str] | None = None, *, prog: str, description: str = "") -> T:
    """Parse a command line into the dataclass `cls`.

    Args:
        cls: a dataclass; its `__post_init__` may raise `UserError` or `ValueError` for values that make no sense.
        argv: the arguments without the program name; None means `sys.argv[1:]`.
        prog: how the program is called, for the help text.
        description: first paragraph of the help text.

    Raises:
        UserError: unknown flag, unknown YAML key, a value of the wrong type; names the key. `run_main` makes that
            one line and exit code 2.
    """
    parser = build_parser(cls, prog=prog, description=description)
    arguments = _expand_switches(cls, sys.argv[1:] if argv is None else argv)
    try:
        namespace = parser.parse_args(arguments)
    except _UNREADABLE as error:
        raise UserError(f"{prog}: {_short(str(error))} (see {prog} --help)") from error
    values = {f.name: namespace[f.name] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for name, value in values.items():
        if value is None and type(None) not in typing.get_args(hints[name]):  # the parser takes null for "not given"
            raise UserError(f"{prog}: {name} has no value (null): give one, or leave the line out")
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"{prog}: {error}") from error


def _short(message: str, limit: int = 400) -> str:
    """The message on one line, cut where a parser quotes a whole file."""
    line = " ".join(message.split())
    return line if len(line) <= limit else line[:limit] + " …"


def to_yaml(config: object) -> str:
    """The config as YAML that `--config` reads back."""
    return str(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))  # type: ignore[call-overload]


def load_yaml(path: Path) -> Any:
    """Read a YAML file with the safe loader.

    Raises:
        UserError: the file is missing, not UTF-8, or not YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a number of 5,000 digits
        raise UserError(f"{path}: not readable as YAML: {_short(str(error))}") from error
