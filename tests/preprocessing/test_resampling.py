"""Resampling agrees with scipy where scipy and we mean the same, and keeps what must be kept where edges begin."""

import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from itertools import accumulate, permutations, product
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.transform import Rotation

from preprocessing import files
from preprocessing.resampling import (
    labels_onto,
    onto,
    resample,
    resample_labels,
    resample_within,
    resized,
    straightened,
)
from preprocessing.volume import LPS_TO_RAS, Geometry, Provenance, ScanError, Volume

QUIET = settings(derandomize=True, max_examples=40, deadline=None, database=None)
SIDES = st.tuples(*[st.integers(1, 14)] * 3)


def noise(shape: tuple[int, int, int], channels: int = 1) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=(channels, *shape)).astype(np.float32)


def by_scipy(voxels: np.ndarray, shape: tuple[int, int, int], order: int) -> np.ndarray:
    factors = np.array(shape) / np.array(voxels.shape)
    return ndimage.zoom(voxels.astype(np.float64), factors, order=order, mode="mirror", grid_mode=True)


def at_our_places(voxels: np.ndarray, shape: tuple[int, int, int], order: int) -> np.ndarray:
    """scipy asked for the very places where our voxels lie: beyond the outermost centres, on these."""
    ends = [(np.clip((np.arange(a) + 0.5) * b / a - 0.5, 0, b - 1)) for b, a in zip(voxels.shape, shape, strict=True)]
    return ndimage.map_coordinates(voxels.astype(float), np.meshgrid(*ends, indexing="ij"), order=order, mode="mirror")


def stored(voxels: np.ndarray, axes: Sequence[int], signs: Sequence[int]) -> np.ndarray:
    """The same channels, lying in memory with their axes in another order and direction."""
    turn = (slice(None), *[slice(None, None, sign) for sign in signs])
    order = [0, *[axis + 1 for axis in axes]]
    there = np.ascontiguousarray(voxels[turn].transpose(order)).transpose(np.argsort(order))[turn]
    there.flags.writeable = False
    return there


def inside_the_outermost_centres(before: tuple[int, int, int], after: tuple[int, int, int]) -> np.ndarray:
    places = [(np.arange(a) + 0.5) * b / a - 0.5 for b, a in zip(before, after, strict=True)]
    within = [(place >= 0) & (place <= b - 1) for place, b in zip(places, before, strict=True)]
    return np.ix_(*within)


@pytest.mark.parametrize("order", [1, 3])
@QUIET
@given(before=SIDES, after=SIDES)
def test_between_the_outermost_voxel_centres_scipy_gives_the_same(order, before, after):
    voxels = noise(before)
    here = inside_the_outermost_centres(before, after)
    ours = resample(voxels, after, order=order)[0]
    assert ours.shape == after
    np.testing.assert_allclose(ours[here], by_scipy(voxels[0], after, order)[here], atol=2e-5)


@pytest.mark.parametrize("order", [1, 3])
def test_beyond_the_outermost_centres_the_edge_repeats(order):
    voxels = noise((5, 5, 5))
    finer = resample(voxels, (50, 5, 5), order=order)
    np.testing.assert_allclose(finer[:, :5], np.repeat(voxels[:, :1], 5, axis=1), atol=1e-5)
    np.testing.assert_allclose(finer[:, -5:], np.repeat(voxels[:, -1:], 5, axis=1), atol=1e-5)


@QUIET
@given(before=SIDES, after=SIDES, order=st.sampled_from([1, 3]))
def test_a_constant_stays_constant(before, after, order):
    np.testing.assert_allclose(resample(np.full((1, *before), 7.5), after, order=order), 7.5, atol=1e-4)


@QUIET
@given(before=SIDES, after=SIDES)
def test_linear_keeps_probabilities_between_0_and_1_and_summing_to_1(before, after):
    rng = np.random.default_rng(0)
    probabilities = np.moveaxis(rng.dirichlet(np.ones(3), size=before), -1, 0)
    there = resample(probabilities, after, order=1)
    np.testing.assert_allclose(there.sum(axis=0), 1, atol=1e-5)
    assert there.min() >= 0
    assert there.max() <= 1 + 1e-6


