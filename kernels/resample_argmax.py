"""Scores brought to another grid of the same extent, and in the same pass the class that wins in each new voxel.

    labels[i, j, k] = argmax_c  Σ_e d[i, e] Σ_f h[j, f] Σ_g w[k, g] · scores[c, e, f, g]

scores: [C, d, h, w], any finite float: logits or probabilities, times any positive number that all classes share; labels:
[D, H, W], the smallest of uint8, int16, int32 that holds the classes.
Each axis is interpolated linearly, with x_before = (x_after + 1/2) · before / after - 1/2 and edges repeated, or (`nearest`)
takes the nearest voxel, the later of two. Of equal classes the lowest wins. With a `threshold` channels are regions that
may overlap: of those above it the last is painted; number 0 is none, n + 1 is channel n. `lookup` gives each number its
value in the label map; the winning score, 0 where no region won, comes beside it. Neither carries a gradient.

Scores on the new grid are never held. Where one class wins at all eight corners of a cell it wins inside, too, so there
nothing but its own score is interpolated; in scans nearly every cell is such a cell.

Labels are those of interpolating every class in float32 (float64 for float64), to the bit: along w, then h, then d, a
voxel is near · share + far · share', each product rounded before the sum. Rounding never turns an order round, but may
make two scores equal and a higher class lose: cells with a class so close to the winner are interpolated in full.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ._library import operation
from ._triton import tl, triton, usable

Triple = tuple[int, int, int]


def reference(
    scores: Tensor,
    shape: Triple,
    lookup: Tensor | None = None,
    threshold: float | None = None,
    nearest: int | None = None,
    strength: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """The labels, and beside them, unless `strength` is off, the score of what won: every class interpolated."""
    _check(scores.shape, shape, lookup, threshold, nearest)
    dense = scores.detach().to(_sums_in(scores))
    axes = _axes(dense, scores.shape[1:], shape, nearest)
    for axis, along in ((3, axes[2]), (2, axes[1]), (1, axes[0])):
        dense = along.interpolated(dense, axis)
    if threshold is None:
        number = dense.argmax(dim=0)  # torch: the first of equals
        winner = dense.gather(0, number[None])[0]
    else:
        numbers = torch.arange(1, len(dense) + 1, device=dense.device)
        number = (numbers.view(-1, 1, 1, 1) * (dense > threshold)).amax(dim=0)
        winner = dense.gather(0, (number - 1).clamp(min=0)[None])[0] * (number > 0)
    labels = _values(number, lookup, _label_type(len(dense), lookup, threshold))
    return (labels, winner) if strength else labels


@triton.jit
def _summary_kernel(
    p_scores, p_key, p_best, C, voxels, h, w, stride_c, stride_d, stride_h, stride_w,
    IS_PAINTED: tl.constexpr, THRESHOLD: tl.constexpr, CLOSE: tl.constexpr, TINY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each old voxel the best score and whose it is; -1 where another is so close that rounding could matter."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)  # [BLOCK]
    mask = i < voxels
    of = i // w // h * stride_d + i // w % h * stride_h + i % w * stride_w
    dtype = p_best.dtype.element_ty
    b_key = tl.full([BLOCK], 0, tl.int32)
    if IS_PAINTED:
        b_best = tl.full([BLOCK], 0, dtype)
        b_loose = tl.full([BLOCK], 0, tl.int32)  # the last region that rounding could lift over the threshold
        for c in range(0, C):
            b_score = tl.load(p_scores + of, mask=mask, other=0).to(dtype)
            is_above = b_score > THRESHOLD + CLOSE
            b_key = tl.where(is_above, c + 1, b_key)
            b_best = tl.where(is_above, b_score, b_best)
            b_loose = tl.where(b_score > THRESHOLD - CLOSE, c + 1, b_loose)
            of += stride_c
        b_key = tl.where(b_key == b_loose, b_key, -1)
    else:
        b_best = tl.full([BLOCK], float("-inf"), dtype)
        b_below = tl.full([BLOCK], float("-inf"), dtype)  # the best of the classes before the best
        for c in range(0, C):
            b_score = tl.load(p_scores + of, mask=mask, other=0).to(dtype)
            is_better = b_score > b_best
            b_key = tl.where(is_better, c, b_key)
            b_below = tl.where(is_better, b_best, b_below)
            b_best = tl.where(is_better, b_score, b_best)
            of += stride_c
        b_key = tl.where(b_below >= b_best - (tl.abs(b_best) * CLOSE + TINY), -1, b_key)
    tl.store(p_key + i, b_key, mask=mask)
    tl.store(p_best + i, b_best, mask=mask)


@triton.jit
def _mixed(p, of_d0, of_d1, of_h0, of_h1, of_w0, of_w1, d_near, d_far, h_near, h_far, w_near, w_far, mask):
    """The score between eight old voxels, in the order that makes bits equal everywhere. [BLOCK_H, BLOCK_W]"""
    dtype = d_near.dtype
    b_00 = tl.load(p + (of_d0 + of_h0 + of_w0), mask=mask, other=0).to(dtype) * w_near
    b_00 += tl.load(p + (of_d0 + of_h0 + of_w1), mask=mask, other=0).to(dtype) * w_far
    b_01 = tl.load(p + (of_d0 + of_h1 + of_w0), mask=mask, other=0).to(dtype) * w_near
    b_01 += tl.load(p + (of_d0 + of_h1 + of_w1), mask=mask, other=0).to(dtype) * w_far
    b_10 = tl.load(p + (of_d1 + of_h0 + of_w0), mask=mask, other=0).to(dtype) * w_near
    b_10 += tl.load(p + (of_d1 + of_h0 + of_w1), mask=mask, other=0).to(dtype) * w_far
    b_11 = tl.load(p + (of_d1 + of_h1 + of_w0), mask=mask, other=0).to(dtype) * w_near
    b_11 += tl.load(p + (of_d1 + of_h1 + of_w1), mask=mask, other=0).to(dtype) * w_far
    return (b_00 * h_near + b_01 * h_far) * d_near + (b_10 * h_near + b_11 * h_far) * d_far


@triton.jit
def _decision_kernel(
    p_scores, p_key, p_best, p_places, p_shares, p_lookup, p_labels, p_strength, C, d, h, w, D, H, W,
    stride_c, stride_d, stride_h, stride_w, IS_PAINTED: tl.constexpr, THRESHOLD: tl.constexpr, HAS_LOOKUP: tl.constexpr,
    WITH_STRENGTH: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    tiles_h, tiles_w = tl.cdiv(H, BLOCK_H), tl.cdiv(W, BLOCK_W)
    i_d = tile // tiles_w // tiles_h
    i_h = tile // tiles_w % tiles_h * BLOCK_H + tl.arange(0, BLOCK_H).to(tl.int64)  # [BLOCK_H]
    i_w = tile % tiles_w * BLOCK_W + tl.arange(0, BLOCK_W).to(tl.int64)  # [BLOCK_W]
    m_h, m_w = i_h < H, i_w < W
    mask = m_h[:, None] & m_w[None, :]  # [BLOCK_H, BLOCK_W]

    # places and shares: [2, D + H + W], the near voxel's and the far one's
    axes = D + H + W
    d0, d1 = tl.load(p_places + i_d), tl.load(p_places + axes + i_d)
    h0, h1 = tl.load(p_places + D + i_h, mask=m_h, other=0), tl.load(p_places + axes + D + i_h, mask=m_h, other=0)
    w0 = tl.load(p_places + D + H + i_w, mask=m_w, other=0)
    w1 = tl.load(p_places + axes + D + H + i_w, mask=m_w, other=0)
    d_near, d_far = tl.load(p_shares + i_d), tl.load(p_shares + axes + i_d)
    h_near = tl.load(p_shares + D + i_h, mask=m_h, other=0)[:, None]
    h_far = tl.load(p_shares + axes + D + i_h, mask=m_h, other=0)[:, None]
    w_near = tl.load(p_shares + D + H + i_w, mask=m_w, other=0)[None, :]
    w_far = tl.load(p_shares + axes + D + H + i_w, mask=m_w, other=0)[None, :]

    e0, e1 = d0 * h * w, d1 * h * w
    f0, f1 = (h0 * w)[:, None], (h1 * w)[:, None]
    g0, g1 = w0[None, :], w1[None, :]
    b_key = tl.load(p_key + (e0 + f0 + g0), mask=mask, other=0)
    is_even = b_key == tl.load(p_key + (e0 + f0 + g1), mask=mask, other=0)
    is_even &= b_key == tl.load(p_key + (e0 + f1 + g0), mask=mask, other=0)
    is_even &= b_key == tl.load(p_key + (e0 + f1 + g1), mask=mask, other=0)
    is_even &= b_key == tl.load(p_key + (e1 + f0 + g0), mask=mask, other=0)
    is_even &= b_key == tl.load(p_key + (e1 + f0 + g1), mask=mask, other=0)
    is_even &= b_key == tl.load(p_key + (e1 + f1 + g0), mask=mask, other=0)
    is_even &= b_key == tl.load(p_key + (e1 + f1 + g1), mask=mask, other=0)
    is_even &= b_key >= 0
    m_mixed = mask & (is_even == 0)

    dtype = p_best.dtype.element_ty
    b_number = tl.full([BLOCK_H, BLOCK_W], 0, tl.int32)
    b_score = tl.full([BLOCK_H, BLOCK_W], float("-inf"), dtype)
    of_d0, of_d1 = d0 * stride_d, d1 * stride_d
    of_h0, of_h1 = (h0 * stride_h)[:, None], (h1 * stride_h)[:, None]
    of_w0, of_w1 = (w0 * stride_w)[None, :], (w1 * stride_w)[None, :]
    # a tile of even cells looks at no class
    for c in range(0, C * tl.max(m_mixed.to(tl.int32))):
        b_new = _mixed(
            p_scores, of_d0, of_d1, of_h0, of_h1, of_w0, of_w1, d_near, d_far, h_near, h_far, w_near, w_far, m_mixed
        )
        if IS_PAINTED:
            wins = b_new > THRESHOLD
            b_number = tl.where(wins, c + 1, b_number)
        else:
            wins = b_new > b_score
            b_number = tl.where(wins, c, b_number)
        b_score = tl.where(wins, b_new, b_score)
        of_d0 += stride_c
        of_d1 += stride_c
    if IS_PAINTED:
        b_score = tl.where(b_number > 0, b_score, 0)

    at = i_d * H * W + (i_h * W)[:, None] + i_w[None, :]
    b_number = tl.where(m_mixed, b_number, b_key)
    if HAS_LOOKUP:
        tl.store(p_labels + at, tl.load(p_lookup + b_number, mask=mask, other=0), mask=mask)
    else:
        tl.store(p_labels + at, b_number.to(p_labels.dtype.element_ty), mask=mask)
    if WITH_STRENGTH:
        b_even = _mixed(p_best, e0, e1, f0, f1, g0, g1, d_near, d_far, h_near, h_far, w_near, w_far, mask)
        tl.store(p_strength + at, tl.where(m_mixed, b_score, b_even), mask=mask)


@operation("resample_argmax")
def _decide(
    scores: Tensor, D: int, H: int, W: int, lookup: Tensor | None, threshold: float | None, nearest: int | None,
    strength: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    labels, winner = _room(scores, (D, H, W), lookup, threshold, strength)
    if not labels.numel():
        return labels, winner
    if usable(scores):
        _launch(scores, labels, winner, lookup, threshold, nearest)
        return labels, winner
    row = 0
    for some, their in stream([scores], scores.shape[1], (D, H, W), lookup, threshold, nearest):
        labels[row : row + len(some)] = some
        if strength:
            winner[row : row + len(some)] = their
        row += len(some)
    return labels, winner


@_decide.register_fake
def _(scores, D, H, W, lookup, threshold, nearest, strength):
    return _room(scores, (D, H, W), lookup, threshold, strength)


def _setup(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*output)


def _backward(ctx, *gradients):
    return (None,) * 8


_decide.register_autograd(_backward, setup_context=_setup)


def _room(
    scores: Tensor, shape: Triple, lookup: Tensor | None, threshold: float | None, strength: bool
) -> tuple[Tensor, Tensor]:
    labels = torch.empty(shape, dtype=_label_type(len(scores), lookup, threshold), device=scores.device)
    winner = torch.empty(shape if strength else (0, 0, 0), dtype=_sums_in(scores), device=scores.device)
    return labels, winner


def _launch(
    scores: Tensor, labels: Tensor, winner: Tensor, lookup: Tensor | None, threshold: float | None, nearest: int | None
) -> None:
    C, d, h, w = scores.shape
    D, H, W = labels.shape
    kind = _sums_in(scores)
    axes = _axes(scores, (d, h, w), (D, H, W), nearest)
    places = torch.stack([torch.cat([axis.first for axis in axes]), torch.cat([axis.second for axis in axes])])
    shares = torch.stack([torch.cat([axis.near for axis in axes]), torch.cat([axis.far for axis in axes])])
    key = torch.empty((d, h, w), dtype=torch.int32, device=scores.device)
    best = torch.empty((d, h, w), dtype=kind, device=scores.device)
    is_painted, level = threshold is not None, threshold or 0.0
    block, block_h, block_w = 512, 8, 32  # a tile is compact: the fewer cells it touches, the likelier all are even
    _summary_kernel[(triton.cdiv(key.numel(), block),)](
        scores, key, best, C, key.numel(), h, w, *scores.stride(),
        IS_PAINTED=is_painted, THRESHOLD=level, CLOSE=_close(kind, threshold), TINY=torch.finfo(kind).tiny, BLOCK=block,
        enable_fp_fusion=False,
    )  # fmt: skip
    _decision_kernel[(D * triton.cdiv(H, block_h) * triton.cdiv(W, block_w),)](
        scores, key, best, places, shares, labels if lookup is None else lookup.contiguous(), labels, winner,
        C, d, h, w, D, H, W, *scores.stride(),
        IS_PAINTED=is_painted, THRESHOLD=level, HAS_LOOKUP=lookup is not None, WITH_STRENGTH=winner.numel() > 0,
        BLOCK_H=block_h, BLOCK_W=block_w, enable_fp_fusion=False,
    )  # fmt: skip


def fused(
    scores: Tensor,
    shape: Triple,
    lookup: Tensor | None = None,
    threshold: float | None = None,
    nearest: int | None = None,
    strength: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """What `reference` does, and no more memory than the result and a few planes of scores."""
    _check(scores.shape, shape, lookup, threshold, nearest)
    labels, winner = _decide(scores, *shape, lookup, threshold, nearest, strength)
    return (labels, winner) if strength else labels


def stream(
    slabs: Iterable[Tensor],
    depth: int,
    shape: Triple,
    lookup: Tensor | None = None,
    threshold: float | None = None,
    nearest: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Labels and winning scores, a few planes [≤ 16, H, W] at a time, from slabs of scores [C, any, h, w]; both in order.

    `depth` is how many planes will arrive in all. New planes leave as soon as both their old neighbours are there, and a
    slab may be written over once the next one is asked for.
    """
    held: dict[int, _Plane] = {}
    layers: list[_Layer] = []
    for number, plane in enumerate(_planes(slabs) if shape[0] else ()):
        if number == 0:
            C, h, w = plane.shape
            _check((C, depth, h, w), shape, lookup, threshold, nearest)
            grid = _Grid.between((C, depth, h, w), shape, nearest, threshold, plane)
            layers = grid.layers()[::-1]
        if number >= layers[-1].first:  # on a coarser grid some old planes are passed by
            held[number] = grid.seen(plane)
        while layers and layers[-1].second == number:
            layer = layers.pop()
            numbers, winner = grid.decided(held[layer.first], held[layer.second], layer.rows)
            yield _values(numbers, lookup, _label_type(C, lookup, threshold)), winner
        if not layers:
            return
        held = {there: one for there, one in held.items() if there >= layers[-1].first}
    if shape[0]:
        raise ValueError(
            f"The planes of scores ended before the {depth} that were announced; every plane is needed, in order. "
            "Hand over all of them."
        )


