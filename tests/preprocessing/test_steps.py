"""What is done to a scan can be undone, keeps every voxel where it lies in the patient, and does not ask how it was stored."""

from itertools import permutations, product

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import apply_orientation, inv_ornt_aff
from scipy.spatial.transform import Rotation

from preprocessing.phantoms import phantom
from preprocessing.records import BadRecord
from preprocessing.steps import Crop, Normalise, Orient, Pad, Resample, Scale, Step, nonzero_box, prepare
from preprocessing.volume import Geometry, ScanError, Volume

ORDERS = [(order, signs) for order in permutations(range(3)) for signs in product((1, -1), repeat=3)]
QUIET = settings(derandomize=True, max_examples=30, deadline=None, database=None)
SEEDS = st.integers(0, 2**32 - 1)
MR = Normalise(channels=(Scale(by="scan"),))
EXACT: tuple[Step, ...] = (Orient(), Crop(margin=1), MR, Pad(shape=(9, 8, 13)))


def a_grid(seed: int, shape: tuple[int, int, int] = (7, 9, 8), tilt: float = 0.6) -> Geometry:
    """An oblique grid whose axes lie in any order and direction."""
    rng = np.random.default_rng(seed)
    axis = rng.normal(size=3)
    turn = Rotation.from_rotvec(axis / np.linalg.norm(axis) * rng.uniform(-tilt, tilt)).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = (turn * rng.choice([-1, 1], 3))[:, rng.permutation(3)] * rng.uniform(0.5, 4, 3)
    affine[:3, 3] = rng.uniform(-200, 200, 3)
    return Geometry(shape=shape, affine=affine)


def a_stripped_scan(grid: Geometry) -> tuple[Volume, Volume]:
    """Signal and labels in the middle, exact zeros around them."""
    rng = np.random.default_rng(5)
    core = (slice(None), slice(2, -2), slice(1, -3), slice(2, -1))
    signal, labels = np.zeros((1, *grid.shape), np.float32), np.zeros((1, *grid.shape), np.uint16)
    signal[core] = rng.uniform(1, 2, signal[core].shape)
    labels[core] = rng.choice([0, 1, 5, 300], labels[core].shape)
    return one(signal, grid, "mr"), one(labels, grid, "labels")


def one(voxels: np.ndarray, grid: Geometry, *names: str) -> Volume:
    return Volume(voxels=voxels, geometry=grid, channels=names)


def places(grid: Geometry) -> np.ndarray:
    """[x y z, i, j, k]: where every voxel lies."""
    return np.moveaxis(grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1)), -1, 0)


def stored_as(volume: Volume, order: tuple[int, ...], signs: tuple[int, ...]) -> Volume:
    """The same scan with its axes written in another order and direction, by nibabel."""
    turn = np.column_stack([order, signs])
    voxels = np.stack([apply_orientation(channel, turn) for channel in volume.voxels])
    affine = volume.geometry.affine @ inv_ornt_aff(turn, volume.geometry.shape)
    return volume.with_voxels(voxels, geometry=Geometry(shape=voxels.shape[1:], affine=affine))


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return 2 * float((one & other).sum()) / float(one.sum() + other.sum())


def same_grid(one: Geometry, other: Geometry) -> bool:
    return one.shape == other.shape and np.array_equal(one.affine, other.affine)


@pytest.mark.parametrize(("order", "signs"), ORDERS)
def test_what_prepare_does_the_trail_undoes_in_every_axis_order(order, signs):
    scan, labels = (stored_as(v, order, signs) for v in a_stripped_scan(Geometry(shape=(7, 9, 8), affine=np.eye(4))))
    prepared, trail = prepare(scan, EXACT)
    followed = trail.follow(labels)
    back = trail.undo(followed)
    assert prepared.geometry.orientation == "RAS"
    assert same_grid(followed.geometry, prepared.geometry)
    assert same_grid(back.geometry, scan.geometry)
    np.testing.assert_array_equal(back.voxels, labels.voxels)


