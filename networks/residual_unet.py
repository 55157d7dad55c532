"""A U-Net with a residual encoder: our default, and what nnU-Net's presets have, its plain one among them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .parts.attention import available, load
from .parts.attention._layers import Gate
from .parts.attention.additive_gate import AdditiveGate
from .parts.attentive import Attentive
from .parts.attentive import attention_maps as attention_maps
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

DEAR = {
    "axial": (32**3, "its memory grows with the places of a line times those of the map"),
    "bi_level_routing": (32**3, "its time grows with the square of the places"),
    "deformable": (64**3, "it looks at 27 places for each, whose positions alone are 81 numbers"),
    "max_vit": (64**3, "its gradient needs the memory of seventy maps"),
    "position": (32**3, "its time grows with the square of the places"),
}
"""At most how many places a map may have for a block to be bearable, and why. All others grow with the places alone, and
not fast: they may stand anywhere."""


PAPER = "Isensee et al., Nature Methods 2021 and MICCAI 2024 (nnU-Net, plain and residual)"
GOOD_FOR = "anything: the one to beat"


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
    attention: tuple[str, ...] = ()
    """Block of networks/parts/attention for each stage, finest first, as in ["", "cbam", "additive_gate", "efficient"]; ""
    is none, and so is what is left out. Gates sit on the skip that leaves the stage, all others at the stage's end."""

    def __post_init__(self) -> None:
        refuse_unlike_stages("residual_unet", self.strides, self.kernels)
        if not self.blocks or min(*self.blocks, self.width, self.widest, self.decoder) < 1:
            raise ValueError(
                f"residual_unet was given width {self.width}, widest {self.widest}, blocks {self.blocks} and decoder "
                f"{self.decoder}; all must be 1 or more."
            )
        if unknown := set(self.attention) - {"", *available()}:
            raise ValueError(
                f"residual_unet was given attention {sorted(unknown)}; there are {', '.join(available())}. Choose of these, "
                'or "" for a stage without.'
            )
        if self.strides and len(self.attention) > len(self.strides):
            raise ValueError(
                f"residual_unet was given attention for {len(self.attention)} stages and has {len(self.strides)}, finest "
                "first; it needs one for each at most. Leave some out, or choose a larger patch."
            )


def fit(config: Config, *, patch: tuple[int, int, int], spacing: tuple[float, float, float]) -> Config:
    """The config with the stages that suit this patch and spacing, unless it has some. Round the patch up to `divisor`
    afterwards."""
    if config.strides:
        _refuse_the_unbearable(config, patch)
        return config
    strides, kernels = stages_for("residual_unet", patch, spacing)
    config = replace(config, strides=strides, kernels=kernels)
    _refuse_the_unbearable(config, patch)
    return config


def _refuse_the_unbearable(config: Config, patch: Triple) -> None:
    """Better now than after an hour of the first epoch."""
    whole = [math.ceil(n / step) * step for n, step in zip(patch, divisor(config), strict=True)]
    steps = [math.prod(total_stride(config.strides[: stage + 1])) for stage in range(len(config.strides))]
    places = [math.prod(whole) // step for step in steps]
    for stage, name in enumerate(config.attention):
        most, reason = DEAR.get(name, (places[stage], ""))
        if places[stage] > most:
            stages = [str(deeper) for deeper in range(len(places)) if places[deeper] <= most]
            advice = f"Put it at stage {' or '.join(stages)}, or choose" if stages else "Choose"
            raise ValueError(
                f"residual_unet was given {name} at stage {stage}, where a patch of {patch} has {places[stage]} places; "
                f"it bears {most}, for {reason}. {advice} 'efficient', which may stand anywhere."
            )


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


def explained(network: "ResidualUNet") -> dict[str, nn.Module]:
    """What may be explained, nearest to the answer first: what each step up has made, then each stage of the encoder from
    the bottleneck on."""
    merges = {f"merge.{i}": network.merge[i] for i in reversed(range(len(network.merge)))}
    return merges | {f"down.{i}": network.down[i] for i in reversed(range(len(network.down)))}


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
        # without attention nothing is here that has weights: packages made before there was any still load
        self.attend, self.gates = (nn.ModuleList(nn.Identity() for _ in stages) for _ in range(2))
        for stage, name in enumerate(config.attention):
            if name:
                make: Callable[..., Attentive] = load(name)
                block = make(widths[stage])
                is_on_skip = isinstance(block, Gate) and stage < stages[-1]
                (self.gates if is_on_skip else self.attend)[stage] = block
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
        for stage, attend in zip(self.down, self.attend, strict=True):
            x = attend(stage(x))  # [B, Cs, D / stride, H / stride, W / stride]
            skips.append(x)
        logits = []
        across = zip(reversed(skips[:-1]), reversed(self.gates[:-1]), strict=True)
        for up, merge, head, (skip, gate) in zip(self.up, self.merge, self.heads, across, strict=True):
            x = up(x)  # [B, Cs, ...]
            skip = gate(skip, x) if isinstance(gate, AdditiveGate) else gate(skip)
            x = merge(torch.cat([x, skip], dim=1))  # [B, 2Cs, ...] -> [B, Cs, ...]
            if self.training or head is self.heads[-1]:
                logits.append(head(x))  # [B, classes, ...]
        return logits[::-1] if self.training else logits[-1]


def _stage(config: Config, stage: int, inputs: int, outputs: int) -> nn.Sequential:
    kernel, stride = config.kernels[stage], config.strides[stage]
    blocks = config.blocks[min(stage, len(config.blocks) - 1)]
    block = convolution if config.plain else ResidualBlock
    rest = [block(outputs, outputs, kernel, bias=config.bias) for _ in range(blocks - 1)]
    return nn.Sequential(block(inputs, outputs, kernel, stride, config.bias), *rest)
