"""MPU-Net equals its authors' modules and their parameters; what was wrong there is mended in the default."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from networks import mpu_net
from networks.mpu_net import Config, Down, Gate, build, divisor, explained, fit
from networks.parts.answer import Answer
from networks.parts.attention.position import PositionAttention
from networks.parts.dims import resize
from networks.parts.losses import DeepSupervision

SEEN = dict(rtol=1e-5, atol=1e-5)
"""What the fixtures' own page asks of another implementation."""
ISOTROPIC = (1.0, 1.0, 1.0)
NAMES = {
    "down_conv.1.": "convolution.", "down_conv.2.": "norm.",
    "Wx.": "of_x.", "Wg.": "of_g.", "psi.": "opening.",
    "query_conv.": "query.", "key_conv.": "key.", "value_conv.": "value.",
    "map_conv.0.": "",
}  # fmt: skip
"""The authors' names of weights, and ours."""


@pytest.mark.parametrize(
    ("name", "kernel", "stride"), [("down_k2", (3, 3, 3), (2, 2, 2)), ("down_k3", (3, 3, 3), (1, 1, 1))]
)
def test_a_step_down_is_the_published_one(shared, name, kernel, stride) -> None:
    arrays = published(shared, name)
    step = taught(Down(8, 16, kernel, stride, True), arrays)
    torch.testing.assert_close(step(arrays["x"]), arrays["y"], **SEEN)


def test_a_gate_is_the_published_one(shared) -> None:
    arrays = published(shared, "gate")
    gate = taught(Gate(16, True), arrays)
    torch.testing.assert_close(gate(arrays["x"], arrays["g"]), arrays["y"], **SEEN)
    torch.testing.assert_close(gate(arrays["x"], arrays["g_half"]), arrays["y_half"], **SEEN)


def test_position_attention_and_its_gradient_are_the_published_ones(shared) -> None:
    arrays = published(shared, "pam3d")
    attention = taught(PositionAttention(16, key_bias=True), arrays)
    x = arrays["x"].requires_grad_()
    y = attention(x)
    torch.testing.assert_close(y, arrays["y"], **SEEN)
    torch.testing.assert_close(torch.autograd.grad(y, x, arrays["cot"])[0], arrays["grad_x"], **SEEN)


def test_a_map_of_probabilities_is_the_published_one(shared) -> None:
    arrays = published(shared, "map")
    head = taught(nn.Conv3d(8, 2, 1), arrays)
    torch.testing.assert_close(resize(head(arrays["x"]), arrays["y"].shape[2:]).softmax(1), arrays["y"], **SEEN)


def test_published_precision_is_recall_and_published_specificity_the_negatives_value(shared) -> None:
    arrays = published(shared, "loss_metrics")
    true, some = one_hot(arrays["target"]), arrays["prob"]
    for kind, found in (("hard", one_hot(some.argmax(1))), ("soft", some)):
        both, alarms, missed, neither = (
            (a * b).sum((0, 2, 3, 4))
            for a, b in ((found, true), (found, 1 - true), (1 - found, true), (1 - found, 1 - true))
        )
        product = (both + alarms) * (both + missed) * (neither + alarms) * (neither + missed)
        seen = {
            "dice": 2 * both / (2 * both + alarms + missed), "iou": both / (both + alarms + missed),
            "acc": (both + neither) / true[:, 0].numel(), "mcc": (both * neither - alarms * missed) / product.sqrt(),
            "precision_as_coded": both / (both + missed), "specificity_as_coded": neither / (neither + missed),
        }  # fmt: skip
        for name, values in seen.items():
            torch.testing.assert_close(values, arrays[f"metric_{kind}_{name}"], **SEEN)
        if kind == "hard":
            torch.testing.assert_close(arrays["true_precision"], both / (both + alarms), **SEEN)
            torch.testing.assert_close(arrays["true_recall"], both / (both + missed), **SEEN)
            torch.testing.assert_close(arrays["true_specificity"], neither / (neither + alarms), **SEEN)
            torch.testing.assert_close(arrays["true_npv"], neither / (neither + missed), **SEEN)


