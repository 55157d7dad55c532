"""Several attention maps of one bag, each with an answer of its own and kept from being alike; the bag's map is their mean.

After Zhang et al., "Attention-Challenging Multiple Instance Learning" (ECCV 2024, arXiv 2311.07125). Attention that is
trained on slides alone ends on a handful of tiles; two things keep it wide:

    multiple branches    logits = C mean_i(z_i) + c,  z_i = Σ a_ni h_n;  branch i answers too, C_i z_i + c_i
                         loss = CE(logits) + mean_i CE(branch i) + mean_{i<j} cos(a_i, a_j)
    masking              in training a share of each branch's `top` strongest tiles is left out, drawn anew each time

`attention: multi_head` is the paper's other form: a learned query per branch, 8 heads, LayerNorm. Its keys and values
never exist: q · K h is (Kᵀq) · h, and the mean of V h is V of the mean, so a head costs a bag one column of scores. A bag
of 200,000 x 1024 in half precision, 410 MB, trains with 95 MB beside it (CPU), 166 MB with 5 x 8 heads.

Good for slides with much to find in them. Each tile's share of the answer is exact; in the multi-head form with the bag's
own deviation in LayerNorm, and without its dropout: in prediction. One branch without masking is gated ABMIL, weight for
weight; with heads, the attention that AEM's authors train first. `faithful` masks 6 of the 10 strongest. Where the default
departs from that, what neither has, and why:

- Nothing is masked unless `drop` says so: the authors' own later advice (README, October 2024; issue #12, March 2025).
  Multiple branches are the part that lasts; masking helped with the encoders of the paper and not with newer ones.
- As their code has it, an exact number is left out; the paper drops each tile by chance (`exact: false`).
- A tile always stays: theirs falls back to a uniform map where all are left out (a bag no larger than `top`, drop 1).
- Masking looks at a bag twice, first for scores: that costs a third more time, and no second bag in memory.
- Branch heads are linear, as in their code; the paper says MLPs. One branch has no answer of its own: it would learn nothing.
- Bags of a batch each have their own maps; theirs reads the first and says nothing.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from kernels import gated_pooling

from .parts.bags import BagAnswer, Bags, GatedAttention, cross_entropy, pooled_by_scores, pooled_in_blocks, width_for

PAPER = "Zhang et al., ECCV 2024, arXiv 2311.07125 (ACMIL)"
GOOD_FOR = "attention that would end on a handful of tiles; the usual choice"

PUBLISHED_DROP = 0.6
"""Of the 10 strongest tiles the paper leaves out 6."""


@dataclass(frozen=True, kw_only=True)
class Config:
    attention: Literal["gated", "multi_head"] = "gated"
    """One gate for all branches, or queries with heads, ten times the weights."""
    branches: int = 5
    """Attention maps. 2 did better in the paper where ResNet18 had made the features."""
    width: int = 0
    """Numbers to which the features of a tile are projected. 0: as published for the encoder, else half of its features."""
    hidden: int = 128
    """Units of the gate."""
    heads: int = 8
    """Heads of each query, multi_head alone."""
    dropout: float = 0.1
    """Share of numbers left out before LayerNorm in training, multi_head alone."""
    top: int = 10
    """Strongest tiles of each map among which some are left out."""
    drop: float | None = None
    """Share of these left out in training. Not given: none, or 0.6 where faithful."""
    exact: bool = True
    """That share exactly; else each tile by chance."""
    faithful: bool = False
    """As published: 6 of the 10 strongest tiles are left out."""

    def __post_init__(self) -> None:
        if self.attention not in ("gated", "multi_head"):
            raise ValueError(
                f"mil_acmil was given attention {self.attention!r}; needed is gated or multi_head. Correct it."
            )
        if min(self.branches, self.hidden, self.heads) < 1 or min(self.width, self.top) < 0:
            raise ValueError(
                f"mil_acmil was given branches {self.branches}, hidden {self.hidden}, heads {self.heads}, width {self.width} "
                f"and top {self.top}; the first three must be 1 or more, the others 0 or more. Correct the wrong one."
            )
        if not 0 <= self.masked_share <= 1 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"mil_acmil was given drop {self.drop} and dropout {self.dropout}; both are shares between 0 and 1, dropout "
                "less than 1. Correct the wrong one."
            )

    @property
    def masked_share(self) -> float:
        return (PUBLISHED_DROP if self.faithful else 0.0) if self.drop is None else self.drop


def build(config: Config, *, features: int, classes: int) -> nn.Module:
    """A new network with fresh weights, as torch draws them."""
    return Acmil(config, features, classes)


class Acmil(nn.Module):
    def __init__(self, config: Config, features: int, classes: int) -> None:
        super().__init__()
        width = config.width or _width(config, features)
        self.top, self.share, self.exact = config.top, config.masked_share, config.exact
        self.branches = config.branches
        self.project = nn.Sequential(nn.Linear(features, width, bias=False), nn.ReLU())
        self.maps = (Heads if config.attention == "multi_head" else Gates)(config, width)
        answering = config.branches if config.branches > 1 else 0
        self.branch_heads = nn.ModuleList(nn.Linear(width, classes) for _ in range(answering))
        self.head = nn.Linear(width, classes)

    def forward(self, bags: Bags, explain: bool = False) -> BagAnswer:
        masks = self.training and self.share > 0 and self.top > 0
        return self.answer(bags, self.drawn_mask(bags) if masks else None, explain)

    def answer(self, bags: Bags, mask: Bool[Tensor, "tile map"] | None, explain: bool = False) -> BagAnswer:
        """With the mask that is given, in training or not."""
        attend = self.maps.attend(self.head.weight if explain else None)
        pooled, scores, entropy, log_sums, *adds = pooled_in_blocks(bags, self.project, attend, mask)
        vectors, vector = self.maps.vectors(pooled)  # of each branch, [bags, D], and of the bag
        branches = [head(one) for head, one in zip(self.branch_heads, vectors, strict=False)]
        more = {"branch_logits": torch.stack(branches, 1)} if branches else {}  # [bags, M, C]
        answer = BagAnswer(
            logits=self.head(vector), scores=scores, log_sums=log_sums, entropy=entropy, mask=mask, more=more
        )
        if not explain:
            return answer
        shares, rest = self.maps.shares(answer.attention(bags), adds[0], pooled, bags, self.head)
        return replace(answer, shares=shares, rest=rest)

    @torch.no_grad()
    def drawn_mask(self, bags: Bags, random: torch.Generator | None = None) -> Bool[Tensor, "tile map"]:
        """False for the tiles left out of each map, drawn from its strongest; from torch's own numbers if from no others."""
        _, scores, _, log_sums = pooled_in_blocks(bags, self.project, self.maps.attend(None))
        return kept(scores, log_sums, bags.offsets, self.top, self.share, self.exact, random)

    def losses(
        self, answer: BagAnswer, bags: Bags, labels: Int[Tensor, " bag"],
        class_weights: Float[Tensor, " class"] | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        losses = {"bag": cross_entropy(answer.logits, labels, class_weights)}
        if self.branches > 1:
            branches = answer.more["branch_logits"].flatten(0, 1)  # [bags · M, C]
            losses["branches"] = cross_entropy(branches, labels.repeat_interleave(self.branches), class_weights)
            losses["likeness"] = likeness(answer.attention(bags), bags.offsets, self.branches)
        return losses


def _width(config: Config, features: int) -> int:
    """As published; where there are heads, the multiple of them below."""
    width = width_for(features)
    return max(1, width // config.heads) * config.heads if config.attention == "multi_head" else width


class Gates(nn.Module):
    """Maps that share one gate, and differ in their row of w."""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.attention = GatedAttention(width, config.hidden, config.branches)

    def attend(self, answer: Tensor | None):
        """Scores of a block of tiles; and what each of its tiles says itself, where the weights that answer are given."""

        def attend(h: Tensor, offsets: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
            adds = [] if answer is None else [functional.linear(h, answer)]  # [N, C]
            return *self.attention(h, offsets, mask), *adds

        return attend

    def vectors(self, pooled: Float[Tensor, "bag map width"]) -> tuple[list[Tensor], Tensor]:
        return list(pooled.unbind(1)), pooled.mean(1)

    def shares(
        self, attention: Tensor, adds: Tensor, pooled: Tensor, bags: Bags, head: nn.Linear
    ) -> tuple[Tensor, Tensor]:
        return attention.mean(1, keepdim=True) * adds, head.bias.expand(len(bags), -1)


class Heads(nn.Module):
    """Each branch asks with its own query, in several heads; maps are ordered by branch, then head."""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        if width % config.heads:
            raise ValueError(
                f"mil_acmil was given {config.heads} heads for a width of {width}; the width must be a multiple of heads. "
                "Give another `width` or other `heads`."
            )
        self.heads, self.shape = config.heads, (config.heads, width // config.heads)
        self.query = nn.Parameter(torch.empty(config.branches, width))
        nn.init.normal_(self.query, std=1e-6)  # the authors' start: biases alone ask, until the queries have learned
        self.asking = nn.ModuleList(Asking(width) for _ in range(config.branches))
        answering = config.branches if config.branches > 1 else 0
        self.telling = nn.ModuleList(Telling(width, config.dropout) for _ in range(answering))
        self.bag = Telling(width, config.dropout)

    def attend(self, answer: Tensor | None):
        """Scores of a block of tiles; and what each of its tiles says itself to each head, where the weights that answer
        are given."""
        asked = [ask(query, self.shape) for ask, query in zip(self.asking, self.query, strict=True)]
        weight, bias = (torch.cat(one) for one in zip(*asked, strict=True))  # [M · heads, D], [M · heads]
        tells = None if answer is None else self.bag.folded(answer, self.heads)  # [heads · C, D]

        def attend(h: Tensor, offsets: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
            adds = [] if tells is None else [functional.linear(h, tells)]
            return *pooled_by_scores(h, functional.linear(h, weight, bias), offsets, mask), *adds

        return attend

    def vectors(self, pooled: Float[Tensor, "bag map width"]) -> tuple[list[Tensor], Tensor]:
        by_head = pooled.unflatten(1, (-1, self.heads))  # [bags, M, heads, D]
        branches = [tell(one) for tell, one in zip(self.telling, by_head.unbind(1), strict=False)]
        return branches, self.bag(by_head.mean(1))

    def shares(
        self, attention: Tensor, adds: Tensor, pooled: Tensor, bags: Bags, head: nn.Linear
    ) -> tuple[Tensor, Tensor]:
        """LayerNorm is linear but for its deviation, which is the bag's own."""
        by_head = attention.unflatten(1, (-1, self.heads)).mean(1)  # [N, heads]
        deviation, nothing = self.bag.deviation(pooled.unflatten(1, (-1, self.heads)).mean(1))  # [bags, 1], [D]
        said = torch.einsum("nh,nhc->nc", by_head, adds.unflatten(1, (self.heads, -1)))
        norm = self.bag.norm
        rest = head(nothing / deviation * norm.weight + norm.bias)
        return said / deviation[bags.bag_of_tile], rest


class Asking(nn.Module):
    """A query of what the tiles are: as one row of weights for each head, since q · (K h + k) = (Kᵀ q) · h + q · k."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, query: Float[Tensor, " width"], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        q = self.q(query).view(shape) / math.sqrt(shape[1])  # [heads, D / heads]
        weight = torch.einsum("hd,hdw->hw", q, self.k.weight.view(*shape, -1))
        return weight, (q * self.k.bias.view(shape)).sum(1)


class Telling(nn.Module):
    """What the heads found, as one vector: values, put together, normalised."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.v, self.out, self.drop = nn.Linear(width, width), nn.Linear(width, width), nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pooled: Float[Tensor, "bag head width"]) -> Float[Tensor, "bag width"]:
        return self.norm(self.drop(self._put_together(pooled)))

    def _put_together(self, pooled: Tensor) -> Tensor:
        """The mean of values is the value of the mean."""
        values = torch.einsum("bhw,hdw->bhd", pooled, self.v.weight.unflatten(0, (pooled.shape[1], -1)))
        return self.out(values.flatten(1) + self.v.bias)

    def folded(self, answer: Float[Tensor, "class width"], heads: int) -> Float[Tensor, "row width"]:
        """What one tile would add to the logits through each head, before the division by the deviation."""
        scaled = answer * self.norm.weight
        centred = scaled - scaled.mean(1, keepdim=True)  # LayerNorm takes the mean away: so do these weights
        through = (centred @ self.out.weight).unflatten(1, (heads, -1))  # [C, heads, D / heads]
        return torch.einsum("chd,hdw->hcw", through, self.v.weight.unflatten(0, (heads, -1))).flatten(0, 1)

    def deviation(self, pooled: Float[Tensor, "bag head width"]) -> tuple[Tensor, Tensor]:
        """The deviation of each bag's vector, and the vector of no tile, centred: its biases alone."""
        spread = self._put_together(pooled).var(1, correction=0, keepdim=True)
        biases = self.out(self.v.bias)
        return torch.sqrt(spread + self.norm.eps), biases - biases.mean()


@torch.no_grad()
def kept(
    scores: Float[Tensor, "tile map"], log_sums: Float[Tensor, "bag map"], offsets: Int[Tensor, " bounds"],
    top: int, share: float, exact: bool = True, random: torch.Generator | None = None,
) -> Bool[Tensor, "tile map"]:  # fmt: skip
    """False for a share of the `top` tiles of each bag with the highest scores, in each map for itself; a tile always stays."""
    rows, _ = gated_pooling.top_tiles(scores, log_sums, offsets, top)  # [bags, maps, top], -1 where a bag has fewer
    there = rows >= 0
    chance = torch.rand(rows.shape, generator=random).to(scores.device)  # the same draw on every machine
    if exact:
        # 0.29 of 100 are 29, though 0.29 * 100 is a little less
        many = torch.floor(there.sum(2, keepdim=True).double() * share + 1e-9)
        out = chance.masked_fill(~there, 2).argsort(2).argsort(2) < many  # the rank of each draw in its map
    else:
        out = (chance < share) & there
    everything = out.sum(2) == offsets.diff().to(scores.device)[:, None]
    out[..., 0] &= ~everything  # the strongest, without which a bag that small would say nothing of its class
    stays = torch.ones_like(scores, dtype=torch.bool)
    maps = torch.arange(scores.shape[1], device=scores.device)[None, :, None].expand_as(rows)
    stays[rows[out], maps[out]] = False
    return stays


def likeness(attention: Float[Tensor, "tile map"], offsets: Int[Tensor, " bounds"], branches: int) -> Float[Tensor, ""]:
    """The mean cosine between two branches' maps, head by head, over the bags."""
    found = []
    for bag in attention.unflatten(1, (branches, -1)).split(offsets.diff().tolist()):
        # products of few branches, rather than unit maps: these would be a second copy of the attention
        products = torch.einsum("nmh,nkh->hmk", bag, bag)
        lengths = products.diagonal(dim1=1, dim2=2).sqrt()  # [heads, M]
        cosines = products / (lengths[:, :, None] * lengths[:, None])
        found.append((cosines.sum((1, 2)) - branches).mean() / (branches * (branches - 1)))
    return torch.stack(found).mean()
