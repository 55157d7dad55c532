"""A DICOM series: its slices found, put in order by where they lie, checked, and read as one Volume or refused."""

import hashlib
import logging
import os
import uuid
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
from jaxtyping import Float, Integer, Shaped
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filereader import read_file_meta_info
from pydicom.pixels import get_decoder
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    SecondaryCaptureImageStorage,
)

from .volume import SHEAR_TOLERANCE, Geometry, Provenance, ScanError, UnreadableScan, Volume

logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # it logs odd values as they are: names of patients too

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

SLICES = {CTImageStorage, MRImageStorage, PositronEmissionTomographyImageStorage, SecondaryCaptureImageStorage}
"""SOP classes of one slice per file. A secondary capture counts if it says where it lies (masks are often kept so)."""

SPACING_TOLERANCE = 0.01
SPACING_TOLERANCE_MM = 0.01
"""A slice may lie this share of the spacing, or this far, from its place on the grid: positions are rounded text."""

COSINE_TOLERANCE = 1e-3
"""How far rounding may bring two direction vectors from length 1 and from a right angle; beyond, they are wrong."""

PIXELS_LIMIT = 1 << 26
"""Pixels in a slice above which its header is not believed (8192 x 8192; no scanner makes more)."""


@contextmanager
def _quiet() -> Iterator[None]:
    """pydicom warns of every odd value in a header; what matters of them is checked here and refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True, kw_only=True)
class Series:
    """The files of one series, not yet read."""

    uid: str
    """SeriesInstanceUID."""
    study_uid: str = ""
    """StudyInstanceUID; empty where an anonymiser emptied it."""
    paths: tuple[Path, ...]
    modality: str = ""
    description: str = ""
    """SeriesDescription, as a person typed it: not for logs."""


@_quiet()
def series_in(paths: Sequence[Path]) -> tuple[list[Series], dict[Path, str]]:
    """The series among the files, in order of their first path, and every file left alone with the reason.

    Reads headers only. Folders are left alone too: to walk a tree is the caller's business. A reason that begins with
    DAMAGED means that the file may have been a slice once.
    """
    left_alone: dict[Path, str] = {}
    groups: dict[tuple[str, str], list[tuple[Path, Dataset]]] = defaultdict(list)
    for path in sorted(paths):
        header = _slice_header(path, GROUP_TAGS)
        if isinstance(header, str):
            left_alone[path] = header
        else:
            groups[_text(header, "StudyInstanceUID"), _text(header, "SeriesInstanceUID")].append((path, header))
    series = [
        Series(
            uid=uid,
            study_uid=study_uid,
            paths=tuple(path for path, _ in files),
            modality=_text(files[0][1], "Modality"),
            description=_text(files[0][1], "SeriesDescription"),
        )
        for (study_uid, uid), files in groups.items()
    ]
    return series, left_alone


@_quiet()
def read(series: Series) -> Volume:
    """The series as one Volume: columns, rows and slices as i, j, k, the slices along the normal of their plane."""
    name = _name(series)
    slices = [(path, _checked_header(path)) for path in series.paths]
    slices, repairs = _without_copies(slices, name)
    _refuse_mixture(slices, name)
    slices, affine, turned = _placed(slices, name)
    voxels, digest, notes = _voxels(slices, name)
    folders = {path.parent for path, _ in slices}
    return Volume(
        voxels=voxels,
        geometry=Geometry(shape=voxels.shape[1:], affine=affine),
        channels=("0",),
        provenance=Provenance(
            sources=tuple(str(source) for source in (folders if len(folders) == 1 else [path for path, _ in slices])),
            sha256=digest,
            reader=f"pydicom {pydicom.__version__}",
            repairs=(*repairs, *turned, *notes),
        ),
    )


def write_series(
    volume: Volume, folder: Path, *, description: str, modality: str = "MR", study: str | None = None
) -> list[Path]:
    """One channel as a classic series, one file per slice; its UIDs follow from its content.

    Series written with the same word for `study` share their study and frame of reference. Slices of a left-handed
    grid come back in the opposite order when read, every voxel where it was: DICOM knows right-handed series only.
    """
    _refuse_unwritable(volume, modality)
    stored, slope, intercept = _stored(volume.voxels[0])
    common = _common(volume, description, modality, study, stored, slope, intercept)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k in range(stored.shape[2]):
        path = folder / f"{k + 1:04d}.dcm"
        _save(_slice(common, volume.geometry, np.ascontiguousarray(stored[:, :, k].T), k), path)
        paths.append(path)
    return paths


def is_dicom(path: Path) -> bool:
    """Whether the file has the mark of DICOM behind its preamble; its name does not matter."""
    try:
        if not path.is_file():  # a pipe would never answer
            return False
        with path.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


DAMAGED = "damaged"

PIXEL_TAGS = ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation")
GROUP_TAGS = (
    *("SOPClassUID", "StudyInstanceUID", "SeriesInstanceUID", "Modality", "SeriesDescription", "ImageType", "Rows"),
    *("ImagePositionPatient", "ImageOrientationPatient"),
)
"""What `series_in` reads; few, for there may be a hundred thousand files."""

SLICE_TAGS = (
    *(*GROUP_TAGS, *PIXEL_TAGS, "SOPInstanceUID", "FrameOfReferenceUID", "NumberOfFrames", "PixelSpacing"),
    *("PhotometricInterpretation", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "LossyImageCompression"),
)
"""What `read` reads of each slice before it touches a pixel."""

NO_SCAN = {
    "1.2.840.10008.5.1.4.1.1.66": "raw data, no image",
    "1.2.840.10008.5.1.4.1.1.66.4": "a segmentation, no scan",
    "1.2.840.10008.5.1.4.1.1.481.2": "a radiotherapy dose, no scan",
    "1.2.840.10008.5.1.4.1.1.481.3": "radiotherapy contours, no image",
}
"""SOP classes that deserve a plainer reason than their standard name."""


def _slice_header(path: Path, tags: Sequence[str]) -> Dataset | str:
    """The header of a slice, or why the file is none."""
    header = _header(path, tags)
    return header if isinstance(header, str) else _why_no_slice(header) or header


def _header(path: Path, tags: Sequence[str]) -> Dataset | str:
    """The tags that matter, or why there are none to be had."""
    try:
        if not path.is_file():
            return "no file"
        if not is_dicom(path):
            return _why_not_dicom(path)
        meta = read_file_meta_info(path)
        if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            # its header cannot be read without unpacking all of it, of which a bomb would make gigabytes
            return "a deflated DICOM file, which is not read; convert it to another transfer syntax"
        if meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
            return "a DICOMDIR, the table of contents of a disc"
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(tags))
        for element in header:
            element.value  # noqa: B018  # converts the raw bytes now, while damage is expected
    except Exception as error:  # pydicom lets any exception out of a damaged file (struct, Key, Type, Recursion, ...)
        return f"{DAMAGED}: a DICOM file whose header cannot be read ({type(error).__name__})"
    return header


def _why_not_dicom(path: Path) -> str:
    if not os.access(path, os.R_OK):
        return f"{DAMAGED}: may not be read by this user"
    return f"{DAMAGED}: named .dcm, but not DICOM" if path.suffix.lower() == ".dcm" else "not DICOM"


def _why_no_slice(header: Dataset) -> str:
    """Why an object is no slice of any scan, or nothing. A scan that cannot be read is no matter for here."""
    sop_class = UID(_text(header, "SOPClassUID") or str(header.file_meta.get("MediaStorageSOPClassUID", "")))
    image_type = [str(value).upper() for value in _values(header, "ImageType")]
    if sop_class in NO_SCAN:
        return NO_SCAN[sop_class]
    if "Rows" not in header and sop_class not in SLICES:
        # a file that was cut short inside the name of its class bears the beginning of a slice's
        cut_short = any(known.startswith(sop_class) for known in SLICES)
        return f"{DAMAGED}: a DICOM file that does not say what it is" if cut_short else f"no image ({sop_class.name})"
    if "LOCALIZER" in image_type:
        return "a localizer, drawn to plan the scan"
    if sop_class == SecondaryCaptureImageStorage and not (
        _values(header, "ImagePositionPatient") and _values(header, "ImageOrientationPatient")
    ):
        return "a secondary capture (a screenshot, a report) that does not lie in the patient"
    if not _text(header, "SeriesInstanceUID"):
        return f"{DAMAGED}: an image that does not say to which series it belongs"
    return ""


def _checked_header(path: Path) -> Dataset:
    header = _slice_header(path, SLICE_TAGS)
    reason = header if isinstance(header, str) else _why_unusual(header)
    if isinstance(header, str) or reason:
        raise UnreadableScan(
            f"{path.name} is no slice that can be read: {reason}. A series of plain single-frame slices that say where "
            "they lie is needed. Take the file away if it does not belong, or export the series again."
        )
    return header


def _why_unusual(header: Dataset) -> str:
    """The first of many things in an image's header that would have to be guessed at, or nothing."""
    sop_class = UID(_text(header, "SOPClassUID") or str(header.file_meta.get("MediaStorageSOPClassUID", "")))
    syntax = UID(str(header.file_meta.get("TransferSyntaxUID", "")))
    try:
        frames = int(_text(header, "NumberOfFrames") or 1)
        rows, columns, samples, allocated, stored, high, sign = (int(header.get(tag)) for tag in PIXEL_TAGS)
    except (TypeError, ValueError):
        return f"one of {', '.join(PIXEL_TAGS)} is missing"
    image_type = [str(value).upper() for value in _values(header, "ImageType")]
    photometric = _text(header, "PhotometricInterpretation")
    findings = {
        f"a multi-frame object of {frames} frames": frames != 1 or "Enhanced" in sop_class.name,
        f"an object of the class {sop_class.name or '(none)'}": sop_class not in SLICES,
        "a mosaic of many slices": "MOSAIC" in image_type,
        f"coloured ({photometric})": samples != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"),
        f"{rows} x {columns} pixels are declared": not 0 < rows * columns <= PIXELS_LIMIT,
        f"bits {allocated}/{stored}/{high}, sign {sign}": allocated not in (8, 16)
        or not 0 < stored <= allocated
        or high != stored - 1
        or sign not in (0, 1),
        "its values go through a lookup table": "ModalityLUTSequence" in header,
        f"its transfer syntax {syntax.name} ({syntax}) cannot be decoded here": not _decodable(syntax),
    }
    return next((finding for finding, met in findings.items() if met), "") or _why_unplaced(header)


