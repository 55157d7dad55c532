"""The status page: who may see it, what it tells, and that no other site can act through it."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from starlette.testclient import TestClient

from pipeline.node import web
from pipeline.node.access import Sessions, User, hashed, is_right
from pipeline.node.config import Node, Peer
from pipeline.node.ledger import open_ledger
from pipeline.node.nouns import Arrival, Place
from pipeline.node.routes import Route
from pipeline.node.rules import Rule
from pipeline.node.spool import Spool, open_keys
from pipeline.node.stories import Stories, Story
from pipeline.node.watcher import Watcher
from pipeline.node.workflow import Desk

USERS = {"ann": User(role="operator", password=hashed("right horse")), "bob": User(password=hashed("battery"))}


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    route = Route(package=tmp_path, take={"mr": Rule()}, targets=("archive",))
    node = Node(
        state=tmp_path / "state", peers={"archive": Peer(aet="A", host="h")}, routes={"liver": route, "brain": route}
    )
    keys, ledger = open_keys(node.state), open_ledger(node.state)
    yield Desk(node=node, spool=Spool(node.state, keys), ledger=ledger, stories=Stories(ledger))
    ledger.close()


@pytest.fixture
def page(desk: Desk) -> Iterator[TestClient]:
    with TestClient(web.Pages(desk, USERS).app(), base_url="http://node") as client:
        yield client


def log_in(page: TestClient, name: str, password: str) -> int:
    return page.post("/login", data={"name": name, "password": password}, follow_redirects=False).status_code


def a_story(
    desk: Desk, route: str = "liver", state: str = "dead", words: str = "archive is away. Tried 5 times."
) -> Story:
    place = Place(study="a" * 20, series="b" * 20, object="c" * 20)
    desk.ledger.record(Arrival(place=place, bytes=1, sha256="d" * 64, kind="1.2", source="scanner"))
    desk.ledger.freeze(place.study)
    story = desk.stories.begin(place.study, 1, route)
    told = {"series": "b" * 20, "modality": "MR", "slices": 30, "direction": "axial", "distance_mm": 1.5}
    return desk.stories.note(
        story, state, "target_away", words, chosen=[[told]], why_not=[told | {"why_not": "modality MR, not <CT>"}]
    )  # type: ignore[arg-type]


def test_a_password_is_kept_as_a_hash_that_fits_nothing_else() -> None:
    kept = hashed("right horse")
    assert is_right("right horse", kept) and not is_right("wrong", kept) and "right" not in kept
    assert kept != hashed("right horse") and not any(is_right("x", odd) for odd in ("", "scrypt:zz:zz", "plain:x:x"))


def test_nobody_sees_anything_without_a_login(page: TestClient, desk: Desk) -> None:
    story = a_story(desk)
    for place in ("/", f"/story/{story.study}/1/liver"):
        answer = page.get(place, follow_redirects=False)
        assert answer.status_code == 303 and answer.headers["location"] == "/login"
    assert page.get(f"/story/{story.study}/1/liver/case-1.png").status_code == 403
    assert log_in(page, "ann", "wrong") == 403 and log_in(page, "nobody", "x") == 403 and log_in(page, "ann", "") == 403
    assert page.get("/", follow_redirects=False).status_code == 303


def test_a_viewer_sees_every_story_with_its_reason_and_why_each_series_was_left(page: TestClient, desk: Desk) -> None:
    story = a_story(desk)
    assert log_in(page, "bob", "battery") == 303
    table = page.get("/").text
    assert "archive is away" in table and f"/story/{story.study}/1/liver" in table and "<b>1</b>dead letters" in table
    told = page.get(f"/story/{story.study}/1/liver").text
    assert "modality MR, not &lt;CT&gt;" in told and "Begin anew" not in told
    assert page.get("/story/none/1/liver").status_code == 404


def test_a_picture_is_shown_of_a_case_that_has_one_and_nothing_else_is_handed_out(page: TestClient, desk: Desk) -> None:
    story = a_story(desk)
    folder = desk.folder(story.study, 1, "liver") / "results/case-1"
    folder.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(folder / "overlay.png")
    log_in(page, "bob", "battery")
    assert "case-1.png" in page.get(f"/story/{story.study}/1/liver").text
    answer = page.get(f"/story/{story.study}/1/liver/case-1.png")
    assert answer.headers["content-type"] == "image/png" and answer.headers["cache-control"] == "no-store"
    for odd in ("..%2f..%2fsecret", "case-2", ".."):
        assert page.get(f"/story/{story.study}/1/liver/{odd}.png").status_code in (404, 400)


def test_an_operator_begins_a_story_anew_and_neither_a_viewer_nor_another_site_can(
    page: TestClient, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    story, begun = a_story(desk), []
    monkeypatch.setattr(web, "retry", lambda story, desk: begun.append(desk.stories.again(story)))
    place = f"/story/{story.study}/1/liver/retry"
    assert page.post(place, data={"token": "x"}).status_code == 403
    log_in(page, "bob", "battery")
    of_bob = Sessions(desk.spool.keys.secret).token(page.cookies[web.COOKIE])
    assert page.post(place, data={"token": of_bob}).status_code == 403
    log_in(page, "ann", "right horse")
    for token in ("", of_bob, "0" * 64):  # a form from elsewhere brings no token, or another's
        assert page.post(place, data={"token": token}).status_code == 403
    assert not begun
    token = re.search(r'name="token" value="(\w+)"', page.get(f"/story/{story.study}/1/liver").text)[1]  # type: ignore[index]
    assert page.post(place, data={"token": token}, follow_redirects=False).status_code == 303
    assert begun[0].state == "queued" and begun[0].attempt == 2
    assert page.post(place, data={"token": token}).status_code == 409, "it is under way now"


def test_a_session_ends_when_its_time_is_over_or_it_was_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = Sessions(b"s" * 32)
    cookie = sessions.begin("ann")
    assert sessions.whose(cookie) == "ann" and Sessions(b"t" * 32).whose(cookie) == ""
    assert sessions.whose(cookie.replace(b"ann".hex(), b"bob".hex())) == "" and sessions.whose("") == ""
    monkeypatch.setattr("time.time", lambda: 4e9)
    assert sessions.whose(cookie) == ""


def test_machines_read_depth_age_and_failures_and_nothing_of_a_patient(page: TestClient, desk: Desk) -> None:
    a_story(desk)
    a_story(desk, "brain", "segmenting", "")
    told = page.get("/metrics").text
    assert 'hilum_stories{state="dead",code="target_away"} 1' in told and "hilum_queue_depth 1" in told
    assert float(re.search(r"hilum_queue_oldest_seconds (\d\S*)", told)[1]) >= 0 and "a" * 20 not in told  # type: ignore[index]
    for line in told.splitlines():
        assert line.startswith("# ") or re.fullmatch(r'[a-z_]+(\{([a-z]+="[^"]*",?)+\})? [0-9.e+]+', line), line


def test_health_tells_a_full_disk_and_a_dead_ledger(
    page: TestClient, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert page.get("/health/live").text == page.get("/health/ready").text == "ok\n"
    monkeypatch.setattr(Spool, "free_bytes", lambda spool: 0)
    assert page.get("/health/ready").status_code == 503 and "reserve" in page.get("/health/ready").text
    monkeypatch.setattr(Stories, "counts", lambda stories: 1 / 0)
    assert "ledger" in page.get("/health/ready").text and page.get("/health/live").status_code == 200


def test_pages_are_neither_kept_nor_framed_nor_run_anything(page: TestClient) -> None:
    answer = page.get("/login")
    assert answer.headers["cache-control"] == "no-store" and answer.headers["x-frame-options"] == "DENY"
    assert "script-src 'none'" in answer.text and "form-action 'self'" in answer.text


def test_a_revision_that_was_frozen_just_before_a_kill_is_begun_at_the_next_look(desk: Desk) -> None:
    place = Place(study="a" * 20, series="b" * 20, object="c" * 20)
    desk.ledger.record(Arrival(place=place, bytes=1, sha256="d" * 64, kind="1.2", source=""))
    desk.ledger.freeze(place.study)
    begun: list[str] = []
    Watcher(desk=desk, begin=lambda story, route: begun.append(story.route)).look()
    assert sorted(begun) == ["brain", "liver"]
