"""Who works on what in a folder of results: locks that the system lets go of when their holder dies, however it dies.

Alone in a folder a process needs one lock. Where several share a folder each of them holds that one together with the others,
and one more for every case it works on. On one machine any file system will do; on many, one whose locks (`flock`) all
of them see: NFS 4, BeeGFS or GPFS as they are usually mounted, Lustre mounted with `flock` and not with `localflock`. The
lock of a machine that died is free as soon as the file server notices, on NFS 4 after its lease of about 90 seconds. Where
locks do not reach, no result is harmed, every folder still being put in its place whole; a case may be done twice.
"""

import fcntl
import glob
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, final

from .errors import UsageError
from .report import recover


class Busy(UsageError):
    """Somebody else writes there now."""


PATIENCE = 10.0
"""Seconds that who wants to share a folder waits for the last of the others to tidy up."""


@final
class Claims:
    """The cases that this process, and no other, works on."""

    def __init__(self, out: Path, *, shared: bool) -> None:
        self.out, self.shared = out, shared
        self.folder = out / ".claims"
        self.held: dict[str, IO[str]] = {}

    def take(self, name: str) -> bool:
        """Whether the case is ours now; what another one left half-done of it when it was killed is cleared up."""
        if not self.shared:
            return True
        lock = (self.folder / name).open("a")
        if not _locked(lock, fcntl.LOCK_EX):
            lock.close()
            return False
        self.held[name] = lock
        # a network file system remembers for a minute that something was not there; opening its folder asks again
        os.close(os.open(self.out, os.O_RDONLY))
        _clear_up(self.out, glob.escape(name))
        return True

    def let_go(self, name: str) -> None:
        """The case is over; its file stays, for another process may be about to lock it."""
        if lock := self.held.pop(name, None):
            lock.close()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For what the sharers write together, each in its turn."""
        if not self.shared:
            yield
            return
        with (self.folder / ".summary").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


@contextmanager
def at_work(out: Path, *, shared: bool = False) -> Iterator[Claims]:
    """One process writes into a folder at a time, or several that agreed to share it; the last one tidies up."""
    with (out / ".lock").open("a") as lock:
        deadline = time.monotonic() + (PATIENCE if shared else 0)
        while not _locked(lock, fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise Busy(
                    f"another hilum writes into {out} now; one at a time can, or several that all were given --shard or "
                    "--ray. Wait for it, or give another --out."
                )
            time.sleep(0.05)
        claims = Claims(out, shared=shared)
        if shared:
            claims.folder.mkdir(exist_ok=True)
        else:
            _tidy(out)
        try:
            yield claims
        finally:
            for name in list(claims.held):
                claims.let_go(name)
            if shared and _locked(lock, fcntl.LOCK_EX):
                _tidy(out)


def _locked(lock: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UsageError(
            f"{lock.name} cannot be locked ({error.strerror}); a file system with locks is needed, or two runs could write "
            "over each other. Give an --out on another one, or have this one mounted with locks."
        ) from error
    return True


def _tidy(out: Path) -> None:
    """Nobody else is here: nothing half-done is anybody's."""
    shutil.rmtree(out / ".claims", ignore_errors=True)
    _clear_up(out)


def _clear_up(out: Path, name: str = "*") -> None:
    """What a killed run left half-written or stepped aside, of one case or of all."""
    for retired in out.glob(f".{name}.retired"):
        folder = out / retired.name.removeprefix(".").removesuffix(".retired")
        recover(folder)
        shutil.rmtree(retired, ignore_errors=True)  # still there: the new one had stepped in
    for partial in out.glob(f".{name}.partial"):
        shutil.rmtree(partial, ignore_errors=True)
    for part in out.glob(f".{name}.part"):
        part.unlink(missing_ok=True)
