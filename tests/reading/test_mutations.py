"""Thousands of files broken at random: read or refused, never a crash, a hang, a greedy wish or a stray file.

A failing mutant is told by its number; `python -m tests.reading.mutations replay NUMBER` makes and reads it alone.
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.conversion import convert
from tests.reading.mutations import (
    GOOD,
    MAKERS,
    MISBEHAVIOURS,
    PATH_TAGS,
    PATHS,
    Mutant,
    Outcome,
    changed_text,
    mutant,
    read,
    read_all,
    seed,
)

NAMES = [tag for tag in PATH_TAGS if not tag.startswith("0200")]
"""The meta group is left whole, lest the files be refused before anybody reads a name in them."""

SAMPLE = 600
ALL = 20_000
WORKERS = 2


def outcomes(numbers: Sequence[int]) -> list[Outcome]:
    """Every worker takes every so-manieth mutant."""
    with ThreadPoolExecutor(WORKERS) as pool:
        found = pool.map(lambda n: list(read_all(numbers[n::WORKERS])), range(WORKERS))
        return sorted((one for some in found for one in some), key=lambda one: one.number)


def told(found: Sequence[Outcome]) -> str:
    """How often each word was said, the slowest, and the first of each kind of failure for each seed."""
    names = list(MAKERS)
    lines = [str(Counter(one.word for one in found)), f"slowest: {max(one.seconds for one in found):.2f} s"]
    seen: Counter[str] = Counter()
    for one in found:
        if one.word not in GOOD:
            name = names[one.number % len(names)]
            seen[f"{name} {one.word}"] += 1
            if seen[f"{name} {one.word}"] <= 2:
                lines.append(f"{one.number} ({name}) {one.word}: {one.detail}")
    return "\n".join([*lines, *(f"{key}: {number} in all" for key, number in seen.items())])


def test_a_mutant_is_the_same_whenever_it_is_made() -> None:
    for number in range(len(MAKERS)):
        assert mutant(number) == mutant(number)


def test_what_is_mutated_was_sound(tmp_path: Path) -> None:
    (tmp_path / "nowhere").mkdir()
    for number, name in enumerate([*MAKERS, *MAKERS]):
        word, detail = read(tmp_path, Mutant(2 * number + 1, name, seed(name).files, seed(name).as_folder))
        if number >= len(MAKERS):  # at first threads and buffers are made, which count as greed
            assert word == ("refused" if name == "mosaic" else "fine"), (name, detail)


def test_the_guard_notices_whatever_must_not_be() -> None:
    found = [outcome.word for outcome in read_all(list(MISBEHAVIOURS), patience=1)]
    assert found == ["crashed", "hung", "greedy", "greedy", "untamed", "untidy"]


def test_some_hundred_broken_files_do_no_harm() -> None:
    found = outcomes(range(SAMPLE))
    assert len(found) == SAMPLE
    assert all(one.word in GOOD for one in found), told(found)
    assert len({one.word for one in found} & {"refused", "fine"}) == 2, told(found)  # else nothing was tried


def test_nothing_is_written_but_into_the_output_folder(tmp_path: Path) -> None:
    """Names and UIDs that are paths, in every element that might become a name."""
    for number, name in enumerate(("classic", "enhanced", "implicit")):
        for which, path in enumerate(PATHS):
            folder = tmp_path / "in" / f"{number}-{which}"
            folder.mkdir(parents=True)
            for file, content in seed(name).files.items():
                (folder / file).write_bytes(changed_text(content, NAMES, path))
    for number in range(200):
        one = mutant(number)
        (tmp_path / "in" / str(number)).mkdir()
        for file, content in one.files.items():
            (tmp_path / "in" / str(number) / file).write_bytes(content)
    before = everything(tmp_path)
    done = convert([tmp_path / "in"], tmp_path / "out" / "here")
    assert len(done.rows) > len(PATHS) and len(list((tmp_path / "out" / "here").glob("*/image.nii.gz"))) > len(PATHS)
    after = {path: told for path, told in everything(tmp_path).items() if not path.startswith("out/here/")}
    assert after == before
    assert all(re.fullmatch(r"[\w.\-]+", path.name) for path in (tmp_path / "out" / "here").rglob("*"))


def everything(root: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(root)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.is_file() or path.is_symlink()
    }


@pytest.mark.slow
def test_twenty_thousand_broken_files_do_no_harm() -> None:
    found = outcomes(range(int(os.environ.get("HILUM_MUTANTS", ALL))))
    print(told(found))
    assert all(one.word in GOOD for one in found), told(found)
