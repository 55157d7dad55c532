"""One fold, from a dataset to a package: plan, prepare, fit, score on what was held out, pack, register."""

import json
import logging
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

import networks
from networks.parts.losses import DeepSupervision, dice_cross_entropy
from preprocessing.datasets import CaseFiles, Dataset, open_dataset, take_fingerprint
from preprocessing.plan import Fingerprint, Plan, make_plan, with_patch
from preprocessing.reading import STRICT
from preprocessing.records import decode, encode

from . import tracking
from .checkpoint import SafeCheckpoints
from .comparison import compare
from .config import Train, refuse_unknown_match
from .data import PreparedCase, Whole, Windows, cached, measure_machine, split
from .errors import Interrupted, UsageError, stopped_by_signals
from .evaluation import dice
from .package import Fold, ModelPackage, Package, build_network, save
from .prediction import Inference, blended_logits, choose_device, segment_volume
from .progress import Progress, silent
from .report import hilum_version

logger = logging.getLogger(__name__)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # it advertises other products

VALIDATION_CASES = 8
"""Held-out cases looked at after every epoch; all of them are scored at the end."""
PICTURED_CASES = 3
PICTURES = 5
"""How often in a training the pictured cases are drawn."""


def train(dataset: Path, out: Path, settings: Train = Train(), progress: Progress = silent) -> ModelPackage:  # noqa: B008
    """Train one fold on a dataset; the package appears at `out` when it is finished, and in the MLflow registry."""
    workshop = Workshop(folder=out.with_name(f"{out.name}.training") / f"fold{settings.fold}")
    if settings.resume and (packed := workshop.packed(out, settings.fold)):
        return _last_steps(packed, settings, workshop)
    opened = open_dataset(dataset, settings.reading)
    refuse_unknown_match(settings.reading, opened.channels)
    workshop.open(out, settings)
    if workshop.has_job:
        job = workshop.resumed_job()
        _refuse_other_settings(job, settings)
    else:
        # every case is looked at whatever the plan: one that does not fit must be told, not skipped
        fingerprint = take_fingerprint(opened, lambda done, of: progress("look at every case", done, of))
        job = _new_job(opened, fingerprint, settings, _earlier_folds(out, settings))
        workshop.begin(job, fingerprint)
    cases = cached(
        opened, job.plan, settings.cache or tracking.home() / "cache", lambda done, of: progress("prepare", done, of)
    )
    by_id = {case.id: case for case in cases}
    _refuse_other_cases(by_id, job, dataset)
    tracker = _open_tracker(job, settings, workshop)
    with _ended_honestly(tracker):
        module, trainer = _fit(job, settings, by_id, workshop, tracker, progress)
        held_out = [files for files in opened.cases if files.id in set(job.held_out)]
        scores = _score(opened, held_out, module.network, job.plan, settings.device, tracker, module, progress)
        package = _pack(out, job, settings, module, trainer, scores, tracker)
    workshop.close()
    return package


def _last_steps(package: ModelPackage, settings: Train, workshop: "Workshop") -> ModelPackage:
    """What a training killed after its package was whole has left to do."""
    job = workshop.resumed_job()
    _refuse_other_settings(job, settings)
    tracker = _open_tracker(job, settings, workshop)
    with _ended_honestly(tracker):
        _register(package, tracker)
    workshop.close()
    return package


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a training is, decided once: a resumed run reads it instead of deciding again."""

    plan: Plan
    network_config: dict[str, Any]
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

    def packed(self, out: Path, fold: int) -> ModelPackage | None:
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
        (self.folder / "fingerprint.json").write_text(json.dumps(facts))
        job.plan.write(self.folder / "plan.yaml")
        self.remember(job)

    def remember(self, job: Job) -> None:
        partial = self.folder / ".job.json.partial"
        partial.write_text(json.dumps(encode(job), indent=2))
        partial.replace(self.folder / "job.json")

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
            "weight_decay", "seed", "reading")  # fmt: skip


def _decisive(settings: Train) -> dict[str, Any]:
    return {name: encode(getattr(settings, name)) for name in DECISIVE}


def _earlier_folds(out: Path, settings: Train) -> Package | None:
    """The package this training adds a fold to, if there is one; its plan and network are followed."""
    if not (out / "package.json").exists():
        return None
    package = ModelPackage.load(out).record
    if package.network != settings.network or settings.plan or settings.network_options:
        raise UsageError(
            f"{out} holds folds of {package.network}, made by its own plan; all folds of a package share both. "
            f"Give --network {package.network} and neither plan nor network_options, or another --out."
        )
    return package


def _new_job(dataset: Dataset, fingerprint: Fingerprint, settings: Train, earlier: Package | None) -> Job:
    module = networks.load(settings.network)
    options = decode(module.Config, settings.network_options, where=f"network_options of {settings.network}")
    if earlier:
        plan, config = earlier.plan, decode(module.Config, earlier.network_config, where="package.json")
    else:
        plan = Plan.read(settings.plan) if settings.plan else make_plan(fingerprint, measure_machine(settings.device))
        config = module.fit(options, patch=plan.patch, spacing=plan.spacing_mm)
        plan = with_patch(plan, _rounded_up(plan.patch, module.divisor(config)))
    _refuse_other_words(plan, fingerprint)
    plan = plan if earlier else replace(plan, dataset=fingerprint.dataset)
    ids = [files.id for files in dataset.cases if files.images and files.labels]
    trained_on, held_out = split(ids, settings.fold, settings.folds)
    return Job(
        plan=plan,
        network_config=encode(config),
        trained_on=tuple(trained_on),
        held_out=tuple(held_out),
        settings=_decisive(settings),
    )


def _refuse_other_words(plan: Plan, fingerprint: Fingerprint) -> None:
    """A plan for other channels or labels than the dataset's would train on the wrong thing without a word."""
    planned = (plan.channels, {label.value: label.name for label in plan.labels})
    present = (fingerprint.channels, {label.value: label.name for label in fingerprint.labels})
    if planned != present:
        raise UsageError(
            f"the plan is for channels and labels {planned}; the dataset has {present}. They must be the same: "
            "make a plan of this dataset with `hilum plan`."
        )


