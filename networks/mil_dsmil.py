"""Every class finds its most suspicious tile, and then all tiles that are like it.

After Li et al., "Dual-stream multiple instance learning network for whole slide image classification with self-supervised
contrastive learning" (CVPR 2021, arXiv 2011.08939). For the tiles h_n of a bag, and each class c,

    instance stream   i_nc = w_c · h_n + b_c;   m_c = the tile with the largest i_nc, the critical one
    bag stream        a_nc = softmax over n of q(h_n) · q(h_{m_c}) / √width,   B_c = Σ_n a_nc h_n
                      y_c = Σ_c' K_cc' · B_c' + k_c                            every output sees every class's B
    logits_c          = (i_{m_c, c} + y_c) / 2                                 equation 6 of the paper

Good where one tile is enough to decide, and more of its kind should be found. The attention of class c is a softmax, so
scores, log-sums and entropy are its own, a branch for each class. A tile's share of logit c is
½ Σ_c' a_nc' K_cc' · h_n, and ½ w_c · h_n more for the critical tile; the biases are the rest: nothing is approximated.

Where this departs from the authors' code, and why (`faithful` keeps the loss of theirs):

- They ask a sigmoid of each class; here the classes of a slide exclude each other, so both streams are trained with a
  softmax, as AEM's DSMIL does.
- They average the probabilities of both streams; here the logits are averaged, as their paper writes it: only logits can
  be divided among tiles.
- Their threshold is chosen on the slides it is then tested on, and tests drop tiles if training did. Neither is here.

Two passes over a bag, a block of tiles at a time: one without gradients finds the critical tiles, one pools. Between the
forward and the backward pass only N · classes scores are kept. A bag of 200,000 x 1024 in half precision, 410 MB, trains
with 60 MB beside it (two classes, CPU, as torch counts).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from .parts.bags import BagAnswer, Bags, cross_entropy, pooled_by_scores, pooled_in_blocks, projected_in_blocks

PAPER = "Li et al., CVPR 2021, arXiv 2011.08939 (DSMIL)"
GOOD_FOR = "one tile decides, and others like it should be found"


@dataclass(frozen=True, kw_only=True)
class Config:
    hidden: int = 128
    """Width of the queries in which tiles are compared with the critical one; 128 is the authors'."""
    linear: bool = False
    """Queries are one linear layer, as in AEM's DSMIL, instead of two with ReLU and tanh."""
    faithful: bool = False
    """The authors' loss: a sigmoid for each class instead of a softmax over all."""

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise ValueError(f"mil_dsmil was given hidden {self.hidden}; queries are 1 wide or wider. Correct it.")


def build(config: Config, *, features: int, classes: int) -> nn.Module:
    """A new network with fresh weights, drawn as torch draws them: the authors do the same."""
    return Dsmil(config, features, classes)


class Dsmil(nn.Module):
    def __init__(self, config: Config, features: int, classes: int) -> None:
        super().__init__()
        self.faithful = config.faithful
        self.instance = nn.Linear(features, classes)
        self.query = _query(features, config)
        self.bag = nn.Conv1d(classes, classes, features)

    def forward(self, bags: Bags, explain: bool = False) -> BagAnswer:
        critical = self._critical(bags)  # [bag, class]
        parts = [self._one(bag, tiles, explain) for bag, tiles in zip(bags.each(), critical, strict=True)]
        instances, pooled, scores, entropy, log_sums, *adds = (torch.cat(one) for one in zip(*parts, strict=True))
        of_bag = self.bag(pooled).squeeze(2)  # [bag, class, feature] -> [bag, class]
        answer = BagAnswer(
            logits=(instances + of_bag) / 2, scores=scores, log_sums=log_sums, entropy=entropy,
            more={"instances": instances, "bag": of_bag},
        )  # fmt: skip
        return self._explained(answer, bags, critical, adds[0]) if explain else answer

    def losses(
        self, answer: BagAnswer, bags: Bags, labels: Int[Tensor, " bag"],
        class_weights: Float[Tensor, " class"] | None = None,
    ) -> Mapping[str, Tensor]:  # fmt: skip
        """Half of it from each stream."""
        surprise = _of_each_class if self.faithful else cross_entropy
        return {
            "bag": surprise(answer.more["bag"], labels, class_weights) / 2,
            "instances": surprise(answer.more["instances"], labels, class_weights) / 2,
        }

    @torch.no_grad()
    def _critical(self, bags: Bags) -> Int[Tensor, "bag class"]:
        """Counted from the start of each bag. Which tile it is has no gradient; what it says has."""
        found = projected_in_blocks(bags, self.instance)  # [tile, class]
        return torch.stack([part.argmax(0) for part in found.split(bags.offsets.diff().tolist())])

    def _one(self, bag: Bags, critical: Int[Tensor, " class"], explain: bool) -> tuple[Tensor, ...]:
        """The instance stream's logits [1, class], and what the bag stream pooled."""
        tiles = bag.features[critical]
        tiles = tiles.to(torch.promote_types(tiles.dtype, torch.float32))  # [class, feature]
        attend = partial(self._attend, wanted=self.query(tiles), explain=explain)
        return self.instance(tiles).diagonal()[None], *pooled_in_blocks(bag, nn.Identity(), attend)

    def _attend(
        self, h: Tensor, offsets: Tensor, mask: Tensor | None, wanted: Float[Tensor, "class hidden"], explain: bool
    ) -> tuple[Tensor, ...]:
        scores = self.query(h) @ wanted.T / math.sqrt(wanted.shape[1])  # [n, class]
        adds = (
            [torch.einsum("nd,ksd->nks", h, self.bag.weight)] if explain else []
        )  # to each class, by each class's mean
        return *pooled_by_scores(h, scores, offsets, mask), *adds

    def _explained(
        self, answer: BagAnswer, bags: Bags, critical: Int[Tensor, "bag class"], adds: Float[Tensor, "tile class class"]
    ) -> BagAnswer:
        shares = torch.einsum("nks,ns->nk", adds, answer.attention(bags)) / 2
        rows = bags.offsets[:-1, None].to(critical.device) + critical
        classes = torch.arange(critical.shape[1], device=critical.device).expand_as(critical)
        of_critical = (answer.more["instances"] - self.instance.bias) / 2
        biases = (self.bag.get_parameter("bias") + self.instance.bias) / 2
        shares = shares.index_put((rows, classes), of_critical, accumulate=True)
        return replace(answer, shares=shares, rest=biases.expand_as(answer.logits))


def _query(features: int, config: Config) -> nn.Module:
    if config.linear:
        return nn.Linear(features, config.hidden)
    wide, narrow = nn.Linear(features, config.hidden), nn.Linear(config.hidden, config.hidden)
    return nn.Sequential(wide, nn.ReLU(), narrow, nn.Tanh())


def _of_each_class(
    logits: Float[Tensor, "bag class"], labels: Int[Tensor, " bag"], weights: Float[Tensor, " class"] | None
) -> Float[Tensor, ""]:
    wanted = functional.one_hot(labels, logits.shape[1]).to(logits.dtype)
    each = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1)  # [bag]
    return (each if weights is None else each * weights[labels]).mean()
