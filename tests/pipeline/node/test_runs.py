"""Runs in MLflow: one for each story that ended, whatever happens to the store, and no story waits for it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.node import tracking
from pipeline.node.config import Node
from pipeline.node.desk import Desk
from pipeline.node.ledger import open_ledger
from pipeline.node.routes import Route
from pipeline.node.rules import Rule
from pipeline.node.spool import Spool, open_keys
from pipeline.node.stories import Stories, Story
from pipeline.node.tracking import Tracking
from pipeline.report import Report, as_json
from preprocessing.records import encode

STUDY = "a" * 20
REPORT = Report(
    case_id="case", package_id="f" * 64, package_name="tiny", hilum_version="0", input_sha256="e" * 64, sources=("scan",),
    reader="dicom", repairs=(), grid={}, volumes_ml={"liver": 1500.25, "left kidney": 0.0}, warnings=(), seconds={},
    files=(), outputs=(),
)  # fmt: skip

pytestmark = pytest.mark.slow
"""MLflow's store takes ten seconds to make."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def desk(tmp_path: Path, store: str) -> Iterator[Desk]:
    route = Route(package=tmp_path, take={"mr": Rule()})
    node = Node(state=tmp_path / "state", routes={"liver": route}, tracking=store)
    ledger = open_ledger(node.state)
    yield Desk(node=node, spool=Spool(node.state, open_keys(node.state)), ledger=ledger, stories=Stories(ledger))
    ledger.close()


def ended(at: Desk, study: str, state: str = "done", code: str = "") -> Story:
    story = at.stories.begin(study, 1, "liver")
    for step in ("choosing", "segmenting", "sending"):
        story = at.stories.note(story, step)  # type: ignore[arg-type]
    return at.stories.note(story, state, code, package={"id": "f" * 64, "name": "tiny", "attempt": 1})  # type: ignore[arg-type]


def runs(at: Desk) -> list:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=at.node.tracking)
    found = [one.experiment_id for one in client.search_experiments() if one.name == "node-liver"]
    told = client.search_runs(found) if found else []
    return [run for run in told if at.stories.get(run.info.run_name.partition("-")[0], 1, "liver")]


def test_a_story_that_ended_is_one_run_with_its_package_seconds_and_volumes_however_often_it_is_told(
    desk: Desk,
) -> None:
    story = ended(desk, STUDY)
    for number in (1, 2):
        folder = desk.folder(STUDY, 1, "liver") / f"results/case-{number}"
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(as_json(encode(REPORT)))
    desk.stories.begin("b" * 20, 1, "liver")
    Tracking(desk=desk).look()
    Tracking(desk=desk).look()
    with desk.ledger.writing() as connection:  # killed after the run, before its row
        connection.execute(tracking.tracked.delete())
    Tracking(desk=desk).look()
    (run,) = runs(desk)
    assert (run.info.status, run.data.tags["state"], run.data.tags["hilum.key"]) == ("FINISHED", "done", story.id)
    assert run.data.params == {"package": "tiny", "package_id": "f" * 64}
    assert set(run.data.metrics) == {
        "seconds/queued", "seconds/choosing", "seconds/segmenting", "seconds/sending", "volume_ml/liver",
        "volume_ml/left kidney",
    }  # fmt: skip
    assert run.data.metrics["volume_ml/liver"] == 1500.25
    assert run.info.start_time == round(story.began.timestamp() * 1000)


def test_a_run_that_a_killed_process_left_half_told_is_completed(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    ended(desk, "c" * 20, state="dead", code="target_away")
    tell = MlflowClient.log_batch
    monkeypatch.setattr(MlflowClient, "log_batch", lambda *_, **__: (_ for _ in ()).throw(OSError("gone")))
    Tracking(desk=desk).look()
    assert [run.info.status for run in runs(desk)] == ["RUNNING"]
    monkeypatch.setattr(MlflowClient, "log_batch", tell)
    Tracking(desk=desk).look()
    (run,) = runs(desk)
    assert run.info.status == "FAILED" and run.data.tags["code"] == "target_away" and run.data.metrics


def test_a_store_that_is_away_is_left_alone_for_longer_and_longer_and_misses_nothing(desk: Desk) -> None:
    ended(desk, "d" * 20)
    away = Desk(
        node=replace(desk.node, tracking="postgresql://nobody:secret@127.0.0.1:9/none"), spool=desk.spool,
        ledger=desk.ledger, stories=desk.stories,
    )  # fmt: skip
    told = Tracking(desk=away)
    pauses = []
    for _ in range(8):
        told.not_before = 0.0
        told.look()
        pauses.append(told.pause_s)
    assert pauses == [10, 20, 40, 80, 160, 320, 600, 600]
    Tracking(desk=desk).look()
    assert len(runs(desk)) == 1


def test_where_no_store_is_named_nothing_is_told(desk: Desk) -> None:
    ended(desk, "e" * 20)
    node = replace(desk.node, tracking="")
    plain = Desk(node=node, spool=desk.spool, ledger=desk.ledger, stories=desk.stories)
    Tracking(desk=plain).look()
    assert runs(desk) == []
