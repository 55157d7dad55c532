"""Gated pooling: what published networks compute, bags that are odd, and how little is kept."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity, cross_entropy, linear, relu

from kernels import gated_pooling
from kernels._triton import usable
from kernels.gated_pooling import attention, fused, reference, top_tiles

FIXTURES = Path(os.environ.get("HILUM_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "fixtures"
SEEN = dict(rtol=1e-4, atol=2e-5)
"""What the fixtures' own page asks of another implementation."""


def published(name: str) -> dict[str, torch.Tensor]:
    """Inputs, weights and results of the authors' own module, drawn at random."""
    if not (FIXTURES / name).is_file():
        pytest.skip(f"the numbers of published modules ({name}) are not on this machine")
    with np.load(FIXTURES / name) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def weights_of(arrays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key[2:]: value.clone().requires_grad_() for key, value in arrays.items() if key.startswith("w/")}


def gate(weights: dict[str, torch.Tensor], *names: str) -> list[torch.Tensor]:
    """Weight and bias of each layer: V, U, w."""
    return [weights[f"{name}.{kind}"] for name in names for kind in ("weight", "bias")]


ATTENTION = ("attention.attention_V.0", "attention.attention_U.0", "attention.attention_weights")


def one_bag(tiles: torch.Tensor) -> torch.Tensor:
    return torch.tensor([0, len(tiles)])


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.reshape(expected.shape), expected, **SEEN)


def assert_gradients(weights: dict[str, torch.Tensor], arrays: dict[str, torch.Tensor], prefix: str = "") -> None:
    """Every gradient in the file, and the norm of those that are too large for it."""
    compared = 0
    for key, expected in arrays.items():
        kind, _, name = key.partition("/")
        if kind == f"{prefix}grad":
            found = weights[name].grad  # none where one branch leaves its own head out of the loss
            assert_same(torch.zeros_like(expected) if found is None else found, expected)
        elif kind == f"{prefix}gradnorm":
            assert_same(weights[name].grad.norm(), expected)
        compared += kind in (f"{prefix}grad", f"{prefix}gradnorm")
    assert compared > 5


@pytest.mark.parametrize("way", [fused, reference], ids=lambda way: way.__name__)
@pytest.mark.parametrize("form", ["gated", "plain"])
def test_it_is_the_pooling_of_abmil(form: str, way) -> None:
    arrays = published(f"abmil/ilse_{form}.npz")
    weights, tiles = weights_of(arrays), arrays["H"]
    if form == "gated":
        layers = gate(weights, "attention_V.0", "attention_U.0", "attention_w")
    else:
        layers = [*gate(weights, "attention.0"), None, None, *gate(weights, "attention.2")]
    pooled, scores, entropy, log_sums = way(tiles, one_bag(tiles), *layers)
    assert_same(scores.T, arrays["attn_logits"])
    assert_same(attention(scores, log_sums, one_bag(tiles)).T, arrays["attn_softmax"])
    assert_same(pooled, arrays["bag_embedding"])
    assert_same(entropy, torch.special.entr(arrays["attn_softmax"]).sum(1))

    likely = torch.sigmoid(linear(pooled[0], *gate(weights, "classifier.0"))).clamp(1e-5, 1 - 1e-5)
    loss = -(arrays["label"] * torch.log(likely) + (1 - arrays["label"]) * torch.log(1 - likely))
    assert_same(loss, arrays["loss_nll"])
    loss.sum().backward()
    assert_gradients(weights, arrays)


