"""Maps are exactly the stitched model's: each is held against a gradient taken plainly through the whole inference."""

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import networks
from networks.parts.attentive import Attentive
from pipeline.attribution import AVERAGING, METHODS, blurred, chosen_layer, feel, see, undisturbed
from pipeline.config import Segment
from pipeline.errors import UsageError
from pipeline.explanation import Choice, Scene, explain, stitched
from pipeline.lens import Lens
from pipeline.package import ModelPackage
from pipeline.prediction import Inference, mirrorings
from pipeline.report import Explanation
from pipeline.scan import Scan
from pipeline.segmentation import Model, segment_case
from pipeline.stream import Windows
from preprocessing import files
from preprocessing.patches import bell, grid
from preprocessing.plan import Label, Plan
from preprocessing.steps import Crop, Orient, Pad, Resample, Trail
from preprocessing.volume import Geometry, Volume

PATCH = (16, 16, 16)
SILENT = Choice(tests=False, attention=False)


class Tower(nn.Module):
    """Two steps down, two up; forgets at random in training."""

    def __init__(self, channels: int = 1, norm: type[nn.Module] = nn.InstanceNorm3d) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv3d(channels, 4, 3, 1, 1), norm(4), nn.LeakyReLU(0.1, inplace=True))
        self.middle = nn.Sequential(nn.Conv3d(4, 8, 3, 2, 1), norm(8), nn.LeakyReLU(0.1, inplace=True))
        self.deep = nn.Sequential(nn.Conv3d(8, 8, 3, 2, 1), norm(8), nn.LeakyReLU(0.1, inplace=True))
        self.forget = nn.Dropout(0.2)
        self.merge = nn.Sequential(nn.Conv3d(20, 4, 3, 1, 1), norm(4), nn.LeakyReLU(0.1))
        self.head = nn.Conv3d(4, 3, 1)
        self.head.bias = nn.Parameter(torch.tensor([0.5, 0.0, 2.0]))  # a mean margin that does not cancel

    def forward(self, x: Tensor) -> Tensor:
        fine = self.first(x)
        middle = self.middle(fine)
        deep = self.forget(self.deep(middle))
        up = [functional.interpolate(each, size=x.shape[2:], mode="trilinear") for each in (middle, deep)]
        return self.head(self.merge(torch.cat([fine, *up], dim=1)))


def explained(network: nn.Module) -> dict[str, nn.Module]:
    """What networks of this file offer, as a file of networks/ does."""
    names = ("merge", "tokens", "again", "pair", "deep", "middle", "first", "smooth")
    modules = dict(network.named_modules())
    return {name: modules[name] for name in names if name in modules}


def a_tower(seed: int = 0, channels: int = 1, norm: type[nn.Module] = nn.InstanceNorm3d) -> Tower:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Tower(channels, norm)


def a_plan(make_plan: Callable[..., Plan], channels: tuple[str, ...] = ("mr",)) -> Plan:
    """One whose scans are not resampled: voxels can be counted."""
    return replace(make_plan(channels), steps=(Orient(), Pad(shape=PATCH)), spacing_mm=(1.0, 1.0, 1.0))


def a_volume(voxels: np.ndarray, affine: np.ndarray | None = None) -> Volume:
    geometry = Geometry(shape=voxels.shape[1:], affine=np.eye(4) if affine is None else affine)
    return Volume(voxels=voxels, geometry=geometry, channels=tuple(str(n) for n in range(len(voxels))))


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def two_lesions(*shape: int) -> np.ndarray:
    labels = np.zeros((1, *shape), np.uint8)
    labels[0, 2:7, 3:8, 4:9] = 7
    labels[0, -6:-2, -5:-2, -6:-2] = 7
    labels[0, 8:12, 8:12, 8:12] = 1
    return labels


def a_scene(scan: np.ndarray, plan: Plan, overlap: float) -> Scene:
    volume = a_volume(scan)
    return Scene(
        scan=torch.from_numpy(scan),
        windows=Windows.over(volume.geometry.shape, plan.patch, overlap),
        trail=Trail(taken=()),
        geometry=volume.geometry,
        labels=a_volume(np.zeros((1, *scan.shape[1:]), np.uint8)),
        plan=plan,
    )


def values(explanation: Explanation) -> np.ndarray:
    return explanation.codes.astype(np.float64) * explanation.scale


# exactly the stitched model's


