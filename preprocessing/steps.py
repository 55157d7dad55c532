"""What is done to a scan before a network sees it; each step can be undone, and the Trail remembers how."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Bool, Shaped
from scipy import ndimage

from .patches import cut
from .records import BadRecord
from .resampling import resample, resample_labels, resample_within, resized
from .volume import Geometry, ScanError, Volume


def prepare(volume: Volume, steps: Sequence["Step"]) -> tuple[Volume, "Trail"]:
    """The scan as the network will see it, and the way back. Training and segmentation both come through here."""
    taken = []
    for step in steps:
        before = volume.geometry
        volume = step.apply(volume)
        taken.append(Taken(step=step, before=before, after=volume.geometry))
    return volume, Trail(taken=tuple(taken))


@dataclass(frozen=True, kw_only=True)
class Taken:
    """One step that was taken, with the grid it left and the grid it reached."""

    step: "Step"
    before: Geometry
    after: Geometry


@dataclass(frozen=True, kw_only=True)
class Trail:
    """The steps taken, in order."""

    taken: tuple[Taken, ...]

    def follow(self, labels: Volume) -> Volume:
        """Labels brought along the way their image went, without interpolating between label values."""
        if self.taken:  # one grid to the bit: rounding in a file must not turn them another way than their image
            labels = labels.with_voxels(labels.voxels, geometry=self.taken[0].before)
        for one in self.taken:
            labels = one.step.follow(labels, one.after)
        return labels

    def undo(self, volume: Volume, outside: float = 0.0) -> Volume:
        """A map on the prepared grid brought back to the scan's own grid; `outside` fills what was cropped away."""
        for one in reversed(self.taken):
            volume = one.step.undo(volume, one.before, outside)
        return volume

    def parted(self) -> tuple["Trail", Taken | None, "Trail"]:
        """What came before the first resampling, that resampling if there was one, and what came after it."""
        at = next((n for n, one in enumerate(self.taken) if isinstance(one.step, Resample)), len(self.taken))
        resampled = self.taken[at] if at < len(self.taken) else None
        return Trail(taken=self.taken[:at]), resampled, Trail(taken=self.taken[at + 1 :])


@dataclass(frozen=True, kw_only=True)
class Orient:
    """Turn and flip axes, exactly, so that i, j, k run towards the patient's Right, Anterior, Superior."""

    kind: ClassVar[str] = "orient"

    to: str = "RAS"
    """Where they run to instead: three letters, one each of R or L, A or P, S or I."""

    def __post_init__(self) -> None:
        if sorted(PAIRS.get(letter, letter) for letter in self.to) != ["A", "R", "S"]:
            raise BadRecord(
                f"orientation {self.to!r} was met; three letters are needed, one each of R or L, A or P, S or I, as RAS or "
                "LPS. Correct the plan."
            )

    def apply(self, volume: Volume) -> Volume:
        turns = self._turns(volume.geometry)
        return _turned(volume, [axis for axis, _ in turns], [sign for _, sign in turns])

    def _turns(self, geometry: Geometry) -> list[tuple[int, int]]:
        """Of each new axis the old one, and -1 where it runs the other way."""
        there = {world: (axis, sign) for world, axis, sign in geometry.axis_order()}
        new = [("RAS".index(PAIRS.get(letter, letter)), -1 if letter in PAIRS else 1) for letter in self.to]
        return [(there[world][0], there[world][1] * sign) for world, sign in new]

    def follow(self, labels: Volume, after: Geometry) -> Volume:
        return self.apply(labels)

    def undo(self, volume: Volume, before: Geometry, outside: float) -> Volume:
        axes, signs = [0] * 3, [1] * 3
        for new, (axis, sign) in enumerate(self._turns(before)):
            axes[axis], signs[axis] = new, sign
        turned = _turned(volume, axes, signs)
        return turned.with_voxels(turned.voxels, geometry=before)


PAIRS = {"L": "R", "P": "A", "I": "S"}
"""Each direction that is the other way of one of R, A, S."""


@dataclass(frozen=True, kw_only=True)
class Crop:
    """Cut away the border in which every channel is exactly zero (a stripped skull, a masked field of view)."""

    kind: ClassVar[str] = "crop"

    margin: int = 2
    """Voxels of zero kept around what is not zero."""

    def apply(self, volume: Volume) -> Volume:
        return _placed(volume, nonzero_box(volume, self.margin), 0)

    def follow(self, labels: Volume, after: Geometry) -> Volume:
        return _placed(labels, after, 0)

    def undo(self, volume: Volume, before: Geometry, outside: float) -> Volume:
        return _placed(volume, before, outside)


ANISOTROPIC = 3.0
"""nnU-Net v2 (ANISO_THRESHOLD): an axis this much coarser than the next is treated by its own rule."""