@QUIET
@given(SIDES)
def test_the_same_shape_gives_the_same_voxels(shape):
    voxels = noise(shape, channels=2)
    np.testing.assert_array_equal(resample(voxels, shape, order=3), voxels)


@QUIET
@given(
    before=st.tuples(*[st.integers(1, 45)] * 3),
    after=st.tuples(*[st.integers(1, 60)] * 3),
    axes=st.permutations(range(3)),
    signs=st.tuples(*[st.sampled_from([1, -1])] * 3),
    kind=st.sampled_from(["int16", "float32", "float64", "uint8"]),
)
def test_hounsfield_units_are_those_of_scipy_to_a_hundredth_however_the_scan_lies_in_memory(
    before, after, axes, signs, kind
):
    scan = np.random.default_rng(sum(before)).uniform(*((0, 255) if kind == "uint8" else (-1024, 3071)), size=before)
    scan = scan.astype(kind)
    there = resample(stored(scan[None], axes, signs), after, order=3)
    assert there.dtype == np.float32 and there.flags.c_contiguous
    np.testing.assert_allclose(there[0], at_our_places(scan, after, 3), atol=0.01)


@QUIET
@given(before=SIDES, after=SIDES, separate=st.integers(0, 2), order=st.sampled_from([1, 3]))
def test_along_a_separate_axis_the_nearest_slice_is_taken_as_scipy_takes_it(before, after, separate, order):
    scan = noise(before)[0]
    within = tuple(b if axis == separate else a for axis, (b, a) in enumerate(zip(before, after, strict=True)))
    places = (np.arange(after[separate]) + 0.5) * before[separate] / after[separate] - 0.5
    nearest = ndimage.map_coordinates(np.arange(before[separate]), [places + 1e-9], order=0, mode="nearest")
    wanted = at_our_places(scan, within, order).take(nearest, axis=separate)
    np.testing.assert_allclose(resample(scan[None], after, order=order, separate=separate)[0], wanted, atol=2e-5)


@pytest.mark.parametrize("after", [(40, 33, 70), (90, 21, 50)])
def test_no_bit_depends_on_the_number_of_threads(after):
    scan = noise((75, 60, 48), channels=2)
    labels = (20 * ndimage.gaussian_filter(scan[:1], (0, 2, 2, 2))).round().clip(0).astype(np.int16)
    told, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append((resample(scan, after, order=3).tobytes(), resample_labels(labels, after).tobytes()))
    finally:
        torch.set_num_threads(told)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0)])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, 1)])
