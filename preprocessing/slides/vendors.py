"""Slides of every scanner, and DICOM, through OpenSlide."""

import threading
from pathlib import Path

import numpy as np
import openslide
from jaxtyping import UInt8
from PIL import Image

from .source import Layout, Patch, Source, damaged, whole_factor

CACHE_BYTES = 128 << 20
"""Decoded blocks OpenSlide keeps per slide: tiles share those at their edges with the row below. Its own 32 MiB are filled
by 128 blocks, a row of tiles across 10,000 pixels."""


class VendorSource(Source):
    """A slide as OpenSlide opens it.

    After one damaged block OpenSlide refuses all further reads through the same handle, also those of other threads.
    A failed read is therefore tried once more through a handle nobody else has: only what fails there is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._cache = openslide.OpenSlideCache(CACHE_BYTES)
        self._handle: openslide.OpenSlide | None = self._opened()
        self._downsamples = self._handle.level_downsamples
        self.layout = _layout(self._handle)
        self.vendor = self._handle.properties.get(openslide.PROPERTY_NAME_VENDOR, "")
        self.is_ome = "<OME" in self._handle.properties.get("tiff.ImageDescription", "")

    def read(self, level: int, left: int, top: int, width: int, height: int) -> Patch:
        factor = self._downsamples[level]
        corner = round(left * factor), round(top * factor)  # OpenSlide counts in pixels of level 0
        try:
            handle = self._usable()
            picture = self._read(handle, corner, level, (width, height))
        except openslide.OpenSlideError as error:
            raise damaged(self.path, f"level {level} cannot be read at pixel {corner} ({error})") from error
        return Patch(on_white(picture), corner[0] / factor, corner[1] / factor)

    def close(self) -> None:
        with self._lock:
            self._handle = None  # it is closed when the last thread that still reads lets go of it

    def _usable(self) -> openslide.OpenSlide:
        with self._lock:
            if self._handle is None:
                self._handle = self._opened()
            return self._handle

    def _read(
        self, handle: openslide.OpenSlide, corner: tuple[int, int], level: int, size: tuple[int, int]
    ) -> Image.Image:
        try:
            return handle.read_region(corner, level, size)
        except openslide.OpenSlideError:
            with self._lock:
                if self._handle is handle:
                    self._handle = None
        own = self._opened()
        picture = own.read_region(corner, level, size)
        with self._lock:
            self._handle = self._handle or own
        return picture

    def _opened(self) -> openslide.OpenSlide:
        handle = openslide.OpenSlide(self.path)
        handle.set_cache(self._cache)
        return handle


def on_white(picture: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """Where nothing was scanned a slide is clear, and clear is glass."""
    clear = picture.getchannel("A").getextrema() != (255, 255)
    if clear:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.asarray(picture.convert("RGB"))


def _layout(handle: openslide.OpenSlide) -> Layout:
    properties, sizes = handle.properties, handle.level_dimensions
    bounds = [properties.get(f"openslide.bounds-{side}") for side in ("x", "y", "width", "height")]
    left, top, width, height = (int(side or 0) for side in bounds)
    x, y = (float(properties.get(name) or 0) for name in (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y))
    power = properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER)
    silent = f"names an objective of {power}x, which is no resolution" if power else "says nothing of its resolution"
    return Layout(
        sizes=tuple(sizes),
        factors=tuple(whole_factor(sizes[0], size) for size in sizes),
        field_px=(left, top, width, height) if width and height else (0, 0, *sizes[0]),
        said=(x, y) if x and y else None,
        said_where="says" if x and y else silent,
        reader=f"OpenSlide {openslide.__library_version__}, {properties.get(openslide.PROPERTY_NAME_VENDOR, '')}",
    )
