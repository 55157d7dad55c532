"""Scan files are read as nibabel and SimpleITK read them, or refused with the reason; what we write, others read."""

import bz2
import gzip
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from itertools import permutations, product
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocessing import dicom, files
from preprocessing.reading import REPAIRS, Reading
from preprocessing.volume import REASONS, Geometry, ScanError, UnreadableScan, Volume

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
SHAPE = (4, 5, 3)
EXTENSION = pytest.mark.parametrize("extension", tuple(files.WRITERS))


def an_affine(
    axis: tuple[float, ...] = (1, 2, 3),
    angle: float = 0.4,
    spacing: tuple[float, ...] = (0.7, 1.1, 3),
    origin: tuple[float, ...] = (-90, 31, 12.5),
    order: tuple[int, ...] = (0, 1, 2),
    signs: tuple[int, ...] = (1, 1, 1),
) -> np.ndarray:
    x, y, z = np.array(axis) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    rotation = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross  # Rodrigues
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.eye(3)[:, order] * np.array(signs) * np.array(spacing)
    affine[:3, 3] = origin
    return affine


def a_volume(channels: int = 1, kind: str = "int16", affine: np.ndarray | None = None) -> Volume:
    voxels = np.random.default_rng(channels).integers(0, 200, (channels, *SHAPE)).astype(kind)
    geometry = Geometry(shape=SHAPE, affine=an_affine() if affine is None else affine)
    return Volume(voxels=voxels, geometry=geometry, channels=tuple(str(c) for c in range(channels)))


