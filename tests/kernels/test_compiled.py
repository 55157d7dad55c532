"""Every kernel compiles for a GPU, as `fused` launches it, on a machine that has none.

Triton's interpreter takes much that its compiler refuses. Here its compiler runs to the end, machine code for an H200, and
nothing is launched: what comes out is not looked at.
"""

import importlib
import os

import pytest
import torch

import kernels

triton = pytest.importorskip("triton")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled in the interpreter"),
]

OPERATIONS = {name: importlib.import_module(f"kernels.{name}") for name in kernels.available()}
REGISTERS, WARP = 255, 32


class NoDevice:
    """What Triton asks of a driver before it compiles."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", 90, WARP)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list:
    """The kernels compiled since; a launch compiles and does nothing more."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    made = []
    run = JITFunction.run

    def compile_alone(self, *arguments, grid, warmup, **options):
        made.append(run(self, *arguments, grid=grid, warmup=True, **options))

    monkeypatch.setattr(JITFunction, "run", compile_alone)
    monkeypatch.setattr(driver, "_active", NoDevice())
    for operation in OPERATIONS.values():
        monkeypatch.setattr(operation, "usable", lambda tensor: True)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_each_launch_of_a_kernel_compiles(operation, dtype, compiled) -> None:
    for example in operation.EXAMPLES[:2]:
        arguments = operation.sample(dtype=dtype, device="cpu", **example)
        results = operation.fused(*arguments)
        results = [results] if isinstance(results, torch.Tensor) else list(results)
        wanted = [value for value in arguments if isinstance(value, torch.Tensor) and value.requires_grad]
        sums = [result.double().nan_to_num().sum() for result in results if result.requires_grad]
        if wanted and sums:
            torch.autograd.grad(sum(sums), wanted, allow_unused=True)
    assert compiled
    for kernel in compiled:
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= 227 * 1024  # bytes a block may have on an H200
