"""How good answers to slides are, from slides whose patients no member had seen: every mean over classes says that it is one.

A decision is the class with the greatest probability (argmax): no threshold was chosen, so none was fitted to anything.
AUROC compares slides of one outer fold only, for those were judged by the same networks: over all folds, the share of pairs
(one slide of the class, one of another, same fold) that are in the right order, ties half. Intervals are 95 % percentile
bootstrap intervals over patients: all slides of a patient are drawn together.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from .. import calibration
from ..significance import FEWEST_CASES, resamples


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A score and where it lies with 95 % confidence."""

    value: float | None
    """None: no slide can tell."""
    interval: tuple[float, float] | None = None
    """None: fewer than five patients."""

    @property
    def said(self) -> str:
        """0.873 (0.801 to 0.930)."""
        within = f" ({self.interval[0]:.3f} to {self.interval[1]:.3f})" if self.interval else ""
        return "-" if self.value is None else f"{self.value:.3f}{within}"


@dataclass(frozen=True, kw_only=True)
class ClassScores:
    """One class against the others."""

    slides: int
    patients: int
    auroc: Estimate
    recall: Estimate
    """Share of its slides that were called so."""
    precision: Estimate
    """Share of the slides called so that are."""
    f1: Estimate


@dataclass(frozen=True, kw_only=True)
class SlideScores:
    """What nested cross-validation estimates."""

    macro_auroc: Estimate
    """Mean over classes of each against the others; pairs within outer folds."""
    macro_balanced_accuracy: Estimate
    """Mean over classes of their recall."""
    macro_f1: Estimate
    """Mean over classes of their F1."""
    per_class: dict[str, ClassScores]
    confusion: tuple[tuple[int, ...], ...]
    """Slides: a row for each true class, a column for each predicted one."""
    ece_before: float
    """Expected calibration error of the class decided for, before the temperature; bins of equally many slides."""
    ece_after: float
    """By temperatures that were fitted without these slides."""
    nll_before: float
    """Mean negative log-likelihood of the truth, per slide."""
    nll_after: float
    slides: int
    patients: int

    @property
    def macros(self) -> dict[str, Estimate]:
        """By what each is called in words."""
        return {
            "macro AUROC": self.macro_auroc,
            "macro recall (balanced accuracy)": self.macro_balanced_accuracy,
            "macro F1": self.macro_f1,
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
    """Slides, and what networks say of them that never saw their patients."""

    truth: Int[np.ndarray, " slide"]
    logits: Float[np.ndarray, "slide class"]
    temperatures: Float[np.ndarray, " slide"]
    """Of the networks that judged each."""
    folds: Int[np.ndarray, " slide"]
    """Those of one fold were judged by the same networks."""
    patients: tuple[str, ...]

    @property
    def probabilities(self) -> Float[np.ndarray, "slide class"]:
        """Calibrated."""
        return softmax(self.logits / self.temperatures[:, None])

    @property
    def decided(self) -> Int[np.ndarray, " slide"]:
        """argmax."""
        return self.logits.argmax(axis=1)


def score(judged: Judged, classes: tuple[str, ...]) -> SlideScores:
    """All of it, from one set of resamples."""
    weights = _weights(judged.patients)  # [1 + R, slides]: the first row counts every slide once
    auroc = np.stack([_auroc(judged, number, weights) for number in range(len(classes))])  # [C, 1 + R]
    table = _confusion(judged, weights, len(classes))  # [1 + R, true, decided]
    right, of_truth, of_decision = table.diagonal(axis1=1, axis2=2).T, table.sum(axis=2).T, table.sum(axis=1).T
    recall, precision = _share(right, of_truth), _share(right, of_decision)
    f1 = _share(2 * right, of_truth + of_decision)
    is_enough = len(set(judged.patients)) >= FEWEST_CASES
    return SlideScores(
        macro_auroc=_estimate(_macro(auroc), is_enough),
        macro_balanced_accuracy=_estimate(_macro(recall), is_enough),
        macro_f1=_estimate(_macro(f1), is_enough),
        per_class={
            name: ClassScores(
                slides=int((judged.truth == n).sum()),
                patients=len({p for p, truth in zip(judged.patients, judged.truth, strict=True) if truth == n}),
                auroc=_estimate(auroc[n], is_enough),
                recall=_estimate(recall[n], is_enough),
                precision=_estimate(precision[n], is_enough),
                f1=_estimate(f1[n], is_enough),
            )
            for n, name in enumerate(classes)
        },
        confusion=tuple(tuple(round(count) for count in row) for row in table[0].tolist()),
        ece_before=_calibration_error(judged, np.ones(len(judged.truth))),
        ece_after=_calibration_error(judged, judged.temperatures),
        nll_before=_surprise(judged, np.ones(len(judged.truth))),
        nll_after=_surprise(judged, judged.temperatures),
        slides=len(judged.truth),
        patients=len(set(judged.patients)),
    )


def fit_temperature(logits: Float[np.ndarray, "slide class"], truth: Int[np.ndarray, " slide"]) -> float:
    """What logits of held-out slides are divided by, so that their probabilities can be believed.

    The truth counts as sure to (n + 1) / (n + 2) only, as Platt (1999) does it: of a few slides that are all right, the
    likeliest temperature would be 0, and every later answer certain.
    """
    slides, classes = logits.shape
    doubt = 1 / (slides + 2)
    samples = [
        calibration.Sample(
            logits=np.repeat(row[None], classes, axis=0),
            truth=np.arange(classes),
            weight=np.where(np.arange(classes) == right, 1 - doubt, doubt / (classes - 1)),
        )
        for row, right in zip(logits, truth, strict=True)
    ]
    return round(calibration.fit(samples), 6)


def roc(judged: Judged, number: int, places: int = 101) -> tuple[tuple[float, float], ...]:
    """Of one class: at each share of false alarms the share found, mean over folds by their pairs. Its area is the AUROC."""
    across = np.linspace(0, 1, places)
    found, pairs = np.zeros(places), 0
    for scores, is_class in _by_fold(judged, number):
        count = int(is_class.sum() * (~is_class).sum())
        if count:
            found += count * _found(scores, is_class, across)
            pairs += count
    return tuple((float(x), float(y)) for x, y in zip(across, found / pairs, strict=True)) if pairs else ()


def reliability(judged: Judged, is_calibrated: bool) -> tuple[tuple[float, float], ...]:
    """How sure the decision is and how often it is right, bin by bin."""
    divisor = judged.temperatures if is_calibrated else np.ones(len(judged.truth))
    sample = calibration.Sample(
        logits=judged.logits / divisor[:, None], truth=judged.truth, weight=_even(len(judged.truth))
    )
    return calibration.reliability([sample], 1.0, _bins(len(judged.truth)))


def softmax(logits: Float[np.ndarray, "*slides class"]) -> Float[np.ndarray, "*slides class"]:
    """Along the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _weights(patients: tuple[str, ...]) -> Float[np.ndarray, "resample slide"]:
    names = sorted(set(patients))
    drawn = np.vstack([np.full(len(names), 1 / len(names)), resamples(len(names))]) * len(names)
    return drawn[:, [names.index(patient) for patient in patients]]


def _by_fold(judged: Judged, number: int):
    """Of each fold the probabilities of a class, and where it is the truth."""
    likely = judged.probabilities[:, number].round(12)  # what differs by rounding alone is a tie
    for fold in np.unique(judged.folds):
        here = judged.folds == fold
        yield likely[here], judged.truth[here] == number


def _auroc(judged: Judged, number: int, weights: Float[np.ndarray, "resample slide"]) -> Float[np.ndarray, " resample"]:
    won, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    for fold, (scores, is_class) in zip(np.unique(judged.folds), _by_fold(judged, number), strict=True):
        mine = weights[:, judged.folds == fold]
        apart = scores[is_class][:, None] - scores[~is_class][None, :]
        order = (apart > 0) + 0.5 * (apart == 0)  # [of the class, of others]
        won += ((mine[:, is_class] @ order) * mine[:, ~is_class]).sum(axis=1)
        pairs += mine[:, is_class].sum(axis=1) * mine[:, ~is_class].sum(axis=1)
    return _share(won, pairs)


def _confusion(
    judged: Judged, weights: Float[np.ndarray, "resample slide"], classes: int
) -> Float[np.ndarray, "resample true decided"]:
    cell = np.zeros((len(judged.truth), classes * classes))
    cell[np.arange(len(cell)), judged.truth * classes + judged.decided] = 1
    return (weights @ cell).reshape(len(weights), classes, classes)


def _share(part: Float[np.ndarray, "..."], whole: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """NaN where there is nothing to have a share of: a resample without a slide of some class."""
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0)


def _macro(values: Float[np.ndarray, "class resample"]) -> Float[np.ndarray, " resample"]:
    """Over the classes that are there."""
    known = ~np.isnan(values)
    return _share(np.where(known, values, 0).sum(axis=0), known.sum(axis=0).astype(np.float64))


def _estimate(values: Float[np.ndarray, " resample"], is_enough: bool) -> Estimate:
    value, drawn = values[0], values[1:][~np.isnan(values[1:])]
    if np.isnan(value):
        return Estimate(value=None)
    if not is_enough or not len(drawn):
        return Estimate(value=round(float(value), 6))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(value=round(float(value), 6), interval=(round(float(low), 6), round(float(high), 6)))


SLIDES_PER_BIN = 10
"""Of fewer the share that is right is mostly luck: its standard deviation is up to 0.16 of ten slides."""


def _bins(slides: int) -> int:
    return int(np.clip(slides // SLIDES_PER_BIN, 1, calibration.BINS))


def _calibration_error(judged: Judged, divisor: Float[np.ndarray, " slide"]) -> float:
    likely = softmax(judged.logits / divisor[:, None])
    is_right, slides = judged.decided == judged.truth, len(judged.truth)
    return round(calibration.calibration_error(likely.max(axis=1), is_right, _even(slides), _bins(slides)), 6)


def _surprise(judged: Judged, divisor: Float[np.ndarray, " slide"]) -> float:
    likely = softmax(judged.logits / divisor[:, None])
    of_truth = likely[np.arange(len(likely)), judged.truth]
    return round(float(-np.log(np.maximum(of_truth, np.finfo(np.float64).tiny)).mean()), 6)


def _even(slides: int) -> Float[np.ndarray, " slide"]:
    return np.full(slides, 1 / slides)


def _found(
    scores: Float[np.ndarray, " slide"], is_class: Bool[np.ndarray, " slide"], across: Float[np.ndarray, " place"]
) -> Float[np.ndarray, " place"]:
    """The ROC curve at those shares of false alarms: straight between its corners, so that its area counts ties half."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # equal scores are one corner
    hits, alarms = np.cumsum(is_class[order])[last], np.cumsum(~is_class[order])[last]
    return np.interp(across, np.append(0, alarms / alarms[-1]), np.append(0, hits / hits[-1]))
