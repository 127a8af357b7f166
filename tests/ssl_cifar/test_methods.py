"""Checks of the methods' equations (A1-A5, B1-B5, C1, F1-F4), and that each has a setting that is its base."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from torch import Tensor
from torch.nn import functional as F

from SSL_cifar import methods
from SSL_cifar.methods.arcl import pair_similarity, swapped_nt_xent, worst_pair
from SSL_cifar.methods.base import Method, cosine_momentum, negative_cosine, nt_xent_terms
from SSL_cifar.methods.simclr_attn import box_overlap, rank_correlation

Build = Callable[..., Method]
SomeBatch = Callable[..., Any]


def loss_and_gradients(method: Method, views: list[Tensor], batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Of the parts that every method has: backbone and projector."""
    method.zero_grad()
    loss, _ = method.loss(method(views, batch), batch)
    loss.backward()
    named = [(k, p.grad) for k, p in method.named_parameters() if k.startswith(("backbone.", "projector."))]
    return loss.detach(), {name: gradient for name, gradient in named if gradient is not None}


def copy_weights(source: Method, target: Method) -> None:
    """Give `target` what both have."""
    theirs = source.state_dict()
    mine = target.state_dict()
    target.load_state_dict({k: theirs.get(k, v) if k.startswith(("backbone", "proj", "pred", "keys")) else v
                            for k, v in mine.items()})  # fmt: skip


def assert_same(one: Method, other: Method, views: list[Tensor], batch: Any, atol: float) -> None:
    """Equal loss, and equal gradients, none of them zero."""
    copy_weights(one, other)
    (a, grads), (b, theirs) = loss_and_gradients(one, views, batch), loss_and_gradients(other, views, batch)
    torch.testing.assert_close(a, b, rtol=0, atol=atol)
    assert grads.keys() == theirs.keys() and any(g.abs().max() > 1e-4 for g in grads.values())
    for name in grads:
        torch.testing.assert_close(grads[name], theirs[name], rtol=0, atol=atol)


# -- every method has a setting that is its base -----------------------------------------------------------------------

EQUALS = [  # method, its flags, base, the base's flags, tolerance
    ("simclr_attn", {"beta": 0.0}, "simclr", {}, 1e-12),
    ("simclr_attn", {"beta": 0.0, "align_only": True}, "simclr", {}, 1e-12),
    ("simclr_attn", {"beta": 0.0, "d_ratio": 0.0}, "simclr", {}, 1e-12),
    ("arcl", {"num_views": 2}, "simclr", {}, 1e-12),
    ("arcl", {"num_views": 2, "reading": "swap"}, "simclr", {}, 1e-12),
    ("arcl", {"num_views": 2, "align": "average"}, "simclr", {}, 1e-12),
    ("arcl", {"num_views": 2, "align": "average", "reading": "swap"}, "simclr", {}, 1e-12),
    ("arcl", {"num_views": 2, "recompute": True}, "simclr", {}, 1e-12),
    ("arcl", {"num_views": 2, "base": "moco"}, "moco", {"temperature": 0.5}, 1e-12),
    ("arcl", {"num_views": 2, "base": "moco", "align": "average"}, "moco", {"temperature": 0.5}, 1e-12),
]


@pytest.mark.parametrize(("name", "flags", "base", "base_flags", "atol"), EQUALS)
def test_a_setting_of_every_method_is_its_base(
    name: str, flags: dict[str, Any], base: str, base_flags: dict[str, Any], atol: float, build: Build,
    some_batch: SomeBatch,
) -> None:  # fmt: skip
    views, batch = some_batch()
    assert_same(build(base, **base_flags), build(name, **flags), views, batch, atol)


def test_every_method_of_the_folder_says_what_it_is() -> None:
    orders = [methods.load(name).Settings.ORDER for name in methods.NAMES]
    assert len(set(orders)) == len(orders) and all(orders)
    for name in methods.NAMES:
        kind = methods.load(name)
        assert kind.__doc__ and kind.Settings.__doc__


# -- SimSiam and SimSiam-Multi -----------------------------------------------------------------------------------------


