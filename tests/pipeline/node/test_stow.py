"""Objects by DICOMweb: the same as by C-STORE, from senders nobody here wrote, and nothing of what is hostile or half."""

import hashlib
import json
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pydicom
import pytest
import urllib3
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, generate_uid
from starlette.applications import Starlette
from starlette.testclient import TestClient

from pipeline.node import bodies, stow, web
from pipeline.node.access import Token, make_token, token_hash
from pipeline.node.bodies import Malformed, Multipart
from pipeline.node.config import Node, Peer, Receiving, Showing
from pipeline.node.desk import Desk
from pipeline.node.guard import Guard
from pipeline.node.ledger import open_ledger
from pipeline.node.listener import Listener
from pipeline.node.spool import Spool, open_keys
from pipeline.node.stories import Stories

from .hospital import Orthanc, network_of_its_own
from .scanner import REPOSITORY, a_slice, a_study, storescu, until
from .test_security import Authority

TOKENS = {"scanner": "hilum_the-scanner's", "viewer": "hilum_who-only-looks"}
JSON = {"Accept": "application/dicom+json"}


def a_desk(state: Path, **receiving: object) -> Desk:
    tokens = {name: Token(hash=token_hash(token), role="sender") for name, token in TOKENS.items() if name != "viewer"}
    tokens["viewer"] = Token(hash=token_hash(TOKENS["viewer"]), role="viewer")
    settings = {"port": 0, "reserve_gb": 0.0, "silence_s": 5.0} | receiving
    node = Node(
        state=state,
        peers={"scanner": Peer(aet="SCANNER")},
        receiving=Receiving(**settings),  # type: ignore[arg-type]
        showing=Showing(tokens=tokens, port=0),
    )
    keys, ledger = open_keys(state), open_ledger(state)
    return Desk(node=node, spool=Spool(state, keys), ledger=ledger, stories=Stories(ledger))


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    at = a_desk(tmp_path / "state")
    yield at
    at.ledger.close()


def a_client(desk: Desk, token: str = TOKENS["scanner"]) -> TestClient:
    app = Starlette(routes=stow.routes(desk))
    app.state.guard = Guard(desk)
    return TestClient(app, headers={"Authorization": f"Bearer {token}"} if token else {})


