"""The pages for people: what each tells, what an operator may do to a story, and that no other site can act through them."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage
from starlette.testclient import TestClient

from pipeline.node import acts, guard, looks, pages, sheets, web
from pipeline.node.access import User, hashed
from pipeline.node.config import Node, Peer, Showing
from pipeline.node.desk import Desk
from pipeline.node.ledger import open_ledger
from pipeline.node.nouns import OTHER_BYTES, UNKNOWN_CALLER, Arrival, Place
from pipeline.node.peers import PeerError
from pipeline.node.routes import Route
from pipeline.node.rules import Rule
from pipeline.node.spool import Spool, open_keys
from pipeline.node.steps import take
from pipeline.node.stories import Stories, Story

USERS = {"ann": User(role="operator", password=hashed("right horse")), "bob": User(password=hashed("battery"))}
UID = "1.2.276.0.7230010.3.1"


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    route = Route(package=tmp_path, take={"mr": Rule()}, targets=("archive",))
    node = Node(
        state=tmp_path / "state",
        peers={"archive": Peer(aet="A", host="h"), "desk": Peer(aet="D", web="https://h/web"), "ct": Peer(aet="CT")},
        routes={"liver": route, "brain": route},
        showing=Showing(users=USERS),
    )
    keys, ledger = open_keys(node.state), open_ledger(node.state)
    yield Desk(node=node, spool=Spool(node.state, keys), ledger=ledger, stories=Stories(ledger))
    ledger.close()


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[Story]:
    """Stories that were put into the queue of workflows."""
    found: list[Story] = []
    monkeypatch.setattr(acts, "enqueue", lambda story, route: found.append(story))
    return found


@pytest.fixture
def page(desk: Desk) -> Iterator[TestClient]:
    with TestClient(web.application(desk), base_url="http://node") as client:
        yield client


def as_(name: str, page: TestClient, desk: Desk) -> str:
    """Logged in, without the tenth of a second that a password takes; the token of its forms."""
    page.cookies.clear()
    sessions = guard.Guard(desk).sessions
    cookie = sessions.begin(name)
    page.cookies.set(guard.COOKIE, cookie)
    return sessions.token(cookie)


def a_story(desk: Desk, state: str = "dead", words: str = "archive is away.", uid: str = UID, **facts: Any) -> Story:
    keys = desk.spool.keys
    place = Place(study=keys.study(uid), series="b" * 20, object=keys.object(uid))
    desk.ledger.record(Arrival(place=place, bytes=1, sha256="d" * 64, kind="1.2", source="ct"))
    desk.ledger.freeze(place.study)
    story = desk.stories.begin(place.study, 1, "liver")
    return desk.stories.note(story, state, "target_away" if words else "", words, **facts)  # type: ignore[arg-type]


def act(page: TestClient, story: Story, name: str, token: str, **more: str) -> int:
    data = {"token": token, **more}
    return page.post(f"{sheets.address(story)}/{name}", data=data, follow_redirects=False).status_code


def results(desk: Desk, story: Story, case: str = "case-1") -> Path:
    folder = desk.folder(story.study, story.revision, story.route) / "results" / case
    folder.mkdir(parents=True)
    return folder


def test_a_viewer_sees_every_story_with_its_reason_and_why_each_series_was_left(page: TestClient, desk: Desk) -> None:
    told = {"series": "b" * 20, "modality": "MR", "slices": 30, "direction": "axial", "distance_mm": 1.5}
    story = a_story(desk, chosen=[[told]], why_not=[told | {"why_not": "modality MR, not <CT>"}])
    as_("bob", page, desk)
    table = page.get("/").text
    assert "archive is away" in table and sheets.address(story) in table and "<b>1</b>dead letters" in table
    shown = page.get(sheets.address(story)).text
    assert "modality MR, not &lt;CT&gt;" in shown and "archive is away" in shown and "1.50" in shown
    assert all(one.label not in shown for one in acts.ACTS.values()), "no button of an operator's"
    assert page.get("/story/none/1/liver").status_code == page.get("/study/none").status_code == 404


def test_stories_are_told_by_kind_route_and_page_the_newest_first(page: TestClient, desk: Desk) -> None:
    for n in range(sheets.AT_ONCE + 5):
        a_story(desk, "done", "", f"{UID}.{n}")
    dead = a_story(desk, "dead", "away", f"{UID}.999")
    as_("bob", page, desk)
    first, second = page.get("/").text, page.get("/?page=2").text
    assert first.count('class="state done"') == sheets.AT_ONCE - 1 and second.count('class="state done"') == 6
    assert first.index(dead.study[:10]) < first.index("state done") and "1 to 50 of 56" in first and "older" in first
    only = page.get("/?group=dead+letters").text
    assert dead.study[:10] in only and "state done" not in only
    assert "No story is of that kind" in page.get("/?route=brain").text
    for odd in ("/?page=x", "/?page=-1", "/?page=99999999999999999999", "/?group=<b>", "/?page=77"):
        answer = page.get(odd)
        assert answer.status_code == 200 and "<b>&" not in answer.text.replace("<b>1</b>", ""), odd


def test_a_study_is_found_by_its_uid_which_then_stands_nowhere(page: TestClient, desk: Desk, caplog: Any) -> None:
    story = a_story(desk)
    token = as_("bob", page, desk)
    answer = page.post("/find", data={"uid": f" {UID} ", "token": token})
    assert answer.url.path == f"/study/{story.study}" and UID not in str(answer.url) + answer.text
    assert sheets.address(story) in answer.text
    for unknown in ("1.2.3", "DOE^JANE", ""):
        other = page.post("/find", data={"uid": unknown, "token": token})
        assert other.status_code == 404 and (not unknown or unknown not in other.text)
    assert page.post("/find", data={"uid": UID}).status_code == 403, "a form of another site"
    written = "".join(str(line) for line in desk.audit.newest()) + caplog.text
    assert UID not in written and "DOE" not in written


def test_nothing_is_done_for_a_viewer_another_site_or_another_persons_form(
    page: TestClient, desk: Desk, begun: list[Story]
) -> None:
    story = a_story(desk)
    assert act(page, story, "retry", "x") == 403
    of_bob = as_("bob", page, desk)
    assert [act(page, story, name, of_bob, target="archive") for name in acts.ACTS] == [403] * len(acts.ACTS)
    for place in ("/peers/archive/echo", "/node/liver/roll_back", "/audit"):
        assert page.post(place, data={"token": of_bob}).status_code == 403
    as_("ann", page, desk)
    assert [act(page, story, "retry", token) for token in ("", of_bob, "0" * 64)] == [403] * 3
    assert not begun and desk.stories.get(story.study, 1, "liver") == story


def test_an_operator_begins_a_story_anew_and_it_is_written_down(
    page: TestClient, desk: Desk, begun: list[Story]
) -> None:
    story = a_story(desk)
    token = as_("ann", page, desk)
    shown = page.get(sheets.address(story)).text
    assert re.search(r'name="token" value="(\w+)"', shown)[1] == token and "Begin anew" in shown  # type: ignore[index]
    assert act(page, story, "retry", token) == 303
    assert begun[0].state == "queued" and begun[0].attempt == 2
    assert act(page, story, "retry", token) == 409, "it is under way now"
    said = desk.audit.newest(1)[0]
    assert said["what"] == "retry" and said["facts"]["who"] == "ann" and said["facts"]["study"] == story.study
    assert "Done by people" in page.get(sheets.address(story)).text


def test_a_story_is_held_put_first_let_go_on_and_given_up(page: TestClient, desk: Desk, begun: list[Story]) -> None:
    story, token = a_story(desk, "queued", ""), as_("ann", page, desk)

    def now() -> Story:
        found = desk.stories.get(story.study, 1, "liver")
        assert found is not None
        return found

    assert act(page, story, "hold", token) == 303 and now().state == "held" and not begun
    assert take(desk, story.study, 1, "liver", 1)["left"], "its workflow, when its turn comes, lets it be"
    assert now().state == "held" and "held by ann" in page.get("/").text
    assert act(page, story, "resume", token) == 303 and now().state == "queued" and begun[-1].attempt == 2
    assert act(page, story, "requeue", token) == 303 and begun[-1].facts["priority"] == 1 and begun[-1].attempt == 3
    assert take(desk, story.study, 1, "liver", 2)["left"], "the workflow that was in the queue before has lost it"
    assert act(page, story, "give_up", token) == 409, "only what is dead or held"
    assert act(page, story, "hold", token) == 303 and act(page, story, "give_up", token) == 303
    assert now().state == "refused" and now().code == "given_up"
    assert [one["act"] for one in now().facts["acts"]] == ["hold", "resume", "requeue", "hold", "give_up"]


def test_results_are_sent_to_another_target_and_nothing_is_made_anew(
    page: TestClient, desk: Desk, begun: list[Story]
) -> None:
    story, token = a_story(desk), as_("ann", page, desk)
    assert act(page, story, "reroute", token, target="desk") == 409, "there are no results"
    (results(desk, story) / "overlay.dcm").write_bytes(b"DICM")
    for odd in ("ct", "nobody", ""):
        assert act(page, story, "reroute", token, target=odd) == 409, "nobody to be sent to"
    assert not begun and act(page, story, "reroute", token, target="desk") == 303
    taken = take(desk, story.study, 1, "liver", begun[0].attempt)
    assert taken["cases"] == [] and {of for _, of in taken["way"]} == {"desk"}


def test_two_people_at_once_do_one_thing(desk: Desk, begun: list[Story]) -> None:
    story = a_story(desk)
    acts.do(desk, story, "retry", "ann")
    with pytest.raises(acts.Impossible, match="quicker"):
        acts.do(desk, story, "retry", "eve")
    assert len(begun) == 1


def test_pictures_pages_and_files_of_a_case_are_shown_and_nothing_else_is_handed_out(
    page: TestClient, desk: Desk
) -> None:
    story, token = a_story(desk), as_("ann", page, desk)
    folder, place = results(desk, story), f"{sheets.address(story)}/cases/case-1"
    Image.new("RGB", (4, 4)).save(folder / "overlay.png")
    (folder / "page.html").write_text("<p>leaf")
    (folder / ".draft.dcm").write_bytes(b"half")
    (folder / "dicom_seg.dcm").write_bytes(b"whole")
    shown = page.get(sheets.address(story)).text
    assert f"{place}/picture.png" in shown and f"{place}/files/dicom_seg.dcm" in shown and ".draft" not in shown
    picture = page.get(f"{place}/picture.png")
    assert picture.headers["content-type"] == "image/png" and picture.headers["cache-control"] == "no-store"
    assert page.get(f"{place}/page.html").headers["content-security-policy"].startswith("sandbox allow-scripts;")
    loaded = page.get(f"{place}/files/dicom_seg.dcm")
    assert loaded.content == b"whole" and "attachment" in loaded.headers["content-disposition"]
    assert desk.audit.newest(1)[0]["what"] == "download"
    for odd in ("..%2f..%2fsecret", "case-2", "..", "%2e%2e%2f%2e%2e"):
        assert page.get(f"{sheets.address(story)}/cases/{odd}/picture.png").status_code in (404, 405)
        assert page.get(f"{place}/files/{odd}").status_code in (404, 405)
    assert page.get(f"{place}/files/.draft.dcm").status_code == 404
    as_("bob", page, desk)
    assert (
        page.get(f"{place}/picture.png").status_code == 200
        and page.get(f"{place}/files/dicom_seg.dcm").status_code == 403
    )
    assert "/files/" not in page.get(sheets.address(story)).text and token


def test_a_secondary_capture_is_shown_where_there_is_no_other_picture(page: TestClient, desk: Desk) -> None:
    story = a_story(desk, "done", "")
    as_("bob", page, desk)
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    save_capture(results(desk, story) / "overlay.dcm", pixels)
    answer = page.get(f"{sheets.address(story)}/cases/case-1/picture.png")
    from io import BytesIO

    assert np.array_equal(np.asarray(Image.open(BytesIO(answer.content))), pixels)


def save_capture(path: Path, pixels: np.ndarray) -> None:
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = SecondaryCaptureImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = "1.2.3"
    data.Rows, data.Columns, data.SamplesPerPixel = *pixels.shape[:2], 3
    data.PhotometricInterpretation, data.PlanarConfiguration = "RGB", 0
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    data.PixelData = pixels.tobytes()
    pydicom.dcmwrite(path, data, enforce_file_format=True)


def test_peers_are_told_with_what_was_refused_them_and_an_operator_calls_them(
    page: TestClient, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_story(desk)
    desk.ledger.refuse(OTHER_BYTES, "ct")
    desk.ledger.refuse(UNKNOWN_CALLER, "")

    def away(line: object) -> None:
        raise PeerError("archive cannot be reached. Look whether it runs.")

    monkeypatch.setattr(pages, "echo", away)
    as_("bob", page, desk)
    shown = page.get("/peers").text
    assert "other content, which is kept" in shown and "unknown_caller" in shown and "Call it" not in shown
    token = as_("ann", page, desk)
    assert page.get("/peers").text.count("Call it") == 2, "whoever only sends cannot be called"
    assert "cannot be reached" in page.post("/peers/archive/echo", data={"token": token}).text
    monkeypatch.setattr(pages, "echo", lambda line: None)
    assert "it answers" in page.post("/peers/archive/echo", data={"token": token}).text
    assert page.post("/peers/ct/echo", data={"token": token}).status_code == 404


def test_the_trail_is_read_by_operators_and_says_when_a_line_was_touched(page: TestClient, desk: Desk) -> None:
    desk.audit.note("login", who="ann")
    as_("bob", page, desk)
    assert page.get("/audit").status_code == 403 and "/audit" not in page.get("/").text
    token = as_("ann", page, desk)
    assert "login" in page.get("/audit").text
    assert "as they were written" in page.post("/audit", data={"token": token}).text
    path = next((desk.node.state / "audit").glob("*.jsonl"))
    path.write_bytes(path.read_bytes().replace(b'"ann"', b'"eve"'))
    assert "is not the one that was written" in page.post("/audit", data={"token": token}).text


def test_a_route_without_a_package_before_cannot_be_rolled_back_and_says_so(page: TestClient, desk: Desk) -> None:
    token = as_("ann", page, desk)
    shown = page.get("/node").text
    assert "liver" in shown and "GB are free" in shown and "Roll back" not in shown
    assert page.post("/node/none/roll_back", data={"token": token}).status_code == 404
    assert page.post("/node/liver/roll_back", data={"token": token}).status_code == 409


class Reader(HTMLParser):
    """What a browser would fetch or run of a page, and whether every element is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = dict(attrs)
        self.asked += [said[name] or "" for name in ("src", "href", "action") if name in said]
        assert not any(name.startswith("on") or name == "style" for name in said), f"{tag} {said}"
        if tag not in ("meta", "input", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_pages_ask_nobody_else_run_only_our_script_and_are_neither_kept_nor_framed(
    page: TestClient, desk: Desk
) -> None:
    evil = '"><script>alert(1)</script>'
    story = a_story(desk, "dead", evil, superseded_by=2, incomplete=evil, sent={evil: {"stored": 1}})
    results(desk, story)
    as_("ann", page, desk)
    for place in ("/", sheets.address(story), f"/study/{story.study}", "/peers", "/node", "/audit", "/login", "/none"):
        answer = page.get(place)
        if answer.status_code == 404:
            continue
        assert evil not in answer.text, place
        reader = Reader(answer.text)
        assert not reader.open and all(one.startswith("/") for one in reader.asked), (place, reader.asked)
        assert answer.headers["cache-control"] == "no-store" and answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["content-security-policy"] == "frame-ancestors 'none'"
        policy = re.search(r'Content-Security-Policy" content="([^"]+)"', answer.text)[1]  # type: ignore[index]
        assert "default-src 'none'" in policy and "form-action 'self'" in policy and "unsafe" not in policy


def test_times_and_sizes_are_said_as_people_say_them() -> None:
    assert [looks.duration(s) for s in (0.04, 9.94, 59.4, 61, 3600, 3660, 90000)] == [
        "0.0 s", "9.9 s", "59 s", "1 min 1 s", "1 h", "1 h 1 min", "1 d 1 h"
    ]  # fmt: skip
    assert [looks.size(n) for n in (0, 999, 1000, 12_345, 5_000_000, 7e12)] == [
        "0 B", "999 B", "1.0 kB", "12 kB", "5.0 MB", "7000 GB"
    ]  # fmt: skip