def plainly(
    scan: np.ndarray,
    mask: np.ndarray,
    towers: list[nn.Module],
    temperatures: tuple[float, ...],
    how: Inference,
    channel: int,
) -> tuple[float, np.ndarray]:
    """The score by its definition, and its gradient times the scan: every window of every fold is held at once."""
    given = torch.from_numpy(scan).requires_grad_(True)
    weight = torch.from_numpy(np.einsum("i,j,k->ijk", *(bell(side) for side in PATCH)))
    axes = [axis for axis, mirrored in zip((2, 3, 4), how.mirrors, strict=True) if mirrored]
    flips = [some for size in range(len(axes) + 1) for some in combinations(axes, size)] if how.flips else [()]
    score = torch.zeros((), dtype=torch.float64)
    for tower, temperature in zip(towers, temperatures, strict=True):
        total, sums = torch.zeros(3, *scan.shape[1:]), torch.zeros(scan.shape[1:])
        for i, j, k in grid(scan.shape[1:], PATCH, how.overlap):
            place = (slice(i, i + 16), slice(j, j + 16), slice(k, k + 16))
            window = given[(slice(None), *place)][None]
            logits = torch.stack([tower(window.flip(some)).flip(some)[0] for some in flips]).mean(dim=0)
            total[(slice(None), *place)] += weight * logits
            sums[place] += weight
        logits = (total / sums).double()
        others = [other for other in range(3) if other != channel]
        margin = logits[channel] - logits[others].mean(dim=0)
        score = score + margin[torch.from_numpy(mask)].mean() / temperature / len(towers)
    score.backward()
    assert given.grad is not None
    return float(score.detach()), (given.grad * given.detach()).sum(dim=0).numpy()


@pytest.mark.parametrize("overlap", [0.25, 0.5])
@pytest.mark.parametrize("shape", [(16, 16, 16), (17, 30, 20), (24, 16, 33)])
@pytest.mark.parametrize(("flips", "folds"), [(False, 1), (True, 1), (False, 2)])
def test_windows_add_up_to_the_stitched_score_and_to_its_gradient(
    shape: tuple[int, int, int], overlap: float, flips: bool, folds: int, make_plan: Callable[..., Plan]
) -> None:
    towers = [a_tower(seed, channels=2).eval() for seed in range(folds)]
    temperatures = (1.5, 0.7)[:folds]
    scan, mask = noise(2, *shape), two_lesions(*shape)[0] == 7
    plan = a_plan(make_plan, ("t1", "t2"))
    how = Inference(device="cpu", overlap=overlap, flips=flips, mirrors=(True, False, True))
    lens = Lens.through(towers, temperatures, plan, how, "gradient_x_input", "")
    with undisturbed(towers):
        made = stitched(a_scene(scan, plan, overlap), lens, torch.from_numpy(mask), channel=2)
    ours = np.zeros(shape, np.float32)
    ours[tuple(slice(f, f + n) for f, n in zip(made.first, made.look.map.shape, strict=True))] = made.look.map.numpy()
    score, map_ = plainly(scan, mask, towers, temperatures, how, channel=2)
    assert made.look.score == pytest.approx(score, rel=1e-5)
    assert np.abs(ours - map_).max() < 1e-5 * np.abs(map_).max()


def test_only_windows_that_meet_the_mask_have_a_part(make_plan: Callable[..., Plan]) -> None:
    plan, tower = a_plan(make_plan), a_tower().eval()
    mask = torch.zeros(16, 16, 64, dtype=torch.bool)
    mask[4:8, 4:8, 1:3] = True
    scene = a_scene(noise(1, 16, 16, 64), plan, 0.5)
    lens = Lens.through([tower], (), plan, Inference(device="cpu"), "gradient_x_input", "")
    made = stitched(scene, lens, mask, channel=1)
    assert made.first == (0, 0, 0) and made.look.map.shape == (16, 16, 16)  # of seven windows one
    assert made.fullest == (0, 0, 0)


def test_hirescam_adds_activation_times_gradient_and_keeps_its_sum(make_plan: Callable[..., Plan]) -> None:
    shape, plan, tower = (17, 30, 20), a_plan(make_plan), a_tower().eval()
    scan, mask = noise(1, *shape), torch.from_numpy(two_lesions(*shape)[0] == 7)
    scene = a_scene(scan, plan, 0.5)
    lens = Lens.through([tower], (), plan, Inference(device="cpu"), "hirescam", "middle")
    with undisturbed([tower]):
        made = stitched(scene, lens, mask, channel=2)
        expected = 0.0
        for start in scene.windows.starts:
            weight = mask[scene.windows.place(start)] * scene.windows.share(start) / mask.sum()
            kept: list[Tensor] = []
            handle = tower.middle.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out))
            logits = tower(scene.window(start)[None].requires_grad_(True))[0]
            handle.remove()
            (gradient,) = torch.autograd.grad(((logits[2] - logits[:2].mean(dim=0)) * weight).sum(), kept)
            expected += float((gradient * kept[0]).sum().detach())
    assert float(made.look.map.sum()) == pytest.approx(expected, rel=1e-4)


def test_hirescam_is_captums_layer_gradient_times_activation() -> None:
    from captum.attr import LayerGradientXActivation

    tower, window = a_tower().eval(), torch.from_numpy(noise(1, *PATCH))
    score = lambda logits: logits[2, 4:8, 4:8, 4:8].mean() - logits[0, 4:8, 4:8, 4:8].mean()  # noqa: E731
    with undisturbed([tower]):
        ours = see(tower, window, score, "hirescam", "deep")
        given = window[None].clone().requires_grad_(True)
        theirs = LayerGradientXActivation(lambda x: score(tower(x)[0])[None], tower.deep).attribute(given)
    theirs = functional.interpolate(theirs.detach().sum(dim=1)[None], size=PATCH, mode="trilinear")[0, 0] / 4**3
    torch.testing.assert_close(ours.map, theirs, rtol=1e-4, atol=1e-8)
    assert ours.score == pytest.approx(float(score(tower(window[None])[0]).detach()), rel=1e-5)


