"""From labelled tiles to a package that names the class of every tile: nested cross-validation, as for slides.

for each outer fold      the tiles of its patients are predicted once, by the mean of
    inner trainings      on all other patients, each of which holds a part of them out to choose its checkpoint by;
                         the temperature is fitted on what each of them held out
members                  the same inner trainings on all patients: they are the package

Neighbours are read from their slide whether or not anybody labelled them; no slide, and no patient, is on two sides.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

import networks
from networks.parts.bags import Bags, cross_entropy
from networks.tile_context import neighbours

from .. import seal, tracking
from ..config import SlideTraining
from ..prediction import choose_device
from ..progress import Progress, silent
from ..report import hilum_version
from . import sheet
from .answering import bag_of
from .division import Division, Part, divide
from .fitting import Lesson, Taught, Tell, class_weights, config_of_network, keep, kept, refuse_divergence, seed_of
from .package import FORMAT, PREDICTIONS, SPLITS, Member, SlidePackage, SlideRecord, library_versions, save
from .runs import open_tracker, tell
from .scores import Judged, fit_temperature, score
from .tile_answering import answer_tiles
from .tile_table import LabelledTiles, TileTable, read_tiles
from .workshop import SlideWorkshop, decisive

logger = logging.getLogger(__name__)

TILES_EACH = 64
"""Tiles in a step for each slide that a training of slides would take: 256 with the default of 4, as for SPIDER's head."""

EPOCHS = 20
"""Where nobody asks for more or fewer: SPIDER's head, too, is a small one on features that stay as they are."""


def train_tiles(
    features: Path,
    labels: Path,
    out: Path,
    settings: SlideTraining,
    progress: Progress = silent,
) -> SlidePackage:
    """Train on a folder of features and a table of labelled places; the package appears at `out` when it is finished."""
    config, device = config_of_network(settings), choose_device(settings.device)
    table = read_tiles(
        features, labels, slide=settings.slide_column, patient=settings.patient_column, label=settings.label_column
    )
    lesson = Lesson(
        network=networks.load_for_slides(settings.network).__name__.rpartition(".")[2],
        network_config=config,
        features=table.recipe.dimensions,
        classes=len(table.classes),
        settings=settings,
    )
    division = divide(table.cases, settings.folds, settings.inner_folds)
    workshop = SlideWorkshop.beside(out)
    workshop.open(settings, table.digest)
    tracker = open_tracker(lesson, division, workshop, table.recipe, sum(table.tiles_by_class.values()))
    school = TileSchool(table, lesson, division, workshop, device, tracker, progress)
    with tracking.ended_honestly(tracker):
        judged, temperatures = _nested(school)
        package = workshop.packed or _packed(school, judged, temperatures)
        tell(package, judged, tracker)
        is_told = tracker.settle()
    if is_told:
        workshop.close()
    else:
        logger.warning("%s is finished, but MLflow has not heard all of it; --resume tells it the rest", out)
    return package


@dataclass(frozen=True, eq=False)
class Desk:
    """A slide's labelled tiles and their neighbours, ready to be read."""

    slide: LabelledTiles
    reach: int

    @cached_property
    def bag(self) -> Bags:
        return bag_of(self.slide.file)

    @cached_property
    def around(self) -> Int[Tensor, "labelled place"]:
        """-1 where there is no tile."""
        return neighbours(self.bag, self.reach)[torch.from_numpy(self.slide.tiles)]

    def some(self, rows: Int[Tensor, " chosen"]) -> tuple[Bags, Tensor]:
        """A bag of these tiles and their neighbours alone, and which of it they are: nothing else is read."""
        around = self.around[rows]
        needed = around[around >= 0].unique()  # rising
        bag = Bags.of(self.bag.features[needed], None if self.bag.grid is None else self.bag.grid[needed])
        return bag, torch.searchsorted(needed, torch.from_numpy(self.slide.tiles)[rows])


