"""Convolution, norm and activation, put together once."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kernels import instance_norm

from .stages import Triple
from .stages import refuse_unlike_stages as refuse_unlike_stages
from .stages import stages_for as stages_for
from .stages import topology as topology
from .stages import total_stride as total_stride

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


def refuse_unless_multiple(shape: torch.Size, divisor: Triple) -> None:
    """A patch that does not divide would come back as another size."""
    if any(n % d for n, d in zip(shape[2:], divisor, strict=True)):
        nearest = tuple(max(d, math.ceil(n / d) * d) for n, d in zip(shape[2:], divisor, strict=True))
        raise ValueError(
            f"A patch of {tuple(shape[2:])} voxels was given; each axis must be a multiple of {divisor}. "
            f"Pad it to {nearest}."
        )