@pytest.mark.parametrize("name", ["sb_binary_ce", "sb_binary_svm", "mb_subtyping_svm"])
def test_it_is_the_pooling_of_clam_and_its_instances_are_top_tiles(name: str) -> None:
    arrays = published(f"clam/{name}.npz")
    weights = weights_of(arrays)
    tiles = relu(linear(arrays["x"], *gate(weights, "attention_net.0")))
    layers = gate(weights, *(f"attention_net.3.attention_{part}" for part in ("a.0", "b.0", "c")))
    offsets = one_bag(tiles)
    pooled, scores, _, log_sums = fused(tiles, offsets, *layers)
    assert_same(scores.T, arrays["attn_logits"])
    assert_same(attention(scores, log_sums, offsets).T, arrays["attn_softmax"])
    assert_same(pooled, arrays["bag_features"])

    rows, _ = top_tiles(scores, log_sums, offsets, 8)
    low, _ = top_tiles(-scores, log_sums, offsets, 8)
    for k, branch in enumerate(arrays["attn_softmax"]):
        assert set(rows[0, k].tolist()) == set(branch.topk(8).indices.tolist())
        assert set(low[0, k].tolist()) == set((-branch).topk(8).indices.tolist())

    heads = [key for key in weights if key.startswith("classifiers") and key.endswith("weight")]
    matrix = torch.cat([weights[key] for key in heads])
    bias = torch.cat([weights[key.replace("weight", "bias")] for key in heads])
    logits = (pooled[0] * matrix).sum(1) + bias  # one branch for all classes, or one each
    assert_same(logits, arrays["logits"])
    assert_same(cross_entropy(logits[None], arrays["label"].long()), arrays["loss_bag"])


@pytest.mark.parametrize(
    ("name", "phase"),
    [
        ("ga_eval", "eval"),
        ("ga_one_branch", "eval"),
        ("ga_stkim", "eval"),
        ("ga_stkim", "train"),
        ("ga_stkim_drop0", "train"),
    ],
)
def test_it_is_the_pooling_of_acmil_with_and_without_masked_tiles(name: str, phase: str) -> None:
    arrays = published(f"acmil/{name}.npz")
    weights = weights_of(arrays)
    tiles = relu(linear(arrays["x"][0], weights["dimreduction.fc1.weight"]))
    offsets = one_bag(tiles)
    mask = ~arrays["train/masked"].bool().T if phase == "train" else None
    pooled, scores, _, log_sums = fused(tiles, offsets, *gate(weights, *ATTENTION), mask)
    shares = attention(scores, log_sums, offsets, mask)  # [N, M]
    assert_same(scores.T, arrays["eval/attn_logits"])  # raw: the mask leaves them alone
    assert_same(shares.T, arrays[f"{phase}/attn_softmax"])

    heads = range(len(pooled[0]))
    branches = torch.stack([linear(pooled[0, i], *gate(weights, f"classifier.{i}.fc")) for i in heads])
    bag = linear(pooled.mean(1), *gate(weights, "Slide_classifier.fc"))
    assert_same(branches, arrays[f"{phase}/branch_logits"])
    assert_same(bag, arrays[f"{phase}/bag_logits"])
    label = arrays["y"]
    loss = cross_entropy(bag, label)
    assert_same(loss, arrays[f"{phase}/loss_bag"])
    if len(heads) > 1:
        pairs = [cosine_similarity(shares[:, i], shares[:, j], 0) for i, j in itertools.combinations(heads, 2)]
        likeness = torch.stack(pairs).mean()
        assert_same(likeness, arrays[f"{phase}/loss_div"])
        loss = loss + likeness + cross_entropy(branches, label.expand(len(heads)))
    assert_same(loss, arrays[f"{phase}/loss_total"])
    loss.backward()
    assert_gradients(weights, arrays, f"{phase}_")


def test_the_tiles_that_acmil_masks_are_drawn_from_the_top_tiles() -> None:
    arrays = published("acmil/ga_stkim.npz")
    weights = weights_of(arrays)
    tiles = relu(linear(arrays["x"][0], weights["dimreduction.fc1.weight"]))
    _, scores, _, log_sums = fused(tiles, one_bag(tiles), *gate(weights, *ATTENTION))
    rows, _ = top_tiles(scores, log_sums, one_bag(tiles), 10)
    for k, masked in enumerate(arrays["train/masked"].bool()):
        assert set(masked.nonzero()[:, 0].tolist()) <= set(rows[0, k].tolist())


