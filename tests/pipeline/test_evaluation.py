"""No case is lost on the way from files to the mean, the CSV and the page; regions, ignored and unlooked-for voxels count as said."""

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import UsageError
from pipeline.evaluation import NothingToEvaluate, evaluate, table
from pipeline.outputs import dicom_seg, rtstruct
from pipeline.references import Key, read_image
from pipeline.report import Result
from pipeline.scorecard import worst
from preprocessing import dicom, files
from preprocessing.declared import label_table
from preprocessing.volume import Geometry, Volume

SPACING = (0.8, 1.1, 2.5)


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
    assert said["summary"]["liver"]["hd95_mm"]["mean"] == pytest.approx((0 + 1.6 + 3.2) / 3)
    assert said["summary"]["liver"]["hd95_mm"]["median"] == pytest.approx(1.6)
    assert said["summary"]["liver"]["dice"]["interval"] is None  # of three cases
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


def describe(folder: Path, **said: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps({"channel_names": {"0": "mr"}, **said}))


def test_nnunet_names_are_understood_and_regions_are_measured_whole(tmp_path: Path) -> None:
    """What is painted with 2 is core, and whole too."""
    save(block(2, 12, 1) + block(12, 14, 2), tmp_path / "p" / "x.nii.gz")
    save(block(2, 10, 1) + block(10, 14, 2), tmp_path / "d" / "labelsTr" / "x.nii.gz")
    describe(tmp_path / "d", labels={"background": 0, "whole": [1, 2], "core": [2]}, regions_class_order=[1, 2])
    found = evaluate(tmp_path / "p", tmp_path / "d")
    assert [(each.label, each.dice) for each in found.summary] == [("whole", 1.0), ("core", pytest.approx(4 / 6))]


def test_a_region_painted_with_a_number_of_its_own_is_known_by_it(tmp_path: Path) -> None:
    save(block(2, 12, 10) + block(12, 14, 20), tmp_path / "p" / "x.nii.gz")
    save(block(2, 12, 1) + block(12, 14, 2), tmp_path / "d" / "labelsTr" / "x.nii.gz")
    describe(tmp_path / "d", labels={"background": 0, "whole": [1, 2], "core": [2]}, regions_class_order=[10, 20])
    assert {each.label: each.dice for each in evaluate(tmp_path / "p", tmp_path / "d").summary} == {
        "whole": 1,
        "core": 1,
    }


def test_what_nobody_knows_is_neither_right_nor_wrong(tmp_path: Path) -> None:
    save(block(2, 16), tmp_path / "p" / "x.nii.gz")
    save(block(2, 12) + block(12, 18, 2), tmp_path / "d" / "labelsTr" / "x.nii.gz")
    describe(tmp_path / "d", labels={"background": 0, "liver": 1, "ignore": 2})
    (liver,) = evaluate(tmp_path / "p", tmp_path / "d").scores
    assert liver.dice == 1 and liver.volume_error_ml == 0 and liver.hd_mm == 0


def test_a_case_is_measured_by_the_labels_that_were_looked_for_in_it(tmp_path: Path) -> None:
    for case in ("a", "b"):
        save(block(2, 8) + block(8, 12, 2), tmp_path / "p" / f"{case}.nii.gz")
    save(block(2, 8), tmp_path / "d" / "labelsTr" / "a.nii.gz")
    save(block(2, 8) + block(8, 12, 2), tmp_path / "d" / "labelsTr" / "b.nii.gz")
    describe(tmp_path / "d", labels={"background": 0, "liver": 1, "lesion": 2}, annotated={"a": ["liver"]})
    found = evaluate(tmp_path / "p", tmp_path / "d")
    assert [(score.case_id, score.label) for score in found.scores] == [("a", "liver"), ("b", "liver"), ("b", "lesion")]
    assert found.mean_dice == 1 and found.summary[1].invented == 0 and found.partly_annotated == ("a",)


