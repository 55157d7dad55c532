"""What a DICOM result takes from the scan it was made of: the patient, the study, where it lies, and every source image."""

import datetime
import hashlib
import io
import logging
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from jaxtyping import Float
from pydicom import config as pydicom_config
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian

from preprocessing.codes import Code
from preprocessing.dicom.headers import quiet as unwarned
from preprocessing.dicom.headers import read_header
from preprocessing.volume import LPS_TO_RAS, Geometry, ScanError, Volume

from ..errors import UsageError
from ..report import Result, hilum_version, write_whole

logger = logging.getLogger(__name__)

MANUFACTURER = "hilum"

PATIENT = (
    *("PatientName", "PatientID", "IssuerOfPatientID", "IssuerOfPatientIDQualifiersSequence", "TypeOfPatientID"),
    *("PatientBirthDate", "PatientSex", "PatientBirthTime", "OtherPatientIDs", "OtherPatientIDsSequence"),
    *("PatientSpeciesDescription", "PatientSpeciesCodeSequence", "PatientBreedDescription", "ResponsiblePerson"),
    *("PatientIdentityRemoved", "DeidentificationMethod", "DeidentificationMethodCodeSequence"),
    "PatientAge",
)
STUDY = (
    *("StudyInstanceUID", "StudyDate", "StudyTime", "ReferringPhysicianName", "StudyID", "AccessionNumber"),
    *("IssuerOfAccessionNumberSequence", "StudyDescription"),
)
TRIAL = (
    *("ClinicalTrialSponsorName", "ClinicalTrialProtocolID", "ClinicalTrialProtocolName", "ClinicalTrialSiteID"),
    *("ClinicalTrialSiteName", "ClinicalTrialSubjectID", "ClinicalTrialSubjectReadingID"),
    *("ClinicalTrialTimePointID", "ClinicalTrialTimePointDescription"),
)
NEEDED = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime"),
    *("ReferringPhysicianName", "StudyID", "AccessionNumber"),
)
"""Type 2 of the patient and study modules (PS3.3 C.7.1.1, C.7.2.1): must be there, may be empty."""

SEGMENTATION = Code(value="113076", scheme="DCM", meaning="Segmentation")
SOURCE_IMAGE = Code(value="121322", scheme="DCM", meaning="Source image for image processing operation")

ALGORITHM = Code(value="Newcode1", scheme="99IHE", meaning="Processing Algorithm")
"""What IHE's AI Results (trial implementation, 6.5.3.1) wants written; DICOM itself has given it no number yet."""

REPLACED = Code(value="REPLACED", scheme="99HILUM", meaning="Result that this one replaces")
"""Ours: of objects that are no documents, the standard has no word for their predecessor."""

LOSS = ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")

TAGS = (
    *(*PATIENT, *STUDY, *TRIAL, *LOSS, "SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID"),
    *("SeriesNumber", "Modality", "FrameOfReferenceUID", "PositionReferenceIndicator"),
)


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One source object."""

    sop_class: str
    uid: str


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One frame of a source object."""

    instance: Instance
    number: int | None
    """From 1; None in an object of a single frame, which has no numbers."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The series a result was made of, as far as a DICOM result must speak of it."""

    patient: Dataset
    """Patient, study and trial, exactly as the source says them; what must be there is there, if empty."""
    loss: Dataset
    """Whether the source was once compressed with loss."""
    study: str
    series: str
    series_number: int
    modality: str
    frame_of_reference: str
    position_reference: str
    instances: tuple[Instance, ...]
    """Of the series, each once, in the order of the slices where it is known."""
    frames: tuple[Frame, ...]
    """Per slice of the grid; empty where the grid is none of the series' own (resampled)."""


@dataclass(frozen=True, kw_only=True)
class Revision:
    """Which of several answers for one scan this is: slices came late, or somebody asked once more."""

    number: int = 0
    """0: the first. Each number has UIDs of its own."""
    replaces: str = ""
    """Folder of the case that this one replaces; the object of the same file name there is named as predecessor. Empty:
    nothing is replaced."""

    def __post_init__(self) -> None:
        if self.number < 0:
            raise UsageError(
                f"A revision has the number {self.number}; 0 or more is needed. Count from 0, the first answer."
            )


