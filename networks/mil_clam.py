"""Gated attention over a bag, whose most and least attended tiles also train a small classifier of tiles for each class.

After Lu et al., "Data-efficient and weakly supervised computational pathology on whole-slide images" (CLAM, Nature
Biomedical Engineering 2021, arXiv 2004.09666). One map for all classes (`sb`) or one for each (`mb`),

    z_k = Σ a_nk h_n        logits_c = w_c · z_c + b_c        loss = 0.7 CE(logits) + 0.3 instances

where `instances` asks the true class's own classifier to tell the 8 tiles of most attention from the 8 of least; with
subtypes, where one class excludes the others, the other classes' classifiers also hear that their 8 are not theirs.
Its loss is the smooth top-1 SVM, τ log Σ_c exp((z_c + α [c ≠ y] - z_y) / τ), with τ = α = 1.

Good where slides are few and tiles of a class look alike. Each tile's share of the answer is exact. `faithful` is as
published. Where the default departs from that, and why:

- Half of a small bag's tiles at most are of most attention, half of least: below 16 tiles theirs says of the same tile
  that it is and that it is not, and below 8 it stops.
- `dropout` acts on tiles alone. Theirs leaves out a fixed quarter of the gate as soon as `dropout` is not 0, which no
  gate that is never held in memory allows.
- The SVM is the loss of instances unless `instances` says otherwise; theirs, without the option that its README gives,
  is cross-entropy.
- Instances are projected again when the loss is taken, in place of holding a projected bag: with dropout, another draw.
- A weight of a class counts for its slide's instances as for its answer.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from kernels import gated_pooling

from .parts.bags import BagAnswer, Bags, GatedAttention, cross_entropy, pooled_by_scores, pooled_in_blocks

PAPER = "Lu et al., Nature Biomedical Engineering 2021, arXiv 2004.09666 (CLAM)"
GOOD_FOR = "few slides whose tiles of a class look alike; subtypes"

GATE_DROPOUT = 0.25
"""Theirs, whatever `dropout` is."""


@dataclass(frozen=True, kw_only=True)
class Config:
    maps: Literal["sb", "mb"] = "sb"
    """A single attention map, or multiple: one for each class."""
    width: int = 512
    """Numbers to which the features of a tile are projected."""
    hidden: int = 256
    """Units of the gate; the authors' `big` has 384."""
    dropout: float = 0.25
    """Share of a projected tile's numbers left out in training."""
    instances: Literal["svm", "cross_entropy"] = "svm"
    """Loss of the classifiers of tiles."""
    sampled: int = 8
    """Tiles of most attention, and of least, that train the classifiers of tiles."""
    subtypes: bool | None = None
    """Classes exclude each other, and the other classes' classifiers learn too. Not given: where there are more than two."""
    bag_weight: float = 0.7
    """Weight of the answer's loss; the instances have the rest."""
    faithful: bool = False
    """As published: dropout in the gate, and small bags' tiles counted both ways."""

    def __post_init__(self) -> None:
        if min(self.width, self.hidden, self.sampled) < 1 or not 0 <= self.dropout < 1 or not 0 <= self.bag_weight <= 1:
            raise ValueError(
                f"mil_clam was given width {self.width}, hidden {self.hidden}, sampled {self.sampled}, dropout {self.dropout} "
                f"and bag_weight {self.bag_weight}; the first three must be 1 or more, the others shares between 0 and 1. "
                "Correct the wrong one."
            )
        if self.maps not in ("sb", "mb") or self.instances not in ("svm", "cross_entropy"):
            raise ValueError(
                f"mil_clam was given maps {self.maps!r} and instances {self.instances!r}; needed are sb or mb, and svm or "
                "cross_entropy. Correct the wrong one."
            )


def build(config: Config, *, features: int, classes: int) -> nn.Module:
    """A new network with fresh weights, as torch draws them."""
    return Clam(config, features, classes)


