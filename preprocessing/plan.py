"""What a dataset is (Fingerprint) and how it is treated (Plan), as a YAML that a person can read and edit."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from jaxtyping import Bool, Int16, Integer

from .codes import Code, Meaning, meaning_of
from .records import BadRecord, decode, encode
from .steps import Pad, Step

Triple = tuple[int, int, int]


LATE = {"orient", "resample"}
"""Steps that may not come after the first resampling."""


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
    """Share of training windows that are centred on a label. nnU-Net takes a third; in the few steps a CPU can afford,
    more is better."""
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
    memory_gb: float | None = None
    """What a training step is predicted to take at its peak, the process itself included; null: nobody predicted it."""
    network_options: dict[str, Any] = field(default_factory=dict)
    """Settings of the network that the rules ask for; `train --network_options` wins."""
    recipe: Recipe = field(default_factory=Recipe)
    """How a network is trained on it."""
    bell: Literal["hilum", "nnunet"] = "hilum"
    """Whose rule says where windows lie and how much each is trusted where they overlap."""
    averages: Literal["probabilities", "logits"] = "probabilities"
    """What is averaged over folds and brought back to the scan's grid; nnU-Net v2 has logits, and so do its packages."""

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
        kinds = [step.kind for step in self.steps]
        late = [kind for kind in kinds[kinds.index("resample") + 1 :] if kind in LATE] if "resample" in kinds else []
        if late:
            raise BadRecord(
                f"plan {self.name}: {' and '.join(late)} were met after resample; only steps that grow, cut or scale the grid "
                "may follow it, for labels leave it row by row. Put them first, and resample once."
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
    cropped: Triple
    """The shape once the border in which every channel is zero is cut away."""
    intensities: tuple[tuple[float, ...], ...]
    """Per channel: intensities under the labels, at evenly spaced ranks; each case has as many, so each weighs the same."""
    voxels: dict[str, int]
    """Per label: how many voxels carry it."""
    annotated: tuple[str, ...] | None = None
    """Names of the labels that were looked for; None: all of them."""
    patient: str = ""
    """The same word in every case of one patient: a number within the dataset, never what a file says. Empty: a patient of its own."""

    @property
    def kept(self) -> float:
        """Share of the voxels left after the zero border is cut away."""
        return math.prod(self.cropped) / math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What a dataset is, seen once: enough to plan, small enough to read."""

    name: str
    channels: tuple[str, ...]
    labels: tuple[Label, ...]
    cases: dict[str, CaseFacts]
    dataset: str
    ignored: int | None = None
    """The value in label files under which nobody knows the truth."""

    def median(self, get: Callable[[CaseFacts], Sequence[float]]) -> np.ndarray:
        """The median over cases of a triple."""
        return np.median([get(facts) for facts in self.cases.values()], axis=0)


def with_patch(plan: Plan, patch: Triple) -> Plan:
    """The same plan with another window, its padding following."""
    steps = tuple(replace(step, shape=patch) if isinstance(step, Pad) else step for step in plan.steps)
    return replace(plan, patch=patch, steps=steps)
