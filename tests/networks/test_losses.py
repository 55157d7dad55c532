"""Losses against MONAI's, against a slow one written voxel by voxel, and where the answer is known on paper."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.losses import DiceCELoss, DiceLoss, FocalLoss, TverskyLoss
from scipy.spatial.distance import cdist
from torch.nn import functional

from kernels.dice_loss import IGNORE
from networks.parts.losses import LOSSES, DeepSupervision, build, dice_cross_entropy, shrink

QUIET = settings(deadline=None, max_examples=40, derandomize=True, database=None)
REGIONS = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]).bool()
"""A whole tumour of three parts, its core of two, and the enhancing part."""


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


@pytest.mark.parametrize("regions", [False, True], ids=["exclusive", "regions"])
def test_mixed_precision_around_a_loss_does_not_reach_into_it(regions) -> None:
    logits, target = some(3 if regions else 4, highest=3, space=(20, 20, 20))
    loss = a_loss("dice_cross_entropy", labels=3, regions=regions)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss(logits.float(), target), loss(logits, target).float(), rtol=1e-5, atol=0)


def test_levels_weigh_half_as_much_as_the_next_finer() -> None:
    values = {8: 1.0, 4: 10.0, 2: 100.0}
    seen = []

    def loss(logits: torch.Tensor, target: torch.Tensor, annotated: torch.Tensor | None) -> torch.Tensor:
        seen.append((tuple(logits.shape[2:]), tuple(target.shape[1:])))
        return torch.tensor(values[logits.shape[2]])

    levels = [torch.zeros(1, 2, n, n, n) for n in (8, 4, 2)]
    total = DeepSupervision(loss)(levels, torch.zeros(1, 8, 8, 8, dtype=torch.int64))
    assert total.item() == pytest.approx((1 * 1 + 10 / 2 + 100 / 4) / (1 + 1 / 2 + 1 / 4))
    assert all(logits == target for logits, target in seen)
    without = DeepSupervision(loss, skip_lowest=True)
    target = torch.zeros(1, 8, 8, 8, dtype=torch.int64)
    assert without(levels, target).item() == pytest.approx((1 * 1 + 10 / 2) / (1 + 1 / 2))
    assert without(levels[:1], target).item() == 1


def test_a_level_that_counts_nothing_has_a_gradient_of_zero_for_the_sake_of_several_gpus() -> None:
    levels = [torch.randn(1, 2, n, n, n, requires_grad=True) for n in (4, 2)]
    DeepSupervision(skip_lowest=True)(levels, torch.ones(1, 4, 4, 4, dtype=torch.int64)).backward()
    assert levels[0].grad.any()
    assert levels[1].grad is not None and not levels[1].grad.any()


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


# nnunetv2 2.8.1 on the tensors below, per sample and per batch: DC_and_CE_loss, the same with its ignore label,
# DC_and_topk_loss, DC_and_BCE_loss. It minimises -Dice where we have 1 - Dice. DC_and_BCE_loss with an ignore label, which
# sums over channels where it takes their mean otherwise, is not followed.
NNUNETS = {
    ("dice_cross_entropy", False, False): (1.565712, 1.562463),
    ("dice_cross_entropy", False, True): (1.476179, 1.473555),
    ("dice_topk", False, False): (3.388283, 3.385034),
    ("dice_cross_entropy", True, False): (0.337680, 0.336910),
}


@pytest.mark.parametrize(("name", "regions", "ignored"), NNUNETS)
def test_the_numbers_are_nnunets_own(name, regions, ignored) -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(2, 4, 6, 5, 4), torch.randint(0, 4, (2, 6, 5, 4))
    if ignored:
        target[:, 4:] = IGNORE
    for batch, known in zip((False, True), NNUNETS[name, regions, ignored], strict=True):
        loss = a_loss(name, labels=3, regions=regions, batch_dice=batch)
        assert loss(logits[:, :3] if regions else logits, target).item() == pytest.approx(1 + known, abs=2e-6)


@pytest.mark.parametrize("batch", [False, True], ids=["per_sample", "per_batch"])
def test_tversky_is_monais(batch) -> None:
    logits, target = some(4)
    monai = TverskyLoss(
        include_background=False, to_onehot_y=True, softmax=True, alpha=0.2, beta=0.9, batch=batch,
        smooth_nr=5e-6, smooth_dr=5e-6,
    )  # fmt: skip
    loss = a_loss("tversky_cross_entropy", labels=3, batch_dice=batch, options={"alpha": 0.2, "beta": 0.9})
    same(
        lambda x: loss(x, target),
        lambda x: monai(x, target[:, None]) + functional.cross_entropy(x, target),
        logits,
    )


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 3.5])
def test_focal_is_monais_which_divides_by_the_classes_too(gamma) -> None:
    logits, target = some(4)
    monai = FocalLoss(to_onehot_y=True, gamma=gamma, use_softmax=True)
    overlap = DiceLoss(include_background=False, to_onehot_y=True, softmax=True)
    loss = a_loss("dice_focal", labels=3, options={"gamma": gamma})
    same(lambda x: loss(x, target), lambda x: 4 * monai(x, target[:, None]) + overlap(x, target[:, None]), logits)


def test_the_worst_share_of_everything_is_cross_entropy_and_of_nothing_the_worst_voxel() -> None:
    logits, target = some(4)
    overlap = DiceLoss(include_background=False, to_onehot_y=True, softmax=True)
    surprise = functional.cross_entropy(logits, target, reduction="none").flatten()
    for share, known in ((1.0, surprise.mean()), (0.0, surprise.max()), (0.25, surprise.sort().values[-60:].mean())):
        loss = a_loss("dice_topk", labels=3, options={"share": share})
        torch.testing.assert_close(loss(logits, target) - overlap(logits, target[:, None]), known)


def test_the_boundary_loss_is_probability_times_the_distance_from_the_edge() -> None:
    logits, target = some(3, space=(7, 6, 5))
    places = torch.stack(torch.meshgrid(*map(torch.arange, (7, 6, 5)), indexing="ij"), -1).reshape(-1, 3)
    known = []
    for case in range(2):
        for label in (1, 2):
            inside = target[case].flatten() == label
            away = torch.from_numpy(cdist(places, places))
            outwards = away[:, inside].min(1).values
            inwards = away[:, ~inside].min(1).values
            distance = torch.where(inside, 1 - inwards, outwards)
            known.append((logits.softmax(1)[case, label].flatten() * distance).mean())
    loss = a_loss("dice_boundary", labels=2, options={"weight": 3.0})
    torch.testing.assert_close(loss(logits, target) - dice_cross_entropy(logits, target), 3 * torch.stack(known).mean())


@pytest.mark.parametrize("batch", [False, True], ids=["per_sample", "per_batch"])
def test_regions_are_a_sigmoid_each_as_monai_has_it(batch) -> None:
    torch.manual_seed(3)
    logits, target = torch.randn(2, 3, 6, 5, 4, dtype=torch.float64), torch.randint(0, 4, (2, 6, 5, 4))
    truth = REGIONS[:, target].movedim(1, 0).double()
    assert truth[:, 0].sum() > truth[:, 1].sum() > truth[:, 2].sum()
    monai = DiceLoss(sigmoid=True, batch=batch)
    loss = build("dice_cross_entropy", membership=REGIONS, regions=True, batch_dice=batch)
    same(
        lambda x: loss(x, target),
        lambda x: monai(x, truth) + functional.binary_cross_entropy_with_logits(x, truth),
        logits,
    )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("regions", [False, True], ids=["exclusive", "regions"])
def test_ignored_voxels_cost_nothing_and_pull_nowhere(name, regions) -> None:
    logits, target = some(3 if regions else 4, highest=3)
    target[:, 3:] = IGNORE
    loss = a_loss(name, labels=3, regions=regions)
    value, gradient = value_and_gradient(lambda x: loss(x, target), logits)
    assert not gradient[:, :, 3:].any() and gradient[:, :, :3].any()
    other = logits.clone()
    other[:, :, 3:] = torch.randn_like(other[:, :, 3:])
    torch.testing.assert_close(loss(other, target), value)
    if name != "dice_boundary":  # its distances are those in the whole window
        torch.testing.assert_close(loss(logits[:, :, :3], target[:, :3]), value)


ANNOTATED = torch.tensor([[True, False, True], [False, False, True], [True, True, True], [False, False, False]])


@pytest.mark.parametrize("batch", [False, True], ids=["per_sample", "per_batch"])
@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [1], [3], [0, 0]], ids=str)
def test_labels_that_were_not_looked_for_are_one_class_with_the_background(batch, rows) -> None:
    """Against the definition, written voxel by voxel."""
    torch.manual_seed(5)
    annotated = ANNOTATED[rows]
    logits = 3 * torch.randn(len(rows), 4, 3, 2, 4, dtype=torch.float64)
    target = torch.randint(-1, 4, (len(rows), 3, 2, 4))
    for row, known in zip(target, annotated, strict=True):
        for label in range(3):
            row[(row == label + 1) & ~known[label]] = 0
    same(
        lambda x: dice_cross_entropy(x, target, annotated, batch=batch),
        lambda x: slow_partial_loss(x, target, annotated, batch),
        logits,
    )


def slow_partial_loss(logits, target, annotated, batch) -> torch.Tensor:
    surprises, both, found, true = [], {}, {}, {}
    for b in range(len(logits)):
        looked_for = [n + 1 for n in range(annotated.shape[1]) if annotated[b, n]]
        for label in looked_for:
            key = (0 if batch else b, label)
            for sums in (both, found, true):
                sums.setdefault(key, torch.zeros((), dtype=torch.float64))
        for i, j, k in torch.cartesian_prod(*map(torch.arange, target.shape[1:])):
            number = int(target[b, i, j, k])
            if number == -1 or not looked_for:
                continue
            p = torch.exp(logits[b, :, i, j, k]) / torch.exp(logits[b, :, i, j, k]).sum()
            if number in looked_for:
                surprises.append(-torch.log(p[number]))
            else:
                surprises.append(-torch.log(1 - sum(p[n] for n in looked_for)))
            for label in looked_for:
                key = (0 if batch else b, label)
                both[key] = both[key] + p[label] * (number == label)
                found[key] = found[key] + p[label]
                true[key] = true[key] + (number == label)
    if not surprises:
        return 0 * logits.sum()
    dice = [(2 * both[key] + 1e-5) / (found[key] + true[key] + 1e-5) for key in both]
    return sum(surprises) / len(surprises) + 1 - sum(dice) / len(dice)


@pytest.mark.parametrize("name", LOSSES)
def test_the_merged_class_asks_for_nothing_but_its_sum(name) -> None:
    """Where nothing was painted, background and unknown labels may share their probability as they like: the gradient
    of their logits is one number, shared out by their shares."""
    logits, target = some(4, highest=1)
    annotated = torch.tensor([[True, False, False]] * 2)
    loss = a_loss(name, labels=3)
    value, gradient = value_and_gradient(lambda x: loss(x, target, annotated), logits)
    merged = torch.stack([logits[:, [0, 2, 3]].logsumexp(1), logits[:, 1]], dim=1)
    known, simple = value_and_gradient(lambda x: a_loss(name, labels=1)(x, target), merged)
    torch.testing.assert_close(value, known)
    torch.testing.assert_close(gradient[:, 1], simple[:, 1])
    torch.testing.assert_close(gradient[:, [0, 2, 3]], logits[:, [0, 2, 3]].softmax(1) * simple[:, :1])


@pytest.mark.parametrize("name", LOSSES)
def test_a_case_in_which_all_was_looked_for_is_as_one_of_which_nothing_is_said(name) -> None:
    for regions in (False, True):
        logits, target = some(3 if regions else 4, highest=3)
        loss = a_loss(name, labels=3, regions=regions)
        torch.testing.assert_close(loss(logits, target, torch.ones(2, 3).bool()), loss(logits, target))


@pytest.mark.parametrize("batch", [False, True], ids=["per_sample", "per_batch"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("regions", [False, True], ids=["exclusive", "regions"])
def test_a_case_in_which_nothing_was_looked_for_is_as_if_it_were_not_there(regions, name, batch) -> None:
    logits, target = some(3 if regions else 4, highest=3)
    annotated = torch.tensor([[True] * 3, [False] * 3])
    loss = a_loss(name, labels=3, regions=regions, batch_dice=batch)
    value, gradient = value_and_gradient(lambda x: loss(x, target, annotated), logits)
    torch.testing.assert_close(loss(logits[:1], target[:1]), value)
    assert gradient[0].any() and not gradient[1].any()


@pytest.mark.parametrize("batch", [False, True], ids=["per_sample", "per_batch"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_region_that_was_not_looked_for_is_as_if_it_had_no_channel(name, batch) -> None:
    logits, target = some(3, highest=3)
    annotated = torch.tensor([[True, False, True]] * 2)
    loss = a_loss(name, labels=3, regions=True, batch_dice=batch)
    value, gradient = value_and_gradient(lambda x: loss(x, target, annotated), logits)
    without = build(name, membership=REGIONS[[0, 2]], regions=True, batch_dice=batch)
    known, fewer = value_and_gradient(lambda x: without(x, target), logits[:, [0, 2]])
    torch.testing.assert_close(value, known)
    torch.testing.assert_close(gradient[:, [0, 2]], fewer)
    assert not gradient[:, 1].any()


@QUIET
@given(data=st.data())
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_makes_a_loss_that_is_no_number(name, data) -> None:
    """Whatever lies in the window: one voxel, nothing known, nothing looked for, huge or half-precise logits."""
    regions, batch = data.draw(st.booleans()), data.draw(st.booleans())
    space = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    cases = data.draw(st.integers(1, 3))
    kind = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    numbers = data.draw(st.sampled_from([[0], [-1], [3], [-1, 0], [0, 1, 2, 3], [-1, 0, 1, 2, 3]]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    logits = (data.draw(st.sampled_from([0, 1, 1e4])) * torch.randn(cases, 3 if regions else 4, *space)).to(kind)
    target = torch.tensor(numbers)[torch.randint(len(numbers), (cases, *space))]
    annotated = data.draw(st.sampled_from([None, torch.rand(cases, 3) < 0.5, torch.zeros(cases, 3).bool()]))
    loss = a_loss(name, labels=3, regions=regions, batch_dice=batch)
    coarse = logits[(slice(None), slice(None), *[slice(1)] * len(space))]
    value, gradient = value_and_gradient(lambda x: loss([x, coarse], target, annotated), logits)
    assert value.isfinite() and value >= -1 and gradient.isfinite().all()
    nothing = not (target >= 0).any() or (annotated is not None and not annotated.any())
    assert not nothing or (value == 0 and not gradient.any())


def test_a_loss_nobody_knows_is_refused_and_so_is_an_option() -> None:
    with pytest.raises(ValueError, match="one of dice_cross_entropy"):
        a_loss("dise", labels=1)
    with pytest.raises(ValueError, match=r"\['gama'\]; it has \['gamma'\]"):
        a_loss("dice_focal", labels=1, options={"gama": 1})
    with pytest.raises(ValueError, match="Renumber"):
        a_loss("dice_topk", labels=3, regions=True)(torch.zeros(1, 3, 2, 2), torch.full((1, 2, 2), 4))
    with pytest.raises(ValueError, match="one channel for each"):
        a_loss("dice_topk", labels=3, regions=True)(torch.zeros(1, 4, 2, 2), torch.zeros(1, 2, 2).long())


def a_loss(name: str, *, labels: int, regions: bool = False, **how: Any) -> DeepSupervision:
    """That loss for labels that exclude each other, or for the three regions."""
    exclusive = functional.pad(torch.eye(labels).bool(), (1, 0))
    return build(name, membership=REGIONS if regions else exclusive, regions=regions, **how)


def some(channels: int, highest: int | None = None, space: tuple[int, ...] = (6, 5, 4)) -> tuple[torch.Tensor, ...]:
    """Two cases of any logits and labels."""
    torch.manual_seed(7)
    highest = channels - 1 if highest is None else highest
    return torch.randn(2, channels, *space, dtype=torch.float64), torch.randint(0, highest + 1, (2, *space))


def same(loss: Callable, known: Callable, logits: torch.Tensor) -> None:
    """Both give the same value and the same gradient."""
    for ours, theirs in zip(value_and_gradient(loss, logits), value_and_gradient(known, logits), strict=True):
        torch.testing.assert_close(ours, theirs)


def value_and_gradient(loss, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    return value.detach(), leaf.grad
