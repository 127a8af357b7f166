"""One budget for every method: the list of settings, the choice by validation, and bad input."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from repro import tune
from repro.errors import UserError

SPACE = """
command: python -m fake.main --data {data} --depth {depth}
metric: validation_accuracy
search: {lr: [log, 0.001, 0.1]}
methods:
  vanilla: {search: {dropout: [linear, 0.2, 0.8]}}
  rival: {flags: --rival --fast, search: {strength: [log, 1, 100], other: [linear, -1, 1]}}
"""
BASE = ["--data", "a", "b", "--depths", "2", "16", "--trials", "4"]


@pytest.fixture
def space(tmp_path: Path) -> Path:
    path = tmp_path / "space.yaml"
    path.write_text(SPACE)
    return path


@pytest.fixture
def run(space: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def lines(*argv: str) -> list[list[str]]:
        tune.main(["--space", str(space), *BASE, *argv])
        return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]

    return lines


def flags(words: list[str]) -> dict[str, str]:
    return {word[2:]: value for word, value in zip(words, [*words[1:], ""], strict=True) if word.startswith("--")}


def write(lines: list[list[str]], path: Path, validation: Any) -> None:
    """Records of these lines; test numbers run against validation."""
    records = []
    for words in lines:
        value = validation(flags(words))
        metrics = {"validation_accuracy": value, "test_accuracy": 1.0 if value == "nan" else 1 - value}
        command = shlex.join([*words, "--output_dir", "somewhere"])
        base = {"schema": 2, "experiment": "fake", "protocol": "p", "selection": "s", "config": {}}
        records.append({**base, "metrics": metrics, "command": command})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_every_method_gets_as_many_trials(run: Any) -> None:
    lines = run()
    assert len(lines) == len({tuple(words) for words in lines}) == 2 * 2 * 2 * 4
    parsed = [flags(words) for words in lines]
    vanilla = [f for f in parsed if "rival" not in f and (f["data"], f["depth"]) == ("a", "2")]
    rival = [f for f in parsed if "rival" in f and (f["data"], f["depth"]) == ("a", "2")]
    assert [f["lr"] for f in vanilla] == [f["lr"] for f in rival]  # the same points for all
    assert all(f["seed"] == "100" for f in parsed)
    assert all(0.001 <= float(f["lr"]) <= 0.1 for f in parsed)
    assert all(0.2 <= float(f["dropout"]) <= 0.8 for f in vanilla)
    assert all(1 <= float(f["strength"]) <= 100 and -1 <= float(f["other"]) <= 1 for f in rival)
    quarters = sorted(int((float(f["dropout"]) - 0.2) / 0.6 * 3) for f in vanilla)
    assert set(quarters) == {0, 1, 2}  # spread over the range, as a random list need not be


def test_a_part_draws_the_same_settings(run: Any) -> None:
    everything = run()
    assert run("--methods", "vanilla") == [words for words in everything if "--rival" not in words]
    assert run("--draw", "1") != everything
    assert run("--trials", "2")[:2] == everything[:2]
    assert all(words[-2:] == ["--epochs", "1"] for words in run("--flags=--epochs 1"))


def test_the_choice_is_by_mean_validation(run: Any, tmp_path: Path) -> None:
    trials = run("--tuning_seeds", "100", "101")
    assert len(trials) == 2 * 32
    records = tmp_path / "records.jsonl"

    def validation(f: dict[str, str]) -> float:
        """Seed 101 reverses 100's order and weighs more: the lowest rate has the highest mean."""
        rate = float(f["lr"])
        return 0.5 + rate if f["seed"] == "100" else 0.5 - 2 * rate

    write(trials, records, validation)
    out = tmp_path / "results/tuning.json"
    more = ["--tuning_seeds", "100", "101", "--choose", str(records), "--seeds", "0", "1", "2", "--output", str(out)]
    final = run(*more)
    assert len(final) == 2 * 2 * 2 * 3
    lowest = min(float(flags(words)["lr"]) for words in trials)
    parsed = [flags(words) for words in final]
    assert all(float(f["lr"]) == lowest and f["tuning_trials"] == "4" for f in parsed)
    assert [f["seed"] for f in parsed[:3]] == ["0", "1", "2"]
    written = json.loads(out.read_text())
    assert (written["trials"], written["tuning_seeds"], len(written["cells"])) == (4, [100, 101], 8)
    cell = written["cells"][1]
    assert (cell["data"], cell["depth"], cell["method"]) == ("a", 2, "rival")
    assert len(cell["trials"]) == 4 and all(len(trial["validation"]) == 2 for trial in cell["trials"])
    assert cell["chosen"] in [trial["settings"] for trial in cell["trials"]]


