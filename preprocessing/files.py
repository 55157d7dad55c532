"""Scans on disk: NIfTI, NRRD, MetaImage and folders of DICOM, read without a guess and written in one stroke."""

import gzip
import hashlib
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK
from jaxtyping import Float, Shaped
from nibabel.nifti1 import data_type_codes
from nibabel.spatialimages import HeaderDataError

from . import dicom
from .volume import CORNER_TOLERANCE_MM, Geometry, Provenance, ScanError, UnreadableScan, Volume

EXTENSIONS: tuple[str, ...] = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")
"""The endings by which `read` and `write` know a format; DICOM is known by its content."""


def read(path: Path) -> Volume:
    """A scan file, a folder holding exactly one DICOM series, or the series that a DICOM file belongs to."""
    with _damage_named(path):
        if path.is_dir():
            return _read_folder(path)
        if path.stat().st_size == 0:
            raise UnreadableScan(f"{path.name} is empty; a scan was needed. Copy the file again.")
        extension = _extension(path)
        return READERS[extension](path) if extension else _read_series_of(path)


def write(volume: Volume, path: Path, *, is_labels: bool = False) -> None:
    """One file in the format of the path's ending: whole or not at all, and the same bytes for the same volume."""
    extension = _extension(path)
    if extension is None:
        raise ScanError(
            f"{path.name} has no ending that says its format; one of {', '.join(EXTENSIONS)} is needed. Rename it."
        )
    voxels = _writeable(volume, path, is_labels)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder:
        WRITERS[extension](voxels, volume.geometry, Path(folder) / path.name, is_labels)
        # a header comes last, so that it never names voxels that are not there yet
        for made in sorted(Path(folder).iterdir(), key=lambda made: made.name == path.name):
            _flush_to_disk(made)
            made.replace(path.parent / made.name)


def stem(path: Path) -> str:
    """The name of a scan without its ending; a name without one of EXTENSIONS stays whole."""
    extension = _extension(path)
    return path.name[: -len(extension)] if extension else path.name


def sha256(paths: Iterable[Path]) -> str:
    """One hash over the bytes of all files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _extension(path: Path) -> str | None:
    name = path.name.lower()
    return next((e for e in sorted(EXTENSIONS, key=len, reverse=True) if name.endswith(e) and name != e), None)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Whatever a reader stumbles over becomes an UnreadableScan that names the file."""
    again = "Copy the file again from where it came from."
    try:
        yield
    except UnreadableScan:
        raise
    except ScanError as error:
        raise UnreadableScan(f"{path.name}: {error}") from error
    except FileNotFoundError as error:
        raise UnreadableScan(f"{path} is not there; a scan was needed. Check the path.") from error
    except PermissionError as error:
        raise UnreadableScan(f"{path.name} may not be read by this user; it must be readable. Use chmod.") from error
    except EOFError as error:
        raise UnreadableScan(f"{path.name} is truncated: its compressed data stop before their end. {again}") from error
    except (zlib.error, gzip.BadGzipFile) as error:
        raise UnreadableScan(f"{path.name} is damaged: {error}. Sound compressed data are needed. {again}") from error
    except MemoryError as error:
        raise UnreadableScan(f"{path.name} needs more memory than there is. Crop it first.") from error
    except (OSError, HeaderDataError, RuntimeError, ValueError, OverflowError) as error:
        raise UnreadableScan(f"{path.name} cannot be read ({error}); a sound scan is needed. {again}") from error


# DICOM: what is a series is decided in dicom.py, which one is meant is decided here


def _read_folder(folder: Path) -> Volume:
    series, left_alone = dicom.series_in(sorted(p for p in folder.iterdir() if not p.name.startswith(".")))
    damaged = [path.name for path, reason in left_alone.items() if reason.startswith(dicom.DAMAGED)]
    if series and damaged:
        raise UnreadableScan(
            f"The folder {folder.name} holds {len(damaged)} damaged file(s), as {damaged[0]}, which may have been "
            "slices; a series must be whole. Send the series again, or take away what does not belong to it."
        )
    if len(series) != 1:
        reasons = "".join(f" {path.name}: {reason}." for path, reason in list(left_alone.items())[:3])
        raise UnreadableScan(
            f"The folder {folder.name} holds {len(series)} DICOM series; exactly one is needed.{reasons} "
            "Give one folder per series, or a single file."
        )
    return _with_left_alone(dicom.read(series[0]), left_alone)


