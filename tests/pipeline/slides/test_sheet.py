"""The page and the picture of a nested cross-validation say what was measured, of two classes as of many, or that it was not."""

import csv
import io
from dataclasses import replace

import numpy as np
import pytest

from pipeline.slides import sheet
from pipeline.slides.package import SlideRecord
from pipeline.slides.scores import Judged, score
from preprocessing.declared import PALETTE
from tests.pipeline.slides.test_package import a_record


def measured(classes: int, folds: int = 3, slides: int = 60) -> tuple[SlideRecord, Judged]:
    rng = np.random.default_rng(classes)
    truth = np.arange(slides) % classes
    logits = rng.normal(size=(slides, classes))
    logits[np.arange(slides), truth] += 1
    judged = Judged(
        truth=truth, logits=logits, temperatures=np.ones(slides), folds=np.arange(slides) * folds // slides,
        patients=tuple(f"p{n}" for n in range(slides)),
    )  # fmt: skip
    names = tuple(f"<class {n}>" for n in range(classes))
    return replace(a_record(), classes=names, scores=score(judged, names)), judged


@pytest.mark.parametrize("classes", [2, 5, 20])
def test_every_class_has_its_curve_and_every_pair_its_cell(classes):
    record, judged = measured(classes)
    drawn = sheet.picture(record, judged)
    height, width, _ = drawn.shape
    assert width >= 1.5 * height, "MLflow shows the upper two thirds of a square"
    colours = {
        tuple(pixel) for pixel in drawn[sheet.EDGE : sheet.EDGE + sheet.SIDE, : width // 2].reshape(-1, 3).tolist()
    }
    assert {PALETTE[number % len(PALETTE)] for number in range(classes)} <= colours
    matrix = drawn[sheet.EDGE : sheet.EDGE + sheet.SIDE, 3 * sheet.EDGE + sheet.SIDE :]
    cell = sheet.SIDE / classes
    corners = [matrix[round((n + 0.9) * cell), round((n + 0.9) * cell)].tolist() for n in range(classes)]
    strongest = int(np.argmax([record.scores.confusion[n][n] for n in range(classes)]))
    assert corners[strongest][2] == max(corner[2] for corner in corners), "the more of a row, the bluer"


def test_where_no_fold_can_tell_the_picture_draws_no_curve_and_the_page_says_a_dash():
    record, judged = measured(2, folds=60)  # a slide in each fold: nothing to compare it with
    assert record.scores.macro_auroc.value is None
    assert "<td" in (page := sheet.page(record, judged)) and '<td class="number">-</td>' in page


def test_the_page_needs_nothing_and_holds_no_markup_of_a_class():
    record, judged = measured(3)
    page = sheet.page(record, judged)
    assert "default-src 'none'" in page and "http" not in page.replace("http-equiv", "")
    assert "<class" not in page and "&lt;class 1&gt;" in page
    for estimate in record.scores.macros.values():
        assert f"{estimate.value:.4f}" in page or estimate.said in page


def test_a_cell_that_looks_like_a_formula_stays_text():
    written = sheet.as_csv(["slide", "probability"], [["=HYPERLINK(1)", 0.5], ["-1", -1.5]])
    assert list(csv.reader(io.StringIO(written)))[1:] == [["'=HYPERLINK(1)", "0.5"], ["'-1", "-1.5"]]
