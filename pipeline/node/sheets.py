"""What each page says: values in, HTML out. Nothing here asks a row, a file or a peer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

from ..outputs._html import pairs, text
from .acts import ACTS, Wish
from .heart import Worker
from .looks import asked_twice, button, duration, moment, size, state, table, zone
from .nouns import Study
from .rollback import Serving, Version
from .routes import Route
from .shadow import Summary
from .stories import ENDED, Story
from .timings import spent

GROUPS: dict[str, tuple[str, ...]] = {
    "queued": ("queued",),
    "under way": ("choosing", "segmenting", "sending", "confirming"),
    "held": ("held",),
    "done": ("done",),
    "refused": ("refused",),
    "dead letters": ("dead",),
    "superseded": ("superseded",),
}
"""States, as the tiles sum them up."""
AT_ONCE = 50
"""Stories on a page: two screens of a desk's monitor."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The stories that somebody asked to see."""

    stories: Sequence[Story]
    count: int
    """How many there are of that kind, on all pages."""
    sums: Mapping[str, int]
    """Stories by group."""
    arriving: Sequence[Study]
    group: str = ""
    route: str = ""
    number: int = 1
    """Of the page."""
    routes: Sequence[str] = ()
    alarm: str = ""
    """Why the node is not ready."""

    def address(self, **other: Any) -> str:
        """Of another page of them."""
        said = {"group": self.group, "route": self.route} | other
        words = urlencode({name: value for name, value in said.items() if value})
        return f"/?{words}" if words else "/"


def overview(listing: Listing, token: str) -> str:
    """All stories: how many of which kind, and the newest of those that were asked for."""
    alarm = f'<div class="bad" role="alert">Not ready: {text(listing.alarm)}.</div>' if listing.alarm else ""
    return (
        f'<h1>Studies</h1><div id="sums" data-live>{alarm}{_tiles(listing)}</div>{_bar(listing, token)}'
        f'<div id="list" data-live>{_arriving(listing)}{_stories(listing)}{_pages(listing)}</div>'
    )


def _tiles(listing: Listing) -> str:
    tiles = [f'<div class="tile"><b>{len(listing.arriving)}</b>arriving</div>']
    for name in GROUPS:
        count, chosen = listing.sums.get(name, 0), name == listing.group
        if count or chosen or name not in ("held", "superseded"):
            address = listing.address(group="" if chosen else name)
            kind = f"{GROUPS[name][0]}{'' if count else ' none'}"
            here = " aria-current=true" if chosen else ""
            tiles.append(f'<a class="tile {kind}" href="{text(address)}"{here}><b>{count}</b>{name}</a>')
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _bar(listing: Listing, token: str) -> str:
    choices = "".join(
        f'<option value="{text(name)}"{" selected" if name == listing.route else ""}>{text(name or "all routes")}</option>'
        for name in ("", *listing.routes)
    )
    group = f'<input type="hidden" name="group" value="{text(listing.group)}">' if listing.group else ""
    return (
        f'<div class="bar"><form action="/">{group}<select name="route" aria-label="Route">{choices}</select>'
        '<button>Show</button></form><form class="find" method="post" action="/find">'
        f'<input type="hidden" name="token" value="{text(token)}"><input name="uid" autocomplete="off" '
        'aria-label="Study Instance UID" placeholder="Study Instance UID"><button>Find</button></form></div>'
    )


def _arriving(listing: Listing) -> str:
    if not listing.arriving or listing.group or listing.route or listing.number > 1:
        return ""
    rows = [[_study_link(one.study), str(one.objects), str(len(one.series)), moment(one.first), moment(one.last)]
            for one in listing.arriving[:ARRIVING]]  # fmt: skip
    more = (
        f'<p class="quiet">and {len(listing.arriving) - ARRIVING} more</p>' if len(listing.arriving) > ARRIVING else ""
    )
    heads = ["study", "objects", "series", f"first ({zone()})", "last"]
    return f"<h2>Arriving</h2>{table(heads, rows, frozenset({1, 2}))}{more}<h2>Whole</h2>"


ARRIVING = 10
"""Studies that are not whole yet, before the rest is summed up."""