def _read_series_of(path: Path) -> Volume:
    if not dicom.is_dicom(path):
        raise UnreadableScan(
            f"{path.name} is neither DICOM nor does it end in {', '.join(EXTENSIONS)}; "
            "a scan in one of these formats is needed. Convert it, or correct its ending."
        )
    series, left_alone = dicom.series_in(sorted(path.parent.iterdir()))
    for one in series:
        if path in one.paths:
            return dicom.read(one)
    raise UnreadableScan(f"{path.name} is no slice of a scan: {left_alone[path]}. Name a file of the series itself.")


def _with_left_alone(volume: Volume, left_alone: dict[Path, str]) -> Volume:
    notes = tuple(f"{path.name} left alone: {reason}" for path, reason in left_alone.items())
    was = volume.provenance
    provenance = Provenance(sources=was.sources, sha256=was.sha256, reader=was.reader, repairs=(*was.repairs, *notes))
    return Volume(voxels=volume.voxels, geometry=volume.geometry, channels=volume.channels, provenance=provenance)


# NIfTI: the header is taken by nibabel, the voxels by us, to see that they are all there

DEFLATE_RATIO = 1032
"""zlib, technical notes: deflate cannot shrink anything by more than 1032 to 1."""

NIFTI_UNITS = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
"""nifti1.h, NIFTI_UNITS_*: millimetres per unknown (by habit millimetres), metre, millimetre, micron."""

NIFTI_LABEL = 1002
"""nifti1.h, NIFTI_INTENT_LABEL."""


def _read_nifti(path: Path) -> Volume:
    size = path.stat().st_size
    zipped = _extension(path) == ".nii.gz"
    with path.open("rb") as raw:
        if (raw.read(2) == b"\x1f\x8b") != zipped:
            raise UnreadableScan(
                f"{path.name} is {'not ' if zipped else ''}gzip-compressed; its ending says the opposite. "
                f"Rename it to end in {'.nii' if zipped else '.nii.gz'}, if it is a NIfTI file."
            )
    with gzip.open(path, "rb") if zipped else path.open("rb") as stream:
        header, taken = _nifti_header(stream.read, path)
        shape, kind, start = _nifti_layout(header, path)
        promised = start + int(np.prod(shape, dtype=object)) * kind.itemsize
        _refuse_impossible(promised, size * DEFLATE_RATIO if zipped else size, path)
        stored = stream.read(promised - taken)
        _refuse_other_length(taken + len(stored), promised, bool(stream.read(1)), path)  # reads on: checks the CRC
    voxels = np.frombuffer(stored, kind, offset=start - taken).reshape(shape, order="F")
    voxels = _channels_first(_rescaled(voxels, header, path))
    affine, repairs = _nifti_affine(header, shape, path)
    return _volume(voxels, affine, path, [path], f"nibabel {nibabel.__version__}", repairs)


def _nifti_header(take: Callable[[int], bytes], path: Path) -> tuple[nibabel.Nifti1Header, int]:
    block = take(348)
    sizes = {int.from_bytes(block[:4], order) for order in ("little", "big")}
    if 540 in sizes:
        block += take(192)
    kind = nibabel.Nifti2Header if 540 in sizes else nibabel.Nifti1Header
    if not sizes & {348, 540} or len(block) < kind.sizeof_hdr:
        raise UnreadableScan(f"{path.name} does not begin with a NIfTI header; one was needed. Check the file.")
    header = kind(block, check=False)
    if bytes(header["magic"])[:3] not in (b"n+1", b"n+2"):
        raise UnreadableScan(
            f"{path.name} is an Analyze file or half of a .hdr/.img pair, which do not say where voxels lie for sure; "
            "a single NIfTI file is needed. Convert it with a tool that knows its orientation."
        )
    return header, len(block)


