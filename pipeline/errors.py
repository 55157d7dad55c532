"""What can go wrong, and whose it is to mend.

    ScanError (ValueError)              preprocessing/volume.py     a scan cannot be used
    ├── UnreadableScan                                              damaged, no scan, or silent about where it lies
    ├── GeometryMismatch                                            two volumes that must share a grid do not
    ├── MissingChannel                                              other channels than were trained on
    ├── SlideError                      preprocessing/slides/source.py  a slide, or one place of it, cannot be used
    └── DatasetError                    preprocessing/declared.py   a folder is no dataset, or cases in it do not fit
    BadRecord (ValueError)              preprocessing/records.py    a plan, package or config says what nobody knows
    UnknownNetwork (LookupError)        networks/__init__.py        no file of that name in networks/
    UnknownOutput (LookupError)         pipeline/outputs/           no file of that name in pipeline/outputs/
    PackageError (RuntimeError)         pipeline/errors.py          a model package cannot be used
    ├── DamagedPackage                                              a byte is not what it was
    ├── NotSigned                       pipeline/signatures.py      nobody who is trusted vouches for it
    └── RegistryError                                               no such model, version or alias
    TrackingError (OSError)             pipeline/tracking.py        the tracking store cannot be used
    CacheError (OSError)                pipeline/errors.py          prepared cases cannot be written or read
    UsageError (ValueError)             pipeline/errors.py          a command line or its files make no sense
    ├── UnreadableReport                pipeline/report.py          a report is damaged or is none
    │   └── UnreadableFeatures          pipeline/slides/feature_file.py  a file of features is damaged or is none
    └── NothingToEvaluate               pipeline/references.py      no prediction has a reference
    Interrupted (BaseException)         pipeline/errors.py          stopped from outside; what was done is kept

Every message has three parts: what was met, what was needed, what to do. Exit codes: 0 all done, 1 our fault, 2 the
user's input, 3 some cases failed, 130 stopped.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class PackageError(RuntimeError):
    """A model package cannot be used."""


class DamagedPackage(PackageError):
    """A byte of a package is not what it was when it was made."""


class RegistryError(PackageError):
    """The registry has no such model, version or alias."""


class CacheError(OSError):
    """Prepared cases cannot be written or read."""


class UsageError(ValueError):
    """A command line, or the files it names, make no sense together."""


class Interrupted(BaseException):
    """Stopped from outside (Ctrl-C, SIGTERM). What was complete is kept; no `except Exception` may take it for a bad case."""


@contextmanager
def stopped_by_signals(kept: str) -> Iterator[None]:
    """Ctrl-C and a scheduler's SIGTERM end the work alike; outside the main thread signals are the caller's affair."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise Interrupted(f"stopped; {kept}")

    # libraries would turn Ctrl-C into an exit code of their own
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_users(error: BaseException) -> bool:
    """Whether the user's input is what must change (exit code 2), by the names in the tree above.

    By name, not by class: importing every floor for its classes would cost a `--help` its speed.
    """
    users = {
        "ScanError",
        "BadRecord",
        "UnknownNetwork",
        "UnknownOutput",
        "PackageError",
        "UsageError",
        "TrackingError",
        "CacheError",
        "PermissionError",
    }
    return any(kind.__name__ in users for kind in type(error).__mro__)
