"""A folder of results: each case by itself, whole or not at all, never over another's, and never done twice."""

import json
import logging
import shutil
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, final, runtime_checkable

from preprocessing.volume import ScanError

from .claims import Claims, at_work
from .errors import UsageError, is_users, stopped_by_signals
from .progress import Progress, Tally
from .relay import Hands, relay
from .report import UnreadableReport, as_json, recover, swap, write_whole
from .scan import ours

logger = logging.getLogger(__name__)

SUMMARY_SECONDS = 20
"""The summary is written at least so often, so that a night can be watched."""

DONE, FAILED = "done", "failed"
SKIPPED = "skipped as complete"
EARLIER = "from an earlier run"
ELSEWHERE = "done elsewhere"
BUSY = "in other hands"
WAITING = "not done yet"
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
    """'done', 'failed', 'skipped as complete', 'from an earlier run'; where several processes share the cases also 'done
    elsewhere', 'in other hands', 'not done yet'."""
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

    @property
    def reason(self) -> str:
        """The code of a failure: why the scan was refused; empty where it was not the scan's fault, or all went well."""
        return (self.error or {}).get("reason", "")


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


class Handed(Work[Input, Record]):
    """Work in three hops, so that one case is read and another written while a third is being looked at."""

    @abstractmethod
    def read(self, scan: Input) -> Any:
        """The scan in memory; in a thread of its own."""

    @abstractmethod
    def answer(self, scan: Input, read: Any, folder: Path) -> Any:
        """What is to be said of it; what it needs on disk meanwhile goes below this folder and is gone after it."""

    @abstractmethod
    def write(self, scan: Input, answer: Any, folder: Path) -> Row[Record]:
        """Its files in this folder; in a thread of its own."""

    @abstractmethod
    def roomy(self, read: Any) -> bool:
        """Whether memory holds others beside it, coming and going, while it is answered."""

    def make(self, scan: Input, folder: Path) -> Row[Record]:
        return self.write(scan, self.answer(scan, self.read(scan), folder), folder)


Over = Callable[[Input, Row[Record]], None]
"""Told of every case that is over, as soon as it is."""

Way = Callable[[Sequence[Input], Any, Claims, Callable[[Input, Row[Record]], None]], None]
"""How the cases of a run are gone through: `one_by_one`, `handed_on`, or on the nodes of a cluster."""


def work_through(
    cases: Sequence[Input], left_alone: Mapping[str, str], out: Path, work: Work[Input, Record], progress: Progress,
    *, mine: Sequence[Input] | None = None, way: Way[Input, Record] | None = None,
) -> Batch[Record]:  # fmt: skip
    """Every case once, its result in a folder of its own below `out`. One bad case never stops the rest.

    `mine`: of all cases those to be done here; given, other processes may be doing the others in the same folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    go: Way[Input, Record] = way or (handed_on if isinstance(work, Handed) else one_by_one)
    kept = "complete cases are kept. The same command goes on from there."
    with at_work(out, shared=mine is not None) as claims, stopped_by_signals(kept):
        run = _Run(cases, left_alone, work, claims, Tally(progress, work.stage, len(cases if mine is None else mine)))
        try:
            go(cases if mine is None else mine, work, claims, run.over)
            if held := [case for case in cases if run.is_held(case)]:
                go(held, work, claims, run.over)  # whoever had them may be done with them, or dead
        finally:
            run.summarise()
            run.tally.ended(counts(run.own))
    return Batch(folder=out, rows=run.rows if mine is None else run.own)


@final
class _Run(Generic[Input, Record]):
    """What is known of the cases of a folder while they are gone through."""

    def __init__(
        self,
        cases: Sequence[Input],
        left_alone: Mapping[str, str],
        work: Work[Input, Record],
        claims: Claims,
        tally: Tally,
    ) -> None:
        self.cases, self.left_alone, self.work, self.claims, self.tally = cases, left_alone, work, claims, tally
        self.done: dict[str, Row[Record]] = {}
        self.earlier = tuple(_earlier(claims.out, work, {case.case_id for case in cases}))
        self.seen: dict[str, Row[Record]] = {}
        """Of cases that others have done: looked at once."""
        self.written = time.monotonic()

    def over(self, case: Input, row: Row[Record]) -> None:
        """One more case is over, as far as this run is concerned."""
        self.done[case.case_id] = row
        self.claims.let_go(case.case_id)
        self.tally.over(
            case.case_id, row.status, seconds=row.seconds, reason=row.reason, message=row.message,
            failed=row.status == FAILED,
        )  # fmt: skip
        if time.monotonic() - self.written > SUMMARY_SECONDS:
            self.summarise()
            self.written = time.monotonic()

    def is_held(self, case: Input) -> bool:
        """Whether another process had this case when its turn came."""
        row = self.done.get(case.case_id)
        return row is not None and row.status == BUSY

    @property
    def own(self) -> tuple[Row[Record], ...]:
        """Rows of the cases that were this run's to do, in their order."""
        return tuple(self.done[case.case_id] for case in self.cases if case.case_id in self.done)

    @property
    def rows(self) -> tuple[Row[Record], ...]:
        return (*self.earlier, *self.own)

    def summarise(self) -> None:
        """The summary is of the folder: of several processes that share it, whoever writes last has seen all of it."""
        with self.claims.alone():
            if not self.claims.shared:
                self.work.summarise(self.claims.out, self.rows, self.left_alone)
                return
            self.work.summarise(self.claims.out, [*self.earlier, *map(self._anywhere, self.cases)], self.left_alone)

    def _anywhere(self, case: Input) -> Row[Record]:
        """What came of a case, here or in another process."""
        own = self.done.get(case.case_id)
        if own and own.status != BUSY:
            return own
        if case.case_id not in self.seen:
            row = _lying(self.work, self.claims.out / case.case_id)
            if row is None or row.status == FAILED:  # it may still become better
                return row or own or Row(case_id=case.case_id, status=WAITING)
            self.seen[case.case_id] = replace(row, status=ELSEWHERE)
        return self.seen[case.case_id]


