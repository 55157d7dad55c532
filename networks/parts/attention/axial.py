"""Every place looks along its row, its column and its line of slices: axial attention (Ho et al., 2019), with the sense
of distance of Axial-DeepLab (Wang et al., ECCV 2020).

    share of key p for query o, along one axis: softmax((q_o·k_p + q_o·r^q_{p−o} + k_p·r^k_{p−o}) / √d)
    out_o = Σ_p share · (v_p + r^v_{p−o})

One axis after the other, so what a place finds comes from the whole map. With half of C channels inside, 1.75 · C ·
L · N multiply-adds for each axis of length L, and C² · N (1 + axes / 2) for the projections; memory for the gradient:
five maps of C channels, and two or three times N · (D + H + W) numbers for each head. Good where organs are long; at
coarse stages, for that memory.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..attentive import Attentive
from ..blocks import InstanceNorm
from ..dims import CONVOLUTION, Dims
from ._layers import added, heads_of, per_largest, precise


class Axial(Attentive):
    """The attention along each axis shows itself."""

    def __init__(self, channels: int, *, dims: Dims = 3, width: int = 16, reach: int = 32) -> None:
        """A head's values are `width` channels wide. Places further apart than `reach` are as far apart as that."""
        super().__init__()
        convolution, inner = CONVOLUTION[dims], max(2, channels // 4 * 2)
        # over one scan at a time, where the authors have batch norms around and inside the attention
        self.lower = nn.Sequential(convolution(channels, inner, 1, bias=False), InstanceNorm(inner))
        self.axes = nn.ModuleList(AlongAxis(inner, axis, width, reach) for axis in range(2, 2 + dims))
        self.out = convolution(inner, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B C *space"]:
        found = self.lower(x)
        for attend in self.axes:
            found = attend(found)
        return added(x, self.out(torch.relu(found)), self.gamma)


class AlongAxis(Attentive):
    """Shows the attention that each place receives from its line: [B, *space], 1 where it is most."""

    def __init__(self, channels: int, axis: int, width: int, reach: int) -> None:
        super().__init__()
        self.axis, self.reach = axis, reach
        self.heads = heads_of(channels // 2, max(1, width // 2))
        d = channels // 2 // self.heads  # queries and keys are half as wide as values
        self.project = nn.Linear(channels, 2 * channels, bias=False)  # softmax takes a bias of the keys away again
        self.of_query, self.of_key, self.of_value = (
            nn.Parameter(wide**-0.5 * torch.randn(2 * reach - 1, wide)) for wide in (d, d, 2 * d)
        )
        self.scale = d**-0.5  # the authors' batch norms of the scores stand here

    def forward(self, x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B C *space"]:
        lines = self.project(x.movedim((self.axis, 1), (-2, -1)))  # [B, *other axes, L, 2C]
        values = lines.shape[-1] // 2
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(-2, -3)  # [B, *other axes, heads, L, d]
            for part in lines.split([values // 2, values // 2, values], dim=-1)
        )
        apart = self._apart(x.shape[self.axis], x.device)
        scores = (
            q @ k.mT
            + torch.einsum("...od,opd->...op", q, self.of_query[apart].to(q.dtype))
            + torch.einsum("...pd,opd->...op", k, self.of_key[apart].to(q.dtype))
        )
        shares = torch.softmax(self.scale * precise(scores), dim=-1)
        self.show(lambda: per_largest(shares.sum((-2, -3)).movedim(-1, self.axis - 1)))
        shares = shares.to(v.dtype)
        found = shares @ v + torch.einsum("...op,opd->...od", shares, self.of_value[apart].to(v.dtype))
        return found.transpose(-2, -3).flatten(-2).movedim((-2, -1), (self.axis, 1))

    def _apart(self, length: int, device: torch.device) -> Tensor:
        """[query, key]: which row of the tables is theirs. The authors' tables fit one size of map only; with what lies
        beyond `reach` taken together, any size fits, and a step stays a step."""
        place = torch.arange(length, device=device)
        return (place[None, :] - place[:, None]).clamp(1 - self.reach, self.reach - 1) + self.reach - 1


BLOCK: type[Attentive] = Axial
