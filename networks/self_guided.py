"""An encoder whose maps of every scale look twice at themselves, guided by an auto-encoder that must remember them.

Sinha and Dolz, "Multi-scale self-guided attention for medical image segmentation" (IEEE JBHI 2020, arXiv 1906.02849).
Good for several organs of unlike size that lie close together. All scales meet on one grid and are fused there; each is
paired with the fused map, places and channels of the pair attend to each other (DANet), and what a small auto-encoder
makes of the pair gates the attention. That happens twice; the two latents should agree, and each auto-encoder should
give back what it was given: the network's own losses.

Where the default departs from the authors' code (`faithful=True` has it as it was, of planes):

- Instance norm and leaky ReLU, in one pass, instead of batch norm and PReLU: batches are of one or two patches. With it
  convolutions lose their biases, which the norm takes away again.
- Our own encoder instead of a ResNeXt-101 of 87 million weights; that and two others are `backbone`s.
- The scales meet at the finest stage that has a bearable number of places, not always at a quarter of the resolution.
- Position attention looks at that grid halved until `tokens` are left: time grows with their square. It is computed
  without its map, so memory grows with the tokens.
- Similarity of channels is a mean over places, not their sum: the sum is in the thousands, one channel alone is chosen,
  and which one it is hangs on a rounding. The least similar still counts most (`sign`), as in the published results.
- Queries and keys keep eight channels, the published eighth of 64, however narrow the maps.
- Keys have no bias, which softmax takes away again.
- gamma starts at 0.1, not at 0, where queries, keys and values get no gradient in the first step.
- Gates start near 1. Around 0, as published, each step multiplies the maps by what an untrained auto-encoder says, and
  half precision differs from single by a quarter of the logits' spread instead of a twenty-fifth.
- In volumes the auto-encoders are half as wide: they are most of the network's work, and a third axis triples it.
- The authors' modules that nothing used (955,412 weights) are in neither.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from .parts import attentive
from .parts.answer import Answer
from .parts.attention.channel import ChannelAttention
from .parts.attention.position import PositionAttention
from .parts.backbone import BatchNorm, ResidualEncoder, ResNet, half, instance_norm
from .parts.blocks import Triple, convolution, initialise, refuse_unless_multiple, topology, total_stride
from .parts.dims import Dims, but_thin, dims_of, resize, without_thin

Backbone = Literal["residual", "resnet101", "resnext101_32x4d", "resnext101_32x8d"]
GROUPS = {"resnet101": (1, 64), "resnext101_32x4d": (32, 4), "resnext101_32x8d": (32, 8)}
"""How many groups each has, and channels of a group in the first stage."""
SCALES = 4

attention_maps = attentive.attention_maps


PAPER = "Sinha & Dolz, IEEE JBHI 2020, arXiv 1906.02849"
GOOD_FOR = "several organs of unlike size, close together"


@dataclass(frozen=True, kw_only=True)
class Config:
    width: int | None = None
    """Channels of the maps that meet. None: 16, which suits two CPU cores; with `faithful` the authors' 64."""
    backbone: Backbone | None = None
    """The encoder. None: `residual`, `width` channels at full resolution; with `faithful` the authors' resnext101_32x8d."""
    sign: int = -1
    """−1: channels look most at the channel least like them, as in the authors' code; 1: at the most alike, as in their
    formula."""
    guidance: float = 0.25
    """How much the two latents' difference counts."""
    reconstruction: float = 0.1
    """How much it counts what the auto-encoders do not give back."""
    detach_target: bool = False
    """What an auto-encoder should give back counts as given: it does not learn to be easy to remember."""
    places: int = 32_768
    """`fit` has the scales meet at the finest stage with no more places than this, below full resolution."""
    tokens: int = 4096
    """`fit` halves what position attention looks at until no more places are left: 64 × 64, as published."""
    dims: Dims = 3
    """2 for patches one voxel thick, along whose thin axis nothing is done. `fit` sets it."""
    strides: tuple[Triple, ...] = ()
    """How much each stage shrinks each axis, finest first; the first is always (1, 1, 1). Empty: `fit` chooses them."""
    kernels: tuple[Triple, ...] = ()
    """Size of the convolutions of each stage. Empty: `fit` chooses them."""
    grid: int = 1
    """The stage at which the scales meet. `fit` sets it."""
    look: Triple = (1, 1, 1)
    """How much smaller than that grid the maps are that position attention looks at. `fit` sets it."""
    faithful: bool = False
    """The authors' code, errors included; planes only."""

    def __post_init__(self) -> None:
        unlike = len(self.strides) != len(self.kernels) or len(self.strides) == 1
        if unlike or (self.strides and (tuple(self.strides[0]) != (1, 1, 1) or not 0 < self.grid < len(self.strides))):
            raise ValueError(
                f"self_guided was given strides {self.strides}, kernels {self.kernels} and grid {self.grid}; it needs one "
                "stride and one kernel per stage, two stages or more, a first stride of (1, 1, 1), and for the grid one "
                "of the stages after it. Leave them out to have them chosen."
            )
        if self.encoder not in ("residual", *GROUPS):
            raise ValueError(
                f"self_guided was given the backbone {self.backbone!r}; residual, {', '.join(GROUPS)} are known. "
                "Correct its name."
            )
        if self.encoder != "residual" and self.strides and (len(self.strides), self.grid) != (6, 2):
            raise ValueError(
                f"self_guided was given {len(self.strides)} stages and grid {self.grid}; {self.encoder} needs 6 stages "
                "and meets at stage 2. Leave them out to have them chosen."
            )
        if min(self.filters, self.places, self.tokens) < 1 or self.sign not in (-1, 1) or self.dims not in (2, 3):
            raise ValueError(
                f"self_guided was given width {self.width}, places {self.places}, tokens {self.tokens}, sign {self.sign} "
                f"and dims {self.dims}; the first three must be 1 or more, sign −1 or 1, dims 2 or 3. Correct them."
            )
        if min(self.guidance, self.reconstruction) < 0:
            raise ValueError(
                f"self_guided was given guidance {self.guidance} and reconstruction {self.reconstruction}; losses count 0 "
                "or more. Correct them."
            )

    @property
    def filters(self) -> int:
        """The width, chosen."""
        return (64 if self.faithful else 16) if self.width is None else self.width

    @property
    def encoder(self) -> Backbone:
        """The backbone, chosen."""
        return self.backbone or ("resnext101_32x8d" if self.faithful else "residual")


