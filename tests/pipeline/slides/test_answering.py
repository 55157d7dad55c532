"""What is said of a slide is what its tiles add up to, whoever asks and however; and the same with some of them left out."""

from pathlib import Path

import numpy as np
import pytest
import torch

import networks
from networks.parts.bags import BagAnswer, Bags
from pipeline.slides.answering import answer, bag_of, without
from pipeline.slides.scores import softmax
from tests.pipeline.slides.planted import write_slide

FEATURES, CLASSES = 12, 3


@pytest.fixture(params=["mil_abmil", "mil_acmil"])
def members(request: pytest.FixtureRequest) -> list[torch.nn.Module]:
    """Two untrained networks of a kind, ready to answer."""
    module = networks.load_for_slides(request.param)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return [module.build(module.Config(), features=FEATURES, classes=CLASSES).eval() for _ in range(2)]


def a_bag(tiles: int = 30, seed: int = 0) -> Bags:
    random = torch.Generator().manual_seed(seed)
    features = torch.randn(tiles, FEATURES, generator=random).half() * 3
    return Bags.of(features, torch.stack([torch.arange(tiles) % 6, torch.arange(tiles) // 6], 1))


def test_shares_and_rest_make_exactly_the_probabilities_that_are_told(members):
    said = answer(members, 1.7, a_bag())
    assert said.shares.shape == (30, CLASSES) and said.rest.shape == (CLASSES,)
    assert np.allclose(said.rest + said.shares.sum(axis=0), said.logits, atol=1e-5)
    assert np.allclose(softmax((said.rest + said.shares.sum(axis=0)) / 1.7), said.probabilities, atol=1e-6)
    assert said.predicted == said.probabilities.argmax()


def test_a_tile_that_raises_all_classes_alike_speaks_for_none():
    class Equal(torch.nn.Module):
        def forward(self, bags: Bags, explain: bool) -> BagAnswer:
            shares = torch.tensor([[5.0, 5.0], [1.0, 3.0]])
            nothing = torch.zeros(2, 1)
            return BagAnswer(logits=shares.sum(0)[None], scores=nothing, log_sums=torch.tensor([[2.0]]).log(),
                             entropy=nothing[:1], shares=shares, rest=torch.zeros(1, 2))  # fmt: skip

    said = answer([Equal().eval()], 1.0, a_bag(tiles=2))
    assert (
        said.shares.tolist() == [[0, 0], [-1, 1]] and said.logits.tolist() == [-1, 1] and said.rest.tolist() == [0, 0]
    )
    assert np.allclose(said.probabilities, softmax(np.array([6.0, 8.0])))


def test_training_and_classification_hear_the_same_answer(members):
    asked, explained = (answer(members, 0.8, a_bag(), explain=explain) for explain in (False, True))
    assert np.allclose(asked.logits, explained.logits, atol=1e-6) and asked.shares is None and asked.rest is None


def test_members_are_averaged_before_the_temperature(members):
    one, other = (answer([member], 1.0, a_bag()) for member in members)
    both = answer(members, 2.0, a_bag())
    assert np.allclose(both.logits, (one.logits + other.logits) / 2)
    assert np.allclose(both.probabilities, softmax((one.logits + other.logits) / 4))
    assert np.allclose(both.shares, (one.shares + other.shares) / 2) and not np.allclose(one.shares, other.shares)


def test_attention_sums_to_one_and_its_summary_says_how_wide_it_is(members):
    said = answer(members, 1.0, a_bag())
    assert said.attention.sum() == pytest.approx(1, abs=1e-5) and (said.attention >= 0).all()
    assert said.top_mass(30) == pytest.approx(1, abs=1e-5) and said.top_mass(1) == said.attention.max()
    assert 0 < said.entropy <= 1
    alike = Bags.of(torch.ones(50, FEATURES).half())
    assert answer(members, 1.0, alike).entropy == pytest.approx(1, abs=1e-5)


def test_one_tile_is_a_slide(members):
    said = answer(members, 1.0, a_bag(tiles=1))
    assert said.attention.tolist() == pytest.approx([1.0]) and said.entropy == 0
    assert np.allclose(said.rest + said.shares[0], said.logits, atol=1e-5)


def test_tiles_left_out_are_as_if_they_had_never_been(members):
    bag = a_bag()
    keep = torch.arange(30) % 3 > 0
    fewer = answer(members, 1.0, without(bag, keep))
    anew = answer(members, 1.0, Bags.of(bag.features[keep], bag.grid[keep]))
    assert np.array_equal(fewer.logits, anew.logits) and len(fewer.attention) == 20
    assert not np.allclose(fewer.logits, answer(members, 1.0, bag).logits)


def test_of_several_bags_each_keeps_its_own_tiles():
    bags = Bags(features=torch.arange(10.0)[:, None].expand(10, 2), offsets=torch.tensor([0, 3, 4, 10]))
    kept = without(bags, torch.tensor([1, 0, 1, 1, 0, 0, 1, 0, 0, 1], dtype=torch.bool))
    assert kept.offsets.tolist() == [0, 2, 3, 5] and kept.features[:, 0].tolist() == [0, 2, 3, 6, 9]


def test_a_slide_is_answered_from_its_mapped_file_without_being_copied(members, tmp_path: Path):
    file = write_slide(tmp_path, "one", range(3), tiles=40)
    bag = bag_of(file)
    assert bag.features.dtype == torch.float16 and len(bag.features) == 40
    assert any(str(file.path) in line for line in Path("/proc/self/maps").read_text().splitlines())
    in_memory = Bags.of(torch.from_numpy(np.array(file.features())), torch.from_numpy(file.grid))
    assert np.array_equal(answer(members, 1.0, bag).logits, answer(members, 1.0, in_memory).logits)
