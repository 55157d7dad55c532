"""Where on a slide there is tissue: found by colour on a coarse overview, without what only looks like it."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float32, Float64, UInt8
from scipy import ndimage

from .scaling import resample
from .slide import Slide
from .source import WHITE, SlideError

TISSUE_UM = 8.0
"""Microns per pixel of the overview: CLAM's customary downsample of 32 at 40x; a tile of 112 um is 14 of them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Tissue:
    """A map of the tissue from the slide's top left corner on."""

    mask: Bool[np.ndarray, "h w"]
    microns_per_pixel: float

    def share(self, x_um: float, y_um: float, width_um: float, height_um: float) -> float:
        """The share of a field that is tissue; beyond the edge there is none."""
        return float(self.shares(np.array([[x_um, y_um]], np.float64), (width_um, height_um))[0])

    def shares(
        self, corners_um: Float64[np.ndarray, "field 2"], size_um: tuple[float, float]
    ) -> Float64[np.ndarray, " field"]:
        """The same for many fields of one size, given by their top left corners."""
        low = corners_um / self.microns_per_pixel
        high = low + np.array(size_um) / self.microns_per_pixel
        areas = (
            self._area(high[:, 0], high[:, 1])
            - self._area(low[:, 0], high[:, 1])
            - self._area(high[:, 0], low[:, 1])
            + self._area(low[:, 0], low[:, 1])
        )
        return np.clip(areas * self.microns_per_pixel**2 / (size_um[0] * size_um[1]), 0, 1)

    def _area(
        self, x: Float64[np.ndarray, " field"], y: Float64[np.ndarray, " field"]
    ) -> Float64[np.ndarray, " field"]:
        """Tissue, in pixels of the mask, above and to the left of each place."""
        return ndimage.map_coordinates(self._sums, [y, x], order=1, mode="nearest")

    @cached_property
    def _sums(self) -> Float64[np.ndarray, "rows columns"]:
        return np.pad(self.mask.cumsum(0, dtype=np.float64).cumsum(1), ((1, 0), (1, 0)))


def find_tissue(slide: Slide) -> Tissue:
    """Stained tissue: pen marks, dark borders, dust and glass are none; refused where there is none at all.

    What cannot be read on the overview counts as tissue: tiles are laid there, fail, and are reported.
    """
    microns = float(max(TISSUE_UM, *slide.microns_per_pixel))
    picture, unread = _seen(slide, microns)
    mask = tissue_in(picture, microns) | unread
    if not mask.any():
        raise SlideError(
            f"{slide.path.name} shows no tissue; a slide with stained tissue is needed. Look at it: an empty or very pale "
            "slide, or one scanned beside its tissue, has none.",
            "no_tissue",
        )
    return Tissue(mask=mask, microns_per_pixel=microns)


def tissue_in(picture: UInt8[np.ndarray, "h w 3"], microns_per_pixel: float) -> Bool[np.ndarray, "h w"]:
    """The tissue in a picture of a slide: what is coloured as stains are, in one piece as far as it belongs together."""
    density = optical_density(picture)
    chroma = density.max(0) - density.min(0)
    stained = (chroma > _threshold(chroma)) & ~_foreign(density, chroma)
    return _in_pieces(stained, microns_per_pixel)


def optical_density(picture: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "3 h w"]:
    """How much light the slide takes away, in powers of ten, beside what its glass lets through."""
    taken = np.log10((_glass(picture)[:, None] + 1) / (np.arange(256) + 1)).clip(0).astype(np.float32)
    return np.stack([table[picture[..., colour]] for colour, table in enumerate(taken)])


LEAST_CHROMA, MOST_CHROMA = 0.03, 0.06
"""Between these Otsu's threshold may lie, in optical density between a pixel's strongest and weakest colour. Glass of real
scans stays below 0.015 and pale stroma begins at 0.06; Otsu alone would part an empty slide in two, and a full one into
nuclei and the rest."""


def _threshold(chroma: Float32[np.ndarray, "h w"]) -> float:
    """Otsu's: the value that parts what there is into the two groups that differ most, within what is sensible."""
    counts, edges = np.histogram(chroma, bins=256, range=(0, 0.6))
    centres = (edges[:-1] + edges[1:]) / 2
    below, total = counts.cumsum(), counts.sum()
    sums = (counts * centres).cumsum()
    share = below / max(total, 1)
    apart = (sums[-1] * share - sums) ** 2 / np.maximum(share * (1 - share), 1e-9)
    return float(np.clip(edges[1:][np.argmax(apart)], LEAST_CHROMA, MOST_CHROMA))


BRIGHT, PLAIN, MUCH = 180, 30, 0.01
"""What may be glass: no colour of it darker than the first, none differing by more than the second, on at least the third
of the slide."""