def _nifti_layout(header: nibabel.Nifti1Header, path: Path) -> tuple[tuple[int, ...], np.dtype, int]:
    axes = int(header["dim"][0])
    shape = tuple(int(n) for n in header["dim"][1 : axes + 1])
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    fits = len(shape) in (3, 4) or (len(shape) == 5 and shape[3] == 1)
    if not 1 <= axes <= 7 or not fits or min(shape) < 1:
        raise UnreadableScan(
            f"{path.name} has the shape {shape}; three axes, or a fourth for channels, are needed. Split or convert it."
        )
    if int(header["datatype"]) not in data_type_codes:
        raise UnreadableScan(
            f"{path.name} has voxels of the type {int(header['datatype'])}, which NIfTI does not know. Copy it again."
        )
    kind = header.get_data_dtype()
    _refuse_kind(kind, path)
    start = float(header["vox_offset"])
    if kind.itemsize * 8 != int(header["bitpix"]) or not start.is_integer() or start < header.sizeof_hdr + 4:
        raise UnreadableScan(
            f"{path.name} has a header that contradicts itself (type {kind}, {int(header['bitpix'])} bits, voxels from "
            f"byte {start:g}); it cannot be relied on. Export the scan again."
        )
    return shape, kind, int(start)


def _nifti_affine(header: nibabel.Nifti1Header, shape: tuple[int, ...], path: Path) -> tuple[np.ndarray, list[str]]:
    if float(header["pixdim"][0]) == 0:
        header["pixdim"][0] = 1  # nifti1.h, METHOD 2: a qfac of 0 is taken as 1
    sform, qform = header.get_sform(coded=True)[0], header.get_qform(coded=True)[0]
    if sform is None and qform is None:
        raise UnreadableScan(
            f"{path.name} says nothing of its orientation (sform and qform codes are 0); one of them is needed. "
            "Export it again with its orientation; it is not guessed."
        )
    affine = qform if sform is None else sform
    if sform is not None and qform is not None:
        apart = _apart(sform, qform, shape)
        if not apart <= CORNER_TOLERANCE_MM + _quaternion_doubt(header, sform, shape):
            raise UnreadableScan(
                f"{path.name} places its voxels twice, sform and qform lying {apart:.2f} mm apart; they must agree. "
                "Find out which is right, and set the other's code to 0."
            )
    unit = int(header["xyzt_units"]) & 7
    if unit not in NIFTI_UNITS:
        raise UnreadableScan(f"{path.name} declares the unit {unit}, which is no length; set it to millimetres (2).")
    return _to_millimetres(np.array(affine, np.float64), NIFTI_UNITS[unit])


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


def _rescaled(voxels: np.ndarray, header: nibabel.Nifti1Header, path: Path) -> np.ndarray:
    if np.isinf(float(header["scl_slope"])):
        raise UnreadableScan(f"{path.name} has an infinite scl_slope; a number is needed. Export the scan again.")
    slope, intercept = header.get_slope_inter()  # 0 and NaN mean: not scaled
    if slope is None or (slope, intercept) == (1, 0):
        return voxels
    scaled = np.empty(voxels.shape, np.float32, order="F")
    for k in range(voxels.shape[-1]):  # slab by slab: a whole scan in float64 may not fit
        scaled[..., k] = voxels[..., k].astype(np.float64) * slope + intercept
    return scaled


def _channels_first(voxels: np.ndarray) -> Shaped[np.ndarray, "channel i j k"]:
    if voxels.ndim == 5:
        voxels = voxels[:, :, :, 0]
    return voxels[None] if voxels.ndim == 3 else np.moveaxis(voxels, -1, 0)


def _write_nifti(voxels: np.ndarray, geometry: Geometry, path: Path, is_labels: bool) -> None:
    image = nibabel.Nifti1Image(
        voxels[0] if len(voxels) == 1 else np.moveaxis(voxels, 0, -1), geometry.affine, dtype=voxels.dtype
    )
    image.header.set_xyzt_units("mm")
    image.set_sform(geometry.affine, code=1)
    _set_qform_if_faithful(image)
    if is_labels:
        image.header.set_intent(NIFTI_LABEL, allow_unknown=True)
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


# NRRD and MetaImage: ITK reads them, but it fills up what is missing, so that we look first

