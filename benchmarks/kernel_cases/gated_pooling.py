"""What gated pooling is timed on: slides of 200,000 tiles, and a batch of many small bags.

Eager is what MIL repositories write: two linear layers, their activations and product, a linear layer, a softmax over the
bag, a matrix product. On the CPU it is bound by its matrix products, which run at the processor's peak; ours takes those of
the gate twice, because it keeps none of it. A GPU is bound by them as well: 0.2 TFLOP forward at 200,000 x 1,024 and hidden
256, where one read of the bag in half precision takes a tenth of a millisecond.
"""

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

from kernel_cases import Case, Work

if TYPE_CHECKING:
    import torch


def _eager(tiles, offsets, v, v_bias, u, u_bias, w, w_bias):
    import torch
    from torch.nn.functional import linear

    pooled, entropy = [], []
    for start, end in itertools.pairwise(offsets):
        bag = tiles[start:end]
        gate = torch.tanh(linear(bag, v, v_bias)) * torch.sigmoid(linear(bag, u, u_bias))
        scores = linear(gate, w, w_bias)
        shares = torch.softmax(scores.T, 1)
        pooled.append(shares @ bag)
        entropy.append(-(shares * torch.log_softmax(scores.T, 1)).sum(1))
    return torch.stack(pooled), torch.stack(entropy)


def _make(
    sizes: list[int], features: int, hidden: int, branches: int, backward: bool, projected: bool
) -> Callable[[str, str], dict[str, Work]]:
    """projected: the tiles are features after a layer that learns, so they ask for a gradient."""

    def make(device: str, dtype: str) -> dict[str, Work]:
        import torch

        from kernels import gated_pooling

        kind = getattr(torch, dtype)
        random = torch.Generator(device).manual_seed(0)

        def draw(*shape: int, asks: bool = True) -> "torch.Tensor":
            values = torch.empty(shape, device=device, dtype=kind)
            values.normal_(0, shape[-1] ** -0.5 if asks else 1, generator=random)
            return values.requires_grad_(asks)

        tiles = draw(sum(sizes), features, asks=False).requires_grad_(projected)
        shapes = [(hidden, features), (hidden,), (hidden, features), (hidden,), (branches, hidden), (branches,)]
        layers = [draw(*shape) for shape in shapes]
        bounds = [0, *itertools.accumulate(sizes)]
        offsets = torch.tensor(bounds, device=device)
        wanted = [*([tiles] if projected else []), *layers]

        def work(pool: Callable, offsets) -> Work:
            def run():
                with torch.set_grad_enabled(backward):
                    pooled, *_, entropy = pool(tiles, offsets, *layers)
                    if backward:
                        return torch.autograd.grad(pooled.square().sum() + entropy.sum(), wanted)
                return pooled

            return run

        def without_log_sums(pool: Callable) -> Callable:
            return lambda *arguments: pool(*arguments)[:3]

        return {
            "ours": work(without_log_sums(gated_pooling.fused), offsets),
            "reference": work(without_log_sums(gated_pooling.reference), offsets),
            "eager": work(_eager, bounds),
            "compiled": work(torch.compile(_eager), bounds),
        }

    return make


def _case(
    name: str,
    sizes: list[int],
    features: int,
    hidden: int,
    branches: int = 1,
    *,
    backward: bool,
    projected: bool = False,
) -> Case:
    tiles = sum(sizes)
    # forward the gate; backward the gate again, its weights' gradient, and the tiles' where they want one
    products = 1 + backward * (2 + projected)
    # read once forward, twice backward; their gradient written
    passes = 1 + backward * (2 + projected)
    return Case(
        name=f"{name}, {'forward and backward' if backward else 'forward'}",
        make=_make(sizes, features, hidden, branches, backward, projected),
        bytes_moved=4 * tiles * features * passes,
        flops=2 * tiles * features * 2 * hidden * products,
        dtypes=("float32", "bfloat16"),
        goal="at least twice eager on the CPU" if backward and not projected else "",
    )


CASES: list[Case] = [
    _case("200,000 tiles x 1,024, hidden 256", [200_000], 1024, 256, backward=False),
    _case("200,000 tiles x 1,024, hidden 256", [200_000], 1024, 256, backward=True),
    _case("200,000 tiles x 1,024, hidden 384", [200_000], 1024, 384, backward=True),
    _case("200,000 tiles x 1,024, hidden 512", [200_000], 1024, 512, backward=True),
    _case(
        "40,000 tiles x 512 after a projection, hidden 128, 5 branches",
        [40_000],
        512,
        128,
        5,
        backward=True,
        projected=True,
    ),
    _case(
        "64 bags of 100 to 2,000 tiles x 1,024, hidden 256", [100 + 30 * i for i in range(64)], 1024, 256, backward=True
    ),
]
