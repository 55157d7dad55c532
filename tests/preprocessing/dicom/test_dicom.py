"""A DICOM series is read as SimpleITK and others read it, or refused with the reason."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import RLELossless, generate_uid

from preprocessing import dicom
from preprocessing.reading import Reading
from preprocessing.volume import UnreadableScan
from tests.preprocessing.dicom.slices import (
    SHAPE,
    a_stack,
    a_volume,
    an_affine,
    as_simpleitk_reads,
    read_one,
    save,
    turned,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound series of six slices."""
    dicom.write_series(a_volume(), tmp_path / "series", description="sound")
    return tmp_path / "series"


def change(path: Path, **values: object) -> None:
    data = pydicom.dcmread(path)
    for tag, value in values.items():
        if value is None:
            delattr(data, tag)
        else:
            setattr(data, tag, value)
    data.save_as(path)


def change_all(folder: Path, **values: object) -> None:
    for path in folder.iterdir():
        change(path, **values)


# real scans


@pytest.mark.parametrize(("tree", "count"), [("hippocampus-dicom", 3), ("brain-tumor-progression", 15)])
def test_real_series_lie_where_simpleitk_puts_them_voxel_by_voxel(shared: Path, tree: str, count: int) -> None:
    series, left_alone = dicom.series_in([path for path in (shared / "data" / tree).rglob("*") if path.is_file()])
    assert len(series) == count and not left_alone
    for one in series:
        volume = dicom.read(one)
        voxels, affine = as_simpleitk_reads(one.paths[0].parent)
        np.testing.assert_array_equal(volume.voxels[0], voxels, err_msg=str(one.paths[0].parent))
        np.testing.assert_allclose(volume.geometry.affine, affine, atol=1e-4, err_msg=str(one.paths[0].parent))
        assert volume.provenance.repairs == ()


def test_a_mask_kept_as_secondary_capture_with_geometry_is_read_as_integers(shared: Path) -> None:
    folders = sorted((shared / "data" / "brain-tumor-progression").rglob("*MaskTumor*"))
    assert len(folders) == 3
    for folder in folders:
        mask = read_one(folder)
        assert mask.voxels.dtype.kind == "i" and set(np.unique(mask.voxels)) == {0, 1}


ZOO = {
    "dicom_12bit_garbage_highbits": {"contradiction": 1},  # two files under one UID
    "dicom_ct_4d_toshiba": {"contradiction": 37},  # classic and enhanced under one UID
    "dicom_ct_ge_tilt_varspacing": {"uneven_spacing": 1},
    "dicom_ct_philips_localizer": {},
    "dicom_ct_siemens_j2k": {"repaired": 1},  # half anonymised
    "dicom_d2n_failing_gantrytilting_001": {"tilted": 1},
    "dicom_d2n_failing_slicecount_001": {"too_few_slices": 1},
    "dicom_d2n_failing_sliceincrement_001": {"missing_slices": 1},
    "dicom_d2n_ge_dti_001": {"repaired": 2},  # nothing but instance numbers tells them apart
    "dicom_d2n_ge_fmri_001": {"repaired": 2},
    "dicom_d2n_generic_anatomical_001": {"fine": 1},
    "dicom_d2n_generic_compressed_j2k_001": {"fine": 1},
    "dicom_d2n_generic_rgb_001": {"colour": 1},
    "dicom_d2n_philips_dti_001": {"too_few_slices": 4},
    "dicom_d2n_philips_enhanced_anatomical_001": {"fine": 1},
    "dicom_d2n_philips_enhanced_fmri_001": {"fine": 4},
    "dicom_d2n_philips_fmri_001": {"too_few_slices": 4},
    "dicom_d2n_siemens_multiframe_anatomical_001": {"fine": 1},
    "dicom_deid_us_burnedin": {"colour": 1, "unsupported": 1},
    "dicom_enhanced_agfa_rewritten": {"fine": 2},
    "dicom_enhanced_mr_philips": {"fine": 2},
    "dicom_fragmented_jpegll": {"fine": 1},
    "dicom_ibsi_STS019_CT": {"fine": 1},
    "dicom_mr_canon_dti": {"fine": 1},
    "dicom_mr_ge_3plane_localizer": {},
    "dicom_mr_multiecho_one_series": {"fine": 2},
    "dicom_mr_siemens_HFS": {"fine": 1},
    "dicom_nonimage_philips_raw": {},
    "dicom_pydicom_dicomdir": {"too_few_slices": 3, "missing_slices": 1, "unsupported": 1},
}
"""Of every real hard case: how many volumes are fine, repaired, or refused for which reason."""


