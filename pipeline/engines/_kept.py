"""Exported files in hilum's home, for the engines that need one: made once, and measured once by each engine.

A folder for every package and every set of versions that has a say in the file. Two processes that need it at once do not
meet: one makes it, the other waits and finds it; where locks do not work both make it and one of them is kept, whole.
"""

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from preprocessing.cores import usable_cores
from preprocessing.records import BadRecord, decode, encode

from .. import seal, tracking
from ..errors import UsageError
from ..export import Agreement, Answer, compared, described, missing_extra, onnx_of, refuse_unless_equal
from ..package import ModelPackage
from ..prediction import Inference
from ..report import hilum_version, swap, write_whole

FOLDER = "exports"
"""In hilum's home. Nothing but time is lost when it is deleted."""
Opened = TypeVar("Opened", bound=Any)
"""An engine: a frozen dataclass that has `words`."""
CONTENTS = "files.json"
"""sha256 of every exported file beside it; written last."""


def kept(package: ModelPackage) -> tuple[Path, ...]:
    """An ONNX file for every fold, in the package's order."""
    folder = folder_of(package)
    if not _is_whole(folder, package):
        with seal.alone(folder):
            if not _is_whole(folder, package):  # another process may have made it while this one waited
                _make(folder, package)
    return tuple(folder / _file(fold) for fold in package.record.folds)


def folder_of(package: ModelPackage) -> Path:
    """Of this package, written by the versions that are here."""
    try:
        versions = seal.versions_of(("torch", "onnx", "onnxscript"))
    except ImportError as error:  # PackageNotFoundError is one
        raise missing_extra(error, "engines that run ONNX files", "onnx") from None
    said = json.dumps([package.id, hilum_version(), versions])
    return tracking.home() / FOLDER / f"{package.id[:12]}-{sha256(said.encode()).hexdigest()[:12]}"


def measured(
    package: ModelPackage, engine: str, version: str, precision: str, answers: Sequence[Answer]
) -> tuple[Agreement, ...]:
    """How near each fold's answers come to torch's float32: measured on the first use, read on every other."""
    path = folder_of(package) / f"{engine}-{version}-{precision}.json"
    with suppress(OSError, ValueError, BadRecord):
        return tuple(decode(Agreement, one, where=path.name) for one in json.loads(path.read_text()))
    networks = package.networks()
    found = tuple(compared(network, answer, package) for network, answer in zip(networks, answers, strict=True))
    if precision == "float32":  # less precise numbers are asked for as such: there it is only told what they change
        for agreement in found:
            refuse_unless_equal(agreement, f"{package.record.network} in {engine} {version}")
    write_whole(path, json.dumps(encode(found)))
    return found


def checked(
    package: ModelPackage, engine: str, version: str, precision: str, answers: Sequence[Opened]
) -> tuple[Opened, ...]:
    """The same engines, compared with torch; each says what it is and how near it came."""
    found = measured(package, engine, version, precision, answers)
    words = f"{engine} {version}, {precision}, {usable_cores()} threads; {told(found, precision)}"
    return tuple(replace(answer, words=words) for answer in answers)


def told(found: Sequence[Agreement], precision: str) -> str:
    """What was measured, for the report: of the fold that is farthest from torch."""
    worst = max(found, key=lambda one: one.difference / one.bound)
    if precision == "float32":
        return f"checked against torch: {worst.words}"
    return (
        f"checked against torch in float32: largest difference of a logit {worst.difference:.1e} for logits up to "
        f"{worst.largest:.3g}, {worst.differing:.2%} of voxels with another label, on windows of noise"
    )


def refuse_other_devices(how: Inference, engine: str) -> None:
    """Here they run on the processor; `auto` means that one."""
    if how.device not in ("auto", "cpu"):
        raise UsageError(
            f"device {how.device!r} was asked for with engine {engine}, which runs on the processor; cpu is needed. "
            "Leave --device out, or use --engine torch."
        )


def _is_whole(folder: Path, package: ModelPackage) -> bool:
    """Every file is there, byte for byte as it was made."""
    try:
        contents = json.loads((folder / CONTENTS).read_text())
        return all(seal.sha256_of(folder / _file(fold)) == contents[_file(fold)] for fold in package.record.folds)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _make(folder: Path, package: ModelPackage) -> None:
    building = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        for fold, network in zip(package.record.folds, package.networks(), strict=True):
            plan = package.plan
            content = onnx_of(network, len(plan.channels), plan.patch, package.record.network, described(package, fold))
            (building / _file(fold)).write_bytes(content)
        contents = {path.name: seal.sha256_of(path) for path in building.iterdir()}
        (building / CONTENTS).write_text(json.dumps(contents))
        swap(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _file(fold: str) -> str:
    return f"fold-{fold}.onnx"
