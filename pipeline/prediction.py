"""Windows, flips and folds over a prepared scan."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from kernels import window_blend
from preprocessing.patches import bell, grid
from preprocessing.steps import prepare
from preprocessing.volume import Volume

from .errors import UsageError

if TYPE_CHECKING:
    from preprocessing.plan import Plan
    from preprocessing.steps import Trail


@dataclass(frozen=True, kw_only=True)
class Inference:
    """How a trained network is applied."""

    overlap: float = 0.5
    """Share of a window that its neighbour covers, per axis."""
    flips: bool = False
    """Average over all eight mirrorings: eight times the time, a little more Dice."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU where there is one."""

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1:
            raise UsageError(f"overlap is {self.overlap}; it must be at least 0 and below 1. 0.5 is usual.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """What the network thinks of every prepared voxel."""

    probabilities: Volume
    """One channel per class, background first; they sum to 1."""
    package_id: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """What a scan holds, on its own grid."""

    labels: Volume
    confidence: dict[str, float]
    """Mean probability of each label where it won."""
    seconds: dict[str, float]
    """How long each hop took."""


def segment_volume(
    volume: Volume, networks: Sequence[nn.Module], plan: "Plan", how: Inference, package_id: str
) -> Found:
    """The middle hops: prepare, predict, undo the trail and decide. Training scores itself with the same function."""
    marks = [time.perf_counter()]
    prepared, trail = prepare(volume, plan.steps)
    marks.append(time.perf_counter())
    prediction = predict(prepared, networks, plan, how, package_id)
    marks.append(time.perf_counter())
    labels, confidence = decide(prediction, trail, plan)
    marks.append(time.perf_counter())
    seconds = {hop: round(after - before, 3) for hop, before, after in zip(HOPS, marks, marks[1:], strict=False)}
    return Found(labels=labels, confidence=confidence, seconds=seconds)


HOPS = ("prepare", "predict", "decide")


def predict(
    prepared: Volume, networks: Sequence[nn.Module], plan: "Plan", how: Inference, package_id: str
) -> Prediction:
    """The mean over folds (and flips) of the probabilities of blended windows."""
    device = choose_device(how.device)
    scan = prepared.to_tensor()
    total = torch.zeros(plan.classes, *scan.shape[1:])
    for network in networks:
        network.to(device).eval()
        total += blended_logits(scan, network, plan.patch, plan.classes, how, device).softmax(dim=0)
    names = ("background", *(label.name for label in plan.labels))
    probabilities = prepared.with_voxels((total / len(networks)).numpy(), channels=names)
    return Prediction(probabilities=probabilities, package_id=package_id)


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
            logits = _flipped_mean(window[None].to(device), network, how.flips)[0].float().cpu()
            total = window_blend.fused(total, logits, bells[0], bells[1], bells[2], (i, j, k))
    return total / (weights[0][:, None, None] * weights[1][None, :, None] * weights[2][None, None, :])


def _flipped_mean(window: Tensor, network: nn.Module, flips: bool) -> Tensor:
    if not flips:
        return network(window)
    axes = [[axis for axis, on in zip((2, 3, 4), choice, strict=True) if on] for choice in product((0, 1), repeat=3)]
    return torch.stack([network(window.flip(some)).flip(some) for some in axes]).mean(dim=0)


def decide(prediction: Prediction, trail: "Trail", plan: "Plan") -> tuple[Volume, dict[str, float]]:
    """The label map on the scan's own grid, and the mean probability of each label where it won.

    Probabilities go back to the native grid before the decision: argmax after resampling keeps thin structures.
    One class at a time, so that memory does not grow with the number of labels.
    """
    probabilities = prediction.probabilities
    best: np.ndarray | None = None
    winner: np.ndarray | None = None
    for number, name in enumerate(probabilities.channels):
        channel = probabilities.with_voxels(probabilities.voxels[number : number + 1], channels=(name,))
        back = trail.undo(channel, outside=1.0 if number == 0 else 0.0)  # what was cropped away is background
        if best is None or winner is None:
            best, winner = back.voxels.copy(), np.zeros(back.voxels.shape, dtype=plan.lookup.dtype)
            continue
        stronger = back.voxels > best
        winner[stronger] = plan.lookup[number]
        best[stronger] = back.voxels[stronger]
    assert best is not None and winner is not None
    return back.with_voxels(winner, channels=("labels",)), _confidence(best, winner, plan)


def _confidence(
    best: Float[np.ndarray, "1 i j k"], winner: Integer[np.ndarray, "1 i j k"], plan: "Plan"
) -> dict[str, float]:
    found = {label.name: winner == label.value for label in plan.labels}
    return {name: round(float(best[inside].mean()), 4) for name, inside in found.items() if inside.any()}


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
