"""Whether a heatmap is to be believed: without the tiles it marks, the prediction must change more than without any others.

The features stay as they are; the network answers again about the bag without those tiles. What is measured is the log-odds
of the predicted class, of which the calibrated probability is made:

    fall = log-odds of the whole bag - log-odds of what is left of it
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

REMOVED = 0.1
"""Share of the tiles that is taken away: lesions that decide a slide are often smaller, and then all of them goes."""
DRAWS = 19
"""Random removals. A map without any idea falls by more than all of them in 1 slide of 20."""
FEWEST = 10
"""Tiles below which a tenth is none, and there is nothing to draw from."""

PASSED, FAILED, UNTESTED = "passed", "failed", "not tested"


@dataclass(frozen=True, kw_only=True)
class Deletion:
    """What became of the prediction without the tiles that the map marks most, and without as many at random."""

    tiles: int
    removed: int
    probability: float
    """Of the predicted class, of the whole bag."""
    probability_left: float
    """Without the tiles that add most to it."""
    probability_random: float
    """Without as many random ones: the mean."""
    fall: float
    """Of the log-odds."""
    fall_random: float
    """Mean of the random removals."""
    fall_random_most: float
    """The most that any of them did."""
    draws: int
    seed: int

    @property
    def verdict(self) -> str:
        if not self.draws:
            return UNTESTED
        return PASSED if self.fall > max(self.fall_random_most, 0) else FAILED

    @property
    def words(self) -> str:
        """The verdict with its numbers, in a sentence."""
        if self.verdict == UNTESTED:
            return f"not tested: {self.tiles} tile{'s' * (self.tiles != 1)}; {FEWEST} are needed to take some away"
        return (
            f"{self.verdict}: without the {self.removed} tiles (of {self.tiles}) that add most, the log-odds change by "
            f"{-self.fall:+.3g}; without as many at random by {-self.fall_random:+.3g} on average"
            f" ({-self.fall_random_most:+.3g} at most, in {self.draws} draws)"
        )


def judge(
    shares: Float[np.ndarray, " tile"],
    answer: Callable[[Int[np.ndarray, " kept"]], Float[np.ndarray, " class"]],
    predicted: int,
    seed: int,
) -> Deletion:
    """`answer` gives the calibrated logits of the bag of these tiles alone. The same seed says the same."""
    tiles = np.arange(len(shares))
    whole = _log_odds(answer(tiles), predicted)
    removed = round(REMOVED * len(tiles)) if len(tiles) >= FEWEST else 0

    def without(gone: Int[np.ndarray, " gone"]) -> float:
        return _log_odds(answer(np.setdiff1d(tiles, gone)), predicted)

    if not removed:
        return _told(len(tiles), 0, whole, whole, [], seed)
    random = np.random.default_rng(seed)
    draws = [without(random.choice(tiles, removed, replace=False)) for _ in range(DRAWS)]
    return _told(len(tiles), removed, whole, without(np.argsort(-shares, kind="stable")[:removed]), draws, seed)


def _told(tiles: int, removed: int, whole: float, left: float, draws: list[float], seed: int) -> Deletion:
    """From the log-odds of the whole bag, without the top tiles, and without random ones."""
    random = draws or [whole]
    return Deletion(
        tiles=tiles,
        removed=removed,
        probability=_probability(whole),
        probability_left=_probability(left),
        probability_random=float(np.mean([_probability(each) for each in random])),
        fall=whole - left,
        fall_random=float(whole - np.mean(random)),
        fall_random_most=float(whole - np.min(random)),
        draws=len(draws),
        seed=seed,
    )


def _log_odds(logits: Float[np.ndarray, " class"], predicted: int) -> float:
    """Of one class against all others together."""
    others = np.delete(np.asarray(logits, np.float64), predicted)
    return float(logits[predicted] - np.logaddexp.reduce(others))


def _probability(log_odds: float) -> float:
    return float(np.exp(-np.logaddexp(0, -log_odds)))
