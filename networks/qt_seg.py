"""QTSeg (Tran et al. 2025, arXiv 2412.17241): a token for each class reads the image from coarse to fine and writes into
it, and its mask is a dot product. Little arithmetic for what it sees: time and memory grow with the voxels, not their
square. Good for large patches and for many labels.

Where the default departs from the authors' code (`faithful` keeps it), and why:
- Instance norm, not batch norm: batches are of one or two.
- Channel attention compares channels by the mean over places, not by the sum, which lets one channel alone through.
- Behind the pooling it is a layer norm: an instance norm takes away what is the same everywhere, as the largest within
  5 voxels is on a map of 5.
- A convolution with stride 4 has kernel 4: with 3 it never sees 7 of 16 pixels (37 of 64 voxels).
- Keys have no bias: a softmax over keys does not change with it, and no gradient ever reached it.
- The tokens answer at two coarser levels too while training (`supervised`), by the dot product that gives the mask.
- A single class has two tokens, and what one says against the other is its logit: a softmax over one token says nothing.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from .parts import attentive
from .parts.attention._layers import PlaceNorm
from .parts.attention.channel import ChannelAttention
from .parts.blocks import InstanceNorm, Triple, refuse_unless_multiple, topology, total_stride
from .parts.dims import CONVOLUTION, MAX_POOL, TRANSPOSED, as_plane, dims_of, resize

Size = Any  # tuple[int, ...], which torch's own types do not take for a kernel
"""One number for each axis of space: three, or two in the published network."""

attention_maps = attentive.attention_maps
"""Where each token looks, by its brightest place, at every level; the gates; and which channel looks at which."""

STEPS = 5
"""Strided convolutions of the encoder; behind the last three lie its outputs."""


PAPER = "Tran et al. 2025, arXiv 2412.17241 (QTSeg)"
GOOD_FOR = "large patches, many labels"


@dataclass(frozen=True, kw_only=True)
class Config:
    faithful: bool = False
    """The published network, planes only: batch norm, its channel attention, one answer."""
    dims: int = 3
    """2 for patches one voxel thick, along whose thin axis nothing is done. `fit` sets it."""
    width: int = 16
    """Channels behind the first convolution; the outputs of the encoder have 4, 8 and 16 times as many."""
    strides: tuple[tuple[int, int, int], ...] = ()
    """How much each of the encoder's five steps shrinks each axis. Empty: `fit` chooses them."""
    kernels: tuple[tuple[int, int, int], ...] = ()
    """Size of the convolutions of each step; 1 in all of them along the thin axis of a plane. Empty: `fit` chooses them."""
    depths: tuple[int, ...] = (3, 2, 1)
    """Attention blocks of each level of the decoder, coarsest first."""
    heads: int = 8
    """Heads of the attention between tokens and places, or as many of them as divide the channels."""
    hidden: int = 2048
    """Neurons of the perceptron behind each reading; it sees tokens only, so its time does not count."""
    shared_beyond: int = 10
    """With more classes than this, all tokens are led to the next level by one perceptron; else each has its own."""
    supervised: bool = True
    """Training asks for masks at the two coarser levels too."""

    def __post_init__(self) -> None:
        if self.dims not in (2, 3) or len(self.depths) != 3:
            raise ValueError(
                f"qt_seg was given dims {self.dims} and depths {self.depths}; dims is 2 or 3, and there are three levels. "
                "Leave dims to `fit`."
            )
        if min(*self.depths, self.width, self.heads, self.hidden) < 1 or self.shared_beyond < 0:
            raise ValueError(
                f"qt_seg was given width {self.width}, depths {self.depths}, heads {self.heads}, hidden {self.hidden} and "
                f"shared_beyond {self.shared_beyond}; all must be 1 or more, the last 0 or more. Correct the wrong one."
            )
        if len(self.strides) not in (0, STEPS) or len(self.kernels) != len(self.strides):
            raise ValueError(
                f"qt_seg was given strides {self.strides} and kernels {self.kernels}; it needs five of each. Leave both "
                "out to have them chosen."
            )
        if self.strides and self.dims == 2 and not _thin_axes(self.strides, self.kernels):
            raise ValueError(
                f"qt_seg was given dims 2, strides {self.strides} and kernels {self.kernels}; planes need an axis that "
                "has 1 in all of them. Leave both out to have them chosen."
            )


