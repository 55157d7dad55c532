"""Packages in MLflow's registry: each a model that `mlflow.pyfunc.load_model` loads without a pickle, the best one named.

A registered version is a folder of its own: MLmodel says that `pipeline.serving` loads it, `package/` is the package.
"""

import logging
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import RegistryError
from .package import Package, card
from .report import hilum_version
from .tracking import connect, default_uri, imported_quietly, is_refusal, metric_key, store_errors

if TYPE_CHECKING:
    import mlflow

logger = logging.getLogger(__name__)

LATEST = "latest"
"""The alias MLflow itself gives every model: its highest version. To set it would be an error."""

BEST = "best"
"""The alias of the version with the highest held-out Dice, among those measured on the same cases."""

MODEL, PACKAGE = "model", "package"
"""Where a version lies in its run, and the package in the version."""

LOADER = "pipeline.serving"
"""The module that MLflow loads a version with, wherever hilum is installed."""

PARAMS = {"out": "segmented", "outputs": "labels"}
"""What may be said to a loaded model's `predict`, and what holds where nothing is: the folder to write into, what to write."""

LONGEST_NOTE = 5000
"""Characters; a database cuts or refuses what is longer (MLflow's model_versions.description)."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """How well a package does, and on what: two means of different patients are not compared."""

    dice: Mapping[str, float] = field(default_factory=dict)
    """Label -> mean over all held-out cases of all folds."""
    cases: frozenset[str] = frozenset()
    """The held-out cases, by the hashes that packages know them by."""
    trainings: tuple[str, ...] = ()
    """The runs that made its folds."""
    dataset: str = ""

    @classmethod
    def of(cls, record: Package) -> "Measured":
        folds = record.folds.values()
        tables = [table for fold in folds for table in fold.held_out.cases.values()]
        by_label = {label.name: [t[label.name] for t in tables if label.name in t] for label in record.plan.labels}
        return cls(
            dice={name: float(np.mean(values)) for name, values in by_label.items() if values},
            cases=frozenset(case for fold in folds for case in fold.held_out.cases),
            trainings=tuple(fold.run_id for fold in folds if fold.run_id),
            dataset=record.plan.dataset,
        )

    @property
    def mean(self) -> float | None:
        """Over labels; None where nothing was held out."""
        return float(np.mean(list(self.dice.values()))) if self.dice else None

    @property
    def on(self) -> str:
        """Of what the mean is: dataset, cases and labels in one hash."""
        words = [self.dataset, *sorted(self.cases), *sorted(self.dice)]
        return sha256("\n".join(words).encode()).hexdigest()[:12] if self.dice else ""

    @property
    def tags(self) -> dict[str, str]:
        """As a version carries them."""
        said = {f"dice_{name}": f"{value:.4f}" for name, value in self.dice.items()}
        if self.mean is not None:
            said |= {"dice_mean": f"{self.mean:.6f}", "held_out_cases": str(len(self.cases)), "measured_on": self.on}
        return said | {"dataset": self.dataset[:16], "trainings": " ".join(self.trainings)}


def register(
    package: Path, name: str, *, uri: str, run_id: str, aliases: tuple[str, ...] = (), note: str = "",
    measured: Measured = Measured(),
) -> str:  # fmt: skip
    """Uploads a package folder to its run, registers it as the next version of model `name`; returns the version.

    Raises TrackingError when the store is away: the package itself is safe in its folder.
    """
    assert package.is_dir(), f"{package} is no folder"
    name = registered_name(name)
    with store_errors(uri):
        client = connect(uri)
        # a folder of its own for every upload: a version once registered is never written over
        taken = {entry.path for entry in client.list_artifacts(run_id)}
        folder = next(f for f in _numbered(MODEL) if f not in taken)
        client.log_artifacts(run_id, str(package), f"{folder}/{PACKAGE}")
        for file, text in _model_files(run_id).items():
            client.log_text(run_id, text, f"{folder}/{file}")
        _create_model(client, name)
        source = f"{client.get_run(run_id).info.artifact_uri}/{folder}"
        note = note if len(note) <= LONGEST_NOTE else note[: LONGEST_NOTE - 24] + "\n\n(more in card.md)"
        tags = {metric_key(key): value for key, value in measured.tags.items() if value}
        version = str(client.create_model_version(name, source, run_id, tags=tags, description=note).version)
        for alias in set(aliases) - {LATEST}:
            client.set_registered_model_alias(name, alias, version)
        _name_the_best(client, name, version)
        return version


def registered_name(name: str) -> str:
    """As MLflow and `models:/NAME@ALIAS` take it."""
    return re.sub(r"[/:@]", "_", name) or "unnamed"


def _model_files(run_id: str) -> dict[str, str]:
    """What makes a folder a model of MLflow's: the module that loads it, what it takes, what must be installed."""
    with imported_quietly():
        from mlflow import __version__ as mlflow_version
        from mlflow.models import Model, ModelSignature
        from mlflow.pyfunc import add_to_model
        from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    params = [ParamSpec(name, DataType.string, default) for name, default in PARAMS.items()]
    # a column without a name: a plain list of paths is then taken as well as a table
    signature = ModelSignature(inputs=Schema([ColSpec(DataType.string)]), params=ParamSchema(params))
    model = Model(run_id=run_id, signature=signature)
    add_to_model(model, loader_module=LOADER, data=PACKAGE, python_env="python_env.yaml")
    return {
        "MLmodel": model.to_yaml(),
        "requirements.txt": f"mlflow=={mlflow_version}\nhilum=={hilum_version()}\n",
        "python_env.yaml": f"python: {platform.python_version()}\ndependencies:\n- -r requirements.txt\n",
    }


