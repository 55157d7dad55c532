"""A square picture of a validation case: what was drawn by hand, and what the network found."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Integer, UInt8
from PIL import Image, ImageDraw, ImageFont

from preprocessing.plan import Label

SIDE = 640
"""Pixels. MLflow's cards show squares best."""
HEAD = 40


def compare(
    image: Float[np.ndarray, "channel i j k"],
    truth: Integer[np.ndarray, "i j k"],
    found: Integer[np.ndarray, "i j k"],
    labels: Sequence[Label],
    spacing_mm: tuple[float, float, float],
) -> UInt8[np.ndarray, "h w 3"]:
    """The axial slice with most to find: contours by hand in white, by the network in each label's colour.

    The case comes as the network sees it, turned to Right-Anterior-Superior; it is shown as a radiologist looks at it.
    """
    k = int(np.argmax((truth > 0).sum(axis=(0, 1)) + (found > 0).sum(axis=(0, 1)) / 2))
    grey = image[0, :, :, k]
    low, high = np.percentile(image[0], [1, 99.5])
    shade = np.uint8(255 * np.clip((grey - low) / max(high - low, 1e-6), 0, 1))
    room = SIDE - HEAD
    extent = np.array(grey.shape) * spacing_mm[:2]
    size = np.maximum(1, np.round(extent * room / extent.max())).astype(int)

    canvas = np.array(_shown(shade, size, Image.Resampling.BICUBIC).convert("RGB"))
    for number, label in enumerate(labels, start=1):
        canvas[_edge(np.array(_shown(truth[:, :, k] == number, size, Image.Resampling.NEAREST)) > 0)] = (255, 255, 255)
        canvas[_edge(np.array(_shown(found[:, :, k] == number, size, Image.Resampling.NEAREST)) > 0)] = label.colour
    square = Image.new("RGB", (SIDE, SIDE))
    square.paste(Image.fromarray(canvas), ((SIDE - int(size[0])) // 2, HEAD + (room - int(size[1])) // 2))
    _legend(square, labels)
    return np.array(square)


def _shown(plane: np.ndarray, size: np.ndarray, how: Image.Resampling) -> Image.Image:
    """[Right, Anterior] turned so that the patient's right is on the left and anterior on top."""
    turned = np.ascontiguousarray(plane[::-1, ::-1].T.astype(np.uint8))
    return Image.fromarray(turned * (255 if plane.dtype == bool else 1)).resize((int(size[0]), int(size[1])), how)


def _edge(mask: Bool[np.ndarray, "h w"], width: int = 3) -> Bool[np.ndarray, "h w"]:
    """The outermost pixels of a mask."""
    inner = mask
    for _ in range(width):
        grown = np.pad(inner, 1)
        inner = grown[1:-1, 1:-1] & grown[:-2, 1:-1] & grown[2:, 1:-1] & grown[1:-1, :-2] & grown[1:-1, 2:]
    return mask & ~inner


def _legend(square: Image.Image, labels: Sequence[Label]) -> None:
    draw, font = ImageDraw.Draw(square), ImageFont.load_default(size=24)
    place = 8.0
    for words, colour in [("by hand", (255, 255, 255)), *((label.name, label.colour) for label in labels)]:
        draw.text((place, 6), words, fill=colour, font=font)
        place += draw.textlength(words, font=font) + 18
