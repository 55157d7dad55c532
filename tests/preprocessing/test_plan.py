"""The rules turn what a dataset is into a plan that fits the machine, whatever the dataset and the machine."""

from dataclasses import replace

import numpy as np
import pytest

from preprocessing.plan import (
    CaseFacts,
    Fingerprint,
    Label,
    Machine,
    Plan,
    crop_rule,
    make_plan,
    normalise_rule,
    spacing_rule,
    voxel_budget,
    with_patch,
)
from preprocessing.records import BadRecord
from preprocessing.steps import Crop, Normalise, Orient, Pad, Resample

LIVER = Label(value=1, name="liver", colour=(1, 2, 3))
LAPTOP = Machine(memory_gb=8.0, cores=4, has_gpu=False)


def facts(shape=(100, 100, 100), spacing=(1.0, 1.0, 1.0), kept=1.0, intensities=((0.0, 1.0),)) -> CaseFacts:
    return CaseFacts(shape=shape, spacing_mm=spacing, kept=kept, intensities=intensities, voxels={"liver": 10})


def a_dataset(*cases: CaseFacts, channels=("T1",)) -> Fingerprint:
    return Fingerprint(
        name="made",
        channels=channels,
        labels=(LIVER,),
        cases={f"case_{n}": case for n, case in enumerate(cases)},
        dataset="abc",
    )


def anything(seed: int) -> tuple[Fingerprint, Machine]:
    """A dataset and a machine as they may come: from one thin slab to whole bodies, from a small board to a large GPU."""
    rng = np.random.default_rng(seed)
    channels = tuple(rng.choice(["CT", "T1", "T2", "PET"], rng.integers(1, 4)))
    cases = [
        facts(
            shape=tuple(int(n) for n in np.exp(rng.uniform(0, np.log(800), 3)).round()),
            spacing=tuple(float(s) for s in np.exp(rng.uniform(np.log(0.1), np.log(12), 3))),
            kept=float(rng.uniform(0.1, 1)),
            intensities=tuple(tuple(rng.normal(size=5) * 100) for _ in channels),
        )
        for _ in range(rng.integers(1, 6))
    ]
    memory = float(np.exp(rng.uniform(np.log(0.5), np.log(80))))
    return a_dataset(*cases, channels=channels), Machine(
        memory_gb=memory, cores=int(rng.integers(1, 65)), has_gpu=bool(rng.integers(2))
    )


@pytest.mark.parametrize("first", range(0, 500, 100))
def test_a_plan_fits_the_machine_whatever_the_dataset(first):
    for seed in range(first, first + 100):
        fingerprint, machine = anything(seed)
        plan = make_plan(fingerprint, machine)
        budget, _ = voxel_budget(machine)
        assert np.prod(plan.patch) * plan.batch <= budget, seed
        assert min(plan.patch) >= 1
        assert min(plan.spacing_mm) > 0
        assert 2 <= plan.batch <= 16
        assert all(side <= 4 or side % 4 == 0 for side in plan.patch), (seed, plan.patch)
        assert all(side <= 16 or side % 8 == 0 for side in plan.patch), (seed, plan.patch)
        assert [type(step) for step in plan.steps if not isinstance(step, Crop)] == [Orient, Resample, Normalise, Pad]
        assert plan.steps[-1] == Pad(shape=plan.patch)
        assert len(next(step for step in plan.steps if isinstance(step, Normalise)).channels) == len(plan.channels)
        assert {"spacing_mm", "patch", "batch", "normalise", "crop"} <= set(plan.reasons)
        assert all(plan.reasons.values())


def test_more_memory_never_gives_a_smaller_window():
    fingerprint, machine = anything(3)
    volumes = [
        np.prod(make_plan(fingerprint, replace(machine, has_gpu=True, memory_gb=gb)).patch)
        for gb in (2, 4, 8, 16, 32, 80)
    ]
    assert volumes == sorted(volumes)


def test_a_small_scan_is_seen_whole():
    plan = make_plan(a_dataset(facts(shape=(33, 50, 36))), Machine(memory_gb=8, cores=4, has_gpu=True))
    assert plan.patch == (40, 56, 40)
    assert "whole" in plan.reasons["patch"]


def test_the_longest_side_in_millimetres_gives_way_first():
    plan = make_plan(a_dataset(facts(shape=(64, 64, 64), spacing=(1.0, 1.0, 2.0))), LAPTOP)
    assert plan.patch[2] < plan.patch[0] == plan.patch[1]


def test_two_windows_of_128_cubed_are_planned_for_8_gb_as_nnunet_does():
    plan = make_plan(a_dataset(*[facts(shape=(512,) * 3)] * 9), Machine(memory_gb=8, cores=1, has_gpu=True))
    assert (plan.patch, plan.batch) == ((128, 128, 128), 2)


def test_a_cpu_is_bound_by_time_and_a_full_one_by_memory():
    assert voxel_budget(LAPTOP)[0] == 4 * 48_000
    assert voxel_budget(replace(LAPTOP, memory_gb=0.5))[0] < 4 * 48_000


def test_spacing_is_the_median_where_voxels_are_about_cubes():
    spacing, why = spacing_rule(a_dataset(*[facts(spacing=(s, 1.0, 2 * s)) for s in (0.9, 1.0, 1.4)]))
    assert spacing == (1.0, 1.0, 2.0)
    assert "3 cases" in why