def _why_unplaced(header: Dataset) -> str:
    """Geometry comes from these three alone; slice location, thickness and number lie too often."""
    for tag, count in {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}.items():
        numbers = _numbers(header, tag)
        if len(numbers) != count or not np.isfinite(numbers).all():
            return f"it has no {tag} of {count} numbers, so that nobody knows where it lies"
    if min(_numbers(header, "PixelSpacing")) <= 0:
        return "its PixelSpacing is not positive"
    row, column = _numbers(header, "ImageOrientationPatient").reshape(2, 3)
    lengths = np.linalg.norm([row, column], axis=1)
    if np.abs(lengths - 1).max() > COSINE_TOLERANCE or abs(row @ column) > COSINE_TOLERANCE:
        return "its ImageOrientationPatient holds no two unit vectors at a right angle"
    slope, intercept = _rescale(header)
    if not np.isfinite([slope, intercept]).all() or slope == 0:
        return f"its RescaleSlope {slope} and RescaleIntercept {intercept} give no values"
    return ""


def _decodable(syntax: UID) -> bool:
    if syntax.is_transfer_syntax and not syntax.is_compressed:
        return True
    try:
        return get_decoder(syntax).is_available
    except NotImplementedError:
        return False


Slices = list[tuple[Path, Dataset]]