def one_by_one(cases: Sequence[Input], work: Work[Input, Record], claims: Claims, over: Over[Input, Record]) -> None:
    """Each after the other; the work itself reads ahead where it can."""
    looked_at = ((case, _complete(case, work, claims.out)) for case in cases)
    for case, complete in work.ahead(looked_at):
        over(case, complete or _isolated(case, work, claims.out))


def handed_on(cases: Sequence[Input], work: Handed[Input, Record], claims: Claims, over: Over[Input, Record]) -> None:
    """The next ones are read, and the last one is written, while one is being looked at."""
    left = iter(cases)
    relay(lambda wait: next(left, None), hands(work, claims), over)


def hands(work: Handed[Input, Record], claims: Claims) -> Hands[Input, Row[Record]]:
    """What is done with each case of this work, hop by hop; one that need not be done is a row from the start."""
    out = claims.out

    def read(case: Input) -> "Row[Record] | _Taken":
        if not claims.take(case.case_id):
            return Row(case_id=case.case_id, status=BUSY)
        if complete := _complete(case, work, out):
            return complete
        _refuse_other_result(case, work, out / case.case_id)
        return _Taken.by(work.read, case)

    def answer(case: Input, taken: "Row[Record] | _Taken") -> "Row[Record] | _Taken":
        if isinstance(taken, Row):
            return taken
        return taken.then(work.answer, case, taken.value, _building(case, out))

    def write(case: Input, taken: "Row[Record] | _Taken") -> Row[Record]:
        if isinstance(taken, Row):
            return taken
        building = out / f".{case.case_id}.partial"
        row = taken.then(work.write, case, taken.value, building)
        swap(building, out / case.case_id)
        return replace(row.value, seconds=row.seconds)

    def failed(case: Input, error: Exception) -> Row[Record]:
        shutil.rmtree(out / f".{case.case_id}.partial", ignore_errors=True)
        return work.explain(case, error, out / case.case_id)

    return Hands(
        read=read,
        answer=answer,
        write=write,
        failed=failed,
        roomy=lambda taken: isinstance(taken, Row) or work.roomy(taken.value),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Taken:
    """A case on its way, and the seconds that were spent on it so far."""

    value: Any
    seconds: float

    @staticmethod
    def by(hop: Callable[..., Any], *given: Any, spent: float = 0.0) -> "_Taken":
        started = time.monotonic()
        value = hop(*given)
        return _Taken(value=value, seconds=round(spent + time.monotonic() - started, 3))

    def then(self, hop: Callable[..., Any], *given: Any) -> "_Taken":
        return _Taken.by(hop, *given, spent=self.seconds)


def _building(case: Case, out: Path) -> Path:
    building = out / f".{case.case_id}.partial"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    return building


def _lying(work: Work[Input, Record], folder: Path) -> Row[Record] | None:
    """What was said there of a case, by whichever process: whether it is of this very scan only reading that would tell."""
    with suppress(UnreadableReport, OSError):
        row = work.found(folder)
        if row and (row.status == FAILED or (row.report is not None and work.is_enough(row.report, folder))):
            return row
    with suppress(ValueError, OSError):
        said = json.loads((folder / ERROR).read_text(encoding="utf-8"))
        known = {name: str(said[name]) for name in ("message", "verdict", "reason") if name in said}
        return Row(case_id=folder.name, status=FAILED, error=known)
    return None


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
        row = work.make(scan, _building(scan, out))
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
