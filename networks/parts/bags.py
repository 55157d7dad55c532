"""Bags of tile features, of any sizes, one after the other; and pooling them without ever holding a second bag.

    h = project(features)                                  a block of tiles at a time, made again for the backward pass
    pooled, scores, entropy, log_sums = gated_pooling(h)   see kernels/gated_pooling.py

Blocks are put together as their softmaxes are: with the log-sums l_p of the parts p of a bag and l = logsumexp over them,
pooled = sum of exp(l_p - l) pooled_p, entropy = sum of exp(l_p - l) (entropy_p + l - l_p).

What each tile adds to an answer comes from the same pass: whatever `attend` gives beyond those four has a row for each
tile, and comes back whole.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from kernels import gated_pooling

TILES_AT_ONCE = 8192
"""Tiles of one block: 8,192 x 512 float32 are 16 MiB, small beside any bag, large enough for matrix products at full speed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Bags:
    """The tiles of several slides, bag after bag. Features may be half precision and lie in a mapped file."""

    features: Float[Tensor, "tile feature"]
    offsets: Int[Tensor, " bounds"]
    """0 first, the number of tiles last: bag b has the tiles offsets[b] to offsets[b + 1]. On the CPU."""
    grid: Int[Tensor, "tile 2"] | None = None
    """Column and row of each tile in its slide's lattice of tiles; None where nobody knows."""

    def __post_init__(self) -> None:
        assert self.offsets[0] == 0 and int(self.offsets[-1]) == len(self.features), "every tile belongs to one bag"
        assert self.grid is None or len(self.grid) == len(self.features)

    @classmethod
    def of(cls, features: Float[Tensor, "tile feature"], grid: Int[Tensor, "tile 2"] | None = None) -> "Bags":
        """One bag."""
        return cls(features=features, offsets=torch.tensor([0, len(features)]), grid=grid)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def bag_of_tile(self) -> Int[Tensor, " tile"]:
        return torch.repeat_interleave(torch.arange(len(self)), self.offsets.diff()).to(self.features.device)

    def each(self) -> "Iterator[Bags]":
        """One bag after the other, without a copy."""
        for start, end in zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True):
            yield Bags.of(self.features[start:end], None if self.grid is None else self.grid[start:end])


@dataclass(frozen=True, kw_only=True, eq=False)
class BagAnswer:
    """What a network for slides says of bags: logits, and where in each bag they come from."""

    logits: Float[Tensor, "bag class"]
    scores: Float[Tensor, "tile branch"]
    """Raw attention scores: neither masked nor normalised."""
    log_sums: Float[Tensor, "bag branch"]
    """exp(score - log_sum of its bag) is a tile's attention; it sums to 1 over the tiles of the bag that count."""
    entropy: Float[Tensor, "bag branch"]
    """Of the attention."""
    mask: Bool[Tensor, "tile branch"] | None = None
    """False where a tile was kept out of the attention, in training."""
    shares: Float[Tensor, "tile class"] | None = None
    """What each tile adds to the logits of its bag; only where it was asked for."""
    rest: Float[Tensor, "bag class"] | None = None
    """What no tile adds: logits = rest + the sum of the bag's shares."""
    more: Mapping[str, Tensor] = field(default_factory=dict)
    """What the network's own losses need."""

    def attention(self, bags: Bags) -> Float[Tensor, "tile branch"]:
        return gated_pooling.attention(self.scores, self.log_sums, bags.offsets, self.mask)


Pooled = tuple[
    Float[Tensor, "bag branch feature"],
    Float[Tensor, "tile branch"],
    Float[Tensor, "bag branch"],
    Float[Tensor, "bag branch"],
]
"""The bags' vectors, raw scores, entropy, log-sums."""


class GatedAttention(nn.Module):
    """tanh(V h) · sigmoid(U h), a row of W for each branch; not `gated`: tanh alone."""

    def __init__(self, features: int, hidden: int, branches: int = 1, gated: bool = True) -> None:
        super().__init__()
        self.v = nn.Linear(features, hidden)
        self.u = nn.Linear(features, hidden) if gated else None
        self.w = nn.Linear(hidden, branches)

    def forward(self, h: Tensor, offsets: Tensor, mask: Tensor | None = None) -> Pooled:
        u, u_bias = (None, None) if self.u is None else (self.u.weight, self.u.bias)
        return gated_pooling.fused(h, offsets, self.v.weight, self.v.bias, u, u_bias, self.w.weight, self.w.bias, mask)


def pooled_in_blocks(
    bags: Bags,
    project: Callable[[Tensor], Tensor],
    attend: Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, ...]],
    mask: Bool[Tensor, "tile branch"] | None = None,
) -> tuple[Tensor, ...]:
    """`attend` over the projected bags, a block of tiles at a time; only results of blocks are kept for the backward pass.

    The bags' vectors, raw scores, entropy and log-sums, then what more `attend` gave of each tile."""
    parts, bag_of_part = [], []
    for start, end, offsets, owners in _blocks(bags):
        part = None if mask is None else mask[start:end]
        parts.append(again(_one_block, project, attend, bags.features[start:end], offsets, part))
        bag_of_part += owners
    pooled, scores, entropy, log_sums, *more = (torch.cat(one) for one in zip(*parts, strict=True))
    bag = torch.tensor(bag_of_part, device=pooled.device)
    return *_together(pooled, scores, entropy, log_sums, bag, len(bags)), *more


