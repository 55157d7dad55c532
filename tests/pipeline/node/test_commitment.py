"""Who asks whether its objects are safe here is told the truth, even when the node is killed in between."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, MRImageStorage, generate_uid
from pynetdicom import AE, evt
from pynetdicom.sop_class import StorageCommitmentPushModel, StorageCommitmentPushModelInstance

from pipeline.node import commitment
from pipeline.node.config import Peer

from .scanner import a_node, a_study, free_port, read, storescu, until

pytestmark = pytest.mark.slow


class Archive:
    """Somebody who asks, and listens for the answer."""

    def __init__(self) -> None:
        self.port, self.told = free_port(), list[tuple[int, Dataset]]()

    @contextmanager
    def listening(self) -> Iterator[None]:
        entity = AE("ARCHIVE")
        entity.add_supported_context(StorageCommitmentPushModel, scu_role=True, scp_role=True)
        handlers = [(evt.EVT_N_EVENT_REPORT, self._hear)]
        server = entity.start_server(("127.0.0.1", self.port), block=False, evt_handlers=handlers)
        try:
            yield
        finally:
            server.shutdown()

    def _hear(self, event: Any) -> tuple[int, None]:
        self.told.append((event.event_type, event.event_information))
        return 0x0000, None

    def ask(self, port: int, objects: Sequence[tuple[str, str]], caller: str = "ARCHIVE", transaction: str = "") -> int:
        """The status of the answer to the request."""
        asked = Dataset()
        asked.TransactionUID = transaction or generate_uid()
        asked.ReferencedSOPSequence = []
        for kind, uid in objects:
            item = Dataset()
            item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = kind, uid
            asked.ReferencedSOPSequence.append(item)
        entity = AE(caller)
        entity.add_requested_context(StorageCommitmentPushModel)
        association = entity.associate("127.0.0.1", port, ae_title="HILUM")
        assert association.is_established
        status, _ = association.send_n_action(asked, 1, StorageCommitmentPushModel, StorageCommitmentPushModelInstance)
        association.release()
        return int(status.Status)

    @property
    def peers(self) -> dict[str, Peer]:
        return {"scanner": Peer(aet="SCANNER"), "archive": Peer(aet="ARCHIVE", host="127.0.0.1", port=self.port)}


def test_what_is_here_is_safe_and_what_is_not_is_told(tmp_path: Path) -> None:
    archive, sent = Archive(), a_study(tmp_path / "sent", slices=3)
    uids = [str(read(path).SOPInstanceUID) for path in sent]
    with a_node(tmp_path / "state", peers=archive.peers) as node, archive.listening():
        assert storescu(node.port, *sent).returncode == 0
        assert archive.ask(node.port, [(CTImageStorage, uid) for uid in uids]) == 0x0000
        assert until(lambda: archive.told)
        kind, told = archive.told.pop()
        assert kind == 1 and {item.ReferencedSOPInstanceUID for item in told.ReferencedSOPSequence} == set(uids)
        node.spool.remove(node.arrived[1].place)
        asked = [(MRImageStorage, uids[0]), *((CTImageStorage, uid) for uid in uids[1:]), (CTImageStorage, "1.2.3")]
        assert archive.ask(node.port, asked) == 0x0000
        assert until(lambda: archive.told)
        kind, told = archive.told.pop()
        failed = {item.ReferencedSOPInstanceUID: item.FailureReason for item in told.FailedSOPSequence}
        assert kind == 2 and failed == {uids[0]: 0x0119, uids[1]: 0x0112, "1.2.3": 0x0112}
        assert [item.ReferencedSOPInstanceUID for item in told.ReferencedSOPSequence] == [uids[2]]
        assert until(lambda: node.listener.commitments.waiting() == 0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # pynetdicom drops a socket unclosed
def test_the_answer_waits_for_a_peer_that_is_not_there_and_outlives_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commitment, "FIRST_PAUSE_SECONDS", 0.2)
    archive, transaction = Archive(), generate_uid()
    with a_node(tmp_path / "state", peers=archive.peers) as node:
        assert archive.ask(node.port, [(CTImageStorage, "1.2.3")], transaction=transaction) == 0x0000
        time.sleep(0.5)
        assert node.listener.commitments.waiting() == 1
        assert not [path for path in (tmp_path / "state").rglob("*") if transaction in path.name]
    with a_node(tmp_path / "state", peers=archive.peers) as node, archive.listening():
        assert until(lambda: archive.told, 20)
        assert archive.told[0][1].TransactionUID == transaction
        assert until(lambda: node.listener.commitments.waiting() == 0)


def test_a_request_that_nobody_could_answer_is_refused(tmp_path: Path) -> None:
    archive = Archive()
    with a_node(tmp_path / "state", peers=archive.peers) as node:
        assert archive.ask(node.port, [(CTImageStorage, "1.2.3")], caller="SCANNER") == 0x0124
        assert archive.ask(node.port, []) == 0x0115
        assert node.codes() == {"no_address": 1, "not_understood": 1}
        assert node.listener.commitments.waiting() == 0
