"""The web side: who is let in by what, how often somebody may guess, and what machines are told."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route as Door
from starlette.testclient import TestClient

from pipeline.node import guard, metrics, web
from pipeline.node.access import Sessions, Throttle, Token, User, hashed, is_right, make_token
from pipeline.node.config import Node, Peer, Showing
from pipeline.node.desk import Desk
from pipeline.node.ledger import open_ledger
from pipeline.node.nouns import UNKNOWN_CALLER, Arrival, Place
from pipeline.node.routes import Route
from pipeline.node.rules import Rule
from pipeline.node.spool import Spool, open_keys
from pipeline.node.stories import Stories, Story
from pipeline.node.watcher import Watcher

USERS = {"ann": User(role="operator", password=hashed("right horse")), "bob": User(password=hashed("battery"))}
TOKENS = {role: make_token() for role in ("viewer", "sender", "operator")}
SHOWN = "ab" * 32
STUDY = "a" * 20


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    route = Route(package=tmp_path, take={"mr": Rule()}, targets=("archive",))
    node = Node(
        state=tmp_path / "state",
        peers={"archive": Peer(aet="A", host="h"), "scanner": Peer(aet="S", certificate=SHOWN.upper())},
        routes={"liver": route, "brain": route},
        showing=Showing(
            users=USERS, tokens={role: Token(role=role, hash=hash) for role, (_, hash) in TOKENS.items()}  # type: ignore[arg-type]
        ),
    )  # fmt: skip
    keys, ledger = open_keys(node.state), open_ledger(node.state)
    yield Desk(node=node, spool=Spool(node.state, keys), ledger=ledger, stories=Stories(ledger))
    ledger.close()


@pytest.fixture
def page(desk: Desk) -> Iterator[TestClient]:
    with TestClient(web.application(desk), base_url="http://node") as client:
        yield client


def log_in(page: TestClient, name: str, password: str) -> int:
    return page.post("/login", data={"name": name, "password": password}, follow_redirects=False).status_code


def a_story(desk: Desk, route: str = "liver", state: str = "dead", words: str = "archive is away.") -> Story:
    place = Place(study=STUDY, series="b" * 20, object="c" * 20)
    desk.ledger.record(Arrival(place=place, bytes=1, sha256="d" * 64, kind="1.2", source="scanner"))
    desk.ledger.freeze(place.study)
    story = desk.stories.begin(place.study, 1, route)
    return desk.stories.note(story, state, "target_away" if words else "", words)  # type: ignore[arg-type]


def test_a_password_is_kept_as_a_hash_that_fits_nothing_else() -> None:
    kept = hashed("right horse")
    assert is_right("right horse", kept) and not is_right("wrong", kept) and "right" not in kept
    assert kept != hashed("right horse") and not any(is_right("x", odd) for odd in ("", "scrypt:zz:zz", "plain:x:x"))


def test_nobody_sees_anything_without_a_login(page: TestClient, desk: Desk) -> None:
    a_story(desk)
    story = f"/story/{STUDY}/1/liver"
    for place in ("/", story, f"/study/{STUDY}", "/peers", "/node", "/audit", f"{story}/cases/case-1/picture.png"):
        answer = page.get(place, follow_redirects=False)
        assert answer.status_code == 303 and answer.headers["location"] == "/login" and STUDY not in answer.text, place
    assert log_in(page, "ann", "wrong") == 403 and log_in(page, "nobody", "x") == 403 and log_in(page, "bob", "") == 403
    assert page.get("/", follow_redirects=False).status_code == 303
    assert [line["what"] for line in desk.audit.newest(3)] == ["login_failed"] * 3
    assert [line["facts"]["who"] for line in desk.audit.newest(3)] == ["bob", "", "ann"], "no name that is none of ours"


def test_who_guesses_too_often_is_not_heard_for_a_while_even_with_the_right_password(
    page: TestClient, desk: Desk
) -> None:
    clock = [0.0]
    page.app.state.guard = guard.Guard(desk, throttle=Throttle(clock=lambda: clock[0]))  # type: ignore[attr-defined]
    assert [log_in(page, "ann", f"guess {n}") for n in range(5)] == [403] * 5
    answer = page.post("/login", data={"name": "ann", "password": "right horse"})
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) > 800 and "15 min" in answer.text
    assert log_in(page, "bob", "battery") == 303, "another name from the same address"
    clock[0] = 901.0
    assert log_in(page, "ann", "right horse") == 303


def test_a_name_is_guarded_from_all_addresses_but_not_against_who_logged_in_there_before() -> None:
    throttle = Throttle(clock=lambda: 0.0)
    throttle.was_right("ann", "desk")
    for n in range(30):
        throttle.was_wrong("ann", f"address {n}")
    assert throttle.wait("ann", "address 99") > 0 and throttle.wait("bob", "address 99") == 0
    assert throttle.wait("ann", "desk") == 0, "strangers do not lock her out"
    for _ in range(5):
        throttle.was_wrong("ann", "desk")
    assert throttle.wait("ann", "desk") > 0, "she herself may guess five times, too"


def test_a_flood_of_names_makes_the_throttle_forget_and_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.node.access.REMEMBERED", 50)
    throttle = Throttle()
    for n in range(200):
        throttle.was_wrong(f"name {n}", "one")
        throttle.was_right(f"name {n}", f"address {n}")
    assert len(throttle.wrong) <= 50 and len(throttle.known) <= 50


def test_a_session_ends_when_its_time_is_over_or_it_was_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = Sessions(b"s" * 32)
    cookie = sessions.begin("ann")
    assert sessions.whose(cookie) == "ann" and Sessions(b"t" * 32).whose(cookie) == ""
    assert sessions.whose(cookie.replace(b"ann".hex(), b"bob".hex())) == "" and sessions.whose("") == ""
    assert [sessions.whose(odd) for odd in ("...", "zz.1.2.3", "ff.1.2.3", "é", cookie + "é")] == [""] * 5
    monkeypatch.setattr("time.time", lambda: 4e9)
    assert sessions.whose(cookie) == ""


def test_a_new_password_ends_the_sessions_of_the_one_before() -> None:
    before, after = (Sessions(b"s" * 32, {"ann": hashed(word), "bob": "kept"}) for word in ("old", "new"))
    assert before.whose(before.begin("ann")) == "ann" and after.whose(before.begin("ann")) == ""
    assert after.whose(before.begin("bob")) == "bob"


async def ask(request: Request) -> Response:
    caller = guard.demand(request, request.query_params["role"])  # type: ignore[arg-type]
    return JSONResponse([caller.name, caller.by])


@pytest.fixture
def door(desk: Desk) -> Iterator[TestClient]:
    app = Starlette(routes=[Door("/ask", ask, methods=["GET", "POST"])])
    app.state.guard = guard.Guard(desk)
    with TestClient(app) as client:
        yield client


def test_a_token_opens_what_its_role_may_and_nothing_else(door: TestClient) -> None:
    ranks = ["viewer", "sender", "operator"]
    for n, role in enumerate(ranks):
        for m, wanted in enumerate(ranks):
            shown = {"Authorization": f"Bearer {TOKENS[role][0]}"}
            answer = door.post(f"/ask?role={wanted}", headers=shown)
            assert answer.status_code == (200 if m <= n else 403), (role, wanted)
            assert m > n or answer.json() == [role, "token"]


def test_a_wrong_token_is_nobodys_and_the_trail_hears_of_many_once(door: TestClient, desk: Desk) -> None:
    right = TOKENS["operator"][0]
    for shown in ("Bearer wrong", f"Basic {right}", right, f"Bearer {right}x", f"Bearer {TOKENS['operator'][1]}"):
        answer = door.get("/ask?role=viewer", headers={"Authorization": shown})
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer", shown
    assert door.get("/ask?role=viewer").status_code == 401
    assert [line["what"] for line in desk.audit.newest()].count("token_failed") == 1


def test_a_cookie_may_ask_at_machines_doors_and_never_act(door: TestClient, desk: Desk) -> None:
    door.cookies.set(guard.COOKIE, guard.Guard(desk).sessions.begin("ann"))
    assert door.get("/ask?role=operator").json() == ["ann", "cookie"]
    assert door.post("/ask?role=viewer").status_code == 403, "any site can make a browser send it along"
    door.cookies.set(guard.COOKIE, guard.Guard(desk).sessions.begin("gone"))
    assert door.get("/ask?role=viewer").status_code == 401, "whoever left the config is nobody at once"


def test_a_certificate_is_its_peers_and_may_send(desk: Desk) -> None:
    app = Starlette(routes=[Door("/ask", ask, methods=["GET", "POST"])])
    app.state.guard = guard.Guard(desk)

    async def shows(scope, receive, send, digest=SHOWN) -> None:  # type: ignore[no-untyped-def]
        await web._with_certificate(app, digest, scope, receive, send)

    with TestClient(shows) as client:
        assert client.post("/ask?role=sender").json() == ["scanner", "certificate"]
        assert client.post("/ask?role=operator").status_code == 403

    async def shows_other(scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        await web._with_certificate(app, "cd" * 32, scope, receive, send)

    with TestClient(shows_other) as client:
        assert client.post("/ask?role=sender").status_code == 401


SAMPLE = re.compile(r'(?P<name>[a-z_]+)(\{(?P<labels>[a-z]+="[^"]*"(,[a-z]+="[^"]*")*)\})? (?P<value>[0-9.e+-]+)')


def samples(told: str) -> dict[str, float]:
    """As the text format has it: HELP and TYPE first, each family once, every line a sample of it."""
    family, found, seen = "", dict[str, float](), set[str]()
    for line in told.splitlines():
        if line.startswith("# HELP "):
            family = line.split()[2]
            assert family not in seen
            seen.add(family)
        elif not line.startswith("# TYPE "):
            match = SAMPLE.fullmatch(line)
            assert (
                match and match["name"].removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") == family
            ), line
            found[line.rpartition(" ")[0]] = float(match["value"])
    return found


def test_machines_read_depth_age_and_failures_and_nothing_of_a_patient(page: TestClient, desk: Desk) -> None:
    a_story(desk)
    a_story(desk, "brain", "segmenting", "")
    desk.ledger.refuse(UNKNOWN_CALLER, "")
    answer = page.get("/metrics")
    told = samples(answer.text)
    assert told['hilum_stories{state="dead",code="target_away"}'] == 1 and told["hilum_queue_depth"] == 1
    assert told["hilum_queue_oldest_seconds"] >= 0 and told["hilum_disk_free_bytes"] > 0
    assert told['hilum_refusals_total{code="unknown_caller",source=""}'] == 1
    assert told['hilum_peer_last_seen_seconds{peer="scanner"}'] > 1.7e9 and STUDY not in answer.text
    assert 'peer="archive"' not in answer.text, "nothing ever came from there"
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")


def test_how_long_each_step_took_is_a_histogram_whose_buckets_hold_all_shorter_ones(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 2.0, 12.0, 5000.0, 5000.2, 99999.0])
    now = [0.0]
    monkeypatch.setattr("pipeline.node.stories._now", lambda: now[0])
    story = desk.stories.begin(STUDY, 1, "liver")
    for state in ("choosing", "segmenting", "sending", "confirming", "done"):
        now[0] = next(clock) + 1.0
        story = desk.stories.note(story, state)  # type: ignore[arg-type]
    told = samples(metrics.told(desk))
    steps = {"queued": 1.0, "choosing": 2.0, "segmenting": 10.0, "sending": 4988.0, "confirming": 0.2}
    for step, lasted in steps.items():
        buckets = {
            key: value for key, value in told.items() if key.startswith(f'hilum_step_seconds_bucket{{step="{step}"')
        }
        for key, count in buckets.items():
            bound = re.search(r'le="([^"]+)"', key)[1]  # type: ignore[index]
            assert count == (lasted <= float(bound) + 1e-9), key
        assert told[f'hilum_step_seconds_count{{step="{step}"}}'] == 1 and len(buckets) == 13
        assert told[f'hilum_step_seconds_sum{{step="{step}"}}'] == pytest.approx(lasted)


def test_a_step_that_was_taken_twice_in_a_story_counts_twice_and_an_earlier_attempt_not_again(desk: Desk) -> None:
    story = desk.stories.begin(STUDY, 1, "liver")
    for state in ("choosing", "sending", "confirming", "sending", "confirming", "dead"):
        story = desk.stories.note(story, state)  # type: ignore[arg-type]
    for state in ("choosing", "done"):
        story = desk.stories.note(desk.stories.again(story) if state == "choosing" else story, state)  # type: ignore[arg-type]
    told = samples(metrics.told(desk))
    counts = {
        step: told[f'hilum_step_seconds_count{{step="{step}"}}']
        for step in ("queued", "choosing", "sending", "confirming")
    }
    assert counts == {"queued": 2, "choosing": 2, "sending": 2, "confirming": 2}


def test_health_tells_a_full_disk_and_a_dead_ledger(
    page: TestClient, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert page.get("/health/live").text == page.get("/health/ready").text == "ok\n"
    monkeypatch.setattr(Spool, "free_bytes", lambda spool: 0)
    assert page.get("/health/ready").status_code == 503 and "reserve" in page.get("/health/ready").text
    monkeypatch.setattr(Stories, "counts", lambda stories: 1 / 0)
    assert "ledger" in page.get("/health/ready").text and page.get("/health/live").status_code == 200


def test_what_goes_wrong_is_logged_by_its_kind_and_never_by_its_words(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def break_down(*words: object) -> None:
        raise RuntimeError("DOE^JANE")

    monkeypatch.setattr(metrics, "told", break_down)
    with TestClient(web.hushed(web.application(desk)), raise_server_exceptions=False) as client:
        answer = client.get("/metrics")
    assert answer.status_code == 500 and "DOE" not in answer.text + caplog.text and "RuntimeError" in caplog.text


def test_a_revision_that_was_frozen_just_before_a_kill_is_begun_at_the_next_look(desk: Desk) -> None:
    place = Place(study=STUDY, series="b" * 20, object="c" * 20)
    desk.ledger.record(Arrival(place=place, bytes=1, sha256="d" * 64, kind="1.2", source=""))
    desk.ledger.freeze(place.study)
    begun: list[str] = []
    Watcher(desk=desk, begin=lambda story, route: begun.append(story.route)).look()
    assert sorted(begun) == ["brain", "liver"]
