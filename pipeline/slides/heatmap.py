"""What every tile adds to the prediction, drawn where the tile lies: for other programs, and for eyes.

heatmap.ome.tiff   float32, two channels (share, attention), on the slide's frame, NaN where there is no tile: QuPath, Fiji
heatmap.tiff       the same as colours over the slide in grey: OpenSlide, and whatever stands on it
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import numpy as np
from jaxtyping import Float, Float32, UInt8
from PIL import Image

from ..outputs import _heat
from .result import Seen, SlideResult

OME_TIFF, TIFF = "heatmap.ome.tiff", "heatmap.tiff"

PIXELS_PER_STEP = 8
"""From one tile to the next: wherever tiles lie, their edges are drawn less than a sixteenth of a tile off; of 112 um tiles
a pixel is 14 um."""
MOST_PIXELS = 4096 * 4096
"""Of a map: 57 mm in square at 14 um, more than a slide of 26 x 76 mm has under its cover slip. Larger ones become coarser."""
FOR_COLOUR, AGAINST_COLOUR = _heat.FOR[0], _heat.AGAINST[0]
"""Of the strongest share of either sign."""
BLOCK = 256
"""Side of a block inside the TIFFs, as most viewers write and read them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeatMap:
    """Shares and attention on the slide's own frame: pixel (0, 0) begins at its top left corner."""

    share: Float32[np.ndarray, "y x"]
    """Of the predicted class; NaN where there is no tile, the mean where tiles overlap."""
    attention: Float32[np.ndarray, "y x"]
    um: float
    """Side of a pixel."""


def heatmap(result: SlideResult) -> HeatMap:
    """The map, as fine as its tiles ask for and a file can bear."""
    (share, attention), um = raster(result, np.stack([result.values, result.attention], axis=1))
    return HeatMap(share=share, attention=attention, um=um)


def raster(seen: Seen, values: Float[np.ndarray, "tile plane"]) -> tuple[Float32[np.ndarray, "plane y x"], float]:
    """Each tile's values where it lies, NaN where none does, the mean where several do; and the side of a pixel."""
    um = seen.step_um / PIXELS_PER_STEP
    while (shape := _shape(seen.frame.size_um, um))[0] * shape[1] > MOST_PIXELS:
        um *= 2
    sums, count = np.zeros((values.shape[1], *shape), np.float32), np.zeros(shape, np.float32)
    start = np.maximum(0, np.rint(seen.positions_um / um).astype(int))
    stop = np.maximum(start + 1, np.rint((seen.positions_um + seen.tile_um) / um).astype(int))
    for (left, top), (right, bottom), added in zip(start, stop, values, strict=True):
        box = slice(top, bottom), slice(left, right)
        count[box] += 1
        for plane, value in zip(sums, added, strict=True):
            plane[box] += value
    count[count == 0] = np.nan
    return sums / count, um


def _shape(size_um: tuple[float, float], um: float) -> tuple[int, int]:
    width, height = (max(1, int(np.ceil(side / um - 1e-6))) for side in size_um)
    return height, width


def write_values(found: HeatMap, result: SlideResult, path: Path) -> Path:
    """The numbers themselves, as OME-TIFF."""
    words = f"What each tile of {result.tile_um:g} um adds to the logit of {result.name}, and its attention"
    names = [f"share of {result.name} (logits)", "attention"]
    return write_planes(np.stack([found.share, found.attention]), found.um, names, words, result, path)


def write_planes(
    planes: Float32[np.ndarray, "plane y x"], um: float, names: list[str], words: str, seen: Seen, path: Path
) -> Path:
    """A pyramid in which each level is the mean of the one below; the same planes give the same bytes."""
    import tifffile

    levels = list(_pyramid(planes))
    how = dict(tile=(BLOCK, BLOCK), compression="zlib", predictor=3, photometric="minisblack")
    with tifffile.TiffWriter(path, ome=True) as file:
        for number, (level, side) in enumerate(_with_um(levels, um)):
            place = dict(resolution=(1e4 / side, 1e4 / side), resolutionunit="CENTIMETER")
            if number:
                file.write(level, subfiletype=1, **place, **how)
            else:
                file.write(level, subifds=len(levels) - 1, metadata=_metadata(names, words, um, seen), **place, **how)
    return path


