"""The sums of which Dice, Tversky's index and cross-entropy are made, in one pass over the logits, and their gradient in
one more: no probabilities and no one-hot are kept.

    both[b, l] = Σₙ p·t      found[b, l] = Σₙ p      true[b, l] = Σₙ t
    surprise[b] = Σₙ −log p of what is true          counted[b] = the terms of that sum

Labels exclude each other: p = softmax(z) over the channels, channel 0 is the background, t = 1 where the target has the
label's number. Or, where `membership` [L, P] says which numbers belong to each label, they are regions that overlap:
p = sigmoid(z), a channel each, and the surprise is summed over them too.

logits: [B, K, *space], any float; target: [B, *space], any whole numbers, IGNORE where nobody knows. annotated: [B, L],
the labels that were looked for in each case; None: all. A label that was not is one class with the background where labels
exclude each other (p of what is true is their sum), and is not surprising where they overlap; its sums are 0. A case in
which nothing was looked for is in no sum. Results are float32, or float64 for float64; the last two have no gradient. A
number that no channel has is refused on a CPU; a GPU would have to wait for that, and makes the surprise NaN.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ._library import operation
from ._triton import tl, triton, usable

IGNORE = -1
"""A voxel with this number is nobody's: it is in no sum, and has no gradient."""


class Sums(NamedTuple):
    """An answer beside the truth, summed over the voxels whose truth is known. L labels: the background is none."""

    both: Tensor
    """[B, L]: how much probability each label has where it truly is,"""
    found: Tensor
    """[B, L]: and everywhere."""
    surprise: Tensor
    """[B]: −log of the probability of what is true."""
    true: Tensor
    """[B, L]: of how many voxels each label truly is."""
    counted: Tensor
    """[B]: how many numbers were summed in `surprise`."""


class Voxels(NamedTuple):
    """What the sums are of, voxels in one row."""

    probability: Tensor
    """[B, L, N]: of each label; 0 where it was not looked for and labels exclude each other."""
    surprise: Tensor
    """[B, C, N]: −log of the probability of what is true; C = 1 where labels exclude each other, one per region otherwise."""
    counted: Tensor
    """[B, C, N]: 1 where the truth is known."""


def reference(
    logits: Tensor, target: Tensor, annotated: Tensor | None = None, membership: Tensor | None = None
) -> Sums:
    probability, surprise, counted = by_voxel(logits, target, annotated, membership)
    known = counted.amax(1, keepdim=True)  # [B, 1, N]
    if membership is None:
        membership = functional.pad(torch.eye(logits.shape[1] - 1, device=logits.device), (1, 0))
    truth = membership[:, target.flatten(1).long().clamp_min(0)].movedim(1, 0) * known  # [B, L, N]
    if annotated is not None:
        truth = truth * annotated[:, :, None]
        known = known * annotated[:, :, None]
    return Sums(
        both=(probability * truth).sum(2),
        found=(probability * known).sum(2),
        surprise=(surprise * counted).sum((1, 2)),
        true=truth.sum(2).to(probability.dtype),
        counted=counted.sum((1, 2)),
    )


def by_voxel(
    logits: Tensor, target: Tensor, annotated: Tensor | None = None, membership: Tensor | None = None
) -> Voxels:
    """What a loss needs that looks at each voxel; in plain torch, with all the memory that takes."""
    _check(logits, target, annotated, membership)
    if target.numel() and not target.is_cuda:  # a device must not wait for a look at the values
        _lowest(target, logits.shape[1] if membership is None else membership.shape[1])
    scores = logits.to(_exact(logits.dtype)).flatten(2)  # [B, K, N]
    number, known = target.flatten(1).long().clamp_min(0), (target.flatten(1) >= 0)[:, None]
    if membership is not None:
        there = membership[:, number].movedim(1, 0).to(scores.dtype)
        counted = known.expand(scores.shape) if annotated is None else known & annotated[:, :, None]
        surprise = functional.binary_cross_entropy_with_logits(scores, there, reduction="none")
        return Voxels(scores.sigmoid(), surprise, counted.to(scores.dtype))
    if annotated is not None:
        known = known & annotated.any(1)[:, None, None]
        scores, number = _merged(scores, number, annotated)
    log_probability = functional.log_softmax(scores, dim=1)
    surprise = -log_probability.gather(1, number[:, None])
    return Voxels(log_probability[:, 1:].exp(), surprise, known.to(scores.dtype))


