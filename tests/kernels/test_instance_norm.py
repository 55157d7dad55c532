"""Instance norm at its edges: means far from zero, tiles, many programs, memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from kernels import instance_norm
from kernels._triton import AVAILABLE
from kernels.instance_norm import fused, reference

ORDERS = pytest.mark.parametrize(
    "order", [torch.contiguous_format, torch.channels_last_3d], ids=["channels_first", "channels_last"]
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@ORDERS
def test_it_is_torchs_instance_norm_an_addition_and_torchs_leaky_relu(order) -> None:
    x, added = (drawn(2, 3, 4, 5, 6, seed=seed).contiguous(memory_format=order) for seed in (1, 2))
    norm = nn.InstanceNorm3d(3, affine=True).double()
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    known = functional.leaky_relu(norm(x) + added, 0.01)
    torch.testing.assert_close(fused(x, norm.weight, norm.bias, added, 0.01), known)


@ORDERS
@pytest.mark.parametrize("mean", [0, 1e2, 1e4])
def test_a_mean_far_from_zero_costs_no_digits(order, mean) -> None:
    """float32 keeps 1e4 to the thousandth: what is lost there is lost before the norm sees it."""
    x = (mean + drawn(1, 4, 40, 30, 20)).float().contiguous(memory_format=order)
    torch.testing.assert_close(fused(x).double(), reference(x.double()), rtol=0, atol=1e-5 + 1e-6 * mean)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 20), *[st.integers(1, 7)] * 3),
    last=st.booleans(),
    residual=st.booleans(),
    slope=st.sampled_from([0.0, 0.01, 1.0]),
)
def test_whatever_the_shape_it_says_what_the_reference_says(shape, last, residual, slope) -> None:
    order = torch.channels_last_3d if last else torch.contiguous_format
    found = []
    for norm in (fused, reference):
        x, added = (drawn(*shape, seed=seed).contiguous(memory_format=order).requires_grad_() for seed in (1, 2))
        weight, bias = (drawn(shape[1], seed=seed).requires_grad_() for seed in (3, 4))
        y = norm(x, weight, bias, added if residual else None, slope)
        y.backward(drawn(*shape, seed=5))
        found.append([y, x.grad, weight.grad, bias.grad, *([added.grad] if residual else [])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_tiles_do_not_show(monkeypatch: pytest.MonkeyPatch, dtype) -> None:
    whole, cut = [], []
    for results, tile in ((whole, instance_norm.TILE), (cut, 600)):
        monkeypatch.setattr(instance_norm, "TILE", tile)
        x = drawn(2, 6, 8, 9, 10).to(dtype).contiguous(memory_format=torch.channels_last_3d).requires_grad_()
        weight = drawn(6).requires_grad_()
        y = fused(x, weight, None, x.detach().roll(1, 2), 0.01)
        y.backward(drawn(*x.shape, seed=1).to(dtype))
        results += [y.detach(), x.grad, weight.grad]
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2 if dtype == torch.bfloat16 else 1e-9)


@pytest.mark.skipif(not AVAILABLE, reason="triton has no wheel for this machine")
@pytest.mark.parametrize("programs", [1, 7, 2048])
def test_programs_share_the_voxels_without_gap_or_overlap(monkeypatch: pytest.MonkeyPatch, programs) -> None:
    monkeypatch.setattr(instance_norm, "PROGRAMS", programs)
    for shape in ((2, 3, 100_000), (1, 1, 1), (4, 70, 33), (1, 320, 216)):
        for x in (torch.empty(shape), torch.empty(shape[0], shape[2], shape[1]).mT):
            steps, splits, count, block = instance_norm._shares(x)
            share = steps * block["BLOCK_N"]
            assert splits * share >= shape[2] > (splits - 1) * share
            assert count == splits * shape[0] * -(-shape[1] // block["BLOCK_C"])
            assert block["BLOCK_N"] * block["BLOCK_C"] <= 2048


@ORDERS
def test_the_result_and_its_gradient_lie_as_what_was_given(order) -> None:
    x = drawn(2, 4, 3, 5, 6).contiguous(memory_format=order).requires_grad_()
    y = fused(x, slope=0.01)
    assert y.is_contiguous(memory_format=order)
    (gradient,) = torch.autograd.grad(y, x, drawn(*x.shape))
    assert gradient.is_contiguous(memory_format=order)


def test_what_it_was_given_is_kept_for_backward_and_its_result_where_something_was_added() -> None:
    kept: list[Tensor] = []
    x, added = (drawn(2, 4, 3, 5, 6, seed=seed).requires_grad_() for seed in (1, 2))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = fused(x, None, None, added, 0.01)
        fused(x, slope=0.01)
    large = [tensor.data_ptr() for tensor in kept if tensor.numel() == x.numel()]
    assert large == [x.data_ptr(), y.data_ptr(), x.data_ptr()]


def test_the_result_may_be_changed_in_place() -> None:
    """As networks of others do: their ReLU follows our norm."""
    x = drawn(1, 2, 3, 4, 5).contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    functional.relu_(fused(x)).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")  # deprecated, and still what others load
def test_a_traced_network_knows_nothing_of_our_operations() -> None:
    class Norm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fused(x, slope=0.01)

    graph = torch.jit.trace(Norm(), drawn(1, 2, 3, 4, 5))
    assert "hilum::" not in str(graph.graph), "a folder of that name may stand in it"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((torch.zeros(2, 3), None, None, None, 1.0), "axes that are missing"),
        ((torch.zeros(2, 3, 4), torch.ones(4), None, None, 1.0), "as many channels"),
        ((torch.zeros(2, 3, 4), None, None, torch.zeros(2, 3, 5), 1.0), "both must be alike"),
        ((torch.zeros(2, 3, 4), None, None, None, -0.1), "0 or more"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, word) -> None:
    with pytest.raises(ValueError, match=word):
        fused(*arguments)
