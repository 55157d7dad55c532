"""Each channel is weighed by what all channels are on average: squeeze-and-excitation (Hu et al., CVPR 2018).

    y = x · sigmoid(W₂ relu(W₁ mean(x)))

2 · C · N multiply-adds and C² / 8 for the weights, N places; memory for the gradient: none beyond x. Good as a first
try: a channel that does not matter in this scan is turned down, wherever it is.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..attentive import Attentive
from ..dims import Dims
from ._layers import OPEN, Gate, gated, reduced


class SqueezeExcitation(Gate):
    """Shows the weight of each channel: [B, C]."""

    def __init__(self, channels: int, *, dims: Dims = 3, reduction: int = 16) -> None:
        """The bottleneck has `reduction` times fewer channels. Planes and volumes (`dims`) are the same to it."""
        super().__init__()
        hidden = reduced(channels, reduction)
        raise_ = nn.Linear(hidden, channels)
        nn.init.constant_(raise_.bias, OPEN)
        self.weigh = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), raise_)

    def forward(self, x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B C *space"]:
        weights = torch.sigmoid(self.weigh(x.flatten(2).mean(2)))  # [B, C]
        self.show(lambda: weights)
        return gated(x, weights)


BLOCK: type[Attentive] = SqueezeExcitation
