"""No patient lies across two folds, each label is in all of them, and plain datasets keep the folds they had."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.folds import FoldCase, fold_cases, split
from preprocessing.plan import CaseFacts, Fingerprint

names = st.lists(st.text("abc123_", min_size=1, max_size=6), unique=True, min_size=2, max_size=40)
QUIET = settings(deadline=None, max_examples=60, derandomize=True, database=None)


@st.composite
def datasets(draw: st.DrawFn) -> list[FoldCase]:
    """Cases of few or many patients with any labels."""
    ids = draw(names)
    patients = st.sampled_from(["", "", "p", "q", "r", "s"])
    labels = st.frozensets(st.sampled_from("KLMNO"))
    return [FoldCase(id=one, patient=draw(patients), labels=draw(labels)) for one in ids]


def patients_of(cases: list[FoldCase]) -> dict[str, list[FoldCase]]:
    found: dict[str, list[FoldCase]] = {}
    for case in cases:
        found.setdefault(f"{case.patient}/" if case.patient else case.id, []).append(case)
    return found


@QUIET
@given(cases=datasets(), folds=st.integers(2, 8), order=st.randoms())
def test_every_case_is_held_out_once_no_patient_is_on_both_sides_and_the_folds_are_of_a_size(cases, folds, order):
    patients = patients_of(cases)
    if len(patients) < 2:
        return
    count = min(folds, len(patients))
    parts = [split(cases, fold, folds) for fold in range(count)]
    ids = sorted(case.id for case in cases)
    home = {case.id: name for name, group in patients.items() for case in group}
    for trained, held_out in parts:
        assert sorted(trained + held_out) == ids and trained and held_out
        assert not {home[one] for one in trained} & {home[one] for one in held_out}
    assert sorted(one for _, held_out in parts for one in held_out) == ids
    sizes = [len(held_out) for _, held_out in parts]
    assert max(sizes) - min(sizes) <= max(map(len, patients.values()))
    shuffled = list(cases)
    order.shuffle(shuffled)
    assert split(shuffled, 0, folds) == parts[0], "the order of the files changes nothing"


@QUIET
@given(cases=datasets(), folds=st.integers(3, 8))
def test_what_several_patients_have_is_trained_on_in_every_fold(cases, folds):
    cases = [FoldCase(id=case.id, labels=case.labels) for case in cases]
    if len(cases) < 3:
        return
    several = {label for label, count in Counter(label for case in cases for label in case.labels).items() if count > 1}
    labels = {case.id: case.labels for case in cases}
    for fold in range(min(folds, len(cases))):
        trained, _ = split(cases, fold, folds)
        assert several <= frozenset().union(*(labels[one] for one in trained))


@QUIET
@given(ids=names, folds=st.integers(2, 8))
def test_cases_that_differ_in_nothing_are_dealt_out_one_by_one_as_they_always_were(ids, folds):
    shuffled = sorted(ids)
    random.Random(12345).shuffle(shuffled)
    cases = [FoldCase(id=one, labels=frozenset({"liver"})) for one in ids]
    for fold in range(min(folds, len(ids))):
        held_out = shuffled[fold :: min(folds, len(ids))]
        assert split(cases, fold, folds)[1] == sorted(held_out)


def test_a_rare_label_is_in_every_fold_as_often():
    rng = random.Random(0)
    cases = [
        FoldCase(id=f"c{n}", labels=frozenset({"liver"} | ({"tumour"} if rng.random() < 0.1 else set())))
        for n in range(200)
    ]
    held = [split(cases, fold, 5)[1] for fold in range(5)]
    rare = {case.id for case in cases if "tumour" in case.labels}
    found = [len(rare & set(one)) for one in held]
    assert max(found) - min(found) <= 1, found
    assert {len(one) for one in held} == {40}


def test_two_cases_with_the_only_lesions_are_not_held_out_together():
    cases = [FoldCase(id=f"c{n}", labels=frozenset({"lesion"} if n in (3, 7) else set())) for n in range(10)]
    assert all(set(split(cases, fold, 2)[0]) & {"c3", "c7"} for fold in range(2))


def test_nothing_is_held_out_of_all():
    cases = [FoldCase(id="b"), FoldCase(id="a", patient="p")]
    assert split(cases, "all", 5) == (["a", "b"], [])
    assert split(cases[:1], "all", 5) == (["b"], [])


def test_a_fold_that_does_not_exist_is_refused():
    two = [FoldCase(id="a"), FoldCase(id="b")]
    for fold in (-1, 5):
        with pytest.raises(UsageError, match="from 0 to 4"):
            split(two, fold, 5)
    with pytest.raises(UsageError, match="at least two patients"):
        split(two[:1], 0, 5)
    with pytest.raises(UsageError, match="2 case\\(s\\) of 1 patient"):
        split([FoldCase(id="a", patient="p"), FoldCase(id="b", patient="p")], 0, 5)
    with pytest.raises(UsageError, match="nothing is left to train on"):
        split(two, 0, 1)


def test_with_fewer_patients_than_folds_each_is_held_out_once_and_a_higher_fold_is_refused():
    three = [FoldCase(id="a"), FoldCase(id="b", patient="p"), FoldCase(id="c"), FoldCase(id="d", patient="p")]
    assert sorted(one for fold in range(3) for one in split(three, fold, 5)[1]) == ["a", "b", "c", "d"]
    with pytest.raises(UsageError, match=r"fold 3 of 5 was asked for; 3 patients.* folds 0 to 2. Ask for one of these"):
        split(three, 3, 5)


def test_a_fingerprint_tells_what_folds_need():
    def facts(patient: str, **voxels: int) -> CaseFacts:
        return CaseFacts(
            shape=(4, 4, 4),
            spacing_mm=(1.0, 1.0, 1.0),
            cropped=(4, 4, 4),
            intensities=(),
            voxels=voxels,
            patient=patient,
        )

    seen = Fingerprint(
        name="x", channels=("ct",), labels=(), dataset="",
        cases={"a": facts("1", liver=3, lesion=0), "b": facts("")},
    )  # fmt: skip
    assert fold_cases(seen) == [FoldCase(id="a", patient="1", labels=frozenset({"liver"})), FoldCase(id="b")]
