"""Many scans: each by itself, on its own grid, once; what fails says why and stops nobody, not even when killed."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
import torch
from torch import nn

from pipeline import results
from pipeline.batch import Batch, find_scans, open_package, segment
from pipeline.cli import main
from pipeline.config import Segment
from pipeline.errors import PackageError, UsageError
from pipeline.outputs import UnknownOutput
from pipeline.package import ModelPackage
from pipeline.report import Memory, Report
from pipeline.segmentation import read_scan
from preprocessing import dicom, files
from preprocessing.records import BadRecord
from preprocessing.volume import Geometry, Volume

REPOSITORY = Path(__file__).resolve().parents[2]
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
LABELS_ALONE = Segment(outputs=("labels",))

ScanFile = Callable[..., Path]
MakeScan = Callable[..., Volume]


def run(scans: Path | list[Path], package: Path, out: Path, settings: Segment = LABELS_ALONE) -> Batch:
    return segment(scans if isinstance(scans, list) else [scans], package, out, settings)


def read_error(folder: Path) -> dict[str, str]:
    return json.loads((folder / "error.json").read_text())


def statuses(batch: Batch) -> dict[str, str]:
    return {row.case_id: row.status for row in batch.rows}


def snapshot(folders: Iterable[Path]) -> dict[Path, tuple[int, bytes]]:
    """Every file below, with when it was written and what it holds."""
    found = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def complete_cases(out: Path) -> list[Path]:
    return sorted(path.parent for path in out.glob("[!.]*/report.json"))


def as_simpleitk_reads(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels [column row slice] and the affine to RAS of the one series in a folder."""
    (uid,) = SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    image = SimpleITK.ReadImage(SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid))
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return SimpleITK.GetArrayFromImage(image).T, LPS_TO_RAS @ affine


