"""Where labels lie in a map in which a region may be painted over by the regions within it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Integer
from scipy import ndimage

from .components import TOUCHING
from .plan import Label

Box = tuple[slice, slice, slice]


def values_of(labels: Sequence[Label]) -> dict[str, tuple[int, ...]]:
    """Per label, the values in a label map that count as it: its own, and those of regions that lie within it."""
    parts = {label.name: set(label.parts or (label.value,)) for label in labels}
    return {
        outer.name: tuple(inner.value for inner in labels if parts[inner.name] <= parts[outer.name]) for outer in labels
    }


def names_in_map(labels: Sequence[Label]) -> dict[str, str]:
    """A voxel of a label map has one number: a region is called there by what is left of it."""
    inner = {
        label.name: [each.name for each in labels if each.value in values and each != label]
        for label, values in zip(labels, values_of(labels).values(), strict=True)
    }
    return {name: f"{name} without {' and '.join(inside)}" if inside else name for name, inside in inner.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """Where a label was found."""

    start: tuple[int, int, int]
    """The first voxel of its box."""
    mask: Bool[np.ndarray, "i j k"]
    """Its voxels inside the box."""


def places(
    voxels: Integer[np.ndarray, "i j k"], labels: Sequence[Label], among: Sequence[Label] | None = None
) -> Iterator[tuple[Label, Place | None]]:
    """Every label, or those `among` them that are asked for, one at a time; None of one that was not found."""
    boxes = ndimage.find_objects(voxels, max_label=max((label.value for label in labels), default=1))
    values = values_of(labels)
    for label in labels if among is None else among:
        box = around(boxes, values[label.name])
        yield label, box and Place(start=_start(box), mask=carrying(voxels[box], values[label.name]))


def parted(mask: Bool[np.ndarray, "i j k"]) -> tuple[Integer[np.ndarray, "i j k"], Integer[np.ndarray, " part"]]:
    """The connected parts of a mask, numbered from 1, the largest first, and how many voxels each has.

    Of parts of one size the one met first comes first: on one grid a part has the same number in every table and picture.
    """
    met, count = ndimage.label(mask, structure=TOUCHING)
    sizes = np.bincount(met.ravel(), minlength=count + 1)[1:]
    order = np.argsort(-sizes, kind="stable")
    number = np.zeros(count + 1, met.dtype)
    number[order + 1] = np.arange(1, count + 1)
    return number[met], sizes[order]


def around(boxes: Sequence[Box | None], values: Sequence[int]) -> Box | None:
    """The box of several values, from the box of each (`boxes[value - 1]`)."""
    met = [box for value in values if (box := boxes[value - 1])]
    if not met:
        return None
    i, j, k = (slice(min(box[n].start for box in met), max(box[n].stop for box in met)) for n in range(3))
    return i, j, k


def carrying(voxels: Integer[np.ndarray, "*grid"], values: Sequence[int]) -> Bool[np.ndarray, "*grid"]:
    """Which voxels have one of these values."""
    return voxels == values[0] if len(values) == 1 else np.isin(voxels, values)


def _start(box: Box) -> tuple[int, int, int]:
    i, j, k = (side.start for side in box)
    return i, j, k
