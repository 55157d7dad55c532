"""NIfTI, single files and pairs: nibabel takes the header, we the voxels, to see that they are all there."""

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import nibabel
import numpy as np
from jaxtyping import Float, Shaped
from nibabel.nifti1 import data_type_codes
from nibabel.spatialimages import HeaderDataError

from .reading import Reading
from .stored import (
    DEFLATE_RATIO,
    Stored,
    as_float32,
    packed_as,
    refuse_impossible,
    refuse_kind,
    refuse_other_length,
    to_millimetres,
)
from .volume import CORNER_TOLERANCE_MM, Geometry, UnreadableScan

NIFTI_UNITS = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
"""nifti1.h, NIFTI_UNITS_*: millimetres per unknown (by habit millimetres), metre, millimetre, micron."""

NIFTI_LABEL = 1002
"""nifti1.h, NIFTI_INTENT_LABEL."""

NO_INTENSITIES = {
    **{1004: "matrices", 1005: "symmetric matrices", 1006: "displacements", 1008: "points", 1009: "triangles"},
    **{1010: "quaternions", 2002: "the indices of nodes", 2003: "colours", 2004: "colours"},
}
"""nifti1.h, NIFTI_INTENT_*: what a voxel may hold that is no intensity."""

VECTORS = 1007
"""nifti1.h, NIFTI_INTENT_VECTOR: how ITK marks several channels, too."""

PIXDIM_TOLERANCE = 0.01
"""Share by which pixdim may miss the lengths of the sform's axes: some writers round it."""

MAGICS = {b"n+1": "NIfTI-1", b"n+2": "NIfTI-2", b"ni1": "NIfTI-1 pair", b"ni2": "NIfTI-2 pair"}


def read(path: Path, reading: Reading) -> Stored:
    """A single file, or a pair by either of its names."""
    taken = _taken(path)
    header, files = taken.header, taken.files
    voxels = _channels_first(_rescaled(taken.voxels, header, path))
    affine, repairs, notes = _placed(header, taken.voxels.shape, reading, path)
    if int(header["intent_code"]) == VECTORS:
        notes.append("Its voxels are vectors, by their header; each component was read as a channel.")
    return Stored(
        voxels=voxels,
        affine=affine,
        files=files,
        reader=f"nibabel {nibabel.__version__}",
        encoding=f"{MAGICS[_magic(header)]}, {packed_as(taken.voxels.dtype, 'gzip' if taken.zipped else 'raw')}",
        repairs=(*taken.repairs, *repairs),
        notes=tuple(notes),
    )


def is_pair(path: Path) -> bool:
    """Whether the name is one that a half of a pair bears."""
    return path.name.lower().removesuffix(".gz").endswith((".hdr", ".img"))


# bytes


@dataclass(frozen=True, kw_only=True)
class _Taken:
    header: nibabel.Nifti1Header
    voxels: Shaped[np.ndarray, "*axes"]
    files: tuple[Path, ...]
    zipped: bool
    repairs: tuple[str, ...]


def _taken(path: Path) -> _Taken:
    head = _half(path, ".hdr") if is_pair(path) else path
    with _opened(head) as stream:
        header, length = _header(stream.read, head)
        layout = _layout(header, head)
        if _magic(header).startswith(b"n+"):
            files: tuple[Path, ...] = (head,)
            voxels = _voxels(stream, length, layout, head)
        else:
            files = (head, _half(path, ".img"))
            with _opened(files[1]) as other:
                voxels = _voxels(other, 0, layout, files[1])
    zipped = [_is_zipped(file) for file in files]
    repairs = [
        f"{file.name} is {'' if one else 'not '}gzip-compressed, though its ending says otherwise; it was read as it is."
        for file, one in zip(files, zipped, strict=True)
        if one != file.name.lower().endswith(".gz")
    ]
    return _Taken(header=header, voxels=voxels, files=files, zipped=zipped[-1], repairs=tuple(repairs))


def _half(path: Path, ending: str) -> Path:
    """The header or the voxels of a pair, by the name of either; there once, or the very one that was named."""
    if not is_pair(path):
        raise UnreadableScan(
            f"{path.name} is the header of a pair; its voxels lie in a file of their own. Name the two .hdr and .img.",
            "damaged",
        )
    name = path.name.lower().removesuffix(".gz")[: -len(ending)] + ending
    found = [file for file in sorted(path.parent.iterdir()) if file.name.lower().removesuffix(".gz") == name]
    if path not in found and len(found) != 1:
        raise UnreadableScan(
            f"{path.name} is half of a pair, of which {len(found)} files end in {ending}; exactly one must lie in the "
            "same folder. Keep the two together.",
            "contradiction" if found else "damaged",
        )
    return path if path in found else found[0]