@pytest.mark.parametrize("name", ["abmil_aem", "abmil_aem_topk"])
def test_its_entropy_is_the_loss_of_aem(name: str) -> None:
    arrays = published(f"aem/{name}.npz")
    weights = weights_of(arrays)
    tiles = relu(linear(arrays["x"][0], weights["dimreduction.fc1.weight"]))
    offsets = one_bag(tiles)
    pooled, scores, entropy, log_sums = fused(tiles, offsets, *gate(weights, *ATTENTION))
    if "cfg_top_k" in arrays:
        assert_same(-entropy, arrays["neg_entropy_full"])
        rows, _ = top_tiles(scores, log_sums, offsets, int(arrays["cfg_top_k"]))
        logs = torch.log_softmax(scores[rows[0, 0], 0], 0)
        entropy = -(torch.exp(logs) * logs).sum()
    assert_same(-entropy.mean(), arrays["loss_neg_entropy"])
    logits = linear(pooled[0], *gate(weights, "classifier.fc"))
    assert_same(logits, arrays["bag_logits"])
    loss = cross_entropy(logits, arrays["y"]) - 0.1 * entropy.mean()
    assert_same(loss, arrays["loss_total"])
    loss.backward()
    assert_gradients(weights, arrays)


def drawn(sizes, features=6, hidden=5, branches=2, dtype=torch.float64, seed=0):
    """Tiles and offsets, and the six weights, that all ask for gradients."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_()

    shapes = [(hidden, features), (hidden,), (hidden, features), (hidden,), (branches, hidden), (branches,)]
    offsets = torch.tensor([0, *itertools.accumulate(sizes)])
    return draw(sum(sizes), features), offsets, *(draw(*shape) for shape in shapes)


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6), step=st.integers(1, 50), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_bags_pooled_together_are_the_bags_pooled_alone_wherever_blocks_begin(sizes, step, seed) -> None:
    tiles, offsets, *layers = drawn(sizes, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gated_pooling.TILES_AT_ONCE, "cpu", step)
        together = fused(tiles, offsets, *layers)
        gradients = torch.autograd.grad(together[0].sin().sum() + together[2].sum(), [tiles, *layers])
    total = 0
    for bag, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        pooled, scores, entropy, log_sums = reference(tiles[start:end], one_bag(tiles[start:end]), *layers)
        total = total + pooled.sin().sum() + entropy.sum()
        torch.testing.assert_close(together[0][bag], pooled[0])
        torch.testing.assert_close(together[1][start:end], scores)
        torch.testing.assert_close(together[2][bag], entropy[0])
        torch.testing.assert_close(together[3][bag], log_sums[0])
    for one, other in zip(gradients, torch.autograd.grad(total, [tiles, *layers]), strict=True):
        torch.testing.assert_close(one, other)


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6), count=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_top_tiles_are_the_highest_that_count_in_each_bag(sizes, count, seed) -> None:
    random = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *itertools.accumulate(sizes)])
    scores = torch.randint(-3, 3, (sum(sizes), 2), generator=random).double()  # ties
    mask = torch.rand(scores.shape, generator=random) > 0.4
    logits = scores.masked_fill(~mask, -torch.inf)
    log_sums = torch.stack([torch.logsumexp(part, 0) for part in logits.split(sizes)])
    rows, shares = top_tiles(scores, log_sums, offsets, count, mask)
    assert rows.shape == shares.shape == (len(sizes), 2, count)
    for bag, start in enumerate(offsets[:-1].tolist()):
        for k in range(2):
            inside = [n for n in range(start, start + sizes[bag]) if mask[n, k]]
            best = sorted(inside, key=lambda n, k=k: (-scores[n, k].item(), n))[:count]
            assert rows[bag, k].tolist() == best + [-1] * (count - len(best))
            expected = torch.exp(scores[best, k] - log_sums[bag, k]).tolist()
            assert shares[bag, k].tolist() == pytest.approx(expected + [0.0] * (count - len(best)))


def test_attention_sums_to_one_in_each_bag_and_is_nothing_where_masked() -> None:
    tiles, offsets, *layers = drawn([3, 1, 7])
    mask = torch.ones(11, 2, dtype=torch.bool)
    mask[0], mask[5:8, 1] = False, False
    _, scores, entropy, log_sums = fused(tiles, offsets, *layers, mask)
    shares = attention(scores, log_sums, offsets, mask)
    for part in shares.split([3, 1, 7]):
        torch.testing.assert_close(part.sum(0), torch.ones(2, dtype=torch.float64))
    assert not shares[~mask].any()
    counted = torch.stack([part.sum(0) for part in mask.split([3, 1, 7])])
    assert (entropy >= -1e-12).all() and (entropy <= torch.log(counted.double()) + 1e-12).all()


def test_a_bag_of_one_tile_is_that_tile() -> None:
    tiles, offsets, *layers = drawn([1, 4, 1])
    pooled, _, entropy, _ = fused(tiles, offsets, *layers)
    for bag, tile in ((0, tiles[0]), (2, tiles[5])):
        torch.testing.assert_close(pooled[bag], tile.expand(2, -1))
        assert not entropy[bag].any()


@pytest.mark.parametrize("way", [fused, reference], ids=lambda way: way.__name__)
def test_a_bag_in_which_nothing_counts_is_nan_and_harms_no_other(way) -> None:
    tiles, offsets, *layers = drawn([4, 0, 3, 5])
    mask = torch.ones(12, 2, dtype=torch.bool)
    mask[4:7, 1] = False  # the third bag has no tile left in its second branch
    pooled, scores, entropy, log_sums = way(tiles, offsets, *layers, mask)
    dead = torch.tensor([[False, False], [True, True], [False, True], [False, False]])
    assert torch.equal(pooled.isnan().all(2), dead) and torch.equal(entropy.isnan(), dead)
    assert torch.equal(log_sums == -torch.inf, dead)
    assert scores.isfinite().all()

    if way is reference:
        return
    whole = torch.cat([tiles[:4], tiles[7:]]).detach().requires_grad_()
    expected = reference(whole, torch.tensor([0, 4, 9]), *layers)
    torch.testing.assert_close(pooled[[0, 3]], expected[0])
    gradients = torch.autograd.grad(pooled[[0, 3]].sum() + entropy[[0, 3]].sum(), layers)
    wanted = torch.autograd.grad(expected[0].sum() + expected[2].sum(), layers)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_a_batch_of_empty_bags_is_nan_and_has_no_gradient() -> None:
    tiles, offsets, *layers = drawn([0, 0])
    pooled, scores, entropy, _ = fused(tiles, offsets, *layers)
    assert pooled.isnan().all() and entropy.isnan().all() and scores.shape == (0, 2)
    gradients = torch.autograd.grad(scores.sum() + pooled.nan_to_num().sum(), [tiles, *layers])
    assert not any(gradient.any() for gradient in gradients)


def test_scores_in_the_thousands_neither_overflow_nor_vanish() -> None:
    tiles, offsets, v, v_bias, u, u_bias, w, w_bias = drawn([30, 50], dtype=torch.float32)
    layers = v, v_bias, u, u_bias, w.detach() * 2000, w_bias
    pooled, scores, entropy, log_sums = fused(tiles, offsets, *layers)
    assert scores.abs().max() > 1000
    expected, _, spread, sums = reference(tiles, offsets, *layers)
    torch.testing.assert_close(pooled, expected, rtol=1e-3, atol=1e-3)  # scores of 1,000 have an error of 1e-4
    torch.testing.assert_close(entropy, spread, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(log_sums, sums)
    gradients = torch.autograd.grad(pooled.sum() + entropy.sum(), [tiles, v, u])
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_tiles_with_float32_weights_are_multiplied_in_float32(dtype) -> None:
    tiles, offsets, *layers = drawn([90, 40], features=64, hidden=16, dtype=torch.float32)
    stored = tiles.detach().to(dtype)
    for found, expected in zip(fused(stored, offsets, *layers), fused(stored.float(), offsets, *layers), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gradients_too_small_for_float16_are_not_lost_in_its_matrix_products() -> None:
    total, left, right = torch.zeros(2, 3), torch.full((2, 4), 1e-9), torch.ones(4, 3, dtype=torch.float16)
    gated_pooling._add_product(total, left, right)
    torch.testing.assert_close(total, torch.full((2, 3), 4e-9), rtol=1e-3, atol=0)


def test_only_what_asks_for_a_gradient_gets_one() -> None:
    tiles, offsets, *layers = drawn([9, 4])
    frozen = [layer.detach() for layer in layers]
    (alone,) = torch.autograd.grad(fused(tiles, offsets, *frozen)[0].square().sum(), [tiles])
    all_of_them = torch.autograd.grad(fused(tiles, offsets, *layers)[0].square().sum(), [tiles, *layers])
    torch.testing.assert_close(alone, all_of_them[0])
    others = torch.autograd.grad(fused(tiles.detach(), offsets, *layers)[0].square().sum(), layers)
    for one, other in zip(others, all_of_them[1:], strict=True):
        torch.testing.assert_close(one, other)


plain = pytest.mark.skipif(usable(torch.zeros(1)), reason="counts what plain torch allocates on the CPU")


def measured(work) -> tuple[int, int]:
    """The most that is allocated at one time, and the largest single allocation, in bytes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    found = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(found), default=0), max(found, default=0)


