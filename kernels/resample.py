"""A scan brought to another number of voxels of the same extent, one axis after the other.

    result[c, x, y, z] = Σ_i Σ_j Σ_k  a[x, i] · b[y, j] · d[z, k] · voxels[c, i, j, k]

voxels: [C, i, j, k], any real type; shape: what i, j, k become; order: 0 (nearest), 1 (linear) or 3 (cubic spline).
result: [C, *shape], float64 for float64, else float32, which is also what sums are kept in. Both grids cover the same
extent edge to edge, so centres map as x_before = (x_after + 1/2) · before / after - 1/2; what lies outside the outermost
centres repeats the edge, and the spline mirrors at it as scipy's 'mirror' does. Nothing is smoothed first: a coarser grid
sees the old one at points. Along the axis `separate` each new voxel takes the nearest old one. Along the axes `flipped`
voxels are read back to front: so a view that numpy turned round needs no copy, torch having no negative strides.

A matrix of one axis is zero outside a band, in the spline's case by rounding: its weights fall by 2 - √3 from voxel to
voxel. Products of bands take the place of taps, so what is computed in vain is made up for by what a product is good
at; the gradient goes back through the same bands, transposed.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from threading import Barrier
from typing import Any

import torch
from torch import Tensor

from ._library import operation
from ._triton import tl, triton, usable

Shape = tuple[int, int, int]


def reference(
    voxels: Tensor, shape: Shape, order: int, separate: int | None = None, flipped: Sequence[int] = ()
) -> Tensor:
    """A dense matrix per axis."""
    _check(voxels, shape, order, separate, flipped)
    result = voxels.to(_kind(voxels))
    for axis, after in enumerate(shape):
        matrix = _matrix(voxels.shape[axis + 1], after, 0 if axis == separate else order, result.dtype)
        matrix = matrix.flip(1) if axis in flipped else matrix
        result = torch.tensordot(result, matrix.to(result), ([axis + 1], [1])).movedim(-1, axis + 1)
    return result


# what each old voxel gives to each new one

TIE = 1e-6
"""A place nearer than this to the middle of two voxels is in the middle, whatever the rounding."""

REACH = {torch.float32: 13, torch.float64: 28}
"""How many voxels to either side the spline is felt: beyond, a weight is less than the type can tell."""


def _matrix(before: int, after: int, order: int, dtype: torch.dtype, repeats: bool = False) -> Tensor:
    """[after, before], in float64 whatever the type it will be rounded to."""
    precisely: dict[str, Any] = dict(dtype=torch.float64, device="cpu")
    places = (torch.arange(after, **precisely) + 0.5) * before / after - 0.5
    places = places if repeats else places.clamp(0, before - 1)
    if order == 0:  # the later of two, as in scipy
        first, steps = (places + 0.5 + TIE).floor(), torch.zeros(1, **precisely)
    else:
        first = places.floor()
        steps = (
            torch.arange(2, **precisely) if order == 1 else torch.arange(-REACH[dtype], REACH[dtype] + 2, **precisely)
        )
    samples = first[:, None] + steps  # [after, tap]
    away = places[:, None] - samples
    share = SHARES[order](away)
    share = share / share.sum(1, keepdim=True)  # what is left out at the far ends weighs nothing
    matrix = torch.zeros(after, before, **precisely)
    index = samples.long().clamp(0, before - 1) if repeats else _mirrored(samples.long(), before)
    return matrix.scatter_add(1, index, share)  # a mirrored sample comes twice


def _hat(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _cardinal(x: Tensor) -> Tensor:
    """The cubic spline that is 1 at 0 and 0 at every other whole number: scipy's prefilter and its B-spline in one."""
    first, pole = x.floor(), 3**0.5 - 2
    parts = [pole ** (first + step).abs() * _bspline(x - first - step) for step in range(-1, 3)]
    return 3**0.5 * torch.stack(parts).sum(0)


def _bspline(x: Tensor) -> Tensor:
    x = x.abs()
    return torch.where(x < 1, 2 / 3 - x**2 + x**3 / 2, (2 - x).clamp(min=0) ** 3 / 6)


