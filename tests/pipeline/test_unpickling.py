"""Checkpoints are read in a process apart, as tensors and plain words; what would run is refused and does not run."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline import unpickling
from pipeline.errors import PackageError
from pipeline.unpickling import unpickle

pytestmark = pytest.mark.slow


class Runs:
    """Whoever unpickles it calls a function."""

    def __init__(self, function: Any, *words: Any) -> None:
        self.called = function, words

    def __reduce__(self) -> tuple[Any, ...]:
        return self.called


def test_tensors_come_out_as_safetensors_and_the_rest_as_plain_words(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    said = {
        "weights": {"a": shared.view(2, 3), "b": shared, "half": torch.ones(2, dtype=torch.float16)},
        "log": {"dice": [np.float64(0.5), np.float32(0.25), float("nan")], "epoch": 7, "deep": {"name": "x"}},
        "device": torch.device("cuda"),
    }
    torch.save(said, tmp_path / "one.pth")
    torch.save({"weights": {"a": torch.zeros(1)}}, tmp_path / "two.pth")
    files = {tmp_path / f"{name}.pth": tmp_path / f"{name}.safetensors" for name in ("one", "two")}
    first, second = unpickle(files, "weights")
    there = load_file(tmp_path / "one.safetensors")
    assert {name: tensor.shape for name, tensor in there.items()} == {"a": (2, 3), "b": (6,), "half": (2,)}
    assert there["half"].dtype == torch.float16
    assert first["log"]["epoch"] == 7 and first["log"]["deep"] == {"name": "x"}
    assert first["log"]["dice"][0] == 0.5 and first["log"]["dice"][2] is None
    assert first["device"] is None and second == {}


BOMBS = {
    "writes a file": lambda place: Runs(Path.write_text, place / "it ran", "boom"),
    "asks the shell": lambda place: Runs(os.system, f"touch '{place / 'it ran'}'"),
    "runs code": lambda place: Runs(eval, f"open({str(place / 'it ran')!r}, 'w')"),
}


@pytest.mark.parametrize("what", BOMBS)
def test_a_pickle_that_runs_something_runs_nothing(what: str, tmp_path: Path) -> None:
    """As torch packs it; and one as a bare pickle that calls itself a checkpoint."""
    said = {"weights": {}, "more": BOMBS[what](tmp_path)}
    if what == "runs code":
        (tmp_path / "bomb.pth").write_bytes(pickle.dumps(said))
    else:
        torch.save(said, tmp_path / "bomb.pth")
    with pytest.raises(PackageError, match="anything else in it could run"):
        unpickle({tmp_path / "bomb.pth": tmp_path / "out.safetensors"}, "weights")
    assert not (tmp_path / "it ran").exists() and not (tmp_path / "out.safetensors").exists()


def test_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.pth").write_bytes(b"these are no weights")
    with pytest.raises(PackageError, match="was not read"):
        unpickle({tmp_path / "one.pth": tmp_path / "one.safetensors"}, "weights")


def test_a_module_that_came_with_a_checkpoint_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text(f"open({str(tmp_path / 'it ran')!r}, 'w')")
    torch.save({"a": torch.zeros(1)}, tmp_path / "one.pth")
    monkeypatch.chdir(tmp_path)
    unpickle({tmp_path / "one.pth": tmp_path / "one.safetensors"})
    assert not (tmp_path / "it ran").exists()


# the second fence, should torch's reader ever call what it should not


FENCED = {
    "starts a process": "import subprocess; subprocess.run(['true'])",
    "asks the shell": "import os; os.system('true')",
    "opens a connection": "import socket; socket.create_connection(('127.0.0.1', 9), timeout=1)",
    "writes a file": "open(OTHER, 'w')",
    "writes a file the other way": "import os; os.open(OTHER, os.O_WRONLY | os.O_CREAT)",
    "removes a file": "import os; os.remove(OTHER)",
    "takes all memory": "bytearray(2**40)",
}


@pytest.mark.parametrize("what", FENCED)
def test_the_process_that_reads_can_do_nothing_else(what: str, tmp_path: Path) -> None:
    allowed, other = tmp_path / "allowed", tmp_path / "other"
    if "removes" in what:
        other.touch()
    code = (
        f"from pipeline import unpickling; unpickling._confine(1000, {{{str(allowed)!r}}}); OTHER = {str(other)!r}\n"
        f"open({str(allowed)!r}, 'w').write('x')\ntry:\n    {FENCED[what]}\nexcept (PermissionError, MemoryError):\n    print('fenced')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(unpickling.__file__).parents[1]
    )
    assert done.stdout.strip() == "fenced", done.stderr
    assert allowed.read_text() == "x" and other.exists() == ("removes" in what)
