"""Cases are prepared once, split without overlap, and cut into windows that depend on nothing but their number."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import data
from pipeline.data import PreparedCase, Whole, Windows, cached, measure_machine, split
from preprocessing import files
from preprocessing.augment import IGNORED
from preprocessing.datasets import Dataset, open_dataset
from preprocessing.plan import Plan
from preprocessing.reading import Reading
from preprocessing.steps import prepare
from preprocessing.volume import Volume

names = st.lists(st.text("abc123_", min_size=1, max_size=6), unique=True, min_size=2, max_size=40)


@given(ids=names, folds=st.integers(1, 8), order=st.randoms())
@settings(deadline=None, max_examples=60)
def test_every_case_is_held_out_in_exactly_one_fold(ids: list[str], folds: int, order: object) -> None:
    parts = [split(ids, fold, folds) for fold in range(min(folds, len(ids)))]
    for trained, held_out in parts:
        assert sorted(trained + held_out) == sorted(ids) and not set(trained) & set(held_out) and held_out
    if folds > 1:
        assert sorted(one for _, held_out in parts for one in held_out) == sorted(ids)
    shuffled = list(ids)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    assert split(shuffled, 0, folds) == parts[0], "the order of the files changes nothing"


def test_a_fold_that_does_not_exist_is_refused() -> None:
    for fold in (-1, 5):
        with pytest.raises(ValueError, match="from 0 to 4"):
            split(["a", "b"], fold, 5)
    with pytest.raises(ValueError, match="at least two"):
        split(["a"], 0, 5)


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


def test_the_cache_holds_what_prepare_makes_with_classes_for_label_values(
    dataset: Dataset, make_plan: Callable[..., Plan], tmp_path: Path
) -> None:
    plan = make_plan()
    seen: list[tuple[int, int]] = []
    cases = cached(dataset, plan, tmp_path / "cache", lambda done, of: seen.append((done, of)))
    assert [case.id for case in cases] == ["case0", "case1", "case2"] and seen == [(1, 3), (2, 3), (3, 3)]
    read = dataset.read(dataset.cases[1])
    image, trail = prepare(read.image, plan.steps)
    assert read.labels is not None
    labels = trail.follow(read.labels).voxels
    np.testing.assert_array_equal(cases[1].image(), image.voxels)
    np.testing.assert_array_equal(cases[1].labels(), np.searchsorted([0, 1, 7], labels))
    places = cases[1].places().per_label
    assert set(places) == {1, 2}
    for value, voxels in places.items():
        assert (cases[1].labels()[0][tuple(voxels.T)] == value).all()


def test_the_cache_is_made_once_and_only_whole_cases_count(
    dataset: Dataset, make_plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    really = data.prepare

    def counted(volume: Volume, steps: object) -> object:
        made.append("one")
        return really(volume, steps)  # type: ignore[arg-type]

    monkeypatch.setattr(data, "prepare", counted)
    first = cached(dataset, make_plan(), tmp_path / "cache")
    assert cached(dataset, make_plan(), tmp_path / "cache") == first and len(made) == 3

    (first[0].folder / "complete").unlink()  # killed before its last stroke
    (first[0].folder / "image.npy").write_bytes(b"half")
    again = cached(dataset, make_plan(), tmp_path / "cache")
    assert again == first and len(made) == 4 and again[0].image().ndim == 4

    scan = dataset.cases[2].images[0]
    os.utime(scan, ns=(1, 1))
    changed = cached(dataset, make_plan(), tmp_path / "cache")
    assert len(made) == 5 and changed[2].folder != first[2].folder and changed[:2] == first[:2]

    cached(dataset, make_plan(("other",)), tmp_path / "cache")
    assert len(made) == 8, "another plan, another cache"

    allowed = replace(dataset, reading=Reading(allow=("nan",)))
    read_otherwise = cached(allowed, make_plan(), tmp_path / "cache")
    assert len(made) == 11 and {case.folder for case in read_otherwise}.isdisjoint(case.folder for case in changed)


@pytest.fixture
def cases(dataset: Dataset, make_plan: Callable[..., Plan], tmp_path: Path) -> list[PreparedCase]:
    return cached(dataset, make_plan(), tmp_path / "cache")


def test_a_window_depends_on_seed_epoch_and_number_alone(
    cases: list[PreparedCase], make_plan: Callable[..., Plan]
) -> None:
    def windows(seed: int = 1, epoch: int = 2) -> Windows:
        return Windows(cases, make_plan(), seed=seed, epoch=epoch, windows=7)

    forward = [windows()[n] for n in range(7)]
    np.random.seed(5)
    torch.manual_seed(5)
    late = windows()
    backward = [late[n] for n in reversed(range(7))][::-1]
    for (image, labels), (image_again, labels_again) in zip(forward, backward, strict=True):
        assert torch.equal(image, image_again) and torch.equal(labels, labels_again)
    assert not torch.equal(forward[0][0], windows(seed=2)[0][0])
    assert not torch.equal(forward[0][0], windows(epoch=3)[0][0])


def test_windows_have_the_patch_the_classes_and_visit_every_case_as_often(
    cases: list[PreparedCase], make_plan: Callable[..., Plan]
) -> None:
    windows = Windows(cases, make_plan(), seed=0, epoch=0, windows=9)
    assert len(windows) == 9
    assert sorted(windows.order.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    met: set[int] = set()
    for number in range(9):
        image, labels = windows[number]
        assert image.shape == (1, 16, 16, 16) and image.dtype == torch.float32 and torch.isfinite(image).all()
        assert labels.shape == (16, 16, 16) and labels.dtype == torch.int64
        met |= set(labels.unique().tolist())
    assert {0, 1, 2} <= met <= {0, 1, 2, IGNORED}


def test_held_out_cases_come_whole(cases: list[PreparedCase]) -> None:
    whole = Whole(cases)
    image, labels = whole[2]
    assert len(whole) == 3 and image.shape[1:] == labels.shape == cases[2].image().shape[1:]
    assert set(labels.unique().tolist()) == {0, 1, 2}


def test_the_machine_is_measured_not_guessed() -> None:
    machine = measure_machine("cpu")
    assert 1 <= machine.cores <= (os.cpu_count() or 1) and not machine.has_gpu
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    assert 0 < machine.memory_gb <= total