def fit(config: Config, *, patch: tuple[int, int, int], spacing: tuple[float, float, float]) -> Config:
    """The config with the stages that suit this patch and spacing, unless it has some. Round the patch up to `divisor`
    afterwards."""
    if config.strides:
        return config
    if config.faithful and dims_of(patch) == 3:
        raise ValueError(
            f"A patch of {patch} voxels was given; the authors' network knows planes alone: one axis of one voxel is "
            "needed. Plan with 2-D patches, or leave faithful out."
        )
    config = replace(config, dims=dims_of(patch))
    choose = _quarter if config.encoder != "residual" else _finest_bearable
    config = choose(config, patch, without_thin(spacing, patch))
    if config.faithful:
        return config
    deeper = list(config.strides[config.grid + 1 :])
    while deeper and _places(config, patch) > config.tokens * math.prod(config.look):
        config = replace(config, look=total_stride((config.look, deeper.pop(0))))
    return config


def divisor(config: Config) -> tuple[int, int, int]:
    """What each axis of a patch must be a multiple of: the auto-encoders halve the grid twice, and the residual encoder
    averages whole voxels."""
    return total_stride(config.strides if config.encoder == "residual" else config.strides[: config.grid + 3])


def build(config: Config, *, channels: int, classes: int) -> nn.Module:
    """A new network with fresh weights."""
    if not config.strides:
        raise ValueError("self_guided was given no stages; it needs the config that `fit` makes for a patch. Call it.")
    network = SelfGuided(config, channels, classes)
    return _initialise_as_published(network) if config.faithful else _start_open(initialise(network))


def explained(network: nn.Module) -> dict[str, nn.Module]:
    """What may be explained, nearest to the answer first: what the last step makes of each scale, the map that all
    scales share, the encoder's scales before they meet."""
    last = {f"attended.{scale}": one for scale, one in enumerate(_children(network, "steps.1.refine"))}
    before = {f"scale.{scale}": one for scale, one in enumerate(_children(network, "adapt"))}
    return last | {"fused": network.get_submodule("fuse")} | before


