"""READ ME FIRST: one scan, from file to report.

Each line of `segment_case` is one hop; nothing here knows how a hop is done. Many scans are `batch.segment`.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from preprocessing.records import decode
from preprocessing.regions import carrying, values_of
from preprocessing.volume import Volume

from . import outputs
from .config import Segment
from .package import ModelPackage
from .prediction import Found, Inference, segment_volume
from .report import Report, Result, millilitres
from .scan import Scan, read_scan

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A package with its networks in memory: loaded once, used for every case."""

    package: ModelPackage
    networks: Sequence["nn.Module"]

    @staticmethod
    def load(package: ModelPackage) -> "Model":
        return Model(package=package, networks=package.networks())


def segment_case(scan: Scan, model: Model, folder: Path, settings: Segment, how: Inference) -> Report:
    """One scan, from file to report; its files appear in the folder."""
    started = time.perf_counter()
    volume = read_scan(scan, model.package.plan.channels, settings.reading)
    outputs.refuse_unsuited(settings.outputs, volume)
    # the hash of its files, by which a second run knows it again
    volume = replace(volume, provenance=replace(volume.provenance, sha256=scan.identity))
    read_seconds = round(time.perf_counter() - started, 3)
    package = model.package
    found = segment_volume(
        volume, model.networks, package.plan, how, package.id,
        temperatures=tuple(package.temperatures.values()), rules=package.rules,
    )  # fmt: skip
    result = _result(scan, volume, found, package, how, read_seconds)
    if EXPLAINED & set(settings.outputs):
        result = _with_explanations(result, model, settings, how)
    written = [
        path
        for name in settings.outputs
        for path in write_output(name, result, folder, settings.output_options.get(name, {}))
    ]
    report = Report.of(result, [path.name for path in written], settings.outputs, settings.reading)
    report.write(folder)  # last: a case is complete when its report exists
    return report


EXPLAINED = {"saliency", "parametric_map"}
"""Outputs that show where the networks looked; what they show is settled by the options of the first."""


def _with_explanations(result: Result, model: Model, settings: Segment, how: Inference) -> Result:
    from .explanation import Choice, explain  # not at the top: most runs explain nothing

    started = time.perf_counter()
    config = outputs.load("saliency").Config
    asked = decode(config, settings.output_options.get("saliency", {}), where="output_options.saliency")
    package = model.package
    made = explain(
        result.scan, result.labels, model.networks, package.plan, how, Choice(**asdict(asked)),
        temperatures=tuple(package.temperatures.values()),
    )  # fmt: skip
    seconds = {**result.seconds, "explain": round(time.perf_counter() - started, 3)}
    return replace(result, explanations=made, seconds=seconds)


def write_output(name: str, result: Result, folder: Path, options: dict[str, Any]) -> list[Path]:
    """One output of a result, by name."""
    module = outputs.load(name)
    return module.write(result, folder, decode(module.Config, options, where=f"output_options.{name}"))


def _result(
    scan: Scan, volume: Volume, found: Found, package: ModelPackage, how: Inference, read_seconds: float
) -> Result:
    return Result(
        case_id=scan.case_id,
        scan=volume,
        labels=found.labels,
        label_table=package.plan.labels,
        package_id=package.id,
        package_name=package.name,
        confidence=found.confidence,
        temperatures=package.temperatures if package.is_calibrated else {},
        postprocessing=found.changes,
        precision=how.precision,
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
    said += _removals(found, package)
    ratio = np.array(sorted(volume.geometry.spacing)) / np.array(sorted(package.plan.spacing_mm))
    if ratio.max() > 2 or ratio.min() < 0.5:
        here, there = (_millimetres(spacing) for spacing in (volume.geometry.spacing, package.plan.spacing_mm))
        said.append(f"its voxels of {here} differ over twofold from the {there} it was trained on")
    return tuple(said)


LARGE = 0.1
"""A share of a label beyond which it is worth a word that post-processing removed it."""


def _removals(found: Found, package: ModelPackage) -> list[str]:
    """What rules took away, where that was much; all of it stands in the report's `postprocessing`."""
    said = []
    values = values_of(package.plan.labels)
    for change in found.changes:
        for name, ml in change.removed_ml.items():
            left = int(carrying(found.labels.voxels, values[name]).sum()) * found.labels.geometry.voxel_ml
            if ml > LARGE * (ml + left):
                share = f"{ml / (ml + left):.0%}"
                said.append(f"{millilitres(ml)} of {name} ({share} of it) were removed: {change.rule}")
    return said


def _millimetres(spacing: Sequence[float]) -> str:
    return "×".join(f"{mm:.3g}" for mm in spacing) + " mm"