def fit(config: Config, *, patch: tuple[int, int, int], spacing: tuple[float, float, float]) -> Config:
    """The config for planes or volumes, with the strides that suit this patch and spacing, unless it has some."""
    config = replace(config, dims=dims_of(patch))
    if config.faithful and config.dims != 2:
        raise ValueError(
            f"A patch of {patch} voxels was given; the published qt_seg sees planes, so one axis must have 1 voxel. Plan "
            "with such patches, or leave `faithful` out."
        )
    if config.strides:
        return config
    thin = [axis for axis in range(3) if config.dims == 2 and axis == patch.index(1)]
    if config.faithful:
        return replace(config, strides=(_flat((2, 2, 2), thin),) * STEPS, kernels=(_flat((3, 3, 3), thin),) * STEPS)
    # the thickness of a plane is no reason to leave its own axes alone
    d, h, w = (max(spacing) if axis in thin else step for axis, step in enumerate(spacing))
    strides, kernels = topology(patch, (d, h, w))
    # A short patch is not shrunk by the first steps: the levels of the decoder, which come last, must differ.
    missing = max(0, STEPS + 1 - len(strides))
    strides = ((1, 1, 1),) * missing + strides[1:][:STEPS]
    kernels = (kernels[0],) * missing + kernels[1:][:STEPS]
    return replace(config, strides=strides, kernels=tuple(_flat(kernel, thin) for kernel in kernels))


def divisor(config: Config) -> tuple[int, int, int]:
    """What each axis of a patch must be a multiple of."""
    return total_stride(_steps(config)[0])


def build(config: Config, *, channels: int, classes: int) -> nn.Module:
    """A new network with fresh weights: torch's own, as the authors have them."""
    if config.faithful and config.dims != 2:
        raise ValueError(
            "qt_seg was given faithful and dims 3; the published network sees planes. Set dims to 2, or leave `faithful` "
            "out."
        )
    network = QTSeg(config, channels, classes)
    return network.to(memory_format=torch.channels_last if config.faithful else torch.channels_last_3d)


def explained(network: nn.Module) -> dict[str, nn.Module]:
    """Its layers that show best what it sees, the last before the logits first."""
    rises = [f"decoder.rises.{level}" for level in (2, 1, 0)]
    return {name: network.get_submodule(name) for name in (*rises, "encoder.fine", "encoder.middle", "encoder.coarse")}


class QTSeg(nn.Module):
    def __init__(self, config: Config, channels: int, classes: int) -> None:
        super().__init__()
        strides, kernels = _steps(config)
        axes = [axis for axis in range(3) if not (config.faithful and axis in _thin_axes(strides, kernels))]
        steps = [tuple(stride[axis] for axis in axes) for stride in strides]
        sizes = [tuple(kernel[axis] for axis in axes) for kernel in kernels]
        self.divisor = divisor(config)
        self.is_flat = config.faithful
        self.encoder = Encoder(config, channels, steps, sizes)
        self.distribution = Distribution(config, steps, sizes)
        self.decoder = Decoder(config, classes, steps, sizes)

    def forward(self, x: Float[Tensor, "B C D H W"]) -> list[Tensor] | Float[Tensor, "B K D H W"]:
        """In training, a list of logits, finest first; else the finest alone."""
        refuse_unless_multiple(x.shape, self.divisor)
        thin = None
        if self.is_flat:
            x, thin = as_plane(x)
        x = x.contiguous(memory_format=torch.channels_last if self.is_flat else torch.channels_last_3d)
        masks = self.decoder(self.distribution(self.encoder(x)))
        masks[0] = resize(masks[0], x.shape[2:])  # [B, K, *space], from the grid behind the first step
        if thin is not None:
            masks = [mask.unsqueeze(thin) for mask in masks]
        return masks if self.training else masks[0]


