"""A trained model as a folder a person can read: package.json, weights-fold0.safetensors, card.md. Never a pickle."""

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preprocessing.plan import Plan
from preprocessing.records import BadRecord, decode

from . import seal
from .calibration import Calibration
from .curve import BEARABLE, Curve
from .errors import DamagedPackage, PackageError
from .postprocessing import Chosen, HeldOut, Rule, choose
from .report import hilum_version, recover

if TYPE_CHECKING:
    from torch import nn

FORMAT = 3
"""Raised when a reader of yesterday could misread a package of today. 2: temperatures and post-processing. 3: a curve of
Dice against seconds, a coarse model, where it was imported from."""
READABLE = (2, 3)
"""Formats that mean today what they meant then: what a record does not say has its default."""

ALL = "all"
"""The fold that was trained on every case."""


@dataclass(frozen=True, kw_only=True)
class Fold:
    """One training: its weights and how well they did on cases they had not seen."""

    weights: str
    """The file's name inside the package."""
    dice: dict[str, float]
    """Mean Dice per label over the fold's held-out cases, on each scan's own grid."""
    cases_trained: int
    cases_held_out: int
    epochs: int
    minutes: float
    seed: int
    steps: int = 0
    """How often the weights were changed."""
    run_id: str = ""
    """The MLflow run that made it."""
    temperature: float | None = None
    """What its logits are divided by, fitted on its held-out cases; None: nothing was held out (see `temperatures`)."""
    calibration: Calibration | None = None
    """What that did to its probabilities."""
    held_out: HeldOut = field(default_factory=HeldOut)
    """Dice of every held-out case, and what each rule of post-processing would have made of it."""

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise BadRecord(f"a fold's temperature is {self.temperature}; a number above 0 is needed. Fit it again.")


COARSE = "weights-coarse.safetensors"


@dataclass(frozen=True, kw_only=True)
class Coarse:
    """A second model that says where to look: at larger voxels it sees a whole scan in a moment."""

    weights: str = COARSE
    """The file's name inside the package."""
    network: str
    network_config: dict[str, Any]
    plan: Plan
    """Its own: the same channels and labels, larger voxels."""
    margin_mm: float
    """How far around what it finds the networks look."""
    cases: int
    """Scans it was not trained on; in none of them a voxel of a label lay outside."""
    share: float
    """Of their voxels, the mean share that was looked at."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """Everything package.json says; `files` and `id` seal it."""

    format: int
    hilum: str
    """The version that wrote it."""
    name: str
    created: str
    network: str
    network_config: dict[str, Any]
    plan: Plan
    folds: dict[str, Fold]
    """By number, and `all` for the one that was trained on every case."""
    versions: dict[str, str]
    """Of what the weights were trained with."""
    postprocessing: tuple[Chosen, ...] = ()
    """What is done to every label map, in order: chosen anew from all held-out cases whenever a fold is added."""
    curve: Curve | None = None
    """What speed costs, as `hilum tune` measured it; None: nobody did."""
    coarse: Coarse | None = None
    """What says where to look; None: everywhere."""
    origin: str = ""
    """Who trained it where hilum did not, and what that means, in sentences."""
    files: dict[str, str] = field(default_factory=dict)
    """sha256 of every other file of the package."""
    id: str = ""
    """sha256 of all of the above: two packages with one id say the same of every scan."""


@dataclass(frozen=True, kw_only=True)
class ModelPackage:
    """A package on disk, its seal checked."""

    folder: Path
    record: Package

    @property
    def plan(self) -> Plan:
        return self.record.plan

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def temperatures(self) -> dict[str, float]:
        """Of every fold, in the order of `networks`."""
        return temperatures(self.record.folds)

    @property
    def is_calibrated(self) -> bool:
        """Whether any fold's temperature was fitted; else its probabilities are the network's own."""
        return any(fold.temperature is not None for fold in self.record.folds.values())

    @property
    def rules(self) -> tuple[Rule, ...]:
        """What is done to every label map, in order."""
        return tuple(chosen.rule for chosen in self.record.postprocessing)

    @staticmethod
    def load(folder: Path) -> "ModelPackage":
        """The package in that folder; refused when a byte of it changed."""
        record = seal.read(folder, Package, kinds=("scans",), formats=READABLE)
        path = folder / seal.FILE_NAME
        _refuse_unknown_labels(path, record)
        for weights in _weights(record):
            if weights not in record.files:
                raise DamagedPackage(f"{path} names the weights {weights}, which it does not seal. {seal.FETCH_AGAIN}")
        return ModelPackage(folder=folder, record=record)

    def networks(self) -> list["nn.Module"]:
        """The trained network of every fold, ready to evaluate."""
        record = self.record
        return [
            seal.read_weights(
                build_network(record.network, record.network_config, self.plan), self.folder / fold.weights
            )
            for fold in record.folds.values()
        ]

    def coarse_network(self) -> "nn.Module":
        """The network that says where to look, of a package that has one."""
        coarse = self.record.coarse
        assert coarse
        network = build_network(coarse.network, coarse.network_config, coarse.plan)
        return seal.read_weights(network, self.folder / coarse.weights)


def _weights(record: Package) -> list[str]:
    """The files of weights it names."""
    coarse = [record.coarse.weights] if record.coarse else []
    return [*(fold.weights for fold in record.folds.values()), *coarse]


def build_network(name: str, config: dict[str, Any], plan: Plan) -> "nn.Module":
    """An untrained network for a plan, by name and settings."""
    import networks

    module = networks.load(name)
    settings = decode(module.Config, config, where=f"network {name}")
    return module.build(settings, channels=len(plan.channels), classes=plan.classes)


def weights_file(fold: int | str) -> str:
    """What a fold's weights are called: weights-fold0.safetensors, and weights-all.safetensors of all cases."""
    return f"weights-{fold if fold == ALL else f'fold{fold}'}.safetensors"


