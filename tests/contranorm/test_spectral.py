"""Spectral filters against the singular value decomposition, the printed spectra, and the frozen matrices."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from contranorm import contra_norm, effective_rank, spectral_filter
from contranorm.options import check_filter
from contranorm.spectral import RELATIVE_FLOOR, gram_spectrum

SHAPES = [(32, 12), (12, 32), (16, 16)]
GAINS = {
    "log": torch.log,
    "log_1": torch.log1p,
    "log_2": lambda s: torch.log1p(s**2),
}
FILTERS = [
    ("poly", 1.0, "online"), ("poly", 2.0, "online"), ("poly", -0.5, "online"), ("log", 0.0, "online"),
    ("log_1", 0.0, "online"), ("log_2", 0.0, "online"), ("contranorm", -0.5, "online"),
    ("poly", -1.0, "target"), ("poly", -0.3, "target"), ("poly", 1.0, "target"), ("contranorm", 0.5, "target"),
]  # fmt: skip


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gain(kind: str, s: torch.Tensor, sigma: float) -> torch.Tensor:
    if kind == "poly":
        return s**sigma
    return 1 - sigma * (s / s.max()) ** 2 if kind == "contranorm" else GAINS[kind](s)


def alignment(p: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return -F.cosine_similarity(p, t.detach(), dim=1).mean()


def with_spectrum(values: list[float], rows: int = 7, width: int = 5) -> torch.Tensor:
    u, _ = torch.linalg.qr(random(rows, len(values)))
    v, _ = torch.linalg.qr(random(width, len(values), seed=1))
    return u @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ v.T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "sigma", "location"), FILTERS)
def test_equals_the_singular_value_decomposition(shape, kind, sigma, location):
    z = random(*shape)
    u, s, vh = torch.linalg.svd(z, full_matrices=False)
    expected = u @ torch.diag(s * gain(kind, s, sigma)) @ vh
    torch.testing.assert_close(spectral_filter(z, kind, sigma, location=location), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "sigma", "location"), FILTERS)
def test_the_gradient_is_that_of_a_constant_feature_matrix(shape, kind, sigma, location):
    """Online: of z W with W = V diag(g) Vᵀ, thin and frozen. Target: none."""
    z, other = random(*shape).requires_grad_(), random(*shape, seed=1)
    out = spectral_filter(z, kind, sigma, location=location)
    if location == "target":
        assert not out.requires_grad
        return
    _, s, vh = torch.linalg.svd(z.detach(), full_matrices=False)
    w = vh.T @ torch.diag(gain(kind, s, sigma)) @ vh
    (expected,) = torch.autograd.grad(alignment(z @ w, other), z)
    (found,) = torch.autograd.grad(alignment(out, other), z)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["poly", "contranorm"])
def test_sigma_zero_is_the_plain_symmetric_loss(shape, kind):  # C1
    z, other = random(*shape).requires_grad_(), random(*shape, seed=1).requires_grad_()
    plain = alignment(z, other)
    online = alignment(spectral_filter(z, kind, 0, location="online"), other)
    target = alignment(z, spectral_filter(other, kind, 0, location="target"))
    assert plain.item() == online.item() == target.item()
    wanted = torch.autograd.grad(plain, z)[0]
    assert torch.equal(wanted, torch.autograd.grad(online, z)[0])
    assert torch.equal(wanted, torch.autograd.grad(target, z)[0])


@pytest.mark.parametrize(
    ("kind", "sigma", "location", "spectrum", "rank", "rank_cov"),
    [
        ("poly", 0.0, "online", [4, 2, 1], 2.6005, 1.9504),
        ("poly", 0.5, "online", [8, 2.8284, 1], 2.2603, 1.5165),
        ("poly", 1.0, "online", [16, 4, 1], 1.9504, 1.2803),
        ("poly", 2.0, "online", [64, 8, 1], 1.5165, 1.0851),
        ("log", 0.0, "online", [5.5452, 1.3863, 0], 1.6494, 1.2507),
        ("log_1", 0.0, "online", [6.4378, 2.1972, 0.6931], 2.2027, 1.4745),
        ("log_2", 0.0, "online", [11.3329, 3.2189, 0.6931], 1.9924, 1.3332),
        ("poly", -0.3, "target", [2.6390, 1.6245, 1], 2.7857, 2.3278),
        ("poly", -0.5, "target", [2, 1.4142, 1], 2.8856, 2.6005),
        ("poly", -0.7, "target", [1.5157, 1.2311, 1], 2.9575, 2.8387),
        ("poly", -1.0, "target", [1, 1, 1], 3, 3),
        ("poly", 1.0, "target", [16, 4, 1], 1.9504, 1.2803),
    ],
)
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (3, 3)])
def test_spectra_of_a_batch_with_singular_values_4_2_1(shape, kind, sigma, location, spectrum, rank, rank_cov):  # C2
    out = spectral_filter(with_spectrum([4, 2, 1], *shape), kind, sigma, location=location)
    assert torch.linalg.svdvals(out).tolist() == pytest.approx(spectrum, abs=1e-4)
    assert effective_rank(out) == pytest.approx(rank, abs=1e-4)
    assert effective_rank(out, power=2) == pytest.approx(rank_cov, abs=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_scale_drops_out_of_poly_and_not_of_the_logarithms(shape):  # C3
    z, other = random(*shape), random(*shape, seed=1)

    def losses(kind, sigma):
        pair = [alignment(spectral_filter(s * z, kind, sigma, location="online"), other).item() for s in (1, 3)]
        return pair[1] - pair[0]

    assert abs(losses("poly", 1.0)) < 1e-12
    assert abs(losses("contranorm", -0.5)) < 1e-12
    assert abs(losses("log_1", 0.0)) > 1e-4
    once, scaled = (spectral_filter(s * z, "poly", -0.5, location="target") for s in (1, 3))
    assert alignment(other, scaled).item() == pytest.approx(alignment(other, once).item(), abs=1e-12)


def test_sigma_minus_one_whitens_samples_or_features():  # C3
    wide, tall = (spectral_filter(random(*shape), "poly", -1, location="target") for shape in ((12, 32), (32, 12)))
    torch.testing.assert_close(wide @ wide.T, torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(tall.T @ tall, torch.eye(12, dtype=torch.float64))
    centred = random(12, 32) - random(12, 32).mean(dim=0)
    white = spectral_filter(centred, "poly", -1, location="target")
    expected = torch.eye(12, dtype=torch.float64) - 1 / 12
    torch.testing.assert_close(white @ white.T, expected, rtol=0, atol=1e-9)


def test_float32_batches_are_filtered_in_float64():
    """Over six decades of a spectrum the Gram matrix needs the longer word; the floor cuts where it is noise."""
    values = torch.logspace(0, -3.5, 24, dtype=torch.float64).tolist()
    exact = with_spectrum(values, 24, 64)
    out = spectral_filter(exact.float(), "poly", -1, location="target")
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double() @ out.double().T, torch.eye(24, dtype=torch.float64), rtol=0, atol=5e-3)
    z = exact.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        p = spectral_filter(z, "poly", 1, location="online")
    torch.testing.assert_close(p.detach(), spectral_filter(exact.float(), "poly", 1, location="online"), rtol=0, atol=0)


DEGENERATE = {
    "zero": torch.zeros(6, 9),
    "one value": torch.full((6, 9), 2.0),
    "rank one": torch.arange(1.0, 7).unsqueeze(1) * torch.arange(-4.0, 5),
    "rank one and noise": torch.ones(6, 9) + 1e-6 * random(6, 9).float(),
    "standardized rank one": F.batch_norm(torch.arange(6.0).unsqueeze(1) * torch.ones(6, 9), None, None, training=True),
    "tiny": 1e-30 * random(6, 9).float(),
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize(("kind", "sigma", "location"), FILTERS)
def test_degenerate_batches_stay_finite(name, turned, kind, sigma, location):
    z = (DEGENERATE[name].T if turned else DEGENERATE[name]).clone().requires_grad_()
    out = spectral_filter(z, kind, sigma, location=location)
    assert out.isfinite().all()
    if name == "zero":
        assert not out.any()
    if location == "online":
        alignment(out, random(*z.shape, seed=1).float()).backward()
        assert z.grad is not None and z.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(12, 32), (32, 12)])
def test_nothing_is_put_on_the_null_space(shape):
    """A clamped eigenvector that the batch does not have gets no gradient, even from log's large negative gain."""
    z = with_spectrum([4, 2, 1], *shape).requires_grad_()
    _, _, vh = torch.linalg.svd(z.detach(), full_matrices=True)
    out = spectral_filter(z, "log", 0, location="online")
    (gradient,) = torch.autograd.grad((out * random(*shape, seed=2)).sum(), z)
    assert (gradient @ vh[3:].T).abs().max() < 1e-6 * gradient.abs().max()