@pytest.mark.parametrize("kind", ["float32", "float64", "int16"])
def test_beside_the_result_memory_holds_a_slab(axes, signs, kind):
    scan = stored(np.zeros((1, 200, 200, 90), kind), axes, signs)
    resample(scan, (110, 110, 180), order=3)  # matrices are kept
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        there, peak = with_peak(lambda: resample(scan, (110, 110, 180), order=3))
    sizes = [event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert sizes
    assert peak + max(accumulate(sizes)) < there.nbytes + 0.25 * scan.size * 4


@pytest.mark.parametrize("kind", [">i2", ">f4", "longdouble", "uint16", "float16", "bool"])
def test_numbers_of_any_type_are_resampled_as_what_they_are(kind):
    scan = (1000 * noise((7, 5, 6))).astype(kind)
    wanted = resample(scan.astype(np.float64), (10, 4, 9), order=3)
    np.testing.assert_allclose(resample(scan, (10, 4, 9), order=3), wanted, atol=0.01)


def test_channels_back_to_front_and_no_channels_at_all_are_channels_too():
    voxels = noise((6, 7, 5), channels=3)
    there = resample(voxels, (9, 4, 8), order=3)
    for other in (voxels, voxels.transpose(1, 2, 3, 0).copy().transpose(3, 0, 1, 2)):
        np.testing.assert_allclose(resample(other[::-1], (9, 4, 8), order=3), there[::-1], atol=1e-5)
    assert resample(voxels[:0], (9, 4, 8), order=3).shape == (0, 9, 4, 8)


def test_torch_is_loaded_when_a_scan_is_resampled_and_not_before():
    program = (
        "import sys, numpy as np, preprocessing.steps, preprocessing.resampling as resampling\n"
        "assert 'torch' not in sys.modules\n"
        "resampling.resample(np.zeros((1, 3, 3, 3), np.float32), (3, 3, 3), order=3)\n"
        "assert 'torch' not in sys.modules\n"
        "resampling.resample(np.zeros((1, 3, 3, 3), np.float32), (4, 3, 3), order=3)\n"
        "assert 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


def with_peak(work: Callable[[], np.ndarray]) -> tuple[np.ndarray, int]:
    """What it gives, and the most bytes it held on one thread."""
    told = torch.get_num_threads()
    torch.set_num_threads(1)
    tracemalloc.start()
    try:
        return work(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        torch.set_num_threads(told)


def test_channels_do_not_mix():
    voxels = noise((6, 7, 5), channels=3)
    together = resample(voxels, (9, 4, 8), order=3)
    for channel in range(3):
        np.testing.assert_allclose(
            together[channel], resample(voxels[channel : channel + 1], (9, 4, 8), order=3)[0], atol=1e-6
        )


def test_a_mirrored_scan_is_resampled_to_the_mirrored_result():
    voxels = noise((7, 5, 6))
    there = resample(voxels, (10, 4, 9), order=3)
    np.testing.assert_allclose(
        resample(voxels[:, ::-1, :, ::-1], (10, 4, 9), order=3), there[:, ::-1, :, ::-1], atol=1e-5
    )


@QUIET
@given(SIDES, SIDES)
def test_another_number_of_voxels_fills_the_same_box(before, after):
    affine = np.array([[0, -2.0, 0.3, 5], [1.5, 0, 0, -4], [0, 0.2, 3, 9], [0, 0, 0, 1]])
    one = Geometry(shape=before, affine=affine)
    other = resized(one, after)
    np.testing.assert_allclose(one.to_world([-0.5] * 3), other.to_world([-0.5] * 3), atol=1e-9)
    np.testing.assert_allclose(one.to_world(np.array(before) - 0.5), other.to_world(np.array(after) - 0.5), atol=1e-9)


@QUIET
@given(before=SIDES, after=SIDES, seed=st.integers(0, 99))
def test_labels_gain_no_value_that_was_not_there(before, after, seed):
    labels = np.random.default_rng(seed).choice([0, 3, 700], size=(1, *before)).astype(np.uint16)
    there = resample_labels(labels, after)
    assert there.dtype == np.uint16
    assert there.shape == (1, *after)
    assert set(np.unique(there)) <= set(np.unique(labels))


def test_labels_put_on_a_grid_three_times_as_fine_keep_the_value_of_every_old_centre():
    labels = np.random.default_rng(1).integers(0, 4, (1, 6, 5, 7)).astype(np.uint8)
    finer = resample_labels(labels, (18, 15, 21))
    np.testing.assert_array_equal(finer[:, 1::3, 1::3, 1::3], labels)


def test_a_tie_between_labels_goes_to_the_lower_one_whatever_the_order_of_slices():
    labels = np.array([1, 2], np.uint8).reshape(1, 2, 1, 1)
    assert resample_labels(labels, (1, 1, 1)).item() == 1
    assert resample_labels(labels[:, ::-1], (1, 1, 1)).item() == 1


def one_label_at_a_time(labels: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """scipy's linear share of each label; the greatest wins, of equals the lowest."""
    values = np.unique(labels)
    shares = np.stack([at_our_places(labels == value, shape, 1) for value in values])
    return values[np.argmax(shares >= shares.max(axis=0) - 1e-6, axis=0)]


def lost_objects(labels: np.ndarray, there: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Each object none of whose voxels a voxel of its label sees: its label, and where its centre lies."""
    lost = []
    for value in np.unique(labels[labels != 0]):
        numbers, found = ndimage.label(labels == value, np.ones((3, 3, 3)))
        for number in range(1, found + 1):
            if not (at_our_places(numbers == number, there.shape, 1)[there == value] > 1e-6).any():
                centre = (np.argwhere(numbers == number).mean(axis=0) + 0.5) / labels.shape * there.shape - 0.5
                lost.append((int(value), centre))
    return lost


@QUIET
@given(
    before=st.tuples(*[st.integers(1, 9)] * 3),
    after=st.tuples(*[st.integers(1, 9)] * 3),
    seed=st.integers(0, 2**31),
    empty=st.floats(0, 0.9),
    axes=st.permutations(range(3)),
    signs=st.tuples(*[st.sampled_from([1, -1])] * 3),
)
def test_labels_are_scipy_s_one_by_one_and_no_object_or_label_is_lost_while_there_is_room(
    before, after, seed, empty, axes, signs
):
    odds = [empty, *[(1 - empty) / 4] * 4]
    labels = np.random.default_rng(seed).choice([0, 3, 4, 9, 700], size=(1, *before), p=odds).astype(np.int32)
    there = resample_labels(stored(labels, axes, signs), after)[0]
    wanted = one_label_at_a_time(labels[0], after)
    lost = lost_objects(labels[0], wanted)
    assert (there != wanted).sum() <= len(lost)
    np.testing.assert_array_equal(there, resample_labels(labels, after)[0])
    assert set(np.unique(wanted[wanted > 0])) <= set(np.unique(there))
    if (wanted == 0).sum() >= len(lost):
        assert set(np.unique(labels[labels > 0])) <= set(np.unique(there))


@QUIET
@given(
    at=st.tuples(*[st.integers(0, 23)] * 3),
    after=st.tuples(*[st.integers(3, 24)] * 3),
    around=st.sampled_from([0, 1]),
)
def test_a_lesion_of_one_voxel_survives_where_it_was(at, after, around):
    labels = np.full((1, 24, 24, 24), around, np.uint8)
    labels[(0, *at)] = 2
    there = np.argwhere(resample_labels(labels, after)[0] == 2)
    place = (np.array(at) + 0.5) / 24 * after - 0.5
    assert len(there)
    assert np.abs(there - place).max() <= 1


def test_two_lesions_that_fall_on_one_voxel_both_survive():
    labels = np.zeros((1, 24, 24, 24), np.uint8)
    labels[0, 9, 9, 9], labels[0, 11, 11, 11] = 1, 2
    there = resample_labels(labels, (4, 4, 4))
    assert (there == 1).sum() == (there == 2).sum() == 1


def test_a_lesion_takes_no_other_lesion_s_last_voxel_even_where_that_leaves_no_room():
    labels = np.array([[[[1, 1, 1, 2, 3, 3, 3, 3]]]], np.uint8)
    there = resample_labels(labels, (1, 1, 2))
    assert there.ravel().tolist() == [1, 3]


def a_ball(shape: tuple[int, int, int], radius: float, centre: np.ndarray) -> np.ndarray:
    """In a cube of side 1."""
    axes = np.meshgrid(*[(np.arange(n) + 0.5) / n for n in shape], indexing="ij")
    away = sum((axis - middle) ** 2 for axis, middle in zip(axes, centre, strict=True))
    return (away < radius**2)[None].astype(np.uint8)


@QUIET
@given(
    before=st.tuples(*[st.integers(24, 50)] * 3),
    after=st.tuples(*[st.integers(24, 50)] * 3),
    radius=st.floats(0.25, 0.4),
    seed=st.integers(0, 99),
)
def test_a_ball_keeps_its_volume_at_any_spacing(before, after, radius, seed):
    ball = a_ball(before, radius, np.random.default_rng(seed).uniform(0.45, 0.55, 3))
    assert resample_labels(ball, after).mean() == pytest.approx(ball.mean(), rel=0.03)


def test_a_finer_grid_rounds_the_steps_of_a_ball_nearly_as_well_as_itk_s_gaussian_which_loses_lesions():
    ball, truth = a_ball((20, 20, 20), 0.37, np.full(3, 0.5)), a_ball((80, 80, 80), 0.37, np.full(3, 0.5))
    grid = Geometry(shape=(20, 20, 20), affine=np.diag([4.0, 4, 4, 1]))
    by_gaussian = by_itk(ball[0], grid, resized(grid, (80, 80, 80)), SimpleITK.sitkLabelGaussian, 0)
    ours = (resample_labels(ball, (80, 80, 80)) != truth).sum()
    assert ours < 0.7 * (ball.repeat(4, 1).repeat(4, 2).repeat(4, 3) != truth).sum()
    assert ours < 1.25 * (by_gaussian != truth[0]).sum()


def test_memory_for_labels_does_not_grow_with_their_number():
    blocks = np.arange(8 * 8 * 5).reshape(8, 8, 5) + 1
    few, many = (
        labels.repeat(20, 0).repeat(20, 1).repeat(20, 2)[None].astype(np.uint16)
        for labels in (1 + np.indices(blocks.shape).sum(axis=0) % 2, blocks)
    )
    peaks = [with_peak(lambda labels=labels: resample_labels(labels, (90, 90, 150)))[1] for labels in (few, many)]
    assert peaks[1] < 1.1 * peaks[0]


def test_an_order_nobody_wrote_is_refused():
    with pytest.raises(ValueError, match="order 2"):
        resample(noise((4, 4, 4)), (5, 5, 5), order=2)


# onto any other grid in the patient


def an_oblique_grid(seed: int, shape: tuple[int, int, int] = (12, 10, 9)) -> Geometry:
    """About the same 50 mm of a patient, whatever the seed."""
    rng = np.random.default_rng(seed)
    turn = Rotation.random(random_state=seed).as_matrix()[:, rng.permutation(3)] * rng.choice([-1, 1], 3)
    affine = np.eye(4)
    affine[:3, :3] = turn * rng.uniform(3, 6, 3)
    affine[:3, 3] = rng.uniform(-5, 5, 3) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Geometry(shape=shape, affine=affine)


def a_scan_on(grid: Geometry, channels: int = 1, kind: str = "float32") -> Volume:
    voxels = np.random.default_rng(3).integers(-90, 900, (channels, *grid.shape)).astype(kind)
    return Volume(voxels=voxels, geometry=grid, channels=tuple(f"c{n}" for n in range(channels)))


def by_itk(voxels: np.ndarray, before: Geometry, after: Geometry, interpolator: int, outside: float) -> np.ndarray:
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(voxels.transpose(2, 1, 0)))
    filled = SimpleITK.ResampleImageFilter()
    for grid, target in ((before, image), (after, filled)):
        lps = LPS_TO_RAS @ grid.affine
        direction, origin = (lps[:3, :3] / grid.spacing).ravel().tolist(), lps[:3, 3].tolist()
        if target is image:
            image.SetDirection(direction)
            image.SetSpacing(grid.spacing)
            image.SetOrigin(origin)
        else:
            filled.SetOutputDirection(direction)
            filled.SetOutputSpacing(grid.spacing)
            filled.SetOutputOrigin(origin)
    filled.SetSize([int(n) for n in after.shape])
    filled.SetInterpolator(interpolator)
    filled.SetDefaultPixelValue(outside)
    return SimpleITK.GetArrayFromImage(filled.Execute(image)).transpose(2, 1, 0)


@QUIET
@given(st.integers(0, 2**31), st.integers(0, 2**31))
def test_onto_any_oblique_grid_itk_gives_the_same(one: int, other: int) -> None:
    scan, grid = a_scan_on(an_oblique_grid(one)), an_oblique_grid(other, (9, 14, 7))
    there, outside = onto(scan, grid)
    lowest = float(scan.voxels.min())
    wanted = by_itk(scan.voxels[0], scan.geometry, grid, SimpleITK.sitkLinear, lowest - 1000)
    missed = wanted < lowest - 500
    np.testing.assert_allclose(there.voxels[0], np.where(missed, lowest, wanted), atol=2e-2)
    assert outside == pytest.approx(missed.mean())
    assert there.geometry is grid and there.voxels.dtype == np.float32


def test_a_real_scan_lands_on_the_grid_of_an_earlier_study_where_itk_puts_it(shared: Path) -> None:
    """Two oblique scans of one patient, five months apart."""
    patient = shared / "data" / "brain-tumor-progression" / "PGBM-001"
    earlier, later = (next(patient.glob(f"{month}-*/*T2reg*"), None) for month in ("11", "04"))
    if earlier is None or later is None:
        pytest.skip("the two studies of PGBM-001 are not there")
    scan, grid = files.read(later), files.read(earlier).geometry
    there, outside = onto(scan, grid)
    lowest = float(scan.voxels.min())
    wanted = by_itk(scan.voxels[0].astype(np.float32), scan.geometry, grid, SimpleITK.sitkLinear, lowest)
    np.testing.assert_allclose(there.voxels[0], wanted, atol=1e-2)
    assert 0 < outside < 0.2


@QUIET
@given(st.integers(0, 2**31), st.integers(0, 2**31))
def test_labels_take_the_nearest_voxel_as_in_itk_and_0_outside(one: int, other: int) -> None:
    assume(one != other)  # centres halfway between others are nobody's
    before, after = an_oblique_grid(one), an_oblique_grid(other, (9, 14, 7))
    voxels = np.random.default_rng(one).choice([1, 3, 700], size=(1, *before.shape)).astype(np.uint16)
    labels = Volume(voxels=voxels, geometry=before, channels=("labels",))
    there, outside = labels_onto(labels, after)
    wanted = by_itk(voxels[0], before, after, SimpleITK.sitkNearestNeighbor, 0)
    assert there.voxels.dtype == np.uint16 and set(np.unique(there.voxels)) <= {0, 1, 3, 700}
    assert (there.voxels[0] == wanted).mean() > 0.999
    assert outside == pytest.approx((wanted == 0).mean(), abs=2e-3)


@pytest.mark.parametrize(("order", "signs"), list(product(permutations(range(3)), product((1, -1), repeat=3))))
def test_voxels_that_only_change_their_order_keep_their_very_values(
    order: tuple[int, ...], signs: tuple[int, ...]
) -> None:
    scan = a_scan_on(an_oblique_grid(5, (4, 6, 5)), channels=2, kind="int32")
    scan = scan.with_voxels(scan.voxels + 2**24 + 1)  # more than float32 holds
    turned = scan.voxels.transpose(0, *[1 + axis for axis in order])
    affine = np.eye(4)
    affine[:3, :3] = scan.geometry.affine[:3, order] * signs
    corner = [0 if sign > 0 else scan.geometry.shape[axis] - 1 for axis, sign in zip(order, signs, strict=True)]
    affine[:3, 3] = scan.geometry.to_world(np.array([corner[order.index(axis)] for axis in range(3)]))
    for axis, sign in enumerate(signs):
        turned = turned if sign > 0 else np.flip(turned, 1 + axis)
    there, outside = onto(scan, Geometry(shape=turned.shape[1:], affine=affine))
    np.testing.assert_array_equal(there.voxels, turned)
    assert outside == 0 and there.voxels.dtype == np.int32


def test_a_part_of_a_grid_keeps_its_values_and_the_rest_gets_the_lowest_of_each_channel() -> None:
    scan = a_scan_on(an_oblique_grid(2), channels=2, kind="int16")
    affine = scan.geometry.affine.copy()
    affine[:3, 3] = scan.geometry.to_world([6, 0, 0])
    there, outside = onto(scan, Geometry(shape=scan.geometry.shape, affine=affine))
    np.testing.assert_array_equal(there.voxels[:, :6], scan.voxels[:, 6:])
    for channel, was in zip(there.voxels, scan.voxels, strict=True):
        assert (channel[6:] == was.min()).all()
    assert outside == 0.5


def test_a_grid_elsewhere_is_outside_altogether() -> None:
    scan = a_scan_on(an_oblique_grid(2))
    affine = scan.geometry.affine.copy()
    affine[:3, 3] += 1000
    there, outside = onto(scan, Geometry(shape=(3, 4, 5), affine=affine))
    assert outside == 1 and (there.voxels == scan.voxels.min()).all()


def test_a_slice_of_another_grid_is_no_longer_a_frame_of_a_file() -> None:
    scan = a_scan_on(an_oblique_grid(2))
    told = Provenance(files=("a.dcm",), slices=(("a.dcm", 1),) * 9, modality="CT")
    scan = Volume(voxels=scan.voxels, geometry=scan.geometry, channels=scan.channels, provenance=told)
    there = onto(scan, an_oblique_grid(3))[0].provenance
    assert there.slices == () and there.modality == "CT" and there.files == ("a.dcm",)


def test_an_order_that_needs_more_than_neighbours_is_refused() -> None:
    with pytest.raises(ValueError, match="order 3"):
        onto(a_scan_on(an_oblique_grid(2)), an_oblique_grid(3), order=3)


@QUIET
@given(st.integers(0, 2**31), st.floats(-0.6, 0.6), st.permutations(range(3)))
def test_of_a_tilted_stack_the_slices_stay_and_everything_is_inside(seed: int, tilt: float, order: list[int]) -> None:
    turn, (one, other, third) = Rotation.random(random_state=seed).as_matrix(), order
    affine, spacing, shape = np.eye(4), np.empty(3), np.empty(3, int)
    spacing[order], shape[order] = (0.7, 0.9, 5), (8, 9, 6)
    affine[:3, :3] = turn * spacing
    straight = Geometry(shape=(int(shape[0]), int(shape[1]), int(shape[2])), affine=affine)
    affine[:3, third] += float(tilt) * 5 * turn[:, other]
    sheared = Geometry(shape=straight.shape, affine=affine)
    grid = straightened(sheared)
    assert not grid.is_sheared
    np.testing.assert_allclose(grid.spacing, straight.spacing, rtol=1e-6)  # slices were moved within their planes
    np.testing.assert_allclose(grid.direction, straight.direction, atol=1e-6)
    assert grid.shape[third] == 6 and grid.shape[one] == 8
    places = grid.to_voxel(sheared.corners_mm)
    assert (places > -0.01).all() and (places < np.array(grid.shape) - 0.99).all()
    np.testing.assert_allclose(places[:, third], np.round(places[:, third]), atol=1e-6)


@pytest.mark.parametrize("shear", [30.0, 1e5])
def test_a_grid_sheared_beyond_measure_is_not_straightened(shear: float) -> None:
    affine = np.eye(4)
    affine[0, 2] = shear
    with pytest.raises(ScanError, match="so flatly") as refusal:
        straightened(Geometry(shape=(8, 9, 7), affine=affine))
    assert refusal.value.reason == "tilted"


def test_a_grid_sheared_along_every_axis_is_straightened_too() -> None:
    affine = np.array([[2, 0.7, 0.5, 1], [0.2, 3, 0.4, 2], [0.1, 0.3, 4, 3], [0, 0, 0, 1]])
    sheared = Geometry(shape=(8, 9, 7), affine=affine)
    grid = straightened(sheared)
    assert not grid.is_sheared and grid.orientation == sheared.orientation
    assert grid.voxel_ml == pytest.approx(sheared.voxel_ml)
    places = grid.to_voxel(sheared.corners_mm)
    assert (places > -0.01).all() and (places < np.array(grid.shape) - 0.99).all()


# as nnU-Net v2 has it from scikit-image: scipy's zoom with 'nearest', cut to the range it came from


def by_nnunet(voxels: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    factors = np.array(shape) / np.array(voxels.shape)
    there = ndimage.zoom(voxels.astype(np.float64), factors, order=3, mode="nearest", grid_mode=True)
    return np.clip(there, voxels.min(), voxels.max())


@QUIET
@given(before=SIDES, after=SIDES)
def test_within_its_range_and_beyond_its_ends_the_scan_is_scipys_with_nearest(before, after):
    assume(before != after)
    voxels = 50 * noise(before, channels=2)
    there = resample_within(voxels, after, order=3)
    for ours, theirs in zip(there, voxels, strict=True):
        np.testing.assert_allclose(ours, by_nnunet(theirs, after), atol=2e-3)


@QUIET
@given(before=SIDES, after=SIDES, separate=st.integers(0, 2))
def test_within_its_range_slices_far_apart_are_cut_each_by_itself(before, after, separate):
    assume(before != after)
    voxels = 50 * noise(before)
    there = np.moveaxis(resample_within(voxels, after, order=3, separate=separate)[0], separate, 0)
    slices = np.moveaxis(voxels[0], separate, 0)
    flat = [side for axis, side in enumerate(after) if axis != separate]
    places = (np.arange(after[separate]) + 0.5) * before[separate] / after[separate]
    for ours, place in zip(there, places, strict=True):
        np.testing.assert_allclose(ours, by_nnunet(slices[min(int(place + 1e-6), len(slices) - 1)], flat), atol=2e-3)


def test_mirrored_ends_are_something_else():
    voxels = noise((6, 6, 6))
    assert np.abs(resample_within(voxels, (11, 11, 11), order=3) - resample(voxels, (11, 11, 11), order=3)).max() > 0.05
