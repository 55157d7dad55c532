"""The picture in the archive is the picture on disk, belongs to its patient, and names nobody in its pixels."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK

from pipeline.outputs import overlay, refuse_unsuited, secondary_capture
from pipeline.report import Result
from preprocessing import dicom
from preprocessing.declared import label_table
from preprocessing.volume import Geometry, Provenance, ScanError, Volume
from tests.pipeline.dciodvfy import errors_in


def found_in(scan: Volume) -> Result:
    labels = np.zeros(scan.geometry.shape, np.uint8)
    i, j, k = scan.geometry.shape
    labels[i // 4 : i // 2, j // 4 : j // 2, k // 4 : k // 2 + 1] = 1
    labels[-3:-1, -3:-1, k // 2] = 1
    return Result(
        case_id="Meier^Anna",
        scan=scan,
        labels=Volume(voxels=labels[None], geometry=scan.geometry, channels=("labels",)),
        label_table=label_table({"lesion": 1}),
        package_id="cd" * 32,
        package_name="demo",
    )


def scan_on(folder: Path, modality: str = "CT") -> Volume:
    geometry = Geometry(shape=(24, 20, 9), affine=np.diag([-0.8, -0.8, 2.0, 1.0]))
    grey = np.random.default_rng(1).integers(-100, 900, (1, *geometry.shape)).astype(np.int16)
    volume = Volume(voxels=grey, geometry=geometry, channels=("0",))
    (series,), _ = dicom.series_in(dicom.write_series(volume, folder, description="phantom", modality=modality))
    return dicom.read(series)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return found_in(scan_on(tmp_path_factory.mktemp("series")))


def written(result: Result, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (path,) = secondary_capture.write(result, folder, secondary_capture.Config())
    return path


@pytest.fixture(scope="module")
def capture(found: Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(found, tmp_path_factory.mktemp("case"))


def test_its_pixels_are_those_of_the_overlay_to_every_reader(found: Result, capture: Path) -> None:
    expected = np.asarray(overlay.picture(found, anonymous=True))
    np.testing.assert_array_equal(pydicom.dcmread(capture).pixel_array, expected)
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(capture))[0], expected)


def test_no_name_is_burned_in_and_the_header_says_so(found: Result, capture: Path, tmp_path: Path) -> None:
    data = pydicom.dcmread(capture)
    assert data.BurnedInAnnotation == "NO"
    other = pydicom.dcmread(written(replace(found, case_id="another"), tmp_path))
    assert data.PixelData == other.PixelData and data.SOPInstanceUID == other.SOPInstanceUID
    assert b"Meier" not in capture.read_bytes()


def test_it_is_filed_with_its_patient_and_names_every_source_image(found: Result, capture: Path) -> None:
    data, source = pydicom.dcmread(capture), pydicom.dcmread(found.scan.provenance.files[0])
    assert data.SOPClassUID == "1.2.840.10008.5.1.4.1.1.7" and data.Modality == "OT"
    assert data.StudyInstanceUID == source.StudyInstanceUID and str(data.PatientName) == str(source.PatientName)
    assert data.SeriesInstanceUID != source.SeriesInstanceUID
    known = {str(pydicom.dcmread(file).SOPInstanceUID) for file in found.scan.provenance.files}
    assert {image.ReferencedSOPInstanceUID for image in data.SourceImageSequence} == known
    assert "FrameOfReferenceUID" not in data, "a sheet of several planes lies nowhere in the patient"


def test_it_says_what_it_is_not_for(capture: Path) -> None:
    data = pydicom.dcmread(capture)
    assert "not for diagnosis" in data.SeriesDescription and "not for diagnosis" in data.ImageComments


def test_the_same_picture_has_the_same_uids_and_another_has_its_own(
    found: Result, capture: Path, tmp_path: Path
) -> None:
    again = pydicom.dcmread(written(found, tmp_path / "again"))
    config = secondary_capture.Config(picture=overlay.Config(window=(100, 500)))
    (path,) = secondary_capture.write(found, tmp_path, config)
    first, other = pydicom.dcmread(capture), pydicom.dcmread(path)
    assert (again.SOPInstanceUID, again.SeriesInstanceUID) == (first.SOPInstanceUID, first.SeriesInstanceUID)
    assert other.SOPInstanceUID != first.SOPInstanceUID and other.SeriesInstanceUID == first.SeriesInstanceUID


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_the_standards_validator_has_nothing_against_it(modality: str, tmp_path: Path) -> None:
    assert errors_in(written(found_in(scan_on(tmp_path / "series", modality)), tmp_path)) == []


def test_a_scan_that_is_no_dicom_is_refused_before_anything_is_computed(found: Result, tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_bytes(b"\x1f\x8b")
    provenance = Provenance(sources=("a.nii.gz",), files=(str(tmp_path / "a.nii.gz"),), reader="nibabel")
    with pytest.raises(ScanError, match="not DICOM"):
        refuse_unsuited(["secondary_capture"], replace(found.scan, provenance=provenance))


@pytest.mark.parametrize("folder", ["hippocampus-dicom/Study1", "zoo/dicom_ibsi_STS019_CT/image"])
def test_captures_of_real_scans_are_valid(folder: str, shared: Path, tmp_path: Path) -> None:
    paths = sorted(path for path in (shared / "data" / folder).rglob("*") if path.is_file())
    series, _ = dicom.series_in([path for path in paths if path.name != "slice1.dcm"])
    path = written(found_in(dicom.read(series[0])), tmp_path)
    # the source's own StudyID is too long, and is kept
    assert [error for error in errors_in(path) if "Study ID" not in error and "invalid data values" not in error] == []
