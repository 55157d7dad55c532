"""One fold, from a dataset to a package: plan, prepare, fit, score on what was held out, pack, register."""

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np

from networks.parts.losses import LOSSES
from preprocessing.datasets import Dataset, open_dataset, take_fingerprint
from preprocessing.plan import Fingerprint, Label, Plan, Recipe
from preprocessing.records import encode, nearest

from . import registry, scoresheet, slurm, tracking
from .cache import PreparedCase, cached
from .config import Train, refuse_unknown_match
from .errors import UsageError, stopped_by_signals
from .exhibits import LARGEST, Exhibit, exhibits
from .fitting import Training, fit
from .folds import fold_cases, split
from .package import Fold, ModelPackage, Package, card, save, weights_file
from .planning import Wishes, planned
from .prediction import choose_device
from .progress import Progress, silent
from .report import hilum_version, recover
from .scoring import Scores, score
from .workshop import Job, Workshop, decisive, refuse_other_settings

logger = logging.getLogger(__name__)


def train(dataset: Path, out: Path, settings: Train = Train(), progress: Progress = silent) -> ModelPackage:  # noqa: B008
    """Train one fold on a dataset; the package appears at `out` when it is finished, and in the MLflow registry."""
    began = time.monotonic()
    workshop = Workshop(folder=out.with_name(f"{out.name}.training") / f"fold{settings.fold}")
    slurm.listen()
    if slurm.is_requeued():
        settings = replace(settings, resume=True)
    if is_follower(settings):
        _follow(dataset, out, workshop, settings, began)
    recover(out)
    if settings.resume and (packed := workshop.packed(out, settings.fold)):
        return _last_steps(packed, settings, workshop)
    opened = open_dataset(dataset, settings.reading)
    refuse_unknown_match(settings.reading, opened.channels)
    workshop.open(out, settings)
    if workshop.has_job:
        job = workshop.resumed_job()
        refuse_other_settings(job, settings)
    else:
        # every case is looked at whatever the plan: one that does not fit must be told, not skipped
        fingerprint = take_fingerprint(opened, lambda done, of: progress("look at every case", done, of))
        job = _new_job(fingerprint, settings, _earlier_folds(out, settings))
        workshop.begin(job, fingerprint)
    by_id = _prepared(opened, job, settings, progress)
    tracker = _open_tracker(job, settings, workshop)
    with tracking.ended_honestly(tracker):
        module = fit(job, settings, by_id, workshop, tracker, progress, began)
        held_out = [files for files in opened.cases if files.id in set(job.held_out)]
        scoring = time.monotonic()
        scores = score(opened, held_out, module.best_network, job.plan, settings.device, _alive(progress, tracker))
        seconds_each = (time.monotonic() - scoring) / max(1, len(held_out))
        package = _pack(out, job, settings, module, scores, tracker)
        _tell(package, settings, tracker, scores)
        is_registered = _register(package, tracker)
        until = began + 60 * settings.minutes if settings.minutes else None
        shown = exhibits(
            opened, held_out, scores.held_out.cases, module.best_network, package, str(settings.fold), settings.device,
            until, seconds_each,
        )  # fmt: skip
        _hang(shown, tracker, step=max(0, module.epoch - 1))
    if is_registered:
        workshop.close()
    return package


def is_follower(settings: Train) -> bool:
    """Whether this process is one of several that fit together, and not the first: the first alone decides and packs.

    Tasks of a cluster that each train by themselves have ranks too, but were not told of devices or nodes.
    """
    from lightning.pytorch.utilities import rank_zero_only

    node = int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0")))
    return settings.devices * settings.nodes > 1 and (bool(rank_zero_only.rank) or node > 0)


FIRST_RANK_SECONDS = 6 * 3600
"""How long the other processes wait for the first to have prepared every case."""


def _follow(dataset: Path, out: Path, workshop: Workshop, settings: Train, began: float) -> NoReturn:
    """Fit beside the first process, on what it prepared, and end."""
    while not (workshop.has_job and workshop.resumed_job().run_id):
        if time.monotonic() - began > FIRST_RANK_SECONDS:
            raise UsageError(
                f"{workshop.folder} has held no prepared training for {FIRST_RANK_SECONDS / 3600:g} hours; the first "
                "process makes it. Look at what that one said, and whether all processes see the same folders."
            )
        time.sleep(0.5)
    job = workshop.resumed_job()
    refuse_other_settings(job, settings)
    if workshop.packed(out, settings.fold):
        raise SystemExit(0)
    cases = _prepared(open_dataset(dataset, settings.reading), job, settings, silent)
    with stopped_by_signals("the first process keeps what is done."):
        fit(job, settings, cases, workshop, None, silent, began)
    raise SystemExit(0)


