"""A file's header as Frames: each is one plane, where it lies, what its values mean, what may tell volumes apart."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    SecondaryCaptureImageStorage,
)

from ..volume import UnreadableScan
from . import headers
from .headers import Header
from .pixels import Packing, packing_of

Triple = tuple[float, float, float]
Shared = TypeVar("Shared")

TAGS: tuple[str | int, ...] = (
    *(*headers.TAGS, "PatientID", "KVP", "SeriesTime", "ImagesInAcquisition", "InConcatenationTotalNumber"),
    *(0x00190010, 0x0019100C, 0x0019100E, 0x001910BB, 0x001910BC, 0x001910BD),  # Siemens and GE: diffusion
    *(0x00430010, 0x00431039, 0x20010010, 0x20011003, 0x00650010, 0x00651009),  # GE, Philips, UIH: diffusion
)
"""What is read of every file; what only a mosaic needs is read once it is known for one."""

SLICES = {CTImageStorage, MRImageStorage, PositronEmissionTomographyImageStorage, SecondaryCaptureImageStorage}
"""SOP classes of one slice per file. A secondary capture counts if it says where it lies (masks are often kept so)."""

COSINE_TOLERANCE = 1e-3
"""How far rounding may bring two direction vectors from length 1 and from a right angle; beyond, they are wrong."""

FARTHEST_MM = 1e6
"""A position farther from the origin than a kilometre was not measured in a scanner."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plane:
    """How a frame lies, but for its position: the frames of a volume share one."""

    row: Triple
    """The direction in which the column number grows, in LPS."""
    column: Triple
    """The direction in which the row number grows."""
    spacing: tuple[float, float]
    """Millimetres between rows, then between columns."""
    reference: str
    """FrameOfReferenceUID."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What stored values mean."""

    slope: float = 1.0
    intercept: float = 0.0
    first: int = 0
    """The stored value that the first entry of the table stands for."""
    table: bytes = b""
    """A modality lookup table, uint16; empty where slope and intercept hold."""
    stated: str = ""
    """Which of slope, intercept and table the header gave; where one is not given, it is 1, 0 or none."""
    padding: tuple[int, int] | None = None
    """The least and the greatest stored value that means: nothing was measured here."""


class Traits(NamedTuple):
    """What makes another volume wherever it differs."""

    modality: str
    quantity: str
    """What is shown, where it is not plain intensity: phase, adc, water ..."""
    echo_time: float | None
    echo: str
    b_value: float | None
    time: str
    stack: str
    units: str
    """Units, or RescaleType where there are none: what the numbers count."""


class Clues(NamedTuple):
    """What may tell volumes apart that lie at one place, in the order in which it is asked."""

    image_type: str
    kind: str
    """SOP class."""
    acquisition: str
    trigger: float | None
    """Milliseconds after the heart beat or the breath."""
    percent: str
    """Of the heart's cycle, then of the breath's."""
    offset: float | None
    """Of a time point from the first one, as enhanced objects and PET state it."""
    direction: str
    """Of the diffusion gradient."""
    inversion: str
    flip: str
    dimension: str
    """DimensionIndexValues but for the one that counts places."""
    acquired: float | None
    """Seconds, as all times here."""
    content: float | None
    series: float | None
    kernel: str
    correction: str
    """What PET was corrected for."""
    voltage: str
    repetition: str
    instance: float | None


class Flaw(NamedTuple):
    """Why a frame cannot be read: a word of REASONS, and the sentences for a person."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One plane of one file. There may be a hundred thousand: what frames have in common is one object."""

    path: Path
    number: int = 0
    """In the file, from 0."""
    uid: str = ""
    """SOPInstanceUID of the file."""
    packing: Packing | None = None
    size: tuple[int, int] = (0, 0)
    """Rows and columns; (0, 0) where the header does not say."""
    tile: tuple[int, int] | None = None
    """Row and column of the first pixel, where the frame is a piece of a mosaic."""
    position: Triple | None = None
    """Of the middle of the first pixel, in LPS millimetres; None where nothing says."""
    plane: Plane | None = None
    scale: Scale = Scale()
    traits: Traits
    clues: Clues
    parts: tuple[str, int] = ("", 0)
    """ConcatenationUID of a frame of a file that was cut into several, and how many they must be at least."""
    announced: int = 0
    """ImagesInAcquisition: how many there were meant to be; 0 if it does not say."""
    flaw: Flaw | None = None
    mended: tuple[str, ...] = ()
    """What was wrong with the header and was mended."""

    @property
    def settled(self) -> bool:
        """Whether it says where it lies, and how large it is."""
        return self.position is not None and self.plane is not None and self.size != (0, 0)


