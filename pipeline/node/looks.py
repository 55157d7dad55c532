"""How the pages look: one style, one script, the frame that all of them have."""

from collections.abc import Mapping
from datetime import UTC, datetime

from starlette.responses import HTMLResponse

from ..outputs._html import document, text
from .guard import Caller

STYLE = """
:root { --good: #1a7a3c; --busy: #0a5fa8; --held: #7a4dbf; --soft: #eef1f4; }
@media (prefers-color-scheme: dark) { :root { --good: #6fd08c; --busy: #7cc0ff; --held: #c3a3ff; --soft: #1d2127; } }
main { padding-top: 0; }
.top { display: flex; flex-wrap: wrap; gap: 4px 20px; align-items: center; padding: 12px 0; margin: 0 0 24px;
  border-bottom: 1px solid var(--line); }
.top .brand { font-weight: 700; font-size: 18px; color: var(--ink); text-decoration: none; letter-spacing: .02em; }
.top nav { display: flex; gap: 4px 16px; flex-wrap: wrap; }
.top nav a { color: var(--quiet); text-decoration: none; padding: 6px 2px; border-bottom: 2px solid transparent; }
.top nav a:hover { color: var(--ink); } .top nav a[aria-current] { color: var(--ink); border-color: var(--link); }
.top form { margin-left: auto; display: flex; gap: 12px; align-items: center; }
a:focus-visible, button:focus-visible, input:focus-visible, select:focus-visible, summary:focus-visible
  { outline: 2px solid var(--link); outline-offset: 2px; }
button, select, input { font: inherit; min-height: 36px; padding: 5px 12px; border: 1px solid var(--line); border-radius: 6px;
  background: var(--card); color: var(--ink); max-width: 100%; }
button { cursor: pointer; } button:hover { border-color: var(--link); }
button.main { background: var(--link); border-color: var(--link); color: var(--page); font-weight: 600; }
button.grave { color: var(--bad); }
form.login { max-width: 340px; margin: 12vh auto 0; background: var(--card); border: 1px solid var(--line); padding: 24px;
  border-radius: 8px; display: grid; gap: 14px; }
form.login label { display: grid; gap: 4px; color: var(--quiet); font-size: 13px; } form.login input { min-height: 40px; }
form.login .bad, form.login .alarm { margin: 0; } form.login p { margin: 0; font-size: 13px; }
.state { display: inline-flex; align-items: center; gap: 8px; font-weight: 600; white-space: nowrap; color: var(--busy); }
.state::before { content: ""; width: 8px; height: 8px; border-radius: 50%; background: currentColor; flex: none; }
.state.done { color: var(--good); } .state.dead, .state.silent { color: var(--bad); } .state.refused { color: var(--alarm); }
.state.held { color: var(--held); } .state.queued, .state.superseded { color: var(--quiet); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(128px, 1fr)); gap: 10px; margin: 12px 0 20px; }
.tile { display: block; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px;
  color: var(--quiet); text-decoration: none; font-size: 13px; }
.tile b { display: block; font-size: 24px; line-height: 1.25; color: var(--ink); font-variant-numeric: tabular-nums; }
a.tile:hover { border-color: var(--link); } .tile[aria-current] { border-color: var(--link); box-shadow: inset 0 0 0 1px var(--link); }
.tile.dead:not(.none) b { color: var(--bad); } .tile.refused:not(.none) b { color: var(--alarm); }
.bar { display: flex; flex-wrap: wrap; gap: 8px 20px; align-items: end; margin: 0 0 16px; }
.bar form { display: flex; flex-wrap: wrap; gap: 8px; align-items: end; } .bar .find { flex: 1 1 320px; justify-content: flex-end; }
.bar .find input { flex: 1 1 220px; max-width: 420px; }
.acts { display: flex; flex-wrap: wrap; gap: 10px; align-items: center; margin: 16px 0; }
.acts form { display: flex; gap: 6px; flex-wrap: wrap; }
.way { list-style: none; display: flex; flex-wrap: wrap; gap: 0; padding: 0; margin: 8px 0 0; background: var(--card);
  border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }
.way li { flex: 1 1 130px; padding: 10px 14px; border-right: 1px solid var(--line); margin: 0 -1px -1px 0;
  border-bottom: 1px solid var(--line); }
.way small { display: block; color: var(--quiet); font-variant-numeric: tabular-nums; }
.way li.ahead { color: var(--quiet); } .way li.now { background: var(--soft); }
.case { display: grid; grid-template-columns: minmax(0, 3fr) minmax(220px, 1fr); gap: 20px; background: var(--card);
  border: 1px solid var(--line); border-radius: 8px; padding: 16px; margin: 0 0 12px; }
.case ul { list-style: none; padding: 0; } .case li { padding: 3px 0; } .case h3 { margin: 0 0 6px; font-size: 15px; }
.crumbs { color: var(--quiet); font-size: 13px; margin: 0 0 6px; }
.pages { display: flex; gap: 16px; align-items: center; margin: 12px 0 0; color: var(--quiet); }
.empty { background: var(--card); border: 1px dashed var(--line); border-radius: 8px; padding: 28px 20px; color: var(--quiet); }
.cards { display: grid; align-items: start; grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); gap: 12px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 16px; }
.card h2 { margin: 0 0 8px; } .card dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 14px; margin: 0 0 10px; }
.card dt { color: var(--quiet); } .card dd { margin: 0; overflow-wrap: anywhere; }
h1 { margin-bottom: 12px; display: flex; flex-wrap: wrap; align-items: center; gap: 4px 16px; } h1 .state, h1 .mono { font-size: 18px; }
.good { padding: 10px 14px; border-radius: 6px; margin: 12px 0; color: var(--good); background: var(--card); border: 1px solid; }

thead tr > th { border-bottom: 1px solid var(--line) !important; }
.way li:not(.now) .state { color: var(--ink); font-weight: 400; }
.way li:not(.now) .state::before { background: var(--good); } .way li.ahead { padding-left: 30px; }
.known th { width: 200px; } .known tr > * { padding-top: 6px; padding-bottom: 6px; }
details summary { cursor: pointer; min-height: 36px; padding: 5px 12px; border: 1px solid var(--line); border-radius: 6px;
  background: var(--card); list-style: none; } details summary::-webkit-details-marker { display: none; }
details[open] { flex-basis: 100%; } details[open] summary { display: inline-block; margin-bottom: 8px; }
details p { max-width: 70ch; } summary.grave { color: var(--bad); } .refusals { padding-left: 18px; margin: 0 0 10px; font-size: 14px; }
td:first-child, th:first-child { white-space: nowrap; }
.folds .number { width: 1%; padding-left: 24px; } .folds td { overflow-wrap: break-word; } .folds td .mono { white-space: nowrap; }
 tbody tr:hover { background: var(--soft); }
time { font-variant-numeric: tabular-nums; white-space: nowrap; }
.off { display: none; } .stale .off { display: block; }
@media (max-width: 720px) {
  main { padding: 0 14px 40px; } h1 { font-size: 22px; }
  .top form { margin-left: 0; width: 100%; justify-content: space-between; }
  .case { grid-template-columns: minmax(0, 1fr); } .known th { width: 110px; }
  .tiles { grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); } .tile { padding: 8px 10px; } .tile b { font-size: 20px; }
  .bar .find { justify-content: flex-start; } .bar form { width: 100%; } .bar select, .bar .find input { flex: 1; }
  table.folds, .folds tbody, .folds tr, .folds td { display: block; } .folds thead { display: none; }
  .folds { border: 0; background: none; }
  .folds tr { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 8px 12px; margin: 0 0 8px; }
  .folds td { display: flex; gap: 12px; border: 0; padding: 3px 0; text-align: left; white-space: normal; }
  .folds td::before { content: attr(data-name); flex: 0 0 84px; color: var(--quiet); font-size: 13px; line-height: 1.7; }
  .folds td:empty { display: none; } .folds .number { width: auto; padding-left: 0; }
}
"""

