"""Gated attention pooling over a ragged batch of bags: every bag becomes one vector per branch.

    g_n = tanh(V x_n + b_v) · sigmoid(U x_n + b_u)       the gate; without U: tanh alone
    s_nk = w_k · g_n + b_k                               the raw score of tile n in branch k
    a_nk = exp(s_nk) / sum over the tiles m of the bag that count, exp(s_mk)
    pooled_bkd = sum over the bag's tiles, a_nk x_nd

tiles x: [N, D], the tiles of all bags, one bag after the other; offsets: [bags + 1] integers, 0 first, N last: bag b has
the tiles offsets[b] to offsets[b + 1]. v, u: [H, D]; w: [K, H], K branches share the gate; v_bias, u_bias: [H]; w_bias:
[K]; u and every bias may be None. mask: [N, K] booleans, False where a score does not count, or None.

Results: pooled [bags, K, D]; scores [N, K], raw: neither masked nor normalised; entropy [bags, K] = -sum a ln a;
log_sums [bags, K], the logarithm of the sum above: the attention of a tile is exp(score - log_sum of its bag). All four
carry gradients, and come in float32 (float64 where tiles or weights are). A bag in which no tile counts, an empty one
too, has no attention: its pooled and entropy are NaN, never a silent zero, and the other bags are as they would be
without it.

Matrix products are taken in the type that tiles and weights promote to, sums in float32: fp16 features with fp32
weights are multiplied in fp32, a block at a time; weights cast to the tiles' bf16 use the matrix units. Between forward
and backward only N · K scores are kept, never an N x H tensor: the gate is computed again. `tiles` may lie in a mapped
file: it is read in blocks, never copied whole. No gradient is computed for what does not ask for one.

How the networks use it, h = features after their projection:
    ABMIL           pooled, *_ = fused(h, offsets, v, b_v, None | u, None | b_u, w, b)
    CLAM            K = 1 or classes; instances: top_tiles(scores, ...) and top_tiles(-scores, ...)
    ACMIL           K branches; the bag's vector is pooled.mean(1). Masking: draw from top_tiles(scores of a first call
                    without gradients), then call with the mask; diversity: cosines of attention(...)'s columns
    AEM             loss + weight · (-entropy).mean(); its top-k form: log_softmax of the scores at top_tiles' indices
DSMIL's attention is no gate (products with the critical tile), so its pooling is not this.
"""

import bisect
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ._library import operation
from ._triton import tl, triton, usable

Results = tuple[Tensor, Tensor, Tensor, Tensor]

TILES_AT_ONCE = {"cpu": 1024, "cuda": 16384}
"""Tiles whose gate exists at one time. On the CPU a block of 1,024 x 512 stays in the second cache, and matrix products are
at full speed from there on; a GPU needs more rows to fill its units."""


def reference(
    tiles: Tensor,
    offsets: Tensor,
    v: Tensor,
    v_bias: Tensor | None,
    u: Tensor | None,
    u_bias: Tensor | None,
    w: Tensor,
    w_bias: Tensor | None,
    mask: Tensor | None = None,
) -> Results:
    """Pooled, scores, entropy and log_sums, bag by bag."""
    weight, bias, w_bias = _stacked(tiles, offsets, v, v_bias, u, u_bias, w, w_bias, mask)
    wide = _wide(tiles, weight)
    tiles, w, w_bias = tiles.to(wide), w.to(wide), w_bias.to(wide)
    gate = tiles @ weight.to(wide).T + bias.to(wide)  # [N, H or 2H]
    gate = torch.tanh(gate) if u is None else torch.tanh(gate[:, : len(v)]) * torch.sigmoid(gate[:, len(v) :])
    scores = gate @ w.T + w_bias  # [N, K]

    pooled, entropy, log_sums = [scores.new_empty(0, len(w), tiles.shape[1])], *([scores.new_empty(0, len(w))],) * 2
    for start, end in itertools.pairwise(offsets.tolist()):
        counts = torch.ones_like(scores[start:end], dtype=torch.bool) if mask is None else mask[start:end]
        logits = scores[start:end].masked_fill(~counts, -torch.inf)
        logs = torch.log_softmax(logits, 0)
        nothing = ~counts.any(0)  # [K]
        mean = (torch.exp(logs).T @ tiles[start:end]).masked_fill(nothing[:, None], torch.nan)
        spread = -(torch.exp(logs) * logs.masked_fill(~counts, 0)).sum(0).masked_fill(nothing, torch.nan)
        pooled = [*pooled, mean[None]]
        entropy = [*entropy, spread[None]]
        log_sums = [*log_sums, torch.logsumexp(logits, 0)[None]]
    return torch.cat(pooled), scores, torch.cat(entropy), torch.cat(log_sums)


@triton.jit
def _tanh(x):
    b_small = tl.exp(-2 * tl.abs(x))  # never overflows
    b_size = (1 - b_small) / (1 + b_small)
    return tl.where(x < 0, -b_size, b_size)


@triton.jit
def _sigmoid(x):
    b_small = tl.exp(-tl.abs(x))
    return tl.where(x < 0, b_small, 1) / (1 + b_small)


