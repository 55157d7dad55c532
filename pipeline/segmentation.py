"""READ ME FIRST: one scan, from file to report.

Each line of `segment_case` is one hop; nothing here knows how a hop is done. Many scans are `batch.segment`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from preprocessing import files
from preprocessing.records import decode
from preprocessing.volume import UnreadableScan, Volume, stack

from . import outputs
from .package import ModelPackage
from .prediction import Found, Inference, segment_volume
from .report import Report, Result

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Scan:
    """Where one case lies: a file or series folder of all channels, or one per channel in the package's order."""

    case_id: str
    paths: tuple[Path, ...]
    series: tuple[Any, ...] = ()
    """The DICOM series behind the paths, where they are DICOM."""
    refusal: str = ""
    """Why it cannot be read, where that was seen while looking for it: a damaged slice may be a missing slice."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A package with its networks in memory: loaded once, used for every case."""

    package: ModelPackage
    networks: Sequence["nn.Module"]

    @staticmethod
    def load(package: ModelPackage) -> "Model":
        return Model(package=package, networks=package.networks())


def segment_case(
    scan: Scan, identity: str, model: Model, folder: Path, wanted: Sequence[str],
    options: dict[str, dict[str, Any]], how: Inference,
) -> Report:  # fmt: skip
    """One scan, from file to report. `identity` is the hash of its files, by which a second run knows it again."""
    started = time.perf_counter()
    volume = read_scan(scan, model.package.plan.channels)
    volume = replace(volume, provenance=replace(volume.provenance, sha256=identity))
    read_seconds = round(time.perf_counter() - started, 3)
    found = segment_volume(volume, model.networks, model.package.plan, how, model.package.id)
    result = _result(scan, volume, found, model.package, read_seconds)
    written = [path for name in wanted for path in write_output(name, result, folder, options.get(name, {}))]
    report = Report.of(result, [path.name for path in written], wanted)
    report.write(folder)  # last: a case is complete when its report exists
    return report


def read_scan(scan: Scan, channels: Sequence[str]) -> Volume:
    """The scan with its package's channels, all on one grid."""
    if scan.refusal:
        raise UnreadableScan(scan.refusal)
    volumes = [
        _read(path, series) for path, series in zip(scan.paths, scan.series or (None,) * len(scan.paths), strict=True)
    ]
    volume = volumes[0] if len(volumes) == 1 else stack(volumes, tuple(path.name for path in scan.paths))
    return volume.with_channels(channels)


def _read(path: Path, series: Any) -> Volume:
    if series is None:
        return files.read(path)
    from preprocessing import dicom

    return dicom.read(series)


def write_output(name: str, result: Result, folder: Path, options: dict[str, Any]) -> list[Path]:
    """One output of a result, by name."""
    module = outputs.load(name)
    return module.write(result, folder, decode(module.Config, options, where=f"output_options.{name}"))


def _result(scan: Scan, volume: Volume, found: Found, package: ModelPackage, read_seconds: float) -> Result:
    return Result(
        case_id=scan.case_id,
        scan=volume,
        labels=found.labels,
        label_table=package.plan.labels,
        package_id=package.id,
        package_name=package.name,
        confidence=found.confidence,
        warnings=_warnings(volume, found, package),
        seconds={"read": read_seconds, **found.seconds},
    )


UNSURE = 0.6
"""A label whose mean winning probability lies below this was close to being something else almost everywhere."""


def _warnings(volume: Volume, found: Found, package: ModelPackage) -> tuple[str, ...]:
    """What a reader should know before trusting the result."""
    said = []
    present = set(np.unique(found.labels.voxels).tolist())
    if present <= {0}:
        said.append("nothing was found; look at the scan before you believe it")
    for name, confidence in found.confidence.items():
        if confidence < UNSURE:
            said.append(f"{name} is uncertain: its mean probability is {confidence:.2f}")
    ratio = np.array(sorted(volume.geometry.spacing)) / np.array(sorted(package.plan.spacing_mm))
    if ratio.max() > 2 or ratio.min() < 0.5:
        said.append(
            f"voxels of {volume.geometry} differ over twofold from the {package.plan.spacing_mm} mm it was trained on"
        )
    return tuple(said)
