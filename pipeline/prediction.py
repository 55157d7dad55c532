"""Windows, flips and folds over a prepared scan."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from kernels import resample_argmax, window_blend
from preprocessing.patches import bell, grid
from preprocessing.regions import carrying, values_of
from preprocessing.steps import Resample, prepare
from preprocessing.volume import Volume

from .errors import PackageError, UsageError
from .postprocessing import Applied, Rule, clean

if TYPE_CHECKING:
    from preprocessing.plan import Plan
    from preprocessing.steps import Taken, Trail


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

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision {self.precision!r} is not known; one of {', '.join(PRECISIONS)} is needed.")
        if not 0 <= self.overlap < 1:
            raise UsageError(f"overlap is {self.overlap}; it must be at least 0 and below 1. 0.5 is usual.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """What the network thinks of every prepared voxel."""

    probabilities: Volume
    """One channel per class, background first; they sum to 1. Of regions: one per label, each by itself."""
    package_id: str


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


def segment_volume(
    volume: Volume, networks: Sequence[nn.Module], plan: "Plan", how: Inference, package_id: str, *,
    temperatures: Sequence[float] = (), rules: Sequence[Rule] = (),
) -> Found:  # fmt: skip
    """The middle hops: prepare, predict, undo the trail, decide, and clean by the package's rules."""
    marks = [time.perf_counter()]
    prepared, trail = prepare(volume, plan.steps)
    marks.append(time.perf_counter())
    prediction = predict(prepared, networks, plan, how, package_id, temperatures=temperatures)
    marks.append(time.perf_counter())
    decided, strength = decide(prediction, trail, plan)
    labels, changes = clean(decided, rules, plan)
    confidence = confidence_in(labels, decided, strength, plan)
    marks.append(time.perf_counter())
    seconds = {hop: round(after - before, 3) for hop, before, after in zip(HOPS, marks, marks[1:], strict=False)}
    return Found(labels=labels, confidence=confidence, seconds=seconds, changes=changes)


HOPS = ("prepare", "predict", "decide")


def predict(
    prepared: Volume, networks: Sequence[nn.Module], plan: "Plan", how: Inference, package_id: str, *,
    temperatures: Sequence[float] = (),
) -> Prediction:  # fmt: skip
    """The mean over folds (and flips) of the probabilities of blended windows.

    `temperatures`: what each network's logits are divided by before they become probabilities; 1 for all when empty.
    """
    assert len(temperatures) in (0, len(networks))
    device = choose_device(how.device)
    scan = prepared.to_tensor()
    total = torch.zeros(plan.classes, *scan.shape[1:])
    for network, temperature in zip(networks, temperatures or (1.0,) * len(networks), strict=True):
        network.to(device).eval()
        logits = blended_logits(scan, network, plan.patch, plan.classes, how, device)
        if not bool(logits.sum().isfinite()):  # a decision between no numbers would be a guess
            raise PackageError(
                f"the network of package {package_id[:12]} answered this scan with values that are no numbers, computing "
                f"in {how.precision}; finite logits are needed. Look at the scan's intensities with `hilum check`, and at "
                "the package's scores; if only bfloat16 does it, leave --precision out."
            )
        total += probabilities(logits, plan, temperature)
    voxels = (total / len(networks)).numpy()
    return Prediction(probabilities=prepared.with_voxels(voxels, channels=class_names(plan)), package_id=package_id)


def probabilities(
    logits: Float[Tensor, "classes i j k"], plan: "Plan", temperature: float = 1.0
) -> Float[Tensor, "classes i j k"]:
    """Logits as probabilities: classes share 1 among them; regions, which may overlap, each have a yes and a no."""
    logits = logits / temperature
    return logits.sigmoid() if plan.has_regions else logits.softmax(dim=0)


def class_names(plan: "Plan") -> tuple[str, ...]:
    """What each channel of a prediction stands for."""
    labels = tuple(label.name for label in plan.labels)
    return labels if plan.has_regions else ("background", *labels)


def blended_logits(
    scan: Float[Tensor, "channel i j k"],
    network: nn.Module,
    patch: tuple[int, int, int],
    classes: int,
    how: Inference,
    device: torch.device,
) -> Float[Tensor, "classes i j k"]:
    """Every window's logits, weighted by a bell, summed, and divided by the sum of weights (a product of three vectors)."""
    _, height, width, depth = scan.shape
    total, windows = (
        torch.zeros(classes, height, width, depth),
        Windows.over((height, width, depth), patch, how.overlap),
    )
    half = torch.autocast(device.type, PRECISIONS[how.precision], enabled=how.precision != "float32")
    with torch.inference_mode(), half:
        for start in windows.starts:
            window = scan[(slice(None), *windows.place(start))]
            logits = _flipped_mean(window[None].to(device), network, how)[0].float().cpu()
            total = window_blend.fused(total, logits, *windows.bells, start)
    i, j, k = windows.sums
    return total / (i[:, None, None] * j[None, :, None] * k[None, None, :])


@dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """Where windows lie in a prepared scan, and how much each is trusted there: a product of three vectors."""

    patch: tuple[int, int, int]
    starts: list[tuple[int, int, int]]
    bells: tuple[Tensor, Tensor, Tensor]
    """Of one window, along each of its axes."""
    sums: tuple[Tensor, Tensor, Tensor]
    """Of all windows, along each axis of the scan."""

    @staticmethod
    def over(shape: tuple[int, int, int], patch: tuple[int, int, int], overlap: float) -> "Windows":
        starts = grid(shape, patch, overlap)
        i, j, k = (torch.from_numpy(bell(side)) for side in patch)
        sums = tuple(torch.zeros(size) for size in shape)
        for axis, (along, weight) in enumerate(zip(sums, (i, j, k), strict=True)):
            for start in sorted({start[axis] for start in starts}):
                along[start : start + patch[axis]] += weight
        return Windows(patch=patch, starts=starts, bells=(i, j, k), sums=(sums[0], sums[1], sums[2]))

    def place(self, start: tuple[int, int, int]) -> tuple[slice, slice, slice]:
        """The window's voxels in the scan."""
        i, j, k = (slice(first, first + side) for first, side in zip(start, self.patch, strict=True))
        return i, j, k

    def share(self, start: tuple[int, int, int]) -> Float[Tensor, "i j k"]:
        """What a window has to say of each of its voxels, of all windows that see it."""
        i, j, k = (
            weight / along[side] for weight, along, side in zip(self.bells, self.sums, self.place(start), strict=True)
        )
        return i[:, None, None] * j[None, :, None] * k[None, None, :]


def mirrorings(how: Inference) -> list[tuple[int, ...]]:
    """The axes of [B, C, i, j, k] that each pass of a window mirrors; without flips, one pass that mirrors none."""
    axes = [axis for axis, mirrored in zip((2, 3, 4), how.mirrors, strict=True) if mirrored and how.flips]
    return [some for size in range(len(axes) + 1) for some in combinations(axes, size)]


def _flipped_mean(window: Tensor, network: nn.Module, how: Inference) -> Tensor:
    if not how.flips:
        return network(window)
    return torch.stack([network(window.flip(some)).flip(some) for some in mirrorings(how)]).mean(dim=0)


def decide(prediction: Prediction, trail: "Trail", plan: "Plan") -> tuple[Volume, Volume]:
    """The label map on the scan's own grid, and the probability of what won in each voxel.

    Probabilities go back through the resampling before the decision: argmax after resampling keeps thin structures. What
    was done before the resampling interpolates nothing, so there the decision goes back instead. What was cropped away
    is background. Of regions each is where it is likelier than not, a later one painted over an earlier one.
    """
    before, resampled, after = trail.parted()
    likely, nothing = prediction.probabilities, 0.0 if plan.has_regions else 1.0
    outside = [nothing, *[0.0] * (len(likely.channels) - 1)]
    channels = [after.undo(_channel(likely, number), fill) for number, fill in enumerate(outside)]
    labels, strength = _decided(channels, resampled, plan)
    labels = before.undo(labels)
    labels = labels.with_voxels(np.ascontiguousarray(labels.voxels))
    return labels, before.undo(strength, nothing)


def _channel(probabilities: Volume, number: int) -> Volume:
    voxels = probabilities.voxels[number : number + 1]
    return probabilities.with_voxels(voxels, channels=(probabilities.channels[number],))


def _decided(channels: Sequence[Volume], resampled: "Taken | None", plan: "Plan") -> tuple[Volume, Volume]:
    """The decision on the grid that the resampling left, a few planes at a time: all classes never lie there at once."""
    geometry = resampled.before if resampled else channels[0].geometry
    nearest = resampled.step.separate if resampled and isinstance(resampled.step, Resample) else None
    labels, strength = np.empty(geometry.shape, plan.lookup.dtype), np.empty(geometry.shape, np.float32)
    planes = resample_argmax.stream(
        _slabs(channels),
        len(channels[0].voxels[0]),
        geometry.shape,
        lookup=torch.from_numpy(plan.lookup),
        threshold=0.5 if plan.has_regions else None,
        nearest=nearest,
    )
    done = 0
    for some, winner in planes:
        rows = slice(done, done + len(some))
        labels[rows], strength[rows], done = some.numpy(), winner.numpy(), rows.stop
    back = channels[0].with_voxels(strength[None], geometry=geometry, channels=("probability",))
    return back.with_voxels(labels[None], channels=("labels",)), back


def _slabs(channels: Sequence[Volume], planes: int = 4) -> Iterator[Float[Tensor, "classes plane j k"]]:
    """A copy of a few planes at a time: torch wants no read-only array."""
    for start in range(0, channels[0].geometry.shape[0], planes):
        yield torch.from_numpy(np.stack([channel.voxels[0, start : start + planes] for channel in channels]))


def confidence_in(labels: Volume, decided: Volume, strength: Volume, plan: "Plan") -> dict[str, float]:
    """Mean probability of each label where it won and was kept; what a rule filled in won nothing and does not count.

    A region is also where the regions within it won, with the probability of these.
    """
    confidence = {}
    for name, values in values_of(plan.labels).items():
        kept = carrying(labels.voxels, values) & carrying(decided.voxels, values)
        if kept.any():
            confidence[name] = round(float(strength.voxels[kept].mean()), 4)
    return confidence


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
