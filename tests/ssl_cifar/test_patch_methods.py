"""Methods on patches: masks, objectives against their definitions, what each must not depend on, equal bases."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from SSL_cifar import patches, tokens
from SSL_cifar.evaluation import Evaluation
from SSL_cifar.methods import load
from SSL_cifar.methods.base import Batch

SIZE, PATCH, T = 12, 4, 9


def batch_of(rows: int, *, seed: int = 0, first: int = 0, total: int | None = None) -> Batch:
    index = torch.arange(rows)
    return Batch(index, torch.zeros(rows, 1, 4), torch.zeros(rows, 1).bool(), seed, first, total or rows)


@pytest.fixture(scope="module")
def centres(tmp_path_factory):
    """A function K → file of K random centres of 4 x 4 pixels."""
    folder = tmp_path_factory.mktemp("centres")

    def make(k: int = 6, permutation=None, **changes) -> str:
        values = torch.randn(k, 3 * PATCH**2, generator=torch.Generator().manual_seed(0))
        values = values if permutation is None else values[permutation]
        common = dict(zip(("mean", "std"), tokens.statistics(settings_of("mae")), strict=True))
        header = tokens.Header("pixel", k, PATCH, *common.values(), False)._replace(**changes)
        path = folder / f"{k}-{permutation}-{len(changes)}.safetensors"
        tokens.save_tokenizer(path, tokens.Tokenizer(tokens.Patches(header), values))
        return str(path)

    return make


def settings_of(name: str, **flags):
    common = {"backbone": "vit_micro", "crop_size": SIZE, "patch_size": PATCH, "augment": "mae", "output_dir": "x"}
    if issubclass(load(name).Settings, load("mae").Settings):
        common |= {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    return load(name).Settings(method=name, **common | flags)


def build(name: str, *, seed: int = 0, **flags):
    """The method on a small ViT, in float64."""
    settings = settings_of(name, **flags)
    torch.manual_seed(seed)
    options = {"global_pool": "token"} | settings.vit_options()
    vit = VisionTransformer(
        img_size=SIZE, patch_size=PATCH, embed_dim=24, depth=2, num_heads=2, num_classes=0, **options
    )
    return load(name)(settings, vit, images=100).double()


def images(rows: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(method, x, batch=None) -> torch.Tensor:
    batch = batch or batch_of(len(x))
    return method.loss(method([x], batch), batch)[0]


def gradients(method, x) -> dict[str, torch.Tensor]:
    method.zero_grad()
    loss_of(method, x).backward()
    return {name: p.grad for name, p in method.named_parameters() if p.grad is not None}


def flags_of(name: str, centres) -> dict:
    return {} if name == "mae" else {"center_path": centres()}


METHODS = ("mae", "cluster_mim", "ar", "dar", "vlm")


# -- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [patches.random_masks, patches.suffix_masks])
def test_masks_hide_the_share_that_was_drawn(draw):
    fixed = draw(50, 16, 0.75, 0.75, torch.Generator().manual_seed(0))
    assert (fixed.sum(dim=1) == 12).all()
    counts = draw(4000, 16, 0.1, 0.9, torch.Generator().manual_seed(0)).sum(dim=1)
    assert counts.min() == 2 and counts.max() == 14
    assert counts.double().mean() == pytest.approx(8, abs=0.15)
    assert (draw(20, 16, 0.01, 0.01, torch.Generator().manual_seed(0)).sum(dim=1) == 1).all()


def test_random_masks_are_uniform_and_suffixes_are_not():
    masks = patches.random_masks(6000, 4, 0.5, 0.5, torch.Generator().manual_seed(0))
    sets = {tuple(row): 0 for row in masks.tolist()}
    assert len(sets) == 6
    assert masks.double().mean(dim=0).tolist() == pytest.approx([0.5] * 4, abs=0.03)
    suffix = patches.suffix_masks(5, 4, 0.5, 0.5, torch.Generator().manual_seed(0))
    assert suffix.tolist() == [[False, False, True, True]] * 5


def test_counts_follow_round_to_the_nearest_as_the_check_does():
    for ratio, count in itertools.product((0.15, 0.35, 0.5, 0.75), (4, 9, 10, 14, 16, 196)):
        masks = patches.random_masks(3, count, ratio, ratio, torch.Generator().manual_seed(0))
        assert (masks.sum(dim=1) == patches.masked_count(ratio, count)).all()


# -- masked autoencoder and ClusterMIM: D3, D4 -----------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_the_first_loss_is_that_of_a_guess(name, centres):  # D3
    method = build(name, **flags_of(name, centres))
    found = loss_of(method, images(32)).item()
    if name == "mae":
        assert found == pytest.approx(1, rel=0.05)  # pixels of variance 1
    else:
        assert found == pytest.approx(math.log(6), rel=0.05)


def test_cluster_mim_starts_at_log_k(centres):  # D3
    method = build("cluster_mim", center_path=centres(50))
    assert loss_of(method, images(32)).item() == pytest.approx(math.log(50), rel=0.05)


def hidden(method, rows: int) -> torch.Tensor:
    ratio = method.settings.mask_ratio
    return patches.random_masks(rows, T, ratio, ratio, batch_of(rows).generator())


@pytest.mark.parametrize("name", ["mae", "cluster_mim"])
def test_only_hidden_patches_are_targets_and_only_others_are_seen(name, centres):  # D3
    method, x = build(name, **flags_of(name, centres)), images()
    before, mask = loss_of(method, x), hidden(method, len(x))
    predicted = torch.randn(len(x), T, method.outputs(), dtype=torch.float64)
    other = x.clone()
    for row, t in (~mask).nonzero().tolist():  # new pixels in every visible patch
        top, left = PATCH * (t // 3), PATCH * (t % 3)
        other[row, :, top : top + PATCH, left : left + PATCH] = 9 * torch.randn(3, PATCH, PATCH)
    losses = [patches.masked_mean(method.patch_loss(predicted, images), mask) for images in (x, other)]
    assert torch.equal(*losses)
    changed = method.patch_loss(predicted, x) != method.patch_loss(predicted, other)
    assert changed.any() and not changed[mask].any()
    hidden_changed = torch.where(F.interpolate(mask.reshape(-1, 1, 3, 3).double(), scale_factor=PATCH) > 0, -x, x)
    method.patch_loss = lambda predicted, images: predicted.square().sum(dim=2)
    torch.testing.assert_close(loss_of(method, hidden_changed), loss_of(method, x), rtol=0, atol=0)
    assert before.isfinite()


def test_one_token_gives_no_loss_and_no_gradient(centres):  # D4
    method = build("cluster_mim", center_path=centres(1))
    assert loss_of(method, images()).item() == 0
    assert all(not gradient.any() for gradient in gradients(method, images()).values())


def test_the_order_of_centres_is_the_order_of_logits(centres):  # D4
    order = [3, 0, 5, 1, 4, 2]
    plain, permuted = build("cluster_mim", center_path=centres()), build("cluster_mim", center_path=centres(6, order))
    with torch.no_grad():
        permuted.predict.weight.copy_(plain.predict.weight[order])
        permuted.predict.bias.copy_(plain.predict.bias[order])
    torch.testing.assert_close(loss_of(permuted, images()), loss_of(plain, images()))


def test_label_smoothing_is_the_mean_over_classes(centres):
    method = build("cluster_mim", center_path=centres(), label_smoothing=0.1)
    logits, x = torch.randn(2, T, 6, dtype=torch.float64), images(2)
    log_p, target = logits.log_softmax(dim=2), method.tokenizer(x)
    expected = -0.9 * log_p.gather(2, target.unsqueeze(2)).squeeze(2) - 0.1 * log_p.mean(dim=2)
    torch.testing.assert_close(method.patch_loss(logits, x), expected)


def test_normalized_pixels():
    method, x = build("mae", norm_pix_loss=True), images()
    predicted = torch.zeros(len(x), T, 48, dtype=torch.float64)
    torch.testing.assert_close(
        method.patch_loss(predicted, x), torch.full((len(x), T), 47 / 48).double(), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(
        method.patch_loss(predicted, 5 * x + 3), method.patch_loss(predicted, x), rtol=1e-4, atol=0
    )


# -- autoregressive: E1, E2, E4 --------------------------------------------------------------------------------------


def test_one_offset_is_ar(centres):  # E1
    ar, dar = build("ar", center_path=centres()), build("dar", center_path=centres(), offsets=1)
    x = images()
    assert torch.equal(loss_of(ar, x), loss_of(dar, x))
    mine, theirs = gradients(ar, x), gradients(dar, x)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_dar_by_its_definition(centres):
    method, x = build("dar", center_path=centres(), offsets=3), images(2)
    states, y = method.states(x), method.tokenizer(x)
    losses = []
    for row in range(2):
        of_offsets = []
        for k in range(1, 4):
            terms = [
                -method.heads[k - 1](states[row, s]).log_softmax(dim=0)[y[row, s + k]] for s in range(T - k)
            ]  # T - k of them
            of_offsets.append(sum(terms) / (T - k))
        losses.append(sum(of_offsets) / 3)
    torch.testing.assert_close(loss_of(method, x), sum(losses) / 2)


def test_a_drawn_offset_has_the_same_loss_in_expectation(centres, monkeypatch):  # E1
    everything = build("dar", center_path=centres(), offsets=3)
    drawn, x = build("dar", center_path=centres(), offsets=3, draw_offset=True), images()
    by_offset = []
    for k in range(3):
        monkeypatch.setattr(torch, "randint", lambda high, size, generator, k=k: torch.full(size, k))
        by_offset.append(loss_of(drawn, x))
    monkeypatch.undo()
    torch.testing.assert_close(sum(by_offset) / 3, loss_of(everything, x))
    weights = drawn.offset_weights(batch_of(3000))
    assert (weights.sum(dim=1) == 1).all() and weights.mean(dim=0).tolist() == pytest.approx([1 / 3] * 3, abs=0.03)
    assert set(gradients(drawn, x)) == set(gradients(everything, x))  # every head takes part in every step


def test_number_of_targets(centres):  # E1: 4 + 3 for T = 5 and K = 2
    method, x = build("dar", center_path=centres(), offsets=2), images()
    states, y = method.states(x)[:, :5], method.tokenizer(x)[:, :5]
    assert [method.nll(states, y, k).shape[1] for k in (1, 2)] == [4, 3]


def test_distinct_pairs_of_context_and_target():  # E2, T = 4
    def offsets(k):
        return {(tuple(range(s)), s + j - 1) for j in range(1, k + 1) for s in range(1, 5 - j)}

    def masked(sizes):
        every = [torch.tensor(m) for m in itertools.product([False, True], repeat=4) if sum(m) in sizes]
        return {(tuple((~m).nonzero().flatten().tolist()), i) for m in every for i in m.nonzero().flatten().tolist()}

    assert [len(offsets(1)), len(offsets(3))] == [3, 6]
    assert [len(masked({n})) for n in (1, 2, 3)] == [4, 12, 12]
    assert len(masked({1, 2, 3})) == 28
    # Those are the masks that are drawn.
    for low, high, sizes in ((0.5, 0.5, {2}), (0.25, 0.75, {1, 2, 3})):
        drawn = patches.random_masks(3000, 4, low, high, torch.Generator().manual_seed(0))
        assert {tuple(row) for row in drawn.tolist()} == {
            m for m in itertools.product([False, True], repeat=4) if sum(m) in sizes
        }


@pytest.mark.parametrize("name", ["ar", "dar"])
def test_states_see_nothing_of_what_follows(name, centres):  # E4
    method, x = build(name, center_path=centres()), images()
    other = x.clone()
    other[:, :, 4:8, 4:8] += 1  # patch 4 of 9
    before, after = method.states(x), method.states(other)
    assert torch.equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] != after[:, 4:]).any(dim=2).all()
    assert method.features(x).shape == (4, 24)


# -- masked tokens: E3, E4 -------------------------------------------------------------------------------------------


def test_a_uniform_number_of_hidden_tokens_is_the_mean_over_orders():
    """E3: T times the expected loss is the negative log-likelihood by permutations, for a random table of conditionals.

    The table has, for each position, set of visible positions, and their values: -log P of each value (27 entries for
    two values and T = 3).
    """
    generator = torch.Generator().manual_seed(0)
    t, y = 3, (1, 0, 1)
    sets = [s for size in range(t) for s in itertools.combinations(range(t), size)]
    table = {
        (i, s, values): -torch.rand((), generator=generator, dtype=torch.float64).log()
        for s in sets
        for i in range(t)
        if i not in s
        for values in itertools.product((0, 1), repeat=len(s))
    }
    assert len(table) == 27

    def nll(i, seen):
        return table[i, seen, tuple(y[j] for j in seen)]

    losses = []
    for size in range(1, t + 1):
        of_size = []
        for mask in (m for m in itertools.product([False, True], repeat=t) if sum(m) == size):
            seen = tuple(i for i in range(t) if not mask[i])
            values = torch.stack([nll(i, seen) if mask[i] else torch.tensor(7.0).double() for i in range(t)])
            of_size.append(patches.masked_mean(values[None], torch.tensor([mask]))[0])
        losses.append(sum(of_size) / len(of_size))
    orders = list(itertools.permutations(range(t)))
    expected = sum(nll(order[n], tuple(sorted(order[:n]))) for order in orders for n in range(t)) / len(orders)
    assert (t * sum(losses) / t).item() == pytest.approx(expected.item(), abs=1e-12)


def fixed_length_loss(method, x, mask):
    """The usual objective: one share of hidden tokens, mean over them."""
    y = method.tokenizer(x)
    logits = method.head(method.encode(x, mask=mask))
    count = int(mask[0].sum())
    chosen = logits[mask].log_softmax(dim=1).gather(1, y[mask].unsqueeze(1)).reshape(len(x), count)
    return -chosen.mean()


def test_equal_shares_are_the_fixed_length_objective(centres):  # E4
    method, x = build("vlm", center_path=centres(), mask_ratio_min=0.5, mask_ratio_max=0.5), images()
    mask = patches.random_masks(len(x), T, 0.5, 0.5, batch_of(len(x)).generator())
    expected = fixed_length_loss(method, x, mask)
    torch.testing.assert_close(loss_of(method, x), expected)
    method.zero_grad()
    expected.backward()
    theirs = {name: p.grad.clone() for name, p in method.named_parameters()}
    mine = gradients(method, x)
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("suffix", [False, True])
def test_hidden_patches_are_not_seen(suffix, centres):
    method, x = build("vlm", center_path=centres(), hide_suffix=suffix), images(8)
    mask = method.draw(batch_of(8))
    assert len(set(mask.sum(dim=1).tolist())) > 1
    other = torch.where(F.interpolate(mask.reshape(-1, 1, 3, 3).double(), scale_factor=PATCH) > 0, -x, x)
    y = method.tokenizer(x)
    assert torch.equal(method.nll(x, y, mask), method.nll(other, y, mask))


@pytest.mark.parametrize("name", ["ar", "dar", "vlm"])
def test_likelihood_of_each_token_given_its_prefix(name, centres):
    method, x = build(name, center_path=centres()), images()
    found = method.likelihood(x)
    assert found.shape == (4, T - 1) and (found > 0).all()
    other = x.clone()
    other[:, :, 8:, 8:] *= -1  # the last patch
    y = method.tokenizer(x)
    before, after = (method.likelihood(z) for z in (x, other))
    assert torch.equal(before[:, :-1], after[:, :-1])
    if name != "vlm":
        logits = method.heads[0](method.states(x))
        torch.testing.assert_close(found[:, 2], -logits[:, 2].log_softmax(1).gather(1, y[:, 3:4])[:, 0])
    else:
        mask = torch.arange(T) >= 3
        logits = method.head(method.encode(x, mask=mask.expand(4, -1)))
        torch.testing.assert_close(found[:, 2], -logits[:, 3].log_softmax(1).gather(1, y[:, 3:4])[:, 0])


@pytest.mark.parametrize("name", ["ar", "dar", "vlm"])
def test_layers_end_with_the_features(name, centres):
    method, x = build(name, center_path=centres()), images()
    layers = method.layers(x)
    assert layers.shape == (4, 2, 24)
    torch.testing.assert_close(layers[:, -1], method.features(x))
    assert not torch.equal(layers[:, 0], layers[:, 1])
    assert build("mae").layers(x) is None


def test_the_best_layer_is_chosen_without_the_test_images(centres, monkeypatch):
    """Of three layers the second tells the classes apart; the third does so on the test images alone."""
    evaluation = Evaluation.__new__(Evaluation)
    evaluation.config, evaluation.device, evaluation.classes = settings_of("mae"), torch.device("cpu"), 2
    evaluation.train, evaluation.test = "train", "test"
    generator = torch.Generator().manual_seed(0)

    def features(method, half, *, layers):
        labels = torch.arange(200) % 2
        x = torch.randn(200, 3, 5, generator=generator)
        x[:, 1 if half == "train" else 2] += 2 * labels.unsqueeze(1)
        x[:, 1] += labels.unsqueeze(1) * (half == "test")
        return x, labels

    monkeypatch.setattr(evaluation, "features", features, raising=False)
    found = evaluation.best_layer(build("ar", center_path=centres()).float())
    assert found["best_layer"] == 2 and 0.6 < found["linear_accuracy_best_layer"] < 1
    assert evaluation.best_layer(build("mae").float()) == {}


# -- every method ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_is_a_function_of_the_step_for_any_share_of_its_batch(name, centres):
    """Two processes with half the rows each draw the same masks as one: the mean of their row losses is the loss."""
    method, x = build(name, **flags_of(name, centres)), images(6)
    whole = method([x], batch_of(6, seed=5))["row_loss"]
    halves = [method([x[s : s + 3]], batch_of(3, seed=5, first=s, total=6))["row_loss"] for s in (0, 3)]
    torch.testing.assert_close(torch.cat(halves), whole, rtol=1e-12, atol=1e-12)
    assert torch.equal(method([x], batch_of(6, seed=5))["row_loss"], whole)
    if name in ("mae", "cluster_mim", "vlm"):
        assert not torch.equal(method([x], batch_of(6, seed=6))["row_loss"], whole)


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_is_trained_and_the_state_has_each_once(name, centres):
    method = build(name, **flags_of(name, centres))
    found = gradients(method, images())
    expected = {name for name, p in method.named_parameters() if p.requires_grad}
    assert set(found) == expected
    pointers = [t.data_ptr() for t in method.state_dict().values()]
    assert len(set(pointers)) == len(pointers)
    assert method.views == 1 and method.features(images()).shape == (4, 24)


@pytest.mark.parametrize("name", METHODS)
def test_under_autocast_row_losses_are_float32(name, centres):
    method, x = build(name, **flags_of(name, centres)).float(), images().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = method([x], batch_of(4))["row_loss"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, method([x], batch_of(4))["row_loss"], rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("mae", {"mask_ratio": 1.0}, "--mask_ratio 1 hides all of 9 tokens"),
        ("mae", {"mask_ratio": 0.97}, "--mask_ratio 0.97 hides all of 9 tokens"),
        ("mae", {"mask_ratio": 0.01}, "--mask_ratio 0.01 hides none of 9 tokens"),
        ("mae", {"mask_ratio": -1.0}, "--mask_ratio -1 hides none"),
        ("mae", {"decoder_dim": 18, "decoder_num_heads": 2}, "--decoder_dim 18 must be a multiple of 4"),
        ("mae", {"decoder_depth": 0}, "--decoder_depth must be at least 1"),
        ("mae", {"backbone": "resnet18", "patch_size": 4}, "--method mae works on patches"),
        ("cluster_mim", {}, "--center_path is missing"),
        ("cluster_mim", {"norm_pix_loss": True, "center_path": "6"}, "--norm_pix_loss is a loss on pixels"),
        ("cluster_mim", {"label_smoothing": 1.0, "center_path": "6"}, "--label_smoothing must be"),
        ("cluster_mim", {"backbone": "resnet18"}, "--method cluster_mim works on patches"),
        ("ar", {"backbone": "resnet18"}, "--method ar works on patches"),
        ("dar", {"offsets": 9, "center_path": "6"}, "--offsets 9 must be at least 1 and below the 9 tokens"),
        ("dar", {"offsets": 0, "center_path": "6"}, "--offsets 0 must be at least 1"),
        ("vlm", {"mask_ratio_max": 1.0, "center_path": "6"}, "--mask_ratio_max 1 hides all"),
        ("vlm", {"mask_ratio_min": 0.0, "center_path": "6"}, "--mask_ratio_min 0 hides none"),
        ("vlm", {"mask_ratio_min": 0.6, "mask_ratio_max": 0.5, "center_path": "6"}, "must not be above"),
        ("ar", {"token_normalize": True, "center_path": "6"}, "was fitted without --token_normalize"),
        ("ar", {"data_set": "CIFAR100", "center_path": "6"}, "is of images normalized by mean"),
        ("ar", {"augment": "simclr_cifar", "center_path": "6"}, "is of images normalized by mean"),
        ("ar", {"patch_size": 3, "center_path": "6"}, "is of patches of 4 pixels, not of --patch_size 3"),
    ],
)
def test_bad_input(name, flags, message, centres):
    if "center_path" in flags:
        flags = flags | {"center_path": centres()}
    with pytest.raises(ValueError, match=message):
        settings_of(name, **flags)


def test_names_in_tables(centres):
    path = centres()
    assert settings_of("cluster_mim", center_path=path).label().method == "ClusterMIM pixel K=6"
    assert settings_of("dar", center_path=path, offsets=4).label().method == "DAR K=4"
    fixed = settings_of("vlm", center_path=path, mask_ratio_min=0.5, mask_ratio_max=0.5)
    assert fixed.label().method == "masked r=0.5"
    assert settings_of("vlm", center_path=path).label().method == "masked r=0.1 to 0.9"
    assert settings_of("mae").label().method == "MAE"
