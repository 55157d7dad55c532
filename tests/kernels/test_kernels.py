"""Every operation in kernels/ says what its reference says: forward, backward, at odd sizes, on poisoned memory.

Triton decides when a kernel is decorated whether it is compiled or interpreted, so on a machine without CUDA a process
of its own, with TRITON_INTERPRET=1 from its start, runs this same file again. There the kernels are what runs; in the
process without the variable, `fused` must fall back to the reference.
"""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels

REPOSITORY = Path(kernels.__file__).parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3}

OPERATIONS = {name: importlib.import_module(f"kernels.{name}") for name in kernels.available()}
CASES = [
    pytest.param(operation, example, id=f"{name}-{number}")
    for name, operation in OPERATIONS.items()
    for number, example in enumerate(operation.EXAMPLES)
]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel forgets to write is NaN, not the lucky zero of fresh memory."""

    def poison(make):
        def poisoned(*arguments, **options):
            tensor = make(*arguments, **options)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return poisoned

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("operation", "example"), CASES)
def test_fused_says_what_the_reference_says_and_so_do_all_gradients(operation, example, dtype) -> None:
    expected, expected_gradients = run(operation.reference, operation.sample(dtype=dtype, device=DEVICE, **example))
    found, gradients = run(operation.fused, operation.sample(dtype=dtype, device=DEVICE, **example))
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert len(gradients) == len(expected_gradients) > 0
    for gradient, known in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, known, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize(("operation", "example"), CASES)
def test_without_gradients_the_numbers_are_the_same(operation, example) -> None:
    with torch.no_grad():
        expected = operation.reference(*operation.sample(dtype=torch.float32, device=DEVICE, **example))
        found = operation.fused(*operation.sample(dtype=torch.float32, device=DEVICE, **example))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("operation", "example"), CASES)
def test_memory_in_another_order_changes_nothing(operation, example) -> None:
    expected, _ = run(operation.reference, operation.sample(dtype=torch.float64, device=DEVICE, **example))
    arguments = [reordered(value) for value in operation.sample(dtype=torch.float64, device=DEVICE, **example)]
    found, gradients = run(operation.fused, arguments)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton has no wheel for this machine")
def test_the_kernels_hold_in_the_interpreter() -> None:
    child = subprocess.run(
        [sys.executable, "-m", "pytest", str(Path(__file__)), "-q", "-p", "no:cacheprovider"],
        cwd=REPOSITORY,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stdout[-4000:] + child.stderr[-2000:]


@pytest.mark.skipif(not INTERPRETED, reason="only where TRITON_INTERPRET=1 was set before the start")
def test_in_the_interpreter_kernels_are_really_used() -> None:
    from kernels._triton import usable

    assert usable(torch.zeros(1))


@pytest.mark.skipif(INTERPRETED, reason="here the interpreter takes CPU tensors")
def test_a_cpu_tensor_is_left_to_the_reference() -> None:
    from kernels._triton import usable

    assert not usable(torch.zeros(1))


def test_without_triton_every_operation_imports_and_runs_its_reference() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib, torch, kernels\n"
        "for name in kernels.available():\n"
        "    op = importlib.import_module(f'kernels.{name}')\n"
        "    arguments = op.sample(dtype=torch.float32, device='cpu', **op.EXAMPLES[0])\n"
        "    assert torch.equal(op.fused(*arguments), op.reference(*arguments))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    child = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr


def test_windows_blended_with_their_weights_give_back_what_they_were_cut_from() -> None:
    from kernels.window_blend import fused

    volume = torch.rand(2, 5, 6, 7, dtype=torch.float64, device=DEVICE)
    weights = [torch.tensor([0.5, 1.0, 2.0, 0.25], dtype=torch.float64, device=DEVICE)] * 3
    total, mass = torch.zeros_like(volume), torch.zeros_like(volume[:1])
    padded = torch.nn.functional.pad(volume, (4,) * 6)
    for a in range(-2, 6, 3):
        for b in range(-2, 6, 3):
            for e in range(-2, 7, 3):
                window = padded[:, a + 4 : a + 8, b + 4 : b + 8, e + 4 : e + 8]
                fused(total, window, *weights, (a, b, e))
                fused(mass, torch.ones_like(window[:1]), *weights, (a, b, e))
    assert mass.min() > 0
    torch.testing.assert_close(total / mass, volume)


def test_half_precision_windows_are_summed_in_float32() -> None:
    from kernels.window_blend import fused

    total = torch.full((1, 1, 1, 1), 2048.0, device=DEVICE)  # in float16, 2048 + 1 is 2048
    one = torch.ones(1, device=DEVICE)
    window = torch.ones(1, 1, 1, 1, dtype=torch.float16, device=DEVICE)
    for _ in range(3):
        fused(total, window, one, one, one, (0, 0, 0))
    assert total.item() == 2051


def test_a_half_precision_accumulator_is_refused() -> None:
    from kernels.window_blend import fused

    volume, one = torch.zeros(1, 1, 1, 1, device=DEVICE), torch.ones(1, device=DEVICE)
    with pytest.raises(ValueError, match="float32"):
        fused(volume.half(), volume, one, one, one, (0, 0, 0))


def test_weights_that_do_not_fit_the_window_are_refused() -> None:
    from kernels.window_blend import fused

    one, two = torch.ones(1, device=DEVICE), torch.ones(2, device=DEVICE)
    volume = torch.zeros(1, 4, 4, 4, device=DEVICE)
    with pytest.raises(ValueError, match="one weight per step"):
        fused(volume, torch.ones(1, 2, 2, 2, device=DEVICE), two, one, two, (0, 0, 0))


def run(function, arguments):
    """The result, and the gradient of every argument that asked for one, under a fixed random weighting."""
    result = function(*arguments)
    weighting = torch.randn(result.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = [value for value in arguments if isinstance(value, torch.Tensor) and value.requires_grad]
    return result.detach(), torch.autograd.grad((result * weighting.to(result)).sum(), wanted)


def reordered(value):
    """The same numbers, the last axis varying slowest."""
    if not isinstance(value, torch.Tensor) or value.ndim < 2:
        return value
    copy = value.detach().transpose(0, -1).contiguous().transpose(0, -1)
    return copy.requires_grad_(value.requires_grad)
