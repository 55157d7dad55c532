"""MEDUSA keeps what its paper says of it: one body, a head for each scale, and gates that begin nearly open."""

import math

import pytest
import torch
from torch import nn

from networks import medusa
from networks.parts.attention._layers import OPEN


@pytest.mark.parametrize("patch", [(16, 24, 16), (1, 32, 48)])
def test_the_gates_begin_nearly_open(patch) -> None:
    network = fitted(patch)
    gates = gates_of(network, torch.randn(2, 1, *patch))
    assert len(gates) == len(network.backbone.down)
    for gate in gates.values():
        assert gate.shape[:2] == (2, 1)
        assert (gate - 1 / (1 + math.exp(-OPEN))).abs().max() < 0.02


def test_with_open_gates_it_is_the_backbone_alone() -> None:
    network, x = fitted((16, 16, 16)), torch.randn(1, 1, 16, 16, 16)
    for head in network.heads:
        nn.init.constant_(head.gate.bias, 200.0)
    with torch.no_grad():
        alone = network.answers[0](network.backbone(x.contiguous(memory_format=torch.channels_last_3d))[0])
        torch.testing.assert_close(network(x), alone)


def test_what_a_gate_is_comes_from_the_map_by_the_formula() -> None:
    torch.manual_seed(0)
    head, seen, x = medusa.Head(2, 4, 1, (3, 3, 3)), torch.randn(1, 2, 4, 4, 6), torch.randn(1, 5, 2, 2, 3)
    averaged = seen.unfold(2, 2, 2).unfold(3, 2, 2).unfold(4, 2, 2).mean((-3, -2, -1))
    torch.testing.assert_close(head(seen, x), x * torch.sigmoid(head.gate(head.adapt(averaged))))


def test_every_voxel_of_the_map_counts_at_every_scale() -> None:
    for size in [(8, 8, 8), (4, 4, 4), (2, 2, 2), (1, 1, 1), (8, 4, 4)]:
        seen = torch.randn(1, 1, 4, 4, 4, requires_grad=True)
        medusa._on_grid(seen, torch.Size(size)).sum().backward()
        assert seen.grad.min() > 0
        torch.testing.assert_close(
            medusa._on_grid(torch.ones(1, 1, 4, 4, 4), torch.Size(size)), torch.ones(1, 1, *size)
        )


def test_a_closed_gate_lets_nothing_through() -> None:
    network, x = fitted((16, 16, 16)), torch.randn(2, 1, 16, 16, 16)
    nn.init.constant_(network.heads[0].gate.bias, -200.0)
    with torch.no_grad():
        logits = network(x)
    torch.testing.assert_close(logits[0], logits[1])  # whatever the image was


def test_the_body_is_shared_and_every_scale_sees_the_same_map() -> None:
    network, seen = fitted((16, 16, 16)), []
    for head in network.heads:
        head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        network(torch.randn(1, 1, 16, 16, 16))
    assert len(seen) == len(network.heads) and all(one is seen[0] for one in seen)


def test_the_guided_body_answers_at_half_the_resolution() -> None:
    network = fitted((16, 32, 32), classes=3).train()
    x = torch.randn(1, 1, 16, 32, 32)
    levels = network(x)
    assert [tuple(level.shape[2:]) for level in levels] == [(16, 32, 32), (8, 16, 16), (4, 8, 8)][: len(levels)]
    with torch.no_grad():
        torch.testing.assert_close(levels[1], network.body(x.contiguous(memory_format=torch.channels_last_3d)))


def test_unguided_the_map_is_one_channel_and_the_backbone_answers_everywhere() -> None:
    network = fitted((16, 32, 32), classes=3, guided=False).train()
    x = torch.randn(1, 1, 16, 32, 32)
    assert network.body(x).shape == (1, 1, 8, 16, 16)
    levels = network(x)
    assert [level.shape[1] for level in levels] == [3] * (len(network.backbone.down) - 1)
    sum((level * torch.randn_like(level)).sum() for level in levels).backward()
    assert all(weight.grad.abs().max() > 0 for weight in network.parameters())


@pytest.mark.parametrize("patch", [(16, 16, 24), (1, 32, 32), (16, 1, 32), (8, 8, 8)])
@pytest.mark.parametrize("each", [False, True])
def test_planes_and_volumes_train_and_every_weight_learns(patch, each) -> None:
    network = fitted(patch, channels=2, classes=4, each=each).train()
    levels = network(torch.randn(1, 2, *patch))
    assert levels[0].shape == (1, 4, *patch)
    sum((level * torch.randn_like(level)).sum() for level in levels).backward()
    for name, weight in network.named_parameters():
        assert weight.grad.isfinite().all() and weight.grad.abs().max() > 0, name


