"""What machines ask of a node: whether it lives, whether it is ready, and numbers for Prometheus. Nothing of a patient."""

import time
from collections.abc import Iterable, Sequence

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route as Place

from .config import GB
from .desk import Desk
from .heart import Hearts
from .shadow import summaries
from .timings import BOUNDS, ENDLESS


def routes(desk: Desk) -> list[Place]:
    """The doors of machines, which need no login."""

    async def live(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def ready(request: Request) -> Response:
        reason = await run_in_threadpool(not_ready, desk)
        return PlainTextResponse(f"{reason}\n" if reason else "ok\n", status_code=503 if reason else 200)

    async def metrics(request: Request) -> Response:
        return PlainTextResponse(await run_in_threadpool(told, desk), media_type="text/plain; version=0.0.4")

    return [Place("/metrics", metrics), Place("/health/live", live), Place("/health/ready", ready)]


def not_ready(desk: Desk) -> str:
    """Why a study that is sent now would not be taken and worked on; empty where it would be."""
    try:
        desk.stories.counts()
    except Exception:  # whatever a database raises: somebody waits for the answer
        return "the ledger does not answer"
    free = desk.spool.free_bytes()
    return "the disk is down to its reserve" if free < desk.node.receiving.reserve_gb * GB else ""


Sample = tuple[str, dict[str, str], float]
"""What follows the metric's name, its labels, and the number."""


def told(desk: Desk) -> str:
    """All metrics, as Prometheus reads them."""
    return "".join([*_of_stories(desk), *_of_peers(desk), *_of_the_node(desk)])


def _of_stories(desk: Desk) -> list[str]:
    unended, counts = desk.stories.unended(), sorted(desk.stories.counts().items())
    oldest = max((time.time() - story.began.timestamp() for story in unended), default=0.0)
    of_state = [("", {"state": state, "code": code}, count) for (state, code), count in counts]
    return [
        _family("hilum_stories", "gauge", "Stories by state, and by reason where they ended without a result.", of_state),
        _number("hilum_queue_depth", "Stories that have not ended.", len(unended)),
        _number("hilum_queue_oldest_seconds", "Age of the oldest story that has not ended.", oldest),
        _number("hilum_studies_waiting", "Studies of which something came that no revision holds yet.", len(desk.ledger.waiting())),
        _family("hilum_step_seconds", "histogram", "How long stories that ended were in each state.", _histograms(desk)),
    ]  # fmt: skip


def _histograms(desk: Desk) -> list[Sample]:
    """Prometheus counts what took up to so long, all shorter ones included."""
    samples: list[Sample] = []
    for state, (counts, total) in sorted(desk.stories.seconds().items()):
        below = 0
        for bound in BOUNDS:
            below += counts.get(bound, 0)
            samples.append(("_bucket", {"step": state, "le": f"{bound:g}"}, below))
        every = below + counts.get(ENDLESS, 0)
        samples.append(("_bucket", {"step": state, "le": "+Inf"}, every))
        samples += [("_sum", {"step": state}, total), ("_count", {"step": state}, every)]
    return samples


def _of_peers(desk: Desk) -> list[str]:
    seen = {name: desk.ledger.last_from(name) for name in desk.node.peers}
    last: list[Sample] = [("", {"peer": name}, moment.timestamp()) for name, moment in seen.items() if moment]
    refused: list[Sample] = [
        ("", {"code": code, "source": source}, count) for (code, source), count in sorted(desk.ledger.refused().items())
    ]
    return [
        _family(
            "hilum_peer_last_seen_seconds", "gauge", "When a peer's last object came, in seconds since 1970.", last
        ),
        _family("hilum_refusals_total", "counter", "What peers were refused, by reason.", refused),
    ]


def _of_the_node(desk: Desk) -> list[str]:
    workers = Hearts(ledger=desk.ledger, silent_s=desk.node.working.silent_s).known()
    alike: list[Sample] = [
        ("", {"route": one.route, "label": one.label, "package": one.package[:12], "shadow": one.shadow[:12]}, one.dice)
        for one in summaries(desk.ledger)
        if one.dice is not None
    ]
    beats: list[Sample] = [
        ("", {"process": one.name, "part": one.part}, one.last.timestamp()) for one in workers if not one.is_gone
    ]
    return [
        _family("hilum_shadow_dice", "gauge", "How alike a route's package and its shadow found a label, on average.", alike),
        _family("hilum_process_last_beat_seconds", "gauge", "When a process last said that it lives, since 1970.", beats),
        _number("hilum_disk_free_bytes", "What is free on the spool's disk.", desk.spool.free_bytes()),
        _number("hilum_disk_reserve_bytes", "Below so much free disk nothing is received.", desk.node.receiving.reserve_gb * GB),
    ]  # fmt: skip


def _number(name: str, words: str, value: float) -> str:
    return _family(name, "gauge", words, [("", {}, value)])


def _family(name: str, kind: str, words: str, samples: Iterable[Sample]) -> str:
    lines = [f"# HELP {name} {words}", f"# TYPE {name} {kind}"]
    return (
        "\n".join([*lines, *(f"{name}{after}{_labels(labels)} {value!r}" for after, labels, value in samples)]) + "\n"
    )


def _labels(labels: dict[str, str]) -> str:
    said: Sequence[str] = [f'{name}="{_escaped(value)}"' for name, value in labels.items()]
    return f"{{{','.join(said)}}}" if said else ""


def _escaped(word: str) -> str:
    return word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