def _rounded_up(patch: tuple[int, int, int], divisor: tuple[int, int, int]) -> tuple[int, int, int]:
    i, j, k = (-(-side // step) * step for side, step in zip(patch, divisor, strict=True))
    return i, j, k


def _refuse_other_cases(prepared: dict[str, PreparedCase], job: Job, dataset: Path) -> None:
    missing = sorted(set(job.trained_on + job.held_out) - set(prepared))
    if missing:
        raise UsageError(
            f"{dataset} lacks {len(missing)} case(s) this training began with, the first {missing[0]}; a resumed run needs "
            "all of them. Bring them back, or begin anew with another --out."
        )


def _refuse_other_settings(job: Job, settings: Train) -> None:
    begun = {"reading": encode(STRICT)} | job.settings  # of a training that began before there were such settings
    changed = [name for name, value in _decisive(settings).items() if begun.get(name) != value]
    if changed:
        raise UsageError(
            f"the unfinished training was started with other settings ({', '.join(changed)}); --resume goes on with the "
            "same ones. Give them as they were, or begin anew with another --out."
        )


def _open_tracker(job: Job, settings: Train, workshop: Workshop) -> tracking.Tracker:
    tracker = tracking.open_run(
        uri=settings.tracking_uri or tracking.default_uri(),
        experiment=settings.experiment or job.plan.name,
        run_name=f"{settings.network} fold {settings.fold}",
        params={
            "network": settings.network,
            "fold": f"{settings.fold} of {settings.folds}",
            "patch": "×".join(map(str, job.plan.patch)),
            "batch": job.plan.batch,
            "learning_rate": settings.learning_rate,
            "seed": settings.seed,
        },
        tags={"hilum": hilum_version(), "code": tracking.code_version(), "dataset": job.plan.dataset[:16]},
        run_id=job.run_id or None,
        note=f"{settings.network} on {job.plan.name}: {', '.join(label.name for label in job.plan.labels)}.",
    )
    if not job.run_id:
        workshop.remember(replace(job, run_id=tracker.run_id))
        tracker.dataset(job.plan.name, job.plan.dataset, len(job.trained_on), "training")
        for name in ("plan.yaml", "fingerprint.json"):
            tracker.text((workshop.folder / name).read_text(), name)
        tracker.text(json.dumps(job.settings, indent=2), "settings.json")
    return tracker


@contextmanager
def _ended_honestly(tracker: tracking.Tracker) -> Iterator[None]:
    """The run in MLflow ends as the training did: finished, failed, or killed by Ctrl-C or a scheduler's SIGTERM."""
    with stopped_by_signals("every complete epoch is kept. Go on with --resume."):
        try:
            yield
        except (KeyboardInterrupt, Interrupted):
            tracker.finish("KILLED")
            raise
        except BaseException:
            tracker.finish("FAILED")
            raise
        tracker.finish("FINISHED")


def _fit(
    job: Job, settings: Train, cases: dict[str, PreparedCase], workshop: Workshop, tracker: tracking.Tracker,
    progress: Progress,
) -> tuple["Training", lightning.Trainer]:  # fmt: skip
    lightning.seed_everything(settings.seed, verbose=False)
    device = choose_device(settings.device)
    module = Training(job, settings, [cases[i] for i in job.trained_on], [cases[i] for i in job.held_out])
    trainer = lightning.Trainer(
        max_epochs=-1 if settings.minutes else settings.epochs or 100,
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if device.type == "cuda" else "32-true",
        gradient_clip_val=12.0,  # nnU-Net v2
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        reload_dataloaders_every_n_epochs=1,  # every epoch draws its own windows
        num_sanity_val_steps=0,
        plugins=[SafeCheckpoints()],
        callbacks=[
            Watch(tracker, progress),
            ModelCheckpoint(workshop.folder, "last", enable_version_counter=False, save_on_train_epoch_end=True),
        ],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # on a CPU they would starve it
        warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
        warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
        warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")  # Lightning 2.6 on torch 2.15
        trainer.fit(module, ckpt_path=workshop.checkpoint, weights_only=None)
    return module, trainer


class Training(lightning.LightningModule):
    """What Lightning needs to know: the loss, the optimiser, the rate, the data. Nothing here knows a network by name."""

    def __init__(self, job: Job, settings: Train, trained_on: Sequence[PreparedCase], held_out: Sequence[PreparedCase]):
        super().__init__()
        self.network = build_network(settings.network, job.network_config, job.plan)
        self.plan = job.plan
        self.settings = settings
        self.trained_on, self.held_out = list(trained_on), list(held_out)
        self.loss = DeepSupervision()
        self.clock = Clock()
        most = 250 if choose_device(settings.device).type == "cuda" else 40  # nnU-Net's 250 steps are minutes on a CPU
        self.steps = settings.steps_per_epoch or int(np.clip(len(trained_on) // job.plan.batch, 20, most))
        self.losses: list[float] = []
        self.validated: list[dict[str, float]] = []
        self.latest: dict[str, float] = {}

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        windows = Windows(
            self.trained_on,
            self.plan,
            seed=self.settings.seed,
            epoch=self.current_epoch,
            windows=self.steps * self.plan.batch,
        )
        on_gpu = choose_device(self.settings.device).type == "cuda"
        workers = self.settings.workers if self.settings.workers is not None else on_gpu * len(os.sched_getaffinity(0))
        return DataLoader(windows, batch_size=self.plan.batch, num_workers=workers, pin_memory=on_gpu)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(Whole(self.held_out[:VALIDATION_CASES]), batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.network.parameters(), lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay
        )

    @property
    def share_done(self) -> float:
        """How much of the training lies behind, 0 to 1: of its minutes, or of its steps."""
        if self.settings.minutes:
            return min(1.0, self.clock.minutes / self.settings.minutes)
        return min(1.0, self.global_step / (self.steps * (self.settings.epochs or 100)))

    def on_fit_start(self) -> None:
        self.clock.start()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """The rate rises over the first twenty steps, then falls to zero with the share that is left (nnU-Net's power)."""
        warm = min(1.0, (self.global_step + 1) / 20)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.settings.learning_rate * warm * (1 - self.share_done) ** 0.9

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        image, labels = batch
        loss = self.loss(self.network(image), labels)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss became {loss.item()} in epoch {self.current_epoch}; it must stay finite. "
                "Lower the learning rate, and run `hilum check` on the dataset."
            )
        self.losses.append(float(loss.detach()))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.settings.minutes and self.clock.minutes >= self.settings.minutes:
            self.trainer.should_stop = True

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        logits, truth = self.whole_case(batch)
        scores = {"loss": float(dice_cross_entropy(logits[None], truth[None].to(logits.device)))}
        for label, score in zip(
            self.plan.labels, class_dice(logits.argmax(0).cpu(), truth.cpu(), self.plan), strict=True
        ):
            if score is not None:
                scores[label.name] = score
        self.validated.append(scores)

    def whole_case(self, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """A whole prepared scan through the network, window by window as in segmentation."""
        image, truth = batch
        self.network.eval()
        logits = blended_logits(
            image[0].cpu(), self.network, self.plan.patch, self.plan.classes, Inference(), self.device
        )
        return logits, truth[0]

    def on_validation_epoch_end(self) -> None:
        names = sorted({name for scores in self.validated for name in scores})
        means = {name: float(np.mean([s[name] for s in self.validated if name in s])) for name in names}
        per_label = {f"val/dice_{name}": mean for name, mean in means.items() if name != "loss"}
        self.latest = {
            "train/loss": float(np.mean(self.losses)) if self.losses else float("nan"),
            "val/loss": means["loss"],
            "val/dice_mean": float(np.mean(list(per_label.values()))) if per_label else 0.0,
            "train/learning_rate": self.trainer.optimizers[0].param_groups[0]["lr"],
            "train/minutes": self.clock.minutes,
            **per_label,
        }
        self.losses, self.validated = [], []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["minutes"] = self.clock.minutes

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.clock = Clock(before=checkpoint["minutes"])


class Clock:
    """Minutes of training, those before a resume included."""

    def __init__(self, before: float = 0.0):
        self.before = before
        self.started: float | None = None

    def start(self) -> None:
        self.started = time.monotonic()

    @property
    def minutes(self) -> float:
        return self.before + (0.0 if self.started is None else (time.monotonic() - self.started) / 60)


class Watch(Callback):
    """Tells MLflow and whoever watches, after every epoch and step."""

    def __init__(self, tracker: tracking.Tracker, progress: Progress):
        self.tracker, self.progress = tracker, progress
        self.pictured = -1

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._tell(module)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.tracker.metrics(module.latest, step=module.current_epoch)
        due = int(module.share_done * (PICTURES - 1))
        if due > self.pictured:
            self.pictured = due
            self._draw(module)
        self.tracker.flush()  # before the checkpoint: what a resumed run skips must be in the store
        self._tell(module)

    def _tell(self, module: "Training") -> None:
        note = f"epoch {module.current_epoch + 1}"
        if module.latest:
            note += f", loss {module.latest['train/loss']:.3f}, Dice {module.latest['val/dice_mean']:.3f}"
        total = module.settings.minutes or (module.settings.epochs or 100)
        self.progress("train", module.share_done * total, total, note)

    def _draw(self, module: "Training") -> None:
        for number, case in enumerate(module.held_out[:PICTURED_CASES], start=1):
            image, truth = Whole([case])[0]
            with torch.inference_mode():
                logits, _ = module.whole_case([image[None], truth[None]])
            found = logits.argmax(dim=0).numpy()
            picture = compare(image.numpy(), truth.numpy(), found, module.plan.labels, module.plan.spacing_mm)
            self.tracker.picture(f"validation/case {number}", picture, step=module.current_epoch)


def class_dice(found: Tensor, truth: Tensor, plan: Plan) -> list[float | None]:
    """Dice of each label on one case; None where the case has none of it and none was found."""
    scores: list[float | None] = []
    for number in range(1, plan.classes):
        scores.append(dice((found == number).numpy(), (truth == number).numpy()))
    return scores


def _score(
    dataset: Dataset, held_out: Sequence[CaseFiles], network: nn.Module, plan: Plan, device: str,
    tracker: tracking.Tracker, module: Training, progress: Progress,
) -> dict[str, float]:  # fmt: skip
    """Mean Dice per label over every held-out case, on its own grid, through the very hops that segmentation takes."""
    per_label: dict[str, list[float]] = {label.name: [] for label in plan.labels}
    for done, files in enumerate(held_out, start=1):
        case = dataset.read(files)
        assert case.labels is not None
        found = segment_volume(case.image, [network], plan, Inference(device=device), "")
        for label in plan.labels:
            score = dice(found.labels.voxels[0] == label.value, case.labels.voxels[0] == label.value)
            if score is not None:
                per_label[label.name].append(score)
        progress("score held-out cases", done, len(held_out))
    scores = {name: round(float(np.mean(values)), 4) for name, values in per_label.items() if values}
    final = {f"held_out/dice_{name}": score for name, score in scores.items()}
    tracker.metrics(
        final | {"held_out/dice_mean": float(np.mean(list(scores.values() or [0.0])))}, step=module.current_epoch
    )
    return scores


def _pack(
    out: Path, job: Job, settings: Train, module: Training, trainer: lightning.Trainer, scores: dict[str, float],
    tracker: tracking.Tracker,
) -> ModelPackage:  # fmt: skip
    fold = Fold(
        weights=f"weights-fold{settings.fold}.safetensors",
        dice=scores,
        cases_trained=len(job.trained_on),
        cases_held_out=len(job.held_out),
        epochs=trainer.current_epoch,
        minutes=round(module.clock.minutes, 2),
        seed=settings.seed,
        run_id=tracker.run_id,
    )
    package = save(
        out,
        network=module.network,
        name=settings.model or job.plan.name,
        network_name=settings.network,
        network_config=job.network_config,
        plan=job.plan,
        fold_number=settings.fold,
        fold=fold,
    )
    _register(package, tracker)
    return package


def _register(package: ModelPackage, tracker: tracking.Tracker) -> None:
    try:
        tracker.register(package.folder, package.name, aliases=("latest",), note=f"package {package.id[:12]}")
    except tracking.TrackingError as error:
        logger.warning("%s is finished but not registered: %s", package.folder, error)
