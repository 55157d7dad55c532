"""What reaches MLflow is all of it, once, whatever happens to the training or to the store."""

import logging
import os
import signal
import sqlite3
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from pipeline import heartbeat
from pipeline.registry import fetch, register
from pipeline.report import hilum_version
from pipeline.tracking import (
    BEAT,
    ENDED,
    OWNER,
    Tracker,
    TrackingError,
    code_version,
    default_uri,
    end_the_dead,
    home,
    metric_key,
    open_run,
    serve,
    ui_url,
)
from tests.pipeline.servers import a_package, contents, free_port, serving, stop

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One store for all tests here: making a new one takes seconds. Its folder has a space and a # in its name."""
    return f"sqlite:///{tmp_path_factory.mktemp('a store')}/st#re/mlflow.db"


def start(uri: str, run_id: str | None = None, journal: Path | None = None, **params: str | int | float) -> Tracker:
    told = {"experiment": "tests", "run_name": "a run", "params": params, "tags": {}}
    return open_run(uri=uri, **told, run_id=run_id, journal=journal)


def curve(run: Tracker, key: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in run._client.get_metric_history(run.run_id, key))


def status(run: Tracker) -> str:
    return run._client.get_run(run.run_id).info.status


def test_a_run_keeps_what_it_was_told(uri: str) -> None:
    run = open_run(
        uri=uri,
        experiment="tests",
        run_name="fold 0",
        params={"network": "residual_unet", "fold": 0, "spacing_mm": 0.5},
        tags={"hilum.version": "0.1.0"},
        note="**liver**",
    )
    run.metrics({"train/loss": 1.5, "val/dice[lesion]": float("nan")}, step=0)
    run.metrics({"train/loss": 1.25}, step=1)
    run.dataset("phantoms", "ab" * 32, cases=12, context="training")
    run.finish("FINISHED")

    told = run._client.get_run(run.run_id)
    assert told.data.params == {"network": "residual_unet", "fold": "0", "spacing_mm": "0.5"}
    assert told.data.tags["hilum.version"] == "0.1.0"
    assert told.data.tags["mlflow.note.content"] == "**liver**"
    assert told.info.run_name == "fold 0"
    assert told.info.status == "FINISHED"
    assert curve(run, "train/loss") == [(0, 1.5), (1, 1.25)]
    assert np.isnan(curve(run, "val/dice_lesion")[0][1])
    (used,) = told.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.source) == ("phantoms", "{}")
    assert used.tags[0].value == "training"


