"""MCADS equals its authors' modules and their parameters; what was wrong there is mended in the default."""

import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from networks import mcads
from networks.mcads import (
    PLANE,
    Bridge,
    ChannelWeights,
    Config,
    ConvBlock,
    PathBlock,
    PlaceWeights,
    Restoration,
    RowAttention,
    UpGate,
    Weighing,
    build,
    depth_to_space,
    divisor,
    explained,
    fit,
)
from networks.parts.answer import Answer
from networks.parts.dims import resize

SEEN = dict(rtol=1e-5, atol=1e-5)
"""What the fixtures' own page asks of another implementation."""
ISOTROPIC = (1.0, 1.0, 1.0)
NAMES = [
    (r"^c0\.", "first."), (r"^e([123])\.", lambda found: f"out.{int(found[1]) - 1}."), (r"^b\.(?=\D)", "out.3."),
    (r"^d([321])\.", lambda found: f"back.{3 - int(found[1])}."),
    (r"^b\.(\d)\.", r"\1."), (r"\bdw3\.", "wide.0."), (r"\bbn3a\.", "wide.1."), (r"\bpw3\.", "wide.2."),
    (r"\bbn3b\.", "wide_norm."), (r"\bdw1\.", "narrow.0."), (r"\bbn1a\.", "narrow.1."), (r"\bpw1\.", "narrow.2."),
    (r"\bbn1b\.", "narrow.3."), (r"\bbn_out\.", "norm."),
    (r"\bdw\.", "by_channel."), (r"\bbn1\.", "first_norm."), (r"\bpw\.", "by_place."), (r"\bbn2\.", "second_norm."),
    (r"^ca\.", "channels."), (r"^sa\.", "places."), (r"\bw1$", "narrow.weight"), (r"\bw2$", "widen.weight"),
    (r"\bc7\.", "look."), (r"(^|(?<=places\.))c1\.(?=weight|bias)", "decide."),
    (r"^k\.", "key."), (r"^q\.", "query."), (r"^v\.", "value."),
]  # fmt: skip
"""The fixtures' names of weights, and ours."""
FOLDING = [(r"^c1\.", "spread."), (r"^c2\.", "smooth.")]


def test_a_convolution_block_is_the_published_one(shared) -> None:
    equals(shared, "conv_block", ConvBlock(6, 10, PLANE, 2, faithful=True))


def test_a_bridge_is_the_published_one(shared) -> None:
    equals(shared, "bridge_block", Bridge(6, 8, 4))


def test_a_path_is_the_published_one(shared) -> None:
    equals(shared, "res_path2", nn.Sequential(*[PathBlock(7, PLANE, faithful=True) for _ in range(2)]))


def test_attention_along_rows_is_the_published_one(shared) -> None:
    equals(shared, "row_attention", RowAttention(8, (3,), 1.0, faithful=True))


def test_weights_of_channels_are_the_published_ones(shared) -> None:
    equals(shared, "channel_attention", ChannelWeights(32, 2), weighs=True)


def test_weights_of_places_are_the_published_ones(shared) -> None:
    equals(shared, "spatial_attention", PlaceWeights(PLANE, faithful=True), weighs=True)


def test_the_sum_of_both_weighings_is_the_published_one(shared) -> None:
    equals(shared, "ca_sa", Weighing(32, PLANE, faithful=True))


def test_restoration_is_the_published_one(shared) -> None:
    equals(shared, "d2s_block", Restoration(8, PLANE, (1, 2, 2)), names=FOLDING)


def test_a_gate_lets_all_pass_or_nothing() -> None:
    gate = UpGate(6, 10, 16).eval()
    x, y = torch.randn(1, 6, 1, 8, 8), torch.randn(1, 10, 1, 4, 4)
    assert not torch.allclose(gate(x, y), gate(x, -y), atol=1e-3)
    for bias, passed in ((50.0, x), (-50.0, torch.zeros_like(x))):
        nn.init.constant_(gate.opening.bias, bias)
        torch.testing.assert_close(gate(x, y), gate.norm(gate.out(passed)))


