"""Whether a map of where a network looked is to be believed: each is tested against chance, and against the mask itself."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import repeat
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Integer
from scipy import ndimage

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Faithfulness:
    """What tests say of a map, in the window that holds most of what it explains. Shares are 0 to 1, correlations -1 to 1."""

    deletion: float
    """Mean share of the score left while the map's highest voxels are taken away; lower is better."""
    deletion_random: float
    """The same of random maps as smooth as this one."""
    deletion_mask: float
    """The same of the predicted mask itself, which is nearly unbeatable: circular, and so the bar."""
    insertion: float
    """Mean share of the score that comes back while they are put in; higher is better."""
    insertion_random: float
    insertion_mask: float
    energy: float
    """Share of the map's positive importance inside the mask, a few voxels around it included."""
    energy_chance: float
    """What a map without any idea would have: the share of voxels there."""
    context: float
    """Share of the map's importance, for or against, outside of that."""
    randomisation: float
    """Rank correlation with the map of the same network with random weights: near 0 where the map depends on what was learnt."""
    randomisation_overlap: float
    """Share that the strongest hundredths of both maps have in common; chance is 0.005."""
    randomisation_scale: float
    """Peak of that map against this one's."""
    stability: float
    """Least rank correlation with maps of the scan with a little noise."""
    failed: tuple[str, ...] = ()
    """Which tests the map did not pass, or could not take, in words; empty: all passed."""
    noted: tuple[str, ...] = ()
    """What the tests say of the network, in words: that it looks elsewhere than where it finds."""


STEPS = 6
"""Points of a curve: two curves of three maps then cost 36 forward passes, and two more what they are measured by."""
AROUND = 3
"""Voxels around the mask that count as the label: a map made at a quarter of the resolution is blurred about as far."""
DRAWS = 3
"""How many times noise is added: enough to tell a map that jumps from one that does not, and no more."""
NOISE = 0.05
"""Of each channel's standard deviation: about what two scans of one patient differ by (25 HU in a CT's 500)."""
FEW = 1e-3
"""Share of surroundings in a blur below which a label fills its window and nothing can flow in."""
LEVELS = 127
"""Maps are ranked as they are written, in int8: what is too faint to be shown decides nothing."""

LEAST_DROP = 0.01
"""Of the score: where less than this goes when all is blurred and the label gone, nothing tells what the score rests on."""
LEAST_ROOM = 0.1
"""Of the score. Where chance leaves less than this to gain, as in a window that the label fills, a curve says nothing."""
LEAST_GAIN = 0.15
"""Of what there is to gain over chance. Measured on small trained U-Nets: 0.2 to 1 of maps that lie on what had been planted;
by deletion below 0.05 of shuffled, inverted and shifted ones, and 0.03 of Grad-CAM at a bottleneck with instance norm."""
LEAST_ENERGY = 0.1
"""Of what chance leaves. Measured: HiResCAM 0.2 at the bottleneck, 0.7 and more above; Grad-CAM, smeared over all, 0 to 0.03."""
ELSEWHERE = 0.5
"""Of the score: with as much left when the label is gone, and less when what the map marks is gone, a network looks elsewhere."""
MOST_ALIKE = 0.5
"""Rank correlation with a random network's map, or its mirror image. Measured: HiResCAM 0 to 0.3 in encoders, up to 0.9 in the last
layer, where it is the mask again; a map that only draws the scan's edges has 1. There is no limit for the strongest voxels both have
in common (up to 0.4 of good maps: bright is bright whatever the weights), nor for the peak (0.03 to 0.9 of good maps here:
normalised layers are as strong with any weights); both are told."""
LEAST_STABLE = 0.5
"""Rank correlation with the map of the same scan with a little noise. Measured: 0.9 to 1 of all methods."""


