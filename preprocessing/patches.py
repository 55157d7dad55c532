"""Where windows lie: a grid for inference, a draw for training."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Integer, Shaped
from scipy.ndimage import find_objects
from scipy.ndimage import label as label_pieces

from .components import TOUCHING

Triple = tuple[int, int, int]


Rule = Literal["hilum", "nnunet"]


def grid(shape: Triple, patch: Triple, overlap: float, rule: Rule = "hilum") -> list[Triple]:
    """Where windows start so that they cover the shape, neighbours sharing at least that much of a side."""
    along = [_starts(size, side, overlap, rule) for size, side in zip(shape, patch, strict=True)]
    return [(i, j, k) for i, j, k in product(*along)]


def _starts(size: int, side: int, overlap: float, rule: Rule) -> list[int]:
    assert size >= side, "a scan is padded to the window before it is cut into windows"
    stride: float = max(1, int(side * (1 - overlap) + 1e-9))  # whole voxels: rounded starts never lie further apart
    if rule == "nnunet":
        stride = 1 if side == 1 else side * (1 - overlap)  # of an odd side half a voxel more; slices have no overlap
    steps = math.ceil((size - side) / stride) + 1
    return [int(start) for start in np.round(np.linspace(0, size - side, steps))]


def bell(side: int, rule: Rule = "hilum") -> Float[np.ndarray, " side"]:
    """How much a window is trusted along one axis: least at its ends, where it has seen only half of the surroundings.

    nnU-Net v2: sigma is an eighth of the side, the middle of an even side is its later voxel, and nothing is cut off
    below. Our floor keeps every voxel's sum of weights well above zero.
    """
    if rule == "nnunet":
        return np.exp(-0.5 * ((np.arange(side) - side // 2) / (side / 8)) ** 2).astype(np.float32)
    place = np.arange(side) - (side - 1) / 2
    return np.clip(np.exp(-0.5 * (place / (side / 8)) ** 2), 1e-3, None).astype(np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Places:
    """For one case: where each of its labels lies, a fair sample of the voxels of each connected piece."""

    voxels: Integer[np.ndarray, "n 3"]
    """Those of a piece side by side, the pieces of a label one after another."""
    pieces: Integer[np.ndarray, "m 3"]
    """For each piece its label, how many of `voxels` are its, and how many it has."""

    @staticmethod
    def of(labels: Integer[np.ndarray, "1 i j k"], rng: np.random.Generator, most: int = 2_000) -> "Places":
        """Up to `most` voxels of every label; a small one keeps all of its own. What is ignored (below 0) is no label."""
        voxels, pieces = [np.zeros((0, 3), np.int32)], [np.zeros((0, 3), np.int64)]
        for value, box in enumerate(find_objects(labels[0]), start=1):
            if box is not None:
                found, sizes = _sample(labels[0][box] == value, rng, most)
                voxels += [one + [side.start for side in box] for one in found]
                pieces.append(np.array([(value, len(one), size) for one, size in zip(found, sizes, strict=True)]))
        small = np.int16 if max(labels.shape) < 2**15 else np.int32
        return Places(voxels=np.concatenate(voxels).astype(small), pieces=np.concatenate(pieces).astype(np.int32))

    @property
    def per_label(self) -> dict[int, Integer[np.ndarray, "n 3"]]:
        """The voxels of each label."""
        owner = np.repeat(self.pieces[:, 0], self.pieces[:, 1])
        return {int(value): self.voxels[owner == value] for value in np.unique(owner)}

    def draw(self, rng: np.random.Generator) -> Integer[np.ndarray, " 3"]:
        """A voxel of some label. Every label is drawn as often, however small; within it half of the draws are fair to
        its voxels and half to its pieces, so that a small lesion beside a large one is met too."""
        label = rng.choice(np.unique(self.pieces[:, 0]))
        mine = np.flatnonzero(self.pieces[:, 0] == label)
        sizes = self.pieces[mine, 2]
        piece = rng.choice(mine, p=(sizes / sizes.sum() + 1 / len(sizes)) / 2)
        first = self.pieces[:piece, 1].sum()
        return self.voxels[first + rng.integers(self.pieces[piece, 1])]


def _sample(
    mask: Bool[np.ndarray, "i j k"], rng: np.random.Generator, most: int
) -> tuple[list[Integer[np.ndarray, "n 3"]], list[int]]:
    """Some voxels of each piece, together at most so many, and the pieces' sizes, the largest first."""
    numbered, _ = label_pieces(mask, structure=TOUCHING)
    flat = np.flatnonzero(numbered)
    piece = numbered.ravel()[flat] - 1
    sizes = np.bincount(piece)
    flat = flat[np.argsort(piece, kind="stable")]
    firsts = np.cumsum(sizes) - sizes
    largest = np.argsort(-sizes, kind="stable")[:most]  # more pieces than that are noise
    found = []
    for number, kept in zip(largest, _kept(sizes[largest], most), strict=True):
        some = firsts[number] + rng.choice(sizes[number], kept, replace=False)
        found.append(np.stack(np.unravel_index(flat[some], mask.shape), axis=1))
    return found, [int(size) for size in sizes[largest]]


def _kept(sizes: Integer[np.ndarray, " m"], most: int) -> Integer[np.ndarray, " m"]:
    """How many voxels of each piece are kept: half of the places are shared out equally, half by size."""
    half = max(most // 2, len(sizes))  # every piece has one
    low, high = 1, most
    while low < high:  # the most that each may have so that together they have no more than half
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(sizes, middle).sum() <= half else (low, middle - 1)
    return np.minimum(sizes, low + (sizes / sizes.sum() * (most - half)).astype(int))


def draw(
    shape: Triple, patch: Triple, places: Places, rng: np.random.Generator, *, foreground: float,
    forced: bool | None = None,
) -> Triple:  # fmt: skip
    """Where one training window starts: on a label, or anywhere. It lies inside the scan if that is large enough, and
    otherwise around it. `foreground` is the share that lies on a label; `forced` decides it for this window."""
    room = np.array(shape) - np.array(patch)
    first, last = np.minimum(room, 0), np.maximum(room, 0)
    on_label = rng.random() < foreground if forced is None else forced
    if len(places.pieces) and on_label:
        # turned by any angle and drawn nearer by 0.7, the voxel is still in the window that was drawn for it
        aside = min(2, (min(patch) - 1) // 5)
        centre = places.draw(rng) + rng.integers(-aside, aside + 1, size=3)
        start = np.clip(centre - np.array(patch) // 2, first, last)
    else:
        start = rng.integers(first, last + 1)
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
