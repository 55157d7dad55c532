"""Turning moves image and labels as one and interpolates once; each change of intensities is what its name says."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.transform import Rotation

from preprocessing.augment import AUGMENTATIONS, CHANGES, IGNORED, Augmentation, Change, Turn, augment, draw_turn

PATCH, SPACING = (20, 24, 12), (1.0, 1.2, 2.5)
NONE, DEFAULT, NNUNET = AUGMENTATIONS["none"], AUGMENTATIONS["default"], AUGMENTATIONS["nnunet"]
ALL = (True, True, True)
STILL = Turn(matrix=np.eye(3))
ALWAYS = replace(NNUNET, rotated=1.0, scaled=1.0, changes=())

Triple = tuple[int, int, int]
Spacing = tuple[float, float, float]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def some_image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(rng(seed).normal(size=shape).astype(np.float32))


def some_labels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(rng(seed).choice(np.array([-1, 0, 4], np.int16), size=(1, *shape)))


def turned(image: torch.Tensor, labels: torch.Tensor, turn: Turn, patch: Triple = PATCH, spacing: Spacing = SPACING):
    return augment(image, labels, turn, patch, spacing, rng(), NONE)


def changed(image: torch.Tensor, name: str, low: float, high: float, seed: int = 0, turn: Turn = STILL) -> np.ndarray:
    """One change alone, always made."""
    only = Augmentation(changes=(Change(of=name, chance=1.0, low=low, high=high),))
    shape = (image.shape[1], image.shape[2], image.shape[3])
    labels = torch.zeros(1, *shape, dtype=torch.int16)
    return augment(image, labels, turn, shape, (1.0, 1.0, 1.0), rng(seed), only)[0].numpy()


def from_centre(shape: Triple, spacing: Spacing = SPACING) -> np.ndarray:
    """[i j k xyz]: millimetres from the window's centre."""
    return (np.moveaxis(np.indices(shape), 0, -1) - (np.array(shape) - 1) / 2) * spacing


def some_turns(count: int = 12, spacing: Spacing = SPACING) -> list[Turn]:
    draws = rng(4)
    return [draw_turn(draws, ALWAYS, spacing, PATCH, ALL) for _ in range(count)]


def name_of(turn: Turn) -> str:
    return str(turn.matrix[0].round(2))


spacings = st.tuples(*[st.floats(0.5, 5.0)] * 3)
patches = st.tuples(*[st.integers(1, 13)] * 3)
presets = st.sampled_from([replace(one, changes=()) for one in (DEFAULT, NNUNET, ALWAYS)])
turns = st.builds(
    lambda preset, spacing, patch, seed: (draw_turn(rng(seed), preset, spacing, patch, ALL), spacing, patch),
    presets,
    spacings,
    patches,
    st.integers(0, 10_000),
)


# where things lie


def test_no_turn_moves_nothing():
    image, labels = some_image(2, *PATCH), some_labels(*PATCH)
    same, where = turned(image, labels, STILL)
    assert torch.equal(same, image)
    assert torch.equal(where, labels)


def test_a_turn_by_next_to_nothing_gives_the_window_back():
    image, labels = some_image(1, *PATCH), some_labels(*PATCH)
    for little in (np.eye(3) * (1 - 1e-7), Rotation.from_rotvec([1e-7, 1e-7, 1e-7]).as_matrix()):
        moved, where = turned(image, labels, Turn(matrix=little))
        torch.testing.assert_close(moved, image, atol=1e-3, rtol=0)
        assert torch.equal(where, labels)


@pytest.mark.parametrize("signs", [s for s in np.ndindex(2, 2, 2) if any(s)], ids=str)
def test_mirrors_are_exact_flips_and_reach_no_further_than_the_window(signs):
    mirror = Turn(matrix=np.diag([1.0 - 2 * sign for sign in signs]))
    image, labels = some_image(2, *PATCH), some_labels(*PATCH)
    axes = [1 + axis for axis in range(3) if signs[axis]]
    seen, where = turned(image, labels, mirror)
    assert mirror.reach(PATCH, SPACING) == PATCH
    assert torch.equal(seen, image.flip(axes))
    assert torch.equal(where, labels.flip(axes))


