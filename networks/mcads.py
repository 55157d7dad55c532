"""A residual encoder whose decoder restores resolution by folding channels into space, and weighs what it restored.

Wazir and Kim, "Rethinking Decoder Design: Improving Biomarker Segmentation Using Depth-to-Space Restoration and Residual
Linear Attention" (MCADS-Decoder, CVPR 2025, arXiv 2506.18335). Good for many small structures, such as nuclei, and wherever
sharp edges count.

Where the default departs from the authors' code (`faithful=True` has it as it was, in planes, with their nested encoder):

- Our residual encoder instead of U-Nets inside a U-Net, whose gates are 512 channels wide over features of 32.
- Volumes and planes, and instance norm instead of batch norm: batches are of one or two patches.
- Attention runs along the rows of every axis and the results are averaged: theirs looks along the last axis alone, so
  that a transposed image gets another answer. Scores are divided by √channels: a sum over 512 channels chooses one place.
- A skip's path has no depth-wise 1 × 1 convolution: the norm behind it takes away what it does.
- Space is weighed by the mean, largest and smallest channel; the sum says nothing that the mean does not, only 512 times
  louder. Nothing is dropped there, and channels are weighed through 4 numbers at least.
- The second finest skip is no exception: theirs alone passes attention of its own.
- Each resolution answers at its own resolution, and the truth is brought to it: enlarging the bottleneck costs more than
  all else. Folding makes 4 times the channels whatever the stride, as in planes: 8 times has 57 million weights.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from kernels import position_attention

from .parts import attentive
from .parts.answer import Answer
from .parts.attention.position import received
from .parts.blocks import (
    InstanceNorm,
    ResidualBlock,
    Triple,
    convolution,
    initialise,
    refuse_unless_multiple,
    refuse_unlike_stages,
    stages_for,
    total_stride,
)
from .parts.dims import Dims, as_plane, but_thin, dims_of, resize

SLOPE = 0.3  # Keras: LeakyReLU
HALVINGS = 5  # the authors' backbone ends at a thirty-second of the resolution
PLANE: Triple = (1, 3, 3)

attention_maps = attentive.attention_maps


PAPER = "Wazir & Kim, CVPR 2025, arXiv 2506.18335 (MCADS)"
GOOD_FOR = "many small structures, sharp edges"


@dataclass(frozen=True, kw_only=True)
class Config:
    width: int | None = None
    """Channels at full resolution; each stage below has twice as many. None: 16, which suits two CPU cores; with
    `faithful` the authors' 64."""
    widest: int = 320
    """No stage has more channels than this. With `faithful`: eight times the width."""
    blocks: tuple[int, ...] = (1, 2, 2, 2)
    """Residual blocks per stage of the encoder, finest first; the last number serves all deeper stages."""
    restored: int = 2
    """Steps up, deepest first, that fold channels into space; the others interpolate."""
    dims: Dims = 3
    """2 for patches one voxel thick, along whose thin axis nothing is done. `fit` sets it."""
    strides: tuple[Triple, ...] = ()
    """How much each stage shrinks each axis, finest first; the first is always (1, 1, 1). Empty: `fit` chooses them."""
    kernels: tuple[Triple, ...] = ()
    """Size of the convolutions of each stage. Empty: `fit` chooses them."""
    faithful: bool = False
    """The authors' code, errors included: planes only."""

    def __post_init__(self) -> None:
        refuse_unlike_stages("mcads", self.strides, self.kernels)
        if not self.blocks or min(*self.blocks, self.filters, self.widest) < 1 or self.restored < 0:
            raise ValueError(
                f"mcads was given width {self.width}, widest {self.widest}, blocks {self.blocks} and restored "
                f"{self.restored}; it needs 0 or more of the last, and 1 or more of the others. Correct them."
            )

    @property
    def filters(self) -> int:
        """The width, chosen."""
        return (64 if self.faithful else 16) if self.width is None else self.width


def fit(config: Config, *, patch: tuple[int, int, int], spacing: tuple[float, float, float]) -> Config:
    """The config with the stages that suit this patch and spacing, unless it has some. Round the patch up to `divisor`
    afterwards."""
    if config.strides:
        return config
    if config.faithful:
        if dims_of(patch) != 2:
            raise ValueError(
                f"A patch of {patch} voxels was given; the authors' mcads needs one that is one voxel thick. Plan with "
                "2-D patches, or leave `faithful` out."
            )
        strides = ((1, 1, 1), *[but_thin((2, 2, 2), patch)] * HALVINGS)
        kernels: tuple[Triple, ...] = ((3, 3, 3),) * len(strides)
    else:
        strides, kernels = stages_for("mcads", patch, spacing)
    kernels = tuple(but_thin(kernel, patch) for kernel in kernels)
    return replace(config, dims=dims_of(patch), strides=strides, kernels=kernels)


