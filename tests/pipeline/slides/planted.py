"""Features with a known answer: a slide of class `tumour` has a few tiles that point one way, all other tiles are noise."""

import csv
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.slides import feature_file
from pipeline.slides.feature_file import FeatureFile, FeatureRecipe

RECIPE = FeatureRecipe(
    tile_um=112.0,
    tile_px=224,
    step_um=112.0,
    least_tissue=0.5,
    encoder="noise",
    encoder_sha256="ab" * 32,
    dimensions=12,
)
PLANTED = 6.0
"""How far a planted tile lies from the noise, in its standard deviations."""


def write_slide(
    folder: Path,
    name: str,
    planted: Sequence[int],
    *,
    tiles: int = 20,
    recipe: FeatureRecipe = RECIPE,
    sha256: str = "",
    seed: str = "",
) -> FeatureFile:
    """A slide whose `planted` tiles point along axis 0; its seed is its name, where no other is given."""
    identity = sha256 or hashlib.sha256(name.encode()).hexdigest()
    rng = np.random.default_rng(int(hashlib.sha256((seed or name).encode()).hexdigest()[:8], 16))
    features = rng.normal(0, 1, (tiles, recipe.dimensions)).astype(np.float16)
    features[list(planted), 0] += PLANTED
    grid = np.stack([np.arange(tiles) % 5, np.arange(tiles) // 5], axis=1)
    (folder / name).mkdir(parents=True)
    return feature_file.write(
        folder / name / feature_file.FILE_NAME,
        slide_id=name,
        slide_sha256=identity,
        slide_microns_per_pixel=(0.5, 0.5),
        resolution_from="file",
        size_um=(1000.0, 1000.0),
        recipe=recipe,
        features=features,
        positions_um=grid * recipe.step_um,
        grid=grid,
        tissue=np.ones(tiles, np.float32),
    )


def write_rows(path: Path, rows: Sequence[Sequence[str]], head: Sequence[str] = ("slide", "patient", "label")) -> Path:
    """A CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])
    return path


def write_cohort(
    folder: Path,
    patients: int = 12,
    slides_each: int = 1,
    classes: Sequence[str] = ("normal", "tumour"),
    before: str = "",
) -> tuple[Path, Path]:
    """Features and LABELS.csv: patient n is of class n modulo their number, and class k has k times three planted tiles."""
    rows, features = [], folder / "features"
    for patient in range(patients):
        label = patient % len(classes)
        for number in range(slides_each):
            name, tiles = f"{before}s{patient:02d}{'abc'[number]}", 12 + 3 * (patient % 5)
            write_slide(features, name, range(3 * label), tiles=tiles)
            rows.append((name, f"{before}p{patient:02d}", classes[label]))
    return features, write_rows(folder / "LABELS.csv", rows)