class Between:
    """The scores themselves on the new grid, for whoever wants them all: old planes [C, h, w] go in, new ones come out.

    As `stream`, and with its rounding; a new plane leaves as soon as both its old neighbours are there.
    """

    def __init__(self, depth: int, shape: Triple, nearest: int | None = None) -> None:
        self.depth, self.shape, self.nearest = depth, shape, nearest
        self.axes: list[_Axis] = []
        self.held: dict[int, Tensor] = {}
        self.number = self.row = 0

    def take(self, plane: Tensor) -> Iterator[Tensor]:
        """New planes [C, H, W] in order, none or many."""
        if not self.axes:
            self.axes = _axes(plane, (self.depth, *plane.shape[1:]), self.shape, self.nearest)
        along, across, within = self.axes
        self.held[self.number] = across.interpolated(within.interpolated(plane.to(_sums_in(plane)), 2), 1)
        while self.row < self.shape[0] and int(along.second[self.row]) <= self.number:
            low, high = self.held[int(along.first[self.row])], self.held[int(along.second[self.row])]
            yield low * along.near[self.row] + high * along.far[self.row]
            self.row += 1
        needed = int(along.first[self.row]) if self.row < self.shape[0] else self.depth
        self.held = {there: one for there, one in self.held.items() if there >= needed}
        self.number += 1


