"""What we write of a result: one file per output, found by its file's name.

Each has `Config`, a dataclass, and `write(result, folder, config) -> list[Path]`. A new file here is a new output.
"""

import pkgutil
from collections.abc import Iterable
from importlib import import_module
from types import ModuleType

from preprocessing.records import nearest
from preprocessing.volume import Volume

DICOM_RESULTS = {"dicom_seg", "parametric_map", "pdf", "rtstruct", "secondary_capture", "structured_report"}
"""Outputs that belong to a patient and a study, which only a DICOM scan has."""

LAST = ("structured_report",)
"""Outputs that point at what others wrote."""


class UnknownOutput(LookupError):
    """No output has this name."""


def available() -> tuple[str, ...]:
    """The names of all outputs. Nothing is imported."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")))


def load(name: str) -> ModuleType:
    """The module that writes this output."""
    names = available()
    if name not in names:
        raise UnknownOutput(
            f"There is no output {name!r}{nearest(name, names)}. Outputs are {', '.join(names)}: choose among these."
        )
    return import_module(f".{name}", __name__)


def in_order(names: Iterable[str]) -> list[str]:
    """As they were asked for, but what points at others after those."""
    return sorted(names, key=lambda name: name in LAST)


def refuse_unsuited(names: Iterable[str], scan: Volume) -> None:
    """Before anything is computed: a scan of which one of these outputs cannot be written."""
    if DICOM_RESULTS & set(names):
        from . import _dicom  # not at the top: most runs need no pydicom here

        _dicom.refuse_unsuited(scan)
