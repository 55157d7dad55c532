"""Many scans segmented one by one, each by itself; what is complete is never done twice, what fails is said why."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import final

from preprocessing.records import decode, nearest
from preprocessing.volume import Volume

from . import outputs, registry, tracking
from .budget import parse_memory
from .config import Segment, refuse_unknown_match
from .errors import UsageError
from .finding import find_scans
from .index import write_index
from .machine import free_memory
from .package import ModelPackage
from .prediction import Inference, choose_device, refuse_slow_precision
from .progress import Progress, silent
from .report import FILE_NAME, Report, Result
from .results import DONE, ERROR, Batch, Handed, Row, explained, work_through
from .scan import Scan
from .segmentation import EXPLAINED, Model, find, read_case, write_case
from .shards import Shard


def segment(
    scans: Sequence[Path], package: Path | str, out: Path, settings: Segment = Segment(), progress: Progress = silent  # noqa: B008
) -> Batch[Report]:  # fmt: skip
    """Segment every scan found; `out` gets a folder per case, a summary and an index. One bad case never stops the rest."""
    _refuse_mistakes(settings)
    opened = open_package(package, settings.tracking_uri)
    refuse_unknown_match(settings.reading, opened.plan.channels)
    if settings.ray:  # other machines have other working folders
        scans, out = [path.absolute() for path in scans], out.absolute()
        opened = replace(opened, folder=opened.folder.absolute())
    found = find_scans(scans, opened.plan.channels, out)
    mirrors = opened.plan.recipe.mirror
    if settings.flips and not any(mirrors):
        raise UsageError(
            f"flips were asked for, and {opened.name} was trained without mirrors: on a mirrored scan it would answer "
            "nonsense. Leave --flips out, or train with recipe.mirror in the plan."
        )
    how = way_of(opened, settings)
    refuse_slow_precision(how.precision, choose_device(how.device))
    work = _Segmenting(package=opened, settings=settings, how=how, room=_Room(how.max_memory))
    if settings.ray:
        from .cluster import Cluster  # not at the top: most runs have no cluster

        cluster = Cluster(settings.ray, (opened.folder, *scans))
        return work_through(found.scans, found.left_alone, out, work, progress, mine=found.scans, way=cluster)
    shard = Shard.parse(settings.shard)
    mine = shard.part(found.scans) if shard else None
    return work_through(found.scans, found.left_alone, out, work, progress, mine=mine)


def way_of(package: ModelPackage, settings: Segment) -> Inference:
    """As was asked; where nothing is said of overlap and flips, the way that `hilum tune` chose for the package."""
    overlap, flips, why = 0.5 if settings.overlap is None else settings.overlap, settings.flips, []
    curve = package.record.curve
    if curve and settings.overlap is None and not settings.flips:
        point = curve.choice(settings.precision)
        overlap, flips = point.overlap, point.flips
        why.append(f"chosen by hilum tune: mean Dice {point.dice:.4f}, {curve.best.dice:.4f} the best way")
    if settings.precision != "float32":
        changed = curve.changed(overlap, flips, settings.precision) if curve else None
        why.append(
            f"nobody measured what {settings.precision} changes: `hilum tune` does" if changed is None
            else f"its labels agree with float32's at a mean Dice of {changed:.4f} (held-out cases)"
        )  # fmt: skip
    return Inference(
        overlap=overlap, flips=flips, mirrors=package.plan.recipe.mirror, device=settings.device,
        precision=settings.precision, engine=settings.engine, body=settings.body,
        max_memory=parse_memory(settings.max_memory) if settings.max_memory else None, why="; ".join(why),
    )  # fmt: skip


def _refuse_mistakes(settings: Segment) -> None:
    """A typo in an output or its options is told now, not after the first scan."""
    # the options of saliency settle the maps of every output that shows them
    asked = dict.fromkeys([*settings.outputs, *(["saliency"] if EXPLAINED & set(settings.outputs) else [])])
    for name in asked:
        decode(outputs.load(name).Config, settings.output_options.get(name, {}), where=f"output_options.{name}")
    for name in settings.output_options:
        if name not in asked:
            raise UsageError(
                f"output_options speaks of {name!r}, which is not among the outputs{nearest(name, settings.outputs)} "
                f"Those asked for: {', '.join(settings.outputs)}."
            )


def open_package(package: Path | str, tracking_uri: str | None = None) -> ModelPackage:
    """A package from a folder, or from the MLflow registry by models:/NAME@ALIAS."""
    if str(package).startswith("models:/"):
        uri = tracking_uri or tracking.default_uri()
        return ModelPackage.load(registry.fetch(str(package), tracking.home() / "packages", uri))
    return ModelPackage.load(Path(package))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Read:
    """A scan in memory, and how long it took to get there."""

    volume: Volume
    seconds: float


COMPANY = 12
"""Times a scan's voxels that others may take while it is looked at: two that lie ready, a copy of what is being decoded, and,
of the one that is being written, scan, labels and what its page is drawn from; each of them up to twice as large."""


@final
class _Room:
    """Whether memory holds other cases beside one, by what the largest before it was said to take."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.voxels = self.stated = 0
        """Bytes of the voxels of the largest case so far, and what it was said to take with all that is done to it."""
        self.alone = True

    def holds_others(self, volume: Volume) -> bool:
        """Not while the first case is looked at: nobody knows yet what one takes."""
        voxels = volume.voxels.nbytes
        if self.voxels:
            most = self.stated * max(1.0, voxels / self.voxels) + COMPANY * voxels
            self.alone = most > (free_memory() if self.limit is None else self.limit)
        return not self.alone

    def seen(self, result: Result) -> Result:
        """Remembers what it took. What a process grew by while it had others in hand, too, is no measure of one case."""
        if result.memory is None:
            return result
        if result.scan.voxels.nbytes >= self.voxels:
            self.voxels, self.stated = result.scan.voxels.nbytes, result.memory.stated
        return result if self.alone else replace(result, memory=replace(result.memory, peak=None))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Segmenting(Handed[Scan, Report]):
    """Labels and a report for each scan."""

    package: ModelPackage
    settings: Segment
    how: Inference
    room: _Room
    stage = "segment"
    mark = FILE_NAME
    incomplete = frozenset({ERROR})

    @cached_property
    def model(self) -> Model:
        """Loaded for the first case that needs it, and not at all when none does."""
        return Model.load(self.package, self.how)

    def found(self, folder: Path) -> Row[Report] | None:
        if not (folder / FILE_NAME).exists():
            return None
        return Row(case_id=folder.name, status=DONE, report=Report.read(folder / FILE_NAME))

    def is_enough(self, result: Report, folder: Path) -> bool:
        """All of its files are there, and what was allowed then is what is allowed now wherever that made a difference."""
        if result.package_id != self.package.id or set(self.settings.outputs) - set(result.outputs):
            return False
        if result.verdict != "fine" and result.reading != self.settings.reading:
            return False
        return all((folder / name).exists() for name in result.files)

    def other(self, result: Report, scan: Scan) -> str:
        if result.package_id != self.package.id:
            return "by another package"
        return "" if result.input_sha256 == scan.identity else "of another scan of the same name"

    def read(self, scan: Scan) -> "_Read":
        started = time.perf_counter()
        volume = read_case(scan, self.package, self.settings)
        return _Read(volume=volume, seconds=round(time.perf_counter() - started, 3))

    def roomy(self, read: "_Read") -> bool:
        return self.room.holds_others(read.volume)

    def answer(self, scan: Scan, read: "_Read", folder: Path) -> Result:
        seconds = {"read": read.seconds}
        found = find(scan.case_id, read.volume, self.model, self.settings, self.how, seconds=seconds, scratch=folder)
        return self.room.seen(found)

    def write(self, scan: Scan, answer: Result, folder: Path) -> Row[Report]:
        return Row(case_id=scan.case_id, status=DONE, report=write_case(answer, folder, self.settings))

    def explain(self, scan: Scan, error: Exception, folder: Path) -> Row[Report]:
        """The reason, in error.json; for a fault of ours with what its mender needs."""
        facts = {"package_id": self.package.id, "sources": ", ".join(map(str, scan.paths))}
        return explained(scan.case_id, error, folder, facts)

    def summarise(self, out: Path, rows: Sequence[Row[Report]], left_alone: Mapping[str, str]) -> None:
        labels = [label.name for label in self.package.plan.labels]
        write_index(out, rows, left_alone=left_alone, labels=labels, package_name=self.package.name)
