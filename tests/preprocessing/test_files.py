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
from preprocessing.volume import Geometry, ScanError, UnreadableScan, Volume

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
SHAPE = (4, 5, 3)
EXTENSION = pytest.mark.parametrize("extension", files.EXTENSIONS)


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
    extension=st.sampled_from(files.EXTENSIONS),
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
    for name, reader in {"a.nii.gz": "nibabel 5", "a.mhd": "SimpleITK 2"}.items():
        files.write(a_volume(), tmp_path / name)
        found = files.read(tmp_path / name).provenance
        assert found.sources[0] == str(tmp_path / name) and found.reader.startswith(reader)
        assert found.sha256 == files.sha256(Path(source) for source in found.sources)
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
    assert files.read(tmp_path).provenance.repairs == ("notes.txt left alone: not DICOM",)


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


RGB = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
SPOILT = {
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
    **{f"NaN in {name}": (holed(np.nan, name), "2 of 60 voxels") for name in ("a.nii.gz", "a.nrrd", "a.mha")},
    "infinity": (holed(np.inf, "a.nii"), "2 of 60 voxels"),
    "a double beyond float32": (nifti(np.full(SHAPE, 1e300)), "60 of 60 voxels"),
    "complex": (nifti(np.zeros(SHAPE, np.complex64)), "complex64"),
    "colour": (nifti(RGB), "coloured"),
    "two orientations": (nifti(qoffset_x=-89.9), "sform and qform lying 0.10 mm apart"),
    "no orientation": (nifti(sform_code=0, qform_code=0), "nothing of its orientation"),
    "a sheared grid": (tilted_sform(qform_code=0), "sheared"),
    "an affine of NaN": (nifti(srow_x=[np.nan] * 4, qform_code=0), "affine"),
    "an affine of zeros": (nifti(srow_x=[0] * 4, qform_code=0), "affine"),
    "an impossible quaternion": (nifti(quatern_b=3, sform_code=0), "cannot be read"),
    "a unit that is none": (nifti(xyzt_units=5), "unit 5"),
    "an infinite slope": (nifti(scl_slope=np.inf), "infinite scl_slope"),
    "a NaN intercept": (nifti(scl_slope=2, scl_inter=np.nan), "intercept"),
    "two axes": (nifti(dim=[2, 4, 15, 1, 1, 1, 1, 1]), "shape"),
    "five axes": (nifti(np.zeros((2, 2, 2, 2, 2), np.int16)), "shape"),
    "no axes": (nifti(dim=[0] * 8), "shape"),
    "a negative axis": (nifti(dim=[3, -4, 5, 3, 1, 1, 1, 1]), "shape"),
    "an unknown type": (nifti(datatype=77), "type 77"),
    "bits that contradict the type": (nifti(bitpix=32), "contradicts itself"),
    "voxels inside the header": (nifti(vox_offset=100), "contradicts itself"),
    "half a pair": (nifti(magic=b"ni1"), "pair"),
    "gzip named nii": (content("a.nii", gzip.compress(bytes(600))), "ending says the opposite"),
    "nii named gz": (content("a.nii.gz", bytes(600)), "ending says the opposite"),
    **{f"nothing in {n}": (content(n, b""), "empty") for n in ("a.nii", "a.nii.gz", "a.nrrd", "a.mhd", "a.dcm")},
    **{f"noise in {n}": (content(n, bytes(range(7, 256)) * 9), "") for n in ("a.nii", "a.nrrd", "a.mha", "a.dcm", "a")},
    "noise in gz": (content("a.nii.gz", gzip.compress(bytes(range(256)) * 9)), "NIfTI header"),
    "a nrrd named mha": (content("a.mha", NRRD.encode() + DATA), "text header"),
    "a picture": (content("a.png", b"\x89PNG"), "neither DICOM nor"),
    "nrrd without space": (text("a.nrrd", "space: left-posterior-superior\n", ""), "`space`"),
    "nrrd without directions": (text("a.nrrd", "space directions", "x directions"), "`space directions`"),
    "nrrd without origin": (text("a.nrrd", "space origin", "x origin"), "`space origin`"),
    "nrrd in scanner space": (text("a.nrrd", "left-posterior-superior", "scanner-xyz"), "scanner-xyz"),
    "nrrd as text": (text("a.nrrd", "raw", "ascii"), "ascii"),
    "nrrd as bzip2": (text("a.nrrd", "raw", "bzip2", bz2.compress(DATA)), "bzip2"),
    "nrrd of blocks": (text("a.nrrd", "type: short", "type: block"), "block"),
    "nrrd in furlongs": (text("a.nrrd", "endian", 'space units: "fur" "fur" "fur"\nendian'), "fur"),
    "nrrd in colour": (text("a.nrrd", "endian", "kinds: RGB-color domain domain\nendian"), "rgb-color"),
    "nrrd with a skip": (text("a.nrrd", "endian", "byte skip: 4\nendian"), "skip"),
    "nrrd sheared": (text("a.nrrd", "(0,3,0)", "(1,3,0)"), "sheared"),
    "nrrd with sizes of words": (text("a.nrrd", "2 3 2", "two 3 2"), "cannot be read"),
    "nrrd elsewhere": (text("a.nhdr", "endian", "data file: ../../secret.raw\nendian"), "same folder"),
    "nrrd of absent voxels": (text("a.nhdr", "endian", "data file: gone.raw\nendian"), "same folder"),
    "mha without matrix": (text("a.mha", "TransformMatrix", "X"), "`TransformMatrix`"),
    "mha without spacing": (text("a.mha", "ElementSpacing", "X"), "`ElementSpacing`"),
    "mha without offset": (text("a.mha", "Offset", "X"), "`Offset`"),
    "mha as text": (text("a.mha", "BinaryData = True", "BinaryData = False"), "as text"),
    "mha in parsecs": (text("a.mha", "Offset", "DistanceUnits = pc\nOffset"), "pc"),
    "mha sheared": (text("a.mha", "1 0 0 0 1 0 0 0 1", "1 0 0 0.3 0.954 0 0 0 1"), "sheared"),
    "mha with long directions": (text("a.mha", "1 0 0 0 1 0 0 0 1", "2 0 0 0 1 0 0 0 1"), "lengths"),
    "mha of flat voxels": (text("a.mha", "2 3 2", "12"), "3 or 4 axes"),
    "mha of slices in files": (text("a.mhd", "LOCAL", "slice%03d.raw 1 2 1"), "same folder"),
    "mha not compressed": (text("a.mha", "CompressedData = False", "CompressedData = True"), "damaged"),
    "mha short inside": (text("a.mha", "edData = False", "edData = True", zlib.compress(DATA[:-2])), "truncated"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_file_is_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    spoil, reason = SPOILT[case]
    path = spoil(tmp_path)
    with pytest.raises(UnreadableScan) as refusal:
        files.read(path)
    assert reason in str(refusal.value) and path.stem.split(".")[0] in str(refusal.value)


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
@given(data=st.data(), extension=st.sampled_from((".nii", ".nii.gz", ".nrrd", ".mha")))
def test_no_damage_gets_past_as_another_error(
    data: st.DataObject, extension: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("spoilt") / f"scan{extension}"
    files.write(a_volume(kind="float32"), path)
    content = bytearray(path.read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    try:
        files.read(path)
    except UnreadableScan as refusal:
        assert str(refusal)


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
