"""A phantom's answer is known: what is measured on a fine grid is what the formula says."""

import numpy as np
import pytest

from preprocessing.phantoms import CHANNELS, LABELS, body, geometry, phantom, scan
from preprocessing.volume import Geometry

SEEDS = range(12)


def a_fine_grid(spacing: float = 1.5) -> Geometry:
    affine = np.diag([spacing] * 3 + [1.0])
    affine[:3, 3] = -50 * np.array([1.0, 0.8, 0.8])
    shape = tuple(int(n) for n in np.ceil(-2 * affine[:3, 3] / spacing))
    return Geometry(shape=shape, affine=affine)


def measured_ml(labels: np.ndarray, grid: Geometry) -> dict[str, float]:
    return {name: float((labels == value).sum()) * grid.voxel_ml for name, value in LABELS.items()}


@pytest.mark.parametrize("seed", SEEDS)
def test_volumes_on_a_fine_grid_are_what_the_formula_says(seed):
    grid = a_fine_grid()
    patient = body(seed)
    _, labels = scan(patient, grid, seed=seed)
    known = patient.known_ml()
    found = measured_ml(labels.voxels, grid)
    for name, most in (("liver", 0.01), ("kidney", 0.02), ("lesion", 0.05)):
        assert found[name] == pytest.approx(known[name], rel=most), name


@pytest.mark.parametrize("seed", SEEDS)
def test_volumes_do_not_depend_on_the_scanner_s_grid(seed):
    case = phantom(seed)
    assert case.labels is not None
    known, found = body(seed).known_ml(), measured_ml(case.labels.voxels, case.labels.geometry)
    for name, most in (("liver", 0.02), ("kidney", 0.06), ("lesion", 0.15)):
        assert found[name] == pytest.approx(known[name], rel=most), name


def test_a_ball_of_10_mm_holds_4_19_ml_and_its_depth_is_exact():
    ball = body(0).shapes[-1]
    ball = type(ball)(tissue="lesion", centre=np.array([1.0, 2, 3]), radii=np.full(3, 10.0), rotation=np.eye(3))
    assert ball.ml == pytest.approx(4.18879, abs=1e-4)
    np.testing.assert_allclose(ball.depth_mm(np.array([[1.0, 2, 3], [1, 2, 13], [1, 2, 18]])), [10, 0, -5], atol=1e-9)


@pytest.mark.parametrize("seed", range(60))
def test_lesions_lie_apart_and_wholly_inside_the_liver_and_organs_do_not_touch(seed):
    patient = body(seed)
    liver, kidney = (next(s for s in patient.shapes if s.tissue == name) for name in ("liver", "kidney"))
    lesions = [s for s in patient.shapes if s.tissue == "lesion"]
    sphere = np.random.default_rng(0).normal(size=(2000, 3))
    sphere /= np.linalg.norm(sphere, axis=1, keepdims=True)
    assert 1 <= len(lesions) <= 3
    for lesion in lesions:
        assert liver.depth_mm(lesion.centre + sphere * lesion.radii).min() > 0
    for one in range(len(lesions)):
        for other in range(one):
            apart = np.linalg.norm(lesions[one].centre - lesions[other].centre)
            assert apart > lesions[one].radii[0] + lesions[other].radii[0]
    surface = kidney.centre + (sphere * kidney.radii) @ kidney.rotation.T
    assert liver.depth_mm(surface).max() < 0


def test_the_same_seed_gives_the_same_bytes_and_another_one_another_patient():
    one, again, other = phantom(5), phantom(5), phantom(6)
    assert one.id == "phantom_005"
    assert one.image.voxels.tobytes() == again.image.voxels.tobytes()
    assert one.labels.voxels.tobytes() == again.labels.voxels.tobytes()
    assert one.image.geometry.matches(again.image.geometry)
    assert not one.image.geometry.matches(other.image.geometry)
    assert body(5).known_ml() != body(6).known_ml()


def test_scanners_differ_in_axis_order_and_are_oblique_and_uneven():
    grids = [geometry(seed) for seed in range(30)]
    assert len({grid.orientation for grid in grids}) > 12
    assert all(grid.is_oblique and not grid.is_sheared for grid in grids)
    assert all(max(grid.spacing) > 1.4 * min(grid.spacing) for grid in grids)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_label_is_there_and_no_single_channel_tells_all(seed):
    case = phantom(seed)
    labels = case.labels.voxels[0]
    assert case.image.channels == CHANNELS
    assert set(np.unique(labels)) == {0, *LABELS.values()}
    t1, t2 = ({name: case.image.voxels[c][labels == v].mean() for name, v in LABELS.items()} for c in range(2))
    assert t1["lesion"] < t1["liver"]
    assert t2["lesion"] > t2["liver"]


def test_a_scan_without_noise_and_bias_shows_each_tissue_at_one_level():
    grid = a_fine_grid(3.0)
    image, labels = scan(body(2), grid, seed=2, noise=0.0, bias=0.0)
    deep = np.zeros(grid.shape, bool)
    liver = body(2).shapes[1]
    points = grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1))
    deep[(liver.depth_mm(points) > 5) & (labels.voxels[0] == LABELS["liver"])] = True
    for lesion in body(2).shapes[3:]:
        deep &= lesion.depth_mm(points) < -6
    values = image.voxels[0][deep]
    assert deep.sum() > 50
    assert values.std() < 0.01 * values.mean()
