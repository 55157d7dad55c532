"""contours.dcm: a DICOM RT Structure Set, the edges of every label on every source slice, for planning systems.

Contours run along the edges of voxels: whoever fills them by the centres of pixels finds exactly the voxels again. A hole
is cut in from the outside (the keyhole of PS3.3 C.8.8.6.3), so that readers that unite contours and readers that
take even from odd agree.
"""

import datetime
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.uid import ImplicitVRLittleEndian

from preprocessing.codes import Code
from preprocessing.plan import Label
from preprocessing.regions import Place, places
from preprocessing.volume import LPS_TO_RAS, Geometry

from ..report import Result
from . import _dicom

FILE_NAME = "contours.dcm"

SERIES_NUMBER = 2000
"""The series follows its source's number by so much."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Nothing to decide of the contours themselves."""

    revision: _dicom.Revision = field(default_factory=_dicom.Revision)
    """Where this is not the first answer for its scan."""


Corner = tuple[int, int]
"""x, y of a corner of pixels: pixel (x, y) lies between the corners (x, y) and (x + 1, y + 1)."""


def write(result: Result, folder: Path, config: Config) -> list[Path]:
    """One file."""
    _dicom.refuse_odd_planes(result.scan.geometry)
    origin = _dicom.origin_of(result.scan)
    now = datetime.datetime.now()
    path = folder / FILE_NAME
    # implicit: in explicit files an element of text holds 64 kB at most, and a contour may be longer
    data = _structure_set(result, origin, now, config.revision.number)
    _dicom.write_object(data, path, now, origin, result, ImplicitVRLittleEndian, revision=config.revision)
    return [path]


def _structure_set(result: Result, origin: _dicom.Origin, now: datetime.datetime, revision: int) -> Dataset:
    labels = _contoured(result)
    print_ = _dicom.fingerprint(result, origin, revision)
    data = Dataset()
    data.SOPClassUID = _dicom.STRUCTURE_SET
    data.SOPInstanceUID = _dicom.uid("structure set", print_)
    data.SeriesInstanceUID = _dicom.uid("structure set series", print_)
    data.Modality = "RTSTRUCT"
    data.SeriesNumber, data.InstanceNumber = SERIES_NUMBER + origin.series_number, 1
    data.SeriesDescription = _dicom.one_line(f"{result.package_name} contours")
    data.OperatorsName = None
    data.ManufacturerModelName = _dicom.MANUFACTURER
    data.DeviceSerialNumber = _dicom.one_line(result.package_id)
    data.StructureSetLabel = _dicom.one_line(result.package_name, 16)
    data.StructureSetName = _dicom.one_line(result.package_name)
    data.StructureSetDate, data.StructureSetTime = _dicom.date_and_time(now)
    data.ApprovalStatus = "UNAPPROVED"
    data.ReferencedFrameOfReferenceSequence = [_frame_of_reference(origin)]
    data.StructureSetROISequence = [_region(label, origin) for label, _ in labels]
    data.ROIContourSequence = [_drawn(label, contours, origin) for label, contours in labels]
    data.RTROIObservationsSequence = [_observation(label) for label, _ in labels]
    return data


def _contoured(result: Result) -> list[tuple[Label, list["Contour"]]]:
    """Each label that was found, with its contours. Where nothing was found, each that was sought, without any."""
    found = [
        (label, list(_contours(place, result.scan.geometry)))
        for label, place in places(result.labels.voxels[0], result.label_table)
        if place
    ]
    return found or [(label, []) for label in result.label_table]


@dataclass(frozen=True, kw_only=True, eq=False)
class Contour:
    """A closed line on slice k."""

    k: int
    points: Float[np.ndarray, "point 3"]
    """LPS millimetres."""


def _contours(place: Place, geometry: Geometry) -> Iterator[Contour]:
    lps = LPS_TO_RAS @ geometry.affine
    for k, plane in enumerate(np.moveaxis(place.mask, 2, 0), start=place.start[2]):
        for corners in outlines(plane.T):
            # a corner lies half a voxel before the voxel of its number
            ij = np.array(corners, dtype=np.float64) - 0.5 + place.start[:2]
            ijk = np.column_stack([ij, np.full(len(ij), k)])
            yield Contour(k=k, points=ijk @ lps[:3, :3].T + lps[:3, 3])


# from pixels to outlines


def outlines(mask: Bool[np.ndarray, "row column"]) -> list[list[Corner]]:
    """Closed lines along pixel edges, corners only: one for each part (pixels that share an edge), holes cut in."""
    outer: list[list[Corner]] = []
    holes: list[list[Corner]] = []
    for loop in _loops(mask):
        # the pixel below and right of the topmost corner (and of these the leftmost) lies inside the loop
        x, y = min(loop, key=lambda corner: (corner[1], corner[0]))
        (outer if mask[y, x] else holes).append(loop)
    for hole in sorted(holes, key=min):  # from the left: what lies left of a hole has become part of an outline
        _cut_in(hole, outer)
    return outer


