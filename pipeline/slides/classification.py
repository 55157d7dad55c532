"""classify: slides through a package; of each the answer, and by the same forward pass the map of the tiles it comes from."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image

from preprocessing.slides import Slide, SlideFile, find_slides, find_tissue

from ..config import SlideClassify
from ..outputs._drawing import png
from ..progress import Progress, silent
from ..report import FILE_NAME, as_json, write_whole
from ..results import DONE, ERROR, Batch, LookedAt, Row, Work, explained, work_through
from . import deletion, geojson, heatmap, page, picture
from .answering import SlideAnswer, answer, bag_of, without
from .class_map_report import ClassMapReport
from .feature_file import FILE_NAME as FEATURES
from .feature_file import FeatureFile
from .index import write_index
from .naming import Naming
from .package import SlidePackage
from .report import SlideReport
from .result import SlideResult, TopTile, ranked, table
from .sight import frame_of, origin_of, overview_of, warnings_of
from .supply import Supply

logger = logging.getLogger(__name__)

TILES = "tiles.csv"
TOP = "top-tiles"


def classify(
    inputs: Sequence[Path], package: Path, out: Path, settings: SlideClassify = SlideClassify(), progress: Progress = silent  # noqa: B008
) -> Batch[SlideReport] | Batch[ClassMapReport]:  # fmt: skip
    """The answer to every slide found, or to every tile of it; `out` gets a folder per slide and an index. One bad slide
    never stops the rest."""
    opened = SlidePackage.load(package)
    found = find_slides(inputs, out)
    with ExitStack() as stack:
        supply = Supply(opened, settings, stack, progress, len(found.slides))
        if opened.record.kind == "tiles":
            return work_through(found.slides, found.left_alone, out, Naming(opened, supply), progress)
        return work_through(found.slides, found.left_alone, out, _Classifying(opened, settings, supply), progress)


class _Classifying(Work[SlideFile, SlideReport]):
    """An answer, a map and a page for each slide."""

    stage = "classify"
    mark = FILE_NAME
    incomplete = frozenset({ERROR})

    def __init__(self, package: SlidePackage, settings: SlideClassify, supply: Supply) -> None:
        self.package, self.settings, self.supply = package, settings, supply

    @cached_property
    def networks(self) -> list[torch.nn.Module]:
        """Loaded for the first slide that needs them."""
        return [network.to(self.supply.device) for network in self.package.networks()]

    def ahead(
        self, looked_at: Iterator[LookedAt[SlideFile, SlideReport]]
    ) -> Iterator[LookedAt[SlideFile, SlideReport]]:
        return self.supply.ahead(looked_at)

    def found(self, folder: Path) -> Row[SlideReport] | None:
        if not (folder / FILE_NAME).exists():
            return None
        return Row(case_id=folder.name, status=DONE, report=SlideReport.read(folder))

    def is_enough(self, result: SlideReport, folder: Path) -> bool:
        asked = (self.package.id, self.settings.top_tiles, self.settings.seed)
        made = (result.package_id, result.top_tiles, result.seed)
        return asked == made and all((folder / name).exists() for name in result.files)

    def other(self, result: SlideReport, scan: SlideFile) -> str:
        if result.package_id != self.package.id:
            return "by another package"
        return self.supply.difference(result.slide_sha256, result.resolution_from, result.microns_per_pixel, scan)

    def make(self, scan: SlideFile, folder: Path) -> Row[SlideReport]:
        began = time.perf_counter()
        file, features = self.supply.features_of(scan, folder)
        seconds = {"features": time.perf_counter() - began}
        result = self._answered(scan, file, seconds)
        (folder / FEATURES).unlink(missing_ok=True)  # made for this answer alone; `slides features` keeps them
        files = write(result, folder)
        report = SlideReport.of(result, files, features, self.settings.top_tiles)
        report.write(folder)
        logger.info("a slide: %d tiles, deletion test %s", report.tiles, report.deletion.verdict)
        return Row(case_id=scan.id, status=DONE, report=report)

    def explain(self, scan: SlideFile, error: Exception, folder: Path) -> Row[SlideReport]:
        return explained(scan.id, error, folder, {"package_id": self.package.id, "sources": str(scan.path)})

    def summarise(self, out: Path, rows: Sequence[Row[SlideReport]], left_alone: Mapping[str, str]) -> None:
        classes = self.package.record.classes
        write_index(out, rows, left_alone=left_alone, classes=classes, package_name=self.package.name)

    def _answered(self, scan: SlideFile, file: FeatureFile, seconds: dict[str, float]) -> SlideResult:
        """What is said of the slide, and everything needed to draw it."""
        began = time.perf_counter()
        bags = bag_of(file, self.supply.device)
        temperature = self.package.record.temperature
        said = centred(answer(self.networks, temperature, bags))
        seconds["answer"] = time.perf_counter() - began

        def left(kept: Int[np.ndarray, " kept"]) -> np.ndarray:
            keep = torch.zeros(len(file), dtype=torch.bool)
            keep[torch.from_numpy(kept)] = True
            return answer(self.networks, temperature, without(bags, keep), explain=False).logits / temperature

        assert said.shares is not None
        began = time.perf_counter()
        tested = deletion.judge(said.shares[:, said.predicted], left, said.predicted, self.settings.seed)
        seconds["deletion test"] = time.perf_counter() - began
        began = time.perf_counter()
        with self.supply.open(scan) as slide:
            result = _seen(slide, file, said, tested, self.package, self.settings.top_tiles)
        seconds["overview and top tiles"] = time.perf_counter() - began
        return replace(result, seconds={hop: round(each, 3) for hop, each in seconds.items()})


def centred(said: SlideAnswer) -> SlideAnswer:
    """The same answer with logits whose mean over the classes is 0: a tile that adds as much to every class speaks for none,
    and no probability knows of it."""
    assert said.shares is not None and said.rest is not None
    return replace(
        said,
        logits=said.logits - said.logits.mean(),
        shares=said.shares - said.shares.mean(axis=1, keepdims=True),
        rest=said.rest - said.rest.mean(),
    )


def _seen(
    slide: Slide, file: FeatureFile, said: SlideAnswer, tested: deletion.Deletion, package: SlidePackage, most: int
) -> SlideResult:
    """The answer with the slide it is about."""
    assert said.shares is not None and said.rest is not None
    recipe = file.recipe
    first, last = ranked(said.shares[:, said.predicted], most)
    overview, blank = overview_of(slide, recipe)
    tissue = find_tissue(slide)
    return SlideResult(
        frame=frame_of(slide, file), origin=origin_of(package), overview=overview, tissue=tissue.mask, tissue_um=tissue.microns_per_pixel,
        tile_um=recipe.tile_um, step_um=recipe.step_um, positions_um=file.positions_um, grid=file.grid,
        tissue_share=file.tissue, classes=package.record.classes, predicted=said.predicted, logits=said.logits,
        probabilities=said.probabilities, shares=said.shares, rest=said.rest, attention=said.attention,
        entropy=said.entropy, deletion=tested, top=_tiles(slide, file, first), against=_tiles(slide, file, last[: most // 2]),
        quarantined=file.quarantined, warnings=_warnings(slide, file, tested, blank),
    )  # fmt: skip


def _tiles(slide: Slide, file: FeatureFile, indices: Int[np.ndarray, " n"]) -> tuple[TopTile, ...]:
    """At the resolution the encoder saw them at."""
    side, pixels = file.recipe.tile_um, file.recipe.tile_px
    found = []
    for rank, index in enumerate(indices.tolist(), start=1):
        x, y = file.positions_um[index].tolist()
        found.append(TopTile(rank=rank, index=index, picture=slide.region(x, y, side, side, (pixels, pixels))))
    return tuple(found)


def _warnings(slide: Slide, file: FeatureFile, tested: deletion.Deletion, blank: int) -> tuple[str, ...]:
    said = warnings_of(slide, file, blank)
    if tested.verdict != deletion.FAILED:
        return said
    return (
        "the map failed its deletion test: as many tiles at random change the prediction as much; do not rely on it",
        *said,
    )


def write(result: SlideResult, folder: Path) -> list[str]:
    """Everything but the report; the names of the files."""
    found = heatmap.heatmap(result)
    sheet = png(picture.picture(result, found))
    texts: dict[str, str | bytes] = {
        TILES: table(result),
        geojson.FILE_NAME: as_json(geojson.collection(result)),
        picture.PICTURE: sheet,
        page.FILE_NAME: page.page(result, sheet),
    }
    if result.top or result.against:
        texts[picture.SHEET] = png(picture.sheet(result))
    for name, content in texts.items():
        write_whole(folder / name, content)
    heatmap.write_values(found, result, folder / heatmap.OME_TIFF)
    heatmap.write_colours(found, result, folder / heatmap.TIFF)
    return [*texts, heatmap.OME_TIFF, heatmap.TIFF, *_single_tiles(result, folder)]


def _single_tiles(result: SlideResult, folder: Path) -> Iterator[str]:
    """top-tiles/for-01_0.1213.png: its rank, and what it adds."""
    (folder / TOP).mkdir()
    for kind, tiles in (("for", result.top), ("against", result.against)):
        for tile in tiles:
            name = f"{TOP}/{kind}-{tile.rank:02d}_{abs(result.values[tile.index]):.4f}.png"
            write_whole(folder / name, png(Image.fromarray(tile.picture)))
            yield name
