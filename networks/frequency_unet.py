"""Two U-Nets side by side, one for what varies slowly in a scan and one for its edges by direction, which exchange what
they found where both are deepest.

HFF-Net (Shao et al., IEEE TMI 44(11), 2025, arXiv 2506.10142). Good for lesions whose border is known by its edges in several
contrasts, tumours in brain MR above all. It is two networks in one: about three times the time and memory of residual_unet
of the same width.

The decomposition is part of the network, so nothing is written to disk. Where the default departs from the authors' code
(`faithful=True` has it as it was, and takes intensities as the scanner gives them; Z-scores are for the default):

- Edges keep their sizes: theirs were cut off at 0 and 1, which left all but their sign. What varies slowly is not put
  into 8 bits slice by slice.
- Where voxels are as tall as wide, edges are looked for in slices of all three orientations, else in the finest planes.
- A gate is multiplied once: theirs took amplitudes to the eighth power and left the mean of each map. It fits any depth.
- The attention across slices learns: a draw without gradient hid it. It gives a number; `uncertain` a distribution.
- The Laplacian convolution starts as one: their initialisation overwrote it. It sharpens each band by itself, and taps
  that were put back stay there: theirs drifted on with the optimiser's momentum and weight decay.
- The side answers have the classes' channels and may be negative, at the resolution where they are made.
- The branches are asked to agree in space's frequencies, on probabilities: theirs transformed classes as if space.
- The answer is the mean of both branches' logits; theirs was the branch that did better on the cases it was tested on.
- One convolution where two followed each other with nothing between them, and transposed convolutions on the way up: an
  eighth of the work of interpolating first.

Losses that need no truth come with the answer: `agreement` between the branches, which grows with the steps, and
`laplacian`, the drift from the stencil. Dice belongs to training.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from .parts import attentive
from .parts.answer import Answer
from .parts.blocks import (
    SLOPE,
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
from .parts.dims import Dims, as_plane, but_thin, dims_of, without_thin
from .parts.frequency import (
    DIRECTIONS,
    Decomposition,
    PublishedDecomposition,
    PublishedSpectralAttention,
    SpectralAttention,
    disagreement,
)

attention_maps = attentive.attention_maps

EPOCHS = 450
"""The authors train so long;"""
WARM = 40
"""after so many the Laplacian convolution's taps are weighed, for one epoch."""
WEIGHED = 20
"""For so many steps at least: an epoch of a short training has too few gradients to tell taps apart."""
PUBLISHED_SIDES = 4
"""Channels of the authors' side answers, whatever the classes."""


PAPER = "Shao et al., IEEE TMI 2025, arXiv 2506.10142 (HFF-Net)"
GOOD_FOR = "lesions known by their edges in several contrasts"