def _create_model(client: "mlflow.MlflowClient", name: str) -> None:
    from mlflow.exceptions import MlflowException

    use = (
        f"Use it: `hilum segment SCAN --package models:/{name}@ALIAS --out DIR`, or `/VERSION` for `@ALIAS`; in Python, "
        f'where hilum is installed: `mlflow.pyfunc.load_model("models:/{name}@ALIAS").predict([SCAN], {{"out": DIR}})`.'
    )
    try:
        client.create_registered_model(name, description=use)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _name_the_best(client: "mlflow.MlflowClient", name: str, version: str) -> None:
    """Moves the alias `best` to the new version where that can be said, and tells the version why."""
    aliases = client.get_registered_model(name).aliases
    new = client.get_model_version(name, version).tags
    held = str(aliases.get(BEST, ""))
    moves, reason = better(new, client.get_model_version(name, held).tags if held else None, held)
    if moves:
        client.set_registered_model_alias(name, BEST, version)
    client.set_model_version_tag(name, version, BEST, reason)
    logger.info("models:/%s@best is version %s: %s", name, version if moves else held or "not set", reason)


def better(new: Mapping[str, str], best: Mapping[str, str] | None, version: str) -> tuple[bool, str]:
    """Whether the alias `best` moves from that version to the new one, and why: never to a mean of other patients.

    It moves where none held it, where the mean Dice over the same held-out cases is higher, and where the new package
    holds every training of the best one and more. Else it stays.
    """
    if "dice_mean" not in new:
        return False, "nothing was held out, so it was not measured"
    here = f"mean Dice {float(new['dice_mean']):.4f} on {new['held_out_cases']} held-out cases"
    if best is None:
        return True, f"{here}; no version was called best"
    if "dice_mean" not in best:
        return False, f"{here}; version {version}, called best, was not measured. Set the alias by hand to move it"
    there = f"version {version} has {float(best['dice_mean']):.4f}"
    if new["measured_on"] == best["measured_on"]:
        higher = float(new["dice_mean"]) > float(best["dice_mean"])
        return higher, f"{here}; {there} on the same cases"
    trainings, earlier = set(new.get("trainings", "").split()), set(best.get("trainings", "").split())
    if earlier and earlier < trainings:
        return True, f"{here}; it holds every training of version {version} and more"
    return False, (
        f"{here}; {there} on other cases, labels or another dataset, so the two are not compared. Train the same folds of "
        "the same dataset, or set the alias by hand"
    )


