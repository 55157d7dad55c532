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
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

import kernels

REPOSITORY = Path(kernels.__file__).parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = [dtype for dtype in TOLERANCE if not INTERPRETED or dtype != torch.bfloat16]  # Triton's interpreter has none

OPERATIONS = {name: importlib.import_module(f"kernels.{name}") for name in kernels.available()}
CASES = [
    pytest.param(operation, example, id=f"{name}-{number}")
    for name, operation in OPERATIONS.items()
    for number, example in enumerate(operation.EXAMPLES)
]


def reordered(value):
    """The same numbers, the last axis varying slowest."""
    if not isinstance(value, torch.Tensor) or value.ndim < 2:
        return value
    copy = value.detach().transpose(0, -1).contiguous().transpose(0, -1)
    return copy.requires_grad_(value.requires_grad)


def channels_last(value):
    """The same numbers, the second axis varying fastest."""
    if not isinstance(value, torch.Tensor) or value.ndim < 3:
        return value
    return value.detach().movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_(value.requires_grad)


def sliced(value):
    """The same numbers, every second one of a larger tensor."""
    if not isinstance(value, torch.Tensor) or value.ndim < 1:
        return value
    wide = torch.zeros((*value.shape[:-1], 2 * value.shape[-1] + 1), dtype=value.dtype, device=value.device)
    wide[..., 1::2] = value.detach()
    return wide[..., 1::2].requires_grad_(value.requires_grad)


def far_apart(value, room: Path):
    """The same numbers in a file full of holes, so that the last lies more than 2^31 places behind the first."""
    if not isinstance(value, torch.Tensor) or value.ndim < 2 or len(value) < 2:
        return value
    step = 2**31 // (len(value) - 1) + 1
    size = step * (len(value) - 1) + value[0].numel()
    inner = value[0].contiguous().stride()
    if DEVICE == "cpu":
        storage = torch.from_file(str(room), shared=True, size=size, dtype=value.dtype)
    else:
        storage = torch.zeros(size, dtype=value.dtype, device=DEVICE)
    far = storage.as_strided(value.shape, (step, *inner))
    far.copy_(value.detach())
    return far.requires_grad_(value.requires_grad)


def copied(value, wants_gradient: bool):
    if not isinstance(value, torch.Tensor):
        return value
    copy = value.detach().clone()
    return copy.requires_grad_(wants_gradient and value.is_floating_point())


class Calls(TorchDispatchMode):
    """Which operations of ours were called, and with what."""

    def __init__(self) -> None:
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, called, types, arguments=(), options=None):
        if called.namespace == "hilum":
            name = called._schema.name.removeprefix("hilum::")
            self.made.setdefault(name, (called, [copied(value, False) for value in arguments]))
        return called(*arguments, **(options or {}))


