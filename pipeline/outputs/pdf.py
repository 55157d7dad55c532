"""report.dcm: what was found as a PDF that any archive takes (DICOM Encapsulated PDF), for eyes and printers.

Pictures, volumes, warnings, and what made them, in words that can be searched. It is the one output that names the patient
on its pages, as paper gets lost; the same result of the same patient is the same file to the byte.
"""

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

from PIL import Image
from pydicom.dataset import Dataset

from preprocessing.codes import Code
from preprocessing.plan import Label

from ..report import Result, hilum_version, millilitres, run_words, told, write_whole
from . import _dicom, overlay
from ._typeset import (
    ALARM,
    LEADING,
    QUIET,
    ROOM,
    SIZE,
    Block,
    Fonts,
    Style,
    beside,
    fonts,
    line,
    lines,
    named,
    picture,
    section,
    space,
    stacked,
    swatch,
)
from ._typeset import pdf as typeset

FILE_NAME = "report.dcm"
LOOSE = "report.pdf"

ENCAPSULATED_PDF = "1.2.840.10008.5.1.4.1.1.104.1"

SERIES_NUMBER = 6000
"""The series follows its source's number by so much."""

MEASUREMENT_REPORT = Code(value="126000", scheme="DCM", meaning="Imaging Measurement Report")

