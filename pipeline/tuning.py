"""tune: the cases that each fold held out say what speed costs, and the package remembers it.

Every held-out case goes through its fold's network in every way there is: how far windows overlap, mirrored or not, in every
precision this machine computes in. What was measured of a case stays in a journal beside the package until all is sealed: a
command that was stopped goes on from there.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from preprocessing.cores import usable_cores
from preprocessing.datasets import Dataset, open_dataset
from preprocessing.plan import Plan
from preprocessing.records import BadRecord, decode, encode
from preprocessing.regions import carrying, values_of
from preprocessing.steps import prepare
from preprocessing.volume import Case, Volume

from .config import Tune
from .curve import Curve, Point
from .engines.torch import TorchEngine, engine
from .errors import PackageError, UsageError
from .metrics import dice
from .package import ModelPackage, amend
from .postprocessing import dice_of
from .prediction import PRECISIONS, Inference, choose_device, refuse_slow_precision, segment_volume
from .progress import Progress, silent
from .scoring import case_key
from .stream import Windows

logger = logging.getLogger(__name__)

OVERLAPS = (0.125, 0.25, 0.5)
"""Shares of a window. 0.5 is what nnU-Net takes; each step down halves the windows or does better. Without any overlap an
object between two windows is seen by neither in its surroundings, however seldom that shows in a mean."""


def tune(dataset: Path, package: Path, settings: Tune = Tune(), progress: Progress = silent) -> ModelPackage:  # noqa: B008
    """Measures, chooses, and seals both into the package; it has another id from then on."""
    opened, found = open_dataset(dataset, settings.reading), ModelPackage.load(package)
    if settings.coarse:
        from .coarse_making import make_coarse  # trains: nothing that measuring needs

        found = make_coarse(dataset, opened, found, settings, progress)
    journal = Journal(package.with_name(f"{package.name}.tuning"), found.id)
    measured = [measured for measured in _measured(opened, found, settings, journal, progress)]
    curve = _curve(measured, found.plan)
    told = amend(found, lambda record: replace(record, curve=curve))
    journal.close()
    return told


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a case is looked at."""

    overlap: float
    flips: bool
    precision: str


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What came of one case in one way."""

    fold: str
    case: str
    way: Way
    dice: dict[str, float]
    agreement: dict[str, float]
    seconds: float


def ways(plan: Plan, device: torch.device) -> list[Way]:
    """All that this package and this machine allow; float32 before what is compared with it."""
    flips = (False, True) if any(plan.recipe.mirror) else (False,)
    return [
        Way(overlap=overlap, flips=flipped, precision=precision)
        for overlap, flipped, precision in product(OVERLAPS, flips, _precisions(device))
    ]


def _precisions(device: torch.device) -> list[str]:
    able = []
    for precision in PRECISIONS:
        try:
            refuse_slow_precision(precision, device)
        except UsageError as reason:
            logger.info("%s is left out: %s", precision, reason)
        else:
            able.append(precision)
    return able


def _measured(
    dataset: Dataset, package: ModelPackage, settings: Tune, journal: "Journal", progress: Progress
) -> Iterator[Measured]:
    """Every held-out case that is wanted, by the fold that had not seen it, in every way."""
    device = choose_device(settings.device)
    wanted = _wanted(package, settings.cases)
    networks = dict(zip(package.record.folds, package.networks(), strict=True))
    of, done = len(wanted), 0
    for case in _cases(dataset):
        fold = wanted.pop(case_key(case), None)
        if fold is None:
            continue
        known = {one.way: one for one in journal.read() if (one.fold, one.case) == (fold, case_key(case))}
        for one in _ways_of(case, fold, networks[fold], package, device, known):
            if one.way not in known:
                journal.write(one)
            yield one
        progress("measure ways", done := done + 1, of)
        if not wanted:
            return
    if not done:
        raise UsageError(
            f"{dataset.name} holds none of the {of} held-out cases of {package.name}; those that it was trained beside are "
            "needed, with their files unchanged. Give the dataset it was trained on."
        )
    logger.warning("%d of %d held-out cases are not in this dataset; the others are measured", of - done, of)


def _wanted(package: ModelPackage, most: int) -> dict[str, str]:
    """Case -> fold, so many of each fold; by their hashes, which is any order and always the same."""
    folds = package.record.folds.items()
    wanted = {case: number for number, fold in folds for case in sorted(fold.held_out.cases)[:most]}
    if not wanted:
        raise PackageError(
            f"{package.name} names no held-out cases, and on cases that a network was trained on every way looks good; a "
            "fold that held some out is needed. Train one with --fold 0, or choose --overlap by hand."
        )
    return wanted


def _cases(dataset: Dataset) -> Iterator[Case]:
    for files in dataset.cases:
        if files.images and files.labels:
            yield dataset.read(files)


def _ways_of(
    case: Case, fold: str, network: Any, package: ModelPackage, device: torch.device, known: dict[Way, Measured]
) -> Iterator[Measured]:
    """Ways whose windows lie alike are one; a reference of float32 comes first of each."""
    plan = package.plan
    if all(way in known for way in ways(plan, device)):
        yield from known.values()
        return
    engines = {precision: engine(network, device, precision) for precision in _precisions(device)}
    shape = prepare(case.image, plan.steps)[0].geometry.shape
    met: dict[Any, Measured] = {}
    exact: dict[Any, Volume] = {}
    for way in ways(plan, device):
        windows = tuple(Windows.over(shape, plan.patch, way.overlap, plan.bell).starts), way.flips
        if (windows, way.precision) not in met:
            labels, seconds = _answered(case, fold, engines[way.precision], package, way, device)
            exact.setdefault(windows, labels)
            met[windows, way.precision] = Measured(
                fold=fold, case=case_key(case), way=way, seconds=seconds, dice=_against_truth(labels, case, plan),
                agreement=_between(labels, exact[windows], plan),
            )  # fmt: skip
        yield replace(met[windows, way.precision], way=way)


def _answered(
    case: Case, fold: str, one: TorchEngine, package: ModelPackage, way: Way, device: torch.device
) -> tuple[Volume, float]:
    plan = package.plan
    how = Inference(
        overlap=way.overlap, flips=way.flips, mirrors=plan.recipe.mirror, precision=way.precision, device=str(device)
    )
    found = segment_volume(case.image, [one], plan, how, package.id, temperatures=(package.temperatures[fold],))
    return found.labels, found.seconds["predict"]


def _against_truth(labels: Volume, case: Case, plan: Plan) -> dict[str, float]:
    assert case.labels is not None
    return dice_of(labels, case.labels, plan)


def _between(labels: Volume, exact: Volume, plan: Plan) -> dict[str, float]:
    """Dice of two label maps of ours, label by label."""
    pairs = {
        name: dice(carrying(labels.voxels[0], values), carrying(exact.voxels[0], values))
        for name, values in values_of(plan.labels).items()
    }
    return {name: value for name, value in pairs.items() if value is not None}


def _curve(measured: Sequence[Measured], plan: Plan) -> Curve:
    by_way: dict[Way, list[Measured]] = {}
    for one in measured:
        by_way.setdefault(one.way, []).append(one)
    points = [
        Point(
            overlap=way.overlap, flips=way.flips, precision=way.precision,
            dice=_mean([one.dice for one in some], plan), agreement=_mean([one.agreement for one in some], plan),
            seconds=round(float(np.mean([one.seconds for one in some])), 4),
        )
        for way, some in by_way.items()
    ]  # fmt: skip
    return Curve(
        points=tuple(sorted(points, key=lambda point: (point.precision != "float32", point.flips, point.overlap))),
        cases=len({one.case for one in measured}),
        folds=tuple(dict.fromkeys(one.fold for one in sorted(measured, key=lambda one: one.fold))),
        machine=_machine(),
    )


def _mean(scores: Sequence[dict[str, float]], plan: Plan) -> float:
    """Over labels, of the mean over the cases that have each; 1 where no case has any, for then nothing is wrong."""
    each = [[dice[label.name] for dice in scores if label.name in dice] for label in plan.labels]
    means = [float(np.mean(some)) for some in each if some]
    return round(float(np.mean(means)), 5) if means else 1.0


def _machine() -> str:
    """What the seconds are true of; no name of a machine."""
    with_gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return (
        f"{with_gpu}{usable_cores()} core(s) with {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    )


class Journal:
    """What was measured so far, a line for each case and way; of another package nothing counts."""

    def __init__(self, folder: Path, package_id: str):
        self.folder, self.path, self.package_id = folder, folder / "measured.jsonl", package_id

    def read(self) -> list[Measured]:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [one for line in lines if (one := self._understood(line))]

    def _understood(self, line: str) -> Measured | None:
        try:
            said = json.loads(line)
            return decode(Measured, said["measured"], where=self.path.name) if said["id"] == self.package_id else None
        except (ValueError, BadRecord, KeyError, TypeError):  # the last line of a command that was killed
            return None

    def write(self, measured: Measured) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"id": self.package_id, "measured": encode(measured)}) + "\n")

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
