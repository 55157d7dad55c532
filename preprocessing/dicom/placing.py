"""Frames -> their order and the grid they lie on; what is no even, straight grid is refused, or resampled where allowed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Integer, Shaped

from ..reading import STRICT, Reading
from ..volume import LPS_TO_RAS, SHEAR_TOLERANCE, UnreadableScan
from .frames import Frame, Plane

SPACING_TOLERANCE = 0.01
SPACING_TOLERANCE_MM = 0.01
"""A slice may lie this share of the spacing, or this far, from its place on the grid: positions are rounded text."""

HOLE = 3.5
"""Among uneven slices, a step so many times the usual one is no step but a hole."""

VOID = 6
"""A step so many times the usual one is interpolated on nobody's word: what would be made up is longer than an organ."""

GROWTH = 4
"""So many times its pixels a slice may grow when shifted slices are brought onto one straight grid."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Resampling:
    """How a straight, even grid is made of slices that lie on none."""

    shifts: Float[np.ndarray, "slice 2"]
    """Row and column of the grid, with fractions, at which each slice's first pixel lies."""
    below: Integer[np.ndarray, " k"]
    """For each slice of the grid the last one that lies below it, or in it."""
    above: Float[np.ndarray, " k"]
    """The share of the next one."""
    size: tuple[int, int]
    """Rows and columns."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Placing:
    """Frames in the order of their places along the normal, and the grid."""

    frames: tuple[Frame, ...]
    affine: Float[np.ndarray, "4 4"]
    """Column, row, slice to RAS+ millimetres."""
    resampling: Resampling | None
    """None where slice k of the grid is frame k."""
    repairs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Stack:
    """Where the slices lie, in the directions of their plane and along its normal."""

    frames: tuple[Frame, ...]
    name: str
    origin: Float[np.ndarray, " 3"]
    directions: Float[np.ndarray, "3 3"]
    """Row, column, normal: one in each row."""
    spacing: tuple[float, float]
    """Between rows, between columns."""
    heights: Float[np.ndarray, " slice"]
    lateral: Float[np.ndarray, "slice 2"]
    """Millimetres along row and column from where the first slice's normal pierces each."""
    repairs: tuple[str, ...]

    @property
    def steps(self) -> Float[np.ndarray, " step"]:
        return np.diff(self.heights)

    @property
    def usual(self) -> float:
        """The step most slices make; of two as frequent the smaller."""
        return float(np.percentile(self.steps, 50, method="lower"))

    @property
    def tolerance(self) -> float:
        return max(SPACING_TOLERANCE * self.usual, SPACING_TOLERANCE_MM)


def place(frames: Sequence[Frame], name: str, reading: Reading = STRICT) -> Placing:
    """The grid of a volume; refused with the reason unless it is sure, or its repair is allowed."""
    _refuse_too_few(len(frames), name, reading)
    stack = _stacked(frames, name)
    _refuse_void(stack)
    counts = _counts(stack)
    even = bool((counts == 1).all())
    tilted = float(np.linalg.norm(stack.lateral, axis=1).max()) > stack.tolerance
    repairs = [*stack.repairs]
    heights = stack.heights
    if not even and (counts > 0).all():
        repairs.append(_allowed_gaps(stack, counts, reading))
        heights = np.linspace(0, heights[-1], int(counts.sum()) + 1)
    elif not even:
        repairs.append(_allowed_uneven(stack, reading))
        heights = _even_heights(stack)
    if tilted:
        repairs.append(_allowed_tilt(stack, reading))
    if even and not tilted:
        return Placing(frames=stack.frames, affine=_affine(stack), resampling=None, repairs=tuple(repairs))
    resampling, first = _resampling(stack, heights, tilted)
    affine = _affine(stack, first=first, step=float(heights[-1] / (len(heights) - 1)))
    return Placing(frames=stack.frames, affine=affine, resampling=resampling, repairs=tuple(repairs))