def test_negative_cosine_is_lightlys_with_a_target_without_gradient() -> None:
    p, t = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(negative_cosine(p, t), NegativeCosineSimilarity()(p, t))
    assert torch.autograd.grad(negative_cosine(p, t), t, allow_unused=True)[0] is None


@pytest.mark.parametrize("content", [0.0, 7.0, "random"])
def test_a1_lambda_0_is_simsiam_bit_for_bit(content: Any, build: Build, some_batch: SomeBatch) -> None:
    views, batch = some_batch()
    multi = build("simsiam_multi", lam=0.0, plain_epochs=1, epochs=3)
    multi.epochs_done += 1
    past = multi.bank.past
    past.copy_(torch.randn_like(past) if content == "random" else torch.full_like(past, content))
    assert_same(build("simsiam"), multi, views, batch, 0.0)


def test_a2_raw_vectors_are_mixed(build: Build, some_batch: SomeBatch) -> None:
    multi = build("simsiam_multi", lam=0.5, plain_epochs=1, epochs=3, proj_output_dim=2)
    multi.epochs_done += 1
    _, batch = some_batch(size=2)
    multi.bank.past[batch.index] = torch.tensor([4.0, 3.0], dtype=torch.float64)
    p = torch.tensor([[1.0, 0.0]] * 2, dtype=torch.float64)
    for z, expected in (((3.0, 4.0), 0.7071), ((30.0, 40.0), 0.6202), ((0.6, 0.8), None)):
        rows = torch.tensor([[z, z]] * 2, dtype=torch.float64)
        mixed = -negative_cosine(p, multi.targets(rows, batch)[:, 0])
        if expected is not None:
            assert mixed == pytest.approx(expected, abs=1e-4)
    multi.bank.past[batch.index] = torch.tensor([0.8, 0.6], dtype=torch.float64)
    unit = torch.tensor([[[0.6, 0.8]] * 2] * 2, dtype=torch.float64)
    assert -negative_cosine(p, multi.targets(unit, batch)[:, 0]) == pytest.approx(0.7071, abs=1e-4)
    assert -negative_cosine(p, unit[:, 0]) == pytest.approx(0.6)


def test_a3_the_bank_is_read_as_the_last_epoch_left_it(build: Build, some_batch: SomeBatch) -> None:
    multi = build("simsiam_multi", plain_epochs=1, epochs=9)
    views, batch = some_batch()
    out = multi(views, batch)
    before = multi.bank.past.clone()
    multi.after_step(out, batch, 0.1)
    assert torch.equal(multi.bank.read(batch.index), before[batch.index])
    multi.after_epoch()
    assert torch.equal(multi.bank.read(batch.index), out["z"][:, 1])
    rest = torch.ones(40, dtype=torch.bool)
    rest[batch.index] = False
    assert torch.equal(multi.bank.past[rest], before[rest])


def test_a4_plain_epochs_then_mixed_also_after_a_checkpoint(build: Build, some_batch: SomeBatch) -> None:
    views, batch = some_batch()
    multi = build("simsiam_multi", plain_epochs=2, epochs=9)
    plain = build("simsiam")
    copy_weights(plain, multi)
    plain_loss, _ = loss_and_gradients(plain, views, batch)
    differs = []
    for _ in range(4):
        again = build("simsiam_multi", plain_epochs=2, epochs=9)
        again.load_state_dict(multi.state_dict())
        loss, _ = loss_and_gradients(again, views, batch)
        assert torch.equal(loss, loss_and_gradients(multi, views, batch)[0])
        differs.append(not torch.equal(loss, plain_loss))
        multi.after_step(multi(views, batch), batch, 0.1)
        multi.bank.present += 1.0
        multi.after_epoch()
    assert differs == [False, False, True, True]


