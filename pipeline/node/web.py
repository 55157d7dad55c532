"""The web side of a node: pages for people, doors for machines, in one application behind one guard."""

import asyncio
import hashlib
import logging
import ssl
import traceback
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import metrics, pages, rest, stow
from .config import Security
from .desk import Desk
from .guard import CERTIFICATE, Guard

if TYPE_CHECKING:
    import uvicorn

logger = logging.getLogger(__name__)


def application(desk: Desk) -> Starlette:
    """Everything that is served. Who is calling says `app.state.guard`."""
    app = Starlette(routes=[*pages.routes(desk), *metrics.routes(desk), *stow.routes(desk), *rest.routes(desk)])
    app.state.guard = Guard(desk)
    return app


def server(desk: Desk) -> "uvicorn.Server":
    """It, as it listens; by HTTPS where there are certificates."""
    import uvicorn

    showing = desk.node.showing
    config = uvicorn.Config(
        hushed(application(desk)),
        host=showing.host,
        port=showing.port,
        http=_protocol(),
        ws="none",
        log_config=None,
        access_log=False,  # a proxy in front keeps one, and addresses of studies need not stand in two places
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    config.load()
    config.ssl = _server_side(showing.security) if showing.security else None
    return uvicorn.Server(config)


CONNECTIONS = 200
"""At once: some twenty people with a few pages each, and as many programs; each takes some kilobytes."""
GRACE_SECONDS = 5
"""What is under way when the node is stopped may take so long; who starts containers kills after ten."""
SILENCE_SECONDS = 30.0
"""Whoever takes so long to ask, or to ask again, is hung up on, however slowly half a question drips in."""


def hushed(app: ASGIApp) -> ASGIApp:
    """The same, but what goes wrong is logged by its kind and place alone: an error's words may quote a header."""

    async def outer(scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def noting(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await app(scope, receive, noting)
        except Exception as error:  # whatever it is: nobody below us may write it down
            place = traceback.extract_tb(error.__traceback__)[-1]
            logger.error("a page failed: %s in %s, line %d", type(error).__name__, place.name, place.lineno or 0)
            if scope["type"] == "http" and not begun:
                await send(
                    {"type": "http.response.start", "status": 500, "headers": [(b"content-type", b"text/plain")]}
                )
                await send({"type": "http.response.body", "body": b"This failed; the node's log says where.\n"})

    return outer


def _server_side(security: Security) -> ssl.SSLContext:
    """A browser need not show a certificate; one that is shown must be of the authority."""
    from .security import server_side

    context = server_side(security)
    context.verify_mode = ssl.CERT_OPTIONAL
    return context


def _protocol() -> type[asyncio.Protocol]:
    """uvicorn's, with the two things it leaves out: who showed which certificate, and an end to those who say nothing."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Line(H11Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)  # type: ignore[arg-type]
            tls = transport.get_extra_info("ssl_object")
            shown = tls.getpeercert(True) if tls else None
            if shown:
                self.app = partial(_with_certificate, self.app, hashlib.sha256(shown).hexdigest())
            self.waiting_since = self.loop.time()
            self._look()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self.waiting_since = self.loop.time()

        def _look(self) -> None:
            is_asked = self.cycle is not None and not self.cycle.response_complete
            if not is_asked and self.loop.time() - self.waiting_since >= SILENCE_SECONDS:
                self.transport.close()
            elif not self.transport.is_closing():
                self.loop.call_later(SILENCE_SECONDS / 2, self._look)

    return Line


async def _with_certificate(app: Any, digest: str, scope: Scope, receive: Receive, send: Send) -> None:
    scope.setdefault("state", {})[CERTIFICATE] = digest
    await app(scope, receive, send)
