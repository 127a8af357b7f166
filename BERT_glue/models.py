"""From a model's name and the settings to a model that provably carries ContraNorm where it was asked for."""

from __future__ import annotations

import re
from dataclasses import fields

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import BERT_glue.modeling_albert
import BERT_glue.modeling_bert  # noqa: F401 - registered with the Auto classes
from BERT_glue.attention import describe_variant
from BERT_glue.config import Config
from BERT_glue.configuration import CONFIGS, with_contranorm, without_contranorm
from BERT_glue.data import reason
from BERT_glue.sites import active_sites
from BERT_glue.tasks import Task
from contranorm.checkpoints import checkpoint_of
from contranorm.variants import VariantOptions
from repro.errors import UserError

# A checkpoint may lack the head, a learnable step and a variant's parameter, which fine-tuning trains from scratch.
UNTRAINED = re.compile(r"^classifier\.|^(al)?bert\.pooler\.|\.sites\.\w+\.step$|\.attention\.(self\.)?(lamb|w_k)$")


def load_backbone(config: Config, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model with ContraNorm at the sites asked for (none: transformers' own class), and its tokenizer.

    Raises:
        UserError: no such checkpoint, another architecture, weights or settings that do not fit.
    """
    flag = f"--model_name_or_path {config.model_name_or_path}"
    try:
        name = checkpoint_of(config.model_name_or_path)
    except ValueError as error:
        raise UserError(f"--model_name_or_path {error}") from error
    try:
        vanilla = AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UserError(f"{flag}: {reason(error)}") from error
    architecture = vanilla.model_type.removeprefix("contranorm_")
    if architecture not in CONFIGS:
        raise UserError(f"{flag}: model type {architecture!r}, ContraNorm is built into {' or '.join(CONFIGS)}")
    _check_fit(vanilla, tokenizer, config, task)

    config.architecture = architecture
    sites = config.sites_in(architecture)
    if getattr(vanilla, "sites", None) and config.pos is None and config.sites is None:
        trained = ",".join(vanilla.sites)
        raise UserError(
            f"{name} was trained with ContraNorm at {trained}: add --sites {trained}, or --pos 0 to drop it"
        )
    if (trained := getattr(vanilla, "variant", None)) and config.variant is None:
        raise UserError(f"{name} was trained with --variant {trained}: add it")
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name,
            config=_configure(vanilla, config, task, sites),
            attn_implementation=config.attn_implementation,
            dtype=torch.float32,  # whatever the file's: --mixed_precision is about products, not weights
            use_safetensors=True,  # never a pickle
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{flag}: weights not loaded: {reason(error)}") from error
    if missing := sorted(key for key in info["missing_keys"] if not UNTRAINED.search(key)):
        raise UserError(f"{flag}: the checkpoint has no weights for {missing[0]} and others")
    if any(key.startswith("classifier.") for key in info["missing_keys"]):
        if config.num_train_epochs == 0:
            raise UserError(f"{flag}: no trained classifier there, and --num_train_epochs 0 trains none")
    else:
        _align_head(model, vanilla, task, config)
    check_sites(model, sites)
    return model, tokenizer


def _configure(vanilla: PretrainedConfig, config: Config, task: Task, sites: list[str]) -> PretrainedConfig:
    labels = task.labels or ("score",)
    changes = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
        "problem_type": None if task.labels else "regression",
        "text_columns": list(task.sentences),  # for BERT_glue.predict
    }
    changes |= {"num_hidden_layers": config.num_hidden_layers or vanilla.num_hidden_layers, "sites": sites}
    if sites:
        switches = {name: value for name, value in config.switches().items() if value is not None}
        changes |= {"scale": config.scale, "include_padding": config.include_padding, **switches}
    changes |= {f.name: getattr(config, f.name) for f in fields(VariantOptions)}
    try:
        built = with_contranorm(vanilla, **changes)
    except (ValueError, StrictDataclassError) as error:
        raise UserError(f"these settings do not go together: {reason(error)}") from error
    return built if sites or config.variant else without_contranorm(built)


def _align_head(model: PreTrainedModel, trained: PretrainedConfig, task: Task, config: Config) -> None:
    """Put the rows of a trained head in the order of the task's labels, which it may have learned in another."""
    there = {str(name).lower(): number for number, name in trained.id2label.items()}
    wanted = [name.lower() for name in task.labels]
    if not wanted or all(re.fullmatch(r"label_\d+", name) for name in there):  # names that say nothing
        return
    if set(there) == set(wanted):
        order = [there[name] for name in wanted]
        for parameter in model.classifier.parameters():
            parameter.data = parameter.data[order]
    elif config.num_train_epochs == 0:
        raise UserError(
            f"{config.model_name_or_path}: its classifier knows {', '.join(there)}, the data has {', '.join(wanted)}"
        )


def _check_fit(vanilla: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, config: Config, task: Task) -> None:
    """Refuse what would otherwise end in an index error, or in a head of the wrong size."""
    name = config.model_name_or_path
    if (config.max_length or 0) > (limit := vanilla.max_position_embeddings):
        raise UserError(f"--max_length {config.max_length}: {name} has {limit} positions")
    special = tokenizer.num_special_tokens_to_add(pair=len(task.sentences) == 2)
    if config.max_length is not None and config.max_length <= special:
        raise UserError(f"--max_length {config.max_length}: {special} are special tokens, none is left for text")
    if len(tokenizer) > vanilla.vocab_size:
        raise UserError(f"{name}: the tokenizer has {len(tokenizer)} tokens, the model {vanilla.vocab_size}")
    wanted = len(task.labels) or 1
    classifier = any(a.endswith("ForSequenceClassification") for a in vanilla.architectures or ())
    if classifier and vanilla.num_labels != wanted:
        raise UserError(f"{name}: its classifier has {vanilla.num_labels} labels, the task has {wanted}")
    depth, there = config.num_hidden_layers or 0, vanilla.num_hidden_layers
    if "albert" not in vanilla.model_type and depth > there:
        raise UserError(f"--num_hidden_layers {depth}: {name} has weights for {there} layers")


def check_sites(model: PreTrainedModel, sites: list[str]) -> None:
    """Refuse a model whose layers do not carry ContraNorm at exactly these sites."""
    found = active_sites(model)
    layers = [n for n, m in model.named_modules() if type(m).__name__.endswith(("BertLayer", "AlbertLayer"))]
    wrong = [layer for layer in layers if found.get(layer, []) != sites]
    if wrong or set(found) - set(layers) or not layers:
        there = found.get(wrong[0], []) if wrong else sorted(found)
        raise UserError(f"asked for sites {sites}, but {wrong[0] if wrong else 'the model'} carries {there}")


def describe(model: PreTrainedModel) -> str:
    """Which layers carry ContraNorm, where, and in which form, and the variant; one line per layer."""
    found, c = active_sites(model), model.config
    variant = describe_variant(c)
    if not found:
        return f"{type(model).__name__}: no ContraNorm in any layer ({variant or 'vanilla'})"
    x = "x̂" if c.pre_norm else "x"
    step = f"s·{x}·softmax(x̂ᵀx̂/τ)" if c.axis == "features" else f"s·A·{x}"
    own = f"s·{x}" if c.scaled_identity else f"(1+s)·{x}" if c.identity else x
    form = f"{own} - {step}"
    more = ["padding takes part" if c.include_padding else "padding left out"]
    more += [name for name in ("symmetric", "learnable", "positive") if getattr(c, name)]
    lines = [f"{type(model).__name__}: ContraNorm {form}, s={c.scale}, tau={c.tau}, {', '.join(more)}"]
    lines += [f"  {variant}"] if variant else []
    shared = "  (shared by all depths)" if "albert" in c.model_type else ""
    return "\n".join(lines + [f"  {layer}: {', '.join(sites)}{shared}" for layer, sites in found.items()])