def _prepared(dataset: Dataset, job: Job, settings: Train, progress: Progress) -> dict[str, PreparedCase]:
    cache = settings.cache or tracking.home() / "cache"
    cases = cached(dataset, job.plan, cache, lambda done, of: progress("prepare", done, of))
    by_id = {case.id: case for case in cases}
    _refuse_other_cases(by_id, job, dataset.name)
    return by_id


def _last_steps(package: ModelPackage, settings: Train, workshop: Workshop) -> ModelPackage:
    """What a training killed after its package was whole has left to do."""
    job = workshop.resumed_job()
    refuse_other_settings(job, settings)
    tracker = _open_tracker(job, settings, workshop)
    with tracking.ended_honestly(tracker):
        _tell(package, settings, tracker)
        is_registered = _register(package, tracker)
    if is_registered:
        workshop.close()
    return package


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


def _new_job(fingerprint: Fingerprint, settings: Train, earlier: Package | None) -> Job:
    if earlier:
        plan, config = earlier.plan, earlier.network_config
    else:
        wishes = Wishes(
            network=settings.network,
            network_options=settings.network_options,
            device=settings.device,
            plan=settings.plan,
        )
        plan, chosen = planned(fingerprint, wishes)
        config = encode(chosen)
    _refuse_other_words(plan, fingerprint)
    plan = plan if earlier else replace(plan, dataset=fingerprint.dataset)
    trained_on, held_out = split(fold_cases(fingerprint), settings.fold, settings.folds)
    recipe = _recipe(plan, settings)
    return Job(
        plan=plan,
        network=settings.network,
        network_config=config,
        recipe=recipe,
        epochs=settings.epochs or recipe.epochs,
        steps_per_epoch=recipe.steps_per_epoch or _steps(len(trained_on), plan, settings),
        trained_on=tuple(trained_on),
        held_out=tuple(held_out),
        settings=decisive(settings),
    )


def _recipe(plan: Plan, settings: Train) -> Recipe:
    """The plan's, but for what was said otherwise."""
    said = {name: getattr(settings, name) for name in ("learning_rate", "weight_decay", "loss", "steps_per_epoch")}
    recipe = replace(plan.recipe, **{name: value for name, value in said.items() if value is not None})
    if recipe.loss not in LOSSES:
        raise UsageError(
            f"the loss {recipe.loss!r} is not known; one of {', '.join(LOSSES)} is needed"
            f"{nearest(recipe.loss, list(LOSSES)) or '.'}"
        )
    return recipe


