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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from kernels import dice_loss

from .answer import Answer

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
        return criterion(Compared(logits, target, annotated, membership.to(target.device) if regions else None))

    return DeepSupervision(loss, skip_lowest)


def dice_cross_entropy(
    logits: Float[Tensor, "B K *space"], target: Integer[Tensor, " B *space"],
    annotated: Bool[Tensor, "B L"] | None = None, *, batch: bool = False,
) -> Float[Tensor, ""]:  # fmt: skip
    """The usual loss of labels that exclude each other; `batch` counts Dice over the batch, not per sample."""
    return dice_and_cross_entropy(Compared(logits, target, annotated), batch=batch)


@dataclass(frozen=True)
class DeepSupervision:
    """A loss at every resolution, each counting half as much as the next finer one, or as the network says; the weights
    add up to 1. A network's own losses keep their share: they are divided by the same sum."""

    loss: Callable[[Tensor, Tensor, Tensor | None], Tensor] = dice_cross_entropy
    skip_lowest: bool = False
    """The coarsest of several counts nothing (nnU-Net v2)."""

    def __call__(
        self, outputs: Answer | Sequence[Float[Tensor, "B K ..."]] | Float[Tensor, "B K ..."], target: Integer[Tensor, "B ..."],
        annotated: Bool[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, ""]:  # fmt: skip
        """`outputs` finest first, as a network gives them in training, or one tensor, as it gives in use. `annotated`:
        the labels that were looked for; None: all, in every case (knowing that saves time)."""
        answer = answered(outputs)
        levels, own = list(answer.logits), sum(answer.losses.values())
        skip = self.skip_lowest and len(levels) > 1 and not answer.weights
        counting = levels[:-1] if skip else levels
        weights = answer.weights or [0.5**level for level in range(len(counting))]
        losses = [self.loss(logits, shrink(target, logits.shape[2:]), annotated) for logits in counting]
        total: Tensor = (sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) + own) / sum(weights)  # type: ignore[assignment]
        for logits in levels[len(counting) :]:
            total = total + 0 * logits.sum()  # several GPUs wait for a gradient of every weight, be it zero
        return total


def answered(outputs: Answer | Sequence[Tensor] | Tensor) -> Answer:
    """What a network said, whichever way it said it."""
    if isinstance(outputs, Answer):
        return outputs
    return Answer(logits=[outputs] if isinstance(outputs, Tensor) else outputs)


def shrink(target: Integer[Tensor, "B ..."], shape: Sequence[int]) -> Integer[Tensor, "B ..."]:
    """The label map on a coarser grid, by taking every n-th voxel: labels have no average."""
    for axis, size in enumerate(shape, start=1):
        if size != target.shape[axis]:
            nearest = torch.arange(size, device=target.device) * target.shape[axis] // size
            target = target.index_select(axis, nearest)
    return target


@dataclass(frozen=True, eq=False)
class Compared:
    """An answer beside the truth: every loss is made of its sums; a few look at each voxel, which takes several times the
    memory of the logits."""

    logits: Float[Tensor, "B K *space"]
    target: Integer[Tensor, " B *space"]
    annotated: Bool[Tensor, "B L"] | None
    membership: Bool[Tensor, "L P"] | None = None
    """Of regions, which overlap; None: labels exclude each other."""

    @cached_property
    def sums(self) -> dice_loss.Sums:
        return dice_loss.fused(self.logits, self.target, self.annotated, self.membership)

    @cached_property
    def voxels(self) -> dice_loss.Voxels:
        return dice_loss.by_voxel(self.logits, self.target, self.annotated, self.membership)

    @property
    def looked_for(self) -> Float[Tensor, "B L"]:
        """1 where that label was looked for in that case."""
        sums = self.sums.found
        return torch.ones_like(sums) if self.annotated is None else self.annotated.to(sums)

    def truth(self) -> Bool[Tensor, "B L *space"]:
        """Where each label truly is."""
        if self.membership is None:
            return torch.stack([self.target == n for n in range(1, self.logits.shape[1])], dim=1)
        return self.membership[:, self.target.long().clamp_min(0)].movedim(1, 0)


def overlap(seen: Compared, batch: bool, *, alpha: float = 0.5, beta: float = 0.5) -> Float[Tensor, ""]:
    """1 − Dice, or 1 − Tversky's index where false alarms (`alpha`) and misses (`beta`) do not weigh the same: the mean
    over the labels that were looked for, of each case, or with `batch` of all cases together."""
    sums = (seen.sums.both, seen.sums.found, seen.sums.true, seen.looked_for)
    both, found, true, looked_for = (one.sum(0, keepdim=True) for one in sums) if batch else sums
    rest = (1 - alpha - beta) * both + alpha * found + beta * true
    index = (both + SMOOTH / 2) / (rest + SMOOTH / 2)
    counted = looked_for.clamp_max(1)
    return ((1 - index) * counted).sum() / counted.sum().clamp_min(1)


def cross_entropy(seen: Compared) -> Float[Tensor, ""]:
    """The mean surprise; of regions, the mean over their channels too."""
    return seen.sums.surprise.sum() / seen.sums.counted.sum().clamp_min(1)


def focal(seen: Compared, gamma: float) -> Float[Tensor, ""]:
    """Surprise that counts less where the answer is right already: (1 − p)^γ · −log p (Lin et al. 2017)."""
    _, surprise, counted = seen.voxels
    wrong = -torch.expm1(-surprise)
    return (wrong.clamp_min(1e-12) ** gamma * surprise * counted).sum() / counted.sum().clamp_min(1)


def worst(seen: Compared, share: float) -> Float[Tensor, ""]:
    """The mean surprise of the most surprising share of the voxels."""
    _, surprise, counted = seen.voxels
    surprise = (surprise * counted).flatten()
    count = max(1, round(share * float(counted.sum())))
    return surprise.topk(min(count, len(surprise)), sorted=False).values.mean()


def boundary(seen: Compared) -> Float[Tensor, ""]:
    """Probability times the signed distance to the label's edge, negative inside (Kervadec et al. 2019): the mean over
    voxels, in voxels. A label that is absent from a window has no edge in it."""
    distance = torch.stack([torch.stack([_signed_distance(one) for one in case]) for case in seen.truth().cpu()])
    probability, _, counted = seen.voxels
    known = seen.looked_for[:, :, None] * counted  # [B, L, N]
    return (probability * distance.flatten(2).to(known) * known).sum() / known.sum().clamp_min(1)


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
