"""Turning moves image and labels as one, never invents a label, and is the same for the same draw."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

from preprocessing.augment import IGNORED, SCALE_RANGE, TURN_CHANCE, Turn, augment, draw_turn

PATCH, SPACING = (20, 24, 12), (1.0, 1.2, 2.5)
NONE = Turn(matrix=np.eye(3))


class Untouched(np.random.Generator):
    """A draw that leaves intensities alone, so that a test sees the turn by itself."""

    def __init__(self) -> None:
        super().__init__(np.random.PCG64(0))

    def random(self, *_: object, **__: object) -> float:
        return 1.0


def from_centre(shape: tuple[int, int, int]) -> np.ndarray:
    """[i j k xyz]: millimetres from the window's centre."""
    indices = np.moveaxis(np.indices(shape), 0, -1)
    return (indices - (np.array(shape) - 1) / 2) * SPACING


def a_ball(shape: tuple[int, int, int], centre: tuple[float, float, float], radius: float) -> torch.Tensor:
    distance = np.linalg.norm(from_centre(shape) - centre, axis=-1)
    return torch.from_numpy((distance <= radius).astype(np.float32))[None]


def some_turns(count: int = 12) -> list[Turn]:
    rng = np.random.default_rng(4)
    turns = [draw_turn(rng, SPACING) for _ in range(count * 5)]
    return [turn for turn in turns if not turn.is_identity][:count]


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return 2 * float((one & other).sum()) / float(one.sum() + other.sum())


def test_no_turn_moves_nothing():
    image = torch.randn(2, *PATCH, generator=torch.Generator().manual_seed(0))
    labels = torch.ones(1, *PATCH)
    same, where = augment(image, labels, NONE, PATCH, SPACING, Untouched())
    assert torch.equal(same, image)
    assert torch.equal(where, labels)


def test_a_turn_by_next_to_nothing_gives_the_window_back():
    image = torch.randn(1, *PATCH, generator=torch.Generator().manual_seed(0))
    labels = (image > 0).float()
    little = Turn(matrix=np.eye(3) * (1 - 1e-7))
    moved, where = augment(image, labels, little, PATCH, SPACING, Untouched())
    assert not little.is_identity
    torch.testing.assert_close(moved, image, atol=1e-3, rtol=0)
    assert torch.equal(where, labels)


def test_the_image_it_was_given_is_never_changed():
    image, labels = torch.randn(2, *PATCH), torch.zeros(1, *PATCH)
    before = image.clone()
    for seed in range(20):
        augment(image, labels, NONE, PATCH, SPACING, np.random.default_rng(seed))
    assert torch.equal(image, before)


@pytest.mark.parametrize("turn", some_turns(), ids=lambda turn: str(turn.matrix[0].round(2)))
def test_a_bright_ball_stays_labelled_and_lands_where_the_turn_says(turn):
    wide = turn.reach(PATCH, SPACING)
    centre = np.array([3.0, -4.0, 2.0])
    ball = a_ball(wide, tuple(centre), 7.0)
    image, labels = augment(ball, ball, turn, PATCH, SPACING, Untouched())
    assert image.shape == labels.shape == (1, *PATCH)
    bright, labelled = image[0].numpy() > 0.5, labels[0].numpy() == 1
    assert dice(bright, labelled) > 0.9
    landed = from_centre(PATCH)[labelled].mean(axis=0)
    np.testing.assert_allclose(landed, np.linalg.inv(turn.matrix) @ centre, atol=0.6)


def test_a_quarter_turn_is_numpy_s_rot90():
    image = torch.randn(1, 9, 9, 5, generator=torch.Generator().manual_seed(1))
    quarter = Turn(matrix=Rotation.from_euler("z", 90, degrees=True).as_matrix())
    moved, _ = augment(image, torch.zeros(1, 9, 9, 5), quarter, (9, 9, 5), (1.0, 1.0, 3.0), Untouched())
    np.testing.assert_allclose(moved[0], np.rot90(image[0], k=-1), atol=1e-5)


@pytest.mark.parametrize("turn", some_turns(4), ids=lambda turn: str(turn.matrix[0].round(2)))
def test_a_turned_window_is_what_scipy_makes_of_it(turn):
    wide = turn.reach(PATCH, SPACING)
    field = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=wide), 1.5).astype(np.float32)
    image, _ = augment(torch.from_numpy(field)[None], torch.zeros(1, *wide), turn, PATCH, SPACING, Untouched())
    matrix = np.diag(1 / np.array(SPACING)) @ turn.matrix @ np.diag(SPACING)
    offset = (np.array(wide) - 1) / 2 - matrix @ ((np.array(PATCH) - 1) / 2)
    theirs = ndimage.affine_transform(field, matrix, offset, PATCH, order=1)
    inner = (slice(1, -1),) * 3
    np.testing.assert_allclose(image[0].numpy()[inner], theirs[inner], atol=1e-4)


