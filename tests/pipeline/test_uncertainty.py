"""Uncertainty is the formulas' own number: by scipy, at its two ends, and where answers agree or contradict each other."""

import numpy as np
import pytest
import torch
from scipy import stats

from pipeline.uncertainty import disagreement, entropy


def drawn(seed: int, classes: int = 5) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.moveaxis(rng.dirichlet([0.4] * classes, (3, 4, 2)), -1, 0).astype(np.float32))


def test_entropy_is_scipys_over_log_k() -> None:
    for classes in (2, 5, 9):
        likely = drawn(classes, classes)
        expected = stats.entropy(likely.double().numpy(), axis=0) / np.log(classes)
        np.testing.assert_allclose(entropy(likely), expected, atol=2e-6)


@pytest.mark.parametrize("classes", [2, 3, 118])
def test_entropy_is_0_where_one_answer_is_sure_and_1_where_all_are_equal(classes: int) -> None:
    sure = torch.zeros(classes, 2, 2, 2)
    sure[1] = 1
    assert (entropy(sure) == 0).all()
    np.testing.assert_allclose(entropy(torch.full((classes, 2, 2, 2), 1 / classes)), 1, atol=1e-6)


def test_of_regions_the_least_clear_one_counts() -> None:
    likely = torch.rand(3, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    each = [stats.entropy([p, 1 - p], base=2, axis=0) for p in likely.double().numpy()]
    np.testing.assert_allclose(entropy(likely, has_regions=True), np.max(each, axis=0), atol=2e-6)
    assert (entropy(torch.tensor([0.0, 1.0, 1.0]).view(3, 1, 1, 1), has_regions=True) == 0).all()


def test_identical_folds_do_not_disagree_however_unsure_they_are() -> None:
    likely = drawn(1)
    found = disagreement(likely, [likely, likely, likely])
    assert float(found.max()) < 1e-6 and float(found.min()) >= 0
    regions = torch.rand(3, 2, 2, 2)
    assert float(disagreement(regions, [regions, regions], has_regions=True).max()) < 1e-6


def test_folds_that_contradict_each_other_disagree_as_much_as_they_can() -> None:
    one, other = torch.zeros(2, 2, 1, 1, 1).unbind()
    one[0], other[1] = 1, 1
    assert float(disagreement((one + other) / 2, [one, other])) == pytest.approx(1)
    many = torch.eye(4).view(4, 4, 1, 1, 1)  # four sure folds, four classes
    assert float(disagreement(many.mean(dim=0), many.unbind())) == pytest.approx(1)
    region = torch.tensor([[0.0, 0.5], [1.0, 0.5]]).view(2, 2, 1, 1, 1)  # at odds over the first region alone
    assert float(disagreement(region.mean(dim=0), region.unbind(), has_regions=True)) == pytest.approx(1)


def test_disagreement_is_the_mean_distance_of_the_folds_from_their_mean() -> None:
    folds = [drawn(seed) for seed in range(4)]
    mean = torch.stack(folds).mean(dim=0)
    kept = mean.double().numpy()
    distances = [stats.entropy(fold.double().numpy(), kept, axis=0) for fold in folds]  # Kullback and Leibler's
    np.testing.assert_allclose(disagreement(mean, folds), np.mean(distances, axis=0) / np.log(5), atol=3e-6)
