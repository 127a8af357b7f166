"""Predictions: for texts on the command line, and in the form that the GLUE server takes.

Example:
    ```
    python -m BERT_glue.predict --model out/rte/model --text "A cat sat on the mat." --text "An animal sat."
    ```
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from BERT_glue.tasks import Task
from repro.errors import UserError, run_main
from repro.files import write_atomic

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 64


def as_predictions(logits: Tensor, task: Task) -> Tensor:
    """Class numbers (B,) from logits (B, classes), or scores (B,) from (B, 1) for regression."""
    return logits.argmax(dim=-1) if task.labels else logits[:, 0].float()


def tsv(predictions: Tensor, task: Task, file: str) -> str:
    """One file: the server wants label names for entailment tasks, else numbers, scores from 0 to 5 for STS-B.

    For own data, classes are written by name.
    """
    lines = ["index\tprediction"]
    for index, value in enumerate(predictions.tolist()):
        if not task.labels:
            value = f"{min(max(value, 0.0), 5.0):.3f}" if file == "STS-B" else f"{value:.6g}"
        elif task.server_names or not task.server_files:
            value = task.labels[value]
        lines.append(f"{index}\t{value}")
    return "\n".join(lines) + "\n"


def write_predictions(folder: Path, predictions: dict[str, Tensor], task: Task) -> None:
    """Write one TSV per test set; `predictions` are by file name without .tsv, (rows,) each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in predictions.items():
        write_atomic(folder / f"{name}.tsv", tsv(values, task, name).encode())


# -- on the command line -----------------------------------------------------------------------------------------------


def rows_of(texts: list[str], columns: int | None) -> list[list[str]]:
    """One list of texts per prediction, those of a pair separated by a tab.

    Raises:
        UserError: another number of texts than the model was trained on (None: not known).
    """
    rows = [text.split("\t") for text in texts]
    columns = columns or len(rows[0])
    for row in rows:
        if len(row) != columns or columns > 2:
            wanted = "one text" if columns == 1 else "two texts (separated by a tab, or two --text)"
            raise UserError(f"the model takes {wanted}, got {len(row)}: {' | '.join(row)[:100]}")
    return rows


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The classifier in a folder, which may be the run's, and its tokenizer; on the GPU if there is one.

    Raises:
        UserError: no such folder, or no trained classifier in it.
    """
    import torch
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    import BERT_glue.models  # noqa: F401 - registered with the Auto classes
    from BERT_glue.data import reason

    folder = Path(name) / "model" if (Path(name) / "model").is_dir() else Path(name)
    if not folder.is_dir():
        raise UserError(f"--model {name}: no such folder")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"--model {folder}: {reason(error)}") from error
    if info["missing_keys"]:
        raise UserError(f"--model {folder}: no trained classifier there; fine-tune with --save_model first")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.eval().to(device), tokenizer


def table(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[list[str]]) -> list[list[str]]:
    """A header, then label, probability of each label (or the score of a regression) and texts of each row."""
    import torch

    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    scores = model.config.num_labels == 1
    columns = getattr(model.config, "text_columns", None) or [f"text{number + 1}" for number in range(len(rows[0]))]
    lines = [[*(["score"] if scores else ["label", *names]), *columns]]
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        inputs = tokenizer(*map(list, zip(*part, strict=True)), truncation=True, padding=True, return_tensors="pt")
        with torch.inference_mode():
            logits = model(**inputs.to(model.device)).logits.float().cpu()  # (B, labels)
        for row, values in zip(part, logits if scores else logits.softmax(-1), strict=True):
            label = [] if scores else [names[values.argmax()]]
            lines.append([*label, *(f"{value:.4f}" for value in values.tolist()), *row])
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Print label, probabilities and text, separated by tabs, for texts or for each line of a file."""
    description = (main.__doc__ or "") + " Pairs are separated by a tab, or given as two --text."
    parser = argparse.ArgumentParser(prog="python -m BERT_glue.predict", description=description)
    parser.add_argument("--model", required=True, help="the folder of a run with --save_model, or of any classifier")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--text", action="append", help="the text; several times for several, or for a pair")
    given.add_argument("--file", help="a file with a text (or a pair) on each line")
    arguments = parser.parse_args(argv)
    texts = arguments.text
    if arguments.file:
        try:
            texts = Path(arguments.file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--file {arguments.file}: {error}") from error
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UserError("no text given")
    model, tokenizer = load(arguments.model)
    columns = getattr(model.config, "text_columns", None)
    if not arguments.file and columns and len(columns) == len(texts) == 2 and not any("\t" in text for text in texts):
        texts = ["\t".join(texts)]  # a pair as two --text
    for line in table(model, tokenizer, rows_of(texts, columns and len(columns))):
        print("\t".join(line))


if __name__ == "__main__":
    run_main(main)
