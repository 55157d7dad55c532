"""What training minimises: Dice and cross-entropy, at every resolution a network answers in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

IGNORE = -1
"""A voxel with this label is nobody's: no loss, no gradient."""

SMOOTH = 1e-5  # nnU-Net v2, compound_losses.py: keeps a class that is absent and not predicted at Dice 1


def dice_cross_entropy(
    logits: Float[Tensor, "B K *space"], target: Int64[Tensor, " B *space"], *, batch: bool = False
) -> Float[Tensor, ""]:
    """1 − Dice of the foreground classes + cross-entropy of all; `batch` counts Dice over the batch, not per sample."""
    _refuse_unknown_labels(logits, target)
    counted = target != IGNORE
    label = target.clamp_min(0)[:, None]  # [B, 1, ...]
    log_probability = functional.log_softmax(logits.float() if logits.dtype.itemsize < 4 else logits, dim=1)
    surprise = -log_probability.gather(1, label)[:, 0] * counted  # [B, ...]
    cross_entropy = surprise.sum() / counted.sum().clamp_min(1)

    probability = log_probability.exp() * counted[:, None]  # [B, K, ...]
    dice = _dice(probability, label, counted[:, None], batch)  # [B or 1, K - 1]
    return cross_entropy + 1 - dice.mean()


@dataclass(frozen=True)
class DeepSupervision:
    """A loss at every resolution, each counting half as much as the next finer one; the weights add up to 1."""

    loss: Callable[[Tensor, Tensor], Tensor] = dice_cross_entropy

    def __call__(
        self, outputs: Sequence[Float[Tensor, "B K ..."]] | Float[Tensor, "B K ..."], target: Int64[Tensor, "B ..."]
    ) -> Float[Tensor, ""]:
        """`outputs` finest first, as a network gives them in training, or one tensor, as it gives in use."""
        levels = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        weights = [0.5**level for level in range(len(levels))]
        losses = [self.loss(logits, shrink(target, logits.shape[2:])) for logits in levels]
        total = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
        return total / sum(weights)  # type: ignore[return-value]


def shrink(target: Int64[Tensor, "B ..."], shape: Sequence[int]) -> Int64[Tensor, "B ..."]:
    """The label map on a coarser grid, by taking every n-th voxel: labels have no average."""
    for axis, size in enumerate(shape, start=1):
        if size != target.shape[axis]:
            nearest = torch.arange(size, device=target.device) * target.shape[axis] // size
            target = target.index_select(axis, nearest)
    return target


def _dice(probability: Tensor, label: Tensor, counted: Tensor, batch: bool) -> Tensor:
    space = tuple(range(2, probability.ndim))
    over = (0, *space) if batch else space
    scores = []
    for number in range(1, probability.shape[1]):  # the background, class 0, is left out
        here = probability[:, number : number + 1]
        truth = (label == number) & counted
        both = (here * truth).sum(over)
        scores.append((2 * both + SMOOTH) / (here.sum(over) + truth.sum(over) + SMOOTH))
    return torch.stack(scores)


def _refuse_unknown_labels(logits: Tensor, target: Tensor) -> None:
    classes = logits.shape[1]
    if classes < 2:
        raise ValueError(
            f"Logits of {classes} class were given; the background and at least one label are needed. "
            "Build the network with classes = labels + 1."
        )
    if target.is_cuda or not target.numel():
        return  # a look at the values would make the device wait; it reports an index out of range by itself
    lowest, highest = (int(value) for value in target.aminmax())
    if lowest < IGNORE or highest >= classes:
        raise ValueError(
            f"Labels from {lowest} to {highest} were met; {classes} classes allow 0 to "
            f"{classes - 1}, and {IGNORE} to ignore a voxel. Renumber the labels."
        )
