"""Is Triton here, and may this tensor use it? Every operation takes `tl` and `triton` from this file."""

import os
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


def usable(tensor: torch.Tensor) -> bool:
    """Whether a kernel may touch this tensor: it lies on a CUDA device, or kernels are interpreted."""
    return AVAILABLE and (tensor.is_cuda or INTERPRETED)