def divisor(config: Config) -> tuple[int, int, int]:
    """What each axis of a patch must be a multiple of."""
    return total_stride(config.strides)


def build(config: Config, *, channels: int, classes: int) -> nn.Module:
    """A new network with fresh weights."""
    if not config.strides:
        raise ValueError("mcads was given no stages; it needs the config that `fit` makes for a patch. Call it.")
    if config.faithful:
        network = PublishedMCADS(config, channels, classes)
        _initialise_as_keras(network)
        return network.to(memory_format=torch.channels_last_3d)
    return initialise(MCADS(config, channels, classes))


def explained(network: nn.Module) -> dict[str, nn.Module]:
    """What may be explained, nearest to the answer first: what each step up has restored, then each stage of the encoder
    from the bottleneck on."""
    steps = [name for name, module in network.named_modules() if isinstance(module, Step)]
    stages = [f"down.{stage}" for stage in range(len(list(network.get_submodule("down").children())))]
    return {name: network.get_submodule(name) for name in (*reversed(steps), *reversed(stages))}


class MCADS(nn.Module):
    def __init__(self, config: Config, channels: int, classes: int) -> None:
        super().__init__()
        stages = range(len(config.strides))
        widths = [min(config.filters * 2**stage, config.widest) for stage in stages]
        self.dims, self.divisor = config.dims, divisor(config)
        self.stem = convolution(channels, widths[0], config.kernels[0])
        self.down = nn.ModuleList(_stage(config, stage, widths[max(0, stage - 1)], widths[stage]) for stage in stages)
        self.steps = nn.ModuleList()
        self.heads = nn.ModuleList([nn.Conv3d(widths[-1], classes, 1)])
        for i, stage in enumerate(reversed(stages[:-1])):
            stride = config.strides[stage + 1] if i < config.restored else None
            repeats = min(stage + 1, HALVINGS)  # the authors': the coarser a skip, the longer its path
            self.steps.append(Step(widths[stage + 1], widths[stage], config.kernels[stage], stride, repeats))
            self.heads.append(nn.Conv3d(widths[stage], classes, 1))

    def forward(self, x: Float[Tensor, "B C D H W"]) -> list[Tensor] | Float[Tensor, "B K D H W"]:
        """In training, logits of every resolution, finest first; else the finest alone."""
        refuse_unless_multiple(x.shape, self.divisor)
        if self.dims == 2:
            as_plane(x)  # refuses a volume
        x = self.stem(x.contiguous(memory_format=torch.channels_last_3d))  # [B, C0, D, H, W]
        skips = []
        for stage in self.down:
            x = stage(x)  # [B, Cs, D / stride, H / stride, W / stride]
            skips.append(x)
        features = [skips.pop()]
        for step in self.steps:
            features.append(step(features[-1], skips.pop()))  # [B, Cs, D / stride, H / stride, W / stride]
        if not self.training:
            return self.heads[-1](features[-1])
        return [head(x) for head, x in zip(self.heads, features, strict=True)][::-1]


