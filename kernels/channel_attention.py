"""Every channel looks at every other through what they share over all of space.

    out = gamma · softmax(scale · X Xᵀ) X + x,    X = x as [B, C, N]

x: [B, C, *space], any float, N = the product of space; gamma: one number. scale is −1 in DANet and the networks after
it, whose softmax(max(E) − E) lets the least similar channels count most; +1 is the published formula; X Xᵀ grows with
N, so ±1/√N keeps the softmax from choosing one channel alone. X Xᵀ and the softmax are float32 (float64 for float64):
a hundred thousand terms do not fit half precision. The result has the type of x and lies in memory as x does; where
space is no single run of even steps (a permuted x), x is copied first.

X Xᵀ is summed in parts of N, and the parts in a fixed order: the same arguments give the same bits. Backward keeps the
[B, C, C] shares. N is read twice forward, twice each for x and the gradient backward, and no [B, C, N] lies between.
"""

from typing import Any

import torch
from torch import Tensor

from ._library import operation
from ._triton import tl, triton, usable


def reference(x: Tensor, gamma: Tensor, scale: float = -1.0) -> Tensor:
    """The formula as it stands."""
    _check(x, gamma)
    channels = x.flatten(2)  # [B, C, N]
    shares = torch.softmax(scale * (channels @ channels.mT), dim=-1)  # [B, C, C]
    return (gamma.reshape(()) * (shares @ channels) + channels).to(x.dtype).reshape(x.shape)


@triton.jit
def _load(p, i_row, i_column, m_row, m_column, stride_row, stride_column):
    """[row, column], zeros where there is nothing."""
    at = (i_row * stride_row)[:, None] + (i_column * stride_column)[None, :]
    return tl.load(p + at, mask=m_row[:, None] & m_column[None, :], other=0.0)


