"""The orthonormal Haar transform of one level, both ways, in one pass over the volume.

    bands[b, c, 4i + 2j + k, d, h, w] = 8^-½ · Σ_{p, q, r ∈ {0, 1}} (-1)^(ip + jq + kr) · x[b, c, 2d + p, 2h + q, 2w + r]

x: [B, C, D, H, W] <-> bands: [B, C, 8, ⌈D/2⌉, ⌈H/2⌉, ⌈W/2⌉], any float, summed in float32 (float64 for float64). The
bands are LLL, LLH, LHL, LHH, HLL, ... HHH: L is low and H high along depth, height and width, in this order. In two
dimensions, x: [B, C, H, W] <-> bands: [B, C, 4, ⌈H/2⌉, ⌈W/2⌉] are LL, LH, HL, HH, and 8 is 4. An axis of odd size is
mirrored at its end, x[n] = x[n - 1]: its last detail is zero, and the way back, which is told the size, leaves the
mirrored voxel out. Of even sizes the way back is the transpose, so that both keep every length and every angle.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ._library import operation
from ._triton import tl, triton, usable


def reference(values: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """The bands of a volume; or, with the size of its axes of space, the volume of these bands."""
    _check(values, size)
    axes = values.ndim - 2 if size is None else len(size)
    corners = list(itertools.product((0, 1), repeat=axes))
    places: list[tuple[Any, ...]] = [(..., *(slice(start, None, 2) for start in corner)) for corner in corners]
    signs = [[(-1) ** sum(map(math.prod, zip(band, corner, strict=True))) for corner in corners] for band in corners]
    matrix = torch.tensor(signs, dtype=_sums(values), device=values.device) / math.sqrt(len(corners))
    precise = values.to(matrix.dtype)
    if size is None:
        for axis, n in enumerate(values.shape[2:], 2):
            mirrored = torch.arange(n + n % 2, device=values.device).clamp(max=n - 1)
            precise = precise.index_select(axis, mirrored)
        voxels = torch.stack([precise[place] for place in places], 2)
        return torch.einsum("ij, bcj... -> bci...", matrix, voxels).to(values.dtype)
    voxels = torch.einsum("ij, bci... -> bcj...", matrix, precise)
    volume = voxels.new_zeros(*values.shape[:2], *(2 * n for n in values.shape[3:]))
    for number, place in enumerate(places):
        volume[place] = voxels[:, :, number]
    for axis, n in enumerate(size, 2):
        volume = volume.narrow(axis, 0, n)
    return volume.to(values.dtype)


@triton.jit
def _place(C, D2, H2, BLOCK_ROW: tl.constexpr, BLOCK_W: tl.constexpr):
    """Which rows of bands this program has, and which of their columns."""
    i_row = tl.program_id(0).to(tl.int64) * BLOCK_ROW + tl.arange(0, BLOCK_ROW).to(tl.int64)  # [BLOCK_ROW]
    i_w = tl.program_id(1).to(tl.int64) * BLOCK_W + tl.arange(0, BLOCK_W).to(tl.int64)  # [BLOCK_W]
    i_h = i_row % H2
    i_d = i_row // H2 % D2
    i_c = i_row // H2 // D2 % C
    return i_row // H2 // D2 // C, i_c, i_d, i_h, i_w


@triton.jit
def _pair(
    p_row, i_d, i_h, i_w, D, H, W, m_row, stride_d, stride_h, stride_w, exact: tl.constexpr, MIRRORED: tl.constexpr,
    BLOCK_ROW: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Sums and differences [BLOCK_ROW, BLOCK_W] of neighbours along one row of the volume."""
    if MIRRORED:
        i_d, i_h, i_w = tl.minimum(i_d, D - 1), tl.minimum(i_h, H - 1), tl.minimum(i_w, W - 1)
    mask = (m_row & (i_d < D) & (i_h < H))[:, None] & (i_w < W)[None, :]  # [BLOCK_ROW, 2 · BLOCK_W]
    at = p_row[:, None] + (i_d * stride_d + i_h * stride_h)[:, None] + (i_w * stride_w)[None, :]
    b_row = tl.load(at, mask=mask, other=0).to(exact)
    even, odd = tl.split(tl.reshape(b_row, (BLOCK_ROW, BLOCK_W, 2)))
    return even + odd, even - odd


