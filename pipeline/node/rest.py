"""A small REST interface: hand in a scan without DICOM, ask what became of it, fetch its results; and its OpenAPI document.

Addresses, answers and document come from one table, `OPERATIONS`, so that none of the three can say what the others do not.
"""

import json
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from ..outputs._html import document, text
from .access import Role
from .admission import Admission
from .bodies import Malformed, Multipart, disposed, media_type, pour
from .config import GB
from .desk import Desk
from .guard import demand
from .intake import ROOM_EVERY
from .nouns import (
    BROKEN_OFF,
    KEY_LENGTH,
    MISBEHAVED,
    NO_ROOM,
    NOT_KEPT,
    TOO_LARGE,
    TOO_MANY,
    Reason,
    Refused,
)
from .spool import Part
from .stories import Story
from .submissions import Draft, Submission

logger = logging.getLogger(__name__)

DOOR = "rest"
STATUS = {TOO_LARGE: 413, NO_ROOM: 503, TOO_MANY: 503, NOT_KEPT: 503, BROKEN_OFF: 408}
"""Of HTTP for a reason; of all others 400, for the request itself is wrong."""
AGAIN_SECONDS = 60
"""After so long who was refused for want of room or places may ask again."""
FILES_AT_MOST = 32
"""Channels that no package has."""
IS_KEY = re.compile(f"[0-9a-f]{{{KEY_LENGTH}}}")
"""Nothing else is asked of a database."""


def routes(desk: Desk) -> list[Route]:
    """Every address below /api."""
    rest = Rest(desk=desk, admission=Admission(desk.node, desk.spool, desk.ledger))
    return [Route(one.path, _answering(one, rest), methods=[one.method]) for one in OPERATIONS]


@dataclass(kw_only=True, eq=False)
class Rest:
    """What the operations work with."""

    desk: Desk
    admission: Admission
    inside: int = 0
    """Submissions that are coming in just now."""

    # hand in

    async def submit(self, request: Request, caller: str) -> Response:
        route = request.query_params.get("route", "")
        if route not in self.desk.node.routes:
            raise HTTPException(404, "There is no such route; /api/routes names those that there are.")
        if not await run_in_threadpool(self.admission.has_room):
            raise Refused(NO_ROOM)
        if self.inside >= self.desk.node.receiving.associations:
            raise Refused(TOO_MANY)
        self.inside += 1
        try:
            submission = await self._handed_in(request, route)
        finally:
            self.inside -= 1
        await run_in_threadpool(
            self.desk.audit.note, "submission", study=submission.key, route=route, door=DOOR, who=caller
        )
        told = await run_in_threadpool(self._told, submission)
        return JSONResponse(told, 202, {"Location": f"/api/submissions/{submission.key}"})

    async def _handed_in(self, request: Request, route: str) -> Submission:
        kind, said = media_type(request.headers.get("content-type", ""))
        with self.desk.submissions.draft(route) as draft:
            files = Files(draft=draft, admission=self.admission)
            silence_s = self.desk.node.receiving.silence_s
            try:
                if kind == "multipart/form-data":
                    body = Multipart(boundary=said.get("boundary", ""), sink=files, most=FILES_AT_MOST)
                    await pour(request, body.feed, silence_s)
                    body.close()
                else:
                    files.open(draft.channels[0])
                    await pour(request, files.write, silence_s)
            except Malformed:
                raise Refused(MISBEHAVED) from None
            except (ClientDisconnect, TimeoutError):
                raise Refused(BROKEN_OFF) from None
            return await run_in_threadpool(self.desk.submissions.hand_in, draft, route, DOOR)

    # ask

    async def submission(self, request: Request, caller: str) -> Response:
        return JSONResponse(await run_in_threadpool(self._told, await self._found(request)))

    async def results(self, request: Request, caller: str) -> Response:
        found = await self._found(request)
        files = await run_in_threadpool(self.desk.submissions.results, found)
        sizes = await run_in_threadpool(lambda: {name: path.stat().st_size for name, path in files.items()})
        told = [
            {"name": name, "bytes": size, "href": f"/api/submissions/{found.key}/results/{name}"}
            for name, size in sizes.items()
        ]
        return JSONResponse({"files": told})

    async def result(self, request: Request, caller: str) -> Response:
        found = await self._found(request)
        path = await run_in_threadpool(self._result, found, request.path_params["name"])
        if path is None:
            raise HTTPException(404, "There is no such file among the results.")
        await run_in_threadpool(self.desk.audit.note, "download", study=found.key, who=caller)
        return FileResponse(path, filename=path.name, media_type="application/octet-stream")

    async def study(self, request: Request, caller: str) -> Response:
        key = request.path_params["key"]
        told = await run_in_threadpool(self._study, key) if IS_KEY.fullmatch(key) else None
        if told is None:
            raise HTTPException(404, "No study is known under that key.")
        return JSONResponse(told)

    async def routes(self, request: Request, caller: str) -> Response:
        told = [{"name": name, "channels": list(route.take)} for name, route in self.desk.node.routes.items()]
        return JSONResponse({"routes": told})

    async def openapi(self, request: Request, caller: str) -> Response:
        return JSONResponse(openapi())

    async def page(self, request: Request, caller: str) -> Response:
        return HTMLResponse(page())

    async def _found(self, request: Request) -> Submission:
        key = request.path_params["key"]
        found = await run_in_threadpool(self.desk.submissions.get, key) if IS_KEY.fullmatch(key) else None
        if found is None:
            raise HTTPException(404, "No submission is known under that key.")
        return found

    def _result(self, submission: Submission, name: str) -> Path | None:
        return self.desk.submissions.results(submission).get(name)

    def _told(self, submission: Submission) -> dict[str, Any]:
        story = self.desk.submissions.story(submission)
        of = _state(story)
        if scan := self.desk.submissions.why_refused(submission):
            of |= {"scan": scan}
        return {"key": submission.key, "bytes": submission.bytes, "came": submission.came.isoformat(), **of}

    def _study(self, key: str) -> dict[str, Any] | None:
        study = self.desk.ledger.study(key)
        if study is None:
            return None
        stories = [_state(story) for story in self.desk.stories.some(study=key)[0]]
        return {
            "key": key, "objects": study.objects, "revision": study.revision, "waiting": study.objects > study.frozen,
            "first": study.first.isoformat(), "last": study.last.isoformat(), "stories": stories,
        }  # fmt: skip


