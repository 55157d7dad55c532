"""What a case adds to the fingerprint is what its voxels say, however many there are."""

import numpy as np
import pytest

from preprocessing.fingerprint import RANKS, facts_of, label_counts
from preprocessing.volume import Case, Geometry, Volume


def a_case(image: np.ndarray, labels: np.ndarray, spacing=(1.0, 2.0, 3.0)) -> Case:
    geometry = Geometry(shape=image.shape, affine=np.diag([*spacing, 1.0]))
    return Case(
        id="made",
        image=Volume(voxels=image[None], geometry=geometry, channels=("MR",)),
        labels=Volume(voxels=labels[None].astype(np.uint8), geometry=geometry, channels=("labels",)),
    )


def test_ranks_of_few_and_of_many_voxels_have_the_mean_and_the_percentiles_of_all() -> None:
    rng = np.random.default_rng(0)
    for shape in ((12, 10, 8), (90, 80, 70)):
        image = rng.gamma(2.0, 50.0, shape).astype(np.float32)
        labels = rng.random(shape) < 0.7
        (ranks,) = facts_of(a_case(image, labels)).intensities
        under = image[labels]
        assert len(ranks) == len(RANKS), "each case weighs the same"
        assert np.mean(ranks) == pytest.approx(under.mean(), rel=0.02)
        assert np.std(ranks) == pytest.approx(under.std(), rel=0.03)
        assert np.percentile(ranks, [5, 50, 95]) == pytest.approx(np.percentile(under, [5, 50, 95]), rel=0.05)


def test_a_case_without_labels_is_measured_whole() -> None:
    image = np.arange(1000, dtype=np.float32).reshape(10, 10, 10)
    (ranks,) = facts_of(a_case(image, np.zeros(image.shape))).intensities
    assert np.mean(ranks) == pytest.approx(499.5)


def test_the_zero_border_is_measured_to_the_voxel() -> None:
    image = np.zeros((10, 20, 30), dtype=np.int16)
    image[2:7, 5:6, 1:30] = 9
    facts = facts_of(a_case(image, image > 0))
    assert facts.cropped == (5, 1, 29)
    assert facts.kept == pytest.approx(5 * 1 * 29 / 6000)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32])
def test_labels_are_counted_as_numpy_counts_them(kind) -> None:
    labels = np.random.default_rng(1).choice([0, 1, 2, 200], (1, 9, 8, 7)).astype(kind)
    values, counts = np.unique(labels[labels > 0], return_counts=True)
    assert label_counts(labels) == dict(zip(values.tolist(), counts.tolist(), strict=True))