def test_channels_are_folded_into_space_in_the_published_order(shared) -> None:
    arrays = published(shared, "d2s_order")
    assert torch.equal(depth_to_space(arrays["x"], (1, 2, 2)), arrays["y"])


def test_a_plane_is_enlarged_as_published(shared) -> None:
    arrays = published(shared, "upsample_bilinear")
    torch.testing.assert_close(resize(arrays["x"], arrays["y"].shape[2:]), arrays["y"], **SEEN)


def test_the_faithful_network_has_the_published_number_of_weights() -> None:
    with torch.device("meta"):
        config = fit(Config(faithful=True), patch=(1, 256, 256), spacing=ISOTROPIC)
        network = build(config, channels=3, classes=1)
    trained = sum(weight.numel() for weight in network.parameters())
    running = sum(buffer.numel() for name, buffer in network.named_buffers() if "running" in name)
    assert (trained, trained + running) == (50_925_553, 51_057_271)
    assert divisor(config) == (1, 32, 32)


@pytest.mark.parametrize("patch", [(1, 64, 96), (64, 96, 1)])
def test_the_faithful_network_answers_six_times_that_all_count_the_same(patch) -> None:
    config = fit(Config(width=4, faithful=True), patch=patch, spacing=ISOTROPIC)
    network, x = build(config, channels=2, classes=3), torch.randn(1, 2, *patch)
    answer = network.train()(x)
    assert isinstance(answer, Answer) and answer.weights == (1.0,) * 6
    assert all(logits.shape == (1, 3, *patch) for logits in answer.logits)
    sum((logits * torch.randn_like(logits)).sum() for logits in answer.logits).backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in network.parameters())
    assert network.eval()(x).shape == (1, 3, *patch)


def test_the_faithful_network_refuses_volumes() -> None:
    with pytest.raises(ValueError, match="2-D"):
        fit(Config(faithful=True), patch=(64, 64, 64), spacing=ISOTROPIC)


def test_a_transposed_scan_is_looked_at_the_same_way_but_not_by_the_published_rows() -> None:
    x = torch.randn(2, 8, 3, 5, 7)
    for attention, same in ((RowAttention(8, (1, 2, 3), 8**-0.5), True), (RowAttention(8, (3,), 1.0), False)):
        turned = attention(x.transpose(2, 4).contiguous()).transpose(2, 4)
        assert torch.allclose(attention(x), turned, atol=1e-5) == same


def test_attention_along_rows_is_that_of_every_pair_in_a_row() -> None:
    attention, x = RowAttention(4, (1, 2, 3), 0.5), torch.randn(1, 4, 3, 5, 6)
    q, k, v = (layer(x.movedim(1, -1)) for layer in (attention.query, attention.key, attention.value))
    rows = (
        torch.einsum("bzhwc,byhwc->bhwzy", q, k), torch.einsum("bdzwc,bdywc->bdwzy", q, k),
        torch.einsum("bdhzc,bdhyc->bdhzy", q, k),
    )  # fmt: skip
    found = [
        torch.einsum(told, (0.5 * scores).softmax(-1), v)
        for told, scores in zip(("bhwzy,byhwc->bzhwc", "bdwzy,bdywc->bdzwc", "bdhzy,bdhyc->bdhzc"), rows, strict=True)
    ]
    torch.testing.assert_close(attention(x), (sum(found) / 3).movedim(-1, 1))


def test_published_scores_choose_one_place_and_the_defaults_do_not() -> None:
    x = torch.randn(1, 512, 1, 1, 64) * 2
    for scale, low, high in ((1.0, 0.5, 1.0), (512**-0.5, 0.0, 0.3)):
        torch.manual_seed(0)
        attention = RowAttention(512, (3,), scale)
        rows = x.movedim(1, -1)[0, 0, 0]
        shares = (scale * attention.query(rows) @ attention.key(rows).mT).softmax(-1)
        assert low <= shares.amax(-1).mean() <= high


