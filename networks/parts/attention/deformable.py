"""A gate that looks where the scan tells it to: deformable attention, DAS (Salajegheh et al., 2023).

    t = gelu(norm(W (depthwise conv₃ x))), a fifth of the channels
    y = x · sigmoid(LN(deformable conv₃(t, offsets = conv₃(t))))

With a = 1/5 and 9 taps (27 over volumes), taps · a · C · N · (C + 2 · taps) multiply-adds, 3 · taps over volumes:
linear in the places. Memory for the gradient: 5 maps of C channels over planes, 9 over volumes, and of the positions 36
numbers for each place, or 162. Good behind a stage whose structures bend.
"""

import itertools
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ..attentive import Attentive
from ..blocks import InstanceNorm
from ..dims import CONVOLUTION, Dims
from ._layers import Gate, PlaceNorm, gated, opened, precise


class Deformable(Gate):
    """Shows the mean weight of each place: [B, *space]."""

    def __init__(self, channels: int, *, dims: Dims = 3, share: float = 0.2) -> None:
        """What is looked at has `share` of the channels, 4 at least."""
        super().__init__()
        convolution, inner = CONVOLUTION[dims], max(4, math.ceil(share * channels))
        self.taps = 3**dims
        self.lower = nn.Sequential(
            convolution(channels, channels, 3, padding=1, groups=channels, bias=False),
            convolution(channels, inner, 1, bias=False),
            InstanceNorm(inner),
            nn.GELU(),
        )
        self.offsets = convolution(inner, self.taps * dims, 3, padding=1)
        # it begins as an ordinary convolution; not by offsets' weights of zero, for networks initialise convolutions anew
        self.bend = nn.Parameter(torch.zeros(1))
        self.raise_ = convolution(inner * self.taps, channels, 1, bias=False)
        self.norm = opened(PlaceNorm(channels))  # others' versions norm over places too: a scan's size would matter

    def forward(self, x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B C *space"]:
        lowered = self.lower(x)
        seen = self._look(precise(lowered), precise(self.bend * self.offsets(lowered)))  # [B, inner · taps, *space]
        weights = torch.sigmoid(self.norm(self.raise_(seen)))  # [B, C, *space]
        self.show(lambda: weights.mean(1))
        return gated(x, weights)

    def _look(
        self, x: Float[Tensor, "B c *space"], offsets: Float[Tensor, "B o *space"]
    ) -> Float[Tensor, "B m *space"]:
        """x at each tap of each place, moved by its offset, between places linearly, zero outside: by grid_sample, which
        every machine has and which knows volumes. Places are float32: half precision cannot tell 300 from 301."""
        space, dims = x.shape[2:], x.ndim - 2
        along = [torch.arange(n, dtype=x.dtype, device=x.device) for n in space]
        here = torch.stack(torch.meshgrid(*along, indexing="ij"), dim=-1)  # [*space, axis]
        taps = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=dims)), dtype=x.dtype, device=x.device)
        moved = offsets.unflatten(1, (self.taps, dims)).movedim(2, -1)  # [B, taps, *space, axis]
        there = here + taps.reshape(self.taps, *[1] * dims, dims) + moved
        size = torch.tensor(space, dtype=x.dtype, device=x.device)
        there = ((2 * there + 1) / size - 1).flip(-1)  # grid_sample: −1 and 1 are the edges, the last axis comes first
        with torch.autocast(x.device.type, enabled=False):
            seen = functional.grid_sample(x, there.flatten(1, 2), align_corners=False)  # [B, c, taps · D, ...]
        return seen.unflatten(2, (self.taps, space[0])).flatten(1, 2)


BLOCK: type[Attentive] = Deformable