def _loops(mask: Bool[np.ndarray, "row column"]) -> list[list[Corner]]:
    """Every boundary between set and unset pixels as its corners in order.

    On each line of the lattice corners pair up into edges. Where two pixels touch at a corner alone, that corner counts
    twice, once for each pixel: so parts that share no edge stay apart.
    """
    padded = np.pad(mask, 1)
    corners = []  # x, y, and to which side the horizontal and the vertical edge leave: -1 or 1
    a, b, c, d = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    one = a.astype(np.int8) + b + c + d
    for pixel, across, dx, dy in ((a, d, -1, -1), (b, c, 1, -1), (c, b, -1, 1), (d, a, 1, 1)):
        alone = pixel & ((one == 1) | ((one == 2) & across))  # its own corner sticks out
        missing = ~pixel & (one == 3)  # it alone is unset: the corner goes in
        for y, x in np.argwhere(alone | missing):
            corners.append((int(x), int(y), dx, dy))
    in_rows = _paired(sorted(range(len(corners)), key=lambda n: (corners[n][1], corners[n][0], corners[n][2])))
    in_columns = _paired(sorted(range(len(corners)), key=lambda n: (corners[n][0], corners[n][1], corners[n][3])))
    loops: list[list[Corner]] = []
    met: set[int] = set()
    for first in range(len(corners)):
        loop: list[Corner] = []
        at = first
        while at not in met:
            met.update((at, in_rows[at]))
            loop += [corners[at][:2], corners[in_rows[at]][:2]]
            at = in_columns[in_rows[at]]
        if loop:
            loops.append(loop)
    return loops


def _paired(order: list[int]) -> dict[int, int]:
    """First with second, third with fourth ..., both ways."""
    pairs = list(zip(order[::2], order[1::2], strict=True))
    return dict(pairs) | {b: a for a, b in pairs}


def _cut_in(hole: list[Corner], outer: list[list[Corner]]) -> None:
    """A way of no width, to the left, from the hole to the next edge; the hole becomes part of that outline."""
    x, y = min(hole)
    turned = hole[hole.index((x, y)) :] + hole[: hole.index((x, y))]
    nearest, where = -1, (0, 0)
    for number, loop in enumerate(outer):
        for at, ((ax, ay), (bx, by)) in enumerate(zip(loop, loop[1:] + loop[:1], strict=True)):
            if ax == bx and nearest < ax < x and min(ay, by) <= y < max(ay, by):
                nearest, where = ax, (number, at)
    number, at = where
    loop = outer[number]
    way = [(nearest, y), *turned, (x, y), (nearest, y)]
    joined = [*loop[: at + 1], *way, *loop[at + 1 :]]
    outer[number] = [corner for n, corner in enumerate(joined) if corner != joined[n - 1]]


# from outlines to the object


def _frame_of_reference(origin: _dicom.Origin) -> Dataset:
    series = Dataset()
    series.SeriesInstanceUID = origin.series
    series.ContourImageSequence = [_dicom.reference(instance) for instance in origin.instances]
    study = Dataset()
    study.ReferencedSOPClassUID = "1.2.840.10008.3.1.2.3.1"  # retired, yet what PS3.3 C.8.8.5 names and planners write
    study.ReferencedSOPInstanceUID = origin.study
    study.RTReferencedSeriesSequence = [series]
    frame = Dataset()
    frame.FrameOfReferenceUID = origin.frame_of_reference
    frame.RTReferencedStudySequence = [study]
    return frame


def _region(label: Label, origin: _dicom.Origin) -> Dataset:
    item = Dataset()
    item.ROINumber = label.value
    item.ReferencedFrameOfReferenceUID = origin.frame_of_reference
    item.ROIName = _dicom.one_line(label.name)
    item.ROIGenerationAlgorithm = "AUTOMATIC"
    return item


def _drawn(label: Label, contours: list[Contour], origin: _dicom.Origin) -> Dataset:
    item = Dataset()
    item.ReferencedROINumber = label.value
    item.ROIDisplayColor = list(label.colour)
    if contours:
        item.ContourSequence = [_contour(n, contour, origin) for n, contour in enumerate(contours, start=1)]
    return item


def _contour(number: int, contour: Contour, origin: _dicom.Origin) -> Dataset:
    item = Dataset()
    if origin.frames:
        frame = origin.frames[contour.k]
        source = _dicom.reference(frame.instance)
        if frame.number is not None:
            source.ReferencedFrameNumber = frame.number
        item.ContourImageSequence = [source]
    item.ContourNumber = number
    item.ContourGeometricType = "CLOSED_PLANAR"
    item.NumberOfContourPoints = len(contour.points)
    spelt = "\\".join([f"{x:.5f}" for x in contour.points.ravel().tolist()])
    # converted already: pydicom would look at each of a million numbers with a regular expression
    item.add(DataElement(0x30060050, "DS", spelt, already_converted=True))  # ContourData
    return item


def _observation(label: Label) -> Dataset:
    kind = label.meaning.type
    item = Dataset()
    item.ObservationNumber = item.ReferencedROINumber = label.value
    item.ROIObservationLabel = _dicom.one_line(label.name, 16)
    item.RTROIIdentificationCodeSequence = [_code(kind)]
    item.RTROIInterpretedType, item.ROIInterpreter = None, None
    return item


def _code(code: Code) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code.value, code.scheme, code.meaning
    return item
