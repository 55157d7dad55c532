"""features: each slide once, its tissue cut into tiles, each tile made numbers, one file per slide; nobody waits for a disk."""

import csv
import io
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from preprocessing.cores import usable_cores
from preprocessing.slides import (
    SlideError,
    SlideFile,
    TileShape,
    find_slides,
    find_tissue,
    lay_tiles,
    open_slide,
    stated_resolutions,
)
from preprocessing.slides.slide import files_of, identity

from ..config import SlideFeatures
from ..prediction import choose_device
from ..progress import Progress, silent
from ..report import as_json, hilum_version, inert, write_whole
from ..results import DONE, ERROR, Batch, LookedAt, Row, Work, counts, explained, work_through
from . import feature_file
from .ahead import TILES_AT_ONCE, Laid, Piece, ReadAhead, announced
from .encoders import Encoder, load_encoder
from .feature_file import DAMAGED, FILE_NAME, NOT_FINITE, FeatureFile, FeatureRecipe

logger = logging.getLogger(__name__)

QUARANTINE = 0.1
"""Share of a slide's tiles that may be unusable: a scanner's bad stripe costs some ‰, and a bag does not miss them; of a
slide that lost more, nobody knows whether it lost the lesion. One tile may always be bad."""
RULE = (
    f"a slide fails when more than {QUARANTINE:.0%} of its tiles are damaged or give no finite numbers; one tile may be"
)

BATCHES_AHEAD = 4
"""Batches of pictures that may lie ready, 40 MB where a batch is 64 tiles of 224 pixels: opening a slide and finding its
tissue takes about as long as a GPU takes for three."""

NO_NUMBERS = (
    "the encoder's numbers are NaN, infinite or beyond half precision. Give --device cpu, which computes in single "
    "precision, or another encoder."
)
LARGEST_HALF = float(np.finfo(np.float16).max)


def extract(
    inputs: Sequence[Path], out: Path, settings: SlideFeatures = SlideFeatures(), progress: Progress = silent  # noqa: B008
) -> "Extraction":  # fmt: skip
    """Features of every slide found; `out` gets a folder per slide and a summary. One bad slide never stops the rest."""
    stated = stated_resolutions(settings.resolutions) if settings.resolutions else {}
    found = find_slides(inputs, out)
    nobody = sorted(set(stated) - {slide.id for slide in found.slides})
    if nobody:
        logger.warning("%d of the %d slides in --resolutions are not among those found", len(nobody), len(stated))
    encoder = load_encoder(settings.encoder, choose_device(settings.device))
    if encoder.caution:
        logger.warning(encoder.caution)
    with Extractor(encoder, settings, stated) as extractor:
        work = _Extracting(extractor, progress, len(found.slides), nobody)
        batch = work_through(found.slides, found.left_alone, out, work, progress)
    made = Extraction(folder=batch.folder, rows=batch.rows, pace=extractor.pace)
    logger.info("features: %s", made.told())
    return made


def features_of(slide: SlideFile, encoder: Encoder, settings: SlideFeatures, folder: Path) -> FeatureFile:
    """The features of one slide, written into this folder."""
    with Extractor(encoder, settings) as extractor:
        return extractor.features_of(slide, folder)


@dataclass(kw_only=True)
class Pace:
    """How fast tiles became features, and whether the encoder ever stood still."""

    tiles: int = 0
    seconds: float = 0.0
    """From a slide's turn to its file."""
    waited: float = 0.0
    """Seconds of these in which there was no picture for the encoder yet."""

    def add(self, other: "Pace") -> None:
        self.tiles += other.tiles
        self.seconds += other.seconds
        self.waited += other.waited

    @property
    def tiles_per_second(self) -> float:
        return round(self.tiles / self.seconds, 2) if self.seconds else 0.0

    @property
    def waited_share(self) -> float:
        return round(self.waited / self.seconds, 4) if self.seconds else 0.0

    def told(self) -> str:
        """'1200 tiles, 40.1 tiles/s, the encoder waited 2.1% of the time for tiles'."""
        return (
            f"{self.tiles} tiles, {self.tiles_per_second:.1f} tiles/s, the encoder waited {self.waited_share:.1%} of the time "
            "for tiles"
        )


