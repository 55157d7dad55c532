"""Voxels onto a finer or coarser grid of the same extent, one axis at a time.

A separable resampling is a matrix per axis. Both grids cover the same millimetres edge to edge, so voxel centres map as
x_before = (x_after + 1/2) * before / after - 1/2, and what lies outside the outermost centres repeats the edge.
"""

from functools import lru_cache

import numpy as np
from jaxtyping import Float, Integer, Shaped
from scipy import ndimage

from .volume import Geometry


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
