"""GLUE's tasks: columns, labels, splits, and what the benchmark's server wants."""

from __future__ import annotations

from dataclasses import dataclass, field

YES_NO = ("entailment", "not_entailment")
THREE_WAY = ("entailment", "neutral", "contradiction")


@dataclass(frozen=True)
class Task:
    """One task: its columns of text, its labels (none: regression), its files for the GLUE server."""

    sentences: tuple[str, ...]
    labels: tuple[str, ...]
    server_files: dict[str, str] = field(default_factory=dict)
    """Test split → name of the TSV file."""
    server_names: bool = False
    """The server wants label names in place of numbers."""
    validation: dict[str, str] = field(default_factory=lambda: {"": "validation"})
    """Suffix of the metrics → split."""


def _task(sentences: str, labels: tuple[str, ...], file: str, names: bool = False) -> Task:
    return Task(tuple(sentences.split()), labels, {"test": file}, names)


TASKS = {
    "cola": _task("sentence", ("unacceptable", "acceptable"), "CoLA"),
    "mnli": Task(
        ("premise", "hypothesis"),
        THREE_WAY,
        {"test_matched": "MNLI-m", "test_mismatched": "MNLI-mm"},
        server_names=True,
        validation={"_matched": "validation_matched", "_mismatched": "validation_mismatched"},
    ),
    "mrpc": _task("sentence1 sentence2", ("not_equivalent", "equivalent"), "MRPC"),
    "qnli": _task("question sentence", YES_NO, "QNLI", names=True),
    "qqp": _task("question1 question2", ("not_duplicate", "duplicate"), "QQP"),
    "rte": _task("sentence1 sentence2", YES_NO, "RTE", names=True),
    "sst2": _task("sentence", ("negative", "positive"), "SST-2"),
    "stsb": _task("sentence1 sentence2", (), "STS-B"),
    "wnli": _task("sentence1 sentence2", ("not_entailment", "entailment"), "WNLI"),
}