def test_a_factor_before_a_norm_is_taken_away_again() -> None:
    """Why the default's path has none."""
    theirs, x = PathBlock(6, PLANE, faithful=True).train(), torch.randn(2, 6, 1, 8, 8) * 3
    before = theirs(x)
    with torch.no_grad():
        theirs.narrow[0].weight *= 40 * theirs.narrow[0].weight.abs().reciprocal()
        loud = theirs(x)
        theirs.narrow[0].weight *= 3
    torch.testing.assert_close(theirs(x), loud, rtol=1e-3, atol=1e-3)
    assert before.shape == loud.shape
    assert not any(isinstance(layer, nn.Conv3d) and layer.groups > 1 for layer in PathBlock(6, PLANE).narrow)


def test_places_are_weighed_the_same_in_training_and_in_use() -> None:
    x = torch.randn(1, 8, 4, 8, 8)
    for faithful in (False, True):
        weights = PlaceWeights((3, 3, 3), faithful=faithful)
        assert torch.equal(weights.train()(x), weights.eval()(x)) is not faithful


@pytest.mark.parametrize("stride", [(1, 2, 2), (2, 2, 2), (1, 1, 2)])
def test_folding_moves_every_number_and_loses_none(stride) -> None:
    x = torch.arange(2 * 8 * 3 * 2 * 4.0).reshape(2, 8, 3, 2, 4)
    folded = depth_to_space(x, stride)
    assert torch.equal(folded.flatten().sort().values, x.flatten())
    first = torch.tensor(stride).prod()
    for place in range(int(first)):  # the place in a block is the slow part of the channel's number
        at = np.unravel_index(place, stride)
        blocks = folded[:, :, at[0] :: stride[0], at[1] :: stride[1], at[2] :: stride[2]]
        assert torch.equal(blocks, x[:, place * len(blocks[0]) : (place + 1) * len(blocks[0])])


@pytest.mark.parametrize("patch", [(16, 16, 8), (1, 32, 16), (16, 8, 1)])
@pytest.mark.parametrize(("batch", "channels"), [(1, 3), (2, 1)])
def test_planes_and_volumes_train(patch, batch, channels) -> None:
    torch.manual_seed(0)
    config = fit(Config(width=4), patch=patch, spacing=ISOTROPIC)
    assert config.dims == (2 if 1 in patch else 3)
    network = build(config, channels=channels, classes=2)
    patch = tuple(math.ceil(n / d) * d * 2 if n > 1 else 1 for n, d in zip(patch, divisor(config), strict=True))
    x = torch.randn(batch, channels, *patch)
    logits = network.train()(x)
    assert logits[0].shape == (batch, 2, *patch)
    sum((level * torch.randn_like(level)).sum() for level in logits).backward()
    for name, weight in network.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.abs().max() > 0, name
    assert network.eval()(x).shape == (batch, 2, *patch)


def test_a_plane_is_the_same_plane_along_whichever_axis_it_is_thin() -> None:
    flat = build(fit(Config(width=4), patch=(1, 16, 32), spacing=ISOTROPIC), channels=1, classes=2).eval()
    upright = build(fit(Config(width=4), patch=(16, 1, 32), spacing=ISOTROPIC), channels=1, classes=2).eval()
    shapes = {name: weight.shape for name, weight in upright.state_dict().items()}
    upright.load_state_dict({name: weight.reshape(shapes[name]) for name, weight in flat.state_dict().items()})
    x = torch.randn(1, 1, 1, 16, 32)
    torch.testing.assert_close(upright(x.transpose(2, 3)).transpose(2, 3), flat(x))
    with pytest.raises(ValueError, match="2-D"):
        flat(torch.randn(1, 1, 8, 16, 32))


def test_attention_can_be_looked_at() -> None:
    network, x = small().train(), torch.randn(2, 1, 16, 24, 16)
    network.stem.eval()
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    maps = mcads.attention_maps(network, x)
    finest = f"steps.{len(network.steps) - 1}"
    assert {f"{finest}.rows", f"{finest}.weigh.channels", f"{finest}.weigh.places"} <= set(maps)
    assert maps[f"{finest}.rows"].shape == maps[f"{finest}.weigh.places"].shape == (2, 16, 24, 16)
    assert maps[f"{finest}.weigh.channels"].shape == (2, 4)
    assert all(seen.min() >= 0 and seen.max() <= 1 and not seen.requires_grad for seen in maps.values())
    others = mcads.attention_maps(network, torch.randn(2, 1, 16, 24, 16))
    assert not any(torch.equal(seen, others[name]) for name, seen in maps.items())
    assert network.training and not network.stem.training
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())
    assert next(iter(explained(network))) == finest


