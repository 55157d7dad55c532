"""From features and labels to a package, by nested cross-validation: what is reported was never chosen by.

for each outer fold      its slides are predicted once, by the mean of
    inner trainings      on all other patients, each of which holds a part of them out to choose its checkpoint by;
                         the temperature is fitted on what each of them held out
members                  the same inner trainings on all patients: they are the package
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import networks

from .. import seal, tracking
from ..config import SlideTraining
from ..errors import UsageError
from ..prediction import choose_device
from ..progress import Progress, silent
from ..report import hilum_version
from . import sheet
from .answering import answer, bag_of
from .division import Division, Part, divide
from .fitting import Lesson, Taught, config_of_network, fit, keep, kept, seed_of
from .package import FORMAT, PREDICTIONS, SPLITS, Member, SlidePackage, SlideRecord, library_versions, save
from .runs import NESTED, open_tracker, points_of, tell
from .scores import Judged, fit_temperature, score
from .table import LabelledSlide, SlideTable, read_table
from .workshop import SlideWorkshop, decisive

logger = logging.getLogger(__name__)

MEMBERS = "members"
"""What the MLflow run is called in which the package's own networks are trained."""


def train_slides(
    features: Path,
    labels: Path,
    out: Path,
    settings: SlideTraining = SlideTraining(),  # noqa: B008
    progress: Progress = silent,
) -> SlidePackage:
    """Train on a folder of features and a table of labels; the package appears at `out` when it is finished.

    A network whose name begins with tile_ learns from labelled places instead of labelled slides: see tile_training.py.
    """
    if settings.network.startswith("tile_"):
        from .tile_training import train_tiles

        return train_tiles(features, labels, out, settings, progress)
    school = _school(features, labels, out, settings, progress)
    tracker = school.open_tracker()
    with tracking.ended_honestly(tracker):
        judged, temperatures = _nested(school, tracker)
        package = school.workshop.packed or _packed(school, judged, temperatures, tracker)
        tell(package, judged, tracker)
        is_told = tracker.settle()
    if is_told:
        school.workshop.close()
    else:
        logger.warning("%s is finished, but MLflow has not heard all of it; --resume tells it the rest", out)
    return package


@dataclass(frozen=True, kw_only=True, eq=False)
class School:
    """Everything a training needs to know besides which slides it is about."""

    table: SlideTable
    lesson: Lesson
    division: Division
    workshop: SlideWorkshop
    device: torch.device
    progress: Progress

    def slides(self, ids: Sequence[str]) -> list[LabelledSlide]:
        """By their names."""
        wanted = set(ids)
        return [slide for slide in self.table.slides if slide.id in wanted]

    def open_tracker(self, part: str = NESTED, parent: tracking.Tracker | None = None) -> tracking.Tracker:
        """The run of a part."""
        table = self.table
        return open_tracker(self.lesson, self.division, self.workshop, table.recipe, len(table.slides), part, parent)

    @property
    def parts(self) -> list[Part]:
        """Every training there is, in order."""
        return [part for fold in self.division.outer for part in fold.inner] + list(self.division.members)


@dataclass(frozen=True, kw_only=True, eq=False)
class Team:
    """Networks that answer together."""

    networks: list[nn.Module]
    taught: list[Taught]
    temperature: float
    """Fitted on the slides that each of them held out."""


def _school(features: Path, labels: Path, out: Path, settings: SlideTraining, progress: Progress) -> School:
    """Everything that can be refused is refused here, before the first network is trained."""
    config, device = config_of_network(settings), choose_device(settings.device)
    table = read_table(
        features, labels, slide=settings.slide_column, patient=settings.patient_column, label=settings.label_column
    )
    lesson = _lesson(settings, config, table)
    division = divide(table.cases, settings.folds, settings.inner_folds)
    workshop = SlideWorkshop.beside(out)
    workshop.open(settings, table.digest)
    return School(table=table, lesson=lesson, division=division, workshop=workshop, device=device, progress=progress)


def _lesson(settings: SlideTraining, config: dict[str, Any], table: SlideTable) -> Lesson:
    lesson = Lesson(
        network=networks.load_for_slides(settings.network).__name__.rpartition(".")[2],
        network_config=config,
        features=table.recipe.dimensions,
        classes=len(table.classes),
        settings=settings,
    )
    try:
        lesson.build()
    except ValueError as error:  # a network may refuse so many features or classes
        raise UsageError(str(error)) from None
    return lesson


def _nested(school: School, tracker: tracking.Tracker) -> tuple[Judged, tuple[float, ...]]:
    """Every slide, judged once by networks that its patient had no part in."""
    said: dict[str, tuple[np.ndarray, float, int]] = {}
    temperatures = []
    for fold in school.division.outer:
        run = school.open_tracker(f"fold {fold.number}", tracker)
        with tracking.ended_honestly(run):
            team = _trained(school, fold.inner, run, tracker)
            for slide in school.slides(fold.measured):
                answered = answer(team.networks, team.temperature, bag_of(slide.file, school.device), explain=False)
                said[slide.id] = (answered.logits, team.temperature, fold.number)
            mine = _judged(school, fold.measured, said)
            run.metrics(points_of(score(mine, school.table.classes), "outer"), step=0)
        temperatures.append(team.temperature)
    return _judged(school, [slide.id for slide in school.table.slides], said), tuple(temperatures)


