"""What the cases that were held out say of a trained network: how well it does, how sure it may be, what would help it."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Integer
from torch import nn

from preprocessing.datasets import CaseFiles, Dataset
from preprocessing.plan import Plan
from preprocessing.steps import prepare
from preprocessing.volume import Case

from .cache import truth
from .calibration import Calibration, Sample, calibrate, draw, reliability, sample_size
from .decision import Ground, Judge, decide
from .postprocessing import HeldOut, Rule, tried
from .prediction import Inference, choose_device, open_stream, ready
from .progress import Progress, silent
from .stream import Rows


@dataclass(frozen=True, kw_only=True)
class Scores:
    """All that is learnt from held-out cases; empty where nothing was held out."""

    dice: dict[str, float] = field(default_factory=dict)
    """Mean Dice per label over the cases that have it, on each scan's own grid."""
    held_out: HeldOut = field(default_factory=HeldOut)
    temperature: float | None = None
    calibration: Calibration | None = None
    reliability: dict[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    """Before and after the temperature: how sure, how often right, bin by bin."""

    @property
    def mean_dice(self) -> float:
        """Over labels; 0 where there are none."""
        return float(np.mean(list(self.dice.values() or [0.0])))


def score(
    dataset: Dataset, held_out: Sequence[CaseFiles], network: nn.Module, plan: Plan, device: str,
    progress: Progress = silent,
) -> Scores:  # fmt: skip
    """Every held-out case once, through the very hops that segmentation takes, without rules and at temperature 1."""
    cases: dict[str, dict[str, float]] = {}
    changes: dict[str, dict[Rule, dict[str, float]]] = {}
    samples: list[Sample] = []
    size = sample_size(len(held_out), plan)
    network.to(choose_device(device)).eval()
    for done, files in enumerate(held_out, start=1):
        case = dataset.read(files)
        key = case_key(case)
        cases[key], changes[key], sample = _scored(case, files.annotated, network, plan, device, size)
        samples += [sample] if sample else []
        progress("score held-out cases", done, len(held_out))
    temperature, calibration = calibrate(samples)
    return Scores(
        dice=_means(cases, plan),
        held_out=HeldOut.of(cases, changes),
        temperature=temperature,
        calibration=calibration,
        reliability=_reliability(samples, temperature),
    )


def _reliability(samples: Sequence[Sample], temperature: float | None) -> dict[str, tuple[tuple[float, float], ...]]:
    if temperature is None:
        return {}
    return {"before": reliability(samples, 1.0), f"divided by {temperature:.3g}": reliability(samples, temperature)}


def case_key(case: Case) -> str:
    """What a case is called in a package: who has the scan can find it again, who only guesses names cannot."""
    return hashlib.sha256(f"{case.image.provenance.sha256}:{case.id}".encode()).hexdigest()[:12]


def _scored(
    case: Case, annotated: Sequence[str] | None, network: nn.Module, plan: Plan, device: str, size: int
) -> tuple[dict[str, float], dict[Rule, dict[str, float]], Sample | None]:
    assert case.labels is not None
    image, trail = prepare(case.image, plan.steps)
    rng = np.random.default_rng(int(case_key(case), 16))  # the same voxels whatever the order of the cases
    drawn = draw(truth(case, trail, plan)[0], rng, size)
    how = Inference(device=device)
    stream = open_stream(image, ready([network], how), plan, how)
    overheard = Overheard(places=drawn.places, shape=image.geometry.shape, axis=stream.axis, classes=plan.classes)
    ground = Ground.under(image.geometry, trail, stream.axis, stream.origin, stream.windows.shape)
    judge = Judge(plan=plan, temperatures=(1.0,))
    decided = decide(map(judge.weigh, overheard.passing(stream.rows())), ground, judge)
    dice, changes = tried(decided.labels(case.image), case.labels, plan, annotated)
    return dice, changes, drawn.with_logits(overheard.said, plan, annotated)


class Overheard:
    """The logits of some voxels, noted as their rows pass by."""

    def __init__(
        self, *, places: Integer[np.ndarray, " voxel"], shape: tuple[int, int, int], axis: int, classes: int
    ) -> None:
        at = list(np.unravel_index(places, shape))
        self.row, self.one, self.other = at.pop(axis), *at
        self.said = np.empty((len(places), classes), np.float32)

    def passing(self, stream: Iterable[Rows]) -> Iterator[Rows]:
        for rows in stream:
            (logits,) = rows.logits
            here = np.flatnonzero((self.row >= rows.first) & (self.row < rows.first + logits.shape[1]))
            at = (self.row[here] - rows.first, self.one[here], self.other[here])
            row, one, other = (torch.from_numpy(each) for each in at)
            self.said[here] = logits[:, row, one, other].T.cpu().numpy()
            yield rows


def _means(cases: dict[str, dict[str, float]], plan: Plan) -> dict[str, float]:
    of_label = {
        label.name: [dice[label.name] for dice in cases.values() if label.name in dice] for label in plan.labels
    }
    return {name: round(float(np.mean(values)), 4) for name, values in of_label.items() if values}