@QUIET
@given(SEEDS, st.tuples(*[st.integers(6, 11)] * 3))
def test_what_prepare_does_the_trail_undoes_on_any_oblique_grid(seed, shape):
    scan, labels = a_stripped_scan(a_grid(seed, shape))
    exact = [step for step in EXACT if step is not MR]
    prepared, trail = prepare(scan, exact)
    for volume, there in ((scan, prepared), (labels, trail.follow(labels))):
        back = trail.undo(there)
        assert same_grid(back.geometry, scan.geometry)
        assert back.voxels.dtype == volume.voxels.dtype
        np.testing.assert_array_equal(back.voxels, volume.voxels)


@QUIET
@given(SEEDS)
def test_orient_does_what_nibabel_does(seed):
    scan, _ = a_stripped_scan(a_grid(seed))
    theirs = nibabel.as_closest_canonical(nibabel.Nifti1Image(scan.voxels[0], scan.geometry.affine))
    ours = Orient().apply(scan)
    np.testing.assert_array_equal(ours.voxels[0], np.asarray(theirs.dataobj))
    np.testing.assert_allclose(ours.geometry.affine, theirs.affine, atol=1e-9)


@pytest.fixture(scope="module")
def prepared_once():
    case = phantom(3)
    steps = (Orient(), Crop(), Resample(spacing_mm=(3.0, 2.5, 3.5)), Normalise(channels=(Scale(by="scan"),) * 2))
    steps = (*steps, Pad(shape=(40, 20, 24)))
    prepared, trail = prepare(case.image, steps)
    return case, steps, prepared, trail.follow(case.labels)


@pytest.mark.parametrize(("order", "signs"), ORDERS)
def test_a_network_sees_the_same_however_the_file_is_stored(prepared_once, order, signs):
    case, steps, prepared, labels = prepared_once
    again, trail = prepare(stored_as(case.image, order, signs), steps)
    assert again.geometry.matches(prepared.geometry)
    np.testing.assert_allclose(again.voxels, prepared.voxels, atol=1e-5)
    np.testing.assert_array_equal(trail.follow(stored_as(case.labels, order, signs)).voxels, labels.voxels)


@pytest.mark.parametrize("step", [Orient(), Crop(margin=1), Pad(shape=(12, 9, 15))], ids=lambda step: step.kind)
@QUIET
@given(SEEDS)
def test_a_step_keeps_every_voxel_where_it_lies_in_the_patient(step, seed):
    grid = a_grid(seed)
    marked = places(grid).astype(np.float64) + 1000  # never zero inside
    marked[:, 0] = marked[:, :, :2] = marked[:, :, :, -1] = 0
    after = step.apply(one(marked, grid, "x", "y", "z"))
    carried = (after.voxels != 0).any(axis=0)
    assert carried.sum() == (marked != 0).any(axis=0).sum()
    np.testing.assert_allclose(after.voxels[:, carried], places(after.geometry)[:, carried] + 1000, atol=1e-8)


@QUIET
@given(SEEDS, st.tuples(*[st.floats(0.8, 3.0)] * 3))
def test_resample_keeps_every_voxel_where_it_lies_in_the_patient(seed, spacing):
    grid = a_grid(seed, (16, 18, 17))
    after = Resample(spacing_mm=spacing).apply(one(places(grid), grid, "x", "y", "z"))
    here = places(after.geometry)
    at = grid.to_voxel(np.moveaxis(here, 0, -1))
    inner = ((at >= 5) & (at <= np.array(grid.shape) - 6)).all(axis=-1)  # a spline feels the edge for some voxels
    np.testing.assert_allclose(after.voxels[:, inner], here[:, inner], atol=0.02)


@QUIET
@given(SEEDS, st.floats(0.7, 3.0))
def test_resample_gives_voxels_of_the_size_it_was_told_to_within_a_rounded_voxel(seed, spacing):
    grid = a_grid(seed, (16, 18, 17))
    after = Resample(spacing_mm=(spacing,) * 3).apply(one(np.ones((1, 16, 18, 17)), grid, "mr")).geometry
    off = np.abs(np.array(after.spacing) / spacing - 1) * np.array(after.shape)
    assert (off <= 0.5 + 1e-6).all() or min(after.shape) == 1


