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

from pipeline import gallery
from pipeline.cli import main
from pipeline.errors import UsageError
from pipeline.evaluation import NothingToEvaluate, evaluate, table
from pipeline.outputs import dicom_seg, rtstruct
from pipeline.references import Key, Maps, read_image, read_key
from pipeline.report import Result
from pipeline.scorecard import worst
from preprocessing import dicom, files
from preprocessing.declared import label_table
from preprocessing.reading import Reading
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


def test_a_torn_report_costs_the_scan_behind_a_picture_and_nothing_else(tmp_path: Path) -> None:
    save(block(2, 12), tmp_path / "p" / "x" / "labels.nii.gz")
    (tmp_path / "p" / "x" / "report.json").write_text('{"sources": ["/sc')
    save(block(4, 12), tmp_path / "r" / "x.nii.gz")
    evaluate(tmp_path / "p", tmp_path / "r", tmp_path / "s.json")
    assert "data:image/png" in (tmp_path / "s.html").read_text()


def test_what_was_measured_is_written_before_any_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(*_: object) -> str:
        raise RuntimeError("no page today")

    save(block(2, 12), tmp_path / "p" / "x.nii.gz")
    save(block(4, 12), tmp_path / "r" / "x.nii.gz")
    monkeypatch.setattr("pipeline.evaluation.page", torn)
    with pytest.raises(RuntimeError, match="no page today"):
        evaluate(tmp_path / "p", tmp_path / "r", tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text())["mean_dice"] < 1 and (tmp_path / "s.csv").exists()


def test_a_picture_looks_where_what_was_looked_for_is_wrong() -> None:
    """Another value of the same region, or a label nobody looked for, is not wrong."""
    given = block(2, 12)
    holed = given.copy()
    holed[2:12, 4:6, 3] = 0
    decoyed = holed.copy()
    decoyed[2:12, 4:12, 6] = 2
    decoyed[:, :, 9] = 7
    grid = Geometry(shape=given.shape, affine=np.diag([*SPACING, 1.0]))
    maps = (Maps(predicted=each, given=given, geometry=grid) for each in (holed, decoyed, given))
    seen, beside_decoys, right = (gallery.picture(each, {"whole": (1, 2), "unlooked": ()}, None) for each in maps)
    assert seen == beside_decoys and seen != right


def dataset_of_csv(folder: Path, rows: dict[str, str]) -> Path:
    """Scan and reference of every case, and what was looked for in it."""
    for case in rows:
        save(np.random.default_rng(0).normal(size=(20, 16, 10)).astype(np.float32), folder / "scans" / f"{case}.nii.gz")
    lines = [f"{case},scans/{case}.nii.gz,drawn/{case}.nii.gz,{looked_for}" for case, looked_for in rows.items()]
    (folder / "cases.csv").write_text("\n".join(["id,mr,labels,annotated", *lines]))
    return folder / "cases.csv"


def test_a_csv_says_where_references_lie_and_what_was_looked_for(tmp_path: Path) -> None:
    for case in "ab":
        save(block(2, 8) + block(8, 12, 2), tmp_path / "p" / f"{case}.nii.gz")
        save(block(2, 8) + (case == "b") * block(8, 12, 2), tmp_path / "d" / "drawn" / f"{case}.nii.gz")
    describe(tmp_path / "d", labels={"background": 0, "liver": 1, "lesion": 2, "ignore": 9})
    key = read_key(dataset_of_csv(tmp_path / "d", {"a": "liver", "b": ""}), tmp_path / "p")
    assert key.ignored == 9 and key.annotated == {"a": ("liver",)}
    assert read_image("a", tmp_path / "p" / "a.nii.gz", key) is not None
    found = evaluate(tmp_path / "p", tmp_path / "d" / "cases.csv", tmp_path / "s.json")
    assert [(score.case_id, score.label) for score in found.scores] == [("a", "liver"), ("b", "liver"), ("b", "lesion")]
    assert found.mean_dice == 1 and found.partly_annotated == ("a",) and not found.failed


def test_a_csv_without_labels_of_a_case_measures_the_others(tmp_path: Path) -> None:
    for case in "ab":
        save(block(2, 8), tmp_path / "p" / f"{case}.nii.gz")
    save(block(2, 8), tmp_path / "d" / "drawn" / "a.nii.gz")
    path = dataset_of_csv(tmp_path / "d", {"a": "", "b": ""})
    assert list(evaluate(tmp_path / "p", path).failed) == ["b"]  # named, and not there
    path.write_text(path.read_text().replace("drawn/b.nii.gz", ""))
    found = evaluate(tmp_path / "p", path)
    assert found.unmatched_predictions == ("b",) and not found.failed and found.mean_dice == 1
    path.write_text(path.read_text().replace("\nb,", "\na,"))
    with pytest.raises(UsageError, match="is the id of 2 cases"):
        evaluate(tmp_path / "p", path)