def refuse_unsuited(scan: Volume) -> None:
    """Before anything is computed: a scan of which no DICOM result can be written."""
    refuse_odd_planes(scan.geometry)
    origin_of(scan)


def origin_of(scan: Volume) -> Origin:
    """Read again from the files of the scan; refused where there is no patient to put a result to."""
    provenance = scan.provenance
    named = list(dict.fromkeys(path for path, _ in provenance.slices)) or list(provenance.files)
    headers = {path: header for path in named if (header := _header(path)) is not None}
    if not headers or (provenance.slices and len(headers) < len(named)):
        raise ScanError(
            f"A DICOM result was asked for, of a scan that is not DICOM ({provenance.reader or 'unknown'}); "
            "a DICOM series is needed, for a patient, a study and a frame of reference cannot be invented. "
            "Segment the series itself, or leave this output out.",
            "unsupported",
        )
    first = next(iter(headers.values()))
    same = {path: header for path, header in headers.items() if _same_series(header, first)}
    if provenance.slices and len(same) < len(headers):
        raise ScanError(
            f"The slices of one scan came from {len(headers)} files of several series; a DICOM result "
            "belongs to one. Split the series.",
            "mixed",
        )
    instances = {path: _instance(header) for path, header in same.items()}
    frames = tuple(
        Frame(instance=instances[path], number=number if _is_multiframe(same[path]) else None)
        for path, number in provenance.slices
    )
    assert len(frames) in (0, scan.geometry.shape[2])
    for name in ("StudyInstanceUID", "SeriesInstanceUID"):
        _require(first, name)
    return Origin(
        patient=_taken_over(first),
        loss=_elements(first, LOSS),
        study=str(first.StudyInstanceUID),
        series=str(first.SeriesInstanceUID),
        series_number=_whole_number(first.get("SeriesNumber")),
        modality=str(first.get("Modality") or "OT"),
        # a result without a frame of reference cannot lie anywhere; the source's slices share at least their series
        frame_of_reference=str(first.get("FrameOfReferenceUID") or "")
        or uid("frame of reference", first.SeriesInstanceUID),
        position_reference=str(first.get("PositionReferenceIndicator") or ""),
        instances=tuple(dict.fromkeys(instances.values())),
        frames=frames,
    )


def _header(path: str) -> Dataset | None:
    header = read_header(Path(path), (*TAGS, "NumberOfFrames"))
    return None if isinstance(header, str) else header.elements


def _same_series(header: Dataset, first: Dataset) -> bool:
    return all(header.get(tag) == first.get(tag) for tag in ("StudyInstanceUID", "SeriesInstanceUID"))


def _instance(header: Dataset) -> Instance:
    for name in ("SOPClassUID", "SOPInstanceUID"):
        _require(header, name)
    return Instance(sop_class=str(header.SOPClassUID), uid=str(header.SOPInstanceUID))


def _require(header: Dataset, name: str) -> None:
    if not UID(str(header.get(name) or "")).is_valid:
        raise ScanError(
            f"The scan's files have no valid {name}, so that no DICOM result can be tied to them; "
            "the identifiers of study, series and images are needed. Export the scan again with its UIDs, or leave "
            "this output out.",
            "unsupported",
        )


def _is_multiframe(header: Dataset) -> bool:
    """By what the object says, not by its class. Of an object with one frame no frame need be named."""
    return _whole_number(header.get("NumberOfFrames")) > 1


def _whole_number(value: object) -> int:
    try:
        return max(0, int(str(value)))
    except ValueError:  # empty or odd
        return 0


def _taken_over(header: Dataset) -> Dataset:
    taken = _elements(header, (*PATIENT, *STUDY, *TRIAL))
    for name in NEEDED:
        if name not in taken:
            setattr(taken, name, None)
    return taken


def _elements(header: Dataset, names: Sequence[str]) -> Dataset:
    """As they are, right or wrong: another spelling of a patient is another patient to an archive."""
    with quiet():
        header.decode()
        taken = Dataset()
        for name in names:
            if name in header:
                element = header[name]
                value = str(element.value) if element.VR == "PN" and element.VM == 1 else element.value
                taken.add(DataElement(element.tag, element.VR, value, validation_mode=pydicom_config.IGNORE))
    return taken


