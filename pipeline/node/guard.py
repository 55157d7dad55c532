"""Who is calling: a person with a cookie, a program with a token, a machine with a certificate; and what each may do."""

import hmac
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from starlette.exceptions import HTTPException
from starlette.requests import Request

from .access import Role, Sessions, Throttle, token_hash
from .desk import Desk

COOKIE = "hilum"
CERTIFICATE = "certificate"
"""Where the server leaves the SHA-256 of what a caller showed, in a request's state."""
RANKS: tuple[Role, ...] = ("viewer", "sender", "operator")
"""Each may do what those before it may."""
BETWEEN_SECONDS = 60.0
"""Two lines of the audit trail about wrong tokens lie so far apart: half a million a year at the worst, a hundred megabytes."""


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Somebody the node knows."""

    name: str
    """As the config calls it."""
    role: Role
    by: Literal["cookie", "token", "certificate"]

    def may(self, role: Role) -> bool:
        """Whether that is allowed to it."""
        return RANKS.index(self.role) >= RANKS.index(role)


@dataclass(eq=False)
class Guard:
    """At every door of the web side. It lies in the application's state: `request.app.state.guard`."""

    desk: Desk
    throttle: Throttle = field(default_factory=Throttle)
    clock: Callable[[], float] = time.monotonic
    wrong_tokens: int = 0
    """Shown since the audit trail last heard of any."""
    told: float = -math.inf
    """When that was."""

    def __repr__(self) -> str:
        return "Guard()"

    @property
    def sessions(self) -> Sessions:
        """Cookies and the tokens of forms, under this node's secret."""
        users = self.desk.node.showing.users
        return Sessions(self.desk.spool.keys.secret, {name: user.password for name, user in users.items()})

    def caller(self, request: Request) -> Caller | None:
        """Who that is. A token that is shown and wrong is nobody's, whatever else is shown."""
        if said := request.headers.get("authorization"):
            return self._program(said)
        return self._machine(request) or self.person(request)

    def person(self, request: Request) -> Caller | None:
        """Who is logged in."""
        name = self.sessions.whose(request.cookies.get(COOKIE, ""))
        user = self.desk.node.showing.users.get(name)
        return Caller(name=name, role=user.role, by="cookie") if user else None

    def _program(self, said: str) -> Caller | None:
        kind, _, token = said.partition(" ")
        shown = token_hash(token.strip())
        for name, one in self.desk.node.showing.tokens.items():
            if kind.lower() == "bearer" and hmac.compare_digest(one.hash.encode(), shown.encode()):
                return Caller(name=name, role=one.role, by="token")
        self._count_wrong()
        return None

    def _count_wrong(self) -> None:
        """A program with an old token asks again and again: the trail hears how often, not each time."""
        self.wrong_tokens += 1
        if self.clock() - self.told >= BETWEEN_SECONDS:
            self.desk.audit.note("token_failed", times=self.wrong_tokens)
            self.wrong_tokens, self.told = 0, self.clock()

    def _machine(self, request: Request) -> Caller | None:
        shown = request.scope.get("state", {}).get(CERTIFICATE, "")
        for name, peer in self.desk.node.peers.items():
            wanted = peer.certificate.replace(":", "").lower()
            if shown and wanted and hmac.compare_digest(wanted.encode(), shown.encode()):
                return Caller(name=name, role="sender", by="certificate")
        return None


def demand(request: Request, role: Role) -> Caller:
    """Who is calling a machine's door, if that is allowed; else the answer is 401 or 403.

    A cookie opens it for questions alone: a browser sends it along with whatever another site makes it send.
    """
    guard: Any = request.app.state.guard
    caller = guard.caller(request)
    if caller is None:
        raise HTTPException(401, "A bearer token of this node is needed.", {"WWW-Authenticate": "Bearer"})
    if not caller.may(role) or (caller.by == "cookie" and request.method not in ("GET", "HEAD")):
        raise HTTPException(403, f"{caller.name} may not do this here; a token with the role {role} is needed.")
    return caller
