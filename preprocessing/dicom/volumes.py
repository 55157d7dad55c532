"""The frames of one series -> the volumes in it, told apart by what really separates them.

What lies differently (matrix, frame of reference, pixel spacing, orientation) and what shows something else (another
quantity, echo, b-value, time, stack) is always another volume. All else is asked only where several frames lie at one
place, in the order of `Clues`; the first that gives every volume each place once is believed. A header that varies
from slice to slice for no reason, as the exposure of a CT does, so tears nothing apart.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Integer

from .frames import Clues, Frame

ORIENTATION_TOLERANCE = 1e-4
SPACING_TOLERANCE = 1e-4
"""How far direction cosines, and millimetres between pixels, of one volume may differ: they are rounded text."""

NEAR_MM = 0.01
"""Slices nearer than this lie at one place; in scans of very small pixels a twentieth of one is the limit."""

LOCALIZER_FRAMES = 10
LOCALIZER_RATIO = 3
"""In three directions or more, no more slices than this in any, and not so many times those in another: drawn to plan
the scan, by a device that forgot to say so."""

LONERS = 3
"""More slices than this, of which each lies differently from all others, are one refused case, not one each."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """The frames of one volume."""

    name: str
    """What tells it from the other volumes of its series; empty where there are none."""
    frames: tuple[Frame, ...]
    copies: tuple[tuple[Path, Path], ...] = ()
    """Files that claim to hold the same object: the one whose frames are here, and another one."""
    repairs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Separator(NamedTuple):
    """A label for each frame; frames of one volume have one label."""

    words: dict[Hashable, str]
    labels: list[Hashable]


def volumes_in(frames: Sequence[Frame]) -> list[Part]:
    """The volumes of one series, in an order that does not depend on that of the files."""
    frames, copies = _without_copies(frames)
    settled = [frame for frame in frames if frame.settled]
    parts = []
    for place, group in _with_loners(_divided(settled, _by_geometry(settled))):
        parts += [replace(part, name=_joined(place, part.name)) for part in _at_one_geometry(group)]
    parts = _with_unsettled(parts, [frame for frame in frames if not frame.settled])
    return [replace(part, copies=_copies_of(part, copies)) for part in parts]


def _at_one_geometry(frames: list[Frame]) -> list[Part]:
    """The volumes among frames of one size and direction."""
    if not same_direction(frames) or len(set(places(frames).tolist())) == 1:
        return [
            Part(name="", frames=tuple(frames))
        ]  # a film of one slice, or slices at random: no volumes to tell apart
    parts = [
        replace(part, name=_joined(shown, part.name))
        for shown, group in _divided(frames, _by_traits(frames))
        for part in _by_clues(group)
    ]
    most = max(len(part.frames) for part in parts)
    said = "It has {} slices and another volume of its series {}: some may not have been sent.".format
    return [
        part if len(part.frames) == most else replace(part, notes=(said(len(part.frames), most),)) for part in parts
    ]


def same_direction(frames: Sequence[Frame]) -> bool:
    """Whether all that say how they lie have one orientation."""
    planes = [(*frame.plane.row, *frame.plane.column) for frame in frames if frame.plane is not None]
    return not planes or bool(np.abs(np.array(planes) - planes[0]).max() <= 2 * ORIENTATION_TOLERANCE)


def _with_loners(groups: list[tuple[str, list[Frame]]]) -> list[tuple[str, list[Frame]]]:
    """Many slices of which each lies differently, as those around an axis, are one group."""
    loners = [frame for _, group in groups if len(group) == 1 for frame in group]
    if len(loners) <= LONERS or same_direction(loners):
        return groups
    rest = [(name, group) for name, group in groups if len(group) > 1]
    return [*rest, ("unlike" if rest else "", loners)]


def _joined(*words: str) -> str:
    return " ".join(filter(None, words))


def is_localizer(frames: Sequence[Frame]) -> bool:
    """Few slices in each of three directions or more."""
    settled = [frame for frame in frames if frame.settled]
    normals = [tuple(np.abs(_normal(frame).round(2)) + 0.0) for frame in settled]
    counts = Counter(normals)
    if len(counts) < 3 or len(settled) != len(frames):
        return False
    if max(counts.values()) > min(LOCALIZER_FRAMES, LOCALIZER_RATIO * min(counts.values())):
        return False
    wide_apart: list[np.ndarray] = []
    for normal in counts:
        if all(abs(float(np.dot(normal, other))) < np.cos(np.pi / 4) for other in wide_apart):
            wide_apart.append(np.array(normal))
    return len(wide_apart) >= 3


def places(frames: Sequence[Frame]) -> Integer[np.ndarray, " frame"]:
    """For each frame of a volume the number of its place along the normal: one number where several lie together."""
    heights = np.array([frame.position for frame in frames]) @ _normal(frames[0])
    plane = frames[0].plane
    assert plane is not None
    near = min(NEAR_MM, min(plane.spacing) / 20)
    order = np.argsort(heights, kind="stable")
    numbers = np.empty(len(frames), np.int64)
    numbers[order] = np.concatenate([[0], np.cumsum(np.diff(heights[order]) > near)])
    return numbers


def _normal(frame: Frame) -> Float[np.ndarray, " 3"]:
    assert frame.plane is not None
    return np.cross(frame.plane.row, frame.plane.column)


def _without_copies(frames: Sequence[Frame]) -> tuple[list[Frame], list[tuple[Path, Path]]]:
    """An object counts once; whether files that claim to be the same one are the same is seen when they are read."""
    kept: dict[Hashable, Frame] = {}
    copies: dict[tuple[Path, Path], None] = {}
    for frame in sorted(frames, key=lambda frame: (frame.path, frame.number, frame.tile or ())):
        first = kept.setdefault((frame.uid or frame.path, frame.number, frame.tile), frame)
        if first.path != frame.path:
            copies[first.path, frame.path] = None
    return list(kept.values()), list(copies)


def _copies_of(part: Part, copies: Sequence[tuple[Path, Path]]) -> tuple[tuple[Path, Path], ...]:
    paths = {frame.path for frame in part.frames}
    return tuple((first, other) for first, other in copies if paths & {first, other})


def _with_unsettled(parts: list[Part], unsettled: Sequence[Frame]) -> list[Part]:
    """A frame that does not say where it lies may be a slice of any volume of its size: they all wait for it."""
    sizes = {part.frames[0].size for part in parts}
    strays = [frame for frame in unsettled if parts and frame.size != (0, 0) and frame.size not in sizes]
    rest = [frame for frame in unsettled if frame not in strays]
    if not parts:
        return [Part(name="", frames=tuple(unsettled))] if unsettled else []
    parts = [
        replace(part, frames=(*part.frames, *(f for f in rest if f.size in ((0, 0), part.frames[0].size))))
        for part in parts
    ]
    return [*parts, Part(name="unplaced", frames=tuple(strays))] if strays else parts


def _divided(frames: list[Frame], separators: Sequence[Separator]) -> list[tuple[str, list[Frame]]]:
    """The frames by their labels, each group with the words that are needed to tell it from the others."""
    groups: dict[tuple, list[Frame]] = defaultdict(list)
    for number, frame in enumerate(frames):
        groups[tuple(separator.labels[number] for separator in separators)].append(frame)
    needed = _needed(list(groups))
    return [
        (" ".join(separators[n].words[labels[n]] for n in needed), groups[labels])
        for labels in sorted(groups, key=repr)
    ]


def _needed(labels: Sequence[tuple]) -> list[int]:
    """Which of the labels it takes, first to last, to tell all groups apart."""
    needed: list[int] = []
    for n in range(len(labels[0]) if labels else 0):
        alike = defaultdict(set)
        for label in labels:
            alike[tuple(label[m] for m in needed)].add(label[n])
        if any(len(different) > 1 for different in alike.values()):
            needed.append(n)
    return needed


# always another volume


def _by_geometry(frames: list[Frame]) -> list[Separator]:
    planes = [frame.plane for frame in frames]
    spacings = _clusters([plane.spacing if plane else () for plane in planes], SPACING_TOLERANCE)
    directions = _clusters([(*plane.row, *plane.column) if plane else () for plane in planes], ORIENTATION_TOLERANCE)
    sizes = [frame.size for frame in frames]
    modalities = [frame.traits.modality for frame in frames]
    references = _known([plane.reference if plane else "" for plane in planes])
    return [
        Separator({size: f"{size[0]} x {size[1]}" for size in sizes}, list(sizes)),
        Separator({modality: _word(modality) or "other" for modality in modalities}, list(modalities)),
        _numbered("reference", references),
        _numbered("spacing", spacings),
        _numbered("orientation", directions),
    ]


def _by_traits(frames: list[Frame]) -> list[Separator]:
    traits = [frame.traits for frame in frames]
    alone = not _repeats(frames)
    known = _known if alone else list
    quantities = [one.quantity for one in traits]
    plain = "magnitude" if traits[0].modality == "MR" else "plain"
    times = _gaps([one.echo_time for one in traits], lambda echo: 0.05 + 0.005 * echo)
    b_values = known(_gaps([one.b_value for one in traits], lambda b: max(4.9, 0.01 * b)))
    echoes = known(
        [(time, _natural(one.echo)) if time or one.echo else None for time, one in zip(times, traits, strict=True)]
    )
    counted = [known([one.time or None for one in traits]), known([one.stack or None for one in traits])]
    # what is another one in every slice is a counter and separates nothing
    time, stack = ([None] * len(frames) if alone and len(set(each)) == len(frames) else each for each in counted)
    return [
        Separator({quantity: _word(quantity) or plain for quantity in quantities}, list(quantities)),
        _numbered("echo", echoes),
        Separator({b: "b unknown" if b is None else f"b {b:.0f}" for b in b_values}, b_values),
        _numbered("time", time),
        _numbered("stack", stack),
        _numbered("units", _known([one.units for one in traits])),
    ]


def _repeats(frames: Sequence[Frame]) -> bool:
    return len(set(places(frames).tolist())) < len(frames)


def _clusters(points: Sequence[tuple], tolerance: float) -> list[Hashable]:
    """Each point as the least of those it may be one with."""
    different = sorted(set(points))
    centres = np.empty((len(different), len(different[0]) if different else 0))
    found: dict[tuple, tuple] = {}
    chosen: list[tuple] = []
    for point in different:
        near = np.abs(centres[: len(chosen)] - point).max(axis=1, initial=0) <= tolerance
        if not near.any():
            centres[len(chosen)] = point
            chosen.append(point)
        found[point] = chosen[int(np.argmax(near))] if near.any() else point
    return [found[point] for point in points]


def _gaps(values: Sequence[float | None], width: Any) -> list[Hashable]:
    """Each value as the least of its neighbours that follow each other in steps below `width`."""
    found: dict[float, float] = {}
    last = start = None
    for value in sorted({value for value in values if value is not None}):
        if last is None or value - last > width(last):
            start = value
        found[value], last = start if start is not None else value, value
    return [None if value is None else found[value] for value in values]


def _known(values: Sequence[Hashable]) -> list[Hashable]:
    """What a frame does not say is what the others say, if they agree."""
    said = {value for value in values if value not in (None, "")}
    return [next(iter(said))] * len(values) if len(said) == 1 else list(values)


def _numbered(word: str, labels: Sequence[Hashable]) -> Separator:
    """The labels as ranks from 1, so that names depend on nothing else and are no one's secret."""
    ranks = {label: rank for rank, label in enumerate(sorted(set(labels), key=_order), start=1)}
    return Separator({rank: f"{word} {rank}" for rank in ranks.values()}, [ranks[label] for label in labels])