class Encoder(nn.Module):
    """YOLOv8's: five steps down, and its neck, which goes up and down again. Gives its three maps, finest first."""

    def __init__(self, config: Config, channels: int, steps: list[Size], sizes: list[Size]) -> None:
        super().__init__()
        w0, w1, w2, w3, w4 = (config.width * 2**step for step in range(STEPS))
        self.stem = nn.Sequential(
            _convolution(config, channels, w0, sizes[0], steps[0]),
            _convolution(config, w0, w1, sizes[1], steps[1]),
            Split(config, w1, w1, sizes[1], repeats=1, shortcut=True),
        )
        self.first = nn.Sequential(
            _convolution(config, w1, w2, sizes[2], steps[2]), Split(config, w2, w2, sizes[2], repeats=2, shortcut=True)
        )
        self.second = nn.Sequential(
            _convolution(config, w2, w3, sizes[3], steps[3]), Split(config, w3, w3, sizes[3], repeats=2, shortcut=True)
        )
        self.third = nn.Sequential(
            _convolution(config, w3, w4, sizes[4], steps[4]),
            Split(config, w4, w4, sizes[4], repeats=1, shortcut=True),
            Pooling(config, w4, sizes[4]),
        )
        self.rise = Split(config, w4 + w3, w3, sizes[3])
        self.fine = Split(config, w3 + w2, w2, sizes[2])
        self.fine_down = _convolution(config, w2, w2, sizes[3], steps[3])
        self.middle = Split(config, w2 + w3, w3, sizes[3])
        self.middle_down = _convolution(config, w3, w3, sizes[4], steps[4])
        self.coarse = Split(config, w3 + w4, w4, sizes[4])

    def forward(self, x: Float[Tensor, "B C *space"]) -> list[Tensor]:
        first = self.first(self.stem(x))  # [B, 4w, *space / stride]
        second = self.second(first)
        third = self.third(second)
        rise = self.rise(torch.cat([_nearest(third, second), second], dim=1))
        fine = self.fine(torch.cat([_nearest(rise, first), first], dim=1))  # [B, 4w, ...]
        middle = self.middle(torch.cat([self.fine_down(fine), rise], dim=1))  # [B, 8w, ...]
        coarse = self.coarse(torch.cat([self.middle_down(middle), third], dim=1))  # [B, 16w, ...]
        return [fine, middle, coarse]


