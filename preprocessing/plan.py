"""From what a dataset is (Fingerprint) to how it is treated (Plan): the rules, one function each, each with its reason."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from jaxtyping import Bool, Int16, Integer

from .codes import Code, Meaning, meaning_of
from .records import BadRecord, decode, encode
from .steps import Crop, Normalise, Orient, Pad, Resample, Scale, Step

Triple = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Label:
    """One thing to find: the number it has in a label map, its name, and its colour in every picture."""

    value: int
    name: str
    colour: tuple[int, int, int]
    category: Code | None = None
    """What kind of thing it is, as DICOM objects say it; null: what the name tells (preprocessing/codes.py)."""
    type: Code | None = None
    """The thing itself."""
    modifiers: tuple[Code, ...] = ()
    """Left, right, anterior ..."""
    parts: tuple[int, ...] = ()
    """A region: the values of the label files that make it up together. Empty: it is one value, its own."""

    @property
    def meaning(self) -> Meaning:
        """What a person wrote, else what the name tells."""
        told = meaning_of(self.name)
        if self.category is None and self.type is None:
            return told
        return Meaning(category=self.category or told.category, type=self.type or told.type, modifiers=self.modifiers)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained; says nothing about which."""

    optimiser: Literal["adamw", "sgd"] = "adamw"
    """`sgd` is Nesterov's."""
    learning_rate: float = 2e-3
    """At the start; it warms up, then falls to zero at the end."""
    weight_decay: float = 1e-2
    momentum: float = 0.99
    """Of `sgd` alone."""
    warmup_steps: int = 20
    """Steps over which the rate rises to what it is."""
    average: float = 0.0
    """Share of the weights' running mean that each step keeps; 0: the weights of the last step are taken."""
    loss: str = "dice_cross_entropy"
    """A name of networks/parts/losses.py."""
    batch_dice: bool = False
    """Count Dice over the windows of a step together, not window by window."""
    foreground: float = 0.5
    """Share of training windows that are centred on a label."""
    mirror: tuple[bool, bool, bool] = (False, False, False)
    """Which axes (Right, Anterior, Superior) are mirrored at random."""
    augmentation: Literal["default", "nnunet", "none"] = "default"
    epochs: int = 100
    """When neither minutes nor epochs are asked for."""
    steps_per_epoch: int | None = None
    """None: a rule, about one window per case."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How scans of a dataset are prepared, cut into windows and decided. Says nothing about networks."""

    name: str
    """The dataset's name; a trained package is registered under it."""
    channels: tuple[str, ...]
    """The scan's channels, in order."""
    labels: tuple[Label, ...]
    """What is told apart, background not counted; channel n + 1 of a network's output is labels[n]."""
    steps: tuple[Step, ...]
    """What is done to every scan, in order."""
    spacing_mm: tuple[float, float, float]
    """The size of a prepared voxel towards Right, Anterior, Superior."""
    patch: Triple
    """The window a network sees, in prepared voxels."""
    batch: int
    """Windows per training step."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why each number is what it is."""
    dataset: str = ""
    """sha256 over the dataset's files: which data this plan was made for."""
    ignored: int | None = None
    """The value in label files under which nobody knows the truth: no loss there."""
    mode: Literal["hilum", "nnunet"] = "hilum"
    """Whose rules made it."""
    network_options: dict[str, Any] = field(default_factory=dict)
    """Settings of the network that the rules ask for; `train --network_options` wins."""
    recipe: Recipe = field(default_factory=Recipe)
    """How a network is trained on it."""

    def __post_init__(self) -> None:
        values = [label.value for label in self.labels]
        names = [label.name for label in self.labels]
        if not self.channels or not self.labels:
            raise BadRecord(f"plan {self.name}: at least one channel and one label are needed. Name them.")
        if len(set(values)) < len(values) or len(set(names)) < len(names) or min(values) < 1:
            raise BadRecord(
                f"plan {self.name}: labels {dict(zip(names, values, strict=True))} were met; each needs a name and a "
                "value of its own, from 1 up. Correct the dataset's description."
            )
        if min(self.patch) < 1 or self.batch < 1 or min(self.spacing_mm) <= 0:
            raise BadRecord(
                f"plan {self.name}: patch {self.patch}, batch {self.batch}, spacing {self.spacing_mm} were met; "
                "all must be positive. Correct the plan."
            )

    @property
    def has_regions(self) -> bool:
        """Whether labels may overlap: then each has a channel and a sigmoid of its own, and there is no background
        channel; in a label map a later label is painted over an earlier one (nnU-Net's regions_class_order)."""
        return any(label.parts for label in self.labels)

    @property
    def classes(self) -> int:
        """Channels a network puts out: one per label, and one for the background unless labels are regions."""
        return len(self.labels) + (not self.has_regions)

    @property
    def lookup(self) -> np.ndarray:
        """From a number, 0 for nothing and n + 1 for labels[n], to the value in a label map that is written."""
        values = [0, *(label.value for label in self.labels)]
        return np.array(values, dtype=np.uint8 if max(values) < 256 else np.uint16)

    @property
    def parts(self) -> tuple[int, ...]:
        """The values of label files that mean something, in the order in which training numbers them, from 1."""
        return tuple(dict.fromkeys(part for label in self.labels for part in label.parts or (label.value,)))

    @property
    def membership(self) -> Bool[np.ndarray, "label part"]:
        """Which numbers of `numbered` belong to each label; column 0 is the background and belongs to none."""
        own = [label.parts or (label.value,) for label in self.labels]
        return np.array([[False, *(part in values for part in self.parts)] for values in own])

    def numbered(self, labels: Integer[np.ndarray, "..."]) -> Int16[np.ndarray, "..."]:
        """Values of a label file as training knows them: 0 background, n + 1 for parts[n], -1 where ignored."""
        size = max(int(labels.max(initial=0)), *self.parts, self.ignored or 0) + 1
        number = np.zeros(size, dtype=np.int16)
        number[list(self.parts)] = np.arange(1, len(self.parts) + 1)
        if self.ignored is not None:
            number[self.ignored] = -1
        return number[labels]

    def write(self, path: Path) -> None:
        """A YAML a person can read and edit."""
        record = encode(self)
        reasons = {"reasons": record.pop("reasons")}
        words = yaml.safe_dump(record, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
        words += yaml.safe_dump(reasons, sort_keys=False, allow_unicode=True, width=1000)  # a line for each reason
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(
            f"# How hilum treats {self.name!a}. Edit what you know better; `reasons` say why it is so.\n{words}"
        )
        partial.replace(path)

    @staticmethod
    def read(path: Path) -> "Plan":
        """The plan as it was written, every key checked."""
        try:
            return decode(Plan, yaml.safe_load(path.read_text()), where=path.name)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise BadRecord(
                f"{path.name} is no YAML ({error}); a plan is needed. Make one with `hilum plan`."
            ) from None

    @property
    def digest(self) -> str:
        """sha256 of everything that changes a prepared voxel: the key of the cache."""
        said = [self.channels, self.labels, self.ignored, self.steps]
        return hashlib.sha256(json.dumps(encode(said)).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class CaseFacts:
    """What one case adds to the fingerprint; every grid is told in RAS order."""

    shape: Triple
    spacing_mm: tuple[float, float, float]
    kept: float
    """Share of the voxels left after the zero border is cut away."""
    intensities: tuple[tuple[float, ...], ...]
    """Per channel: intensities under the labels, at evenly spaced ranks."""
    voxels: dict[str, int]
    """Per label: how many voxels carry it."""


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What a dataset is, seen once: enough to plan, small enough to read."""

    name: str
    channels: tuple[str, ...]
    labels: tuple[Label, ...]
    cases: dict[str, CaseFacts]
    dataset: str

    def median(self, get: Callable[[CaseFacts], Sequence[float]]) -> np.ndarray:
        """The median over cases of a triple."""
        return np.median([get(facts) for facts in self.cases.values()], axis=0)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What there is to train with. The pipeline measures it; the rules only read it."""

    memory_gb: float
    """Free memory of the GPU where there is one, of this process otherwise."""
    cores: int
    has_gpu: bool


def make_plan(fingerprint: Fingerprint, machine: Machine) -> Plan:
    """Every rule in turn; each gives its value and the reason that is written beside it."""
    spacing, why_spacing = spacing_rule(fingerprint)
    crop, why_crop = crop_rule(fingerprint)
    normalise, why_normalise = normalise_rule(fingerprint)
    shape = prepared_shape(fingerprint, spacing)
    patch, why_patch = patch_rule(shape, spacing, machine)
    batch, why_batch = batch_rule(patch, len(fingerprint.cases), machine)
    steps: list[Step] = [
        Orient(),
        *([Crop()] if crop else []),
        Resample(spacing_mm=spacing),
        normalise,
        Pad(shape=patch),
    ]
    return Plan(
        name=fingerprint.name,
        channels=fingerprint.channels,
        labels=fingerprint.labels,
        steps=tuple(steps),
        spacing_mm=spacing,
        patch=patch,
        batch=batch,
        reasons={
            "orient": "every scan is turned to Right-Anterior-Superior: a network must not depend on how a file is stored",
            "crop": why_crop,
            "spacing_mm": why_spacing,
            "normalise": why_normalise,
            "patch": why_patch,
            "batch": why_batch,
        },
        dataset=fingerprint.dataset,
    )


ANISOTROPIC = 3.0
"""nnU-Net v2 (ANISO_THRESHOLD): an axis this much coarser than the next is treated by its own rule."""


def spacing_rule(fingerprint: Fingerprint) -> tuple[tuple[float, float, float], str]:
    """The median spacing; a much coarser, much shorter axis takes the finer tenth, so that most scans keep their slices."""
    spacing = fingerprint.median(lambda facts: facts.spacing_mm)
    shape = fingerprint.median(lambda facts: facts.shape)
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


def crop_rule(fingerprint: Fingerprint) -> tuple[bool, str]:
    """Cut the zero border where the dataset has one."""
    kept = float(np.median([facts.kept for facts in fingerprint.cases.values()]))
    if kept < 0.9:
        return True, f"the median case keeps {kept:.0%} of its voxels once the zero border is cut"
    return False, f"no zero border worth cutting: the median case would keep {kept:.0%}"


STRIPPED = 0.75
"""nnU-Net v2: when the median case keeps less than this of its voxels, zero means 'nothing here', not 'dark'."""


def normalise_rule(fingerprint: Fingerprint) -> tuple[Normalise, str]:
    """By modality: CT has a unit and keeps it; every other channel is measured scan by scan."""
    stripped = float(np.median([facts.kept for facts in fingerprint.cases.values()])) < STRIPPED
    scales, why = [], []
    for number, channel in enumerate(fingerprint.channels):
        if channel.lower() == "ct":
            pooled = np.concatenate([facts.intensities[number] for facts in fingerprint.cases.values()])
            low, high = np.percentile(pooled, [0.5, 99.5])
            mean, deviation = float(pooled.mean()), max(float(pooled.std()), 1e-3)
            scales.append(Scale(by="dataset", low=float(low), high=float(high), mean=mean, deviation=deviation))
            why.append(f"{channel}: Hounsfield units mean the same in every scan; clipped to what labels hold")
        else:
            scales.append(Scale(by="scan", nonzero=stripped))
            where = "where it is not zero" if stripped else "over the whole scan"
            why.append(f"{channel}: no fixed unit; each scan's own mean and deviation, {where}")
    return Normalise(channels=tuple(scales)), "; ".join(why)


def prepared_shape(fingerprint: Fingerprint, spacing: tuple[float, float, float]) -> np.ndarray:
    """The median shape once every case has that spacing."""
    return fingerprint.median(lambda facts: np.array(facts.shape) * np.array(facts.spacing_mm) / np.array(spacing))


CPU_VOXELS_PER_CORE = 48_000
"""A step on a CPU should stay near half a second: about this many voxels per core through a U-Net of 16 first channels."""
GPU_VOXELS_PER_GB = 2 * 128**3 / 8
"""nnU-Net v2 plans two windows of 128³ for 8 GB."""
BYTES_PER_VOXEL = 1_600
"""Measured: peak memory of a training step of residual_unet (width 16, float32), two windows of 40×56×40: 1558 a voxel."""


def voxel_budget(machine: Machine) -> tuple[int, str]:
    """How many voxels one training step may hold on this machine."""
    if machine.has_gpu:
        return int(machine.memory_gb * GPU_VOXELS_PER_GB), f"{machine.memory_gb:.0f} GB of GPU memory"
    by_time = machine.cores * CPU_VOXELS_PER_CORE
    by_memory = int(machine.memory_gb * 1e9 * 0.5 / BYTES_PER_VOXEL)
    if by_memory < by_time:
        return by_memory, f"half of {machine.memory_gb:.1f} GB free memory"
    return by_time, f"about half a second a step on {machine.cores} CPU cores"


def patch_rule(shape: np.ndarray, spacing: tuple[float, float, float], machine: Machine) -> tuple[Triple, str]:
    """As much of the median scan as the budget holds twice; the longest side (in millimetres) gives way first."""
    budget, why = voxel_budget(machine)
    patch = np.array([_round_up(float(n)) for n in shape])
    whole = patch.copy()
    while np.prod(patch) * 2 > budget and patch.max() > 8:
        longest = int(np.argmax(np.where(patch > 8, patch * np.array(spacing), 0)))
        side = int(patch[longest])
        patch[longest] = _round_up(side - _grain(side - 1))
    i, j, k = (int(n) for n in patch)
    if (patch == whole).all():
        return (i, j, k), f"the whole median scan ({_times(np.round(shape))}) rounded up to what networks can halve"
    return (i, j, k), f"what fits twice into {why}, of a median scan of {_times(np.round(shape))}"


def batch_rule(patch: Triple, cases: int, machine: Machine) -> tuple[int, str]:
    """As many windows as the budget holds, at least 2 and never more than there are cases to draw from."""
    budget, why = voxel_budget(machine)
    fitting = int(budget // np.prod(patch))
    batch = max(2, min(fitting, 16, cases))
    return batch, f"{fitting} windows fit {why}; kept between 2 and 16 and below the number of cases"


def with_patch(plan: Plan, patch: Triple) -> Plan:
    """The same plan with another window, its padding following."""
    steps = tuple(replace(step, shape=patch) if isinstance(step, Pad) else step for step in plan.steps)
    return replace(plan, patch=patch, steps=steps)


def _grain(size: int) -> int:
    """What a window's side is a multiple of: thin sides are halved less often."""
    return 8 if size > 16 else 4 if size > 4 else 1


def _round_up(size: float) -> int:
    grain = _grain(int(np.ceil(size)))
    return max(1, int(np.ceil(size / grain) * grain))


def _times(shape: Any) -> str:
    return "×".join(f"{n:g}" for n in shape)
