"""The residual U-Net becomes nnU-Net's networks when a plan asks for them, parameter by parameter."""

import dataclasses

import pytest
import torch

from networks import residual_unet
from networks.parts.attention import available
from networks.parts.attentive import Attentive
from networks.residual_unet import Config

CUBE = dict(strides=((1, 1, 1), *[(2, 2, 2)] * 3), kernels=((3, 3, 3),) * 4)
SLICES = dict(strides=((1, 1, 1), *[(1, 2, 2)] * 3), kernels=((1, 3, 3),) * 4)
DEEP = dict(strides=((1, 1, 1), *[(2, 2, 2)] * 5), kernels=((3, 3, 3),) * 6)
DEEP_SLICES = dict(strides=((1, 1, 1), *[(1, 2, 2)] * 7), kernels=((1, 3, 3),) * 8)
PROSTATE = dict(
    strides=((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2)),
    kernels=((1, 3, 3), (1, 3, 3), *[(3, 3, 3)] * 5),
)
XL = dict(strides=((1, 1, 1), *[(2, 2, 2)] * 5, (1, 2, 2)), kernels=((3, 3, 3),) * 7)


@pytest.mark.parametrize(
    ("stages", "plain", "widest", "channels", "classes", "parameters"),
    [
        (CUBE, True, 320, 1, 3, 5_603_177),
        (SLICES, True, 512, 1, 3, 1_928_489),
        (CUBE, False, 320, 1, 3, 25_895_593),
        (SLICES, False, 512, 1, 3, 8_728_681),
        (PROSTATE, True, 320, 2, 3, 44_578_770),
        (PROSTATE, False, 320, 2, 3, 140_403_602),
        (DEEP, True, 320, 1, 3, 31_196_399),
        (DEEP, False, 320, 1, 3, 102_350_575),
        (DEEP_SLICES, True, 512, 1, 3, 46_326_581),
        (DEEP_SLICES, False, 512, 1, 3, 140_019_061),
        (XL, False, 320, 1, 3, 141_481_138),
    ],
)
def test_it_has_as_many_parameters_as_nnunets(stages, plain, widest, channels, classes, parameters) -> None:
    """PlainConvUNet and ResidualEncoderUNet of dynamic_network_architectures 0.4.4, built for the same stages."""
    blocks, decoder = ((2,), 2) if plain else ((1, 3, 4, 6), 1)
    config = Config(width=32, widest=widest, blocks=blocks, plain=plain, decoder=decoder, bias=True, **stages)
    with torch.device("meta"):
        network = residual_unet.build(config, channels=channels, classes=classes)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


@pytest.mark.parametrize("plain", [True, False])
def test_nnunets_networks_train_on_windows_of_one_slice(plain) -> None:
    config = Config(width=4, blocks=(2,), plain=plain, decoder=2, bias=True, **SLICES)
    network = residual_unet.build(config, channels=2, classes=3).train()
    levels = network(torch.randn(2, 2, 1, 16, 24))
    assert [tuple(level.shape[2:]) for level in levels] == [(1, 16, 24), (1, 8, 12), (1, 4, 6)]
    sum(level.square().mean() for level in levels).backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_stages_that_were_given_are_kept() -> None:
    config = Config(**SLICES)
    assert residual_unet.fit(config, patch=(64, 64, 64), spacing=(1.0, 1.0, 1.0)) == config


def test_without_stages_nothing_is_built() -> None:
    with pytest.raises(ValueError, match="`fit` makes"):
        residual_unet.build(Config(), channels=1, classes=2)


@pytest.mark.parametrize("wrong", [dict(width=0), dict(blocks=()), dict(decoder=0), dict(widest=0)])
def test_nothing_can_be_less_than_one(wrong) -> None:
    with pytest.raises(ValueError, match="1 or more"):
        Config(**wrong)


def test_the_default_is_what_it_was() -> None:
    config = residual_unet.fit(Config(), patch=(40, 56, 40), spacing=(1.0, 1.0, 1.0))
    network = residual_unet.build(config, channels=1, classes=3)
    assert sum(parameter.numel() for parameter in network.parameters()) == DEFAULT
    assert dataclasses.asdict(config)["blocks"] == (1, 2, 2, 2)


DEFAULT = 2_436_473
"""As of hilum 0.1.0's first packages: their weights must still load."""