def _is_zipped(path: Path) -> bool:
    with path.open("rb") as raw:
        return raw.read(2) == b"\x1f\x8b"


def _opened(path: Path) -> gzip.GzipFile | BufferedReader:
    return gzip.GzipFile(path, "rb") if _is_zipped(path) else path.open("rb")


def _header(take: Callable[[int], bytes], path: Path) -> tuple[nibabel.Nifti1Header, int]:
    block = take(348)
    orders = {int.from_bytes(block[:4], "little"): "<", int.from_bytes(block[:4], "big"): ">"}
    size = 540 if 540 in orders else 348
    block += take(192) if size == 540 else b""
    if size not in orders or len(block) < size:
        raise UnreadableScan(
            f"{path.name} does not begin with a NIfTI header; one was needed. Check the file.",
            "damaged" if size in orders else "no_scan",
        )
    kind = nibabel.Nifti2Header if size == 540 else nibabel.Nifti1Header
    header = kind(block, endianness=orders[size], check=False)
    if _magic(header) not in MAGICS:
        raise UnreadableScan(
            f"{path.name} is an Analyze file, which does not say for sure where its voxels lie (left and right may be "
            "exchanged); a NIfTI file is needed. Convert it with a tool that knows its orientation.",
            "no_geometry",
        )
    return header, len(block)


def _magic(header: nibabel.Nifti1Header) -> bytes:
    return bytes(header["magic"])[:3]


def _layout(header: nibabel.Nifti1Header, path: Path) -> tuple[tuple[int, ...], np.dtype, int]:
    kind = _kind(header, path)
    start, single = float(header["vox_offset"]), _magic(header).startswith(b"n+")
    first = header.sizeof_hdr + 4 if single else 0
    if kind.itemsize * 8 != int(header["bitpix"]) or not start.is_integer() or start < first:
        raise UnreadableScan(
            f"{path.name} has a header that contradicts itself (type {kind}, {int(header['bitpix'])} bits, voxels from "
            f"byte {start:g}); it cannot be relied on. Export the scan again.",
            "contradiction",
        )
    return _shape(header, path), kind, int(start)


def _shape(header: nibabel.Nifti1Header, path: Path) -> tuple[int, ...]:
    """Three axes of space and perhaps one of channels; trailing axes of one step are no axes."""
    axes = int(header["dim"][0])
    shape = tuple(int(n) for n in header["dim"][1 : axes + 1])
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    believable = 1 <= axes <= 7 and min(shape) > 0
    content = NO_INTENSITIES.get(int(header["intent_code"]))
    if not believable or len(shape) < 3 or (len(shape) > 4 and (len(shape) > 5 or shape[3] > 1)):
        reason = "contradiction" if not believable else "too_few_slices" if len(shape) < 3 else "unsupported"
        raise UnreadableScan(
            f"{path.name} has the shape {shape}; three axes, or a fourth for channels, are needed. Split or convert it.",
            reason,
        )
    if content:
        raise UnreadableScan(
            f"{path.name} holds {content} by its header; intensities or labels are needed. Name the scan itself.",
            "colour" if content == "colours" else "unsupported",
        )
    return shape


def _kind(header: nibabel.Nifti1Header, path: Path) -> np.dtype:
    code = int(header["datatype"])
    if code not in data_type_codes or code in (0, 255):
        raise UnreadableScan(
            f"{path.name} has voxels of the type {code}, which is none of NIfTI's; an integer or a float is needed. "
            "Copy it again.",
            "contradiction",
        )
    kind = header.get_data_dtype()
    if kind.kind == "V" and not kind.names:
        bits = {1: " (single bits)", 1536: " (128 bits)"}.get(code, "")
        raise UnreadableScan(
            f"{path.name} has voxels of the type {code}{bits}; integers, or floats of 32 or 64 bits, are needed. "
            "Convert it first.",
            "unsupported",
        )
    refuse_kind(kind, path.name)
    return kind


def _voxels(
    stream: gzip.GzipFile | BufferedReader, taken: int, layout: tuple[tuple[int, ...], np.dtype, int], path: Path
) -> Shaped[np.ndarray, "*axes"]:
    shape, kind, start = layout
    promised = start + int(np.prod(shape, dtype=object)) * kind.itemsize
    size = path.stat().st_size
    refuse_impossible(promised, size * DEFLATE_RATIO if _is_zipped(path) else size, path)
    stored = stream.read(promised - taken)
    refuse_other_length(taken + len(stored), promised, bool(stream.read(1)), path)  # reads on: checks the CRC
    return np.frombuffer(stored, kind, offset=start - taken).reshape(shape, order="F")