def gather(record: Package, page: str, uri: str) -> None:
    """One run above the runs of a package's folds, with what they say together; none for a single fold."""
    with store_errors(uri):
        client = connect(uri)
        runs = [run for fold in record.folds.values() if (run := _run(client, fold.run_id))]
        if len(runs) < 2:
            return
        known = [run.data.tags[PARENT] for run in runs if PARENT in run.data.tags]
        above = known[0] if known else _run_above(client, runs[0])
        for run in runs:
            client.set_tag(run.info.run_id, PARENT, above)
        measured = Measured.of(record)
        scores = {"cv/dice_mean": measured.mean} | {f"cv/dice_{name}": value for name, value in measured.dice.items()}
        for name, value in scores.items():
            if value is not None:
                client.log_metric(above, metric_key(name), value, step=len(record.folds))
        client.update_run(above, name=f"{record.network}, {len(record.folds)} folds")
        client.log_text(above, page, "report/held_out.html")
        client.log_text(above, card(record), "card.md")


PARENT = "mlflow.parentRunId"
"""By which MLflow's table of runs folds one run under another."""


def _run(client: "mlflow.MlflowClient", run_id: str) -> Any:
    """None where this store does not have it, or a person deleted it."""
    from mlflow.exceptions import MlflowException

    if not run_id:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if not is_refusal(error):
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def _run_above(client: "mlflow.MlflowClient", first: Any) -> str:
    known = {name: first.data.tags[name] for name in ("hilum", "dataset") if name in first.data.tags}
    tags = known | {"mlflow.source.name": "hilum", "mlflow.source.type": "LOCAL"}
    run = client.create_run(first.info.experiment_id, tags=tags, start_time=first.info.start_time)
    if "network" in first.data.params:
        client.log_param(run.info.run_id, "network", first.data.params["network"])
    if learnt_from := list(first.inputs.dataset_inputs):
        client.log_inputs(run.info.run_id, learnt_from)
    client.set_terminated(run.info.run_id, "FINISHED")
    return str(run.info.run_id)


def fetch(model_uri: str, folder: Path, uri: str | None = None) -> Path:
    """Brings the package `models:/NAME@ALIAS` or `models:/NAME/3` into `folder`; returns the package's folder.

    A version never changes, so one that is there already is not brought again.
    """
    uri = uri or default_uri()
    with store_errors(uri):
        client = connect(uri)
        version = _version(client, model_uri)
        package = folder / f"{version.name}-{version.version}-{version.creation_timestamp}"
        if not package.is_dir():
            source = client.get_model_version_download_uri(version.name, version.version)
            _download(source, package, uri)
        inside = package / PACKAGE
        # a version that an earlier hilum registered is the package itself
        return inside if inside.is_dir() else package


def _version(client: "mlflow.MlflowClient", model_uri: str) -> Any:
    from mlflow.exceptions import MlflowException

    address = re.fullmatch(r"models:/([^/@:]+)(?:@([^/@]+)|/(\d+))", model_uri)
    if address is None:
        raise RegistryError(
            f"{model_uri!r} is no address of a registered package; models:/NAME@ALIAS or models:/NAME/VERSION is "
            f"needed. {_what_exists(client)}"
        )
    name, alias, number = address.groups()
    try:
        if alias:
            return client.get_model_version_by_alias(name, alias)
        return client.get_model_version(name, number)
    except MlflowException as error:
        if not is_refusal(error):
            raise
        raise RegistryError(
            f"{model_uri} is not in the model registry; a registered package is needed. {_what_exists(client)}"
        ) from error


def _what_exists(client: "mlflow.MlflowClient") -> str:
    models = client.search_registered_models()
    if not models:
        return "The registry is empty: train a package first."
    return "Choose from: " + "; ".join(f"{model.name} ({_versions_and_aliases(client, model)})" for model in models)


def _versions_and_aliases(client: "mlflow.MlflowClient", model: Any) -> str:
    versions = sorted(int(version.version) for version in client.search_model_versions(f"name = '{model.name}'"))
    aliases = [f"@{alias} is {version}" for alias, version in sorted(model.aliases.items())]
    return ", ".join([f"/{version}" for version in versions] + aliases)


def _download(source: str, package: Path, uri: str) -> None:
    from mlflow.artifacts import download_artifacts

    package.parent.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.mkdtemp(prefix=".fetch-", dir=package.parent)
    try:
        arrived = download_artifacts(artifact_uri=source, dst_path=scratch, tracking_uri=uri)
        Path(arrived).replace(package)
    except OSError:
        if not package.is_dir():  # another process may have brought the same version meanwhile
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _numbered(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}-{number}" for number in range(2, 10_000))
