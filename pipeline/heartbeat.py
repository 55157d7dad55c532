"""Who writes a run, and whether that process still lives: a run says RUNNING for ever when nobody is left to end it."""

import os
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

BEAT_SECONDS = 60
"""How often a living training says so."""

SILENT_HOURS = 6
"""After so long without a word a process elsewhere is taken for dead: no single case takes that long to score. Should it
live all the same, its next beat says RUNNING again."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A process, told from every other one: a number of a process is given again, most of all after a restart."""

    host: str
    boot: str
    """Which start of the machine, and which container on it: numbers of processes mean nothing beyond."""
    pid: int
    started: str
    """In ticks since the machine started; empty where the system does not tell."""

    @classmethod
    def here(cls) -> "Owner":
        """This process."""
        pid = os.getpid()
        return cls(host=socket.gethostname().replace(" ", "_"), boot=_boot(), pid=pid, started=_started(pid))

    @classmethod
    def read(cls, words: str) -> "Owner | None":
        """As `str` wrote it; None of anything else."""
        parts = words.split(" ")
        if len(parts) != 4 or not parts[2].isdecimal():
            return None
        return cls(host=parts[0], boot=parts[1], pid=int(parts[2]), started=parts[3].strip("-"))

    def __str__(self) -> str:
        return f"{self.host} {self.boot} {self.pid} {self.started or '-'}"

    def is_gone(self, last_beat: datetime | None) -> bool:
        """Known for sure of a process of this machine and container; of any other once it was silent for long."""
        here = Owner.here()
        if (self.host, self.boot) == (here.host, here.boot):
            return not _lives(self.pid) or _started(self.pid) != self.started
        return last_beat is not None and (now() - last_beat).total_seconds() > SILENT_HOURS * 3600


def now() -> datetime:
    return datetime.now(UTC)


def read_time(words: str) -> datetime | None:
    """As `isoformat` wrote it."""
    try:
        return datetime.fromisoformat(words)
    except ValueError:
        return None


def _boot() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:  # no Linux
        return "-"


def _started(pid: int) -> str:
    try:
        # the 22nd word; the 2nd is the program's name in brackets, with whatever spaces it likes
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's, and alive
        return True
    return not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    """Dead, and its parent has not looked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False
