"""Every token of a long sequence sees all others through a few landmarks, and no block of tokens is held for long.

After Xiong et al., "Nyströmformer" (AAAI 2021, arXiv 2102.03902), as TransMIL has it. With Q~ and K~ the means of queries
and keys over groups of consecutive tokens,

    out = softmax(Q K~ᵀ) · [softmax(Q~ K~ᵀ)]⁺ · softmax(Q~ Kᵀ) V + 33 taps of V along the sequence, channels of a head alike

What the whole sequence tells a token, `Landmarks`, is gathered in two passes over blocks (means, then softmax(Q~ Kᵀ) V, put
together by log-sums); from then on any block is answered by itself. Tokens are asked for again in each pass: a sequence is
a function that makes them.

Groups are as equal as they can be, and as many as tokens where these are few; then the attention is exact but for the
inverse, which a few iterations approach. `padded` are the authors' groups: all as long as the longest, the first ones
filled up with zeros that count in the means and receive attention.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from .bags import again

REACH = 16
"""Neighbours on each side in the convolution of values: 33 taps, nystrom-attention's residual_conv_kernel."""

REMEMBERED = 16_384
"""Sequences of as many tokens are kept rather than made again: 32 MiB at a width of 512."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """A sequence, of which any stretch can be made."""

    count: int
    make: Callable[[int, int], Tensor]
    """From a first token to the one after the last: [n, width]."""
    bounds: tuple[int, ...]
    """Where blocks end and begin that are small enough to be made at once; 0 first, the count last."""

    @property
    def blocks(self) -> list[tuple[int, int]]:
        return list(itertools.pairwise(self.bounds))

    def kept(self) -> "Tokens":
        """A short sequence is made once; a long one whenever it is asked for."""
        if self.count > REMEMBERED:
            return self
        whole = torch.cat([again(self.make, start, end) for start, end in self.blocks])
        return Tokens(self.count, lambda start, end: whole[start:end], self.bounds)


@dataclass(frozen=True, eq=False)
class Landmarks:
    """What a whole sequence tells each of its tokens."""

    queries: Float[Tensor, "head landmark d"]
    keys: Float[Tensor, "head landmark d"]
    inverse: Float[Tensor, "head landmark landmark"]
    log_sums: Float[Tensor, "head landmark"]
    """Of the products of a landmark's query with all keys."""
    values: Float[Tensor, "head landmark d"]
    """inverse · softmax(Q~ Kᵀ) V"""
    scores: Float[Tensor, "head token"]
    """Products of the first token's query with every key: its exact attention is their softmax."""


