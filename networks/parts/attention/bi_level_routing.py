"""Regions choose regions, then places look at places: bi-level routing attention of BiFormer (Zhu et al., CVPR 2023).

    routes of a region = the k regions whose mean key suits its mean query best
    y = x + gamma · W_o(softmax(q K_routedᵀ / √d) V_routed + conv(v))

With R regions, 2 · C · N · k · N / R multiply-adds for the attention, C · R² for the choice and 4 · C² · N for the
projections. Memory for the gradient: k copies of keys and values, 17 maps of C channels with k = 4; the map of places
by places never exists. Good at coarse stages of large scans, where most regions have nothing to do with each other.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kernels import position_attention

from ..attentive import Attentive
from ..dims import CONVOLUTION, Dims
from ._layers import PlaceNorm, added, heads_of, per_largest, precise
from ._windows import Windows, of_count

FAR = -1e3
"""The score of a place that is padding: its share is zero, and half precision holds the number."""


class BiLevelRouting(Attentive):
    """Shows the attention that each place receives: [B, *space], 1 where it is most."""

    def __init__(
        self, channels: int, *, dims: Dims = 3, regions: int | None = None, routes: int = 4, width: int = 32,
        kernel: int = 5,
    ) -> None:  # fmt: skip
        """At most `regions` along each axis, 7 over planes and 4 over volumes unless told; each looks at `routes` of them.
        A head is `width` channels wide. `kernel`: of the convolution beside the attention, odd."""
        super().__init__()
        convolution = CONVOLUTION[dims]
        self.regions, self.routes = regions or {2: 7, 3: 4}[dims], routes
        self.heads = heads_of(channels, width)
        self.norm = PlaceNorm(channels)
        self.project = convolution(channels, 3 * channels, 1, bias=False)  # softmax takes a bias of the keys away again
        self.beside = convolution(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.out = convolution(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B C *space"]:
        windows = of_count(x.shape[2:], self.regions)
        queries, keys, values = self.project(self.norm(x)).chunk(3, dim=1)
        q, k, v = (windows.cut(part) for part in (queries, keys, values))  # [B, R, n, C]
        routes = self._routes(q, k, windows)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (q, k, v))  # [B, R, n, heads, d]
        # the authors divide by the root of all channels, but a head's scores are sums of d terms
        scale = q.shape[-1] ** -0.5
        if windows.is_padded:
            q, k = _masked(q, k, windows.real(q), scale)
        q, k, v = q.transpose(2, 3), _routed(k, routes), _routed(v, routes)  # [B, R, heads, n or k · n, d]
        self.show(lambda: _received(q, k, routes, windows, scale))
        found = position_attention.fused(q, k, v, scale=scale)
        found = windows.join(found.transpose(2, 3).flatten(3))
        return added(x, self.out(found + self.beside(values)), self.gamma)

    def _routes(self, q: Tensor, k: Tensor, windows: Windows) -> Int[Tensor, "B R routes"]:
        """No gradient passes through a choice. Means are taken over places, not over padding."""
        real = windows.real(q).to(torch.float32).unsqueeze(-1)  # [R, n, 1]
        q, k = ((part.detach().float() * real).sum(2) / real.sum(1) for part in (q, k))  # [B, R, C]
        return (q @ k.mT).topk(min(self.routes, q.shape[1]), dim=-1).indices


def _masked(q: Tensor, k: Tensor, real: Bool[Tensor, "R n"], scale: float) -> tuple[Tensor, Tensor]:
    """One coordinate more, 1 in every query, far below zero in a key that is padding: the authors let padding take part.
    So the mask is a part of the product, and no mask of places by places need exist."""
    column = torch.where(real, 0.0, FAR / scale).to(k.dtype)[:, :, None, None].expand(*k.shape[:-1], 1)
    return torch.cat([q, torch.ones_like(column)], -1), torch.cat([k, column], -1)


def _routed(part: Float[Tensor, "B R n heads d"], routes: Int[Tensor, "B R k"]) -> Float[Tensor, "B R heads kn d"]:
    """For each region the places of those it chose."""
    batch = torch.arange(len(part), device=part.device)[:, None, None]
    return part[batch, routes].flatten(2, 3).transpose(2, 3)


def _received(
    q: Float[Tensor, "B R heads n d"], k: Float[Tensor, "B R heads kn d"], routes: Int[Tensor, "B R k"],
    windows: Windows, scale: float,
) -> Float[Tensor, "B ..."]:  # fmt: skip
    """[B, *space]: one head at a time, and what padding asks left out."""
    real = windows.real(q).to(torch.float32).unsqueeze(-1)  # [R, n, 1]
    given = q.new_zeros(*routes.shape, q.shape[3], dtype=torch.float32).flatten(2)  # [B, R, k · n]
    for head in range(q.shape[2]):
        shares = torch.softmax(scale * precise(q[:, :, head] @ k[:, :, head].mT), dim=-1)
        given = given + (shares * real).sum(2)
    batch, regions, n = len(q), q.shape[1], q.shape[3]
    chosen = (routes + regions * torch.arange(batch, device=q.device)[:, None, None]).flatten()  # [B · R · k]
    received = given.new_zeros(batch * regions, n).index_add(0, chosen, given.reshape(-1, n))
    return per_largest(windows.join(received.view(batch, regions, n, 1)).squeeze(1))


BLOCK: type[Attentive] = BiLevelRouting