def _steps(cases: int, plan: Plan, settings: Train) -> int:
    """About one window per case in an epoch, on a GPU as many steps as nnU-Net takes; those are minutes on a CPU."""
    if choose_device(settings.device).type == "cuda":
        return 250
    return int(np.clip(cases // (plan.batch * settings.devices * settings.nodes), 20, 40))


def _refuse_other_words(plan: Plan, fingerprint: Fingerprint) -> None:
    """A plan for other channels or labels than the dataset's would train on the wrong thing without a word."""
    meant, present = (_words(one.channels, one.labels, one.ignored) for one in (plan, fingerprint))
    if meant != present:
        raise UsageError(
            f"the plan is for {meant}; the dataset has {present}. They must be the same: "
            "make a plan of this dataset with `hilum plan`."
        )


def _words(channels: Sequence[str], labels: Sequence[Label], ignored: int | None) -> str:
    ordered = sorted(labels, key=lambda label: label.value)
    named = {label.name: list(label.parts) or label.value for label in ordered}
    return f"channels {list(channels)}, labels {named}" + (f", {ignored} ignored" if ignored is not None else "")


def _refuse_other_cases(prepared: dict[str, PreparedCase], job: Job, dataset: str) -> None:
    missing = sorted(set(job.trained_on + job.held_out) - set(prepared))
    if missing:
        raise UsageError(
            f"{dataset} lacks {len(missing)} case(s) this training began with, the first {missing[0]}; a resumed run needs "
            "all of them. Bring them back, or begin anew with another --out."
        )


def _open_tracker(job: Job, settings: Train, workshop: Workshop) -> tracking.Tracker:
    uri = settings.tracking_uri or tracking.default_uri()
    tracking.end_the_dead(uri)
    tracker = tracking.open_run(
        uri=uri,
        experiment=settings.experiment or job.plan.name,
        run_name=f"{settings.network} fold {settings.fold}",
        params={
            "network": settings.network,
            "fold": f"{settings.fold} of {settings.folds}",
            "patch": "×".join(map(str, job.plan.patch)),
            "batch": job.plan.batch,
            "learning_rate": job.recipe.learning_rate,
            "seed": settings.seed,
        },
        tags={"hilum": hilum_version(), "code": tracking.code_version(), "dataset": job.plan.dataset[:16]},
        run_id=job.run_id or None,
        journal=workshop.folder / "points.jsonl",
        note=f"{settings.network} on {job.plan.name}: {', '.join(label.name for label in job.plan.labels)}.",
    )
    if not job.run_id:
        workshop.remember(replace(job, run_id=tracker.run_id))
        tracker.dataset(job.plan.name, job.plan.dataset, len(job.trained_on), "training")
    for name in ("plan.yaml", "fingerprint.json"):  # every time: the run before may have been killed just before this
        tracker.text((workshop.folder / name).read_text(), name)
    tracker.text(json.dumps(job.settings, indent=2), "settings.json")
    tracker.text(tracking.environment(), "environment.txt")
    return tracker


def _alive(progress: Progress, tracker: tracking.Tracker) -> Progress:
    """The same, and MLflow hears that the training lives: to score every case may take hours."""

    def told(stage: str, done: float, of: float, note: str = "") -> None:
        tracker.beat()
        progress(stage, done, of, note)

    return told


def _tell(package: ModelPackage, settings: Train, tracker: tracking.Tracker, scores: Scores | None = None) -> None:
    """What the held-out cases say: scores as points, every case in a table and on a page, the card."""
    record = package.record
    fold = record.folds[str(settings.fold)]
    if fold.dice:
        figures = {f"held_out/dice_{name}": dice for name, dice in fold.dice.items()}
        figures |= {"held_out/dice_mean": float(np.mean(list(fold.dice.values())))}
        if fold.calibration:
            figures |= {
                "held_out/ece": fold.calibration.ece_before,
                "held_out/ece_calibrated": fold.calibration.ece_after,
            }
        tracker.metrics(figures, step=max(0, fold.epochs - 1))
        tracker.text(scoresheet.sheet(record), "report/held_out.csv")
        tracker.text(scoresheet.page(record, scores.reliability if scores else None), "report/held_out.html")
    tracker.text(card(record), "card.md")


def _hang(shown: Iterator[Exhibit], tracker: tracking.Tracker, step: int) -> None:
    """The page of each below the run's artifacts, its picture beside the curves."""
    for each in shown:
        tracker.picture(f"held_out/{each.kind}", each.picture, step)
        if len(each.page) > LARGEST:
            logger.warning("the page of the %s held-out case is too large for MLflow to show", each.kind)
        tracker.text(each.page, f"report/{each.kind}.html")


def _pack(
    out: Path, job: Job, settings: Train, module: Training, scores: Scores, tracker: tracking.Tracker,
) -> ModelPackage:  # fmt: skip
    fold = Fold(
        weights=weights_file(settings.fold),
        dice=scores.dice,
        temperature=scores.temperature,
        calibration=scores.calibration,
        held_out=scores.held_out,
        cases_trained=len(job.trained_on),
        cases_held_out=len(job.held_out),
        epochs=module.epoch,
        steps=module.global_step,
        minutes=round(module.clock.trained, 2),
        seed=settings.seed,
        run_id=tracker.run_id,
    )
    return save(
        out,
        network=module.best_network,
        name=settings.model or job.plan.name,
        network_name=settings.network,
        network_config=job.network_config,
        plan=job.plan,
        fold_number=settings.fold,
        fold=fold,
    )


def _register(package: ModelPackage, tracker: tracking.Tracker) -> bool:
    """Into the registry, and under one run with the other folds; says whether the store took it."""
    tracker.settle()
    record = package.record
    try:
        registry.register(
            package.folder, package.name, uri=tracker.uri, run_id=tracker.run_id, note=card(record),
            measured=registry.Measured.of(record),
        )  # fmt: skip
        registry.gather(record, scoresheet.page(record), tracker.uri)
    except tracking.TrackingError as error:
        logger.warning(
            "%s is finished but not registered: %s The same command with --resume registers it.", package.folder, error
        )
        return False
    return True