USUAL_GLASS = np.array([245, 245, 245], np.float32)
"""Where a slide is full of tissue: what scanners are set to."""


def _glass(picture: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, " 3"]:
    """The colour of the bare slide: the most frequent brightness among what may be glass."""
    colours = np.moveaxis(picture, 2, 0)
    darkest, lightest = np.minimum.reduce(list(colours)), np.maximum.reduce(list(colours))
    bare = (darkest >= BRIGHT) & (lightest - darkest <= PLAIN) & (darkest < WHITE)  # white is beyond the edge
    if bare.mean() < MUCH:
        return USUAL_GLASS
    usual = int(np.bincount(darkest[bare]).argmax())
    return np.median(picture[bare & (np.abs(darkest.astype(np.int16) - usual) <= 3)], axis=0).astype(np.float32)


def _foreign(density: Float32[np.ndarray, "3 h w"], chroma: Float32[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """What is dark or coloured, but not by stain.

    Hematoxylin, eosin and DAB take away green at least as much as red: blue and green ink do not. Black ink and the edge
    of the holder take all colours alike. Red ink takes blue as much as green and leaves red alone; so does blood where it
    lies thick, and is left out with it.
    """
    red, green, blue = density
    strongest = density.max(0)
    cold = (red > 1.4 * green) & (chroma > 0.2)
    black = (chroma < 0.2 * strongest) & (strongest > 0.1)
    marker = (green > 0.55) & (blue > 0.7 * green) & (red < 0.2 * green)
    return ndimage.maximum_filter(cold | black | marker, size=3)  # ink bleeds into the pixel beside it


GAP_UM, HOLE_UM2, SPECK_UM2 = 32.0, 6_000.0, 2_500.0
"""Cracks up to the first are closed; holes up to half a tile of 112 um are filled, lumens for the most part; pieces of a
few cells (50 um across) are dust."""


def _in_pieces(stained: Bool[np.ndarray, "h w"], microns_per_pixel: float) -> Bool[np.ndarray, "h w"]:
    near = ndimage.uniform_filter(stained.astype(np.float32), 3)
    held = stained & (
        near > 2.5 / 9
    )  # a pixel of tissue has two others beside it, as in a strand; one of noise has not
    width = round(GAP_UM / microns_per_pixel) + 1
    closed = held | ndimage.minimum_filter(ndimage.maximum_filter(held, width), width)
    pixel = microns_per_pixel**2
    filled = closed | _small(~closed, HOLE_UM2 / pixel, enclosed=True)
    return filled & ~_small(filled, SPECK_UM2 / pixel, enclosed=False)


def _small(mask: Bool[np.ndarray, "h w"], most_pixels: float, enclosed: bool) -> Bool[np.ndarray, "h w"]:
    """The pieces of a mask that are smaller than this; of a hole's, those that do not reach the edge."""
    pieces, count = ndimage.label(mask)
    small = np.bincount(pieces.ravel(), minlength=count + 1) < most_pixels
    small[0] = False
    if enclosed:
        small[np.concatenate([pieces[0], pieces[-1], pieces[:, 0], pieces[:, -1]])] = False
    return small[pieces]


BLOCK = 128
"""Pixels of the overview that are tried at a time where it cannot be read as a whole: a millimetre."""


def _seen(slide: Slide, microns: float) -> tuple[UInt8[np.ndarray, "h w 3"], Bool[np.ndarray, "h w"]]:
    """The overview, and where it could not be read; refused where nothing could."""
    width, height = slide.overview_px(microns)
    try:
        return slide.overview(microns), np.zeros((height, width), bool)
    except SlideError as error:
        failure = error
    picture, unread = np.full((height, width, 3), WHITE, np.uint8), np.zeros((height, width), bool)
    for top in range(0, height, BLOCK):
        for left in range(0, width, BLOCK):
            size = min(BLOCK, width - left), min(BLOCK, height - top)
            block = slice(top, top + size[1]), slice(left, left + size[0])
            part = _part(slide, left * microns, top * microns, size, microns)
            unread[block] = part is None
            picture[block] = WHITE if part is None else part
    if unread.all():
        raise failure
    return picture, unread


def _part(
    slide: Slide, x_um: float, y_um: float, size: tuple[int, int], microns: float
) -> UInt8[np.ndarray, "h w 3"] | None:
    """A part of the overview; where its level is damaged, from finer ones."""
    for finer in (1, 4, 16):
        try:
            large = slide.region(x_um, y_um, size[0] * microns, size[1] * microns, (size[0] * finer, size[1] * finer))
        except SlideError:
            continue
        return resample(large, (0, 0), (finer, finer), size)
    return None