def _without_copies(slices: Slices, name: str) -> tuple[Slices, list[str]]:
    """The same file twice counts once; two files that claim to be one object are spoiled."""
    kept: dict[str, tuple[Path, Dataset]] = {}
    copies = 0
    for path, header in slices:
        in_meta = str(header.file_meta.get("MediaStorageSOPInstanceUID", ""))  # anonymisers empty the other one
        uid = _text(header, "SOPInstanceUID") or in_meta or str(path)
        first = kept.setdefault(uid, (path, header))[0]
        if first != path:
            if path.read_bytes() != first.read_bytes():
                raise UnreadableScan(
                    f"{name}: {first.name} and {path.name} bear one SOPInstanceUID and differ; one object must have "
                    "one content. Find out which is the true one, and take the other away."
                )
            copies += 1
    return list(kept.values()), [f"{copies} slice(s) lay there twice and were taken once."] if copies else []


def _refuse_mixture(slices: Slices, name: str) -> None:
    """Localizers, reformats and two acquisitions under one series number would make one false volume."""
    shapes = Counter(f"{header.Rows} x {header.Columns} pixels" for _, header in slices)
    frames = Counter(_text(header, "FrameOfReferenceUID") for _, header in slices)
    what = f"{len(frames)} frames of reference" if len(frames) > 1 else ""
    what = what or (f"slices of {' and '.join(sorted(shapes))}" if len(shapes) > 1 else "")
    for tag, tolerance in {"ImageOrientationPatient": 1e-4, "PixelSpacing": 1e-5}.items():
        numbers = np.array([_numbers(header, tag) for _, header in slices])
        if np.abs(numbers - numbers[0]).max() > tolerance:
            what = what or f"slices that differ in {tag}"
    if what:
        raise UnreadableScan(
            f"{name} mixes {what}; one volume needs slices of one kind. Split the series, and give each part alone."
        )
    if len(slices) < 2:
        raise UnreadableScan(f"{name} has {len(slices)} slice; a volume needs at least 2. Look for the others.")


