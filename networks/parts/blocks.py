"""Convolution, norm and activation, put together once; how deep a network may go on a patch."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

Triple = tuple[int, int, int]

SLOPE = 0.01  # nnU-Net v2: LeakyReLU(0.01) everywhere


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut; the first may stride, and the shortcut follows by averaging."""

    def __init__(
        self, inputs: int, outputs: int, kernel: Triple, stride: Triple = (1, 1, 1), bias: bool = False
    ) -> None:
        super().__init__()
        self.first = convolution(inputs, outputs, kernel, stride, bias)
        self.second = nn.Sequential(_padded(outputs, outputs, kernel, bias=bias), InstanceNorm(outputs))
        self.shortcut = nn.Sequential()
        if math.prod(stride) > 1:
            self.shortcut.append(nn.AvgPool3d(stride, stride))
        if inputs != outputs:
            self.shortcut.extend([nn.Conv3d(inputs, outputs, 1, bias=False), InstanceNorm(outputs)])

    def forward(self, x: Float[Tensor, "B C D H W"]) -> Float[Tensor, "B C2 D2 H2 W2"]:
        return functional.leaky_relu_(self.second(self.first(x)) + self.shortcut(x), SLOPE)


def convolution(
    inputs: int, outputs: int, kernel: Triple, stride: Triple = (1, 1, 1), bias: bool = False
) -> nn.Sequential:
    """Convolution, instance norm, leaky ReLU. A bias is of no use: the norm takes it away again."""
    return nn.Sequential(
        _padded(inputs, outputs, kernel, stride, bias), InstanceNorm(outputs), nn.LeakyReLU(SLOPE, inplace=True)
    )


def _padded(inputs: int, outputs: int, kernel: Triple, stride: Triple = (1, 1, 1), bias: bool = False) -> nn.Conv3d:
    d, h, w = kernel
    return nn.Conv3d(inputs, outputs, kernel, stride, (d // 2, h // 2, w // 2), bias=bias)


class InstanceNorm(nn.Module):
    """Instance norm with scale and shift, as a group norm of one channel per group, which keeps channels last.

    Unlike torch's instance norm it accepts a single voxel: that becomes the shift, in training as in use.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Float[Tensor, "B C D H W"]) -> Float[Tensor, "B C D H W"]:
        if x.device.type == "cpu" and x.dtype == self.weight.dtype and x.requires_grad:
            return _ChannelsLastNorm.apply(x, self.weight, self.bias, self.eps)
        # torch's own function, not functional.group_norm, which refuses one voxel in a batch of one
        return torch.group_norm(x, x.shape[1], self.weight, self.bias, self.eps, torch.backends.cudnn.enabled)


class _ChannelsLastNorm(torch.autograd.Function):
    """torch's forward with a backward of two matrix products: on channels last torch's own takes twice as long."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        batch, channels, voxels = x.shape[0], x.shape[1], x[0, 0].numel()
        y, mean, scale = torch.native_group_norm(x, weight, bias, batch, channels, voxels, channels, eps)
        ctx.save_for_backward(x, weight, mean, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, scale = ctx.saved_tensors
        mean, scale = mean[:, None, :], scale[:, None, :]  # [B, 1, C]; scale is one over the standard deviation
        flat, slope = _voxels_by_channels(x), _voxels_by_channels(gradient)  # [B, N, C]
        voxels = flat.shape[1]
        total = slope.new_ones(slope.shape[0], 1, voxels) @ slope  # [B, 1, C]
        along = (flat.mT @ slope).diagonal(dim1=1, dim2=2)[:, None, :]  # [B, 1, C]: sum of x · gradient
        along = (along - mean * total) * scale  # sum of the normalised x · gradient
        step = weight * scale
        pull = -step * scale * along / voxels
        back = torch.addcmul(-step * total / voxels - pull * mean, flat, pull).addcmul_(slope, step)
        return _as_volumes(back, x), along.sum((0, 1)), total.sum((0, 1)), None


def _voxels_by_channels(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 4, 1).reshape(x.shape[0], -1, x.shape[1])  # a view when channels are last


def _as_volumes(flat: Tensor, like: Tensor) -> Tensor:
    batch, channels, *shape = like.shape
    return flat.reshape(batch, *shape, channels).permute(0, 4, 1, 2, 3)


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
