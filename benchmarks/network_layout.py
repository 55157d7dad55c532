"""residual_unet as it is (channels last, our instance norm) against torch's default layout and InstanceNorm3d.

One training step each, in turn, in one process; medians and the ratio. Run it on a quiet machine.
"""

import statistics
import time

import bench
import torch
from torch import nn

import networks
from networks.parts.blocks import InstanceNorm
from networks.parts.losses import DeepSupervision

PATCH, BATCH, ROUNDS = (40, 56, 40), 2, 7


def main() -> None:
    module = networks.load("residual_unet")
    config = module.fit(module.Config(), patch=PATCH, spacing=(1.0, 1.0, 1.0))
    ours = module.build(config, channels=1, classes=3)
    theirs = usual(module.build(config, channels=1, classes=3))
    image, labels = torch.randn(BATCH, 1, *PATCH), torch.randint(0, 3, (BATCH, *PATCH))
    spent: dict[str, list[float]] = {"ours": [], "default layout, InstanceNorm3d": []}
    for _ in range(ROUNDS):
        for (_, seconds), network in zip(spent.items(), (ours, theirs), strict=True):
            seconds.append(step(network, image, labels))
    print(f"{bench.heading()}, torch {torch.__version__}")
    print(f"patch {PATCH}, batch {BATCH}, forward and backward, median of {ROUNDS - 1} after one to warm up")
    medians = {name: statistics.median(seconds[1:]) for name, seconds in spent.items()}
    for name, median in medians.items():
        print(f"{name:<32} {median:6.3f} s")
    print(f"ratio {medians['default layout, InstanceNorm3d'] / medians['ours']:.2f}")


def usual(network: nn.Module) -> nn.Module:
    """The same network as most people write it."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, InstanceNorm):
                setattr(parent, name, UsualNorm(child.weight.numel(), child.slope))
    network = network.to(memory_format=torch.contiguous_format)
    network.register_forward_pre_hook(lambda module, inputs: tuple(x.contiguous() for x in inputs))
    return network


class UsualNorm(nn.InstanceNorm3d):
    """torch's norm, then what is added, then the activation: three passes where ours has one."""

    def __init__(self, channels: int, slope: float) -> None:
        super().__init__(channels, affine=True)
        self.slope = slope

    def forward(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        y = super().forward(x)
        if added is not None:
            y = y + added
        return y if self.slope == 1 else nn.functional.leaky_relu(y, self.slope)


def step(network: nn.Module, image: torch.Tensor, labels: torch.Tensor) -> float:
    started = time.perf_counter()
    DeepSupervision()(network(image), labels).backward()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