class Intern:
    """Equal values become one object."""

    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}

    def __call__(self, value: Shared) -> Shared:
        return self.known.setdefault((type(value), value), value)


def frames_of(header: Header, share: Intern) -> list[Frame]:
    """Every plane the file holds; one Frame with a flaw where it holds none that can be read."""
    top = _flat(header.elements)
    blank = _blank(header, top, share)
    try:
        _refuse_kind(header, top)
        packing = packing_of(header)
        blank = replace(blank, packing=packing, size=share((packing.rows, packing.columns)))
        return list(SOURCES[_source(header, top)](header, top, blank, share))
    except UnreadableScan as refusal:
        flaw = Flaw(refusal.reason, str(refusal))
    if "PerFrameFunctionalGroupsSequence" in header.elements:
        return [replace(blank, flaw=flaw)]
    return [_placed(blank, top, share, flaw)]


def with_missing_parts(frames: Sequence[Frame]) -> list[Frame]:
    """A concatenation is one object cut into several files and says into how many; without all of them it has a flaw."""
    found: dict[str, set[str]] = defaultdict(set)
    needed: dict[str, int] = defaultdict(int)
    for frame in frames:
        cut, count = frame.parts
        found[cut].add(frame.uid or str(frame.path))
        needed[cut] = max(needed[cut], count)
    flaws = {
        cut: Flaw(
            "missing_slices",
            f"{len(files)} of the {needed[cut]} files into which an object was cut (a concatenation) are there; all are "
            "needed. Send the whole series again.",
        )
        for cut, files in found.items()
        if len(files) < needed[cut]
    }
    return [
        replace(frame, flaw=frame.flaw or flaws[frame.parts[0]]) if frame.parts[0] in flaws else frame
        for frame in frames
    ]


def _blank(header: Header, top: dict[int, Any], share: Intern) -> Frame:
    """What all frames of the file have in common."""
    rows, columns = (_whole(top, tag) for tag in ("Rows", "Columns"))
    cut = _text(top, "ConcatenationUID")
    return Frame(
        path=header.path,
        uid=_text(top, "SOPInstanceUID"),
        size=share((rows, columns) if min(rows, columns) > 0 else (0, 0)),
        traits=share(_traits(top)),
        clues=_clues(top, share),
        parts=share((cut, max(_whole(top, tag) for tag in CUT_INTO)) if cut else ("", 0)),
        announced=_whole(top, "ImagesInAcquisition"),
        mended=share(tuple(header.mended)),
    )


CUT_INTO = ("InConcatenationTotalNumber", "InConcatenationNumber")
"""The first need not be there; the number of one part says then how many there are at least."""


def _refuse_kind(header: Header, top: dict[int, Any]) -> None:
    """A class of the standard that is not a slice, or an unknown one that is not sure to be one."""
    sop_class = UID(_text(top, "SOPClassUID"))
    if sop_class in SLICES or "PerFrameFunctionalGroupsSequence" in header.elements or _count(top) > 1:
        return
    known = sop_class.name != str(sop_class)
    if known or _text(top, "Modality") not in ("CT", "MR", "PT"):
        raise _unreadable(header.path, f"an object of the class {sop_class.name or '(none)'}", "unsupported")


def _source(header: Header, top: dict[int, Any]) -> str:
    image_type = {word.upper() for word in _words(top, "ImageType")}
    if "PerFrameFunctionalGroupsSequence" in header.elements:
        return "groups"
    if _count(top) > 1:
        return "unplaced"
    return next((word for word in ("MOSAIC", "VFRAME") if word in image_type), "classic")


# one plane per file


def _classic(header: Header, top: dict[int, Any], blank: Frame, share: Intern) -> Iterable[Frame]:
    yield _placed(blank, top, share)


def _placed(blank: Frame, top: dict[int, Any], share: Intern, flaw: Flaw | None = None) -> Frame:
    """With its place and its scale, or with the first of the flaws that keep it from having them."""
    try:
        position, plane = _place(blank.path, top, share)
    except UnreadableScan as refusal:
        return replace(blank, flaw=flaw or Flaw(refusal.reason, str(refusal)))
    try:
        scale = share(_scale(blank, [top], top)) if flaw is None else Scale()
    except UnreadableScan as refusal:
        flaw, scale = Flaw(refusal.reason, str(refusal)), Scale()
    return replace(blank, position=position, plane=plane, scale=scale, flaw=flaw)


