"""What training minimises: overlap and surprise, at every resolution a network answers in; and what to do where nobody
knows the truth: at ignored voxels, and for labels that were not looked for in a case.

Labels exclude each other (softmax, channel 0 is the background), or they are regions that overlap (sigmoid, a channel
each). `annotated` says which labels were looked for in each case of a batch. A voxel that none of those covers may be
background or any of the others: the softmax loss asks only for their common probability, in a case where nothing but the
liver was looked for

    surprise = −log(p_background + p_spleen + p_kidney + ...)        where no liver was painted,

and the sigmoid loss leaves the others' channels alone. Dice counts the labels that were looked for.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional

IGNORE = -1
"""A voxel with this number is nobody's: no loss, no gradient."""

SMOOTH = 1e-5  # nnU-Net v2, compound_losses.py: keeps a class that is absent and not predicted at Dice 1


def build(
    name: str, *, membership: Bool[Tensor, "L P"], regions: bool, batch_dice: bool = False,
    skip_lowest: bool = False, options: Mapping[str, Any] | None = None,
) -> "DeepSupervision":  # fmt: skip
    """The loss of that name. `membership` says which numbers of the target belong to each label (plan.membership), and
    `regions` whether labels overlap; `options` are the loss's own."""
    if name not in LOSSES:
        raise ValueError(f"the loss {name!r} is not known; one of {', '.join(LOSSES)} is needed. Correct its name.")
    known = inspect.signature(LOSSES[name]).parameters.keys() - {"seen", "batch"}
    if unknown := sorted(set(options or {}) - known):
        raise ValueError(
            f"{name} was given the options {unknown}; it has {sorted(known) or 'none'}. Correct or remove them."
        )
    criterion = partial(LOSSES[name], batch=batch_dice, **(options or {}))

    def loss(logits: Tensor, target: Tensor, annotated: Tensor | None) -> Tensor:
        seen = _regions(logits, target, annotated, membership) if regions else _exclusive(logits, target, annotated)
        return criterion(seen)

    return DeepSupervision(loss, skip_lowest)


def dice_cross_entropy(
    logits: Float[Tensor, "B K *space"], target: Int64[Tensor, " B *space"],
    annotated: Bool[Tensor, "B L"] | None = None, *, batch: bool = False,
) -> Float[Tensor, ""]:  # fmt: skip
    """The usual loss of labels that exclude each other; `batch` counts Dice over the batch, not per sample."""
    return dice_and_cross_entropy(_exclusive(logits, target, annotated), batch=batch)


