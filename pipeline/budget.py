"""How much memory a case will take, said before it starts; and what is given up, step by step, to stay within a limit.

Counted are the scan, its preparation, the sums of a window's rows for every fold, one window in the network, the rows on
their way to labels, the label map, and what rules need to change it: the largest of these times. A bound, not a guess: a
network is counted on tensors that have shapes and no voxels, and what a scan's own values decide (how much of it can be
cropped, whether windows of one value come) is taken at its worst.
"""

import copy
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from preprocessing.resampling import resized
from preprocessing.steps import Crop, Normalise, Orient, Pad, Resample
from preprocessing.volume import Geometry, ScanError, Volume

from .demand import answered
from .errors import UsageError
from .footprint import Ledger, put_on_cpu
from .machine import free_memory
from .report import gigabytes
from .stream import AT_ONCE, Windows

if TYPE_CHECKING:
    from preprocessing.plan import Plan

FLOAT = 4

BESIDE = 150_000_000
"""Bytes beside all that is counted: a library's own, the gaps that an allocator leaves (measured, footprint.py: 50 to 150
million)."""

LAID_OUT_ANEW = 1.6
"""On a CPU oneDNN keeps a layer's input or output once more, in an order of its own, while it computes. An allowance: with it
the runs of benchmarks/streaming.py peaked at 61 to 73 % of what was stated."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a case is gone through; none of it changes a label."""

    batch: int
    keeps: bool = True
    """Logits of a window of one value, for the next such window."""
    on_disk: bool = False
    """Sums lie in a file."""
    words: tuple[str, ...] = ()
    """What was given up, a sentence each."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The most a case will take beyond the process itself."""

    bytes: int
    words: str
    """What of it takes most."""
    way: Way


@dataclass(frozen=True, kw_only=True, eq=False)
class Load:
    """All that decides how much a case takes."""

    geometry: Geometry
    """Of the scan, before anything is done to it."""
    scan_bytes: int
    channels: int
    plan: "Plan"
    windows: Windows
    """Over the prepared scan, or its region."""
    prepared: Geometry
    engines: Sequence[Any]
    passes: int = 1
    """Of a window: how often it is mirrored."""
    kinds: tuple[str, ...] = ()
    """Maps that are asked for."""
    has_rules: bool = False
    body: bool = False


def stated(load: Load, way: Way) -> Budget:
    """What the case takes when it is gone through that way."""
    times = {
        "preparing the scan": _preparing(load),
        "looking at it": sum(_looking(load, way).values()),
        "bringing labels back": _returning(load),
        "applying rules": _ruling(load) if load.has_rules else 0,
    }
    most = max(times, key=lambda name: times[name])
    parts = _looking(load, way)
    largest = max(parts, key=lambda name: parts[name])
    told = f"{most}, of it {gigabytes(parts[largest])} for {largest}" if most == "looking at it" else most
    return Budget(bytes=load.scan_bytes + times[most] + BESIDE, words=f"most while {told}", way=way)


def within(load: Load, batch: int, limit: int | None) -> Budget:
    """The fastest way that stays within the limit, or within what is free; the case is refused where there is none."""
    room = free_memory() if limit is None else limit
    for way in _ways(batch):
        budget = stated(load, way)
        if budget.bytes <= room:
            return budget
    needs = "what is free" if limit is None else "--max-memory"
    raise ScanError(
        f"the scan, {load.geometry}, needs {gigabytes(budget.bytes)} at least ({budget.words}); {gigabytes(room)} are "
        f"{needs}. Allow it more, or segment it on a machine that has more.",
        "too_large",
    )


def _ways(batch: int) -> Iterator[Way]:
    """The fastest first."""
    way = Way(batch=batch)
    yield way
    if batch > 1:
        way = replace(way, batch=1, words=(*way.words, "one window at once, to stay within the memory allowed"))
        yield way
    way = replace(
        way,
        keeps=False,
        words=(*way.words, "windows of one value are computed anew, to stay within the memory allowed"),
    )
    yield way
    yield replace(
        way, on_disk=True, words=(*way.words, "windows are summed in a file, to stay within the memory allowed")
    )


