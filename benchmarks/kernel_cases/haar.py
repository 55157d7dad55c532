"""The Haar transform of one level, and HFF-Net's bank of filters, on volumes as they come."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from kernel_cases import Case, Work
from kernels import fir_bank, haar

SCAN = (1, 4, 155, 240, 240)
"""A case of BraTS: four modalities."""


def analysis(shape: tuple[int, ...], backward: bool) -> Case:
    def make(device: str, dtype: str) -> dict[str, Work]:
        x = torch.randn(shape, device=device, dtype=getattr(torch, dtype), requires_grad=backward)
        gradient = torch.randn_like(haar.fused(x.detach()))
        kernel = grouped_kernel(x)

        def eager() -> Tensor:
            return functional.conv3d(evened(x), kernel, stride=2, groups=shape[1]).view(gradient.shape)

        def ptwt() -> object:
            import ptwt  # no part of our environment

            return ptwt.wavedec3(x.detach().flatten(0, 1), "haar", level=1, mode="zero")

        def once(work: Work) -> Work:
            return (lambda: torch.autograd.grad(work(), x, gradient)) if backward else work

        return {
            "ours": once(lambda: haar.fused(x)),
            "reference": once(lambda: haar.reference(x)),
            "eager": once(eager),
            "compiled": once(torch.compile(eager)),
            **({} if backward else {"ptwt": ptwt}),
        }

    return Case(
        name=f"analysis of {named(shape)}, forward{' and backward' if backward else ''}",
        make=make,
        bytes_moved=(4 if backward else 2) * 4 * math.prod(shape),
        goal="CPU: at least 3 times ptwt, never slower than a grouped convolution; H200: 80 % of copy bandwidth",
    )


def synthesis(shape: tuple[int, ...]) -> Case:
    def make(device: str, dtype: str) -> dict[str, Work]:
        bands = haar.fused(torch.randn(shape, device=device, dtype=getattr(torch, dtype)))
        kernel, size = grouped_kernel(bands), shape[2:]

        def eager() -> Tensor:
            whole = functional.conv_transpose3d(bands.flatten(1, 2), kernel, stride=2, groups=shape[1])
            return whole[..., : size[0], : size[1], : size[2]]

        def ptwt() -> object:
            import ptwt

            names = ("aad", "ada", "add", "daa", "dad", "dda", "ddd")
            low, *details = bands.flatten(0, 1).unbind(1)
            return ptwt.waverec3((low, dict(zip(names, details, strict=True))), "haar")

        return {
            "ours": lambda: haar.fused(bands, size),
            "reference": lambda: haar.reference(bands, size),
            "eager": eager,
            "compiled": torch.compile(eager),
            "ptwt": ptwt,
        }

    return Case(
        name=f"synthesis of {named(shape)}",
        make=make,
        bytes_moved=2 * 4 * math.prod(shape),
        goal="CPU: at least 3 times ptwt, never slower than a grouped convolution; H200: 80 % of copy bandwidth",
    )


def bank(shape: tuple[int, ...]) -> Case:
    def make(device: str, dtype: str) -> dict[str, Work]:
        x = torch.randn(shape, device=device, dtype=getattr(torch, dtype))
        return {
            "ours": lambda: fir_bank.fused(x),
            "reference": lambda: fir_bank.reference(x),
            "compiled": torch.compile(lambda: fir_bank.reference(x)),
        }

    return Case(name=f"filters on {named(shape)}", make=make, bytes_moved=6 * 4 * math.prod(shape))


def grouped_kernel(values: Tensor) -> Tensor:
    """[8 C, 1, 2, 2, 2]: eight bands of every channel."""
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], device=values.device, dtype=values.dtype) / math.sqrt(2)
    return (
        torch.einsum("ai, bj, ck -> abcijk", step, step, step)
        .reshape(8, 1, 2, 2, 2)
        .repeat(values.shape[1], 1, 1, 1, 1)
    )


def evened(x: Tensor) -> Tensor:
    d, h, w = (n % 2 for n in x.shape[2:])
    return functional.pad(x, (0, w, 0, h, 0, d), mode="replicate") if d or h or w else x


def named(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


CASES = [
    *(
        analysis(shape, backward)
        for shape in ((2, 16, 64, 64, 64), (1, 4, 128, 128, 128), SCAN)
        for backward in (False, True)
    ),
    *(synthesis(shape) for shape in ((2, 16, 64, 64, 64), SCAN)),
    bank((1, 4, 32, 240, 240)),
]
