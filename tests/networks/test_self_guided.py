"""self_guided is the authors' network where it is asked to be, and looks where its attention says in either form."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from networks import self_guided
from networks.parts.attention.channel import ChannelAttention
from networks.parts.attention.position import PositionAttention, received
from networks.parts.backbone import ResNet

ISOTROPIC = (1.0, 1.0, 1.0)
PLANE = dict(strides=((1, 1, 1), (1, 2, 2), (1, 2, 2)), kernels=((1, 3, 3),) * 3, dims=2)
VOLUME = dict(strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)), kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)))
BOTH = pytest.mark.parametrize(("form", "patch"), [(PLANE, (1, 24, 16)), (VOLUME, (4, 8, 12))])

# the authors' names beside ours
LAYER = {"attn.0": "0.0", "attn.1": "0.1", "attn.2": "0.2", "attn.3": "1", "attn.4": "2.0", "attn.5": "2.1",
         "attn.6": "2.2", "query_conv": "query", "key_conv": "key", "value_conv": "value"}  # fmt: skip
FUSE = {f"fuse_attn.{i}": f"{i // 3}.{i % 3}" for i in range(9)}
SEMANTIC = {
    f"{theirs}.{i}": f"{ours}.{j}"
    for theirs, ours, steps in [
        ("enc1.encode", "encode.0", {0: "0.0", 1: "0.1", 3: "1.0", 4: "1.1"}),
        ("enc2.encode", "encode.2", {0: "0.0", 1: "0.1", 3: "1.0", 4: "1.1"}),
        ("dec2.decode", "decode.0", {0: "0.0", 1: "0.1", 3: "1.0", 4: "1.1"}),
        ("dec1.decode", "decode.2", {0: "0.0", 1: "0.1", 3: "1.0", 4: "1.1"}),
    ]
    for i, j in steps.items()
} | {"dec2.decode.6": "decode.1", "dec1.decode.6": "decode.3"}


@pytest.mark.parametrize("name", ["pam", "cam"])
def test_position_and_channel_attention_are_the_authors(shared, name) -> None:
    arrays = fixture(shared, name)
    attention = PositionAttention(16, key_bias=True) if name == "pam" else ChannelAttention(16)
    fill(attention, arrays, LAYER)
    x = arrays["x"].requires_grad_()
    y = attention(x)
    near(y, arrays["y"])
    (y * arrays["cot"]).sum().backward()
    near(x.grad, arrays["grad_x"])
    for key, theirs in arrays.items():
        if key.startswith("grad_") and key not in ("grad_x", "grad_key_conv.bias"):
            near(attention.get_parameter(renamed(key.removeprefix("grad_"), LAYER)).grad, theirs)


def test_a_bias_of_keys_is_taken_away_by_the_softmax(shared) -> None:
    assert fixture(shared, "pam")["grad_key_conv.bias"].abs().max() < 1e-5
    assert PositionAttention(16).key.bias is None


@pytest.mark.parametrize("name", ["pam", "cam"])
def test_attention_between_two_convolutions_is_the_authors(shared, name) -> None:
    arrays = fixture(shared, f"{name}_layer")
    refinement = self_guided.Refinement(published(width=16))
    layer = refinement.position if name == "pam" else refinement.channel
    fill(layer, arrays, LAYER)
    near(layer.eval()(arrays["x"]), arrays["y_eval"])
    near(layer.train()(arrays["x"]), arrays["y_train"])
    for key, theirs in arrays.items():
        if key.startswith("after_"):
            near(layer.get_buffer(renamed(key.removeprefix("after_"), LAYER)), theirs)


def test_the_scales_are_fused_as_the_authors_do(shared) -> None:
    arrays = fixture(shared, "fuse")
    network = self_guided.build(published(width=64), channels=1, classes=2)
    fill(network.fuse, arrays, FUSE)
    near(network.fuse.eval()(arrays["x"]), arrays["y_eval"])


def test_the_auto_encoder_is_the_authors(shared) -> None:
    arrays = fixture(shared, "semantic")
    auto_encoder = self_guided.AutoEncoder(
        published(width=4, strides=((1, 1, 1), *[(1, 2, 2)] * 3), kernels=((1, 3, 3),) * 4)
    )
    fill(auto_encoder, arrays, SEMANTIC)
    for mode, suffix in [(False, ""), (True, "_train")]:
        latent, decoded = auto_encoder.train(mode)(arrays["x"])
        near(latent.flatten(), arrays[f"latent_flat{suffix}"])
        near(decoded, arrays[f"decoded{suffix}"])


def test_the_losses_add_up_as_the_authors_do(shared) -> None:
    arrays = dict(np.load(shared / "fixtures" / "msa" / "loss.npz"))
    logits, target, latents, pairs = (torch.from_numpy(arrays[key]) for key in ("logits", "target", "latents", "recs"))
    network = self_guided.build(published(width=2), channels=1, classes=5)
    losses = network._losses(list(latents.flatten(0, 1)), [(copy, given) for given, copy in pairs])
    near(losses["guidance"], 0.25 * torch.tensor(arrays["guided_sum"]))
    near(losses["reconstruction"], 0.1 * torch.tensor(arrays["rec_sum"]))
    surprise = sum(functional.cross_entropy(one, target) for one in logits)
    near(surprise + sum(losses.values()), torch.tensor(arrays["total"]))


def test_the_published_network_has_as_many_weights_as_published() -> None:
    config = self_guided.fit(self_guided.Config(faithful=True), patch=(1, 256, 256), spacing=ISOTROPIC)
    with torch.device("meta"):
        network = self_guided.build(config, channels=1, classes=5)
    everything, encoder = count(network), count(network.encoder)
    assert encoder == 86_736_064
    assert everything - encoder == 16_819_999
    assert everything + 955_412 == 104_511_475  # the authors' modules that nothing uses are left out


@pytest.mark.parametrize(("backbone", "known"), [("resnet101", 42_493_888), ("resnext101_32x4d", 42_122_432)])
def test_the_other_backbones_have_as_many_weights_as_published(backbone, known) -> None:
    config = self_guided.fit(self_guided.Config(backbone=backbone), patch=(1, 64, 64), spacing=ISOTROPIC)
    with torch.device("meta"):
        assert count(self_guided.build(config, channels=1, classes=5).encoder) == known


def test_the_published_network_answers_and_differs_from_scan_to_scan() -> None:
    config = published(
        width=4, backbone="resnext101_32x4d", strides=((1, 1, 1), *[(1, 2, 2)] * 5), kernels=((1, 3, 3),) * 6, grid=2
    )
    network = self_guided.build(config, channels=2, classes=3).eval()
    x = torch.randn(2, 2, 1, 32, 48)
    with torch.no_grad():
        logits = network(x)
    assert logits.shape == (2, 3, 1, 32, 48)
    assert not torch.allclose(logits[0], logits[1])


def test_resnets_take_volumes_and_keep_the_coarse_axis() -> None:
    given = self_guided.Config(backbone="resnet101", width=4)
    config = self_guided.fit(given, patch=(8, 48, 48), spacing=(4.0, 1.0, 1.0))
    assert self_guided.divisor(config) == (4, 16, 16)
    with torch.device("meta"):
        network = self_guided.build(config, channels=1, classes=2)
        assert isinstance(network.encoder, ResNet)
        answer = network.train()(torch.empty(1, 1, 8, 48, 48))
    assert [one.shape for one in answer.logits] == [(1, 2, 8, 48, 48)] * 8


@BOTH
@pytest.mark.parametrize("batch", [1, 2])
def test_training_answers_at_every_scale_before_and_after_attention(form, patch, batch) -> None:
    network = tiny(form)
    answer = network.train()(torch.randn(batch, 1, *patch))
    assert [one.shape for one in answer.logits] == [(batch, 3, *patch)] * 4
    assert answer.weights == (1.0,) * 4
    assert set(answer.losses) == {"guidance", "reconstruction"}
    assert all(loss.shape == () and loss > 0 for loss in answer.losses.values())


@BOTH
def test_in_use_the_answer_is_the_mean_after_attention(form, patch) -> None:
    network = tiny(form)
    x = torch.randn(1, 1, *patch)
    refined = network.train()(x).logits[:2]
    torch.testing.assert_close(network.eval()(x), torch.stack(refined).mean(0), rtol=1e-4, atol=1e-5)


@BOTH
def test_a_gradient_reaches_every_weight_in_the_first_step(form, patch) -> None:
    network = tiny(form).train()
    answer = network(torch.randn(1, 1, *patch))
    total = sum((one * torch.randn_like(one)).sum() for one in answer.logits) + sum(answer.losses.values())
    total.backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 1e-6, name


def test_the_authors_queries_and_keys_wait_for_the_second_step() -> None:
    """gamma is 0: the default starts it at 0.1."""
    network = self_guided.build(published(width=8), channels=1, classes=2).train()
    sum(one.square().mean() for one in network(torch.randn(2, 1, 1, 16, 16)).logits).backward()
    attentions = [module for module in network.modules() if isinstance(module, PositionAttention)]
    assert all(module.query.weight.grad.abs().max() == 0 for module in attentions)
    assert all(module.gamma.grad.abs().max() > 0 for module in attentions)


def test_a_step_repeats_bit_by_bit_under_deterministic_algorithms() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        first, second = gradients(), gradients()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_guidance_draws_the_second_latent_to_the_first() -> None:
    network = tiny(VOLUME)
    one = torch.ones(1, 2, 3)
    assert network._losses([one, one, one, one], [(one, one)])["guidance"] == 0
    assert network._losses([one, one + 2, one, one], [(one, one)])["guidance"] == 0.25 * 4


@pytest.mark.parametrize("detached", [False, True])
def test_what_is_remembered_learns_to_be_easy_unless_it_is_detached(detached) -> None:
    network = tiny(VOLUME, detach_target=detached)
    pair, copy = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    network._losses([copy, copy], [(copy, pair)])["reconstruction"].backward()
    assert (pair.grad is None) == detached and copy.grad is not None


@BOTH
def test_every_attention_shows_what_it_does_with_this_scan(form, patch) -> None:
    network = tiny(form, look=(1, 2, 2)).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    first, second = (self_guided.attention_maps(network, torch.randn(2, 1, *patch)) for _ in range(2))
    grid = [n // step for n, step in zip(patch, network.stride, strict=True)]
    looked_at = [math.ceil(n / step) for n, step in zip(grid, (1, 2, 2), strict=True)]
    assert len(first) == 2 * 2 * 2  # steps, scales, position and channel
    for name, shown in first.items():
        assert shown.shape == ((2, 4, 4) if "channel" in name else (2, *looked_at)), name
        assert shown.min() >= 0 and shown.max() <= 1 and not shown.requires_grad
        assert not torch.allclose(shown, second[name], atol=1e-3), name
        assert shown.std() > 1e-3, name
    assert network.training and all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_attention_received_is_the_maps_columns() -> None:
    q, k = torch.randn(2, 600, 3), torch.randn(2, 50, 3)
    columns = torch.softmax(0.5 * (q @ k.mT), dim=-1).sum(1)
    near(received(q, k, 0.5), columns / columns.amax(-1, keepdim=True))


@pytest.mark.parametrize("size", [(5, 7), (1, 9), (3, 5, 1), (7, 2, 6)])
def test_position_attention_halves_maps_of_any_size(size) -> None:
    attention = PositionAttention(4, dims=len(size), stride=2)
    x = torch.randn(2, 4, *size)
    assert torch.equal(attention(x), x)
    torch.nn.init.ones_(attention.gamma)
    assert attention(x).shape == x.shape and not torch.allclose(attention(x), x)


def test_a_uniform_map_is_attended_to_alike_from_afar_and_from_close() -> None:
    near_by, far = PositionAttention(4), PositionAttention(4, stride=(1, 2, 2))
    torch.nn.init.ones_(near_by.gamma)
    far.load_state_dict(near_by.state_dict())
    x = torch.randn(1, 4, 1, 1, 1).expand(1, 4, 2, 4, 4).contiguous()
    near(far(x), near_by(x))


def test_summed_over_places_one_channel_alone_is_looked_at_but_not_in_their_mean() -> None:
    x = torch.randn(1, 8, 4, 16, 16, generator=torch.Generator().manual_seed(0)) + 0.3
    summed, mean = ChannelAttention(8), ChannelAttention(8, mean=True)
    shares = {}
    for attention in (summed, mean):
        attention.is_watched = True
        attention(x)
        shares[attention] = attention.seen.amax(-1).mean()
    assert shares[summed] > 0.95
    assert 1 / 8 < shares[mean] < 0.5


def test_the_sign_says_whether_channels_look_at_their_like() -> None:
    with pytest.raises(ValueError, match="−1 or 1"):
        ChannelAttention(8, sign=0)
    like = ChannelAttention(2, sign=1, mean=True)
    like.is_watched = True
    like(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]))
    assert like.seen[0, 0, 0] > 0.5 > like.seen[0, 0, 1]


@BOTH
def test_half_precision_agrees(form, patch) -> None:
    network, x = tiny(form).eval(), torch.randn(1, 1, *patch)
    with torch.no_grad():
        precise = network(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = network(x)
    assert (half.float() - precise).square().mean().sqrt() < 0.06 * precise.std()


def test_exported_it_answers_the_same() -> None:
    network, x = tiny(VOLUME).eval(), torch.randn(1, 1, 4, 8, 12)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(network, (x,)).module()(x), network(x))


def test_gates_start_open_unless_published() -> None:
    x = torch.randn(1, 8, 1, 8, 8)
    open_gate, published_gate = (
        self_guided.build(config, channels=1, classes=2).steps[0].refine[0].gate(x)
        for config in (self_guided.Config(width=4, **PLANE), published(width=4))
    )
    assert 0.7 < open_gate.mean() < 1.3 and open_gate.std() < 0.3
    assert abs(published_gate.mean()) < 0.5


FITTED = [
    ((40, 56, 40), ISOTROPIC, 1, (2, 2, 2), 3, (8, 8, 8)),
    ((128, 128, 128), ISOTROPIC, 2, (2, 2, 2), 4, (32, 32, 32)),  # a quarter, as published
    ((256, 256, 1), ISOTROPIC, 1, (2, 2, 1), 4, (16, 16, 1)),
    ((1, 64, 64), (0.1, 1.0, 1.0), 1, (1, 1, 1), 4, (1, 16, 16)),  # a thin axis's spacing says nothing of the plane
    ((16, 96, 96), (5.0, 0.8, 0.8), 2, (2, 2, 2), 3, (4, 16, 16)),
]


@pytest.mark.parametrize(("patch", "spacing", "grid", "look", "scales", "divisor"), FITTED)
def test_the_scales_meet_where_places_are_bearable(patch, spacing, grid, look, scales, divisor) -> None:
    config = self_guided.fit(self_guided.Config(), patch=patch, spacing=spacing)
    assert (config.grid, config.look, len(config.strides) - config.grid) == (grid, look, scales)
    assert self_guided.divisor(config) == divisor
    assert config.dims == (2 if 1 in patch else 3)
    thin = patch.index(1) if 1 in patch else None
    assert all(kernel[axis] == (1 if axis == thin else 3) for kernel in config.kernels[-1:] for axis in range(3))


def test_more_tokens_are_looked_at_where_the_user_bears_them() -> None:
    config = self_guided.fit(self_guided.Config(tokens=32_768), patch=(128, 128, 128), spacing=ISOTROPIC)
    assert config.look == (1, 1, 1)


def test_the_authors_network_refuses_volumes() -> None:
    with pytest.raises(ValueError, match="Plan with 2-D patches"):
        self_guided.fit(self_guided.Config(faithful=True), patch=(40, 56, 40), spacing=ISOTROPIC)


@pytest.mark.parametrize(
    "wrong",
    [dict(sign=2), dict(width=0), dict(guidance=-1.0), dict(tokens=0), PLANE | dict(grid=3),
     dict(strides=((2, 2, 2), (2, 2, 2)), kernels=((3, 3, 3),) * 2), PLANE | dict(backbone="resnet101")],
)  # fmt: skip
def test_a_config_that_cannot_be_built_is_refused(wrong) -> None:
    with pytest.raises(ValueError, match="self_guided was given"):
        self_guided.Config(**wrong)


def test_what_can_be_explained_is_named_nearest_to_the_answer_first() -> None:
    network = tiny(VOLUME)
    named = self_guided.explained(network)
    assert list(named) == ["attended.0", "attended.1", "fused", "scale.0", "scale.1"]
    assert all(module in set(network.modules()) for module in named.values())


def tiny(form, **chosen):
    torch.manual_seed(0)
    return self_guided.build(self_guided.Config(width=4, **form, **chosen), channels=1, classes=3)


def published(**chosen):
    """The authors' modules around our own small encoder."""
    return self_guided.Config(faithful=True, **(dict(PLANE, backbone="residual") | chosen))


def gradients() -> list[torch.Tensor]:
    network = tiny(VOLUME, look=(1, 2, 2)).train()
    answer = network(torch.randn(1, 1, 4, 8, 12, generator=torch.Generator().manual_seed(1)))
    (sum(one.square().mean() for one in answer.logits) + sum(answer.losses.values())).backward()
    return [parameter.grad for parameter in network.parameters()]


def fixture(shared, name: str) -> dict[str, torch.Tensor]:
    """Planes as volumes one voxel thick, which is what our networks take."""
    arrays = {
        key: torch.from_numpy(value) for key, value in np.load(shared / "fixtures" / "msa" / f"{name}.npz").items()
    }
    return {key: value.unsqueeze(2) if value.ndim == 4 else value for key, value in arrays.items()}


def fill(module, arrays, names) -> None:
    weights = {renamed(key.removeprefix("w_"), names): value for key, value in arrays.items() if key.startswith("w_")}
    missing, unexpected = module.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)


def renamed(key: str, names) -> str:
    for theirs in sorted(names, key=len, reverse=True):
        key = key.replace(theirs, names[theirs])
    return key


def near(ours, theirs) -> None:
    """Within a hundred-thousandth of the largest number: the tolerance that the fixtures' README gives."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
