"""Windows, flips and folds over a prepared scan."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from preprocessing.steps import prepare
from preprocessing.volume import Geometry, Volume

from .body import Body
from .budget import Budget, Gauge, Load, Way, largest, within
from .decision import Decision, Ground, Judge, decide
from .errors import UsageError
from .maps import PROBABILITIES, Maps, MapWriter
from .postprocessing import Applied, Rule, clean
from .report import Memory, WindowCount
from .stream import Bare, Ladder, Region, Rows, Stream, Windows

if TYPE_CHECKING:
    from preprocessing.plan import Plan
    from preprocessing.steps import Trail


PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Inference:
    """How a trained network is applied."""

    overlap: float = 0.5
    """Share of a window that its neighbour covers, per axis."""
    flips: bool = False
    """Average over mirrorings, of every axis that `mirrors` names: up to eight times the time, a little more Dice."""
    mirrors: tuple[bool, bool, bool] = (True, True, True)
    """Which axes flips mirror: those that training mirrored. On others a network answers nonsense."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU where there is one."""
    precision: str = "float32"
    """What the networks compute in; windows are summed in float32 all the same."""
    engine: str = "torch"
    """What runs the networks: a file of pipeline/engines/."""
    batch: int = 1
    """Windows that a network sees at once."""
    max_memory: int | None = None
    """Bytes that a case may take beyond the process itself; None: what is free."""
    body: bool = False
    """Windows that hold nothing but air are called background and not computed."""
    why: str = ""
    """Why windows lie so and what the precision costs, as the package's own held-out cases say it; for the report."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision {self.precision!r} is not known; one of {', '.join(PRECISIONS)} is needed.")
        if not 0 <= self.overlap < 1:
            raise UsageError(f"overlap is {self.overlap}; it must be at least 0 and below 1. 0.5 is usual.")
        if self.batch < 1:
            raise UsageError(f"batch is {self.batch}; at least one window is needed at once. Leave it out.")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is wanted of every voxel beside its label."""

    probabilities: bool = False
    uncertainty: bool = False
    exact: bool = False
    """Probabilities as floats instead of bytes."""

    def kinds(self, how: Inference, folds: int) -> tuple[str, ...]:
        """The maps that can be made: folds contradict each other where there are several, passes where some are mirrored."""
        uncertain = ["entropy", *(["folds"] if folds > 1 else []), *(["flips"] if len(mirrorings(how)) > 1 else [])]
        return (*([PROBABILITIES] if self.probabilities else []), *(uncertain if self.uncertainty else []))


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """What a scan holds, on its own grid."""

    labels: Volume
    confidence: dict[str, float]
    """Mean probability of each label where it won."""
    seconds: dict[str, float]
    """How long each hop took."""
    changes: tuple[Applied, ...] = ()
    """What each rule of post-processing did."""
    windows: WindowCount | None = None
    memory: Memory | None = None
    maps: Maps | None = None
    """Probabilities and uncertainty, for whoever asked."""


def segment_volume(
    volume: Volume, engines: Sequence[Any], plan: "Plan", how: Inference, package_id: str, *,
    temperatures: Sequence[float] = (), rules: Sequence[Rule] = (), asked: Asked = Asked(),
    scratch: Path | None = None, region: "Where | None" = None,
) -> Found:  # fmt: skip
    """The middle hops: prepare, predict row by row, undo the trail, decide, and clean by the package's rules.

    `engines`: one per fold, networks or what pipeline/engines/ makes of them. `temperatures`: what each one's logits are
    divided by; 1 for all when empty. `scratch`: where large files may lie for a while. `region`: where alone to look.
    """
    case = _Case(
        plan=plan, how=how, engines=ready(engines, how), package_id=package_id, asked=asked, scratch=scratch,
        region=region if isinstance(region, Region) else None,
        temperatures=tuple(temperatures) or (1.0,) * len(engines), has_rules=bool(rules),
    )  # fmt: skip
    marks, gauge = [time.perf_counter()], Gauge(volume.voxels.nbytes)
    if region is None:  # what there is to look at is known: refused before anything is done to it
        within(case.load(volume, None), how.batch, how.max_memory)
    prepared, trail = prepare(volume, plan.steps)
    if callable(region):
        case = replace(case, region=region(prepared.geometry))
    marks.append(time.perf_counter())
    looked = case.look(volume, prepared, trail, gauge)
    del prepared  # what comes now has its room
    decided = looked.decision.labels(volume)
    marks.append(time.perf_counter())
    labels, changes = clean(decided, rules, plan)
    confidence = looked.decision.confidence.of(labels, decided)
    marks.append(time.perf_counter())
    gauge.look()
    seconds = {hop: round(after - before, 3) for hop, before, after in zip(HOPS, marks, marks[1:], strict=False)}
    return Found(
        labels=labels, confidence=confidence, seconds=seconds, changes=changes, windows=looked.windows, maps=looked.maps,
        memory=Memory(stated=looked.budget.bytes, peak=gauge.peak, words=looked.words),
    )  # fmt: skip