class PublishedMCADS(nn.Module):
    """The authors' network. Planes stand upright here: [B, C, 1, H, W]."""

    def __init__(self, config: Config, channels: int, classes: int) -> None:
        super().__init__()
        width = config.filters
        outputs = [width, 2 * width, 4 * width, 8 * width, 8 * width]
        inner = [width // 2, width // 2, width, 2 * width, 4 * width]
        self.divisor = divisor(config)
        self.stages, self.weighed = nn.ModuleList(), nn.ModuleList()
        for i, (into, out, mid) in enumerate(zip([channels, *outputs], outputs, inner, strict=False)):
            # each bottoms out at a thirty-second of the resolution, save the last, which does not shrink
            self.stages.append(NestedUNet(7 - i, into, out, mid, width) if i < 4 else Bridge(into, out, mid))
            self.weighed.append(
                nn.Sequential(Weighing(out, PLANE, faithful=True), ConvBlock(out, out, PLANE, faithful=True))
            )
        self.bottom = Bridge(outputs[-1], outputs[-1], inner[-1])
        self.steps, into = nn.ModuleList(), outputs[-1]
        self.heads = nn.ModuleList([_head(into, classes)])
        for i, out in enumerate(reversed(outputs)):
            stride = (1, 2, 2) if i < 2 else None
            step = Step(into, out, PLANE, stride, 5 - i, faithful=True)
            if i == 3:
                step.path.append(RowAttention(out, (3,), 1.0, faithful=True))
            self.steps.append(step)
            self.heads.append(_head(out, classes))
            into = out

    def forward(self, x: Float[Tensor, "B C D H W"]) -> Answer | Float[Tensor, "B K D H W"]:
        """In training, six answers of full size, finest first, which count the same; else the finest alone."""
        refuse_unless_multiple(x.shape, self.divisor)
        plane, thin = as_plane(x)
        x = plane.unsqueeze(2).contiguous(memory_format=torch.channels_last_3d)  # [B, C, 1, H, W]
        size, skips = x.shape[2:], []
        for stage, weighed in zip(self.stages, self.weighed, strict=True):
            skips.append(weighed(stage(x)))
            x = _shrink(skips[-1])
        features = [self.bottom(x)]
        for step in self.steps:
            features.append(step(features[-1], skips.pop()))
        answered = [*zip(self.heads, features, strict=True)][0 if self.training else -1 :]
        logits = [head(resize(x, size)).movedim(2, thin) for head, x in answered][::-1]
        return Answer(logits=logits, weights=(1.0,) * len(logits)) if self.training else logits[0]


class Step(nn.Module):
    """One step up: restored from below, led around by rows of attention, weighed by channel and by place."""

    def __init__(
        self, inputs: int, outputs: int, kernel: Triple, stride: Triple | None, repeats: int, *, faithful: bool = False
    ) -> None:
        """Channels are folded into space if there is a `stride`; else it is interpolated."""
        super().__init__()
        self.restore = Restoration(inputs, kernel, stride) if stride else None
        restored = self.restore.outputs if self.restore else inputs
        self.from_below = ConvBlock(restored, outputs, kernel, faithful=faithful)
        self.path = nn.Sequential(*[PathBlock(outputs, kernel, faithful=faithful) for _ in range(repeats)])
        self.merge = ConvBlock(2 * outputs, outputs, kernel, faithful=faithful)
        # the authors' has no scale, and looks along the last axis
        axes, scale = ((3,), 1.0) if faithful else ((1, 2, 3), outputs**-0.5)
        self.rows = RowAttention(outputs, axes, scale, faithful=faithful)
        self.refine = ConvBlock(outputs, outputs, kernel, faithful=faithful)
        self.weigh = Weighing(outputs, kernel, faithful=faithful)

    def forward(self, x: Float[Tensor, "B C2 d h w"], skip: Float[Tensor, "B C D H W"]) -> Float[Tensor, "B C D H W"]:
        below = self.from_below(self.restore(x) if self.restore else resize(x, skip.shape[2:]))
        looked_up = self.rows(self.merge(torch.cat([below, self.path(skip)], dim=1)))
        return self.weigh(self.refine(below + looked_up))


class Restoration(nn.Module):
    """A convolution makes more channels, they are folded into space, and a convolution smooths the seams."""

    def __init__(self, channels: int, kernel: Triple, stride: Triple) -> None:
        super().__init__()
        folded = math.prod(stride)
        self.outputs = max(1, min(channels, 4 * channels // folded))  # in planes as many as came in
        self.stride = stride
        self.spread = nn.Conv3d(channels, folded * self.outputs, kernel, padding=_half(kernel))
        self.smooth = nn.Conv3d(self.outputs, self.outputs, kernel, padding=_half(kernel))

    def forward(self, x: Float[Tensor, "B C d h w"]) -> Float[Tensor, "B C2 D H W"]:
        return functional.relu(self.smooth(depth_to_space(functional.relu(self.spread(x)), self.stride)))


def depth_to_space(x: Float[Tensor, "B C d h w"], stride: Triple) -> Float[Tensor, "B C2 D H W"]:
    """TensorFlow's order: the place in the block is the slow part of the channel's number, not, as in torch's
    pixel_shuffle, the fast one."""
    (b, c, d, h, w), (i, j, k) = x.shape, stride
    blocks = x.movedim(1, -1).reshape(b, d, h, w, i, j, k, c // (i * j * k))
    return blocks.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, d * i, h * j, w * k, -1).movedim(-1, 1)


class ConvBlock(nn.Module):
    """A convolution of each channel by itself, then one of all channels at each place; a norm and a slope after each."""

    def __init__(self, inputs: int, outputs: int, kernel: Triple, dilation: int = 1, *, faithful: bool = False) -> None:
        super().__init__()
        self.by_channel = _by_channel(inputs, kernel, dilation)
        self.first_norm = _norm(inputs, SLOPE, faithful)
        self.by_place = nn.Conv3d(inputs, outputs, 1, bias=False)
        self.second_norm = _norm(outputs, SLOPE, faithful)

    def forward(self, x: Float[Tensor, "B C D H W"]) -> Float[Tensor, "B C2 D H W"]:
        return self.second_norm(self.by_place(self.first_norm(self.by_channel(x))))


class PathBlock(nn.Module):
    """Part of a skip's path: two branches, one of which sees the neighbourhood."""

    def __init__(self, channels: int, kernel: Triple, *, faithful: bool = False) -> None:
        super().__init__()
        self.wide = nn.Sequential(
            _by_channel(channels, kernel), _norm(channels, 1.0, faithful), nn.Conv3d(channels, channels, 1, bias=False)
        )
        self.wide_norm = _norm(channels, SLOPE, faithful)
        # the authors have a norm after a factor per channel, of which it leaves the sign
        factor = [_by_channel(channels, (1, 1, 1)), _norm(channels, 1.0, faithful)] if faithful else []
        self.narrow = nn.Sequential(
            *factor, nn.Conv3d(channels, channels, 1, bias=False), _norm(channels, 1.0, faithful)
        )
        self.norm = _norm(channels, 1.0, faithful)

    def forward(self, x: Float[Tensor, "B C D H W"]) -> Float[Tensor, "B C D H W"]:
        return self.norm(self.wide_norm(self.wide(x), self.narrow(x)))


class RowAttention(attentive.Attentive):
    """Each place looks at the others of its row: the mean over `axes` (1, 2, 3: D, H, W) of softmax(scale · q kᵀ) v.

    Exact attention inside a row; the published "linear" is about how q, k and v are made. Time grows with the length of
    a row, and no map is kept. Shows how much each place is looked at.
    """

    def __init__(self, channels: int, axes: Sequence[int], scale: float, *, faithful: bool = False) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(channels, channels), nn.Linear(channels, channels)
        # a bias of the keys adds the same to all scores of a query, which softmax takes away again
        self.key = nn.Linear(channels, channels, bias=faithful)
        self.axes, self.scale = tuple(axes), scale

    def forward(self, x: Float[Tensor, "B C D H W"]) -> Float[Tensor, "B C D H W"]:
        places = x.movedim(1, -1)  # [B, D, H, W, C], without gaps when channels are last
        q, k, v = self.query(places), self.key(places), self.value(places)
        axes = [axis for axis in self.axes if places.shape[axis] > 1] or [3]  # nobody looks along one voxel
        self.show(lambda: torch.stack([self._received(q, k, axis) for axis in axes]).mean(0))
        found = [self._look(q, k, v, axis) for axis in axes]
        return (sum(found[1:], found[0]) / len(found)).movedim(-1, 1)

    def _look(self, q: Tensor, k: Tensor, v: Tensor, axis: int) -> Float[Tensor, "B D H W C"]:
        q, k, v = (tokens.movedim(axis, -2) for tokens in (q, k, v))  # [B, ..., row, C]
        return position_attention.fused(q, k, v, scale=self.scale).movedim(-2, axis)

    def _received(self, q: Tensor, k: Tensor, axis: int) -> Float[Tensor, "B D H W"]:
        """A few rows at a time; 1 for the place of a scan that is looked at most."""
        q, k = (tokens.movedim(axis, -2) for tokens in (q, k))
        some = max(1, 2**22 // q.shape[-2] ** 2)
        rows = zip(q.flatten(0, 2).split(some), k.flatten(0, 2).split(some), strict=True)
        share = torch.cat([received(a, b, self.scale) for a, b in rows])  # [B · rows, row], 1 at each row's largest
        share = (share / share.sum(-1, keepdim=True)).reshape(q.shape[:-1]).movedim(-1, axis)
        return share / share.amax((1, 2, 3), keepdim=True)


class Weighing(nn.Module):
    """x times the sum of a weight per channel and a weight per place."""

    def __init__(self, channels: int, kernel: Triple, *, faithful: bool = False) -> None:
        super().__init__()
        self.channels = ChannelWeights(channels, max(1 if faithful else 4, channels // 16))
        self.places = PlaceWeights(kernel, faithful=faithful)

    def forward(self, x: Float[Tensor, "B C D H W"]) -> Float[Tensor, "B C D H W"]:
        return x * (self.channels(x) + self.places(x))  # the authors multiply by each, and add up


class ChannelWeights(attentive.Attentive):
    """A weight from 0 to 1 per channel, by its mean and its largest number. Shows it."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.narrow = nn.Linear(channels, inner, bias=False)
        self.widen = nn.Linear(inner, channels, bias=False)

    def forward(self, x: Float[Tensor, "B C D H W"]) -> Float[Tensor, "B C 1 1 1"]:
        described = x.mean((2, 3, 4)) + x.amax((2, 3, 4))  # [B, C]
        weights = torch.sigmoid(self.widen(functional.silu(self.narrow(described))))
        self.show(lambda: weights)
        return weights[:, :, None, None, None]


class PlaceWeights(attentive.Attentive):
    """A weight from 0 to 1 per place, by the mean, largest and smallest of its channels and its neighbours'. Shows it."""

    def __init__(self, kernel: Triple, *, faithful: bool = False) -> None:
        super().__init__()
        wide = _sevenfold(kernel)
        self.has_sum = faithful
        self.forget = nn.Dropout(0.5 if faithful else 0.0)  # the authors drop numbers of the maps that decide
        self.look = nn.Conv3d(4 if faithful else 3, 1, wide, padding=_half(wide))
        self.decide = nn.Conv3d(1, 1, 1)

    def forward(self, x: Float[Tensor, "B C D H W"]) -> Float[Tensor, "B 1 D H W"]:
        maps = [x.mean(1, keepdim=True), x.amax(1, keepdim=True), x.amin(1, keepdim=True)]
        if self.has_sum:
            maps.append(x.sum(1, keepdim=True))
        seen = self.look(self.forget(torch.cat(maps, dim=1)))
        weights = torch.sigmoid(self.decide(functional.silu(seen)))
        self.show(lambda: weights[:, 0])
        return weights


class NestedUNet(nn.Module):
    """A stage of the authors' encoder: a U-Net with gates whose width does not depend on the features'."""

    def __init__(self, depth: int, inputs: int, outputs: int, inner: int, base: int) -> None:
        super().__init__()
        self.first = _published(inputs, outputs)
        self.down = nn.ModuleList(_published(inner if i else outputs, inner) for i in range(depth - 1))
        self.dilated = _published(inner, inner, 2)
        self.bottom = _published(2 * inner, inner)
        self.gates = nn.ModuleList(UpGate(inner, inner, base * 8 // 2**i) for i in range(depth - 3))
        self.up = nn.ModuleList(_published(2 * inner, inner) for _ in range(depth - 3))
        self.last = _published(2 * inner, outputs)

    def forward(self, x: Float[Tensor, "B C 1 H W"]) -> Float[Tensor, "B C2 1 H W"]:
        shortcut = self.first(x)
        skips = [self.down[0](shortcut)]
        for down in self.down[1:]:
            skips.append(down(_shrink(skips[-1])))
        x = skips.pop()
        x = self.bottom(torch.cat([self.dilated(x), x], dim=1))
        for gate, up in zip(self.gates, self.up, strict=True):
            skip = skips.pop()
            x = up(torch.cat([resize(x, skip.shape[2:]), gate(skip, x)], dim=1))
        skip = skips.pop()
        return self.last(torch.cat([resize(x, skip.shape[2:]), skip], dim=1)) + shortcut


class UpGate(attentive.Attentive):
    """Lets pass of x what agrees with y, which is half as large. Shows how far it is open."""

    def __init__(self, channels: int, below: int, inner: int) -> None:
        super().__init__()
        self.signal, self.signal_norm = nn.Conv3d(below, inner, 1), _norm(inner, 0.0, True)
        self.of_x = nn.Conv3d(channels, inner, (1, 2, 2), (1, 2, 2))
        self.of_y = nn.Conv3d(inner, inner, 1)
        self.spread = nn.ConvTranspose3d(inner, inner, PLANE, padding=_half(PLANE))
        self.opening = nn.Conv3d(inner, 1, 1)
        self.out, self.norm = nn.Conv3d(channels, channels, 1), _norm(channels, 1.0, True)

    def forward(self, x: Float[Tensor, "B C 1 H W"], y: Float[Tensor, "B C2 1 h w"]) -> Float[Tensor, "B C 1 H W"]:
        signal = self.signal_norm(self.signal(y))
        seen = functional.relu(self.of_x(x) + self.spread(self.of_y(signal)))
        opening = functional.interpolate(torch.sigmoid(self.opening(seen)), x.shape[2:], mode="nearest")
        self.show(lambda: opening[:, 0])
        return self.norm(self.out(opening * x))


class Bridge(nn.Module):
    """The deepest stages of the authors' encoder: convolutions ever further apart, and back."""

    def __init__(self, inputs: int, outputs: int, inner: int) -> None:
        super().__init__()
        self.first = _published(inputs, outputs)
        self.out = nn.ModuleList(
            _published(inner if i else outputs, inner, dilation) for i, dilation in enumerate((1, 2, 4, 8))
        )
        self.back = nn.ModuleList(
            _published(2 * inner, outputs if dilation == 1 else inner, dilation) for dilation in (4, 2, 1)
        )

    def forward(self, x: Float[Tensor, "B C 1 H W"]) -> Float[Tensor, "B C2 1 H W"]:
        x = shortcut = self.first(x)
        seen = []
        for out in self.out:
            x = out(x)
            seen.append(x)
        for back, skip in zip(self.back, reversed(seen[:-1]), strict=True):
            x = back(torch.cat([x, skip], dim=1))
        return x + shortcut


class BatchNorm(nn.BatchNorm3d):
    """Keras' batch norm, with what our InstanceNorm has: something to add, and a leaky ReLU."""

    def __init__(self, channels: int, slope: float) -> None:
        super().__init__(channels, eps=1e-3, momentum=0.01)
        self.slope = slope

    def forward(
        self, x: Float[Tensor, "B C D H W"], added: Float[Tensor, "B C D H W"] | None = None
    ) -> Float[Tensor, "B C D H W"]:
        y = super().forward(x)
        return functional.leaky_relu(y if added is None else y + added, self.slope)


def _norm(channels: int, slope: float, faithful: bool) -> nn.Module:
    return BatchNorm(channels, slope) if faithful else InstanceNorm(channels, slope=slope)


def _by_channel(channels: int, kernel: Triple, dilation: int = 1) -> nn.Conv3d:
    d, h, w = _half(kernel)
    padding = (d * dilation, h * dilation, w * dilation)
    return nn.Conv3d(channels, channels, kernel, padding=padding, dilation=dilation, groups=channels, bias=False)


def _published(inputs: int, outputs: int, dilation: int = 1) -> ConvBlock:
    return ConvBlock(inputs, outputs, PLANE, dilation, faithful=True)


def _head(channels: int, classes: int) -> nn.Conv3d:
    return nn.Conv3d(channels, classes, PLANE, padding=_half(PLANE), bias=False)


def _stage(config: Config, stage: int, inputs: int, outputs: int) -> nn.Sequential:
    kernel, stride = config.kernels[stage], config.strides[stage]
    blocks = config.blocks[min(stage, len(config.blocks) - 1)]
    rest = [ResidualBlock(outputs, outputs, kernel) for _ in range(blocks - 1)]
    return nn.Sequential(ResidualBlock(inputs, outputs, kernel, stride), *rest)


def _initialise_as_keras(network: nn.Module) -> None:
    """Glorot's, which is Keras' own; He's where the authors ask for it. Biases at zero."""
    he_uniform: set[nn.Module] = set(network.heads)  # type: ignore[arg-type]
    he_normal: set[nn.Module] = set()
    for module in network.modules():
        if isinstance(module, ConvBlock | Restoration):
            he_uniform.update(module.modules())
        if isinstance(module, Weighing):
            he_normal.update(module.modules())
    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d | nn.Linear):
            if module in he_normal:
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif module in he_uniform:
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
            else:
                nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _shrink(x: Tensor) -> Tensor:
    return functional.max_pool3d(x, (1, 2, 2))


def _half(kernel: Triple) -> Triple:
    d, h, w = kernel
    return d // 2, h // 2, w // 2


def _sevenfold(kernel: Triple) -> Triple:
    """7 where the features are convolved at all: theirs is 7 × 7."""
    d, h, w = (7 if size > 1 else 1 for size in kernel)
    return d, h, w