@pytest.mark.parametrize("folder", ZOO)
def test_real_hard_cases_come_out_as_a_radiologist_would_have_it(shared: Path, folder: str) -> None:
    files = [path for path in (shared / "data" / "zoo" / folder).rglob("*") if path.is_file()]
    if not files:
        pytest.skip(f"{folder} is not among the real scans")
    series, left_alone = dicom.series_in(files)
    assert {path for one in series for path in one.paths} | set(left_alone) == set(files)
    assert not {path for one in series for path in one.paths} & set(left_alone)
    found = Counter()
    for one in series:
        try:
            found[dicom.read(one).provenance.verdict] += 1
        except UnreadableScan as refusal:
            found[refusal.reason] += 1
    assert found == ZOO[folder]


def test_a_tilted_and_uneven_head_is_straightened_where_allowed(shared: Path) -> None:
    """Its bone lies where the slices have it: every pixel of a slice is found again at its place."""
    folder = shared / "data" / "zoo" / "dicom_ct_ge_tilt_varspacing"
    if not folder.is_dir():
        pytest.skip("the tilted head is not among the real scans")
    (series,), _ = dicom.series_in(list(folder.iterdir()))
    volume = dicom.read(series, Reading(allow=("tilt", "uneven")))
    assert not volume.geometry.is_sheared and volume.provenance.slices == ()
    lowest = pydicom.dcmread(folder / "11.dcm")  # the grid's first slice is this one, moved by nothing but its shift
    row, column = np.array(lowest.ImageOrientationPatient, float).reshape(2, 3)
    points = np.array(lowest.ImagePositionPatient, float) + np.outer(np.arange(100, 400) * 0.4882812, row + column)
    i, j, k = np.rint(volume.geometry.to_voxel(points * [-1, -1, 1])).astype(int).T
    assert set(k) == {0}
    stored = lowest.pixel_array[np.arange(100, 400), np.arange(100, 400)]
    np.testing.assert_array_equal(volume.voxels[0, i, j, k], np.where(stored == -1500, volume.voxels.min(), stored))


REFERENCES = {
    "dicom_d2n_generic_anatomical_001": "dicom_d2n_ground_truth_nifti/67bc44_001_ground_truth.nii.gz",
    "dicom_d2n_generic_anatomical_002_non_isotropic": (
        "dicom_d2n_ground_truth_nifti/002_non_isotropic_ground_truth.nii.gz"
    ),
    "dicom_d2n_hitachi_anatomical_001": "dicom_d2n_ground_truth_nifti/bca91b_001_ground_truth.nii.gz",
    "dicom_d2n_ge_fmri_001": "dicom_d2n_ground_truth_nifti/001_ground_truth.nii.gz",
    "dicom_d2n_philips_enhanced_anatomical_001": "dicom_d2n_ground_truth_nifti/8bdba4_001_ground_truth.nii.gz",
    "dicom_ibsi_STS019_CT": "dicom_ibsi_STS019_nifti_reference/CT_image.nii.gz",
    "dicom_ibsi_STS019_MR_T1": "dicom_ibsi_STS019_nifti_reference/MR_T1_image.nii.gz",
}
"""Scans of which others have made a NIfTI file."""


