"""A network that learnt a shortcut is found out by its map, and a map that shows nothing by its tests.

In half of the world a small chequered texture stands 7 voxels beside each lesion, which itself cannot be seen: the texture
decides. In the other half the lesion is bright and the texture stands anywhere. Noise is everywhere, and half as strong as
the texture. A network learns each half; both are asked where they looked.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from networks import residual_unet
from networks.parts.losses import DeepSupervision
from pipeline import attribution
from pipeline.attribution import unlearnt
from pipeline.explanation import Choice, explain
from pipeline.prediction import Inference
from pipeline.report import Explanation
from preprocessing.plan import Label, Plan, Recipe
from preprocessing.volume import Geometry, Volume

SIDE = 24
NETWORK = residual_unet.Config(width=8, blocks=(1,), strides=((1,) * 3, (2,) * 3), kernels=((3,) * 3,) * 2)
PLAN = Plan(
    name="shortcut", channels=("mr",), labels=(Label(value=1, name="lesion", colour=(230, 159, 0)),), steps=(),
    spacing_mm=(1.0, 1.0, 1.0), patch=(SIDE,) * 3, batch=2, dataset="ab" * 32, recipe=Recipe(mirror=(True,) * 3),
)  # fmt: skip
STEPS = 200
"""With 150 both networks find the lesions, and the map is as clear; more costs seconds."""
SCANS = range(900, 903)
METHOD = "integrated_gradients"
"""Back to the scan: in a layer the shortcut has come as near to the label as the layer is deep."""


@dataclass(frozen=True, kw_only=True)
class Scan:
    voxels: np.ndarray
    labels: np.ndarray
    texture: np.ndarray
    """With a voxel around it."""


def made(seed: int, has_shortcut: bool) -> Scan:
    random = np.random.default_rng(seed)
    places = np.indices((SIDE,) * 3)
    textured = np.array([random.integers(3, 13), *random.integers(4, SIDE - 4, 2)])
    anywhere = np.array([random.integers(textured[0] + 7, SIDE - 4), *random.integers(5, SIDE - 5, 2)])
    centre = textured + np.array([7, 0, 0]) if has_shortcut else anywhere
    lesion = ((places - centre[:, None, None, None]) ** 2).sum(axis=0) < 4**2
    voxels = random.normal(0, 0.5, lesion.shape) + lesion * (not has_shortcut)
    away = np.abs(places - textured[:, None, None, None]).max(axis=0)
    voxels[away <= 2] = np.where(places.sum(axis=0) % 2, 1.0, -1.0)[away <= 2]
    return Scan(voxels=voxels.astype(np.float32), labels=lesion.astype(np.uint8), texture=away <= 3)


def trained(has_shortcut: bool) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = residual_unet.build(NETWORK, channels=1, classes=2)
    loss, optimiser = DeepSupervision(), torch.optim.AdamW(network.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, STEPS)
    for step in range(STEPS):
        pair = [made(2 * step + number, has_shortcut) for number in range(2)]
        voxels = torch.from_numpy(np.stack([scan.voxels for scan in pair]))[:, None]
        loss(network(voxels), torch.from_numpy(np.stack([scan.labels for scan in pair])).long()).backward()
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
    return network.eval()


@pytest.fixture(scope="module")
def cheat() -> nn.Module:
    return trained(has_shortcut=True)


@pytest.fixture(scope="module")
def honest() -> nn.Module:
    return trained(has_shortcut=False)


def volume(voxels: np.ndarray) -> Volume:
    return Volume(voxels=voxels[None], geometry=Geometry(shape=voxels.shape, affine=np.eye(4)), channels=("mr",))


def found(network: nn.Module, scan: Scan) -> np.ndarray:
    with torch.inference_mode():
        return network(torch.from_numpy(scan.voxels)[None, None])[0].argmax(dim=0).numpy().astype(np.uint8)


def explained(network: nn.Module, scan: Scan, labels: np.ndarray, choice: Choice) -> Explanation:
    (map_,) = explain(volume(scan.voxels), volume(labels), [network], PLAN, Inference(device="cpu"), choice)
    return map_


def energy(map_: Explanation, where: np.ndarray) -> float:
    positive = map_.codes.clip(0).astype(float)
    return float(positive[where].sum() / positive.sum())


def mean_energy(network: nn.Module, has_shortcut: bool, change: Callable[[nn.Module], nn.Module]) -> float:
    """At the texture, over scans that nobody trained on; `change` alters the network once the labels are found."""
    choice = Choice(method=METHOD, tests=False)
    scans = [made(seed, has_shortcut) for seed in SCANS]
    maps = [explained(change(network), scan, found(network, scan), choice) for scan in scans]
    return float(np.mean([energy(map_, scan.texture) for map_, scan in zip(maps, scans, strict=True)]))


pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("name", "has_shortcut"), [("cheat", True), ("honest", False)])
def test_both_networks_find_the_lesion(name: str, has_shortcut: bool, request: pytest.FixtureRequest) -> None:
    """By their scores alone nobody could tell them apart."""
    for scan in (made(seed, has_shortcut) for seed in SCANS):
        labels = found(request.getfixturevalue(name), scan)
        assert 2 * (labels & scan.labels).sum() / (labels.sum() + scan.labels.sum()) > 0.85


def test_the_map_finds_the_texture_that_decides_and_only_where_it_does(cheat: nn.Module, honest: nn.Module) -> None:
    """The texture and the voxel around it are 0.025 of the scan."""
    learnt = mean_energy(cheat, True, lambda network: network)
    assert learnt > 0.7
    assert mean_energy(honest, False, lambda network: network) < 0.05
    assert mean_energy(cheat, True, unlearnt) < min(0.15, learnt / 5)  # not 0.025: it stands out for any weights


def test_the_tests_say_that_the_network_decides_beside_the_label(cheat: nn.Module, honest: nn.Module) -> None:
    said = {True: [], False: []}
    for network, has_shortcut in ((cheat, True), (honest, False)):
        for scan in (made(seed, has_shortcut) for seed in SCANS):
            map_ = explained(network, scan, found(network, scan), Choice(method=METHOD))
            assert map_.faithfulness is not None and map_.faithfulness.failed == (), map_.faithfulness
            said[has_shortcut].append(map_.faithfulness)
    assert all("beside the label" in " ".join(one.noted) for one in said[True])
    assert not any(one.noted for one in said[False])
    assert min(one.deletion_mask for one in said[True]) > 0.8 > 0.4 > max(one.deletion_mask for one in said[False])


def test_a_map_that_passes_is_hirescam_s_of_a_trained_network(honest: nn.Module) -> None:
    for scan in (made(seed, False) for seed in SCANS):
        map_ = explained(honest, scan, found(honest, scan), Choice(layer="down.0"))
        said = map_.faithfulness
        assert said is not None and said.failed == () and said.energy > 0.7, said
        assert said.deletion < said.deletion_random and said.insertion > said.insertion_random


def test_a_broken_method_is_flagged(honest: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same values, each somewhere else."""
    right = attribution.INPUT_METHODS[METHOD]

    def shuffled(*given: object) -> tuple[torch.Tensor, float]:
        map_, score = right(*given)  # type: ignore[arg-type]
        order = torch.randperm(map_.numel(), generator=torch.Generator().manual_seed(0))
        return map_.flatten()[order].view_as(map_), score

    monkeypatch.setitem(attribution.INPUT_METHODS, METHOD, shuffled)
    for scan in (made(seed, False) for seed in SCANS):
        map_ = explained(honest, scan, found(honest, scan), Choice(method=METHOD))
        assert map_.faithfulness is not None and len(map_.faithfulness.failed) >= 2, map_.faithfulness
        assert map_.standing.startswith("failed: without what it marks")
