"""What a slide's file must offer, whoever reads it: levels of pixels, any box of them, and what it says of its scale."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from ..volume import ScanError

WHITE = 255
"""Beyond the edge of a slide there is glass."""


class SlideError(ScanError):
    """A slide, or one place of it, cannot be used. The message says what was met, what was needed, what to do."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A file's levels, the finest first, and where on them the scanned field lies."""

    sizes: tuple[tuple[int, int], ...]
    """Width and height of each level in its own pixels."""
    factors: tuple[tuple[float, float], ...]
    """How many pixels of level 0 one pixel of the level covers, along x and y."""
    field_px: tuple[int, int, int, int]
    """Left, top, width and height of what was scanned, in pixels of level 0; a scanner's canvas may be far larger."""
    said: tuple[float, float] | None
    """Microns per pixel of level 0 along x and y, as the file has them; None where it says nothing."""
    said_where: str
    """What in the file says so, or what it says instead; the middle of a sentence."""
    reader: str


@dataclass(frozen=True, eq=False)
class Patch:
    """Pixels of one level, and where the left top corner of the first lies, in pixels of that level."""

    pixels: UInt8[np.ndarray, "h w 3"]
    x: float
    y: float


class Source(ABC):
    """An open file. Threads may read at the same time."""

    path: Path
    layout: Layout

    @abstractmethod
    def read(self, level: int, left: int, top: int, width: int, height: int) -> Patch:
        """The pixels of a box that lies wholly on the level; SlideError where they are damaged."""

    @abstractmethod
    def close(self) -> None:
        """Nothing is read after this."""


def damaged(path: Path, what: str) -> SlideError:
    """The error for bytes that are not what they should be."""
    return SlideError(
        f"{path.name}: {what}; whole and unchanged data are needed. Copy the slide again from where it was scanned.",
        "damaged",
    )


def plainly(error: BaseException) -> str:
    """The first line of what somebody else's error says, short enough for one of ours."""
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__


def whole_factor(full: tuple[int, int], reduced: tuple[int, int]) -> tuple[float, float]:
    """How many pixels of the full size one of a level's covers.

    A level's size is rounded to whole pixels. Where one whole number explains both sides, that is the factor: 62 of 250
    pixels are a quarter of them with the rest cut off, not 1 in 4.03.
    """
    ratios = full[0] / reduced[0], full[1] / reduced[1]
    for factor in sorted({round(ratio) for ratio in ratios}):
        if factor and all(abs(side / factor - short) < 1 for side, short in zip(full, reduced, strict=True)):
            return float(factor), float(factor)
    return ratios