USE = (
    "Made by a program, and nobody has looked at it. For research, not for diagnosis: what is drawn and measured here may be "
    "wrong or missing, and only the scan itself, read by a physician, says what is there."
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the pages show."""

    picture: overlay.Config = field(default_factory=overlay.Config)
    """As in the output `overlay`."""
    loose: bool = False
    """Leave the PDF itself, report.pdf, beside the object. It names the patient, and so must be kept as the scan is."""
    font: str = ""
    """A TrueType file for letters that DejaVu lacks, as of Chinese, Japanese and Korean; without it these stand as boxes."""
    revision: _dicom.Revision = field(default_factory=_dicom.Revision)
    """Where this is not the first answer for its scan."""


def write(result: Result, folder: Path, config: Config) -> list[Path]:
    """The object, and its PDF by itself where that was asked for."""
    origin = _dicom.origin_of(result.scan)
    now = datetime.datetime.now()
    path = folder / FILE_NAME
    with _dicom.quiet():
        uid, content = _pages(result, origin, config)
        data = _document(result, origin, uid, content, now, config.revision.number)
    _dicom.write_object(data, path, now, origin, result, lies_in_patient=False, revision=config.revision)
    if not config.loose:
        return [path]
    write_whole(folder / LOOSE, content)
    return [path, folder / LOOSE]


def _document(
    result: Result, origin: _dicom.Origin, uid: str, content: bytes, now: datetime.datetime, revision: int
) -> Dataset:
    data = Dataset()
    data.SOPClassUID, data.SOPInstanceUID = ENCAPSULATED_PDF, uid
    data.SeriesInstanceUID = _dicom.uid("document series", _dicom.fingerprint(result, origin, revision))
    data.Modality, data.ConversionType = "DOC", "WSD"  # made by a workstation
    data.SeriesNumber, data.InstanceNumber = SERIES_NUMBER + origin.series_number, 1
    data.SeriesDescription = _dicom.one_line(f"report, not for diagnosis: {result.package_name}")
    data.ManufacturerModelName = _dicom.MANUFACTURER
    data.DeviceSerialNumber = _dicom.one_line(result.package_id)
    data.ContentDate, data.ContentTime = _dicom.date_and_time(now)
    data.AcquisitionDateTime = None
    data.BurnedInAnnotation = "YES"  # the patient's name stands on the pages
    data.VerificationFlag = "UNVERIFIED"
    data.SourceInstanceSequence = [_dicom.source(instance) for instance in origin.instances]
    data.DocumentTitle = _dicom.one_line(f"{result.package_name}: what was found, not for diagnosis", 1024)
    data.ConceptNameCodeSequence = [_dicom.concept(MEASUREMENT_REPORT)]
    data.MIMETypeOfEncapsulatedDocument = "application/pdf"
    data.EncapsulatedDocument, data.EncapsulatedDocumentLength = content, len(content)
    return data


# what the pages say


@dataclass(frozen=True, kw_only=True)
class Said:
    """Every word of the pages but their headings."""

    title: str
    patient: tuple[tuple[str, str], ...]
    found: tuple[tuple[Label, str, str], ...]
    """With its volume and its mean probability in words."""
    absent: tuple[str, ...]
    warnings: tuple[str, ...]
    made: tuple[tuple[str, str], ...]


def _pages(result: Result, origin: _dicom.Origin, config: Config) -> tuple[str, bytes]:
    """The document's UID, which stands on its pages, and the document."""
    face = fonts(config.font)
    pictures = [overlay.planes(result, config.picture), overlay.picture(result, config.picture, anonymous=True)]
    said = Said(
        title=result.package_name,
        patient=tuple(_patient(origin)),
        found=tuple(_found(result)),
        absent=tuple(label.name for label in result.label_table if result.volumes_ml[label.name] == 0),
        warnings=result.warnings,
        made=tuple(_made(result, origin)),
    )
    print_ = _dicom.fingerprint(result, origin, config.revision.number)
    drawn = [sha256(image.tobytes()).hexdigest() for image in pictures]
    uid = _dicom.uid("document", print_, sha256(repr((said, drawn, face)).encode("utf-8", "replace")).hexdigest())
    # a page that gets lost is still somebody's
    known = dict(said.patient)
    whose = " · ".join(known[name] for name in ("Patient", "Patient ID", "Study") if known[name])
    foot = whose, f"{result.package_name} · {result.package_id[:12]} · for research, not for diagnosis"
    return uid, typeset(_blocks(said, uid, pictures, face), foot, f"{result.package_name}: what was found", face)


def _patient(origin: _dicom.Origin) -> Iterator[tuple[str, str]]:
    """As the source says it, both columns in turn."""
    taken = origin.patient
    for name, word in (
        *(("Patient", "PatientName"), ("Study", "StudyDate"), ("Patient ID", "PatientID")),
        *(("Study description", "StudyDescription"), ("Born", "PatientBirthDate")),
        *(("Accession number", "AccessionNumber"), ("Sex", "PatientSex")),
    ):
        value = str(taken.get(word) or "")
        yield name, _name(value) if word == "PatientName" else _date(value) if word.endswith("Date") else value
    number = f"number {origin.series_number}, " if origin.series_number else ""
    objects = "1 object" if len(origin.instances) == 1 else f"{len(origin.instances)} objects"
    yield "Source series", f"{number}{origin.modality}, {objects}"


def _name(value: str) -> str:
    """Family, given and other names of each way of writing it: Yamada, Tarou = 山田, 太郎."""
    ways = ([part for part in way.split("^") if part.strip()] for way in value.split("="))
    return " = ".join(", ".join((way[0], " ".join(way[1:]))) if way[1:] else way[0] for way in ways if way)


def _date(value: str) -> str:
    """20260131 as people write it; anything else as it is."""
    return f"{value[:4]}-{value[4:6]}-{value[6:]}" if len(value) == 8 and value.isdigit() else value


def _found(result: Result) -> Iterator[tuple[Label, str, str]]:
    for label in result.label_table:
        ml, sure = result.volumes_ml[label.name], result.confidence.get(label.name)
        if ml > 0:
            yield label, millilitres(ml), "" if sure is None else f"{sure:.0%}"


def _made(result: Result, origin: _dicom.Origin) -> Iterator[tuple[str, str]]:
    """What made it of what: enough to make it again."""
    geometry, provenance = result.scan.geometry, result.scan.provenance
    shape, spacing = (
        "×".join(f"{n:.3g}" if isinstance(n, float) else str(n) for n in each)
        for each in (geometry.shape, geometry.spacing)
    )
    yield "package", f"{result.package_name}, {result.package_id}"
    yield "program", f"hilum {hilum_version()}, computed in {result.precision}"
    # what memory was taken differs from run to run, and would make another document of the same result
    yield from ((name, words) for name, words in run_words(result) if name != "memory")
    if result.confidence:
        yield "mean probability", "calibrated on held-out cases" if result.temperatures else "not calibrated"
    yield "input", f"SHA-256 {provenance.sha256 or 'unknown'}"
    yield "grid", f"{shape} voxels of {spacing} mm, {geometry.orientation}; read by {provenance.reader}"
    for repair in provenance.repairs:
        yield "repaired", repair
    for note in provenance.notes:
        yield "noted", note
    for applied in result.postprocessing:
        yield "then", told(applied)
    yield "study", origin.study
    yield "source series", origin.series


# the pages


def _blocks(said: Said, uid: str, pictures: Sequence[Image.Image], face: Fonts) -> list[Block]:
    first, sheet = pictures
    title = lines(said.title, face, Style(size=18, bold=True), width=ROOM[0] - 150)
    pill = line("not for diagnosis", face, Style(size=11, colour=ALARM, bold=True), right=ROOM[0])
    made = (*said.made, ("this document", f"{uid}, DICOM Encapsulated PDF ({ENCAPSULATED_PDF})"))
    return [
        beside(stacked(*title), pill),
        *lines(USE, face, Style(colour=ALARM)),
        *section("patient", face, [*_in_columns(said.patient, face), *_unwritten(said, face)]),
        *section("found", face, [picture(first), space(6), *_table(said, face)]),
        *section("warnings", face, _warnings(said.warnings, face)),
        *section("made by", face, [block for name, words in made for block in named(name, words, face)]),
        *section("pictures", face, [picture(sheet, most=ROOM[1] - 40)]),
    ]


def _in_columns(rows: Sequence[tuple[str, str]], face: Fonts) -> list[Block]:
    """Two, the first row on both sides first."""
    width = ROOM[0] / 2 - 8
    cells = [
        stacked(*named(name, words, face, left=(place % 2) * (width + 16), width=width, names=82))
        for place, (name, words) in enumerate(rows)
    ]
    return [beside(*cells[start : start + 2]) for start in range(0, len(cells), 2)]


def _unwritten(said: Said, face: Fonts) -> list[Block]:
    """Nothing is left out without a word."""
    if not any(face.lacks(words) for words in _every_word(said)):
        return []
    words = "Letters that the fonts of these pages lack stand as boxes; the header of this object holds the patient's name whole."
    return lines(words, face, Style(colour=ALARM))


def _every_word(said: Said) -> Iterator[str]:
    yield said.title
    yield from (words for _, words in (*said.patient, *said.made))
    yield from (label.name for label, _, _ in said.found)
    yield from (*said.absent, *said.warnings)


MANY = 12
"""More labels than that stand in two columns."""
ALONE = 340.0
"""Points of a single column: an eye finds the number that belongs to a name."""


def _table(said: Said, face: Fonts) -> list[Block]:
    """Each label with its volume and how sure the networks were; then what was sought in vain."""
    columns = 2 if len(said.found) > MANY else 1
    width = (ROOM[0] - 16) / 2 if columns == 2 else ALONE
    cells = [
        _row(label, volume, sure, face, left=(place % columns) * (width + 16), width=width)
        for place, (label, volume, sure) in enumerate(said.found)
    ]
    rows = [beside(*cells[start : start + columns]) for start in range(0, len(cells), columns)]
    if rows:
        heads = beside(*(_heads(face, place * (width + 16), width) for place in range(columns)))
        rows = [stacked(heads, rows[0]), *(replace(row, again=heads) for row in rows[1:])]
    else:
        rows = lines("nothing of what this package looks for", face, Style(size=11, bold=True))
    absent = f"looked for and not found: {', '.join(said.absent)}" if said.absent else ""
    return rows + lines(absent, face, Style(colour=QUIET))


VOLUME, NUMBER = 68.0, 52.0
"""Points from the right end of a column to that of its volumes, and for a volume itself."""


def _heads(face: Fonts, left: float, width: float) -> Block:
    style = Style(size=7, colour=QUIET)
    return beside(
        line("label", face, style, left + 12),
        line("volume", face, style, right=left + width - VOLUME),
        line("mean probability", face, style, right=left + width),
    )


def _row(label: Label, volume: str, sure: str, face: Fonts, left: float, width: float) -> Block:
    name = lines(label.name, face, left=left + 12, width=width - 12 - VOLUME - NUMBER)
    return beside(
        swatch(label.colour, left),
        stacked(*name, space(1)),
        line(volume, face, Style(), right=left + width - VOLUME),
        line(sure, face, Style(), right=left + width),
    )


def _warnings(warnings: Sequence[str], face: Fonts) -> list[Block]:
    if not warnings:
        return lines("none", face, Style(colour=QUIET))
    bullets: list[Block] = []
    for warning in warnings:
        first, *rest = lines(warning, face, left=12, width=ROOM[0] - 12) or [space(SIZE * LEADING)]
        bullets += [beside(line("•", face, Style(colour=ALARM, bold=True), 2), first), *rest]
    return bullets
