"""How well a mask agrees with its reference: overlap, distance between surfaces, lesions found. Numbers from two masks.

A surface is made of points, in one of two ways. `voxels`, as MONAI has it: the centres of a label's voxels with a face
towards another label or out of the image; all weigh the same. `surfels`, as DeepMind's surface-distance has it: the
corners where voxels inside and outside meet; each weighs as much as the area of marching cubes in the cube around it.
NSD (Nikolov et al. 2018) is the share of both surfaces within the tolerance of the other one. HD is the longest distance
from a point of either surface to the nearest of the other; HD95 the larger of the two directed 95th percentiles (of
voxels interpolated, of surfels the distance within which 95 % of the area lie); ASSD the mean over both surfaces.
A lesion is a connected part (26 neighbours). A lesion of the reference is found when the mask covers a voxel of it; a
lesion of the mask is right when it covers a voxel of the reference. Recall is the share found, precision the share right.

Empty in both: there is nothing to measure, and everything is None. Empty in one: Dice, IoU and NSD are 0; distances do not
exist; lesion F1 is 0, and so is recall where the reference has lesions, precision where the mask has; the other is None.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Integer, UInt8
from scipy import ndimage
from scipy.spatial import cKDTree

from preprocessing.cores import usable_cores

from .lesions import lesions_in, meeting

Spacing = tuple[float, float, float]
Box = tuple[slice, slice, slice]
Surface = Literal["voxels", "surfels"]

ROUNDING_MM = 1e-6
"""Three voxels of 0.1 mm are not farther than 0.3 mm, though 3 * 0.1 > 0.3 in floating point."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """One label of one case. None: there is nothing to measure (see the conventions)."""

    dice: float | None = None
    iou: float | None = None
    nsd: float | None = None
    hd_mm: float | None = None
    hd95_mm: float | None = None
    assd_mm: float | None = None
    lesion_f1: float | None = None
    lesion_precision: float | None = None
    lesion_recall: float | None = None
    lesions: int = 0
    """In the reference."""
    lesions_found: int = 0
    lesions_predicted: int = 0
    lesions_right: int = 0
    voxels: int = 0
    reference_voxels: int = 0


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How distances are taken."""

    spacing: Spacing
    tolerance_mm: float = 1.0
    surface: Surface = "voxels"


def agreement(mask: Bool[np.ndarray, "i j k"], truth: Bool[np.ndarray, "i j k"], measure: Measure) -> Agreement:
    """Every number for one label."""
    box = _around(ndimage.find_objects((mask | truth).view(np.uint8)))
    # surfaces and distances within the box are those of the whole image
    return _measured(mask[box], truth[box], measure) if box else Agreement()


def agreements(
    predicted: Integer[np.ndarray, "i j k"],
    given: Integer[np.ndarray, "i j k"],
    labels: Mapping[str, Sequence[int]],
    measure: Measure,
) -> dict[str, Agreement]:
    """Every number for every label of two label maps. A label is one value, or a region: several values together.

    The maps are passed over once; then each label is looked at inside its own box, on every core.
    """
    boxes = [ndimage.find_objects(each) for each in (predicted, given)]
    around = {
        name: _around([each[value - 1] for each in boxes for value in values if value <= len(each)])
        for name, values in labels.items()
    }

    def measured(name: str) -> Agreement:
        box = around[name]
        if box is None:
            return Agreement()
        mask, truth = (_where(each[box], labels[name]) for each in (predicted, given))
        return _measured(mask, truth, measure)

    largest_first = sorted(labels, key=lambda name: -_size(around[name]))
    with ThreadPoolExecutor(usable_cores()) as pool:  # numpy and the search for neighbours let other threads run
        found = dict(zip(largest_first, pool.map(measured, largest_first), strict=True))
    return {name: found[name] for name in labels}


def dice(mask: Bool[np.ndarray, "i j k"], truth: Bool[np.ndarray, "i j k"]) -> float | None:
    """Twice the overlap over the sum of both; None where both are empty."""
    total = np.count_nonzero(mask) + np.count_nonzero(truth)
    return 2 * np.count_nonzero(mask & truth) / total if total else None


def surface_voxels(mask: Bool[np.ndarray, "i j k"]) -> Bool[np.ndarray, "i j k"]:
    """The voxels with a face towards another label; beyond the image counts as outside."""
    inner = mask.copy()
    for axis in range(3):
        inside, whole = np.moveaxis(inner, axis, 0), np.moveaxis(mask, axis, 0)
        inside[1:] &= whole[:-1]
        inside[:-1] &= whole[1:]
        inside[0] = inside[-1] = False
    return mask & ~inner


def surface_corners(mask: Bool[np.ndarray, "i j k"]) -> UInt8[np.ndarray, "i1 j1 k1"]:
    """Which of the eight voxels around every corner are inside, a bit for each: 0 and 255 are no surface."""
    i, j, k = mask.shape
    padded = np.pad(mask, 1)
    bits = np.zeros((i + 1, j + 1, k + 1), np.uint8)
    for number, (di, dj, dk) in enumerate(product((1, 0), repeat=3)):
        bits |= padded[di : di + i + 1, dj : dj + j + 1, dk : dk + k + 1].view(np.uint8) << number
    return bits


def distances(
    points: Bool[np.ndarray, "i j k"], others: Bool[np.ndarray, "i j k"], spacing: Spacing
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " n"]]:
    """Millimetres from each point of either set to the nearest of the other; neither may be empty."""
    return _nearest(points, others, spacing), _nearest(others, points, spacing)