def resample(
    slices: Shaped[np.ndarray, "slice row column"], how: Resampling, fill: float
) -> Float[np.ndarray, "k newrow newcolumn"]:
    """Linear in the plane and along the normal; `fill` where no slice, or only one of the two needed, has anything."""
    grid = np.empty((len(how.below), *how.size), np.float32)
    shifted: dict[int, np.ndarray] = {}
    for k, (below, above) in enumerate(zip(how.below.tolist(), how.above.tolist(), strict=True)):
        needed = (below,) if above == 0 else (below, below + 1)
        shifted = {n: shifted[n] if n in shifted else _shifted(slices[n], how.shifts[n], how.size) for n in needed}
        grid[k] = shifted[below] if above == 0 else (1 - above) * shifted[below] + above * shifted[below + 1]
        np.copyto(grid[k], fill, where=np.isnan(grid[k]))
    return grid


def _shifted(
    plane: Shaped[np.ndarray, "row column"], shift: Float[np.ndarray, " 2"], size: tuple[int, int]
) -> Float[np.ndarray, "newrow newcolumn"]:
    """The slice on the larger grid, NaN around it."""
    values = plane.astype(np.float64)
    starts = []
    for axis in range(2):
        whole = int(np.floor(shift[axis] + 1e-6))
        share = float(shift[axis] - whole)
        if share > 1e-6:
            length = values.shape[axis]
            near, far = (np.take(values, range(start, length - 1 + start), axis) for start in (1, 0))
            values, whole = (1 - share) * near + share * far, whole + 1
        starts.append(whole)
    canvas = np.full(size, np.nan)
    canvas[starts[0] : starts[0] + values.shape[0], starts[1] : starts[1] + values.shape[1]] = values
    return canvas


def _refuse_too_few(count: int, name: str, reading: Reading) -> None:
    if count < 2:
        raise UnreadableScan(
            f"{name} has {count} slice; a volume needs at least 3. Look for the others.", reason="too_few_slices"
        )
    if count == 2 and "few" not in reading.allow:
        raise UnreadableScan(
            f"{name} has 2 slices, and no third one confirms their distance; a volume needs at least 3. Look for the "
            "others, or allow few.",
            reason="too_few_slices",
        )


def _stacked(frames: Sequence[Frame], name: str) -> _Stack:
    """The frames in order along the normal, and what had to be mended of their directions."""
    # the lowest frame's plane speaks for all: they differ by no more than rounding
    frames = sorted(frames, key=lambda frame: (frame.position, frame.path, frame.number))
    plane = frames[0].plane
    assert plane is not None
    row, column = np.array(plane.row), np.array(plane.column)
    skew = abs(float(row @ column))
    row, column = _right_angled(row, column)
    directions = np.array([row, column, np.cross(row, column)])
    positions = np.array([frame.position for frame in frames], dtype=np.float64)
    order = np.argsort(positions @ directions[2], kind="stable")
    positions = positions[order]
    upright = _upright(directions, positions, plane)
    angle = np.degrees(np.linalg.norm(upright[2] - directions[2]))
    rounded = f"ImageOrientationPatient was rounded to few digits, and was turned upright by {angle:.3f}°."
    directions = upright
    along = (positions - positions[0]) @ directions.T
    turned = f"ImageOrientationPatient was {skew:.1g} off a right angle, and was straightened."
    few = (
        "Only two slices were there, and no third one confirms their distance; they were taken as a volume, as allowed."
    )
    return _Stack(
        frames=tuple(frames[n] for n in order),
        name=name,
        origin=positions[0],
        directions=directions,
        spacing=plane.spacing,
        heights=along[:, 2],
        lateral=along[:, :2],
        repairs=(
            *([turned] if skew > SHEAR_TOLERANCE else []),
            *([rounded] if angle > 0 else []),
            *([few] if len(frames) == 2 else []),
        ),
    )


def _upright(
    directions: Float[np.ndarray, "3 3"], positions: Float[np.ndarray, "slice 3"], plane: Plane
) -> Float[np.ndarray, "3 3"]:
    """Oblique cosines of few digits make straight stacks look tilted; positions over a whole stack are more exact."""
    along = (positions - positions[0]) @ directions.T
    drift = np.linalg.norm(along[:, :2], axis=1)
    step = float(along[-1, 2]) / (len(positions) - 1)
    if drift.max() <= max(SPACING_TOLERANCE * step, SPACING_TOLERANCE_MM):
        return directions
    if len(positions) < 3 or drift[-1] > 1.3 * _rounding(plane) * along[-1, 2]:
        return directions
    normal = (positions[-1] - positions[0]) / np.linalg.norm(positions[-1] - positions[0])
    row, column = _right_angled(*(axis - (axis @ normal) * normal for axis in directions[:2]))
    return np.array([row, column, np.cross(row, column)])


