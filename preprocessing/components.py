"""The objects of a label map: voxels of one label that touch, if only by a corner. 0 is background and no object.

Found from runs, stretches of one label along the last axis: there are far fewer of them than voxels, and no map of the
size of the scan is made.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

TOUCHING = ndimage.generate_binary_structure(3, 3)
"""Two voxels are of one part when they share a face, an edge or a corner (26-connectivity)."""

EARLIER_ROWS = ((-1, -1), (-1, 0), (-1, 1), (0, -1))
"""Of the eight rows around one, the four that come before it: each pair of rows is looked at once."""


@dataclass(frozen=True, eq=False)
class Runs:
    """Of each run its label, the plane and row it lies in, its first voxel and the one after its last; in that order."""

    shape: tuple[int, int, int]
    label: Integer[np.ndarray, " run"]
    plane: Integer[np.ndarray, " run"]
    row: Integer[np.ndarray, " run"]
    start: Integer[np.ndarray, " run"]
    stop: Integer[np.ndarray, " run"]


def runs_of(labels: Integer[np.ndarray, "plane row voxel"]) -> Runs:
    """Every run of a label; quickest where the last axis is contiguous in memory."""
    row_length = labels.shape[2]
    begins, ends, values = [], [], []
    for number, plane in enumerate(labels):
        begin, end = _bounds(plane)
        values.append(plane[np.divmod(begin, row_length)])
        begins.append(begin + number * plane.size)
        ends.append(end + number * plane.size)
    first, last, label = np.concatenate(begins), np.concatenate(ends), np.concatenate(values)
    plane, row, start = np.unravel_index(first, labels.shape)
    return Runs(labels.shape, label, plane, row, start, start + last - first + 1)


def joined(parts: Sequence[Runs]) -> Runs:
    """The runs of a map from those of its parts, which follow each other along the first axis."""
    _, rows, voxels = parts[0].shape
    ahead = np.cumsum([0, *(part.shape[0] for part in parts)])
    return Runs(
        (int(ahead[-1]), rows, voxels),
        np.concatenate([part.label for part in parts]),
        np.concatenate([part.plane + before for part, before in zip(parts, ahead[:-1], strict=True)]),
        np.concatenate([part.row for part in parts]),
        np.concatenate([part.start for part in parts]),
        np.concatenate([part.stop for part in parts]),
    )


def objects_of(runs: Runs) -> Integer[np.ndarray, " run"]:
    """The number of the object that each run belongs to, from 0."""
    _, rows, voxels = runs.shape
    # with a row and a voxel more, what touches across a border of the scan is not taken for what touches inside it
    width = voxels + 2
    at = (runs.plane * (rows + 1) + runs.row) * width
    start, stop = at + runs.start, at + runs.stop
    ones, others = [], []
    for planes_back, rows_back in EARLIER_ROWS:
        away = (planes_back * (rows + 1) + rows_back) * width
        first = np.searchsorted(stop, start + away)
        number = np.maximum(np.searchsorted(start, stop + away, side="right") - first, 0)
        one = np.repeat(np.arange(len(start)), number)
        other = np.arange(len(one)) + np.repeat(first - (np.cumsum(number) - number), number)
        same = runs.label[one] == runs.label[other]
        ones.append(one[same])
        others.append(other[same])
    pairs = np.concatenate(ones), np.concatenate(others)
    touch = coo_array((np.ones(len(pairs[0]), bool), pairs), shape=(len(start), len(start)))
    return connected_components(touch, directed=False)[1]


def _bounds(
    plane: Integer[np.ndarray, "row voxel"],
) -> tuple[Integer[np.ndarray, " run"], Integer[np.ndarray, " run"]]:
    """The first and the last voxel of every run, counted through the plane."""
    begins = plane != 0
    ends = begins.copy()
    differ = plane[:, 1:] != plane[:, :-1]
    begins[:, 1:] &= differ
    ends[:, :-1] &= differ
    return np.flatnonzero(begins), np.flatnonzero(ends)