@triton.jit
def _analysis_kernel(
    p_x, p_bands, voxels, B, C, D, H, W, D2, H2, W2, stride_xb, stride_xc, stride_xd, stride_xh, stride_xw,
    exact: tl.constexpr, SOLID: tl.constexpr, SCALE: tl.constexpr, MIRRORED: tl.constexpr,
    BLOCK_ROW: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    i_b, i_c, i_d, i_h, i_w = _place(C, D2, H2, BLOCK_ROW, BLOCK_W)
    m_row = i_b < B
    p_row = p_x + i_b * stride_xb + i_c * stride_xc  # [BLOCK_ROW]
    i_x = tl.program_id(1).to(tl.int64) * 2 * BLOCK_W + tl.arange(0, 2 * BLOCK_W).to(tl.int64)
    d, h = (2 * i_d if SOLID else i_d), 2 * i_h
    l0, h0 = _pair(
        p_row, d, h, i_x, D, H, W, m_row, stride_xd, stride_xh, stride_xw, exact, MIRRORED, BLOCK_ROW, BLOCK_W
    )
    l1, h1 = _pair(
        p_row, d, h + 1, i_x, D, H, W, m_row, stride_xd, stride_xh, stride_xw, exact, MIRRORED, BLOCK_ROW, BLOCK_W
    )
    ll, lh, hl, hh = l0 + l1, h0 + h1, l0 - l1, h0 - h1  # along height, along width

    mask = m_row[:, None] & (i_w < W2)[None, :]
    at = (i_b * C + i_c) * voxels * (8 if SOLID else 4) + (i_d * H2 + i_h) * W2
    p_band = p_bands + at[:, None] + i_w[None, :]  # [BLOCK_ROW, BLOCK_W]
    kind = p_bands.dtype.element_ty
    if SOLID:
        d += 1
        l0, h0 = _pair(
            p_row, d, h, i_x, D, H, W, m_row, stride_xd, stride_xh, stride_xw, exact, MIRRORED, BLOCK_ROW, BLOCK_W
        )
        l1, h1 = _pair(
            p_row, d, h + 1, i_x, D, H, W, m_row, stride_xd, stride_xh, stride_xw, exact, MIRRORED, BLOCK_ROW, BLOCK_W
        )
        tl.store(p_band + 4 * voxels, ((ll - l0 - l1) * SCALE).to(kind), mask=mask)
        tl.store(p_band + 5 * voxels, ((lh - h0 - h1) * SCALE).to(kind), mask=mask)
        tl.store(p_band + 6 * voxels, ((hl - l0 + l1) * SCALE).to(kind), mask=mask)
        tl.store(p_band + 7 * voxels, ((hh - h0 + h1) * SCALE).to(kind), mask=mask)
        ll, lh, hl, hh = ll + l0 + l1, lh + h0 + h1, hl + l0 - l1, hh + h0 - h1
    tl.store(p_band, (ll * SCALE).to(kind), mask=mask)
    tl.store(p_band + voxels, (lh * SCALE).to(kind), mask=mask)
    tl.store(p_band + 2 * voxels, (hl * SCALE).to(kind), mask=mask)
    tl.store(p_band + 3 * voxels, (hh * SCALE).to(kind), mask=mask)


@triton.jit
def _apart(low, high, last, MIRRORED: tl.constexpr):
    """The two neighbours; where one was mirrored, the transpose gives the voxel what both would have had."""
    even, odd = low + high, low - high
    if MIRRORED:
        even = tl.where(last, even + odd, even)
    return even, odd


@triton.jit
def _store_pair(
    p_row, low, high, i_d, i_h, i_w, D, H, W, m_row, SCALE: tl.constexpr, MIRRORED: tl.constexpr,
    BLOCK_ROW: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    i_x = tl.program_id(1).to(tl.int64) * 2 * BLOCK_W + tl.arange(0, 2 * BLOCK_W).to(tl.int64)
    even, odd = _apart(low, high, (2 * i_w == W - 1)[None, :], MIRRORED)
    b_row = tl.reshape(tl.join(even, odd), (BLOCK_ROW, 2 * BLOCK_W)) * SCALE
    mask = (m_row & (i_d < D) & (i_h < H))[:, None] & (i_x < W)[None, :]
    at = p_row[:, None] + ((i_d * H + i_h) * W)[:, None] + i_x[None, :]
    tl.store(at, b_row.to(p_row.dtype.element_ty), mask=mask)


@triton.jit
def _synthesis_kernel(
    p_bands, p_x, B, C, D, H, W, D2, H2, W2,
    stride_b, stride_c, stride_band, stride_d, stride_h, stride_w,
    exact: tl.constexpr, SOLID: tl.constexpr, SCALE: tl.constexpr, MIRRORED: tl.constexpr,
    BLOCK_ROW: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    i_b, i_c, i_d, i_h, i_w = _place(C, D2, H2, BLOCK_ROW, BLOCK_W)
    m_row = i_b < B
    mask = m_row[:, None] & (i_w < W2)[None, :]
    at = i_b * stride_b + i_c * stride_c + i_d * stride_d + i_h * stride_h
    p_band = p_bands + at[:, None] + (i_w * stride_w)[None, :]  # [BLOCK_ROW, BLOCK_W]
    ll = tl.load(p_band, mask=mask, other=0).to(exact)
    lh = tl.load(p_band + stride_band, mask=mask, other=0).to(exact)
    hl = tl.load(p_band + 2 * stride_band, mask=mask, other=0).to(exact)
    hh = tl.load(p_band + 3 * stride_band, mask=mask, other=0).to(exact)

    p_row = p_x + (i_b * C + i_c) * D * H * W  # [BLOCK_ROW]
    end_h = (2 * i_h == H - 1)[:, None]
    h = 2 * i_h
    d = i_d
    if SOLID:
        d = 2 * i_d
        end_d = (2 * i_d == D - 1)[:, None]
        ll, bll = _apart(ll, tl.load(p_band + 4 * stride_band, mask=mask, other=0).to(exact), end_d, MIRRORED)
        lh, blh = _apart(lh, tl.load(p_band + 5 * stride_band, mask=mask, other=0).to(exact), end_d, MIRRORED)
        hl, bhl = _apart(hl, tl.load(p_band + 6 * stride_band, mask=mask, other=0).to(exact), end_d, MIRRORED)
        hh, bhh = _apart(hh, tl.load(p_band + 7 * stride_band, mask=mask, other=0).to(exact), end_d, MIRRORED)
        l0, l1 = _apart(bll, bhl, end_h, MIRRORED)
        h0, h1 = _apart(blh, bhh, end_h, MIRRORED)
        _store_pair(p_row, l0, h0, d + 1, h, i_w, D, H, W, m_row, SCALE, MIRRORED, BLOCK_ROW, BLOCK_W)
        _store_pair(p_row, l1, h1, d + 1, h + 1, i_w, D, H, W, m_row, SCALE, MIRRORED, BLOCK_ROW, BLOCK_W)
    l0, l1 = _apart(ll, hl, end_h, MIRRORED)
    h0, h1 = _apart(lh, hh, end_h, MIRRORED)
    _store_pair(p_row, l0, h0, d, h, i_w, D, H, W, m_row, SCALE, MIRRORED, BLOCK_ROW, BLOCK_W)
    _store_pair(p_row, l1, h1, d, h + 1, i_w, D, H, W, m_row, SCALE, MIRRORED, BLOCK_ROW, BLOCK_W)


@operation("haar")
def _analyse(x: Tensor, mirrored: bool) -> Tensor:
    """Bands of a volume; beyond an odd end it is mirrored, or zero."""
    bands = _bands_of(x)
    if bands.numel():
        (_launch_analysis if usable(x) else _tile_analysis)(x, bands, mirrored)
    return bands


@_analyse.register_fake
def _(x, mirrored):
    return _bands_of(x)


@operation("haar_synthesis")
def _synthesise(bands: Tensor, size: Sequence[int], mirrored: bool) -> Tensor:
    """The volume of bands; what lies beyond an odd end is added to the last voxel, or dropped. The transpose of the
    analysis with the same `mirrored`."""
    x = bands.new_empty((*bands.shape[:2], *size))
    if x.numel():
        (_launch_synthesis if usable(bands) else _tile_synthesis)(bands, x, mirrored)
    return x


@_synthesise.register_fake
def _(bands, size, mirrored):
    return bands.new_empty((*bands.shape[:2], *size))


def _setup_analysis(ctx, inputs, output) -> None:
    x, ctx.mirrored = inputs
    ctx.size = x.shape[2:]


def _setup_synthesis(ctx, inputs, output) -> None:
    _, _, ctx.mirrored = inputs


_analyse.register_autograd(
    lambda ctx, gradient: (_synthesise(gradient, ctx.size, ctx.mirrored), None), setup_context=_setup_analysis
)
_synthesise.register_autograd(
    lambda ctx, gradient: (_analyse(gradient, ctx.mirrored), None, None), setup_context=_setup_synthesis
)


def _bands_of(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:2], 2 ** (x.ndim - 2), *((n + 1) // 2 for n in x.shape[2:])))


FUSED = {"enable_fp_fusion": True}


def _launch_analysis(x: Tensor, bands: Tensor, mirrored: bool) -> None:
    odd = any(n % 2 for n in x.shape[2:])  # even rows are read four or eight at a time, mirrored ones by one
    if x.ndim == 4:
        x, bands = x.unsqueeze(2), bands.unsqueeze(3)
    grid, kind = _program(x, bands)
    voxels = math.prod(bands.shape[3:])
    _analysis_kernel[grid](
        x, bands, voxels, *x.shape, *bands.shape[3:], *x.stride(), MIRRORED=odd and mirrored, **kind, **FUSED
    )


def _launch_synthesis(bands: Tensor, x: Tensor, mirrored: bool) -> None:
    odd = any(n % 2 for n in x.shape[2:])
    if x.ndim == 4:
        x, bands = x.unsqueeze(2), bands.unsqueeze(3)
    grid, kind = _program(x, bands)
    _synthesis_kernel[grid](
        bands, x, *x.shape, *bands.shape[3:], *bands.stride(), MIRRORED=odd and mirrored, **kind, **FUSED
    )


def _program(x: Tensor, bands: Tensor) -> tuple[tuple[int, int], dict[str, object]]:
    B, C, count, D2, H2, W2 = bands.shape
    block_w = min(triton.next_power_of_2(W2), 128)
    block_row = 512 // block_w
    exact = tl.float64 if x.dtype == torch.float64 else tl.float32
    kind = dict(exact=exact, SOLID=count == 8, SCALE=count**-0.5, BLOCK_ROW=block_row, BLOCK_W=block_w)
    return (triton.cdiv(B * C * D2 * H2, block_row), triton.cdiv(W2, block_w)), kind


TILE = 1 << 19
"""Values of a tile on a CPU: two megabytes, so that a butterfly finds in the cache what the one before it left."""


def _tile_analysis(x: Tensor, bands: Tensor, mirrored: bool) -> None:
    """On a CPU, some planes at a time: a butterfly along each axis, the last into its place."""
    x, bands, scale = _solid(x, 2), _solid(bands, 3), bands.shape[2] ** -0.5
    halves, quarters = _scratch(bands, _sums(x))
    for volumes, planes, wide in _tiles(bands):
        even, odd = _neighbours(_evened(x[volumes, wide].to(halves.dtype), bands.shape[1] == 8, mirrored), 3)
        half = halves[:, : even.shape[0], : even.shape[1]]  # [along width, volumes, planes, H, W / 2]
        torch.add(even, odd, out=half[0])
        torch.sub(even, odd, out=half[1])
        even, odd = _neighbours(half, 3)
        quarter = quarters[
            :, : half.shape[1], : half.shape[2]
        ]  # [along height and width, volumes, planes, H / 2, W / 2]
        torch.add(even, odd, out=quarter[:2])
        torch.sub(even, odd, out=quarter[2:])
        quarter *= scale
        target = bands[volumes, :, planes].movedim(1, 0)
        if len(target) == 4:
            target.copy_(quarter)
        else:
            _butterfly(*_neighbours(quarter, 2), target[:4], target[4:])


def _tile_synthesis(bands: Tensor, x: Tensor, mirrored: bool) -> None:
    x, bands, scale = _solid(x, 2), _solid(bands, 3), bands.shape[2] ** -0.5
    halves, quarters = _scratch(bands, _sums(x))
    for volumes, planes, wide in _tiles(bands):
        source = bands[volumes, :, planes].movedim(1, 0).to(halves.dtype)
        half = halves[:, : source.shape[1], : source.shape[2] * len(source) // 4]
        quarter = source
        if len(source) == 8:
            quarter = quarters[:, : half.shape[1], : half.shape[2]]
            _butterfly(source[:4], source[4:], *_neighbours(quarter, 2))
        _butterfly(quarter[:2], quarter[2:], *_neighbours(half, 3))
        half *= scale
        target = x[volumes, wide]
        shape = (*half.shape[1:4], 2 * half.shape[4])
        whole = target if target.shape == shape else x.new_empty(shape)
        _butterfly(half[0], half[1], *_neighbours(whole, 3))
        if whole is not target:
            target.copy_(_cut(whole, target.shape, mirrored))


def _butterfly(one: Tensor, other: Tensor, total: Tensor, difference: Tensor) -> None:
    for way, target in ((torch.add, total), (torch.sub, difference)):
        if target.dtype == one.dtype:
            way(one, other, out=target)
        else:
            target.copy_(way(one, other))


def _evened(part: Tensor, solid: bool, mirrored: bool) -> Tensor:
    """With a plane, row or column more where their number is odd: the last once more, or zeros."""
    for axis in (1, 2, 3) if solid else (2, 3):
        if part.shape[axis] % 2:
            last = part.narrow(axis, part.shape[axis] - 1, 1)
            part = torch.cat([part, last if mirrored else torch.zeros_like(last)], axis)
    return part


def _cut(part: Tensor, shape: torch.Size, mirrored: bool) -> Tensor:
    """Without what lies beyond that shape, which is added to its neighbours or dropped."""
    for axis, n in enumerate(shape):
        if mirrored and n < part.shape[axis]:
            part.narrow(axis, n - 1, 1).add_(part.narrow(axis, n, 1))
        part = part.narrow(axis, 0, n)
    return part


def _solid(values: Tensor, first: int) -> Tensor:
    """[B, C, ...] -> [B · C, ...], with one plane of depth where there was none."""
    values = values.unsqueeze(first) if values.ndim - first == 2 else values
    return values.reshape(-1, *values.shape[2:])


def _scratch(bands: Tensor, exact: torch.dtype) -> tuple[Tensor, Tensor]:
    """Room for the largest tile's bands along width, and along height and width: made anew, it would be half the time."""
    volumes, _, wide = next(_tiles(bands))
    height, width = bands.shape[3:]
    shapes = ((2, volumes.stop, wide.stop, 2 * height, width), (4, volumes.stop, wide.stop, height, width))
    halves, quarters = (torch.empty(shape, dtype=exact, device=bands.device) for shape in shapes)
    return halves, quarters


def _tiles(bands: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Volumes, planes of their bands, and the planes of the volume these are of."""
    volumes, count, depth, height, width = bands.shape
    planes = max(1, min(depth, TILE // (count * height * width)))
    together = max(1, TILE // (count * depth * height * width))
    for volume in range(0, volumes, together):
        for plane in range(0, depth, planes):
            end = min(plane + planes, depth)
            yield (
                slice(volume, min(volume + together, volumes)),
                slice(plane, end),
                slice(plane * count // 4, end * count // 4),
            )


def _neighbours(values: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    even, odd = values.unflatten(axis, (-1, 2)).unbind(axis + 1)
    return even, odd


def fused(values: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """What `reference` does, in one pass."""
    _check(values, size)
    if not (usable(values) or values.device.type == "cpu"):
        return reference(values, size)
    return _analyse(values, True) if size is None else _synthesise(values, list(size), False)


def _sums(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _check(values: Tensor, size: Sequence[int] | None) -> None:
    """A kernel trusts its shapes: a wrong one reads memory that is not its own."""
    if not values.is_floating_point():
        raise ValueError(f"Values of {values.dtype} were given; the Haar transform needs floats. Convert them first.")
    if size is None:
        if values.ndim not in (4, 5):
            raise ValueError(
                f"A tensor {tuple(values.shape)} was given; the Haar transform is of [B, C, H, W] or [B, C, D, H, W]. "
                "Add the axes that are missing."
            )
        return
    halves = tuple((n + 1) // 2 for n in size)
    if len(size) not in (2, 3) or tuple(values.shape[2:]) != (2 ** len(size), *halves):
        raise ValueError(
            f"Bands {tuple(values.shape)} were given for a volume of {tuple(size)} voxels; that needs two or three axes and "
            f"[B, C, {2 ** len(size)}, {', '.join(map(str, halves))}]. Pass the size of what was analysed."
        )


EXAMPLES = [
    dict(size=(4, 6, 10)),
    dict(size=(4, 6, 10), back=True),
    dict(size=(5, 7, 9)),  # mirrored at every end
    dict(size=(5, 7, 9), back=True),
    dict(size=(9, 261)),  # a picture, several blocks
    dict(size=(9, 261), back=True),
    dict(size=(1, 1, 1)),  # one voxel
    dict(size=(3, 0), back=True),  # none
]


def sample(
    *, dtype: torch.dtype, device: str, size: tuple[int, ...], back: bool = False
) -> tuple[Tensor] | tuple[Tensor, tuple[int, ...]]:
    """Arguments for one example, in either direction."""
    random = torch.Generator().manual_seed(0)
    shape = (2 ** len(size), *((n + 1) // 2 for n in size)) if back else size
    values = torch.randn(2, 3, *shape, generator=random, dtype=torch.float64).to(device, dtype).requires_grad_()
    return (values, size) if back else (values,)
