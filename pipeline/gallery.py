"""Where a prediction is worst, as a picture: the reference filled, the prediction as a line, in one colour per label."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Integer, UInt8
from PIL import Image
from scipy import ndimage

from preprocessing.declared import PALETTE
from preprocessing.volume import Volume

from .outputs import _planes
from .references import Maps

SIDE, GAP, LINE = 360, 8, 2
"""Pixels of each of the three planes, between them, and of a contour."""
FILL = 0.4
MARGIN_MM = 12.0
"""What is seen around the labels."""


def colour(number: int) -> tuple[int, int, int]:
    """Of the label of that number, from 0."""
    return PALETTE[number % len(PALETTE)]


def picture(maps: Maps, labels: Mapping[str, Sequence[int]], image: Volume | None) -> bytes:
    """A PNG of the axial, coronal and sagittal slice with most voxels wrong, as a radiologist looks at them."""
    grey = image.voxels[0] if image is not None and image.geometry.matches(maps.geometry) else None
    behind = np.zeros(maps.predicted.shape, np.uint8) if grey is None else grey
    predicted, given, scan = (
        _planes.along_patient(each, maps.geometry) for each in (maps.predicted, maps.given, behind)
    )
    spacing = np.array([maps.geometry.spacing[axis] for _, axis, _ in maps.geometry.axis_order()])
    every = [value for values in labels.values() for value in values]
    box = _surroundings(np.isin(predicted, every) | np.isin(given, every), spacing)
    predicted, given, scan = predicted[box], given[box], scan[box]
    shade = shades(scan)
    wrong = _wrong(predicted, given, labels)
    looked_at = wrong if wrong.any() else np.isin(given, every)
    planes = []
    for through in (2, 1, 0):  # axial, coronal, sagittal
        others = tuple(axis for axis in range(3) if axis != through)
        index = int(np.argmax(looked_at.sum(axis=others)))
        cut = [np.take(each, index, axis=through) for each in (shade, given, predicted)]
        planes.append(_plane(cut[0], cut[1], cut[2], labels, spacing[list(others)]))
    sheet = Image.new("RGB", (3 * SIDE + 2 * GAP, max(plane.height for plane in planes)))
    for number, plane in enumerate(planes):
        left = number * (SIDE + GAP) + (SIDE - plane.width) // 2
        sheet.paste(plane, (left, (sheet.height - plane.height) // 2))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", compress_level=5)
    return buffer.getvalue()


def _surroundings(mask: Bool[np.ndarray, "x y z"], spacing: Float[np.ndarray, " 3"]) -> tuple[slice, slice, slice]:
    found = ndimage.find_objects(mask.view(np.uint8))
    if not found:
        return slice(None), slice(None), slice(None)
    widest = max((side.stop - side.start) * mm for side, mm in zip(found[0], spacing, strict=True))
    margins = [int(np.ceil(max(MARGIN_MM, 0.15 * widest) / mm)) for mm in spacing]
    x, y, z = (
        slice(max(0, side.start - margin), side.stop + margin) for side, margin in zip(found[0], margins, strict=True)
    )
    return x, y, z


def _wrong(
    predicted: Integer[np.ndarray, "x y z"], given: Integer[np.ndarray, "x y z"], labels: Mapping[str, Sequence[int]]
) -> Bool[np.ndarray, "x y z"]:
    """Where a label is on one side alone: values that differ may be one region, or nothing that was looked for."""
    wrong = predicted != given
    pairs = predicted[wrong], given[wrong]
    apart = [np.logical_xor(*(np.isin(each, values) for each in pairs)) for values in labels.values()]
    wrong[wrong] = np.any(apart, axis=0)
    return wrong


def shades(scan: np.ndarray) -> UInt8[np.ndarray, "*grid"]:
    """Greys in which all but the brightest and darkest voxels can be told apart, as in the overlay of a case."""
    return _planes.shades(scan, _planes.grey_window(scan, is_ct=False))


def _plane(
    shade: UInt8[np.ndarray, "across down"],
    given: Integer[np.ndarray, "across down"],
    predicted: Integer[np.ndarray, "across down"],
    labels: Mapping[str, Sequence[int]],
    spacing: Float[np.ndarray, " 2"],
) -> Image.Image:
    extent = np.array(shade.shape) * spacing
    size = np.maximum(1, np.round(extent * SIDE / extent.max())).astype(int)
    canvas = np.array(shown(shade, size, Image.Resampling.BICUBIC).convert("RGB")).astype(np.float32)
    lines = np.zeros(canvas.shape[:2], bool), np.zeros_like(canvas)
    for number, values in enumerate(labels.values()):
        inside, drawn = (
            np.array(shown(np.isin(each, values).astype(np.uint8) * 255, size, Image.Resampling.BILINEAR)) > 127
            for each in (given, predicted)
        )
        canvas[inside] = (1 - FILL) * canvas[inside] + FILL * np.array(colour(number))
        # 1 beyond the picture: no contour where the crop cuts a label
        edge = drawn & ~ndimage.binary_erosion(drawn, np.ones((3, 3)), iterations=LINE, border_value=1)
        lines[0][edge], lines[1][edge] = True, colour(number)
    canvas[lines[0]] = lines[1][lines[0]]
    return Image.fromarray(canvas.round().astype(np.uint8))


def shown(plane: UInt8[np.ndarray, "across down"], size: np.ndarray, how: Image.Resampling) -> Image.Image:
    """The patient's right on the left, anterior or superior on top."""
    turned = np.ascontiguousarray(plane[::-1, ::-1].T)
    return Image.fromarray(turned).resize((int(size[0]), int(size[1])), how)
