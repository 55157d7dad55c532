"""A version of the registry is the package, byte for byte, and `best` is the best of those that may be compared."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import RegistryError
from pipeline.registry import BEST, Measured, better, fetch, register, registered_name
from pipeline.tracking import Tracker, open_run
from tests.pipeline.servers import a_package, contents


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One store for all tests here: making a new one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('a store')}/mlflow.db"


def start(uri: str) -> Tracker:
    return open_run(uri=uri, experiment="tests", run_name="a run", params={}, tags={})


def put(run: Tracker, package: Path, name: str, aliases: tuple[str, ...] = (), note: str = "", **more: Measured) -> str:
    return register(package, name, uri=run.uri, run_id=run.run_id, aliases=aliases, note=note, **more)


def test_a_registered_package_comes_back_byte_for_byte(uri: str, tmp_path: Path, monkeypatch) -> None:
    run = start(uri)
    package = a_package(tmp_path / "package")
    assert put(run, package, "liver", ("champion", "candidate"), note="Dice 0.9") == "1"
    run.finish("FINISHED")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    fetched = fetch("models:/liver@champion", Path("cache"), uri)
    assert fetched.parent.parent == Path("cache")
    assert contents(fetched) == contents(package)
    assert fetch("models:/liver/1", Path("cache"), uri) == fetched
    assert [path.name for path in Path("cache").iterdir()] == [fetched.parent.name]


def test_a_second_version_leaves_the_first_as_it_was(uri: str, tmp_path: Path) -> None:
    run = start(uri)
    first, second = a_package(tmp_path / "1"), a_package(tmp_path / "2", b"better")
    assert put(run, first, "spleen", ("champion",)) == "1"
    assert put(run, second, "spleen", ("champion",)) == "2"
    assert contents(fetch("models:/spleen/1", tmp_path / "cache", uri)) == contents(first)
    assert contents(fetch("models:/spleen@champion", tmp_path / "cache", uri)) == contents(second)


def test_latest_is_an_alias_every_model_has(uri: str, tmp_path: Path) -> None:
    run = start(uri)
    packages = [a_package(tmp_path / str(number), bytes([number])) for number in range(11)]
    assert [put(run, package, "pancreas", ("latest",)) for package in packages][-1] == "11"
    assert contents(fetch("models:/pancreas@latest", tmp_path / "cache", uri)) == contents(packages[-1])
    with pytest.raises(RegistryError):
        fetch("models:/nobody@latest", tmp_path / "cache", uri)


@pytest.mark.parametrize("address", ["models:/kidney@championn", "models:/kidney/7", "models:/kidny/1", "kidney"])
def test_an_unknown_package_is_refused_with_what_there_is(uri: str, tmp_path: Path, address: str) -> None:
    if not (known := tmp_path.parent / "kidney").exists():
        put(start(uri), a_package(known), "kidney", ("champion",))
    with pytest.raises(RegistryError, match=r"kidney \(/1.*, @champion is \d+\)"):
        fetch(address, tmp_path / "cache", uri)
    assert not (tmp_path / "cache").exists()


def test_nothing_is_pickled(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    def refuse(*args, **more) -> None:
        raise AssertionError("something was pickled")

    run = start(uri)
    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    run.metrics({"train/loss": 1.0}, 0)
    run.picture("case", np.zeros((16, 16, 3), np.uint8), 0)
    put(run, a_package(tmp_path / "package"), "unpickled", ("champion",))
    run.finish("FINISHED")
    fetch("models:/unpickled@champion", tmp_path / "cache", uri)


def measured(dice: float, cases: str, trainings: str, dataset: str = "ab" * 32) -> Measured:
    return Measured(
        dice={"liver": dice}, cases=frozenset(cases.split()), trainings=tuple(trainings.split()), dataset=dataset
    )


def best_of(run: Tracker, name: str) -> str | None:
    held = run._client.get_registered_model(name).aliases.get(BEST)
    return None if held is None else str(held)


def test_best_moves_to_what_is_better_on_the_same_cases(uri: str, tmp_path: Path) -> None:
    run = start(uri)
    packages = iter(a_package(tmp_path / str(number), bytes([number])) for number in range(9))

    def registered(*of: str | float) -> str | None:
        put(run, next(packages), "bladder", measured=measured(*of))
        return best_of(run, "bladder")

    assert registered(0.8, "a b", "run1") == "1", "the first one measured"
    assert registered(0.7, "a b", "run2") == "1"
    assert registered(0.8, "a b", "run3") == "1", "as good is not better"
    assert registered(0.9, "a b", "run4") == "4"
    assert registered(0.95, "c d", "run5") == "4", "other patients"
    assert registered(0.95, "a b", "run6", "cd" * 32) == "4", "another dataset"
    assert registered(0.85, "a b c d", "run4 run7") == "7", "every training of version 4 and one more"
    tags = run._client.get_model_version("bladder", "5").tags
    assert tags["dice_liver"] == "0.9500" and "not compared" in tags["best"] and tags["held_out_cases"] == "2"


def test_nothing_that_was_not_measured_is_called_best(uri: str, tmp_path: Path) -> None:
    run = start(uri)
    put(run, a_package(tmp_path / "1"), "unmeasured")
    assert best_of(run, "unmeasured") is None
    put(run, a_package(tmp_path / "2"), "unmeasured", (BEST,))
    put(run, a_package(tmp_path / "3"), "unmeasured", measured=measured(0.9, "a", "run1"))
    assert best_of(run, "unmeasured") == "2", "a person set it: it stays until a person moves it"


def test_the_means_of_two_packages_are_of_the_same_cases_or_they_are_not_compared() -> None:
    one, other = measured(0.8, "a b", "1"), measured(0.9, "b a", "2")
    assert one.on == other.on != measured(0.9, "a b c", "2").on
    assert better(other.tags, one.tags, "1")[0] and not better(one.tags, other.tags, "1")[0]
    renamed = Measured(dice={"spleen": 0.9}, cases=one.cases, trainings=("2",), dataset=one.dataset)
    assert not better(renamed.tags, one.tags, "1")[0], "another label"


@pytest.mark.parametrize("name", ["a/b", "a:b", "a@b", "plain"])
def test_a_model_gets_a_name_that_an_address_takes(uri: str, tmp_path: Path, name: str) -> None:
    put(start(uri), a_package(tmp_path / "package"), name)
    assert contents(fetch(f"models:/{registered_name(name)}@latest", tmp_path / "cache", uri))


def test_a_version_registered_by_an_earlier_hilum_is_fetched_as_it_was(uri: str, tmp_path: Path) -> None:
    run = start(uri)
    package = a_package(tmp_path / "package")
    run._client.log_artifacts(run.run_id, str(package), "package")
    run._client.create_registered_model("old")
    source = f"{run._client.get_run(run.run_id).info.artifact_uri}/package"
    run._client.create_model_version("old", source, run.run_id)
    assert contents(fetch("models:/old/1", tmp_path / "cache", uri)) == contents(package)


def test_a_long_card_is_cut_for_the_database_and_whole_in_the_run(uri: str, tmp_path: Path) -> None:
    run = start(uri)
    put(run, a_package(tmp_path / "package"), "wordy", note="word " * 3000)
    described = run._client.get_model_version("wordy", "1").description
    assert len(described) <= 5000 and described.endswith("(more in card.md)")


def test_mlflow_is_imported_by_need_only() -> None:
    code = (
        "import sys, pipeline.registry, pipeline.serving; sys.exit('mlflow' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
