"""Instance norm with scale, shift, residual and leaky ReLU, in two passes over the volume.

    y[b, c, n] = leaky((x[b, c, n] - mean[b, c]) · weight[c] / sqrt(variance[b, c] + eps) + bias[c] + residual[b, c, n])

x, residual: [B, C, *space], any float, any strides; weight, bias: [C], or None for one and zero; y: as x, channels last
where x's channels lie side by side. Mean and biased variance are taken over space in float32 (float64 for float64), of
centred values: a mean far from zero costs no digits. A slope of 1 is no activation, 0 is a ReLU. One voxel becomes its
shift. Kept for backward: x, and y where a residual was added; without one the side of the activation is computed again.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from ._library import operation
from ._triton import tl, triton, usable


def reference(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    slope: float = 1.0,
    eps: float = 1e-5,
) -> Tensor:
    """The norm, what is added to it, and the activation, one after the other."""
    _check(x, weight, bias, residual, slope)
    precise, space, per_channel = _sums(x), tuple(range(2, x.ndim)), (-1, *[1] * (x.ndim - 2))
    y = x.to(precise)
    y = y - y.mean(space, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(space, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(precise).view(per_channel)
    if bias is not None:
        y = y + bias.to(precise).view(per_channel)
    if residual is not None:
        y = y + residual.to(x.dtype).to(precise)
    return functional.leaky_relu(y, slope).to(x.dtype)


@triton.jit
def _place(C, splits, BLOCK_C: tl.constexpr):
    """Which share of the voxels, sample and channels this program has."""
    i_program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(C, BLOCK_C)
    i_block = i_program // splits
    i_c = (i_block % blocks) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)  # [BLOCK_C]
    return i_program % splits, i_block // blocks, i_c


@triton.jit
def _statistics_kernel(
    p_x, p_mean, p_square, C, N, steps, splits, stride_b, stride_c, stride_n,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_split, i_b, i_c = _place(C, splits, BLOCK_C)
    exact = p_mean.dtype.element_ty
    lane = i_split * steps * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)  # [BLOCK_N]
    m_c = i_c < C
    b_mean = tl.zeros((BLOCK_N, BLOCK_C), exact)
    b_square = tl.zeros((BLOCK_N, BLOCK_C), exact)
    seen = tl.zeros((1, 1), exact)
    # Welford's update, a mean for each lane: lanes meet once, behind the loop
    for step in range(steps):
        i_n = lane + step * BLOCK_N
        mask = (i_n < N)[:, None] & m_c[None, :]
        at = i_b * stride_b + i_n[:, None] * stride_n + i_c[None, :] * stride_c
        b_x = tl.load(p_x + at, mask=mask, other=0).to(exact)  # [BLOCK_N, BLOCK_C]
        apart = tl.where(mask, b_x - b_mean, 0.0)
        seen += 1.0
        b_mean += apart / seen
        b_square += apart * tl.where(mask, b_x - b_mean, 0.0)

    count = tl.minimum(tl.maximum((N - lane + BLOCK_N - 1) // BLOCK_N, 0), steps).to(exact)  # [BLOCK_N]
    total = tl.maximum(tl.sum(count, 0), 1.0)
    mean = tl.sum(b_mean * count[:, None], 0) / total  # [BLOCK_C]
    apart = b_mean - mean[None, :]
    square = tl.sum(b_square + apart * apart * count[:, None], 0)
    at = (i_b * splits + i_split) * C + i_c
    tl.store(p_mean + at, mean, mask=m_c)
    tl.store(p_square + at, square, mask=m_c)


@triton.jit
def _combine_kernel(
    p_means, p_squares, p_mean, p_scale, C, N, share, splits,
    EPS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One mean and one over the standard deviation, of the means and squares of all shares."""
    _, i_b, i_c = _place(C, 1, BLOCK_C)
    exact = p_mean.dtype.element_ty
    m_c = i_c < C
    mean = tl.zeros((BLOCK_C,), exact)
    for first in range(0, splits, BLOCK_S):
        i_s = first + tl.arange(0, BLOCK_S).to(tl.int64)  # [BLOCK_S]
        at = (i_b * splits + i_s[:, None]) * C + i_c[None, :]
        b_mean = tl.load(p_means + at, mask=(i_s < splits)[:, None] & m_c[None, :], other=0)
        count = tl.minimum(tl.maximum(N - i_s * share, 0), share).to(exact)
        mean += tl.sum(b_mean * count[:, None], 0)
    mean = mean / tl.full((1,), N, exact)
    square = tl.zeros((BLOCK_C,), exact)
    for first in range(0, splits, BLOCK_S):
        i_s = first + tl.arange(0, BLOCK_S).to(tl.int64)
        at = (i_b * splits + i_s[:, None]) * C + i_c[None, :]
        mask = (i_s < splits)[:, None] & m_c[None, :]
        apart = tl.load(p_means + at, mask=mask, other=0) - mean[None, :]
        count = tl.minimum(tl.maximum(N - i_s * share, 0), share).to(exact)
        square += tl.sum(tl.load(p_squares + at, mask=mask, other=0) + apart * apart * count[:, None], 0)
    tl.store(p_mean + i_b * C + i_c, mean, mask=m_c)
    tl.store(p_scale + i_b * C + i_c, 1.0 / tl.sqrt(square / tl.full((1,), N, exact) + EPS), mask=m_c)


