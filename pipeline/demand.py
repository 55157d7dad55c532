"""What a network asks for: stages that suit a window, sides it accepts, and the memory of a training step.

Only torch can tell, and it takes seconds to load. So what was told is kept in hilum's home, by network, settings and the
code that told it, and torch is loaded for what nobody has asked yet: in this process, or (`Elsewhere`) in another one.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import networks
from preprocessing.plan import Recipe, Triple
from preprocessing.records import BadRecord, decode, encode

from .report import write_whole
from .tracking import home

Precision = Literal["float32", "bfloat16"]
Spacing = tuple[float, float, float]
Settings = dict[str, Any]
"""A network's Config as a record."""

Question = dict[str, Any]
Find = Callable[[Question], Any]
"""Who answers what nobody has asked yet, as `{"is": ...}` or `{"refused": ...}`."""

PROCESS_GB = {"cpu": 1.0, "cuda": 0.0}
"""What the process holds before its first step. Measured: Python, torch, Lightning and MLflow, 0.96 to 1.06 GB; what CUDA
holds of a GPU is missing from its free memory already."""
BESIDE_GB = {"cpu": 0.1, "cuda": 0.3}
"""What lies beside the tensors: on a CPU oneDNN's own and the allocator's gaps, measured 0.05 to 0.15 GB; on a GPU cuDNN's
workspaces, an allowance that nobody has measured here."""
GAPS = {"cpu": 1.0, "cuda": 1.1}
"""torch's allocator on a GPU hands out blocks that do not quite fill its segments."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of tensors in a training step."""

    held: int
    """From step to step: weights, what the optimiser keeps of each, their running mean."""
    peak: int
    """At most at once, what is held included."""

    def gigabytes(self, kind: str) -> float:
        """With everything beside the tensors, on a `cpu` or on `cuda`; the process before its first step not counted."""
        return self.peak / 1e9 * GAPS[kind] + BESIDE_GB[kind]

    def demand(self, voxels: int, kind: str) -> tuple[float, float]:
        """Gigabytes that do not grow, and bytes per voxel of all windows of a step: the stages being the same, memory grows
        along a straight line from what is held (benchmarks/plan_memory.py)."""
        return self.held / 1e9 * GAPS[kind] + BESIDE_GB[kind], (self.peak - self.held) / voxels * GAPS[kind]


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network as planning knows it: settings go in, numbers come out."""

    name: str
    find: Find

    def knows(self) -> frozenset[str]:
        """The names of its settings."""
        return frozenset(self._ask("knows"))

    def fit(self, settings: Settings, patch: Triple, spacing: Spacing) -> Settings:
        """The settings, checked, with the stages that suit this window."""
        fitted: Settings = self._ask("fit", settings=settings, patch=patch, spacing=spacing)
        return fitted

    def divisor(self, fitted: Settings) -> Triple:
        """What each side of a window must be a multiple of."""
        i, j, k = self._ask("divisor", settings=fitted)
        return i, j, k

    def step(
        self, fitted: Settings, *, channels: int, classes: int, patch: Triple, batch: int, recipe: Recipe,
        precision: Precision,
    ) -> Footprint:  # fmt: skip
        """A training step on so many windows."""
        counted = self._ask(
            "step", settings=fitted, channels=channels, classes=classes, patch=patch, batch=batch, precision=precision,
            recipe={"optimiser": recipe.optimiser, "average": recipe.average},
        )  # fmt: skip
        return Footprint(**counted)

    def _ask(self, what: str, **more: Any) -> Any:
        answer = answered({"ask": what, "network": self.name, **encode(more)}, self.find)
        if "refused" in answer:
            raise REFUSALS[answer["refused"]](answer["because"])
        return answer["is"]


REFUSALS: dict[str, type[Exception]] = {"BadRecord": BadRecord, "ValueError": ValueError}
"""What settings or a window can be refused with."""


def answered(question: Question, find: Find) -> dict[str, Any]:
    """As it was told before, or found now and kept."""
    path = home() / "demands" / f"{_code()}.json"
    told, key = _told(path), json.dumps(question, sort_keys=True)
    if key not in told:
        told[key] = find(question)
        with suppress(OSError):  # a home that cannot be written to only costs time
            path.parent.mkdir(exist_ok=True)
            write_whole(path, json.dumps(told, indent=1))
    answer: dict[str, Any] = told[key]
    return answer


def _told(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # nobody has asked yet, or half a disk
        return {}
    return told if isinstance(told, dict) else {}


@lru_cache(maxsize=1)
def _code() -> str:
    """Of everything that an answer follows from: our own files, and torch and MONAI, which some networks are made of."""
    floors = [Path(networks.__file__).parent, Path(networks.__file__).parent.parent / "kernels"]
    files = [file for floor in floors for file in sorted(floor.rglob("*.py"))]
    files += [Path(__file__).parent / name for name in ("demand.py", "footprint.py", "budget.py", "engines/torch.py")]
    seen = hashlib.sha256(" ".join(metadata.version(name) for name in ("torch", "monai")).encode())
    for file in files:
        seen.update(file.read_bytes())
    return seen.hexdigest()[:16]


def here(question: Question) -> dict[str, Any]:
    """Found in this process, by torch."""
    try:
        return {"is": ANSWERS[question["ask"]](**{key: value for key, value in question.items() if key != "ask"})}
    except (BadRecord, ValueError) as refusal:
        kind = "BadRecord" if isinstance(refusal, BadRecord) else "ValueError"
        return {"refused": kind, "because": str(refusal)}


def _knows(network: str) -> list[str]:
    return sorted(known.name for known in fields(networks.load(network).Config))


def _fit(network: str, settings: Settings, patch: list[int], spacing: list[float]) -> Settings:
    module = networks.load(network)
    fitted: Settings = encode(module.fit(_config(network, settings), patch=tuple(patch), spacing=tuple(spacing)))
    return fitted


def _divisor(network: str, settings: Settings) -> list[int]:
    return list(networks.load(network).divisor(_config(network, settings)))


def _step(
    network: str, settings: Settings, channels: int, classes: int, patch: list[int], batch: int, precision: Precision,
    recipe: dict[str, Any],
) -> dict[str, int]:  # fmt: skip
    from .footprint import footprint  # not at the top: torch

    module, config = networks.load(network), _config(network, settings)
    i, j, k = patch
    step = footprint(
        lambda: module.build(config, channels=channels, classes=classes), channels=channels, patch=(i, j, k),
        batch=batch, recipe=Recipe(**recipe), precision=precision,
    )  # fmt: skip
    return {"held": step.held, "peak": step.peak}


def _config(network: str, settings: Settings) -> Any:
    return decode(networks.load(network).Config, settings, where=f"network_options of {network}")


ANSWERS: dict[str, Callable[..., Any]] = {"knows": _knows, "fit": _fit, "divisor": _divisor, "step": _step}


class Elsewhere:
    """Another process of ours that loads torch and answers, one question a line; it begins with the first question."""

    def __init__(self) -> None:
        self.child: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Elsewhere":
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        if self.child and failed:
            self.child.kill()
        if self.child:
            self.child.communicate()  # it ends when nothing more can come

    def __call__(self, question: Question) -> dict[str, Any]:
        self.child = self.child or _begun()
        assert self.child.stdin and self.child.stdout
        line = ""
        with suppress(BrokenPipeError):
            self.child.stdin.write(json.dumps(question) + "\n")
            self.child.stdin.flush()
            line = self.child.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that counts for {question['network']} ended without an answer")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _begun() -> "subprocess.Popen[str]":
    """The same Python with the same places to import from, and no others (-P: not the folder it is called in)."""
    surroundings = os.environ | {"PYTHONPATH": os.pathsep.join(str(Path(place).absolute()) for place in sys.path)}
    words = [sys.executable, "-P", "-c", f"from {__name__} import serve; serve()"]
    # a session of its own: Ctrl-C is for who asked
    return subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=surroundings, start_new_session=True
    )


def serve() -> None:
    """Questions from stdin, answers to stdout, until there are no more."""
    for line in sys.stdin:
        sys.stdout.write(json.dumps(here(json.loads(line))) + "\n")
        sys.stdout.flush()