def _merged(scores: Tensor, number: Tensor, annotated: Tensor) -> tuple[Tensor, Tensor]:
    """Labels that were not looked for become one class with the background; in the score of a sum of probabilities
    their scores are summed as exponentials."""
    alone = functional.pad(annotated, (1, 0))  # [B, K]; the background is never alone
    apart = scores.masked_fill(~alone[:, :, None], -math.inf)
    together = scores.masked_fill(alone[:, :, None], -math.inf).logsumexp(1, keepdim=True)
    return torch.cat([together, apart[:, 1:]], dim=1), number * alone.gather(1, number)


@triton.jit
def _tile(
    p_logits, p_target, i_b, i_k, i_n, K, N, stride_b, stride_k, stride_n, stride_tb, stride_tn,
    TYPE: tl.constexpr, REGIONS: tl.constexpr,
):  # fmt: skip
    """Scores [BLOCK_K, BLOCK_N] and numbers [BLOCK_N]; beyond the last voxel nobody knows, beyond the last channel the
    score is as low as can be."""
    mask = (i_k < K)[:, None] & (i_n < N)[None, :]
    at = i_b * stride_b + (i_k * stride_k)[:, None] + (i_n * stride_n)[None, :]
    b_scores = tl.load(p_logits + at, mask=mask, other=0).to(TYPE)
    if not REGIONS:
        b_scores = tl.where((i_k < K)[:, None], b_scores, float("-inf"))
    b_number = tl.load(p_target + i_b * stride_tb + i_n * stride_tn, mask=i_n < N, other=0).to(tl.int32)
    return b_scores, tl.where(i_n < N, b_number, -1)  # −1 after the cast: bytes may have no sign


@triton.jit
def _softmax(b_scores):
    """Shares [BLOCK_K, BLOCK_N], and the log of the summed exponentials [BLOCK_N]."""
    b_top = tl.max(b_scores, 0)
    b_share = tl.exp(b_scores - b_top[None, :])
    b_total = tl.sum(b_share, 0)
    return b_share / b_total[None, :], b_top + tl.log(b_total)


@triton.jit
def _softplus(b_x):
    """log(1 + exp(x)) and sigmoid(x), the first exact where 1 + exp(−|x|) is rounded (Kahan)."""
    b_small = tl.exp(-tl.abs(b_x))
    b_more = 1 + b_small
    b_log = tl.where(b_more == 1, b_small, tl.log(b_more) * (b_small / tl.where(b_more == 1, 1, b_more - 1)))
    return tl.maximum(b_x, 0) + b_log, tl.where(b_x >= 0, 1, b_small) / b_more


@triton.jit
def _regions_at(p_members, b_number, i_k, K, P):
    """Which regions lie at each voxel: [BLOCK_K, BLOCK_N]."""
    mask = (i_k < K)[:, None] & ((b_number >= 0) & (b_number < P))[None, :]
    return tl.load(p_members + (i_k * P)[:, None] + b_number[None, :], mask=mask, other=0) > 0


