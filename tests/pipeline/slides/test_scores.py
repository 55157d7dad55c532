"""Scores are what textbooks say they are, compare only what can be compared, and know how little few patients tell."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from pipeline.slides.scores import Judged, fit_temperature, reliability, roc, score, softmax

QUIET = settings(deadline=None, max_examples=25, derandomize=True, database=None)
TWO, THREE = ("no", "yes"), ("a", "b", "c")


def judged(logits: np.ndarray, truth: np.ndarray, **more) -> Judged:
    slides = len(truth)
    given = {
        "temperatures": np.ones(slides),
        "folds": np.zeros(slides, int),
        "patients": tuple(f"p{n}" for n in range(slides)),
    }
    return Judged(logits=logits, truth=truth, **(given | more))


def some(seed: int = 0, slides: int = 40, classes: int = 2, **more) -> Judged:
    """Answers that are right more often than not, with ties."""
    rng = np.random.default_rng(seed)
    truth = np.arange(slides) % classes
    logits = rng.normal(size=(slides, classes)).round(1)
    logits[np.arange(slides), truth] += 1
    return judged(logits, truth, **more)


@QUIET
@given(seed=st.integers(0, 99), slides=st.integers(6, 60))
def test_the_auroc_of_one_fold_is_mann_whitneys_share_of_pairs_in_order(seed, slides):
    one = some(seed, slides)
    likely, truth = one.probabilities[:, 1].round(12), one.truth
    u = stats.mannwhitneyu(likely[truth == 1], likely[truth == 0]).statistic
    expected = u / ((truth == 1).sum() * (truth == 0).sum())
    found = score(one, TWO)
    assert found.macro_auroc.value == pytest.approx(expected, abs=1e-6)
    assert found.per_class["no"].auroc.value == pytest.approx(expected, abs=1e-6), "two classes mirror each other"


def test_slides_of_two_folds_are_never_compared_for_other_networks_judged_them():
    truth = np.array([0, 1, 0, 1, 0, 1, 0, 1])
    logits = np.stack([np.zeros(8), np.array([1.0, 2, 1, 2, 11, 12, 11, 12])], axis=1)  # the second half 10 higher
    folds = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    assert score(judged(logits, truth, folds=folds), TWO).macro_auroc.value == 1.0
    assert score(judged(logits, truth), TWO).macro_auroc.value == 0.75


def test_the_area_under_the_drawn_curve_is_the_auroc_that_is_told():
    one = some(slides=90, classes=3, folds=np.arange(90) // 30)
    found = score(one, THREE)
    for number, name in enumerate(THREE):
        across, up = np.array(roc(one, number, places=4001)).T
        assert np.trapezoid(up, across) == pytest.approx(found.per_class[name].auroc.value, abs=1e-3)
        assert (up[0], up[-1]) == (pytest.approx(0, abs=0.5), 1.0) and (np.diff(up) >= -1e-12).all()


def test_means_over_classes_weigh_a_rare_class_as_a_common_one():
    truth = np.array([0] * 8 + [1] * 2)
    decided = np.array([0] * 6 + [1] * 2 + [1, 0])
    found = score(judged(np.eye(2)[decided] * 3, truth), TWO)
    assert found.confusion == ((6, 2), (1, 1))
    assert found.macro_balanced_accuracy.value == pytest.approx((6 / 8 + 1 / 2) / 2)
    f1 = (2 * 6 / (8 + 7), 2 * 1 / (2 + 3))
    assert found.macro_f1.value == pytest.approx(sum(f1) / 2, abs=1e-6)
    assert found.per_class["yes"].precision.value == pytest.approx(1 / 3, abs=1e-6)
    assert (found.per_class["no"].slides, found.per_class["yes"].patients) == (8, 2)
    assert all("macro" in name for name in found.macros)


def test_a_class_nobody_decides_for_has_an_f1_of_zero_and_no_precision():
    found = score(judged(np.array([[2.0, 0.0]] * 6), np.array([0, 1] * 3)), TWO)
    assert found.per_class["yes"].f1.value == 0 and found.per_class["yes"].precision.value is None
    assert found.macro_f1.value == pytest.approx((2 * 3 / 9) / 2, abs=1e-6)


def test_intervals_are_over_patients_so_more_slides_of_the_same_patients_make_them_no_narrower():
    once = some(slides=24)
    twice = judged(np.repeat(once.logits, 2, axis=0), np.repeat(once.truth, 2),
                   patients=tuple(p for p in once.patients for _ in range(2)))  # fmt: skip
    as_if_new = judged(twice.logits, twice.truth)
    narrow, same, wide = (score(one, TWO).macro_balanced_accuracy for one in (as_if_new, twice, once))
    assert same == wide and narrow.value == wide.value
    assert narrow.interval[1] - narrow.interval[0] < 0.85 * (wide.interval[1] - wide.interval[0])


def test_an_interval_holds_the_value_and_is_about_as_wide_as_the_normal_one():
    rng = np.random.default_rng(1)
    truth = np.repeat([0, 1], 200)
    is_right = rng.random(400) < 0.8
    found = score(judged(np.eye(2)[np.where(is_right, truth, 1 - truth)], truth), TWO).macro_balanced_accuracy
    low, high = found.interval
    assert low < found.value < high
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.8 * 0.2 / 400), rel=0.15)


def test_four_patients_give_no_interval():
    found = score(some(slides=4), TWO)
    assert found.macro_auroc.value is not None and found.macro_auroc.interval is None


def test_answers_that_know_nothing_have_an_auroc_near_a_half():
    rng = np.random.default_rng(0)
    found = score(judged(rng.normal(size=(300, 2)), rng.integers(0, 2, 300)), TWO).macro_auroc
    assert found.value == pytest.approx(0.5, abs=0.06) and found.interval[0] < 0.5 < found.interval[1]


def test_the_temperature_is_where_the_truth_is_likeliest_with_a_little_doubt_left():
    one = some(3, 60, 3)
    doubt = 1 / (60 + 2)
    target = np.full((60, 3), doubt / 2)
    target[np.arange(60), one.truth] = 1 - doubt

    def surprise(log_temperature: float) -> float:
        return float(-(target * np.log(softmax(one.logits / np.exp(log_temperature)))).sum())

    best = float(np.exp(optimize.minimize_scalar(surprise, bounds=(-3, 3), method="bounded").x))
    assert fit_temperature(one.logits, one.truth) == pytest.approx(best, rel=1e-3)
    assert fit_temperature(one.logits * 4, one.truth) == pytest.approx(4 * best, rel=1e-3)


@pytest.mark.parametrize("slides", [4, 40])
def test_a_few_slides_that_are_all_right_do_not_make_every_later_answer_certain(slides):
    truth = np.arange(slides) % 2
    logits = np.eye(2)[truth] * 2.0
    sure = softmax(logits / fit_temperature(logits, truth)).max(axis=1)
    assert np.allclose(sure, (slides + 1) / (slides + 2), atol=1e-3)


def test_a_temperature_brings_back_what_was_too_sure_and_changes_no_decision():
    cool = some(5, 400)
    hot = judged(cool.logits * 6, cool.truth, temperatures=np.full(400, fit_temperature(cool.logits * 6, cool.truth)))
    found = score(hot, TWO)
    assert found.ece_after < found.ece_before / 2 and found.nll_after < found.nll_before
    assert (hot.decided == cool.decided).all()
    right = (hot.decided == hot.truth).mean()
    sure = np.array(reliability(hot, is_calibrated=True))
    assert sure[:, 0].min() >= 0.5 and sure[:, 1].mean() == pytest.approx(right, abs=0.05)


def test_the_calibration_error_of_a_dozen_slides_is_not_split_into_bins_of_one():
    found = score(some(slides=12), TWO)
    one = some(slides=12)
    sure, right = one.probabilities.max(axis=1).mean(), (one.decided == one.truth).mean()
    assert found.ece_before == pytest.approx(abs(sure - right), abs=1e-6)
