"""The connected parts of two masks, and which of them meet."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Integer

from preprocessing.components import objects_of, runs_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Lesions:
    """The parts of a mask as runs, unbroken rows of voxels: there are far fewer of them than voxels."""

    first: Integer[np.ndarray, " run"]
    """Voxels counted through the mask; rising."""
    last: Integer[np.ndarray, " run"]
    """One behind the last voxel."""
    lesion: Integer[np.ndarray, " run"]
    """The number of the part a run belongs to, from 0."""

    @property
    def count(self) -> int:
        return int(self.lesion.max(initial=-1)) + 1


def lesions_in(mask: Bool[np.ndarray, "i j k"]) -> Lesions:
    """Voxels that share a face, an edge or a corner belong to one lesion."""
    runs = runs_of(np.ascontiguousarray(mask).view(np.uint8))
    row = (runs.plane * mask.shape[1] + runs.row) * mask.shape[2]
    return Lesions(first=row + runs.start, last=row + runs.stop, lesion=objects_of(runs))


def meeting(one: Lesions, other: Lesions) -> tuple[Bool[np.ndarray, " m"], Bool[np.ndarray, " n"]]:
    """Which lesions of either share a voxel with any of the other; both must come from masks of one shape."""
    from_run = np.searchsorted(other.last, one.first, side="right")
    to_run = np.searchsorted(other.first, one.last, side="left")
    count = np.maximum(to_run - from_run, 0)
    place = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    met, also = np.zeros(one.count, bool), np.zeros(other.count, bool)
    met[np.repeat(one.lesion, count)] = True
    also[other.lesion[np.repeat(from_run, count) + place]] = True
    return met, also
