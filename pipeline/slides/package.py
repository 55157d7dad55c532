"""A model for slides as a folder a person can read: package.json, weights, what was measured, and card.md. Never a pickle."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from preprocessing.records import decode

from .. import seal
from ..calibration import HOTTEST
from ..errors import DamagedPackage
from .feature_file import FeatureRecipe
from .scores import SlideScores

if TYPE_CHECKING:
    from torch import nn

FORMAT = 1
"""Raised when a reader of yesterday could misread a package of today."""

SPLITS, PREDICTIONS, CARD = "splits.csv", "predictions.csv", "card.md"
"""Who was in which fold; what was said of every slide by networks that had not seen its patient; what a person should know."""

KINDS = ("slides", "tiles")


@dataclass(frozen=True, kw_only=True)
class Member:
    """One of the networks whose mean is the answer."""

    weights: str
    """The file's name inside the package."""
    slides_trained: int
    patients_trained: int
    slides_held_out: int
    """They chose its checkpoint and had a part in the temperature; nothing else was done with them."""
    patients_held_out: int
    epochs: int
    """How many it was trained for."""
    chosen_epoch: int
    """Which of them it is, counted from 1: the one with the lowest loss on what was held out."""
    loss_trained: float
    """Mean over the slides it learnt from, in that epoch."""
    loss_held_out: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class SlideRecord:
    """Everything package.json says; `files` and `id` seal it."""

    format: int
    kind: Literal["slides", "tiles"]
    """What gets a class."""
    hilum: str
    """The version that wrote it."""
    name: str
    created: str
    network: str
    network_config: dict[str, Any]
    classes: tuple[str, ...]
    recipe: FeatureRecipe
    """What features it takes; of others it would say anything."""
    members: tuple[Member, ...]
    temperature: float
    """What the mean of the members' logits is divided by, fitted on what each of them had not seen."""
    scores: SlideScores
    """The nested estimate: of networks made by this very procedure, on slides whose patients had no part in making them."""
    slides: dict[str, int]
    """By class."""
    patients: dict[str, int]
    folds: int
    """Outer: each was predicted once, and touched for nothing else."""
    inner_folds: int
    temperatures: tuple[float, ...]
    """Of the outer folds: where they differ much, so will the next one."""
    dataset: str
    """sha256 of every slide's features, patient and label."""
    training: dict[str, Any]
    """The settings that decided the weights."""
    versions: dict[str, str]
    """Of what the weights were trained with."""
    run_id: str = ""
    """The MLflow run that made it."""
    files: dict[str, str] = field(default_factory=dict)
    """sha256 of every other file of the package."""
    id: str = ""
    """sha256 of all of the above: two packages with one id say the same of every slide."""


@dataclass(frozen=True, kw_only=True)
class SlidePackage:
    """A package for slides on disk, its seal checked."""

    folder: Path
    record: SlideRecord

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def name(self) -> str:
        return self.record.name

    @staticmethod
    def load(folder: Path) -> "SlidePackage":
        """The package in that folder; refused when a byte of it changed."""
        record = seal.read(folder, SlideRecord, kinds=KINDS, formats=(FORMAT,))
        for member in record.members:
            if member.weights not in record.files:
                raise DamagedPackage(
                    f"{folder / seal.FILE_NAME} names the weights {member.weights}, which it does not seal. "
                    f"{seal.FETCH_AGAIN}"
                )
        return SlidePackage(folder=folder, record=record)

    def networks(self) -> list["nn.Module"]:
        """The members, ready to evaluate."""
        record = self.record
        return [
            seal.read_weights(
                build_network(record.network, record.network_config, record.recipe.dimensions, len(record.classes)),
                self.folder / member.weights,
            )
            for member in record.members
        ]


def build_network(name: str, config: dict[str, Any], features: int, classes: int) -> "nn.Module":
    """An untrained network for slides, by name and settings."""
    import networks

    module = networks.load_for_slides(name)
    return module.build(decode(module.Config, config, where=f"network {name}"), features=features, classes=classes)


def save(folder: Path, record: SlideRecord, fill: Callable[[Path], None]) -> SlidePackage:
    """A package in that folder, whole or not at all. `fill` writes the members' weights and the tables."""

    def filled(building: Path, as_read: SlideRecord) -> None:
        fill(building)
        (building / CARD).write_text(card(as_read))

    with seal.alone(folder):
        seal.write(folder, record, filled)
    return SlidePackage.load(folder)


def library_versions() -> dict[str, str]:
    """Of the libraries whose numbers end up in an answer."""
    return seal.versions_of(("torch", "numpy", "scipy", "h5py", "timm", "openslide-python", "tifffile"))


