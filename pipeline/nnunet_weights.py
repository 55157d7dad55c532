"""Where each weight of nnU-Net's U-Nets belongs in ours, and how its axes lie there."""

import math
import re
from collections.abc import Mapping
from itertools import count
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from preprocessing.nnunet_plans import Translation

COPIES = re.compile(r"(^|\.)all_modules\.|^decoder\.encoder\.")
"""nnU-Net's modules hold some of their parts twice, and a state says so twice."""

PARTS = {"conv": 0, "norm": 1}


def renamed(state: Mapping[str, Tensor], made: "Translation") -> dict[str, Tensor]:
    """nnU-Net's weights under our names, along our axes. Heads of deep supervision go along; only the last is ever asked."""
    ours = {}
    for name, tensor in state.items():
        name = name.removeprefix("module.").replace("_orig_mod.", "")  # of several GPUs, of a compiled network
        if not COPIES.search(name):
            ours[_our_name(name, made)] = _turned(tensor, made)
    if not made.network["bias"]:  # our transposed convolutions always have one
        for stage in count():
            if (weight := ours.get(f"up.{stage}.weight")) is None:
                break
            ours[f"up.{stage}.bias"] = torch.zeros(weight.shape[1])
    return ours


def _our_name(name: str, made: "Translation") -> str:
    """KeyError of a name that none of nnU-Net's plain or residual U-Nets has."""
    *path, part, kind = name.split(".")
    match path:
        case ["encoder", "stem", "convs", "0"]:
            return f"stem.{PARTS[part]}.{kind}"
        case ["encoder", "stages", stage, "0", "convs", number]:
            return f"down.{stage}.{number}.{PARTS[part]}.{kind}"
        case ["encoder", "stages", stage, "blocks", number, "conv1" | "conv2" as which]:
            ours = {"conv1": "first", "conv2": "second"}[which]
            return f"down.{stage}.{number}.{ours}.{PARTS[part]}.{kind}"
        case ["encoder", "stages", stage, "blocks", number, "skip", _]:
            pooled = number == "0" and math.prod(made.network["strides"][int(stage)]) > 1
            return f"down.{stage}.{number}.shortcut.{PARTS[part] + pooled}.{kind}"
        case ["decoder", "stages", stage, "convs", number]:
            several = f"{number}." if made.network["decoder"] > 1 else ""
            return f"merge.{stage}.{several}{PARTS[part]}.{kind}"
        case ["decoder", "transpconvs"]:
            return f"up.{part}.{kind}"
        case ["decoder", "seg_layers"]:
            return f"heads.{part}.{kind}"
    raise KeyError(f"{name} is no weight of a plain or residual encoder U-Net")


def _turned(tensor: Tensor, made: "Translation") -> Tensor:
    """A kernel along our axes, one voxel thick across slices where the network is 2-D."""
    if tensor.ndim < 4:
        return tensor.float()
    kernel = tensor.unsqueeze(2) if made.is_flat else tensor
    return kernel.permute(0, 1, *(2 + made.axes.index(axis) for axis in range(3))).float().contiguous()
