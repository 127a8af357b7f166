"""The trainer from command line to record: resuming, several processes, predictions, precision."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import BERT_glue as bg
import BERT_glue.train as training
from BERT_glue.config import Config, parse
from BERT_glue.data import load_splits
from BERT_glue.main import main as main_once
from BERT_glue.metric import KEYS
from BERT_glue.tasks import TASKS
from contranorm import attention_similarity
from contranorm.collapse import METRICS
from repro import tune
from repro.errors import Interrupted, UserError, run_main
from repro.run.run import Run


def main(arguments: list[str]) -> None:
    """One run, as in a process of its own: accelerate's settings live in a singleton."""
    AcceleratorState._reset_state(reset_partial_state=True)
    main_once(arguments)


SMALL = ["--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "4", "--learning_rate", "1e-3"]


@pytest.fixture
def command(backbones: dict[str, Path], glue_root: Path) -> Any:
    """Arguments of a small run; later ones win."""

    def build(output_dir: Path, *more: str, task: str = "rte", backbone: str = "bert") -> list[str]:
        fixed = ["--model_name_or_path", str(backbones[backbone]), "--task_name", task, "--num_train_epochs", "1"]
        return [*fixed, "--data_root", str(glue_root), "--output_dir", str(output_dir), *SMALL, *more]

    return build


SITE = ["--sites", "attention_sum", "--scale", "0.1"]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_trains_and_reports_its_metrics(
    command: Any, tmp_path: Path, record: Any, lines: Any, task: str
) -> None:
    main(command(tmp_path / "run", *SITE, "--max_train_steps", "1", task=task))
    found = record(tmp_path / "run")
    suffixes = TASKS[task].validation
    expected = {key + suffix for key in KEYS[task] for suffix in suffixes}
    assert set(found["metrics"]) == expected | {"score"}
    assert found["protocol"] == "GLUE validation set, 1 steps" and found["seed"] == 2021
    assert found["sites"] == {f"bert.encoder.layer.{i}": ["attention_sum"] for i in range(2)}
    (line,) = lines(tmp_path / "run")
    assert line["step"] == 1 and line["loss"] > 0
    if task == "mnli":
        assert {"accuracy_matched", "accuracy_mismatched"} < set(found["metrics"])


@pytest.mark.parametrize(("backbone", "pos", "site"), [("albert", "4", "attention_sum"), ("bert", "8", "ffn_sum")])
def test_digits_print_the_site_of_their_architecture(
    command: Any, tmp_path: Path, record: Any, capsys: Any, backbone: str, pos: str, site: str
) -> None:
    main(command(tmp_path / "run", "--pos", pos, "--scale", "0.1", "--max_train_steps", "1", backbone=backbone))
    printed = capsys.readouterr().out
    form = "x - s·A·x" if backbone == "albert" else "(1+s)·x - s·A·x"
    assert f"ContraNorm {form}, s=0.1, tau=1.0, padding left out" in printed and f": {site}" in printed
    assert set(sum(record(tmp_path / "run")["sites"].values(), [])) == {site}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("how", ["killed", "stopped"])
@pytest.mark.parametrize("bucket", [[], ["--group_by_length"]])
def test_resuming_in_mid_epoch_is_bit_identical(
    command: Any, tmp_path: Path, lines: Any, record: Any, monkeypatch: Any, how: str, bucket: list[str]
) -> None:
    """22 rows in batches of 4: 6 batches, 3 steps an epoch; the run is cut in its second epoch, and dropout is on."""
    more = [*SITE, *bucket, "--num_train_epochs", "3", "--gradient_accumulation_steps", "2", "--save_model"]
    model_folder = tmp_path / "with_dropout"
    model = AutoModelForSequenceClassification.from_pretrained(command(tmp_path)[1])
    model.config.update({"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "classifier_dropout": 0.1})
    model.save_pretrained(model_folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model_folder / name).write_bytes((Path(command(tmp_path)[1]) / name).read_bytes())
    more += ["--model_name_or_path", str(model_folder), "--checkpointing_steps", "1"]
    main(command(tmp_path / "whole", *more))

    with monkeypatch.context() as patch:
        checkpoint = Run.checkpoint

        def cut(self: Run, step: int, state: Any) -> None:
            checkpoint(self, step, state)
            if step == 4 and how == "stopped":
                os.kill(os.getpid(), signal.SIGTERM)
            if step == 5:
                raise RuntimeError("pulled the plug")

        patch.setattr(Run, "checkpoint", cut)
        with pytest.raises(Interrupted if how == "stopped" else RuntimeError):
            main(command(tmp_path / "cut", *more))
    assert not (tmp_path / "cut" / "record.json").exists()
    main(command(tmp_path / "cut", *more))

    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert record(tmp_path / "cut")["metrics"] == record(tmp_path / "whole")["metrics"]
    ours, theirs = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not (tmp_path / "cut" / "checkpoints").exists()


def test_a_finished_run_is_not_repeated(command: Any, tmp_path: Path, capsys: Any) -> None:
    arguments = command(tmp_path / "run", "--max_train_steps", "1")
    main(arguments)
    before = (tmp_path / "run" / "record.json").read_bytes()
    capsys.readouterr()
    main(arguments)
    assert "done" in capsys.readouterr().out
    assert (tmp_path / "run" / "record.json").read_bytes() == before


def test_same_seed_same_head_with_and_without_contranorm(command: Any, tmp_path: Path) -> None:
    """A comparison starts both models from the same weights: at s → 0 they stay together."""
    for name, more in {"vanilla": ["--pos", "0"], "faint": ["--pos", "7", "--scale", "1e-12"]}.items():
        main(command(tmp_path / name, *more, "--max_train_steps", "1", "--save_model"))
    ours, theirs = weights(tmp_path / "faint"), weights(tmp_path / "vanilla")
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=0)


def test_accumulated_gradients_equal_the_large_batch(command: Any, tmp_path: Path) -> None:
    """The epoch's last group is shorter (22 = 16 + 6 rows in batches of 2): it must be a mean over itself."""
    small = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "8"]
    main(command(tmp_path / "large", *SITE, "--per_device_train_batch_size", "16", "--save_model"))
    main(command(tmp_path / "small", *SITE, *small, "--save_model"))
    ours, theirs = weights(tmp_path / "small"), weights(tmp_path / "large")
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        (1, 4),
        (2, 2),
        (4, 1),
        (3, "--effective_batch 32 is not a multiple of --per_device_train_batch_size 8 x 3 processes: use another"),
        (8, "x 8 processes: give --per_device_train_batch_size 4, or a divisor of it"),
    ],
)
def test_the_effective_batch_is_kept_by_accumulation(processes: int, expected: int | str) -> None:
    config = Config(
        model_name_or_path="minilm", output_dir="out", task_name="rte",
        effective_batch=32, per_device_train_batch_size=8,
    )  # fmt: skip
    if isinstance(expected, int):
        assert config.accumulation(processes) == expected
    else:
        with pytest.raises(UserError, match=expected):
            config.accumulation(processes)