@contextmanager
def served(desk: Desk) -> Iterator[int]:
    """The node's web side as it runs, with the port it listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = web.server(desk)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        assert until(lambda: server.started)
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def a_body(*files: bytes, boundary: str = "b0undary", kind: str = "application/dicom") -> tuple[bytes, dict[str, str]]:
    """As urllib3 writes one, which nobody here wrote."""
    fields = [urllib3.fields.RequestField(name="", data=one, headers={"Content-Type": kind}) for one in files]
    body, _ = urllib3.encode_multipart_formdata(fields, boundary=boundary)
    return body, {"Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}', **JSON}


def files(desk: Desk) -> list[Path]:
    return sorted(desk.node.state.glob("spool/*/*/*.dcm"))


def parts(desk: Desk) -> list[Path]:
    return list((desk.node.state / "parts").iterdir())


def codes(desk: Desk) -> set[str]:
    return {code for code, _ in desk.ledger.refused()}


def content(data: Dataset) -> bytes:
    stream = BytesIO()
    data.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def told(answer: object) -> Dataset:
    """As pydicom understands the answer."""
    return Dataset.from_json(answer.text)  # type: ignore[attr-defined]


def test_objects_are_the_same_whichever_way_they_come(desk: Desk, tmp_path: Path) -> None:
    sent = a_study(tmp_path / "sent", slices=3)
    body, headers = a_body(*[path.read_bytes() for path in sent])
    answer = a_client(desk).post("/dicom-web/studies", content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    uids = [pydicom.dcmread(path).SOPInstanceUID for path in sent]
    assert [one.ReferencedSOPInstanceUID for one in told(answer).ReferencedSOPSequence] == uids
    assert "FailedSOPSequence" not in told(answer)
    by_web = {path.name: path.read_bytes() for path in files(desk)}
    (study,) = desk.ledger.waiting()
    assert study.objects == 3 and {one.source for one in desk.ledger.since(study.study)} == {"scanner"}
    listener = Listener(desk.node, desk.spool, desk.ledger)
    listener.start()
    try:
        assert storescu(listener.port, *sent).returncode == 0
    finally:
        listener.stop()
    assert {path.name: path.read_bytes() for path in files(desk)} == by_web and len(by_web) == 3
    assert desk.ledger.waiting()[0].objects == 3 and not desk.ledger.refused()
    assert a_client(desk).post("/dicom-web/studies", content=body, headers=headers).status_code == 200


def test_some_are_stored_and_the_others_are_named_with_their_reason(desk: Desk) -> None:
    good, report = a_slice(), a_slice()
    report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"
    uid = generate_uid(entropy_srcs=["a"]).encode()
    strange = content(a_slice(uid=uid.decode())).replace(uid, generate_uid(entropy_srcs=["b"]).encode(), 1)
    video = content(a_slice()).replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0")
    body, headers = a_body(content(good), content(report), strange, video, b"no DICOM at all" * 50)
    answer = a_client(desk).post("/dicom-web/studies", content=body, headers=headers)
    assert answer.status_code == 202
    said = told(answer)
    assert [one.ReferencedSOPInstanceUID for one in said.ReferencedSOPSequence] == [good.SOPInstanceUID]
    assert [one.FailureReason for one in said.FailedSOPSequence] == [0x0122, 0xA900, 0xC122]
    assert said.FailedSOPSequence[0].ReferencedSOPInstanceUID == report.SOPInstanceUID
    assert [one.FailureReason for one in said["OtherFailuresSequence"].value] == [0xC000]
    assert len(files(desk)) == 1 and parts(desk) == []
    assert codes(desk) == {"not_wanted", "other_object", "not_spoken", "not_readable"}


def test_an_address_that_names_a_study_takes_that_study_alone(desk: Desk) -> None:
    one, other = a_slice(), a_slice()
    body, headers = a_body(content(one), content(other))
    answer = a_client(desk).post(f"/dicom-web/studies/{one.StudyInstanceUID}", content=body, headers=headers)
    assert answer.status_code == 202 and len(files(desk)) == 1
    assert told(answer).FailedSOPSequence[0].ReferencedSOPInstanceUID == other.SOPInstanceUID
    body, headers = a_body(content(other))
    answer = a_client(desk).post(f"/dicom-web/studies/{one.StudyInstanceUID}", content=body, headers=headers)
    assert answer.status_code == 409 and "ReferencedSOPSequence" not in told(answer)
    assert a_client(desk).post("/dicom-web/studies/..%2F..%2Fetc", content=body, headers=headers).status_code in (
        400,
        404,
    )
    assert a_client(desk).post("/dicom-web/studies/1.2.a", content=body, headers=headers).status_code == 400


def test_other_content_under_a_uid_that_is_known_is_refused_and_the_first_is_kept(desk: Desk) -> None:
    first = a_slice()
    body, headers = a_body(content(first))
    assert a_client(desk).post("/dicom-web/studies", content=body, headers=headers).status_code == 200
    before = files(desk)[0].read_bytes()
    first.PatientComments = "other"
    body, headers = a_body(content(first))
    answer = a_client(desk).post("/dicom-web/studies", content=body, headers=headers)
    assert answer.status_code == 409 and told(answer).FailedSOPSequence[0].FailureReason == 0x0111
    assert files(desk)[0].read_bytes() == before and parts(desk) == []


def test_who_has_no_token_or_may_only_look_stores_nothing(desk: Desk) -> None:
    body, headers = a_body(content(a_slice()))
    for token, status in (("", 401), ("hilum_wrong", 401), (make_token()[0], 401), (TOKENS["viewer"], 403)):
        assert a_client(desk, token).post("/dicom-web/studies", content=body, headers=headers).status_code == status
    assert files(desk) == [] == parts(desk)


def test_another_kind_of_body_or_answer_is_told_so_before_a_byte_is_read(desk: Desk) -> None:
    body, headers = a_body(content(a_slice()))
    post = a_client(desk).post
    assert (
        post("/dicom-web/studies", content=body, headers={**headers, "Accept": "application/dicom+xml"}).status_code
        == 406
    )
    for kind in (
        "application/dicom",
        "multipart/form-data; boundary=x",
        'multipart/related; type="application/dicom+json"',
        "",
    ):
        assert post("/dicom-web/studies", content=body, headers={**headers, "Content-Type": kind}).status_code == 415
    for boundary in ("", "x" * 201, "other"):
        kind = f'multipart/related; type="application/dicom"; boundary="{boundary}"'
        assert post("/dicom-web/studies", content=body, headers={**headers, "Content-Type": kind}).status_code == 400
    assert files(desk) == [] == parts(desk)


def test_a_disk_at_its_reserve_asks_to_come_again(tmp_path: Path) -> None:
    at = a_desk(tmp_path / "state", reserve_gb=1e9)
    body, headers = a_body(content(a_slice()))
    answer = a_client(at).post("/dicom-web/studies", content=body, headers=headers)
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0 and codes(at) == {"no_room"}
    at.ledger.close()


def test_an_object_that_is_too_large_ends_the_request_and_what_came_before_is_kept(tmp_path: Path) -> None:
    at = a_desk(tmp_path / "state", object_gb=1e-4)
    body, headers = a_body(content(a_slice()), content(a_slice(side=512)), content(a_slice()))
    answer = a_client(at).post("/dicom-web/studies", content=body, headers=headers)
    assert answer.status_code == 413 and len(files(at)) == 1 and parts(at) == []
    assert len(told(answer).ReferencedSOPSequence) == 1 and "too_large" in codes(at)
    at.ledger.close()


def test_what_is_cut_short_leaves_no_half_object_and_is_not_called_stored(desk: Desk) -> None:
    whole = content(a_slice())
    body, headers = a_body(whole, content(a_slice()))
    client = a_client(desk)
    for end in (10, 200, len(whole) // 2, len(whole) + 300, len(body) - 5):
        answer = client.post("/dicom-web/studies", content=body[:end], headers=headers)
        assert answer.status_code == 400
        assert len(json.loads(answer.text).get("00081199", {}).get("Value", [])) == (end > len(whole) + 200)
        assert parts(desk) == []
    assert codes(desk) == {"misbehaved"}


def test_bodies_that_never_come_to_the_point_are_bounded(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stow, "OBJECTS_AT_MOST", 10)
    client, (_, headers) = a_client(desk), a_body()
    b = b"--b0undary"
    for body in (
        b"x" * 100_000,
        b + b" " * 100_000,
        b + b"\r\n" + b"h: " + b"x" * 100_000,
        b + b"\r\nno header\r\n\r\nx\r\n" + b + b"--\r\n",
        (b + b"\r\n\r\nx\r\n") * 50,
        b + b"\r\n\r\nx\r\n" + b + b"--" + b"x" * 100_000,
        b
        + b"\r\n\r\n"
        + bytes(128)
        + b"DICM"
        + b"\2\0\1\0OB\0\0"
        + b"\xff\xff\xff\xff"
        + bytes(200_000)
        + b"\r\n"
        + b
        + b"--",
    ):
        answer = client.post("/dicom-web/studies", content=body, headers=headers)
        assert answer.status_code in (400, 409), body[:40]
    assert files(desk) == [] == parts(desk) and codes(desk) <= {"misbehaved", "not_readable"}


def test_a_deflated_object_keeps_its_bytes_whatever_they_begin_with(desk: Desk) -> None:
    data = a_slice()
    data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    body, headers = a_body(content(data))
    assert a_client(desk).post("/dicom-web/studies", content=body, headers=headers).status_code == 200
    assert pydicom.dcmread(files(desk)[0]).PixelData == data.PixelData
    meta = stow.meta_of(content(data)[:400].partition(b"DICM")[0] + b"DICM" + _meta_then(b"\2\0 any number at all"))
    assert meta is not None and meta.uid == "1.2.3"


def _meta_then(rest: bytes) -> bytes:
    from pipeline.node.spool import meta_information

    return meta_information("1.2.840.10008.5.1.4.1.1.2", "1.2.3", "1.2.840.10008.1.2.1.99")[132:] + rest


class Collected:
    """Parts as they are cut out."""

    def __init__(self) -> None:
        self.parts: list[tuple[dict[str, str], bytes]] = []

    def begin(self, headers: dict[str, str]) -> None:
        self.parts.append((headers, b""))

    def write(self, data: bytes) -> None:
        self.parts[-1] = (self.parts[-1][0], self.parts[-1][1] + data)

    def end(self) -> None:
        pass


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.binary(max_size=60) | st.sampled_from([b"\r\n--b", b"\r\n", b"\r\n--", b"--b0undar", b"\r\n\r\n"]),
        max_size=4,
    ),
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
)
def test_wherever_a_body_is_cut_its_parts_are_what_was_put_in(contents: list[bytes], cuts: list[int]) -> None:
    contents = [one for one in contents if b"\r\n--b0undary" not in one]
    body, _ = a_body(*contents)
    found, at, turn = Collected(), 0, 0
    machine = Multipart(boundary="b0undary", sink=found, most=10)
    while at < len(body):
        step = cuts[turn % len(cuts)]
        machine.feed(body[at : at + step])
        at, turn = at + step, turn + 1
    if contents:
        machine.close()
    assert [content for _, content in found.parts] == contents
    assert all(headers["content-type"] == "application/dicom" for headers, _ in found.parts)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300))
def test_no_bytes_at_all_make_the_reader_of_bodies_fail_otherwise(body: bytes) -> None:
    machine = Multipart(boundary="b", sink=Collected(), most=3)
    try:
        machine.feed(b"--b\r\n" + body)
        machine.close()
    except Malformed as error:
        assert "needed" in str(error) or str(error).count(". ") >= 1


@pytest.mark.slow
def test_a_sender_that_stops_in_the_middle_is_let_go_and_the_next_is_served(tmp_path: Path) -> None:
    at = a_desk(tmp_path / "state", silence_s=0.5, associations=1)
    body, headers = a_body(content(a_slice(side=512)))
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    begin = (
        f"POST /dicom-web/studies HTTP/1.1\r\nHost: node\r\nAuthorization: Bearer {TOKENS['scanner']}\r\n"
        f"{head}Content-Length: {len(body)}\r\n\r\n"
    )
    with served(at) as port:
        place = f"http://127.0.0.1:{port}/dicom-web/studies"
        headers["Authorization"] = f"Bearer {TOKENS['scanner']}"
        with socket.create_connection(("127.0.0.1", port)) as silent:
            silent.sendall(begin.encode() + body[: len(body) // 2])
            assert b" 408 " in silent.recv(100)
        assert parts(at) == [] and codes(at) == {"broken_off"}
        with socket.create_connection(("127.0.0.1", port)) as gone:
            gone.sendall(begin.encode() + body[: len(body) // 2])
        assert until(lambda: parts(at) == [] and at.ledger.refused() == {("broken_off", "scanner"): 2})
        assert urllib3.request("POST", place, body=body, headers=headers).status == 200
    assert len(files(at)) == 1 and parts(at) == []
    at.ledger.close()


PROCESS = """
import sys
from pathlib import Path
from tests.pipeline.node.test_stow import a_desk, served
with served(a_desk(Path(sys.argv[1]))) as port:
    print(port, flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_memory_stays_flat_whatever_the_size_of_an_object(tmp_path: Path) -> None:
    large = a_slice(side=4096)
    large.NumberOfFrames = 4
    large.PixelData = bytes(4 * 2 * 4096 * 4096)
    for name, data in (("small", a_slice()), ("large", large)):
        body, headers = a_body(content(data))
        (tmp_path / name).write_bytes(body)
    words = [sys.executable, "-c", PROCESS, str(tmp_path / "state")]
    with subprocess.Popen(words, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        port = int(process.stdout.readline())
        said = [f"-H{name}: {value}" for name, value in headers.items()]
        for name in ("small", "small", "large"):
            before = _peak(process.pid)
            words = ["curl", "-sf", f"-HAuthorization: Bearer {TOKENS['scanner']}", *said, "--data-binary"]
            words += [
                f"@{tmp_path / name}",
                "-HTransfer-Encoding: chunked",
                f"http://127.0.0.1:{port}/dicom-web/studies",
            ]
            assert subprocess.run(words, capture_output=True, check=False).returncode == 0
        grown = _peak(process.pid) - before
        process.stdin.close()
        process.wait(20)
    assert (tmp_path / "large").stat().st_size > 1 << 27
    assert grown < 1 << 24, f"{grown} bytes for an object of {1 << 27}"


def _peak(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024


@pytest.mark.slow
def test_orthanc_hands_over_a_study_by_its_own_dicomweb_client(tmp_path: Path) -> None:
    with network_of_its_own():
        orthanc, at = Orthanc(tmp_path / "orthanc"), a_desk(tmp_path / "state")
        with served(at) as port:
            said = json.loads(orthanc.config.read_text())
            token = {"Authorization": f"Bearer {TOKENS['scanner']}"}
            server = {"Url": f"http://127.0.0.1:{port}/dicom-web/", "HttpHeaders": token}
            said["DicomWeb"]["Servers"] = {"node": server}
            orthanc.config.write_text(json.dumps(said))
            orthanc.start()
            try:
                sent = a_study(tmp_path / "sent", slices=4)
                for path in sent:
                    orthanc.ask("instances", path.read_bytes())
                study = orthanc.ask("studies")[0]  # type: ignore[index]
                wish = json.dumps({"Resources": [study], "Synchronous": True}).encode()
                answer = SimpleNamespace(**orthanc.ask("dicom-web/servers/node/stow", wish))  # type: ignore[arg-type]
                assert len(files(at)) == 4 and parts(at) == [], vars(answer)
                pixels = {pydicom.dcmread(path).PixelData for path in sent}
                assert {pydicom.dcmread(path).PixelData for path in files(at)} == pixels
            finally:
                orthanc.stop()
        at.ledger.close()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_a_peer_that_shows_its_certificate_needs_no_token(tmp_path: Path) -> None:
    hospital, strangers = Authority(tmp_path / "hospital", "hospital"), Authority(tmp_path / "strangers", "strangers")
    scanner = hospital.certified("scanner")
    der = ssl.PEM_cert_to_DER_cert(scanner.certificate.read_text())
    at = a_desk(tmp_path / "state")
    peers = {"scanner": Peer(aet="SCANNER", certificate=hashlib.sha256(der).hexdigest())}
    showing = replace(at.node.showing, security=hospital.certified("node"))
    at = replace(at, node=replace(at.node, peers=peers, showing=showing))
    body, headers = a_body(content(a_slice()))
    (tmp_path / "body").write_bytes(body)
    with served(at) as port:
        for who, status in ((scanner, "200"), (hospital.certified("other"), "401"), (strangers.certified("x"), "000")):
            shown = ["--cacert", str(scanner.authority), "--cert", str(who.certificate), "--key", str(who.key)]
            said = [f"-H{name}: {value}" for name, value in headers.items()]
            words = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", *shown, *said, "--data-binary"]
            words += [f"@{tmp_path / 'body'}", f"https://127.0.0.1:{port}/dicom-web/studies"]
            assert subprocess.run(words, capture_output=True, text=True, check=False).stdout == status
    assert {one.source for study in at.ledger.waiting() for one in at.ledger.since(study.study)} == {"scanner"}
    at.ledger.close()


def test_headers_of_parts_are_read_as_the_standard_library_reads_them() -> None:
    kind, said = bodies.media_type('Multipart/Related; boundary="a b"; TYPE="application/dicom"')
    assert kind == "multipart/related" and said == {"boundary": "a b", "type": "application/dicom"}
    assert bodies.disposed('form-data; name="T1"; filename="x.nii"') == "T1" and bodies.disposed("") == ""


def test_no_text_of_a_header_is_in_any_path_row_or_line(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    canary = "Kanarienvogel"
    good = a_slice(PatientName=canary, PatientID=canary, StudyDescription=canary, AccessionNumber=canary)
    odd = a_slice(PatientName=canary, SeriesInstanceUID="../../etc/passwd")
    bodies = (
        a_body(content(good), content(odd), content(good)[:700], canary.encode() * 99, kind="application/dicom"),
        a_body(content(good), boundary=canary),
        a_body(content(good), kind=f"text/{canary}"),
    )
    for body, headers in bodies:
        client = a_client(desk)
        client.post("/dicom-web/studies", content=body, headers=headers)
        client.post(f"/dicom-web/studies/{good.StudyInstanceUID}", content=body[:900], headers=headers)
        a_client(desk, canary).post("/dicom-web/studies", content=body, headers=headers)
    assert canary.encode() in files(desk)[0].read_bytes() and len(codes(desk)) >= 3
    secrets = [canary, "etc/passwd", good.StudyInstanceUID, good.SeriesInstanceUID, good.SOPInstanceUID]
    ours = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("pipeline"))
    kept = [path for path in desk.node.state.rglob("*") if path.is_file() and path.suffix != ".dcm"]
    assert "by STOW from scanner" in ours and any(path.name.startswith("ledger.sqlite") for path in kept)
    for secret in secrets:
        assert secret not in ours
        assert not [path for path in desk.node.state.rglob("*") if secret in str(path)]
        assert not [path for path in kept if secret.encode() in path.read_bytes()]
