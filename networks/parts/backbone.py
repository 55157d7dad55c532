"""Encoders: a patch in, maps of ever coarser resolution out, finest first. A patch one voxel thick is a plane: along its
thin axis strides and kernels are 1."""

from collections.abc import Callable, Iterable, Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from .blocks import InstanceNorm, ResidualBlock, Triple, convolution

BLOCKS = (3, 4, 23, 3)
"""Bottlenecks per stage of a ResNet of 101 layers."""


class ResidualEncoder(nn.Module):
    """What a residual U-Net has on its way down: a convolution at full resolution, then two residual blocks a stage."""

    def __init__(
        self, channels: int, width: int, strides: Sequence[Triple], kernels: Sequence[Triple], first: int
    ) -> None:
        """Stage 0 has `width` channels, each stage after it twice as many; the maps of stages from `first` on come out."""
        super().__init__()
        widths = [width * 2**stage for stage in range(len(strides))]
        self.first = first
        self.widths = tuple(widths[first:])
        self.stem = convolution(channels, width, kernels[0])
        self.stages = nn.ModuleList(
            nn.Sequential(
                ResidualBlock(widths[i - 1], widths[i], kernels[i], strides[i]),
                ResidualBlock(widths[i], widths[i], kernels[i]),
            )
            for i in range(1, len(strides))
        )

    def forward(self, x: Float[Tensor, "B C D H W"]) -> list[Tensor]:
        maps = [self.stem(x)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))  # [B, width · 2 ** stage, D / stride, H / stride, W / stride]
        return maps[self.first :]


class ResNet(nn.Module):
    """ResNet-101 (He et al. 2016) or, with `groups`, ResNeXt-101 (Xie et al. 2017): four maps, the finest after two
    halvings."""

    def __init__(
        self, channels: int, *, groups: int, base: int, strides: Sequence[Triple], kernels: Sequence[Triple],
        norm: Callable[[int, float], nn.Module],
    ) -> None:  # fmt: skip
        """`base` channels a group in the first stage, twice as many in each further one. The five strides are those of
        the stem, of its pooling and of stages 2 to 4."""
        super().__init__()
        self.widths = (256, 512, 1024, 2048)
        wide = _triple(7 if k > 1 else 1 for k in kernels[0])
        self.stem = nn.Conv3d(channels, 64, wide, strides[0], half(wide), bias=False)
        self.norm = norm(64, 0.0)
        self.pool = nn.MaxPool3d(kernels[1], strides[1], half(kernels[1]))
        self.stages = nn.ModuleList()
        for i, (blocks, outputs) in enumerate(zip(BLOCKS, self.widths, strict=True)):
            inputs, inner = (self.widths[i - 1] if i else 64), groups * base * 2**i
            stride = strides[i + 1] if i else (1, 1, 1)
            first = Bottleneck(inputs, inner, outputs, groups, kernels[i + 1], stride, norm)
            rest = [
                Bottleneck(outputs, inner, outputs, groups, kernels[i + 1], (1, 1, 1), norm) for _ in range(blocks - 1)
            ]
            self.stages.append(nn.Sequential(first, *rest))

    def forward(self, x: Float[Tensor, "B C D H W"]) -> list[Tensor]:
        x = self.pool(self.norm(self.stem(x)))  # [B, 64, D / 4, H / 4, W / 4]
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class Bottleneck(nn.Module):
    """Narrow, look around in groups, widen; what came in is added before the last ReLU."""

    def __init__(
        self, inputs: int, inner: int, outputs: int, groups: int, kernel: Triple, stride: Triple,
        norm: Callable[[int, float], nn.Module],
    ) -> None:  # fmt: skip
        super().__init__()
        self.narrow = nn.Sequential(nn.Conv3d(inputs, inner, 1, bias=False), norm(inner, 0.0))
        self.look = nn.Sequential(
            nn.Conv3d(inner, inner, kernel, stride, half(kernel), groups=groups, bias=False), norm(inner, 0.0)
        )
        self.widen = nn.Conv3d(inner, outputs, 1, bias=False)
        self.norm = norm(outputs, 0.0)
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            self.shortcut.extend([nn.Conv3d(inputs, outputs, 1, stride, bias=False), norm(outputs, 1.0)])

    def forward(self, x: Float[Tensor, "B C D H W"]) -> Float[Tensor, "B C2 D2 H2 W2"]:
        return self.norm(self.widen(self.look(self.narrow(x))), self.shortcut(x))


def instance_norm(channels: int, slope: float) -> nn.Module:
    return InstanceNorm(channels, slope=slope)


class BatchNorm(nn.Module):
    """As published: norm over the batch, what is added to it, and a leaky ReLU; takes what InstanceNorm takes."""

    def __init__(self, channels: int, slope: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm3d(channels)
        self.slope = slope  # 0: ReLU; 1: no activation

    def forward(
        self, x: Float[Tensor, "B C D H W"], added: Float[Tensor, "B C D H W"] | None = None
    ) -> Float[Tensor, "B C D H W"]:
        y = self.norm(x)
        return functional.leaky_relu(y if added is None else y + added, self.slope)


def half(kernel: Triple) -> Triple:
    """The padding that keeps a map's size."""
    return _triple(k // 2 for k in kernel)


def _triple(numbers: Iterable[int]) -> Triple:
    d, h, w = numbers
    return d, h, w