def judge(
    relevance: "torch.Tensor",
    window: "torch.Tensor",
    mask: "torch.Tensor",
    score: Callable[["torch.Tensor"], float],
    explain: Callable[["torch.Tensor"], "torch.Tensor"],
    explain_random: Callable[["torch.Tensor"], "torch.Tensor"],
    seed: int,
) -> Faithfulness:
    """What tests say of the signed map `relevance` [i j k] of one network window [c i j k] in which `mask` [i j k] was found.

    `score` is what the map explains, of an altered window, and `explain` its map; `explain_random` is that of a copy of the
    network with random weights. They are called 38, 3 and 1 times: 42 forward passes and 4 backward ones. The same seed
    says the same.
    """
    random = np.random.default_rng(seed)
    found, signed = _array(mask) > 0, _array(relevance).astype(np.float64)
    near = ndimage.binary_dilation(found, np.ones((2 * AROUND + 1,) * 3, bool))
    if reason := _untestable(signed, found):
        return _silent(reason, float(near.mean()))
    curves, reason = _curves(signed, found, window, score, random)
    again = [_array(explain(_noisy(window, random))) for _ in range(DRAWS)]
    unlearnt = _array(explain_random(window.clone()))
    said = Faithfulness(
        **curves,
        **_whereabouts(signed, near),
        randomisation=_correlation(signed, unlearnt),
        randomisation_overlap=_overlap(signed, unlearnt, random),
        randomisation_scale=float(np.abs(unlearnt).max() / np.abs(signed).max()),
        stability=min(_correlation(signed, other) for other in again),
    )
    return replace(said, failed=_failures(said, reason), noted=_notes(said, reason))


def _array(tensor: "torch.Tensor") -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def _untestable(signed: Float[np.ndarray, "i j k"], found: Bool[np.ndarray, "i j k"]) -> str:
    if not found.any():
        return "nothing was found in this window"
    if not np.isfinite(signed).all():
        return "the map holds values that are no numbers"
    return "" if signed.any() else "the map is blank"


UNTOLD = {"deletion": 1.0, "insertion": 0.0}
"""All of the score left, whatever is taken away, and nothing of it back: what no test says anything else of."""


def _untold() -> dict[str, Any]:
    return {f"{test}{name}": value for test, value in UNTOLD.items() for name in ("", "_random", "_mask")}


def _silent(reason: str, chance: float) -> Faithfulness:
    """Of a map of which no test can say anything."""
    return Faithfulness(
        **_untold(), energy=0.0, energy_chance=chance, context=0.0, randomisation=0.0, randomisation_overlap=0.0,
        randomisation_scale=0.0, stability=0.0, failed=(f"there is nothing to test: {reason}",),
    )  # fmt: skip


# taking away and putting in


def _curves(
    signed: Float[np.ndarray, "i j k"],
    found: Bool[np.ndarray, "i j k"],
    window: "torch.Tensor",
    score: Callable[["torch.Tensor"], float],
    random: np.random.Generator,
) -> tuple[dict[str, Any], str]:
    """Deletion and insertion of the map, of chance and of the mask; and why they say nothing, if so."""
    blurred = window.new_tensor(_blurred(_array(window), found))
    most, least = score(window.clone()), score(blurred.clone())  # some networks write over what they are given
    if not most - least > LEAST_DROP * abs(most):  # nor where one is no number
        return _untold(), f"the network says the same of a blurred scan (score {least:.3g}, of this one {most:.3g})"
    counts = _counts(found)
    orders: dict[str, Iterator[Integer[np.ndarray, "i j k"]]] = {
        "": repeat(_ranks(signed, random)),
        "_random": _chance(signed, random),
        "_mask": repeat(_ranks(found.astype(np.float64), random)),
    }

    def share(kept: Bool[np.ndarray, "i j k"]) -> float:
        left = score(window.where(window.new_tensor(kept).bool(), blurred))
        return float(np.clip((left - least) / (most - least), 0, 1))

    told = {
        f"{test}{name}": fmean(share((next(order) < count) == (test == "insertion")) for count in counts)
        for name, order in orders.items()
        for test in UNTOLD
    }
    if not np.isfinite(list(told.values())).all():
        return _untold(), "the network answers an altered scan with values that are no numbers"
    return told, ""


