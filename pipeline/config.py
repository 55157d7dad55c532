"""What a person may decide, verb by verb: frozen dataclasses, each field with its default and its sentence.

The command line and the files in configs/ are decoded into these by jsonargparse, and not one key more. A field exists
when it takes a decision off someone; what follows from the data is a rule in preprocessing/rules.py instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from preprocessing.reading import Reading
from preprocessing.records import nearest

from .errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Train:
    """A training: one fold of one network."""

    network: str = "residual_unet"
    """A file of networks/."""
    network_options: dict[str, Any] = field(default_factory=dict)
    """Settings of that network, e.g. {width: 32}; its own file says which there are."""
    plan: Path | None = None
    """A plan to follow instead of making one (`hilum plan` writes them, you may edit them)."""
    fold: int | Literal["all"] = 0
    """Which part of the cases is held out to measure on; `all`: none, every case is trained on."""
    folds: int = 5
    """How many parts there are."""
    minutes: float | None = None
    """The command takes so long, preparation and the last scoring included; the learning rate falls to zero just then."""
    epochs: int | None = None
    """Train for so many epochs instead. Without either, as many as the plan says."""
    steps_per_epoch: int | None = None
    """Steps between two validations; by default one window per case, at least 20 and at most 40 steps on a CPU, 250 on a GPU."""
    learning_rate: float | None = None
    """At the start; it warms up over the first steps and falls to zero at the end. By default the plan's."""
    weight_decay: float | None = None
    """By default the plan's."""
    loss: str | None = None
    """A name of networks/parts/losses.py; by default the plan's."""
    devices: int = 1
    """GPUs (or, on a CPU, processes) of this machine that train together; each takes a plan's batch in every step."""
    nodes: int = 1
    """Machines that train together; under SLURM as many as the job has, each with --devices tasks."""
    seed: int = 0
    """The same seed gives the same windows in the same order, and on a CPU the same weights."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU where there is one."""
    workers: int | None = None
    """Processes that cut and augment windows; by default none on a CPU, else one per core."""
    keep_seconds: float = 60.0
    """The state of the training goes to disk so often: a killed one loses no more than this."""
    resume: bool = False
    """Go on with the unfinished training of this package and fold."""
    cache: Path | None = None
    """Where prepared cases are kept; by default a folder in hilum's home."""
    tracking_uri: str | None = None
    """Where MLflow keeps runs: a file (sqlite:///…), a server (http://…) or a database; by default hilum's home. One with
    a password belongs into MLFLOW_TRACKING_URI: whoever lists processes reads a command line."""
    experiment: str | None = None
    """The MLflow experiment; by default the dataset's name."""
    model: str | None = None
    """The name the package is registered under; by default the dataset's name."""
    allow: tuple[str, ...] = ()
    """Repairs of scans that are allowed, separated by commas: tilt, uneven, gaps, few, nan, sform, qform."""
    match: str = ""
    """The channel onto whose grid the others are resampled where they do not share one."""

    def __post_init__(self) -> None:
        if self.minutes is not None and self.epochs is not None:
            raise ValueError("both minutes and epochs were given; one of them ends a training. Give one.")
        for name in (
            "minutes",
            "epochs",
            "steps_per_epoch",
            "learning_rate",
            "folds",
            "devices",
            "nodes",
            "keep_seconds",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; it must be above 0.")
        _ = self.reading

    @property
    def reading(self) -> Reading:
        """How scans are read."""
        return reading_of(self.allow, self.match)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A batch of scans through a package."""

    outputs: tuple[str, ...] = ("labels", "overlay", "measurements", "page")
    """What is written for each case: files of pipeline/outputs/, separated by commas."""
    output_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings of single outputs, e.g. {overlay: {window: [40, 400]}}."""
    overlap: float = 0.5
    """Share of a window that its neighbour covers, per axis."""
    flips: bool = False
    """Average over mirrorings of the axes that training mirrored: up to eight times the time, a little more Dice."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU where there is one."""
    precision: str = "float32"
    """float32, or bfloat16: two to three times as fast on a processor that has it, the labels nearly the same; the report
    says it."""
    tracking_uri: str | None = None
    """Where a package named models:/NAME@ALIAS is fetched from; by default hilum's home."""
    allow: tuple[str, ...] = ()
    """Repairs of scans that are allowed, separated by commas: tilt, uneven, gaps, few, nan, sform, qform."""
    match: str = ""
    """The channel onto whose grid the others are resampled where they do not share one."""

    def __post_init__(self) -> None:
        _ = self.reading

    @property
    def reading(self) -> Reading:
        """How scans are read."""
        return reading_of(self.allow, self.match)


def reading_of(allow: Sequence[str], match: str) -> Reading:
    """The settings of reading, the same whatever the order of the words."""
    return Reading(allow=tuple(sorted({word.strip() for word in allow} - {""})), match=match)


def refuse_unknown_match(reading: Reading, channels: Sequence[str]) -> None:
    """A channel to match that is none is told before anything is read."""
    if reading.match and not channels:
        raise UsageError(f"match names {reading.match!r}, and no channels are named; name them all with --channels.")
    if reading.match and reading.match not in channels:
        raise UsageError(
            f"match names {reading.match!r}, which is not among the channels; one of {', '.join(channels)} is needed"
            f"{nearest(reading.match, channels) or '.'}"
        )
