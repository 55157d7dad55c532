"""What benchmarks against nnU-Net share: one dataset for both, its commands in its own environment, a watch over each."""

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench

from pipeline.demonstration import write_dataset
from pipeline.progress import silent
from pipeline.report import hilum_version
from pipeline.tracking import code_version
from preprocessing.datasets import CaseFiles, Dataset
from preprocessing.files import stem

HILUM = (sys.executable, "-c", "import logging, sys; logging.basicConfig(level=logging.INFO, stream=sys.stderr); "
         "from pipeline.cli import main; sys.exit(main())")  # fmt: skip
"""The command `hilum`, with what it logs on stderr."""
FIRST_STEP = "first step"
"""What hilum and our trainers of nnU-Net say when the first training step is done."""


class CommandFailed(RuntimeError):
    """A command of hilum or nnU-Net ended with an error."""


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A command that has run: how long it took, and when it said what."""

    seconds: float
    lines: tuple[tuple[float, str], ...]

    def first(self, words: str) -> float | None:
        """Seconds until a line with these words appeared."""
        return next((moment for moment, line in self.lines if words in line), None)


def watch(words: Sequence[str | Path], folder: Path, environment: Mapping[str, str], until: str = "") -> Watched:
    """Runs a command in that folder to its end, or until it says `until`, when it and all its children are killed."""
    said: list[tuple[float, str]] = []
    started = time.perf_counter()
    child = subprocess.Popen(
        [str(word) for word in words], cwd=folder, env=dict(environment), text=True, errors="replace",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    assert child.stdout
    met = False
    try:
        for line in child.stdout:
            said.append((time.perf_counter() - started, line.rstrip()))
            if met := bool(until) and until in line:
                break
        if not met:
            child.wait()
        seconds = time.perf_counter() - started
    finally:
        _end(child)
    if child.returncode and not met:
        told = "\n".join(line for _, line in said[-30:])
        raise CommandFailed(f"{' '.join(map(str, words))} ended with {child.returncode}:\n{told}")
    if until and not met:
        raise CommandFailed(f"{' '.join(map(str, words))} ended without having said {until!r}.")
    return Watched(seconds=seconds, lines=tuple(said))


def _end(child: "subprocess.Popen[str]") -> None:
    """Its children too: nnU-Net leaves processes behind that augment for nobody."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def environment(**more: str | Path) -> dict[str, str]:
    """Ours, without what would limit the threads of either or lend it an earlier run's cache."""
    limits = ("OMP_", "MKL_", "OPENBLAS_", "nnUNet_", "HILUM_", "MLFLOW_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(limits)}
    return kept | {"MLFLOW_DISABLE_TELEMETRY": "true"} | {name: str(value) for name, value in more.items()}


@dataclass(frozen=True, kw_only=True)
class NnUNet:
    """nnU-Net v2 in a folder of its own, by its public commands."""

    python: Path
    """The interpreter it is installed for; its commands lie beside it."""
    folder: Path
    """Holds raw/, preprocessed/ and results/."""

    name = "Dataset001_Benchmark"

    @property
    def dataset(self) -> Path:
        """Where its raw dataset is to be laid out."""
        return self.folder / "raw" / self.name

    @property
    def preprocessed(self) -> Path:
        return self.folder / "preprocessed" / self.name

    def results(self, trainer: str) -> Path:
        return self.folder / "results" / self.name / f"{trainer}__nnUNetPlans__3d_fullres" / "fold_0"

    def run(self, command: str, *words: str | Path, until: str = "", **more: str | Path) -> Watched:
        """One of its commands; `more` goes into its environment."""
        places = {f"nnUNet_{place}": self.folder / place for place in ("raw", "preprocessed", "results")}
        trainers = Path(__file__).parent / "nnunet_trainers"
        surroundings = environment(**places, nnUNet_extTrainer=trainers, **more)
        return watch((self.python.with_name(command), *words), self.folder, surroundings, until)

    def versions(self) -> dict[str, str]:
        code = (
            "import json, platform, torch; from importlib.metadata import version; print(json.dumps({"
            "'nnunetv2': version('nnunetv2'), 'python': platform.python_version(), 'torch': torch.__version__}))"
        )
        done = subprocess.run([self.python, "-c", code], capture_output=True, text=True, check=True)
        told: dict[str, str] = json.loads(done.stdout)
        return told


def phantoms(folder: Path, count: int) -> Path:
    """A dataset of made-up patients, where none was given."""
    write_dataset(folder, range(count), silent)
    return folder


def lay_out(dataset: Dataset, cases: Sequence[CaseFiles], folder: Path) -> Path:
    """These cases in nnU-Net's layout, which hilum reads too, as links."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    first = cases[0].images[0]
    ending = first.name.removeprefix(stem(first))
    for case in cases:
        assert case.labels and len(case.images) == len(dataset.channels), f"{case.id}: one file per channel, and labels"
        for channel, image in enumerate(case.images):
            (folder / "imagesTr" / f"{case.id}_{channel:04d}{ending}").symlink_to(image.resolve())
        (folder / "labelsTr" / f"{case.id}{ending}").symlink_to(case.labels.resolve())
    description = {
        "name": dataset.name,
        "channel_names": {str(number): name for number, name in enumerate(dataset.channels)},
        "labels": {"background": 0} | {label.name: label.value for label in dataset.labels},
        "numTraining": len(cases),
        "file_ending": ending,
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=2))
    return folder


def machine() -> dict[str, Any]:
    return {
        "chip": bench.chip(),
        "cores": bench.cores(),
        "platform": platform.platform(),
        "load": round(os.getloadavg()[0], 2),
    }


def confine(count: int) -> None:
    """This process and its children to so many cores."""
    if (there := bench.cores()) < count:
        raise SystemExit(f"{there} cores are there; {count} are needed. Say --cores {there}.")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def our_versions() -> dict[str, str]:
    import torch

    code = code_version()
    return {"hilum": hilum_version(), "code": code, "python": platform.python_version(), "torch": torch.__version__}
