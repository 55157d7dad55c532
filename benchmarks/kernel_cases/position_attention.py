"""What position attention is timed on: maps of networks that use it, in two and three dimensions, and rows of images.

Eager is what their repositories write on [B, C, N] maps: bmm, softmax, bmm with the shares transposed. `eager on tokens` is the
same on [B, N, C], a little kinder to a CPU. `scaled_dot_product_attention` wants one width for queries, keys and values
wherever it keeps no map, so queries and keys are padded with zeros to the width of the values.
"""

import math
from collections.abc import Callable

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from kernel_cases import Case, Work
from kernels import position_attention


def _eager(q, k, v, gamma, x):
    shares = torch.softmax(torch.bmm(q.mT, k), dim=-1)
    return gamma * torch.bmm(v, shares.mT) + x


def _eager_on_tokens(q, k, v, gamma, x):
    shares = torch.softmax(q.mT @ k, dim=-1)
    return gamma * (shares @ v.mT).mT + x


def _padded(q, k, v, gamma, x):
    wider = (0, v.shape[1] - q.shape[1])
    q, k, v = pad(q.mT, wider), pad(k.mT, wider), v.mT
    # [B, 1, N, C]: one head, else no kernel takes it
    found = scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=1.0)
    return gamma * found[:, 0].mT + x


def _of_maps(attend: Callable) -> Callable:
    return lambda q, k, v, gamma, x: attend(q.mT, k.mT, v.mT, gamma, x.mT).mT


def _make(batch: int, tokens: int, d: int, c: int, backward: bool) -> Callable[[str, str], dict[str, Work]]:
    def make(device: str, dtype: str) -> dict[str, Work]:
        random = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            values = torch.empty(shape, device=device, dtype=getattr(torch, dtype))
            return values.normal_(generator=random).requires_grad_()

        q, k, v, x, gamma = (*(draw(batch, width, tokens) for width in (d, d, c, c)), draw())
        weighting = draw(batch, c, tokens).detach()

        def work(attend: Callable) -> Work:
            def run():
                with torch.set_grad_enabled(backward):
                    found = attend(q, k, v, gamma, x)
                    return torch.autograd.grad(found, [q, k, v, gamma, x], weighting) if backward else found

            return run

        entrants = {
            "ours": work(_of_maps(position_attention.fused)),
            "reference": work(_of_maps(position_attention.reference)),
            "eager": work(_eager),
            "eager on tokens": work(_eager_on_tokens),
            "compiled": work(torch.compile(_eager)),
            "scaled_dot_product_attention": work(_padded),
        }
        # four maps of scores at a time: what a machine without a GPU does not have to spare
        too_many = device == "cpu" and 4 * batch * tokens**2 * 4 > 8e9
        without = ("ours", "scaled_dot_product_attention")
        return {name: entrant for name, entrant in entrants.items() if not too_many or name in without}

    return make


def _case(name: str, space: tuple[int, ...], d: int, c: int, batch: int = 1, *, backward: bool, goal: str = "") -> Case:
    tokens = math.prod(space)
    # forward q, k, v, x, out; backward the gradient, q, k, v, A v, and three gradients
    moved = (2 * d + 3 * c) + backward * (4 * d + 4 * c)
    # forward q kᵀ and A v; backward q kᵀ again, and the gradients of v, the shares, q and k
    products = (d + c) + backward * (3 * d + 2 * c)
    return Case(
        name=f"{name}, width {c} + {d}, {'forward and backward' if backward else 'forward'}",
        make=_make(batch, tokens, d, c, backward),
        bytes_moved=4 * batch * tokens * moved,
        flops=2 * batch * tokens**2 * products,
        dtypes=("float32", "bfloat16"),
        goal=goal,
        facts={"tokens": tokens, "one map of scores, MB": 4 * batch * tokens**2 / 1e6},
    )


CASES: list[Case] = [
    _case("64 x 64", (64, 64), 8, 64, backward=False),
    _case("64 x 64", (64, 64), 8, 64, backward=True, goal="at least 3 times eager on the CPU"),
    _case("64 x 64, batch 8", (64, 64), 8, 64, batch=8, backward=True),
    _case("6 x 32 x 32", (6, 32, 32), 32, 256, backward=True),
    _case("256 rows of 256", (256,), 64, 64, batch=256, backward=True),
    _case(
        "32 x 32 x 32",
        (32, 32, 32),
        8,
        64,
        backward=True,
        goal="memory linear in tokens; on an H200 half of the bf16 matrix rate where it is bound by products",
    ),
]
