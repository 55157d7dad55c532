"""Every channel looks at every other: DANet's channel attention (Fu et al., CVPR 2019).

    out = gamma · softmax(sign · scale · X Xᵀ) X + x,    X = x as [channels, places]

Time grows with places × channels², memory with the places.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kernels import channel_attention

from ..attentive import Attentive


class ChannelAttention(Attentive):
    """Shows the matrix of who looks at whom: [B, channel that looks, channel that is looked at]."""

    def __init__(self, channels: int, *, sign: int = -1, scale: float = 1.0, mean: bool = False) -> None:
        """`sign` −1 lets the least similar channels count most, as DANet's code does; 1 the most similar, as its formula
        says. `mean` takes the mean over places for the sum, which is so large that one channel alone is chosen."""
        super().__init__()
        if sign not in (-1, 1) or channels < 1:
            raise ValueError(
                f"Channel attention was given sign {sign} and {channels} channels; it needs −1 or 1, and one channel or "
                "more. Choose −1 for DANet's code, 1 for its formula."
            )
        self.gamma = nn.Parameter(torch.zeros(1))  # DANet: attention is learned on top of a network without
        self.scale = sign * scale
        self.mean = mean

    def forward(self, x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B C *space"]:
        scale = self.scale / math.prod(x.shape[2:]) if self.mean else self.scale
        self.show(lambda: _shares(x, scale))
        return channel_attention.fused(x, self.gamma, scale)


def _shares(x: Float[Tensor, "B C *space"], scale: float) -> Float[Tensor, "B C C"]:
    channels = x.float().flatten(2)
    return torch.softmax(scale * (channels @ channels.mT), dim=-1)


BLOCK: type[Attentive] = ChannelAttention
