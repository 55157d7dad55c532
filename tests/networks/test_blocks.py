"""The parts networks are made of, against torch's own."""

import pytest
import torch
from torch import nn

from networks.parts.blocks import InstanceNorm, ResidualBlock


@pytest.mark.parametrize(
    "order", [torch.contiguous_format, torch.channels_last_3d], ids=["channels_first", "channels_last"]
)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 6), (1, 16, 2, 1, 3), (3, 1, 5, 1, 1)])
def test_the_norm_and_its_gradients_are_those_of_torch(shape, order) -> None:
    torch.manual_seed(0)
    ours, known = InstanceNorm(shape[1]).double(), nn.InstanceNorm3d(shape[1], affine=True).double()
    nn.init.normal_(ours.weight)
    nn.init.normal_(ours.bias)
    known.load_state_dict(ours.state_dict())
    x = (3 + 2 * torch.randn(shape, dtype=torch.float64)).contiguous(memory_format=order)
    results = []
    for norm in (ours, known):
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        y.backward(torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
        results.append((y, leaf.grad, norm.weight.grad, norm.bias.grad))
    for mine, torchs in zip(*results, strict=True):
        torch.testing.assert_close(mine, torchs)


def test_the_gradient_of_the_norm_is_the_slope_of_its_values() -> None:
    norm = InstanceNorm(2).double()
    x = torch.randn(2, 2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w, b: nn.functional.leaky_relu_(torch.func.functional_call(
        norm, {"weight": w, "bias": b}, (x,)), 0.1), (x, norm.weight, norm.bias))  # fmt: skip


def test_in_float32_the_gradient_of_the_norm_bears_a_mean_far_from_zero() -> None:
    x = 100 + torch.randn(1, 4, 16, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slope = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaf = x.to(dtype).requires_grad_()
        InstanceNorm(4).to(dtype)(leaf).backward(slope.to(dtype))
        gradients.append(leaf.grad.double())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-3)


def test_the_norm_of_one_voxel_is_its_shift() -> None:
    norm = InstanceNorm(4)
    nn.init.constant_(norm.bias, 0.5)
    torch.testing.assert_close(
        norm(torch.randn(1, 4, 1, 1, 1, requires_grad=True)), torch.full((1, 4, 1, 1, 1), 0.5), rtol=0, atol=1e-3
    )
    torch.testing.assert_close(norm(torch.randn(1, 4, 1, 1, 1)), torch.full((1, 4, 1, 1, 1), 0.5), rtol=0, atol=1e-3)


def test_channels_stay_last_through_a_block() -> None:
    block = ResidualBlock(4, 8, (3, 3, 3), (2, 2, 2)).to(memory_format=torch.channels_last_3d)
    y = block(torch.randn(2, 4, 8, 8, 8).contiguous(memory_format=torch.channels_last_3d))
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