def test_what_a_place_receives_is_the_mean_of_its_rows() -> None:
    attention, x = RowAttention(4, (1, 3), 0.5).eval(), torch.randn(2, 4, 5, 3, 7)
    attention.is_watched = True
    attention(x)
    q, k = (layer(x.movedim(1, -1)) for layer in (attention.query, attention.key))
    down = (0.5 * torch.einsum("bzhwc,byhwc->bhwzy", q, k)).softmax(-1).sum(-2).movedim(-1, 1)
    along = (0.5 * torch.einsum("bdhzc,bdhyc->bdhzy", q, k)).softmax(-1).sum(-2)
    down, along = (each / each.amax((1, 2, 3), keepdim=True) for each in (down, along))
    torch.testing.assert_close(attention.seen, (down + along) / 2)


def test_half_precision_agrees() -> None:
    network, x = small().eval(), torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        halved = network(x)
    whole = network(x)
    assert (halved - whole).abs().mean() < 0.05 * whole.abs().mean() + 0.01


def test_it_is_exported_whole(unchecked) -> None:
    network, x = small(patch=(8, 8, 8)).eval(), torch.randn(1, 1, 8, 8, 8)
    torch.testing.assert_close(torch.export.export(network, (x,)).module()(x), network(x))


def test_it_compiles_whole(unchecked) -> None:
    network, x = small(width=2, patch=(8, 8, 8)).train(), torch.randn(1, 1, 8, 8, 8)
    torch.compiler.reset()
    for seen, expected in zip(torch.compile(network, backend="aot_eager", fullgraph=True)(x), network(x), strict=True):
        torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)


def test_training_repeats_bit_by_bit() -> None:
    x = torch.randn(1, 1, 16, 16, 16)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (gradients(small().train(), x) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(strides=((1, 1, 1),), kernels=((3, 3, 3),)), "one of each per stage"),
        (dict(width=0), "1 or more"),
        (dict(blocks=()), "1 or more"),
        (dict(restored=-1), "0 or more"),
    ],
)
def test_a_config_that_cannot_be_is_refused(wrong, words) -> None:
    with pytest.raises(ValueError, match=words):
        Config(**wrong)


def small(width: int = 4, patch=(16, 16, 16), **settings) -> nn.Module:
    torch.manual_seed(0)
    config = fit(Config(width=width, **settings), patch=patch, spacing=ISOTROPIC)
    return build(config, channels=1, classes=3)


def gradients(network: nn.Module, x: Tensor) -> list[Tensor]:
    sum(logits.square().mean() for logits in network(x)).backward()
    return [weight.grad for weight in network.parameters()]


def published(shared, name: str) -> dict[str, Tensor]:
    """Planes stand upright: [B, C, 1, H, W]; so do the windows of their convolutions."""
    with np.load(shared / "fixtures" / "mcads" / f"{name}.npz") as arrays:
        tensors = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    return {key: tensor.unsqueeze(2) if tensor.ndim == 4 else tensor for key, tensor in tensors.items()}


def equals(shared, name: str, module: nn.Module, *, weighs: bool = False, names=NAMES) -> None:
    """With the fixture's weights, each of which has a place; none of ours is left out."""
    arrays = published(shared, name)
    state = {name: value for name, value in module.state_dict().items() if name.endswith("num_batches_tracked")}
    for key in arrays:
        if key.startswith("w_"):
            ours = key[2:]
            for pattern, replacement in names:
                ours = re.sub(pattern, replacement, ours)
            state[ours] = arrays[key]
    module.load_state_dict(state)
    y = module.eval()(arrays["x"])
    torch.testing.assert_close(y * arrays["x"] if weighs else y, arrays["y"], **SEEN)