def test_along_the_thin_axis_of_a_plane_no_weight_is_wasted() -> None:
    network = fitted((32, 1, 32))
    assert all(m.kernel_size[1] == 1 for m in network.modules() if isinstance(m, nn.Conv3d | nn.ConvTranspose3d))
    assert network.divisor[1] == 1 < network.divisor[0] == network.divisor[2]


def test_body_and_heads_cost_little_beside_the_backbone() -> None:
    with torch.device("meta"):
        config = medusa.fit(medusa.Config(), patch=(40, 56, 40), spacing=(1.0, 1.0, 1.0))
        network = medusa.build(config, channels=1, classes=3)
    heads, body, backbone = (
        sum(p.numel() for p in part.parameters()) for part in (network.heads, network.body, network.backbone)
    )
    assert heads == 4 * (3 * 8 * 27 + 2 * 8 + 8 + 1)  # a head does not grow with the stage it gates
    assert heads < body < backbone / 3


def test_a_gate_for_each_channel_has_as_many_as_the_stage() -> None:
    network = fitted((16, 16, 16), each=True)
    gates = gates_of(network, torch.randn(1, 1, 16, 16, 16))
    assert [gate.shape[1] for gate in gates.values()] == network.backbone.widths


@pytest.mark.parametrize("patch", [(16, 16, 24), (1, 32, 48)])
def test_the_map_and_the_gates_can_be_seen_and_change_with_the_image(patch) -> None:
    network = fitted(patch, classes=3).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    x, other = torch.randn(2, 1, 1, *patch)
    maps, others = medusa.attention_maps(network, x), medusa.attention_maps(network, other)
    assert list(maps) == ["body", *(f"heads.{n}" for n in range(len(network.heads)))]
    assert maps["body"].shape == (1, 3, -(-patch[0] // 2), patch[1] // 2, patch[2] // 2)
    for name, seen in maps.items():
        assert not seen.requires_grad and seen.min() >= 0 and seen.max() <= 1
        assert not torch.equal(seen, others[name]), name
    assert network.training and all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_what_explains_the_answer_is_named_last_layer_first() -> None:
    network = fitted((16, 16, 16))
    named = medusa.explained(network)
    assert next(iter(named)) == "backbone.merge.0"
    assert all(network.get_submodule(name) is module for name, module in named.items())


@pytest.mark.parametrize("patch", [(16, 16, 16), (1, 32, 32)])
def test_half_precision_says_nearly_the_same_and_the_network_is_exported_whole(patch) -> None:
    network, x = fitted(patch, classes=3), torch.randn(1, 1, *patch)
    with torch.no_grad():
        full = network(x)
        with torch.autocast("cpu", torch.bfloat16):
            half = network(x)
    assert (half.float() - full).norm() < 0.05 * full.norm()
    torch.testing.assert_close(torch.export.export(network, (x,)).module()(x), full)


def test_training_on_a_cpu_gives_the_same_bits_every_time() -> None:
    gradients = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            network = fitted((16, 16, 16)).train()
            x = torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
            sum(level.square().sum() for level in network(x)).backward()
            gradients.append([weight.grad for weight in network.parameters()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


@pytest.mark.parametrize("wrong", [dict(strides=((1, 1, 1),)), dict(head=0), dict(blocks=())])
def test_what_cannot_be_built_is_refused(wrong) -> None:
    with pytest.raises(ValueError, match="medusa was given"):
        medusa.Config(**wrong)


def test_a_patch_too_small_to_halve_is_refused() -> None:
    with pytest.raises(ValueError, match="larger patch"):
        medusa.fit(medusa.Config(), patch=(6, 6, 6), spacing=(1.0, 1.0, 1.0))


def fitted(patch: tuple[int, int, int], channels: int = 1, classes: int = 2, **chosen: bool) -> medusa.Medusa:
    torch.manual_seed(0)
    config = medusa.Config(width=4, body=4, head=4, blocks=(1,), **chosen)
    config = medusa.fit(config, patch=patch, spacing=(1.0, 1.0, 1.0))
    return medusa.build(config, channels=channels, classes=classes).eval()


def gates_of(network: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: seen for name, seen in medusa.attention_maps(network, x).items() if name.startswith("heads")}