def _stories(listing: Listing) -> str:
    if not listing.stories:
        words = "No story is of that kind." if listing.group or listing.route else NOTHING
        return f'<div class="empty">{words}</div>'
    rows = [
        [state(one.state), f'<a class="mono" href="{address(one)}">{one.study[:10]}</a>', _revision(one), text(one.route),
         _why(one), moment(one.began), moment(one.changed)]
        for one in listing.stories
    ]  # fmt: skip
    return table(["state", "study", "revision", "route", "why", f"began ({zone()})", "changed"], rows, frozenset({2}))


NOTHING = "No study has been whole yet. Send one; whether peers are heard says <a href=/peers>Peers</a>."


def _revision(story: Story) -> str:
    return str(story.revision) + (f" · try {story.attempt}" if story.attempt > 1 else "")


def _why(story: Story) -> str:
    if story.words:
        return text(story.words)
    tried = max((int(one.get("tried", 0)) for one in _tries(story).values()), default=0)
    return f'<span class="quiet">tried {tried} times</span>' if tried > 1 and story.state not in ENDED else ""


def _tries(story: Story) -> Mapping[str, Mapping[str, Any]]:
    found: Mapping[str, Mapping[str, Any]] = story.facts.get("tries", {})
    return found


def _pages(listing: Listing) -> str:
    last = max(1, -(-listing.count // AT_ONCE))
    if last == 1:
        return ""
    first = (listing.number - 1) * AT_ONCE + 1
    newer = f'<a href="{text(listing.address(page=listing.number - 1))}">newer</a>' if listing.number > 1 else ""
    older = f'<a href="{text(listing.address(page=listing.number + 1))}">older</a>' if listing.number < last else ""
    words = f"{first} to {min(first + AT_ONCE - 1, listing.count)} of {listing.count}"
    return f'<div class="pages">{newer}<span>{words}</span>{older}</div>'


# one story


@dataclass(frozen=True, kw_only=True)
class Case:
    """What was made of one case."""

    name: str
    has_picture: bool = False
    has_page: bool = False
    files: Mapping[str, int] = field(default_factory=dict)
    """Their sizes in bytes, by name."""


def story(one: Story, cases: Sequence[Case], acts: Sequence[Wish], targets: Sequence[str], token: str) -> str:
    """Everything that is known of a story. `acts` are what this person may do to it now; `targets`, where it can be sent."""
    return (
        f'<p class="crumbs"><a href="/">Studies</a> › <a class="mono" href="/study/{one.study}">{one.study}</a></p>'
        f'<div id="story" data-live><h1>{text(one.route)} {state(one.state)}</h1>{_alarms(one)}'
        f"{_acts(one, acts, targets, token)}{_way(one)}</div>"
        f'<div id="cases" data-live>{_cases(one, cases, bool(token))}{_targets(one)}{_series(one)}{_shadow(one)}</div>'
        f'<div id="facts" data-live>{_facts(one)}{_done_by_people(one)}</div>'
    )


def _alarms(one: Story) -> str:
    kind = {"dead": "bad", "refused": "alarm"}.get(one.state, "alarm")
    is_told_below = one.state == "superseded" and "superseded_by" in one.facts
    said = f'<div class="{kind}" role="alert">{text(one.words)}</div>' if one.words and not is_told_below else ""
    if "incomplete" in one.facts:
        said += f'<div class="alarm">Not whole: {text(one.facts["incomplete"])}.</div>'
    if newer := one.facts.get("superseded_by"):
        place = f"/story/{one.study}/{newer}/{text(one.route)}"
        said += f'<div class="alarm">Later objects made <a href="{place}">revision {int(newer)}</a>, which supersedes this one.</div>'
    return said


def _acts(one: Story, acts: Sequence[Wish], targets: Sequence[str], token: str) -> str:
    forms = []
    for act in acts:
        more, kind = "", "main" if (one.state, act) in MAIN else "grave" if ACTS[act].sure else ""
        if ACTS[act].takes_target:
            choices = "".join(f'<option value="{text(name)}">to {text(name)}</option>' for name in targets)
            more = f'<select name="target" aria-label="Target">{choices}</select>'
        form = button(f"{address(one)}/{act}", ACTS[act].label, token, kind=kind, more=more)
        forms.append(asked_twice(ACTS[act].label, ACTS[act].sure, form, "grave") if ACTS[act].sure else form)
    return f'<div class="acts">{"".join(forms)}</div>' if forms else ""


MAIN = {("dead", "retry"), ("held", "resume")}
"""What somebody who looks at such a story came for."""

WAY = ("queued", "choosing", "segmenting", "sending", "confirming")
"""What a story goes through, if nothing is in its way."""


def _way(one: Story) -> str:
    """Where it was when, and what is ahead of it."""
    steps = _steps(one)
    items = [
        f"<li{' class=now' if n == len(steps) - 1 else ''}>{state(word)}<small>{moment(at)}</small>"
        f"<small>{'' if spent is None else 'for ' + duration(spent)}</small></li>"
        for n, (word, at, spent) in enumerate(steps)
    ]
    if one.state in WAY:
        items += [f'<li class="ahead">{word}</li>' for word in (*WAY[WAY.index(one.state) + 1 :], "done")]
    return f'<h2>The way so far <span class="quiet">({zone()})</span></h2><ol class="way">{"".join(items)}</ol>'


def _steps(one: Story) -> list[tuple[str, float, float | None]]:
    """Of this attempt: state, when it came into it, how long that lasted; None of the last."""
    moments = one.facts.get("moments") or [{"state": one.state, "at": one.changed.timestamp()}]
    lasted = [seconds for _, seconds in spent(moments)]
    now = moments[len(moments) - len(lasted) - 1 :]
    return [(said["state"], said["at"], time) for said, time in zip(now, [*lasted, None], strict=True)]


def _facts(one: Story) -> str:
    rows = [
        ("study", f'<a class="mono" href="/study/{one.study}">{one.study}</a>'),
        ("revision", str(one.revision)),
        ("begun", "once" if one.attempt == 1 else f"{one.attempt} times"),
        *([("code", f'<span class="mono">{text(one.code)}</span>')] if one.code else []),
        *_known_facts(one),
        *((f"case {case}", text(_tried(said))) for case, said in _tries(one).items()),
    ]
    return f'<h2>What is known</h2><div class="known">{pairs(rows)}</div>'


def _known_facts(one: Story) -> list[tuple[str, str]]:
    """What steps noted, as HTML."""
    facts, said = one.facts, list[tuple[str, str]]()
    if package := facts.get("package"):
        said.append(("package", f'{text(package["name"])} <span class="mono">{text(package["id"][:12])}</span>'))
    if seg := facts.get("seg"):
        why = "; ".join(f"{target}: {words}" for target, words in seg["why"].items())
        said.append(("SEG", text(f"{seg['kind']} ({why})")))
    if made := facts.get("as_before"):
        place = f"/story/{one.study}/{int(made)}/{text(one.route)}"
        said.append(
            ("results", f'<a href="{place}">those of revision {int(made)}</a>: what came since changes nothing here')
        )
    if "without_dicom" in facts:
        said.append(("without DICOM", text(f"of the route's outputs: {', '.join(facts['without_dicom'])}")))
    return said


def _shadow(one: Story) -> str:
    """What another package, whose results nobody gets, found in the same scans."""
    if not (shadow := one.facts.get("shadow")):
        return ""
    rows = [
        [text(label["label"]), _share(label["dice"]), f"{label['volume_ml']:.1f}",
         f"{label['shadow_ml']:.1f}", str(label["scan"])]
        for label in shadow["labels"]
    ]  # fmt: skip
    said = f"{text(shadow['name'])} <span class=mono>{text(shadow['package'][:12])}</span>: {text(_tried(shadow))}"
    heads = ["label", "Dice", "ml", "ml of the shadow", "scan"]
    listed = table(heads, rows, frozenset({1, 2, 3, 4})) if rows else ""
    return f"<h2>Shadow package</h2><p>{said}. Its results are compared and never sent.</p>{listed}"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_plain(one)}" for name, one in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _tried(said: Mapping[str, Any]) -> str:
    return " ".join(str(said[name]) for name in ("status", "code") if said.get(name))


KEPT = {
    "read_back": "yes: it was asked what it has",
    "commitment": "yes: it vouched for them",
    "none": "it was not asked",
}
"""By the proof that a route wants."""


def _targets(one: Story) -> str:
    sent, proven = one.facts.get("sent", {}), one.facts.get("proven", {})
    rows = [
        [text(name), str(said.get("stored", 0)), str(said.get("unwanted", 0)), KEPT.get(proven.get(name, ""), "")]
        for name, said in sent.items()
    ]  # fmt: skip
    return f"<h2>Sent</h2>{table(['target', 'stored', 'not taken', 'kept'], rows, frozenset({1, 2}))}" if rows else ""


def _cases(one: Story, cases: Sequence[Case], may_load: bool) -> str:
    return f"<h2>Results</h2>{''.join(_case(one, case, may_load) for case in cases)}" if cases else ""


def _case(one: Story, case: Case, may_load: bool) -> str:
    place = f"{address(one)}/cases/{text(case.name)}"
    picture = (
        f'<a href="{place}/picture.png"><img alt="What was found in {text(case.name)}" src="{place}/picture.png"></a>'
        if case.has_picture
        else '<p class="quiet">There is no picture; add overlay or secondary_capture to the outputs of the route.</p>'
    )
    view = f'<p><a href="{place}/page.html">Leaf through it</a></p>' if case.has_page else ""
    files = "".join(
        f'<li><a href="{place}/files/{text(name)}">{text(name)}</a> <span class="quiet">{size(count)}</span></li>'
        for name, count in case.files.items()
    )
    listed = f"<ul>{files}</ul>" if may_load else f'<p class="quiet">{len(case.files)} files</p>'
    return f'<div class="case"><div>{picture}</div><div><h3>{text(case.name)}</h3>{view}{listed}</div></div>'


def _series(one: Story) -> str:
    """Every series of the study: taken, or why not."""
    taken = [(said, "taken") for case in one.facts.get("chosen", []) for said in case]
    left = [(said, said["why_not"]) for said in one.facts.get("why_not", [])]
    rows = [
        [f'<span class="mono">{text(said["series"][:10])}</span>', text(said["modality"]), str(said["slices"]), text(said["direction"]),
         _distance(said["distance_mm"]), text(why)]
        for said, why in [*taken, *left]
    ]  # fmt: skip
    heads = ["series", "modality", "slices", "direction", "mm apart", "taken, or why not"]
    return f"<h2>Series</h2>{table(heads, rows, frozenset({2, 4}))}" if rows else ""


def _distance(mm: float | None) -> str:
    return "" if mm is None else f"{mm:.2f}"


def _done_by_people(one: Story) -> str:
    rows = [
        [moment(float(act["at"])), text(act["who"]), text(ACTS[act["act"]].label.lower() if act["act"] in ACTS else act["act"]),
         text(act.get("target", "")), text(act["was"])]
        for act in reversed(one.facts.get("acts", []))
    ]  # fmt: skip
    return (
        f"<h2>Done by people</h2>{table([f'when ({zone()})', 'who', 'what', 'target', 'it was'], rows)}" if rows else ""
    )


def address(one: Story) -> str:
    """Of a story's page."""
    return f"/story/{text(one.study)}/{one.revision}/{text(one.route)}"


# one study


def study(key: str, known: Study | None, stories: Sequence[Story]) -> str:
    """What came of a study, and all that became of it."""
    came = "" if known is None else pairs([
        ("objects", str(known.objects)), ("series", str(len(known.series))), ("revisions", str(known.revision)),
        (f"first object ({zone()})", moment(known.first)), ("last object", moment(known.last)),
        *([("arriving", "something came that no revision holds yet")] if known.objects > known.frozen else []),
    ])  # fmt: skip
    rows = [
        [
            state(one.state),
            f'<a href="{address(one)}">{text(one.route)}</a>',
            _revision(one),
            _why(one),
            moment(one.changed),
        ]
        for one in stories
    ]
    listed = table(["state", "route", "revision", "why", f"changed ({zone()})"], rows, frozenset({2})) if rows else ""
    return (
        f'<p class="crumbs"><a href="/">Studies</a></p><h1>Study <span class="mono">{text(key)}</span></h1>'
        f'<div id="study" data-live><div class="known">{came}</div><h2>Stories</h2>{listed or EARLY}</div>'
    )


EARLY = '<div class="empty">It is not whole yet; nothing was begun.</div>'


def _study_link(key: str) -> str:
    return f'<a class="mono" href="/study/{key}">{key[:10]}</a>'


# peers


@dataclass(frozen=True, kw_only=True)
class Known:
    """A peer, and what is known of it."""

    name: str
    aet: str
    place: str
    """Where it listens; empty for one that only sends."""
    is_safe: bool
    """Whether it is called by TLS."""
    targets_of: Sequence[str]
    last: datetime | None = None
    """When its last object came."""
    refusals: Mapping[str, int] = field(default_factory=dict)
    echo: tuple[datetime, str] | None = None
    """When somebody last called it, and what came of that."""


def peers(known: Sequence[Known], strangers: Mapping[str, int], words: Mapping[str, str], token: str) -> str:
    """Everybody the node knows, and what was refused to whom. `words` say what a code of a refusal means."""
    cards = "".join(_peer(one, words, token) for one in known)
    empty = '<div class="empty">No peer is named in the config: nobody is heard.</div>'
    others = f"<h2>Others</h2>{_refusals(strangers, words)}" if strangers else ""
    return f'<h1>Peers</h1><div id="peers" data-live><div class="cards">{cards}</div>{"" if known else empty}{others}</div>'


def _peer(one: Known, words: Mapping[str, str], token: str) -> str:
    said = [
        ("AE title", f'<span class="mono">{text(one.aet)}</span>'),
        ("listens", text(one.place) + (" by TLS" if one.is_safe else "") if one.place else "nowhere: it only sends"),
        *([("results of", text(", ".join(one.targets_of)))] if one.targets_of else []),
        ("last seen", moment(one.last) if one.last else "nothing has come from it yet"),
    ]
    if one.echo:
        said.append((f"called {moment(one.echo[0])}", text(one.echo[1])))
    listed = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in said)
    call = button(f"/peers/{text(one.name)}/echo", "Call it (C-ECHO)", token) if token and one.place else ""
    refused = "".join(
        f"<li><b>{count} ×</b> {text(words.get(code, code))}</li>" for code, count in sorted(one.refusals.items())
    )
    refused = f'<ul class="refusals">{refused}</ul>' if refused else ""
    return f'<section class="card"><h2>{text(one.name)}</h2><dl>{listed}</dl>{refused}{call}</section>'


