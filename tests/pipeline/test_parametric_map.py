"""A DICOM Parametric Map has the values and the place of the map it was made of, and belongs to its source's patient."""

from dataclasses import replace
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest

from pipeline.faithfulness import Faithfulness
from pipeline.outputs import parametric_map, refuse_unsuited, saliency
from pipeline.report import Explanation, Result
from preprocessing import dicom
from preprocessing.declared import label_table
from preprocessing.volume import LPS_TO_RAS, Geometry, Provenance, ScanError, Volume
from tests.pipeline.dciodvfy import errors_in

TABLE = label_table({"liver": 3, "lesion": 9})
FAILED = Faithfulness(
    deletion=0.9, deletion_random=0.9, deletion_mask=0.05, insertion=0.2, insertion_random=0.2, insertion_mask=0.95,
    energy=0.1, energy_chance=0.1, context=0.9, randomisation=0.9, randomisation_overlap=0.5, randomisation_scale=1.0,
    stability=0.95, failed=("deletes no better than chance",),
)  # fmt: skip


def oblique(shape: tuple[int, int, int] = (13, 11, 9), order: tuple[int, int, int] = (0, 1, 2)) -> Geometry:
    """Turned about two axes, with pixels that are not square."""
    a, b = 0.3, -0.2
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    turn = turn @ np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = (np.diag([-1, -1, 1]) @ turn * (0.8, 1.3, 2.7))[:, order]
    affine[:3, 3] = (31.25, -17.5, 4.125)
    return Geometry(shape=shape, affine=affine)


def scan_on(folder: Path, geometry: Geometry, modality: str = "CT") -> Volume:
    grey = np.random.default_rng(1).integers(-100, 900, (1, *geometry.shape)).astype(np.int16)
    volume = Volume(voxels=grey, geometry=geometry, channels=("0",))
    (series,), _ = dicom.series_in(dicom.write_series(volume, folder, description="phantom", modality=modality))
    return dicom.read(series)


