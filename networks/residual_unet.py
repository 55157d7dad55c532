"""A U-Net with a residual encoder: our default, and the shape nnU-Net's ResEnc presets have."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .parts.blocks import (
    ResidualBlock,
    Triple,
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
    strides: tuple[tuple[int, int, int], ...] = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))
    """How much each stage shrinks each axis, finest first. `fit` chooses them; the first is always (1, 1, 1)."""
    kernels: tuple[tuple[int, int, int], ...] = ((3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))
    """Size of the convolutions of each stage. `fit` chooses them."""

    def __post_init__(self) -> None:
        if len(self.strides) != len(self.kernels) or len(self.strides) < 2 or tuple(self.strides[0]) != (1, 1, 1):
            raise ValueError(
                f"residual_unet was given strides {self.strides} and kernels {self.kernels}; it needs one of each per "
                "stage, two stages or more, and a first stride of (1, 1, 1). Leave both out to have them chosen."
            )
        if not self.blocks or min(self.blocks) < 1 or self.width < 1:
            raise ValueError(
                f"residual_unet was given width {self.width} and blocks {self.blocks}; all must be 1 or more."
            )


def fit(config: Config, *, patch: tuple[int, int, int], spacing: tuple[float, float, float]) -> Config:
    """The config with the stages that suit this patch and spacing. Round the patch up to `divisor` afterwards."""
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
    return initialise(ResidualUNet(config, channels, classes))


class ResidualUNet(nn.Module):
    def __init__(self, config: Config, channels: int, classes: int) -> None:
        super().__init__()
        stages = range(len(config.strides))
        widths = [min(config.width * 2**stage, config.widest) for stage in stages]
        self.divisor = divisor(config)
        self.stem = convolution(channels, widths[0], config.kernels[0])
        self.down = nn.ModuleList(
            _stage(widths[max(0, stage - 1)], widths[stage], config.kernels[stage], config.strides[stage],
                   config.blocks[min(stage, len(config.blocks) - 1)])
            for stage in stages
        )  # fmt: skip
        self.up, self.merge, self.heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for stage in reversed(stages[:-1]):
            stride = config.strides[stage + 1]
            self.up.append(nn.ConvTranspose3d(widths[stage + 1], widths[stage], stride, stride))
            self.merge.append(convolution(2 * widths[stage], widths[stage], config.kernels[stage]))
            self.heads.append(nn.Conv3d(widths[stage], classes, 1))

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


def _stage(inputs: int, outputs: int, kernel: Triple, stride: Triple, blocks: int) -> nn.Sequential:
    rest = [ResidualBlock(outputs, outputs, kernel) for _ in range(blocks - 1)]
    return nn.Sequential(ResidualBlock(inputs, outputs, kernel, stride), *rest)
