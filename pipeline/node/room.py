"""The room in which scans are decoded and networks run: a child process with limits. What happens in it stays in it.

It is told a job in a line of JSON and answers in one; torch is loaded once for many jobs. A job that takes too long or too
much memory ends the room, and the next job gets a new one. Nothing is said on paper: no path, no header, no reason that
could hold either leaves but in the answer, which names reasons by their codes.
"""

import json
import os
import resource
import select
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from preprocessing.records import decode

BESIDE_BYTES = 3_000_000_000
"""What Python, torch and their threads map beside the scans, whether they use it or not: measured 1.9 GB, with room."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One case for one package: everything the room is told."""

    paths: tuple[str, ...]
    """The files of the series, or a folder per channel."""
    package: str
    package_id: str = ""
    """What the package must be, and no other; empty: whatever lies there."""
    trusted: tuple[str, ...] = ()
    """Public keys, one of which must have signed it; none named: anybody's."""
    out: str
    """A folder of this node's own; a result that is complete there is not made again."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of `pipeline.config.Segment`."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of a job."""

    status: str
    """done, refused (the scan: nothing changes by trying again), failed (perhaps next time), killed."""
    code: str = ""
    """Why not: a reason of preprocessing/volume.py, or `memory`, `time`, `crashed`, `package`, `fault`."""
    folders: tuple[str, ...] = ()
    """Of the cases that were made, below `out`."""


class Room:
    """A child that is there when it is needed. Not for several threads at once: each worker has its own."""

    def __init__(self, memory_bytes: int, environment: Mapping[str, str] | None = None) -> None:
        self.memory_bytes = memory_bytes
        self.environment = dict(environment or {})
        self.child: subprocess.Popen[bytes] | None = None

    def work(self, job: Job, seconds: float) -> Answer:
        """The job's answer, or that the room was ended."""
        child = self._opened()
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
            child.stdin.flush()
            line = _line_within(child.stdout, seconds)
        except BrokenPipeError:
            line = b""
        if line is None:
            self.close()
            return Answer(status="killed", code="time")
        if not line:
            code = "memory" if child.wait() == OUT_OF_MEMORY else "crashed"
            self.close()
            return Answer(status="killed", code=code)
        return decode(Answer, json.loads(line), where="the room's answer")

    def strike(self) -> None:
        """End the child from another thread than the one that waits for it, which tidies up."""
        if child := self.child:
            child.kill()

    def close(self) -> None:
        """End the child, whatever it does."""
        if self.child:
            self.child.kill()
            self.child.wait()
            for end in (self.child.stdin, self.child.stdout):
                if end:
                    end.close()
            self.child = None

    def _opened(self) -> "subprocess.Popen[bytes]":
        if self.child is None or self.child.poll() is not None:
            self.close()
            words = [sys.executable, "-m", "pipeline.node.room", str(self.memory_bytes)]
            self.child = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=_clean(self.environment),
            )
        return self.child


def _clean(more: Mapping[str, str]) -> dict[str, str]:
    """The surroundings without what is none of a decoder's business: no password, no token."""
    kept = (
        "PATH",
        "HOME",
        "LANG",
        "TMPDIR",
        "PYTHONPATH",
        "HILUM_HOME",
        "OMP_NUM_THREADS",
        "OMP_WAIT_POLICY",
        "CUDA_VISIBLE_DEVICES",
    )
    return {name: os.environ[name] for name in kept if name in os.environ} | dict(more)


def _line_within(source: IO[bytes], seconds: float) -> bytes | None:
    """One line; nothing when the other end closed; None when the time is up."""
    until, said = time.monotonic() + seconds, b""
    with selectors.DefaultSelector() as watch:
        watch.register(source, selectors.EVENT_READ)
        while not said.endswith(b"\n"):
            left = until - time.monotonic()
            if left <= 0 or not watch.select(left):
                return None
            piece = os.read(source.fileno(), 1 << 16)
            if not piece:
                return b""
            said += piece
    return said


BUSY_SECONDS = 1.0
"""Between two looks whether another still works on the same case."""

OUT_OF_MEMORY = 77
"""How the room ends when an allocation was refused: there is no telling what a half-made allocation leaves behind."""


def main(words: Sequence[str]) -> int:
    """In the child: limits first, then job after job until nobody asks any more."""
    most = int(words[0]) + BESIDE_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold patients
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is no answer
    threading.Thread(target=_end_with_the_node, name="end", daemon=True).start()
    for line in sys.stdin.buffer:
        job = decode(Job, json.loads(line), where="job")
        try:
            answer = _done(job)
        except MemoryError:
            return OUT_OF_MEMORY
        answers.write(json.dumps(asdict(answer)).encode() + b"\n")
    return 0


def _end_with_the_node() -> None:
    """Nobody asks any more, for the node was killed: a case in hand is another's now, who must not wait for this one."""
    ear = select.poll()
    ear.register(sys.stdin.fileno(), 0)  # hanging up is told unasked
    ear.poll()
    os._exit(0)


def _done(job: Job) -> Answer:
    from preprocessing.records import BadRecord

    from ..batch import segment
    from ..claims import Busy
    from ..config import Segment
    from ..errors import PackageError, UsageError

    try:
        _refuse_other_package(job)
        settings = decode(Segment, job.settings, where="settings")
        while True:
            try:
                batch = segment([Path(path) for path in job.paths], Path(job.package), Path(job.out), settings)
                break
            except Busy:
                time.sleep(BUSY_SECONDS)  # one that was thought dead still works on it; the node ends the wait
    except PackageError:
        return Answer(status="failed", code="package")
    except (BadRecord, UsageError):
        return Answer(status="refused", code="fault")
    if "MemoryError" in {_kind_of_error(Path(job.out) / row.case_id) for row in batch.failed}:
        raise MemoryError
    if batch.failed:
        reasons = [(row.error or {}).get("reason", "") for row in batch.failed]
        return Answer(status="refused" if all(reasons) else "failed", code=next(filter(None, reasons), "fault"))
    return Answer(status="done", folders=tuple(row.case_id for row in batch.rows if row.report))


def _refuse_other_package(job: Job) -> None:
    """Here, just before it is loaded: what was checked at the start may have lain around for months."""
    from ..errors import PackageError
    from ..package import ModelPackage
    from ..signatures import refuse_unsigned

    if job.trusted:
        refuse_unsigned(Path(job.package), [Path(key) for key in job.trusted])
    if job.package_id and ModelPackage.load(Path(job.package)).id != job.package_id:
        raise PackageError(f"{job.package} is another package than the story began with. Begin it anew.")


def _kind_of_error(folder: Path) -> str:
    """What was raised: only its class, for its words may hold a path."""
    try:
        return str(json.loads((folder / "error.json").read_text()).get("error", ""))
    except (OSError, ValueError):
        return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