SCRIPT = """
const pause = 4000;
async function look() {
  if (!document.hidden) try {
    const answer = await fetch(location.href, {cache: "no-store"});
    if (answer.redirected) return location.reload();
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const part of document.querySelectorAll("[data-live]")) {
      const now = fresh.getElementById(part.id);
      const busy = part.contains(document.activeElement) || part.querySelector("details[open]");
      if (now && !busy && now.innerHTML !== part.innerHTML) part.innerHTML = now.innerHTML;
    }
    document.body.classList.toggle("stale", !answer.ok);
  } catch { document.body.classList.add("stale"); }
  setTimeout(look, pause);
}
setTimeout(look, pause);
"""
"""Every few seconds what changed is put in its place: nobody loses what is typed or how far the page is scrolled."""

HEADERS = {
    "Cache-Control": "no-store",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Content-Security-Policy": "frame-ancestors 'none'",  # the one rule that a page cannot give itself
}

ROOMS = {"/": "Studies", "/peers": "Peers", "/node": "Node", "/audit": "Audit"}

ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="16" height="16" rx="4" fill="#0a5fa8"/>'
    '<path d="M4 3v10M4 8.5c0-3 6-3 6 0V13" fill="none" stroke="#fff" stroke-width="2" stroke-linecap="round"/></svg>'
)


