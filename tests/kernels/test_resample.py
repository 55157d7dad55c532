"""Resampling gives scipy's numbers, whatever the memory and however many threads, and the gradients that belong to them."""

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

import kernels
from kernels import resample
from kernels.resample import fill, fused, reference

REPOSITORY = Path(kernels.__file__).parents[1]
QUIET = settings(derandomize=True, max_examples=30, deadline=None, database=None)
SIDES = st.tuples(*[st.integers(1, 12)] * 3)
HOW = st.fixed_dictionaries(
    dict(
        order=st.sampled_from([0, 1, 3]),
        separate=st.sampled_from([None, 0, 1, 2]),
        flipped=st.sets(st.integers(0, 2)).map(tuple),
    )
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_scipy(voxels: Tensor, shape: tuple[int, int, int]) -> np.ndarray:
    """The spline at the very places where our voxels lie: beyond the outermost centres, on these."""
    ends = [(np.clip((np.arange(a) + 0.5) * b / a - 0.5, 0, b - 1)) for b, a in zip(voxels.shape, shape, strict=True)]
    return ndimage.map_coordinates(voxels.numpy(), np.meshgrid(*ends, indexing="ij"), order=3, mode="mirror")


@QUIET
@given(before=st.tuples(*[st.integers(1, 40)] * 3), after=st.tuples(*[st.integers(1, 50)] * 3))
def test_in_float64_the_spline_is_scipys_to_the_last_digits_and_in_float32_to_a_hundredth_of_a_hounsfield_unit(
    before, after
):
    scan = 1000 * noise(1, *before)
    wanted = by_scipy(scan[0], after)
    np.testing.assert_allclose(fused(scan, after, 3)[0], wanted, atol=1e-9)
    np.testing.assert_allclose(fused(scan.float(), after, 3)[0], wanted, atol=0.01)


@QUIET
@given(before=SIDES, after=SIDES, axes=st.permutations(range(3)), how=HOW)
def test_whatever_the_order_of_memory_the_reference_says_the_same(before, after, axes, how):
    voxels = noise(2, *before)
    order = [0, *(axis + 1 for axis in axes)]
    turned = voxels.permute(order).contiguous().permute([order.index(axis) for axis in range(4)])
    torch.testing.assert_close(fused(turned, after, **how), reference(voxels, after, **how), rtol=1e-10, atol=1e-10)


@QUIET
@given(before=SIDES, after=SIDES, how=HOW)
def test_the_gradient_goes_back_through_the_same_weights(before, after, how):
    """For a linear map A: what weighs the result by y weighs the voxels by A transposed y."""
    voxels, y = noise(2, *before).requires_grad_(), noise(2, *after, seed=1)
    (gradient,) = torch.autograd.grad(fused(voxels, after, **how), voxels, y)
    (wanted,) = torch.autograd.grad(reference(voxels, after, **how), voxels, y)
    torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-10)
    assert ((gradient * voxels).sum() - (y * fused(voxels, after, **how)).sum()).abs() < 1e-9


@QUIET
@given(before=SIDES, after=SIDES, how=HOW)
def test_flipped_axes_are_read_back_to_front(before, after, how):
    voxels = noise(1, *before)
    turned = voxels.flip([axis + 1 for axis in how["flipped"]])
    wanted = fused(turned, after, how["order"], how["separate"])
    torch.testing.assert_close(fused(voxels, after, **how), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.bool, torch.bfloat16, torch.float16])
def test_what_is_no_float32_is_summed_in_float32_all_the_same(dtype):
    voxels = (40 * noise(1, 9, 8, 7)).abs().to(dtype)
    found = fused(voxels, (5, 12, 9), 3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, reference(voxels.double(), (5, 12, 9), 3).float(), rtol=1e-5, atol=1e-3)


def test_halves_get_a_gradient_of_halves():
    voxels = noise(1, 5, 4, 3).half().requires_grad_()
    fused(voxels, (7, 2, 3), 3).sum().backward()
    assert voxels.grad is not None and voxels.grad.dtype == torch.float16


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_no_bit_depends_on_the_number_of_threads_forward_or_backward(axes):
    order = [0, *(axis + 1 for axis in axes)]
    scan = noise(2, *[(75, 60, 48)[axis] for axis in axes]).float().permute([order.index(axis) for axis in range(4)])
    told, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            voxels = scan.detach().requires_grad_()
            there = fused(voxels, (40, 33, 70), 3)
            (gradient,) = torch.autograd.grad(there, voxels, torch.ones_like(there))
            found.append((there.detach(), gradient))
    finally:
        torch.set_num_threads(told)
    for there, gradient in found[1:]:
        assert torch.equal(there, found[0][0]) and torch.equal(gradient, found[0][1])


