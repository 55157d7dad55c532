"""The doors for people: who may see which page, what each page asks the node, and what a person may have it do."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route as Place

from ..errors import PackageError, UsageError
from . import acts, looks, metrics, rollback, shadow, sheets
from .access import NOBODY, SESSION_SECONDS, is_right
from .audit import What
from .config import Peer
from .desk import Desk
from .guard import COOKIE, Caller, Guard
from .heart import Hearts
from .nouns import REASONS, UID
from .peers import Line, PeerError, Refused, echo
from .stories import Story

LARGEST_FORM = 4096
"""Bytes of a form: a name, a password, a UID, a token."""
FORM_SECONDS = 10.0
"""For a form to come in, whole: it is one packet."""
GUESSES_AT_ONCE = 2
"""Passwords that are looked at at the same time: each takes 32 MB and a tenth of a second of a core."""

STORY = "/story/{study}/{revision:int}/{route}"
Door = Callable[[Request], Awaitable[Response]]
Page = Callable[[Request, Caller], Awaitable[Response]]


def routes(desk: Desk) -> list[Place]:
    """All of them."""
    pages = Pages(desk)
    return [
        Place("/login", pages.login, methods=["GET", "POST"]),
        Place("/logout", pages.logout, methods=["POST"]),
        Place("/favicon.ico", _icon),
        Place("/", _seen(pages.overview)),
        Place("/find", _sent(pages.find), methods=["POST"]),
        Place("/study/{study}", _seen(pages.study)),
        Place(STORY, _seen(pages.story)),
        Place(f"{STORY}/{{act}}", _sent(pages.act, "operator"), methods=["POST"]),
        Place(f"{STORY}/cases/{{case}}/picture.png", _seen(pages.picture)),
        Place(f"{STORY}/cases/{{case}}/page.html", _seen(pages.leaf)),
        Place(f"{STORY}/cases/{{case}}/files/{{name}}", _seen(pages.load, "operator")),
        Place("/peers", _seen(pages.peers)),
        Place("/peers/{peer}/echo", _sent(pages.call, "operator"), methods=["POST"]),
        Place("/node", _seen(pages.node)),
        Place("/node/{route}/roll_back", _sent(pages.roll_back, "operator"), methods=["POST"]),
        Place("/node/{route}/roll_forward", _sent(pages.roll_forward, "operator"), methods=["POST"]),
        Place("/audit", _seen(pages.audit, "operator")),
        Place("/audit", _sent(pages.verify, "operator"), methods=["POST"]),
    ]


class Pages:
    """All of them, over one desk."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.echoes: dict[str, tuple[datetime, str]] = {}
        self.guessing = asyncio.Semaphore(GUESSES_AT_ONCE)

    # in and out

    async def login(self, request: Request) -> Response:
        if request.method == "GET":
            return looks.page("Log in", sheets.login("", self._closed()))
        said = await _form(request)
        name, address = said.get("name", ""), request.client.host if request.client else ""
        guard = _guard(request)
        async with self.guessing:
            if wait := guard.throttle.wait(name, address):
                return _too_often(wait)
            user = self.desk.node.showing.users.get(name)
            right = await run_in_threadpool(is_right, said.get("password", ""), user.password if user else NOBODY)
            if not user or not right:
                guard.throttle.was_wrong(name, address)
                # what was typed is written down only where it is a name: it may be a password
                await self._note("login_failed", who=name if user else "")
                return looks.page("Log in", sheets.login("No user has that name and password.", ""), status=403)
        guard.throttle.was_right(name, address)
        await self._note("login", who=name)
        return self._welcomed(request, guard.sessions.begin(name))

    def _welcomed(self, request: Request, cookie: str) -> Response:
        answer = RedirectResponse("/", status_code=303)
        answer.set_cookie(
            COOKIE, cookie, max_age=SESSION_SECONDS, httponly=True, samesite="strict", secure=request.url.scheme == "https"
        )  # fmt: skip
        return answer

    def _closed(self) -> str:
        if self.desk.node.showing.users:
            return ""
        return '<p class="quiet">Nobody can log in yet: the config names no users (showing.users).</p>'

    async def logout(self, request: Request) -> Response:
        answer = RedirectResponse("/login", status_code=303)
        answer.delete_cookie(COOKIE)
        return answer

    # studies

    async def overview(self, request: Request, caller: Caller) -> Response:
        listing = await run_in_threadpool(self._listing, request.query_params)
        return looks.page("", sheets.overview(listing, _token(request)), caller, room="/", live=True)

    def _listing(self, asked: Mapping[str, str]) -> sheets.Listing:
        group, route = asked.get("group", ""), asked.get("route", "")
        number = max(1, int(asked["page"])) if asked.get("page", "").isdecimal() and len(asked["page"]) < 8 else 1
        states = sheets.GROUPS.get(group, ())
        found, count = self.desk.stories.some(states, route, skip=(number - 1) * sheets.AT_ONCE, most=sheets.AT_ONCE)
        sums = Counter[str]()
        for (state, _), one in self.desk.stories.counts().items():
            sums.update({name: one for name, of in sheets.GROUPS.items() if state in of})
        return sheets.Listing(
            stories=found, count=count, sums=sums, arriving=self.desk.ledger.waiting(), group=group if states else "",
            route=route, number=number, routes=sorted(self.desk.node.routes), alarm=metrics.not_ready(self.desk),
        )  # fmt: skip

    async def find(self, request: Request, caller: Caller, said: Mapping[str, str]) -> Response:
        """By its UID, which becomes a key here and stands nowhere else, in no address either."""
        uid = said.get("uid", "").strip()
        key = self.desk.spool.keys.study(uid) if UID.fullmatch(uid) else ""
        if await run_in_threadpool(self._is_known, key):
            return RedirectResponse(f"/study/{key}", status_code=303)
        words = (
            "No study with that UID has come here."
            if key
            else "That is no UID: digits and dots are needed, at most 64."
        )
        back = '<p><a href="/">Back to all studies</a></p>'
        return looks.page("Not found", f'<h1>Studies</h1><div class="alarm">{words}</div>{back}', caller, status=404)

    def _is_known(self, key: str) -> bool:
        return bool(key) and (self.desk.ledger.study(key) is not None or self.desk.stories.some(study=key)[1] > 0)

    async def study(self, request: Request, caller: Caller) -> Response:
        key = request.path_params["study"]
        known = await run_in_threadpool(self.desk.ledger.study, key)
        stories, _ = await run_in_threadpool(lambda: self.desk.stories.some(study=key, most=LARGEST_STUDY))
        if known is None and not stories:
            return _missing(caller)
        return looks.page(key[:10], sheets.study(key, known, stories), caller, room="/", live=True)

    async def story(self, request: Request, caller: Caller) -> Response:
        return await run_in_threadpool(self._story, request, caller)

    def _story(self, request: Request, caller: Caller) -> Response:
        one = self._of(request)
        if one is None:
            return _missing(caller)
        may = caller.may("operator")
        targets = [name for name, peer in self.desk.node.peers.items() if peer.answers]
        offered = [name for name, act in acts.ACTS.items() if may and act.fits(one, self.desk)]
        offered = [name for name in offered if targets or not acts.ACTS[name].takes_target]
        body = sheets.story(one, self._cases(one), offered, targets, _token(request) if may else "")
        return looks.page(one.route, body, caller, room="/", live=True)

    async def act(self, request: Request, caller: Caller, said: Mapping[str, str]) -> Response:
        one, act = await run_in_threadpool(self._of, request), request.path_params["act"]
        if one is None or act not in acts.ACTS:
            return _missing(caller)
        try:
            await run_in_threadpool(acts.do, self.desk, one, act, caller.name, said.get("target", ""))
        except acts.Impossible as error:
            return _not_done(str(error), sheets.address(one), caller)
        return RedirectResponse(sheets.address(one), status_code=303)

    # what was made

    async def picture(self, request: Request, caller: Caller) -> Response:
        folder = await run_in_threadpool(self._case_folder, request)
        if folder is None:
            return PlainTextResponse("", status_code=404)
        if (folder / "overlay.png").is_file():
            return FileResponse(folder / "overlay.png", headers=looks.HEADERS)
        content = await run_in_threadpool(_picture_of, folder / "overlay.dcm")
        return Response(content, 200 if content else 404, looks.HEADERS, "image/png")

    async def leaf(self, request: Request, caller: Caller) -> Response:
        """The page of a case runs a script of its own; in its sandbox it is no part of this site."""
        folder = await run_in_threadpool(self._case_folder, request)
        if folder is None or not (folder / "page.html").is_file():
            return PlainTextResponse("", status_code=404)
        rules = {"Content-Security-Policy": "sandbox allow-scripts; frame-ancestors 'none'"}
        return FileResponse(folder / "page.html", media_type="text/html", headers={**looks.HEADERS, **rules})

    async def load(self, request: Request, caller: Caller) -> Response:
        folder, name = await run_in_threadpool(self._case_folder, request), request.path_params["name"]
        if folder is None or name not in _files(folder):
            return PlainTextResponse("", status_code=404)
        of = {"study": request.path_params["study"], "route": request.path_params["route"], "file": name}
        await self._note("download", who=caller.name, **of)
        return FileResponse(folder / name, filename=f"{folder.name}-{name}", headers=looks.HEADERS)

    def _cases(self, one: Story) -> list[sheets.Case]:
        return [
            sheets.Case(
                name=folder.name,
                has_picture=any((folder / name).is_file() for name in ("overlay.png", "overlay.dcm")),
                has_page=(folder / "page.html").is_file(),
                files=_files(folder),
            )
            for folder in self._case_folders(one)
        ]

    def _case_folders(self, one: Story) -> list[Path]:
        results = self.desk.folder(one.study, one.revision, one.route) / "results"
        return sorted(path for path in results.glob("[!.]*") if path.is_dir())

    def _case_folder(self, request: Request) -> Path | None:
        """Only what is there already is looked for: a path that somebody made up leads nowhere."""
        one = self._of(request)
        known = {folder.name: folder for folder in self._case_folders(one)} if one else {}
        return known.get(request.path_params["case"])

    def _of(self, request: Request) -> Story | None:
        of = request.path_params
        return self.desk.stories.get(of["study"], of["revision"], of["route"])

    # peers

    async def peers(self, request: Request, caller: Caller) -> Response:
        known, strangers = await run_in_threadpool(self._known)
        words = {code: reason.words for code, reason in REASONS.items()}
        body = sheets.peers(known, strangers, words, _token(request) if caller.may("operator") else "")
        return looks.page("Peers", body, caller, room="/peers", live=True)

    def _known(self) -> tuple[list[sheets.Known], dict[str, int]]:
        node, refused = self.desk.node, self.desk.ledger.refused()
        known = [
            sheets.Known(
                name=name, aet=peer.aet, place=_place(peer), is_safe=peer.tls or peer.web.startswith("https:"),
                targets_of=[route for route, how in node.routes.items() if name in how.targets],
                last=self.desk.ledger.last_from(name),
                refusals={code: count for (code, source), count in refused.items() if source == name},
                echo=self.echoes.get(name),
            )
            for name, peer in node.peers.items()
        ]  # fmt: skip
        others = Counter[str]()
        others.update({code: count for (code, source), count in refused.items() if source not in node.peers})
        return known, dict(others)

    async def call(self, request: Request, caller: Caller, said: Mapping[str, str]) -> Response:
        name = request.path_params["peer"]
        if name not in self.desk.node.peers or not self.desk.node.peers[name].answers:
            return _missing(caller)
        self.echoes[name] = datetime.now(UTC), await run_in_threadpool(self._called, name)
        await self._note("echo", who=caller.name, peer=name)
        return RedirectResponse("/peers", status_code=303)

    def _called(self, name: str) -> str:
        try:
            echo(Line.to(name, self.desk.node))
        except (PeerError, Refused) as error:
            return str(error)
        return "it answers"

    # the node itself

    async def node(self, request: Request, caller: Caller) -> Response:
        body = await run_in_threadpool(self._node, _token(request) if caller.may("operator") else "")
        return looks.page("Node", body, caller, room="/node", live=True)

    def _node(self, token: str) -> str:
        at = self.desk
        ways = [
            sheets.Way(name=name, how=how, serving=rollback.decided(at, name)) for name, how in at.node.routes.items()
        ]
        silent_s = at.node.working.silent_s
        workers = Hearts(ledger=at.ledger, silent_s=silent_s).known()
        return sheets.node(ways, shadow.summaries(at.ledger), workers, silent_s, at.spool.free_bytes(), token)

    async def roll_back(self, request: Request, caller: Caller, said: Mapping[str, str]) -> Response:
        return await self._rolled(rollback.roll_back, request, caller)

    async def roll_forward(self, request: Request, caller: Caller, said: Mapping[str, str]) -> Response:
        return await self._rolled(rollback.roll_forward, request, caller)

    async def _rolled(self, roll: Callable[..., object], request: Request, caller: Caller) -> Response:
        route = request.path_params["route"]
        if route not in self.desk.node.routes:
            return _missing(caller)
        try:
            await run_in_threadpool(roll, self.desk, route, caller.name)
        except (rollback.NothingBefore, PackageError, UsageError) as error:
            return _not_done(str(error), "/node", caller)
        return RedirectResponse("/node", status_code=303)

    # what was written down

    async def audit(self, request: Request, caller: Caller) -> Response:
        return await self._audit(request, caller, "", True)

    async def verify(self, request: Request, caller: Caller, said: Mapping[str, str]) -> Response:
        return await self._audit(request, caller, *await run_in_threadpool(self._verified))

    async def _audit(self, request: Request, caller: Caller, verdict: str, is_whole: bool) -> Response:
        lines = await run_in_threadpool(self.desk.audit.newest)
        return looks.page("Audit", sheets.audit(lines, verdict, is_whole, _token(request)), caller, room="/audit")

    def _verified(self) -> tuple[str, bool]:
        from .audit import verify

        said = verify(self.desk.node.state, self.desk.spool.keys)
        return said.broken or f"All {said.lines} lines are as they were written.", not said.broken

    async def _note(self, what: What, **facts: Any) -> None:
        await run_in_threadpool(lambda: self.desk.audit.note(what, **facts))


