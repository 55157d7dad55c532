"""Every folder of real hard cases: what a person sees there is what is found, and no folder is without a row."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.errors import UsageError
from pipeline.finding import Finds, find_scans
from pipeline.scan import read_scan, refusal
from preprocessing.reading import Reading
from preprocessing.verdict import Verdict
from preprocessing.volume import ScanError

ROWS: list[dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "expected.yaml").read_text())
KEYS = {"folder", "why", "scans", "every", "left_alone", "alone", "allow", "nothing"}


def judged(finds: Finds, reading: Reading) -> Iterator[Verdict]:
    for scan in finds.scans:
        try:
            yield Verdict.of(read_scan(scan, (), reading))
        except ScanError as error:
            yield refusal(scan, error)


def fits(wanted: dict[str, Any], verdict: Verdict) -> bool:
    """Whether a verdict is as a row says; what the row does not mention may be anything."""
    geometry = verdict.geometry
    facts = {"word": verdict.word, "reason": verdict.reason, "modality": verdict.modality}
    if geometry is not None:
        facts |= {"shape": list(geometry.shape), "orientation": geometry.orientation}
    spacing = wanted.get("spacing")
    if spacing and (geometry is None or not np.allclose(geometry.spacing, spacing, atol=1e-4)):
        return False
    return all(facts.get(key) == value for key, value in wanted.items() if key not in ("times", "spacing"))


def told(verdicts: list[Verdict]) -> str:
    return "\n".join(f"{v.word} {v.reason} | {v.what} | {v.message or v.repairs}" for v in verdicts)


def assert_as_expected(row: dict[str, Any], folder: Path) -> None:
    reading = Reading(allow=tuple(row.get("allow", ())))
    try:
        finds = find_scans([folder])
    except UsageError as mistake:
        assert row.get("nothing"), str(mistake)
        return
    verdicts = list(judged(finds, reading))
    assert not row.get("nothing"), told(verdicts)
    if "left_alone" in row:
        assert len(finds.left_alone) == row["left_alone"], finds.left_alone
    assert all(fits(row.get("every", {}), verdict) for verdict in verdicts), told(verdicts)
    left = list(verdicts)
    for wanted in row.get("scans", ()):
        for _ in range(wanted.get("times", 1)):
            match = next((verdict for verdict in left if fits(wanted, verdict)), None)
            assert match is not None, f"no scan is {wanted}:\n{told(verdicts)}"
            left.remove(match)
    assert "scans" not in row or not left, f"nobody expected:\n{told(left)}"


def name(row: dict[str, Any]) -> str:
    return " ".join([row["folder"], row.get("alone", ""), *row.get("allow", ())]).strip()


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_a_folder_of_hard_cases_is_what_a_person_says_it_is(shared: Path, tmp_path: Path, row: dict[str, Any]) -> None:
    assert set(row) <= KEYS
    folder = shared / "data" / "zoo" / row["folder"]
    if "alone" not in row:
        assert_as_expected(row, folder)
        return
    paths = sorted(folder.glob(row["alone"]))
    assert paths
    for path in paths:
        alone = tmp_path / path.stem / "case"
        alone.mkdir(parents=True)
        shutil.copy(path, alone)
        assert_as_expected(row, alone)


def test_every_folder_has_a_row(shared: Path) -> None:
    folders = {path.name for path in (shared / "data" / "zoo").iterdir() if path.is_dir()}
    assert not folders - {row["folder"].split("/")[0] for row in ROWS}