@plain
@pytest.mark.parametrize("asks", [False, True], ids=["features", "tiles-with-gradients"])
def test_no_tensor_of_tiles_times_hidden_is_ever_made(asks: bool) -> None:
    N, D, H = 40_000, 16, 64
    tiles, offsets, *layers = drawn([N - 100, 100], features=D, hidden=H, dtype=torch.float32)
    tiles = tiles.detach().requires_grad_(asks)
    kept = []

    def keep(value: torch.Tensor) -> torch.Tensor:
        kept.append(value.numel())
        return value

    def work() -> None:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            pooled, _, entropy, _ = fused(tiles, offsets, *layers)
        (pooled.sum() + entropy.sum()).backward()

    work()  # libraries take memory of their own at the first call
    kept.clear()
    peak, largest = measured(work)
    assert max(kept) <= max(N * D, N * 2)  # the tiles themselves, which were there, and the scores
    gradient = 4 * N * D if asks else 0
    block = 4 * gated_pooling.TILES_AT_ONCE["cpu"] * 2 * H
    assert largest <= max(gradient, 4 * N * 2, block)
    assert peak <= gradient + 6 * 4 * N * 2 + 6 * block  # scores and their gradients; one block's work
    assert peak - gradient < 4 * N * H


@plain
def test_a_bag_in_a_mapped_file_of_half_precision_is_never_copied_whole(tmp_path: Path) -> None:
    N, D = 60_000, 64
    tiles = torch.from_file(str(tmp_path / "features"), shared=True, size=N * D, dtype=torch.float16).view(N, D)
    offsets, layers = one_bag(tiles), drawn([1], features=D, hidden=8, branches=1, dtype=torch.float32)[2:]

    def work() -> None:
        fused(tiles, offsets, *layers)[0].sum().backward()

    work()
    peak, _ = measured(work)
    assert peak < tiles.nbytes / 3


