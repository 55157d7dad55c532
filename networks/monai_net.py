"""Networks of MONAI's, as its bundles name them: for weights that others trained there, never for a training here.

Only what `NETS` lists can be made, and only of numbers, words and their lists: a bundle's other targets are code.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from . import UnknownNetwork, segresnet
from .parts.blocks import Triple, refuse_unless_multiple

PAPER = "Cardoso et al. 2022, arXiv 2211.02701 (MONAI), and the paper of each network"
GOOD_FOR = "what was trained in MONAI; comes with `hilum import monai`"


@dataclass(frozen=True, kw_only=True)
class Config:
    net: str
    """One of `NETS`, by MONAI's name of it."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """What MONAI's class is made with beside channels in, channels out and three axes of space."""

    def __post_init__(self) -> None:
        if self.net not in NETS:
            raise ValueError(
                f"monai_net was given {self.net!r}; these of MONAI's are known here: {', '.join(NETS)}. Only they can be made."
            )
        if settled := sorted(SETTLED & set(self.arguments)):
            raise ValueError(
                f"monai_net was given {', '.join(settled)} among the arguments; they follow from the plan. Leave them out."
            )
        if odd := sorted(name for name, value in self.arguments.items() if not _is_plain(value)):
            raise ValueError(
                f"monai_net was given {', '.join(odd)} as neither numbers, words nor lists of them, and makes nothing else. "
                "Write them out."
            )


SETTLED = {"spatial_dims", "in_channels", "out_channels"}
"""What `build` says by itself."""


def fit(config: Config, *, patch: tuple[int, int, int], spacing: tuple[float, float, float]) -> Config:
    """The config as it is: what was trained cannot be fitted anew."""
    return config


def divisor(config: Config) -> tuple[int, int, int]:
    """What each axis of a patch must be a multiple of."""
    return NETS[config.net](config.arguments)


def build(config: Config, *, channels: int, classes: int) -> nn.Module:
    """A new network with fresh weights, without deep supervision's outputs in use."""
    return MonaiNet(config, channels, classes)


def explained(network: "MonaiNet") -> dict[str, nn.Module]:
    """What may be explained, nearest to the answer first: every convolution over space but the last, which answers."""
    layers = {name: module for name, module in network.named_modules() if isinstance(module, CONVOLUTIONS)}
    wide = [name for name, module in layers.items() if max(module.kernel_size) > 1]
    return {name: layers[name] for name in reversed(wide[:-1] or wide)}


CONVOLUTIONS = (nn.Conv3d, nn.ConvTranspose3d)


class MonaiNet(nn.Module):
    """Its weights have MONAI's names behind `network.`"""

    def __init__(self, config: Config, channels: int, classes: int) -> None:
        from monai.networks import nets  # MONAI takes seconds to import

        super().__init__()
        self.divisor = divisor(config)
        made_by = getattr(nets, config.net)
        known = set(inspect.signature(made_by.__init__).parameters)
        if unknown := sorted(set(config.arguments) - known):
            raise ValueError(
                f"monai_net was given {', '.join(unknown)}, which MONAI's {config.net} does not know; it knows "
                f"{', '.join(sorted(known - SETTLED - {'self'}))}. Take the MONAI that the bundle names."
            )
        try:
            self.network = made_by(spatial_dims=3, in_channels=channels, out_channels=classes, **config.arguments)
        except ImportError as error:  # MONAI looks for what a network needs only when it makes it
            reason = str(error).splitlines()[0]
            raise UnknownNetwork(
                f"MONAI makes no {config.net} here ({reason}); it needs that library. Install it with pip, einops for most."
            ) from None

    def forward(self, x: Float[Tensor, "B C D H W"]) -> list[Tensor] | Float[Tensor, "B K D H W"]:
        """In training, logits of every resolution, finest first, where it has several; else the finest alone."""
        refuse_unless_multiple(x.shape, self.divisor)
        return self.network(x)


def _of_strides(arguments: Mapping[str, Any]) -> Triple:
    return _product(arguments.get("strides", ()))


def _of_stages(arguments: Mapping[str, Any]) -> Triple:
    """SegResNet halves every axis between two stages."""
    return (2 ** (len(arguments.get("blocks_down", (1, 2, 2, 4))) - 1),) * 3


def _of_resolution(arguments: Mapping[str, Any]) -> Triple:
    blocks, spacing = arguments.get("blocks_down", (1, 2, 2, 4)), arguments.get("resolution") or (1.0, 1.0, 1.0)
    i, j, k = (float(step) for step in spacing)
    return segresnet.divisor(segresnet.Config(blocks=tuple(blocks), spacing=(i, j, k)))


def _of_image(arguments: Mapping[str, Any]) -> Triple:
    """UNETR knows the place of every voxel: a window has one size and no other."""
    return _product([arguments.get("img_size", 1)])


def _always(side: int) -> Callable[[Mapping[str, Any]], Triple]:
    return lambda _: (side,) * 3


def _product(steps: Sequence[int | Sequence[int]]) -> Triple:
    triples = [(step,) * 3 if isinstance(step, int) else tuple(step) for step in steps]
    i, j, k = (math.prod(triple[axis] for triple in triples) for axis in range(3))
    return i, j, k


NETS: dict[str, Callable[[Mapping[str, Any]], Triple]] = {
    "AttentionUnet": _of_strides,
    "BasicUNet": _always(16),  # four halvings
    "DynUNet": _of_strides,
    "HighResNet": _always(1),  # it dilates and halves nothing
    "MedNeXt": _always(16),
    "SegResNet": _of_stages,
    "SegResNetDS": _of_resolution,
    "SwinUNETR": _always(32),  # patches of 2, four mergings
    "UNETR": _of_image,
    "UNet": _of_strides,
    "VNet": _always(16),
}
"""MONAI's networks of volumes that answer with logits alone, each with what its arguments say a patch is a multiple of."""


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, bool | int | float | str)
