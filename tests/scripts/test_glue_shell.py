"""The GLUE shell scripts: what they print for the sweep, and every kind of line run for one step.

A stand-in for Python (variable PYTHON) writes down what it is called with, so that the plan is seen without a sweep.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import transformers
from accelerate.state import AcceleratorState
from transformers import AlbertConfig, AlbertModel, BertConfig, BertModel, BertTokenizerFast

from BERT_glue.config import parse
from BERT_glue.main import main
from BERT_glue.tasks import TASKS

RECORDER = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$RECORD_TO"
case "$*" in *repro.sweep*) sed 's/^/< /' >> "$RECORD_TO" ;; esac
"""
PAPER_TASKS = [task for task in TASKS if task != "wnli"]
SCALES = ["0.005", "0.01", "0.05", "0.1", "0.2"]


@pytest.fixture
def shell(root: Path, tmp_path: Path) -> Any:
    """Runs a script from a foreign folder; returns the calls of Python and the lines given to the sweep."""
    recorder, record = tmp_path / "python-recorder", tmp_path / "recorded.txt"
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)

    def run(script: str, *arguments: str, check: bool = True, **variables: str) -> tuple[list[str], list[str]]:
        record.unlink(missing_ok=True)
        environment = os.environ | {"PYTHON": str(recorder), "RECORD_TO": str(record)} | variables
        result = subprocess.run(
            ["bash", str(root / script), *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        if check:
            assert result.returncode == 0, result.stderr
        elif result.returncode == 0:
            pytest.fail(f"{script} {arguments} should have failed")
        recorded = record.read_text().splitlines() if record.exists() else [result.stderr]
        calls = [line for line in recorded if not line.startswith("< ")]
        return calls, [line.removeprefix("< ") for line in recorded if line.startswith("< ")]

    return run


@pytest.mark.parametrize(
    ("suffix", "model", "table"), [("", "bert-base-uncased", "bert"), ("_al", "albert-base-v2", "albert")]
)
def test_sweep_covers_tasks_scales_and_seeds(
    shell: Any, monkeypatch: Any, root: Path, suffix: str, model: str, table: str
) -> None:
    calls, lines = shell(f"BERT_glue/run_different_baselines{suffix}.sh", "--dry-run", JOBS="3", SEEDS="7", RECORDS="")
    assert calls == ["-m repro.sweep --results results/table1/runs --jobs 3 --cluster local --dry-run"]
    assert len(lines) == len(set(lines)) == 8 * 6
    monkeypatch.chdir(root)
    cells = set()
    for line in lines:
        words = shlex.split(line)
        assert words[:3] == ["python", "-m", "BERT_glue.main"]
        config = parse([*words[3:], "--output_dir", "x"])
        assert config.model_name_or_path == model and config.learning_rate == 2e-5
        assert config.sites_in(table) == ([] if config.pos == 0 else ["attention_sum"])
        cells.add((config.task_name, "vanilla" if config.pos == 0 else str(config.scale), config.seed))
    assert cells == {(t, s, n) for t in PAPER_TASKS for s in ["vanilla", *SCALES] for n in (7,)}


def test_processes_of_a_cell_share_the_papers_batch(shell: Any, monkeypatch: Any, root: Path) -> None:
    (told,), _ = shell("BERT_glue/run_different_baselines.sh", check=False, TASKS="rte", SCALES="0.1", PROCESSES="3")
    assert "does not divide the batch of 32" in told  # it would be 30
    _, (line,) = shell("BERT_glue/run_different_baselines.sh", TASKS="rte", SCALES="0.1", PROCESSES="2")
    monkeypatch.chdir(root)
    words = shlex.split(line)
    assert words[:5] == ["torchrun", "--standalone", "--nproc-per-node=2", "-m", "BERT_glue.main"]
    config = parse([*words[5:], "--output_dir", "x"])
    assert config.effective_batch == 32 and config.accumulation(processes=2) == 1


def test_contranorms_own_flags_stay_off_the_vanilla_line(shell: Any, monkeypatch: Any, root: Path) -> None:
    flags = {"FLAGS": "--group_by_length", "CONTRANORM_FLAGS": "--include_padding"}
    _, lines = shell("BERT_glue/run_different_baselines.sh", TASKS="rte", SCALES="vanilla 0.1", **flags)
    monkeypatch.chdir(root)
    configs = [parse([*shlex.split(line)[3:], "--output_dir", "x"]) for line in lines]
    assert [(c.include_padding, c.group_by_length, c.scale) for c in configs] == [
        (False, True, None),
        (True, True, 0.1),
    ]


def test_variants(shell: Any, monkeypatch: Any, root: Path) -> None:
    variants = "none attn_scale gfsa neutreno resformer contranorm contranorm+gfsa"
    flags = {"CONTRANORM_FLAGS": "--include_padding", "VARIANTS": variants, "SCALES": "vanilla 0.1", "TASKS": "rte"}
    _, lines = shell("BERT_glue/run_different_baselines.sh", **flags)
    monkeypatch.chdir(root)
    configs = [parse([*shlex.split(line)[3:], "--output_dir", "x"]) for line in lines]
    assert [config.label().method for config in configs] == [
        "vanilla", "AttnScale", "GFSA", "NeuTRENO", "ResFormer",
        "ContraNorm s=0.1 (padding in)", "ContraNorm s=0.1 (padding in) + GFSA",
    ]  # fmt: skip
    assert [config.include_padding for config in configs] == [False] * 5 + [True] * 2


def test_table_1_runs_both_sweeps_then_the_table(shell: Any, tmp_path: Path) -> None:
    results = tmp_path / "somewhere" / "runs"
    results.mkdir(parents=True)
    (results.parent / "table1.md").write_text("made by repro.report.tables\n")
    chosen = {"RESULTS": str(results), "TASKS": "rte", "SCALES": "vanilla 0.1", "RECORDS": ""}
    calls, lines = shell("scripts/reproduce_table1.sh", **chosen)
    assert [call.split()[1] for call in calls] == ["repro.sweep", "repro.sweep", "repro.report.tables"]
    assert (
        "--preset table1" in calls[2] and f"--records [{results}]" in calls[2] and "--best scale --by score" in calls[2]
    )
    assert [line.split("--model_name_or_path ")[1].split()[0] for line in lines] == ["bert-base-uncased"] * 2 + [
        "albert-base-v2"
    ] * 2
    calls, _ = shell("scripts/reproduce_table1.sh", "--dry-run", MODELS="minilm", RECORDS="")
    assert [call.split()[1] for call in calls] == ["repro.sweep"]


def test_table_1_on_a_laptop(shell: Any, monkeypatch: Any, root: Path) -> None:
    _, lines = shell("scripts/reproduce_table1.sh", "--dry-run", PRESET="cpu", RECORDS="")
    monkeypatch.chdir(root)
    configs = [parse([*shlex.split(line)[3:], "--output_dir", "x"]) for line in lines]
    assert len(configs) == 4 * 5 * 3 + 7 * 3 + 3 and {c.model_name_or_path for c in configs} == {"minilm"}
    assert {(c.num_train_epochs, c.learning_rate, c.group_by_length, c.probe) for c in configs} == {
        (2, 1e-4, True, True)
    }
    rte = {c.label().method for c in configs if c.task_name == "rte" and c.scale == 0.05}
    assert len(rte) == 9 and {"ContraNorm s=0.05", "ContraNorm s=0.05 (padding in)"} < rte
    (message,), _ = shell("scripts/reproduce_table1.sh", PRESET="gpu", check=False)
    assert "PRESET knows paper and cpu" in message


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("", ["rte", "0.005", "7"], {"pos": 7, "scale": 0.005, "model_name_or_path": "bert-base-uncased"}),
        ("", ["rte", "0", "7", "cpu"], {"pos": 0, "scale": None}),
        ("", ["mrpc", "0.1", "0", "1"], {"pos": 0, "task_name": "mrpc"}),
        ("", ["rte", "0.1", "ffn_sum", "--", "--seed", "3"], {"sites": "ffn_sum", "seed": 3, "pos": None}),
        ("_al", ["rte", "0.2", "4"], {"pos": 4, "scale": 0.2, "model_name_or_path": "albert-base-v2"}),
    ],
)
def test_single_run(
    shell: Any, monkeypatch: Any, root: Path, script: str, arguments: list[str], expected: dict[str, Any]
) -> None:
    (call,), _ = shell(f"BERT_glue/run_glue_baselines{script}.sh", *arguments)
    monkeypatch.chdir(root)
    words = shlex.split(call)
    assert words[:2] == ["-m", "BERT_glue.main"]
    config = parse(words[2:])
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.output_dir.startswith("out/glue/")