FIRST = [pytest.param(operation, operation.EXAMPLES[0], id=name) for name, operation in OPERATIONS.items()]
"""One example of each: what holds of a graph holds whatever the sizes."""


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel forgets to write is NaN, not the lucky zero of fresh memory."""

    def poison(make):
        def poisoned(*arguments, **options):
            tensor = make(*arguments, **options)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return poisoned

    _device_constructors()  # torch remembers for good which functions make tensors: the true ones
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("operation", "example"), CASES)
def test_fused_says_what_the_reference_says_in_float64_and_so_do_all_gradients(operation, example, dtype) -> None:
    arguments = operation.sample(dtype=dtype, device=DEVICE, **example)
    expected, expected_gradients = run(operation.reference, [exactly(value) for value in arguments])
    found, gradients = run(operation.fused, arguments)
    assert_close(found, expected, TOLERANCE[dtype])
    asked = [value for value in arguments if isinstance(value, torch.Tensor) and value.requires_grad]
    assert len(gradients) == len(expected_gradients) == len(asked)
    assert_close(gradients, expected_gradients, TOLERANCE[dtype])


@pytest.mark.parametrize(("operation", "example"), CASES)
def test_without_gradients_the_numbers_are_the_same(operation, example) -> None:
    with torch.no_grad():
        expected = operation.reference(*operation.sample(dtype=torch.float64, device=DEVICE, **example))
        found = operation.fused(*operation.sample(dtype=torch.float64, device=DEVICE, **example))
    assert_close(several(found), several(expected), TOLERANCE[torch.float64])


@pytest.mark.parametrize("order", [reordered, channels_last, sliced], ids=lambda order: order.__name__)
@pytest.mark.parametrize(("operation", "example"), CASES)
def test_memory_in_another_order_changes_nothing(operation, example, order) -> None:
    arguments = operation.sample(dtype=torch.float64, device=DEVICE, **example)
    expected, expected_gradients = run(operation.reference, arguments)
    arguments = operation.sample(dtype=torch.float64, device=DEVICE, **example)
    found, gradients = run(operation.fused, [order(value) for value in arguments])
    assert_close(found, expected, TOLERANCE[torch.float64])
    assert_close(gradients, expected_gradients, TOLERANCE[torch.float64])


@pytest.mark.parametrize(("operation", "example"), FIRST)
def test_offsets_beyond_what_32_bits_can_count(operation, example, tmp_path) -> None:
    room = iter(range(100))
    arguments = operation.sample(dtype=torch.float32, device=DEVICE, **example)
    expected, expected_gradients = run(operation.fused, arguments)
    arguments = operation.sample(dtype=torch.float32, device=DEVICE, **example)
    found, gradients = run(operation.fused, [far_apart(value, tmp_path / str(next(room))) for value in arguments])
    assert_close(found, expected, TOLERANCE[torch.float32])
    assert_close(gradients, expected_gradients, TOLERANCE[torch.float32])


@pytest.mark.parametrize(("operation", "example"), FIRST)
def test_the_same_arguments_give_the_same_bits(operation, example) -> None:
    once, again = (run(operation.fused, operation.sample(dtype=torch.float32, device=DEVICE, **example)) for _ in "12")
    for one, other in zip([*once[0], *once[1]], [*again[0], *again[1]], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("operation", "example"), FIRST)
def test_autocast_around_it_changes_nothing(operation, example) -> None:
    expected, expected_gradients = run(operation.fused, operation.sample(dtype=torch.float32, device=DEVICE, **example))
    arguments = operation.sample(dtype=torch.float32, device=DEVICE, **example)
    found, gradients = run(torch.autocast(DEVICE, torch.bfloat16)(operation.fused), arguments)
    for one, other in zip([*found, *gradients], [*expected, *expected_gradients], strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize(("operation", "example"), FIRST)
def test_each_registered_operation_keeps_torchs_own_rules(operation, example) -> None:
    with Calls() as seen:
        run(operation.fused, operation.sample(dtype=torch.float32, device=DEVICE, **example))
        with torch.no_grad():
            operation.fused(*operation.sample(dtype=torch.float32, device=DEVICE, **example))
    if not seen.made:
        assert not INTERPRETED and DEVICE == "cpu", f"{operation.__name__} never came to an operation of its own"
        pytest.skip("plain torch on this machine")
    for name, (called, arguments) in seen.made.items():
        wants = not name.endswith("_backward") and not called._schema.is_mutable
        fresh = [copied(value, wants) for value in arguments]
        torch.library.opcheck(called, tuple(fresh))


@pytest.mark.parametrize(("operation", "example"), FIRST)
def test_the_compiler_sees_one_graph_of_any_sizes(operation, example) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(operation.fused, fullgraph=True, dynamic=True, backend="aot_eager")
    expected, expected_gradients = run(operation.fused, operation.sample(dtype=torch.float32, device=DEVICE, **example))
    found, gradients = run(compiled, operation.sample(dtype=torch.float32, device=DEVICE, **example))
    assert_close(found, expected, TOLERANCE[torch.float32])
    assert_close(gradients, expected_gradients, TOLERANCE[torch.float32])


@pytest.mark.parametrize(("operation", "example"), FIRST)
def test_a_module_that_uses_it_can_be_exported(operation, example) -> None:
    arguments = operation.sample(dtype=torch.float32, device=DEVICE, **example)
    tensors = [value.detach() for value in arguments if isinstance(value, torch.Tensor)]

    class Uses(torch.nn.Module):
        def forward(self, *tensors):
            left = iter(tensors)
            return operation.fused(*(next(left) if isinstance(v, torch.Tensor) else v for v in arguments))

    with torch.no_grad():
        exported = torch.export.export(Uses(), tuple(copied(value, False) for value in tensors)).module()
        found = exported(*(copied(value, False) for value in tensors))
        expected = Uses()(*(copied(value, False) for value in tensors))
    assert_close(several(found), several(expected), TOLERANCE[torch.float32])


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton has no wheel for this machine")
def test_the_kernels_hold_in_the_interpreter() -> None:
    child = subprocess.run(
        [sys.executable, "-m", "pytest", str(Path(__file__)), "-q", "-p", "no:cacheprovider"],
        cwd=REPOSITORY,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
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
        "    again = op.sample(dtype=torch.float32, device='cpu', **op.EXAMPLES[0])\n"
        "    torch.testing.assert_close(op.fused(*arguments), op.reference(*again), rtol=1e-4, atol=1e-4)\n"
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
    """The results, and the gradient of every argument that asked for one, under a fixed random weighting."""
    results = several(function(*arguments))
    random = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for result in results:
        if result.requires_grad:
            weighting = torch.randn(result.shape, generator=random, dtype=torch.float64).to(DEVICE)
            total = total + (result.double() * weighting).sum()
    wanted = [value for value in arguments if isinstance(value, torch.Tensor) and value.requires_grad]
    gradients = torch.autograd.grad(total, wanted, allow_unused=True) if wanted and total.requires_grad else ()
    return [result.detach() for result in results], list(gradients)


def several(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def assert_close(found, expected, tolerance: float) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if other is None:
            assert one is None or not one.any()
        elif not other.is_floating_point():
            assert torch.equal(one, other)
        else:
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, check_dtype=False)


def exactly(value):
    """The same numbers in float64."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)
