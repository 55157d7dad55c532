"""Channels are weighed, then places: the convolutional block attention module (Woo et al., ECCV 2018).

    y = s(c(x) · x) · c(x) · x,   c = sigmoid(MLP(mean x) + MLP(max x)),   s = sigmoid(norm(conv₇([max x; mean x])))

4 · C · N multiply-adds, 98 · N for the convolution over planes and 686 · N over volumes; memory for the gradient: two
maps of C channels. Good where a structure is small: the second gate says where to look.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..attentive import Attentive
from ..blocks import InstanceNorm
from ..dims import BATCH_NORM, CONVOLUTION, Dims
from ._layers import OPEN, Gate, gated, opened, reduced


class CBAM(Gate):
    """Its two gates show what they do; channels come first, as the paper found best."""

    def __init__(
        self, channels: int, *, dims: Dims = 3, reduction: int = 16, kernel: int | Sequence[int] = 7,
        faithful: bool = False,
    ) -> None:  # fmt: skip
        """`reduction`: how many times fewer channels the bottleneck has. `kernel`: of the convolution over places, odd;
        (3, 7, 7) suits slices that lie far apart. `faithful`: the authors' norm and start."""
        super().__init__()
        self.channel = ChannelGate(channels, reduction=reduction, faithful=faithful)
        self.place = PlaceGate(dims=dims, kernel=kernel, faithful=faithful)

    def forward(self, x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B C *space"]:
        return self.place(self.channel(x))


class ChannelGate(Attentive):
    """Shows the weight of each channel: [B, C]."""

    def __init__(self, channels: int, *, reduction: int, faithful: bool) -> None:
        super().__init__()
        hidden = max(1, channels // reduction) if faithful else reduced(channels, reduction)
        raise_ = nn.Linear(hidden, channels)
        if not faithful:
            nn.init.constant_(raise_.bias, OPEN / 2)  # it is added twice
        self.weigh = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), raise_)

    def forward(self, x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B C *space"]:
        places = x.flatten(2)
        weights = torch.sigmoid(self.weigh(places.mean(2)) + self.weigh(places.amax(2)))  # [B, C]
        self.show(lambda: weights)
        return gated(x, weights)


class PlaceGate(Attentive):
    """Shows the weight of each place: [B, *space]."""

    def __init__(self, *, dims: Dims, kernel: int | Sequence[int], faithful: bool) -> None:
        super().__init__()
        sizes = (kernel,) * dims if isinstance(kernel, int) else tuple(kernel)
        if len(sizes) != dims or not all(size % 2 for size in sizes):
            raise ValueError(
                f"CBAM was given a kernel of {kernel} for {dims} axes; it needs an odd size for each, or one for all. "
                "Leave it out for 7."
            )
        convolution: Callable[..., nn.Module] = CONVOLUTION[dims]
        self.compare = convolution(2, 1, sizes, padding=tuple(size // 2 for size in sizes), bias=False)
        # the authors' code has a batch norm of momentum 0.01 that their paper does not: with one or two scans in a batch
        # its running statistics are not those of any scan
        self.norm = BATCH_NORM[dims](1, momentum=0.01) if faithful else opened(InstanceNorm(1))

    def forward(self, x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B C *space"]:
        extremes = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], dim=1)  # [B, 2, *space]
        weights = torch.sigmoid(self.norm(self.compare(extremes)))  # [B, 1, *space]
        self.show(lambda: weights.squeeze(1))
        return gated(x, weights)


BLOCK: type[Attentive] = CBAM
