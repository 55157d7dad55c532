"""A volume says where its voxels lie as nibabel says it, refuses grids that place nothing, and cannot be changed."""

import pickle
from dataclasses import replace
from itertools import permutations, product

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import apply_orientation, inv_ornt_aff
from scipy.spatial.transform import Rotation

from preprocessing.volume import (
    CORNER_TOLERANCE_MM,
    Case,
    Geometry,
    GeometryMismatch,
    MissingChannel,
    Provenance,
    ScanError,
    Volume,
    stack,
)

SHAPE = (4, 5, 3)
ORDERS = [(order, signs) for order in permutations(range(3)) for signs in product((1, -1), repeat=3)]
QUIET = settings(derandomize=True, max_examples=40, deadline=None, database=None)
SEEDS = st.integers(0, 2**32 - 1)


def a_tilted_affine(seed: int, tilt: float = 0.6) -> np.ndarray:
    """Any axis order and direction, tilted by less than 45 degrees so that the nearest axis is never in doubt."""
    rng = np.random.default_rng(seed)
    axis = rng.normal(size=3)
    turn = Rotation.from_rotvec(axis / np.linalg.norm(axis) * rng.uniform(-tilt, tilt)).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = (turn * rng.choice([-1, 1], 3))[:, rng.permutation(3)] * rng.uniform(0.3, 6, 3)
    affine[:3, 3] = rng.uniform(-300, 300, 3)
    return affine


def a_volume(affine: np.ndarray | None = None, shape: tuple[int, int, int] = SHAPE, channels: int = 1) -> Volume:
    voxels = np.random.default_rng(7).normal(size=(channels, *shape)).astype(np.float32)
    grid = Geometry(shape=shape, affine=np.eye(4) if affine is None else affine)
    return Volume(voxels=voxels, geometry=grid, channels=tuple(f"c{n}" for n in range(channels)))


def shifted(mm: float, axis: int = 0) -> np.ndarray:
    affine = np.eye(4)
    affine[axis, 3] = mm
    return affine


@pytest.mark.parametrize(("order", "signs"), ORDERS)
def test_the_orientation_of_every_axis_order_is_what_nibabel_calls_it(order, signs):
    affine = np.diag([1.0, 2.0, 3.0, 1.0]) @ inv_ornt_aff(np.column_stack([order, signs]), SHAPE)
    assert Geometry(shape=SHAPE, affine=affine).orientation == "".join(nibabel.aff2axcodes(affine))
    assert not Geometry(shape=SHAPE, affine=affine).is_oblique


@QUIET
@given(SEEDS)
def test_spacing_orientation_and_places_of_a_tilted_grid_are_what_nibabel_says(seed):
    affine = a_tilted_affine(seed)
    grid = Geometry(shape=SHAPE, affine=affine)
    assert grid.orientation == "".join(nibabel.aff2axcodes(affine))
    np.testing.assert_allclose(grid.spacing, nibabel.affines.voxel_sizes(affine))
    indices = np.random.default_rng(seed).uniform(-5, 10, (2, 4, 3))
    np.testing.assert_allclose(grid.to_world(indices), nibabel.affines.apply_affine(affine, indices), atol=1e-9)
    np.testing.assert_allclose(grid.to_voxel(grid.to_world(indices)), indices, atol=1e-7)
    np.testing.assert_allclose(grid.direction.T @ grid.direction, np.eye(3), atol=1e-9)


@QUIET
@given(SEEDS)
def test_no_voxel_axis_is_matched_twice_however_oblique_the_grid(seed):
    turn = Rotation.random(random_state=seed).as_matrix()
    order = Geometry(shape=SHAPE, affine=nibabel.affines.from_matvec(turn, np.zeros(3))).axis_order()
    assert [world for world, _, _ in order] == [0, 1, 2]
    assert sorted(axis for _, axis, _ in order) == [0, 1, 2]


def test_a_tie_between_axes_is_still_a_one_to_one_match():
    diagonal = Rotation.from_euler("z", 45, degrees=True).as_matrix()
    grid = Geometry(shape=SHAPE, affine=nibabel.affines.from_matvec(diagonal, np.zeros(3)))
    assert sorted(axis for _, axis, _ in grid.axis_order()) == [0, 1, 2]
    assert grid.is_oblique


