"""Every network in networks/ keeps the same promises: it is tested the moment its file exists."""

import dataclasses
import itertools
import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

import networks
from networks.parts.attentive import Attentive, attention_maps
from networks.parts.losses import DeepSupervision, answered

torch.set_num_threads(min(2, torch.get_num_threads()))
EVERY = pytest.mark.parametrize("name", networks.available())
ISOTROPIC = (1.0, 1.0, 1.0)


@EVERY
@pytest.mark.parametrize(("batch", "channels", "classes", "times"), [(1, 1, 5, (1, 3, 2)), (2, 4, 2, (3, 1, 1))])
def test_logits_have_the_size_of_the_patch(name, batch, channels, classes, times) -> None:
    network, divisor = small(name, channels, classes)
    patch = [n * d for n, d in zip(times, divisor, strict=True)]
    x = torch.randn(batch, channels, *patch)

    levels = answered(network.train()(x)).logits
    assert levels[0].shape == (batch, classes, *patch)
    for finer, coarser in itertools.pairwise(levels):
        assert coarser.shape[:2] == (batch, classes)
        assert all(n % m == 0 and n >= m for n, m in zip(finer.shape[2:], coarser.shape[2:], strict=True))

    with torch.no_grad():
        logits = network.eval()(x)
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (batch, classes, *patch)
    assert logits.isfinite().all()


MEANS = {"self_guided": 0.5}
"""Networks whose answer in use is the mean of the first of their answers in training: of what share of them."""


@EVERY
def test_the_finest_answer_is_the_same_in_training_and_in_use(name) -> None:
    network, patch = small(name)[0], patch_of(name)
    x = torch.randn(1, 1, *patch)
    levels = answered(network.train()(x)).logits
    if name in MEANS:
        finest = torch.stack([logits.detach() for logits in levels[: round(MEANS[name] * len(levels))]]).mean(0)
    else:
        finest = levels[0].detach()
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(x), finest, rtol=1e-4, atol=1e-4)


@EVERY
def test_a_gradient_reaches_every_parameter(name) -> None:
    network, _ = small(name)
    answer = answered(network.train()(torch.randn(1, 1, *patch_of(name))))
    (
        sum((logits * torch.randn_like(logits)).sum() for logits in answer.logits) + sum(answer.losses.values())
    ).backward()
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, parameter_name


@EVERY
def test_a_bottleneck_of_one_voxel_trains(name) -> None:
    network, divisor = small(name)
    outputs = answered(network.train()(torch.randn(1, 1, *divisor))).logits
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


@EVERY
def test_mixed_precision_says_nearly_the_same(name) -> None:
    network = small(name)[0].eval()
    x = torch.randn(1, 1, *(2 * n for n in patch_of(name)))  # a norm over four voxels would blow rounding up
    with torch.no_grad():
        exact = network(x)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = network(x).float()
    spread = exact.std()
    assert (rounded - exact).square().mean().sqrt() < 0.15 * spread


@EVERY
def test_the_same_step_twice_gives_the_same_gradients_to_the_bit(name) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        first, again = (gradients_of_a_step(name) for _ in "12")
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def gradients_of_a_step(name: str) -> list[torch.Tensor]:
    network, _ = small(name)
    random = torch.Generator().manual_seed(3)
    x = torch.randn(2, 1, *patch_of(name), generator=random)
    truth = torch.randint(0, 3, (2, *patch_of(name)), generator=random)
    DeepSupervision()(network.train()(x), truth).backward()
    return [parameter.grad for parameter in network.parameters()]


@EVERY
def test_a_slice_is_a_patch_too(name) -> None:
    if name == "segresnet":
        pytest.skip("MONAI's halves every axis")
    module = networks.load(name)
    config = module.fit(module.Config(width=4), patch=(1, 48, 40), spacing=ISOTROPIC)
    d, h, w = module.divisor(config)
    assert d == 1
    network = module.build(config, channels=2, classes=3)
    x = torch.randn(1, 2, 1, -(-48 // h) * h, -(-40 // w) * w)
    sum(logits.square().mean() for logits in answered(network.train()(x)).logits).backward()
    with torch.no_grad():
        assert network.eval()(x).shape == (1, 3, *x.shape[2:])


@EVERY
def test_what_attention_sees_changes_with_the_scan_and_looking_changes_nothing(name) -> None:
    network = small(name)[0].train()
    if not any(isinstance(module, Attentive) for module in network.modules()):
        pytest.skip("it has no attention")
    x = torch.randn(1, 1, *patch_of(name))
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    maps, others = attention_maps(network, x), attention_maps(network, 2 * torch.randn_like(x) + 1)
    assert maps
    for where, seen in maps.items():
        assert seen.isfinite().all(), where
        if seen.numel() > len(seen):  # a single place has nothing to choose from
            assert not torch.equal(seen, others[where]), where
    assert network.training and all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())
    assert all(module.seen is None for module in network.modules() if isinstance(module, Attentive))


@EVERY
def test_it_names_what_can_be_explained(name) -> None:
    module = networks.load(name)
    network = small(name)[0]
    layers = module.explained(network)
    assert layers and set(layers.values()) <= set(network.modules())


@EVERY
def test_it_can_be_exported_and_compiled(name) -> None:
    network = small(name)[0].eval()
    x = torch.randn(1, 1, *patch_of(name))
    with torch.no_grad():
        expected = network(x)
        exported = torch.export.export(network, (x,)).module()
        torch.testing.assert_close(exported(x), expected, rtol=1e-3, atol=1e-3)


def test_networks_are_the_files_and_parts_is_none() -> None:
    assert {"residual_unet", "segresnet"} <= set(networks.available())
    assert "parts" not in networks.available()
    assert all(hasattr(networks.load(name), word) for name in networks.available() for word in WORDS)


WORDS = ("PAPER", "GOOD_FOR", "Config", "fit", "divisor", "build", "explained")


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


STAGES = dict(width=4, strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)), kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)))
SMALL = {
    "residual_unet": STAGES,
    "self_guided": STAGES,
    "mpu_net": STAGES,
    "mcads": STAGES,
    "frequency_unet": STAGES,
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
