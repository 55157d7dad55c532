"""measurements.dcm: a DICOM Structured Report (TID 1500) of what was found: each label's volume, as a number that a program can read.

A label that has a segment in the DICOM SEG beside it points at that segment (TID 1411); what was sought and not found, or
has no SEG beside it, is measured on the series as a whole (TID 1501), with 0 ml where there is none. A person has looked at
none of it, and the report says so: preliminary, unverified, not for diagnosis.
"""

import datetime
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from preprocessing.codes import ABNORMALITY, MODIFIERS, STRUCTURE, Code, meaning_of
from preprocessing.plan import Label

from ..report import Result, hilum_version, told
from . import _dicom, dicom_seg

if TYPE_CHECKING:
    from highdicom.sr import AlgorithmIdentification, ContentItem, FindingSite, Measurement, MeasurementReport

FILE_NAME = "measurements.dcm"

SERIES_NUMBER = 5000
"""The series follows its source's number by so much."""

CAUTION = "Made by a program, seen by nobody. For research, not for diagnosis."

IMAGING_PROCEDURE = Code(value="363679005", scheme="SCT", meaning="Imaging procedure")
COMMENT = Code(value="121106", scheme="DCM", meaning="Comment")
SOURCE = Code(value="260753009", scheme="SCT", meaning="Source")
LIBRARY = Code(value="111028", scheme="DCM", meaning="Image Library")
LIBRARY_GROUP = Code(value="126200", scheme="DCM", meaning="Image Library Group")

MODALITY = Code(value="121139", scheme="DCM", meaning="Modality")
FRAME_OF_REFERENCE = Code(value="112227", scheme="DCM", meaning="Frame of Reference UID")

VOLUME = Code(value="118565006", scheme="SCT", meaning="Volume")
MILLILITRE = Code(value="mL", scheme="UCUM", meaning="milliliter")
CERTAINTY = Code(value="111012", scheme="DCM", meaning="Certainty of Finding")
PERCENT = Code(value="%", scheme="UCUM", meaning="Percent")

SIDES = tuple(MODIFIERS[word] for word in ("left", "right", "bilateral"))


@dataclass(frozen=True, kw_only=True)
class Config:
    """Nothing to decide of the report itself: it says what it finds beside it."""

    revision: _dicom.Revision = field(default_factory=_dicom.Revision)
    """Where this is not the first answer for its scan; the same as that of `dicom_seg`."""


def write(result: Result, folder: Path, config: Config) -> list[Path]:
    """One file; written after the segmentation, of which it speaks."""
    origin = _dicom.origin_of(result.scan)
    segments = dicom_seg.beside(result, origin, folder, config.revision.number)
    now = datetime.datetime.now()
    path = folder / FILE_NAME
    with _dicom.quiet():
        data = _document(result, origin, segments, now, config.revision.number)
    _dicom.write_object(data, path, now, origin, result, lies_in_patient=False, revision=config.revision)
    return [path]


def _document(
    result: Result, origin: _dicom.Origin, segments: dicom_seg.Segments | None, now: datetime.datetime, revision: int
) -> Dataset:
    import highdicom  # not at the top: it takes a second

    print_ = _dicom.fingerprint(result, origin, revision)
    comments = _comments(result, segments)
    said = repr((comments, sorted(result.confidence.items()), _settings(result), segments))
    data = highdicom.sr.Comprehensive3DSR(
        evidence=_evidence(origin, segments),
        content=_content(result, origin, segments, comments)[0],
        series_instance_uid=_dicom.uid("report series", print_),
        series_number=SERIES_NUMBER + origin.series_number,
        sop_instance_uid=_dicom.uid("report", print_, sha256(said.encode()).hexdigest()),
        instance_number=1,
        manufacturer=_dicom.MANUFACTURER,
        manufacturer_model_name=_dicom.MANUFACTURER,
        software_versions=_dicom.one_line(hilum_version()),
        device_serial_number=_dicom.one_line(result.package_id),
        series_description=_dicom.one_line(f"measurements, not for diagnosis: {result.package_name}"),
        is_complete=True,
        is_final=False,
        is_verified=False,
    )
    data.ContentDate, data.ContentTime = _dicom.date_and_time(now)
    return data


