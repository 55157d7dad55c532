"""A table of labelled places beside a folder of features: which tiles of whose slides are of which class."""

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from ..errors import UsageError
from ..folds import FoldCase
from .feature_file import FeatureFile, FeatureRecipe
from .table import classes_of, folders_of, known, one_recipe, read_rows, refuse_the_same_pixels, refuse_without_features

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledTiles:
    """A slide with tiles to learn from."""

    id: str
    patient: str
    file: FeatureFile
    tiles: Int[np.ndarray, " labelled"]
    """Their numbers in the file, rising."""
    labels: Int[np.ndarray, " labelled"]
    """Their classes, by their places among the classes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TileTable:
    """Everything a training of tiles is told: slides by their names, sorted, and the classes, sorted too."""

    slides: tuple[LabelledTiles, ...]
    classes: tuple[str, ...]
    recipe: FeatureRecipe

    @property
    def cases(self) -> list[FoldCase]:
        """Whole slides, by patient: tiles of one slide share neighbours, so they are never parted."""
        return [
            FoldCase(id=one.id, patient=one.patient, labels=frozenset(self.classes[n] for n in np.unique(one.labels)))
            for one in self.slides
        ]

    @property
    def digest(self) -> str:
        """sha256 of every slide's features and patient, and of its tiles and classes."""
        rows = [
            (one.id, one.patient, one.file.features_sha256, one.tiles.tolist(), [self.classes[n] for n in one.labels])
            for one in self.slides
        ]
        return hashlib.sha256(repr(rows).encode()).hexdigest()

    @property
    def tiles_by_class(self) -> dict[str, int]:
        counts = Counter(number for one in self.slides for number in one.labels.tolist())
        return {name: counts[number] for number, name in enumerate(self.classes)}

    @property
    def patients_by_class(self) -> dict[str, int]:
        counts = Counter(n for n, _ in {(n, one.patient) for one in self.slides for n in one.labels.tolist()})
        return {name: counts[number] for number, name in enumerate(self.classes)}


def read_tiles(
    features: Path, labels: Path, *, slide: str = "slide", patient: str = "patient", label: str = "label"
) -> TileTable:
    """Both, put together: a row of the table names the tile in which the place x_um, y_um lies."""
    rows = read_rows(labels, {"slide": slide, "patient": patient, "label": label, "x_um": "x_um", "y_um": "y_um"})
    paths = folders_of(features)
    rows = [row | {"slide": known(row["slide"], paths)} for row in rows]
    refuse_without_features(features, labels, sorted({row["slide"] for row in rows}), paths)
    _refuse_two_patients(labels, rows)
    files = {name: FeatureFile.read(paths[name]) for name in sorted({row["slide"] for row in rows})}
    recipe = one_recipe(files)
    refuse_the_same_pixels(files)
    _refuse_overlap(recipe)
    placed = [(row, _tile_at(files[row["slide"]], _place(labels, row))) for row in rows]
    _tell_of_the_lost(labels, len(rows), sum(tile is None for _, tile in placed))
    classes = classes_of(labels, [row for row, tile in placed if tile is not None])
    by_slide: dict[str, list[tuple[dict[str, str], int]]] = defaultdict(list)
    for row, tile in placed:
        if tile is not None:
            by_slide[row["slide"]].append((row, tile))
    slides = tuple(_labelled(labels, files[name], by_slide[name], classes) for name in sorted(by_slide))
    return TileTable(slides=slides, classes=classes, recipe=recipe)


def _labelled(
    labels: Path, file: FeatureFile, rows: Sequence[tuple[Mapping[str, str], int]], classes: tuple[str, ...]
) -> LabelledTiles:
    found: dict[int, int] = {}
    for row, tile in rows:
        label = classes.index(row["label"])
        if found.setdefault(tile, label) != label:
            raise UsageError(
                f"{labels.name} gives the tile of {file.slide_id} at {row['x_um']}, {row['y_um']} µm two classes, "
                f"{classes[found[tile]]} and {row['label']}; a tile needs one. Take one of the rows out."
            )
    tiles = np.array(sorted(found), dtype=np.int64)
    of_tiles = np.array([found[tile] for tile in tiles.tolist()], dtype=np.int64)
    patient = rows[0][0]["patient"]
    return LabelledTiles(id=file.slide_id, patient=patient, file=file, tiles=tiles, labels=of_tiles)


def _place(labels: Path, row: Mapping[str, str]) -> Float[np.ndarray, "2"]:
    try:
        place = np.array([float(row["x_um"]), float(row["y_um"])])
    except ValueError:
        place = np.array([np.nan, np.nan])
    if not np.isfinite(place).all():
        raise UsageError(
            f"{labels.name} has a tile of {row['slide']} at {row['x_um']!r}, {row['y_um']!r}; two numbers with a point are "
            "needed, micrometres from the slide's top left corner. Correct them."
        )
    return place


def _tile_at(file: FeatureFile, place: Float[np.ndarray, "2"]) -> int | None:
    """The tile in which a place lies; its upper and left edges are its own."""
    inside = (file.positions_um <= place) & (place < file.positions_um + file.recipe.tile_um)
    found = np.flatnonzero(inside.all(axis=1))
    return int(found[0]) if len(found) else None


def _refuse_two_patients(labels: Path, rows: Sequence[Mapping[str, str]]) -> None:
    patients: dict[str, str] = {}
    for row in rows:
        if patients.setdefault(row["slide"], row["patient"]) != row["patient"]:
            raise UsageError(
                f"{labels.name} says that {row['slide']} is of {patients[row['slide']]} and of {row['patient']}; a slide needs "
                "one patient. Correct its rows."
            )


def _refuse_overlap(recipe: FeatureRecipe) -> None:
    """A neighbour is one step away: overlapping ones would show the same tissue again instead of what surrounds it."""
    if recipe.step_um < recipe.tile_um:
        raise UsageError(
            f"the features are of tiles of {recipe.tile_um:g} µm every {recipe.step_um:g} µm, which overlap; a tile's neighbours "
            "must lie beside it. Run `hilum slides features` again without --step_um."
        )


def _tell_of_the_lost(labels: Path, rows: int, lost: int) -> None:
    if lost == rows:
        raise UsageError(
            f"none of the {rows} place(s) in {labels.name} lies on a tile; x_um and y_um are needed in micrometres from the slide's "
            "top left corner, not in pixels. Multiply pixels of level 0 by the slide's microns per pixel."
        )
    if lost:
        logger.warning("%d of %d places in %s lie on no tile (too little tissue): no part", lost, rows, labels.name)
