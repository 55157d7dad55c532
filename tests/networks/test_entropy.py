"""Entropy of attention as a loss: numpy's own formula, its form for the strongest tiles, and how its weight falls."""

import itertools
import math

import numpy as np
import pytest
import torch

from networks.parts.bags import BagAnswer, Bags, pooled_by_scores
from networks.parts.entropy import annealed, attention_entropy_loss


def answered(scores: torch.Tensor, *sizes: int, mask: torch.Tensor | None = None) -> tuple[BagAnswer, Bags]:
    offsets = torch.tensor([0, *itertools.accumulate(sizes)])
    bags = Bags(features=torch.zeros(sum(sizes), 1), offsets=offsets)
    _, _, entropy, log_sums = pooled_by_scores(bags.features.to(scores), scores, offsets, mask)
    logits = torch.zeros(len(sizes), 2)
    return BagAnswer(logits=logits, scores=scores, log_sums=log_sums, entropy=entropy, mask=mask), bags


def by_hand(scores: np.ndarray, top: int = 0) -> float:
    """sum a ln a, with every number in sight."""
    share = np.exp(scores - scores.max())
    share = np.sort(share)[::-1][: top or None]
    share = share / share.sum()
    return float((share * np.log(share)).sum())


@pytest.mark.parametrize("top", [0, 1, 4, 100])
def test_it_is_the_mean_negative_entropy_over_maps_and_bags_of_any_size(top: int) -> None:
    sizes = (9, 1, 3)
    scores = torch.randn(13, 2, dtype=torch.float64)
    answer, bags = answered(scores, *sizes)
    expected = [by_hand(part[:, k].numpy(), top) for part in scores.split(sizes) for k in range(2)]
    assert attention_entropy_loss(answer, bags, top).item() == pytest.approx(np.mean(expected), abs=1e-12)


def test_it_is_least_where_attention_is_flat_and_nothing_where_one_tile_has_it_all() -> None:
    for top, least in ((0, -math.log(50)), (20, -math.log(20))):
        flat, bags = answered(torch.zeros(50, 1), 50)
        assert attention_entropy_loss(flat, bags, top).item() == pytest.approx(least, abs=1e-5)
        sharp, bags = answered(torch.tensor([[60.0], *[[0.0]] * 49]), 50)
        assert attention_entropy_loss(sharp, bags, top).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("top", [0, 5])
def test_attention_so_sharp_that_its_weights_vanish_still_has_a_gradient_that_flattens_it(top: int) -> None:
    scores = torch.linspace(0, 400, 30)[:, None].clone().requires_grad_()  # exp(-400) is 0 in float32
    answer, bags = answered(scores, 30)
    loss = attention_entropy_loss(answer, bags, top)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert loss.isfinite() and gradient.isfinite().all()
    assert gradient[-1] >= 0 >= gradient[-2]  # down with the first, up with the second


def test_of_the_strongest_tiles_masked_ones_are_none() -> None:
    scores = torch.randn(20, 1, dtype=torch.float64)
    mask = torch.ones(20, 1, dtype=torch.bool)
    mask[scores.argmax()] = False
    answer, bags = answered(scores, 20, mask=mask)
    expected = by_hand(scores[mask].numpy(), 6)
    assert attention_entropy_loss(answer, bags, 6).item() == pytest.approx(expected, abs=1e-12)
    assert attention_entropy_loss(answer, bags).item() == pytest.approx(by_hand(scores[mask].numpy()), abs=1e-12)


def test_its_weight_falls_along_half_a_cosine_to_nothing() -> None:
    weights = [annealed(0.2, done) for done in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert weights[0] == 0.2 and weights[2] == pytest.approx(0.1) and weights[4] == pytest.approx(0, abs=1e-12)
    assert weights[1] - weights[2] == pytest.approx(weights[2] - weights[3])
    assert all(a > b for a, b in itertools.pairwise(weights))