def _planes(slabs: Iterable[Tensor]) -> Iterator[Tensor]:
    """Plane by plane [C, h, w]. The last of a slab is copied: it is still needed when the next slab is there."""
    for slab in slabs:
        *planes, last = slab.detach().unbind(1)
        yield from planes
        yield last.clone()


@dataclass(frozen=True, eq=False)
class _Axis:
    """Along one axis, the two old voxels that each new one lies between, and the share of each."""

    first: Tensor  # [new]
    second: Tensor
    near: Tensor
    far: Tensor
    is_mixed: bool
    """Whether anything is interpolated."""

    def interpolated(self, values: Tensor, axis: int) -> Tensor:
        fits = [-1 if other == axis else 1 for other in range(values.ndim)]
        near, far = values.index_select(axis, self.first), values.index_select(axis, self.second)
        return near * self.near.view(fits) + far * self.far.view(fits)


def _axis(before: int, after: int, is_nearest: bool, dtype: torch.dtype, device: torch.device) -> _Axis:
    new = torch.arange(after, dtype=torch.float64, device=device)
    places = ((new + 0.5) * before / after - 0.5).clamp(0, before - 1)
    if is_nearest:
        first = (places + (0.5 + 1e-6)).floor().long()  # the later of two, whatever the rounding
        far = torch.zeros(after, dtype=dtype, device=device)
    else:
        first = places.floor().long()
        far = (places - first).to(dtype)
    # shares that sum to 1 when rounded give back a constant 0.5 or 1 to the bit
    return _Axis(first, first + (far > 0), 1 - far, far, is_mixed=before != after and not is_nearest)


