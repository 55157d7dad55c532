"""What several attention blocks are made of: gates that begin open, norms for planes and volumes, residuals."""

from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ..attentive import Attentive

OPEN = 2.0
"""Sigmoid makes 0.88 of it: a gate that has learned nothing lets nearly everything pass."""

Norm = TypeVar("Norm", bound=nn.Module)


class Gate(Attentive):
    """A block that multiplies its input by weights between 0 and 1: cheap, for maps of any size, at home on a skip."""


class PlaceNorm(nn.Module):
    """Layer norm over the channels of each place."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B C *space"]:
        return functional.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, self.eps).movedim(
            -1, 1
        )


def opened(norm: Norm) -> Norm:
    """The norm before a gate's sigmoid, set so that the gate begins open and hardly varies: put into a trained network,
    it leaves what that has learned."""
    for name, start in (("weight", 0.1), ("bias", OPEN)):
        nn.init.constant_(norm.get_parameter(name), start)
    return norm


def gated(x: Float[Tensor, "B C *space"], gate: Float[Tensor, "B ..."]) -> Float[Tensor, "B C *space"]:
    """x times a gate of [B, C] or of [B, 1 or C, *space]: under autocast too the result has the type of x."""
    gate = gate.reshape(*gate.shape, *[1] * (x.ndim - gate.ndim))
    return x * gate.to(x.dtype)


def added(
    x: Float[Tensor, "B C *space"], found: Float[Tensor, "B C *space"], gamma: Float[Tensor, "1"]
) -> Float[Tensor, "B C *space"]:
    """x + gamma · found, in the type of x. With gamma at 0 a block begins as if it were not there."""
    return x + (gamma * found).to(x.dtype)


def precise(x: Tensor) -> Tensor:
    """At least float32: half precision cannot add up a softmax over many places."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def tokens(x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B N C"]:
    """A view; where channels lie last, one without gaps."""
    return x.flatten(2).mT


def per_largest(weights: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
    """1 where the module looks most."""
    return weights / weights.flatten(1).amax(1).clamp_min(1e-12).reshape(-1, *[1] * (weights.ndim - 1))


def heads_of(channels: int, width: int) -> int:
    """As many heads as divide the channels and are `width` wide or wider; one head where there are too few channels."""
    return max(heads for heads in range(1, max(1, channels // width) + 1) if channels % heads == 0)


def reduced(channels: int, times: int) -> int:
    """Channels of a bottleneck. CBAM's and squeeze-excitation's 16 times fewer leave a narrow network 1: 4 at least."""
    return max(4, channels // times)
