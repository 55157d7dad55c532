"""What is done to a label map once it is decided: rules that help on cases no training saw, and the proof that they do.

A rule is taken when, over all held-out cases, no label's mean Dice falls, their mean rises, and it makes more cases
better than worse beyond chance (a one-sided sign test over the cases it changes at all, p <= 0.05: five of five, seven
of eight). So five cases must have gained before a package takes anything away: what is lost may be a finding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import comb
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Integer
from scipy import ndimage

from preprocessing.components import TOUCHING
from preprocessing.plan import Plan
from preprocessing.records import BadRecord
from preprocessing.regions import around, carrying, values_of
from preprocessing.volume import Volume


def clean(labels: Volume, rules: Sequence["Rule"], plan: Plan) -> tuple[Volume, tuple["Applied", ...]]:
    """The label map after every rule in turn, and what each of them changed."""
    if not rules:
        return labels, ()
    voxels = labels.voxels[0].copy()
    done = []
    for rule in rules:
        edit = _edit(rule, _parts(voxels, rule.label, plan), labels.geometry.voxel_ml)
        done.append(_applied(rule, edit, plan, labels.geometry.voxel_ml))
        if edit:
            edit.voxels[edit.where] = plan.lookup[edit.becomes]  # a view: it is the map that changes
    return labels.with_voxels(voxels[None]), tuple(done)


@dataclass(frozen=True, kw_only=True)
class LargestOfAll:
    """Of everything that was found, whatever its label, only the largest connected part is kept."""

    kind: ClassVar[str] = "largest_of_all"
    label: ClassVar[str] = ""

    @property
    def words(self) -> str:
        return "of everything found, only the largest connected part is kept"

    def where(self, parts: "Parts", voxel_ml: float) -> Bool[np.ndarray, "i j k"]:
        return parts.but_the_largest


@dataclass(frozen=True, kw_only=True)
class Largest:
    """Only the largest connected part of a label is kept."""

    kind: ClassVar[str] = "largest"

    label: str

    @property
    def words(self) -> str:
        return f"only the largest part of {self.label} is kept"

    def where(self, parts: "Parts", voxel_ml: float) -> Bool[np.ndarray, "i j k"]:
        return parts.but_the_largest


@dataclass(frozen=True, kw_only=True)
class NoSmaller:
    """Connected parts of a label below a volume are dropped."""

    kind: ClassVar[str] = "no_smaller"

    label: str
    ml: float

    def __post_init__(self) -> None:
        if not 0 < self.ml < np.inf:
            raise BadRecord(f"rule no_smaller: {self.ml} ml was met; a volume above 0 is needed. Correct it.")

    @property
    def words(self) -> str:
        return f"parts of {self.label} below {self.ml:g} ml are dropped"

    def where(self, parts: "Parts", voxel_ml: float) -> Bool[np.ndarray, "i j k"]:
        small = parts.sizes * voxel_ml < self.ml
        small[0] = False  # number 0 is no part
        return small[parts.numbers]


@dataclass(frozen=True, kw_only=True)
class NoHoles:
    """Background that a label encloses on all sides becomes that label."""

    kind: ClassVar[str] = "no_holes"

    label: str

    @property
    def words(self) -> str:
        return f"holes in {self.label} are filled"

    def where(self, parts: "Parts", voxel_ml: float) -> Bool[np.ndarray, "i j k"]:
        return ndimage.binary_fill_holes(parts.mask) & (parts.voxels == 0)


Rule = LargestOfAll | Largest | NoSmaller | NoHoles


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What a rule did to one case; a region loses and gains what the regions within it do."""

    rule: str
    removed_ml: dict[str, float] = field(default_factory=dict)
    """Label -> millilitres it lost; labels that lost nothing are left out."""
    added_ml: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a rule would have done to the held-out cases of a fold: all that a choice over several folds needs."""

    rule: Rule
    better: int
    """Cases whose Dice would have risen (the sum over labels)."""
    worse: int
    rises: dict[str, float] = field(default_factory=dict)
    """Label -> Dice with the rule less Dice without, summed over cases. A label that is rightly gone has Dice 1."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What the cases that a fold was not trained on say of it."""

    cases: dict[str, dict[str, float]] = field(default_factory=dict)
    """Case -> label -> Dice, as the network alone has it. A case goes by a hash of its scan: packages travel."""
    trials: tuple[Trial, ...] = ()
    """Of every candidate that changed a Dice; one that is not here changed none."""

    @staticmethod
    def of(
        cases: Mapping[str, Mapping[str, float]], changes: Mapping[str, Mapping["Rule", Mapping[str, float]]]
    ) -> "HeldOut":
        """From what `tried` said of each case."""
        rises: dict[Rule, list[dict[str, float]]] = {}
        for case, by_rule in changes.items():
            for rule, dice in by_rule.items():
                rises.setdefault(rule, []).append({label: now - cases[case][label] for label, now in dice.items()})
        trials = tuple(_summed(rule, some) for rule, some in sorted(rises.items(), key=lambda item: item[0].words))
        return HeldOut(cases={case: dict(dice) for case, dice in cases.items()}, trials=trials)


