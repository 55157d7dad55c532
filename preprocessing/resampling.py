"""Voxels onto another grid: a finer or coarser one of the same extent, or any other in the patient.

To a grid of the same extent voxels go one axis at a time (`resample`): a separable resampling is a matrix per axis. Both
grids cover the same millimetres edge to edge, so voxel centres map as x_before = (x_after + 1/2) * before / after - 1/2,
and what lies outside the outermost centres repeats the edge. Nothing is smoothed first: a coarser grid sees the old one
at points, labels and scans alike.
"""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import permutations, product
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Integer, Shaped
from numpy.lib.stride_tricks import sliding_window_view
from scipy import ndimage

from .components import Runs, joined, objects_of, runs_of
from .cores import usable_cores
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
    voxels: Shaped[np.ndarray, "channel i j k"],
    shape: tuple[int, int, int],
    *,
    order: int,
    separate: int | None = None,
) -> Float32[np.ndarray, "channel a b c"]:
    """Interpolated voxels: order 1 keeps probabilities between 0 and 1, order 3 keeps the sharpness of a scan.

    Along the axis `separate` each new voxel takes the nearest old one. Beside the result only slabs are held, and no
    number depends on how many threads share the work.
    """
    return _filled(voxels, shape, order, separate, repeats=False)


def resample_within(
    voxels: Shaped[np.ndarray, "channel i j k"],
    shape: tuple[int, int, int],
    *,
    order: int,
    separate: int | None = None,
) -> Float32[np.ndarray, "channel a b c"]:
    """`resample` as nnU-Net v2 has it from scikit-image: beyond its ends the scan goes on with its last voxel, instead of
    being mirrored there, and nothing leaves the range of the old voxels: of its slice where an axis is separate, else of
    the channel."""
    out = _filled(voxels, shape, order, separate, repeats=True)
    if voxels.shape[1:] == shape:
        return out
    across = tuple(axis for axis in range(4) if axis not in (0, None if separate is None else separate + 1))
    low, high = (
        bound.astype(np.float32) for bound in (voxels.min(across, keepdims=True), voxels.max(across, keepdims=True))
    )
    if separate is not None:
        taken = _nearest(_places(voxels.shape[separate + 1], shape[separate]))
        low, high = (np.take(bound, taken, axis=separate + 1) for bound in (low, high))
    return np.clip(out, low, high, out=out)


def _filled(
    voxels: Shaped[np.ndarray, "channel i j k"],
    shape: tuple[int, int, int],
    order: int,
    separate: int | None,
    repeats: bool,
) -> Float32[np.ndarray, "channel a b c"]:
    if voxels.shape[1:] == shape:
        return np.ascontiguousarray(voxels, np.float32)
    from torch import from_numpy  # not at the top: reading a scan needs no torch

    from kernels.resample import fill

    out = np.empty((len(voxels), *shape), np.float32)
    flipped = tuple(axis for axis in range(3) if voxels.strides[axis + 1] < 0)
    there = np.flip(voxels, tuple(axis + 1 for axis in flipped))
    fill(from_numpy(out), _lent(there), order, separate, flipped, _product, repeats=repeats)
    return out


def resample_labels(
    voxels: Integer[np.ndarray, "1 i j k"], shape: tuple[int, int, int], *, separate: int | None = None
) -> Integer[np.ndarray, "1 a b c"]:
    """Each label interpolated linearly by itself, the strongest wins; a tie goes to the lowest.

    Steps of a border are rounded, except along an axis that alone gets finer: there this is the nearest slice. No label
    appears that was not there, and no object is lost: one that falls between the new voxels is given the voxel nearest
    to its centre (`_restore`). A new voxel sees only the eight old ones around it, and where these agree nothing is
    computed: how many labels there are costs nothing.
    """
    if voxels.shape[1:] == shape:
        return voxels
    out = np.empty((1, *shape), voxels.dtype)
    axes = _slowest_first(voxels[0])
    source, target = voxels[0].transpose(axes), out[0].transpose(axes)
    neighbours = [_neighbours(voxels.shape[axis + 1], shape[axis], axis == separate) for axis in axes]
    before = joined(_at_once(lambda some: runs_of(source[some]), _cut(len(source), 16)))
    after = joined(_at_once(lambda some: _decide(source, target, neighbours, some), _cut(len(target), 16)))
    _restore(out[0], before, after, neighbours, axes)
    return out


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

    with ThreadPoolExecutor(_threads()) as pool:  # scipy lets other threads run
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


