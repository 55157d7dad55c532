"""hilum's own rules: from what a dataset is and what there is to train with, to a plan. Each gives its reason."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from .plan import Fingerprint, Label, Plan, Recipe, Triple
from .steps import ANISOTROPIC, Crop, Normalise, Orient, Pad, Resample, Scale, Step

Spacing = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What there is to train with. The pipeline measures it; the rules only read it."""

    memory_gb: float
    """Free memory of the GPU where there is one, of this process otherwise."""
    cores: int
    has_gpu: bool


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a network asks for. The pipeline measures it; the rules only read it."""

    divisor: Callable[[Triple, Spacing], Triple] = lambda patch, spacing: (1, 1, 1)
    """What the sides of such a window must be multiples of; ValueError where it is too small to be halved at all."""
    fixed_gb: float = 0.15
    """Memory that does not grow with the window: weights, gradients, what the optimiser keeps."""
    bytes_per_voxel: float = 1_300
    """Memory per voxel of all windows of a training step. Here: residual_unet, width 16, float32."""


def make_plan(fingerprint: Fingerprint, machine: Machine, demand: Demand = Demand()) -> Plan:
    """Every rule in turn; each gives its value and the reason that is written beside it."""
    spacing, why_spacing = spacing_rule(fingerprint)
    separate, why_separate = separate_rule(spacing)
    crop, why_crop = crop_rule(fingerprint)
    normalise, why_normalise = normalise_rule(fingerprint)
    shape = prepared_shape(fingerprint, spacing, crop)
    patch, why_patch = patch_rule(shape, spacing, machine, demand)
    batch, why_batch = batch_rule(patch, len(fingerprint.cases), machine, demand)
    recipe, why_recipe = recipe_rule(fingerprint.labels, machine)
    resample = Resample(spacing_mm=spacing, separate=separate)
    # a spline leaves no zero where zeros meet voxels: what is measured where it is not zero is measured before
    masked = any(scale.nonzero for scale in normalise.channels)
    middle: list[Step] = [normalise, resample] if masked else [resample, normalise]
    steps: list[Step] = [Orient(), *([Crop()] if crop else []), *middle, Pad(shape=patch)]
    return Plan(
        name=fingerprint.name,
        channels=fingerprint.channels,
        labels=fingerprint.labels,
        steps=tuple(steps),
        spacing_mm=spacing,
        patch=patch,
        batch=batch,
        recipe=recipe,
        reasons={
            "orient": "every scan is turned to Right-Anterior-Superior: a network must not depend on how a file is stored",
            "crop": why_crop,
            "spacing_mm": why_spacing,
            "separate": why_separate,
            "normalise": why_normalise,
            "patch": why_patch,
            "batch": why_batch,
            **why_recipe,
        },
        dataset=fingerprint.dataset,
        ignored=fingerprint.ignored,
    )


def spacing_rule(fingerprint: Fingerprint) -> tuple[tuple[float, float, float], str]:
    """The median spacing; a much coarser, much shorter axis takes the finer tenth, so that most scans keep their slices."""
    spacing = fingerprint.median(lambda facts: facts.spacing_mm)
    shape = fingerprint.median(lambda facts: facts.cropped)
    why = f"the median over {len(fingerprint.cases)} cases"
    coarse = int(np.argmax(spacing))
    others = [axis for axis in range(3) if axis != coarse]
    next_coarsest = float(spacing[others].max())
    if spacing[coarse] > ANISOTROPIC * next_coarsest and shape[coarse] * ANISOTROPIC < shape[others].min():
        tenth = float(np.percentile([facts.spacing_mm[coarse] for facts in fingerprint.cases.values()], 10))
        spacing[coarse] = max(tenth, next_coarsest)
        why += f"; axis {'RAS'[coarse]} is over {ANISOTROPIC:g} times coarser than the others: its 10th percentile"
    x, y, z = (round(float(s), 4) for s in spacing)
    return (x, y, z), why


def separate_rule(spacing: Spacing) -> tuple[int | None, str]:
    """Between slices that lie far apart nothing is interpolated: what is between them was never seen."""
    coarse = int(np.argmax(spacing))
    if spacing[coarse] <= ANISOTROPIC * min(spacing) or sum(mm == spacing[coarse] for mm in spacing) > 1:
        return None, f"no axis is over {ANISOTROPIC:g} times coarser than another: all three are interpolated together"
    return coarse, (
        f"axis {'RAS'[coarse]} is over {ANISOTROPIC:g} times coarser: along it the nearest slice is taken; decided once for "
        "the dataset, so that no case is interpolated in another way (nnU-Net v2 decides case by case)"
    )


def crop_rule(fingerprint: Fingerprint) -> tuple[bool, str]:
    """Cut the zero border where the dataset has one."""
    kept = kept_share(fingerprint)
    if kept < 0.9:
        return True, f"the median case keeps {kept:.0%} of its voxels once the zero border is cut"
    return False, f"no zero border worth cutting: the median case would keep {kept:.0%}"


STRIPPED = 0.75
"""nnU-Net v2: when the median case keeps less than this of its voxels, zero means 'nothing here', not 'dark'."""


def kept_share(fingerprint: Fingerprint) -> float:
    """How much the median case keeps of its voxels once the zero border is cut away."""
    return float(np.median([facts.kept for facts in fingerprint.cases.values()]))


def hounsfield(fingerprint: Fingerprint, channel: int) -> Scale:
    """Fixed numbers for a channel whose unit means the same in every scan: clipped to what labels hold."""
    every = list(fingerprint.cases.values())
    labelled = [facts for facts in every if facts.voxels] or every  # a case without labels would add its air
    pooled = np.concatenate([facts.intensities[channel] for facts in labelled])
    low, high = np.percentile(pooled, [0.5, 99.5])
    mean, deviation = float(pooled.mean()), max(float(pooled.std()), 1e-3)
    return Scale(by="dataset", low=float(low), high=float(high), mean=mean, deviation=deviation)


def normalise_rule(fingerprint: Fingerprint) -> tuple[Normalise, str]:
    """By modality: CT has a unit and keeps it; every other channel is measured scan by scan."""
    stripped = kept_share(fingerprint) < STRIPPED
    scales, why = [], []
    for number, channel in enumerate(fingerprint.channels):
        if channel.lower() == "ct":
            scales.append(hounsfield(fingerprint, number))
            why.append(f"{channel}: Hounsfield units mean the same in every scan; clipped to what labels hold")
        else:
            scales.append(Scale(by="scan", nonzero=stripped))
            where = "where it is not zero" if stripped else "over the whole scan"
            why.append(f"{channel}: no fixed unit; each scan's own mean and deviation, {where}")
    return Normalise(channels=tuple(scales)), "; ".join(why)


def prepared_shape(fingerprint: Fingerprint, spacing: Spacing, crop: bool) -> np.ndarray:
    """The median shape once every case is cut (if it is) and has that spacing."""
    return fingerprint.median(
        lambda facts: np.array(facts.cropped if crop else facts.shape) * np.array(facts.spacing_mm) / np.array(spacing)
    )


CPU_VOXELS_PER_CORE = 48_000
"""A step on a CPU should stay near half a second: about this many voxels per core through a U-Net of 16 first channels.
Measured: within the same five minutes windows of 32×32×40 reach a Dice 0.004 above windows of the whole hippocampus."""
GPU_VOXELS = 2 * 192**3
"""A step on a GPU should stay near a second: two windows of the size that nnU-Net v2 plans for 40 GB."""
SHARE = 0.8
"""Of the free memory, for a step; the rest is for scans looked at whole and for what grows unforeseen."""


def voxel_budget(machine: Machine, demand: Demand) -> tuple[int, str]:
    """How many voxels one training step may hold on this machine."""
    where = "of GPU memory" if machine.has_gpu else "of free memory"
    by_memory = int(max(0.0, machine.memory_gb * SHARE - demand.fixed_gb) * 1e9 / demand.bytes_per_voxel)
    by_time = GPU_VOXELS if machine.has_gpu else machine.cores * CPU_VOXELS_PER_CORE
    if by_memory < by_time:
        return by_memory, f"{SHARE:.0%} of {machine.memory_gb:.1f} GB {where}"
    if machine.has_gpu:
        return by_time, "about a second a step on a GPU"
    return by_time, f"about half a second a step on {machine.cores} CPU cores"


def patch_rule(shape: np.ndarray, spacing: Spacing, machine: Machine, demand: Demand) -> tuple[Triple, str]:
    """As much of the median scan as the budget holds twice; the longest side (in millimetres) gives way first."""
    budget, why = voxel_budget(machine, demand)
    patch = _whole(shape, spacing, demand)
    shrunk = False
    while math.prod(patch) * 2 > budget and (smaller := _smaller(patch, spacing, demand)):
        patch, shrunk = smaller, True
    scan = _times(np.round(shape))
    if shrunk:
        return patch, f"what fits twice into {why}, of a median scan of {scan}"
    if all(side >= round(float(whole)) for side, whole in zip(patch, shape, strict=True)):
        return patch, f"the whole median scan ({scan}) rounded up to what the network can halve"
    return (
        patch,
        f"nearly the whole median scan ({scan}): rounded up to what the network can halve it would be mostly padding",
    )


def batch_rule(patch: Triple, cases: int, machine: Machine, demand: Demand) -> tuple[int, str]:
    """As many windows as the budget holds, at least 2 and never more than there are cases to draw from."""
    budget, why = voxel_budget(machine, demand)
    fitting = budget // math.prod(patch)
    batch = max(2, min(fitting, 16, cases))
    return batch, f"{fitting} windows fit {why}; kept between 2 and 16 and below the number of cases"


def _whole(shape: np.ndarray, spacing: Spacing, demand: Demand) -> Triple:
    """The median scan, rounded up; a side that would be more than a tenth of padding is taken smaller instead."""
    patch = _accepted(_triple([_round_up(float(n)) for n in shape]), spacing, demand)
    for _ in range(3):
        padded = [side - n > max(8.0, n / 10) for side, n in zip(patch, shape, strict=True)]
        sides = [_below(side) if much else side for side, much in zip(patch, padded, strict=True)]
        smaller = _accepted(_triple(sides), spacing, demand)
        if math.prod(smaller) >= math.prod(patch):
            return patch
        patch = smaller
    return patch


def _smaller(patch: Triple, spacing: Spacing, demand: Demand) -> Triple | None:
    """The next smaller window that the network accepts; None where none is."""
    for axis in sorted(range(3), key=lambda one: patch[one] * spacing[one], reverse=True):
        if patch[axis] > 8:
            sides = [_below(side) if one == axis else side for one, side in enumerate(patch)]
            smaller = _accepted(_triple(sides), spacing, demand)
            if math.prod(smaller) < math.prod(patch):
                return smaller
    return None


def _accepted(patch: Triple, spacing: Spacing, demand: Demand) -> Triple:
    """The window grown to what the network can halve."""
    try:
        divisor = demand.divisor(patch, spacing)
    except ValueError:  # too small to be halved at all: 16 voxels along the finest axis always can be
        finest = int(np.argmin(spacing))
        patch = _triple([max(16, side) if axis == finest else side for axis, side in enumerate(patch)])
        divisor = demand.divisor(patch, spacing)
    return _triple([math.ceil(side / step) * step for side, step in zip(patch, divisor, strict=True)])


SIZES = (8, 16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024)
"""What a side may shrink to. Not 56, 112, 224: hardly more than the size before, and halved once less than the one after."""


def _below(side: int) -> int:
    return max((size for size in SIZES if size < side), default=side)


def _round_up(size: float) -> int:
    """Thin sides are halved less often."""
    whole = math.ceil(size)
    grain = 8 if whole > 16 else 4 if whole > 4 else 1
    return max(1, math.ceil(size / grain) * grain)


def _triple(numbers: list[int]) -> Triple:
    i, j, k = numbers
    return i, j, k


def _times(shape: Any) -> str:
    return "×".join(f"{n:g}" for n in shape)


SIDES = ("7771000", "24028007")
"""SNOMED CT: left, right."""


def _has_side(label: Label) -> bool:
    said = set(re.findall(r"[a-z]+", label.name.lower())) & {"left", "right"}
    return bool(said) or any(code.value in SIDES for code in label.meaning.modifiers)


def mirror_rule(labels: tuple[Label, ...], machine: Machine) -> tuple[tuple[bool, bool, bool], str]:
    """Left and right are each other's mirror image; front and back, head and feet are not."""
    sided = [label.name for label in labels if _has_side(label)]
    if sided:
        return (False, False, False), f"{sided[0]} has a side, which a mirror would exchange"
    unnamed = [label.name for label in labels if re.fullmatch(r"label_\d+", label.name)]
    if unnamed:
        return (
            False,
            False,
            False,
        ), f"nobody said what {unnamed[0]} is: it may have a side, which a mirror would exchange"
    if not machine.has_gpu:  # measured: hippocampus, five minutes on two cores, Dice 0.872 with and 0.879 without
        return (
            False,
            False,
            False,
        ), "no label has a side, but the few steps a CPU can afford go further without mirrors"
    return (True, False, False), "no label has a side: a body mirrored left to right is a body, upside down it is none"


