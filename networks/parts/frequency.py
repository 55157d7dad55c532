"""Looking at scans by how fast they change: what varies slowly, edges by their direction, gates on the spectrum.

What HFF-Net (Shao et al., IEEE TMI 2025) is made of. A volume is [B, C, D, H, W]; an axis of one voxel makes it a plane.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from kernels import fir_bank

from .attentive import Attentive
from .blocks import SLOPE

DIRECTIONS = 4
"""Bands of a plane, each of the edges that run in one quarter of all directions."""


def bands(x: Float[Tensor, "B C D H W"], stacked: int, *, finest: bool = False) -> Float[Tensor, "B C 5 D H W"]:
    """Each slice of the axis `stacked` as what varies slowly in it, and as its edges in four directions."""
    found = fir_bank.fused(x.movedim(stacked + 2, 2), finest)  # slices third
    return found.movedim(3, stacked + 3)


class Decomposition(nn.Module):
    """A scan as what varies slowly in it, and as its edges by direction, of slices along one axis or several.

    The filters of directions see a slice repeat like tiles: within 8 voxels of a patch's border, fine texture of the opposite
    border shows faintly.
    """

    def __init__(self, stacked: Sequence[int]) -> None:
        super().__init__()
        self.stacked = tuple(stacked)

    def forward(self, x: Float[Tensor, "B C D H W"]) -> tuple[Tensor, Tensor]:
        found = [bands(x, axis) for axis in self.stacked]
        slow = found[0][:, :, 0]
        if len(self.stacked) > 1:
            slow = smooth(slow, self.stacked[0])
        edges = torch.cat([one[:, :, 1:] for one in found], 2).flatten(1, 2)
        # c / p99 of |c|, but a mean needs no sorting: of coefficients with two exponential tails it is p99 / ln 100
        size = math.log(100) * edges.abs().mean((2, 3, 4), keepdim=True)
        return slow, edges / size.clamp_min(1e-6)


class PublishedDecomposition(nn.Module):
    """As the authors' scripts write it to disk: smoothed slices as 8-bit pictures, edges cut off below 0 and above 1,
    each volume from −1 to 1. On intensities as a scanner gives them, the edges are all but the sign of the filtered scan.
    """

    def __init__(self, stacked: Sequence[int]) -> None:
        super().__init__()
        (self.stacked,) = stacked

    def forward(self, x: Float[Tensor, "B C D H W"]) -> tuple[Tensor, Tensor]:
        found = bands(x, self.stacked)
        edges = stretched(found[:, :, 1:]).flatten(1, 2)
        return _to_unit(pictures(found[:, :, 0], self.stacked)), _to_unit(edges)


def smooth(x: Float[Tensor, "B C D H W"], axis: int) -> Float[Tensor, "B C D H W"]:
    """What varies slowly along one axis more; the edges are mirrored, the last voxel twice."""
    n, reach = x.shape[axis + 2], len(fir_bank.LOW) // 2
    at = torch.arange(-reach, n + reach, device=x.device) % (2 * n)
    wide = x.index_select(axis + 2, torch.minimum(at, 2 * n - 1 - at))
    return torch.stack([tap * wide.narrow(axis + 2, start, n) for start, tap in enumerate(fir_bank.LOW)]).sum(0)


def pictures(x: Float[Tensor, "B C D H W"], stacked: int) -> Float[Tensor, "B C D H W"]:
    """Each slice from its least to its largest value as 0 to 255, cut to whole numbers; one value alone becomes 0."""
    return (_share(x, [axis + 2 for axis in range(3) if axis != stacked]) * 255).trunc()


def stretched(edges: Tensor) -> Tensor:
    """imadjust between the 1st and 99th percentile of a histogram from 0 to 1, which are 0 and 1 for real intensities."""
    return edges.clamp(0, 1)


def _to_unit(x: Tensor) -> Tensor:
    return 2 * _share(x, [2, 3, 4]) - 1


def _share(x: Tensor, axes: Sequence[int]) -> Tensor:
    """How far each value is from the least to the largest."""
    least, largest = x.amin(tuple(axes), keepdim=True), x.amax(tuple(axes), keepdim=True)
    return (x - least) / torch.where(largest > least, largest - least, 1)


class SpectralAttention(nn.Module):
    """Three gates on a map's spectrum, one after the other: by channel, by frequency within slices, by frequency across.

        out = F⁻¹(8 · s · p · a · F(x)),    a [C], p [H, W], s [D] from 0 to 1

    Each gate looks at the magnitudes log(1 + |F|) that the one before it left: of a spectrum, the few lowest frequencies
    are larger than all others by orders of magnitude. Half of the spectrum says it all, and gates on that half keep the
    answer real. Any size, N log N.
    """

    def __init__(self, channels: int, *, stacked: int = 0, solid: bool = True, uncertain: bool = False) -> None:
        """Slices lie on one another along the axis `stacked`; a single one (not `solid`) has no gate across."""
        super().__init__()
        self.stacked = stacked
        self.by_channel = ChannelGate(channels)
        self.by_frequency = FrequencyGate()
        self.by_slice = SliceGate(uncertain) if solid else None

    def forward(self, x: Float[Tensor, "B C D H W"]) -> Float[Tensor, "B C D H W"]:
        planes = x.movedim(self.stacked + 2, 2).float()  # torch has no Fourier transform of half precision
        size = planes.shape[2:]
        spectrum = torch.fft.rfftn(planes, dim=(2, 3, 4), norm="ortho")  # [B, C, D, H, W / 2 + 1]
        magnitude = spectrum.abs()
        gate = self.by_channel(torch.log1p(magnitude))
        gate = gate * self.by_frequency(torch.log1p(gate * magnitude))
        if self.by_slice is not None:
            gate = gate * self.by_slice(torch.log1p(gate * magnitude))
        # gates start half open: twice each, they start as none at all
        gate = gate * (4 if self.by_slice is None else 8)
        gated = torch.fft.irfftn(spectrum * gate, s=size, dim=(2, 3, 4), norm="ortho")
        return gated.to(x.dtype).movedim(2, self.stacked + 2)


class ChannelGate(Attentive):
    """A weight per channel, from the largest and the mean of its magnitudes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(4, channels // 16)
        self.squeeze, self.excite = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def forward(self, magnitude: Float[Tensor, "B C D H W"]) -> Float[Tensor, "B C 1 1 1"]:
        pooled = torch.stack([magnitude.amax((2, 3, 4)), magnitude.mean((2, 3, 4))])  # [2, B, C]
        gate = self.excite(functional.leaky_relu(self.squeeze(pooled), SLOPE)).sum(0).float().sigmoid()
        self.show(lambda: gate)
        return gate[:, :, None, None, None]


class FrequencyGate(Attentive):
    """A weight per frequency within slices, from the largest and the mean over channels and frequencies across."""

    def __init__(self) -> None:
        super().__init__()
        self.convolve = nn.Conv3d(2, 1, (1, 3, 3))

    def forward(self, magnitude: Float[Tensor, "B C D H W"]) -> Float[Tensor, "B 1 1 H W"]:
        pooled = torch.stack([magnitude.amax((1, 2)), magnitude.mean((1, 2))], 1).unsqueeze(2)  # [B, 2, 1, H, W]
        # the highest frequency along H is the neighbour of the lowest; along W there is only half of them
        pooled = torch.cat([pooled[..., -1:, :], pooled, pooled[..., :1, :]], dim=-2)
        gate = functional.conv3d(pooled, self.convolve.weight, self.convolve.bias, padding=(0, 0, 1)).float().sigmoid()
        self.show(lambda: torch.fft.fftshift(gate[:, 0, 0], dim=1))  # the slowest in the middle of the left edge
        return gate


class SliceGate(Attentive):
    """A weight per frequency across slices, from the largest and the mean over each slice of the spectrum.

    With `uncertain` a normal distribution is learned in place of a number, of rank 5 over the slices: drawn from in
    training, its mean in use. The draw carries a gradient.
    """

    RANK = 5
    HIDDEN = 8

    def __init__(self, uncertain: bool = False) -> None:
        super().__init__()
        outputs = 2 + self.RANK if uncertain else 1
        self.uncertain = uncertain
        self.squeeze = nn.Conv1d(2, self.HIDDEN, 3, padding=1, padding_mode="circular")
        self.excite = nn.Conv1d(self.HIDDEN, outputs, 3, padding=1, padding_mode="circular")

    def forward(self, magnitude: Float[Tensor, "B C D H W"]) -> Float[Tensor, "B 1 D 1 1"]:
        pooled = torch.stack([magnitude.amax((1, 3, 4)), magnitude.mean((1, 3, 4))], 1)  # [B, 2, D]
        found = self.excite(functional.leaky_relu(self.squeeze(pooled), SLOPE)).float()  # [B, 1 or 7, D]
        score = found[:, 0]
        if self.uncertain and self.training:
            noise = torch.randn_like(score[:, :1].expand(-1, self.RANK)), torch.randn_like(score)
            score = drawn(score, functional.softplus(found[:, 1]), found[:, 2:].mT, noise)
        gate = score.sigmoid()
        self.show(lambda: torch.fft.fftshift(gate, dim=1))
        return gate[:, None, :, None, None]


def drawn(
    mean: Float[Tensor, "B D"], variance: Float[Tensor, "B D"], factor: Float[Tensor, "B D r"],
    noise: tuple[Float[Tensor, "B r"], Float[Tensor, "B D"]],
) -> Float[Tensor, "B D"]:  # fmt: skip
    """From a normal distribution whose covariance is factor · factorᵀ + diag(variance), noise being standard normal."""
    shared, own = noise
    return mean + (factor @ shared.unsqueeze(-1)).squeeze(-1) + variance.sqrt() * own


class PublishedSpectralAttention(nn.Module):
    """As the authors' code has it: each gate returns the real part times itself, and the spectrum is multiplied by that.

        out = Re F⁻¹(s · p² · a⁴ · R⁷ · F),    F the spectrum of x, R its real part

    So amplitudes go to the eighth power, and little but the mean is left of x. Float32 alone holds such numbers.
    """

    def __init__(self, channels: int, depth: int, *, uncertain: bool = True) -> None:
        super().__init__()
        self.by_channel = PublishedChannelGate(channels)
        self.by_frequency = PublishedFrequencyGate()
        self.by_slice = PublishedSliceGate(depth, uncertain)

    def forward(self, x: Float[Tensor, "B C D H W"]) -> Float[Tensor, "B C D H W"]:
        with torch.autocast(x.device.type, enabled=False):
            spectrum = torch.fft.fftn(x.float(), dim=(2, 3, 4), norm="ortho")
            for gate in (self.by_channel, self.by_frequency, self.by_slice):
                spectrum = spectrum * (spectrum.real * gate(spectrum.real))
            return torch.fft.ifftn(spectrum, dim=(2, 3, 4), norm="ortho").real.to(x.dtype)


class PublishedChannelGate(Attentive):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Linear(channels, channels // 16), nn.Linear(channels // 16, channels)

    def forward(self, x: Float[Tensor, "B C D H W"]) -> Float[Tensor, "B C 1 1 1"]:
        pooled = torch.stack([x.amax((2, 3, 4)), x.mean((2, 3, 4))])  # [2, B, C]
        gate = self.excite(self.squeeze(pooled).relu()).sum(0).sigmoid()
        self.show(lambda: gate)
        return gate[:, :, None, None, None]


class PublishedFrequencyGate(Attentive):
    def __init__(self) -> None:
        super().__init__()
        self.convolve = nn.Conv3d(2, 1, 3, padding=1)  # over one slice: but for the middle plane, weights of zeros

    def forward(self, x: Float[Tensor, "B C D H W"]) -> Float[Tensor, "B 1 1 H W"]:
        pooled = torch.stack([x.amax((1, 2)), x.mean((1, 2))], 1).unsqueeze(2)  # [B, 2, 1, H, W]
        gate = self.convolve(pooled).sigmoid()
        self.show(lambda: torch.fft.fftshift(gate[:, 0, 0], dim=(1, 2)))
        return gate


class PublishedSliceGate(Attentive):
    """Weights per slice, so the depth of a patch is fixed; a draw without gradient, in use too."""

    RANK = 5

    def __init__(self, depth: int, uncertain: bool) -> None:
        super().__init__()
        self.depth = depth
        self.squeeze, self.excite = nn.Linear(depth, 4 * depth), nn.Linear(4 * depth, depth)
        if uncertain:
            self.mean, self.logarithm = nn.Linear(depth, depth), nn.Linear(depth, depth)
            self.factor = nn.Linear(depth, self.RANK * depth)
        self.uncertain = uncertain

    def forward(
        self, x: Float[Tensor, "B C D H W"], noise: tuple[Tensor, Tensor] | None = None
    ) -> Float[Tensor, "B 1 D 1 1"]:
        if x.shape[2] != self.depth:
            raise ValueError(
                f"A map of {x.shape[2]} slices was met; the published network has weights for {self.depth}. Give it "
                "patches of `depth` slices along the first axis, or leave `faithful` out."
            )
        pooled = torch.stack([x.amax((1, 3, 4)), x.mean((1, 3, 4))])  # [2, B, D]
        score = self.excite(self.squeeze(pooled).relu()).sum(0)
        if self.uncertain:
            with torch.no_grad():  # sample(), where rsample() was meant: none of these ten weights ever learns
                score = self._drawn(score.relu(), noise)
        gate = score.sigmoid()
        self.show(lambda: torch.fft.fftshift(gate, dim=1))
        return gate[:, None, :, None, None]

    def _drawn(self, score: Tensor, noise: tuple[Tensor, Tensor] | None) -> Tensor:
        variance = functional.softplus(self.logarithm(score).exp()) + 1
        factor = self.factor(score).unflatten(1, (self.depth, self.RANK))
        if noise is None:
            noise = torch.randn_like(score[:, :1].expand(-1, self.RANK)), torch.randn_like(score)
        return drawn(self.mean(score), variance, factor, noise)


def disagreement(
    one: Float[Tensor, "B K D H W"], other: Float[Tensor, "B K D H W"], axes: Sequence[int] = (2, 3, 4)
) -> Float[Tensor, ""]:
    """The focal frequency loss (Jiang et al., ICCV 2021) between two answers: the mean square of their difference, over
    frequencies, each weighted by its share of the largest difference of its channel."""
    apart = torch.view_as_real(torch.fft.fftn(one.float() - other.float(), dim=tuple(axes), norm="ortho"))
    square = apart.square().sum(-1)  # [B, K, D, H, W]
    with torch.no_grad():
        weight = square.sqrt()
        weight = weight / weight.amax((2, 3, 4), keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    return (weight * square).mean()