@dataclass(frozen=True, kw_only=True)
class Resample:
    """Bring every scan to voxels of one size, so that the network learns sizes in millimetres."""

    kind: ClassVar[str] = "resample"

    spacing_mm: tuple[float, float, float]
    """The size of a voxel along the scan's axes in the order the step meets them."""
    separate: int | None = None
    """An axis, in that order, along which a new voxel takes the nearest slice and nothing is interpolated: thick slices."""
    rule: Literal["hilum", "nnunet", "nnunet_together"] = "hilum"
    """`nnunet`: as nnU-Net v2 does it. Each scan's own voxels say which axis is separate, the target's where they do not,
    and on the way back the other way round; what the spline overshoots is cut. `nnunet_together`: no axis ever is."""
    kept: tuple[int, ...] = ()
    """Axes, in that order, along which every scan keeps its own voxels: the slices of a 2-D network."""

    def __post_init__(self) -> None:
        if self.separate not in (None, 0, 1, 2) or not set(self.kept) <= {0, 1, 2}:
            raise BadRecord(
                f"separate {self.separate} and kept {self.kept} were met; an axis, 0, 1 or 2, or null is needed. Correct the plan."
            )
        if self.separate is not None and self.rule != "hilum":
            raise BadRecord(
                f"separate {self.separate} was met beside the rule {self.rule}, by which each scan decides; null is needed. "
                "Correct the plan."
            )

    def apply(self, volume: Volume) -> Volume:
        after = resized(volume.geometry, self.shape_of(volume.geometry))
        separate = self.separate_there(volume.geometry)
        how = resample if self.rule == "hilum" else resample_within
        return volume.with_voxels(how(volume.voxels, after.shape, order=3, separate=separate), geometry=after)

    def shape_of(self, geometry: Geometry) -> tuple[int, int, int]:
        """How many voxels of this size the grid's extent holds, rounded, never none."""
        sides, spacing = np.array(geometry.shape), np.array(geometry.spacing)
        target = np.array(self.target(geometry))
        # nnU-Net's order of operations is another: where a half is rounded, the last digit decides
        exactly = sides * spacing / target if self.rule == "hilum" else spacing / target * sides
        i, j, k = np.where([n in self.kept for n in range(3)], sides, np.maximum(1, np.round(exactly))).astype(int)
        return int(i), int(j), int(k)

    def target(self, before: Geometry) -> tuple[float, float, float]:
        """The size of a new voxel, of a scan on that grid."""
        pairs = zip(before.spacing, self.spacing_mm, strict=True)
        i, j, k = (own if axis in self.kept else asked for axis, (own, asked) in enumerate(pairs))
        return i, j, k

    def separate_there(self, before: Geometry) -> int | None:
        """The axis along which nothing is interpolated on the way to the new grid."""
        return self._separate(before.spacing, self.target(before))

    def separate_back(self, before: Geometry) -> int | None:
        """The axis along which nothing is interpolated on the way back from it."""
        return self._separate(self.target(before), before.spacing)

    def _separate(self, current: Sequence[float], new: Sequence[float]) -> int | None:
        if self.rule != "nnunet":
            return self.separate
        thick = next((grid for grid in (current, new) if max(grid) / min(grid) > ANISOTROPIC), None)
        # to float32's precision: where a header's axes are oblique, a length is known no better
        coarsest = [
            axis for axis in range(3) if thick is not None and math.isclose(thick[axis], max(thick), rel_tol=1e-6)
        ]
        return coarsest[0] if len(coarsest) == 1 else None

    def follow(self, labels: Volume, after: Geometry) -> Volume:
        voxels = resample_labels(labels.voxels, after.shape, separate=self.separate_there(labels.geometry))
        return labels.with_voxels(voxels, geometry=after)

    def undo(self, volume: Volume, before: Geometry, outside: float) -> Volume:
        # linear: probabilities stay between 0 and 1 and still sum to 1
        voxels = resample(volume.voxels, before.shape, order=1, separate=self.separate_back(before))
        return volume.with_voxels(voxels, geometry=before)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How one channel's intensities are brought to about mean 0 and deviation 1."""

    by: Literal["scan", "dataset", "range"]
    """`scan`: its own mean and deviation (MR has no unit). `dataset`: fixed numbers (CT means the same everywhere).
    `range`: from 0 to 1 between its own lowest and highest (nnU-Net v2, rescale_to_0_1)."""
    nonzero: bool = False
    """Used by `scan` alone: measure where some channel is not zero, and leave 0 elsewhere: for scans whose background was
    stripped."""
    low: float = 0.0
    high: float = 0.0
    mean: float = 0.0
    deviation: float = 1.0
    """Used by `dataset` alone: clip to low..high, then subtract the mean and divide by the deviation."""


@dataclass(frozen=True, kw_only=True)
class Normalise:
    """Bring intensities to the range the network was trained on; the grid stays as it is."""

    kind: ClassVar[str] = "normalise"

    channels: tuple[Scale, ...]
    """One rule per channel, in the plan's order."""

    def apply(self, volume: Volume) -> Volume:
        seen = _seen(volume) if any(scale.nonzero for scale in self.channels) else None
        scaled = [_scaled(voxels, scale, seen) for voxels, scale in zip(volume.voxels, self.channels, strict=True)]
        return volume.with_voxels(np.stack(scaled))

    def follow(self, labels: Volume, after: Geometry) -> Volume:
        return labels

    def undo(self, volume: Volume, before: Geometry, outside: float) -> Volume:
        return volume


