"""What became of each method's claim: `python -m SSL_cifar.claims --records results/ssl`.

One line for each claim whose runs are there: the mean difference of the two arms over the seeds that both have, its
95 % interval, and p of the paired t-test, Holm-corrected over the table. The last column says "shown" for the claimed
sign with p < 0.05 and "contradicted" for the opposite one; without such a p, "same sign" and "opposite sign".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pandas as pd

from repro.config import parse_config
from repro.errors import UserError, run_main
from repro.report import readme
from repro.report.cells import replicate, signed
from repro.report.records import RecordsConfig, load_records, records_flag
from repro.report.stats import LEVEL, Difference, difference, holm
from repro.report.tables import markdown_table


class Claim(NamedTuple):
    """That `metric` of the runs called `arm` is higher (or lower) than that of `base`; without a base, than 0."""

    family: str
    text: str
    metric: str
    arm: str
    base: str | None
    sign: Literal["higher", "lower"] = "higher"
    epochs: int | None = None  # of the base, where the name alone does not tell it


ATTN, ARCL, AAL, SIMCLR = "SimCLR-Attn β=1 τ=0.5", "ArCL m=4 τ=0.5", "AAL m=4 τ=0.5", "SimCLR τ=0.5"
MULTI, SINGLE = "SimSiam-Multi λ=0.5", "SimSiam-Multi λ=0"
SYMMETRIC, WHITENED = "RDM-SimSiam online poly σ=0", "RDM-SimSiam target poly σ=-1"
PRINTED = "RDM-SimSiam target poly σ=1 (negative control)"
CLAIMS = (
    Claim("RDM", "a whitened target keeps the rank of the features up", "erank_cov_h", WHITENED, SYMMETRIC),
    Claim("RDM", "and with it k-NN accuracy", "knn_accuracy", WHITENED, SYMMETRIC),
    Claim("RDM", "half of it does too", "erank_cov_h", "RDM-SimSiam target poly σ=-0.5", SYMMETRIC),
    Claim("RDM", "so does a low-pass filter online", "erank_cov_h", "RDM-SimSiam online poly σ=1", SYMMETRIC),
    Claim("RDM", "and with it k-NN accuracy", "knn_accuracy", "RDM-SimSiam online poly σ=1", SYMMETRIC),
    Claim("RDM", "the sign in the authors' README collapses", "erank_cov_h", PRINTED, WHITENED, "lower"),
    Claim("RDM", "whitening does at least as well as SimSiam's predictor", "knn_accuracy", WHITENED, "SimSiam"),
    Claim("RDM", "and as BYOL's", "knn_accuracy", "RDM-BYOL target poly σ=-1", "BYOL"),
    Claim("multi-stage", "the mixed target is easier to predict", "train_loss", MULTI, SINGLE, "lower"),
    Claim("multi-stage", "and gives better features", "linear_accuracy", MULTI, SINGLE),
    Claim("attention", "weights follow how much two crops share", "train_weight_overlap", ATTN, None),
    Claim("attention", "weighting gives better features", "linear_accuracy", ATTN, SIMCLR, epochs=15),
    Claim("attention", "so does stronger weighting", "linear_accuracy", "SimCLR-Attn β=4 τ=0.5", SIMCLR, epochs=15),
    Claim("ArCL", "aligning the worst pair brings the worst of four views closer than the average control",
          "worst_alignment", ARCL, AAL, "lower"),
    Claim("ArCL", "and gives better features", "linear_accuracy", ARCL, AAL),
    Claim("ArCL", "on shifted images too", "shifted_accuracy", ARCL, AAL),
    Claim("ArCL", "and than SimCLR with as many passes", "linear_accuracy", ARCL, SIMCLR, epochs=30),
    Claim("ClusterMIM", "tokens of pixels give better features than pixels", "linear_accuracy", "ClusterMIM pixel K=50",
          "MAE"),
    Claim("ClusterMIM", "few tokens better ones than many", "linear_accuracy", "ClusterMIM pixel K=50",
          "ClusterMIM pixel K=500"),
    Claim("look-ahead", "several targets ahead give better features than one", "linear_accuracy", "DAR K=4", "AR"),
    Claim("look-ahead", "in the best layer too", "linear_accuracy_best_layer", "DAR K=4", "AR"),
    Claim("look-around", "a variable number of hidden tokens predicts the next token better than half",
          "next_token_nll", "masked r=0.1 to 0.9", "masked r=0.5", "lower"),
)  # fmt: skip


@dataclass
class Config(RecordsConfig):
    """What to read."""

    output: str | None = None
    """.md file to write the table to, as a block that repro.report.check renews."""


def values_of(frame: pd.DataFrame, method: str, metric: str, epochs: int | None = None) -> pd.Series[Any]:
    """The metric of a method's runs by seed; empty where there are none.

    Raises:
        UserError: runs of several settings go by that name.
    """
    own = frame[(frame["method"] == method) & frame[f"metrics.{metric}"].notna()]
    if epochs is not None:
        own = own[own["epochs"] == epochs] if "epochs" in own else own[:0]
    seeds = replicate(own)
    if seeds.duplicated().any():
        raise UserError(f"{method}: two records of one seed ({', '.join(own['path'][seeds.duplicated(keep=False)])})")
    return pd.Series(own[f"metrics.{metric}"].to_numpy(dtype=float), index=pd.Index(seeds, tupleize_cols=False))


def compare(frame: pd.DataFrame, claims: Sequence[Claim] = CLAIMS) -> pd.DataFrame:
    """One row for each claim that the runs speak about."""
    known: list[tuple[Claim, Difference]] = []
    for claim in claims:
        if f"metrics.{claim.metric}" not in frame:
            continue
        arm = values_of(frame, claim.arm, claim.metric)
        base = arm * 0 if claim.base is None else values_of(frame, claim.base, claim.metric, claim.epochs)
        if len(arm) and len(base):
            known.append((claim, difference(arm, base)))
    p_values = holm([found.p for _, found in known])
    return pd.DataFrame([_row(*pair, p) for pair, p in zip(known, p_values, strict=True)])


def _row(claim: Claim, found: Difference, p: float | None) -> dict[str, str]:
    percent = "accuracy" in claim.metric
    low, high = signed(found.low, percent), signed(found.high, percent)
    right = found.mean > 0 if claim.sign == "higher" else found.mean < 0
    if p is not None and p < LEVEL:
        verdict = "shown" if right else "contradicted"
    else:
        verdict = "same sign" if right else "opposite sign"
    return {
        "family": claim.family,
        "claim": claim.text,
        "measured": f"{claim.metric}{' (points)' if percent else ''}, {claim.sign}",
        "runs": claim.arm if claim.base is None else f"{claim.arm} − {claim.base}",
        "difference": signed(found.mean, percent) + (f" [{low}, {high}]" if found.n > 1 else ""),
        "pairs": str(found.n) if found.paired or found.n == 1 else f"{found.n}, unpaired",
        "p (Holm)": "" if p is None else f"{p:.2g}",
        "found": verdict,
    }


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    words = records_flag(argv)
    config = parse_config(Config, words, prog="python -m SSL_cifar.claims", description=__doc__ or "")
    table = compare(load_records(config.records))
    if table.empty:
        raise UserError(f"{config.records}: no claim's two arms are there")
    text = markdown_table(table)
    readme.publish("SSL_cifar.claims", words, text, config.output)


if __name__ == "__main__":
    run_main(main)
