"""Voxels onto another grid: a finer or coarser one of the same extent, or any other in the patient.

To a grid of the same extent voxels go one axis at a time (`resample`): a separable resampling is a matrix per axis. Both
grids cover the same millimetres edge to edge, so voxel centres map as x_before = (x_after + 1/2) * before / after - 1/2,
and what lies outside the outermost centres repeats the edge.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from itertools import permutations

import numpy as np
from jaxtyping import Float, Integer, Shaped
from scipy import ndimage

from .volume import CORNER_TOLERANCE_MM, Geometry, ScanError, Volume

SHEAR_LIMIT = 4
"""How many times as large a straight grid may be as the sheared one it surrounds: one of 45 degrees is twice as large."""


def resized(geometry: Geometry, shape: tuple[int, int, int]) -> Geometry:
    """The same box in the patient cut into another number of voxels."""
    scale = np.array(geometry.shape) / np.array(shape)
    affine = geometry.affine.copy()
    affine[:3, :3] = geometry.affine[:3, :3] * scale
    affine[:3, 3] = geometry.to_world((scale - 1) / 2)
    return Geometry(shape=shape, affine=affine)


def resample(
    voxels: Shaped[np.ndarray, "channel i j k"], shape: tuple[int, int, int], *, order: int
) -> Float[np.ndarray, "channel a b c"]:
    """Interpolated voxels: order 1 keeps probabilities between 0 and 1, order 3 keeps the sharpness of a scan."""
    out = voxels.astype(np.float32, copy=False)
    shrinking_first = sorted(range(3), key=lambda axis: shape[axis] / voxels.shape[axis + 1])
    for axis in shrinking_first:
        if out.shape[axis + 1] != shape[axis]:
            matrix = _weights(out.shape[axis + 1], shape[axis], order)
            out = np.moveaxis(np.tensordot(matrix, out, axes=(1, axis + 1)), 0, axis + 1)
    return np.ascontiguousarray(out)


def resample_labels(
    voxels: Integer[np.ndarray, "1 i j k"], shape: tuple[int, int, int]
) -> Integer[np.ndarray, "1 a b c"]:
    """Each label interpolated by itself, the strongest wins: smooth borders, and no label that was not there before."""
    if voxels.shape[1:] == shape:
        return voxels
    winner = np.zeros((1, *shape), dtype=voxels.dtype)
    strongest = np.full((1, *shape), -np.inf, dtype=np.float32)
    for value in np.unique(voxels):
        share = resample(voxels == value, shape, order=1)
        stronger = share > strongest + 1e-6  # a tie stays with the lower label, whatever the rounding
        winner[stronger] = value
        np.maximum(strongest, share, out=strongest)
    return winner


def onto(volume: Volume, geometry: Geometry, order: int = 1) -> tuple[Volume, float]:
    """The scan on any other grid in the patient, and the share of that grid that lies outside the scan.

    Outside means farther than half a voxel beyond the outermost centres, as in ITK; there each channel gets its lowest
    value. Where voxels only change their order nothing is interpolated, and values stay exactly what they were.
    """
    if order not in (0, 1):
        raise ValueError(f"order {order} was asked for; 0 (nearest) and 1 (linear) are known")
    if _only_reordered(volume.geometry, geometry):
        order = 0
    return _placed_on(volume, geometry, order, outside=volume.voxels.min(axis=(1, 2, 3)))


def labels_onto(labels: Volume, geometry: Geometry) -> tuple[Volume, float]:
    """Labels on any other grid in the patient, each voxel taking the nearest one; 0 outside."""
    return _placed_on(labels, geometry, order=0, outside=np.zeros(len(labels.voxels), labels.voxels.dtype))


def straightened(geometry: Geometry) -> Geometry:
    """The straight grid around a sheared one: the planes of the two axes that meet most nearly at a right angle stay.

    With a tilted gantry these are the slices: each new slice is an old one, shifted in its plane and nothing else.
    """
    stays = min(permutations(range(3)), key=lambda axes: _unfit_to_stay(geometry, axes[0], axes[1]))
    order = list(stays)
    turned, triangle = np.linalg.qr(geometry.affine[:3, :3][:, order])
    signs = np.sign(np.diag(triangle))
    axes = np.empty((3, 3))
    axes[:, order] = (turned * signs) * np.abs(np.diag(triangle))  # each keeps its side and the volume of a voxel
    places = geometry.corners_mm @ np.linalg.inv(axes).T
    first, last = places.min(axis=0), places.max(axis=0)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes, axes @ first
    shape = np.ceil(last - first - 1e-3) + 1
    if not np.prod(shape) <= SHEAR_LIMIT * np.prod(geometry.shape):
        raise ScanError(
            f"The axes of {geometry} meet so flatly that a straight grid around it would be more than "
            f"{SHEAR_LIMIT} times as large; axes nearer to a right angle are needed. Look at how it was exported.",
            "tilted",
        )
    i, j, k = shape.astype(int)
    return Geometry(shape=(int(i), int(j), int(k)), affine=affine)


def _unfit_to_stay(geometry: Geometry, one: int, other: int) -> tuple[float, float, int]:
    """How far two axes are from a right angle, then how coarse: across a coarse axis interpolation costs most."""
    cosine = abs(float(geometry.direction[:, one] @ geometry.direction[:, other]))
    return round(cosine, 4), geometry.spacing[one] * geometry.spacing[other], one


def _only_reordered(before: Geometry, after: Geometry) -> bool:
    """Whether every voxel centre of one grid, as far as both reach, is a voxel centre of the other."""
    matrix, start = _between(before, after)
    whole = np.round(matrix), np.round(start)
    if not (np.abs(whole[0]).sum(axis=0) == 1).all() or not (np.abs(whole[0]).sum(axis=1) == 1).all():
        return False
    last = np.array(list(np.ndindex(2, 2, 2))) * (np.array(after.shape) - 1)
    missed = last @ (matrix - whole[0]).T + (start - whole[1])
    return bool(np.abs(missed @ before.affine[:3, :3].T).max() <= CORNER_TOLERANCE_MM)


def _between(before: Geometry, after: Geometry) -> tuple[Float[np.ndarray, "3 3"], Float[np.ndarray, " 3"]]:
    """What takes voxel indices of the new grid to those of the old one."""
    matrix = np.linalg.solve(before.affine[:3, :3], after.affine[:3, :3])
    return matrix, before.to_voxel(after.affine[:3, 3])


def _placed_on(
    volume: Volume, geometry: Geometry, order: int, outside: Shaped[np.ndarray, " channel"]
) -> tuple[Volume, float]:
    kind = np.dtype(np.float32) if order else volume.voxels.dtype
    voxels = np.empty((len(volume.voxels), *geometry.shape), kind, order="F")
    matrix, start = _between(volume.geometry, geometry)

    def place(k: int) -> int:  # slab by slab: indices of a whole grid in float64 may not fit
        missed = _missed(matrix, start, k, geometry.shape[:2], volume.geometry.shape)
        for channel, lowest, slab in zip(volume.voxels, outside, voxels[..., k], strict=True):
            if not missed.all():
                ndimage.affine_transform(
                    channel, matrix, start + matrix[:, 2] * k, (*slab.shape, 1), slab[..., None], order, "nearest"
                )
            slab[missed] = lowest
        return int(missed.sum())

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # scipy lets other threads run
        beyond = sum(pool.map(place, range(geometry.shape[2])))
    provenance = replace(volume.provenance, slices=())
    there = replace(volume, voxels=voxels, geometry=geometry, provenance=provenance)
    return there, beyond / float(np.prod(geometry.shape))


def _missed(
    matrix: Float[np.ndarray, "3 3"],
    start: Float[np.ndarray, " 3"],
    k: int,
    plane: tuple[int, int],
    shape: tuple[int, int, int],
) -> Shaped[np.ndarray, "i j"]:
    """Which voxels of plane k have no voxel of the old grid within half a voxel along every axis."""
    missed = np.zeros(plane, bool)
    rows, columns = np.arange(plane[0])[:, None], np.arange(plane[1])
    for axis, size in enumerate(shape):
        place = matrix[axis, 0] * rows + matrix[axis, 1] * columns + (matrix[axis, 2] * k + start[axis])
        missed |= (place < -0.5 - 1e-6) | (
            place > size - 0.5 + 1e-6
        )  # on the very edge is inside, whatever the rounding
    return missed


@lru_cache(maxsize=64)
def _weights(before: int, after: int, order: int) -> Float[np.ndarray, "after before"]:
    """Row a holds what each old voxel gives to new voxel a."""
    if order not in (1, 3):
        raise ValueError(f"order {order} was asked for; 1 (linear) and 3 (cubic spline) are known")
    places = np.clip((np.arange(after) + 0.5) * before / after - 0.5, 0, before - 1)
    first = np.floor(places).astype(int)
    matrix = np.zeros((after, before))
    # scipy's prefilter applied to every unit vector at once turns "values" into "spline coefficients"
    unit = np.eye(before)
    coefficients = ndimage.spline_filter1d(unit, 3, axis=0, mode="mirror") if order == 3 and before > 1 else unit
    for step in range(-1, 3) if order == 3 else range(2):
        share = _bspline(places - (first + step), order)
        matrix += share[:, None] * coefficients[_mirrored(first + step, before)]
    return matrix.astype(np.float32)


def _bspline(x: Float[np.ndarray, " n"], order: int) -> Float[np.ndarray, " n"]:
    x = np.abs(x)
    if order == 1:
        return np.clip(1 - x, 0, None)
    near, far = 2 / 3 - x**2 + x**3 / 2, np.clip(2 - x, 0, None) ** 3 / 6
    return np.where(x < 1, near, far)


def _mirrored(index: Integer[np.ndarray, " n"], size: int) -> Integer[np.ndarray, " n"]:
    """Indices beyond an end come back in, the edge itself counted once (scipy's 'mirror')."""
    if size == 1:
        return np.zeros_like(index)
    index = np.abs(index) % (2 * (size - 1))
    return np.where(index < size, index, 2 * (size - 1) - index)