def temperatures(folds: Mapping[str, Fold]) -> dict[str, float]:
    """Of every fold its own; of one that held nothing out the (geometric) mean of the others', else 1."""
    known = [fold.temperature for fold in folds.values() if fold.temperature is not None]
    mean = math.exp(sum(map(math.log, known)) / len(known)) if known else 1.0
    return {name: mean if fold.temperature is None else fold.temperature for name, fold in folds.items()}


def save(
    folder: Path, *, network: "nn.Module", name: str, network_name: str, network_config: dict[str, Any], plan: Plan,
    fold_number: int | str, fold: Fold,
) -> ModelPackage:  # fmt: skip
    """Write a package, or add a fold to one made by the same plan and network. The old one stays until the new is whole.

    Post-processing is chosen anew, from the held-out cases of every fold that is there.
    """
    with seal.alone(folder):
        return _saved(folder, network, name, network_name, network_config, plan, str(fold_number), fold)


def _saved(
    folder: Path, network: "nn.Module", name: str, network_name: str, network_config: dict[str, Any], plan: Plan,
    number: str, fold: Fold,
) -> ModelPackage:  # fmt: skip
    recover(folder)
    before = ModelPackage.load(folder).record if (folder / seal.FILE_NAME).exists() else None
    if before and (before.network, before.network_config, before.plan) != (network_name, network_config, plan):
        raise PackageError(
            f"{folder} was made meanwhile by another plan or network; all folds of a package share both. "
            "Move it away and pack this fold with --resume, or train the others by the plan of the first (--plan)."
        )
    folds = (before.folds if before else {}) | {number: fold}
    folds = dict(sorted(folds.items(), key=lambda item: (not item[0].isdecimal(), len(item[0]), item[0])))
    record = Package(
        format=FORMAT,
        hilum=hilum_version(),
        name=name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        network=network_name,
        network_config=network_config,
        plan=plan,
        folds=folds,
        versions=library_versions(),
        postprocessing=choose(_each_case_once(folds), plan),
        curve=before.curve if before else None,
        coarse=before.coarse if before else None,
        origin=before.origin if before else "",
    )
    return _written(folder, before, record, {fold.weights: network})


def amend(
    package: ModelPackage, change: Callable[[Package], Package], networks: Mapping[str, "nn.Module"] | None = None
) -> ModelPackage:
    """The package saying more of itself, with weights added by their files' names; those that it has stay as they are.

    It gets another id, for what it says of a scan may be another thing now.
    """
    with seal.alone(package.folder):
        recover(package.folder)
        before = ModelPackage.load(package.folder).record
        record = replace(change(before), format=FORMAT, hilum=hilum_version(), files={}, id="")
        return _written(package.folder, before, record, networks or {})


