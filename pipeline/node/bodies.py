"""What comes over HTTP in parts: cut apart as it comes, never held as a whole, bounded in headers, parts, bytes and time."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from typing import Protocol, runtime_checkable

import anyio
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

HEADER_BYTES = 8192
"""Of one part. The longest that anybody sends has some hundred."""
LEAD_BYTES = 4096
"""Before the first delimiter and after the last, where mail programs once said that they could not show what follows."""
BOUNDARY_LETTERS = 200
"""RFC 2046 5.1.1 says 70, and Orthanc sends 73."""
GATHERED = 1 << 20
"""Bytes that go to the disk together: a change of threads for each piece from the wire would cost more than the disk."""
SLOWEST = 1000
"""Bytes per second, on the whole, are slower than any line; who sends less only holds a place."""
START_SECONDS = 60.0
"""In which nobody is too slow."""


class Malformed(ValueError):
    """A body that is not what its header says; its words quote nothing of it."""


@runtime_checkable
class Sink(Protocol):
    """Where parts go."""

    def begin(self, headers: dict[str, str]) -> None:
        """A part begins; names of headers are in small letters."""

    def write(self, data: bytes) -> None:
        """More of it."""

    def end(self) -> None:
        """It is whole."""


@dataclass(kw_only=True, eq=False)
class Multipart:
    """A multipart body (RFC 2046 5.1), piece by piece."""

    boundary: str
    sink: Sink
    most: int
    """Parts that there may be."""
    parts: int = 0

    def __post_init__(self) -> None:
        if not 0 < len(self.boundary) <= BOUNDARY_LETTERS or not self.boundary.isascii():
            raise Malformed("The boundary of a multipart body is missing or too long; 1 to 200 letters are needed.")
        self._delimiter = b"\r\n--" + self.boundary.encode()
        self._held = bytearray(b"\r\n")  # the first delimiter need not follow a line
        self._led = 0
        self._step: Callable[[], bool] = self._lead

    def feed(self, data: bytes) -> None:
        """More of the body."""
        self._held += data
        while self._step():
            pass

    def close(self) -> None:
        """The body is over; it must have said so itself, else it was broken off."""
        if self._step != self._rest:
            raise Malformed("The body ended before its last delimiter. Send it again, whole.")

    def _lead(self) -> bool:
        found = self._held.find(self._delimiter)
        gone = found if found >= 0 else max(0, len(self._held) - len(self._delimiter))
        self._led += gone
        if self._led > LEAD_BYTES:
            raise Malformed("The body does not begin with its delimiter. Name the boundary that is in it.")
        del self._held[: gone + (len(self._delimiter) if found >= 0 else 0)]
        if found >= 0:
            self._step = self._after
        return found >= 0

    def _after(self) -> bool:
        """Behind a delimiter: the end of the line, or of everything."""
        if len(self._held) < 2:
            return False
        if self._held.startswith(b"--"):
            self._step = self._rest
            return True
        end = self._held.find(b"\r\n")
        if self._held[: end if end >= 0 else None].strip(b" \t"):
            raise Malformed(
                "A delimiter is followed by something else than the end of its line. Choose another boundary."
            )
        if end < 0:
            return self._waits(BOUNDARY_LETTERS)
        del self._held[:end]
        self._step = self._headers
        return True

    def _headers(self) -> bool:
        end = self._held.find(b"\r\n\r\n")
        if end < 0:
            return self._waits(HEADER_BYTES)
        headers = _headers_of(bytes(self._held[2:end])) if end <= HEADER_BYTES else None
        self.parts += 1
        if headers is None or self.parts > self.most:
            raise Malformed(
                f"A part has headers that are none, or there are more than {self.most} parts. Send fewer at once."
            )
        del self._held[: end + 4]
        self._step = self._content
        self.sink.begin(headers)
        return True

    def _content(self) -> bool:
        found = self._held.find(self._delimiter)
        sure = found if found >= 0 else len(self._held) - len(self._delimiter)
        if sure > 0:
            self.sink.write(bytes(memoryview(self._held)[:sure]))
            del self._held[:sure]
        if found < 0:
            return False
        del self._held[: len(self._delimiter)]
        self._step = self._after
        self.sink.end()
        return True

    def _rest(self) -> bool:
        self._led += len(self._held)
        if self._led > 2 * LEAD_BYTES:
            raise Malformed("The body goes on behind its last delimiter. Leave that out.")
        self._held.clear()
        return False

    def _waits(self, most: int) -> bool:
        if len(self._held) > most:
            raise Malformed("A part has no end of its headers, or too many of them. Send what HTTP clients send.")
        return False


def _headers_of(lines: bytes) -> dict[str, str] | None:
    found: dict[str, str] = {}
    for line in lines.decode("latin-1").split("\r\n") if lines else ():
        name, colon, value = line.partition(":")
        if not colon or not name.strip() or name[0] in " \t":
            return None
        found[name.strip().lower()] = value.strip()
    return found


def media_type(value: str) -> tuple[str, dict[str, str]]:
    """A header's value and its parameters, in small letters but for what parameters say."""
    header = Message()  # the standard library's own reader of such headers
    header["content-type"] = value
    return header.get_content_type() if value else "", {
        name.lower(): said for name, said in (header.get_params() or [])[1:]
    }


def disposed(value: str) -> str:
    """The name that a part of a form has."""
    header = Message()
    header["content-disposition"] = value
    return str(header.get_param("name", "", "content-disposition"))


async def pour(request: Request, into: Callable[[bytes], None], silence_s: float) -> None:
    """The body of a request, in large pieces, in a thread that may wait for disks; TimeoutError where it comes too slowly."""
    held, came, begun = bytearray(), 0, time.monotonic()
    stream = aiter(request.stream())
    while True:
        with anyio.fail_after(silence_s):
            piece = await anext(stream, None)
        if piece is None:
            break
        held += piece
        came += len(piece)
        if time.monotonic() - begun > START_SECONDS + came / SLOWEST:
            raise TimeoutError("a body came too slowly")
        if len(held) >= GATHERED:
            await run_in_threadpool(into, bytes(held))
            held.clear()
    if held:
        await run_in_threadpool(into, bytes(held))
