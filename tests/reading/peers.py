"""A process that runs the other readers, so that whatever they do (crash, hang, chatter) stays in it.

Jobs come pickled by stdin, answers go pickled by stdout; the parent is `Peers`.
"""

import contextlib
import logging
import os
import pickle
import select
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .kinds import FINE, REFUSED
from .phantom import Seen, faults
from .readers import PEERS

REPOSITORY = Path(__file__).resolve().parents[2]
HUNG_SECONDS = 20
WRONG, WARNED, HUNG, CRASHED = "SILENTLY WRONG", "wrong, warned", "hung", "crashed"


class Peers:
    """The other readers, behind a process that is started again when it dies."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def read(self, reader: str, path: Path, truths: Sequence[Seen]) -> tuple[str, str]:
        """A word and its detail."""
        process = self._process = self._process or self._started()
        assert process.stdin and process.stdout
        pickle.dump((reader, path, tuple(truths)), process.stdin)
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], HUNG_SECONDS)
        try:
            if ready:
                return pickle.load(process.stdout)
        except EOFError:
            pass
        self.close()
        return (CRASHED, "the process died") if ready else (HUNG, f"no answer in {HUNG_SECONDS} s")

    def close(self) -> None:
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None

    @staticmethod
    def _started() -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.reading.peers"],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "OMP_NUM_THREADS": "1", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1"},
        )
        assert process.stdout
        assert pickle.load(process.stdout) == "ready"  # importing takes seconds, and is no reader's fault
        return process


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    with tempfile.TemporaryFile() as chatter:  # what libraries print to either stream, from C++ too
        os.dup2(chatter.fileno(), 1)
        os.dup2(chatter.fileno(), 2)
        _import_readers()
        pickle.dump("ready", answers)
        while True:
            try:
                reader, path, truths = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            pickle.dump(_word(reader, path, truths, chatter), answers)


def _import_readers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import SimpleITK  # noqa: F401
        from monai.transforms import LoadImage  # noqa: F401


def _word(reader: str, path: Path, truths: Sequence[Seen], chatter: BinaryIO) -> tuple[str, str]:
    chatter.seek(0)
    chatter.truncate()
    heard: list[str] = []
    with _listening(heard):
        try:
            returned = PEERS[reader](path)
        except Exception as error:
            return REFUSED, f"{type(error).__name__}: {error}"[:200]
        wrong = faults(returned, truths)
    chatter.seek(0)
    said = " ".join(line for line in [*heard, *chatter.read().decode(errors="replace").splitlines()] if _matters(line))
    if not wrong:
        return FINE, ""
    return (WARNED if said else WRONG), wrong + (f" ({said[:150]})" if said else "")


def _matters(line: str) -> bool:
    """nvImageCodec's absence is told with every file, right or wrong."""
    return bool(line.strip()) and "nvimgcodec" not in line.lower() and "nvimagecodec" not in line.lower()


@contextlib.contextmanager
def _listening(heard: list[str]) -> Any:
    """Warnings and log records of at least that weight, however they are sent."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    listener = Listener(logging.WARNING)
    logging.getLogger().addHandler(listener)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        heard += [str(one.message) for one in caught if not issubclass(one.category, DeprecationWarning)]
    finally:
        logging.getLogger().removeHandler(listener)


if __name__ == "__main__":
    main()
