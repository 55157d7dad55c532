"""What speed costs is measured on cases that were held out, sealed into the package, and obeyed by segment."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from networks import residual_unet
from pipeline import package, tuning
from pipeline.batch import segment
from pipeline.config import Segment, Tune
from pipeline.curve import BEARABLE, Curve, Point
from pipeline.description import show
from pipeline.engines.torch import engine
from pipeline.errors import PackageError, UsageError
from pipeline.package import Fold, ModelPackage, amend
from pipeline.postprocessing import HeldOut
from pipeline.prediction import Inference, segment_volume
from pipeline.report import Report
from pipeline.scoring import case_key
from pipeline.tuning import tune
from preprocessing import files
from preprocessing.datasets import open_dataset
from preprocessing.plan import Plan, Recipe
from preprocessing.records import BadRecord, decode, encode
from preprocessing.steps import Normalise, Orient, Pad, Scale
from preprocessing.volume import Geometry, Volume

SHAPE = (24, 20, 16)
LOOKED_AT = Tune(device="cpu", cases=2)


def a_point(dice: float, seconds: float, **other: object) -> Point:
    ways = {"overlap": 0.5, "flips": False, "precision": "float32", "agreement": 1.0} | other
    return Point(dice=dice, seconds=seconds, **ways)  # type: ignore[arg-type]


def a_curve(*points: Point) -> Curve:
    return Curve(points=points, cases=3, folds=("0",), machine="a machine")


def test_the_quickest_way_that_loses_next_to_nothing_is_chosen() -> None:
    best, near = a_point(0.9, 8.0, flips=True), a_point(0.9 - BEARABLE / 2, 1.0)
    cheap = a_point(0.9 - 2 * BEARABLE, 0.3, overlap=0.125)
    curve = a_curve(best, near, cheap)
    assert curve.choice() == near and curve.best == best
    alike = [a_point(0.9, 1.0, overlap=overlap) for overlap in tuning.OVERLAPS]
    assert a_curve(*alike).choice().overlap == 0.5, "scans of one window say nothing of overlap"


def test_each_precision_has_a_choice_of_its_own_measured_against_the_best_of_all() -> None:
    exact = a_point(0.9, 2.0)
    half = a_point(0.8995, 0.7, precision="bfloat16", agreement=0.997)
    worse = a_point(0.88, 0.4, precision="bfloat16", overlap=0.125, agreement=0.95)
    curve = a_curve(exact, half, worse)
    assert curve.choice() == exact and curve.choice("bfloat16") == half
    assert a_curve(exact, worse).choice("bfloat16") == worse, "where all lose too much, the best of them"
    assert a_curve(exact).choice("bfloat16") == exact, "what was not measured follows float32"
    assert curve.changed(0.5, False, "bfloat16") == 0.997 and curve.changed(0.25, False, "bfloat16") is None
    with pytest.raises(BadRecord, match="without a point in float32"):
        a_curve(half)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five cases, their grids oblique to the network's."""
    where = tmp_path_factory.mktemp("tuned")
    for seed in range(5):
        rng = np.random.default_rng(seed)
        truth = np.zeros(SHAPE, np.uint8)
        truth[3:14, 4:15, 3:13] = 1
        truth[6:10, 7:11, 5:9] = 2
        image = (truth + rng.normal(0, 0.12, SHAPE)).astype(np.float32)
        grid = Geometry(shape=SHAPE, affine=np.diag([-1.0, 1.0, 1.5, 1.0]))
        files.write(
            Volume(voxels=image[None], geometry=grid, channels=("mr",)),
            where / "imagesTr" / f"patient{seed}_0000.nii.gz",
        )
        files.write(
            Volume(voxels=truth[None], geometry=grid, channels=("labels",)),
            where / "labelsTr" / f"patient{seed}.nii.gz",
            is_labels=True,
        )
    names = {"background": 0, "liver": 1, "lesion": 2}
    said = {"name": "five", "channel_names": {"0": "mr"}, "labels": names, "file_ending": ".nii.gz"}
    (where / "dataset.json").write_text(json.dumps(said))
    return where


@pytest.fixture
def untuned(dataset: Path, tmp_path: Path, make_plan) -> ModelPackage:
    """Two folds of random weights, each with two cases held out."""
    opened = open_dataset(dataset)
    plan: Plan = replace(
        make_plan(), labels=opened.labels, spacing_mm=(1.0, 1.0, 1.5), recipe=Recipe(mirror=(True, False, False)),
        steps=(Orient(), Normalise(channels=(Scale(by="scan"),)), Pad(shape=(16, 16, 16))),
    )  # fmt: skip
    keys = [case_key(opened.read(one)) for one in opened.cases]
    config = residual_unet.Config(width=4, blocks=(1,), strides=((1, 1, 1), (2, 2, 2)), kernels=((3, 3, 3), (3, 3, 3)))
    for number in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(number)
            network = residual_unet.build(config, channels=1, classes=3)
        held_out = HeldOut(cases={key: {"liver": 0.5} for key in keys[2 * number : 2 * number + 2]})
        fold = Fold(
            weights=f"weights-fold{number}.safetensors", dice={}, cases_trained=3, cases_held_out=2, epochs=1,
            minutes=0.1, seed=number, held_out=held_out,
        )  # fmt: skip
        made = package.save(
            tmp_path / "package", network=network, name="five", network_name="residual_unet",
            network_config=encode(config), plan=plan, fold_number=number, fold=fold,
        )  # fmt: skip
    return made


