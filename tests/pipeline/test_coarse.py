"""A coarse model says where to look; held-out cases must prove that no label lies outside, and what it says is followed."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from networks import residual_unet
from pipeline import package
from pipeline.batch import segment
from pipeline.coarse import Look, look
from pipeline.coarse_making import MARGIN_MM, coarse_plan, proof
from pipeline.config import Segment
from pipeline.errors import UsageError
from pipeline.package import COARSE, Coarse, Fold, ModelPackage, amend
from pipeline.prediction import Inference, segment_volume
from pipeline.report import Report
from preprocessing import files
from preprocessing.plan import Label, Plan
from preprocessing.records import encode
from preprocessing.steps import Normalise, Orient, Pad, Resample, Scale, prepare
from preprocessing.volume import Case, Geometry, Volume

SHAPE = (72, 64, 60)
LESION = (slice(40, 49), slice(10, 20), slice(33, 42))


class Bright:
    """An engine that calls lesion what is brighter than a threshold."""

    device = torch.device("cpu")
    words = "a threshold"

    def __init__(self, threshold: float = 0.4) -> None:
        self.threshold, self.windows = threshold, 0

    def __call__(self, windows: torch.Tensor) -> torch.Tensor:
        self.windows += len(windows)
        return torch.cat([torch.zeros_like(windows[:, :1]), 9 * (windows[:, :1] - self.threshold)], dim=1)


def a_plan() -> Plan:
    return Plan(
        name="bright",
        channels=("mr",),
        labels=(Label(value=3, name="lesion", colour=(230, 159, 0)),),
        steps=(
            Orient(),
            Resample(spacing_mm=(1.0, 1.0, 1.0)),
            Normalise(channels=(Scale(by="dataset", low=-9.0, high=9.0),)),
            Pad(shape=(16, 16, 16)),
        ),
        spacing_mm=(1.0, 1.0, 1.0),
        patch=(16, 16, 16),
        batch=1,
    )


def a_case(seed: int = 0, where: tuple[slice, ...] | None = LESION, angle: float = 0.3) -> Case:
    """A lesion in an oblique scan whose axes run another way than the prepared grid's."""
    truth = np.zeros(SHAPE, np.uint8)
    if where:
        truth[where] = 3
    image = (truth > 0) + np.random.default_rng(seed).normal(0, 0.02, SHAPE)
    affine = np.eye(4)
    turn = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
    affine[:3, :3] = turn @ np.diag([-1.0, -1.1, 1.2])
    affine[:3, 3] = (20, -30, 5)
    grid = Geometry(shape=SHAPE, affine=affine)
    return Case(
        id=f"case{seed}",
        image=Volume(voxels=image.astype(np.float32)[None], geometry=grid, channels=("mr",)),
        labels=Volume(voxels=truth[None], geometry=grid, channels=("labels",)),
    )


def outside_of(place: Look, case: Case, plan: Plan) -> int:
    """Labelled voxels of the prepared grid that would not be looked at."""
    prepared, trail = prepare(case.image, plan.steps)
    labels = trail.follow(case.labels).voxels[0].copy()
    region = place.on(prepared.geometry)
    if region is None:
        return 0
    labels[tuple(slice(a, b) for a, b in zip(region.start, region.stop, strict=True))] = 0
    return int((labels > 0).sum())


def a_coarse(margin_mm: float = 10.0) -> Coarse:
    return Coarse(
        network="residual_unet", network_config={}, plan=coarse_plan(a_plan()), margin_mm=margin_mm, cases=1, share=0.1
    )


def test_its_plan_has_the_same_labels_at_voxels_three_times_as_long() -> None:
    plan = a_plan()
    coarse = coarse_plan(plan)
    assert coarse.spacing_mm == (3.0, 3.0, 3.0) and coarse.labels == plan.labels and coarse.patch == (16, 16, 16)
    assert Resample(spacing_mm=(3.0, 3.0, 3.0)) in coarse.steps and Pad(shape=(16, 16, 16)) in coarse.steps
    thick = coarse_plan(dataclasses.replace(plan, spacing_mm=(0.5, 0.5, 5.0)))
    assert thick.spacing_mm == (1.5, 1.5, 5.0), "what is coarse already stays as it is"
    with pytest.raises(UsageError, match="resamples scans not once"):
        coarse_plan(dataclasses.replace(plan, steps=(Orient(),)))


def test_what_it_finds_lies_in_the_box_on_the_prepared_grid_whatever_way_the_scan_lay() -> None:
    plan, case = a_plan(), a_case()
    place = look(case.image, a_coarse(), Bright())
    assert outside_of(place, case, plan) == 0
    region = place.on(prepare(case.image, plan.steps)[0].geometry)
    assert region and math.prod(region.shape) < 0.3 * math.prod(SHAPE)
    assert place.words.startswith("a box of ") and "10 mm around" in place.words


def test_where_it_finds_nothing_everything_is_looked_at_and_said_so() -> None:
    place = look(a_case(where=None).image, a_coarse(), Bright())
    assert place.on(a_case().image.geometry) is None and place.words == "everywhere: the coarse model found nothing"


