"""Where windows lie: a grid for inference, a draw for training."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

import numpy as np
from jaxtyping import Float, Integer, Shaped

Triple = tuple[int, int, int]


def grid(shape: Triple, patch: Triple, overlap: float) -> list[Triple]:
    """Where windows start so that they cover the shape, neighbours sharing at least that much of a side."""
    along = [_starts(size, side, overlap) for size, side in zip(shape, patch, strict=True)]
    return [(i, j, k) for i, j, k in product(*along)]


def _starts(size: int, side: int, overlap: float) -> list[int]:
    assert size >= side, "a scan is padded to the window before it is cut into windows"
    stride = max(1, int(side * (1 - overlap) + 1e-9))  # whole voxels: rounded starts never lie further apart than this
    steps = -(-(size - side) // stride) + 1
    return [int(start) for start in np.round(np.linspace(0, size - side, steps))]


def bell(side: int) -> Float[np.ndarray, " side"]:
    """How much a window is trusted along one axis: least at its ends, where it has seen only half of the surroundings.

    nnU-Net v2: sigma is an eighth of the side. The floor keeps every voxel's sum of weights well above zero.
    """
    place = np.arange(side) - (side - 1) / 2
    return np.clip(np.exp(-0.5 * (place / (side / 8)) ** 2), 1e-3, None).astype(np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Places:
    """For one case: where each of its labels lies, a fair sample of voxels per label."""

    per_label: dict[int, Integer[np.ndarray, "n 3"]]

    @staticmethod
    def of(labels: Integer[np.ndarray, "1 i j k"], rng: np.random.Generator, most: int = 2_000) -> "Places":
        """Up to `most` voxels of every label; a small lesion keeps all of its own."""
        found = {}
        for value in np.unique(labels[labels > 0]):
            voxels = np.argwhere(labels[0] == value).astype(np.int32)
            found[int(value)] = rng.permutation(voxels)[:most]
        return Places(per_label=found)


FOREGROUND = 0.5
"""Share of training windows centred on a label. nnU-Net takes a third; on few steps a CPU can afford, more is better."""


def draw(shape: Triple, patch: Triple, places: Places, rng: np.random.Generator) -> Triple:
    """Where one training window starts: on a label (every label as often, however small) or anywhere; inside the scan."""
    room = np.array(shape) - np.array(patch)
    if places.per_label and rng.random() < FOREGROUND:
        voxels = places.per_label[int(rng.choice(sorted(places.per_label)))]
        aside = np.minimum(2, (np.array(patch) - 1) // 2)  # a thin window must not miss the voxel it was drawn for
        centre = voxels[rng.integers(len(voxels))] + rng.integers(-aside, aside + 1)
        start = np.clip(centre - np.array(patch) // 2, 0, room)
    else:
        start = rng.integers(0, room + 1)
    i, j, k = (int(n) for n in start)
    return i, j, k


def cut(
    voxels: Shaped[np.ndarray, "channel i j k"], start: Iterable[int], size: Iterable[int], outside: float
) -> Shaped[np.ndarray, "channel a b c"]:
    """A window that may reach over the scan's edge, where it holds `outside`."""
    size = tuple(size)
    out = np.full((voxels.shape[0], *size), outside, dtype=voxels.dtype)
    here, there = [slice(None)], [slice(None)]
    for begin, side, total in zip(start, size, voxels.shape[1:], strict=True):
        low = max(0, begin)
        high = max(low, min(total, begin + side))
        here.append(slice(low - begin, high - begin))
        there.append(slice(low, high))
    out[tuple(here)] = voxels[tuple(there)]
    return out
