"""Channel attention: what published networks compute, and sums that half precision cannot hold."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import channel_attention
from kernels._triton import usable
from kernels.channel_attention import fused, reference

FIXTURES = Path(os.environ.get("HILUM_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "fixtures"
DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"


def published(name: str) -> dict[str, torch.Tensor]:
    """Inputs, weights and results of the authors' own module, drawn at random."""
    if not (FIXTURES / name).is_file():
        pytest.skip(f"the numbers of published modules ({name}) are not on this machine")
    with np.load(FIXTURES / name) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def test_it_is_the_channel_attention_of_the_self_guided_network() -> None:
    arrays = published("msa/cam.npz")
    x, gamma = arrays["x"].requires_grad_(), arrays["w_gamma"].requires_grad_()
    y = fused(x, gamma)
    torch.testing.assert_close(y, arrays["y"], rtol=1e-5, atol=1e-5)
    dx, dgamma = torch.autograd.grad((y * arrays["cot"]).sum(), [x, gamma])
    torch.testing.assert_close(dx, arrays["grad_x"], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(dgamma, arrays["grad_gamma"], rtol=1e-4, atol=1e-4)


def test_it_is_the_channel_attention_of_the_query_token_network() -> None:
    arrays = published("qtseg/cab.npz")
    torch.testing.assert_close(fused(arrays["x"], arrays["w_gamma"]), arrays["y"], rtol=1e-5, atol=1e-5)


def test_sums_that_float16_cannot_hold_do_not_overflow() -> None:
    x = torch.full((1, 2, 5000), 8.0, dtype=torch.float16, device=DEVICE)  # X Xᵀ is 320,000: float16 ends at 65,504
    x[:, 1] = -8.0
    x.requires_grad_()
    gamma = torch.ones((), device=DEVICE, requires_grad=True)
    found = fused(x, gamma)
    torch.testing.assert_close(found, torch.zeros_like(found))  # each takes its opposite, and adds it
    dx, dgamma = torch.autograd.grad(found.sum(), [x, gamma])
    torch.testing.assert_close(dx, torch.full_like(dx, 2.0))
    assert dgamma.isfinite()


def test_gradients_whose_sums_leave_float16_are_finite_and_right() -> None:
    random = torch.Generator().manual_seed(0)
    x = (torch.randn(1, 3, 3000, generator=random) + 2).to(DEVICE, torch.float16).requires_grad_()
    gamma = torch.ones((), device=DEVICE)
    weighting = (torch.rand(1, 3, 3000, generator=random) * 64).half().to(DEVICE)  # as a gradient scaler makes them
    exact = x.detach().double().requires_grad_()
    scale = 1e-4
    (found,) = torch.autograd.grad((fused(x, gamma, scale) * weighting).float().sum(), x)
    (expected,) = torch.autograd.grad((reference(exact, gamma.double(), scale) * weighting.double()).sum(), exact)
    torch.testing.assert_close(found.double(), expected, rtol=5e-3, atol=0.3)


def test_the_sign_says_who_counts_most() -> None:
    x = torch.tensor([[[3.0, 0.0], [3.0, 0.0], [0.0, 3.0]]], device=DEVICE)  # the third is like neither of the others
    one = torch.ones(1, device=DEVICE)
    least, most = fused(x, one) - x, fused(x, one, scale=1.0) - x
    torch.testing.assert_close(least[0, 0], x[0, 2], rtol=0, atol=2e-3)
    torch.testing.assert_close(most[0, 0], x[0, 0], rtol=0, atol=2e-3)


def test_the_result_and_its_gradient_lie_in_memory_as_x_does() -> None:
    x = torch.rand(2, 3, 4, 5, 6, device=DEVICE).contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    found = fused(x, torch.ones(1, device=DEVICE))
    assert found.stride() == x.stride()
    assert torch.autograd.grad(found.sum(), x)[0].stride() == x.stride()


@pytest.mark.skipif(not usable(torch.zeros(1)), reason="parts are what the kernels sum")
def test_parts_of_space_are_summed_once_each() -> None:
    x = torch.ones(1, 2, 2000, device="cuda" if DEVICE == "cuda" else "cpu")
    parts = channel_attention._products(x, x)
    assert parts.shape[1] > 1
    assert (parts.sum(1) == 2000).all()


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(0, 3), channels=st.integers(1, 20), places=st.integers(0, 90), seed=st.integers(0, 9))
def test_shuffled_places_shuffle_the_result_and_shuffled_channels_too(batch, channels, places, seed) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, places, generator=random, dtype=torch.float64).to(DEVICE)
    gamma = torch.tensor(0.7, dtype=torch.float64, device=DEVICE)
    found = fused(x, gamma, scale=-0.1)
    place, channel = (torch.randperm(n, generator=random).to(DEVICE) for n in (places, channels))
    torch.testing.assert_close(fused(x[:, :, place], gamma, scale=-0.1), found[:, :, place])
    torch.testing.assert_close(fused(x[:, channel], gamma, scale=-0.1), found[:, channel])


@pytest.mark.parametrize(("shape", "gammas"), [((2, 3), 1), ((2, 3, 4), 2)])
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, ...], gammas: int) -> None:
    with pytest.raises(ValueError, match="one number"):
        fused(torch.zeros(shape, device=DEVICE), torch.zeros(gammas, device=DEVICE))


def test_whole_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="float"):
        fused(torch.zeros(1, 2, 3, dtype=torch.int64, device=DEVICE), torch.zeros(1, device=DEVICE))