def _rescaled(voxels: np.ndarray, header: nibabel.Nifti1Header, path: Path) -> np.ndarray:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or np.isnan(slope):  # nifti1.h: not scaled
        return voxels
    if np.isinf(slope) or not np.isfinite(intercept):
        raise UnreadableScan(
            f"{path.name} has a scl_slope of {slope:g} and an intercept of {intercept:g}; numbers are needed. "
            "Export the scan again.",
            "values",
        )
    return voxels if (slope, intercept) == (1, 0) else as_float32(voxels, path.name, slope, intercept)


def _channels_first(voxels: np.ndarray) -> Shaped[np.ndarray, "channel i j k"]:
    if voxels.ndim == 5:
        voxels = voxels[:, :, :, 0]
    return voxels[None] if voxels.ndim == 3 else np.moveaxis(voxels, -1, 0)


# where voxels lie


def _placed(
    header: nibabel.Nifti1Header, shape: tuple[int, ...], reading: Reading, path: Path
) -> tuple[Float[np.ndarray, "4 4"], list[str], list[str]]:
    """The affine in millimetres, what was repaired on the way, and what one should know."""
    affine, repairs = _believed(header, shape, reading, path)
    unit = int(header["xyzt_units"]) & 7
    if unit not in NIFTI_UNITS:
        raise UnreadableScan(
            f"{path.name} declares the unit {unit}, which is no length; set it to millimetres (2).", "no_geometry"
        )
    notes = [] if unit else ["Its header names no unit of length; millimetres were taken, as everywhere."]
    affine, converted = to_millimetres(affine, NIFTI_UNITS[unit])
    return affine, [*repairs, *converted], notes


def _believed(
    header: nibabel.Nifti1Header, shape: tuple[int, ...], reading: Reading, path: Path
) -> tuple[Float[np.ndarray, "4 4"], list[str]]:
    """The one affine that is meant: sform and qform agree, or there is but one, or a person said which."""
    if min(int(header["sform_code"]), int(header["qform_code"])) < 0:
        raise UnreadableScan(f"{path.name} has a negative sform or qform code; 0 to 5 are known.", "contradiction")
    sform, (qform, mended) = header.get_sform(coded=True)[0], _qform(header)
    if sform is None and qform is None:
        raise UnreadableScan(
            f"{path.name} says nothing of its orientation (sform and qform codes are 0); one of them is needed. "
            "Export it again with its orientation; it is not guessed.",
            "no_geometry",
        )
    if isinstance(qform, str) and sform is None:
        raise UnreadableScan(
            f"{path.name} has {qform}; one that is sound is needed. Export it again with its orientation.",
            "no_geometry",
        )
    if isinstance(qform, np.ndarray) and sform is None:
        return qform, mended
    met = _beside_sform(header, sform, shape) if qform is None else _disagreement(header, sform, qform, shape)
    if not met:
        return sform, _odd_pixdim(header) if qform is None else []
    if "sform" in reading.allow:
        return sform, [f"{path.name} has {met}; the sform was believed."]
    if "qform" in reading.allow and isinstance(qform, np.ndarray):
        return qform, [f"{path.name} has {met}; the qform was believed.", *mended]
    raise UnreadableScan(
        f"{path.name} has {met}; they must agree. Find out which is right and set the other's code to 0, or let one "
        "be believed: `--allow sform` or `--allow qform`.",
        "contradiction",
    )


def _qform(header: nibabel.Nifti1Header) -> tuple[Float[np.ndarray, "4 4"] | str | None, list[str]]:
    """What quaternion, offset and pixdim say; or what is wrong with them; or None where they say nothing."""
    if int(header["qform_code"]) == 0:
        return None, []
    spacing, mended = np.array(header["pixdim"][1:4], np.float64), []
    if not _is_spacing(spacing):
        return f"a qform whose pixdim {spacing.tolist()} is no spacing", []
    if float(header["pixdim"][0]) == 0:
        header["pixdim"][0] = 1  # nifti1.h, METHOD 2: a qfac of 0 should not occur and is taken as 1
        mended = ["Its qfac is 0, which should not occur; it was taken as 1, as the standard says."]
    try:
        return header.get_qform(), mended
    except (HeaderDataError, ValueError, ZeroDivisionError) as error:
        return f"a qform that is no rotation ({error})", []


