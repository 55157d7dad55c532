"""A whole slide: any field of it, in micrometres from its top left corner, as a picture of any size."""

import logging
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
from jaxtyping import Float, Int64, UInt8

from .parts import files_of, identity, slide_id
from .resolution import refuse_giant, settle
from .scaling import CLOSE_PX, resample
from .source import WHITE, SlideError, Source, damaged

logger = logging.getLogger(__name__)

COARSER = 1.02
"""A level may be this much coarser than what is asked and still be read: a slide of 0.2513 um/px has its next level at
1.0052, and the finer one would cost 16 times as much for half a per cent."""

PIXELS_AT_ONCE = 1 << 24
"""Pixels of a level that are held at a time; a larger field is read in parts: 64 MiB as OpenSlide hands them out."""

TIFF_SUFFIXES = (".tif", ".tiff", ".btf", ".tf8", ".qptiff")
"""Of files that are handed to tifffile where OpenSlide cannot open them."""


@dataclass(frozen=True)
class Level:
    """One level of the pyramid."""

    size_px: tuple[int, int]
    microns_per_pixel: tuple[float, float]


class Slide:
    """An open slide. Threads may read at the same time; close it, or use it in a `with`."""

    def __init__(self, path: Path, source: Source, microns_per_pixel: float | None = None) -> None:
        self.path = path
        self.id = slide_id(path)
        self._source = source
        layout = source.layout
        self.microns_per_pixel, self.notes = settle(path, layout, microns_per_pixel)
        """Of level 0, along x and y; and what is to be told of them."""
        self.resolution_from: Literal["file", "stated"] = "file" if microns_per_pixel is None else "stated"
        self.reader = layout.reader
        self.origin_px = layout.field_px[:2]
        """The slide's top left corner in pixels of the file's level 0, where a scanner's canvas is larger than what it
        scanned (MIRAX, Leica): as OpenSlide's bounds have it, and as QuPath shows it."""
        self.size_px = layout.field_px[2:]
        refuse_giant(path.name, self.size_um)
        self.levels = tuple(
            Level(size, (self.microns_per_pixel[0] * x, self.microns_per_pixel[1] * y))
            for size, (x, y) in zip(layout.sizes, layout.factors, strict=True)
        )

    @property
    def size_um(self) -> tuple[float, float]:
        """Width and height of the scanned field."""
        return self.size_px[0] * self.microns_per_pixel[0], self.size_px[1] * self.microns_per_pixel[1]

    def region(
        self, x_um: float, y_um: float, width_um: float, height_um: float, size_px: tuple[int, int]
    ) -> UInt8[np.ndarray, "h w 3"]:
        """Exactly this field in that many pixels, from the coarsest level that is fine enough; white beyond the edge.

        SlideError where the data are damaged; every other place can be read afterwards.
        """
        assert min(width_um, height_um) > 0 and min(size_px) > 0, "a field has an extent"
        number = self._fine_enough(width_um / size_px[0], height_um / size_px[1])
        x, y = self.levels[number].microns_per_pixel
        factors = self._source.layout.factors[number]
        left, top = x_um / x + self.origin_px[0] / factors[0], y_um / y + self.origin_px[1] / factors[1]
        step = width_um / x / size_px[0], height_um / y / size_px[1]
        return self._scaled(number, (left, top), step, size_px)

    def overview(self, microns_per_pixel: float) -> UInt8[np.ndarray, "h w 3"]:
        """The whole slide; the last row and column may lie partly beyond its edge and are white there."""
        width, height = self.overview_px(microns_per_pixel)
        return self.region(0, 0, width * microns_per_pixel, height * microns_per_pixel, (width, height))

    def overview_px(self, microns_per_pixel: float) -> tuple[int, int]:
        """Width and height of an overview."""
        width, height = (max(1, math.ceil(side / microns_per_pixel - 1e-6)) for side in self.size_um)
        return width, height

    def level0_px(self, places_um: Float[np.ndarray, "place 2"]) -> Int64[np.ndarray, "place 2"]:
        """Places in pixels of the file's level 0, as other programs count them."""
        return np.rint(places_um / np.array(self.microns_per_pixel)).astype(np.int64) + np.array(self.origin_px)

    @cached_property
    def identity(self) -> str:
        """The sha256 of its bytes; beginning with `sampled-` where only parts of large files were read."""
        return identity(files_of(self.path))

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> "Slide":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fine_enough(self, across_um: float, down_um: float) -> int:
        """The coarsest level whose pixels are no larger than those that are asked for."""
        fine = [
            number
            for number, level in enumerate(self.levels)
            if level.microns_per_pixel[0] <= across_um * COARSER and level.microns_per_pixel[1] <= down_um * COARSER
        ]
        return max(fine, key=lambda number: math.prod(self.levels[number].microns_per_pixel), default=0)

    def _scaled(
        self, number: int, corner: tuple[float, float], step: tuple[float, float], size: tuple[int, int]
    ) -> UInt8[np.ndarray, "h w 3"]:
        """`size` pixels of `step` level pixels each; what is too large to be held is halved along its longer side."""
        covered = size[0] * step[0], size[1] * step[1]
        if math.prod(covered) <= PIXELS_AT_ONCE or max(size) == 1:
            return self._held(number, corner, step, size)
        if size[0] > 1 and (covered[0] >= covered[1] or size[1] == 1):
            half = size[0] // 2
            further = corner[0] + half * step[0], corner[1]
            sizes, axis = ((half, size[1]), (size[0] - half, size[1])), 1
        else:
            half = size[1] // 2
            further = corner[0], corner[1] + half * step[1]
            sizes, axis = ((size[0], half), (size[0], size[1] - half)), 0
        parts = [self._scaled(number, corner, step, sizes[0]), self._scaled(number, further, step, sizes[1])]
        return np.concatenate(parts, axis=axis)

    def _held(
        self, number: int, corner: tuple[float, float], step: tuple[float, float], size: tuple[int, int]
    ) -> UInt8[np.ndarray, "h w 3"]:
        """The pixels a field touches, as far as they lie on the level, scaled; everything else is white."""
        columns, rows = (_span(*axis) for axis in zip(corner, step, size, strict=True))
        right, bottom = self.levels[number].size_px
        left, width = _within(columns, right)
        top, height = _within(rows, bottom)
        if not width or not height:
            return np.full((size[1], size[0], 3), WHITE, np.uint8)
        patch = self._source.read(number, left, top, width, height)
        start = corner[0] - columns[0] + left - patch.x, corner[1] - rows[0] + top - patch.y
        if (width, height) == (columns[1] - columns[0], rows[1] - rows[0]):
            return resample(patch.pixels, start, step, size)
        pixels = np.full((rows[1] - rows[0], columns[1] - columns[0], 3), WHITE, np.uint8)
        pixels[top - rows[0] :, left - columns[0] :][:height, :width] = patch.pixels
        return resample(pixels, start, step, size)


