"""Every place looks at every other: DANet's position attention (Fu et al., CVPR 2019).

    out = gamma · softmax(q kᵀ) v + x,    q, k, v = 1×1 convolutions of x

Time grows with the square of the places, memory with their number: the map of who looks at whom never exists.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from kernels import position_attention

from ..attentive import Attentive
from ..dims import CONVOLUTION, Dims, resize

POOL = {2: functional.avg_pool2d, 3: functional.avg_pool3d}


class PositionAttention(Attentive):
    """Shows how much attention each place receives."""

    def __init__(
        self, channels: int, *, reduced: int | None = None, dims: Dims = 3, scale: float = 1.0,
        stride: Sequence[int] | int = 1, key_bias: bool = False,
    ) -> None:  # fmt: skip
        """Queries and keys have `reduced` channels, an eighth unless told. A map with too many places is looked at
        `stride` times smaller, and what was found is enlarged again. DANet's code has `key_bias`: it adds the same to
        all scores of a query, which softmax takes away again."""
        super().__init__()
        convolution, reduced = CONVOLUTION[dims], reduced or max(1, channels // 8)
        self.query = convolution(channels, reduced, 1)
        self.key = convolution(channels, reduced, 1, bias=key_bias)
        self.value = convolution(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))  # DANet: attention is learned on top of a network without
        self.scale = scale
        self.stride = (stride,) * dims if isinstance(stride, int) else tuple(stride)

    def forward(self, x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B C *space"]:
        stride = tuple(min(step, n) for step, n in zip(self.stride, x.shape[2:], strict=True))
        pooled = math.prod(stride) > 1
        looked_at = POOL[x.ndim - 2](x, stride, ceil_mode=True) if pooled else x  # [B, C, *space / stride]
        q, k, v = _tokens(self.query(looked_at)), _tokens(self.key(looked_at)), _tokens(self.value(looked_at))
        self.show(lambda: received(q, k, self.scale).unflatten(1, looked_at.shape[2:]))
        if not pooled:
            return position_attention.fused(q, k, v, self.gamma, _tokens(x), self.scale).mT.reshape(x.shape)
        found = position_attention.fused(q, k, v, self.gamma, None, self.scale)  # [B, N, C]
        return x + resize(found.mT.reshape(looked_at.shape), x.shape[2:])


def received(
    q: Float[Tensor, "B N d"], k: Float[Tensor, "B M d"], scale: float = 1.0, block: int = 256
) -> Float[Tensor, "B M"]:
    """The attention that each key gets from all queries, 1 for the key that gets most: a block of queries at a time, so
    that the map is never there."""
    total = q.new_zeros(k.shape[:-1], dtype=torch.float32)
    for some in q.float().split(block, dim=1):
        total = total + torch.softmax(scale * (some @ k.float().mT), dim=-1).sum(1)  # [B, block, M] -> [B, M]
    return total / total.amax(-1, keepdim=True)


def _tokens(x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B N C"]:
    return x.flatten(2).mT


BLOCK: type[Attentive] = PositionAttention