def test_volumes_lesions_and_distances_stand_beside_dice(tmp_path: Path) -> None:
    save(block(2, 12), tmp_path / "p" / "x.nii.gz")
    save(block(4, 12), tmp_path / "r" / "x.nii.gz")
    (score,) = evaluate(tmp_path / "p", tmp_path / "r").scores
    voxel = float(np.prod(SPACING)) / 1000
    assert score.volume_error_ml == pytest.approx(2 * 48 * voxel) and score.volume_error_percent == pytest.approx(25)
    assert (score.lesion_f1, score.lesions, score.lesions_found) == (1, 1, 1)
    assert score.iou == pytest.approx(8 / 10) and score.hd_mm == pytest.approx(1.6) and 0 < score.assd_mm < 1.6


def test_a_page_and_a_csv_lie_beside_the_json(tmp_path: Path) -> None:
    for number in range(6):
        save(block(2, 12 + number), tmp_path / "p" / f"case<{number}>.nii.gz")
        save(block(2, 12), tmp_path / "r" / f"case<{number}>.nii.gz")
    found = evaluate(tmp_path / "p", tmp_path / "r", tmp_path / "s.json", labels={1: "=liver"})
    lines = (tmp_path / "s.csv").read_text().splitlines()
    assert lines[0].startswith("case,label,dice,iou,nsd,hd95_mm") and len(lines) == 7 and ",'=liver," in lines[1]
    page = (tmp_path / "s.html").read_text()
    assert "case&lt;5&gt;" in page and "case<5>" not in page and "default-src 'none'" in page
    assert page.count("data:image/png;base64,") == 6 and "<svg" in page and "http" not in page.replace("http-equiv", "")
    (summary,) = found.summary
    low, high = summary.of["dice"].interval
    assert low < summary.dice < high and f"{summary.dice:.3f}" in table(found)
    assert json.loads((tmp_path / "s.json").read_text())["surface"] == "voxels"


