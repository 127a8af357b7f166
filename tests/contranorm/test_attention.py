"""Remedies inside attention: the numbers of the papers' equations, slow oracles, padding, and vanilla's settings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from contranorm.attention import FusedAttention, attn_scale, feat_scale, gfsa, neutreno, resformer, token_mean
from contranorm.kernels import twice

N, D = 5, 4


def wave(rows: int, columns: int, offset: float) -> Tensor:
    """sin(1..rows*columns + offset) as one sequence and head, (1, 1, rows, columns), float64."""
    numbers = torch.arange(1, rows * columns + 1, dtype=torch.float64) + offset
    return torch.sin(numbers).reshape(1, 1, rows, columns)


Q, K, V, V0 = wave(N, D, 0), wave(N, D, 0.5), wave(N, D, 1), wave(N, D, 2)


def number(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def draw(heads: int = 3, batch: int = 2, seed: int = 0) -> list[Tensor]:
    """Queries, keys, values and first values, (B, H, N, D), float64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, N, D, dtype=torch.float64, generator=generator) for _ in range(4)]


def per_head(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def of(form: str, lamb: Tensor | None = None) -> Callable[..., Tensor]:
    """The form as a function of q, k, v, v0 and a mask, away from vanilla."""
    lamb = per_head(0.3, -0.2, 0.7) if lamb is None else lamb
    return {
        "attn_scale": lambda q, k, v, v0, mask=None: attn_scale(q, k, v, lamb, mask),
        "gfsa": lambda q, k, v, v0, mask=None: gfsa(q, k, v, lamb, mask, order=3, w0=-0.1),
        "neutreno": lambda q, k, v, v0, mask=None: neutreno(q, k, v, v0, 0.6, mask),
        "resformer": lambda q, k, v, v0, mask=None: resformer(q, k, v, v0, 0.4, mask),
    }[form]


FORMS = ("attn_scale", "gfsa", "neutreno", "resformer")


# -- the equations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (FusedAttention(Q, K), 0.620548292),
        (lambda v: attn_scale(Q, K, v, number(0.3)), 0.787183924),
        (lambda v: feat_scale(FusedAttention(Q, K)(v)[0], number(0.2), number(0.4))[None], 0.853074754),
        (lambda v: feat_scale(FusedAttention(Q, K)(v)[0], number(0.2), number(0.4), doubled=True)[None], 1.085601217),
        (lambda v: gfsa(Q, K, v, number(0.3), order=4), 0.568646601),
        (lambda v: neutreno(Q, K, v, V0, 0.6), 0.159641841),
        (lambda v: resformer(Q, K, v, V0), 0.453890260),
    ],
    ids=["attention", "attn_scale", "feat_scale", "feat_scale doubled", "gfsa", "neutreno", "resformer"],
)
def test_known_numbers(form: Callable[[Tensor], Tensor], expected: float) -> None:
    assert form(V)[0, 0, 0, 0].item() == pytest.approx(expected, abs=1e-9)


def matrices(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """A and the identity, (B, H, N, N)."""
    a = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return a, torch.eye(q.shape[-2], dtype=q.dtype).expand_as(a)


def test_the_released_matrices() -> None:
    """With the identity as values a form puts out its matrix A'; the releases store that one."""
    q, k, *_ = draw()
    a, eye = matrices(q, k)
    lamb = per_head(0.3, -1.0, 0.7)[:, None, None]
    scaled = attn_scale(q, k, eye, lamb.flatten())
    torch.testing.assert_close(scaled, 1 / N + (1 + lamb) * (a - 1 / N))
    torch.testing.assert_close(scaled.sum(-1), torch.ones_like(scaled[..., 0]))
    torch.testing.assert_close(scaled[:, 1], torch.full_like(scaled[:, 1], 1 / N))  # λ = -1 leaves the mean
    for order in (2, 3, 10):
        filtered = gfsa(q, k, eye, lamb.flatten(), order=order, w0=0.1, w1=0.8)
        expected = 0.1 * eye + 0.8 * a + lamb * (a + (order - 1) * (a @ a - a))
        torch.testing.assert_close(filtered, expected)
        torch.testing.assert_close(filtered.sum(-1), (0.9 + lamb[..., 0]).expand_as(filtered[..., 0]))


def test_gfsa_cannot_undo_a_full_collapse() -> None:
    q, k, v, _ = draw()
    out = gfsa(torch.zeros_like(q), k, v, per_head(0.3, -2.0, 5.0))  # a uniform A
    torch.testing.assert_close(out, out[..., :1, :].expand_as(out))


def test_feat_scale_weighs_mean_and_rest() -> None:
    o = draw()[0][:, 0]  # (B, N, D)
    mean = o.mean(1, keepdim=True)
    t1, t2 = per_head(0.1, -0.2, 0.3, -1.0), per_head(0.4, 0.5, -0.6, 0.0)
    torch.testing.assert_close(feat_scale(o, t1, t2), o + t1 * mean + t2 * (o - mean))
    torch.testing.assert_close(feat_scale(o, t1, t2, doubled=True), feat_scale(o, 2 * t1, 2 * t2))
    alone = feat_scale(o, -torch.ones(D, dtype=o.dtype), torch.zeros(D, dtype=o.dtype))
    torch.testing.assert_close(alone.mean(1), torch.zeros_like(alone[:, 0]))


def test_with_the_identity_for_attention_resformer_is_neutreno() -> None:
    q, k, v, v0 = draw()
    identity = lambda *_: lambda values: values  # noqa: E731
    one = resformer(q, k, v, v0, attend=identity)
    torch.testing.assert_close(one, neutreno(q, k, v, v0, 0.5, attend=identity))


def test_gfsas_order_is_at_least_two() -> None:
    with pytest.raises(ValueError, match="order must be at least 2, got 1"):
        gfsa(Q, K, V, number(0.3), order=1)


# -- what every form must keep -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients(form: str, masked: bool) -> None:
    inputs = [x.requires_grad_() for x in draw()]
    mask = torch.ones(2, N, dtype=torch.bool)
    mask[0, 3:] = False
    lamb = per_head(0.3, -0.2, 0.7).requires_grad_()
    function = lambda q, k, v, v0, lamb: of(form, lamb)(q, k, v, v0, mask if masked else None)  # noqa: E731
    assert torch.autograd.gradcheck(function, (*inputs, lamb))


def test_gradients_of_feat_scale() -> None:
    o = draw()[0][:, 0].requires_grad_()
    t1, t2 = (per_head(0.1, -0.2, 0.3, 0.4).requires_grad_() for _ in range(2))
    mask = torch.tensor([[True] * N, [True] * 2 + [False] * 3])
    for doubled in (False, True):
        assert torch.autograd.gradcheck(partial(feat_scale, mask=mask, doubled=doubled), (o, t1, t2))


@pytest.mark.parametrize("form", FORMS)
def test_padding_and_the_rest_of_the_batch_do_not_move_a_sequence(form: str) -> None:
    inputs = draw()
    alone = of(form)(*(x[:1, :, :3] for x in inputs))
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * N])
    for scale in (1.0, 100.0):  # what padding holds does not matter
        padded = [torch.cat([x[:, :, :3], scale * x[:, :, 3:]], dim=2) for x in inputs]
        torch.testing.assert_close(of(form)(*padded, mask)[:1, :, :3], alone)