SMALL = dict(width=4, blocks=(1,), strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)), kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)))


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("name", available())
def test_any_block_may_stand_at_any_depth(name, stage) -> None:
    network = randomised(Config(**SMALL, attention=("",) * stage + (name,)))
    x = torch.randn(2, 1, 4, 12, 8)
    levels = network.train()(x)
    sum((level * torch.randn_like(level)).sum() for level in levels).backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(x), levels[0], rtol=1e-4, atol=1e-4)
    assert residual_unet.attention_maps(network, x)


@pytest.mark.parametrize("attention", [(), ("", ""), ("cbam", "additive_gate", "efficient")])
def test_the_names_of_all_other_weights_stay(attention) -> None:
    plain, network = (
        residual_unet.build(Config(**SMALL, attention=names), channels=1, classes=3) for names in ((), attention)
    )
    added = set(network.state_dict()) - set(plain.state_dict())
    assert set(plain.state_dict()) <= set(network.state_dict())
    assert bool(added) == any(attention) and all(key.startswith(("attend.", "gates.")) for key in added)


@pytest.mark.parametrize("name", available())
def test_put_into_a_trained_network_it_hardly_changes_the_answer(name) -> None:
    torch.manual_seed(0)
    plain = residual_unet.build(Config(**SMALL), channels=1, classes=3).eval()
    network = residual_unet.build(Config(**SMALL, attention=("", name, name)), channels=1, classes=3).eval()
    network.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(1, 1, 8, 16, 16)
    with torch.no_grad():
        before, after = plain(x), network(x)
    assert (after - before).norm() < 0.15 * before.norm()


def test_gates_sit_on_skips_and_the_rest_at_the_end_of_a_stage() -> None:
    network = residual_unet.build(Config(**SMALL, attention=("cbam", "efficient", "cbam")), channels=1, classes=3)
    where = {name for name, module in network.named_modules() if isinstance(module, Attentive) and name.count(".") == 1}
    assert where == {"gates.0", "attend.1", "attend.2"}  # behind the deepest stage there is no skip


def test_the_additive_gate_listens_to_the_decoder() -> None:
    network = randomised(Config(**SMALL, attention=("additive_gate",))).eval()
    x, gate = torch.randn(1, 1, 4, 8, 8), network.gates[0]
    before = residual_unet.attention_maps(network, x)["gates.0"]
    network.up[-1].weight.data.neg_()
    assert not torch.allclose(residual_unet.attention_maps(network, x)["gates.0"], before, atol=1e-3)
    assert gate.seen is None


def test_what_a_patch_cannot_bear_is_refused_with_the_stage_that_can() -> None:
    config = Config(attention=("", "position"))
    with pytest.raises(ValueError, match=r"262144 places; it bears 32768.*stage 2 or 3") as refusal:
        residual_unet.fit(config, patch=(128, 128, 128), spacing=(1.0, 1.0, 1.0))
    assert "square" in str(refusal.value) and "'efficient'" in str(refusal.value)
    small = residual_unet.fit(config, patch=(40, 56, 40), spacing=(1.0, 1.0, 1.0))
    assert small.attention == ("", "position")
    with pytest.raises(ValueError, match="89600 places"):
        residual_unet.fit(dataclasses.replace(small, attention=("position",)), patch=(40, 56, 40), spacing=(1, 1, 1))
    residual_unet.fit(Config(attention=("efficient",) * 4), patch=(128, 128, 128), spacing=(1.0, 1.0, 1.0))


def test_more_attention_than_stages_is_refused() -> None:
    with pytest.raises(ValueError, match="attention for 4 stages and has 3"):
        Config(**SMALL, attention=("cbam",) * 4)
    with pytest.raises(ValueError, match="larger patch"):
        residual_unet.fit(Config(attention=("cbam",) * 9), patch=(40, 56, 40), spacing=(1.0, 1.0, 1.0))


def test_an_unknown_attention_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"\['cbm'\]; there are .*cbam"):
        Config(attention=("cbm",))


def randomised(config: Config) -> torch.nn.Module:
    """As if it had learned something: no attention is at zero any more."""
    torch.manual_seed(0)
    network = residual_unet.build(config, channels=1, classes=3)
    for module in (network.attend, network.gates):
        for parameter in module.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return network
