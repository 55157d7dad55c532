"""An unfinished training on disk: what it is made of, decided once, and where it stands. A resumed run reads both."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preprocessing.plan import Fingerprint, Plan, Recipe
from preprocessing.records import decode, encode

from .config import Train
from .errors import UsageError
from .package import ModelPackage
from .report import write_whole


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a training is, decided once: a resumed run reads it instead of deciding again."""

    plan: Plan
    network: str
    network_config: dict[str, Any]
    recipe: Recipe
    epochs: int
    """How many there are, unless minutes end the training."""
    steps_per_epoch: int
    trained_on: tuple[str, ...]
    held_out: tuple[str, ...]
    settings: dict[str, Any]
    """The settings that decide the weights; a resumed run must have been given the same."""
    run_id: str = ""


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """Where an unfinished training lives, beside the package to be: job.json and last.ckpt."""

    folder: Path

    @property
    def has_job(self) -> bool:
        return (self.folder / "job.json").exists()

    @property
    def checkpoint(self) -> Path | None:
        path = self.folder / "last.ckpt"
        return path if path.exists() else None

    def packed(self, out: Path, fold: int | str) -> ModelPackage | None:
        """The package this training made already, if it was killed after that."""
        if not (self.has_job and (out / "package.json").exists()):
            return None
        package, run_id = ModelPackage.load(out), self.resumed_job().run_id
        made = package.record.folds.get(str(fold))
        return package if made and run_id and made.run_id == run_id else None

    def open(self, out: Path, settings: Train) -> None:
        """Fail now, not after an hour: a place that can be written, nothing of value in the way."""
        if (out / "package.json").exists() and str(settings.fold) in ModelPackage.load(out).record.folds:
            raise UsageError(
                f"{out} already holds fold {settings.fold}; a new place is needed. Give another --out or --fold."
            )
        if out.exists() and not (out / "package.json").exists() and any(out.iterdir()):
            raise UsageError(f"{out} holds other files; an empty or new folder is needed. Give another --out.")
        if self.has_job and not settings.resume:
            raise UsageError(
                f"{self.folder} holds an unfinished training of this package; it is not thrown away unasked. "
                "Go on with --resume, give another --out, or remove that folder."
            )
        self.folder.mkdir(parents=True, exist_ok=True)

    def begin(self, job: Job, fingerprint: Fingerprint) -> None:
        """What the training is made of, before its first step; what MLflow is shown names no case."""
        facts = encode(fingerprint) | {"cases": [encode(facts) for facts in fingerprint.cases.values()]}
        write_whole(self.folder / "fingerprint.json", json.dumps(facts))
        job.plan.write(self.folder / "plan.yaml")
        self.remember(job)

    def remember(self, job: Job) -> None:
        write_whole(self.folder / "job.json", json.dumps(encode(job), indent=2))

    def resumed_job(self) -> Job:
        return decode(Job, json.loads((self.folder / "job.json").read_text()), where=str(self.folder / "job.json"))

    def close(self) -> None:
        """The training is packed; what it worked with is not needed any more."""
        for path in self.folder.iterdir():
            path.unlink()
        self.folder.rmdir()
        if not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()


DECISIVE = ("network", "network_options", "fold", "folds", "minutes", "epochs", "steps_per_epoch", "learning_rate",
            "weight_decay", "loss", "devices", "nodes", "seed", "reading")  # fmt: skip


def decisive(settings: Train) -> dict[str, Any]:
    return {name: encode(getattr(settings, name)) for name in DECISIVE}


def refuse_other_settings(job: Job, settings: Train) -> None:
    refuse_changed(job.settings, decisive(settings))


def refuse_changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Settings that decide the weights stay what they were when a training began."""
    changed = [name for name, value in now.items() if before.get(name) != value]
    if changed:
        raise UsageError(
            f"the unfinished training was started with other settings ({', '.join(changed)}); --resume goes on with the "
            "same ones. Give them as they were, or begin anew with another --out."
        )
