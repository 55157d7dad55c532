"""check: what every scan of a tree or a dataset is, and whether it can be relied on; nothing is changed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preprocessing import datasets
from preprocessing.datasets import Finding
from preprocessing.reading import STRICT, Reading
from preprocessing.verdict import Verdict

from .config import refuse_unknown_match
from .errors import UsageError
from .finding import find_scans
from .progress import Progress, silent
from .report import hilum_version
from .scan import Scan, read_scan, refusal, verdict_on
from .verdicts import record


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What a look at every case found."""

    name: str
    verdicts: dict[str, Verdict]
    """Per case, in order."""
    left_alone: dict[str, str] = field(default_factory=dict)
    """Files that are no scans, and why; in a dataset, nobody looks for them."""
    layout: str = ""
    """Of a dataset; nothing else has one."""
    channels: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    """Labels that a dataset declares and no case has."""
    notes: tuple[str, ...] = ()
    """What is unusual about a dataset and right all the same, a sentence each."""
    findings: tuple[Finding, ...] = ()
    """Everything that does not fit in a dataset; none means that it can be trained on."""

    @property
    def fits(self) -> bool:
        """Whether nothing was refused."""
        return not self.findings and all(verdict.word != "refused" for verdict in self.verdicts.values())

    def records(self) -> dict[str, Any]:
        """Everything, as plain values."""
        cases = []
        for case, verdict in self.verdicts.items():
            said = record(verdict)
            place = said.pop("grid") or dict.fromkeys(("shape", "spacing_mm", "orientation", "affine"))
            cases.append({"case": case, **said, **place})
        return {
            "hilum_version": hilum_version(),
            "name": self.name,
            "layout": self.layout,
            "absent_labels": list(self.absent),
            "notes": list(self.notes),
            "cases": cases,
            "left_alone": self.left_alone,
        }


def check(
    path: Path, reading: Reading = STRICT, channels: Sequence[str] = (), progress: Progress = silent
) -> Checked:  # fmt: skip
    """Read every case of a dataset, a tree or a file to its last voxel, and say what it is and whether it will do."""
    if datasets.is_dataset(path):
        if channels:
            raise UsageError(
                f"{path} is a dataset, which names its own channels; --channels is for trees of scans. Leave it out."
            )
        return _dataset(path, reading, progress)
    refuse_unknown_match(reading, channels)
    found = find_scans([path], channels)
    verdicts = {}
    for done, scan in enumerate(found.scans, start=1):
        verdicts[scan.case_id] = judge(scan, channels, reading)
        progress("check", done, len(found.scans))
    return Checked(name=path.resolve().name, verdicts=verdicts, left_alone=found.left_alone, channels=tuple(channels))


def _dataset(path: Path, reading: Reading, progress: Progress) -> Checked:
    opened = datasets.open_dataset(path, reading)
    refuse_unknown_match(reading, opened.channels)
    looked = datasets.examine(opened, lambda done, of: progress("check", done, of))
    return Checked(
        name=opened.name,
        verdicts=looked.verdicts,
        layout=opened.layout,
        channels=opened.channels,
        labels=tuple(label.name for label in opened.labels),
        absent=looked.absent,
        notes=looked.notes,
        findings=looked.findings,
    )


def judge(scan: Scan, channels: Sequence[str] = (), reading: Reading = STRICT) -> Verdict:
    """Whatever goes wrong with a scan is said of that scan."""
    try:
        return verdict_on(scan, read_scan(scan, channels, reading))
    except Exception as error:
        return refusal(scan, error)