@pytest.mark.parametrize("folder", REFERENCES)
def test_real_scans_are_what_others_made_of_them_voxel_by_voxel(shared: Path, folder: str) -> None:
    files = [path for path in (shared / "data" / "zoo" / folder).rglob("*") if path.is_file()]
    if not files:
        pytest.skip(f"{folder} is not among the real scans")
    reference = nibabel.load(shared / "data" / "zoo" / REFERENCES[folder])
    values = reference.get_fdata()
    for number, one in enumerate(sorted(dicom.series_in(files)[0], key=lambda one: one.part)):
        volume = dicom.read(one)
        ijk = np.stack(np.meshgrid(*map(np.arange, volume.geometry.shape), indexing="ij"), axis=-1)
        there = nibabel.affines.apply_affine(np.linalg.inv(reference.affine), volume.geometry.to_world(ijk))
        at = np.rint(there).astype(int)
        assert sorted(volume.geometry.shape) == sorted(values.shape[:3]) and at.min() == 0
        off = nibabel.affines.apply_affine(reference.affine, at) - volume.geometry.to_world(ijk)
        assert np.abs(off).max() < 1e-4
        theirs = (values[..., number] if values.ndim == 4 else values)[tuple(np.moveaxis(at, -1, 0))]
        np.testing.assert_allclose(volume.voxels[0], theirs, rtol=1e-6, atol=1e-5)


# what a reader must not stumble over


def test_names_and_numbers_of_slices_do_not_matter(folder: Path) -> None:
    before = read_one(folder)
    for number, path in enumerate(sorted(folder.iterdir(), key=lambda path: hash(path.name[::-1]))):
        change(path, InstanceNumber=17 * number % 7, SliceLocation="999", SliceThickness="0.3")
        path.rename(folder / f"IM{(number * 5) % 6}")
    after = read_one(folder)
    np.testing.assert_array_equal(after.voxels, before.voxels)
    assert after.geometry.matches(before.geometry)


def test_the_spacing_between_rows_is_the_first_of_the_two(folder: Path) -> None:
    change_all(folder, PixelSpacing=[2, 3])
    assert read_one(folder).geometry.spacing == pytest.approx((3, 2, 2.5))


def test_every_slice_is_rescaled_by_its_own_numbers(folder: Path) -> None:
    before = read_one(folder).voxels
    paths = sorted(folder.iterdir())
    for number, path in enumerate(paths):
        change(path, RescaleSlope=str(1 + number / 2), RescaleIntercept=str(-number))
    after = read_one(folder).voxels
    assert after.dtype == np.float32
    for k in range(6):
        np.testing.assert_allclose(after[..., k], before[..., k] * (1 + k / 2) - k)


def test_bits_above_those_stored_are_masked_and_the_sign_is_kept(folder: Path) -> None:
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        pixels = (np.full((4, 5), -5, "<i2") & 0x0FFF) | 0x7000  # -5 in 12 bits, rubbish above
        data.BitsStored, data.HighBit, data.PixelData = 12, 11, pixels.astype("<i2").tobytes()
        data.save_as(path)
    assert np.all(read_one(folder).voxels == -5)
    change_all(folder, PixelRepresentation=0)
    assert np.all(read_one(folder).voxels == 4091)


def test_unsigned_values_above_32767_stay_what_they_are(folder: Path) -> None:
    for path in folder.iterdir():
        change(path, PixelRepresentation=0, PixelData=np.full((4, 5), 65535, "<u2").tobytes())
    found = read_one(folder)
    assert found.voxels.dtype == np.int32 and np.all(found.voxels == 65535)


