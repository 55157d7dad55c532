"""Finished rows of logits become labels on the scan's own grid, a few rows at a time.

Probabilities go back through the resampling before the decision: argmax after resampling keeps thin structures. What was
done before the resampling interpolates nothing, so there the decision goes back instead. What was cropped away is
background. Of regions each is where it is likelier than not, a later one painted over an earlier one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Integer, Shaped
from torch import Tensor

from kernels import resample_argmax
from preprocessing.regions import values_of
from preprocessing.steps import Resample
from preprocessing.volume import Geometry, Volume

from .errors import PackageError
from .maps import PROBABILITIES, MapWriter
from .stream import Rows
from .uncertainty import disagreement, entropy

if TYPE_CHECKING:
    from preprocessing.plan import Plan
    from preprocessing.steps import Trail

Triple = tuple[int, int, int]

FAR = 30.0
"""The logit of what is background without a word from a network, where logits are averaged: e^-30 is no share of 1."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Likely:
    """What all folds together think of some rows."""

    first: int
    scores: Float[Tensor, "K row one other"]
    """Probabilities; of a plan that averages logits, these."""
    beside: dict[str, Float[Tensor, "row one other"]]
    """What is interpolated with them: uncertainty by its kind, and of logits the probability of what won."""


STRENGTH = "strength"


@dataclass(frozen=True, kw_only=True)
class Judge:
    """How folds are brought together."""

    plan: "Plan"
    temperatures: Sequence[float]
    """What each fold's logits are divided by before they become probabilities."""
    kinds: tuple[str, ...] = ()
    """What maps are asked for."""
    culprit: str = ""
    """Whose answer it is, for the message that it is none."""

    @torch.inference_mode()
    def weigh(self, rows: Rows) -> Likely:
        """Of logits rows of scores."""
        for logits in rows.logits:
            self._refuse_no_numbers(logits)
        averages_logits = self.plan.averages == "logits"
        wants_members = "folds" in self.kinds or not averages_logits
        members = [probabilities(logits, self.plan, temperature) if wants_members else logits
                   for logits, temperature in zip(rows.logits, self.temperatures, strict=True)]  # fmt: skip
        scores = _mean(rows.logits if averages_logits else members)
        likely = probabilities(scores, self.plan) if averages_logits else scores
        if rows.unseen is not None:
            self._blank(likely, rows.unseen, 1.0)
            if averages_logits:
                self._blank(scores, rows.unseen, FAR)
        beside = {kind: self._uncertain(kind, likely, members, rows) for kind in self.kinds if kind != PROBABILITIES}
        if averages_logits and not self.plan.has_regions:
            beside[STRENGTH] = likely.amax(dim=0)
        return Likely(first=rows.first, scores=scores, beside=beside)

    def _blank(self, scores: Tensor, unseen: Tensor, certain: float) -> None:
        scores.masked_fill_(unseen, self.outside[-1])
        if not self.plan.has_regions:
            scores[0].masked_fill_(unseen, certain)

    def _uncertain(self, kind: str, likely: Tensor, members: Sequence[Tensor], rows: Rows) -> Tensor:
        if kind == "entropy":
            return entropy(likely, self.plan.has_regions)
        if kind == "folds":
            found = disagreement(likely, members, self.plan.has_regions)
        else:
            assert rows.flips is not None
            found = rows.flips
        return found if rows.unseen is None else found.masked_fill(rows.unseen, 0)

    @property
    def outside(self) -> list[float]:
        """The scores of background."""
        if self.plan.averages == "logits":
            return [-FAR] * self.plan.classes if self.plan.has_regions else [FAR, *[0.0] * (self.plan.classes - 1)]
        return [0.0 if self.plan.has_regions else 1.0, *[0.0] * (self.plan.classes - 1)]

    @property
    def threshold(self) -> float | None:
        """Above which a region is there."""
        if not self.plan.has_regions:
            return None
        return 0.0 if self.plan.averages == "logits" else 0.5

    def _refuse_no_numbers(self, logits: Tensor) -> None:
        if not bool(logits.sum().isfinite()):  # a decision between no numbers would be a guess
            raise PackageError(
                f"{self.culprit or 'the network'} answered this scan with values that are no numbers; finite logits are "
                "needed. Look at the scan's intensities with `hilum check`, and at the package's scores; if only bfloat16 "
                "does it, leave --precision out."
            )


