"""Slides with a known answer: sections stained pink and violet, some with lesions, drawn at any resolution; and rulers.

The demo trains on them and the tests measure with them. Everything is placed in micrometres, so a phantom shows the same
at 0.25 and at 0.5 um/px.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tifffile
from jaxtyping import Bool, Float, Float32, UInt8

HEMATOXYLIN = np.array([0.65, 0.70, 0.29], np.float32)
EOSIN = np.array([0.09, 0.92, 0.38], np.float32)
"""Optical density of the two stains in red, green and blue: hematoxylin after Ruifrok and Johnston (2001); eosin with the
share of blue that scanners see of it, without which pink is magenta."""

GLASS = np.array([244, 243, 246], np.float32)
"""The light a scanner finds where nothing lies."""

BAND_PX = 512
"""Rows drawn at a time, so that a large slide costs the memory of a small one."""


@dataclass(frozen=True)
class Circle:
    """A round field on a slide."""

    x_um: float
    y_um: float
    radius_um: float


class Subject(ABC):
    """What lies on a slide, wherever and at whatever resolution one looks."""

    @abstractmethod
    def drawn(self, x: Float[np.ndarray, " w"], y: Float[np.ndarray, " h"]) -> Float32[np.ndarray, "h w 3"]:
        """The light at pixels with these centres, in micrometres."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PhantomSlide:
    """A slide that can be drawn, and its answer."""

    id: str
    label: str
    lesions: tuple[Circle, ...]
    size_um: tuple[float, float]
    microns_per_pixel: tuple[float, float]
    """Of level 0, along x and y."""
    subject: Subject

    @property
    def size_px(self) -> tuple[int, int]:
        """Of level 0; what does not fill a pixel is cut off."""
        width, height = (
            int(side / step + 1e-6) for side, step in zip(self.size_um, self.microns_per_pixel, strict=True)
        )
        return width, height

    @cached_property
    def pixels(self) -> UInt8[np.ndarray, "h w 3"]:
        """Level 0."""
        width, height = self.size_px
        extent = (width * self.microns_per_pixel[0], height * self.microns_per_pixel[1])
        return self.region(0.0, 0.0, *extent, self.size_px)

    def region(
        self, x_um: float, y_um: float, width_um: float, height_um: float, size_px: tuple[int, int]
    ) -> UInt8[np.ndarray, "h w 3"]:
        """Any field of it, drawn afresh."""
        x = x_um + (np.arange(size_px[0]) + 0.5) * (width_um / size_px[0])
        y = y_um + (np.arange(size_px[1]) + 0.5) * (height_um / size_px[1])
        bands = [self.subject.drawn(x, y[top : top + BAND_PX]) for top in range(0, len(y), BAND_PX)]
        return np.concatenate([(np.clip(band, 0, 255) + 0.5).astype(np.uint8) for band in bands])


def slide(
    seed: int,
    *,
    microns_per_pixel: float | tuple[float, float] = 0.5,
    size_um: tuple[float, float] = (2000.0, 1500.0),
    lesions: int = 0,
) -> PhantomSlide:
    """A section of tissue; without lesions the same seed gives the same section, healthy all over."""
    section = _section(seed, size_um, lesions)
    return PhantomSlide(
        id=f"phantom_{seed:03d}",
        label="lesion" if lesions else "healthy",
        lesions=section.lesions,
        size_um=size_um,
        microns_per_pixel=_both(microns_per_pixel),
        subject=section,
    )


def ruler(
    *, microns_per_pixel: float | tuple[float, float] = 0.5, size_um: tuple[float, float] = (1200.0, 900.0)
) -> PhantomSlide:
    """Violet lines of 10 um on pink ground, one every 100 um in both directions, drawn exactly to fractions of a pixel."""
    resolution = _both(microns_per_pixel)
    return PhantomSlide(
        id="ruler",
        label="ruler",
        lesions=(),
        size_um=size_um,
        microns_per_pixel=resolution,
        subject=Ruler(every_um=100.0, width_um=10.0),
    )


def _both(microns_per_pixel: float | tuple[float, float]) -> tuple[float, float]:
    if isinstance(microns_per_pixel, tuple):
        return microns_per_pixel
    return float(microns_per_pixel), float(microns_per_pixel)