def test_contranorm_is_the_step_to_first_order():
    """Rows of unit length and mean zero at a large temperature: one step of `contra_norm`."""
    half = F.normalize(random(25, 6) * torch.tensor([3, 2, 1, 1, 0.5, 0.2], dtype=torch.float64), dim=1)
    rows, tau = torch.cat([half, -half]), 1e5
    largest = torch.linalg.svdvals(rows)[0] ** 2
    step = float(0.5 * len(rows) * tau / largest)
    moved = contra_norm(rows, step, tau=tau)
    torch.testing.assert_close(spectral_filter(rows, "contranorm", 0.5, location="target"), moved, rtol=0, atol=1e-3)
    assert effective_rank(moved, power=2) > effective_rank(rows, power=2) + 0.2


def test_condition_and_clamped_values():
    spectrum = gram_spectrum(with_spectrum([4, 2, 1], 3, 5))
    assert spectrum.condition == pytest.approx(4)
    assert spectrum.clamped_count == 0
    collapsed = gram_spectrum(torch.ones(6, 9))
    assert collapsed.condition == pytest.approx(1 / RELATIVE_FLOOR)
    assert collapsed.clamped_count == 5


@pytest.mark.parametrize(
    ("kind", "sigma", "location", "message"),
    [
        ("log_1", 0.0, "target", "log_1 is a filter of the online side"),
        ("poly", -1.5, "target", "sigma must be at least -1"),
        ("contranorm", 1.5, "target", "sigma must be at most 1"),
        ("poly", float("nan"), "online", "sigma must be finite"),
        ("cube", 1.0, "online", "kind must be one of poly"),
        ("poly", 1.0, "middle", "location must be one of online, target"),
    ],
)
def test_filters_that_are_not_defined(kind, sigma, location, message):
    with pytest.raises(ValueError, match=message):
        check_filter(kind, sigma, location)
    with pytest.raises(ValueError, match=message):
        spectral_filter(random(3, 4), kind, sigma, location=location)


