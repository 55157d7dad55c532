"""The PDF in the archive is the PDF on disk, its words are words, and none of them is lost."""

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

from pipeline.errors import UsageError
from pipeline.outputs import overlay, pdf, refuse_unsuited
from pipeline.outputs._dicom import Revision
from pipeline.outputs._typeset import BOX, Block, fonts, joined, paged, section, visual
from pipeline.report import Memory, Result, millilitres
from preprocessing import dicom
from preprocessing.declared import label_table
from preprocessing.volume import Geometry, Provenance, ScanError, Volume
from tests.pipeline.dciodvfy import errors_in

MADE_BY_OTHERS = ("Study ID", "invalid data values", "Value invalid for this VR")
"""Mistakes of the sources' own headers, which are kept: another spelling is another patient to an archive."""


def scan_on(folder: Path, **tags: Any) -> Volume:
    geometry = Geometry(shape=(24, 20, 9), affine=np.diag([-0.8, -0.8, 2.0, 1.0]))
    grey = np.random.default_rng(1).integers(-100, 900, (1, *geometry.shape)).astype(np.int16)
    volume = Volume(voxels=grey, geometry=geometry, channels=("0",))
    for path in dicom.write_series(volume, folder, description="phantom", modality="CT"):
        header = pydicom.dcmread(path)
        header.SpecificCharacterSet = "ISO_IR 192"
        for name, value in tags.items():
            setattr(header, name, value)
        header.save_as(path)
    (series,), _ = dicom.series_in(sorted(folder.iterdir()))
    return dicom.read(series)


