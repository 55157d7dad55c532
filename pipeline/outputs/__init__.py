"""What we write of a result: one file per output, found by its file's name.

Each has `Config`, a dataclass, and `write(result, folder, config) -> list[Path]`. A new file here is a new output.
"""

from collections.abc import Iterable

from preprocessing.volume import Volume

from ..shelf import Shelf

DICOM_RESULTS = {"dicom_seg", "parametric_map", "pdf", "rtstruct", "secondary_capture", "structured_report"}
"""Outputs that belong to a patient and a study, which only a DICOM scan has."""

LAST = ("structured_report",)
"""Outputs that point at what others wrote."""


class UnknownOutput(LookupError):
    """No output has this name."""


_shelf = Shelf(package=__name__, places=__path__, kind="output", refusal=UnknownOutput)
available, load = _shelf.available, _shelf.load


def in_order(names: Iterable[str]) -> list[str]:
    """As they were asked for, but what points at others after those."""
    return sorted(names, key=lambda name: name in LAST)


def refuse_unsuited(names: Iterable[str], scan: Volume) -> None:
    """Before anything is computed: a scan of which one of these outputs cannot be written."""
    if DICOM_RESULTS & set(names):
        from . import _dicom  # not at the top: most runs need no pydicom here

        _dicom.refuse_unsuited(scan)
