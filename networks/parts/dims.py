"""The same network over planes and over volumes: which of torch's classes, and how a patch one voxel thick is a plane."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

Dims = Literal[2, 3]
Triple = tuple[int, int, int]

CONVOLUTION: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, type[nn.ConvTranspose2d] | type[nn.ConvTranspose3d]] = {
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}
BATCH_NORM: dict[int, type[nn.BatchNorm2d] | type[nn.BatchNorm3d]] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MAX_POOL: dict[int, type[nn.MaxPool2d] | type[nn.MaxPool3d]] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVERAGE_POOL: dict[int, type[nn.AvgPool2d] | type[nn.AvgPool3d]] = {2: nn.AvgPool2d, 3: nn.AvgPool3d}

LINEAR = {2: "bilinear", 3: "trilinear"}


def dims_of(patch: Sequence[int]) -> Dims:
    """2 for a patch that is one voxel thick somewhere, else 3."""
    return 2 if 1 in patch else 3


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """[B, C, *space] interpolated linearly to that size, edges to edges."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return functional.interpolate(x, size=tuple(size), mode=LINEAR[x.ndim - 2], align_corners=False)


def as_plane(x: Tensor) -> tuple[Tensor, int]:
    """[B, C, D, H, W] with one axis of one voxel as [B, C, H, W], and which axis it was."""
    thin = [axis for axis in range(2, x.ndim) if x.shape[axis] == 1]
    if x.ndim != 5 or not thin:
        raise ValueError(
            f"A patch {tuple(x.shape)} was given to a network of planes; [batch, channel, d, h, w] with one axis of one "
            "voxel is needed. Plan with 2-D patches, or build the network for volumes."
        )
    return x.squeeze(thin[0]), thin[0]


def but_thin(sizes: Triple, patch: Triple) -> Triple:
    """Sizes, with 1 along an axis of one voxel."""
    d, h, w = (1 if n == 1 else size for size, n in zip(sizes, patch, strict=True))
    return d, h, w


def without_thin(spacing: tuple[float, float, float], patch: Triple) -> tuple[float, float, float]:
    """A thin axis as coarse as the coarsest other: its spacing says nothing of a plane, and must not hold others back."""
    coarsest = max((step for step, n in zip(spacing, patch, strict=True) if n > 1), default=1.0)
    d, h, w = (coarsest if n == 1 else step for step, n in zip(spacing, patch, strict=True))
    return d, h, w