def test_a5_no_gradient_through_targets_and_rows_stay_where_they_belong(build: Build, some_batch: SomeBatch) -> None:
    multi = build("simsiam_multi", plain_epochs=1, epochs=3)
    multi.epochs_done += 1
    views, batch = some_batch()
    out = {name: rows.detach().requires_grad_() for name, rows in multi(views, batch).items()}
    multi.loss(out, batch)[0].backward()
    assert out["z"].grad is None or not out["z"].grad.any()
    assert out["p"].grad.abs().max() > 0
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    for chosen in (torch.arange(8), order):
        batch_of = type(batch)(batch.index[chosen], batch.boxes, batch.flips, 0, 0, 8)
        multi.after_step({"z": out["z"].detach()[chosen]}, batch_of, 0.1)
        assert torch.equal(multi.bank.present[batch.index], out["z"][:, 1])


def test_a_banks_halves_are_saved_once_where_they_are_equal_and_bfloat16_is_half(build: Build) -> None:
    multi = build("simsiam_multi", plain_epochs=1, epochs=3)
    assert "bank.present" not in multi.state_dict()
    multi.bank.write(torch.tensor([3]), torch.ones(1, 6, dtype=torch.float64))
    saved = multi.state_dict()
    assert not torch.equal(saved["bank.present"], saved["bank.past"])
    other = build("simsiam_multi", plain_epochs=1, epochs=3)
    other.load_state_dict(saved)
    assert torch.equal(other.bank.present, multi.bank.present) and other.bank.dirty
    multi.bank.end_epoch()
    other.load_state_dict(multi.state_dict())
    assert torch.equal(other.bank.present, multi.bank.present) and torch.equal(other.bank.past, multi.bank.past)
    kind = methods.load("simsiam_multi")
    settings = kind.Settings(output_dir="x", method="simsiam_multi", bank_dtype="bfloat16")
    assert kind(settings, multi.backbone, 10).bank.past.dtype == torch.bfloat16


def test_simsiams_predictor_has_a_constant_rate_of_its_own(build: Build) -> None:
    method = build("simsiam", pred_lr_factor=10.0)
    rest, predictor = method.groups()
    assert predictor["constant"] and predictor["factor"] == 10.0
    assert len(rest["params"]) + len(predictor["params"]) == len(list(method.parameters()))


# -- SimCLR and SimCLR-Attn --------------------------------------------------------------------------------------------


def attention_loss(z: Tensor, u: Tensor, beta: float, tau: float = 0.5) -> Tensor:
    """Written out, row by row."""
    rows = [F.normalize(z[i, v], dim=0) for v in (0, 1) for i in range(len(z))]
    n, total, weights = len(z), 0.0, 0.0
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        denominator = sum(math.exp(float(rows[i] @ rows[j]) / tau) for j in range(2 * n) if j != i)
        term = -float(rows[i] @ rows[partner]) / tau + math.log(denominator)
        a = math.exp(beta * (1 + float(F.cosine_similarity(u[i % n, 0], u[i % n, 1], dim=0))))
        total, weights = total + a * term, weights + a
    return torch.tensor(total / weights, dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.0, 1.0, 4.0])
def test_attention_is_the_released_codes_formula(beta: float, build: Build, some_batch: SomeBatch) -> None:
    method = build("simclr_attn", beta=beta)
    views, batch = some_batch()
    out = {name: rows.detach() for name, rows in method(views, batch).items()}
    torch.testing.assert_close(method.loss(out, batch)[0], attention_loss(out["z"], out["h"], beta), rtol=0, atol=1e-12)


def test_nt_xent_is_lightlys() -> None:
    first, second = torch.randn(2, 9, 5, dtype=torch.float64)
    ours = sum(nt_xent_terms(first, second, 0.3)).mean()
    torch.testing.assert_close(ours, NTXentLoss(temperature=0.3)(first, second), rtol=0, atol=1e-12)


def test_b1_equal_similarities_and_infinite_beta(build: Build, some_batch: SomeBatch) -> None:
    views, batch = some_batch()
    z = build("simclr")(views, batch)["z"]
    plain = sum(nt_xent_terms(*z.unbind(1), 0.5))
    equal = build("simclr_attn", beta=3.0).loss({"z": z, "h": torch.ones(8, 2, 12, dtype=torch.float64)}, batch)[0]
    torch.testing.assert_close(equal, plain.mean(), rtol=0, atol=1e-12)
    u = torch.randn(8, 2, 12, dtype=torch.float64)
    best = F.cosine_similarity(u[:, 0], u[:, 1], dim=1).argmax()
    sharp = build("simclr_attn", beta=1e5).loss({"z": z, "h": u}, batch)[0]
    torch.testing.assert_close(sharp, (plain[best] + plain[best + 8]) / 2, rtol=0, atol=1e-9)


