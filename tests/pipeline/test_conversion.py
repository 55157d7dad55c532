"""`convert` reads as `segment` does and writes NIfTI with the verdict beside it: each case by itself, never over another's."""

import csv
import io
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from pipeline import convert, show
from pipeline.batch import segment
from pipeline.cli import main
from pipeline.config import Segment
from pipeline.conversion import Conversion
from pipeline.results import Batch
from preprocessing import dicom, files
from preprocessing.reading import STRICT, Reading
from preprocessing.volume import Volume

ScanFile = Callable[..., Path]
MakeScan = Callable[..., Volume]
Said = pytest.CaptureFixture[str]


def run(scans: Path | list[Path], out: Path, reading: Reading = STRICT, **how: object) -> Batch[Conversion]:
    return convert(scans if isinstance(scans, list) else [scans], out, reading, **how)


def said(case: Path) -> dict[str, object]:
    return json.loads((case / "verdict.json").read_text())


def statuses(batch: Batch[Conversion]) -> dict[str, str]:
    return {row.case_id: row.status for row in batch.rows}


def snapshot(folders: Iterable[Path]) -> dict[Path, tuple[int, bytes]]:
    found = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def test_a_series_becomes_nifti_voxel_for_voxel_with_its_verdict(make_scan: MakeScan, tmp_path: Path) -> None:
    dicom.write_series(make_scan(1), tmp_path / "in" / "series", description="sound")
    assert statuses(run(tmp_path / "in", tmp_path / "out")) == {"series": "done"}
    (series,), _ = dicom.series_in(sorted((tmp_path / "in" / "series").iterdir()))
    volume, image = dicom.read(series), nibabel.load(tmp_path / "out" / "series" / "image.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj), volume.voxels[0])
    np.testing.assert_allclose(image.affine, volume.geometry.affine, atol=1e-4)
    verdict = said(tmp_path / "out" / "series")
    assert verdict["word"] == "fine" and verdict["modality"] == "MR" and verdict["slices"] == 11
    assert verdict["grid"]["affine"] == volume.geometry.affine.tolist()
    assert len(verdict["files"]) == 11 and len(verdict["sha256"]) == 64 and verdict["hilum_version"]


def test_one_bad_case_stops_nobody_and_has_a_verdict_without_an_image(
    scan_file: ScanFile, make_scan: MakeScan, tmp_path: Path, capsys: Said
) -> None:
    root, out = tmp_path / "tree", tmp_path / "out"
    scan_file(root / "sound.nii.gz", 1)
    cut = scan_file(root / "cut.nii.gz", 2)
    cut.write_bytes(cut.read_bytes()[:500])
    dicom.write_series(make_scan(4), root / "gap", description="a slice lost")[5].unlink()
    assert main(["convert", str(root), "--out", str(out)]) == 3
    told = capsys.readouterr()
    assert "3 cases: 1 fine, 0 repaired, 2 refused" in told.err and not told.out
    assert {path.name for path in (out / "gap").iterdir()} == {"verdict.json"}
    assert {path.name for path in (out / "sound").iterdir()} == {"verdict.json", "image.nii.gz"}
    assert said(out / "gap")["reason"] == "missing_slices" and said(out / "cut")["reason"] == "damaged"
    assert said(out / "gap")["message"] and said(out / "gap")["grid"] is None and not said(out / "gap")["traceback"]
    header, *lines = csv.reader(io.StringIO((out / "summary.csv").read_text()))
    assert header[:4] == ["case", "verdict", "reason", "status"]
    assert [line[:3] for line in lines] == [
        ["cut", "refused", "damaged"], ["gap", "refused", "missing_slices"], ["sound", "fine", ""],
    ]  # fmt: skip
    summary = json.loads((out / "summary.json").read_text())
    assert summary["counts"] == {"fine": 1, "repaired": 0, "refused": 2}
    assert [case["image"] for case in summary["cases"]] == [None, None, "sound/image.nii.gz"]

    before = snapshot([out / "sound"])
    scan_file(cut, 2)
    assert statuses(run(root, out, Reading(allow=("gaps",)))) == {
        "cut": "done", "gap": "done", "sound": "skipped as complete",
    }  # fmt: skip
    assert snapshot([out / "sound"]) == before and said(out / "gap")["word"] == "repaired"


def test_convert_and_segment_say_the_same_of_a_scan(
    tiny: Path, scan_file: ScanFile, make_scan: MakeScan, tmp_path: Path
) -> None:
    root = tmp_path / "tree"
    paths = dicom.write_series(make_scan(3), root / "twice", description="a slice sent twice")
    shutil.copy(paths[4], root / "twice" / "again.dcm")
    dicom.write_series(make_scan(4), root / "gap", description="a slice lost")[5].unlink()
    run(root, tmp_path / "converted")
    segment([root], tiny, tmp_path / "segmented", Segment(outputs=("labels", "page")))
    report = json.loads((tmp_path / "segmented" / "twice" / "report.json").read_text())
    verdict = said(tmp_path / "converted" / "twice")
    assert report["verdict"] == verdict["word"] == "repaired" and report["repairs"] == verdict["repairs"]
    assert report["notes"] == verdict["notes"] and report["input_sha256"] == verdict["sha256"]
    assert report["grid"] == verdict["grid"]
    error = json.loads((tmp_path / "segmented" / "gap" / "error.json").read_text())
    assert (error["verdict"], error["reason"]) == ("refused", "missing_slices")
    assert error["message"] == said(tmp_path / "converted" / "gap")["message"]
    summary = json.loads((tmp_path / "segmented" / "summary.json").read_text())
    assert {case["case"]: case["verdict"] for case in summary["cases"]} == {"gap": "refused", "twice": "repaired"}
    assert verdict["repairs"][0] in (tmp_path / "segmented" / "twice" / "page.html").read_text()
    index = (tmp_path / "segmented" / "index.html").read_text()
    assert "<td>refused</td>" in index and verdict["repairs"][0] in index


def test_another_scan_of_the_same_name_is_never_written_over(scan_file: ScanFile, tmp_path: Path) -> None:
    scan, out = tmp_path / "a.nii.gz", tmp_path / "out"
    run(scan_file(scan, 0), out)
    before = snapshot([out / "a"])
    (failed,) = run(scan_file(scan, 1), out).failed
    assert "another scan" in failed.message and before.items() <= snapshot([out / "a"]).items()
    assert statuses(run(scan_file(scan, 0), out)) == {"a": "skipped as complete"}
    assert snapshot([out / "a"]) == before, "the error is gone with its reason"


def test_a_folder_that_holds_something_else_is_never_replaced(scan_file: ScanFile, tmp_path: Path) -> None:
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "a" / "thesis.docx").write_text("the only copy")
    (failed,) = run(scan_file(tmp_path / "a.nii.gz"), tmp_path / "out").failed
    assert "no result of hilum" in failed.message
    assert (tmp_path / "out" / "a" / "thesis.docx").read_text() == "the only copy"