@dataclass(frozen=True, eq=False)
class TileSchool:
    """Everything a training of tiles needs to know besides which slides it is about."""

    table: TileTable
    lesson: Lesson
    division: Division
    workshop: SlideWorkshop
    device: torch.device
    tracker: tracking.Tracker
    progress: Progress

    @cached_property
    def desks(self) -> dict[str, Desk]:
        reach = int(self.lesson.network_config["context"]) // 2
        return {slide.id: Desk(slide, reach) for slide in self.table.slides}

    def of(self, ids: Sequence[str]) -> list[Desk]:
        return [self.desks[name] for name in sorted(ids)]

    @property
    def parts(self) -> list[Part]:
        """Every training there is, in order."""
        return [part for fold in self.division.outer for part in fold.inner] + list(self.division.members)


@dataclass(frozen=True, eq=False)
class TileTeam:
    """Networks that answer together."""

    networks: list[nn.Module]
    taught: list[Taught]
    temperature: float


def fit_tiles(
    lesson: Lesson, taught: Sequence[Desk], held_out: Sequence[Desk], seed: int, device: torch.device, tell: Tell
) -> tuple[nn.Module, Taught]:
    """The network as it was after its best epoch; on a CPU the same seed gives the same weights."""
    weights = class_weights([label for desk in taught for label in desk.slide.labels.tolist()], lesson.classes)
    truth = torch.from_numpy(np.concatenate([desk.slide.labels for desk in held_out]))
    best: tuple[float, int, dict[str, np.ndarray], dict[str, Tensor]] = (math.inf, 0, {}, {})
    curves: list[dict[str, float]] = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        network = lesson.build().to(device)
        for epoch, losses in enumerate(_epochs(network, lesson, taught, seed, weights, device)):
            logits = {_name(desk, n): row for desk in held_out for n, row in enumerate(_said([network], desk, device))}
            said = torch.from_numpy(np.stack(list(logits.values()))).float()
            losses["held_out_loss"] = float(cross_entropy(said, truth, weights))
            refuse_divergence(losses, epoch)
            curves.append(losses)
            tell(epoch, losses)
            if losses["held_out_loss"] < best[0]:
                state = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
                best = losses["held_out_loss"], epoch, logits, state
    _, chosen, logits, state = best
    network.load_state_dict(state)
    as_told = {name: tuple(row.tolist()) for name, row in logits.items()}
    return network.eval(), Taught(curves=tuple(curves), chosen=chosen, logits=as_told, seed=seed)


def _epochs(
    network: nn.Module, lesson: Lesson, taught: Sequence[Desk], seed: int, weights: Tensor, device: torch.device
) -> Iterator[dict[str, float]]:
    """The mean loss of each epoch, the network ready to evaluate after it."""
    settings, epochs, size = lesson.settings, _epochs_of(lesson), TILES_EACH * lesson.settings.batch
    places = torch.tensor([(d, n) for d, desk in enumerate(taught) for n in range(len(desk.slide.tiles))])
    steps = math.ceil(len(places) / size)
    optimiser = torch.optim.AdamW(network.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * steps)
    draw, weights = torch.Generator().manual_seed(seed), weights.to(device)
    for _ in range(epochs):
        network.train()
        total = 0.0
        for batch in torch.randperm(len(places), generator=draw).split(size):
            optimiser.zero_grad()
            bags, centres, labels = _together(taught, places[batch], device)
            of_network: Any = network.losses  # every network for slides has them
            loss = torch.stack(tuple(of_network(network(bags, centres), labels, weights).values())).sum()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += float(loss.detach()) * len(batch) / len(places)
        network.eval()
        yield {"loss": total}


