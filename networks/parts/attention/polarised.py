"""Half the channels for all places, all places for one channel: polarised self-attention (Liu et al., 2021).

    c = sigmoid(LN(W_z (W_v x · softmax over places (W_q x)ᵀ)))       weighs channels
    s = sigmoid(softmax over channels (W_q' mean x) · W_v' x)         weighs places
    y = x · (c + s) / 2, or s(c(x) · x) · c(x) · x one after the other

C² · N multiply-adds for the 1×1 convolutions, 4 · C · N for the rest; memory for the gradient: two maps of C channels.
No map of places by places. Good for fine detail: neither gate lowers the resolution.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..attentive import Attentive
from ..dims import CONVOLUTION, Dims
from ._layers import OPEN, Gate, gated, opened, precise


class Polarised(Gate):
    """Its two gates show what they do."""

    def __init__(self, channels: int, *, dims: Dims = 3, is_sequential: bool = False, faithful: bool = False) -> None:
        """`is_sequential`: places are weighed after channels, instead of beside them. `faithful`: the authors' code, whose
        two forms differ from the paper and from each other."""
        super().__init__()
        self.is_sequential = is_sequential
        # side by side, the paper and the code add both gates; half of that begins near identity
        self.share = 1.0 if faithful else 0.5
        self.channel = ChannelGate(channels, dims, is_sequential, faithful)
        self.place = PlaceGate(channels, dims, is_sequential, faithful)

    def forward(self, x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B C *space"]:
        weighed = gated(x, self.channel(x))
        if self.is_sequential:
            return gated(weighed, self.place(weighed))
        return self.share * (weighed + gated(x, self.place(x)))


class ChannelGate(Attentive):
    """Shows the weight of each channel: [B, C]."""

    def __init__(self, channels: int, dims: Dims, is_sequential: bool, faithful: bool) -> None:
        super().__init__()
        half = max(1, channels // 2)
        self.where = CONVOLUTION[dims](channels, 1, 1, bias=False)  # a softmax over places takes a bias away again
        self.what = CONVOLUTION[dims](channels, half, 1)
        if faithful and is_sequential:
            narrow = max(1, half // 4)
            self.weigh = nn.Sequential(
                nn.Linear(half, narrow), nn.LayerNorm(narrow), nn.ReLU(), nn.Linear(narrow, channels)
            )
        else:  # the code's parallel form forgets the paper's norm
            norms = [] if faithful else [opened(nn.LayerNorm(channels))]
            self.weigh = nn.Sequential(nn.Linear(half, channels), *norms)

    def forward(self, x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B C"]:
        where = precise(self.where(x).flatten(2)).softmax(-1)  # [B, 1, N]
        found = precise(self.what(x).flatten(2)) @ where.mT  # [B, C / 2, 1]
        weights = torch.sigmoid(self.weigh(found.squeeze(2)))
        self.show(lambda: weights)
        return weights


class PlaceGate(Attentive):
    """Shows the weight of each place: [B, *space]."""

    def __init__(self, channels: int, dims: Dims, is_sequential: bool, faithful: bool) -> None:
        super().__init__()
        half = max(1, channels // 2)
        self.asked = nn.Linear(channels, half)  # behind the mean instead of before it: the same, for N times less
        self.what = CONVOLUTION[dims](channels, half, 1, bias=False)
        self.open = nn.Parameter(torch.full((1,), 0.0 if faithful else OPEN))
        self.over_places = None if not faithful else "values" if is_sequential else "scores"

    def forward(self, x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B 1 *space"]:
        asked = precise(self.asked(x.flatten(2).mean(2))).unsqueeze(1)  # [B, 1, C / 2]
        what = precise(self.what(x).flatten(2))  # [B, C / 2, N]
        # The paper's softmax is over the channels that are asked for. The code's is over places: of the scores in its
        # parallel form, which makes every gate sigmoid(1 / N), a half; of the values in its sequential form.
        if self.over_places == "scores":
            scores = (asked @ what).softmax(-1)
        elif self.over_places == "values":
            scores = asked @ what.softmax(-1)
        else:
            scores = asked.softmax(-1) @ what
        weights = torch.sigmoid(scores + self.open).unflatten(2, x.shape[2:])  # [B, 1, *space]
        self.show(lambda: weights.squeeze(1))
        return weights


BLOCK: type[Attentive] = Polarised
