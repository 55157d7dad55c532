"""hilum's rules turn what a dataset is into a plan that fits the machine, whatever the dataset and the machine."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest

from networks import residual_unet
from networks.parts.blocks import topology
from preprocessing.nnunet import PRESETS, nnunet_plan
from preprocessing.plan import Fingerprint, Label, Plan, Recipe
from preprocessing.records import BadRecord
from preprocessing.rules import (
    Demand,
    Machine,
    crop_rule,
    make_plan,
    mirror_rule,
    normalise_rule,
    separate_rule,
    spacing_rule,
    voxel_budget,
)
from preprocessing.steps import Crop, Normalise, Orient, Pad, Resample
from tests.preprocessing.made_up import LAPTOP, a_dataset, facts


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


NETWORK = residual_unet.Config()


def halved(patch, spacing):
    return residual_unet.divisor(residual_unet.fit(NETWORK, patch=patch, spacing=spacing))


DEMAND = Demand(divisor=halved)
MANY = pytest.mark.parametrize(
    "seeds",
    # every fourth of ten thousand: all of them take three minutes, and were seen to hold
    [range(150), pytest.param(range(150, 10_000, 4), marks=pytest.mark.slow)],
    ids=["a few", "thousands"],
)


def refuse_what_cannot_be_followed(plan: Plan, seed: int) -> None:
    """What holds of a plan by whatever rules."""
    config = residual_unet.fit(
        residual_unet.Config(**{name: frozen(value) for name, value in plan.network_options.items()}),
        patch=plan.patch, spacing=plan.spacing_mm,
    )  # fmt: skip
    divisor = residual_unet.divisor(config)
    assert all(side % step == 0 for side, step in zip(plan.patch, divisor, strict=True)), (seed, plan.patch, divisor)
    assert min(plan.patch) >= 1 and min(plan.spacing_mm) > 0 and plan.batch >= 2
    assert plan.steps[-1] == Pad(shape=plan.patch)
    assert len(next(step for step in plan.steps if isinstance(step, Normalise)).channels) == len(plan.channels)
    told = {"spacing_mm", "patch", "batch", "normalise", "crop", "orient"}
    assert told | {f"recipe.{field.name}" for field in fields(Recipe)} <= set(plan.reasons)
    assert "network_options" in plan.reasons or not plan.network_options
    assert all(plan.reasons.values())


def frozen(value):
    return tuple(frozen(one) for one in value) if isinstance(value, list) else value


@MANY
def test_a_plan_fits_the_machine_whatever_the_dataset(seeds):
    for seed in seeds:
        fingerprint, machine = anything(seed)
        plan = make_plan(fingerprint, machine, DEMAND)
        budget, _ = voxel_budget(machine, DEMAND)
        smallest = make_plan(fingerprint, replace(machine, memory_gb=0.0), DEMAND)
        assert math.prod(plan.patch) * plan.batch <= budget or plan.patch == smallest.patch, seed
        assert 2 <= plan.batch <= 16
        masked = any(scale.nonzero for step in plan.steps if isinstance(step, Normalise) for scale in step.channels)
        middle = [Normalise, Resample] if masked else [Resample, Normalise]
        assert [type(step) for step in plan.steps if not isinstance(step, Crop)] == [Orient, *middle, Pad]
        refuse_what_cannot_be_followed(plan, seed)
        larger = make_plan(fingerprint, replace(machine, memory_gb=machine.memory_gb * 1.7), DEMAND)
        assert math.prod(plan.patch) <= math.prod(larger.patch), seed


@MANY
def test_nnunets_rules_give_a_plan_for_anything_too(seeds):
    for seed in seeds[::4]:
        fingerprint, machine = anything(seed)
        preset = list(PRESETS)[seed % 4]
        for configuration in ("3d_fullres", "2d"):
            if configuration == "3d_fullres" and is_one_slice(fingerprint):
                continue
            plan = nnunet_plan(
                fingerprint, topology, preset=preset, configuration=configuration, memory_gb=machine.memory_gb
            )
            refuse_what_cannot_be_followed(plan, seed)


def is_one_slice(fingerprint: Fingerprint) -> bool:
    """The median scan has one slice across its coarsest axis; nnU-Net plans in 2-D alone."""
    try:
        nnunet_plan(fingerprint, topology, configuration="3d_fullres")
    except BadRecord:
        return True
    return False


def test_no_window_is_mostly_padding():
    """Rounded up to 32, the window would hold half as many voxels again as the scan: nnU-Net's ResEnc L does so."""
    large = Machine(memory_gb=24, cores=8, has_gpu=True)
    plan = make_plan(a_dataset(facts(shape=(138, 170, 138))), large, DEMAND)
    assert plan.patch == (128, 160, 128)
    assert "mostly padding" in plan.reasons["patch"]