def test_artifacts_lie_beside_the_database_not_in_the_working_folder(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = start(uri)
    run.text("patch: [64, 64, 32]\n", "plan.yaml")
    (tmp_path / "splits.json").write_text("{}")
    run.file(tmp_path / "splits.json", "data")
    database = Path(uri.removeprefix("sqlite:///"))
    stored = database.parent / "artifacts" / run.run_id / "artifacts"
    assert contents(stored) == {"plan.yaml": b"patch: [64, 64, 32]\n", "data/splits.json": b"{}"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["splits.json"]


def test_many_points_cost_few_calls(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(uri)
    calls = []
    log_batch = run._client.log_batch
    monkeypatch.setattr(run._client, "log_batch", lambda *args, **more: (calls.append(1), log_batch(*args, **more)))
    for step in range(600):
        run.metrics({"train/loss": 1 / (step + 1), "train/rate": 0.01}, step)
    assert run.flush()
    assert len(calls) <= 3
    assert curve(run, "train/loss") == [(step, 1 / (step + 1)) for step in range(600)]


def test_points_do_not_wait_for_ever(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.tracking.FLUSH_SECONDS", 0.5)
    run = start(uri)
    run.metrics({"train/loss": 1.0}, 0)
    assert curve(run, "train/loss") == []
    time.sleep(0.5)
    run.metrics({"train/loss": 0.5}, 1)
    assert curve(run, "train/loss") == [(0, 1.0), (1, 0.5)]


def test_a_resumed_run_has_no_step_twice(uri: str) -> None:
    first = start(uri, network="residual_unet")
    for step in range(10):
        first.metrics({"train/loss": float(step)}, step)
    first.metrics({"val/dice_liver": 0.5}, 4)
    first.picture("validation/case 1", np.zeros((32, 32, 3), np.uint8), 4)
    first.finish("KILLED")

    again = start(uri, run_id=first.run_id, network="another, and params cannot change")
    assert again.run_id == first.run_id
    assert status(again) == "RUNNING"
    for step in range(7, 13):
        again.metrics({"train/loss": -1.0 if step < 10 else float(step), "val/dice_liver": 0.75}, step)
    again.picture("validation/case 1", np.zeros((32, 32, 3), np.uint8), 4)
    again.picture("validation/case 1", np.zeros((32, 32, 3), np.uint8), 8)
    again.finish("FINISHED")
    assert curve(again, "train/loss") == [(step, float(step)) for step in range(13)]
    assert curve(again, "val/dice_liver") == [(4, 0.5)] + [(step, 0.75) for step in range(7, 13)]
    pictures = [entry.path for entry in again._client.list_artifacts(again.run_id, "images")]
    assert len([path for path in pictures if path.endswith(".png")]) == 2


def test_a_killed_training_goes_on_in_the_same_run(uri: str) -> None:
    code = f"""
import time
from pipeline.tracking import open_run
run = open_run(uri={uri!r}, experiment="tests", run_name="killed", params={{}}, tags={{}})
for step in range(5):
    run.metrics({{"train/loss": float(step)}}, step)
assert run.flush()
run.metrics({{"train/loss": 99.0}}, 5)
print(run.run_id, flush=True)
time.sleep(600)
"""
    training = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        assert training.stdout is not None
        run_id = training.stdout.readline().strip()
    finally:
        os.kill(training.pid, signal.SIGKILL)
        training.communicate()

    run = start(uri, run_id=run_id)
    for step in range(3, 8):
        run.metrics({"train/loss": float(step)}, step)
    run.finish("FINISHED")
    assert status(run) == "FINISHED"
    assert curve(run, "train/loss") == [(step, float(step)) for step in range(8)]


def tags(run: Tracker) -> dict[str, str]:
    return run._client.get_run(run.run_id).data.tags


def test_a_run_whose_process_was_killed_is_marked_killed_and_no_other(uri: str) -> None:
    alive, elsewhere, silent, done = (start(uri) for _ in range(4))
    done.finish("FINISHED")
    for run, hours in ((elsewhere, 1), (silent, 7)):
        run.tag(OWNER, "another-machine 0000/1 1 1")
        run.tag(BEAT, (heartbeat.now() - timedelta(hours=hours)).isoformat())
    code = f"""
import os, signal
from pipeline.tracking import open_run
run = open_run(uri={uri!r}, experiment="tests", run_name="killed", params={{}}, tags={{}})
print(run.run_id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    words = [sys.executable, "-c", code]
    killed = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout.strip()
    assert set(end_the_dead(uri)) == {killed, silent.run_id}
    assert [status(run) for run in (alive, elsewhere, done)] == ["RUNNING", "RUNNING", "FINISHED"]
    told = alive._client.get_run(killed)
    assert told.info.status == "KILLED" and told.info.end_time >= told.info.start_time
    assert "--resume" in told.data.tags[ENDED]
    assert end_the_dead(uri) == []

    again = start(uri, run_id=killed)
    assert status(again) == "RUNNING" and ENDED not in tags(again)
    assert heartbeat.Owner.read(tags(again)[OWNER]) == heartbeat.Owner.here()
    for run in (alive, elsewhere, again):
        run.finish("FINISHED")


def test_a_training_that_was_taken_for_dead_says_that_it_lives(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(uri)
    first = tags(run)[BEAT]
    run.beat()
    assert tags(run)[BEAT] == first, "not every step is worth a call"
    run._client.set_terminated(run.run_id, "KILLED")
    monkeypatch.setattr(run, "_next_beat", 0.0)
    time.sleep(1)
    run.flush()
    assert status(run) == "RUNNING" and tags(run)[BEAT] > first
    run.finish("FINISHED")


def test_points_of_a_training_killed_while_the_store_was_away_are_told_when_it_goes_on(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = tmp_path / "points.jsonl"
    first = start(uri, journal=journal)
    first.metrics({"train/loss": 0.0}, 0)
    assert first.flush()

    def away(*_: object, **__: object) -> None:
        raise ConnectionRefusedError("nobody there")

    with monkeypatch.context() as patched:
        patched.setattr(first._client, "log_batch", away)
        for step in (1, 2):
            first.metrics({"train/loss": float(step), "val/dice": 0.5}, step)
            assert not first.flush()
    with journal.open("a") as cut:
        cut.write('[17, 3, {"train/lo')  # killed in the middle of a line

    again = start(uri, run_id=first.run_id, journal=journal)
    for step in (2, 3):  # the second step was not kept, and is done again
        again.metrics({"train/loss": -1.0 if step == 2 else 3.0}, step)
    again.finish("FINISHED")
    assert curve(again, "train/loss") == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]
    assert curve(again, "val/dice") == [(1, 0.5), (2, 0.5)]


def test_a_full_disk_does_not_stop_the_training(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    run = start(uri, journal=Path("/dev/full"))
    with caplog.at_level(logging.WARNING, logger="pipeline.tracking"):
        for step in range(3):
            run.metrics({"train/loss": float(step)}, step)
    assert len(caplog.records) == 1 and "cannot be written" in caplog.text
    run.finish("FINISHED")
    assert curve(run, "train/loss") == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_a_store_that_is_away_is_not_asked_after_every_epoch(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(uri)
    asked, log_batch, is_back = [], run._client.log_batch, []

    def away(*args, **more) -> None:
        asked.append(1)
        if not is_back:
            raise ConnectionRefusedError("nobody there")
        log_batch(*args, **more)

    monkeypatch.setattr(run._client, "log_batch", away)
    for epoch in range(50):
        run.metrics({"train/loss": float(epoch)}, epoch)
        run.keep_up()
    assert len(asked) == 1, "each time may cost twenty seconds"
    is_back.append(1)
    run.finish("FINISHED")
    assert len(curve(run, "train/loss")) == 50


def test_a_finished_training_waits_for_a_store_that_comes_back(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(uri)
    back, log_batch = time.monotonic() + 1.5, run._client.log_batch

    def away_for_a_while(*args, **more) -> None:
        if time.monotonic() < back:
            raise ConnectionRefusedError("nobody there")
        log_batch(*args, **more)

    monkeypatch.setattr(run._client, "log_batch", away_for_a_while)
    run.metrics({"train/loss": 1.0}, 0)
    assert not run.settle(seconds=0)
    assert run.settle(seconds=60)
    assert curve(run, "train/loss") == [(0, 1.0)]


def test_a_picture_waits_while_the_artifacts_cannot_be_written(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    run = start(uri)
    folder = Path(uri.removeprefix("sqlite:///")).parent / "artifacts"
    folder.mkdir(exist_ok=True)
    folder.rename(folder.with_name("aside"))
    folder.write_text("no folder")
    try:
        with caplog.at_level(logging.WARNING, logger="pipeline.tracking"):
            run.picture("case", np.full((16, 16, 3), 7, np.uint8), 1)
            run.text("later", "later.txt")
            assert not run.flush()
    finally:
        folder.unlink()
        folder.with_name("aside").rename(folder)
    assert len(caplog.records) == 1
    assert run.flush()
    stored = contents(folder / run.run_id / "artifacts")
    assert stored["later.txt"] == b"later"
    assert len([name for name in stored if name.endswith(".png")]) == 1


@pytest.mark.slow
def test_nothing_is_missing_after_the_store_was_locked(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    run = start(uri)
    run.metrics({"train/loss": 0.0}, 0)
    assert run.flush()
    lock = sqlite3.connect(uri.removeprefix("sqlite:///"), isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    try:
        with caplog.at_level(logging.INFO, logger="pipeline.tracking"):
            run.metrics({"train/loss": 1.0}, 1)
            assert not run.flush()
            run.tag("during", "lock")
            run.picture("case", np.zeros((16, 16, 3), np.uint8), 1)
            run.metrics({"train/loss": 2.0}, 2)
    finally:
        lock.execute("ROLLBACK")
        lock.close()
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    run.finish("FINISHED")
    assert curve(run, "train/loss") == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert run._client.get_run(run.run_id).data.tags["during"] == "lock"
    assert len(run._client.list_artifacts(run.run_id, "images")) == 2
    assert status(run) == "FINISHED"


def test_points_that_arrived_although_the_answer_was_lost_are_stored_once(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(uri)
    log_batch = run._client.log_batch
    answers_lost = []

    def lose_the_first_answer(*args, **more) -> None:
        log_batch(*args, **more)
        if not answers_lost:
            answers_lost.append(args)
            raise ConnectionResetError("the answer is lost")

    monkeypatch.setattr(run._client, "log_batch", lose_the_first_answer)
    run.metrics({"train/loss": 1.0}, 0)
    assert not run.flush()
    run.metrics({"train/loss": 0.5}, 1)
    assert run.flush()
    assert curve(run, "train/loss") == [(0, 1.0), (1, 0.5)]


def test_what_the_store_will_never_take_does_not_block_the_rest(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = start(uri)
    with caplog.at_level(logging.WARNING, logger="pipeline.tracking"):
        run.file(tmp_path / "vanished.json")
        run.tag("x" * 10_000, "too long a key")
    assert [record.getMessage().partition(" of ")[0] for record in caplog.records] == ["MLflow refuses a message"] * 2
    run.tag("after", "all")
    assert run._client.get_run(run.run_id).data.tags["after"] == "all"


@pytest.mark.slow
def test_a_server_that_stops_and_starts_again_has_everything(uri: str, tmp_path: Path) -> None:
    port = free_port()
    server = serving(uri, port)
    try:
        run = start(f"http://127.0.0.1:{port}")
        run.metrics({"train/loss": 0.0}, 0)
        assert run.flush()
        stop(server)
        began = time.monotonic()
        run.metrics({"train/loss": 1.0}, 1)
        assert not run.flush()
        run.tag("while", "away")
        run.picture("case", np.zeros((16, 16, 3), np.uint8), 1)
        assert time.monotonic() - began < 15
        server = serving(uri, port)
        assert run.flush()
        assert curve(run, "train/loss") == [(0, 0.0), (1, 1.0)]
        register(a_package(tmp_path / "package"), "served", uri=run.uri, run_id=run.run_id, aliases=("champion",))
        run.finish("FINISHED")
        assert status(run) == "FINISHED"
        package = fetch("models:/served@champion", tmp_path / "fetched", run.uri)
        assert contents(package) == contents(tmp_path / "package")
    finally:
        stop(server)


def test_the_code_version_is_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    house = tmp_path / "house"
    (house / "pipeline").mkdir(parents=True)
    monkeypatch.setattr("pipeline.tracking.__file__", str(house / "pipeline" / "tracking.py"))
    assert code_version() == hilum_version()
    git = ["git", "-C", str(house), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    assert code_version() == hilum_version()
    (house / "file").write_text("as committed")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "first"], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert code_version() == commit[:12]
    (house / "file").write_text("changed since")
    assert code_version() == f"{commit[:12]}-changed"


def test_more_params_than_a_picture_leaves_room_for_are_refused(uri: str) -> None:
    with pytest.raises(AssertionError, match="7 params"):
        start(uri, **{name: 1 for name in "abcdefg"})


def test_no_store_no_start(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is no database, it is a note " * 100)
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_URI"):
        start(f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(TrackingError) as away:
        start(f"http://somebody:secret@127.0.0.1:{free_port()}")
    assert "secret" not in str(away.value)


def test_a_run_that_is_not_there_cannot_be_resumed(uri: str) -> None:
    with pytest.raises(TrackingError, match="0123456789abcdef"):
        start(uri, run_id="0123456789abcdef" * 2)


@pytest.mark.parametrize("secret", ["geheim", "g@heim", "ge:heim", "g%2Fheim"])
def test_no_password_is_told(secret: str) -> None:
    from pipeline.tracking import _without_password

    told = _without_password(f"cannot reach postgresql+psycopg2://hilum:{secret}@db.hospital:5432/runs")
    assert told == "cannot reach postgresql+psycopg2://db.hospital:5432/runs"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("val/dice_liver", "val/dice_liver"),
        ("val/dice[left lobe]", "val/dice_left lobe"),
        ("val/dice (lésion)", "val/dice _lésion"),
        ("/a//../b/", "a/b"),
        ("?", "unnamed"),
    ],
)
def test_a_metric_gets_a_name_mlflow_takes(name: str, key: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    assert metric_key(name) == key
    _validate_metric_name(key)


def test_home_and_store_follow_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HILUM_HOME", str(tmp_path / "a" / "b"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert home() == tmp_path / "a" / "b"
    assert home().is_dir()
    assert default_uri() == f"sqlite:///{tmp_path}/a/b/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.hospital:5000")
    assert default_uri() == "http://tracking.hospital:5000"


def test_a_taken_port_and_a_served_store_are_refused(uri: str) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(TrackingError, match="free port"):
            serve(uri, port=taken.getsockname()[1])
    with pytest.raises(TrackingError, match="already"):
        serve("http://127.0.0.1:5000")


def test_the_address_opens_the_pages_for_trained_models() -> None:
    assert ui_url("127.0.0.1", 5001) == "http://127.0.0.1:5001/#/experiments?workflowType=machine_learning"
    assert ui_url("::1", 80, "models").startswith("http://[::1]:80/#/models?")


def test_mlflow_is_imported_by_need_only() -> None:
    code = "import sys, pipeline.tracking; print([name for name in sys.modules if name.partition('.')[0] == 'mlflow'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_experiment_begun_through_a_server_is_refused_at_once_without_one(uri: str) -> None:
    client = start(uri)._client
    client.create_experiment("begun elsewhere", artifact_location="mlflow-artifacts:/7")
    with pytest.raises(TrackingError, match="begun through a tracking server"):
        open_run(uri=uri, experiment="begun elsewhere", run_name="a run", params={}, tags={})
