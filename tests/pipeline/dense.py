"""The dense path: every logit of every voxel at once. What the stream must equal, written down the plain way."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels import resample_argmax, window_blend
from pipeline.prediction import Inference, mirrorings
from pipeline.stream import Windows
from preprocessing.plan import Plan
from preprocessing.regions import carrying, values_of
from preprocessing.steps import Trail, prepare
from preprocessing.volume import Volume


@dataclass(frozen=True, kw_only=True, eq=False)
class Dense:
    """What a scan holds, and what it was decided from."""

    labels: Volume
    strength: np.ndarray
    """The probability of what won, on the scan's own grid."""
    scores: list[Volume]
    """Of every class, on the scan's own grid."""
    probabilities: Tensor
    """The mean over folds, on the prepared grid."""
    members: list[Tensor]


def dense(
    volume: Volume, engines: Sequence, plan: Plan, how: Inference, temperatures: Sequence[float] = (), axis: int | None = None
) -> Dense:  # fmt: skip
    """Windows in order along `axis`, as the stream takes them; None: in the order of the grid."""
    prepared, trail = prepare(volume, plan.steps)
    scan = torch.from_numpy(np.array(prepared.voxels, np.float32))
    logits = [blended(scan, engine, plan, how, axis) for engine in engines]
    members = [
        (each / temperature).sigmoid() if plan.has_regions else (each / temperature).softmax(dim=0)
        for each, temperature in zip(logits, temperatures or [1.0] * len(engines), strict=True)
    ]
    total = torch.zeros_like(members[0])
    for member in members:
        total += member
    likely = total / len(members)
    labels, strength = decided(likely, prepared, trail, plan, axis or 0)
    return Dense(
        labels=labels, strength=strength, scores=brought_back(likely, prepared, trail, plan), probabilities=likely,
        members=members,
    )  # fmt: skip


def blended(scan: Tensor, engine, plan: Plan, how: Inference, axis: int | None) -> Tensor:
    windows = Windows.over(tuple(scan.shape[1:]), plan.patch, how.overlap, plan.bell)
    total = torch.zeros(plan.classes, *scan.shape[1:])
    starts = windows.starts if axis is None else sorted(windows.starts, key=lambda start: start[axis])
    for start in starts:
        window = scan[(slice(None), *windows.place(start))][None]
        passes = [engine(window.flip(axes)).flip(axes)[0] for axes in mirrorings(how)]
        mean = passes[0].clone()
        for one in passes[1:]:
            mean += one
        mean = mean / len(passes) if len(passes) > 1 else mean
        total = window_blend.fused(total, mean.float().contiguous(), *windows.bells, start)
    i, j, k = windows.sums
    return total / (i[:, None, None] * j[None, :, None] * k[None, None, :])


def decided(likely: Tensor, prepared: Volume, trail: Trail, plan: Plan, axis: int) -> tuple[Volume, np.ndarray]:
    """Every class interpolated, the axis of the stream first, so that rounding is the same."""
    before, resampled, after = trail.parted()
    nothing = 0.0 if plan.has_regions else 1.0
    kept = [
        after.undo(prepared.with_voxels(one[None].numpy(), channels=("one",)), nothing if number == 0 else 0.0)
        for number, one in enumerate(likely)
    ]
    order = sorted(range(3), key=lambda other: other != axis)
    there = resampled.before if resampled else prepared.geometry
    nearest = resampled.step.separate_back(there) if resampled else None
    scores = torch.from_numpy(np.stack([one.voxels[0] for one in kept])).permute(0, *(n + 1 for n in order))
    shape = tuple(there.shape[n] for n in order)
    lookup = torch.from_numpy(plan.lookup)
    numbers, best = resample_argmax.reference(
        scores, shape, lookup, 0.5 if plan.has_regions else None, None if nearest is None else order.index(nearest)
    )
    back = [np.ascontiguousarray(each.numpy().transpose(np.argsort(order)))[None] for each in (numbers, best)]
    labels, strength = (
        before.undo(prepared.with_voxels(each, geometry=there, channels=("x",)), outside)
        for each, outside in zip(back, (0.0, nothing), strict=True)
    )
    return labels, strength.voxels[0]


def brought_back(likely: Tensor, prepared: Volume, trail: Trail, plan: Plan) -> list[Volume]:
    """Every class by itself, each step undone in turn: no kernel of ours decides."""
    nothing = 0.0 if plan.has_regions else 1.0
    return [
        trail.undo(prepared.with_voxels(one[None].numpy(), channels=("one",)), outside=nothing if number == 0 else 0.0)
        for number, one in enumerate(likely)
    ]


def confidence_in(labels: Volume, decided: Volume, strength: np.ndarray, plan: Plan) -> dict[str, float]:
    """Mean probability of each label where it won and was kept."""
    found = {}
    for name, values in values_of(plan.labels).items():
        kept = carrying(labels.voxels, values) & carrying(decided.voxels, values)
        if kept.any():
            found[name] = float(strength[kept[0]].mean(dtype=np.float64))
    return found
