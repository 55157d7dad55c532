"""A rule does what it says, the evidence for it is what it would have done, and only what helps beyond chance is taken."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from monai.transforms import FillHoles
from scipy import ndimage
from scipy.stats import binomtest

from pipeline.postprocessing import (
    HeldOut,
    Largest,
    LargestOfAll,
    NoHoles,
    NoSmaller,
    Rule,
    candidates,
    choose,
    clean,
    covers,
    sign_test,
    tried,
)
from preprocessing.plan import Label, Plan
from preprocessing.records import BadRecord, decode, encode
from preprocessing.volume import Geometry, Volume

SHAPE = (9, 8, 7)
REGIONS = (
    Label(value=2, name="whole", colour=(1, 2, 3), parts=(1, 2, 3)),
    Label(value=1, name="core", colour=(1, 2, 3), parts=(1, 3)),
    Label(value=3, name="active", colour=(1, 2, 3), parts=(3,)),
)


@pytest.fixture(scope="module")
def plain(make_plan: Callable[..., Plan]) -> Plan:
    """liver 1, lesion 7."""
    return replace(make_plan(), spacing_mm=(1.0, 1.0, 1.0), ignored=9)


@pytest.fixture(scope="module")
def regions(plain: Plan) -> Plan:
    return replace(plain, labels=REGIONS)


def a_map(voxels: np.ndarray) -> Volume:
    geometry = Geometry(shape=voxels.shape, affine=np.diag([1.0, 1.0, 2.0, 1.0]))
    return Volume(voxels=voxels.astype(np.uint8)[None], geometry=geometry, channels=("labels",))


def maps(values: list[int]) -> st.SearchStrategy[np.ndarray]:
    return arrays.arrays(np.uint8, SHAPE, elements=st.sampled_from([0, 0, *values]), fill=st.just(0))


def blobs(values: list[int]) -> st.SearchStrategy[np.ndarray]:
    """Boxes painted over each other: parts of some size, holes, labels inside labels."""
    corner = st.tuples(*(st.integers(0, n - 1) for n in SHAPE))
    side = st.tuples(*(st.integers(1, 5) for _ in SHAPE))
    boxes = st.lists(st.tuples(corner, side, st.sampled_from([0, *values, *values])), max_size=9)

    def painted(drawn: list[tuple[tuple[int, ...], tuple[int, ...], int]]) -> np.ndarray:
        voxels = np.zeros(SHAPE, np.uint8)
        for begin, size, value in drawn:
            voxels[tuple(slice(b, b + s) for b, s in zip(begin, size, strict=True))] = value
        return voxels

    return boxes.map(painted)


def cleaned(voxels: np.ndarray, rule: Rule, plan: Plan) -> np.ndarray:
    return clean(a_map(voxels), [rule], plan)[0].voxels[0]


# what a rule does


@given(blobs([1, 7]) | maps([1, 7]))
def test_of_a_label_its_largest_part_is_kept_and_nothing_else_is_touched(plain: Plan, voxels: np.ndarray) -> None:
    kept = cleaned(voxels, Largest(label="liver"), plain)
    parts, count = ndimage.label(voxels == 1, np.ones((3, 3, 3)))
    sizes = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    largest = 1 + int(sizes.argmax()) if count else -1
    np.testing.assert_array_equal(kept, np.where((voxels == 1) & (parts != largest), 0, voxels))


@given(blobs([1, 7]) | maps([1, 7]))
def test_the_largest_of_everything_keeps_one_part(plain: Plan, voxels: np.ndarray) -> None:
    kept = cleaned(voxels, LargestOfAll(), plain)
    assert ndimage.label(kept, np.ones((3, 3, 3)))[1] == bool(voxels.any())
    np.testing.assert_array_equal(kept[kept > 0], voxels[kept > 0])
    largest = max(np.bincount(ndimage.label(voxels, np.ones((3, 3, 3)))[0].ravel())[1:], default=0)
    assert (kept > 0).sum() == largest


@given(blobs([1, 7]) | maps([1, 7]), st.floats(0.001, 0.05))
def test_only_parts_below_the_volume_are_dropped(plain: Plan, voxels: np.ndarray, ml: float) -> None:
    kept = cleaned(voxels, NoSmaller(label="lesion", ml=ml), plain)
    parts, count = ndimage.label(voxels == 7, np.ones((3, 3, 3)))
    for number in range(1, count + 1):
        part = parts == number
        assert (kept[part] == (7 if part.sum() * 0.002 >= ml else 0)).all()
    np.testing.assert_array_equal(kept[voxels != 7], voxels[voxels != 7])


@given(blobs([1]))
def test_holes_are_filled_as_monai_fills_them(plain: Plan, voxels: np.ndarray) -> None:
    filled = cleaned(voxels, NoHoles(label="liver"), plain)
    np.testing.assert_array_equal(filled, np.asarray(FillHoles(connectivity=1)(voxels[None])[0]))


def test_another_label_is_no_hole(plain: Plan) -> None:
    voxels = np.full(SHAPE, 1)
    voxels[3:6, 3:6, 3] = 7
    voxels[3:6, 3:6, 5] = 0
    filled = cleaned(voxels, NoHoles(label="liver"), plain)
    assert (filled[3:6, 3:6, 3] == 7).all() and (filled[3:6, 3:6, 5] == 1).all()


def test_of_regions_what_lies_in_one_goes_with_it_and_what_lies_around_stays(regions: Plan) -> None:
    voxels = np.zeros(SHAPE, int)
    voxels[:5, :5, :5], voxels[1:4, 1:4, 1:4], voxels[2, 2, 2] = 2, 1, 3
    voxels[8, 7, 6] = 3
    no_active = cleaned(voxels, NoSmaller(label="active", ml=0.01), regions)
    assert no_active[2, 2, 2] == 1 == no_active[8, 7, 6], "the core is around it"
    whole = cleaned(voxels, Largest(label="whole"), regions)
    assert whole[8, 7, 6] == 0 and (whole[:5, :5, :5] == voxels[:5, :5, :5]).all()
    np.testing.assert_array_equal(covers(regions)[:, 1:], [[1, 1, 1], [0, 1, 1], [0, 0, 1]])


def test_what_was_changed_is_told_in_millilitres(plain: Plan) -> None:
    voxels = np.zeros(SHAPE, int)
    voxels[:4, :4, :4], voxels[2, 2, 2], voxels[8, 7, 5:7] = 1, 0, 1
    rules = (NoHoles(label="liver"), Largest(label="liver"), Largest(label="lesion"))
    labels, done = clean(a_map(voxels), rules, plain)
    assert (labels.voxels > 0).sum() == 64
    assert [(each.removed_ml, each.added_ml) for each in done] == [
        ({}, {"liver": 0.002}),
        ({"liver": 0.004}, {}),
        ({}, {}),
    ]
    assert done[2].rule == "only the largest part of lesion is kept"


def test_a_region_loses_and_gains_with_the_regions_in_it(regions: Plan) -> None:
    voxels = np.zeros(SHAPE, int)
    voxels[:6, :6, :6], voxels[1:5, 1:5, 1:5], voxels[2, 2, 2], voxels[2, 2, 3] = 2, 1, 3, 0
    voxels[8, 7, 5], voxels[8, 7, 6] = 2, 3
    rules = (NoHoles(label="core"), NoSmaller(label="active", ml=0.01), Largest(label="whole"))
    (core, active, whole) = clean(a_map(voxels), rules, regions)[1]
    assert (core.removed_ml, core.added_ml) == ({}, {"whole": 0.002, "core": 0.002})
    assert (active.removed_ml, active.added_ml) == ({"active": 0.004}, {}), "it stays in the core and the whole"
    assert (whole.removed_ml, whole.added_ml) == ({"whole": 0.004, "core": 0.002}, {})


def test_without_rules_nothing_is_touched(plain: Plan) -> None:
    labels = a_map(np.ones(SHAPE))
    assert clean(labels, (), plain) == (labels, ())


def test_rules_that_make_no_sense_are_refused(plain: Plan) -> None:
    with pytest.raises(BadRecord, match="above 0"):
        NoSmaller(label="liver", ml=0.0)
    with pytest.raises(BadRecord, match="'spleen'"):
        clean(a_map(np.ones(SHAPE)), [Largest(label="spleen")], plain)


# the evidence


def by_hand(labels: np.ndarray, reference: np.ndarray, plan: Plan) -> dict[str, float]:
    """Dice with masks and nothing else; a region is found where its label or one of a region within it is painted."""
    known = reference != plan.ignored
    scores = {}
    for label in plan.labels:
        own = set(label.parts or (label.value,))
        painted = [other.value for other in plan.labels if set(other.parts or (other.value,)) <= own]
        found, truth = np.isin(labels, painted) & known, np.isin(reference, list(own)) & known
        if found.any() or truth.any():
            scores[label.name] = 2 * (found & truth).sum() / (found.sum() + truth.sum())
    return scores


@settings(max_examples=40)
@given(blobs([1, 7]), blobs([1, 7, 9]))
def test_the_evidence_for_each_rule_is_what_it_does(plain: Plan, voxels: np.ndarray, reference: np.ndarray) -> None:
    check_evidence(plain, voxels, reference)


@settings(max_examples=40)
@given(blobs([1, 2, 3]), blobs([1, 2, 3, 9]))
def test_the_evidence_for_each_rule_is_what_it_does_to_regions(
    regions: Plan, voxels: np.ndarray, reference: np.ndarray
) -> None:
    check_evidence(regions, voxels, reference)


def check_evidence(plan: Plan, voxels: np.ndarray, reference: np.ndarray) -> None:
    before, changes = tried(a_map(voxels), a_map(reference), plan)
    assert before == pytest.approx(by_hand(voxels, reference, plan), abs=1e-6)
    for rule in candidates(plan):
        after = by_hand(cleaned(voxels, rule, plan), reference, plan)
        said = before | changes.get(rule, {})
        assert said == pytest.approx({name: after.get(name, 1.0) for name in before}, abs=1e-6), rule


@settings(max_examples=40)
@given(blobs([1, 2, 3]), blobs([1, 2, 3]), st.data())
def test_rules_chosen_together_do_what_each_did_alone(
    regions: Plan, voxels: np.ndarray, reference: np.ndarray, data: st.DataObject
) -> None:
    """Two labels beside each other and a third within the first: choose() lets no label be touched twice."""
    labels = (REGIONS[0], replace(REGIONS[2], parts=()), Label(value=4, name="beside", colour=(1, 2, 3), parts=(4,)))
    plan = replace(regions, labels=(replace(labels[0], parts=(2, 3)), *labels[1:]))
    voxels, reference = (np.where(each == 1, 4, each) for each in (voxels, reference))
    before, changes = tried(a_map(voxels), a_map(reference), plan)
    rules = data.draw(st.lists(st.sampled_from(candidates(plan)), min_size=2, max_size=4, unique=True))
    zero = {f"case {n}": dict.fromkeys(before, 0.0) for n in range(5)}
    promised = {rule: {rule.label: 0.5} for rule in rules if rule.label in before}
    said_so = HeldOut.of(zero, dict.fromkeys(zero, promised))
    chosen = [one.rule for one in choose({"0": said_so}, plan)]
    together, _ = clean(a_map(voxels), chosen, plan)
    after = by_hand(together.voxels[0], reference, plan)
    said = dict(before)
    for rule in chosen:
        said |= changes.get(rule, {})
    assert said == pytest.approx({name: after.get(name, 1.0) for name in before}, abs=1e-6)


def test_a_label_that_is_rightly_gone_has_dice_1(plain: Plan) -> None:
    voxels, reference = np.zeros(SHAPE, int), np.zeros(SHAPE, int)
    voxels[0, 0, 0] = 7
    before, changes = tried(a_map(voxels), a_map(reference), plain)
    assert before == {"lesion": 0.0} and changes[NoSmaller(label="lesion", ml=0.008)] == {"lesion": 1.0}


def test_only_what_was_annotated_is_scored(plain: Plan) -> None:
    voxels, reference = np.full(SHAPE, 1), np.full(SHAPE, 1)
    voxels[0] = 7
    voxels[5, 5, 5] = 7
    assert set(tried(a_map(voxels), a_map(reference), plain)[0]) == {"liver", "lesion"}
    before, changes = tried(a_map(voxels), a_map(reference), plain, annotated=("liver",))
    assert set(before) == {"liver"} and all(set(dice) == {"liver"} for dice in changes.values())


# choosing


def folds(rule: Rule, before: dict[str, float], after: list[dict[str, float]]) -> dict[str, HeldOut]:
    """So many held-out cases, in two folds; the rule changed each as `after` says."""
    cases = {f"case {n}": before for n in range(len(after))}
    changes = {f"case {n}": {rule: now} if now else {} for n, now in enumerate(after)}
    names = list(cases)
    return {
        str(number): HeldOut.of({name: cases[name] for name in some}, {name: changes[name] for name in some})
        for number, some in enumerate((names[::2], names[1::2]))
    }


KEEP = Largest(label="liver")


@pytest.mark.parametrize(
    ("after", "is_taken"),
    [
        ([{"liver": 0.9}] * 5 + [{}] * 5, True),
        ([{"liver": 0.9}] * 4 + [{}] * 6, False),  # four of four may be chance: 1 in 16
        ([{"liver": 0.9}] * 7 + [{"liver": 0.79}], True),
        ([{"liver": 0.9}] * 6 + [{"liver": 0.79}], False),
        ([{"liver": 0.81}] * 9 + [{"liver": 0.5}], False),  # nine gain, and yet the mean falls
        ([{"liver": 0.9, "lesion": 0.55}] * 8, False),  # the liver gains, lesions pay
        ([{"liver": 0.80001}] * 9, False),  # nothing worth a finding that might be lost
        ([{}] * 9, False),
        ([], False),
    ],
)
def test_a_rule_is_taken_when_it_helps_beyond_chance_and_harms_no_label(
    plain: Plan, after: list[dict[str, float]], is_taken: bool
) -> None:
    chosen = choose(folds(KEEP, {"liver": 0.8, "lesion": 0.6}, after), plain)
    assert [one.rule for one in chosen] == ([KEEP] if is_taken else [])
    if is_taken:
        assert chosen[0].folds == ("0", "1") and chosen[0].cases == len(after)
        assert chosen[0].dice_before == {"liver": 0.8} and chosen[0].dice_after["liver"] > 0.8
        assert (chosen[0].better, chosen[0].worse) == (
            sum(bool(now) and now["liver"] > 0.8 for now in after), sum(bool(now) and now["liver"] < 0.8 for now in after),
        )  # fmt: skip


@given(st.integers(0, 60), st.integers(0, 60))
def test_the_sign_test_is_scipys(better: int, worse: int) -> None:
    expected = binomtest(better, better + worse, 0.5, "greater").pvalue if better + worse else 1.0
    assert sign_test(better, worse) == pytest.approx(expected)


def speckled(seed: int, foci: int, shape: tuple[int, int, int] = (24, 24, 24)) -> tuple[Volume, Volume]:
    """A liver with so many lesions, all found; and specks of liver elsewhere that were never there."""
    rng = np.random.default_rng(seed)
    truth = np.zeros(shape, np.uint8)
    truth[4:20, 4:20, 4:12] = 1
    for number in range(foci):
        truth[6 + 4 * number : 8 + 4 * number, 6:8, 6:8] = 7
    found = truth.copy()
    for place in rng.integers(0, 24, (4, 2)):
        found[place[0], place[1], 14 + rng.integers(8)] = 1
    return a_map(found), a_map(truth)


def test_specks_are_dropped_and_lesions_are_kept_apart(plain: Plan) -> None:
    """What helps every liver (one part) would cost every patient but one lesion; the evidence tells them apart."""
    tries = {str(seed): tried(*speckled(seed, foci=3), plain) for seed in range(8)}
    said = HeldOut.of(
        {case: dice for case, (dice, _) in tries.items()}, {case: made for case, (_, made) in tries.items()}
    )
    (chosen,) = choose({"0": said}, plain)
    assert chosen.rule == NoSmaller(label="liver", ml=0.008), "of rules that help as much, the mildest"
    assert chosen.dice_after == {"liver": 1.0} and (chosen.better, chosen.worse) == (8, 0)
    found, truth = speckled(99, foci=3)
    np.testing.assert_array_equal(clean(found, [chosen.rule], plain)[0].voxels, truth.voxels)


def test_evidence_and_choice_are_read_back_as_they_were_written(plain: Plan) -> None:
    said = folds(NoSmaller(label="liver", ml=0.5), {"liver": 0.8}, [{"liver": 0.9}] * 6)
    for value in (*said.values(), *choose(said, plain)):
        assert decode(type(value), encode(value), where="package.json") == value
