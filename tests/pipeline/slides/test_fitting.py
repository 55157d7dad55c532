"""A network learns what was planted, the same way every time; how its slides are put together in a step changes nothing."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import networks
from pipeline.config import SlideTraining
from pipeline.errors import UsageError
from pipeline.slides import fitting
from pipeline.slides.answering import answer, bag_of
from pipeline.slides.fitting import Lesson, answered, fit, keep, kept, seed_of
from pipeline.slides.table import LabelledSlide
from preprocessing.records import encode
from tests.pipeline.slides.planted import write_slide

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> list[LabelledSlide]:
    """Of two classes in turn and of any size, one tile among them."""
    folder = tmp_path_factory.mktemp("slides")
    sizes = [14, 30, 1, 25, 40, 12, 18, 33, 21, 16, 28, 19]
    return [
        LabelledSlide(
            id=f"s{n}", patient=f"p{n}", label=n % 2,
            file=write_slide(folder, f"s{n}", range(6) if n % 2 else (), tiles=tiles),
        )
        for n, tiles in enumerate(sizes)
    ]  # fmt: skip


def a_lesson(network: str = "mil_abmil", options: dict | None = None, **settings) -> Lesson:
    config = networks.load_for_slides(network).Config(**(options or {}))
    chosen = SlideTraining(**({"epochs": 3, "learning_rate": 3e-3} | settings))
    return Lesson(network=network, network_config=encode(config), features=12, classes=2, settings=chosen)


def taught(lesson: Lesson, slides: Sequence[LabelledSlide], seed: int = 1):
    return fit(lesson, slides[:8], slides[8:], seed, CPU, lambda epoch, losses: None)


def weights(network: torch.nn.Module) -> np.ndarray:
    return torch.cat([value.flatten() for value in network.state_dict().values()]).numpy()


def test_a_network_learns_what_was_planted(slides):
    network, told = taught(a_lesson(epochs=20, learning_rate=1e-2), slides)
    assert [int(answered(network, slide, CPU).argmax()) for slide in slides[8:]] == [
        slide.label for slide in slides[8:]
    ]
    assert told.best["loss"] < 0.4 and told.best["held_out_loss"] < 0.5


@pytest.mark.parametrize("network, options", [("mil_abmil", {}), ("mil_acmil", {"drop": 0.6}), ("mil_clam", {})])
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(slides, network, options):
    lesson = a_lesson(network, options)
    torch.manual_seed(1)
    first, _ = taught(lesson, slides)
    torch.manual_seed(2)  # what was drawn before is no concern of a training
    again, _ = taught(lesson, slides)
    other, _ = taught(lesson, slides, seed=2)
    assert np.array_equal(weights(first), weights(again)) and not np.array_equal(weights(first), weights(other))


def test_whether_slides_go_through_the_network_together_or_alone_changes_nothing(slides, monkeypatch):
    lesson = a_lesson("mil_acmil", entropy_weight=0.1, batch=3)
    together, _ = taught(lesson, slides)
    monkeypatch.setattr(fitting, "TILES_TOGETHER", 20)  # some alone, some in twos
    apart, _ = taught(lesson, slides)
    for slide in slides:  # not weights: Adam makes steps of a bias without a gradient out of its rounding
        assert np.allclose(answered(together, slide, CPU), answered(apart, slide, CPU), atol=1e-4)


def test_the_checkpoint_is_the_epoch_of_the_least_held_out_loss_and_answers_as_it_did_then(slides):
    network, told = taught(a_lesson(epochs=12, learning_rate=3e-2), slides)
    losses = [curve["held_out_loss"] for curve in told.curves]
    assert told.chosen == int(np.argmin(losses)) and len(losses) == 12
    assert set(told.logits) == {slide.id for slide in slides[8:]}
    for slide in slides[8:]:
        assert np.allclose(answered(network, slide, CPU), told.logits[slide.id])
    surprise = [-float(torch.tensor(told.logits[s.id]).log_softmax(0)[s.label]) for s in slides[8:]]
    assert told.best["held_out_loss"] == pytest.approx(np.mean(surprise), abs=1e-5), "classes here are even"


def test_a_rare_class_weighs_as_much_as_a_common_one(slides):
    few = [slide for slide in slides if slide.label == 0] + [slides[1]]
    weigh = fitting.class_weights([slide.label for slide in few], 2)
    assert weigh[1] / weigh[0] == pytest.approx(6)
    assert sum(float(weigh[slide.label]) for slide in few) == pytest.approx(len(few))


def test_what_keeps_attention_wide_makes_it_wider_and_is_told_by_name(slides):
    def widths(weight: float) -> float:
        network, told = taught(a_lesson(epochs=10, learning_rate=1e-2, entropy_weight=weight), slides)
        assert ("of_entropy" in told.curves[0]) == (weight > 0)
        return float(np.mean([answer([network], 1.0, bag_of(slide.file)).entropy for slide in slides[8:]]))

    assert widths(5.0) > widths(0.0)


def test_the_weight_of_the_entropy_falls_to_nothing(slides):
    _, told = taught(a_lesson(epochs=6, learning_rate=1e-6, entropy_weight=1.0), slides)
    weighed = [abs(curve["of_entropy"]) for curve in told.curves]
    assert all(after < before for before, after in pairwise(weighed))
    assert weighed[-1] < 0.1 * weighed[0]


def test_what_is_kept_comes_back_and_answers_the_same(slides, tmp_path: Path):
    lesson = a_lesson("mil_acmil")
    network, told = taught(lesson, slides)
    keep(network, told, tmp_path / "one.safetensors")
    back, told_again = kept(lesson, tmp_path / "one.safetensors", CPU)
    assert told_again == told and np.array_equal(weights(back), weights(network)) and not back.training


def test_losses_that_are_no_numbers_end_the_training_with_what_to_change(slides):
    with pytest.raises(UsageError, match="--learning_rate"):
        taught(a_lesson(epochs=30, learning_rate=1e30), slides)


def test_few_slides_are_seen_more_often_than_many_and_a_stated_number_stands():
    lesson = a_lesson(epochs=None)
    assert [lesson.epochs(slides) for slides in (10, 100, 1000)] == [fitting.MOST_EPOCHS, 40, fitting.FEWEST_EPOCHS]
    assert a_lesson(epochs=7).epochs(10) == 7


def test_features_stay_on_the_disk_and_no_slide_stays_mapped_when_its_turn_is_over(slides):
    open_maps = []

    def look(epoch: int, losses: dict[str, float]) -> None:
        maps = Path("/proc/self/maps").read_text().splitlines()
        open_maps.append(sum(slide.file.path.as_posix() in line for slide in slides for line in maps))

    fit(a_lesson(), slides[:8], slides[8:], 1, CPU, look)
    assert open_maps == [0, 0, 0]


def test_every_part_has_a_seed_of_its_own():
    assert len({seed_of(seed, part) for seed in range(3) for part in ("fold0-inner0", "fold0-inner1", "member0")}) == 9
