"""What training does to a window, so that a network learns anatomy and not one scanner's habits.

Rotation, scale and mirrors are one matrix, and a window is interpolated once, only when that matrix asks for it. The
arithmetic is numpy's, which runs on one thread: the same draw gives the same bits however many threads torch has.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce

import numpy as np
import torch
from jaxtyping import Float, Float32, Integer
from torch import Tensor

Triple = tuple[int, int, int]
Array = np.ndarray

IGNORED = -1
"""The label of voxels outside the scan: the loss does not look there."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One way in which intensities change: how often and how far."""

    of: str
    """A name of CHANGES."""
    chance: float
    """Share of the windows that are changed so."""
    low: float
    high: float
    """Amounts lie evenly between these two; where 1 lies between them, half below 1 and half above."""
    channels: float = 1.0
    """Share of the channels of such a window; each draws its own amount ..."""
    shared: bool = False
    """... or all have one."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How often and how far windows are turned and changed."""

    rotated: float = 0.0
    """Share of windows."""
    scaled: float = 0.0
    as_one: bool = False
    """A window that is rotated is scaled too, and no other; `scaled` is not looked at."""
    most_degrees: float = 0.0
    """About each of the three axes, either way."""
    most_degrees_in_plane: float = 0.0
    """Where slices are thick, and for flat windows: about the axis through them alone."""
    most_degrees_elongated: float = 0.0
    """For flat windows with a side over one and a half times the other."""
    by_spacing: bool = False
    """Slices over three times as thick as a pixel is wide are turned in their plane alone, whatever the window."""
    scales: tuple[float, float] = (1.0, 1.0)
    """Below 1 things look larger."""
    mirrored: float = 0.5
    """Share of windows mirrored along each axis that may be."""
    changes: tuple[Change, ...] = ()
    """In this order."""


AUGMENTATIONS = {
    "none": Augmentation(mirrored=0.0),
    # ours: milder than nnU-Net's, whose strength is meant for a thousand epochs
    "default": Augmentation(
        rotated=0.35,
        as_one=True,
        most_degrees=25,
        most_degrees_in_plane=25,
        most_degrees_elongated=15,
        by_spacing=True,
        scales=(0.8, 1.25),
        changes=(
            Change(of="brightness", chance=0.2, low=0.75, high=1.3),
            Change(of="shift", chance=0.2, low=-0.3, high=0.3),
            Change(of="bias_field", chance=0.1, low=-0.1, high=0.1),
            Change(of="gamma", chance=0.2, low=0.7, high=1.5),
            Change(of="low_resolution", chance=0.1, low=0.5, high=1.0, channels=0.5),
            Change(of="blur", chance=0.1, low=0.5, high=1.0),
            Change(of="noise", chance=0.2, low=0.0, high=0.25),
        ),
    ),
    # nnU-Net v2.8, nnUNetTrainer.get_training_transforms; what it calls the noise's variance it uses as the deviation
    "nnunet": Augmentation(
        rotated=0.2,
        scaled=0.2,
        most_degrees=30,
        most_degrees_in_plane=180,
        most_degrees_elongated=15,
        scales=(0.7, 1.4),
        changes=(
            Change(of="noise", chance=0.1, low=0.0, high=0.1, shared=True),
            Change(of="blur", chance=0.2, low=0.5, high=1.0, channels=0.5),
            Change(of="brightness", chance=0.15, low=0.75, high=1.25),
            Change(of="contrast", chance=0.15, low=0.75, high=1.25),
            Change(of="low_resolution", chance=0.25, low=0.5, high=1.0, channels=0.5),
            Change(of="inverted_gamma", chance=0.1, low=0.7, high=1.5),
            Change(of="gamma", chance=0.3, low=0.7, high=1.5),
        ),
    ),
}
"""By the names that a plan's recipe may say."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One random rotation, scaling and mirroring about a window's centre; drawn before the window is cut."""

    matrix: Array
    """From where a voxel ends up to where it comes from, in millimetres from the centre."""
    through: int | None = None
    """The axis across thick slices, if they are: low resolution is simulated in their plane alone."""

    def reach(self, patch: Triple, spacing_mm: tuple[float, float, float]) -> Triple:
        """The window to cut: as wide as the turned voxels' centres lie apart, no wider."""
        apart = np.abs(self.in_voxels(spacing_mm)) @ (np.array(patch) - 1)
        i, j, k = (int(n) + 1 for n in np.ceil(apart - 1e-6))
        return i, j, k

    def in_voxels(self, spacing_mm: tuple[float, float, float]) -> Float[Array, "3 3"]:
        """The matrix between voxels instead of millimetres."""
        return self.matrix * np.array(spacing_mm) / np.array(spacing_mm)[:, None]


