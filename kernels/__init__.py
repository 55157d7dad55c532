"""Blocks, strides, dtypes: each file here is one operation, and nothing is re-exported.

An operation's file has, in this order:
    its formula and shapes      the docstring
    reference(*arguments)       the truth, in plain torch
    kernels                     `@triton.jit`, names b_ block, p_ pointer, m_ mask, i_ index
    operations                  registered with torch by `_library.operation`, forward and backward: `name_backward`
    fused(*arguments)           the kernel where it can run, else the reference
    EXAMPLES                    what tests run: keywords of `sample`, odd sizes among them
    sample(*, dtype, device, **example) -> the arguments; those that carry a gradient ask for one
"""

from pathlib import Path


def available() -> tuple[str, ...]:
    """The names of all operations, sorted, without importing one."""
    return tuple(sorted(file.stem for file in Path(__file__).parent.glob("*.py") if not file.stem.startswith("_")))
