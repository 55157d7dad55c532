"""Many scans segmented one by one, each by itself; what is complete is never done twice, what fails is said why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from preprocessing.records import decode, nearest

from . import outputs, registry, tracking
from .config import Segment, refuse_unknown_match
from .errors import UsageError
from .finding import find_scans
from .index import write_index
from .package import ModelPackage
from .prediction import Inference, choose_device, refuse_slow_precision
from .progress import Progress, silent
from .report import FILE_NAME, Report
from .results import DONE, ERROR, Batch, Row, Work, explained, work_through
from .scan import Scan
from .segmentation import EXPLAINED, Model, segment_case


def segment(
    scans: Sequence[Path], package: Path | str, out: Path, settings: Segment = Segment(), progress: Progress = silent  # noqa: B008
) -> Batch[Report]:  # fmt: skip
    """Segment every scan found; `out` gets a folder per case, a summary and an index. One bad case never stops the rest."""
    _refuse_mistakes(settings)
    opened = open_package(package, settings.tracking_uri)
    refuse_unknown_match(settings.reading, opened.plan.channels)
    found = find_scans(scans, opened.plan.channels, out)
    mirrors = opened.plan.recipe.mirror
    if settings.flips and not any(mirrors):
        raise UsageError(
            f"flips were asked for, and {opened.name} was trained without mirrors: on a mirrored scan it would answer "
            "nonsense. Leave --flips out, or train with recipe.mirror in the plan."
        )
    how = Inference(
        overlap=settings.overlap, flips=settings.flips, mirrors=mirrors, device=settings.device,
        precision=settings.precision,
    )  # fmt: skip
    refuse_slow_precision(how.precision, choose_device(how.device))
    return work_through(
        found.scans, found.left_alone, out, _Segmenting(package=opened, settings=settings, how=how), progress
    )


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
class _Segmenting(Work[Scan, Report]):
    """Labels and a report for each scan."""

    package: ModelPackage
    settings: Segment
    how: Inference
    stage = "segment"
    mark = FILE_NAME
    incomplete = frozenset({ERROR})

    @cached_property
    def model(self) -> Model:
        """Loaded for the first case that needs it, and not at all when none does."""
        return Model.load(self.package)

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

    def make(self, scan: Scan, folder: Path) -> Row[Report]:
        report = segment_case(scan, self.model, folder, self.settings, self.how)
        return Row(case_id=scan.case_id, status=DONE, report=report)

    def explain(self, scan: Scan, error: Exception, folder: Path) -> Row[Report]:
        """The reason, in error.json; for a fault of ours with what its mender needs."""
        facts = {"package_id": self.package.id, "sources": ", ".join(map(str, scan.paths))}
        return explained(scan.case_id, error, folder, facts)

    def summarise(self, out: Path, rows: Sequence[Row[Report]], left_alone: Mapping[str, str]) -> None:
        labels = [label.name for label in self.package.plan.labels]
        write_index(out, rows, left_alone=left_alone, labels=labels, package_name=self.package.name)