def test_every_way_is_measured_by_the_network_that_had_not_seen_the_case(dataset: Path, untuned: ModelPackage) -> None:
    told = tune(dataset, untuned.folder, LOOKED_AT)
    curve = told.record.curve
    assert curve and curve.cases == 4 and curve.folds == ("0", "1")
    exact = [point for point in curve.points if point.precision == "float32"]
    assert {(point.overlap, point.flips) for point in exact} == {(o, f) for o in tuning.OVERLAPS for f in (False, True)}
    assert all(point.agreement == 1.0 and point.seconds > 0 for point in exact)
    # by hand: each case through its own fold's network alone, Dice by its definition
    opened, scores = open_dataset(dataset), {"liver": [], "lesion": []}
    for number, fold in enumerate(told.record.folds.values()):
        for one in opened.cases:
            case = opened.read(one)
            if case_key(case) in fold.held_out.cases:
                network = engine(told.networks()[number], torch.device("cpu"))
                found = segment_volume(case.image, [network], told.plan, Inference(device="cpu", overlap=0.25), "")
                for label in told.plan.labels:
                    mask, truth = found.labels.voxels == label.value, case.labels.voxels == label.value
                    scores[label.name].append(2 * (mask & truth).sum() / (mask.sum() + truth.sum()))
    (point,) = [point for point in exact if (point.overlap, point.flips) == (0.25, False)]
    assert point.dice == pytest.approx(np.mean([np.mean(each) for each in scores.values()]), abs=2e-5)


def test_the_package_remembers_and_tells_it_and_changes_in_nothing_else(dataset: Path, untuned: ModelPackage) -> None:
    told = tune(dataset, untuned.folder, replace(LOOKED_AT, cases=1))
    assert told.id != untuned.id and told.record.folds == untuned.record.folds
    assert {name: told.record.files[name] for name in untuned.record.files if name != "card.md"} == {
        name: sha for name, sha in untuned.record.files.items() if name != "card.md"
    }
    chosen = told.record.curve.choice()
    assert f"`segment` takes {chosen.words}" in show(told.folder)
    assert not told.folder.with_name("package.tuning").exists()
    assert decode(Curve, encode(told.record.curve), where="curve") == told.record.curve


def test_segment_goes_the_way_that_was_chosen_unless_another_is_asked_for(
    untuned: ModelPackage, make_scan, tmp_path: Path
) -> None:
    points = (a_point(0.9, 9.0), a_point(0.9, 1.0, overlap=0.125), a_point(0.9, 5.0, overlap=0.25))
    amend(untuned, lambda record: replace(record, curve=a_curve(*points)))
    files.write(make_scan(), tmp_path / "scan.nii.gz")
    reports = {}
    for name, overlap in (("tuned", None), ("asked", 0.5)):
        settings = Segment(outputs=("labels",), device="cpu", overlap=overlap)
        batch = segment([tmp_path / "scan.nii.gz"], untuned.folder, tmp_path / name, settings)
        assert not batch.failed, batch.failed
        reports[name] = Report.read(tmp_path / name / "scan")
    assert "overlap 0.125" in reports["tuned"].engine and "chosen by hilum tune" in reports["tuned"].engine
    assert "overlap 0.5" in reports["asked"].engine and "chosen" not in reports["asked"].engine
    assert reports["tuned"].engine.startswith("torch ")


def test_a_tuning_that_was_stopped_goes_on_and_measures_no_case_twice(
    dataset: Path, untuned: ModelPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    answered = tuning._answered

    def counted(case, *rest):
        seen.append(case.id)
        if len(seen) == 15:
            raise KeyboardInterrupt
        return answered(case, *rest)

    monkeypatch.setattr(tuning, "_answered", counted)
    with pytest.raises(KeyboardInterrupt):
        tune(dataset, untuned.folder, LOOKED_AT)
    journal = untuned.folder.with_name("package.tuning") / "measured.jsonl"
    complete = len(journal.read_text().splitlines()) // len(tuning.ways(untuned.plan, torch.device("cpu")))
    journal.write_text(journal.read_text() + '{"id": "half a li')
    assert complete >= 1
    first = seen[0]
    seen.clear()
    assert tune(dataset, untuned.folder, LOOKED_AT).record.curve.cases == 4
    assert first not in seen and not journal.exists()


def test_what_cannot_be_measured_is_said_with_what_to_do(dataset: Path, untuned: ModelPackage, tmp_path: Path) -> None:
    none = {name: replace(fold, held_out=HeldOut()) for name, fold in untuned.record.folds.items()}
    other = {"0123456789ab": {"liver": 0.5}}
    strange = {name: replace(fold, held_out=HeldOut(cases=other)) for name, fold in untuned.record.folds.items()}
    amend(untuned, lambda record: replace(record, folds=strange))
    with pytest.raises(UsageError, match=r"none of the 1 held-out cases.*Give the dataset it was trained on"):
        tune(dataset, untuned.folder, LOOKED_AT)
    amend(untuned, lambda record: replace(record, folds=none))
    with pytest.raises(PackageError, match=r"names no held-out cases.*Train one with --fold 0"):
        tune(dataset, untuned.folder, LOOKED_AT)


def test_windows_that_lie_alike_are_looked_at_once(
    dataset: Path, untuned: ModelPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window as large as the scan has no neighbours, whatever they would share with it."""
    seen: list[str] = []
    answered = tuning._answered
    monkeypatch.setattr(tuning, "_answered", lambda case, *rest: seen.append(case.id) or answered(case, *rest))
    large = replace(untuned.plan, patch=(24, 24, 24), steps=(*untuned.plan.steps[:-1], Pad(shape=(24, 24, 24))))
    amend(untuned, lambda record: replace(record, plan=large))
    tune(dataset, untuned.folder, replace(LOOKED_AT, cases=1))
    kinds = {(way.flips, way.precision) for way in tuning.ways(large, torch.device("cpu"))}
    assert len(seen) == 2 * len(kinds), "a case of each fold, mirrored or not, in each precision"