def test_an_effective_batch_that_does_not_divide_ends_in_one_line(command: Any, tmp_path: Path, capsys: Any) -> None:
    for more in (["--effective_batch", "6"], ["--effective_batch", "8", "--gradient_accumulation_steps", "2"]):
        with pytest.raises(SystemExit, match="2"):
            run_main(lambda more=more: main(command(tmp_path / "run", *more)))
        assert "--effective_batch" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def torchrun(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*launcher, "-m", "BERT_glue.main", *arguments],
        capture_output=True, text=True, timeout=200, env=environment,
    )  # fmt: skip


def test_two_processes_equal_one(command: Any, tmp_path: Path, record: Any, capsys: Any) -> None:
    """Judged by the files: gloo sometimes aborts at exit, after everything was written."""
    common = [*SITE, "--max_train_steps", "1", "--save_model", "--do_predict", "--effective_batch", "8"]
    main(command(tmp_path / "one", *common))
    assert "batch: 4 x 2 x 1 processes = 8; 1 steps" in capsys.readouterr().out
    result = torchrun(command(tmp_path / "two", *common))
    assert (tmp_path / "two" / "record.json").exists(), result.stderr[-2000:]
    assert "batch: 4 x 1 x 2 processes = 8; 1 steps" in result.stdout
    one, two = record(tmp_path / "one"), record(tmp_path / "two")
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["metrics"] == two["metrics"]
    predicted = [(tmp_path / name / "predictions" / "RTE.tsv").read_text() for name in ("one", "two")]
    assert predicted[0] == predicted[1] and len(predicted[0].splitlines()) == 10
    ours, theirs = weights(tmp_path / "two"), weights(tmp_path / "one")
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=0)


def test_evaluation_keeps_no_graph_and_counts_each_row_once(
    command: Any, tmp_path: Path, record: Any, monkeypatch: Any
) -> None:
    seen = []
    predict = training.predict

    def watch(*arguments: Any) -> Any:
        found = predict(*arguments)
        assert torch.is_grad_enabled() and not found[0].requires_grad
        seen.append(tuple(tensor.shape for tensor in found))
        return found

    monkeypatch.setattr(training, "predict", watch)
    # 11 rows in batches of 10 and 5: the last batch has one row
    main(command(tmp_path / "run", "--max_train_steps", "1", "--per_device_eval_batch_size", "10", task="stsb"))
    main(command(tmp_path / "again", "--max_train_steps", "1", "--per_device_eval_batch_size", "5", task="stsb"))
    assert seen == [(torch.Size([11]), torch.Size([11]))] * 2
    first, second = record(tmp_path / "run")["metrics"], record(tmp_path / "again")["metrics"]
    assert first == pytest.approx(second, abs=1e-5)


