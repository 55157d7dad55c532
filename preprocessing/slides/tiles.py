"""Where tiles lie on a slide's tissue, and how large they are: in micrometres, whatever the slide was scanned at."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int64

from .slide import Slide
from .source import SlideError
from .tissue import Tissue

MAGNIFIED = 2.5
"""How much larger than asked a slide's pixels may be: a scan at 10x (0.9 to 1.1 um/px) still serves 0.5; beyond this an
encoder sees blur it has never met."""


@dataclass(frozen=True, kw_only=True)
class TileShape:
    """How large tiles are and how densely they lie."""

    size_um: float = 112.0
    """Side of a tile on the slide; 112 um in 224 pixels are 0.5 um/px, what is called 20x."""
    size_px: int = 224
    """Side of a tile as an encoder takes it."""
    step_um: float | None = None
    """From one tile to the next; None: its size. Less, and tiles overlap."""
    least_tissue: float = 0.5
    """Share of a tile that must be tissue."""

    def __post_init__(self) -> None:
        for name, holds, needed in (
            ("size_um", math.isfinite(self.size_um) and self.size_um > 0, "above 0"),
            ("size_px", self.size_px >= 1, "at least 1"),
            ("step_um", self.step_um is None or (math.isfinite(self.step_um) and self.step_um > 0), "above 0"),
            ("least_tissue", 0 <= self.least_tissue <= 1, "between 0 and 1"),
        ):
            if not holds:
                raise ValueError(f"a tile's {name} is {getattr(self, name)}; it must be {needed}.")

    @property
    def step(self) -> float:
        """From one tile to the next, in micrometres."""
        return self.size_um if self.step_um is None else self.step_um

    @property
    def microns_per_pixel(self) -> float:
        return self.size_um / self.size_px


@dataclass(frozen=True, kw_only=True, eq=False)
class Tiles:
    """The tiles of one slide, row by row."""

    positions_um: Float64[np.ndarray, "tile 2"]
    """x and y of the top left corner."""
    grid: Int64[np.ndarray, "tile 2"]
    """Column and row in the lattice of all tiles, whose first lies in the slide's top left corner."""
    tissue: Float32[np.ndarray, " tile"]
    """The share of each that is tissue."""

    def __len__(self) -> int:
        return len(self.grid)


def lay_tiles(slide: Slide, tissue: Tissue, shape: TileShape) -> Tiles:
    """Every tile of the lattice with enough tissue; refused where none has, or where the slide is too coarse."""
    _refuse_magnified(slide, shape)
    columns, rows = (max(1, math.ceil(side / shape.step - 1e-9)) for side in slide.size_um)
    grid = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1).reshape(-1, 2).astype(np.int64)
    positions = grid * shape.step
    shares = tissue.shares(positions, (shape.size_um, shape.size_um))
    kept = shares >= shape.least_tissue
    if not kept.any():
        raise SlideError(
            f"{slide.path.name} has no tile of {shape.size_um:g} um of which {shape.least_tissue:.0%} is tissue (the most "
            f"is {shares.max():.0%}); one is needed. Choose smaller tiles, or ask for less tissue in each.",
            "no_tissue",
        )
    return Tiles(positions_um=positions[kept], grid=grid[kept], tissue=shares[kept].astype(np.float32))


def _refuse_magnified(slide: Slide, shape: TileShape) -> None:
    coarse = max(slide.microns_per_pixel)
    if coarse > MAGNIFIED * shape.microns_per_pixel:
        raise SlideError(
            f"{slide.path.name} has {coarse:.4g} um/px and tiles of {shape.microns_per_pixel:.4g} um/px are wanted; a slide "
            f"may be at most {MAGNIFIED:g} times as coarse. Choose tiles of {coarse * shape.size_px:.4g} um or more "
            "(and an encoder that was trained so), or scan the slide again.",
            "resolution",
        )