def _state(story: Story) -> dict[str, Any]:
    return {
        "route": story.route, "revision": story.revision, "state": story.state, "code": story.code, "words": story.words,
        "attempt": story.attempt, "began": story.began.isoformat(), "changed": story.changed.isoformat(),
    }  # fmt: skip


@dataclass(kw_only=True, eq=False)
class Files:
    """The parts of a form, each the file of a channel by its name; or one body, the file of the only channel."""

    draft: Draft
    admission: Admission
    came: int = 0
    looked_at: int = 0
    _part: Part | None = None

    def open(self, channel: str) -> None:
        """The file of a channel begins."""
        self.came = self.looked_at = 0
        self._part = self.draft.part(channel)

    def begin(self, headers: dict[str, str]) -> None:
        self.open(disposed(headers.get("content-disposition", "")))

    def write(self, data: bytes) -> None:
        assert self._part is not None, "a part begins before it goes on"
        self.came += len(data)
        if self.came > self.admission.node.receiving.object_gb * GB:
            raise Refused(TOO_LARGE)
        if self.came - self.looked_at > ROOM_EVERY:
            self.looked_at = self.came
            if not self.admission.has_room():
                raise Refused(NO_ROOM)
        self._part.write(data)

    def end(self) -> None:
        self._part = None


# the table