def page(
    title: str, body: str, caller: Caller | None = None, *, room: str = "", live: bool = False, status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> HTMLResponse:  # fmt: skip
    """A whole page, with the way to the others for whoever is logged in."""
    stale = '<div class="off alarm" role="status">The node does not answer; what is shown here is old.</div>'
    whole = document(
        f"{title} · hilum" if title else "hilum",
        (_top(caller, room) + stale if caller else "") + body,
        style=STYLE,
        script=SCRIPT if live else "",
        pictures="'self'",
        forms="'self'",
        calls="'self'" if live else "",
    )
    return HTMLResponse(whole, status, {**HEADERS, **(headers or {})})


def _top(caller: Caller, room: str) -> str:
    ways = "".join(
        f'<a href="{place}"{" aria-current=page" if place == room else ""}>{name}</a>'
        for place, name in ROOMS.items()
        if place != "/audit" or caller.may("operator")
    )
    return (
        f'<header class="top"><a class="brand" href="/">hilum</a><nav>{ways}</nav>'
        f'<form method="post" action="/logout"><span class="quiet">{text(caller.name)}, {caller.role}</span>'
        "<button>Log out</button></form></header>"
    )


def moment(at: datetime | float) -> str:
    """By the node's clock, in the node's time zone; the day where it is not today, the year where it is another."""
    here, now = (datetime.fromtimestamp(at, UTC) if isinstance(at, (int, float)) else at).astimezone(), datetime.now()
    words = f"{here:%H:%M:%S}" if here.date() == now.date() else f"{here:%d %b %H:%M}"
    words = words if here.year == now.year else f"{here:%d %b %Y %H:%M}"
    return f'<time datetime="{here.isoformat(timespec="seconds")}">{words}</time>'


def zone() -> str:
    """What the node's time zone is called."""
    return text(datetime.now().astimezone().tzname() or "local")


def duration(seconds: float) -> str:
    """Its two largest units."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, name, below, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit:
            rest = whole % unit // below
            return f"{whole // unit} {name}" + (f" {rest} {part}" if rest else "")
    return f"{whole} s"


def size(count: float) -> str:
    """Bytes, to be read."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1000
    return ""


def state(word: str) -> str:
    """A state, with its colour and its dot."""
    return f'<span class="state {text(word)}">{text(NAMES.get(word, word))}</span>'


NAMES = {"dead": "dead letter", "choosing": "choosing series"}
"""What states are called where their own word would say too little."""


def table(heads: list[str], rows: list[list[str]], numbers: frozenset[int] = frozenset()) -> str:
    """Cells are HTML already; on a narrow screen each row is a card that names its cells."""
    head = "".join(f"<th{' class=number' if n in numbers else ''}>{name}</th>" for n, name in enumerate(heads))
    body = "".join(
        "<tr>"
        + "".join(
            f'<td data-name="{heads[n]}"{" class=number" if n in numbers else ""}>{cell}</td>'
            for n, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table class="folds"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def asked_twice(label: str, words: str, form: str, kind: str = "") -> str:
    """A form behind a sentence that says what it does; `words` are text."""
    name = f' class="{kind}"' if kind else ""
    return f"<details><summary{name}>{text(label)}…</summary><p>{text(words)}</p>{form}</details>"


def button(address: str, label: str, token: str, *, kind: str = "", more: str = "") -> str:
    """A form of one button, which no other site can send."""
    name = f' class="{kind}"' if kind else ""
    return (
        f'<form method="post" action="{address}"><input type="hidden" name="token" value="{text(token)}">{more}'
        f"<button{name}>{text(label)}</button></form>"
    )
