"""Damage done to NIfTI, NRRD and MetaImage files, and to labels that go with them."""

import gzip
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK

from .kinds import FINE, REFUSED, REPAIRED, Made, kind
from .phantom import LPS_TO_RAS, Seen, truth

nifti = partial(kind, "NIfTI")
nrrd = partial(kind, "NRRD")
metaimage = partial(kind, "MetaImage")


def image(
    voxels: np.ndarray | None = None,
    affine: np.ndarray | None = None,
    *,
    dtype: type | str = np.int16,
    version: type = nibabel.Nifti1Image,
) -> nibabel.Nifti1Image:
    true = truth()
    values = true.voxels if voxels is None else voxels
    affine = true.affine if affine is None else affine
    made = version(values.astype(dtype), affine, dtype=np.dtype(dtype))
    made.set_sform(affine, 1)
    made.set_qform(affine, 1, strip_shears=True)
    made.header.set_xyzt_units("mm")
    return made


def saved(made: nibabel.Nifti1Image, folder: Path, name: str = "scan.nii") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    content = made.to_bytes()
    path.write_bytes(gzip.compress(content, 6, mtime=0) if name.endswith(".gz") else content)
    return path


def patched(path: Path, at: int, layout: str, *numbers: float) -> Path:
    """The file with other numbers in its header (NIfTI-1 offsets: nifti1.h)."""
    content = bytearray(path.read_bytes())
    struct.pack_into(layout, content, at, *numbers)
    path.write_bytes(content)
    return path


DIM, DATATYPE, BITPIX, PIXDIM, VOX_OFFSET, SLOPE, UNITS, QFORM_CODE, QOFFSET = 40, 70, 72, 76, 108, 112, 123, 252, 268


def edited(path: Path, edit: Callable[[bytes], bytes]) -> Path:
    path.write_bytes(edit(path.read_bytes()))
    return path


@nifti(FINE)
def control(folder: Path) -> Made:
    return Made(saved(image(), folder), (truth(),))


@nifti(FINE)
def packed_with_gzip(folder: Path) -> Made:
    return Made(saved(image(), folder, "scan.nii.gz"), (truth(),))


@nifti(FINE)
def second_version(folder: Path) -> Made:
    return Made(saved(image(version=nibabel.Nifti2Image), folder), (truth(),))


@nifti(FINE)
def big_endian(folder: Path) -> Made:
    made = image()
    swapped = nibabel.Nifti1Image(made.dataobj, made.affine, made.header.as_byteswapped(">"))
    return Made(saved(swapped, folder), (truth(),))