def _placed(slices: Slices, name: str) -> tuple[Slices, Float[np.ndarray, "4 4"], list[str]]:
    """The slices in the order of their positions along the normal, the affine to RAS+, and what had to be mended."""
    row, column = _numbers(slices[0][1], "ImageOrientationPatient").reshape(2, 3)
    skew = abs(float(row @ column))
    row, column = _right_angled(row, column)
    normal = np.cross(row, column)
    positions = np.array([_numbers(header, "ImagePositionPatient") for _, header in slices])
    order = np.argsort(positions @ normal, kind="stable")
    slices, positions = [slices[n] for n in order], positions[order]
    heights = (positions - positions[0]) @ normal
    _refuse_gaps(heights, [path.name for path, _ in slices], name)
    step = heights[-1] / (len(heights) - 1)
    _refuse_tilt(positions - positions[0] - np.outer(heights, normal), step, name)
    between_rows, between_columns = _numbers(slices[0][1], "PixelSpacing")
    affine = np.eye(4)
    affine[:3, :3] = np.column_stack([row * between_columns, column * between_rows, normal * step])
    affine[:3, 3] = positions[0]
    turned = [f"ImageOrientationPatient was {skew:.1g} off a right angle, and was straightened."]
    return slices, LPS_TO_RAS @ affine, turned if skew > SHEAR_TOLERANCE else []


