"""What every tile of a slide is, by a package that names tiles: where each class lies, and how much of it there is.

tiles.csv            every tile with its class and the calibrated probability of each
class-map.ome.tiff   float32, a channel for the probability of each class, on the slide's frame: QuPath, Fiji
class-map.png        the slide as it is, and beside it the classes in colour, with their areas
tiles.geojson        every tile as an object of its class, for QuPath
"""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from preprocessing.declared import PALETTE

from ..outputs import _rows
from ..outputs._drawing import ALARM, INK, INNER, QUIET, blank_row, fitting, folded, png, side_by_side, stacked, write
from ..report import inert, write_whole
from .geojson import square
from .heatmap import grey, raster, resized, write_planes
from .picture import COLUMN, facts, footer, outline, panel, size, untouched
from .result import Seen

PICTURE, OME_TIFF, GEOJSON, TILES = "class-map.png", "class-map.ome.tiff", "tiles.geojson", "tiles.csv"

OPACITY = 0.55
"""Of a class over the slide in grey: the tissue is still seen."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassMap(Seen):
    """One slide, each tile named."""

    probabilities: Float[np.ndarray, "tile class"]
    """Calibrated."""
    predicted: Int[np.ndarray, " tile"]

    @property
    def areas_mm2(self) -> dict[str, float]:
        """Tissue of each class; of tiles that overlap, what each has for itself."""
        mm2 = self.tissue_share.astype(np.float64) * (min(self.step_um, self.tile_um) / 1000) ** 2
        return {name: float(mm2[self.predicted == c].sum()) for c, name in enumerate(self.classes)}

    @property
    def most(self) -> str:
        """The class with the largest area."""
        areas = self.areas_mm2
        return max(areas, key=lambda name: areas[name])

    def share(self, name: str) -> float:
        """Of the tissue that was looked at."""
        areas = self.areas_mm2
        return areas[name] / (sum(areas.values()) or 1)


def write_all(found: ClassMap, folder: Path) -> list[str]:
    """All files; their names."""
    planes, um = raster(found, found.probabilities)
    names = [f"probability of {name}" for name in found.classes]
    words = f"Calibrated probability of the class of each tile of {found.tile_um:g} um"
    write_planes(planes, um, names, words, found, folder / OME_TIFF)
    write_whole(folder / TILES, _table(found))
    write_whole(folder / PICTURE, png(picture(found)))
    write_whole(folder / GEOJSON, json.dumps({"type": "FeatureCollection", "features": list(_objects(found))}))
    return [TILES, OME_TIFF, PICTURE, GEOJSON]


def colour(number: int) -> tuple[int, int, int]:
    """Of the class of that number."""
    return PALETTE[number % len(PALETTE)]


def _table(found: ClassMap) -> str:
    buffer = io.StringIO()
    rows = csv.writer(buffer, lineterminator="\n")
    likely = (inert(f"probability of {name}") for name in found.classes)
    rows.writerow(["column", "row", "x_um", "y_um", "side_um", "tissue", "predicted", *likely])
    places = zip(found.grid, found.positions_um, found.tissue_share, found.predicted, found.probabilities, strict=True)
    for (column, row), (x, y), tissue, predicted, probabilities in places:
        place = (f"{x:.3f}", f"{y:.3f}", f"{found.tile_um:g}", f"{tissue:.4f}")
        rows.writerow([column, row, *place, inert(found.classes[predicted]), *(f"{p:.6f}" for p in probabilities)])
    return buffer.getvalue()


def _objects(found: ClassMap) -> Iterator[dict[str, Any]]:
    """Detections, of which QuPath shows a hundred thousand at once."""
    for index, predicted in enumerate(found.predicted.tolist()):
        likely = zip(found.classes, found.probabilities[index].tolist(), strict=True)
        yield {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [square(found, index)]},
            "properties": {
                "objectType": "detection",
                "classification": {"name": found.classes[predicted], "color": list(colour(predicted))},
                "measurements": {f"probability of {name}": round(p, 6) for name, p in likely},
            },
        }


def picture(found: ClassMap) -> Image.Image:
    """The whole sheet; the same answers give the same pixels."""
    key = (f"{found.share(found.most):.0%}", f"of the tissue looked at is {found.most}", INK)
    header = _rows.header(found.frame.slide_id, key, [("what each tile is", INK), (facts(found), QUIET)])
    panels = side_by_side([untouched(found), _named(found)], COLUMN)
    return stacked([header, panels, *_legend(found), footer(found, "what a network named each tile, and no more")])


def _named(found: ClassMap) -> Image.Image:
    """The slide in grey, every tile in the colour of its class."""
    shown = grey(resized(found.overview, size(found))).astype(np.float64)
    height, width = shown.shape[:2]
    scale = np.array([width, height]) / np.array(found.frame.size_um)
    start = np.rint(found.positions_um * scale).astype(int)
    stop = np.rint((found.positions_um + min(found.step_um, found.tile_um)) * scale).astype(int)
    for (left, top), (right, bottom), predicted in zip(start, stop, found.predicted.tolist(), strict=True):
        part = shown[top : max(top + 1, bottom), left : max(left + 1, right)]
        part[:] = (1 - OPACITY) * part + OPACITY * np.array(colour(predicted))
    drawn = np.rint(shown).astype(np.uint8)
    drawn[outline(found, (width, height))] = (70, 70, 70)
    return panel(drawn, found, "what each tile is", "tissue outlined")


def _legend(found: ClassMap) -> list[Image.Image]:
    """A line for each class, and what is to be minded."""
    rows = []
    for c, name in enumerate(found.classes):
        row, draw = blank_row(26)
        draw.rounded_rectangle((0, 4, 18, 22), 4, fill=colour(c))
        words = f"{name}   {found.areas_mm2[name]:.3g} mm², {found.share(name):.1%}"
        write(draw, (30, 13), fitting(words, 18, INNER - 30), 18, INK, "lm")
        rows.append(row)
    for warning in found.warnings:
        for line in folded(warning, 16, INNER, 3):
            row, draw = blank_row(24)
            write(draw, (0, 12), line, 16, ALARM, "lm")
            rows.append(row)
    return rows