def probabilities(logits: Float[Tensor, "K i j k"], plan: "Plan", temperature: float = 1.0) -> Float[Tensor, "K i j k"]:
    """Logits as probabilities: classes share 1 among them; regions, which may overlap, each have a yes and a no."""
    logits = logits / temperature if temperature != 1 else logits
    return logits.sigmoid() if plan.has_regions else logits.softmax(dim=0)


def _mean(members: Sequence[Tensor]) -> Tensor:
    if len(members) == 1:
        return members[0]
    total = members[0] + members[1]
    for member in members[2:]:
        total.add_(member)
    return total.div_(len(members))


# where rows lie


@dataclass(frozen=True, kw_only=True, eq=False)
class Ground:
    """Where the rows of a stream lie on the way back to the scan."""

    axis: int
    """Along which rows come."""
    origin: Triple
    """Of the streamed box: the voxel of the grid after resampling at which it begins."""
    streamed: Triple
    """The box's shape, its axes as they are on the grid."""
    resampled: Triple
    """The shape after resampling."""
    geometry: Geometry
    """Before resampling, where the decision is made."""
    nearest: int | None
    """The axis along which nothing is interpolated."""
    before: "Trail"
    """What leads from there to the scan's own grid."""

    @staticmethod
    def under(prepared: Geometry, trail: "Trail", axis: int, start: Triple, shape: Triple) -> "Ground":
        """Of a box of that shape in a prepared scan, rows along an axis."""
        before, resampled, _ = trail.parted()
        there = resampled.after if resampled else prepared
        away = there.to_voxel(prepared.to_world(start))
        assert np.abs(away - away.round()).max() < 0.01, "after resampling grids only grow and are cut"
        i, j, k = (round(float(n)) for n in away)
        nearest = (
            resampled.step.separate_back(resampled.before)
            if resampled and isinstance(resampled.step, Resample)
            else None
        )
        return Ground(
            axis=axis, origin=(i, j, k), streamed=shape, resampled=there.shape,
            geometry=resampled.before if resampled else prepared, nearest=nearest, before=before,
        )  # fmt: skip

    @property
    def order(self) -> Triple:
        """Of axes, that of the rows first."""
        first, second, third = sorted(range(3), key=lambda axis: axis != self.axis)
        return first, second, third

    @property
    def shape(self) -> Triple:
        """Where the decision is made, rows first."""
        i, j, k = (self.geometry.shape[axis] for axis in self.order)
        return i, j, k

    @property
    def depth(self) -> int:
        """Rows after resampling."""
        return self.resampled[self.axis]

    def planes(self, first: int, rows: Float[Tensor, "K row one other"], outside: Sequence[float]) -> Tensor | None:
        """Rows of the box as rows of the whole grid after resampling; None where none of them lies in it."""
        low = max(0, -(first + self.origin[self.axis]))
        high = min(rows.shape[1], self.depth - first - self.origin[self.axis])
        if high <= low:
            return None
        inside, place, is_cut = [slice(None), slice(low, high)], [slice(None), slice(None)], True
        for axis in self.order[1:]:
            start, size, whole = self.origin[axis], self.streamed[axis], self.resampled[axis]
            inside.append(slice(max(0, -start), max(0, min(size, whole - start))))
            place.append(slice(max(0, start), max(0, min(whole, start + size))))
            is_cut &= place[-1] == slice(0, whole)
        if is_cut:
            return rows[tuple(inside)]
        whole_planes = self.blank(high - low, outside, rows)
        whole_planes[tuple(place)] = rows[tuple(inside)]
        return whole_planes

    def blank(self, count: int, outside: Sequence[float], like: Tensor) -> Tensor:
        """Rows that nobody looked at."""
        one, other = (self.resampled[axis] for axis in self.order[1:])
        values = torch.tensor(outside, dtype=like.dtype, device=like.device)
        return values[:, None, None, None].expand(-1, count, one, other).clone()

    @cached_property
    def scanned(self) -> tuple[slice, slice, slice]:
        """What of the grid of the decision comes back to the scan, rows first: a step may grow what another has cut."""
        low, high = np.zeros(3, int), np.array(self.geometry.shape)
        for one in self.before.taken:
            corners = self.geometry.to_voxel(one.before.corners_mm).round().astype(int)
            low, high = np.maximum(low, corners.min(axis=0)), np.minimum(high, corners.max(axis=0) + 1)
        i, j, k = (slice(int(low[axis]), int(high[axis])) for axis in self.order)
        return i, j, k

    @property
    def around(self) -> tuple[int, int]:
        """Rows before and behind the box."""
        start = self.origin[self.axis]
        return max(0, start), max(0, self.depth - start - self.streamed[self.axis])