NRRD_BYTES = {
    **dict.fromkeys(("signed char", "int8", "int8_t", "uchar", "unsigned char", "uint8", "uint8_t"), 1),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), 2),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), 2),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t", "uint", "unsigned int", "uint32", "uint32_t"), 4),
    **dict.fromkeys(("longlong", "long long", "long long int", "signed long long", "signed long long int"), 8),
    **dict.fromkeys(("int64", "int64_t", "ulonglong", "unsigned long long", "unsigned long long int"), 8),
    **{"uint64": 8, "uint64_t": 8, "float": 4, "double": 8},
}
NRRD_PACKINGS = {"raw": "raw", "gzip": "gzip", "gz": "gzip"}
NRRD_SPACES = ("left-posterior-superior", "lps", "right-anterior-superior", "ras", "left-anterior-superior", "las")
NRRD_CHANNEL_KINDS = {"list", "vector", "covariant-vector", "none", "point", "stub", "scalar", "???"}
META_BYTES = {
    **dict.fromkeys(("MET_CHAR", "MET_UCHAR"), 1),
    **dict.fromkeys(("MET_SHORT", "MET_USHORT"), 2),
    **dict.fromkeys(("MET_INT", "MET_UINT", "MET_FLOAT"), 4),
    **dict.fromkeys(("MET_LONG_LONG", "MET_ULONG_LONG", "MET_DOUBLE"), 8),
}
META_SYNONYMS = {
    "Rotation": "TransformMatrix",
    "Orientation": "TransformMatrix",
    "Position": "Offset",
    "Origin": "Offset",
}
UNITS = {"m": 1000.0, "cm": 10.0, "mm": 1.0, "millimeter": 1.0, "millimetre": 1.0, "um": 0.001, "µm": 0.001}
"""Millimetres per unit of length, as NRRD (`space units`) and MetaImage (`DistanceUnits`) spell them."""

HEADER_LIMIT = 1 << 18
"""Bytes within which a text header must end; real ones take some hundreds."""


@dataclass(frozen=True, kw_only=True)
class _Payload:
    """Where the voxels of a file with a text header lie, and how many bytes of them there must be."""

    path: Path
    start: int
    promised: int
    packing: str
    unit_mm: float


def _read_nrrd(path: Path) -> Volume:
    return _read_itk(path, _nrrd_payload(path), "NrrdImageIO")


def _read_metaimage(path: Path) -> Volume:
    return _read_itk(path, _metaimage_payload(path), "MetaImageIO")


def _read_itk(path: Path, payload: _Payload, image_io: str) -> Volume:
    _verify(payload)
    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO(image_io)
    reader.SetFileName(str(path))
    image = reader.Execute()
    voxels = SimpleITK.GetArrayFromImage(image)  # [k j i], [k j i channel] or [channel k j i]
    if image.GetNumberOfComponentsPerPixel() > 1 and image.GetDimension() == 3:
        voxels = np.moveaxis(voxels, -1, 0)
    voxels = voxels[None] if voxels.ndim == 3 else voxels
    _refuse_kind(voxels.dtype, path)
    affine, repairs = _to_millimetres(_itk_affine(image, path), payload.unit_mm)
    files = [path] if payload.path == path else [path, payload.path]
    version = SimpleITK.Version.VersionString()
    return _volume(voxels.transpose(0, 3, 2, 1), affine, path, files, f"SimpleITK {version}", repairs)


def _itk_affine(image: SimpleITK.Image, path: Path) -> Float[np.ndarray, "4 4"]:
    axes = image.GetDimension()
    direction = np.array(image.GetDirection()).reshape(axes, axes)
    if axes not in (3, 4) or np.any(direction[3:, :3]) or np.any(direction[:3, 3:]):
        raise UnreadableScan(
            f"{path.name} has {axes} axes that are not three of space and one of channels. Split or convert it."
        )
    lengths = np.linalg.norm(direction[:3, :3], axis=0)
    if np.abs(lengths - 1).max() > 1e-3:
        raise UnreadableScan(
            f"{path.name} has direction vectors of lengths {lengths.round(4).tolist()}; they must be 1, as the spacing "
            "is given beside them. Export the scan again."
        )
    affine = np.eye(4)
    affine[:3, :3] = direction[:3, :3] * np.array(image.GetSpacing()[:3])
    affine[:3, 3] = image.GetOrigin()[:3]
    return dicom.LPS_TO_RAS @ affine


