"""Prepared cases: made once, known by what they are made of, read window by window, never trained on when damaged."""

import errno
import logging
import os
import pickle
import random
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import cache
from pipeline.cache import PreparedCase, cached, store
from pipeline.errors import CacheError, is_users
from preprocessing import files
from preprocessing.augment import IGNORED
from preprocessing.datasets import Dataset, DatasetError, open_dataset
from preprocessing.patches import cut
from preprocessing.plan import Plan
from preprocessing.reading import Reading
from preprocessing.steps import prepare
from preprocessing.volume import Volume


@pytest.fixture
def dataset(make_scan: Callable[..., Volume], tmp_path: Path) -> Dataset:
    """Three labelled cases in images/ and labels/."""
    return write_dataset(tmp_path / "set", make_scan)


def write_dataset(folder: Path, make_scan: Callable[..., Volume], cases: int = 3) -> Dataset:
    for seed in range(cases):
        scan = make_scan(seed)
        labels = np.where(scan.voxels > 200, 7, 0).astype(np.uint8)
        labels[:, :3] = 1
        files.write(scan, folder / "images" / f"case{seed}.nii.gz")
        files.write(scan.with_voxels(labels), folder / "labels" / f"case{seed}.nii.gz", is_labels=True)
    return open_dataset(folder)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one for every case that is prepared."""
    made: list[str] = []
    really = cache.prepare

    def counted(volume: Volume, steps: object) -> object:
        made.append("one")
        return really(volume, steps)  # type: ignore[arg-type]

    monkeypatch.setattr(cache, "prepare", counted)
    return made


# what is in it


def test_the_cache_holds_what_prepare_makes_with_part_numbers_for_label_values(
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
    found, scanned = cases[1].labels(), cases[1].labels() != IGNORED
    np.testing.assert_array_equal(found[scanned], np.searchsorted([0, 1, 7], labels)[scanned])
    assert not labels[~scanned].any() and scanned.sum() == np.prod(trail.taken[1].after.shape), (
        "the padding is nobody's"
    )
    assert cases[1].shape == image.voxels.shape[1:] and cases[1].channels == 1
    places = cases[1].places().per_label
    assert set(places) == {1, 2}
    for value, voxels in places.items():
        assert (cases[1].labels()[0][tuple(voxels.T)] == value).all()


def test_ignored_voxels_are_marked_and_no_window_is_drawn_for_them(
    dataset: Dataset, make_plan: Callable[..., Plan], tmp_path: Path
) -> None:
    plan = replace(make_plan(), labels=make_plan().labels[:1], ignored=7)
    case = cached(dataset, plan, tmp_path / "cache")[0]
    assert set(np.unique(case.labels())) == {IGNORED, 0, 1} and set(case.places().per_label) == {1}


def test_a_case_says_which_labels_were_looked_for_and_whose_it_is(
    dataset: Dataset, make_plan: Callable[..., Plan], tmp_path: Path, made: list[str]
) -> None:
    plan = make_plan()
    first, *others = dataset.cases
    partly = replace(dataset, cases=(replace(first, annotated=("lesion",), patient="p7"), *others))
    one, two, _ = cached(partly, plan, tmp_path / "cache")
    assert (one.annotated, two.annotated) == ((False, True), (True, True))
    assert (one.patient, two.patient) == ("p7", "")
    assert one.looked_for(plan.labels[1], plan) and not one.looked_for(plan.labels[0], plan)
    assert cached(dataset, plan, tmp_path / "cache")[0].folder == one.folder and len(made) == 3, (
        "the voxels are the same"
    )


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[PreparedCase, np.ndarray, np.ndarray]]:
    """Cases of one chunk and of many, of flat and of cubic patches, with what was stored in them."""
    root, found = tmp_path_factory.mktemp("stored"), []
    for number, (channels, shape, patch) in enumerate(
        [(1, (14, 18, 11), (16, 16, 16)), (2, (70, 130, 61), (40, 56, 40)), (1, (9, 200, 170), (8, 128, 128)), (3, (1, 1, 1), (4, 4, 4))]
    ):  # fmt: skip
        rng = np.random.default_rng(number)
        image = rng.normal(size=(channels, *shape)).astype(np.float32)
        labels = rng.integers(-1, 4, (1, *shape)).astype(np.int16)
        labels[:, : shape[0] // 2] = 0
        store(root / str(number), image, labels, patch)
        found.append((PreparedCase(id=str(number), folder=root / str(number)), image, labels))
    return found


@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_a_window_is_what_is_cut_from_the_whole_wherever_it_lies(
    stored: list[tuple[PreparedCase, np.ndarray, np.ndarray]], data: st.DataObject
) -> None:
    case, image, labels = data.draw(st.sampled_from(stored))
    start = [data.draw(st.integers(-20, side + 10)) for side in case.shape]
    size = [data.draw(st.integers(1, 80)) for _ in range(3)]
    seen, truth = case.window(start, size)
    np.testing.assert_array_equal(seen, cut(image, start, size, outside=0))
    np.testing.assert_array_equal(truth, cut(labels, start, size, outside=IGNORED))
    assert seen.dtype == np.float32 and truth.dtype == np.int16 and seen.flags.writeable and truth.flags.writeable


def test_a_whole_case_comes_back_bit_by_bit(stored: list[tuple[PreparedCase, np.ndarray, np.ndarray]]) -> None:
    for case, image, labels in stored:
        assert case.image().tobytes() == image.tobytes() and case.labels().tobytes() == labels.tobytes()


@given(
    shape=st.tuples(*[st.integers(1, 600)] * 3), patch=st.tuples(*[st.integers(1, 400)] * 3),
    voxels=st.sampled_from([2**14, 2**17]),
)  # fmt: skip
def test_chunks_cover_the_scan_in_equal_parts_no_larger_than_is_wanted(
    shape: tuple[int, int, int], patch: tuple[int, int, int], voxels: int
) -> None:
    sides = cache._sides(shape, patch, voxels)
    assert all(1 <= part <= min(side, wide) for part, side, wide in zip(sides, shape, patch, strict=True))
    assert np.prod(sides) <= voxels
    assert all(-(-side // part) * part - side < -(-side // part) for part, side in zip(sides, shape, strict=True))


def test_only_the_chunks_that_a_window_touches_are_read(
    stored: list[tuple[PreparedCase, np.ndarray, np.ndarray]],
) -> None:
    case = replace(stored[1][0])
    array = cache._Store(case.folder).image
    array.box((0, 0, 0), (3, 3, 3))
    assert array.right == {0} and len(array.sums) > 4
    array.box((60, 100, 50), (61, 101, 51))
    assert len(array.right) == 2


# by what it is known


def test_a_case_is_prepared_once(
    dataset: Dataset, make_plan: Callable[..., Plan], tmp_path: Path, made: list[str]
) -> None:
    first = cached(dataset, make_plan(), tmp_path / "cache")
    assert cached(dataset, make_plan(), tmp_path / "cache") == first and len(made) == 3
    assert [sorted(one.name for one in case.folder.iterdir()) for case in first] == [
        ["case.json", "image.b2nd", "labels.b2nd", "places.npz"]
    ] * 3
    left = {path.name for case in first for path in case.folder.parent.iterdir()}
    assert left == {case.folder.name for case in first}, "no lock and nothing half made stays behind"


def test_other_bytes_another_plan_or_another_way_of_reading_make_another_case(
    dataset: Dataset, make_plan: Callable[..., Plan], make_scan: Callable[..., Volume], tmp_path: Path, made: list[str]
) -> None:
    first = cached(dataset, make_plan(), tmp_path / "cache")
    scan = dataset.cases[2].images[0]
    before = scan.stat()
    content = bytearray(scan.read_bytes())
    content[4:8] = b"\1\2\3\4"  # the time in the header of gzip: other bytes, the same size
    scan.write_bytes(content)
    os.utime(scan, ns=(before.st_atime_ns, before.st_mtime_ns))
    changed = cached(dataset, make_plan(), tmp_path / "cache")
    assert len(made) == 4 and changed[2] != first[2] and changed[:2] == first[:2]

    cached(dataset, make_plan(("other",)), tmp_path / "cache")
    assert len(made) == 7

    allowed = replace(dataset, reading=Reading(allow=("nan",)))
    read_otherwise = cached(allowed, make_plan(), tmp_path / "cache")
    assert len(made) == 10 and {case.folder for case in read_otherwise}.isdisjoint(case.folder for case in changed)


def test_a_dataset_that_was_copied_moved_touched_or_renamed_is_known_again(
    dataset: Dataset, make_plan: Callable[..., Plan], tmp_path: Path, made: list[str]
) -> None:
    first = cached(dataset, make_plan(), tmp_path / "cache")
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    (tmp_path / "set").rename(tmp_path / "moved")
    os.utime(tmp_path / "moved" / "images" / "case1.nii.gz", ns=(1, 1))
    for place in ("copy", "moved"):
        assert cached(open_dataset(tmp_path / place), make_plan(), tmp_path / "cache") == first
    for kind in ("images", "labels"):
        (tmp_path / "copy" / kind / "case0.nii.gz").rename(tmp_path / "copy" / kind / "zoe.nii.gz")
    renamed = cached(open_dataset(tmp_path / "copy"), make_plan(), tmp_path / "cache")
    assert [case.id for case in renamed] == ["case1", "case2", "zoe"] and renamed[2].folder == first[0].folder
    assert len(made) == 3


def test_no_name_of_a_case_is_written_into_the_cache(
    dataset: Dataset, make_plan: Callable[..., Plan], tmp_path: Path
) -> None:
    cached(dataset, make_plan(), tmp_path / "cache")
    for path in (tmp_path / "cache").rglob("*"):
        assert "case0" not in path.name and (path.is_dir() or b"case0" not in path.read_bytes())


def test_files_that_did_not_change_are_not_read_again(
    dataset: Dataset, make_plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    really = cache.sha256

    def counted(paths: list[Path]) -> str:
        read.extend(paths)
        return really(paths)

    monkeypatch.setattr(cache, "sha256", counted)
    cached(dataset, make_plan(), tmp_path / "cache")
    assert len(read) >= 6
    read.clear()
    cached(dataset, make_plan(), tmp_path / "cache")
    assert len(read) == 6, "files written this very moment may yet change within one tick of the clock"
    monkeypatch.setattr(cache, "SETTLED_S", -1.0)
    cached(dataset, make_plan(), tmp_path / "cache")
    read.clear()
    cached(dataset, make_plan(), tmp_path / "cache")
    assert not read
    os.utime(dataset.cases[0].images[0], ns=(5, 5))
    cached(dataset, make_plan(), tmp_path / "cache")
    assert read == [dataset.cases[0].images[0]]


def test_a_slice_stands_for_its_series_and_a_header_for_its_voxels(
    tmp_path: Path, make_scan: Callable[..., Volume]
) -> None:
    series, known = tmp_path / "series", tmp_path / "cache"
    series.mkdir()
    for number in range(3):
        (series / f"{number}").write_bytes(bytes(128) + b"DICM" + bytes([number]))
    of_folder, of_slice = cache._contents(series, known), cache._contents(series / "1", known)
    (series / ".hidden").touch()
    assert cache._contents(series, known) == of_folder and cache._contents(series / "1", known) == of_slice
    assert cache._contents(series / "2", known) != of_slice
    (series / "0").write_bytes(bytes(128) + b"DICM.")
    assert cache._contents(series, known) != of_folder and cache._contents(series / "1", known) != of_slice

    files.write(make_scan(0), tmp_path / "pair.mhd")
    before = cache._contents(tmp_path / "pair.mhd", known)
    (voxels,) = (path for path in tmp_path.glob("pair.*") if path.suffix != ".mhd")
    voxels.write_bytes(voxels.read_bytes() + b"1")
    assert cache._contents(tmp_path / "pair.mhd", known) != before


# damage

PARTS = ("case.json", "image.b2nd", "labels.b2nd", "places.npz")


def look_at_everything(case: PreparedCase) -> tuple[np.ndarray, np.ndarray, dict[int, np.ndarray]]:
    return case.image(), case.labels(), case.places().per_label


@pytest.mark.parametrize("part", PARTS)
def test_a_flipped_bit_anywhere_is_noticed_and_the_case_prepared_anew(
    dataset: Dataset,
    make_plan: Callable[..., Plan],
    tmp_path: Path,
    part: str,
    made: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    case = cached(dataset, make_plan(), tmp_path / "cache")[0]
    image, labels, places = look_at_everything(case)
    size = (case.folder / part).stat().st_size
    rng = random.Random(part)
    for position in [0, size - 1, *rng.sample(range(size), 12)]:
        content = bytearray((case.folder / part).read_bytes())
        content[position] ^= 1 << rng.randrange(8)
        (case.folder / part).write_bytes(content)
        os.utime(case.folder)  # as a process that starts anew: nothing of it is open
        made.clear()
        image_again, labels_again, places_again = look_at_everything(case)
        assert len(made) == 1, f"byte {position} of {size}"
        np.testing.assert_array_equal(image_again, image)
        np.testing.assert_array_equal(labels_again, labels)
        assert all(np.array_equal(places_again[value], places[value]) for value in places)
    assert "is damaged" in caplog.text and "prepared anew" in caplog.text


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("damage", ["empty", "half", "zeros", "longer", "gone", "folder"])
def test_a_file_cut_short_zeroed_or_lost_is_noticed_at_the_next_start(
    dataset: Dataset, make_plan: Callable[..., Plan], tmp_path: Path, part: str, damage: str, made: list[str]
) -> None:
    case = cached(dataset, make_plan(), tmp_path / "cache")[0]
    whole, path = case.image(), case.folder / part
    size = path.stat().st_size
    if damage == "gone":
        path.unlink()
    elif damage == "folder":
        shutil.rmtree(case.folder)
    else:
        with path.open("r+b") as stream:
            if damage == "zeros":  # a disk that lost power after the file's size was written
                stream.write(bytes(size))
            stream.truncate({"empty": 0, "half": size // 2, "longer": size + 1, "zeros": size}[damage])
        os.utime(case.folder)  # as a process that starts anew: nothing of it is open
    made.clear()
    again = cached(dataset, make_plan(), tmp_path / "cache")[0]
    assert len(made) == (0 if damage == "zeros" and part != "case.json" else 1)
    look_at_everything(again)
    assert len(made) == 1 and again == case
    np.testing.assert_array_equal(again.image(), whole)


def test_what_cannot_be_prepared_anew_says_so(
    dataset: Dataset, make_plan: Callable[..., Plan], make_scan: Callable[..., Volume], tmp_path: Path
) -> None:
    case = cached(dataset, make_plan(), tmp_path / "cache")[0]
    (case.folder / "image.b2nd").write_bytes(b"nothing of the kind")
    with pytest.raises(CacheError, match=r"case0 in .* is damaged .*every byte must be .*Start again"):
        replace(case, mend=None).image()
    scan = make_scan(0)
    files.write(scan.with_voxels(scan.voxels + 1), dataset.cases[0].images[0])
    with pytest.raises(ValueError, match=r"case0 changed on disk .*must stay as they are.*Bring them back"):
        case.image()


def test_a_reader_keeps_what_it_has_open_while_another_process_replaces_it(
    dataset: Dataset, make_plan: Callable[..., Plan], tmp_path: Path
) -> None:
    case = cached(dataset, make_plan(), tmp_path / "cache")[0]
    before = cache._Store(case.folder)
    image, labels = case.image(), case.labels()
    store(case.folder, image + 1, labels, (16, 16, 16))
    np.testing.assert_array_equal(before.image.box((0, 0, 0), before.shape), image)
    np.testing.assert_array_equal(case.image(), image + 1)
    assert [path.name for path in case.folder.parent.iterdir() if path.name.startswith(".")] == []


# several at once


def test_two_processes_that_share_a_cache_prepare_each_case_once(
    dataset: Dataset, make_plan: Callable[..., Plan], tmp_path: Path, made: list[str]
) -> None:
    def prepare_all() -> tuple[int, list[bytes]]:
        cases = cached(dataset, make_plan(), tmp_path / "cache")
        return len(made), [case.image().tobytes() for case in cases]

    said = [child.answer() for child in [Child(prepare_all) for _ in range(3)]]
    assert sum(prepared for prepared, _ in said) == 3
    assert said[0][1] == said[1][1] == said[2][1]


class Child:
    """A process of its own that does one thing and says what came of it."""

    def __init__(self, work: Callable[[], object]):
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: forking where threads are; loaders do it
            self.pid = os.fork()
        if self.pid == 0:
            try:
                with os.fdopen(writing, "wb") as stream:
                    stream.write(pickle.dumps(work()))
            finally:
                os._exit(0)
        os.close(writing)
        self.stream = os.fdopen(reading, "rb")

    def answer(self) -> Any:
        with self.stream:
            said = self.stream.read()
        os.waitpid(self.pid, 0)
        return pickle.loads(said)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.stream.close()


def test_a_case_that_someone_holds_too_long_is_prepared_all_the_same(
    dataset: Dataset, make_plan: Callable[..., Plan], tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "PATIENCE_S", 0.1)
    case = cached(dataset, make_plan(), tmp_path / "cache")[0]
    shutil.rmtree(case.folder)
    with cache._alone(case.folder):
        assert cached(dataset, make_plan(), tmp_path / "cache")[0] == case
    assert len(made) == 4 and case.image().ndim == 4


def test_whoever_waits_finds_the_case_made(tmp_path: Path) -> None:
    folder, inside = tmp_path / "root" / "case", []

    def hold(number: int) -> None:
        with cache._alone(folder):
            inside.append(number)
            time.sleep(0.01)
            assert inside[-1] == number, "two were let in at once"

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(hold, range(24)))
    assert sorted(inside) == list(range(24)) and not list(folder.parent.iterdir())


def test_threads_and_forked_processes_read_the_same_case(
    stored: list[tuple[PreparedCase, np.ndarray, np.ndarray]],
) -> None:
    case, image, _ = stored[1]

    def right(n: int) -> bool:
        window, _ = case.window((n, n, n), (30, 50, 20))
        return bool(np.array_equal(window, image[:, n : n + 30, n : n + 50, n : n + 20]))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(right, [n % 40 for n in range(200)]))
    children = [Child(lambda: all(right(n) for n in range(20))) for _ in range(2)]
    assert all(child.answer() for child in children)


def test_a_case_can_be_sent_to_a_loading_process_and_mended_there(
    dataset: Dataset, make_plan: Callable[..., Plan], tmp_path: Path
) -> None:
    case = cached(dataset, make_plan(), tmp_path / "cache")[0]
    sent = pickle.loads(pickle.dumps(case))
    shutil.rmtree(case.folder)
    assert sent == case and sent.image().ndim == 4


def test_a_run_killed_at_any_moment_leaves_only_whole_cases_and_the_next_goes_on(
    make_scan: Callable[..., Volume], make_plan: Callable[..., Plan], tmp_path: Path
) -> None:
    dataset = write_dataset(tmp_path / "set", lambda seed: make_scan(seed, shape=(30, 35, 25)), cases=8)
    plan, root = make_plan(), tmp_path / "cache" / make_plan().digest[:16]
    begun = time.monotonic()
    Child(lambda: bool(cached(dataset, plan, tmp_path / "another"))).answer()
    whole_run, kept, rng = time.monotonic() - begun, 0, random.Random(0)
    for _ in range(10):
        child = Child(lambda: bool(cached(dataset, plan, tmp_path / "cache")))
        time.sleep(whole_run * rng.uniform(0, 0.4))
        child.kill()
        whole = [folder for folder in root.glob("*") if not folder.name.startswith(".")]
        assert all(not cache._damage(folder, thorough=True) for folder in whole) and len(whole) >= kept
        kept = len(whole)
    for case, listed in zip(cached(dataset, plan, tmp_path / "cache"), dataset.cases, strict=True):
        image, _ = prepare(dataset.read(listed).image, plan.steps)
        np.testing.assert_array_equal(case.image(), image.voxels)
    assert len([folder for folder in root.glob("*") if not folder.name.startswith(".")]) == 8


# what cannot be done


def test_a_case_that_fails_names_itself_and_its_reason_and_its_neighbours_are_prepared(
    dataset: Dataset, make_plan: Callable[..., Plan], tmp_path: Path, made: list[str]
) -> None:
    good = dataset.cases[1].images[0].read_bytes()
    dataset.cases[1].images[0].write_bytes(good[: len(good) // 2])
    with pytest.raises(DatasetError, match=r"1 case\(s\) of set cannot be prepared; all must be\. case1: .*Mend"):
        cached(dataset, make_plan(), tmp_path / "cache")
    assert len(made) == 2
    dataset.cases[1].images[0].write_bytes(good)
    cases = cached(dataset, make_plan(), tmp_path / "cache")
    assert len(made) == 3 and [case.id for case in cases] == ["case0", "case1", "case2"]
    image, _ = prepare(dataset.read(dataset.cases[2]).image, make_plan().steps)
    np.testing.assert_array_equal(cases[2].image(), image.voxels)


def test_a_fault_of_ours_is_told_as_ours(
    dataset: Dataset, make_plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(cache, "prepare", fails)
    with pytest.raises(RuntimeError, match=r"3 case\(s\).* case0: hilum itself failed .*ZeroDivisionError.* case2: "):
        cached(dataset, make_plan(), tmp_path / "cache")


def test_a_full_disk_is_told_in_three_parts_and_ends_the_work(
    dataset: Dataset, make_plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.name == "labels.b2nd":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return really(path, content)

    with monkeypatch.context() as disk:
        disk.setattr(Path, "write_bytes", full)
        with pytest.raises(CacheError, match=r"No space left.*needs its place.*Make room") as raised:
            cached(dataset, make_plan(), tmp_path / "cache")
    assert is_users(raised.value)
    assert not list((tmp_path / "cache" / make_plan().digest[:16]).iterdir()), "nothing half made stays behind"
    assert len(cached(dataset, make_plan(), tmp_path / "cache")) == 3


def test_a_place_that_is_no_folder_is_refused(dataset: Dataset, make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(CacheError, match="cannot be written"):
        cached(dataset, make_plan(), tmp_path / "cache")


def test_a_cache_that_may_only_be_read_serves_what_it_holds(
    dataset: Dataset, make_plan: Callable[..., Plan], tmp_path: Path, made: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    first = cached(dataset, make_plan(), tmp_path / "cache")
    shared = [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]
    for path in shared:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        with caplog.at_level(logging.WARNING):
            again = cached(dataset, make_plan(), tmp_path / "cache")
            assert again == first and again[0].image().ndim == 4 and len(made) == 3 and not caplog.text
    finally:
        for path in shared:
            path.chmod(0o755)
