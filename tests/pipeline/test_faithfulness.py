"""What tests say of a map, where a score is the mean of a known region and the answer can be counted by hand."""

from collections.abc import Callable
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from pipeline.faithfulness import Faithfulness, judge

SHAPE = (20, 24, 22)
WHERE = (slice(8, 12), slice(9, 13), slice(8, 12))
SIZE = 4**3

Map = Callable[[Tensor], Tensor]


def box(*sides: slice) -> Tensor:
    mask = torch.zeros(SHAPE)
    mask[sides] = 1
    return mask


LESION = box(*WHERE)
BESIDE = box(slice(1, 5), slice(16, 20), slice(15, 19))


def scan(bright: Tensor = LESION) -> Tensor:
    """Two channels of noise; the region stands out in the first."""
    noise = torch.from_numpy(np.random.default_rng(0).normal(0, 0.3, (2, *SHAPE))).float()
    noise[0] += 3 * bright
    return noise


def shuffled(relevance: Tensor, seed: int = 0) -> Tensor:
    order = torch.randperm(relevance.numel(), generator=torch.Generator().manual_seed(seed))
    return relevance.flatten()[order].view_as(relevance)


def judged(
    relevance: Tensor | None = None,
    *,
    region: Tensor = LESION,
    mask: Tensor = LESION,
    score: Callable[[Tensor], float] | None = None,
    explain: Map | None = None,
    explain_random: Map | None = None,
    seed: int = 0,
) -> Faithfulness:
    """A network whose score is the first channel's mean over the region; gradient times input is its exact map."""

    def exact(window: Tensor) -> Tensor:
        return region * window[0] / region.sum()

    def unlearnt(window: Tensor) -> Tensor:
        return shuffled(exact(window), seed=9)

    window = scan(region)
    return judge(
        exact(window) if relevance is None else relevance,
        window,
        mask,
        score or (lambda x: float(exact(x).sum())),
        explain or (lambda x: exact(x) if relevance is None else relevance),
        explain_random or unlearnt,
        seed,
    )


def test_the_exact_map_of_a_known_score_is_as_good_as_the_mask_and_passes() -> None:
    said = judged()
    assert said.deletion == pytest.approx(said.deletion_mask, abs=1e-6) == pytest.approx(0, abs=1e-6)
    assert said.insertion == pytest.approx(said.insertion_mask, abs=1e-6) == pytest.approx(1, abs=1e-6)
    assert said.energy == 1 and said.context == 0 and said.stability > 0.99
    assert said.energy_chance == pytest.approx(10**3 / np.prod(SHAPE))  # 3 voxels to each side of a box of 4
    assert said.failed == () and said.noted == ()


def test_a_map_that_marks_four_times_the_label_elsewhere_first_loses_half_of_each_curve() -> None:
    """Taken away are 1, 2, 4, 8, 16 and 32 times the label's voxels: the first three steps touch nothing of it."""
    relevance = LESION.clone()
    relevance.view(-1)[torch.nonzero((LESION + BESIDE).view(-1) == 0)[: 4 * SIZE, 0]] = 2
    said = judged(relevance)
    assert said.deletion == pytest.approx(0.5, abs=1e-5) and said.insertion == pytest.approx(0.5, abs=1e-5)
    assert said.energy < 1 / 9 + 0.2 and said.context == pytest.approx(8 / 9, abs=0.2)


def test_chance_takes_as_much_of_the_score_as_of_the_window() -> None:
    """Noise as rough as a shuffled map takes away voxels one by one: 1 to 32 times the label's share, 10.5 in the mean."""
    said = judged(shuffled(torch.linspace(-1, 1, LESION.numel()).view(SHAPE)))
    share = 10.5 * SIZE / LESION.numel()
    assert said.deletion_random == pytest.approx(1 - share, abs=0.03)
    assert said.insertion_random == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize(
    ("relevance", "words"),
    [
        (shuffled(LESION * scan()[0]), "random places"),
        (-LESION, "random places"),
        (torch.ones(SHAPE), "random places"),
        (BESIDE, "0.00 of it lies at the label"),
    ],
    ids=["shuffled", "inverted", "the same everywhere", "somewhere else"],
)
def test_a_map_that_shows_nothing_of_the_score_fails(relevance: Tensor, words: str) -> None:
    said = judged(relevance)
    assert any(words in sentence for sentence in said.failed), said.failed
    assert said.deletion > 0.8 and said.insertion < 0.2