def card(record: SlideRecord) -> str:
    """What a person should know before trusting the package; everything in it can be read from package.json."""
    lines = [
        f"# {record.name}",
        "",
        f"Tells {', '.join(record.classes[:-1])} and {record.classes[-1]} apart, {record.kind[:-1]} by {record.kind[:-1]}.",
        "**Not a medical device. Not for diagnosis.** Look at every heatmap before you rely on a word.",
        "",
        "## How good it is",
        "",
        *_said_of_scores(record),
        "",
        "## How sure it is",
        "",
        *_said_of_temperature(record),
        "",
        "## What it takes",
        "",
        *_said_of_recipe(record.recipe),
        "",
        "## What it was made of",
        "",
        *_said_of_members(record),
        "",
    ]
    return "\n".join(lines)


def _said_of_scores(record: SlideRecord) -> list[str]:
    scores = record.scores
    lines = ["| score | estimate (95 % interval) |", "|---|---|"]
    lines += [f"| {name} | {estimate.said} |" for name, estimate in scores.macros.items()]
    lines += ["", f"| class | {record.kind} | patients | AUROC against the others | recall | precision | F1 |"]
    lines += ["|---|---|---|---|---|---|---|"]
    lines += [
        f"| {name} | {one.slides} | {one.patients} | {one.auroc.said} | {one.recall.said} | {one.precision.said} | {one.f1.said} |"
        for name, one in scores.per_class.items()
    ]
    lines += [
        "",
        f"By nested cross-validation over {scores.patients} patients: each of {record.folds} outer folds was predicted once, by "
        f"{record.inner_folds} networks that the other patients trained and chose; no patient was ever on both sides. The "
        "networks in this package were made the same way from all patients, so nobody is left to measure these very ones on. "
        "*macro*: the plain mean over classes, a rare class weighs as much as a common one. Decision: the class with the "
        "greatest probability (argmax). AUROC: pairs inside outer folds. Intervals: percentile bootstrap over patients, 2000 "
        f"resamples.{_said_of_certainty(scores)} Slides of other scanners, stains or hospitals may do worse.",
    ]
    return lines


def _said_of_certainty(scores: SlideScores) -> str:
    """An interval from 1 to 1 is what a bootstrap says of too few patients, not of a perfect model."""
    if any(one.interval and one.interval[0] == one.interval[1] for one in scores.macros.values()):
        return " An interval without width says that no resample of so few patients held a mistake, not that none will be made."
    return ""


def _said_of_temperature(record: SlideRecord) -> list[str]:
    scores = record.scores
    others = ", ".join(f"{each:.2f}" for each in record.temperatures)
    return [
        f"Logits are divided by {record.temperature:.3f}, fitted on what each member had not seen ({others} in the outer folds)."
        f"{_said_of_the_hottest(record)} On the outer folds the calibration error (ECE) went from {scores.ece_before:.3f} to "
        f"{scores.ece_after:.3f}, the negative log-likelihood of the truth from {scores.nll_before:.3f} to "
        f"{scores.nll_after:.3f}; of {scores.slides} {record.kind} an ECE is a rough figure. A temperature changes no decision. "
        "In training every class weighed the same, so probabilities lean towards the rare ones.",
    ]


def _said_of_the_hottest(record: SlideRecord) -> str:
    """The end of the scale is no fit."""
    if record.temperature < HOTTEST:
        return ""
    return f" {HOTTEST:g} is the highest there is: on what they had not seen, the members knew no more than chance."


def _said_of_recipe(recipe: FeatureRecipe) -> list[str]:
    return [
        f"- tiles of {recipe.tile_um:g} um, every {recipe.step_um:g} um, shown to the encoder as {recipe.tile_px} pixels "
        f"({recipe.tile_um / recipe.tile_px:.3g} um per pixel); at least {recipe.least_tissue:.0%} tissue",
        f"- encoder {recipe.encoder}, {recipe.dimensions} numbers per tile, sha256 {recipe.encoder_sha256[:16]}",
    ]


def _said_of_members(record: SlideRecord) -> list[str]:
    lines = [f"- network: {record.network}, {len(record.members)} member(s), their logits averaged"]
    lines += [
        f"- {member.weights}: learnt from {member.slides_trained} {record.kind} of {member.patients_trained} patients; epoch "
        f"{member.chosen_epoch} of {member.epochs}, chosen by the loss on {member.slides_held_out} of "
        f"{member.patients_held_out} others; seed {member.seed}"
        for member in record.members
    ]
    versions = ", ".join(f"{name} {number}" for name, number in record.versions.items())
    return [
        *lines,
        f"- made by hilum {record.hilum}, {versions}, on {record.created}",
        f"- trained on the dataset with sha256 {record.dataset}",
        f"- {SPLITS} and {PREDICTIONS} name {record.kind} and patients as the table of labels did: mind to whom you give them",
    ]
