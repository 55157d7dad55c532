"""A residual U-Net whose deepest places all look at each other, and whose every resolution has a say in the answer.

Yu, Han and Song, "3D Medical Image Segmentation based on multi-scale MPU-Net" (arXiv 2307.05799, 2023). Good for large
organs in thick slabs: the bottleneck, a row of tokens, sees the whole patch, and a coarse answer steadies the fine one.

Where the default departs from the authors' code (`faithful=True` has it as it was):

- ELU saturates at −1. Theirs took the number of channels for its alpha, so that it saturated at −32 to −512.
- Instance norm instead of batch norm: batches are of one or two patches. None stands before the gate's sigmoid, where an
  instance norm would open half of the gate in every scan, whatever the scan shows.
- The answer is the mean of the four resolutions' logits, not of their probabilities: a network does not know whether
  labels exclude each other, and a mean of softmaxes is never above a half to the sigmoid that regions need.
- The three coarser answers stay coarse in training; the truth is brought to them.
- Nothing is dropped: training answers what use does. Convolutions before a norm, and keys, have no bias: norm and softmax
  take it away again.
- Of 22,557,009 published weights an up-convolution, a decoder and a head, together 1,049,754, were used by nothing. They
  are left out, of `faithful` too, which has the other 21,507,255.
- gamma starts at 0.1, not at 0, where queries, keys and values get no gradient in the first step.

There is no positional encoding, as in the code that works. Attention is computed without its map: memory grows with the
tokens, time with their square, so `fit` halves a patch on until at most `tokens` are left.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from .parts import attentive
from .parts.answer import Answer
from .parts.attention.position import PositionAttention
from .parts.blocks import InstanceNorm, Triple, refuse_unless_multiple, refuse_unlike_stages, stages_for, total_stride
from .parts.dims import Dims, as_plane, but_thin, dims_of, resize

KEPT = 2
"""Stages below the last halving, which keep its resolution."""
LEAST = 3
"""Halvings, where the patch bears them: the authors' attention sits at an eighth of the resolution."""
ANSWER_WEIGHTS = (1.0, 0.4, 0.4, 0.4)
"""The authors': the mean counts 1, each coarse map 0.4, which they let fade by a fifth every 30 epochs."""

attention_maps = attentive.attention_maps


PAPER = "Yu, Han & Song 2023, arXiv 2307.05799 (MPU-Net)"
GOOD_FOR = "large organs in thick slabs"


@dataclass(frozen=True, kw_only=True)
class Config:
    width: int | None = None
    """Channels at full resolution; the decoder has twice as many, each stage below too. None: 8, which suits two CPU
    cores; with `faithful` the authors' 16."""
    widest: int = 512
    """No stage has more channels than this."""
    dropout: float | None = None
    """Share of numbers that each stage forgets in training. None: 0; with `faithful` the authors' 0.2."""
    tokens: int = 4096
    """`fit` halves a patch until its places are no more than this, for each of them looks at every other."""
    dims: Dims = 3
    """2 for patches one voxel thick, along whose thin axis nothing is done. `fit` sets it."""
    strides: tuple[Triple, ...] = ()
    """How much each stage shrinks each axis, finest first; the first is always (1, 1, 1). Empty: `fit` chooses them."""
    kernels: tuple[Triple, ...] = ()
    """Size of the convolutions of each stage. Empty: `fit` chooses them."""
    faithful: bool = False
    """The authors' code, errors included."""

    def __post_init__(self) -> None:
        refuse_unlike_stages("mpu_net", self.strides, self.kernels)
        if min(self.filters, self.widest, self.tokens) < 1 or not 0 <= self.forgotten < 1:
            raise ValueError(
                f"mpu_net was given width {self.width}, widest {self.widest}, tokens {self.tokens} and dropout "
                f"{self.dropout}; it needs a dropout from 0 to below 1, and 1 or more of the others. Correct them."
            )

    @property
    def filters(self) -> int:
        """The width, chosen."""
        return (16 if self.faithful else 8) if self.width is None else self.width

    @property
    def forgotten(self) -> float:
        """The dropout, chosen."""
        return (0.2 if self.faithful else 0.0) if self.dropout is None else self.dropout


def fit(config: Config, *, patch: tuple[int, int, int], spacing: tuple[float, float, float]) -> Config:
    """The config with the stages that suit this patch and spacing, unless it has some. Round the patch up to `divisor`
    afterwards."""
    if config.strides:
        return config
    if config.faithful:  # three halvings of each axis, whatever the spacing
        strides = ((1, 1, 1), *[but_thin((2, 2, 2), patch)] * LEAST)
        kernels: tuple[Triple, ...] = ((3, 3, 3),) * len(strides)
    else:
        strides, kernels = stages_for("mpu_net", patch, spacing)
        stages = min(LEAST + 1, len(strides))
        while stages < len(strides) and _places(patch, strides[:stages]) > config.tokens:
            stages += 1
        strides, kernels = strides[:stages], kernels[:stages]
    kernels = tuple(but_thin(kernel, patch) for kernel in kernels)
    return replace(config, dims=dims_of(patch), strides=strides, kernels=kernels)