class Extractor:
    """Slides one after the other, those to come read ahead. Close it, or use it in a `with`."""

    def __init__(self, encoder: Encoder, settings: SlideFeatures, stated: Mapping[str, float] | None = None) -> None:
        self.encoder, self.settings, self.stated = encoder, settings, stated or {}
        self.shape = TileShape(
            size_um=settings.tile_um,
            size_px=settings.tile_px,
            step_um=settings.step_um,
            least_tissue=settings.least_tissue,
        )
        encoder.refuse_size(settings.tile_px)
        self.recipe = FeatureRecipe(
            tile_um=self.shape.size_um, tile_px=self.shape.size_px, step_um=self.shape.step,
            least_tissue=self.shape.least_tissue, encoder=encoder.id, encoder_sha256=encoder.sha256,
            dimensions=encoder.dimensions,
        )  # fmt: skip
        self.pace = Pace()
        """Of all slides so far."""
        self.last = Pace()
        """Of the last one."""
        self.ahead = ReadAhead(self._laid, settings.workers or usable_cores(), self._most_ahead(settings))

    def resolution(self, slide: SlideFile) -> float | None:
        """What was stated of this slide; nothing where the file's own word is to be taken."""
        return self.stated.get(slide.id, self.settings.microns_per_pixel)

    @staticmethod
    def _most_ahead(settings: SlideFeatures) -> int:
        """Pictures that may lie ready: enough for the encoder, and for every thread to have something to do."""
        return max(BATCHES_AHEAD * settings.batch, 2 * TILES_AT_ONCE * (settings.workers or usable_cores()))

    def announce(self, slide: SlideFile) -> None:
        """Its turn will come after those announced before."""
        self.ahead.announce(slide)

    def features_of(self, slide: SlideFile, folder: Path, progress: Progress = silent) -> FeatureFile:
        """The slide's file in this folder; SlideError where it cannot be made."""
        began, waited = time.perf_counter(), self.ahead.waited
        laid = self.ahead.open(slide)
        try:
            made = self._made(slide, laid, folder / FILE_NAME, progress)
        finally:
            self.ahead.let_go()
        self.last = Pace(tiles=len(made), seconds=time.perf_counter() - began, waited=self.ahead.waited - waited)
        self.pace.add(self.last)
        logger.info("a slide: %s", self.last.told())
        return made

    def close(self) -> None:
        self.ahead.close()

    def __enter__(self) -> "Extractor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _laid(self, file: SlideFile) -> Laid:
        """In a thread of its own, before the slide's turn."""
        slide = open_slide(file.path, self.resolution(file))
        try:
            tiles = lay_tiles(slide, find_tissue(slide), self.shape)
            return Laid(slide=slide, identity=slide.identity, tiles=tiles, shape=self.shape)
        except BaseException:
            slide.close()
            raise

    def _made(self, file: SlideFile, laid: Laid, path: Path, progress: Progress) -> FeatureFile:
        bag = _Bag(laid, self.recipe.dimensions)
        for numbers, pictures in _batches(self.ahead.pieces(), bag, self.settings.batch):
            bag.take(numbers, self.encoder.embed(pictures))
            progress("features", bag.looked_at, len(laid.tiles))
        tiles, kept = laid.tiles, bag.kept
        return feature_file.write(
            path, slide_id=file.id, slide_sha256=laid.identity, slide_microns_per_pixel=laid.slide.microns_per_pixel,
            resolution_from=laid.slide.resolution_from, size_um=laid.slide.size_um, recipe=self.recipe,
            features=bag.features[kept], positions_um=tiles.positions_um[kept], grid=tiles.grid[kept],
            tissue=tiles.tissue[kept], quarantined=bag.quarantined(), origin_px=laid.slide.origin_px,
        )  # fmt: skip