@dataclass(frozen=True, kw_only=True)
class Pad:
    """Grow a scan that is smaller than a window to the window's size, evenly on both sides."""

    kind: ClassVar[str] = "pad"

    shape: tuple[int, int, int]
    """The least number of voxels along each axis."""

    def apply(self, volume: Volume) -> Volume:
        before = np.array(volume.geometry.shape)
        after = np.maximum(before, self.shape)
        origin = -((after - before) // 2)
        return _placed(volume, _window(volume.geometry, origin, after), 0)

    def follow(self, labels: Volume, after: Geometry) -> Volume:
        return _placed(labels, after, 0)

    def undo(self, volume: Volume, before: Geometry, outside: float) -> Volume:
        """A view, no copy: what was grown is only cut again."""
        low = ((np.array(volume.geometry.shape) - before.shape) // 2).tolist()
        inside = tuple(slice(begin, begin + side) for begin, side in zip(low, before.shape, strict=True))
        return volume.with_voxels(volume.voxels[(slice(None), *inside)], geometry=before)


Step = Orient | Crop | Resample | Normalise | Pad


def nonzero_box(volume: Volume, margin: int) -> Geometry:
    """The smallest grid around every voxel that is not zero in some channel; all of it where nothing is."""
    occupied = np.any(volume.voxels != 0, axis=0)
    if not occupied.any():
        return volume.geometry
    first, last = [], []
    for axis in range(3):
        along = np.flatnonzero(occupied.any(axis=tuple(other for other in range(3) if other != axis)))
        first.append(max(0, along[0] - margin))
        last.append(min(occupied.shape[axis], along[-1] + 1 + margin))
    return _window(volume.geometry, np.array(first), np.array(last) - np.array(first))


def _turned(volume: Volume, axes: Sequence[int], signs: Sequence[int]) -> Volume:
    """New axis n is old axis axes[n], reversed where signs[n] is negative. A view, no copy."""
    voxels = volume.voxels.transpose(0, *[axis + 1 for axis in axes])
    voxels = voxels[(slice(None), *[slice(None, None, sign) for sign in signs])]
    shape = np.array(volume.geometry.shape)
    step = np.zeros((4, 4))
    step[3, 3] = 1
    for new, (old, sign) in enumerate(zip(axes, signs, strict=True)):
        step[old, new] = sign
        step[old, 3] = 0 if sign > 0 else shape[old] - 1
    geometry = Geometry(shape=voxels.shape[1:], affine=volume.geometry.affine @ step)
    return volume.with_voxels(voxels, geometry=geometry)


def _window(geometry: Geometry, origin: np.ndarray, shape: np.ndarray) -> Geometry:
    """The grid that starts at voxel `origin` (which may lie outside) and has that shape."""
    affine = geometry.affine.copy()
    affine[:3, 3] = geometry.to_world(origin)
    i, j, k = (int(n) for n in shape)
    return Geometry(shape=(i, j, k), affine=affine)


def _placed(volume: Volume, target: Geometry, outside: float) -> Volume:
    """The volume on a grid with the same axes, shifted by whole voxels: cropped here, filled with `outside` there."""
    if target.shape == volume.geometry.shape and target.matches(volume.geometry):
        return volume.with_voxels(volume.voxels, geometry=target)
    start = [round(float(n)) for n in volume.geometry.to_voxel(target.affine[:3, 3])]
    return volume.with_voxels(cut(volume.voxels, start, target.shape, outside), geometry=target)


def _seen(volume: Volume) -> Bool[np.ndarray, "i j k"]:
    """Where some channel is not zero, and what that encloses: a dark spot in a brain is brain."""
    seen: np.ndarray = ndimage.binary_fill_holes(np.any(volume.voxels != 0, axis=0))
    return seen


def _scaled(
    voxels: Shaped[np.ndarray, "i j k"], scale: Scale, seen: Bool[np.ndarray, "i j k"] | None
) -> Shaped[np.ndarray, "i j k"]:
    values = voxels.astype(np.float32)
    if scale.by == "dataset":
        return (np.clip(values, scale.low, scale.high) - scale.mean) / scale.deviation
    if scale.by == "range":
        values -= values.min()
        return values / np.float32(max(float(values.max()), 1e-8))  # 1e-8: nnU-Net's, for a scan of one value
    inside = values[seen] if scale.nonzero and seen is not None else values
    deviation = float(inside.std(dtype=np.float64)) if inside.size else 0.0
    if deviation <= 1e-8 * max(1.0, float(np.abs(values).max())):
        raise ScanError(
            "A channel has the same value in every voxel; a scan with contrast is needed. "
            "Look at the file: an empty series or a failed export is the usual reason."
        )
    scaled = (values - np.float32(inside.mean(dtype=np.float64))) / np.float32(deviation)
    return scaled if seen is None or not scale.nonzero else np.where(seen, scaled, np.float32(0))
