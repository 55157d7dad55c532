"""A picture of a validation case: what was drawn by hand, and what the network found."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Integer, UInt8
from PIL import Image, ImageDraw, ImageFont

from preprocessing.plan import Label

from .gallery import shades, shown

SIDE, HEAD = 512, 40
"""Pixels: two squares beside each other under a line of words. MLflow's cards show pictures twice as wide as high best."""


def compare(
    image: Float[np.ndarray, "channel i j k"],
    truth: Integer[np.ndarray, "i j k"],
    found: Integer[np.ndarray, "i j k"],
    labels: Sequence[Label],
    spacing_mm: tuple[float, float, float],
) -> UInt8[np.ndarray, "h w 3"]:
    """The axial and the coronal slice with most to find: contours by hand in white, by the network in each label's colour.

    The case comes as the network sees it, turned to Right-Anterior-Superior; it is shown as a radiologist looks at it.
    """
    shade = shades(image[0])
    wide = Image.new("RGB", (2 * SIDE, SIDE + HEAD))
    for number, through in enumerate((2, 1)):  # axial, coronal
        others = tuple(axis for axis in range(3) if axis != through)
        index = int(np.argmax((truth > 0).sum(axis=others) + (found > 0).sum(axis=others) / 2))
        planes = [np.take(volume, index, axis=through) for volume in (shade, truth, found)]
        panel = _panel(planes, labels, np.array(spacing_mm)[list(others)])
        wide.paste(panel, (number * SIDE + (SIDE - panel.width) // 2, HEAD + (SIDE - panel.height) // 2))
    _legend(wide, labels)
    return np.array(wide)


def _panel(planes: Sequence[np.ndarray], labels: Sequence[Label], spacing_mm: np.ndarray) -> Image.Image:
    shade, truth, found = planes
    extent = np.array(shade.shape) * spacing_mm
    size = np.maximum(1, np.round(extent * (SIDE - 8) / extent.max())).astype(int)
    canvas = np.array(shown(shade, size, Image.Resampling.BICUBIC).convert("RGB"))
    for number, label in enumerate(labels, start=1):
        canvas[_edge(_mask(truth, number, size))] = (255, 255, 255)
        canvas[_edge(_mask(found, number, size))] = label.colour
    return Image.fromarray(canvas)


def _mask(plane: Integer[np.ndarray, "across down"], number: int, size: np.ndarray) -> Bool[np.ndarray, "h w"]:
    return np.array(shown((plane == number).astype(np.uint8), size, Image.Resampling.NEAREST)) > 0


def _edge(mask: Bool[np.ndarray, "h w"], width: int = 3) -> Bool[np.ndarray, "h w"]:
    """The outermost pixels of a mask."""
    inner = mask
    for _ in range(width):
        grown = np.pad(inner, 1)
        inner = grown[1:-1, 1:-1] & grown[:-2, 1:-1] & grown[2:, 1:-1] & grown[1:-1, :-2] & grown[1:-1, 2:]
    return mask & ~inner


def _legend(picture: Image.Image, labels: Sequence[Label]) -> None:
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=24)
    place = 8.0
    for words, colour in [("by hand", (255, 255, 255)), *((label.name, label.colour) for label in labels)]:
        draw.text((place, 6), words, fill=colour, font=font)
        place += draw.textlength(words, font=font) + 18
