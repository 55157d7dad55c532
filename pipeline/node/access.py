"""Who may see the status page, and who may act on it: passwords as scrypt hashes, sessions as signed cookies, and how
often somebody may guess.
"""

import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Literal

Role = Literal["viewer", "sender", "operator"]
"""What somebody may do: see; also hand in studies; also act on what is there."""

COST, BLOCK, LANES = 2**15, 8, 1
"""Of scrypt: 32 MB and about a tenth of a second for each try, OWASP's advice for servers."""


@dataclass(frozen=True, kw_only=True)
class User:
    """Somebody who may log in."""

    role: Literal["viewer", "operator"] = "viewer"
    """A viewer sees; an operator may also begin stories anew, send them elsewhere, hold them and give them up."""
    password: str
    """As `hilum node --hash_password` prints it; the password itself stands nowhere."""


@dataclass(frozen=True, kw_only=True)
class Token:
    """A program that may call: DICOMweb, the REST interface."""

    role: Role = "sender"
    """A viewer asks; a sender may also hand in studies and files; an operator may do all that there is."""
    hash: str
    """As `hilum node --make_token` prints it; the token itself stands nowhere."""


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


def make_token() -> tuple[str, str]:
    """A new token, for the program, and its hash, for the config."""
    token = f"hilum_{secrets.token_urlsafe(32)}"
    return token, token_hash(token)


def token_hash(token: str) -> str:
    """A token is 256 random bits, which nobody guesses: one round is enough, and calls are many."""
    return f"sha256:{hashlib.sha256(token.encode()).hexdigest()}"


def _scrypt(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, n=COST, r=BLOCK, p=LANES, maxmem=2**26)


NOBODY = hashed(secrets.token_hex(16))
"""Compared with where there is no such user, so that the time to answer does not tell who there is."""

SESSION_SECONDS = 8 * 3600
"""A shift."""


@dataclass(frozen=True)
class Sessions:
    """Signed, not stored: a node that was started anew knows them still. A new password ends those of the one before."""

    secret: bytes
    passwords: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Hashes by name."""

    def begin(self, name: str) -> str:
        """The cookie of somebody who just logged in."""
        until = int(time.time()) + SESSION_SECONDS
        said = f"{name.encode().hex()}.{until}.{secrets.token_hex(8)}"
        return f"{said}.{self._sign_session(name, said)}"

    def whose(self, cookie: str) -> str:
        """Who that is; empty where the cookie is none of ours, or too old."""
        said, _, signature = cookie.rpartition(".")
        try:
            name = bytes.fromhex(said.partition(".")[0]).decode()
        except ValueError:
            return ""
        if not hmac.compare_digest(signature.encode(), self._sign_session(name, said).encode()):
            return ""
        return name if int(said.split(".")[1]) > time.time() else ""

    def token(self, cookie: str) -> str:
        """What a form must bring along, so that no other site can send it."""
        return self._sign("form", cookie)

    def is_form_of(self, cookie: str, token: str) -> bool:
        return hmac.compare_digest(self.token(cookie).encode(), token.encode())

    def _sign_session(self, name: str, said: str) -> str:
        return self._sign("session", f"{said} {self.passwords.get(name, '')}")

    def _sign(self, kind: str, said: str) -> str:
        return hmac.new(self.secret, f"{kind} {said}".encode(), hashlib.sha256).hexdigest()


FORGOTTEN_SECONDS = 15 * 60
"""How long a wrong guess counts: the time that a tired person is asked to wait at most."""
WRONG_AT_MOST = {"person": 5, "address": 20, "name": 25}
"""Wrong guesses in that time: of one name from one address, which is a person who forgot; of any name from one address, which
may be a proxy that many come through; of one name from anywhere: 25 in 15 minutes are OWASP's 100 an hour (ASVS 2.2.1)."""
REMEMBERED = 10_000
"""Names and addresses that are kept in mind: a flood of others makes the node forget the oldest, not grow."""


@dataclass(kw_only=True, eq=False)
class Throttle:
    """Who guessed wrong, and how often. In this process alone: whoever can start it anew is no guesser."""

    clock: Callable[[], float] = time.monotonic
    wrong: OrderedDict[tuple[str, ...], list[float]] = field(default_factory=OrderedDict)
    known: OrderedDict[tuple[str, ...], None] = field(default_factory=OrderedDict)
    """Who logged in from where. What others guess from elsewhere does not lock them out."""
    lock: Lock = field(default_factory=Lock)

    def wait(self, name: str, address: str) -> float:
        """Seconds until the next guess is looked at; 0: now."""
        person, *others = _guesses(name, address)
        with self.lock:
            return max(self._wait(key) for key in ([person] if person in self.known else [person, *others]))

    def was_wrong(self, name: str, address: str) -> None:
        """Count one more."""
        with self.lock:
            for key in _guesses(name, address):
                moments = self.wrong.setdefault(key, [])
                moments.append(self.clock())
                del moments[: -WRONG_AT_MOST[key[0]]]
                self.wrong.move_to_end(key)
            _forget_oldest(self.wrong)

    def was_right(self, name: str, address: str) -> None:
        """Whoever knows the password has guessed enough; what others try from there or under that name still counts."""
        with self.lock:
            person = _guesses(name, address)[0]
            self.wrong.pop(person, None)
            self.known[person] = None
            self.known.move_to_end(person)
            _forget_oldest(self.known)

    def _wait(self, key: tuple[str, ...]) -> float:
        moments, most = self.wrong.get(key, []), WRONG_AT_MOST[key[0]]
        return max(0.0, moments[0] + FORGOTTEN_SECONDS - self.clock()) if len(moments) == most else 0.0


def _guesses(name: str, address: str) -> tuple[tuple[str, ...], ...]:
    return ("person", name, address), ("address", address), ("name", name)


def _forget_oldest(kept: "OrderedDict[tuple[str, ...], Any]") -> None:
    while len(kept) > REMEMBERED:
        kept.popitem(last=False)
