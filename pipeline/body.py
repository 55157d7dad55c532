"""Where a scan holds a patient and where only air, coarsely: windows of nothing but air need no network.

On a CT, body is denser than -500 HU, half way between air and water. Elsewhere it is brighter than a tenth of the way from
the 2nd to the 98th percentile, as FSL's BET tells head from air (Smith 2002). Whatever body surrounds in a plane of the
scan counts as body: lungs and bowel hold air, too. So air is only what lies around the patient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Shaped
from scipy import ndimage

from preprocessing.volume import Geometry, Volume

if TYPE_CHECKING:
    from preprocessing.plan import Plan

Triple = tuple[int, int, int]

SIDE = 4
"""Voxels along each side of a block: a block with one voxel of body is body."""
AIR_HU = -500.0
BRIGHTER = 0.1
ENDS = (2, 98)
SEEN = 10**6
"""Voxels that percentiles are taken of: they need no more."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Body:
    """Blocks of a scan that hold body."""

    blocks: Bool[np.ndarray, "i j k"]
    geometry: Geometry
    """Of the scan's voxels."""
    words: str
    """By what rule."""

    @staticmethod
    def of(volume: Volume, plan: "Plan") -> "Body":
        """Where any channel has body; a scan's values as they were read."""
        blocks, rules = np.zeros(tuple(-(-side // SIDE) for side in volume.geometry.shape), bool), []
        for name, voxels in zip(plan.channels, volume.voxels, strict=True):
            is_ct = name.casefold() == "ct" or (volume.provenance.modality == "CT" and len(plan.channels) == 1)
            limit = AIR_HU if is_ct else _limit(voxels)
            rules.append(f"{name} above {limit:.4g}{' HU' if is_ct else ''}")
            blocks |= _blocks(voxels, limit)
        return Body(blocks=_filled(blocks), geometry=volume.geometry, words=" or ".join(rules))

    def seen_from(self, prepared: Geometry, origin: Triple, patch: Triple) -> Callable[[Triple], bool]:
        """Whether a window that begins there holds body: of a grid of the same patient, its first voxel at `origin`."""

        def has_body(start: Triple) -> bool:
            low = np.array(origin) + start - 0.5
            ends = np.array(list(np.ndindex(2, 2, 2))) * patch + low
            there = self.geometry.to_voxel(prepared.to_world(ends))
            # a voxel more: a spline sees its neighbours
            first = np.maximum(0, np.floor(there.min(axis=0) - 1) // SIDE).astype(int)
            last = np.ceil(there.max(axis=0) + 1).astype(int) // SIDE + 1
            i, j, k = (slice(begin, max(begin, end)) for begin, end in zip(first, last, strict=True))
            return bool(self.blocks[i, j, k].any())

        return has_body


def _limit(voxels: Shaped[np.ndarray, "i j k"]) -> float:
    some = voxels.ravel()[:: max(1, voxels.size // SEEN)] if voxels.flags.c_contiguous else _thinned(voxels)
    low, high = np.percentile(some, ENDS)
    return float(low + BRIGHTER * (high - low))


def _thinned(voxels: Shaped[np.ndarray, "i j k"]) -> Shaped[np.ndarray, " voxel"]:
    step = max(1, round((voxels.size / SEEN) ** (1 / 3)))
    return voxels[::step, ::step, ::step].ravel()


def _blocks(voxels: Shaped[np.ndarray, "i j k"], limit: float) -> Bool[np.ndarray, "a b c"]:
    """Slab by slab: no mask of the whole scan is held."""
    starts = [np.arange(0, side, SIDE) for side in voxels.shape]
    rows = []
    for first in starts[0]:
        found = (voxels[first : first + SIDE] > limit).any(axis=0)
        rows.append(np.logical_or.reduceat(np.logical_or.reduceat(found, starts[1], axis=0), starts[2], axis=1))
    return np.stack(rows)


def _filled(blocks: Bool[np.ndarray, "i j k"]) -> Bool[np.ndarray, "i j k"]:
    """With what is surrounded in a plane along any axis: a scan that ends in the lungs is open at its end."""
    filled = blocks.copy()
    for axis in range(3):
        cross = np.expand_dims(ndimage.generate_binary_structure(2, 1), axis)
        filled |= ndimage.binary_fill_holes(blocks, structure=cross)
    return filled