def _place(path: Path, look: dict[int, Any], share: Intern) -> tuple[Triple, Plane]:
    """Geometry comes from these three alone; slice location, thickness and number lie too often."""
    numbers = {}
    for tag, count in {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}.items():
        numbers[tag] = _numbers(look, tag)
        if len(numbers[tag]) != count or not np.isfinite(numbers[tag]).all():
            what = f"it has no {tag} of {count} numbers, so that nobody knows where it lies"
            raise _unreadable(path, what, "no_geometry")
    position, directions, spacing = numbers.values()
    if spacing.min() <= 0 or spacing.max() > FARTHEST_MM or np.abs(position).max() > FARTHEST_MM:
        what = "its PixelSpacing is not positive" if spacing.min() <= 0 else "it lies a kilometre from the patient"
        raise _unreadable(path, what, "no_geometry")
    row, column = directions.reshape(2, 3)
    lengths = np.linalg.norm([row, column], axis=1)
    if np.abs(lengths - 1).max() > COSINE_TOLERANCE or abs(row @ column) > COSINE_TOLERANCE:
        what = "its ImageOrientationPatient holds no two unit vectors at a right angle"
        raise _unreadable(path, what, "no_geometry")
    plane = Plane(
        row=_triple(row),
        column=_triple(column),
        spacing=(float(spacing[0]), float(spacing[1])),
        reference=_text(look, "FrameOfReferenceUID"),
    )
    return _triple(position), share(plane)


def _scale(blank: Frame, levels: Sequence[dict[int, Any]], look: dict[int, Any]) -> Scale:
    """Slope and intercept stand together: those of the innermost group that has one of them."""
    packing, path = blank.packing, blank.path
    assert packing is not None
    here = next((level for level in levels if _has(level, "RescaleSlope") or _has(level, "RescaleIntercept")), {})
    slope, intercept = _one_number(here, "RescaleSlope", 1.0), _one_number(here, "RescaleIntercept", 0.0)
    largest = abs(slope) * 2.0**packing.stored + abs(intercept)
    if not np.isfinite([slope, intercept]).all() or slope == 0 or largest > np.finfo(np.float32).max:
        what = f"its RescaleSlope {slope} and RescaleIntercept {intercept} give no values"
        raise _unreadable(path, what, "values")
    tables = look.get(tag_for_keyword("ModalityLUTSequence"))
    if not tables and not here:
        mapped = _real_world(packing, look, path)
        if mapped is not None:
            return mapped
    if not tables:
        stated = " ".join(word for word in ("slope", "intercept") if _has(here, f"Rescale{word.title()}"))
        return Scale(slope=slope, intercept=intercept, stated=stated, padding=_padding(packing, look))
    if (slope, intercept) != (1, 0):
        what = "its values have both a slope and a lookup table, of which only one can hold"
        raise _unreadable(path, what, "contradiction")
    first, table = _table(tables[0], packing, path)
    return Scale(first=first, table=table, stated="table")


def _real_world(packing: Packing, look: dict[int, Any], path: Path) -> Scale | None:
    """Where there is no slope, as in parametric maps, the real world value mapping says what is measured (PS3.3 C.7.6.16.2.11)."""
    items = [_flat(item) for item in look.get(_tag("RealWorldValueMappingSequence")) or []]
    if not items:
        return None
    lines = {
        tuple(_one_number(item, f"RealWorldValue{word}", np.nan) for word in ("Slope", "Intercept")) for item in items
    }
    slope, intercept = lines.pop()
    largest = abs(slope) * 2.0**packing.stored + abs(intercept)
    if lines or slope == 0 or not largest <= np.finfo(np.float32).max:
        what = "its values have no slope of their own, and its real world value mappings are several, or no line"
        raise _unreadable(path, what, "values")
    return Scale(slope=slope, intercept=intercept, stated="real world", padding=_padding(packing, look))