SHARES: dict[int, Callable[[Tensor], Tensor]] = {0: torch.ones_like, 1: _hat, 3: _cardinal}
"""Per order, the weight of a voxel at a distance."""


def _mirrored(index: Tensor, size: int) -> Tensor:
    """Indices beyond an end come back in, the edge itself counted once."""
    if size == 1:
        return torch.zeros_like(index)
    index = index.abs() % (2 * (size - 1))
    return torch.where(index < size, index, 2 * (size - 1) - index)


@dataclass(frozen=True)
class _Axis:
    """What is done along one axis: enough to know its matrix by."""

    before: int
    after: int
    order: int
    is_flipped: bool
    dtype: torch.dtype
    is_backward: bool = False
    repeats: bool = False

    @property
    def stays(self) -> bool:
        return self.before == self.after and not self.is_flipped

    @property
    def growth(self) -> float:
        return self.before / self.after if self.is_backward else self.after / self.before

    def matrix(self) -> Tensor:
        """[row, column]: rows are what is made, columns what it is made from."""
        matrix = _matrix(self.before, self.after, self.order, self.dtype, self.repeats)
        matrix = matrix.flip(1) if self.is_flipped else matrix
        return matrix.T if self.is_backward else matrix


def _axes(
    before: Sequence[int], after: Sequence[int], order: int, separate: int | None, flipped: Sequence[int],
    dtype: torch.dtype, is_backward: bool = False, repeats: bool = False,
) -> list[_Axis]:  # fmt: skip
    return [
        _Axis(one, other, 0 if axis == separate else order, axis in flipped, dtype, is_backward, repeats)
        for axis, (one, other) in enumerate(zip(before, after, strict=True))
    ]


def _reached(part: Tensor) -> slice:
    """The columns outside of which some rows of a matrix are zero."""
    columns = part.any(0).nonzero()
    return slice(int(columns[0]), int(columns[-1]) + 1) if len(columns) else slice(0, 0)


# on a GPU: a kernel per axis, several slabs in a row


