"""A table and a folder of features become slides to learn from, or are refused with what to do about it."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.slides import feature_file
from pipeline.slides.table import read_table
from tests.pipeline.slides.planted import RECIPE, write_cohort, write_rows, write_slide

ROWS = [(f"s{n:02d}a", f"p{n:02d}", ("normal", "tumour")[n % 2]) for n in range(6)]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Six slides of as many patients. Nobody writes into it."""
    return write_cohort(tmp_path_factory.mktemp("cohort"), patients=6)


@pytest.fixture
def refused(cohort: tuple[Path, Path], tmp_path: Path) -> Callable[..., str]:
    """What is said of other rows with those features."""

    def said(rows: list, head: tuple[str, ...] = ("slide", "patient", "label"), features: Path | None = None) -> str:
        labels = write_rows(tmp_path / "LABELS.csv", rows, head)
        with pytest.raises(UsageError) as refusal:
            read_table(features or cohort[0], labels)
        return str(refusal.value)

    return said


def test_slides_come_sorted_with_their_features_patients_and_classes(cohort):
    table = read_table(*cohort)
    assert [(s.id, s.patient, table.classes[s.label]) for s in table.slides] == ROWS
    assert table.classes == ("normal", "tumour") and table.recipe == RECIPE
    assert [slide.file.slide_id for slide in table.slides] == [row[0] for row in ROWS]
    assert table.slides_by_class == {"normal": 3, "tumour": 3} == table.patients_by_class


def test_the_same_rows_in_another_order_and_dress_are_the_same_table(cohort, tmp_path: Path):
    features, labels = cohort
    dressed = tmp_path / "LABELS.csv"
    lines = [f"{label} ; {slide}.svs;{patient};" for slide, patient, label in reversed(ROWS)]
    dressed.write_bytes("\ufeffclass;file; who;more\r\n".encode() + "\r\n".join(lines).encode() + b"\r\n;;;\r\n")
    table = read_table(features, dressed, slide="file", patient="who", label="class")
    assert table.digest == read_table(features, labels).digest


def test_the_digest_knows_features_patients_and_labels(cohort, tmp_path: Path):
    features, labels = cohort
    swapped = [(s, p.replace("p00", "p99"), label) for s, p, label in ROWS]
    other = read_table(features, write_rows(tmp_path / "LABELS.csv", swapped))
    assert other.digest != read_table(features, labels).digest


def test_a_table_without_patients_is_refused_with_how_to_say_that_each_slide_is_one(cohort, refused, tmp_path: Path):
    rows = [(slide, label) for slide, _, label in ROWS]
    assert "--patient_column slide" in refused(rows, head=("slide", "label"))
    table = read_table(cohort[0], write_rows(tmp_path / "LABELS.csv", rows, ("slide", "label")), patient="slide")
    assert {slide.patient for slide in table.slides} == {row[0] for row in ROWS}


@pytest.mark.parametrize(
    "head, words",
    [(("name", "patient", "label"), "--slide_column"), (("slide", "patient", "diagnosis"), "--label_column")],
)
def test_columns_of_other_names_are_asked_for_by_option(refused, head, words):
    said = refused(ROWS, head)
    assert words in said and ", ".join(head) in said


def test_a_slide_that_is_named_twice_is_refused(refused):
    assert "more than one row for s02a" in refused([*ROWS, ROWS[2]])
    assert "more than one row for s02a" in refused([*ROWS, ("s02a.svs", *ROWS[2][1:])])


def test_a_slide_without_features_is_refused_and_a_near_name_offered(refused):
    said = refused([*ROWS, ("s03b", "p07", "normal")])
    assert "1 slide(s)" in said and "s03b; did you mean" in said and "hilum slides features" in said


def test_features_that_no_row_names_take_no_part_and_that_is_said(tmp_path: Path, caplog):
    features, _ = write_cohort(tmp_path, patients=7)
    with caplog.at_level(logging.WARNING):
        table = read_table(features, write_rows(tmp_path / "fewer.csv", ROWS))
    assert [slide.id for slide in table.slides] == [row[0] for row in ROWS]
    assert "1 slide(s) have features and no row in fewer.csv" in caplog.text and "s06a" not in caplog.text


def test_a_patient_of_two_classes_is_refused_by_name(refused):
    said = refused([("s00a", "p01", "normal"), *ROWS[1:]])
    assert "p01 (normal, tumour)" in said


def test_an_empty_cell_is_refused_by_its_line(refused):
    assert "line 3 of LABELS.csv has nothing under patient" in refused([ROWS[0], ("s01a", " ", "tumour"), *ROWS[2:]])


def test_one_class_or_a_class_of_two_patients_is_refused(refused):
    assert "the one class normal" in refused([(slide, patient, "normal") for slide, patient, _ in ROWS])
    assert "tumour (2)" in refused(ROWS[:5])


def test_a_folder_without_features_and_a_table_that_is_none_say_so(cohort, refused, tmp_path: Path):
    assert "Run that first" in refused(ROWS, features=tmp_path)
    with pytest.raises(UsageError, match="is no file"):
        read_table(cohort[0], tmp_path / "nowhere.csv")
    latin = tmp_path / "latin.csv"
    latin.write_bytes("slide,patient,label\ns1,Müller,a\n".encode("latin-1"))
    with pytest.raises(UsageError, match="UTF-8"):
        read_table(cohort[0], latin)
    assert "has no row" in refused([])


def test_features_made_in_two_ways_are_refused_with_what_differs(refused, tmp_path: Path):
    folder = tmp_path / "features"
    for number, (slide, *_) in enumerate(ROWS):
        other = replace(RECIPE, tile_um=224.0, encoder="uni") if number == 4 else RECIPE
        write_slide(folder, slide, [0], recipe=other)
    said = refused(ROWS, features=folder)
    assert "s04a: tile_um 112.0 and 224.0, encoder noise and uni" in said and "same settings" in said


@pytest.mark.parametrize("alike", [{"sha256": "cd" * 32}, {"seed": "the same tiles in another file"}])
def test_one_slide_under_two_names_is_refused_by_its_file_or_by_its_features(refused, tmp_path: Path, alike):
    folder = tmp_path / "features"
    for number, (slide, *_) in enumerate(ROWS):
        write_slide(folder, slide, [0], **(alike if number in (1, 3) else {}))
    assert "s01a = s03a" in refused(ROWS, features=folder)


def test_damaged_features_are_refused_by_their_file(cohort, tmp_path: Path):
    features, labels = write_cohort(tmp_path, patients=6)
    path = features / "s03a" / feature_file.FILE_NAME
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(feature_file.UnreadableFeatures, match="s03a"):
        read_table(features, labels)