def _counts(found: Bool[np.ndarray, "i j k"]) -> list[int]:
    """How many voxels are taken away, step by step, each so many times the last.

    From as many as the label has, in which a perfect map has all its evidence, to 32 times as many, a ball's voxels three
    times as wide; never more than half of the window, where chance takes most of any label, too.
    """
    label = float(found.mean())
    shares = np.geomspace(min(label, 0.25), min(32 * label, 0.5), STEPS)
    return [max(1, round(share * found.size)) for share in shares]


def _blurred(voxels: Float[np.ndarray, "c i j k"], found: Bool[np.ndarray, "i j k"]) -> Float[np.ndarray, "c i j k"]:
    """The window without the label: its surroundings, blurred, flow in, so that there is neither an edge nor a value that
    the window did not have.

    Blurred by twice the radius of a ball as large as the label, which leaves 3 % of its contrast (by the radius: 20 %) if
    its rim were counted among the surroundings; a rim of a voxel is not.
    """
    axes = sum(side > 1 for side in found.shape) or 1
    radius = 0.6 * found.sum() ** (1 / axes)  # a ball of one voxel has 0.62, a disc 0.56
    widths = [min(2 * radius, side / 4) for side in found.shape]
    around = (~ndimage.binary_dilation(found, np.ones((3, 3, 3), bool))).astype(np.float32)
    weight = ndimage.gaussian_filter(around, widths)
    plain = ndimage.gaussian_filter(voxels, (0, *widths))
    flown = ndimage.gaussian_filter(voxels * around, (0, *widths)) / np.maximum(weight, FEW)
    return np.where(weight > FEW, flown, plain)


def _ranks(values: Float[np.ndarray, "i j k"], random: np.random.Generator) -> Integer[np.ndarray, "i j k"]:
    """Each voxel's place, the highest value's 0; of equal values chance decides, not where they lie."""
    shuffled = random.permutation(values.size)
    ranks = np.empty(values.size, np.int64)
    ranks[shuffled[np.argsort(-values.ravel()[shuffled], kind="stable")]] = np.arange(values.size)
    return ranks.reshape(values.shape)


def _chance(signed: Float[np.ndarray, "i j k"], random: np.random.Generator) -> Iterator[Integer[np.ndarray, "i j k"]]:
    """Random maps as smooth as this one: a new one each time, for a single one may hit the label by luck."""
    widths = [_smoothness(signed, axis) for axis in range(3)]
    while True:
        yield _ranks(ndimage.gaussian_filter(random.normal(size=signed.shape), widths, mode="wrap"), random)


def _smoothness(signed: Float[np.ndarray, "i j k"], axis: int) -> float:
    """Sigma in voxels of the Gaussian whose noise has neighbours as alike as these: exp(-1 / (4 sigma²)), or 0."""
    lines = np.moveaxis(signed - signed.mean(), axis, 0)
    alike = float((lines[1:] * lines[:-1]).sum() / np.square(lines).sum()) if lines.any() and len(lines) > 1 else 0.0
    widest = len(lines) / 4
    return min(widest, (-4 * np.log(alike)) ** -0.5) if 0 < alike < 1 else 0.0


# where it lies, and what it is like


def _whereabouts(signed: Float[np.ndarray, "i j k"], near: Bool[np.ndarray, "i j k"]) -> dict[str, Any]:
    positive, importance = signed.clip(0), np.abs(signed)
    return {
        "energy": float(positive[near].sum() / (positive.sum() or 1)),
        "energy_chance": float(near.mean()),
        "context": float(importance[~near].sum() / importance.sum()),
    }


def _noisy(window: "torch.Tensor", random: np.random.Generator) -> "torch.Tensor":
    voxels = _array(window)
    spread = voxels.std(axis=(1, 2, 3), keepdims=True)
    return window.new_tensor(voxels + NOISE * spread * random.normal(size=voxels.shape))


