"""A tile's class depends on the tile and on those around it, by their places; on nothing else."""

import itertools

import pytest
import torch
from torch import nn

from networks import tile_context
from networks.parts.bags import Bags
from networks.tile_context import Config, neighbours

SMALL = dict(width=16, heads=4)


def test_neighbours_are_found_by_their_places_and_missing_ones_are_minus_one() -> None:
    torch.manual_seed(0)
    grid = torch.cat([torch.randperm(30)[:18], torch.randperm(30)[:9]])
    grid = torch.stack([grid % 6 + 100, grid // 6 - 3], 1)
    bags = Bags(features=torch.zeros(27, 1), offsets=torch.tensor([0, 18, 27]), grid=grid)
    for reach in (0, 1, 2):
        found = neighbours(bags, reach)
        steps = list(itertools.product(range(-reach, reach + 1), repeat=2))  # row, then column
        for tile, (place, (down, right)) in itertools.product(range(27), enumerate(steps)):
            there = [
                other
                for other in range(27)
                if (other < 18) == (tile < 18)
                and grid[other].tolist() == [int(grid[tile, 0]) + right, int(grid[tile, 1]) + down]
            ]
            assert found[tile, place] == (there[0] if there else -1)


@torch.no_grad()
def test_the_answer_is_that_of_the_formula() -> None:
    network, bags = built(dropout=0.3), lattice(4, 5)
    for tile, mine in zip(range(20), neighbours(bags, 2), strict=True):
        there = mine >= 0
        t = network.norm(
            network.project(bags.features[mine[there]]) + network.places[there]
        )  # only those that are there
        for block in network.blocks:
            heads = [
                torch.softmax(q @ k.T / 2, 1) @ v  # √4, the width of a head
                for q, k, v in zip(*(one.split(4, 1) for one in block.qkv(block.before(t)).split(16, 1)), strict=True)
            ]
            t = t + block.out(torch.cat(heads, 1))
            t = t + block.narrow(nn.functional.gelu(block.widen(block.between(t))))
        read, middle = network.read, t[int(there[:12].sum())]
        share = torch.softmax(read.key(t) @ read.query(middle) / 4, 0)  # √16
        logits = network.head(middle + read.out(share @ read.value(t)))
        torch.testing.assert_close(network(bags, torch.tensor([tile]))[0], logits)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, dict(mixing="mean"), dict(places=False), dict(layers=0)])
@pytest.mark.parametrize("context", [1, 3, 5])
def test_a_tile_is_answered_by_its_neighbourhood_alone(context, options) -> None:
    network, bags = built(context=context, **options), lattice(7, 7)
    before = network(bags)
    changed = bags.features.clone()
    changed[24] += 3  # the tile in the middle
    far = (bags.grid - bags.grid[24]).abs().amax(1) > context // 2
    after = network(Bags.of(changed, bags.grid))
    assert torch.equal(after[far], before[far])
    assert ((after - before)[~far].abs().amax(1) > 1e-6).all()


@torch.no_grad()
def test_blocks_the_order_of_tiles_and_other_slides_change_nothing(monkeypatch) -> None:
    network, bags = built(), lattice(6, 5)
    whole = network(bags)
    monkeypatch.setattr(tile_context, "CENTRES_AT_ONCE", 7)
    torch.testing.assert_close(network(bags), whole)
    order = torch.randperm(30)
    torch.testing.assert_close(network(Bags.of(bags.features[order], bags.grid[order] + 50)), whole[order])
    two = Bags(
        features=torch.cat([torch.randn(30, 12), bags.features]),
        offsets=torch.tensor([0, 30, 60]),
        grid=torch.cat([bags.grid, bags.grid]),
    )
    torch.testing.assert_close(network(two)[30:], whole)
    torch.testing.assert_close(network(two, torch.tensor([31, 45])), whole[[1, 15]])


@torch.no_grad()
def test_places_matter_only_where_they_are_learned() -> None:
    bags = lattice(3, 3)
    turned = Bags.of(bags.features, bags.grid.flip(1))  # rows and columns exchanged
    middle = torch.tensor([4])
    assert (built()(turned, middle) - built()(bags, middle)).abs().max() > 1e-5
    plain = built(places=False)
    torch.testing.assert_close(plain(turned, middle), plain(bags, middle))


def test_it_learns_a_class_that_only_the_neighbours_tell(unchecked) -> None:
    torch.manual_seed(0)
    bags = lattice(9, 9, features=4)
    near = neighbours(bags, 1)
    dense = torch.where(near >= 0, bags.features[near.clamp_min(0), 0], 0)
    dense[:, 4] = 0  # the tile itself says nothing
    labels = (dense.sum(1) > 0).long()
    found = {}
    for context in (1, 3):
        network = built(features=4, context=context, dropout=0.0).train()
        optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
        for _ in range(60):
            optimiser.zero_grad()
            network.losses(network(bags), labels, None)["tile"].backward()
            optimiser.step()
        found[context] = float((network.eval()(bags).argmax(1) == labels).float().mean())
    assert found[3] > 0.95 and found[3] > found[1]


def test_every_weight_learns_from_features_in_half_precision() -> None:
    network, bags = built().train(), lattice(6, 6)
    logits = network(Bags.of(bags.features.half(), bags.grid))
    network.losses(logits, torch.arange(36) % 3, torch.tensor([1.0, 2.0, 1.0]))["tile"].backward()
    for name, weight in network.named_parameters():
        dead = name == "read.key.bias"  # a softmax takes what all its scores have in common away again
        assert dead or (weight.grad.isfinite().all() and weight.grad.any()), name


def test_the_weight_of_a_class_counts_for_a_batch_of_one_class_and_labels_are_smoothed() -> None:
    network, logits, labels = built(), torch.randn(4, 3), torch.tensor([1, 1, 1, 1])
    logs = logits.log_softmax(1)
    by_hand = -(0.95 * logs[:, 1] + 0.05 * logs.mean(1)).mean()
    torch.testing.assert_close(network.losses(logits, labels, None)["tile"], by_hand)
    weights = torch.tensor([1.0, 3.0, 1.0])
    torch.testing.assert_close(network.losses(logits, labels, weights)["tile"], 3 * by_hand)


def test_the_head_is_as_large_as_its_layers_say() -> None:
    network = tile_context.build(Config(), features=1024, classes=24)
    block = 2 * 1024 + (512 * 1536 + 1536) + (512 * 512 + 512) + 2 * 512 * 1024 + 1024 + 512
    expected = (1024 * 512 + 512) + 25 * 512 + 1024 + 2 * block + 4 * (512 * 512 + 512) + (512 * 24 + 24)
    assert sum(weight.numel() for weight in network.parameters()) == expected


def test_tiles_without_places_are_refused() -> None:
    with pytest.raises(ValueError, match="tiles without places"):
        built()(Bags.of(torch.randn(3, 12)))


@pytest.mark.parametrize("wrong", [dict(heads=3), dict(faithful=True), dict(dropout=1.0), dict(layers=-1)])
def test_what_cannot_be_built_is_refused(wrong) -> None:
    with pytest.raises(ValueError, match="tile_context was given"):
        Config(**{**SMALL, **wrong})


def built(features: int = 12, **options) -> tile_context.TileContext:
    torch.manual_seed(0)
    return tile_context.build(Config(**{**SMALL, **options}), features=features, classes=3).eval()


def lattice(rows: int, columns: int, features: int = 12) -> Bags:
    generator = torch.Generator().manual_seed(1)
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(1)
    return Bags.of(torch.randn(rows * columns, features, generator=generator), grid)
