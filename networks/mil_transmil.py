"""Tiles talk to each other, and to their neighbours on the slide, before a class token sums up what it heard.

After Shao et al., "TransMIL: Transformer based correlated multiple instance learning" (NeurIPS 2021, arXiv 2106.00908):

    x = [class token, ReLU(P h_1), ..., ReLU(P h_N)]
    x = x + attention(norm(x))                   Nyström attention with 256 landmarks, parts/nystrom.py
    x = x + 7x7, 5x5 and 3x3 convolutions        depth-wise over the slide's lattice of tiles; not the class token (PPEG)
    x = x + attention(norm(x))                   again
    logits = W norm(class token) + b

Good where what surrounds a tile decides, and slides are many: it has the most weights, and published scores were not easy
to repeat (issues 4, 6 and 19 of theirs). Where this departs from the authors' code, and why (`faithful` is theirs):

- Tiles lie where they lie on the slide (`Bags.grid`), in the order of reading it, so the order of the file does not
  matter. Theirs lays them into a square in the order of the file, whatever their places; so does this where no grid is known.
- No tile counts twice. Theirs fills the square up with the first tiles again; here empty places are zeros for the
  convolutions, and nobody attends to them.
- A landmark is the mean of tiles only. Theirs pads the sequence with zeros, which dilute the first landmarks and receive
  attention.

Where the answer comes from. The last attention gives the class token a row over all tokens for each head, and what
token n adds is row_n · value_n, and its taps in the convolution of values. With the deviation of the final norm held at
what it is, logits are linear in these, so `shares` and `rest` add up exactly; the class token's own part and the biases
are the rest, and a tile that was repeated has the shares of all its tokens. A token has heard other tiles by then: a share
says through which tile the class token was told, and deleting tiles says whether that is where it comes from.

A Nyström row is no softmax, and can be negative: it has no entropy. `scores` are therefore the products of the class
token's query with the tiles' keys, a branch for each head, whose softmax is the attention that the row approximates (and
equals, but for the iterated inverse, where tokens are not more than landmarks). AEM acts on these; for heatmaps take shares.

Tokens are made a block at a time and, beyond 16,384 of them, made again wherever they are needed: a bag of
200,000 x 1024 in half precision, 410 MB, trains with 350 MB and is explained with 125 MB beside it (CPU, as torch counts;
in training glibc kept 3 GB of what was freed, and 0.8 GB with MALLOC_MMAP_THRESHOLD_=1048576). In training a token that two
blocks need draws dropout for each.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from .parts.bags import BagAnswer, Bags, cross_entropy
from .parts.nystrom import Landmarks, Nystrom, Tokens

PAPER = "Shao et al., NeurIPS 2021, arXiv 2106.00908 (TransMIL)"
GOOD_FOR = "what surrounds a tile decides, and slides are many"

TOKENS_AT_ONCE = 2048
"""A quarter of what gated pooling takes at once: a token is 4 x 512 numbers here, and has 256 products in each of 8 heads."""

CELLS_AT_ONCE = 4 * TOKENS_AT_ONCE
"""Places of the lattice in one convolution: where tissue is sparse, most of them are empty."""


@dataclass(frozen=True, kw_only=True)
class Config:
    width: int = 512
    """Numbers of a token."""
    heads: int = 8
    """Heads of each attention; they divide the width."""
    landmarks: int = 256
    """Landmarks of each attention."""
    iterations: int = 6
    """Steps towards the inverse of the landmarks' attention."""
    dropout: float = 0.1
    """Share of what an attention says that is left out in training."""
    faithful: bool = False
    """The authors' square in the order of the file, tiles repeated to fill it, zeros among the landmarks."""

    def __post_init__(self) -> None:
        least = min(self.width, self.heads, self.landmarks, self.iterations)
        if least < 1 or self.width % self.heads or not 0 <= self.dropout < 1:
            raise ValueError(
                f"mil_transmil was given width {self.width}, heads {self.heads}, landmarks {self.landmarks}, iterations "
                f"{self.iterations} and dropout {self.dropout}; numbers of 1 or more are needed, heads that divide the width, "
                "and a dropout from 0 up to below 1. Correct the wrong one."
            )


def build(config: Config, *, features: int, classes: int) -> nn.Module:
    """A new network with fresh weights, drawn as torch draws them: the authors do the same."""
    return TransMil(config, features, classes)


