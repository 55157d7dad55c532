"""DSMIL answers as its authors' code does, divides its logits exactly among tiles, and never holds a second bag."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from networks import mil_dsmil
from networks.parts import bags as parts
from networks.parts.bags import Bags

SEEN = dict(rtol=1e-4, atol=2e-5)
"""What the fixtures' own page asks of another implementation."""
OURS = {
    "i_classifier.fc.0.": "instance.", "b_classifier.q.0.": "query.0.", "b_classifier.q.2.": "query.2.",
    "b_classifier.q.": "query.", "b_classifier.fcc.": "bag.",
}  # fmt: skip
"""The fixtures' names of weights, and ours."""


def published(shared, path: str) -> dict[str, torch.Tensor]:
    file = shared / "fixtures" / path
    if not file.is_file():
        pytest.skip(f"the arrays of the authors' code (../shared/fixtures/{path}) are not on this machine")
    with np.load(file) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def ours(arrays: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    found = {}
    for key, value in arrays.items():
        if key.startswith(prefix):
            theirs = next(name for name in OURS if key.startswith(prefix + name))
            found[OURS[theirs] + key.removeprefix(prefix + theirs)] = value
    return found


def network_of(arrays: dict[str, torch.Tensor], config: mil_dsmil.Config, features: int, classes: int):
    network = mil_dsmil.build(config, features=features, classes=classes)
    network.load_state_dict(ours(arrays, "w/"))
    return network


def assert_gradients(network: torch.nn.Module, arrays: dict[str, torch.Tensor]) -> None:
    theirs = ours(arrays, "grad/")
    assert set(theirs) == {name for name, _ in network.named_parameters()}
    for name, weight in network.named_parameters():
        torch.testing.assert_close(weight.grad, theirs[name], **SEEN)


def test_forward_losses_and_gradients_are_the_published_ones(shared) -> None:
    arrays = published(shared, "dsmil/dsmil_binary.npz")
    network = network_of(arrays, mil_dsmil.Config(faithful=True), 32, 2)
    bags = Bags.of(arrays["x"])
    answer = network(bags)
    torch.testing.assert_close(answer.more["bag"], arrays["bag_logits"], **SEEN)
    torch.testing.assert_close(answer.more["instances"][0], arrays["max_logits"], **SEEN)
    torch.testing.assert_close(answer.attention(bags), arrays["attn_softmax_NxC"], **SEEN)
    torch.testing.assert_close(answer.logits[0], (arrays["bag_logits"][0] + arrays["max_logits"]) / 2, **SEEN)
    both = torch.stack([answer.more["bag"], answer.more["instances"]]).sigmoid().mean(0)[0]
    torch.testing.assert_close(both, arrays["eval_prob"], **SEEN)

    losses = network.losses(answer, bags, arrays["label_multihot"].argmax(1), None)
    torch.testing.assert_close(2 * losses["bag"], arrays["loss_bag"], **SEEN)
    torch.testing.assert_close(2 * losses["instances"], arrays["loss_max"], **SEEN)
    total = sum(losses.values())
    torch.testing.assert_close(total, arrays["loss_total"], **SEEN)
    total.backward()
    assert_gradients(network, arrays)


def test_the_linear_form_with_entropy_is_the_published_one(shared) -> None:
    arrays = published(shared, "aem/dsmil_aem.npz")
    network = network_of(arrays, mil_dsmil.Config(linear=True, hidden=32), 48, 3)
    bags = Bags.of(arrays["x"][0])
    answer = network(bags)
    torch.testing.assert_close(answer.scores.T, arrays["attn_logits"], **SEEN)
    torch.testing.assert_close(answer.attention(bags).T, arrays["attn_softmax"], **SEEN)
    torch.testing.assert_close(answer.more["bag"], arrays["bag_logits"], **SEEN)
    torch.testing.assert_close(answer.more["instances"], arrays["max_logits"], **SEEN)
    both = torch.stack([answer.more["bag"], answer.more["instances"]]).softmax(2).mean(0)
    torch.testing.assert_close(both, arrays["pred_prob"], **SEEN)

    main = sum(network.losses(answer, bags, arrays["y"], None).values())
    torch.testing.assert_close(main, arrays["loss_bag"], **SEEN)
    torch.testing.assert_close(-answer.entropy.mean(), arrays["loss_neg_entropy"], **SEEN)
    (main - arrays["cfg_lambda"] * answer.entropy.mean()).backward()
    assert_gradients(network, arrays)


@pytest.mark.parametrize(
    "features, classes, config, count",
    [
        (512, 1, mil_dsmil.Config(), 83_202),
        (384, 2, mil_dsmil.Config(linear=True, hidden=128), 51_588),
        (512, 2, mil_dsmil.Config(linear=True, hidden=256), 134_404),
        (768, 2, mil_dsmil.Config(linear=True, hidden=384), 299_908),
        (1024, 2, mil_dsmil.Config(linear=True, hidden=512), 530_948),
    ],
)
def test_it_has_as_many_weights_as_the_authors_networks(features, classes, config, count) -> None:
    network = mil_dsmil.build(config, features=features, classes=classes)
    assert sum(weight.numel() for weight in network.parameters()) == count


def by_hand(network: mil_dsmil.Dsmil, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and shares by the formula, a tile and a class at a time."""
    classes = network.instance.out_features
    instance, q = network.instance(h), network.query(h)
    shares = torch.zeros(len(h), classes, dtype=h.dtype)
    logits = (network.instance.bias + network.bag.bias).clone() / 2
    for seen in range(classes):
        critical = int(instance[:, seen].argmax())
        a = torch.softmax(q @ q[critical] / math.sqrt(q.shape[1]), 0)
        shares[critical, seen] += network.instance.weight[seen] @ h[critical] / 2
        for out in range(classes):
            shares[:, out] += a * (h @ network.bag.weight[out, seen]) / 2
    return logits + shares.sum(0), shares


@torch.no_grad()
@pytest.mark.parametrize("linear", [False, True])
def test_logits_and_shares_are_those_of_the_formula(linear) -> None:
    torch.manual_seed(0)
    network = mil_dsmil.build(mil_dsmil.Config(hidden=8, linear=linear), features=12, classes=3).double()
    bags = Bags(features=torch.randn(30, 12).double(), offsets=torch.tensor([0, 17, 18, 30]))
    answer = network(bags, explain=True)
    for number, bag in enumerate(bags.each()):
        logits, shares = by_hand(network, bag.features)
        torch.testing.assert_close(answer.logits[number], logits)
        start, end = bags.offsets[number : number + 2].tolist()
        torch.testing.assert_close(answer.shares[start:end], shares)
        torch.testing.assert_close(answer.rest[number] + answer.shares[start:end].sum(0), logits)


def test_blocks_change_neither_the_answer_nor_the_gradients(monkeypatch) -> None:
    found = []
    for size in (8192, 7):
        monkeypatch.setattr(parts, "TILES_AT_ONCE", size)
        torch.manual_seed(0)
        network = mil_dsmil.build(mil_dsmil.Config(hidden=8), features=12, classes=2).double()
        bags = Bags(features=torch.randn(50, 12).double(), offsets=torch.tensor([0, 33, 50]))
        answer = network(bags, explain=True)
        loss = sum(network.losses(answer, bags, torch.tensor([0, 1]), None).values()) - answer.entropy.mean()
        loss.backward()
        found.append([answer.logits, answer.shares, answer.entropy, *(w.grad for w in network.parameters())])
    for whole, pieces in zip(*found, strict=True):
        torch.testing.assert_close(whole, pieces)


def test_the_weight_of_a_class_counts_for_a_single_bag_too() -> None:
    torch.manual_seed(0)
    for faithful in (False, True):
        network = mil_dsmil.build(mil_dsmil.Config(faithful=faithful), features=6, classes=2)
        bags = Bags.of(torch.randn(5, 6))
        answer, label = network(bags), torch.tensor([1])
        plain = network.losses(answer, bags, label, None)
        weighted = network.losses(answer, bags, label, torch.tensor([1.0, 3.0]))
        for name, loss in plain.items():
            torch.testing.assert_close(weighted[name], 3 * loss)


def test_both_streams_learn_to_find_the_one_tile_that_decides() -> None:
    torch.manual_seed(0)
    network = mil_dsmil.build(mil_dsmil.Config(hidden=16), features=8, classes=2)
    features, labels = torch.randn(12, 20, 8), torch.arange(12) % 2
    features[labels == 1, 3, 0] += 6
    bags = Bags(features=features.flatten(0, 1), offsets=torch.arange(0, 241, 20))
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(80):
        optimiser.zero_grad()
        sum(network.losses(network(bags), bags, labels, None).values()).backward()
        optimiser.step()
    answer = network(bags, explain=True)
    assert torch.equal(answer.logits.argmax(1), labels)
    towards = (answer.shares[:, 1] - answer.shares[:, 0]).reshape(12, 20)
    assert (towards[labels == 1].argmax(1) == 3).all()


def test_a_query_without_width_is_refused() -> None:
    with pytest.raises(ValueError, match="mil_dsmil was given hidden 0"):
        mil_dsmil.Config(hidden=0)


def test_a_loss_of_one_bag_is_the_cross_entropy_of_its_streams() -> None:
    torch.manual_seed(0)
    network = mil_dsmil.build(mil_dsmil.Config(), features=6, classes=3)
    bags = Bags.of(torch.randn(4, 6).half())
    answer = network(bags)
    losses = network.losses(answer, bags, torch.tensor([2]), None)
    for name in ("bag", "instances"):
        torch.testing.assert_close(losses[name], functional.cross_entropy(answer.more[name][0], torch.tensor(2)) / 2)
