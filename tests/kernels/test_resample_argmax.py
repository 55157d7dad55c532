"""Labels on another grid are those of interpolating every class, to the bit, and hardly any class is interpolated."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.resample_argmax import ROOM, Between, fused, reference, stream
from preprocessing.resampling import resample

SIZES = st.tuples(*[st.integers(1, 9)] * 3)


def smooth(classes: int, shape: tuple[int, int, int], seed: int = 0) -> torch.Tensor:
    """Logits as a network has them: a background, and round organs whose borders are rough."""
    random = torch.Generator().manual_seed(seed)
    axes = torch.meshgrid(*(torch.linspace(0, 1, size) for size in shape), indexing="ij")
    logits = torch.zeros(classes, *shape)
    for organ in logits[1:]:
        centre, radius = torch.rand(3, generator=random), 0.1 + 0.2 * torch.rand(3, generator=random)
        away = sum(((axis - c) / r) ** 2 for axis, c, r in zip(axes, centre, radius, strict=True))
        organ += 6 - 6 * away.sqrt()
    rough = torch.randn(classes, 1, 5, 5, 5, generator=random)
    return logits + 0.5 * torch.nn.functional.interpolate(rough, size=shape, mode="trilinear")[:, 0]


def both_equal(found, expected) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@given(
    before=SIZES, after=SIZES, classes=st.integers(1, 5), levels=st.sampled_from([2, 5, 2**24]),
    threshold=st.sampled_from([None, 0.0, 0.5, 0.3]), nearest=st.sampled_from([None, 0, 1, 2]), seed=st.integers(0, 2**20),
)  # fmt: skip
@settings(deadline=None, max_examples=150)
def test_labels_and_scores_are_those_of_interpolating_every_class_to_the_bit(
    before, after, classes, levels, threshold, nearest, seed
) -> None:
    random = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (classes, *before), generator=random) / levels  # few levels: many ties
    if seed % 2:  # of what is equal, some is more by one bit
        scores = torch.nextafter(scores, torch.randint(0, 2, scores.shape, generator=random).float())
    arguments = (scores, after, None, threshold, nearest)
    assert both_equal(fused(*arguments), reference(*arguments))


@pytest.mark.parametrize("threshold", [None, 0.0])
@pytest.mark.parametrize("shape", [(41, 60, 52), (13, 15, 17), (20, 35, 31)])
def test_so_they_are_of_scores_as_a_network_has_them(shape, threshold) -> None:
    scores = smooth(9, (20, 30, 26))
    assert both_equal(fused(scores, shape, None, threshold), reference(scores, shape, None, threshold))
    probabilities = scores.softmax(0) if threshold is None else scores.sigmoid()
    level = None if threshold is None else 0.5
    assert both_equal(fused(probabilities, shape, None, level), reference(probabilities, shape, None, level))


def test_a_class_that_is_ahead_by_the_last_bit_wins_where_it_would_if_all_were_interpolated() -> None:
    scores = torch.rand(1, 6, 7, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    scores[1] = torch.nextafter(scores[1], torch.tensor(2.0))
    labels, _ = fused(scores, (11, 15, 13))
    assert torch.equal(labels, reference(scores, (11, 15, 13))[0])
    assert 0 < labels.float().mean() < 1, "rounding makes some of them equal, and of equals the lowest wins"


@pytest.mark.parametrize("shape", [(23, 19, 30), (5, 7, 6), (9, 12, 10)])
def test_torch_and_scipy_interpolate_alike(shape) -> None:
    scores = smooth(6, (9, 12, 10))
    labels, winner = fused(scores, shape)
    theirs = torch.nn.functional.interpolate(scores[None], size=shape, mode="trilinear", align_corners=False)[0]
    torch.testing.assert_close(winner, theirs.amax(0), atol=1e-5, rtol=1e-5)
    is_clear = (theirs.topk(2, dim=0).values.diff(dim=0) < -1e-4)[0]
    assert torch.equal(labels[is_clear], theirs.argmax(0)[is_clear].to(labels.dtype)) and is_clear.float().mean() > 0.99
    places = np.indices(shape).reshape(3, -1).T + 0.5
    places = (places * np.array((9, 12, 10)) / np.array(shape) - 0.5).T
    dense = np.stack([ndimage.map_coordinates(one, places, order=1, mode="nearest") for one in scores.numpy()])
    np.testing.assert_allclose(winner.flatten(), dense.max(0), atol=1e-5)


@pytest.mark.parametrize("nearest", [None, 0, 1, 2])
def test_preparing_scans_follows_the_same_rule(nearest) -> None:
    scores = smooth(6, (9, 12, 10))
    labels, winner = fused(scores, (20, 7, 23), None, None, nearest)
    dense = resample(scores.numpy(), (20, 7, 23), order=1, separate=nearest)
    np.testing.assert_allclose(winner, dense.max(0), atol=1e-5)
    assert (labels.numpy() != dense.argmax(0)).mean() < 1e-3


class Work(TorchDispatchMode):
    """How many scores were looked up one by one, and the largest tensor that was made."""

    def __init__(self) -> None:
        super().__init__()
        self.looked_up, self.largest = 0, 0

    def __torch_dispatch__(self, called, types, arguments=(), options=None):
        made = called(*arguments, **(options or {}))
        if called._schema.name == "aten::gather":
            self.looked_up += made.numel()
        if isinstance(made, torch.Tensor) and not any(made is each for each in arguments):
            is_view = made._is_view()
            self.largest = max(self.largest, 0 if is_view else made.numel())
        return made


def streamed(slabs, depth, shape, *rest):
    parts = list(stream(slabs, depth, shape, *rest))
    return torch.cat([labels for labels, _ in parts]), torch.cat([winner for _, winner in parts])


def test_where_one_class_wins_all_around_the_others_are_not_looked_at() -> None:
    scores, shape = smooth(20, (24, 30, 26)), (48, 60, 52)
    with Work() as work:
        streamed([scores], 24, shape)
    layers, around = 49, 8
    assert work.looked_up < 0.25 * layers * 60 * 52 * around * 20
    noise = torch.randn(scores.shape, generator=torch.Generator().manual_seed(0))
    with Work() as all_of_it:
        streamed([noise], 24, shape)
    assert all_of_it.looked_up > 3 * work.looked_up


def test_scores_on_the_new_grid_are_never_held() -> None:
    scores, shape = smooth(30, (12, 15, 13)), (60, 75, 65)
    with Work() as work:
        streamed([scores], 12, shape)
    assert work.largest <= max(8 * ROOM, 16 * 75 * 65) < 30 * 60 * 75 * 65 / 5


@pytest.mark.parametrize("depth", [1, 5, 10, 23])
@pytest.mark.parametrize("threshold", [None, 0.5])
@pytest.mark.parametrize("cut", [1, 3, 10])
def test_slabs_that_are_written_over_give_what_the_whole_gives(depth, threshold, cut) -> None:
    scores = smooth(5, (10, 12, 9)).sigmoid()
    room = torch.empty(5, cut, 12, 9)

    def slabs():
        for start in range(0, 10, cut):
            some = scores[:, start : start + cut]
            yield room[:, : some.shape[1]].copy_(some)
            room.fill_(float("nan"))

    lookup = torch.arange(5 + (threshold is not None), dtype=torch.uint8) * 3
    found = streamed(slabs(), 10, (depth, 20, 14), lookup, threshold)
    assert both_equal(found, fused(scores, (depth, 20, 14), lookup, threshold))


def test_new_planes_leave_as_soon_as_both_their_neighbours_are_there() -> None:
    arrived = []

    def slabs():
        for number, plane in enumerate(smooth(3, (6, 4, 4)).split(1, dim=1)):
            arrived.append(number)
            yield plane

    left, seen = 0, {}
    for labels, _ in stream(slabs(), 6, (12, 4, 4)):
        for _ in labels:
            seen[left] = len(arrived)
            left += 1
    assert seen == {row: min(max((row + 1) // 2 + 1, 1), 6) if row else 1 for row in range(12)}


def test_a_plane_that_does_not_come_is_missed() -> None:
    with pytest.raises(ValueError, match="before the 7"):
        list(stream([smooth(3, (6, 4, 4))], 7, (12, 4, 4)))
    with pytest.raises(ValueError, match="every plane is needed"):
        list(stream([], 7, (12, 4, 4)))


def test_one_old_plane_may_be_stretched_over_many_new_ones() -> None:
    scores = smooth(4, (1, 6, 5))
    sizes = [len(labels) for labels, _ in stream([scores], 1, (50, 7, 8))]
    assert sum(sizes) == 50 and max(sizes) <= 16
    assert both_equal(fused(scores, (50, 7, 8)), reference(scores, (50, 7, 8)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype) -> None:
    scores = smooth(5, (8, 9, 7)).to(dtype)
    if dtype == torch.bfloat16:  # Triton's interpreter has none
        assert both_equal(streamed([scores], 8, (17, 15, 9)), reference(scores.float(), (17, 15, 9)))
    else:
        assert both_equal(fused(scores, (17, 15, 9)), fused(scores.float(), (17, 15, 9)))


@pytest.mark.parametrize(("classes", "dtype"), [(2, torch.uint8), (256, torch.uint8), (257, torch.int16)])
def test_labels_are_as_small_as_the_number_of_classes_lets_them_be(classes, dtype) -> None:
    scores = torch.rand(classes, 2, 3, 2, generator=torch.Generator().manual_seed(0))
    labels, _ = fused(scores, (3, 4, 4))
    assert labels.dtype == dtype and torch.equal(labels, reference(scores, (3, 4, 4))[0])
    painted, _ = fused(scores, (3, 4, 4), None, 0.9)
    assert torch.equal(painted, reference(scores, (3, 4, 4), None, 0.9)[0])
    assert painted.dtype == (torch.uint8 if classes < 256 else torch.int16)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64])
def test_a_lookup_gives_each_number_its_value_in_the_label_map(dtype) -> None:
    scores, values = smooth(3, (5, 6, 4)), torch.tensor([0, 120, 7], dtype=dtype)
    labels = fused(scores, (9, 9, 9), values, None, None, False)
    assert labels.dtype == dtype
    plain = fused(scores, (9, 9, 9), None, None, None, False)
    np.testing.assert_array_equal(labels.numpy(), np.array([0, 120, 7])[plain.numpy()])


def test_a_later_region_is_painted_over_an_earlier_one() -> None:
    scores = torch.tensor([0.9, 0.6, 0.2]).view(3, 1, 1, 1).repeat(1, 2, 2, 2)
    values = torch.tensor([0, 5, 4, 3], dtype=torch.uint8)
    labels, winner = fused(scores, (3, 3, 3), values, 0.5)
    assert labels.unique().tolist() == [4] and winner.unique().tolist() == [pytest.approx(0.6)]
    labels, winner = fused(scores, (3, 3, 3), values, 0.95)
    assert labels.unique().tolist() == [0] == winner.unique().tolist()
    labels, _ = fused(scores - 0.7, (3, 3, 3), values, 0.0)
    assert labels.unique().tolist() == [5]


def test_a_score_on_the_threshold_is_not_above_it() -> None:
    half = torch.full((1, 4, 4, 4), 0.5)
    assert not fused(half, (7, 9, 5), None, 0.5, None, False).any()
    assert fused(torch.nextafter(half, torch.ones(())), (4, 4, 4), None, 0.5, None, False).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # Triton's interpreter says so
def test_scores_that_are_no_numbers_give_a_class_that_there_is() -> None:
    scores = torch.full((3, 3, 4, 5), float("nan"))
    assert not fused(scores, (5, 5, 5))[0].any()
    scores[:, 1:] = smooth(3, (2, 4, 5))
    assert fused(scores, (5, 5, 5))[0].max() < 3


def test_scores_that_ask_for_a_gradient_get_labels_that_have_none() -> None:
    labels, winner = fused(smooth(3, (3, 4, 5)).requires_grad_(), (5, 5, 5))
    assert not labels.requires_grad and not winner.requires_grad


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((torch.zeros(1, 2, 3, 3, 3), (3, 3, 3)), "Leave out the axis of the batch"),
        ((torch.zeros(2, 3, 3, 3), (3, 3)), "a shape of three numbers"),
        ((torch.zeros(0, 3, 3, 3), (3, 3, 3)), "at least one class"),
        ((torch.zeros(2, 3, 0, 3), (3, 3, 3)), "of no voxels none can be made"),
        ((torch.zeros(2, 3, 3, 3), (3, 3, 3), torch.zeros(3)), "2 values are needed"),
        ((torch.zeros(2, 3, 3, 3), (3, 3, 3), torch.zeros(2), 0.5), "3 values are needed"),
        ((torch.zeros(2, 3, 3, 3), (3, 3, 3), None, None, 3), "Name the axis"),
    ],
)
def test_what_cannot_be_resampled_is_refused(arguments, match) -> None:
    with pytest.raises(ValueError, match=match):
        fused(*arguments)


@pytest.mark.parametrize("nearest", [None, 0, 2])
@pytest.mark.parametrize("shape", [(7, 9, 11), (16, 5, 12), (3, 20, 4), (1, 1, 1)])
def test_scores_between_old_planes_are_those_that_are_decided_on(
    shape: tuple[int, int, int], nearest: int | None
) -> None:
    scores = torch.randn(4, 7, 9, 11, generator=torch.Generator().manual_seed(0))
    between = Between(7, shape, nearest)
    planes = torch.stack([plane for old in scores.unbind(1) for plane in between.take(old)], dim=1)
    labels, winner = reference(scores, shape, nearest=nearest)
    assert planes.shape == (4, *shape)
    torch.testing.assert_close(planes.argmax(dim=0).to(labels.dtype), labels, rtol=0, atol=0)
    torch.testing.assert_close(planes.amax(dim=0), winner, rtol=0, atol=0)
    assert len(between.held) == 0