def _together(
    desks: Sequence[Desk], places: Int[Tensor, "tile 2"], device: torch.device
) -> tuple[Bags, Int[Tensor, " tile"], Int[Tensor, " tile"]]:
    """The neighbourhoods of these tiles (desk, row), the tiles' numbers among them, and their labels."""
    bags, centres, labels, bounds = [], [], [], [0]
    for number in places[:, 0].unique().tolist():
        rows = places[places[:, 0] == number, 1]
        bag, mine = desks[number].some(rows)
        bags.append(bag)
        centres.append(mine + bounds[-1])
        labels.append(torch.from_numpy(desks[number].slide.labels)[rows])
        bounds.append(bounds[-1] + len(bag.features))
    together = Bags(
        features=torch.cat([bag.features for bag in bags]).to(device),
        offsets=torch.tensor(bounds),
        grid=torch.cat([bag.grid for bag in bags if bag.grid is not None]).to(device),
    )
    return together, torch.cat(centres).to(device), torch.cat(labels).to(device)


def _said(members: Sequence[nn.Module], desk: Desk, device: torch.device) -> Float[np.ndarray, "labelled class"]:
    """Logits of a slide's labelled tiles."""
    bags, centres = desk.some(torch.arange(len(desk.slide.tiles)))
    on_device = Bags.of(bags.features.to(device), None if bags.grid is None else bags.grid.to(device))
    return answer_tiles(members, 1.0, on_device, centres).logits


def _nested(school: TileSchool) -> tuple[Judged, tuple[float, ...]]:
    """Every labelled tile, judged once by networks that its patient had no part in; slides by their names."""
    said: dict[str, tuple[np.ndarray, float, int]] = {}
    temperatures = []
    for fold in school.division.outer:
        team = _trained(school, fold.inner)
        for desk in school.of(fold.measured):
            said[desk.slide.id] = (_said(team.networks, desk, school.device), team.temperature, fold.number)
        temperatures.append(team.temperature)
    slides = school.table.slides
    each = [len(slide.tiles) for slide in slides]
    judged = Judged(
        truth=np.concatenate([slide.labels for slide in slides]),
        logits=np.concatenate([said[slide.id][0] for slide in slides]),
        temperatures=np.repeat([said[slide.id][1] for slide in slides], each),
        folds=np.repeat([said[slide.id][2] for slide in slides], each),
        patients=tuple(slide.patient for slide in slides for _ in slide.tiles),
    )
    return judged, tuple(temperatures)


def _trained(school: TileSchool, parts: Sequence[Part]) -> TileTeam:
    """The networks of an outer fold, or of the package."""
    members, taught = zip(*(_one(school, part) for part in parts), strict=True)
    logits = {name: row for one in taught for name, row in one.logits.items()}
    truth = {
        _name(desk, n): label for desk in school.desks.values() for n, label in enumerate(desk.slide.labels.tolist())
    }
    temperature = fit_temperature(np.array(list(logits.values())), np.array([truth[name] for name in logits]))
    return TileTeam(list(members), list(taught), temperature)


def _one(school: TileSchool, part: Part) -> tuple[nn.Module, Taught]:
    """A finished network is taken from the disk; what is not finished is begun anew, and comes to the same weights."""
    path, epochs = school.workshop.network(part.name), _epochs_of(school.lesson)
    place = school.parts.index(part)

    def tell(epoch: int, losses: dict[str, float]) -> None:
        school.tracker.metrics({f"{part.name}/{name}": value for name, value in losses.items()}, step=epoch)
        school.tracker.beat()
        school.progress(
            "train", place * epochs + epoch + 1, len(school.parts) * epochs, f"{part.name}, epoch {epoch + 1}"
        )

    if not path.exists():
        seed = seed_of(school.lesson.settings.seed, part.name)
        keep(
            *fit_tiles(school.lesson, school.of(part.taught), school.of(part.held_out), seed, school.device, tell), path
        )
    return kept(school.lesson, path, school.device)