def _refusals(counts: Mapping[str, int], words: Mapping[str, str]) -> str:
    rows = [[text(code), str(count), text(words.get(code, ""))] for code, count in sorted(counts.items())]
    return table(["refused", "times", "why"], rows, frozenset({1}))


# the node itself


@dataclass(frozen=True, kw_only=True)
class Way:
    """A route, and what it works with now."""

    name: str
    how: Route
    serving: Serving | None
    """None where nobody has worked on it yet."""


def node(
    ways: Sequence[Way],
    shadows: Sequence[Summary],
    workers: Sequence[Worker],
    silent_s: float,
    free_bytes: int,
    token: str,
) -> str:
    """What is done with studies, by what, and which processes do it."""
    cards = "".join(_route(way, token) for way in ways)
    empty = '<div class="empty">The config names no routes: studies are received, and nothing is done with them.</div>'
    rows = [
        [text(one.name), text(one.part), _lives(one, silent_s), moment(one.began), moment(one.last)] for one in workers
    ]
    heads = ["process", "does", "state", f"began ({zone()})", "last beat"]
    listed = f"<h2>Processes</h2>{table(heads, rows)}" if rows else ""
    free = f'<p class="quiet">{size(free_bytes)} are free on the disk that studies are received on.</p>'
    doors = '<p class="quiet">For programs: <a href="/api">how to hand in scans without DICOM</a>.</p>'
    body = f'<h2>Routes</h2><div class="cards">{cards}</div>{"" if ways else empty}{_shadows(shadows)}{listed}'
    return f'<h1>Node</h1><div id="node" data-live>{free}{body}{doors}</div>'