@dataclass(frozen=True)
class DeepSupervision:
    """A loss at every resolution, each counting half as much as the next finer one; the weights add up to 1."""

    loss: Callable[[Tensor, Tensor, Tensor | None], Tensor] = dice_cross_entropy
    skip_lowest: bool = False
    """The coarsest of several counts nothing (nnU-Net v2)."""

    def __call__(
        self, outputs: Sequence[Float[Tensor, "B K ..."]] | Float[Tensor, "B K ..."], target: Int64[Tensor, "B ..."],
        annotated: Bool[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, ""]:  # fmt: skip
        """`outputs` finest first, as a network gives them in training, or one tensor, as it gives in use. `annotated`:
        the labels that were looked for; None: all, in every case (knowing that saves time)."""
        levels = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        counting = levels[:-1] if self.skip_lowest and len(levels) > 1 else levels
        weights = [0.5**level for level in range(len(counting))]
        losses = [self.loss(logits, shrink(target, logits.shape[2:]), annotated) for logits in counting]
        total: Tensor = sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / sum(weights)  # type: ignore[assignment]
        for logits in levels[len(counting) :]:
            total = total + 0 * logits.sum()  # several GPUs wait for a gradient of every weight, be it zero
        return total


def shrink(target: Int64[Tensor, "B ..."], shape: Sequence[int]) -> Int64[Tensor, "B ..."]:
    """The label map on a coarser grid, by taking every n-th voxel: labels have no average."""
    for axis, size in enumerate(shape, start=1):
        if size != target.shape[axis]:
            nearest = torch.arange(size, device=target.device) * target.shape[axis] // size
            target = target.index_select(axis, nearest)
    return target


@dataclass(frozen=True, kw_only=True, eq=False)
class Compared:
    """An answer beside the truth, voxels in one row: all that any loss looks at."""

    probability: Float[Tensor, "B L N"]
    """Of each label; 0 in a case in which it was not looked for."""
    surprise: Float[Tensor, "B C N"]
    """−log of the probability of what is true: C = 1 where labels exclude each other, one per region otherwise."""
    counted: Float[Tensor, "B C N"]
    """1 where the truth is known."""
    both: Float[Tensor, "B L"]
    """How much probability each label has where it truly is,"""
    found: Float[Tensor, "B L"]
    """and everywhere;"""
    true: Float[Tensor, "B L"]
    """and of how many voxels it truly is."""
    annotated: Float[Tensor, "B L"]
    """1 where that label was looked for in that case."""
    truth: Callable[[], Bool[Tensor, "B L *space"]]
    """Where each label truly is; few losses need to know."""


def _exclusive(
    logits: Float[Tensor, "B K *space"], target: Int64[Tensor, " B *space"], annotated: Bool[Tensor, "B L"] | None
) -> Compared:
    """One label or none at each voxel: a softmax over the channels, background first."""
    batch, classes = logits.shape[:2]
    _refuse_unknown_labels(target, classes, classes)
    number = target.flatten(1).clamp_min(0)  # [B, N]
    known = target.flatten(1) != IGNORE
    scores = _single(logits).flatten(2)  # [B, K, N]
    if annotated is not None and (annotated.is_cuda or not annotated.all()):  # a device must not wait for a shortcut
        known = known & annotated.any(1, keepdim=True)  # a case in which nothing was looked for teaches nothing
        scores, number = _merged(scores, number, annotated)
    counted = known.to(scores.dtype)
    log_probability = functional.log_softmax(scores, dim=1)
    of_truth = log_probability.gather(1, number[:, None])  # [B, 1, N]
    probability = log_probability.exp()  # [B, K, N]
    return Compared(
        probability=probability[:, 1:],
        surprise=-of_truth,
        counted=counted[:, None],
        both=_by_number(of_truth[:, 0].exp() * counted, number, classes),
        found=_dot(probability, counted[:, None])[:, 1:],
        true=_by_number(counted, number, classes),
        annotated=_looked_for(annotated, batch, classes - 1, counted),
        truth=lambda: torch.stack([target == n for n in range(1, classes)], dim=1),
    )


def _merged(
    scores: Float[Tensor, "B K N"], number: Int64[Tensor, "B N"], annotated: Bool[Tensor, "B L"]
) -> tuple[Float[Tensor, "B K N"], Int64[Tensor, "B N"]]:
    """Labels that were not looked for become one class with the background; in the score of a sum of probabilities
    their scores are summed as exponentials."""
    alone = functional.pad(annotated, (1, 0))  # [B, K]; the background is never alone
    apart = scores.masked_fill(~alone[:, :, None], -math.inf)
    together = scores.masked_fill(alone[:, :, None], -math.inf).logsumexp(1, keepdim=True)
    return torch.cat([together, apart[:, 1:]], dim=1), number * alone.gather(1, number)


def _by_number(amount: Float[Tensor, "B N"], number: Int64[Tensor, "B N"], classes: int) -> Float[Tensor, "B L"]:
    """The amounts summed label by label, in one pass whatever the number of labels; in float64, for they are millions."""
    sums = amount.new_zeros(len(amount), classes, dtype=torch.float64).scatter_add(1, number, amount.double())
    return sums[:, 1:].to(amount.dtype)


def _regions(
    logits: Float[Tensor, "B K *space"], target: Int64[Tensor, " B *space"], annotated: Bool[Tensor, "B L"] | None,
    membership: Bool[Tensor, "L P"],
) -> Compared:  # fmt: skip
    """Any labels at each voxel: a sigmoid for each channel."""
    batch, labels = logits.shape[:2]
    if labels != len(membership):
        raise ValueError(
            f"Logits of {labels} channels were given for {len(membership)} regions; one channel for each is needed. "
            "Build the network with classes = regions."
        )
    _refuse_unknown_labels(target, membership.shape[1])
    members = membership.to(target.device)
    scores = _single(logits).flatten(2)  # [B, L, N]
    is_there = members[:, target.flatten(1).clamp_min(0)].movedim(1, 0).to(scores.dtype)
    looked_for = _looked_for(annotated, batch, labels, scores)
    counted = (target.flatten(1) != IGNORE)[:, None] * looked_for[:, :, None]  # [B, L, N]
    probability = scores.sigmoid()
    known_there = is_there * counted
    return Compared(
        probability=probability,
        surprise=functional.binary_cross_entropy_with_logits(scores, is_there, reduction="none"),
        counted=counted,
        both=_dot(probability, known_there),
        found=_dot(probability, counted),
        true=known_there.sum(2),
        annotated=looked_for,
        truth=lambda: members[:, target.clamp_min(0)].movedim(1, 0),
    )


def _single(logits: Tensor) -> Tensor:
    """Half precision is summed in single precision."""
    return logits.float() if logits.dtype.itemsize < 4 else logits


def _dot(a: Float[Tensor, "B L N"], b: Float[Tensor, "B _ N"]) -> Float[Tensor, "B L"]:
    """Sums over voxels, which mixed precision would round to three digits."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.linalg.vecdot(a, b)


def _looked_for(annotated: Tensor | None, batch: int, labels: int, like: Tensor) -> Float[Tensor, "B L"]:
    return like.new_ones(batch, labels) if annotated is None else annotated.to(like.device, like.dtype)


def overlap(seen: Compared, batch: bool, *, alpha: float = 0.5, beta: float = 0.5) -> Float[Tensor, ""]:
    """1 − Dice, or 1 − Tversky's index where false alarms (`alpha`) and misses (`beta`) do not weigh the same: the mean
    over the labels that were looked for, of each case, or with `batch` of all cases together."""
    sums = (seen.both, seen.found, seen.true, seen.annotated)
    both, found, true, annotated = (one.sum(0, keepdim=True) for one in sums) if batch else sums
    rest = (1 - alpha - beta) * both + alpha * found + beta * true
    index = (both + SMOOTH / 2) / (rest + SMOOTH / 2)
    counted = annotated.clamp_max(1)
    return ((1 - index) * counted).sum() / counted.sum().clamp_min(1)


def cross_entropy(seen: Compared) -> Float[Tensor, ""]:
    """The mean surprise; of regions, the mean over their channels too."""
    return (seen.surprise * seen.counted).sum() / seen.counted.sum().clamp_min(1)


def focal(seen: Compared, gamma: float) -> Float[Tensor, ""]:
    """Surprise that counts less where the answer is right already: (1 − p)^γ · −log p (Lin et al. 2017)."""
    wrong = -torch.expm1(-seen.surprise)
    return (wrong.clamp_min(1e-12) ** gamma * seen.surprise * seen.counted).sum() / seen.counted.sum().clamp_min(1)


def worst(seen: Compared, share: float) -> Float[Tensor, ""]:
    """The mean surprise of the most surprising share of the voxels."""
    surprise = (seen.surprise * seen.counted).flatten()
    count = max(1, round(share * float(seen.counted.sum())))
    return surprise.topk(min(count, len(surprise)), sorted=False).values.mean()


def boundary(seen: Compared) -> Float[Tensor, ""]:
    """Probability times the signed distance to the label's edge, negative inside (Kervadec et al. 2019): the mean over
    voxels, in voxels. A label that is absent from a window has no edge in it."""
    distance = torch.stack([torch.stack([_signed_distance(one) for one in case]) for case in seen.truth().cpu()])
    distance = distance.flatten(2).to(seen.probability) * seen.annotated[:, :, None] * seen.counted
    known = (seen.annotated[:, :, None] * seen.counted).sum()
    return (seen.probability * distance).sum() / known.clamp_min(1)


def _signed_distance(truth: Bool[Tensor, "*space"]) -> Float[Tensor, "*space"]:
    from scipy.ndimage import distance_transform_edt

    inside = truth.numpy()
    if inside.all() or not inside.any():
        return torch.zeros(truth.shape)
    outwards, inwards = distance_transform_edt(~inside), distance_transform_edt(inside)
    return torch.from_numpy(
        outwards - (inwards - 1) * inside
    )  # the authors count 0 at the label's own outermost voxels


def dice_and_cross_entropy(seen: Compared, batch: bool) -> Float[Tensor, ""]:
    """nnU-Net's: overlap for small labels, surprise for steady gradients."""
    return cross_entropy(seen) + overlap(seen, batch)


def dice_and_focal(seen: Compared, batch: bool, *, gamma: float = 2.0) -> Float[Tensor, ""]:
    """For a few hard voxels among many easy ones."""
    return focal(seen, gamma) + overlap(seen, batch)


def tversky_and_cross_entropy(
    seen: Compared, batch: bool, *, alpha: float = 0.3, beta: float = 0.7
) -> Float[Tensor, ""]:
    """For lesions that are better found once too often than not at all (Salehi et al. 2017)."""
    return cross_entropy(seen) + overlap(seen, batch, alpha=alpha, beta=beta)


def dice_and_worst(seen: Compared, batch: bool, *, share: float = 0.1) -> Float[Tensor, ""]:
    """nnU-Net's DC_and_topk: cross-entropy of the tenth of the voxels that is worst."""
    return worst(seen, share) + overlap(seen, batch)


def dice_and_boundary(seen: Compared, batch: bool, *, weight: float = 0.01) -> Float[Tensor, ""]:
    """Dice and cross-entropy, and a little for how far from the edge what is wrong lies."""
    return dice_and_cross_entropy(seen, batch) + weight * boundary(seen)


LOSSES: dict[str, Callable[..., Float[Tensor, ""]]] = {
    "dice_cross_entropy": dice_and_cross_entropy,
    "dice_focal": dice_and_focal,
    "tversky_cross_entropy": tversky_and_cross_entropy,
    "dice_topk": dice_and_worst,
    "dice_boundary": dice_and_boundary,
}
"""The names a plan's recipe may give."""


def _refuse_unknown_labels(target: Tensor, numbers: int, classes: int = 2) -> None:
    if classes < 2:
        raise ValueError(
            f"Logits of {classes} class were given; the background and at least one label are needed. "
            "Build the network with classes = labels + 1."
        )
    if target.is_cuda or not target.numel():
        return  # a look at the values would make the device wait; it reports an index out of range by itself
    lowest, highest = (int(value) for value in target.aminmax())
    if lowest < IGNORE or highest >= numbers:
        raise ValueError(
            f"Labels from {lowest} to {highest} were met; {numbers} classes allow 0 to "
            f"{numbers - 1}, and {IGNORE} to ignore a voxel. Renumber the labels."
        )
