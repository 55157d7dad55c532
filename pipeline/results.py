"""A folder of results: each case by itself, whole or not at all, never over another's, and never done twice."""

import fcntl
import logging
import shutil
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Protocol, TypeVar, runtime_checkable

from preprocessing.volume import ScanError

from .errors import UsageError, is_users, stopped_by_signals
from .progress import Progress
from .report import UnreadableReport, as_json, recover, swap, write_whole
from .scan import ours

logger = logging.getLogger(__name__)

SUMMARY_SECONDS = 20
"""The summary is written at least so often, so that a night can be watched."""

DONE, FAILED = "done", "failed"
SKIPPED = "skipped as complete"
EARLIER = "from an earlier run"
ERROR = "error.json"


@runtime_checkable
class Case(Protocol):
    """What a run works on: a scan, a slide."""

    @property
    def case_id(self) -> str:
        """Also the name of its folder."""


Input = TypeVar("Input", bound=Case)
Record = TypeVar("Record")
"""What is written of a case that succeeded: a report, a verdict."""


@dataclass(frozen=True, kw_only=True)
class Row(Generic[Record]):
    """One case of a run."""

    case_id: str
    """Also the name of its folder."""
    status: str
    """'done', 'failed', 'skipped as complete', 'from an earlier run'."""
    report: Record | None = None
    """None where the case failed and nothing is to be said of its scan."""
    error: dict[str, str] | None = None
    """Why it failed: 'met', 'needed', 'do', or one 'message'; for a scan that was refused also 'verdict' and 'reason'."""
    seconds: float = 0.0

    @property
    def message(self) -> str:
        """The reason of a failure, in one line; empty otherwise."""
        error = self.error or {}
        parts = [error[part] for part in ("message", "met", "needed", "do") if error.get(part)]
        return " ".join(" ".join(parts).split())


@dataclass(frozen=True, kw_only=True)
class Batch(Generic[Record]):
    """What came of a run over many scans."""

    folder: Path
    rows: tuple[Row[Record], ...]

    def told(self) -> str:
        """'3 done, 1 failed', in words."""
        return ", ".join(
            f"{number} {status}" for status, number in counts(self.rows).items() if number or status == DONE
        )

    @property
    def failed(self) -> tuple[Row[Record], ...]:
        return tuple(row for row in self.rows if row.status == FAILED)


def counts(rows: Sequence[Row]) -> dict[str, int]:
    """How many cases of each status, 'done' and 'failed' always among them."""
    found = {DONE: 0, FAILED: 0}
    for row in rows:
        found[row.status] = found.get(row.status, 0) + 1
    return found


class Work(ABC, Generic[Input, Record]):
    """What a verb makes of each scan or slide, and how it knows its own results again."""

    stage: str
    """For the progress bar."""
    mark: str
    """The file whose presence says that something of ours is in a case's folder."""
    incomplete: frozenset[str]
    """What may lie in a case's folder without being a result."""

    @abstractmethod
    def found(self, folder: Path) -> Row[Record] | None:
        """What was said there, of whatever scan: a result, or a row that failed; refused where it cannot be read."""

    @abstractmethod
    def is_enough(self, result: Record, folder: Path) -> bool:
        """Whether nothing would be gained by doing it again."""

    @abstractmethod
    def other(self, result: Record, scan: Input) -> str:
        """'of another scan of the same name', say, or nothing where the result is this scan's own."""

    @abstractmethod
    def make(self, scan: Input, folder: Path) -> Row[Record]:
        """The result, its files in this folder."""

    @abstractmethod
    def explain(self, scan: Input, error: Exception, folder: Path) -> Row[Record]:
        """Why there is none, beside where it would be."""

    def ahead(self, looked_at: "Iterator[LookedAt[Input, Record]]") -> "Iterator[LookedAt[Input, Record]]":
        """The same, one after the other; who reads ahead takes a few before giving the first away."""
        return looked_at

    @abstractmethod
    def summarise(self, out: Path, rows: Sequence[Row[Record]], left_alone: Mapping[str, str]) -> None:
        """All cases of the folder, for the morning."""


LookedAt = tuple[Input, Row[Record] | None]
"""A case, and its row where it need not be done again."""