def _judged(school: School, ids: Sequence[str], said: Mapping[str, tuple[np.ndarray, float, int]]) -> Judged:
    slides = school.slides(ids)
    logits, temperatures, folds = zip(*(said[slide.id] for slide in slides), strict=True)
    return Judged(
        truth=np.array([slide.label for slide in slides]),
        logits=np.stack(logits),
        temperatures=np.array(temperatures),
        folds=np.array(folds),
        patients=tuple(slide.patient for slide in slides),
    )


def _trained(school: School, parts: Sequence[Part], run: tracking.Tracker, parent: tracking.Tracker) -> Team:
    """The networks of an outer fold, or of the package."""
    members, taught = zip(*(_one(school, part, run, parent) for part in parts), strict=True)
    logits = {name: values for one in taught for name, values in one.logits.items()}
    slides = school.slides(tuple(logits))
    temperature = fit_temperature(
        np.array([logits[slide.id] for slide in slides]), np.array([slide.label for slide in slides])
    )
    run.metrics({"temperature": temperature}, step=0)
    return Team(networks=list(members), taught=list(taught), temperature=temperature)


def _one(school: School, part: Part, run: tracking.Tracker, parent: tracking.Tracker) -> tuple[nn.Module, Taught]:
    """A finished network is taken from the disk; what is not finished is begun anew, and comes to the same weights."""
    path, short = school.workshop.network(part.name), part.name.rpartition("-")[2]

    def heard(epoch: int, losses: dict[str, float]) -> None:
        run.metrics({f"{short}/{name}": value for name, value in losses.items()}, step=epoch)
        parent.beat()
        _show(school, part, epoch + 1)

    if not path.exists():
        seed = seed_of(school.lesson.settings.seed, part.name)
        network, taught = fit(
            school.lesson, school.slides(part.taught), school.slides(part.held_out), seed, school.device, heard
        )
        keep(network, taught, path)
        best = taught.best["held_out_loss"]
        logger.info("%s: epoch %d of %d, held-out loss %.4f", part.name, taught.chosen + 1, len(taught.curves), best)
    _show(school, part, school.lesson.epochs(len(part.taught)))
    return kept(school.lesson, path, school.device)


def _show(school: School, part: Part, epoch: int) -> None:
    of = [school.lesson.epochs(len(each.taught)) for each in school.parts]
    place = school.parts.index(part)
    school.progress("train", sum(of[:place]) + epoch, sum(of), f"{part.name}, epoch {epoch} of {of[place]}")


def _packed(school: School, judged: Judged, temperatures: tuple[float, ...], tracker: tracking.Tracker) -> SlidePackage:
    """The members, trained and sealed beside what was measured."""
    run = school.open_tracker(MEMBERS, tracker)
    with tracking.ended_honestly(run):
        team = _trained(school, school.division.members, run, tracker)
    files = [f"weights-{part.name}.safetensors" for part in school.division.members]
    record = _record(school, judged, temperatures, team, files, tracker.run_id)

    def fill(folder: Path) -> None:
        for network, name in zip(team.networks, files, strict=True):
            seal.write_weights(network, folder / name)
        (folder / SPLITS).write_text(sheet.splits(school.table, school.division), encoding="utf-8")
        (folder / PREDICTIONS).write_text(sheet.predictions(school.table, judged), encoding="utf-8")

    return save(school.workshop.out, record, fill)


def _record(
    school: School,
    judged: Judged,
    temperatures: tuple[float, ...],
    team: Team,
    files: Sequence[str],
    run_id: str,
) -> SlideRecord:
    table, settings = school.table, school.lesson.settings
    return SlideRecord(
        format=FORMAT,
        kind="slides",
        hilum=hilum_version(),
        name=school.workshop.out.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        network=school.lesson.network,
        network_config=school.lesson.network_config,
        classes=table.classes,
        recipe=table.recipe,
        members=tuple(map(partial(_member, school), school.division.members, team.taught, files)),
        temperature=team.temperature,
        scores=score(judged, table.classes),
        slides=table.slides_by_class,
        patients=table.patients_by_class,
        folds=len(school.division.outer),
        inner_folds=len(school.division.members),
        temperatures=temperatures,
        dataset=table.digest,
        training=decisive(settings),
        versions=library_versions(),
        run_id=run_id,
    )


def _member(school: School, part: Part, taught: Taught, name: str) -> Member:
    learnt, held_out = school.slides(part.taught), school.slides(part.held_out)
    return Member(
        weights=name,
        slides_trained=len(learnt),
        patients_trained=len({slide.patient for slide in learnt}),
        slides_held_out=len(held_out),
        patients_held_out=len({slide.patient for slide in held_out}),
        epochs=len(taught.curves),
        chosen_epoch=taught.chosen + 1,
        loss_trained=round(taught.best["loss"], 6),
        loss_held_out=round(taught.best["held_out_loss"], 6),
        seed=taught.seed,
    )