def test_records_that_count_as_done_reach_the_sweep_and_the_table(shell: Any) -> None:
    calls, _ = shell("BERT_glue/run_different_baselines.sh", RECORDS="a.jsonl,b", TASKS="rte")
    assert "--records [a.jsonl,b] --jobs" in calls[0]
    calls, _ = shell("scripts/reproduce_table1.sh", RECORDS="a.jsonl", RESULTS="runs", TASKS="rte", MODELS="minilm")
    assert "--records [a.jsonl] " in calls[0] and "--records [a.jsonl] " in calls[1]  # nothing ran


def test_single_run_tells_its_usage(shell: Any) -> None:
    (message,), _ = shell("BERT_glue/run_glue_baselines.sh", "rte", check=False)
    assert message.startswith("usage: ") and "TASK SCALE POS [DEVICE]" in message


# -- every line for one step -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny backbones named bert and albert, and a data root with all tasks."""
    root = tmp_path_factory.mktemp("tiny")
    datasets.config.HF_DATASETS_CACHE = root / "cache"
    transformers.logging.set_verbosity_error()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    kinds: dict[str, tuple[Any, Any, dict[str, int]]] = {
        "bert": (BertModel, BertConfig, {}),
        "albert": (AlbertModel, AlbertConfig, {"embedding_size": 8}),
    }
    for name, (model_class, config_class, own) in kinds.items():
        model_class(config_class(vocab_size=len(words), **sizes, **own)).save_pretrained(root / name)
        BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(root / name)
    for name, task in TASKS.items():
        folder = root / "glue" / name
        folder.mkdir(parents=True)
        for split in ("train", *task.validation.values()):
            table: dict[str, list[Any]] = {column: ["a b", "c d e", "f", "g h"] for column in task.sentences}
            table["label"] = [0, 1, 1, 0] if task.labels else [0.5, 1.5, 4.0, 2.0]
            pd.DataFrame(table).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return root