@dataclass(frozen=True, kw_only=True)
class Ruler(Subject):
    """Lines of one width around every multiple of a distance."""

    every_um: float
    width_um: float

    def drawn(self, x: Float[np.ndarray, " w"], y: Float[np.ndarray, " h"]) -> Float32[np.ndarray, "h w 3"]:
        across, down = self._covered(x), self._covered(y)
        covered = 1 - np.multiply.outer(1 - down, 1 - across)
        ground, ink = (_light(stain, amount) for stain, amount in ((EOSIN, 0.3), (HEMATOXYLIN, 0.9)))
        return (ground + covered[..., None] * (ink - ground)).astype(np.float32)

    def _covered(self, centres: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """The share of each pixel that lies under a line: the integral of the lines up to its end, less that to its start."""
        half = (centres[1] - centres[0]) / 2 if len(centres) > 1 else 0.5
        return (self._ink_up_to(centres + half) - self._ink_up_to(centres - half)) / (2 * half)

    def _ink_up_to(self, place: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        lines, rest = np.divmod(place + self.width_um / 2, self.every_um)
        return lines * self.width_um + np.minimum(rest, self.width_um)


def _light(stain: Float32[np.ndarray, " 3"], amount: float) -> Float32[np.ndarray, " 3"]:
    return (GLASS * 10 ** (-stain * amount)).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Noise:
    """Random values on a lattice, smooth in between."""

    values: Float32[np.ndarray, "row column"]
    spacing_um: tuple[float, float]

    def at(self, x: Float[np.ndarray, " w"], y: Float[np.ndarray, " h"]) -> Float32[np.ndarray, "h w"]:
        rows, below = _between(y / self.spacing_um[1], self.values.shape[0])
        columns, right = _between(x / self.spacing_um[0], self.values.shape[1])
        lines = self.values[rows] + below[:, None] * (self.values[rows + 1] - self.values[rows])
        first = lines[:, columns]
        return first + right * (lines[:, columns + 1] - first)


def _between(places: Float[np.ndarray, " n"], count: int) -> tuple[np.ndarray, Float32[np.ndarray, " n"]]:
    """The lattice point before each place, and how far the way to the next one is gone, smoothly."""
    first = np.clip(np.floor(places), 0, count - 2).astype(np.int64)
    way = np.clip(places - first, 0, 1)
    return first, (way * way * (3 - 2 * way)).astype(np.float32)


def _noise(rng: np.random.Generator, size_um: tuple[float, float], spacing_um: tuple[float, float]) -> Noise:
    columns, rows = (int(side / step) + 2 for side, step in zip(size_um, spacing_um, strict=True))
    return Noise(rng.uniform(-1, 1, (rows, columns)).astype(np.float32), spacing_um)


@dataclass(frozen=True, eq=False)
class Nuclei:
    """Cells' nuclei, as ellipses."""

    x: Float[np.ndarray, " n"]
    y: Float[np.ndarray, " n"]
    radius: Float[np.ndarray, "n 2"]
    turn: Float[np.ndarray, " n"]
    stain: Float[np.ndarray, " n"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Section(Subject):
    """A piece of tissue: fibres and cytoplasm in eosin, nuclei in hematoxylin, glands around a clear lumen, lesions."""

    pieces: tuple[tuple[float, float, float, float], ...]
    """Ellipses: centre and radii."""
    outline: Noise
    fibres: Noise
    clouds: Noise
    grain: Noise
    glands: tuple[Circle, ...]
    lesions: tuple[Circle, ...]
    nuclei: Nuclei
    strength: tuple[float, float]
    """How strongly hematoxylin and eosin took on this slide."""

    def depth_um(self, x: Float[np.ndarray, " w"], y: Float[np.ndarray, " h"]) -> Float32[np.ndarray, "h w"]:
        """About how far inside the tissue each place lies; negative outside."""
        depths = []
        for left, top, wide, tall in self.pieces:
            across, down = np.float32(1) * ((x - left) / wide) ** 2, ((y - top) / tall) ** 2
            depths.append((1 - np.sqrt(np.add.outer(down, across))) * min(wide, tall))
        uneven = 0.16 * min(self.pieces[0][2:])  # a section's edge wavers by a sixth of its radius
        return (np.maximum.reduce(depths) + uneven * self.outline.at(x, y)).astype(np.float32)

    def drawn(self, x: Float[np.ndarray, " w"], y: Float[np.ndarray, " h"]) -> Float32[np.ndarray, "h w 3"]:
        tissue = _step(self.depth_um(x, y), 3.0)
        sick = _around(self.lesions, x, y, 12.0)
        lumen = _around(self.glands, x, y, 1.5, 0.45) * (1 - sick)
        body = tissue * (1 - lumen)
        eosin = body * (0.30 + 0.10 * self.fibres.at(x, y) + 0.07 * self.clouds.at(x, y) - 0.12 * sick)
        haze = body * (0.05 + 0.03 * self.grain.at(x, y) + 0.16 * sick)
        hematoxylin = np.maximum(haze, self._nuclei_at(x, y))
        density = np.multiply.outer(hematoxylin * np.float32(self.strength[0]), HEMATOXYLIN)
        density += np.multiply.outer(np.maximum(eosin, 0) * np.float32(self.strength[1]), EOSIN)
        return GLASS * np.exp(density * np.float32(-np.log(10)))

    def _nuclei_at(self, x: Float[np.ndarray, " w"], y: Float[np.ndarray, " h"]) -> Float32[np.ndarray, "h w"]:
        stain = np.zeros((len(y), len(x)), np.float32)
        reach = self.nuclei.radius.max(1) + 1.0
        near = (self.nuclei.x + reach > x[0]) & (self.nuclei.x - reach < x[-1])
        near &= (self.nuclei.y + reach > y[0]) & (self.nuclei.y - reach < y[-1])
        for n in np.flatnonzero(near):
            columns = slice(*np.searchsorted(x, (self.nuclei.x[n] - reach[n], self.nuclei.x[n] + reach[n])))
            rows = slice(*np.searchsorted(y, (self.nuclei.y[n] - reach[n], self.nuclei.y[n] + reach[n])))
            right, below = x[columns] - self.nuclei.x[n], (y[rows] - self.nuclei.y[n])[:, None]
            cosine, sine = np.cos(self.nuclei.turn[n]), np.sin(self.nuclei.turn[n])
            long, short = self.nuclei.radius[n]
            inside = 1 - np.sqrt(
                ((cosine * right + sine * below) / long) ** 2 + ((cosine * below - sine * right) / short) ** 2
            )
            stamp = np.clip(inside * short / 0.8 + 0.5, 0, 1) * self.nuclei.stain[n]
            stain[rows, columns] = np.maximum(stain[rows, columns], stamp)
        return stain


def _step(depth: Float32[np.ndarray, "h w"], soft_um: float) -> Float32[np.ndarray, "h w"]:
    return np.clip(depth / np.float32(soft_um) + np.float32(0.5), 0, 1)


def _around(
    circles: tuple[Circle, ...],
    x: Float[np.ndarray, " w"],
    y: Float[np.ndarray, " h"],
    soft_um: float,
    part: float = 1.0,
) -> Float32[np.ndarray, "h w"]:
    """1 inside of circles (or of their inner part), 0 outside, with an edge of so many micrometres."""
    found = np.zeros((len(y), len(x)), np.float32)
    for circle in circles:
        reach = circle.radius_um * part + soft_um
        columns = slice(*np.searchsorted(x, (circle.x_um - reach, circle.x_um + reach)))
        rows = slice(*np.searchsorted(y, (circle.y_um - reach, circle.y_um + reach)))
        away = np.hypot(x[columns] - circle.x_um, (y[rows] - circle.y_um)[:, None])
        disc = _step((circle.radius_um * part - away).astype(np.float32), soft_um)
        found[rows, columns] = np.maximum(found[rows, columns], disc)
    return found


def _section(seed: int, size_um: tuple[float, float], lesions: int) -> Section:
    """Outline, glands and stroma come from generators of their own: a lesion more changes nothing but where it lies."""
    bare = _ground(np.random.default_rng([seed, 0]), size_um)
    fitting = int(size_um[0] * size_um[1] / 22_000)  # more than there is room for: glands lie close
    small = min(size_um)
    glands = _scattered(bare, np.random.default_rng([seed, 1]), size_um, (26.0, 46.0), count=fitting)
    sick = _scattered(bare, np.random.default_rng([seed, 2]), size_um, (0.10 * small, 0.14 * small), count=lesions)
    return replace(bare, glands=glands, lesions=sick, nuclei=_cells(bare, glands, sick, seed, size_um))


def _ground(rng: np.random.Generator, size_um: tuple[float, float]) -> Section:
    """Tissue without a cell; half of the sections fall into two pieces."""
    width, height = size_um
    one = [(0.5, 0.5, 0.40, 0.38)]
    two = [(0.29, 0.5, 0.22, 0.38), (0.75, 0.48, 0.19, 0.31)]
    pieces = [
        (x * width * rng.uniform(0.96, 1.04), y * height * rng.uniform(0.96, 1.04), a * width, b * height)
        for x, y, a, b in (two if rng.random() < 0.5 else one)
    ]
    wave = 0.12 * min(size_um)
    return Section(
        pieces=tuple(pieces),
        outline=_noise(rng, size_um, (wave, wave)),
        fibres=_noise(rng, size_um, (34.0, 7.0)),
        clouds=_noise(rng, size_um, (90.0, 90.0)),
        grain=_noise(rng, size_um, (4.0, 4.0)),
        glands=(),
        lesions=(),
        nuclei=_joined([]),
        strength=(float(rng.uniform(0.85, 1.15)), float(rng.uniform(0.85, 1.15))),
    )


def _scattered(
    section: Section, rng: np.random.Generator, size_um: tuple[float, float], radii: tuple[float, float], *, count: int
) -> tuple[Circle, ...]:
    """So many circles at most, apart from each other and inside the tissue, wherever chance finds room for them."""
    tries = 60 * count
    x, y = rng.uniform(0, size_um[0], tries), rng.uniform(0, size_um[1], tries)
    radius = rng.uniform(*radii, tries)
    found: list[int] = []
    for one in np.flatnonzero(_depth_at(section, x, y) > radius):
        gaps = np.hypot(x[found] - x[one], y[found] - y[one]) - radius[found] - radius[one]
        if len(found) < count and gaps.min(initial=np.inf) > 8:
            found.append(int(one))
    return tuple(Circle(float(x[one]), float(y[one]), float(radius[one])) for one in found)


def _depth_at(section: Section, x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> Float32[np.ndarray, " n"]:
    """How far inside the tissue single places lie: asked on a lattice of 4 um, and read off there."""
    columns, rows = ((places / 4).round().astype(int) for places in (x, y))
    lattice = (np.arange(int(numbers.max(initial=0)) + 1) * 4.0 for numbers in (columns, rows))
    return section.depth_um(*lattice)[rows, columns]


def _cells(
    ground: Section, glands: tuple[Circle, ...], lesions: tuple[Circle, ...], seed: int, size_um: tuple[float, float]
) -> Nuclei:
    """Slender nuclei along the fibres, round ones in a ring around each lumen; large, dark, crowded ones in lesions."""
    stroma = _spread(np.random.default_rng([seed, 3]), size_um, 19.0, (3.6, 5.2), (0.35, 0.5), (0.45, 0.7), 0.5)
    crowd = _spread(np.random.default_rng([seed, 4]), size_um, 9.5, (3.4, 5.4), (0.65, 0.95), (0.6, 1.0), 3.1)
    rings = _rings(np.random.default_rng([seed, 5]), glands)
    in_tissue = _depth_at(ground, stroma.x, stroma.y) > 4
    in_gland, in_lesion = _within(glands, stroma), _within(lesions, stroma)
    return _joined(
        [
            _chosen(stroma, in_tissue & ~in_gland & ~in_lesion),
            _chosen(rings, (_depth_at(ground, rings.x, rings.y) > 4) & ~_within(lesions, rings)),
            _chosen(crowd, (_depth_at(ground, crowd.x, crowd.y) > 4) & _within(lesions, crowd)),
        ]
    )


def _spread(
    rng: np.random.Generator,
    size_um: tuple[float, float],
    apart_um: float,
    long_um: tuple[float, float],
    slender: tuple[float, float],
    stain: tuple[float, float],
    turn: float,
) -> Nuclei:
    """Nuclei all over the slide, each by chance near a point of a lattice, so that few touch."""
    columns, rows = (int(side / apart_um) for side in size_um)
    lattice = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1).reshape(-1, 2)
    x, y = ((lattice + 0.5 + rng.uniform(-0.38, 0.38, lattice.shape)) * apart_um).T
    long = rng.uniform(*long_um, len(x))
    radius = np.stack([long, long * rng.uniform(*slender, len(x))], axis=1)
    return Nuclei(x, y, radius, rng.uniform(-turn, turn, len(x)), rng.uniform(*stain, len(x)))


def _rings(rng: np.random.Generator, glands: tuple[Circle, ...]) -> Nuclei:
    rings = []
    for gland in glands:
        count = int(2 * np.pi * 0.78 * gland.radius_um / 7.5)
        angle = np.arange(count) * (2 * np.pi / count) + rng.uniform(-0.08, 0.08, count)
        away = gland.radius_um * rng.uniform(0.72, 0.84, count)
        radius = np.stack([rng.uniform(3.2, 4.2, count), rng.uniform(2.2, 2.8, count)], axis=1)
        x, y = gland.x_um + away * np.cos(angle), gland.y_um + away * np.sin(angle)
        rings.append(Nuclei(x, y, radius, angle, rng.uniform(0.5, 0.75, count)))
    return _joined(rings)


def _within(circles: tuple[Circle, ...], nuclei: Nuclei) -> Bool[np.ndarray, " n"]:
    found = np.zeros(len(nuclei.x), bool)
    for circle in circles:
        found |= np.hypot(nuclei.x - circle.x_um, nuclei.y - circle.y_um) < circle.radius_um
    return found


def _chosen(nuclei: Nuclei, which: Bool[np.ndarray, " n"]) -> Nuclei:
    return Nuclei(nuclei.x[which], nuclei.y[which], nuclei.radius[which], nuclei.turn[which], nuclei.stain[which])


def _joined(parts: Sequence[Nuclei]) -> Nuclei:
    none = Nuclei(np.zeros(0), np.zeros(0), np.zeros((0, 2)), np.zeros(0), np.zeros(0))
    parts = [none, *parts]
    return Nuclei(
        np.concatenate([part.x for part in parts]),
        np.concatenate([part.y for part in parts]),
        np.concatenate([part.radius for part in parts]),
        np.concatenate([part.turn for part in parts]),
        np.concatenate([part.stain for part in parts]),
    )


def write(
    phantom: PhantomSlide,
    path: Path,
    *,
    compression: Literal["jpeg", "deflate"] = "jpeg",
    block_px: int = 256,
    with_resolution: bool = True,
) -> Path:
    """A tiled pyramid as scanners write it; an OME-TIFF where the path ends in .ome.tif or .ome.tiff."""
    levels = list(_halved(phantom.pixels, block_px))
    x, y = phantom.microns_per_pixel
    how: dict[str, Any] = {"tile": (block_px, block_px), "compression": compression, "photometric": "rgb"}
    if compression == "jpeg":
        how["compressionargs"] = {"level": 90}
    ome = path.name.lower().endswith((".ome.tif", ".ome.tiff"))
    units = {"PhysicalSizeXUnit": "µm", "PhysicalSizeYUnit": "µm"}
    about = {"axes": "YXS", "PhysicalSizeX": x, "PhysicalSizeY": y, **units} if with_resolution else {"axes": "YXS"}
    with tifffile.TiffWriter(path, ome=ome, bigtiff=False) as file:
        for number, pixels in enumerate(levels):
            per_cm = (10_000 / (x * 2**number), 10_000 / (y * 2**number))
            scale = {"resolution": per_cm, "resolutionunit": "CENTIMETER"} if with_resolution and not ome else {}
            first = {"subifds": len(levels) - 1, "metadata": about} if ome else {"metadata": None}
            file.write(pixels, **how, **scale, **(first if number == 0 else {"subfiletype": 1, "metadata": None}))
    return path


def _halved(pixels: UInt8[np.ndarray, "h w 3"], least: int) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """The picture, and each time half of it, until one block holds it; an odd last row or column is cut off."""
    yield pixels
    while max(pixels.shape[:2]) > least:
        height, width = (side // 2 * 2 for side in pixels.shape[:2])
        four = pixels[:height, :width].astype(np.uint16).reshape(height // 2, 2, width // 2, 2, 3)
        pixels = ((four.sum((1, 3)) + 2) // 4).astype(np.uint8)
        yield pixels
