"""Which cases are held out: folds that no patient lies across, each label spread over all of them."""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from preprocessing.plan import Fingerprint

from .errors import UsageError

SEED = 12345
"""The same cases give the same folds, on every machine and in every training."""


@dataclass(frozen=True, kw_only=True)
class FoldCase:
    """What must be known of a case to put it into a fold."""

    id: str
    patient: str = ""
    """The same word in every case of one patient; empty: a patient of its own."""
    labels: frozenset[str] = frozenset()
    """The labels that occur in it."""


def fold_cases(fingerprint: Fingerprint) -> list[FoldCase]:
    """Every case of a dataset, as its fingerprint tells it."""
    return [
        FoldCase(id=name, patient=facts.patient, labels=frozenset(label for label, n in facts.voxels.items() if n))
        for name, facts in fingerprint.cases.items()
    ]


def split(cases: Sequence[FoldCase], fold: int | Literal["all"], folds: int) -> tuple[list[str], list[str]]:
    """Ids to train on and ids held out. Every case is held out in exactly one fold; in `all`, none is."""
    ids = sorted(case.id for case in cases)
    if fold == "all":
        return ids, []
    _refuse(fold, folds, patients := _patients(cases))
    part = _parts(patients, min(folds, len(patients)))[fold]
    held_out = {case.id for patient in part for case in patient}
    return [one for one in ids if one not in held_out], sorted(held_out)


Patient = tuple[FoldCase, ...]


def _patients(cases: Sequence[FoldCase]) -> list[Patient]:
    """The cases of each patient, the patients with most cases first, otherwise in an order that means nothing."""
    shuffled = sorted(cases, key=lambda case: case.id)
    random.Random(SEED).shuffle(shuffled)
    grouped: dict[tuple[str, str], list[FoldCase]] = {}
    for case in shuffled:
        grouped.setdefault((case.patient, "" if case.patient else case.id), []).append(case)
    return sorted((tuple(group) for group in grouped.values()), key=len, reverse=True)


def _refuse(fold: int, folds: int, patients: Sequence[Patient]) -> None:
    if folds < 2:
        raise UsageError(
            f"{folds} fold was asked for; with fewer than two nothing is left to train on. "
            "Ask for more folds, or for fold 'all', which holds nothing out."
        )
    if not 0 <= fold < folds:
        raise UsageError(f"fold {fold} of {folds} was asked for; folds count from 0 to {folds - 1}, or are 'all'.")
    if len(patients) < 2:
        cases = sum(len(patient) for patient in patients)
        raise UsageError(
            f"{cases} case(s) of {len(patients)} patient(s) were given; training needs at least two patients, one of them "
            "to be held out. Add one, or train on everything with fold 'all'."
        )
    if fold >= len(patients):
        raise UsageError(
            f"fold {fold} of {folds} was asked for; {len(patients)} patients, held out one at a time, make folds 0 to "
            f"{len(patients) - 1}. Ask for one of these."
        )


def _parts(patients: Sequence[Patient], count: int) -> list[list[Patient]]:
    """Iterative stratification (Sechidis et al. 2011): the rarest label is dealt out first, patient by patient, to the
    part that has least of it, as long as the parts stay of a size."""
    parts: list[list[Patient]] = [[] for _ in range(count)]
    held: list[Counter[str]] = [Counter() for _ in parts]  # cases of each part by label, and under "" all of them
    largest = max(map(len, patients))
    waiting = list(patients)
    while waiting:
        rarest = _rarest(waiting)
        for patient in [one for one in waiting if not rarest or rarest in _labels(one)]:
            sizes = [counts[""] for counts in held]
            room = [n for n in range(count) if _stays_even(sizes, n, len(patient), largest)]
            poorest = min(room, key=lambda n: (held[n][rarest], sizes[n]))
            parts[poorest].append(patient)
            held[poorest].update(label for case in patient for label in ("", *case.labels))
        waiting = [one for one in waiting if rarest and rarest not in _labels(one)]
    return _shared_out(parts, largest)


def _rarest(patients: Iterable[Patient]) -> str:
    """The label that fewest of them have; nothing when none has any."""
    counts = Counter(label for patient in patients for label in _labels(patient))
    return min(counts, key=lambda label: (counts[label], label), default="")


def _labels(patient: Patient) -> frozenset[str]:
    return frozenset().union(*(case.labels for case in patient))


def _size(part: Sequence[Patient]) -> int:
    return sum(len(patient) for patient in part)


def _stays_even(sizes: Sequence[int], taker: int, more: int, largest: int) -> bool:
    """Whether the parts differ by no more than the largest patient once one of them has taken that many cases."""
    after = [size + (n == taker) * more for n, size in enumerate(sizes)]
    return max(after) - min(after) <= largest


def _shared_out(parts: list[list[Patient]], largest: int) -> list[list[Patient]]:
    """Two patients change places, or one moves, as long as that brings a label out of the only part that has it: while
    that part is held out, nothing would be trained on the label."""
    while lonely := _lonely(parts):
        better = next((new for new in _changes(parts, lonely, largest) if len(_lonely(new)) < len(lonely)), None)
        if better is None:
            return parts
        parts = better
    return parts


def _lonely(parts: Sequence[Sequence[Patient]]) -> set[str]:
    """Labels that several patients have, all of them in one part."""
    patients = Counter(label for part in parts for patient in part for label in _labels(patient))
    homes = Counter(label for part in parts for label in frozenset().union(*map(_labels, part)))
    return {label for label, count in homes.items() if count == 1 < patients[label]}


def _changes(parts: list[list[Patient]], lonely: set[str], largest: int) -> Iterable[list[list[Patient]]]:
    """Every way to move one patient with such a label, alone or for another one, that leaves the parts of a size."""
    for home, part in enumerate(parts):
        for patient in (one for one in part if _labels(one) & lonely):
            for away in (n for n in range(len(parts)) if n != home):
                for other in (None, *parts[away]):
                    new = [list(one) for one in parts]
                    new[home].remove(patient)
                    new[away].append(patient)
                    if other:
                        new[away].remove(other)
                        new[home].append(other)
                    sizes = [_size(one) for one in new]
                    if max(sizes) - min(sizes) <= largest and min(sizes):
                        yield new
