"""An unfinished training of slides on disk: a file for every finished network, so that none is trained twice."""

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from preprocessing.records import decode, encode

from .. import seal
from ..config import SlideTraining
from ..errors import UsageError
from ..report import recover, write_whole
from ..workshop import refuse_changed
from .package import SlidePackage

DECISIVE = ("network", "network_options", "folds", "inner_folds", "epochs", "learning_rate", "weight_decay", "batch",
            "entropy_weight", "entropy_top", "seed")  # fmt: skip
"""Settings that decide the weights."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a training is, decided once."""

    settings: dict[str, Any]
    dataset: str
    """sha256 of all it is told."""
    runs: dict[str, str] = field(default_factory=dict)
    """The MLflow run of every part that has one."""


def decisive(settings: SlideTraining) -> dict[str, Any]:
    return {name: encode(getattr(settings, name)) for name in DECISIVE}


@dataclass(frozen=True, kw_only=True)
class SlideWorkshop:
    """Where an unfinished training lives, beside the package to be."""

    folder: Path
    out: Path

    @classmethod
    def beside(cls, out: Path) -> "SlideWorkshop":
        return cls(folder=out.with_name(f"{out.name}.training"), out=out)

    def open(self, settings: SlideTraining, dataset: str) -> None:
        """Fail now, not after an hour: a place that can be written, nothing of value in the way, and the same training."""
        recover(self.out)
        is_begun = (self.folder / "job.json").exists()
        if (
            self.out.exists()
            and not (is_begun and settings.resume)
            and (not self.out.is_dir() or any(self.out.iterdir()))
        ):
            raise UsageError(f"{self.out} is there already; a new or empty folder is needed. Give another --out.")
        if is_begun and not settings.resume:
            raise UsageError(
                f"{self.folder} holds an unfinished training of this package; it is not thrown away unasked. "
                "Go on with --resume, give another --out, or remove that folder."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        if not is_begun:
            self._write(Job(settings=decisive(settings), dataset=dataset))
        refuse_changed(self.job.settings, decisive(settings))
        if self.job.dataset != dataset:
            raise UsageError(
                f"{self.folder} was begun with other slides, features or labels; --resume goes on with the same ones. "
                "Bring them back, or begin anew with another --out."
            )

    @property
    def job(self) -> Job:
        path = self.folder / "job.json"
        return decode(Job, json.loads(path.read_text()), where=str(path))

    def remember(self, part: str, run_id: str) -> None:
        """The MLflow run of a part."""
        self._write(replace(self.job, runs=self.job.runs | {part: run_id}))

    def network(self, part: str) -> Path:
        """Where the finished network of a part is kept."""
        return self.folder / f"{part}.safetensors"

    def points(self, part: str) -> Path:
        """Where points of curves wait for a store that is away."""
        return self.folder / f"{part}.points.jsonl"

    @property
    def packed(self) -> SlidePackage | None:
        """The package this training made already, if it was killed after that."""
        if not (self.out / seal.FILE_NAME).exists():
            return None
        package = SlidePackage.load(self.out)
        if package.record.run_id not in self.job.runs.values():
            raise UsageError(f"{self.out} holds another package; a new or empty folder is needed. Give another --out.")
        return package

    def close(self) -> None:
        """The training is packed; what it worked with is not needed any more."""
        shutil.rmtree(self.folder)

    def _write(self, job: Job) -> None:
        write_whole(self.folder / "job.json", json.dumps(encode(job), indent=2))