class _Bag:
    """The features of one slide while they come, and what is wrong with tiles that have none."""

    def __init__(self, laid: Laid, dimensions: int) -> None:
        self.laid = laid
        self.features = np.zeros((len(laid.tiles), dimensions), np.float16)
        self.kept: Bool[np.ndarray, " tile"] = np.zeros(len(laid.tiles), bool)
        self.bad: dict[int, str] = {}
        self.met = ""

    @property
    def looked_at(self) -> int:
        return int(self.kept.sum()) + len(self.bad)

    def take(self, numbers: Sequence[int], found: Float[np.ndarray, "tile feature"]) -> None:
        fine = (np.abs(found) <= LARGEST_HALF).all(axis=1)  # no NaN is
        where = np.array(numbers)
        self.features[where[fine]] = found[fine]
        self.kept[where[fine]] = True
        self.leave_out(where[~fine].tolist(), NOT_FINITE, NO_NUMBERS)

    def leave_out(self, numbers: Sequence[int], why: str, met: str) -> None:
        """These tiles are quarantined; the slide fails as soon as they are too many."""
        self.bad |= dict.fromkeys(numbers, why)
        self.met = self.met or met
        total = len(self.laid.tiles)
        if len(self.bad) > max(1, int(QUARANTINE * total)) or len(self.bad) == total:
            raise SlideError(
                f"{self.laid.slide.path.name}: {len(self.bad)} of the {self.looked_at} tiles looked at so far, of {total} in "
                f"all, cannot be used; {RULE}. The first: {self.met}",
                "damaged",
            )

    def quarantined(self) -> list[tuple[str, float, float]]:
        places = self.laid.tiles.positions_um
        return [(self.bad[n], float(places[n, 0]), float(places[n, 1])) for n in sorted(self.bad)]