def _correlation(one: Float[np.ndarray, "i j k"], other: Float[np.ndarray, "i j k"]) -> float:
    """Spearman's, of the signed maps as they would be written; 0 where either says nothing."""
    first, second = (ranks - ranks.mean() for ranks in (_middle_ranks(one), _middle_ranks(other)))
    both = np.sqrt(np.square(first).sum() * np.square(second).sum())
    return float(np.clip((first * second).sum() / both, -1, 1)) if both else 0.0


def _middle_ranks(values: Float[np.ndarray, "i j k"]) -> Float[np.ndarray, " voxels"]:
    """Ranks of which equal values share the middle one. There are few values, so they are counted, not sorted."""
    codes = (_levels(values) + LEVELS).ravel()
    counts = np.bincount(codes, minlength=2 * LEVELS + 1)
    return (np.cumsum(counts) - counts / 2)[codes]


def _levels(values: Float[np.ndarray, "i j k"]) -> Integer[np.ndarray, "i j k"]:
    values = np.where(np.isfinite(values), values, 0.0)
    return np.rint(LEVELS * (values / (np.abs(values).max() or 1))).astype(np.int64)


def _overlap(one: Float[np.ndarray, "i j k"], other: Float[np.ndarray, "i j k"], random: np.random.Generator) -> float:
    """Of the strongest hundredths of both, the share that is in both."""
    strongest = max(1, one.size // 100)
    first, second = (_ranks(values, random) < strongest for values in (one, other))
    return float((first & second).sum() / (first | second).sum())


# the verdict


def _failures(said: Faithfulness, reason: str) -> tuple[str, ...]:
    """In words, the tests that were not passed or said nothing; `reason` is why the curves did, if they did."""
    gains = {} if reason else _gains(said)
    reason = reason or "chance does as well as any map could"
    found = {
        f"deletion and insertion say nothing: {reason}": not gains,
        f"without what it marks {said.deletion:.2f} of the score is left, without random places "
        f"{said.deletion_random:.2f}": gains.get("deletion", 1) < LEAST_GAIN,
        f"what it marks brings back {said.insertion:.2f} of the score, random places "
        f"{said.insertion_random:.2f}": gains.get("insertion", 1) < LEAST_GAIN,
        f"{said.energy:.2f} of it lies at the label, of a map without any idea {said.energy_chance:.2f}": (
            _concentration(said) < LEAST_ENERGY and not _decides_elsewhere(said, gains)
        ),
        f"a network with random weights has the same map (rank correlation {said.randomisation:.2f})": (
            abs(said.randomisation) > MOST_ALIKE
        ),
        f"a little noise makes another map (rank correlation {said.stability:.2f})": said.stability < LEAST_STABLE,
    }
    return tuple(words for words, is_so in found.items() if is_so)


def _notes(said: Faithfulness, reason: str) -> tuple[str, ...]:
    """What the tests say of the network rather than of the map."""
    if reason or not _decides_elsewhere(said, _gains(said)):
        return ()
    return (
        f"without the label {said.deletion_mask:.2f} of the score is left, without what the map marks {said.deletion:.2f}: "
        "the network decides by what lies beside the label",
    )


def _gains(said: Faithfulness) -> dict[str, float]:
    """Of each curve in which chance leaves anything to gain, the share of it that the map gains."""
    room = {
        "deletion": (said.deletion_random - said.deletion, said.deletion_random),
        "insertion": (said.insertion - said.insertion_random, 1 - said.insertion_random),
    }
    return {test: gain / most for test, (gain, most) in room.items() if most > LEAST_ROOM}


def _decides_elsewhere(said: Faithfulness, gains: dict[str, float]) -> bool:
    """A map beside the label is right where the score goes with the map and not with the label."""
    is_marked = gains.get("deletion", 0) >= LEAST_GAIN and said.deletion_mask - said.deletion >= LEAST_GAIN
    return is_marked and said.deletion_mask >= ELSEWHERE


def _concentration(said: Faithfulness) -> float:
    """Of what chance leaves, the share of importance that lies at the label; 1 where that is the whole window."""
    left = 1 - said.energy_chance
    return (said.energy - said.energy_chance) / left if left else 1.0
