"""The sums of the losses: any shapes and labels against the reference, and how much memory they take."""

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from kernels import dice_loss
from kernels._triton import usable
from kernels.dice_loss import IGNORE, Sums, fused, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
QUIET = settings(deadline=None, max_examples=60, derandomize=True, database=None)
REGIONS = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]], device=DEVICE).bool()


@QUIET
@given(data=st.data())
def test_whatever_the_shapes_and_labels_sums_and_gradients_are_the_references(data) -> None:
    batch, channels = data.draw(st.integers(0, 3)), data.draw(st.integers(2, 9))
    space = tuple(data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=3)))
    kind = data.draw(st.sampled_from([torch.int64, torch.int32, torch.int16, torch.int8]))
    torch.manual_seed(data.draw(st.integers(0, 999)))
    membership = torch.rand(channels, 5, device=DEVICE) < 0.5 if data.draw(st.booleans()) else None
    labels, numbers = (channels - 1, channels) if membership is None else (channels, 5)
    annotated = torch.rand(batch, labels, device=DEVICE) < data.draw(st.sampled_from([0, 0.5, 1]))
    target = torch.randint(numbers, (batch, *space), device=DEVICE)
    target[torch.rand(target.shape, device=DEVICE) < data.draw(st.sampled_from([0, 0.3, 1]))] = IGNORE
    logits = data.draw(st.sampled_from([0, 1, 30])) * torch.randn(batch, channels, *space, device=DEVICE)
    rest = (target.to(kind), annotated if data.draw(st.booleans()) else None, membership)
    found, pulls = sums_and_gradient(fused, logits, *rest)
    known, expected = sums_and_gradient(reference, logits.double(), *rest)
    for one, other in zip([*found, pulls], [*known, expected], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=2e-6)


def sums_and_gradient(function, logits: torch.Tensor, *rest) -> tuple[Sums, torch.Tensor]:
    """The gradient is that of the sums, each weighed as it likes."""
    leaf = logits.detach().requires_grad_()
    sums = function(leaf, *rest)
    weights = torch.Generator().manual_seed(0)
    total = sum((sum_ * torch.rand(sum_.shape, generator=weights).to(sum_)).sum() for sum_ in sums[:3])
    return Sums(*(sum_.detach() for sum_ in sums)), torch.autograd.grad(total, leaf)[0]


@pytest.mark.skipif(INTERPRETED, reason="minutes of the interpreter for what random shapes show above")
@pytest.mark.parametrize("example", dice_loss.EXAMPLES[2:6])
def test_gradients_are_those_of_finite_differences(example) -> None:
    logits, *rest = dice_loss.sample(dtype=torch.float64, device=DEVICE, **example)
    assert torch.autograd.gradcheck(lambda x: fused(x, *rest)[:3], logits)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("example", dice_loss.EXAMPLES[2:5])
def test_its_other_forms_keep_torchs_own_rules_too(example, dtype) -> None:
    logits, target, *rest = dice_loss.sample(dtype=dtype, device=DEVICE, **example)
    flat = logits.detach().flatten(2).requires_grad_()
    torch.library.opcheck(dice_loss._sums, (flat, target.flatten(1), *rest))


@pytest.mark.parametrize("number", range(3))
def test_each_sum_has_a_gradient_of_its_own(number) -> None:
    logits, *rest = dice_loss.sample(dtype=torch.float64, device=DEVICE, **dice_loss.EXAMPLES[2])
    found, known = (torch.autograd.grad(of(logits, *rest)[number].sum(), logits)[0] for of in (fused, reference))
    torch.testing.assert_close(found, known)


