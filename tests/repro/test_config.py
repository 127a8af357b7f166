"""One dataclass is the command line, the YAML keys and the help text."""

from __future__ import annotations

import dataclasses
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from repro.config import RunConfig, load_yaml, parse_config, to_yaml
from repro.errors import UserError, run_main


@dataclass
class Config:
    """An experiment."""

    output_dir: str
    """where it goes"""
    model: Literal["gcn", "gat"] = "gcn"
    """which model; gcn is the paper's"""
    batch_size: int = 4
    """rows at a time"""
    rate: float = 0.5
    """step length"""
    pre_norm: bool = False
    """normalize before"""
    shuffle: bool = True
    """mix the rows"""
    identity: bool | None = None
    """keep the input; unset: the model decides"""
    scale: float | None = None
    """how much"""
    names: list[str] = field(default_factory=lambda: ["a"])
    """several words"""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"--batch_size {self.batch_size}: must be at least 1")


def parse(*argv):
    return parse_config(Config, ["--output_dir", "o", *argv], prog="test", description="Says hello.")


def test_defaults_and_types():
    assert parse() == Config(output_dir="o")
    config = parse("--batch_size", "8", "--rate", "1", "--scale=1e-3", "--model", "gat", "--names", "[b, c]")
    assert (config.batch_size, config.rate, config.scale, config.model) == (8, 1.0, 1e-3, "gat")
    assert config.names == ["b", "c"] and isinstance(config.rate, float)


@pytest.mark.parametrize("number", ["-1", "-0.5", "-1e-1", "-.5", "-1E+2"])
def test_negative_numbers_are_no_flags(number):
    assert parse("--rate", number).rate == parse(f"--rate={number}").rate == float(number)


@pytest.mark.parametrize("flag", ["--batch_size", "--batch-size"])
@pytest.mark.parametrize("separator", [" ", "="])
def test_dashes_and_underscores_are_one(flag, separator):
    assert parse(*f"{flag}{separator}9".split(" ")).batch_size == 9


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--pre_norm", True),
        ("--pre-norm", True),
        ("--pre_norm true", True),
        ("--pre_norm=true", True),
        ("--pre-norm False", False),
        ("--no_pre_norm", False),
        ("--no-pre-norm", False),
        ("--pre_norm --no_pre_norm", False),
        ("--no_pre_norm --pre_norm", True),
    ],
)
def test_switches(words, expected):
    assert parse(*words.split()).pre_norm is expected


def test_a_switch_does_not_swallow_the_next_flag_and_an_unset_one_stays_unset():
    config = parse("--no_shuffle", "--identity", "--batch_size", "3")
    assert (config.shuffle, config.identity, config.batch_size) == (False, True, 3)
    assert parse("--no_identity").identity is False
    assert parse().identity is None


@pytest.mark.parametrize("first", [True, False])
def test_the_command_line_wins_over_yaml_in_any_order(tmp_path, first):
    path = tmp_path / "c.yaml"
    path.write_text("batch_size: 32\nrate: 0.25\npre_norm: true\n")
    given, flags = ["--config", str(path)], ["--batch_size", "2", "--no_pre_norm"]
    config = parse(*(given + flags if first else flags + given))
    assert (config.batch_size, config.rate, config.pre_norm) == (2, 0.25, False)


def test_a_later_yaml_wins_over_an_earlier(tmp_path):
    for name, size in (("a", 5), ("b", 6)):
        (tmp_path / f"{name}.yaml").write_text(f"batch_size: {size}\n")
    assert parse(f"--config={tmp_path / 'a.yaml'}", "--config", str(tmp_path / "b.yaml")).batch_size == 6


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--no_such_flag 1", "no_such_flag"),
        ("--batch_size two", "batch_size"),
        ("--batch_size 1.5", "batch_size"),
        ("--rate fast", "rate"),
        ("--model gin", "model"),
        ("--pre_norm=perhaps", "pre_norm"),
        ("--batch_size", "batch_size"),
        ("--batch_size 0", "batch_size"),
        ("stray", "stray"),
        ("--config nowhere.yaml", "nowhere.yaml"),
        ("--no_batch_size", "no_batch_size"),
    ],
)
def test_a_bad_flag_is_named_in_one_line(words, named):
    with pytest.raises(UserError) as refused:
        parse(*words.split())
    assert named in str(refused.value) and "\n" not in str(refused.value) and str(refused.value).startswith("test: ")


