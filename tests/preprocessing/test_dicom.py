"""A DICOM series is read as SimpleITK reads it, or refused with the reason; what we write, others read."""

import re
import shutil
import subprocess
from collections.abc import Callable
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pydicom.uid import JPEGLosslessSV1, RLELossless, generate_uid

from preprocessing import dicom
from preprocessing.volume import Geometry, ScanError, UnreadableScan, Volume

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
SHAPE = (5, 4, 6)


def a_volume(seed: int = 0, affine: np.ndarray | None = None, kind: str = "int16") -> Volume:
    random = np.random.default_rng(seed)
    voxels = random.integers(-1000, 3000, SHAPE).astype(kind)
    if affine is None:
        affine = an_affine(np.eye(3), (0.7, 0.9, 2.5))
    return Volume(voxels=voxels[None], geometry=Geometry(shape=SHAPE, affine=affine), channels=("0",))


def an_affine(
    direction: np.ndarray, spacing: tuple[float, ...], origin: tuple[float, ...] = (-90, 30, 7)
) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = direction * np.array(spacing)
    affine[:3, 3] = origin
    return affine


def turned(axis: tuple[float, ...], angle: float) -> np.ndarray:
    """The rotation by `angle` about `axis` (Rodrigues)."""
    x, y, z = np.array(axis) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def read_back(folder: Path) -> Volume:
    series, left_alone = dicom.series_in(list(folder.iterdir()))
    assert len(series) == 1 and not left_alone
    return dicom.read(series[0])


def as_simpleitk_reads(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    (uid,) = SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid)
    image = SimpleITK.ReadImage(names)
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0), LPS_TO_RAS @ affine


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
        mask = read_back(folder)
        assert mask.voxels.dtype.kind == "i" and set(np.unique(mask.voxels)) == {0, 1}


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("dicom_ct_ge_tilt_varspacing", "uneven|misses"),
        ("dicom_d2n_failing_gantrytilting_001", "tilt"),
        ("dicom_d2n_failing_sliceincrement_001", "misses slices|uneven"),
        ("dicom_mr_ge_3plane_localizer", "mixes|localizer"),
        ("dicom_mr_multiecho_one_series", "already"),
        ("dicom_enhanced_mr_philips", "multi-frame"),
        ("dicom_d2n_generic_rgb_001", "coloured|class"),
    ],
)
def test_real_hard_cases_are_refused_with_their_reason(shared: Path, folder: str, reason: str) -> None:
    files = [path for path in (shared / "data" / "zoo" / folder).rglob("*") if path.is_file()]
    if not files:
        pytest.skip(f"{folder} is not among the real scans")
    series, left_alone = dicom.series_in(files)
    messages = list(left_alone.values())
    for one in series:
        with pytest.raises(UnreadableScan) as refusal:
            dicom.read(one)
        messages.append(str(refusal.value))
    assert re.search(reason, " ".join(messages)), messages


# what is written is read again


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_all_axis_orders_and_flips_survive_a_series(order: tuple[int, ...], tmp_path: Path) -> None:
    for number, signs in enumerate(product((1, -1), repeat=3)):
        direction = np.eye(3)[:, order] * np.array(signs)
        volume = a_volume(affine=an_affine(turned((1, 2, 3), 0.2) @ direction, (0.7, 0.9, 2.5)))
        folder = tmp_path / str(number)
        dicom.write_series(volume, folder, description="axes")
        assert_same_in_the_patient(read_back(folder), volume)


def assert_same_in_the_patient(found: Volume, wanted: Volume, tolerance: float = 0) -> None:
    voxels, affine = wanted.voxels, wanted.geometry.affine
    if np.linalg.det(affine @ LPS_TO_RAS) < 0:  # left-handed: the slices come back in the opposite order
        last = np.eye(4)
        last[2, 2:] = [-1, voxels.shape[3] - 1]
        voxels, affine = voxels[..., ::-1], affine @ last
    np.testing.assert_allclose(found.geometry.affine, affine, atol=1e-4)
    np.testing.assert_allclose(found.voxels.astype(float), voxels, rtol=3e-7, atol=tolerance)