def test_the_published_loss_cannot_become_small(shared) -> None:
    arrays = published(shared, "loss_metrics")
    true = one_hot(arrays["target"])
    torch.testing.assert_close(published_loss(arrays["prob"], true), arrays["tversky_bce"], **SEEN)
    both, size = (arrays["prob"] * true).sum((2, 3, 4)), (arrays["prob"] + true).sum((2, 3, 4))
    torch.testing.assert_close(1 - (2 * both / (size + 1)).mean(), arrays["dice"], **SEEN)
    assert published_loss(true, true) > 0.5  # of a perfect answer: theirs takes a sigmoid of probabilities
    perfect = torch.where(true > 0, 20.0, -20.0)
    assert DeepSupervision()(perfect, arrays["target"]) < 1e-3


def test_the_faithful_network_has_the_published_weights_that_are_used() -> None:
    unused = 1_049_754  # an up-convolution, a decoder and a head
    with torch.device("meta"):
        config = fit(Config(faithful=True), patch=(48, 256, 256), spacing=(1.0, 0.8, 0.8))
        network = build(config, channels=1, classes=2)
    assert sum(weight.numel() for weight in network.parameters()) == 22_557_009 - unused
    assert divisor(config) == (8, 8, 8)


def test_the_faithful_answer_is_the_mean_of_four_probabilities() -> None:
    network, x = small(faithful=True).eval(), torch.randn(1, 1, 16, 24, 8)
    maps: list[Tensor] = []
    for head in network.heads:
        head.register_forward_hook(lambda _, __, logits: maps.append(resize(logits, x.shape[2:]).softmax(1)))
    answer = network(x)
    assert len(maps) == 4
    torch.testing.assert_close(answer.softmax(1), torch.stack(maps).mean(0))


def test_the_faithful_network_supervises_as_published() -> None:
    network, x = small(faithful=True, dropout=0.0), torch.randn(2, 1, 16, 16, 16)
    answer = network.train()(x)
    assert isinstance(answer, Answer) and answer.weights == (1.0, 0.4, 0.4, 0.4)
    assert all(logits.shape == (2, 3, 16, 16, 16) for logits in answer.logits)


def test_a_region_may_be_likely_only_in_the_default() -> None:
    """Regions overlap and are read through a sigmoid, to which the logarithm of a probability is at most a half."""
    x = torch.randn(1, 1, 16, 16, 16)
    for faithful, likely in ((True, False), (False, True)):
        network = small(faithful=faithful).eval()
        for head in network.heads:
            nn.init.constant_(head.bias, 9.0)
        assert bool((network(x).sigmoid() > 0.5).any()) == likely


def test_negative_numbers_are_bounded_by_one_and_not_by_the_number_of_channels() -> None:
    x = torch.randn(1, 8, 8, 8, 8) * 100
    for faithful, lowest in ((True, -16.0), (False, -1.0)):
        step = Down(8, 16, (3, 3, 3), (2, 2, 2), faithful).train()
        nn.init.constant_(step.norm.bias, -50.0)
        assert step(x).min().item() == pytest.approx(lowest)


def test_what_a_gate_lets_pass_depends_on_what_it_sees() -> None:
    gate = Gate(8, False)
    x, g = torch.randn(1, 8, 4, 4, 4), torch.randn(1, 8, 4, 4, 4)
    assert not torch.allclose(gate(x, g) / x, gate(x, -g) / x, atol=1e-3)


@pytest.mark.parametrize("faithful", [True, False])
@pytest.mark.parametrize("patch", [(16, 16, 8), (1, 32, 16), (16, 8, 1)])
@pytest.mark.parametrize(("batch", "channels"), [(1, 3), (2, 1)])
def test_planes_and_volumes_train(faithful, patch, batch, channels) -> None:
    config = fit(Config(width=4, faithful=faithful), patch=patch, spacing=ISOTROPIC)
    assert config.dims == (2 if 1 in patch else 3)
    network = build(config, channels=channels, classes=2)
    if faithful:
        nn.init.constant_(network.attention[1].gamma, 0.4)
    patch = tuple(math.ceil(n / d) * d * 2 if n > 1 else 1 for n, d in zip(patch, divisor(config), strict=True))
    x = torch.randn(batch, channels, *patch)
    answers = network.train()(x)
    logits = answers.logits if isinstance(answers, Answer) else answers
    assert logits[0].shape == (batch, 2, *patch)
    sum((level * torch.randn_like(level)).sum() for level in logits).backward()
    for name, weight in network.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), name
        assert faithful or weight.grad.abs().max() > 0, name  # theirs has constants before norms, which take them away
    assert network.eval()(x).shape == (batch, 2, *patch)