def found_in(scan: Volume, names: dict[str, int] | None = None) -> Result:
    names = names or {"lesion": 1, "spleen": 2}
    labels = np.zeros(scan.geometry.shape, np.uint8)
    i, j, k = scan.geometry.shape
    labels[i // 4 : i // 2, j // 4 : j // 2, k // 4 : k // 2 + 1] = 1
    return Result(
        case_id="case-of-somebody",
        scan=replace(scan, provenance=replace(scan.provenance, sha256="ab" * 32)),
        labels=Volume(voxels=labels[None], geometry=scan.geometry, channels=("labels",)),
        label_table=label_table(names),
        package_id="cd" * 32,
        package_name="demo",
        confidence={"lesion": 0.55},
        warnings=("lesion is uncertain: its mean probability is 0.55",),
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Result:
    scan = scan_on(
        tmp_path_factory.mktemp("series"), PatientName="Meier^Anna", PatientID="4711", PatientBirthDate="19700131"
    )
    return found_in(scan)


PLAIN = pdf.Config(loose=True, picture=overlay.Config(parts=0))
"""Without the pictures of single parts, which take most of the time."""


def written(result: Result, folder: Path, config: pdf.Config = PLAIN) -> tuple[Path, Path]:
    folder.mkdir(exist_ok=True)
    packed, loose = pdf.write(result, folder, config)
    return packed, loose


@pytest.fixture(scope="module")
def case(found: Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(found, tmp_path_factory.mktemp("case"))[0].parent


def words_of(path: Path) -> str:
    """As poppler reads them, which nobody here wrote; without the places where lines end."""
    if shutil.which("pdftotext") is None:
        pytest.skip("pdftotext (Debian: poppler-utils) is not on this machine")
    said = subprocess.run(["pdftotext", "-layout", path, "-"], capture_output=True, text=True, check=True).stdout
    return " ".join(said.split())


def test_the_same_result_is_the_same_file_to_the_byte(found: Result, case: Path, tmp_path: Path) -> None:
    # how long it took, and what memory, is of the run and not of the result
    rerun = replace(found, seconds={"find": 3.0}, memory=Memory(stated=10, peak=7))
    again, loose = written(rerun, tmp_path)
    assert loose.read_bytes() == (case / pdf.LOOSE).read_bytes()
    first, second = pydicom.dcmread(case / pdf.FILE_NAME), pydicom.dcmread(again)
    assert (first.SOPInstanceUID, first.SeriesInstanceUID) == (second.SOPInstanceUID, second.SeriesInstanceUID)


def test_what_is_taken_out_of_the_object_is_the_file(case: Path, tmp_path: Path) -> None:
    data, loose = pydicom.dcmread(case / pdf.FILE_NAME), (case / pdf.LOOSE).read_bytes()
    assert data.EncapsulatedDocument == loose and data.EncapsulatedDocumentLength == len(loose)
    assert data.SOPClassUID == "1.2.840.10008.5.1.4.1.1.104.1"
    if shutil.which("dcm2pdf"):
        subprocess.run(["dcm2pdf", case / pdf.FILE_NAME, tmp_path / "out.pdf"], check=True)
        assert (tmp_path / "out.pdf").read_bytes() == loose


def test_the_file_is_left_beside_the_object_only_when_asked_for(found: Result, tmp_path: Path) -> None:
    assert [path.name for path in pdf.write(found, tmp_path, pdf.Config())] == ["report.dcm"]
    assert [path.name for path in tmp_path.iterdir()] == ["report.dcm"]


def test_everything_there_is_to_know_can_be_searched_for(found: Result, case: Path) -> None:
    said = words_of(case / pdf.LOOSE)
    for words in (
        *("Meier, Anna", "4711", "1970-01-31", "not for diagnosis", "lesion", "55%", *found.warnings),
        *("looked for and not found: spleen", found.package_id, "hilum", f"SHA-256 {'ab' * 32}", "24×20×9 voxels"),
        millilitres(found.volumes_ml["lesion"]),
        *(str(pydicom.dcmread(case / pdf.FILE_NAME)[name].value) for name in ("StudyInstanceUID", "SOPInstanceUID")),
        *("page 1 of 2", "page 2 of 2"),
    ):
        assert words in said, words


def test_every_page_says_whose_it_is_and_what_it_is_not_for(case: Path) -> None:
    assert words_of(case / pdf.LOOSE).count("Meier, Anna · 4711") == 2
    assert words_of(case / pdf.LOOSE).count("for research, not for diagnosis page") == 2


def test_the_pictures_are_those_of_the_overlay(found: Result, case: Path, tmp_path: Path) -> None:
    if shutil.which("pdfimages") is None:
        pytest.skip("pdfimages (Debian: poppler-utils) is not on this machine")
    from PIL import Image

    subprocess.run(["pdfimages", "-png", case / pdf.LOOSE, tmp_path / "image"], check=True)
    drawn = [np.asarray(Image.open(path)) for path in sorted(tmp_path.iterdir())]
    expected = [overlay.planes(found), overlay.picture(found, PLAIN.picture, anonymous=True)]
    for ours, theirs in zip(expected, drawn, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), theirs)


def test_the_object_belongs_to_its_patient_and_says_that_its_pages_name_him(found: Result, case: Path) -> None:
    data, source = pydicom.dcmread(case / pdf.FILE_NAME), pydicom.dcmread(found.scan.provenance.files[0])
    assert data.StudyInstanceUID == source.StudyInstanceUID and str(data.PatientName) == "Meier^Anna"
    assert data.BurnedInAnnotation == "YES" and data.Modality == "DOC"
    known = {str(pydicom.dcmread(file).SOPInstanceUID) for file in found.scan.provenance.files}
    assert {item.ReferencedSOPInstanceUID for item in data.SourceInstanceSequence} == known
    assert "not for diagnosis" in data.SeriesDescription and "not for diagnosis" in data.DocumentTitle


def test_names_of_files_and_cases_tell_nothing(case: Path) -> None:
    assert sorted(path.name for path in case.iterdir()) == ["report.dcm", "report.pdf"]
    assert "case-of-somebody" not in words_of(case / pdf.LOOSE)
    assert b"case-of-somebody" not in (case / pdf.FILE_NAME).read_bytes()


def test_every_font_is_embedded(case: Path) -> None:
    content = (case / pdf.LOOSE).read_bytes()
    named = set(re.findall(rb"/BaseFont\s*/(\S+)", content))
    assert named and all(b"+" in name for name in named), "a subset's name has a plus"


def test_of_a_hundred_labels_and_as_many_warnings_none_is_lost(found: Result, tmp_path: Path) -> None:
    names = {f"structure_with_a_long_name_number_{n}_upper_lobe" if n % 5 == 0 else f"label_{n}": n
             for n in range(1, 118)} | {"x" * 90: 118}  # fmt: skip
    voxels = np.resize(np.arange(110, dtype=np.uint8), found.scan.geometry.shape)
    warnings = tuple(f"warning number {n} is a sentence of some length, and nothing is cut off it" for n in range(80))
    many = replace(
        found_in(found.scan, names), labels=found.labels.with_voxels(voxels[None]), warnings=warnings, confidence={}
    )
    said = words_of(written(many, tmp_path)[1]).replace(" ", "")
    for words in (*(name for name in names if len(name) < 12), *warnings):
        assert words.replace(" ", "") in said, words
    assert said.count("structure_with_a_long_name".replace(" ", "")[:20]) >= 23
    assert said.count("x" * 20) >= 3  # folded


def test_where_nothing_was_found_it_says_so(found: Result, tmp_path: Path) -> None:
    nothing = replace(found, labels=found.labels.with_voxels(np.zeros_like(found.labels.voxels)), confidence={})
    packed, loose = written(nothing, tmp_path)
    assert errors_in(packed) == []
    said = words_of(loose)
    assert "nothing of what this package looks for" in said and "not found: lesion, spleen" in said


@pytest.mark.parametrize("name", ["Παπαδόπουλος^Γιώργος", "Иванов^Иван", "Đặng^Thị Ánh"])
def test_names_in_the_alphabets_of_the_font_are_written(name: str, tmp_path: Path) -> None:
    said = words_of(written(found_in(scan_on(tmp_path / "series", PatientName=name)), tmp_path)[1])
    family, given, *_ = name.split("^")
    assert f"{family}, {given}" in said and BOX not in said


@pytest.mark.parametrize("name", ["Yamada^Tarou=山田^太郎=やまだ^たろう", "Smith\U0001f600^J"])
def test_letters_that_no_font_has_stand_as_boxes_and_a_line_says_so(name: str, tmp_path: Path) -> None:
    packed, loose = written(found_in(scan_on(tmp_path / "series", PatientName=name)), tmp_path)
    said = words_of(loose)
    shown = "".join(letter if ord(letter) < 128 else BOX for letter in name.split("^")[0])
    assert shown in said and "stand as boxes" in said
    assert str(pydicom.dcmread(packed).PatientName) == name and errors_in(packed) == []


def font_with(letters: str, path: Path) -> Path:
    """A font of squares."""
    pen = TTGlyphPen(None)
    for at, point in enumerate(((0, 0), (0, 800), (800, 800), (800, 0))):
        (pen.lineTo if at else pen.moveTo)(point)
    pen.closePath()
    square = pen.glyph()
    glyphs = {".notdef": square, **{f"u{ord(letter):04X}": square for letter in letters}}
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(list(glyphs))
    builder.setupCharacterMap({ord(letter): f"u{ord(letter):04X}" for letter in letters})
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (900, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular", "psName": "Squares-Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


def test_a_font_of_ones_own_draws_what_dejavu_lacks(tmp_path: Path) -> None:
    result = found_in(scan_on(tmp_path / "series", PatientName="王^小东"))
    font = font_with("王小东", tmp_path / "squares.ttf")
    _, loose = written(result, tmp_path, pdf.Config(loose=True, font=str(font)))
    said = words_of(loose)
    assert "王, 小东" in said and BOX not in said and "stand as boxes" not in said
    assert b"Squares" in loose.read_bytes()


def test_a_font_that_is_none_is_refused(found: Result, tmp_path: Path) -> None:
    (tmp_path / "no.ttf").write_bytes(b"\0" * 64)
    for path in (tmp_path / "no.ttf", tmp_path / "absent.ttf"):
        with pytest.raises(UsageError, match="TrueType"):
            pdf.write(found, tmp_path, pdf.Config(font=str(path)))


def test_hebrew_and_arabic_are_drawn_from_the_right() -> None:
    assert visual("abc 12") == "abc 12"
    assert visual("כהן") == "ןהכ"
    assert visual("כהן, דוד (x) 12") == "דוד ,ןהכ (x) 12", "what follows Latin letters stands right of them"
    assert visual("חדר 12.5 ב") == "ב 12.5 רדח", "a number keeps its direction"
    assert visual("דוד (כהן) גל") == "לג (ןהכ) דוד", "brackets open the other way"
    assert visual("בָּ") == "בָּ", "marks stay behind their letter"


def test_arabic_letters_take_the_forms_that_unicode_gives_them() -> None:
    # initial, medial, medial, final (Unicode, chart FE70)
    assert joined("محمد") == "\ufee3\ufea4\ufee4\ufeaa"
    assert joined("دار") == "\ufea9\ufe8d\ufead", "letters that join nothing after them"
    assert joined("لا") == "\ufefb", "lam and alef are one"
    assert visual("محمد") == "\ufeaa\ufee4\ufea4\ufee3"


def test_a_heading_is_never_the_last_of_its_page() -> None:
    face = fonts()
    filler, row = (Block(height=height, draw=lambda canvas, top: None) for height in (95.0, 4.0))
    first, second = paged([filler, *section("warnings", face, [row, row])], room=120.0)
    assert len(first) == 1 and len(second) == 2


def test_the_heads_of_a_table_stand_again_on_its_next_page() -> None:
    head = Block(height=5, draw=lambda canvas, top: None)
    rows = [Block(height=10, draw=lambda canvas, top: None, again=head) for _ in range(7)]
    pages = paged(rows, room=32)
    assert [page[0] is head for page in pages] == [False, True, True]
    assert [sum(block.height for block in page) <= 32 for page in pages] == [True] * 3


def test_a_revision_is_another_document_that_names_the_one_before(found: Result, case: Path, tmp_path: Path) -> None:
    revised = pdf.Config(loose=True, revision=Revision(number=1, replaces=str(case)))
    packed, _ = written(found, tmp_path, revised)
    before, after = pydicom.dcmread(case / pdf.FILE_NAME), pydicom.dcmread(packed)
    assert before.SOPInstanceUID != after.SOPInstanceUID and before.SeriesInstanceUID != after.SeriesInstanceUID
    series = after.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0]
    assert series.SeriesInstanceUID == before.SeriesInstanceUID
    assert series.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == before.SOPInstanceUID
    assert errors_in(packed) == []


def test_the_standards_validator_has_nothing_against_it(case: Path) -> None:
    assert errors_in(case / pdf.FILE_NAME) == []


def test_a_scan_that_is_no_dicom_is_refused_before_anything_is_computed(found: Result) -> None:
    with pytest.raises(ScanError, match="not DICOM"):
        refuse_unsuited(["pdf"], replace(found.scan, provenance=Provenance(reader="nibabel")))


@pytest.mark.parametrize("folder", ["hippocampus-dicom/Study1", "zoo/dicom_enhanced_ct_vs_classic"])
def test_documents_of_real_scans_are_valid(folder: str, shared: Path, tmp_path: Path) -> None:
    paths = sorted(path for path in (shared / "data" / folder).rglob("*") if path.is_file())
    series, _ = dicom.series_in([path for path in paths if path.name != "slice1.dcm"])
    packed, loose = written(found_in(dicom.read(series[0])), tmp_path)
    assert [error for error in errors_in(packed) if not any(words in error for words in MADE_BY_OTHERS)] == []
    assert "not for diagnosis" in words_of(loose)
