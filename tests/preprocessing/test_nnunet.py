"""nnU-Net's plans, number by number: tests/golden/nnunet_plans.json holds what its own planners made of 47 datasets."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from networks.parts.blocks import topology
from preprocessing.nnunet import PRESETS, Planner, nnunet_plan
from preprocessing.plan import CaseFacts, Fingerprint, Label, Plan
from preprocessing.records import BadRecord
from preprocessing.steps import Crop, Normalise, Orient, Pad, Resample

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/nnunet_plans.json").read_text())["datasets"]
CONFIGURATIONS = ("3d_fullres", "3d_lowres", "2d")


def fingerprint_of(dataset: dict[str, Any]) -> Fingerprint:
    """nnU-Net lists Superior, Anterior, Right; of the axes before cropping only their product counts."""
    cases = []
    for spacing, shape, count in dataset["cases"]:
        x, y, z = (float(mm) for mm in reversed(spacing))
        i, j, k = reversed(shape)
        whole = (i, j, round(k / dataset["kept"]))
        cases += [
            CaseFacts(shape=whole, spacing_mm=(x, y, z), cropped=(i, j, k), voxels={},
                      intensities=((0.0, 1.0, 2.0),) * len(dataset["channels"]))
        ] * count  # fmt: skip
    return Fingerprint(
        name=dataset["name"],
        channels=tuple(f"{name}" for name in dataset["channels"]),
        labels=tuple(Label(value=n, name=f"label {n}", colour=(0, 0, 0)) for n in range(1, dataset["classes"])),
        cases={f"case {n}": case for n, case in enumerate(cases)},
        dataset="abc",
    )


def theirs(values: Any, plan: Plan, axes: list[int], flat: bool) -> list[Any]:
    """Right, Anterior, Superior as nnU-Net lists them; in 2-D without the slices."""
    turned = list(reversed(values))
    return [turned[axis] for axis in axes][flat:]


def word(stages: list[list[int]]) -> str:
    return " ".join("".join(map(str, stage)) for stage in stages)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dataset", GOLDEN, ids=lambda dataset: dataset["name"])
def test_every_number_is_the_one_nnunet_plans(dataset, preset) -> None:
    fingerprint, golden = fingerprint_of(dataset), dataset["plans"][preset]
    for configuration in CONFIGURATIONS:
        if configuration not in golden:
            with pytest.raises(BadRecord, match=f"no {configuration}"):
                nnunet_plan(fingerprint, topology, preset=preset, configuration=configuration)
            continue
        known, flat = golden[configuration], configuration == "2d"
        plan = nnunet_plan(fingerprint, topology, preset=preset, configuration=configuration)
        options = plan.network_options
        assert theirs(plan.patch, plan, golden["axes"], flat) == known["patch"]
        assert plan.batch == known["batch"]
        assert theirs(plan.spacing_mm, plan, golden["axes"], flat) == pytest.approx(known["spacing"], abs=2e-6)
        assert word([theirs(s, plan, golden["axes"], flat) for s in options["strides"]]) == known["strides"]
        assert word([theirs(k, plan, golden["axes"], flat) for k in options["kernels"]]) == known["kernels"]
        assert plan.recipe.batch_dice == known["batch_dice"]
        widest = min(options["width"] * 2 ** (len(options["strides"]) - 1), options["widest"])
        assert widest == known["widest"]
        assert [SCHEMES[scale.by] for scale in normalisation(plan).channels] == [
            "CT" if name == "CT" or name == "No" else "ZScore" for name in known["norm"].split()
        ]
        assert "".join("01"[scale.nonzero] for scale in normalisation(plan).channels if scale.by == "scan") == "".join(
            masked for masked, name in zip(known["masked"], known["norm"].split(), strict=True) if name == "ZScore"
        )


SCHEMES = {"dataset": "CT", "scan": "ZScore"}


def normalisation(plan: Plan) -> Normalise:
    return next(step for step in plan.steps if isinstance(step, Normalise))


def a_dataset(shape=(240, 240, 155), spacing=(1.0, 1.0, 1.0), channels=("MR",), cases: int = 20) -> Fingerprint:
    case = [list(reversed(spacing)), list(reversed(shape)), cases]
    return fingerprint_of(dict(name="made", channels=channels, classes=3, kept=1.0, cases=[case]))


def test_in_2d_a_window_is_one_slice_across_the_coarsest_axis() -> None:
    plan = nnunet_plan(a_dataset(shape=(40, 200, 200), spacing=(5.0, 1.0, 1.0)), topology, configuration="2d")
    assert plan.patch[0] == 1 and min(plan.patch[1:]) > 100
    assert all(kernel == [1, 3, 3] for kernel in plan.network_options["kernels"])
    assert all(stride[0] == 1 for stride in plan.network_options["strides"])
    assert plan.recipe.mirror == (False, True, True)


def test_training_is_nnunets() -> None:
    recipe = nnunet_plan(a_dataset(), topology).recipe
    assert (recipe.optimiser, recipe.learning_rate, recipe.momentum, recipe.weight_decay) == ("sgd", 0.01, 0.99, 3e-5)
    assert (recipe.epochs, recipe.steps_per_epoch, recipe.warmup_steps, recipe.average) == (1000, 250, 0, 0)
    assert (recipe.foreground, recipe.mirror, recipe.augmentation) == (0.33, (True, True, True), "nnunet")


def test_intensities_are_normalised_before_they_are_resampled() -> None:
    plan = nnunet_plan(a_dataset(), topology)
    assert [type(step) for step in plan.steps] == [Orient, Crop, Normalise, Resample, Pad]
    assert plan.steps[1] == Crop(margin=0) and plan.steps[-1] == Pad(shape=plan.patch)


def test_a_channel_is_normalised_by_its_name() -> None:
    rules = normalisation(nnunet_plan(a_dataset(channels=("ct", "NoNorm", "rgb_to_0_1", "T1")), topology)).channels
    values = np.array([-1000.0, 0.0, 255.0])
    for rule, expected in ((rules[1], values), (rules[2], values / 255)):
        np.testing.assert_allclose((np.clip(values, rule.low, rule.high) - rule.mean) / rule.deviation, expected)
    assert (rules[0].by, rules[3].by) == ("dataset", "scan")
    assert (rules[0].low, rules[0].high) == pytest.approx((0.01 * 1, 2 - 0.01), abs=0.05)


def test_every_normalisation_that_nnunet_knows_by_name_is_planned() -> None:
    plan = nnunet_plan(a_dataset(channels=("rescale_to_0_1", "noNorm", "rgb_to_0_1", "T2")), topology)
    scales = next(step.channels for step in plan.steps if isinstance(step, Normalise))
    assert [scale.by for scale in scales] == ["range", "dataset", "dataset", "scan"]


def test_a_plan_is_written_and_read_as_it_was(tmp_path) -> None:
    plan = nnunet_plan(a_dataset(channels=("CT", "noNorm")), topology, preset="resenc_m")
    plan.write(tmp_path / "plan.yaml")
    assert Plan.read(tmp_path / "plan.yaml") == plan


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("configuration", ["3d_fullres", "2d"])
def test_the_window_grows_with_the_memory_that_is_asked_for(preset, configuration) -> None:
    fingerprint = a_dataset(shape=(500, 512, 512), spacing=(1.0, 0.7, 0.7))
    plans = [
        nnunet_plan(fingerprint, topology, preset=preset, configuration=configuration, memory_gb=gb)
        for gb in (1.0, 2.0, 4.0, 8.0, 16.0, 40.0, 80.0)
    ]
    windows = [math.prod(plan.patch) for plan in plans]
    assert windows == sorted(windows) and windows[0] < windows[-1]


def test_the_elements_of_the_reference_networks_are_those_nnunet_counts() -> None:
    """558 319 104 and 129 793 792: what nnU-Net says of the networks that its residual budgets were tuned with."""
    planner = Planner(
        topology=topology, preset=PRESETS["resenc_m"], share=1.0, classes=3, cases=1, axes=(2, 1, 0),
        spacing=(1.0, 1.0, 1.0), median=(9.0, 9.0, 9.0),
    )  # fmt: skip
    cube, square = ((1, 1, 1), *[(2, 2, 2)] * 5), ((1, 1, 1), *[(1, 2, 2)] * 6)
    coarse_heads = 3 * sum(side**3 for side in (64, 32, 16, 8)), 3 * sum(side**2 for side in (256, 128, 64, 32, 16))
    assert planner.elements((128, 128, 128), cube) + coarse_heads[0] == 558319104
    assert planner.elements((1, 512, 512), square, flat=True) + coarse_heads[1] == 129793792