@dataclass(frozen=True, kw_only=True)
class Config:
    width: int | None = None
    """Channels of each branch at full resolution; each stage below has twice as many. None: 12, which suits two CPU
    cores; with `faithful` the authors' 16."""
    widest: int = 320
    """No stage has more channels than this."""
    dims: Dims = 3
    """2 for patches one voxel thick, along whose thin axis nothing is done. `fit` sets it."""
    strides: tuple[Triple, ...] = ()
    """How much each stage shrinks each axis, finest first; the first is always (1, 1, 1). Empty: the authors' five stages;
    `fit` chooses what suits a patch."""
    kernels: tuple[Triple, ...] = ()
    """Size of the convolutions of each stage."""
    stacked: tuple[int, ...] = (0,)
    """Axes 0, 1, 2 along which slices lie on one another: edges are looked for within slices. `fit` sets it."""
    depth: int = 128
    """Slices of a patch: the faithful network alone has weights for each. `fit` sets it."""
    answer: Literal["mean", "low", "high"] = "mean"
    """Whose logits are the answer: the mean of both branches, the slow one's or the edges'."""
    uncertain: bool | None = None
    """Attention across slices draws from a distribution in training. None: no, as it has a standard deviation of more than
    1 before a sigmoid; with `faithful` yes, in use as well."""
    steps: int = 2000
    """Over how many steps of training the authors' 450 epochs are laid: the branches' agreement counts more and more, and
    after the first 40 epochs the taps of the Laplacian convolution that matter most are put back."""
    agreement: float = 15.0
    """How much the branches' agreement counts at the end of these steps."""
    drift: float = 5e-6
    """How much the squared distance of the Laplacian convolution from its stencil counts."""
    faithful: bool = False
    """The authors' code, errors included."""

    def __post_init__(self) -> None:
        refuse_unlike_stages("frequency_unet", self.strides, self.kernels)
        if min(self.filters, self.widest, self.depth, self.steps) < 1 or min(self.agreement, self.drift) < 0:
            raise ValueError(
                f"frequency_unet was given width {self.width}, widest {self.widest}, depth {self.depth}, steps "
                f"{self.steps}, agreement {self.agreement} and drift {self.drift}; it needs 1 or more of the first four, "
                "and no negative weight of a loss. Correct them."
            )
        if self.dims not in (2, 3) or self.answer not in ("mean", "low", "high"):
            raise ValueError(
                f"frequency_unet was given dims {self.dims} and answer {self.answer!r}; it needs 2 or 3, and one of "
                "'mean', 'low', 'high'. Correct them."
            )
        if not self.stacked or not set(self.stacked) <= {0, 1, 2} or (self.faithful and len(self.stacked) > 1):
            raise ValueError(
                f"frequency_unet was given slices stacked along {self.stacked}; it needs axes among 0, 1 and 2, one or "
                "more, and a single one with `faithful`. Leave it out to have it chosen."
            )
        if self.faithful and (self.dims == 2 or any(axis != 0 for axis in self.stacked)):
            raise ValueError(
                f"frequency_unet was given faithful, dims {self.dims} and slices stacked along {self.stacked}; the authors' "
                "network is of volumes, slices first. Turn the patch, or leave `faithful` out."
            )

    @property
    def filters(self) -> int:
        """The width, chosen."""
        return (16 if self.faithful else 12) if self.width is None else self.width

    @property
    def stages(self) -> tuple[tuple[Triple, ...], tuple[Triple, ...]]:
        """Strides and kernels, chosen."""
        if self.strides:
            return self.strides, self.kernels
        return ((1, 1, 1), *[(2, 2, 2)] * 4), ((3, 3, 3),) * 5

    @property
    def draws(self) -> bool:
        """Whether attention across slices is uncertain, chosen."""
        return self.faithful if self.uncertain is None else self.uncertain


def fit(config: Config, *, patch: tuple[int, int, int], spacing: tuple[float, float, float]) -> Config:
    """The config with the stages and planes that suit this patch and spacing, unless it has stages. Round the patch up
    to `divisor` afterwards."""
    if config.strides:
        return config
    if config.faithful:
        step = 2 ** (len(config.stages[0]) - 1)
        return replace(config, depth=math.ceil(patch[0] / step) * step)
    strides, kernels = stages_for("frequency_unet", patch, without_thin(spacing, patch))
    return replace(
        config,
        dims=dims_of(patch),
        strides=strides,
        kernels=tuple(but_thin(kernel, patch) for kernel in kernels),
        stacked=_stacked(patch, spacing),
    )


def divisor(config: Config) -> tuple[int, int, int]:
    """What each axis of a patch must be a multiple of."""
    return total_stride(config.stages[0])


def build(config: Config, *, channels: int, classes: int) -> nn.Module:
    """A new network with fresh weights."""
    network = FrequencyUNet(config, channels, classes)
    if config.faithful:
        _initialise_as_published(network)
        return network
    initialise(network)
    network.sharpen.start()  # after the others: the authors' initialisation came last and took the stencil away
    return network