def _summed(rule: Rule, rises: Sequence[Mapping[str, float]]) -> Trial:
    sides = [sum(rise.values()) for rise in rises]
    labels = sorted({label for rise in rises for label in rise})
    return Trial(
        rule=rule,
        better=sum(side > 0 for side in sides),
        worse=sum(side < 0 for side in sides),
        rises={label: round(sum(rise.get(label, 0.0) for rise in rises), 6) for label in labels},
    )


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A rule that is applied, and why."""

    rule: Rule
    dice_before: dict[str, float]
    """Label -> mean Dice over held-out cases, of the labels it changed."""
    dice_after: dict[str, float]
    cases: int
    """Held-out cases it was tried on."""
    better: int
    """Cases whose Dice rose (the mean over labels)."""
    worse: int
    folds: tuple[str, ...]
    """Whose held-out cases these were."""


# choosing


CHANCE = 0.05
"""How likely the cases may be to side so clearly with a rule that neither helps nor harms."""


def choose(folds: Mapping[str, HeldOut], plan: Plan) -> tuple[Chosen, ...]:
    """The rules that help on held-out cases, in the order of their application; often none.

    Each label is touched by one rule at most, so that together they do exactly what each was seen to do alone.
    """
    accepted = [chosen for rule in candidates(plan) if (chosen := _judged(rule, folds)) and _helps(chosen)]
    ranked = sorted(accepted, key=lambda chosen: -round(_gain(chosen), 4))  # stable: of equals, the milder comes first
    apart = _apart([chosen for chosen in ranked if chosen.rule.label], plan)
    whole = [chosen for chosen in ranked if not chosen.rule.label][:1]
    best = max(apart, whole, key=lambda some: sum(map(_gain, some)))
    return tuple(sorted(best, key=lambda chosen: not isinstance(chosen.rule, NoHoles)))  # what is filled stays filled


PART_SIZES = (8, 32, 128, 512, 2048, 8192)
"""Candidates for the smallest part that is kept, in prepared voxels: of the size of speckle, then fourfold, to organs."""


def candidates(plan: Plan) -> tuple[Rule, ...]:
    """Every rule that is tried, the milder before the harsher. The plan alone decides, so that all folds try the same."""
    voxel_ml = float(np.prod(plan.spacing_mm)) / 1000
    sizes = tuple(dict.fromkeys(float(f"{size * voxel_ml:.2g}") for size in PART_SIZES))
    each: list[Rule] = [LargestOfAll()] if len(plan.labels) > 1 else []
    for label in plan.labels:
        each += [NoHoles(label=label.name), *(NoSmaller(label=label.name, ml=ml) for ml in sizes)]
        each.append(Largest(label=label.name))
    return tuple(each)


def _judged(rule: Rule, folds: Mapping[str, HeldOut]) -> Chosen | None:
    """What all folds say of a rule together."""
    trials = [trial for fold in folds.values() for trial in fold.trials if trial.rule == rule]
    if not trials:
        return None
    cases = [dice for fold in folds.values() for dice in fold.cases.values()]
    before = {label: [dice[label] for dice in cases if label in dice] for trial in trials for label in trial.rises}
    rises = {label: sum(trial.rises.get(label, 0.0) for trial in trials) for label in before}
    return Chosen(
        rule=rule,
        dice_before={label: round(float(np.mean(scores)), 4) for label, scores in before.items()},
        dice_after={label: round((sum(scores) + rises[label]) / len(scores), 4) for label, scores in before.items()},
        cases=len(cases),
        better=sum(trial.better for trial in trials),
        worse=sum(trial.worse for trial in trials),
        folds=tuple(name for name, fold in folds.items() if fold.cases),
    )


def _helps(chosen: Chosen) -> bool:
    falls = any(chosen.dice_after[label] < before for label, before in chosen.dice_before.items())
    return not falls and _gain(chosen) > 0 and sign_test(chosen.better, chosen.worse) <= CHANCE


def _gain(chosen: Chosen) -> float:
    return sum(chosen.dice_after[label] - before for label, before in chosen.dice_before.items())


def sign_test(better: int, worse: int) -> float:
    """How likely at least so many of the changed cases become better, when each does by the toss of a coin."""
    changed = better + worse
    return sum(comb(changed, heads) for heads in range(better, changed + 1)) / 2**changed


def _apart(ranked: Sequence[Chosen], plan: Plan) -> list[Chosen]:
    """The best of them that do not touch each other's labels."""
    taken: list[Chosen] = []
    touched: set[str] = set()
    for chosen in ranked:
        reach = _reach(chosen.rule, plan)
        if not reach & touched:
            taken.append(chosen)
            touched |= reach
    return taken