def _nrrd_payload(path: Path) -> _Payload:
    lines, start = _text_header(path, ends=lambda line: line == "")
    if not lines[0].startswith("NRRD000"):
        raise UnreadableScan(f"{path.name} does not begin with an NRRD header; one was needed. Check the file.")
    fields = {
        key.strip().lower().replace("datafile", "data file"): value.strip()
        for key, colon, value in (line.partition(": ") for line in lines[1:] if not line.startswith("#"))
        if colon and ":=" not in key
    }
    _need(fields, ("type", "dimension", "sizes", "encoding", "space", "space directions", "space origin"), path)
    shape, kind, packing = _whole(fields["sizes"], path), fields["type"].lower(), fields["encoding"].lower()
    _expect(fields["space"].lower() in NRRD_SPACES, path, f"the space '{fields['space']}'", "an anatomical one as LPS")
    _expect(kind in NRRD_BYTES, path, f"voxels of type '{kind}'", "integers or floats")
    _expect(packing in NRRD_PACKINGS, path, f"the encoding '{packing}'", "raw or gzip")
    skips = ("line skip", "lineskip", "byte skip", "byteskip")
    _expect(all(int(fields.get(skip, 0)) == 0 for skip in skips), path, "bytes to skip", "voxels without a gap")
    _expect(len(shape) == int(fields["dimension"]) and len(shape) in (3, 4), path, f"sizes {shape}", "3 or 4 axes")
    kinds = {kind.lower() for kind in fields.get("kinds", "").split()} - {"domain", "space"}
    _expect(kinds <= NRRD_CHANNEL_KINDS, path, f"an axis of the kind {', '.join(sorted(kinds))}", "space and channels")
    data = _beside(path, fields["data file"]) if "data file" in fields else path
    promised = int(np.prod(shape, dtype=object)) * NRRD_BYTES[kind]
    units = {unit.strip('"').lower() for unit in fields.get("space units", "").split()} - {"", "???", "none"}
    return _Payload(
        path=data,
        start=start if data == path else 0,
        promised=promised,
        packing=NRRD_PACKINGS[packing],
        unit_mm=_unit(units, path),
    )


def _metaimage_payload(path: Path) -> _Payload:
    lines, start = _text_header(path, ends=lambda line: line.partition("=")[0].strip() == "ElementDataFile")
    fields = {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines)}
    for other, name in META_SYNONYMS.items():
        fields.setdefault(name, fields.get(other, ""))
    _need(fields, ("DimSize", "ElementType", "ElementSpacing", "TransformMatrix", "Offset", "BinaryData"), path)
    shape, kind = _whole(fields["DimSize"], path), fields["ElementType"].upper()
    _expect(kind in META_BYTES, path, f"voxels of type '{kind}'", "integers or floats of a sure size")
    _expect(fields["BinaryData"].lower() == "true", path, "voxels written as text", "binary ones")
    _expect(int(fields.get("HeaderSize", 0)) == 0, path, "bytes to skip", "voxels from the first byte on")
    _expect(len(shape) in (3, 4), path, f"sizes {shape}", "3 or 4 axes")
    channels = int(fields.get("ElementNumberOfChannels", 1))
    data = path if fields["ElementDataFile"].upper() == "LOCAL" else _beside(path, fields["ElementDataFile"])
    unit = fields.get("DistanceUnits", "").lower()
    return _Payload(
        path=data,
        start=start if data == path else 0,
        promised=int(np.prod(shape, dtype=object)) * META_BYTES[kind] * channels,
        packing="zlib" if fields.get("CompressedData", "False").lower() == "true" else "raw",
        unit_mm=_unit({unit} - {"", "?"}, path),
    )