class Nystrom(nn.Module):
    """Norm, attention and residual: tokens in, tokens out."""

    def __init__(
        self, width: int, heads: int, landmarks: int, iterations: int, dropout: float, padded: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.landmarks, self.iterations, self.padded = heads, landmarks, iterations, padded
        self.scale = (width // heads) ** -0.5
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.along = nn.Conv2d(heads, heads, (2 * REACH + 1, 1), padding=(REACH, 0), groups=heads, bias=False)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def look(self, tokens: Tokens) -> Landmarks:
        """Two passes over the sequence."""
        groups = self._groups(tokens.count)
        sums = sum(again(self._sums, tokens, groups, start, end) for start, end in tokens.blocks)
        means = sums / groups.sizes.to(sums)[:, None]  # [landmark, width]; queries and keys have no bias
        queries, keys = self._queries(means), self._heads(means, 1)
        first = self._queries(self.norm(tokens.make(0, 1)))
        values, log_sums, scores = self._gathered(tokens, queries, first, groups.padding)
        inverse = inverted(torch.softmax(queries @ keys.mT, -1), self.iterations)
        return Landmarks(queries, keys, inverse, log_sums, inverse @ values, scores)

    def answer(self, tokens: Tokens, seen: Landmarks, start: int, end: int) -> Float[Tensor, "n width"]:
        """The tokens from start to end, having looked."""
        first, last = max(0, start - REACH), min(end + REACH, tokens.count)
        x = tokens.make(first, last)
        normed, asked = self.norm(x), slice(start - first, end - first)
        values = self._heads(normed, 2)[None]
        attended = functional.scaled_dot_product_attention(  # blocks of softmax(Q K~ᵀ) only
            self._queries(normed[asked])[None], seen.keys[None], seen.values[None], scale=1.0
        )
        told = (attended + self.along(values)[:, :, asked])[0]  # [head, n, d]
        return x[asked] + self.dropout(self.out(told.transpose(0, 1).flatten(1)))

    def carried(self, tokens: Tokens, seen: Landmarks, start: int, end: int) -> Float[Tensor, "head n d"]:
        """What each of these tokens adds to the first one, before `out`: their sum is all that the first one is told."""
        asking = torch.softmax(self._queries(self.norm(tokens.make(0, 1))) @ seen.keys.mT, -1) @ seen.inverse
        normed = self.norm(tokens.make(start, end))
        keys, values = self._heads(normed, 1), self._heads(normed, 2)
        row = asking @ torch.exp(seen.queries @ keys.mT - seen.log_sums[..., None])  # [head, 1, n]
        near = range(start, min(end, REACH + 1))
        taps = self.along.weight[:, 0, REACH + start : REACH + start + len(near)]  # [head, near, 1]
        return row.mT * values + functional.pad(taps, (0, 0, 0, end - start - len(near))) * values

    def _groups(self, count: int) -> "Groups":
        if not self.padded:
            return Groups.equal(count, min(count, self.landmarks))
        return Groups.filled(count, self.landmarks)

    def _sums(self, tokens: Tokens, groups: "Groups", start: int, end: int) -> Float[Tensor, "landmark width"]:
        normed = self.norm(tokens.make(start, end))
        of = groups.of(start, end).to(normed.device)
        return normed.new_zeros(len(groups.sizes), normed.shape[1]).index_add(0, of, normed)

    def _gathered(self, tokens: Tokens, queries: Tensor, first: Tensor, padding: int) -> tuple[Tensor, ...]:
        """softmax(Q~ Kᵀ) V, its log-sums, and the first token's scores.

        A running sum, relative to the largest log-sum so far: that has no gradient, so no block's part is remembered.
        """
        total, top = queries.new_zeros(queries.shape), queries.new_full(queries.shape[:2], -torch.inf)
        weight, scores = torch.zeros_like(top), []
        if padding:  # a key of zeros has a product of 0 with every query
            top, weight = torch.zeros_like(top), torch.full_like(top, padding)
        for start, end in tokens.blocks:
            found, share, asked, higher = again(self._seen, tokens, queries, first, top, start, end)
            shrunk = torch.exp(top - higher)
            total, weight, top = shrunk[..., None] * total + found, shrunk * weight + share, higher
            scores.append(asked)
        return total / weight[..., None], top + weight.log(), torch.cat(scores, -1)

    def _seen(
        self, tokens: Tokens, queries: Tensor, first: Tensor, top: Tensor, start: int, end: int
    ) -> tuple[Tensor, ...]:
        """What landmarks find in these tokens and how much of it, relative to `top` or to what is higher here."""
        normed = self.norm(tokens.make(start, end))
        keys, values = self._heads(normed, 1), self._heads(normed, 2)
        found = functional.scaled_dot_product_attention(queries[None], keys[None], values[None], scale=1.0)[0]
        log_sum = (queries @ keys.mT).logsumexp(-1)  # [head, landmark]
        higher = torch.maximum(top, log_sum.detach())
        share = torch.exp(log_sum - higher)
        return share[..., None] * found, share, (first @ keys.mT)[:, 0], higher

    def _queries(self, normed: Float[Tensor, "n width"]) -> Float[Tensor, "head n d"]:
        return self.scale * self._heads(normed, 0)

    def _heads(self, normed: Float[Tensor, "n width"], which: int) -> Float[Tensor, "head n d"]:
        """Queries, keys or values: 0, 1 or 2."""
        width = normed.shape[1]
        weight = self.qkv.weight[which * width : (which + 1) * width]
        return functional.linear(normed, weight).unflatten(1, (self.heads, -1)).transpose(0, 1)


@dataclass(frozen=True, eq=False)
class Groups:
    """Which landmark each token of a sequence belongs to."""

    sizes: Int[Tensor, " landmark"]
    """By what the sum of each group is divided."""
    of: Callable[[int, int], Tensor]
    padding: int
    """Zeros before the sequence."""

    @classmethod
    def equal(cls, count: int, groups: int) -> "Groups":
        sizes = torch.bincount(torch.arange(count) * groups // count)
        return cls(sizes, lambda start, end: torch.arange(start, end) * groups // count, 0)

    @classmethod
    def filled(cls, count: int, groups: int) -> "Groups":
        size = -(-count // groups)
        padding = size * groups - count
        return cls(
            torch.full((groups,), size), lambda start, end: (padding + torch.arange(start, end)) // size, padding
        )


def inverted(matrix: Float[Tensor, "head n n"], iterations: int) -> Float[Tensor, "head n n"]:
    """The Moore-Penrose inverse, nearly: the iteration of Razavi et al. (2014), of third order."""
    one = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    columns, rows = matrix.abs().sum(-2), matrix.abs().sum(-1)
    z = matrix.mT / (columns.max() * rows.max())
    for _ in range(iterations):
        there = matrix @ z
        z = 0.25 * z @ (13 * one - there @ (15 * one - there @ (7 * one - there)))
    return z
