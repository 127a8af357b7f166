"""Backbones, optimizers and rates, batches, k-NN and the linear probe, banks."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from SSL_cifar import backbones, methods
from SSL_cifar.banks import IndexBank, Queue
from SSL_cifar.evaluation import knn_predict, linear_probe
from SSL_cifar.main import parse
from SSL_cifar.optim import build_optimizer, rate_at, set_rates


def settings(line: str):
    return parse([*line.split(), "--output_dir=x"])


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_at_64_channels_a_resnet_is_timms(name: str) -> None:
    config = settings(f"--method simsiam --backbone {name} --stem imagenet")
    ours, theirs = backbones.build(config), timm.create_model(name, num_classes=0)
    assert ours.num_features == theirs.num_features
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


@pytest.mark.parametrize(("stem", "side"), [("cifar", 32), ("cifar_pad2", 34), ("s2", 16), ("imagenet", 8)])
def test_stems_and_width(stem: str, side: int) -> None:
    net = backbones.build(settings(f"--method simsiam --stem {stem} --width 8"))
    images = torch.randn(2, 3, 32, 32)
    assert net.maps(images, 1).shape == (2, 8, side, side)
    assert net.maps(images, 4).shape[1] == 64 == net(images).shape[1] == net.num_features
    last = [m for n, m in net.named_modules() if n.endswith("bn2")]
    assert all(not m.weight.any() for m in last)  # each block starts as the identity
    with pytest.raises(ValueError, match="stages 1 to 4"):
        net.maps(images, 5)


def test_vits() -> None:
    net = backbones.build(settings("--method simsiam --backbone vit_micro --patch_size 8"))
    assert net.patch_embed.num_patches == 16 and len(net.blocks) == 4 and net.num_features == 192
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 192)


def test_what_decays_and_what_does_not() -> None:
    for opt, kinds in (("sgd", {1e-5}), ("lars", {1e-5, 0.0}), ("larc", {1e-5, 0.0}), ("adamw", {1e-5, 0.0})):
        config = settings(f"--method byol --stem s2 --width 4 --proj_hidden_dim 8 --proj_output_dim 8 --opt {opt}")
        method = methods.load("byol")(config, backbones.build(config), 10)
        optimizer = build_optimizer(method, config)
        assert {group["weight_decay"] for group in optimizer.param_groups} == kinds
        flat = [p for g in optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]]
        assert all(p.dim() <= 1 for p in flat)
        trained = {id(p) for p in method.parameters() if p.requires_grad}
        assert sorted(trained) == sorted(id(p) for g in optimizer.param_groups for p in g["params"])
        assert optimizer.param_groups[0].get("trust_clip", opt == "larc") == (opt == "larc")


@pytest.mark.parametrize("opt", ["lars", "larc"])
def test_lars_adapts_without_decay(opt: str) -> None:
    """A gradient ten times as large moves a weight as far, and a bias ten times as far."""
    line = f"--method simsiam --stem s2 --width 4 --opt {opt} --weight_decay 0 --unscaled_lr --lr 1 --warmup_epochs 0"
    moved = []
    for scale in (100, 1000):
        torch.manual_seed(0)
        method = methods.load("simsiam")(settings(line), backbones.build(settings(line)), 10)
        optimizer = build_optimizer(method, settings(line))
        weight, bias = method.backbone.conv1.weight, method.backbone.bn1.weight
        before = [p.detach().clone() for p in (weight, bias)]
        weight.grad, bias.grad = torch.full_like(weight, scale), torch.full_like(bias, scale)
        optimizer.step()
        moved.append([float((p.detach() - old).norm()) for p, old in zip((weight, bias), before, strict=True)])
    assert moved[1] == pytest.approx([moved[0][0], 10 * moved[0][1]], rel=1e-3)


def test_the_rate_rises_and_falls_and_the_predictors_stays() -> None:
    config = settings("--method simsiam --stem s2 --width 4 --lr 0.5 --batch_size 512 --epochs 20 --pred_lr_factor 10")
    assert config.peak_lr == 1.0
    rates = [rate_at(config, step, 7) for step in range(140)]
    assert rates[0] == pytest.approx(3e-5) and rates[70] == pytest.approx(1.0) and rates[139] < 1e-3
    assert rates[105] == pytest.approx(0.5) and (torch.tensor(rates[:71]).diff() > 0).all()
    method = methods.load("simsiam")(config, backbones.build(config), 10)
    optimizer = build_optimizer(method, config)
    for step in (0, 70, 139):
        rate = set_rates(optimizer, config, step, 7)
        assert [group["lr"] for group in optimizer.param_groups] == [rate, 10.0]


def test_knn_is_the_vote_written_out() -> None:
    generator = torch.Generator().manual_seed(0)
    features, queries = (torch.randn(n, 5, generator=generator) for n in (60, 11))
    labels = torch.randint(0, 4, (60,), generator=generator)
    for query, found in zip(queries, knn_predict(features, labels, queries, 4, chunk=3), strict=True):
        cosine = F.cosine_similarity(query[None], features)
        votes = [0.0] * 4
        for place in cosine.argsort(descending=True)[:20].tolist():
            votes[int(labels[place])] += math.exp(float(cosine[place]) / 0.07)
        assert int(found) == max(range(4), key=votes.__getitem__)
    assert torch.equal(knn_predict(features, labels, features, 4, chunk=100), labels)  # itself is the nearest


def test_the_linear_probe_is_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator) * torch.tensor([1, 10, 0.1, 1, 1, 1]) + 3
    y = (x[:, 0] + 0.1 * x[:, 1] + torch.randn(200, generator=generator) > 3.3).long() + (x[:, 3] > 3.5).long()
    queries = torch.randn(500, 6, generator=generator) * torch.tensor([1, 10, 0.1, 1, 1, 1]) + 3
    standard = (x - x.mean(0)) / x.std(0)
    theirs = LogisticRegression(C=1.0, max_iter=500, tol=1e-8).fit(standard.numpy(), y.numpy())
    expected = theirs.predict(((queries - x.mean(0)) / x.std(0)).numpy())
    agree = (linear_probe((x, y), 3)(queries).numpy() == expected).mean()
    assert agree > 0.995
    constant = torch.cat([x, torch.ones(200, 1)], 1)  # a dead feature
    assert linear_probe((constant, y), 3)(constant).shape == (200,)


def test_a_queue_wraps_around_and_starts_at_unit_length() -> None:
    queue = Queue(5, 3)
    torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(5))
    for number in range(4):
        queue.push(torch.full((2, 3), float(number)))
    assert queue.rows[:, 0].tolist() == [2.0, 3.0, 3.0, 1.0, 2.0] and int(queue.place) == 3


def test_a_bank_of_bfloat16_reads_what_was_written_to_8_bits() -> None:
    bank = IndexBank(4, 3, torch.bfloat16)
    rows = torch.randn(2, 3)
    bank.write(torch.tensor([3, 1]), rows)
    assert not bank.read(torch.tensor([3])).any()
    bank.end_epoch()
    torch.testing.assert_close(bank.read(torch.tensor([3, 1])).float(), rows, rtol=1e-2, atol=0)
