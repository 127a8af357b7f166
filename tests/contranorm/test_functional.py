"""contra_norm: every form against the oracle, and the properties of the equation."""

from __future__ import annotations

import warnings
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contranorm import contra_norm, effective_rank, feature_variance, mean_cosine_similarity

FORMS = [
    dict(identity=i, axis=a, symmetric=s, pre_norm=p)
    for i, a, s, p in product((True, False), ("tokens", "features"), (False, True), (False, True))
]
EXACT = ("plain", "fused", "blocked", "sdpa")
seeds = st.integers(0, 2**31 - 1)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def value_and_gradient(function, x, upstream):
    x = x.clone().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, upstream)[0]


@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(f"{k}={v}" for k, v in f.items()))
@pytest.mark.parametrize("implementation", EXACT)
def test_every_form_equals_the_oracle(form, implementation, oracle):
    x, upstream = random(2, 6, 4), random(2, 6, 4, seed=1)
    if implementation in ("sdpa", "fused") and form["symmetric"] and form["axis"] == "tokens":
        with pytest.raises(ValueError, match="symmetric"):  # attention has no softmax over columns
            contra_norm(x, 0.7, implementation=implementation, **form)
        return
    mask = torch.tensor([[True] * 6, [True, False, True, True, False, True]])
    for tau, keep in ((1.0, None), (0.3, mask)):
        want = value_and_gradient(lambda x: oracle(x, 0.7, tau=tau, mask=keep, **form), x, upstream)  # noqa: B023
        got = value_and_gradient(
            lambda x: contra_norm(x, 0.7, tau=tau, mask=keep, implementation=implementation, **form),  # noqa: B023
            x,
            upstream,
        )
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("symmetric_edges", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("implementation", ["plain", "blocked"])
@pytest.mark.parametrize("masked", [True, False])
def test_graph_form_equals_the_oracle(symmetric_edges, symmetric, implementation, masked, oracle, edges):
    x, upstream = random(9, 4), random(9, 4, seed=1)
    exclude = edges(9, symmetric=symmetric_edges)
    mask = torch.arange(9) % 4 != 1 if masked else None
    for tau in (1.0, 0.01):  # the second needs a running maximum
        settings_ = dict(tau=tau, symmetric=symmetric, exclude=exclude, mask=mask)
        want = value_and_gradient(lambda x: oracle(x, 1.0, **settings_), x, upstream)  # noqa: B023
        got = value_and_gradient(
            lambda x: contra_norm(x, 1.0, implementation=implementation, **settings_),  # noqa: B023
            x,
            upstream,
        )
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("implementation", ["plain", "blocked"])
def test_a_node_adjacent_to_all_others_has_no_contrast(implementation, edges):
    x = random(9, 4).requires_grad_()
    y = contra_norm(x, 0.5, identity=True, exclude=edges(9), implementation=implementation)
    torch.testing.assert_close(y[2], 1.5 * x[2])
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


def test_explicit_zeros_are_stored_entries(edges):
    pattern = edges(9)
    ones = torch.sparse_csr_tensor(
        pattern.crow_indices(), pattern.col_indices(), torch.ones(len(pattern.values())), check_invariants=True
    )
    x = random(9, 4)
    assert (pattern.values() == 0).all()
    torch.testing.assert_close(contra_norm(x, 1.0, exclude=pattern), contra_norm(x, 1.0, exclude=ones))


@pytest.mark.parametrize("implementation", ["plain", "fused", "blocked", "sdpa", "linear"])
def test_gradcheck(implementation, edges):
    x = (random(7, 3).abs() + 0.1).requires_grad_()
    if implementation == "linear":  # its centre, which is a constant of the gradient, moves with the features
        from contranorm.kernels.edges import edges_of
        from contranorm.kernels.linear import _PolynomialProduct

        w = random(7, 2, seed=3).requires_grad_()
        left_out = edges_of(edges(7, 0.2, symmetric=False))
        for coefficients in ((1.0, 0.9), (1.0, 0.9, 0.4)):
            assert torch.autograd.gradcheck(
                lambda u, w: _PolynomialProduct.apply(u, w, coefficients, left_out),  # noqa: B023
                (x, w),
            )
    else:
        assert torch.autograd.gradcheck(lambda x: contra_norm(x, 0.7, implementation=implementation), (x,))


def test_gradient_of_a_learnable_scale():
    x, scale = random(2, 5, 4), random(4, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: contra_norm(x, s), (scale,))


@pytest.mark.parametrize("n", [100, 900])
@pytest.mark.parametrize("symmetric_edges", [True, False])
def test_blocked_equals_plain_in_float32(n, symmetric_edges, edges):
    x, upstream = random(n, 32, dtype=torch.float32), random(n, 32, seed=1, dtype=torch.float32)
    for exclude in (None, edges(n, 0.05, symmetric_edges)):
        plain, blocked = (
            value_and_gradient(
                lambda x: contra_norm(x, 1.0, exclude=exclude, implementation=name),  # noqa: B023
                x,
                upstream,
            )
            for name in ("plain", "blocked")
        )
        for a, b in zip(plain, blocked, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@given(seeds, st.sampled_from(["plain", "fused", "blocked", "sdpa"]))
@settings(max_examples=20, deadline=None)
def test_a_small_step_is_a_small_move(seed, implementation):
    x = random(2, 9, 5, seed=seed)
    small, unit = (contra_norm(x, s, implementation=implementation) - x for s in (1e-6, 1.0))
    torch.testing.assert_close(small, 1e-6 * unit, atol=1e-14, rtol=1e-9)


@given(seeds, st.floats(0.01, 100.0))
@settings(max_examples=20, deadline=None)
def test_homogeneous(seed, factor):
    x = random(9, 5, seed=seed)
    torch.testing.assert_close(contra_norm(factor * x, 0.5), factor * contra_norm(x, 0.5))


@given(seeds, st.sampled_from(["plain", "fused", "blocked", "sdpa"]))
@settings(max_examples=30, deadline=None)
def test_commutes_with_permutation_and_rotation(seed, implementation):
    x = random(11, 5, seed=seed)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(seed))
    rotation = torch.linalg.qr(random(5, 5, seed=seed + 1)).Q
    y = contra_norm(x, 0.5, implementation=implementation)
    torch.testing.assert_close(contra_norm(x[order], 0.5, implementation=implementation), y[order])
    torch.testing.assert_close(contra_norm(x @ rotation, 0.5, implementation=implementation), y @ rotation)


@given(seeds, st.floats(0.05, 3.0))
@settings(max_examples=20, deadline=None)
def test_two_main_forms_differ_by_a_factor(seed, scale):
    x = random(9, 5, seed=seed)
    kept = contra_norm(x, scale, identity=True)
    plain = contra_norm(x, scale / (1 + scale), identity=False)
    torch.testing.assert_close(kept, (1 + scale) * plain)


def test_large_temperature_centres(oracle):
    x = random(9, 5)
    torch.testing.assert_close(
        contra_norm(x, 0.5, tau=1e9, identity=True), x + 0.5 * (x - x.mean(dim=0)), atol=1e-8, rtol=1e-8
    )


@pytest.mark.parametrize("implementation", EXACT)
def test_collapsed_input_is_centred(implementation):
    x = random(9, 1).abs() * random(1, 5, seed=2)  # all rows parallel
    y = contra_norm(x, 0.5, identity=True, implementation=implementation)
    torch.testing.assert_close(y, x + 0.5 * (x - x.mean(dim=0)))


@given(seeds, st.floats(0.05, 1.0))
@settings(max_examples=40, deadline=None)
def test_proposition_variance_does_not_fall(seed, scale):
    # ((1+s)I - sA)H: the variance does not fall if (I-eeᵀ)(I-A) + (I-A)ᵀ(I-eeᵀ) has no negative eigenvalue.
    n = 8
    x = random(n, 6, seed=seed)
    unit = torch.nn.functional.normalize(x, dim=1)
    attention = (unit @ unit.T).softmax(dim=1)
    centre = torch.eye(n, dtype=x.dtype) - 1 / n
    gap = torch.eye(n, dtype=x.dtype) - attention
    smallest = torch.linalg.eigvalsh(centre @ gap + gap.T @ centre).min()
    assert smallest >= -1e-12  # the premise
    assert feature_variance(contra_norm(x, scale, identity=True)) >= feature_variance(x) * (1 - 1e-12)


@given(seeds, st.floats(0.05, 1.0))
@settings(max_examples=40, deadline=None)
def test_proposition_effective_rank_rises(seed, scale):
    # ((1+s)I - s HHᵀ)H: the effective rank does not fall while 1 + (1 - σ_max²) s > 0.
    h = random(8, 6, seed=seed)
    h = h / torch.linalg.matrix_norm(h, 2) * 1.2
    assert 1 + (1 - 1.2**2) * scale > 0
    moved = (1 + scale) * h - scale * h @ h.T @ h
    assert effective_rank(moved) >= effective_rank(h) - 1e-9


def test_a_narrow_cone_opens():
    # Table of the method: on a 64 x 16 cone, larger scales lower the mean cosine and raise the effective rank.
    x = random(64, 16) * 0.15 + random(16, seed=9)
    outputs = [x, *(contra_norm(x, s, identity=True) for s in (0.2, 0.5, 1.0, 2.0))]
    cosines, ranks = [mean_cosine_similarity(y) for y in outputs], [effective_rank(y) for y in outputs]
    assert cosines == sorted(cosines, reverse=True) and cosines[0] - cosines[-1] > 0.05
    assert ranks == sorted(ranks) and ranks[-1] / ranks[0] > 1.3


@pytest.mark.parametrize("implementation", ["auto", *EXACT, "linear"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept_and_low_precision_is_computed_in_float32(implementation, dtype):
    x = random(3, 20, 8, dtype=torch.float32).to(dtype)
    y = contra_norm(x, 0.5, implementation=implementation)
    assert y.dtype == dtype
    exact = contra_norm(x.float(), 0.5, implementation=implementation)
    assert torch.equal(y, exact.to(dtype)) or dtype == torch.float64


@pytest.mark.parametrize("implementation", ["auto", *EXACT])
@pytest.mark.parametrize("axis", ["tokens", "features"])
def test_padding_neither_moves_nor_counts(implementation, axis):
    x, noise = random(2, 9, 5), random(2, 9, 5, seed=7)
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    other = torch.where(mask[..., None], x, noise)
    kwargs = dict(mask=mask, implementation=implementation, axis=axis)
    y, z = contra_norm(x, 0.5, **kwargs), contra_norm(other, 0.5, **kwargs)
    torch.testing.assert_close(y[mask], z[mask])
    assert torch.equal(y[~mask], x[~mask])
    torch.testing.assert_close(y[1, :4], contra_norm(x[1, :4], 0.5, axis=axis))


@pytest.mark.parametrize("implementation", ["plain", "fused", "blocked", "sdpa", "linear"])
def test_a_sample_that_is_all_padding_stays(implementation):
    x = random(2, 9, 5).requires_grad_()
    mask = torch.arange(9) < torch.tensor([[9], [0]])
    y = contra_norm(x, 0.5, mask=mask, implementation=implementation)
    assert torch.equal(y[1], x[1])
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


IMPLEMENTATIONS = ("auto", "plain", "fused", "blocked", "sdpa", "linear")
SET_FORMS = [{}, dict(pre_norm=True), dict(axis="features"), dict(identity=True)]
CASES = [*product(IMPLEMENTATIONS, SET_FORMS), *product(("auto", "plain", "blocked", "linear"), ["graph"])]


@pytest.mark.parametrize(("implementation", "form"), CASES, ids=str)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e300, 1e10])
def test_whatever_padding_holds_does_not_count(implementation, form, poison, edges):
    x, upstream = random(2, 9, 5).abs(), random(2, 9, 5, seed=1)
    mask = torch.arange(9) % 4 != 3
    if form == "graph":
        x, upstream, form = x[0], upstream[0], dict(exclude=edges(9))
    else:
        mask = torch.stack([mask, torch.ones(9, dtype=torch.bool)])
    if poison != torch.inf:  # as of a loss that reads the padding
        upstream = torch.where(mask.unsqueeze(-1), upstream, torch.nan)
    poisoned = torch.where(mask.unsqueeze(-1), x, poison)
    for scale in (0.5, torch.full((5,), 0.5, dtype=x.dtype)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # so few rows are none for the polynomial
            (want, clean), (got, gradient) = (
                value_and_gradient(
                    lambda x: contra_norm(x, scale, mask=mask, implementation=implementation, **form),  # noqa: B023
                    inputs,
                    upstream,
                )
                for inputs in (torch.where(mask.unsqueeze(-1), x, 0.0), poisoned)
            )
        assert want[mask].isfinite().all() and clean[mask].isfinite().all()
        torch.testing.assert_close(got[mask], want[mask])
        torch.testing.assert_close(gradient[mask], clean[mask])
        torch.testing.assert_close(got[~mask], poisoned[~mask], atol=0, rtol=0, equal_nan=True)


def test_padding_does_not_reach_a_learned_step():
    x, step = random(2, 5, 4), torch.full((4,), 0.3, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(5) < torch.tensor([[5], [3]])
    x[1, 3:] = torch.nan
    for implementation in ("auto", "plain", "fused", "blocked", "sdpa"):
        for form in ({}, dict(identity=True), dict(scaled_identity=True)):
            y = contra_norm(x, step, mask=mask, implementation=implementation, **form)
            assert torch.autograd.grad(y[mask].sum(), step)[0].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (0, 3), (2, 4, 0), (0, 0, 3)])
@pytest.mark.parametrize(("implementation", "form"), CASES, ids=str)
def test_empty_inputs_stay_empty(implementation, form, shape):
    if form == "graph":
        shape, form = shape[-2:], dict(exclude=torch.zeros(shape[-2], shape[-2]).to_sparse_csr())
    x = torch.zeros(shape, requires_grad=True)
    mask = torch.zeros(shape[:-1], dtype=torch.bool)
    for settings_ in (form, form | dict(mask=mask)):
        y = contra_norm(x, 0.5, implementation=implementation, **settings_)
        assert y.shape == x.shape and torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("implementation", ["plain", "fused", "blocked", "sdpa", "linear"])
def test_scaled_identity_is_the_released_learnable_form(implementation):
    x = random(2, 30, 5).abs() + 1
    for scale in (0.7, torch.linspace(0.1, 0.9, 5, dtype=torch.float64)):
        y = contra_norm(x, scale, scaled_identity=True, implementation=implementation)
        torch.testing.assert_close(y, contra_norm(x, scale, identity=True, implementation=implementation) - x)


@pytest.mark.parametrize("implementation", ["plain", "fused", "blocked", "sdpa", "linear"])
def test_zero_rows_stay_finite(implementation):
    x = random(9, 5)
    x[3] = 0
    x = x.requires_grad_()
    y = contra_norm(x, 0.5, implementation=implementation)
    assert y.isfinite().all() and torch.autograd.grad(y.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize(
    ("kwargs", "names"),
    [
        (dict(tau=0.0), "tau"),
        (dict(tau=-1.0), "tau must be > 0"),
        (dict(tau=float("nan")), "tau must be > 0"),
        (dict(tau=float("inf")), "tau must be finite"),
        (dict(tau="1"), "tau must be > 0, a number"),
        (dict(tau=None), "tau must be > 0, a number"),
        (dict(tau=torch.tensor(0.0)), "tau must be > 0"),
        (dict(tau=torch.ones(3)), "tau must be a number"),
        (dict(scale=0.0), "scale must be > 0, got 0.0: 0 would be no step"),
        (dict(scale=-0.5), "scale must be > 0"),
        (dict(scale=float("nan")), "scale must be > 0"),
        (dict(scale=float("inf")), "scale must be finite"),
        (dict(scale=None), "scale must be > 0, a number"),
        (dict(scale="0.1"), "scale must be > 0, a number"),
        (dict(scale=True), "scale must be > 0, a number"),
        (dict(scale=torch.tensor([0.1, 0.0, 0.1, 0.1])), "scale must be > 0"),
        (dict(scale=torch.tensor(torch.nan)), "scale must be > 0"),
        (dict(axis="rows"), "axis"),
        (dict(implementation="fast"), "implementation"),
        (dict(degree=3), "degree"),
        (dict(mask=torch.ones(2, 4, dtype=torch.bool)), "mask"),
        (dict(mask=torch.ones(2, 5)), "mask"),
        (dict(scale=torch.ones(3)), "scale"),
        (dict(exclude=torch.eye(5)), "exclude"),
        (dict(exclude=torch.eye(5).to_sparse_csr()), "exclude"),
        (dict(exclude=torch.eye(5).bool().to_sparse_coo()), "call .to_sparse_csr"),
        (dict(symmetric=True, implementation="sdpa"), "sdpa"),
        (dict(symmetric=True, implementation="fused"), "fused"),
    ],
)
def test_wrong_arguments_are_named(kwargs, names):
    kwargs = dict(kwargs)
    with pytest.raises(ValueError, match=names):
        contra_norm(random(2, 5, 4), kwargs.pop("scale", 0.5), **kwargs)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4, 5)])
def test_wrong_shapes_are_refused_with_the_reason(shape):
    with pytest.raises(ValueError, match="mix samples"):
        contra_norm(random(*shape), 0.5)


def test_integers_are_refused():
    with pytest.raises(ValueError, match="float"):
        contra_norm(torch.ones(3, 4, dtype=torch.long), 0.5)


def test_autocast_changes_no_sum_only_the_factors_of_products(monkeypatch):
    x = random(900, 16, dtype=torch.float32)
    exact = contra_norm(x, 1.0)
    for supported in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda s=supported: s)
        for implementation in ("plain", "fused", "blocked", "sdpa"):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = contra_norm(x, 1.0, implementation=implementation)
            assert y.dtype == torch.float32
            error = float((y - exact).norm() / exact.norm())
            assert error < (2e-2 if supported else 1e-6), (implementation, supported)
            assert error > (1e-5 if supported else -1)