def test_monochrome1_changes_how_a_scan_looks_and_not_its_values(folder: Path) -> None:
    before = read_one(folder).voxels
    change_all(folder, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(read_one(folder).voxels, before)


def test_run_length_encoded_slices_are_decoded(folder: Path) -> None:
    before = read_one(folder).voxels
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        data.compress(RLELossless)
        data.save_as(path)
    np.testing.assert_array_equal(read_one(folder).voxels, before)


def test_a_slice_that_lies_there_twice_counts_once(folder: Path) -> None:
    shutil.copy(folder / "0003.dcm", folder / "copy of 0003.dcm")
    found = read_one(folder)
    assert found.geometry.shape == SHAPE and "twice" in found.provenance.repairs[0]


def test_positions_rounded_to_a_hundredth_are_no_gap_and_no_tilt(tmp_path: Path) -> None:
    affine = an_affine(turned((1, 1, 0), 0.3), (0.7, 0.7, 1.1))
    for path in dicom.write_series(a_volume(affine=affine), tmp_path, description="jitter"):
        change(path, ImagePositionPatient=[round(float(x), 2) for x in pydicom.dcmread(path).ImagePositionPatient])
    np.testing.assert_allclose(read_one(tmp_path).geometry.affine, affine, atol=0.01)


def test_uids_missing_from_the_data_are_taken_from_the_file_meta(folder: Path) -> None:
    before = read_one(folder)
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        data.SOPClassUID = data.SOPInstanceUID = data.StudyInstanceUID = ""
        data.save_as(path, enforce_file_format=False)
    np.testing.assert_array_equal(read_one(folder).voxels, before.voxels)


def test_series_of_a_tree_are_kept_apart_and_the_rest_is_listed(tmp_path: Path) -> None:
    for number in range(3):
        dicom.write_series(a_volume(number), tmp_path / str(number), description=f"series {number}", study="one")
    mixed = tmp_path / "0"
    for path in [*(tmp_path / "1").iterdir(), *(tmp_path / "2").iterdir()]:
        path.rename(mixed / f"{path.parent.name}-{path.name}")
    (mixed / "notes.txt").write_text("no DICOM")
    (mixed / "broken.dcm").write_bytes(b"\x00" * 128 + b"DICM" + b"\xff" * 300)
    (mixed / "empty.dcm").touch()
    for name, values in {
        "localizer": {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]},
        "capture": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7", "ImagePositionPatient": None},
        "report": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.11", "Rows": None},
        "mask": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.66.4"},
    }.items():
        shutil.copy(mixed / "0001.dcm", mixed / name)
        change(mixed / name, SOPInstanceUID=generate_uid(), **values)
    series, left_alone = dicom.series_in([*mixed.iterdir(), tmp_path, tmp_path / "missing"])
    assert sorted(one.description for one in series) == ["series 0", "series 1", "series 2"]
    assert {one.study_uid for one in series} == {series[0].study_uid}
    assert all(len(one.paths) == 6 and one.modality == "MR" for one in series)
    for name, reason in {
        **{"notes.txt": "not DICOM", "broken.dcm": dicom.DAMAGED, "empty.dcm": dicom.DAMAGED, "report": "no image"},
        **{"localizer": "localizer", "capture": "secondary capture", "mask": "segmentation"},
    }.items():
        assert reason in left_alone[mixed / name]
    assert left_alone[tmp_path] == left_alone[tmp_path / "missing"] == "no file"


# what is refused


def spoil_one(**values: object) -> Callable[[Path], None]:
    return lambda folder: change(folder / "0004.dcm", **values)


def spoil_all(**values: object) -> Callable[[Path], None]:
    return lambda folder: change_all(folder, **values)


