"""Labels kept as DICOM, a Segmentation (SEG) or radiotherapy contours (RTSTRUCT), on the grid of the image they belong to.

Where a label lies is told by its own planes and points alone. What is not on the image's planes is refused, not moved.
"""

import hashlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
from jaxtyping import Bool, Float, Integer
from pydicom.datadict import dictionary_has_tag, dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.tag import BaseTag

from ..records import nearest
from ..volume import LPS_TO_RAS, Geometry, GeometryMismatch, Provenance, ScanError, UnreadableScan, Volume
from .headers import quiet, read_header, text, values

SEGMENTATIONS = {"1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"}
"""Segmentation Storage and Label Map Segmentation Storage."""
CONTOURS = "1.2.840.10008.5.1.4.1.1.481.3"

UNDEFINED = 0xFFFFFFFF

TOLERANCE = 0.1
"""Voxels by which a label's plane or pixel may miss the image's: rounded text does not reach this, another grid soon does."""

BACKGROUND = ("DCM", "125040")
"""The code by which label maps describe what is no segment."""


@quiet()
def read_labels(path: Path, onto: Volume, names: Mapping[str, int]) -> Volume:
    """The label map of a SEG or RTSTRUCT on the image's grid.

    `names` are the labels wanted: capitals, spaces and underscores in them do not matter. Without names every segment
    is read, under its own number.
    """
    try:
        return _read_labels(path, onto, names)
    except ScanError:
        raise
    except (
        Exception
    ) as error:  # pydicom converts a value when it is looked at, and lets any exception out of a damaged one
        if isinstance(error, OSError) and error.errno is not None:  # a disc that fails, and no file
            raise
        raise _damaged(path, f"a value in it cannot be understood ({type(error).__name__})") from error


def _read_labels(path: Path, onto: Volume, names: Mapping[str, int]) -> Volume:
    data, digest = _read(path)
    kind = text(data, "SOPClassUID")
    notes = _belonging(data, onto, path)
    drawn = _segments(data, path) if kind in SEGMENTATIONS else _regions(data, path)
    wanted, left_out = _wanted([(segment.number, segment.name) for segment in drawn], names, path)
    # in Fortran's order a slice is one piece of memory
    canvas = Canvas(path=path, voxels=np.zeros(onto.geometry.shape, np.uint16, order="F"))
    (_paint_segments if kind in SEGMENTATIONS else _paint_contours)(data, drawn, wanted, onto.geometry, canvas)
    canvas.refuse_overlaps()
    highest = max(wanted.values(), default=0)
    voxels = canvas.voxels.astype(np.uint8) if highest < 256 else canvas.voxels
    notes += [f"{', '.join(left_out)}: drawn, and none of the labels wanted."] if left_out else []
    provenance = Provenance(
        sources=(str(path),),
        sha256=digest,
        reader=f"pydicom {pydicom.__version__}",
        notes=(*notes, *canvas.notes),
        modality=text(data, "Modality"),
        files=(str(path),),
    )
    return Volume(voxels=voxels[None], geometry=onto.geometry, channels=("labels",), provenance=provenance)


def is_labels(path: Path) -> bool:
    """Whether the file is a SEG or RTSTRUCT."""
    header = read_header(path, ("SOPClassUID",))
    return not isinstance(header, str) and text(header.elements, "SOPClassUID") in {*SEGMENTATIONS, CONTOURS}


