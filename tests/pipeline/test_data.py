"""Prepared cases are cut into windows that depend on nothing but their number."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.cache import PreparedCase, cached
from pipeline.data import Steps, Windows, whole
from preprocessing import files
from preprocessing.augment import IGNORED
from preprocessing.datasets import Dataset, open_dataset
from preprocessing.plan import Plan, Recipe
from preprocessing.volume import Volume


@pytest.fixture
def dataset(make_scan: Callable[..., Volume], tmp_path: Path) -> Dataset:
    """Three labelled cases in images/ and labels/."""
    for seed in range(3):
        scan = make_scan(seed)
        labels = np.where(scan.voxels > 200, 7, 0).astype(np.uint8)
        labels[:, :3] = 1
        files.write(scan, tmp_path / "set" / "images" / f"case{seed}.nii.gz")
        files.write(scan.with_voxels(labels), tmp_path / "set" / "labels" / f"case{seed}.nii.gz", is_labels=True)
    return open_dataset(tmp_path / "set")


@pytest.fixture
def cases(dataset: Dataset, make_plan: Callable[..., Plan], tmp_path: Path) -> list[PreparedCase]:
    return cached(dataset, make_plan(), tmp_path / "cache")


def test_a_window_depends_on_the_seed_and_its_number_alone(
    cases: list[PreparedCase], make_plan: Callable[..., Plan]
) -> None:
    def windows(seed: int = 1) -> Windows:
        return Windows(cases, make_plan(), Recipe(), seed=seed)

    forward = [windows()[n] for n in range(7)]
    np.random.seed(5)
    torch.manual_seed(5)
    late = windows()
    backward = [late[n] for n in reversed(range(7))][::-1]
    for window, again in zip(forward, backward, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(window, again, strict=True))
    assert not torch.equal(forward[0][0], windows(seed=2)[0][0])
    assert not torch.equal(forward[0][0], forward[1][0])


def test_windows_have_the_patch_and_visit_every_case_as_often(
    cases: list[PreparedCase], make_plan: Callable[..., Plan]
) -> None:
    windows = Windows(cases, make_plan(), Recipe(), seed=0)
    visits = [windows.case_of(n).id for n in range(30)]
    assert all(sorted(visits[n : n + 3]) == ["case0", "case1", "case2"] for n in range(0, 30, 3))
    assert len({tuple(visits[n : n + 3]) for n in range(0, 30, 3)}) > 1, "each round has its own order"
    met: set[int] = set()
    for number in range(9):
        image, labels, annotated = windows[number]
        assert image.shape == (1, 16, 16, 16) and image.dtype == torch.float32 and torch.isfinite(image).all()
        assert labels.shape == (16, 16, 16) and labels.dtype == torch.int64
        assert annotated.tolist() == [True, True]
        met |= set(labels.unique().tolist())
    assert {0, 1, 2} <= met <= {0, 1, 2, IGNORED}


def test_ranks_share_the_windows_of_a_step_without_overlap() -> None:
    alone = list(islice(Steps(first=3, batch=4), 2))
    first, second = (list(islice(Steps(first=3, batch=2, rank=rank, ranks=2), 2)) for rank in range(2))
    assert [a + b for a, b in zip(first, second, strict=True)] == alone == [[12, 13, 14, 15], [16, 17, 18, 19]]


def test_held_out_cases_come_whole(cases: list[PreparedCase]) -> None:
    image, labels = whole(cases[2])
    assert image.shape[1:] == labels.shape == cases[2].shape
    assert set(labels.unique().tolist()) == {-1, 0, 1, 2}, "-1 where it was padded: nobody knows what is there"
