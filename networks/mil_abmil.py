"""Attention-based pooling of a bag of tiles: one weighted mean, one linear answer. The simplest that says where it looked.

After Ilse, Tomczak and Welling, "Attention-based Deep Multiple Instance Learning" (ICML 2018, arXiv 1802.04712), in the
form that whole slides gave it (the baseline of ACMIL, arXiv 2311.07125, and of AEM, arXiv 2406.15303):

    h_n = ReLU(R x_n)        s_n = w · tanh(V h_n) ⊙ sigmoid(U h_n)        a = softmax(s)        logits = C Σ a_n h_n + c

`attention: plain` is tanh alone. Good where slides are few: it has the fewest weights. The answer is linear in the tiles,
so each tile's share of it is a_n C h_n, exactly.

`faithful` is Ilse's own: features are embedded in 500 with a bias, and one logit says yes or no, with likelihoods clamped
to 1e-5. Where the default departs from that, and why:

- The projection has no bias, and a width that follows the encoder (ACMIL and AEM): encoders have learned already.
- As many logits as classes, and their cross-entropy: slides have more than two classes, and a clamp has no gradient
  just where the answer is most wrong.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from .parts.bags import BagAnswer, Bags, GatedAttention, cross_entropy, pooled_in_blocks, width_for

PAPER = "Ilse et al., ICML 2018, arXiv 1802.04712 (ABMIL)"
GOOD_FOR = "few slides: the fewest weights, and each tile's share of the answer is exact"

CLAMP = 1e-5
"""Ilse's: likelihoods stay this far from 0 and 1."""


@dataclass(frozen=True, kw_only=True)
class Config:
    attention: Literal["gated", "plain"] = "gated"
    """tanh times sigmoid, or tanh alone."""
    width: int = 0
    """Numbers to which the features of a tile are projected. 0: as published for the encoder, else half of its features."""
    hidden: int = 128
    """Units of the attention."""
    faithful: bool = False
    """Ilse's own: 500 numbers, one logit for two classes, a clamped likelihood."""

    def __post_init__(self) -> None:
        if self.width < 0 or self.hidden < 1 or self.attention not in ("gated", "plain"):
            raise ValueError(
                f"mil_abmil was given width {self.width}, hidden {self.hidden} and attention {self.attention!r}; needed are a "
                "width of 0 or more, a hidden of 1 or more, and gated or plain. Correct the wrong one."
            )


def build(config: Config, *, features: int, classes: int) -> nn.Module:
    """A new network with fresh weights, as torch draws them."""
    if config.faithful and classes != 2:
        raise ValueError(
            f"mil_abmil as Ilse has it says yes or no, and there are {classes} classes; 2 are needed. Leave `faithful` out."
        )
    return Abmil(config, features, classes)


class Abmil(nn.Module):
    def __init__(self, config: Config, features: int, classes: int) -> None:
        super().__init__()
        width = config.width or (500 if config.faithful else width_for(features))
        self.faithful = config.faithful
        self.project = nn.Sequential(nn.Linear(features, width, bias=config.faithful), nn.ReLU())
        self.attention = GatedAttention(width, config.hidden, gated=config.attention == "gated")
        self.head = nn.Linear(width, 1 if config.faithful else classes)

    def forward(self, bags: Bags, explain: bool = False) -> BagAnswer:
        attend = partial(self._attend, explain=explain)
        pooled, scores, entropy, log_sums, *adds = pooled_in_blocks(bags, self.project, attend)
        logits = self._of_classes(self.head(pooled[:, 0]))  # [bags, C]
        answer = BagAnswer(logits=logits, scores=scores, log_sums=log_sums, entropy=entropy)
        if not explain:
            return answer
        rest = self._of_classes(self.head.bias.expand(len(bags), -1))
        return replace(answer, shares=answer.attention(bags) * self._of_classes(adds[0]), rest=rest)

    def losses(
        self, answer: BagAnswer, bags: Bags, labels: Int[Tensor, " bag"],
        class_weights: Float[Tensor, " class"] | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        if self.faithful:
            return {"bag": _clamped_surprise(answer.logits[:, 1], labels, class_weights)}
        return {"bag": cross_entropy(answer.logits, labels, class_weights)}

    def _attend(self, h: Tensor, offsets: Tensor, mask: Tensor | None, explain: bool) -> tuple[Tensor, ...]:
        adds = [functional.linear(h, self.head.weight)] if explain else []  # [N, C]
        return *self.attention(h, offsets, mask), *adds

    def _of_classes(self, logits: Float[Tensor, "row output"]) -> Float[Tensor, "row class"]:
        """sigmoid(s) is the softmax of 0 and s."""
        return functional.pad(logits, (1, 0)) if self.faithful else logits


def _clamped_surprise(logit: Tensor, labels: Tensor, class_weights: Tensor | None) -> Tensor:
    likely = torch.sigmoid(logit).clamp(CLAMP, 1 - CLAMP)
    surprise = -torch.where(labels == 1, likely, 1 - likely).log()
    return (surprise if class_weights is None else class_weights[labels] * surprise).mean()
