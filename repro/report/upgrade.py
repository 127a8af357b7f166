"""Records of schema 1 become schema 2; the one place that knows the flags of experiments as they once were.

Schema 2 added `cell`, `execution_fields` and one form of `collapse` (lists by metric, layers from 1). `upgrade` is
applied where records are read; files are never rewritten.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from repro.errors import UserError

SCHEMA = 2

_EXECUTION_FIELDS = [
    "output_dir", "data_root", "data_path", "report_to", "device", "implementation", "checkpoint_every", "eval_every",
    "probe", "num_workers", "preprocessing_num_workers", "cache", "channels_last", "compact_embeddings",
    "fused_optimizer",
]  # fmt: skip
_RENAMED = {"norm_scale": "scale", "temp": "tau", "dual_norm": "symmetric", "use_v2": "axis"}
# Switches that came later: a record without them was made by the form that they now default to.
_LATER_SWITCHES: dict[str, Any] = {
    "axis": "tokens",
    "scaled_identity": False,
    "symmetric": False,
    "pre_norm": False,
    "learnable": False,
    "positive": False,
    "degree": 2,
}
_LATER_OF: dict[str, dict[str, Any]] = {
    "gnn": _LATER_SWITCHES | {"nhead": 1, "fea_norm": True, "propagation": "random_walk"},
    "BERT_glue": _LATER_SWITCHES,
    "ViT_imagenet": _LATER_SWITCHES | {
        "bce_loss": False, "three_augment": False, "src": False, "effective_batch": None
    },
}  # fmt: skip
_NORMS = "None LN PN PN-SI PN-SCS BatchNorm DiffGroupNorm MeanSubtractionNorm GraphNorm MessageNorm CN".split()
_SITES = (
    "layer_input attention_context attention_output attention_sum attention_norm ffn_output ffn_sum ffn_norm".split()
)


def upgrade(record: dict[str, Any], where: str) -> dict[str, Any]:
    """The record in the current schema; the argument is left as it is. `where` it stands goes into the message.

    Raises:
        UserError: the record's schema is newer than this code, or no number.
    """
    schema = record.get("schema", 1)
    later = _LATER_OF.get(record["experiment"], {}) if "experiment" in record else {}
    if schema == SCHEMA:  # only settings may be missing, which came later
        return record | {"config": later | record["config"]} if later else record
    if schema != 1:
        raise UserError(f"{where}: record of schema {schema!r}, this version reads up to {SCHEMA}: update the checkout")
    config = {_RENAMED.get(name, name): value for name, value in record["config"].items()}
    if isinstance(config.get("axis"), bool):
        config["axis"] = "features" if config["axis"] else "tokens"
    cell_of = {"gnn": _gnn_cell, "BERT_glue": _bert_cell, "ViT_imagenet": _vit_cell}.get(record["experiment"])
    if cell_of:
        config = later | config
    replaced = {"schema", "experiment", "probe", "collapse"}
    replaced |= {"task", "model", "norm"} if record["experiment"] == "BERT_glue" else set()  # the cell says these
    new = {
        "schema": SCHEMA,
        "experiment": record["experiment"],
        "cell": cell_of(config, record) if cell_of else {},
        "execution_fields": _EXECUTION_FIELDS,
        **{name: value for name, value in record.items() if name not in replaced},
        "config": config,
    }
    collapse = record.get("collapse") or record.get("probe")
    if collapse:
        new["collapse"] = _by_metric(collapse)
    if "command" in record:
        new["command"] = _one_seed(record)
    return new


def _cell(data: Any, model: Any, method: str, order: list[Any], depth: Any, scale: Any) -> dict[str, Any]:
    return {"data": data, "model": model, "method": method, "order": order, "depth": depth, "scale": scale}


def _gnn_cell(config: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    mode, scale = str(config.get("norm_mode")), config.get("scale")
    config["identity"] = config.get("identity", True) if mode == "CN" else None  # once the only form
    eq6 = mode == "CN" and not config["identity"]
    method = {"None": "vanilla", "CN": "ContraNorm (Eq. 6)" if eq6 else "ContraNorm"}.get(mode, mode)
    if mode in ("PN", "PN-SI", "PN-SCS") and scale is None:
        scale = config["scale"] = 1.0
    if mode == "DiffGroupNorm":
        scale = config["scale"] = 0.01
        method = "DGN lambda=0.01"
    elif mode == "CN" or (scale is not None and scale != 1):
        method += f" s={scale:g}"
    if config.get("use_layer_norm"):
        method += " + LayerNorm"
    place = _NORMS.index(mode) if mode in _NORMS else len(_NORMS)
    order = [place, int(eq6), scale or 0, int(bool(config.get("use_layer_norm")))]
    return _cell(config.get("data"), config.get("model"), method, order, config.get("nlayer"), scale)


def _bert_cell(config: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    model = Path(str(config.get("model_name_or_path"))).name
    if config.get("identity") is None:  # unset: the form of the released code
        config["identity"] = "albert" not in model.lower()
    data = config.get("task_name") or Path(str(config.get("validation_file"))).stem
    depth = config.get("num_hidden_layers")
    sites = list(dict.fromkeys(site for layer in (record.get("sites") or {}).values() for site in layer))
    if not sites:
        return _cell(data, model, "vanilla", [0], depth, None)
    prefix = "D-" if config.get("axis") == "features" else ""
    padding = bool(config.get("include_padding"))
    place = "" if sites == ["attention_sum"] else f" at {'+'.join(sites)}"
    place += " (padding in)" * padding
    scale = float(config["scale"])
    order = [1, scale, _SITES.index(sites[0]), *[1] * padding]
    return _cell(data, model, f"{prefix}ContraNorm s={scale:g}{place}", order, depth, scale)


def _vit_cell(config: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    config.setdefault("identity", False)
    where = config.get("data_set"), config.get("model")
    depth, scale = config.get("depth"), config.get("scale")
    if config.get("last_norm") == "layer":
        config["last_norm"] = "vanilla"
    if config.get("norm") == "layer":
        config["norm"] = "vanilla"
        return _cell(*where, "vanilla", [0], depth, None)
    return _cell(*where, f"ContraNorm s={scale:g}", [1, scale], depth, scale)


def _by_metric(collapse: dict[str, list[Any]] | list[dict[str, Any]]) -> dict[str, list[Any]]:
    """From the graph runs' lists without layers, or the image runs' mappings, one for each layer."""
    if isinstance(collapse, list):
        collapse = {name: [layer.get(name) for layer in collapse] for name in collapse[0]}
    lists = {name: values for name, values in collapse.items() if name not in ("layer", "module", "call")}
    return {"layer": list(range(1, len(next(iter(lists.values()))) + 1)), **lists}


def _one_seed(record: dict[str, Any]) -> str:
    """The record's command; one that trained several seeds becomes that of this record's seed and folder."""
    command = str(record["command"])
    text = re.sub(r"--seeds[ =]\S+", f"--seed {record.get('seed')}", command)
    folder = record["config"].get("output_dir")
    return text if text == command or folder is None else re.sub(r"(--output_dir[ =])\S+", rf"\g<1>{folder}", text)
