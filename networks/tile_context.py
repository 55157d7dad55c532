"""A tile's class from the tile and the 24 around it: its 5 x 5 neighbourhood on the slide, mixed by attention.

After Nechaev et al., "SPIDER" (arXiv 2503.02876): an encoder that is not trained makes features of every tile, and a small
attention head reads the 25 of a neighbourhood and names the class of the one in the middle. Their head's code is not
public; what their paper and page say of it is in the first two sentences here, the rest is ours:

    t_j = norm(P h_j + place_j)                 j of the 25, the middle one t_12; a neighbour that is not there is masked
    t = two transformer blocks (t)              pre-norm, 8 heads
    logits = W (t_12 + O Σ_j α_j V t_j)         α = softmax over j of (Q t_12) · (K t_j) / √width

Good where a label depends on what surrounds a tile. A slide is encoded once: every tile is a neighbour of 25 others, and is
found by its place in the lattice (`Bags.grid`), never by shifting a window at the border. Neighbours lie one step of the
lattice apart, so tiles must not overlap for a context of 5 to be five tiles wide.

`context` 1 and 3, `mixing: mean` and `places: false` are the comparisons that say whether context and attention help.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from .parts.bags import Bags, again

PAPER = "Nechaev et al., arXiv 2503.02876 (SPIDER)"
GOOD_FOR = "the class of each tile, where what surrounds it matters"

CENTRES_AT_ONCE = 1024
"""Neighbourhoods read at once: 1,024 x 25 x 512 float32 are 50 MiB."""


@dataclass(frozen=True, kw_only=True)
class Config:
    context: Literal[1, 3, 5] = 5
    """Tiles along a side of the neighbourhood; 1 is the tile alone."""
    mixing: Literal["attention", "mean"] = "attention"
    """How the tiles of a neighbourhood come together: attention, or their plain mean."""
    places: bool = True
    """A learned vector for each place of the neighbourhood."""
    width: int = 512
    """Numbers of a token."""
    layers: int = 2
    """Transformer blocks."""
    heads: int = 8
    """Heads of each block; they divide the width."""
    dropout: float = 0.1
    """Share of what a block adds that is left out in training."""
    smoothing: float = 0.05
    """Share of each label that all classes get: neighbours carry the same doubt."""
    faithful: bool = False
    """Nobody published the code of SPIDER's head, so true is refused."""

    def __post_init__(self) -> None:
        if self.faithful:
            raise ValueError(
                "tile_context was given faithful; the code of SPIDER's head is not public, so nothing can be compared with it. "
                "Leave `faithful` out."
            )
        if min(self.width, self.heads) < 1 or self.layers < 0 or self.width % self.heads:
            raise ValueError(
                f"tile_context was given width {self.width}, heads {self.heads} and layers {self.layers}; numbers above 0 are "
                "needed, layers may be 0, and heads divide the width. Correct the wrong one."
            )
        if not 0 <= self.dropout < 1 or not 0 <= self.smoothing < 1:
            raise ValueError(
                f"tile_context was given dropout {self.dropout} and smoothing {self.smoothing}; both are shares, from 0 up to "
                "below 1. Correct the wrong one."
            )


def build(config: Config, *, features: int, classes: int) -> nn.Module:
    """A new network with fresh weights; places begin small beside what tiles say."""
    return TileContext(config, features, classes)


