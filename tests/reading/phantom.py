"""A scan whose every voxel is known, the judge of what readers make of it, and what is meant by right."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

SHAPE = (48, 40, 24)
SPACING = (0.8, 1.25, 2.0)
"""Not one alike: whoever mixes up two axes is found out."""

MARKER = (31, 8, 17)
PLACE_MM = 0.1
VALUE = 0.5
SAMPLES = 500
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def turn(x: float, y: float, z: float) -> np.ndarray:
    """A rotation by degrees about x, then y, then z."""
    a, b, c = np.radians([x, y, z])
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    about_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def lps_affine(
    directions: np.ndarray, spacing: Sequence[float] = SPACING, origin: Sequence[float] = (-31.5, 12.25, 104.0)
) -> np.ndarray:
    """Voxel indices to LPS millimetres, the way DICOM counts them."""
    affine = np.eye(4)
    affine[:3, :3] = directions * np.array(spacing)
    affine[:3, 3] = origin
    return affine


OBLIQUE = lps_affine(turn(11, -7, 23))


def stored_values(seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """Noise: a voxel at a wrong place has a wrong value. 24 is air, 3000 the marker. [i j k]"""
    values = np.random.default_rng(seed).integers(24, 2024, shape).astype(np.int16)
    values[tuple(min(m, n - 2) for m, n in zip(MARKER, shape, strict=True))] = 3000
    return values


@dataclass(frozen=True, eq=False)
class Seen:
    """What a reader returned, or what is true: voxels [i j k] or [i j k channel], and the affine to RAS millimetres."""

    voxels: np.ndarray
    affine: np.ndarray
    unsure: np.ndarray | None = field(default=None)
    """Voxels [i j k] of which nothing is asked (padding)."""
    within: float = VALUE
    """How near a value must come."""


def truth(stored: np.ndarray | None = None, lps: np.ndarray = OBLIQUE, first: int = 0, last: int = SHAPE[2]) -> Seen:
    """The phantom as Hounsfield units; of its slices only those from `first` to before `last`."""
    values = (stored_values() if stored is None else stored).astype(np.float64) - 1024
    affine = lps.copy()
    affine[:3, 3] = (lps @ [0, 0, first, 1])[:3]
    return Seen(values[:, :, first:last], LPS_TO_RAS @ affine)


def fault(seen: Seen, true: Seen) -> str:
    """What is wrong with a volume, in words; empty when every sampled voxel is at its place with its value."""
    seen = replace(seen, voxels=seen.voxels[..., None]) if seen.voxels.ndim == 2 else seen
    samples = _samples(true)
    place = np.c_[samples, np.ones(len(samples))] @ true.affine.T
    try:
        found = (place @ np.linalg.inv(seen.affine).T)[:, :3]
    except np.linalg.LinAlgError:
        return "an affine that cannot be inverted"
    nearest = np.rint(found).astype(int)
    off_mm = np.linalg.norm((found - nearest) @ seen.affine[:3, :3].T, axis=1)
    inside = ((nearest >= 0) & (nearest < seen.voxels.shape[:3])).all(axis=1)
    right = inside & (off_mm <= PLACE_MM)
    channels = seen.voxels[0, 0, 0].size
    got = seen.voxels[tuple(nearest[right].T)].reshape(right.sum(), channels)
    wanted = true.voxels[tuple(samples[right].T)].reshape(right.sum(), true.voxels[0, 0, 0].size)
    right[right] = _alike(got, wanted, true.within)
    if right.all() and sorted(seen.voxels.shape[:3]) == sorted(true.voxels.shape[:3]):
        return ""
    return f"{right.mean():.2f} of samples right, marker {_marker_error(seen, true):.1f} mm off, {_shape(seen)}"


def _samples(true: Seen) -> np.ndarray:
    rng = np.random.default_rng(1)
    shape = np.array(true.voxels.shape[:3])
    corners = np.array(list(np.ndindex(2, 2, 2))) * (shape - 1)
    brightest = np.array(np.unravel_index(np.nanargmax(_first(true.voxels)), shape))
    samples = np.concatenate([rng.integers(0, shape, (SAMPLES, 3)), corners, brightest[None]])
    return samples if true.unsure is None else samples[~true.unsure[tuple(samples.T)]]


def _alike(got: np.ndarray, wanted: np.ndarray, within: float) -> np.ndarray:
    if got.shape != wanted.shape:
        return np.zeros(len(wanted), bool)
    with np.errstate(invalid="ignore"):
        alike = (np.abs(got - wanted) <= within) | (np.isnan(got) & np.isnan(wanted)) | (got == wanted)
    return alike.all(axis=1)


def _first(voxels: np.ndarray) -> np.ndarray:
    while voxels.ndim > 3:
        voxels = voxels[..., 0]
    return np.abs(voxels) if voxels.dtype.kind == "c" else voxels


def _marker_error(seen: Seen, true: Seen) -> float:
    places = []
    for one in (seen, true):
        voxels = np.nan_to_num(_first(one.voxels).astype(np.float64))
        places.append(one.affine @ [*np.unravel_index(np.argmax(voxels), voxels.shape), 1])
    return float(np.linalg.norm((places[0] - places[1])[:3]))


def _shape(seen: Seen) -> str:
    return "×".join(map(str, seen.voxels.shape))


def faults(returned: Sequence[Seen], truths: Sequence[Seen]) -> str:
    """Every returned volume must be one of the true ones, and each of these be there once at most."""
    left = list(truths)
    for seen in returned:
        found = [fault(seen, true) for true in left]
        if "" not in found:
            return min(found, key=len) if found else f"a volume {_shape(seen)} where there is none to be had"
        del left[found.index("")]
    return ""
