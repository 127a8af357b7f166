"""One dataclass per experiment becomes its command line: YAML defaults, command line wins, unknown keys refused."""

from __future__ import annotations

import abc
import argparse
import dataclasses
import difflib
import functools
import itertools
import json
import os
import re
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

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
_IN_WORDS = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null",
    list: "a list", dict: "a mapping",
}  # fmt: skip


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
        family: the method without its settings, where that is more than leaving out " s=<scale>".
        note: what to say below a table that shows the method, say where it differs from the released code.
    """

    data: str
    model: str
    method: str
    order: tuple[float, ...] = (0,)
    depth: int | None = None
    scale: float | None = None
    family: str | None = None
    note: str = ""


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

    tuning_trials: int | None = None
    """How many settings these were chosen among on validation, for the record (repro.tune). Unset: untuned."""

    report_to: str = "none"
    """Also log to tensorboard, wandb, trackio or mlflow, whichever is installed; metrics.jsonl is always written."""

    def check_data_root(self) -> None:
        """Refuse a `data_root` that was given and is not there; the default may be absent (not all data need files).

        Raises:
            UserError: the flag and the folder.
        """
        if self.data_root != default_data_root() and not Path(self.data_root).is_dir():
            raise UserError(f"--data_root {self.data_root}: no such folder")

    @abc.abstractmethod
    def label(self) -> CellLabel:
        """The cell of a table that this run belongs to."""


def _help_of(cls: type) -> dict[str, str]:
    """Field name → the string literal under the field, which says why its default is what it is."""
    bases = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]  # a field keeps its base's text
    return {p.arg_name: p.description or "" for base in bases for p in parse_from_object(base).params}


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The types that a field takes: those of a union, else its one type."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _spellings(field: dataclasses.Field[Any]) -> tuple[str, ...]:
    return (field.name, *field.metadata.get("aliases", ()))


class _HelpFormatter(jsonargparse.DefaultHelpFormatter):
    def _format_action_invocation(self, action: argparse.Action) -> str:
        text = str(super()._format_action_invocation(action))
        if f"--{action.dest}+" in text:  # `--list+ WORD` appends; `--list WORD ...` is one way enough
            text = f"--{action.dest} {action.dest.upper()} ..."
        return text


@functools.cache  # building one takes longer than parsing a line, and a sweep has thousands of lines
def build_parser(cls: type, *, prog: str, description: str = "") -> jsonargparse.ArgumentParser:
    """A parser with one flag per field of dataclass `cls`, in a group for each class that `cls` inherits.

    A flag goes by its field's name and by the names in the field's metadata "aliases"; a YAML key is the field's name.
    `--config FILE` reads YAML defaults, `--print_config` prints the resulting YAML. `parse_config` accepts more
    spellings: dashes (`--batch-size`), switches (`--flag`, `--no_flag`), lists (`--depths 2 4`).
    """
    required = "".join(
        f" --{field.name} {field.name.upper()}"
        for field in dataclasses.fields(cls)
        if field.default is field.default_factory is dataclasses.MISSING
    )
    parser = jsonargparse.ArgumentParser(
        prog=prog, usage=f"{_runnable(prog)}{required} [--FLAG VALUE ...]", description=description,
        exit_on_error=False, formatter_class=_HelpFormatter,
    )  # fmt: skip
    parser.add_argument("--config", action="config", help="YAML file of defaults; flags on the command line win")
    hints, texts = typing.get_type_hints(cls), _help_of(cls)
    bases = [base for base in cls.__mro__ if dataclasses.is_dataclass(base)]
    owners = {field.name: base for base in bases for field in dataclasses.fields(base)}
    groups = {
        base: parser.add_argument_group(base.__name__.removesuffix("Config").removesuffix("Options") or "settings")
        for base in bases
        if base in owners.values()
    }
    for field in dataclasses.fields(cls):
        text = texts.get(field.name, "")
        if bool in _kinds(hints[field.name]):
            text += f" [switch: --{field.name} or --no_{field.name}]"
        settings: dict[str, Any] = {"default": field.default}
        if field.default_factory is not dataclasses.MISSING:
            settings = {"default": field.default_factory()}
        elif field.default is dataclasses.MISSING:
            settings = {"required": True}
        names = [f"--{name}" for name in _spellings(field)]
        groups[owners[field.name]].add_argument(*names, type=hints[field.name], help=text.strip() or None, **settings)
    return parser


def _runnable(prog: str) -> str:
    return prog if " " in prog or "." not in prog else f"python -m {prog}"


def _expand(cls: type, argv: Sequence[str]) -> list[str]:
    """`--a-b` becomes `--a_b`, `--flag` `--flag=true`, `--no_flag` `--flag=false`, and `--list a b` `--list [a, b]`.

    `--x -1e-1` becomes `--x=-1e-1`: argparse takes a negative number with an exponent for a flag. `--config` comes
    first, so that flags win. jsonargparse's ActionYesNo takes one spelling of a flag only, and no switch that may be
    unset.
    """
    hints = typing.get_type_hints(cls)
    fields = {name: field.name for field in dataclasses.fields(cls) for name in _spellings(field)}
    bools = {name for name, field in fields.items() if bool in _kinds(hints[field])}
    lists = {name for name, field in fields.items() if any(typing.get_origin(k) is list for k in _kinds(hints[field]))}
    configs: list[str] = []
    rest: list[str] = []
    tokens = list(argv)
    while tokens:
        flag, equals, value = tokens.pop(0).partition("=")
        if not flag.startswith("--"):
            rest.append(flag + equals + value)
            continue
        name = flag[2:].replace("-", "_")
        if name == "config" and (equals or tokens):
            configs.append(f"--config={value if equals else tokens.pop(0)}")
        elif equals:
            rest.append(f"--{name}={value}")
        elif name in bools:
            literal = tokens and tokens[0].lower() in ("true", "false")
            rest.append(f"--{name}={tokens.pop(0).lower() if literal else 'true'}")
        elif name.startswith("no_") and name[3:] in bools:
            rest.append(f"--{name[3:]}=false")
        elif name in lists:
            words = list(itertools.takewhile(lambda token: not token.startswith("--"), tokens))
            del tokens[: len(words)]
            if len(words) > 1 or (words and words[0][0:1] != "[" and str not in _kinds(hints[fields[name]])):
                quoted = [json.dumps(word) if list[str] in _kinds(hints[fields[name]]) else word for word in words]
                words = [f"[{', '.join(quoted)}]"]
            rest += [f"--{name}", *words]
        elif tokens and _negative(tokens[0]):
            rest.append(f"--{name}={tokens.pop(0)}")
        else:
            rest.append(f"--{name}")
    return configs + rest


def _negative(word: str) -> bool:
    """Whether a word is a negative number."""
    try:
        return float(word) < 0
    except ValueError:
        return False


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
    parser = build_parser(cls, prog=prog, description=description)  # type: ignore[arg-type]
    made = {f.name: f.default_factory for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    parser.set_defaults({name: make() for name, make in made.items() if make is not dataclasses.MISSING})
    try:
        namespace = parser.parse_args(_expand(cls, sys.argv[1:] if argv is None else argv))
    except _UNREADABLE as error:
        raise UserError(f"{prog}: {_explain(cls, str(error))} (see {_runnable(prog)} --help)") from error
    values = {f.name: namespace[f.name] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for name, value in values.items():
        if value is None and type(None) not in typing.get_args(hints[name]):  # the parser takes null for "not given"
            raise UserError(f"{prog}: {name} has no value (null): give one, or leave the line out")
    try:
        config = cls(**values)
        if isinstance(config, RunConfig):
            config.check_data_root()
        return config
    except ValueError as error:
        raise UserError(f"{prog}: {error}") from error


def _explain(cls: type, message: str) -> str:
    """Jsonargparse's message about a flag, a YAML key or a value in plain words."""
    hints = typing.get_type_hints(cls)
    names = [name for field in dataclasses.fields(cls) for name in _spellings(field)]
    names += [f"no_{name}" for name in names if bool in _kinds(hints.get(name))]
    if found := re.search(r"[Uu]nrecognized arguments: --([^\s=]+)", message):
        return f"unknown flag --{found[1]}{_suggestion(found[1], names, '--')}"
    if found := re.search(r"[Uu]nrecognized arguments: (.+)", message):
        return f"{found[1]!r} belongs to no flag"
    if found := re.search(r"arguments are required: (.+)", message):
        return f"missing: --{found[1].replace(', ', ', --')}"
    if found := re.search(r"Option '(.+)' is not accepted", message):
        return f"unknown key {found[1]!r}{_suggestion(found[1], names)}"
    found = re.search(r'Parser key "(\w+)":.*\b(?:Got|Given) value: (.*)', message, re.DOTALL)
    if found is None or found[1] not in hints:
        return _short(re.sub(r'Parser key "(\w+)":', r"--\1:", message))
    name, value = found.groups()
    kinds = _kinds(hints[name])
    choices = [str(choice) for kind in kinds if typing.get_origin(kind) is Literal for choice in typing.get_args(kind)]
    if choices:
        return f"--{name} {_short(value)}: choose one of {', '.join(choices)}{_suggestion(value, choices)}"
    words = [_IN_WORDS.get(typing.get_origin(kind) or kind, "") for kind in kinds]
    return f"--{name} {_short(value)}: must be {' or '.join(words)}" if all(words) else _short(message)


def _suggestion(word: str, known: Iterable[str], prefix: str = "") -> str:
    lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), lower, n=1)
    return f"; did you mean {prefix}{lower[close[0]]}?" if close else ""


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