def test_a_label_that_is_none_was_not_looked_for(tmp_path: Path) -> None:
    save(block(2, 8), tmp_path / "p" / "a.nii.gz")
    save(block(2, 8), tmp_path / "d" / "labelsTr" / "a.nii.gz")
    describe(tmp_path / "d", labels={"background": 0, "liver": 1}, annotated={"a": ["livr"]})
    with pytest.raises(UsageError, match=r"a: was annotated with 'livr', which is no label.*'liver'"):
        evaluate(tmp_path / "p", tmp_path / "d")


def test_a_case_that_is_stored_twice_is_not_chosen_from(tmp_path: Path) -> None:
    save(block(2, 8), tmp_path / "p" / "x.nii.gz")
    for name in ("x.nii.gz", "x.nrrd"):
        save(block(2, 8), tmp_path / "r" / name)
    for sides in (("p", "r"), ("r", "p")):
        with pytest.raises(UsageError, match=r"x: is stored 2 times: x\.nii\.gz, x\.nrrd"):
            evaluate(*(tmp_path / side for side in sides))


def test_numbers_are_labels_here_when_they_are_in_training(tmp_path: Path) -> None:
    save(block(2, 8), tmp_path / "p" / "x.nii.gz")
    save(block(2, 8).astype(np.float32) * np.float32(1.0005), tmp_path / "r" / "x.nii.gz")
    assert evaluate(tmp_path / "p", tmp_path / "r").mean_dice == 1


def test_a_case_beats_the_first_channel_of_its_name(tmp_path: Path) -> None:
    save(block(2, 12), tmp_path / "p" / "x.nii.gz")
    save(block(2, 8), tmp_path / "p" / "x_0000.nii.gz")
    save(block(2, 12), tmp_path / "r" / "x.nii.gz")
    found = evaluate(tmp_path / "p", tmp_path / "r")
    assert [score.case_id for score in found.scores] == ["x"] and found.unmatched_predictions == ("x_0000",)


def test_every_case_is_found_in_whichever_form_segment_wrote_it(tmp_path: Path) -> None:
    for case, name in (("a", "labels.nii.gz"), ("b", "labels.seg.nrrd"), (".c.partial", "labels.nii.gz")):
        save(block(2, 12), tmp_path / "p" / case / name)
        save(block(2, 12), tmp_path / "r" / f"{case}.nii.gz")
    save(block(2, 6), tmp_path / "p" / "a" / "labels.seg.nrrd")  # beside NIfTI, of the same case
    found = evaluate(tmp_path / "p", tmp_path / "r")
    assert {score.case_id for score in found.scores} == {"a", "b"} and found.mean_dice == 1
    assert not found.unmatched_predictions and not found.unmatched_references


def test_reading_is_allowed_what_training_was(tmp_path: Path) -> None:
    leaning = np.diag([*SPACING, 1.0])
    leaning[0, 2] = 0.6
    for side in ("p", "r"):
        save(block(2, 12), tmp_path / side / "tilted.nii.gz", leaning)
    assert "tilted" in evaluate(tmp_path / "p", tmp_path / "r").failed
    found = evaluate(tmp_path / "p", tmp_path / "r", reading=Reading(allow=("tilt",)))
    assert not found.failed and found.mean_dice == 1


def test_what_the_other_prediction_lost_is_told(tmp_path: Path) -> None:
    for case in ("a", "b", "c"):
        save(block(2, 12), tmp_path / "r" / f"{case}.nii.gz")
        save(block(2, 12), tmp_path / "p" / f"{case}.nii.gz")
    save(block(2, 10), tmp_path / "o" / "a.nii.gz")
    (tmp_path / "o" / "b.nii.gz").write_bytes(b"torn")
    words = ["evaluate", *(str(tmp_path / side) for side in "pr"), "--out", str(tmp_path / "s.json")]
    assert main(words) == 0 and main([*words, "--against", str(tmp_path / "o")]) == 3
    said, page = json.loads((tmp_path / "s.json").read_text()), (tmp_path / "s.html").read_text()
    assert list(said["against"]["failed"]) == ["b"] and said["against"]["unmatched_references"] == ["c"]
    assert "1 of the other prediction could not be compared" in page and "1 without the other prediction: c" in page


def test_a_night_says_on_the_command_line_what_is_in_no_mean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for case in ("a", "b"):
        save(block(2, 12), tmp_path / "r" / f"{case}.nii.gz")
        save(block(2, 12), tmp_path / "p" / f"{case}.nii.gz")
    save(block(2, 12), tmp_path / "o" / "a.nii.gz")
    words = ["evaluate", *(str(tmp_path / side) for side in "pr"), "--out", str(tmp_path / "s.json"), "--allow", "tilt"]
    assert main([*words, "--against", str(tmp_path / "o")]) == 0
    assert "the other prediction: no prediction for 1 case(s): b" in capsys.readouterr().err


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


