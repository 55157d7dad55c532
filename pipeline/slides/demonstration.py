"""The demo's slides: sections that hilum makes up, at several resolutions, and lesions it knows the places of."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preprocessing import slide_phantoms
from preprocessing.slide_phantoms import PhantomSlide

from ..config import SlideClassify, SlideFeatures, SlideTraining
from ..progress import Progress, silent
from ..results import Batch
from .classification import classify
from .features import extract
from .package import SlidePackage
from .training import train_slides

TRAINED, UNSEEN = range(1, 25), range(201, 205)
"""Seeds of the slides trained on, two of each patient, and of those the package is shown for the first time."""

RESOLUTIONS = (0.5, 0.35)
"""Microns per pixel of every other patient's slides; one unseen slide is at 0.25, which none was trained at."""

SIZE_UM = (1500.0, 1100.0)
"""Some hundred tiles of 112 um: small enough to be drawn in a second."""

EPOCHS, LEARNING_RATE = 30, 1e-3
"""Twice the usual rate, so that 18 trainings of a few seconds learn the phantoms."""


@dataclass(frozen=True, kw_only=True)
class SlideDemo:
    """What came out, and what is known of the unseen slides."""

    package: SlidePackage
    batch: Batch[Any]
    """Its reports are SlideReports: the package tells slides apart."""
    unseen: tuple[PhantomSlide, ...]

    @property
    def right(self) -> int:
        """How many unseen slides were given the class they have."""
        known = {slide.id: slide.label for slide in self.unseen}
        return sum(row.report is not None and row.report.predicted == known[row.case_id] for row in self.batch.rows)

    @property
    def on_lesion(self) -> tuple[int, int]:
        """Of so many unseen slides with a lesion, on how many the strongest tile lies on one."""
        tables = [(slide, self.batch.folder / slide.id / "tiles.csv") for slide in self.unseen if slide.lesions]
        return sum(tiles.exists() and _on_lesion(slide, tiles) for slide, tiles in tables), len(tables)

    def told(self) -> str:
        """In a sentence."""
        found, sick = self.on_lesion
        return (
            f"unseen slides given their class: {self.right} of {len(self.unseen)}; the tile that decides lies on a lesion in "
            f"{found} of {sick}"
        )


def demo_slides(out: Path, tracking_uri: str, progress: Progress = silent) -> SlideDemo:
    """Make slides, features, a package by nested cross-validation; classify unseen slides; all of it inside `out`."""
    trained = [_phantom(seed, RESOLUTIONS[(seed - 1) // 2 % 2]) for seed in TRAINED]
    unseen = [_phantom(seed, 0.25 if seed == UNSEEN[2] else 0.5) for seed in UNSEEN]
    _write([*trained, *unseen], out, progress)
    _write_labels(trained, out / "labels.csv")
    extract([out / "slides"], out / "features", SlideFeatures(), progress)
    settings = SlideTraining(epochs=EPOCHS, learning_rate=LEARNING_RATE, tracking_uri=tracking_uri)
    package = train_slides(out / "features", out / "labels.csv", out / "package", settings, progress)
    batch = classify([out / "unseen"], out / "package", out / "classified", SlideClassify(), progress)
    return SlideDemo(package=package, batch=batch, unseen=tuple(unseen))


def _phantom(seed: int, microns_per_pixel: float) -> PhantomSlide:
    """Every other patient is sick, on both slides; every other unseen slide."""
    sick = (seed - 1) // 2 % 2 if seed in TRAINED else seed % 2
    return slide_phantoms.slide(seed, microns_per_pixel=microns_per_pixel, size_um=SIZE_UM, lesions=2 if sick else 0)


def _write(slides: Sequence[PhantomSlide], out: Path, progress: Progress) -> None:
    for done, slide in enumerate(slides, start=1):
        folder = out / ("slides" if done <= len(TRAINED) else "unseen")
        folder.mkdir(parents=True, exist_ok=True)
        slide_phantoms.write(slide, folder / f"{slide.id}.tiff")
        progress("make slides", done, len(slides))


def _write_labels(slides: Sequence[PhantomSlide], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["slide", "patient", "label"])
        rows.writerows(
            [slide.id, f"patient_{(seed + 1) // 2:02d}", slide.label]
            for seed, slide in zip(TRAINED, slides, strict=True)
        )


def _on_lesion(slide: PhantomSlide, tiles: Path) -> bool:
    """Whether the tile that adds most to the answer overlaps a lesion."""
    with tiles.open(encoding="utf-8") as file:
        first = next(row for row in csv.DictReader(file) if row["rank"] == "1")
    x, y, side = (float(first[name]) for name in ("x_um", "y_um", "side_um"))
    return any(
        math.hypot(circle.x_um - min(max(circle.x_um, x), x + side), circle.y_um - min(max(circle.y_um, y), y + side))
        <= circle.radius_um
        for circle in slide.lesions
    )