def _order(label: Hashable) -> tuple:
    if isinstance(label, tuple):
        return (2, tuple(_order(one) for one in label))
    natural = _natural(label)
    return (0, natural, "") if isinstance(natural, float) else (1, 0.0, str(natural))


def _natural(label: Any) -> float | str:
    """Numbers as numbers: 10 comes after 9."""
    if label is None:
        return ""
    try:
        return float(label)
    except (TypeError, ValueError):
        return str(label)


def _word(text: str) -> str:
    """Letters, digits, points and single spaces: what may stand in a name."""
    return " ".join("".join(c if c.isascii() and (c.isalnum() or c == ".") else " " for c in text.lower()).split())


# another volume where several frames lie at one place

WORDS = {
    **{"image_type": "type", "kind": "class", "acquisition": "acquisition", "trigger": "phase", "percent": "phase"},
    **{"offset": "time", "direction": "direction", "inversion": "inversion", "flip": "flip", "dimension": "dimension"},
    **{"acquired": "time", "content": "time", "series": "time", "kernel": "kernel", "correction": "correction"},
    **{"voltage": "voltage", "repetition": "repetition"},
}
"""How a volume is called that one of the Clues told from the others."""

RUNNING = ("trigger", "offset", "acquired", "content")
"""Clues that run on from slice to slice, so that the volumes follow each other in them instead of sharing one value."""