def test_threads_keep_the_number_that_was_told_and_so_do_those_that_come_later():
    told = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        fused(noise(1, 40, 9, 9), (50, 9, 9), 3)
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert torch.get_num_threads() == 3 and later == [3]
    finally:
        torch.set_num_threads(told)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_has_threads_of_its_own():
    """As a loader of batches is, of a parent that resampled before."""
    program = (
        "import os, torch\n"
        "from kernels.resample import fused\n"
        "torch.set_num_threads(2)\n"
        "voxels = torch.rand(1, 40, 9, 9)\n"
        "wanted = fused(voxels, (50, 9, 9), 3)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if torch.equal(fused(voxels, (50, 9, 9), 3), wanted) else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, env=environment, check=True, timeout=60)


def test_under_inference_mode_and_after_it_the_same_numbers_come_and_gradients_too():
    voxels = noise(1, 6, 5, 4)
    with torch.inference_mode():
        inside = fused(voxels, (4, 7, 5), 3)
    after = fused(voxels.requires_grad_(), (4, 7, 5), 3)
    after.sum().backward()
    assert torch.equal(inside, after) and voxels.grad is not None


def peak_of(work: Callable[[], Tensor]) -> int:
    """The most bytes torch held more than before, on one thread."""
    told = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        work()  # matrices are kept
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
            work()
    finally:
        torch.set_num_threads(told)
    sizes = [event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert sizes
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0)], ids=["C", "F"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16], ids=str)
def test_beside_the_result_memory_holds_a_slab(axes, dtype):
    scan = torch.zeros(1, *[(200, 200, 120)[axis] for axis in axes], dtype=dtype)
    scan = scan.permute(0, *[1 + axes.index(axis) for axis in range(3)])
    after = (110, 110, 240)
    result, slab = 4 * 110 * 110 * 240, 4 * 16 * 200 * 240
    assert peak_of(lambda: fused(scan, after, 3)) < result + 2 * slab + 4 * resample.PIECE


def test_a_result_that_is_given_is_filled_in_its_own_type_by_the_product_that_is_given():
    voxels, result = noise(2, 9, 8, 7), torch.full((2, 5, 8, 9), float("nan"))
    shapes = []

    def product(matrix: Tensor, source: Tensor, target: Tensor) -> None:
        shapes.append((matrix.shape, source.shape, target.shape))
        target.copy_(matrix @ source)

    fill(result, voxels, 3, 1, (0,), product)
    torch.testing.assert_close(result, reference(voxels, (5, 8, 9), 3, 1, (0,)).float(), rtol=1e-5, atol=1e-5)
    assert shapes
    for (rows, columns), source, target in shapes:
        assert source == (target[0], columns, target[2]) and target[1] == rows


@pytest.mark.slow
def test_the_kernel_goes_slab_by_slab_where_a_scan_is_large():
    """In a process of its own: Triton decides at its start whether kernels are interpreted."""
    program = (
        "import torch\n"
        "from kernels import resample\n"
        "resample.SLAB = 300\n"
        "for seed, axes in enumerate([(0, 1, 2), (2, 1, 0), (1, 2, 0)]):\n"
        "    for after in [(20, 3, 4), (36, 4, 2), (18, 5, 3)]:\n"
        "        random = torch.Generator().manual_seed(seed)\n"
        "        voxels = torch.randn(2, *[(36, 5, 3)[a] for a in axes], generator=random, dtype=torch.float64)\n"
        "        voxels = voxels.permute(0, *[1 + axes.index(a) for a in range(3)]).requires_grad_()\n"
        "        found, wanted = resample.fused(voxels, after, 3), resample.reference(voxels, after, 3)\n"
        "        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)\n"
        "        y = torch.randn(found.shape, generator=random, dtype=torch.float64)\n"
        "        gradients = [torch.autograd.grad(one, voxels, y)[0] for one in (found, wanted)]\n"
        "        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)\n"
    )
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    child = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120
    )
    assert child.returncode == 0, child.stderr[-2000:]


@pytest.mark.parametrize(
    ("voxels", "shape", "how", "words"),
    [
        ((4, 4, 4), (5, 5, 5), dict(order=3), "Put channels first"),
        ((1, 4, 0, 4), (5, 5, 5), dict(order=3), "at least one voxel"),
        ((1, 4, 4, 4), (5, 0, 5), dict(order=1), "at least one voxel"),
        ((1, 4, 4, 4), (5, 5, 5), dict(order=2), "order 2"),
        ((1, 4, 4, 4), (5, 5, 5), dict(order=3, separate=3), "without the channels"),
        ((1, 4, 4, 4), (5, 5, 5), dict(order=3, flipped=(-1,)), "without the channels"),
    ],
)
def test_what_cannot_be_resampled_is_refused(voxels, shape, how, words):
    for function in (fused, reference):
        with pytest.raises(ValueError, match=words):
            function(torch.zeros(voxels), shape, **how)