def _batches(
    pieces: Iterator[Piece], bag: _Bag, size: int
) -> Iterator[tuple[list[int], UInt8[np.ndarray, "tile h w 3"]]]:
    """The pictures of one slide, so many at a time: which lie in one batch depends on the slide alone."""
    numbers: list[int] = []
    pictures: list[np.ndarray] = []
    for piece in pieces:
        if piece.damaged:
            bag.leave_out(piece.damaged, DAMAGED, piece.met)
        numbers += piece.tiles
        pictures += list(piece.pictures)
        while len(numbers) >= size:
            yield numbers[:size], np.stack(pictures[:size])
            numbers, pictures = numbers[size:], pictures[size:]
    if numbers:
        yield numbers, np.stack(pictures)


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """What a summary says of one slide's file."""

    slide_sha256: str
    microns_per_pixel: tuple[float, float]
    resolution_from: str
    size_um: tuple[float, float]
    tiles: int
    quarantined: dict[str, int]
    recipe: FeatureRecipe
    features_sha256: str
    pace: Pace = field(default_factory=Pace)
    """Of a slide that was done just now."""

    @classmethod
    def of(cls, file: FeatureFile, pace: Pace | None = None) -> "Extracted":
        return cls(
            slide_sha256=file.slide_sha256, microns_per_pixel=file.slide_microns_per_pixel,
            resolution_from=file.resolution_from, size_um=file.size_um, tiles=len(file), quarantined=file.quarantined,
            recipe=file.recipe, features_sha256=file.features_sha256, pace=pace or Pace(),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Extraction(Batch[Extracted]):
    """What came of a run over many slides, and how fast."""

    pace: Pace

    def told(self) -> str:
        return f"{super().told()}; {self.pace.told()}" if self.pace.tiles else super().told()


class _Extracting(Work[SlideFile, Extracted]):
    """A file of features for each slide."""

    stage = "features"
    mark = FILE_NAME
    incomplete = frozenset({ERROR})

    def __init__(self, extractor: Extractor, progress: Progress, slides: int, stated_of_nobody: Sequence[str]) -> None:
        self.extractor, self.progress, self.slides, self.turn = extractor, progress, slides, 0
        self.stated_of_nobody = stated_of_nobody

    def ahead(self, looked_at: Iterator[LookedAt[SlideFile, Extracted]]) -> Iterator[LookedAt[SlideFile, Extracted]]:
        for turn, one in enumerate(announced(looked_at, self.extractor.announce)):
            self.turn = turn
            yield one

    def found(self, folder: Path) -> Row[Extracted] | None:
        if not (folder / FILE_NAME).exists():
            return None
        return Row(case_id=folder.name, status=DONE, report=Extracted.of(FeatureFile.read(folder)))

    def is_enough(self, result: Extracted, folder: Path) -> bool:
        return result.recipe == self.extractor.recipe

    def other(self, result: Extracted, scan: SlideFile) -> str:
        if different := result.recipe.difference(self.extractor.recipe):
            return f"by another recipe ({different})"
        stated = self.extractor.resolution(scan)
        if (result.resolution_from == "stated") != (stated is not None) or stated not in (
            None,
            result.microns_per_pixel[0],
        ):
            return f"at another resolution ({result.microns_per_pixel[0]:g} um/px, {result.resolution_from})"
        return "" if result.slide_sha256 == identity(files_of(scan.path)) else "of another slide of the same name"

    def make(self, scan: SlideFile, folder: Path) -> Row[Extracted]:
        file = self.extractor.features_of(scan, folder, self._told)
        return Row(case_id=scan.id, status=DONE, report=Extracted.of(file, self.extractor.last))

    def _told(self, stage: str, done: float, of: float, note: str = "") -> None:
        self.progress(stage, self.turn + 0.99 * done / of, self.slides, f"{done:.0f} of {of:.0f} tiles of this slide")

    def explain(self, scan: SlideFile, error: Exception, folder: Path) -> Row[Extracted]:
        return explained(scan.id, error, folder, {"sources": str(scan.path), "encoder": self.extractor.encoder.id})

    def summarise(self, out: Path, rows: Sequence[Row[Extracted]], left_alone: Mapping[str, str]) -> None:
        write_whole(out / "summary.csv", _csv(rows))
        write_whole(out / "summary.json", as_json(self._summary(rows, left_alone)))

    def _summary(self, rows: Sequence[Row[Extracted]], left_alone: Mapping[str, str]) -> dict[str, Any]:
        encoder, pace = self.extractor.encoder, self.extractor.pace
        return {
            "hilum_version": hilum_version(),
            "counts": counts(rows),
            "recipe": asdict(self.extractor.recipe),
            "caution": encoder.caution,
            "quarantine": RULE,
            "pace": {
                **{key: round(value, 3) for key, value in asdict(pace).items()},
                "tiles_per_second": pace.tiles_per_second,
                "waited_share": pace.waited_share,
                "device": encoder.device.type,
            },
            "slides": [_plain(row) for row in rows],
            "left_alone": dict(left_alone),
            "stated_of_nobody": list(self.stated_of_nobody),
        }


COLUMNS = (
    "slide", "status", "tiles", "quarantined", "microns_per_pixel", "resolution_from", "width_mm", "height_mm", "encoder",
    "seconds", "tiles_per_second", "waited_share", "message",
)  # fmt: skip
"""Of summary.csv."""


def _csv(rows: Sequence[Row[Extracted]]) -> str:
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(COLUMNS)
    for row in rows:
        said = _plain(row)
        table.writerow([inert(_cell(said.get(name))) for name in COLUMNS])
    return buffer.getvalue()


def _plain(row: Row[Extracted]) -> dict[str, Any]:
    said = {"slide": row.case_id, "status": row.status, "seconds": row.seconds, "message": row.message}
    if row.report is None:
        return said
    one = row.report
    width, height = (round(side / 1000, 4) for side in one.size_um)
    return said | {
        "tiles": one.tiles,
        "quarantined": one.quarantined,
        "microns_per_pixel": list(one.microns_per_pixel),
        "resolution_from": one.resolution_from,
        "width_mm": width,
        "height_mm": height,
        "encoder": one.recipe.encoder,
        "slide_sha256": one.slide_sha256,
        "features_sha256": one.features_sha256,
        **(
            {"tiles_per_second": one.pace.tiles_per_second, "waited_share": one.pace.waited_share}
            if one.pace.tiles
            else {}
        ),
    }


def _cell(value: Any) -> str:
    """A value as one cell: numbers with a cross between, counts by what they count."""
    if isinstance(value, dict):
        return ", ".join(f"{number} {name}" for name, number in value.items())
    if isinstance(value, list):
        return " x ".join(f"{number:.6g}" for number in value)
    return "" if value is None else str(value)
