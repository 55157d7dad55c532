"""TransMIL answers as its authors' code does; mended, it knows where tiles lie, and counts each of them once."""

import itertools

import numpy as np
import pytest
import torch

from networks import mil_transmil
from networks.mil_transmil import Config, Lattice, Placing, lattice_of, repeated_square
from networks.parts import nystrom
from networks.parts.bags import Bags

SEEN = dict(rtol=1e-4, atol=2e-5)
"""What the fixtures' own page asks of another implementation."""
OURS = {
    "cls_token": "token", "pos_layer.proj.": "place.windows.0.", "pos_layer.proj1.": "place.windows.1.",
    "pos_layer.proj2.": "place.windows.2.", "_fc1.0.": "project.0.", "layer1.norm.": "first.norm.",
    "layer1.attn.to_qkv.": "first.qkv.", "layer1.attn.to_out.0.": "first.out.", "layer1.attn.res_conv.": "first.along.",
    "layer2.norm.": "second.norm.", "layer2.attn.to_qkv.": "second.qkv.", "layer2.attn.to_out.0.": "second.out.",
    "layer2.attn.res_conv.": "second.along.", "norm.": "norm.", "_fc2.": "head.",
}  # fmt: skip
"""The fixtures' names of weights, and ours."""


def ours(arrays: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    found = {}
    for key, value in arrays.items():
        if key.startswith(prefix):
            theirs = next(name for name in OURS if key.startswith(prefix + name))
            found[OURS[theirs] + key.removeprefix(prefix + theirs)] = value[0] if theirs == "cls_token" else value
    return found


@pytest.mark.parametrize("name", ["transmil_n50", "transmil_n7"])
def test_forward_loss_and_gradients_are_the_published_ones(shared, name) -> None:
    file = shared / "fixtures" / "transmil" / f"{name}.npz"
    if not file.is_file():
        pytest.skip(f"the arrays of the authors' code (../shared/fixtures/transmil/{name}.npz) are not on this machine")
    with np.load(file) as loaded:
        arrays = {key: torch.from_numpy(loaded[key]) for key in loaded.files}
    features, width, classes, heads, landmarks, iterations = arrays[
        "cfg_D_feat,D_inner,n_class,heads,landmarks,pinv_iter"
    ].tolist()
    config = Config(width=width, heads=heads, landmarks=landmarks, iterations=iterations, faithful=True)
    network = mil_transmil.build(config, features=features, classes=classes).eval()
    network.load_state_dict(ours(arrays, "w/"))

    bags = Bags.of(arrays["x"][0])
    walk = network.walk(bags)
    count = walk.projected.count
    torch.testing.assert_close(walk.projected.make(0, count), arrays["tokens_in"][0], **SEEN)
    torch.testing.assert_close(
        network.first.answer(walk.projected, walk.seen, 0, count), arrays["after_layer1"][0], **SEEN
    )
    torch.testing.assert_close(walk.placed.make(0, count), arrays["after_ppeg"][0], **SEEN)
    after = network.second.answer(walk.placed, walk.found, 0, count)
    torch.testing.assert_close(after, arrays["after_layer2"][0], **SEEN)
    torch.testing.assert_close(network.norm(after[:1]), arrays["cls"], **SEEN)

    answer = network(bags)
    torch.testing.assert_close(answer.logits, arrays["logits"], **SEEN)
    loss = network.losses(answer, bags, torch.tensor([1]), None)["bag"]
    torch.testing.assert_close(loss, arrays["loss"], **SEEN)
    loss.backward()
    theirs = ours(arrays, "grad/")
    assert set(theirs) == {name for name, _ in network.named_parameters()}
    for name, weight in network.named_parameters():
        torch.testing.assert_close(weight.grad, theirs[name], **SEEN)


def test_it_has_as_many_weights_as_the_authors_network() -> None:
    network = mil_transmil.build(Config(), features=1024, classes=2)
    assert sum(weight.numel() for weight in network.parameters()) == 2_672_146


def by_hand(network: mil_transmil.TransMil, x: torch.Tensor, lattice: Lattice) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and shares by the formulas, everything at once: padding, repeated tokens and squares are there to be seen."""
    tokens = torch.cat([network.token, network.project(x[lattice.tiles])])
    tokens, *_ = attended(network.first, tokens)
    rows, columns = int(lattice.rows.max()) + 1, lattice.width
    square = torch.zeros(1, tokens.shape[1], rows, columns, dtype=x.dtype)
    square[0, :, lattice.rows, lattice.columns] = tokens[1:].T
    square = square + sum(window(square) for window in network.place.windows)
    tokens = torch.cat([tokens[:1], square[0, :, lattice.rows, lattice.columns].T])
    after, weights, values = attended(network.second, tokens)  # weights: [head, to, from]
    told = after[:1]
    logits = network.head(network.norm(told))
    # a token's share: what it adds to the class token, through out, norm (deviation held) and head
    added = (
        torch.einsum("hn,hnd->nhd", weights[:, 0], values).flatten(1) @ network.second.out.weight.T
    )  # [token, width]
    centred = added - added.mean(1, keepdim=True)
    shares = centred / torch.sqrt(told.var(correction=0) + 1e-5) * network.norm.weight @ network.head.weight.T
    summed = torch.zeros(len(x), shares.shape[1], dtype=x.dtype)
    for tile, share in zip(lattice.tiles.tolist(), shares[1:], strict=True):
        summed[tile] += share
    return logits, summed


def attended(block: nystrom.Nystrom, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One attention with its whole matrix [head, to, from], the convolution of values in it; and the values."""
    normed = block.norm(tokens)
    count = len(normed)
    landmarks = block.landmarks if block.padded else min(block.landmarks, count)
    padding = -count % landmarks if block.padded else 0
    normed = torch.cat([normed.new_zeros(padding, normed.shape[1]), normed])
    q, k, v = (one.unflatten(1, (block.heads, -1)).transpose(0, 1) for one in block.qkv(normed).chunk(3, 1))
    q = q * block.scale
    parts = torch.tensor([n * landmarks // len(normed) for n in range(len(normed))])
    means = [torch.stack([one[:, parts == n].mean(1) for n in range(landmarks)], 1) for one in (q, k)]
    near, middle, far = (
        torch.softmax(one @ other.mT, -1) for one, other in ((q, means[1]), (means[0], means[1]), (means[0], k))
    )
    weights = near @ nystrom.inverted(middle, block.iterations) @ far
    apart = torch.arange(len(normed)) - torch.arange(len(normed))[:, None]  # [to, from]
    taps = block.along.weight[:, 0, (apart + 16).clamp(0, 32), 0].where(apart.abs() <= 16, 0)
    weights = (weights + taps)[:, padding:]
    told = (weights @ v).transpose(0, 1).flatten(1)
    return tokens + block.out(told), weights[:, :, padding:], v[:, padding:]


@torch.no_grad()
@pytest.mark.parametrize("tiles", [1, 2, 7, 40])
@pytest.mark.parametrize("faithful", [False, True])
def test_logits_and_shares_are_those_of_the_formulas(tiles, faithful) -> None:
    network, bag = built(faithful=faithful), scattered(tiles)
    for one in (bag, Bags.of(bag.features)):
        answer = network(one, explain=True)
        logits, shares = by_hand(network, one.features, repeated_square(tiles) if faithful else lattice_of(one))
        torch.testing.assert_close(answer.logits, logits)
        torch.testing.assert_close(answer.shares, shares)
        torch.testing.assert_close(answer.rest + answer.shares.sum(0), logits)


def test_blocks_and_forgetting_change_neither_the_answer_nor_the_gradients(monkeypatch, unchecked) -> None:
    found = []
    for at_once, kept in ((4096, 16_384), (15, 16_384), (15, 0)):
        monkeypatch.setattr(mil_transmil, "TOKENS_AT_ONCE", at_once)
        monkeypatch.setattr(mil_transmil, "CELLS_AT_ONCE", 4 * at_once)
        monkeypatch.setattr(nystrom, "REMEMBERED", kept)
        network, bag = built(), scattered(40)
        answer = network(bag, explain=True)
        (network.losses(answer, bag, torch.tensor([1]), None)["bag"] - answer.entropy.mean()).backward()
        found.append([answer.logits, answer.shares, answer.scores, *(weight.grad for weight in network.parameters())])
    for other in found[1:]:
        for whole, pieces in zip(found[0], other, strict=True):
            torch.testing.assert_close(whole, pieces)


@torch.no_grad()
def test_where_tokens_are_landmarks_the_row_is_the_attention_that_scores_say() -> None:
    network, bag = built(iterations=30), scattered(9)
    walk = network.walk(bag)
    values = network.second.carried(walk.placed, walk.found, 0, 10)
    network.second.along.weight.zero_()
    plain = network.second.carried(walk.placed, walk.found, 0, 10)
    assert not torch.equal(values, plain)
    exact = torch.softmax(walk.found.scores, 1)  # over the class token too
    normed = network.second.norm(walk.placed.make(0, 10))
    expected = exact[..., None] * network.second._heads(normed, 2)
    torch.testing.assert_close(plain, expected, rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_places_count_and_the_order_of_the_file_does_not() -> None:
    network, bag = built(), scattered(30)
    answer = network(bag, explain=True)
    order = torch.randperm(30)
    other = network(Bags.of(bag.features[order], bag.grid[order] + 70), explain=True)
    torch.testing.assert_close(other.logits, answer.logits)
    torch.testing.assert_close(other.shares, answer.shares[order])
    torch.testing.assert_close(other.attention(bag), answer.attention(bag)[order])
    moved = bag.grid.clone()
    moved[:, 0] *= 4  # no longer side by side
    assert (network(Bags.of(bag.features, moved)).logits - answer.logits).abs().max() > 1e-6
    assert (network(Bags.of(bag.features)).logits - answer.logits).abs().max() > 1e-6


def test_no_tile_counts_twice_unless_it_shall_be_as_published() -> None:
    assert lattice_of(Bags.of(torch.zeros(5, 2))).tiles.tolist() == [0, 1, 2, 3, 4]
    assert repeated_square(5).tiles.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]


@torch.no_grad()
def test_one_window_is_the_three_of_the_pyramid_and_empty_places_are_zeros() -> None:
    torch.manual_seed(0)
    place, x = Placing(6), torch.randn(8, 6)
    cells = torch.tensor([0, 3, 4, 9, 11, 17, 18, 19])
    image = torch.zeros(20, 6)
    image[cells] = x
    image = image.T.reshape(1, 6, 4, 5)
    expected = (image + sum(window(image) for window in place.windows)).flatten(2)[0].T[cells]
    torch.testing.assert_close(place(x, cells, (4, 5)), expected)


def test_blocks_of_sparse_tissue_stay_small(monkeypatch) -> None:
    monkeypatch.setattr(mil_transmil, "CELLS_AT_ONCE", 1000)
    grid = torch.stack([torch.arange(400) * 37 % 50, torch.arange(400)], 1)  # one tile a row
    lattice = lattice_of(Bags.of(torch.zeros(400, 1), grid))
    bounds = lattice.bounds()
    assert bounds[0] == 0 and bounds[-1] == 401 and list(bounds) == sorted(set(bounds))
    for start, end in itertools.pairwise(bounds):
        near, far = lattice.around(max(start - 1, 0), end - 1)
        _, (rows, columns) = lattice.cells(near, far)
        assert rows * columns <= 1000


def test_the_inverse_is_approached() -> None:
    torch.manual_seed(0)
    matrix = torch.softmax(3 * torch.randn(4, 12, 12, dtype=torch.float64), -1)
    expected = torch.linalg.pinv(matrix)
    far, near = ((nystrom.inverted(matrix, n) - expected).abs().max() for n in (6, 40))
    assert near < 1e-6 < far


@pytest.mark.parametrize("wrong", [dict(heads=3), dict(landmarks=0), dict(dropout=1.0)])
def test_what_cannot_be_built_is_refused(wrong) -> None:
    with pytest.raises(ValueError, match="mil_transmil was given"):
        Config(**wrong)


def built(**options) -> mil_transmil.TransMil:
    torch.manual_seed(0)
    config = Config(**{**dict(width=16, heads=4, landmarks=12), **options})
    return mil_transmil.build(config, features=10, classes=3).double().eval()


def scattered(tiles: int) -> Bags:
    """Tiles at places of their own, in no order."""
    random = torch.Generator().manual_seed(1)
    place = torch.randperm(3 * tiles, generator=random)[:tiles]
    grid = torch.stack([place % 9 + 4, place // 9 - 2], 1)
    return Bags.of(torch.randn(tiles, 10, generator=random, dtype=torch.float64), grid)
