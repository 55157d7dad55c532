"""Held-out cases say how well a network does, how sure it may be and what would help it; the package acts on it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from networks import residual_unet
from pipeline import package
from pipeline.batch import segment
from pipeline.config import Segment
from pipeline.package import Fold, ModelPackage
from pipeline.postprocessing import HeldOut, NoSmaller, clean
from pipeline.prediction import Inference, segment_volume
from pipeline.scoring import Scores, case_key, score
from preprocessing import files
from preprocessing.datasets import Dataset, open_dataset
from preprocessing.plan import Label, Plan
from preprocessing.records import encode
from preprocessing.steps import Normalise, Orient, Pad, Resample, Scale
from preprocessing.volume import Geometry, Volume

CASES = 6
SHAPE = (22, 20, 18)


class Bands(nn.Module):
    """Logits from the brightness of a voxel alone: around 0 background, around 1 liver, around 2 lesion."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, :1]
        return self.scale * torch.cat([-(x**2), -((x - 1) ** 2), -((x - 2) ** 2)], dim=1)


class Thresholds(nn.Module):
    """For regions: brighter than a half is the whole, brighter than one and a half the core."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * torch.cat([x[:, :1] - 0.5, x[:, :1] - 1.5], dim=1)


def a_case(seed: int) -> tuple[Volume, Volume]:
    """A liver with a lesion, as bright as their numbers, blurred by noise; and specks as bright as liver."""
    rng = np.random.default_rng(seed)
    truth = np.zeros(SHAPE, np.uint8)
    truth[3:14, 4:15, 3:13] = 1
    truth[6:10, 7:11, 5:9] = 2
    image = truth + rng.normal(0, 0.12, SHAPE)
    for place in rng.integers(0, 16, (3, 2)):
        image[17 + rng.integers(4), place[0], place[1]] = 1
    affine = np.diag([-1.0, 1.0, 1.5, 1.0])
    affine[:3, 3] = rng.uniform(-9, 9, 3)
    grid = Geometry(shape=SHAPE, affine=affine)
    return (
        Volume(voxels=image.astype(np.float32)[None], geometry=grid, channels=("mr",)),
        Volume(voxels=truth[None], geometry=grid, channels=("labels",)),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("scored")
    for seed in range(CASES):
        image, labels = a_case(seed)
        files.write(image, where / "imagesTr" / f"patient{seed}_0000.nii.gz")
        files.write(labels, where / "labelsTr" / f"patient{seed}.nii.gz", is_labels=True)
    names = {"background": 0, "liver": 1, "lesion": 2}
    described = {"name": "specks", "channel_names": {"0": "mr"}, "labels": names, "file_ending": ".nii.gz"}
    (where / "dataset.json").write_text(json.dumps(described))
    return where


@pytest.fixture(scope="module")
def dataset(folder: Path) -> Dataset:
    return open_dataset(folder)


@pytest.fixture(scope="module")
def plan(dataset: Dataset) -> Plan:
    """Brightness stays what it is."""
    return Plan(
        name="specks",
        channels=("mr",),
        labels=dataset.labels,
        steps=(
            Orient(),
            Normalise(channels=(Scale(by="dataset", low=-9.0, high=9.0),)),
            Pad(shape=(24, 24, 24)),
        ),
        spacing_mm=(1.0, 1.0, 1.5),
        patch=(24, 24, 24),
        batch=2,
    )


@pytest.fixture(scope="module")
def scores(dataset: Dataset, plan: Plan) -> Scores:
    return score(dataset, dataset.cases, Bands(10.0), plan, "cpu")


def test_dice_is_that_of_what_segmentation_would_have_written(dataset: Dataset, plan: Plan, scores: Scores) -> None:
    assert len(scores.held_out.cases) == CASES
    means = {"liver": [], "lesion": []}
    for one in dataset.cases:
        case = dataset.read(one)
        found = segment_volume(case.image, [Bands(10.0)], plan, Inference(device="cpu"), "").labels.voxels
        for label in plan.labels:
            mask, truth = found == label.value, case.labels.voxels == label.value
            dice = 2 * (mask & truth).sum() / (mask.sum() + truth.sum())
            assert scores.held_out.cases[case_key(case)][label.name] == pytest.approx(dice, abs=1e-5)
            means[label.name].append(dice)
    assert scores.dice == pytest.approx({name: np.mean(dice) for name, dice in means.items()}, abs=1e-4)
    assert 0.9 < scores.dice["liver"] < 1 and scores.mean_dice == pytest.approx(np.mean(list(scores.dice.values())))


def test_evidence_is_what_cleaning_would_have_done(dataset: Dataset, plan: Plan, scores: Scores) -> None:
    rule = NoSmaller(label="liver", ml=0.012)
    (trial,) = [trial for trial in scores.held_out.trials if trial.rule == rule]
    rises = []
    for one in dataset.cases:
        case = dataset.read(one)
        found = segment_volume(case.image, [Bands(10.0)], plan, Inference(device="cpu"), "")
        voxels = clean(found.labels, [rule], plan)[0].voxels
        mask, truth = voxels == 1, case.labels.voxels == 1
        dice = 2 * (mask & truth).sum() / (mask.sum() + truth.sum())
        rises.append(dice - scores.held_out.cases[case_key(case)]["liver"])
    assert trial.rises == {"liver": pytest.approx(sum(rises), abs=1e-4)}
    assert (trial.better, trial.worse) == (CASES, 0)


def test_a_network_twice_as_sure_has_twice_the_temperature(dataset: Dataset, plan: Plan, scores: Scores) -> None:
    surer = score(dataset, dataset.cases, Bands(20.0), plan, "cpu")
    assert scores.temperature and surer.temperature
    assert surer.temperature == pytest.approx(2 * scores.temperature, rel=1e-3)
    assert surer.calibration and surer.calibration.cases == CASES
    assert surer.calibration.voxels == CASES * np.prod(SHAPE), "all that was scanned, and nothing of the padding"


def test_scores_depend_on_no_order_and_are_the_same_every_time(dataset: Dataset, plan: Plan, scores: Scores) -> None:
    again = score(dataset, dataset.cases[::-1], Bands(10.0), plan, "cpu")
    assert again.dice == scores.dice and dict(again.held_out.cases) == dict(scores.held_out.cases)
    assert again.temperature == pytest.approx(scores.temperature, rel=1e-5)
    assert score(dataset, dataset.cases, Bands(10.0), plan, "cpu") == scores


def test_progress_is_told_case_by_case(dataset: Dataset, plan: Plan) -> None:
    told = []
    score(dataset, dataset.cases[:2], Bands(), plan, "cpu", lambda what, done, of, *_: told.append((what, done, of)))
    assert told == [("score held-out cases", 1, 2), ("score held-out cases", 2, 2)]


def test_no_case_is_named(dataset: Dataset, scores: Scores) -> None:
    said = json.dumps(encode(scores.held_out))
    assert not any(one.id in said for one in dataset.cases)
    assert all(len(key) == 12 for key in scores.held_out.cases)


def test_where_nothing_was_held_out_nothing_is_said(dataset: Dataset, plan: Plan) -> None:
    assert score(dataset, [], Bands(), plan, "cpu") == Scores()


def test_labels_nobody_looked_for_are_not_scored(dataset: Dataset, plan: Plan) -> None:
    partial = [replace(one, annotated=("lesion",)) for one in dataset.cases[:2]]
    said = score(dataset, partial, Bands(10.0), plan, "cpu")
    assert set(said.dice) == {"lesion"} and all(set(dice) == {"lesion"} for dice in said.held_out.cases.values())
    assert all(set(trial.rises) == {"lesion"} for trial in said.held_out.trials)
    assert said.calibration and said.calibration.cases == 2


def test_what_nobody_knows_does_not_count(dataset: Dataset, plan: Plan) -> None:
    one_label = replace(plan, labels=plan.labels[:1], ignored=2)

    class Two(Bands):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)[:, :2]

    said = score(dataset, dataset.cases[:2], Two(10.0), one_label, "cpu")
    assert said.calibration and said.calibration.voxels == 2 * (np.prod(SHAPE) - 4**3), "no voxel of the lesion"
    case = dataset.read(dataset.cases[0])
    found = segment_volume(case.image, [Two(10.0)], one_label, Inference(device="cpu"), "").labels.voxels == 1
    known = case.labels.voxels != 2
    truth = (case.labels.voxels == 1) & known
    dice = 2 * (found & truth).sum() / ((found & known).sum() + truth.sum())
    assert said.held_out.cases[case_key(case)]["liver"] == pytest.approx(dice, abs=1e-5)


def test_regions_are_scored_each_with_what_lies_in_it(dataset: Dataset, plan: Plan) -> None:
    labels = (
        Label(value=1, name="whole", colour=(1, 2, 3), parts=(1, 2)),
        Label(value=2, name="core", colour=(1, 2, 3), parts=(2,)),
    )
    said = score(dataset, dataset.cases, Thresholds(), replace(plan, labels=labels), "cpu")
    assert said.dice["whole"] > 0.95 and said.dice["core"] > 0.95
    assert said.temperature and said.temperature < 1, "it is surer of itself than three logits a unit say"


def test_resampled_cases_are_scored_on_their_own_grid(dataset: Dataset, plan: Plan) -> None:
    steps = (Orient(), Resample(spacing_mm=(1.3, 1.3, 1.3)), *plan.steps[1:])
    said = score(dataset, dataset.cases[:2], Bands(10.0), replace(plan, steps=steps), "cpu")
    assert said.dice["liver"] > 0.8 and said.calibration and said.calibration.voxels < 2 * np.prod(SHAPE)


# what a package makes of it


@pytest.fixture
def two_folds(dataset: Dataset, plan: Plan, tmp_path: Path) -> Callable[..., ModelPackage]:
    """A package of a tiny network, with the scores of another one."""

    def made(*names: int | str, scores: Callable[[int], Scores]) -> ModelPackage:
        config = residual_unet.Config(
            width=4, blocks=(1,), strides=((1, 1, 1), (2, 2, 2)), kernels=((3, 3, 3), (3, 3, 3))
        )
        network = residual_unet.build(config, channels=1, classes=3)
        for number, name in enumerate(names):
            said = Scores() if name == package.ALL else scores(number)
            made = package.save(
                tmp_path / "package", network=network, name="specks", network_name="residual_unet",
                network_config=encode(config), plan=plan, fold_number=name,
                fold=Fold(
                    weights=package.weights_file(name), dice=said.dice, held_out=said.held_out,
                    temperature=said.temperature, calibration=said.calibration, cases_trained=3,
                    cases_held_out=len(said.held_out.cases), epochs=1, minutes=0.1, seed=0,
                ),
            )  # fmt: skip
        return made

    return made


def test_post_processing_is_chosen_once_enough_folds_say_so(
    two_folds: Callable[..., ModelPackage], dataset: Dataset, plan: Plan, tmp_path: Path
) -> None:
    def scores(number: int) -> Scores:
        return score(dataset, dataset.cases[3 * number : 3 * number + 3], Bands(10.0), plan, "cpu")

    first = two_folds(0, scores=scores)
    assert first.rules == (), "three cases may be chance"
    assert "no rule made the 3 held-out case(s) better beyond chance" in (first.folder / "card.md").read_text()
    both = two_folds(1, scores=lambda _: scores(1))
    (chosen,) = both.record.postprocessing
    assert chosen.rule.label == "liver" and (chosen.cases, chosen.better, chosen.worse) == (6, 6, 0)
    assert chosen.folds == ("0", "1") and chosen.dice_after["liver"] > chosen.dice_before["liver"]
    words = (both.folder / "card.md").read_text()
    assert chosen.rule.words[1:] in words and "6 case(s) better, 0 worse" in words
    found = segment_volume(a_case(77)[0], [Bands(10.0)], plan, Inference(device="cpu"), "", rules=both.rules)
    assert (found.labels.voxels[0, 15:] == 0).all() and (found.labels.voxels > 0).any()


def test_a_report_tells_temperature_and_rules(
    two_folds: Callable[..., ModelPackage], scores: Scores, folder: Path, tmp_path: Path
) -> None:
    made = two_folds(0, scores=lambda _: scores)
    assert made.rules and made.is_calibrated
    scan = folder / "imagesTr" / "patient0_0000.nii.gz"
    outputs = ("labels", "measurements", "page")
    batch = segment([scan], str(made.folder), tmp_path / "out", Segment(outputs=outputs))
    assert [row.status for row in batch.rows] == ["done"]
    case = tmp_path / "out" / batch.rows[0].case_id
    said = json.loads((case / "report.json").read_text())
    assert said["temperatures"] == {"0": scores.temperature}
    assert [applied["rule"] for applied in said["postprocessing"]] == [rule.words for rule in made.rules]
    assert (
        "calibrated on held-out cases"
        in json.loads((case / "measurements.json").read_text())["words"]["mean_confidence"]
    )
    page = (case / "page.html").read_text()
    assert made.rules[0].words in page and "temperature" in page and "not calibrated" not in page


def test_a_fold_of_all_cases_takes_the_temperature_of_the_others(
    two_folds: Callable[..., ModelPackage], scores: Scores
) -> None:
    only = two_folds("all", scores=lambda _: scores)
    assert only.temperatures == {"all": 1.0} and not only.is_calibrated and only.rules == ()
    assert (only.folder / "weights-all.safetensors").is_file()
    assert "nothing was held out to calibrate them on" in (only.folder / "card.md").read_text()

    hot = replace(scores, temperature=4.0)
    made = two_folds(10, 2, scores=lambda number: hot if number else replace(scores, temperature=1.0))
    assert list(made.temperatures.items()) == [("2", 4.0), ("10", 1.0), ("all", pytest.approx(2.0))]
    assert len(made.networks()) == 3
    words = (made.folder / "card.md").read_text()
    assert (
        "all cases, none held out" in words and "Fold all held nothing out; it takes the others' mean, 2.000" in words
    )


def test_evidence_of_nothing_chooses_nothing(plan: Plan) -> None:
    from pipeline.postprocessing import choose

    assert choose({"0": HeldOut(), "all": HeldOut()}, plan) == ()
