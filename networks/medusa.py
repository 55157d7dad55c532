"""A residual U-Net whose encoder is gated at every scale by one map of the whole image, which a small U-Net makes first.

After Aboutalebi et al., "MEDUSA: Multi-scale Encoder-Decoder Self-Attention" (Frontiers in Medicine 2022, arXiv 2110.06063):
one body looks at the whole image once, and a head for each scale fits its map to that scale,

    F'_l = F_l · sigmoid(head_l(body(x) on the grid of F_l)),    F'_l being what the next stage sees.

Good where it matters first of all in which part of the image to look. Theirs classifies radiographs; nobody has published
its code, so there is no `faithful`. Where this departs from the paper, and why:

- The backbone segments: it is our residual encoder with a decoder, whose skips are gated too. Planes and volumes.
- The body sees the same tensor as the backbone, at half the resolution: one augmentation for both (in their code for
  data the body saw the image as it was before), and an eighth of the memory in a volume.
- They train the body to segment lungs first, for else nothing makes its map mean anything. Here the map has a channel for
  each class and is asked for the labels, as the answer at half the resolution: one training does both. `guided: false` is
  one channel that nobody guides.
- A map is averaged onto coarser grids: interpolation would read 8 of its voxels and pass over the others.
- The last weights of a head begin small, not zero: zero keeps every gradient of the first step from what lies before.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from .parts import attentive
from .parts.attention._layers import OPEN, gated
from .parts.blocks import (
    ResidualBlock,
    Triple,
    convolution,
    initialise,
    refuse_unless_multiple,
    refuse_unlike_stages,
    stages_for,
    total_stride,
)
from .parts.dims import resize

attention_maps = attentive.attention_maps
"""The map of the whole image as `body`, a channel for each class, and the gate of every scale, all between 0 and 1."""


PAPER = "Aboutalebi et al., Frontiers in Medicine 2022, arXiv 2110.06063 (MEDUSA)"
GOOD_FOR = "where in the image to look matters first"


@dataclass(frozen=True, kw_only=True)
class Config:
    width: int = 16
    """Channels at full resolution; each stage below has twice as many. 16 suits two CPU cores, 32 a GPU."""
    widest: int = 320
    """No stage has more channels than this."""
    blocks: tuple[int, ...] = (1, 2, 2, 2)
    """Residual blocks per stage, finest first; the last number serves all deeper stages."""
    body: int = 16
    """Channels of the body at its finest, half the resolution; it has one residual block a stage."""
    head: int = 8
    """Channels between the two convolutions of a head."""
    each: bool = False
    """Every channel of a stage has a gate of its own, instead of one for all."""
    guided: bool = True
    """The map has a channel for each class and is trained on the labels; else one channel, that learns through gates."""
    strides: tuple[tuple[int, int, int], ...] = ()
    """How much each stage shrinks each axis, finest first; the first is always (1, 1, 1). Empty: `fit` chooses them."""
    kernels: tuple[tuple[int, int, int], ...] = ()
    """Size of the convolutions of each stage. Empty: `fit` chooses them."""

    def __post_init__(self) -> None:
        refuse_unlike_stages("medusa", self.strides, self.kernels)
        if not self.blocks or min(*self.blocks, self.width, self.widest, self.body, self.head) < 1:
            raise ValueError(
                f"medusa was given width {self.width}, widest {self.widest}, blocks {self.blocks}, body {self.body} and "
                f"head {self.head}; all must be 1 or more. Correct the wrong one."
            )


def fit(config: Config, *, patch: tuple[int, int, int], spacing: tuple[float, float, float]) -> Config:
    """The config with the stages that suit this patch and spacing, unless it has some. Along the thin axis of a patch one
    voxel thick nothing is done."""
    if config.strides:
        return config
    thin = [n == 1 for n in patch]
    # the thickness of a plane is no reason to leave its own axes alone
    d, h, w = (max(spacing) if flat else step for flat, step in zip(thin, spacing, strict=True))
    strides, kernels = stages_for("medusa", patch, (d, h, w))
    flat_kernels = tuple(tuple(1 if flat else k for flat, k in zip(thin, kernel, strict=True)) for kernel in kernels)
    return replace(config, strides=strides, kernels=flat_kernels)  # type: ignore[arg-type]


def divisor(config: Config) -> tuple[int, int, int]:
    """What each axis of a patch must be a multiple of."""
    return total_stride(_stages(config)[0])


def build(config: Config, *, channels: int, classes: int) -> nn.Module:
    """A new network with fresh weights, its gates nearly open: it begins much as the backbone alone."""
    network = Medusa(config, channels, classes)
    initialise(network)
    for head in network.heads:
        nn.init.normal_(head.get_parameter("gate.weight"), std=0.01)
        nn.init.constant_(head.get_parameter("gate.bias"), OPEN)
    return network


def explained(network: nn.Module) -> dict[str, nn.Module]:
    """Its layers that show best what it sees, the last before the logits first."""
    levels = len(list(network.get_submodule("backbone.merge").children()))
    stages = [f"backbone.down.{stage}" for stage in reversed(range(levels + 1))]
    names = [*(f"backbone.merge.{level}" for level in range(levels)), *stages, "body.answer"]
    return {name: network.get_submodule(name) for name in names}


class Medusa(nn.Module):
    def __init__(self, config: Config, channels: int, classes: int) -> None:
        super().__init__()
        strides, kernels = _stages(config)
        self.divisor = divisor(config)
        self.guided = config.guided
        maps = classes if config.guided else 1
        self.body = Body(config, channels, maps)
        self.backbone = UNet(channels, config.width, config.widest, config.blocks, strides, kernels)
        widths = self.backbone.widths
        self.heads = nn.ModuleList(
            Head(maps, config.head, width if config.each else 1, kernel)
            for width, kernel in zip(widths, kernels, strict=True)
        )
        # at half the resolution the guided body answers in the backbone's stead
        self.levels = [level for level in range(len(widths) - 1) if level != 1 or not config.guided]
        self.answers = nn.ModuleList(nn.Conv3d(widths[level], classes, 1) for level in self.levels)

    def forward(self, x: Float[Tensor, "B C D H W"]) -> list[Tensor] | Float[Tensor, "B K D H W"]:
        """In training, logits of every resolution, finest first; else the finest alone."""
        refuse_unless_multiple(x.shape, self.divisor)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        seen = self.body(x)  # [B, maps, D / 2, H / 2, W / 2]
        features = self.backbone(x, seen, self.heads)
        if not self.training:
            return self.answers[0](features[0])
        logits = [answer(features[level]) for level, answer in zip(self.levels, self.answers, strict=True)]
        return [logits[0], seen, *logits[1:]] if self.guided else logits


class Body(attentive.Attentive):
    """One look at the whole image, at the resolution of the second stage."""

    def __init__(self, config: Config, channels: int, maps: int) -> None:
        super().__init__()
        (_, self.shrunk, *strides), (_, *kernels) = _stages(config)
        self.unet = UNet(channels, config.body, config.widest, (1,), ((1, 1, 1), *strides), tuple(kernels))
        self.answer = nn.Conv3d(config.body, maps, 1)

    def forward(self, x: Float[Tensor, "B C D H W"]) -> Float[Tensor, "B maps D2 H2 W2"]:
        seen = self.answer(self.unet(functional.avg_pool3d(x, self.shrunk, self.shrunk))[0])
        self.show(seen.sigmoid)
        return seen


class Head(attentive.Attentive):
    """Fits the map to one scale, and shows the gate it makes of it: [B, 1 or C, *space]."""

    def __init__(self, maps: int, width: int, outputs: int, kernel: Triple) -> None:
        super().__init__()
        self.adapt = convolution(maps, width, kernel)
        self.gate = nn.Conv3d(width, outputs, 1)

    def forward(
        self, seen: Float[Tensor, "B maps D2 H2 W2"], x: Float[Tensor, "B C D H W"]
    ) -> Float[Tensor, "B C D H W"]:
        gate = self.gate(self.adapt(_on_grid(seen, x.shape[2:]))).sigmoid()
        self.show(lambda: gate)
        return gated(x, gate)


class UNet(nn.Module):
    """A residual encoder and one convolution a stage on the way up. Gives what it merged, finest first."""

    def __init__(
        self, channels: int, width: int, widest: int, blocks: tuple[int, ...],
        strides: tuple[Triple, ...], kernels: tuple[Triple, ...],
    ) -> None:  # fmt: skip
        super().__init__()
        stages = range(len(strides))
        self.widths = [min(width * 2**stage, widest) for stage in stages]
        self.stem = convolution(channels, self.widths[0], kernels[0])
        self.down, self.up, self.merge = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for stage in stages:
            inputs, outputs, kernel = self.widths[max(stage - 1, 0)], self.widths[stage], kernels[stage]
            rest = [ResidualBlock(outputs, outputs, kernel) for _ in range(blocks[min(stage, len(blocks) - 1)] - 1)]
            self.down.append(nn.Sequential(ResidualBlock(inputs, outputs, kernel, strides[stage]), *rest))
            if stage:
                self.up.append(nn.ConvTranspose3d(outputs, inputs, strides[stage], strides[stage]))
                self.merge.append(convolution(2 * inputs, inputs, kernels[stage - 1]))

    def forward(
        self, x: Float[Tensor, "B C D H W"], seen: Float[Tensor, "B maps D2 H2 W2"] | None = None,
        heads: nn.ModuleList | None = None,
    ) -> list[Tensor]:  # fmt: skip
        x = self.stem(x)  # [B, C0, D, H, W]
        skips = []
        for number, stage in enumerate(self.down):
            x = stage(x)  # [B, Cs, D / stride, H / stride, W / stride]
            x = x if heads is None else heads[number](seen, x)
            skips.append(x)
        merged = [x]
        for up, merge, skip in zip(self.up[::-1], self.merge[::-1], skips[-2::-1], strict=True):
            merged.insert(0, merge(torch.cat([up(merged[0]), skip], dim=1)))  # [B, 2Cs, ...] -> [B, Cs, ...]
        return merged


def _on_grid(seen: Float[Tensor, "B maps D2 H2 W2"], size: torch.Size) -> Float[Tensor, "B maps D H W"]:
    """Averaged where the grid is coarser, interpolated where it is finer."""
    ratio = [max(1, fine // coarse) for fine, coarse in zip(seen.shape[2:], size, strict=True)]
    return resize(functional.avg_pool3d(seen, ratio, ratio) if max(ratio) > 1 else seen, size)


def _stages(config: Config) -> tuple[tuple[Triple, ...], tuple[Triple, ...]]:
    """Strides and kernels; three halvings where nobody chose any."""
    if config.strides:
        return config.strides, config.kernels
    return ((1, 1, 1), *[(2, 2, 2)] * 3), ((3, 3, 3),) * 4
