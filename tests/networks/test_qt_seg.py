"""QTSeg beside its authors' numbers, and where ours differs, that it does what theirs did not."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from networks import qt_seg
from networks.parts import losses
from networks.parts.attention._layers import PlaceNorm
from networks.parts.attention.channel import ChannelAttention
from networks.parts.blocks import InstanceNorm

NAMES = (
    ("dm_attention.", "mix."),
    ("channel_attention.", "channel."),
    ("spatial_attention.cv1", "space.convolve"),
    ("channel_token_mix_attention", "read_channel"),
    ("spatial_token_mix_attention", "read_space"),
    ("feature_mix", "write"),
    ("final_attn_token_to_image", "look"),
    ("norm_final_attn", "norm"),
    ("token_layernorm", "norm"),
    ("token_mlp.lin1", "think.0"),
    ("token_mlp.lin2", "think.2"),
    ("layers.", "blocks."),
    ("out_proj", "leave"),
    ("_proj", ""),
    ("cv1", "convolve"),
    ("positional_encoding_gaussian_matrix", "frequencies"),
)
"""What the authors call a weight, and what we do."""

THEIRS = qt_seg.Config(faithful=True, dims=2, heads=4, hidden=32)
OURS = dataclasses.replace(THEIRS, faithful=False, dims=3)
MODULES = {
    "attention_ds2": lambda: qt_seg.TokenAttention(16, 4, key_bias=True),
    "cab": lambda: ChannelAttention(16),
    "sam": lambda: qt_seg.SpatialGate((3, 3)),
    "layernorm2d": lambda: PlaceNorm(16, 1e-6),
    "pos_embed": lambda: qt_seg.Position(2, 16),
    "dual_mix_attention": lambda: qt_seg.Mix(THEIRS, 16, (3, 3)),
    "dma_block": lambda: qt_seg.DualMix(THEIRS, 16, (3, 3)),
    "dmad_stage": lambda: qt_seg.Level(THEIRS, 16, (3, 3), depth=2),
}
"""Who computes what each of the authors' arrays holds."""


