"""How far probabilities can be believed: one temperature that logits are divided by, learnt on cases no training saw.

Of the voxels a calibrated network calls 80 % sure, 80 % are right. Networks that were trained long are surer than they
are right; a temperature above 1 takes that back and leaves the order of the classes in every voxel as it was (Guo et
al. 2017).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Integer
from scipy import ndimage

from preprocessing.plan import Plan
from preprocessing.records import BadRecord


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """Voxels of one held-out case: what the network said, what was true, and how many voxels each stands for.

    Of regions every voxel gives a row for each label, of two classes, 0 and the label's logit: a sigmoid is just that.
    """

    logits: Float[np.ndarray, "row class"]
    truth: Integer[np.ndarray, " row"]
    weight: Float[np.ndarray, " row"]
    """They sum to 1: every case counts the same, whatever its size."""
    unsought: tuple[int, ...] = ()
    """Classes nobody looked for in this case: where the truth is 0 it may be one of them."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What the temperature did. The figures after it come from cases that had no part in fitting it: each half of the
    cases is judged by the temperature of the other half (of a single case that is not possible: its own)."""

    cases: int
    voxels: int
    """Of the sample; each stands for as many as it was drawn from."""
    nll_before: float
    """Mean negative log-likelihood of the truth, per voxel."""
    nll_after: float
    ece_before: float
    """Expected calibration error of the winning class: 15 bins of as many sampled voxels each, by confidence; the mean
    over bins, by the voxels they stand for, of the distance between confidence and share that is right."""
    ece_after: float
    brier_before: float
    """Mean squared distance between probabilities and truth, summed over classes."""
    brier_after: float

    def __post_init__(self) -> None:
        figures = (
            self.nll_before,
            self.nll_after,
            self.ece_before,
            self.ece_after,
            self.brier_before,
            self.brier_after,
        )
        if self.cases < 1 or self.voxels < 1 or not all(np.isfinite(figures)) or min(figures) < 0:
            raise BadRecord(f"calibration: {self} was met; finite figures from 0 up are needed. Measure them again.")


def calibrate(samples: Sequence[Sample]) -> tuple[float | None, Calibration | None]:
    """The temperature of a fold, from a sample of each of its held-out cases; none where nothing was held out.

    1, which changes nothing, where a temperature does not carry over from one half of the cases to the other.
    """
    if not samples:
        return None, None
    temperature = fit(samples)
    halves = (samples[::2], samples[1::2])
    if len(samples) == 1:
        judged = [(samples, temperature)]
    else:
        judged = [(half, fit(other)) for half, other in zip(halves, halves[::-1], strict=True)]
    before, after = _figures([(samples, 1.0)]), _figures(judged)
    if after[0] >= before[0]:
        temperature, after = 1.0, before
    voxels = sum(len(sample.truth) for sample in samples)
    figures = {f"{name}_{when}": round(value, 6) for when, values in (("before", before), ("after", after))
               for name, value in zip(("nll", "ece", "brier"), values, strict=True)}  # fmt: skip
    return round(temperature, 6), Calibration(cases=len(samples), voxels=voxels, **figures)


COLDEST, HOTTEST = 0.05, 20.0
"""A temperature beyond these says that the sample cannot tell: every voxel right, say."""


def fit(samples: Sequence[Sample]) -> float:
    """The temperature under which the truth is likeliest: where the slope of the log-likelihood is nought.

    The negative log-likelihood is convex in 1 / temperature (where every class was looked for), so there is one such.
    """
    from scipy.optimize import brentq  # not at the top: whoever opens a package imports this file

    logits = [_from_the_greatest(sample) for sample in samples]

    def slope(log_temperature: float) -> float:
        inverse = float(np.exp(-log_temperature))
        return sum(_slope(one, sample, inverse) for one, sample in zip(logits, samples, strict=True))

    coldest, hottest = float(np.log(COLDEST)), float(np.log(HOTTEST))
    if slope(coldest) >= 0:  # the surer the better
        return COLDEST
    if slope(hottest) <= 0:
        return HOTTEST
    return float(np.exp(brentq(slope, coldest, hottest, xtol=1e-9)))


def _from_the_greatest(sample: Sample) -> Float[np.ndarray, "class row"]:
    """The greatest of each row is 0. Class by class: sums over classes then run along memory."""
    logits = np.ascontiguousarray(sample.logits.T, dtype=np.float64)
    return logits - logits.max(axis=0)


def _slope(logits: Float[np.ndarray, "class row"], sample: Sample, inverse: float) -> float:
    """Of the mean log-likelihood, in 1 / temperature: the mean logit where the truth may be, less that over all classes."""
    of_truth = logits[sample.truth, np.arange(logits.shape[1])]
    if sample.unsought:
        unknown = sample.truth == 0
        of_truth[unknown] = _expected(logits[[0, *sample.unsought]][:, unknown], inverse)
    rise = sample.weight * (of_truth - _expected(logits, inverse))
    return float(rise.sum())  # no dot product: its last digits depend on how many threads share it


def _expected(logits: Float[np.ndarray, "class row"], inverse: float) -> Float[np.ndarray, " row"]:
    """The mean logit of each row under the probabilities it has at that temperature."""
    return (logits * _softmax(logits * inverse)).sum(axis=0)


def _softmax(logits: Float[np.ndarray, "class row"]) -> Float[np.ndarray, "class row"]:
    powers = np.exp(logits - logits.max(axis=0))
    return powers / powers.sum(axis=0)


# how good probabilities are


def probabilities(sample: Sample, temperature: float) -> Float[np.ndarray, "row class"]:
    """Of every class; classes nobody looked for are counted to the background, from which nobody told them."""
    likely = np.ascontiguousarray(_softmax(_from_the_greatest(sample) / temperature).T)
    unsought = list(sample.unsought)
    likely[:, 0] += likely[:, unsought].sum(axis=1)
    likely[:, unsought] = 0
    return likely


def _figures(judged: Sequence[tuple[Sequence[Sample], float]]) -> tuple[float, float, float]:
    """Negative log-likelihood, calibration error, Brier score: the mean over all cases."""
    rows = []
    for samples, temperature in judged:
        for sample in samples:
            likely = probabilities(sample, temperature)
            of_truth = likely[np.arange(len(likely)), sample.truth]
            brier = (likely**2).sum(axis=1) - 2 * of_truth + 1
            is_right = likely.argmax(axis=1) == sample.truth
            nll = -np.log(np.maximum(of_truth, np.finfo(np.float64).tiny))
            rows.append(np.stack([nll, brier, likely.max(axis=1), is_right, sample.weight / _cases(judged)]))
    nll, brier, confidence, is_right, weight = np.concatenate(rows, axis=1)
    error = calibration_error(confidence, is_right > 0, weight)
    return float((weight * nll).sum()), error, float((weight * brier).sum())


def _cases(judged: Sequence[tuple[Sequence[Sample], float]]) -> int:
    return sum(len(samples) for samples, _ in judged)


BINS = 15


def calibration_error(
    confidence: Float[np.ndarray, " row"],
    is_right: Bool[np.ndarray, " row"],
    weight: Float[np.ndarray, " row"],
    bins: int = BINS,
) -> float:
    """How far confidence lies from the share that is right, on average over bins that hold as many rows each.

    Bins of even width would put nearly every voxel of a scan into one of them.
    """
    gaps = np.bincount(_bins(confidence, bins), weights=weight * (confidence - is_right))
    return float(np.abs(gaps).sum() / weight.sum())


def _bins(confidence: Float[np.ndarray, " row"], bins: int) -> Integer[np.ndarray, " row"]:
    edges = np.unique(np.quantile(confidence, np.linspace(0, 1, bins + 1)[1:-1]))
    return np.searchsorted(edges, confidence, side="right")  # equal confidences share a bin


def reliability(samples: Sequence[Sample], temperature: float, bins: int = BINS) -> tuple[tuple[float, float], ...]:
    """How sure the winning class is and how often it is right, in each bin of `calibration_error`; the surest last."""
    likely = [probabilities(sample, temperature) for sample in samples]
    confidence = np.concatenate([each.max(axis=1) for each in likely])
    is_right = np.concatenate([e.argmax(axis=1) == sample.truth for e, sample in zip(likely, samples, strict=True)])
    weight = np.concatenate([sample.weight for sample in samples])
    number = _bins(confidence, bins)
    each = np.bincount(number, weights=weight)
    sums = [np.bincount(number, weights=weight * value)[each > 0] / each[each > 0] for value in (confidence, is_right)]
    return tuple((round(float(sure), 6), round(float(right), 6)) for sure, right in zip(*sums, strict=True))


# the sample


VOXELS = 20_000
"""Drawn of each held-out case."""
MOST = 50_000_000
"""Logits kept of all cases together: a fifth of a gigabyte."""
NEAR = 3
"""Voxels from a border of labels within which half of the sample is drawn: elsewhere there is little to be unsure of."""


def sample_size(cases: int, plan: Plan) -> int:
    """Voxels drawn of each of so many cases."""
    return int(np.clip(MOST // max(1, cases * plan.classes), 200, VOXELS))


def draw(truth: Integer[np.ndarray, "i j k"], rng: np.random.Generator, size: int = VOXELS) -> "Drawn":
    """A fair sample of one case's voxels on the prepared grid. `truth` holds numbers of parts, -1 where nobody knows."""
    places, weight = _places(truth, rng, size)
    return Drawn(places=places, truth=truth.ravel()[places], weight=weight)


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """Voxels of which the networks' logits are asked."""

    places: Integer[np.ndarray, " voxel"]
    """Counted along the last axis first."""
    truth: Integer[np.ndarray, " voxel"]
    weight: Float[np.ndarray, " voxel"]

    def with_logits(
        self, said: Float[np.ndarray, "voxel channel"], plan: Plan, annotated: Sequence[str] | None = None
    ) -> Sample | None:
        """None where nothing is known, or none of the case's labels was looked for."""
        sought = [n for n, label in enumerate(plan.labels) if annotated is None or label.name in annotated]
        if not len(self.places) or not sought:
            return None
        if not plan.has_regions:
            unsought = tuple(n + 1 for n in range(len(plan.labels)) if n not in sought)
            number = np.where(
                np.isin(self.truth, unsought), 0, self.truth
            )  # what was not looked for is painted nowhere
            return Sample(logits=said, truth=number.astype(np.int64), weight=self.weight, unsought=unsought)
        is_in = plan.membership[sought][:, self.truth]
        pairs = np.stack([np.zeros(is_in.size, np.float32), said[:, sought].T.ravel()], axis=1)
        weights = np.tile(self.weight / len(sought), len(sought))
        return Sample(logits=pairs, truth=is_in.ravel().astype(np.int64), weight=weights)


