"""A convolution, attention inside windows, attention across a grid: the block of MaxViT (Tu et al., ECCV 2022).

    x ← x + γ₁ · MBConv(x);   x ← x + γ · attention(x), x ← x + γ · MLP(x), within windows and then within a grid

A grid takes every so many-th place, so after both every place has seen every other. With expansions of 4, about 32 · C²
· N multiply-adds, and 4 · C · P · N for windows and grids of P places: linear in the places. Memory for the gradient:
some sixty maps of C channels, and P numbers for each place and head, four times. Heavy: for coarse stages of networks
that have time.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..attentive import Attentive
from ..blocks import InstanceNorm
from ..dims import CONVOLUTION, Dims
from ._layers import PlaceNorm, added, heads_of, per_largest, precise
from ._windows import Windows, of_size
from .squeeze_excitation import SqueezeExcitation


class MaxViT(Attentive):
    """The two attentions show themselves, and so does the gate of channels."""

    def __init__(
        self, channels: int, *, dims: Dims = 3, size: int | None = None, width: int = 32, expansion: int = 4
    ) -> None:
        """Windows and grids have at most `size` places along each axis: 7 over planes and 4 over volumes unless told. A head
        is `width` channels wide; inside convolution and MLPs there are `expansion` times as many channels."""
        super().__init__()
        size = size or {2: 7, 3: 4}[dims]
        self.convolve = MBConv(channels, dims, expansion)
        self.within = WindowAttention(channels, dims, size, False, width)
        self.within_mlp = MLP(channels, dims, expansion)
        self.across = WindowAttention(channels, dims, size, True, width)
        self.across_mlp = MLP(channels, dims, expansion)
        # stochastic depth, which the authors train with, is for networks of many such blocks; a start at zero is for one
        self.gamma = nn.Parameter(torch.zeros(5))

    def forward(self, x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B C *space"]:
        parts = (self.convolve, self.within, self.within_mlp, self.across, self.across_mlp)
        for part, gamma in zip(parts, self.gamma.split(1), strict=True):
            x = added(x, part(x), gamma)
        return x


class MBConv(nn.Module):
    def __init__(self, channels: int, dims: Dims, expansion: int) -> None:
        super().__init__()
        convolution, wide = CONVOLUTION[dims], expansion * channels
        self.layers = nn.Sequential(
            InstanceNorm(channels),  # the authors' are batch norms
            convolution(channels, wide, 1, bias=False),
            InstanceNorm(wide),
            nn.GELU(),
            convolution(wide, wide, 3, padding=1, groups=wide, bias=False),
            InstanceNorm(wide),
            nn.GELU(),
            SqueezeExcitation(wide, dims=dims, reduction=4 * expansion),  # a quarter of the block's channels
            convolution(wide, channels, 1),
        )

    def forward(self, x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B C *space"]:
        return self.layers(x)


class MLP(nn.Module):
    def __init__(self, channels: int, dims: Dims, expansion: int) -> None:
        super().__init__()
        convolution, wide = CONVOLUTION[dims], expansion * channels
        self.layers = nn.Sequential(
            PlaceNorm(channels), convolution(channels, wide, 1), nn.GELU(), convolution(wide, channels, 1)
        )

    def forward(self, x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B C *space"]:
        return self.layers(x)


class WindowAttention(Attentive):
    """Shows the attention that each place receives in its window: [B, *space], 1 where it is most."""

    def __init__(self, channels: int, dims: Dims, size: int, is_grid: bool, width: int) -> None:
        super().__init__()
        self.size, self.is_grid = size, is_grid
        self.heads = heads_of(channels, width)
        self.norm = PlaceNorm(channels)
        self.project = nn.Linear(channels, 3 * channels, bias=False)  # softmax takes a bias of the keys away again
        self.out = nn.Linear(channels, channels)
        self.apart = nn.Parameter(0.02 * torch.randn(self.heads, (2 * size - 1) ** dims))

    def forward(self, x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B C *space"]:
        windows = of_size(x.shape[2:], self.size, is_grid=self.is_grid)
        projected = self.project(windows.cut(self.norm(x)))  # [B, R, n, 3C]
        q, k, v = projected.unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)  # [B, R, heads, n, d]
        scores = q.shape[-1] ** -0.5 * precise(q @ k.mT) + self._bias(windows)
        if windows.is_padded:
            real = windows.real(x)  # [R, n]
            scores = scores.masked_fill(~real[:, None, None, :], -torch.inf)
        shares = torch.softmax(scores, dim=-1)
        self.show(lambda: _received(shares, windows))
        return windows.join(self.out((shares.to(v.dtype) @ v).transpose(2, 3).flatten(3)))

    def _bias(self, windows: Windows) -> Float[Tensor, "heads n n"]:
        """What each step from query to key is worth."""
        axes = [torch.arange(n, device=self.apart.device) for n in windows.sizes]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)  # [n, axis]
        step = places[None] - places[:, None] + self.size - 1  # [query, key, axis]
        row = torch.zeros_like(step[..., 0])
        for axis in range(len(windows.sizes)):
            row = row * (2 * self.size - 1) + step[..., axis]
        return self.apart[:, row]


def _received(shares: Float[Tensor, "B R heads n n"], windows: Windows) -> Float[Tensor, "B ..."]:
    """[B, *space]: what padding asks is left out."""
    real = windows.real(shares).to(shares.dtype)  # [R, n]
    received = (shares * real[:, None, :, None]).sum((2, 3))  # [B, R, n]
    return per_largest(windows.join(received.unsqueeze(-1)).squeeze(1))


BLOCK: type[Attentive] = MaxViT