def test_only_matrices_of_numbers():
    with pytest.raises(ValueError, match=r"\(N, D\)"):
        spectral_filter(random(2, 3, 4), "poly", 1, location="online")


def final_rank(kind: str, sigma: float, location: str) -> float:
    """Rank of the covariance after 800 steps of a linear encoder 16 → 8 on two noisy copies of Gaussian inputs."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.linspace(1, 0.2, 16)
    weights = (torch.randn(16, 8, generator=generator) / 4).requires_grad_()
    for _ in range(800):
        x = torch.randn(512, 16, generator=generator) * scales
        noisy = [x + 0.3 * torch.randn(512, 16, generator=generator) for _ in range(2)]
        a, b = (F.batch_norm(view @ weights, None, None, training=True) for view in noisy)
        loss = torch.zeros(())
        for online, target in ((a, b), (b, a)):
            if location == "online":
                online = spectral_filter(online, kind, sigma, location="online")
            else:
                target = spectral_filter(target, kind, sigma, location="target")
            loss = loss + alignment(online, target) / 2
        (gradient,) = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            weights -= 0.5 * gradient
    return effective_rank(a, centre=True, power=2)


def test_the_sign_decides_whether_a_linear_encoder_collapses():  # C4; the rank starts at 6.46
    start, symmetric = 6.46, final_rank("poly", 0, "online")
    assert symmetric < start - 0.5
    rising = [("poly", 1, "online"), ("log_1", 0, "online"), ("poly", -1, "target"), ("poly", -0.5, "target")]
    for arm in [*rising, ("contranorm", 0.5, "target")]:
        assert final_rank(*arm) > start + 0.5, arm
    assert final_rank("poly", -1, "online") < symmetric - 0.5
    assert final_rank("poly", 1, "target") < 1.1  # the command in the README of the released code