@triton.jit
def _band_kernel(
    p_source, p_target, p_first, p_weight, rows, width, P, Q, row_blocks, q_blocks,
    stride_sc, stride_sp, stride_sa, stride_sq, stride_tc, stride_tp, stride_ta, stride_tq,
    BLOCK_ROW: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Some rows of the matrix, times every column of the band they share. `a` is the axis that is resampled, `q` the
    one along which a program reads its neighbours, `p` the third."""
    program = tl.program_id(0).to(tl.int64)
    i_block = program % row_blocks  # the fastest: bands overlap, and what one read the next finds in the cache
    i_q = program // row_blocks % q_blocks * BLOCK_Q + tl.arange(0, BLOCK_Q).to(tl.int64)  # [BLOCK_Q]
    i_p = program // row_blocks // q_blocks % P
    i_c = program // row_blocks // q_blocks // P
    i_in_block = tl.arange(0, BLOCK_ROW).to(tl.int64)  # [BLOCK_ROW]
    i_row = i_block * BLOCK_ROW + i_in_block
    m_q = i_q < Q
    m_row = i_row < rows

    first = tl.load(p_first + i_block)
    p_column = p_source + i_c * stride_sc + i_p * stride_sp + first * stride_sa + i_q * stride_sq  # [BLOCK_Q]
    p_share = p_weight + i_block * width * BLOCK_ROW + i_in_block  # [BLOCK_ROW]
    b_sum = tl.zeros([BLOCK_ROW, BLOCK_Q], dtype=p_weight.dtype.element_ty)
    for _ in range(0, width):
        b_source = tl.load(p_column, mask=m_q, other=0)
        b_share = tl.load(p_share)  # rows that are none have no weight
        b_sum += b_share[:, None] * b_source.to(b_sum.dtype)[None, :]
        p_column += stride_sa
        p_share += BLOCK_ROW
    at = i_c * stride_tc + i_p * stride_tp + (i_row * stride_ta)[:, None] + (i_q * stride_tq)[None, :]
    tl.store(p_target + at, b_sum.to(p_target.dtype.element_ty), mask=m_row[:, None] & m_q[None, :])


BLOCK_ROW = 16
SLAB = 2**24
"""Numbers in what lies between two axes: enough to fill a GPU, little beside a scan."""


@dataclass(frozen=True, eq=False)
class _Table:
    """The bands of one axis, BLOCK_ROW rows each, all as wide as the widest."""

    first: Tensor  # [band], the first column
    weights: Tensor  # [band, column, BLOCK_ROW]


@lru_cache(maxsize=64)
def _table(axis: _Axis, device: torch.device) -> _Table:
    matrix = axis.matrix()
    parts = matrix.split(BLOCK_ROW)
    reached = [_reached(part) for part in parts]
    width = max(columns.stop - columns.start for columns in reached)
    first = [min(columns.start, matrix.shape[1] - width) for columns in reached]  # no band ends beyond the last column
    weights = torch.zeros(len(parts), width, BLOCK_ROW, dtype=axis.dtype, device="cpu")
    for band, part, start in zip(weights, parts, first, strict=True):
        band[:, : len(part)] = part[:, start : start + width].T
    return _Table(torch.tensor(first, dtype=torch.int64, device=device), weights.to(device))


def _carry_by_kernel(source: Tensor, target: Tensor, axes: Sequence[_Axis]) -> None:
    """Slab by slab of the axis that goes first; each later one follows at once."""
    steps = _in_order(source, axes)
    if not steps:
        target.copy_(source)
        return
    across, *then = steps
    table = _table(axes[across], source.device)
    row = target.numel() // target.shape[across + 1] or 1
    bands = max(1, SLAB // (row * BLOCK_ROW)) if then else len(table.first)
    for start in range(0, len(table.first), bands):
        some = _Table(table.first[start : start + bands], table.weights[start : start + bands])
        goal = target.narrow(
            across + 1, start * BLOCK_ROW, min(bands * BLOCK_ROW, target.shape[across + 1] - start * BLOCK_ROW)
        )
        reached = source
        for axis, following in zip(steps, [*then, None], strict=True):
            q = _quickest(reached, axis)
            place = goal if following is None else _room(reached, goal, axis, q, following)
            _launch(reached, place, some if axis == across else _table(axes[axis], source.device), axis, q)
            reached = place


def _in_order(source: Tensor, axes: Sequence[_Axis]) -> list[int]:
    """What shrinks most goes first, and leaves less to the others; only the axis along which memory runs lets another go
    before it, because its neighbours are read one by one."""
    steps = [axis for axis in sorted(range(3), key=lambda axis: axes[axis].growth) if not axes[axis].stays]
    if len(steps) > 1 and source.stride(steps[0] + 1) == 1 and source.shape[steps[0] + 1] > 1:
        steps[:2] = steps[1::-1]
    return steps


def _quickest(source: Tensor, axis: int) -> int:
    """The other axis whose neighbours lie nearest to each other; one of a single voxel has none."""
    others = [other for other in range(3) if other != axis]
    return min(others, key=lambda other: (source.shape[other + 1] == 1, source.stride(other + 1)))


def _room(source: Tensor, goal: Tensor, axis: int, q: int, following: int) -> Tensor:
    """Room for what goes on along another axis: memory runs along one of the two axes that a program has, not along the
    one that follows, and if there is a choice as in the result."""
    choice = sorted({axis, q} - {following}, key=lambda one: goal.stride(one + 1))
    order = [0, *(one + 1 for one in range(3) if one != choice[0]), choice[0] + 1]
    shape = list(source.shape)
    shape[axis + 1] = goal.shape[axis + 1]
    room = torch.empty([shape[one] for one in order], dtype=goal.dtype, device=goal.device)
    return room.permute([order.index(one) for one in range(4)])


def _launch(source: Tensor, target: Tensor, table: _Table, axis: int, q: int) -> None:
    p = 3 - axis - q
    places = [0, p + 1, axis + 1, q + 1]
    C, P, rows, Q = (target.shape[place] for place in places)
    block_q = 128 if Q > 64 else 32
    blocks = len(table.first), triton.cdiv(Q, block_q)
    if target.numel():
        _band_kernel[(C * P * blocks[0] * blocks[1],)](
            source, target, table.first, table.weights, rows, table.weights.shape[1], P, Q,
            *blocks, *(source.stride(place) for place in places), *(target.stride(place) for place in places),
            BLOCK_ROW=BLOCK_ROW, BLOCK_Q=block_q, num_warps=max(1, block_q // 64), enable_fp_fusion=True,
        )  # fmt: skip


# on a CPU: products of bands, slab by slab, a slab per thread


Product = Callable[[Tensor, Tensor, Tensor], None]
"""product(matrix [row, column], source [n, column, m], target [n, row, m]) writes matrix @ source where it belongs, with
the thread it is called from alone."""


@dataclass(frozen=True, eq=False)
class _Band:
    """Some rows of the matrix of one axis, and the columns outside of which they are zero."""

    rows: slice
    columns: slice
    matrix: Tensor  # [row, column]


@dataclass(frozen=True, eq=False)
class _Slab:
    """A slab of the result, the voxels it is made from, and along which axes they go, in order."""

    source: Tensor  # [i, j, k]
    target: Tensor
    steps: Sequence[tuple[int, Sequence[_Band]]]


@lru_cache(maxsize=64)
def _bands(axis: _Axis) -> tuple[_Band, ...]:
    matrix = axis.matrix()
    rows = max(16, min(64, int(30 * axis.growth)))  # wide enough that a row's own width is no longer the most of it
    return tuple(
        _Band(some, columns := _reached(matrix[some]), matrix[some, columns].to(axis.dtype))
        for some in _cut(len(matrix), rows)
    )


def _by_torch(matrix: Tensor, source: Tensor, target: Tensor) -> None:
    for slow, quick in ((0, 2), (2, 0)):
        if all(one.stride(slow) == one.stride(quick) * one.shape[quick] for one in (source, target)):
            # the other two axes lie as one: a single product
            source, target = (one.permute(1, slow, quick).flatten(1)[None] for one in (source, target))
            break
    torch.bmm(matrix.expand(len(source), -1, -1), source, out=target)


def _carry_by_products(source: Tensor, target: Tensor, axes: Sequence[_Axis], product: Product = _by_torch) -> None:
    slabs = (slab for one, other in zip(source, target, strict=True) for slab in _slabs(one, other, axes))
    _at_once(lambda slab: _fill(slab, product), slabs)


def _slabs(source: Tensor, target: Tensor, axes: Sequence[_Axis]) -> Iterator[_Slab]:
    """Slabs across one of the two axes that are slower in memory, the one that shrinks more: it goes first, and what
    follows has the less to do."""
    across = min(_slowest_first(source)[:2], key=lambda axis: axes[axis].growth)
    steps = [axis for axis in sorted(range(3), key=lambda axis: axes[axis].growth) if not axes[axis].stays]
    then = [(axis, _bands(axes[axis])) for axis in steps if axis != across]
    if across in steps:
        for band in _bands(axes[across]):
            whole = _Band(slice(None), slice(None), band.matrix)
            there, here = source[_at(across, band.columns)], target[_at(across, band.rows)]
            yield _Slab(there, here, [(across, [whole]), *then])
    else:
        for some in _cut(source.shape[across], 16):
            yield _Slab(source[_at(across, some)], target[_at(across, some)], then)


def _fill(slab: _Slab, product: Product) -> None:
    """Carries a slab along its axes. The last product is written where it belongs, turned round if need be."""
    source, axes, dtype = slab.source, _slowest_first(slab.source), slab.target.dtype
    fast = axes[2]
    for axis, bands in slab.steps:
        is_last = axis == slab.steps[-1][0]
        # a product reads and writes without a copy where one of its two axes is the fastest in memory
        other = fast if axis != fast else 2 if fast != 2 else 1
        straight = is_last and 2 in (fast, axis, other)
        shape = list(source.shape)
        shape[axis] = slab.target.shape[axis]
        reached = slab.target if straight else _empty(shape, axes, dtype)
        third = 3 - axis - other
        for some in _cut(source.shape[third], _pieces(source, third)) if source is slab.source else [slice(None)]:
            piece, place = source[_at(third, some)], reached[_at(third, some)]
            if source is slab.source:
                piece = _empty(piece.shape, axes, dtype).copy_(piece)
            piece, place = (one.permute(third, axis, other) for one in (piece, place))
            for band in bands:
                product(band.matrix, piece[:, band.columns], place[:, band.rows])
        source = reached
    if source is not slab.target:
        slab.target.copy_(source)


PIECE = 2**18
"""Numbers of a scan that are brought together, in the type they are summed in, before a product reads them: a megabyte,
so that they are still in the cache when it does."""


def _pieces(source: Tensor, along: int) -> int:
    """How many planes across this axis make a piece."""
    return max(1, PIECE * source.shape[along] // source.numel())


def _empty(shape: Sequence[int], axes: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Room in memory with the axes in that order, the last the fastest."""
    room = torch.empty([shape[axis] for axis in axes], dtype=dtype, device="cpu")
    return room.permute([axes.index(axis) for axis in range(3)])


def _slowest_first(voxels: Tensor) -> list[int]:
    """The axes as they lie in memory; what is no axis there, having one voxel, first."""
    return sorted(range(3), key=lambda axis: (voxels.shape[axis] > 1, -voxels.stride()[axis]))


def _at(axis: int, some: slice) -> tuple[slice, ...]:
    return tuple(some if other == axis else slice(None) for other in range(3))


def _cut(size: int, width: int) -> list[slice]:
    return [slice(start, min(start + width, size)) for start in range(0, size, width)]


def _at_once(work: Callable[[Any], None], tasks: Iterator[Any]) -> None:
    """Each task by one thread alone, on as many as torch has been told: so no number depends on how many they are, and
    none waits for another. Products divided among threads took 1.7 times the processor time (2 threads, busy cores)."""
    work = torch.inference_mode()(work)  # threads do not inherit it, and what was made under it asks for it
    threads = torch.get_num_threads()
    for _ in map(work, tasks) if threads == 1 else _threads(threads, os.getpid()).map(work, tasks):
        pass


@lru_cache(maxsize=4)
def _threads(count: int, process: int) -> ThreadPoolExecutor:
    """Threads that divide nothing further, kept for all calls. A forked process has none of its parent's."""
    pool, all_here = ThreadPoolExecutor(count, "resample"), Barrier(count)

    def prepare(_: int) -> None:
        torch.get_num_threads()  # a thread takes over what was told when it is first asked, and never again
        torch.set_num_threads(1)  # of this thread, and of those that begin from now on
        all_here.wait()

    list(pool.map(prepare, range(count)))
    torch.set_num_threads(count)  # so they begin with what was told again
    return pool


# both


@operation("resample")
def _resample(voxels: Tensor, shape: Sequence[int], order: int, separate: int | None, flipped: Sequence[int]) -> Tensor:
    result = torch.empty((len(voxels), *shape), dtype=_kind(voxels), device=voxels.device)
    _carry(voxels, result, _axes(voxels.shape[1:], shape, order, separate, flipped, result.dtype))
    return result


@_resample.register_fake
def _(voxels, shape, order, separate, flipped):
    return torch.empty((len(voxels), *shape), dtype=_kind(voxels), device=voxels.device)


@operation("resample_backward")
def _resample_backward(
    gradient: Tensor, before: Sequence[int], order: int, separate: int | None, flipped: Sequence[int]
) -> Tensor:
    """What reaches each old voxel: the same bands, transposed."""
    result = torch.empty((len(gradient), *before), dtype=gradient.dtype, device=gradient.device)
    after = gradient.shape[1:]
    _carry(gradient, result, _axes(before, after, order, separate, flipped, result.dtype, is_backward=True))
    return result


@_resample_backward.register_fake
def _(gradient, before, order, separate, flipped):
    return torch.empty((len(gradient), *before), dtype=gradient.dtype, device=gradient.device)


def _setup(ctx, inputs, output) -> None:
    voxels, _, *ctx.how = inputs
    ctx.before, ctx.dtype = voxels.shape[1:], voxels.dtype


def _backward(ctx, gradient):
    return _resample_backward(gradient, ctx.before, *ctx.how).to(ctx.dtype), None, None, None, None


_resample.register_autograd(_backward, setup_context=_setup)


def _carry(source: Tensor, target: Tensor, axes: Sequence[_Axis]) -> None:
    if usable(source):
        _carry_by_kernel(source.detach(), target, axes)
    else:
        _carry_by_products(source.detach(), target, axes)


def fused(voxels: Tensor, shape: Shape, order: int, separate: int | None = None, flipped: Sequence[int] = ()) -> Tensor:
    """What `reference` does, in bands. On a CPU there are slabs beside the result, and nothing else."""
    _check(voxels, shape, order, separate, flipped)
    if voxels.device.type != "cpu" and not usable(voxels):
        return reference(voxels, shape, order, separate, flipped)
    return _resample(voxels, shape, order, separate, flipped)


def fill(
    result: Tensor,
    voxels: Tensor,
    order: int,
    separate: int | None = None,
    flipped: Sequence[int] = (),
    product: Product = _by_torch,
    repeats: bool = False,
) -> None:
    """What `fused` gives, in the type and the place of a result that the caller made, both on the CPU. No gradient flows.

    `repeats`: the spline, too, goes on with the edge's value beyond the ends, as scipy's zoom has it with 'nearest'.
    """
    _check(voxels, result.shape[1:], order, separate, flipped)
    assert len(result) == len(voxels) and result.dtype in REACH and result.is_contiguous()
    axes = _axes(voxels.shape[1:], result.shape[1:], order, separate, flipped, result.dtype, repeats=repeats)
    _carry_by_products(voxels, result, axes, product)


def _kind(voxels: Tensor) -> torch.dtype:
    return torch.float64 if voxels.dtype == torch.float64 else torch.float32


def _check(voxels: Tensor, shape: Sequence[int], order: int, separate: int | None, flipped: Sequence[int]) -> None:
    """A kernel trusts its shapes: a wrong one reads memory that is not its own."""
    if voxels.ndim != 4 or len(shape) != 3 or min(*voxels.shape[1:], *shape) < 1:
        raise ValueError(
            f"Voxels {tuple(voxels.shape)} were to be brought to {tuple(shape)}; four axes [C, i, j, k] and three numbers "
            "are needed, at least one voxel along i, j and k before and after. Put channels first."
        )
    if order not in (0, 1, 3):
        raise ValueError(
            f"order {order} was asked for; 0 (nearest), 1 (linear) and 3 (cubic spline) are known. Ask for one of these."
        )
    if separate not in (None, 0, 1, 2) or not set(flipped) <= {0, 1, 2}:
        raise ValueError(
            f"The axis {separate} was to be separate and {tuple(flipped)} flipped; the axes i, j, k are 0, 1, 2. "
            "Count them without the channels."
        )


EXAMPLES: list[dict[str, Any]] = [
    dict(voxels=(2, 5, 4, 6), shape=(3, 7, 9), order=3),  # each axis its own way
    dict(voxels=(1, 2, 3, 40), shape=(3, 2, 70), order=3),  # several blocks, and one axis that shrinks
    dict(voxels=(1, 37, 2, 3), shape=(18, 2, 3), order=3),  # two axes that stay
    dict(voxels=(2, 5, 4, 6), shape=(8, 3, 7), order=1),
    dict(voxels=(2, 3, 5, 4), shape=(5, 2, 7), order=3, separate=1, flipped=(0, 1)),  # slices taken, some left
    dict(voxels=(1, 4, 3, 2), shape=(4, 3, 2), order=3, flipped=(2,)),  # turned round and nothing else
    dict(voxels=(1, 1, 1, 7), shape=(3, 1, 1), order=1),  # axes of one voxel
    dict(voxels=(0, 2, 3, 4), shape=(3, 2, 5), order=0),  # no channel
]


def sample(
    *, dtype: torch.dtype, device: str, voxels: tuple[int, int, int, int], shape: Shape, order: int,
    separate: int | None = None, flipped: tuple[int, ...] = (),
) -> tuple[Tensor, Shape, int, int | None, tuple[int, ...]]:  # fmt: skip
    """Arguments for one example."""
    random = torch.Generator().manual_seed(0)
    scan = torch.randn(voxels, generator=random, dtype=torch.float64).to(device, dtype).requires_grad_()
    return scan, shape, order, separate, flipped
