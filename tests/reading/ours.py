"""hilum through each of its doors, judged like any other reader."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pipeline.errors import UsageError
from pipeline.finding import find_scans
from pipeline.scan import read_scan
from preprocessing import datasets, dicom, files
from preprocessing.volume import REASONS, ScanError, Volume

from .kinds import FINE, REFUSED, Kind, Made
from .peers import WRONG
from .phantom import Seen, faults


def seen(volume: Volume) -> Seen:
    voxels = volume.voxels[0] if len(volume.channels) == 1 else np.moveaxis(volume.voxels, 0, -1)
    return Seen(voxels, volume.geometry.affine)


def read_file(kind: Kind, made: Made) -> tuple[str, str]:
    """The word of files.read, the door for one scan; of a dataset's check where labels are in question."""
    if kind.family == "labels":
        findings = datasets.check(datasets.open_dataset(made.path))
        return (REFUSED, str(findings[0])) if findings else (FINE, "")
    try:
        volume = files.read(made.path)
    except ScanError as error:
        return REFUSED, f"[{reason_of(error)}] {error}"
    return judged([volume], made.truths)


def read_scans(made: Made) -> tuple[tuple[str, ...], str]:
    """The words of the scans that a batch finds there, and what is wrong with the returned ones together."""
    words, details, volumes = [], [], []
    for outcome in _scans(made.path):
        if isinstance(outcome, ScanError):
            words.append(REFUSED)
            details.append(f"[{reason_of(outcome)}] {outcome}")
        else:
            words.append(outcome.provenance.verdict)
            volumes.append(outcome)
    wrong = faults([seen(volume) for volume in volumes], made.truths)
    return ((WRONG,), wrong) if wrong else (tuple(sorted(words)), " | ".join(details))


def _scans(path: Path) -> Iterator[Volume | ScanError]:
    try:
        found = find_scans([path], ("0",), path.parent / "out")
    except UsageError:
        return
    for scan in found.scans:
        try:
            yield read_scan(scan, ("0",))
        except ScanError as error:
            yield error


def judged(volumes: Sequence[Volume], truths: Sequence[Seen]) -> tuple[str, str]:
    wrong = faults([seen(volume) for volume in volumes], truths)
    return (WRONG, wrong) if wrong else (volumes[0].provenance.verdict, "; ".join(volumes[0].provenance.repairs))


def reason_of(error: ScanError) -> str:
    assert error.reason in REASONS
    return error.reason


def unaccounted(folder: Path) -> list[str]:
    """Files that are in no series and of which nothing is said either."""
    paths = [path for path in folder.iterdir() if path.is_file()]
    series, left_alone = dicom.series_in(paths)
    told = {path for one in series for path in one.paths} | set(left_alone)
    return [path.name for path in paths if path not in told]