def _by_clues(frames: list[Frame]) -> list[Part]:
    """One volume; or several, if something tells them apart; or one with several frames at a place, to be looked at."""
    places_of = places(frames)
    if len(set(places_of.tolist())) == len(frames):
        return [Part(name="", frames=tuple(frames))]
    separator = _beside(frames) or _shared_clue(frames, places_of) or _running_clue(frames, places_of)
    separator = separator or _overlapping(frames, places_of)
    repairs: tuple[str, ...] = ()
    if separator is None:
        separator = _by_instance(frames, places_of)
        repairs = ("Volumes that lie at one place were told apart by instance numbers, for want of anything better.",)
    if separator is None:
        return [Part(name="", frames=tuple(frames))]
    return [Part(name=name, frames=tuple(group), repairs=repairs) for name, group in _divided(frames, [separator])]


STACKS_LIMIT = 64
"""Different places in the plane above which slices are shifted against each other and stand in no stacks."""


def _beside(frames: list[Frame]) -> Separator | None:
    """Stacks side by side, as of two hips: at the same heights, each straight, at different places in the plane."""
    plane = frames[0].plane
    assert plane is not None
    positions = np.array([frame.position for frame in frames])
    in_plane = (positions @ np.array([plane.row, plane.column]).T).round(4)
    if len(np.unique(in_plane.round(1), axis=0)) > STACKS_LIMIT:
        return None
    lateral = _clusters([tuple(row) for row in in_plane.tolist()], 0.05)
    heights = (positions @ _normal(frames[0])).round(2)
    once = len({*zip(lateral, heights.tolist(), strict=True)}) == len(frames)
    several = 1 < len(set(lateral)) <= len(frames) // 3
    return _numbered("place", lateral) if once and several else None


