"""What a training leaves in MLflow: curves, pictures, the package; a store that goes away never stops the training.

Everything goes through `MlflowClient` with the run's id in hand. There is no active run, no autologging, no pickle.
"""

import json
import logging
import os
import re
import shutil
import socket
import subprocess
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

import numpy as np
from jaxtyping import UInt8

from . import heartbeat
from .errors import Interrupted, stopped_by_signals
from .report import hilum_version

if TYPE_CHECKING:
    import mlflow

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 20
FLUSH_POINTS = 500
"""Points wait this long, or until there are so many: a call for 500 points costs what ten calls for one point cost."""

MOST_PARAMS = 6
"""MLflow prints every parameter above each picture; with more of them the picture no longer fits into its card."""

OWNER, BEAT, ENDED = "process", "heartbeat", "ended"
"""Tags of a run: who writes it, when it was last heard of, and why it ended if nobody was left to say so."""

PATIENCE_SECONDS = 300
"""How long a finished training waits for a store that is away, before it leaves the rest to --resume."""

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

    def __init__(
        self, client: "mlflow.MlflowClient", *, uri: str, run_id: str, experiment_id: str, journal: Path | None = None
    ) -> None:
        self.uri = uri
        self.run_id = run_id
        self._journal = journal
        self._client = client
        self._experiment_id = experiment_id
        self._waiting: deque[Callable[[], object]] = deque()
        self._points: list[Any] = []
        self._next_flush = time.monotonic() + FLUSH_SECONDS
        self._next_beat = time.monotonic() + heartbeat.BEAT_SECONDS
        self._is_away = False
        self._last_steps: dict[str, int] = {}
        self._pictures: set[tuple[str, int]] = set()

    @property
    def page(self) -> str:
        """The page of this run in the UI, for `ui_url`: its curves and pictures."""
        return f"experiments/{self._experiment_id}/runs/{self.run_id}/model-metrics"

    def metrics(self, values: dict[str, float], step: int) -> None:
        """One point for each curve. A step that a resumed run already has is not stored again."""
        now = time.time_ns() // 1_000_000
        named = {metric_key(name): float(value) for name, value in values.items()}
        self._write_down(now, step, named)
        self._take(now, step, named)
        is_full = len(self._points) >= FLUSH_POINTS and not self._is_away
        if is_full or time.monotonic() >= self._next_flush:
            self.flush()

    def _take(self, when: int, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        self._points += [
            Metric(key, value, when, step) for key, value in values.items() if step > self._last_steps.get(key, -1)
        ]

    def _write_down(self, when: int, step: int, values: dict[str, float]) -> None:
        """On our own disk too: a training that is killed while the store is away has told its points to nobody else."""
        if self._journal is None:
            return
        try:
            with self._journal.open("a", encoding="utf-8") as journal:
                journal.write(json.dumps([when, step, values]) + "\n")
        except OSError as error:
            logger.warning("%s cannot be written (%s); points wait in memory alone", self._journal.name, error.strerror)
            self._journal = None

    def picture(self, key: str, image: UInt8[np.ndarray, "height width 3"], step: int) -> None:
        """A picture the UI shows with a slider over the steps, from step 0: begin there, or its card opens empty.

        Its card is lower than the square it puts a picture in: of a square one the upper two thirds are seen.
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

    def flush(self) -> bool:
        """Sends what waits; says whether all of it arrived."""
        points, self._points = self._points, []
        for first in range(0, len(points), FLUSH_POINTS):
            some = points[first : first + FLUSH_POINTS]
            self._waiting.append(partial(self._client.log_batch, self.run_id, metrics=some))
        began = time.monotonic()
        is_sent = self._send()
        if is_sent and began >= self._next_beat:
            self.beat()
        ended = time.monotonic()
        # MLflow waits 20 s for a locked sqlite file: even such a store may cost training a tenth of its time at most
        self._next_flush = ended + max(FLUSH_SECONDS, 10 * (ended - began))
        return is_sent

    def keep_up(self) -> None:
        """Flushes; while the store is away only now and then, so that a training hardly waits for it."""
        if not self._is_away or time.monotonic() >= self._next_flush:
            self.flush()

    def beat(self) -> None:
        """Says that the training lives, where that was not said lately: see `end_the_dead`."""
        if time.monotonic() < self._next_beat or self._is_away:
            return
        self._next_beat = time.monotonic() + heartbeat.BEAT_SECONDS
        with suppress(*_failures()):  # the next one may come through
            # another machine may have taken a long silence for death
            self._client.update_run(self.run_id, status="RUNNING")
            self._client.set_tag(self.run_id, BEAT, heartbeat.now().isoformat(timespec="seconds"))

    def settle(self, seconds: float = PATIENCE_SECONDS) -> bool:
        """Flushes, and waits so long for a store that is away; says whether everything has arrived."""
        until = time.monotonic() + seconds
        while not self.flush() and time.monotonic() < until:
            time.sleep(min(5.0, max(0.0, until - time.monotonic())))
        return not self._waiting

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
        self._tell_again()

    def _tell_again(self) -> None:
        """Points that were written down and never reached the store."""
        if self._journal is None or not self._journal.exists():
            return
        missing: dict[tuple[str, int], tuple[int, float]] = {}
        for line in self._journal.read_text(encoding="utf-8").splitlines():
            try:
                when, step, values = json.loads(line)
            except ValueError:  # killed in the middle of a line: that step was not kept either
                continue
            for key, value in values.items():
                missing.setdefault((key, step), (when, value))  # a step done again after a kill: as it was first
        for (key, step), (when, value) in missing.items():
            self._take(when, step, {key: value})
        for key, step in missing:
            self._last_steps[key] = max(step, self._last_steps.get(key, -1))

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
                if not is_refusal(error):
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
    journal: Path | None = None,
) -> Tracker:
    """Starts a run, or goes on with run `run_id`. `note` is Markdown, shown on the run's page.

    `journal` is a file of ours for the points of its curves, until it ends: what the store missed is told from there.
    """
    assert len(params) <= MOST_PARAMS, f"{len(params)} params hide MLflow's pictures; log {MOST_PARAMS}, tag the rest"
    tags = tags | {"mlflow.source.name": "hilum", "mlflow.source.type": "LOCAL"}
    tags |= {OWNER: str(heartbeat.Owner.here()), BEAT: heartbeat.now().isoformat(timespec="seconds")}
    if note:
        tags["mlflow.note.content"] = note
    with store_errors(uri):
        from mlflow.entities import Param

        client = connect(uri)
        if run_id is None:
            run = client.create_run(_experiment_id(client, uri, experiment), tags=tags, run_name=run_name)
            client.log_batch(run.info.run_id, params=[Param(key, str(value)) for key, value in params.items()])
            known = {"run_id": run.info.run_id, "experiment_id": run.info.experiment_id}
            return Tracker(client, uri=uri, **known, journal=journal)
        client.update_run(run_id, status="RUNNING")
        run = client.get_run(run_id)
        if ENDED in run.data.tags:
            client.delete_tag(run_id, ENDED)
        tracker = Tracker(client, uri=uri, run_id=run_id, experiment_id=run.info.experiment_id, journal=journal)
        tracker.recall()
    for key, value in tags.items():
        tracker.tag(key, value)
    return tracker


@dataclass(frozen=True, kw_only=True)
class Over:
    """Something that is over when the store hears of it."""

    key: str
    """What it is known by, to us: told twice, it is there once."""
    name: str
    params: dict[str, str]
    tags: dict[str, str]
    metrics: tuple[tuple[str, float, int], ...]
    """Name, value and step."""
    began: datetime
    ended: datetime
    is_good: bool


KEY = "hilum.key"


def tell_of(over: Over, *, uri: str, experiment: str) -> None:
    """A run that is finished at once. One that a killed process left half-told is completed."""
    with store_errors(uri):
        from mlflow.entities import Metric, Param

        client = connect(uri)
        folder = _experiment_id(client, uri, experiment)
        found = client.search_runs([folder], f"tags.`{KEY}` = '{over.key}'", max_results=1)
        if found and found[0].info.status != "RUNNING":
            return
        began, ended = (round(moment.timestamp() * 1000) for moment in (over.began, over.ended))
        tags = over.tags | {KEY: over.key, "mlflow.source.name": "hilum", "mlflow.source.type": "LOCAL"}
        run = found[0] if found else client.create_run(folder, start_time=began, tags=tags, run_name=over.name)
        points = [Metric(metric_key(name), value, ended, step) for name, value, step in over.metrics]
        params = [Param(name, value) for name, value in over.params.items()]
        client.log_batch(run.info.run_id, metrics=points, params=params)
        client.set_terminated(run.info.run_id, "FINISHED" if over.is_good else "FAILED", ended)


@contextmanager
def ended_honestly(tracker: Tracker) -> Iterator[None]:
    """The run in MLflow ends as the training did: finished, failed, or killed by Ctrl-C or a scheduler's SIGTERM."""
    with stopped_by_signals("what is on disk is kept. Go on with --resume."):
        try:
            yield
        except (KeyboardInterrupt, Interrupted):
            tracker.finish("KILLED")
            raise
        except BaseException:
            tracker.finish("FAILED")
            raise
        tracker.finish("FINISHED")


def environment() -> str:
    """Every distribution that is installed, as pip takes it."""
    found = {(one.metadata["Name"] or "").lower(): one.version for one in metadata.distributions()}
    return "".join(f"{name}=={version}\n" for name, version in sorted(found.items()) if name)


def end_the_dead(uri: str) -> list[str]:
    """Runs of ours that say RUNNING although nobody is left to end them are marked KILLED; returns their ids.

    That is known of a process of this machine; one elsewhere must have been silent for `heartbeat.SILENT_HOURS`.
    """
    ended = []
    with store_errors(uri):
        client = connect(uri)
        for run in _running(client):
            owner = heartbeat.Owner.read(run.data.tags.get(OWNER, ""))
            beat = heartbeat.read_time(run.data.tags.get(BEAT, ""))
            if owner is None or not owner.is_gone(beat):
                continue
            heard = int(beat.timestamp() * 1000) if beat else None
            client.set_tag(run.info.run_id, ENDED, f"process {owner.pid} on {owner.host} was gone; go on with --resume")
            client.set_terminated(run.info.run_id, "KILLED", max(heard or 0, run.info.start_time))
            ended.append(run.info.run_id)
            logger.info("run %s (%s) was killed; MLflow says so now", run.info.run_name, run.info.run_id[:8])
    return ended


def _running(client: "mlflow.MlflowClient") -> Iterator[Any]:
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    page = None
    while experiments:
        found = client.search_runs(experiments, "attributes.status = 'RUNNING'", max_results=1000, page_token=page)
        yield from found
        page = found.token
        if not page:
            return


def _experiment_id(client: "mlflow.MlflowClient", uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(name):
        if str(found.artifact_location).startswith("mlflow-artifacts:") and not _is_served(uri):
            raise TrackingError(
                f"The experiment {name} in {_without_password(uri)} was begun through a tracking server, which alone "
                "reaches its files. The address of such a server is needed: start `hilum ui` on this store and give "
                "--tracking_uri http://127.0.0.1:5000, or name another store."
            )
        return found.experiment_id
    try:
        return client.create_experiment(
            name,
            # left to itself, MLflow on a database puts artifacts below whatever folder one happens to stand in
            artifact_location=None if _is_served(uri) else _artifacts(uri).as_uri(),
            # else MLflow's UI greets with its pages for chat models
            tags={"mlflow.experimentKind": "custom_model_development", "mlflow.note.content": EXPERIMENT_NOTE},
        )
    except MlflowException as error:
        if error.error_code == "RESOURCE_ALREADY_EXISTS" and (found := client.get_experiment_by_name(name)):
            return found.experiment_id  # two folds started in the same second
        raise


def serve(uri: str, host: str = "127.0.0.1", port: int = 5000) -> int:
    """Runs MLflow's UI on the store until it is told to stop; returns an exit code."""
    if _is_served(uri):
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
    os.environ.setdefault("MLFLOW_ARTIFACTS_DESTINATION", str(_artifacts(uri)))
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
    with store_errors(uri):
        (newest,) = connect(uri).search_experiments(max_results=1, order_by=["last_update_time DESC"])
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


def connect(uri: str) -> "mlflow.MlflowClient":
    _calm_mlflow()
    if database := _sqlite_file(uri):
        database.parent.mkdir(parents=True, exist_ok=True)
    with imported_quietly():
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _calm_mlflow() -> None:
    """Settings MLflow reads from the environment: no telemetry, no bars, and no two minutes of waiting in an epoch."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # stdout is for data
    os.environ.setdefault("MLFLOW_TRUNCATE_LONG_VALUES", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    with imported_quietly():
        import mlflow  # noqa: F401


@contextmanager
def imported_quietly() -> Iterator[None]:
    """While MLflow starts: what it and its hundred dependencies say to each other is no concern of our user's."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        yield


@contextmanager
def store_errors(uri: str) -> Iterator[None]:
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


def is_refusal(error: Exception) -> bool:
    """Whether the store is there and will never take this message, so that there is no sense in sending it again."""
    refusals = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE")
    return isinstance(error, FileNotFoundError) or getattr(error, "error_code", "") in refusals


def _first_line(error: Exception) -> str:
    return _without_password(str(error).strip().partition("\n")[0])[:200] or type(error).__name__


def _without_password(text: str) -> str:
    return re.sub(r"//[^/\s]+@", "//", text)  # to the last @: a password may hold one


def _is_served(uri: str) -> bool:
    """By a server, which decides where artifacts lie."""
    return uri.startswith(("http://", "https://"))


def _artifacts(uri: str) -> Path:
    """Beside a sqlite file; of another database in hilum's home."""
    database = _sqlite_file(uri)
    return (database.parent if database else home()) / "artifacts"


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute() if uri.startswith("sqlite:///") else None
