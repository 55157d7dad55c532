"""The ledger counts without gaps, whoever writes at once, and is put right with the spool at every start."""

import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sql

from pipeline.node.ledger import Ledger, open_ledger, tables
from pipeline.node.nouns import NO_ROOM, OTHER_BYTES, Arrival, Place, Refused
from pipeline.node.spool import Spool, open_keys
from tests.pipeline.test_postgres import INITDB, cluster

from .scanner import a_slice, write
from .test_spool import admitted, coming

__all__ = ["cluster"]  # a fixture

POSTGRES = [pytest.mark.slow, pytest.mark.skipif(INITDB is None, reason="no Postgres on this machine")]


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=POSTGRES)])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ledger]:
    if request.param == "sqlite":
        made = open_ledger(tmp_path / "state")
    else:
        made = Ledger(request.getfixturevalue("cluster").uri)
        tables.drop_all(made.engine)
        tables.create_all(made.engine)
    yield made
    made.close()


def arrival(number: int = 0, study: str = "s" * 20, series: str = "r" * 20, sha256: str = "") -> Arrival:
    place = Place(study=study, series=series, object=f"{number:020d}")
    return Arrival(place=place, bytes=number, sha256=sha256 or f"{number:064d}", kind="1.2.3", source="scanner")


def test_arrivals_are_counted_once_and_in_order(ledger: Ledger) -> None:
    assert [ledger.record(arrival(number)) for number in (1, 2, 1, 3)] == [True, True, False, True]
    study = ledger.study("s" * 20)
    assert study is not None and study.objects == 3 and study.series == {"r" * 20: 3}
    assert [found.bytes for found in ledger.since("s" * 20)] == [1, 2, 3]
    assert [found.bytes for found in ledger.since("s" * 20, 2)] == [3]
    assert ledger.study("unknown") is None


def test_other_bytes_under_a_known_uid_are_refused_even_after_it_was_let_go(ledger: Ledger) -> None:
    ledger.record(arrival(1))
    ledger.agree(arrival(1))
    ledger.forget(arrival(1).place)
    assert ledger.since("s" * 20) == [] and ledger.known((arrival(1).place.object,)) == {}
    for ask in (ledger.record, ledger.agree):
        with pytest.raises(Refused) as refused:
            ask(arrival(1, sha256="f" * 64))
        assert refused.value.reason is OTHER_BYTES
    assert ledger.record(arrival(1)) is False
    assert len(ledger.since("s" * 20)) == 1


def test_what_many_threads_write_at_once_has_no_gaps(ledger: Ledger) -> None:
    def write_some(first: int) -> None:
        for number in range(first, first + 20):
            ledger.record(arrival(number))
            ledger.refuse(NO_ROOM, "scanner")

    threads = [threading.Thread(target=write_some, args=(first,)) for first in (0, 10, 100, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    study = ledger.study("s" * 20)
    assert study is not None and study.objects == 70, "0 to 29, 100 to 119 and 200 to 219"
    assert len(ledger.since("s" * 20)) == 70 and len(ledger.since("s" * 20, 69)) == 1
    assert ledger.refused() == {("no_room", "scanner"): 80}


def test_a_revision_holds_what_came_before_it_and_late_objects_make_the_next(ledger: Ledger, tmp_path: Path) -> None:
    assert ledger.freeze("s" * 20) is None
    for number in (1, 2):
        ledger.record(arrival(number))
    assert [study.study for study in ledger.waiting()] == ["s" * 20]
    first = ledger.freeze("s" * 20)
    assert first is not None and (first.number, first.objects) == (1, 2)
    assert ledger.freeze("s" * 20) == first and ledger.waiting() == []
    ledger.record(arrival(1))
    assert ledger.waiting() == [], "an object that was there already is nothing new"
    ledger.record(arrival(3))
    assert [study.frozen for study in ledger.waiting()] == [2]
    second = ledger.freeze("s" * 20)
    assert second is not None and (second.number, second.objects) == (2, 3) and second.digest != first.digest
    assert ledger.revision("s" * 20, 1) == first
    spool = Spool(tmp_path / "state", open_keys(tmp_path / "state"))
    assert [held.number for held in ledger.held(first, spool)] == [1, 2]


def test_the_same_objects_have_the_same_digest_in_whatever_order_they_came(tmp_path: Path) -> None:
    digests = set()
    for order in ((1, 2, 3), (3, 1, 2)):
        ledger = open_ledger(tmp_path / str(order))
        for number in order:
            ledger.record(arrival(number))
        revision = ledger.freeze("s" * 20)
        assert revision is not None
        digests.add(revision.digest)
        ledger.close()
    assert len(digests) == 1


def test_the_one_silent_for_longest_waits_first(ledger: Ledger) -> None:
    ledger.record(arrival(1, study="b" * 20), datetime(2026, 1, 2, tzinfo=UTC))
    ledger.record(arrival(2, study="a" * 20), datetime(2026, 1, 3, tzinfo=UTC))
    ledger.record(arrival(3, study="b" * 20), datetime(2026, 1, 4, tzinfo=UTC))
    assert [(study.study[0], study.first.day, study.last.day) for study in ledger.waiting()] == [
        ("a", 3, 3),
        ("b", 2, 4),
    ]


def test_a_start_learns_of_objects_that_have_no_row_and_tells_of_lost_ones(tmp_path: Path) -> None:
    spool, ledger = Spool(tmp_path / "state", open_keys(tmp_path / "state")), open_ledger(tmp_path / "state")
    files = [write(tmp_path / f"{number}.dcm", a_slice()) for number in range(4)]
    arrivals = [admitted(spool, path) for path in files]
    coming(spool, files[0])
    for known in arrivals[:3]:
        ledger.record(known)
    spool.path(arrivals[0].place).unlink()
    os_truncate(spool.path(arrivals[1].place))
    strange = spool.folder / "no" / "key" / "at all.dcm"
    strange.parent.mkdir(parents=True)
    strange.write_text("no object")
    told = ledger.reconcile(spool)
    assert (told.parts, told.learned, told.strange) == (1, 1, 1)
    assert set(told.lost) == {arrivals[0].place, arrivals[1].place}
    assert strange.exists()
    assert set(ledger.known(tuple(one.place.object for one in arrivals))) == {one.place.object for one in arrivals[2:]}
    for again, path in zip(arrivals[:2], files[:2], strict=True):
        assert admitted(spool, path) == again, "what was lost may be sent again"
        ledger.record(again)
    assert ledger.reconcile(spool).lost == ()
    ledger.close()


def os_truncate(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.truncate(100)


def test_a_ledger_of_sqlite_outlives_a_power_cut_and_waits_for_others(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    with ledger.engine.connect() as connection:
        said = [connection.execute(sql.text(f"PRAGMA {word}")).scalar() for word in ("journal_mode", "synchronous")]
    assert said == ["wal", 2]
    ledger.close()
