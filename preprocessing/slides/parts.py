"""Which files a slide consists of, what it is called, and what its bytes are."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np

from ..dicom.headers import read_header

WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
"""VL Whole Slide Microscopy Image Storage: the class of DICOM slides."""

WHOLE_BYTES = 256 << 20
SAMPLES, SAMPLE_BYTES = 18, 1 << 20
"""Files below the first are hashed whole; of larger ones the size, the first, the last and 16 spread MiB: a slide of
2 GB would take longer to hash than its tissue to find."""

TWO_ENDINGS = (".ome.tiff", ".ome.tif")
WITH_FOLDER = (".mrxs", ".vms", ".vmu")
"""Slides that keep their pixels in a folder of their name, or in files beside them."""


def slide_id(path: Path) -> str:
    """The name without its suffix."""
    ending = next((ending for ending in TWO_ENDINGS if path.name.lower().endswith(ending)), path.suffix)
    return path.name if path.is_dir() else path.name.removesuffix(path.name[len(path.name) - len(ending) :])


def is_dicom(file: Path) -> bool:
    """By the four letters behind its preamble, which OpenSlide asks for too."""
    try:
        with file.open("rb") as stream:
            stream.seek(128)
            return stream.read(4) == b"DICM"
    except OSError:
        return False


def dicom_slides(files: Sequence[Path]) -> list[list[Path]]:
    """The files of each DICOM slide among these: one series is one slide."""
    series: dict[str, list[Path]] = {}
    for file in files:
        header = read_header(file, ("SOPClassUID", "SeriesInstanceUID")) if is_dicom(file) else ""
        if not isinstance(header, str) and str(header.elements.get("SOPClassUID")) == WHOLE_SLIDE:
            series.setdefault(str(header.elements.get("SeriesInstanceUID") or file), []).append(file)
    return list(series.values())


def files_of(path: Path) -> list[Path]:
    """Every file of which the slide consists; of a folder, those of its DICOM slide, none where it has not just one."""
    if path.is_dir():
        series = dicom_slides(_inside(path))
        return series[0] if len(series) == 1 else []
    if is_dicom(path):
        return next((series for series in dicom_slides(_inside(path.parent)) if path in series), [path])
    folder = path.with_suffix("")
    with_folder = path.suffix.lower() in WITH_FOLDER and folder.is_dir()
    return [path, *(sorted(file for file in folder.rglob("*") if file.is_file()) if with_folder else [])]


def _inside(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file())


def identity(files: Sequence[Path]) -> str:
    """The sha256 of one file; of several, that of their sorted hashes; marked `sampled-` where one was not read whole."""
    hashes = sorted(_hash(file) for file in files)
    if len(hashes) == 1:
        return hashes[0]
    marked = "sampled-" if any(one.startswith("sampled-") for one in hashes) else ""
    return marked + sha256("".join(hashes).encode()).hexdigest()


def _hash(file: Path) -> str:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size < WHOLE_BYTES:
            total = sha256()
            while piece := stream.read(SAMPLE_BYTES):
                total.update(piece)
            return total.hexdigest()
        total = sha256(str(size).encode())
        for place in np.linspace(0, size - SAMPLE_BYTES, SAMPLES).astype(np.int64):
            stream.seek(int(place))
            total.update(stream.read(SAMPLE_BYTES))
        return f"sampled-{total.hexdigest()}"
