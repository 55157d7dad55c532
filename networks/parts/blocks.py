"""Convolution, norm and activation, put together once; how deep a network may go on a patch."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kernels import instance_norm

Triple = tuple[int, int, int]

SLOPE = 0.01  # nnU-Net v2: LeakyReLU(0.01) everywhere


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut; the first may stride, and the shortcut follows by averaging."""

    def __init__(
        self, inputs: int, outputs: int, kernel: Triple, stride: Triple = (1, 1, 1), bias: bool = False
    ) -> None:
        super().__init__()
        self.first = convolution(inputs, outputs, kernel, stride, bias)
        self.second = nn.Sequential(_padded(outputs, outputs, kernel, bias=bias), InstanceNorm(outputs, slope=SLOPE))
        self.shortcut = nn.Sequential()
        if math.prod(stride) > 1:
            self.shortcut.append(nn.AvgPool3d(stride, stride))
        if inputs != outputs:
            self.shortcut.extend([nn.Conv3d(inputs, outputs, 1, bias=False), InstanceNorm(outputs)])

    def forward(self, x: Float[Tensor, "B C D H W"]) -> Float[Tensor, "B C2 D2 H2 W2"]:
        convolve, norm = self.second
        return norm(convolve(self.first(x)), self.shortcut(x))


def convolution(
    inputs: int, outputs: int, kernel: Triple, stride: Triple = (1, 1, 1), bias: bool = False
) -> nn.Sequential:
    """Convolution, instance norm, leaky ReLU. A bias is of no use: the norm takes it away again."""
    return nn.Sequential(_padded(inputs, outputs, kernel, stride, bias), InstanceNorm(outputs, slope=SLOPE))


def _padded(inputs: int, outputs: int, kernel: Triple, stride: Triple = (1, 1, 1), bias: bool = False) -> nn.Conv3d:
    d, h, w = kernel
    return nn.Conv3d(inputs, outputs, kernel, stride, (d // 2, h // 2, w // 2), bias=bias)


class InstanceNorm(nn.Module):
    """Instance norm with scale and shift, what is added to it, and a leaky ReLU, in one go: channels stay last.

    Unlike torch's instance norm it accepts a single voxel: that becomes the shift, in training as in use.
    """

    def __init__(self, channels: int, eps: float = 1e-5, slope: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps
        self.slope = slope  # 1: no activation

    def forward(
        self, x: Float[Tensor, "B C *space"], added: Float[Tensor, "B C *space"] | None = None
    ) -> Float[Tensor, "B C *space"]:
        return instance_norm.fused(x, self.weight, self.bias, added, self.slope, self.eps)


def initialise(network: nn.Module) -> nn.Module:
    """He's initialisation for leaky ReLU, biases at zero, and every weight laid out channels last."""
    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            nn.init.kaiming_normal_(module.weight, a=SLOPE)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network.to(memory_format=torch.channels_last_3d)


def topology(
    patch: tuple[float, float, float], spacing: tuple[float, float, float]
) -> tuple[tuple[Triple, ...], tuple[Triple, ...]]:
    """Stride and kernel of each stage, finest first, by nnU-Net v2's rule: halve the finest axes until they are short.

    An axis much coarser than the others waits, unhalved and with kernel 1, until the others have become as coarse.
    """
    size, step, kernel = list(patch), list(spacing), [1, 1, 1]
    strides: list[Triple] = [(1, 1, 1)]
    kernels: list[Triple] = []
    while True:
        long = [axis for axis in range(3) if size[axis] >= 8]  # 4 voxels must be left: UNet_featuremap_min_edge_length
        finest = min((step[axis] for axis in long), default=1.0)
        halved = [axis for axis in long if step[axis] / finest < 2]
        if not halved or (len(halved) == 1 and size[halved[0]] < 12):
            break
        finest = min(step)
        kernel = [3 if k == 3 or s / finest < 2 else 1 for k, s in zip(kernel, step, strict=True)]
        kernels.append(_triple(kernel))
        strides.append(_triple([2 if axis in halved else 1 for axis in range(3)]))
        for axis in halved:
            step[axis] *= 2
            size[axis] = math.ceil(size[axis] / 2)
    return tuple(strides), (*kernels, (3, 3, 3))


def stages_for(
    name: str, patch: Triple, spacing: tuple[float, float, float]
) -> tuple[tuple[Triple, ...], tuple[Triple, ...]]:
    """`topology` for a network that halves a patch at least once."""
    strides, kernels = topology(patch, spacing)
    if len(strides) < 2:
        raise ValueError(
            f"A patch of {patch} voxels was given; {name} halves it at least once, for which one axis must have 12 voxels, "
            "or two axes 8. Choose a larger patch, or pad small scans."
        )
    return strides, kernels


def refuse_unlike_stages(name: str, strides: Sequence[Triple], kernels: Sequence[Triple]) -> None:
    """A config's stages, unless it leaves them to `fit`."""
    unlike = len(strides) != len(kernels) or len(strides) == 1
    if unlike or (strides and tuple(strides[0]) != (1, 1, 1)):
        raise ValueError(
            f"{name} was given strides {strides} and kernels {kernels}; it needs one of each per stage, two stages or more, "
            "and a first stride of (1, 1, 1). Leave both out to have them chosen."
        )


def total_stride(strides: tuple[Triple, ...]) -> Triple:
    """The product of all strides per axis: what a patch must be a multiple of."""
    return _triple([math.prod(stride[axis] for stride in strides) for axis in range(3)])


def refuse_unless_multiple(shape: torch.Size, divisor: Triple) -> None:
    """A patch that does not divide would come back as another size."""
    if any(n % d for n, d in zip(shape[2:], divisor, strict=True)):
        nearest = tuple(max(d, math.ceil(n / d) * d) for n, d in zip(shape[2:], divisor, strict=True))
        raise ValueError(
            f"A patch of {tuple(shape[2:])} voxels was given; each axis must be a multiple of {divisor}. "
            f"Pad it to {nearest}."
        )


def _triple(numbers: list[int]) -> Triple:
    d, h, w = numbers
    return d, h, w