def test_the_worst_cases_come_first_and_show_their_scan(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(8):
        save(block(2 + number % 5, 12), tmp_path / "p" / f"c{number}.nii.gz")
        save(block(2, 12), tmp_path / "d" / "labelsTr" / f"c{number}.nii.gz")
        save(rng.normal(size=(20, 16, 10)).astype(np.float32), tmp_path / "d" / "imagesTr" / f"c{number}_0000.nii.gz")
    describe(tmp_path / "d", labels={"background": 0, "liver": 1})
    found = evaluate(tmp_path / "p", tmp_path / "d", tmp_path / "s.json")
    assert [case for case, _ in worst(found.scores)] == ["c4", "c3", "c2", "c7", "c1", "c6"]
    pictures = re.findall(r"base64,([^\"]+)", (tmp_path / "s.html").read_text())
    sheet = np.array(Image.open(io.BytesIO(base64.b64decode(pictures[0]))))
    greys = sheet[(sheet.max(axis=2) == sheet.min(axis=2))]
    assert len(np.unique(greys)) > 50  # the scan is behind the labels
    assert (sheet == (230, 159, 0)).all(axis=2).any()  # the line of the prediction


def test_the_scan_is_found_where_segment_says_it_lay(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).normal(size=(20, 16, 10)).astype(np.float32)
    save(grey, tmp_path / "scans" / "x.nii.gz")
    save(block(2, 12), tmp_path / "p" / "x" / "labels.nii.gz")
    prediction = tmp_path / "p" / "x" / "labels.nii.gz"
    assert read_image("x", prediction, Key()) is None
    (prediction.parent / "report.json").write_text(json.dumps({"sources": [str(tmp_path / "scans" / "x.nii.gz")]}))
    found = read_image("x", prediction, Key())
    assert found is not None and np.array_equal(found.voxels[0], grey)
    (tmp_path / "scans" / "x.nii.gz").write_bytes(b"torn")
    assert read_image("x", prediction, Key()) is None


def test_two_predictions_are_told_apart_case_by_case(tmp_path: Path) -> None:
    for number in range(9):
        save(block(2, 12), tmp_path / "r" / f"c{number}.nii.gz")
        save(block(2, 12 + (number == 0)), tmp_path / "good" / f"c{number}.nii.gz")
        save(block(4 + number % 3, 12), tmp_path / "bad" / f"c{number}_0000.nii.gz")
    found = evaluate(
        tmp_path / "good", tmp_path / "r", tmp_path / "s.json", against=tmp_path / "bad", labels={1: "liver"}
    )
    one = found.against["dice"]["liver"]
    assert (one.cases, one.higher, one.lower) == (9, 9, 0) and one.p == pytest.approx(2 / 2**9)
    low, high = one.interval
    assert low < one.mean < high and found.against["lesion_f1"]["liver"].said == "no case differs"
    said = json.loads((tmp_path / "s.json").read_text())["against"]
    assert said["dice"]["liver"]["said"] == "p = 0.004" and said["mean_dice"] < found.mean_dice
    assert "Difference to the other prediction" in (tmp_path / "s.html").read_text() and "p = 0.004" in table(found)


@pytest.mark.parametrize("drawn", ["references", "predictions", "both"])
def test_dicom_segmentations_and_contours_are_put_on_the_others_grid(drawn: str, tmp_path: Path) -> None:
    scan = series(tmp_path / "d" / "imagesTr" / "x")
    found = np.zeros((1, *scan.geometry.shape), np.uint8)
    found[0, 2:7, 3:8, 2:6], found[0, 8:10, 3:8, 2:6] = 1, 2
    result = Result(
        case_id="x", scan=scan, labels=Volume(voxels=found, geometry=scan.geometry, channels=("labels",)),
        label_table=label_table({"liver": 1, "lesion": 2}), package_id="0" * 64, package_name="none",
    )  # fmt: skip
    sides = {"predictions": tmp_path / "p" / "x", "references": tmp_path / "d" / "labelsTr" / "x"}
    for side, folder in sides.items():
        folder.mkdir(parents=True)
        if drawn in (side, "both"):
            kind = dicom_seg if side == "references" else rtstruct
            kind.write(result, folder, kind.Config())
        else:
            save(found[0], folder / "labels.nii.gz", scan.geometry.affine)
    describe(tmp_path / "d", labels={"background": 0, "lesion": 2, "liver": 1})
    evaluation = evaluate(tmp_path / "p", tmp_path / "d", tmp_path / "s.json")
    assert not evaluation.failed and [(one.label, one.dice) for one in evaluation.summary] == [
        ("liver", 1),
        ("lesion", 1),
    ]


def series(folder: Path) -> Volume:
    affine = np.diag([-0.8, -1.1, 2.5, 1.0])
    grey = np.random.default_rng(0).integers(0, 900, (1, 12, 11, 9)).astype(np.int16)
    volume = Volume(voxels=grey, geometry=Geometry(shape=(12, 11, 9), affine=affine), channels=("0",))
    dicom.write_series(volume, folder, description="phantom", modality="CT")
    return files.read(folder)


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


def test_what_is_written_never_overwrites_itself(tmp_path: Path) -> None:
    for side in ("p", "r"):
        save(block(2, 12), tmp_path / side / "x.nii.gz")
    for name in ("unet.v1", "unet.v2"):
        evaluate(tmp_path / "p", tmp_path / "r", tmp_path / "out" / name)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {f"unet.v{n}{ending}" for n in (1, 2) for ending in ("", ".csv", ".html")}
    with pytest.raises(UsageError, match=r"Name it scores\.json"):
        evaluate(tmp_path / "p", tmp_path / "r", tmp_path / "scores.html")
    with pytest.raises(UsageError, match="0 or more is needed"):
        evaluate(tmp_path / "p", tmp_path / "r", tolerance_mm=-1.0)


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