@triton.jit
def _forward_kernel(
    p_logits, p_target, p_alone, p_members, p_sums, K, N, P, programs,
    stride_b, stride_k, stride_n, stride_tb, stride_tn,
    REGIONS: tl.constexpr, PARTIAL: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = p_sums.dtype.element_ty
    i_b = (tl.program_id(0) // programs).to(tl.int64)
    i_p = (tl.program_id(0) % programs).to(tl.int64)
    i_k = tl.arange(0, BLOCK_K).to(tl.int64)
    b_both = tl.zeros([BLOCK_K], dtype=TYPE)
    b_found = tl.zeros([BLOCK_K], dtype=TYPE)
    b_true = tl.zeros([BLOCK_K], dtype=TYPE)
    b_surprise = tl.zeros([BLOCK_N], dtype=TYPE)
    b_counted = tl.zeros([BLOCK_N], dtype=TYPE)
    b_alone = (i_k < K).to(TYPE)
    if PARTIAL:
        b_alone = tl.load(p_alone + i_b * K + i_k, mask=i_k < K, other=0).to(TYPE)

    for step in range(STEPS):
        i_n = (i_p * STEPS + step) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        b_scores, b_number = _tile(
            p_logits, p_target, i_b, i_k, i_n, K, N, stride_b, stride_k, stride_n, stride_tb, stride_tn, TYPE, REGIONS
        )
        if PARTIAL:  # where nothing was looked for, nobody knows
            b_number = tl.where(tl.sum(b_alone, 0) > 0, b_number, -1)
        b_known = b_number >= 0
        if REGIONS:
            m_there = _regions_at(p_members, b_number, i_k, K, P)
            b_wrong, _ = _softplus(tl.where(m_there, -b_scores, b_scores))
            _, b_share = _softplus(b_scores)
            m_counted = (b_alone > 0)[:, None] & b_known[None, :]
            b_share = tl.where(m_counted, b_share, 0)
            m_there = m_there & m_counted
            b_wrong = tl.sum(tl.where(m_counted, b_wrong, 0), 0)
            b_counted += tl.where(b_known, tl.sum(b_alone, 0), 0)
        else:
            m_there = i_k[:, None] == b_number[None, :]
            b_share, b_log_total = _softmax(b_scores)
            b_truth = tl.sum(tl.where(m_there, b_scores, 0), 0)
            if PARTIAL:
                m_there = m_there & (b_alone > 0)[:, None]
                m_merged = tl.sum(m_there.to(tl.int32), 0) == 0
                _, b_together = _softmax(tl.where((b_alone > 0)[:, None], float("-inf"), b_scores))
                b_truth = tl.where(m_merged, b_together, b_truth)
            b_share = tl.where(b_known[None, :], b_share, 0)
            m_there = m_there & b_known[None, :]
            b_wrong = b_log_total - b_truth
            b_counted += b_known.to(TYPE)
        b_wrong = tl.where(b_number < P, b_wrong, float("nan"))
        b_surprise += tl.where(b_known, b_wrong, 0)
        b_both += tl.sum(tl.where(m_there, b_share, 0), 1)
        b_found += tl.sum(b_share, 1)
        b_true += tl.sum(m_there.to(TYPE), 1)

    p_sums += tl.program_id(0).to(tl.int64) * (3 * K + 2)
    tl.store(p_sums + i_k, b_both, mask=i_k < K)
    tl.store(p_sums + K + i_k, b_found * b_alone, mask=i_k < K)
    tl.store(p_sums + 2 * K + i_k, b_true, mask=i_k < K)
    tl.store(p_sums + 3 * K, tl.sum(b_surprise, 0))
    tl.store(p_sums + 3 * K + 1, tl.sum(b_counted, 0))


@triton.jit
def _backward_kernel(
    p_both, p_found, p_surprise, p_logits, p_target, p_alone, p_members, p_gradient, K, N, P, tiles,
    stride_b, stride_k, stride_n, stride_tb, stride_tn, stride_gb, stride_gk, stride_gn,
    REGIONS: tl.constexpr, PARTIAL: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = p_both.dtype.element_ty
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    i_k = tl.arange(0, BLOCK_K).to(tl.int64)
    i_n = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    b_scores, b_number = _tile(
        p_logits, p_target, i_b, i_k, i_n, K, N, stride_b, stride_k, stride_n, stride_tb, stride_tn, TYPE, REGIONS
    )
    b_both = tl.load(p_both + i_b * K + i_k, mask=i_k < K, other=0)
    b_found = tl.load(p_found + i_b * K + i_k, mask=i_k < K, other=0)
    b_surprise = tl.load(p_surprise + i_b)
    b_alone = (i_k < K).to(TYPE)
    if PARTIAL:
        b_alone = tl.load(p_alone + i_b * K + i_k, mask=i_k < K, other=0).to(TYPE)
        b_number = tl.where(tl.sum(b_alone, 0) > 0, b_number, -1)

    m_known = (b_number >= 0)[None, :]
    if REGIONS:
        m_there = _regions_at(p_members, b_number, i_k, K, P)
        _, b_share = _softplus(b_scores)
        b_pull = b_found[:, None] + tl.where(m_there, b_both[:, None], 0)
        b_gradient = b_share * (1 - b_share) * b_pull + b_surprise * (b_share - m_there.to(TYPE))
        m_known = m_known & (b_alone > 0)[:, None]
    else:
        m_there = i_k[:, None] == b_number[None, :]
        b_share, _ = _softmax(b_scores)
        b_truth = m_there.to(TYPE)
        if PARTIAL:
            m_there = m_there & (b_alone > 0)[:, None]
            b_within, _ = _softmax(tl.where((b_alone > 0)[:, None], float("-inf"), b_scores))
            m_merged = (tl.sum(m_there.to(tl.int32), 0) == 0)[None, :] & (b_alone == 0)[:, None]
            b_truth = tl.where(m_merged, b_within, m_there.to(TYPE))
        b_pull = b_found[:, None] + tl.where(m_there, b_both[:, None], 0)
        b_mean = tl.sum(b_pull * b_share, 0)
        b_gradient = b_share * (b_pull - b_mean[None, :] + b_surprise) - b_surprise * b_truth
    b_gradient = tl.where(m_known, b_gradient, 0)

    mask = (i_k < K)[:, None] & (i_n < N)[None, :]
    to = i_b * stride_gb + (i_k * stride_gk)[:, None] + (i_n * stride_gn)[None, :]
    tl.store(p_gradient + to, b_gradient.to(p_gradient.dtype.element_ty), mask=mask)


@operation("dice_loss")
def _sums(
    logits: Tensor, target: Tensor, annotated: Tensor | None, membership: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`Sums` of logits [B, K, N] and a target [B, N]."""
    if usable(logits):
        return _launch_forward(logits, target, annotated, membership)
    if membership is not None:
        return _regions_in_tiles(logits, target, annotated, membership)
    return _exclusive_in_tiles(logits, target, annotated)


@_sums.register_fake
def _(logits, target, annotated, membership):
    batch, labels = logits.shape[0], logits.shape[1] - (membership is None)
    shapes = (batch, labels), (batch, labels), (batch,), (batch, labels), (batch,)
    return tuple(logits.new_empty(shape, dtype=_exact(logits.dtype)) for shape in shapes)


@operation("dice_loss_backward")
def _pull(
    both: Tensor, found: Tensor, surprise: Tensor, logits: Tensor, target: Tensor, annotated: Tensor | None,
    membership: Tensor | None,
) -> Tensor:  # fmt: skip
    """The logits' gradient, in their type, from those of the sums."""
    if annotated is not None:
        both, found = both * annotated, found * annotated
    if membership is None:  # the background has no sums
        both, found = functional.pad(both, (1, 0)), functional.pad(found, (1, 0))
    weights = both.contiguous(), found.contiguous(), surprise.contiguous()
    if usable(logits):
        return _launch_backward(*weights, logits, target, annotated, membership)
    if membership is not None:
        return _regions_backward_in_tiles(*weights, logits, target, annotated, membership)
    return _exclusive_backward_in_tiles(*weights, logits, target, annotated)


@_pull.register_fake
def _(both, found, surprise, logits, target, annotated, membership):
    return torch.empty_like(logits)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)
    ctx.mark_non_differentiable(*output[3:])


def _backward(ctx, both, found, surprise, *_):
    return _pull(both, found, surprise, *ctx.saved_tensors), None, None, None


_sums.register_autograd(_backward, setup_context=_setup)


def _launch_forward(logits, target, annotated, membership):
    batch, channels, voxels = logits.shape
    exact, steps = _exact(logits.dtype), 8
    blocks = _blocks(channels, exact)
    programs = triton.cdiv(voxels, blocks["BLOCK_N"] * steps)
    sums = logits.new_empty(batch, programs, 3 * channels + 2, dtype=exact)
    if sums.numel():
        alone, members, numbers = _tables(annotated, membership, logits)
        _forward_kernel[(batch * programs,)](
            logits, target, alone, members, sums, channels, voxels, numbers, programs,
            *logits.stride(), *target.stride(), REGIONS=membership is not None, PARTIAL=annotated is not None,
            STEPS=steps, **blocks,
        )  # fmt: skip
    total = sums.sum(1, dtype=torch.float64).to(exact)  # [B, 3K + 2]; always in the same order
    first = 1 if membership is None else 0
    both, found, true = (part[:, first:].clone() for part in total[:, :-2].unflatten(1, (3, channels)).unbind(1))
    return both, found, total[:, -2].clone(), true, total[:, -1].clone()


def _launch_backward(both, found, surprise, logits, target, annotated, membership):
    batch, channels, voxels = logits.shape
    gradient = torch.empty_like(logits)
    blocks = _blocks(channels, both.dtype)
    tiles = triton.cdiv(voxels, blocks["BLOCK_N"])
    if gradient.numel():
        alone, members, numbers = _tables(annotated, membership, logits)
        _backward_kernel[(batch * tiles,)](
            both, found, surprise, logits, target, alone, members, gradient, channels, voxels, numbers,
            tiles, *logits.stride(), *target.stride(), *gradient.stride(), REGIONS=membership is not None,
            PARTIAL=annotated is not None, **blocks,
        )  # fmt: skip
    return gradient


def _blocks(channels: int, exact: torch.dtype) -> dict[str, int]:
    """All channels of a voxel lie in one tile, of 4096 numbers where they can: 32 registers of each of 128 threads."""
    block_k = triton.next_power_of_2(channels)
    block_n = min(1024, max(16, 4096 // block_k))
    is_heavy = block_k * block_n > 4096 or exact == torch.float64
    return dict(BLOCK_K=block_k, BLOCK_N=block_n, num_warps=8 if is_heavy else 4, enable_fp_fusion=True)


def _tables(annotated: Tensor | None, membership: Tensor | None, logits: Tensor) -> tuple[Tensor, Tensor, int]:
    """Small ones, in bytes: who stands alone in each case [B, K], which numbers belong to each channel [K, P], and P."""
    alone = members = logits  # where there are none, nothing is read
    if annotated is not None:
        alone = annotated if membership is not None else functional.pad(annotated, (1, 0))
        alone = alone.to(torch.uint8).contiguous()
    if membership is None:
        return alone, members, logits.shape[1]
    return alone, membership.to(torch.uint8).contiguous(), membership.shape[1]


TILE = 1 << 19
"""Numbers that are worked on at a time on a CPU: 2 MB stay in the caches of two cores."""

TINY = 1e-30
"""The logarithm of a probability below this is taken from the scores: it has lost digits, or is 0."""


def _exclusive_in_tiles(logits: Tensor, target: Tensor, annotated: Tensor | None):
    alone = _alone(annotated)
    both, found, true = (logits.new_zeros(logits.shape[:2], dtype=torch.float64) for _ in range(3))
    surprise, counted = (logits.new_zeros(len(logits), dtype=torch.float64) for _ in range(2))
    one = both.new_ones(())
    for tile, scores, share, _ in _tiles(logits):
        number, weight = _numbers(target[:, tile], logits.shape[1], annotated)
        place = _place(number)
        of_truth = torch.softmax(scores, 1, out=share).flatten(1).gather(1, place)  # [B, n]
        if alone is not None:
            of_truth = of_truth.where(number > 0, torch.bmm((~alone[:, None]).to(share), share)[:, 0])
        is_safe = of_truth.min() > TINY
        log_of_truth = of_truth.log() if is_safe else _log_of_truth(scores, number, place, alone)
        if weight is not None:
            share.mul_(weight[:, None])
            of_truth.mul_(weight)
            log_of_truth.mul_(weight)
        both.scatter_add_(1, number, of_truth.double())
        found += share.sum(2)
        surprise -= log_of_truth.sum(1)
        true.scatter_add_(1, number, one.expand(number.shape) if weight is None else weight.double())
        counted += number.shape[1] if weight is None else weight.sum(1)
    if alone is not None:
        found *= alone
    exact = _exact(logits.dtype)
    both, found, true = (sums[:, 1:].to(exact).contiguous() for sums in (both, found, true))
    return both, found, surprise.to(exact), true, counted.to(exact)


def _log_of_truth(scores: Tensor, number: Tensor, place: Tensor, alone: Tensor | None) -> Tensor:
    log_share = scores.log_softmax(1)
    of_truth = log_share.flatten(1).gather(1, place)
    if alone is None:
        return of_truth
    return of_truth.where(number > 0, log_share.masked_fill(alone[:, :, None], -math.inf).logsumexp(1))


def _exclusive_backward_in_tiles(both, found, surprise, logits, target, annotated):
    """p·(v − Σ v·p) + surprise·(p − t), with v = found + both·t, channel by channel."""
    alone = _alone(annotated)
    gradient = torch.empty_like(logits)
    for tile, scores, share, is_copy in _tiles(logits):
        number, weight = _numbers(target[:, tile], logits.shape[1], annotated)
        place, pull = _place(number), surprise[:, None]  # [B, n], and [B, 1] or [B, n]
        torch.softmax(scores, 1, out=share)
        if weight is not None:
            share.mul_(weight[:, None])
            pull = pull * weight
        within = None if alone is None else scores.masked_fill(alone[:, :, None], -math.inf).softmax(1)
        bonus = share.flatten(1).gather(1, place).mul_(both.gather(1, number))
        mean = torch.bmm(found[:, None], share)[:, 0].add_(bonus)
        work = torch.mul(share, found[:, :, None], out=scores if is_copy else gradient[:, :, tile])
        work.addcmul_(share, torch.sub(pull, mean, out=mean)[:, None])
        bonus.sub_(pull)
        if within is not None:  # background and labels that were not looked for are pulled by their share of the sum
            work.addcmul_(within, (bonus * (number == 0))[:, None])
            bonus.mul_(number > 0)
        work.view(len(work), -1).scatter_add_(1, place, bonus)
        if is_copy:
            gradient[:, :, tile] = work
    return gradient


def _place(number: Tensor) -> Tensor:
    """Where in a part [B, K · n] the number of each voxel lies: [B, n]. As an index along the last axis it is met twice as
    fast as along the second."""
    voxels = number.shape[1]
    return torch.add(torch.arange(voxels, device=number.device), number, alpha=voxels)


def _regions_in_tiles(logits: Tensor, target: Tensor, annotated: Tensor | None, membership: Tensor):
    exact = _exact(logits.dtype)
    members, looked_for = membership.to(exact), _looked_for(annotated, logits)
    both, found, surprise, true = (logits.new_zeros(logits.shape[:2], dtype=torch.float64) for _ in range(4))
    counted = logits.new_zeros(len(logits), dtype=torch.float64)
    for tile, scores, share, _ in _tiles(logits):
        number, weight = _numbers(target[:, tile], membership.shape[1])
        there = _there(members, number)
        wrong = functional.softplus((1 - 2 * there).mul_(scores), threshold=40)
        torch.sigmoid(scores, out=share)
        if weight is not None:
            for each in (share, wrong, there):
                each.mul_(weight[:, None])
        found += share.sum(2)
        both += share.mul_(there).sum(2)
        true += there.sum(2)
        surprise += wrong.sum(2)
        counted += number.shape[1] if weight is None else weight.sum(1)
    both, found, surprise, true = (sums * looked_for for sums in (both, found, surprise, true))
    counted *= looked_for.sum(1)
    both, found, surprise, true, counted = (sums.to(exact) for sums in (both, found, surprise.sum(1), true, counted))
    return both, found, surprise, true, counted


def _regions_backward_in_tiles(both, found, surprise, logits, target, annotated, membership):
    """p·(1 − p)·(found + both·t) + surprise·(p − t), channel by channel."""
    members = membership.to(both.dtype)
    pull = surprise[:, None, None] * _looked_for(annotated, logits)[:, :, None]  # [B, L, 1]
    gradient = torch.empty_like(logits)
    for tile, scores, share, is_copy in _tiles(logits):
        number, weight = _numbers(target[:, tile], membership.shape[1])
        there = _there(members, number)
        torch.sigmoid(scores, out=share)
        work = torch.mul(there, both[:, :, None], out=scores if is_copy else gradient[:, :, tile])
        work.add_(found[:, :, None]).mul_(1 - share).add_(pull).mul_(share).sub_(there.mul_(pull))
        if weight is not None:
            work.mul_(weight[:, None])
        if is_copy:
            gradient[:, :, tile] = work
    return gradient


def _tiles(logits: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, bool]]:
    """The logits [B, K, N] cut along the voxels: where; that part, contiguous and exact; room for another like it; and
    whether the part is a copy, which may be written to. Rooms are the same for all parts: fresh memory costs more than
    what is written to it."""
    batch, channels, voxels = logits.shape
    if not logits.numel():
        return
    exact = _exact(logits.dtype)
    step = min(voxels, max(64, TILE // (batch * channels) // 64 * 64))
    is_copy = not (logits[:, :, :step].is_contiguous() and logits.dtype == exact)
    rooms = logits.new_empty(1 + is_copy, batch * channels * step, dtype=exact)
    for start in range(0, voxels, step):
        part = logits[:, :, start : start + step]
        room, *copy = rooms[:, : part.numel()].view(-1, *part.shape)
        yield slice(start, start + step), copy[0].copy_(part) if is_copy else part, room, is_copy


def _numbers(target: Tensor, numbers: int, annotated: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Which channel is true at each voxel [B, n], 0 where nobody knows; and 1 where it is known, else 0. None: known
    everywhere."""
    number = target.long()
    if _lowest(number, numbers) >= 0 and annotated is None:
        return number, None
    known, number = number >= 0, number.clamp_min(0)
    if annotated is not None:
        number *= functional.pad(annotated, (1, 0)).gather(1, number)
        known &= annotated.any(1, keepdim=True)
    return number, known.float()


def _lowest(target: Tensor, numbers: int) -> int:
    """The lowest label; one without a channel is refused."""
    lowest, highest = (int(value) for value in target.aminmax())
    if lowest < IGNORE or highest >= numbers:
        raise ValueError(
            f"Labels from {lowest} to {highest} were met; {numbers} classes allow 0 to {numbers - 1}, and {IGNORE} to "
            "ignore a voxel. Renumber the labels."
        )
    return lowest


def _there(members: Tensor, number: Tensor) -> Tensor:
    """1 where a region is, else 0: [B, L, n]."""
    return members.index_select(1, number.flatten()).view(-1, *number.shape).movedim(1, 0)


def _alone(annotated: Tensor | None) -> Tensor | None:
    """Which channels are a class of their own in each case [B, K]: the background and labels that were not looked for
    are one. None: each channel, in all cases."""
    return None if annotated is None or annotated.all() else functional.pad(annotated, (1, 0))


def _looked_for(annotated: Tensor | None, logits: Tensor) -> Tensor:
    exact = _exact(logits.dtype)
    return logits.new_ones(logits.shape[:2], dtype=exact) if annotated is None else annotated.to(exact)


def _exact(dtype: torch.dtype) -> torch.dtype:
    """Half precision is summed in single precision."""
    return dtype if dtype == torch.float64 else torch.float32


def fused(logits: Tensor, target: Tensor, annotated: Tensor | None = None, membership: Tensor | None = None) -> Sums:
    """What `reference` gives, in one pass over the logits, on a CPU in parts that stay in its cache; the gradient is
    one more."""
    _check(logits, target, annotated, membership)
    return Sums(*_sums(logits.flatten(2), target.flatten(1), annotated, membership))


def _check(logits: Tensor, target: Tensor, annotated: Tensor | None, membership: Tensor | None) -> None:
    """A kernel trusts its shapes: a wrong one reads memory that is not its own."""
    batch, channels = logits.shape[:2]
    if membership is None and channels < 2:
        raise ValueError(
            f"Logits of {channels} class were given; the background and at least one label are needed. "
            "Build the network with classes = labels + 1."
        )
    if membership is not None and channels != len(membership):
        raise ValueError(
            f"Logits of {channels} channels were given for {len(membership)} regions; one channel for each is needed. "
            "Build the network with classes = regions."
        )
    if logits.ndim < 3 or target.shape != (batch, *logits.shape[2:]) or target.is_floating_point():
        raise ValueError(
            f"Logits {tuple(logits.shape)} were given with a target {tuple(target.shape)} of {target.dtype}; a whole "
            "number is needed for each case and voxel. Leave out the target's channel axis."
        )
    labels = channels - 1 if membership is None else channels
    if annotated is not None and annotated.shape != (batch, labels):
        raise ValueError(
            f"Annotated labels {tuple(annotated.shape)} were given for {batch} cases of {labels} labels; one truth value "
            "is needed for each case and label. The background has none."
        )
    devices = {str(each.device) for each in (logits, target, annotated, membership) if each is not None}
    if len(devices) > 1:
        raise ValueError(f"Arguments lie on {sorted(devices)}; all must lie on one device. Move them there first.")


EXAMPLES = [
    dict(batch=2, channels=5, space=(3, 5, 7)),
    dict(batch=2, channels=40, space=(9, 11, 13), ignored=0.2),  # several steps of several programs
    dict(batch=3, channels=4, space=(6, 5), ignored=0.1, annotated=((1, 0, 1), (0, 0, 0), (1, 1, 1))),
    dict(batch=2, channels=3, space=(2, 9, 5), regions=True, ignored=0.2),
    dict(batch=2, channels=3, space=(11,), regions=True, annotated=((1, 0, 1), (0, 0, 0))),
    dict(batch=1, channels=2, space=(1, 1, 1)),
    dict(batch=2, channels=2, space=(4, 4), ignored=1.0),  # nothing is known
    dict(batch=2, channels=3, space=(0, 4)),  # nothing is there
]


def sample(
    *, dtype: torch.dtype, device: str, batch: int, channels: int, space: tuple[int, ...], ignored: float = 0,
    annotated: tuple[tuple[int, ...], ...] | None = None, regions: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Arguments for one example; regions lie within each other."""
    random = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(batch, channels, *space, generator=random, dtype=torch.float64)
    numbers = channels + 1 if regions else channels
    target = torch.randint(numbers, (batch, *space), generator=random)
    target[torch.rand(target.shape, generator=random) < ignored] = -1
    return (
        logits.to(device, dtype).requires_grad_(),
        target.to(device),
        None if annotated is None else torch.tensor(annotated, device=device).bool(),
        torch.ones(channels, numbers, device=device).triu(1).bool() if regions else None,
    )