def test_a_quarter_turn_is_numpy_s_rot90():
    image, labels = some_image(1, 9, 9, 5), some_labels(9, 9, 5)
    quarter = Turn(matrix=Rotation.from_euler("z", 90, degrees=True).as_matrix().round())
    moved, where = turned(image, labels, quarter, (9, 9, 5), (1.0, 1.0, 3.0))
    np.testing.assert_allclose(moved[0], np.rot90(image[0], k=-1), atol=1e-5)
    np.testing.assert_array_equal(where[0], np.rot90(labels[0], k=-1))


@given(turns)
@settings(max_examples=60, deadline=None)
def test_any_turn_is_one_interpolation_at_the_composed_matrix_as_scipy_makes_it(drawn):
    turn, spacing, patch = drawn
    wide = turn.reach(patch, spacing)
    image = some_image(2, *wide)
    seen, _ = turned(image, some_labels(*wide), turn, patch, spacing)
    matrix = np.diag(1 / np.array(spacing)) @ turn.matrix @ np.diag(spacing)
    offset = (np.array(wide) - 1) / 2 - matrix @ ((np.array(patch) - 1) / 2)
    for channel, given_ in zip(seen.numpy(), image.numpy(), strict=True):
        # in float64, and with edges that do not end: scipy calls a place outside that lies there by rounding
        theirs = ndimage.affine_transform(given_.astype(float), matrix, offset, patch, order=1, mode="nearest")
        np.testing.assert_allclose(channel, theirs, atol=1e-4)


def test_a_flipped_axis_of_one_voxel_is_no_trouble():
    turn = Turn(matrix=np.diag([1.1, -1.0, -1.1]), through=1)
    wide = turn.reach((2, 1, 2), (1.0, 1.0, 1.0))
    image, labels = torch.ones(1, *wide), torch.full((1, *wide), 3, dtype=torch.int16)
    seen, truth = turned(image, labels, turn, (2, 1, 2), (1.0, 1.0, 1.0))
    assert seen.shape == truth.shape == (1, 2, 1, 2)


@given(turns)
@settings(max_examples=50, deadline=None)
def test_a_window_cut_as_wide_as_it_reaches_has_no_missing_corner_and_is_no_wider_than_needed(drawn):
    turn, spacing, patch = drawn
    wide = turn.reach(patch, spacing)
    whole = torch.full((1, *wide), 3, dtype=torch.int16)
    seen, labels = turned(torch.ones(1, *wide), whole, turn, patch, spacing)
    assert labels.unique().tolist() == [3]
    np.testing.assert_allclose(seen, 1, atol=1e-6)
    corners = (np.array(list(np.ndindex(2, 2, 2))) - 0.5) * (np.array(patch) - 1) * spacing
    apart = 2 * np.abs(corners @ turn.matrix.T / spacing).max(axis=0)
    assert np.all(np.array(wide) - 1 < apart + 1)