def _metadata(names: list[str], words: str, um: float, seen: Seen) -> dict[str, Any]:
    size = {f"PhysicalSize{axis}": um for axis in "XY"} | {f"PhysicalSize{axis}Unit": "µm" for axis in "XY"}
    said = (
        f"{words}, by {seen.origin.package_name} ({seen.origin.package_id}). Pixels of {um:g} um from the slide's top left "
        "corner; NaN where there is no tile, the mean where tiles overlap. For research, not for diagnosis."
    )
    own = uuid5(NAMESPACE_URL, f"{seen.frame.sha256} {seen.origin.package_id}")
    return {"axes": "CYX", "Channel": {"Name": names}, "Description": said, "UUID": f"urn:uuid:{own}", **size}


def write_colours(found: HeatMap, result: SlideResult, path: Path) -> Path:
    """What eyes see, as a pyramid of plain RGB."""
    height, width = found.share.shape
    shown = shown_on(grey(resized(result.overview, (width, height))), found, result.full)
    return write_picture(shown, found.um, path)


def write_picture(shown: UInt8[np.ndarray, "h w 3"], um: float, path: Path) -> Path:
    """A pyramid that OpenSlide opens."""
    import tifffile

    levels = [np.moveaxis(level, 0, -1) for level in _pyramid(np.moveaxis(shown, -1, 0).astype(np.float32))]
    with tifffile.TiffWriter(path, ome=False) as file:
        for number, (level, side) in enumerate(_with_um(levels, um)):
            file.write(
                np.rint(level).astype(np.uint8), tile=(BLOCK, BLOCK), compression="zlib", photometric="rgb",
                subfiletype=int(number > 0), resolution=(1e4 / side, 1e4 / side), resolutionunit="CENTIMETER", metadata=None,
            )  # fmt: skip
    return path


def _with_um(levels: list[np.ndarray], um: float) -> Iterator[tuple[np.ndarray, float]]:
    yield from ((level, um * 2**number) for number, level in enumerate(levels))


def _pyramid(planes: Float32[np.ndarray, "c y x"]) -> Iterator[np.ndarray]:
    """The map, and halves of it until one block holds it all. What has no value takes no part in a mean."""
    yield planes
    while max(planes.shape[1:]) > BLOCK:
        channels, height, width = planes.shape
        even = np.pad(planes, ((0, 0), (0, height % 2), (0, width % 2)), mode="edge")
        fours = even.reshape(channels, even.shape[1] // 2, 2, even.shape[2] // 2, 2)
        known = np.isfinite(fours)
        count = known.sum(axis=(2, 4)).astype(np.float32)
        count[count == 0] = np.nan
        planes = np.where(known, fours, 0).sum(axis=(2, 4), dtype=np.float32) / count
        yield planes


def shown_on(picture: UInt8[np.ndarray, "h w 3"], found: HeatMap, full: float) -> UInt8[np.ndarray, "h w 3"]:
    """The picture of the whole slide under the map's colours; bare where there is no tile, or next to nothing in it."""
    height, width = picture.shape[:2]
    rows, columns = (
        np.minimum((np.arange(n) + 0.5) * size / n, size - 1).astype(int)
        for n, size in zip((height, width), found.share.shape, strict=True)
    )
    levels = np.nan_to_num(found.share[np.ix_(rows, columns)]) / (full or 1)
    opacity = _heat.opacity(levels, True)[:, :, None]
    return np.rint((1 - opacity) * picture + opacity * colours(levels)).astype(np.uint8)


def colours(levels: Float[np.ndarray, "*any"]) -> Float[np.ndarray, "*any 3"]:
    """0 to 255, of shares of full scale from -1 to 1."""
    # the house's own, turned round: strongest is darkest, for a slide is bright where a scan is dark
    return _heat.colours(np.copysign(np.maximum(1 - np.abs(levels), 1e-6), levels), True)


def grey(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Under a map its colours alone mean something."""
    return np.asarray(Image.fromarray(picture).convert("L").convert("RGB"))


def resized(picture: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "down across 3"]:
    """On so many pixels across and down, as means of those that become one."""
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX, reducing_gap=None))