def move(step: Callable[[int], np.ndarray]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for number, path in enumerate(sorted(folder.iterdir())):
            position = np.array(pydicom.dcmread(path).ImagePositionPatient, float) + step(number)
            change(path, ImagePositionPatient=[float(f"{x:.6f}") for x in position])

    return spoil


def truncate(folder: Path) -> None:
    path = folder / "0004.dcm"
    path.write_bytes(path.read_bytes()[:-9])


def second_time_point(folder: Path) -> None:
    for path in list(folder.iterdir()):
        shutil.copy(path, folder / f"t2-{path.name}")
        change(folder / f"t2-{path.name}", SOPInstanceUID=generate_uid(), PixelData=bytes(40))


def same_uid_other_bytes(folder: Path) -> None:
    shutil.copy(folder / "0004.dcm", folder / "other.dcm")
    change(folder / "other.dcm", InstanceNumber=99)


def other_syntax(folder: Path) -> None:
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        data.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"
        data["PixelData"].is_undefined_length = True
        data.PixelData = pydicom.encaps.encapsulate([data.PixelData])
        data.save_as(path)


def broken_encapsulation(folder: Path) -> None:
    data = pydicom.dcmread(folder / "0004.dcm")
    data.compress(RLELossless)
    data.PixelData = data.PixelData[:60]
    data.save_as(folder / "0004.dcm")


def only_one(folder: Path) -> None:
    for path in sorted(folder.iterdir())[1:]:
        path.unlink()


SPOILT = {
    "one slice has no position": (spoil_one(ImagePositionPatient=None), "no_geometry", "no ImagePositionPatient"),
    "no slice has an orientation": (
        spoil_all(ImageOrientationPatient=None),
        "no_geometry",
        "no ImageOrientationPatient",
    ),
    "an empty position": (spoil_one(ImagePositionPatient=""), "no_geometry", "no ImagePositionPatient"),
    "no pixel spacing": (spoil_all(PixelSpacing=None), "no_geometry", "no PixelSpacing"),
    "a spacing of zero": (spoil_all(PixelSpacing=[0, 1]), "no_geometry", "not positive"),
    "cosines that are none": (spoil_all(ImageOrientationPatient=[1, 0, 0, 0.2, 1, 0]), "no_geometry", "right angle"),
    "another orientation": (spoil_one(ImageOrientationPatient=[0, 1, 0, 0, 0, 1]), "missing_slices", "orientation"),
    "another pixel spacing": (spoil_one(PixelSpacing=[1, 1]), "missing_slices", "spacing"),
    "another frame of reference": (spoil_one(FrameOfReferenceUID="1.2.3"), "missing_slices", "reference"),
    "another size": (spoil_one(Rows=2, PixelData=bytes(20)), "missing_slices", "4 x 5"),
    "a missing slice": (
        lambda folder: (folder / "0003.dcm").unlink(),
        "missing_slices",
        "misses slices: between 0002.dcm and 0004.dcm",
    ),
    "an uneven step": (move(lambda k: np.array([0, 0, 0.3 * (k == 4)])), "uneven_spacing", "uneven"),
    "a drifting step": (move(lambda k: np.array([0, 0, 0.02 * k * k])), "uneven_spacing", "uneven"),
    "a tilted gantry": (move(lambda k: np.array([0, 0.5 * k, 0])), "tilted", "tilt"),
    "two time points": (second_time_point, "duplicate_slices", "several slices lie that differ"),
    "one UID for two objects": (same_uid_other_bytes, "contradiction", "bear one SOPInstanceUID"),
    "a single slice": (only_one, "too_few_slices", "1 slice"),
    "many frames": (spoil_all(NumberOfFrames=3), "damaged", "40 bytes"),
    "an enhanced object": (spoil_all(SOPClassUID="1.2.840.10008.5.1.4.1.1.4.1"), "unsupported", "Enhanced MR"),
    "an ultrasound": (spoil_all(SOPClassUID="1.2.840.10008.5.1.4.1.1.6.1"), "unsupported", "Ultrasound"),
    "a mosaic": (spoil_all(ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"]), "no_geometry", "mosaic"),
    "colour": (spoil_all(PhotometricInterpretation="RGB", SamplesPerPixel=3), "colour", "coloured"),
    "palette colour": (spoil_all(PhotometricInterpretation="PALETTE COLOR"), "colour", "coloured"),
    "bits at another place": (spoil_all(BitsStored=12, HighBit=15), "contradiction", "stored 12, high bit 15"),
    "a slope of zero": (spoil_all(RescaleSlope="0"), "values", "RescaleSlope"),
    "two slopes": (spoil_one(RescaleSlope=["1", "2"]), "values", "RescaleSlope nan"),
    "an empty lookup table": (spoil_all(ModalityLUTSequence=[pydicom.Dataset()]), "values", "lookup table"),
    "an unknown transfer syntax": (other_syntax, "encoding", "MPEG2"),
    "truncated pixels": (truncate, "damaged", "0004.dcm"),
    "too many pixels": (spoil_one(PixelData=bytes(60)), "damaged", "0004.dcm"),
    "pixels that do not decode": (broken_encapsulation, "damaged", "0004.dcm has truncated or damaged"),
    "no pixels": (spoil_one(PixelData=None), "damaged", "0004.dcm"),
    "no size": (spoil_one(Rows=None), "", "Rows"),
    "an incredible size": (spoil_all(Rows=65535, Columns=65535), "too_large", "65535 x 65535"),
}


@pytest.mark.parametrize("case", SPOILT)
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_a_spoilt_series_is_refused_with_the_reason(case: str, folder: Path) -> None:
    spoil, reason, words = SPOILT[case]
    spoil(folder)
    series, _ = dicom.series_in(list(folder.iterdir()))
    with pytest.raises(UnreadableScan) as refusal:
        dicom.read(max(series, key=lambda one: len(one.paths)))
    assert words in str(refusal.value) and refusal.value.reason == (reason or refusal.value.reason)
    assert "hilum" not in str(refusal.value).lower()  # the patient's name and number in these files


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_no_damage_gets_past_as_another_error(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("series")
    path = dicom.write_series(a_volume(), folder, description="x")[2]
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for at in data.draw(st.lists(st.integers(132, len(content) - 1), min_size=1, max_size=8)):
            content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    for series in dicom.series_in(list(folder.iterdir()))[0]:
        try:
            dicom.read(series)
        except UnreadableScan as refusal:
            assert str(refusal)


def test_a_deflated_series_is_read(folder: Path) -> None:
    before = read_one(folder).voxels
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        data.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
        data.save_as(path)
    np.testing.assert_array_equal(read_one(folder).voxels, before)


@pytest.mark.parametrize("tag", ["PatientID", "StudyInstanceUID"])
def test_a_slice_that_does_not_name_its_patient_or_study_is_no_series_of_its_own(tag: str, tmp_path: Path) -> None:
    """The last slice leaves no gap: apart from its series, nobody would miss it."""
    save(tmp_path, a_stack(5, **{"PatientID": "P", tag: lambda k: "" if k == 4 else "1.2"}))
    volume = read_one(tmp_path)
    assert volume.geometry.shape[2] == 5 and "was not named in some slices" in volume.provenance.repairs[0]


def test_slices_of_nobody_go_to_neither_of_two_patients(tmp_path: Path) -> None:
    save(tmp_path, a_stack(5, PatientID=lambda k: ["A", "A", "B", "B", ""][k]))
    assert len(dicom.series_in(list(tmp_path.iterdir()))[0]) == 3


def test_what_is_named_like_the_slices_beside_it_was_one(tmp_path: Path) -> None:
    save(tmp_path, a_stack(5), name="IM{:04d}".format)
    (tmp_path / "IM0005").write_bytes(b"")
    (tmp_path / "README").write_bytes(b"")
    _, left_alone = dicom.series_in(list(tmp_path.iterdir()))
    assert left_alone[tmp_path / "IM0005"].startswith(dicom.DAMAGED) and left_alone[tmp_path / "README"] == "not DICOM"


def test_a_link_that_leads_nowhere_may_have_been_a_slice(tmp_path: Path) -> None:
    paths = save(tmp_path, a_stack(5))
    paths[4].unlink()
    paths[4].symlink_to(tmp_path / "gone")
    (tmp_path / "notes.txt").symlink_to(tmp_path / "gone")
    _, left_alone = dicom.series_in(list(tmp_path.iterdir()))
    assert left_alone[paths[4]].startswith(dicom.DAMAGED)
    assert left_alone[tmp_path / "notes.txt"] == "a link that leads nowhere"
