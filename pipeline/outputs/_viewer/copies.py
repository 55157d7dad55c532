"""What the viewer is given: the scan, its labels and maps, whole where they are small, cropped and coarser where not."""

import base64
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Integer, Num, Shaped

from preprocessing import files
from preprocessing.plan import Label
from preprocessing.regions import Box
from preprocessing.volume import Geometry, Volume

MOST_VOXELS = 256 * 256 * 160
"""As many are shown as they are: with these, a noisy CT makes a page of 15 MB that opens within seconds."""

MOST_SIDE = 2048
"""The largest texture that every browser with WebGL2 was seen to take, along any axis."""

MARGIN = 4
"""Voxels of air left around a body."""


@dataclass(frozen=True, kw_only=True)
class Copy:
    """A part of a scan's grid, and how many of its voxels become one, per axis."""

    box: Box
    every: tuple[int, int, int]
    of: Geometry

    @cached_property
    def geometry(self) -> Geometry:
        """The grid of the copy: its voxels lie at the centres of those they stand for."""
        affine = self.of.affine.copy()
        start = np.array([side.start for side in self.box])
        affine[:3, 3] = self.of.to_world(start + (np.array(self.every) - 1) / 2)
        affine[:3, :3] *= self.every
        shape = [-(-(side.stop - side.start) // n) for side, n in zip(self.box, self.every, strict=True)]
        return Geometry(shape=(shape[0], shape[1], shape[2]), affine=affine)

    @property
    def words(self) -> str:
        """What was left out; empty where nothing was."""
        said = []
        if any(side.stop - side.start < n for side, n in zip(self.box, self.of.shape, strict=True)):
            said.append("cropped to the body")
        if max(self.every) > 1:
            said.append(f"{'×'.join(map(str, self.every))} voxels shown as one")
        if not said:
            return ""
        return f"{' and '.join(said)}, to keep this page small; tables and files are made of every voxel of the scan"

    def blocks(self, voxels: Shaped[np.ndarray, "i j k"], plane: int) -> Shaped[np.ndarray, "y z block"]:
        """Of one plane of the copy, the voxels that become each of its voxels."""
        i, j, k = self.box
        di, dj, dk = self.every
        slab = voxels[i.start + plane * di : min(i.start + (plane + 1) * di, i.stop), j, k]
        short = [(0, -size % n) for size, n in zip(slab.shape, self.every, strict=True)]
        slab = np.pad(slab, short, mode="edge")
        _, wide, high = slab.shape
        parts = slab.reshape(di, wide // dj, dj, high // dk, dk)
        return parts.transpose(1, 3, 0, 2, 4).reshape(wide // dj, high // dk, di * dj * dk)


def copy_of(
    grey: Num[np.ndarray, "i j k"],
    labels: Integer[np.ndarray, "i j k"],
    geometry: Geometry,
    low: float,
    most: int = MOST_VOXELS,
) -> Copy:
    """The whole scan where that is not too much; else what is not air, and coarser along its finest axis until it fits."""
    i, j, k = (slice(0, n) for n in geometry.shape)
    copy = Copy(box=(i, j, k), every=(1, 1, 1), of=geometry)
    if np.prod(geometry.shape) > most:
        copy = replace(copy, box=_body(grey, labels, low))
    while np.prod(copy.geometry.shape) > most or max(copy.geometry.shape) > MOST_SIDE:
        every = list(copy.every)
        shape = copy.geometry.shape
        axis = int(np.argmax(shape)) if max(shape) > MOST_SIDE else int(np.argmin(copy.geometry.spacing))
        every[axis] += 1
        copy = replace(copy, every=(every[0], every[1], every[2]))
    return copy


def _body(grey: Num[np.ndarray, "i j k"], labels: Integer[np.ndarray, "i j k"], low: float) -> Box:
    """Everything brighter than the darkest grey shown, and every label."""
    sides = []
    inside: list[Bool[np.ndarray, " n"]] = [np.zeros(n, dtype=bool) for n in grey.shape]
    for plane, (values, found) in enumerate(zip(grey, labels, strict=True)):
        seen = (values > low) | (found > 0)
        inside[0][plane] = seen.any()
        inside[1] |= seen.any(axis=1)
        inside[2] |= seen.any(axis=0)
    for axis in inside:
        at = np.nonzero(axis)[0] if axis.any() else np.array([0, len(axis) - 1])
        sides.append(slice(max(0, int(at[0]) - MARGIN), min(len(axis), int(at[-1]) + 1 + MARGIN)))
    return sides[0], sides[1], sides[2]


def scan(copy: Copy, grey: Num[np.ndarray, "i j k"]) -> tuple[Num[np.ndarray, "x y z"], float]:
    """The mean of what becomes one voxel, as integers a page can carry, and what a 1 of them stands for."""
    if max(copy.every) == 1:
        shown = grey[copy.box]
    else:
        kind = np.float32 if grey.dtype.itemsize < 8 else np.float64
        planes = [copy.blocks(grey, plane).mean(axis=-1, dtype=kind) for plane in range(copy.geometry.shape[0])]
        shown = np.stack(planes)
        shown = np.rint(shown) if grey.dtype.kind in "iu" else shown
    return _sixteen_bits(shown)


def _sixteen_bits(values: Num[np.ndarray, "i j k"]) -> tuple[Num[np.ndarray, "i j k"], float]:
    finite = np.isfinite(values)
    if not finite.all():
        values = np.where(finite, values, values[finite].min() if finite.any() else 0)
    low, high = float(values.min()), float(values.max())
    whole = values.dtype.kind in "iu" or bool((np.rint(values) == values).all())
    if whole and low >= -32768 and high <= 32767:
        return values.astype(np.uint8 if low >= 0 and high <= 255 else np.int16), 1.0
    scale = max(-low, high) / 32767 or 1.0
    return np.rint(values / scale).astype(np.int16), scale


def labels(copy: Copy, found: Integer[np.ndarray, "i j k"], table: Sequence[Label]) -> Integer[np.ndarray, "x y z"]:
    """Of what becomes one voxel the smallest label in it: a lesion smaller than a voxel of the copy is still seen."""
    kind = np.uint8 if max((label.value for label in table), default=0) <= 255 else np.int16
    if max(copy.every) == 1:
        return found[copy.box].astype(kind)
    highest = 1 + max([int(found.max()), *(label.value for label in table)])
    counts = np.zeros(highest, dtype=np.int64)
    for plane in found:
        counts += np.bincount(plane.ravel(), minlength=highest)
    counts[0] = np.iinfo(np.int64).max  # background gives way to any label
    order = np.argsort(counts, kind="stable")
    rank = np.argsort(order, kind="stable")
    planes = [order[rank[copy.blocks(found, plane)].min(axis=-1)] for plane in range(copy.geometry.shape[0])]
    return np.stack(planes).astype(kind)


def codes(copy: Copy, values: Integer[np.ndarray, "i j k"]) -> Integer[np.ndarray, "x y z"]:
    """Of what becomes one voxel the strongest, with its sign."""
    if max(copy.every) == 1:
        return values[copy.box]
    planes = []
    for plane in range(copy.geometry.shape[0]):
        block = copy.blocks(values, plane)
        strongest = np.abs(block.astype(np.int16)).argmax(axis=-1)
        planes.append(np.take_along_axis(block, strongest[..., None], axis=-1)[..., 0])
    return np.stack(planes)


def packed(voxels: Num[np.ndarray, "i j k"], geometry: Geometry, *, is_labels: bool = False, scale: float = 1.0) -> str:
    """A NIfTI file, as text that a page can hold; the same voxels make the same text."""
    volume = Volume(voxels=np.ascontiguousarray(voxels)[None], geometry=geometry, channels=("shown",))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shown.nii.gz"
        files.write(volume, path, is_labels=is_labels, scale=scale)
        return base64.b64encode(path.read_bytes()).decode("ascii")
