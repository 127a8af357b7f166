"""Settings of one fine-tuning run, and the table of settings per task that `--config` may name."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from BERT_glue.sites import DIGITS, SITES
from BERT_glue.tasks import TASKS
from contranorm.options import ContraNormOptions
from contranorm.variants import VariantOptions
from repro.config import CellLabel, RunConfig, load_yaml, parse_config
from repro.errors import UserError
from repro.holdout import check_hold_out

PROG = "python -m BERT_glue.main"
PAPERS_SITE = "attention_sum"


@dataclass(kw_only=True)
class Config(ContraNormOptions, VariantOptions, RunConfig):
    """Fine-tune BERT or ALBERT, with ContraNorm at a site of every layer or without, on a GLUE task or own files."""

    EXECUTION_FIELDS = (
        *RunConfig.EXECUTION_FIELDS, "implementation", "per_device_eval_batch_size", "checkpointing_steps",
        "do_predict", "save_model", "compact_embeddings", "fused_optimizer", "preprocessing_num_workers",
        "probe",
    )  # fmt: skip

    model_name_or_path: str
    """A folder, a name on the Hugging Face Hub (bert-base-uncased, albert-base-v2), or `minilm`, a 6-layer BERT that
    comes as a package."""
    task_name: str | None = None
    """cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb or wnli; none with --train_file."""
    train_file: str | None = None
    """Own training data, .csv or .json, instead of --task_name: a column `label`, one or two columns of text."""
    validation_file: str | None = None
    """Own validation data, in the columns of --train_file."""
    test_file: str | None = None
    """Own data to predict with --do_predict; its labels, if any, are not read."""
    pos: int | str | None = None
    """The site as the released code's digit of BERT (the paper's: 7) or ALBERT, or several (37, or 3,7); 0 or nothing
    is the vanilla model."""
    sites: str | None = None
    """The sites by name, separated by commas, in place of --pos: layer_input, attention_context, attention_output,
    attention_sum, attention_norm, ffn_output, ffn_sum, ffn_norm."""
    variant: Literal["none", "attn_scale", "gfsa", "neutreno", "resformer"] | None = None
    """Another remedy against oversmoothing, with --pos 0 or beside ContraNorm; unset or none is neither. Padding is
    left out of its attention and its means."""
    include_padding: bool = False
    """Let padding tokens take part in A, as in the released code; logits then depend on a batch's padding."""
    hold_out: float | None = None
    """Share of a task's training set, the same for every seed, that is not trained on and evaluated in place of the
    validation set, which tables report: to choose settings by (repro.tune). Unset: none."""
    num_hidden_layers: int | None = None
    """Use fewer layers than the checkpoint has (ALBERT, which shares its layers: also more)."""
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    """Attention backend; eager is the one that can return attention maps."""
    max_length: int | None = None
    """Longest input in tokens, longer ones are cut; by default the paper's 128, or all positions of a model."""
    pad_to_max_length: bool = False
    """Pad every input to --max_length in place of the longest of its batch: slower, all shapes equal."""
    per_device_train_batch_size: int = 32
    """Training examples per process and forward pass; the paper's value."""
    per_device_eval_batch_size: int = 64
    """Evaluation examples per process and forward pass; changes no metric."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step."""
    effective_batch: int | None = None
    """Training examples per optimizer step, whatever the number of processes: --gradient_accumulation_steps follows
    from it. A multiple of per_device_train_batch_size x processes; the tables in configs/ say the paper's 32."""
    learning_rate: float = 2e-5
    """Peak learning rate of AdamW; the paper's value."""
    weight_decay: float = 0.0
    """Weight decay of all but biases and LayerNorm weights; the paper uses none."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after warm-up; the paper's is linear."""
    num_warmup_steps: int = 0
    """Optimizer steps of linear warm-up; the paper has none."""
    num_train_epochs: int = 5
    """Passes over the training set; the paper's value. 0 evaluates (and predicts) only."""
    max_train_steps: int | None = None
    """Stop after so many optimizer steps; the schedule ends there too."""
    seed: int = 2021
    """Seed of the head's weights, the order of examples and dropout; the released code's value."""
    checkpointing_steps: int | None = None
    """Optimizer steps between checkpoints; by default one at the end of every epoch."""
    do_predict: bool = False
    """Predict the test set and write predictions/<TASK>.tsv, in the form the GLUE server takes."""
    save_model: bool = False
    """Keep the final model and tokenizer in <output_dir>/model."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16 runs products in bfloat16 on CPUs and GPUs that have it; off by default, as in the paper."""
    group_by_length: bool = False
    """Batch examples of similar length: less padding, another order within an epoch (each example still once)."""
    compact_embeddings: bool | None = None
    """Train and optimize only the rows of the word embedding that occur in the run's texts: the same training. By
    default on where --weight_decay is 0, since weight decay would shrink the other rows too."""
    skip_unread_tokens: bool | None = None
    """Run the feed-forward of the last block on the first token alone, which is all that the head reads: the same
    training but for the draws of dropout. By default on where it can be: not in ALBERT, nor with a site behind it."""
    cheap_dropout: bool | None = None
    """Draw dropout from 16 random bits per element: other draws of the same distribution, at a rate rounded to 1/65536
    and with kept values scaled by the exact share. By default on where training runs on a CPU; a GPU's own dropout is
    fused already, and stays."""
    fused_optimizer: bool = True
    """One kernel for the whole step of AdamW; equal within rounding."""
    preprocessing_num_workers: int = 1
    """Processes that tokenize; the result is cached and reused either way."""
    probe: bool = False
    """Before and after training, record collapse metrics of every layer and the last one's singular spectrum, on the
    first 64 validation examples, padding left out."""

    def __post_init__(self) -> None:
        positive = ["max_length", "per_device_train_batch_size", "per_device_eval_batch_size", "learning_rate"]
        positive += ["gradient_accumulation_steps", "max_train_steps", "checkpointing_steps", "num_hidden_layers"]
        positive += ["effective_batch"]
        for name in (*positive, "preprocessing_num_workers"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"--{name} must be > 0, got {value}")
        for name in ("weight_decay", "num_warmup_steps", "num_train_epochs", "seed"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"--{name} must be >= 0, got {getattr(self, name)}")
        if self.effective_batch is not None and self.gradient_accumulation_steps != 1:
            raise ValueError("--gradient_accumulation_steps follows from --effective_batch: leave one of them out")
        if self.compact_embeddings is None:
            self.compact_embeddings = self.weight_decay == 0
        elif self.compact_embeddings and self.weight_decay > 0:
            decay = f"--weight_decay {self.weight_decay} shrinks them"
            raise ValueError(f"--compact_embeddings leaves the rows of unused words as they are, {decay}: drop one")
        if self.scale is not None and not self.scale > 0:
            raise ValueError(f"--scale must be > 0, got {self.scale} (for the vanilla model give --pos 0)")
        self.check_switches()
        self.check_variant()
        check_hold_out(self.hold_out)
        if self.hold_out is not None and (self.task_name is None or self.num_train_epochs == 0):
            raise ValueError("--hold_out takes a part of a --task_name's training set, and trains on the rest")
        if self.task_name is not None:
            self.task_name = self.task_name.lower()
            if self.task_name not in TASKS:
                raise ValueError(f"unknown --task_name {self.task_name!r}; the tasks are {', '.join(TASKS)}")
            if self.train_file or self.validation_file or self.test_file:
                raise ValueError("give either --task_name or own files (--train_file, --validation_file), not both")
        elif not self.validation_file or (not self.train_file and self.num_train_epochs > 0):
            raise ValueError("give --task_name, or --train_file and --validation_file")
        elif self.do_predict and not self.test_file:
            raise ValueError("--do_predict with own files needs --test_file")
        if self.pos is not None and self.sites is not None:
            raise ValueError(f"give either --pos or --sites, not both (got {self.pos} and {self.sites})")
        unknown = [name for name in self.site_names or () if name not in SITES]
        if unknown:
            raise ValueError(f"unknown site {unknown[0]!r} in --sites; the sites are {', '.join(SITES)}")
        if not (self.pos or self.site_names):
            if given := self.changed_switches() + ["include_padding"] * self.include_padding:
                raise ValueError(f"--{given[0]} has no effect on the vanilla model: leave it out, or name a site")
        elif self.scale is None:
            raise ValueError("--scale is needed with a site: there is no default (the paper tries 0.005 …)")
        # What gives the digit of --pos its meaning: read off the name until the checkpoint itself is loaded.
        self.architecture = "albert" if "albert" in self.model.lower() else "bert"

    @property
    def model(self) -> str:
        """The checkpoint's name, without its folder."""
        return Path(self.model_name_or_path).name

    @property
    def task(self) -> str:
        """The task's name, or that of the own validation file."""
        return self.task_name or Path(str(self.validation_file)).stem

    def accumulation(self, processes: int) -> int:
        """Forward passes per optimizer step with so many processes; a UserError where they cannot make up the batch."""
        if self.effective_batch is None:
            return self.gradient_accumulation_steps
        share = self.effective_batch // processes
        if self.effective_batch % (self.per_device_train_batch_size * processes):
            fits = f"give --per_device_train_batch_size {share}, or a divisor of it"
            raise UserError(
                f"--effective_batch {self.effective_batch} is not a multiple of --per_device_train_batch_size "
                f"{self.per_device_train_batch_size} x {processes} processes: "
                + (fits if self.effective_batch % processes == 0 else "use another number of processes")
            )
        return share // self.per_device_train_batch_size

    @property
    def site_names(self) -> list[str]:
        """The names in `sites`."""
        return [name.strip() for name in (self.sites or "").split(",") if name.strip()]

    @property
    def protocol(self) -> str:
        """How the numbers are measured; runs cut short or on own files never share a table's cell with full ones."""
        where = "GLUE validation set" if self.task_name else f"own validation file {self.validation_file}"
        where = where if self.hold_out is None else f"held-out {self.hold_out:g} of GLUE train"
        return where if self.max_train_steps is None else f"{where}, {self.max_train_steps} steps"

    def sites_in(self, architecture: str) -> list[str]:
        """The sites asked for, by name; the architecture, "bert" or "albert", gives the digit of --pos its meaning."""
        if not self.pos:
            return self.site_names
        digits = {str(digit): name for digit, name in DIGITS[architecture].items()}
        asked = str(self.pos).replace(",", "")
        if not asked or not set(asked) <= set(digits):
            choices = ", ".join(f"{digit} {name}" for digit, name in digits.items())
            raise UserError(f"--pos {self.pos}: {architecture} has no such site; the digits are 0 none, {choices}")
        return [digits[digit] for digit in asked]

    def label(self) -> CellLabel:
        """The cell of a table that this run belongs to."""
        sites = sorted(self.sites_in(self.architecture), key=list(SITES).index)
        where = "" if sites == [PAPERS_SITE] else f" at {'+'.join(sites)}"
        where += " (padding in)" * self.include_padding
        place = (self.scale or 0, *(list(SITES).index(site) for site in sites), *[1] * self.include_padding)
        method, order = self.method(self.step_name() + where if sites else "", *place)
        note = self.variant_note()
        return CellLabel(
            self.task, self.model, method, order, self.num_hidden_layers, self.scale, self.family(method), note
        )


