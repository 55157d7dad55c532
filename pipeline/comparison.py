"""A picture of a validation case: what was drawn by hand, and what the network found."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Integer, UInt8
from PIL import Image, ImageDraw, ImageFont

from preprocessing.plan import Label

from .gallery import shades, shown

SIDE, HEAD = 512, 40
"""Pixels: two squares under a line of words, a third below them. A card of MLflow's shows the upper two thirds of a square
picture, and cuts a wide one through its middle."""


def compare(
    image: Float[np.ndarray, "channel i j k"],
    truth: Integer[np.ndarray, "i j k"],
    found: Integer[np.ndarray, "i j k"],
    labels: Sequence[Label],
    spacing_mm: tuple[float, float, float],
    words: str = "",
) -> UInt8[np.ndarray, "h w 3"]:
    """The axial, the coronal and the sagittal slice with most to find: contours by hand in white, by the network in each label's colour.

    The case comes as the network sees it, turned to Right-Anterior-Superior; it is shown as a radiologist looks at it.
    """
    shade = shades(image[0])
    sheet = Image.new("RGB", (2 * SIDE, 2 * SIDE + HEAD))
    # axial and coronal on top, where the card shows them; sagittal in the middle below
    for through, centre, top in ((2, SIDE // 2, HEAD), (1, 3 * SIDE // 2, HEAD), (0, SIDE, HEAD + SIDE)):
        others = tuple(axis for axis in range(3) if axis != through)
        index = int(np.argmax((truth > 0).sum(axis=others) + (found > 0).sum(axis=others) / 2))
        planes = [np.take(volume, index, axis=through) for volume in (shade, truth, found)]
        panel = _panel(planes, labels, np.array(spacing_mm)[list(others)])
        sheet.paste(panel, (centre - panel.width // 2, top + (SIDE - panel.height) // 2))
    _legend(sheet, labels, words)
    return np.array(sheet)


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


def _legend(picture: Image.Image, labels: Sequence[Label], words: str) -> None:
    """Whose line is which; at the right end what is said of the picture, over whatever lies there."""
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=24)
    place = 8.0
    for name, colour in [("by hand", (255, 255, 255)), *((label.name, label.colour) for label in labels)]:
        draw.text((place, 6), name, fill=colour, font=font)
        place += draw.textlength(name, font=font) + 18
    if words:
        left = picture.width - draw.textlength(words, font=font) - 8
        draw.rectangle((left - 10, 0, picture.width, HEAD - 1), fill=(0, 0, 0))
        draw.text((left, 6), words, fill=(255, 255, 255), font=font)