def divisor(config: Config) -> tuple[int, int, int]:
    """What each axis of a patch must be a multiple of."""
    return total_stride(config.strides)


def build(config: Config, *, channels: int, classes: int) -> nn.Module:
    """A new network with fresh weights."""
    if not config.strides:
        raise ValueError("mpu_net was given no stages; it needs the config that `fit` makes for a patch. Call it.")
    network = MPUNet(config, channels, classes)
    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            nn.init.kaiming_normal_(module.weight, a=0.25)  # the slope with which PReLU starts
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, PositionAttention) and not config.faithful:
            nn.init.constant_(module.gamma, 0.1)
    return network.to(memory_format=torch.channels_last_3d)


def explained(network: nn.Module) -> dict[str, nn.Module]:
    """What may be explained, nearest to the answer first: the gated features of each resolution, the bottleneck, then what
    comes down to each stage."""
    gates = [name for name, module in network.named_modules() if isinstance(module, Gate)]
    downs = [name for name, module in network.named_modules() if isinstance(module, Down)]
    return {name: network.get_submodule(name) for name in [*reversed(gates), "attention", *reversed(downs)]}


class MPUNet(nn.Module):
    def __init__(self, config: Config, channels: int, classes: int) -> None:
        super().__init__()
        stages = len(config.strides)
        widths = [min(config.filters * 2**stage, config.widest) for stage in range(stages + KEPT)]
        kernels = [*config.kernels, *[config.kernels[-1]] * KEPT]
        self.dims, self.divisor, self.faithful = config.dims, divisor(config), config.faithful
        self.forget = nn.Dropout(config.forgotten)
        self.down, self.encoder = nn.ModuleList(), nn.ModuleList()
        for stage in range(stages + KEPT):
            if stage:
                stride = config.strides[stage] if stage < stages else (1, 1, 1)
                self.down.append(Down(widths[stage - 1], widths[stage], kernels[stage], stride, config.faithful))
            if stage <= stages:  # the deepest has nothing but attention
                self.encoder.append(_convolutions(widths[stage] if stage else channels, widths[stage], kernels[stage]))
        self.attention = nn.Sequential(
            _normed(widths[-1], widths[-2], kernels[-1], config.faithful),
            PositionAttention(widths[-2], key_bias=config.faithful),
            _normed(widths[-2], widths[-2], kernels[-1], config.faithful),
        )
        self.up, self.decoder, self.gates, self.heads = (nn.ModuleList() for _ in range(4))
        for stage in reversed(range(stages)):
            width, skip, deepest = widths[stage + 1], widths[stage], stage == stages - 1
            if not deepest:
                stride = config.strides[stage + 1]
                self.up.append(
                    nn.Sequential(nn.ConvTranspose3d(widths[stage + 2], width, stride, stride), Slopes(width))
                )
            self.decoder.append(_convolutions(skip if deepest else width + skip, width, kernels[stage], 3))
            self.gates.append(Gate(width, config.faithful))
            self.heads.append(nn.Conv3d(width, classes, 1))

    def forward(self, x: Float[Tensor, "B C D H W"]) -> list[Tensor] | Answer | Float[Tensor, "B K D H W"]:
        """In training, the mean of all resolutions, then each coarser one; else the mean alone."""
        refuse_unless_multiple(x.shape, self.divisor)
        if self.dims == 2:
            as_plane(x)  # refuses a volume
        x = x.contiguous(memory_format=torch.channels_last_3d)
        skips = self._encode(x)
        deepest, *coarse, finest = self._decode(skips)  # of each resolution [B, K, D / stride, ...], coarsest first
        answers = [resize(logits, x.shape[2:]) for logits in (deepest, *coarse, finest)]
        if self.faithful:
            mean = _log_of_mean_probability(answers)  # whose softmax is the published answer
            if not self.training:
                return mean
            logits = [mean, *answers[-2::-1]]
            return Answer(logits=logits, weights=ANSWER_WEIGHTS[: len(logits)])
        total = sum(answers[1:], answers[0]) / len(answers)
        return [total, *coarse[::-1], deepest] if self.training else total

    def _encode(self, x: Tensor) -> list[Tensor]:
        """What each resolution has to say on the way down, and last what attention made of the bottleneck."""
        # the authors have one channel, which is added to all; of several, their mean
        x = self.encoder[0](x) + x.mean(1, keepdim=True)  # [B, C0, D, H, W]
        skips = [x]
        for down, encoder in zip(self.down, self.encoder[1:], strict=False):
            x = down(x)
            x = self.forget(encoder(x) + x)  # [B, Cs, D / stride, H / stride, W / stride]
            skips.append(x)
        # the first of the stages that keep their resolution leads on, but is no skip
        return [*skips[:-1], self.attention(self.down[-1](x))]

    def _decode(self, skips: list[Tensor]) -> list[Tensor]:
        *skips, x = skips  # x: [B, C, ...], as many places as the last skip
        answers = []
        for i, (decoder, gate, head) in enumerate(zip(self.decoder, self.gates, self.heads, strict=True)):
            skip = skips[-1 - i]
            if i:
                x = self.up[i - 1](x)
                skip = torch.cat([x, skip], dim=1)
            x = gate(decoder(skip) + x, x)  # [B, Cs+1, D / stride, ...]
            if i < len(skips) - 1:
                x = self.forget(x)
            answers.append(head(x))
        return answers


