"""Slides in TIFF read block by block: OME-TIFF and plain ones that OpenSlide leaves alone, and those it reads slowly."""

import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from jaxtyping import UInt8

from .announced import LARGEST_BLOCK
from .source import WHITE, Layout, Patch, SlideError, Source, damaged, plainly, whole_factor
from .vendors import VendorSource

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it finds wrong with a file is in the error we raise

CACHE_BYTES = 128 << 20
"""Decoded blocks kept per slide: tiles share those at their edges with the row below."""

UNITS_UM = {2: 25_400.0, 3: 10_000.0}
"""Micrometres of TIFF's ResolutionUnit: inch and centimetre."""

OME_UNITS_UM = {"µm": 1.0, "um": 1.0, "nm": 0.001, "mm": 1000.0, "cm": 10_000.0, "m": 1e6, "in": 25_400.0}
"""Micrometres of the units OME writes; µm where it names none. Others, as a reference pixel, have no size."""

QUICKER = ("aperio", "generic-tiff")
"""OpenSlide's names for plain TIFF inside. Painting 448 × 448 pixels took it 3 ms beside 1 ms for decoding them."""

SAME = 1.0
"""Mean grey levels by which two decoders of one JPEG may differ; they round differently at most."""

NO_CODE = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""A marker that is neither a restart nor a filled-up byte."""


class TiffSource(Source):
    """A TIFF by its blocks (tiles or strips): only those that a box touches are read and decoded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = tifffile.TiffFile(path)
        except Exception as error:  # damaged directories make it raise what they happen to hit
            raise damaged(path, f"its directory of images cannot be read ({plainly(error)})") from error
        try:
            series = max(self._file.series, key=lambda series: int(np.prod(series.shape)))  # labels are smaller
            self._levels = [_planes(level, path) for level in series.levels]
            self.layout = _layout(self._file, series, self._levels)
        except SlideError:
            self._file.close()
            raise
        except Exception as error:  # as above
            self._file.close()
            raise damaged(path, f"its directory of images cannot be read ({plainly(error)})") from error
        self._kept: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()
        self._kept_bytes = 0
        self._lock = threading.Lock()

    def read(self, level: int, left: int, top: int, width: int, height: int) -> Patch:
        pixels = np.full((height, width, 3), WHITE, np.uint8)
        for number, plane in enumerate(self._levels[level]):
            for index, row, column in plane.touched(left, top, width, height):
                block = self._block(level, number, index)
                _paste(pixels[..., plane.channels], block, column - left, row - top)
        return Patch(pixels, float(left), float(top))

    def close(self) -> None:
        self._file.close()
        self._kept.clear()

    @property
    def is_whole(self) -> bool:
        """Whether every block of every level is there; some scanners leave out empty ones."""
        return all(all(plane.page.databytecounts) for planes in self._levels for plane in planes)

    def _block(self, level: int, number: int, index: int) -> UInt8[np.ndarray, "h w c"]:
        key = (level, number, index)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        block = self._decoded(self._levels[level][number], index)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = block
                self._kept_bytes += block.nbytes
            while self._kept_bytes > CACHE_BYTES and len(self._kept) > 1:
                self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
        return block

    def _decoded(self, plane: "Plane", index: int) -> UInt8[np.ndarray, "h w c"]:
        page = plane.page
        try:
            offset, count = page.dataoffsets[index], page.databytecounts[index]
            if not count:
                return np.zeros((0, 0, 3), np.uint8)  # left out: it stays glass
            packed = os.pread(self._file.filehandle.fileno(), count, offset)
            if len(packed) < count:
                raise EOFError(f"{count} bytes are needed and {len(packed)} are there")
            if page.compression == tifffile.COMPRESSION.JPEG:
                _refuse_broken(packed, plane.block[0] * plane.block[1])
            block, _, shape = page.decode(packed, index, jpegtables=page.jpegtables)
            colours = 3 if plane.channels == slice(None) else 1
            if block.shape[0] != 1 or block.shape[3] != colours:
                raise ValueError(f"{colours} colours are needed and {block.shape[3]} are there")
        except Exception as error:  # a decoder of any of thirty compressions raises what it likes on damaged bytes
            raise damaged(self.path, f"block {index} of an image cannot be decoded ({plainly(error)})") from error
        return block[0, : shape[1], : shape[2]]


def quicker(slow: VendorSource) -> Source:
    """The same slide by its blocks, where OpenSlide itself finds plain TIFF in it and both see the same pixels."""
    if slow.vendor not in QUICKER:
        return slow
    try:
        quick = TiffSource(slow.path)
    except SlideError:
        return slow
    if quick.layout.sizes == slow.layout.sizes and quick.is_whole and _alike(slow, quick):
        quick.layout = replace(slow.layout, reader=f"{slow.layout.reader}, blocks by {quick.layout.reader}")
        return quick
    quick.close()
    return slow


