"""The two verbs before a training: check a dataset, plan for it."""

from dataclasses import dataclass
from pathlib import Path

from preprocessing import datasets
from preprocessing.datasets import Finding
from preprocessing.plan import Plan, make_plan

from .data import measure_machine
from .progress import Progress, silent


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What a look at every case of a dataset found."""

    name: str
    layout: str
    channels: tuple[str, ...]
    labels: tuple[str, ...]
    cases: int
    findings: tuple[Finding, ...]


def check(dataset: Path, progress: Progress = silent) -> Checked:
    """Read every case to the end and say what does not fit; no findings means that the dataset can be trained on."""
    opened = datasets.open_dataset(dataset)
    findings = datasets.check(opened, lambda done, of: progress("check", done, of))
    return Checked(
        name=opened.name,
        layout=opened.layout,
        channels=opened.channels,
        labels=tuple(label.name for label in opened.labels),
        cases=len(opened.cases),
        findings=findings,
    )


def plan(dataset: Path, out: Path | None = None, device: str = "auto", progress: Progress = silent) -> Plan:
    """Fingerprint a dataset and plan for it and for this machine; written to `out` when given."""
    opened = datasets.open_dataset(dataset)
    fingerprint = datasets.take_fingerprint(opened, lambda done, of: progress("look at every case", done, of))
    made = make_plan(fingerprint, measure_machine(device))
    if out:
        made.write(out)
    return made