def draw_turn(
    rng: np.random.Generator,
    augmentation: Augmentation,
    spacing_mm: tuple[float, float, float],
    patch: Triple,
    mirror: tuple[bool, bool, bool] = (False, False, False),
) -> Turn:
    """Usually a mirroring or nothing at all; else also a turn about all axes, or in the plane of thick slices."""
    through, most = _freedom(augmentation, spacing_mm, patch)
    rotated, scaled = rng.random() < augmentation.rotated, rng.random() < augmentation.scaled
    matrix = np.eye(3)
    if rotated:
        matrix = _rotation(np.deg2rad(rng.uniform(-most, most, 3)), through)
    if rotated if augmentation.as_one else scaled:
        size = np.full(3, _amount(rng, *augmentation.scales))
        if through is not None:
            size[through] = 1
        matrix = matrix * size
    flipped = [-1.0 if may and rng.random() < augmentation.mirrored else 1.0 for may in mirror]
    return Turn(matrix=matrix * flipped, through=through)


def _freedom(
    augmentation: Augmentation, spacing_mm: tuple[float, float, float], patch: Triple
) -> tuple[int | None, float]:
    """The axis that is left alone, if one is, and how many degrees windows are turned at most."""
    if 1 in patch:
        flat = patch.index(1)
        sides = np.delete(patch, flat)
        is_elongated = sides.max() > 1.5 * sides.min()
        return flat, augmentation.most_degrees_elongated if is_elongated else augmentation.most_degrees_in_plane
    thick = max(range(3), key=lambda axis: (spacing_mm[axis], -patch[axis]))
    # nnU-Net v2, configuration.py ANISO_THRESHOLD: three times
    is_flat = max(patch) > 3 * patch[thick]
    if is_flat or (augmentation.by_spacing and spacing_mm[thick] > 3 * sorted(spacing_mm)[1]):
        return thick, augmentation.most_degrees_in_plane
    return None, augmentation.most_degrees


