"""The status page: studies with their state, reasons and pictures, for those who may see them; metrics and health for machines."""

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route as Place

from ..outputs._html import document, pairs, text
from .access import NOBODY, SESSION_SECONDS, Sessions, User, is_right
from .config import GB
from .stories import ENDED, Story
from .watcher import retry
from .workflow import Desk

COOKIE = "hilum"
STYLE = """
nav { display: flex; gap: 16px; align-items: baseline; margin: 0 0 16px; } nav form { margin-left: auto; }
form.login { max-width: 340px; margin: 12vh auto 0; background: var(--card); border: 1px solid var(--line); padding: 24px;
  border-radius: 8px; display: grid; gap: 12px; }
label { display: grid; gap: 4px; color: var(--quiet); font-size: 13px; }
input { font: inherit; padding: 8px 10px; border: 1px solid var(--line); border-radius: 6px; color: var(--ink);
  background: var(--page); }
button { font: inherit; padding: 8px 14px; border: 1px solid var(--line); border-radius: 6px; cursor: pointer;
  background: var(--card); color: var(--ink); }
.state { font-weight: 600; } .dead, .refused { color: var(--bad); } .done { color: var(--link); }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 0 0 16px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 16px; min-width: 120px; }
.tile b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; }
"""
LARGEST_FORM = 4096
"""Bytes of a form: a name, a password, a token."""