Where = Region | Callable[[Geometry], Region | None]
"""A box on the prepared grid, or what tells it once the grid is known; None of it is everywhere."""

HOPS = ("prepare", "predict", "decide")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Looked:
    """What came of looking at a scan."""

    decision: Decision
    windows: WindowCount
    maps: Maps | None
    budget: Budget
    words: tuple[str, ...]
    """What was given up."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Case:
    """All that is known of a case before its scan is prepared."""

    plan: "Plan"
    how: Inference
    engines: Sequence[Any]
    package_id: str
    asked: Asked
    scratch: Path | None
    region: Region | None
    temperatures: Sequence[float]
    has_rules: bool

    @property
    def kinds(self) -> tuple[str, ...]:
        return self.asked.kinds(self.how, len(self.engines))

    def look(self, volume: Volume, prepared: Volume, trail: "Trail", gauge: Gauge) -> _Looked:
        """Windows in, rows out, labels."""
        budget = within(self.load(volume, prepared.geometry), self.how.batch, self.how.max_memory)
        body = Body.of(volume, self.plan) if self.how.body else None
        stream = open_stream(
            prepared, self.engines, self.plan, self.how, kinds=self.kinds, region=self.region, way=budget.way,
            scratch=self.scratch, body=body,
        )  # fmt: skip
        ground = Ground.under(prepared.geometry, trail, stream.axis, stream.origin, stream.windows.shape)
        culprit = f"the network of package {self.package_id[:12]}, computing in {self.how.precision},"
        judge = Judge(plan=self.plan, temperatures=self.temperatures, kinds=self.kinds, culprit=culprit)
        writer = self._writer(ground)
        decision = decide(
            map(judge.weigh, watched(stream.rows(), gauge)), ground, judge, writer=writer, keeps_strength=self.has_rules
        )
        maps = writer.finish(ground.before) if writer else None
        words = (*budget.way.words, *stream.ladder.words)
        count = replace(stream.count, body=body.words if body else "")
        return _Looked(decision=decision, windows=count, maps=maps, budget=budget, words=words)

    def _writer(self, ground: Ground) -> MapWriter | None:
        if not self.kinds:
            return None
        return MapWriter.create(
            self.scratch, self.plan, ground.geometry, self.kinds, axis=ground.axis, exact=self.asked.exact
        )

    def load(self, volume: Volume, prepared: Geometry | None) -> Load:
        """What it takes; of a scan that is not prepared yet, at most."""
        there = prepared or largest(volume.geometry, self.plan.steps)
        box = _box(there.shape, self.plan.patch, self.region if prepared else None)
        return Load(
            geometry=volume.geometry, scan_bytes=volume.voxels.nbytes, channels=len(volume.channels), plan=self.plan,
            windows=Windows.over(box.shape, self.plan.patch, self.how.overlap, self.plan.bell), prepared=there,
            engines=self.engines, passes=len(mirrorings(self.how)), kinds=self.kinds, has_rules=self.has_rules,
            body=self.how.body,
        )  # fmt: skip


def watched(rows: Iterable[Rows], gauge: Gauge) -> Iterator[Rows]:
    """The rows, and a look at the memory as each comes."""
    for some in rows:
        gauge.look()
        yield some


def ready(engines: Sequence[Any], how: Inference) -> list[Any]:
    """Networks as engines; what is one already stays as it is."""
    device = choose_device(how.device)
    return [Bare(each.eval(), device, how.precision) if isinstance(each, nn.Module) else each for each in engines]


def open_stream(
    prepared: Volume, engines: Sequence[Any], plan: "Plan", how: Inference, *, kinds: Sequence[str] = (),
    region: Region | None = None, way: Way | None = None, scratch: Path | None = None, body: Body | None = None,
) -> Stream:  # fmt: skip
    """The prepared scan, ready to be looked at by engines."""
    way = way or Way(batch=how.batch)
    box = _box(prepared.geometry.shape, plan.patch, region)
    windows = Windows.over(box.shape, plan.patch, how.overlap, plan.bell)
    has_body = None if body is None else body.seen_from(prepared.geometry, box.start, plan.patch)
    return Stream(
        scan=prepared.voxels, engines=engines, windows=windows, classes=plan.classes, axis=windows.axis,
        ladder=Ladder(batch=way.batch, place=engines[0].device), origin=box.start, passes=mirrorings(how),
        has_regions=plan.has_regions, wants_flips="flips" in kinds, has_body=has_body, keeps=way.keeps,
        on_disk=way.on_disk, scratch=scratch,
    )  # fmt: skip


def _box(shape: tuple[int, int, int], patch: tuple[int, int, int], region: Region | None) -> Region:
    """Where is looked: all of it, or a region that holds a window at least."""
    return (region or Region(start=(0, 0, 0), stop=shape)).holding(patch, shape)


def blended_logits(
    scan: Float[Tensor, "channel i j k"],
    network: nn.Module,
    patch: tuple[int, int, int],
    classes: int,
    how: Inference,
    device: torch.device,
) -> Float[Tensor, "classes i j k"]:
    """All rows of the stream of one network together, for who needs every logit of a scan."""
    i, j, k = scan.shape[1:]
    windows = Windows.over((i, j, k), patch, how.overlap)
    stream = Stream(
        scan=scan.cpu().numpy(), engines=[Bare(network, device, how.precision)], windows=windows, classes=classes,
        axis=windows.axis, ladder=Ladder(batch=how.batch, place=device), passes=mirrorings(how),
    )  # fmt: skip
    total = torch.empty(classes, i, j, k)
    for rows in stream.rows():
        there = total.movedim(stream.axis + 1, 1)
        there[:, rows.first : rows.first + rows.logits[0].shape[1]] = rows.logits[0]
    return total


def mirrorings(how: Inference) -> list[tuple[int, ...]]:
    """The axes of [B, C, i, j, k] that each pass of a window mirrors; without flips, one pass that mirrors none."""
    axes = [axis for axis, mirrored in zip((2, 3, 4), how.mirrors, strict=True) if mirrored and how.flips]
    return [some for size in range(len(axes) + 1) for some in combinations(axes, size)]


def choose_device(name: str) -> torch.device:
    """The device asked for; `auto` takes a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"device {name!r} was asked for, but torch sees no GPU here. Use --device cpu.")
    try:
        return torch.device(name)
    except RuntimeError:
        raise UsageError(f"device {name!r} is not known to torch; auto, cpu or cuda is needed. Correct it.") from None


def refuse_slow_precision(precision: str, device: torch.device) -> None:
    """A processor that must imitate bfloat16 is slower with it, not faster."""
    if precision == "float32":
        return
    if device.type == "cuda":
        can = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        can = bool({"avx512_bf16", "amx_bf16", "bf16"} & {name for name, has in _capabilities().items() if has})
    if not can:
        raise UsageError(
            f"precision {precision} was asked for, and this {'GPU' if device.type == 'cuda' else 'processor'} does not "
            "compute in it; it would be slower than float32. Leave --precision out."
        )


def _capabilities() -> dict[str, object]:
    return dict(torch.cpu.get_capabilities())
