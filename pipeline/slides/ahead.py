"""Tiles of this slide and of the next ones, read by threads while the encoder runs: always in one order, never too many.

What is handed out depends on the slides alone: neither on the number of threads nor on which of them is faster.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from jaxtyping import UInt8

from preprocessing.slides import Slide, SlideError, SlideFile, Tiles, TileShape

SLIDES_AHEAD = 2
"""Slides that are opened, and their tissue found, before their turn: one is not enough where slides are small."""

TILES_AT_ONCE = 16
"""Tiles that a thread reads one after the other, in a row of the slide: neighbours share blocks of the file, which are
decoded once; handing over a tile at a time would cost a tenth of reading it."""

Turn = TypeVar("Turn")


@dataclass(frozen=True, kw_only=True, eq=False)
class Laid:
    """A slide that is open, its tissue found, its tiles laid out."""

    slide: Slide
    identity: str
    tiles: Tiles
    shape: TileShape


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """The pictures of tiles that lie in a row."""

    tiles: tuple[int, ...]
    """Their numbers in the order of the slide's tiles."""
    pictures: UInt8[np.ndarray, "tile h w 3"]
    damaged: tuple[int, ...] = ()
    """Tiles that could not be read, and so have no picture."""
    met: str = ""
    """What their reader said."""


@dataclass(eq=False)
class _Coming:
    """A slide whose turn is now or soon."""

    file: SlideFile
    laid: "Future[Laid]"
    asked: int = 0
    """Tiles that some thread reads or has read."""
    pieces: "deque[tuple[int, Future[Piece]]]" = field(default_factory=deque)
    """Not taken yet; with the number of their tiles."""


class ReadAhead:
    """Slides are announced in the order of their turns; each is then opened, and its pieces taken.

    All decisions fall in the caller's thread, whenever it takes a piece; the threads only read.
    """

    def __init__(self, lay: Callable[[SlideFile], Laid], threads: int, tiles: int) -> None:
        self.lay = lay
        self.tiles = tiles
        """Pictures that may lie ready."""
        self.waited = 0.0
        """Seconds in which the caller wanted a piece, or an open slide, and there was none yet."""
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tiles")
        self._coming: deque[_Coming] = deque()
        self._ahead = 0

    def announce(self, file: SlideFile) -> None:
        """Its turn will come after those that were announced before."""
        self._coming.append(_Coming(file=file, laid=self._pool.submit(self.lay, file)))

    def open(self, file: SlideFile) -> Laid:
        """Its turn is now; those announced before it are let go. SlideError where it cannot be used."""
        while self._coming and self._coming[0].file != file:
            self.let_go()
        if not self._coming:
            self.announce(file)
        laid: Laid = self._awaited(self._coming[0].laid)
        return laid

    def pieces(self) -> Iterator[Piece]:
        """All pieces of the slide whose turn it is, in order."""
        now = self._coming[0]
        while True:
            self._fill()
            if not now.pieces:
                return
            tiles, piece = now.pieces.popleft()
            self._ahead -= tiles
            yield self._awaited(piece)

    def let_go(self) -> None:
        """The slide whose turn it was is done with, read to its end or not."""
        gone = self._coming.popleft()
        for tiles, piece in gone.pieces:
            piece.cancel()
            self._ahead -= tiles
        gone.laid.add_done_callback(_close)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        while self._coming:
            self.let_go()

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fill(self) -> None:
        """Tiles of this slide and the next are given to the threads until enough pictures lie ready or are on their way."""
        for one in self._coming:
            if not one.laid.done():
                return
            if one.laid.exception():
                continue
            laid = one.laid.result()
            while one.asked < len(laid.tiles):
                if self._ahead >= self.tiles:
                    return
                numbers = tuple(range(one.asked, min(one.asked + TILES_AT_ONCE, len(laid.tiles))))
                one.pieces.append((len(numbers), self._pool.submit(_read, laid, numbers)))
                self._ahead += len(numbers)
                one.asked += len(numbers)

    def _awaited(self, future: "Future[Any]") -> Any:
        began = time.perf_counter()
        try:
            return future.result()
        finally:
            self.waited += time.perf_counter() - began


def _close(laid: "Future[Laid]") -> None:
    if not laid.cancelled() and not laid.exception():
        laid.result().slide.close()


def announced(
    turns: Iterator[tuple[SlideFile, Turn | None]], announce: Callable[[SlideFile], None]
) -> Iterator[tuple[SlideFile, Turn | None]]:
    """The same turns; a slide that nothing is known of yet is announced while others are before it."""
    waiting: deque[tuple[SlideFile, Turn | None]] = deque()
    for file, known in turns:
        if known is None:
            announce(file)
        waiting.append((file, known))
        while waiting and (waiting[0][1] is not None or sum(row is None for _, row in waiting) > SLIDES_AHEAD):
            yield waiting.popleft()
    yield from waiting


def _read(laid: Laid, numbers: tuple[int, ...]) -> Piece:
    side_um, side_px = laid.shape.size_um, laid.shape.size_px
    read: dict[int, UInt8[np.ndarray, "h w 3"]] = {}
    met = ""
    for number in numbers:
        x, y = laid.tiles.positions_um[number].tolist()
        try:
            read[number] = laid.slide.region(x, y, side_um, side_um, (side_px, side_px))
        except SlideError as error:
            if error.reason != "damaged":
                raise
            met = met or str(error)
    return Piece(
        tiles=tuple(read),
        pictures=np.stack([*read.values()]) if read else np.zeros((0, side_px, side_px, 3), np.uint8),
        damaged=tuple(number for number in numbers if number not in read),
        met=met,
    )
