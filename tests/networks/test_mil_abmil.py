"""Attention-based pooling: what Ilse's own module and AEM's baseline compute, and what `faithful` means."""

import pytest
import torch
from torch import nn

from networks import mil_abmil
from networks.parts.bags import Bags
from networks.parts.entropy import attention_entropy_loss

SEEN = dict(rtol=1e-4, atol=2e-5)
"""What the fixtures' own page asks of another implementation."""

ILSE = {
    "gated": {
        "attention_V.0": "attention.v",
        "attention_U.0": "attention.u",
        "attention_w": "attention.w",
        "classifier.0": "head",
    },
    "plain": {"attention.0": "attention.v", "attention.2": "attention.w", "classifier.0": "head"},
}
AEM = {
    "dimreduction.fc1": "project.0",
    "attention.attention_V.0": "attention.v",
    "attention.attention_U.0": "attention.u",
    "attention.attention_weights": "attention.w",
    "classifier.fc": "head",
}
"""The fixtures' names of layers, and ours."""


def loaded(network: nn.Module, arrays: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, str]:
    """Fills the network with the published weights; the names of both, for each weight."""
    ours = {key[2:]: key[2:].rpartition(".") for key in arrays if key.startswith("w/")}
    ours = {theirs: f"{names[layer]}.{kind}" for theirs, (layer, _, kind) in ours.items()}
    network.load_state_dict({name: arrays[f"w/{theirs}"] for theirs, name in ours.items()})
    return ours


def assert_gradients(network: nn.Module, arrays: dict[str, torch.Tensor], ours: dict[str, str]) -> None:
    for theirs, name in ours.items():
        found = network.get_parameter(name).grad
        if f"grad/{theirs}" in arrays:
            torch.testing.assert_close(found, arrays[f"grad/{theirs}"], **SEEN)
        else:
            torch.testing.assert_close(found.norm(), arrays[f"gradnorm/{theirs}"], **SEEN)


@pytest.mark.parametrize("form", ["gated", "plain"])
def test_faithful_is_what_ilses_own_module_computes(form: str, published) -> None:
    arrays = published(f"abmil/ilse_{form}.npz")
    network = mil_abmil.build(mil_abmil.Config(attention=form, faithful=True), features=500, classes=2)
    network.project = nn.Identity()  # the fixture begins behind it
    ours = loaded(network, arrays, ILSE[form])
    bags = Bags.of(arrays["H"])
    answer = network(bags)
    torch.testing.assert_close(answer.scores.T, arrays["attn_logits"], **SEEN)
    torch.testing.assert_close(answer.attention(bags).T, arrays["attn_softmax"], **SEEN)
    torch.testing.assert_close(answer.logits.softmax(1)[:, 1:], arrays["Y_prob"], **SEEN)
    losses = network.losses(answer, bags, arrays["label"].long())
    torch.testing.assert_close(losses["bag"], arrays["loss_nll"][0, 0], **SEEN)
    losses["bag"].backward()
    assert_gradients(network, arrays, ours)


@pytest.mark.parametrize("name", ["abmil_aem", "abmil_aem_topk"])
def test_the_default_with_entropy_is_what_aem_publishes(name: str, published) -> None:
    arrays = published(f"aem/{name}.npz")
    features, width, classes = arrays["cfg_D_feat,D_inner,n_class"].tolist()
    network = mil_abmil.build(mil_abmil.Config(width=width, hidden=16), features=features, classes=classes)
    ours = loaded(network, arrays, AEM)
    bags = Bags.of(arrays["x"][0])
    answer = network(bags)
    torch.testing.assert_close(answer.scores.T[None], arrays["attn_logits"], **SEEN)
    torch.testing.assert_close(answer.attention(bags).T[None], arrays["attn_softmax"], **SEEN)
    torch.testing.assert_close(answer.logits, arrays["bag_logits"], **SEEN)
    loss = network.losses(answer, bags, arrays["y"])["bag"]
    torch.testing.assert_close(loss, arrays["loss_bag"], **SEEN)
    spread = attention_entropy_loss(answer, bags, int(arrays.get("cfg_top_k", 0)))
    torch.testing.assert_close(spread, arrays["loss_neg_entropy"], **SEEN)
    loss = loss + float(arrays["cfg_lambda"]) * spread
    torch.testing.assert_close(loss, arrays["loss_total"], **SEEN)
    loss.backward()
    assert_gradients(network, arrays, ours)


@pytest.mark.parametrize(
    ("features", "weights"), [(384, 82_563), (512, 197_507), (768, 394_371), (1024, 656_771), (1536, 1_378_179)]
)
def test_it_has_as_many_weights_as_published_for_each_encoder(features: int, weights: int) -> None:
    with torch.device("meta"):
        network = mil_abmil.build(mil_abmil.Config(), features=features, classes=2)
    assert sum(weight.numel() for weight in network.parameters()) == weights


def test_the_clamped_likelihood_has_no_gradient_where_it_is_most_wrong_and_the_default_has() -> None:
    bags, labels = Bags.of(torch.randn(5, 8)), torch.tensor([1])
    for faithful in (True, False):
        network = mil_abmil.build(mil_abmil.Config(faithful=faithful), features=8, classes=2)
        nn.init.constant_(network.head.bias, 0)
        nn.init.constant_(network.head.bias[-1:], -100.0)  # sure of class 0
        network.losses(network(bags), bags, labels)["bag"].backward()
        assert bool(network.head.bias.grad.any()) is not faithful


def test_the_faithful_form_is_refused_for_more_than_two_classes() -> None:
    with pytest.raises(ValueError, match="3 classes; 2 are needed"):
        mil_abmil.build(mil_abmil.Config(faithful=True), features=8, classes=3)


@pytest.mark.parametrize("options", [dict(width=-1), dict(hidden=0), dict(attention="loud")])
def test_a_config_that_cannot_be_is_refused(options, unchecked) -> None:
    with pytest.raises(ValueError, match="Correct the wrong one"):
        mil_abmil.Config(**options)