def _axes(scores: Tensor, before: Sequence[int], after: Triple, nearest: int | None) -> list[_Axis]:
    """For the last three axes, in the precision in which scores are summed."""
    return [
        _axis(old, new, axis == nearest, _sums_in(scores), scores.device)
        for axis, (old, new) in enumerate(zip(before, after, strict=True))
    ]


class _Layer(NamedTuple):
    """New planes that lie between the same two old ones."""

    first: int
    second: int
    rows: slice


@dataclass(frozen=True, eq=False)
class _Plane:
    """An old plane, and what is known of each of its voxels."""

    scores: Tensor  # [C, h · w]
    key: Tensor
    """Whose score is the best; -1 where another is so close that rounding could matter. [h, w]"""
    best: Tensor
    """The best scores, as if they were of one class, between the voxels. [H · W]"""


class _Corners(NamedTuple):
    """For some pixels of the new grid, the four old ones around each and their shares."""

    at: list[Tensor]
    across: tuple[Tensor, Tensor]
    along: tuple[Tensor, Tensor]


ROOM = 2**17
"""How many scores are worked on at once: few enough for a core's cache."""


@dataclass(frozen=True, eq=False)
class _Grid:
    """What lies between old planes: a new plane's labels, and the scores that won."""

    depth: _Axis
    across: _Axis
    along: _Axis
    old_width: int
    threshold: float | None
    room: Tensor  # [8, ROOM or a class each], for the scores at the corners

    @staticmethod
    def between(
        before: Sequence[int], after: Triple, nearest: int | None, threshold: float | None, like: Tensor
    ) -> "_Grid":
        room = torch.empty(8, max(ROOM, before[0]), dtype=_sums_in(like), device=like.device)
        depth, across, along = _axes(like, before[1:], after, nearest)
        return _Grid(depth, across, along, before[3], threshold, room)

    def layers(self) -> list[_Layer]:
        """At most 16 new planes each: a single old plane may be stretched over many."""
        pairs = list(zip(self.depth.first.tolist(), self.depth.second.tolist(), strict=True))
        starts = [row for row, pair in enumerate(pairs) if row == 0 or pair != pairs[row - 1]]
        cuts = [
            slice(start + some.start, start + some.stop)
            for start, stop in pairwise([*starts, len(pairs)])
            for some in _cut(stop - start, 16)
        ]
        return [_Layer(first, second, rows) for rows in cuts for first, second in [pairs[rows.start]]]

    def seen(self, plane: Tensor) -> _Plane:
        C, h, w = plane.shape
        scores = plane.to(self.room.dtype).flatten(1)
        if scores.stride(1) != 1:  # classes or rows lie closer together: a copy of a plane costs less than strides
            scores = scores.contiguous()
        key = torch.empty(h * w, dtype=torch.int32, device=plane.device)
        best = torch.empty(h * w, dtype=scores.dtype, device=plane.device)
        for some in _cut(h * w, self.at_once(C)):
            key[some], best[some] = _key(scores[:, some], self.threshold)
        best = self.across.interpolated(self.along.interpolated(best.view(h, w), 1), 0)
        return _Plane(scores, key.view(h, w), best.flatten())

    def decided(self, low: _Plane, high: _Plane, rows: slice) -> tuple[Tensor, Tensor]:
        """Numbers and winning scores [rows, H, W]: even cells are filled, in the others every class is interpolated."""
        near, far = self.depth.near[rows, None], self.depth.far[rows, None]
        winner = low.best * near + high.best * far  # [rows, H · W]
        plane = self._even(low.key, high.key).index_select(0, self.across.first).index_select(1, self.along.first)
        number = plane.flatten().repeat(len(near), 1)
        uneven = (plane.flatten() < 0).nonzero()[:, 0]
        for some in uneven.split(self.at_once(len(low.scores))):
            corners = self._corners(some)
            below, above = self._within(low, corners, 0), self._within(high, corners, 4)  # [C, some]
            for row in range(len(near)):
                scores = torch.mul(below, near[row], out=self._part(1, below.shape))
                scores.add_(torch.mul(above, far[row], out=self._part(5, below.shape)))
                numbers, best = _won(scores, self.threshold)
                number[row].index_copy_(0, some, numbers)
                winner[row].index_copy_(0, some, best)
        shape = (len(near), *plane.shape)
        return number.view(shape), winner.view(shape)

    def _even(self, low: Tensor, high: Tensor) -> Tensor:
        """The number that wins in a whole cell, named by its first corner, or -1. [h, w]"""
        even = torch.where(low == high, low, -1)
        if self.across.is_mixed:
            even[:-1].masked_fill_(even[:-1] != even[1:], -1)
        if self.along.is_mixed:
            even[:, :-1].masked_fill_(even[:, :-1] != even[:, 1:], -1)
        return even

    def _corners(self, pixels: Tensor) -> _Corners:
        W, w = len(self.along.first), self.old_width
        i, j = pixels // W, pixels % W
        rows = self.across.first[i] * w, self.across.second[i] * w
        columns = self.along.first[j], self.along.second[j]
        return _Corners(
            at=[row + column for row in rows for column in columns],
            across=(self.across.near[i], self.across.far[i]),
            along=(self.along.near[j], self.along.far[j]),
        )

    def _within(self, plane: _Plane, corners: _Corners, part: int) -> Tensor:
        """All scores of some pixels of the new grid, within the old plane. [C, some]"""
        shape = (len(plane.scores), len(corners.at[0]))
        near, far, next_near, next_far = (
            torch.gather(plane.scores, 1, at.expand(shape), out=self._part(part + n, shape))
            for n, at in enumerate(corners.at)
        )
        for one, other in ((near, far), (next_near, next_far)):
            one.mul_(corners.along[0]).add_(other.mul_(corners.along[1]))
        return near.mul_(corners.across[0]).add_(next_near.mul_(corners.across[1]))

    def _part(self, number: int, shape: tuple[int, ...]) -> Tensor:
        return self.room[number, : shape[0] * shape[1]].view(shape)

    def at_once(self, classes: int) -> int:
        return self.room.shape[1] // classes


