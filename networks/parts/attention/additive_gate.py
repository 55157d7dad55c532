"""What the decoder knows says where a skip counts: the additive gate of Attention U-Net (Oktay et al., MIDL 2018).

    y = x · sigmoid(norm(ψ relu(norm(W_x x) + norm(W_g g))))

C · h · N multiply-adds for x and as many for the signal g, h hidden channels, half of C unless told; memory for the
gradient: three maps of C channels. Good on every skip of a network with a decoder: what the coarse levels rule out does
not come back.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ..attentive import Attentive
from ..blocks import InstanceNorm
from ..dims import CONVOLUTION, Dims, resize
from ._layers import Gate, gated, opened


class AdditiveGate(Gate):
    """Shows the weight of each place: [B, *space]."""

    def __init__(self, channels: int, *, dims: Dims = 3, signal: int | None = None, hidden: int | None = None) -> None:
        """The gating signal has `signal` channels, as many as the gated map unless told."""
        super().__init__()
        convolution, hidden = CONVOLUTION[dims], hidden or max(1, channels // 2)
        self.of_map = convolution(channels, hidden, 1, bias=False)
        self.of_signal = convolution(signal or channels, hidden, 1, bias=False)
        # the paper's batch norms, over one scan at a time; a slope of 0 is the relu behind the sum
        self.norm_signal, self.norm_map = InstanceNorm(hidden), InstanceNorm(hidden, slope=0.0)
        self.decide = convolution(hidden, 1, 1, bias=False)
        self.norm = opened(InstanceNorm(1))

    def forward(
        self, x: Float[Tensor, "B C *space"], signal: Float[Tensor, "B G *coarse"] | None = None
    ) -> Float[Tensor, "B C *space"]:
        """Gated by a signal of any resolution; like every other block here, by x itself where there is none."""
        asked = self.norm_signal(self.of_signal(x if signal is None else signal))  # [B, hidden, *coarse]
        agreed = self.norm_map(self.of_map(x), resize(asked, x.shape[2:]))  # [B, hidden, *space]
        weights = torch.sigmoid(self.norm(self.decide(agreed)))  # [B, 1, *space]
        self.show(lambda: weights.squeeze(1))
        return gated(x, weights)


BLOCK: type[Attentive] = AdditiveGate