def _text_header(path: Path, ends: Callable[[str], bool]) -> tuple[list[str], int]:
    """The lines up to the one that ends the header, and the byte behind it."""
    lines = []
    with path.open("rb") as stream:
        while stream.tell() < HEADER_LIMIT and (line := stream.readline(HEADER_LIMIT)):
            lines.append(line.decode("utf-8", errors="replace").strip())
            if ends(lines[-1]):
                return lines, stream.tell()
        if path.suffix.lower() == ".nhdr" and lines and stream.tell() < HEADER_LIMIT:
            return lines, stream.tell()  # a detached header may end with its file
    raise UnreadableScan(f"{path.name} has no whole text header; one that ends was needed. Check the file.")


def _whole(text: str, path: Path) -> tuple[int, ...]:
    numbers = tuple(int(word) for word in text.split())
    _expect(bool(numbers) and min(numbers) > 0, path, f"the sizes {text}", "sizes of at least 1")
    return numbers


def _need(fields: dict[str, str], names: Sequence[str], path: Path) -> None:
    missing = [name for name in names if not fields.get(name)]
    if missing:
        raise UnreadableScan(
            f"{path.name} has a header without {', '.join(f'`{name}`' for name in missing)}; what its voxels are and "
            "where they lie is not guessed. Export the scan again with its orientation and spacing."
        )


def _expect(fits: bool, path: Path, met: str, needed: str) -> None:
    if not fits:
        raise UnreadableScan(f"{path.name} has {met}; {needed} can be read here. Convert it, or export it again.")


def _beside(header: Path, name: str) -> Path:
    """The data file of a detached header; only from the header's own folder, whatever path the header tells."""
    data = header.parent / name
    if Path(name).name != name or not data.is_file():
        raise UnreadableScan(
            f"{header.name} has its voxels in '{name}'; one file in the same folder is needed. Keep the two together."
        )
    return data


def _unit(units: set[str], path: Path) -> float:
    if len(units) > 1 or not units <= UNITS.keys():
        raise UnreadableScan(f"{path.name} is measured in {sorted(units)}; millimetres are needed. Correct its header.")
    return UNITS[units.pop()] if units else 1.0


def _verify(payload: _Payload) -> None:
    """ITK takes what it finds and leaves the rest at zero; so length and checksum are tried before."""
    stored = payload.path.stat().st_size - payload.start
    if payload.packing == "raw":
        _refuse_impossible(payload.promised, stored, payload.path)
        _refuse_other_length(min(stored, payload.promised), payload.promised, stored > payload.promised, payload.path)
        return
    _refuse_impossible(payload.promised, stored * DEFLATE_RATIO, payload.path)
    inflate = zlib.decompressobj(wbits=31 if payload.packing == "gzip" else 15)
    length = 0
    with payload.path.open("rb") as stream:
        stream.seek(payload.start)
        while not inflate.eof and (chunk := stream.read(1 << 16)):
            length += len(inflate.decompress(chunk))
        rest = inflate.unused_data or stream.read(1)
    if not inflate.eof:
        raise EOFError
    _refuse_other_length(min(length, payload.promised), payload.promised, length > payload.promised, payload.path)
    _refuse_other_length(length, payload.promised, bool(rest), payload.path)