@contextmanager
def quiet() -> Iterator[None]:
    """pydicom and highdicom speak of every odd value as it is: names of patients too."""
    for name in ("pydicom", "highdicom"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with unwarned():
        yield


def uid(kind: str, *parts: str) -> str:
    """A UID that needs no registered root (PS3.5 B.2: 2.25 and a UUID), the same for the same content."""
    digest = hashlib.sha256("\0".join(("hilum", kind, *map(str, parts))).encode()).digest()
    return f"2.25.{uuid.UUID(bytes=digest[:16], version=5).int}"


def fingerprint(result: Result, origin: Origin, revision: int = 0) -> str:
    """What makes a result this result and no other: package, source images, grid, voxels, and the words of its labels.
    A revision is another result, whatever was found."""
    digest = hashlib.sha256()
    digest.update(repr((result.package_id, result.package_name, origin.study, origin.series)).encode())
    digest.update(repr((origin.instances, origin.frames, result.label_table)).encode())
    digest.update(result.scan.geometry.affine.tobytes() + repr(result.labels.voxels.shape).encode())
    digest.update(np.ascontiguousarray(result.labels.voxels, dtype="<u2").tobytes())
    if revision:  # the first has the UIDs it always had
        digest.update(repr(("revision", revision)).encode())
    return digest.hexdigest()


def tracking_uid(result: Result, origin: Origin, name: str) -> str:
    """Of what one label stands for in this series to this package: the same in all objects and all revisions."""
    return uid("tracked", origin.study, origin.series, result.package_id, name)


def package_uid(result: Result) -> str:
    """Of the package as a device that observes: other weights are another device."""
    return uid("package", result.package_id)


def one_line(text: str, most: int = 64) -> str:
    """Text that a DICOM element of that length can hold: no backslash, no line breaks, never empty."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text.replace("\\", "/"))
    return " ".join(plain.split())[:most].strip() or "unnamed"


def reference(instance: Instance) -> Dataset:
    """An item that names a source object."""
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = instance.sop_class, instance.uid
    return item


def write_object(
    data: Dataset,
    path: Path,
    now: datetime.datetime,
    origin: Origin,
    result: Result,
    syntax: UID = ExplicitVRLittleEndian,
    *,
    lies_in_patient: bool = True,
    revision: Revision = Revision(),
) -> None:
    """Written in one piece, in UTF-8 where ASCII is not enough. What has a place in the patient shares the source's frame."""
    for element in origin.patient:
        data[element.tag] = element
    if lies_in_patient:
        data.FrameOfReferenceUID = origin.frame_of_reference
        data.PositionReferenceIndicator = origin.position_reference or None
    data.Manufacturer = MANUFACTURER
    data.SoftwareVersions = one_line(hilum_version())
    data.InstanceCreationDate, data.InstanceCreationTime = date_and_time(now)
    data.SeriesDate, data.SeriesTime = date_and_time(now)
    data.ContributingEquipmentSequence = [*data.get("ContributingEquipmentSequence", ()), _algorithm(result)]
    _name_predecessor(data, revision, path.name)
    # what the source was written in is no matter: every text was decoded when it was read
    data.SpecificCharacterSet = "ISO_IR 192" if _needs_more_than_ascii(data) else None
    if data.SpecificCharacterSet is None:
        del data.SpecificCharacterSet
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    content = io.BytesIO()
    with quiet():
        pydicom.dcmwrite(content, data, enforce_file_format=True)
    write_whole(path, content.getvalue())


def _algorithm(result: Result) -> Dataset:
    """The package, as IHE's AI Results asks every object to name what made it."""
    item = Dataset()
    item.Manufacturer = MANUFACTURER
    item.ManufacturerModelName = one_line(result.package_name)
    item.SoftwareVersions = [one_line(hilum_version()), one_line(result.package_id)]
    item.DeviceUID = package_uid(result)
    item.PurposeOfReferenceCodeSequence = [concept(ALGORITHM)]
    return item


STRUCTURE_SET = "1.2.840.10008.5.1.4.1.1.481.3"
DOCUMENTS = ("1.2.840.10008.5.1.4.1.1.88.34", "1.2.840.10008.5.1.4.1.1.104.1")
"""Comprehensive 3D SR and Encapsulated PDF: these know predecessors."""


def _name_predecessor(data: Dataset, revision: Revision, name: str) -> None:
    """Where the standard has a place for it; else among the references, with a purpose in our own words."""
    replaced = _replaced(data, revision, name)
    if replaced is None:
        return
    named = reference(replaced.instance)
    if data.SOPClassUID in DOCUMENTS:
        series, study = Dataset(), Dataset()
        series.SeriesInstanceUID, series.ReferencedSOPSequence = replaced.series, [named]
        study.StudyInstanceUID, study.ReferencedSeriesSequence = data.StudyInstanceUID, [series]
        data.PredecessorDocumentsSequence = [study]
    elif data.SOPClassUID == STRUCTURE_SET:
        data.PredecessorStructureSetSequence = [named]
    else:
        named.PurposeOfReferenceCodeSequence = [concept(REPLACED)]
        data.ReferencedInstanceSequence = [named]


@dataclass(frozen=True, kw_only=True)
class Replaced:
    """An object of an earlier revision."""

    instance: Instance
    series: str


def _replaced(data: Dataset, revision: Revision, name: str) -> Replaced | None:
    """None where there was no such object: an earlier revision may have had fewer outputs."""
    if not revision.replaces:
        return None
    folder = Path(revision.replaces)
    if not folder.is_dir():
        raise UsageError(
            f"A revision replaces the case in {folder}, and there is no such folder; the folder of a case is needed. "
            "Correct it, or leave `replaces` out."
        )
    if not (folder / name).is_file():
        logger.info("the revision before had no %s: the new one names no predecessor", name)
        return None
    header = _header(str(folder / name))
    if header is None or header.get("StudyInstanceUID") != data.StudyInstanceUID:
        raise UsageError(
            f"{name} of the case that is replaced belongs to another study, or is no DICOM; a revision replaces a "
            "result of its own study. Correct `replaces`."
        )
    return Replaced(instance=_instance(header), series=str(header.SeriesInstanceUID))


def date_and_time(now: datetime.datetime) -> tuple[str, str]:
    """As DICOM spells them."""
    return now.strftime("%Y%m%d"), now.strftime("%H%M%S")


def _needs_more_than_ascii(data: Dataset) -> bool:
    for element in data:
        if element.VR == "SQ":
            if any(_needs_more_than_ascii(item) for item in element.value):
                return True
        elif element.VR in ("LO", "SH", "PN", "ST", "LT", "UT", "UC") and not str(element.value).isascii():
            return True
    return False


def position_of(geometry: Geometry, k: int) -> Float[np.ndarray, " 3"]:
    """ImagePositionPatient of slice k, without the dust of arithmetic: 0.7 shall not be written 0.69999999999."""
    return (LPS_TO_RAS @ geometry.affine @ [0, 0, k, 1])[:3].round(9)


def orientation_of(geometry: Geometry) -> Float[np.ndarray, " 6"]:
    """ImageOrientationPatient: the direction of a row, then of a column."""
    return (LPS_TO_RAS[:3, :3] @ geometry.direction)[:, :2].T.ravel().round(12)


def refuse_odd_planes(geometry: Geometry) -> None:
    """Planes of DICOM have right angles; only their stacking may be slanted. And no plane is smaller than a byte of
    bits: of such, highdicom 0.28 packs every frame for itself, and no reader finds the second."""
    if geometry.shape[0] * geometry.shape[1] < 8:
        raise ScanError(
            f"Slices of {geometry} hold fewer than 8 pixels; no DICOM result is written of these. "
            "Leave this output out.",
            "unsupported",
        )
    i, j = geometry.direction[:, 0], geometry.direction[:, 1]
    if abs(float(i @ j)) > 1e-4:
        raise ScanError(
            f"Rows and columns of {geometry} do not meet at right angles; DICOM planes must."
            " Resample the scan to a straight grid.",
            "tilted",
        )


# objects of many frames on the planes of a scan


def measures(geometry: Geometry) -> Sequence[Dataset]:
    """Sizes along the planes' own axes; between them the distance along their normal, as viewers take it."""
    import highdicom  # not at the top: it takes a second

    between_columns, between_rows, _ = geometry.spacing
    row, column, step = geometry.direction[:, 0], geometry.direction[:, 1], geometry.affine[:3, 2]
    between_planes = abs(float(np.cross(row, column) @ step))
    return highdicom.PixelMeasuresSequence(
        pixel_spacing=(round(between_rows, 9), round(between_columns, 9)),
        slice_thickness=round(between_planes, 9),
        spacing_between_slices=round(between_planes, 9),
    )


def positions(geometry: Geometry, shown: Sequence[int]) -> Sequence[Sequence[Dataset]]:
    """Where these slices lie."""
    import highdicom

    return [highdicom.PlanePositionSequence("PATIENT", position_of(geometry, k)) for k in shown]


def stand_in(geometry: Geometry, origin: Origin) -> Dataset:
    """A source that highdicom takes whatever the real headers are like; what they say is put in its place afterwards."""
    image = Dataset()
    for name in NEEDED:
        setattr(image, name, None)
    image.StudyInstanceUID, image.SeriesInstanceUID = origin.study, origin.series
    image.SOPClassUID, image.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", origin.instances[0].uid
    image.Modality, image.FrameOfReferenceUID = origin.modality, origin.frame_of_reference
    image.Columns, image.Rows = geometry.shape[:2]
    sizes = measures(geometry)[0]
    image.PixelSpacing, image.SliceThickness = sizes.PixelSpacing, sizes.SliceThickness
    image.ImagePositionPatient = [f"{x:.6g}" for x in position_of(geometry, 0)]
    image.ImageOrientationPatient = [f"{x:.6g}" for x in orientation_of(geometry)]
    return image


def tie_to_source(data: Dataset, geometry: Geometry, shown: Sequence[int], origin: Origin, derivation: Code) -> None:
    """Every frame to the frame it was made of; highdicom would guess it from positions, and only from one file."""
    data.ReferencedSeriesSequence = [referenced_series(origin)]
    data.SourceImageSequence = [reference(instance) for instance in origin.instances]
    if origin.frames:  # then every frame names its own, and one list for all says nothing more
        del data.SourceImageSequence
    data.ContentCreatorName = None
    for element in origin.loss:
        data[element.tag] = element
    derived = [_derived(frame, derivation) for frame in origin.frames]
    slices = {_key(position_of(geometry, k)): k for k in shown}
    for item in data.PerFrameFunctionalGroupsSequence:
        k = slices[_key(item.PlanePositionSequence[0].ImagePositionPatient)]
        item.DerivationImageSequence = [derived[k]] if derived else []


def referenced_series(origin: Origin) -> Dataset:
    """The series a result was made of, object by object."""
    series = Dataset()
    series.SeriesInstanceUID = origin.series
    series.ReferencedInstanceSequence = [reference(instance) for instance in origin.instances]
    return series


def name_dimensions(data: Dataset, organization: str) -> None:
    """By a UID that does not change from run to run."""
    for item in (*data.DimensionOrganizationSequence, *data.DimensionIndexSequence):
        item.DimensionOrganizationUID = organization


def concept(code: Code) -> Dataset:
    """A code as DICOM objects hold it."""
    from highdicom.sr import CodedConcept

    return CodedConcept(value=code.value, scheme_designator=code.scheme, meaning=code.meaning)


def _key(position: object) -> tuple[float, ...]:
    return tuple(round(float(x), 5) for x in np.asarray(position, dtype=float))


def source(instance: Instance) -> Dataset:
    """An item that names what a result was made of."""
    item = reference(instance)
    item.PurposeOfReferenceCodeSequence = [concept(SOURCE_IMAGE)]
    return item


def _derived(frame: Frame, derivation: Code) -> Dataset:
    named = source(frame.instance)
    if frame.number is not None:
        named.ReferencedFrameNumber = frame.number
    named.SpatialLocationsPreserved = "YES"
    item = Dataset()
    item.SourceImageSequence = [named]
    item.DerivationCodeSequence = [concept(derivation)]
    return item