def parse_memory(words: str) -> int:
    """Bytes of 2GB, 500MB, 1.5 GiB; decimal unless an i says otherwise."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", words.lower())
    if not found or not float(found[1]):
        raise UsageError(
            f"a memory of {words!r} was met; a number and its unit are needed, as 2GB or 500MB. Correct it."
        )
    power = " kmgt".index(found[2] or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


# what each time takes, beside the scan


def _preparing(load: Load) -> int:
    """Step by step: what the step before left, what this one makes, and what it needs in between."""
    geometry, own, most = load.geometry, 0.0, 0.0
    item = load.scan_bytes / (load.channels * math.prod(geometry.shape))
    for step in load.plan.steps:
        after = reached(geometry, step)
        before, there = load.channels * math.prod(geometry.shape), load.channels * math.prod(after.shape)
        one = math.prod(geometry.shape)
        if isinstance(step, Orient):
            made, between = own, 0.0  # a view
        elif isinstance(step, Crop):
            made, between = before * item, 2.0 * before  # where voxels are zero
        elif isinstance(step, Normalise):
            # deviations are summed in float64; channels are put together at the end
            made, between, item = there * FLOAT, there * FLOAT + 28.0 * one, FLOAT
        elif isinstance(step, Resample):
            made, between, item = there * FLOAT, 1.0 * max(before, there) * FLOAT, FLOAT
        else:
            made, between = there * item, 0.0
        most = max(most, own + made + between)
        own, geometry = made, after
    return int(most)


def reached(geometry: Geometry, step: Any) -> Geometry:
    """The largest grid that a step can lead to: how much is cropped only voxels tell."""
    if isinstance(step, Orient):
        empty = Volume(voxels=_nothing(geometry), geometry=geometry, channels=("none",))
        return step.apply(empty).geometry
    if isinstance(step, Resample):
        return resized(geometry, step.shape_of(geometry))
    if isinstance(step, Pad):
        i, j, k = (max(side, least) for side, least in zip(geometry.shape, step.shape, strict=True))
        return Geometry(shape=(i, j, k), affine=geometry.affine)
    return geometry


def largest(geometry: Geometry, steps: Sequence[Any]) -> Geometry:
    """The largest grid that all steps can lead to."""
    for step in steps:
        geometry = reached(geometry, step)
    return geometry


def _looking(load: Load, way: Way) -> dict[str, int]:
    """While windows come and rows leave."""
    prepared = load.channels * math.prod(load.prepared.shape) * FLOAT
    return {
        "the prepared scan": prepared,
        "the sums of windows": _sums(load, way),
        "a window in the network": _window(load, way),
        "rows on their way": _rows(load),
        "the label map": _labels(load) + (2 * math.prod(load.geometry.shape) if load.has_rules else 0),
    }


def _sums(load: Load, way: Way) -> int:
    axis, windows = load.windows.axis, load.windows
    extra = ("flips" in load.kinds) + 2 * load.body
    channels = load.plan.classes * len(load.engines) + extra
    if not way.on_disk:
        return channels * windows.held(axis) * FLOAT
    # the pages that a window touches: its rows, their other axis as far as it reaches, the last axis whole
    one, other = (n for n in range(3) if n != axis)
    rows = windows.patch[axis]
    touched = rows * (windows.patch[one] * windows.shape[other] * FLOAT + 2 * 4096)
    leaving = max(AT_ONCE, load.plan.classes * windows.shape[one] * windows.shape[other]) * FLOAT
    return min(channels * windows.held(axis) * FLOAT, max(load.plan.classes * touched, leaving))


def _window(load: Load, way: Way) -> int:
    voxels = math.prod(load.windows.patch) * FLOAT
    logits = load.plan.classes * voxels
    copies = way.batch * (3 if load.passes > 1 else 1) + way.batch * (4 if "flips" in load.kinds else 0)
    kept = len(load.engines) if way.keeps else 0
    widest = max(activation(engine, load.channels, load.windows.patch, way.batch) for engine in load.engines)
    return widest + logits * (copies + kept) + 3 * way.batch * load.channels * voxels


def _rows(load: Load) -> int:
    """Logits and probabilities of every fold, their mean; old planes that new ones lie between; new planes."""
    axis, classes = load.windows.axis, load.plan.classes
    one, other = (n for n in range(3) if n != axis)
    chunk = max(AT_ONCE, classes * load.windows.shape[one] * load.windows.shape[other]) * FLOAT
    plane = classes * load.prepared.shape[one] * load.prepared.shape[other] * FLOAT
    new = _decided_on(load)
    wide = new.shape[one] * new.shape[other]
    maps = 3 * (classes if "probabilities" in load.kinds else 0) + 3 * len(load.kinds)
    # of up to 16 new planes a number, a score, what lies beside them, and their sums
    return chunk * (2 * len(load.engines) + 4) + 6 * plane + wide * (16 * 16 + FLOAT * maps + 64) + 8 * FLOAT * 2**17


def _decided_on(load: Load) -> Geometry:
    """The grid that the resampling left; without one, the prepared one."""
    geometry = load.geometry
    for step in load.plan.steps:
        if isinstance(step, Resample):
            return geometry
        geometry = reached(geometry, step)
    return geometry


def _labels(load: Load) -> int:
    return int(math.prod(_decided_on(load).shape) * load.plan.lookup.itemsize)


def _returning(load: Load) -> int:
    """The map as it was decided, on the scan's grid, and in the order of memory that files have."""
    own = math.prod(load.geometry.shape) * load.plan.lookup.itemsize
    return _labels(load) + 2 * own + (2 * math.prod(load.geometry.shape) if load.has_rules else 0)


