"""A few learned questions are put to all places, and the answers to each place: the Set Transformer's attention over
inducing points (Lee et al., ICML 2019).

    answers = pooled(seeds, x) + MLP;   y = x + gamma · W_o softmax(q(x) k(answers)ᵀ / √d) v(answers)

With m seeds, 4 · C · m · N multiply-adds for both attentions and 4 · C² · N for the projections: linear in the places.
Memory for the gradient: seven maps of C channels. Good for what a scan is as a whole; it does not know where a place
lies.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kernels import position_attention

from ..attentive import Attentive
from ..dims import Dims
from ._layers import added, heads_of, per_largest, precise, tokens


class SetTransformer(Attentive):
    """Shows the attention that each place receives from the seeds: [B, *space], 1 where it is most."""

    def __init__(self, channels: int, *, dims: Dims = 3, seeds: int = 16, width: int = 32, expansion: int = 2) -> None:
        """A head is `width` channels wide. Planes and volumes (`dims`) are sets of places alike."""
        super().__init__()
        self.heads = heads_of(channels, width)
        # norms come first and the residual stays clean, where the paper norms the sums: so a start at identity is possible
        self.norm, self.norm_answers = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.seeds = nn.Parameter(torch.randn(seeds, channels))
        self.pool = nn.Linear(channels, 2 * channels, bias=False)  # softmax takes a bias of the keys away again
        self.mlp = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, expansion * channels), nn.GELU(),
            nn.Linear(expansion * channels, channels),
        )  # fmt: skip
        self.ask = nn.Linear(channels, channels, bias=False)
        self.answer = nn.Linear(channels, 2 * channels, bias=False)
        self.out = nn.Linear(channels, channels)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B C *space"]:
        places = self.norm(tokens(x))  # [B, N, C]
        k, v = (self._by_head(part) for part in self.pool(places).chunk(2, dim=-1))
        seeds = self._by_head(self.seeds.expand(len(x), -1, -1))  # [B, heads, seeds, d]
        scale = seeds.shape[-1] ** -0.5
        self.show(lambda: _received(seeds, k, scale).unflatten(1, x.shape[2:]))
        pooled = position_attention.fused(seeds, k, v, scale=scale).transpose(1, 2).flatten(2)  # [B, seeds, C]
        pooled = pooled + self.mlp(pooled)
        k, v = (self._by_head(part) for part in self.answer(self.norm_answers(pooled)).chunk(2, dim=-1))
        found = position_attention.fused(self._by_head(self.ask(places)), k, v, scale=scale)
        found = self.out(found.transpose(1, 2).flatten(2))  # [B, N, C]
        return added(x, found.mT.unflatten(2, x.shape[2:]), self.gamma)

    def _by_head(self, part: Float[Tensor, "B N C"]) -> Float[Tensor, "B heads N d"]:
        return part.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _received(
    seeds: Float[Tensor, "B heads m d"], k: Float[Tensor, "B heads N d"], scale: float
) -> Float[Tensor, "B N"]:
    return per_largest(torch.softmax(scale * (precise(seeds) @ precise(k).mT), dim=-1).sum((1, 2)))


BLOCK: type[Attentive] = SetTransformer