@pytest.mark.parametrize("seed", range(8))
def test_no_seed_lets_a_shuffled_map_pass(seed: int) -> None:
    assert judged(shuffled(LESION * scan()[0], seed), seed=seed).failed


def test_where_voxels_lie_does_not_order_those_that_are_alike() -> None:
    """By row the label of a map without any order would come first in one corner, and last in the other."""
    corners = [box(*(slice(0, 4),) * 3), box(*(slice(-4, None),) * 3)]
    first, last = (judged(torch.ones(SHAPE), region=corner, mask=corner) for corner in corners)
    assert first.deletion == pytest.approx(last.deletion, abs=0.1) and first.deletion > 0.8


def test_a_blank_map_cannot_be_tested_and_no_network_is_asked() -> None:
    def never(window: Tensor) -> Tensor:
        raise AssertionError("asked")

    said = judged(torch.zeros(SHAPE), score=never, explain=never, explain_random=never)
    assert said.failed == ("there is nothing to test: the map is blank",)
    assert judged(mask=torch.zeros(SHAPE)).failed == ("there is nothing to test: nothing was found in this window",)
    assert judged(torch.full(SHAPE, torch.nan)).failed == (
        "there is nothing to test: the map holds values that are no numbers",
    )


@pytest.mark.parametrize("score", [1.0, 0.0, -2.0, float("nan"), float("inf")])
def test_a_score_that_never_changes_says_nothing_rather_than_no_number(score: float) -> None:
    said = judged(score=lambda _: score)
    assert [sentence for sentence in said.failed if "deletion and insertion say nothing" in sentence]
    assert (said.deletion, said.deletion_mask, said.insertion, said.insertion_random) == (1, 1, 0, 0)
    assert said.energy == 1 and said.stability > 0.99  # what needs no score is told all the same


def test_a_label_that_fills_its_window_leaves_nothing_to_compare_with() -> None:
    """Nothing of its surroundings can flow in, and any voxel is as good as any other."""
    everything = torch.ones(SHAPE)
    said = judged(torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)), region=everything, mask=everything)
    assert said.failed and said.energy == said.energy_chance == 1 and np.isfinite(list(_numbers(said))).all()


def test_a_map_beside_the_label_is_right_where_the_network_decides_there() -> None:
    said = judged(region=BESIDE)
    assert said.energy == 0 and said.context == 1 and said.failed == ()
    assert said.deletion_mask > 0.9
    assert said.noted == (
        f"without the label {said.deletion_mask:.2f} of the score is left, without what the map marks 0.00: the network "
        "decides by what lies beside the label",
    )


def test_a_map_that_random_weights_draw_as_well_fails() -> None:
    same = judged(explain_random=lambda window: LESION * window[0])
    assert same.randomisation > 0.99 and same.randomisation_overlap > 0.4  # 64 voxels of a hundredth
    assert same.randomisation_scale == pytest.approx(SIZE, rel=1e-4)  # the peak is told, and never divided away
    assert ["random weights" in sentence for sentence in same.failed] == [True]
    mirrored = judged(explain_random=lambda window: -LESION * window[0])
    assert mirrored.randomisation < -0.99 and len(mirrored.failed) == 1


