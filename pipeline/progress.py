"""How far a long piece of work has come: told by the verbs, shown by whoever called them."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Called with what is being done, how much of it is done, of how much, and a few words on the state."""

    def __call__(self, stage: str, done: float, of: float, note: str = "") -> None: ...


def silent(stage: str, done: float, of: float, note: str = "") -> None:
    """For callers who do not watch."""


@dataclass(frozen=True, kw_only=True)
class CaseOver:
    """One case of many is over, and where the whole stands with it."""

    stage: str
    case: str
    status: str
    """'done', 'failed', 'skipped as complete' and the like."""
    seconds: float
    """What was spent on this case; 0 where nothing was."""
    reason: str
    """The code of a refusal, as `damaged`."""
    message: str
    """Why it failed, in one line."""
    over: int
    """Cases that are over, this one among them."""
    of: int
    failed: int
    spent: float
    """Seconds since the first case."""
    per_minute: float | None
    """Cases worked on, not skipped, in a minute of this run; None before there was one."""
    left: float | None
    """Seconds until all are over at that rate."""


@runtime_checkable
class Watcher(Progress, Protocol):
    """A progress that wants to hear of every single case, too."""

    def began(self, stage: str, of: int) -> None: ...

    def over(self, told: CaseOver) -> None: ...

    def ended(self, stage: str, counts: Mapping[str, int], spent: float) -> None: ...


@final
class Tally:
    """Counts the cases of a run as they end, and tells whoever watches."""

    def __init__(self, progress: Progress, stage: str, of: int) -> None:
        self.progress, self.stage, self.of = progress, stage, of
        self.done: set[str] = set()
        self.failed: set[str] = set()
        self.worked = 0
        self.started = time.monotonic()
        if isinstance(progress, Watcher):
            progress.began(stage, of)

    def over(self, case: str, status: str, *, seconds: float, reason: str, message: str, failed: bool) -> None:
        """One more case is over, or the same one at last after another process had it."""
        self.done.add(case)
        self.failed = self.failed | {case} if failed else self.failed - {case}
        self.worked += seconds > 0  # what was complete before took no time, and says nothing of what is left
        told = self._told(case, status, seconds, reason, message)
        if isinstance(self.progress, Watcher):
            self.progress.over(told)
        else:
            self.progress(self.stage, told.over, self.of, f"{told.failed} failed")

    def ended(self, counts: Mapping[str, int]) -> None:
        """The run is at its end, or was stopped."""
        if isinstance(self.progress, Watcher):
            self.progress.ended(self.stage, counts, round(time.monotonic() - self.started, 3))

    def _told(self, case: str, status: str, seconds: float, reason: str, message: str) -> CaseOver:
        spent = time.monotonic() - self.started
        rate = self.worked / spent if self.worked and spent else None
        left = self.of - len(self.done)
        return CaseOver(
            stage=self.stage, case=case, status=status, seconds=seconds, reason=reason, message=message,
            over=len(self.done), of=self.of, failed=len(self.failed), spent=round(spent, 3),
            per_minute=rate and round(60 * rate, 2), left=round(left / rate, 1) if rate else None if left else 0.0,
        )  # fmt: skip
