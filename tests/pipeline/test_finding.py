"""Cases are found wherever they lie: told apart by what is in them, brought together by name, none lost."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK

from pipeline.finding import Finds, find_scans
from pipeline.scan import read_scan
from preprocessing import dicom, files
from preprocessing.volume import UnreadableScan, Volume

ScanFile = Callable[..., Path]
MakeScan = Callable[..., Volume]


def ids(found: Finds) -> list[str]:
    return [scan.case_id for scan in found.scans]


def test_volumes_of_one_enhanced_file_are_cases_with_identities_of_their_own(shared: Path) -> None:
    folder = shared / "data" / "zoo" / "dicom_d2n_philips_enhanced_fmri_001"
    found = find_scans([folder])
    assert len(found.scans) > 1 and len({scan.files for scan in found.scans}) == 1
    assert len({scan.identity for scan in found.scans}) == len(set(ids(found))) == len(found.scans)
    assert all(scan.parts for scan in found.scans)
    (one,) = found.scans[0].files
    assert len(find_scans([one]).scans) == len(found.scans)


def test_a_series_spread_over_folders_is_one_case(make_scan: MakeScan, tmp_path: Path) -> None:
    paths = dicom.write_series(make_scan(1), tmp_path / "disc" / "a", description="on a disc")
    (tmp_path / "disc" / "b").mkdir()
    for path in paths[5:]:
        path.rename(tmp_path / "disc" / "b" / path.name)
    (scan,) = find_scans([tmp_path / "disc"]).scans
    assert scan.case_id == "disc" and read_scan(scan).geometry.shape == (14, 18, 11)


def test_a_series_exported_twice_in_other_bytes_is_two_cases_and_a_mere_copy_is_one(
    make_scan: MakeScan, tmp_path: Path
) -> None:
    paths = dicom.write_series(make_scan(1), tmp_path / "tree" / "plain", description="one")
    for copy, compress in (("copy", False), ("rle", True)):
        for path in paths:
            slice_ = pydicom.dcmread(path)
            if compress:
                slice_.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
            (tmp_path / copy / copy).mkdir(parents=True, exist_ok=True)
            slice_.save_as(tmp_path / copy / copy / path.name)
    shutil.copytree(tmp_path / "tree" / "plain", tmp_path / "copy" / "plain")
    shutil.copytree(tmp_path / "tree" / "plain", tmp_path / "rle" / "plain")
    assert ids(find_scans([tmp_path / "rle"])) == ["plain", "rle"]
    twice = [read_scan(scan) for scan in find_scans([tmp_path / "rle"]).scans]
    np.testing.assert_array_equal(twice[0].voxels, twice[1].voxels)
    shutil.rmtree(tmp_path / "copy" / "copy")
    shutil.copytree(tmp_path / "copy" / "plain", tmp_path / "copy" / "copy")
    assert len(find_scans([tmp_path / "copy"]).scans) == 1


def test_the_uid_of_a_series_is_no_part_of_a_path(make_scan: MakeScan, tmp_path: Path) -> None:
    for number in (1, 2):
        for path in dicom.write_series(make_scan(number), tmp_path / "both", description=str(number)):
            slice_ = pydicom.dcmread(path)
            with pydicom.config.disable_value_validation():
                slice_.SeriesInstanceUID = f"../../evil/{number}"
                slice_.save_as(tmp_path / "both" / f"{number}-{path.name}")
            path.unlink()
    found = ids(find_scans([tmp_path / "both"]))
    assert len(found) == 2 and all(
        name.startswith("both-") and "/" not in name and "evil" not in name for name in found
    )


def test_a_pair_of_header_and_voxels_is_one_case(make_scan: MakeScan, tmp_path: Path) -> None:
    image = make_scan(1)
    (tmp_path / "tree").mkdir()
    pair = nibabel.Nifti1Pair(image.voxels[0], image.geometry.affine)
    nibabel.save(pair, tmp_path / "tree" / "pair.hdr")
    files.write(image, tmp_path / "whole.mha")
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(tmp_path / "whole.mha")), str(tmp_path / "tree" / "meta.mhd"))
    found = find_scans([tmp_path / "tree"])
    assert ids(found) == ["meta", "pair"] and not found.left_alone
    assert [len(scan.files) for scan in found.scans] == [2, 2]
    for name in ("pair.hdr", "pair.img", "meta.raw"):
        (scan,) = find_scans([tmp_path / "tree" / name]).scans
        np.testing.assert_array_equal(read_scan(scan).voxels, image.voxels)
    before = found.scans[1].identity
    (tmp_path / "tree" / "pair.img").write_bytes(b"other")
    assert find_scans([tmp_path / "tree"]).scans[1].identity != before


def test_voxels_without_their_header_are_named(scan_file: ScanFile, tmp_path: Path) -> None:
    scan_file(tmp_path / "a.nii.gz")
    (tmp_path / "lost.img").write_bytes(b"\0" * 5000)
    (reason,) = find_scans([tmp_path]).left_alone.values()
    assert ".hdr" in reason


def test_a_channel_number_that_is_there_twice_loses_no_file(scan_file: ScanFile, tmp_path: Path) -> None:
    for name in ("p_0000.nii.gz", "p_0000.nrrd", "p_0001.nii.gz"):
        scan_file(tmp_path / name)
    found = find_scans([tmp_path], ("t1", "t2"))
    assert sorted(path.name for scan in found.scans for path in scan.paths) == [
        "p_0000.nii.gz", "p_0000.nrrd", "p_0001.nii.gz",
    ]  # fmt: skip


@pytest.mark.parametrize("junk", [b"", b"DICM", b"\0" * 128 + b"DICM" + b"\xff" * 60])
def test_a_damaged_dicom_file_alone_is_a_case_and_beside_a_series_it_is_named(
    make_scan: MakeScan, tmp_path: Path, junk: bytes
) -> None:
    series, alone = tmp_path / "tree" / "series", tmp_path / "tree" / "alone"
    dicom.write_series(make_scan(1), series, description="whole")
    alone.mkdir()
    for folder in (series, alone):
        (folder / "bad.dcm").write_bytes(junk)
    found = find_scans([tmp_path / "tree"])
    assert len(found.scans) == 2 and all(scan.refusal for scan in found.scans)
    assert (
        list(found.left_alone) == [str(series / "bad.dcm")] and "refused" in found.left_alone[str(series / "bad.dcm")]
    )


def test_a_slice_that_is_named_stands_for_nothing_but_its_series(
    make_scan: MakeScan, scan_file: ScanFile, tmp_path: Path
) -> None:
    paths = dicom.write_series(make_scan(1), tmp_path / "ct", description="ct")
    scan_file(tmp_path / "ct" / "labels.nii.gz", 2)
    (scan,) = find_scans([paths[3]]).scans
    assert set(scan.files) == set(paths)
    assert len(find_scans([tmp_path / "ct"]).scans) == 2


def test_a_header_that_cannot_be_opened_stops_nobody(tmp_path: Path, scan_file: ScanFile) -> None:
    scan_file(tmp_path / "a.nii.gz")
    (tmp_path / "b.mhd").symlink_to(tmp_path / "gone.mhd")
    found = find_scans([tmp_path])
    assert ids(found) == ["a", "b"]  # what it was is lost, and is said so
    with pytest.raises(UnreadableScan):
        read_scan(found.scans[1])


def test_what_a_file_is_decides_and_not_its_name(scan_file: ScanFile, make_scan: MakeScan, tmp_path: Path) -> None:
    for number, name in enumerate(("IM0001", "scan.gz", "scan.dcm")):
        scan_file(tmp_path / "x.nii.gz", number).rename(tmp_path / name)
    for path in dicom.write_series(make_scan(4), tmp_path / "series", description="under a false name"):
        path.rename(path.with_suffix(".nii"))
    found = find_scans([tmp_path])
    assert ids(found) == ["IM0001", "scan.dcm", "scan.gz", "series"] and not found.left_alone
    assert [read_scan(scan).geometry.shape for scan in found.scans] == [(14, 18, 11)] * 4
    assert len(find_scans([tmp_path / "series" / "0003.nii"]).scans[0].files) == 11
    assert ids(find_scans([tmp_path / "scan.dcm"])) == ["scan.dcm"]


def test_a_closed_folder_or_a_link_in_a_circle_stops_nobody_and_is_named(
    scan_file: ScanFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan_file(tmp_path / "a.nii.gz")
    (tmp_path / "closed").mkdir()
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "circle").symlink_to(tmp_path)
    really = Path.iterdir

    def closed(folder: Path) -> Iterator[Path]:
        if folder.name == "closed":  # root may open any folder
            raise PermissionError(13, "Permission denied")
        return really(folder)

    really_stat = Path.stat

    def hidden(path: Path, **how: bool) -> os.stat_result:
        if path.parent.name == "closed":  # what lies in a closed folder cannot even be asked for
            raise PermissionError(13, "Permission denied")
        return really_stat(path, **how)

    monkeypatch.setattr(Path, "iterdir", closed)
    monkeypatch.setattr(Path, "stat", hidden)
    found = find_scans([tmp_path])
    assert ids(found) == ["a"]
    assert set(found.left_alone) == {str(tmp_path / "closed"), str(tmp_path / "open" / "circle")}


def test_folders_that_link_to_each_other_are_walked_to_an_end(make_scan: MakeScan, tmp_path: Path) -> None:
    names = "abcd"
    for seed, name in enumerate(names):
        dicom.write_series(make_scan(seed), tmp_path / name, description=name)
    for one in names:
        for other in names.replace(one, ""):
            (tmp_path / one / f"to_{other}").symlink_to(tmp_path / other)
    finds = find_scans([tmp_path])
    assert len(finds.scans) == len(names) and any("too many" in reason for reason in finds.left_alone.values())


def test_nothing_that_is_no_file_goes_without_a_word(make_scan: MakeScan, tmp_path: Path) -> None:
    paths = dicom.write_series(make_scan(1), tmp_path / "ct", description="ct")
    os.mkfifo(tmp_path / "ct" / "pipe")
    (tmp_path / "gone.nii.gz").symlink_to(tmp_path / "nowhere")
    paths[-1].unlink()
    paths[-1].symlink_to(tmp_path / "nowhere")
    finds = find_scans([tmp_path])
    assert "pipe" in finds.left_alone[str(tmp_path / "ct" / "pipe")]
    assert {scan.case_id for scan in finds.scans} == {"ct", "gone"}
    for scan in finds.scans:
        with pytest.raises(UnreadableScan):
            read_scan(scan)
