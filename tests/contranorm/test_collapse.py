"""Collapse metrics against slow oracles, at collapsed and at healthy features; the probe."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from contranorm import (
    CollapseProbe,
    attention_similarity,
    effective_rank,
    feature_variance,
    mean_cosine_similarity,
    singular_spectrum,
    uniformity,
)

METRICS = [mean_cosine_similarity, effective_rank, feature_variance, uniformity]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_metrics_equal_their_definitions(seed):
    x = random(7, 4, seed=seed) + 0.5
    rows = x.tolist()
    pairs = [(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
    cosines = [sum(p * q for p, q in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b)) for a, b in pairs]
    assert mean_cosine_similarity(x) == pytest.approx(sum(cosines) / len(cosines))
    gaussian = [math.exp(-2 * (2 - 2 * c)) for c in cosines]
    assert uniformity(x) == pytest.approx(math.log(sum(gaussian) / len(gaussian)), abs=1e-9)
    sigma = torch.linalg.eigvalsh(x.T @ x).clamp_min(0).sqrt()
    share = (sigma / sigma.sum()).tolist()
    assert effective_rank(x) == pytest.approx(math.exp(-sum(s * math.log(s) for s in share if s > 0)), rel=1e-6)
    means = [sum(column) / 7 for column in zip(*rows, strict=True)]
    spread = [(v - m) ** 2 for row in rows for v, m in zip(row, means, strict=True)]
    assert feature_variance(x) == pytest.approx(sum(spread) / 28)


def test_collapsed_values():
    x = torch.ones(20, 1, dtype=torch.float64) * random(1, 8)
    assert mean_cosine_similarity(x) == pytest.approx(1)
    assert effective_rank(x) == pytest.approx(1)
    assert feature_variance(x) == pytest.approx(0)
    assert uniformity(x) == pytest.approx(0)
    assert singular_spectrum(x).tolist() == pytest.approx([1] + [0] * 7)
    assert attention_similarity(torch.full((2, 3, 5, 5), 0.2)) == pytest.approx(1)


def test_healthy_values():
    x = random(4000, 16)
    assert mean_cosine_similarity(x) == pytest.approx(0, abs=0.01)
    assert effective_rank(x) == pytest.approx(16, rel=0.01)
    assert feature_variance(x) == pytest.approx(1, rel=0.05)
    assert -4 < uniformity(x) < -3
    assert singular_spectrum(x).max() < 0.08
    assert attention_similarity(torch.eye(5)) == pytest.approx(0)


def test_exact_zero_singular_values_are_finite():
    x = torch.zeros(6, 4, dtype=torch.float64)
    x[:, 0] = 1
    assert effective_rank(x) == pytest.approx(1)
    assert effective_rank(torch.zeros(6, 4)) == 0
    assert singular_spectrum(torch.zeros(6, 4)).tolist() == [0] * 4


def test_features_that_are_not_finite_have_no_rank():
    x = torch.randn(2, 6, 4)
    whole = singular_spectrum(x)[1]
    x[0, 1, 2] = torch.nan
    assert math.isnan(effective_rank(x)) and singular_spectrum(x)[0].isnan().all()
    assert torch.equal(singular_spectrum(x)[1], whole)


def test_zero_rows_and_single_rows():
    assert mean_cosine_similarity(torch.zeros(3, 4)) == 0
    assert mean_cosine_similarity(torch.ones(1, 4)) == 1
    assert uniformity(torch.ones(1, 4)) == 0


@pytest.mark.parametrize("metric", METRICS)
def test_a_batch_gives_the_mean_and_padding_does_not_count(metric):
    x = random(2, 9, 5)
    mask = torch.arange(9) < torch.tensor([[9], [6]])
    assert metric(x) == pytest.approx((metric(x[0]) + metric(x[1])) / 2)
    assert metric(x, mask) == pytest.approx((metric(x[0]) + metric(x[1, :6])) / 2)


@pytest.mark.parametrize("metric", [*METRICS, singular_spectrum])
def test_wrong_input_is_refused(metric):
    for bad in (torch.ones(4), torch.ones(2, 2, 2, 2), torch.ones(3, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match="features must be"):
            metric(bad)
    with pytest.raises(ValueError, match="without rows"):
        metric(torch.ones(0, 4))


def test_wrong_masks_and_attention_are_refused():
    with pytest.raises(ValueError, match="mask must be"):
        effective_rank(torch.ones(3, 4), torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="attention must be"):
        attention_similarity(torch.ones(3, 4))


def test_spectrum_centres_on_request():
    x = random(50, 6) + 100
    assert singular_spectrum(x)[0] > 0.9 > 0.3 > singular_spectrum(x, centre=True)[0]


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.second(self.first(x)), "not a tensor"


def test_probe_records_each_layer_and_call():
    model, x = Pair(), torch.randn(5, 4)
    with CollapseProbe(model, ["first", ""]) as probe:
        first = model.first(x)
        model(x)
    model(x)  # outside: not recorded
    frame = probe.frame()
    assert frame[["call", "layer", "module"]].values.tolist() == [[0, 0, "first"], [1, 0, "first"], [0, 1, ""]]
    assert frame.mean_cosine[0] == pytest.approx(mean_cosine_similarity(first))
    assert frame.effective_rank[2] == pytest.approx(effective_rank(model(x)[0]))


def test_probe_reads_the_features_of_an_output_with_names():
    class Output(dict):
        def __getitem__(self, key):
            return [*self.values()][key] if isinstance(key, int) else super().__getitem__(key)

    class Encoder(nn.Module):
        def forward(self, x):
            return Output(last_hidden_state=x, other=None)

    encoder, x = Encoder(), torch.randn(5, 4)
    with CollapseProbe(encoder, [""]) as probe:
        encoder(x)
    assert probe.frame().mean_cosine[0] == pytest.approx(mean_cosine_similarity(x))


def test_probe_takes_labels_metrics_and_masks():
    model, x = Pair(), torch.randn(2, 5, 4)
    probe = CollapseProbe(model, {"block 1": "first"}, metrics={"variance": feature_variance})
    probe.mask = torch.arange(5) < torch.tensor([[5], [2]])
    with probe:
        out = model.first(x)
    frame = probe.frame()
    assert list(frame.columns) == ["call", "layer", "module", "variance"] and frame.module[0] == "block 1"
    assert frame.variance[0] == pytest.approx(feature_variance(out, probe.mask))


def test_probe_names_an_unknown_layer():
    with pytest.raises(ValueError, match="no module named 'third'"):
        CollapseProbe(Pair(), ["third"])


def test_effective_rank_of_the_covariance():
    x = random(50, 6) * torch.tensor([4.0, 2, 1, 0.5, 0.2, 0.1]) + 3
    for centre in (False, True):
        eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T, correction=0) if centre else x.T @ x)
        share = (eigenvalues / eigenvalues.sum()).tolist()
        expected = math.exp(-sum(p * math.log(p) for p in share))
        assert effective_rank(x, centre=centre, power=2) == pytest.approx(expected)
    assert effective_rank(x, centre=True) == pytest.approx(effective_rank(x - x.mean(dim=0)))
    assert effective_rank(torch.ones(5, 3), centre=True, power=2) == 0
    assert effective_rank(x, centre=False, power=1) == effective_rank(x)


@pytest.mark.parametrize("t", [2.0, 30.0])
def test_uniformity_is_exact_at_any_sharpness(t):
    x = random(64, 512)
    unit = torch.nn.functional.normalize(x, dim=1)
    exact = torch.pdist(unit).square().mul(-t).logsumexp(0) - math.log(64 * 63 / 2)
    assert uniformity(x, t=t) == pytest.approx(float(exact), rel=1e-9)
    long = random(1500, 4)  # more than one block of rows
    unit = torch.nn.functional.normalize(long, dim=1)
    exact = torch.pdist(unit).square().mul(-t).logsumexp(0) - math.log(1500 * 1499 / 2)
    assert uniformity(long, t=t) == pytest.approx(float(exact), rel=1e-9)


def test_the_probe_takes_one_name():
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(11)))
    with CollapseProbe(model, "10") as probe:
        model(random(4, 3).float())
    assert probe.frame()["module"].tolist() == ["10"]


@pytest.mark.parametrize("metric", METRICS)
def test_a_batch_of_nothing_is_refused(metric):
    with pytest.raises(ValueError, match="B or N is 0"):
        metric(torch.ones(0, 4, 3))