def _won(scores: Tensor, threshold: float | None) -> tuple[Tensor, Tensor]:
    """Which number wins in each column, and with what score. [C, n] -> [n]"""
    if threshold is None:
        best = scores.amax(dim=0)
        return _first(scores >= best), best
    number = _last(scores > threshold)
    return number, _painted(scores, number)


def _key(scores: Tensor, threshold: float | None) -> tuple[Tensor, Tensor]:
    """What `_won` says, and -1 where another class, or the threshold, is so close that rounding could matter."""
    close = _close(scores.dtype, threshold)
    if threshold is None:
        best = scores.amax(dim=0)
        number = _first(scores >= best - (best.abs() * close + torch.finfo(scores.dtype).tiny))
        is_sure = scores.gather(0, number[None].long())[0] == best  # no class before the winner comes close to it
    else:
        number = _last(scores > threshold + close)
        best = _painted(scores, number)
        is_sure = number == _last(scores > threshold - close)
    return torch.where(is_sure, number, -1), best


def _first(mask: Tensor) -> Tensor:
    """The first row that is true, 0 where none is: a best score that is no number. [C, n] -> [n]"""
    return (len(mask) - _last(mask, backwards=True)) % len(mask)


def _last(mask: Tensor, backwards: bool = False) -> Tensor:
    """1 + the last row that is true, 0 where none is. [C, n] -> [n]"""
    # the greatest product of a column is found many times faster than torch finds where something is
    kind = torch.uint8 if len(mask) < 256 else torch.int32
    numbers = torch.arange(1, len(mask) + 1, dtype=kind, device=mask.device)
    if backwards:
        numbers = numbers.flip(0)
    return (mask.view(torch.uint8) * numbers[:, None]).amax(dim=0).int()


