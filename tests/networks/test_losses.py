"""Dice and cross-entropy against MONAI's, and where the answer is known on paper."""

import math

import pytest
import torch
from monai.losses import DiceCELoss

from networks.parts.losses import IGNORE, DeepSupervision, dice_cross_entropy, shrink


@pytest.mark.parametrize("batch", [False, True], ids=["per_sample", "per_batch"])
@pytest.mark.parametrize(("classes", "space"), [(2, (7, 5, 3)), (5, (4, 6, 5)), (3, (9, 8))])
def test_values_and_gradients_are_those_of_monai(classes, space, batch) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, classes, *space, dtype=torch.float64)
    target = torch.randint(0, classes, (2, *space))
    monai = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=batch)
    ours, mine = value_and_gradient(lambda x: dice_cross_entropy(x, target, batch=batch), logits)
    known, theirs = value_and_gradient(lambda x: monai(x, target[:, None]), logits)
    torch.testing.assert_close(ours, known)
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("batch", [False, True], ids=["per_sample", "per_batch"])
def test_ignored_voxels_count_as_if_they_were_cut_away(batch) -> None:
    torch.manual_seed(1)
    logits, target = torch.randn(2, 3, 6, 5, 4, dtype=torch.float64), torch.randint(0, 3, (2, 6, 5, 4))
    masked = target.clone()
    masked[:, 4:] = IGNORE
    loss, gradient = value_and_gradient(lambda x: dice_cross_entropy(x, masked, batch=batch), logits)
    known, cut = value_and_gradient(lambda x: dice_cross_entropy(x, target[:, :4], batch=batch), logits[:, :, :4])
    torch.testing.assert_close(loss, known)
    torch.testing.assert_close(gradient[:, :, :4], cut)
    assert not gradient[:, :, 4:].any()


def test_nothing_but_ignored_voxels_is_no_loss_and_no_gradient() -> None:
    logits = 50 * torch.randn(2, 3, 4, 4, 4)
    loss, gradient = value_and_gradient(lambda x: dice_cross_entropy(x, torch.full((2, 4, 4, 4), IGNORE)), logits)
    assert loss == 0
    assert not gradient.any()


def test_a_perfect_prediction_costs_nothing() -> None:
    target = torch.randint(0, 3, (2, 5, 5, 5))
    logits = 100 * torch.nn.functional.one_hot(target, 3).movedim(-1, 1).float()
    loss, gradient = value_and_gradient(lambda x: dice_cross_entropy(x, target), logits)
    assert abs(loss) < 1e-5
    assert gradient.abs().max() < 1e-6


def test_equal_logits_cost_what_paper_says() -> None:
    target = torch.tensor([[[[0, 0, 0, 1]]]])  # one of four voxels; p = 1/2 everywhere
    expected = math.log(2) + 1 - 2 * 0.5 / (4 * 0.5 + 1)
    assert dice_cross_entropy(torch.zeros(1, 2, 1, 1, 4), target).item() == pytest.approx(expected, abs=1e-4)


def test_a_label_that_is_absent_and_not_predicted_costs_nothing() -> None:
    logits = torch.zeros(1, 2, 4, 4, 4)
    logits[:, 0] = 100
    assert dice_cross_entropy(logits, torch.zeros(1, 4, 4, 4, dtype=torch.int64)).item() == pytest.approx(0, abs=1e-6)


def test_huge_logits_stay_finite_and_half_precision_is_summed_in_float32() -> None:
    target = torch.randint(0, 2, (1, 40, 40, 40))
    logits = (1e4 * torch.randn(1, 2, 40, 40, 40)).to(torch.bfloat16)
    loss, gradient = value_and_gradient(lambda x: dice_cross_entropy(x, target), logits)
    assert loss.dtype == torch.float32
    assert loss.isfinite() and gradient.isfinite().all()


def test_levels_weigh_half_as_much_as_the_next_finer() -> None:
    values = {8: 1.0, 4: 10.0, 2: 100.0}
    seen = []

    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen.append((tuple(logits.shape[2:]), tuple(target.shape[1:])))
        return torch.tensor(values[logits.shape[2]])

    levels = [torch.zeros(1, 2, n, n, n) for n in (8, 4, 2)]
    total = DeepSupervision(loss)(levels, torch.zeros(1, 8, 8, 8, dtype=torch.int64))
    assert total.item() == pytest.approx((1 * 1 + 10 / 2 + 100 / 4) / (1 + 1 / 2 + 1 / 4))
    assert all(logits == target for logits, target in seen)


def test_one_answer_is_weighed_alone() -> None:
    logits, target = torch.randn(1, 3, 4, 4, 4), torch.randint(0, 3, (1, 4, 4, 4))
    alone = dice_cross_entropy(logits, target)
    assert DeepSupervision()(logits, target) == alone == DeepSupervision()([logits], target)


@pytest.mark.parametrize("shape", [(4, 6, 5), (2, 12, 5), (8, 3, 1), (3, 5, 2)])
def test_a_label_map_shrinks_as_torch_interpolates_to_the_nearest(shape) -> None:
    target = torch.randint(-1, 4, (2, 8, 12, 5))
    known = torch.nn.functional.interpolate(target[:, None].double(), size=shape, mode="nearest")[:, 0].long()
    assert torch.equal(shrink(target, shape), known)


def test_a_label_without_a_class_is_refused() -> None:
    with pytest.raises(ValueError, match="Renumber"):
        dice_cross_entropy(torch.zeros(1, 2, 2, 2, 2), torch.full((1, 2, 2, 2), 2))
    with pytest.raises(ValueError, match="Renumber"):
        dice_cross_entropy(torch.zeros(1, 2, 2, 2, 2), torch.full((1, 2, 2, 2), -2))


def test_a_single_class_is_refused() -> None:
    with pytest.raises(ValueError, match="background"):
        dice_cross_entropy(torch.zeros(1, 1, 2, 2, 2), torch.zeros(1, 2, 2, 2, dtype=torch.int64))


def value_and_gradient(loss, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    return value.detach(), leaf.grad
