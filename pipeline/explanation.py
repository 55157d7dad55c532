"""Where a network looked: maps that add up to the stitched model's own score, window by window.

The score of a label, or of one part of it, is its mean margin: over the voxels v where it was found, the mean of
L[c, v] less the mean of the other classes' logits there (of a region, which has a sigmoid of its own, of L[c, v] alone).
L is what windows w are stitched to, L[c, v] = Σ_w b_w(v) l_w[c, v] / B(v); so the score is a sum over windows of
Σ_v m(v) b_w(v) / (B(v) Σ m) · margin_w(v). Only windows that meet the mask m are run, and their maps are added: never
averaged, never stretched. Folds count by their temperature, mirrored passes alike.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int8, UInt8
from scipy import stats
from torch import Tensor, nn
from torch.nn.functional import avg_pool3d, interpolate

from networks.parts.attentive import Attentive, attention_maps
from preprocessing.plan import Label, Plan
from preprocessing.records import nearest
from preprocessing.regions import Place, parted, places
from preprocessing.steps import Trail, prepare
from preprocessing.volume import Geometry, Volume

from .attribution import AVERAGING, HEALTHY, METHODS, undisturbed, unlearnt
from .errors import UsageError
from .faithfulness import Faithfulness, judge
from .lens import Lens, Look
from .outputs.measurements import MOST_PARTS
from .prediction import Inference, choose_device
from .report import Explanation
from .stream import Windows

logger = logging.getLogger(__name__)

LEVELS = 127
"""Codes are int8 and signed alike to both sides."""
ALIKE = 0.2
"""Below this rank correlation two methods look at different places: on a trained U-Net they reached 0.64 and 0.81."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is explained, and how; what the output `saliency` asks for."""

    method: str = "hirescam"
    layer: str = ""
    labels: tuple[str, ...] = ()
    parts: int = 3
    attention: bool = True
    tests: bool = True
    cross_check: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(
                f"method {self.method!r} is none of {', '.join(METHODS)}"
                f"{nearest(self.method, METHODS) or '.'} Choose one of these."
            )
        if not 0 <= self.parts <= MOST_PARTS:
            raise UsageError(
                f"parts is {self.parts}; 0 to {MOST_PARTS} are measured, and so can be explained. Choose fewer."
            )


def explain(
    volume: Volume, labels: Volume, networks: Sequence[nn.Module], plan: Plan, how: Inference, choice: Choice, *,
    temperatures: Sequence[float] = (),
) -> tuple[Explanation, ...]:  # fmt: skip
    """Every map that was asked for, on the scan's own grid; no weight, gradient, mode or random state is touched."""
    _refuse_unknown_labels(choice, plan)
    device = choose_device(how.device)
    for network in networks:
        network.to(device)
    with undisturbed(networks):
        scene = Scene.of(volume, labels, plan, how)
        lens = Lens.through(networks, temperatures, plan, how, choice.method, choice.layer)
        found = [one for target in _targets(scene, choice) for one in _explained(target, scene, lens, choice)]
        return (*found, *(_attention(scene, lens) if choice.attention else ()))