def test_a_diverged_trial_is_the_last_choice(run: Any, tmp_path: Path) -> None:
    trials = run()
    records = tmp_path / "records.jsonl"
    highest = max(float(flags(words)["lr"]) for words in trials)
    write(trials, records, lambda f: "nan" if float(f["lr"]) == highest else float(f["lr"]))
    chosen = {float(flags(words)["lr"]) for words in run("--choose", str(records))}
    assert len(chosen) == 1 and chosen < {float(flags(words)["lr"]) for words in trials} - {highest}


def test_what_cannot_be_chosen(run: Any, tmp_path: Path) -> None:
    trials = run()
    records = tmp_path / "records.jsonl"
    write(trials[:-1], records, lambda f: 0.5)
    with pytest.raises(UserError, match="1 trials have no record in .*: run them first, say 'python -m fake.main"):
        run("--choose", str(records))
    write(trials, records, lambda f: 0.5)
    records.write_text(records.read_text().replace("validation_accuracy", "loss"))
    with pytest.raises(UserError, match="no validation_accuracy in its metrics: hold out a part of train"):
        run("--choose", str(records))


def test_flags_of_trials_alone_and_whole_numbers(space: Path, run: Any, tmp_path: Path) -> None:
    space.write_text(SPACE.replace("[linear, -1, 1]", "[integer, 2, 4]") + "trial_flags: --hold_out 0.1\n")
    trials = run("--trials", "16")
    assert all(flags(words)["hold_out"] == "0.1" for words in trials)
    assert {flags(words)["other"] for words in trials if "--rival" in words} == {"2", "3", "4"}
    records = tmp_path / "records.jsonl"
    write(trials, records, lambda f: float(f["lr"]))
    final = run("--trials", "16", "--choose", str(records))
    assert final and not any("--hold_out" in words for words in final)
    write(
        [words[: words.index("--hold_out")] + words[words.index("--seed") :] for words in trials], records, lambda f: 1
    )
    with pytest.raises(UserError, match="128 trials have no record"):  # runs on all of train do not choose
        run("--trials", "16", "--choose", str(records))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--trials", "0"], "--trials must be at least 1, got 0"),
        (["--seeds", "100"], "--seeds and --tuning_seeds share 100"),
        (["--methods", "vanila"], "--methods vanila: .* has vanilla, rival"),
        (["--output", "x.json"], "--output belongs to --choose"),
        (["--space", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--depths", "deep"], "depths"),
        (["--choose", "nowhere"], "nowhere: no record.json"),
    ],
)
def test_nonsense_is_refused(argv: list[str], message: str, run: Any) -> None:
    with pytest.raises(UserError, match=message) as error:
        run(*argv)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("metric: validation_accuracy", "metric: test_accuracy", "a choice by test numbers is none"),
        ("--depth {depth}", "", "command lacks {depth}"),
        ("search: {lr", "lr: 3\nsearch: {lr", "must hold the keys"),
        (
            "[log, 0.001, 0.1]",
            "[log, 0, 0.1]",
            r"vanilla: lr: must be \[linear, LOW, HIGH\], .* got \['log', 0, 0.1\]",
        ),
        ("[log, 0.001, 0.1]", "[integer, 1, 2.5]", "vanilla: lr: must be"),
        ("[log, 0.001, 0.1]", "[[log], 1, 2]", "vanilla: lr: must be"),
        ("[log, 0.001, 0.1]", "[linear, 2, 1]", "vanilla: lr: must be"),
        ("[log, 0.001, 0.1]", "[log, 1]", "vanilla: lr: must be"),
        ("[log, 0.001, 0.1]", "0.1", "vanilla: lr: must be"),
        ("flags:", "flag:", "rival may hold flags and search"),
        ("{dropout: [linear, 0.2, 0.8]}", "[dropout]", "vanilla: search must be a mapping"),
        ("{depth}", "{depth} {seed}", "command may hold {data} and {depth} in braces, not 'seed'"),
    ],
)
def test_a_space_that_is_none(before: str, after: str, message: str, space: Path, run: Any) -> None:
    space.write_text(SPACE.replace(before, after))
    with pytest.raises(UserError, match=message):
        run()
