"""convert: scans read exactly as `segment` reads them, written as NIfTI, the verdict beside each."""

import csv
import io
import json
import logging
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from preprocessing import files
from preprocessing.reading import STRICT, Reading
from preprocessing.records import decode, encode
from preprocessing.verdict import WORDS, Verdict
from preprocessing.volume import Volume

from .config import refuse_unknown_match
from .errors import UsageError, is_users
from .finding import find_scans
from .machine import free_memory
from .names import VERDICT
from .progress import Progress, silent
from .report import UnreadableReport, as_json, hilum_version, inert, write_whole
from .results import DONE, ERROR, FAILED, Batch, Handed, Row, work_through
from .scan import Scan, ours, read_scan, refusal, verdict_on
from .verdicts import record

logger = logging.getLogger(__name__)

IMAGE = "image.nii.gz"


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """verdict.json: what was said of one scan, and by what it is known again."""

    case: str
    word: str
    reason: str
    message: str
    repairs: tuple[str, ...]
    notes: tuple[str, ...]
    modality: str
    encoding: str
    channels: tuple[str, ...]
    slices: int | None
    grid: dict[str, Any] | None
    sources: tuple[str, ...]
    files: tuple[str, ...]
    sha256: str
    """Over the bytes of everything the scan was read from."""
    reading: Reading
    """What was allowed when it was read."""
    hilum_version: str
    traceback: str = ""
    """Of a fault of ours, for its mender."""

    @classmethod
    def read(cls, path: Path) -> "Conversion":
        """What a conversion wrote there before."""
        try:
            return decode(cls, json.loads(path.read_text(encoding="utf-8")), where=path.name)
        except ValueError as mistake:  # no text, no JSON, or another record
            raise UnreadableReport(
                f"{path} is no verdict of hilum ({mistake}); one that `hilum convert` wrote is needed. "
                "Delete it and convert the case again."
            ) from mistake


def convert(
    scans: Sequence[Path], out: Path, reading: Reading = STRICT, channels: Sequence[str] = (), progress: Progress = silent
) -> Batch[Conversion]:  # fmt: skip
    """Write every scan found as NIfTI, with the verdict beside it, refused ones too. One bad case never stops the rest."""
    refuse_unknown_match(reading, channels)
    found = find_scans(scans, channels, out)
    return work_through(
        found.scans, found.left_alone, out, _Converting(reading=reading, channels=tuple(channels)), progress
    )


