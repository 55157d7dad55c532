"""Places ask a summary of all places instead of each other: efficient attention (Shen et al., WACV 2021).

    y = x + gamma · W_o(softmax over channels (Q) · (softmax over places (K)ᵀ V) + conv₃(V))

4 · C² · N multiply-adds for the projections, 2 · C · N · width of a head for the attention: linear in the places.
Memory for the gradient: eight maps of C channels. The weights that it implies are those of a softmax, nearly, and sum
to one; they never exist. Good wherever one block must see everything: it may stand at full resolution.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..attentive import Attentive
from ..dims import CONVOLUTION, Dims
from ._layers import added, heads_of, per_largest, precise


class Efficient(Attentive):
    """Shows the attention that each place receives from all: [B, *space], 1 where it is most."""

    def __init__(self, channels: int, *, dims: Dims = 3, width: int = 32, faithful: bool = False) -> None:
        """A head is `width` channels wide. `faithful`: the authors' code, without a sense of place or a start at identity."""
        super().__init__()
        convolution = CONVOLUTION[dims]
        self.heads = heads_of(channels, width)
        self.project = convolution(channels, 3 * channels, 1, bias=False)  # softmax takes a bias of the keys away again
        # attention alone does not know where a place lies: a convolution of each channel tells it its neighbours
        self.beside = None if faithful else convolution(channels, channels, 3, padding=1, groups=channels)
        self.out = convolution(channels, channels, 1)
        self.gamma = nn.Parameter(torch.ones(1) if faithful else torch.zeros(1))

    def forward(self, x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B C *space"]:
        q, k, v = self.project(x).chunk(3, dim=1)
        by_head = [tensor.flatten(2).unflatten(1, (self.heads, -1)) for tensor in (q, k, v)]  # [B, heads, d, N]
        asked, kept, values = precise(by_head[0]).softmax(2), precise(by_head[1]).softmax(3), precise(by_head[2])
        self.show(lambda: _received(asked, kept).unflatten(1, x.shape[2:]))
        summary = values @ kept.mT  # [B, heads, d, d]
        found = (summary @ asked).flatten(1, 2).unflatten(2, x.shape[2:])
        if self.beside is not None:
            found = found + self.beside(v)
        return added(x, self.out(found), self.gamma)


def _received(asked: Float[Tensor, "B heads d N"], kept: Float[Tensor, "B heads d N"]) -> Float[Tensor, "B N"]:
    return per_largest((asked.mean(-1, keepdim=True) * kept).sum((1, 2)))


BLOCK: type[Attentive] = Efficient
