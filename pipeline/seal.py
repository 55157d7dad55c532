"""A package is a folder whose package.json names every other file by its hash and carries its own: whole, or refused."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from preprocessing.records import BadRecord, decode, encode

from .errors import DamagedPackage, PackageError
from .names import PACKAGE
from .report import hilum_version, recover, swap

if TYPE_CHECKING:
    from torch import nn

FILE_NAME = PACKAGE

FETCH_AGAIN = "A package must be byte for byte what was written: fetch it again from where it came."

VERBS = {"scans": ("train", "segment"), "slides": ("slides train", "slides classify")}
VERBS |= {"tiles": VERBS["slides"]}
"""What makes a package of each kind, and what uses it. One for scans says no kind: there was but one when it was thought up."""

Record = TypeVar("Record")
"""A frozen dataclass with the fields `format`, `hilum`, `files` (sha256 by name) and `id`; all it says is sealed."""


def read(folder: Path, record_type: type[Record], *, kinds: Sequence[str], formats: Sequence[int]) -> Record:
    """What package.json says; refused when a byte of the folder changed, or it is no package of these kinds and formats."""
    recover(folder)
    path = folder / FILE_NAME
    if not path.is_file():
        raise PackageError(
            f"{folder} holds no {FILE_NAME}; a finished package is needed. Train one with `hilum {VERBS[kinds[0]][0]}`, or "
            "finish an unfinished training with `--resume`."
        )
    try:
        raw = path.read_text()
        said = json.loads(raw)
        _refuse_others(folder, said, kinds, formats)
        record: Any = decode(record_type, said, where=FILE_NAME)
    except OSError as error:
        raise PackageError(
            f"{path} cannot be opened ({error.strerror}); it must be readable. Mend its permissions."
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError, BadRecord) as error:
        raise DamagedPackage(f"{path} cannot be read ({error}). {FETCH_AGAIN}") from None
    if raw != _written(said) or record.id != _digest(said):  # of what is written: an older format says less
        raise DamagedPackage(f"{path} is not as it was sealed (id {record.id[:12]}). {FETCH_AGAIN}")
    for name, sha256 in record.files.items():
        _verify(folder, name, sha256)
    return record


def kind_of(folder: Path) -> str:
    """What its package is for, before anything in it is believed: who reads it whole then says what is wrong."""
    with suppress(OSError, ValueError):
        said = json.loads((folder / FILE_NAME).read_text())
        if isinstance(said, dict) and said.get("kind") in VERBS:
            return said["kind"]
    return "scans"


def write(folder: Path, record: Record, fill: Callable[[Path, Record], None]) -> None:
    """A sealed folder in the place of an older one, which stays until the new one is whole. `fill` writes all other files."""
    building = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    as_read: Any = decode(type(record), encode(record), where=FILE_NAME)  # a whole number may become 3.0
    fill(building, as_read)
    as_read = replace(as_read, files={path.name: sha256_of(path) for path in sorted(building.iterdir())})
    (building / FILE_NAME).write_text(rendered(replace(as_read, id=sealed(as_read))))
    swap(building, folder)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Trainings that end at the same moment wait for each other; the system lets go when the holder is killed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    parent = os.open(folder.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(parent, fcntl.LOCK_EX)
        yield
    finally:
        os.close(parent)


def write_weights(network: "nn.Module", path: Path) -> None:
    """As safetensors: numbers and their names, nothing that runs."""
    from safetensors.torch import save

    state = {key: tensor.detach().cpu().contiguous() for key, tensor in network.state_dict().items()}
    # not by safetensors' own save_file: what it writes is readable by its writer alone
    path.write_bytes(save(state))


def read_weights(network: "nn.Module", path: Path) -> "nn.Module":
    """The network with the weights of that file, ready to evaluate."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        network.load_state_dict(load_file(path), strict=True)
    except (SafetensorError, RuntimeError) as error:  # sealed so by whoever made it
        raise DamagedPackage(f"{path.name} holds no weights of this network ({error}). {FETCH_AGAIN}") from None
    return network.eval()


def versions_of(names: Sequence[str]) -> dict[str, str]:
    """Of distributions that are installed."""
    return {name: version(name) for name in names}


def rendered(record: Any) -> str:
    """As package.json holds it."""
    return _written(encode(record))


def sealed(record: Any) -> str:
    """The id of a record: sha256 of all it says but that."""
    return _digest(encode(record))


def _written(said: Any) -> str:
    return json.dumps(said, indent=2, ensure_ascii=False) + "\n"


def _digest(said: Any) -> str:
    return hashlib.sha256(json.dumps(said | {"id": ""}, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _refuse_others(folder: Path, said: Any, kinds: Sequence[str], formats: Sequence[int]) -> None:
    """Before anything else is read of it: another kind or format has other words."""
    if not isinstance(said, dict):
        return
    kind = said.get("kind", "scans")
    if kind in VERBS and kind not in kinds:
        raise PackageError(
            f"{folder} is a package for {kind}; one for {' or '.join(kinds)} is needed. "
            f"Use it with `hilum {VERBS[kind][1]}`, or give another package."
        )
    if isinstance(found := said.get("format"), int) and found not in formats:
        raise PackageError(
            f"{folder} was written in format {found} by hilum {said.get('hilum', 'of an unknown version')}; this hilum "
            f"({hilum_version()}) reads format {' and '.join(map(str, formats))}. Use it with the hilum that made it, or "
            "train it again with this one."
        )


def _verify(folder: Path, name: str, sha256: str) -> None:
    path = folder / name
    if Path(name).name != name or not path.is_file():
        raise DamagedPackage(f"{folder} lacks {name}, which its package.json lists. {FETCH_AGAIN}")
    if not os.access(path, os.R_OK):
        raise PackageError(f"{path} may not be read by this user; it must be. Mend its permissions.")
    if sha256_of(path) != sha256:
        raise DamagedPackage(f"{path} changed since it was packed (sha256 differs). {FETCH_AGAIN}")