def test_sides_that_would_be_halved_once_less_are_passed_over():
    sides = set()
    for gb in np.geomspace(0.3, 40, 60):
        plan = make_plan(a_dataset(facts(shape=(512,) * 3)), Machine(memory_gb=gb, cores=1, has_gpu=True), DEMAND)
        sides |= set(plan.patch)
    assert len(sides) > 8 and not sides & {56, 112, 224}


def test_a_thin_scan_is_padded_until_it_can_be_halved():
    plan = make_plan(a_dataset(facts(shape=(3, 4, 5))), LAPTOP, DEMAND)
    refuse_what_cannot_be_followed(plan, 0)


def test_what_the_network_keeps_is_taken_off_the_memory():
    small = Machine(memory_gb=1.0, cores=64, has_gpu=False)
    free, _ = voxel_budget(small, Demand(fixed_gb=0.0, bytes_per_voxel=1000))
    less, why = voxel_budget(small, Demand(fixed_gb=0.3, bytes_per_voxel=1000))
    assert (free, less) == (800_000, 500_000)
    assert "80%" in why


@pytest.mark.parametrize(
    ("names", "mirrored"),
    [
        (("liver", "tumor"), (True, False, False)),
        (("Anterior", "Posterior"), (True, False, False)),
        (("left kidney", "right kidney"), (False, False, False)),
        (("spleen", "kidney_left"), (False, False, False)),
        (("left ventricle",), (False, False, False)),
        (("label_1", "label_2"), (False, False, False)),
    ],
)
def test_what_has_a_side_is_not_mirrored(names, mirrored):
    labels = tuple(Label(value=n, name=name, colour=(0, 0, 0)) for n, name in enumerate(names, start=1))
    found, why = mirror_rule(labels, Machine(memory_gb=8, cores=4, has_gpu=True))
    assert found == mirrored and "side" in why
    assert mirror_rule(labels, LAPTOP)[0] == (False, False, False)


def test_a_small_scan_is_seen_whole():
    plan = make_plan(a_dataset(facts(shape=(33, 50, 36))), Machine(memory_gb=8, cores=4, has_gpu=True))
    assert plan.patch == (40, 56, 40)
    assert "whole" in plan.reasons["patch"]


def test_the_longest_side_in_millimetres_gives_way_first():
    plan = make_plan(a_dataset(facts(shape=(64, 64, 64), spacing=(1.0, 1.0, 2.0))), LAPTOP)
    assert plan.patch[2] < plan.patch[0] == plan.patch[1]


def test_two_windows_of_128_cubed_are_planned_for_8_gb_as_nnunet_does():
    demand = Demand(fixed_gb=0.4, bytes_per_voxel=1400)  # of 32 channels in half precision
    plan = make_plan(a_dataset(*[facts(shape=(512,) * 3)] * 9), Machine(memory_gb=8, cores=1, has_gpu=True), demand)
    assert (plan.patch, plan.batch) == ((128, 128, 128), 2)


def test_a_cpu_is_bound_by_time_and_a_full_one_by_memory():
    assert voxel_budget(LAPTOP, Demand())[0] == 4 * 48_000
    assert voxel_budget(replace(LAPTOP, memory_gb=0.4), Demand())[0] < 4 * 48_000


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


@pytest.mark.parametrize(
    ("spacing", "separate"),
    [((1, 1, 1), None), ((0.7, 0.7, 5), 2), ((4, 1, 1), 0), ((3, 1, 1), None), ((5, 5, 1), None), ((1, 6, 2), 1)],
)
def test_slices_that_lie_far_apart_are_not_mixed(spacing, separate):
    axis, why = separate_rule(tuple(float(mm) for mm in spacing))
    assert axis == separate and why


def test_a_case_without_labels_adds_no_air_to_hounsfield_units():
    cases = [facts(intensities=((40.0, 60.0),))] * 9
    lone = make_plan(a_dataset(*cases, channels=("CT",)), LAPTOP)
    empty = replace(facts(intensities=((-1000.0, 0.0),)), voxels={})
    assert scale_of(make_plan(a_dataset(*cases, empty, channels=("CT",)), LAPTOP)) == scale_of(lone)


def scale_of(plan):
    return next(step for step in plan.steps if isinstance(step, Normalise)).channels[0]
