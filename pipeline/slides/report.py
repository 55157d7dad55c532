"""What we say of one slide: enough to trust it, to find it again, and to know what made it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..report import FILE_NAME, as_json, hilum_version, read_record, write_whole
from .deletion import Deletion
from .result import Origin, SlideResult


@dataclass(frozen=True, kw_only=True)
class SlideReport:
    """A slide's report.json; the slide is complete when it lies in its folder."""

    slide_id: str
    status: str = "done"
    hilum_version: str
    package_id: str
    package_name: str
    origin: Origin
    slide_sha256: str
    size_um: tuple[float, float]
    microns_per_pixel: tuple[float, float]
    resolution_from: str
    tiles: int
    tile_um: float
    step_um: float
    quarantined: dict[str, int]
    """How many tiles were left out, and why."""
    features: str
    """Whether they were made now, or taken from where they lay."""
    predicted: str
    probabilities: dict[str, float]
    """Calibrated, by class."""
    logits: dict[str, float]
    """Before calibration, less their mean over the classes: of each class `rest` and its column in tiles.csv sum to it."""
    rest: dict[str, float]
    attention_entropy: float
    """As a share of the highest it can have."""
    deletion: Deletion
    deletion_verdict: str
    top_tiles: int
    """How many were asked for."""
    seed: int
    warnings: tuple[str, ...]
    seconds: dict[str, float]
    files: tuple[str, ...]
    """Names inside the slide's folder."""

    @classmethod
    def of(cls, result: SlideResult, files: Sequence[str], features: str, top_tiles: int) -> "SlideReport":
        """What is to be said of a result whose files have been written."""
        frame = result.frame

        def by_class(values: Sequence[float]) -> dict[str, float]:
            return {name: float(value) for name, value in zip(result.classes, values, strict=True)}

        return cls(
            slide_id=frame.slide_id,
            hilum_version=hilum_version(),
            package_id=result.origin.package_id,
            package_name=result.origin.package_name,
            origin=result.origin,
            slide_sha256=frame.sha256,
            size_um=frame.size_um,
            microns_per_pixel=frame.microns_per_pixel,
            resolution_from=frame.resolution_from,
            tiles=len(result.values),
            tile_um=result.tile_um,
            step_um=result.step_um,
            quarantined=result.quarantined,
            features=features,
            predicted=result.name,
            probabilities=by_class(list(result.probabilities)),
            logits=by_class(list(result.logits)),
            rest=by_class(list(result.rest)),
            attention_entropy=result.entropy,
            deletion=result.deletion,
            deletion_verdict=result.deletion.words,
            top_tiles=top_tiles,
            seed=result.deletion.seed,
            warnings=result.warnings,
            seconds=result.seconds,
            files=tuple(files),
        )

    def write(self, folder: Path) -> Path:
        """Writes report.json, in one piece: from then on the slide counts as complete."""
        path = folder / FILE_NAME
        write_whole(path, as_json(asdict(self)))
        return path

    @classmethod
    def read(cls, path: Path) -> "SlideReport":
        """The report in this file, or in this slide's folder."""
        path = path / FILE_NAME if path.is_dir() else path
        remedy = (
            f"a {FILE_NAME} as `hilum slides classify` writes it is needed. Delete it and classify the slide again."
        )
        return read_record(cls, path, "a report on a slide", remedy)