def test_a_shear_is_told_from_a_tilt():
    sheared = np.eye(4)
    sheared[0, 2] = 0.3
    assert Geometry(shape=SHAPE, affine=sheared).is_sheared
    assert not Geometry(shape=SHAPE, affine=a_tilted_affine(3)).is_sheared


def test_voxels_of_2_by_3_by_5_mm_hold_30_microlitres():
    assert Geometry(shape=SHAPE, affine=np.diag([-2.0, 3.0, 5.0, 1.0])).voxel_ml == pytest.approx(0.030)


@pytest.mark.parametrize(
    "affine",
    [
        np.diag([1.0, 1.0, 0.0, 1.0]),
        np.full((4, 4), np.nan),
        np.diag([1.0, np.inf, 1.0, 1.0]),
        np.array([[1.0, 2, 0, 0], [1, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
        np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]),
        np.diag([1.0, 1.0, 1.0, 2.0]),
    ],
    ids=["flat", "nan", "infinite", "parallel axes", "projective", "scaled last row"],
)
def test_an_affine_that_places_nothing_is_refused(affine):
    with pytest.raises(ScanError, match=r"affine"):
        Geometry(shape=SHAPE, affine=affine)


def test_a_grid_without_voxels_is_refused():
    with pytest.raises(ScanError, match="at least one voxel"):
        Geometry(shape=(4, 0, 3), affine=np.eye(4))


def test_a_volume_is_read_only_and_the_array_it_came_from_stays_writable():
    voxels = np.zeros((1, *SHAPE), np.float32)
    affine = np.eye(4)
    volume = Volume(voxels=voxels, geometry=Geometry(shape=SHAPE, affine=affine), channels=("ct",))
    with pytest.raises(ValueError, match="read-only"):
        volume.voxels[0, 0, 0, 0] = 1
    with pytest.raises(ValueError, match="read-only"):
        volume.geometry.affine[0, 0] = 2
    voxels[0, 0, 0, 0] = 1
    affine[0, 0] = 9
    assert volume.geometry.spacing == (1, 1, 1)


@pytest.mark.parametrize(("mm", "same"), [(0.0, True), (0.9 * CORNER_TOLERANCE_MM, True), (0.02, False), (1.0, False)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_two_grids_match_when_every_corner_is_within_a_hundredth_of_a_millimetre(mm, same, axis):
    one, other = Geometry(shape=SHAPE, affine=np.eye(4)), Geometry(shape=SHAPE, affine=shifted(mm, axis))
    assert one.matches(other) is same
    assert other.matches(one) is same


def test_a_slightly_other_spacing_matches_until_it_adds_up_to_a_corner():
    little = np.diag([1.0001, 1.0, 1.0, 1.0])
    assert Geometry(shape=(10, 2, 2), affine=np.eye(4)).matches(Geometry(shape=(10, 2, 2), affine=little))
    assert not Geometry(shape=(500, 2, 2), affine=np.eye(4)).matches(Geometry(shape=(500, 2, 2), affine=little))


def test_a_grid_survives_the_float32_of_a_nifti_header():
    affine = a_tilted_affine(11)
    kept = affine.astype(np.float32).astype(np.float64)
    assert Geometry(shape=(256, 256, 180), affine=affine).matches(Geometry(shape=(256, 256, 180), affine=kept))


def test_grids_of_other_shapes_never_match():
    assert not Geometry(shape=(1, 2, 3), affine=np.eye(4)).matches(Geometry(shape=(1, 3, 2), affine=np.eye(4)))


def test_voxels_and_grid_of_different_shapes_are_refused():
    with pytest.raises(GeometryMismatch, match="both must be the same"):
        Volume(voxels=np.zeros((1, 2, 2, 2)), geometry=Geometry(shape=SHAPE, affine=np.eye(4)), channels=("ct",))


def test_every_channel_needs_one_name():
    with pytest.raises(MissingChannel, match="each channel needs one name"):
        Volume(voxels=np.zeros((2, *SHAPE)), geometry=Geometry(shape=SHAPE, affine=np.eye(4)), channels=("ct",))
    with pytest.raises(MissingChannel, match="2 are needed: t1, t2"):
        a_volume().with_channels(("t1", "t2"))


@pytest.mark.parametrize(("order", "signs"), ORDERS)
def test_a_turned_volume_still_becomes_a_tensor_of_the_same_values(order, signs):
    turned = apply_orientation(a_volume().voxels[0], np.column_stack([order, signs]))[None]
    volume = Volume(voxels=turned, geometry=Geometry(shape=turned.shape[1:], affine=np.eye(4)), channels=("ct",))
    tensor = volume.to_tensor()
    np.testing.assert_array_equal(tensor.numpy(), turned)
    tensor.zero_()
    assert volume.voxels.any()


def test_labels_half_a_voxel_off_are_refused_with_the_distance():
    image, labels = a_volume(), a_volume(shifted(0.5))
    with pytest.raises(GeometryMismatch, match=r"case_7: .*0\.50 mm apart"):
        Case(id="case_7", image=image, labels=labels)
    assert Case(id="case_7", image=image).labels is None


def test_channels_on_one_grid_are_stacked_in_order_and_keep_where_they_came_from():
    one, two = a_volume(), a_volume()
    two = two.with_voxels(two.voxels + 1)
    one, two = (
        Volume(
            voxels=v.voxels, geometry=v.geometry, channels=v.channels, provenance=Provenance(sources=(n,), sha256=n * 4)
        )
        for v, n in ((one, "a"), (two, "b"))
    )
    both = stack([one, two], ("t1", "t2"))
    assert both.channels == ("t1", "t2")
    assert both.provenance.sources == ("a", "b")
    assert both.provenance.sha256 != stack([two, one], ("t1", "t2")).provenance.sha256
    np.testing.assert_array_equal(both.voxels[1], two.voxels[0])


def test_channels_on_different_grids_are_not_stacked_and_the_way_out_is_named():
    with pytest.raises(GeometryMismatch, match=r"; t2 on .* up to 2\.00 mm apart.*`--match t1`") as refusal:
        stack([a_volume(), a_volume(shifted(2.0))], ("t1", "t2"))
    assert refusal.value.reason == "grids_differ"


@pytest.mark.parametrize("match", ["t1post", "T1POST"])
def test_the_others_are_resampled_onto_the_channel_that_is_matched(match):
    """Where a scan is a plane through space, its values say where it lies."""
    fixed = Geometry(shape=(9, 8, 7), affine=np.eye(4))
    moved = Geometry(shape=(9, 8, 7), affine=shifted(1.2))
    voxels = np.broadcast_to(np.arange(9.0, dtype=np.float32)[:, None, None], (9, 8, 7))[None]
    told = Provenance(sources=("f",), files=("f1", "f2"), slices=(("f1", 1),), modality="MR", reader="one")
    post = Volume(voxels=voxels, geometry=fixed, channels=("0",), provenance=told)
    other = Provenance(sources=("m",), files=("m1",), slices=(("m1", 1),), modality="MR", reader="two", repairs=("x.",))
    t2 = Volume(voxels=voxels, geometry=moved, channels=("0",), provenance=other)
    both = stack([t2, post], ("t2", "t1post"), match=match)
    assert both.geometry.matches(fixed) and both.channels == ("t2", "t1post")
    np.testing.assert_array_equal(both.voxels[1], voxels[0])
    np.testing.assert_allclose(both.voxels[0, 2:, 0, 0], np.arange(2, 9) - 1.2, atol=1e-5)
    assert (both.voxels[0, 0] == 0).all()
    assert both.provenance.repairs == (
        "t2: x.",
        "t2 was resampled onto the grid of t1post, up to 1.20 mm away; 11.1% of it lies outside and got the lowest value.",
    )
    assert both.provenance.slices == (("f1", 1),) and both.provenance.files == ("m1", "f1", "f2")
    assert both.provenance.modality == "MR" and both.provenance.reader == "two; one"
    assert both.provenance.verdict == "repaired"


def test_channels_that_share_a_grid_are_stacked_as_they_are_whatever_is_matched():
    volumes = [a_volume(), a_volume(shifted(0.5 * CORNER_TOLERANCE_MM))]
    both = stack(volumes, ("t1", "t2"), match="t2")
    np.testing.assert_array_equal(both.voxels, stack(volumes, ("t1", "t2")).voxels)
    assert both.provenance.repairs == ()


def test_a_channel_that_is_matched_must_be_there():
    with pytest.raises(MissingChannel, match="'flair' was to be matched; there are t1, t2") as refusal:
        stack([a_volume(), a_volume()], ("t1", "t2"), match="flair")
    assert refusal.value.reason == "channels"


@pytest.mark.parametrize(("mm", "fits"), [(1.9, True), (2.6, False), (500, False)])
def test_a_scan_of_another_part_of_the_body_is_no_channel(mm, fits):
    volumes = [a_volume(), a_volume(shifted(mm))]
    if fits:
        assert "outside" in stack(volumes, ("t1", "t2"), match="t1").provenance.repairs[0]
        return
    with pytest.raises(GeometryMismatch, match="at least half") as refusal:
        stack(volumes, ("t1", "t2"), match="t1")
    assert refusal.value.reason == "grids_differ"


def test_modalities_are_joined_where_they_differ():
    ct, pt = (replace(a_volume(), provenance=Provenance(modality=one, encoding="raw")) for one in ("CT", "PT"))
    both = stack([ct, pt, ct], ("ct", "pt", "again")).provenance
    assert both.modality == "CT; PT" and both.encoding == "raw"


def test_whole_numbers_beside_fractions_become_float32_not_float64():
    whole = a_volume().with_voxels(np.ones((1, *SHAPE), np.int32))
    assert stack([whole, a_volume()], ("t1", "t2")).voxels.dtype == np.float32
    assert stack([whole, whole], ("t1", "t2")).voxels.dtype == np.int32


def test_a_file_of_several_channels_is_no_channel():
    with pytest.raises(MissingChannel, match="t2 holds several channels"):
        stack([a_volume(), a_volume(channels=2)], ("t1", "t2"))


@pytest.mark.parametrize(
    ("error", "reason"), [(ScanError, "unsupported"), (GeometryMismatch, "grids_differ"), (MissingChannel, "channels")]
)
def test_every_refusal_has_a_reason_of_the_closed_list_that_survives_another_process(error, reason):
    assert error("no").reason == reason and error("no", "damaged").reason == "damaged"
    assert pickle.loads(pickle.dumps(error("no", "damaged"))).reason == "damaged"
    with pytest.raises(AssertionError):
        error("no", "a mood")


@pytest.mark.parametrize("micron", [1e-3, 1e-4])
def test_the_finest_microscope_still_places_its_voxels(micron):
    assert Geometry(shape=SHAPE, affine=np.diag([micron, micron, micron, 1])).spacing == pytest.approx((micron,) * 3)


@pytest.mark.parametrize("files", [1, 3])
def test_more_or_fewer_files_than_channels_are_refused(files):
    with pytest.raises(MissingChannel, match=r"t1, t2"):
        stack([a_volume()] * files, ("t1", "t2"))


def test_channels_of_two_frames_of_reference_are_no_case_though_their_grids_agree() -> None:
    one, other, unknown = (
        Volume(
            voxels=np.zeros((1, 4, 5, 6), np.int16),
            geometry=Geometry(shape=(4, 5, 6), affine=np.eye(4)),
            channels=("0",),
            provenance=Provenance(frame_of_reference=frame),
        )
        for frame in ("1.2.3", "1.2.4", "")
    )
    with pytest.raises(GeometryMismatch, match="two frames of reference") as refused:
        stack([one, other], ["t1", "t2"])
    assert refused.value.reason == "mixed"
    assert stack([one, unknown], ["t1", "t2"]).provenance.frame_of_reference == "1.2.3"