def pooled_by_scores(
    h: Float[Tensor, "tile feature"], scores: Float[Tensor, "tile branch"], offsets: Int[Tensor, " bounds"],
    mask: Bool[Tensor, "tile branch"] | None = None,
) -> Pooled:  # fmt: skip
    """What GatedAttention gives, for scores that no gate made."""
    counts = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    pooled, entropy, log_sums = [], [], []
    for start, end in itertools.pairwise(offsets.tolist()):
        counted, nothing = counts[start:end], ~counts[start:end].any(0)
        logits = scores[start:end].masked_fill(~counted, -torch.inf).masked_fill(nothing, 0)
        logs = torch.log_softmax(logits, 0)
        share = torch.exp(logs)
        pooled.append((share.T @ h[start:end]).masked_fill(nothing[:, None], torch.nan))
        entropy.append(-(share * logs.masked_fill(~counted, 0)).sum(0).masked_fill(nothing, torch.nan))
        log_sums.append(torch.logsumexp(logits, 0).masked_fill(nothing, -torch.inf))
    return torch.stack(pooled), scores, torch.stack(entropy), torch.stack(log_sums)


def cross_entropy(
    logits: Float[Tensor, "bag class"], labels: Int[Tensor, " bag"],
    class_weights: Float[Tensor, " class"] | None = None,
) -> Float[Tensor, ""]:  # fmt: skip
    """The mean over the bags. Torch would divide by the sum of their weights, and undo the weight of a bag that is alone."""
    return functional.cross_entropy(logits, labels, class_weights, reduction="sum") / len(labels)


PUBLISHED_WIDTHS = {384: 128, 512: 256, 768: 384, 1024: 512, 1536: 768}
"""What ACMIL and AEM project each encoder's features to: ViT-S, ResNet18 and CLIP, CLIP-L, UNI, GigaPath."""


def width_for(features: int) -> int:
    """The published width for features of that many numbers; half of them for others."""
    return PUBLISHED_WIDTHS.get(features, max(1, features // 2))


def projected_in_blocks(bags: Bags, project: Callable[[Tensor], Tensor]) -> Tensor:
    """`project` of every tile, a block at a time; worth it where the result is much narrower than what leads to it."""
    ends = range(0, len(bags.features), TILES_AT_ONCE)
    return torch.cat([again(_projected, project, bags.features[start : start + TILES_AT_ONCE]) for start in ends])


def _projected(project: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    return project(features.to(torch.promote_types(features.dtype, torch.float32)))


def _one_block(project, attend, features: Tensor, offsets: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    return attend(_projected(project, features), offsets, mask)


def again(function, *values):
    """Done again in the backward pass rather than remembered; dropout draws the same numbers both times."""
    if not torch.is_grad_enabled():
        return function(*values)
    return checkpoint(function, *values, use_reentrant=False)


def _blocks(bags: Bags) -> Iterator[tuple[int, int, Tensor, list[int]]]:
    """Start and end of each block, the bounds of the bags' parts inside it, and whose parts they are."""
    bounds = bags.offsets.tolist()
    start, first = 0, 0
    total = bounds[-1]
    while start < total:
        end = min(start + TILES_AT_ONCE, total)
        owners, inner = [], [0]
        for bag in range(first, len(bags)):
            if bounds[bag] >= end:
                break
            if bounds[bag + 1] > start:
                owners.append(bag)
                inner.append(min(bounds[bag + 1], end) - start)
        yield start, end, torch.tensor(inner), owners
        start, first = end, owners[-1]


def _together(pooled: Tensor, scores: Tensor, entropy: Tensor, log_sums: Tensor, bag: Tensor, bags: int) -> Pooled:
    """The parts of each bag become its mean, entropy and log-sum; a bag in which no tile counts stays NaN."""
    counts = log_sums > -torch.inf  # [P, K]
    pooled, entropy = pooled.where(counts[:, :, None], 0), entropy.where(counts, 0)
    shape = (bags, log_sums.shape[1])
    found = log_sums.detach()
    top = found.new_full(shape, -torch.inf).scatter_reduce(0, bag[:, None].expand_as(found), found, "amax")
    top = top.masked_fill(top == -torch.inf, 0)
    weights = torch.exp(log_sums - top[bag])  # [P, K]
    sums = weights.new_zeros(shape).index_add(0, bag, weights)
    log_sum = top + torch.log(sums)
    share = weights / sums[bag].where(counts, 1)
    mean = pooled.new_zeros(*shape, pooled.shape[2]).index_add(0, bag, share[:, :, None] * pooled)
    surprise = (entropy + log_sum[bag] - log_sums).where(counts, 0)
    spread = entropy.new_zeros(shape).index_add(0, bag, share * surprise)
    nothing = sums == 0
    return (
        mean.masked_fill(nothing[:, :, None], torch.nan),
        scores,
        spread.masked_fill(nothing, torch.nan),
        log_sum,
    )
