"""A DICOM file's header, read without trusting it: element by element, within the file, or not at all."""

import logging
import os
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, final

import pydicom
from pydicom.charset import convert_encodings
from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement, convert_raw_data_element
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence as Items
from pydicom.tag import BaseTag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
)

logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # it logs odd values as they are: names of patients too
# once and for all threads: odd values are met as they are, and judged by what depends on them
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE

DAMAGED = "damaged"
"""How a reason begins that means: this file may have been a slice once."""

TAGS: tuple[str | int, ...] = (
    *("SpecificCharacterSet", "ImageType", "SOPClassUID", "SOPInstanceUID", "Modality", "Manufacturer"),
    *("ConversionType", "SeriesDescription", "ManufacturerModelName", "AcquisitionContrast", "FrameType"),
    *("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "ConcatenationUID", "InConcatenationNumber"),
    *("AcquisitionNumber", "InstanceNumber", "TemporalPositionIdentifier", "NumberOfTemporalPositions", "TriggerTime"),
    *("TemporalPositionIndex", "TemporalPositionTimeOffset", "CardiacCyclePosition"),
    *("NominalCardiacTriggerDelayTime", "NominalPercentageOfCardiacPhase"),
    *("NominalRespiratoryTriggerDelayTime", "NominalPercentageOfRespiratoryPhase"),
    *("AcquisitionDate", "AcquisitionTime", "AcquisitionDateTime", "ContentTime", "StackID", "InStackPositionNumber"),
    *("EchoTime", "EchoNumbers", "RepetitionTime", "InversionTime", "FlipAngle", "ComplexImageComponent"),
    *("DiffusionBValue", "DiffusionGradientOrientation", "DiffusionDirectionality", "ScanOptions", "ImageComments"),
    *("ConvolutionKernel", "FrameReferenceTime", "ActualFrameDuration", "Units", "CorrectedImage", "DecayCorrection"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
    *("GantryDetectorTilt", "PatientPosition", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration"),
    *("NumberOfFrames", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit", "RescaleSlope", "RescaleIntercept", "RescaleType"),
    *(
        "ModalityLUTSequence",
        "RealWorldValueMappingSequence",
        "LossyImageCompression",
        "LossyImageCompressionRatio",
        "BurnedInAnnotation",
    ),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *("DimensionIndexSequence", "DimensionOrganizationSequence", "DimensionOrganizationType"),
)
"""What is read of every file that may be a slice. Siemens' and others' private elements are asked for apart."""


@dataclass(frozen=True, kw_only=True)
class PixelData:
    """Where a file keeps its pixels."""

    name: str
    """PixelData, FloatPixelData or DoubleFloatPixelData."""
    vr: str
    offset: int
    """Of the first byte of the value; in a deflated file, among the inflated bytes of the data set."""
    length: int | None
    """None where it is undefined, as encapsulated pixels have it."""
    frame_offsets: bytes = b""
    frame_lengths: bytes = b""
    """The extended offset table, as it lies there; empty where there is none."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """The wanted elements of one file, and what is needed to find its pixels."""

    path: Path
    elements: Dataset
    """The wanted elements that are there; `elements.file_meta` holds group 2, empty where there is none. SOPClassUID
    and SOPInstanceUID come from there where the data set has them empty (half-anonymised files)."""
    syntax: str
    """UID of the transfer syntax: as the file says, or, where it does not say, as its bytes can only be read."""
    mended: tuple[str, ...] = ()
    """What was not as it should be and was mended: sentences for Provenance.repairs, the same for alike files."""
    pixels: PixelData | None = None
    """None where there are none."""
    deflated_from: int = 0
    """Where the deflated data set begins; 0 where nothing is deflated."""
    file_size: int = 0


WINDOW = 1 << 16
"""Bytes read at once. The header of a plain slice is a few thousand, with private elements up to some hundred thousand."""

HEADER_LIMIT = 1 << 26
"""Bytes of one element that is looked into, and of what is inflated of a header; more is not believed."""

VALUE_LIMIT = 1 << 18
BULK_LIMIT = 1 << 23
"""Bytes of one wanted value that is converted, and of one that is kept as it is; more is not believed."""

ELEMENTS_LIMIT = 2_500_000
DEPTH_LIMIT = 32
ITEMS_LIMIT = 20_000
"""Elements of a header, sequences within each other and items of wanted sequences in a small file beyond which it is not
believed. Ten thousand frames of one vendor's enhanced objects have as many elements; real ones nest five deep."""


class _Damage(Exception):
    """What is wrong with the bytes, as the end of a sentence that begins 'a DICOM file'."""


class _Short(Exception):
    """The bytes at hand end before the element does."""


def read_header(
    path: Path, tags: Sequence[str | int] = TAGS, *, last: int = 0xFFFFFFFF, ceiling: int = HEADER_LIMIT
) -> Header | str:
    """The wanted elements, every value converted; or why there are none to be had (not DICOM, DICOMDIR, damaged ...).

    Tags are keywords or numbers (0x00291020). Nothing behind the tag `last` is looked at. Four times `ceiling` is the most
    memory it takes, and twice as much is the most that is inflated. Lets no exception out.
    """
    try:
        if not path.is_file():  # a pipe would never answer
            return _why_no_file(path)
        with quiet(), path.open("rb") as stream:
            return _read(path, stream, _numbered(tuple(tags)), last, ceiling)
    except PermissionError:
        return f"{DAMAGED}: may not be read by this user"
    except _Damage as damage:
        return f"{DAMAGED}: a DICOM file {damage}"
    except Exception as error:  # pydicom lets any exception out of damaged values (struct, Key, Type, Recursion ...)
        return f"{DAMAGED}: a DICOM file whose header cannot be read ({type(error).__name__})"


def _why_no_file(path: Path) -> str:
    if not path.is_symlink():
        return "no file"
    nowhere = "a link that leads nowhere"
    return f"{DAMAGED}: {nowhere}" if path.suffix.lower() in ("", *ENDINGS) else nowhere


ENDINGS = (".dcm", ".dicom", ".ima")
"""How DICOM files are named, if their names say it at all."""


def is_dicom(path: Path) -> bool:
    """Whether the file has the mark of DICOM behind its preamble, or plausibly begins as a data set without one."""
    try:
        if not path.is_file():  # a pipe would never answer
            return False
        with path.open("rb") as stream:
            beginning = stream.read(1024)
        return beginning[128:132] == b"DICM" or _begins_bare(beginning)
    except OSError:
        return False


def why_no_scan(header: Header) -> str:
    """Why an object is left alone (a report, contours, a localizer ...), or nothing where it is an image to be judged.

    A reason that begins with DAMAGED means, as in `read_header`, that it may have been a slice once. Images of every
    other kind, and slices that lack something, are no matter for here: they become refused cases.
    """
    elements = header.elements
    sop_class = _uid(text(elements, "SOPClassUID"))
    if reason := _why_no_image(sop_class):
        return reason
    if "Rows" not in elements and header.pixels is None and "Image Storage" not in sop_class.name:
        return _why_nothing(sop_class)
    if LOCALIZERS & {str(word).strip().upper() for word in values(elements, "ImageType")}:
        return "a localizer, drawn to plan the scan"
    placed = values(elements, "ImagePositionPatient") or "PerFrameFunctionalGroupsSequence" in elements
    if sop_class in SECONDARY_CAPTURES and not placed:
        return "a secondary capture (a screenshot, a report) that does not lie in the patient"
    if not placed and not text(elements, "SeriesInstanceUID"):  # anonymisers empty it: where it lies says more
        return f"{DAMAGED}: an image that does not say to which series it belongs"
    return ""


def text(elements: Dataset, tag: str) -> str:
    """What an element says, without blanks around it; empty where there is none."""
    return str(elements.get(tag) or "").strip()


def values(elements: Dataset, tag: str) -> list:
    """The values of an element, however many; none where it is missing or empty."""
    return _each(elements.get(tag))


def _each(value: Any) -> list:
    if value is None or value == "":
        return []
    return list(value) if not isinstance(value, str) and hasattr(value, "__iter__") else [value]


# what is no scan

LOCALIZERS = {"LOCALIZER", "SCOUT", "SURVIEW", "TOPOGRAM", "SCANOSCOPE"}
"""Words in ImageType; the first is the standard's, the others are vendors'."""

STORAGE = "1.2.840.10008.5.1.4.1.1."
SECONDARY_CAPTURES = {STORAGE + kind for kind in ("7", "7.1", "7.2", "7.3", "7.4")}

NO_SCAN = {
    "4.2": "a spectrum, no image",
    "66": "raw data, no image",
    "66.1": "a registration, no image",
    "66.2": "fiducials, no image",
    "66.3": "a registration, no image",
    "66.4": "a segmentation, no scan",
    "66.5": "a surface, no scan",
    "66.6": "nerve tracts, no scan",
    "66.7": "a segmentation, no scan",
    "66.8": "a height map, no scan",
    "67": "a mapping of values, no image",
    "481.1": "a radiotherapy image, no scan",
    "481.2": "a radiotherapy dose, no scan",
    "481.3": "radiotherapy contours, no image",
    "481.5": "a radiotherapy plan, no image",
    "481.8": "a radiotherapy plan, no image",
    "77.1.6": "a whole slide, no volume",
    "88.59": "a key object selection, no image",
}
NO_SCAN_FAMILIES = {
    "9.": "a waveform, no image",
    "11.": "a presentation state, no image",
    "68.": "a surface, no scan",
    "88.": "a structured report, no image",
    "104.": "a document, no image",
}
"""SOP classes, or how they begin, behind the root that all storage classes share."""


def _uid(said: str) -> UID:
    return UID(said, validation_mode=pydicom.config.IGNORE)


def _why_no_image(sop_class: UID) -> str:
    if not sop_class.startswith(STORAGE):
        return ""
    kind = sop_class.removeprefix(STORAGE)
    families = (reason for family, reason in NO_SCAN_FAMILIES.items() if kind.startswith(family))
    return NO_SCAN.get(kind) or next(families, "")


def _why_nothing(sop_class: UID) -> str:
    """An object without rows and pixels, and of no class that images have."""
    if not sop_class:
        return f"{DAMAGED}: a DICOM file that does not say what it is"
    if not sop_class.is_valid:
        return f"{DAMAGED}: a DICOM file whose SOPClassUID is none"
    return f"no image ({sop_class.name})"


# from the first byte to the header


class _Layout(NamedTuple):
    """How elements are written down."""

    implicit: bool
    big: bool


def _read(path: Path, stream: BinaryIO, wanted: frozenset[int], last: int, ceiling: int) -> Header | str:
    size = os.fstat(stream.fileno()).st_size
    beginning = stream.read(WINDOW)
    start = 132 if beginning[128:132] == b"DICM" else 0
    if not start and not _begins_bare(beginning):
        return _why_not_dicom(path, beginning)
    meta, at = _meta(beginning, start)
    declared = str(meta.get("TransferSyntaxUID") or "").strip("\0 ")
    deflated = declared == DeflatedExplicitVRLittleEndian
    source = (_Inflated if deflated else _Source)(stream, beginning[at:], at, size, ceiling)
    layout, syntax, mended = _layout(source.data[:8], declared)
    walk = _Walk(source, layout, wanted | {DIRECTORY_RECORDS})
    if meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
        return _directory(path, walk)
    try:
        found, pixels = walk.top_level(last)
    except _Damage:
        if reason := _why_no_image(_uid(str(meta.get("MediaStorageSOPClassUID") or ""))):
            return f"{reason} (and damaged)"
        raise
    if DIRECTORY_RECORDS in found:
        return _directory_of(path, found)
    elements = Dataset(found)
    elements.file_meta = meta
    filled = _fill(elements)
    if not start and "Rows" not in elements and not text(elements, "SOPClassUID"):
        return _why_not_dicom(path, beginning)  # a beginning by chance
    return Header(
        path=path,
        elements=elements,
        syntax=syntax,
        mended=(*mended, *filled, *walk.mended),
        pixels=pixels,
        deflated_from=at if deflated else 0,
        file_size=size,
    )


def _fill(elements: Dataset) -> list[str]:
    """Anonymisers empty the UIDs of the data set and forget that group 2 holds them too."""
    mended = []
    for tag in ("SOPClassUID", "SOPInstanceUID"):
        in_meta = str(elements.file_meta.get(f"MediaStorage{tag}") or "").strip()
        if in_meta and not text(elements, tag):
            elements.add_new(tag_for_keyword(tag), "UI", _uid(in_meta))
            mended.append(f"{tag} was empty and was taken from the file's meta information.")
    return mended


def _begins_bare(beginning: bytes) -> bool:
    """Whether a file without preamble begins with two known elements of group 2 or 8, one behind the other."""
    for layout in (_Layout(False, False), _Layout(True, False), _Layout(False, True)):
        if not layout.implicit and beginning[4:6] not in VR_NAMES:
            continue
        walk = _Walk(_Source(None, beginning, 0, len(beginning)), layout, frozenset())
        try:
            first, _, length, value = walk.element(beginning, 0)
            second = walk.element(beginning, value + (length or 0))[0]
        except (_Short, _Damage):
            continue
        if first >> 16 in (2, 8) and first < second and _vr(first) != "UN" != _vr(second):
            return True
    return False


def _why_not_dicom(path: Path, beginning: bytes) -> str:
    if beginning[:2] == b"\x1f\x8b":
        try:
            inside = zlib.decompressobj(wbits=31).decompress(beginning, 1024)
        except zlib.error:
            inside = b""
        if inside[128:132] == b"DICM" or _begins_bare(inside):
            return f"{DAMAGED}: a DICOM file packed with gzip; unpack it"
    suffix = path.suffix.lower()
    return f"{DAMAGED}: named {suffix}, but not DICOM" if suffix in ENDINGS else "not DICOM"


def _meta(beginning: bytes, start: int) -> tuple[FileMetaDataset, int]:
    """What is needed of group 2, and where the data set begins. Its stated length is not believed."""
    explicit = beginning[start + 4 : start + 6] in SHORT | LONG
    walk = _Walk(_Source(None, beginning, 0, len(beginning)), _Layout(not explicit, False), META)
    found: dict[BaseTag, DataElement] = {}
    at = start
    try:
        while beginning[at : at + 2] == b"\x02\x00":
            tag, vr, length, value = walk.element(beginning, at)
            at = value + (length or 0)
            if tag in META:
                walk.take(beginning, tag, vr, length, value, found)
    except _Short:
        raise _Damage("that is cut short inside its meta information") from None
    if at > len(beginning):
        raise _Damage("that is cut short inside its meta information")
    return FileMetaDataset(found), at


def _layout(first: bytes, declared: str) -> tuple[_Layout, str, list[str]]:
    """As the transfer syntax says, unless it says nothing or the first element can only be read otherwise."""
    said = _Layout(declared == ImplicitVRLittleEndian, declared == ExplicitVRBigEndian)
    if len(first) < 8:
        return said, declared or ImplicitVRLittleEndian, []
    big = not first[0] and 0 < first[1] < 0x20  # groups 0002 to 0018 open a data set, 0200 to 1800 do not exist
    big = big or (said.big and first[1] != 0)
    seen = _Layout(first[4:6] not in SHORT | LONG, big)
    if declared and seen == said:
        return said, declared, []
    native = {said: str(uid) for uid, said in NATIVE.items()}
    if seen not in native:
        raise _Damage("of a layout that no transfer syntax has")
    name = UID(native[seen]).name
    if not declared:
        return seen, native[seen], [f"The transfer syntax is not stated and was told from the bytes: {name}."]
    syntax = native[seen] if declared in NATIVE else declared
    return seen, syntax, [f"The elements are not written as the transfer syntax says, but as {name}, and were read so."]


NATIVE = {
    ImplicitVRLittleEndian: _Layout(True, False),
    ExplicitVRLittleEndian: _Layout(False, False),
    ExplicitVRBigEndian: _Layout(False, True),
}

DIRECTORY_RECORDS = 0x00041220
REFERENCED_FILE = 0x00041500


def _directory(path: Path, walk: "_Walk") -> str:
    try:
        return _directory_of(path, walk.top_level()[0])
    except Exception:  # a table of contents is no scan, however damaged
        return "a DICOMDIR, the table of contents of a disc (it cannot be read)"


def _directory_of(path: Path, found: dict[BaseTag, DataElement]) -> str:
    records = found[BaseTag(DIRECTORY_RECORDS)].value if DIRECTORY_RECORDS in found else []
    names = [[str(part) for part in values(record, "ReferencedFileID")] for record in records]
    names = [parts for parts in names if parts]
    lost = sum(not _is_there(path.parent, parts) for parts in names)
    count = f"; {lost} of the {len(names)} files it names are not there" if lost else ""
    return f"a DICOMDIR, the table of contents of a disc{count}"


def _is_there(folder: Path, parts: list[str]) -> bool:
    """Whether a disc holds the file; discs are copied with small letters too."""
    if not all(re.fullmatch(r"[A-Za-z0-9_]{1,64}", part) for part in parts):  # what the standard lets them be made of
        return False
    return folder.joinpath(*parts).is_file() or folder.joinpath(*(part.lower() for part in parts)).is_file()


# bytes


class _Source:
    """A window on the bytes of a data set, moved forward only as far as the header needs."""

    def __init__(self, stream: BinaryIO | None, data: bytes, base: int, size: int, ceiling: int = HEADER_LIMIT) -> None:
        self.data, self.size, self.packed, self._ceiling = data, size, size, ceiling
        self.base = base
        """Where the window begins: in the file, or among the inflated bytes."""
        self._stream = stream

    def more(self, at: int) -> bool:
        """Let the window begin at `at` of what it was, and be wider; False where there is no more to be had."""
        left = len(self.data) - at
        wider = max(WINDOW, 8 * left)  # far, for what was begun is read again
        if wider > 4 * self._ceiling:
            raise _Damage("with an element that is larger than can be believed")
        self._load(at, wider)
        return len(self.data) > max(left, 0) or (left <= 0 and not self.data)

    def _load(self, at: int, wider: int) -> None:
        self.base += at
        if self.base > self.size:
            raise _Damage("that is cut short: an element reaches beyond its end")
        assert self._stream is not None
        self._stream.seek(self.base)
        self.data = self._stream.read(wider)

    def refuse_beyond(self, end: int) -> None:
        """Before memory is spent on an element that cannot be whole; `end` counts from the window's beginning."""
        if self.base + end > self.size:
            raise _Damage("that is cut short: an element reaches beyond its end")


class _Inflated(_Source):
    """The same of a deflated data set. No more of it is unpacked than the header needs, and no more than a ceiling."""

    def __init__(self, stream: BinaryIO, data: bytes, base: int, size: int, ceiling: int) -> None:
        super().__init__(stream, b"", 0, 2 * ceiling, ceiling)
        self._inflater = zlib.decompressobj(wbits=-15)
        self._packed, self._file, self.packed = data, stream, size
        self._load(0, WINDOW)

    def _load(self, at: int, wider: int) -> None:
        if self.base + at + wider > 2 * self._ceiling:
            raise _Damage("with a header that inflates to more than can be believed")
        while len(self.data) < at + wider and not self._inflater.eof:
            packed = self._packed or self._file.read(WINDOW)
            try:
                more = self._inflater.decompress(packed, at + wider - len(self.data))
            except zlib.error:
                raise _Damage("that says it is deflated, and cannot be inflated") from None
            self._packed = self._inflater.unconsumed_tail
            if not more and not packed:
                break
            self.data += more
        if at > len(self.data):
            raise _Damage("that is cut short: an element reaches beyond its end")
        self.data, self.base = self.data[at:], self.base + at


# elements

SHORT = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
LONG = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
"""Value representations with a length of 2 and of 4 bytes (PS3.5 7.1.2)."""

VR_NAMES = {vr: vr.decode() for vr in SHORT | LONG}
KEPT_AS_THEY_ARE = {"OB", "OD", "OF", "OL", "OV", "OW", "UN"}

ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
UNDEFINED = 0xFFFFFFFF

PIXELS = {0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData", 0x7FE00010: "PixelData"}
FRAME_OFFSETS, FRAME_LENGTHS = 0x7FE00001, 0x7FE00002
CHARACTER_SET, PIXEL_REPRESENTATION = 0x00080005, 0x00280103
META = frozenset({0x00020002, 0x00020003, 0x00020010})

FUNCTIONAL_GROUPS = {0x52009229, 0x52009230}
NOT_OF_FRAMES = {0x00081140, 0x00082112, 0x00089124, 0x00089215}
"""Sequences in the functional groups that are long and say nothing of places or values: references, derivations."""

OF_NO_WEIGHT = {
    tag_for_keyword(keyword)
    for keyword in (
        *("Manufacturer", "ManufacturerModelName", "SeriesDescription", "ImageComments", "InstanceNumber", "FlipAngle"),
        *("SliceThickness", "SpacingBetweenSlices", "GantryDetectorTilt", "PatientPosition", "ConvolutionKernel"),
        *("NumberOfTemporalPositions", "LossyImageCompressionRatio", "RepetitionTime"),
    )
}
"""What is left out, and said, where its value cannot be read; every other unreadable value is damage."""


class _Walk:
    """One pass over the elements of a data set; what is not wanted is stepped over."""

    def __init__(self, source: _Source, layout: _Layout, wanted: frozenset[int]) -> None:
        self.mended: list[str] = []
        self._source, self._wanted = source, wanted
        self._left = ELEMENTS_LIMIT
        self._items_left = 0
        self._character_set: tuple[str, ...] = ("iso8859",)
        self._ambiguous = "US"
        self._write_as(layout)

    def top_level(self, until: int = 0xFFFFFFFF) -> tuple[dict[BaseTag, DataElement], PixelData | None]:
        """The wanted elements up to a tag, and where the pixels are, which are the end of every header."""
        found: dict[BaseTag, DataElement] = {}
        source, at, last = self._source, 0, -1
        while True:
            self._items_left = ITEMS_LIMIT + source.packed // 250  # a real frame has a dozen, and some kilobytes
            try:
                data = source.data
                tag, vr, length, value = self.element(data, at)
                if tag <= last:
                    raise _Damage("whose elements are out of order")
                if tag > until:
                    return found, None
                if tag in PIXELS:
                    return found, self._pixels(found, tag, vr, length, value)
                at = self.take(data, tag, vr, length, value, found)
                last = tag
            except _Short:
                if not source.more(at):
                    raise _Damage("that is cut short inside its header") from None
                if not source.data:
                    return found, None
                at = 0

    def element(self, data: bytes, at: int) -> tuple[int, str, int | None, int]:
        """Tag, VR (empty where it is implicit), length (None where undefined), and where the value begins."""
        self._left -= 1
        if self._left < 0:
            raise _Damage("of more elements than can be believed")
        if at + 8 > len(data):
            raise _Short
        group, number, vr, length = self._unpack(data, at)
        value = at + 8
        if self._layout.implicit or group == 0xFFFE:
            vr, (length,) = b"", self._unpack_long(data, at + 4)
        elif vr in LONG:
            if at + 12 > len(data):
                raise _Short
            (length,), value = self._unpack_long(data, at + 8), at + 12
        elif vr not in SHORT:
            length, value = self._odd(data, at, length)
        return group << 16 | number, VR_NAMES.get(vr, ""), None if length == UNDEFINED else length, value

    def take(
        self, data: bytes, tag: int, vr: str, length: int | None, value: int, found: dict[BaseTag, DataElement]
    ) -> int:
        """Keep the element if it is wanted. Where the next begins."""
        is_wanted = tag in self._wanted or tag in (FRAME_OFFSETS, FRAME_LENGTHS)
        return self._take(data, tag, vr, length, value, found if is_wanted else None, self._kept_within(tag), 0)

    def _take(
        self,
        data: bytes,
        tag: int,
        vr: str,
        length: int | None,
        value: int,
        found: dict[BaseTag, DataElement] | None,
        kept: Callable[[int], bool],
        depth: int,
    ) -> int:
        if length is None or (found is not None and (vr == "SQ" or (vr in ("", "UN") and _vr(tag) == "SQ"))):
            is_kept = found is not None and vr in ("", "UN", "SQ")
            items, end = self._written_as(vr, data, value, length, kept if is_kept else None, depth + 1)
            if found is not None and is_kept:
                element = DataElement(tag, "SQ", Items(items), already_converted=True)
                found[element.tag] = element
            return end
        end = value + length
        if found is None:
            return end
        if length > (BULK_LIMIT if (vr or _vr(tag)) in KEPT_AS_THEY_ARE else VALUE_LIMIT):
            raise _Damage(f"with {length} bytes in {_name(tag)}, more than can be believed")
        self._source.refuse_beyond(end)
        if end > len(data):
            raise _Short
        self._keep(tag, vr, data[value:end], found)
        return end

    def _keep(self, tag: int, vr: str, value: bytes, found: dict[BaseTag, DataElement]) -> None:
        vr = vr if vr and vr != "UN" else AMBIGUOUS.get(_vr(tag), _vr(tag)) or self._ambiguous
        convert = _converted if len(value) <= 256 else _converted.__wrapped__
        try:
            element = convert(tag, vr, value, not self._layout.big, self._character_set)
            if vr in ("DS", "IS") and any(isinstance(number, str) for number in _each(element.value) if number):
                raise ValueError  # pydicom leaves words as they are
            if tag == PIXEL_REPRESENTATION:
                self._ambiguous = "SS" if element.value == 1 else "US"
            elif tag == CHARACTER_SET:
                self._character_set = _encodings(element.value)
        except Exception as error:  # pydicom lets out ValueError, TypeError, KeyError, struct.error, Overflow ...
            if tag not in OF_NO_WEIGHT:
                raise _Damage(f"whose {_name(tag)} cannot be read") from error
            self.mended.append(f"{_name(tag)} could not be read and was left out; nothing depends on it.")
            return
        found[element.tag] = element

    def _written_as(
        self, vr: str, data: bytes, at: int, length: int | None, kept: Callable[[int], bool] | None, depth: int
    ) -> tuple[list[Dataset], int]:
        """The items of a sequence; of one whose VR was unknown to the writer in implicit little endian (PS3.5 6.2.2)."""
        layout = self._layout
        try:
            if vr == "UN":
                self._write_as(_Layout(True, False))
            return self._items(data, at, length, kept, depth)
        finally:
            self._write_as(layout)

    def _items(
        self, data: bytes, at: int, length: int | None, kept: Callable[[int], bool] | None, depth: int
    ) -> tuple[list[Dataset], int]:
        if depth > DEPTH_LIMIT:
            raise _Damage("of sequences within sequences deeper than can be believed")
        items: list[Dataset] = []
        end = None if length is None else at + length
        self._source.refuse_beyond(end or at)
        while end is None or at < end:
            if kept is None:
                at = self._past_items(data, at, len(data) if end is None else min(end, len(data)))
            tag, _, of_item, at = self.element(data, at)
            if tag == SEQUENCE_END and (end is None or at == end):
                return items, at
            if tag != ITEM:
                raise _Damage("with a sequence that holds something else than items")
            if of_item is not None and end is not None and at + of_item > end:
                raise _Damage("with an item that is longer than its sequence")
            if of_item is not None and kept is None:
                self._source.refuse_beyond(at + of_item)
                at += of_item
                continue
            found, at = self._item(data, at, of_item, kept, depth)
            if kept is not None:
                items.append(self._kept_item(found))
        return items, at

    def _past_items(self, data: bytes, at: int, end: int) -> int:
        """Over the items that say how long they are and that nobody wants, of which there may be many."""
        mark = b"\xff\xfe\xe0\x00" if self._layout.big else b"\xfe\xff\x00\xe0"
        while at + 8 <= end and self._left > 0 and data[at : at + 4] == mark:
            (length,) = self._unpack_long(data, at + 4)
            if at + 8 + length > end:
                break
            at += 8 + length
            self._left -= 1
        return at

    def _item(
        self, data: bytes, at: int, length: int | None, kept: Callable[[int], bool] | None, depth: int
    ) -> tuple[dict[BaseTag, DataElement], int]:
        found: dict[BaseTag, DataElement] = {}
        end = None if length is None else at + length
        self._source.refuse_beyond(end or at)
        while end is None or at < end:
            tag, vr, of_element, value = self.element(data, at)
            if tag == ITEM_END and end is None:
                return found, value
            if tag >> 16 == 0xFFFE:
                raise _Damage("with an item that ends where it should not")
            is_kept = kept is not None and kept(tag)
            at = self._take(data, tag, vr, of_element, value, found if is_kept else None, kept or _everything, depth)
        if end is not None and at > end:
            raise _Damage("with an element that is longer than its item")
        return found, at

    def _kept_item(self, found: dict[BaseTag, DataElement]) -> Dataset:
        """Each costs a kilobyte of memory, whatever it holds."""
        self._items_left -= 1
        if self._items_left < 0:
            raise _Damage("of more items than can be believed")
        return Dataset(found)

    def _kept_within(self, tag: int) -> Callable[[int], bool]:
        """What is kept in the items of a wanted sequence."""
        if tag in FUNCTIONAL_GROUPS:
            return lambda tag: tag in self._wanted or not (tag >> 16 & 1 or tag in NOT_OF_FRAMES)
        return (lambda tag: tag == REFERENCED_FILE) if tag == DIRECTORY_RECORDS else _everything

    def _pixels(
        self, found: dict[BaseTag, DataElement], tag: int, vr: str, length: int | None, value: int
    ) -> PixelData:
        offsets, lengths = (found.pop(BaseTag(table), None) for table in (FRAME_OFFSETS, FRAME_LENGTHS))
        return PixelData(
            name=PIXELS[tag],
            vr=vr,
            offset=self._source.base + value,
            length=length,
            frame_offsets=bytes(offsets.value or b"") if offsets is not None else b"",
            frame_lengths=bytes(lengths.value or b"") if lengths is not None else b"",
        )

    def _odd(self, data: bytes, at: int, short: int) -> tuple[int, int]:
        """Length and place of the value where the two letters are no VR: the reading that leads to a sound element."""
        if at + 12 > len(data):
            raise _Short
        tag = self._tag(data, at)
        for length, value in (
            (short, at + 8),
            (self._unpack_long(data, at + 8)[0], at + 12),
            (self._unpack_long(data, at + 4)[0], at + 8),
        ):
            end = value + length
            if end + 8 <= len(data) and self._tag(data, end) > tag and data[end + 4 : end + 6] in VR_NAMES:
                return length, value
        raise _Damage(f"with an element of an unknown kind ({_name(tag)})")

    def _tag(self, data: bytes, at: int) -> int:
        group, number, _, _ = self._unpack(data, at)
        return group << 16 | number

    def _write_as(self, layout: _Layout) -> None:
        self._layout = layout
        order = ">" if layout.big else "<"
        self._unpack = struct.Struct(f"{order}HH2sH").unpack_from
        self._unpack_long = struct.Struct(f"{order}L").unpack_from


AMBIGUOUS = {"US or SS": "", "OB or OW": "OW", "US or OW": "OW", "US or SS or OW": "OW"}
"""VRs that depend on the pixels; empty: on their sign."""


def _everything(tag: int) -> bool:
    return tag & 0xFFFF != 0  # but lengths of groups, which nobody needs


@lru_cache(maxsize=4096)
def _converted(tag: int, vr: str, value: bytes, is_little: bool, character_set: tuple[str, ...]) -> DataElement:
    """The slices of a series share most of their elements: each is converted once."""
    raw = RawDataElement(BaseTag(tag), vr, len(value), value, 0, False, is_little)
    element = convert_raw_data_element(raw, encoding=list(character_set))
    assert vr == element.VR  # told beforehand, so that pydicom has nothing to guess
    return element


def _encodings(value: object) -> tuple[str, ...]:
    names = [str(name) for name in value] if isinstance(value, MultiValue) else str(value or "")
    return tuple(convert_encodings(names))


@lru_cache(maxsize=4096)
def _vr(tag: int) -> str:
    try:
        return dictionary_VR(tag)
    except KeyError:
        is_creator = tag >> 16 & 1 and 0x10 <= tag & 0xFFFF <= 0xFF  # names who a block of private elements belongs to
        return "LO" if is_creator else "UN"


def _name(tag: int) -> str:
    return keyword_for_tag(tag) or f"element ({tag >> 16:04X},{tag & 0xFFFF:04X})"


@lru_cache(maxsize=64)
def _numbered(tags: tuple[str | int, ...]) -> frozenset[int]:
    """Keywords and numbers as numbers, and what is needed to understand any other element."""
    numbers = {tag if isinstance(tag, int) else tag_for_keyword(tag) for tag in tags}
    unknown = [tag for tag in tags if isinstance(tag, str) and tag_for_keyword(tag) is None]
    if unknown:
        raise KeyError(unknown[0])
    return frozenset(number for number in numbers if number is not None) | {CHARACTER_SET, PIXEL_REPRESENTATION}


@final
class _Quiet:
    """Python has one list of what to warn of for all threads: the first to come changes it, the last to leave puts it back."""

    lock = threading.Lock()
    inside = 0
    before = warnings.catch_warnings()


@contextmanager
def quiet() -> Iterator[None]:
    """pydicom warns of every odd value in a header; what matters of them is checked by who reads them, and refused."""
    with _Quiet.lock:
        if not _Quiet.inside:
            _Quiet.before = warnings.catch_warnings()
            _Quiet.before.__enter__()
            warnings.simplefilter("ignore")
        _Quiet.inside += 1
    try:
        yield
    finally:
        with _Quiet.lock:
            _Quiet.inside -= 1
            if not _Quiet.inside:
                _Quiet.before.__exit__(None, None, None)