@given(st.tuples(*[st.floats(0.8, 1.6)] * 3), st.tuples(*[st.integers(20, 30)] * 3), presets, st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_image_and_labels_move_together_and_land_where_the_turn_says(spacing, patch, preset, seed):
    turn = draw_turn(rng(seed), preset, spacing, patch, ALL)
    wide = turn.reach(patch, spacing)
    radius = 0.3 * min(np.array(patch) * spacing)
    centre = rng(seed).uniform(-0.1, 0.1, 3) * np.array(patch) * spacing
    distance = np.linalg.norm(from_centre(wide, spacing) - turn.matrix @ centre, axis=-1)
    # the image fades over a voxel, so that half of its brightness is where the labels end
    ball = np.clip((radius - distance) / max(spacing) + 0.5, 0, 1).astype(np.float32)
    labels = torch.from_numpy((distance <= radius).astype(np.int16))[None]
    seen, truth = turned(torch.from_numpy(ball)[None], labels, turn, patch, spacing)
    bright, labelled = seen[0].numpy() > 0.5, truth[0].numpy() == 1
    assert 2 * (bright & labelled).sum() / (bright.sum() + labelled.sum()) > 0.88
    landed = from_centre(patch, spacing)[labelled].mean(axis=0)
    np.testing.assert_allclose(landed, centre, atol=max(spacing))


@given(turns)
@settings(max_examples=50, deadline=None)
def test_no_label_is_invented_and_the_nearest_is_taken(drawn):
    turn, spacing, patch = drawn
    wide = turn.reach(patch, spacing)
    labels = some_labels(*wide)
    _, moved = turned(some_image(1, *wide), labels, turn, patch, spacing)
    assert moved.dtype == labels.dtype
    places = from_centre(patch, spacing) @ turn.matrix.T / spacing + (np.array(wide) - 1) / 2
    between = np.abs(places - np.floor(places) - 0.5).min(axis=-1) < 1e-3  # where either neighbour is as near
    nearest = np.clip(np.rint(places).astype(int), 0, np.array(wide) - 1)
    expected = labels[0].numpy()[tuple(np.moveaxis(nearest, -1, 0))]
    np.testing.assert_array_equal(moved[0].numpy()[~between], expected[~between])
    assert set(moved.unique().tolist()) <= set(labels.unique().tolist())


@pytest.mark.parametrize("matrix", [Rotation.from_euler("z", 25, degrees=True).as_matrix() * 1.25, np.eye(3) * 1.4])
def test_what_lies_outside_of_a_window_cut_too_small_is_ignored_and_not_background(matrix):
    image, labels = torch.ones(1, *PATCH), torch.zeros(1, *PATCH, dtype=torch.int16)
    seen, truth = turned(image, labels, Turn(matrix=matrix))
    assert seen.shape == truth.shape == (1, *PATCH)
    assert truth[0, 0, 0, 0] == IGNORED
    assert truth[0, 10, 12, 6] == 0
    assert seen[0, 0, 0, 0] == 0
    assert seen[0, 10, 12, 6] == 1
    assert set(truth.unique().tolist()) == {0, IGNORED}


@pytest.mark.parametrize("dtype", [torch.int16, torch.int64])
def test_a_window_cut_too_large_is_cropped_about_its_centre(dtype):
    image, labels = some_image(1, 9, 8, 7), some_labels(9, 8, 7).to(dtype)
    seen, truth = turned(image, labels, STILL, (5, 4, 3))
    assert torch.equal(seen, image[:, 2:7, 2:6, 2:5])
    assert torch.equal(truth, labels[:, 2:7, 2:6, 2:5])


# which turns are drawn


def test_rotation_and_scale_are_as_frequent_as_nnunet_s():
    draws = rng()
    drawn = [draw_turn(draws, NNUNET, (1.0, 1.0, 1.0), (32, 32, 32)).matrix for _ in range(2_000)]
    sizes = np.array([np.cbrt(np.linalg.det(matrix)) for matrix in drawn])
    rotated = np.array([np.abs(matrix - np.diag(np.diag(matrix))).max() > 0 for matrix in drawn])
    scaled = np.abs(sizes - 1) > 1e-9
    assert rotated.mean() == pytest.approx(0.2, abs=0.025)
    assert scaled.mean() == pytest.approx(0.2, abs=0.025)
    assert (rotated & scaled).mean() == pytest.approx(0.04, abs=0.015)


def test_scales_lie_half_below_one_and_half_above_and_evenly_there():
    draws = rng()
    only = replace(ALWAYS, rotated=0.0)
    sizes = np.array([draw_turn(draws, only, (1.0, 1.0, 1.0), (32, 32, 32)).matrix[0, 0] for _ in range(2_000)])
    assert 0.7 <= sizes.min() < 0.71
    assert 1.39 < sizes.max() <= 1.4
    assert (sizes < 1).mean() == pytest.approx(0.5, abs=0.03)
    assert sizes[sizes < 1].mean() == pytest.approx(0.85, abs=0.01)
    assert sizes[sizes > 1].mean() == pytest.approx(1.2, abs=0.01)


def test_angles_are_uniform_about_each_axis():
    draws = rng()
    only = replace(ALWAYS, scaled=0.0)
    matrices = [draw_turn(draws, only, (1.0, 1.0, 1.0), (32, 32, 32)).matrix for _ in range(3_000)]
    angles = Rotation.from_matrix(np.array(matrices)).as_euler("xyz", degrees=True)
    assert np.abs(angles).max() <= 30 + 1e-9
    for axis in range(3):
        shares, _ = np.histogram(angles[:, axis], bins=6, range=(-30, 30))
        np.testing.assert_allclose(shares / 3_000, 1 / 6, atol=0.03)


def test_each_axis_is_mirrored_in_half_of_the_windows_and_only_where_it_may_be():
    draws = rng()
    drawn = [draw_turn(draws, NNUNET, SPACING, PATCH, (True, False, True)).matrix for _ in range(2_000)]
    signs = np.array([np.diag(matrix) < 0 for matrix in drawn])
    np.testing.assert_allclose(signs.mean(axis=0), [0.5, 0, 0.5], atol=0.03)
    assert (signs[:, 0] & signs[:, 2]).mean() == pytest.approx(0.25, abs=0.03)


def test_ours_turns_in_about_a_third_of_the_windows_and_moderately():
    draws = rng()
    drawn = [draw_turn(draws, DEFAULT, (1.0, 1.0, 1.0), (32, 32, 32)).matrix for _ in range(2_000)]
    moved = [matrix for matrix in drawn if not np.array_equal(matrix, np.eye(3))]
    assert len(moved) / 2_000 == pytest.approx(0.35, abs=0.04)
    for matrix in moved:
        size = np.cbrt(np.linalg.det(matrix))
        assert 0.8 <= size <= 1.25
        np.testing.assert_allclose(matrix.T @ matrix, size**2 * np.eye(3), atol=1e-9)


@pytest.mark.parametrize("thick", [0, 1, 2])
@pytest.mark.parametrize("preset", ["default", "nnunet"])
def test_thick_slices_are_turned_and_scaled_in_their_plane_alone(thick, preset):
    spacing = tuple(6.0 if axis == thick else 1.0 for axis in range(3))
    patch = tuple(8 if axis == thick else 32 for axis in range(3))
    often = replace(AUGMENTATIONS[preset], rotated=1.0, scaled=1.0)
    draws = rng()
    drawn = [draw_turn(draws, often, spacing, patch) for _ in range(50)]
    for turn in drawn:
        assert turn.through == thick
        assert turn.matrix[thick, thick] == 1
        assert not np.delete(turn.matrix[thick], thick).any()
        assert not np.delete(turn.matrix[:, thick], thick).any()
        assert turn.reach(patch, spacing)[thick] == 8
    one, two = (thick + 1) % 3, (thick + 2) % 3
    angles = np.rad2deg([np.arctan2(turn.matrix[two, one], turn.matrix[one, one]) for turn in drawn])
    assert np.abs(angles).max() > (150 if preset == "nnunet" else 20)


def test_nnunet_s_rule_for_thick_slices_looks_at_the_patch_and_ours_at_the_spacing_too():
    deep = ((1.0, 1.0, 5.0), (32, 32, 32))
    assert draw_turn(rng(), NNUNET, *deep).through is None
    assert draw_turn(rng(), DEFAULT, *deep).through == 2
    thin = ((1.0, 1.0, 1.0), (64, 16, 64))
    assert draw_turn(rng(), NNUNET, *thin).through == 1
    assert draw_turn(rng(), NNUNET, (1.0, 1.0, 1.0), (64, 64, 64)).through is None


@pytest.mark.parametrize(("patch", "most"), [((1, 64, 48), 180), ((64, 1, 32), 15), ((64, 64, 1), 180)])
def test_flat_windows_turn_freely_where_nearly_square_and_little_where_elongated(patch, most):
    draws = rng()
    only = replace(ALWAYS, scaled=0.0)
    drawn = [draw_turn(draws, only, (1.0, 1.0, 1.0), patch) for _ in range(200)]
    angles = np.rad2deg([np.arccos(np.clip((np.trace(turn.matrix) - 1) / 2, -1, 1)) for turn in drawn])
    assert 0.9 * most < angles.max() <= most + 1e-6
    assert all(turn.reach(patch, (1.0, 1.0, 1.0))[patch.index(1)] == 1 for turn in drawn)


# what happens to intensities


def test_noise_has_the_deviation_that_is_asked_for_and_differs_between_channels():
    noise = changed(torch.zeros(2, 40, 40, 40), "noise", 0.3, 0.3)
    np.testing.assert_allclose(noise.std(axis=(1, 2, 3)), 0.3, rtol=0.02)
    np.testing.assert_allclose(noise.mean(axis=(1, 2, 3)), 0, atol=0.01)
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.02


def test_a_shared_amount_is_one_for_all_channels():
    image = torch.ones(5, 2, 2, 2)
    labels = torch.zeros(1, 2, 2, 2, dtype=torch.int16)
    for shared in (True, False):
        bright = Change(of="brightness", chance=1.0, low=0.5, high=2.0, shared=shared)
        seen, _ = augment(image, labels, STILL, (2, 2, 2), SPACING, rng(), Augmentation(changes=(bright,)))
        assert len(seen.unique()) == (1 if shared else 5)


def test_brightness_and_shift_are_a_factor_and_a_term():
    image = some_image(1, 6, 5, 4)
    np.testing.assert_allclose(changed(image, "brightness", 1.2, 1.2), image * 1.2, rtol=1e-6)
    np.testing.assert_allclose(changed(image, "shift", -0.2, -0.2), image - 0.2, atol=1e-6)


@pytest.mark.parametrize("factor", [0.75, 1.25])
def test_contrast_stretches_about_the_mean_and_keeps_the_range(factor):
    image = some_image(1, 12, 12, 12)
    seen = changed(image, "contrast", factor, factor)
    mean, low, high = image.mean(), image.min(), image.max()
    np.testing.assert_allclose(seen, ((image - mean) * factor + mean).clip(low, high), atol=1e-5)
    assert seen.min() >= low
    assert seen.max() <= high


@pytest.mark.parametrize("name", ["gamma", "inverted_gamma"])
@pytest.mark.parametrize("power", [0.7, 1.0, 1.5])
def test_gamma_keeps_mean_deviation_and_order_and_bends_as_its_formula(name, power):
    image = some_image(1, 16, 15, 14).exp()
    seen = changed(image, name, power, power)[0]
    before = image[0].numpy()
    assert seen.mean() == pytest.approx(before.mean(), abs=1e-4)
    assert seen.std() == pytest.approx(before.std(), rel=1e-4)
    np.testing.assert_array_equal(np.argsort(before, axis=None)[::400], np.argsort(seen, axis=None)[::400])
    sign = -1 if name == "inverted_gamma" else 1
    share = (sign * before - (sign * before).min()) / np.ptp(before)
    bent = sign * share.astype(float) ** power
    expected = (bent - bent.mean()) / bent.std() * before.std() + before.mean()
    np.testing.assert_allclose(seen, expected, atol=2e-4)


@pytest.mark.parametrize("sigma", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("shape", [(20, 17, 12), (1, 40, 7), (70, 33, 21), (2, 1, 3)])
def test_blur_is_scipy_s_gaussian(sigma, shape):
    image = some_image(1, *shape)
    theirs = ndimage.gaussian_filter(image[0].numpy(), sigma, radius=max(1, round(3 * sigma)), mode="mirror")
    np.testing.assert_allclose(changed(image, "blur", sigma, sigma)[0], theirs, atol=1e-5)


@pytest.mark.parametrize("zoom", [0.5, 0.73, 1.0])
@pytest.mark.parametrize("through", [None, 0, 2])
def test_low_resolution_is_torch_s_nearest_down_and_linear_up_and_not_across_thick_slices(zoom, through):
    image = some_image(1, 16, 21, 9)
    seen = changed(image, "low_resolution", zoom, zoom, turn=Turn(matrix=np.eye(3), through=through))
    full = image.shape[1:]
    small = [n if axis == through else round(n * zoom) for axis, n in enumerate(full)]
    kept = torch.nn.functional.interpolate(image[None], small, mode="nearest-exact")
    theirs = torch.nn.functional.interpolate(kept, full, mode="trilinear")[0]
    np.testing.assert_allclose(seen, theirs, atol=1e-5)


def test_a_bias_field_is_a_smooth_factor_within_its_bounds():
    field = changed(torch.ones(1, 30, 32, 28), "bias_field", -0.3, 0.3)[0]
    logarithm = np.log(field)
    assert np.abs(logarithm).max() < 20 * 0.3
    assert logarithm.std() > 0.01
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in field.shape), indexing="ij")
    powers = [(p, q, r) for p in range(4) for q in range(4) for r in range(4) if p + q + r <= 3]
    terms = np.stack([(x**p * y**q * z**r).ravel() for p, q, r in powers], axis=1)
    found, *_ = np.linalg.lstsq(terms, logarithm.ravel(), rcond=None)
    np.testing.assert_allclose(terms @ found, logarithm.ravel(), atol=1e-4)
    assert 0.15 < np.abs(found).max() <= 0.3 + 1e-4


