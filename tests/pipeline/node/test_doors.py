"""The web side as it listens: HTTPS, certificates of programs by openssl's rules, and an end to those who say nothing."""

import hashlib
import http.client
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.node import pages, web
from pipeline.node.access import User, hashed
from pipeline.node.config import Node, Peer, Security, Showing
from pipeline.node.desk import Desk
from pipeline.node.ledger import open_ledger
from pipeline.node.spool import Spool, open_keys
from pipeline.node.stories import Stories

from .scanner import free_port, until
from .test_security import Authority

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("doors") / "hospital", "hospital")


@contextmanager
def serving(state: Path, security: Security | None = None, **peers: Peer) -> Iterator[int]:
    """A node's web side; its port."""
    showing = Showing(port=free_port(), security=security, users={"ann": User(password=hashed("right horse"))})
    node = Node(state=state, peers=peers, showing=showing)
    keys, ledger = open_keys(state), open_ledger(state)
    server = web.server(Desk(node=node, spool=Spool(state, keys), ledger=ledger, stories=Stories(ledger)))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert until(lambda: server.started)
        yield showing.port
    finally:
        server.should_exit = True
        thread.join()
        ledger.close()


def asks(port: int, context: ssl.SSLContext, method: str, place: str, body: str = "") -> http.client.HTTPResponse:
    line = http.client.HTTPSConnection("localhost", port, context=context, timeout=30)
    line.request(method, place, body, {"Content-Type": "application/x-www-form-urlencoded"})
    answer = line.getresponse()
    answer.read()
    line.close()
    return answer


def trusting(security: Security, shown: Security | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=security.authority)
    if shown:
        context.load_cert_chain(shown.certificate, shown.key)
    return context


def test_a_browser_needs_no_certificate_a_program_may_show_its_own_and_a_strangers_is_refused(
    hospital: Authority, tmp_path: Path
) -> None:
    security, robot, other = (hospital.certified(name) for name in ("node", "robot", "other"))
    stranger = Authority(tmp_path / "elsewhere", "elsewhere").certified("robot")
    digest = hashlib.sha256(ssl.PEM_cert_to_DER_cert(robot.certificate.read_text())).hexdigest()
    with serving(tmp_path / "state", security, robot=Peer(aet="ROBOT", certificate=digest)) as port:
        assert asks(port, trusting(security), "GET", "/login").status == 200
        said = asks(port, trusting(security), "POST", "/login", "name=ann&password=right+horse")
        assert (
            said.status == 303 and "Secure" in said.headers["set-cookie"] and "HttpOnly" in said.headers["set-cookie"]
        )
        submit = ("POST", "/api/submissions?route=none")
        assert asks(port, trusting(security), *submit).status == 401
        assert asks(port, trusting(security, other), *submit).status == 401, "of the authority, and no peer's"
        assert asks(port, trusting(security, robot), *submit).status == 404, "let in: there is no such route"
        with pytest.raises((ssl.SSLError, ConnectionError)):
            asks(port, trusting(security, stranger), *submit)
        with socket.create_connection(("localhost", port)) as plain:
            plain.sendall(b"GET /login HTTP/1.1\r\nHost: node\r\n\r\n")
            assert b"hilum" not in plain.recv(1000), "nothing is said in the clear"


def test_openssl_gets_no_older_protocol_than_tls_1_2(hospital: Authority, tmp_path: Path) -> None:
    security = hospital.certified("node")
    with serving(tmp_path / "state", security) as port:

        def spoken(version: str) -> str:
            words = ["openssl", "s_client", "-connect", f"localhost:{port}", version, "-cipher", "ALL:@SECLEVEL=0"]
            return subprocess.run(words, input="", capture_output=True, text=True, check=False).stdout

        assert "TLSv1.2" in spoken("-tls1_2") and "Cipher is (NONE)" in spoken("-tls1_1")


def test_who_says_nothing_or_half_a_request_is_hung_up_on_and_others_are_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(pages, "FORM_SECONDS", 0.5)
    with serving(tmp_path / "state") as port:
        silent = [socket.create_connection(("localhost", port)) for _ in range(30)]
        for line in silent[::2]:
            line.sendall(b"GET /login HTTP/1.1\r\nX-Slow: ")
        for line in silent[1::4]:  # who was answered once may be as slow with the next
            line.sendall(b"GET /health/live HTTP/1.1\r\nHost: node\r\n\r\nGET /half")
        for line in silent:
            line.settimeout(30)
            while said := line.recv(1000):
                assert said.startswith(b"HTTP/1.1 200")
            line.close()
        with socket.create_connection(("localhost", port)) as line:
            line.sendall(b"POST /login HTTP/1.1\r\nHost: node\r\nContent-Length: 4000\r\n\r\nname=")
            assert line.recv(1000).startswith(b"HTTP/1.1 403"), "a form that never comes whole"
        with socket.create_connection(("localhost", port)) as line:
            line.sendall(b"GET /health/live HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")
            assert line.recv(1000).startswith(b"HTTP/1.1 200")