def _packed(school: TileSchool, judged: Judged, temperatures: tuple[float, ...]) -> SlidePackage:
    """The members, trained and sealed beside what was measured."""
    team = _trained(school, school.division.members)
    files = [f"weights-{part.name}.safetensors" for part in school.division.members]
    record = _record(school, judged, temperatures, team, files)

    def fill(folder: Path) -> None:
        for network, name in zip(team.networks, files, strict=True):
            seal.write_weights(network, folder / name)
        (folder / SPLITS).write_text(_splits(school), encoding="utf-8")
        (folder / PREDICTIONS).write_text(_predictions(school.table, judged), encoding="utf-8")

    return save(school.workshop.out, record, fill)


def _record(
    school: TileSchool, judged: Judged, temperatures: tuple[float, ...], team: TileTeam, files: Sequence[str]
) -> SlideRecord:
    table = school.table
    members = [_member(school, *one) for one in zip(school.division.members, team.taught, files, strict=True)]
    return SlideRecord(
        format=FORMAT,
        kind="tiles",
        hilum=hilum_version(),
        name=school.workshop.out.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        network=school.lesson.network,
        network_config=school.lesson.network_config,
        classes=table.classes,
        recipe=table.recipe,
        members=tuple(members),
        temperature=team.temperature,
        scores=score(judged, table.classes),
        slides=table.tiles_by_class,
        patients=table.patients_by_class,
        folds=len(school.division.outer),
        inner_folds=len(school.division.members),
        temperatures=temperatures,
        dataset=table.digest,
        training=decisive(school.lesson.settings),
        versions=library_versions(),
        run_id=school.tracker.run_id,
    )


def _member(school: TileSchool, part: Part, taught: Taught, name: str) -> Member:
    """Its counts are of tiles, as everything is in a package of this kind."""
    learnt, held_out = ([desk.slide for desk in school.of(ids)] for ids in (part.taught, part.held_out))
    return Member(
        weights=name,
        slides_trained=sum(len(slide.tiles) for slide in learnt),
        patients_trained=len({slide.patient for slide in learnt}),
        slides_held_out=sum(len(slide.tiles) for slide in held_out),
        patients_held_out=len({slide.patient for slide in held_out}),
        epochs=len(taught.curves),
        chosen_epoch=taught.chosen + 1,
        loss_trained=round(taught.best["loss"], 6),
        loss_held_out=round(taught.best["held_out_loss"], 6),
        seed=taught.seed,
    )


def _splits(school: TileSchool) -> str:
    """CSV: of every slide the outer fold that measured it, and the member it chose."""
    outer = {one: fold.number for fold in school.division.outer for one in fold.measured}
    member = {one: n for n, part in enumerate(school.division.members) for one in part.held_out}
    rows = [[s.id, s.patient, len(s.tiles), outer[s.id], member[s.id]] for s in school.table.slides]
    return sheet.as_csv(["slide", "patient", "tiles", "outer fold", "member"], rows)


def _predictions(table: TileTable, judged: Judged) -> str:
    """CSV: what was said of every labelled tile by networks that its patient had no part in."""
    classes = table.classes
    where = [(s.id, s.patient, *s.file.positions_um[tile].tolist()) for s in table.slides for tile in s.tiles.tolist()]
    head = [
        "slide",
        "patient",
        "x_um",
        "y_um",
        "label",
        "decided",
        "outer fold",
        *(f"probability {c}" for c in classes),
    ]
    rows = [
        [*place, classes[label], classes[decided], fold, *likely.round(6).tolist()]
        for place, label, decided, fold, likely in zip(
            where, judged.truth, judged.decided, judged.folds.tolist(), judged.probabilities, strict=True
        )
    ]
    return sheet.as_csv(head, rows)


def _epochs_of(lesson: Lesson) -> int:
    return lesson.settings.epochs or EPOCHS


def _name(desk: Desk, row: int) -> str:
    """Of a labelled tile, in what a training came to."""
    return f"{desk.slide.id}:{desk.slide.tiles[row]}"