# scans: kernels.resample, with numpy's memory and numpy's products


def _lent(voxels: Shaped[np.ndarray, "channel i j k"]) -> Any:
    """The voxels as a tensor that is only read: where they lie, or a copy if torch knows no such array."""
    from torch import from_dlpack, from_numpy

    if voxels.strides[0] >= 0:
        try:
            return from_dlpack(voxels)  # from_numpy warns of what may only be read
        except BufferError:  # bytes in another order; with numpy 2.0, whatever may only be read
            pass
    return from_numpy(voxels.astype(np.float32, order="C"))


ONE_THREAD = 2**18
"""Multiplications in a product that OpenBLAS leaves to the calling thread (its interface/gemm.c); it would divide a
larger one by the number of threads, and the last digit would depend on it."""


def _product(matrix: Any, source: Any, target: Any) -> None:
    """OpenBLAS knows small matrices: with torch's product (MKL) a CT took 1.1 times as long, an MR scan 1.2 times (AMD EPYC,
    one thread)."""
    matrix, source, target = matrix.numpy(), source.numpy(), target.numpy()
    for some in _cut(source.shape[2], max(1, ONE_THREAD // matrix.size)):
        np.matmul(matrix, source[:, :, some], out=target[:, :, some])


# labels: the eight old voxels around each new one

TIE = 1e-6
"""Shares that differ by less are equal, whatever the rounding."""


@dataclass(frozen=True, eq=False)
class _Neighbours:
    """Along one axis, the two old voxels that each new one lies between, and the share of the second."""

    first: Integer[np.ndarray, " new"]
    second: Integer[np.ndarray, " new"]
    share: Float[np.ndarray, " new"]

    @property
    def shares(self) -> Float[np.ndarray, "2 new"]:
        return np.stack([1 - self.share, self.share])


def _neighbours(before: int, after: int, nearest: bool) -> _Neighbours:
    places = _places(before, after)
    first = _nearest(places) if nearest else np.floor(places + TIE / 8).astype(int)
    share = np.zeros(after) if nearest else np.clip(places - first, 0, None)
    share[share < TIE / 8] = 0  # on an old centre, that voxel alone is seen
    return _Neighbours(first, first + (share > 0), share)


def _decide(
    source: Integer[np.ndarray, "p q r"],
    target: Integer[np.ndarray, "a b c"],
    neighbours: Sequence[_Neighbours],
    some: slice,
) -> Runs:
    """Some planes of the result. A cell is what lies between eight old voxels; most have one label at every corner."""
    p, q, r = neighbours
    decided = np.empty((some.stop - some.start, len(q.first), len(r.first)), target.dtype)
    planes, low, is_even = (-1, -1), source[0], np.zeros((0, 0), bool)
    for row, goal in enumerate(decided, some.start):
        if planes != (planes := (int(p.first[row]), int(p.second[row]))):
            low, high = (source[plane] for plane in planes)
            is_even = _even_cells(low, high, across=bool(q.share.any()), along=bool(r.share.any()))
        low.take(q.first, axis=0).take(r.first, axis=1, out=goal, mode="clip")
        b, c = np.nonzero(~is_even.take(q.first, axis=0).take(r.first, axis=1))
        beside = (q.first[b], q.second[b]), (r.first[c], r.second[c])
        corners = np.stack([source[one][two, three] for one, two, three in product(planes, *beside)])
        weights = p.shares[:, row, None, None, None] * q.shares[None, :, None, b] * r.shares[None, None, :, c]
        goal[b, c] = _strongest(corners, weights.reshape(8, -1))
    for row in range(len(q.first)):  # where axes are turned, a few short rows at a time is what caches bear
        target[some, row] = decided[:, row]
    return runs_of(decided)


def _even_cells(
    low: Integer[np.ndarray, "q r"], high: Integer[np.ndarray, "q r"], *, across: bool, along: bool
) -> Bool[np.ndarray, "q r"]:
    """Whether the cells between two planes have one label at every corner; a cell is named by its first corner.

    A cell reaches `across` to the next row and `along` to the next voxel only where something is interpolated there.
    """
    even = low == high
    if across:
        even[:-1] &= (low[:-1] == low[1:]) & even[1:]
    if along:
        even[:, :-1] &= (low[:, :-1] == low[:, 1:]) & even[:, 1:]
    return even


def _strongest(corners: Integer[np.ndarray, "8 n"], weights: Float[np.ndarray, "8 n"]) -> Integer[np.ndarray, " n"]:
    """The label with the greatest sum of weights; of equals the lowest."""
    lowest, highest = corners.min(axis=0), corners.max(axis=0)
    is_highest = corners == highest
    winner = np.where((weights * is_highest).sum(axis=0) > 0.5 + TIE / 2, highest, lowest)
    several = np.flatnonzero((~is_highest & (corners != lowest)).any(axis=0))
    corners, weights = corners[:, several], weights[:, several]
    sums = np.stack([(weights * (corners == corner)).sum(axis=0) for corner in corners])
    winner[several] = np.where(sums >= sums.max(axis=0) - TIE, corners, highest[several]).min(axis=0)
    return winner


def _restore(
    target: Integer[np.ndarray, "a b c"], old: Runs, new: Runs, neighbours: Sequence[_Neighbours], axes: Sequence[int]
) -> None:
    """Gives each object of which nothing is left one voxel, the nearest to its centre that is free.

    Something is left of an object where a new voxel of its label sees one of its voxels. Free is the background, and a
    voxel that has another of its own label beside it: no label loses its last voxel. Larger objects choose first, and
    none is put farther than about three voxels away unless nothing else is left of its label.
    """
    objects = objects_of(old)
    lost = np.flatnonzero(~_is_left(old, objects, new, neighbours)[objects])
    _, one, number = np.unique(objects[lost], return_index=True, return_inverse=True)
    lengths = old.stop[lost] - old.start[lost]
    sizes = np.bincount(number, lengths)
    middles = old.plane[lost], old.row[lost], old.start[lost] + (lengths - 1) / 2
    centres = np.stack([np.bincount(number, middle * lengths) for middle in middles], axis=1) / sizes[:, None]
    places = ((centres + 0.5) / old.shape)[:, np.argsort(axes)] * target.shape - 0.5
    given = np.zeros(target.shape if len(lost) else (0, 0, 0), bool)
    for which in np.lexsort((*places.T, -sizes)):  # whatever the order in memory
        label = old.label[lost[one[which]]]
        voxel = _nearest_free(target, places[which], given, (0, 1, 3))
        if voxel is None and not (target == label).any():
            voxel = _nearest_free(target, places[which], given, (sum(target.shape),))
        if voxel is not None:
            target[voxel] = label
            given[voxel] = True


def _is_left(
    old: Runs, objects: Integer[np.ndarray, " run"], new: Runs, neighbours: Sequence[_Neighbours]
) -> Bool[np.ndarray, " object"]:
    """Of which objects something is left: in the rows that see a run, a new run of its label is looked for."""
    left = np.zeros(objects.max(initial=-1) + 1, bool)
    _, number = np.unique(np.concatenate([old.label, new.label]), return_inverse=True)
    base = _rows_apart(number[len(old.label) :], new.plane, new.row, new.shape)
    order = np.argsort(base + new.start)
    starts, stops = (base + new.start)[order], (base + new.stop)[order]
    number = number[: len(old.label)]
    plane, last_plane = _seen_from(neighbours[0], old.plane, old.plane)
    row, last_row = _seen_from(neighbours[1], old.row, old.row)
    first, last = _seen_from(neighbours[2], old.start, old.stop - 1)
    rows = (range(np.max(end - begin, initial=-1) + 1) for begin, end in ((plane, last_plane), (row, last_row)))
    for planes_on, rows_on in product(*rows):
        reached = (plane + planes_on <= last_plane) & (row + rows_on <= last_row) & (first <= last)
        some = np.flatnonzero(reached & ~left[objects])
        base = _rows_apart(number[some], plane[some] + planes_on, row[some] + rows_on, new.shape)
        at = np.searchsorted(starts, base + last[some], side="right") - 1
        found = (at >= 0) & (stops[at] > base + first[some]) if len(stops) else np.zeros(len(some), bool)
        left[objects[some[found]]] = True
    return left


def _seen_from(
    neighbours: _Neighbours, begin: Integer[np.ndarray, " run"], end: Integer[np.ndarray, " run"]
) -> tuple[Integer[np.ndarray, " run"], Integer[np.ndarray, " run"]]:
    """The first and the last new voxel that see something from begin to end; none where the last comes first."""
    return np.searchsorted(neighbours.second, begin), np.searchsorted(neighbours.first, end, side="right") - 1


def _rows_apart(
    label: Integer[np.ndarray, " run"],
    plane: Integer[np.ndarray, " run"],
    row: Integer[np.ndarray, " run"],
    shape: tuple[int, int, int],
) -> Integer[np.ndarray, " run"]:
    """Where a row begins when the maps of all labels lie one behind the other."""
    return ((label * shape[0] + plane) * shape[1] + row) * shape[2]


def _nearest_free(
    labels: Integer[np.ndarray, "a b c"],
    place: Float[np.ndarray, " 3"],
    given: Bool[np.ndarray, "a b c"],
    reaches: Sequence[int],
) -> tuple[int, ...] | None:
    """The nearest voxel that may be taken, sought in wider and wider boxes; None where there is none."""
    middle = np.clip(np.floor(place + 0.5), 0, np.array(labels.shape) - 1).astype(int)
    for reach in reaches:
        low, high = np.maximum(middle - reach, 0), np.minimum(middle + reach + 1, labels.shape)
        box = tuple(slice(begin, end) for begin, end in zip(low.tolist(), high.tolist(), strict=True))
        found = np.argwhere(_is_free(labels, box) & ~given[box]) + low
        if len(found):
            away = np.linalg.norm(found - place, axis=1)
            nearest = int(np.argmin(away))
            if reach == 0 or away[nearest] <= reach + 0.5:  # outside the box nothing is nearer
                return tuple(found[nearest].tolist())
    return None


def _is_free(labels: Integer[np.ndarray, "a b c"], box: tuple[slice, ...]) -> Bool[np.ndarray, "i j k"]:
    """Where a box is background, or has the same label once more among the voxels around."""
    wider = labels[tuple(slice(max(side.start - 1, 0), side.stop + 1) for side in box)]
    edges = [(int(side.start == 0), int(side.stop == size)) for side, size in zip(box, labels.shape, strict=True)]
    around = sliding_window_view(np.pad(wider, edges), (3, 3, 3))
    inside = labels[box]
    return (inside == 0) | ((around == inside[..., None, None, None]).sum(axis=(3, 4, 5)) > 1)


# both


def _places(before: int, after: int) -> Float[np.ndarray, " new"]:
    """Where new voxel centres lie among the old ones; beyond the outermost, on the outermost."""
    return np.clip((np.arange(after) + 0.5) * before / after - 0.5, 0, before - 1)


def _nearest(places: Float[np.ndarray, " new"]) -> Integer[np.ndarray, " new"]:
    """The nearest old voxel, the later of two as in scipy, whatever the rounding."""
    return np.floor(places + 0.5 + TIE).astype(int)


def _slowest_first(voxels: Shaped[np.ndarray, "i j k"]) -> list[int]:
    """The axes as they lie in memory; what is no axis there, having one voxel, first."""
    return sorted(range(3), key=lambda axis: (voxels.shape[axis] > 1, -abs(voxels.strides[axis])))


def _cut(size: int, width: int) -> list[slice]:
    return [slice(start, min(start + width, size)) for start in range(0, size, width)]


def _at_once(work: Callable[[Any], Any], tasks: Iterable[Any]) -> list[Any]:
    """Each task on the next free thread: numpy lets other threads run."""
    tasks = list(tasks)
    threads = min(_threads(), len(tasks))
    if threads <= 1:
        return [work(task) for task in tasks]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, tasks))


def _threads() -> int:
    """What torch has been told, where it is loaded (in a process that loads batches: one), else OMP_NUM_THREADS or
    the cores this process may use."""
    if "torch" in sys.modules:
        from torch import get_num_threads  # loads nothing, and waits where another thread is still loading it

        return get_num_threads()
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) if told.isdigit() and int(told) else usable_cores()
