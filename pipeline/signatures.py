"""Whose package this is: a person's ed25519 signature over the seal of a package, in a file beside it.

A seal says that no byte changed since somebody sealed it, and anybody can seal; a signature says who vouches for it. Signed is
the id of package.json, which names every other file by its hash. Several may sign one package.
"""

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preprocessing.records import BadRecord, decode, encode

from . import seal
from .errors import PackageError, UsageError
from .report import as_json, write_whole

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

FILE_NAME = "signature.json"

STATEMENT = "hilum package {}\n"
"""What is signed, with the package's id: the words keep a signature from meaning anything else somewhere else."""


class NotSigned(PackageError):
    """Nobody who is trusted vouches for a package."""


@dataclass(frozen=True, kw_only=True)
class Signature:
    """One person's."""

    key: str
    """The SHA-256 of the public key (its 32 bytes), in hexadecimal: whose it is."""
    signature: str
    """In base64."""
    signed: str
    """When, by the signer's clock. It is not part of what was signed."""


@dataclass(frozen=True, kw_only=True)
class Signatures:
    """Everything signature.json says."""

    id: str
    """Of the package, as it was signed."""
    signatures: tuple[Signature, ...]


def sign(package: Path, key: Path) -> Signature:
    """Vouch for a package that is whole. Whoever signed it before stays in its file."""
    identity, private = _sealed(package), read_private(key)
    made = Signature(
        key=fingerprint(private.public_key()),
        signature=base64.b64encode(private.sign(STATEMENT.format(identity).encode())).decode(),
        signed=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    others = [one for one in _signatures_of(package, identity) if one.key != made.key]
    write_whole(package / FILE_NAME, as_json(encode(Signatures(id=identity, signatures=(*others, made)))) + "\n")
    return made


def refuse_unsigned(package: Path, trusted: Sequence[Path]) -> str:
    """The fingerprint of the key, among those that are trusted, that vouches for this package as it lies here now."""
    identity = _sealed(package)
    found = _signatures_of(package, identity)
    for public in map(read_public, trusted):
        for one in found:
            if one.key == fingerprint(public) and _fits(one, identity, public):
                return one.key
    whose = f"signatures by {', '.join(one.key[:12] for one in found)}" if found else "no signature of it as it is"
    raise NotSigned(
        f"{package.name} has {whose}; one by a key that is trusted here is needed. Let its maker sign it "
        "(`hilum sign`), or add the maker's public key to `trusted`."
    )


def new_key(path: Path) -> Path:
    """A private key that only its owner can read, and beside it the public one, which may go everywhere: its path."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    public_path = path.with_name(f"{path.name}.pub")
    private = Ed25519PrivateKey.generate()
    _write_new(path, private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)
    public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    _write_new(public_path, public, 0o644)
    return public_path


def fingerprint(public: "Ed25519PublicKey") -> str:
    """What a key is called."""
    return hashlib.sha256(public.public_bytes_raw()).hexdigest()


def read_private(path: Path) -> "Ed25519PrivateKey":
    """A key to sign with, as `hilum sign --new_key` or `openssl genpkey -algorithm ed25519` makes one."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key = _loaded(path, lambda content: load_pem_private_key(content, password=None), "private")
    if not isinstance(key, Ed25519PrivateKey):
        raise _no_key(path, "private")
    return key


def read_public(path: Path) -> "Ed25519PublicKey":
    """A key to believe."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    key = _loaded(path, load_pem_public_key, "public")
    if not isinstance(key, Ed25519PublicKey):
        raise _no_key(path, "public")
    return key


def _loaded(path: Path, load: Any, kind: str) -> Any:
    try:
        return load(path.read_bytes())
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror}); a {kind} key is needed. Look at its name."
        ) from None
    except (ValueError, TypeError):
        raise _no_key(path, kind) from None


def _no_key(path: Path, kind: str) -> UsageError:
    return UsageError(
        f"{path} holds no {kind} ed25519 key without a password, as PEM; one is needed. `hilum sign --new_key FILE` makes a pair."
    )


def _fits(one: Signature, identity: str, public: "Ed25519PublicKey") -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        public.verify(base64.b64decode(one.signature, validate=True), STATEMENT.format(identity).encode())
    except (InvalidSignature, ValueError):
        return False
    return True


def _sealed(package: Path) -> str:
    """The id of a package of any kind, every byte of it checked."""
    if seal.kind_of(package) == "scans":
        from .package import ModelPackage

        return ModelPackage.load(package).id
    from .slides.package import SlidePackage

    return SlidePackage.load(package).id


def _signatures_of(package: Path, identity: str) -> Iterable[Signature]:
    """Those over this very id; of a package that was sealed anew since, none."""
    try:
        said = decode(Signatures, json.loads((package / FILE_NAME).read_text()), where=FILE_NAME)
    except (OSError, ValueError, BadRecord):
        return ()
    return said.signatures if said.id == identity else ()


def _write_new(path: Path, content: bytes, mode: int) -> None:
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be made ({error.strerror}); a new file for a key is needed. Keys are never written over."
        ) from None
    with os.fdopen(file, "wb") as stream:
        stream.write(content)