def test_resample_never_leaves_an_axis_without_a_voxel():
    scan = one(np.ones((1, 8, 8, 1), np.float32), Geometry(shape=(8, 8, 1), affine=np.eye(4)), "mr")
    prepared, trail = prepare(scan, [Resample(spacing_mm=(1.0, 1.0, 50.0))])
    assert prepared.geometry.shape == (8, 8, 1)
    assert trail.undo(prepared).geometry.shape == (8, 8, 1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_smooth_field_comes_back_through_resampling(seed):
    grid = a_grid(seed, (20, 22, 24))
    middle = grid.to_world(np.array(grid.shape) / 2)
    waves = np.cos((np.moveaxis(places(grid), 0, -1) - middle) / [25, 30, 35]).prod(axis=-1)[None].astype(np.float32)
    prepared, trail = prepare(
        one(waves, grid, "mr"), [Orient(), Resample(spacing_mm=(1.9, 2.1, 2.0)), Pad(shape=(30,) * 3)]
    )
    back = trail.undo(prepared)
    assert same_grid(back.geometry, grid)
    assert np.abs(back.voxels - waves)[:, 3:-3, 3:-3, 3:-3].max() < 0.03


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_labels_come_back_through_resampling(seed):
    case = phantom(seed)
    assert case.labels is not None
    prepared, trail = prepare(case.image, [Orient(), Resample(spacing_mm=(2.0, 2.0, 2.0)), Pad(shape=(64, 32, 40))])
    followed = trail.follow(case.labels)
    assert same_grid(followed.geometry, prepared.geometry)
    values = np.unique(case.labels.voxels)
    shares = (followed.voxels == values[:, None, None, None]).astype(np.float32)
    back = trail.undo(one(shares, followed.geometry, *(str(v) for v in values)))
    decided = values[back.voxels.argmax(axis=0)]
    assert same_grid(back.geometry, case.labels.geometry)
    for value in values:
        assert dice(decided == value, case.labels.voxels[0] == value) > 0.95, value


def test_what_was_cropped_away_comes_back_as_the_value_given():
    scan, _ = a_stripped_scan(a_grid(8))
    prepared, trail = prepare(scan, [Orient(), Crop(margin=0), Pad(shape=(20, 20, 20))])
    back = trail.undo(prepared.with_voxels(np.full_like(prepared.voxels, 3.0)), outside=-7.0)
    box = np.zeros((1, *scan.geometry.shape), bool)
    box[:, 2:-2, 1:-3, 2:-1] = True
    np.testing.assert_array_equal(back.voxels, np.where(box, 3.0, -7.0))


def test_crop_keeps_a_margin_and_stops_at_the_scan_s_edge():
    voxels = np.zeros((2, 9, 9, 9), np.float32)
    voxels[0, 1, 4, 4] = voxels[1, 2, 5, 4] = -1
    scan = one(voxels, Geometry(shape=(9, 9, 9), affine=np.eye(4)), "t1", "t2")
    cropped = Crop(margin=2).apply(scan)
    np.testing.assert_array_equal(cropped.voxels, voxels[:, 0:5, 2:8, 2:7])
    np.testing.assert_array_equal(cropped.geometry.affine[:3, 3], [0, 2, 2])


def test_crop_leaves_a_scan_of_zeros_whole():
    scan = one(np.zeros((1, 3, 4, 5)), a_grid(0, (3, 4, 5)), "mr")
    assert nonzero_box(scan, 0) is scan.geometry


@QUIET
@given(st.tuples(*[st.integers(1, 9)] * 3), st.tuples(*[st.integers(1, 9)] * 3))
def test_pad_grows_evenly_to_odd_and_even_sizes_and_never_shrinks(before, least):
    scan = one(np.ones((1, *before), np.float32), a_grid(4, before), "mr")
    padded = Pad(shape=least).apply(scan)
    assert padded.geometry.shape == tuple(np.maximum(before, least))
    assert padded.voxels.sum() == np.prod(before)
    for axis in range(3):
        filled = np.flatnonzero(padded.voxels[0].any(axis=tuple(a for a in range(3) if a != axis)))
        left, right = filled[0], padded.geometry.shape[axis] - 1 - filled[-1]
        assert 0 <= right - left <= 1
    back = Pad(shape=least).undo(padded, scan.geometry, 0)
    np.testing.assert_array_equal(back.voxels, scan.voxels)


def test_a_scan_measured_by_itself_gets_mean_0_and_deviation_1():
    rng = np.random.default_rng(0)
    scan = one(rng.normal(1e4, 30, (2, 9, 9, 9)).astype(np.float32), a_grid(1, (9, 9, 9)), "t1", "t2")
    after = Normalise(channels=(Scale(by="scan"),) * 2).apply(scan)
    assert after.voxels.dtype == np.float32
    np.testing.assert_allclose(after.voxels.mean(axis=(1, 2, 3)), 0, atol=1e-3)
    np.testing.assert_allclose(after.voxels.std(axis=(1, 2, 3)), 1, atol=1e-3)
    assert same_grid(after.geometry, scan.geometry)


def test_a_stripped_background_does_not_count_in_the_mean():
    scan, _ = a_stripped_scan(a_grid(2))
    after = Normalise(channels=(Scale(by="scan", nonzero=True),)).apply(scan).voxels[scan.voxels != 0]
    assert after.mean() == pytest.approx(0, abs=1e-5)
    assert after.std() == pytest.approx(1, abs=1e-5)


def test_hounsfield_units_are_clipped_and_scaled_by_the_dataset_s_numbers():
    voxels = np.array([-1000, -100, 40, 300, 3000], np.int16).reshape(1, 5, 1, 1)
    rule = Scale(by="dataset", low=-100, high=300, mean=40, deviation=20)
    after = Normalise(channels=(rule,)).apply(one(voxels, a_grid(0, (5, 1, 1)), "ct"))
    np.testing.assert_allclose(after.voxels.ravel(), [-7, -7, 0, 13, 13])


def test_what_was_stripped_stays_zero_and_a_dark_spot_inside_counts_as_seen():
    voxels = np.zeros((2, 12, 12, 12), np.float32)
    rng = np.random.default_rng(0)
    voxels[:, 3:9, 3:9, 3:9] = rng.uniform(50, 60, (2, 6, 6, 6))
    voxels[0, 5, 5, 5] = 0.0
    voxels[1, 6, 6, 6] = 0.0
    scan = one(voxels, a_grid(0, (12, 12, 12)), "a", "b")
    after = Normalise(channels=(Scale(by="scan", nonzero=True),) * 2).apply(scan).voxels
    inside = voxels[:, 3:9, 3:9, 3:9].reshape(2, -1).astype(np.float64)
    expected = (inside - inside.mean(axis=1, keepdims=True)) / inside.std(axis=1, keepdims=True)
    assert np.allclose(after[:, 3:9, 3:9, 3:9].reshape(2, -1), expected, atol=1e-4)
    assert not after[:, :3].any() and not after[..., 9:].any()


@pytest.mark.parametrize("nonzero", [False, True])
@pytest.mark.parametrize("value", [0.0, 0.1, -1024.0, 3e7])
def test_a_constant_channel_is_refused(value, nonzero):
    voxels = np.stack([np.random.default_rng(0).normal(size=(4, 4, 4)), np.full((4, 4, 4), value)]).astype(np.float32)
    with pytest.raises(ScanError, match="same value in every voxel"):
        Normalise(channels=(Scale(by="scan", nonzero=nonzero),) * 2).apply(one(voxels, a_grid(0, (4, 4, 4)), "a", "b"))


def test_no_step_changes_the_scan_it_was_given():
    case = phantom(1)
    before = case.image.voxels.copy()
    prepare(case.image, (Orient(), Crop(), Resample(spacing_mm=(3, 3, 3)), Normalise(channels=(Scale(by="scan"),) * 2)))
    np.testing.assert_array_equal(case.image.voxels, before)


def test_between_separate_slices_nothing_is_interpolated_on_the_way_and_on_the_way_back():
    grid = Geometry(shape=(12, 10, 4), affine=np.diag([1.0, 1, 6, 1]))
    scan = one(np.random.default_rng(0).normal(size=(1, 12, 10, 4)).astype(np.float32), grid, "mr")
    labels = one((scan.voxels > 0).astype(np.uint8), grid, "labels")
    step = Resample(spacing_mm=(1.5, 1.0, 2.0), separate=2)
    prepared, trail = prepare(scan, [step])
    followed = trail.follow(labels)
    assert prepared.geometry.shape == followed.geometry.shape == (8, 10, 12)
    for volume in (prepared, followed):
        np.testing.assert_array_equal(volume.voxels[..., ::3], volume.voxels[..., 1::3])
        np.testing.assert_array_equal(volume.voxels[..., ::3], volume.voxels[..., 2::3])
    back = trail.undo(prepared.with_voxels(prepared.voxels * np.arange(12)))
    other = trail.undo(prepared.with_voxels(prepared.voxels * (np.arange(12) // 3 * 3 + 1)))
    np.testing.assert_array_equal(back.voxels, other.voxels)  # the middle one of three


@pytest.mark.parametrize("axis", [-1, 3])
def test_an_axis_that_a_scan_has_not_is_refused(axis):
    with pytest.raises(ValueError, match="an axis, 0, 1 or 2"):
        Resample(spacing_mm=(1, 1, 1), separate=axis)


# as nnU-Net v2 has it


TURNS = ["".join(letters) for order in permutations(("RL", "AP", "SI")) for letters in product(*order)]


@pytest.mark.parametrize("to", TURNS)
def test_axes_are_turned_to_wherever_a_plan_says_and_back(to):
    scan, _ = a_stripped_scan(a_grid(3, tilt=0.2))
    turned, trail = prepare(scan, (Orient(to=to),))
    assert turned.geometry.orientation == to
    theirs = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(scan.geometry.affine), nibabel.orientations.axcodes2ornt(tuple(to))
    )
    np.testing.assert_array_equal(turned.voxels[0], apply_orientation(scan.voxels[0], theirs))
    back = trail.undo(turned)
    np.testing.assert_array_equal(back.voxels, scan.voxels)
    assert same_grid(back.geometry, scan.geometry)


@pytest.mark.parametrize("to", ["RAX", "RRS", "RA", "RASL"])
def test_an_orientation_that_is_none_is_refused(to):
    with pytest.raises(BadRecord, match="three letters are needed"):
        Orient(to=to)


@pytest.mark.parametrize(
    ("scan", "target", "there", "back"),
    [
        ((1, 1, 4), (1, 1, 1), 2, 2),  # the scan's slices are far apart
        ((1, 1, 1), (5, 1, 1), 0, 0),  # the target's are, and the scan says nothing
        ((4, 1, 1), (1, 1, 5), 0, 2),  # both are, and not along one axis: where one comes from decides
        ((1, 4, 4), (1, 1, 1), None, None),  # two axes as coarse as each other
        ((1, 1, 3), (1, 1, 1), None, None),  # no more than three times
    ],
)
def test_by_nnunets_rule_each_scan_says_along_which_axis_nothing_is_interpolated(scan, target, there, back):
    """The table is what determine_do_sep_z_and_axis of nnU-Net 2.8.1 answers for these pairs."""
    step = Resample(spacing_mm=target, rule="nnunet")
    grid = Geometry(shape=(8, 8, 8), affine=np.diag([*scan, 1.0]))
    assert (step.separate_there(grid), step.separate_back(grid)) == (there, back)
    together = Resample(spacing_mm=target, rule="nnunet_together")
    assert (together.separate_there(grid), together.separate_back(grid)) == (None, None)


def test_a_kept_axis_has_every_scans_own_slices():
    step = Resample(spacing_mm=(2.0, 1.0, 1.0), rule="nnunet", kept=(0,))
    grid = Geometry(shape=(5, 8, 6), affine=np.diag([7.0, 2.0, 0.5, 1.0]))
    assert step.shape_of(grid) == (5, 16, 3)
    assert step.target(grid) == (7.0, 1.0, 1.0)


def test_a_channel_may_be_stretched_between_its_lowest_and_highest():
    scan, _ = a_stripped_scan(a_grid(1))
    scan = scan.with_voxels(scan.voxels * 40 - 7)
    stretched = Normalise(channels=(Scale(by="range"),)).apply(scan).voxels
    low, high = scan.voxels.min(), scan.voxels.max()
    np.testing.assert_allclose(stretched, (scan.voxels - low) / (high - low), atol=1e-6)