def test_b2_b3_b5_the_weights(build: Build) -> None:
    u = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    a = build("simclr_attn").weights(u)
    torch.testing.assert_close(2 * a[:2], torch.tensor([0.7310586, 0.2689414], dtype=torch.float64), rtol=0, atol=1e-7)
    for beta in (1.0, 4.0):
        method = build("simclr_attn", beta=beta)
        features = torch.rand(16, 2, 5, dtype=torch.float64)  # not negative, as after a ReLU
        a = method.weights(features)
        assert torch.equal(a[:16], a[16:])
        assert a.sum() == pytest.approx(1)
        assert a.max() / a.min() <= math.exp(beta) + 1e-12
    cosine = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close((cosine + 3).softmax(0), cosine.softmax(0), rtol=0, atol=1e-15)


def test_b4_no_gradient_through_the_weights(build: Build, some_batch: SomeBatch) -> None:
    views, batch = some_batch()
    for d_ratio in (-1.0, 0.0):
        method = build("simclr_attn", beta=2.0, d_ratio=d_ratio)
        z = method(views, batch)["z"].detach().requires_grad_()
        h = torch.randn(8, 2, 12, dtype=torch.float64, requires_grad=True)
        loss, _ = method.loss({"z": z, "h": h}, batch)
        got = torch.autograd.grad(loss, [z, h], allow_unused=True)
        assert got[1] is None
        a = method.weights(z.detach() if d_ratio == 0 else h.detach())
        frozen = (a * sum(nt_xent_terms(*z.unbind(1), 0.5))).sum()
        torch.testing.assert_close(got[0], torch.autograd.grad(frozen, z)[0], rtol=0, atol=1e-14)


def test_overlap_of_crops_and_spearmans_correlation() -> None:
    first = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.2, 0.2]])
    second = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.2, 0.2]])
    torch.testing.assert_close(box_overlap(first, second), torch.tensor([0.0625 / 0.4375, 1.0, 0.0]))
    x = torch.tensor([3.0, 1.0, 2.0, 5.0])
    assert rank_correlation(x, x.exp()) == pytest.approx(1) and rank_correlation(x, -x) == pytest.approx(-1)


# -- BYOL, MoCo, RDM ---------------------------------------------------------------------------------------------------


def test_the_average_follows_its_modules(build: Build, some_batch: SomeBatch) -> None:
    assert cosine_momentum(0.99, 0.0) == pytest.approx(0.99) and cosine_momentum(0.99, 1.0) == pytest.approx(1)
    views, batch = some_batch()
    byol = build("byol", base_tau_momentum=0.5)
    kept = [p.clone() for p in byol.momentum.parameters()]
    with torch.no_grad():
        for p in [*byol.backbone.parameters(), *byol.projector.parameters()]:
            p.add_(1.0)
    byol.after_step(byol(views, batch), batch, 1e-9)
    for before, after in zip(kept, byol.momentum.parameters(), strict=True):
        torch.testing.assert_close(after, before + 0.5, rtol=0, atol=1e-6)
        assert not after.requires_grad


def test_byols_loss_is_the_sum_of_both_directions(build: Build, some_batch: SomeBatch) -> None:
    views, batch = some_batch()
    byol = build("byol")
    out = byol(views, batch)
    pairs = ((out["p"][:, 0], out["target"][:, 1]), (out["p"][:, 1], out["target"][:, 0]))
    expected = sum((F.normalize(p, dim=1) - F.normalize(t, dim=1)).square().sum(1).mean() for p, t in pairs)
    torch.testing.assert_close(byol.loss(out, batch)[0], expected)