@triton.jit
def _products_kernel(
    p_left, p_right, p_parts, N, parts, span,
    stride_lb, stride_lc, stride_ln, stride_rb, stride_rc, stride_rn,
    C: tl.constexpr, SUMS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Left · rightᵀ over one part of N, one block of channels against another."""
    TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    i_program = tl.program_id(0)
    i_row = i_program % TILES * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    i_column = i_program // TILES % TILES * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    i_part = i_program // TILES // TILES % parts
    i_b = (i_program // TILES // TILES // parts).to(tl.int64)
    p_left += i_b * stride_lb
    p_right += i_b * stride_rb
    begin = i_part.to(tl.int64) * span
    end = tl.minimum(begin + span, N)

    b_sum = tl.zeros([BLOCK_C, BLOCK_C], SUMS)
    for start in range(0, span, BLOCK_N):
        i_n = begin + start + tl.arange(0, BLOCK_N).to(tl.int64)
        b_left = _load(p_left, i_row, i_n, i_row < C, i_n < end, stride_lc, stride_ln)  # [BLOCK_C, BLOCK_N]
        b_right = _load(p_right, i_n, i_column, i_n < end, i_column < C, stride_rn, stride_rc)  # [BLOCK_N, BLOCK_C]
        b_sum = tl.dot(b_left, b_right, b_sum, input_precision="ieee")
    p_parts += (i_b * parts + i_part) * C * C
    at = i_row[:, None] * C + i_column[None, :]
    tl.store(p_parts + at, b_sum, mask=(i_row < C)[:, None] & (i_column < C)[None, :])


@triton.jit
def _shares_kernel(
    p_parts, p_shares, parts, SCALE: tl.constexpr, C: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr
):
    """One row of the softmax, from the parts of its sum."""
    i_b = (tl.program_id(0) // C).to(tl.int64)
    i_row = tl.program_id(0) % C
    i_column = tl.arange(0, BLOCK)
    p_parts += i_b * parts * C * C + i_row * C
    b_sum = tl.zeros([BLOCK], SUMS)
    for _ in range(0, parts):
        b_sum += tl.load(p_parts + i_column, mask=i_column < C, other=0.0)
        p_parts += C * C
    b_sum = tl.where(i_column < C, b_sum * SCALE, float("-inf"))
    b_share = tl.exp(b_sum - tl.max(b_sum, 0))
    b_share = b_share / tl.sum(b_share, 0)
    tl.store(p_shares + (i_b * C + i_row) * C + i_column, b_share, mask=i_column < C)


@triton.jit
def _shares_backward_kernel(
    p_parts, p_shares, p_gamma, p_changes, p_shared, parts,
    SCALE: tl.constexpr, C: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of the gradient of X Xᵀ, from the parts of gradient · Xᵀ; and the row's share of the gradient of gamma."""
    i_b = (tl.program_id(0) // C).to(tl.int64)
    i_row = tl.program_id(0) % C
    i_column = tl.arange(0, BLOCK)
    p_parts += i_b * parts * C * C + i_row * C
    b_sum = tl.zeros([BLOCK], SUMS)
    for _ in range(0, parts):
        b_sum += tl.load(p_parts + i_column, mask=i_column < C, other=0.0)
        p_parts += C * C
    at = (i_b * C + i_row) * C + i_column
    b_share = tl.load(p_shares + at, mask=i_column < C, other=0.0)
    b_shared = tl.sum(b_share * b_sum, 0)
    b_change = b_share * (b_sum - b_shared) * (tl.load(p_gamma).to(SUMS) * SCALE)
    tl.store(p_changes + at, b_change, mask=i_column < C)
    tl.store(p_shared + i_b * C + i_row, b_shared)


@triton.jit
def _apply_kernel(
    p_x, p_shares, p_gamma, p_out, N, stride_xb, stride_xc, stride_xn, stride_ob, stride_oc, stride_on,
    C: tl.constexpr, SUMS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """gamma · shares X + x, for one block of channels and places."""
    TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    i_program = tl.program_id(0)
    i_row = i_program % TILES * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    i_n = (i_program // TILES % tl.cdiv(N, BLOCK_N)).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    i_b = (i_program // TILES // tl.cdiv(N, BLOCK_N)).to(tl.int64)
    p_x += i_b * stride_xb
    p_shares += i_b * C * C

    b_out = tl.zeros([BLOCK_C, BLOCK_N], SUMS)
    for start in range(0, C, BLOCK_C):
        i_c = start + tl.arange(0, BLOCK_C).to(tl.int64)
        b_x = _load(p_x, i_c, i_n, i_c < C, i_n < N, stride_xc, stride_xn)  # [BLOCK_C, BLOCK_N]
        b_share = _load(p_shares, i_row, i_c, i_row < C, i_c < C, C, 1)  # [BLOCK_C, BLOCK_C]
        b_out = tl.dot(b_share.to(b_x.dtype), b_x, b_out, input_precision="ieee")
    b_x = _load(p_x, i_row, i_n, i_row < C, i_n < N, stride_xc, stride_xn)
    b_out = b_out * tl.load(p_gamma).to(SUMS) + b_x.to(SUMS)
    p_out += i_b * stride_ob
    at = (i_row * stride_oc)[:, None] + (i_n * stride_on)[None, :]
    tl.store(p_out + at, b_out.to(p_out.dtype.element_ty), mask=(i_row < C)[:, None] & (i_n < N)[None, :])


@triton.jit
def _apply_backward_kernel(
    p_gradient, p_x, p_shares, p_changes, p_gamma, p_dx, N,
    stride_gb, stride_gc, stride_gn, stride_xb, stride_xc, stride_xn, stride_db, stride_dc, stride_dn,
    C: tl.constexpr, SUMS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """gradient + gamma · sharesᵀ gradient + (changes + changesᵀ) X, for one block of channels and places."""
    TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    i_program = tl.program_id(0)
    i_row = i_program % TILES * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    i_n = (i_program // TILES % tl.cdiv(N, BLOCK_N)).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    i_b = (i_program // TILES // tl.cdiv(N, BLOCK_N)).to(tl.int64)
    p_gradient += i_b * stride_gb
    p_x += i_b * stride_xb
    p_shares += i_b * C * C
    p_changes += i_b * C * C

    b_gamma = tl.load(p_gamma).to(SUMS)
    b_dx = tl.zeros([BLOCK_C, BLOCK_N], SUMS)
    for start in range(0, C, BLOCK_C):
        i_c = start + tl.arange(0, BLOCK_C).to(tl.int64)
        b_g = _load(p_gradient, i_c, i_n, i_c < C, i_n < N, stride_gc, stride_gn)  # [BLOCK_C, BLOCK_N]
        b_share = _load(p_shares, i_row, i_c, i_row < C, i_c < C, 1, C) * b_gamma  # [BLOCK_C, BLOCK_C], transposed
        b_dx = tl.dot(b_share.to(b_g.dtype), b_g, b_dx, input_precision="ieee")
        b_x = _load(p_x, i_c, i_n, i_c < C, i_n < N, stride_xc, stride_xn)
        b_change = _load(p_changes, i_row, i_c, i_row < C, i_c < C, C, 1)
        b_change += _load(p_changes, i_row, i_c, i_row < C, i_c < C, 1, C)
        if b_x.dtype == tl.float16:
            # sums over N overflow float16; tf32 has its precision with float32's range, and holds x exactly
            b_dx = tl.dot(b_change, b_x.to(tl.float32), b_dx, input_precision="tf32")
        else:
            b_dx = tl.dot(b_change.to(b_x.dtype), b_x, b_dx, input_precision="ieee")
    b_dx += _load(p_gradient, i_row, i_n, i_row < C, i_n < N, stride_gc, stride_gn).to(SUMS)
    p_dx += i_b * stride_db
    at = (i_row * stride_dc)[:, None] + (i_n * stride_dn)[None, :]
    tl.store(p_dx + at, b_dx.to(p_dx.dtype.element_ty), mask=(i_row < C)[:, None] & (i_n < N)[None, :])


@operation("channel_attention")
def _attend(x: Tensor, gamma: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The result, and the shares that backward needs."""
    out, shares = _empty_results(x)
    if not usable(x):
        wide = x.to(shares.dtype)
        torch.baddbmm(shares, wide, wide.mT, beta=0, alpha=scale, out=shares)
        torch.softmax(shares, dim=-1, out=shares)
        # the residual is what the matrix product adds to
        sums = out if out.dtype == wide.dtype else torch.empty_like(wide)
        torch.baddbmm(wide, shares * gamma, wide, out=sums)
        if sums is not out:
            out.copy_(sums)
    elif out.numel():
        B, C, N = x.shape
        block_c, block_n, options = _blocks(x, applied=True)
        parts = _products(x, x)
        _shares_kernel[(B * C,)](
            parts, shares, parts.shape[1],
            SCALE=scale, C=C, SUMS=_sums(x), BLOCK=triton.next_power_of_2(C), enable_fp_fusion=True,
        )  # fmt: skip
        _apply_kernel[(B * triton.cdiv(N, block_n) * triton.cdiv(C, block_c),)](
            x, shares, gamma, out, N, *x.stride(), *out.stride(),
            C=C, SUMS=_sums(x), BLOCK_C=block_c, BLOCK_N=block_n, **options,
        )  # fmt: skip
    return out, shares


@_attend.register_fake
def _(x, gamma, scale):
    return _empty_results(x)


@operation("channel_attention_backward")
def _attend_backward(gradient: Tensor, x: Tensor, gamma: Tensor, shares: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The gradients of x and gamma."""
    dx = torch.empty_like(x)
    if not usable(x):
        wide, wide_gradient = x.to(shares.dtype), gradient.to(shares.dtype)
        products = torch.bmm(wide_gradient, wide.mT)  # [B, C, C]
        shared = (shares * products).sum(-1, keepdim=True)
        changes = shares * (products - shared) * (gamma * scale)
        sums = dx if dx.dtype == wide.dtype else torch.empty_like(wide)
        torch.baddbmm(wide_gradient, (shares * gamma).mT, wide_gradient, out=sums)
        sums.baddbmm_(changes + changes.mT, wide)
        if sums is not dx:
            dx.copy_(sums)
    else:
        B, C, N = x.shape
        shared = torch.zeros(B, C, dtype=shares.dtype, device=x.device)
        if x.numel():
            block_c, block_n, options = _blocks(x, applied=True)
            parts, changes = _products(gradient, x), torch.empty_like(shares)
            _shares_backward_kernel[(B * C,)](
                parts, shares, gamma, changes, shared, parts.shape[1],
                SCALE=scale, C=C, SUMS=_sums(x), BLOCK=triton.next_power_of_2(C), enable_fp_fusion=True,
            )  # fmt: skip
            _apply_backward_kernel[(B * triton.cdiv(N, block_n) * triton.cdiv(C, block_c),)](
                gradient, x, shares, changes, gamma, dx, N, *gradient.stride(), *x.stride(), *dx.stride(),
                C=C, SUMS=_sums(x), BLOCK_C=block_c, BLOCK_N=block_n, **options,
            )  # fmt: skip
    return dx, shared.sum().to(gamma.dtype)


@_attend_backward.register_fake
def _(gradient, x, gamma, shares, scale):
    return torch.empty_like(x), torch.empty_like(gamma)


def _setup(ctx, inputs, output) -> None:
    x, gamma, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, gamma, output[1])


def _backward(ctx, gradient, _):
    dx, dgamma = _attend_backward(gradient, *ctx.saved_tensors, ctx.scale)
    return dx, dgamma, None


_attend.register_autograd(_backward, setup_context=_setup)


def _empty_results(x: Tensor) -> tuple[Tensor, Tensor]:
    B, C, _ = x.shape
    precise = torch.promote_types(x.dtype, torch.float32)
    return torch.empty_like(x), torch.empty((B, C, C), dtype=precise, device=x.device)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Left · rightᵀ as parts that are still to be summed: [B, part, C, C]."""
    B, C, N = right.shape
    block_c, block_n, options = _blocks(right)
    tiles = triton.cdiv(C, block_c) ** 2
    # two programs for each of an H200's 132 processors, but no more parts than are small beside what they sum
    span = max(4 * C, triton.cdiv(B * tiles * N, 2 * 132))
    span = triton.cdiv(span, block_n) * block_n
    parts = torch.empty(
        (B, triton.cdiv(N, span), C, C), dtype=torch.promote_types(right.dtype, torch.float32), device=right.device
    )
    _products_kernel[(B * parts.shape[1] * tiles,)](
        left, right, parts, N, parts.shape[1], span, *left.stride(), *right.stride(),
        C=C, SUMS=_sums(right), BLOCK_C=block_c, BLOCK_N=block_n, **options,
    )  # fmt: skip
    return parts


def _blocks(x: Tensor, applied: bool = False) -> tuple[int, int, dict[str, Any]]:
    """Channels and places that a program has, and how it is compiled. On sm_90 no block spills registers, and all fit
    into shared memory: shares are float32, so the blocks of channels to which they are applied are smaller."""
    longest_c, block_n, stages = {2: (64, 128, 2) if applied else (128, 64, 3), 4: (64, 32, 2)}.get(
        x.element_size(), (32, 32, 2)
    )
    block_c = min(longest_c, max(16, triton.next_power_of_2(x.shape[1])))
    return block_c, block_n, dict(num_warps=8 if block_c > 32 else 4, num_stages=stages, enable_fp_fusion=True)


def _sums(x: Tensor):
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def fused(x: Tensor, gamma: Tensor, scale: float = -1.0) -> Tensor:
    """What `reference` does, with the softmax, the residual and the sums of its gradient in the matrix products."""
    _check(x, gamma)
    return _attend(x.flatten(2), gamma.reshape(()), float(scale))[0].reshape(x.shape)


def _check(x: Tensor, gamma: Tensor) -> None:
    """A kernel trusts its shapes: a wrong one reads memory that is not its own."""
    if x.ndim < 3 or gamma.numel() != 1:
        raise ValueError(
            f"x {tuple(x.shape)} and gamma {tuple(gamma.shape)} were given; x needs [batch, channel, *space], gamma one "
            "number. Give space an axis, and multiply by other weights afterwards."
        )
    if not (x.is_floating_point() and gamma.is_floating_point()):
        raise ValueError(f"x is {x.dtype}, gamma {gamma.dtype}; both need a float. Convert them first.")
    if x.device != gamma.device:
        raise ValueError(
            f"x lies on {x.device}, gamma on {gamma.device}; both need one device. Move gamma there first."
        )


EXAMPLES = [
    dict(batch=2, channels=5, space=(7, 11), scale=-0.2),  # nothing divides
    dict(batch=1, channels=40, space=(3, 5, 7), scale=-0.1),  # more channels than a block has
    dict(batch=2, channels=16, space=(8, 40), scale=0.05),  # several parts of space
    dict(batch=1, channels=3, space=(9,)),  # the least similar channel takes nearly all
    dict(batch=2, channels=1, space=(2, 3), scale=1.0),  # one channel
    dict(batch=1, channels=4, space=(1, 1)),  # one place
    dict(batch=2, channels=3, space=(0, 4)),  # no place
    dict(batch=0, channels=3, space=(4,)),  # no batch
]


def sample(
    *, dtype: torch.dtype, device: str, batch: int, channels: int, space: tuple[int, ...], scale: float = -1.0
) -> tuple[Tensor, Tensor, float]:
    """Arguments for one example; x and gamma carry a gradient."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, *space, generator=random, dtype=torch.float64)
    gamma = torch.randn((), generator=random, dtype=torch.float64)
    return x.to(device, dtype).requires_grad_(), gamma.to(device, dtype).requires_grad_(), scale