def _refuse_unknown_labels(choice: Choice, plan: Plan) -> None:
    names = tuple(label.name for label in plan.labels)
    for name in choice.labels:
        if name not in names:
            raise UsageError(
                f"label {name!r} is to be explained, and is none of {', '.join(names)}{nearest(name, names) or '.'} "
                "Choose among these, or leave labels out."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """One scan, as the networks see it, and the way back."""

    scan: Float[Tensor, "channel i j k"]
    windows: Windows
    trail: Trail
    geometry: Geometry
    labels: Volume
    plan: Plan

    @staticmethod
    def of(volume: Volume, labels: Volume, plan: Plan, how: Inference) -> "Scene":
        prepared, trail = prepare(volume, plan.steps)
        windows = Windows.over(prepared.geometry.shape, plan.patch, how.overlap, plan.bell)
        geometry, scan = prepared.geometry, prepared.to_tensor()
        return Scene(scan=scan, windows=windows, trail=trail, geometry=geometry, labels=labels, plan=plan)

    def channel(self, label: Label) -> int:
        """Which of the network's channels speaks for it."""
        return self.plan.labels.index(label) + (not self.plan.has_regions)

    def window(self, start: tuple[int, int, int]) -> Float[Tensor, "channel i j k"]:
        return self.scan[(slice(None), *self.windows.place(start))]

    def returned(self, values: Float[Tensor, "a b c"], first: Sequence[int]) -> Float[np.ndarray, "i j k"]:
        """A map of some prepared voxels on the scan's own grid, interpolated linearly; 0 elsewhere."""
        whole = np.zeros((1, *self.geometry.shape), np.float32)
        whole[0][_box(first, values.shape)] = values.numpy()
        back = self.trail.undo(Volume(voxels=whole, geometry=self.geometry, channels=("relevance",)))
        return back.voxels[0]


def _box(first: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(first, shape, strict=True))


# what is explained


@dataclass(frozen=True, kw_only=True, eq=False)
class _Target:
    """A label, or one part of it."""

    label: Label
    part: int | None
    mask: Bool[Tensor, "i j k"] | None
    """On the prepared grid; None where there is nothing."""
    reason: str = ""
    """Why there is nothing."""


def _targets(scene: Scene, choice: Choice) -> Iterator[_Target]:
    """Each label that was found, then its largest parts where there are several; one asked for by name in any case."""
    wanted = [label for label in scene.plan.labels if not choice.labels or label.name in choice.labels]
    spacing = "×".join(f"{side:.3g}" for side in scene.plan.spacing_mm)
    for label, place in places(scene.labels.voxels[0], scene.plan.labels, wanted):
        if place is None:
            if choice.labels:
                yield _Target(label=label, part=None, mask=None, reason=f"no {label.name} was found")
            continue
        prepared, parts = _prepared(place, scene, choice.parts)
        for part in (None, *range(1, parts + 1)):
            mask = prepared > 0 if part is None else prepared == part
            if mask.any():
                yield _Target(label=label, part=part, mask=mask)
            else:
                reason = f"nothing of it is left on the grid that the network sees, of {spacing} mm"
                yield _Target(label=label, part=part, mask=None, reason=reason)


def _prepared(place: Place, scene: Scene, most: int) -> tuple[UInt8[Tensor, "i j k"], int]:
    """A label's parts as the measurements number them, brought to the prepared grid the way the scan went; and how many
    there are to explain, the rest sharing the next number."""
    numbers, sizes = parted(place.mask)
    parts = min(most, len(sizes)) if len(sizes) > 1 else 0
    whole = np.zeros(scene.labels.voxels.shape, np.uint8)
    whole[0][_box(place.start, numbers.shape)] = np.minimum(numbers, parts + 1)
    followed = scene.trail.follow(scene.labels.with_voxels(whole))
    return torch.from_numpy(followed.voxels[0].copy()), parts


# one map


@dataclass(frozen=True, kw_only=True, eq=False)
class Stitched:
    """What all windows that meet a target add to its score."""

    look: Look
    """Of the voxels that these windows cover."""
    first: tuple[int, int, int]
    """Where these begin."""
    fullest: tuple[int, int, int]
    """Where the window starts that holds most of the target."""


def stitched(scene: Scene, lens: Lens, mask: Bool[Tensor, "i j k"], channel: int) -> Stitched:
    """Window after window, added up over the box that they cover: what does not meet the mask has no part in the score."""
    windows, voxels = scene.windows, int(mask.sum())
    starts = [start for start in windows.starts if mask[windows.place(start)].any()]
    low, high = np.min(starts, axis=0), np.max(starts, axis=0) + windows.patch
    total = torch.zeros(*(high - low).tolist())

    def weight(start: tuple[int, int, int]) -> Tensor:
        return mask[windows.place(start)] * windows.share(start) / voxels

    pooled: list[np.ndarray] = []
    if lens.method in AVERAGING:
        each = [lens.weighed(scene.window(start), weight(start), channel) for start in starts]
        pooled = [np.mean(of_network, axis=0) for of_network in zip(*each, strict=True)]
    looks = None
    for start in starts:
        look = lens.look(scene.window(start), weight(start), channel, pooled)
        # where channels have one weight for the whole scan, a window does not know its share of the score
        seen = look.map * windows.share(start) if pooled else look.map
        total[_box(np.subtract(start, low).tolist(), windows.patch)] += seen
        looks = looks.and_then(look) if looks else look
    assert looks is not None, "a mask that is not empty meets a window"
    i, j, k = low.tolist()
    fullest = max(starts, key=lambda start: float(weight(start).sum()))
    return Stitched(look=replace(looks, map=total), first=(i, j, k), fullest=fullest)


def _explained(target: _Target, scene: Scene, lens: Lens, choice: Choice) -> Iterator[Explanation]:
    """The map of one target, and where it is cross-checked captum's beside it."""
    if target.mask is None:
        yield _blank(target, scene, lens, None, target.reason)
        return
    channel = scene.channel(target.label)
    made = stitched(scene, lens, target.mask, channel)
    map_ = made.look.map
    if not bool(map_.isfinite().all()) or not np.isfinite(made.look.score):
        yield _blank(target, scene, lens, None, "the network's gradients are no numbers")
        return
    if not bool(map_.any()):
        yield _blank(target, scene, lens, made.look.score, f"nothing at {lens.layer_name} changes the score")
        return
    said, agreement = _warnings(lens, made.look.health), None
    if choice.cross_check and lens.method != CROSS_CHECK:
        other = replace(lens, method=CROSS_CHECK, layer=None)
        crossed = stitched(scene, other, target.mask, channel)
        agreement = _agreement(map_, crossed.look.map)
        if agreement < ALIKE:
            said += (f"captum's integrated gradients matter elsewhere (rank correlation {agreement:.2f})",)
    yield replace(_drawn(target, scene, lens, made, said, choice), agreement=agreement)
    if agreement is not None:
        yield _drawn(target, scene, other, crossed, (), choice)


CROSS_CHECK = "integrated_gradients"


def _agreement(one: Float[Tensor, "i j k"], other: Float[Tensor, "i j k"], side: int = 4) -> float:
    """Rank correlation of how much places matter, for or against: one method speaks of voxels, another of a quarter of
    the resolution, so means of blocks are compared."""
    kernel = [min(side, size) for size in one.shape]
    blocks = (avg_pool3d(values[None, None].abs(), kernel).flatten().numpy() for values in (one, other))
    ranks = [stats.rankdata(some) for some in blocks]
    if any(np.ptp(some) == 0 for some in ranks):
        return 0.0
    return round(float(np.corrcoef(*ranks)[0, 1]), 3)


def _warnings(lens: Lens, health: float | None) -> tuple[str, ...]:
    """Why the map should not be believed, whatever its tests say."""
    said = []
    if lens.layer and lens.layer.is_last:
        said.append(
            f"{lens.layer.name} is the last step before the answer: its map is the answer once more, not a reason; "
            "leave the layer out"
        )
    if lens.method in AVERAGING:
        said.append(
            f"{lens.method} gives a channel one weight for the whole scan: its map does not add up to the score"
        )
        if health is not None and health < HEALTHY:
            said.append(
                f"{lens.method} averages gradients, and here their mean is {health:.2f} of their size (instance norm makes "
                "it vanish): the map is noise; use hirescam"
            )
    if lens.method == "occlusion":
        said.append("each window is occluded by itself: where windows overlap, blocks of several are added")
    return tuple(said)


def _drawn(
    target: _Target, scene: Scene, lens: Lens, made: Stitched, warnings: tuple[str, ...], choice: Choice
) -> Explanation:
    """The map on the scan's own grid, in codes, and what tests say of it."""
    per_ml = 1000 / float(np.prod(scene.plan.spacing_mm))
    codes, scale = _coded(scene.returned(made.look.map * per_ml, made.first))
    if not scale:
        return _blank(target, scene, lens, made.look.score, "all of it lies beyond the scan")
    return Explanation(
        label=target.label.name,
        part=target.part,
        method=lens.method,
        layer=lens.layer_name,
        codes=codes,
        scale=scale,
        unit="logits per ml",
        score=made.look.score,
        health=made.look.health,
        faithfulness=_judged(target, scene, lens, made) if choice.tests else None,
        warnings=warnings,
    )


def _coded(values: Float[np.ndarray, "i j k"]) -> tuple[Int8[np.ndarray, "i j k"], float]:
    """One scale for the whole map, never one per slice: plane by plane, for a copy may be as large as the scan."""
    peak = max(float(values.max()), -float(values.min()))
    codes = np.zeros(values.shape, np.int8)  # planes that stay 0 cost no memory
    if peak < np.finfo(np.float32).tiny:
        return codes, 0.0
    for plane, coded in zip(values, codes, strict=True):
        if plane.any():
            coded[...] = np.rint(plane * (LEVELS / peak))
    return codes, peak / LEVELS


def _blank(target: _Target, scene: Scene, lens: Lens, score: float | None, reason: str) -> Explanation:
    return Explanation(
        label=target.label.name,
        part=target.part,
        method=lens.method,
        layer=lens.layer_name,
        codes=np.zeros(scene.labels.geometry.shape, np.int8),
        scale=0.0,
        unit="logits per ml",
        score=score,
        blank=reason,
    )


def _judged(target: _Target, scene: Scene, lens: Lens, made: Stitched) -> Faithfulness:
    """What tests say of it, in the window that holds most of the target."""
    assert target.mask is not None
    channel = scene.channel(target.label)
    window, inside = scene.window(made.fullest), target.mask[scene.windows.place(made.fullest)]
    weight = inside * scene.windows.share(made.fullest)
    weight = weight / weight.sum()
    forgotten = replace(lens, networks=tuple(unlearnt(network) for network in lens.networks))
    return judge(
        lens.look(window, weight, channel).map,
        window,
        inside,
        lambda altered: lens.score(altered, weight, channel),
        lambda altered: lens.look(altered, weight, channel).map,
        lambda altered: forgotten.look(altered, weight, channel).map,
        seed=0,  # the same case is judged the same
    )


# the network's own attention

MOST_MAPS = 4
"""The finest: coarser ones say the same in fewer places, and each costs as much as a map of a label."""


def _attention(scene: Scene, lens: Lens) -> Iterator[Explanation]:
    """What attention inside the networks weighed, stitched as logits are: the mean over windows, mirrorings and folds."""
    names = _shown(scene, lens)
    if not names:
        return
    windows = scene.windows
    maps = {name: torch.zeros(scene.geometry.shape) for name in names}
    count = len(lens.networks) * len(lens.mirrorings)
    for start in windows.starts:
        share, place = windows.share(start) / count, windows.place(start)
        for network in lens.networks:
            for axes in lens.mirrorings:
                seen = attention_maps(network, _batch(scene.window(start), network).flip(axes))
                for name in names:
                    fine = _enlarged(seen[name], windows.patch).flip([axis - 2 for axis in axes])
                    maps[name][place] += share * fine
    for name in names:
        codes, scale = _coded(scene.returned(maps.pop(name), (0, 0, 0)))
        yield Explanation(
            label="", part=None, method="attention", layer=name, codes=codes, scale=scale,
            unit="the network's own weight", score=None,
            blank="" if scale else "its attention is 0 everywhere",
        )  # fmt: skip


def _shown(scene: Scene, lens: Lens) -> list[str]:
    """The finest of the maps that have a weight per place; what has one per channel has nowhere to be shown."""
    network = lens.networks[0]
    if not any(isinstance(module, Attentive) for module in network.modules()):
        return []
    patch = scene.windows.patch
    seen = attention_maps(network, _batch(scene.window(scene.windows.starts[0]), network))
    spatial = {name: _places(weights, patch) for name, weights in seen.items()}
    for name in [name for name, shape in spatial.items() if not shape]:
        logger.info("attention %s has no weight per place: %s is not shown", name, list(seen[name].shape))
    shown = sorted((name for name in spatial if spatial[name]), key=lambda name: -np.prod(spatial[name]))
    for name in shown[MOST_MAPS:]:
        logger.info("attention %s is coarser than %d others and is not shown", name, MOST_MAPS)
    return shown[:MOST_MAPS]


def _batch(window: Float[Tensor, "channel i j k"], network: nn.Module) -> Float[Tensor, "1 channel i j k"]:
    return window[None].to(next((parameter.device for parameter in network.parameters()), window.device))


def _places(weights: Tensor, patch: Sequence[int]) -> tuple[int, ...]:
    """The grid of a map with a weight per place; nothing of any other."""
    shape = tuple(weights.shape[1:])
    shape = shape[1:] if len(shape) == 4 and shape[0] == 1 else shape
    is_map = len(shape) == 3 and all(side % size == 0 for side, size in zip(patch, shape, strict=True))
    return shape if is_map else ()


def _enlarged(weights: Tensor, patch: Sequence[int]) -> Float[Tensor, "i j k"]:
    coarse = weights[0].float().reshape(1, 1, *_places(weights, patch)).cpu()
    return interpolate(coarse, size=tuple(patch), mode="trilinear", align_corners=False)[0, 0]