def test_padding_does_not_move_feat_scale() -> None:
    o, t = draw()[0][:, 0], per_head(0.1, -0.2, 0.3, 0.4)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * N])
    torch.testing.assert_close(feat_scale(o, t, 2 * t, mask)[0, :3], feat_scale(o[:1, :3], t, 2 * t)[0])


@pytest.mark.parametrize("masked", [False, True])
def test_the_vanilla_setting_is_attention_bit_for_bit(masked: bool) -> None:
    zeros = torch.zeros(3, dtype=torch.float64)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * N]) if masked else None
    settings: list[Callable[..., Tensor]] = [
        lambda q, k, v, v0: FusedAttention(q, k, mask)(v),
        lambda q, k, v, v0: attn_scale(q, k, v, zeros, mask),
        lambda q, k, v, v0: gfsa(q, k, v, zeros, mask),
        lambda q, k, v, v0: neutreno(q, k, v, v0, 0.0, mask),
        lambda q, k, v, v0: resformer(q, k, v, v0, 0.0, mask),
        lambda q, k, v, v0: feat_scale(FusedAttention(q, k, mask)(v), torch.zeros(D).double(), torch.zeros(D).double()),
    ]
    results = []
    for setting in settings:
        inputs = [x.requires_grad_() for x in draw()]
        out = setting(*inputs)
        (out * wave(N, D, 3)).sum().backward()
        results.append([out, *(x.grad for x in inputs[:3])])
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], found, strict=True))


def test_one_a_for_both_products_of_gfsa(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel for CPUs against two calls of attention, values and gradients, a few heads at a time."""
    monkeypatch.setattr(twice, "CHUNK", 4 * N * N)  # 6 heads are two parts of unequal size
    q, k, v, _ = draw()
    found = []
    for shared in (True, False):
        monkeypatch.setattr(twice, "serves", lambda *_, shared=shared: shared)
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = gfsa(*inputs, per_head(0.3, -0.2, 0.7))
        found.append([out, *torch.autograd.grad((out * wave(N, D, 3)).sum(), inputs)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.equal(found[0][0], found[1][0])  # it was the kernel


def test_transforms_and_compilers_get_two_calls() -> None:
    q, k, v, _ = draw()
    w = per_head(0.3, -0.2, 0.7)
    one = torch.func.grad(lambda q: gfsa(q, k, v, w).sum())(q)
    (other,) = torch.autograd.grad(gfsa(q.requires_grad_(), k, v, w).sum(), q)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_stays_half(form: str) -> None:
    exact = of(form)(*draw())
    half = of(form, per_head(0.3, -0.2, 0.7).float())(*(x.bfloat16() for x in draw()))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), exact, atol=0.1, rtol=0.1)


def test_gfsa_differentiates_twice_on_a_cpu():
    q, k, v = (torch.randn(2, 3, 6, 4, dtype=torch.float64).requires_grad_() for _ in range(3))
    w = torch.full((3,), 0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(gfsa, (q, k, v, w))
    (slope,) = torch.autograd.grad(gfsa(q, k, v, w).sum(), q, create_graph=True)
    assert slope.requires_grad


def test_gfsa_under_autocast_takes_queries_of_another_dtype():
    q, k = (torch.randn(1, 2, 6, 4) for _ in range(2))
    v, w = torch.randn(1, 2, 6, 4).bfloat16(), torch.full((2,), 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gfsa(q, k, v, w)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), gfsa(q, k, v.float(), w), rtol=0.05, atol=0.05)


def test_a_masked_mean_of_halves_does_not_overflow():
    x, every = torch.full((1, 512, 2), 200.0).half(), torch.ones(1, 512, dtype=torch.bool)
    assert torch.equal(token_mean(x, every), token_mean(x))