def seen_by_others(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels [i j k] or [i j k channel] and the affine to RAS, by nibabel and by SimpleITK."""
    if ".nii" in path.name:
        image = nibabel.load(path)
        return np.asarray(image.dataobj), image.affine
    image = SimpleITK.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    voxels = SimpleITK.GetArrayFromImage(image)
    return voxels.transpose(2, 1, 0, *range(3, voxels.ndim)), LPS_TO_RAS @ affine


# what is written is read again, by us and by others


@EXTENSION
def test_what_stands_for_other_values_is_written_where_that_can_be_said(extension: str, tmp_path: Path) -> None:
    volume, path = a_volume(kind="int16"), tmp_path / f"scan{extension}"
    if ".nii" not in extension:
        with pytest.raises(ScanError, match=r"cannot say so.*\.nii\.gz"):
            files.write(volume, path, scale=0.02)
        return
    files.write(volume, path, scale=0.02)
    image = nibabel.load(path)
    np.testing.assert_array_equal(image.dataobj.get_unscaled(), volume.voxels[0])
    np.testing.assert_allclose(image.get_fdata(), volume.voxels[0] * 0.02, rtol=1e-6)
    np.testing.assert_allclose(files.read(path).voxels, volume.voxels * 0.02, rtol=1e-6)


@EXTENSION
@pytest.mark.parametrize("kind", ["uint8", "int16", "uint16", "int32", "int64", "float32"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_volume_comes_back_as_it_was(extension: str, kind: str, channels: int, tmp_path: Path) -> None:
    volume, path = a_volume(channels, kind), tmp_path / f"scan{extension}"
    files.write(volume, path)
    found = files.read(path)
    np.testing.assert_array_equal(found.voxels, volume.voxels)
    assert found.voxels.dtype == np.dtype(kind)
    assert found.geometry.matches(volume.geometry) and found.channels == volume.channels
    voxels, affine = seen_by_others(path)
    np.testing.assert_array_equal(voxels, np.moveaxis(volume.voxels, 0, -1) if channels > 1 else volume.voxels[0])
    np.testing.assert_allclose(affine, volume.geometry.affine, atol=1e-4)


@EXTENSION
def test_all_axis_orders_and_flips_come_back(extension: str, tmp_path: Path) -> None:
    for number, (order, signs) in enumerate(product(permutations(range(3)), product((1, -1), repeat=3))):
        volume = a_volume(affine=an_affine(order=order, signs=signs))
        path = tmp_path / f"{number}{extension}"
        files.write(volume, path)
        found = files.read(path)
        assert found.geometry.matches(volume.geometry) and found.geometry.orientation == volume.geometry.orientation
        np.testing.assert_array_equal(found.voxels, volume.voxels)


@settings(max_examples=60, deadline=None)
@given(
    axis=st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda axis: np.linalg.norm(axis) > 0.1),
    angle=st.one_of(st.floats(-3.2, 3.2), st.floats(-1e-3, 1e-3).map(lambda small: np.pi + small)),
    spacing=st.tuples(*[st.floats(0.01, 20)] * 3),
    origin=st.tuples(*[st.floats(-2000, 2000)] * 3),
    order=st.permutations(range(3)),
    signs=st.tuples(*[st.sampled_from((1, -1))] * 3),
    extension=st.sampled_from(tuple(files.WRITERS)),
)
def test_any_straight_grid_comes_back(
    axis: tuple[float, ...],
    angle: float,
    spacing: tuple[float, ...],
    origin: tuple[float, ...],
    order: list[int],
    signs: tuple[int, ...],
    extension: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    affine = an_affine(axis, float(angle), spacing, origin, tuple(order), signs)
    path = tmp_path_factory.mktemp("grid") / f"scan{extension}"
    files.write(a_volume(affine=affine), path)
    assert files.read(path).geometry.matches(Geometry(shape=SHAPE, affine=affine))
    np.testing.assert_allclose(seen_by_others(path)[1], affine, atol=1e-3)


@EXTENSION
def test_the_same_volume_makes_the_same_bytes(extension: str, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        files.write(a_volume(2, "float32"), tmp_path / folder / f"scan{extension}")
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / f).iterdir()} for f in ("one", "two"))
    assert one == two and len(one) == (2 if extension in (".nhdr", ".mhd") else 1)


@EXTENSION
def test_a_write_that_fails_leaves_what_was_there(
    extension: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"scan{extension}"
    files.write(a_volume(), path)
    before = {made.name: made.read_bytes() for made in tmp_path.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write(a_volume(2), path)
    assert {made.name: made.read_bytes() for made in tmp_path.iterdir()} == before


def test_nifti_carries_both_forms_millimetres_and_the_intent_of_labels(tmp_path: Path) -> None:
    path = tmp_path / "labels.nii.gz"
    files.write(a_volume(kind="uint8"), path, is_labels=True)
    header = nibabel.load(path).header
    assert (int(header["sform_code"]), int(header["qform_code"]), int(header["intent_code"])) == (1, 1, 1002)
    assert header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(header.get_qform(), header.get_sform(), atol=1e-4)


def test_a_grid_a_quaternion_cannot_say_gets_no_qform(tmp_path: Path) -> None:
    path = tmp_path / "sheared.nii"
    affine = an_affine()
    affine[:3, 2] += 0.2 * affine[:3, 0]
    files.write(a_volume(affine=affine), path)
    assert int(nibabel.load(path).header["qform_code"]) == 0
    with pytest.raises(ScanError, match="sheared"):
        files.write(a_volume(affine=affine), tmp_path / "sheared.nrrd")


@pytest.mark.parametrize(
    ("volume", "name", "is_labels", "reason"),
    [
        (a_volume(), "scan.png", False, "ending"),
        (a_volume(), "scan", False, "ending"),
        (a_volume(kind="float32"), "labels.nii", True, "integers"),
        (a_volume(kind="float16"), "scan.nii", False, "float16"),
        (a_volume(kind="complex64"), "scan.nrrd", False, "complex64"),
    ],
)
def test_what_no_file_can_hold_is_not_written(
    volume: Volume, name: str, is_labels: bool, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ScanError, match=reason):
        files.write(volume, tmp_path / name, is_labels=is_labels)
    assert not list(tmp_path.iterdir())


def test_true_and_false_become_one_and_zero(tmp_path: Path) -> None:
    files.write(a_volume(kind="bool"), tmp_path / "mask.nii.gz", is_labels=True)
    assert files.read(tmp_path / "mask.nii.gz").voxels.dtype == np.uint8


@pytest.mark.parametrize(
    ("name", "stem"),
    [("a.b.nii.gz", "a.b"), ("a.NII", "a"), ("a.mhd", "a"), ("folder.x", "folder.x"), (".nii", ".nii")],
)
def test_a_stem_is_the_name_without_the_format(name: str, stem: str) -> None:
    assert files.stem(Path("somewhere") / name) == stem


# what others wrote


def save_nifti(
    path: Path, voxels: np.ndarray, change: Callable[[nibabel.Nifti1Header], object] = lambda h: None
) -> None:
    """As nibabel writes, then with single fields of the header changed, whether that makes sense or not."""
    image = nibabel.Nifti1Image(voxels, an_affine(), dtype=voxels.dtype)
    image.set_qform(an_affine(), code=1)
    image.set_sform(an_affine(), code=1)
    content = bytearray(image.to_bytes())
    header = nibabel.Nifti1Header(bytes(content[:348]), check=False)
    change(header)
    content[:348] = header.binaryblock
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def fields(**values: object) -> Callable[[nibabel.Nifti1Header], None]:
    def change(header: nibabel.Nifti1Header) -> None:
        for name, value in values.items():
            header[name] = value

    return change


IMAGE = np.arange(60, dtype=np.int16).reshape(SHAPE)


@pytest.mark.parametrize(
    ("slope", "intercept", "kind"),
    [(0, 7, "int16"), (np.nan, 7, "int16"), (1, 0, "int16"), (2.5, -3, "float32"), (1, -1024, "float32")],
)
def test_nifti_scaling_is_what_the_standard_says(slope: float, intercept: float, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "scan.nii"
    save_nifti(path, IMAGE, fields(scl_slope=slope, scl_inter=intercept))
    found = files.read(path)
    assert found.voxels.dtype == kind
    np.testing.assert_allclose(found.voxels[0], np.asarray(nibabel.load(path).dataobj), rtol=1e-6)


@pytest.mark.parametrize(("unit", "factor", "repairs"), [(0, 1, 0), (2, 1, 0), (1, 1000, 1), (3, 0.001, 1), (10, 1, 0)])
def test_metres_and_microns_become_millimetres_and_that_is_recorded(
    unit: int, factor: float, repairs: int, tmp_path: Path
) -> None:
    save_nifti(tmp_path / "scan.nii", IMAGE, fields(xyzt_units=unit))
    found = files.read(tmp_path / "scan.nii")
    np.testing.assert_allclose(found.geometry.affine[:3], an_affine()[:3] * factor, rtol=1e-6)
    assert len(found.provenance.repairs) == repairs


@pytest.mark.parametrize(
    ("shape", "channels"), [((4, 5, 3, 2), 2), ((4, 5, 3, 1, 2), 2), ((4, 5, 3, 2, 1), 2), ((4, 5, 3, 1, 1), 1)]
)
def test_the_fourth_axis_holds_the_channels(shape: tuple[int, ...], channels: int, tmp_path: Path) -> None:
    voxels = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    save_nifti(tmp_path / "scan.nii", voxels)
    found = files.read(tmp_path / "scan.nii")
    np.testing.assert_array_equal(found.voxels, np.moveaxis(voxels.reshape(*SHAPE, channels), -1, 0))
    assert found.channels == tuple("01")[:channels]


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("order", "<>")
def test_either_byte_order_and_either_nifti_is_read(kind: type, order: str, tmp_path: Path) -> None:
    header = kind.header_class(endianness=order)
    header.set_data_dtype(np.dtype("i2").newbyteorder(order))
    nibabel.save(kind(IMAGE, an_affine(), header), tmp_path / "scan.nii.gz")
    found = files.read(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(found.voxels[0], IMAGE)
    assert found.voxels.dtype == np.int16 and found.voxels.dtype.isnative


@pytest.mark.parametrize("code", ["sform_code", "qform_code"])
def test_one_form_is_enough_and_a_qfac_of_zero_is_one(code: str, tmp_path: Path) -> None:
    save_nifti(tmp_path / "scan.nii", IMAGE, fields(**{code: 0}))
    np.testing.assert_allclose(files.read(tmp_path / "scan.nii").geometry.affine, an_affine(), atol=1e-4)
    raw = bytearray((tmp_path / "scan.nii").read_bytes())
    raw[76:80] = struct.pack("<f", 0)  # pixdim[0]
    (tmp_path / "scan.nii").write_bytes(raw)
    np.testing.assert_allclose(files.read(tmp_path / "scan.nii").geometry.affine, an_affine(), atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(tilt=st.floats(-0.3, 0.3), nod=st.floats(-1e-3, 1e-3), flip=st.sampled_from((1, -1)))
def test_a_faithful_qform_near_a_half_turn_is_no_contradiction(
    tilt: float, nod: float, flip: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    affine = an_affine((1, 0, 0), tilt, order=(0, 1, 2), signs=(-1, -1, flip)) @ np.diag([1, 1, 1, 1])
    affine[:3, :3] = an_affine((0, 0.6, 0.8), nod, spacing=(1, 1, 1))[:3, :3] @ affine[:3, :3]
    image = nibabel.Nifti1Image(np.zeros((200, 200, 60), np.uint8), affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    path = tmp_path_factory.mktemp("turn") / "scan.nii"
    nibabel.save(image, path)
    np.testing.assert_allclose(files.read(path).geometry.affine, affine, atol=1e-4)


def test_a_channel_axis_of_nrrd_may_come_first_or_last(tmp_path: Path) -> None:
    voxels = np.arange(24, dtype="<i2")
    for name, sizes, directions, wanted in (
        ("first", "2 2 3 2", "none (-2,0,0) (0,-3,0) (0,0,4)", voxels.reshape(2, 2, 3, 2, order="F")),
        (
            "last",
            "2 3 2 2",
            "(-2,0,0) (0,-3,0) (0,0,4) none",
            voxels.reshape(2, 3, 2, 2, order="F").transpose(3, 0, 1, 2),
        ),
    ):
        kinds = "list domain domain domain" if name == "first" else "domain domain domain list"
        head = NRRD.replace("sizes: 2 3 2", f"sizes: {sizes}").replace("dimension: 3", "dimension: 4")
        head = head.replace("(2,0,0) (0,3,0) (0,0,4)", directions).replace("encoding", f"kinds: {kinds}\nencoding")
        (tmp_path / f"{name}.nrrd").write_bytes(head.encode() + voxels.tobytes())
        found = files.read(tmp_path / f"{name}.nrrd")
        np.testing.assert_array_equal(found.voxels, wanted)
        np.testing.assert_allclose(
            found.geometry.affine, np.diag([2, 3, 4, 1]) + np.outer([-10, -20, 30, 0], [0, 0, 0, 1])
        )


NRRD = (
    "NRRD0004\n# by hand\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 2 3 2\n"
    "space directions: (2,0,0) (0,3,0) (0,0,4)\nendian: little\nencoding: raw\nspace origin: (10,20,30)\n\n"
)
META = (
    "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = False\n"
    "TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 10 20 30\nElementSpacing = 2 3 4\nDimSize = 2 3 2\n"
    "ElementType = MET_SHORT\nElementDataFile = LOCAL\n"
)
DATA = np.arange(12, dtype="<i2").tobytes()


@pytest.mark.parametrize(
    ("space", "signs"),
    [("left-posterior-superior", (-1, -1, 1)), ("RAS", (1, 1, 1)), ("left-anterior-superior", (-1, 1, 1))],
)
def test_nrrd_says_in_which_space_it_lies(space: str, signs: tuple[int, ...], tmp_path: Path) -> None:
    (tmp_path / "scan.nrrd").write_bytes(NRRD.replace("left-posterior-superior", space).encode() + DATA)
    affine = np.diag([*signs, 1]) @ np.array([[2, 0, 0, 10], [0, 3, 0, 20], [0, 0, 4, 30], [0, 0, 0, 1]])
    np.testing.assert_allclose(files.read(tmp_path / "scan.nrrd").geometry.affine, affine)


def test_text_headers_declare_units_too(tmp_path: Path) -> None:
    (tmp_path / "a.nrrd").write_bytes(NRRD.replace("endian", 'space units: "um" "um" "um"\nendian').encode() + DATA)
    (tmp_path / "a.mha").write_bytes(META.replace("Offset", "DistanceUnits = um\nOffset").encode() + DATA)
    for name in ("a.nrrd", "a.mha"):
        found = files.read(tmp_path / name)
        assert found.geometry.spacing == pytest.approx((0.002, 0.003, 0.004)) and len(found.provenance.repairs) == 1


def test_provenance_names_sources_reader_and_hash(tmp_path: Path) -> None:
    for name, reader in {"a.nii.gz": "nibabel 5", "a.mhd": "hilum"}.items():
        files.write(a_volume(), tmp_path / name)
        found = files.read(tmp_path / name).provenance
        assert found.sources[0] == str(tmp_path / name) and found.reader.startswith(reader)
        assert found.sha256 == files.sha256(Path(source) for source in found.sources)
        assert found.files == found.sources and found.modality == "" and found.slices == ()
    assert len(found.sources) == 2


# folders of DICOM


def test_a_folder_or_any_of_its_files_is_the_series(tmp_path: Path) -> None:
    volume = a_volume()
    paths = dicom.write_series(volume, tmp_path, description="one")
    (tmp_path / "notes.txt").write_text("a note")
    for path in (tmp_path, paths[1], paths[0].rename(tmp_path / "IM0")):
        found = files.read(path)
        np.testing.assert_array_equal(found.voxels, volume.voxels)
        np.testing.assert_allclose(found.geometry.affine, volume.geometry.affine, atol=1e-4)
    assert found.provenance.sources == (str(tmp_path),)
    left = files.read(tmp_path).provenance
    assert left.verdict == "fine" and left.notes[-1].startswith("notes.txt left alone: ")


def test_a_folder_of_two_series_of_none_or_with_a_damaged_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableScan, match="holds 0 DICOM series"):
        files.read(tmp_path)
    dicom.write_series(a_volume(), tmp_path / "a", description="one")
    (tmp_path / "a" / "0007.dcm").touch()
    with pytest.raises(UnreadableScan, match=re.escape("1 damaged file(s), as 0007.dcm")):
        files.read(tmp_path / "a")
    with pytest.raises(UnreadableScan, match="empty"):
        files.read(tmp_path / "a" / "0007.dcm")
    (tmp_path / "a" / "0007.dcm").unlink()
    other = a_volume().with_voxels(a_volume().voxels + 1)
    for path in dicom.write_series(other, tmp_path / "b", description="two"):
        shutil.copy(path, tmp_path / "a" / f"b{path.name}")
    with pytest.raises(UnreadableScan, match="holds 2 DICOM series"):
        files.read(tmp_path / "a")
    np.testing.assert_array_equal(files.read(tmp_path / "a" / "b0001.dcm").voxels, other.voxels)


@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.img", "scan.mha", "scan"])
def test_dicom_is_known_by_its_content_whatever_its_name(name: str, tmp_path: Path) -> None:
    paths = dicom.write_series(a_volume(), tmp_path, description="one")
    np.testing.assert_array_equal(files.read(paths[2].rename(tmp_path / name)).voxels, a_volume().voxels)


def test_a_refusal_of_a_folder_has_its_reason(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    for number, folder in enumerate(("broken", "two")):
        volume = a_volume().with_voxels(a_volume().voxels + number)
        paths = dicom.write_series(volume, tmp_path / folder, description=folder)
    (tmp_path / "two" / "of_the_other.dcm").write_bytes((tmp_path / "broken" / paths[0].name).read_bytes())
    (tmp_path / "broken" / paths[0].name).write_bytes(paths[0].read_bytes()[:140])
    for folder, reason in {"nothing": "no_scan", "broken": "damaged", "two": "mixed"}.items():
        with pytest.raises(UnreadableScan) as refusal:
            files.read(tmp_path / folder)
        assert refusal.value.reason == reason


# what is repaired, and what only a person may let pass


ALLOWED = {word: Reading(allow=(word,)) for word in ("nan", "tilt", "sform", "qform")}


@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.nrrd", "scan.mha"])
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_where_it_is_allowed_what_is_no_number_becomes_the_lowest_of_its_channel(
    name: str, odd: float, tmp_path: Path
) -> None:
    voxels = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)
    voxels[1] += 100
    spoilt = voxels.copy()
    spoilt[1, 0, :2, 0] = odd
    files.write(a_volume(2).with_voxels(spoilt), tmp_path / name)
    found = files.read(tmp_path / name, ALLOWED["nan"])
    known = np.isfinite(spoilt)
    np.testing.assert_array_equal(found.voxels[known], voxels[known])
    assert (found.voxels[~known] == spoilt[1][known[1]].min()).all()
    assert found.provenance.verdict == "repaired" and "2 of 120 voxels" in found.provenance.repairs[0]


def test_nan_is_no_excuse_for_values_beyond_float32_nor_for_a_channel_without_a_number(tmp_path: Path) -> None:
    save_nifti(tmp_path / "far.nii", np.where(IMAGE == 7, np.nan, IMAGE * 1e300))
    save_nifti(tmp_path / "none.nii", np.stack([np.full(SHAPE, np.nan, np.float32), IMAGE.astype(np.float32)], axis=-1))
    for name, reason in {"far": "values", "none": "not_numbers"}.items():
        with pytest.raises(UnreadableScan) as refusal:
            files.read(tmp_path / f"{name}.nii", ALLOWED["nan"])
        assert refusal.value.reason == reason


@pytest.mark.parametrize("word", ["sform", "qform"])
def test_of_two_places_the_one_a_person_names_is_believed(word: str, tmp_path: Path) -> None:
    save_nifti(tmp_path / "scan.nii", IMAGE, fields(qoffset_x=-60))
    found = files.read(tmp_path / "scan.nii", ALLOWED[word])
    assert found.geometry.affine[0, 3] == pytest.approx({"sform": -90, "qform": -60}[word])
    assert len(found.provenance.repairs) == 1 and f"the {word} was believed" in found.provenance.repairs[0]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"srow_x": [0] * 4}, "qform"),
        ({"srow_x": [np.nan] * 4}, "qform"),
        ({"quatern_b": 3}, "sform"),
        ({"pixdim": [1, 0, -1, np.nan, 1, 1, 1, 1]}, "sform"),
        ({"pixdim": [1, 7, 1, 1, 1, 1, 1, 1], "qform_code": 0}, "sform"),
    ],
)
def test_a_form_that_says_nothing_sound_gives_way_to_the_one_that_is_believed(
    change: dict[str, object], word: str, tmp_path: Path
) -> None:
    save_nifti(tmp_path / "scan.nii", IMAGE, fields(**change))
    found = files.read(tmp_path / "scan.nii", ALLOWED[word])
    np.testing.assert_allclose(found.geometry.affine, an_affine(), atol=1e-4)
    assert f"the {word} was believed" in found.provenance.repairs[0]


@pytest.mark.parametrize("word", ["sform", "qform", "nan", "tilt"])
def test_what_is_allowed_but_not_needed_changes_nothing(word: str, tmp_path: Path) -> None:
    save_nifti(tmp_path / "scan.nii", IMAGE)
    found = files.read(tmp_path / "scan.nii", ALLOWED[word])
    np.testing.assert_array_equal(found.voxels[0], IMAGE)
    assert found.provenance.repairs == () and found.provenance.verdict == "fine"


@pytest.mark.parametrize("pixdim", [[1, 0, 1.1, 3], [1, -0.7, 1.1, 3], [1, 0.7, np.nan, 3]])
def test_an_sform_alone_needs_no_pixdim_and_that_is_told(pixdim: list[float], tmp_path: Path) -> None:
    save_nifti(tmp_path / "scan.nii", IMAGE, fields(qform_code=0, pixdim=[*pixdim, 1, 1, 1, 1]))
    found = files.read(tmp_path / "scan.nii")
    np.testing.assert_allclose(found.geometry.affine, an_affine(), atol=1e-4)
    assert "is no spacing" in found.provenance.repairs[0]


@pytest.mark.parametrize("name", ["scan.nii", "scan.nrrd"])
def test_a_sheared_grid_is_resampled_to_a_straight_one_only_where_that_is_allowed(name: str, tmp_path: Path) -> None:
    """A plane through space is what linear interpolation keeps: every voxel inside must lie on it still."""
    affine = np.array([[2.0, 0, 0, 10], [0, 2, 0.9, 20], [0, 0, 3, 30], [0, 0, 0, 1]])
    geometry = Geometry(shape=(9, 12, 7), affine=affine)
    points = geometry.to_world(np.stack(np.meshgrid(*[np.arange(n) for n in geometry.shape], indexing="ij"), axis=-1))
    voxels = (points @ [1, -2, 0.5]).astype(np.float32)
    if name.endswith("nii"):
        nibabel.save(nibabel.Nifti1Image(voxels, affine), tmp_path / name)
    else:
        lps = LPS_TO_RAS @ affine
        directions = " ".join(f"({','.join(map(str, column))})" for column in lps[:3, :3].T)
        head = NRRD.replace("(2,0,0) (0,3,0) (0,0,4)", directions).replace("sizes: 2 3 2", "sizes: 9 12 7")
        head = head.replace("(10,20,30)", f"({','.join(map(str, lps[:3, 3]))})").replace("short", "float")
        (tmp_path / name).write_bytes(head.encode() + voxels.tobytes(order="F"))
    with pytest.raises(UnreadableScan, match="sheared") as refusal:
        files.read(tmp_path / name)
    assert refusal.value.reason == "tilted"
    found = files.read(tmp_path / name, ALLOWED["tilt"])
    assert not found.geometry.is_sheared and found.geometry.shape[2] == 7
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in found.geometry.shape], indexing="ij"), axis=-1)
    there = found.geometry.to_world(grid)
    place = geometry.to_voxel(there)
    inside = ((place >= 0) & (place <= np.array(geometry.shape) - 1)).all(axis=-1)
    assert inside.mean() > 0.6
    np.testing.assert_allclose(found.voxels[0][inside], (there @ [1, -2, 0.5])[inside], atol=1e-3)
    assert "resampled linearly" in found.provenance.repairs[0] and found.provenance.verdict == "repaired"


def test_sheared_labels_take_the_nearest_voxel_on_the_grid_of_their_image(tmp_path: Path) -> None:
    affine = np.array([[2.0, 0, 0, 10], [0, 2, 0.9, 20], [0, 0, 3, 30], [0, 0, 0, 1]])
    labels = np.random.default_rng(0).choice([0, 3, 700], (9, 12, 7)).astype(np.int16)
    for name in ("image", "labels"):
        nibabel.save(nibabel.Nifti1Image(labels, affine), tmp_path / f"{name}.nii.gz")
    image = files.read(tmp_path / "image.nii.gz", ALLOWED["tilt"])
    found = files.read(tmp_path / "labels.nii.gz", ALLOWED["tilt"], is_labels=True)
    assert found.geometry.matches(image.geometry) and found.voxels.dtype == np.int16
    assert set(np.unique(found.voxels)) == {0, 3, 700}
    assert "nearest" in found.provenance.repairs[0]


@pytest.mark.parametrize(
    ("name", "written_as"),
    [
        *(("scan.nii", ".nii.gz"), ("scan.nii.gz", ".nii"), ("scan.mha", ".nrrd"), ("scan.nrrd", ".mha")),
        *(("scan.nii.gz", ".nrrd"), ("scan.mha", ".nii.gz"), ("scan", ".nii"), ("scan.dcm", ".nii.gz")),
    ],
)
def test_the_content_says_the_format_and_a_wrong_ending_is_told(name: str, written_as: str, tmp_path: Path) -> None:
    volume = a_volume()
    files.write(volume, tmp_path / f"right{written_as}")
    (tmp_path / f"right{written_as}").rename(tmp_path / name)
    found = files.read(tmp_path / name)
    np.testing.assert_array_equal(found.voxels, volume.voxels)
    assert found.geometry.matches(volume.geometry)
    assert len(found.provenance.repairs) >= 1 and "ending" in found.provenance.repairs[0]


@pytest.mark.parametrize(("head", "body"), [("a.hdr", "a.img"), ("A.HDR.gz", "A.img.gz"), ("a.hdr", "a.img.gz")])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Pair, nibabel.Nifti2Pair])
def test_a_pair_is_read_by_either_of_its_names(kind: type, head: str, body: str, tmp_path: Path) -> None:
    image = kind(IMAGE, an_affine())
    nibabel.save(image, tmp_path / "made.img")
    for name, made in ((head, "made.hdr"), (body, "made.img")):
        raw = (tmp_path / made).read_bytes()
        (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        (tmp_path / made).unlink()
    for name in (head, body):
        found = files.read(tmp_path / name)
        np.testing.assert_array_equal(found.voxels[0], IMAGE)
        np.testing.assert_allclose(found.geometry.affine, an_affine(), atol=1e-4)
        assert [Path(file).name for file in found.provenance.files] == [head, body]
        assert "pair" in found.provenance.encoding and found.provenance.repairs == ()


def test_two_candidates_for_the_other_half_of_a_pair_are_refused(tmp_path: Path) -> None:
    path = pair("a.hdr", "a.img")(tmp_path)
    shutil.copy(tmp_path / "a.img", tmp_path / "a.img.gz")
    with pytest.raises(UnreadableScan, match=r"2 files end in \.img") as refusal:
        files.read(path)
    assert refusal.value.reason == "contradiction"


def test_extensions_of_a_header_and_voxels_from_an_odd_byte_on_are_passed_over(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(IMAGE, an_affine())
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"a remark" * 9))
    nibabel.save(image, tmp_path / "extended.nii")
    assert (tmp_path / "extended.nii").stat().st_size > len(whole())
    header = nibabel.Nifti1Header(whole()[:348], check=False)
    header["vox_offset"] = 357
    (tmp_path / "odd.nii").write_bytes(header.binaryblock + bytes(9) + IMAGE.tobytes(order="F"))
    for name in ("extended.nii", "odd.nii"):
        np.testing.assert_array_equal(files.read(tmp_path / name).voxels[0], IMAGE)


@pytest.mark.parametrize("unpack", [lambda raw: gzip.compress(raw[:200]) + gzip.compress(raw[200:])])
def test_gzip_in_several_members_is_one_file(unpack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    (tmp_path / "scan.nii.gz").write_bytes(unpack(whole()))
    (tmp_path / "scan.nrrd").write_bytes(NRRD.replace("raw", "gzip").encode() + unpack(DATA * 1))
    np.testing.assert_array_equal(files.read(tmp_path / "scan.nii.gz").voxels[0], IMAGE)
    np.testing.assert_array_equal(files.read(tmp_path / "scan.nrrd").voxels.ravel("F"), np.frombuffer(DATA, "<i2"))


@pytest.mark.parametrize("pack", [bz2.compress, lambda raw: bz2.compress(raw[:10]) + bz2.compress(raw[10:])])
@pytest.mark.parametrize("word", ["bzip2", "bz2"])
def test_nrrd_is_unpacked_from_bzip2_too(word: str, pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    (tmp_path / "scan.nrrd").write_bytes(NRRD.replace("raw", word).encode() + pack(DATA))
    found = files.read(tmp_path / "scan.nrrd")
    np.testing.assert_array_equal(found.voxels.ravel("F"), np.frombuffer(DATA, "<i2"))
    assert found.provenance.encoding == "NRRD, int16, bzip2"


def test_big_endian_text_headers_are_read_as_itk_reads_them(tmp_path: Path) -> None:
    data = np.frombuffer(DATA, "<i2").astype(">i2").tobytes()
    (tmp_path / "a.nrrd").write_bytes(NRRD.replace("little", "big").encode() + data)
    (tmp_path / "a.mha").write_bytes(META.replace("ByteOrderMSB = False", "ByteOrderMSB = True").encode() + data)
    (tmp_path / "b.mha").write_bytes(
        META.replace("BinaryDataByteOrderMSB = False", "ElementByteOrderMSB = 1").encode() + data
    )
    for name in ("a.nrrd", "a.mha", "b.mha"):
        found = files.read(tmp_path / name)
        np.testing.assert_array_equal(found.voxels[0], seen_by_others(tmp_path / name)[0])
        np.testing.assert_array_equal(found.voxels.ravel("F"), np.frombuffer(DATA, "<i2"))
        assert found.provenance.encoding.endswith("int16, big-endian")


@settings(max_examples=40, deadline=None)
@given(
    axis=st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda axis: np.linalg.norm(axis) > 0.1),
    angle=st.floats(-3.2, 3.2),
    order=st.permutations(range(3)),
    extension=st.sampled_from((".nrrd", ".nhdr", ".mha", ".mhd")),
    channels=st.integers(1, 3),
)
def test_what_itk_writes_is_placed_where_itk_places_it(
    axis: tuple[float, ...],
    angle: float,
    order: list[int],
    extension: str,
    channels: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("itk") / f"scan{extension}"
    voxels = np.random.default_rng(0).normal(size=(3, 5, 4, channels))
    image = SimpleITK.GetImageFromArray(voxels if channels > 1 else voxels[..., 0], isVector=channels > 1)
    lps = LPS_TO_RAS @ an_affine(axis, float(angle), spacing=(1, 1, 1), order=tuple(order))
    image.SetDirection(lps[:3, :3].ravel().tolist())
    image.SetSpacing((0.7, 1.1, 3))
    image.SetOrigin((-90, 31, 12.5))
    SimpleITK.WriteImage(image, str(path), useCompression=len(extension) % 2 == 0)
    found, (values, affine) = files.read(path), seen_by_others(path)
    np.testing.assert_allclose(found.geometry.affine, affine, atol=1e-6)
    np.testing.assert_allclose(found.voxels, np.moveaxis(values, -1, 0) if channels > 1 else values[None], rtol=1e-6)
    assert found.provenance.repairs == ()


def test_what_itk_does_not_use_of_a_metaimage_is_told_and_not_used(tmp_path: Path) -> None:
    for line, told in {
        "AnatomicalOrientation = LPS": "the matrix was believed",
        "CenterOfRotation = 5 6 7": "CenterOfRotation",
        "ElementSize = 9 9 9": "",
        "AnatomicalOrientation = ???": "",
        "AnatomicalOrientation = RAI": "",
    }.items():
        path = tmp_path / "scan.mha"
        path.write_bytes(META.replace("Offset", f"{line}\nOffset").encode() + DATA)
        found = files.read(path)
        np.testing.assert_allclose(found.geometry.affine, seen_by_others(path)[1])
        words = " ".join((*found.provenance.repairs, *found.provenance.notes))
        assert told in words and bool(told) == bool(words)


def test_a_metaimage_may_say_its_modality(tmp_path: Path) -> None:
    (tmp_path / "a.mha").write_bytes(META.replace("NDims", "Modality = MET_MOD_MR\nNDims").encode() + DATA)
    assert files.read(tmp_path / "a.mha").provenance.modality == "MR"


@pytest.mark.parametrize("vector", [1007, 0])
def test_vectors_are_channels_and_that_is_told(vector: int, tmp_path: Path) -> None:
    voxels = np.random.default_rng(0).normal(size=(4, 5, 3, 1, 3)).astype(np.float32)
    save_nifti(tmp_path / "scan.nii", voxels, fields(intent_code=vector))
    found = files.read(tmp_path / "scan.nii")
    np.testing.assert_array_equal(found.voxels, np.moveaxis(voxels[:, :, :, 0], -1, 0))
    assert any("vectors" in note for note in found.provenance.notes) == (vector == 1007)


@pytest.mark.parametrize(
    ("kind", "value"), [("int64", 2**60 + 1), ("uint64", 2**64 - 1), ("int64", -(2**63)), ("uint32", 2**32 - 1)]
)
@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.nrrd", "scan.mha"])
def test_whole_numbers_stay_exactly_what_they_are(kind: str, value: int, name: str, tmp_path: Path) -> None:
    voxels = np.zeros((1, *SHAPE), kind)
    voxels[0, 1, 2, 1] = value
    files.write(a_volume().with_voxels(voxels), tmp_path / name)
    found = files.read(tmp_path / name)
    assert found.voxels.dtype == np.dtype(kind) and int(found.voxels[0, 1, 2, 1]) == value


@pytest.mark.parametrize(
    ("name", "encoding"),
    [
        ("scan.nii", "NIfTI-1, int16"),
        ("scan.nii.gz", "NIfTI-1, int16, gzip"),
        ("scan.nrrd", "NRRD, int16, gzip"),
        ("scan.mha", "MetaImage, int16, zlib"),
    ],
)
def test_provenance_says_how_voxels_were_packed(name: str, encoding: str, tmp_path: Path) -> None:
    files.write(a_volume(), tmp_path / name)
    assert files.read(tmp_path / name).provenance.encoding == encoding


def test_a_nifti_of_another_byte_order_says_so(tmp_path: Path) -> None:
    header = nibabel.Nifti2Header(endianness=">")
    header.set_data_dtype(">f8")
    nibabel.save(nibabel.Nifti2Image(IMAGE.astype(">f8"), an_affine(), header), tmp_path / "scan.nii.gz")
    assert files.read(tmp_path / "scan.nii.gz").provenance.encoding == "NIfTI-2, float64, gzip, big-endian"


# what is refused


def cut(name: str, share: float) -> Callable[[Path], Path]:
    def spoil(folder: Path) -> Path:
        path = folder / name
        files.write(a_volume(kind="float32"), path)
        data = next((other for other in folder.iterdir() if other != path), path)
        content = data.read_bytes()
        data.write_bytes(content[: int(len(content) * share)])
        return path

    return spoil


def flipped_byte(name: str, at: int) -> Callable[[Path], Path]:
    def spoil(folder: Path) -> Path:
        files.write(a_volume(kind="float32"), folder / name)
        content = bytearray((folder / name).read_bytes())
        content[at] ^= 0xFF
        (folder / name).write_bytes(content)
        return folder / name

    return spoil


def nifti(voxels: np.ndarray = IMAGE, name: str = "scan.nii", **values: object) -> Callable[[Path], Path]:
    def spoil(folder: Path) -> Path:
        save_nifti(folder / name, voxels, fields(**values))
        return folder / name

    return spoil


def content(name: str, data: bytes) -> Callable[[Path], Path]:
    def spoil(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return spoil


def text(name: str, old: str, new: str, data: bytes = DATA) -> Callable[[Path], Path]:
    head = NRRD if name.endswith(("nrrd", "nhdr")) else META
    assert old in head
    return content(name, head.replace(old, new).encode() + data)


def holed(value: float, name: str) -> Callable[[Path], Path]:
    def spoil(folder: Path) -> Path:
        voxels = np.ones((1, *SHAPE), np.float32)
        voxels[0, 0, :2, 0] = value
        files.write(a_volume(kind="float32").with_voxels(voxels), folder / name)
        return folder / name

    return spoil


def bomb(folder: Path) -> Path:
    """A sound gzip stream; the header promises what a file of its size cannot hold."""
    save_nifti(folder / "scan.nii.gz", IMAGE, fields(dim=[3, 30000, 30000, 30000, 1, 1, 1, 1]))
    return folder / "scan.nii.gz"


def tilted_sform(**values: object) -> Callable[[Path], Path]:
    return nifti(srow_x=[0.7, 0.2, 0, 5], srow_y=[0, 1, 0, 5], srow_z=[0, 0, 1, 5], **values)


def whole() -> bytes:
    return nibabel.Nifti1Image(IMAGE, an_affine()).to_bytes()


def pair(head: str, body: str, voxels: bytes | None = None, magic: bytes = b"ni1") -> Callable[[Path], Path]:
    """Header and voxels in two files."""

    def spoil(folder: Path) -> Path:
        header = nibabel.Nifti1Header(whole()[:348], check=False)
        header["magic"], header["vox_offset"] = magic, 0
        (folder / head).write_bytes(header.binaryblock + bytes(4))
        (folder / body).write_bytes(IMAGE.tobytes(order="F") if voxels is None else voxels)
        return folder / head

    return spoil


def nrrd_of_4(kind: str) -> Callable[[Path], Path]:
    head = NRRD.replace("dimension: 3", "dimension: 4").replace("2 3 2", "2 3 2 1").replace("(0,0,4)", "(0,0,4) none")
    return content("a.nrrd", head.replace("endian", f"kinds: space space space {kind}\nendian").encode() + DATA)


def mha_of(axes: int) -> Callable[[Path], Path]:
    matrix = " ".join(str(int(n)) for n in np.eye(axes).ravel())
    sizes = {2: "3 4", 5: "2 3 2 1 1"}[axes]
    head = META.replace("NDims = 3", f"NDims = {axes}").replace("1 0 0 0 1 0 0 0 1", matrix).replace("2 3 2", sizes)
    head = head.replace("10 20 30", " ".join(["1"] * axes)).replace("= 2 3 4", "= " + " ".join(["1"] * axes))
    return content("a.mha", head.encode() + DATA)


FLAT_NRRD = NRRD.replace("dimension: 3", "dimension: 2").replace("2 3 2", "3 4").replace(" (0,0,4)", "")
RGBA = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1"), ("A", "u1")])
RGB = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
SPOILT = {
    "damaged": {
        **{f"a cut {name}": (cut(name, 0.8), "truncated") for name in ("scan.nii", "scan.nii.gz", "scan.nrrd", "scan.mha")},
        **{f"a cut {name} pair": (cut(name, 0.8), "truncated") for name in ("scan.nhdr", "scan.mhd")},
        **{f"almost whole {name}": (cut(name, 0.99), "truncated") for name in ("scan.nii.gz", "scan.nrrd", "scan.mha")},
        **{f"a beginning of {name}": (cut(name, 0.1), "") for name in ("scan.nii", "scan.nii.gz", "scan.nrrd", "scan.mha")},
        **{f"a wrong checksum in {name}": (flipped_byte(name, -7), "damaged") for name in ("scan.nii.gz", "scan.nrrd")},
        "a wrong checksum in mha": (flipped_byte("scan.mha", -3), "damaged"),
        **{f"a flipped byte in {name}": (flipped_byte(name, -30), "") for name in ("scan.nii.gz", "scan.nrrd", "scan.mha")},
        "a header that promises too much": (bomb, "promised"),
        "a raw header that promises too much": (nifti(dim=[3, 400, 500, 3, 1, 1, 1, 1]), "promised"),
        "a nrrd that promises too much": (text("a.nrrd", "2 3 2", "20000 20000 20000"), "promised"),
        "a mha that promises too much": (text("a.mha", "2 3 2", "20000 20000 20000"), "promised"),
        "more data than promised": (nifti(dim=[3, 4, 5, 2, 1, 1, 1, 1]), "longer"),
        "a longer nrrd": (text("a.nrrd", "NRRD", "NRRD", DATA + b"x"), "longer"),
        "a longer mha": (text("a.mha", "Image", "Image", DATA + b"x"), "longer"),
        "half a pair": (nifti(magic=b"ni1"), "pair"),
        "a header whose voxels are gone": (pair("a.hdr", "b.img"), "0 files end in .img"),
        "a pair of too few voxels": (pair("a.hdr", "a.img", IMAGE.tobytes(order="F")[:-2]), "truncated"),
        "a pair of too many voxels": (pair("a.hdr", "a.img", IMAGE.tobytes(order="F") + b"x"), "longer"),
        "garbage after gzip": (content("a.nii.gz", gzip.compress(whole()) + b"garbage"), "damaged"),
        "a gzip member too many": (content("a.nii.gz", gzip.compress(whole()) + gzip.compress(b"x")), "longer"),
        "a gzip member too few": (content("a.nii.gz", gzip.compress(whole()[:400])), "truncated"),
        "mha packed smaller than it says": (
            text("a.mha", "edData = False", "edData = True\nCompressedDataSize = 99", zlib.compress(DATA)), "truncated"
        ),
        "mha packed larger than it says": (
            text("a.mha", "edData = False", "edData = True\nCompressedDataSize = 9", zlib.compress(DATA)), "longer"
        ),
        **{f"nothing in {n}": (content(n, b""), "empty") for n in ("a.nii", "a.nii.gz", "a.nrrd", "a.mhd", "a.dcm")},
        **{f"noise in {n}": (content(n, bytes(range(7, 256)) * 9), "") for n in ("a.nrrd", "a.mha")},
        "nrrd in part of bzip2": (text("a.nrrd", "raw", "bzip2", bz2.compress(DATA)[:-5]), "truncated"),
        "nrrd with more after bzip2": (text("a.nrrd", "raw", "bzip2", bz2.compress(DATA) + b"more"), "cannot be read"),
        "nrrd short in bzip2": (text("a.nrrd", "raw", "bz2", bz2.compress(DATA[:-2])), "truncated"),
        "nrrd long in bzip2": (text("a.nrrd", "raw", "bz2", bz2.compress(DATA + b"x")), "longer"),
        "nrrd with sizes of words": (text("a.nrrd", "2 3 2", "two 3 2"), "cannot be read"),
        "nrrd of absent voxels": (text("a.nhdr", "endian", "data file: gone.raw\nendian"), "same folder"),
        "mha not compressed": (text("a.mha", "CompressedData = False", "CompressedData = True"), "damaged"),
        "mha short inside": (text("a.mha", "edData = False", "edData = True", zlib.compress(DATA[:-2])), "truncated"),
    },
    "not_numbers": {
        **{f"NaN in {name}": (holed(np.nan, name), "2 of 60 voxels") for name in ("a.nii.gz", "a.nrrd", "a.mha")},
        "infinity": (holed(np.inf, "a.nii"), "2 of 60 voxels"),
        "nothing but NaN": (nifti(np.full(SHAPE, np.nan, np.float32)), "60 of 60 voxels"),
    },
    "values": {
        "a double beyond float32": (nifti(np.full(SHAPE, 1e300)), "60 voxels too large"),
        "an infinite slope": (nifti(scl_slope=np.inf), "scl_slope of inf"),
        "float64 that float32 cannot tell apart": (nifti(1e9 + np.arange(60.0).reshape(SHAPE)), "tell apart"),
        "an offset that float32 cannot tell apart": (nifti(scl_slope=1, scl_inter=1e10), "tell apart"),
        "a slope that carries beyond float32": (nifti(scl_slope=3e38), "too large"),
        "nrrd without a byte order": (text("a.nrrd", "endian: little\n", ""), "`endian`"),
        "nrrd with a mixed byte order": (text("a.nrrd", "endian: little", "endian: middle"), "middle"),
        "mha without a byte order": (text("a.mha", "BinaryDataByteOrderMSB", "X"), "`BinaryDataByteOrderMSB`"),
        "mha with a scale": (text("a.mha", "NDims", "ElementToIntensityFunctionSlope = 2\nNDims"), "Slope"),
        "a NaN intercept": (nifti(scl_slope=2, scl_inter=np.nan), "intercept"),
    },
    "unsupported": {
        "single bits": (nifti(datatype=1, bitpix=1), "single bits"),
        "128 bits": (nifti(datatype=1536, bitpix=128), "type 1536"),
        "vectors that displace": (nifti(np.zeros((2, 2, 2, 1, 3), np.float32), intent_code=1006), "displacements"),
        "nrrd of time": (nrrd_of_4("time"), "time"),
        "mha of five axes": (mha_of(5), "3 or 4 axes"),
        "nrrd of slices in files": (text("a.nhdr", "endian", "data file: s%03d.raw 1 2 1\nendian"), "same folder"),
        "nrrd of a list of files": (text("a.nhdr", "endian", "data file: LIST\nendian"), "same folder"),
        "complex": (nifti(np.zeros(SHAPE, np.complex64)), "complex64"),
        "five axes": (nifti(np.zeros((2, 2, 2, 2, 2), np.int16)), "shape"),
        "nrrd of blocks": (text("a.nrrd", "type: short", "type: block"), "block"),
        "nrrd with a skip": (text("a.nrrd", "endian", "byte skip: 4\nendian"), "skip"),
        "nrrd elsewhere": (text("a.nhdr", "endian", "data file: ../../secret.raw\nendian"), "same folder"),
        "mha of slices in files": (text("a.mhd", "LOCAL", "slice%03d.raw 1 2 1"), "same folder"),
    },
    "colour": {
        "colour": (nifti(RGB), "coloured"),
        "colour with transparency": (nifti(RGBA), "coloured"),
        "colour by its intent": (nifti(intent_code=2003), "colours"),
        "nrrd in colour": (text("a.nrrd", "endian", "kinds: RGB-color domain domain\nendian"), "rgb-color"),
    },
    "contradiction": {
        "two orientations": (nifti(qoffset_x=-89.9), "sform and qform lying 0.10 mm apart"),
        "a flat sform beside a sound qform": (nifti(srow_x=[0] * 4), "sform and qform lying"),
        "an sform beside an impossible quaternion": (nifti(quatern_b=3), "no rotation"),
        "an sform beside a qform without spacing": (nifti(pixdim=[1, 0, 1, 1, 1, 1, 1, 1]), "no spacing"),
        "an sform of other spacing than pixdim": (nifti(qform_code=0, pixdim=[1, 7, 1.1, 3, 1, 1, 1, 1]), "two spacings"),
        "a negative code": (nifti(sform_code=-1), "negative"),
        "eight axes": (nifti(dim=[8, 4, 5, 3, 1, 1, 1, 1]), "shape"),
        "nrrd that says a thing twice": (text("a.nrrd", "endian", "sizes: 3 2 2\nendian"), "twice"),
        "nrrd of other dimension": (text("a.nrrd", "dimension: 3", "dimension: 4"), "sizes"),
        "nrrd of a list in space": (text("a.nrrd", "endian", "kinds: list domain domain\nendian"), "list"),
        "mha that says a thing twice": (text("a.mha", "NDims", "Position = 1 2 3\nNDims"), "`Offset` twice"),
        "mha of two byte orders": (text("a.mha", "NDims", "ElementByteOrderMSB = True\nNDims"), "twice"),
        "no axes": (nifti(dim=[0] * 8), "shape"),
        "a negative axis": (nifti(dim=[3, -4, 5, 3, 1, 1, 1, 1]), "shape"),
        "an unknown type": (nifti(datatype=77), "type 77"),
        "bits that contradict the type": (nifti(bitpix=32), "contradicts itself"),
        "voxels inside the header": (nifti(vox_offset=100), "contradicts itself"),
        "mha with long directions": (text("a.mha", "1 0 0 0 1 0 0 0 1", "2 0 0 0 1 0 0 0 1"), "lengths"),
        "mha of flat voxels": (text("a.mha", "NDims = 3", "NDims = 1"), "1 axes"),
    },
    "no_geometry": {
        "no orientation": (nifti(sform_code=0, qform_code=0), "nothing of its orientation"),
        "an affine of NaN": (nifti(srow_x=[np.nan] * 4, qform_code=0), "affine"),
        "an affine of zeros": (nifti(srow_x=[0] * 4, qform_code=0), "affine"),
        "an impossible quaternion": (nifti(quatern_b=3, sform_code=0), "no rotation"),
        "an Analyze file": (pair("a.hdr", "a.img", magic=b""), "Analyze"),
        "a quaternion without spacing": (nifti(sform_code=0, pixdim=[1, 0, 1, 1, 1, 1, 1, 1]), "no spacing"),
        "a quaternion of negative spacing": (nifti(sform_code=0, pixdim=[1, 1, -1, 1, 1, 1, 1, 1]), "no spacing"),
        "a quaternion of NaN": (nifti(sform_code=0, quatern_b=np.nan), ""),
        "a qfac of a half": (nifti(sform_code=0, pixdim=[0.5, 1, 1, 1, 1, 1, 1, 1]), "no rotation"),
        "nrrd of three nameless axes": (text("a.nrrd", "space: left-posterior-superior", "space dimension: 3"), "`space`"),
        "nrrd of spacings": (text("a.nrrd", "space directions: (2,0,0) (0,3,0) (0,0,4)", "spacings: 2 3 4"), "`space d"),
        "nrrd with a short vector": (text("a.nrrd", "(2,0,0)", "(2,0)"), "three numbers"),
        "nrrd with a NaN direction": (text("a.nrrd", "(2,0,0)", "(nan,0,0)"), "three numbers"),
        "nrrd with parallel axes": (text("a.nrrd", "(0,3,0)", "(3,0,0)"), "affine"),
        "mha with a negative spacing": (text("a.mha", "= 2 3 4", "= 2 -3 4"), "spacing"),
        "mha with a short matrix": (text("a.mha", "1 0 0 0 1 0 0 0 1", "1 0 0 1"), "9 numbers"),
        "a unit that is none": (nifti(xyzt_units=5), "unit 5"),
        "nrrd without space": (text("a.nrrd", "space: left-posterior-superior\n", ""), "`space`"),
        "nrrd without directions": (text("a.nrrd", "space directions", "x directions"), "`space directions`"),
        "nrrd without origin": (text("a.nrrd", "space origin", "x origin"), "`space origin`"),
        "nrrd in scanner space": (text("a.nrrd", "left-posterior-superior", "scanner-xyz"), "scanner-xyz"),
        "nrrd in furlongs": (text("a.nrrd", "endian", 'space units: "fur" "fur" "fur"\nendian'), "fur"),
        "mha without matrix": (text("a.mha", "TransformMatrix", "X"), "`TransformMatrix`"),
        "mha without spacing": (text("a.mha", "ElementSpacing", "X"), "`ElementSpacing`"),
        "mha without offset": (text("a.mha", "Offset", "X"), "`Offset`"),
        "mha in parsecs": (text("a.mha", "Offset", "DistanceUnits = pc\nOffset"), "pc"),
    },
    "tilted": {
        "a sheared grid": (tilted_sform(qform_code=0), "sheared"),
        "nrrd sheared": (text("a.nrrd", "(0,3,0)", "(1,3,0)"), "sheared"),
        "mha sheared": (text("a.mha", "1 0 0 0 1 0 0 0 1", "1 0 0 0.3 0.954 0 0 0 1"), "sheared"),
    },
    "too_few_slices": {
        "two axes": (nifti(dim=[2, 4, 15, 1, 1, 1, 1, 1]), "shape"),
        "one slice": (nifti(IMAGE[..., :1]), "single slice"),
        "one slice seen from the side": (nifti(IMAGE[:1]), "single slice"),
        "one slice in several channels": (nifti(np.zeros((4, 5, 1, 3), np.int16)), "single slice"),
        "a flat nrrd": (content("a.nrrd", FLAT_NRRD.encode() + DATA), "2 axes"),
        "a flat mha": (mha_of(2), "3 or 4 axes"),
    },
    "no_scan": {
        "gzip of nothing": (content("a.nii", gzip.compress(bytes(600))), "NIfTI header"),
        "zeros": (content("a.nii.gz", bytes(600)), "NIfTI header"),
        **{f"noise in {n}": (content(n, bytes(range(7, 256)) * 9), "") for n in ("a.nii", "a.dcm", "a")},
        "noise in gz": (content("a.nii.gz", gzip.compress(bytes(range(256)) * 9)), "NIfTI header"),
        "a picture named nii": (content("a.nii", b"\x89PNG" + bytes(999)), "NIfTI header"),
        "the header of another format": (content("a.hdr", b"ENVI\nsamples = 4\n" * 99), "NIfTI header"),
        "a picture": (content("a.png", b"\x89PNG"), "neither DICOM nor"),
    },
    "encoding": {
        "nrrd as text": (text("a.nrrd", "raw", "ascii"), "ascii"),
        "nrrd as hex": (text("a.nrrd", "raw", "hex", DATA.hex().encode()), "hex"),
        "mha as text": (text("a.mha", "BinaryData = True", "BinaryData = False"), "as text"),
    },
}  # fmt: skip


@pytest.mark.parametrize(("reason", "case"), [(reason, case) for reason, cases in SPOILT.items() for case in cases])
def test_a_spoilt_file_is_refused_with_the_reason(reason: str, case: str, tmp_path: Path) -> None:
    spoil, words = SPOILT[reason][case]
    path = spoil(tmp_path)
    with pytest.raises(UnreadableScan) as refusal:
        files.read(path)
    assert refusal.value.reason == reason
    assert words in str(refusal.value) and path.stem.split(".")[0] in str(refusal.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for name in ("scan.nii.gz", "scan.mha", "scan.dcm", "folder"):
        with pytest.raises(UnreadableScan, match="is not there"):
            files.read(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    files.write(a_volume(), tmp_path / "scan.nii")
    (tmp_path / "scan.nii").chmod(0)
    with pytest.raises(UnreadableScan, match="may not be read"):
        files.read(tmp_path / "scan.nii")


def test_a_refusal_by_the_system_is_an_unreadable_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write(a_volume(), tmp_path / "scan.nii")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(UnreadableScan, match="may not be read"):
        files.read(tmp_path / "scan.nii")


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(), extension=st.sampled_from(tuple(files.WRITERS)), allow=st.sampled_from(((), tuple(REPAIRS)[:-1]))
)
def test_no_damage_gets_past_as_another_error(
    data: st.DataObject, extension: str, allow: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("spoilt") / f"scan{extension}"
    files.write(a_volume(kind="float32"), path)
    content = bytearray(path.read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    try:
        files.read(path, Reading(allow=allow))
    except UnreadableScan as refusal:
        assert str(refusal) and refusal.reason in REASONS


# real scans


@pytest.mark.parametrize("part", ["imagesTr", "labelsTr"])
def test_real_nifti_is_read_as_nibabel_reads_it(part: str, shared: Path) -> None:
    paths = [p for p in sorted((shared / "data" / "hippocampus" / part).glob("*.nii.gz")) if not p.name.startswith(".")]
    assert len(paths) > 100
    for path in paths[::12]:
        found, image = files.read(path), nibabel.load(path)
        np.testing.assert_array_equal(found.voxels[0], np.asarray(image.dataobj))
        np.testing.assert_allclose(found.geometry.affine, image.affine)
        assert part == "imagesTr" or found.voxels.dtype == np.uint8


def test_real_odd_nifti_is_read_or_refused(shared: Path) -> None:
    paths = [path for path in sorted((shared / "data" / "zoo").rglob("*.nii*")) if path.stat().st_size < 3_000_000]
    if not paths:
        pytest.skip("no odd scans are there")
    for path in paths:
        try:
            found = files.read(path)
        except UnreadableScan:
            continue
        image = nibabel.load(path)
        np.testing.assert_allclose(found.geometry.affine, image.affine, atol=1e-5)
        wanted = np.asarray(image.dataobj)
        np.testing.assert_allclose(
            found.voxels, wanted[None] if wanted.ndim == 3 else np.moveaxis(wanted, -1, 0), rtol=1e-5
        )
