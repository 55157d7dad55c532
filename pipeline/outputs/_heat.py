"""Heat: where a network looked, in colours that stand for numbers. One scale for all of a case, clear where it is low."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int8
from PIL import Image

from ..report import Explanation

HIGHEST_CODE = 127
"""What the strongest voxel of a map is written as, whatever its value."""
MOST_OPACITY = 0.6
"""The scan is seen through the strongest heat."""
FULL_FROM = 0.3
"""From this share of full scale heat is as opaque as it gets; below, it fades with its value."""
CLEAR_BELOW = 0.1
"""Share of full scale under which nothing is drawn."""

# inferno of matplotlib (van der Walt & Smith, CC0), every 16th of its 256 from the 64th to the 240th: brightness rises all
# along, for every kind of colour vision; what is darker cannot be told from the scan
POSITIVE = (
    *((87, 16, 110), (113, 25, 110), (138, 34, 106), (163, 44, 97), (188, 55, 84), (210, 70, 68), (228, 90, 49)),
    *((241, 115, 29), (249, 142, 9), (252, 172, 17), (249, 203, 53), (242, 234, 105)),
)
# blue for what speaks against, orange for what speaks for: the pair that colour-blind eyes keep apart best
AGAINST = ((0, 95, 200), (25, 140, 255), (110, 195, 255))
FOR = ((190, 80, 0), (240, 140, 0), (255, 205, 80))


@dataclass(frozen=True, kw_only=True, eq=False)
class Heat:
    """A map along the patient's axes, and the value that its strongest colour stands for."""

    codes: Int8[np.ndarray, "x y z"]
    scale: float
    full: float
    is_signed: bool

    def levels(self, codes: Float[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
        """Share of full scale, -1 to 1. Proportional: a tenth of the value is a tenth of the level."""
        return np.clip(codes * (self.scale / self.full), -1, 1) if self.full > 0 else np.zeros_like(codes)

    def drawn(
        self, codes: Int8[np.ndarray, "down across"], size: tuple[int, int]
    ) -> tuple[Float[np.ndarray, "h w 3"], Float[np.ndarray, "h w"]]:
        """Colour and opacity of a plane of the map, on so many pixels."""
        fine = Image.fromarray(codes.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
        levels = self.levels(np.asarray(fine, dtype=np.float64))
        return colours(levels, self.is_signed), opacity(levels, self.is_signed)


def heat_of(chosen: Explanation, all_of_case: Sequence[Explanation], full: float | None = None) -> tuple[float, bool]:
    """The value of the strongest colour and whether it has a sign: the same for all maps of a case that were made alike."""
    alike = [each for each in all_of_case if (each.method, each.unit) == (chosen.method, chosen.unit)] or [chosen]
    highest = max(HIGHEST_CODE * each.scale for each in alike)
    return (highest if full is None else full), any(int(each.codes.min(initial=0)) < 0 for each in alike)


def colours(levels: Float[np.ndarray, "*any"], is_signed: bool) -> Float[np.ndarray, "*any 3"]:
    """0 to 255."""
    steps = np.array((*AGAINST[::-1], *FOR) if is_signed else POSITIVE, dtype=np.float64)
    half = np.linspace(0, 1, len(FOR))
    at = np.concatenate([-half[::-1] - 1e-9, half]) if is_signed else np.linspace(0, 1, len(POSITIVE))
    return np.stack([np.interp(levels, at, steps[:, channel]) for channel in range(3)], axis=-1)


def opacity(levels: Float[np.ndarray, "*any"], is_signed: bool) -> Float[np.ndarray, "*any"]:
    """0 where there is next to nothing, and never so high that the scan is hidden."""
    strength = np.abs(levels) if is_signed else np.clip(levels, 0, 1)
    return np.where(strength < CLEAR_BELOW, 0.0, MOST_OPACITY * np.minimum(1, strength / FULL_FROM))