def test_a_plane_is_the_same_plane_along_whichever_axis_it_is_thin() -> None:
    flat = build(fit(Config(width=4), patch=(1, 16, 32), spacing=ISOTROPIC), channels=1, classes=2).eval()
    upright = build(fit(Config(width=4), patch=(16, 1, 32), spacing=ISOTROPIC), channels=1, classes=2).eval()
    upright.load_state_dict(
        {name: weight.reshape(upright.state_dict()[name].shape) for name, weight in flat.state_dict().items()}
    )
    x = torch.randn(1, 1, 1, 16, 32)
    torch.testing.assert_close(upright(x.transpose(2, 3)).transpose(2, 3), flat(x))
    with pytest.raises(ValueError, match="2-D"):
        flat(torch.randn(1, 1, 8, 16, 32))


def test_fit_halves_on_where_attention_would_look_at_too_much() -> None:
    wide = fit(Config(), patch=(256, 256, 256), spacing=ISOTROPIC)
    assert divisor(wide) == (16, 16, 16)
    assert divisor(fit(Config(tokens=64), patch=(256, 256, 256), spacing=ISOTROPIC)) == (64, 64, 64)
    assert divisor(fit(Config(), patch=(128, 128, 128), spacing=ISOTROPIC)) == (8, 8, 8)


def test_attention_can_be_looked_at() -> None:
    network, x = small().train(), torch.randn(2, 1, 16, 16, 16)
    network.forget.eval()
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    maps = mpu_net.attention_maps(network, x)
    assert set(maps) == {"attention.1", "gates.0", "gates.1", "gates.2", "gates.3"}
    assert maps["attention.1"].shape == (2, 2, 2, 2) and maps["gates.3"].shape == (2, 16, 16, 16)
    assert all(seen.min() >= 0 and seen.max() <= 1 and not seen.requires_grad for seen in maps.values())
    others = mpu_net.attention_maps(network, torch.randn(2, 1, 16, 16, 16))
    assert not any(torch.allclose(seen, others[name], atol=1e-3) for name, seen in maps.items())
    assert network.training and not network.forget.training
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())
    assert next(iter(explained(network))) == "gates.3"
    assert all(isinstance(layer, nn.Module) for layer in explained(network).values())


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
        (dict(dropout=1.0), "below 1"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_is_refused(wrong, words) -> None:
    with pytest.raises(ValueError, match=words):
        Config(**wrong)


def small(width: int = 4, patch=(32, 32, 32), **settings) -> nn.Module:
    torch.manual_seed(0)
    config = fit(Config(width=width, **settings), patch=patch, spacing=ISOTROPIC)
    return build(config, channels=1, classes=3)


def gradients(network: nn.Module, x: Tensor) -> list[Tensor]:
    sum(logits.square().mean() for logits in network(x)).backward()
    return [weight.grad for weight in network.parameters()]


def published(shared, name: str) -> dict[str, Tensor]:
    with np.load(shared / "fixtures" / "mpunet" / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def taught(module: nn.Module, arrays: dict[str, Tensor]) -> nn.Module:
    """The module in use, with the authors' weights: every one of theirs has a place, and none of ours is left out."""
    state = {name: value for name, value in module.state_dict().items() if name.endswith("num_batches_tracked")}
    for key in arrays:
        if key.startswith("w_"):
            name = key[2:]
            for theirs, ours in NAMES.items():
                name = ours + name.removeprefix(theirs) if name.startswith(theirs) else name
            state[name] = arrays[key]
    module.load_state_dict(state)
    return module.eval()


def one_hot(labels: Tensor) -> Tensor:
    return nn.functional.one_hot(labels, 2).movedim(-1, 1).float()


def published_loss(probability: Tensor, true: Tensor) -> Tensor:
    """Tversky's index without a smooth numerator, and a cross-entropy of the sigmoid of probabilities."""
    both, missed, alarms = (
        (a * b).sum((2, 3, 4)) for a, b in ((probability, true), (1 - probability, true), (probability, 1 - true))
    )
    index = both / (both + 0.7 * missed + 0.3 * alarms + 1)
    surprise = nn.functional.binary_cross_entropy(probability.sigmoid(), true)
    return (1 - index.mean(1)).clamp(0, 1).mean() + surprise