@triton.jit
def _rows_of(p_plan, i_block, blocks, BLOCK_N: tl.constexpr):
    """The rows of this program's tiles, and how many of them there are."""
    start = tl.load(p_plan + blocks + i_block)
    count = tl.load(p_plan + 2 * blocks + i_block)
    return start + tl.arange(0, BLOCK_N), count


@triton.jit
def _forward_kernel(
    p_tiles, p_plan, p_weight, p_bias, p_w, p_w_bias, p_mask, p_scores, p_part, p_max, p_sum, p_log,
    blocks, D, H, K, stride_n, stride_d,
    GATED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of one bag: its scores, and what it adds to the bag, relative to the block's own maximum."""
    wide = p_scores.dtype.element_ty
    i_block = tl.program_id(0).to(tl.int64)
    i_n, count = _rows_of(p_plan, i_block, blocks, BLOCK_N)
    m_n = tl.arange(0, BLOCK_N) < count
    i_k = tl.arange(0, BLOCK_K)
    p_row = p_tiles + i_n * stride_n  # [BLOCK_N]
    width = tl.where(count > 0, H, 0)  # the grid is as long as it may have to be: the last programs have no tiles
    depth = tl.where(count > 0, D, 0)

    b_scores = tl.zeros([BLOCK_N, BLOCK_K], wide)
    for h in range(0, width, BLOCK_H):
        i_h = h + tl.arange(0, BLOCK_H)
        m_h = i_h < H
        b_v = tl.zeros([BLOCK_N, BLOCK_H], wide)
        b_u = tl.zeros([BLOCK_N, BLOCK_H], wide)
        for d in range(0, D, BLOCK_D):  # after the first h the block comes from the second cache
            i_d = d + tl.arange(0, BLOCK_D)
            m_d = i_d < D
            b_x = tl.load(
                p_row[:, None] + i_d.to(tl.int64)[None, :] * stride_d, mask=m_n[:, None] & m_d[None, :], other=0
            ).to(p_weight.dtype.element_ty)  # [BLOCK_N, BLOCK_D]
            p_v = p_weight + i_h[None, :] * D + i_d[:, None]  # [BLOCK_D, BLOCK_H]
            m_v = m_d[:, None] & m_h[None, :]
            b_v = tl.dot(b_x, tl.load(p_v, mask=m_v, other=0), b_v, input_precision="ieee", out_dtype=wide)
            if GATED:
                b_u = tl.dot(b_x, tl.load(p_v + H * D, mask=m_v, other=0), b_u, input_precision="ieee", out_dtype=wide)
        b_gate = _tanh(b_v + tl.load(p_bias + i_h, mask=m_h, other=0)[None, :])
        if GATED:
            b_gate = b_gate * _sigmoid(b_u + tl.load(p_bias + H + i_h, mask=m_h, other=0)[None, :])
        for k in range(K):
            b_w = tl.load(p_w + k * H + i_h, mask=m_h, other=0)  # [BLOCK_H]
            b_scores += tl.where(i_k[None, :] == k, tl.sum(b_gate * b_w[None, :], axis=1)[:, None], 0)
    b_scores += tl.load(p_w_bias + i_k, mask=i_k < K, other=0)[None, :]

    counts = m_n[:, None] & (i_k < K)[None, :]  # [BLOCK_N, BLOCK_K]
    at = i_n[:, None] * K + i_k[None, :]
    tl.store(p_scores + at, b_scores, mask=counts)
    if MASKED:
        counts = counts & (tl.load(p_mask + at, mask=counts, other=0) != 0)
    b_max = tl.max(tl.where(counts, b_scores, -float("inf")), axis=0)  # [BLOCK_K]
    b_logs = tl.where(counts, b_scores - tl.where(b_max == -float("inf"), 0, b_max)[None, :], 0)
    b_share = tl.where(counts, tl.exp(b_logs), 0)  # [BLOCK_N, BLOCK_K]
    own = i_block * K + i_k
    tl.store(p_max + own, b_max, mask=i_k < K)
    tl.store(p_sum + own, tl.sum(b_share, axis=0), mask=i_k < K)
    tl.store(p_log + own, tl.sum(b_share * b_logs, axis=0), mask=i_k < K)

    for d in range(0, depth, BLOCK_D):
        i_d = d + tl.arange(0, BLOCK_D)
        m_d = i_d < D
        b_x = tl.load(
            p_row[:, None] + i_d.to(tl.int64)[None, :] * stride_d, mask=m_n[:, None] & m_d[None, :], other=0
        ).to(wide)  # [BLOCK_N, BLOCK_D]
        for k in range(K):
            b_one = tl.sum(tl.where(i_k[None, :] == k, b_share, 0), axis=1)  # [BLOCK_N]
            tl.store(p_part + (i_block * K + k) * D + i_d, tl.sum(b_x * b_one[:, None], axis=0), mask=m_d)


@triton.jit
def _combine_kernel(
    p_first, p_part, p_max, p_sum, p_log, p_pooled, p_entropy, p_log_sums, D, K,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The blocks of one bag and branch, in their order, become the bag's mean, entropy and log-sum."""
    wide = p_pooled.dtype.element_ty
    i_row = tl.program_id(0).to(tl.int64)  # bag · K + k
    i_k = i_row % K
    i_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = tl.load(p_first + i_row // K)
    end = tl.load(p_first + i_row // K + 1)

    b_max = tl.full([BLOCK_B], -float("inf"), wide)
    for b in range(begin, end, BLOCK_B):
        i_b = b + tl.arange(0, BLOCK_B)
        b_max = tl.maximum(b_max, tl.load(p_max + i_b * K + i_k, mask=i_b < end, other=-float("inf")))
    top = tl.max(b_max, axis=0)
    base = tl.where(top == -float("inf"), 0, top)

    b_mean = tl.zeros([BLOCK_D], wide)
    b_sum = tl.zeros([BLOCK_B], wide)
    b_log = tl.zeros([BLOCK_B], wide)
    for b in range(begin, end, BLOCK_B):
        i_b = b + tl.arange(0, BLOCK_B)
        m_b = i_b < end
        b_from = tl.load(p_max + i_b * K + i_k, mask=m_b, other=-float("inf")) - base
        b_scale = tl.exp(b_from)
        b_part = tl.load(p_sum + i_b * K + i_k, mask=m_b, other=0)
        b_sum += b_scale * b_part
        b_part = tl.load(p_log + i_b * K + i_k, mask=m_b, other=0) + tl.where(b_scale == 0, 0, b_from) * b_part
        b_log += b_scale * b_part
        at = (i_b * K + i_k)[:, None] * D + i_d[None, :]  # [BLOCK_B, BLOCK_D]
        b_x = tl.load(p_part + at, mask=m_b[:, None] & (i_d < D)[None, :], other=0)
        b_mean += tl.sum(b_scale[:, None] * b_x, axis=0)
    total = tl.sum(b_sum, axis=0)
    log = tl.sum(b_log, axis=0)

    some = tl.where(total == 0, 1, total)
    tl.store(p_pooled + i_row * D + i_d, tl.where(total == 0, float("nan"), b_mean / some), mask=i_d < D)
    if tl.program_id(1) == 0:
        tl.store(p_entropy + i_row, tl.where(total == 0, float("nan"), tl.log(some) - log / some))
        tl.store(p_log_sums + i_row, tl.where(total == 0, -float("inf"), base + tl.log(some)))


@triton.jit
def _slopes_kernel(
    p_tiles, p_plan, p_mask, p_scores, p_log_sums, p_grad_pooled, p_constant, p_grad_entropy, p_grad_scores,
    p_slopes, p_grad_tiles, blocks, D, K, stride_n, stride_d,
    MASKED: tl.constexpr, TILES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of each score; and of each tile, the part that comes through the mean."""
    wide = p_slopes.dtype.element_ty
    i_block = tl.program_id(0).to(tl.int64)
    i_bag = tl.load(p_plan + i_block)
    i_n, count = _rows_of(p_plan, i_block, blocks, BLOCK_N)
    m_n = tl.arange(0, BLOCK_N) < count
    i_k = tl.arange(0, BLOCK_K)
    m_k = i_k < K
    inside = m_n[:, None] & m_k[None, :]  # [BLOCK_N, BLOCK_K]
    at = i_n[:, None] * K + i_k[None, :]
    depth = tl.where(count > 0, D, 0)

    counts = inside
    if MASKED:
        counts = counts & (tl.load(p_mask + at, mask=inside, other=0) != 0)
    b_logs = tl.load(p_scores + at, mask=counts, other=0)
    b_logs = b_logs - tl.load(p_log_sums + i_bag * K + i_k, mask=m_k, other=0)[None, :]
    b_logs = tl.where(counts, b_logs, 0)
    b_share = tl.where(counts, tl.exp(b_logs), 0)

    b_towards = tl.zeros([BLOCK_N, BLOCK_K], wide)  # how far each tile lies along the gradient of its bag's mean
    for d in range(0, depth, BLOCK_D):
        i_d = d + tl.arange(0, BLOCK_D)
        m_d = i_d < D
        m_x = m_n[:, None] & m_d[None, :]
        b_x = tl.load(p_tiles + i_n[:, None] * stride_n + i_d.to(tl.int64)[None, :] * stride_d, mask=m_x, other=0).to(
            wide
        )  # [BLOCK_N, BLOCK_D]
        b_grad = tl.zeros([BLOCK_N, BLOCK_D], wide)
        for k in range(K):
            b_g = tl.load(p_grad_pooled + (i_bag * K + k) * D + i_d, mask=m_d, other=0)  # [BLOCK_D]
            b_towards += tl.where(i_k[None, :] == k, tl.sum(b_x * b_g[None, :], axis=1)[:, None], 0)
            if TILES:
                b_grad += tl.sum(tl.where(i_k[None, :] == k, b_share, 0), axis=1)[:, None] * b_g[None, :]
        if TILES:
            at_x = i_n[:, None] * D + i_d[None, :]
            tl.store(p_grad_tiles + at_x, b_grad.to(p_grad_tiles.dtype.element_ty), mask=m_x)

    b_constant = tl.load(p_constant + i_bag * K + i_k, mask=m_k, other=0)[None, :]
    b_entropy = tl.load(p_grad_entropy + i_bag * K + i_k, mask=m_k, other=0)[None, :]
    b_slope = tl.where(counts, b_share * (b_towards - b_constant - b_entropy * b_logs), 0)
    b_slope += tl.load(p_grad_scores + at, mask=inside, other=0)
    tl.store(p_slopes + at, b_slope, mask=inside)


@triton.jit
def _gate_kernel(
    p_gate, p_slopes, p_w, p_part, p_bias_part, N, H, K,
    GATED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """What goes into tanh and sigmoid is replaced by its gradient; this block's part of the gradients of w and biases."""
    i_block = tl.program_id(0).to(tl.int64)
    i_n = i_block * BLOCK_N + tl.arange(0, BLOCK_N)
    i_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_h = i_h < H
    mask = (i_n < N)[:, None] & m_h[None, :]  # [BLOCK_N, BLOCK_H]
    columns: tl.constexpr = 2 if GATED else 1

    p_v = p_gate + i_n[:, None] * (columns * H) + i_h[None, :]
    b_tanh = _tanh(tl.load(p_v, mask=mask, other=0))
    b_gate = b_tanh
    b_sigmoid = tl.full([BLOCK_N, BLOCK_H], 1, b_tanh.dtype)
    if GATED:
        b_sigmoid = _sigmoid(tl.load(p_v + H, mask=mask, other=0))
        b_gate = b_tanh * b_sigmoid
    b_back = tl.zeros([BLOCK_N, BLOCK_H], b_tanh.dtype)
    for k in range(K):
        b_slope = tl.load(p_slopes + i_n * K + k, mask=i_n < N, other=0)[:, None]
        b_back += b_slope * tl.load(p_w + k * H + i_h, mask=m_h, other=0)[None, :]
        tl.store(p_part + (i_block * K + k) * H + i_h, tl.sum(b_slope * b_gate, axis=0), mask=m_h)
    b_grad = b_back * (b_sigmoid - b_gate * b_tanh)  # rows beyond N have a slope of 0
    tl.store(p_v, b_grad, mask=mask)
    p_bias = p_bias_part + i_block * (columns * H) + i_h
    tl.store(p_bias, tl.sum(b_grad, axis=0), mask=m_h)
    if GATED:
        b_grad = b_back * (b_gate - b_gate * b_sigmoid)
        tl.store(p_v + H, b_grad, mask=mask)
        tl.store(p_bias + H, tl.sum(b_grad, axis=0), mask=m_h)


@operation("gated_pooling")
def _pool(
    tiles: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor, w: Tensor, w_bias: Tensor, mask: Tensor | None
) -> Results:
    """weight: [H or 2H, D], V above U; bias the same."""
    wide, narrow = _wide(tiles, weight), _narrow(tiles, weight)
    weight, bias, w, w_bias = _cast(weight, narrow), _cast(bias, wide), _cast(w, wide), _cast(w_bias, wide)
    offsets = _checked(offsets, tiles)
    results = _empty_results(tiles, offsets, w, wide)
    if usable(tiles):
        _pool_in_kernels(tiles, offsets, weight, bias, w, w_bias, mask, results)
    else:
        _pool_in_blocks(tiles, offsets.tolist(), weight, bias, w, w_bias, mask, results)
    return results


@_pool.register_fake
def _(tiles, offsets, weight, bias, w, w_bias, mask):
    return _empty_results(tiles, offsets, w, _wide(tiles, weight))


@operation("gated_pooling_backward")
def _pool_backward(
    grad_pooled: Tensor, grad_scores: Tensor, grad_entropy: Tensor, grad_log_sums: Tensor,
    tiles: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor, w: Tensor, mask: Tensor | None,
    pooled: Tensor, scores: Tensor, entropy: Tensor, log_sums: Tensor, wants_tiles: bool, wants_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of tiles, weight, bias, w and w_bias; those of tiles have no rows where they are not wanted."""
    wide, narrow = _wide(tiles, weight), _narrow(tiles, weight)
    weight, bias, w, offsets = _cast(weight, narrow), _cast(bias, wide), _cast(w, wide), _checked(offsets, tiles)
    grad_pooled, grad_scores = _cast(grad_pooled, wide), _cast(grad_scores, wide)
    grad_entropy, grad_log_sums = _cast(grad_entropy, wide), _cast(grad_log_sums, wide)
    # the slope of a score is attention · (gradient · tile - gradient · mean - the entropy's gradient · (ln a + entropy))
    constant = (grad_pooled * pooled).sum(2) + grad_entropy * entropy - grad_log_sums  # [bags, K]
    kernels = usable(tiles)
    bounds = [] if kernels else offsets.tolist()

    grad_tiles = tiles.new_empty(tiles.shape if wants_tiles else (0, tiles.shape[1]))
    grad_weight, grad_bias = torch.zeros_like(weight, dtype=wide), torch.zeros_like(bias)
    grad_w, slopes = torch.zeros_like(w), torch.empty_like(scores)
    if kernels:
        _slopes_in_kernel(
            tiles, offsets, mask, scores, log_sums, grad_pooled, constant, grad_entropy, grad_scores, slopes, grad_tiles
        )
    for start, end in _steps(tiles):
        block = tiles[start:end].to(narrow)
        if not kernels:
            x = block.to(wide)
            for bag, i, j in _parts(bounds, start, end):
                counts = None if mask is None else mask[i:j]
                share, logs = _shares(scores[i:j], log_sums[bag], counts)
                towards = x[i - start : j - start] @ grad_pooled[bag].T - constant[bag] - grad_entropy[bag] * logs
                slopes[i:j] = grad_scores[i:j] + _where(counts, share * towards, 0)
                if wants_tiles:
                    grad_tiles[i:j] = share @ grad_pooled[bag]
        gate = _product(block, weight.T, wide).add_(bias)  # [n, H or 2H]
        if kernels:
            _gate_gradient_in_kernel(gate, slopes[start:end], w, grad_w, grad_bias)
        else:
            _gate_gradient(gate, slopes[start:end], w, grad_w, grad_bias)
        if wants_weights:
            _add_product(grad_weight, gate.T, block)
        if wants_tiles:
            _add_product(grad_tiles[start:end], gate, weight)
    return grad_tiles, grad_weight, grad_bias, grad_w, slopes.sum(0)


@_pool_backward.register_fake
def _(
    grad_pooled, grad_scores, grad_entropy, grad_log_sums, tiles, offsets, weight, bias, w, mask,
    pooled, scores, entropy, log_sums, wants_tiles, wants_weights,
):  # fmt: skip
    wide = _wide(tiles, weight)
    return (
        tiles.new_empty(tiles.shape if wants_tiles else (0, tiles.shape[1])),
        *(torch.empty(like.shape, dtype=wide, device=tiles.device) for like in (weight, bias, w, w[:, 0])),
    )


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5], inputs[6], *output)
    ctx.types = [value.dtype for value in inputs[:6]]


def _backward(ctx, *gradients):
    wants = ctx.needs_input_grad
    found = _pool_backward(*gradients, *ctx.saved_tensors, wants[0], any(wants[2:4]))
    tiles, *weights = (value.to(dtype) for value, dtype in zip(found, [ctx.types[0], *ctx.types[2:]], strict=True))
    return (tiles if wants[0] else None, None, *weights, None)


_pool.register_autograd(_backward, setup_context=_setup)


def _pool_in_blocks(
    tiles: Tensor, bounds: list[int], weight: Tensor, bias: Tensor, w: Tensor, w_bias: Tensor, mask: Tensor | None,
    results: Results,
) -> None:  # fmt: skip
    """Plain torch, a block of tiles at a time: each is read once, and scored and pooled while it is in the cache."""
    pooled, scores, entropy, log_sums = results
    pooled.zero_()
    sums, tops = torch.zeros_like(entropy), torch.full_like(entropy, -torch.inf)  # [bags, K]
    for start, end in _steps(tiles):
        x = tiles[start:end].to(weight.dtype)
        gate = _product(x, weight.T, pooled.dtype).add_(bias)
        scores[start:end] = torch.addmm(w_bias, _activated(gate, w.shape[1])[0], w.T)
        x = x.to(pooled.dtype)
        for bag, i, j in _parts(bounds, start, end):
            logits = _where(None if mask is None else mask[i:j], scores[i:j], -torch.inf)
            top = torch.maximum(tops[bag], logits.amax(0))
            base = top.masked_fill(top == -torch.inf, 0)
            fade, share = torch.exp(tops[bag] - base), torch.exp(logits - base)
            pooled[bag] = torch.addmm(pooled[bag] * fade[:, None], share.T, x[i - start : j - start])
            sums[bag] = sums[bag] * fade + share.sum(0)
            tops[bag] = top
    pooled /= sums[:, :, None]  # 0 / 0 is NaN where no tile counted
    for bag, (start, end) in enumerate(itertools.pairwise(bounds)):
        counts = None if mask is None else mask[start:end]
        log_sums[bag] = torch.logsumexp(_where(counts, scores[start:end], -torch.inf), 0)
        share, logs = _shares(scores[start:end], log_sums[bag], counts)
        entropy[bag] = torch.where(sums[bag] > 0, -(share * logs).sum(0), torch.nan)


def _gate_gradient(gate: Tensor, slopes: Tensor, w: Tensor, grad_w: Tensor, grad_bias: Tensor) -> None:
    """What goes into tanh and sigmoid is replaced by its gradient; those of w and the biases are added to."""
    width = w.shape[1]
    product, sigmoid = _activated(gate, width)  # `gate` now holds tanh and sigmoid
    grad_w.addmm_(slopes.T, product)
    back, tanh = slopes @ w, gate[:, :width]  # [n, H]
    if sigmoid is None:
        torch.addcmul(back, back, product * tanh, value=-1, out=gate)
    else:
        torch.mul(back, torch.addcmul(sigmoid, product, tanh, value=-1), out=tanh)
        torch.mul(back, torch.addcmul(product, product, sigmoid, value=-1), out=sigmoid)
    grad_bias += gate.sum(0)


def _activated(gate: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
    """The gate's value, and its sigmoid; `gate` is overwritten with tanh and sigmoid."""
    tanh = gate[:, :width].tanh_()
    if gate.shape[1] == width:
        return tanh, None
    sigmoid = gate[:, width:].sigmoid_()
    return tanh * sigmoid, sigmoid


def _where(mask: Tensor | None, values: Tensor, other: float) -> Tensor:
    return values if mask is None else values.masked_fill(~mask, other)


def _shares(scores: Tensor, log_sum: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The attention of each tile and its logarithm, both 0 where a score does not count."""
    logs = scores - log_sum
    return _where(mask, torch.exp(logs), 0), _where(mask, logs, 0)


def _steps(tiles: Tensor) -> Iterator[tuple[int, int]]:
    step = TILES_AT_ONCE.get(tiles.device.type, TILES_AT_ONCE["cuda"])
    return ((start, min(start + step, len(tiles))) for start in range(0, len(tiles), step))


def _parts(bounds: Sequence[int], start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The bags that have tiles from start to end: the bag, its first and its last tile there."""
    for bag in range(bisect.bisect_right(bounds, start) - 1, len(bounds) - 1):
        if bounds[bag] >= end:
            return
        i, j = max(start, bounds[bag]), min(end, bounds[bag + 1])
        if i < j:
            yield bag, i, j


def _product(left: Tensor, right: Tensor, wide: torch.dtype) -> Tensor:
    """left @ right in their own type, summed in the wide one where the machine can."""
    if left.dtype == wide:
        return left @ right
    return torch.mm(left, right, out_dtype=wide) if left.is_cuda else (left @ right).to(wide)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in the type of right."""
    if total.dtype == left.dtype == right.dtype:
        total.addmm_(left, right)
    elif left.dtype == right.dtype:
        total += left @ right
    elif right.dtype != torch.float16:
        total += _product(left.to(right.dtype), right, left.dtype)
    else:
        # attention over 200,000 tiles has gradients near 1e-8, below what fp16 can say
        scale = left.abs().amax().clamp(min=torch.finfo(left.dtype).tiny)
        total += _product((left / scale).half(), right, left.dtype) * scale


def _pool_in_kernels(
    tiles: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor, w: Tensor, w_bias: Tensor, mask: Tensor | None,
    results: Results,
) -> None:  # fmt: skip
    pooled, scores, entropy, log_sums = results
    (K, H), D, bags = w.shape, tiles.shape[1], len(pooled)
    if not bags:
        return
    sizes = _block_sizes(tiles, H, K)
    plan, first = _plan(offsets, len(tiles), sizes["BLOCK_N"])
    blocks = plan.shape[1]
    part = torch.empty((blocks, K, D), dtype=pooled.dtype, device=tiles.device)
    tops, sums, logs = torch.empty((3, blocks, K), dtype=pooled.dtype, device=tiles.device)
    _forward_kernel[(blocks,)](
        tiles, plan, weight, bias, w, w_bias, plan if mask is None else mask.to(torch.uint8).contiguous(),
        scores, part, tops, sums, logs, blocks, D, H, K, *tiles.stride(),
        GATED=len(weight) > H, MASKED=mask is not None, **sizes, num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    _combine_kernel[(bags * K, triton.cdiv(D, 64))](
        first,
        part,
        tops,
        sums,
        logs,
        pooled,
        entropy,
        log_sums,
        D,
        K,
        BLOCK_B=32,
        BLOCK_D=64,
        enable_fp_fusion=True,
    )


def _slopes_in_kernel(
    tiles: Tensor, offsets: Tensor, mask: Tensor | None, scores: Tensor, log_sums: Tensor, grad_pooled: Tensor,
    constant: Tensor, grad_entropy: Tensor, grad_scores: Tensor, slopes: Tensor, grad_tiles: Tensor,
) -> None:  # fmt: skip
    K, D = scores.shape[1], tiles.shape[1]
    if not len(constant):
        return
    sizes = {**_block_sizes(tiles, 1, K), "BLOCK_N": 32}
    del sizes["BLOCK_H"]
    plan, _ = _plan(offsets, len(tiles), sizes["BLOCK_N"])
    _slopes_kernel[(plan.shape[1],)](
        tiles, plan, plan if mask is None else mask.to(torch.uint8).contiguous(), scores, log_sums, grad_pooled,
        constant, grad_entropy, grad_scores, slopes, grad_tiles, plan.shape[1], D, K, *tiles.stride(),
        MASKED=mask is not None, TILES=len(grad_tiles) > 0, **sizes, enable_fp_fusion=True,
    )  # fmt: skip


def _gate_gradient_in_kernel(gate: Tensor, slopes: Tensor, w: Tensor, grad_w: Tensor, grad_bias: Tensor) -> None:
    (K, H), rows = w.shape, 64
    blocks = triton.cdiv(len(gate), rows)
    part = torch.empty((blocks, K, H), dtype=gate.dtype, device=gate.device)
    bias_part = torch.empty((blocks, gate.shape[1]), dtype=gate.dtype, device=gate.device)
    _gate_kernel[(blocks, triton.cdiv(H, 32))](
        gate,
        slopes,
        w,
        part,
        bias_part,
        len(gate),
        H,
        K,
        GATED=gate.shape[1] > H,
        BLOCK_N=rows,
        BLOCK_H=32,
        enable_fp_fusion=True,
    )
    grad_w += part.sum(0)
    grad_bias += bias_part.sum(0)


def _block_sizes(tiles: Tensor, H: int, K: int) -> dict[str, int]:
    """128 x 128 is what Hopper's matrix units want; a small bag needs more programs than that gives."""
    rows = 128 if len(tiles) >= 16384 else 64 if len(tiles) >= 1024 else 16
    if tiles.element_size() > 2:
        rows = min(rows, 64)
    return {
        "BLOCK_N": rows,
        "BLOCK_H": min(128 if tiles.element_size() < 4 else 64, max(16, triton.next_power_of_2(H))),
        "BLOCK_D": min(64 if tiles.element_size() < 4 else 32, max(16, triton.next_power_of_2(tiles.shape[1]))),
        "BLOCK_K": triton.next_power_of_2(K),
    }


def _plan(offsets: Tensor, N: int, rows: int) -> tuple[Tensor, Tensor]:
    """Bag, first tile and number of tiles of each block, [3, blocks]; the first block of each bag, [bags + 1].

    Bags are cut on the device, without asking it how large they are: the grid is as long as it may have to be.
    """
    bags = len(offsets) - 1
    first = torch.nn.functional.pad(torch.cumsum((offsets.diff() + rows - 1) // rows, 0), (1, 0))
    block = torch.arange(triton.cdiv(N, rows) + bags, device=offsets.device)
    bag = torch.searchsorted(first[1:].contiguous(), block, right=True).clamp(max=bags - 1)
    start = offsets[bag] + (block - first[bag]) * rows
    count = (offsets[bag + 1].clamp(max=N) - start).clamp(0, rows)  # never beyond the tiles, whatever the offsets say
    return torch.stack([bag, start, count]), first


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype).contiguous()


def _wide(tiles: Tensor, weight: Tensor) -> torch.dtype:
    """What sums are kept in."""
    return torch.promote_types(torch.promote_types(tiles.dtype, weight.dtype), torch.float32)


def _narrow(tiles: Tensor, weight: Tensor) -> torch.dtype:
    """What matrix products are taken in. Few processors multiply fp16."""
    dtype = torch.promote_types(tiles.dtype, weight.dtype)
    return torch.float32 if dtype == torch.float16 and tiles.device.type == "cpu" else dtype


def _empty_results(tiles: Tensor, offsets: Tensor, w: Tensor, wide: torch.dtype) -> Results:
    bags, K, D = offsets.shape[0] - 1, w.shape[0], tiles.shape[1]
    shapes = (bags, K, D), (tiles.shape[0], K), (bags, K), (bags, K)
    pooled, scores, entropy, log_sums = (torch.empty(shape, dtype=wide, device=tiles.device) for shape in shapes)
    return pooled, scores, entropy, log_sums


def _checked(offsets: Tensor, tiles: Tensor) -> Tensor:
    """Offsets beside the tiles. On the CPU their values are looked at; a GPU would have to stop for it."""
    if offsets.device.type == "cpu":
        bounds = offsets.tolist()
        if bounds[0] != 0 or bounds[-1] != len(tiles) or any(a > b for a, b in itertools.pairwise(bounds)):
            raise ValueError(
                f"The offsets run from {bounds[0]} to {bounds[-1]} over {len(tiles)} tiles; they must start at 0, never "
                "fall, and end at the number of tiles. Make them as the cumulative sum of the bags' sizes."
            )
    return offsets.to(tiles.device, torch.int64).contiguous()


def fused(
    tiles: Tensor,
    offsets: Tensor,
    v: Tensor,
    v_bias: Tensor | None,
    u: Tensor | None,
    u_bias: Tensor | None,
    w: Tensor,
    w_bias: Tensor | None,
    mask: Tensor | None = None,
) -> Results:
    """What `reference` does, each tile read once forward and twice backward, no gate kept."""
    weight, bias, w_bias = _stacked(tiles, offsets, v, v_bias, u, u_bias, w, w_bias, mask)
    return _pool(tiles, offsets, weight, bias, w, w_bias, mask)


def attention(scores: Tensor, log_sums: Tensor, offsets: Tensor, mask: Tensor | None = None) -> Tensor:
    """The attention [N, K] of each tile in its bag, from two results of `fused` and its mask; it carries gradients."""
    bag = _bag_of_tiles(offsets, scores)
    return torch.exp(_where(mask, scores, -torch.inf) - log_sums[bag])


@torch.no_grad()
def top_tiles(
    scores: Tensor, log_sums: Tensor, offsets: Tensor, count: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The `count` highest-scored tiles of each bag and branch, best first, the earlier of two equal ones before the other:
    their rows in `tiles` and their attention, both [bags, K, count]; -1 and 0 where a bag has fewer that count. Without
    gradients: gather `scores` at the rows where those are wanted.
    """
    bag = _bag_of_tiles(offsets, scores)  # [N]
    offsets = offsets.to(scores.device)
    counts = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    by_score = torch.argsort(_where(mask, scores, -torch.inf), dim=0, descending=True, stable=True)  # [N, K]
    # a second stable sort brings those that count to the front of their bag, still ordered by score
    key = bag[by_score] * 2 + ~counts.gather(0, by_score)
    order = by_score.gather(0, torch.argsort(key, dim=0, stable=True))

    many = torch.nn.functional.pad(torch.cumsum(counts, 0), (0, 0, 1, 0))[offsets].diff(dim=0)  # [bags, K] that count
    rank = torch.arange(count, device=scores.device)
    found = rank < many[:, :, None]  # [bags, K, count]
    place = torch.where(found, offsets[:-1, None, None] + rank, 0).movedim(1, 2)  # [bags, count, K]
    if not scores.shape[0]:
        return torch.full(found.shape, -1, device=scores.device), scores.new_zeros(found.shape)
    rows = order.gather(0, place.flatten(0, 1)).view(place.shape)
    shares = torch.exp(scores.gather(0, rows.flatten(0, 1)).view(place.shape) - log_sums[:, None])
    return torch.where(found, rows.movedim(1, 2), -1), torch.where(found, shares.movedim(1, 2), 0)


def _bag_of_tiles(offsets: Tensor, scores: Tensor) -> Tensor:
    rows = torch.arange(scores.shape[0], device=scores.device)
    return torch.searchsorted(offsets[1:].to(rows).contiguous(), rows, right=True)


def _stacked(
    tiles: Tensor, offsets: Tensor, v: Tensor, v_bias: Tensor | None, u: Tensor | None, u_bias: Tensor | None, w: Tensor,
    w_bias: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Checked, V above U and their biases, so that one product makes both halves of the gate; zeros for a bias of None."""
    _check(tiles, offsets, v, v_bias, u, u_bias, w, w_bias, mask)
    v_bias = v.new_zeros(v.shape[0]) if v_bias is None else v_bias
    w_bias = w.new_zeros(w.shape[0]) if w_bias is None else w_bias
    if u is None:
        return v, v_bias, w_bias
    return torch.cat([v, u]), torch.cat([v_bias, u.new_zeros(u.shape[0]) if u_bias is None else u_bias]), w_bias


def _check(tiles, offsets, v, v_bias, u, u_bias, w, w_bias, mask) -> None:
    """A kernel trusts its shapes: a wrong one reads memory that is not its own."""
    if tiles.ndim != 2 or offsets.ndim != 1 or offsets.shape[0] < 1 or offsets.is_floating_point():
        raise ValueError(
            f"Tiles {tuple(tiles.shape)} with offsets {tuple(offsets.shape)} of {offsets.dtype}; needed are tiles [N, D] and "
            "integer offsets [bags + 1]. Put the bags one after the other and give where each begins and the last ends."
        )
    if v.ndim != 2 or w.ndim != 2 or v.shape[1] != tiles.shape[1] or w.shape[1] != v.shape[0]:
        raise ValueError(
            f"v is {tuple(v.shape)} and w {tuple(w.shape)} for tiles {tuple(tiles.shape)}; needed are v [hidden, features] "
            "and w [branches, hidden]. Give the weights as torch.nn.Linear keeps them."
        )
    if u is None and u_bias is not None:
        raise ValueError("A bias u_bias was given without u; it belongs to the gate. Give u, or neither.")
    if u is not None and u.shape != v.shape:
        raise ValueError(
            f"u is {tuple(u.shape)}; the gate needs the shape of v, {tuple(v.shape)}. Give both the same width."
        )
    for name, bias, rows in (("v_bias", v_bias, v), ("u_bias", u_bias, v), ("w_bias", w_bias, w)):
        if bias is not None and bias.shape != rows.shape[:1]:
            raise ValueError(
                f"{name} is {tuple(bias.shape)}; needed is one number per row, {tuple(rows.shape[:1])}. Give None for no bias."
            )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (tiles.shape[0], w.shape[0])):
        raise ValueError(
            f"The mask is {tuple(mask.shape)} of {mask.dtype}; needed are booleans [tiles, branches], "
            f"{(tiles.shape[0], w.shape[0])}. Say True where a score counts."
        )
    present = [value for value in (v, v_bias, u, u_bias, w, w_bias, mask) if value is not None]
    if any(value.device != tiles.device for value in present):
        raise ValueError(
            f"The tiles lie on {tiles.device}, other arguments on {sorted({str(value.device) for value in present})}; all but "
            "the offsets must lie on one device. Move them there first."
        )


EXAMPLES = [
    dict(bags=(37, 1, 20), features=40, hidden=20, branches=2, masked=True),  # bags of more and of less than one block
    dict(bags=(35,), features=70, hidden=33, branches=1),  # more than one block in every direction
    dict(bags=(5, 23), features=17, hidden=9, branches=3, gated=False),
    dict(bags=(1,), features=1, hidden=1, branches=1, biased=False),  # one of everything
    dict(bags=(1, 1, 2), features=3, hidden=70, branches=5),  # as many branches as ACMIL has
    dict(bags=(18, 2), features=6, hidden=5, branches=2, masked=True, gated=False, biased=False),
    dict(bags=(), features=4, hidden=3, branches=2),  # no bag
]


def sample(
    *,
    dtype: torch.dtype,
    device: str,
    bags: tuple[int, ...],
    features: int,
    hidden: int,
    branches: int,
    masked: bool = False,
    gated: bool = True,
    biased: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Arguments for one example; the first tile of each bag always counts."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=random, dtype=torch.float64) * scale
        return values.to(device, dtype).requires_grad_()

    offsets = torch.tensor([0, *itertools.accumulate(bags)])
    tiles = draw(sum(bags), features)
    v, u, w = draw(hidden, features, scale=features**-0.5), draw(hidden, features, scale=features**-0.5), None
    w = draw(branches, hidden, scale=hidden**-0.5)
    v_bias, u_bias, w_bias = (draw(n) for n in (hidden, hidden, branches))
    mask = torch.rand(sum(bags), branches, generator=random) > 0.3
    mask[offsets[:-1]] = True
    return (
        tiles, offsets.to(device), v, v_bias if biased else None, u if gated else None,
        u_bias if gated and biased else None, w, w_bias if biased else None, mask.to(device) if masked else None,
    )  # fmt: skip