def _shared_clue(frames: list[Frame], places_of: np.ndarray) -> Separator | None:
    """The first clue, or else the first two, that every frame of a volume shares and that gives it each place once."""
    labels = {name: [getattr(frame.clues, name) for frame in frames] for name in Clues._fields if name in WORDS}
    speaking = [name for name, values in labels.items() if len(set(values)) > 1]
    for name in speaking:
        if _complete(labels[name], places_of):
            return _numbered(WORDS[name], labels[name])
    for one, other in combinations(speaking, 2):
        both = list(zip(labels[one], labels[other], strict=True))
        if _complete(both, places_of):
            return _numbered(WORDS[one], both)
    return None


def _running_clue(frames: list[Frame], places_of: np.ndarray) -> Separator | None:
    """The first of the clues that run on of which every volume has a span of its own."""
    for name in RUNNING:
        values = [getattr(frame.clues, name) for frame in frames]
        ranks = _ranks(values, places_of)
        if ranks is not None and _follow(values, ranks):
            return _numbered(WORDS[name], ranks)
    return None


def _overlapping(frames: list[Frame], places_of: np.ndarray) -> Separator | None:
    """Runs that share only some of their places, as of chest and belly: each with even slices and a label of its own."""
    for name in ("image_type", "acquisition", "kernel", "correction", "voltage"):
        labels = [getattr(frame.clues, name) for frame in frames]
        pairs = {*zip(labels, places_of.tolist(), strict=True)}
        if "" in labels or len(set(labels)) < 2 or len(pairs) < len(frames):
            continue
        heights = np.array([frame.position for frame in frames]) @ _normal(frames[0])
        runs = [np.sort(heights[[label == one for label in labels]]) for one in set(labels)]
        if all(len(run) > 2 and np.ptp(np.diff(run)) <= 0.01 * np.diff(run).min() + NEAR_MM for run in runs):
            return _numbered(WORDS[name], labels)
    return None


def _by_instance(frames: list[Frame], places_of: np.ndarray) -> Separator | None:
    """Volume after volume, or at each place one frame of every volume after the other; in no other order."""
    values = [frame.clues.instance for frame in frames]
    ranks = _ranks(values, places_of)
    if ranks is None:
        return None
    in_turn = places_of[np.argsort(np.array(values, float), kind="stable")]
    together = int((np.diff(in_turn) != 0).sum()) == len(set(places_of.tolist())) - 1
    return _numbered("repeat", ranks) if together or _follow(values, ranks) else None


def _complete(labels: Sequence[Hashable], places_of: np.ndarray) -> bool:
    """Whether every label has every place exactly once."""
    pairs = {*zip(labels, places_of.tolist(), strict=True)}
    return len(pairs) == len(labels) == len(set(labels)) * len(set(places_of.tolist()))


def _ranks(values: Sequence[float | None], places_of: np.ndarray) -> list[Hashable] | None:
    """Of each frame among those at its place; None where the values do not tell them apart or places differ in number."""
    counts = np.bincount(places_of)
    if any(value is None for value in values) or counts.min() != counts.max():
        return None
    ranks: list[Hashable] = [0] * len(values)
    for place in range(len(counts)):
        here = sorted((values[n], n) for n in np.flatnonzero(places_of == place).tolist())
        if any(one[0] == other[0] for one, other in pairwise(here)):
            return None
        for rank, (_, n) in enumerate(here):
            ranks[n] = rank
    return ranks


def _follow(values: Sequence[float | None], ranks: Sequence[Hashable]) -> bool:
    """Whether all of one volume come before all of the next."""
    spans: dict[Any, list[Any]] = defaultdict(list)
    for value, rank in zip(values, ranks, strict=True):
        spans[rank].append(value)
    ordered = [spans[rank] for rank in sorted(spans)]
    return all(max(one) < min(other) for one, other in pairwise(ordered))
