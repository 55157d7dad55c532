"""Scores are what geometry says and what MONAI computes; no case is lost on the way to the mean."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice

from pipeline.errors import UsageError
from pipeline.evaluation import NothingToEvaluate, agreement, evaluate, surface_distances
from preprocessing import files
from preprocessing.volume import Geometry, Volume

SPACING = (0.8, 1.1, 2.5)


def sphere(radius_mm: float, centre_mm: tuple[float, float, float], shape: tuple[int, int, int]) -> np.ndarray:
    points = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1) * SPACING
    return np.linalg.norm(points - centre_mm, axis=-1) <= radius_mm


def save(voxels: np.ndarray, path: Path, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*SPACING, 1.0]) if affine is None else affine
    geometry = Geometry(shape=voxels.shape, affine=affine)
    files.write(
        Volume(voxels=voxels[None], geometry=geometry, channels=("0",)), path, is_labels=voxels.dtype.kind in "iu"
    )


def block(first: int, last: int, value: int = 1) -> np.ndarray:
    voxels = np.zeros((20, 16, 10), np.uint8)
    voxels[first:last, 4:12, 2:8] = value
    return voxels


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")  # MONAI 1.6 calls itself the old way
@pytest.mark.parametrize("seed", range(6))
def test_scores_agree_with_monai(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (40, 32, 14)
    middle = np.array(shape) * SPACING / 2
    one = sphere(rng.uniform(4, 11), tuple(middle + rng.uniform(-3, 3, 3)), shape)
    two = sphere(rng.uniform(4, 11), tuple(middle + rng.uniform(-3, 3, 3)), shape) | (rng.random(shape) < 0.002)
    tolerance = float(rng.uniform(0.5, 3))
    dice, nsd, hd95 = agreement(one, two, SPACING, tolerance)

    def tensor(mask: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(mask[None, None].astype(np.float32))

    assert dice == pytest.approx(compute_dice(tensor(one), tensor(two)).item(), abs=1e-6)
    theirs = compute_hausdorff_distance(
        tensor(one), tensor(two), include_background=True, percentile=95, spacing=SPACING
    )
    assert hd95 == pytest.approx(theirs.item(), abs=1e-4)
    theirs = compute_surface_dice(tensor(one), tensor(two), [tolerance], include_background=True, spacing=SPACING)
    assert nsd == pytest.approx(theirs.item(), abs=1e-6)


def test_a_shifted_box_scores_as_arithmetic_says() -> None:
    """10 of 12 planes overlap; every distance is a whole number of steps along i."""
    dice, nsd, hd95 = agreement(block(2, 14) > 0, block(4, 16) > 0, SPACING, 1.5)
    assert dice == pytest.approx(10 / 12)
    assert hd95 == pytest.approx(2 * SPACING[0])
    outside, side = 8 * 6, 2 * (8 + 6) - 4  # voxels of an end face; of the rim of a plane between
    surface = 2 * outside + 10 * side
    far = outside + side  # the leading face is 1.6 mm off, but for its rim; the plane behind it is near
    assert nsd is not None and nsd < 1
    to_other, _ = surface_distances(block(2, 14) > 0, block(4, 16) > 0, SPACING)
    assert len(to_other) == surface and (to_other > 1.5).sum() <= far
    assert nsd == pytest.approx(1 - (to_other > 1.5).sum() / surface)


def test_concentric_spheres_are_apart_by_the_difference_of_their_radii() -> None:
    shape = (60, 44, 20)
    centre = (24.0, 24.2, 25.0)
    one, two = sphere(14, centre, shape), sphere(19, centre, shape)
    dice, nsd, hd95 = agreement(one, two, SPACING, 1.0)
    assert dice == pytest.approx(2 * 14**3 / (14**3 + 19**3), rel=0.02)
    assert hd95 == pytest.approx(5, abs=1.5)
    assert nsd == 0
    assert agreement(one, two, SPACING, 9.0)[1] == 1


def test_identical_labels_are_perfect_and_an_empty_label_has_no_surface() -> None:
    full, empty = block(4, 9) > 0, np.zeros((20, 16, 10), bool)
    assert agreement(full, full, SPACING, 0.0) == (1.0, 1.0, 0.0)
    assert agreement(empty, empty, SPACING, 1.0) == (None, None, None)
    assert agreement(full, empty, SPACING, 1.0) == agreement(empty, full, SPACING, 1.0) == (0.0, 0.0, None)


def test_where_a_label_lies_in_the_image_does_not_change_its_score() -> None:
    """Distances are taken in the box around both: the same as in the whole image, at its border too."""
    one, two = block(0, 9) > 0, block(3, 20) > 0
    inside = agreement(np.pad(one, 7), np.pad(two, 7), SPACING, 1.0)
    assert agreement(one, two, SPACING, 1.0) == inside


def test_what_segment_wrote_is_compared_with_an_msd_dataset(tmp_path: Path) -> None:
    dataset, out = tmp_path / "dataset", tmp_path / "out"
    for case, first in (("a", 2), ("b", 4), ("c", 6)):
        save(block(2, 12) + block(14, 16, 2), dataset / "labelsTr" / f"{case}.nii.gz")
        save(block(first, first + 10) + block(16, 18, 2), out / case / "labels.nii.gz")
    (dataset / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "liver", "2": "lesion"}}))
    (dataset / "labelsTr" / "._a.nii.gz").write_bytes(b"left by another system")
    told: list[tuple[int, int]] = []
    found = evaluate(
        out, dataset, tmp_path / "new" / "scores.json", progress=lambda done, total: told.append((done, total))
    )
    liver, lesion = found.summary
    assert (liver.label, liver.cases, liver.dice) == ("liver", 3, pytest.approx((1 + 0.8 + 0.6) / 3))
    assert (lesion.label, lesion.dice, lesion.missed) == ("lesion", 0.0, 0)
    assert found.mean_dice == pytest.approx(0.4)
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
    said = json.loads((tmp_path / "new" / "scores.json").read_text(encoding="utf-8"))
    assert said["cases"]["b"]["liver"]["dice"] == pytest.approx(0.8)
    assert said["cases"]["a"]["liver"]["volume_ml"] == pytest.approx(10 * 8 * 6 * np.prod(SPACING) / 1000)
    assert said["summary"]["liver"]["hd95_mm"] == pytest.approx((0 + 1.6 + 3.2) / 3)
    assert "not counted" in said["conventions"]["empty in both"] and said["tolerance_mm"] == 1.0


def test_files_beside_files_are_matched_by_name_in_any_format(tmp_path: Path) -> None:
    save(block(2, 12), tmp_path / "p" / "x_0000.mha")
    save(block(2, 12), tmp_path / "p" / "alone.nii.gz")
    save(block(2, 12).astype(np.float32), tmp_path / "r" / "x.nrrd")
    save(block(2, 12), tmp_path / "r" / "waiting.nii")
    found = evaluate(tmp_path / "p", tmp_path / "r", labels={1: "tumour"})
    assert [(score.case_id, score.label, score.dice) for score in found.scores] == [("x_0000", "tumour", 1.0)]
    assert found.unmatched_predictions == ("alone",) and found.unmatched_references == ("waiting",)


def test_names_come_from_the_package_when_the_references_have_none(tmp_path: Path) -> None:
    save(block(2, 12), tmp_path / "p" / "x" / "labels.nii.gz")
    (tmp_path / "p" / "x" / "measurements.json").write_text(json.dumps({"labels": {"liver": {"value": 1}}}))
    save(block(2, 12) + block(13, 15, 7), tmp_path / "r" / "x.nii.gz")
    found = evaluate(tmp_path / "p", tmp_path / "r")
    assert [(each.label, each.dice, each.missed) for each in found.summary] == [("liver", 1.0, 0), ("7", 0.0, 1)]


def test_nnunet_names_are_understood(tmp_path: Path) -> None:
    save(block(2, 12, 2), tmp_path / "p" / "x.nii.gz")
    save(block(2, 12, 2), tmp_path / "d" / "labelsTr" / "x.nii.gz")
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    (tmp_path / "d" / "dataset.json").write_text(json.dumps({"labels": labels}))
    assert [each.label for each in evaluate(tmp_path / "p", tmp_path / "d").summary] == ["core"]


def test_an_empty_label_is_counted_only_where_it_was_missed_or_invented(tmp_path: Path) -> None:
    empty = np.zeros((20, 16, 10), np.uint8)
    for case, predicted, reference in (
        ("both", empty, empty),
        ("missed", empty, block(2, 5)),
        ("invented", block(2, 5), empty),
        ("right", block(2, 5), block(2, 5)),
    ):
        save(predicted, tmp_path / "p" / f"{case}.nii.gz")
        save(reference, tmp_path / "r" / f"{case}.nii.gz")
    (summary,) = evaluate(tmp_path / "p", tmp_path / "r", labels={1: "lesion"}).summary
    assert (summary.cases, summary.missed, summary.invented) == (3, 1, 1)
    assert summary.dice == pytest.approx(1 / 3) and summary.nsd == pytest.approx(1 / 3) and summary.hd95_mm == 0


def test_a_case_that_cannot_be_compared_says_why_and_stops_no_other(tmp_path: Path) -> None:
    moved = np.diag([*SPACING, 1.0])
    moved[0, 3] = 1.0
    save(block(2, 12), tmp_path / "p" / "moved.nii.gz", moved)
    save(block(2, 12), tmp_path / "p" / "right.nii.gz")
    save(block(2, 12), tmp_path / "p" / "soft.nii.gz")
    save(block(2, 12), tmp_path / "p" / "torn.nii.gz")
    for case in ("moved", "right"):
        save(block(2, 12), tmp_path / "r" / f"{case}.nii.gz")
    save(block(2, 12) * np.float32(0.7), tmp_path / "r" / "soft.nii.gz")
    (tmp_path / "r" / "torn.nii.gz").write_bytes((tmp_path / "r" / "right.nii.gz").read_bytes()[:60])
    found = evaluate(tmp_path / "p", tmp_path / "r", tmp_path / "scores.json")
    assert found.mean_dice == 1.0 and {score.case_id for score in found.scores} == {"right"}
    assert set(found.failed) == {"moved", "soft", "torn"}
    assert "must share one grid" in found.failed["moved"] and "whole numbers" in found.failed["soft"]
    assert set(json.loads((tmp_path / "scores.json").read_text())["failed"]) == {"moved", "soft", "torn"}


def test_nothing_in_common_is_an_error_that_names_both_sides(tmp_path: Path) -> None:
    save(block(2, 12), tmp_path / "p" / "one.nii.gz")
    (tmp_path / "r").mkdir()
    with pytest.raises(NothingToEvaluate, match=r"1 case\(s\) \(one\).*no label files.*no case is in both"):
        evaluate(tmp_path / "p", tmp_path / "r")
    with pytest.raises(UsageError, match="is no folder"):
        evaluate(tmp_path / "p", tmp_path / "absent")


def test_a_real_reference_against_itself_is_perfect(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "hippocampus"
    for path in sorted((folder / "labelsTr").glob("hippocampus*"))[:3]:
        shutil.copy(path, tmp_path)
    found = evaluate(tmp_path, folder)
    assert (
        len(found.scores) == 6
        and found.mean_dice == 1.0
        and [each.label for each in found.summary] == ["Anterior", "Posterior"]
    )
    assert not found.failed and not found.unmatched_predictions and found.unmatched_references
    assert all(each.hd95_mm == 0 for each in found.summary)
