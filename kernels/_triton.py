"""Is Triton here, and may this tensor use it? Every operation takes `tl` and `triton` from this file."""

import os
import shutil
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this machine: the decorated kernels below must still parse

    class _Absent:
        """Stands where Triton would: every name is there, `@triton.jit` hands the function back."""

        constexpr = int

        def __getattr__(self, name: str) -> Any:
            return _Absent()

        def __call__(self, *arguments: Any, **options: Any) -> Any:
            return arguments[0] if arguments and callable(arguments[0]) else self

    triton = tl = _Absent()
    AVAILABLE = False
else:
    AVAILABLE = True

# read once: Triton decides when a kernel is decorated whether it will be compiled or interpreted
INTERPRETED = AVAILABLE and os.environ.get("TRITON_INTERPRET") == "1"

# Triton builds its link to the driver with a C compiler; an image without one runs plain torch instead of failing
CAN_COMPILE = any(shutil.which(name) for name in (os.environ.get("CC", ""), "gcc", "clang") if name)


def usable(tensor: torch.Tensor) -> bool:
    """Whether a kernel may touch this tensor: it lies on a CUDA device of a machine with a compiler, or
    kernels are interpreted."""
    return AVAILABLE and (INTERPRETED or (tensor.is_cuda and CAN_COMPILE))
