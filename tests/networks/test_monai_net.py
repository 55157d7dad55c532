"""MONAI's networks behind one Config: made of plain words, and nothing else is made."""

import pytest
import torch

import networks
from networks import monai_net

SMALL = {
    "AttentionUnet": dict(channels=[4, 8], strides=[2]),
    "BasicUNet": dict(features=[4, 4, 4, 8, 8, 4]),
    "DynUNet": dict(
        kernel_size=[3, 3, 3], strides=[1, 2, [2, 2, 1]], upsample_kernel_size=[2, [2, 2, 1]], filters=[4, 8, 8],
        deep_supervision=True,
    ),
    "HighResNet": dict(),
    "MedNeXt": dict(init_filters=4, kernel_size=3, blocks_down=[1] * 4, blocks_up=[1] * 4, blocks_bottleneck=1),
    "SegResNet": dict(init_filters=8, blocks_down=[1, 1], blocks_up=[1]),
    "SegResNetDS": dict(init_filters=8, blocks_down=[1, 1, 1], dsdepth=2, resolution=[1.0, 1.0, 4.0]),
    "SwinUNETR": dict(feature_size=12, depths=[1] * 4, num_heads=[1] * 4),
    "UNETR": dict(img_size=[16, 16, 32], hidden_size=24, mlp_dim=24, num_heads=2, feature_size=4),
    "UNet": dict(channels=[4, 8], strides=[2], act=["prelu", {}], norm="batch"),
    "VNet": dict(),
}  # fmt: skip
NEEDS_EINOPS = {"SwinUNETR", "UNETR"}
EVERY = pytest.mark.parametrize("net", monai_net.NETS)


@EVERY
def test_it_answers_with_logits_of_the_patchs_size_and_names_what_can_be_explained(net) -> None:
    if net in NEEDS_EINOPS:
        pytest.importorskip("einops", reason="MONAI makes it with einops, which hilum does not bring")
    config = monai_net.Config(net=net, arguments=SMALL[net])
    network = monai_net.build(config, channels=2, classes=3).eval()
    patch = [2 * max(step, 4) if net != "UNETR" else step for step in monai_net.divisor(config)]
    with torch.no_grad():
        assert network(torch.randn(1, 2, *patch)).shape == (1, 3, *patch)
    layers = monai_net.explained(network)
    assert layers and set(layers.values()) <= set(network.modules())


@EVERY
def test_a_patch_that_does_not_divide_is_refused_before_monai_sees_it(net) -> None:
    if net in NEEDS_EINOPS:
        pytest.importorskip("einops", reason="MONAI makes it with einops, which hilum does not bring")
    config = monai_net.Config(net=net, arguments=SMALL[net])
    step = monai_net.divisor(config)
    if max(step) == 1:
        pytest.skip("every patch divides by 1")
    with pytest.raises(ValueError, match="multiple of"):
        monai_net.build(config, channels=1, classes=2).eval()(torch.randn(1, 1, *(side + 1 for side in step)))


def test_it_is_the_network_that_monai_makes_weight_for_weight() -> None:
    from monai.networks.nets import SegResNet

    ours = monai_net.build(monai_net.Config(net="SegResNet", arguments=SMALL["SegResNet"]), channels=1, classes=2)
    theirs = SegResNet(in_channels=1, out_channels=2, **SMALL["SegResNet"])
    theirs.load_state_dict({name.removeprefix("network."): value for name, value in ours.state_dict().items()})
    x = torch.randn(1, 1, 8, 8, 8)
    with torch.no_grad():
        assert torch.equal(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize(
    ("net", "arguments", "words"),
    [
        ("DiNTS", {}, "known here"),
        ("os.system", {}, "known here"),
        ("UNet", {"in_channels": 3}, "follow from the plan"),
        ("UNet", {"act": torch.nn.PReLU}, "neither numbers, words"),
        ("UNet", {"channels": [4, object()]}, "neither numbers, words"),
    ],
)
def test_nothing_but_a_listed_network_of_plain_words_is_described(net, arguments, words) -> None:
    with pytest.raises(ValueError, match=words):
        monai_net.Config(net=net, arguments=arguments)


def test_an_argument_monai_does_not_know_is_refused_by_name() -> None:
    config = monai_net.Config(net="UNet", arguments={"chanels": [4, 8], "strides": [2]})
    with pytest.raises(ValueError, match=r"chanels.*channels"):
        monai_net.build(config, channels=1, classes=2)


def test_a_library_that_monai_lacks_is_told_by_name(monkeypatch) -> None:
    def lacking(*_, **__) -> None:
        raise ImportError("from einops import rearrange (No module named 'einops').\n\nmore")

    monkeypatch.setattr("monai.networks.nets.UNETR.__init__", lacking)
    with pytest.raises(networks.UnknownNetwork, match=r"einops.*Install it"):
        monai_net.build(monai_net.Config(net="UNETR"), channels=1, classes=2)


def test_it_is_loaded_for_a_package_and_offered_to_nobody_who_trains() -> None:
    assert "monai_net" not in networks.available()
    assert networks.load("monai_net") is monai_net