def test_a_model_that_finds_what_is_there_is_proven_with_the_least_margin() -> None:
    plan, cases = a_plan(), [a_case(0), a_case(1, (slice(3, 12), slice(40, 50), slice(5, 14))), a_case(2, None)]
    proven = proof(cases, plan, coarse_plan(plan), Bright())
    assert proven.refusal == "" and proven.margin_mm == MARGIN_MM
    assert 0.3 < proven.share < 0.6, "all of the scan without a lesion, little of the others"
    for case in cases:
        coarse = dataclasses.replace(a_coarse(), margin_mm=proven.margin_mm)
        assert outside_of(look(case.image, coarse, Bright()), case, plan) == 0


class Half(Bright):
    """Sees the first of all windows with a lesion, and in the others nothing."""

    def __call__(self, windows: torch.Tensor) -> torch.Tensor:
        logits = super().__call__(windows)
        if self.threshold > 1 or not bool((logits[:, 1] > 0).any()):
            return torch.cat([logits[:, :1], logits[:, :1] - 1], dim=1)
        self.threshold = 9.0
        return logits


def test_a_model_that_misses_much_is_refused_and_one_that_misses_little_gets_a_wider_margin() -> None:
    plan = a_plan()
    long = a_case(0, (slice(4, 70), slice(10, 20), slice(10, 20)))
    assert "outside of what it finds" in proof([long], plan, coarse_plan(plan), Half()).refusal
    shrunk = proof([a_case(0, (slice(20, 50), slice(20, 45), slice(20, 40)))], plan, coarse_plan(plan), Bright(0.99))
    assert shrunk.refusal == "" and shrunk.margin_mm >= MARGIN_MM
    everywhere = proof([a_case()], plan, coarse_plan(plan), Bright(-9.0))
    assert "looked at all the same" in everywhere.refusal
    assert proof([], plan, coarse_plan(plan), Bright()).refusal


def test_a_region_spares_windows_and_changes_no_label_inside() -> None:
    plan, case = a_plan(), a_case()
    everywhere, there = Bright(), Bright()
    how = Inference(device="cpu", overlap=0.25)
    whole = segment_volume(case.image, [everywhere], plan, how, "")
    place = look(case.image, a_coarse(), Bright())
    part = segment_volume(case.image, [there], plan, how, "", region=place.on)
    assert np.array_equal(whole.labels.voxels, part.labels.voxels)
    assert there.windows < everywhere.windows / 2


@pytest.fixture
def with_coarse(tmp_path: Path) -> ModelPackage:
    """A package of random weights with a coarse model that finds nothing: its last bias says background."""
    plan = a_plan()

    def made(patch: tuple[int, int, int]) -> tuple[torch.nn.Module, dict]:
        config = residual_unet.fit(residual_unet.Config(width=4, blocks=(1,)), patch=patch, spacing=(1.0, 1.0, 1.0))
        return residual_unet.build(config, channels=1, classes=2), encode(config)

    network, config = made(plan.patch)
    fold = Fold(
        weights="weights-fold0.safetensors", dice={}, cases_trained=1, cases_held_out=0, epochs=1, minutes=1, seed=0
    )
    saved = package.save(
        tmp_path / "package", network=network, name="bright", network_name="residual_unet", network_config=config,
        plan=plan, fold_number=0, fold=fold,
    )  # fmt: skip
    network, config = made(coarse_plan(plan).patch)
    network.heads[-1].bias.data = torch.tensor([99.0, -99.0])
    coarse = dataclasses.replace(a_coarse(), network_config=config)
    return amend(saved, lambda record: dataclasses.replace(record, coarse=coarse), {COARSE: network})


def test_segment_asks_the_coarse_model_of_a_package_and_reports_it_unless_told_to_look_everywhere(
    with_coarse: ModelPackage, tmp_path: Path
) -> None:
    files.write(a_case().image, tmp_path / "scan.nii.gz")
    told = {}
    for name, whole in (("coarse", False), ("whole", True)):
        settings = Segment(outputs=("labels",), device="cpu", whole=whole, overlap=0.0)
        batch = segment([tmp_path / "scan.nii.gz"], with_coarse.folder, tmp_path / name, settings)
        assert not batch.failed, batch.failed
        told[name] = Report.read(tmp_path / name / "scan")
    assert told["coarse"].region == "everywhere: the coarse model found nothing" and "coarse" in told["coarse"].seconds
    assert told["whole"].region == "" and "coarse" not in told["whole"].seconds
    assert "no voxel of a label lay outside" in package.card(with_coarse.record)


def test_a_coarse_model_outlives_another_fold_and_is_sealed(with_coarse: ModelPackage) -> None:
    network = with_coarse.networks()[0]
    fold = dataclasses.replace(with_coarse.record.folds["0"], weights="weights-fold1.safetensors")
    record = with_coarse.record
    more = package.save(
        with_coarse.folder, network=network, name=record.name, network_name=record.network,
        network_config=record.network_config, plan=record.plan, fold_number=1, fold=fold,
    )  # fmt: skip
    assert more.record.coarse == record.coarse and set(more.record.folds) == {"0", "1"}
    (more.folder / COARSE).write_bytes(b"other")
    with pytest.raises(package.DamagedPackage):
        ModelPackage.load(more.folder)