def _painted(scores: Tensor, number: Tensor) -> Tensor:
    """The score of region number - 1, 0 where there is none. [C, n] -> [n]"""
    return scores.gather(0, (number - 1).clamp(min=0)[None].long())[0] * (number > 0)


def _close(dtype: torch.dtype, threshold: float | None) -> float:
    """Within which distance rounding could make equal what is not: of a best score a share, of a threshold a length.

    A score is rounded six times on its way, half an epsilon each; four times as much as that for two scores is safe.
    """
    share = 48 * torch.finfo(dtype).eps
    return share if threshold is None else share * abs(threshold) + torch.finfo(dtype).tiny


def _sums_in(scores: Tensor) -> torch.dtype:
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


def _label_type(classes: int, lookup: Tensor | None, threshold: float | None) -> torch.dtype:
    """The smallest that holds every number, or what the lookup holds."""
    if lookup is not None:
        return lookup.dtype
    highest = classes - (threshold is None)
    return torch.uint8 if highest < 2**8 else torch.int16 if highest < 2**15 else torch.int32


def _values(number: Tensor, lookup: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What is written in a label map for each number."""
    return number.to(dtype) if lookup is None else lookup[number.long()]


def _cut(size: int, width: int) -> list[slice]:
    return [slice(start, min(start + width, size)) for start in range(0, size, width)]


def _check(
    before: Sequence[int], shape: Triple, lookup: Tensor | None, threshold: float | None, nearest: int | None
) -> None:
    """A kernel trusts its shapes: a wrong one reads memory that is not its own."""
    if len(before) != 4 or len(shape) != 3 or before[0] == 0:
        raise ValueError(
            f"Scores of shape {tuple(before)} were to be brought to {tuple(shape)}; scores [class, d, h, w] of at least one "
            "class and a shape of three numbers are needed. Leave out the axis of the batch."
        )
    if any(new and not old for old, new in zip(before[1:], shape, strict=True)):
        raise ValueError(
            f"Scores of shape {tuple(before)} were to be brought to {tuple(shape)}; of no voxels none can be made. "
            "Ask for none, or hand over some."
        )
    numbers = before[0] + (threshold is not None)
    if lookup is not None and (lookup.ndim != 1 or len(lookup) != numbers):
        raise ValueError(
            f"A lookup of shape {tuple(lookup.shape)} was given; {numbers} values are needed, one per class, or for regions "
            "one for none and one per region. Make one of that length."
        )
    if nearest not in (None, 0, 1, 2):
        raise ValueError(
            f"nearest is {nearest}; an axis, 0, 1 or 2, or None is needed. Name the axis along which voxels are thick."
        )


EXAMPLES = [
    dict(scores=(4, 3, 5, 7), shape=(5, 9, 36), strength=False),  # finer, more than one block wide
    dict(scores=(4, 5, 9, 11), shape=(5, 9, 11)),  # nothing is interpolated
    dict(scores=(5, 7, 9, 8), shape=(3, 5, 3), patches=1),  # coarser
    dict(scores=(5, 6, 7, 8), shape=(8, 9, 13), patches=3),  # most cells are even
    dict(scores=(3, 6, 7, 8), shape=(7, 9, 10), patches=3, threshold=0.5, lookup=(0, 7, 3, 200)),  # regions
    dict(scores=(3, 5, 4, 3), shape=(7, 3, 5), nearest=0, lookup=(0, -2, 900)),  # thick slices, negative values
    dict(scores=(1, 1, 1, 1), shape=(3, 1, 2)),  # one voxel, one class
    dict(scores=(2, 0, 3, 4), shape=(0, 5, 6)),  # none
]


def sample(
    *,
    dtype: torch.dtype,
    device: str,
    scores: tuple[int, int, int, int],
    shape: Triple,
    patches: int = 1,
    threshold: float | None = None,
    nearest: int | None = None,
    lookup: tuple[int, ...] | None = None,
    strength: bool = True,
) -> tuple[Tensor, Triple, Tensor | None, float | None, int | None, bool]:
    """Arguments for one example: probabilities, each `patches` voxels along an axis alike."""
    random = torch.Generator().manual_seed(0)
    C, *sizes = scores
    drawn = torch.rand(C, *(-(-size // patches) for size in sizes), generator=random, dtype=torch.float64)
    for axis in (1, 2, 3):
        drawn = drawn.repeat_interleave(patches, axis)
    drawn = drawn[:, : sizes[0], : sizes[1], : sizes[2]].contiguous()
    kind = torch.int16 if lookup and (min(lookup) < 0 or max(lookup) > 255) else torch.uint8
    values = None if lookup is None else torch.tensor(lookup, dtype=kind, device=device)
    return drawn.to(device, dtype), shape, values, threshold, nearest, strength
