"""A U-Net with a residual encoder: our default, and what nnU-Net's presets have, its plain one among them."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .parts.blocks import (
    ResidualBlock,
    convolution,
    initialise,
    refuse_unless_multiple,
    topology,
    total_stride,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    width: int = 16
    """Channels at full resolution; each stage below has twice as many. 16 suits two CPU cores, 32 a GPU."""
    widest: int = 320
    """No stage has more channels than this."""
    blocks: tuple[int, ...] = (1, 2, 2, 2)
    """Residual blocks per stage, finest first; the last number serves all deeper stages."""
    plain: bool = False
    """Convolutions without shortcuts instead, `blocks` of them per stage and no stem: nnU-Net's first network."""
    decoder: int = 1
    """Convolutions per stage on the way up."""
    bias: bool = False
    """Convolutions add a constant, as nnU-Net's do, though the norm behind each takes it away again."""
    strides: tuple[tuple[int, int, int], ...] = ()
    """How much each stage shrinks each axis, finest first; the first is always (1, 1, 1). Empty: `fit` chooses them."""
    kernels: tuple[tuple[int, int, int], ...] = ()
    """Size of the convolutions of each stage. Empty: `fit` chooses them."""

    def __post_init__(self) -> None:
        unlike = len(self.strides) != len(self.kernels) or len(self.strides) == 1
        if unlike or (self.strides and tuple(self.strides[0]) != (1, 1, 1)):
            raise ValueError(
                f"residual_unet was given strides {self.strides} and kernels {self.kernels}; it needs one of each per "
                "stage, two stages or more, and a first stride of (1, 1, 1). Leave both out to have them chosen."
            )
        if not self.blocks or min(*self.blocks, self.width, self.widest, self.decoder) < 1:
            raise ValueError(
                f"residual_unet was given width {self.width}, widest {self.widest}, blocks {self.blocks} and decoder "
                f"{self.decoder}; all must be 1 or more."
            )


def fit(config: Config, *, patch: tuple[int, int, int], spacing: tuple[float, float, float]) -> Config:
    """The config with the stages that suit this patch and spacing, unless it has some. Round the patch up to `divisor`
    afterwards."""
    if config.strides:
        return config
    strides, kernels = topology(patch, spacing)
    if len(strides) < 2:
        raise ValueError(
            f"A patch of {patch} voxels was given; residual_unet halves it at least once, for which one axis must have "
            "12 voxels, or two axes 8. Choose a larger patch, or pad small scans."
        )
    return replace(config, strides=strides, kernels=kernels)


def divisor(config: Config) -> tuple[int, int, int]:
    """What each axis of a patch must be a multiple of."""
    return total_stride(config.strides)


def build(config: Config, *, channels: int, classes: int) -> nn.Module:
    """A new network with fresh weights."""
    if not config.strides:
        raise ValueError(
            "residual_unet was given no stages; it needs the config that `fit` makes for a patch. Call it."
        )
    return initialise(ResidualUNet(config, channels, classes))


class ResidualUNet(nn.Module):
    def __init__(self, config: Config, channels: int, classes: int) -> None:
        super().__init__()
        stages = range(len(config.strides))
        widths = [min(config.width * 2**stage, config.widest) for stage in stages]
        self.divisor = divisor(config)
        self.stem = (
            nn.Identity() if config.plain else convolution(channels, widths[0], config.kernels[0], bias=config.bias)
        )
        first = channels if config.plain else widths[0]
        self.down = nn.ModuleList(
            _stage(config, stage, widths[stage - 1] if stage else first, widths[stage]) for stage in stages
        )
        self.up, self.merge, self.heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for stage in reversed(stages[:-1]):
            stride, kernel, width = config.strides[stage + 1], config.kernels[stage], widths[stage]
            self.up.append(nn.ConvTranspose3d(widths[stage + 1], width, stride, stride))
            first_merge = convolution(2 * width, width, kernel, bias=config.bias)
            rest = [convolution(width, width, kernel, bias=config.bias) for _ in range(config.decoder - 1)]
            self.merge.append(nn.Sequential(first_merge, *rest) if rest else first_merge)
            self.heads.append(nn.Conv3d(width, classes, 1))

    def forward(self, x: Float[Tensor, "B C D H W"]) -> list[Tensor] | Float[Tensor, "B K D H W"]:
        """In training, logits of every resolution, finest first; else the finest alone."""
        refuse_unless_multiple(x.shape, self.divisor)
        # On a CPU this order and a group norm of single channels train 1.3 times as fast as torch's default order with
        # InstanceNorm3d: oneDNN need not repack every tensor before and after every convolution.
        x = self.stem(x.contiguous(memory_format=torch.channels_last_3d))  # [B, C0, D, H, W]
        skips = []
        for stage in self.down:
            x = stage(x)  # [B, Cs, D / stride, H / stride, W / stride]
            skips.append(x)
        logits = []
        for up, merge, head, skip in zip(self.up, self.merge, self.heads, reversed(skips[:-1]), strict=True):
            x = merge(torch.cat([up(x), skip], dim=1))  # [B, 2Cs, ...] -> [B, Cs, ...]
            if self.training or head is self.heads[-1]:
                logits.append(head(x))  # [B, classes, ...]
        return logits[::-1] if self.training else logits[-1]


def _stage(config: Config, stage: int, inputs: int, outputs: int) -> nn.Sequential:
    kernel, stride = config.kernels[stage], config.strides[stage]
    blocks = config.blocks[min(stage, len(config.blocks) - 1)]
    block = convolution if config.plain else ResidualBlock
    rest = [block(outputs, outputs, kernel, bias=config.bias) for _ in range(blocks - 1)]
    return nn.Sequential(block(inputs, outputs, kernel, stride, config.bias), *rest)