class TileContext(nn.Module):
    def __init__(self, config: Config, features: int, classes: int) -> None:
        super().__init__()
        self.reach, self.smoothing = config.context // 2, config.smoothing
        mixes = config.mixing == "attention"
        self.project = nn.Linear(features, config.width)
        self.places = nn.Parameter(0.02 * torch.randn(config.context**2, config.width)) if config.places else None
        self.norm = nn.LayerNorm(config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers if mixes else 0))
        self.read = ReadOut(config.width) if mixes else None
        self.head = nn.Linear(config.width, classes)

    def forward(self, bags: Bags, centres: Int[Tensor, " centre"] | None = None) -> Float[Tensor, "centre class"]:
        """Logits of the tiles with these numbers, of every tile where none are given."""
        around = neighbours(bags, self.reach)
        around = around if centres is None else around[centres.to(around.device)]
        return torch.cat([again(self._some, bags.features, block) for block in around.split(CENTRES_AT_ONCE)])

    def losses(
        self, logits: Float[Tensor, "centre class"], labels: Int[Tensor, " centre"],
        class_weights: Float[Tensor, " class"] | None = None,
    ) -> Mapping[str, Tensor]:  # fmt: skip
        """Weighted, then averaged over tiles: torch would divide the weights away where a batch has one class."""
        surprise = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=self.smoothing)
        return {"tile": (surprise if class_weights is None else class_weights[labels] * surprise).mean()}

    def _some(
        self, features: Float[Tensor, "tile feature"], around: Int[Tensor, "n place"]
    ) -> Float[Tensor, "n class"]:
        there = around >= 0  # [n, place]
        t = self._projected(features, around)  # [n, place, width]
        t = self.norm(t if self.places is None else t + self.places)
        if self.read is None:
            return self.head((t * there[..., None]).sum(1) / there.sum(1, keepdim=True))
        for block in self.blocks:
            t = block(t, there)
        return self.head(self.read(t, there))

    def _projected(self, features: Tensor, around: Int[Tensor, "n place"]) -> Float[Tensor, "n place width"]:
        """Each tile once, however many neighbourhoods it is in."""
        tiles, where = around.clamp_min(0).unique(return_inverse=True)
        found = features[tiles.to(features.device)]
        return self.project(found.to(torch.promote_types(found.dtype, torch.float32)))[where]


class Block(nn.Module):
    """Pre-norm attention of a neighbourhood's tiles to each other, then two layers for each."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.before, self.between = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.widen, self.narrow = nn.Linear(config.width, 2 * config.width), nn.Linear(2 * config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, t: Float[Tensor, "n place width"], there: Bool[Tensor, "n place"]
    ) -> Float[Tensor, "n place width"]:
        q, k, v = (
            self.qkv(self.before(t)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # [n, head, place, d]
        seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=there[:, None, None, :])
        t = t + self.dropout(self.out(seen.transpose(1, 2).flatten(2)))
        return t + self.dropout(self.narrow(functional.gelu(self.widen(self.between(t)))))


class ReadOut(nn.Module):
    """The tile in the middle looks at its neighbourhood once more."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, t: Float[Tensor, "n place width"], there: Bool[Tensor, "n place"]) -> Float[Tensor, "n width"]:
        middle = t[:, t.shape[1] // 2]
        scores = torch.einsum("nd,npd->np", self.query(middle), self.key(t)) / math.sqrt(t.shape[2])
        share = torch.softmax(scores.masked_fill(~there, -torch.inf), 1)  # the middle is always there
        return middle + self.out(torch.einsum("np,npd->nd", share, self.value(t)))


def neighbours(bags: Bags, reach: int) -> Int[Tensor, "tile place"]:
    """Numbers of the tiles around each tile, row after row, its own in the middle; -1 where there is no tile.

    Tiles of another slide are no neighbours, whatever their places; of several in one place the first counts.
    """
    if bags.grid is None:
        raise ValueError(
            "tile_context was given tiles without places; the column and row of each in its slide's lattice are needed. Use "
            "features that `hilum slides features` wrote."
        )
    columns, rows = (bags.grid - bags.grid.amin(0) + reach).unbind(1)
    width, height = int(columns.max()) + reach + 1, int(rows.max()) + reach + 1  # so that no neighbour wraps around
    keys = (bags.bag_of_tile.to(rows.device) * height + rows) * width + columns
    sorted_keys, order = torch.sort(keys, stable=True)
    steps = torch.arange(-reach, reach + 1, device=keys.device)
    wanted = keys[:, None] + (steps[:, None] * width + steps).flatten()  # [tile, place]
    place = torch.searchsorted(sorted_keys, wanted).clamp_max(len(keys) - 1)
    found = torch.where(sorted_keys[place] == wanted, order[place], -1)
    found[:, found.shape[1] // 2] = torch.arange(len(keys), device=keys.device)
    return found
