"""torch itself: float32, or bfloat16 where the processor has it. On a CPU every convolution is oneDNN's, channels lie last,
and a window's memory is kept for the next.

Nothing is compiled: what a compiler could join, norm and activation, is one pass already (kernels/instance_norm.py), and three
quarters of the time are oneDNN's convolutions, near the most that a core can do.
"""

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from networks.parts.blocks import InstanceNorm

from ..prediction import PRECISIONS, choose_device, refuse_slow_precision
from . import _memory

if TYPE_CHECKING:
    from ..package import ModelPackage
    from ..prediction import Inference


def open(package: "ModelPackage", how: "Inference") -> "tuple[TorchEngine, ...]":
    """The network of every fold, on the device and in the precision that were asked for."""
    device = choose_device(how.device)
    refuse_slow_precision(how.precision, device)
    return tuple(_engine(network, device, how.precision, package.id) for network in package.networks())


def engine(
    network: nn.Module, device: torch.device, precision: str = "float32", *, built_by: str = ""
) -> "TorchEngine":
    """An engine of a copy of this network."""
    return _engine(copy.deepcopy(network), device, precision, built_by)


def _engine(network: nn.Module, device: torch.device, precision: str, built_by: str) -> "TorchEngine":
    """The network laid out anew, for answering alone."""
    network = network.eval().requires_grad_(False)
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        _suit(network)
    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d | _OneDNN):
            # oneDNN and cuDNN then need not sort the memory anew around every convolution
            module.to(memory_format=torch.channels_last_3d)
    return TorchEngine(network=network.to(device), device=device, precision=precision, built_by=built_by)


@dataclass(frozen=True, kw_only=True, eq=False)
class TorchEngine:
    """A network in memory."""

    network: nn.Module
    device: torch.device
    precision: str
    built_by: str = ""
    """What builds the same network, by its id, a package: what was counted of one holds for the next."""

    @property
    def words(self) -> str:
        return f"torch {torch.__version__.split('+')[0]}, {self.precision}, channels last"

    @torch.inference_mode()
    def __call__(self, windows: Float[Tensor, "B C i j k"]) -> Float[Tensor, "B K i j k"]:
        with self._memory(), self._autocast():
            seen = windows.to(self.device).contiguous(memory_format=torch.channels_last_3d)
            logits: Tensor = self.network(seen)
            return logits.float()

    def in_precision(self, precision: str) -> "TorchEngine":
        """The same weights computing otherwise."""
        return replace(self, precision=precision)

    def _memory(self) -> AbstractContextManager[None]:
        return _memory.kept() if self.device.type == "cpu" else nullcontext()

    def _autocast(self) -> Any:
        kind = PRECISIONS[self.precision]
        return torch.autocast(self.device.type, kind, enabled=kind != torch.float32)


def _suit(network: nn.Module) -> None:
    """Layers of torch in the place of which others give the same sooner on a CPU."""
    for name, child in network.named_children():
        if type(child) is nn.Conv3d and child.padding_mode == "zeros" and not isinstance(child.padding, str):
            setattr(network, name, _OneDNN(child))
        elif type(child) is nn.InstanceNorm3d and not child.track_running_stats:
            setattr(network, name, _our_norm(child))
        elif type(child) is nn.AvgPool3d and _Means.can_replace(child):
            setattr(network, name, _Means(child))
        else:
            _suit(child)


class _OneDNN(nn.Module):
    """A convolution by oneDNN whatever its size. torch leaves windows of one channel and small maps to an older way, which
    copies each window 27 times, is up to eight times as slow and hands its answer on with channels first."""

    def __init__(self, convolution: nn.Conv3d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        self.stride, self.dilation = convolution.stride, convolution.dilation
        self.padding = tuple(int(side) for side in convolution.padding)
        self.groups = convolution.groups

    def forward(self, x: Float[Tensor, "B C D H W"]) -> Float[Tensor, "B C2 D2 H2 W2"]:
        # torch has but the one way for bfloat16, and of a tensor without voxels only the size is asked (pipeline/budget.py)
        if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or type(x) is not Tensor:
            return nn.functional.conv3d(
                x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
            )
        return torch.mkldnn_convolution(
            x, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups
        )


class _Means(nn.Module):
    """Means of blocks that do not overlap, as sums of every other voxel: channels stay last, where torch's pooling sorts the
    memory anew, before and for whatever comes after, and takes six times as long."""

    def __init__(self, pool: nn.AvgPool3d) -> None:
        super().__init__()
        self.sides = _triple(pool.kernel_size)

    @staticmethod
    def can_replace(pool: nn.AvgPool3d) -> bool:
        """Where blocks touch and nothing is padded."""
        sides = _triple(pool.kernel_size)
        return _triple(pool.stride) == sides and not (
            any(_triple(pool.padding)) or pool.ceil_mode or pool.divisor_override
        )

    def forward(self, x: Float[Tensor, "B C D H W"]) -> Float[Tensor, "B C D2 H2 W2"]:
        d, h, w = self.sides
        whole = x[:, :, : x.shape[2] // d * d, : x.shape[3] // h * h, : x.shape[4] // w * w]
        parts = [whole[:, :, a::d, b::h, c::w] for a in range(d) for b in range(h) for c in range(w)]
        total = parts[0].to(torch.float32, copy=True, memory_format=torch.channels_last_3d)
        for part in parts[1:]:
            total += part
        return (total / len(parts)).to(x.dtype)


def _triple(sides: int | tuple[int, ...]) -> tuple[int, ...]:
    return (sides,) * 3 if isinstance(sides, int) else tuple(sides)


def _our_norm(norm: nn.InstanceNorm3d) -> InstanceNorm:
    """torch's copies a volume whose channels lie last; ours takes it as it is."""
    ours = InstanceNorm(norm.num_features, norm.eps)
    if norm.affine:
        ours.weight, ours.bias = norm.weight, norm.bias
    return ours.requires_grad_(False)