@pytest.fixture
def theirs(shared):
    def load(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        with np.load(shared / "fixtures" / "qtseg" / f"{name}.npz") as file:
            arrays = {key: torch.from_numpy(file[key].copy()) for key in file.files}
        module = MODULES[name]().eval()
        module.load_state_dict({_ours(key): value for key, value in arrays.items() if key.startswith("w_")})
        return module, arrays

    return load


def _ours(key: str) -> str:
    key = key.removeprefix("w_")
    for old, new in NAMES:
        key = key.replace(old, new)
    return key


def test_token_attention_is_theirs(theirs) -> None:
    attend, arrays = theirs("attention_ds2")
    _same(attend(arrays["q"], arrays["kv"], arrays["kv"]), arrays["y"])


@pytest.mark.parametrize("name", ["cab", "sam", "layernorm2d"])
def test_what_changes_a_map_is_theirs(theirs, name) -> None:
    module, arrays = theirs(name)
    _same(module(arrays["x"]), arrays["y"])


def test_the_waves_that_say_where_a_place_lies_are_theirs(theirs) -> None:
    position, arrays = theirs("pos_embed")
    _same(position(torch.zeros(1, *arrays["pe"].shape)), arrays["pe"])


def test_mixed_attention_is_theirs(theirs) -> None:
    mix, arrays = theirs("dual_mix_attention")
    tokens, features = mix(arrays["tokens"], arrays["feat"] + arrays["pe"])
    _same(tokens, arrays["out_tokens"])
    _same(features.flatten(2).mT, arrays["out_features"])


@pytest.mark.parametrize("name", ["dma_block", "dmad_stage"])
def test_a_block_and_a_level_are_theirs(theirs, name) -> None:
    module, arrays = theirs(name)
    tokens, features = module(arrays["tokens"], arrays["feat"], arrays["pe"][0])
    assert torch.equal(arrays["pe"][0], arrays["pe"][1])
    _same(tokens, arrays["out_tokens"])
    _same(features, arrays["out_feat"])


def test_our_loss_of_two_classes_is_theirs(shared) -> None:
    arrays = np.load(shared / "fixtures" / "qtseg" / "loss.npz")
    seen = losses.Compared(torch.from_numpy(arrays["logits"]), torch.from_numpy(arrays["target"]), None)
    _same(losses.cross_entropy(seen), torch.from_numpy(arrays["ce"]))
    _same(losses.overlap(seen, batch=False), torch.from_numpy(arrays["dice"]))
    _same(losses.dice_and_cross_entropy(seen, batch=False), torch.from_numpy(arrays["total"]))


def test_every_array_of_theirs_is_compared(shared) -> None:
    names = {file.stem for file in (shared / "fixtures" / "qtseg").glob("*.npz")}
    assert names == {*MODULES, "loss"}


def _same(ours: torch.Tensor, known: torch.Tensor) -> None:
    torch.testing.assert_close(ours, known, rtol=1e-5, atol=1e-5)


def test_the_published_network_has_as_many_parameters_as_was_counted() -> None:
    with torch.device("meta"):
        network = qt_seg.build(qt_seg.Config(faithful=True, dims=2), channels=3, classes=2)
    counted = [sum(p.numel() for p in part.parameters()) for part in (network, *network.children())]
    assert counted == [9_214_850, 2_259_536, 279_424, 6_675_890]
    assert sum(p.numel() for p in network.decoder.levels[0].parameters()) == pytest.approx(4.47e6, rel=2e-3)


def test_the_published_network_gives_the_shapes_of_its_paper() -> None:
    network = qt_seg.build(qt_seg.Config(faithful=True, dims=2, hidden=8), channels=3, classes=2).eval()
    with torch.no_grad():
        maps = network.encoder(torch.randn(1, 3, 64, 128))
        assert [tuple(x.shape[1:]) for x in maps] == [(64, 8, 16), (128, 4, 8), (256, 2, 4)]
        maps = network.distribution(maps)
        assert [tuple(x.shape[1:]) for x in maps] == [(64, 8, 16), (128, 4, 8), (256, 2, 4)]
        assert network.decoder(maps)[0].shape == (1, 2, 32, 64)  # half the resolution
        assert network(torch.randn(1, 3, 1, 64, 128)).shape == (1, 2, 1, 64, 128)
        assert network(torch.randn(1, 3, 1, 32, 32)).isfinite().all()
    levels = network.train()(torch.randn(2, 3, 1, 64, 64))
    assert [tuple(level.shape) for level in levels] == [(2, 2, 1, 64, 64)]


def test_the_published_network_refuses_volumes() -> None:
    with pytest.raises(ValueError, match="one axis must have 1 voxel"):
        qt_seg.fit(qt_seg.Config(faithful=True), patch=(32, 32, 32), spacing=(1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="Set dims to 2"):
        qt_seg.build(qt_seg.Config(faithful=True), channels=1, classes=2)


@pytest.mark.parametrize("thin", [0, 1, 2])
def test_a_plane_may_lie_along_any_axis(thin) -> None:
    patch = [64, 32]
    patch.insert(thin, 1)
    spacing = [0.7, 0.7]
    spacing.insert(thin, 0.1)  # thin and finely sampled: no reason to leave the plane alone
    config = qt_seg.fit(TINY, patch=tuple(patch), spacing=tuple(spacing))
    assert config.dims == 2 and qt_seg.divisor(config)[thin] == 1 and qt_seg.divisor(config) != (1, 1, 1)
    network = qt_seg.build(config, channels=2, classes=3)
    assert network(torch.randn(1, 2, *patch))[0].shape == (1, 3, *patch)
    assert network.encoder.stem[0][0].weight.numel() == 4 * 2 * 9
    with torch.no_grad():
        assert network.eval()(torch.randn(1, 2, *patch)).shape == (1, 3, *patch)


@pytest.mark.parametrize("patch", [(16, 16, 24), (1, 32, 32)])
@pytest.mark.parametrize("classes", [1, 2, 12])
def test_any_number_of_classes_trains_and_every_weight_learns(patch, classes) -> None:
    network = fitted(patch, channels=2, classes=classes)
    _wake(network)
    levels = network(torch.randn(1, 2, *patch))
    assert [level.shape[1] for level in levels] == [classes] * 3
    sum((level * torch.randn_like(level)).sum() for level in levels).backward()
    for name, weight in network.named_parameters():
        assert weight.grad.isfinite().all() and weight.grad.abs().max() > 0, name


def test_one_class_alone_is_what_one_token_says_against_another() -> None:
    network = fitted((16, 16, 16), channels=1, classes=1).eval()
    tokens, x = torch.randn(1, 2, 8), torch.randn(1, 8, 2, 3, 4)
    by_hand = torch.einsum("e, edhw -> dhw", tokens[0, 0] - tokens[0, 1], x[0])
    torch.testing.assert_close(network.decoder._masks(tokens, x)[0, 0], by_hand)


def test_their_channel_attention_lets_one_channel_through_and_ours_does_not() -> None:
    x = torch.randn(1, 16, 32, 32, generator=torch.Generator().manual_seed(0)).relu()
    largest = []
    for config in (THEIRS, OURS):
        attend = qt_seg.Mix(config, 16, (3, 3)).channel
        attend.is_watched = True
        attend(x)
        largest.append(float(attend.seen.amax(-1).mean()))
    assert largest[0] > 0.9 > 0.2 > largest[1]


def test_what_was_pooled_over_a_small_map_is_not_normed_away() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 8, 3, 3, 3)
    for norm, remains in ((InstanceNorm(8), False), (None, True)):
        pooling = qt_seg.Pooling(OURS, 8, (3, 3, 3))
        pooling.leave[1] = norm or pooling.leave[1]
        pooling.leave[0].weight.data[:, :12] = 0  # of the four pieces, the widest alone: one number a channel
        assert bool(pooling(x).abs().max() > 0.1) is remains


def test_their_convolution_of_stride_four_is_blind_in_places_and_ours_is_not() -> None:
    for config, blind in ((THEIRS, 7 / 16), (OURS, 0.0)):
        network = qt_seg.build(dataclasses.replace(config, width=4, dims=2), channels=1, classes=2)
        convolve = network.distribution.coarse[0][0]
        x = torch.randn(1, 16, *[16, 16] if config.faithful else [1, 16, 16], requires_grad=True)
        convolve(x).sum().backward()
        seen = (x.grad.abs().flatten(0, -3).amax(0) > 0)[4:12, 4:12]  # away from the edge
        assert 1 - float(seen.float().mean()) == pytest.approx(blind)


def test_a_bias_of_keys_never_learns() -> None:
    attend = qt_seg.TokenAttention(16, 4, key_bias=True).double()
    q, k = torch.randn(1, 3, 16, dtype=torch.float64), torch.randn(1, 40, 16, dtype=torch.float64)
    (attend(q, k, k) * torch.randn(1, 3, 16)).sum().backward()
    assert attend.k.bias.grad.abs().max() < 1e-12 < attend.k.weight.grad.abs().max()
    assert not any(name.endswith(".k.bias") for name, _ in fitted((16, 16, 16)).named_parameters())


def test_the_same_image_at_twice_the_size_has_the_same_waves_between() -> None:
    position = qt_seg.Position(3, 8)
    coarse, fine = position(torch.zeros(1, 8, 2, 3, 4)), position(torch.zeros(1, 8, 6, 9, 12))
    torch.testing.assert_close(fine[:, 1::3, 1::3, 1::3], coarse, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(coarse[:, 0], coarse[:, 1]) and not torch.allclose(coarse[..., 0], coarse[..., 1])


def test_few_classes_have_perceptrons_of_their_own_and_many_share_one() -> None:
    assert [len(lead.perceptrons) for lead in fitted((16, 16, 16), classes=10).decoder.leads] == [10] * 3
    assert [len(lead.perceptrons) for lead in fitted((16, 16, 16), classes=11).decoder.leads] == [1] * 3


@pytest.mark.parametrize("patch", [(32, 32, 48), (1, 32, 48)])
def test_where_the_tokens_look_and_what_the_gates_let_through_can_be_seen(patch) -> None:
    network = fitted(patch, classes=3).train()
    _wake(network)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    x, other = torch.randn(2, 2, 1, *patch)
    maps, others = qt_seg.attention_maps(network, x), qt_seg.attention_maps(network, other)
    assert maps["decoder.levels.2"].shape == (2, 3, -(-patch[0] // 2), 16, 24)
    assert maps["decoder.levels.0.blocks.1.mix.space"].shape == (2, 1, -(-patch[0] // 8), 4, 6)
    for name, seen in maps.items():
        assert not seen.requires_grad and seen.min() >= 0 and seen.max() <= 1 and seen.shape[0] == 2
        assert not torch.equal(seen, others[name]), name
    assert torch.equal(maps["decoder.levels.2"].amax((2, 3, 4)), torch.ones(2, 3))
    assert network.training and all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_what_explains_the_answer_is_named_last_layer_first() -> None:
    network = fitted((16, 16, 16))
    named = qt_seg.explained(network)
    assert next(iter(named)) == "decoder.rises.2"
    assert all(network.get_submodule(name) is module for name, module in named.items())


def test_memory_of_attention_grows_with_the_places_not_with_their_square() -> None:
    from pipeline.footprint import footprint

    def bytes_of(side: int) -> int:
        measured = footprint(
            lambda: qt_seg.build(_deep(), channels=1, classes=2), channels=1, patch=(16, 16, side), batch=1
        )
        return measured.peak - measured.held

    small, large = bytes_of(256), bytes_of(2048)  # 8,192 and 65,536 places at the finest level
    assert 7 < large / small < 8.5


def _deep() -> qt_seg.Config:
    return qt_seg.fit(dataclasses.replace(TINY, depths=(1, 1, 1)), patch=(16, 16, 256), spacing=(1.0, 1.0, 1.0))


@pytest.mark.parametrize("patch", [(16, 16, 16), (1, 32, 32)])
def test_half_precision_says_nearly_the_same(patch) -> None:
    network = fitted(patch, classes=3).eval()
    x = torch.randn(1, 1, *patch)
    with torch.no_grad():
        full = network(x)
        with torch.autocast("cpu", torch.bfloat16):
            half = network(x)
    assert (half.float() - full).norm() < 0.2 * full.norm()  # sixty convolutions and norms add up


@pytest.mark.parametrize("patch", [(16, 16, 16), (1, 32, 32)])
def test_the_network_is_exported_whole(patch) -> None:
    network = fitted(patch).eval()
    x = torch.randn(1, 1, *patch)
    exported = torch.export.export(network, (x,)).module()
    torch.testing.assert_close(exported(x), network(x))


@pytest.mark.slow
def test_the_network_is_compiled_whole() -> None:
    # in a process of its own: the checks of shapes in signatures, which only tests have, draw random numbers
    subprocess.run([sys.executable, "-c", COMPILED], check=True, cwd=Path(qt_seg.__file__).parents[1])


COMPILED = """
import torch
from networks import qt_seg
config = qt_seg.Config(width=4, hidden=16, depths=(1, 1, 1))
network = qt_seg.build(qt_seg.fit(config, patch=(8, 8, 16), spacing=(1, 1, 1)), channels=1, classes=2)
x = torch.randn(1, 1, 8, 8, 16)
for ours, known in zip(torch.compile(network, backend="aot_eager", fullgraph=True)(x), network(x), strict=True):
    torch.testing.assert_close(ours, known, rtol=1e-4, atol=1e-4)
"""


def test_training_on_a_cpu_gives_the_same_bits_every_time() -> None:
    gradients = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            network = fitted((16, 16, 16))
            x = torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
            sum(level.square().sum() for level in network(x)).backward()
            gradients.append([weight.grad for weight in network.parameters()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("wrong", "advice"),
    [
        (dict(dims=4), "three levels"),
        (dict(depths=(1, 1)), "three levels"),
        (dict(width=0), "Correct the wrong one"),
        (dict(strides=((2, 2, 2),) * 4, kernels=((3, 3, 3),) * 4), "five of each"),
        (dict(dims=2, strides=((2, 2, 2),) * 5, kernels=((3, 3, 3),) * 5), "planes need an axis"),
    ],
)
def test_what_cannot_be_built_is_refused(wrong, advice) -> None:
    with pytest.raises(ValueError, match=advice):
        qt_seg.Config(**wrong)


TINY = qt_seg.Config(width=4, hidden=16, depths=(2, 1, 1))


def fitted(patch: tuple[int, int, int], channels: int = 1, classes: int = 2) -> qt_seg.QTSeg:
    torch.manual_seed(0)
    config = qt_seg.fit(TINY, patch=patch, spacing=(1.0, 1.0, 1.0))
    return qt_seg.build(config, channels=channels, classes=classes)


def _wake(network: nn.Module) -> None:
    """Channel attention starts switched off."""
    for module in network.modules():
        if isinstance(module, ChannelAttention):
            nn.init.constant_(module.gamma, 0.3)