def explained(scan: Volume) -> Result:
    """A map that is nothing on the first two slices and the last, a part's that failed, a blank one, and attention."""
    shape = scan.geometry.shape
    labels = np.zeros(shape, np.uint8)
    labels[2:9, 3:8, 2:6], labels[4:6, 4:6, 3:4] = 3, 9
    codes = np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8)
    codes[:, :, [0, 1, -1]] = 0
    codes[0, 0, 2], codes[0, 0, -2] = 1, -1
    first = Explanation(
        label="lesion", part=None, method="hirescam", layer="down.2", codes=codes, scale=1.2345e-6,
        unit="logits per ml", score=2.0,
    )  # fmt: skip
    return Result(
        case_id="Meier^Anna",
        scan=scan,
        labels=Volume(voxels=labels[None], geometry=scan.geometry, channels=("labels",)),
        label_table=TABLE,
        package_id="cd" * 32,
        package_name="demo",
        explanations=(
            first,
            replace(first, part=2, scale=3e-4, faithfulness=FAILED, warnings=("its gradients average to nothing",)),
            replace(first, label="liver", codes=codes * 0, scale=0.0, blank="nothing was found"),
            replace(
                first, label="", method="attention", codes=np.abs(codes), unit="the network's own weight", score=None
            ),
        ),
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return explained(scan_on(tmp_path_factory.mktemp("series"), oblique()))


@pytest.fixture(scope="module")
def maps(found: Result, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return parametric_map.write(found, tmp_path_factory.mktemp("case"), parametric_map.Config())


def frame_by_frame(path: Path, geometry: Geometry) -> np.ndarray:
    """As dcmqi reads it: every frame by its own position, every value by the map's own words about stored values."""
    data = pydicom.dcmread(path)
    shared = data.SharedFunctionalGroupsSequence[0]
    mapping = shared.RealWorldValueMappingSequence[0]
    spacing = [float(x) for x in shared.PixelMeasuresSequence[0].PixelSpacing]
    cosines = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, dtype=float)
    values = np.zeros(geometry.shape)
    frames = data.pixel_array.reshape(-1, data.Rows, data.Columns)
    rows, columns = np.mgrid[: data.Rows, : data.Columns]
    for plane, group in zip(frames, data.PerFrameFunctionalGroupsSequence, strict=True):
        start = np.array(group.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        lps = start + columns[..., None] * cosines[:3] * spacing[1] + rows[..., None] * cosines[3:] * spacing[0]
        voxels = geometry.to_voxel(lps * (-1, -1, 1))
        np.testing.assert_allclose(voxels, voxels.round(), atol=1e-4)
        i, j, k = np.moveaxis(voxels.round().astype(int), -1, 0)
        values[i, j, k] = plane * mapping.RealWorldValueSlope + mapping.RealWorldValueIntercept
    return values


def test_each_map_is_an_object_of_one_series(maps: list[Path]) -> None:
    assert [path.name for path in maps] == [
        "saliency-lesion-hirescam.dcm", "saliency-lesion-2-hirescam.dcm", "saliency-liver-hirescam.dcm",
        "saliency-attention-down.2.dcm",
    ]  # fmt: skip
    headers = [pydicom.dcmread(path) for path in maps]
    assert {data.SOPClassUID for data in headers} == {"1.2.840.10008.5.1.4.1.1.30"}
    assert len({data.SeriesInstanceUID for data in headers}) == 1
    assert len({data.SOPInstanceUID for data in headers}) == 4
    assert [data.InstanceNumber for data in headers] == [1, 2, 3, 4]


def test_values_and_places_are_those_of_the_map(found: Result, maps: list[Path]) -> None:
    for path, each in zip(maps, found.explanations, strict=True):
        expected = each.codes * np.float64(each.scale)
        np.testing.assert_allclose(frame_by_frame(path, found.scan.geometry), expected, rtol=1e-6)


def test_values_and_places_are_those_of_the_nifti_beside_it(found: Result, maps: list[Path], tmp_path: Path) -> None:
    nifti = nibabel.load(saliency.write(found, tmp_path, saliency.Config())[0])
    grid = Geometry(shape=nifti.shape, affine=nifti.affine)
    np.testing.assert_allclose(frame_by_frame(maps[0], grid), nifti.get_fdata(), rtol=1e-5)


def test_highdicom_puts_the_very_values_where_its_own_affine_says(found: Result, maps: list[Path]) -> None:
    volume = highdicom.imread(maps[0]).get_volume()
    codes, affine = found.explanations[0].codes, np.asarray(volume.affine)
    # highdicom's axes are slice, row, column
    to_ours = np.linalg.inv(found.scan.geometry.affine) @ LPS_TO_RAS @ affine
    for index in np.ndindex(*volume.spatial_shape):
        at = to_ours @ [*index, 1]
        np.testing.assert_allclose(at[:3], at[:3].round(), atol=1e-4)
        value = codes[tuple(at[:3].round().astype(int))] * found.explanations[0].scale
        assert volume.array[index] == pytest.approx(value, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_it_lies_right_however_the_planes_lie_and_the_validator_agrees(
    order: tuple[int, int, int], modality: str, tmp_path: Path
) -> None:
    result = explained(scan_on(tmp_path / "series", oblique((13, 11, 9), order), modality))
    for path in parametric_map.write(result, tmp_path, parametric_map.Config()):
        each = next(e for e in result.explanations if path.name == f"saliency-{e.name}.dcm")
        np.testing.assert_allclose(
            frame_by_frame(path, result.scan.geometry), each.codes * np.float64(each.scale), rtol=1e-6
        )
        assert errors_in(path) == []


def test_slices_without_anything_are_left_out_and_a_blank_map_is_one_frame_of_zeros(maps: list[Path]) -> None:
    assert [pydicom.dcmread(path).NumberOfFrames for path in maps] == [6, 6, 1, 6]
    assert not pydicom.dcmread(maps[2]).pixel_array.any()


def test_every_frame_names_the_image_it_was_made_of(found: Result, maps: list[Path]) -> None:
    data = pydicom.dcmread(maps[0])
    sources = {str(source.SOPInstanceUID): source for source in map(pydicom.dcmread, found.scan.provenance.files)}
    for group in data.PerFrameFunctionalGroupsSequence:
        (image,) = group.DerivationImageSequence[0].SourceImageSequence
        np.testing.assert_allclose(
            np.array(sources[image.ReferencedSOPInstanceUID].ImagePositionPatient, dtype=float),
            np.array(group.PlanePositionSequence[0].ImagePositionPatient, dtype=float),
            atol=1e-4,
        )
    source = next(iter(sources.values()))
    assert data.FrameOfReferenceUID == source.FrameOfReferenceUID
    assert data.StudyInstanceUID == source.StudyInstanceUID and str(data.PatientName) == str(source.PatientName)
    assert data.ReferencedSeriesSequence[0].SeriesInstanceUID == source.SeriesInstanceUID


def test_units_are_codes_and_the_quantity_is_saliency(maps: list[Path]) -> None:
    mappings = [
        pydicom.dcmread(path).SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence[0] for path in maps
    ]
    units = [each.MeasurementUnitsCodeSequence[0].CodeValue for each in mappings]
    assert units == ["/mL", "/mL", "/mL", "1"] and mappings[0].LUTExplanation == "logits per ml"
    quantity = mappings[0].QuantityDefinitionSequence[0].ConceptCodeSequence[0]
    assert (quantity.CodeValue, quantity.CodingSchemeDesignator) == ("130404", "DCM")


def test_every_object_says_what_it_is_not_for_and_a_failed_one_that_it_failed(maps: list[Path]) -> None:
    for path in maps:
        data = pydicom.dcmread(path)
        assert "not for diagnosis" in data.SeriesDescription and "not for diagnosis" in data.ImageComments
        assert data.ContentQualification == "RESEARCH" and data.BurnedInAnnotation == "NO"
    failed = pydicom.dcmread(maps[1])
    assert failed.ContentDescription.startswith("failed: deletes no better than chance")
    assert "its gradients average to nothing" in failed.ImageComments
    assert pydicom.dcmread(maps[2]).ContentDescription.startswith("blank: nothing was found")


def test_the_case_is_named_nowhere(maps: list[Path]) -> None:
    assert all(b"Meier" not in path.read_bytes() for path in maps)


def test_the_same_map_has_the_same_uids_and_another_map_has_others(
    found: Result, maps: list[Path], tmp_path: Path
) -> None:
    changed = replace(found.explanations[0], scale=2e-6)
    again = parametric_map.write(
        replace(found, explanations=(changed, *found.explanations[1:])), tmp_path, parametric_map.Config()
    )
    before, after = ([pydicom.dcmread(path) for path in paths] for paths in (maps, again))
    assert [one.SOPInstanceUID == other.SOPInstanceUID for one, other in zip(before, after, strict=True)] == [
        False, True, True, True,
    ]  # fmt: skip
    assert before[0].SeriesInstanceUID == after[0].SeriesInstanceUID


def test_where_nothing_was_explained_nothing_is_written(found: Result, tmp_path: Path) -> None:
    assert parametric_map.write(replace(found, explanations=()), tmp_path, parametric_map.Config()) == []


def test_a_scan_that_is_no_dicom_is_refused_before_anything_is_computed(found: Result, tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_bytes(b"\x1f\x8b")
    provenance = Provenance(sources=("a.nii.gz",), files=(str(tmp_path / "a.nii.gz"),), reader="nibabel")
    with pytest.raises(ScanError, match="not DICOM"):
        refuse_unsuited(["parametric_map"], replace(found.scan, provenance=provenance))


@pytest.mark.parametrize(
    "folder", ["hippocampus-dicom/Study1", "zoo/dicom_ibsi_STS019_CT/image", "zoo/dicom_enhanced_ct_vs_classic"]
)
def test_maps_of_real_scans_lie_right_and_are_valid(folder: str, shared: Path, tmp_path: Path) -> None:
    paths = sorted(path for path in (shared / "data" / folder).rglob("*") if path.is_file())
    series, _ = dicom.series_in([path for path in paths if path.name != "slice1.dcm"])
    result = explained(dicom.read(series[0]))
    result = replace(result, explanations=result.explanations[:1])
    (path,) = parametric_map.write(result, tmp_path, parametric_map.Config())
    each = result.explanations[0]
    with pydicom.config.disable_value_validation():
        values = frame_by_frame(path, result.scan.geometry)
    np.testing.assert_allclose(values, each.codes * np.float64(each.scale), rtol=1e-6)
    # the source's own StudyID is too long, and is kept
    assert [error for error in errors_in(path) if "Study ID" not in error and "invalid data values" not in error] == []
