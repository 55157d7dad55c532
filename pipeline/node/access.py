"""Who may see the status page, and who may act on it: passwords as scrypt hashes, sessions as signed cookies."""

import hashlib
import hmac
import secrets
import time
from dataclasses import dataclass
from typing import Literal

Role = Literal["viewer", "operator"]

COST, BLOCK, LANES = 2**15, 8, 1
"""Of scrypt: 32 MB and about a tenth of a second for each try, OWASP's advice for servers."""


@dataclass(frozen=True, kw_only=True)
class User:
    """Somebody who may log in."""

    role: Role = "viewer"
    """A viewer sees; an operator may also begin stories anew."""
    password: str
    """As `hilum node --hash-password` prints it; the password itself stands nowhere."""


def hashed(password: str) -> str:
    """What belongs into the config instead of a password."""
    salt = secrets.token_bytes(16)
    return f"scrypt:{salt.hex()}:{_scrypt(password, salt).hex()}"


def is_right(password: str, kept: str) -> bool:
    """Whether it is the password; a hash that is none fits nothing."""
    kind, _, rest = kept.partition(":")
    salt, _, wanted = rest.partition(":")
    try:
        made = _scrypt(password, bytes.fromhex(salt))
        return kind == "scrypt" and hmac.compare_digest(made, bytes.fromhex(wanted))
    except ValueError:
        return False


def _scrypt(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, n=COST, r=BLOCK, p=LANES, maxmem=2**26)


NOBODY = hashed(secrets.token_hex(16))
"""Compared with where there is no such user, so that the time to answer does not tell who there is."""

SESSION_SECONDS = 8 * 3600
"""A shift."""


@dataclass(frozen=True)
class Sessions:
    """Signed, not stored: a node that was started anew knows them still."""

    secret: bytes

    def begin(self, name: str) -> str:
        """The cookie of somebody who just logged in."""
        until = int(time.time()) + SESSION_SECONDS
        said = f"{name.encode().hex()}.{until}.{secrets.token_hex(8)}"
        return f"{said}.{self._sign('session', said)}"

    def whose(self, cookie: str) -> str:
        """Who that is; empty where the cookie is none of ours, or too old."""
        said, _, signature = cookie.rpartition(".")
        if not hmac.compare_digest(signature.encode(), self._sign("session", said).encode()):
            return ""
        name, until, _ = said.split(".")
        return bytes.fromhex(name).decode() if int(until) > time.time() else ""

    def token(self, cookie: str) -> str:
        """What a form must bring along, so that no other site can send it."""
        return self._sign("form", cookie)

    def is_form_of(self, cookie: str, token: str) -> bool:
        return hmac.compare_digest(self.token(cookie).encode(), token.encode())

    def _sign(self, kind: str, said: str) -> str:
        return hmac.new(self.secret, f"{kind} {said}".encode(), hashlib.sha256).hexdigest()
