"""What was found in one slide: the prediction, what every tile adds to it, and a picture of the whole to show it on."""

import csv
import io
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from ..report import inert
from .deletion import Deletion


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The slide itself: its size and where its resolution is from."""

    slide_id: str
    size_um: tuple[float, float]
    size_px: tuple[int, int]
    """Of level 0."""
    microns_per_pixel: tuple[float, float]
    resolution_from: str
    """'file' or 'stated'."""
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What made the prediction."""

    package_name: str
    package_id: str
    network: str
    members: int
    """Networks whose logits are averaged."""
    temperature: float
    """What the logits are divided by before they become probabilities."""
    encoder: str
    encoder_sha256: str
    tile_px: int
    scores: dict[str, str] = field(default_factory=dict)
    """What nested cross-validation measured, in words."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """A slide, its tiles, and a picture of the whole: what every answer is drawn on."""

    frame: Frame
    origin: Origin
    overview: UInt8[np.ndarray, "h w 3"]
    """The whole slide, edge to edge."""
    tissue: Bool[np.ndarray, "down across"]
    """Where it was found, from the slide's top left corner on."""
    tissue_um: float
    """Side of a pixel of it."""
    tile_um: float
    step_um: float
    positions_um: Float[np.ndarray, "tile 2"]
    """x, y of each tile's top left corner."""
    grid: Int[np.ndarray, "tile 2"]
    tissue_share: Float[np.ndarray, " tile"]
    classes: tuple[str, ...]
    quarantined: dict[str, int] = field(default_factory=dict)
    """How many tiles were left out, and why."""
    warnings: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def middle_um(self) -> Float[np.ndarray, "tile 2"]:
        """x, y of each tile's middle."""
        return self.positions_um + self.tile_um / 2


@dataclass(frozen=True, kw_only=True, eq=False)
class SlideResult(Seen):
    """One slide, answered. Logits are those before calibration, less their mean over the classes, which no probability knows of:
    `logits = rest + the sum of all shares`."""

    predicted: int
    logits: Float[np.ndarray, " class"]
    probabilities: Float[np.ndarray, " class"]
    """Calibrated."""
    shares: Float[np.ndarray, "tile class"]
    rest: Float[np.ndarray, " class"]
    attention: Float[np.ndarray, " tile"]
    entropy: float
    """Of the attention, as a share of the highest it can have: 1 where every tile has the same, near 0 where one has all."""
    deletion: Deletion
    top: tuple["TopTile", ...] = ()
    """Those that add most to the predicted class, the first first."""
    against: tuple["TopTile", ...] = ()
    """Those that speak most against it, the strongest first."""

    @property
    def name(self) -> str:
        """Of the predicted class."""
        return self.classes[self.predicted]

    @property
    def values(self) -> Float[np.ndarray, " tile"]:
        """What each tile adds to the logit of the predicted class."""
        return self.shares[:, self.predicted]

    @cached_property
    def full(self) -> float:
        """What the strongest colour stands for: the largest share of any tile, for or against; 0 where there is none."""
        return float(np.abs(self.values).max(initial=0))

    @property
    def answer(self) -> str:
        """'tumour, probability 0.93', in words."""
        return f"{self.name}, calibrated probability {probability(self.probabilities[self.predicted])}"


@dataclass(frozen=True, kw_only=True, eq=False)
class TopTile:
    """A tile worth looking at."""

    rank: int
    index: int
    """Among the tiles of the slide."""
    picture: UInt8[np.ndarray, "h w 3"]
    """At the resolution it was encoded at."""


NEGLIGIBLE = 0.01
"""Of the strongest share: tiles below it are nothing to look at."""


def ranked(values: Float[np.ndarray, " tile"], most: int) -> tuple[Int[np.ndarray, " first"], Int[np.ndarray, " last"]]:
    """Indices of the tiles that add most, and of those that take most away: `most` of each, or as many as there are."""
    order = np.argsort(-values, kind="stable")
    least = NEGLIGIBLE * float(np.abs(values).max(initial=0))
    first, last = order[:most], order[::-1][:most]
    return first[values[first] > least], last[values[last] < -least]


def table(result: SlideResult) -> str:
    """tiles.csv: every tile with what it adds. The column of a class and the rest in report.json sum to its logit."""
    buffer = io.StringIO()
    rows = csv.writer(buffer, lineterminator="\n")
    shares = (inert(f"share of {name}") for name in result.classes)
    rows.writerow(["rank", "column", "row", "x_um", "y_um", "side_um", "tissue", "attention", *shares])
    rank = np.empty(len(result.values), dtype=np.int64)
    rank[np.argsort(-result.values, kind="stable")] = np.arange(1, len(rank) + 1)
    places = zip(
        rank, result.grid, result.positions_um, result.tissue_share, result.attention, result.shares, strict=True
    )
    for number, (column, row), (x, y), tissue, attention, added in places:
        # nine digits bring a float32 back as it was
        numbers = (f"{each:.9g}" for each in added)
        place = (f"{x:.3f}", f"{y:.3f}", f"{result.tile_um:g}", f"{tissue:.4f}", f"{attention:.9g}")
        rows.writerow([number, column, row, *place, *numbers])
    return buffer.getvalue()


def probability(value: float) -> str:
    """Two digits; never 0 or 1, which no model can know."""
    return "below 0.01" if value < 0.005 else "above 0.99" if value > 0.995 else f"{value:.2f}"
