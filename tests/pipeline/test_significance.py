"""Intervals and tests are those of scipy, and too few cases are said to be too few."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pipeline.significance import (
    Difference,
    difference,
    differences,
    holm,
    interval,
    interval_of_mean,
    spread,
    wilcoxon,
)


def test_intervals_are_those_of_scipy() -> None:
    values = np.random.default_rng(1).beta(8, 2, size=40)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(0))
    assert interval(values) == pytest.approx(tuple(theirs.confidence_interval), abs=0.003)


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = [low <= 0.8 <= high for low, high in (interval(rng.beta(8, 2, 60)) or (0, 0) for _ in range(400))]
    assert 0.90 <= np.mean(held) <= 0.98


def test_few_cases_have_a_mean_and_no_interval() -> None:
    assert spread([None, 1.0, 0.0, 0.5]).interval is None and spread([None, 1.0, 0.0]).mean == 0.5
    assert spread([None]).mean is None and spread([]).cases == 0
    assert spread([0.5] * 5).interval == pytest.approx((0.5, 0.5))


def test_the_same_numbers_give_the_same_interval() -> None:
    values = np.random.default_rng(2).random(30)
    assert interval(values) == interval(values.copy())


def test_the_mean_over_labels_is_drawn_case_by_case() -> None:
    """Two labels that go up and down together are no more certain than one."""
    values = np.random.default_rng(3).random(30)
    cases = {f"{n:02d}": float(value) for n, value in enumerate(values)}
    assert interval_of_mean({"a": cases, "b": cases}) == pytest.approx(interval(values))
    rare = {"a": cases, "b": {"00": 0.5, "01": None, "alone": None}}
    assert interval_of_mean(rare) == interval_of_mean({"a": dict(reversed(cases.items())), "b": {"00": 0.5}})
    assert interval_of_mean({"a": dict(list(cases.items())[:4])}) is None and interval_of_mean({}) is None


def test_p_values_are_those_of_scipy_and_ties_are_left_out() -> None:
    apart = np.array([0.1, 0.2, -0.05, 0.3, 0.0, 0.25, 0.15, 0.02, 0.0])
    assert wilcoxon(apart) == stats.wilcoxon(apart[apart != 0]).pvalue
    assert wilcoxon(np.full(6, 0.1)) == pytest.approx(2 / 2**6)  # exact, in spite of the ties among them


def test_too_few_differences_are_not_tested() -> None:
    ours = {f"case{n}": 0.8 + n / 100 for n in range(9)}
    few = difference(ours, {case: value - 0.1 * (n < 5) for n, (case, value) in enumerate(ours.items())})
    assert (few.cases, few.higher, few.lower, few.p, few.said) == (9, 5, 0, None, "too few")
    same = difference(ours, dict(ours))
    assert (same.mean, same.p, same.said) == (0, None, "no case differs")
    none = difference(ours, {"other": 1.0})
    assert (none.cases, none.mean, none.said) == (0, None, "too few")


def test_only_cases_that_both_measured_are_compared() -> None:
    found = difference({"a": 1.0, "b": None, "c": 0.5}, {"a": 0.5, "b": 0.1, "d": 0.9})
    assert (found.cases, found.mean) == (1, 0.5)


def test_holm_is_done_by_hand() -> None:
    """Holm (1979), as in every textbook: 4 x 0.005, 3 x 0.01, then never below the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1, 1] and holm([]) == []


def test_labels_are_corrected_together() -> None:
    rng = np.random.default_rng(0)
    theirs = {label: {f"{n}": float(rng.random()) for n in range(12)} for label in ("liver", "spleen", "rare")}
    ours = {
        label: {case: value + 0.1 + 0.01 * rng.random() for case, value in of.items()} for label, of in theirs.items()
    }
    ours["rare"] = dict(list(ours["rare"].items())[:3])
    found = differences(ours, theirs)
    assert found["liver"].p_holm == pytest.approx(2 * found["liver"].p) and found["rare"].said == "too few"
    assert isinstance(found["spleen"], Difference) and found["spleen"].said == "p < 0.001"


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 1), min_size=5, max_size=30))
def test_the_mean_lies_in_its_interval_and_that_among_the_values(values: list[float]) -> None:
    found = spread(values)
    assert found.interval is not None and found.mean is not None
    low, high = found.interval
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert low - 1e-9 <= found.mean <= high + 1e-9 or min(values) < max(values)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 1), max_size=9))
def test_a_corrected_p_value_is_never_smaller_and_keeps_its_rank(p: list[float]) -> None:
    corrected = holm(p)
    assert all(before <= after <= 1 for before, after in zip(p, corrected, strict=True))
    assert [corrected[n] for n in np.argsort(p, kind="stable")] == sorted(corrected)
