"""A DICOM SEG lies on its source, belongs to its patient, and says the same to every reader."""

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from scipy import ndimage

from pipeline.outputs import dicom_seg
from pipeline.report import Result
from preprocessing import dicom
from preprocessing.codes import Code
from preprocessing.datasets import label_table
from preprocessing.dicom.labels import read_labels
from preprocessing.plan import Label
from preprocessing.volume import LPS_TO_RAS, Geometry, Provenance, ScanError, Volume
from tests.pipeline.dciodvfy import errors_in

NAMES = {"liver": 3, "kidney_left": 7, "lesion": 9}
TABLE = label_table(NAMES)


def oblique(shape: tuple[int, int, int] = (13, 11, 9)) -> Geometry:
    """Turned about two axes, with pixels that are not square and a frame that is no whole number of bytes."""
    a, b = 0.3, -0.2
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    turn = turn @ np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = np.diag([-1, -1, 1]) @ turn * (0.8, 1.3, 2.7)
    affine[:3, 3] = (31.25, -17.5, 4.125)
    return Geometry(shape=shape, affine=affine)


def series_of(folder: Path, geometry: Geometry, modality: str = "CT", study: str | None = None) -> Path:
    grey = np.random.default_rng(1).integers(-100, 900, (1, *geometry.shape)).astype(np.int16)
    volume = Volume(voxels=grey, geometry=geometry, channels=("0",))
    dicom.write_series(volume, folder, description="phantom", modality=modality, study=study)
    return folder


def scan_of(folder: Path) -> Volume:
    (series,), _ = dicom.series_in(sorted(path for path in folder.iterdir() if path.is_file()))
    return dicom.read(series)


def blobs(shape: tuple[int, ...], values: tuple[int, ...] = tuple(NAMES.values()), seed: int = 0) -> np.ndarray:
    """Every value, in round parts with holes and single voxels; the first and the last slice are empty."""
    rng = np.random.default_rng(seed)
    fields = np.stack([ndimage.gaussian_filter(rng.normal(size=shape), 1) for _ in values])
    found = np.where(
        fields.max(axis=0) > np.quantile(fields.max(axis=0), 0.7), np.array(values)[fields.argmax(axis=0)], 0
    )
    found[:, :, [0, -1]] = 0
    return found.astype(np.uint8 if max(values) < 256 else np.uint16)


def result_of(scan: Volume, found: np.ndarray, table: tuple[Label, ...] = TABLE) -> Result:
    return Result(
        case_id="case",
        scan=scan,
        labels=Volume(voxels=found[None], geometry=scan.geometry, channels=("labels",)),
        label_table=table,
        package_id="cd" * 32,
        package_name="demo",
    )


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Result:
    scan = scan_of(series_of(tmp_path_factory.mktemp("series") / "ct", oblique()))
    return result_of(scan, blobs(scan.geometry.shape))


def written(result: Result, folder: Path, kind: str = "binary") -> Path:
    folder.mkdir(exist_ok=True)
    path, *_ = dicom_seg.write(result, folder, dicom_seg.Config(kind=kind))
    return path


def by_highdicom(path: Path, result: Result) -> np.ndarray:
    """Its own volume of the frames, put where its own affine says, as label values."""
    segmentation = highdicom.seg.segread(path)
    volume = segmentation.get_volume(combine_segments=True, relabel=False)
    numbers = {
        int(item.SegmentNumber): NAMES[item.SegmentLabel] for item in segmentation.SegmentSequence if item.SegmentNumber
    }
    # highdicom's axes are slice, row, column, and its slices may count downwards
    part, affine = np.asarray(volume.array).transpose(2, 1, 0), np.asarray(volume.affine)[:, [2, 1, 0, 3]]
    to_ours = np.linalg.inv(result.scan.geometry.affine) @ LPS_TO_RAS @ affine
    if to_ours[2, 2] < 0:
        part, to_ours = (
            part[:, :, ::-1],
            to_ours @ [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, part.shape[2] - 1], [0, 0, 0, 1]],
        )
    np.testing.assert_allclose(to_ours[:3, :3], np.eye(3), atol=1e-5)
    first = to_ours[:3, 3].round().astype(int)
    np.testing.assert_allclose(to_ours[:3, 3], first, atol=1e-4)
    found = np.zeros(result.scan.geometry.shape, int)
    box = tuple(slice(a, a + n) for a, n in zip(first, part.shape, strict=True))
    found[box] = np.vectorize(lambda number: numbers.get(number, 0))(part)
    return found