COMPANY = 5
"""Volumes in memory beside the one in hand: two that lie ready, a copy of what is being decoded, the one that is being
written and its bytes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Converting(Handed[Scan, Conversion]):
    """An image and a verdict for each scan."""

    reading: Reading
    channels: tuple[str, ...]
    stage = "convert"
    mark = VERDICT
    incomplete = frozenset({ERROR, VERDICT})

    def found(self, folder: Path) -> Row[Conversion] | None:
        if not (folder / VERDICT).exists():
            return None
        said = Conversion.read(folder / VERDICT)
        if said.word == "refused":
            return _refused(folder.name, said)
        return Row(case_id=folder.name, status=DONE, report=said)

    def is_enough(self, result: Conversion, folder: Path) -> bool:
        """Its image is there, and what was allowed then is what is allowed now wherever that made a difference."""
        if self.channels and result.channels != self.channels:
            return False
        return (folder / IMAGE).exists() and (result.word == "fine" or result.reading == self.reading)

    def other(self, result: Conversion, scan: Scan) -> str:
        return "" if result.sha256 == scan.identity else "of another scan of the same name"

    def read(self, scan: Scan) -> Volume:
        return read_scan(scan, self.channels, self.reading)

    def roomy(self, read: Volume) -> bool:
        return COMPANY * read.voxels.nbytes < free_memory()

    def answer(self, scan: Scan, read: Volume, folder: Path) -> Volume:
        return read  # it is written as it was read

    def write(self, scan: Scan, answer: Volume, folder: Path) -> Row[Conversion]:
        said = self._said(scan, verdict_on(scan, answer))
        files.write(answer, folder / IMAGE)
        write_whole(folder / VERDICT, as_json(encode(said)))  # last: a case is complete when its verdict is there
        return Row(case_id=scan.case_id, status=DONE, report=said)

    def explain(self, scan: Scan, error: Exception, folder: Path) -> Row[Conversion]:
        """The reason, in verdict.json; in error.json where it is not the scan's, or where an image lies there already."""
        folder.mkdir(exist_ok=True)
        blame = "" if is_users(error) else "".join(traceback.format_exception(error))
        if blame:
            logger.error("%s: hilum itself failed: %s", scan.case_id, type(error).__name__)
        if isinstance(error, UsageError | OSError):
            told = {"error": type(error).__name__, "message": ours(error) if blame else str(error), "traceback": blame}
            write_whole(folder / ERROR, as_json(told))
            return Row(case_id=scan.case_id, status=FAILED, error={"message": told["message"]})
        said = replace(self._said(scan, refusal(scan, error)), traceback=blame)
        occupied = any(path.name not in self.incomplete for path in folder.iterdir())
        write_whole(folder / (ERROR if occupied else VERDICT), as_json(encode(said)))
        return _refused(scan.case_id, said)

    def _said(self, scan: Scan, verdict: Verdict) -> Conversion:
        try:
            identity = scan.identity
        except OSError:  # what cannot be read has no hash
            identity = ""
        said = {"case": scan.case_id, **record(verdict), "sha256": identity, "reading": encode(self.reading)}
        return decode(Conversion, said | {"hilum_version": hilum_version()}, where=VERDICT)

    def summarise(self, out: Path, rows: Sequence[Row[Conversion]], left_alone: Mapping[str, str]) -> None:
        write_whole(out / "summary.csv", _csv(rows))
        write_whole(out / "summary.json", as_json(_summary(rows, left_alone)))


def _refused(case: str, said: Conversion) -> Row[Conversion]:
    error = {"message": said.message, "verdict": said.word, "reason": said.reason}
    return Row(case_id=case, status=FAILED, report=said, error=error)


COLUMNS = (
    "modality",
    "encoding",
    "slices",
    "shape",
    "spacing_mm",
    "orientation",
    "repairs",
    "notes",
    "seconds",
    "message",
)
"""Of summary.csv, behind case, verdict, reason and status."""


def _csv(rows: Sequence[Row[Conversion]]) -> str:
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(("case", "verdict", "reason", "status", *COLUMNS))
    for row in rows:
        said = _plain(row)
        place = said.get("grid") or {}
        cells = said | place | {"seconds": f"{row.seconds:.2f}", "message": row.message}
        first = (row.case_id, said.get("word", ""), said.get("reason", ""), row.status)
        table.writerow([inert(cell) for cell in (*first, *(_cell(cells.get(name)) for name in COLUMNS))])
    return buffer.getvalue()


def _cell(value: Any) -> str:
    """A value as one cell: sentences apart, sizes with a cross between."""
    if isinstance(value, list | tuple):
        numbers = not any(isinstance(item, str) for item in value)
        return "x".join(f"{item:.6g}" for item in value) if numbers else " | ".join(value)
    return "" if value is None else str(value)


def _summary(rows: Sequence[Row[Conversion]], left_alone: Mapping[str, str]) -> dict[str, Any]:
    verdicts = [row.report.word for row in rows if row.report]
    return {
        "hilum_version": hilum_version(),
        "counts": {word: verdicts.count(word) for word in WORDS},
        "cases": [
            {
                "case": row.case_id,
                "status": row.status,
                **_plain(row),
                "image": f"{row.case_id}/{IMAGE}" if row.report and row.report.word != "refused" else None,
                "seconds": row.seconds,
                "message": row.message,
            }
            for row in rows
        ],
        "left_alone": dict(left_alone),
    }


def _plain(row: Row[Conversion]) -> dict[str, Any]:
    return encode(row.report) if row.report else {}
