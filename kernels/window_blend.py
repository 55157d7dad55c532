"""Adds a weighted window of logits to the volume it was cut from.

    accumulator[c, a + i, b + j, e + k] += weight_d[i] · weight_h[j] · weight_w[k] · window[c, i, j, k]

accumulator: [C, D, H, W], float32 or float64; window: [C, d, h, w], any float; weights: [d], [h], [w];
offset: (a, b, e). What lies outside the accumulator is dropped, so a window may hang over any border.
The weights are constants: no gradient flows to them. Sums are kept in the accumulator's type: half precision would
change labels at ties.
"""

import torch
from torch import Tensor

from ._library import operation
from ._triton import tl, triton, usable

Offset = tuple[int, int, int]


def reference(
    accumulator: Tensor, window: Tensor, weight_d: Tensor, weight_h: Tensor, weight_w: Tensor, offset: Offset
) -> Tensor:
    """The accumulator with the window added: the same tensor, changed, or a new one where a gradient is wanted."""
    _check(accumulator, window, weight_d, weight_h, weight_w)
    if _wants_gradient(accumulator, window):
        accumulator = accumulator.clone()
    inside, place = _overlap(accumulator, window, offset)
    d, h, w = (
        weight.detach()[part].to(accumulator.dtype)
        for weight, part in zip((weight_d, weight_h, weight_w), inside, strict=True)
    )
    part = window[:, inside[0], inside[1], inside[2]].to(accumulator.dtype)  # [C, ≤ d, ≤ h, ≤ w]
    accumulator[:, place[0], place[1], place[2]] += part * d[:, None, None] * h[:, None] * w
    return accumulator


def _overlap(accumulator: Tensor, window: Tensor, offset: Offset) -> tuple[list[slice], list[slice]]:
    """Which part of the window lies inside, and where."""
    inside = [
        slice(max(0, -start), max(0, min(n, size - start)))
        for start, n, size in zip(offset, window.shape[1:], accumulator.shape[1:], strict=True)
    ]
    return inside, [
        slice(s.start + start, max(s.stop, s.start) + start) for s, start in zip(inside, offset, strict=True)
    ]


SLAB = 1 << 17
"""Voxels of all classes in a slab: what a core's cache holds beside the accumulator's."""