def frame_by_frame(path: Path, result: Result) -> np.ndarray:
    """As label values."""
    found = np.zeros(result.scan.geometry.shape, int)
    for name, mask in segments_in(path, result).items():
        found[mask] = NAMES[name]
    return found


def segments_in(path: Path, result: Result) -> dict[str, np.ndarray]:
    """As pydicom-seg and dcmqi read it: every frame by its own position and segment number, nothing else."""
    data = pydicom.dcmread(path)
    shared = data.SharedFunctionalGroupsSequence[0]
    names = {item.SegmentNumber: item.SegmentLabel for item in data.SegmentSequence}
    spacing = [float(x) for x in shared.PixelMeasuresSequence[0].PixelSpacing]
    cosines = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, dtype=float)
    found = {name: np.zeros(result.scan.geometry.shape, bool) for name in names.values()}
    for plane, group in zip(data.pixel_array, data.PerFrameFunctionalGroupsSequence, strict=True):
        name = names[group.SegmentIdentificationSequence[0].ReferencedSegmentNumber]
        start = np.array(group.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        for row, column in np.argwhere(plane):
            lps = start + cosines[:3] * spacing[1] * column + cosines[3:] * spacing[0] * row
            voxel = result.scan.geometry.to_voxel(lps * (-1, -1, 1))
            np.testing.assert_allclose(voxel, voxel.round(), atol=1e-5)
            found[name][tuple(voxel.round().astype(int))] = True
    return found


def test_every_reader_finds_the_very_voxels(phantom: Result, tmp_path: Path) -> None:
    path = written(phantom, tmp_path)
    np.testing.assert_array_equal(by_highdicom(path, phantom), phantom.labels.voxels[0])
    np.testing.assert_array_equal(frame_by_frame(path, phantom), phantom.labels.voxels[0])
    ours = read_labels(path, phantom.scan, NAMES)
    np.testing.assert_array_equal(ours.voxels, phantom.labels.voxels)
    assert ours.voxels.dtype == np.uint8 and not ours.provenance.notes


def test_a_label_map_object_holds_the_labels_own_numbers(phantom: Result, tmp_path: Path) -> None:
    path = written(phantom, tmp_path, "labelmap")
    data = pydicom.dcmread(path)
    assert data.SOPClassUID == "1.2.840.10008.5.1.4.1.1.66.7" and data.BitsAllocated == 8
    assert [item.SegmentNumber for item in data.SegmentSequence] == [0, 3, 7, 9]
    np.testing.assert_array_equal(by_highdicom(path, phantom), phantom.labels.voxels[0])
    np.testing.assert_array_equal(read_labels(path, phantom.scan, {}).voxels, phantom.labels.voxels)


REGIONS = tuple(replace(each, parts={3: (1, 2, 3), 7: (2, 3), 9: (3,)}[each.value]) for each in TABLE)


@pytest.mark.parametrize("inside", [(7, 9), (9,)], ids=["all are painted", "the middle one is painted over"])
def test_regions_overlap_and_each_is_there_whole(inside: tuple[int, ...], phantom: Result, tmp_path: Path) -> None:
    values = np.where(
        np.isin(phantom.labels.voxels, (3, *inside)), phantom.labels.voxels, 9 * (phantom.labels.voxels > 0)
    )
    labels = phantom.labels.with_voxels(values.astype(np.uint8))
    path = written(replace(phantom, labels=labels, label_table=REGIONS), tmp_path)
    found = segments_in(path, phantom)
    assert list(found) == ["liver", "kidney_left", "lesion"]
    for mask, own in zip(found.values(), ((3, 7, 9), (7, 9), (9,)), strict=True):
        np.testing.assert_array_equal(mask, np.isin(values[0], own))
    assert errors_in(path) == []


def test_regions_of_a_label_map_object_are_called_by_what_is_left_of_them(phantom: Result, tmp_path: Path) -> None:
    path = written(replace(phantom, label_table=REGIONS), tmp_path, "labelmap")
    names = [item.SegmentLabel for item in pydicom.dcmread(path).SegmentSequence if item.SegmentNumber]
    assert names == ["liver without kidney_left and lesion", "kidney_left without lesion", "lesion"]
    np.testing.assert_array_equal(read_labels(path, phantom.scan, {}).voxels, phantom.labels.voxels)


def test_no_region_found_is_an_object_that_says_what_was_sought(phantom: Result, tmp_path: Path) -> None:
    nothing = phantom.labels.with_voxels(np.zeros_like(phantom.labels.voxels))
    found = segments_in(written(replace(phantom, labels=nothing, label_table=REGIONS), tmp_path), phantom)
    assert list(found) == list(NAMES) and not any(mask.any() for mask in found.values())


def test_both_are_two_objects_of_one_series(phantom: Result, tmp_path: Path) -> None:
    paths = dicom_seg.write(phantom, tmp_path, dicom_seg.Config(kind="both"))
    assert [path.name for path in paths] == ["labels.dcm", "labels-labelmap.dcm"]
    one, other = (pydicom.dcmread(path, stop_before_pixels=True) for path in paths)
    assert one.SeriesInstanceUID == other.SeriesInstanceUID and one.SOPInstanceUID != other.SOPInstanceUID
    assert (one.InstanceNumber, other.InstanceNumber) == (1, 2)


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_the_standards_validator_has_nothing_against_it(modality: str, tmp_path: Path) -> None:
    scan = scan_of(series_of(tmp_path / "series", oblique(), modality))
    assert errors_in(written(result_of(scan, blobs(scan.geometry.shape)), tmp_path)) == []


ORIENTATIONS = [
    (order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]


@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS[::5])
def test_it_lies_right_however_the_planes_lie(order: tuple[int, ...], signs: tuple[int, ...], tmp_path: Path) -> None:
    affine = np.zeros((4, 4))
    affine[list(order), range(3)] = np.array(signs) * (0.7, 1.1, 3.0)
    affine[3, 3] = 1
    scan = scan_of(series_of(tmp_path / "series", Geometry(shape=(6, 9, 5), affine=affine), "MR"))
    result = result_of(scan, blobs(scan.geometry.shape))
    path = written(result, tmp_path)
    np.testing.assert_array_equal(frame_by_frame(path, result), result.labels.voxels[0])
    np.testing.assert_array_equal(read_labels(path, scan, NAMES).voxels, result.labels.voxels)


def test_each_frame_names_the_image_it_was_found_on(phantom: Result, tmp_path: Path) -> None:
    data = pydicom.dcmread(written(phantom, tmp_path))
    sources = {
        str(pydicom.dcmread(file).SOPInstanceUID): pydicom.dcmread(file) for file in phantom.scan.provenance.files
    }
    for group in data.PerFrameFunctionalGroupsSequence:
        (derived,) = group.DerivationImageSequence
        (named,) = derived.SourceImageSequence
        source = sources[named.ReferencedSOPInstanceUID]
        assert source.SOPClassUID == named.ReferencedSOPClassUID and "ReferencedFrameNumber" not in named
        placed = group.PlanePositionSequence[0].ImagePositionPatient
        np.testing.assert_allclose(np.array(placed, float), np.array(source.ImagePositionPatient, float), atol=1e-6)
    (series,) = data.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == source.SeriesInstanceUID
    assert {item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence} == sources.keys()
    assert data.FrameOfReferenceUID == source.FrameOfReferenceUID
    assert (data.StudyInstanceUID, data.PatientID) == (source.StudyInstanceUID, source.PatientID)


def test_segments_say_what_they_are_in_codes_and_colours(phantom: Result, tmp_path: Path) -> None:
    data = pydicom.dcmread(written(phantom, tmp_path))
    liver, kidney, lesion = data.SegmentSequence
    assert [item.SegmentNumber for item in data.SegmentSequence] == [1, 2, 3]
    assert (liver.SegmentLabel, kidney.SegmentLabel) == ("liver", "kidney_left")
    kind = kidney.SegmentedPropertyTypeCodeSequence[0]
    assert (kind.CodeValue, kind.CodingSchemeDesignator, kind.CodeMeaning) == ("64033007", "SCT", "Kidney")
    assert kind.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Left"
    assert lesion.SegmentedPropertyCategoryCodeSequence[0].CodeValue == "49755003"
    assert liver.SegmentAlgorithmType == "AUTOMATIC" and liver.SegmentAlgorithmName == "demo"
    algorithm = liver.SegmentationAlgorithmIdentificationSequence[0]
    assert algorithm.AlgorithmVersion == "cdcdcdcdcdcd"
    assert algorithm.AlgorithmFamilyCodeSequence[0].CodeMeaning == "Artificial Intelligence"
    shown = highdicom.color.CIELabColor.from_dicom_value(liver.RecommendedDisplayCIELabValue).to_rgb()
    np.testing.assert_allclose(shown, TABLE[0].colour, atol=2)
    assert (data.Manufacturer, data.Modality, data.SegmentsOverlap) == ("hilum", "SEG", "NO")


def test_a_persons_own_code_is_written(phantom: Result, tmp_path: Path) -> None:
    own = Code(value="X1", scheme="99HILUM", meaning="Transplant kidney")
    table = (TABLE[0], replace(TABLE[1], type=own), TABLE[2])
    data = pydicom.dcmread(written(replace(phantom, label_table=table), tmp_path))
    assert data.SegmentSequence[1].SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Transplant kidney"


def layout(data: Dataset, depth: int = 0) -> set[str]:
    """The names of all elements, with what they lie in."""
    found = set()
    for element in data:
        found.add(element.keyword)
        if element.VR == "SQ" and element.value and depth < 4:
            found |= {f"{element.keyword}.{name}" for name in layout(element.value[0], depth + 1)}
    return found


def test_it_has_everything_that_dcmqi_writes(phantom: Result, shared: Path, tmp_path: Path) -> None:
    theirs = pydicom.dcmread(shared / "data/zoo/dicom_seg_dcmqi/24x38x3/seg/label.seg")
    ours = pydicom.dcmread(written(phantom, tmp_path))
    their_own = re.compile("ClinicalTrial|SegmentDescription|StudyDescription")
    assert [name for name in layout(theirs) - layout(ours) if not their_own.search(name)] == []
    assert [item.DimensionIndexPointer for item in ours.DimensionIndexSequence] == [
        item.DimensionIndexPointer for item in theirs.DimensionIndexSequence
    ]
    assert all(ours[name].value == theirs[name].value for name in ("ImageType", "SegmentationType", "BitsAllocated"))


def test_the_same_result_is_the_same_object_and_another_result_another(phantom: Result, tmp_path: Path) -> None:
    def uids(result: Result, name: str) -> tuple[str, str]:
        data = pydicom.dcmread(written(result, tmp_path / name), stop_before_pixels=True)
        assert re.fullmatch(r"2\.25\.\d{1,39}", data.SOPInstanceUID)
        return data.SOPInstanceUID, data.SeriesInstanceUID

    assert uids(phantom, "one") == uids(phantom, "two")
    found = phantom.labels.voxels.copy()
    found[0, 3, 3, 3] = 0 if found[0, 3, 3, 3] else 7
    others = (
        replace(phantom, labels=phantom.labels.with_voxels(found)),
        replace(phantom, package_id="ef" * 32),
        replace(phantom, label_table=(replace(TABLE[0], name="spleen"), *TABLE[1:])),
    )
    assert len({uids(result, f"{n}") for n, result in enumerate((phantom, *others))}) == 4


def test_labels_that_were_not_found_are_left_out(phantom: Result, tmp_path: Path) -> None:
    found = np.where(phantom.labels.voxels == 7, 0, phantom.labels.voxels)
    result = replace(phantom, labels=phantom.labels.with_voxels(found))
    data = pydicom.dcmread(path := written(result, tmp_path))
    assert [(item.SegmentNumber, item.SegmentLabel) for item in data.SegmentSequence] == [(1, "liver"), (2, "lesion")]
    np.testing.assert_array_equal(read_labels(path, result.scan, NAMES).voxels, found)


@pytest.mark.parametrize("kind", ["binary", "labelmap"])
def test_nothing_found_is_an_object_that_says_what_was_sought(kind: str, phantom: Result, tmp_path: Path) -> None:
    result = replace(phantom, labels=phantom.labels.with_voxels(np.zeros_like(phantom.labels.voxels)))
    data = pydicom.dcmread(path := written(result, tmp_path, kind))
    assert [item.SegmentLabel for item in data.SegmentSequence if item.SegmentNumber] == list(NAMES)
    assert not read_labels(path, result.scan, NAMES).voxels.any()
    assert kind == "labelmap" or errors_in(path) == []


def test_three_hundred_labels_fit_both_kinds(tmp_path: Path) -> None:
    scan = scan_of(series_of(tmp_path / "series", oblique((20, 16, 4))))
    names = {f"thing {value}": value for value in range(2, 602, 2)}
    found = np.array([0, *names.values()], np.uint16)[np.arange(20 * 16 * 4).reshape(20, 16, 4) % 301]
    result = result_of(scan, found, label_table(names))
    for kind in ("binary", "labelmap"):
        path = written(result, tmp_path / kind, kind)
        np.testing.assert_array_equal(read_labels(path, scan, names).voxels[0], found)
    assert pydicom.dcmread(path).BitsAllocated == 16


def test_a_resampled_scan_has_frames_of_its_own_in_the_sources_frame_of_reference(
    phantom: Result, tmp_path: Path
) -> None:
    scan = phantom.scan
    affine = scan.geometry.affine @ np.diag([1, 1, 0.5, 1])
    finer = Geometry(shape=(13, 11, 17), affine=affine)
    resampled = Volume(
        voxels=np.zeros((1, 13, 11, 17), np.int16),
        geometry=finer,
        channels=("0",),
        provenance=replace(scan.provenance, slices=()),
    )
    result = result_of(resampled, blobs(finer.shape))
    data = pydicom.dcmread(path := written(result, tmp_path))
    np.testing.assert_array_equal(read_labels(path, resampled, NAMES).voxels, result.labels.voxels)
    np.testing.assert_array_equal(by_highdicom(path, result), result.labels.voxels[0])
    source = pydicom.dcmread(scan.provenance.files[0])
    assert data.FrameOfReferenceUID == source.FrameOfReferenceUID
    assert data.ReferencedSeriesSequence[0].SeriesInstanceUID == source.SeriesInstanceUID
    assert not data.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence
    assert errors_in(path) == []


def test_of_several_channels_the_series_that_lends_the_grid_is_named(tmp_path: Path) -> None:
    first = scan_of(series_of(tmp_path / "t1", oblique(), "MR", study="one"))
    second = scan_of(series_of(tmp_path / "t2", oblique((13, 11, 8)), "MR", study="one"))
    files = (*second.provenance.files, *first.provenance.files)
    both = replace(first, provenance=replace(first.provenance, files=files))
    data = pydicom.dcmread(written(result_of(both, blobs(both.geometry.shape)), tmp_path))
    source = pydicom.dcmread(first.provenance.files[0])
    assert data.ReferencedSeriesSequence[0].SeriesInstanceUID == source.SeriesInstanceUID


def test_a_scan_that_is_no_dicom_is_refused_by_this_output(phantom: Result, tmp_path: Path) -> None:
    provenance = Provenance(sources=("a.nii.gz",), files=(str(tmp_path / "a.nii.gz"),), reader="nibabel")
    (tmp_path / "a.nii.gz").write_bytes(b"\x1f\x8b")
    result = replace(phantom, scan=replace(phantom.scan, provenance=provenance))
    with pytest.raises(ScanError, match=r"not DICOM.*cannot be invented.*leave this output out"):
        written(result, tmp_path)


def changed(folder: Path, change: Callable[[Dataset], None]) -> Path:
    """Every slice of a series with its header changed."""
    for file in folder.iterdir():
        data = pydicom.dcmread(file)
        change(data)
        data.save_as(file)
    return folder


def odd_patient(data: Dataset) -> None:
    data.SpecificCharacterSet = "ISO_IR 192"
    data.PatientName = "Yamada^Tarou=山田^太郎"
    data.PatientID, data.IssuerOfPatientID = "Ä/17", "Klinik"
    for name in ("StudyID", "StudyDate", "StudyTime", "AccessionNumber", "PatientBirthDate", "PatientSex"):
        setattr(data, name, "")
    for name in ("ReferringPhysicianName", "PositionReferenceIndicator"):
        del data[name]
    data.SeriesNumber = None


def test_a_patient_is_taken_over_letter_by_letter(tmp_path: Path) -> None:
    scan = scan_of(changed(series_of(tmp_path / "series", oblique()), odd_patient))
    table = (replace(TABLE[0], name="肝臓 (Leber)"), *TABLE[1:])
    result = result_of(scan, blobs(scan.geometry.shape), table)
    data = pydicom.dcmread(path := written(result, tmp_path))
    assert (str(data.PatientName), data.PatientID, data.IssuerOfPatientID) == (
        "Yamada^Tarou=山田^太郎",
        "Ä/17",
        "Klinik",
    )
    assert data.SegmentSequence[0].SegmentLabel == "肝臓 (Leber)"
    assert data.SeriesNumber == 1000 and data.StudyDate == ""
    assert errors_in(path) == []


def test_a_patients_name_in_an_old_character_set_is_the_same_name(tmp_path: Path) -> None:
    def old(data: Dataset) -> None:
        data.SpecificCharacterSet = ["", "ISO 2022 IR 87"]
        data.PatientName = "Yamada^Tarou=山田^太郎=やまだ^たろう"

    scan = scan_of(changed(series_of(tmp_path / "series", oblique()), old))
    data = pydicom.dcmread(written(result_of(scan, blobs(scan.geometry.shape)), tmp_path))
    assert str(data.PatientName) == "Yamada^Tarou=山田^太郎=やまだ^たろう" and data.SpecificCharacterSet == "ISO_IR 192"


def test_values_that_are_against_the_standard_stay_as_the_archive_knows_them(tmp_path: Path) -> None:
    def wrong(data: Dataset) -> None:
        with pydicom.config.disable_value_validation():
            data.StudyID, data.PatientSex, data.StudyDate = "seventeen letters", "X", "2001.02.03"

    folder = series_of(tmp_path / "series", oblique())
    with pydicom.config.disable_value_validation():
        scan = scan_of(changed(folder, wrong))
        data = pydicom.dcmread(written(result_of(scan, blobs(scan.geometry.shape)), tmp_path))
        assert (data.StudyID, data.PatientSex, data.StudyDate) == ("seventeen letters", "X", "2001.02.03")


def test_identifiers_that_only_the_files_meta_information_kept_are_used(tmp_path: Path) -> None:
    def emptied(data: Dataset) -> None:
        data.SOPClassUID = data.SOPInstanceUID = ""

    folder = series_of(tmp_path / "series", oblique())
    known = {str(pydicom.dcmread(file).SOPInstanceUID) for file in folder.iterdir()}
    scan = scan_of(changed(folder, emptied))
    data = pydicom.dcmread(path := written(result_of(scan, blobs(scan.geometry.shape)), tmp_path))
    (series,) = data.ReferencedSeriesSequence
    assert {item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence} == known
    assert errors_in(path) == []


def test_a_scan_of_no_study_is_refused_by_name(tmp_path: Path) -> None:
    def without(data: Dataset) -> None:
        data.StudyInstanceUID = ""

    scan = scan_of(changed(series_of(tmp_path / "series", oblique()), without))
    with pytest.raises(ScanError, match=r"no valid StudyInstanceUID.*Export"):
        written(result_of(scan, blobs(scan.geometry.shape)), tmp_path)


def test_names_that_dicom_cannot_hold_are_made_to_fit(phantom: Result, tmp_path: Path) -> None:
    table = (replace(TABLE[0], name="a\\b\n\x00" + "c" * 99), *TABLE[1:])
    result = replace(phantom, label_table=table, package_name="\\" * 3 + "x" * 200, package_id="\x00")
    data = pydicom.dcmread(path := written(result, tmp_path))
    assert data.SegmentSequence[0].SegmentLabel == "a/b " + "c" * 60
    assert errors_in(path) == []


@pytest.mark.parametrize(
    ("folder", "multiframe"),
    [
        ("hippocampus-dicom/Study1", False),
        ("zoo/dicom_ibsi_STS019_CT/image", False),
        ("zoo/dicom_enhanced_ct_vs_classic", True),
        ("zoo/dicom_enhanced_mr_philips", True),
        ("zoo/dicom_d2n_generic_anatomical_002_non_isotropic", False),
    ],
)
def test_real_scans_get_objects_that_lie_right_and_are_valid(
    folder: str, multiframe: bool, shared: Path, tmp_path: Path
) -> None:
    paths = sorted(path for path in (shared / "data" / folder).rglob("*") if path.is_file())
    series, _ = dicom.series_in([path for path in paths if path.name != "slice1.dcm"])
    scan = dicom.read(series[0])
    result = result_of(scan, blobs(scan.geometry.shape))
    path = written(result, tmp_path)
    np.testing.assert_array_equal(read_labels(path, scan, NAMES).voxels, result.labels.voxels)
    np.testing.assert_array_equal(by_highdicom(path, result), result.labels.voxels[0])
    with pydicom.config.disable_value_validation():
        data = pydicom.dcmread(path)
    named = data.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0].SourceImageSequence[0]
    assert ("ReferencedFrameNumber" in named) is multiframe
    # the source's own StudyID is too long, and is kept
    assert [error for error in errors_in(path) if "Study ID" not in error and "invalid data values" not in error] == []