def _right_angled(row: np.ndarray, column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both turned by the same, so that neither is believed more than the other."""
    row, column = row / np.linalg.norm(row), column / np.linalg.norm(column)
    half_sum, half_difference = row + column, row - column
    half_sum, half_difference = half_sum / np.linalg.norm(half_sum), half_difference / np.linalg.norm(half_difference)
    return (half_sum + half_difference) / np.sqrt(2), (half_sum - half_difference) / np.sqrt(2)


def _tolerance(step: float) -> float:
    return max(SPACING_TOLERANCE * step, SPACING_TOLERANCE_MM)


def _refuse_gaps(heights: Float[np.ndarray, " slice"], names: list[str], name: str) -> None:
    steps = np.diff(heights)
    usual = float(np.median(steps))
    same = int((steps <= SPACING_TOLERANCE_MM).sum())
    if same:
        at = int(np.argmin(steps))
        raise UnreadableScan(
            f"{name} has {same} slice(s) at a place where there is one already ({names[at]} and {names[at + 1]}); "
            "time points, echoes or repeats must come apart. Split the series by what makes them differ."
        )
    even = heights[-1] / len(steps) * np.arange(len(heights))
    if max(np.abs(steps - usual).max(), np.abs(heights - even).max()) <= _tolerance(usual):
        return
    at = int(np.argmax(np.abs(steps - usual)))
    between = f"between {names[at]} and {names[at + 1]} lie {steps[at]:.3f} mm where {usual:.3f} mm are usual"
    lost = round(steps[at] / usual) - 1
    if lost > 0 and abs(steps[at] / usual - lost - 1) < 0.1:
        raise UnreadableScan(f"{name} misses slices: {between}, as if {lost} were lost. Send the whole series again.")
    raise UnreadableScan(
        f"{name} has slices at uneven distances: {between}; even ones are needed. Resample the series."
    )


def _refuse_tilt(lateral: Float[np.ndarray, "slice 3"], step: float, name: str) -> None:
    off = float(np.linalg.norm(lateral, axis=1).max())
    if off > _tolerance(step):
        angle = np.degrees(np.arctan2(np.linalg.norm(lateral[-1]), step * (len(lateral) - 1)))
        raise UnreadableScan(
            f"{name} has slices shifted against each other by up to {off:.2f} mm (a tilt of {angle:.1f}°, as of a "
            "tilted gantry); slices stacked along their normal are needed. Resample the series to a straight grid."
        )


def _voxels(slices: Slices, name: str) -> tuple[Shaped[np.ndarray, "1 i j k"], str, list[str]]:
    """The values after rescaling each slice by its own numbers, a hash of all bytes, and what one should know."""
    kind = _kind([header for _, header in slices])
    rows, columns = int(slices[0][1].Rows), int(slices[0][1].Columns)
    stack = np.empty((len(slices), rows, columns), kind)
    digest = hashlib.sha256()
    for k, (path, header) in enumerate(slices):
        content = path.read_bytes()
        digest.update(content)
        pixels = _pixels(content, path, header)
        slope, intercept = _rescale(header)
        exact = np.int64 if kind.kind == "i" else np.float64
        stack[k] = pixels.astype(exact) * exact(slope) + exact(intercept)
    lossy = sum(_text(header, "LossyImageCompression") == "01" for _, header in slices)
    notes = [f"{lossy} slice(s) had been compressed with loss before they came here."] if lossy else []
    return stack.transpose(2, 1, 0)[None], digest.hexdigest(), notes


def _kind(headers: list[Dataset]) -> np.dtype:
    """int16 or int32 where every value the headers allow is whole and fits, else float32."""
    ends = []
    for header in headers:
        bits, (slope, intercept) = int(header.BitsStored), _rescale(header)
        least, most = (-(1 << bits - 1), (1 << bits - 1) - 1) if header.PixelRepresentation else (0, (1 << bits) - 1)
        if not slope.is_integer() or not intercept.is_integer():
            return np.dtype(np.float32)
        ends += [least * slope + intercept, most * slope + intercept]
    kinds = (np.dtype(np.int16), np.dtype(np.int32))
    fitting = (kind for kind in kinds if np.iinfo(kind).min <= min(ends) and max(ends) <= np.iinfo(kind).max)
    return next(fitting, np.dtype(np.float32))


def _pixels(content: bytes, path: Path, header: Dataset) -> Integer[np.ndarray, "row column"]:
    """The stored values; pydicom masks what lies above BitsStored and extends the sign."""
    try:
        whole = pydicom.dcmread(BytesIO(content))
        promised = int(header.Rows) * int(header.Columns) * int(header.BitsAllocated) // 8
        held = len(whole.PixelData)
        if not whole.file_meta.TransferSyntaxUID.is_compressed and held not in (promised, promised + promised % 2):
            raise ValueError(f"{held} bytes of pixels instead of {promised}")
        pixels = whole.pixel_array
        if pixels.shape != (header.Rows, header.Columns):
            raise ValueError(f"pixels of shape {pixels.shape}")
    except Exception as error:  # decoders let any exception out of damaged data
        raise UnreadableScan(
            f"{path.name} has truncated or damaged pixel data ({str(error)[:200] or type(error).__name__}); every "
            "slice must be whole. Send the series again."
        ) from error
    return pixels


def _name(series: Series) -> str:
    """Where the series lies; its description may name the patient and is not used."""
    return f"The series in {series.paths[0].parent.name} ({len(series.paths)} files)"


def _text(header: Dataset, tag: str) -> str:
    return str(header.get(tag) or "").strip()


def _values(header: Dataset, tag: str) -> list:
    value = header.get(tag)
    if value is None or value == "":
        return []
    return list(value) if not isinstance(value, str) and hasattr(value, "__iter__") else [value]


def _numbers(header: Dataset, tag: str) -> Float[np.ndarray, " number"]:
    """None where the tag is missing or empty; NaN where there is something else."""
    try:
        return np.array([float(value) for value in _values(header, tag)])
    except (TypeError, ValueError):
        return np.array([np.nan])


def _rescale(header: Dataset) -> tuple[float, float]:
    """Slope and intercept; 1 and 0 where there are none, NaN where there is more than one."""
    return _one_number(header, "RescaleSlope", 1.0), _one_number(header, "RescaleIntercept", 0.0)


def _one_number(header: Dataset, tag: str, otherwise: float) -> float:
    numbers = _numbers(header, tag)
    return float(numbers[0]) if len(numbers) == 1 else np.nan if len(numbers) else otherwise


WRITABLE = {"MR": MRImageStorage, "CT": CTImageStorage}


def _refuse_unwritable(volume: Volume, modality: str) -> None:
    if modality not in WRITABLE:
        raise ScanError(f"A series of modality {modality} cannot be written; {' or '.join(WRITABLE)} can. Choose one.")
    if len(volume.channels) != 1 or volume.geometry.is_sheared:
        raise ScanError(
            f"A volume of {len(volume.channels)} channels on {volume.geometry} was to become a DICOM series; "
            "one channel on a grid with right angles is needed. Write each channel as a series of its own."
        )
    if volume.voxels.dtype.kind not in "biuf" or not np.isfinite(volume.voxels).all():
        raise ScanError("Voxels that are no finite numbers cannot be written as DICOM. Replace them first.")


def _stored(values: Shaped[np.ndarray, "i j k"]) -> tuple[Integer[np.ndarray, "i j k"], str, str]:
    """int16 pixels with the slope and intercept that bring the values back, as DICOM will spell them."""
    values = values.astype(np.float64)
    least, most = float(values.min()), float(values.max())
    slope, intercept = "1", "0"
    if np.any(values != np.rint(values)) or most - least > 65535:
        # 65000 steps, not 65536: the two numbers are rounded to 16 characters and the ends must still fit
        slope, intercept = _decimal((most - least) / 65000 or 1.0), _decimal((most + least) / 2)
    elif least < -32768 or most > 32767:
        intercept = _decimal(least + 32768)
    return np.rint((values - float(intercept)) / float(slope)).astype(np.int16), slope, intercept


def _decimal(number: float) -> str:
    """As many digits as fit 16 characters; pydicom 3.0's own function makes 17 of 9.999999999999998."""
    spelt = (f"{float(number) + 0.0:.{digits}g}" for digits in range(16, 0, -1))  # + 0.0: no minus zero
    return next(text for text in spelt if len(text) <= 16)


def _common(
    volume: Volume, description: str, modality: str, study: str | None, stored: np.ndarray, slope: str, intercept: str
) -> Dataset:
    """Everything the slices of a series share: the modules of the MR or CT image that PS3.3 A.4, A.3 ask for."""
    content = hashlib.sha256(repr((description, modality, study, slope, intercept, stored.shape)).encode())
    content.update(volume.geometry.affine.tobytes() + np.ascontiguousarray(stored).tobytes())
    series = content.hexdigest()
    data = Dataset()
    data.SpecificCharacterSet = "ISO_IR 192"
    data.ImageType = ["DERIVED", "PRIMARY", "AXIAL" if modality == "CT" else "OTHER"]
    data.SOPClassUID = WRITABLE[modality]
    data.Modality = modality
    data.SeriesDescription = " ".join(description.replace("\\", "/").split())[:64]
    data.PatientName, data.PatientID = "Hilum^Synthetic", "hilum"
    data.StudyInstanceUID = _uid("study", study if study is not None else series)
    data.FrameOfReferenceUID = _uid("frame of reference", study if study is not None else series)
    data.SeriesInstanceUID = _uid("series", series)
    data.SeriesNumber = 1
    data.Rows, data.Columns = stored.shape[1], stored.shape[0]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
    data.RescaleSlope, data.RescaleIntercept = slope, intercept
    data.RescaleType = "HU" if modality == "CT" else "US"
    data.SliceThickness = _decimal(volume.geometry.spacing[2])
    data.PatientPosition = "HFS"
    empty = ["PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID", "AccessionNumber", "Manufacturer"]
    empty += ["ReferringPhysicianName", "PositionReferenceIndicator", "AcquisitionNumber", "Laterality"]
    empty += ["KVP"] if modality == "CT" else ["ScanOptions", "RepetitionTime", "EchoTime", "EchoTrainLength"]
    for tag in empty:  # type 2: must be there, may be unknown
        setattr(data, tag, None)
    if modality == "MR":
        data.ScanningSequence, data.SequenceVariant, data.MRAcquisitionType = "RM", "NONE", "3D"
        data.SpacingBetweenSlices = data.SliceThickness
    return data


def _slice(common: Dataset, geometry: Geometry, pixels: Integer[np.ndarray, "row column"], k: int) -> Dataset:
    lps = LPS_TO_RAS @ geometry.affine
    direction = lps[:3, :3] / np.array(geometry.spacing)
    data = Dataset(common)
    data.SOPInstanceUID = _uid("slice", f"{common.SeriesInstanceUID} {k}")
    data.InstanceNumber = k + 1
    data.ImagePositionPatient = [_decimal(x) for x in (lps @ [0, 0, k, 1])[:3]]
    data.ImageOrientationPatient = [_decimal(x) for x in direction[:, :2].T.ravel()]
    data.PixelSpacing = [_decimal(geometry.spacing[1]), _decimal(geometry.spacing[0])]  # between rows, then columns
    data.PixelData = pixels.astype("<i2").tobytes()
    data["PixelData"].VR = "OW"
    return data


def _save(data: Dataset, path: Path) -> None:
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made = path.with_name(f".{path.name}.{os.getpid()}")
    pydicom.dcmwrite(made, data, enforce_file_format=True)
    made.replace(path)


def _uid(kind: str, content: str) -> str:
    """A UID that needs no registered root (PS3.5 B.2: 2.25 and a UUID), the same for the same content."""
    digest = hashlib.sha256(f"hilum {kind} {content}".encode()).digest()
    return f"2.25.{uuid.UUID(bytes=digest[:16], version=5).int}"