def work_through(
    cases: Sequence[Input], left_alone: Mapping[str, str], out: Path, work: Work[Input, Record], progress: Progress
) -> Batch[Record]:
    """Every case once, its result in a folder of its own below `out`. One bad case never stops the rest."""
    out.mkdir(parents=True, exist_ok=True)
    with _alone_in(out), stopped_by_signals("complete cases are kept. The same command goes on from there."):
        rows = list(_earlier(out, work, {case.case_id for case in cases}))
        written = time.monotonic()
        try:
            looked_at = ((case, _complete(case, work, out)) for case in cases)
            for done, (case, complete) in enumerate(work.ahead(looked_at), start=1):
                rows.append(complete or _isolated(case, work, out))
                progress(work.stage, done, len(cases), f"{sum(r.status == FAILED for r in rows)} failed")
                if time.monotonic() - written > SUMMARY_SECONDS:
                    work.summarise(out, rows, left_alone)
                    written = time.monotonic()
        finally:
            work.summarise(out, rows, left_alone)
    return Batch(folder=out, rows=tuple(rows))


def _earlier(out: Path, work: Work[Input, Record], current: set[str]) -> Iterator[Row[Record]]:
    """Complete cases that lie there from runs over other scans: the summary is of the folder, not of the command."""
    for path in sorted(out.glob(f"[!.]*/{work.mark}")):
        if path.parent.name not in current:
            with suppress(UnreadableReport):  # a file of that name that is not ours, or damaged, is no result
                if row := work.found(path.parent):
                    yield replace(row, status=EARLIER)


def _complete(scan: Input, work: Work[Input, Record], out: Path) -> Row[Record] | None:
    """The row of a case that need not be done again: same input, and everything that was asked for is there."""
    folder = out / scan.case_id
    recover(folder)
    try:
        row = work.found(folder)
        result = _result(row)
        if row is None or result is None or not work.is_enough(result, folder) or work.other(result, scan):
            return None
    except (UnreadableReport, OSError):
        return None  # told when the case's turn comes, and for this case alone
    (folder / ERROR).unlink(missing_ok=True)  # of another try: no longer true
    return replace(row, status=SKIPPED)


def _result(row: Row[Record] | None) -> Record | None:
    """What succeeded; that something failed here before is no result."""
    return row.report if row and row.status != FAILED else None


def _isolated(scan: Input, work: Work[Input, Record], out: Path) -> Row[Record]:
    """One case; whatever goes wrong with it stays with it."""
    started = time.monotonic()
    building, folder = out / f".{scan.case_id}.partial", out / scan.case_id
    try:
        _refuse_other_result(scan, work, folder)
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        row = work.make(scan, building)
        swap(building, folder)
    except Exception as error:
        shutil.rmtree(building, ignore_errors=True)
        row = work.explain(scan, error, folder)
    return replace(row, seconds=round(time.monotonic() - started, 3))


def explained(case_id: str, error: Exception, folder: Path, facts: Mapping[str, str]) -> Row:
    """A row that failed, and error.json: the reason, these facts, and for a fault of ours what its mender needs."""
    said = {"message": str(error)}
    if isinstance(error, ScanError):
        said |= {"verdict": "refused", "reason": error.reason}
    record = {"case_id": case_id, "error": type(error).__name__, **said, **facts}
    if not is_users(error):
        record["message"] = said["message"] = ours(error)
        record["traceback"] = "".join(traceback.format_exception(error))
        logger.error("%s: hilum itself failed: %s", case_id, type(error).__name__)
    folder.mkdir(exist_ok=True)
    write_whole(folder / ERROR, as_json(record))
    return Row(case_id=case_id, status=FAILED, error=said)


def _refuse_other_result(scan: Input, work: Work[Input, Record], folder: Path) -> None:
    """Never write over what was said of another scan, or by another package, nor over what is not ours."""
    result = _result(work.found(folder))
    if result is None:
        strange = sorted(path.name for path in folder.glob("*") if path.name not in work.incomplete)
        if strange:
            raise UsageError(
                f"{folder} holds files that are no result of hilum, as {strange[0]}; a case needs a folder of its own. "
                "Give another --out."
            )
    elif other := work.other(result, scan):
        raise UsageError(
            f"{folder} already holds a result {other}; results are never written over. Remove that folder, or give "
            "another --out."
        )


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """One process writes into a folder at a time; a killed one holds nothing, the system lets go of its lock."""
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another hilum writes into {out} now; one at a time can. Wait for it, or give another --out."
            ) from None
        _clear_up(out)
        yield


def _clear_up(out: Path) -> None:
    """What a killed run left half-written or stepped aside."""
    for retired in out.glob(".*.retired"):
        folder = out / retired.name.removeprefix(".").removesuffix(".retired")
        recover(folder)
        shutil.rmtree(retired, ignore_errors=True)  # still there: the new one had stepped in
    for partial in out.glob(".*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
    for part in out.glob(".*.part"):
        part.unlink(missing_ok=True)