def parse(argv: Sequence[str]) -> Config:
    """Parse a command line; a --config file whose keys are tasks gives the chosen task's row as defaults."""
    look = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    look.add_argument("--config", action="append", default=[])
    for name in ("task_name", "pos", "sites"):
        look.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))
    flags = list(argv)
    with contextlib.suppress(argparse.ArgumentError):  # a flag without its value: the parser proper says so
        given, flags = look.parse_known_args(flags)
        flags += [f"--{name}={value}" for name, value in vars(given).items() if name != "config" and value is not None]
        for path in reversed(given.config):
            flags = _defaults_in(path, given) + flags
    return parse_config(Config, flags, prog=PROG, description=(Config.__doc__ or "").strip())


def _defaults_in(path: str, given: argparse.Namespace) -> list[str]:
    """A --config file as flags: --config itself, or the row of the chosen task where the file is a table of tasks."""
    table = load_yaml(Path(path))
    if not (isinstance(table, dict) and table and set(table) <= set(TASKS)):
        return ["--config", path]
    task = (given.task_name or "").lower()
    if task not in table:
        raise UserError(f"--config {path} is a table of tasks: choose one with --task_name ({', '.join(table)})")
    row, fields = table[task], {f.name for f in dataclasses.fields(Config)}
    if unknown := [key for key in row if key not in fields] if isinstance(row, dict) else [row]:
        raise UserError(f"--config {path}, task {task}: unknown key {unknown[0]!r}")
    replaced = set()
    if given.pos or given.sites:  # a site on the command line replaces the table's, however either is written
        replaced = {"pos", "sites"}
    if given.pos == "0":
        replaced |= {"include_padding", *(f.name for f in dataclasses.fields(ContraNormOptions))}
    row = {key: value for key, value in row.items() if key not in replaced}
    return [f"--{key}={value}" for key, value in row.items()]