def recipe_rule(labels: tuple[Label, ...], machine: Machine) -> tuple[Recipe, dict[str, str]]:
    """How it is trained: hilum's defaults, and what follows from the labels."""
    mirror, why_mirror = mirror_rule(labels, machine)
    recipe = Recipe(mirror=mirror)
    said = {f"recipe.{field.name}": DEFAULTS[field.name] for field in fields(recipe) if field.name != "mirror"}
    return recipe, said | {"recipe.mirror": why_mirror}


DEFAULTS = {
    "optimiser": "the rate is set per weight: little depends on the right learning rate, and few steps are needed",
    "learning_rate": "hilum's default for AdamW",
    "weight_decay": "AdamW's default",
    "momentum": "nnU-Net v2's, should sgd be chosen",
    "warmup_steps": "AdamW's first steps are of full size, before it knows how much each weight's gradient varies",
    "average": "hilum's default",
    "loss": "Dice for small labels, cross-entropy for a gradient everywhere: nnU-Net v2 has both",
    "batch_dice": "Dice of each window by itself: of few windows the sum is ruled by the largest label",
    "foreground": "half of the windows show a label, half whatever is there",
    "augmentation": "hilum's default",
    "epochs": "when neither minutes nor epochs are asked for",
    "steps_per_epoch": "by a rule that knows the number of cases in the fold: about one window per case",
}
