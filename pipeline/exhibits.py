"""After a training, three held-out cases to look at: the worst, the median and the best, each as the page a user gets.

They are segmented by this fold's network alone, for the others were trained on them. Nothing in them names a patient: a
case goes by its hash, and where its scan lies and what was read from its header stays behind.
"""

import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from torch import nn

from preprocessing.datasets import CaseFiles, Dataset
from preprocessing.plan import Label
from preprocessing.regions import values_of
from preprocessing.steps import Orient
from preprocessing.volume import Case, Provenance, Volume

from . import outputs
from .comparison import compare
from .package import ModelPackage
from .prediction import Found, Inference, segment_volume
from .report import Result
from .scoresheet import Table, chosen, mean_dice
from .scoring import case_key

logger = logging.getLogger(__name__)

LARGEST = 50 * 2**20
"""Bytes of a page that MLflow still shows in its Artifacts tab."""

DRAWING_SECONDS = 4.0
"""What a page takes beside segmenting its case again, at most: pictures, and the scan packed into it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Exhibit:
    """One case to look at."""

    kind: str
    page: str
    """HTML that needs no other file."""
    picture: UInt8[np.ndarray, "h w 3"]


def exhibits(
    dataset: Dataset, held_out: Sequence[CaseFiles], scored: Table, network: nn.Module, package: ModelPackage,
    fold: str, device: str, until: float | None, seconds_each: float,
) -> Iterator[Exhibit]:  # fmt: skip
    """One after another while the clock (time.monotonic) allows. `scored` is in the order of `held_out`."""
    assert len(scored) == len(held_out)
    for kind, number in chosen([mean_dice(dice) for dice in scored.values()]).items():
        began = time.monotonic()
        if until is not None and began + seconds_each + DRAWING_SECONDS > until:
            logger.info("no time is left for the page of the %s held-out case; `hilum segment` makes one", kind)
            return
        key = list(scored)[number]
        case = dataset.read(held_out[number])
        if case_key(case) != key:
            logger.warning("held-out case %s changed on disk since it was scored; no page of it is made", key)
            continue
        yield _exhibit(kind, case, scored[key], len(scored), network, package, fold, device)
        seconds_each = max(seconds_each, time.monotonic() - began - DRAWING_SECONDS)


def _dice(dice: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in dice.items()) or "none of its labels could be measured"


def _exhibit(
    kind: str, case: Case, dice: Mapping[str, float], of: int, network: nn.Module, package: ModelPackage, fold: str,
    device: str,
) -> Exhibit:  # fmt: skip
    assert case.labels is not None
    volume, score = nameless(case.image, package.plan.channels), mean_dice(dice)
    words = f"{kind} of {of}" + ("" if score is None else f" · Dice {score:.2f}")
    said = f"The {kind} of {of} held-out cases of fold {fold}, by the network's own Dice: {_dice(dice)}."
    found = segment_volume(
        volume, [network], package.plan, Inference(device=device), package.id,
        temperatures=(package.temperatures[fold],), rules=package.rules,
    )  # fmt: skip
    return Exhibit(
        kind=kind,
        page=_page(_result(volume, found, case_key(case), said, package, fold)),
        picture=_picture(volume, found, case.labels, package, words),
    )


def nameless(image: Volume, channels: Sequence[str]) -> Volume:
    """The scan and what kind it is; no file, no hash of one, nothing a header said."""
    bare = Provenance(modality=image.provenance.modality, reader="hilum, in training")
    return replace(image.with_channels(tuple(channels)), provenance=bare)


def _result(volume: Volume, found: Found, key: str, said: str, package: ModelPackage, fold: str) -> Result:
    return Result(
        case_id=key,
        scan=volume,
        labels=found.labels,
        label_table=package.plan.labels,
        package_id=package.id,
        package_name=f"{package.name}, fold {fold} alone",
        confidence=found.confidence,
        temperatures={fold: package.temperatures[fold]} if package.is_calibrated else {},
        postprocessing=found.changes,
        warnings=(said,),
        seconds=found.seconds,
    )


def _page(result: Result) -> str:
    page = outputs.load("page")
    with tempfile.TemporaryDirectory(prefix="hilum-exhibit-") as folder:
        (written,) = page.write(result, Path(folder), page.Config())
        return written.read_text(encoding="utf-8")


def _picture(
    volume: Volume, found: Found, given: Volume, package: ModelPackage, words: str
) -> UInt8[np.ndarray, "h w 3"]:
    """As pictures during training are drawn, of the scan's own grid."""
    scan, drawn, true = (Orient().apply(each) for each in (volume, found.labels, given))
    labels = package.plan.labels
    by_hand, by_network = (_positions(each.voxels[0], labels) for each in (true, drawn))
    return compare(scan.voxels.astype(np.float32), by_hand, by_network, labels, scan.geometry.spacing, words)


def _positions(voxels: np.ndarray, labels: Sequence[Label]) -> UInt8[np.ndarray, "i j k"]:
    """The place of each voxel's label among the labels, from 1; of regions within regions the inner one's."""
    placed = np.zeros(voxels.shape, np.uint8)
    for position, values in enumerate(values_of(labels).values(), start=1):
        placed[np.isin(voxels, values)] = position
    return placed
