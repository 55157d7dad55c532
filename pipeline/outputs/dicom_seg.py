"""labels.dcm: a DICOM Segmentation on the planes of the source series, for archives and viewers of a hospital."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pydicom
from jaxtyping import Integer, UInt8
from pydicom.dataset import Dataset

from preprocessing.plan import Label
from preprocessing.regions import carrying, names_in_map, values_of

from ..errors import UsageError
from ..report import Result, hilum_version
from . import _dicom

if TYPE_CHECKING:
    from highdicom.seg import Segmentation

FILE_NAMES = {"BINARY": "labels.dcm", "LABELMAP": "labels-labelmap.dcm"}

LABELMAP = "1.2.840.10008.5.1.4.1.1.66.7"
"""The class of label maps."""

SERIES_NUMBER = 1000
"""The series follows its source's number by so much: 7 becomes 1007, far from a scanner's own numbers."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """How labels are encoded."""

    kind: Literal["binary", "labelmap", "both"] = "binary"
    """binary: one bit per label and voxel, which every archive takes; labelmap: one number per voxel, smaller with
    many labels, known to new archives only, and of a region only what no other covers; both: one file of each."""
    revision: _dicom.Revision = field(default_factory=_dicom.Revision)
    """Where this is not the first answer for its scan."""


def write(result: Result, folder: Path, config: Config) -> list[Path]:
    """One file, or two of one series."""
    _dicom.refuse_odd_planes(result.scan.geometry)
    origin = _dicom.origin_of(result.scan)
    kinds = {"binary": ["BINARY"], "labelmap": ["LABELMAP"], "both": ["BINARY", "LABELMAP"]}[config.kind]
    now = datetime.datetime.now()
    written = []
    for number, kind in enumerate(kinds, start=1):
        path = folder / FILE_NAMES["BINARY" if len(kinds) == 1 else kind]
        with _dicom.quiet():
            segmentation = _segmentation(result, origin, kind, number, now, config.revision.number)
        _dicom.write_object(segmentation, path, now, origin, result, revision=config.revision)
        written.append(path)
    return written


def _in_order(result: Result) -> tuple[list[Label], list[Label]]:
    """Labels by their values: those that were found, and all that were sought."""
    sought = sorted(result.label_table, key=lambda label: label.value)
    return [label for label in sought if result.volumes_ml[label.name] > 0], sought


def _numbered(result: Result, kind: str) -> dict[int, int]:
    """Label values and their segments."""
    found, sought = _in_order(result)
    return {label.value: label.value if kind == "LABELMAP" else n for n, label in enumerate(found or sought, 1)}


@dataclass(frozen=True, kw_only=True)
class Segments:
    """The segmentation that lies beside a report of the same result, for the report to point at."""

    instance: _dicom.Instance
    series: str
    numbers: dict[int, int]
    """Segment of each label value that has one."""


def beside(result: Result, origin: _dicom.Origin, folder: Path, revision: int) -> Segments | None:
    """The binary one, which every archive takes, before the label map; None where neither was written."""
    for path in (folder / name for name in FILE_NAMES.values()):
        if not path.is_file():
            continue
        header = pydicom.dcmread(path, specific_tags=["SOPClassUID", "SOPInstanceUID", "SegmentationType"])
        kind = str(header.SegmentationType)  # alone, either kind has the first name
        print_ = _dicom.fingerprint(result, origin, revision)
        if header.SOPInstanceUID != _dicom.uid("segmentation", print_, kind):
            raise UsageError(
                f"{path.name} holds another result than the one that is reported; one of the same scan, package and "
                "revision is needed. Give both outputs the same revision, and an empty folder."
            )
        instance = _dicom.Instance(sop_class=str(header.SOPClassUID), uid=str(header.SOPInstanceUID))
        series = _dicom.uid("segmentation series", print_)
        return Segments(instance=instance, series=series, numbers=_numbered(result, kind))
    return None


def _segmentation(
    result: Result, origin: _dicom.Origin, kind: str, number: int, now: datetime.datetime, revision: int
) -> "Segmentation":
    import highdicom  # not at the top: it takes a second

    print_ = _dicom.fingerprint(result, origin, revision)
    found, sought = _in_order(result)
    numbers = _numbered(result, kind)
    # an object must have a frame: where nothing was found, each label that was sought gets one, and it is empty
    shown = range(result.scan.geometry.shape[2]) if found else [result.scan.geometry.shape[2] // 2]
    planes = result.labels.voxels[0][:, :, shown].transpose(2, 1, 0)
    values = values_of(result.label_table)
    overlapping = kind == "BINARY" and any(len(own) > 1 for own in values.values())
    names = names_in_map(result.label_table) if kind == "LABELMAP" else {}
    segments = [values[label.name] for label in found or sought]
    segmentation = highdicom.seg.Segmentation(
        source_images=[_dicom.stand_in(result.scan.geometry, origin)],
        pixel_array=_side_by_side(planes, segments) if overlapping else _renumbered(planes, numbers),
        segmentation_type=kind,
        segment_descriptions=[
            _described(label, numbers[label.value], names.get(label.name, label.name), result, origin)
            for label in found or sought
        ],
        series_instance_uid=_dicom.uid("segmentation series", print_),
        series_number=SERIES_NUMBER + origin.series_number,
        sop_instance_uid=_dicom.uid("segmentation", print_, kind),
        instance_number=number,
        manufacturer=_dicom.MANUFACTURER,
        manufacturer_model_name=_dicom.MANUFACTURER,
        software_versions=_dicom.one_line(hilum_version()),
        device_serial_number=_dicom.one_line(result.package_id),
        content_description=_dicom.one_line(f"found by {result.package_name}"),
        content_label="SEGMENTATION",
        series_description=_dicom.one_line(f"{result.package_name} segmentation"),
        content_date=now.date(),
        content_time=now.time().replace(microsecond=0),
        pixel_measures=_dicom.measures(result.scan.geometry),
        plane_orientation=highdicom.PlaneOrientationSequence("PATIENT", _dicom.orientation_of(result.scan.geometry)),
        plane_positions=_dicom.positions(result.scan.geometry, shown),
    )
    _dicom.tie_to_source(segmentation, result.scan.geometry, shown, origin, _dicom.SEGMENTATION)
    _dicom.name_dimensions(segmentation, _dicom.uid("dimensions", print_, kind))
    return segmentation


def _renumbered(planes: Integer[np.ndarray, "k j i"], numbers: dict[int, int]) -> Integer[np.ndarray, "k j i"]:
    """From label values to segment numbers; a binary object counts its segments from 1 without gaps."""
    table = np.zeros(int(np.iinfo(planes.dtype).max) + 1, dtype=np.uint8 if max(numbers.values()) < 256 else np.uint16)
    table[list(numbers)] = list(numbers.values())
    return table[planes]


def _side_by_side(
    planes: Integer[np.ndarray, "k j i"], segments: Sequence[tuple[int, ...]]
) -> UInt8[np.ndarray, "k j i segment"]:
    """A plane for each segment, as regions overlap."""
    return np.stack([carrying(planes, values) for values in segments], axis=-1).astype(np.uint8)


def _described(label: Label, number: int, name: str, result: Result, origin: _dicom.Origin) -> Dataset:
    import highdicom
    from highdicom.color import CIELabColor
    from pydicom.sr.codedict import codes

    meaning = label.meaning
    described = highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=_dicom.one_line(name),
        segmented_property_category=_dicom.concept(meaning.category),
        segmented_property_type=_dicom.concept(meaning.type),
        algorithm_type="AUTOMATIC",
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=_dicom.one_line(result.package_name),
            family=codes.DCM.ArtificialIntelligence,
            version=_dicom.one_line(result.package_id[:12]),
        ),
        display_color=CIELabColor.from_rgb(*label.colour),
        tracking_id=_dicom.one_line(label.name),
        tracking_uid=_dicom.tracking_uid(result, origin, label.name),
    )
    if meaning.modifiers:
        described.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [
            _dicom.concept(modifier) for modifier in meaning.modifiers
        ]
    return described