def _nearest(points: Bool[np.ndarray, "i j k"], others: Bool[np.ndarray, "i j k"], spacing: Spacing) -> np.ndarray:
    # only from points that are not in both: a tree of surface points is many times faster than a distance to every voxel
    places = np.flatnonzero(points)
    apart = ~others.ravel()[places]
    millimetres = np.zeros(len(places))
    if apart.any():
        here, there = (
            np.stack(np.unravel_index(each, points.shape), axis=1) for each in (places[apart], np.flatnonzero(others))
        )
        tree = cKDTree(there * np.array(spacing), balanced_tree=False, compact_nodes=False)
        _, nearest = tree.query(here * np.array(spacing))
        # from whole numbers of voxels: a difference of millimetres would carry their rounding
        millimetres[apart] = np.sqrt((((here - there[nearest]) * np.array(spacing)) ** 2).sum(axis=1))
    return millimetres


def _measured(mask: Bool[np.ndarray, "i j k"], truth: Bool[np.ndarray, "i j k"], measure: Measure) -> Agreement:
    voxels, reference_voxels = int(np.count_nonzero(mask)), int(np.count_nonzero(truth))
    if not (voxels or reference_voxels):
        return Agreement()
    shared = int(np.count_nonzero(mask & truth))
    fields: dict[str, Any] = {
        "dice": 2 * shared / (voxels + reference_voxels),
        "iou": shared / (voxels + reference_voxels - shared),
        **(APART[measure.surface](mask, truth, measure) if voxels and reference_voxels else {"nsd": 0.0}),
        **_lesions(mask, truth),
    }
    return Agreement(**fields, voxels=voxels, reference_voxels=reference_voxels)


def _of_voxels(mask: Bool[np.ndarray, "i j k"], truth: Bool[np.ndarray, "i j k"], measure: Measure) -> dict[str, float]:
    both = distances(surface_voxels(mask), surface_voxels(truth), measure.spacing)
    count = sum(map(len, both))
    return {
        "nsd": sum(int((each <= measure.tolerance_mm + ROUNDING_MM).sum()) for each in both) / count,
        "hd_mm": max(float(each.max()) for each in both),
        "hd95_mm": max(float(np.percentile(each, 95)) for each in both),
        "assd_mm": sum(float(each.sum()) for each in both) / count,
    }


def _of_surfels(
    mask: Bool[np.ndarray, "i j k"], truth: Bool[np.ndarray, "i j k"], measure: Measure
) -> dict[str, float]:
    corners = [surface_corners(each) for each in (mask, truth)]
    points = [(each > 0) & (each < 255) for each in corners]
    areas = [_areas(measure.spacing)[each[there]] for each, there in zip(corners, points, strict=True)]
    both = distances(points[0], points[1], measure.spacing)
    whole = sum(float(area.sum()) for area in areas)
    pairs = list(zip(both, areas, strict=True))
    return {
        "nsd": sum(float(a[d <= measure.tolerance_mm + ROUNDING_MM].sum()) for d, a in pairs) / whole,
        "hd_mm": max(float(d.max()) for d in both),
        "hd95_mm": max(_within(d, a, 0.95) for d, a in pairs),
        "assd_mm": sum(float((d * a).sum()) for d, a in pairs) / whole,
    }


APART = {"voxels": _of_voxels, "surfels": _of_surfels}


def _within(millimetres: Float[np.ndarray, " n"], areas: Float[np.ndarray, " n"], share: float) -> float:
    """The distance within which so much of the area lies."""
    order = np.argsort(millimetres)
    covered = np.cumsum(areas[order])
    place = int(np.searchsorted(covered, share * covered[-1]))
    return float(millimetres[order[min(place, len(order) - 1)]])


@lru_cache
def _areas(spacing: Spacing) -> Float[np.ndarray, " bits"]:
    """Square millimetres of marching cubes' triangles, for each of the 256 ways in which eight voxels can be filled.

    MONAI carries DeepMind's table; one of our own would triangulate otherwise and give other numbers.
    """
    from monai.metrics.utils import create_table_neighbour_code_to_surface_area

    return create_table_neighbour_code_to_surface_area(list(spacing))[0].double().numpy()


def _lesions(mask: Bool[np.ndarray, "i j k"], truth: Bool[np.ndarray, "i j k"]) -> dict[str, float | int | None]:
    predicted, given = lesions_in(mask), lesions_in(truth)
    right, found = (int(each.sum()) for each in meeting(predicted, given))
    precision = right / predicted.count if predicted.count else None
    recall = found / given.count if given.count else None
    # a mask without a reference, or the other way round, has found nothing
    both = (precision or 0.0) + (recall or 0.0)
    return {
        "lesion_f1": 2 * (precision or 0.0) * (recall or 0.0) / both if both else 0.0,
        "lesion_precision": precision,
        "lesion_recall": recall,
        "lesions": given.count,
        "lesions_found": found,
        "lesions_predicted": predicted.count,
        "lesions_right": right,
    }


def _where(labels: Integer[np.ndarray, "i j k"], values: Sequence[int]) -> Bool[np.ndarray, "i j k"]:
    return labels == values[0] if len(values) == 1 else np.isin(labels, values)


def _around(boxes: Sequence[Box | None]) -> Box | None:
    """The smallest box around all."""
    there = [box for box in boxes if box]
    if not there:
        return None
    i, j, k = (slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*there, strict=True))
    return i, j, k


def _size(box: Box | None) -> int:
    return int(np.prod([side.stop - side.start for side in box])) if box else 0