def _alike(slow: Source, quick: Source) -> bool:
    """Whether both show the same in the middle of the slide."""
    across, down = slow.layout.sizes[0]
    width, height = min(across, 256), min(down, 256)  # the size of one block
    box = ((across - width) // 2, (down - height) // 2, width, height)
    try:
        one, other = (source.read(0, *box).pixels for source in (slow, quick))
    except SlideError:
        return False
    return bool(np.abs(one - other.astype(np.float32)).mean() <= SAME)


@dataclass(frozen=True, eq=False)
class Plane:
    """The blocks of one level that hold these channels of it: a page of the file, or one colour's part of one."""

    page: Any
    channels: slice
    first: int = 0
    """The number of its first block in the page."""

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a block; a strip is as wide as the image."""
        if self.page.is_tiled:
            return int(self.page.tilelength), int(self.page.tilewidth)
        return int(min(self.page.rowsperstrip, self.page.imagelength)), int(self.page.imagewidth)

    def touched(self, left: int, top: int, width: int, height: int) -> Iterator[tuple[int, int, int]]:
        """Every block a box touches: its number, and the row and column where it begins."""
        tall, wide = self.block
        across = -(-int(self.page.imagewidth) // wide)
        for row in range(top // tall, -(-(top + height) // tall)):
            for column in range(left // wide, -(-(left + width) // wide)):
                yield self.first + row * across + column, row * tall, column * wide


def _planes(level: Any, path: Path) -> list[Plane]:
    """The pages of a level: one that holds all colours, one that holds them one after the other, or one for each."""
    pages = [page.aspage() for page in level.pages]
    page, axes = pages[0], level.axes
    if (
        level.dtype != np.uint8
        or (axes, len(pages)) not in (("YXS", 1), ("SYX", 1), ("CYX", 3))
        or 3 not in level.shape
    ):
        raise SlideError(
            f"{path.name} has pixels of {level.dtype} in the axes {axes} {tuple(level.shape)}; 8-bit red, green and blue "
            "are needed. Export the slide in colour.",
            "encoding",
        )
    blocks = len(page.dataoffsets) // 3
    planes = {
        "YXS": [Plane(page, slice(None))],
        "SYX": [Plane(page, slice(colour, colour + 1), colour * blocks) for colour in range(3)],
        "CYX": [Plane(page, slice(colour, colour + 1)) for colour, page in enumerate(pages)],
    }[axes]
    _refuse_unreadable(planes[0], path)
    return planes


def _refuse_unreadable(plane: Plane, path: Path) -> None:
    try:
        plane.page.decode(None, 0, jpegtables=plane.page.jpegtables)
    except ValueError as error:
        raise SlideError(
            f"{path.name} is packed in a way that cannot be unpacked here ({plainly(error)}); JPEG, JPEG 2000, deflate or "
            "another usual compression is needed. Export the slide again.",
            "encoding",
        ) from error
    if plane.block[0] * plane.block[1] > LARGEST_BLOCK:
        raise SlideError(
            f"{path.name} is packed in blocks of {plane.block[1]} × {plane.block[0]} pixels; blocks that can be held one "
            "by one are needed. Write it as a tiled pyramid, for instance with vips.",
            "too_large",
        )


def _layout(file: tifffile.TiffFile, series: Any, levels: list[list[Plane]]) -> Layout:
    pages = [planes[0].page for planes in levels]
    sizes = tuple((int(page.imagewidth), int(page.imagelength)) for page in pages)
    said, where = (_of_ome(file, series) if file.is_ome else None) or _of_tags(pages[0])
    return Layout(
        sizes=sizes,
        factors=tuple(whole_factor(sizes[0], size) for size in sizes),
        field_px=(0, 0, *sizes[0]),
        said=said,
        said_where=where,
        reader=f"tifffile {tifffile.__version__}",
    )


def _of_ome(file: tifffile.TiffFile, series: Any) -> tuple[tuple[float, float], str] | None:
    """PhysicalSizeX and PhysicalSizeY of the image in OME's XML."""
    images = re.findall(r"<(?:\w+:)?Pixels\b([^>]*)>", file.ome_metadata or "")
    number = file.series.index(series)
    words = dict(re.findall(r'(\w+)="([^"]*)"', images[number])) if number < len(images) else {}
    try:
        x, y = (
            float(words[f"PhysicalSize{axis}"]) * OME_UNITS_UM[words.get(f"PhysicalSize{axis}Unit", "µm")]
            for axis in "XY"
        )
    except (KeyError, ValueError):
        return None
    return ((x, y), "says in its OME-XML") if x > 0 and y > 0 else None


def _of_tags(page: Any) -> tuple[tuple[float, float] | None, str]:
    """XResolution and YResolution, where their unit is one of length; TIFF's unit is the inch where none is named."""
    unit = UNITS_UM.get(int(page.tags.valueof(296, 2)))
    pair = [page.tags.valueof(code) for code in (282, 283)]
    if unit is None or not all(isinstance(one, tuple) and min(one) > 0 for one in pair):
        return None, "says nothing of its resolution"
    x, y = (unit * below / above for above, below in pair)
    return (x, y), "says in its resolution tag"


def _refuse_broken(packed: bytes, pixels: int) -> None:
    """libjpeg only warns of data that end early or went wrong on the way, and shows something grey.

    Coded data never hold the marker of a segment, an end before the end, or more zeros than a flat picture takes: two
    bits for each 64 values of a colour at least.
    """
    start = packed.find(b"\xff\xda")
    whole = packed.rstrip(b"\0")  # some writers fill up behind the end
    if start < 0 or not whole.endswith(b"\xff\xd9") or NO_CODE.search(whole, start + 2, len(whole) - 2):
        raise ValueError("its JPEG data end early or hold what they cannot")
    if bytes(max(pixels * 3 // 64 * 2 // 8, 64)) in whole:
        raise ValueError("its JPEG data have a hole")


def _paste(pixels: np.ndarray, block: np.ndarray, left: int, top: int) -> None:
    """The part of the block that falls on the pixels."""
    height, width = pixels.shape[:2]
    tall, wide = block.shape[:2]
    rows, columns = (max(top, 0), min(top + tall, height)), (max(left, 0), min(left + wide, width))
    if rows[0] < rows[1] and columns[0] < columns[1]:
        part = block[rows[0] - top : rows[1] - top, columns[0] - left : columns[1] - left]
        pixels[slice(*rows), slice(*columns)] = part
