"""Position attention: what published networks compute, layouts without copies, and how little is kept."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import conv2d, conv3d, linear

from kernels._triton import usable
from kernels.position_attention import fused, reference, sample

FIXTURES = Path(os.environ.get("HILUM_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "fixtures"
SEEN = dict(rtol=1e-5, atol=1e-5)
"""What the fixtures' own pages ask of another implementation."""

DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"

plain = pytest.mark.skipif(usable(torch.zeros(1)), reason="counts what plain torch allocates on the CPU")


def published(name: str) -> dict[str, torch.Tensor]:
    """Inputs, weights and results of the authors' own module, drawn at random."""
    if not (FIXTURES / name).is_file():
        pytest.skip(f"the numbers of published modules ({name}) are not on this machine")
    with np.load(FIXTURES / name) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def attended(x: torch.Tensor, arrays: dict[str, torch.Tensor], gamma: torch.Tensor) -> torch.Tensor:
    """A position attention module around a map, as the networks have it."""
    project = {4: conv2d, 5: conv3d}[x.ndim]
    q, k, v = (
        project(x, arrays[f"w_{kind}_conv.weight"], arrays[f"w_{kind}_conv.bias"]) for kind in ("query", "key", "value")
    )
    tokens = [values.flatten(2).mT for values in (q, k, v)]
    return fused(*tokens, gamma, x.flatten(2).mT).mT.reshape(x.shape)


@pytest.mark.parametrize("name", ["msa/pam.npz", "mpunet/pam3d.npz"])
def test_it_is_the_position_attention_of_published_networks(name: str) -> None:
    arrays = published(name)
    x, gamma = arrays["x"].requires_grad_(), arrays["w_gamma"].requires_grad_()
    y = attended(x, arrays, gamma)
    torch.testing.assert_close(y, arrays["y"], **SEEN)
    dx, dgamma = torch.autograd.grad((y * arrays["cot"]).sum(), [x, gamma])
    torch.testing.assert_close(dx, arrays["grad_x"], **SEEN)
    if "grad_gamma" in arrays:
        torch.testing.assert_close(dgamma, arrays["grad_gamma"], rtol=1e-4, atol=1e-4)


def test_the_weights_behind_queries_keys_and_values_learn_as_published() -> None:
    arrays = published("msa/pam.npz")
    names = [f"{kind}_conv.{part}" for kind in ("query", "key", "value") for part in ("weight", "bias")]
    weights = [arrays[f"w_{name}"].requires_grad_() for name in names]
    y = attended(arrays["x"], arrays, arrays["w_gamma"])
    for name, found in zip(names, torch.autograd.grad((y * arrays["cot"]).sum(), weights), strict=True):
        torch.testing.assert_close(found, arrays[f"grad_{name}"], rtol=1e-4, atol=2e-5)


def test_rows_of_an_image_as_heads_are_the_published_row_attention() -> None:
    arrays = published("mcads/row_attention.npz")
    pixels = arrays["x"].movedim(1, -1)  # [B, H, W, C]: a batch axis, heads, tokens, width
    q, k, v = (linear(pixels, arrays[f"w_{name}.weight"], arrays[f"w_{name}.bias"]) for name in "qkv")
    torch.testing.assert_close(fused(q, k, v).movedim(-1, 1), arrays["y"], **SEEN)


def test_logits_in_the_thousands_choose_one_key_and_overflow_nothing() -> None:
    q = torch.tensor([[[3000.0], [-3000.0]]], device=DEVICE, requires_grad=True)
    k = torch.tensor([[[1.0], [-1.0], [0.5]]], device=DEVICE)
    v = torch.tensor([[[10.0], [20.0], [30.0]]], device=DEVICE)
    found = fused(q, k, v)
    torch.testing.assert_close(found.flatten(), torch.tensor([10.0, 20.0], device=DEVICE))
    assert not torch.autograd.grad(found.sum(), q)[0].any()


def test_half_precision_tokens_are_summed_in_float32() -> None:
    # 4,096 equal shares of ones: in float16 the sum of the shares would stop growing at 2,048
    tokens = torch.zeros(1, 4096, 1, dtype=torch.float16, device=DEVICE)
    found = fused(tokens[:, :2], tokens, torch.ones_like(tokens))
    torch.testing.assert_close(found, torch.ones_like(found), rtol=0, atol=1e-3)


def test_the_result_has_the_type_of_x_or_else_of_the_values() -> None:
    q, k, v = (torch.ones(1, 3, 2, dtype=torch.float16, device=DEVICE) for _ in range(3))
    gamma = torch.ones(1, device=DEVICE)
    assert fused(q, k, v, gamma).dtype == torch.float16
    assert fused(q, k, v, gamma, torch.ones(1, 3, 2, device=DEVICE)).dtype == torch.float32
    assert fused(q.float(), k, v).dtype == torch.float32


