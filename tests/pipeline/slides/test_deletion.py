"""Whether the test by deletion tells a map that knows from one that does not."""

import numpy as np
import pytest
from scipy.special import expit, logsumexp

from pipeline.slides import deletion

TILES, LESION = 200, 20


def evidence() -> np.ndarray:
    """What each tile truly adds to the second class: a tenth of them everything, the rest nothing to speak of."""
    shares = np.random.default_rng(0).normal(0, 0.01, TILES)
    shares[:LESION] += 0.2
    return shares


def answer(kept: np.ndarray) -> np.ndarray:
    return np.array([0.5, -0.5 + evidence()[kept].sum()])


def test_a_map_that_knows_what_the_prediction_rests_on_passes() -> None:
    said = deletion.judge(evidence(), answer, predicted=1, seed=0)
    assert said.verdict == "passed" and said.words.startswith("passed: without the 20 tiles (of 200)")
    assert said.removed == LESION and said.draws == 19
    assert said.fall == pytest.approx(evidence()[:LESION].sum(), abs=0.1) and said.fall > said.fall_random_most


def test_a_map_that_points_elsewhere_fails_and_says_so() -> None:
    for other in (-evidence(), np.random.default_rng(1).permutation(evidence())):
        said = deletion.judge(other, answer, predicted=1, seed=0)
        assert said.verdict == "failed" and said.words.startswith("failed: ")


def test_what_changes_nothing_does_not_pass() -> None:
    assert deletion.judge(evidence(), lambda kept: np.array([0.0, 1.0]), predicted=1, seed=0).verdict == "failed"


def test_the_numbers_are_those_of_the_softmax() -> None:
    """Of three classes: log-odds of one are its logit less the log of the others' sum, and make its probability."""
    shares = evidence()

    def three(kept: np.ndarray) -> np.ndarray:
        return np.array([0.3, shares[kept].sum(), -1.0])

    said = deletion.judge(shares, three, predicted=1, seed=0)
    whole = shares.sum() - logsumexp([0.3, -1.0])
    left = np.sort(shares)[:-LESION].sum() - logsumexp([0.3, -1.0])
    assert said.fall == pytest.approx(whole - left)
    assert said.probability == pytest.approx(expit(whole)) and said.probability_left == pytest.approx(expit(left))
    assert said.probability_left < said.probability_random < said.probability


def test_the_same_seed_says_the_same_and_another_draws_others() -> None:
    one, again, other = (deletion.judge(evidence(), answer, predicted=1, seed=seed) for seed in (4, 4, 5))
    assert one == again and one.fall == other.fall and one.fall_random != other.fall_random


@pytest.mark.parametrize("tiles", [1, 2, 9])
def test_a_slide_of_few_tiles_is_told_to_be_untested(tiles: int) -> None:
    asked = []
    said = deletion.judge(np.ones(tiles), lambda kept: asked.append(len(kept)) or np.zeros(2), predicted=0, seed=0)
    assert said.verdict == "not tested" and "10 are needed" in said.words and asked == [tiles]


def test_a_bag_never_loses_its_last_tile() -> None:
    sizes = []
    deletion.judge(np.ones(10), lambda kept: sizes.append(len(kept)) or np.zeros(2), predicted=0, seed=0)
    assert set(sizes) == {10, 9}
