"""What we say of one slide whose tiles were named: enough to trust it, to find it again, and to know what made it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..report import FILE_NAME, hilum_version, read_record
from .class_map import ClassMap
from .result import Origin


@dataclass(frozen=True, kw_only=True)
class ClassMapReport:
    """A slide's report.json; the slide is complete when it lies in its folder."""

    slide_id: str
    status: str = "done"
    hilum_version: str
    package_id: str
    origin: Origin
    slide_sha256: str
    size_um: tuple[float, float]
    microns_per_pixel: tuple[float, float]
    resolution_from: str
    tiles: int
    tile_um: float
    step_um: float
    quarantined: dict[str, int]
    features: str
    """Whether they were made now, or taken from where they lay."""
    areas_mm2: dict[str, float]
    """Tissue of each class, by tiles."""
    most: str
    """The class with the largest area."""
    warnings: tuple[str, ...]
    seconds: dict[str, float]
    files: tuple[str, ...]

    @classmethod
    def of(cls, found: ClassMap, files: Sequence[str], features: str) -> "ClassMapReport":
        """What is to be said of a map whose files have been written."""
        frame = found.frame
        return cls(
            slide_id=frame.slide_id, hilum_version=hilum_version(), package_id=found.origin.package_id, origin=found.origin,
            slide_sha256=frame.sha256, size_um=frame.size_um, microns_per_pixel=frame.microns_per_pixel,
            resolution_from=frame.resolution_from, tiles=len(found.predicted), tile_um=found.tile_um, step_um=found.step_um,
            quarantined=found.quarantined, features=features, areas_mm2=found.areas_mm2, most=found.most,
            warnings=found.warnings, seconds=found.seconds, files=tuple(files),
        )  # fmt: skip

    @classmethod
    def read(cls, folder: Path) -> "ClassMapReport":
        """The report in this slide's folder."""
        remedy = "one that `hilum slides classify` writes is needed. Delete it and classify the slide again."
        return read_record(cls, folder / FILE_NAME, "a report on the tiles of a slide", remedy)
