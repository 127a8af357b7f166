"""Token-class alignment similarity: do classes share their tokens?

`python -m SSL_cifar.tcas --records out/tokens` prints the table of finished runs of `SSL_cifar.tokens`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from repro.config import parse_config
from repro.errors import UserError, run_main
from repro.report import readme
from repro.report.records import RecordsConfig, load_records, records_flag
from repro.report.tables import markdown_table

Integers = np.ndarray[Any, np.dtype[np.int64]]


def tcas(tokens: Integers, classes: Integers) -> float:
    r"""‖G - I‖² / L² with G the cosines of the L classes' token counts.

    .. math:: R_{kc} = \#\{\text{patches of class } c \text{ with token } k\}, \quad G = \bar R^\top \bar R,

    R̄ being R with columns of unit length ("On the Role of Discrete Tokenization in Visual Representation Learning", Du,
    Wang, Wang, ICLR 2024). 0: no two classes share a token. 1 - 1/L: all use tokens alike. Lower is better, but only at
    the same K and number of patches: one token for each patch has 0 as well, and random tokens come closer to it the
    more of them there are (`tcas_of_random_tokens`).

    Args:
        tokens: token of each patch, (N,).
        classes: class number of each patch, (N,); classes without patches do not count.
    """
    classes = np.unique(classes, return_inverse=True)[1]
    table = sparse.coo_array((np.ones(len(tokens)), (tokens, classes))).tocsc()
    columns = table / sparse.linalg.norm(table, axis=0)
    cosines = (columns.T @ columns).toarray()
    return float(np.square(cosines - np.eye(len(cosines))).sum() / cosines.size)


def tcas_of_random_tokens(k: int, patches: int, classes: int) -> float:
    """Expected TCAS of K random tokens: (1 - 1/L) (m / (1 + m))², m = patches per class / K."""
    m = patches / classes / k
    return (1 - 1 / classes) * (m / (1 + m)) ** 2


def perplexity(tokens: Integers) -> float:
    """Exp of the tokens' entropy: how many are in use. Collapsed: 1. Healthy: towards K."""
    shares = np.bincount(tokens) / len(tokens)
    return float(np.exp(-(shares * np.log(shares, where=shares > 0, out=np.zeros_like(shares))).sum()))


def compare(tokens: Integers, classes: Integers, k: int, seed: int) -> dict[str, float]:
    """TCAS of the tokens, and of what says nothing about classes at the same K and number of patches.

    tcas_random: expected, of random tokens; tcas_drawn: of random tokens once drawn; tcas_shuffled: of these tokens in
    random order; tcas_identity: of a token for each patch, which is 0 whatever the patches are.
    """
    generator = np.random.default_rng(seed)
    drawn = generator.integers(k, size=len(tokens))
    return {
        "tcas": tcas(tokens, classes),
        "tcas_random": tcas_of_random_tokens(k, len(tokens), len(np.unique(classes))),
        "tcas_drawn": tcas(drawn, classes),
        "tcas_shuffled": tcas(generator.permutation(tokens), classes),
        "tcas_identity": tcas(np.arange(len(tokens)), classes),
        "perplexity": perplexity(tokens),
    }


@dataclass
class Config(RecordsConfig):
    """What to show."""

    output: str | None = None
    """.md file to write the table to, as a block that repro.report.check renews."""


def table(rows: Iterable[dict[str, Any]]) -> str:
    """One line per tokenizer: side of a patch in pixels, K, patches per class, TCAS and those beside it, perplexity."""
    names = {
        "tokens": "tokens", "patch_size": "patch", "k": "K", "patches_per_class": "patches per class", "tcas": "TCAS",
        "tcas_random": "random, expected", "tcas_drawn": "random, drawn", "tcas_shuffled": "shuffled",
        "tcas_identity": "one per patch", "perplexity": "perplexity",
    }  # fmt: skip
    frame = pd.DataFrame(sorted(rows, key=lambda row: (row["tokens"], row["patch_size"], row["k"])))[
        list(names)
    ].rename(columns=names)
    return markdown_table(frame.map(lambda value: f"{value:.3f}" if isinstance(value, float) else value))


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    words = records_flag(argv)
    config = parse_config(Config, words, prog="python -m SSL_cifar.tcas", description=__doc__ or "")
    frame = load_records(config.records)
    if "metrics.tcas" not in frame:
        raise UserError(f"{config.records}: no record of SSL_cifar.tokens there")
    rows = frame[frame["metrics.tcas"].notna()].rename(columns=lambda name: name.removeprefix("metrics."))
    text = table(rows.assign(tokens=rows["method"], k=rows["k"].astype(int)).to_dict("records"))
    readme.publish("SSL_cifar.tcas", words, text, config.output)


if __name__ == "__main__":
    run_main(main)