class TransMil(nn.Module):
    def __init__(self, config: Config, features: int, classes: int) -> None:
        super().__init__()
        attention = (config.width, config.heads, config.landmarks, config.iterations, config.dropout, config.faithful)
        self.faithful = config.faithful
        self.project = nn.Sequential(nn.Linear(features, config.width), nn.ReLU())
        self.token = nn.Parameter(torch.randn(1, config.width))
        self.first, self.second = Nystrom(*attention), Nystrom(*attention)
        self.place = Placing(config.width)
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, classes)

    def forward(self, bags: Bags, explain: bool = False) -> BagAnswer:
        answers = [self._one(bag, explain) for bag in bags.each()]
        shares = rest = None
        if explain:
            shares, rest = (torch.cat(one) for one in zip(*(answer[3:] for answer in answers), strict=True))
        logits, scores, log_sums = (torch.cat(one) for one in zip(*(answer[:3] for answer in answers), strict=True))
        surprise = log_sums[bags.bag_of_tile] - scores  # [tile, head]
        entropy = torch.zeros_like(log_sums).index_add(0, bags.bag_of_tile, torch.exp(-surprise) * surprise)
        return BagAnswer(logits=logits, scores=scores, log_sums=log_sums, entropy=entropy, shares=shares, rest=rest)

    def losses(
        self, answer: BagAnswer, bags: Bags, labels: Int[Tensor, " bag"],
        class_weights: Float[Tensor, " class"] | None = None,
    ) -> Mapping[str, Tensor]:  # fmt: skip
        return {"bag": cross_entropy(answer.logits, labels, class_weights)}

    def walk(self, bag: Bags) -> "Walk":
        """One bag, up to what the second attention sees."""
        lattice = repeated_square(len(bag.features)) if self.faithful else lattice_of(bag)
        count = 1 + len(lattice.tiles)
        projected = Tokens(
            count, partial(self._projected, bag, lattice), (*range(0, count, TOKENS_AT_ONCE), count)
        ).kept()
        seen = self.first.look(projected)
        placed = Tokens(count, partial(self._placed, projected, seen, lattice), lattice.bounds()).kept()
        return Walk(lattice, projected, seen, placed, self.second.look(placed))

    def _one(self, bag: Bags, explain: bool) -> tuple[Tensor, ...]:
        """Logits [1, class], scores [tile, head], log-sums [1, head]; if asked, shares [tile, class] and the rest [1, class]."""
        walk = self.walk(bag)
        told = self.second.answer(walk.placed, walk.found, 0, 1)  # [1, width]
        of_tile = walk.lattice.first_of(len(bag.features)).to(told.device)
        scores = walk.found.scores[:, 1:][:, of_tile].mT  # [tile, head]
        answer = self.head(self.norm(told)), scores, scores.logsumexp(0, keepdim=True)
        return (*answer, *self._explained(walk, told, len(bag.features))) if explain else answer

    @torch.no_grad()
    def _explained(self, walk: "Walk", told: Float[Tensor, "1 width"], tiles: int) -> tuple[Tensor, Tensor]:
        deviation = torch.sqrt(told.var(correction=0) + self.norm.eps)
        reading = self.head.weight * self.norm.weight / deviation  # [class, width]
        reading = reading - reading.mean(1, keepdim=True)  # the norm takes the mean away
        of_heads = (reading @ self.second.out.weight).unflatten(1, (self.second.heads, -1))  # [class, head, d]
        adds = torch.cat([
            torch.einsum("hnd,chd->nc", self.second.carried(walk.placed, walk.found, start, end), of_heads)
            for start, end in walk.placed.blocks
        ])  # [1 + token, class]  # fmt: skip
        shares = adds.new_zeros(tiles, adds.shape[1]).index_add(0, walk.lattice.tiles.to(adds.device), adds[1:])
        own = walk.placed.make(0, 1) + self.second.out.bias
        return shares, own @ reading.T + adds[:1] + self.head(self.norm.bias)

    def _projected(self, bag: Bags, lattice: "Lattice", start: int, end: int) -> Float[Tensor, "n width"]:
        features = bag.features[lattice.tiles[max(start - 1, 0) : end - 1].to(bag.features.device)]
        x = self.project(features.to(torch.promote_types(features.dtype, torch.float32)))
        return torch.cat([self.token, x]) if start == 0 else x

    def _placed(
        self, projected: Tokens, seen: Landmarks, lattice: "Lattice", start: int, end: int
    ) -> Float[Tensor, "n width"]:
        """After the first attention and the convolutions, which need the tokens of three rows more on each side."""
        if end == 1:
            return self.first.answer(projected, seen, 0, 1)
        with_token, start, end = start == 0, max(start - 1, 0), end - 1  # tokens without the class token from here
        near, far = lattice.around(start, end)
        x = self.first.answer(projected, seen, near + (not with_token), far + 1)
        own, x = (x[:1], x[1:]) if with_token else (x[:0], x)
        cells, size = lattice.cells(near, far)
        return torch.cat([own, self.place(x, cells.to(x.device), size)[start - near : end - near]])