def _reach(rule: Rule, plan: Plan) -> set[str]:
    """Labels a rule can change: what is taken away takes along what lies in it, what is filled fills what lies around."""
    inside = covers(plan)[:, 1:]
    number = [label.name for label in plan.labels].index(rule.label)
    reached = inside[:, number] if isinstance(rule, NoHoles) else inside[number]
    return {label.name for label, is_in in zip(plan.labels, reached, strict=True) if is_in}


# the evidence of one case


def dice_of(labels: Volume, reference: Volume, plan: Plan, annotated: Sequence[str] | None = None) -> dict[str, float]:
    """Dice per label of one held-out case, as `tried` has it."""
    return _scored(_counts(labels.voxels[0], plan.numbered(reference.voxels[0]), plan), plan, annotated)


def _scored(
    counts: Integer[np.ndarray, "found truth"], plan: Plan, annotated: Sequence[str] | None
) -> dict[str, float]:
    return {name: dice for name, dice in _dice(counts, plan).items() if annotated is None or name in annotated}


def tried(
    labels: Volume, reference: Volume, plan: Plan, annotated: Sequence[str] | None = None
) -> tuple[dict[str, float], dict[Rule, dict[str, float]]]:
    """Dice per label of one held-out case, and of each candidate rule what it would have changed.

    Only annotated labels are scored; voxels of which nobody knows the truth do not count. A label that is empty in both
    has no Dice.
    """
    found, truth = labels.voxels[0], plan.numbered(reference.voxels[0])
    counts = _counts(found, truth, plan)
    before = _scored(counts, plan, annotated)
    changes: dict[Rule, dict[str, float]] = {}
    parts: dict[str, Parts | None] = {}
    for rule in candidates(plan):
        if rule.label not in parts:
            parts = {rule.label: _parts(found, rule.label, plan)}  # kept from rule to rule of one label, no longer
        edit = _edit(rule, parts[rule.label], labels.geometry.voxel_ml)
        if edit is None:
            continue
        was, true = edit.voxels[edit.where], truth[edit.box][edit.where]
        becomes = np.full_like(was, plan.lookup[edit.becomes])
        after = _dice(counts - _counts(was, true, plan) + _counts(becomes, true, plan), plan)
        now = {name: after.get(name, 1.0) for name in before}
        changes[rule] = {name: score for name, score in now.items() if score != before[name]}
    return before, {rule: dice for rule, dice in changes.items() if dice}


def _counts(
    found: Integer[np.ndarray, "..."], truth: Integer[np.ndarray, "..."], plan: Plan
) -> Integer[np.ndarray, "found truth"]:
    """How many voxels have which number among the labels, and which among the parts; what nobody knows is left out."""
    number = np.zeros(int(plan.lookup.max()) + 1, dtype=np.int64)
    number[plan.lookup] = np.arange(len(plan.lookup))
    rows, columns = len(plan.lookup), len(plan.parts) + 2
    total = np.zeros(rows * columns, dtype=np.int64)
    for slab, true in zip(found, truth, strict=True) if found.ndim == 3 else [(found, truth)]:
        total += np.bincount((number[slab] * columns + true + 1).ravel(), minlength=rows * columns)
    return total.reshape(rows, columns)[:, 1:]