@settings(max_examples=25, deadline=None)
@given(
    voxels=arrays.arrays(
        st.sampled_from([np.float32, np.int16, np.uint16, np.uint8, np.int32, np.float64]),
        (2, 3, 2),
        elements={"min_value": 0, "max_value": 255},
    ),
    axis=st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda axis: np.linalg.norm(axis) > 0.1),
    angle=st.floats(-3.1, 3.1),
    spacing=st.tuples(*[st.floats(0.05, 12)] * 3),
    origin=st.tuples(*[st.floats(-1500, 1500)] * 3),
)
def test_a_series_keeps_values_within_half_a_step_and_the_affine(
    voxels: np.ndarray,
    axis: tuple[float, ...],
    angle: float,
    spacing: tuple[float, ...],
    origin: tuple[float, ...],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    geometry = Geometry(shape=voxels.shape, affine=an_affine(turned(axis, angle), spacing, origin))
    volume = Volume(voxels=voxels[None], geometry=geometry, channels=("0",))
    folder = tmp_path_factory.mktemp("series")
    dicom.write_series(volume, folder, description="values")
    found = read_back(folder)
    slope = float(pydicom.dcmread(folder / "0001.dcm").RescaleSlope)
    assert_same_in_the_patient(found, volume, tolerance=slope / 2 if found.voxels.dtype.kind == "f" else 0)
    assert voxels.dtype.kind == "f" or found.voxels.dtype.kind == "i"


@pytest.mark.parametrize(
    "values",
    [[0, 65535], [-70000, -10000], [1e-7, 3e-7], [-2e9, 2e9], [5.5, 5.5], [-0.1, 40000.3], [2**30, 2**30 + 7]],
)
def test_any_range_of_values_fits_into_sixteen_bits(values: list[float], tmp_path: Path) -> None:
    voxels = np.linspace(*values, num=int(np.prod(SHAPE)), dtype=np.float32).reshape(1, *SHAPE)
    volume = a_volume().with_voxels(voxels)
    dicom.write_series(volume, tmp_path / "s", description="range")
    slope = float(pydicom.dcmread(tmp_path / "s" / "0001.dcm").RescaleSlope)
    assert_same_in_the_patient(read_back(tmp_path / "s"), volume, tolerance=slope / 2)


@pytest.mark.parametrize("spacing", [9.999999999999998, 1 / 3, 0.1 / 7])
def test_a_spacing_of_many_digits_is_spelt_in_sixteen_characters(spacing: float, tmp_path: Path) -> None:
    affine = an_affine(turned((1, 0, 1), 2.0), (spacing, spacing, spacing), origin=(-1 / 3, 2e-16, -1e-17))
    dicom.write_series(a_volume(affine=affine), tmp_path, description="digits")
    np.testing.assert_allclose(read_back(tmp_path).geometry.affine, affine, atol=1e-9)


@pytest.mark.parametrize("modality", ["MR", "CT"])
def test_simpleitk_reads_what_we_write(modality: str, tmp_path: Path) -> None:
    volume = a_volume(affine=an_affine(turned((3, -1, 2), 0.5), (0.5, 0.8, 3)))
    dicom.write_series(volume, tmp_path, description="oblique", modality=modality)
    voxels, affine = as_simpleitk_reads(tmp_path)
    np.testing.assert_array_equal(voxels, volume.voxels[0])
    np.testing.assert_allclose(affine, volume.geometry.affine, atol=1e-4)


def test_the_same_volume_makes_the_same_files_and_another_makes_other_uids(tmp_path: Path) -> None:
    one = dicom.write_series(a_volume(), tmp_path / "one", description="x", study="case 1")
    two = dicom.write_series(a_volume(), tmp_path / "two", description="x", study="case 1")
    other = dicom.write_series(a_volume(1), tmp_path / "other", description="x", study="case 1")
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    first, second = pydicom.dcmread(one[0]), pydicom.dcmread(other[0])
    assert first.SeriesInstanceUID != second.SeriesInstanceUID and first.SOPInstanceUID != second.SOPInstanceUID
    assert first.StudyInstanceUID == second.StudyInstanceUID
    assert first.FrameOfReferenceUID == second.FrameOfReferenceUID


@pytest.mark.parametrize("tool", ["dcmdump", "dciodvfy"])
@pytest.mark.parametrize("modality", ["MR", "CT"])
def test_tools_for_dicom_find_nothing_wrong(tool: str, modality: str, tmp_path: Path) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    path = dicom.write_series(a_volume(), tmp_path, description="valid", modality=modality)[0]
    done = subprocess.run([tool, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert not [
        line for line in (done.stderr + done.stdout).splitlines() if line.lower().startswith(("e:", "w:", "error"))
    ]


@pytest.mark.parametrize(
    "volume",
    [
        a_volume().with_voxels(np.zeros((2, *SHAPE)), channels=("a", "b")),
        a_volume(affine=an_affine(np.array([[1, 0.2, 0], [0, 1, 0], [0, 0, 1]]), (1, 1, 1))),
        a_volume().with_voxels(np.full((1, *SHAPE), np.nan)),
    ],
)
def test_what_a_series_cannot_hold_is_not_written(volume: Volume, tmp_path: Path) -> None:
    with pytest.raises(ScanError):
        dicom.write_series(volume, tmp_path, description="no")
    with pytest.raises(ScanError, match="modality"):
        dicom.write_series(a_volume(), tmp_path, description="no", modality="US")
    assert not list(tmp_path.iterdir())


# what a reader must not stumble over


def test_names_and_numbers_of_slices_do_not_matter(folder: Path) -> None:
    before = read_back(folder)
    for number, path in enumerate(sorted(folder.iterdir(), key=lambda path: hash(path.name[::-1]))):
        change(path, InstanceNumber=17 * number % 7, SliceLocation="999", SliceThickness="0.3")
        path.rename(folder / f"IM{(number * 5) % 6}")
    after = read_back(folder)
    np.testing.assert_array_equal(after.voxels, before.voxels)
    assert after.geometry.matches(before.geometry)


def test_the_spacing_between_rows_is_the_first_of_the_two(folder: Path) -> None:
    change_all(folder, PixelSpacing=[2, 3])
    assert read_back(folder).geometry.spacing == pytest.approx((3, 2, 2.5))


def test_every_slice_is_rescaled_by_its_own_numbers(folder: Path) -> None:
    before = read_back(folder).voxels
    paths = sorted(folder.iterdir())
    for number, path in enumerate(paths):
        change(path, RescaleSlope=str(1 + number / 2), RescaleIntercept=str(-number))
    after = read_back(folder).voxels
    assert after.dtype == np.float32
    for k in range(6):
        np.testing.assert_allclose(after[..., k], before[..., k] * (1 + k / 2) - k)


def test_bits_above_those_stored_are_masked_and_the_sign_is_kept(folder: Path) -> None:
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        pixels = (np.full((4, 5), -5, "<i2") & 0x0FFF) | 0x7000  # -5 in 12 bits, rubbish above
        data.BitsStored, data.HighBit, data.PixelData = 12, 11, pixels.astype("<i2").tobytes()
        data.save_as(path)
    assert np.all(read_back(folder).voxels == -5)
    change_all(folder, PixelRepresentation=0)
    assert np.all(read_back(folder).voxels == 4091)


def test_unsigned_values_above_32767_stay_what_they_are(folder: Path) -> None:
    for path in folder.iterdir():
        change(path, PixelRepresentation=0, PixelData=np.full((4, 5), 65535, "<u2").tobytes())
    found = read_back(folder)
    assert found.voxels.dtype == np.int32 and np.all(found.voxels == 65535)


def test_monochrome1_changes_how_a_scan_looks_and_not_its_values(folder: Path) -> None:
    before = read_back(folder).voxels
    change_all(folder, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(read_back(folder).voxels, before)


def test_run_length_encoded_slices_are_decoded(folder: Path) -> None:
    before = read_back(folder).voxels
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        data.compress(RLELossless)
        data.save_as(path)
    np.testing.assert_array_equal(read_back(folder).voxels, before)


def test_a_slice_that_lies_there_twice_counts_once(folder: Path) -> None:
    shutil.copy(folder / "0003.dcm", folder / "copy of 0003.dcm")
    found = read_back(folder)
    assert found.geometry.shape == SHAPE and "twice" in found.provenance.repairs[0]


def test_positions_rounded_to_a_hundredth_are_no_gap_and_no_tilt(tmp_path: Path) -> None:
    affine = an_affine(turned((1, 1, 0), 0.3), (0.7, 0.7, 1.1))
    for path in dicom.write_series(a_volume(affine=affine), tmp_path, description="jitter"):
        change(path, ImagePositionPatient=[round(float(x), 2) for x in pydicom.dcmread(path).ImagePositionPatient])
    np.testing.assert_allclose(read_back(tmp_path).geometry.affine, affine, atol=0.01)


def test_uids_missing_from_the_data_are_taken_from_the_file_meta(folder: Path) -> None:
    before = read_back(folder)
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        data.SOPClassUID = data.SOPInstanceUID = data.StudyInstanceUID = ""
        data.save_as(path, enforce_file_format=False)
    np.testing.assert_array_equal(read_back(folder).voxels, before.voxels)


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
        change(folder / f"t2-{path.name}", SOPInstanceUID=generate_uid())


def same_uid_other_bytes(folder: Path) -> None:
    shutil.copy(folder / "0004.dcm", folder / "other.dcm")
    change(folder / "other.dcm", InstanceNumber=99)


def other_syntax(folder: Path) -> None:
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        data.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.53"
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
    "one slice has no position": (spoil_one(ImagePositionPatient=None), "no ImagePositionPatient"),
    "no slice has an orientation": (spoil_all(ImageOrientationPatient=None), "no ImageOrientationPatient"),
    "an empty position": (spoil_one(ImagePositionPatient=""), "no ImagePositionPatient"),
    "no pixel spacing": (spoil_all(PixelSpacing=None), "no PixelSpacing"),
    "a spacing of zero": (spoil_all(PixelSpacing=[0, 1]), "not positive"),
    "cosines that are none": (spoil_all(ImageOrientationPatient=[1, 0, 0, 0.2, 1, 0]), "right angle"),
    "another orientation": (spoil_one(ImageOrientationPatient=[0, 1, 0, 0, 0, 1]), "differ in ImageOrientationPatient"),
    "another pixel spacing": (spoil_one(PixelSpacing=[1, 1]), "differ in PixelSpacing"),
    "another frame of reference": (spoil_one(FrameOfReferenceUID="1.2.3"), "2 frames of reference"),
    "another size": (spoil_one(Rows=2, PixelData=bytes(20)), "2 x 5 pixels and 4 x 5"),
    "a missing slice": (lambda folder: (folder / "0003.dcm").unlink(), "misses slices: between 0002.dcm and 0004.dcm"),
    "an uneven step": (move(lambda k: np.array([0, 0, 0.3 * (k == 4)])), "uneven"),
    "a drifting step": (move(lambda k: np.array([0, 0, 0.02 * k * k])), "uneven"),
    "a tilted gantry": (move(lambda k: np.array([0, 0.5 * k, 0])), "tilt"),
    "two time points": (second_time_point, "already"),
    "one UID for two objects": (same_uid_other_bytes, "bear one SOPInstanceUID"),
    "a single slice": (only_one, "1 slice"),
    "many frames": (spoil_all(NumberOfFrames=3), "multi-frame"),
    "an enhanced object": (spoil_all(SOPClassUID="1.2.840.10008.5.1.4.1.1.4.1"), "multi-frame"),
    "an ultrasound": (spoil_all(SOPClassUID="1.2.840.10008.5.1.4.1.1.6.1"), "Ultrasound"),
    "a mosaic": (spoil_all(ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"]), "mosaic"),
    "colour": (spoil_all(PhotometricInterpretation="RGB", SamplesPerPixel=3), "coloured"),
    "palette colour": (spoil_all(PhotometricInterpretation="PALETTE COLOR"), "coloured"),
    "32 bits": (spoil_all(BitsAllocated=32, BitsStored=32, HighBit=31), "bits 32"),
    "bits at another place": (spoil_all(BitsStored=12, HighBit=15), "bits 16/12/15"),
    "a slope of zero": (spoil_all(RescaleSlope="0"), "RescaleSlope"),
    "two slopes": (spoil_one(RescaleSlope=["1", "2"]), "RescaleSlope nan"),
    "a lookup table": (spoil_all(ModalityLUTSequence=[pydicom.Dataset()]), "lookup table"),
    "an unknown transfer syntax": (other_syntax, "1.2.840.10008.1.2.4.53"),
    "truncated pixels": (truncate, "0004.dcm has truncated"),
    "too many pixels": (spoil_one(PixelData=bytes(60)), "0004.dcm has truncated or damaged"),
    "pixels that do not decode": (broken_encapsulation, "0004.dcm has truncated or damaged"),
    "no pixels": (spoil_one(PixelData=None), "0004.dcm has truncated or damaged"),
    "no size": (spoil_one(Rows=None), "Rows"),
    "an incredible size": (spoil_all(Rows=65535, Columns=65535), "65535 x 65535"),
}


@pytest.mark.parametrize("case", SPOILT)
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_a_spoilt_series_is_refused_with_the_reason(case: str, folder: Path) -> None:
    spoil, reason = SPOILT[case]
    spoil(folder)
    series, _ = dicom.series_in(list(folder.iterdir()))
    with pytest.raises(UnreadableScan) as refusal:
        dicom.read(series[0])
    assert reason in str(refusal.value)
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


def test_a_syntax_without_a_decoder_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(pydicom.pixels.get_decoder(JPEGLosslessSV1)), "is_available", False)
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        data.compress(RLELossless)
        data.save_as(path)
    with pytest.raises(UnreadableScan, match=r"RLE Lossless .* cannot be decoded here"):
        read_back(folder)


def test_a_deflated_file_is_left_alone_before_it_is_unpacked(folder: Path) -> None:
    change_all(folder, SeriesNumber=1)
    path = folder / "0001.dcm"
    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    data.save_as(path)
    assert "deflated" in dicom.series_in([path])[1][path]
