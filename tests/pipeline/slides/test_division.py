"""A patient is never on two sides, every slide is measured once, and what measures a fold never chose anything in it."""

import logging

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.folds import FoldCase
from pipeline.slides.division import Division, divide

QUIET = settings(deadline=None, max_examples=25, derandomize=True, database=None)


@st.composite
def cohorts(draw: st.DrawFn) -> list[FoldCase]:
    """Two or three classes of three to nine patients, each with one to three slides."""
    cases = []
    for name in "ABC"[: draw(st.integers(2, 3))]:
        for patient in range(draw(st.integers(3, 9))):
            slides = draw(st.integers(1, 3))
            cases += [
                FoldCase(id=f"{name}{patient}-{n}", patient=f"{name}{patient}", labels=frozenset(name))
                for n in range(slides)
            ]
    return cases


def divided(cases, folds, inner_folds) -> Division:
    """Or nothing, where uneven patients leave a training without a class: that is refused."""
    try:
        return divide(cases, folds, inner_folds)
    except UsageError:
        assume(False)
        raise


@QUIET
@given(cases=cohorts(), folds=st.integers(2, 6), inner_folds=st.integers(2, 4))
def test_every_slide_is_measured_once_and_no_patient_is_on_two_sides(cases, folds, inner_folds):
    division = divided(cases, folds, inner_folds)
    patient = {case.id: case.patient for case in cases}
    every = sorted(patient)

    def patients(ids) -> set[str]:
        return {patient[one] for one in ids}

    assert sorted(one for fold in division.outer for one in fold.measured) == every
    for fold in division.outer:
        rest = sorted(set(every) - set(fold.measured))
        assert not patients(rest) & patients(fold.measured)
        assert sorted(one for part in fold.inner for one in part.held_out) == rest, "each chooses for one training"
        for part in fold.inner:
            assert sorted(part.taught + part.held_out) == rest
            assert not patients(part.taught) & patients(part.held_out)
    assert sorted(one for part in division.members for one in part.held_out) == every
    for part in division.members:
        assert sorted(part.taught + part.held_out) == every and not patients(part.taught) & patients(part.held_out)


@QUIET
@given(cases=cohorts(), folds=st.integers(2, 6), order=st.randoms())
def test_every_training_learns_every_class_and_the_order_of_the_rows_changes_nothing(cases, folds, order):
    division = divided(cases, folds, 3)
    labels = {case.id: case.labels for case in cases}
    for part in [part for fold in division.outer for part in fold.inner] + list(division.members):
        assert frozenset().union(*(labels[one] for one in part.taught)) == frozenset().union(*labels.values())
    shuffled = list(cases)
    order.shuffle(shuffled)
    assert divide(shuffled, folds, 3) == division


def patients(**classes: int) -> list[FoldCase]:
    return [
        FoldCase(id=f"{name}{n}", patient=f"{name}{n}", labels=frozenset({name}))
        for name, count in classes.items()
        for n in range(count)
    ]


def test_each_class_is_spread_evenly_over_the_outer_folds():
    division = divide(patients(rare=5, common=20), 5, 3)
    for fold in division.outer:
        assert sorted(one.rstrip("0123456789") for one in fold.measured) == ["common"] * 4 + ["rare"]


def test_of_a_class_of_three_patients_three_folds_are_made_and_that_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        division = divide(patients(rare=3, common=12), 5, 3)
    assert len(division.outer) == 3 and "rarest class has 3 patients" in caplog.text
    assert all(len(fold.inner) == 2 for fold in division.outer)


def test_folds_that_leave_nobody_to_learn_a_class_from_are_refused_with_what_to_ask_for():
    with pytest.raises(UsageError, match=r"nobody|no patient left to learn rare from.*--folds"):
        divide(patients(rare=3, common=12), 2, 2)