LARGEST_STUDY = 200
"""Stories of one study on its page: more revisions times routes than anybody has seen."""


def _seen(page: Page, role: Any = "viewer") -> Door:
    """For whoever is logged in; everybody else is asked to."""

    async def door(request: Request) -> Response:
        caller = _guard(request).person(request)
        if caller is None:
            return RedirectResponse("/login", status_code=303)
        return await page(request, caller) if caller.may(role) else _not_allowed(caller)

    return door


def _sent(page: Callable[[Request, Caller, Mapping[str, str]], Awaitable[Response]], role: Any = "viewer") -> Door:
    """For what a form of this node's own pages sends; another site has no token to bring along."""

    async def door(request: Request) -> Response:
        guard, said = _guard(request), await _form(request)
        caller = guard.person(request)
        if caller is None or not guard.sessions.is_form_of(request.cookies.get(COOKIE, ""), said.get("token", "")):
            return looks.page("Not done", '<h1>Not done</h1><p><a href="/login">Log in</a> first.</p>', status=403)
        return await page(request, caller, said) if caller.may(role) else _not_allowed(caller)

    return door


def _guard(request: Request) -> Guard:
    guard: Guard = request.app.state.guard
    return guard


def _token(request: Request) -> str:
    return _guard(request).sessions.token(request.cookies.get(COOKIE, ""))