def test_saved_model_loads_in_a_fresh_process(command: Any, tmp_path: Path) -> None:
    main(command(tmp_path / "run", *SITE, "--max_train_steps", "1", "--save_model"))
    folder = tmp_path / "run" / "model"
    here = AutoModelForSequenceClassification.from_pretrained(folder)
    code = (
        "import sys, torch, BERT_glue\n"
        "from transformers import AutoModelForSequenceClassification as A, AutoTokenizer\n"
        "m = A.from_pretrained(sys.argv[1]); t = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "print(type(m).__name__, BERT_glue.active_sites(m), len(t), m(torch.arange(9)[None]).logits.tolist(), sep='|')"
    )
    result = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    name, sites, size, logits = result.stdout.strip().split("|")
    assert name == type(here).__name__ == "ContraNormBertForSequenceClassification"
    assert sites == str(bg.active_sites(here)) and int(size) > 20
    assert logits == str(here(torch.arange(9)[None]).logits.tolist())


def test_mixed_precision_stays_close(command: Any, tmp_path: Path, lines: Any) -> None:
    for precision in ("no", "bf16"):
        main(command(tmp_path / precision, *SITE, "--mixed_precision", precision))
    (full,), (half,) = lines(tmp_path / "no"), lines(tmp_path / "bf16")
    assert full["loss"] != half["loss"]
    assert half["loss"] == pytest.approx(full["loss"], abs=0.05)


def test_trackers_get_the_curve(command: Any, tmp_path: Path, monkeypatch: Any) -> None:
    from accelerate.tracking import GeneralTracker, on_main_process
    from accelerate.utils import LoggerType

    logged: list[tuple[int, dict[str, Any]]] = []

    class Notebook(GeneralTracker):
        name = "tensorboard"
        requires_logging_directory = True
        main_process_only = False
        tracker = None

        def __init__(self, run_name: str, logging_dir: str, **kwargs: Any) -> None:
            super().__init__()

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            assert values["task_name"] == "rte"

        @on_main_process
        def log(self, values: dict[str, Any], step: int, **kwargs: Any) -> None:
            logged.append((step, values))

    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.TENSORBOARD])
    monkeypatch.setattr("accelerate.tracking.LOGGER_TYPE_TO_CLASS", {"tensorboard": Notebook})
    monkeypatch.setattr("accelerate.accelerator.LOGGER_TYPE_TO_CLASS", {"tensorboard": Notebook})
    main(command(tmp_path / "run", "--report_to", "tensorboard", "--max_train_steps", "2"))
    assert [step for step, _ in logged] == [2] and "accuracy" in logged[0][1]


@pytest.mark.parametrize("backbone", ["bert", "albert"])
@pytest.mark.parametrize("site", [SITE, []])
def test_probe_records_collapse_by_layer(
    command: Any, tmp_path: Path, record: Any, glue_root: Path, backbone: str, site: list[str]
) -> None:
    """Against transformers' own hidden states and maps of the saved model, sentence by sentence without padding."""
    arguments = command(tmp_path / "run", *site, "--max_train_steps", "2", "--save_model", "--probe", backbone=backbone)
    main(arguments)
    written = record(tmp_path / "run")
    collapse = written["collapse"]
    assert collapse.pop("layer") == [1, 2]
    assert written["collapse_untrained"]["layer"] == [1, 2] and written["spectrum_untrained"] != written["spectrum"]
    folder = tmp_path / "run" / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = pd.read_parquet(glue_root / "glue/rte/validation-00000-of-00001.parquet")
    expected: dict[str, list[list[float]]] = {name: [[], []] for name in collapse}
    spectrum = torch.zeros(len(written["spectrum"]))
    for row in rows.itertuples():
        inputs = tokenizer(row.sentence1, row.sentence2, return_tensors="pt")
        with torch.no_grad():
            output = model(**inputs, output_hidden_states=True, output_attentions=True)
        sigma = torch.linalg.svdvals(output.hidden_states[-1][0])
        spectrum[: len(sigma)] += sigma / sigma.sum() / len(rows)
        for layer in (0, 1):
            for name, metric in METRICS.items():
                expected[name][layer].append(metric(output.hidden_states[layer + 1]))
            expected["attention_similarity"][layer].append(attention_similarity(output.attentions[layer]))
    for name, by_layer in expected.items():
        assert collapse[name] == pytest.approx([fmean(values) for values in by_layer], rel=1e-4), name
    assert set(collapse) == {"mean_cosine", "effective_rank", "variance", "attention_similarity"}
    assert written["spectrum"] == pytest.approx(spectrum.tolist(), rel=1e-3, abs=1e-6)
    main([*arguments[:-1], "--output_dir", str(tmp_path / "plain")])
    assert "collapse" not in record(tmp_path / "plain")
    assert record(tmp_path / "plain")["metrics"] == record(tmp_path / "run")["metrics"]