def test_a_constant_added_to_all_logits_changes_nothing(make_plan: Callable[..., Plan]) -> None:
    plan, tower, shifted = a_plan(make_plan), a_tower().eval(), a_tower().eval()
    shape = (16, 20, 16)
    nn.init.constant_(tower.head.bias, 0.0)
    nn.init.constant_(shifted.head.bias, 5.0)
    scan, labels = a_volume(noise(1, *shape)), a_volume(two_lesions(*shape))
    one, other = (
        explain(scan, labels, [network], plan, Inference(device="cpu"), SILENT)[0] for network in (tower, shifted)
    )
    assert one.score == pytest.approx(other.score, abs=1e-5)
    np.testing.assert_allclose(values(one), values(other), atol=1e-4 * np.abs(values(one)).max() + one.scale)


def test_of_regions_each_is_explained_by_its_own_logits(make_plan: Callable[..., Plan]) -> None:
    regions = (
        Label(value=1, name="whole", colour=(1, 2, 3), parts=(1, 2, 3)),
        Label(value=2, name="core", colour=(1, 2, 3), parts=(2, 3)),
        Label(value=3, name="active", colour=(1, 2, 3), parts=(3,)),
    )
    plan, tower = replace(a_plan(make_plan), labels=regions), a_tower().eval()
    labels = np.ones((1, *PATCH), np.uint8)
    labels[0, 4:8, 4:8, 4:8] = 3
    scan = noise(1, *PATCH)
    made = explain(a_volume(scan), a_volume(labels), [tower], plan, Inference(device="cpu"), SILENT)
    with torch.no_grad():
        logits = tower(torch.from_numpy(scan)[None])[0].numpy()
    inside = labels[0] == 3
    expected = {"whole": logits[0].mean(), "core": logits[1][inside].mean(), "active": logits[2][inside].mean()}
    assert {each.label: each.score for each in made} == pytest.approx(expected, rel=1e-4)


# lesions


def test_the_maps_of_lesions_by_their_voxels_are_the_map_of_the_label(make_plan: Callable[..., Plan]) -> None:
    plan, tower, shape = a_plan(make_plan), a_tower().eval(), (20, 24, 30)
    labels, scan = two_lesions(*shape), noise(1, *shape)
    for method in ("hirescam", "gradient_x_input", "layercam"):
        lens = Lens.through([tower], (), plan, Inference(device="cpu"), method, "")
        scene = a_scene(scan, plan, 0.5)
        mask = labels[0] == 7
        parts = [mask.copy(), mask.copy()]
        parts[0][10:], parts[1][:10] = False, False
        maps = []
        with undisturbed([tower]):
            for each in (mask, *parts):
                made = stitched(scene, lens, torch.from_numpy(each), channel=2)
                whole = np.zeros(shape)
                place = zip(made.first, made.look.map.shape, strict=True)
                whole[tuple(slice(first, first + size) for first, size in place)] = made.look.map.numpy()
                maps.append(whole * each.sum())
        np.testing.assert_allclose(maps[0], maps[1] + maps[2], atol=1e-5 * np.abs(maps[0]).max())


class Local(nn.Module):
    """Finds what is bright within two voxels; nothing farther away has a say."""

    def __init__(self) -> None:
        super().__init__()
        self.smooth, self.merge = nn.AvgPool3d(2), nn.Identity()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        bright = functional.interpolate(self.smooth(x[:, :1]) ** 2, scale_factor=2, mode="nearest") * self.scale
        return self.merge(torch.cat([1 - bright, torch.zeros_like(bright), bright], dim=1))


def test_only_the_map_of_the_lesion_that_changed_changes(make_plan: Callable[..., Plan]) -> None:
    plan, shape = a_plan(make_plan), (16, 16, 48)
    voxels, labels = np.abs(noise(1, *shape)), np.zeros((1, *shape), np.uint8)
    for first, size in ((2, 5), (20, 4), (38, 3)):
        labels[0, 4 : 4 + size, 4 : 4 + size, first : first + size] = 7
    changed = voxels.copy()
    changed[0, 4:8, 4:8, 20:24] *= 1.5  # the second largest

    def maps(scan: np.ndarray) -> dict[int | None, np.ndarray]:
        made = explain(
            a_volume(scan),
            a_volume(labels),
            [Local()],
            plan,
            Inference(device="cpu"),
            replace(SILENT, labels=("lesion",)),
        )
        return {each.part: values(each) for each in made}

    before, after = maps(voxels), maps(changed)
    assert list(before) == [None, 1, 2, 3]
    assert np.abs(after[2] - before[2]).max() > 0.1 * np.abs(before[2]).max()
    for part in (1, 3):
        assert np.array_equal(before[part], after[part])


