"""CLAM: what the authors' module computes in both forms and both losses, and small bags, on which theirs stops."""

import itertools

import pytest
import torch
from torch import nn

from networks import mil_clam
from networks.parts.bags import BagAnswer, Bags

SEEN = dict(rtol=1e-4, atol=2e-5)
"""What the fixtures' own page asks of another implementation."""

NAMES = {
    "attention_net.0": "project.0",
    "attention_net.3.attention_a.0": "attention.v",
    "attention_net.3.attention_b.0": "attention.u",
    "attention_net.3.attention_c": "attention.w",
    "classifiers": "head",
    "instance_classifiers": "of_tiles",
}
"""The fixtures' names of layers, and ours: one layer where they have one for each class."""


def gathered(arrays: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The published tensors of one kind by our names; those of each class one below the other."""
    found: dict[str, list[torch.Tensor]] = {}
    for key in (key for key in arrays if key.startswith(prefix)):
        layer, _, kind = key.removeprefix(prefix).rpartition(".")
        if layer not in NAMES:
            layer = layer.rpartition(".")[0]
        found.setdefault(f"{NAMES[layer]}.{kind}", []).append(arrays[key])
    return {name: torch.cat(parts) if parts[0].ndim else torch.stack(parts).norm() for name, parts in found.items()}


def filled(arrays: dict[str, torch.Tensor], **options) -> nn.Module:
    config = mil_clam.Config(maps="sb" if len(arrays["attn_logits"]) == 1 else "mb", **options)
    network = mil_clam.build(config, features=32, classes=arrays["logits"].shape[1])
    network.load_state_dict(gathered(arrays, "w/"))
    return network.eval()


@pytest.mark.parametrize("name", ["sb_binary_ce", "sb_binary_svm", "mb_subtyping_ce", "mb_subtyping_svm"])
def test_answer_instances_losses_and_gradients_are_the_authors(name: str, published) -> None:
    arrays = published(f"clam/{name}.npz")
    network = filled(arrays, instances="cross_entropy" if name.endswith("ce") else "svm")
    bags = Bags.of(arrays["x"])
    answer = network(bags)
    torch.testing.assert_close(answer.scores.T, arrays["attn_logits"], **SEEN)
    torch.testing.assert_close(answer.attention(bags).T, arrays["attn_softmax"], **SEEN)
    torch.testing.assert_close(answer.logits, arrays["logits"], **SEEN)

    losses = network.losses(answer, bags, arrays["label"])
    torch.testing.assert_close(losses["bag"] / 0.7, arrays["loss_bag"], **SEEN)
    torch.testing.assert_close(losses["instances"] / 0.3, arrays["loss_instance"], **SEEN)
    torch.testing.assert_close(sum(losses.values()), arrays["loss_total"], **SEEN)
    sum(losses.values()).backward()
    gradients = {name: weight.grad for name, weight in network.named_parameters()}
    for name, expected in gathered(arrays, "grad/").items():
        torch.testing.assert_close(gradients[name], expected, **SEEN)
    norms = gathered(arrays, "gradnorm/")
    assert norms.keys() == gradients.keys()
    for name, expected in norms.items():
        torch.testing.assert_close(gradients[name].norm(), expected, **SEEN)


@pytest.mark.parametrize("name", ["sb_binary_svm", "mb_subtyping_svm"])
def test_instances_are_asked_what_the_authors_ask(name: str, published) -> None:
    arrays = published(f"clam/{name}.npz")
    network, bags = filled(arrays), Bags.of(arrays["x"])
    subtypes = bool(arrays["cfg_embed,L,D,n_classes,k_sample,subtyping"][-1])
    assert network.subtypes is subtypes
    found = mil_clam.chosen(network(bags), bags, arrays["label"], sampled=8, others=subtypes, both=False)
    assert torch.equal(found.wanted, arrays["inst_labels"])
    logits = network.of_tiles(network.project(arrays["x"][found.tile])).unflatten(1, (-1, 2))
    said = logits[torch.arange(len(logits)), found.of_class].argmax(1)
    # which of several tiles comes first is nobody's promise, so each class's answers are compared as a whole
    for of_class in found.of_class.unique():
        for wanted in (0, 1):
            some = (found.of_class == of_class) & (found.wanted == wanted)
            assert sorted(said[some].tolist()) == sorted(arrays["inst_preds"][some].tolist())


@pytest.mark.parametrize("batch", ["c2", "c4", "hard"])
def test_the_smooth_svm_is_the_published_one(batch: str, published) -> None:
    arrays = published("clam/smooth_top1_svm.npz")
    logits = arrays[f"{batch}/logits"].requires_grad_()
    loss = mil_clam.smooth_top1_svm(logits, arrays[f"{batch}/labels"]).mean()
    torch.testing.assert_close(loss, arrays[f"{batch}/loss"], **SEEN)
    loss.backward()
    torch.testing.assert_close(logits.grad, arrays[f"{batch}/grad_logits"], **SEEN)


@pytest.mark.parametrize(("maps", "weights"), [("sb", 790_791), ("mb", 791_048)])
def test_it_has_as_many_weights_as_published(maps, weights: int) -> None:
    with torch.device("meta"):
        network = mil_clam.build(mil_clam.Config(maps=maps), features=1024, classes=2)
    assert sum(weight.numel() for weight in network.parameters()) == weights


def drawn(*sizes: int, maps: int = 1, classes: int = 2) -> tuple[BagAnswer, Bags]:
    """An answer whose tiles have any scores."""
    offsets = torch.tensor([0, *itertools.accumulate(sizes)])
    scores = torch.randn(sum(sizes), maps)
    log_sums = torch.stack([part.logsumexp(0) for part in scores.split(sizes)])
    answer = BagAnswer(
        logits=torch.zeros(len(sizes), classes), scores=scores, log_sums=log_sums, entropy=torch.zeros_like(log_sums)
    )
    return answer, Bags(features=torch.randn(sum(sizes), 3), offsets=offsets)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 15, 16, 40])
def test_no_tile_of_a_small_bag_is_said_to_be_and_not_to_be(size: int) -> None:
    answer, bags = drawn(size, 30)
    found = mil_clam.chosen(answer, bags, torch.tensor([1, 0]), sampled=8, others=False, both=False)
    mine = found.bag == 0
    assert len(found.tile[mine].unique()) == mine.sum() == 2 * min(8, size // 2)
    assert (found.tile[mine] < size).all() and (found.tile[~mine] >= size).all()
    high, low = (answer.scores[found.tile[mine & (found.wanted == wanted)]] for wanted in (1, 0))
    assert size == 1 or high.min() >= low.max()
    both = mil_clam.chosen(answer, bags, torch.tensor([1, 0]), sampled=8, others=False, both=True)
    assert (both.bag == 0).sum() == 2 * min(8, size)


@pytest.mark.parametrize("maps", [1, 3])
def test_with_subtypes_the_other_classes_hear_that_their_strongest_are_not_theirs(maps: int) -> None:
    answer, bags = drawn(30, maps=maps, classes=3)
    found = mil_clam.chosen(answer, bags, torch.tensor([1]), sampled=4, others=True, both=False)
    assert found.of_class.bincount().tolist() == [4, 8, 4]
    assert found.wanted[found.of_class != 1].sum() == 0 and found.wanted.sum() == 4
    torch.testing.assert_close(found.weight.sum(), torch.tensor(1.0))
    for of_class in range(3):
        torch.testing.assert_close(found.weight[found.of_class == of_class].sum(), torch.tensor(1 / 3))
    column = answer.scores[:, 2 if maps > 1 else 0]
    assert set(found.tile[found.of_class == 2].tolist()) == set(column.topk(4).indices.tolist())


def test_a_bag_of_one_tile_has_no_instances_and_trains() -> None:
    network = mil_clam.build(mil_clam.Config(width=16, hidden=4), features=6, classes=2)
    bags = Bags.of(torch.randn(1, 6))
    losses = network.losses(network(bags), bags, torch.tensor([1]))
    assert losses["instances"] == 0
    sum(losses.values()).backward()
    assert network.head.weight.grad.any() and not network.of_tiles.weight.grad.any()


def test_the_faithful_gate_leaves_numbers_out_in_training_alone() -> None:
    bags = Bags.of(torch.randn(40, 6))
    for faithful in (True, False):
        config = mil_clam.Config(width=16, hidden=8, dropout=1e-9, faithful=faithful)
        network = mil_clam.build(config, features=6, classes=2)
        first, second = network(bags).scores, network(bags).scores
        assert torch.equal(first, second) is not faithful
        network.eval()
        torch.testing.assert_close(network(bags).scores, network(bags).scores)


def test_dropout_of_tiles_is_the_same_when_a_block_is_made_again_for_the_backward_pass() -> None:
    bags = Bags.of(torch.randn(40, 6))
    network = mil_clam.build(mil_clam.Config(width=16, hidden=8, dropout=0.5), features=6, classes=2)
    network.double()
    bags = Bags.of(bags.features.double())

    def logit() -> torch.Tensor:
        torch.manual_seed(0)
        return network(bags).logits[0, 0]

    logit().backward()
    weight = network.project[0].bias
    step, found = 1e-6, weight.grad[3].item()
    with torch.no_grad():
        weight[3] += step
        above = logit()
        weight[3] -= 2 * step
        below = logit()
    assert found == pytest.approx(((above - below) / (2 * step)).item(), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(
    "options", [dict(width=0), dict(sampled=0), dict(dropout=1.0), dict(bag_weight=2.0), dict(maps="xb")]
)
def test_a_config_that_cannot_be_is_refused(options, unchecked) -> None:
    with pytest.raises(ValueError, match="Correct the wrong one"):
        mil_clam.Config(**options)
