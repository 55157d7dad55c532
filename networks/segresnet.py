"""MONAI's SegResNet with deep supervision, behind our Config: a residual U-Net that adds its skips."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .parts.blocks import InstanceNorm, Triple, refuse_unless_multiple, total_stride

PAPER = "Myronenko, BrainLes 2018 (MONAI's SegResNetDS)"
GOOD_FOR = "anything; little memory for its width"


@dataclass(frozen=True, kw_only=True)
class Config:
    width: int = 16
    """Channels at full resolution; each stage below has twice as many."""
    blocks: tuple[int, ...] = (1, 2, 2, 4)
    """Residual blocks per stage on the way down, finest first. `fit` drops stages that a small patch cannot feed."""
    supervised: int = 4
    """How many resolutions answer during training, at most."""
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Millimetres per voxel: MONAI leaves coarse axes alone until the others have become as coarse. `fit` sets it."""

    def __post_init__(self) -> None:
        if len(self.blocks) < 2 or min(self.blocks) < 1 or self.width < 1 or self.supervised < 1:
            raise ValueError(
                f"segresnet was given width {self.width}, blocks {self.blocks}, supervised {self.supervised}; it needs "
                "two stages or more, and all numbers 1 or more."
            )


def fit(config: Config, *, patch: tuple[int, int, int], spacing: tuple[float, float, float]) -> Config:
    """The config for this spacing, with as many stages as leave 4 voxels of each axis that is halved."""
    config = replace(config, spacing=spacing)
    while len(config.blocks) > 2 and any(
        d > 1 and math.ceil(n / d) < 4 for n, d in zip(patch, divisor(config), strict=True)
    ):
        config = replace(config, blocks=config.blocks[:-1])
    return config


def divisor(config: Config) -> tuple[int, int, int]:
    """What each axis of a patch must be a multiple of."""
    return total_stride(_strides(config))


def build(config: Config, *, channels: int, classes: int) -> nn.Module:
    """A new network with fresh weights."""
    network = SegResNet(config, channels, classes)
    _take_our_norm(network)
    return network.to(memory_format=torch.channels_last_3d)


def explained(network: "SegResNet") -> dict[str, nn.Module]:
    """What may be explained, nearest to the answer first: what each step up has made, then each stage of the encoder from
    the bottleneck on."""
    ups, downs = list(network.network.up_layers), list(network.network.encoder.layers)
    named = {f"up_layers.{number}": up["blocks"] for number, up in reversed(list(enumerate(ups)))}
    return named | {f"layers.{number}": down["blocks"] for number, down in reversed(list(enumerate(downs)))}


class SegResNet(nn.Module):
    def __init__(self, config: Config, channels: int, classes: int) -> None:
        from monai.networks.nets.segresnet_ds import SegResNetDS  # MONAI takes seconds to import

        super().__init__()
        self.divisor = divisor(config)
        self.network = SegResNetDS(
            spatial_dims=3,
            init_filters=config.width,
            in_channels=channels,
            out_channels=classes,
            norm="instance",
            blocks_down=config.blocks,
            dsdepth=min(config.supervised, len(config.blocks) - 1),
            resolution=config.spacing,
        )

    def forward(self, x: Float[Tensor, "B C D H W"]) -> list[Tensor] | Float[Tensor, "B K D H W"]:
        """In training, logits of every supervised resolution, finest first; else the finest alone."""
        refuse_unless_multiple(x.shape, self.divisor)
        logits = self.network(x.contiguous(memory_format=torch.channels_last_3d))
        return [logits] if self.training and isinstance(logits, torch.Tensor) else logits


def _take_our_norm(module: nn.Module) -> None:
    """The same numbers and the same names of weights; ours keeps channels last and bears a bottleneck of one voxel."""
    for name, child in module.named_children():
        if isinstance(child, nn.InstanceNorm3d):
            setattr(module, name, InstanceNorm(child.num_features, child.eps))
        else:
            _take_our_norm(child)


def _strides(config: Config) -> tuple[Triple, ...]:
    """What MONAI's scales_for_resolution says: a coarse axis waits until the others have become as coarse."""
    coarsest = max(config.spacing)
    d, h, w = (math.floor(math.log2(coarsest / step)) for step in config.spacing)
    latest = max(d, h, w)
    return tuple(
        tuple(1 if stage < latest and 2**stage >= 2**ahead else 2 for ahead in (d, h, w))  # type: ignore[misc]
        for stage in range(len(config.blocks) - 1)
    )
