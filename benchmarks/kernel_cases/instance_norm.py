"""Instance norm, leaky ReLU and, at the end of a block, the addition of its shortcut: what every U-Net does at every level."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from kernel_cases import Case, Work
from kernels import instance_norm

SLOPE = 0.01
ORDERS = {"channels last": torch.channels_last_3d, "channels first": torch.contiguous_format}


def case(shape: tuple[int, ...], order: str, residual: bool, backward: bool) -> Case:
    def make(device: str, dtype: str) -> dict[str, Work]:
        def draw() -> Tensor:
            values = torch.randn(shape, device=device, dtype=getattr(torch, dtype))
            return values.contiguous(memory_format=ORDERS[order])

        channels = shape[1]
        x, added, gradient = draw().requires_grad_(backward), draw().requires_grad_(backward), draw()
        weight, bias = (torch.randn(channels, device=device, requires_grad=backward) for _ in "12")
        wanted = [x, weight, bias, *([added] if residual else [])]

        def once(norm) -> Work:
            def work():
                with torch.set_grad_enabled(backward):
                    y = norm()
                return torch.autograd.grad(y, wanted, gradient) if backward else y

            return work

        def then(y: Tensor) -> Tensor:
            return functional.leaky_relu_(y + added if residual else y, SLOPE)

        def known() -> Tensor:
            return then(functional.instance_norm(x, weight=weight.to(x.dtype), bias=bias.to(x.dtype)))

        def grouped() -> Tensor:
            return then(functional.group_norm(x, channels, weight.to(x.dtype), bias.to(x.dtype)))

        arguments = x, weight, bias, added if residual else None, SLOPE
        return {
            "ours": once(lambda: instance_norm.fused(*arguments)),
            "reference": once(lambda: instance_norm.reference(*arguments)),
            "eager": once(known),
            "group norm of single channels": once(grouped),
            "compiled": once(torch.compile(known)),
        }

    moved = (6 if residual else 5) + (2 if residual else 0) if backward else 0
    return Case(
        name=f"{' × '.join(map(str, shape))}, {order}{', added' if residual else ''}, forward{' and backward' if backward else ''}",
        make=make,
        bytes_moved=(3 + residual + moved) * 4 * math.prod(shape),
        dtypes=("float32", "bfloat16"),
        goal="CPU: never slower than torch's own; H200: 80 % of copy bandwidth",
    )


CASES = [
    case(shape, order, residual, backward)
    for shape in ((2, 16, 40, 56, 40), (2, 32, 20, 28, 20), (1, 16, 128, 128, 128), (2, 320, 8, 8, 8))
    for order in ORDERS
    for residual in (False, True)
    for backward in (False, True)
    if order == "channels last" or not residual
]