class Down(nn.Module):
    """The largest of each neighbourhood, then a convolution as large as its stride, or one that keeps the resolution."""

    def __init__(self, inputs: int, outputs: int, kernel: Triple, stride: Triple, faithful: bool) -> None:
        super().__init__()
        halves = math.prod(stride) > 1
        self.pool = nn.MaxPool3d(kernel, 1, _half(kernel))
        self.convolution = nn.Conv3d(
            inputs, outputs, stride if halves else kernel, stride, 0 if halves else _half(kernel), bias=faithful
        )
        self.norm = nn.BatchNorm3d(outputs) if faithful else InstanceNorm(outputs)
        # the authors' nn.ELU(out_channel) made the number of channels its alpha
        self.activation = nn.ELU(float(outputs) if faithful else 1.0)

    def forward(self, x: Float[Tensor, "B C D H W"]) -> Float[Tensor, "B C2 D2 H2 W2"]:
        return self.activation(self.norm(self.convolution(self.pool(x))))


class Slopes(nn.PReLU):
    """A learned slope for negative numbers, per channel, in the precision of what it is given."""

    def forward(self, x: Float[Tensor, "B C *space"]) -> Float[Tensor, "B C *space"]:
        return functional.prelu(x, self.weight.to(x.dtype))


class Gate(attentive.Attentive):
    """Lets pass of x what agrees with g: an additive attention gate (Oktay et al. 2018). Shows how far it is open."""

    def __init__(self, channels: int, faithful: bool) -> None:
        super().__init__()
        inner = max(1, channels // 2)
        norm = nn.BatchNorm3d if faithful else InstanceNorm
        self.of_x = nn.Sequential(nn.Conv3d(channels, inner, 1, bias=faithful), norm(inner))
        self.of_g = nn.Sequential(nn.Conv3d(channels, inner, 1, bias=faithful), norm(inner))
        self.opening = nn.Sequential(nn.Conv3d(inner, 1, 1))
        if faithful:
            self.opening.append(nn.BatchNorm3d(1))

    def forward(self, x: Float[Tensor, "B C D H W"], g: Float[Tensor, "B C d h w"]) -> Float[Tensor, "B C D H W"]:
        seen = functional.relu(self.of_x(x) + resize(self.of_g(g), x.shape[2:]))
        opening = torch.sigmoid(self.opening(seen))  # [B, 1, D, H, W]
        self.show(lambda: opening[:, 0])
        return opening * x


def _convolutions(inputs: int, outputs: int, kernel: Triple, count: int = 2) -> nn.Sequential:
    """Convolutions with a bias and no norm, each with a slope of its own per channel."""
    layers: list[nn.Module] = []
    for i in range(count):
        layers += [nn.Conv3d(outputs if i else inputs, outputs, kernel, 1, _half(kernel)), Slopes(outputs)]
    return nn.Sequential(*layers)


def _normed(inputs: int, outputs: int, kernel: Triple, faithful: bool) -> nn.Sequential:
    norm = nn.BatchNorm3d(outputs) if faithful else InstanceNorm(outputs)
    # a bias before a norm is of no use: it is taken away again
    return nn.Sequential(nn.Conv3d(inputs, outputs, kernel, 1, _half(kernel), bias=faithful), norm, Slopes(1))


def _log_of_mean_probability(answers: list[Tensor]) -> Tensor:
    logarithms = torch.stack([functional.log_softmax(logits, dim=1) for logits in answers])
    return torch.logsumexp(logarithms, dim=0) - math.log(len(answers))


def _half(kernel: Triple) -> Triple:
    d, h, w = kernel
    return d // 2, h // 2, w // 2


def _places(patch: Triple, strides: tuple[Triple, ...]) -> int:
    return math.prod(math.ceil(n / d) for n, d in zip(patch, total_stride(strides), strict=True))