def _written(
    folder: Path, before: Package | None, record: Package, networks: Mapping[str, "nn.Module"]
) -> ModelPackage:
    def fill(building: Path, record: Package) -> None:
        for name in _weights(before) if before else ():
            shutil.copy2(folder / name, building / name)
        for name, network in networks.items():
            seal.write_weights(network, building / name)
        (building / "card.md").write_text(card(record))

    seal.write(folder, record, fill)
    return ModelPackage.load(folder)


def _each_case_once(folds: Mapping[str, Fold]) -> dict[str, HeldOut]:
    """Folds of another division (--folds) may hold out the same cases: those that do so again say nothing new."""
    distinct: dict[str, HeldOut] = {}
    for number, fold in folds.items():
        if not any(fold.held_out.cases.keys() & other.cases.keys() for other in distinct.values()):
            distinct[number] = fold.held_out
    return distinct


def card(record: Package) -> str:
    """What a person should know before trusting the package; everything in it can be read from package.json."""
    plan = record.plan
    cases = sum(fold.cases_held_out for fold in record.folds.values())
    lines = [
        f"# {record.name}",
        "",
        f"Finds {', '.join(label.name for label in plan.labels)} in scans with the channel(s) {', '.join(plan.channels)}.",
        "**Not a medical device. Not for diagnosis.** Look at every overlay before you rely on a number.",
        "",
        "| label | value in the label map | mean Dice on held-out cases |",
        "|---|---|---|",
        *(f"| {label.name} | {label.value} | {_mean_dice(record, label.name)} |" for label in plan.labels),
        "",
        f"Measured on {cases} held-out case(s) of the dataset it was trained on, on each scan's own grid. Scans from other "
        "scanners, protocols or patients may do worse; measure with `hilum evaluate` on your own references.",
        "",
        "## How sure it is",
        "",
        *_said_of_temperatures(record),
        "",
        "## What is done to its label maps",
        "",
        *_said_of_rules(record),
        "",
        "## How fast it is",
        "",
        *_said_of_speed(record),
        "",
        "## What it was made of",
        "",
        f"- network: {record.network}, {len(record.folds)} fold(s){', averaged' if len(record.folds) > 1 else ''}",
        *([f"- {record.origin}"] if record.origin else []),
        *(f"- {_said_of_fold(number, fold, record)}" for number, fold in record.folds.items()),
        f"- prepared voxel: {'×'.join(f'{s:g}' for s in plan.spacing_mm)} mm; window: {'×'.join(map(str, plan.patch))} voxels",
        f"- made by hilum {record.hilum}, {', '.join(f'{n} {v}' for n, v in record.versions.items())}, on {record.created}",
        *([f"- trained on the dataset with sha256 {plan.dataset}"] if plan.dataset else []),
        "",
    ]
    return "\n".join(lines)


def _said_of_fold(number: str, fold: Fold, record: Package) -> str:
    name = "all cases, none held out" if number == ALL else f"fold {number}"
    if record.origin:  # whoever trained it says neither with what seed, nor always on how many cases
        return f"{name}: {fold.epochs} epochs" + (f", {fold.minutes:g} minutes" if fold.minutes else "")
    return f"{name}: {fold.cases_trained} cases, {fold.epochs} epochs, {fold.minutes:g} minutes, seed {fold.seed}"


def _said_of_temperatures(record: Package) -> list[str]:
    known = {number: fold for number, fold in record.folds.items() if fold.calibration and fold.temperature}
    if not known:
        return ["Its probabilities are the network's own: nothing was held out to calibrate them on."]
    said = [
        "Of the voxels it calls 80 % sure, 80 % should be right. To come close to that, logits are divided by a "
        "temperature, fitted on voxels of held-out cases; labels hardly change by it. Calibration error (ECE, 15 bins of "
        "equally many voxels) and negative log-likelihood (NLL), the figures after from cases that had no part in the fit:",
        "",
        "| fold | temperature | ECE before | after | NLL before | after | cases |",
        "|---|---|---|---|---|---|---|",
        *(_row_of_calibration(number, fold) for number, fold in known.items()),
    ]
    if borrowed := set(record.folds) - set(known):
        mean = temperatures(record.folds)[min(borrowed)]
        said += ["", f"Fold {', '.join(sorted(borrowed))} held nothing out; it takes the others' mean, {mean:.3f}."]
    if len(record.folds) > 1:
        said += ["", "The mean of several folds leans to caution: where they disagree it is less sure than each. No case is "
                 "unseen by all of them, so nobody can measure by how much."]  # fmt: skip
    return said


