"""Who teaches, who chooses, who measures: outer folds, and inner ones inside each. No patient is ever on two sides."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UsageError
from ..folds import FoldCase, split

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One training."""

    name: str
    taught: tuple[str, ...]
    held_out: tuple[str, ...]
    """They choose its checkpoint."""


@dataclass(frozen=True, kw_only=True)
class OuterFold:
    """Slides that are predicted once, and the trainings on all others that predict them."""

    number: int
    measured: tuple[str, ...]
    inner: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True)
class Division:
    """Of all slides."""

    outer: tuple[OuterFold, ...]
    members: tuple[Part, ...]
    """The trainings of the package, on all patients, made as those of an outer fold are."""


def divide(cases: Sequence[FoldCase], folds: int, inner_folds: int) -> Division:
    """By patient, each class spread evenly; the same slides and patients give the same folds, whatever the seed.

    No more folds than the rarest class has patients: in each something of every class is to be measured, and chosen by.
    """
    outer = []
    fewest = _patients_of_rarest(cases)
    if folds > fewest:
        logger.warning(
            "%d folds were asked for; the rarest class has %d patients, so %d are made", folds, fewest, fewest
        )
    for number in range(count := min(folds, fewest)):
        rest, measured = split(cases, number, count)
        inner = _parts([case for case in cases if case.id in set(rest)], inner_folds, f"fold{number}-inner")
        outer.append(OuterFold(number=number, measured=tuple(measured), inner=inner))
    division = Division(outer=tuple(outer), members=_parts(cases, inner_folds, "member"))
    for part in (part for parts in (*(fold.inner for fold in outer), division.members) for part in parts):
        _refuse_missing_classes(cases, part)
    return division


def _parts(cases: Sequence[FoldCase], folds: int, name: str) -> tuple[Part, ...]:
    count = max(2, min(folds, _patients_of_rarest(cases)))
    return tuple(
        Part(name=f"{name}{number}", taught=tuple(taught), held_out=tuple(held_out))
        for number in range(count)
        for taught, held_out in [split(cases, number, count)]
    )


def _patients_of_rarest(cases: Sequence[FoldCase]) -> int:
    classes = frozenset().union(*(case.labels for case in cases))
    return min(len({case.patient for case in cases if name in case.labels}) for name in classes)


def _refuse_missing_classes(cases: Sequence[FoldCase], part: Part) -> None:
    """Folds of patients with very different numbers of slides cannot always be even."""
    labels = {case.id: case.labels for case in cases}
    taught, every = (frozenset().union(*(labels[one] for one in ids)) for ids in (part.taught, labels))
    if missing := sorted(every - taught):
        raise UsageError(
            f"{part.name} has no patient left to learn {', '.join(missing)} from; every training needs one of each class. "
            "Ask for other --folds or --inner_folds, or add patients of that class."
        )
