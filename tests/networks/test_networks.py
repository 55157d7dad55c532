"""Every network in networks/ keeps the same promises: it is tested the moment its file exists."""

import dataclasses
import itertools
import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

import networks

torch.set_num_threads(min(2, torch.get_num_threads()))
EVERY = pytest.mark.parametrize("name", networks.available())
ISOTROPIC = (1.0, 1.0, 1.0)


@EVERY
@pytest.mark.parametrize(("batch", "channels", "classes", "times"), [(1, 1, 5, (1, 3, 2)), (2, 4, 2, (3, 1, 1))])
def test_logits_have_the_size_of_the_patch(name, batch, channels, classes, times) -> None:
    network, divisor = small(name, channels, classes)
    patch = [n * d for n, d in zip(times, divisor, strict=True)]
    x = torch.randn(batch, channels, *patch)

    levels = network.train()(x)
    assert isinstance(levels, list) and len(levels) > 1
    assert levels[0].shape == (batch, classes, *patch)
    for finer, coarser in itertools.pairwise(levels):
        assert coarser.shape[:2] == (batch, classes)
        assert all(n % m == 0 and n >= m for n, m in zip(finer.shape[2:], coarser.shape[2:], strict=True))
        assert coarser[0, 0].numel() < finer[0, 0].numel()

    with torch.no_grad():
        logits = network.eval()(x)
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (batch, classes, *patch)
    assert logits.isfinite().all()


@EVERY
def test_the_finest_answer_is_the_same_in_training_and_in_use(name) -> None:
    network, patch = small(name), patch_of(name)
    x = torch.randn(1, 1, *patch)
    finest = network[0].train()(x)[0]
    with torch.no_grad():
        torch.testing.assert_close(network[0].eval()(x), finest.detach(), rtol=1e-4, atol=1e-4)


@EVERY
def test_a_gradient_reaches_every_parameter(name) -> None:
    network, _ = small(name)
    outputs = network.train()(torch.randn(1, 1, *patch_of(name)))
    sum((logits * torch.randn_like(logits)).sum() for logits in outputs).backward()
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, parameter_name


@EVERY
def test_a_bottleneck_of_one_voxel_trains(name) -> None:
    network, divisor = small(name)
    outputs = network.train()(torch.randn(1, 1, *divisor))
    sum(logits.square().mean() for logits in outputs).backward()
    assert all(logits.isfinite().all() for logits in outputs)
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters() if parameter.grad is not None)


@EVERY
def test_the_same_scan_gives_the_same_answer_and_another_scan_another(name) -> None:
    network = small(name)[0].eval()
    x = torch.randn(1, 1, *patch_of(name))
    with torch.no_grad():
        assert torch.equal(network(x), network(x))
        changed = x.clone()
        changed[..., 0] += torch.randn_like(changed[..., 0])
        assert not torch.allclose(network(x), network(changed), atol=1e-3)


@EVERY
def test_a_scan_does_not_change_its_neighbour_in_the_batch(name) -> None:
    network = small(name)[0].eval()
    x = torch.randn(2, 1, *patch_of(name))
    with torch.no_grad():
        torch.testing.assert_close(network(x)[1:], network(x[1:]), rtol=1e-4, atol=1e-4)


@EVERY
def test_the_input_is_left_as_it_was(name) -> None:
    network = small(name)[0].train()
    x = torch.randn(1, 1, *patch_of(name))
    before = x.clone()
    network(x)
    assert torch.equal(x, before)


@EVERY
def test_weights_saved_and_loaded_give_the_same_answer(name, tmp_path) -> None:
    first, second = small(name, seed=1)[0].eval(), small(name, seed=2)[0].eval()
    x = torch.randn(1, 1, *patch_of(name))
    weights = {key: value.contiguous() for key, value in first.state_dict().items()}
    save_file(weights, tmp_path / "weights.safetensors")
    with torch.no_grad():
        assert not torch.allclose(first(x), second(x))
        second.load_state_dict(load_file(tmp_path / "weights.safetensors"))
        assert torch.equal(first(x), second(x))