def _row_of_calibration(number: str, fold: Fold) -> str:
    was, temperature = fold.calibration, fold.temperature
    assert was is not None and temperature is not None
    figures = f"{was.ece_before:.4f} | {was.ece_after:.4f} | {was.nll_before:.4f} | {was.nll_after:.4f}"
    return f"| {number} | {temperature:.3f} | {figures} | {was.cases} |"


def _said_of_rules(record: Package) -> list[str]:
    held_out = sum(len(fold.held_out.cases) for fold in record.folds.values())
    if not record.postprocessing:
        return [
            f"Nothing: no rule made the {held_out} held-out case(s) better beyond chance." if held_out else "Nothing."
        ]
    return [
        *(f"- {_said_of_rule(chosen)}" for chosen in record.postprocessing),
        "",
        "Each report says what a rule removed or filled. The Dice in the table above is without them.",
    ]


def _said_of_rule(chosen: Chosen) -> str:
    rises = "; ".join(
        f"{label} {before:.3f} to {chosen.dice_after[label]:.3f}" for label, before in chosen.dice_before.items()
    )
    words = chosen.rule.words[0].upper() + chosen.rule.words[1:]
    if not chosen.cases:  # it came with imported weights
        return f"{words}: so did whoever trained it; nobody measured it here."
    return (
        f"{words}: mean Dice over {chosen.cases} held-out cases of fold(s) {', '.join(chosen.folds)} rises, {rises}. "
        f"{chosen.better} case(s) better, {chosen.worse} worse."
    )


def _said_of_speed(record: Package) -> list[str]:
    said = _said_of_curve(record.curve) if record.curve else ["Nobody measured it; `hilum tune` does."]
    if coarse := record.coarse:
        size = "×".join(f"{s:g}" for s in coarse.plan.spacing_mm)
        said += ["", f"It looks only where a coarse model ({coarse.network}, voxels of {size} mm) finds something, and "
                 f"{coarse.margin_mm:g} mm around: in {coarse.cases} held-out case(s) {coarse.share:.0%} of the voxels, and no "
                 "voxel of a label lay outside. `segment --whole` looks everywhere."]  # fmt: skip
    return said


def _said_of_curve(curve: Curve) -> list[str]:
    chosen = curve.choice()
    return [
        f"Mean Dice of {curve.cases} held-out case(s) of fold(s) {', '.join(curve.folds)}, and seconds for a case and fold, on "
        f"{curve.machine}. Agreement is the Dice with the labels that float32 gives with the same windows.",
        "",
        "| windows | precision | mean Dice | agreement | seconds |",
        "|---|---|---|---|---|",
        *(
            f"| {point.words} | {point.precision} | {point.dice:.4f} | {point.agreement:.4f} | {point.seconds:.3g} |"
            for point in curve.points
        ),
        "",
        f"`segment` takes {chosen.words}: the quickest within {BEARABLE:g} of the best. `--overlap` or `--flips` take another.",
    ]


def _mean_dice(record: Package, label: str) -> str:
    """Over cases, as `compare` has it; over folds where a package does not tell its cases."""
    folds = record.folds.values()
    cases = [dice[label] for fold in folds for dice in fold.held_out.cases.values() if label in dice]
    scores = cases or [fold.dice[label] for fold in folds if label in fold.dice]
    return f"{sum(scores) / len(scores):.3f}" if scores else "not present in held-out cases"


def library_versions() -> dict[str, str]:
    """Of the libraries whose numbers end up in a prediction."""
    return seal.versions_of(("torch", "monai", "numpy", "scipy", "nibabel", "SimpleITK", "pydicom"))


def _refuse_unknown_labels(path: Path, record: Package) -> None:
    """A rule for a label that is not there would be silent."""
    names = {label.name for label in record.plan.labels} | {""}
    unknown = sorted({chosen.rule.label for chosen in record.postprocessing} - names)
    if unknown:
        raise DamagedPackage(
            f"{path} has rules for {', '.join(unknown)}, which its plan does not know. {seal.FETCH_AGAIN}"
        )