class Clam(nn.Module):
    def __init__(self, config: Config, features: int, classes: int) -> None:
        super().__init__()
        self.config = config
        self.subtypes = classes > 2 if config.subtypes is None else config.subtypes
        self.project = nn.Sequential(nn.Linear(features, config.width), nn.ReLU(), nn.Dropout(config.dropout))
        self.attention = GatedAttention(config.width, config.hidden, classes if config.maps == "mb" else 1)
        self.head = nn.Linear(config.width, classes)
        self.of_tiles = nn.Linear(config.width, 2 * classes)  # a pair for each class: it is not, it is

    def forward(self, bags: Bags, explain: bool = False) -> BagAnswer:
        attend = partial(self._attend, explain=explain)
        pooled, scores, entropy, log_sums, *adds = pooled_in_blocks(bags, self.project, attend)
        logits = (pooled * self.head.weight).sum(2) + self.head.bias  # one map is every class's map: [bags, 1 or C, D]
        answer = BagAnswer(logits=logits, scores=scores, log_sums=log_sums, entropy=entropy)
        if not explain:
            return answer
        return replace(answer, shares=answer.attention(bags) * adds[0], rest=self.head.bias.expand(len(bags), -1))

    def losses(
        self, answer: BagAnswer, bags: Bags, labels: Int[Tensor, " bag"],
        class_weights: Float[Tensor, " class"] | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        weight = self.config.bag_weight
        return {
            "bag": weight * cross_entropy(answer.logits, labels, class_weights),
            "instances": (1 - weight) * self.instance_loss(answer, bags, labels, class_weights),
        }

    def instance_loss(
        self, answer: BagAnswer, bags: Bags, labels: Int[Tensor, " bag"], class_weights: Tensor | None
    ) -> Float[Tensor, ""]:
        """How well the classifiers of tiles know what attention says; 0 for a bag too small to have both sorts."""
        instances = chosen(
            answer, bags, labels, sampled=self.config.sampled, others=self.subtypes, both=self.config.faithful
        )
        h = self.project(bags.features[instances.tile].to(torch.promote_types(bags.features.dtype, torch.float32)))
        logits = self.of_tiles(h).unflatten(1, (-1, 2))  # [R, C, 2]
        logits = logits[torch.arange(len(h), device=h.device), instances.of_class]  # [R, 2]
        criterion = smooth_top1_svm if self.config.instances == "svm" else _surprise
        weight = instances.weight.to(logits)
        if class_weights is not None:
            weight = weight * class_weights[labels[instances.bag]]
        return (weight * criterion(logits, instances.wanted)).sum() / len(bags)

    def _attend(self, h: Tensor, offsets: Tensor, mask: Tensor | None, explain: bool) -> tuple[Tensor, ...]:
        adds = [functional.linear(h, self.head.weight)] if explain else []  # [N, C]
        if not (self.training and self.config.faithful and self.config.dropout):
            return *self.attention(h, offsets, mask), *adds
        assert self.attention.u is not None
        v, u = torch.tanh(self.attention.v(h)), torch.sigmoid(self.attention.u(h))
        gate = functional.dropout(v, GATE_DROPOUT) * functional.dropout(u, GATE_DROPOUT)
        return *pooled_by_scores(h, self.attention.w(gate), offsets, mask), *adds


@dataclass(frozen=True, kw_only=True, eq=False)
class Instances:
    """Tiles that train the classifiers of tiles, and what they are to say."""

    tile: Int[Tensor, " instance"]
    bag: Int[Tensor, " instance"]
    of_class: Int[Tensor, " instance"]
    """Whose classifier is asked."""
    wanted: Int[Tensor, " instance"]
    """1 where the tile is of that class, else 0."""
    weight: Float[Tensor, " instance"]
    """Those of a bag and class add up to 1; to 1 / classes, where the other classes are asked too."""


@torch.no_grad()
def chosen(
    answer: BagAnswer, bags: Bags, labels: Int[Tensor, " bag"], *, sampled: int, others: bool, both: bool
) -> Instances:
    """The most and the least attended tiles of each bag's class; with `others`, the most attended of the other classes.
    `both` lets the two overlap where a bag is small."""
    high, _ = gated_pooling.top_tiles(answer.scores, answer.log_sums, bags.offsets, sampled)  # [bags, maps, sampled]
    low, _ = gated_pooling.top_tiles(-answer.scores, answer.log_sums, bags.offsets, sampled)
    maps, classes = answer.scores.shape[1], answer.logits.shape[1]
    rows, weights = [], []
    for bag, (size, label) in enumerate(zip(bags.offsets.diff().tolist(), labels.tolist(), strict=True)):
        many = min(sampled, size if both else size // 2)
        for of_class in range(classes) if others else [label]:
            row = of_class if maps > 1 else 0
            most, least = high[bag, row, :many].tolist(), low[bag, row, :many].tolist()
            mine = of_class == label
            tiles = [(tile, int(mine)) for tile in most] + [(tile, 0) for tile in least if mine]
            rows += [(tile, bag, of_class, wanted) for tile, wanted in tiles]
            weights += [1 / len(tiles) / (classes if others else 1) for _ in tiles]
    device = answer.scores.device
    tile, bag_of, of_class_of, wanted = torch.tensor(rows, dtype=torch.long, device=device).view(-1, 4).unbind(1)
    weight = torch.tensor(weights, dtype=torch.float32, device=device)
    return Instances(tile=tile, bag=bag_of, of_class=of_class_of, wanted=wanted, weight=weight)


def smooth_top1_svm(
    logits: Float[Tensor, "instance side"], labels: Int[Tensor, " instance"]
) -> Float[Tensor, " instance"]:
    """By how much any other class comes within a margin of 1 of the right one, smoothly (Berrada et al., ICLR 2018)."""
    right = logits.gather(1, labels[:, None])
    ahead = logits + 1 - right
    ahead = ahead.scatter(1, labels[:, None], 0.0)  # the right one is ahead of itself by nothing
    best = logits.detach().topk(2, dim=1).values
    # theirs: where one is a thousand times likelier than the next, the maximum itself
    clear = best[:, 0] - best[:, 1] >= torch.log(torch.tensor(1000.0))
    return torch.where(clear, ahead.amax(1), torch.logsumexp(ahead, 1))


def _surprise(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, reduction="none")
