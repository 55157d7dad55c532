"""Progress on stderr: a bar for whoever waits for a long piece of work, or a line of JSON per event for a machine."""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from .progress import CaseOver


class Bar:
    """A line on stderr that tells the truth: it appears after two seconds, its rate is measured, it ends at the end."""

    def __init__(self) -> None:
        self.stage = ""
        self.started = self.shown = 0.0
        self.live, self.unfinished = sys.stderr.isatty(), False

    def __call__(self, stage: str, done: float, of: float, note: str = "") -> None:
        """So much of a stage is done."""
        now = self._begun(stage, done)
        if self._is_due(now, done, of):
            self._show(stage, done, of, _left(now - self.started, done - self.at_start, of - done), note)

    def began(self, stage: str, of: int) -> None:
        """Many cases are about to be gone through."""
        self._begun(stage, 0)

    def over(self, told: CaseOver) -> None:
        """One of them is over. The time left is that of cases worked on: those skipped took none."""
        self._begun(told.stage, 0)
        if not self._is_due(time.monotonic(), told.over, told.of):
            return
        rate = f", {told.per_minute:.3g} a minute" if told.per_minute else ""
        note = f"{told.over} of {told.of} cases{rate}, {told.failed} failed"
        if told.over == told.of:
            clock = f"{_clock(told.spent)} in all "
        else:
            clock = " " * 13 if told.left is None else f"{_clock(told.left)} left   "
        self._show(told.stage, told.over, told.of, clock, note)

    def ended(self, stage: str, counts: Mapping[str, int], spent: float) -> None:
        """A run that was stopped leaves its line to be read."""
        if self.live and self.unfinished:
            sys.stderr.write("\n")
        self.unfinished = False

    def _begun(self, stage: str, done: float) -> float:
        now = time.monotonic()
        if stage != self.stage:
            self.stage, self.started, self.shown, self.at_start = stage, now, now + 1.5, done
        return now

    def _is_due(self, now: float, done: float, of: float) -> bool:
        finished = done >= of
        if finished and now - self.started < 2:
            return False
        if not finished and now - self.shown < (0.2 if self.live else 15):
            return False
        self.shown = now
        return True

    def _show(self, stage: str, done: float, of: float, clock: str, note: str) -> None:
        share = min(1.0, done / of) if of else 1.0
        line = f"{stage:<22} {'█' * int(share * 24):<24} {share:4.0%}  {clock}  {note}"
        self.unfinished = done < of
        end = "\n" if not self.unfinished or not self.live else ""
        sys.stderr.write(f"\r\033[K{line}{end}" if self.live else f"{line}\n")
        sys.stderr.flush()


class Lines:
    """One object of JSON per line on stderr: `started`, `stage`, `case`, `ended`, each under `event`."""

    def __call__(self, stage: str, done: float, of: float, note: str = "") -> None:
        """So much of a stage is done."""
        _say("stage", stage=stage, done=round(done, 3), of=round(of, 3), note=note)

    def began(self, stage: str, of: int) -> None:
        """Many cases are about to be gone through."""
        _say("started", stage=stage, of=of)

    def over(self, told: CaseOver) -> None:
        """One of them is over."""
        _say("case", **asdict(told))

    def ended(self, stage: str, counts: Mapping[str, int], spent: float) -> None:
        """All are over, or the run was stopped: then the counts add up to less."""
        _say("ended", stage=stage, counts=dict(counts), spent=spent)


def _say(event: str, **said: Any) -> None:
    sys.stderr.write(json.dumps({"event": event, **said}, ensure_ascii=False) + "\n")
    sys.stderr.flush()


def _left(spent: float, done: float, left: float) -> str:
    if left <= 0:
        return f"{_clock(spent)} in all "
    return f"{_clock(spent / done * left)} left   " if done > 0 else " " * 13


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes:2d}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
