"""HTML that needs nothing but itself: no server, no network, no script but those whose hashes it names."""

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #16191d; --quiet: #5c6670; --line: #dde1e6;
  --alarm: #9a5b00; --alarm-page: #fff6e5; --bad: #a4201b; --bad-page: #fdeeee; --link: #0a5fa8; }
@media (prefers-color-scheme: dark) { :root { --page: #0c0e11; --card: #15181d; --ink: #eef1f4; --quiet: #9aa3ad;
  --line: #2a2f36; --alarm: #f0b429; --alarm-page: #241c0b; --bad: #ff8f87; --bad-page: #2a1414; --link: #7cc0ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 24px 48px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 32px 0 8px; }
p { margin: 0 0 8px; }
a { color: var(--link); }
img { display: block; max-width: 100%; height: auto; border-radius: 6px; background: #000; }
ul { margin: 0; padding-left: 20px; }
table { width: 100%; border-collapse: collapse; background: var(--card); border: 1px solid var(--line); }
th, td { padding: 8px 12px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--quiet); white-space: nowrap; }
tr:last-child > td, tr:last-child > th { border-bottom: 0; }
.wide { overflow-x: auto; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.quiet { color: var(--quiet); }
.word { overflow-wrap: anywhere; }
.alarm, .bad { padding: 10px 14px; border-radius: 6px; margin: 12px 0; overflow-wrap: anywhere; }
.alarm { color: var(--alarm); background: var(--alarm-page); }
.bad { color: var(--bad); background: var(--bad-page); }
.swatch { width: 12px; height: 12px; margin-right: 8px; vertical-align: -1px; }
.mono { font-family: ui-monospace, monospace; font-size: 13px; overflow-wrap: anywhere; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 0 24px; }
footer { margin-top: 32px; padding-top: 12px; border-top: 1px solid var(--line); color: var(--quiet); font-size: 13px; }
@media print { main { padding: 0; } table, img { break-inside: avoid; } }
"""


def document(
    title: str,
    body: str,
    *,
    style: str = "",
    script: str = "",
    pictures: str = "data:",
    data: str = "",
    trusted: Sequence[str] = (),
    forms: str = "'none'",
    calls: str = "",
) -> str:
    """A whole page. `body` is HTML already; `pictures` says where images may come from; `data` are blocks of `as_data`,
    and `trusted` scripts that `script` may take out of them; `forms` says where what is filled in may go, and `calls` whom
    the script may ask."""
    style = STYLE + style
    policy = (
        f"default-src 'none'; img-src {pictures}; style-src {_hash(style)}; "
        f"script-src {' '.join(map(_hash, (script, *trusted)))}; base-uri 'none'; form-action {forms}"
        + (f"; connect-src {calls}" if calls else "")
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n{data}"
        + (f"<script>{script}</script>\n" if script else "")
        + "</body>\n</html>\n"
    )


def as_data(name: str, content: str, kind: str = "text/plain") -> str:
    """A block that a script reads and that never runs. In JSON alone, where a < can occur, it is written otherwise."""
    inert = content.replace("<", "\\u003c")
    return f'<script type="{kind}" id="{name}">{inert}</script>\n'


def _hash(content: str) -> str:
    """Only this very text may run or style; anything smuggled in may not."""
    if not content:
        return "'none'"
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def text(value: Any) -> str:
    """Anything, as text that can be no markup."""
    return escape(str(value), quote=True)


def swatch(colour: tuple[int, int, int]) -> str:
    """A square of colour. An SVG attribute, for the policy allows no inline style."""
    red, green, blue = (int(each) for each in colour)
    square = f'<rect width="1" height="1" rx=".2" fill="rgb({red},{green},{blue})"/>'
    return f'<svg class="swatch" viewBox="0 0 1 1">{square}</svg>'


def listed(items: tuple[str, ...], kind: str) -> str:
    """A box of sentences; nothing where there are none."""
    if not items:
        return ""
    sentences = "".join(f"<li>{text(item)}</li>" for item in items)
    return f'<div class="{kind}"><ul>{sentences}</ul></div>'


def pairs(rows: list[tuple[str, str]]) -> str:
    """A table of names and values; values are HTML already."""
    cells = "".join(f'<tr><th>{text(name)}</th><td class="word">{value}</td></tr>' for name, value in rows)
    return f"<table>{cells}</table>"


def slider(name: str, words: str, least: float, most: float, step: float, value: float) -> str:
    """A number to be drawn along."""
    span = f'min="{least:g}" max="{most:g}" step="{step:g}" value="{value:g}"'
    return f'<label>{words}<input type="range" id="{name}" {span}></label>'