class Pages:
    """All pages of a node, over one desk."""

    def __init__(self, desk: Desk, users: Mapping[str, User]) -> None:
        self.desk, self.users = desk, users
        self.sessions = Sessions(desk.spool.keys.secret)

    def app(self) -> Starlette:
        """As a server runs it."""
        return Starlette(
            routes=[
                Place("/", self.overview),
                Place("/login", self.login, methods=["GET", "POST"]),
                Place("/logout", self.logout, methods=["POST"]),
                Place("/story/{study}/{revision:int}/{route}", self.story),
                Place("/story/{study}/{revision:int}/{route}/retry", self.retry, methods=["POST"]),
                Place("/story/{study}/{revision:int}/{route}/{case}.png", self.picture),
                Place("/metrics", self.metrics),
                Place("/health/live", self.live),
                Place("/health/ready", self.ready),
            ]
        )

    # for people

    async def login(self, request: Request) -> Response:
        if request.method == "GET":
            return _page("hilum: log in", _login_form(""))
        said = await _form(request)
        name = said.get("name", "")
        user = self.users.get(name)
        right = await run_in_threadpool(is_right, said.get("password", ""), user.password if user else NOBODY)
        if not user or not right:
            return _page("hilum: log in", _login_form("No user has that name and password."), status=403)
        answer = RedirectResponse("/", status_code=303)
        answer.set_cookie(
            COOKIE, self.sessions.begin(name), max_age=SESSION_SECONDS, httponly=True, samesite="strict",
            secure=request.url.scheme == "https",
        )  # fmt: skip
        return answer

    async def logout(self, request: Request) -> Response:
        answer = RedirectResponse("/login", status_code=303)
        answer.delete_cookie(COOKIE)
        return answer

    async def overview(self, request: Request) -> Response:
        if not (user := self._user(request)):
            return RedirectResponse("/login", status_code=303)
        stories, waiting = await run_in_threadpool(self._known)
        return _page("hilum", f"{_head(user)}<h1>Studies</h1>{_tiles(stories, waiting)}{_table(stories)}")

    async def story(self, request: Request) -> Response:
        if not (user := self._user(request)):
            return RedirectResponse("/login", status_code=303)
        found = await run_in_threadpool(self._story, request)
        if found is None:
            return _page("hilum", f"{_head(user)}<p>There is no such story.</p>", status=404)
        token = self.sessions.token(request.cookies.get(COOKIE, "")) if self.users[user].role == "operator" else ""
        return _page(f"hilum: {found.route}", _head(user) + _told(found, self._cases(found), token))

    async def retry(self, request: Request) -> Response:
        user, cookie = self._user(request), request.cookies.get(COOKIE, "")
        said = await _form(request)
        if not user or not self.sessions.is_form_of(cookie, said.get("token", "")):
            return _page("hilum", "<p>Log in first.</p>", status=403)
        if self.users[user].role != "operator":
            return _page(
                "hilum", f"{_head(user)}<p>A viewer may not begin stories anew; an operator may.</p>", status=403
            )
        found = await run_in_threadpool(self._story, request)
        if found is None or found.state not in ENDED or found.route not in self.desk.node.routes:
            return _page("hilum", f"{_head(user)}<p>Only a story that ended can be begun anew.</p>", status=409)
        await run_in_threadpool(retry, found, self.desk)
        return RedirectResponse(_address(found), status_code=303)

    async def picture(self, request: Request) -> Response:
        if not self._user(request):
            return PlainTextResponse("", status_code=403)
        found = await run_in_threadpool(self._story, request)
        case = request.path_params["case"]
        if found is None or case not in self._cases(found):
            return PlainTextResponse("", status_code=404)
        return FileResponse(self._results(found) / case / "overlay.png", headers={"Cache-Control": "no-store"})

    # for machines: nothing here tells of a patient

    async def live(self, request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def ready(self, request: Request) -> Response:
        """Whether a study that is sent now would be taken and worked on."""
        reason = await run_in_threadpool(self._not_ready)
        return PlainTextResponse(f"{reason}\n" if reason else "ok\n", status_code=503 if reason else 200)

    async def metrics(self, request: Request) -> Response:
        told = await run_in_threadpool(self._metrics)
        return PlainTextResponse(told, media_type="text/plain; version=0.0.4")

    def _not_ready(self) -> str:
        try:
            self.desk.stories.counts()
        except Exception:  # whatever a database raises: the page must answer
            return "the ledger does not answer"
        free = self.desk.spool.free_bytes()
        return "the disk is down to its reserve" if free < self.desk.node.receiving.reserve_gb * GB else ""

    def _metrics(self) -> str:
        counts, unended = self.desk.stories.counts(), self.desk.stories.unended()
        oldest = max((time.time() - story.began.timestamp() for story in unended), default=0.0)
        lines = [
            "# HELP hilum_stories Stories by state, and by reason where they ended without a result.",
            "# TYPE hilum_stories gauge",
            *(f'hilum_stories{{state="{state}",code="{code}"}} {count}' for (state, code), count in sorted(counts.items())),
            "# HELP hilum_queue_depth Stories that have not ended.",
            "# TYPE hilum_queue_depth gauge",
            f"hilum_queue_depth {len(unended)}",
            "# HELP hilum_queue_oldest_seconds Age of the oldest story that has not ended.",
            "# TYPE hilum_queue_oldest_seconds gauge",
            f"hilum_queue_oldest_seconds {oldest:.1f}",
            "# HELP hilum_studies_waiting Studies of which something came that no revision holds yet.",
            "# TYPE hilum_studies_waiting gauge",
            f"hilum_studies_waiting {len(self.desk.ledger.waiting())}",
            "# HELP hilum_refusals_total What peers were refused, by reason.",
            "# TYPE hilum_refusals_total counter",
            *(f'hilum_refusals_total{{code="{code}",source="{_escaped(source)}"}} {count}'
              for (code, source), count in sorted(self.desk.ledger.refused().items())),
            "# HELP hilum_disk_free_bytes What is free on the spool's disk.",
            "# TYPE hilum_disk_free_bytes gauge",
            f"hilum_disk_free_bytes {self.desk.spool.free_bytes()}",
        ]  # fmt: skip
        return "\n".join(lines) + "\n"

    # what is known

    def _user(self, request: Request) -> str:
        name = self.sessions.whose(request.cookies.get(COOKIE, ""))
        return name if name in self.users else ""

    def _known(self) -> tuple[list[Story], int]:
        return self.desk.stories.all(), len(self.desk.ledger.waiting())

    def _story(self, request: Request) -> Story | None:
        of = request.path_params
        return self.desk.stories.get(of["study"], of["revision"], of["route"])

    def _results(self, story: Story) -> Path:
        return self.desk.folder(story.study, story.revision, story.route) / "results"

    def _cases(self, story: Story) -> list[str]:
        """Cases that have a picture."""
        return sorted(path.parent.name for path in self._results(story).glob("[!.]*/overlay.png"))


async def _form(request: Request) -> dict[str, str]:
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > LARGEST_FORM:
            return {}
    return {name: values[0] for name, values in parse_qs(body.decode("utf-8", "replace")).items()}


def _escaped(word: str) -> str:
    return word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")


def _page(title: str, body: str, status: int = 200) -> HTMLResponse:
    whole = document(title, body, style=STYLE, pictures="'self'", forms="'self'")
    return HTMLResponse(
        whole, status, {"Cache-Control": "no-store", "X-Frame-Options": "DENY", "X-Content-Type-Options": "nosniff"}
    )


def _login_form(said: str) -> str:
    alarm = f'<div class="bad" role="alert">{text(said)}</div>' if said else ""
    return (
        f'<form class="login" method="post" action="/login"><h1>hilum</h1>{alarm}'
        '<label>Name<input name="name" autocomplete="username" required autofocus></label>'
        '<label>Password<input name="password" type="password" autocomplete="current-password" required></label>'
        "<button>Log in</button></form>"
    )


def _head(user: str) -> str:
    return (
        f'<nav><a href="/">Studies</a><form method="post" action="/logout"><span class="quiet">{text(user)}</span> '
        "<button>Log out</button></form></nav>"
    )


def _tiles(stories: Sequence[Story], waiting: int) -> str:
    count = {
        "waiting for more": waiting,
        "under way": sum(story.state not in ENDED for story in stories),
        "done": sum(story.state == "done" for story in stories),
        "refused": sum(story.state == "refused" for story in stories),
        "dead letters": sum(story.state == "dead" for story in stories),
    }
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{n}</b>{name}</div>' for name, n in count.items())
        + "</div>"
    )