class Split(nn.Module):
    """YOLOv8's C2f: one half goes through bottlenecks, and all there was on the way is kept."""

    def __init__(
        self, config: Config, inputs: int, outputs: int, kernel: Size, repeats: int = 1, shortcut: bool = False
    ) -> None:
        super().__init__()
        half, point = outputs // 2, (1,) * len(kernel)
        self.enter = _convolution(config, inputs, outputs, point)
        self.blocks = nn.ModuleList(
            nn.Sequential(_convolution(config, half, half, kernel), _convolution(config, half, half, kernel))
            for _ in range(repeats)
        )
        self.leave = _convolution(config, (2 + repeats) * half, outputs, point)
        self.shortcut = shortcut

    def forward(self, x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B C2 *space"]:
        pieces = list(self.enter(x).chunk(2, dim=1))
        for block in self.blocks:
            new = block(pieces[-1])
            pieces.append(new + pieces[-1] if self.shortcut else new)
        return self.leave(torch.cat(pieces, dim=1))


class Pooling(nn.Module):
    """YOLOv8's SPPF: the largest within 5, 9 and 13 voxels beside what is there."""

    def __init__(self, config: Config, channels: int, kernel: Size) -> None:
        super().__init__()
        point = (1,) * len(kernel)
        self.enter = _convolution(config, channels, channels // 2, point)
        wide: Size = tuple(5 if size > 1 else 1 for size in kernel)
        self.pool = MAX_POOL[len(kernel)](wide, stride=1, padding=_padding(wide))
        self.leave = _convolution(config, channels // 2 * 4, channels, point)
        if not config.faithful:
            # On a small map the largest is nearly the same everywhere, and an instance norm would take it away again.
            self.leave[1] = PlaceNorm(channels)

    def forward(self, x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B C *space"]:
        pieces = [self.enter(x)]
        for _ in range(3):
            pieces.append(self.pool(pieces[-1]))
        return self.leave(torch.cat(pieces, dim=1))


class Distribution(nn.Module):
    """Every level of the decoder receives a share of every map of the encoder, half of it from its own."""

    def __init__(self, config: Config, steps: list[Size], sizes: list[Size]) -> None:
        super().__init__()
        w2, w3, w4 = (config.width * times for times in (4, 8, 16))
        (middle, coarse), point = steps[3:], (1,) * len(steps[0])
        both = tuple(m * c for m, c in zip(middle, coarse, strict=True))
        self.fine = nn.ModuleList([
            _convolution(config, w2, w2 // 2, point),
            _spread(config, w3, w2 // 4, middle),
            _spread(config, w4, w2 // 4, both),
        ])  # fmt: skip
        self.middle = nn.ModuleList([
            _convolution(config, w2, w3 // 4, sizes[3], middle),
            _convolution(config, w3, w3 // 2, point),
            _spread(config, w4, w3 // 4, coarse),
        ])  # fmt: skip
        self.coarse = nn.ModuleList([
            _convolution(config, w2, w4 // 4, sizes[4], both),
            _convolution(config, w3, w4 // 4, sizes[4], coarse),
            _convolution(config, w4, w4 // 2, point),
        ])  # fmt: skip

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Finest first, as they came."""
        return [
            torch.cat([piece(x) for piece, x in zip(pieces, maps, strict=True)], dim=1)
            for pieces in (self.fine, self.middle, self.coarse)
        ]


class Decoder(nn.Module):
    """The tokens travel from coarse to fine; what they wrote at one level rises to the next."""

    def __init__(self, config: Config, classes: int, steps: list[Size], sizes: list[Size]) -> None:
        super().__init__()
        fine, middle, coarse = (config.width * times for times in (4, 8, 16))
        self.is_single = classes == 1 and not config.faithful
        self.answers_thrice = config.supervised and not config.faithful
        tokens = 2 if self.is_single else classes
        self.tokens = nn.Parameter(torch.randn(tokens, coarse))
        widths = (coarse, middle, fine)
        self.positions = nn.ModuleList(Position(len(sizes[0]), width) for width in widths)
        self.levels = nn.ModuleList(
            Level(config, width, size, depth)
            for width, size, depth in zip(widths, sizes[:1:-1], config.depths, strict=True)
        )
        self.rises = nn.ModuleList([
            _rise(coarse, middle, steps[4]),
            _rise(middle, fine, steps[3]),
            # where the encoder's second step does not shrink, there is nothing to rise to
            _rise(fine, fine, steps[2]) if set(steps[1]) == {1} else
            nn.Sequential(_rise(fine, fine // 2, steps[2]), _rise(fine // 2, fine, steps[1])),
        ])  # fmt: skip
        own = config.faithful or tokens <= config.shared_beyond
        self.leads = nn.ModuleList(
            Lead(width, after, tokens if own else 1) for width, after in zip(widths, (middle, fine, fine), strict=True)
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Masks, finest first: on the grid behind the encoder's first step, and in training those of the coarser levels."""
        tokens = self.tokens.expand(maps[0].shape[0], -1, -1)  # [B, K, E]
        masks: list[Tensor] = []
        written: Tensor | None = None
        for x, level, position, rise, lead in zip(
            maps[::-1], self.levels, self.positions, self.rises, self.leads, strict=True
        ):
            x = x if written is None else x + written
            tokens, x = level(tokens, x, position(x))
            written, tokens = rise(x), lead(tokens)  # [B, E', *space'], [B, K, E']
            if rise is self.rises[-1] or (self.training and self.answers_thrice):
                masks.insert(0, self._masks(tokens, written))
        return masks

    def _masks(self, tokens: Float[Tensor, "B T E"], x: Float[Tensor, "B E *space"]) -> Float[Tensor, "B K *space"]:
        masks = (_places(x) @ tokens.mT).mT.unflatten(2, x.shape[2:])  # places first: channels stay last in memory
        return masks[:, :1] - masks[:, 1:] if self.is_single else masks


class Level(attentive.Attentive):
    """Attention blocks, and a last look of the tokens at the map. Shows where each token looks, by its brightest place."""

    def __init__(self, config: Config, width: int, kernel: Size, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DualMix(config, width, kernel) for _ in range(depth))
        self.look = TokenAttention(width, config.heads, key_bias=config.faithful)
        self.norm = nn.LayerNorm(width)

    def forward(
        self, tokens: Float[Tensor, "B K E"], x: Float[Tensor, "B E *space"], position: Float[Tensor, " E *space"]
    ) -> tuple[Float[Tensor, "B K E"], Float[Tensor, "B E *space"]]:
        first = tokens
        for block in self.blocks:
            tokens, x = block(tokens, x, position)
        queries, keys = tokens + first, _places(x + position)
        self.show(lambda: _brightest(self.look.shares(queries, keys)).unflatten(2, x.shape[2:]))
        return self.norm(tokens + self.look(queries, keys, _places(x))), x


class DualMix(nn.Module):
    """The tokens read a map gated in space and one mixed over channels, and the map reads the tokens."""

    def __init__(self, config: Config, width: int, kernel: Size) -> None:
        super().__init__()
        self.mix = Mix(config, width, kernel)
        self.think = nn.Sequential(nn.Linear(width, config.hidden), nn.GELU(), nn.Linear(config.hidden, width))
        self.norm = nn.LayerNorm(width)
        self.write = TokenAttention(width, config.heads, key_bias=config.faithful)

    def forward(
        self, tokens: Float[Tensor, "B K E"], x: Float[Tensor, "B E *space"], position: Float[Tensor, " E *space"]
    ) -> tuple[Float[Tensor, "B K E"], Float[Tensor, "B E *space"]]:
        read, mixed = self.mix(tokens, x + position)
        # The figure lets the map see the tokens after `think`, and adds before the norm; the code, which was measured,
        # does it so. `mixed` has the position twice already, and gets it once more: as queries only, so no harm is done.
        written = self.write(_places(mixed + position), read, read)  # [B, N, E]
        return self.norm(self.think(read)) + tokens, written.mT.unflatten(2, x.shape[2:]) + x


class Mix(nn.Module):
    """What the tokens read of the two maps, and the sum of the maps."""

    def __init__(self, config: Config, width: int, kernel: Size) -> None:
        super().__init__()
        self.space = SpatialGate(kernel)
        # By the mean over places products are covariances. The square root of their number would still let one channel
        # alone through: features are correlated, so the sums grow with the number, not with its root.
        self.channel = ChannelAttention(width, mean=not config.faithful)
        self.read_space = TokenAttention(width, config.heads, key_bias=config.faithful)
        self.read_channel = TokenAttention(width, config.heads, key_bias=config.faithful)
        self.norm = nn.LayerNorm(width)

    def forward(
        self, tokens: Float[Tensor, "B K E"], x: Float[Tensor, "B E *space"]
    ) -> tuple[Float[Tensor, "B K E"], Float[Tensor, "B E *space"]]:
        space, channel = self.space(x), self.channel(x)
        by_space, by_channel = _places(space), _places(channel)
        read = self.read_space(tokens, by_space, by_space) + self.read_channel(tokens, by_channel, by_channel)
        return self.norm(read + tokens), space + channel


class SpatialGate(attentive.Attentive):
    """What CBAM has, and the map itself beside it. Shows the gate: [B, 1, *space]."""

    def __init__(self, kernel: Size) -> None:
        super().__init__()
        wide: Size = tuple(7 if size > 1 else 1 for size in kernel)
        self.convolve = CONVOLUTION[len(wide)](2, 1, wide, padding=_padding(wide), bias=False)

    def forward(self, x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B C *space"]:
        gate = self.convolve(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)).sigmoid()
        self.show(lambda: gate)
        return x * gate + x


class TokenAttention(nn.Module):
    """Attention of several heads at half the width. Tokens are few, so its map is never large."""

    def __init__(self, width: int, heads: int, key_bias: bool = False) -> None:
        super().__init__()
        inner = width // 2
        self.heads = math.gcd(heads, inner)
        self.q = nn.Linear(width, inner)
        self.k = nn.Linear(width, inner, bias=key_bias)
        self.v = nn.Linear(width, inner)
        self.leave = nn.Linear(inner, width)

    def forward(
        self, q: Float[Tensor, "B N E"], k: Float[Tensor, "B M E"], v: Float[Tensor, "B M E"]
    ) -> Float[Tensor, "B N E"]:
        q, k, v = self._apart(self.q(q)), self._apart(self.k(k)), self._apart(self.v(v))
        return self.leave(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def shares(self, q: Float[Tensor, "B N E"], k: Float[Tensor, "B M E"]) -> Float[Tensor, "B N M"]:
        """How much each query takes from each key, the mean over heads."""
        q, k = self._apart(self.q(q)).float(), self._apart(self.k(k)).float()
        return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1).mean(1)

    def _apart(self, tokens: Float[Tensor, "B N inner"]) -> Float[Tensor, "B heads N d"]:
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)


class Position(nn.Module):
    """Where a place lies in the patch, as waves of random directions that are saved and not trained."""

    frequencies: Tensor

    def __init__(self, dims: int, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(dims, width // 2))  # x first, then y, then z

    def forward(self, x: Float[Tensor, "B E *space"]) -> Float[Tensor, " E *space"]:
        grid, phase = x.shape[2:], self.frequencies.new_zeros(())
        for number, frequencies in enumerate(self.frequencies):
            axis = len(grid) - 1 - number
            centres = (2 * torch.arange(grid[axis], device=x.device, dtype=frequencies.dtype) + 1) / grid[axis] - 1
            phase = phase + 2 * math.pi * centres.view(-1, *[1] * (number + 1)) * frequencies
        return torch.cat([phase.sin(), phase.cos()], dim=-1).to(x.dtype).movedim(-1, 0)


class Lead(nn.Module):
    """Leads each token to the width of the next level, by a perceptron of its own or by one for all."""

    def __init__(self, inputs: int, outputs: int, count: int) -> None:
        super().__init__()
        self.perceptrons = nn.ModuleList(
            nn.Sequential(
                nn.Linear(inputs, inputs), nn.ReLU(), nn.Linear(inputs, inputs), nn.ReLU(), nn.Linear(inputs, outputs)
            )
            for _ in range(count)
        )

    def forward(self, tokens: Float[Tensor, "B K E"]) -> Float[Tensor, "B K E2"]:
        if len(self.perceptrons) == 1:
            return self.perceptrons[0](tokens)
        return torch.stack([lead(tokens[:, i]) for i, lead in enumerate(self.perceptrons)], dim=1)


class Pointwise(nn.Linear):
    """A convolution with kernel 1 as a matrix product, which keeps channels last: on one thread of a CPU torch has but
    a slow one, that turns the memory of all around it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B C2 *space"]:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def _convolution(config: Config, inputs: int, outputs: int, kernel: Size, stride: Size = ()) -> nn.Sequential:
    """Convolution, norm, SiLU."""
    stride = stride or (1,) * len(kernel)
    if not config.faithful:  # a kernel shorter than its stride would leave voxels out
        kernel = tuple(max(k, s) for k, s in zip(kernel, stride, strict=True))
    convolve = (
        Pointwise(inputs, outputs)
        if set(kernel) == {1}
        else CONVOLUTION[len(kernel)](inputs, outputs, kernel, stride, _padding(kernel), bias=False)
    )
    return nn.Sequential(convolve, _norm(config, outputs), nn.SiLU())


def _spread(config: Config, inputs: int, outputs: int, stride: Size) -> nn.Sequential:
    """Each voxel becomes a block; norm, SiLU."""
    spread = TRANSPOSED[len(stride)](inputs, outputs, stride, stride, bias=False)
    return nn.Sequential(spread, _norm(config, outputs), nn.SiLU())


def _rise(inputs: int, outputs: int, stride: Size) -> nn.Sequential:
    """Each voxel becomes a block; norm, GELU."""
    return nn.Sequential(TRANSPOSED[len(stride)](inputs, outputs, stride, stride), PlaceNorm(outputs, 1e-6), nn.GELU())


def _norm(config: Config, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if config.faithful else InstanceNorm(channels)


def _padding(kernel: Size) -> Size:
    """An even kernel is as long as its stride and needs none."""
    return tuple(k // 2 * (k % 2) for k in kernel)


def _nearest(x: Float[Tensor, "B C *space"], like: Tensor) -> Tensor:
    return functional.interpolate(x, size=like.shape[2:], mode="nearest")


def _places(x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B N C"]:
    return x.flatten(2).mT


def _brightest(shares: Float[Tensor, "B K N"]) -> Float[Tensor, "B K N"]:
    return shares / shares.amax(-1, keepdim=True)


def _steps(config: Config) -> tuple[tuple[Triple, ...], tuple[Triple, ...]]:
    """Strides and kernels; the paper's where nobody chose any, planes being thin along their first axis."""
    if config.strides:
        return config.strides, config.kernels
    thin = [0] if config.dims == 2 else []
    return (_flat((2, 2, 2), thin),) * STEPS, (_flat((3, 3, 3), thin),) * STEPS


def _thin_axes(strides: tuple[Triple, ...], kernels: tuple[Triple, ...]) -> list[int]:
    return [axis for axis in range(3) if all(size[axis] == 1 for size in (*strides, *kernels))]


def _flat(size: Triple, thin: list[int]) -> Triple:
    d, h, w = (1 if axis in thin else n for axis, n in enumerate(size))
    return d, h, w