def test_a_missing_required_flag_is_named():
    with pytest.raises(UserError, match="test: missing: --output_dir"):
        parse_config(Config, [], prog="test")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("batch_sise: 3\n", "batch_sise"),
        ("batch_size: many\n", "batch_size"),
        ("batch_size: [1\n", ""),
        ("- batch_size\n", ""),
        ("pre_norm: perhaps\n", "pre_norm"),
        ("batch_size: 0\n", "batch_size"),
        ("a: 1\n" * 400, ""),
    ],
)
def test_a_bad_yaml_is_refused(tmp_path, text, named):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        parse("--config", str(path))
    assert named in str(refused.value) and len(str(refused.value)) < 600


def test_a_yaml_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xff\xfe\x00batch")
    with pytest.raises(UserError):
        parse("--config", str(path))
    with pytest.raises(UserError, match="not readable as YAML"):
        load_yaml(path)


def test_yaml_never_builds_objects(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(f"output_dir: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    with pytest.raises(UserError):
        parse("--config", str(path))
    with pytest.raises(UserError):
        load_yaml(path)
    assert not (tmp_path / "made").exists()


def test_print_config_and_to_yaml_are_read_back(tmp_path, capsys):
    words = ["--batch_size", "7", "--pre_norm", "--no_identity", "--scale", "0.1", "--names", "[x, 'y z']"]
    with pytest.raises(SystemExit) as left:
        parse(*words, "--print_config")
    assert left.value.code == 0
    path = tmp_path / "c.yaml"
    path.write_text(capsys.readouterr().out)
    expected = parse(*words)
    assert parse_config(Config, ["--config", str(path)], prog="test") == expected
    path.write_text(to_yaml(expected))
    assert parse_config(Config, ["--config", str(path)], prog="test") == expected
    assert yaml.safe_load(to_yaml(expected)) == dataclasses.asdict(expected)


def test_help_says_what_each_field_is_for(capsys):
    with pytest.raises(SystemExit) as left:
        parse_config(Config, ["--help"], prog="test", description="Says hello.")
    assert left.value.code == 0
    told = capsys.readouterr().out
    assert "[switch: --shuffle or --no_shuffle]" in " ".join(told.split())
    assert "Says hello." in told and "which model; gcn is the paper's" in told and "--batch_size" in told


@dataclass(kw_only=True)
class Aliased:
    tau: float = field(default=1.0, metadata={"aliases": ("temp",)})
    """Temperature."""
    symmetric: bool = field(default=False, metadata={"aliases": ("dual_norm",)})
    """Both terms."""


@pytest.mark.parametrize("argv", ["--tau 2 --symmetric", "--temp 2 --dual-norm", "--temp=2 --dual_norm=true"])
def test_a_flag_goes_by_each_of_its_names(argv: str) -> None:
    assert parse_config(Aliased, argv.split(), prog="p") == Aliased(tau=2.0, symmetric=True)


def test_a_switch_can_be_turned_off_by_its_alias() -> None:
    assert parse_config(Aliased, ["--dual-norm", "--no_dual_norm"], prog="p") == Aliased()


def test_an_experiment_must_name_its_cells(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="label"):
        RunConfig(output_dir=str(tmp_path))  # type: ignore[abstract]


# -- from the user's side: a command, its output, its exit code -------------------------------------------------------


def command(python: str, *words: str) -> tuple[int, str, str]:
    done = subprocess.run([python, "-m", *words], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--data coar", "--data coar: choose one of cora, citeseer, pubmed"),
        ("--data coar", "; did you mean cora? (see python -m gnn.main --help)"),
        ("--nlayers 4", "unknown flag --nlayers; did you mean --nlayer?"),
        ("--no_identiy", "unknown flag --no_identiy; did you mean --no_identity?"),
        ("--epochs 3 cora", "'cora' belongs to no flag"),
        ("--scale big", "--scale big: must be a number or null"),
        ("--data digits --data_root nowhere", "--data_root nowhere: no such folder"),
    ],
)
def test_a_slip_is_answered_in_one_plain_line(words: str, told: str, tmp_path: Path, capsys) -> None:
    from gnn.main import main

    with pytest.raises(SystemExit) as left:
        run_main(lambda: main(["--output_dir", str(tmp_path / "run"), *words.split()]))
    answer = capsys.readouterr().err
    assert left.value.code == 2 and answer.startswith("error: ") and answer.count("\n") == 1
    assert told in answer and not (tmp_path / "run").exists()


def test_a_slip_in_a_process_of_its_own(python: str) -> None:
    code, out, err = command(python, "repro.sweep", "--results", "r", "--cluster", "slrum")
    assert (code, out) == (2, "")
    assert err == (
        "error: python -m repro.sweep: --cluster slrum: choose one of local, slurm; did you mean slurm? "
        "(see python -m repro.sweep --help)\n"
    )


def test_unknown_yaml_keys_get_a_suggestion(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("batch_sise: 3\n")
    with pytest.raises(UserError, match="unknown key 'batch_sise'; did you mean batch_size?"):
        parse("--config", str(tmp_path / "c.yaml"))


def test_the_default_data_root_may_be_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from gnn.config import Config as GraphConfig

    monkeypatch.setenv("CONTRANORM_DATA", str(tmp_path / "absent"))
    assert parse_config(GraphConfig, ["--output_dir", "o"], prog="p").data_root.endswith("absent")
    (tmp_path / "c.yaml").write_text(f"data_root: {tmp_path / 'gone'}\n")
    with pytest.raises(UserError, match="gone: no such folder"):
        parse_config(GraphConfig, ["--output_dir", "o", "--config", str(tmp_path / "c.yaml")], prog="p")


def test_help_has_groups_each_flag_once_and_a_usage_line_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    from gnn.config import Config as GraphConfig

    with pytest.raises(SystemExit):
        parse_config(GraphConfig, ["--help"], prog="gnn.main")
    told = capsys.readouterr().out
    assert told.startswith("usage: python -m gnn.main --output_dir OUTPUT_DIR [--FLAG VALUE ...]\n")
    titles = [line for line in told.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["options:", "settings:", "ContraNorm:", "Run:"]
    entries = [line.split("  ")[1] for line in told.splitlines() if line.startswith("  --")]
    names = [word for entry in entries for word in entry.replace(",", "").split() if word.startswith("--")]
    assert len(names) == len(set(names)) and not any("-" in name[2:] for name in names)
    assert any(entry.startswith("--scale SCALE, --norm_scale SCALE") for entry in entries)
    assert {f"--{field.name}" for field in dataclasses.fields(GraphConfig)} < set(names)


@dataclass
class Lists:
    depths: list[int] = field(default_factory=list)
    """Whole numbers."""
    names: list[str] | str = field(default_factory=list)
    """One name, or several."""


@pytest.mark.parametrize(
    ("words", "depths", "names"),
    [
        ("--depths 2 4 --names a b", [2, 4], ["a", "b"]),
        ("--depths 2 --names a", [2], "a"),
        ("--depths -1 2 --names 1 null", [-1, 2], ["1", "null"]),
        ("--depths [2,4] --names [a,b]", [2, 4], ["a", "b"]),
        ("--depths=[2,4] --names=a", [2, 4], "a"),
    ],
)
def test_lists_are_written_as_words(words: str, depths: list[int], names: list[str] | str) -> None:
    assert parse_config(Lists, words.split(), prog="p") == Lists(depths, names)


def test_a_list_of_numbers_takes_no_words() -> None:
    with pytest.raises(UserError, match="--depths"):
        parse_config(Lists, ["--depths", "2", "four"], prog="p")
    with pytest.raises(UserError, match="--depths"):
        parse_config(Lists, ["--depths"], prog="p")


def test_a_list_has_one_line_of_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(Lists, ["--help"], prog="p")
    told = capsys.readouterr().out
    assert "  --depths DEPTHS ... " in told and "+" not in told