@pytest.mark.parametrize("turn", some_turns(), ids=lambda turn: str(turn.matrix[0].round(2)))
def test_a_window_cut_as_wide_as_it_reaches_has_no_missing_corner(turn):
    wide = turn.reach(PATCH, SPACING)
    _, labels = augment(torch.zeros(1, *wide), torch.full((1, *wide), 3.0), turn, PATCH, SPACING, Untouched())
    assert torch.equal(labels.unique(), torch.tensor([3.0]))
    assert all(w >= p for w, p in zip(wide, PATCH, strict=True))


def test_no_turn_reaches_no_further_than_the_window():
    assert NONE.reach(PATCH, SPACING) == PATCH


def test_what_lies_outside_is_ignored_and_not_background():
    turn = Turn(matrix=Rotation.from_euler("z", 25, degrees=True).as_matrix() * 1.25)
    image, labels = augment(torch.ones(1, *PATCH), torch.zeros(1, *PATCH), turn, PATCH, SPACING, Untouched())
    assert labels[0, 0, 0, 0] == IGNORED
    assert labels[0, 10, 12, 6] == 0
    assert image[0, 0, 0, 0] == 0
    assert set(labels.unique().tolist()) == {0.0, float(IGNORED)}


def test_ignored_voxels_stay_ignored_and_no_label_lies_between_two():
    labels = torch.from_numpy(np.random.default_rng(0).choice([-1.0, 0.0, 4.0], (1, 30, 30, 20)).astype(np.float32))
    for turn in some_turns(4):
        _, moved = augment(torch.zeros(1, 30, 30, 20), labels, turn, PATCH, SPACING, Untouched())
        assert set(moved.unique().tolist()) == {-1.0, 0.0, 4.0}


@pytest.mark.parametrize("seed", range(5))
def test_the_same_draw_gives_the_same_window(seed):
    image = torch.randn(2, 30, 34, 20, generator=torch.Generator().manual_seed(seed))
    labels = (image[:1] > 0).float()
    made = []
    for _ in range(2):
        rng = np.random.default_rng(seed)
        made.append(augment(image, labels, draw_turn(rng, SPACING), (30, 34, 20), SPACING, rng))
    assert torch.equal(made[0][0], made[1][0])
    assert torch.equal(made[0][1], made[1][1])


def test_intensities_change_without_leaving_the_finite():
    image = torch.randn(2, 10, 10, 6, generator=torch.Generator().manual_seed(0))
    image[1] = 2.5  # nothing to stretch: gamma must not divide by zero
    made = [augment(image, image[:1], NONE, (10, 10, 6), SPACING, np.random.default_rng(n))[0] for n in range(60)]
    assert all(bool(torch.isfinite(one).all()) for one in made)
    assert sum(not torch.equal(one[0], image[0]) for one in made) > 20
    assert max(float(one.abs().max()) for one in made) < 12


def test_turns_are_as_frequent_and_as_large_as_said():
    rng = np.random.default_rng(0)
    turns = [draw_turn(rng, (1.0, 1.0, 1.0)) for _ in range(800)]
    turned = [turn.matrix for turn in turns if not turn.is_identity]
    assert len(turned) / 800 == pytest.approx(TURN_CHANCE, abs=0.06)
    for matrix in turned:
        size = np.cbrt(np.linalg.det(matrix))
        assert SCALE_RANGE[0] <= size <= SCALE_RANGE[1]
        np.testing.assert_allclose(matrix.T @ matrix, size**2 * np.eye(3), atol=1e-9)


@pytest.mark.parametrize("thick", [0, 1, 2])
def test_thick_slices_are_turned_in_their_plane_alone(thick):
    spacing = tuple(6.0 if axis == thick else 1.0 for axis in range(3))
    rng = np.random.default_rng(0)
    turned = [turn.matrix for turn in (draw_turn(rng, spacing) for _ in range(100)) if not turn.is_identity]
    assert turned
    for matrix in turned:
        through = np.delete(matrix[thick], thick)
        np.testing.assert_allclose(through, 0, atol=1e-12)
        np.testing.assert_allclose(np.delete(matrix[:, thick], thick), 0, atol=1e-12)