def test_the_largest_parts_are_explained_and_a_single_one_is_the_label(make_plan: Callable[..., Plan]) -> None:
    plan, shape = a_plan(make_plan), (16, 16, 48)
    labels = two_lesions(*shape)
    labels[0, 1, 1, 40] = 7
    choice = replace(SILENT, parts=2, method="gradient_x_input")
    made = explain(a_volume(noise(1, *shape)), a_volume(labels), [a_tower()], plan, Inference(device="cpu"), choice)
    assert [each.name for each in made] == [
        "liver-gradient_x_input",
        "lesion-gradient_x_input",
        "lesion-1-gradient_x_input",
        "lesion-2-gradient_x_input",
    ]


# nothing is disturbed


def trained(asks: bool, make_plan: Callable[..., Plan]) -> tuple[dict[str, Tensor], Tensor]:
    """Twenty steps with dropout and momentum, a frozen stage and a layer in evaluation; the weights and the next random."""
    torch.manual_seed(1)
    plan, tower = a_plan(make_plan), a_tower(norm=nn.BatchNorm3d).train()
    tower.first.requires_grad_(False)
    tower.deep[1].eval()
    optimiser = torch.optim.SGD([p for p in tower.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    scan, truth = torch.from_numpy(noise(2, 1, *PATCH)), torch.randint(0, 3, (2, *PATCH))
    for step in range(20):
        optimiser.zero_grad()
        functional.cross_entropy(tower(scan), truth).backward()
        if asks and step % 5 == 0:
            with torch.inference_mode(step % 2 == 0), torch.autocast("cpu", torch.bfloat16):
                undisturbedly(tower, plan)
        optimiser.step()
    return {key: value.clone() for key, value in tower.state_dict().items()}, torch.rand(3)


def undisturbedly(tower: Tower, plan: Plan) -> None:
    """Every kind of method, between a gradient and its step; all that could be touched is looked at before and after."""

    def state() -> list[object]:
        modules = list(tower.modules())
        hooks = [len(m._forward_hooks) + len(m._backward_hooks) + len(m._forward_pre_hooks) for m in modules]
        flags = [parameter.requires_grad for parameter in tower.parameters()]
        return [hooks, flags, [m.training for m in modules], np.random.get_state()[1].tolist()]

    before, rng = state(), torch.get_rng_state()
    grads = [(p.grad, None if p.grad is None else p.grad.clone()) for p in tower.parameters()]
    scan, labels = a_volume(noise(1, *PATCH)), a_volume(two_lesions(*PATCH))
    for method in ("hirescam", "gradcam", "gradient_x_input", "integrated_gradients"):
        choice = Choice(method=method, tests=method == "hirescam", labels=("lesion",), parts=0)
        made = explain(scan, labels, [tower], plan, Inference(device="cpu", flips=False), choice)
        assert made and not any(each.blank for each in made)
    assert state() == before and torch.equal(torch.get_rng_state(), rng)
    for parameter, (grad, copy) in zip(tower.parameters(), grads, strict=True):
        assert parameter.grad is grad and (copy is None or torch.equal(grad, copy))


def test_a_training_with_explanations_is_the_same_to_the_bit(make_plan: Callable[..., Plan]) -> None:
    (weights, drawn), (others, also) = trained(True, make_plan), trained(False, make_plan)
    assert all(torch.equal(weight, others[key]) for key, weight in weights.items())
    assert torch.equal(drawn, also)


def test_no_random_state_is_touched() -> None:
    with undisturbed([a_tower()]):
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        random.random(), np.random.rand(), torch.rand(1)
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_an_error_leaves_everything_as_it_was(make_plan: Callable[..., Plan]) -> None:
    tower = a_tower().train()
    labels = a_volume(two_lesions(*PATCH))
    with pytest.raises(UsageError):
        explain(
            a_volume(noise(1, *PATCH)),
            labels,
            [tower],
            a_plan(make_plan),
            Inference(device="cpu"),
            Choice(layer="none"),
        )
    assert all(module.training and not module._forward_hooks for module in tower.modules())
    assert all(parameter.requires_grad for parameter in tower.parameters())


# every network


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("thin", [False, True], ids=["volume", "plane"])
@pytest.mark.parametrize("name", networks.available())
def test_every_network_is_explained(name: str, thin: bool, channels: int, make_plan: Callable[..., Plan]) -> None:
    if name == "segresnet" and thin:
        pytest.skip("MONAI's halves every axis")
    module = networks.load(name)
    config = module.fit(module.Config(width=4), patch=(1, 32, 32) if thin else (16, 16, 16), spacing=(1.0, 1.0, 1.0))
    d, h, w = (
        -(-side // n) * n for side, n in zip((1, 32, 32) if thin else (16,) * 3, module.divisor(config), strict=True)
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = module.build(config, channels=channels, classes=3)
    names = tuple("ab"[:channels])
    plan = replace(a_plan(make_plan, names), patch=(d, h, w), steps=(Orient(), Pad(shape=(d, h, w))))
    shape = (d, h, w + 5)
    labels = np.zeros((1, *shape), np.uint8)
    labels[0, : max(1, d // 2), 4:12, 4:12] = 7
    scan = a_volume(noise(channels, *shape))
    how = Inference(device="cpu")
    (made, *attention) = explain(scan, a_volume(labels), [network], plan, how, Choice(tests=False))
    assert made.label == "lesion" and made.blank == "" and not made.warnings
    assert made.layer != next(iter(module.explained(network)))
    assert np.abs(made.codes).max() == 127 and made.health is not None
    assert all(each.method == "attention" and each.label == "" and each.score is None for each in attention)
    assert len(attention) <= 4


NO_MAP_OF_ATTENTION = {"residual_unet", "segresnet", "frequency_unet"}
"""Whose attention there is none by default, or looks at channels, frequencies and slices."""


@pytest.mark.parametrize("name", networks.available())
def test_networks_whose_attention_has_places_show_it(name: str, make_plan: Callable[..., Plan]) -> None:
    module = networks.load(name)
    config = module.fit(module.Config(width=4), patch=(16, 16, 16), spacing=(1.0, 1.0, 1.0))
    network = module.build(config, channels=1, classes=3)
    choice = Choice(tests=False, labels=("liver",))
    plan = replace(a_plan(make_plan), patch=tuple(-(-16 // n) * n for n in module.divisor(config)))
    blank, *attention = explain(
        a_volume(noise(1, *plan.patch)), a_volume(np.zeros((1, *plan.patch), np.uint8)), [network], plan,
        Inference(device="cpu"), choice,
    )  # fmt: skip
    assert blank.blank
    assert bool(attention) == (name not in NO_MAP_OF_ATTENTION)
    assert all(each.codes.min() >= 0 for each in attention)  # what is a weight is no vote


# layers


class Odd(nn.Module):
    """Layers that put out what is no map [B C i j k]."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv3d(1, 8, 2, 2)
        self.tokens = nn.LayerNorm(8)  # channels last
        self.again = nn.LeakyReLU(0.1)
        self.pair = Pair()
        self.leave = nn.ConvTranspose3d(8, 3, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(self.enter(x).movedim(1, -1)).movedim(-1, 1)  # sides of 8, 8, 8 and 8 channels
        return self.leave(sum(self.pair(self.again(self.again(x)))))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, -0.5 * x


@pytest.mark.parametrize(
    ("layer", "words"),
    [("tokens", "channels elsewhere"), ("again", "ran 2 times"), ("pair", "several things"), ("tokns", "did you mean")],
)
def test_a_layer_that_is_no_map_is_refused_with_the_reason(layer: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        chosen_layer(Odd(), 1, PATCH, layer)


def test_a_network_without_a_layer_to_explain_names_the_methods_that_need_none() -> None:
    with pytest.raises(UsageError, match="gradient_x_input"):
        chosen_layer(Odd(), 1, PATCH)
    with pytest.raises(UsageError, match="gradient_x_input"):
        chosen_layer(nn.Conv3d(1, 2, 1), 1, PATCH)


def test_by_default_half_of_the_resolution_is_explained_and_never_the_last_step(make_plan) -> None:
    tower = a_tower()
    assert chosen_layer(tower, 1, PATCH).name == "middle"
    assert chosen_layer(tower, 1, PATCH, "merge").is_last
    made = explain(
        a_volume(noise(1, *PATCH)), a_volume(two_lesions(*PATCH)), [tower], a_plan(make_plan), Inference(device="cpu"),
        replace(SILENT, layer="merge", parts=0),
    )  # fmt: skip
    assert all("the answer once more" in each.warnings[0] for each in made)


def test_of_two_layers_of_one_resolution_the_encoders_is_explained() -> None:
    module = networks.load("residual_unet")
    config = module.fit(module.Config(width=4), patch=(32, 32, 32), spacing=(1.0, 1.0, 1.0))
    assert chosen_layer(module.build(config, channels=1, classes=3), 1, (32, 32, 32)).name == "down.1"  # not merge.1


class Flat(nn.Module):
    """A network of planes, which drops the thin axis inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, 1, 1)
        self.middle = nn.Conv2d(4, 4, 2, 2)
        self.merge = nn.ConvTranspose2d(4, 3, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(torch.relu(self.middle(self.first(x[:, :, 0])))).unsqueeze(2)


def test_a_network_of_planes_is_explained_on_its_thin_windows() -> None:
    network = Flat()
    assert chosen_layer(network, 1, (1, 16, 16)).name == "middle"
    with undisturbed([network]):
        felt = feel(network, torch.ones(1, 1, 16, 16), lambda logits: logits[0].sum(), "middle")
    assert felt.activations.shape == felt.gradients.shape == (1, 4, 1, 8, 8)


# methods


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_signed_map_and_says_what_it_is_not(method: str, make_plan: Callable[..., Plan]) -> None:
    shape = (16, 16, 20)
    made = explain(
        a_volume(noise(1, *shape)), a_volume(two_lesions(*shape)), [a_tower()], a_plan(make_plan), Inference(device="cpu"),
        replace(SILENT, method=method, labels=("lesion",), parts=0),
    )  # fmt: skip
    (one,) = made
    assert np.abs(one.codes).max() == 127 and one.scale > 0 and one.unit == "logits per ml"
    assert (one.layer == "input") == (one.health is None)
    assert bool(one.warnings) == (method in (*AVERAGING, "occlusion"))


def test_integrated_gradients_add_up_to_what_blurring_takes_away() -> None:
    tower, window = a_tower(norm=nn.BatchNorm3d).eval(), torch.from_numpy(noise(1, *PATCH))
    score = lambda logits: logits[2, 4:8].mean()  # noqa: E731
    with undisturbed([tower]):
        with torch.no_grad():
            lost = float(score(tower(window[None])[0]) - score(tower(blurred(window)[None])[0]))
        seen = see(tower, window, score, "integrated_gradients", "input")
    assert float(seen.map.sum()) == pytest.approx(lost, rel=0.02)


@pytest.mark.parametrize(("norm", "warns"), [(nn.InstanceNorm3d, True), (nn.BatchNorm3d, False)])
def test_gradcam_warns_where_a_norm_makes_the_mean_gradient_vanish(
    norm: type[nn.Module], warns: bool, make_plan: Callable[..., Plan]
) -> None:
    tower = Bare(norm)
    (made,) = explain(
        a_volume(noise(1, *PATCH)), a_volume(two_lesions(*PATCH)), [tower], a_plan(make_plan), Inference(device="cpu"),
        replace(SILENT, method="gradcam", layer="middle", labels=("lesion",), parts=0),
    )  # fmt: skip
    assert made.health is not None
    assert (made.health < 0.1) == warns == any("use hirescam" in words for words in made.warnings)


class Bare(nn.Module):
    """A convolution in front of a norm, as people choose it."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.merge = nn.Identity()
            self.middle = nn.Conv3d(1, 8, 2, 2)
            self.norm = norm(8)
            self.head = nn.ConvTranspose3d(8, 3, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(self.head(torch.relu(self.norm(self.middle(x)))))


def test_gradcams_weights_are_pooled_over_all_windows(make_plan: Callable[..., Plan]) -> None:
    """Two windows without overlap are one feature map twice as long."""
    plan, network = a_plan(make_plan), Bare(nn.BatchNorm3d).eval()
    scan, mask = noise(1, 16, 16, 32), torch.zeros(16, 16, 32, dtype=torch.bool)
    mask[4:12, 4:12, 4:28] = True
    lens = Lens.through([network], (), plan, Inference(device="cpu", overlap=0.0), "gradcam", "middle")
    scene = a_scene(scan, plan, 0.0)
    with undisturbed([network]):
        made = stitched(scene, lens, mask, channel=2)
        felt = feel(
            network, torch.from_numpy(scan), lambda logits: (logits[2] - logits[:2].mean(dim=0))[mask].mean(), "middle"
        )
    weights = felt.gradients.mean(dim=(2, 3, 4), keepdim=True)
    cam = (weights * felt.activations).sum(dim=1)[None]
    expected = functional.interpolate(cam, size=scan.shape[1:], mode="trilinear")[0, 0] / 2**3
    for side in (slice(0, 15), slice(17, 32)):  # where they meet, each window repeats its edge
        torch.testing.assert_close(made.look.map[..., side], expected[..., side], rtol=1e-4, atol=1e-9)


def test_a_cross_check_brings_captums_map_and_how_far_both_agree(make_plan: Callable[..., Plan]) -> None:
    first, beside = explain(
        a_volume(noise(1, *PATCH)), a_volume(two_lesions(*PATCH)), [a_tower()], a_plan(make_plan), Inference(device="cpu"),
        replace(SILENT, cross_check=True, labels=("lesion",), parts=0),
    )  # fmt: skip
    assert (first.method, beside.method, beside.layer) == ("hirescam", "integrated_gradients", "input")
    assert first.agreement is not None and -1 <= first.agreement <= 1 and beside.agreement is None
    assert (first.agreement < 0.2) == any("matter elsewhere" in words for words in first.warnings)


def test_a_map_is_tested_in_the_window_that_holds_most_of_it(make_plan: Callable[..., Plan]) -> None:
    scan, labels = np.zeros((1, 16, 16, 20), np.float32), np.zeros((1, 16, 16, 20), np.uint8)
    scan[0, 4:10, 4:10, 4:10], labels[0, 4:10, 4:10, 4:10] = 3, 7
    (made,) = explain(
        a_volume(scan + 0.05 * noise(*scan.shape)), a_volume(labels), [Local()], a_plan(make_plan), Inference(device="cpu"),
        Choice(labels=("lesion",), attention=False),
    )  # fmt: skip
    assert made.faithfulness is not None
    assert made.faithfulness.energy > 0.9 and made.faithfulness.deletion < made.faithfulness.deletion_random


def test_the_same_case_is_explained_and_judged_the_same(make_plan: Callable[..., Plan]) -> None:
    how = Inference(device="cpu")
    choice = Choice(labels=("lesion",), parts=0)
    scan, labels = a_volume(noise(1, *PATCH)), a_volume(two_lesions(*PATCH))
    (one,), (other,) = (explain(scan, labels, [a_tower()], a_plan(make_plan), how, choice) for _ in "12")
    assert np.array_equal(one.codes, other.codes) and one.scale == other.scale
    assert one.faithfulness is not None and one.faithfulness == other.faithfulness


class Rigid(Tower):
    """Has weights for windows of one size alone."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != PATCH:
            raise RuntimeError("another size")
        return super().forward(x)


def test_a_network_of_windows_of_one_size_is_explained_too() -> None:
    assert chosen_layer(Rigid(), 1, PATCH).name == "middle"


# nothing to explain


@pytest.mark.parametrize(
    ("choice", "expected"), [(SILENT, 0), (replace(SILENT, labels=("lesion", "liver")), 2)], ids=["any", "by name"]
)
def test_what_was_not_found_is_blank_where_it_was_asked_for(choice: Choice, expected: int, make_plan) -> None:
    made = explain(
        a_volume(noise(1, *PATCH)), a_volume(np.zeros((1, *PATCH), np.uint8)), [a_tower()], a_plan(make_plan),
        Inference(device="cpu"), choice,
    )  # fmt: skip
    assert len(made) == expected
    assert all(each.blank == f"no {each.label} was found" for each in made)
    assert not any(each.codes.any() or each.scale for each in made)


def test_a_lesion_that_the_network_never_saw_is_blank(make_plan: Callable[..., Plan]) -> None:
    plan = replace(a_plan(make_plan), steps=(Crop(margin=0), Pad(shape=PATCH)))
    scan, labels = np.zeros((1, 24, 24, 24), np.float32), np.zeros((1, 24, 24, 24), np.uint8)
    scan[0, 4:20, 4:20, 4:20] = noise(16, 16, 16) + 5
    labels[0, :2, :2, :2], labels[0, 8:12, 8:12, 8:12] = 7, 1
    liver, lesion = explain(a_volume(scan), a_volume(labels), [a_tower()], plan, Inference(device="cpu"), SILENT)
    assert liver.blank == "" and "is left" in lesion.blank and not lesion.codes.any()


class Stubborn(nn.Module):
    """Says the same of every scan."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value
        self.merge, self.first = nn.Identity(), nn.AvgPool3d(2)

    def forward(self, x: Tensor) -> Tensor:
        seen = functional.interpolate(self.first(x), scale_factor=2)
        return self.merge(torch.cat([x * 0, seen * self.value, seen * 0], dim=1))


@pytest.mark.parametrize(("value", "words"), [(0.0, "changes the score"), (float("inf"), "no numbers")])
@pytest.mark.parametrize("method", ["hirescam", "gradient_x_input"])
def test_a_network_that_does_not_look_has_a_blank_map(value: float, words: str, method: str, make_plan) -> None:
    labels = np.zeros((1, *PATCH), np.uint8)
    labels[0, 4:8, 4:8, 4:8] = 1
    (made,) = explain(
        a_volume(noise(1, *PATCH)), a_volume(labels), [Stubborn(value)], a_plan(make_plan), Inference(device="cpu"),
        replace(SILENT, method=method),
    )  # fmt: skip
    assert words in made.blank and not made.codes.any() and made.scale == 0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"method": "hirescan"}, "did you mean"), ({"parts": 201}, "200"), ({"parts": -1}, "0 to 200")],
)
def test_a_choice_that_makes_no_sense_is_refused(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Choice(**wrong)


def test_a_label_nobody_knows_is_refused_before_anything_is_run(make_plan: Callable[..., Plan]) -> None:
    volume = a_volume(noise(1, *PATCH))
    with pytest.raises(UsageError, match="did you mean 'lesion'"):
        explain(volume, volume, [], a_plan(make_plan), Inference(device="cpu"), Choice(labels=("lesions",)))


# where it lies


ORIENTATIONS = {
    "LPS": np.diag([-1.0, -1.0, 1.0]),
    "SAR": np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]),
    "oblique": np.array([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]]) @ np.diag([-1.0, 1.0, -1.0]),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("method", ["hirescam", "gradient_x_input"])
def test_the_peak_lies_on_the_lesion_in_millimetres(orientation: str, method: str, make_plan) -> None:
    shape, spacing = (30, 45, 23), np.array([1.5, 1.0, 2.5])
    affine = np.eye(4)
    affine[:3, :3] = ORIENTATIONS[orientation] @ np.diag(spacing)
    affine[:3, 3] = (-31, 17, 5)
    geometry = Geometry(shape=shape, affine=affine)
    centre_mm = geometry.to_world(np.array([8.0, 31.0, 15.0]))
    places_mm = geometry.to_world(np.moveaxis(np.indices(shape), 0, -1).reshape(-1, 3)).reshape(*shape, 3)
    away = np.linalg.norm(places_mm - centre_mm, axis=-1)
    scan = (3 * np.exp(-((away / 6) ** 2))).astype(np.float32)
    plan = replace(
        make_plan(),
        steps=(Orient(), Resample(spacing_mm=(2.0, 2.0, 2.0)), Pad(shape=PATCH)),
        spacing_mm=(2.0, 2.0, 2.0),
    )
    labels = np.where(away < 6, 7, 0).astype(np.uint8)
    (made,) = explain(
        a_volume(scan[None], affine), a_volume(labels[None], affine), [Local()], plan, Inference(device="cpu"),
        replace(SILENT, method=method),
    )  # fmt: skip
    assert made.codes.shape == shape
    peak_mm = places_mm[np.unravel_index(made.codes.argmax(), shape)]
    assert np.linalg.norm(peak_mm - centre_mm) < 4  # a voxel of the layer
    centroid_mm = (places_mm * made.codes[..., None].clip(0)).sum(axis=(0, 1, 2)) / made.codes.clip(0).sum(dtype=float)
    assert np.linalg.norm(centroid_mm - centre_mm) < 1


def test_a_maps_millilitres_add_up_to_what_it_explains(make_plan: Callable[..., Plan]) -> None:
    """In logits per millilitre a map means the same on every grid."""
    affine = np.diag([1.0, 1.0, 1.5, 1.0])
    scan, labels = np.zeros((1, 40, 40, 30), np.float32), np.zeros((1, 40, 40, 30), np.uint8)
    scan[0, 14:24, 14:24, 10:18], labels[0, 14:24, 14:24, 10:18] = 2, 7
    plan = replace(
        a_plan(make_plan), steps=(Resample(spacing_mm=(2.0, 2.0, 3.0)), Pad(shape=PATCH)), spacing_mm=(2, 2, 3)
    )
    (made,) = explain(
        a_volume(scan, affine), a_volume(labels, affine), [Local()], plan, Inference(device="cpu"),
        replace(SILENT, method="gradient_x_input"),
    )  # fmt: skip
    summed = values(made).sum() * 1.5 / 1000
    # the margin is 1.5 b² - 0.5 of a brightness b; a gradient times its input doubles what is squared
    assert summed == pytest.approx(2 * (made.score + 0.5), rel=0.05)


def test_maps_compare_by_their_scales(make_plan: Callable[..., Plan]) -> None:
    labels = a_volume(two_lesions(*PATCH))
    scan = a_volume(np.abs(noise(1, *PATCH)))
    strong, weak = Local(), Local()
    nn.init.constant_(weak.scale, 0.1)
    one, other = (
        explain(scan, labels, [net], a_plan(make_plan), Inference(device="cpu"), replace(SILENT, labels=("lesion",)))[0]
        for net in (strong, weak)
    )
    assert one.scale == pytest.approx(10 * other.scale, rel=1e-4) and np.array_equal(one.codes, other.codes)


# attention


class Watching(nn.Module):
    """Its attention is the scan itself at places, and something of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.channels = Eye(), Ear()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.places(x), self.channels(x), self.scale * x], dim=1)


class Eye(Attentive):
    def forward(self, x: Tensor) -> Tensor:
        self.show(lambda: x[:, 0])
        return x


class Ear(Attentive):
    def forward(self, x: Tensor) -> Tensor:
        self.show(lambda: x.mean(dim=(2, 3, 4)))
        return x


@pytest.mark.parametrize("flips", [False, True])
def test_attention_is_stitched_as_logits_are(flips: bool, make_plan: Callable[..., Plan]) -> None:
    scan = np.abs(noise(1, 20, 30, 17))
    made = explain(
        a_volume(scan), a_volume(np.zeros(scan.shape, np.uint8)), [Watching(), Watching()], a_plan(make_plan),
        Inference(device="cpu", flips=flips), Choice(method="gradient_x_input"),
    )  # fmt: skip
    (one,) = made
    assert (one.label, one.method, one.layer, one.name) == ("", "attention", "places", "attention-places")
    np.testing.assert_allclose(values(one), scan[0], atol=0.51 * one.scale)


# from file to report


def test_a_scan_is_segmented_the_same_with_and_without(
    tiny: Path, scan_file: Callable[..., Path], tmp_path: Path
) -> None:
    model = Model.load(ModelPackage.load(tiny))
    scan = Scan(case_id="one", paths=(scan_file(tmp_path / "one.nii.gz"),))
    told = {"saliency": {"tests": False, "parts": 1}}
    reports = []
    for name, wanted in (("with", ("labels", "saliency")), ("without", ("labels",))):
        (tmp_path / name).mkdir()
        settings = Segment(outputs=wanted, output_options=told if "saliency" in wanted else {})
        reports.append(segment_case(scan, model, tmp_path / name, settings, Inference(device="cpu")))
    one, other = (files.read(tmp_path / name / "labels.nii.gz") for name in ("with", "without"))
    assert np.array_equal(one.voxels, other.voxels)
    assert reports[0].volumes_ml == reports[1].volumes_ml and reports[0].confidence == reports[1].confidence
    assert "explain" in reports[0].seconds and "explain" not in reports[1].seconds
    assert reports[0].explanations and not reports[1].explanations


def test_mirrorings_are_those_that_inference_averages() -> None:
    assert mirrorings(Inference()) == [()]
    assert mirrorings(Inference(flips=True, mirrors=(True, False, True))) == [(), (2,), (4,), (2, 4)]