def _rotation(angles: Float[Array, " 3"], through: int | None) -> Float[Array, "3 3"]:
    """About each axis in turn, or about one alone; what is not mixed stays exactly 0 and 1."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        if through in (None, axis):
            one, two = (axis + 1) % 3, (axis + 2) % 3
            about = np.eye(3)
            cos, sin = np.cos(angle), np.sin(angle)
            about[[one, one, two, two], [one, two, one, two]] = cos, -sin, sin, cos
            matrix = about @ matrix
    return matrix


def _amount(rng: np.random.Generator, low: float, high: float) -> float:
    if low < 1 < high:
        return float(rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high))
    return float(rng.uniform(low, high))


def augment(
    image: Float32[Tensor, "channel a b c"],
    labels: Integer[Tensor, "1 a b c"],
    turn: Turn,
    patch: Triple,
    spacing_mm: tuple[float, float, float],
    rng: np.random.Generator,
    augmentation: Augmentation,
) -> tuple[Float32[Tensor, "channel i j k"], Integer[Tensor, "1 i j k"]]:
    """A window, cut as `turn.reach` says, turned and changed. Outside of what was cut there is 0, and IGNORED."""
    seen, truth = _turned(image.numpy(), labels.numpy(), turn, patch, spacing_mm)
    for change in augmentation.changes:
        if rng.random() < change.chance:
            _apply(change, seen, turn.through, rng)
    return torch.from_numpy(seen), torch.from_numpy(truth)


def _apply(change: Change, image: Array, through: int | None, rng: np.random.Generator) -> None:
    amount = partial(_amount, rng, change.low, change.high)
    if change.shared:
        amount = partial(float, amount())
    for channel in image:
        if rng.random() < change.channels:
            CHANGES[change.of](channel, amount, through, rng)


# Geometry: axes that keep to themselves are cropped, flipped or stretched one by one; those that mix are sampled.


def _turned(
    image: Array, labels: Array, turn: Turn, patch: Triple, spacing_mm: tuple[float, float, float]
) -> tuple[Array, Array]:
    matrix = turn.in_voxels(spacing_mm)
    elsewhere = (matrix != 0) & ~np.eye(3, dtype=bool)
    mixed = np.flatnonzero(elsewhere.any(axis=0) | elsewhere.any(axis=1)).tolist()
    needed = [max(n, 1 + (axis in mixed)) for axis, n in enumerate(turn.reach(patch, spacing_mm))]
    seen, truth = _at_least(needed, image, 0), _at_least(needed, labels, IGNORED)
    straight = [axis for axis in range(3) if axis not in mixed]
    # axes that shrink go first and those that grow last, so that the others have less to do
    for axis in sorted(straight, key=lambda axis: patch[axis] / needed[axis]):
        seen, truth = _straight(seen, truth, axis, matrix[axis, axis], patch[axis])
    if mixed:
        seen, truth = _sampled(seen, truth, matrix, mixed, patch)
    return _own(seen, image), _own(truth, labels)


def _at_least(needed: list[int], window: Array, outside: float) -> Array:
    """With `outside` around it where it was cut too small; as much on either side, so that its centre stays."""
    missing = [max(0, -(-(n - side) // 2)) for n, side in zip(needed, window.shape[1:], strict=True)]
    if not any(missing):
        return window
    return np.pad(window, [(0, 0), *((n, n) for n in missing)], constant_values=outside)


def _own(window: Array, given: Array) -> Array:
    """In order, and nothing of what was given, which is never changed."""
    is_others = np.may_share_memory(window, given)
    return np.array(window, order="C") if is_others else _in_order(window)


def _in_order(window: Array) -> Array:
    """As it lies where it is in order; numpy finds that of an axis of one voxel whatever its stride, torch does not."""
    return np.array(window, order="C") if min(window.strides) < 0 else np.ascontiguousarray(window)


def _straight(image: Array, labels: Array, axis: int, scale: float, side: int) -> tuple[Array, Array]:
    """One axis by itself: cropped and mirrored where voxels fall on voxels, else stretched."""
    size = image.shape[1 + axis]
    if abs(scale) == 1:
        start = (size - side) // 2
        inside = (slice(None),) * (1 + axis) + (slice(start, start + side),)
        turned = (slice(None),) * (1 + axis) + (slice(None, None, int(scale)),)
        return image[inside][turned], labels[inside][turned]
    places = np.clip(scale * (np.arange(side) - (side - 1) / 2) + (size - 1) / 2, 0, size - 1)
    return _between(image, 1 + axis, places), labels.take((places + 0.5).astype(np.intp), axis=1 + axis)


def _between(voxels: Array, axis: int, places: Float[Array, " n"]) -> Array:
    """Linear interpolation along one axis, at places between its first voxel and its last."""
    first = places.astype(np.intp)
    low = voxels.take(first, axis=axis)
    high = voxels.take(np.minimum(first + 1, voxels.shape[axis] - 1), axis=axis)
    weight = (places - first).astype(np.float32)
    return _mixture(low, high, weight.reshape([-1 if n == axis else 1 for n in range(voxels.ndim)]))


def _mixture(low: Array, high: Array, weight: Array) -> Array:
    """Written over `high`."""
    high -= low
    high *= weight
    high += low
    return high


BLOCK = 2**16
"""Voxels that are worked on at a time: few enough to stay in a core's cache from one operation to the next."""