def result_of(scan: Volume, labels: dict[str, int]) -> Result:
    """A block of each label, one beside the other."""
    found = np.zeros((1, *scan.geometry.shape), np.uint8)
    for n, value in enumerate(labels.values()):
        found[0, 2 + 3 * n : 5 + 3 * n, 3:8, 2:6] = value
    return Result(
        case_id="x", scan=scan, labels=Volume(voxels=found, geometry=scan.geometry, channels=("labels",)),
        label_table=label_table(labels), package_id="0" * 64, package_name="none",
    )  # fmt: skip


def test_the_names_of_dicom_labels_are_those_of_all_files(tmp_path: Path) -> None:
    """The first file has no lesion, and no file may lose its own."""
    for case, labels in (("a", {"liver": 1}), ("b", {"liver": 1, "lesion": 2})):
        result = result_of(series(tmp_path / "d" / "imagesTr" / case), labels)
        for side in (tmp_path / "d" / "labelsTr" / case, tmp_path / "p" / case):
            side.mkdir(parents=True)
            dicom_seg.write(result, side, dicom_seg.Config())
    found = evaluate(tmp_path / "p", tmp_path / "d", tmp_path / "s.json")
    assert not found.failed and not found.left_out
    assert [(score.case_id, score.label, score.dice) for score in found.scores] == [
        ("a", "liver", 1), ("a", "lesion", None), ("b", "liver", 1), ("b", "lesion", 1),
    ]  # fmt: skip
    describe(tmp_path / "d", labels={"background": 0, "liver": 1})
    assert evaluate(tmp_path / "p", tmp_path / "d", tmp_path / "s.json").left_out == ("lesion",)
    assert "1 drawn in DICOM objects and none of the labels" in (tmp_path / "s.html").read_text()


def test_two_dicom_objects_lie_on_the_scan_that_segment_names(tmp_path: Path) -> None:
    result = result_of(series(tmp_path / "scan"), {"liver": 1})
    for side in ("p", "r"):
        (tmp_path / side / "x").mkdir(parents=True)
        dicom_seg.write(result, tmp_path / side / "x", dicom_seg.Config())
    assert "that scan was not found" in evaluate(tmp_path / "p", tmp_path / "r").failed["x"]
    (tmp_path / "p" / "x" / "report.json").write_text(json.dumps({"sources": [str(tmp_path / "scan")]}))
    assert evaluate(tmp_path / "p", tmp_path / "r").mean_dice == 1


def test_regions_are_not_measured_in_dicom_objects(tmp_path: Path) -> None:
    """The whole would be left out, and its core taken for it."""
    result = result_of(series(tmp_path / "scan"), {"whole": 1, "core": 2})
    (tmp_path / "p" / "x").mkdir(parents=True)
    dicom_seg.write(result, tmp_path / "p" / "x", dicom_seg.Config())
    save(result.labels.voxels[0], tmp_path / "d" / "labelsTr" / "x.nii.gz", result.labels.geometry.affine)
    describe(tmp_path / "d", labels={"background": 0, "whole": [1, 2], "core": [2]}, regions_class_order=[1, 2])
    assert "whole is a region" in evaluate(tmp_path / "p", tmp_path / "d").failed["x"]


def test_a_series_whose_pixels_are_the_labels_is_a_reference(tmp_path: Path) -> None:
    found = result_of(series(tmp_path / "scan"), {"liver": 1, "lesion": 2}).labels
    drawn = found.with_voxels(found.voxels.astype(np.int16))
    dicom.write_series(drawn, tmp_path / "r" / "x", description="labels", modality="CT")
    save(found.voxels[0], tmp_path / "p" / "x.nii.gz", found.geometry.affine)
    assert [score.dice for score in evaluate(tmp_path / "p", tmp_path / "r").scores] == [1, 1]


@pytest.mark.parametrize("drawn", ["references", "predictions", "both"])
def test_dicom_segmentations_and_contours_are_put_on_the_others_grid(drawn: str, tmp_path: Path) -> None:
    result = result_of(scan := series(tmp_path / "d" / "imagesTr" / "x"), {"liver": 1, "lesion": 2})
    sides = {"predictions": tmp_path / "p" / "x", "references": tmp_path / "d" / "labelsTr" / "x"}
    for side, folder in sides.items():
        folder.mkdir(parents=True)
        if drawn in (side, "both"):
            kind = dicom_seg if side == "references" else rtstruct
            kind.write(result, folder, kind.Config())
        else:
            save(result.labels.voxels[0], folder / "labels.nii.gz", scan.geometry.affine)
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
