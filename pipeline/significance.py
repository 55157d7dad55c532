"""What few cases allow one to say: intervals for a mean, and whether two ways of segmenting really differ.

Intervals are 95 % percentile bootstrap intervals over cases (Efron & Tibshirani 1993, chapter 13), 2000 resamples, always
with the same seed. Differences are of the same cases: Wilcoxon's signed-rank test, two-sided, exact where that is possible,
cases without a difference left out; p-values of several labels are corrected by Holm (1979). Cases count as independent of
each other, also those of one patient.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from jaxtyping import Float

RESAMPLES, SEED = 2000, 0

FEWEST_CASES = 5
"""Below, resampling a handful of numbers says nothing about cases that were not seen."""
FEWEST_DIFFERENCES = 6
"""Five differences of one sign have the two-sided p = 2 / 2^5 = 0.0625: no outcome of fewer than six could reach 0.05."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Numbers of several cases in a few: None where there are too few for it."""

    cases: int
    mean: float | None
    median: float | None
    interval: tuple[float, float] | None
    """In which the mean lies, with 95 % confidence."""


def spread(values: Sequence[float | None]) -> Spread:
    """Of what is known; what could not be measured is left out."""
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if not len(known):
        return Spread(cases=0, mean=None, median=None, interval=None)
    return Spread(cases=len(known), mean=float(known.mean()), median=float(np.median(known)), interval=interval(known))


def interval(values: Float[np.ndarray, " case"]) -> tuple[float, float] | None:
    """Where the mean lies, with 95 % confidence; None of fewer than five cases."""
    if len(values) < FEWEST_CASES:
        return None
    low, high = np.percentile(resamples(len(values)) @ values, [2.5, 97.5])
    return float(low), float(high)


def interval_of_mean(of: Mapping[str, Mapping[str, float | None]]) -> tuple[float, float] | None:
    """Where the mean over labels of their means over cases lies (label -> case -> value); whole cases are drawn."""
    table = _table(of)
    if len(table) < FEWEST_CASES:
        return None
    weights, known = resamples(len(table)), ~np.isnan(table)
    share = weights @ known
    with np.errstate(invalid="ignore"):  # a resample without a case of some rare label
        means = (weights @ np.where(known, table, 0)) / np.where(share > 0, share, np.nan)
    counted = ~np.isnan(means)
    low, high = np.percentile(np.where(counted, means, 0).sum(axis=1) / counted.sum(axis=1).clip(1), [2.5, 97.5])
    return float(low), float(high)


def _table(of: Mapping[str, Mapping[str, float | None]]) -> Float[np.ndarray, "case label"]:
    """Cases of which anything is known, by name, whatever the order they came in; NaN is not known."""
    cases = sorted({case for values in of.values() for case, value in values.items() if value is not None})
    rows = [[np.nan if (value := of[label].get(case)) is None else value for label in of] for case in cases]
    return np.array(rows, dtype=np.float64).reshape(len(cases), len(of))


@lru_cache(maxsize=8)
def resamples(cases: int) -> Float[np.ndarray, "resample case"]:
    """How much each case weighs in each resample: a mean becomes a product."""
    rng = np.random.default_rng(SEED)
    drawn = rng.multinomial(cases, np.full(cases, 1 / cases), size=RESAMPLES)
    return drawn / cases


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One way of segmenting minus another, over the cases that both could be measured on."""

    cases: int
    higher: int
    lower: int
    """The rest are equal."""
    mean: float | None
    interval: tuple[float, float] | None
    p: float | None
    """Wilcoxon's; None: too few cases differ."""
    p_holm: float | None
    """The same, corrected for the number of labels that were tested."""

    @property
    def said(self) -> str:
        """The p-value, or why there is none."""
        if self.p is None:
            return "no case differs" if self.cases and not self.higher + self.lower else "too few"
        return f"p = {self.p_holm:.3f}" if self.p_holm is not None and self.p_holm >= 0.001 else "p < 0.001"


def difference(ours: Mapping[str, float | None], theirs: Mapping[str, float | None]) -> Difference:
    """Of two measurements of the same cases, by name."""
    pairs = [(mine, theirs.get(case)) for case, mine in ours.items()]
    apart = np.array([a - b for a, b in pairs if a is not None and b is not None], dtype=np.float64)
    apart[np.abs(apart) < 1e-12] = 0  # equal but for rounding
    p = wilcoxon(apart)
    return Difference(
        cases=len(apart),
        higher=int((apart > 0).sum()),
        lower=int((apart < 0).sum()),
        mean=float(apart.mean()) if len(apart) else None,
        interval=interval(apart),
        p=p,
        p_holm=p,
    )


def differences(
    ours: Mapping[str, Mapping[str, float | None]], theirs: Mapping[str, Mapping[str, float | None]]
) -> dict[str, Difference]:
    """Label by label (label -> case -> value), p-values corrected over the labels."""
    found = {label: difference(ours[label], theirs[label]) for label in ours if label in theirs}
    tested = {label: one.p for label, one in found.items() if one.p is not None}
    corrected = dict(zip(tested, holm(list(tested.values())), strict=True))
    return {label: replace(one, p_holm=corrected.get(label)) for label, one in found.items()}


def wilcoxon(apart: Float[np.ndarray, " case"]) -> float | None:
    """The two-sided p-value of the signed-rank test; None where too few cases differ."""
    differing = apart[apart != 0]
    if len(differing) < FEWEST_DIFFERENCES:
        return None
    from scipy import stats  # takes half a second

    return float(stats.wilcoxon(differing).pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Each times the number of tests that are not yet rejected, never falling, at most 1."""
    order = np.argsort(p, kind="stable")
    corrected = np.empty(len(p))
    corrected[order] = np.maximum.accumulate([p[place] * (len(p) - rank) for rank, place in enumerate(order)]).clip(
        max=1
    )
    return [float(each) for each in corrected]
