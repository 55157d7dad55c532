"""Tiles read ahead: what is handed out never depends on threads, what lies ready is bounded, slides follow each other closely."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import UInt8

from pipeline.slides.ahead import Laid, Piece, ReadAhead, announced
from preprocessing.slides import Slide, SlideError, SlideFile, Tiles, TileShape

SHAPE = TileShape(size_um=16.0, size_px=8)


class Painted(Slide):
    """A slide whose every pixel says where it lies: its column and row of tiles, and its own number."""

    def __init__(self, number: int = 0, read: Callable[[], None] = lambda: None) -> None:
        self.number, self.read = number, read
        self.closed = False

    def region(
        self, x_um: float, y_um: float, width_um: float, height_um: float, size_px: tuple[int, int]
    ) -> UInt8[np.ndarray, "h w 3"]:
        self.read()
        columns = (x_um + (np.arange(size_px[0]) + 0.5) * width_um / size_px[0]) // 16
        rows = (y_um + (np.arange(size_px[1]) + 0.5) * height_um / size_px[1]) // 16
        picture = np.empty((size_px[1], size_px[0], 3), np.uint8)
        picture[..., 0], picture[..., 1], picture[..., 2] = columns[None], rows[:, None], self.number
        return picture

    def close(self) -> None:
        self.closed = True


def lattice(columns: int, rows: int, keep: Callable[[int, int], bool] = lambda column, row: True) -> Tiles:
    grid = np.array([(c, r) for r in range(rows) for c in range(columns) if keep(c, r)], np.int64)
    return Tiles(positions_um=grid * 16.0, grid=grid, tissue=np.ones(len(grid), np.float32))


def laid(slide: Slide, tiles: Tiles, shape: TileShape = SHAPE) -> Laid:
    return Laid(slide=slide, identity="", tiles=tiles, shape=shape)


def file(number: int) -> SlideFile:
    return SlideFile(path=Path(f"slide{number}.tiff"), id=f"slide{number}")


def assert_right(pieces: list[Piece], tiles: Tiles, number: int = 0) -> None:
    """Every tile once, and the picture it belongs to."""
    seen = [n for piece in pieces for n in piece.tiles]
    assert sorted(seen) == list(range(len(tiles)))
    for piece in pieces:
        for n, picture in zip(piece.tiles, piece.pictures, strict=True):
            expected = (*tiles.grid[n].tolist(), number)
            assert (picture == np.array(expected, np.uint8)).all()


@pytest.mark.parametrize("threads", [1, 4])
def test_every_tile_is_handed_out_once_in_an_order_that_no_thread_decides(threads: int) -> None:
    luck = np.random.default_rng(threads)
    slides = [Painted(n, lambda: time.sleep(luck.uniform(0, 0.003))) for n in range(3)]
    tiles = lattice(9, 7, lambda column, row: (column * row) % 5 != 1)
    orders = []
    with ReadAhead(lambda one: laid(slides[int(one.id[-1])], tiles), threads, tiles=20) as reader:
        for n in range(3):
            reader.announce(file(n))
        for n in range(3):
            reader.open(file(n))
            pieces = list(reader.pieces())
            reader.let_go()
            assert_right(pieces, tiles, n)
            orders.append([piece.tiles for piece in pieces])
    assert orders[0] == orders[1] == orders[2]
    assert [n for piece in orders[0] for n in piece] == list(range(len(tiles))), "row by row"
    assert all(slide.closed for slide in slides)


def test_no_more_pictures_lie_ready_than_were_allowed_however_long_the_encoder_takes() -> None:
    begun = []
    slides = [Painted(n, lambda: begun.append(1)) for n in range(2)]
    tiles = lattice(40, 40)
    with ReadAhead(lambda one: laid(slides[int(one.id[-1])], tiles), 4, tiles=64) as reader:
        reader.announce(file(0))
        reader.announce(file(1))
        reader.open(file(0))
        pieces = reader.pieces()
        taken = 0
        for _ in range(5):
            taken += len(next(pieces).tiles)
            time.sleep(0.05)  # the threads have time to run away
            assert len(begun) <= taken + 64


def test_the_next_slide_is_opened_and_read_while_the_encoder_is_still_busy_with_this_one() -> None:
    opened = {n: threading.Event() for n in range(3)}
    read = {n: threading.Event() for n in range(3)}

    def lay(one: SlideFile) -> Laid:
        number = int(one.id[-1])
        opened[number].set()
        return laid(Painted(number, read[number].set), lattice(4, 4))

    with ReadAhead(lay, 2, tiles=64) as reader:
        turns = announced(((file(n), None) for n in range(3)), reader.announce)
        now, _ = next(turns)
        reader.open(now)
        assert opened[1].wait(5) and opened[2].wait(5)
        list(reader.pieces())
        assert read[1].wait(5), "not a tile of the second slide was asked for yet"
        reader.let_go()


def test_only_what_is_not_known_is_announced_and_the_turns_stay_as_they_were() -> None:
    turns: list[tuple[SlideFile, str | None]] = [(file(n), "complete" if n in (0, 3, 4) else None) for n in range(8)]
    told: list[SlideFile] = []
    seen = list(announced(iter(turns), told.append))
    assert seen == turns and told == [file(n) for n in (1, 2, 5, 6, 7)]


def test_turns_that_are_known_are_not_held_back() -> None:
    def turns() -> Iterator[tuple[SlideFile, str | None]]:
        yield file(0), "complete"
        raise AssertionError("the first could have been given away before")

    assert next(announced(turns(), lambda _: None)) == (file(0), "complete")


def test_a_slide_whose_turn_never_comes_or_ends_early_leaves_no_trace() -> None:
    slides = [Painted(n) for n in range(4)]
    tiles = lattice(16, 16)
    with ReadAhead(lambda one: laid(slides[int(one.id[-1])], tiles), 2, tiles=48) as reader:
        for n in range(4):
            reader.announce(file(n))
        reader.open(file(0))
        next(reader.pieces())  # and then something went wrong
        reader.let_go()
        reader.open(file(2))  # 1 was refused before its turn
        assert_right(list(reader.pieces()), tiles, 2)
        reader.let_go()
        reader.open(file(3))
        assert_right(list(reader.pieces()), tiles, 3)
        reader.let_go()
    assert all(slide.closed for slide in slides)


def test_a_slide_that_cannot_be_opened_says_so_at_its_turn_and_stops_no_other() -> None:
    def lay(one: SlideFile) -> Laid:
        if one == file(1):
            raise SlideError("it is cut short", "damaged")
        return laid(Painted(int(one.id[-1])), lattice(4, 4))

    with ReadAhead(lay, 2, tiles=64) as reader:
        for n in range(3):
            reader.announce(file(n))
        reader.open(file(0))
        list(reader.pieces())
        reader.let_go()
        with pytest.raises(SlideError, match="cut short"):
            reader.open(file(1))
        reader.let_go()
        reader.open(file(2))
        assert_right(list(reader.pieces()), lattice(4, 4), 2)


def test_waiting_is_measured_where_reading_is_slow_and_is_none_where_it_is_quick() -> None:
    def waited(read_seconds: float, encode_seconds: float) -> float:
        with ReadAhead(
            lambda _: laid(Painted(0, lambda: time.sleep(read_seconds)), lattice(8, 8)), 2, tiles=32
        ) as reader:
            reader.open(file(0))
            began = time.perf_counter()
            before = reader.waited
            for _ in reader.pieces():
                time.sleep(encode_seconds)
            return (reader.waited - before) / (time.perf_counter() - began)

    assert waited(0.02, 0.001) > 0.7
    assert waited(0.001, 0.1) < 0.3


def test_tiles_that_are_damaged_are_lost_and_none_beside_them() -> None:
    class Scratched(Painted):
        def region(self, x_um, y_um, width_um, height_um, size_px):  # type: ignore[no-untyped-def]
            if x_um <= 40 < x_um + width_um and y_um <= 24 < y_um + height_um:
                raise SlideError("a scratch", "damaged")
            return super().region(x_um, y_um, width_um, height_um, size_px)

    tiles = lattice(8, 4)
    with ReadAhead(lambda _: laid(Scratched(), tiles), 2, tiles=64) as reader:
        reader.open(file(0))
        pieces = list(reader.pieces())
    lost = [n for piece in pieces for n in piece.damaged]
    assert [tiles.grid[n].tolist() for n in lost] == [[2, 1]] and [p.met for p in pieces if p.damaged] == ["a scratch"]
    kept = [n for piece in pieces for n in piece.tiles]
    assert sorted(kept + lost) == list(range(32))
    for piece in pieces:
        for n, picture in zip(piece.tiles, piece.pictures, strict=True):
            assert (picture == np.array((*tiles.grid[n].tolist(), 0), np.uint8)).all()
