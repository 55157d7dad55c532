"""TLS in both directions: whoever has no certificate of the authority gets no word in, and a title alone proves nothing."""

import socket
import ssl
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pipeline.node.config import Peer, Security

from .scanner import SCANNER, a_node, a_study, storescu, until

pytestmark = pytest.mark.slow


class Authority:
    """Somebody who makes certificates."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir()
        self.folder, self.name = folder, name
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self._signed(name, self.key.public_key(), is_authority=True)
        (folder / "authority.pem").write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))

    def certified(self, name: str) -> Security:
        """A certificate and its key for somebody on loopback."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._signed(name, key.public_key())
        plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (self.folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        (self.folder / f"{name}.key").write_bytes(key.private_bytes(serialization.Encoding.PEM, *plain))
        files = {"certificate": self.folder / f"{name}.pem", "key": self.folder / f"{name}.key"}
        return Security(**files, authority=self.folder / "authority.pem")

    def _signed(self, name: str, key: ec.EllipticCurvePublicKey, is_authority: bool = False) -> x509.Certificate:
        now = datetime.now(UTC)
        names = [x509.IPAddress(ip_address("127.0.0.1")), x509.DNSName("localhost")]
        builder = x509.CertificateBuilder().subject_name(_named(name)).issuer_name(_named(self.name)).public_key(key)
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(hours=1))
        builder = builder.not_valid_after(now + timedelta(days=1))
        builder = builder.add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        return builder.add_extension(x509.SubjectAlternativeName(names), critical=False).sign(self.key, hashes.SHA256())


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "hospital", "hospital")


def with_tls(shown: Security, trusted: Path) -> list[str]:
    return ["+tls", str(shown.key), str(shown.certificate), "+cf", str(trusted)]


def test_who_shows_a_certificate_of_the_authority_is_heard_and_nobody_else(hospital: Authority, tmp_path: Path) -> None:
    sent = a_study(tmp_path / "sent", slices=3)
    elsewhere = Authority(tmp_path / "elsewhere", "elsewhere")
    security, scanner, stranger = (
        hospital.certified("node"),
        hospital.certified("scanner"),
        elsewhere.certified("scanner"),
    )
    with a_node(tmp_path / "state", security=security, silence_s=3.0) as node:
        assert storescu(node.port, *sent, more=with_tls(scanner, security.authority)).returncode == 0
        assert len(node.files()) == 3
        assert storescu(node.port, *sent, more=with_tls(stranger, security.authority)).returncode != 0
        assert storescu(node.port, *sent, more=["+tla", "+cf", str(security.authority)]).returncode != 0
        assert storescu(node.port, *sent).returncode != 0
        assert until(lambda: node.codes().get("no_security", 0) == 3), node.codes()
        assert storescu(node.port, sent[0], more=with_tls(scanner, security.authority)).returncode == 0


def test_the_node_shows_its_own(hospital: Authority, tmp_path: Path) -> None:
    security = hospital.certified("node")
    with a_node(tmp_path / "state", security=security) as node:
        context = ssl.create_default_context(cafile=security.authority)
        context.load_cert_chain(security.certificate, security.key)
        with (
            socket.create_connection(("127.0.0.1", node.port)) as line,
            context.wrap_socket(line, server_hostname="localhost") as secure,
        ):
            assert secure.version() in ("TLSv1.2", "TLSv1.3")
            said = dict(part[0] for part in secure.getpeercert()["subject"])
            assert said["commonName"] == "node"


def test_one_who_never_shakes_hands_keeps_nobody_out(hospital: Authority, tmp_path: Path) -> None:
    """pynetdicom shakes hands in the thread that accepts: one silent caller and no other is heard."""
    security, scanner = hospital.certified("node"), hospital.certified("scanner")
    sent = a_study(tmp_path / "sent", slices=1)
    with (
        a_node(tmp_path / "state", security=security, silence_s=60.0) as node,
        socket.create_connection(("127.0.0.1", node.port)),
    ):
        assert storescu(node.port, *sent, more=with_tls(scanner, security.authority)).returncode == 0


def test_a_certificate_may_be_tied_to_a_title(hospital: Authority, tmp_path: Path) -> None:
    security, scanner, other = (hospital.certified(name) for name in ("node", "scanner", "other"))
    words = ["openssl", "x509", "-in", str(scanner.certificate), "-noout", "-fingerprint", "-sha256"]
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip().partition("=")[2]
    peers: dict[str, Peer] = {"scanner": replace(SCANNER, certificate=printed)}
    sent = a_study(tmp_path / "sent", slices=1)
    with a_node(tmp_path / "state", peers=peers, security=security) as node:
        assert storescu(node.port, *sent, more=with_tls(other, security.authority)).returncode != 0
        assert node.codes() == {"unknown_caller": 1}
        assert storescu(node.port, *sent, more=with_tls(scanner, security.authority)).returncode == 0