class SelfGuided(nn.Module):
    def __init__(self, config: Config, channels: int, classes: int) -> None:
        super().__init__()
        self.divisor = divisor(config)
        self.config = config
        kernel, width = config.kernels[config.grid], config.filters
        self.stride = total_stride(config.strides[: config.grid + 1])
        self.encoder = _encoder(config, channels)
        self.adapt = nn.ModuleList(_block(config, inputs, width, (1, 1, 1)) for inputs in self.encoder.widths)
        self.fuse = nn.Sequential(
            _block(config, len(self.adapt) * width, width, kernel),
            _block(config, width, width, kernel),
            _block(config, width, width, (1, 1, 1)),
        )
        self.steps = nn.ModuleList(Step(config, len(self.adapt)) for _ in range(2))
        self.refined = nn.ModuleList(nn.Conv3d(width, classes, 1) for _ in self.adapt)
        self.sides = nn.ModuleList(nn.Conv3d(width, classes, 1) for _ in self.adapt)

    def forward(self, x: Float[Tensor, "B C D H W"]) -> Answer | Float[Tensor, "B K D H W"]:
        """In training the logits of every scale, after attention and before it, which all count alike, and the two losses;
        else the mean of those after attention."""
        refuse_unless_multiple(x.shape, self.divisor)
        size = x.shape[2:]
        grid = [n // step for n, step in zip(size, self.stride, strict=True)]
        maps = self.encoder(x.contiguous(memory_format=torch.channels_last_3d))
        scales = [resize(adapt(one), grid) for adapt, one in zip(self.adapt, maps, strict=True)]  # [B, C, *grid] each
        fused = self.fuse(torch.cat(scales[::-1], dim=1))

        refined, latents, copies = [], [], []
        for i, (scale, head) in enumerate(zip(scales, self.refined, strict=True)):
            beside = fused
            for step in self.steps:
                pair = torch.cat([scale, beside], dim=1)  # [B, 2C, *grid]
                latent, copy, attended = step(pair, i)
                beside = attended * fused
                latents.append(latent)
                copies.append((copy, pair))
            refined.append(head(attended))  # [B, K, *grid]

        if not self.training:
            return resize(torch.stack(refined).mean(0), size)
        sides = [head(scale) for head, scale in zip(self.sides, scales, strict=True)]
        logits = [resize(one, size) for one in (*refined, *sides)]
        return Answer(logits=logits, losses=self._losses(latents, copies), weights=(1.0,) * len(logits))

    def _losses(self, latents: list[Tensor], copies: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Summed over scales, and over both steps; `latents` are those of the first and second step by turns."""
        if self.config.detach_target:
            copies = [(copy, pair.detach()) for copy, pair in copies]
        return {
            "guidance": self.config.guidance * _differences(zip(latents[::2], latents[1::2], strict=True)),
            "reconstruction": self.config.reconstruction * _differences(copies),
        }


class Step(nn.Module):
    """One look: an auto-encoder for all scales, and a refinement for each."""

    def __init__(self, config: Config, scales: int) -> None:
        super().__init__()
        self.remember = AutoEncoder(config)
        self.refine = nn.ModuleList(Refinement(config) for _ in range(scales))

    def forward(
        self, pair: Float[Tensor, "B C2 *grid"], scale: int
    ) -> tuple[Tensor, Float[Tensor, "B C2 *grid"], Float[Tensor, "B C *grid"]]:
        """The latent, what it became again, and what was attended to."""
        latent, copy = self.remember(pair)
        return latent, copy, self.refine[scale](pair, copy)


class Refinement(nn.Module):
    """What places and channels find in a pair, together, as far as the auto-encoder's gate lets it through."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, kernel = config.filters, config.kernels[config.grid]
        # an eighth of a narrow map is a single number, by which places can only be put in a row: eight, as published
        reduced = width // 8 if config.faithful else max(8, width // 8)
        position = PositionAttention(width, reduced=reduced, stride=config.look, key_bias=config.faithful)
        channel = ChannelAttention(width, sign=config.sign, mean=not config.faithful)
        self.position, self.channel = (
            nn.Sequential(_block(config, 2 * width, width, kernel), attention, _block(config, width, width, kernel))
            for attention in (position, channel)
        )
        # neither norm nor activation, as published: the gate has a sign and no bound
        self.gate = nn.Conv3d(2 * width, width, kernel, padding=half(kernel))
        self.merge = nn.Conv3d(width, width, 1)

    def forward(self, pair: Float[Tensor, "B C2 *grid"], copy: Float[Tensor, "B C2 *grid"]) -> Float[Tensor, "B C *grid"]:  # fmt: skip
        # the paper has a matrix product here, the authors' code a product of elements
        return self.merge((self.channel(pair) + self.position(pair)) * self.gate(copy))


class AutoEncoder(nn.Module):
    """A pair of maps, halved twice and made as large again: what lies in the middle, and what it became."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        pair = 2 * config.filters
        wide = 2 * pair if config.dims == 2 else pair
        # strides of the encoder's own next stages: a coarse axis waits here as it does there
        coarse, coarser = ((*config.strides[config.grid + 1 :], (1, 1, 1), (1, 1, 1)))[:2]
        kernels = [config.kernels[min(config.grid + i, len(config.kernels) - 1)] for i in range(3)]
        self.encode = nn.Sequential(
            _twice(config, pair, wide, kernels[0]), nn.MaxPool3d(coarse, coarse),
            _twice(config, wide, 2 * wide, kernels[1]), nn.MaxPool3d(coarser, coarser),
        )  # fmt: skip
        self.decode = nn.Sequential(
            _twice(config, 2 * wide, wide, kernels[2]), nn.ConvTranspose3d(wide, wide, coarser, coarser),
            _twice(config, wide, pair, kernels[1]), nn.ConvTranspose3d(pair, pair, coarse, coarse),
        )  # fmt: skip

    def forward(self, x: Float[Tensor, "B C *grid"]) -> tuple[Tensor, Float[Tensor, "B C *grid"]]:
        latent = self.encode(x)
        return latent, self.decode(latent)


def _differences(pairs: Iterable[tuple[Tensor, Tensor]]) -> Float[Tensor, ""]:
    return torch.stack([functional.mse_loss(one.float(), other.float()) for one, other in pairs]).sum()


def _children(network: nn.Module, name: str) -> Iterable[nn.Module]:
    return network.get_submodule(name).children()


def _encoder(config: Config, channels: int) -> ResidualEncoder | ResNet:
    if config.encoder == "residual":
        return ResidualEncoder(channels, config.filters, config.strides, config.kernels, config.grid)
    groups, base = GROUPS[config.encoder]
    norm = BatchNorm if config.faithful else instance_norm
    return ResNet(channels, groups=groups, base=base, strides=config.strides[1:], kernels=config.kernels[1:], norm=norm)


def _block(config: Config, inputs: int, outputs: int, kernel: Triple, relu: bool = False) -> nn.Sequential:
    """Convolution, norm, activation."""
    if not config.faithful:
        return convolution(inputs, outputs, kernel)
    convolve = nn.Conv3d(inputs, outputs, kernel, padding=half(kernel))
    return nn.Sequential(convolve, nn.BatchNorm3d(outputs), nn.ReLU() if relu else nn.PReLU())


def _twice(config: Config, inputs: int, outputs: int, kernel: Triple) -> nn.Sequential:
    return nn.Sequential(
        _block(config, inputs, outputs, kernel, relu=True), _block(config, outputs, outputs, kernel, relu=True)
    )


def _start_open(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, PositionAttention | ChannelAttention):
            nn.init.constant_(module.gamma, 0.1)
        if isinstance(module, Refinement):
            nn.init.ones_(module.gate.get_parameter("bias"))
            with torch.no_grad():
                module.gate.weight.mul_(0.1)
    return network


def _initialise_as_published(network: nn.Module) -> nn.Module:
    """Xavier's initialisation of every convolution, the backbone's too: training is from scratch."""
    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            nn.init.xavier_normal_(module.weight)
        if isinstance(module, nn.BatchNorm3d):
            nn.init.normal_(module.weight, 1.0, 0.02)
    return network.to(memory_format=torch.channels_last_3d)


def _finest_bearable(config: Config, patch: Triple, spacing: tuple[float, float, float]) -> Config:
    """The stages of a residual U-Net, as far as four scales below the grid need them."""
    strides, kernels = topology(patch, spacing)
    kernels = tuple(but_thin(kernel, patch) for kernel in kernels)
    if len(strides) < 2:
        raise ValueError(
            f"A patch of {patch} voxels was given; self_guided halves it at least once, for which one axis must have 12 "
            "voxels, or two axes 8. Choose a larger patch, or pad small scans."
        )
    for grid in range(1, len(strides)):
        stages = grid + SCALES
        config = replace(config, strides=strides[:stages], kernels=kernels[:stages], grid=grid)
        if _places(config, patch) <= config.places:
            break
    return config


def _quarter(config: Config, patch: Triple, spacing: tuple[float, float, float]) -> Config:
    """A ResNet's five halvings, which meet after two; the published one does not ask for the spacing."""
    planned, sizes = (((1, 1, 1),), ((3, 3, 3),)) if config.faithful else topology(patch, spacing)
    strides = tuple(but_thin(stride, patch) for stride in (*planned, *[(2, 2, 2)] * 6)[:6])
    kernels = tuple(but_thin(kernel, patch) for kernel in (*sizes, *[(3, 3, 3)] * 6)[:6])
    return replace(config, grid=2, strides=strides, kernels=kernels)


def _places(config: Config, patch: Triple) -> int:
    """How many the grid has, when the patch is rounded up."""
    stride = total_stride(config.strides[: config.grid + 1])
    rounded = [math.ceil(n / d) * d for n, d in zip(patch, divisor(config), strict=True)]
    return math.prod(n // step for n, step in zip(rounded, stride, strict=True))