def test_a_map_gives_its_tokens_and_takes_the_result_without_a_copy() -> None:
    q, k, v, x = (torch.rand(2, width, 3, 4, 5, device=DEVICE).flatten(2).mT for width in (2, 2, 6, 6))
    found = fused(q, k, v, torch.ones(1, device=DEVICE), x)
    assert found.stride() == x.stride()
    assert found.mT.reshape(2, 6, 3, 4, 5).data_ptr() == found.data_ptr()
    dq, dv = torch.autograd.grad(fused(q.requires_grad_(), k, v.requires_grad_()).sum(), [q, v])
    assert (dq.stride(), dv.stride()) == (q.stride(), v.stride())


def test_gamma_at_its_start_of_zero_still_learns() -> None:
    q, k, v, gamma, x, scale = sample(
        dtype=torch.float64, device=DEVICE, batch=(1,), queries=5, keys=5, d=2, c=3
    )  # fmt: skip
    gamma = torch.zeros_like(gamma).requires_grad_()
    dgamma, dq = torch.autograd.grad(fused(q, k, v, gamma, x, scale).square().sum(), [gamma, q])
    expected = torch.autograd.grad(reference(q, k, v, gamma, x, scale).square().sum(), gamma)[0]
    torch.testing.assert_close(dgamma, expected)
    assert dgamma != 0
    assert not dq.any()


@settings(max_examples=25, deadline=None)
@given(queries=st.integers(0, 70), keys=st.integers(0, 70), d=st.integers(1, 20), c=st.integers(1, 20), data=st.data())
def test_shuffled_keys_change_nothing_and_shares_sum_to_one(queries, keys, d, c, data) -> None:
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    q, k, v = (torch.randn(1, *n, generator=random, dtype=torch.float64) for n in ((queries, d), (keys, d), (keys, c)))
    q, k, v = (values.to(DEVICE) for values in (q, k, v))
    order = torch.randperm(keys, generator=random).to(DEVICE)
    found = fused(q, k, v)
    torch.testing.assert_close(found, fused(q, k[:, order], v[:, order]))
    torch.testing.assert_close(fused(q, k, torch.ones_like(v)), torch.full_like(found, float(keys > 0)))
    if keys and queries:
        assert found.max() <= v.max() + 1e-9 and found.min() >= v.min() - 1e-9


def most_allocated(work) -> int:
    """The most that is allocated at one time, in bytes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    found = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(found), default=0)


@plain
def test_memory_grows_with_the_tokens_not_with_their_square() -> None:
    def peak(tokens: int) -> int:
        q, k, v, gamma, x, scale = sample(
            dtype=torch.float32, device="cpu", batch=(1,), queries=tokens, keys=tokens, d=8, c=16
        )  # fmt: skip

        def work() -> None:
            torch.autograd.grad(fused(q, k, v, gamma, x, scale).sum(), [q, k, v, gamma, x])

        work()  # libraries take memory of their own at the first call
        return most_allocated(work)

    few, many = peak(4096), peak(8192)
    assert many < 2.2 * few
    assert many < 4 * 8192**2 / 8  # an eighth of one map


@plain
@pytest.mark.parametrize(("batch", "queries", "keys"), [(5, 300, 300), (1, 700, 4096), (1, 2, 300_000), (3, 129, 5000)])
def test_tiles_of_any_shape_cover_every_query_once(batch: int, queries: int, keys: int) -> None:
    q, k, v = torch.randn(batch, queries, 2), torch.randn(batch, keys, 2), torch.randn(batch, keys, 3)
    wanted = [values.requires_grad_() for values in (q, k, v)]
    found, expected = fused(q, k, v), reference(q, k, v)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    weighting = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad((found * weighting).sum(), wanted),
        torch.autograd.grad((expected * weighting).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        (((1, 3, 2), (1, 4, 3), (1, 4, 5)), "one width"),
        (((1, 3, 2), (1, 4, 2), (1, 5, 5)), "one number of tokens"),
        (((2, 3, 2), (1, 4, 2), (1, 4, 5)), "leading axes"),
        (((1, 3, 2), (1, 4, 2), (1, 4, 5), (2,)), "one number"),
        (((1, 3, 2), (1, 4, 2), (1, 4, 5), (1,), (1, 4, 5)), "needs its shape"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fused(*(torch.zeros(shape, device=DEVICE) for shape in shapes))


def test_whole_numbers_are_refused() -> None:
    tokens = torch.zeros(1, 2, 3, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="float"):
        fused(tokens, tokens, tokens)
