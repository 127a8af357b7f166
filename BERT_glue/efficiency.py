"""The same training with less work: embedding rows and last-block tokens that nothing ever reads; cheap dropout.

A GLUE task meets a fraction of the vocabulary. Other rows have no gradient, and AdamW without weight decay never
moves them. The head reads the first token: what the last block's feed-forward makes of the others goes nowhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from BERT_glue.config import Config
from BERT_glue.dropout import use_cheap_dropout
from BERT_glue.sites import FEED_FORWARD_SITES
from repro.errors import UserError


class UsedRows(nn.Module):
    """Stands in for the embedding `table`, (V, D), with its state dict; only the rows `used`, (U,), are trained."""

    def __init__(self, table: nn.Embedding, used: Tensor) -> None:
        super().__init__()
        weight = table.weight.detach()
        self.num_embeddings, self.embedding_dim = weight.shape
        unused = torch.ones(self.num_embeddings, dtype=torch.bool)
        unused[used] = False
        self.used, self.unused = used, unused.nonzero()[:, 0]
        self.weight = nn.Parameter(weight[used].clone())  # (U, D)
        self.rest = weight[self.unused].cpu()  # (V - U, D); no buffer, so that it stays there when the model moves
        row = torch.full((self.num_embeddings,), -1, dtype=torch.int32)  # -1 is what no lookup accepts
        row[used] = torch.arange(len(used), dtype=torch.int32)
        self.register_buffer("row", row.to(weight.device), persistent=False)  # (V,)
        padding = table.padding_idx
        # the table's own rule, that its padding row gets no gradient
        self.padding_idx = None if padding is None or row[padding] < 0 else int(row[padding])

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N) → (B, N, D); a token outside `used` is an index error."""
        return functional.embedding(self.row[tokens], self.weight, self.padding_idx)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        weight = self.weight.detach()
        full = weight.new_empty(self.num_embeddings, self.embedding_dim, device="cpu")
        full[self.used] = weight.cpu()
        full[self.unused] = self.rest.to(full.dtype)
        destination[prefix + "weight"] = full

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        key = prefix + "weight"
        full = state_dict.get(key)
        if full is not None and tuple(full.shape) == (self.num_embeddings, self.embedding_dim):
            self.rest = full[self.unused.to(full.device)].cpu()
            state_dict = {**state_dict, key: full[self.used.to(full.device)]}
        super()._load_from_state_dict(state_dict, prefix, *others)  # also complains of a missing or odd table


def used_tokens(splits: Iterable[Dataset], special: Iterable[int]) -> Tensor:
    """The sorted token numbers that occur in tokenized rows, with the tokenizer's special tokens; (U,)."""
    found = set(special)
    for rows in splits:
        for table in rows.with_format("arrow").iter(batch_size=10_000):
            found.update(pc.unique(pc.list_flatten(table["input_ids"])).to_pylist())
    return torch.tensor(sorted(found))


def compact_embeddings(model: PreTrainedModel, used: Tensor) -> None:
    """Replace a classifier's word embedding by one that holds only the rows in `used` as parameters."""
    model.set_input_embeddings(UsedRows(model.get_input_embeddings(), used))


def trained_tokens(model: nn.Module) -> Tensor | None:
    """The tokens whose rows are parameters; None where the whole table is one."""
    return next((module.used for module in model.modules() if isinstance(module, UsedRows)), None)


def reads_all_tokens(model: PreTrainedModel) -> str | None:
    """Why the last block's feed-forward needs all tokens; None where the first one is enough."""
    if "albert" in model.config.model_type:
        return "ALBERT's blocks are one and the same"
    if model.config.chunk_size_feed_forward:
        return "the feed-forward runs in chunks (chunk_size_feed_forward)"
    sites = [site for site in getattr(model.config, "sites", []) if site in FEED_FORWARD_SITES]
    return f"site {sites[0]} contrasts all tokens of a sequence" if sites else None


def skip_unread_tokens(model: PreTrainedModel) -> None:
    """Run the feed-forward of BERT's last block on the first token alone, where `reads_all_tokens` has no objection."""
    first = lambda _, inputs: (inputs[0][:, :1],)  # noqa: E731 - (B, N, D) → (B, 1, D)
    model.skipping = model.base_model.encoder.layer[-1].intermediate.register_forward_pre_hook(first)


def read_all_tokens(model: PreTrainedModel) -> None:
    """Undo `skip_unread_tokens`."""
    if hasattr(model, "skipping"):
        model.skipping.remove()


def apply_speedups(config: Config, model: PreTrainedModel, rows: list[Dataset], special: Iterable[int]) -> None:
    """Leave out work that training does not need; a switch that is not set is on where it changes nothing.

    `rows` are the tokenized ones of all splits, none where nothing is trained; `special` the tokenizer's own tokens.
    """
    reason = reads_all_tokens(model)
    if config.skip_unread_tokens and reason:
        raise UserError(f"--skip_unread_tokens: {reason}; leave the flag out")
    if config.skip_unread_tokens is not False and not reason:
        skip_unread_tokens(model)
    on_cpu = not torch.accelerator.is_available()
    if config.cheap_dropout or (config.cheap_dropout is None and on_cpu):
        use_cheap_dropout(model)
    if config.compact_embeddings and rows:
        compact_embeddings(model, used_tokens(rows, special))