def _not_allowed(caller: Caller) -> Response:
    words = (
        "A viewer may see studies and peers; this is for operators. Whoever writes the node's config can make you one."
    )
    return looks.page("Not allowed", f'<h1>Not allowed</h1><div class="alarm">{words}</div>', caller, status=403)


def _not_done(words: str, back: str, caller: Caller) -> Response:
    body = f'<h1>Not done</h1><div class="alarm" role="alert">{looks.text(words)}</div><p><a href="{back}">Back</a></p>'
    return looks.page("Not done", body, caller, status=409)


def _missing(caller: Caller) -> Response:
    body = '<h1>Not there</h1><p>There is no such thing here. <a href="/">All studies</a></p>'
    return looks.page("Not there", body, caller, status=404)


def _too_often(wait: float) -> Response:
    words = f"Too many wrong guesses. Try again in {looks.duration(max(60.0, wait))}."
    after = {"Retry-After": str(int(wait) + 1)}
    return looks.page("Log in", sheets.login(words, ""), status=429, headers=after)


async def _icon(request: Request) -> Response:
    return Response(looks.ICON, media_type="image/svg+xml", headers={"Cache-Control": "max-age=86400"})


async def _form(request: Request) -> dict[str, str]:
    body = b""
    try:
        async with asyncio.timeout(FORM_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > LARGEST_FORM:
                    return {}
    except (TimeoutError, ClientDisconnect):
        return {}
    return {name: values[0] for name, values in parse_qs(body.decode("utf-8", "replace")).items()}


def _place(peer: Peer) -> str:
    return peer.web or (f"{peer.host}:{peer.port}" if peer.host else "")


def _files(folder: Path) -> dict[str, int]:
    """What was made of a case, by name, with its size; what begins with a dot is not finished."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob("[!.]*")) if path.is_file()}


def _picture_of(capture: Path) -> bytes:
    """The secondary capture as PNG; empty where there is none."""
    from io import BytesIO

    import pydicom
    from PIL import Image

    if not capture.is_file():
        return b""
    data = pydicom.dcmread(capture)
    content = BytesIO()
    Image.fromarray(data.pixel_array).save(content, "PNG")
    return content.getvalue()
