"""Signatures: what openssl makes is believed, what we make openssl believes, and nothing else passes."""

import base64
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.errors import PackageError, UsageError
from pipeline.package import ModelPackage, amend
from pipeline.signatures import (
    FILE_NAME,
    STATEMENT,
    NotSigned,
    fingerprint,
    new_key,
    read_public,
    refuse_unsigned,
    sign,
)

from .slides.known import a_package


@pytest.fixture
def package(make_package: Callable[..., ModelPackage], tmp_path: Path) -> Path:
    return make_package(tmp_path / "package").folder


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "key", new_key(tmp_path / "key")


def openssl(*words: str | Path, content: bytes = b"") -> bytes:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    return subprocess.run(["openssl", *map(str, words)], input=content, capture_output=True, check=True).stdout


def test_a_package_that_somebody_trusted_signed_is_believed(package: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    with pytest.raises(NotSigned, match="no signature"):
        refuse_unsigned(package, [public])
    made = sign(package, private)
    assert refuse_unsigned(package, [public]) == made.key == fingerprint(read_public(public))
    assert private.stat().st_mode & 0o777 == 0o600
    assert ModelPackage.load(package).id == json.loads((package / FILE_NAME).read_text())["id"], "its id stays"


def test_a_package_for_slides_is_signed_as_well(keys: tuple[Path, Path], tmp_path: Path) -> None:
    package = a_package(tmp_path).folder
    assert sign(package, keys[0]).key == refuse_unsigned(package, [keys[1]])
    (package / "card.md").write_text("changed")
    with pytest.raises(PackageError, match="changed since it was packed"):
        refuse_unsigned(package, [keys[1]])


def test_what_openssl_signs_with_its_own_key_is_believed_and_what_we_sign_openssl_believes(
    package: Path, tmp_path: Path
) -> None:
    private, public, said = tmp_path / "o.pem", tmp_path / "o.pub", tmp_path / "said"
    openssl("genpkey", "-algorithm", "ed25519", "-out", private)
    openssl("pkey", "-in", private, "-pubout", "-out", public)
    said.write_text(STATEMENT.format(ModelPackage.load(package).id))
    sign(package, private)
    (ours,) = json.loads((package / FILE_NAME).read_text())["signatures"]
    (tmp_path / "ours").write_bytes(base64.b64decode(ours["signature"]))
    openssl("pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin", "-in", said, "-sigfile", tmp_path / "ours")
    theirs = openssl("pkeyutl", "-sign", "-inkey", private, "-rawin", "-in", said)
    words = {
        "id": ModelPackage.load(package).id,
        "signatures": [ours | {"signature": base64.b64encode(theirs).decode()}],
    }
    (package / FILE_NAME).write_text(json.dumps(words))
    assert refuse_unsigned(package, [public]) == ours["key"]


def test_several_may_sign_and_one_that_is_trusted_is_enough(
    package: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    other = new_key(tmp_path / "other")
    sign(package, keys[0])
    with pytest.raises(NotSigned, match="signatures by"):
        refuse_unsigned(package, [other])
    sign(package, tmp_path / "other")
    sign(package, tmp_path / "other")
    assert len(json.loads((package / FILE_NAME).read_text())["signatures"]) == 2
    assert refuse_unsigned(package, [other]) != refuse_unsigned(package, [keys[1]])


@pytest.mark.parametrize("what", ["flipped", "of another package", "sealed anew", "no JSON", "claimed", "emptied"])
def test_a_signature_that_is_not_this_packages_own_does_not_pass(
    package: Path, keys: tuple[Path, Path], make_package: Callable[..., ModelPackage], tmp_path: Path, what: str
) -> None:
    private, public = keys
    sign(package, private)
    path = package / FILE_NAME
    said = json.loads(path.read_text())
    if what == "flipped":
        content = bytearray(base64.b64decode(said["signatures"][0]["signature"]))
        content[5] ^= 1
        said["signatures"][0]["signature"] = base64.b64encode(content).decode()
        path.write_text(json.dumps(said))
    elif what == "of another package":
        other = amend(make_package(tmp_path / "other"), lambda record: replace(record, name="other")).folder
        sign(other, private)
        path.write_text(json.dumps(json.loads((other / FILE_NAME).read_text()) | {"id": said["id"]}))
    elif what == "sealed anew":  # the seal holds, and so does the signature of what it was; of this nobody signed
        amend(ModelPackage.load(package), lambda record: replace(record, name="changed"))
        path.write_text(json.dumps(said))
    elif what == "no JSON":
        path.write_text("{")
    elif what == "claimed":  # by a key that says it is another
        stranger = tmp_path / "stranger"
        new_key(stranger)
        path.unlink()
        sign(package, stranger)
        theirs = json.loads(path.read_text())
        theirs["signatures"][0]["key"] = said["signatures"][0]["key"]
        path.write_text(json.dumps(theirs))
    else:
        path.write_text(json.dumps(said | {"signatures": []}))
    with pytest.raises(NotSigned):
        refuse_unsigned(package, [public])


def test_a_byte_of_a_signed_package_that_changed_is_found_before_its_signature(
    package: Path, keys: tuple[Path, Path]
) -> None:
    sign(package, keys[0])
    weights = next(package.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(PackageError, match="changed since it was packed"):
        refuse_unsigned(package, [keys[1]])
    with pytest.raises(PackageError, match="changed since it was packed"):
        sign(package, keys[0])


def test_what_is_no_key_is_refused_with_what_to_do(package: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    odd.write_text("no key")
    for key in (odd, keys[1], tmp_path / "nowhere"):
        with pytest.raises(UsageError, match="needed"):
            sign(package, key)
    with pytest.raises(UsageError, match="needed"):
        read_public(keys[0])
    openssl("genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:1024", "-out", tmp_path / "rsa")
    with pytest.raises(UsageError, match="ed25519"):
        sign(package, tmp_path / "rsa")
    with pytest.raises(UsageError, match="never written over"):
        new_key(keys[0])


def test_the_command_makes_a_key_and_signs(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sign", "--new_key", str(tmp_path / "k")]) == 0
    told = capsys.readouterr()
    assert main(["sign", str(package), "--key", str(tmp_path / "k")]) == 0
    assert refuse_unsigned(package, [tmp_path / "k.pub"]) == told.out.strip()
    assert main(["sign", str(package)]) == 2 and main(["sign", str(package), "--key", str(tmp_path / "k.pub")]) == 2