# decided


@dataclass(frozen=True, kw_only=True, eq=False)
class Decision:
    """Every voxel's label where it was decided, and how sure that is."""

    voxels: Shaped[np.ndarray, "i j k"]
    ground: Ground
    confidence: "Confidence"

    def labels(self, like: Volume) -> Volume:
        """On the scan's own grid; `like`: whose origin they have."""
        there = like.with_voxels(self.voxels[None], geometry=self.ground.geometry, channels=("labels",))
        back = self.ground.before.undo(there)
        return back.with_voxels(np.ascontiguousarray(back.voxels))


def decide(
    likely: Iterator[Likely], ground: Ground, judge: Judge, *, writer: MapWriter | None = None,
    keeps_strength: bool = False,
) -> Decision:  # fmt: skip
    """In one pass over the rows. `keeps_strength`: how sure each voxel is will be asked once more, when rules have
    changed labels."""
    plan = judge.plan
    labels = np.empty(ground.geometry.shape, plan.lookup.dtype)
    planes = np.moveaxis(labels, ground.axis, 0)
    confidence = Confidence(plan=plan, ground=ground, keeps=keeps_strength)
    beside = _Beside(ground=ground, plan=plan, writer=writer)
    found = resample_argmax.stream(
        _slabs(likely, ground, judge, beside), ground.depth, ground.shape,
        threshold=judge.threshold, nearest=_nearest(ground),
    )  # fmt: skip
    done = 0
    for some, winner in found:
        numbers = some.cpu().numpy()
        planes[done : done + len(numbers)] = plan.lookup[numbers]
        for number, strength in zip(numbers, _strength(winner, judge, beside), strict=True):
            confidence.add(done, number, strength)
            done += 1
    return Decision(voxels=labels, ground=ground, confidence=confidence)


def _strength(winner: Tensor, judge: Judge, beside: "_Beside") -> Sequence[np.ndarray]:
    """The probability of what won, row after row."""
    if judge.plan.averages == "logits" and not judge.plan.has_regions:
        return [beside.strength.pop(0) for _ in winner]
    if judge.plan.averages == "logits":
        winner = winner.sigmoid()
    found: np.ndarray = winner.cpu().numpy()
    return list(found)


def _nearest(ground: Ground) -> int | None:
    return None if ground.nearest is None else ground.order.index(ground.nearest)


def _slabs(likely: Iterator[Likely], ground: Ground, judge: Judge, beside: "_Beside") -> Iterator[Tensor]:
    """Every row after resampling, in order; what lies beside them is taken care of as they pass."""
    above, below = ground.around
    seen: Likely | None = None
    for some in likely:
        if seen is None:
            yield from _nobodys(above, some, ground, judge, beside)
        seen = some
        planes = ground.planes(some.first, some.scores, judge.outside)
        if planes is not None:
            beside.take(some, planes)
            yield planes
    assert seen is not None
    yield from _nobodys(below, seen, ground, judge, beside)


def _nobodys(count: int, like: Likely, ground: Ground, judge: Judge, beside: "_Beside") -> Iterator[Tensor]:
    for _ in range(count):
        planes = ground.blank(1, judge.outside, like.scores)
        beside.take(None, planes, tuple(like.beside))
        yield planes


@dataclass(kw_only=True)
class _Beside:
    """Maps of probabilities and uncertainty, made and written as rows pass."""

    ground: Ground
    plan: "Plan"
    writer: MapWriter | None
    strength: list[Float[np.ndarray, "one other"]] = field(default_factory=list)
    """Of rows that were interpolated and not yet asked for."""
    scores: resample_argmax.Between | None = None
    maps: resample_argmax.Between | None = None
    written: int = 0

    def take(self, some: Likely | None, planes: Tensor, kinds: tuple[str, ...] = ()) -> None:
        """Rows, or those that nobody looked at."""
        kinds = tuple(some.beside) if some else kinds
        if not kinds and not (self.writer and self.writer.labels):
            return
        self.scores = self.scores or self._between()
        self.maps = self.maps or self._between()
        maps = self._maps(some, planes, kinds)
        for number in range(planes.shape[1]):
            likely = list(self.scores.take(planes[:, number])) if self.writer and self.writer.labels else []
            unsure = list(self.maps.take(maps[:, number])) if kinds else []
            for row in range(max(len(likely), len(unsure))):
                self._write(likely[row] if likely else None, unsure[row] if unsure else None, kinds)

    def _maps(self, some: Likely | None, planes: Tensor, kinds: tuple[str, ...]) -> Tensor:
        outside = [float(kind == STRENGTH) for kind in kinds]
        if some is None or not kinds:
            return self.ground.blank(planes.shape[1], outside, planes)
        made = self.ground.planes(some.first, torch.stack([some.beside[kind] for kind in kinds]), outside)
        assert made is not None
        return made

    def _write(self, likely: Tensor | None, unsure: Tensor | None, kinds: tuple[str, ...]) -> None:
        found = {} if unsure is None else dict(zip(kinds, unsure, strict=True))
        if STRENGTH in found:
            self.strength.append(found.pop(STRENGTH).cpu().numpy())
        if likely is not None and self.plan.averages == "logits":
            likely = probabilities(likely[:, None], self.plan)[:, 0]
        if self.writer:
            self.writer.rows(
                self.written,
                None if likely is None else likely[:, None],
                {kind: map_[None] for kind, map_ in found.items()},
            )
        self.written += 1

    def _between(self) -> resample_argmax.Between:
        return resample_argmax.Between(self.ground.depth, self.ground.shape, _nearest(self.ground))


