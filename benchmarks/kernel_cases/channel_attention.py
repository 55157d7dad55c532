"""What channel attention is timed on: maps of the self-guided and the query-token networks, in two and three dimensions.

Eager is what their repositories write: bmm, the row's maximum minus the map, softmax, bmm, gamma, residual.
"""

import math
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from kernel_cases import Case, Work
from kernels import channel_attention


def _eager(x, gamma):
    channels = x.flatten(2)
    energy = torch.bmm(channels, channels.mT)
    energy = torch.max(energy, -1, keepdim=True)[0].expand_as(energy) - energy
    return gamma * torch.bmm(torch.softmax(energy, dim=-1), channels).view(x.shape) + x


def _as_one_head(x, gamma):
    channels = x.flatten(2)[:, None]
    return gamma * scaled_dot_product_attention(channels, channels, channels, scale=-1.0).view(x.shape) + x


def _make(shape: tuple[int, ...], backward: bool) -> Callable[[str, str], dict[str, Work]]:
    def make(device: str, dtype: str) -> dict[str, Work]:
        random = torch.Generator(device).manual_seed(0)
        x, weighting = (
            torch.empty(shape, device=device, dtype=getattr(torch, dtype)).normal_(generator=random) for _ in "12"
        )
        x.requires_grad_()
        gamma = torch.full((), 0.5, device=device, dtype=x.dtype).requires_grad_()

        def work(attend: Callable) -> Work:
            def run():
                with torch.set_grad_enabled(backward):
                    found = attend(x, gamma)
                    return torch.autograd.grad(found, [x, gamma], weighting) if backward else found

            return run

        return {
            "ours": work(channel_attention.fused),
            "reference": work(channel_attention.reference),
            "eager": work(_eager),
            "compiled": work(torch.compile(_eager)),
            "scaled_dot_product_attention": work(_as_one_head),
        }

    return make


def _case(shape: tuple[int, ...], *, backward: bool) -> Case:
    batch, channels, *space = shape
    places = math.prod(space)
    return Case(
        name=f"{' x '.join(map(str, space))}, {channels} channels, batch {batch}, "
        f"{'forward and backward' if backward else 'forward'}",
        make=_make(shape, backward),
        # forward x twice and the result; backward x and the gradient twice and x's gradient
        bytes_moved=4 * batch * channels * places * (3 + backward * 5),
        flops=2 * batch * channels**2 * places * (2 + backward * 3),
        dtypes=("float32", "bfloat16"),
        goal="never slower than eager on the CPU; on an H200 80 % of the memory floor",
    )


CASES: list[Case] = [
    _case((1, 64, 64, 64), backward=False),
    _case((1, 64, 64, 64), backward=True),
    _case((8, 64, 64, 64), backward=True),
    _case((2, 256, 16, 16), backward=True),
    _case((1, 64, 32, 32, 32), backward=False),
    _case((1, 64, 32, 32, 32), backward=True),
]