@triton.jit
def _apply_kernel(
    p_x, p_residual, p_y, p_weight, p_bias, p_mean, p_scale, C, N, steps, splits,
    stride_xb, stride_xc, stride_xn, stride_rb, stride_rc, stride_rn, stride_yb, stride_yc, stride_yn,
    ADDS: tl.constexpr, SLOPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_split, i_b, i_c = _place(C, splits, BLOCK_C)
    exact = p_mean.dtype.element_ty
    m_c = i_c < C
    mean = tl.load(p_mean + i_b * C + i_c, mask=m_c, other=0)[None, :]
    scale = tl.load(p_scale + i_b * C + i_c, mask=m_c, other=0)
    gain = (scale * tl.load(p_weight + i_c, mask=m_c, other=0).to(exact))[None, :]
    shift = tl.load(p_bias + i_c, mask=m_c, other=0).to(exact)[None, :]
    for step in range(steps):
        i_n = (i_split * steps + step) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (i_n < N)[:, None] & m_c[None, :]
        at = i_b * stride_xb + i_n[:, None] * stride_xn + i_c[None, :] * stride_xc
        b_y = (tl.load(p_x + at, mask=mask, other=0).to(exact) - mean) * gain + shift  # [BLOCK_N, BLOCK_C]
        if ADDS:
            at = i_b * stride_rb + i_n[:, None] * stride_rn + i_c[None, :] * stride_rc
            b_y += tl.load(p_residual + at, mask=mask, other=0).to(exact)
        if SLOPE != 1.0:
            b_y = tl.where(b_y > 0, b_y, b_y * SLOPE)
        at = i_b * stride_yb + i_n[:, None] * stride_yn + i_c[None, :] * stride_yc
        tl.store(p_y + at, b_y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def _sums_kernel(
    p_slope, p_x, p_y, p_added, p_weight, p_bias, p_mean, p_scale, p_total, p_along, C, N, steps, splits,
    stride_gb, stride_gc, stride_gn, stride_xb, stride_xc, stride_xn,
    stride_yb, stride_yc, stride_yn, stride_rb, stride_rc, stride_rn,
    ADDS: tl.constexpr, SLOPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient behind the activation, written where it is the residual's; its sum, and its sum along the norm."""
    i_split, i_b, i_c = _place(C, splits, BLOCK_C)
    exact = p_mean.dtype.element_ty
    m_c = i_c < C
    mean = tl.load(p_mean + i_b * C + i_c, mask=m_c, other=0)[None, :]
    scale = tl.load(p_scale + i_b * C + i_c, mask=m_c, other=0)
    gain = (scale * tl.load(p_weight + i_c, mask=m_c, other=0).to(exact))[None, :]
    shift = tl.load(p_bias + i_c, mask=m_c, other=0).to(exact)[None, :]
    b_total = tl.zeros((BLOCK_N, BLOCK_C), exact)
    b_along = tl.zeros((BLOCK_N, BLOCK_C), exact)
    for step in range(steps):
        i_n = (i_split * steps + step) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (i_n < N)[:, None] & m_c[None, :]
        at = i_b * stride_xb + i_n[:, None] * stride_xn + i_c[None, :] * stride_xc
        apart = tl.load(p_x + at, mask=mask, other=0).to(exact) - mean
        at = i_b * stride_gb + i_n[:, None] * stride_gn + i_c[None, :] * stride_gc
        b_slope = tl.load(p_slope + at, mask=mask, other=0).to(exact)  # [BLOCK_N, BLOCK_C]
        if ADDS:
            if SLOPE != 1.0:
                at = i_b * stride_yb + i_n[:, None] * stride_yn + i_c[None, :] * stride_yc
                b_slope = tl.where(tl.load(p_y + at, mask=mask, other=0) > 0, b_slope, b_slope * SLOPE)
            at = i_b * stride_rb + i_n[:, None] * stride_rn + i_c[None, :] * stride_rc
            tl.store(p_added + at, b_slope.to(p_added.dtype.element_ty), mask=mask)
        elif SLOPE != 1.0:
            b_slope = tl.where(apart * gain + shift > 0, b_slope, b_slope * SLOPE)
        b_total += b_slope
        b_along += b_slope * apart
    at = (i_b * splits + i_split) * C + i_c
    tl.store(p_total + at, tl.sum(b_total, 0), mask=m_c)
    tl.store(p_along + at, tl.sum(b_along, 0) * scale, mask=m_c)


@triton.jit
def _gradient_kernel(
    p_slope, p_x, p_back, p_weight, p_bias, p_mean, p_scale, p_total, p_along, C, N, steps, splits,
    stride_gb, stride_gc, stride_gn, stride_xb, stride_xc, stride_xn, stride_db, stride_dc, stride_dn,
    SLOPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_split, i_b, i_c = _place(C, splits, BLOCK_C)
    exact = p_mean.dtype.element_ty
    m_c = i_c < C
    mean = tl.load(p_mean + i_b * C + i_c, mask=m_c, other=0)[None, :]
    scale = tl.load(p_scale + i_b * C + i_c, mask=m_c, other=0)
    gain = (scale * tl.load(p_weight + i_c, mask=m_c, other=0).to(exact))[None, :]
    shift = tl.load(p_bias + i_c, mask=m_c, other=0).to(exact)[None, :]
    voxels = tl.full((1,), N, exact)
    level = (tl.load(p_total + i_b * C + i_c, mask=m_c, other=0) / voxels)[None, :]
    pull = (tl.load(p_along + i_b * C + i_c, mask=m_c, other=0) * scale / voxels)[None, :]
    for step in range(steps):
        i_n = (i_split * steps + step) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (i_n < N)[:, None] & m_c[None, :]
        at = i_b * stride_xb + i_n[:, None] * stride_xn + i_c[None, :] * stride_xc
        apart = tl.load(p_x + at, mask=mask, other=0).to(exact) - mean
        at = i_b * stride_gb + i_n[:, None] * stride_gn + i_c[None, :] * stride_gc
        b_slope = tl.load(p_slope + at, mask=mask, other=0).to(exact)  # [BLOCK_N, BLOCK_C]
        if SLOPE != 1.0:
            b_slope = tl.where(apart * gain + shift > 0, b_slope, b_slope * SLOPE)
        b_back = gain * (b_slope - level - apart * pull)
        at = i_b * stride_db + i_n[:, None] * stride_dn + i_c[None, :] * stride_dc
        tl.store(p_back + at, b_back.to(p_back.dtype.element_ty), mask=mask)


@operation("instance_norm")
def _normalise(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, slope: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and of each sample and channel the mean and one over the standard deviation."""
    if not x.numel():
        mean, scale = (torch.zeros(x.shape[:2], dtype=_sums(x), device=x.device) for _ in "12")
        return _made_like(x), mean, scale
    run = _launch_forward if usable(x) else _row_forward if _torchs(x, residual) else _tile_forward
    exact = weight.to(_sums(x)).contiguous(), bias.to(_sums(x)).contiguous()
    return run(x, *exact, residual, slope, eps)


@_normalise.register_fake
def _(x, weight, bias, residual, slope, eps):
    return _made_like(x), *(torch.empty(x.shape[:2], dtype=_sums(x), device=x.device) for _ in "12")


@operation("instance_norm_backward")
def _differentiate(
    gradient: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    scale: Tensor,
    adds: bool,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What flows to x, to the residual (empty if there was none), to weight and to bias."""
    if not x.numel():
        return (
            _made_like(x),
            _made_like(x) if adds else x.new_empty(0),
            torch.zeros_like(weight),
            torch.zeros_like(bias),
        )
    run = _launch_backward if usable(x) else _tile_backward if _last(x) else _row_backward
    exact = weight.to(mean.dtype).contiguous(), bias.to(mean.dtype).contiguous()
    back, added, along, total = run(gradient, x, y, *exact, mean, scale, adds, slope)
    return back, added if adds else x.new_empty(0), along.to(weight.dtype), total.to(bias.dtype)


@_differentiate.register_fake
def _(gradient, x, y, weight, bias, mean, scale, adds, slope):
    added = _made_like(x) if adds else x.new_empty(0)
    return _made_like(x), added, torch.empty_like(weight), torch.empty_like(bias)


def _setup(ctx, inputs, output) -> None:
    x, weight, bias, residual, ctx.slope, _ = inputs
    y, mean, scale = output
    ctx.mark_non_differentiable(mean, scale)
    ctx.adds = residual is not None
    ctx.save_for_backward(x, y if ctx.adds and ctx.slope != 1 else None, weight, bias, mean, scale)


def _backward(ctx, gradient, *_):
    back, added, weight, bias = _differentiate(gradient, *ctx.saved_tensors, ctx.adds, ctx.slope)
    return back, weight, bias, added if ctx.adds else None, None, None


_normalise.register_autograd(_backward, setup_context=_setup)


FUSED = {"enable_fp_fusion": True}


def _launch_forward(x, weight, bias, residual, slope: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    result = _made_like(x)
    x, y, other = _flat(x), _flat(result), _flat(x if residual is None else residual)
    steps, splits, programs, blocks = _shares(x)
    mean, scale = (torch.empty(x.shape[:2], dtype=_sums(x), device=x.device) for _ in "12")
    means, squares = (torch.empty(len(x), splits, x.shape[1], dtype=_sums(x), device=x.device) for _ in "12")
    _statistics_kernel[(programs,)](x, means, squares, *x.shape[1:], steps, splits, *x.stride(), **blocks, **FUSED)
    share = steps * blocks["BLOCK_N"]
    _combine_kernel[(programs // splits,)](
        means,
        squares,
        mean,
        scale,
        *x.shape[1:],
        share,
        splits,
        EPS=eps,
        BLOCK_S=32,
        BLOCK_C=blocks["BLOCK_C"],
        **FUSED,
    )
    _apply_kernel[(programs,)](
        x, other, y, weight, bias, mean, scale, *x.shape[1:], steps, splits, *x.stride(), *other.stride(), *y.stride(),
        ADDS=residual is not None, SLOPE=slope, **blocks, **FUSED,
    )  # fmt: skip
    return result, mean, scale


def _launch_backward(
    gradient, x, y, weight, bias, mean, scale, adds: bool, slope: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    result, added = _made_like(x), _made_like(x) if adds else x
    gradient, x, y, slopes, back = (_flat(value) for value in (gradient, x, x if y is None else y, added, result))
    steps, splits, programs, blocks = _shares(x)
    totals, alongs = (torch.empty(len(x), splits, x.shape[1], dtype=mean.dtype, device=x.device) for _ in "12")
    _sums_kernel[(programs,)](
        gradient, x, y, slopes, weight, bias, mean, scale, totals, alongs, *x.shape[1:], steps, splits,
        *gradient.stride(), *x.stride(), *y.stride(), *slopes.stride(), ADDS=adds, SLOPE=slope, **blocks, **FUSED,
    )  # fmt: skip
    total, along = totals.sum(1), alongs.sum(1)  # [B, C]
    source = slopes if adds else gradient
    _gradient_kernel[(programs,)](
        source, x, back, weight, bias, mean, scale, total, along, *x.shape[1:], steps, splits,
        *source.stride(), *x.stride(), *back.stride(), SLOPE=1.0 if adds else slope, **blocks, **FUSED,
    )  # fmt: skip
    return result, added, along.sum(0), total.sum(0)


PROGRAMS = 2048
"""At most about so many at once, each with as many blocks as that leaves it: 15 for each multiprocessor of an H200."""


def _shares(x: Tensor) -> tuple[int, int, int, dict[str, int]]:
    """How many blocks a program takes, programs a channel block has and there are, and what a block is: widest along
    channels where they lie side by side, else along space."""
    B, C, N = x.shape
    block_n = 2048 // min(triton.next_power_of_2(C), 64) if x.stride(1) == 1 else min(triton.next_power_of_2(N), 2048)
    block_c = min(triton.next_power_of_2(C), 2048 // block_n)
    groups, tiles = B * triton.cdiv(C, block_c), triton.cdiv(N, block_n)
    steps = triton.cdiv(tiles, max(1, PROGRAMS // groups))
    splits = triton.cdiv(tiles, steps)
    return steps, splits, splits * groups, dict(BLOCK_N=block_n, BLOCK_C=block_c)


def _torchs(x: Tensor, residual: Tensor | None) -> bool:
    """Whether torch's group norm of single channels is as good: where each channel lies in one piece. Where channels are
    last it sums squares that are not centred, which half precision does not feel, and is slow below 1024 voxels."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    return not _last(x) or (half and residual is None and math.prod(x.shape[2:]) >= 1024)


def _row_forward(x, weight, bias, residual, slope: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """On a CPU, in one go."""
    B, C, N = _counts(x)
    values = x.contiguous(memory_format=_order(x))
    if residual is not None:
        values = values.to(weight.dtype)  # a sum is rounded once
    y, mean, scale = torch.native_group_norm(values, weight, bias, B, C, N, C, eps)
    if residual is not None:
        y += residual
    return (y if slope == 1 else functional.leaky_relu_(y, slope)).to(x.dtype), mean, scale


def _row_backward(
    gradient, x, y, weight, bias, mean, scale, adds: bool, slope: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, C, N = _counts(x)
    x, slopes = x.contiguous(), gradient.contiguous()
    if slope != 1:
        gain = weight * scale
        side = y if y is not None else _scaled(x.view(B, C, N), gain, bias - gain * mean).view(x.shape)
        slopes = torch.ops.aten.leaky_relu_backward(slopes, side, slope, False)
    back, along, total = torch.ops.aten.native_group_norm_backward(
        slopes, x, mean, scale, weight, B, C, N, C, [True, True, True]
    )
    return back, slopes.clone() if adds and slope == 1 else slopes, along, total


def _counts(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], math.prod(x.shape[2:])


def _scaled(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    return (x * gain[..., None]).add_(shift[..., None]).to(x.dtype)


TILE = 1 << 20
"""Values of a tile on a CPU: four megabytes, so that the next line finds them in the cache, and few enough calls."""
ROW = 256
"""Voxels are taken side by side until a row is about as long: torch is slow along short ones."""


def _tile_forward(x, weight, bias, residual, slope: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """On a CPU where channels are last, a tile after the other: there torch's group norm sums squares off the mean, and
    its instance norm sorts the memory anew."""
    y, beside = _made_like(x), _beside(x)
    mean, variance = _statistics(_voxels(x), beside)
    scale = variance.add_(eps).rsqrt_()
    gain = weight * scale  # [B, C]
    gains, shifts = _row(gain, beside), _row(torch.addcmul(bias, gain, mean, value=-1), beside)
    for values, target, *others in _tiles(beside, x, y, *(() if residual is None else (residual,))):
        direct = target if target.dtype == mean.dtype else None
        values = torch.addcmul(shifts, values.to(mean.dtype), gains, out=direct)
        for other in others:
            values += other
        if slope != 1:
            functional.leaky_relu_(values, slope)
        if direct is None:
            target.copy_(values)
    return y, mean, scale


def _statistics(x: Tensor, beside: int) -> tuple[Tensor, Tensor]:
    """Mean and variance [B, C]: of each tile in two passes while it is in the cache, then of all tiles, alike in size."""
    B, N, C = x.shape
    rows, row = N // beside, beside * C
    least = -(-rows * row // TILE)
    tiles = next((n for n in range(least, 4 * least) if rows % n == 0), 1)
    running = (None, None) if x.dtype == _sums(x) else torch.zeros(2, row).unbind()  # half is summed in their precision
    found = [
        torch.batch_norm_update_stats(tile.T[None, :, :, None], running[0], running[1], 1.0)
        for tile in x.reshape(B * tiles, rows // tiles, row).unbind()
    ]
    means, variances = (torch.stack(values).view(B, -1, C) for values in zip(*found, strict=True))
    mean = means.mean(1)
    apart = means - mean[:, None]
    return mean, variances.addcmul_(apart, apart).mean(1)


def _tile_backward(
    gradient, x, y, weight, bias, mean, scale, adds: bool, slope: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    exact, N, beside = mean.dtype, math.prod(x.shape[2:]), _beside(x)
    back = _made_like(x)
    # what flows behind the activation waits where x's gradient will be
    kept = _made_like(x) if adds else back if slope != 1 else gradient
    gain = weight * scale  # [B, C]
    center, gains, shifts = (_row(value, beside) for value in (mean, gain, bias - gain * mean))
    totals, alongs = [], []
    for values, slopes, side, target in _tiles(beside, x, gradient, x if y is None else y, kept):
        if slope != 1:
            side = torch.addcmul(shifts, values.to(exact), gains).to(slopes.dtype) if y is None else side
            slopes = torch.ops.aten.leaky_relu_backward.grad_input(slopes, side, slope, False, grad_input=target)
            del side  # gone before the next is made
        elif adds:
            target.copy_(slopes)
        totals.append(slopes.sum(1, dtype=exact))
        alongs.append((values - center).mul_(slopes).sum(1))
    total, along = (torch.stack(sums).sum(0).view(len(x), beside, -1).sum(1) for sums in (totals, alongs))  # [B, C]
    along *= scale
    pull = (gain * scale).mul_(along).mul_(-1 / N)
    rest = (gain * total).mul_(-1 / N).addcmul_(pull, mean, value=-1)
    pulls, rests = (_row(value, beside) for value in (pull, rest))
    for values, slopes, target in _tiles(beside, x, kept, back):
        values = torch.addcmul(rests, values.to(exact), pulls)
        if target.dtype == exact:
            torch.addcmul(values, slopes, gains, out=target)
        else:
            target.copy_(values.addcmul_(slopes.to(exact), gains))
    return back, kept, along.sum(0), total.sum(0)


def _beside(x: Tensor) -> int:
    """How many voxels make a row: as many as divide their number."""
    voxels = math.prod(x.shape[2:])
    return next(count for count in range(max(1, min(voxels, ROW // x.shape[1])), 0, -1) if voxels % count == 0)


def _row(of_channels: Tensor, beside: int) -> Tensor:
    """[B, C] -> [B, 1, row]"""
    return of_channels[:, None, None].expand(-1, 1, beside, -1).reshape(len(of_channels), 1, -1)


def _voxels(x: Tensor) -> Tensor:
    """[B, C, *space] -> [B, N, C], a view of whatever is evenly spaced."""
    return x.movedim(1, -1).reshape(len(x), math.prod(x.shape[2:]), x.shape[1])


def _tiles(beside: int, *volumes: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """[B, some rows, row] of every volume, one tile after the other; where a volume's memory lies otherwise, a copy."""
    B, C = volumes[0].shape[:2]
    few = max(1, TILE // (B * beside * C)) * beside
    cut = ((tile.reshape(B, -1, beside * C) for tile in _voxels(volume).split(few, 1)) for volume in volumes)
    return zip(*cut, strict=True)


def fused(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    slope: float = 1.0,
    eps: float = 1e-5,
) -> Tensor:
    """What `reference` does, in two passes forward and two backward."""
    _check(x, weight, bias, residual, slope)
    # a traced network runs where nobody has heard of our operations
    if torch.jit.is_tracing() or not (usable(x) or x.device.type == "cpu"):
        return reference(x, weight, bias, residual, slope, eps)
    weight = torch.ones(x.shape[1], dtype=_sums(x), device=x.device) if weight is None else weight
    bias = torch.zeros(x.shape[1], dtype=_sums(x), device=x.device) if bias is None else bias
    residual = None if residual is None else residual.to(x.dtype)
    return _normalise(x, weight, bias, residual, float(slope), float(eps))[0]


def _sums(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _last(x: Tensor) -> bool:
    return x.ndim in FORMATS and x.shape[1] > 1 and x.stride(1) == 1


FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
"""By the number of axes: torch knows no others."""


def _order(x: Tensor) -> torch.memory_format:
    return FORMATS[x.ndim] if _last(x) else torch.contiguous_format


def _made_like(x: Tensor) -> Tensor:
    """A new tensor of that shape, without gaps, its channels last if x has them there."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_order(x))


def _flat(x: Tensor) -> Tensor:
    """[B, C, N], a view unless steps along space are uneven: to count those for each voxel would cost the kernel more."""
    voxels = math.prod(x.shape[2:])
    if _last(x):
        return x.movedim(1, -1).reshape(len(x), voxels, x.shape[1]).mT
    return x.reshape(*x.shape[:2], voxels)


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, slope: float) -> None:
    """A kernel trusts its shapes: a wrong one reads memory that is not its own."""
    if x.ndim < 3 or not x.is_floating_point():
        raise ValueError(
            f"A tensor {tuple(x.shape)} of {x.dtype} was given; instance norm needs floats [B, C, *space] with one axis "
            "of space or more. Add the axes that are missing."
        )
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and (value.shape != (x.shape[1],) or value.device != x.device):
            raise ValueError(
                f"A {name} {tuple(value.shape)} on {value.device} was given for {x.shape[1]} channels on {x.device}; it "
                "needs one number per channel, there. Make the norm for as many channels and move it along."
            )
    if residual is not None and (residual.shape != x.shape or residual.device != x.device):
        raise ValueError(
            f"A residual {tuple(residual.shape)} on {residual.device} was given for {tuple(x.shape)} on {x.device}; "
            "both must be alike. Bring it to that shape first."
        )
    if not slope >= 0:
        raise ValueError(
            f"A slope of {slope} was given; a leaky ReLU whose result tells its sign needs 0 or more. Pass 1 for none."
        )


EXAMPLES = [
    dict(shape=(2, 3, 7, 9, 11), residual=True, slope=0.01),
    dict(shape=(2, 5, 7, 9, 11), slope=0.01, last=True),
    dict(shape=(1, 2, 13, 13, 15), last=True, residual=True, slope=0.2),
    dict(shape=(1, 2, 37, 59), slope=0.0),  # a ReLU over a picture, more than a block
    dict(shape=(1, 70, 3, 2), last=True),  # more channels than a block, no activation
    dict(shape=(1, 4, 1, 1, 1), affine=False, residual=True),  # one voxel
    dict(shape=(0, 3, 4, 5, 6), slope=0.01),  # no sample
    dict(shape=(2, 3, 0, 5), residual=True, slope=0.01),  # no voxel
]


def sample(
    *,
    dtype: torch.dtype,
    device: str,
    shape: tuple[int, ...],
    residual: bool = False,
    slope: float = 1.0,
    affine: bool = True,
    last: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, float]:
    """Arguments for one example: means off zero, scales of either sign."""
    random = torch.Generator().manual_seed(3)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(device, dtype)

    x = 0.5 + 2 * draw(shape)
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    weight, bias = (draw(shape[1:2]) for _ in "12")
    added = draw(shape).requires_grad_() if residual else None
    return (x.requires_grad_(), *((weight.requires_grad_(), bias.requires_grad_()) if affine else (None, None)), added, slope)  # fmt: skip