def _places(
    truth: Integer[np.ndarray, "i j k"], rng: np.random.Generator, size: int
) -> tuple[Integer[np.ndarray, " voxel"], Float[np.ndarray, " voxel"]]:
    """Half of them near a border where there are so many, each with the share of known voxels that it stands for."""
    is_near = near_a_border(truth)
    groups = [np.flatnonzero((truth >= 0) & is_near), np.flatnonzero((truth >= 0) & ~is_near)]
    near = min(len(groups[0]), max(size // 2, size - len(groups[1])))
    drawn = [near, min(len(groups[1]), size - near)]
    known = len(groups[0]) + len(groups[1])
    places = [np.sort(rng.choice(group, n, replace=False)) for group, n in zip(groups, drawn, strict=True)]
    weights = [np.full(n, len(group) / known / n) for group, n in zip(groups, drawn, strict=True) if n]
    return np.concatenate(places), np.concatenate(weights or [np.zeros(0)])


def near_a_border(truth: Integer[np.ndarray, "i j k"]) -> Bool[np.ndarray, "i j k"]:
    """Whether another number lies within NEAR voxels along every axis; what nobody knows is no number."""
    numbers = truth.astype(np.int32)
    highest = ndimage.maximum_filter(numbers, 2 * NEAR + 1, mode="nearest")
    lowest = ndimage.minimum_filter(
        np.where(numbers < 0, np.iinfo(np.int32).max, numbers), 2 * NEAR + 1, mode="nearest"
    )
    return highest > lowest