def test_the_number_of_voxels_has_no_gradient() -> None:
    sums = fused(*dice_loss.sample(dtype=torch.float32, device=DEVICE, **dice_loss.EXAMPLES[0]))
    assert not sums.true.requires_grad and not sums.counted.requires_grad


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_a_label_map_of_fewer_bytes_says_the_same(dtype) -> None:
    logits, target, *_ = dice_loss.sample(dtype=torch.float32, device=DEVICE, **dice_loss.EXAMPLES[0])
    for one, other in zip(fused(logits, target.to(dtype)), fused(logits, target), strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(INTERPRETED, reason="what is cut in parts is the path without a kernel")
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_parts_are_as_good_as_one(monkeypatch, dtype, last) -> None:
    for example in dice_loss.EXAMPLES[:5]:
        logits, *rest = dice_loss.sample(dtype=dtype, device=DEVICE, **example)
        if last:
            logits = logits.detach().movedim(1, -1).contiguous().movedim(-1, 1)
        whole, expected = sums_and_gradient(fused, logits, *rest)
        monkeypatch.setattr(dice_loss, "TILE", 64)
        parts, found = sums_and_gradient(fused, logits, *rest)
        monkeypatch.undo()
        for one, other in zip([*parts, found], [*whole, expected], strict=True):
            torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-6)


def test_a_probability_too_small_to_be_a_number_is_still_as_surprising_as_it_is() -> None:
    logits = torch.tensor([[[0.0, 400.0]], [[300.0, 0.0]], [[0.0, 0.0]]], device=DEVICE).movedim(0, 1)  # [1, 3, 2]
    target = torch.tensor([[0, 1]], device=DEVICE)
    assert fused(logits, target).surprise.item() == pytest.approx(700)
    merged = fused(logits, target, torch.tensor([[True, False]], device=DEVICE))
    assert merged.surprise.item() == pytest.approx(700 - math.log(2), abs=1e-3)
    assert fused(logits, target, None, REGIONS).surprise.item() == pytest.approx(300 + 4 * math.log(2))


def test_a_region_that_is_surely_absent_is_found_nowhere_not_hardly_anywhere() -> None:
    """1 − sigmoid rounds to 0 or to 1e-7; a million voxels of 1e-7 are a tenth of a voxel."""
    logits = torch.full((1, 3, 1000), -30.0, device=DEVICE)
    sums = fused(logits, torch.zeros(1, 1000, dtype=torch.int64, device=DEVICE), None, REGIONS)
    expected = torch.tensor(1000 * math.exp(-30.0), device=DEVICE)
    torch.testing.assert_close(sums.found, expected.expand(1, 3), rtol=1e-5, atol=0)
    torch.testing.assert_close(sums.surprise, 3 * expected[None], rtol=1e-5, atol=0)


@pytest.mark.parametrize("membership", [None, REGIONS], ids=["exclusive", "regions"])
def test_a_number_that_no_channel_has_is_refused_or_makes_the_loss_no_number(membership) -> None:
    logits, target = torch.zeros(1, 3, 5, device=DEVICE), torch.tensor([[0, 1, 2, 4, 0]], device=DEVICE)
    if usable(logits):
        assert fused(logits, target, None, membership).surprise.isnan().all()
    else:
        with pytest.raises(ValueError, match="Renumber"):
            fused(logits, target, None, membership)
        with pytest.raises(ValueError, match="Renumber"):
            fused(logits, target - 3, None, membership)


def test_arguments_that_do_not_fit_are_refused() -> None:
    logits, target = torch.zeros(2, 3, 4, 5, device=DEVICE), torch.zeros(2, 4, 5, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="channel axis"):
        fused(logits, target[:, None])
    with pytest.raises(ValueError, match="whole number"):
        fused(logits, target.float())
    with pytest.raises(ValueError, match="2 cases of 2 labels"):
        fused(logits, target, torch.ones(2, 3, device=DEVICE).bool())
    with pytest.raises(ValueError, match="one channel for each"):
        fused(logits, target, None, REGIONS[:2])
    with pytest.raises(ValueError, match="background"):
        fused(logits[:, :1], target)


@pytest.mark.filterwarnings("ignore")  # of a profiler that looks for a GPU
@pytest.mark.skipif(INTERPRETED or DEVICE != "cpu", reason="counted by the allocator of the CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward_take_little_more_memory_than_the_gradient(dtype) -> None:
    logits = torch.randn(1, 118, 40, 40, 48).to(dtype).requires_grad_()
    target = torch.randint(118, (1, 40, 40, 48), dtype=torch.uint8)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        sums = fused(logits, target)
        (sums.both.sum() + sums.found.sum() + sums.surprise.sum()).backward()
    now = most = 0
    for event in watched.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    assert logits.nbytes <= most <= 1.3 * logits.nbytes