def _evidence(origin: _dicom.Origin, segments: dicom_seg.Segments | None) -> list[Dataset]:
    """Every object the report speaks of, as far as highdicom looks into it."""
    named = [(instance, origin.series) for instance in origin.instances]
    if segments is not None:
        named.append((segments.instance, segments.series))
    evidence = []
    for instance, series in named:
        item = Dataset()
        for name in _dicom.NEEDED:
            setattr(item, name, None)
        item.SOPClassUID, item.SOPInstanceUID = instance.sop_class, instance.uid
        item.StudyInstanceUID, item.SeriesInstanceUID = origin.study, series
        evidence.append(item)
    return evidence


# the tree of what is said


def _content(
    result: Result, origin: _dicom.Origin, segments: dicom_seg.Segments | None, comments: list[str]
) -> "MeasurementReport":
    """TID 1500: who observed, of which images, what was measured; and after it, in words, how far to trust it."""
    from highdicom import sr

    device = sr.DeviceObserverIdentifyingAttributes(
        uid=_dicom.package_uid(result),
        name=_dicom.one_line(result.package_name),
        manufacturer_name=_dicom.MANUFACTURER,
        model_name=_dicom.one_line(result.package_name),
        serial_number=result.package_id,
    )
    observer = sr.ObserverContext(observer_type=codes.DCM.Device, observer_identifying_attributes=device)
    algorithm = _algorithm(result)
    report = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=observer),
        procedure_reported=_dicom.concept(IMAGING_PROCEDURE),
        imaging_measurements=[_group(label, result, origin, segments, algorithm) for label in result.label_table],
    )
    root = report[0].ContentSequence
    root.insert(len(root) - 1, _library(origin))  # TID 1500 has it before the measurements
    root.extend(_text(comment) for comment in comments)
    return report


def _group(
    label: Label,
    result: Result,
    origin: _dicom.Origin,
    segments: dicom_seg.Segments | None,
    algorithm: "AlgorithmIdentification",
) -> Any:
    """TID 1411 where there is a segment to point at, else TID 1501."""
    from highdicom import sr

    said = {
        "tracking_identifier": sr.TrackingIdentifier(
            uid=_dicom.tracking_uid(result, origin, label.name), identifier=_dicom.one_line(label.name)
        ),
        "finding_category": _dicom.concept(label.meaning.category),
        "finding_type": _dicom.concept(label.meaning.type),
        "finding_sites": _sites(label),
        "algorithm_id": algorithm,
        "measurements": list(_measurements(label, result)),
    }
    if segments is None or label.value not in segments.numbers:
        return sr.MeasurementsAndQualitativeEvaluations(**said)
    segment = sr.ReferencedSegment(
        sop_class_uid=segments.instance.sop_class,
        sop_instance_uid=segments.instance.uid,
        segment_number=segments.numbers[label.value],
        source_series=sr.SourceSeriesForSegmentation(origin.series),
    )
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(referenced_segment=segment, **said)


def _measurements(label: Label, result: Result) -> "Iterator[Measurement]":
    from highdicom import sr

    ml = float(f"{result.volumes_ml[label.name]:.9g}")  # without the dust of arithmetic
    yield sr.Measurement(name=_dicom.concept(VOLUME), value=ml, unit=_dicom.concept(MILLILITRE))
    if label.name in result.confidence:
        percent = float(f"{100 * result.confidence[label.name]:.4g}")
        yield sr.Measurement(name=_dicom.concept(CERTAINTY), value=percent, unit=_dicom.concept(PERCENT))


def _algorithm(result: Result) -> "AlgorithmIdentification":
    from highdicom import sr

    return sr.AlgorithmIdentification(
        name=_dicom.one_line(result.package_name),
        version=result.package_id,
        parameters=_settings(result),
        family=codes.DCM.ArtificialIntelligence,
        manufacturer=_dicom.MANUFACTURER,
    )