Work = Callable[[Rest, Request, str], Awaitable[Response]]


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One address and one method: what it does, who may, what is answered."""

    method: Literal["GET", "POST"]
    path: str
    does: str
    work: Work
    role: Role | None
    """None: anybody, for it tells nothing of what is here."""
    answer: str
    """The name of a schema, or the kind of file it is."""
    status: int = 200
    missing: bool = False
    """Whether it may be that there is none."""
    query: Mapping[str, str] = field(default_factory=dict)
    takes_files: bool = False


OPERATIONS = (
    Operation(
        method="POST", path="/api/submissions", work=Rest.submit, role="sender", answer="Submission", status=202, missing=True,
        does="Hand in a scan: a form with a file per channel, named as the channel, or the file of the only channel as the "
        "body itself. NIfTI, NRRD or MetaImage. The same files are the same submission, however often they are handed in; one "
        "that failed before is begun anew.",
        query={"route": "What is to be done with it; /api/routes names them."}, takes_files=True,
    ),
    Operation(
        method="GET", path="/api/submissions/{key}", work=Rest.submission, role="viewer", answer="Submission", missing=True,
        does="What became of a submission.",
    ),
    Operation(
        method="GET", path="/api/submissions/{key}/results", work=Rest.results, role="viewer", answer="Results", missing=True,
        does="The files that were made of it; none before it is done.",
    ),
    Operation(
        method="GET", path="/api/submissions/{key}/results/{name}", work=Rest.result, role="viewer", missing=True,
        answer="application/octet-stream", does="One of these files.",
    ),
    Operation(
        method="GET", path="/api/studies/{key}", work=Rest.study, role="viewer", answer="Study", missing=True,
        does="What came of a DICOM study and what became of it, by the key that the status page shows.",
    ),
    Operation(
        method="GET", path="/api/routes", work=Rest.routes, role="viewer", answer="Routes",
        does="What can be done with a scan, and which channels are needed for it.",
    ),
    Operation(method="GET", path="/api/openapi.json", work=Rest.openapi, role=None, answer="OpenAPI", does="This document."),
    Operation(method="GET", path="/api", work=Rest.page, role=None, answer="text/html", does="The same as a page to read."),
)  # fmt: skip
"""Every address below /api."""


def _answering(operation: Operation, rest: Rest) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        try:
            caller = demand(request, operation.role).name if operation.role else ""
            return await operation.work(rest, request, caller)
        except HTTPException as refused:
            return _problem(refused.status_code, "", refused.detail, refused.headers)
        except Refused as refused:
            await run_in_threadpool(rest.admission.refuse, refused.reason, "")
            return _no(refused.reason)
        except OSError as error:  # the disk, or the database: its words may hold a path
            logger.error("a submission was not kept (%s)", type(error).__name__)
            return _no(NOT_KEPT)

    return answer


def _no(reason: Reason) -> Response:
    status = STATUS.get(reason, 400)
    return _problem(status, reason.code, reason.words, {"Retry-After": str(AGAIN_SECONDS)} if status == 503 else {})


def _problem(status: int, code: str, words: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"code": code, "words": words}, status, {"Cache-Control": "no-store", **(headers or {})})


# the document


def _object(required: Mapping[str, Any], more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    properties = {**required, **(more or {})}
    return {"type": "object", "required": list(required), "properties": properties, "additionalProperties": False}


def _words(description: str, **more: Any) -> dict[str, Any]:
    return {"type": "string", "description": description, **more}


def _many(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": of}


MOMENT = {"type": "string", "format": "date-time"}
NUMBER = {"type": "integer", "minimum": 0}
STATE = {
    "route": _words("What is done with it."),
    "revision": {**NUMBER, "description": "Late objects of a study make another; a submission has one."},
    "state": _words(
        "queued, choosing, segmenting, sending, confirming; or how it ended: done, refused, dead, superseded ..."
    ),
    "code": _words("Why not, from a closed list; empty where nothing is wrong."),
    "words": _words("The same for people."),
    "attempt": {**NUMBER, "description": "How often it was begun."},
    "began": MOMENT,
    "changed": MOMENT,
}
KEY = _words("Opaque; it tells nothing of a patient.", pattern=f"^{IS_KEY.pattern}$")
SCHEMAS: dict[str, dict[str, Any]] = {
    "Problem": _object({"code": _words("From a closed list; may be empty."), "words": _words("What to do about it.")}),
    "Submission": _object(
        {"key": KEY, "bytes": NUMBER, "came": MOMENT, **STATE},
        {"scan": _words("Where the scan itself was refused: why, in the words of who read it.")},
    ),
    "Results": _object(
        {"files": _many(_object({"name": _words("Of the file."), "bytes": NUMBER, "href": _words("Where it is.")}))}
    ),
    "Study": _object(
        {
            "key": KEY,
            "objects": NUMBER,
            "revision": NUMBER,
            "waiting": {"type": "boolean", "description": "Whether something came that no revision holds yet."},
            "first": MOMENT,
            "last": MOMENT,
            "stories": _many(_object(STATE)),
        }
    ),
    "Routes": _object({"routes": _many(_object({"name": _words("Its name."), "channels": _many({"type": "string"})}))}),
    "OpenAPI": {"type": "object"},
}
REFUSALS = {
    400: "The body is not what is needed.",
    401: "No token, or one that is none.",
    403: "The token may not do this.",
    404: "There is none.",
    408: "The body came too slowly, or not at all.",
    413: "A file is larger than this node takes.",
    503: "No room, or too many at once: later.",
}


def openapi() -> dict[str, Any]:
    """The OpenAPI 3.1 document of everything below /api."""
    paths: dict[str, Any] = {}
    for one in OPERATIONS:
        paths.setdefault(one.path, {})[one.method.lower()] = _described(one)
    token = {"type": "http", "scheme": "bearer", "description": "As `hilum node --make_token` prints it."}
    return {
        "openapi": "3.1.0",
        "info": {"title": "hilum node", "version": "1", "description": "Scans in without DICOM, results out."},
        "paths": paths,
        "components": {"schemas": SCHEMAS, "securitySchemes": {"token": token}},
    }


def _described(one: Operation) -> dict[str, Any]:
    in_path = [part[1:-1] for part in one.path.split("/") if part.startswith("{")]
    parameters = [_parameter(name, "path", "") for name in in_path]
    parameters += [_parameter(name, "query", words) for name, words in one.query.items()]
    answers = {one.status: {"description": one.does, "content": _content(one.answer)}}
    answers |= {
        status: {"description": REFUSALS[status], "content": _content("Problem")} for status in _refusals_of(one)
    }
    return {
        "operationId": one.work.__name__,
        "summary": one.does.partition(". ")[0].rstrip("."),
        "description": one.does,
        **({"parameters": parameters} if parameters else {}),
        **({"requestBody": FILES} if one.takes_files else {}),
        "responses": {str(status): answers[status] for status in sorted(answers)},
        "security": [{"token": []}] if one.role else [],
    }


def _refusals_of(one: Operation) -> list[int]:
    statuses = [401, 403] if one.role else []
    statuses += [404] if one.missing else []
    return statuses + ([400, 408, 413, 503] if one.takes_files else [])


def _parameter(name: str, where: str, words: str) -> dict[str, Any]:
    said = {"description": words} if words else {}
    return {"name": name, "in": where, "required": True, "schema": KEY if name == "key" else {"type": "string"}, **said}


def _content(answer: str) -> dict[str, Any]:
    if answer in SCHEMAS:
        return {"application/json": {"schema": {"$ref": f"#/components/schemas/{answer}"}}}
    return {answer: {"schema": {"type": "string"} if answer.startswith("text/") else {}}}


FILES: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "description": "A file for each channel, under the channel's name.",
                "additionalProperties": {"type": "string", "contentMediaType": "application/octet-stream"},
            }
        },
        "application/octet-stream": {"schema": {}},
    },
}


def page() -> str:
    """All of it for people, with nothing fetched from anywhere."""
    parts = "".join(
        f'<h2><span class="mono">{one.method} {text(one.path)}</span></h2><p>{text(one.does)}</p>'
        f"<p class=quiet>{text(_who(one))}</p>{_answers(one)}"
        for one in OPERATIONS
    )
    shapes = "".join(
        f'<h3 id="{name}">{name}</h3><pre class="wide">{text(json.dumps(schema, indent=1))}</pre>'
        for name, schema in SCHEMAS.items()
    )
    head = (
        "<h1>hilum: REST</h1><p>Scans in without DICOM, results out. For programs: "
        '<a href="/api/openapi.json">openapi.json</a>. A token goes into the header <span class="mono">Authorization: '
        f'Bearer TOKEN</span>.</p><pre class="wide">{text(EXAMPLE)}</pre>'
    )
    return document("hilum: REST", f"{head}{parts}<h2>Shapes</h2>{shapes}", style="pre { font-size: 13px; }")


EXAMPLE = """curl -H "Authorization: Bearer $TOKEN" --data-binary @scan.nii.gz "$NODE/api/submissions?route=liver"
curl -H "Authorization: Bearer $TOKEN" -F t1=@t1.nii.gz -F t2=@t2.nii.gz "$NODE/api/submissions?route=brain"
curl -H "Authorization: Bearer $TOKEN" "$NODE/api/submissions/KEY"
curl -H "Authorization: Bearer $TOKEN" -O "$NODE/api/submissions/KEY/results/labels.nii.gz\""""


def _who(one: Operation) -> str:
    return f"Needs a token with the role {one.role}, or more." if one.role else "Needs no token."


def _answers(one: Operation) -> str:
    rows = "".join(
        f'<tr><td class="number">{status}</td><td>{text(said["description"])}</td><td class="mono">{_shown(said)}</td></tr>'
        for status, said in _described(one)["responses"].items()
    )
    return f'<div class="wide"><table><tbody>{rows}</tbody></table></div>'


def _shown(said: Mapping[str, Any]) -> str:
    kind, schema = next(iter(said["content"].items()))
    name = schema["schema"].get("$ref", "").rpartition("/")[2]
    return f'<a href="#{name}">{name}</a>' if name else text(kind)
