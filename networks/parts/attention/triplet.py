"""A gate for every pair of axes, channels among them: triplet attention (Misra et al., WACV 2021).

    y = mean over axes a of x · sigmoid(norm(conv₇([max over a; mean over a])))

Over planes three gates (pooled along C, H, W), over volumes four (C, D, H, W). 6 or 8 · C · N operations for the pools
and gates, and 98 or 686 multiply-adds for each place of a pooled map: C · N · (1/D + 1/H + 1/W) + N places. Memory for
the gradient: one or two maps of C channels. The convolution also runs along the channels: it takes their order for a
meaning, which is learned.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..attentive import Attentive
from ..blocks import InstanceNorm
from ..dims import BATCH_NORM, CONVOLUTION, Dims
from ._layers import Gate, opened


class Triplet(Gate):
    """Shows the gate that is the same for all channels: [B, *space]."""

    def __init__(self, channels: int, *, dims: Dims = 3, kernel: int = 7, faithful: bool = False) -> None:
        """`kernel`: of the convolution over a pooled map, odd. Any number of `channels` will do. `faithful`: the authors'
        batch norm, of momentum 0.01."""
        super().__init__()
        self.gates = nn.ModuleList(AxisGate(dims, axis, kernel, faithful) for axis in range(1, dims + 2))

    def forward(self, x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B C *space"]:
        weights = [gate(x) for gate in self.gates]  # [B, C, *space] but for one axis, which has length 1
        self.show(lambda: weights[0].squeeze(1))
        y = x * weights[0].to(x.dtype)
        for more in weights[1:]:
            y = y + x * more.to(x.dtype)
        return y / len(weights)


class AxisGate(nn.Module):
    """[B, C, *space] with one axis pooled away: what remains has as many axes as space has, so one convolution does."""

    def __init__(self, dims: Dims, axis: int, kernel: int, faithful: bool) -> None:
        super().__init__()
        self.axis = axis
        self.compare = CONVOLUTION[dims](2, 1, kernel, padding=kernel // 2, bias=False)
        # instance norm: the statistics of one or two scans are no statistics of a batch
        self.norm = BATCH_NORM[dims](1, momentum=0.01) if faithful else opened(InstanceNorm(1))

    def forward(self, x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B ..."]:
        extremes = torch.stack([x.amax(self.axis), x.mean(self.axis)], dim=1)  # [B, 2, *remaining]
        return torch.sigmoid(self.norm(self.compare(extremes))).squeeze(1).unsqueeze(self.axis)


BLOCK: type[Attentive] = Triplet