@EVERY
def test_a_patch_that_does_not_divide_is_refused_with_the_size_that_does(name) -> None:
    network, (d, h, w) = small(name)
    with pytest.raises(ValueError, match="multiple of") as refusal:
        network(torch.randn(1, 1, d * 2 - 1, h, w))
    assert str((d * 2, h, w)) in str(refusal.value)


@EVERY
def test_a_config_is_plain_numbers_and_words(name) -> None:
    config = networks.load(name).Config()
    assert dataclasses.is_dataclass(config)
    assert json.loads(json.dumps(dataclasses.asdict(config)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.width = 3
    for field in dataclasses.fields(config):
        assert field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


@EVERY
@pytest.mark.parametrize("patch", [(40, 56, 40), (35, 51, 37), (20, 320, 256), (64, 64, 24), (8, 8, 8)])
@pytest.mark.parametrize("spacing", [ISOTROPIC, (3.6, 0.625, 0.625), (0.5, 0.5, 2.0)])
def test_fitting_to_the_rounded_patch_changes_nothing(name, patch, spacing) -> None:
    module = networks.load(name)
    config = module.fit(module.Config(), patch=patch, spacing=spacing)
    divisor = module.divisor(config)
    rounded = tuple(-(-n // d) * d for n, d in zip(patch, divisor, strict=True))
    again = module.fit(module.Config(), patch=rounded, spacing=spacing)
    assert all(n % d == 0 for n, d in zip(rounded, module.divisor(again), strict=True))
    assert again == config


@EVERY
def test_a_coarse_axis_is_halved_less_often(name) -> None:
    module = networks.load(name)
    config = module.fit(module.Config(), patch=(16, 96, 96), spacing=(5.0, 0.8, 0.8))
    d, h, w = module.divisor(config)
    assert d < h == w
    network = module.build(dataclasses.replace(config, width=4), channels=1, classes=2).eval()
    with torch.no_grad():
        assert network(torch.randn(1, 1, d, h, 2 * w)).shape == (1, 2, d, h, 2 * w)


@EVERY
def test_fit_keeps_what_the_user_chose(name) -> None:
    module = networks.load(name)
    assert module.fit(module.Config(width=5), patch=(32, 32, 32), spacing=ISOTROPIC).width == 5


def test_networks_are_the_files_and_parts_is_none() -> None:
    assert {"residual_unet", "segresnet"} <= set(networks.available())
    assert "parts" not in networks.available()
    assert all(hasattr(networks.load(name), word) for name in networks.available() for word in WORDS)


WORDS = ("Config", "fit", "divisor", "build")


@pytest.mark.parametrize("wrong", ["residual_unt", "ResidualUNet", "residual-unet"])
def test_an_unknown_network_is_answered_with_the_nearest(wrong) -> None:
    with pytest.raises(networks.UnknownNetwork, match="Did you mean 'residual_unet'") as refusal:
        networks.load(wrong)
    assert wrong in str(refusal.value) and "segresnet" in str(refusal.value)


@pytest.mark.parametrize("wrong", ["parts", "__init__", "os.path", "../kernels/window_blend", "", "zzz"])
def test_only_a_network_can_be_loaded(wrong) -> None:
    with pytest.raises(networks.UnknownNetwork):
        networks.load(wrong)


# patch, spacing, strides and kernels as nnU-Net v2 2.8.1 plans them (plain 3d_fullres on seven well-known data sets)
PLANNED = [
    ((40, 56, 40), ISOTROPIC, [(2, 2, 2)] * 3, [(3, 3, 3)] * 4),
    ((128, 128, 128), ISOTROPIC, [(2, 2, 2)] * 5, [(3, 3, 3)] * 6),
    ((128, 128, 128), (1.0, 0.767, 0.767), [(2, 2, 2)] * 5, [(3, 3, 3)] * 6),
    ((112, 128, 112), (1.5, 1.5, 1.5), [(2, 2, 2)] * 4, [(3, 3, 3)] * 5),
    ((48, 48, 48), (2.0, 2.0, 2.0), [(2, 2, 2)] * 3, [(3, 3, 3)] * 4),
    ((20, 320, 256), (3.6, 0.625, 0.625), [(1, 2, 2)] * 2 + [(2, 2, 2)] * 2 + [(1, 2, 2)] * 2,
     [(1, 3, 3)] * 2 + [(3, 3, 3)] * 5),
    ((20, 256, 224), (5.0, 1.5625, 1.5625), [(1, 2, 2)] + [(2, 2, 2)] * 2 + [(1, 2, 2)] * 2,
     [(1, 3, 3)] + [(3, 3, 3)] * 5),
]  # fmt: skip


@pytest.mark.parametrize(("patch", "spacing", "strides", "kernels"), PLANNED)
def test_residual_unet_has_the_stages_nnunet_plans(patch, spacing, strides, kernels) -> None:
    module = networks.load("residual_unet")
    config = module.fit(module.Config(), patch=patch, spacing=spacing)
    assert config.strides == ((1, 1, 1), *strides)
    assert config.kernels == tuple(kernels)


def test_residual_unet_refuses_a_patch_too_small_to_halve() -> None:
    module = networks.load("residual_unet")
    with pytest.raises(ValueError, match="larger patch"):
        module.fit(module.Config(), patch=(6, 6, 6), spacing=ISOTROPIC)


def test_residual_unet_refuses_stages_that_do_not_match() -> None:
    with pytest.raises(ValueError, match="one of each per stage"):
        networks.load("residual_unet").Config(strides=((1, 1, 1), (2, 2, 2)))


def test_segresnet_divides_as_monai_says() -> None:
    from monai.networks.nets.segresnet_ds import scales_for_resolution

    module = networks.load("segresnet")
    chance = random.Random(0)
    for _ in range(200):
        spacing = tuple(chance.choice([0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 5.0, 8.0]) for _ in range(3))
        blocks = (1,) * chance.randint(2, 6)
        expected = [1, 1, 1]
        for scale in scales_for_resolution(spacing, n_stages=len(blocks))[: len(blocks) - 1]:
            expected = [n * int(s) for n, s in zip(expected, scale, strict=True)]
        assert module.divisor(module.Config(blocks=blocks, spacing=spacing)) == tuple(expected), spacing


def test_segresnet_answers_as_monai_does() -> None:
    from monai.networks.nets.segresnet_ds import SegResNetDS

    ours, _ = small("segresnet")
    theirs = SegResNetDS(init_filters=4, out_channels=3, norm="instance", blocks_down=(1, 1, 1), dsdepth=2)
    theirs.load_state_dict({key.removeprefix("network."): value for key, value in ours.state_dict().items()})
    x = torch.randn(2, 1, 16, 8, 12)
    for mine, known in zip(ours.train()(x), theirs.train()(x), strict=True):
        torch.testing.assert_close(mine, known, rtol=1e-3, atol=1e-4)


SMALL = {
    "residual_unet": dict(
        width=4, strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)), kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3))
    ),
    "segresnet": dict(width=4, blocks=(1, 1, 1)),
}
"""Settings that make a network small; a network without an entry is tested at its defaults."""


def small(name: str, channels: int = 1, classes: int = 3, seed: int = 0):
    """A network quick enough for a test, and its divisor."""
    module = networks.load(name)
    config = module.Config(**SMALL.get(name, {}))
    torch.manual_seed(seed)
    return module.build(config, channels=channels, classes=classes), module.divisor(config)


def patch_of(name: str) -> list[int]:
    return [n * d for n, d in zip((2, 1, 2), small(name)[1], strict=True)]