def _table(item: Dataset, packing: Packing, path: Path) -> tuple[int, bytes]:
    """PS3.3 C.11.1: how many entries, the stored value of the first, the bits of each."""
    odd = _unreadable(path, "its values go through a lookup table that contradicts itself", "values")
    try:
        count, first, bits = (int(number) for number in item.LUTDescriptor)
        data = item.LUTData
        entries = np.frombuffer(data, "<u2") if isinstance(data, bytes) else np.asarray(list(data), np.int64)
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise odd from error
    count = count & 0xFFFF or 1 << 16  # 65536 entries are written as 0
    first = (first & 0xFFFF) - (1 << 16 if packing.signed and first & 0x8000 else 0)
    if bits not in (8, 16) or len(entries) != count or entries.min() < 0 or entries.max() > 0xFFFF:
        raise odd
    return first, entries.astype(np.uint16).tobytes()


def _padding(packing: Packing, look: dict[int, Any]) -> tuple[int, int] | None:
    """The stored values that mean nothing, if any pixel can hold them."""
    values = [_whole(look, tag, None) for tag in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if values[0] is None:
        return None
    ends = []
    for value in values:
        if value is not None:
            # its VR is ambiguous: where it was taken for unsigned, its sign is in the uppermost bit
            turned = packing.signed and value >= 1 << packing.allocated - 1
            ends.append(value - (1 << packing.allocated) if turned else value)
    least, most = packing.least_and_most
    return (min(ends), max(ends)) if least <= max(ends) and min(ends) <= most else None


# many planes per file, each with its functional groups

MACROS = tuple(
    tag_for_keyword(word)
    for word in (
        *("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence"),
        *("PixelValueTransformationSequence", "FrameContentSequence", "MREchoSequence", "MRDiffusionSequence"),
        *("MRImageFrameTypeSequence", "CTImageFrameTypeSequence", "PETFrameTypeSequence", "XRay3DFrameTypeSequence"),
        *("CardiacSynchronizationSequence", "RespiratorySynchronizationSequence", "TemporalPositionSequence"),
        *("MRTimingAndRelatedParametersSequence",),
        *("MRModifierSequence", "CTReconstructionSequence", "CTXRayDetailsSequence"),
        *("UnassignedPerFrameConvertedAttributesSequence", "UnassignedSharedConvertedAttributesSequence"),
    )
)
"""The groups that are asked, first to last. Vendors' own may hold another slice's position (Philips, (2005,140F))."""


def _grouped(header: Header, top: dict[int, Any], blank: Frame, share: Intern) -> Iterable[Frame]:
    """Enhanced and converted objects, and whatever else keeps a functional group for each of its frames."""
    assert blank.packing is not None
    own_groups = header.elements.PerFrameFunctionalGroupsSequence
    if len(own_groups) != blank.packing.frames:
        what = f"it holds {blank.packing.frames} frames and describes {len(own_groups)}"
        raise _unreadable(header.path, what, "contradiction")
    shared = _in_groups(header.elements.get("SharedFunctionalGroupsSequence") or [])
    # where one frame is all there is, its place may stand outside of the groups; of several it would place none
    alone = () if len(own_groups) == 1 else (tag_for_keyword("ImagePositionPatient"),)
    rest = {tag: value for tag, value in top.items() if tag not in alone}
    places = _dimensions_of_place(header.elements)
    for number, group in enumerate(own_groups):
        own = _in_groups([group])
        look = {**rest, **shared, **own}
        frame = replace(
            blank,
            number=number,
            traits=share(_traits(look)),
            clues=_clues(look, share, within=number / len(own_groups), places=places),
        )
        try:
            position, plane = _place(header.path, look, share)
            frame = replace(frame, position=position, plane=plane)
            frame = replace(frame, scale=share(_scale(frame, [own, shared, top], look)))
        except UnreadableScan as refusal:
            frame = replace(frame, flaw=share(Flaw(refusal.reason, str(refusal))))
        yield frame


def _in_groups(groups: Sequence[Dataset]) -> dict[int, Any]:
    """Everything in the first item of every known group, and all items of the one that may have several."""
    found: dict[int, Any] = {}
    for group in groups[:1]:
        if mappings := group.get("RealWorldValueMappingSequence"):
            found[_tag("RealWorldValueMappingSequence")] = mappings
        for macro in MACROS:
            sequence = group.get(macro)
            for element in sequence.value[0] if sequence is not None and sequence.value else ():
                if element.value is not None and element.value != "":
                    found.setdefault(int(element.tag), element.value)
    return found


def _dimensions_of_place(elements: Dataset) -> tuple[bool, ...]:
    """Of each of DimensionIndexValues: whether it counts places, so that it tells no volumes apart."""
    counting = {tag_for_keyword(word) for word in ("InStackPositionNumber", "ImagePositionPatient", "SliceLocation")}
    return tuple(item.get("DimensionIndexPointer") in counting for item in elements.get("DimensionIndexSequence") or [])


def _unplaced(header: Header, top: dict[int, Any], blank: Frame, share: Intern) -> Iterable[Frame]:
    what = f"a multi-frame object of {_count(top)} frames of which none says where it lies"
    raise _unreadable(header.path, what, "no_geometry")


# many planes on one sheet


def _mosaic(header: Header, top: dict[int, Any], blank: Frame, share: Intern) -> Iterable[Frame]:
    """Siemens: the private CSA header says how many tiles there are and in which direction they follow each other."""
    count, normal = _csa(header.path)
    whole = _placed(blank, top, share)
    if whole.flaw or whole.position is None or whole.plane is None:
        yield whole
        return
    row, column = np.array(whole.plane.row), np.array(whole.plane.column)
    steps = _numbers(top, "SpacingBetweenSlices")
    side = int(np.ceil(np.sqrt(count)))
    height, width = whole.size[0] // side, whole.size[1] // side
    across = np.cross(row, column)
    if len(steps) != 1 or not 0 < steps[0] < FARTHEST_MM or abs(abs(normal @ across) - 1) > COSINE_TOLERANCE:
        what = "a mosaic whose slices have no sure distance or direction (SpacingBetweenSlices, SliceNormalVector)"
        raise _unreadable(header.path, what, "no_geometry")
    if (height * side, width * side) != whole.size:
        what = f"a mosaic of {count} slices, which do not fit into {whole.size[0]} x {whole.size[1]} pixels"
        raise _unreadable(header.path, what, "contradiction")
    # the header places the corner of the sheet as if the sheet were one slice around the middle of the true one
    between_rows, between_columns = whole.plane.spacing
    corner = np.array(whole.position) + row * between_columns * (whole.size[1] - width) / 2
    corner = corner + column * between_rows * (whole.size[0] - height) / 2
    positions = [corner + normal * steps[0] * n for n in range(count)]
    yield from _tiles(whole, positions, (height, width), side, share)


def _csa(path: Path) -> tuple[int, Float[np.ndarray, " 3"]]:
    """The number of slices in a mosaic and the direction in which they are stacked."""
    from nibabel.nicom import csareader  # only here: most scans are no mosaics

    missing = _unreadable(path, "a mosaic of many slices without Siemens' own header, which says how many", "no_scan")
    missing.reason = "no_geometry"
    again = headers.read_header(path, (*headers.TAGS, 0x0019100A, 0x00290010, 0x00291010, 0x00291110, 0x00291210))
    if isinstance(again, str):
        raise missing
    try:
        csa = csareader.get_csa_header(again.elements, "image")
        count = csareader.get_n_mosaic(csa)
        normal = np.asarray(csareader.get_slice_normal(csa), float)
        reversed_order = any(csa["tags"].get("ProtocolSliceNumber", {}).get("items") or [0])
    except Exception as error:  # a private header that was cut or changed can make its reader fail in any way
        raise missing from error
    stated = again.elements.get(0x0019100A)
    if stated is not None and count is not None and str(stated.value).isdigit() and int(stated.value) != count:
        raise _unreadable(path, f"a mosaic of {count} and of {stated.value} slices", "contradiction")
    if not count or count < 1 or count > 4096 or normal.shape != (3,) or not np.isfinite(normal).all():
        raise missing
    if reversed_order:
        raise _unreadable(path, "a mosaic whose slices are numbered backwards", "no_geometry")
    return int(count), normal / max(float(np.linalg.norm(normal)), 1e-9)


def _vframe(header: Header, top: dict[int, Any], blank: Frame, share: Intern) -> Iterable[Frame]:
    """United Imaging: a private sequence holds the position of every tile."""
    again = headers.read_header(header.path, (*headers.TAGS, 0x00650010, 0x00651050, 0x00651051))
    elements = Dataset() if isinstance(again, str) else again.elements
    items = elements[0x00651051].value if 0x00651051 in elements else []
    positions = []
    for item in items if not isinstance(items, bytes) else []:
        position = _numbers(_flat(item), "ImagePositionPatient")
        positions += [position] if len(position) == 3 and np.isfinite(position).all() else []
    stated = elements.get(0x00651050)
    if not positions or len(positions) != len(items) or (stated and _float(stated.value) != len(positions)):
        what = "a mosaic of many slices whose places its private header does not say"
        raise _unreadable(header.path, what, "no_geometry")
    whole = _placed(blank, {**top, int(tag_for_keyword("ImagePositionPatient") or 0): list(positions[0])}, share)
    side = int(np.ceil(np.sqrt(len(positions))))
    height, width = whole.size[0] // side, whole.size[1] // side
    if (height * side, width * side) != whole.size:
        what = f"a mosaic of {len(positions)} slices, which do not fit into {whole.size[0]} x {whole.size[1]} pixels"
        raise _unreadable(header.path, what, "contradiction")
    yield from _tiles(whole, positions, (height, width), side, share)


def _tiles(
    whole: Frame, positions: Sequence[np.ndarray], size: tuple[int, int], side: int, share: Intern
) -> Iterable[Frame]:
    """The slices of a sheet, row by row."""
    for n, position in enumerate(positions):
        tile = (n // side * size[0], n % side * size[1])
        yield replace(whole, tile=tile, size=share(size), position=_triple(position))


SOURCES: dict[str, Callable[[Header, dict[int, Any], Frame, Intern], Iterable[Frame]]] = {
    "classic": _classic,
    "groups": _grouped,
    "unplaced": _unplaced,
    "MOSAIC": _mosaic,
    "VFRAME": _vframe,
}


# what tells volumes apart

QUANTITIES = {
    **{"PHASE": "phase", "PHASE MAP": "phase", "REAL": "real", "IMAGINARY": "imaginary", "VELOCITY MAP": "velocity"},
    **{"ADC": "adc", "ADC_MAP": "adc", "ADC MAP": "adc", "EADC": "eadc", "FA": "fa", "FA_MAP": "fa", "EXP_ADC": "eadc"},
    **{"TRACEW": "trace", "TRACE": "trace", "WATER": "water", "FAT": "fat", "IN_PHASE": "in phase", "IP": "in phase"},
    **{"OPP_PHASE": "opposed phase", "OUT_PHASE": "opposed phase", "OP": "opposed phase"},
    **{"FAT_FRACTION": "fat fraction", "FF": "fat fraction", "WATER_FRACTION": "water fraction"},
    **{
        f"{one}{sep}MAP": f"{one.lower().replace('_', ' ')} map"
        for sep in " _"
        for one in ("T1", "T2", "T2_STAR", "R1")
    },
    **{
        f"{one}{sep}MAP": f"{one.lower().replace('_', ' ')} map"
        for sep in " _"
        for one in ("R2", "R2_STAR", "B0", "B1")
    },
    **{"FIELD_MAP": "b0 map", "FIELD MAP": "b0 map", "CBF": "cbf", "RCBF": "cbf", "CBV": "cbv", "RCBV": "cbv"},
    **{"MTT": "mtt", "TTP": "ttp", "TMAX": "tmax", "KTRANS": "ktrans", "KEP": "kep", "VE": "ve", "VP": "vp"},
    **{"MIP": "mip", "MINIP": "minip", "PROJECTION IMAGE": "projection", "SUBTRACTION": "subtraction"},
    **{"VMI": "vmi", "IODINE": "iodine", "VNC": "vnc", "MEAN": "mean", "STDDEV": "deviation"},
}
"""Values of ImageType and FrameType behind the second that say that something else is shown than plain intensity."""

LETTERS = {"P": "phase", "R": "real", "I": "imaginary", "W": "water", "F": "fat"}
"""The same in one letter; so in magnetic resonance alone."""


def _traits(look: dict[int, Any]) -> Traits:
    modality = _text(look, "Modality").upper()
    echo_time = _one_number(look, "EffectiveEchoTime", np.nan)
    echo_time = echo_time if np.isfinite(echo_time) else _one_number(look, "EchoTime", np.nan)
    b_value = _b_value(look)
    return Traits(
        modality=modality,
        quantity=_quantity(look, modality),
        echo_time=_rounded(echo_time),
        echo=" ".join(_words(look, "EchoNumbers")),
        b_value=_rounded(b_value),
        time=_text(look, "TemporalPositionIndex") or _text(look, "TemporalPositionIdentifier"),
        stack=_text(look, "StackID"),
        units=(_text(look, "Units") or _text(look, "RescaleType")).upper(),
    )


def _quantity(look: dict[int, Any], modality: str) -> str:
    words = (_words(look, "FrameType") or _words(look, "ImageType"))[2:] + _words(look, "ComplexImageComponent")
    known = {**QUANTITIES, **LETTERS} if modality == "MR" else QUANTITIES
    return " ".join(sorted({known[word.strip().upper()] for word in words if word.strip().upper() in known}))


def _b_value(look: dict[int, Any]) -> float:
    """Where the standard keeps it, else where GE, Siemens, Philips and United Imaging do; NaN where nobody says."""
    b_value = _one_number(look, "DiffusionBValue", np.nan)
    for tag in (GE_B_VALUE, 0x0019100C, 0x20011003, 0x00651009):
        if np.isfinite(b_value):
            break
        values = _private(look, tag)
        b_value = float(values[0]) if len(values) else np.nan
        # GE marks a b-value that was corrected by adding 1 000 000 000
        b_value = b_value % 100000 if tag == GE_B_VALUE else b_value
    return b_value


GE_B_VALUE = 0x00431039
PRIVATE = {
    GE_B_VALUE: ("GEMS_PARM_01", ""),
    0x0019100C: ("SIEMENS MR HEADER", ""),
    0x0019100E: ("SIEMENS MR HEADER", "<f8"),
    0x001910BB: ("GEMS_ACQU_01", ""),
    0x001910BC: ("GEMS_ACQU_01", ""),
    0x001910BD: ("GEMS_ACQU_01", ""),
    0x20011003: ("Philips Imaging DD 001", "<f4"),
    0x00651009: ("Image Private Header", "<f8"),
}
"""Of elements that vendors keep: whom the block must belong to, and how numbers are kept that are no text."""


def _private(look: dict[int, Any], tag: int) -> Float[np.ndarray, " number"]:
    mark, numbers = PRIVATE[tag]
    creator = (tag & 0xFFFF0000) | 0x10
    value = look.get(tag)
    if value is None or str(look.get(creator, "")).strip().upper() != mark.upper():
        return np.array([])
    try:
        if isinstance(value, bytes):  # in a file without explicit VRs nobody else knows what it is
            text = value.decode("latin-1").strip("\0 ").split("\\")
            value = np.frombuffer(value, numbers).tolist() if numbers else text
        return np.array([float(one) for one in _several(value)])
    except (TypeError, ValueError):
        return np.array([])


def _direction(look: dict[int, Any]) -> str:
    """Of the diffusion gradient, to two digits."""
    numbers = _numbers(look, "DiffusionGradientOrientation")
    if len(numbers) != 3:
        numbers = _private(look, 0x0019100E)
    if len(numbers) != 3:
        numbers = np.concatenate([_private(look, tag) for tag in (0x001910BB, 0x001910BC, 0x001910BD)])
    said = _text(look, "DiffusionDirectionality")
    return f"{said} {(numbers + 0.0).round(2).tolist()}" if len(numbers) == 3 else said


def _clues(look: dict[int, Any], share: Intern, within: float | None = None, places: tuple[bool, ...] = ()) -> Clues:
    """`within` is how far in its file a frame lies, from 0 to 1, where it is one of several."""
    instance = _one_number(look, "InstanceNumber", np.nan if within is None else 0.0) + (within or 0.0)
    values = _numbers(look, "DimensionIndexValues")
    time = partial(_seconds, look)
    return Clues(
        image_type=share("/".join(_words(look, "FrameType") or _words(look, "ImageType"))),
        kind=share(_text(look, "SOPClassUID")),
        acquisition=share(_text(look, "FrameAcquisitionNumber") or _text(look, "AcquisitionNumber")),
        trigger=_first_number(look, TRIGGERS),
        percent=share(" ".join(filter(None, (_text(look, tag) for tag in PERCENTAGES)))),
        offset=_first_number(look, OFFSETS),
        direction=share(_direction(look)),
        inversion=share(_text(look, "InversionTime") or _text(look, "InversionTimes")),
        flip=share(_text(look, "FlipAngle")),
        dimension=share(
            " ".join(f"{value:g}" for value, place in zip(values, places, strict=False) if not place)
            if len(values) == len(places)
            else ""
        ),
        acquired=time("FrameAcquisitionDateTime") or time("AcquisitionDateTime") or time("AcquisitionTime"),
        content=time("ContentTime"),
        series=time("SeriesTime"),
        kernel=share(" ".join(_words(look, "ConvolutionKernel"))),
        correction=share(" ".join(sorted(_words(look, "CorrectedImage")))),
        voltage=share(_text(look, "KVP")),
        repetition=share(_text(look, "RepetitionTime")),
        instance=_finite(instance),
    )


TRIGGERS = ("NominalCardiacTriggerDelayTime", "TriggerTime", "NominalRespiratoryTriggerDelayTime")
PERCENTAGES = ("NominalPercentageOfCardiacPhase", "NominalPercentageOfRespiratoryPhase")
OFFSETS = ("TemporalPositionTimeOffset", "FrameReferenceTime")


def _first_number(look: dict[int, Any], tags: Sequence[str]) -> float | None:
    numbers = (_one_number(look, tag, np.nan) for tag in tags)
    return next((number for number in numbers if np.isfinite(number)), None)


def _seconds(look: dict[int, Any], tag: str) -> float | None:
    """HHMMSS.ffffff or YYYYMMDDHHMMSS.ffffff, some with colons; only differences matter."""
    text = _text(look, tag).replace(":", "").split("+")[0]
    whole, _, fraction = text.partition(".")
    if not whole.isdigit() or (fraction and not fraction.isdigit()) or len(whole) not in (2, 4, 6, 8, 10, 12, 14):
        return None
    day, clock = (whole[:8], whole[8:]) if len(whole) > 6 else ("0", whole)
    clock = clock.ljust(6, "0")
    seconds = int(clock[:2]) * 3600 + int(clock[2:4]) * 60 + int(clock[4:6])
    return int(day) * 86400.0 + seconds + float(f"0.{fraction or 0}")


# values of elements, without trusting them


def _flat(elements: Dataset) -> dict[int, Any]:
    """Tag to value: asked for dozens of times a file, for which pydicom's own way is too slow."""
    return {int(tag): element.value for tag, element in elements.items()}


def _get(look: dict[int, Any], keyword: str) -> Any:
    return look.get(_tag(keyword))


KNOWN_TAGS: dict[str, int] = {}


def _tag(keyword: str) -> int:
    if keyword not in KNOWN_TAGS:
        KNOWN_TAGS[keyword] = int(tag_for_keyword(keyword) or 0)
    return KNOWN_TAGS[keyword]


def _has(look: dict[int, Any], keyword: str) -> bool:
    return bool(_text(look, keyword))


def _text(look: dict[int, Any], keyword: str) -> str:
    value = _get(look, keyword)
    return "" if value is None else str(value).strip("\0 ")


def _several(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return list(value) if not isinstance(value, str | bytes) and hasattr(value, "__iter__") else [value]


def _words(look: dict[int, Any], keyword: str) -> list[str]:
    return [str(value) for value in _several(_get(look, keyword))]


def _numbers(look: dict[int, Any], keyword: str) -> Float[np.ndarray, " number"]:
    """None where the tag is missing or empty; NaN where there is something else."""
    try:
        return np.array([float(value) for value in _several(_get(look, keyword))], dtype=np.float64)
    except (TypeError, ValueError):
        return np.array([np.nan])


def _one_number(look: dict[int, Any], keyword: str, otherwise: float) -> float:
    """NaN where there is more than one, or none that is a number."""
    value = _get(look, keyword)
    if value is None or value == "":
        return otherwise
    try:
        return float(value)
    except (TypeError, ValueError):
        return np.nan


def _whole(look: dict[int, Any], keyword: str, otherwise: Any = 0) -> Any:
    value = _one_number(look, keyword, np.nan)
    return int(value) if np.isfinite(value) else otherwise


def _count(top: dict[int, Any]) -> int:
    return max(1, _whole(top, "NumberOfFrames", 1))


def _float(value: Any) -> float:
    try:
        return float(value.decode("latin-1").strip("\0 ") if isinstance(value, bytes) else value)
    except (TypeError, ValueError):
        return np.nan


def _finite(number: float) -> float | None:
    return number if np.isfinite(number) else None


def _rounded(number: float) -> float | None:
    return round(float(number), 4) if np.isfinite(number) else None


def _triple(numbers: np.ndarray) -> Triple:
    x, y, z = (float(number) for number in numbers)
    return x, y, z


def _unreadable(path: Path, what: str, reason: str) -> UnreadableScan:
    return UnreadableScan(
        f"{path.name} is no slice that can be read: {what}. Slices that say where they lie and what their values mean "
        "are needed. Take the file away if it does not belong, or export the series again.",
        reason=reason,
    )
