"""How unsure the networks are of each voxel: 0 where all are sure of one answer, 1 where every answer is as good.

    entropy       H(p) / log K                    of the mean probabilities p of K classes
    disagreement  (H(p) - mean_m H(p_m)) / log K  what of it comes from members m that contradict each other

H(p) = -Σ_k p_k log p_k. Members are folds, or the mirrorings of one window. Regions, which may overlap, each have a yes
and a no: K = 2, and the region that is least clear counts. Computed where the networks answered; maps of them are
interpolated as probabilities are. Disagreement is the mutual information of answer and member (BALD, Houlsby 2011).
"""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor


def entropy(probabilities: Float[Tensor, "K i j k"], has_regions: bool = False) -> Float[Tensor, "i j k"]:
    """Of one answer."""
    return entropies(probabilities, has_regions).amax(dim=0).clamp(0, 1)


def disagreement(
    mean: Float[Tensor, "K i j k"], members: Iterable[Float[Tensor, "K i j k"]], has_regions: bool = False
) -> Float[Tensor, "i j k"]:
    """Of several answers whose mean is given; they are looked at one after the other."""
    unsure, count = torch.zeros((), device=mean.device), 0
    for member in members:
        unsure, count = unsure + entropies(member, has_regions), count + 1
    assert count, "nobody answered"
    # rounding may leave a little below 0 where all agree
    return (entropies(mean, has_regions) - unsure / count).amax(dim=0).clamp(0, 1)


def entropies(probabilities: Float[Tensor, "K i j k"], has_regions: bool) -> Float[Tensor, "question i j k"]:
    """Of the one question which class it is; or of each region, whether it is there."""
    if has_regions:
        return (torch.special.entr(probabilities) + torch.special.entr(1 - probabilities)) / math.log(2)
    return torch.special.entr(probabilities).sum(dim=0, keepdim=True) / math.log(len(probabilities))
