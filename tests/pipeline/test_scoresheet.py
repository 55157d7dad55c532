"""Held-out cases in a table and on a page: every one of them, the worst first, and no name."""

import csv
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.calibration import Sample, calibration_error, probabilities, reliability
from pipeline.package import ModelPackage, Package
from pipeline.postprocessing import HeldOut
from pipeline.scoresheet import chosen, page, sheet


@pytest.fixture
def record(tiny: Path) -> Package:
    """Two folds of three cases each; one case lacks the lesion, in another nothing could be measured."""
    first = {"aaa": {"liver": 0.9, "lesion": 0.5}, "bbb": {"liver": 0.4}, "ccc": {}}
    second = {"ddd": {"liver": 0.8, "lesion": 0.7}, "eee": {"liver": 0.7, "lesion": 0.2}, "fff": {"liver": 0.95}}
    package = ModelPackage.load(tiny).record
    fold = package.folds["0"]
    folds = {str(number): replace(fold, held_out=HeldOut(cases=cases)) for number, cases in enumerate((first, second))}
    return replace(package, folds=folds)


def test_the_table_has_every_case_of_every_fold(record: Package) -> None:
    rows = list(csv.DictReader(io.StringIO(sheet(record))))
    assert [(row["case"], row["fold"]) for row in rows] == [
        *((c * 3, "0") for c in "abc"),
        *((c * 3, "1") for c in "def"),
    ]
    assert rows[0]["dice lesion"] == "0.5" and float(rows[0]["mean dice"]) == 0.7
    assert rows[1]["dice lesion"] == "" and rows[2]["mean dice"] == ""


def test_the_page_begins_with_the_worst_case_and_compares_the_folds(record: Package) -> None:
    shown = page(record, {"before": [(0.6, 0.5), (0.9, 0.95)], "divided by 2": [(0.55, 0.5), (0.8, 0.95)]})
    table = shown[shown.index("Case by case") :]
    assert [key for key in sorted(("aaa", "bbb", "ccc", "ddd", "eee", "fff"), key=table.index)][:2] == ["bbb", "eee"]
    assert "fold 1" in shown and "all folds" in shown and "6 case(s)" in shown
    alone = replace(record, folds={"0": record.folds["0"]})
    assert "all folds" not in page(alone)


@pytest.mark.parametrize(
    ("means", "picked"),
    [
        ([0.5, 0.9, 0.1, 0.7], {"worst": 2, "median": 3, "best": 1}),
        ([0.5, 0.9], {"worst": 0, "best": 1}),
        ([0.5], {"only": 0}),
        ([None, 0.9, 0.1], {"worst": 2, "best": 1}),
        ([None], {"only": 0}),
        ([], {}),
        ([0.5, 0.5, 0.5], {"worst": 0, "median": 1, "best": 2}),
    ],
)
def test_worst_median_and_best_are_different_cases(means: list[float | None], picked: dict[str, int]) -> None:
    assert chosen(means) == picked


def test_the_curve_of_a_calibrated_network_is_the_diagonal_and_its_gaps_are_the_error() -> None:
    rng = np.random.default_rng(0)
    logits = np.stack([np.zeros(40_000), rng.uniform(-4, 4, 40_000)], axis=1).astype(np.float32)
    truth = (rng.random(40_000) < 1 / (1 + np.exp(-logits[:, 1]))).astype(np.int64)
    sample = Sample(logits=logits, truth=truth, weight=np.full(40_000, 1 / 40_000))
    true, overconfident = reliability([sample], 1.0), reliability([sample], 0.3)
    assert max(abs(sure - right) for sure, right in true) < 0.03
    assert all(sure > right for sure, right in overconfident)
    likely = probabilities(sample, 0.3)
    error = calibration_error(likely.max(axis=1), likely.argmax(axis=1) == truth, sample.weight)
    assert np.mean([abs(sure - right) for sure, right in overconfident]) == pytest.approx(error, rel=0.02)