@pytest.mark.parametrize(
    ("offsets", "says"),
    [([0, 3], "0 to 3 over 5"), ([1, 5], "start at 0"), ([0, 4, 2, 5], "never fall"), ([0.0, 5.0], "integer")],
)
def test_offsets_that_do_not_cut_the_tiles_into_bags_are_refused(offsets, says) -> None:
    tiles, _, *layers = drawn([5])
    with pytest.raises(ValueError, match=says):
        fused(tiles, torch.tensor(offsets), *layers)


def test_weights_and_masks_that_do_not_fit_are_refused() -> None:
    tiles, offsets, v, v_bias, u, u_bias, w, w_bias = drawn([5])
    with pytest.raises(ValueError, match="hidden, features"):
        fused(tiles, offsets, v[:, :3], v_bias, u, u_bias, w, w_bias)
    with pytest.raises(ValueError, match="shape of v"):
        fused(tiles, offsets, v, v_bias, u[:2], u_bias, w, w_bias)
    with pytest.raises(ValueError, match="without u"):
        fused(tiles, offsets, v, v_bias, None, u_bias, w, w_bias)
    with pytest.raises(ValueError, match="one number per row"):
        fused(tiles, offsets, v, v_bias, u, u_bias, w, w_bias[:1])
    with pytest.raises(ValueError, match="booleans"):
        fused(tiles, offsets, v, v_bias, u, u_bias, w, w_bias, torch.ones(5, 1, dtype=torch.bool))
