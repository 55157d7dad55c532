"""A map cut into windows of equal size, and put together again; what pads the last windows is marked, so it cannot leak.

Windows are as many as the wanted size asks for, and then as small as they can be: nine places in windows of at most
eight are two windows of five. So no window, and no group of a grid, consists of padding alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Windows:
    space: tuple[int, ...]
    counts: tuple[int, ...]
    """Windows along each axis."""
    sizes: tuple[int, ...]
    """Places of a window along each axis."""
    is_grid: bool = False
    """The places of a window lie as far apart as there are windows, instead of side by side."""

    @property
    def is_padded(self) -> bool:
        return any(n != count * size for n, count, size in zip(self.space, self.counts, self.sizes, strict=True))

    def cut(self, x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B R n C"]:
        """[batch, window, place in it, channel], zeros where there is nothing."""
        if self.is_padded:
            ends = [count * size - n for n, count, size in zip(self.space, self.counts, self.sizes, strict=True)]
            x = functional.pad(x, [side for end in reversed(ends) for side in (0, end)])
        for axis in reversed(range(len(self.space))):
            x = x.unflatten(2 + axis, self._pair(axis))
        axes = len(self.space)
        windows, places = range(2, 2 + 2 * axes, 2), range(3, 3 + 2 * axes, 2)
        if self.is_grid:
            windows, places = places, windows
        return x.permute(0, *windows, *places, 1).flatten(1, axes).flatten(2, 1 + axes)

    def join(self, windows: Float[Tensor, "B R n C"]) -> Float[Tensor, "B C *space"]:
        axes = len(self.space)
        x = windows.unflatten(2, self.sizes).unflatten(1, self.counts)  # [B, *counts, *sizes, C]
        pairs = [(1 + axes + axis, 1 + axis) if self.is_grid else (1 + axis, 1 + axes + axis) for axis in range(axes)]
        x = x.permute(0, *(place for pair in pairs for place in pair), x.ndim - 1)
        for axis in range(axes):
            x = x.flatten(1 + axis, 2 + axis)
        for axis, n in enumerate(self.space):
            x = x.narrow(1 + axis, 0, n)
        return x.movedim(-1, 1)

    def real(self, x: Tensor) -> Bool[Tensor, "R n"]:
        """False where a place is padding."""
        return self.cut(x.new_ones(1, 1, *self.space))[0, ..., 0] > 0

    def _pair(self, axis: int) -> tuple[int, int]:
        return (self.sizes[axis], self.counts[axis]) if self.is_grid else (self.counts[axis], self.sizes[axis])


def of_size(space: Sequence[int], size: int, is_grid: bool = False) -> Windows:
    """Windows with at most `size` places along each axis."""
    counts = tuple(math.ceil(n / size) for n in space)
    return Windows(tuple(space), counts, _shares(space, counts), is_grid)


def of_count(space: Sequence[int], count: int) -> Windows:
    """At most `count` windows along each axis."""
    sizes = _shares(space, [count] * len(space))
    return Windows(tuple(space), _shares(space, sizes), sizes)


def _shares(space: Sequence[int], parts: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.ceil(n / part) for n, part in zip(space, parts, strict=True))