@dataclass(frozen=True, eq=False)
class Walk:
    """One bag on its way through the network."""

    lattice: "Lattice"
    projected: Tokens
    seen: Landmarks
    placed: Tokens
    found: Landmarks


class Placing(nn.Module):
    """Pyramid position encoding: each token with its neighbours on the slide. The three windows are one of 7 x 7."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.windows = nn.ModuleList(
            nn.Conv2d(width, width, size, padding=size // 2, groups=width) for size in (7, 5, 3)
        )

    def forward(
        self, x: Float[Tensor, "n width"], cells: Int[Tensor, " n"], size: tuple[int, int]
    ) -> Float[Tensor, "n width"]:
        """`cells` are the tokens' places in a lattice of that many rows and columns; empty places are zeros."""
        wide, *narrower = (window.get_parameter("weight") for window in self.windows)
        weight = wide + sum(functional.pad(one, [(7 - one.shape[-1]) // 2] * 4) for one in narrower)
        bias = torch.stack([window.get_parameter("bias") for window in self.windows]).sum(0)
        lattice = x.new_zeros(math.prod(size), x.shape[1]).index_add(0, cells, x)
        lattice = lattice.reshape(1, *size, -1).permute(0, 3, 1, 2)  # [1, width, rows, columns], channels last
        around = functional.conv2d(lattice, weight, bias, padding=3, groups=x.shape[1])
        return x + around.permute(0, 2, 3, 1).reshape(math.prod(size), -1)[cells]


@dataclass(frozen=True, eq=False)
class Lattice:
    """Where the tokens lie, row after row."""

    tiles: Int[Tensor, " token"]
    """The tile of each token."""
    rows: Int[Tensor, " token"]
    """Never falling."""
    columns: Int[Tensor, " token"]
    width: int

    def bounds(self) -> tuple[int, ...]:
        """Of blocks of tokens, the class token before the first, whose convolutions are not too large."""
        rows, found = self.rows, [0]
        while found[-1] < len(rows):
            start = found[-1]
            below = int(rows[start]) + max(1, CELLS_AT_ONCE // self.width - 6)
            found.append(min(start + TOKENS_AT_ONCE, int(torch.searchsorted(rows, below))))
        return 0, *(end + 1 for end in found[1:])

    def around(self, start: int, end: int) -> tuple[int, int]:
        """The tokens of the rows that the widest window reaches from these."""
        top, bottom = int(self.rows[start]) - 3, int(self.rows[end - 1]) + 4
        near, far = torch.searchsorted(self.rows, torch.tensor([top, bottom])).tolist()
        return near, far

    def cells(self, start: int, end: int) -> tuple[Int[Tensor, " n"], tuple[int, int]]:
        """Places of these tokens in a lattice of their own, and its rows and columns."""
        rows = self.rows[start:end] - self.rows[start]
        return rows * self.width + self.columns[start:end], (int(rows[-1]) + 1, self.width)

    def first_of(self, tiles: int) -> Int[Tensor, " tile"]:
        """The first token of each tile."""
        order = torch.arange(len(self.tiles))
        return torch.full((tiles,), len(order)).scatter_reduce(0, self.tiles, order, "amin")


def lattice_of(bag: Bags) -> Lattice:
    """Of the places that the tiles have, in the order of reading; a square in their order where nobody knows any."""
    if bag.grid is None:
        count = len(bag.features)
        return _square(torch.arange(count), math.isqrt(count - 1) + 1)
    columns, rows = (bag.grid.cpu() - bag.grid.cpu().amin(0)).unbind(1)
    width = int(columns.max()) + 1
    order = torch.argsort(rows * width + columns, stable=True)
    return Lattice(order, rows[order].contiguous(), columns[order], width)


def repeated_square(count: int) -> Lattice:
    """The authors': in the order of the file, filled up with the first tiles again."""
    side = math.isqrt(count - 1) + 1
    return _square(torch.arange(side * side) % count, side)


def _square(tiles: Int[Tensor, " token"], side: int) -> Lattice:
    order = torch.arange(len(tiles))
    return Lattice(tiles, order // side, order % side, side)