def _lives(one: Worker, silent_s: float) -> str:
    """By two clocks, where they are two machines: for people, nothing is decided by it."""
    if one.is_gone:
        return "ended"
    return "lives" if (datetime.now(UTC) - one.last).total_seconds() < silent_s else state("silent")


def _shadows(summaries: Sequence[Summary]) -> str:
    """How alike each shadow and the package of its route have been."""
    rows = [
        [text(one.route), f'<span class="mono">{text(one.package[:8])} : {text(one.shadow[:8])}</span>', text(one.label), str(one.scans),
         _share(one.dice), _share(one.lowest), f"{one.difference_ml:+.1f}"]
        for one in summaries
    ]  # fmt: skip
    heads = ["route", "package : shadow", "label", "scans", "mean Dice", "lowest", "ml more"]
    return f"<h2>Shadow packages</h2>{table(heads, rows, frozenset({3, 4, 5, 6}))}" if rows else ""


def _share(number: float | None) -> str:
    return "" if number is None else f"{number:.3f}"


def _route(way: Way, token: str) -> str:
    how, serving = way.how, way.serving
    said = [
        ("package", _version(serving.version) if serving else text(how.package.name)),
        *([("since", f"{moment(datetime.fromisoformat(serving.changed))}, by {text(serving.who)}")] if serving else []),
        *([("before", _version(serving.before))] if serving and serving.before else []),
        *([("after", _version(serving.after))] if serving and serving.after else []),
        *([("shadow", text(how.shadow.name))] if how.shadow else []),
        ("takes", text(", ".join(how.take))),
        ("makes", text(", ".join(how.outputs))),
        ("sends to", text(", ".join(how.targets)) or "nobody"),
        ("proof", text(how.proof.replace("_", " "))),
        ("priority", str(how.priority)),
    ]
    listed = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in said)
    acts = _turns(way.name, serving, token) if serving and token else ""
    return f'<section class="card"><h2>{text(way.name)}</h2><dl>{listed}</dl>{acts}</section>'