def explained(network: nn.Module) -> dict[str, nn.Module]:
    """What may be explained, nearest to the answer first: both branches' decoders, what they exchange, then the stages of
    their encoders."""
    low = network.get_submodule("low")
    merges = [f"merge.{i}" for i in reversed(range(len(low.get_submodule("merge")._modules)))]
    downs = [f"down.{i}" for i in reversed(range(len(low.get_submodule("down")._modules)))]
    paths = [f"{branch}.{part}" for part in (*merges, "join", "look", "look_deep") for branch in ("low", "high")]
    paths += [f"{branch}.{down}" for down in downs for branch in ("high", "low")]
    return {path: network.get_submodule(path) for path in paths}


class FrequencyUNet(nn.Module):
    def __init__(self, config: Config, channels: int, classes: int) -> None:
        super().__init__()
        self.config, self.divisor = config, divisor(config)
        self.decompose = (PublishedDecomposition if config.faithful else Decomposition)(config.stacked)
        edges = DIRECTIONS * len(config.stacked) * channels
        self.sharpen = LaplacianConvolution(edges, config)
        self.low = Branch(config, channels, classes)
        self.high = Branch(config, edges, classes)

    def forward(self, x: Float[Tensor, "B C D H W"]) -> Answer | Float[Tensor, "B K D H W"]:
        """In training the answer, both branches, their side answers, and two losses; else the answer alone."""
        refuse_unless_multiple(x.shape, self.divisor)
        if self.config.dims == 2:
            as_plane(x)  # refuses a volume
        slow, edges = (part.contiguous(memory_format=torch.channels_last_3d) for part in self.decompose(x))
        low = self.low.encode(slow)  # from [B, C, D, H, W]
        high = self.high.encode(self.sharpen(edges))  # from [B, bands, D, H, W]
        answer = self.config.answer
        if not self.training and answer != "mean":
            return self.low.decode(low, high)[0] if answer == "low" else self.high.decode(high, low)[0]
        (low_logits, *low_side), (high_logits, *high_side) = self.low.decode(low, high), self.high.decode(high, low)
        mean = (low_logits + high_logits) / 2
        if not self.training:
            return mean
        finest = {
            "mean": (mean, low_logits, high_logits),
            "low": (low_logits, high_logits),
            "high": (high_logits, low_logits),
        }
        logits = [*finest[answer], *low_side, *high_side]
        losses = {"agreement": self._agreement(low_logits, high_logits), "laplacian": self.sharpen.drift()}
        return Answer(logits=logits, losses=losses, weights=(1.0,) * len(logits))  # the authors': all count alike

    def _agreement(self, low: Tensor, high: Tensor) -> Tensor:
        weight = self.config.agreement * self.sharpen.share_done
        if self.config.faithful:  # classes, depth and height were transformed, where space was meant
            return weight * disagreement(low, high, axes=(1, 2, 3))
        return weight * disagreement(low.softmax(1), high.softmax(1))