def _span(corner: float, step: float, count: int) -> tuple[int, int]:
    """The first pixel touched and the one behind the last; magnified pixels are interpolated with their neighbours."""
    margin = int(step < 1)
    return math.floor(corner + CLOSE_PX) - margin, math.ceil(corner + step * count - CLOSE_PX) + margin


def _within(span: tuple[int, int], limit: int) -> tuple[int, int]:
    """Where the part of a span begins that lies from 0 to the limit, and how long it is."""
    begin = min(max(span[0], 0), limit)
    return begin, max(min(span[1], limit) - begin, 0)


def open_slide(path: Path, microns_per_pixel: float | None = None) -> Slide:
    """The slide in a file, or in a folder that holds one DICOM series; its resolution as it says or as is stated."""
    source = _source(_first_file(path))
    try:
        slide = Slide(path, source, microns_per_pixel)
    except BaseException:
        source.close()
        raise
    logger.debug("%s: %d levels, %s", slide.id, len(slide.levels), slide.reader)
    return slide


def _source(path: Path) -> Source:
    """OpenSlide where it knows the file and all that is in it; tifffile for the TIFFs it does not."""
    import openslide  # 20 MB of library, and tifffile: loaded where a slide is opened

    from .announced import refuse_senseless
    from .tiffs import TiffSource, quicker
    from .vendors import VendorSource

    if not path.is_file():
        raise SlideError(f"{path} is not there; a slide is needed. Look at the spelling.", "no_scan")
    refuse_senseless(path)
    try:
        source = VendorSource(path)
    except openslide.OpenSlideError as error:
        if path.suffix.lower() in TIFF_SUFFIXES:
            return TiffSource(path)
        raise damaged(path, f"OpenSlide cannot open it ({error})") from error
    if source.is_ome:  # OpenSlide would see its finest level alone, and not what OME says of the resolution
        source.close()
        return TiffSource(path)
    return quicker(source)


def _first_file(path: Path) -> Path:
    """The file by which a slide is opened: itself, or any one of a folder of DICOM."""
    if not path.is_dir():
        return path
    series = files_of(path)
    if not series:
        raise SlideError(
            f"{path} is a folder that does not hold exactly one DICOM slide; a slide is needed. Name one file of it.",
            "mixed",
        )
    return series[0]