@nifti(REFUSED, reasons=("damaged",))
def cut_short(folder: Path) -> Made:
    return Made(edited(saved(image(), folder), lambda content: content[: len(content) // 2]))


@nifti(REFUSED, reasons=("damaged",))
def last_byte_missing(folder: Path) -> Made:
    return Made(edited(saved(image(), folder), lambda content: content[:-1]))


@nifti(REFUSED, reasons=("damaged",))
def gzip_cut_short(folder: Path) -> Made:
    return Made(edited(saved(image(), folder, "scan.nii.gz"), lambda content: content[: len(content) // 2]))


@nifti(REFUSED, reasons=("damaged",))
def gzip_without_its_last_4_bytes(folder: Path) -> Made:
    return Made(edited(saved(image(), folder, "scan.nii.gz"), lambda content: content[:-4]), (truth(),))


@nifti(REFUSED, reasons=("damaged",))
def gzip_with_a_wrong_checksum(folder: Path) -> Made:
    path = saved(image(), folder, "scan.nii.gz")
    return Made(edited(path, lambda content: content[:-8] + bytes([content[-8] ^ 1]) + content[-7:]), (truth(),))


@nifti(REFUSED, reasons=("damaged",))
def gzip_with_a_flipped_byte(folder: Path) -> Made:
    path = saved(image(), folder, "scan.nii.gz")
    half = path.stat().st_size // 2
    return Made(edited(path, lambda content: content[:half] + bytes([content[half] ^ 16]) + content[half + 1 :]))


@nifti(REFUSED, FINE, REPAIRED)
def bytes_behind_the_voxels(folder: Path) -> Made:
    return Made(edited(saved(image(), folder), lambda content: content + b"rubbish" * 100), (truth(),))


@nifti(REFUSED, FINE, REPAIRED)
def bytes_behind_the_gzip(folder: Path) -> Made:
    return Made(edited(saved(image(), folder, "scan.nii.gz"), lambda content: content + b"rubbish" * 9), (truth(),))


def with_voxel(value: float, folder: Path) -> Made:
    voxels = truth().voxels
    voxels[20:22, 10:12, 5:7] = value
    voxels[0, 0, 0] = value  # a corner is always looked at
    return Made(saved(image(voxels, dtype=np.float32), folder), (Seen(voxels, truth().affine),))


@nifti(REFUSED, reasons=("not_numbers",))
def nan(folder: Path) -> Made:
    return with_voxel(np.nan, folder)


@nifti(REFUSED, reasons=("not_numbers",))
def infinite(folder: Path) -> Made:
    return with_voxel(np.inf, folder)


@nifti(FINE)
def slope_and_intercept(folder: Path) -> Made:
    path = patched(saved(image(), folder), SLOPE, "<ff", 0.5, 17.0)
    return Made(path, (Seen(truth().voxels * 0.5 + 17, truth().affine),))


@nifti(FINE)
def slope_of_zero(folder: Path) -> Made:
    """nifti1.h: a slope of 0 means that nothing is scaled, whatever the intercept says."""
    return Made(patched(saved(image(), folder), SLOPE, "<ff", 0.0, 0.0), (truth(),))


@nifti(FINE, REFUSED)
def slope_that_is_no_number(folder: Path) -> Made:
    return Made(patched(saved(image(), folder), SLOPE, "<ff", np.nan, np.nan), (truth(),))


@nifti(REFUSED)
def infinite_slope(folder: Path) -> Made:
    return Made(patched(saved(image(), folder), SLOPE, "<ff", np.inf, 0.0))


@nifti(REFUSED)
def intercept_that_is_no_number(folder: Path) -> Made:
    return Made(patched(saved(image(), folder), SLOPE, "<ff", 2.0, np.nan))


@nifti(REFUSED, reasons=("contradiction",))
def qform_a_voxel_off(folder: Path) -> Made:
    path = saved(image(), folder)
    content = path.read_bytes()
    (x,) = struct.unpack_from("<f", content, QOFFSET)
    return Made(patched(path, QOFFSET, "<f", x + 0.8))


@nifti(REFUSED, reasons=("contradiction",))
def qform_mirrored(folder: Path) -> Made:
    made = image()
    mirrored = truth().affine @ np.diag([-1.0, 1, 1, 1])
    made.set_qform(mirrored, 1)
    return Made(saved(made, folder))


@nifti(REFUSED, reasons=("contradiction",))
def pixdim_twice_the_sform(folder: Path) -> Made:
    made = image()
    made.set_qform(truth().affine @ np.diag([2.0, 2, 2, 1]), 1)
    return Made(saved(made, folder))


@nifti(FINE)
def sform_alone(folder: Path) -> Made:
    made = image()
    made.set_qform(None, 0)
    return Made(saved(made, folder), (truth(),))


@nifti(FINE)
def qform_alone(folder: Path) -> Made:
    made = image()
    made.set_sform(None, 0)
    return Made(saved(made, folder), (truth(),))


@nifti(REFUSED, reasons=("no_geometry",))
def neither_qform_nor_sform(folder: Path) -> Made:
    return Made(patched(saved(image(), folder), QFORM_CODE, "<hh", 0, 0))


@nifti(REFUSED, reasons=("no_geometry", "contradiction"))
def sform_of_zeros(folder: Path) -> Made:
    path = patched(saved(image(), folder), QFORM_CODE, "<hh", 0, 1)
    return Made(patched(path, 280, "<12f", *[0.0] * 12))


@nifti(REFUSED, reasons=("tilted",))
def sheared(folder: Path) -> Made:
    lps = truth().affine.copy()
    lps[:3, 2] += 0.2 * lps[:3, 1]
    made = image(affine=lps)
    made.set_qform(None, 0)
    return Made(saved(made, folder), (Seen(truth().voxels, lps),))


@nifti(FINE)
def four_axes_for_one_volume(folder: Path) -> Made:
    return Made(saved(image(truth().voxels[..., None]), folder), (truth(),))


@nifti(FINE)
def four_axes(folder: Path) -> Made:
    both = np.stack([truth().voxels, truth().voxels[::-1]], axis=-1)
    return Made(saved(image(both), folder), (Seen(both, truth().affine),))


@nifti(FINE)
def five_axes_for_a_vector(folder: Path) -> Made:
    both = np.stack([truth().voxels, truth().voxels[::-1]], axis=-1)
    return Made(saved(image(both[:, :, :, None]), folder), (Seen(both, truth().affine),))


@nifti(REFUSED)
def five_axes(folder: Path) -> Made:
    many = np.stack([np.stack([truth().voxels] * 2, axis=-1)] * 3, axis=-1)
    return Made(saved(image(many), folder), (Seen(many, truth().affine),))


@nifti(REFUSED, FINE)
def two_axes(folder: Path) -> Made:
    flat = truth().voxels[:, :, :1]
    return Made(saved(image(flat[:, :, 0]), folder), (Seen(flat, truth().affine),))


def in_unit(word: str, millimetres: float, folder: Path) -> Made:
    made = image(affine=np.diag([1 / millimetres] * 3 + [1]) @ truth().affine)
    made.header.set_xyzt_units(word)
    return Made(saved(made, folder), (truth(),))


@nifti(FINE, REPAIRED)
def in_metres(folder: Path) -> Made:
    return in_unit("meter", 1000, folder)


@nifti(FINE, REPAIRED)
def in_micrometres(folder: Path) -> Made:
    return in_unit("micron", 0.001, folder)


@nifti(FINE, REFUSED)
def unit_that_does_not_exist(folder: Path) -> Made:
    return Made(patched(saved(image(), folder), UNITS, "<b", 7), (truth(),))


@nifti(FINE)
def int64(folder: Path) -> Made:
    return Made(saved(image(dtype=np.int64), folder), (truth(),))


@nifti(FINE)
def unsigned_16_bit(folder: Path) -> Made:
    voxels = truth().voxels + 33000
    return Made(saved(image(voxels, dtype=np.uint16), folder), (Seen(voxels, truth().affine),))


@nifti(FINE)
def float64(folder: Path) -> Made:
    voxels = truth().voxels / 8
    return Made(saved(image(voxels, dtype=np.float64), folder), (Seen(voxels, truth().affine),))


@nifti(REFUSED)
def float64_beyond_float32(folder: Path) -> Made:
    return Made(
        saved(image(truth().voxels * 1e300, dtype=np.float64), folder), (Seen(truth().voxels * 1e300, truth().affine),)
    )


@nifti(REFUSED, FINE)
def int64_beyond_float64(folder: Path) -> Made:
    voxels = truth().voxels.astype(np.int64) + 2**60
    made = nibabel.Nifti1Image(voxels, truth().affine, dtype=np.int64)
    made.set_sform(truth().affine, 1)
    made.set_qform(truth().affine, 1)
    return Made(saved(made, folder), (Seen(voxels, truth().affine),))


@nifti(REFUSED, reasons=("colour",))
def coloured(folder: Path) -> Made:
    grey = (truth().voxels.astype(np.int64) % 256).astype(np.uint8)
    colours = np.stack([grey, 255 - grey, grey // 2], axis=-1)
    structured = colours.view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    made = nibabel.Nifti1Image(structured, truth().affine)
    made.set_sform(truth().affine, 1)
    made.set_qform(truth().affine, 1)
    return Made(saved(made, folder), (Seen(colours, truth().affine),))


@nifti(REFUSED)
def complex_numbers(folder: Path) -> Made:
    voxels = (truth().voxels + 1j * truth().voxels[::-1]).astype(np.complex64)
    return Made(saved(image(voxels, dtype=np.complex64), folder), (Seen(voxels, truth().affine),))


@nifti(REFUSED, FINE)
def a_pair_of_files(folder: Path) -> Made:
    folder.mkdir(parents=True)
    made = image()
    nibabel.Nifti1Pair(made.dataobj, made.affine, made.header).to_filename(folder / "scan.hdr")
    return Made(folder / "scan.hdr", (truth(),))


@nifti(REFUSED)
def a_pair_whose_voxels_are_cut_short(folder: Path) -> Made:
    made = a_pair_of_files(folder)
    edited(folder / "scan.img", lambda content: content[: len(content) // 2])
    return Made(made.path)


@nifti(REFUSED)
def an_analyze_file(folder: Path) -> Made:
    """It has no orientation that one could rely on."""
    folder.mkdir(parents=True)
    nibabel.AnalyzeImage(truth().voxels.astype(np.int16), np.diag([0.8, 1.25, 2, 1])).to_filename(folder / "scan.hdr")
    return Made(folder / "scan.hdr")


@nifti(REFUSED)
def bits_that_lie(folder: Path) -> Made:
    return Made(patched(saved(image(), folder), BITPIX, "<h", 32), (truth(),))


@nifti(REFUSED)
def type_that_does_not_exist(folder: Path) -> Made:
    return Made(patched(saved(image(), folder), DATATYPE, "<h", 77))


@nifti(REFUSED)
def voxels_said_to_begin_later(folder: Path) -> Made:
    return Made(patched(saved(image(), folder), VOX_OFFSET, "<f", 352 + 96 * 4))


@nifti(REFUSED)
def voxels_said_to_begin_within_the_header(folder: Path) -> Made:
    return Made(patched(saved(image(), folder), VOX_OFFSET, "<f", 64), (truth(),))


@nifti(REFUSED)
def voxels_said_to_begin_at_half_a_byte(folder: Path) -> Made:
    return Made(patched(saved(image(), folder), VOX_OFFSET, "<f", 352.5), (truth(),))


@nifti(REFUSED)
def more_slices_declared(folder: Path) -> Made:
    return Made(patched(saved(image(), folder), DIM, "<hhhh", 3, 48, 40, 25))


@nifti(REFUSED)
def fewer_slices_declared(folder: Path) -> Made:
    return Made(patched(saved(image(), folder), DIM, "<hhhh", 3, 48, 40, 20))


@nifti(REFUSED)
def negative_dimension(folder: Path) -> Made:
    return Made(patched(saved(image(), folder), DIM, "<hhhh", 3, 48, -40, 24))


@nifti(FINE, unknowable="two axes of other lengths hold as many voxels")
def two_dimensions_exchanged(folder: Path) -> Made:
    return Made(patched(saved(image(), folder), DIM, "<hhhh", 3, 40, 48, 24), (truth(),))


@nifti(REFUSED, FINE)
def negative_pixdim(folder: Path) -> Made:
    """pixdim must be positive; the sform beside it is sound."""
    return Made(patched(saved(image(), folder), PIXDIM + 4, "<fff", -0.8, -1.25, -2.0), (truth(),))


@nifti(REFUSED)
def negative_pixdim_and_qform_alone(folder: Path) -> Made:
    path = patched(saved(image(), folder), PIXDIM + 4, "<fff", -0.8, -1.25, -2.0)
    return Made(patched(path, QFORM_CODE, "<hh", 1, 0))


@nifti(REFUSED)
def quaternion_longer_than_one(folder: Path) -> Made:
    path = patched(saved(image(), folder), QFORM_CODE, "<hh", 1, 0)
    return Made(patched(path, 256, "<fff", 0.9, 0.9, 0.9))


@nifti(REFUSED, FINE, REPAIRED)
def gzip_named_nii(folder: Path) -> Made:
    return Made(saved(image(), folder, "scan.nii.gz").rename(folder / "scan.nii"), (truth(),))


@nifti(REFUSED, FINE, REPAIRED)
def plain_named_nii_gz(folder: Path) -> Made:
    return Made(saved(image(), folder).rename(folder / "scan.nii.gz"), (truth(),))


@nifti(REFUSED)
def empty(folder: Path) -> Made:
    return Made(edited(saved(image(), folder), lambda _: b""))


@nifti(REFUSED)
def random_bytes(folder: Path) -> Made:
    return Made(edited(saved(image(), folder), lambda _: np.random.default_rng(1).bytes(50_000)))


@nifti(FINE)
def negative_slope(folder: Path) -> Made:
    path = patched(saved(image(), folder), SLOPE, "<ff", -2.0, 10.0)
    return Made(path, (Seen(truth().voxels * -2 + 10, truth().affine),))


@nifti(FINE)
def left_handed_qform_alone(folder: Path) -> Made:
    affine = truth().affine @ np.diag([-1.0, 1, 1, 1])
    made = image(affine=affine)
    made.set_sform(None, 0)
    return Made(saved(made, folder), (Seen(truth().voxels, affine),))


@nifti(FINE)
def with_an_extension(folder: Path) -> Made:
    made = image()
    made.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"a word beside the voxels"))
    return Made(saved(made, folder), (truth(),))


@nifti(FINE)
def gzip_in_two_members(folder: Path) -> Made:
    path = saved(image(), folder, "scan.nii.gz")
    whole = gzip.decompress(path.read_bytes())
    return Made(edited(path, lambda _: gzip.compress(whole[:9999]) + gzip.compress(whole[9999:])), (truth(),))


@nifti(REFUSED, FINE, REPAIRED)
def gzip_within_gzip(folder: Path) -> Made:
    return Made(edited(saved(image(), folder, "scan.nii.gz"), gzip.compress), (truth(),))


@nifti(FINE)
def ending_in_capitals(folder: Path) -> Made:
    return Made(saved(image(), folder, "scan.nii.gz").rename(folder / "SCAN.NII.GZ"), (truth(),))


@nifti(REFUSED)
def sform_that_is_no_number(folder: Path) -> Made:
    path = patched(saved(image(), folder), QFORM_CODE, "<hh", 0, 1)
    return Made(patched(path, 280, "<f", np.nan))


@nifti(REFUSED, reasons=("contradiction",))
def qform_turned_by_a_degree(folder: Path) -> Made:
    """As a registration leaves it: the scanner's place in the qform, another one's in the sform."""
    made = image()
    angle = np.radians(1)
    about_z = np.array(
        [[np.cos(angle), -np.sin(angle), 0, 0], [np.sin(angle), np.cos(angle), 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    )
    made.set_qform(about_z @ truth().affine, 1)
    made.set_sform(truth().affine, 2)
    return Made(saved(made, folder))


@nifti(REFUSED, FINE)
def intercept_beyond_whole_numbers(folder: Path) -> Made:
    path = patched(saved(image(), folder), SLOPE, "<ff", 1.0, 0.25)
    return Made(path, (Seen(truth().voxels + 0.25, truth().affine, within=0.01),))


# NRRD and MetaImage


def itk(folder: Path, name: str, packed: bool = False) -> Path:
    true = truth()
    lps = LPS_TO_RAS @ true.affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    made = SimpleITK.GetImageFromArray(true.voxels.astype(np.int16).transpose(2, 1, 0))
    made.SetSpacing(spacing.tolist())
    made.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    made.SetOrigin(lps[:3, 3].tolist())
    folder.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(made, str(folder / name), useCompression=packed)
    return folder / name


def header_edited(path: Path, edit: Callable[[list[bytes]], list[bytes]], end: bytes) -> Path:
    """The file with other lines in its text header, which ends with the line that begins so."""
    content = path.read_bytes()
    at = content.index(b"\n\n") if not end else content.index(b"\n", content.index(end))
    return edited(path, lambda _: b"\n".join(edit(content[:at].split(b"\n"))) + content[at:])


def lines_without(*beginnings: bytes) -> Callable[[list[bytes]], list[bytes]]:
    return lambda lines: [line for line in lines if not line.startswith(beginnings)]


def line_changed(beginning: bytes, line: bytes) -> Callable[[list[bytes]], list[bytes]]:
    return lambda lines: [line if one.startswith(beginning) else one for one in lines]


@nrrd(FINE)
def control_(folder: Path) -> Made:
    return Made(itk(folder, "scan.nrrd"), (truth(),))


@nrrd(FINE)
def packed(folder: Path) -> Made:
    return Made(itk(folder, "scan.nrrd", packed=True), (truth(),))


@nrrd(REFUSED, reasons=("no_geometry",))
def without_space(folder: Path) -> Made:
    beginnings = (b"space", b"kinds")
    spacings = b"spacings: 0.8 1.25 2"
    return Made(
        header_edited(itk(folder, "scan.nrrd"), lambda lines: [*lines_without(*beginnings)(lines), spacings], b"")
    )


@nrrd(REFUSED, reasons=("no_geometry",))
def without_origin(folder: Path) -> Made:
    return Made(header_edited(itk(folder, "scan.nrrd"), lines_without(b"space origin"), b""))


@nrrd(FINE, REFUSED)
def in_ras(folder: Path) -> Made:
    path = header_edited(itk(folder, "scan.nrrd"), line_changed(b"space:", b"space: right-anterior-superior"), b"")
    return Made(path, (Seen(truth().voxels, LPS_TO_RAS @ truth().affine),))


@nrrd(REFUSED, reasons=("damaged",))
def cut_short_(folder: Path) -> Made:
    return Made(edited(itk(folder, "scan.nrrd"), lambda content: content[:-5000]))


@nrrd(REFUSED, reasons=("damaged",))
def gzip_cut_short_(folder: Path) -> Made:
    return Made(edited(itk(folder, "scan.nrrd", packed=True), lambda content: content[: len(content) // 2]))


@nrrd(REFUSED, reasons=("damaged",))
def gzip_with_a_flipped_byte_(folder: Path) -> Made:
    path = itk(folder, "scan.nrrd", packed=True)
    at = path.stat().st_size * 2 // 3
    return Made(edited(path, lambda content: content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :]))


@nrrd(REFUSED)
def more_slices_declared_(folder: Path) -> Made:
    return Made(header_edited(itk(folder, "scan.nrrd"), line_changed(b"sizes:", b"sizes: 48 40 25"), b""))


@nrrd(REFUSED)
def fewer_slices_declared_(folder: Path) -> Made:
    return Made(header_edited(itk(folder, "scan.nrrd"), line_changed(b"sizes:", b"sizes: 48 40 20"), b""))


@nrrd(FINE, REFUSED)
def big_endian_(folder: Path) -> Made:
    path = header_edited(itk(folder, "scan.nrrd"), line_changed(b"endian:", b"endian: big"), b"")
    body = truth().voxels.astype(">i2").tobytes(order="F")
    return Made(edited(path, lambda content: content[: -len(body)] + body), (truth(),))


@nrrd(REFUSED, FINE)
def without_byte_order(folder: Path) -> Made:
    return Made(header_edited(itk(folder, "scan.nrrd"), lines_without(b"endian"), b""), (truth(),))


@nrrd(REFUSED)
def sheared_(folder: Path) -> Made:
    lps = LPS_TO_RAS @ truth().affine
    lps[:3, 2] += 0.2 * lps[:3, 1]
    vectors = " ".join(f"({','.join(str(x) for x in column)})" for column in lps[:3, :3].T)
    line = b"space directions: " + vectors.encode()
    path = header_edited(itk(folder, "scan.nrrd"), line_changed(b"space directions", line), b"")
    return Made(path, (Seen(truth().voxels, LPS_TO_RAS @ lps),))


@metaimage(FINE)
def control__(folder: Path) -> Made:
    return Made(itk(folder, "scan.mha"), (truth(),))


@metaimage(FINE)
def packed_(folder: Path) -> Made:
    return Made(itk(folder, "scan.mha", packed=True), (truth(),))


@metaimage(FINE)
def header_and_voxels_apart(folder: Path) -> Made:
    return Made(itk(folder, "scan.mhd"), (truth(),))


@metaimage(REFUSED, reasons=("damaged",))
def cut_short__(folder: Path) -> Made:
    return Made(edited(itk(folder, "scan.mha"), lambda content: content[:-5000]))


@metaimage(REFUSED, reasons=("damaged",))
def packed_and_cut_short(folder: Path) -> Made:
    return Made(edited(itk(folder, "scan.mha", packed=True), lambda content: content[: len(content) // 2]))


@metaimage(REFUSED, reasons=("damaged",))
def packed_with_a_wrong_checksum(folder: Path) -> Made:
    path = itk(folder, "scan.mha", packed=True)
    return Made(edited(path, lambda content: content[:-1] + bytes([content[-1] ^ 1])), (truth(),))


@metaimage(REFUSED, reasons=("no_geometry",))
def without_orientation(folder: Path) -> Made:
    return Made(header_edited(itk(folder, "scan.mha"), lines_without(b"TransformMatrix"), b"ElementDataFile"))


@metaimage(REFUSED, reasons=("no_geometry",))
def without_spacing(folder: Path) -> Made:
    return Made(header_edited(itk(folder, "scan.mha"), lines_without(b"ElementSpacing"), b"ElementDataFile"))


@metaimage(REFUSED)
def more_slices_declared__(folder: Path) -> Made:
    edit = line_changed(b"DimSize", b"DimSize = 48 40 25")
    return Made(header_edited(itk(folder, "scan.mha"), edit, b"ElementDataFile"))


@metaimage(REFUSED)
def fewer_slices_declared__(folder: Path) -> Made:
    edit = line_changed(b"DimSize", b"DimSize = 48 40 20")
    return Made(header_edited(itk(folder, "scan.mha"), edit, b"ElementDataFile"))


@metaimage(REFUSED, FINE)
def big_endian__(folder: Path) -> Made:
    path = itk(folder, "scan.mha")
    header_edited(path, line_changed(b"BinaryDataByteOrderMSB", b"BinaryDataByteOrderMSB = True"), b"ElementDataFile")
    header_edited(path, line_changed(b"ElementByteOrderMSB", b"ElementByteOrderMSB = True"), b"ElementDataFile")
    body = truth().voxels.astype(">i2").tobytes(order="F")
    return Made(edited(path, lambda content: content[: -len(body)] + body), (truth(),))


@metaimage(REFUSED)
def voxels_of_the_header_lost(folder: Path) -> Made:
    path = itk(folder, "scan.mhd")
    (folder / "scan.raw").unlink()
    return Made(path)


def nrrd_line(line: bytes, folder: Path, *truths: Seen) -> Made:
    """A NRRD file of which the line for that key is another one, or which has a line more."""
    key = line.partition(b":")[0]

    def edit(lines: list[bytes]) -> list[bytes]:
        there = any(one.startswith(key + b":") for one in lines)
        return line_changed(key + b":", line)(lines) if there else [*lines, line]

    return Made(header_edited(itk(folder, "scan.nrrd"), edit, b""), truths)


@nrrd(REFUSED, reasons=("no_geometry", "unsupported", "contradiction"))
def in_the_space_of_a_scanner(folder: Path) -> Made:
    return nrrd_line(b"space: scanner-xyz", folder)


@nrrd(REFUSED)
def direction_that_is_no_number(folder: Path) -> Made:
    return nrrd_line(b"space directions: (nan,0,0) (0,1,0) (0,0,1)", folder)


@nrrd(REFUSED)
def direction_of_zero(folder: Path) -> Made:
    return nrrd_line(b"space directions: (0,0,0) (0,1,0) (0,0,1)", folder)


@nrrd(FINE, REPAIRED)
def in_centimetres(folder: Path) -> Made:
    affine = truth().affine.copy()
    affine[:3] *= 10
    return nrrd_line(b'space units: "cm" "cm" "cm"', folder, Seen(truth().voxels, affine))


@nrrd(REFUSED, FINE)
def voxels_to_be_taken_from_the_end(folder: Path) -> Made:
    return nrrd_line(b"byte skip: -1", folder, truth())


@nrrd(REFUSED)
def packing_that_does_not_exist(folder: Path) -> Made:
    return nrrd_line(b"encoding: zstd", folder)


@nrrd(REFUSED)
def text_encoding(folder: Path) -> Made:
    return nrrd_line(b"encoding: ascii", folder)


@nrrd(REFUSED)
def type_of_twice_the_size(folder: Path) -> Made:
    return nrrd_line(b"type: int", folder)


@nrrd(REFUSED)
def type_of_half_the_size(folder: Path) -> Made:
    return nrrd_line(b"type: uchar", folder)


def meta_line(line: bytes, folder: Path, *truths: Seen, packed: bool = False) -> Made:
    key = line.partition(b" =")[0]

    def edit(lines: list[bytes]) -> list[bytes]:
        there = any(one.startswith(key + b" =") for one in lines)
        return line_changed(key + b" =", line)(lines) if there else [*lines[:-1], line, lines[-1]]

    return Made(header_edited(itk(folder, "scan.mha", packed), edit, b"ElementDataFile"), truths)


@metaimage(REFUSED)
def negative_spacing(folder: Path) -> Made:
    return meta_line(b"ElementSpacing = 0.8 -1.25 2", folder)


@metaimage(REFUSED)
def spacing_of_zero(folder: Path) -> Made:
    return meta_line(b"ElementSpacing = 0.8 0 2", folder)


@metaimage(REFUSED)
def axes_that_are_not_at_right_angles(folder: Path) -> Made:
    lps = LPS_TO_RAS @ truth().affine
    lps[:3, :3] = np.array([[1, 0, 0], [0.5, 0.8660254, 0], [0, 0, 1]]).T * [0.8, 1.25, 2]
    true = Seen(truth().voxels, LPS_TO_RAS @ lps)
    return meta_line(b"TransformMatrix = 1 0 0 0.5 0.8660254 0 0 0 1", folder, true)


@metaimage(REFUSED)
def axes_of_other_lengths_than_one(folder: Path) -> Made:
    return meta_line(b"TransformMatrix = 2 0 0 0 2 0 0 0 2", folder)


@metaimage(REFUSED, FINE)
def bytes_to_skip(folder: Path) -> Made:
    return meta_line(b"HeaderSize = 100", folder)


@metaimage(REFUSED)
def type_of_half_the_size_(folder: Path) -> Made:
    return meta_line(b"ElementType = MET_UCHAR", folder)


@metaimage(REFUSED, FINE, REPAIRED)
def packed_size_that_lies(folder: Path) -> Made:
    return meta_line(b"CompressedDataSize = 1000", folder, truth(), packed=True)


@metaimage(REFUSED)
def voxels_in_another_folder(folder: Path) -> Made:
    return meta_line(b"ElementDataFile = ../scan.raw", folder)


# Labels beside their image: what a dataset check must see

labels = partial(kind, "labels")


def dataset(folder: Path, labels_affine: np.ndarray, values: np.ndarray, dtype: type = np.uint8) -> Made:
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    saved(image(), folder / "images", "case.nii.gz")
    saved(image(values, labels_affine, dtype=dtype), folder / "labels", "case.nii.gz")
    return Made(folder)


def blob() -> np.ndarray:
    away = np.linalg.norm((np.moveaxis(np.indices((48, 40, 24)), 0, -1) - [24, 20, 12]) / [8, 7, 4], axis=-1)
    return (away < 1).astype(np.float64)


@labels(FINE)
def on_the_grid_of_the_image(folder: Path) -> Made:
    return dataset(folder, truth().affine, blob())


@labels(REFUSED)
def shifted_by_half_a_voxel(folder: Path) -> Made:
    affine = truth().affine.copy()
    affine[:3, 3] += 0.5 * affine[:3, :3].sum(axis=1)
    return dataset(folder, affine, blob())


@labels(REFUSED)
def mirrored(folder: Path) -> Made:
    return dataset(folder, truth().affine @ np.diag([-1.0, 1, 1, 1]), blob())


@labels(REFUSED)
def on_another_grid(folder: Path) -> Made:
    return dataset(folder, truth().affine @ np.diag([2.0, 2, 2, 1]), blob()[::2, ::2, ::2])


@labels(REFUSED)
def interpolated(folder: Path) -> Made:
    soft = (blob() + np.roll(blob(), 1, axis=0)) / 2
    return dataset(folder, truth().affine, soft, np.float32)


@labels(REFUSED)
def negative(folder: Path) -> Made:
    return dataset(folder, truth().affine, -blob(), np.int16)


@labels(REFUSED)
def nan_(folder: Path) -> Made:
    values = blob()
    values[0, 0, 0] = np.nan
    return dataset(folder, truth().affine, values, np.float32)
