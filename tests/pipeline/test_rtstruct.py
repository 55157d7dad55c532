"""Contours enclose exactly the voxels of their label, for every way of filling them, and belong to their scan."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from scipy import ndimage

from pipeline.outputs import rtstruct
from pipeline.outputs.rtstruct import outlines
from pipeline.report import Result
from preprocessing import dicom
from preprocessing.datasets import label_table
from preprocessing.dicom.labels import read_labels
from preprocessing.volume import LPS_TO_RAS, Geometry, Provenance, ScanError, Volume

NAMES = {"liver": 3, "kidney_left": 7, "lesion": 9}
AFFINE = np.array([[0.05, -1.24, 0.35, 30], [-0.79, -0.08, -0.1, -17], [0.1, -0.3, -2.6, 4], [0, 0, 0, 1]])


def result_of(scan: Volume, seed: int = 0) -> Result:
    """Round parts with holes, islands in holes, and single voxels that touch at corners."""
    rng = np.random.default_rng(seed)
    fields = np.stack([ndimage.gaussian_filter(rng.normal(size=scan.geometry.shape), 0.7) for _ in NAMES])
    values = np.array(list(NAMES.values()))[fields.argmax(axis=0)]
    found = np.where(fields.max(axis=0) > np.quantile(fields.max(axis=0), 0.4), values, 0).astype(np.uint8)
    return Result(
        case_id="case",
        scan=scan,
        labels=Volume(voxels=found[None], geometry=scan.geometry, channels=("labels",)),
        label_table=label_table(NAMES),
        package_id="cd" * 32,
        package_name="demo",
    )


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("series")
    turn, _ = np.linalg.qr(AFFINE[:3, :3])
    affine = AFFINE.copy()
    affine[:3, :3] = turn * (0.8, 1.25, 2.6)
    grid = Geometry(shape=(19, 16, 5), affine=affine)
    grey = np.random.default_rng(1).integers(0, 900, (1, *grid.shape)).astype(np.int16)
    volume = Volume(voxels=grey, geometry=grid, channels=("0",))
    (series,), _ = dicom.series_in(dicom.write_series(volume, folder, description="phantom", modality="CT"))
    return result_of(dicom.read(series))


def written(result: Result, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (path,) = rtstruct.write(result, folder, rtstruct.Config())
    return path


def around(points: np.ndarray, x: float, y: float) -> bool:
    """Whether a point lies inside a polygon: how often a ray from it crosses (Franklin's pnpoly)."""
    crossed = False
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        if (y0 > y) != (y1 > y) and x < (x1 - x0) * (y - y0) / (y1 - y0) + x0:
            crossed = not crossed
    return crossed


def filled(path: Path, result: Result, together: np.ufunc) -> np.ndarray:
    """Every voxel centre asked of every contour; contours of a slice put together by 'or' or by 'xor'."""
    data = pydicom.dcmread(path)
    names = {item.ROINumber: item.ROIName for item in data.StructureSetROISequence}
    lps = LPS_TO_RAS @ result.scan.geometry.affine
    found = np.zeros(result.scan.geometry.shape, int)
    for region in data.ROIContourSequence:
        mask = np.zeros(found.shape, bool)
        for contour in region.ContourSequence:
            points = np.array(contour.ContourData, dtype=float).reshape(-1, 3)
            ijk = (points - lps[:3, 3]) @ np.linalg.inv(lps[:3, :3]).T
            k = round(ijk[0, 2])
            assert np.abs(ijk[:, 2] - k).max() < 1e-4 and len(points) == contour.NumberOfContourPoints >= 4
            for i, j in np.ndindex(found.shape[:2]):
                mask[i, j, k] = together(mask[i, j, k], around(ijk[:, :2], i, j))
        found[mask] = NAMES[names[region.ReferencedROINumber]]
    return found


@pytest.mark.parametrize("together", [np.logical_or, np.logical_xor])
def test_every_way_of_filling_finds_the_very_voxels(together: np.ufunc, phantom: Result, tmp_path: Path) -> None:
    np.testing.assert_array_equal(filled(written(phantom, tmp_path), phantom, together), phantom.labels.voxels[0])


def test_contours_of_a_region_go_around_the_regions_in_it(phantom: Result, tmp_path: Path) -> None:
    parts = {"liver": (3, 7), "kidney_left": (7,), "lesion": (9,)}
    regions = tuple(replace(label, parts=parts[label.name]) for label in phantom.label_table)
    one = replace(
        phantom, labels=phantom.labels.with_voxels(np.where(phantom.labels.voxels == 7, 3, phantom.labels.voxels))
    )
    whole, apart, united = (
        pydicom.dcmread(written(result, tmp_path / name)).ROIContourSequence
        for name, result in (("regions", replace(phantom, label_table=regions)), ("apart", phantom), ("one", one))
    )
    points = [[contour.ContourData for contour in item.ContourSequence] for item in whole]
    assert points[0] == [contour.ContourData for contour in united[0].ContourSequence]
    assert points[1] == [contour.ContourData for contour in apart[1].ContourSequence]


def test_our_own_reader_finds_the_very_voxels(phantom: Result, tmp_path: Path) -> None:
    path = written(phantom, tmp_path)
    for names in (NAMES, {}):
        np.testing.assert_array_equal(read_labels(path, phantom.scan, names).voxels, phantom.labels.voxels)


def test_outlines_are_few_and_go_along_edges() -> None:
    mask = np.zeros((6, 9), bool)
    mask[1:5, 2:8] = True
    assert sorted(outlines(mask)[0]) == [(2, 1), (2, 5), (8, 1), (8, 5)]
    mask[2:4, 4:6] = False  # a hole, cut in from the left
    (outline,) = outlines(mask)
    assert len(outline) == 11 and outline.count((2, 2)) == 2 and outline.count((4, 2)) == 2


@pytest.mark.parametrize("seed", range(20))
def test_any_mask_has_one_outline_for_each_part(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random(rng.integers(1, 14, 2)) < rng.random()
    found = outlines(mask)
    assert len(found) == ndimage.label(mask)[1]
    filled_in = np.zeros_like(mask)
    for outline in found:
        assert all(a != b for a, b in zip(outline, outline[1:] + outline[:1], strict=True))
        inside = [[around(np.array(outline), x + 0.5, y + 0.5) for x in range(mask.shape[1])] for y in range(len(mask))]
        assert not (filled_in & np.array(inside)).any()
        filled_in |= np.array(inside)
    np.testing.assert_array_equal(filled_in, mask)


def test_regions_say_what_they_are_and_which_images_they_lie_on(phantom: Result, tmp_path: Path) -> None:
    data = pydicom.dcmread(written(phantom, tmp_path))
    assert [(item.ROINumber, item.ROIName) for item in data.StructureSetROISequence] == [
        (v, n) for n, v in NAMES.items()
    ]
    assert [tuple(item.ROIDisplayColor) for item in data.ROIContourSequence] == [x.colour for x in phantom.label_table]
    assert data.RTROIObservationsSequence[0].RTROIIdentificationCodeSequence[0].CodeMeaning == "Liver"
    sources = {pydicom.dcmread(file).SOPInstanceUID: pydicom.dcmread(file) for file in phantom.scan.provenance.files}
    frame = data.ReferencedFrameOfReferenceSequence[0]
    series = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence[0]
    assert {item.ReferencedSOPInstanceUID for item in series.ContourImageSequence} == sources.keys()
    for contour in data.ROIContourSequence[0].ContourSequence:
        source = sources[contour.ContourImageSequence[0].ReferencedSOPInstanceUID]
        assert frame.FrameOfReferenceUID == source.FrameOfReferenceUID
        points = np.array(contour.ContourData, dtype=float).reshape(-1, 3)
        cosines = np.array(source.ImageOrientationPatient, dtype=float)
        normal = np.cross(cosines[:3], cosines[3:])
        np.testing.assert_allclose((points - np.array(source.ImagePositionPatient, float)) @ normal, 0, atol=1e-4)


def test_the_standards_validator_has_nothing_against_it(phantom: Result, tmp_path: Path) -> None:
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy (Debian: dicom3tools) is not on this machine")
    empty = replace(phantom, labels=phantom.labels.with_voxels(np.zeros_like(phantom.labels.voxels)))
    for name, result in {"full": phantom, "empty": empty}.items():
        said = subprocess.run(["dciodvfy", written(result, tmp_path / name)], capture_output=True, text=True).stderr
        assert [line for line in said.splitlines() if line.startswith("Error")] == []


def test_nothing_found_names_what_was_sought(phantom: Result, tmp_path: Path) -> None:
    result = replace(phantom, labels=phantom.labels.with_voxels(np.zeros_like(phantom.labels.voxels)))
    path = written(result, tmp_path)
    assert [item.ROIName for item in pydicom.dcmread(path).StructureSetROISequence] == list(NAMES)
    assert not read_labels(path, phantom.scan, NAMES).voxels.any()


def test_the_same_result_is_the_same_object(phantom: Result, tmp_path: Path) -> None:
    one, two = (pydicom.dcmread(written(phantom, tmp_path / name)) for name in ("one", "two"))
    assert (one.SOPInstanceUID, one.SeriesInstanceUID) == (two.SOPInstanceUID, two.SeriesInstanceUID)
    other = pydicom.dcmread(written(replace(phantom, package_id="ef" * 32), tmp_path / "three"))
    assert other.SOPInstanceUID != one.SOPInstanceUID


def test_a_scan_that_is_no_dicom_is_refused(phantom: Result, tmp_path: Path) -> None:
    result = replace(phantom, scan=replace(phantom.scan, provenance=Provenance(reader="nibabel")))
    with pytest.raises(ScanError, match="not DICOM"):
        written(result, tmp_path)


def test_real_tumours_drawn_again_are_the_same_voxels(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "zoo" / "dicom_ibsi_STS019_CT"
    (series,), _ = dicom.series_in(sorted((folder / "image").iterdir()))
    scan = dicom.read(series)
    drawn = read_labels(folder / "rtstruct" / "RS.dcm", scan, {"GTV_Mass_CT": 3})
    with pydicom.config.disable_value_validation():
        path = written(replace(result_of(scan), labels=drawn), tmp_path)
    np.testing.assert_array_equal(read_labels(path, scan, NAMES).voxels, drawn.voxels)