def _disagreement(
    header: nibabel.Nifti1Header,
    sform: Float[np.ndarray, "4 4"],
    qform: Float[np.ndarray, "4 4"] | str,
    shape: tuple[int, ...],
) -> str:
    """Empty where both place every corner alike."""
    if isinstance(qform, str):
        return f"an sform and {qform}"
    apart = _apart(sform, qform, shape)
    fits = apart <= CORNER_TOLERANCE_MM + _quaternion_doubt(header, sform, shape)
    return "" if fits else f"two places for its voxels, sform and qform lying {apart:.2f} mm apart"


def _beside_sform(header: nibabel.Nifti1Header, sform: Float[np.ndarray, "4 4"], shape: tuple[int, ...]) -> str:
    """Empty where pixdim does not deny the lengths of the sform's axes: ITK takes the spacing from it, nibabel does not.

    An affine that places nothing is refused later, and a sheared one has no spacing that all agree upon.
    """
    spacing, lengths = np.array(header["pixdim"][1:4], np.float64), np.linalg.norm(sform[:3, :3], axis=0)
    if not np.isfinite(sform).all() or np.linalg.matrix_rank(sform) < 4 or not _is_spacing(spacing):
        return ""
    if Geometry(shape=(2, 2, 2), affine=sform).is_sheared:
        return ""
    fits = (np.abs(spacing - lengths) <= PIXDIM_TOLERANCE * lengths).all()
    return "" if fits else f"two spacings, {lengths.round(4).tolist()} by its sform and {spacing.tolist()} by pixdim"


def _odd_pixdim(header: nibabel.Nifti1Header) -> list[str]:
    spacing = np.array(header["pixdim"][1:4], np.float64)
    if _is_spacing(spacing):
        return []
    return [f"Its pixdim {spacing.tolist()} is no spacing; the lengths of the sform's axes were taken."]


def _is_spacing(millimetres: Float[np.ndarray, " 3"]) -> bool:
    return bool(np.isfinite(millimetres).all() and (millimetres > 0).all())


def _apart(one: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> float:
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(shape[:3]) - 1)
    return float(np.abs(corners @ (one - other)[:3, :3].T + (one - other)[:3, 3]).max())


def _quaternion_doubt(header: nibabel.Nifti1Header, affine: np.ndarray, shape: tuple[int, ...]) -> float:
    """Millimetres by which a faithful qform may miss a corner: a is left out of the file, and 1 - b² - c² - d² is
    known to 3 eps only (nibabel's threshold too), which is a wide door near half turns, where a is nearly 0."""
    eps = 3 * float(np.finfo(np.float32).eps)
    left = 1 - sum(float(header[f"quatern_{x}"]) ** 2 for x in "bcd")
    doubt = np.sqrt(max(left, 0) + eps) - np.sqrt(max(left - eps, 0))
    return 2 * float(doubt) * float(np.linalg.norm(affine[:3, :3] @ (np.array(shape[:3]) - 1)))


def write(voxels: np.ndarray, geometry: Geometry, path: Path, is_labels: bool, scale: float) -> None:
    """Both forms where both can say it, millimetres, the intent of labels, and what a stored 1 stands for."""
    image = nibabel.Nifti1Image(
        voxels[0] if len(voxels) == 1 else np.moveaxis(voxels, 0, -1), geometry.affine, dtype=voxels.dtype
    )
    image.header.set_xyzt_units("mm")
    image.set_sform(geometry.affine, code=1)
    _set_qform_if_faithful(image)
    if is_labels:
        image.header.set_intent(NIFTI_LABEL, allow_unknown=True)
    if scale != 1:
        image.header.set_slope_inter(scale, 0)
    if not path.name.lower().endswith(".gz"):
        path.write_bytes(image.to_bytes())
        return
    # no name and no time in the gzip header: equal volumes make equal files
    with path.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=4, fileobj=raw, mtime=0) as stream:
        image.to_stream(stream)


def _set_qform_if_faithful(image: nibabel.Nifti1Image) -> None:
    """A qform is left out where a quaternion cannot say what the sform says (shears; float32 near half turns)."""
    sform = image.header.get_sform()
    try:
        image.set_qform(sform, code=1, strip_shears=False)
        faithful = _apart(sform, image.header.get_qform(), image.shape) <= CORNER_TOLERANCE_MM
    except (HeaderDataError, ValueError):
        faithful = False
    if not faithful:
        image.header["qform_code"] = 0