def truncate(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def test_one_broken_file_of_five_fails_alone_and_the_rest_is_never_done_twice(
    tiny: Path, scan_file: ScanFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scans, out = tmp_path / "scans", tmp_path / "out"
    for seed in range(5):
        scan_file(scans / f"case{seed}.nii.gz", seed)
    truncate(scans / "case2.nii.gz")
    words = ["segment", str(scans), "--package", str(tiny), "--out", str(out), "--device", "cpu"]

    assert main(words) == 3
    told = capsys.readouterr()
    assert "case2" in told.err and "truncated" in told.err and told.out == ""
    done = [out / f"case{seed}" for seed in (0, 1, 3, 4)]
    assert complete_cases(out) == done
    assert {path.name for path in done[0].iterdir()} == {
        "labels.nii.gz", "overlay.png", "measurements.json", "page.html", "report.json",
    }  # fmt: skip
    assert [path.name for path in (out / "case2").iterdir()] == ["error.json"]
    error = read_error(out / "case2")
    assert error["error"] == "UnreadableScan" and "truncated" in error["message"] and "traceback" not in error
    summary = json.loads((out / "summary.json").read_text())
    assert summary["counts"] == {"done": 4, "failed": 1}
    assert (out / "summary.csv").read_text().count("\n") == 6 and "case2" in (out / "index.html").read_text()

    before, tried = snapshot(done), (out / "case2" / "error.json").stat().st_mtime_ns
    assert main(words) == 3
    assert snapshot(done) == before
    assert (out / "case2" / "error.json").stat().st_mtime_ns > tried, "a failed case is tried again"

    scan_file(scans / "case2.nii.gz", 2)
    assert main(words) == 0
    assert snapshot(done) == before
    assert (out / "case2" / "labels.nii.gz").exists() and not (out / "case2" / "error.json").exists()


def test_a_second_run_loads_no_network_when_nothing_is_left_to_do(
    tiny: Path, scan_file: ScanFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = scan_file(tmp_path / "a.nii.gz")
    run(scan, tiny, tmp_path / "out")

    def refuse(package: ModelPackage) -> list[nn.Module]:
        raise AssertionError("no case needs a network")

    monkeypatch.setattr(ModelPackage, "networks", refuse)
    assert statuses(run(scan, tiny, tmp_path / "out")) == {"a": "skipped as complete"}


def test_a_dicom_result_of_a_scan_that_has_no_patient_is_refused_before_anything_is_computed(
    tiny: Path, scan_file: ScanFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute(*_: object) -> None:
        raise AssertionError("nothing was to be computed")

    monkeypatch.setattr("pipeline.segmentation.segment_volume", compute)
    scan = scan_file(tmp_path / "a.nii.gz")
    batch = segment([scan], tiny, tmp_path / "out", Segment(outputs=("labels", "dicom_seg"), device="cpu"))
    error = read_error(tmp_path / "out" / "a")
    assert statuses(batch) == {"a": "failed"} and error["reason"] == "unsupported"
    assert "cannot be invented" in error["message"]


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_labels_lie_on_exactly_the_grid_of_a_scan_file(
    tiny: Path, scan_file: ScanFile, tmp_path: Path, ending: str
) -> None:
    scan = scan_file(tmp_path / f"scan{ending}", seed=3)
    assert not run(scan, tiny, tmp_path / "out").failed
    labels = nibabel.load(tmp_path / "out" / "scan" / "labels.nii.gz")
    reference = SimpleITK.ReadImage(str(scan))
    again = SimpleITK.ReadImage(str(tmp_path / "out" / "scan" / "labels.nii.gz"))
    assert labels.shape == reference.GetSize()
    assert set(np.unique(np.asarray(labels.dataobj))) <= {0, 1, 7}
    for get in ("GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(again, get)(), getattr(reference, get)(), atol=1e-4)
    if ending.startswith(".nii"):
        np.testing.assert_array_equal(labels.affine, nibabel.load(scan).affine)


def test_labels_of_a_dicom_series_lie_where_simpleitk_says_the_series_lies(
    tiny: Path, make_scan: MakeScan, tmp_path: Path
) -> None:
    series = tmp_path / "series"
    dicom.write_series(make_scan(5), series, description="made up")
    assert not run(series, tiny, tmp_path / "out").failed
    voxels, affine = as_simpleitk_reads(series)
    labels = nibabel.load(tmp_path / "out" / "series" / "labels.nii.gz")
    assert labels.shape == voxels.shape
    np.testing.assert_allclose(labels.affine, affine, atol=1e-4)
    (scan,) = find_scans([series], ("mr",), tmp_path / "out").scans
    np.testing.assert_array_equal(read_scan(scan, ("mr",)).voxels[0], voxels)


def test_labels_of_every_real_hippocampus_series_lie_where_simpleitk_says(
    shared: Path, tiny: Path, tmp_path: Path
) -> None:
    root = shared / "data" / "hippocampus-dicom"
    found = find_scans([root], ("mr",), tmp_path / "out").scans
    assert len(found) == 3
    assert not run(root, tiny, tmp_path / "out").failed
    for scan in found:
        voxels, affine = as_simpleitk_reads(scan.series[0].paths[0].parent)
        labels = nibabel.load(tmp_path / "out" / scan.case_id / "labels.nii.gz")
        assert labels.shape == voxels.shape
        np.testing.assert_allclose(labels.affine, affine, atol=1e-4)
        np.testing.assert_array_equal(read_scan(scan, ("mr",)).voxels[0], voxels)


@pytest.mark.slow
def test_every_real_brain_series_is_read_as_simpleitk_reads_it(shared: Path, tmp_path: Path) -> None:
    root = shared / "data" / "brain-tumor-progression"
    folders = {path.parent for path in root.rglob("*.dcm")}
    found = find_scans([root], ("mr",), tmp_path / "out").scans
    assert {scan.series[0].paths[0].parent for scan in found} == folders and len(found) == len(folders)
    for scan in found:
        volume = read_scan(scan, ("mr",))
        voxels, affine = as_simpleitk_reads(scan.series[0].paths[0].parent)
        np.testing.assert_array_equal(volume.voxels[0], voxels)
        np.testing.assert_allclose(volume.geometry.affine, affine, atol=1e-4)


def test_a_scan_of_much_coarser_voxels_is_warned_of(tiny: Path, make_scan: MakeScan, tmp_path: Path) -> None:
    scan = make_scan(1)
    coarse = Geometry(shape=scan.geometry.shape, affine=scan.geometry.affine @ np.diag([4.0, 4.0, 4.0, 1.0]))
    files.write(scan.with_voxels(scan.voxels, coarse), tmp_path / "coarse.nii.gz")
    (row,) = run(tmp_path / "coarse.nii.gz", tiny, tmp_path / "out").rows
    assert row.report is not None
    (warning,) = [said for said in row.report.warnings if "twofold" in said]
    assert warning.startswith("its voxels of 7.6×8.4×12.8 mm differ over twofold from the ")
    assert warning.endswith(" mm it was trained on")


def test_a_mixed_tree_gives_every_scan_once_and_names_what_was_left_alone(
    tiny: Path, scan_file: ScanFile, make_scan: MakeScan, tmp_path: Path
) -> None:
    tree, out = tmp_path / "tree", tmp_path / "out"
    scan_file(tree / "a.nii.gz", 0)
    scan_file(tree / "B.NII.GZ", 1)
    scan_file(tree / "deep" / "er" / "c.nrrd", 2)
    scan_file(tree / ".hidden" / "d.nii.gz", 3)
    dicom.write_series(make_scan(4), tree / "series", description="one")
    dicom.write_series(make_scan(5), tree / "both", description="first of two")
    for path in dicom.write_series(make_scan(6), tmp_path / "second", description="second of two"):
        path.rename(tree / "both" / f"x{path.name}")
    (tree / "notes.txt").write_text("call back on Monday")
    (tree / "series" / "thumbs.db").write_bytes(b"junk")

    batch = run(tree, tiny, out)
    names = list(statuses(batch))
    assert not batch.failed and len(names) == len(set(names)) == 6
    assert {"a", "B", "deep_er_c", "series"} <= set(names)
    assert sum(name.startswith("both-") for name in names) == 2
    left_alone = json.loads((out / "summary.json").read_text())["left_alone"]
    assert {Path(file).name for file in left_alone} == {"notes.txt", "thumbs.db"} and all(left_alone.values())


def test_a_scan_named_twice_is_done_once_and_keeps_its_name(tiny: Path, scan_file: ScanFile, tmp_path: Path) -> None:
    scan = scan_file(tmp_path / "scans" / "a.nii.gz")
    assert list(statuses(run([scan, scan, scan.parent], tiny, tmp_path / "out"))) == ["a"]


def test_two_scans_of_one_name_keep_both_and_their_names_at_the_second_run(
    tiny: Path, scan_file: ScanFile, tmp_path: Path
) -> None:
    scans = [scan_file(tmp_path / place / "a.nii.gz", seed) for seed, place in enumerate(("one", "two"))]
    first = run(scans, tiny, tmp_path / "out")
    assert len(statuses(first)) == 2 and all(name.startswith("a-") for name in statuses(first))
    again = run(scans[::-1], tiny, tmp_path / "out")
    assert statuses(again) == dict.fromkeys(statuses(first), "skipped as complete")


def write_by_folder(image: Volume, place: Path, names: tuple[str, ...] = ("t1", "t2")) -> None:
    for name, channel in zip(names, split_channels(image), strict=True):
        files.write(channel, place / "patient" / f"{name}.nii.gz")


def write_by_series(image: Volume, place: Path) -> None:
    for name, channel in zip(("t1", "T2"), split_channels(image), strict=True):
        dicom.write_series(channel, place / "patient" / name, description=name, study="one visit")


def write_numbered(image: Volume, place: Path) -> None:
    for number, channel in enumerate(split_channels(image)):
        files.write(channel, place / f"patient_{number:04d}.nii.gz")


def write_one_file(image: Volume, place: Path) -> None:
    files.write(image, place / "patient.nii.gz")


def split_channels(image: Volume) -> list[Volume]:
    return [image.with_voxels(image.voxels[n : n + 1], channels=("0",)) for n in range(len(image.channels))]


@pytest.mark.parametrize("write", [write_by_folder, write_by_series, write_numbered, write_one_file])
def test_channels_come_together_by_name_in_the_packages_order(
    tiny_pair: Path, make_scan: MakeScan, tmp_path: Path, write: Callable[[Volume, Path], None]
) -> None:
    image = make_scan(1, channels=2)
    write(image, tmp_path / "tree")
    files.write(make_scan(2), tmp_path / "tree" / "other" / "t1.nii.gz")
    (scan,) = (s for s in find_scans([tmp_path / "tree"], ("t1", "t2"), tmp_path).scans if s.case_id == "patient")
    read = read_scan(scan, ("t1", "t2"))
    np.testing.assert_array_equal(read.voxels, image.voxels)
    batch = run(tmp_path / "tree", tiny_pair, tmp_path / "out")
    assert statuses(batch) == {"patient": "done", "other_t1": "failed"}


def test_a_missing_channel_is_a_failed_case_that_names_what_is_needed(
    tiny_pair: Path, make_scan: MakeScan, tmp_path: Path
) -> None:
    write_by_folder(make_scan(1, channels=2), tmp_path / "tree")
    files.write(make_scan(2), tmp_path / "tree" / "poor" / "t1.nii.gz")
    batch = run(tmp_path / "tree", tiny_pair, tmp_path / "out")
    (failed,) = batch.failed
    assert statuses(batch)["patient"] == "done"
    assert "1 channel" in failed.message and "t1, t2" in failed.message
    assert read_error(tmp_path / "out" / failed.case_id)["error"] == "MissingChannel"


def test_channels_on_two_grids_are_refused_not_resampled(tiny_pair: Path, make_scan: MakeScan, tmp_path: Path) -> None:
    for seed, name in enumerate(("t1", "t2")):
        files.write(make_scan(seed), tmp_path / "tree" / "patient" / f"{name}.nii.gz")
    (failed,) = run(tmp_path / "tree", tiny_pair, tmp_path / "out").failed
    assert "grid" in failed.message


def test_a_result_of_another_scan_of_the_same_name_is_never_written_over(
    tiny: Path, scan_file: ScanFile, tmp_path: Path
) -> None:
    scan, out = tmp_path / "a.nii.gz", tmp_path / "out"
    run(scan_file(scan, 0), tiny, out)
    before = snapshot([out / "a"])
    (failed,) = run(scan_file(scan, 1), tiny, out).failed
    assert "another scan" in failed.message
    assert before.items() <= snapshot([out / "a"]).items()

    assert statuses(run(scan_file(scan, 0), tiny, out)) == {"a": "skipped as complete"}
    assert snapshot([out / "a"]) == before, "the error is gone with its reason"


def test_a_result_of_another_package_is_never_written_over(
    tiny: Path, make_package: Callable[..., ModelPackage], scan_file: ScanFile, tmp_path: Path
) -> None:
    scan, out = scan_file(tmp_path / "a.nii.gz"), tmp_path / "out"
    run(scan, tiny, out)
    before = snapshot([out / "a"])
    (failed,) = run(scan, make_package(tmp_path / "other", fold=1).folder, out).failed
    assert "another package" in failed.message
    assert before.items() <= snapshot([out / "a"]).items()


def test_an_output_asked_for_later_does_the_case_again(tiny: Path, scan_file: ScanFile, tmp_path: Path) -> None:
    scan, out = scan_file(tmp_path / "a.nii.gz"), tmp_path / "out"
    run(scan, tiny, out)
    labels = (out / "a" / "labels.nii.gz").read_bytes()
    batch = run(scan, tiny, out, Segment(outputs=("labels", "measurements")))
    assert statuses(batch) == {"a": "done"} and (out / "a" / "measurements.json").exists()
    assert (out / "a" / "labels.nii.gz").read_bytes() == labels, "the same scan, the same bytes"


@pytest.mark.parametrize("lost", ["labels.nii.gz", "report.json"])
def test_a_case_that_lost_a_file_is_not_complete(tiny: Path, scan_file: ScanFile, tmp_path: Path, lost: str) -> None:
    scan, out = scan_file(tmp_path / "a.nii.gz"), tmp_path / "out"
    run(scan, tiny, out)
    (out / "a" / lost).unlink()
    batch = run(scan, tiny, out)
    if lost == "report.json":  # nothing says any more whose labels these are
        assert statuses(batch) == {"a": "failed"} and (out / "a" / "labels.nii.gz").exists()
    else:
        assert statuses(batch) == {"a": "done"} and (out / "a" / lost).exists()


def test_a_damaged_report_stops_its_own_case_alone(tiny: Path, scan_file: ScanFile, tmp_path: Path) -> None:
    scans, out = tmp_path / "scans", tmp_path / "out"
    for seed, name in enumerate("abc"):
        scan_file(scans / f"{name}.nii.gz", seed)
    run(scans, tiny, out)
    for name in "bc":
        truncate(out / name / "report.json")
    batch = run([scans / "a.nii.gz", scans / "b.nii.gz"], tiny, out)
    assert statuses(batch) == {"a": "skipped as complete", "b": "failed"}
    assert "segment the case again" in batch.failed[0].message


def test_a_folder_that_holds_something_else_is_never_replaced(
    tiny: Path, scan_file: ScanFile, make_scan: MakeScan, tmp_path: Path
) -> None:
    dicom.write_series(make_scan(), tmp_path / "scans" / "patient", description="the only copy")
    before = snapshot([tmp_path / "scans"])
    with pytest.raises(UsageError, match="both the input and --out"):
        run(tmp_path / "scans", tiny, tmp_path / "scans")
    (failed,) = run(tmp_path / "scans" / "patient", tiny, tmp_path / "scans").failed
    assert "no result of hilum" in failed.message
    assert before.items() <= snapshot([tmp_path / "scans"]).items()


def test_results_inside_the_input_tree_are_no_input(tiny: Path, scan_file: ScanFile, tmp_path: Path) -> None:
    scan_file(tmp_path / "tree" / "a.nii.gz")
    for status in ("done", "skipped as complete"):
        assert statuses(run(tmp_path / "tree", tiny, tmp_path / "tree" / "out")) == {"a": status}


@pytest.mark.parametrize("damage", ["header", "pixels", "gone"])
def test_a_series_with_a_damaged_or_missing_slice_is_refused(
    tiny: Path, make_scan: MakeScan, scan_file: ScanFile, tmp_path: Path, damage: str
) -> None:
    paths = dicom.write_series(make_scan(1), tmp_path / "tree" / "series", description="eleven slices")
    scan_file(tmp_path / "tree" / "sound.nii.gz")
    whole = paths[-1].read_bytes()
    damages: dict[str, Callable[[Path], object]] = {
        "header": lambda path: path.write_bytes(whole[:180]),
        "pixels": lambda path: path.write_bytes(whole[:-100]),
        "gone": lambda path: paths[4].unlink(),
    }
    damages[damage](paths[-1])
    batch = run(tmp_path / "tree", tiny, tmp_path / "out")
    assert statuses(batch) == {"series": "failed", "sound": "done"}
    assert read_error(tmp_path / "out" / "series")["error"] == "UnreadableScan"


def test_the_summary_is_of_the_folder_not_of_the_command(tiny: Path, scan_file: ScanFile, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(scan_file(tmp_path / "a.nii.gz", 0), tiny, out)
    batch = run(scan_file(tmp_path / "b.nii.gz", 1), tiny, out)
    assert statuses(batch) == {"a": "from an earlier run", "b": "done"}
    assert [case["case"] for case in json.loads((out / "summary.json").read_text())["cases"]] == ["a", "b"]


class Stumbles:
    """An engine that finds nothing, and fails in the second case it sees."""

    device, words = torch.device("cpu"), "made up"

    def __init__(self, windows_per_case: int) -> None:
        self.seen, self.windows = 0, windows_per_case

    def __call__(self, window: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        if self.seen == self.windows + 1:
            raise RuntimeError("out of memory")
        return torch.zeros(len(window), 3, *window.shape[2:])


def test_a_network_that_fails_in_one_case_is_our_fault_and_that_cases_alone(
    tiny: Path, scan_file: ScanFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Stumbles(10**9)
    monkeypatch.setattr("pipeline.segmentation.open_engines", lambda package, how: (counting,))
    run(scan_file(tmp_path / "first.nii.gz"), tiny, tmp_path / "out")
    for seed, name in enumerate("abc"):
        scan_file(tmp_path / "scans" / f"{name}.nii.gz", seed)
    stumbling = Stumbles(counting.seen)
    monkeypatch.setattr("pipeline.segmentation.open_engines", lambda package, how: (stumbling,))
    batch = run(tmp_path / "scans", tiny, tmp_path / "out")
    assert statuses(batch) == {"first": "from an earlier run", "a": "done", "b": "failed", "c": "done"}
    error = read_error(tmp_path / "out" / "b")
    assert "hilum itself failed" in error["message"] and "out of memory" in error["traceback"]
    assert "nothing was found" in Report.read(tmp_path / "out" / "c").warnings[0]


def test_options_reach_their_outputs(tiny: Path, scan_file: ScanFile, tmp_path: Path) -> None:
    scan = scan_file(tmp_path / "a.nii.gz")
    pictures = []
    for window in ([100, 50], [300, 1000]):
        out = tmp_path / f"out{window[0]}"
        run(scan, tiny, out, Segment(outputs=("overlay",), output_options={"overlay": {"window": window}}))
        pictures.append((out / "a" / "overlay.png").read_bytes())
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize(
    "settings, error, words",
    [
        (Segment(outputs=("lables",)), UnknownOutput, "'labels'"),
        (Segment(output_options={"overlay": {"windw": [1, 2]}}), BadRecord, "'window'"),
        (Segment(output_options={"overlays": {}}), UsageError, "'overlay'"),
        (Segment(overlap=1.5), UsageError, "below 1"),
        (Segment(device="gpu7"), UsageError, "auto, cpu or cuda"),
    ],
)
def test_a_mistake_in_the_settings_is_told_before_any_work(
    tiny: Path, scan_file: ScanFile, tmp_path: Path, settings: Segment, error: type[Exception], words: str
) -> None:
    scan = scan_file(tmp_path / "a.nii.gz")
    with pytest.raises(error, match=words):
        run(scan, tiny, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


def test_no_scan_at_all_is_told_with_the_reasons(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "notes.txt").write_text("nothing here")
    with pytest.raises(UsageError, match=r"no scan was found.*\n.*notes.txt: not DICOM"):
        run(tmp_path / "tree", tiny, tmp_path / "out")
    with pytest.raises(UsageError, match="does not exist"):
        run(tmp_path / "nowhere", tiny, tmp_path / "out")


def test_a_folder_that_is_no_package_is_told_before_any_work(tmp_path: Path, scan_file: ScanFile) -> None:
    with pytest.raises(PackageError, match="hilum train"):
        run(scan_file(tmp_path / "a.nii.gz"), tmp_path, tmp_path / "out")
    with pytest.raises(PackageError):
        open_package(tmp_path / "nowhere")


def test_a_second_process_on_the_same_folder_is_refused(tiny: Path, scan_file: ScanFile, tmp_path: Path) -> None:
    scan, out = scan_file(tmp_path / "a.nii.gz"), tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another hilum writes"):
            run(scan, tiny, out)
    assert statuses(run(scan, tiny, out)) == {"a": "done"}


def test_a_kill_between_the_two_renames_of_a_swap_loses_nothing(
    tiny: Path, scan_file: ScanFile, tmp_path: Path
) -> None:
    scan, out = scan_file(tmp_path / "a.nii.gz"), tmp_path / "out"
    run(scan, tiny, out)
    before = {path.name: state for path, state in snapshot([out / "a"]).items()}
    (out / "a").rename(out / ".a.retired")
    (out / ".a.partial").mkdir()
    assert statuses(run(scan, tiny, out)) == {"a": "skipped as complete"}
    assert {path.name: state for path, state in snapshot([out / "a"]).items()} == before
    assert not (out / ".a.partial").exists()


def begin(scans: Path, package: Path, out: Path) -> subprocess.Popen[str]:
    """The command in a process of its own, slow enough to be caught at work."""
    # a test run in the background passes on that SIGINT is ignored; a terminal does not
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import pipeline.__main__"
    words = ["segment", scans, "--package", package, "--out", out, "--flips", "--overlap", "0.7", "--device", "cpu"]
    words += ["--outputs", "labels,measurements"]
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)], cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_until(met: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not met():
        assert process.poll() is None, (
            f"it ended before it could be stopped: {process.stderr and process.stderr.read()}"
        )
        assert time.monotonic() < deadline
        time.sleep(0.002)


def six_scans(make_scan: MakeScan, folder: Path) -> Path:
    for seed in range(6):
        files.write(make_scan(seed, shape=(22, 24, 18)), folder / f"case{seed}.nii.gz")
    return folder


@pytest.mark.slow
def test_a_night_that_is_killed_again_and_again_ends_as_an_undisturbed_one() -> None:
    """The script checks: identical files, a reason for every bad scan, nothing done twice but what was in hand."""
    done = subprocess.run(
        [sys.executable, "benchmarks/night.py", "--quick"], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["identical"], told["failed"], told["done twice"]) == (33, 5, 0), "11 cases of 3 files"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_stopped_it_says_so_and_the_same_command_goes_on(
    tiny: Path, make_scan: MakeScan, tmp_path: Path, number: signal.Signals
) -> None:
    scans, out = six_scans(make_scan, tmp_path / "scans"), tmp_path / "out"
    process = begin(scans, tiny, out)
    wait_until(lambda: complete_cases(out), process)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "complete" in told and "Traceback" not in told
    done = json.loads((out / "summary.json").read_text())["counts"]["done"]
    assert 0 < done == len(complete_cases(out)) < 6
    kept = snapshot(complete_cases(out))
    batch = run(scans, tiny, out, Segment(outputs=("labels", "measurements")))
    assert len(batch.rows) == 6 and not batch.failed and kept.items() <= snapshot(complete_cases(out)).items()


def test_results_of_an_earlier_run_inside_the_tree_are_no_scans(
    tiny: Path, scan_file: ScanFile, tmp_path: Path
) -> None:
    scans = scan_file(tmp_path / "scans" / "a.nii.gz").parent
    run(scans, tiny, scans / "monday")
    assert statuses(run(scans, tiny, scans / "tuesday")) == {"a": "done"}


def test_changed_voxels_beside_a_header_are_another_scan(tiny: Path, make_scan: MakeScan, tmp_path: Path) -> None:
    files.write(make_scan(1), tmp_path / "whole.mha")
    header = tmp_path / "in" / "a.mhd"
    header.parent.mkdir()
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(tmp_path / "whole.mha")), str(header))
    assert statuses(run(header, tiny, tmp_path / "out")) == {"a": "done"}
    voxels = header.with_suffix(".raw")
    voxels.write_bytes(voxels.read_bytes()[::-1])
    assert statuses(run(header, tiny, tmp_path / "out")) == {"a": "failed"}, "never taken for the scan done before"


def test_one_slice_stands_for_its_whole_series_and_no_other(tiny: Path, make_scan: MakeScan, tmp_path: Path) -> None:
    paths = dicom.write_series(make_scan(1), tmp_path / "series", description="one")
    other = dicom.write_series(make_scan(2), tmp_path / "other", description="two")
    shutil.copy(other[0], tmp_path / "series" / "stray.dcm")
    (found,) = find_scans([paths[3]], ("mr",), tmp_path / "out").scans
    assert sorted(found.series[0].paths) == sorted(paths)


def test_a_scan_that_cannot_be_opened_any_more_stops_nobody(
    tiny: Path, scan_file: ScanFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share that is not mounted tonight, say: found by name, and gone when it is opened."""
    scans = scan_file(tmp_path / "scans" / "a.nii.gz", seed=1).parent
    scan_file(scans / "b.nii.gz", seed=2)
    run(scans, tiny, tmp_path / "out")
    really = files.sha256

    def denied(paths: Iterable[Path]) -> str:
        paths = list(paths)
        if paths[0].name == "a.nii.gz":
            raise PermissionError(13, "Permission denied", str(paths[0]))
        return really(paths)

    monkeypatch.setattr(files, "sha256", denied)
    again = run(scans, tiny, tmp_path / "out")
    assert statuses(again) == {"a": "failed", "b": "skipped as complete"}
    assert "Permission denied" in read_error(tmp_path / "out" / "a")["message"]
    assert (tmp_path / "out" / "a" / "report.json").exists(), "what was found before is kept"


# several cases at once


def test_read_ahead_and_written_behind_a_case_is_what_it_is_alone(
    tiny: Path, scan_file: ScanFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans = tmp_path / "scans"
    for seed in range(5):
        scan_file(scans / f"case{seed}.nii.gz", seed)
    truncate(scans / "case2.nii.gz")
    settings = Segment(outputs=("labels", "measurements"))
    together = run(scans, tiny, tmp_path / "together", settings)
    monkeypatch.setattr(results, "handed_on", results.one_by_one)
    alone = run(scans, tiny, tmp_path / "alone", settings)
    assert statuses(together) == statuses(alone)
    assert told_by(tmp_path / "together") == told_by(tmp_path / "alone")


def told_by(out: Path) -> dict[str, object]:
    """All that stands in the folders of cases, but for how long it took and what memory the process had."""
    said: dict[str, object] = {}
    for file in out.glob("[!.]*/*"):
        said[f"{file.parent.name}/{file.name}"] = file.read_bytes()
        if file.name == "report.json":
            report = json.loads(file.read_text())
            said[f"{file.parent.name}/{file.name}"] = {
                name: (value and value | {"peak": None}) if name == "memory" else value
                for name, value in report.items() if name != "seconds"
            }  # fmt: skip
    return said


def summary(out: Path) -> dict[str, str]:
    return {case["case"]: case["status"] for case in json.loads((out / "summary.json").read_text())["cases"]}


def test_shards_one_after_the_other_fill_a_folder_as_one_run_would(
    tiny: Path, scan_file: ScanFile, tmp_path: Path
) -> None:
    scans, out = tmp_path / "scans", tmp_path / "out"
    for seed in range(5):
        scan_file(scans / f"case{seed}.nii.gz", seed)
    truncate(scans / "case1.nii.gz")
    run(scans, tiny, tmp_path / "whole")

    first = run(scans, tiny, out, replace(LABELS_ALONE, shard="1/2"))
    assert statuses(first) == {"case0": "done", "case2": "done", "case4": "done"}
    assert summary(out) == statuses(first) | {"case1": "not done yet", "case3": "not done yet"}
    second = run(scans, tiny, out, replace(LABELS_ALONE, shard="2/2"))
    assert statuses(second) == {"case1": "failed", "case3": "done"}
    assert summary(out) == statuses(second) | {f"case{n}": "done elsewhere" for n in (0, 2, 4)}
    assert told_by(out) == told_by(tmp_path / "whole")
    again = run(scans, tiny, out, replace(LABELS_ALONE, shard="1/2"))
    assert set(statuses(again).values()) == {"skipped as complete"}
    failed = next(case for case in json.loads((out / "summary.json").read_text())["cases"] if case["case"] == "case1")
    assert failed["status"] == "failed" and failed["error"]["reason"] == "damaged", "as the other shard said"
    assert {path.name for path in out.glob(".*")} == {".lock"}


def test_a_case_in_other_hands_is_left_to_them_and_taken_up_when_they_are_dead(
    tiny: Path, scan_file: ScanFile, tmp_path: Path
) -> None:
    scans, out = tmp_path / "scans", tmp_path / "out"
    for seed, name in enumerate("ab"):
        scan_file(scans / f"{name}.nii.gz", seed)
    out.mkdir()
    code = (
        "import sys; from pathlib import Path; from pipeline.claims import at_work\n"
        f"with at_work(Path({str(out)!r}), shared=True) as claims:\n"
        "    claims.take('a'); print('there', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout and other.stdout.readline() == "there\n"
    shared = replace(LABELS_ALONE, shard="1/1")
    assert statuses(run(scans, tiny, out, shared)) == {"a": "in other hands", "b": "done"}
    assert not (out / "a").exists()
    other.kill()
    other.communicate()
    assert statuses(run(scans, tiny, out, shared)) == {"a": "done", "b": "skipped as complete"}


@pytest.mark.slow
def test_one_case_is_never_done_by_two_processes_at_once(tiny: Path, scan_file: ScanFile, tmp_path: Path) -> None:
    """The same shard twice, as a scheduler starts a task again that it takes for dead."""
    scans, out = tmp_path / "scans", tmp_path / "out"
    for seed in range(6):
        scan_file(scans / f"case{seed}.nii.gz", seed)
    words = [scans, "--package", tiny, "--out", out, "--outputs", "labels", "--device", "cpu", "--shard", "1/1"]
    code = "import pipeline.__main__"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, "segment", *map(str, words), "--progress", "lines"], cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    told = [process.communicate(timeout=200)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    events = [json.loads(line) for said in told for line in said.splitlines() if line.startswith("{")]
    done = [event["case"] for event in events if event["event"] == "case" and event["status"] == "done"]
    assert sorted(done) == [f"case{seed}" for seed in range(6)], "each once"
    assert set(summary(out).values()) <= {"done", "done elsewhere", "skipped as complete"} and len(summary(out)) == 6
    assert {path.name for path in out.glob(".*")} == {".lock"}


def test_others_are_in_memory_only_where_what_was_allowed_holds_them(
    tiny: Path, scan_file: ScanFile, tmp_path: Path
) -> None:
    scans = tmp_path / "scans"
    for seed in range(3):
        scan_file(scans / f"case{seed}.nii.gz", seed)

    def memory(limit: str) -> list[Memory]:
        batch = run(scans, tiny, tmp_path / f"out{limit}", replace(LABELS_ALONE, max_memory=limit))
        return [row.report.memory for row in batch.rows if row.report and row.report.memory]

    first, *others = memory("1GB")
    assert first.peak is not None, "the first is alone: nobody knows yet what a case takes"
    assert [other.peak for other in others] == [None, None], "with others in hand there is no telling"
    tight = memory(str(max(one.stated for one in (first, *others)) + 1000))
    assert len(tight) == 3 and all(one.peak is not None for one in tight)