def run_lines(lines: list[str], tiny: Path, backbone: str, tmp_path: Path) -> None:
    for number, line in enumerate(lines):
        AcceleratorState._reset_state(reset_partial_state=True)
        words = shlex.split(line)[3:]
        more = ["--model_name_or_path", str(tiny / backbone), "--data_root", str(tiny), "--max_train_steps", "1"]
        main([*words, *more, "--output_dir", str(tmp_path / str(number))])
        assert (tmp_path / str(number) / "record.json").is_file()


@pytest.mark.parametrize("suffix", ["", "_al"])
def test_every_task_line_runs_one_step(
    shell: Any, monkeypatch: Any, root: Path, tiny: Path, tmp_path: Path, suffix: str
) -> None:
    _, lines = shell(f"BERT_glue/run_different_baselines{suffix}.sh", TASKS="rte stsb", SCALES="vanilla 0.1")
    monkeypatch.chdir(root)
    run_lines(lines, tiny, "albert" if suffix else "bert", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["", "_al"])
def test_every_line_runs_one_step(
    shell: Any, monkeypatch: Any, root: Path, tiny: Path, tmp_path: Path, suffix: str
) -> None:
    _, lines = shell(f"BERT_glue/run_different_baselines{suffix}.sh")
    monkeypatch.chdir(root)
    run_lines(lines, tiny, "albert" if suffix else "bert", tmp_path)
