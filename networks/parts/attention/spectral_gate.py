"""Every wave is made stronger or weaker: the spectral gate of SpectFormer (Patro et al., 2023).

    y = x + gamma · MLP(LN(irfft(K · rfft(LN(x)))))

C · N · log N multiply-adds for the transforms, 8 · C² · N for the MLP, h · C · N for the filter, made by an MLP with h
hidden units, N with the margins; memory for the gradient: some twenty maps of C channels, more where the
margins count: they make 24³ places of 16³. A convolution as large as the map, the same everywhere and for every scan: it looks
at everything, and does not choose. Good where texture tells.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn
from torch.nn import functional

from ..attentive import Attentive
from ..dims import CONVOLUTION, Dims
from ._layers import PlaceNorm, added, per_largest, precise


class SpectralGate(Attentive):
    """Shows where what it adds is strongest: [B, *space], 1 where it is most. Its weights are those of waves, not of places."""

    def __init__(
        self, channels: int, *, dims: Dims = 3, margin: int = 4, hidden: int = 32, expansion: int = 4,
        faithful: bool = False, size: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """`margin` places are mirrored at each edge, so that it does not meet its opposite. `hidden`: units of the MLP that
        makes the filter; `expansion`: of the MLP behind it. `faithful`: the authors' table of weights, for maps of `size`."""
        super().__init__()
        self.faithful, self.margin, self.size = faithful, 0 if faithful else margin, tuple(size)
        if faithful and len(size) != dims:
            raise ValueError(
                f"The spectral gate was given a size of {tuple(size)} for {dims} axes; its faithful form needs the size of "
                "the map. Give it, or leave `faithful` out for maps of any size."
            )
        convolution = CONVOLUTION[dims]
        self.before, self.after = PlaceNorm(channels), PlaceNorm(channels)
        if faithful:
            half = (*size[:-1], size[-1] // 2 + 1)
            self.table = nn.Parameter(0.02 * torch.randn(channels, *half, 2))
        else:
            # a table is tied to one size of map, and over volumes has millions of weights; an MLP that is asked for each
            # frequency has hundreds, and answers for any size
            self.filter = nn.Sequential(nn.Linear(2 * dims, hidden), nn.GELU(), nn.Linear(hidden, 2 * channels))
        self.mlp = nn.Sequential(
            convolution(channels, expansion * channels, 1), nn.GELU(), convolution(expansion * channels, channels, 1)
        )
        self.gamma = nn.Parameter(torch.ones(1) if faithful else torch.zeros(1))

    def forward(self, x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B C *space"]:
        if self.faithful and x.shape[2:] != self.size:
            raise ValueError(
                f"A map of {tuple(x.shape[2:])} was given to a spectral gate with a table for {self.size}; it needs that "
                "size. Leave `faithful` out for maps of any size."
            )
        filtered = self._filtered(precise(self.before(x)))
        self.show(lambda: per_largest(filtered.square().mean(1).sqrt()))
        return added(x, self.mlp(self.after(filtered)), self.gamma)

    def _filtered(self, x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B C *space"]:
        """In float32: there is no transform of half precision on a CPU, and on a GPU it overflows."""
        space, axes = x.shape[2:], tuple(range(2, x.ndim))
        margins = [min(self.margin, n - 1) for n in space]  # a mirror shows no more than the map
        with torch.autocast(x.device.type, enabled=False):
            if any(margins):
                x = functional.pad(x, [side for margin in reversed(margins) for side in (margin, margin)], "reflect")
            waves = torch.fft.rfftn(x, dim=axes, norm="ortho")  # [B, C, *space, the last halved]
            y = torch.fft.irfftn(waves * self._weights(x), s=x.shape[2:], dim=axes, norm="ortho")
        for axis, margin, n in zip(axes, margins, space, strict=True):
            y = y.narrow(axis, margin, n)
        return y

    def _weights(self, x: Tensor) -> Complex[Tensor, "C ..."]:
        if self.faithful:
            return torch.view_as_complex(precise(self.table))
        *others, last = x.shape[2:]
        along = [torch.fft.fftfreq(n, dtype=x.dtype, device=x.device) for n in others]
        along.append(torch.fft.rfftfreq(last, dtype=x.dtype, device=x.device))
        waves = torch.stack(
            torch.meshgrid(*along, indexing="ij"), dim=-1
        )  # [*frequencies, axis], −1/2 to 1/2 per place
        # the wave that alternates is at −1/2 and 1/2 at once: on a circle it is one, and so is what the MLP says of it
        asked = torch.cat([torch.sin(2 * math.pi * waves), torch.cos(2 * math.pi * waves)], dim=-1)
        real, imaginary = self.filter(asked).movedim(-1, 0).chunk(2)
        return torch.complex(real, imaginary)


BLOCK: type[Attentive] = SpectralGate