class LaplacianConvolution(nn.Module):
    """x and its Laplacian, by a convolution that may learn but not forget: elastic weight consolidation.

    Early in training the squared gradients of its weights are summed up for a while: of the whole loss, where the authors
    took both branches' Dice alone in passes of their own. Taps that matter more than the mean of their kernel and a
    standard deviation go back to the Laplacian's, and stay there. Whoever trains it does nothing for that: a backward pass
    in training is a step, counted in a buffer that is saved with the weights.
    """

    steps: Tensor
    fisher: Tensor
    held: Tensor
    stencil: Tensor

    def __init__(self, channels: int, config: Config) -> None:
        super().__init__()
        self.faithful, self.weighs, self.span = config.faithful, config.drift, config.steps
        self.begin = round(config.steps * WARM / EPOCHS)
        self.end = self.begin + max(WEIGHED, round(config.steps / EPOCHS))
        # the same stencil from each channel to each would give all channels the same correction
        self.groups = 1 if config.faithful else channels
        kernel = config.stages[1][0]
        self.weight = nn.Parameter(torch.empty(channels, channels // self.groups, *kernel))
        self.padding = tuple(n // 2 for n in kernel)
        self.register_buffer("stencil", laplacian(kernel), persistent=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("fisher", torch.zeros_like(self.weight))
        self.register_buffer("held", torch.zeros_like(self.weight, dtype=torch.bool))
        self._listen()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._listen()  # a copied parameter has lost its hooks

    def start(self) -> None:
        """As the Laplacian itself."""
        with torch.no_grad():
            self.weight.copy_(self.stencil.expand_as(self.weight))

    def forward(self, x: Float[Tensor, "B C D H W"]) -> Float[Tensor, "B C D H W"]:
        return x + functional.conv3d(x, self.kernel, padding=self.padding, groups=self.groups)

    @property
    def kernel(self) -> Tensor:
        """What is convolved with; momentum and weight decay do not reach taps that are held."""
        return self.weight if self.faithful else torch.where(self.held.clone(), self.stencil, self.weight)

    @property
    def share_done(self) -> Float[Tensor, ""]:
        """Of the authors' 450 epochs, the one in hand included."""
        return ((self.steps + self.span / EPOCHS) / self.span).clamp_max(1)

    def drift(self) -> Float[Tensor, ""]:
        """The squared distance from the stencil, weighted."""
        return self.weighs * (self.kernel - self.stencil).square().sum()

    def matters(self) -> Tensor:
        """Which taps' squared gradients exceed the mean of their kernel by a standard deviation."""
        std, mean = torch.std_mean(self.fisher, (2, 3, 4), keepdim=True)
        return self.fisher > mean + std

    def _listen(self) -> None:
        self.weight.register_post_accumulate_grad_hook(self._follow)

    @torch.no_grad()
    def _follow(self, weight: Tensor) -> None:
        """After a backward pass; without a look at the values, for which a GPU would wait."""
        if not self.training or weight.grad is None:
            return
        self.steps += 1
        is_weighed, is_over = (self.steps > self.begin) & (self.steps <= self.end), self.steps == self.end
        self.fisher += is_weighed * weight.grad.square()
        self.held |= is_over & self.matters()
        if self.faithful:  # put back once, then held by their gradients alone: momentum and weight decay move them on
            weight.copy_(torch.where(is_over & self.held, self.stencil, weight))
            weight.grad.masked_fill_(self.held, 0)


def laplacian(kernel: Triple) -> Tensor:
    """The sum of the neighbours, and the middle as often taken off, along each axis on which the kernel has any."""
    stencil = torch.zeros(kernel)
    middle = [n // 2 for n in kernel]
    for axis, n in enumerate(kernel):
        if n > 1:
            for step in (-1, 1):
                stencil[tuple(place + step * (a == axis) for a, place in enumerate(middle))] = 1
    stencil[tuple(middle)] = -2.0 * sum(n > 1 for n in kernel)
    return stencil


@dataclass(frozen=True)
class Encoded:
    """What a branch's way down has found."""

    skips: list[Tensor]
    """Of the stages above the two deepest, finest first."""
    seen: Tensor
    """[B, C4, ...] of the upper of these two, gated by frequency,"""
    lowered: Tensor
    """and at the resolution of the deepest."""
    seen_deep: Tensor
    """[B, C5, ...] of the deepest, gated by frequency,"""
    raised: Tensor
    """and at the resolution of the upper one."""


class Branch(nn.Module):
    """A U-Net whose two deepest stages look at their spectrum, and are merged with those of another."""

    def __init__(self, config: Config, inputs: int, classes: int) -> None:
        super().__init__()
        parts = PUBLISHED if config.faithful else OURS
        convolve, residual, enlarge = parts.convolve, parts.residual, parts.enlarge
        strides, kernels = config.stages
        widths = [min(config.filters * 2**stage, config.widest) for stage in range(len(strides))]
        *_, (width, kernel), (deep, last) = zip(widths, kernels, strict=True)
        stride, self.upper, self.faithful = strides[-1], len(strides) - 2, config.faithful

        self.stem = nn.Sequential(
            *parts.stem(inputs, widths[0], kernels[0]), residual(widths[0], widths[0], kernels[0])
        )
        self.down = nn.ModuleList(
            nn.Sequential(
                convolve(widths[stage - 1], widths[stage], kernels[stage], strides[stage]),
                residual(widths[stage], widths[stage], kernels[stage]),
            )
            for stage in range(1, len(strides))
        )
        self.more = residual(width, width, kernel)
        self.look = nn.Sequential(convolve(width, width, kernel), _attention(config, width, self.upper))
        self.look_deep = nn.Sequential(convolve(deep, deep, last), _attention(config, deep, self.upper + 1))
        self.lower, self.raise_ = convolve(width, width, last, stride), enlarge(deep, deep, kernel, stride)

        self.fuse_deep = nn.Sequential(
            convolve(2 * deep + width, deep, (1, 1, 1)),
            residual(deep, deep, last),
            enlarge(deep, width, kernel, stride),
        )
        self.fuse = nn.Sequential(convolve(2 * width + deep, width, (1, 1, 1)), residual(width, width, kernel))
        self.join = residual(2 * width, width, kernel)
        self.up, self.merge = nn.ModuleList(), nn.ModuleList()
        for stage in reversed(range(self.upper)):
            self.up.append(enlarge(widths[stage + 1], widths[stage], kernels[stage], strides[stage + 1]))
            self.merge.append(residual(2 * widths[stage], widths[stage], kernels[stage]))
        self.head = nn.Conv3d(widths[0], classes, 1)
        self.side = parts.side(widths[1], classes, strides[1]) if self.upper else None

    def encode(self, x: Float[Tensor, "B C D H W"]) -> Encoded:
        x = self.stem(x)  # [B, C1, D, H, W]
        skips = [x]
        for down in self.down[:-1]:
            x = down(x)  # [B, Cs, D / stride, H / stride, W / stride]
            skips.append(x)
        deep = self.down[-1](x)  # [B, C5, ...]
        more = self.more(skips.pop())  # [B, C4, ...]
        return Encoded(
            skips=skips,
            seen=self.look(more),
            lowered=self.lower(more),
            seen_deep=self.look_deep(deep),
            raised=self.raise_(deep),
        )

    def decode(self, own: Encoded, other: Encoded) -> list[Tensor]:
        """Logits, and in training those of the second finest stage, where there is one."""
        deep = self.fuse_deep(torch.cat([own.seen_deep, other.seen_deep, other.lowered], 1))  # [B, C4, ...]
        x = self.fuse(torch.cat([own.seen, other.seen, other.raised], 1))
        x = beside = self.join(torch.cat([x, deep], 1))
        for stage, up, merge in zip(reversed(range(self.upper)), self.up, self.merge, strict=True):
            raised = up(x)
            x = merge(torch.cat([own.skips[stage], raised], 1))  # [B, Cs, D / stride, H / stride, W / stride]
            if stage == 1:
                beside = raised if self.faithful else x
        logits = self.head(x)
        return [logits] if self.side is None or not self.training else [logits, self.side(beside)]


def _attention(config: Config, channels: int, stage: int) -> nn.Module:
    if config.faithful:
        depth = config.depth // total_stride(config.stages[0][: stage + 1])[0]
        return PublishedSpectralAttention(channels, depth, uncertain=config.draws)
    return SpectralAttention(channels, stacked=config.stacked[0], solid=config.dims == 3, uncertain=config.draws)


@dataclass(frozen=True)
class Parts:
    """What a branch is made of."""

    stem: Callable[[int, int, Triple], list[nn.Module]]
    convolve: Callable[..., nn.Module]
    residual: Callable[[int, int, Triple], nn.Module]
    enlarge: Callable[[int, int, Triple, Triple], nn.Module]
    side: Callable[[int, int, Triple], nn.Module]


def _stem(inputs: int, outputs: int, kernel: Triple) -> list[nn.Module]:
    return [convolution(inputs, outputs, kernel)]


def _enlarge(inputs: int, outputs: int, kernel: Triple, stride: Triple) -> nn.Module:
    up = nn.ConvTranspose3d(inputs, outputs, stride, stride, bias=False)
    return nn.Sequential(up, InstanceNorm(outputs, slope=SLOPE))


def _side(inputs: int, classes: int, stride: Triple) -> nn.Module:
    return nn.Conv3d(inputs, classes, 1)


OURS = Parts(stem=_stem, convolve=convolution, residual=ResidualBlock, enlarge=_enlarge, side=_side)


class PublishedResidual(nn.Module):
    """Two convolutions beside a shortcut; norms without scale and shift."""

    def __init__(self, inputs: int, outputs: int, kernel: Triple) -> None:
        super().__init__()
        self.first = _published_convolution(inputs, outputs, kernel)
        self.second = _published_convolution(outputs, outputs, kernel)[:2]
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            self.shortcut = _published_convolution(inputs, outputs, (1, 1, 1))[:2]

    def forward(self, x: Float[Tensor, "B C D H W"]) -> Float[Tensor, "B C2 D H W"]:
        return (self.second(self.first(x)) + self.shortcut(x)).relu()


def _published_convolution(
    inputs: int, outputs: int, kernel: Triple, stride: Triple = (1, 1, 1), *, bias: bool = False
) -> nn.Sequential:
    d, h, w = kernel
    convolve = nn.Conv3d(inputs, outputs, kernel, stride, (d // 2, h // 2, w // 2), bias=bias)
    return nn.Sequential(convolve, nn.InstanceNorm3d(outputs), nn.ReLU())


def _published_stem(inputs: int, outputs: int, kernel: Triple) -> list[nn.Module]:
    return [_published_convolution(n, outputs, kernel)[0] for n in (inputs, outputs)]


def _published_enlarge(inputs: int, outputs: int, kernel: Triple, stride: Triple) -> nn.Sequential:
    up = nn.Upsample(scale_factor=stride, mode="trilinear", align_corners=True)
    return nn.Sequential(up, *_published_convolution(inputs, outputs, kernel, bias=True))


class PublishedSide(nn.Sequential):
    """At full resolution, always of four channels and never negative."""

    def __init__(self, inputs: int, classes: int, stride: Triple) -> None:
        if classes > PUBLISHED_SIDES:
            raise ValueError(
                f"{classes} classes were given; the published network's side answers have {PUBLISHED_SIDES} channels. Train "
                "on fewer labels, or leave `faithful` out."
            )
        widths = (inputs, 16, 8, PUBLISHED_SIDES)
        first, second, third = (
            _published_convolution(i, o, (3, 3, 3), bias=True) for i, o in itertools.pairwise(widths)
        )
        up = nn.Upsample(scale_factor=stride, mode="trilinear", align_corners=True)
        super().__init__(up, *first, *second, *third)
        self.classes = classes

    def forward(self, x: Float[Tensor, "B C D H W"]) -> Float[Tensor, "B K D2 H2 W2"]:
        return super().forward(x)[:, : self.classes]


PUBLISHED = Parts(
    stem=_published_stem,
    convolve=_published_convolution,
    residual=PublishedResidual,
    enlarge=_published_enlarge,
    side=PublishedSide,
)


def _initialise_as_published(network: nn.Module) -> None:
    """The Laplacian convolution too, which the authors had set to the Laplacian before."""
    for module in network.modules():
        if isinstance(module, nn.Conv3d | LaplacianConvolution):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.001)
        if isinstance(module, nn.Conv3d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def _stacked(patch: Triple, spacing: tuple[float, float, float]) -> tuple[int, ...]:
    """Slices whose voxels are the finest there are, and about as high as wide; of a plane, the plane."""
    if 1 in patch:
        return (patch.index(1),)
    across = [max(step for other, step in enumerate(spacing) if other != axis) for axis in range(3)]
    return tuple(axis for axis in range(3) if across[axis] < 2 * min(across))
