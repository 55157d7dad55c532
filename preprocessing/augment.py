"""What training does to a window, so that a network learns anatomy and not one scanner's habits."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

Triple = tuple[int, int, int]

IGNORED = -1
"""The label of voxels outside the scan: the loss does not look there."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One random rotation and scaling about a window's centre, in millimetres; drawn before the window is cut."""

    matrix: np.ndarray
    """From where a voxel ends up to where it comes from, in millimetres from the centre."""

    @property
    def is_identity(self) -> bool:
        return bool(np.array_equal(self.matrix, np.eye(3)))

    def reach(self, patch: Triple, spacing_mm: tuple[float, float, float]) -> Triple:
        """The window to cut so that no corner of the turned one is missing."""
        half = np.array(patch) * np.array(spacing_mm) / 2
        corners = np.array(list(np.ndindex(2, 2, 2))) * 2 * half - half
        needed = np.abs(corners @ self.matrix.T).max(axis=0) * 2 / np.array(spacing_mm)
        i, j, k = (int(n) for n in np.ceil(np.maximum(needed, patch)).astype(int))
        return i, j, k


TURN_CHANCE, TURN_MOST, SCALE_RANGE = 0.35, np.deg2rad(25), (0.8, 1.25)


def draw_turn(rng: np.random.Generator, spacing_mm: tuple[float, float, float]) -> Turn:
    """Usually none; else a turn about all axes, or in the plane alone where slices are over three times as thick."""
    if rng.random() > TURN_CHANCE:
        return Turn(matrix=np.eye(3))
    matrix = np.eye(3)
    thick = int(np.argmax(spacing_mm))
    in_plane_only = spacing_mm[thick] > 3 * sorted(spacing_mm)[1]
    for axis in range(3):
        angle = rng.uniform(-TURN_MOST, TURN_MOST)
        if in_plane_only and axis != thick:
            continue
        one, two = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[[one, one, two, two], [one, two, one, two]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        matrix = turn @ matrix
    low, high = SCALE_RANGE
    return Turn(matrix=matrix * np.exp(rng.uniform(np.log(low), np.log(high))))


def augment(
    image: Float[Tensor, "channel a b c"],
    labels: Float[Tensor, "1 a b c"],
    turn: Turn,
    patch: Triple,
    spacing_mm: tuple[float, float, float],
    rng: np.random.Generator,
) -> tuple[Float[Tensor, "channel i j k"], Float[Tensor, "1 i j k"]]:
    """Turned and scaled with one interpolation, then each channel's intensities changed by itself."""
    if not turn.is_identity:
        image, labels = _turned(image, labels, turn, patch, spacing_mm)
    return _intensities(image, rng), labels


def _turned(
    image: Tensor, labels: Tensor, turn: Turn, patch: Triple, spacing_mm: tuple[float, float, float]
) -> tuple[Tensor, Tensor]:
    """grid_sample counts from -1 to 1 over the cut window, and x, y, z mean its last, middle, first axis."""
    half_in = np.array(image.shape[1:]) * np.array(spacing_mm) / 2
    half_out = np.array(patch) * np.array(spacing_mm) / 2
    matrix = np.diag(1 / half_in) @ turn.matrix @ np.diag(half_out)
    theta = torch.zeros(1, 3, 4)
    theta[0, :, :3] = torch.tensor(matrix[::-1, ::-1].copy(), dtype=torch.float32)
    places = functional.affine_grid(theta, [1, 1, *patch], align_corners=False)
    turned = functional.grid_sample(image[None], places, mode="bilinear", padding_mode="zeros", align_corners=False)
    # shifted by one, so that the zeros outside become IGNORED and not background
    moved = functional.grid_sample(labels[None] + 1, places, mode="nearest", padding_mode="zeros", align_corners=False)
    return turned[0], moved[0] - 1


def _intensities(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Brightness, contrast, gamma, noise and blur in the shares nnU-Net found useful; values are about -3 to 3 here."""
    out = image.clone()
    for channel in out:
        if rng.random() < 0.2:
            channel.mul_(rng.uniform(0.75, 1.3))
        if rng.random() < 0.2:
            channel.add_(rng.uniform(-0.3, 0.3))
        if rng.random() < 0.2:
            _gamma(channel, rng.uniform(0.7, 1.5))
        if rng.random() < 0.1:
            _blur(channel, rng.uniform(0.5, 1.0))
        if rng.random() < 0.2:
            noise = rng.standard_normal(channel.shape, dtype=np.float32) * rng.uniform(0, 0.25)
            channel.add_(torch.from_numpy(noise))
    return out


def _gamma(channel: Tensor, power: float) -> None:
    low, high = channel.min(), channel.max()
    if high > low:
        channel.sub_(low).div_(high - low).pow_(power).mul_(high - low).add_(low)


def _blur(channel: Tensor, sigma: float) -> None:
    """A Gaussian of five voxels along each axis in turn."""
    kernel = torch.exp(-0.5 * (torch.arange(-2.0, 3.0) / sigma) ** 2)
    kernel /= kernel.sum()
    out = channel[None, None]
    for axis in range(3):
        shape = [1, 1, 1, 1, 1]
        shape[axis + 2] = 5
        pad = [0, 0, 0, 0, 0, 0]
        pad[2 * (2 - axis)] = pad[2 * (2 - axis) + 1] = 2
        out = functional.conv3d(functional.pad(out, pad, mode="replicate"), kernel.reshape(shape))
    channel.copy_(out[0, 0])
