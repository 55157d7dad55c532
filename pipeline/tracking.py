"""What a training leaves in MLflow: curves, pictures, the package; a store that goes away never stops the training.

Everything goes through `MlflowClient` with the run's id in hand. There is no active run, no autologging, no pickle.
"""

import logging
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

import numpy as np
from jaxtyping import UInt8

from .errors import RegistryError
from .report import hilum_version

if TYPE_CHECKING:
    import mlflow

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 20
FLUSH_POINTS = 500
"""Points wait this long, or until there are so many: a call for 500 points costs what ten calls for one point cost."""

MOST_PARAMS = 6
"""MLflow prints every parameter above each picture; with more of them the picture no longer fits into its card."""

LATEST = "latest"
"""The alias MLflow itself gives every model: its highest version. To set it would be an error."""

EXPERIMENT_NOTE = "Trainings by hilum: curves and pictures under *Model metrics*, plan and package under *Artifacts*."


class TrackingError(OSError):
    """The tracking store does not answer, or cannot be used."""


@final
class Tracker:
    """One run in MLflow. Made by `open_run`.

    Whatever is told here waits in a queue until the store has taken it, so nothing is lost while the store is away
    and nothing changes order. A point sent twice is stored once: it keeps the time it was first told at, and MLflow's
    stores know a point by its key, step, time and value.
    """

    def __init__(self, client: "mlflow.MlflowClient", *, uri: str, run_id: str, experiment_id: str) -> None:
        self.uri = uri
        self.run_id = run_id
        self._client = client
        self._experiment_id = experiment_id
        self._waiting: deque[Callable[[], object]] = deque()
        self._points: list[Any] = []
        self._next_flush = time.monotonic() + FLUSH_SECONDS
        self._is_away = False
        self._last_steps: dict[str, int] = {}
        self._pictures: set[tuple[str, int]] = set()

    @property
    def page(self) -> str:
        """The page of this run in the UI, for `ui_url`: its curves and pictures."""
        return f"experiments/{self._experiment_id}/runs/{self.run_id}/model-metrics"

    def metrics(self, values: dict[str, float], step: int) -> None:
        """One point for each curve. A step that a resumed run already has is not stored again."""
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        for name, value in values.items():
            key = metric_key(name)
            if step > self._last_steps.get(key, -1):
                self._points.append(Metric(key, float(value), now, step))
        is_full = len(self._points) >= FLUSH_POINTS and not self._is_away
        if is_full or time.monotonic() >= self._next_flush:
            self.flush()

    def picture(self, key: str, image: UInt8[np.ndarray, "height width 3"], step: int) -> None:
        """A picture the UI shows with a slider over the steps, from step 0: begin there, or its card opens empty.

        Its thumbnail is 256 pixels wide and the card cuts at about 130: pictures twice as wide as high fit whole.
        """
        key = re.sub(r"[^a-zA-Z0-9_\-./ ]", "_", key)
        if (key, step) not in self._pictures:
            self._pictures.add((key, step))
            self._tell(lambda: self._client.log_image(self.run_id, image, key=key, step=step, synchronous=True))

    def text(self, text: str, path: str) -> None:
        """A text as file `path` of the run."""
        self._tell(lambda: self._client.log_text(self.run_id, text, path))

    def file(self, path: Path, folder: str | None = None) -> None:
        """A file of ours, copied into `folder` of the run."""
        self._tell(lambda: self._client.log_artifact(self.run_id, str(path), folder))

    def dataset(self, name: str, digest: str, cases: int, context: str) -> None:
        """What the run learnt from, by name, hash and number of cases: no path and no case's name leaves us."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        # twelve characters of the hash, so that the column of the run table shows them; the UI knows no "cases"
        data = Dataset(name, digest[:12], "local", "{}", profile=f'{{"num_rows": {cases}, "cases": {cases}}}')
        used = DatasetInput(data, [InputTag("mlflow.data.context", context)])
        self._tell(lambda: self._client.log_inputs(self.run_id, [used]))

    def tag(self, key: str, value: str) -> None:
        """A fact about the run; told again, it replaces the former."""
        self._tell(lambda: self._client.set_tag(self.run_id, key, value))

    def register(self, package: Path, name: str, aliases: tuple[str, ...], note: str = "") -> str:
        """Uploads a package folder, registers it as the next version of model `name`; returns the version.

        Raises TrackingError when the store is away: the package itself is safe in its folder.
        """
        assert package.is_dir(), f"{package} is no folder"
        self.flush()
        with _store_errors(self.uri):
            # a folder of its own for every upload: a version once registered is never written over
            taken = {entry.path for entry in self._client.list_artifacts(self.run_id)}
            folder = next(f for f in _numbered("package") if f not in taken)
            self._client.log_artifacts(self.run_id, str(package), folder)
            self._create_model(name)
            source = f"{self._client.get_run(self.run_id).info.artifact_uri}/{folder}"
            version = str(self._client.create_model_version(name, source, self.run_id, description=note).version)
            for alias in set(aliases) - {LATEST}:
                self._client.set_registered_model_alias(name, alias, version)
            return version

    def _create_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        use = f"Use it: `hilum segment SCAN --package models:/{name}@ALIAS --out DIR`, or `/VERSION` for `@ALIAS`."
        try:
            self._client.create_registered_model(name, description=use)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def flush(self) -> bool:
        """Sends what waits; says whether all of it arrived. Call it before a checkpoint is written."""
        points, self._points = self._points, []
        for first in range(0, len(points), FLUSH_POINTS):
            some = points[first : first + FLUSH_POINTS]
            self._waiting.append(partial(self._client.log_batch, self.run_id, metrics=some))
        began = time.monotonic()
        is_sent = self._send()
        ended = time.monotonic()
        # MLflow waits 20 s for a locked sqlite file: even such a store may cost training a tenth of its time at most
        self._next_flush = ended + max(FLUSH_SECONDS, 10 * (ended - began))
        return is_sent

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """Flushes, then says how the run ended."""
        self.flush()
        self._tell(lambda: self._client.set_terminated(self.run_id, status))
        if self._waiting and not self._send():
            logger.warning(
                "MLflow run %s is not complete: %d messages could not be sent", self.run_id, len(self._waiting)
            )

    def recall(self) -> None:
        """Learns which steps the store already has, so that a resumed run stores none of them twice."""
        for key in self._client.get_run(self.run_id).data.metrics:
            self._last_steps[key] = max(point.step for point in self._client.get_metric_history(self.run_id, key))
        for entry in self._client.list_artifacts(self.run_id, "images"):
            # MLflow names its files images/KEY+step+7+timestamp+... and writes ~ for the / of a key
            if found := re.match(r"images/(.+?)\+step\+(\d+)\+", entry.path):
                self._pictures.add((found[1].replace("~", "/"), int(found[2])))

    def _tell(self, message: Callable[[], object]) -> None:
        self._waiting.append(message)
        if not self._is_away:
            self._send()

    def _send(self) -> bool:
        failures = _failures()
        while self._waiting:
            try:
                self._waiting[0]()
            except failures as error:
                if not _is_refusal(error):
                    self._went_away(error)
                    return False
                logger.warning("MLflow refuses a message of run %s: %s", self.run_id, _first_line(error))
            self._waiting.popleft()
        if self._is_away:
            logger.info("The tracking store is back; everything that waited has been sent")
        self._is_away = False
        return True

    def _went_away(self, error: Exception) -> None:
        if not self._is_away:
            logger.warning(
                "The tracking store %s does not answer (%s); what is logged waits until it does",
                _without_password(self.uri),
                _first_line(error),
            )
        self._is_away = True


def open_run(
    *,
    uri: str,
    experiment: str,
    run_name: str,
    params: dict[str, str | int | float],
    tags: dict[str, str],
    run_id: str | None = None,
    note: str = "",
) -> Tracker:
    """Starts a run, or goes on with run `run_id`. `note` is Markdown, shown on the run's page."""
    assert len(params) <= MOST_PARAMS, f"{len(params)} params hide MLflow's pictures; log {MOST_PARAMS}, tag the rest"
    tags = tags | {"mlflow.source.name": "hilum", "mlflow.source.type": "LOCAL"}
    if note:
        tags["mlflow.note.content"] = note
    with _store_errors(uri):
        from mlflow.entities import Param

        client = _client(uri)
        if run_id is None:
            run = client.create_run(_experiment_id(client, uri, experiment), tags=tags, run_name=run_name)
            client.log_batch(run.info.run_id, params=[Param(key, str(value)) for key, value in params.items()])
            return Tracker(client, uri=uri, run_id=run.info.run_id, experiment_id=run.info.experiment_id)
        client.update_run(run_id, status="RUNNING")
        run = client.get_run(run_id)
        tracker = Tracker(client, uri=uri, run_id=run_id, experiment_id=run.info.experiment_id)
        tracker.recall()
    for key, value in tags.items():
        tracker.tag(key, value)
    return tracker


