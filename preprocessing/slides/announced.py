"""What a file announces, checked before OpenSlide believes it.

OpenSlide takes the size of a file's blocks as it stands there. Where that is more than the machine has it does not raise,
but ends the process, and the work on every other slide with it.
"""

from collections.abc import Iterator
from pathlib import Path

import tifffile

from ..dicom.headers import read_header
from .parts import files_of, is_dicom
from .source import damaged, plainly

LARGEST_BLOCK = 1 << 28
"""Pixels of one block beyond which a file is in one piece and no pyramid, or damaged: 1 GiB as OpenSlide holds it."""

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""How TIFF and BigTIFF begin, in either order of bytes."""


def refuse_senseless(path: Path) -> None:
    """A slide is damaged that announces blocks of no size, or too large to be held."""
    try:
        with path.open("rb") as stream:
            is_tiff = stream.read(4) in TIFF_STARTS
    except OSError as error:
        raise damaged(path, f"it cannot be opened ({error.strerror})") from error
    sizes = _blocks_of_tiff(path) if is_tiff else list(_blocks_of_dicom(path)) if is_dicom(path) else []
    for wide, tall in sizes:
        if not 0 < wide * tall <= LARGEST_BLOCK:
            raise damaged(path, f"it announces blocks of {wide} × {tall} pixels")


def _blocks_of_tiff(path: Path) -> list[tuple[int, int]]:
    try:
        with tifffile.TiffFile(path) as file:
            return [(int(page.tilewidth), int(page.tilelength)) for page in file.pages if page.is_tiled]
    except Exception as error:  # damaged directories make it raise what they happen to hit
        raise damaged(path, f"its directory of images cannot be read ({plainly(error)})") from error


def _blocks_of_dicom(path: Path) -> Iterator[tuple[int, int]]:
    for file in files_of(path):
        header = read_header(file, ("Rows", "Columns"))
        if not isinstance(header, str):
            yield int(header.elements.get("Columns") or 0), int(header.elements.get("Rows") or 0)
