"""What a target says of our results is believed of that target, for what it was asked, and of nobody else."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, generate_uid

from pipeline.node.config import Node, Peer
from pipeline.node.ledger import Ledger, open_ledger
from pipeline.node.nouns import Refused
from pipeline.node.peers import Line, ask_commitment
from pipeline.node.peers import Refused as PeerRefused
from pipeline.node.routes import Route
from pipeline.node.rules import Rule
from pipeline.node.spool import open_keys
from pipeline.node.vouching import Vouchings

STORY, OBJECTS = "f" * 20 + "-1-liver-1", ("1.2.3.1", "1.2.3.2", "1.2.3.3")


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = open_ledger(tmp_path)
    yield ledger
    ledger.close()


@pytest.fixture
def vouchings(ledger: Ledger, tmp_path: Path) -> Vouchings:
    return Vouchings(ledger, open_keys(tmp_path))


def told(transaction: str, kept: Sequence[str], failed: Sequence[str] = ()) -> Dataset:
    answer = Dataset()
    answer.TransactionUID = transaction
    answer.ReferencedSOPSequence = [named(uid) for uid in kept]
    answer.FailedSOPSequence = [named(uid) for uid in failed]
    return answer


def named(uid: str) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = CTImageStorage, uid
    return item


def test_a_target_that_keeps_all_has_vouched(vouchings: Vouchings) -> None:
    number = vouchings.begin(STORY, "archive", OBJECTS)
    asked = vouchings.of(STORY, "archive")
    assert asked is not None and asked.asked is None and asked.answered is None
    vouchings.asked(number)
    vouchings.hear(told(number, OBJECTS), "archive")
    asked = vouchings.of(STORY, "archive")
    assert asked is not None and asked.asked and asked.answered and not asked.failed


@pytest.mark.parametrize("failed", [["1.2.3.2"], []], ids=["said", "passed over in silence"])
def test_what_a_target_does_not_say_it_keeps_it_does_not_keep(
    vouchings: Vouchings, tmp_path: Path, failed: list[str]
) -> None:
    number = vouchings.begin(STORY, "archive", OBJECTS)
    vouchings.hear(told(number, ["1.2.3.1", "1.2.3.3", "1.2.3.99"], failed), "archive")
    asked = vouchings.of(STORY, "archive")
    assert asked is not None and asked.failed == {open_keys(tmp_path).object("1.2.3.2")}


def test_nobody_else_can_vouch_and_nobody_for_what_was_never_asked(vouchings: Vouchings) -> None:
    number = vouchings.begin(STORY, "archive", OBJECTS)
    for transaction, source in ((number, "scanner"), (number, ""), (generate_uid(), "archive"), ("", "archive")):
        with pytest.raises(Refused) as refused:
            vouchings.hear(told(transaction, OBJECTS), source)
        assert refused.value.reason.code == "not_asked"
    asked = vouchings.of(STORY, "archive")
    assert asked is not None and asked.answered is None


def test_the_answer_to_a_question_that_was_asked_anew_is_void(vouchings: Vouchings) -> None:
    first = vouchings.begin(STORY, "archive", OBJECTS)
    second = vouchings.begin(STORY, "archive", OBJECTS)
    with pytest.raises(Refused):
        vouchings.hear(told(first, OBJECTS), "archive")
    vouchings.hear(told(second, OBJECTS), "archive")
    vouchings.forget(STORY)
    assert vouchings.of(STORY, "archive") is None


def test_no_row_holds_a_uid(vouchings: Vouchings, ledger: Ledger, tmp_path: Path) -> None:
    number = vouchings.begin(STORY, "archive", OBJECTS)
    vouchings.hear(told(number, OBJECTS[:1]), "archive")
    ledger.close()
    rows = b"".join(path.read_bytes() for path in tmp_path.glob("ledger.sqlite*")).decode("latin-1")
    assert STORY in rows and not any(uid in rows for uid in (number, *OBJECTS))


def test_whom_nobody_can_call_by_dimse_is_not_to_vouch() -> None:
    web = Peer(aet="PACS", web="https://pacs/dicom-web")
    route = Route(package=Path("p"), take={"ct": Rule()}, targets=("archive",), proof="commitment")
    with pytest.raises(ValueError, match="archive vouch for objects, which has no host"):
        Node(state=Path("s"), peers={"archive": web}, routes={"liver": route})
    with pytest.raises(PeerRefused, match="has no host"):
        ask_commitment([("1.2", "1.2.3")], Line(name="archive", peer=web, aet="HILUM"), "1.2.3.4")