def _experiment_id(client: "mlflow.MlflowClient", uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(name):
        return found.experiment_id
    database = _sqlite_file(uri)
    try:
        return client.create_experiment(
            name,
            # left to itself, MLflow on sqlite puts artifacts below whatever folder one happens to stand in
            artifact_location=(database.parent / "artifacts").as_uri() if database else None,
            # else MLflow's UI greets with its pages for chat models
            tags={"mlflow.experimentKind": "custom_model_development", "mlflow.note.content": EXPERIMENT_NOTE},
        )
    except MlflowException as error:
        if error.error_code == "RESOURCE_ALREADY_EXISTS" and (found := client.get_experiment_by_name(name)):
            return found.experiment_id  # two folds started in the same second
        raise


def fetch(model_uri: str, folder: Path, uri: str | None = None) -> Path:
    """Brings the package `models:/NAME@ALIAS` or `models:/NAME/3` into `folder`; returns the package's folder.

    A version never changes, so one that is there already is not brought again.
    """
    uri = uri or default_uri()
    with _store_errors(uri):
        client = _client(uri)
        version = _version(client, model_uri)
        package = folder / f"{version.name}-{version.version}-{version.creation_timestamp}"
        if not package.is_dir():
            source = client.get_model_version_download_uri(version.name, version.version)
            _download(source, package, uri)
        return package


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
        if not _is_refusal(error):
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


def serve(uri: str, host: str = "127.0.0.1", port: int = 5000) -> int:
    """Runs MLflow's UI on the store until it is told to stop; returns an exit code."""
    if uri.startswith(("http://", "https://")):
        raise TrackingError(
            f"{_without_password(uri)} is a tracking server already; a database is needed to start another. "
            "Open its address in a browser."
        )
    _refuse_a_taken_port(host, port)
    if host not in ("127.0.0.1", "::1", "localhost"):
        logger.warning("MLflow asks for no password: whoever reaches %s:%d can read and delete every run", host, port)
    _calm_mlflow()
    # by environment: as an argument, a database's password would show in the list of processes
    os.environ["MLFLOW_BACKEND_STORE_URI"] = uri
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    # MLflow's chat assistant may run shell commands; without this they would run here, for whoever reaches the port
    os.environ["MLFLOW_ENABLE_ASSISTANT_SANDBOX"] = "true"
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    if database := _sqlite_file(uri):
        os.environ.setdefault("MLFLOW_ARTIFACTS_DESTINATION", str(database.parent / "artifacts"))
    from mlflow.cli import server

    try:
        # inside this process: MLflow's own command would be a third process beside ours and its one worker
        words = ["--host", host, "--port", str(port), "--workers", "1", "--uvicorn-opts", "--log-level warning"]
        server.main(words, "mlflow server", standalone_mode=False)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def _refuse_a_taken_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise TrackingError(
                f"{host}:{port} cannot be listened on ({error.strerror}); a free port is needed. Pass another one."
            ) from error


def ui_url(host: str = "127.0.0.1", port: int = 5000, page: str = "experiments") -> str:
    """Where the UI is, in its mode for trained models. `page` may be a tracker's, or `newest_page`."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/#/{page}?workflowType=machine_learning"


def newest_page(uri: str) -> str:
    """The runs of the experiment last touched. MLflow's own list of experiments leads to its pages for chat models."""
    with _store_errors(uri):
        (newest,) = _client(uri).search_experiments(max_results=1, order_by=["last_update_time DESC"])
        return f"experiments/{newest.experiment_id}/runs"


def home() -> Path:
    """$HILUM_HOME or ~/.hilum: where hilum keeps what outlives a command."""
    folder = Path(os.environ.get("HILUM_HOME") or Path.home() / ".hilum").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def default_uri() -> str:
    """$MLFLOW_TRACKING_URI, or a sqlite file at home."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"


def code_version() -> str:
    """The commit this code was checked out at, with `-changed` when it is no longer that; or the installed version."""
    house = Path(__file__).resolve().parents[1]
    if (house / ".git").exists() and (git := shutil.which("git")):
        words = [git, "-C", str(house), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=-changed"]
        asked = subprocess.run(words, capture_output=True, text=True, check=False)
        if asked.returncode == 0:  # a checkout without a commit, or of another user, has no answer
            return asked.stdout.strip()
    return hilum_version()


def metric_key(name: str) -> str:
    """The name as MLflow takes it: `dice[left lobe]` becomes `dice_left lobe`."""
    parts = [re.sub(r"[^\w.\-: ]+", "_", part).strip("_ ") for part in name.split("/")]
    return "/".join(part for part in parts if part.strip("."))[:250] or "unnamed"


def _client(uri: str) -> "mlflow.MlflowClient":
    _calm_mlflow()
    if database := _sqlite_file(uri):
        database.parent.mkdir(parents=True, exist_ok=True)
    with _deprecations_ignored():
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _calm_mlflow() -> None:
    """Settings MLflow reads from the environment: no telemetry, no bars, and no two minutes of waiting in an epoch."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    os.environ.setdefault("MLFLOW_TRUNCATE_LONG_VALUES", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    with _deprecations_ignored():
        import mlflow  # noqa: F401


@contextmanager
def _deprecations_ignored() -> Iterator[None]:
    """While MLflow starts: what it and its hundred dependencies deprecate is no concern of our user's."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        yield


@contextmanager
def _store_errors(uri: str) -> Iterator[None]:
    """MLflow's errors, as ours, when there is no training to protect."""
    _calm_mlflow()
    try:
        yield
    except TrackingError:
        raise
    except _failures() as error:
        raise TrackingError(
            f"The tracking store {_without_password(uri)} says: {_first_line(error)}. A store that answers is needed. "
            "Start it, or name another in MLFLOW_TRACKING_URI."
        ) from error


def _failures() -> tuple[type[Exception], ...]:
    """What a store that is away may raise; MLflow lets some of its database's errors through."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, OSError


def _is_refusal(error: Exception) -> bool:
    """Whether the store is there and will never take this message, so that there is no sense in sending it again."""
    refusals = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE")
    return isinstance(error, FileNotFoundError) or getattr(error, "error_code", "") in refusals


def _first_line(error: Exception) -> str:
    return _without_password(str(error).strip().partition("\n")[0])[:200] or type(error).__name__


def _without_password(text: str) -> str:
    return re.sub(r"//[^/@\s]+@", "//", text)


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute() if uri.startswith("sqlite:///") else None


def _numbered(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}-{number}" for number in range(2, 10_000))
