"""A bar on a terminal, for whoever waits for a long piece of work."""

import sys
import time


class Bar:
    """A line on stderr that tells the truth: it appears after two seconds, its rate is measured, it ends at the end."""

    def __init__(self) -> None:
        self.stage = ""
        self.started = self.shown = 0.0
        self.live = sys.stderr.isatty()

    def __call__(self, stage: str, done: float, of: float, note: str = "") -> None:
        now = time.monotonic()
        if stage != self.stage:
            self.stage, self.started, self.shown, self.at_start = stage, now, now + 1.5, done
        finished = done >= of
        if finished and now - self.started < 2:
            return
        if not finished and now - self.shown < (0.2 if self.live else 15):
            return
        self.shown = now
        share = min(1.0, done / of) if of else 1.0
        line = f"{stage:<22} {'█' * int(share * 24):<24} {share:4.0%}  {_left(now - self.started, done - self.at_start, of - done)}  {note}"
        end = "\n" if finished or not self.live else ""
        sys.stderr.write(f"\r\033[K{line}{end}" if self.live else f"{line}\n")
        sys.stderr.flush()


def _left(spent: float, done: float, left: float) -> str:
    if left <= 0:
        return f"{_clock(spent)} in all "
    return f"{_clock(spent / done * left)} left   " if done > 0 else " " * 13


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60:2d}:{int(seconds) % 60:02d}"