def _sampled(image: Array, labels: Array, matrix: Array, mixed: list[int], patch: Triple) -> tuple[Array, Array]:
    """Where axes mix: linear interpolation of the image and the nearest label, block by block at the same places."""
    order = [*mixed, *(axis for axis in range(3) if axis not in mixed)]
    to = [patch[axis] for axis in order]
    size = [image.shape[1 + axis] for axis in mixed]
    flat, parts = _rows(image, order, len(mixed)), _rows(labels, order, len(mixed))
    seen = np.empty((len(flat), np.prod(to[: len(mixed)]), *flat[0].shape[1:]), np.float32)
    truth = np.empty((1, *seen.shape[1:]), labels.dtype)
    lines = [_lines(matrix[axis], image.shape[1 + axis], mixed, patch) for axis in mixed]
    width = int(np.prod(to[1 : len(mixed)]))
    step = max(1, BLOCK // int(np.prod(to[1:])))
    for begin in range(0, to[0], step):
        block = slice(begin * width, min(begin + step, to[0]) * width)
        places = [np.add.outer(first[begin : begin + step], plane).reshape(-1) for first, plane in lines]
        nearest, corner, weights = _corners(places, size, flat[0].ndim)
        for made, channel in zip(seen, flat, strict=True):
            made[block] = _interpolated(channel, corner, _strides(size), weights)
        truth[0, block] = parts[0].index_select(0, nearest).numpy()
    back = [0, *(1 + order.index(axis) for axis in range(3))]
    return seen.reshape(-1, *to).transpose(back), truth.reshape(1, *to).transpose(back)


def _rows(window: Array, order: list[int], mixed: int) -> list[Tensor]:
    """Per channel: one row per place along the mixed axes, with all that lies along the other axis in it."""
    moved = _in_order(window.transpose(0, *(1 + axis for axis in order)))
    shape = (int(np.prod(moved.shape[1 : 1 + mixed])), *moved.shape[1 + mixed :])
    return [torch.from_numpy(channel.reshape(shape)) for channel in moved]


def _lines(row: Array, size: int, mixed: list[int], patch: Triple) -> tuple[Array, Array]:
    """Places along one axis of the window, as a sum: of the first axis of the result, and of the others."""
    along = [row[axis] * (np.arange(patch[axis]) - (patch[axis] - 1) / 2) for axis in mixed]
    along[0] = along[0] + (size - 1) / 2
    return along[0].astype(np.float32), reduce(np.add.outer, along[1:]).astype(np.float32)


def _strides(size: list[int]) -> list[int]:
    return [int(np.prod(size[n + 1 :])) for n in range(len(size))]


def _corners(places: list[Array], size: list[int], dimensions: int) -> tuple[Tensor, Tensor, list[Array]]:
    """The row nearest to each place, the row at the lowest corner of the cell around it, and how far into it it lies.

    Written over the places. What is clipped is rounding: the window was cut as wide as it is reached."""
    corner, above = np.zeros(places[0].shape, np.int32), np.zeros(places[0].shape, np.int32)
    for place, side, stride in zip(places, size, _strides(size), strict=True):
        np.clip(place, 0, np.nextafter(np.float32(side - 1), np.float32(0)), out=place)
        low = np.floor(place)
        place -= low
        corner += low.astype(np.int32) * np.int32(stride)
        above += (place >= 0.5) * np.int32(stride)
    above += corner
    weights = [place.reshape((-1,) + (1,) * (dimensions - 1)) for place in places]
    return torch.from_numpy(above), torch.from_numpy(corner), weights


def _interpolated(rows: Tensor, corner: Tensor, strides: list[int], weights: list[Array]) -> Array:
    """Along the first axis between what the others give at its lower and its upper side."""
    if not strides:
        return rows.index_select(0, corner).numpy()
    low = _interpolated(rows, corner, strides[1:], weights[1:])
    high = _interpolated(rows[strides[0] :], corner, strides[1:], weights[1:])
    return _mixture(low, high, weights[0])


# Intensities: each changes one channel in place; values are about -3 to 3 here.

Amount = Callable[[], float]
"""Draws how far."""


def _noise(channel: Array, amount: Amount, through: int | None, rng: np.random.Generator) -> None:
    # torch draws three times as fast as numpy, and on one thread too
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    noise = torch.randn(channel.shape, generator=generator).numpy()
    noise *= np.float32(amount())
    channel += noise


def _brightness(channel: Array, amount: Amount, through: int | None, rng: np.random.Generator) -> None:
    channel *= np.float32(amount())


def _shift(channel: Array, amount: Amount, through: int | None, rng: np.random.Generator) -> None:
    channel += np.float32(amount())


def _contrast(channel: Array, amount: Amount, through: int | None, rng: np.random.Generator) -> None:
    """About the mean; the range stays."""
    mean, low, high = channel.mean(), channel.min(), channel.max()
    channel -= mean
    channel *= np.float32(amount())
    channel += mean
    np.clip(channel, low, high, out=channel)


def _gamma(
    channel: Array, amount: Amount, through: int | None, rng: np.random.Generator, *, inverted: bool = False
) -> None:
    """A power of where a value lies in the range, or of how far it is from the top; mean and deviation stay."""
    mean, power = channel.mean(), np.float32(amount())
    channel -= mean
    low, high, deviation = channel.min(), channel.max(), _deviation(channel)
    if high > low:
        origin, sign = (high, -1) if inverted else (low, 1)
        channel -= origin
        channel *= sign / (high - low)
        # through the logarithm, which processors have vectors for where they have none for a power
        np.maximum(channel, np.float32(1e-30), out=channel)
        np.log(channel, out=channel)
        channel *= power
        np.exp(channel, out=channel)
        channel -= channel.mean()
        channel *= sign * deviation / max(_deviation(channel), np.float32(1e-7))
    channel += mean


def _deviation(centred: Array) -> np.float32:
    """Of values about 0; plane by plane, since a sum of too many squares loses its last digits."""
    squares = np.einsum("ijk,ijk->i", centred, centred)
    return np.float32(np.sqrt(squares.sum(dtype=np.float64) / centred.size))


def _blur(channel: Array, amount: Amount, through: int | None, rng: np.random.Generator) -> None:
    """A Gaussian along each axis, three deviations to either side; the edges mirror what is inside."""
    kernels = [_gaussian(amount()) for _ in range(3)]
    padded = np.pad(channel, [(len(kernel) // 2,) * 2 for kernel in kernels], mode="reflect")
    step, reach = max(1, BLOCK // channel[0].size), len(kernels[0]) - 1
    for begin in range(0, len(channel), step):
        end = min(begin + step, len(channel))
        slab = padded[begin : end + reach]
        for axis, kernel in enumerate(kernels):
            slab = _smoothed(slab, kernel, axis)
        channel[begin:end] = slab


def _gaussian(sigma: float) -> Float32[Array, " n"]:
    radius = max(1, round(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return (kernel / kernel.sum()).astype(np.float32)


def _smoothed(voxels: Array, kernel: Array, axis: int) -> Array:
    """Only where the whole kernel lies inside."""
    radius = len(kernel) // 2
    size = voxels.shape[axis] - 2 * radius
    moved = [voxels[(slice(None),) * axis + (slice(n, n + size),)] for n in range(2 * radius + 1)]
    out = moved[radius] * kernel[radius]
    for n in range(radius):
        pair = moved[n] + moved[-1 - n]
        pair *= kernel[n]
        out += pair
    return out


def _low_resolution(channel: Array, amount: Amount, through: int | None, rng: np.random.Generator) -> None:
    """As if scanned with fewer voxels: only some are kept, and what lies between them is interpolated."""
    zoom = amount()
    sizes = {axis: max(1, round(n * zoom)) for axis, n in enumerate(channel.shape) if axis != through}
    small = channel
    for axis, size in sizes.items():
        kept = (np.arange(size) + 0.5) * channel.shape[axis] / size
        small = small.take(kept.astype(np.intp), axis=axis)
    for axis, size in reversed(sizes.items()):
        full = channel.shape[axis]
        places = np.clip((np.arange(full) + 0.5) * size / full - 0.5, 0, size - 1)
        small = _between(small, axis, places)
    channel[:] = small


def _bias_field(channel: Array, amount: Amount, through: int | None, rng: np.random.Generator) -> None:
    """Brighter here and darker there, as near a coil: times the exponential of a polynomial of the third degree."""
    x, y, z = (np.linspace(-1, 1, n, dtype=np.float32) for n in channel.shape)
    # per power of z, the polynomial in x and y beside it
    beside = [
        sum(
            (np.float32(amount()) * np.multiply.outer(x**p, y**q) for p in range(4 - r) for q in range(4 - r - p)),
            start=np.zeros((len(x), len(y)), np.float32),
        )
        for r in range(4)
    ]
    for i, plane in enumerate(channel):
        terms = [power[i] for power in beside]
        field = np.multiply.outer(terms[3], z)
        for term in terms[2:0:-1]:
            field += term[:, None]
            field *= z
        field += terms[0][:, None]
        plane *= np.exp(field, out=field)


CHANGES: dict[str, Callable[[Array, Amount, int | None, np.random.Generator], None]] = {
    "noise": _noise,
    "blur": _blur,
    "brightness": _brightness,
    "shift": _shift,
    "contrast": _contrast,
    "low_resolution": _low_resolution,
    "gamma": _gamma,
    "inverted_gamma": partial(_gamma, inverted=True),
    "bias_field": _bias_field,
}
"""What may happen to a channel, by name."""