def _table(stories: Sequence[Story]) -> str:
    if not stories:
        return "<p class=quiet>No study has been whole yet. Send one, or look at the peers in the config.</p>"
    rows = "".join(
        f'<tr><td><a href="{_address(story)}" class="mono">{story.study[:10]}</a></td><td class="number">{story.revision}</td>'
        f'<td>{text(story.route)}</td><td class="state {story.state}">{story.state}</td>'
        f'<td class="word">{text(story.words)}</td><td class="quiet">{_moment(story.changed)}</td></tr>'
        for story in stories
    )
    head = "".join(f"<th>{name}</th>" for name in ("study", "revision", "route", "state", "why", "changed (UTC)"))
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _told(story: Story, cases: Sequence[str], token: str) -> str:
    facts = [
        ("study", f'<span class="mono">{story.study}</span>'),
        ("revision", str(story.revision)),
        ("route", text(story.route)),
        ("state", f'<span class="state {story.state}">{story.state}</span>'),
        *([("why", text(story.words))] if story.words else []),
        *([("not whole", text(story.facts["incomplete"]))] if "incomplete" in story.facts else []),
        *((f"sent to {target}", f"{one['stored']} objects") for target, one in story.facts.get("sent", {}).items()),
        *((f"kept by {target}", "proven: it was asked") for target in story.facts.get("proven", {})),
        ("began (UTC)", _moment(story.began)),
        ("changed (UTC)", _moment(story.changed)),
        ("begun", "once" if story.attempt == 1 else f"{story.attempt} times"),
    ]
    pictures = "".join(
        f'<h2>{text(case)}</h2><img alt="What was found in {text(case)}" src="{_address(story)}/{text(case)}.png">'
        for case in cases
    )
    return f"<h1>{text(story.route)}</h1>{pairs(facts)}{_button(story, token)}{_series(story)}{pictures}"


def _button(story: Story, token: str) -> str:
    if not token or story.state not in ENDED:
        return ""
    return (
        f'<p></p><form method="post" action="{_address(story)}/retry"><input type="hidden" name="token" value="{token}">'
        "<button>Begin anew</button></form>"
    )


def _series(story: Story) -> str:
    """Every series of the study: taken, or why not."""
    taken = [(one, "taken") for case in story.facts.get("chosen", []) for one in case]
    left = [(one, one["why_not"]) for one in story.facts.get("why_not", [])]
    if not taken and not left:
        return ""
    rows = "".join(
        f'<tr><td class="mono">{text(one["series"][:10])}</td><td>{text(one["modality"])}</td><td class="number">{one["slices"]}</td>'
        f'<td>{text(one["direction"])}</td><td class="number">{_distance(one["distance_mm"])}</td><td class="word">{text(said)}</td></tr>'
        for one, said in [*taken, *left]
    )
    head = "".join(
        f"<th>{name}</th>" for name in ("series", "modality", "slices", "direction", "mm apart", "taken, or why not")
    )
    return f'<h2>Series</h2><div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _distance(mm: Any) -> str:
    return "" if mm is None else f"{mm:.2f}"


def _address(story: Story) -> str:
    return f"/story/{text(story.study)}/{story.revision}/{text(story.route)}"


def _moment(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S}"
