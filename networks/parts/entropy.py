"""Attention kept from closing too early: its negative entropy as a loss, which any network that attends can take.

After Zhang et al., "AEM: Attention Entropy Maximization" (MICCAI 2025, arXiv 2406.15303):

    loss + λ_t Σ_n a_n ln a_n        λ_t = λ/2 (1 + cos(π t))        t from 0 to 1 over the training

Off unless asked for, and its weight is one to tune: where a slide holds a few tiles that matter, others report that it
harms. Where this departs from the paper's code, and why:

- The weight falls along half a cosine, as their paper says; no revision of their code does it.
- The form for the `top` tiles is taken from their scores, not from the logarithm of their attention: where attention is
  so sharp that the last of them has none, that would be 0 · log 0.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from kernels import gated_pooling

from .bags import BagAnswer, Bags


def attention_entropy_loss(answer: BagAnswer, bags: Bags, top: int = 0) -> Float[Tensor, ""]:
    """The negative entropy of the attention, the mean over maps and bags: between -ln(tiles) and 0, lower where flatter.

    With `top`, that of the strongest tiles alone, as if they were the whole bag."""
    if not top:
        return -answer.entropy.mean()
    rows, _ = gated_pooling.top_tiles(answer.scores, answer.log_sums, bags.offsets, top, answer.mask)
    there = rows >= 0  # [bags, maps, top]; a bag may have fewer
    found = answer.scores.gather(0, rows.clamp(min=0).movedim(2, 1).flatten(0, 1))  # [bags · top, maps]
    scores = found.unflatten(0, (len(bags), top)).movedim(1, 2).masked_fill(~there, -torch.inf)
    logs = torch.log_softmax(scores, 2)
    return (torch.exp(logs) * logs.masked_fill(~there, 0)).sum(2).mean()


def annealed(weight: float, done: float) -> float:
    """The weight of the loss when that share of the training is done: all of it at first, nothing at the end."""
    return 0.5 * weight * (1 + math.cos(math.pi * done))