def _dice(counts: Integer[np.ndarray, "found truth"], plan: Plan) -> dict[str, float]:
    inside, membership = covers(plan).astype(np.int64), plan.membership.astype(np.int64)
    sizes = inside @ counts.sum(axis=1) + membership @ counts.sum(axis=0)
    overlaps = np.einsum("lf,ft,lt->l", inside, counts, membership)
    pairs = zip(plan.labels, overlaps.tolist(), sizes.tolist(), strict=True)
    return {label.name: round(2 * overlap / size, 6) for label, overlap, size in pairs if size}


# one rule on one map


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """Where a label lies in a map, cut to its box, and the connected parts it falls into."""

    box: tuple[slice, slice, slice]
    voxels: Integer[np.ndarray, "i j k"]
    """The map inside the box: a view."""
    mask: Bool[np.ndarray, "i j k"]
    beneath: int
    """The number that remains where the label is taken away."""
    own: int
    """The number of the label itself; 0 for all labels together."""

    @cached_property
    def numbers(self) -> Integer[np.ndarray, "i j k"]:
        numbers, _ = ndimage.label(self.mask, structure=TOUCHING)
        return numbers

    @cached_property
    def sizes(self) -> Integer[np.ndarray, " part"]:
        """Voxels of each part, in the order of their first voxels; of number 0, voxels of no part."""
        return np.bincount(self.numbers.ravel())

    @property
    def but_the_largest(self) -> Bool[np.ndarray, "i j k"]:
        largest = 1 + int(self.sizes[1:].argmax())  # of two as large, the one that begins first
        return self.mask & (self.numbers != largest)


@dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """Voxels that get another number."""

    box: tuple[slice, slice, slice]
    voxels: Integer[np.ndarray, "i j k"]
    where: Bool[np.ndarray, "i j k"]
    becomes: int


def _edit(rule: Rule, parts: Parts | None, voxel_ml: float) -> Edit | None:
    if parts is None:
        return None
    where = rule.where(parts, voxel_ml)
    becomes = parts.own if isinstance(rule, NoHoles) else parts.beneath
    return Edit(box=parts.box, voxels=parts.voxels, where=where, becomes=becomes) if where.any() else None


def _parts(voxels: Integer[np.ndarray, "i j k"], label: str, plan: Plan) -> Parts | None:
    """Where that label lies, with all that lies in it; every label where the name is empty; None where it is not found."""
    names = [each.name for each in plan.labels]
    if label and label not in names:
        raise BadRecord(f"a rule is for {label!r}; the labels are {', '.join(names)}. Use one of these.")
    own = 1 + names.index(label) if label else 0
    values = values_of(plan.labels)[label] if label else tuple(each.value for each in plan.labels)
    box = around(ndimage.find_objects(voxels, max_label=int(plan.lookup.max())), values)
    if box is None:
        return None
    inside = voxels[box]
    return Parts(box=box, voxels=inside, mask=carrying(inside, values), beneath=_beneath(plan, own), own=own)


def covers(plan: Plan) -> Bool[np.ndarray, "label found"]:
    """Which numbers of `plan.lookup` in a map count as each label: its own, and those of regions that lie within it."""
    values = values_of(plan.labels)
    return np.array([[False, *(inner.value in values[outer.name] for inner in plan.labels)] for outer in plan.labels])


def _beneath(plan: Plan, number: int) -> int:
    """What is left when a region is taken away: the smallest region around it, where there is one."""
    if number == 0:
        return 0
    sizes = plan.membership.sum(axis=1)
    around = [n for n in range(len(plan.labels)) if covers(plan)[n, number] and sizes[n] > sizes[number - 1]]
    return 1 + min(around, key=lambda n: sizes[n]) if around else 0


def _applied(rule: Rule, edit: Edit | None, plan: Plan, voxel_ml: float) -> Applied:
    if edit is None:
        return Applied(rule=rule.words)
    was, becomes = edit.voxels[edit.where], int(plan.lookup[edit.becomes])
    lost, gained = {}, {}
    for name, values in values_of(plan.labels).items():
        before = int(carrying(was, values).sum())
        if becomes in values:
            gained[name] = len(was) - before
        else:
            lost[name] = before
    return Applied(rule=rule.words, removed_ml=_volumes(lost, voxel_ml), added_ml=_volumes(gained, voxel_ml))


def _volumes(counts: Mapping[str, int], voxel_ml: float) -> dict[str, float]:
    return {name: round(count * voxel_ml, 6) for name, count in counts.items() if count}