def _ruling(load: Load) -> int:
    """Two label maps, twice where confidence is counted again, and the numbers of connected parts with what finds them."""
    return math.prod(load.geometry.shape) * (4 * load.plan.lookup.itemsize + 2 + 20)


def _nothing(geometry: Geometry) -> Any:
    """Voxels of that shape that take no room."""
    return np.broadcast_to(np.zeros((1, 1, 1, 1), np.uint8), (1, *geometry.shape))


# a window in a network


_counted: "WeakKeyDictionary[Any, dict[tuple[int, ...], int]]" = WeakKeyDictionary()
"""What was counted of an engine before, by shape of windows: the cases of a batch share their engines."""


def activation(engine: Any, channels: int, patch: Sequence[int], batch: int) -> int:
    """Bytes that come to life, at most at once, while an engine answers windows: its logits included."""
    shape = (batch, channels, *patch)
    known = _counted.setdefault(engine, {})
    if shape not in known:
        network = getattr(engine, "network", None)
        known[shape] = _probed(engine, shape) if network is None else _remembered(engine, network, shape)
    return known[shape]


def _remembered(engine: Any, network: nn.Module, shape: tuple[int, ...]) -> int:
    """Counted once on this machine for each package: a part of torch is loaded for it that takes two seconds."""
    built_by = getattr(engine, "built_by", "")
    if not built_by:
        return _counted_of(network, shape)
    question = {"ask": "activation", "built_by": built_by, "shape": list(shape)}
    return int(answered(question, lambda _: {"is": _counted_of(network, shape)})["is"])


def _counted_of(network: nn.Module, shape: tuple[int, ...]) -> int:
    hollow = hollowed(network)
    with FakeTensorMode(), torch.no_grad(), Ledger() as ledger:
        put_on_cpu(hollow)
        windows = torch.empty(shape)
        before = ledger.now
        hollow(windows)
    return int((ledger.peak - before) * LAID_OUT_ANEW)


def hollowed(network: nn.Module) -> nn.Module:
    """A copy of a network whose weights have shapes and no numbers."""
    weights = [*network.parameters(), *network.buffers()]
    hollow = {id(weight): _hollow(weight) for weight in weights}
    return copy.deepcopy(network, hollow)


def _hollow(weight: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(weight, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(weight, nn.Parameter) else empty


def _probed(engine: Any, shape: tuple[int, ...]) -> int:
    """Of an engine that shows no network: it is asked once, and watched. What it keeps is its own from then on."""
    before, high = held(), peak()
    engine(torch.zeros(shape))
    after = peak()
    grown = after - before if after > high else held() - before
    return max(grown, 0) + 2 * math.prod(shape) * FLOAT


# what was taken


class Gauge:
    """What the process grew by since this was made; what it has of the scan already counts."""

    def __init__(self, already: int) -> None:
        self.start, self.high, self.most = held() - already, peak(), 0

    def look(self) -> None:
        """Once more; between two looks only what is the most the process ever had is seen."""
        self.most = max(self.most, held() - self.start)

    @property
    def peak(self) -> int | None:
        """None where the system does not tell."""
        if not held():
            return None
        now = peak()
        return max(self.most, now - self.start if now > self.high else 0)


def held() -> int:
    """Bytes of memory the process has; 0 where the system does not tell."""
    return _told("VmRSS")


def peak() -> int:
    """The most it ever had."""
    return _told("VmHWM")


def _told(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)