def _turns(route: str, serving: Serving, token: str) -> str:
    """The way back, and from there forth again."""
    forms = [
        asked_twice(
            f"Roll {way} to {goal.name} {goal.id[:8]}",
            "New stories of this route get that package from now on; one under way ends with the package it began with.",
            button(f"/node/{text(route)}/roll_{way}", f"Roll {way}", token),
        )
        for way, goal in (("back", serving.before), ("forward", serving.after))
        if goal
    ]
    return f'<div class="acts">{"".join(forms)}</div>' if forms else ""


def _version(one: Version) -> str:
    return f'{text(one.name)} <span class="mono">{text(one.id[:12])}</span>'


# the audit trail


def audit(lines: Sequence[Mapping[str, Any]], verdict: str, is_whole: bool, token: str) -> str:
    """The newest lines of the trail, and a way to have all of it read."""
    rows = [
        [moment(datetime.fromisoformat(line["at"])), text(line["what"]), text(line["facts"].get("who", "")),
         text(_plain({name: one for name, one in line["facts"].items() if name != "who"})), str(line["number"])]
        for line in lines
    ]  # fmt: skip
    said = f'<div class="{"good" if is_whole else "bad"}" role="status">{text(verdict)}</div>' if verdict else ""
    heads = [f"when ({zone()})", "what", "who", "of what", "line"]
    listed = table(heads, rows, frozenset({4})) if rows else '<div class="empty">No trail is kept.</div>'
    check = button("/audit", "Check the whole trail", token) if rows else ""
    return f'<h1>Audit trail</h1>{said}<div class="acts">{check}</div>{listed}'


def login(said: str, status: str) -> str:
    """Where people begin."""
    alarm = f'<div class="bad" role="alert">{text(said)}</div>' if said else ""
    return (
        f'<form class="login" method="post" action="/login"><h1>hilum</h1>{alarm}'
        '<label>Name<input name="name" autocomplete="username" required autofocus></label>'
        '<label>Password<input name="password" type="password" autocomplete="current-password" required></label>'
        f'<button class="main">Log in</button>{status}</form>'
    )
