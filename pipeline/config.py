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
from .shards import Shard


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
class Tune:
    """What a package's speed is measured on, and whether it gets a coarse model."""

    cases: int = 8
    """Held-out cases of each fold that are measured, in every way; means over so few order ways well and say less of Dice."""
    coarse: float | None = None
    """Minutes to train a coarse model for, which says where to look; added only when held-out cases prove it harmless."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU where there is one."""
    tracking_uri: str | None = None
    """Where MLflow keeps the run of a coarse model; by default hilum's home."""
    allow: tuple[str, ...] = ()
    """Repairs of scans that are allowed, separated by commas: tilt, uneven, gaps, few, nan, sform, qform."""
    match: str = ""
    """The channel onto whose grid the others are resampled where they do not share one."""

    def __post_init__(self) -> None:
        for name in ("cases", "coarse"):
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
    overlap: float | None = None
    """Share of a window that its neighbour covers, per axis; by default what `hilum tune` found for the package, else 0.5."""
    flips: bool = False
    """Average over mirrorings of the axes that training mirrored: up to eight times the time, a little more Dice."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU where there is one."""
    precision: str = "float32"
    """float32, or bfloat16: two to three times as fast on a processor that has it, the labels nearly the same; the report
    says it."""
    engine: str = "torch"
    """What runs the networks: torch, onnxruntime or openvino; the last two run what `hilum export` checked."""
    body: bool = False
    """Windows that hold nothing but air are called background and not computed; the report says how many."""
    whole: bool = False
    """Look everywhere, also where the coarse model that a package may hold sees nothing."""
    max_memory: str = ""
    """The most memory the command may take, as 2GB or 500MB; a case that needs more is refused. By default what is free."""
    shard: str = ""
    """i/n: of all cases only the i-th of n parts, for array jobs on many machines into one --out, whose file system must have
    locks that all of them see."""
    ray: str = ""
    """The address of a Ray cluster whose nodes share the cases (needs hilum[ray]); all must see --out."""
    progress: Literal["bar", "lines"] = "bar"
    """bar: for people; lines: one object of JSON per event on stderr, for machines."""
    tracking_uri: str | None = None
    """Where a package named models:/NAME@ALIAS is fetched from; by default hilum's home."""
    allow: tuple[str, ...] = ()
    """Repairs of scans that are allowed, separated by commas: tilt, uneven, gaps, few, nan, sform, qform."""
    match: str = ""
    """The channel onto whose grid the others are resampled where they do not share one."""

    def __post_init__(self) -> None:
        _ = self.reading
        if Shard.parse(self.shard) and self.ray:
            raise ValueError("both shard and ray were given; each shares the cases among machines by itself. Give one.")

    @property
    def reading(self) -> Reading:
        """How scans are read."""
        return reading_of(self.allow, self.match)


@dataclass(frozen=True, kw_only=True)
class SlideFeatures:
    """How slides are cut into tiles, and what makes features of them."""

    encoder: str = "hilum_texture"
    """hilum_texture (nothing to download; only for trying out), timm:NAME where its weights are on this machine already,
    timm:NAME@WEIGHTS with a file of them, or timm:FOLDER with a model's config.json and weights."""
    tile_um: float = 112.0
    """Side of a tile in micrometres: what 224 pixels at 0.5 µm are."""
    tile_px: int = 224
    """Side of the picture of a tile that the encoder is shown."""
    step_um: float | None = None
    """From one tile to the next; by default tile_um, so that none overlap."""
    least_tissue: float = 0.5
    """Share of a tile that must be tissue for it to count."""
    microns_per_pixel: float | None = None
    """Of level 0 of every slide, instead of what its file says, if anything."""
    resolutions: Path | None = None
    """The same slide by slide: a CSV with the columns slide and microns_per_pixel."""
    workers: int | None = None
    """Threads that read tiles while the encoder runs; by default one per core. The files do not depend on it."""
    batch: int = 64
    """Tiles that the encoder is shown at once."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU where there is one."""

    def __post_init__(self) -> None:
        for name in ("tile_um", "tile_px", "step_um", "microns_per_pixel", "workers", "batch"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; it must be above 0.")
        if not 0 <= self.least_tissue <= 1:
            raise ValueError(f"least_tissue is {self.least_tissue}; it is a share, from 0 to 1.")


@dataclass(frozen=True, kw_only=True)
class SlideTraining:
    """A model for slides: nested cross-validation by patient, then the members of the package."""

    network: str = "acmil"
    """A file of networks/ that takes bags: abmil, clam, acmil, dsmil, transmil."""
    network_options: dict[str, Any] = field(default_factory=dict)
    """Settings of that network, e.g. {branches: 2}; its own file says which there are."""
    folds: int = 5
    """Outer folds: each is predicted once, by networks that its patients had no part in, and that is what is reported."""
    inner_folds: int = 3
    """Trainings inside each outer fold, and members of the package: each holds a part of the patients out to choose its
    checkpoint by."""
    epochs: int | None = None
    """By default so many that every training sees about 4,000 slides, between 20 and 200."""
    learning_rate: float = 5e-4
    """At the start; it falls to zero along a cosine."""
    weight_decay: float = 1e-5
    """Of AdamW."""
    batch: int = 4
    """Slides per step, of any sizes."""
    entropy_weight: float = 0.0
    """Keeps attention wide (AEM): 0.001 to 0.2 in its paper, tuned; falls to zero over the training. 0: off."""
    entropy_top: int = 0
    """AEM of this many of the strongest tiles alone; 0: of all."""
    slide_column: str = "slide"
    """The column of LABELS.csv with the slides' names."""
    patient_column: str = "patient"
    """The column that says whose each slide is; the slide column where every slide is of another patient."""
    label_column: str = "label"
    """The column with the class."""
    seed: int = 0
    """The same seed gives, on a CPU, the same weights. The folds follow from slides and patients alone."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU where there is one."""
    resume: bool = False
    """Go on with the unfinished training of this package: what was finished is not done again."""
    tracking_uri: str | None = None
    """Where MLflow keeps runs: a file (sqlite:///…), a server (http://…) or a database; by default hilum's home."""
    experiment: str | None = None
    """The MLflow experiment; by default the name of the package."""

    def __post_init__(self) -> None:
        for name in ("folds", "inner_folds"):
            if getattr(self, name) < 2:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be 2 or more: one part is held out, others teach."
                )
        for name in ("epochs", "learning_rate", "batch"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; it must be above 0.")
        for name in ("weight_decay", "entropy_weight", "entropy_top"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more.")


@dataclass(frozen=True, kw_only=True)
class SlideClassify:
    """Slides through a package."""

    features: Path | None = None
    """Where `hilum slides features` left files; slides whose file there is of this slide and by the package's recipe are not
    encoded again."""
    encoder: str = ""
    """The package's own encoder, with its weights: timm:NAME@WEIGHTS. By default the name the package has for it; another
    one is refused."""
    top_tiles: int = 12
    """Tiles that are shown by themselves because they add most; half as many of those that speak most against it."""
    microns_per_pixel: float | None = None
    """Of level 0 of every slide, instead of what its file says, if anything."""
    resolutions: Path | None = None
    """The same slide by slide: a CSV with the columns slide and microns_per_pixel."""
    workers: int | None = None
    """Threads that read tiles while the encoder runs; by default one per core."""
    batch: int = 64
    """Tiles that the encoder is shown at once."""
    seed: int = 0
    """Of the random removals that every heatmap is tested against."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU where there is one."""

    def __post_init__(self) -> None:
        for name in ("top_tiles", "microns_per_pixel", "workers", "batch"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; it must be above 0.")


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