CODES = 2**16 - 1
"""How finely a probability is kept until rules have been applied: a mean of such is off by a hundred thousandth at most."""


@dataclass(kw_only=True)
class Confidence:
    """How sure labels are: sums over voxels as they are decided, or, where rules will change labels, what sums need."""

    plan: "Plan"
    ground: Ground
    """On which planes come."""
    keeps: bool
    kept: list[Integer[np.ndarray, " voxel"]] = field(default_factory=list)
    """Plane by plane, of each voxel with a label."""
    sums: Float[np.ndarray, "decided kept"] = field(init=False)
    counts: Float[np.ndarray, "decided kept"] = field(init=False)
    """Of voxels decided to be one number that rules made another."""

    def __post_init__(self) -> None:
        self.sums, self.counts = np.zeros((2, len(self.plan.lookup), len(self.plan.lookup)))

    def add(
        self, row: int, numbers: Integer[np.ndarray, "one other"], strength: Float[np.ndarray, "one other"]
    ) -> None:
        """The next plane; what lies beyond the scan does not count."""
        rows, *within = self.ground.scanned
        if not rows.start <= row < rows.stop:
            return
        numbers, strength = numbers[tuple(within)], strength[tuple(within)]
        if self.keeps:
            self.kept.append(np.rint(strength[numbers != 0] * CODES).astype(np.uint16))
        else:
            self._count(numbers.ravel(), numbers.ravel(), strength.ravel())

    def of(self, labels: Volume, decided: Volume) -> dict[str, float]:
        """Mean probability of each label where it won and was kept; what a rule filled in won nothing and does not count.

        A region is also where the regions within it won, with the probability of these.
        """
        if self.keeps:
            self._recount(self._planes(labels), self._planes(decided))
        numbers = {value: number for number, value in enumerate(self.plan.lookup.tolist())}
        found = {}
        for name, values in values_of(self.plan.labels).items():
            own = np.ix_([numbers[value] for value in values], [numbers[value] for value in values])
            if count := self.counts[own].sum():
                found[name] = round(float(self.sums[own].sum() / count), 4)
        return found

    def _recount(
        self, after: Shaped[np.ndarray, "plane one other"], decided: Shaped[np.ndarray, "plane one other"]
    ) -> None:
        number = np.zeros(int(self.plan.lookup.max()) + 1, np.int64)
        number[self.plan.lookup] = np.arange(len(self.plan.lookup))
        for now, then, codes in zip(after, decided, self.kept, strict=True):
            has_label = then != 0
            self._count(number[then[has_label]], number[now[has_label]], codes / CODES)

    def _planes(self, labels: Volume) -> Shaped[np.ndarray, "plane one other"]:
        """On the grid of the decision, in its order."""
        return np.moveaxis(self.ground.before.follow(labels).voxels[0], self.ground.axis, 0)[self.ground.scanned]

    def _count(
        self,
        decided: Integer[np.ndarray, " voxel"],
        now: Integer[np.ndarray, " voxel"],
        strength: Float[np.ndarray, " voxel"],
    ) -> None:
        size = len(self.plan.lookup)
        pairs = decided.astype(np.int64) * size + now
        self.counts += np.bincount(pairs, minlength=size * size).reshape(size, size)
        self.sums += np.bincount(pairs, weights=strength, minlength=size * size).reshape(size, size)
