"""The REST interface: its document says what it does, it does what the document says, and nothing else."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import urllib3
import yaml
from PIL import Image
from starlette.applications import Starlette
from starlette.testclient import TestClient

from pipeline.node import rest
from pipeline.node.access import Token, token_hash
from pipeline.node.config import Node, Receiving, Showing
from pipeline.node.desk import Desk
from pipeline.node.guard import Guard
from pipeline.node.ledger import open_ledger
from pipeline.node.nouns import Arrival, Place
from pipeline.node.routes import Route
from pipeline.node.rules import Rule
from pipeline.node.spool import Spool, open_keys
from pipeline.node.stories import Stories

from .scanner import REPOSITORY, free_port, until
from .test_inbox import a_scan, work_off
from .test_stow import served

SENDER, VIEWER = "hilum_sender", "hilum_viewer"


def a_desk(state: Path, **receiving: Any) -> Desk:
    tokens = {
        "pacs": Token(role="sender", hash=token_hash(SENDER)), "board": Token(role="viewer", hash=token_hash(VIEWER))
    }  # fmt: skip
    routes = {
        "liver": Route(package=state, take={"mr": Rule()}),
        "brain": Route(package=state, take={"t1": Rule(), "t 2": Rule()}),
    }
    said = {"reserve_gb": 0.0, "silence_s": 5.0} | receiving
    node = Node(state=state, routes=routes, receiving=Receiving(**said), showing=Showing(tokens=tokens))
    keys, ledger = open_keys(state), open_ledger(state)
    return Desk(node=node, spool=Spool(state, keys), ledger=ledger, stories=Stories(ledger))


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    at = a_desk(tmp_path / "state")
    yield at
    at.ledger.close()


def a_client(desk: Desk, token: str = SENDER) -> TestClient:
    app = Starlette(routes=rest.routes(desk))
    app.state.guard = Guard(desk)
    return TestClient(app, headers={"Authorization": f"Bearer {token}"} if token else {})


def scan(seed: int = 0) -> bytes:
    voxels = np.random.default_rng(seed).integers(0, 99, (4, 5, 6)).astype(np.int16)
    return nibabel.Nifti1Image(voxels, np.eye(4)).to_bytes()


def drafts(desk: Desk) -> list[Path]:
    return [path for path in desk.submissions.folder.iterdir() if path.name.startswith(".")]


def fits(value: Any, schema: dict[str, Any], whole: dict[str, Any]) -> None:
    """Whether a value is what a schema of the document says, by a validator nobody here wrote."""
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator(
        {**schema, "components": whole["components"]}, format_checker=jsonschema.FormatChecker()
    ).validate(value)


def test_a_scan_goes_in_and_its_results_come_out(desk: Desk) -> None:
    client = a_client(desk)
    answer = client.post("/api/submissions?route=liver", content=scan())
    assert answer.status_code == 202, answer.text
    place, told = answer.headers["location"], answer.json()
    assert place == f"/api/submissions/{told['key']}" and told["state"] == "queued" and told["route"] == "liver"
    assert client.get(f"{place}/results").json() == {"files": []}
    work_off(desk)
    assert client.get(place).json()["state"] == "done"
    (file,) = client.get(f"{place}/results").json()["files"]
    assert file["name"] == "labels.nii.gz"
    got = client.get(file["href"])
    assert got.content == f"of {told['key']}".encode() and file["bytes"] == len(got.content)
    assert client.post("/api/submissions?route=liver", content=scan()).json()["key"] == told["key"]
    assert len(desk.stories.all()) == 1 and desk.stories.all()[0].attempt == 1
    assert client.post("/api/submissions?route=liver", content=scan(1)).json()["key"] != told["key"]


def test_channels_come_as_parts_of_a_form_by_their_names(desk: Desk) -> None:
    client = a_client(desk)
    answer = client.post("/api/submissions?route=brain", files={"t 2": ("x.nii", scan(2)), "t1": ("Jane.nii", scan(1))})
    assert answer.status_code == 202, answer.text
    lies = desk.submissions.folder / answer.json()["key"]
    assert (lies / "case-1_0000.nii").read_bytes() == scan(1) and (lies / "case-1_0001.nii").read_bytes() == scan(2)
    for files in ({"t1": scan()}, {"t1": scan(), "t 2": scan(), "t3": scan()}, {"../t1": scan(), "t 2": scan()}):
        answer = client.post("/api/submissions?route=brain", files=files)
        assert answer.status_code == 400 and answer.json()["code"] == "files_missing"
    twice = [("t1", ("a", scan())), ("t1", ("b", scan()))]
    assert client.post("/api/submissions?route=brain", files=twice).json()["code"] == "files_missing"
    assert client.post("/api/submissions?route=brain", content=scan()).json()["code"] == "files_missing"
    assert drafts(desk) == [] and len(desk.stories.all()) == 1


def test_a_scan_that_was_refused_says_why_and_may_be_handed_in_again(desk: Desk) -> None:
    client = a_client(desk)
    key = client.post("/api/submissions?route=liver", content=scan()).json()["key"]
    work_off(desk, "refused")
    told = client.get(f"/api/submissions/{key}").json()
    assert (told["state"], told["code"], told["scan"]) == ("refused", "nan", "its voxels are NaN")
    assert client.get(f"/api/submissions/{key}/results").json() == {"files": []}
    again = client.post("/api/submissions?route=liver", content=scan()).json()
    assert (again["key"], again["state"], again["attempt"]) == (key, "queued", 2)


def test_what_is_wrong_is_refused_with_a_reason_and_leaves_nothing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    client, form = a_client(desk), {"Content-Type": "multipart/form-data; boundary=b"}
    post, place = client.post, "/api/submissions?route=liver"
    assert post("/api/submissions?route=none", content=scan()).status_code == 404
    assert post("/api/submissions", content=scan()).status_code == 404
    named = b"--b\r\nContent-Disposition: form-data; name=mr\r\n\r\n"
    for content, headers, code in (
        (b"", {}, "no_scan"),
        (b"no scan at all", {}, "no_scan"),
        (scan()[:100], {}, "no_scan"),
        (b"--b\r\n\r\nx", form, "files_missing"),
        (b"nothing", form, "misbehaved"),
        (scan(), {"Content-Type": "multipart/form-data"}, "misbehaved"),
        (named + scan(), form, "misbehaved"),
    ):
        answer = post(place, content=content, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (400, code), content[:20]
    assert drafts(desk) == [] and desk.stories.all() == []
    monkeypatch.setattr(Spool, "free_bytes", lambda spool: -1)
    answer = a_client(desk).post(place, content=scan())
    assert answer.status_code == 503 and answer.json()["code"] == "no_room" and int(answer.headers["retry-after"]) > 0


def test_a_file_larger_than_is_taken_is_not_read_to_its_end(tmp_path: Path) -> None:
    at = a_desk(tmp_path / "state", object_gb=1e-3)
    answer = a_client(at).post("/api/submissions?route=liver", content=bytes(5_000_000))
    assert answer.status_code == 413 and answer.json()["code"] == "too_large" and drafts(at) == []
    at.ledger.close()


def test_who_has_no_token_sees_nothing_and_who_only_looks_hands_nothing_in(desk: Desk) -> None:
    key = a_client(desk).post("/api/submissions?route=liver", content=scan()).json()["key"]
    for token, asked, handed in (("", 401, 401), ("hilum_wrong", 401, 401), (VIEWER, 200, 403)):
        client = a_client(desk, token)
        assert client.get(f"/api/submissions/{key}").status_code == asked
        answer = client.post("/api/submissions?route=liver", content=scan(1))
        assert answer.status_code == handed and answer.json()["words"]
    assert a_client(desk, "").get("/api").status_code == a_client(desk, "").get("/api/openapi.json").status_code == 200
    assert len(desk.stories.all()) == 1


def test_nothing_but_results_is_handed_out(desk: Desk) -> None:
    client = a_client(desk)
    key = client.post("/api/submissions?route=liver", content=scan()).json()["key"]
    work_off(desk)
    (desk.folder(key, 1, "liver") / "results/case-1/.hidden").touch()
    for name in ("..%2f..%2fsecret", "%2e%2e", ".hidden", "error.json", "labels.nii.gz%00", "%2fetc%2fpasswd"):
        assert client.get(f"/api/submissions/{key}/results/{name}").status_code == 404, name
    for odd in ("0" * 20, "%2e%2e%2fsecret", "x' or 1=1", "%00", key.upper(), f"{key}%0a"):
        assert client.get(f"/api/submissions/{odd}").status_code == 404


def test_a_study_is_told_by_its_key_and_never_by_its_uid(desk: Desk) -> None:
    place = Place(study=desk.spool.keys.study("1.2.3"), series="b" * 20, object="c" * 20)
    desk.ledger.record(Arrival(place=place, bytes=1, sha256="d" * 64, kind="1.2", source=""))
    desk.ledger.freeze(place.study)
    desk.stories.note(desk.stories.begin(place.study, 1, "liver"), "dead", "target_away", "archive is away.")
    client = a_client(desk)
    told = client.get(f"/api/studies/{place.study}").json()
    assert told["stories"][0]["code"] == "target_away" and told["objects"] == 1 and told["waiting"] is False
    assert client.get("/api/studies/1.2.3").status_code == 404


def test_every_address_is_in_the_document_and_every_answer_is_what_the_document_says(desk: Desk) -> None:
    client, anybody = a_client(desk), a_client(desk, "")
    whole = client.get("/api/openapi.json").json()
    there = {(one.path, method) for one in rest.routes(desk) for method in one.methods or () if method != "HEAD"}
    assert there == {(path, method.upper()) for path, said in whole["paths"].items() for method in said}
    key = client.post("/api/submissions?route=liver", content=scan()).json()["key"]
    work_off(desk)
    place = Place(study="a" * 20, series="b" * 20, object="c" * 20)
    desk.ledger.record(Arrival(place=place, bytes=1, sha256="d" * 64, kind="1.2", source=""))
    desk.stories.begin(place.study, 1, "liver")
    asked = 0
    for path, said in whole["paths"].items():
        for method, operation in said.items():
            at = path.replace("{key}", place.study if "studies" in path else key).replace("{name}", "labels.nii.gz")
            query = "?route=liver" if operation.get("parameters", [{}])[-1].get("in") == "query" else ""
            body = scan(2) if "requestBody" in operation else None
            tries = [
                (client, f"{at}{query}"),
                (client, at.replace(key, "0" * 20) + "?route=none"),
                (anybody, f"{at}{query}"),
            ]
            seen = set()
            for caller, address in tries:
                answer = caller.request(method, address, content=body)
                seen.add(str(answer.status_code))
                _is_as_documented(answer, operation, whole)
            assert str(min(map(int, operation["responses"]))) in seen
            assert ("401" in seen) == bool(operation["security"])
            asked += 1
    assert asked == len(rest.OPERATIONS)


def _is_as_documented(answer: Any, operation: dict[str, Any], whole: dict[str, Any]) -> None:
    said = operation["responses"][str(answer.status_code)]
    kind = answer.headers["content-type"].partition(";")[0]
    assert kind in said["content"], (answer.request.url, kind)
    if kind == "application/json":
        fits(answer.json(), said["content"][kind]["schema"], whole)


def test_the_document_is_one_of_openapi() -> None:
    """By its validator where that is installed; its references lead somewhere in any case."""
    whole = json.loads(json.dumps(rest.openapi()))
    names = [operation["operationId"] for said in whole["paths"].values() for operation in said.values()]
    assert len(names) == len(set(names))
    for reference in _references(whole):
        assert reference.removeprefix("#/components/schemas/") in whole["components"]["schemas"]
    validator = pytest.importorskip("openapi_spec_validator", reason="openapi-spec-validator is not installed")
    validator.validate(whole)


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from [value["$ref"]] if "$ref" in value else []
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _references(inner)


def test_the_page_reads_alone_and_names_every_address(desk: Desk) -> None:
    page = a_client(desk, "").get("/api").text
    assert "http://" not in page and "https://" not in page and "script-src" in page and "<script" not in page
    for operation in rest.OPERATIONS:
        assert operation.path in page and operation.does.split(";")[0] in page.replace("&#x27;", "'")


def test_a_process_that_died_between_files_and_rows_goes_on_at_the_next_start(desk: Desk, tmp_path: Path) -> None:
    path = a_scan(tmp_path / "a.nii.gz")
    key = desk.submissions.begin("liver", {"mr": path})
    with desk.ledger.writing() as connection:
        for table in ("node_submissions", "node_stories"):
            connection.exec_driver_sql(f"DELETE FROM {table}")
    (desk.submissions.folder / ".half").mkdir()
    desk.submissions.reconcile()
    assert desk.submissions.get(key) is not None and [story.study for story in desk.stories.all()] == [key]
    assert drafts(desk) == []


@pytest.mark.slow
def test_who_hangs_up_in_the_middle_of_a_file_leaves_nothing_of_it(tmp_path: Path) -> None:
    at = a_desk(tmp_path / "state", silence_s=0.5)
    head = f"POST /api/submissions?route=liver HTTP/1.1\r\nHost: node\r\nAuthorization: Bearer {SENDER}\r\n"
    begin = f"{head}Content-Length: {len(scan())}\r\n\r\n".encode() + scan()[:300]
    with served(at) as port:
        with socket.create_connection(("127.0.0.1", port)) as gone:
            gone.sendall(begin)
            assert until(lambda: drafts(at))
        with socket.create_connection(("127.0.0.1", port)) as silent:
            silent.sendall(begin)
            assert b" 408 " in silent.recv(100)
        assert until(lambda: not drafts(at) and at.ledger.refused() == {("broken_off", ""): 2})
        place, token = f"http://127.0.0.1:{port}/api/submissions?route=liver", {"Authorization": f"Bearer {SENDER}"}
        assert urllib3.request("POST", place, body=scan(), headers=token).status == 202
    at.ledger.close()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_and_a_watched_folder_get_labels_from_a_whole_node(
    tiny: Path, make_scan: Callable[..., Any], tmp_path: Path
) -> None:
    """The process as a hospital runs it; nothing of it is replaced."""
    from preprocessing import files

    inbox, port = tmp_path / "inbox", free_port()
    inbox.mkdir()
    said = {
        "state": str(tmp_path / "state"), "receiving": {"port": free_port(), "reserve_gb": 0},
        "routes": {"blob": {"package": str(tiny), "take": {"mr": {}}, "outputs": ["dicom_seg", "secondary_capture"]}},
        "inboxes": {"night": {"folder": str(inbox), "route": "blob", "settled_s": 0.3}},
        "showing": {"port": port, "tokens": {"me": {"hash": token_hash(SENDER)}}}, "working": {"first_pause_s": 0.2},
    }  # fmt: skip
    (tmp_path / "node.yaml").write_text(yaml.safe_dump(said))
    for seed in (0, 1):
        files.write(make_scan(seed), tmp_path / f"{seed}.nii.gz")
    words = [sys.executable, "-m", "pipeline", "node", "--config", str(tmp_path / "node.yaml")]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
    try:
        node = f"http://127.0.0.1:{port}"
        assert until(lambda: _answers(f"{node}/health/live"), 60), (tmp_path / "log").read_text()
        shutil.copy(tmp_path / "1.nii.gz", inbox / "Jane Doe.nii.gz")
        (inbox / "broken.nii.gz").write_bytes((tmp_path / "1.nii.gz").read_bytes()[:-50])
        curl = ["curl", "-sf", "-H", f"Authorization: Bearer {SENDER}"]
        told = _curl([*curl, "--data-binary", f"@{tmp_path / '0.nii.gz'}", f"{node}/api/submissions?route=blob"])
        place, end = f"{node}/api/submissions/{told['key']}", time.monotonic() + 120
        while told["state"] != "done" and time.monotonic() < end:
            time.sleep(0.3)
            told = _curl([*curl, place])
        assert told["state"] == "done", (told, (tmp_path / "log").read_text())
        assert {one["name"] for one in _curl([*curl, f"{place}/results"])["files"]} >= {"labels.nii.gz", "overlay.png"}
        labels = subprocess.run([*curl, f"{place}/results/labels.nii.gz"], capture_output=True, check=True).stdout
        (tmp_path / "labels.nii.gz").write_bytes(labels)
        assert until(lambda: {path.name for path in (inbox / "results").glob("[!.]*")} == {"Jane Doe", "broken"}, 120)
    finally:
        process.terminate()
        assert process.wait(60) == 0
    ours, theirs = nibabel.load(tmp_path / "labels.nii.gz"), nibabel.load(tmp_path / "0.nii.gz")
    assert ours.shape == theirs.shape and np.allclose(ours.affine, theirs.affine)
    assert nibabel.load(inbox / "results/Jane Doe/labels.nii.gz").shape == theirs.shape
    Image.open(io.BytesIO((inbox / "results/Jane Doe/overlay.png").read_bytes())).verify()
    said = json.loads((inbox / "results/broken/error.json").read_text())
    assert said["code"] and (inbox / "results/broken/input/broken.nii.gz").exists()
    assert "Jane" not in (tmp_path / "log").read_text() and "broken" not in (tmp_path / "log").read_text()


def _answers(address: str) -> bool:
    try:
        return urllib3.request("GET", address, retries=False).status == 200
    except urllib3.exceptions.HTTPError:
        return False


def _curl(words: list[str]) -> Any:
    return json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