def _write_itk(voxels: np.ndarray, geometry: Geometry, path: Path, is_labels: bool) -> None:
    if geometry.is_sheared:
        raise ScanError(f"{path.name}: the grid is sheared; this format needs right angles. Write .nii.gz instead.")
    many = len(voxels) > 1
    image = SimpleITK.GetImageFromArray(
        np.ascontiguousarray(voxels.transpose(3, 2, 1, 0) if many else voxels[0].transpose(2, 1, 0)), isVector=many
    )
    lps = dicom.LPS_TO_RAS @ geometry.affine
    image.SetSpacing(geometry.spacing)
    image.SetDirection((lps[:3, :3] / np.array(geometry.spacing)).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    SimpleITK.WriteImage(image, str(path), useCompression=True)


# What all formats share


def _volume(
    voxels: Shaped[np.ndarray, "channel i j k"],
    affine: np.ndarray,
    path: Path,
    files: list[Path],
    reader: str,
    repairs: list[str],
) -> Volume:
    geometry = Geometry(shape=voxels.shape[1:], affine=affine)
    if geometry.is_sheared:
        raise UnreadableScan(
            f"{path.name} lies on a sheared grid (its axes do not meet at right angles); a straight one is needed. "
            "Resample it onto a straight grid."
        )
    return Volume(
        voxels=_finite(_plain(voxels), path),
        geometry=geometry,
        channels=tuple(str(number) for number in range(len(voxels))),
        provenance=Provenance(
            sources=tuple(str(file) for file in files), sha256=sha256(files), reader=reader, repairs=tuple(repairs)
        ),
    )


def _plain(voxels: np.ndarray) -> np.ndarray:
    """Integers as they are, all else float32; in the byte order of this machine."""
    kind = voxels.dtype.newbyteorder("=") if voxels.dtype.kind in "iu" else np.dtype(np.float32)
    with np.errstate(over="ignore"):  # what does not fit float32 is counted as infinite a step later
        return voxels.astype(kind, copy=False)


def _finite(voxels: np.ndarray, path: Path) -> np.ndarray:
    odd = 0 if voxels.dtype.kind in "iu" else sum(int(channel.size - np.isfinite(channel).sum()) for channel in voxels)
    if odd:
        raise UnreadableScan(
            f"{path.name} holds {odd} of {voxels.size} voxels that are NaN or infinite; every voxel must be a number. "
            "Find out what they stand for, and write a number there."
        )
    return voxels


def _to_millimetres(affine: np.ndarray, unit_mm: float) -> tuple[np.ndarray, list[str]]:
    if unit_mm == 1:
        return affine, []
    return np.diag([unit_mm] * 3 + [1.0]) @ affine, [f"A grid in units of {unit_mm:g} mm was converted to millimetres."]


def _refuse_kind(kind: np.dtype, path: Path) -> None:
    if kind.kind not in "iuf" or kind.itemsize > 8:
        name = "coloured (RGB)" if kind.names or kind.kind == "V" else f"of type {kind}"
        raise UnreadableScan(f"{path.name} has voxels {name}; one real number per voxel is needed. Convert it first.")


def _refuse_impossible(promised: int, most: int, path: Path) -> None:
    """Before memory is asked for: a small file cannot hold what a broken or hostile header says."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if promised > most:
        raise UnreadableScan(
            f"{path.name} is truncated, or its header is wrong: {promised} bytes are promised, a file of this size "
            f"holds at most {most}. Copy the file again from where it came from."
        )
    if promised > memory:
        raise UnreadableScan(
            f"{path.name} holds {promised / 2**30:.0f} GiB; this machine has {memory / 2**30:.0f} GiB. Crop it."
        )


def _refuse_other_length(length: int, promised: int, longer: bool, path: Path) -> None:
    if length < promised or longer:
        met = "more data than" if longer else f"{length} bytes instead of the {promised}"
        raise UnreadableScan(
            f"{path.name} is {'longer than it should be' if longer else 'truncated'}: {met} its header promises. "
            "Copy the file again from where it came from."
        )


def _writeable(volume: Volume, path: Path, is_labels: bool) -> Shaped[np.ndarray, "channel i j k"]:
    kind = volume.voxels.dtype
    if kind.kind == "b":
        return volume.voxels.astype(np.uint8)
    if kind.kind not in "iuf" or kind.itemsize not in ((4, 8) if kind.kind == "f" else (1, 2, 4, 8)):
        raise ScanError(f"{path.name}: voxels of type {kind} have no place in a scan file; use integers or float32.")
    if is_labels and kind.kind == "f":
        raise ScanError(f"{path.name}: labels came as {kind}; they must be integers. Round them first.")
    return volume.voxels.astype(kind.newbyteorder("="), copy=False)


def _flush_to_disk(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


READERS: dict[str, Callable[[Path], Volume]] = {
    ".nii": _read_nifti,
    ".nii.gz": _read_nifti,
    ".nrrd": _read_nrrd,
    ".nhdr": _read_nrrd,
    ".mha": _read_metaimage,
    ".mhd": _read_metaimage,
}
WRITERS: dict[str, Callable[[np.ndarray, Geometry, Path, bool], None]] = {
    ".nii": _write_nifti,
    ".nii.gz": _write_nifti,
    ".nrrd": _write_itk,
    ".nhdr": _write_itk,
    ".mha": _write_itk,
    ".mhd": _write_itk,
}
