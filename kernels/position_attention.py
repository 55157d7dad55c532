"""Every token looks at every other, and the map of who looks at whom never exists.

    out = gamma · softmax(scale · q kᵀ) v + x

q: [*batch, N, d]; k: [*batch, M, d]; v: [*batch, M, c]; x: [*batch, N, c] or None; gamma: one number, or None for 1.
Any float; scores, sums and the softmax are float32 (float64 for float64). The result has the type of x, or else of v.
Queries, keys and values of several types meet in the widest. Where there are no keys, out = x.

Tokens come first, width last, but memory may lie otherwise: `map.flatten(2).mT` makes tokens of [B, C, *space] without
a copy, and the result and the gradients lie in memory as x, q, k and v do. Heads, or the rows of an image for attention
along one axis, are one more batch axis.

Forward keeps one number a query, the logarithm of its row's sum, and A v where gamma needs it; backward makes the
scores again, tile by tile. Memory grows with N + M. Sums run in a fixed order: the same arguments give the same bits.
"""

from typing import Any

import torch
from torch import Tensor

from ._library import operation
from ._triton import tl, triton, usable


def reference(
    q: Tensor, k: Tensor, v: Tensor, gamma: Tensor | None = None, x: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """The usual code, map and all."""
    _check(q, k, v, gamma, x)
    q, k, v = _in_one_type(q, k, v)
    result = torch.softmax(scale * (q @ k.mT), dim=-1) @ v  # [*batch, N, c]
    result = result if gamma is None else result * gamma.reshape(())
    result = result if x is None else result + x
    return result.to(v.dtype if x is None else x.dtype)


@triton.jit
def _load(p, i_row, i_column, m_row, m_column, stride_row, stride_column):
    """[row, column], zeros where there is nothing."""
    at = (i_row * stride_row)[:, None] + (i_column * stride_column)[None, :]
    return tl.load(p + at, mask=m_row[:, None] & m_column[None, :], other=0.0)


@triton.jit
def _store(p, b_values, i_row, i_column, m_row, m_column, stride_row, stride_column):
    at = (i_row * stride_row)[:, None] + (i_column * stride_column)[None, :]
    tl.store(p + at, b_values.to(p.dtype.element_ty), mask=m_row[:, None] & m_column[None, :])


@triton.jit
def _place(length, heads, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Which tokens of which batch and head, and which part of the width, this program has."""
    i_program = tl.program_id(0)  # one axis: the others end at 65,535, and rows of images are more
    i_part = i_program % PARTS
    i_block = i_program // PARTS % tl.cdiv(length, BLOCK)
    i_batch = (i_program // PARTS // tl.cdiv(length, BLOCK)).to(tl.int64)
    i_token = i_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    return i_token, i_part, i_batch, i_batch // heads, i_batch % heads


@triton.jit
def _forward_kernel(
    p_q, p_k, p_v, p_gamma, p_x, p_out, p_kept, p_sum, N, M, heads,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_km, stride_kd,
    stride_vb, stride_vh, stride_vm, stride_vc, stride_xb, stride_xh, stride_xn, stride_xc,
    stride_ob, stride_oh, stride_on, stride_oc,
    SCALE: tl.constexpr, D: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One block of queries over all keys; each program has one part of the values' width."""
    i_n, i_part, i_batch, i_b, i_h = _place(N, heads, BLOCK_N, (C + BLOCK_C - 1) // BLOCK_C)
    i_d = tl.arange(0, BLOCK_D).to(tl.int64)
    i_c = i_part * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    p_q += i_b * stride_qb + i_h * stride_qh
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh

    b_q = _load(p_q, i_n, i_d, i_n < N, i_d < D, stride_qn, stride_qd)  # [BLOCK_N, BLOCK_D]
    b_max = tl.full([BLOCK_N], float("-inf"), SUMS)
    b_sum = tl.zeros([BLOCK_N], SUMS)
    b_out = tl.zeros([BLOCK_N, BLOCK_C], SUMS)
    for start in range(0, M, BLOCK_M):
        i_m = start + tl.arange(0, BLOCK_M).to(tl.int64)
        b_k = _load(p_k, i_d, i_m, i_d < D, i_m < M, stride_kd, stride_km)  # [BLOCK_D, BLOCK_M]
        b_s = tl.dot(b_q, b_k, input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        for i in range(1, (D + BLOCK_D - 1) // BLOCK_D):
            i_e = i * BLOCK_D + i_d
            b_more = _load(p_q, i_n, i_e, i_n < N, i_e < D, stride_qn, stride_qd)
            b_k = _load(p_k, i_e, i_m, i_e < D, i_m < M, stride_kd, stride_km)
            b_s = tl.dot(b_more, b_k, b_s, input_precision="ieee")
        b_s = b_s * (SCALE * 1.4426950408889634)  # log2(e): powers of two are what the chip has
        if not EVEN:
            b_s = tl.where((i_m < M)[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None])
        b_shrink = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
        b_v = _load(p_v, i_m, i_c, i_m < M, i_c < C, stride_vm, stride_vc)  # [BLOCK_M, BLOCK_C]
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_shrink[:, None], input_precision="ieee")
        b_max = b_new

    b_sum = tl.where(b_sum == 0, 1, b_sum)  # no keys at all
    b_out = b_out / b_sum[:, None]
    if p_sum is not None:
        tl.store(p_sum + i_batch * N + i_n, b_max + tl.log2(b_sum), mask=i_n < N)  # every part says the same
    if p_kept is not None:
        _store(p_kept + i_batch * N * C, b_out, i_n, i_c, i_n < N, i_c < C, C, 1)
    if p_gamma is not None:
        b_out = b_out * tl.load(p_gamma).to(SUMS)
    if p_x is not None:
        p_x += i_b * stride_xb + i_h * stride_xh
        b_out += _load(p_x, i_n, i_c, i_n < N, i_c < C, stride_xn, stride_xc).to(SUMS)
    p_out += i_b * stride_ob + i_h * stride_oh
    _store(p_out, b_out, i_n, i_c, i_n < N, i_c < C, stride_on, stride_oc)


@triton.jit
def _queries_kernel(
    p_gradient, p_q, p_k, p_v, p_gamma, p_kept, p_sum, p_delta, p_dq, N, M, heads,
    stride_gb, stride_gh, stride_gn, stride_gc, stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_km, stride_kd, stride_vb, stride_vh, stride_vm, stride_vc,
    stride_ob, stride_oh, stride_on, stride_oc, stride_db, stride_dh, stride_dn, stride_dd,
    SCALE: tl.constexpr, D: tl.constexpr, C: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of queries, and delta, what each query's gradient and result have in common."""
    i_n, i_part, i_batch, i_b, i_h = _place(N, heads, BLOCK_N, (D + BLOCK_D - 1) // BLOCK_D)
    i_d = tl.arange(0, BLOCK_D).to(tl.int64)
    i_c = tl.arange(0, BLOCK_C).to(tl.int64)
    i_own = i_part * BLOCK_D + i_d
    p_gradient += i_b * stride_gb + i_h * stride_gh
    p_q += i_b * stride_qb + i_h * stride_qh
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    p_kept += i_b * stride_ob + i_h * stride_oh

    b_delta = tl.zeros([BLOCK_N], SUMS)
    for i in range(0, (C + BLOCK_C - 1) // BLOCK_C):
        i_e = i * BLOCK_C + i_c
        b_g = _load(p_gradient, i_n, i_e, i_n < N, i_e < C, stride_gn, stride_gc).to(SUMS)
        b_delta += tl.sum(b_g * _load(p_kept, i_n, i_e, i_n < N, i_e < C, stride_on, stride_oc).to(SUMS), 1)
    tl.store(p_delta + i_batch * N + i_n, b_delta, mask=i_n < N)  # every part says the same

    b_q = _load(p_q, i_n, i_d, i_n < N, i_d < D, stride_qn, stride_qd)  # [BLOCK_N, BLOCK_D]
    b_g = _load(p_gradient, i_n, i_c, i_n < N, i_c < C, stride_gn, stride_gc)  # [BLOCK_N, BLOCK_C]
    b_g = b_g.to(p_v.dtype.element_ty)
    b_sum = tl.load(p_sum + i_batch * N + i_n, mask=i_n < N, other=float("inf"))
    b_dq = tl.zeros([BLOCK_N, BLOCK_D], SUMS)
    for start in range(0, M, BLOCK_M):
        i_m = start + tl.arange(0, BLOCK_M).to(tl.int64)
        b_k = _load(p_k, i_d, i_m, i_d < D, i_m < M, stride_kd, stride_km)  # [BLOCK_D, BLOCK_M]
        b_s = tl.dot(b_q, b_k, input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        for i in range(1, (D + BLOCK_D - 1) // BLOCK_D):
            i_e = i * BLOCK_D + i_d
            b_more = _load(p_q, i_n, i_e, i_n < N, i_e < D, stride_qn, stride_qd)
            b_other = _load(p_k, i_e, i_m, i_e < D, i_m < M, stride_kd, stride_km)
            b_s = tl.dot(b_more, b_other, b_s, input_precision="ieee")
        b_p = tl.exp2(b_s * (SCALE * 1.4426950408889634) - b_sum[:, None])
        b_v = _load(p_v, i_c, i_m, i_c < C, i_m < M, stride_vc, stride_vm)  # [BLOCK_C, BLOCK_M]
        b_dp = tl.dot(b_g, b_v, input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        for i in range(1, (C + BLOCK_C - 1) // BLOCK_C):
            i_e = i * BLOCK_C + i_c
            b_more = _load(p_gradient, i_n, i_e, i_n < N, i_e < C, stride_gn, stride_gc).to(b_v.dtype)
            b_v = _load(p_v, i_e, i_m, i_e < C, i_m < M, stride_vc, stride_vm)
            b_dp = tl.dot(b_more, b_v, b_dp, input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[:, None])
        if D > BLOCK_D:
            b_k = _load(p_k, i_own, i_m, i_own < D, i_m < M, stride_kd, stride_km)
        # keys that do not exist are zeros here: nothing to mask
        b_dq = tl.dot(b_ds.to(b_k.dtype), tl.trans(b_k), b_dq, input_precision="ieee")
    b_dq = b_dq * SCALE
    if p_gamma is not None:
        b_dq = b_dq * tl.load(p_gamma).to(SUMS)
    p_dq += i_b * stride_db + i_h * stride_dh
    _store(p_dq, b_dq, i_n, i_own, i_n < N, i_own < D, stride_dn, stride_dd)


@triton.jit
def _keys_kernel(
    p_gradient, p_q, p_k, p_v, p_gamma, p_sum, p_delta, p_dk, p_dv, N, M, heads,
    stride_gb, stride_gh, stride_gn, stride_gc, stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_km, stride_kd, stride_vb, stride_vh, stride_vm, stride_vc,
    stride_db, stride_dh, stride_dm, stride_dd, stride_eb, stride_eh, stride_em, stride_ec,
    SCALE: tl.constexpr, D: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradients of one block of keys and values, over all queries; everything lies transposed: [key, query]."""
    i_m, i_part, i_batch, i_b, i_h = _place(M, heads, BLOCK_M, PARTS)
    i_d = tl.arange(0, BLOCK_D).to(tl.int64)
    i_c = tl.arange(0, BLOCK_C).to(tl.int64)
    i_own_d = i_part * BLOCK_D + i_d
    i_own_c = i_part * BLOCK_C + i_c
    p_gradient += i_b * stride_gb + i_h * stride_gh
    p_q += i_b * stride_qb + i_h * stride_qh
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh

    b_k = _load(p_k, i_m, i_d, i_m < M, i_d < D, stride_km, stride_kd)  # [BLOCK_M, BLOCK_D]
    b_v = _load(p_v, i_m, i_c, i_m < M, i_c < C, stride_vm, stride_vc)  # [BLOCK_M, BLOCK_C]
    b_dk = tl.zeros([BLOCK_M, BLOCK_D], SUMS)
    b_dv = tl.zeros([BLOCK_M, BLOCK_C], SUMS)
    for start in range(0, N, BLOCK_N):
        i_n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        b_q = _load(p_q, i_d, i_n, i_d < D, i_n < N, stride_qd, stride_qn)  # [BLOCK_D, BLOCK_N]
        b_s = tl.dot(b_k, b_q, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        for i in range(1, (D + BLOCK_D - 1) // BLOCK_D):
            i_e = i * BLOCK_D + i_d
            b_more = _load(p_k, i_m, i_e, i_m < M, i_e < D, stride_km, stride_kd)
            b_other = _load(p_q, i_e, i_n, i_e < D, i_n < N, stride_qd, stride_qn)
            b_s = tl.dot(b_more, b_other, b_s, input_precision="ieee")
        # a query that does not exist has an infinite sum, and so a share of zero in everything
        b_sum = tl.load(p_sum + i_batch * N + i_n, mask=i_n < N, other=float("inf"))
        b_delta = tl.load(p_delta + i_batch * N + i_n, mask=i_n < N, other=0.0)
        b_p = tl.exp2(b_s * (SCALE * 1.4426950408889634) - b_sum[None, :])
        b_g = _load(p_gradient, i_n, i_c, i_n < N, i_c < C, stride_gn, stride_gc).to(b_v.dtype)  # [BLOCK_N, BLOCK_C]
        b_dp = tl.dot(b_v, tl.trans(b_g), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        for i in range(1, (C + BLOCK_C - 1) // BLOCK_C):
            i_e = i * BLOCK_C + i_c
            b_more = _load(p_v, i_m, i_e, i_m < M, i_e < C, stride_vm, stride_vc)
            b_other = _load(p_gradient, i_n, i_e, i_n < N, i_e < C, stride_gn, stride_gc).to(b_v.dtype)
            b_dp = tl.dot(b_more, tl.trans(b_other), b_dp, input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[None, :])
        if C > BLOCK_C:
            b_g = _load(p_gradient, i_n, i_own_c, i_n < N, i_own_c < C, stride_gn, stride_gc).to(b_v.dtype)
        if D > BLOCK_D:
            b_q = _load(p_q, i_own_d, i_n, i_own_d < D, i_n < N, stride_qd, stride_qn)
        b_dv = tl.dot(b_p.to(b_g.dtype), b_g, b_dv, input_precision="ieee")
        b_dk = tl.dot(b_ds.to(b_q.dtype), tl.trans(b_q), b_dk, input_precision="ieee")
    b_dk = b_dk * SCALE
    if p_gamma is not None:
        b_gamma = tl.load(p_gamma).to(SUMS)
        b_dk = b_dk * b_gamma
        b_dv = b_dv * b_gamma
    p_dk += i_b * stride_db + i_h * stride_dh
    p_dv += i_b * stride_eb + i_h * stride_eh
    _store(p_dk, b_dk, i_m, i_own_d, i_m < M, i_own_d < D, stride_dm, stride_dd)
    _store(p_dv, b_dv, i_m, i_own_c, i_m < M, i_own_c < C, stride_em, stride_ec)


@operation("position_attention")
def _attend(
    q: Tensor, k: Tensor, v: Tensor, gamma: Tensor | None, x: Tensor | None, scale: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The result; A v, where the result is something else and backward will ask; the logarithm of each row's sum,
    of base two where kernels run."""
    out, kept, sums = _empty_results(q, k, v, gamma, x, keep)
    if not usable(q):
        _attend_in_tiles(q, k, v, gamma, x, scale, out, kept, sums)
    elif out.numel():
        B, H, N, D = q.shape
        M, C = v.shape[-2:]
        block_n, block_m, block_d, block_c, options = _blocks(v.dtype, D, C, B * H * N)
        _forward_kernel[(triton.cdiv(N, block_n) * B * H * triton.cdiv(C, block_c),)](
            q, k, v, gamma, x, out, kept if kept.numel() else None, sums if keep else None, N, M, H,
            *q.stride(), *k.stride(), *v.stride(), *(out if x is None else x).stride(), *out.stride(),
            SCALE=scale, D=D, C=C, EVEN=M % block_m == 0, SUMS=_sums(v), BLOCK_N=block_n, BLOCK_M=block_m,
            BLOCK_D=block_d, BLOCK_C=block_c, **options,
        )  # fmt: skip
    return out, kept, sums


@_attend.register_fake
def _(q, k, v, gamma, x, scale, keep):
    return _empty_results(q, k, v, gamma, x, keep)


@operation("position_attention_backward")
def _attend_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, gamma: Tensor | None, kept: Tensor, sums: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and gamma; that of gamma is empty where there is no gamma."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if not usable(q):
        shared = _attend_backward_in_tiles(gradient, q, k, v, gamma, kept, sums, scale, dq, dk, dv)
    else:
        B, H, N, D = q.shape
        M, C = v.shape[-2:]
        shared = torch.empty_like(sums)  # of each query: sum of gradient · A v
        block_n, block_m, block_d, block_c, options = _blocks(v.dtype, D, C, B * H * max(N, M))
        sizes = dict(
            SCALE=scale, D=D, C=C, SUMS=_sums(v), BLOCK_N=block_n, BLOCK_M=block_m, BLOCK_D=block_d, BLOCK_C=block_c
        )
        parts_d, parts_c = max(1, triton.cdiv(D, block_d)), max(1, triton.cdiv(C, block_c))
        if B * H * N:
            _queries_kernel[(triton.cdiv(N, block_n) * B * H * parts_d,)](
                gradient, q, k, v, gamma, kept, sums, shared, dq, N, M, H,
                *gradient.stride(), *q.stride(), *k.stride(), *v.stride(), *kept.stride(), *dq.stride(),
                **sizes, **options,
            )  # fmt: skip
        # blocks change places: here a program holds keys and walks over queries
        sizes |= dict(BLOCK_N=block_m, BLOCK_M=block_n)
        if B * H * M:
            _keys_kernel[(triton.cdiv(M, block_n) * B * H * max(parts_d, parts_c),)](
                gradient, q, k, v, gamma, sums, shared, dk, dv, N, M, H,
                *gradient.stride(), *q.stride(), *k.stride(), *v.stride(), *dk.stride(), *dv.stride(),
                PARTS=max(parts_d, parts_c), **sizes, **options,
            )  # fmt: skip
    dgamma = gradient.new_empty(0) if gamma is None else shared.sum().to(gamma.dtype).reshape(gamma.shape)
    return dq, dk, dv, dgamma


@_attend_backward.register_fake
def _(gradient, q, k, v, gamma, kept, sums, scale):
    dgamma = gradient.new_empty(0) if gamma is None else torch.empty_like(gamma)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dgamma


def _setup(ctx, inputs, output) -> None:
    q, k, v, gamma, x, ctx.scale, _ = inputs
    out, kept, sums = output
    ctx.mark_non_differentiable(kept, sums)
    ctx.save_for_backward(q, k, v, gamma, out if gamma is None and x is None else kept, sums)


def _backward(ctx, gradient, *_):
    q, k, v, gamma, kept, sums = ctx.saved_tensors
    dq, dk, dv, dgamma = _attend_backward(gradient, q, k, v, gamma, kept, sums, ctx.scale)
    return dq, dk, dv, None if gamma is None else dgamma, gradient if ctx.needs_input_grad[4] else None, None, None


_attend.register_autograd(_backward, setup_context=_setup)


def _empty_results(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor | None, x: Tensor | None, keep: bool):
    shape = (*q.shape[:-1], v.shape[-1])
    like = v if x is None else x
    out = torch.empty_like(like) if like.shape == shape else torch.empty(shape, dtype=like.dtype, device=like.device)
    apart = keep and not (gamma is None and x is None)
    kept = torch.empty(shape if apart else (0,), dtype=v.dtype, device=v.device)
    sums = torch.empty(shape[:-1] if keep else (0,), dtype=_precise(v), device=v.device)
    return out, kept, sums


def _precise(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _sums(values: Tensor):
    return tl.float64 if values.dtype == torch.float64 else tl.float32


def _blocks(dtype: torch.dtype, d: int, c: int, tokens: int) -> tuple[int, int, int, int, dict[str, Any]]:
    """Tokens a program holds, tokens it takes at a time, how much of both widths, and how it is compiled.

    Compiled for sm_90, blocks of the widths in use fit its registers; operands of full precision lie there too.
    """
    held, taken, longest_d, longest_c, warps, stages = {2: (128, 64, 128, 128, 8, 3), 4: (64, 32, 32, 64, 8, 2)}.get(
        dtype.itemsize, (32, 16, 16, 64, 4, 2)
    )
    if d > longest_d or c > longest_c:  # both widths in parts: more is held at once
        held, taken, longest_d, warps, stages = max(32, held // 2), min(32, taken), max(16, min(64, longest_d)), 8, 2
    elif (
        dtype.itemsize == 2 and tokens < 132 * held
    ):  # an H200 has 132 processors: smaller blocks keep more of them busy
        held, warps = 64, 4
    block_d, block_c = (
        min(longest, max(16, triton.next_power_of_2(width))) for longest, width in ((longest_d, d), (longest_c, c))
    )
    return held, taken, block_d, block_c, dict(num_warps=warps, num_stages=stages, enable_fp_fusion=True)


def _attend_in_tiles(
    q: Tensor, k: Tensor, v: Tensor, gamma: Tensor | None, x: Tensor | None, scale: float,
    out: Tensor, kept: Tensor, sums: Tensor,
) -> None:  # fmt: skip
    """Some queries at a time, with all keys: their scores stay in the cache, where the whole map would not."""
    q, k, v = (_flat(tokens) for tokens in (q, k, v))
    (batches, N, _), M = q.shape, k.shape[1]
    # half a million scores lie in the cache; 128 rows keep the matrix product busy; four million scores are enough
    rows = max(1, min(N, max(16, min(max(128, 2**19 // max(M, 1)), 2**22 // max(M, 1)))))
    together = max(1, min(batches, 2**19 // max(1, rows * M))) if rows == N else 1
    room = q.new_empty(together * rows * M)
    values, logarithms = q.new_empty(batches, N, v.shape[-1]), q.new_zeros(batches, N)
    for batch in _steps(batches, together):
        for tile in _steps(N, rows):
            scores = _view(room, q[batch, tile], k[batch])
            torch.baddbmm(scores, q[batch, tile], k[batch].mT, beta=0, alpha=scale, out=scores)
            top = scores.amax(-1) if sums.numel() and M else None
            shares = torch.softmax(scores, dim=-1, out=scores)
            values[batch, tile] = torch.bmm(shares, v[batch])
            if top is not None:  # the largest share is exp(top - logarithm of the sum)
                logarithms[batch, tile] = top - shares.amax(-1).log()
    values = values.view(out.shape)
    if kept.numel():
        kept.copy_(values)
    if sums.numel():
        sums.copy_(logarithms.view(sums.shape))
    if gamma is not None:
        values.mul_(gamma)
    out.copy_(values if x is None else values.add_(x))


def _attend_backward_in_tiles(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, gamma: Tensor | None, kept: Tensor, sums: Tensor, scale: float,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> Tensor:  # fmt: skip
    """Some queries and some keys at a time: the sums of keys and values stay in the cache too."""
    gradient, q, k, v, kept = (_flat(tokens) for tokens in (gradient, q, k, v, kept))
    (batches, N, _), M = q.shape, k.shape[1]
    shared = (gradient * kept).sum(-1, keepdim=True)  # [batch, N, 1]
    # one column more, and the matrix product itself subtracts: a pass over the scores saved, twice
    shifted_q, shifted_gradient = _beside(q * scale, -sums.view(shared.shape)), _beside(gradient, -shared)
    shifted_k, shifted_v = _beside(k, k.new_ones(batches, M, 1)), _beside(v, v.new_ones(batches, M, 1))
    # sums lie with the tokens last: so the matrix product takes three quarters of the time, for k and q a fifth
    sum_q, sum_k, sum_v = (torch.zeros_like(tokens.mT, memory_format=torch.contiguous_format) for tokens in (q, k, v))

    rows = max(1, min(N, max(256, 2**19 // max(1, min(M, 2048)))))
    columns = max(1, min(M, 2**19 // rows))
    together = max(1, min(batches, 2**19 // (rows * columns))) if (rows, columns) == (N, M) else 1
    room = q.new_empty(2, together * rows * columns)
    for batch in _steps(batches, together):
        for some in _steps(M, columns):
            for tile in _steps(N, rows):
                shares, changes = (_view(part, q[batch, tile], k[batch, some]) for part in room)
                torch.bmm(shifted_q[batch, tile], shifted_k[batch, some].mT, out=shares).exp_()
                torch.bmm(shifted_gradient[batch, tile], shifted_v[batch, some].mT, out=changes).mul_(shares)
                sum_v[batch, :, some].baddbmm_(gradient[batch, tile].mT, shares)
                sum_k[batch, :, some].baddbmm_(q[batch, tile].mT, changes)
                sum_q[batch, :, tile].baddbmm_(k[batch, some].mT, changes.mT)
    factor = 1.0 if gamma is None else gamma.to(q.dtype)
    for result, total in ((dq, sum_q.mul_(factor * scale)), (dk, sum_k.mul_(factor * scale)), (dv, sum_v.mul_(factor))):
        result.copy_(total.mT.reshape(result.shape))
    return shared


def _steps(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _view(room: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """[batch, query, key]: a tile of scores, where there is room for it."""
    return room[: len(q) * q.shape[1] * k.shape[1]].view(len(q), q.shape[1], k.shape[1])


def _beside(tokens: Tensor, column: Tensor) -> Tensor:
    """One column more, with the tokens last in memory."""
    return torch.cat([tokens.mT, column.mT], dim=1).mT


def _flat(tokens: Tensor) -> Tensor:
    """[batch, token, width] in the type of the sums, one of the last two axes without gaps."""
    tokens = tokens.flatten(0, 1).to(_precise(tokens))
    return tokens if 1 in tokens.stride()[1:] else tokens.contiguous()


def fused(
    q: Tensor, k: Tensor, v: Tensor, gamma: Tensor | None = None, x: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """What `reference` does, without the map."""
    _check(q, k, v, gamma, x)
    shape = (*q.shape[:-1], v.shape[-1])
    q, k, v = (_under_two_batches(tokens) for tokens in _in_one_type(q, k, v))
    keep = torch.is_grad_enabled() and any(given is not None and given.requires_grad for given in (q, k, v, gamma, x))
    gamma = None if gamma is None else gamma.reshape(())
    x = None if x is None else _under_two_batches(x)
    return _attend(q, k, v, gamma, x, float(scale), keep)[0].reshape(shape)


def _under_two_batches(tokens: Tensor) -> Tensor:
    """[batch, head, token, width]"""
    if tokens.ndim > 4:
        return tokens.flatten(1, -3)
    return tokens.unflatten(0, (-1, 1)) if tokens.ndim == 3 else tokens.reshape((1,) * (4 - tokens.ndim) + tokens.shape)


def _in_one_type(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    widest = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    return [tokens.to(widest) for tokens in (q, k, v)]


def _check(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor | None, x: Tensor | None) -> None:
    """A kernel trusts its shapes: a wrong one reads memory that is not its own."""
    if not (
        q.ndim == k.ndim == v.ndim >= 2
        and q.shape[:-2] == k.shape[:-2] == v.shape[:-2]
        and q.shape[-1] == k.shape[-1]
        and k.shape[-2] == v.shape[-2]
    ):
        raise ValueError(
            f"Queries {tuple(q.shape)}, keys {tuple(k.shape)} and values {tuple(v.shape)} were given; they need the same "
            "leading axes, queries and keys one width, keys and values one number of tokens. Lay them out as "
            "[batch, token, width]: map.flatten(2).mT does it."
        )
    if x is not None and x.shape != (*q.shape[:-1], v.shape[-1]):
        raise ValueError(
            f"x {tuple(x.shape)} was given; it is added to a result {(*q.shape[:-1], v.shape[-1])} and needs its shape. "
            "Lay it out as the values are."
        )
    if gamma is not None and gamma.numel() != 1:
        raise ValueError(f"gamma {tuple(gamma.shape)} was given; it needs one number. Multiply by others afterwards.")
    given = [tensor for tensor in (q, k, v, gamma, x) if tensor is not None]
    if not all(tensor.is_floating_point() for tensor in given):
        raise ValueError(f"{[str(tensor.dtype) for tensor in given]} were given; all need a float. Convert them first.")
    if len({tensor.device for tensor in given}) > 1:
        raise ValueError(
            f"The arguments lie on {[str(tensor.device) for tensor in given]}; all must lie on one device. Move them there first."
        )


EXAMPLES = [
    dict(batch=(2,), queries=37, keys=70, d=5, c=21),  # nothing divides, several blocks
    dict(batch=(2, 3), queries=64, keys=64, d=16, c=32, scale=0.25),  # heads, everything divides
    dict(batch=(1,), queries=20, keys=33, d=40, c=70, scale=-0.5),  # wider than a block
    dict(batch=(2,), queries=9, keys=11, d=3, c=4, gamma=False, x=False),  # the bare attention
    dict(batch=(), queries=5, keys=6, d=2, c=3, gamma=False),  # no batch, only a residual
    dict(batch=(1, 2, 2), queries=1, keys=1, d=1, c=1, x=False),  # one token
    dict(batch=(2,), queries=3, keys=0, d=2, c=3),  # no keys: x comes back
    dict(batch=(2,), queries=0, keys=4, d=2, c=3),  # no queries
]


def sample(
    *, dtype: torch.dtype, device: str, batch: tuple[int, ...], queries: int, keys: int, d: int, c: int,
    gamma: bool = True, x: bool = True, scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, float]:  # fmt: skip
    """Arguments for one example; all carry a gradient."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(device, dtype).requires_grad_()

    q, k, v = draw(*batch, queries, d), draw(*batch, keys, d), draw(*batch, keys, c)
    return q, k, v, draw() if gamma else None, draw(*batch, queries, c) if x else None, scale