def _by_slabs(accumulator: Tensor, window: Tensor, weights: list[Tensor], offset: Offset) -> Tensor:
    """Some planes at a time: one multiply-add reads and writes the accumulator once, and no volume of weights exists."""
    inside, place = _overlap(accumulator, window, offset)
    d, h, w = (weight[part] for weight, part in zip(weights, inside, strict=True))
    target, source = accumulator[:, place[0], place[1], place[2]], window[:, inside[0], inside[1], inside[2]]
    plane = h[:, None] * w  # [h, w]
    for start in range(0, len(d), step := max(1, SLAB // max(1, len(window) * plane.numel()))):
        some = slice(start, start + step)
        target[:, some].addcmul_(source[:, some].to(target.dtype), d[some, None, None] * plane)
    return accumulator


@triton.jit
def _tile(a, b, e, C, D, H, W, d, h, w, BLOCK_ROW: tl.constexpr, BLOCK_K: tl.constexpr):
    """Which voxels of the window this program has, and which of them lie in the accumulator."""
    i_row = tl.program_id(0).to(tl.int64) * BLOCK_ROW + tl.arange(0, BLOCK_ROW).to(tl.int64)  # [BLOCK_ROW]
    i_k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K).to(tl.int64)  # [BLOCK_K]
    i_j = i_row % h
    i_i = i_row // h % d
    i_c = i_row // h // d
    m_row = (i_c < C) & (i_i + a >= 0) & (i_i + a < D) & (i_j + b >= 0) & (i_j + b < H)
    m_k = (i_k < w) & (i_k + e >= 0) & (i_k + e < W)
    return i_c, i_i, i_j, i_k, m_row, m_k


@triton.jit
def _forward_kernel(
    p_accumulator, p_window, p_weight_d, p_weight_h, p_weight_w, a, b, e, C, D, H, W, d, h, w,
    stride_ac, stride_ad, stride_ah, stride_aw, stride_wc, stride_wd, stride_wh, stride_ww,
    BLOCK_ROW: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_c, i_i, i_j, i_k, m_row, m_k = _tile(a, b, e, C, D, H, W, d, h, w, BLOCK_ROW, BLOCK_K)
    mask = m_row[:, None] & m_k[None, :]  # [BLOCK_ROW, BLOCK_K]

    at = (i_c * stride_ac + (i_i + a) * stride_ad + (i_j + b) * stride_ah)[:, None] + ((i_k + e) * stride_aw)[None, :]
    of = (i_c * stride_wc + i_i * stride_wd + i_j * stride_wh)[:, None] + (i_k * stride_ww)[None, :]
    b_sum = tl.load(p_accumulator + at, mask=mask, other=0)  # [BLOCK_ROW, BLOCK_K]
    b_window = tl.load(p_window + of, mask=mask, other=0).to(b_sum.dtype)
    b_d = tl.load(p_weight_d + i_i, mask=m_row, other=0)
    b_h = tl.load(p_weight_h + i_j, mask=m_row, other=0)
    b_w = tl.load(p_weight_w + i_k, mask=m_k, other=0)
    b_sum += b_window * b_d[:, None] * b_h[:, None] * b_w[None, :]
    tl.store(p_accumulator + at, b_sum, mask=mask)


@triton.jit
def _backward_kernel(
    p_gradient, p_window, p_weight_d, p_weight_h, p_weight_w, a, b, e, C, D, H, W, d, h, w,
    stride_ac, stride_ad, stride_ah, stride_aw, stride_wc, stride_wd, stride_wh, stride_ww,
    BLOCK_ROW: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_c, i_i, i_j, i_k, m_row, m_k = _tile(a, b, e, C, D, H, W, d, h, w, BLOCK_ROW, BLOCK_K)
    mask = m_row[:, None] & m_k[None, :]  # [BLOCK_ROW, BLOCK_K]

    at = (i_c * stride_ac + (i_i + a) * stride_ad + (i_j + b) * stride_ah)[:, None] + ((i_k + e) * stride_aw)[None, :]
    of = (i_c * stride_wc + i_i * stride_wd + i_j * stride_wh)[:, None] + (i_k * stride_ww)[None, :]
    b_gradient = tl.load(p_gradient + at, mask=mask, other=0)  # [BLOCK_ROW, BLOCK_K]
    b_d = tl.load(p_weight_d + i_i, mask=m_row, other=0)
    b_h = tl.load(p_weight_h + i_j, mask=m_row, other=0)
    b_w = tl.load(p_weight_w + i_k, mask=m_k, other=0)
    b_gradient = b_gradient * b_d[:, None] * b_h[:, None] * b_w[None, :]
    # the whole window is written, zeros where it hung over the border
    m_window = (i_c < C)[:, None] & (i_k < w)[None, :]
    tl.store(p_window + of, b_gradient.to(p_window.dtype.element_ty), mask=m_window)


@operation("window_blend", mutates=["accumulator"])
def _into(
    accumulator: Tensor, window: Tensor, weight_d: Tensor, weight_h: Tensor, weight_w: Tensor, a: int, b: int, e: int
) -> None:
    _add(accumulator, window, [weight_d, weight_h, weight_w], (a, b, e))


@_into.register_fake
def _(accumulator, window, weight_d, weight_h, weight_w, a, b, e):
    return None


@operation("window_blended")
def _onto(
    accumulator: Tensor, window: Tensor, weight_d: Tensor, weight_h: Tensor, weight_w: Tensor, a: int, b: int, e: int
) -> Tensor:
    return _add(accumulator.clone(), window, [weight_d, weight_h, weight_w], (a, b, e))


@_onto.register_fake
def _(accumulator, window, weight_d, weight_h, weight_w, a, b, e):
    return torch.empty_like(accumulator)


@operation("window_blended_backward")
def _cut_out(
    gradient: Tensor, like: Tensor, weight_d: Tensor, weight_h: Tensor, weight_w: Tensor, a: int, b: int, e: int
) -> Tensor:
    """The window's gradient: what it gave, weighted."""
    weights, offset = [weight_d, weight_h, weight_w], (a, b, e)
    if usable(gradient):
        cut = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        return _launch(_backward_kernel, gradient, cut, weights, offset)
    cut = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    inside, place = _overlap(gradient, like, offset)
    d, h, w = (weight[part] for weight, part in zip(weights, inside, strict=True))
    cut[:, inside[0], inside[1], inside[2]] = gradient[:, place[0], place[1], place[2]] * (
        d[:, None, None] * h[:, None] * w
    )
    return cut


@_cut_out.register_fake
def _(gradient, like, weight_d, weight_h, weight_w, a, b, e):
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _setup(ctx, inputs, output) -> None:
    _, window, *weights, a, b, e = inputs
    ctx.save_for_backward(window, *weights)
    ctx.offset = (a, b, e)


def _backward(ctx, gradient):
    window, *weights = ctx.saved_tensors
    cut = _cut_out(gradient, window, *weights, *ctx.offset) if ctx.needs_input_grad[1] else None
    return gradient, cut, None, None, None, None, None, None


_onto.register_autograd(_backward, setup_context=_setup)


def _add(accumulator: Tensor, window: Tensor, weights: list[Tensor], offset: Offset) -> Tensor:
    if not usable(accumulator):
        return _by_slabs(accumulator, window, weights, offset)
    _launch(_forward_kernel, accumulator, window, weights, offset)
    return accumulator


def _launch(kernel, volume: Tensor, window: Tensor, weights: list[Tensor], offset: Offset) -> Tensor:
    C, d, h, w = window.shape
    rows, block_row, block_k = C * d * h, 16, 64
    if window.numel():
        kernel[(triton.cdiv(rows, block_row), triton.cdiv(w, block_k))](
            volume, window, *weights, *offset, *volume.shape, d, h, w, *volume.stride(), *window.stride(),
            BLOCK_ROW=block_row, BLOCK_K=block_k, enable_fp_fusion=True,
        )  # fmt: skip
    return window


def fused(
    accumulator: Tensor, window: Tensor, weight_d: Tensor, weight_h: Tensor, weight_w: Tensor, offset: Offset
) -> Tensor:
    """What `reference` does, in one pass over the window and the voxels it lies on."""
    _check(accumulator, window, weight_d, weight_h, weight_w)
    weights = [weight.detach().to(accumulator.dtype).contiguous() for weight in (weight_d, weight_h, weight_w)]
    if _wants_gradient(accumulator, window):
        return _onto(accumulator, window, *weights, *offset)
    _into(accumulator, window, *weights, *offset)
    return accumulator


def _wants_gradient(accumulator: Tensor, window: Tensor) -> bool:
    return torch.is_grad_enabled() and (accumulator.requires_grad or window.requires_grad)


def _check(accumulator: Tensor, window: Tensor, weight_d: Tensor, weight_h: Tensor, weight_w: Tensor) -> None:
    """A kernel trusts its shapes: a wrong one reads memory that is not its own."""
    if accumulator.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"The accumulator is {accumulator.dtype}; windows are summed in float32 or float64, because half precision "
            "changes labels. Make it with dtype=torch.float32."
        )
    weights = tuple(weight.shape[0] for weight in (weight_d, weight_h, weight_w) if weight.ndim == 1)
    if not accumulator.ndim == window.ndim == 4 or (len(accumulator), *weights) != window.shape:
        raise ValueError(
            f"A window {tuple(window.shape)} with weights {weights} was given for an accumulator "
            f"{tuple(accumulator.shape)}; both need four axes with the same channels, and one weight per step of the "
            "window's last three axes. Cut the weights to the window."
        )
    if not accumulator.device == window.device == weight_d.device == weight_h.device == weight_w.device:
        raise ValueError(
            f"The accumulator lies on {accumulator.device}, the window on {window.device}, the weights on "
            f"{weight_d.device}; all must lie on one device. Move them there first."
        )


EXAMPLES = [
    dict(volume=(2, 7, 9, 11), window=(4, 5, 6), offset=(1, 2, 3)),  # inside
    dict(volume=(3, 9, 5, 70), window=(9, 5, 70), offset=(0, 0, 0)),  # the whole volume, more than one block wide
    dict(volume=(2, 7, 9, 11), window=(5, 5, 5), offset=(4, 7, 9)),  # over the far border
    dict(volume=(2, 7, 9, 11), window=(5, 5, 5), offset=(-3, -1, -4)),  # over the near border
    dict(volume=(1, 3, 4, 5), window=(7, 9, 11), offset=(-2, -3, -4)),  # larger than the volume
    dict(volume=(5, 4, 4, 4), window=(1, 1, 1), offset=(3, 0, 2)),  # one voxel
    dict(volume=(1, 1, 1, 1), window=(1, 1, 1), offset=(0, 0, 0)),  # one voxel in one voxel
    dict(volume=(2, 4, 4, 4), window=(2, 2, 2), offset=(9, 0, 0)),  # beside it: nothing is added
]


def sample(
    *, dtype: torch.dtype, device: str, volume: tuple[int, int, int, int], window: tuple[int, int, int], offset: Offset
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Offset]:
    """Arguments for one example; the accumulator is float32 at least."""
    random = torch.Generator().manual_seed(0)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    accumulator = torch.randn(volume, generator=random, dtype=torch.float64).to(device, sums).requires_grad_()
    logits = torch.randn(volume[0], *window, generator=random, dtype=torch.float64).to(device, dtype).requires_grad_()
    d, h, w = (torch.rand(n, generator=random, dtype=torch.float64).to(device, sums) for n in window)
    return accumulator, logits, d, h, w, offset
