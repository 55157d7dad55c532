"""A scan through its networks, window by window: a row of it is finished, and leaves, as soon as no window reaches it.

Windows come in order along one axis of the prepared grid. Beside the scan only the sums of those rows are held that
windows still to come will add to, as many as a window has: all classes over all voxels never exist. What is done to
which voxel in which order is what summing over the whole grid at once would do, to the bit (tests/pipeline/dense.py).
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from mmap import MADV_DONTNEED
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from kernels import window_blend
from preprocessing.patches import Rule, bell, grid

from .report import WindowCount
from .uncertainty import entropies

Triple = tuple[int, int, int]

HOST = torch.device("cpu")

AT_ONCE = 2**22
"""Logits of finished rows that leave together: a few times what a processor's caches hold, and nothing beside a slab."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """Where windows lie in a prepared scan, and how much each is trusted there: a product of three vectors."""

    patch: Triple
    starts: list[Triple]
    bells: tuple[Tensor, Tensor, Tensor]
    """Of one window, along each of its axes."""
    sums: tuple[Tensor, Tensor, Tensor]
    """Of all windows, along each axis of the scan."""

    @staticmethod
    def over(shape: Triple, patch: Triple, overlap: float, rule: Rule = "hilum") -> "Windows":
        starts = grid(shape, patch, overlap, rule)
        i, j, k = (torch.from_numpy(bell(side, rule)) for side in patch)
        sums = tuple(torch.zeros(size) for size in shape)
        for axis, (along, weight) in enumerate(zip(sums, (i, j, k), strict=True)):
            for start in sorted({start[axis] for start in starts}):
                along[start : start + patch[axis]] += weight
        return Windows(patch=patch, starts=starts, bells=(i, j, k), sums=(sums[0], sums[1], sums[2]))

    @property
    def shape(self) -> Triple:
        """Of what they cover."""
        i, j, k = (len(along) for along in self.sums)
        return i, j, k

    def place(self, start: Triple) -> tuple[slice, slice, slice]:
        """The window's voxels in the scan."""
        i, j, k = (slice(first, first + side) for first, side in zip(start, self.patch, strict=True))
        return i, j, k

    def share(self, start: Triple) -> Float[Tensor, "i j k"]:
        """What a window has to say of each of its voxels, of all windows that see it."""
        i, j, k = (
            weight / along[side] for weight, along, side in zip(self.bells, self.sums, self.place(start), strict=True)
        )
        return i[:, None, None] * j[None, :, None] * k[None, None, :]

    @property
    def axis(self) -> int:
        """Along which they come: where the fewest voxels must be held, which is the longest axis but for flat windows."""
        return min(range(3), key=lambda axis: (self.held(axis), -self.shape[axis]))

    def held(self, axis: int) -> int:
        """Voxels whose sums are held when windows come along that axis: a window's rows of the whole grid."""
        i, j, k = (self.patch[n] if n == axis else size for n, size in enumerate(self.shape))
        return i * j * k

    def layers(self, axis: int) -> list[list[Triple]]:
        """Windows that begin in one row, row after row; within it in the order of `starts`."""
        firsts = sorted({start[axis] for start in self.starts})
        return [[start for start in self.starts if start[axis] == first] for first in firsts]

    def weights(self, axis: int, rows: slice) -> Float[Tensor, "row one other"]:
        """What finished rows are divided by."""
        i, j, k = (along[rows] if n == axis else along for n, along in enumerate(self.sums))
        return (i[:, None, None] * j[None, :, None] * k[None, None, :]).movedim(axis, 0)