def test_a_map_that_jumps_at_a_little_noise_fails() -> None:
    calls: list[Tensor] = []

    def jumping(window: Tensor) -> Tensor:
        calls.append(window)
        return LESION * window[0] if len(calls) < 3 else shuffled(LESION * window[0])

    said = judged(explain=jumping)
    assert said.stability < 0.1 and said.failed == (
        f"a little noise makes another map (rank correlation {said.stability:.2f})",
    )
    assert len(calls) == 3
    for noisy in calls:
        change = noisy - scan()
        assert change.std(dim=(1, 2, 3)) / scan().std(dim=(1, 2, 3)) == pytest.approx([0.05, 0.05], rel=0.05)


def test_the_cost_is_what_the_docstring_says() -> None:
    asked = {"score": 0, "explain": 0, "explain_random": 0}

    def counted(name: str, answer: Callable[[Tensor], object]) -> Callable[[Tensor], object]:
        def ask(window: Tensor) -> object:
            asked[name] += 1
            assert window.shape == (2, *SHAPE) and window.dtype == torch.float32
            return answer(window)

        return ask

    judged(
        score=counted("score", lambda x: float((LESION * x[0]).mean())),  # type: ignore[arg-type]
        explain=counted("explain", lambda x: LESION * x[0]),  # type: ignore[arg-type]
        explain_random=counted("explain_random", lambda x: x[1]),  # type: ignore[arg-type]
    )
    assert asked == {"score": 38, "explain": 3, "explain_random": 1}
    assert "38, 3 and 1 times" in (judge.__doc__ or "")


def test_nothing_that_was_given_is_changed() -> None:
    window, mask = scan(), LESION.clone()
    relevance = (mask * window[0]).requires_grad_()
    kept = window.clone(), mask.clone(), relevance.detach().clone()
    judge(relevance, window, mask, lambda x: float(x.mul_(2).sum()), lambda x: x[0].mul_(2), lambda x: x[1], 0)
    assert all(torch.equal(now, before) for now, before in zip((window, mask, relevance), kept, strict=True))


def test_the_same_seed_says_the_same_and_leaves_the_dice_of_others_alone() -> None:
    state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    assert judged(seed=3) == judged(seed=3) != judged(seed=4)
    assert torch.equal(state[0], torch.random.get_rng_state()) and (state[1] == np.random.get_state()[1]).all()


def _numbers(said: Faithfulness) -> list[float]:
    return [value for value in asdict(said).values() if isinstance(value, float)]


SMALL = (5, 6, 1)
values = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=60, deadline=None)
@given(
    arrays.arrays(np.float32, SMALL, elements=values),
    arrays.arrays(np.float32, (1, *SMALL), elements=values),
    arrays.arrays(np.float32, SMALL, elements=st.sampled_from([0.0, 0.5, 1.0])),
    st.integers(-20, 20),
)
@example(np.ones(SMALL, np.float32), np.zeros((1, *SMALL), np.float32), np.ones(SMALL, np.float32), 0)
def test_whatever_comes_every_number_is_one_and_its_scale_does_not_matter(
    relevance: np.ndarray, window: np.ndarray, mask: np.ndarray, power: int
) -> None:
    """A plane of six by five voxels is a window, too."""

    def said(of: np.ndarray) -> Faithfulness:
        given_mask, weights = torch.from_numpy(mask), torch.from_numpy(relevance)
        return judge(
            torch.from_numpy(of), torch.from_numpy(window), given_mask, lambda x: float((given_mask * x[0]).sum()),
            lambda x: weights * x[0], lambda x: x[0], 0,
        )  # fmt: skip

    first = said(relevance)
    assert np.isfinite(_numbers(first)).all()
    for field in fields(first):
        value = getattr(first, field.name)
        if isinstance(value, float) and field.name != "randomisation_scale":
            assert (-1 if field.name in ("randomisation", "stability") else 0) - 1e-9 <= value <= 1 + 1e-9, field.name
    scaled = said(relevance * np.float32(2.0**power))
    names = [field.name for field in fields(first) if field.name not in ("randomisation_scale", "failed", "noted")]
    assert [getattr(scaled, name) for name in names] == pytest.approx(
        [getattr(first, name) for name in names], abs=1e-6
    )
    assert scaled.failed == first.failed
