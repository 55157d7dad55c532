"""The residual U-Net becomes nnU-Net's networks when a plan asks for them, parameter by parameter."""

import dataclasses

import pytest
import torch

from networks import residual_unet
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
