"""The house is as its map says, its floors are its own, and imports go down it."""

import importlib
import re
import shutil
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from pipeline.config import Segment, SlideClassify, SlideFeatures, SlideTraining, Train
from preprocessing.records import decode

REPOSITORY = Path(__file__).resolve().parents[1]
FLOORS = ("pipeline", "networks", "preprocessing", "kernels")
CONFIGS = {
    "train": Train, "segment": Segment, "slides-features": SlideFeatures, "slides-train": SlideTraining,
    "slides-classify": SlideClassify,
}  # fmt: skip


@pytest.mark.parametrize("floor", [*FLOORS, "configs"])
def test_every_floor_is_this_repositorys_own(floor: str) -> None:
    """`kernels` is also the name of a distribution that others import; whichever comes first would win."""
    module = importlib.import_module(floor)
    assert module.__file__ and Path(module.__file__).resolve().is_relative_to(REPOSITORY)


@pytest.mark.parametrize("name", ["kernels", "networks", "preprocessing", "pipeline", "configs"])
def test_no_distribution_bears_the_name_of_a_floor(name: str) -> None:
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version(name)


def the_map() -> set[str]:
    """Every file and folder the README's map names, by its path: indented lines lie in the folder above them."""
    readme = (REPOSITORY / "README.md").read_text()
    block = re.search(r"^## The map\n.*?^```\w*\n(.*?)^```", readme, re.M | re.S)
    assert block, "README.md has no fenced block under '## The map'"
    found: set[str] = set()
    folders: list[tuple[int, str]] = []
    for line in block[1].splitlines():
        name = re.match(r"[\s│├└─]*(?=\S)", line)
        words = line[name.end() :].split() if name else []
        if not name or not words or not re.search(r"[./]", words[0]):
            continue  # a sentence that goes on from the line above
        folders = [(depth, path) for depth, path in folders if depth < name.end()]
        path = (folders[-1][1] if folders else "") + words[0]
        if path.endswith("/"):
            folders.append((name.end(), path))
        found.add(path)
    return found


def test_every_file_on_the_map_exists() -> None:
    missing = sorted(path for path in the_map() if not list(REPOSITORY.glob(path.rstrip("/"))))
    assert not missing


def test_every_module_of_the_four_floors_is_on_the_map() -> None:
    modules = {
        str(path.relative_to(REPOSITORY))
        for floor in FLOORS
        for path in (REPOSITORY / floor).rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    }
    assert not sorted(modules - the_map())


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_file_says_what_its_verb_knows_and_nothing_else(path: Path) -> None:
    verb = path.name.split("_")[0]
    assert verb in CONFIGS, "a file in configs/ begins with the verb it is for: train_, segment_, slides-train_"
    decode(CONFIGS[verb], yaml.safe_load(path.read_text()), where=path.name)


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    if find_spec("importlinter") is None:
        pytest.skip("import-linter is not installed (pip install -e .[check])")
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", code, "--no-cache"], cwd=folder, capture_output=True, text=True, check=False
    )


def test_imports_go_down_the_house() -> None:
    done = lint_imports(REPOSITORY)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "file, line, contract",
    [
        ("preprocessing/patches.py", "import pipeline.report", "pipeline stands on networks and preprocessing"),
        ("networks/parts/blocks.py", "from preprocessing import volume", "pipeline stands on networks"),
        ("kernels/window_blend.py", "import numpy", "kernels know torch and triton alone"),
        ("pipeline/report.py", "from . import batch", "inside pipeline"),
    ],
)
def test_an_import_upwards_is_found(tmp_path: Path, file: str, line: str, contract: str) -> None:
    for floor in FLOORS:
        shutil.copytree(REPOSITORY / floor, tmp_path / floor, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    with (tmp_path / file).open("a") as stream:
        stream.write(f"\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(rf"{re.escape(contract)}.* BROKEN", done.stdout), done.stdout
