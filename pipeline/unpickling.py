"""Tensors out of a torch checkpoint, which is a pickle and may run whatever it likes: in a process apart, weights only.

torch's reader of weights builds tensors, numbers and their containers and calls nothing else. Should that ever fail, it
fails in a child that can start no process, open no connection and write nothing but the files it was told; what comes
back is safetensors and JSON.
"""

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .errors import PackageError

REFUSED, TIME_S = 2, 600
"""What the child leaves with when the file is refused; how long a checkpoint may take: a slow disk, not an endless loop."""


def unpickle(checkpoints: Mapping[Path, Path], under: str = "") -> list[dict[str, Any]]:
    """Of each checkpoint the tensors as safetensors in the file beside it: those `under` a key, or all of it. Returned is what
    else each says in plain words and numbers. One child reads them all."""
    with tempfile.TemporaryDirectory() as folder:
        facts, job = Path(folder) / "facts.json", [[str(one), str(weights)] for one, weights in checkpoints.items()]
        command = [sys.executable, "-P", "-m", __name__, json.dumps(job), str(facts), under]
        try:
            done = subprocess.run(command, capture_output=True, timeout=TIME_S * len(job), env=_surroundings())
        except subprocess.TimeoutExpired:
            raise PackageError(
                f"{_names(checkpoints)} took more than {TIME_S} s each to read; a checkpoint takes seconds. Look at where it "
                "came from."
            ) from None
        if done.returncode == REFUSED:
            raise PackageError(json.loads(facts.read_text())["refused"])
        if done.returncode != 0:
            raise PackageError(
                f"{_names(checkpoints)} stopped the process that read it ({_last(done.stderr) or f'exit {done.returncode}'}); a "
                "whole checkpoint of tensors is needed. Copy it anew, and look at where it came from."
            )
        told: list[dict[str, Any]] = json.loads(facts.read_text())
        return told


def _names(checkpoints: Mapping[Path, Path]) -> str:
    return ", ".join(f"{path.parent.name}/{path.name}" for path in checkpoints)


def _surroundings() -> dict[str, str]:
    """Nothing of ours that a checkpoint could read: no keys, no tokens. And no module from the folder we happen to be in, which
    may be the one that came with it."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "HOME", "TMPDIR") if name in os.environ}
    places = [str(Path(__file__).resolve().parents[1]), *(place for place in sys.path if place)]
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(places), "PYTHONDONTWRITEBYTECODE": "1"}


def _last(said: bytes) -> str:
    lines = said.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


# in the child


def _main(job: list[list[str]], facts: Path, under: str) -> int:
    import torch
    from safetensors.torch import save

    torch.set_num_threads(1)
    files = [(Path(checkpoint), Path(weights)) for checkpoint, weights in job]
    size = max(checkpoint.stat().st_size for checkpoint, _ in files)
    _confine(size, {str(facts), *(str(weights) for _, weights in files)})
    told = []
    for checkpoint, weights in files:
        try:
            with torch.serialization.safe_globals(list(_plain_types())):
                said = _said(checkpoint)
            weights.write_bytes(save(_tensors(said[under] if under else said)))
        except Exception as error:  # whatever is wrong with it, the parent tells it
            facts.write_text(json.dumps({"refused": _refusal(checkpoint, under, error)}))
            return REFUSED
        told.append(_plainly({key: value for key, value in said.items() if key != under} if under else {}))
    facts.write_text(json.dumps(told))
    return 0


def _said(checkpoint: Path) -> Any:
    """Of a TorchScript file, which is a program with tensors, the tensors; the program is not called."""
    import torch

    if zipfile.is_zipfile(checkpoint):
        with zipfile.ZipFile(checkpoint) as archive:
            is_program = any("/code/" in name for name in archive.namelist())
        if is_program:
            return torch.jit.load(checkpoint, map_location="cpu").state_dict()
    return torch.load(checkpoint, map_location="cpu", weights_only=True)


def _refusal(checkpoint: Path, under: str, error: Exception) -> str:
    reason = " ".join(str(error).split())
    if isinstance(error, KeyError | TypeError) and under:
        reason = f"it has no {under}"
    told = reason.split("Please file an issue")[0].split("(1) In PyTorch")[0][:400].strip()
    return (
        f"{checkpoint.parent.name}/{checkpoint.name} was not read ({told}); a torch checkpoint of tensors, numbers and "
        "words is needed, for anything else in it could run. If you trust where it came from, load it there and save its weights alone."
    )


def _plain_types() -> Iterable[Any]:
    """What nnU-Net's log of a training is made of beside tensors: numpy's numbers, by their names of before numpy 2 too."""
    import numpy as np
    from numpy._core import multiarray

    yield from ((multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core"))
    yield np.dtype
    yield from {type(np.dtype(kind)) for kind in ("float64", "float32", "float16", "int64", "int32", "uint8", "bool")}


def _tensors(said: Any) -> dict[str, Any]:
    """By name, each with memory of its own: safetensors shares none."""
    import torch

    if not isinstance(said, Mapping) or not said or not all(isinstance(one, torch.Tensor) for one in said.values()):
        raise ValueError("it is no table of tensors by name")
    return {str(name): tensor.detach().clone().contiguous() for name, tensor in said.items()}


def _plainly(value: Any, depth: int = 8) -> Any:
    """Words, numbers and their lists and tables; what is neither is left out as null. Nothing of a training is deeper."""
    if isinstance(value, Mapping) and depth:
        return {str(key): _plainly(item, depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple) and depth:
        return [_plainly(item, depth - 1) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return None


FORBIDDEN = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.kill", "pty.",
             "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate",
             "shutil.", "ftplib.", "smtplib.", "urllib.", "http.", "webbrowser.", "signal.pthread_kill")  # fmt: skip
"""Audit events (Python's table of them) of which reading weights has none."""


def _confine(size: int, written: set[str]) -> None:
    """From here on this process starts nothing, connects to nothing, writes what it was told to and does not grow without end."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 2**26,) * 2)
    # beside what torch's libraries take up: the file, its tensors, their copies, and the optimiser's twice
    resource.setrlimit(resource.RLIMIT_AS, (_taken() + 6 * size + 2**30,) * 2)

    def watch(event: str, said: tuple[Any, ...]) -> None:
        if event.startswith(FORBIDDEN):
            raise PermissionError(f"it tried {event}")
        if event == "open" and _writes(said) and str(said[0]) not in written:
            raise PermissionError("it tried to write a file")

    sys.addaudithook(watch)


def _taken() -> int:
    """Bytes of addresses that this process has; where no system tells it, so many that the limit limits little."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else 2**36


def _writes(said: tuple[Any, ...]) -> bool:
    _, mode, flags = (*said, None, None)[:3]
    if isinstance(mode, str):
        return bool(set(mode) & set("wax+"))
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


if __name__ == "__main__":
    sys.exit(_main(json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