@pytest.mark.parametrize("name", sorted(CHANGES))
@given(st.tuples(*[st.integers(1, 9)] * 3), st.integers(0, 100), st.sampled_from([0.0, 1.0, 3.0]))
@settings(max_examples=25, deadline=None)
def test_no_change_leaves_the_finite_whatever_the_shape_and_a_channel_without_contrast(name, shape, seed, spread):
    image = some_image(2, *shape, seed=seed) * spread + 2.5
    image[1] = -1.5
    low, high = (-0.1, 0.1) if name == "bias_field" else (0.5, 0.9)
    seen = changed(image, name, low, high, seed=seed)
    assert seen.shape == tuple(image.shape)
    assert np.isfinite(seen).all()
    assert np.abs(seen).max() < 8 * np.abs(image.numpy()).max() + 8


@pytest.mark.parametrize("preset", ["default", "nnunet"])
def test_every_change_of_a_preset_comes_as_often_as_its_table_says(preset):
    image = some_image(1, 5, 5, 5)
    labels = torch.zeros(1, 5, 5, 5, dtype=torch.int16)
    for change in AUGMENTATIONS[preset].changes:
        only = Augmentation(changes=(change,))
        draws = rng(1)
        made = [augment(image, labels, STILL, (5, 5, 5), SPACING, draws, only)[0] for _ in range(300)]
        share = np.mean([not torch.equal(one, image) for one in made])
        assert share == pytest.approx(change.chance * change.channels, abs=0.08), change.of