@quiet()
def names_in(path: Path) -> dict[str, int]:
    """The names of the segments or regions, with their numbers; none where the file holds no labels."""
    header = read_header(path, ("SOPClassUID", "SegmentSequence", "StructureSetROISequence"))
    if isinstance(header, str):
        return {}
    try:
        drawn = _segments(header.elements, path) or _regions(header.elements, path)
    except Exception:  # told when the labels are read
        return {}
    return {segment.name: segment.number for segment in drawn}


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One thing that was drawn."""

    number: int
    name: str
    contours: tuple[Dataset, ...] = ()


@dataclass(kw_only=True)
class Canvas:
    """The label map while it is painted; remembers what was painted twice."""

    path: Path
    voxels: Integer[np.ndarray, "i j k"]
    overlaps: dict[tuple[str, str], int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)

    def paint(
        self, target: Integer[np.ndarray, "row column"], mask: Bool[np.ndarray, "row column"], value: int, name: str
    ) -> None:
        """One plane of one segment. `target` is a view of `voxels`."""
        taken = mask & (target != 0) & (target != value)
        if taken.any():
            for other in np.unique(target[taken]):
                pair = (self.names[int(other)], name)
                self.overlaps[pair] = self.overlaps.get(pair, 0) + int((target[taken] == other).sum())
        target[mask] = value
        self.names[value] = name

    def refuse_overlaps(self) -> None:
        """A voxel has one label: which of two is meant must not be guessed."""
        for (one, other), count in self.overlaps.items():
            raise ScanError(
                f"{self.path.name}: {one!r} and {other!r} overlap in {count} voxels; a voxel can have one label. "
                "Redraw one of them, or train on one of them alone by declaring only that label.",
                "contradiction",
            )


def _read(path: Path) -> tuple[Dataset, str]:
    header = read_header(path, ("SOPClassUID", "Modality"))
    problem = header if isinstance(header, str) else ""
    if not isinstance(header, str):
        kind = text(header.elements, "SOPClassUID")
        if kind not in {*SEGMENTATIONS, CONTOURS}:
            problem = (
                f"a DICOM object of the class {kind or '(none)'}, modality {text(header.elements, 'Modality') or '?'}"
            )
        elif header.deflated_from:
            problem = "a deflated file"
    if problem:
        raise UnreadableScan(
            f"{path.name} cannot be read as labels: {problem}. A DICOM SEG or RTSTRUCT, not deflated, is needed. "
            "Export the labels again.",
            "damaged" if problem.startswith("damaged") else "unsupported",
        )
    content = path.read_bytes()
    try:
        data = pydicom.dcmread(BytesIO(content), force=True)  # from memory: a length that lies then asks for no more
        _refuse_torn(data)
        data.SOPClassUID = text(header.elements, "SOPClassUID")  # type: ignore[union-attr]
    except Exception as error:  # pydicom lets any exception out of a damaged file
        raise _damaged(path, f"it cannot be parsed ({type(error).__name__})") from error
    return data, hashlib.sha256(content).hexdigest()


def _refuse_torn(data: Dataset) -> None:
    """pydicom takes what is there of an element that says it is longer; contours or frames may be lost in it."""
    for tag in list(data.keys()):
        element = data.get_item(tag)
        raw = isinstance(element, RawDataElement)
        if raw and element.length != UNDEFINED and len(element.value or b"") != element.length:
            raise EOFError
        if (element.VR or "UN") == "SQ" or (element.VR in (None, "UN") and _vr(tag) == "SQ"):
            for item in data[tag].value or ():
                _refuse_torn(item)


def _vr(tag: BaseTag) -> str:
    return dictionary_VR(tag) if dictionary_has_tag(tag) else ""


def _damaged(path: Path, what: str) -> UnreadableScan:
    return UnreadableScan(
        f"{path.name} is damaged: {what}; labels must be whole. Send or export the file again.", "damaged"
    )


# what belongs to what


def _belonging(data: Dataset, onto: Volume, path: Path) -> list[str]:
    """Refuses labels of another frame of reference or another series; says where nothing could be compared."""
    of_labels = {"frame of reference": _frames_of_reference(data), "series": _referenced_series(data)}
    of_image: dict[str, set[str]] = {what: set() for what in of_labels}
    for file in onto.provenance.files:
        if all(named and named <= of_image[what] for what, named in of_labels.items()):
            break  # one slice that agrees is enough
        for what, uid in _uids(Path(file)).items():
            of_image[what] |= {uid} - {""}
    notes = []
    for what, named in of_labels.items():
        if not named or not of_image[what]:
            side = "image" if named else "labels"
            notes.append(f"{path.name}: its {what} was not compared, for the {side} name none.")
        elif not named & of_image[what] or (what == "frame of reference" and named - of_image[what]):
            raise ScanError(
                f"{path.name} belongs to another {what} than the image; labels must be drawn on their image. Pair them "
                "rightly.",
                "contradiction",
            )
    return notes


def _uids(file: Path) -> dict[str, str]:
    header = read_header(file, ("FrameOfReferenceUID", "SeriesInstanceUID"))
    if isinstance(header, str):
        return {}
    return {
        "frame of reference": text(header.elements, "FrameOfReferenceUID"),
        "series": text(header.elements, "SeriesInstanceUID"),
    }


def _frames_of_reference(data: Dataset) -> set[str]:
    """Of the regions, each of which names its own, else of the object."""
    of_regions = {text(item, "ReferencedFrameOfReferenceUID") for item in values(data, "StructureSetROISequence")}
    listed = {text(item, "FrameOfReferenceUID") for item in values(data, "ReferencedFrameOfReferenceSequence")}
    return (of_regions - {""}) or (listed - {""}) or ({text(data, "FrameOfReferenceUID")} - {""})


def _referenced_series(data: Dataset) -> set[str]:
    found = {text(item, "SeriesInstanceUID") for item in values(data, "ReferencedSeriesSequence")}
    for frame in values(data, "ReferencedFrameOfReferenceSequence"):
        for study in values(frame, "RTReferencedStudySequence"):
            found |= {text(item, "SeriesInstanceUID") for item in values(study, "RTReferencedSeriesSequence")}
    return found - {""}


def _wanted(drawn: list[tuple[int, str]], names: Mapping[str, int], path: Path) -> tuple[dict[int, int], list[str]]:
    """From a segment's number to a label's value, and the names nobody asked for."""
    if not names:
        return {number: number for number, _ in drawn}, []
    declared = {plain(name): value for name, value in names.items()}
    wanted = {number: declared[plain(name)] for number, name in drawn if plain(name) in declared}
    left_out = [name for _, name in drawn if plain(name) not in declared]
    present = {plain(name) for _, name in drawn}
    missing = [name for name in declared if name not in present]
    alike = [(name, hint) for name in left_out if (hint := nearest(plain(name), missing))]
    if drawn and (alike or not wanted):
        met = ", ".join(repr(name) for _, name in drawn)
        hint = f" {alike[0][0]!r} is none of them{alike[0][1]}" if alike else ""
        raise ScanError(
            f"{path.name} holds {met}; the dataset declares {', '.join(map(repr, names))}.{hint} Names must agree. "
            "Declare the file's names in dataset.json, or rename its segments.",
            "contradiction",
        )
    return wanted, left_out


def plain(name: str) -> str:
    """Capitals, spaces, underscores and hyphens do not tell names apart."""
    return " ".join(re.split(r"[\s_\-]+", name.strip().casefold()))


# segmentations


def _segments(data: Dataset, path: Path) -> list[Segment]:
    segments = []
    for item in values(data, "SegmentSequence"):
        number = item.get("SegmentNumber")
        code = next(iter(values(item, "SegmentedPropertyTypeCodeSequence")), Dataset())
        background = (text(code, "CodingSchemeDesignator"), text(code, "CodeValue")) == BACKGROUND
        if not isinstance(number, int):
            raise _damaged(path, "a segment has no number")
        if number > 0 and not background:
            segments.append(Segment(number=number, name=text(item, "SegmentLabel") or f"segment {number}"))
    if len({segment.number for segment in segments}) < len(segments):
        raise _damaged(path, "two segments have one number")
    return segments


def _paint_segments(
    data: Dataset, drawn: list[Segment], wanted: dict[int, int], grid: Geometry, canvas: Canvas
) -> None:
    kind = text(data, "SegmentationType") or "BINARY"
    per_frame = values(data, "PerFrameFunctionalGroupsSequence")
    shared = next(iter(values(data, "SharedFunctionalGroupsSequence")), Dataset())
    names = {segment.number: segment.name for segment in drawn}
    most = _most(data, kind, canvas.path)
    for group, plane in _zip(per_frame, _planes(data, canvas.path), canvas.path):
        target = _plane_of(grid, group, shared, canvas, plane.shape)
        if kind == "LABELMAP":
            padding = data.get("PixelPaddingValue", 0)
            for number in np.unique(plane):
                if number not in (0, padding) and int(number) not in names:
                    raise _damaged(canvas.path, f"pixels hold {number}, a segment that is not described")
                if int(number) in wanted:
                    canvas.paint(target, plane == number, wanted[int(number)], names[int(number)])
            continue
        number = _segment_number(group, shared)
        if number not in names:
            raise _damaged(canvas.path, f"a frame shows segment {number}, which is not described")
        if int(plane.max()) not in (0, most) or np.count_nonzero(plane) != np.count_nonzero(plane == most):
            raise UnreadableScan(
                f"{canvas.path.name} holds fractions or values other than 0 and {most} ({kind}); a label is there or not. "
                "Export it as a binary segmentation.",
                "values",
            )
        if number in wanted:
            canvas.paint(target, plane > 0, wanted[number], names[number])


def _most(data: Dataset, kind: str, path: Path) -> int:
    if kind not in ("BINARY", "FRACTIONAL", "LABELMAP"):
        raise UnreadableScan(
            f"{path.name} is a segmentation of the type {kind}; BINARY, LABELMAP or a FRACTIONAL of zeros and ones is "
            "needed. Export it so.",
            "unsupported",
        )
    return int(data.get("MaximumFractionalValue", 1)) if kind == "FRACTIONAL" else 1


def _zip(groups: list[Dataset], planes: Iterable[np.ndarray], path: Path) -> Iterator[tuple[Dataset, np.ndarray]]:
    met = 0
    for group, plane in zip(groups, planes, strict=False):
        met += 1
        yield group, plane
    if met != len(groups):
        raise _damaged(path, f"{len(groups)} frames are described and {met} are there")


def _group(name: str, *groups: Dataset) -> Dataset:
    """A functional group, of the frame or shared."""
    found = (next(iter(values(group, name)), None) for group in groups)
    return next((item for item in found if item is not None), Dataset())


def _segment_number(*groups: Dataset) -> int:
    number = _group("SegmentIdentificationSequence", *groups).get("ReferencedSegmentNumber")
    return int(number) if isinstance(number, int) else -1


def _plane_of(
    grid: Geometry, group: Dataset, shared: Dataset, canvas: Canvas, shape: tuple[int, ...]
) -> Integer[np.ndarray, "row column"]:
    """The part of the canvas on which a frame lies, turned as the frame is."""
    position = _numbers(_group("PlanePositionSequence", group, shared), "ImagePositionPatient", 3, canvas.path)
    cosines = _numbers(_group("PlaneOrientationSequence", group, shared), "ImageOrientationPatient", 6, canvas.path)
    spacing = _numbers(_group("PixelMeasuresSequence", group, shared), "PixelSpacing", 2, canvas.path)
    to_voxel = np.linalg.inv(LPS_TO_RAS @ grid.affine)
    start = (to_voxel @ [*position, 1])[:3]
    along_row = to_voxel[:3, :3] @ (cosines[:3] * spacing[1])
    along_column = to_voxel[:3, :3] @ (cosines[3:] * spacing[0])
    rows, columns = shape
    corners = np.array([start + along_column * r + along_row * c for r in (0, rows - 1) for c in (0, columns - 1)])
    whole = np.rint([start, along_row, along_column]).astype(np.int64)
    exact = np.array([whole[0] + whole[2] * r + whole[1] * c for r in (0, rows - 1) for c in (0, columns - 1)])
    off = float(np.abs(corners - exact).max())
    steps = np.abs(whole[1:])
    straight = steps.sum() == 2 and (steps.sum(axis=1) == 1).all() and (steps.sum(axis=0) <= 1).all()
    inside = (exact >= 0).all() and (exact < np.array(grid.shape)).all()
    if off > TOLERANCE or not straight or not inside:
        where = "up to " + f"{off:.2f} voxels beside its planes" if straight else "turned or scaled against it"
        where = where if off > TOLERANCE or not straight else "reaching beyond it"
        raise GeometryMismatch(
            f"{canvas.path.name}: a frame of {columns} x {rows} pixels of {spacing[1]:.4g} x {spacing[0]:.4g} mm at "
            f"{_point(position)} (LPS), rows along {_point(cosines[:3])} and columns along {_point(cosines[3:])}, lies on "
            f"another grid than the image's {grid}: {where}. Labels must lie on the image's planes. "
            "Save them from the image they were drawn on.",
            "grids_differ",
        )
    column_axis, row_axis = int(np.argmax(steps[0])), int(np.argmax(steps[1]))
    through = 3 - column_axis - row_axis
    view = canvas.voxels.transpose(row_axis, column_axis, through)[:, :, whole[0][through]]
    down = whole[0][row_axis] + whole[2][row_axis] * np.arange(rows)
    right = whole[0][column_axis] + whole[1][column_axis] * np.arange(columns)
    return view[_slice(down), _slice(right)]


def _slice(indices: np.ndarray) -> slice:
    """Consecutive indices, rising or falling, as a slice: a view, no copy."""
    first, last = int(indices[0]), int(indices[-1])
    if first <= last:
        return slice(first, last + 1)
    return slice(first, last - 1 if last > 0 else None, -1)


def _numbers(item: Dataset, tag: str, count: int, path: Path) -> Float[np.ndarray, " number"]:
    try:
        numbers = np.array([float(value) for value in values(item, tag)])
    except (TypeError, ValueError):
        numbers = np.array([])
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise UnreadableScan(
            f"{path.name}: a frame has no {tag} of {count} numbers; every frame must say where it lies. "
            "Export the labels again.",
            "no_geometry",
        )
    return numbers


def _point(numbers: np.ndarray) -> str:
    return "(" + ", ".join(f"{number:.4g}" for number in numbers) + ")"


# pixels of segmentations: one bit, one byte or two for each


def _planes(data: Dataset, path: Path) -> Iterator[Integer[np.ndarray, "row column"]]:
    try:
        rows, columns, allocated = int(data.Rows), int(data.Columns), int(data.BitsAllocated)
        frames = int(data.get("NumberOfFrames") or 1)
        syntax = str(data.file_meta.get("TransferSyntaxUID", "1.2.840.10008.1.2"))
        content = data.PixelData
    except (AttributeError, TypeError, ValueError) as error:
        raise _damaged(path, f"it does not describe its pixels ({error})") from None
    if allocated not in (1, 8, 16) or int(data.get("SamplesPerPixel", 1)) != 1:
        raise _damaged(path, f"pixels of {allocated} bits; segmentations have 1, 8 or 16")
    if syntax in PACKED:
        yield from _unpacked(content, syntax, rows, columns, frames, allocated, path)
    elif pydicom.uid.UID(syntax).is_transfer_syntax and not pydicom.uid.UID(syntax).is_compressed:
        kind = ">u2" if syntax == pydicom.uid.ExplicitVRBigEndian else "<u2"
        yield from _native(content, rows, columns, frames, allocated, kind, path)
    else:
        raise UnreadableScan(
            f"{path.name} is packed as {pydicom.uid.UID(syntax).name}, which is not read for labels; uncompressed, RLE, "
            "deflated, JPEG-LS or JPEG 2000 is needed. Export it uncompressed.",
            "encoding",
        )


def _native(
    content: bytes, rows: int, columns: int, frames: int, allocated: int, kind: str, path: Path
) -> Iterator[Integer[np.ndarray, "row column"]]:
    size = rows * columns
    promised = (size * frames * allocated + 7) // 8
    if len(content) not in (promised, promised + promised % 2):
        raise _damaged(path, f"{len(content)} bytes of pixels instead of {promised}")
    for number in range(frames):
        if allocated == 1:  # frames follow each other without a gap, in the middle of a byte too (PS3.5 8.1.1)
            first, last = number * size, (number + 1) * size
            bits = np.unpackbits(np.frombuffer(content, np.uint8)[first // 8 : (last + 7) // 8], bitorder="little")
            yield bits[first % 8 : first % 8 + size].reshape(rows, columns)
        else:
            stored = np.dtype(np.uint8 if allocated == 8 else kind)
            plane = np.frombuffer(content, stored, count=size, offset=number * size * stored.itemsize)
            yield plane.astype(stored.newbyteorder("=")).reshape(rows, columns)


def _inflate(frame: bytes, rows: int, columns: int, allocated: int) -> np.ndarray:
    expected = (rows * columns * allocated + 7) // 8
    content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(frame, expected + 2)
    return next(_native(content, rows, columns, 1, allocated, "<u2", Path("a frame")))


def _run_lengths(frame: bytes, rows: int, columns: int, allocated: int) -> np.ndarray:
    """RLE Lossless (PS3.5 G): byte planes, the most significant first; bits are kept one to a byte or eight."""
    count = int.from_bytes(frame[:4], "little")
    starts = np.frombuffer(frame, "<u4", count=15, offset=4)[:count].tolist()
    planes = [imagecodecs.packbits_decode(frame[a:b]) for a, b in zip(starts, [*starts[1:], len(frame)], strict=True)]
    if allocated == 1 and len(planes[0]) < rows * columns:
        bits = np.unpackbits(np.frombuffer(planes[0], np.uint8), bitorder="little")
        return bits[: rows * columns].reshape(rows, columns)
    merged = np.zeros(rows * columns, np.int64)
    for plane in planes:
        merged = merged << 8 | np.frombuffer(plane, np.uint8)[: rows * columns].astype(np.int64)
    return merged.astype(np.uint16).reshape(rows, columns)


def _by(decode: Callable[[bytes], np.ndarray]) -> Callable[[bytes, int, int, int], np.ndarray]:
    return lambda frame, rows, columns, allocated: np.asarray(decode(frame)).astype(np.uint16)


PACKED: dict[str, Callable[[bytes, int, int, int], np.ndarray]] = {
    "1.2.840.10008.1.2.8.1": _inflate,
    "1.2.840.10008.1.2.5": _run_lengths,
    "1.2.840.10008.1.2.4.57": _by(imagecodecs.ljpeg_decode),
    "1.2.840.10008.1.2.4.70": _by(imagecodecs.ljpeg_decode),
    "1.2.840.10008.1.2.4.80": _by(imagecodecs.jpegls_decode),
    "1.2.840.10008.1.2.4.90": _by(imagecodecs.jpeg2k_decode),
    "1.2.840.10008.1.2.4.201": _by(imagecodecs.jpeg2k_decode),
}
"""How frames of each encapsulated transfer syntax are unpacked; none that loses anything."""


def _unpacked(
    content: bytes, syntax: str, rows: int, columns: int, frames: int, allocated: int, path: Path
) -> Iterator[Integer[np.ndarray, "row column"]]:
    try:
        for frame in generate_frames(content, number_of_frames=frames):
            plane = PACKED[syntax](frame, rows, columns, allocated)
            if plane.shape != (rows, columns):
                raise ValueError(f"a frame of {plane.shape} pixels")
            yield plane
    except ScanError:
        raise
    except Exception as error:  # decoders let any exception out of damaged data
        raise _damaged(path, f"a frame cannot be unpacked ({str(error)[:100] or type(error).__name__})") from error


# contours


def _regions(data: Dataset, path: Path) -> list[Segment]:
    contours: dict[str, list[Dataset]] = {}
    for item in values(data, "ROIContourSequence"):
        contours.setdefault(text(item, "ReferencedROINumber"), []).extend(values(item, "ContourSequence"))
    regions = []
    for item in values(data, "StructureSetROISequence"):
        number = text(item, "ROINumber")
        if not number.isdecimal():
            raise _damaged(path, "a region has no number")
        drawn = tuple(contours.get(number, ()))
        regions.append(Segment(number=int(number), name=text(item, "ROIName") or f"region {number}", contours=drawn))
    if len({region.number for region in regions}) < len(regions):
        raise _damaged(path, "two regions have one number")
    return regions


AREAS = {"CLOSED_PLANAR", "CLOSEDPLANAR_XOR"}
"""Contours that enclose something (PS3.3 C.8.8.6); points, lines and volumes of other kinds do not."""


def _paint_contours(
    data: Dataset, drawn: list[Segment], wanted: dict[int, int], grid: Geometry, canvas: Canvas
) -> None:
    to_voxel = np.linalg.inv(LPS_TO_RAS @ grid.affine)
    for region in drawn:
        if region.number not in wanted:
            continue
        others = {kind for item in region.contours if (kind := text(item, "ContourGeometricType")) not in AREAS}
        if others:
            canvas.notes.append(f"{region.name}: {', '.join(sorted(others))} encloses no area and was left out.")
        planes: dict[tuple[int, int], dict[bytes, np.ndarray]] = {}
        for item in region.contours:
            if text(item, "ContourGeometricType") in AREAS:
                points = _points(item, canvas.path) @ to_voxel[:3, :3].T + to_voxel[:3, 3]
                plane, flat = _flattened(points, grid, region.name, canvas.path)
                # the same contour twice would cancel itself
                planes.setdefault(plane, {})[flat.round(3).tobytes()] = flat
        for (through, at), contours in planes.items():
            view = np.moveaxis(canvas.voxels, through, 2)[:, :, at].T
            canvas.paint(view, inside(list(contours.values()), view.shape), wanted[region.number], region.name)


def _points(item: Dataset, path: Path) -> Float[np.ndarray, "point 3"]:
    try:
        raw = item.get_item("ContourData")  # bytes yet: pydicom takes a second for what numpy does in a blink
        spelt = raw.value.decode("ascii") if isinstance(raw, RawDataElement) else "\\".join(map(str, raw.value))
        numbers = np.array(spelt.split("\\"), dtype=np.float64)
    except (AttributeError, TypeError, ValueError):  # none, or no numbers
        numbers = np.array([np.nan])
    if len(numbers) < 3 or len(numbers) % 3 or not np.isfinite(numbers).all():
        raise _damaged(path, "a contour has no points of three numbers")
    return numbers.reshape(-1, 3)


def _flattened(
    points: Float[np.ndarray, "point 3"], grid: Geometry, name: str, path: Path
) -> tuple[tuple[int, int], Float[np.ndarray, "point 2"]]:
    """The plane of voxels a contour lies in, as (axis, index), and its points within; slices before any other plane."""
    for through in (2, 0, 1):
        heights = points[:, through]
        at = int(np.rint(heights.mean()))
        if np.abs(heights - at).max() <= TOLERANCE and 0 <= at < grid.shape[through]:
            return (through, at), np.delete(points, through, axis=1)
    heights = points[:, 2]
    low, high = float(heights.min()), float(heights.max())
    raise GeometryMismatch(
        f"{path.name}: a contour of {name!r} lies between the slices {low:.2f} and {high:.2f} (counted from 0) of the "
        f"image's {grid}; every contour must lie in one of its planes. Save the contours from the image they were "
        "drawn on.",
        "grids_differ",
    )


def inside(contours: list[Float[np.ndarray, "_ 2"]], shape: tuple[int, ...]) -> Bool[np.ndarray, "row column"]:
    """The pixels whose centres (whole numbers; x is the column) lie inside, by the even-odd rule over all contours.

    A contour within another is a hole, as radiotherapy systems have it; the two sides of a keyhole cancel.
    """
    rows, columns = shape
    flips = np.zeros((rows, columns + 1), np.uint8)
    for points in contours:
        following = np.roll(points, -1, axis=0)
        for (x0, y0), (x1, y1) in zip(points.tolist(), following.tolist(), strict=True):
            # half open in y: a corner on a line of centres belongs to one of its two edges
            lowest, highest = (y0, y1) if y0 < y1 else (y1, y0)
            first, last = max(0, int(np.ceil(lowest))), min(rows - 1, int(np.ceil(highest)) - 1)
            if first <= last:
                y = np.arange(first, last + 1)
                x = np.ceil(x0 + (y - y0) * (x1 - x0) / (y1 - y0) - 1e-9)
                np.bitwise_xor.at(flips, (y, np.clip(x, 0, columns).astype(np.int64)), 1)
    return np.bitwise_xor.accumulate(flips, axis=1)[:, :columns].astype(bool)
