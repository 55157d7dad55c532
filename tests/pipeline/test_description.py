"""`show` says in words what a file of ours holds, and refuses what it does not know."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.batch import segment
from pipeline.cli import main
from pipeline.config import Segment
from pipeline.description import address_of, show
from pipeline.errors import DamagedPackage, UsageError
from pipeline.outputs import page
from pipeline.report import Report
from preprocessing import dicom
from preprocessing.plan import Plan
from preprocessing.volume import UnreadableScan, Volume


def test_a_scan_is_told_by_its_grid_its_values_and_its_place(scan_file: Callable[..., Path], tmp_path: Path) -> None:
    words = show(scan_file(tmp_path / "scan.nii.gz", seed=2))
    for part in (
        "scan.nii.gz: fine. 14×18×11 voxels of 1.9×2.1×3.2 mm, LPS, oblique, NIfTI-1",
        "1 channel(s) of int16",
        "sha256",
    ):
        assert part in words


def test_a_series_is_told_like_any_scan(make_scan: Callable[..., Volume], tmp_path: Path) -> None:
    paths = dicom.write_series(make_scan(), tmp_path / "series", description="made up")
    for path in (tmp_path / "series", paths[0]):
        assert f"{path.name}: fine. MR, 14×18×11 voxels" in show(path) and "Explicit VR Little Endian" in show(path)
    shutil.copy(paths[3], tmp_path / "series" / "again.dcm")
    (tmp_path / "series" / "notes.txt").write_text("left alone")
    words = show(tmp_path / "series")
    assert "series: repaired." in words and "  repaired: " in words and "  note: notes.txt" in words


def test_a_folder_of_several_scans_is_told_one_by_one(make_scan: Callable[..., Volume], tmp_path: Path) -> None:
    for number in (1, 2):
        dicom.write_series(make_scan(number), tmp_path / "study" / f"s{number}", description="made up")
    words = show(tmp_path / "study")
    assert [line.split()[:2] for line in words.splitlines() if line[0] != " "] == [["fine", "s1"], ["fine", "s2"]]


def test_a_plan_is_told_with_its_reasons(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    from dataclasses import replace

    replace(make_plan(), reasons={"patch": "it fits"}).write(tmp_path / "plan.yaml")
    words = show(tmp_path / "plan.yaml")
    for part in (
        "tiny",
        "liver (1), lesion (7)",
        "orient > resample > normalise > pad",
        "16×16×16",
        "because: it fits",
    ):
        assert part in words


def test_a_package_is_told_by_folder_or_file_and_only_when_whole(tiny: Path, tmp_path: Path) -> None:
    assert show(tiny) == show(tiny / "package.json")
    assert "Not a medical device" in show(tiny) and "Every byte is as it was packed." in show(tiny)
    (tmp_path / "package.json").write_text("{}")
    with pytest.raises(DamagedPackage):
        show(tmp_path)


def test_a_report_is_told_by_folder_or_file(tiny: Path, scan_file: Callable[..., Path], tmp_path: Path) -> None:
    segment([scan_file(tmp_path / "a.nii.gz")], tiny, tmp_path / "out", Segment(outputs=("labels",)))
    words = show(tmp_path / "out" / "a")
    assert words == show(tmp_path / "out" / "a" / "report.json")
    for part in ("a: done, by tiny", "liver", "lesion", " ml", "14×18×11 voxels", "files   labels.nii.gz"):
        assert part in words


def test_a_case_is_told_with_its_confidence_its_parts_and_its_page(
    tiny: Path, scan_file: Callable[..., Path], tmp_path: Path
) -> None:
    outputs = ("labels", "measurements", "page")
    segment([scan_file(tmp_path / "a.nii.gz")], tiny, tmp_path / "out", Segment(outputs=outputs))
    case = tmp_path / "out" / "a"
    words, report = show(case), Report.read(case)
    assert f"page    {(case / 'page.html').as_uri()}" in words and address_of(case) in words
    assert report.confidence
    for name, confidence in report.confidence.items():
        assert re.search(rf"{name} .* ml   confidence {confidence:.2f}\n", words)
    labels = json.loads((case / "measurements.json").read_text())["labels"]
    several = {name: label for name, label in labels.items() if label["components"] > 1}
    for label in several.values():
        assert f"{page.place(label['parts'][1]['centroid_mm'])}\n" in words
    assert several
    (case / "page.html").unlink()
    assert address_of(case) == "" and "page   " not in show(case)


def test_open_shows_the_page_of_a_case_and_says_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], make_plan: Callable[..., Plan]
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: bool(opened.append(address)))
    make_plan().write(tmp_path / "plan.yaml")
    assert main(["show", str(tmp_path / "plan.yaml"), "--open"]) == 2
    assert "has no page to open" in capsys.readouterr().err and not opened
    (tmp_path / "page.html").write_text("")
    assert main(["show", str(tmp_path / "plan.yaml"), "--open"]) == 0
    assert opened == [(tmp_path / "page.html").as_uri()]
    assert f"no browser was found here; open {opened[0]}" in capsys.readouterr().err


def test_what_is_none_of_them_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UnreadableScan, match="neither DICOM"):
        show(tmp_path / "notes.txt")
    with pytest.raises(UsageError, match="does not exist"):
        show(tmp_path / "nowhere")
    (tmp_path / "strange.json").write_text("[1]")
    with pytest.raises(UsageError, match="not a report"):
        show(tmp_path / "strange.json")