def test_nnunet_s_table_is_nnunet_s():
    said = {change.of: (change.chance, change.low, change.high, change.channels) for change in NNUNET.changes}
    assert said == {
        "noise": (0.1, 0, 0.1, 1),
        "blur": (0.2, 0.5, 1, 0.5),
        "brightness": (0.15, 0.75, 1.25, 1),
        "contrast": (0.15, 0.75, 1.25, 1),
        "low_resolution": (0.25, 0.5, 1, 0.5),
        "inverted_gamma": (0.1, 0.7, 1.5, 1),
        "gamma": (0.3, 0.7, 1.5, 1),
    }
    assert list(said) == [
        "noise",
        "blur",
        "brightness",
        "contrast",
        "low_resolution",
        "inverted_gamma",
        "gamma",
    ]


def test_none_is_nothing():
    image, labels = some_image(3, *PATCH), some_labels(*PATCH)
    draws = rng()
    for _ in range(50):
        turn = draw_turn(draws, NONE, SPACING, PATCH, ALL)
        seen, truth = augment(image, labels, turn, PATCH, SPACING, draws, NONE)
        assert torch.equal(seen, image)
        assert torch.equal(truth, labels)


# what training counts on


@pytest.mark.parametrize("preset", sorted(AUGMENTATIONS))
def test_what_it_was_given_is_never_changed_nor_handed_back(preset):
    image, labels = some_image(2, *PATCH), some_labels(*PATCH)
    before, where = image.clone(), labels.clone()
    for seed in range(40):
        draws = rng(seed)
        turn = draw_turn(draws, AUGMENTATIONS[preset], SPACING, PATCH, ALL)
        seen, truth = augment(image, labels, turn, PATCH, SPACING, draws, AUGMENTATIONS[preset])
        assert seen.is_contiguous()
        assert truth.is_contiguous()
        seen.zero_()
        truth.zero_()
    assert torch.equal(image, before)
    assert torch.equal(labels, where)