def _settings(result: Result) -> list[str]:
    """How the package was run."""
    engine = f", {result.engine}" if result.engine else ""
    return [f"hilum {hilum_version()}", f"computed in {result.precision}{engine}"]


def _sites(label: Label) -> "list[FindingSite]":
    """Where it is: an organ is its own place, and of a lesion the organ is known that its name speaks of."""
    from highdicom import sr

    place = _place(label)
    if place is None:
        return []
    sides = [code for code in label.meaning.modifiers if code in SIDES]
    others = [code for code in label.meaning.modifiers if code not in SIDES]
    side = MODIFIERS["bilateral"] if len(sides) > 1 else next(iter(sides), None)
    return [
        sr.FindingSite(
            _dicom.concept(place),
            laterality=_dicom.concept(side) if side else None,
            topographical_modifier=_dicom.concept(others[0]) if others else None,
        )
    ]


def _place(label: Label) -> Code | None:
    if label.meaning.category == STRUCTURE:
        return label.meaning.type
    if label.meaning.category != ABNORMALITY:
        return None
    words = re.findall(r"[^\W_]+", label.name)
    for size in range(len(words) - 1, 0, -1):  # the most words first: 'portal vein' before 'vein'
        for start in range(len(words) - size + 1):
            meaning = meaning_of(" ".join(words[start : start + size]))
            if meaning.category == STRUCTURE:
                return meaning.type
    return None


def _library(origin: _dicom.Origin) -> "ContentItem":
    """TID 1600: the source images, each once, so that every measurement without a segment has its source too."""
    from highdicom import sr

    group = sr.ContainerContentItem(_dicom.concept(LIBRARY_GROUP), relationship_type="CONTAINS")
    group.ContentSequence = sr.ContentSequence(_common(origin))
    group.ContentSequence.extend(
        sr.ImageContentItem(_dicom.concept(SOURCE), each.sop_class, each.uid, relationship_type="CONTAINS")
        for each in origin.instances
    )
    library = sr.ContainerContentItem(_dicom.concept(LIBRARY), relationship_type="CONTAINS", template_id="1600")
    library.ContentSequence = sr.ContentSequence([group])
    return library


def _common(origin: _dicom.Origin) -> "Iterator[ContentItem]":
    """TID 1602: what all images share; an odd modality, for which the standard has no word, is left to the images."""
    from highdicom import sr

    known = {code.value: code for code in (getattr(codes.cid29, name) for name in codes.cid29.dir())}
    if origin.modality in known:
        yield sr.CodeContentItem(_dicom.concept(MODALITY), known[origin.modality], relationship_type="HAS ACQ CONTEXT")
    yield sr.UIDRefContentItem(
        _dicom.concept(FRAME_OF_REFERENCE), origin.frame_of_reference, relationship_type="HAS ACQ CONTEXT"
    )


def _text(comment: str) -> "ContentItem":
    from highdicom import sr

    return sr.TextContentItem(_dicom.concept(COMMENT), comment, relationship_type="CONTAINS")


def _comments(result: Result, segments: dicom_seg.Segments | None) -> list[str]:
    """In words: what it is not for, what was not found, what the certainty is, and every warning."""
    absent = [label.name for label in result.label_table if result.volumes_ml[label.name] == 0]
    said = [CAUTION]
    if segments is None:
        said.append("No segmentation was written with this report: volumes are of the source series as a whole.")
    elif segments.instance.sop_class == dicom_seg.LABELMAP and any(label.parts for label in result.label_table):
        said.append("Segments hold of a region what no other region covers; volumes are of whole regions.")
    if absent:
        said.append(f"Looked for and not found: {', '.join(absent)}.")
    if result.confidence:
        calibrated = "calibrated on held-out cases" if result.temperatures else "not calibrated"
        said.append(f"Certainty is the mean probability the networks gave a label where it won; {calibrated}.")
    said += [f"Changed after the networks: {told(applied)}." for applied in result.postprocessing]
    said += [f"Repaired when read: {repair}" for repair in result.scan.provenance.repairs]
    return said + [f"Warning: {warning}" for warning in result.warnings]