def test_the_progress_bar_shows_the_loss(command: Any, tmp_path: Path, lines: Any, capsys: Any) -> None:
    main(command(tmp_path / "run", "--max_train_steps", "2"))
    (line,) = lines(tmp_path / "run")
    assert f"loss {line['loss']:.4f}: 100%" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_resume_as_if_undisturbed(command: Any, tmp_path: Path, lines: Any) -> None:
    """SIGTERM to torchrun in the middle: both save at the same step and leave, re-running resumes."""
    more = [*SITE, "--num_train_epochs", "30", "--checkpointing_steps", "1"]
    torchrun(command(tmp_path / "whole", *more))
    arguments = command(tmp_path / "cut", *more)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [*launcher, "-m", "BERT_glue.main", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 200
    while not list((tmp_path / "cut" / "checkpoints").glob("step-*4")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    output, _ = process.communicate(timeout=100)
    assert not (tmp_path / "cut" / "record.json").exists(), output.decode()[-2000:]
    torchrun(arguments)
    assert (tmp_path / "cut" / "record.json").exists()
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_another_number_of_processes_is_refused(command: Any, tmp_path: Path, monkeypatch: Any) -> None:
    state = training.checkpoint_state
    monkeypatch.setattr(training, "checkpoint_state", lambda *a: state(*a) | {"processes": [{}, {}]})
    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", lambda *a, **k: sys.exit(9))
        with pytest.raises(SystemExit):
            main(command(tmp_path / "run", "--max_train_steps", "1"))
    with pytest.raises(UserError, match="was started with 2 processes, this is 1"):
        main(command(tmp_path / "run", "--max_train_steps", "1"))


def test_held_out_training_examples_take_the_place_of_the_validation_set(
    command: Any, tmp_path: Path, record: Any, glue_root: Path
) -> None:
    root = tmp_path / "data"
    (root / "glue" / "mnli").mkdir(parents=True)  # with no validation set at all
    shutil.copy(glue_root / "glue/mnli/train-00000-of-00001.parquet", root / "glue/mnli")
    more = ["--hold_out", "0.25", "--data_root", str(root)]
    main(command(tmp_path / "run", *more, task="mnli"))
    found = record(tmp_path / "run")
    assert found["protocol"] == "held-out 0.25 of GLUE train" and found["config"]["hold_out"] == 0.25
    assert set(found["metrics"]) == {"accuracy", "score"}
    accuracy = 6 * found["metrics"]["accuracy"]  # 6 of 22
    assert accuracy == pytest.approx(round(accuracy))
    parts = [load_splits(parse(command(tmp_path / "run", *more, "--seed", seed, task="mnli"))) for seed in ("1", "2")]
    held = [set(part.validation[""]["idx"]) for part in parts]
    assert held[0] == held[1] and len(held[0]) == 6 and held[0] | set(parts[0].train["idx"]) == set(range(22))


def test_a_diverged_run_leaves_no_record(command: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the loss is nan in epoch 1: try a lower --learning_rate"):
        main(command(tmp_path / "run", "--learning_rate", "1e38"))
    assert not (tmp_path / "run" / "record.json").exists()


@pytest.mark.parametrize("more", [["--num_train_epochs", "0"], ["--hold_out", "0"]])
def test_a_part_that_cannot_be_held_out_is_refused(more: list[str], command: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--hold_out"):
        main(command(tmp_path / "run", "--hold_out", "0.1", *more))


def test_the_tuning_space_prints_lines_that_parse(capsys: Any) -> None:
    space = Path(__file__).parents[2] / "BERT_glue/configs/tuning.yaml"
    more = ["--flags=--model_name_or_path bert-base-uncased"]
    tune.main(["--space", str(space), "--data", "rte", "stsb", "--depths", "12", "--trials", "2", *more])
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    configs = [parse([*line[3:], "--output_dir", "x"]) for line in lines]
    assert all(line[:3] == ["python", "-m", "BERT_glue.main"] for line in lines)
    assert all((c.model, c.num_hidden_layers, c.hold_out) == ("bert-base-uncased", 12, 0.1) for c in configs)
    final = [parse([*line[3:], "--tuning_trials", "2", "--output_dir", "x"]) for line in lines if "rte" in line]
    labels = [c.label() for c in final]
    assert [*dict.fromkeys(label.family or label.method.split(" ")[0] for label in labels)] == [
        "vanilla", "AttnScale", "GFSA", "NeuTRENO", "ResFormer", "ContraNorm"
    ]  # fmt: skip