def _rounding(plane: Plane) -> float:
    """The last digit of oblique cosines of 3 to 5 digits; 0 where they are exact."""
    cosines = np.array([*plane.row, *plane.column])
    if np.array_equal(cosines, cosines.round()):
        return 0.0
    return next((10.0**-digits for digits in (3, 4, 5) if np.abs(cosines - cosines.round(digits)).max() < 1e-9), 0.0)


def _right_angled(row: np.ndarray, column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both turned by the same, so that neither is believed more than the other."""
    row, column = row / np.linalg.norm(row), column / np.linalg.norm(column)
    if abs(float(row @ column)) < 1e-12:  # as they are: to turn them would only round
        return row, column
    half_sum, half_difference = row + column, row - column
    half_sum, half_difference = half_sum / np.linalg.norm(half_sum), half_difference / np.linalg.norm(half_difference)
    return (half_sum + half_difference) / np.sqrt(2), (half_sum - half_difference) / np.sqrt(2)


def _refuse_void(stack: _Stack) -> None:
    if stack.steps.max() <= VOID * stack.usual:
        return
    at = int(np.argmax(stack.steps))
    raise UnreadableScan(
        f"{stack.name} misses slices: {_between(stack, at)}, more than can be interpolated. Send the whole series again.",
        reason="missing_slices",
    )


def _counts(stack: _Stack) -> Integer[np.ndarray, " step"]:
    """How many steps of an even grid each step between slices is; 0 where they are none of any even grid."""
    steps, heights = stack.steps, stack.heights
    for guess in (stack.usual, float(steps.min())):
        counts = np.maximum(np.rint(steps / guess), 1).astype(np.int64)
        step = float(heights[-1] / counts.sum())
        tolerance = max(SPACING_TOLERANCE * step, SPACING_TOLERANCE_MM)
        off = np.abs(heights - step * np.concatenate([[0], np.cumsum(counts)])).max()
        # of two neighbours one may lie too high and the other too low
        bent = np.abs(steps / counts - step).max()
        if off <= tolerance and bent <= 2 * tolerance and counts.sum() <= 3 * len(counts):
            return counts
    return np.zeros(len(steps), np.int64)


def _allowed_gaps(stack: _Stack, counts: np.ndarray, reading: Reading) -> str:
    """The sentence on what was filled, or the refusal."""
    at = int(np.argmax(counts))
    lost = int(counts.sum() - len(counts))
    if "gaps" not in reading.allow:
        raise UnreadableScan(
            f"{stack.name} misses slices: {_between(stack, at)}, as if {counts[at] - 1} were lost. Send the whole series "
            "again, or allow gaps to interpolate them.",
            reason="missing_slices",
        )
    first = np.concatenate([[0], np.cumsum(counts)])
    ends = [(first[n] + 2, first[n + 1]) for n in np.flatnonzero(counts > 1)]
    bands = ", ".join(f"{start} to {end}" if start < end else f"{start}" for start, end in ends)
    return (
        f"{lost} slice(s) were missing and were interpolated from their neighbours, as allowed: of the "
        f"{first[-1] + 1} slices, counted from 1, number {bands}."
    )


def _allowed_uneven(stack: _Stack, reading: Reading) -> str:
    at = int(np.argmax(np.abs(stack.steps - stack.usual)))
    hole = float(stack.steps.max()) > HOLE * stack.usual
    if hole and "gaps" not in reading.allow:
        at = int(np.argmax(stack.steps))
        raise UnreadableScan(
            f"{stack.name} misses slices: {_between(stack, at)}. Send the whole series again, or allow gaps and uneven to "
            "interpolate them.",
            reason="missing_slices",
        )
    if "uneven" not in reading.allow:
        raise UnreadableScan(
            f"{stack.name} has slices at uneven distances: {_between(stack, at)}; even ones are needed. Resample the "
            "series, or allow uneven to have it interpolated.",
            reason="uneven_spacing",
        )
    heights = _even_heights(stack)
    return (
        f"Slices lay at uneven distances of {stack.steps.min():.3f} to {stack.steps.max():.3f} mm and were interpolated "
        f"onto {len(heights)} slices at {heights[1]:.3f} mm, as allowed."
    )


def _even_heights(stack: _Stack) -> Float[np.ndarray, " k"]:
    """From the first slice to the last, as near together as the nearest slices, but not below half the mean distance."""
    extent = float(stack.heights[-1])
    step = max(float(stack.steps.min()), extent / len(stack.steps) / 2)
    return np.linspace(0, extent, max(2, round(extent / step) + 1))


def _between(stack: _Stack, at: int) -> str:
    one, other = (_called(frame) for frame in stack.frames[at : at + 2])
    return f"between {one} and {other} lie {stack.steps[at]:.3f} mm where {stack.usual:.3f} mm are usual"


def _called(frame: Frame) -> str:
    several = frame.packing is not None and frame.packing.frames > 1
    return f"frame {frame.number + 1} of {frame.path.name}" if several else frame.path.name


def _allowed_tilt(stack: _Stack, reading: Reading) -> str:
    off = float(np.linalg.norm(stack.lateral, axis=1).max())
    angle = np.degrees(np.arctan2(np.linalg.norm(stack.lateral[-1]), stack.heights[-1]))
    if "tilt" not in reading.allow:
        raise UnreadableScan(
            f"{stack.name} has slices shifted against each other by up to {off:.2f} mm (a tilt of {angle:.1f}°, as of a "
            "tilted gantry); slices stacked along their normal are needed. Resample the series to a straight grid, or "
            "allow tilt to have it resampled.",
            reason="tilted",
        )
    return (
        f"Slices were shifted against each other by up to {off:.2f} mm (a tilt of {angle:.1f}°) and were interpolated "
        "in their plane onto a straight grid, as allowed; it is larger than they are, and what no slice covers has the "
        "lowest value."
    )


def _resampling(stack: _Stack, heights: np.ndarray, tilted: bool) -> tuple[Resampling, np.ndarray]:
    """How to get onto the even heights, and the first pixel of the straight grid, as row and column of the first slice."""
    rows, columns = stack.frames[0].size
    shifts = stack.lateral[:, ::-1] / np.array(stack.spacing) if tilted else np.zeros((len(stack.frames), 2))
    first = np.floor(shifts.min(axis=0) + 1e-6)
    last = np.ceil(shifts.max(axis=0) - 1e-6)
    size = (rows + int(last[0] - first[0]), columns + int(last[1] - first[1]))
    if size[0] * size[1] > GROWTH * rows * columns:
        raise UnreadableScan(
            f"{stack.name} has slices so far beside each other that a straight grid around them would have {size[0]} x "
            f"{size[1]} pixels; slices above each other are needed. Split the series by what makes them differ.",
            reason="tilted",
        )
    near = np.abs(stack.heights[:, None] - heights).argmin(axis=0)  # a slice that is nearly in place is in place
    in_place = np.abs(stack.heights[near] - heights) <= stack.tolerance
    below = np.clip(np.searchsorted(stack.heights, heights, side="right") - 1, 0, len(stack.frames) - 2)
    above = (heights - stack.heights[below]) / stack.steps[below]
    return Resampling(
        shifts=shifts - first,
        below=np.where(in_place, near, below),
        above=np.where(in_place, 0.0, above),
        size=size,
    ), first


def _affine(stack: _Stack, first: Any = (0, 0), step: float | None = None) -> Float[np.ndarray, "4 4"]:
    between_rows, between_columns = stack.spacing
    row, column, normal = stack.directions
    step = step if step is not None else float(stack.heights[-1] / (len(stack.heights) - 1))
    affine = np.eye(4)
    affine[:3, :3] = np.column_stack([row * between_columns, column * between_rows, normal * step])
    affine[:3, 3] = stack.origin + row * between_columns * first[1] + column * between_rows * first[0]
    return LPS_TO_RAS @ affine