@dataclass(frozen=True, kw_only=True)
class Region:
    """A box of prepared voxels."""

    start: Triple
    stop: Triple
    """The first voxel behind it along each axis."""

    def holding(self, patch: Triple, shape: Triple) -> "Region":
        """Grown evenly until a window fits in, and moved inside the grid."""
        start, stop = [], []
        for first, last, side, size in zip(self.start, self.stop, patch, shape, strict=True):
            first, last = max(0, first), min(size, last)
            width = max(side, last - first)
            first = min(max(0, first - (width - (last - first)) // 2), size - width)
            start.append(first)
            stop.append(first + width)
        return Region(start=(start[0], start[1], start[2]), stop=(stop[0], stop[1], stop[2]))

    @property
    def shape(self) -> Triple:
        i, j, k = (last - first for first, last in zip(self.start, self.stop, strict=True))
        return i, j, k


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Finished rows, the axis of the windows' order first."""

    first: int
    logits: list[Float[Tensor, "K row one other"]]
    """Of each fold."""
    unseen: Bool[Tensor, "row one other"] | None = None
    """Voxels that no computed window reached: background."""
    flips: Float[Tensor, "row one other"] | None = None
    """How much mirrored passes contradict each other."""


@dataclass(kw_only=True)
class Ladder:
    """What is given up, step by step, when a GPU has no memory left: speed first, digits last, and each step is said."""

    batch: int = 1
    place: torch.device = HOST
    """Where sums lie."""
    precision: str = "float32"
    words: list[str] = field(default_factory=list)

    def insist(self, work: Callable[[], Any]) -> Any:
        """What the work gives, with as little as it takes. Any other error is nobody's to swallow."""
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                if not self.give_up_something():
                    raise
            # not where the error is at hand: it holds every tensor of the attempt
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def give_up_something(self) -> bool:
        """Whether there was something left to give up."""
        if self.batch > 1:
            self.batch //= 2
            self.words.append(f"the GPU had no memory left: {self.batch} window(s) at once from there on")
        elif self.place != HOST:
            self.place = HOST
            self.words.append("the GPU had no memory left: windows were summed in the computer's memory from there on")
        elif self.precision == "float32":
            self.precision = "bfloat16"
            self.words.append(
                "the GPU had no memory left: networks computed in bfloat16 from there on, which may change labels at borders"
            )
        else:
            return False
        return True


@dataclass(frozen=True, kw_only=True, eq=False)
class Stream:
    """A scan on its way through the networks."""

    scan: Shaped[np.ndarray, "channel i j k"]
    """Prepared."""
    engines: Sequence[Any]
    """One per fold: windows [B, C, i, j, k] -> logits [B, K, i, j, k]."""
    windows: Windows
    classes: int
    axis: int
    ladder: Ladder = field(default_factory=Ladder)
    origin: Triple = (0, 0, 0)
    """Where in the scan the windows' grid begins."""
    passes: Sequence[tuple[int, ...]] = ((),)
    """The axes of [B, C, i, j, k] that each pass of a window mirrors; its logits are the mean over passes."""
    has_regions: bool = False
    wants_flips: bool = False
    """Whether it is told how much passes contradict each other."""
    has_body: Callable[[Triple], bool] | None = None
    """Of the window that begins there; windows without are not computed. None: all are."""
    on_disk: bool = False
    """Sums lie in a file, where memory has no room for them."""
    scratch: Path | None = None
    """The folder of that file; by default where temporary files lie."""
    keeps: bool = True
    """Whether logits of a window of one value are kept for the next such window."""
    told: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("computed", "skipped", "repeated"), 0))
    kept: dict[int, tuple[bytes, "_Answer"]] = field(default_factory=dict)
    """Per fold the last window of one value, and its answer."""

    @property
    def count(self) -> WindowCount:
        """Of the windows so far."""
        told = self.told
        return WindowCount(computed=told["computed"], skipped=told["skipped"], repeated=told["repeated"])

    def rows(self) -> Iterator[Rows]:
        """All rows in order, a few at a time."""
        layers = self.windows.layers(self.axis)
        ends = [*(layer[0][self.axis] for layer in layers[1:]), self.windows.shape[self.axis]]
        for layer, end in zip(layers, ends, strict=True):
            self._add(layer)
            for first in range(layer[0][self.axis], end, self.at_once):
                rows = slice(first, min(first + self.at_once, end))
                yield self.ladder.insist(partial(self._finished, rows))
                for slab in self._slabs:
                    slab.clear(rows)

    @property
    def at_once(self) -> int:
        """Rows that leave together."""
        row = self.windows.held(self.axis) // self.windows.patch[self.axis]
        return max(1, AT_ONCE // (self.classes * row))

    # windows in

    def _add(self, layer: Sequence[Triple]) -> None:
        """One window after the other, each by every fold, so that sums are made in one order."""
        looked_at = [start for start in layer if self.has_body is None or self.has_body(start)]
        self.told["skipped"] += len(layer) - len(looked_at)
        for number in range(0, len(looked_at), size := self.ladder.batch):
            some = looked_at[number : number + size]
            cuts = [self._cut(start) for start in some]
            for fold in range(len(self.engines)):
                for start, answer in zip(some, self._answers(fold, cuts), strict=True):
                    self._sums[fold].add(answer.logits, start)
                    if answer.unsure is not None:
                        self._unsure[0].add(answer.unsure, start)
        if self.has_body:
            ones = torch.ones(1, *self.windows.patch)
            for start in layer:
                seen = start in looked_at
                self._seen[0].add(torch.cat([ones * seen, ones * (not seen)]), start)

    def _cut(self, start: Triple) -> Shaped[np.ndarray, "channel a b c"]:
        place = self.windows.place(start)
        inside = tuple(slice(o + side.start, o + side.stop) for o, side in zip(self.origin, place, strict=True))
        return self.scan[(slice(None), *inside)]

    def _answers(self, fold: int, cuts: Sequence[np.ndarray]) -> list["_Answer"]:
        """What a fold says of each window; of one value throughout, as one before it, what it said of that."""
        values = [_one_value(window) if self.keeps else None for window in cuts]
        names: list[Any] = [number if value is None else value for number, value in enumerate(values)]
        known = dict([self.kept[fold]]) if fold in self.kept else {}
        fresh = [number for number, name in enumerate(names) if name not in known and names.index(name) == number]
        if fresh:
            windows = torch.from_numpy(np.stack([cuts[number] for number in fresh], dtype=np.float32, casting="unsafe"))
            answers = self.ladder.insist(lambda: self._computed(fold, windows))
            known |= {names[number]: answer for number, answer in zip(fresh, answers, strict=True)}
        self._remember(fold, names, known)
        if fold == 0:
            self.told["computed"] += len(fresh)
            self.told["repeated"] += len(cuts) - len(fresh)
        return [known[name] for name in names]

    def _remember(self, fold: int, names: Sequence[Any], known: dict[Any, "_Answer"]) -> None:
        """The last window of one value."""
        for name in names:
            if isinstance(name, bytes):
                self.kept[fold] = (name, known[name])

    def _computed(self, fold: int, windows: Float[Tensor, "B C a b c"]) -> list["_Answer"]:
        """As many at once as the ladder allows."""
        parts = [self._passed(fold, some) for some in windows.split(self.ladder.batch)]
        return [
            _Answer(logits=logits, unsure=None if unsure is None else unsure[number])
            for some, unsure in parts
            for number, logits in enumerate(some)
        ]

    @torch.inference_mode()
    def _passed(
        self, fold: int, windows: Float[Tensor, "B C a b c"]
    ) -> tuple[Float[Tensor, "B K a b c"], Float[Tensor, "B 1 a b c"] | None]:
        """The mean over mirrored passes, and how much they contradict each other where that is asked."""
        engine, total = self._ready[fold], None
        likely, unsure = torch.zeros(()), torch.zeros(())
        for axes in self.passes:
            logits = engine(windows.flip(axes)).float()
            logits = logits.flip(axes) if axes else logits
            if self.wants_flips:
                one = (logits.sigmoid() if self.has_regions else logits.softmax(dim=1)).movedim(1, 0).flatten(1, 2)
                likely, unsure = likely.to(one) + one, unsure.to(one) + entropies(one, self.has_regions)
            total = logits if total is None else total.add_(logits)
        assert total is not None
        if len(self.passes) > 1:
            total = total.div_(len(self.passes))
        if not self.wants_flips:
            return total, None
        apart = entropies(likely / len(self.passes), self.has_regions) - unsure / len(self.passes)
        return total, apart.amax(dim=0).clamp(0, 1).unflatten(0, (len(total), -1))[:, None]

    @property
    def _ready(self) -> list[Any]:
        """The engines, in the precision that is left."""
        if self.ladder.precision == "float32":
            return list(self.engines)
        return self._lower

    @cached_property
    def _lower(self) -> list[Any]:
        return [lower(engine) for engine in self.engines]

    # rows out

    def _finished(self, rows: slice) -> Rows:
        weights = self.windows.weights(self.axis, rows)
        unseen = None
        if self.has_body:
            ours, theirs = self._seen[0].rows(rows).unbind(0)
            # where no window was left out the sum is the product, to the bit
            weights = torch.where(theirs == 0, weights, ours)
            unseen = ours == 0
            weights = weights.masked_fill(unseen, 1)
        logits = [_divided(slab.rows(rows), weights) for slab in self._sums]
        flips = None
        if self.wants_flips:
            flips = _divided(self._unsure[0].rows(rows), weights)[0] / len(self.engines)
        return Rows(first=rows.start, logits=logits, unseen=unseen, flips=flips)

    @cached_property
    def _sums(self) -> list["_Slab"]:
        return [self._slab(self.classes) for _ in self.engines]

    @cached_property
    def _unsure(self) -> list["_Slab"]:
        return [self._slab(1)] if self.wants_flips else []

    @cached_property
    def _seen(self) -> list["_Slab"]:
        """Weights of windows that were computed, and of those that were not."""
        return [_Slab(self, 2)] if self.has_body else []

    @property
    def _slabs(self) -> list["_Slab"]:
        return [*self._sums, *self._unsure, *self._seen]

    def _slab(self, channels: int) -> "_Slab":
        return _Slab(self, channels)


def lower(engine: Any) -> Any:
    """The engine computing in bfloat16."""
    return engine.in_precision("bfloat16")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Answer:
    """What a fold says of a window."""

    logits: Float[Tensor, "K a b c"]
    unsure: Float[Tensor, "1 a b c"] | None
    """How much mirrored passes contradict each other."""


def _one_value(window: Shaped[np.ndarray, "channel a b c"]) -> bytes | None:
    """The value of each channel where it is one and the same throughout."""
    first = window[:, :1, :1, :1]
    # a corner and the middle tell most windows apart at once
    if (window[:, -1, -1, -1] != first[:, 0, 0, 0]).any() or not (window == first).all():
        return None
    return first.tobytes()


def _divided(sums: Float[Tensor, "K row one other"], weights: Float[Tensor, "row one other"]) -> Tensor:
    """In the order of memory in which rows leave."""
    out = torch.empty(sums.shape, device=sums.device)
    return torch.div(sums, weights.to(sums.device), out=out)


class _Slab:
    """Weighted sums of as many rows as a window has. Row n lies where row n modulo that many has left."""

    def __init__(self, stream: Stream, channels: int) -> None:
        self.windows, self.axis, self.ladder = stream.windows, stream.axis, stream.ladder
        self.depth = self.windows.patch[self.axis]
        self.file: Any = None
        i, j, k = (self.depth if n == self.axis else size for n, size in enumerate(self.windows.shape))
        if stream.on_disk:
            self.sums = self._mapped((channels, i, j, k), stream.scratch)
        else:
            self.sums = self.ladder.insist(lambda: torch.zeros(channels, i, j, k, device=self.ladder.place))

    def _mapped(self, shape: tuple[int, ...], folder: Path | None) -> Tensor:
        """Rows outermost: of a file only what is looked at must be in memory."""
        rows = [shape[self.axis + 1], *(size for n, size in enumerate(shape) if n != self.axis + 1)]
        with tempfile.TemporaryFile(dir=folder) as file:  # it has no name, and is gone with the last who looks at it
            self.file = np.memmap(file, np.float32, "w+", shape=tuple(rows))
        return torch.from_numpy(self.file).movedim(0, self.axis + 1)

    def add(self, window: Float[Tensor, "K a b c"], start: Triple) -> None:
        """Where the rows begin again at the front the window lies in two parts; of each what hangs over is dropped."""
        if self.sums.device.type != self.ladder.place.type:
            self.sums = self.sums.to(self.ladder.place)
        window = window.to(self.sums.device)
        i, j, k = (weight.to(self.sums.device) for weight in self.windows.bells)
        place = start[self.axis] % self.depth
        for first in (place, place - self.depth) if place else (0,):
            a, b, c = (first if n == self.axis else at for n, at in enumerate(start))
            window_blend.fused(self.sums, window, i, j, k, (a, b, c))
        self._rest()

    def rows(self, rows: slice) -> Float[Tensor, "K row one other"]:
        """Some rows, their axis first."""
        parts = [self.sums.narrow(self.axis + 1, first, count) for first, count in self._lie(rows)]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.axis + 1)
        return whole.movedim(self.axis + 1, 1)

    def clear(self, rows: slice) -> None:
        for first, count in self._lie(rows):
            self.sums.narrow(self.axis + 1, first, count).zero_()
        self._rest()

    def _lie(self, rows: slice) -> list[tuple[int, int]]:
        """Where rows begin, and how many of them."""
        first, count = rows.start % self.depth, rows.stop - rows.start
        ahead = min(count, self.depth - first)
        return [(first, ahead)] if ahead == count else [(first, ahead), (0, count - ahead)]

    def _rest(self) -> None:
        """Of sums in a file no page stays in memory."""
        if self.file is not None:
            self.file._mmap.madvise(MADV_DONTNEED)


class Bare(nn.Module):
    """A network as an engine: what training, held-out cases and tests hand over."""

    def __init__(self, network: nn.Module, device: torch.device, precision: str = "float32") -> None:
        super().__init__()
        self.network, self.device, self.precision = network.to(device), device, precision

    words = "torch"

    @torch.inference_mode()
    def forward(self, windows: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision != "float32"):
            logits: Tensor = self.network(windows.to(self.device))
        return logits.float()

    def in_precision(self, precision: str) -> "Bare":
        return Bare(self.network, self.device, precision)
