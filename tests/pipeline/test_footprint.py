"""What a training step takes is counted without computing it, as torch's own allocator counts it."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from networks import residual_unet, segresnet
from networks.parts.losses import DeepSupervision
from pipeline.footprint import Footprint, footprint
from preprocessing.plan import Recipe

RECIPE = Recipe(optimiser="sgd")
PATCH = (24, 16, 16)


def network(module: Any, **options: Any) -> Any:
    config = module.fit(module.Config(**options), patch=PATCH, spacing=(1.0, 1.0, 1.0))
    return lambda: module.build(config, channels=2, classes=4)


@pytest.mark.parametrize(
    ("build", "patch", "batch"),
    [
        (network(residual_unet, width=8, blocks=(1,)), PATCH, 2),
        (network(residual_unet, width=4, plain=True, blocks=(2,), decoder=2, bias=True), PATCH, 2),
        (network(segresnet, width=8, blocks=(1, 1)), PATCH, 2),
    ],
    ids=["residual", "plain", "segresnet"],
)
def test_it_is_what_torchs_allocator_counts_in_a_real_step(build, patch, batch) -> None:
    counted = footprint(build, channels=2, patch=patch, batch=batch, recipe=RECIPE)
    assert counted.peak == pytest.approx(
        allocated(build(), patch, batch), rel=0.06
    )  # the loss's gradients are added up in a copy of their own


@pytest.mark.filterwarnings("ignore")  # of a profiler that looks for a GPU
def allocated(network: nn.Module, patch: tuple[int, int, int], batch: int) -> int:
    """The most that is allocated at once in a second step, and what was there before it."""
    weights = sum(parameter.nbytes for parameter in network.parameters())
    optimiser = torch.optim.SGD(network.train().parameters(), lr=1e-3, momentum=0.9)
    loss = DeepSupervision()
    for _ in range(2):  # the optimiser makes its own in the first step
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
            image, truth = torch.randn(batch, 2, *patch), torch.zeros(batch, *patch, dtype=torch.int64)
            loss(network(image), truth).backward()
        optimiser.step()
        optimiser.zero_grad()
    now = most = 0
    for event in watched.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.device_type().name == "CPU":
            now += event.nbytes()
            most = max(most, now)
    return most + 2 * weights


def test_memory_grows_along_a_straight_line() -> None:
    build = network(residual_unet, width=8)
    one, two, four = (footprint(build, channels=2, patch=PATCH, batch=n).peak for n in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.01)
    step = footprint(build, channels=2, patch=PATCH, batch=2)
    fixed, per_voxel = step.demand(2 * 24 * 16 * 16, "cpu")
    assert fixed * 1e9 + per_voxel * 4 * 24 * 16 * 16 == pytest.approx(
        step.gigabytes("cpu") * 1e9 + four - two, rel=0.01
    )


def test_nothing_of_the_size_of_a_real_step_is_allocated() -> None:
    """A step of 8 windows of 512³ would take terabytes."""
    build = network(residual_unet, width=32)
    assert footprint(build, channels=2, patch=(512, 512, 512), batch=8).peak > 1e12


@pytest.mark.parametrize(("recipe", "copies"), [(Recipe(optimiser="sgd"), 2), (Recipe(), 3), (Recipe(average=0.99), 4)])
def test_what_is_held_are_weights_and_the_optimisers_copies_of_them(recipe, copies) -> None:
    build = network(residual_unet, width=4)
    weights = sum(parameter.nbytes for parameter in build().parameters())
    assert footprint(build, channels=2, patch=PATCH, batch=1, recipe=recipe).held == copies * weights


class Two(nn.Module):
    """Two products, each of which keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv3d(2, 8, 1, bias=False), nn.Conv3d(8, 4, 1, bias=False)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.second(self.first(x))]


def test_half_precision_halves_what_products_keep() -> None:
    loss = lambda outputs, target: outputs[0].float().sum()  # noqa: E731
    kept = {
        precision: footprint(Two, channels=2, patch=(64, 64, 64), batch=2, precision=precision, loss=loss).peak
        for precision in ("float32", "bfloat16")
    }
    assert kept["bfloat16"] < 0.8 * kept["float32"]


def test_the_rest_of_the_process_is_added() -> None:
    step = Footprint(held=10**9, peak=4 * 10**9)
    assert 4 < step.gigabytes("cpu") < step.gigabytes("cuda")
