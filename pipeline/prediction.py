"""Windows, flips and folds over a prepared scan."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from kernels import window_blend
from preprocessing.patches import bell, grid
from preprocessing.regions import carrying, values_of
from preprocessing.steps import prepare
from preprocessing.volume import Volume

from .errors import UsageError
from .postprocessing import Applied, Rule, clean

if TYPE_CHECKING:
    from preprocessing.plan import Plan
    from preprocessing.steps import Trail


@dataclass(frozen=True, kw_only=True)
class Inference:
    """How a trained network is applied."""

    overlap: float = 0.5
    """Share of a window that its neighbour covers, per axis."""
    flips: bool = False
    """Average over mirrorings, of every axis that `mirrors` names: up to eight times the time, a little more Dice."""
    mirrors: tuple[bool, bool, bool] = (True, True, True)
    """Which axes flips mirror: those that training mirrored. On others a network answers nonsense."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU where there is one."""

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1:
            raise UsageError(f"overlap is {self.overlap}; it must be at least 0 and below 1. 0.5 is usual.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """What the network thinks of every prepared voxel."""

    probabilities: Volume
    """One channel per class, background first; they sum to 1. Of regions: one per label, each by itself."""
    package_id: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """What a scan holds, on its own grid."""

    labels: Volume
    confidence: dict[str, float]
    """Mean probability of each label where it won."""
    seconds: dict[str, float]
    """How long each hop took."""
    changes: tuple[Applied, ...] = ()
    """What each rule of post-processing did."""


def segment_volume(
    volume: Volume, networks: Sequence[nn.Module], plan: "Plan", how: Inference, package_id: str, *,
    temperatures: Sequence[float] = (), rules: Sequence[Rule] = (),
) -> Found:  # fmt: skip
    """The middle hops: prepare, predict, undo the trail, decide, and clean by the package's rules."""
    marks = [time.perf_counter()]
    prepared, trail = prepare(volume, plan.steps)
    marks.append(time.perf_counter())
    prediction = predict(prepared, networks, plan, how, package_id, temperatures=temperatures)
    marks.append(time.perf_counter())
    decided, strength = decide(prediction, trail, plan)
    labels, changes = clean(decided, rules, plan)
    confidence = confidence_in(labels, decided, strength, plan)
    marks.append(time.perf_counter())
    seconds = {hop: round(after - before, 3) for hop, before, after in zip(HOPS, marks, marks[1:], strict=False)}
    return Found(labels=labels, confidence=confidence, seconds=seconds, changes=changes)


HOPS = ("prepare", "predict", "decide")


def predict(
    prepared: Volume, networks: Sequence[nn.Module], plan: "Plan", how: Inference, package_id: str, *,
    temperatures: Sequence[float] = (),
) -> Prediction:  # fmt: skip
    """The mean over folds (and flips) of the probabilities of blended windows.

    `temperatures`: what each network's logits are divided by before they become probabilities; 1 for all when empty.
    """
    assert len(temperatures) in (0, len(networks))
    device = choose_device(how.device)
    scan = prepared.to_tensor()
    total = torch.zeros(plan.classes, *scan.shape[1:])
    for network, temperature in zip(networks, temperatures or (1.0,) * len(networks), strict=True):
        network.to(device).eval()
        logits = blended_logits(scan, network, plan.patch, plan.classes, how, device)
        total += probabilities(logits, plan, temperature)
    voxels = (total / len(networks)).numpy()
    return Prediction(probabilities=prepared.with_voxels(voxels, channels=class_names(plan)), package_id=package_id)


def probabilities(
    logits: Float[Tensor, "classes i j k"], plan: "Plan", temperature: float = 1.0
) -> Float[Tensor, "classes i j k"]:
    """Logits as probabilities: classes share 1 among them; regions, which may overlap, each have a yes and a no."""
    logits = logits / temperature
    return logits.sigmoid() if plan.has_regions else logits.softmax(dim=0)


def class_names(plan: "Plan") -> tuple[str, ...]:
    """What each channel of a prediction stands for."""
    labels = tuple(label.name for label in plan.labels)
    return labels if plan.has_regions else ("background", *labels)


def blended_logits(
    scan: Float[Tensor, "channel i j k"],
    network: nn.Module,
    patch: tuple[int, int, int],
    classes: int,
    how: Inference,
    device: torch.device,
) -> Float[Tensor, "classes i j k"]:
    """Every window's logits, weighted by a bell, summed, and divided by the sum of weights (a product of three vectors)."""
    total = torch.zeros(classes, *scan.shape[1:])
    bells = [torch.from_numpy(bell(side)) for side in patch]
    weights = [torch.zeros(size) for size in scan.shape[1:]]
    _, height, width, depth = scan.shape
    starts = grid((height, width, depth), patch, how.overlap)
    for axis in range(3):
        for start in sorted({start[axis] for start in starts}):
            weights[axis][start : start + patch[axis]] += bells[axis]
    with torch.inference_mode():
        for i, j, k in starts:
            window = scan[:, i : i + patch[0], j : j + patch[1], k : k + patch[2]]
            logits = _flipped_mean(window[None].to(device), network, how)[0].float().cpu()
            total = window_blend.fused(total, logits, bells[0], bells[1], bells[2], (i, j, k))
    return total / (weights[0][:, None, None] * weights[1][None, :, None] * weights[2][None, None, :])


def _flipped_mean(window: Tensor, network: nn.Module, how: Inference) -> Tensor:
    if not how.flips:
        return network(window)
    axes = [axis for axis, mirrored in zip((2, 3, 4), how.mirrors, strict=True) if mirrored]
    subsets = [some for size in range(len(axes) + 1) for some in combinations(axes, size)]
    return torch.stack([network(window.flip(some)).flip(some) for some in subsets]).mean(dim=0)


def decide(prediction: Prediction, trail: "Trail", plan: "Plan") -> tuple[Volume, Volume]:
    """The label map on the scan's own grid, and the probability of what won in each voxel.

    Probabilities go back to the native grid before the decision: argmax after resampling keeps thin structures.
    One class at a time, so that memory does not grow with the number of labels. What was cropped away is background.
    """
    return (_painted if plan.has_regions else _strongest)(prediction.probabilities, trail, plan)


def _strongest(probabilities: Volume, trail: "Trail", plan: "Plan") -> tuple[Volume, Volume]:
    back = _native(probabilities, 0, trail, outside=1.0)
    best, winner = back.voxels.copy(), np.zeros(back.voxels.shape, dtype=plan.lookup.dtype)
    for number in range(1, len(probabilities.channels)):
        voxels = _native(probabilities, number, trail).voxels
        stronger = voxels > best
        winner[stronger] = plan.lookup[number]
        best[stronger] = voxels[stronger]
    return back.with_voxels(winner, channels=("labels",)), back.with_voxels(best, channels=("probability",))


def _painted(probabilities: Volume, trail: "Trail", plan: "Plan") -> tuple[Volume, Volume]:
    """Each region where it is likelier than not, in the plan's order: a later one is painted over an earlier one."""
    back = _native(probabilities, 0, trail)
    best, painted = np.zeros_like(back.voxels), np.zeros(back.voxels.shape, dtype=plan.lookup.dtype)
    for number in range(len(probabilities.channels)):
        voxels = _native(probabilities, number, trail).voxels if number else back.voxels
        likely = voxels > 0.5
        painted[likely] = plan.lookup[number + 1]
        best[likely] = voxels[likely]
    return back.with_voxels(painted, channels=("labels",)), back.with_voxels(best, channels=("probability",))


def _native(probabilities: Volume, number: int, trail: "Trail", outside: float = 0.0) -> Volume:
    """One channel on the scan's own grid."""
    voxels = probabilities.voxels[number : number + 1]
    return trail.undo(probabilities.with_voxels(voxels, channels=(probabilities.channels[number],)), outside=outside)


def confidence_in(labels: Volume, decided: Volume, strength: Volume, plan: "Plan") -> dict[str, float]:
    """Mean probability of each label where it won and was kept; what a rule filled in won nothing and does not count.

    A region is also where the regions within it won, with the probability of these.
    """
    confidence = {}
    for name, values in values_of(plan.labels).items():
        kept = carrying(labels.voxels, values) & carrying(decided.voxels, values)
        if kept.any():
            confidence[name] = round(float(strength.voxels[kept].mean()), 4)
    return confidence


def choose_device(name: str) -> torch.device:
    """The device asked for; `auto` takes a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"device {name!r} was asked for, but torch sees no GPU here. Use --device cpu.")
    try:
        return torch.device(name)
    except RuntimeError:
        raise UsageError(f"device {name!r} is not known to torch; auto, cpu or cuda is needed. Correct it.") from None