def test_mocos_loss_and_its_queue(build: Build, some_batch: SomeBatch) -> None:
    views, batch = some_batch()
    moco = build("moco", queue_size=10)
    out = moco(views, batch)
    logits = torch.cat(
        [(out["query"] * out["keys"][:, 0]).sum(1, keepdim=True), out["query"] @ moco.keys.queue.rows.T], 1
    )
    expected = F.cross_entropy(logits / 0.2, torch.zeros(8, dtype=torch.long))
    torch.testing.assert_close(moco.loss(out, batch)[0], expected)
    assert moco.loss(out, batch)[0].requires_grad and not out["keys"].requires_grad
    out = {name: rows.detach() for name, rows in out.items()}
    moco.after_step(out, batch, 0.1)
    moco.after_step(out, batch, 0.2)
    assert int(moco.keys.queue.place) == 6
    torch.testing.assert_close(moco.keys.queue.rows[[8, 9, 0, 1]], out["keys"][[0, 1, 2, 3], 0])


@pytest.mark.parametrize("size", [8, 4])  # more and fewer images than features
@pytest.mark.parametrize("location", ["online", "target"])
def test_c1_sigma_0_is_the_symmetric_network(location: str, size: int, build: Build, some_batch: SomeBatch) -> None:
    views, batch = some_batch(size=size)
    method = build("rdm_simsiam", sigma=0.0, pred_location=location)
    z1, z2 = method(views, batch)["z"].unbind(1)
    loss, gradients = loss_and_gradients(method, views, batch)
    plain = (negative_cosine(z1, z2) + negative_cosine(z2, z1)) / 2
    torch.testing.assert_close(loss, plain.detach(), rtol=0, atol=1e-12)
    theirs = torch.autograd.grad(plain, [p for k, p in method.named_parameters() if k in gradients])
    for mine, other in zip(gradients.values(), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_sigma_0_on_byol_is_byol_without_a_predictor(build: Build, some_batch: SomeBatch) -> None:
    views, batch = some_batch()
    byol = build("byol")
    byol.predictor = torch.nn.Identity()
    assert_same(byol, build("rdm_byol", sigma=0.0), views, batch, 1e-12)


@pytest.mark.parametrize(("location", "sigma", "sign"), [("target", -1.0, 1), ("target", -0.5, 1), ("online", 1.0, 1),
                                                         ("target", 1.0, -1), ("online", -0.5, -1)])  # fmt: skip
@pytest.mark.parametrize("name", ["rdm_simsiam", "rdm_byol"])
def test_the_sign_of_the_rank_difference(
    name: str, location: str, sigma: float, sign: int, build: Build, some_batch: SomeBatch
) -> None:
    from SSL_cifar.diagnostics import rank_difference

    views, batch = some_batch()
    method = build(name, pred_location=location, sigma=sigma, negative_control=sign < 0)
    plain = build(name, sigma=0.0)
    raw = rank_difference(*plain.online_target(plain(views, batch), batch))
    assert sign * (rank_difference(*method.online_target(method(views, batch), batch)) - raw) > 0.1


@pytest.mark.parametrize("rows", ["zero", "rank one", "constant"])
@pytest.mark.parametrize("flags", [{"sigma": -1.0, "pred_location": "target"}, {"pred_type": "log_1"}, {"sigma": 1.0}])
def test_a_collapsed_batch_gives_a_finite_loss(
    rows: str, flags: dict[str, Any], build: Build, some_batch: SomeBatch
) -> None:
    z = torch.zeros(8, 2, 6, dtype=torch.float64)
    if rows != "zero":
        z += torch.arange(6.0).double()
    if rows == "rank one":
        z *= torch.arange(1.0, 9).double().view(8, 1, 1)
    z.requires_grad_()
    method = build("rdm_simsiam", **flags)
    loss, _ = method.loss({"z": z}, some_batch()[1])
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.isfinite() and gradient.isfinite().all()


# -- ArCL --------------------------------------------------------------------------------------------------------------


def test_f2_worst_and_average_of_nested_views(build: Build) -> None:
    z = torch.randn(20, 6, 5, dtype=torch.float64)
    worst = torch.stack([pair_similarity(z[:, :m]).amin(dim=1) for m in range(2, 7)])
    assert (worst.diff(dim=0) <= 0).all() and (worst.diff(dim=0) < 0).any()
    angles = torch.tensor([0.9, 0.5, 0.2]).double()  # similarities of the pairs (1, 2), (1, 3), (2, 3)
    gram = torch.eye(3, dtype=torch.float64)
    gram[0, 1] = gram[1, 0] = angles[0]
    gram[0, 2] = gram[2, 0] = angles[1]
    gram[1, 2] = gram[2, 1] = angles[2]
    similarity = pair_similarity(torch.linalg.cholesky(gram)[None])
    assert similarity.amin() == pytest.approx(0.2) and similarity.mean() == pytest.approx(0.53333, abs=1e-5)
    assert [int(view) for view in worst_pair(torch.linalg.cholesky(gram)[None])] == [1, 2]


@pytest.mark.parametrize("reading", ["select", "swap"])
def test_f3_only_the_selected_views_get_a_gradient(reading: str, build: Build, some_batch: SomeBatch) -> None:
    _, batch = some_batch(views=4)
    method = build("arcl", num_views=4, reading=reading)
    z = torch.randn(8, 4, 6, dtype=torch.float64, requires_grad=True)
    loss, _ = method.loss({"z": z}, batch)
    (gradient,) = torch.autograd.grad(loss, z)
    first, second = worst_pair(z)
    used = torch.zeros(8, 4, dtype=torch.bool)
    used[torch.arange(8), first] = used[torch.arange(8), second] = True
    if reading == "swap":
        used[:, :2] = True  # the denominators
    assert not gradient[~used].any() and gradient[used].any()
    if reading == "select":
        shuffled = z[:, torch.tensor([2, 0, 3, 1])]
        torch.testing.assert_close(method.loss({"z": shuffled}, batch)[0], loss, rtol=0, atol=1e-12)


def test_f4_identical_views_are_all_alike(build: Build, some_batch: SomeBatch) -> None:
    _, batch = some_batch(views=4)
    one = torch.randn(8, 1, 6, dtype=torch.float64).expand(8, 4, 6)
    torch.testing.assert_close(pair_similarity(one), torch.ones(8, 6, dtype=torch.float64))
    plain = build("simclr").loss({"z": one[:, :2]}, batch)[0]
    for reading in ("select", "swap"):
        for align in ("worst", "average"):
            loss = build("arcl", num_views=4, reading=reading, align=align).loss({"z": one}, batch)[0]
            torch.testing.assert_close(loss, plain, rtol=0, atol=1e-12)


def test_swapping_keeps_the_negatives() -> None:
    first, second = torch.randn(2, 5, 4, dtype=torch.float64)
    own = F.cosine_similarity(first, second, dim=1)
    torch.testing.assert_close(swapped_nt_xent(first, second, own, 0.5), sum(nt_xent_terms(first, second, 0.5)).mean())


def test_recomputing_gives_the_gradient_of_all_views(build: Build, some_batch: SomeBatch) -> None:
    """In eval mode, where BatchNorm does not tell the views of a pass apart."""
    views, batch = some_batch(views=4)
    whole, again = build("arcl", num_views=4).eval(), build("arcl", num_views=4, recompute=True).eval()
    assert_same(whole, again, views, batch, 1e-12)


def test_moco_takes_the_least_similar_key_and_keeps_it(build: Build, some_batch: SomeBatch) -> None:
    views, batch = some_batch(views=3)
    method = build("arcl", base="moco", num_views=3)
    out = {name: rows.detach() for name, rows in method(views, batch).items()}
    similarity = torch.einsum("bd,bkd->bk", out["query"], out["keys"])
    least = similarity.argmin(dim=1)
    assert 0 < least.sum() < 8
    logits = torch.cat([similarity.amin(dim=1, keepdim=True), out["query"] @ method.keys.queue.rows.T], 1) / 0.5
    expected = F.cross_entropy(logits, torch.zeros(8, dtype=torch.long))
    torch.testing.assert_close(method.loss(out, batch)[0], expected)
    method.after_step(out, batch, 0.1)
    torch.testing.assert_close(method.keys.queue.rows[:8], out["keys"][torch.arange(8), least])
