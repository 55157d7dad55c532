"""How a package gets a coarse model: trained on its own dataset, proven on the cases it had not seen.

It is sealed into the package only when no voxel of a label lay outside of what would have been looked at, in any of them.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from preprocessing.datasets import Dataset
from preprocessing.plan import Plan, with_patch
from preprocessing.steps import Resample, prepare
from preprocessing.volume import Case, Geometry

from .coarse import Box, Corners, box_of, ends, region_around
from .config import Train, Tune
from .engines import Engine
from .engines.torch import engine
from .errors import UsageError
from .package import COARSE, Coarse, ModelPackage, amend
from .prediction import Region, choose_device
from .progress import Progress, silent
from .scoring import case_key
from .training import train

logger = logging.getLogger(__name__)

COARSER = 3
"""Times the finest side of the package's voxels: 27 times fewer of them, and what is three voxels wide is one still."""
WINDOW = 64
"""Sides of its windows at most: 29 cm at voxels of 4.5 mm, most of a body."""
MARGIN_MM = 10.0
"""Around what it finds at the least, for what the few held-out cases did not show."""
WIDEST_MM = 40.0
"""A model that needs a wider margin does not know where things are."""
WORTH = 0.7
"""Of the voxels; who must look at more of them is not worth asking."""


def make_coarse(
    dataset: Path, opened: Dataset, package: ModelPackage, settings: Tune, progress: Progress = silent
) -> ModelPackage:
    """Trains a coarse model for so many minutes and adds it to the package, if the cases it had not seen allow."""
    assert settings.coarse
    workshop = package.folder.with_name(f"{package.folder.name}.tuning")
    workshop.mkdir(parents=True, exist_ok=True)
    coarse_plan(package.plan).write(workshop / "coarse.yaml")
    asked = Train(
        plan=workshop / "coarse.yaml", minutes=settings.coarse, device=settings.device, allow=settings.allow,
        match=settings.match, network_options={"width": 8}, model=f"{package.name}-coarse", resume=True,
        tracking_uri=settings.tracking_uri,
    )  # fmt: skip
    made = workshop / "coarse"
    # it is there already when the command was stopped while ways were being measured
    trained = ModelPackage.load(made) if (made / "package.json").exists() else train(dataset, made, asked, progress)
    return add_coarse(package, trained, opened, settings.device)


def coarse_plan(plan: Plan) -> Plan:
    """The same plan at larger voxels: each side as long as three of the finest, one that is longer as it is."""
    if sum(isinstance(step, Resample) for step in plan.steps) != 1:
        raise UsageError(
            f"plan {plan.name} resamples scans not once; a coarse model is made by resampling them otherwise. Leave --coarse "
            "out."
        )
    finest = min(plan.spacing_mm)
    i, j, k = (max(side, COARSER * finest) for side in plan.spacing_mm)
    steps = tuple(replace(s, spacing_mm=(i, j, k)) if isinstance(s, Resample) else s for s in plan.steps)
    # of multiples of 16 up to 64 every network can halve what it wants
    a, b, c = (min(WINDOW, 16 * math.ceil(side / 16)) for side in plan.patch)
    larger = replace(plan, name=f"{plan.name}-coarse", spacing_mm=(i, j, k), steps=steps, memory_gb=None, reasons={})
    return with_patch(larger, (a, b, c))


def add_coarse(package: ModelPackage, trained: ModelPackage, dataset: Dataset, device: str) -> ModelPackage:
    """The package with this model to tell where to look; as it was where the held-out cases speak against that."""
    record = trained.record
    (fold,) = record.folds.values()
    (network,) = trained.networks()
    ready = engine(network, choose_device(device))
    cases = [case for case in _labelled(dataset) if case_key(case) in fold.held_out.cases]
    proven = proof(cases, package.plan, record.plan, ready)
    if proven.refusal:
        logger.warning("the coarse model is not added: %s", proven.refusal)
        return package
    coarse = Coarse(
        network=record.network, network_config=record.network_config, plan=record.plan, margin_mm=proven.margin_mm,
        cases=len(cases), share=round(proven.share, 4),
    )  # fmt: skip
    return amend(package, lambda before: replace(before, coarse=coarse), {COARSE: network})


def _labelled(dataset: Dataset) -> Iterator[Case]:
    return (dataset.read(files) for files in dataset.cases if files.images and files.labels)


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What cases that a coarse model had not seen say of it."""

    margin_mm: float
    share: float
    """Of the voxels: the mean of what would be looked at."""
    refusal: str
    """Why it must not be used; empty where it may."""


def proof(cases: Sequence[Case], plan: Plan, coarse: Plan, network: Engine) -> Proof:
    """The margin with which no voxel of a label lies outside: twice what was needed, and never below MARGIN_MM."""
    if not cases:
        return Proof(margin_mm=0.0, share=1.0, refusal="none of the cases it held out is in this dataset")
    found = [(box_of(case.image, coarse, network)[0], *_truth(case, plan)) for case in cases]
    needed = max(_excess(corners, grid, where) for corners, grid, where in found)
    margin = max(MARGIN_MM, math.ceil(2 * needed))
    shares = [
        _share(region_around(corners, grid, margin) if corners else None, grid, plan) for corners, grid, _ in found
    ]
    share, refusal = float(np.mean(shares)), ""
    if margin > WIDEST_MM:
        refusal = f"labels of a held-out case lie {needed:.0f} mm outside of what it finds"
    elif share > WORTH:
        refusal = f"{share:.0%} of the voxels would be looked at all the same"
    return Proof(margin_mm=margin, share=share, refusal=refusal)


def _truth(case: Case, plan: Plan) -> tuple[Geometry, Box | None]:
    """The prepared grid of a case, and the box of its labels there; None where it has none."""
    assert case.labels is not None
    prepared, trail = prepare(case.image, plan.steps)
    labelled = plan.numbered(trail.follow(case.labels).voxels[0]) > 0
    if not labelled.any():
        return prepared.geometry, None
    others = ((1, 2), (0, 2), (0, 1))
    return prepared.geometry, ends([np.asarray(labelled.any(axis=axes)) for axes in others])


def _excess(corners: Corners, grid: Geometry, where: Box | None) -> float:
    """How many millimetres labels reach beyond what was found; 0 where nothing was, for then all is looked at."""
    if not corners or where is None:
        return 0.0
    region = region_around(corners, grid, 0.0)
    start, stop = where
    beyond = np.maximum(np.array(region.start) - start, stop - np.array(region.stop))
    return float(max(0.0, (beyond * np.array(grid.spacing)).max()))


def _share(region: Region | None, grid: Geometry, plan: Plan) -> float:
    if region is None:
        return 1.0
    return math.prod(region.holding(plan.patch, grid.shape).shape) / math.prod(grid.shape)