def test_what_was_repaired_is_done_again_when_other_things_are_allowed(make_scan: MakeScan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    dicom.write_series(make_scan(4), tmp_path / "gap", description="a slice lost")[5].unlink()
    assert statuses(run(tmp_path / "gap", out, Reading(allow=("gaps",)))) == {"gap": "done"}
    assert statuses(run(tmp_path / "gap", out, Reading(allow=("gaps",)))) == {"gap": "skipped as complete"}
    before = snapshot([out / "gap"])
    assert statuses(run(tmp_path / "gap", out)) == {"gap": "failed"}
    assert before.items() <= snapshot([out / "gap"]).items(), "the image stays; error.json says why there is no new one"
    assert json.loads((out / "gap" / "error.json").read_text())["reason"] == "missing_slices"


def test_a_damaged_verdict_or_a_lost_image_is_no_complete_case(scan_file: ScanFile, tmp_path: Path) -> None:
    scan, out = scan_file(tmp_path / "a.nii.gz"), tmp_path / "out"
    run(scan, out)
    (out / "a" / "image.nii.gz").unlink()
    assert statuses(run(scan, out)) == {"a": "done"}
    (out / "a" / "verdict.json").write_text("{")
    (failed,) = run(scan, out).failed
    assert "Delete it and convert the case again" in failed.message and (out / "a" / "image.nii.gz").exists()


def test_converted_scans_are_scans_when_their_folder_is_named_and_no_twins_in_a_tree(
    scan_file: ScanFile, tmp_path: Path
) -> None:
    root = scan_file(tmp_path / "tree" / "a.nii.gz").parent
    run(root, root / "nifti")
    assert list(statuses(run(root / "nifti", tmp_path / "again"))) == ["a"]
    again = run(root, tmp_path / "third")
    assert list(statuses(again)) == ["a"]
    assert str(root / "nifti" / "a") in json.loads((tmp_path / "third" / "summary.json").read_text())["left_alone"]


def test_channels_become_one_image_of_several(make_scan: MakeScan, tmp_path: Path) -> None:
    image = make_scan(1, channels=2)
    for number, name in enumerate(("t1", "t2")):
        files.write(
            image.with_voxels(image.voxels[number : number + 1], channels=("0",)),
            tmp_path / "in" / "p" / f"{name}.nii.gz",
        )
    assert list(statuses(run(tmp_path / "in", tmp_path / "out", channels=("t2", "t1")))) == ["p"]
    written = np.asarray(nibabel.load(tmp_path / "out" / "p" / "image.nii.gz").dataobj)
    np.testing.assert_array_equal(np.moveaxis(written, -1, 0), image.voxels[::-1])
    assert said(tmp_path / "out" / "p")["channels"] == ["t2", "t1"]


def test_a_name_that_is_no_unicode_stops_nobody(scan_file: ScanFile, tmp_path: Path) -> None:
    scan_file(tmp_path / "tree" / "a.nii.gz", 1)
    (tmp_path / "tree" / "caf\udce9.txt").write_text("latin-1")
    shutil.copy(tmp_path / "tree" / "a.nii.gz", tmp_path / "tree" / "caf\udce9.nii.gz")
    batch = run(tmp_path / "tree", tmp_path / "out")
    assert not batch.failed and len(batch.rows) == 2
    json.loads((tmp_path / "out" / "summary.json").read_text())


def test_a_verdict_can_be_shown(make_scan: MakeScan, tmp_path: Path) -> None:
    paths = dicom.write_series(make_scan(3), tmp_path / "in" / "twice", description="a slice sent twice")
    shutil.copy(paths[4], tmp_path / "in" / "twice" / "again.dcm")
    dicom.write_series(make_scan(4), tmp_path / "in" / "gap", description="a slice lost")[5].unlink()
    run(tmp_path / "in", tmp_path / "out")
    shown = show(tmp_path / "out" / "twice")
    assert shown == show(tmp_path / "out" / "twice" / "verdict.json")
    assert shown.startswith("twice: repaired. MR, 14×18×11 voxels") and "  repaired: " in shown
    assert "missing_slices: " in show(tmp_path / "out" / "gap")