@pytest.fixture
def threads():
    """Sets how many threads torch has, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("preset", ["default", "nnunet"])
def test_the_same_draw_gives_the_same_bits_however_many_threads_there_are(preset, threads):
    patch = (41, 37, 43)  # no multiple of a processor's vectors, and more than torch gives to one thread
    often = AUGMENTATIONS[preset]
    often = replace(often, rotated=0.5, changes=tuple(replace(change, chance=0.6) for change in often.changes))
    for seed in range(12):
        made = []
        for count in (1, 3):
            threads(count)
            draws = rng(seed)
            turn = draw_turn(draws, often, SPACING, patch, ALL)
            wide = turn.reach(patch, SPACING)
            made.append(augment(some_image(2, *wide), some_labels(*wide), turn, patch, SPACING, draws, often))
        assert torch.equal(made[0][0], made[1][0])
        assert torch.equal(made[0][1], made[1][1])


@given(turns, st.sampled_from(["default", "nnunet"]), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_every_window_has_the_patch_s_shape_and_ordinary_intensities(drawn, preset, channels):
    turn, spacing, patch = drawn
    wide = turn.reach(patch, spacing)
    image = some_image(channels, *wide).clip(-3, 3)
    seen, truth = augment(image, some_labels(*wide), turn, patch, spacing, rng(1), AUGMENTATIONS[preset])
    assert seen.shape == (channels, *patch)
    assert truth.shape == (1, *patch)
    assert seen.dtype == torch.float32
    assert torch.isfinite(seen).all()
    assert seen.abs().max() < 60