def test_thick_slices_take_the_finer_tenth_and_no_finer_than_the_plane():
    thick = [facts(shape=(300, 300, 20), spacing=(1.0, 1.0, z)) for z in (4.0, *[8.0] * 9)]
    spacing, why = spacing_rule(a_dataset(*thick))
    assert spacing[:2] == (1.0, 1.0)
    assert spacing[2] == pytest.approx(np.percentile([4.0, *[8.0] * 9], 10))
    assert "axis S" in why
    with_thin = [facts(shape=(300, 300, 20), spacing=(1.0, 1.0, z)) for z in (0.2, 0.2, *[8.0] * 8)]
    assert spacing_rule(a_dataset(*with_thin))[0] == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    "cases",
    [
        [facts(shape=(300, 300, 20), spacing=(1.0, 1.0, 2.9))] * 3,
        [facts(shape=(300, 300, 150), spacing=(1.0, 1.0, z)) for z in (1.0, 8.0, 8.0)],
    ],
    ids=["not three times as coarse", "not three times as few"],
)
def test_slices_a_little_thick_keep_the_median(cases):
    assert spacing_rule(a_dataset(*cases))[0] == (1.0, 1.0, np.median([case.spacing_mm[2] for case in cases]))


def test_ct_keeps_its_unit_and_mr_is_measured_scan_by_scan():
    values = tuple(float(v) for v in range(1001))
    rules, why = normalise_rule(a_dataset(facts(intensities=(values, values)), channels=("ct", "T2")))
    ct, mr = rules.channels
    assert (ct.by, mr.by) == ("dataset", "scan")
    assert (ct.low, ct.high) == (5.0, 995.0)
    assert ct.mean == pytest.approx(500)
    assert ct.deviation == pytest.approx(np.std(values))
    assert "Hounsfield" in why
    assert "T2: no fixed unit" in why


def test_a_ct_without_contrast_does_not_divide_by_zero():
    rules, _ = normalise_rule(a_dataset(facts(intensities=((7.0, 7.0),)), channels=("CT",)))
    assert rules.channels[0].deviation > 0


@pytest.mark.parametrize(("kept", "crops", "nonzero"), [(0.5, True, True), (0.8, True, False), (0.95, False, False)])
def test_a_zero_border_is_cut_and_a_stripped_background_not_counted(kept, crops, nonzero):
    fingerprint = a_dataset(*[facts(kept=k) for k in (0.1, kept, 1.0)])
    assert crop_rule(fingerprint)[0] is crops
    assert normalise_rule(fingerprint)[0].channels[0].nonzero is nonzero
    assert any(isinstance(step, Crop) for step in make_plan(fingerprint, LAPTOP).steps) is crops


def test_the_batch_is_kept_between_2_and_the_number_of_cases():
    large = Machine(memory_gb=80, cores=8, has_gpu=True)
    assert make_plan(a_dataset(facts(shape=(16, 16, 16))), large).batch == 2
    assert make_plan(a_dataset(*[facts(shape=(16, 16, 16))] * 5), large).batch == 5
    assert make_plan(a_dataset(*[facts(shape=(16, 16, 16))] * 50), large).batch == 16


def test_another_window_brings_its_padding():
    plan = with_patch(make_plan(a_dataset(facts()), LAPTOP), (8, 16, 24))
    assert plan.patch == (8, 16, 24)
    assert plan.steps[-1] == Pad(shape=(8, 16, 24))


@pytest.mark.parametrize(("values", "kind"), [((1, 2), np.uint8), ((3, 7, 250), np.uint8), ((500, 2), np.uint16)])
def test_a_network_s_channel_finds_its_value_in_the_label_map(values, kind):
    labels = tuple(Label(value=v, name=f"label {v}", colour=(0, 0, 0)) for v in values)
    plan = replace(make_plan(a_dataset(facts()), LAPTOP), labels=labels)
    assert plan.classes == len(values) + 1
    assert plan.lookup.dtype == kind
    np.testing.assert_array_equal(plan.lookup[[0, *range(1, plan.classes)]], [0, *values])


@pytest.mark.parametrize(
    "change",
    [
        {"channels": ()},
        {"labels": ()},
        {"labels": (LIVER, LIVER)},
        {"labels": (LIVER, replace(LIVER, name="other"))},
        {"labels": (LIVER, replace(LIVER, value=2))},
        {"labels": (replace(LIVER, value=0),)},
        {"patch": (8, 0, 8)},
        {"batch": 0},
        {"spacing_mm": (1.0, -1.0, 1.0)},
    ],
    ids=str,
)
def test_a_plan_that_cannot_be_followed_is_refused(change):
    with pytest.raises(BadRecord, match="plan made"):
        replace(make_plan(a_dataset(facts()), LAPTOP), **change)


def test_the_digest_follows_what_changes_a_voxel_and_nothing_else():
    plan: Plan = make_plan(a_dataset(facts()), LAPTOP)
    assert replace(plan, batch=7, reasons={}, name="other").digest == plan.digest
    assert replace(plan, steps=plan.steps[:-1]).digest != plan.digest
    assert replace(plan, channels=("T2",)).digest != plan.digest
