"""READ ME FIRST: one scan, from file to report.

Each line of `segment_case` is one hop; nothing here knows how a hop is done. Many scans are `batch.segment`, where one is
read and another written while a third is being looked at.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from preprocessing.records import decode
from preprocessing.regions import carrying, values_of
from preprocessing.steps import Orient
from preprocessing.volume import Volume

from . import outputs
from .config import Segment
from .engines import open_engines
from .package import ModelPackage
from .prediction import Asked, Found, Inference, segment_volume
from .report import Report, Result, millilitres
from .scan import Scan, read_scan

if TYPE_CHECKING:
    from torch import nn

    from .coarse import Look
    from .engines import Engine


def segment_case(scan: Scan, model: "Model", folder: Path, settings: Segment, how: Inference) -> Report:
    """One scan, from file to report; its files appear in the folder."""
    started = time.perf_counter()
    volume = read_case(scan, model.package, settings)
    seconds = round(time.perf_counter() - started, 3)
    result = find(scan.case_id, volume, model, settings, how, seconds={"read": seconds})
    return write_case(result, folder, settings)


def read_case(scan: Scan, package: ModelPackage, settings: Segment) -> Volume:
    """The scan, with the channels of the package and the hash of its files; refused where an output does not suit it."""
    volume = read_scan(scan, package.plan.channels, settings.reading)
    outputs.refuse_unsuited(settings.outputs, volume)
    # the hash of its files, by which a second run knows it again
    return replace(volume, provenance=replace(volume.provenance, sha256=scan.identity))


def find(
    case_id: str, volume: Volume, model: "Model", settings: Segment, how: Inference, *, seconds: dict[str, float],
    scratch: Path | None = None,
) -> Result:  # fmt: skip
    """What the networks find in it, and where they looked when an output shows that; `seconds` of what came before.

    `scratch`: a folder with room for what is too large for memory; nothing of it is left.
    """
    package = model.package
    place, seconds = _looked(volume, model, settings, seconds)
    found = segment_volume(
        volume, model.engines, package.plan, how, package.id,
        temperatures=tuple(package.temperatures.values()), rules=package.rules, asked=asked_by(settings), scratch=scratch,
        region=place.on if place else None,
    )  # fmt: skip
    result = _result(case_id, volume, found, package, how, seconds)
    result = replace(result, engine=_engine_words(model, how), region=place.words if place else "")
    return _with_explanations(result, model, settings, how) if EXPLAINED & set(settings.outputs) else result


def _looked(
    volume: Volume, model: "Model", settings: Segment, seconds: dict[str, float]
) -> "tuple[Look | None, dict[str, float]]":
    """Where the package's coarse model finds something, unless all is to be looked at; and the seconds with its own."""
    if settings.whole or model.coarse is None or model.package.record.coarse is None:
        return None, seconds
    from .coarse import look

    started = time.perf_counter()
    place = look(volume, model.package.record.coarse, model.coarse)
    return place, seconds | {"coarse": round(time.perf_counter() - started, 3)}


def _engine_words(model: "Model", how: Inference) -> str:
    """What ran the networks, and how windows lay."""
    words = [
        model.engines[0].words,
        f"overlap {how.overlap:g}{', mirrored and averaged' if how.flips else ''}",
        how.why,
    ]
    return "; ".join(word for word in words if word)


def asked_by(settings: Segment) -> Asked:
    """What the outputs need to know of every voxel beside its label."""
    wanted = set(settings.outputs)
    exact = settings.output_options.get("probabilities", {}).get("exact")
    return Asked(probabilities="probabilities" in wanted, uncertainty="uncertainty" in wanted, exact=bool(exact))


def write_case(result: Result, folder: Path, settings: Segment) -> Report:
    """Every output that was asked for, and the report over them."""
    written = [
        path
        for name in outputs.in_order(settings.outputs)
        for path in write_output(name, result, folder, settings.output_options.get(name, {}))
    ]
    report = Report.of(result, [path.name for path in written], settings.outputs, settings.reading)
    report.write(folder)  # last: a case is complete when its report exists
    return report


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A package with what runs it in memory: loaded once, used for every case."""

    package: ModelPackage
    engines: "Sequence[Engine]"
    """One per fold."""
    device: str = "auto"

    @staticmethod
    def load(package: ModelPackage, how: Inference = Inference()) -> "Model":  # noqa: B008
        return Model(package=package, engines=open_engines(package, how), device=how.device)

    @cached_property
    def coarse(self) -> "Engine | None":
        """What says where to look, of a package that has such."""
        from .coarse import coarse_engine  # not at the top: few packages have one

        return coarse_engine(self.package, self.device) if self.package.record.coarse else None

    @cached_property
    def networks(self) -> Sequence["nn.Module"]:
        """With their layers and gradients, as explanations need them; an engine has none to show."""
        return self.package.networks()


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
    case_id: str, volume: Volume, found: Found, package: ModelPackage, how: Inference, seconds: dict[str, float]
) -> Result:
    return Result(
        case_id=case_id,
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
        maps=found.maps,
        memory=found.memory,
        windows=found.windows,
        seconds={**seconds, **found.seconds},
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
    # of what was given up for want of memory, what may change the answer
    said += [words for words in (found.memory.words if found.memory else ()) if "may change labels" in words]
    if not any(isinstance(step, Orient) for step in package.plan.steps):
        said.append(
            f"its axes were taken as they are stored ({volume.geometry.orientation}), as nnU-Net does; if scans of the training "
            "were stored another way, the network saw a turned body"
        )
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
