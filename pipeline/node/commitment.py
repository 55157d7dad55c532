"""Storage commitment for what was received: a peer asks whether its objects are safe here, and is told the ledger's truth.

A request is on the disk before it is said to be understood, so that the answer comes even when the process is killed in
between. The answer goes to the peer on an association of its own, again and again until it is taken or too old.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pynetdicom import build_role
from pynetdicom.ae import ApplicationEntity
from pynetdicom.sop_class import (
    StorageCommitmentPushModel,
    StorageCommitmentPushModelInstance,
)

from .config import Node, Peer
from .ledger import Ledger
from .nouns import NO_ADDRESS, NOT_UNDERSTOOD, UID, Refused
from .security import client_side
from .spool import Spool, sync

logger = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 600.0
"""Between two tries to answer; each pause is twice the one before."""

GIVEN_UP_HOURS = 72
"""A peer that was not there for so long, a weekend, has asked anew or forgotten."""

ALL_SAFE, SOME_NOT = 1, 2
"""Event types (PS3.4 J.3.3)."""

NOT_HERE, OTHER_CLASS = 0x0112, 0x0119
"""Failure reasons (PS3.3 C.14.1.1)."""


class Commitments:
    """Requests that wait for their answer, and the thread that answers."""

    def __init__(self, node: Node, spool: Spool, ledger: Ledger) -> None:
        self._node, self._spool, self._ledger = node, spool, ledger
        self._folder = node.state / "commitments"
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._wake, self._is_over = threading.Event(), False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Answer from now on, also what was asked before this start."""
        self._thread = threading.Thread(target=self._work, name="commitments", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Answer nothing any more; what waits is on the disk."""
        self._is_over = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def ask(self, asked: Dataset, source: str) -> None:
        """Keep a peer's request until it is answered; refused where it makes no sense, or has no address to answer to."""
        peer = self._node.peers.get(source)
        if peer is None or not peer.host:
            raise Refused(NO_ADDRESS)
        transaction = str(asked.get("TransactionUID") or "")
        wanted = [_reference(item) for item in asked.get("ReferencedSOPSequence") or ()]
        if not UID.fullmatch(transaction) or not wanted:
            raise Refused(NOT_UNDERSTOOD)
        request = {"transaction": transaction, "objects": wanted, "peer": source, "asked": time.time(), "tries": 0}
        self._keep(self._folder / f"{self._spool.keys.transaction(transaction)}.json", request)
        self._wake.set()

    def waiting(self) -> int:
        """Requests without an answer."""
        return len(list(self._folder.glob("*.json")))

    def _work(self) -> None:
        while not self._is_over:
            self._wake.clear()
            due = [self._try(path) for path in sorted(self._folder.glob("*.json")) if not self._is_over]
            if not self._is_over:
                self._wake.wait(min(due, default=None))

    def _try(self, path: Path) -> float:
        """Answer a request if it is its turn. Seconds until it is again."""
        request = json.loads(path.read_text())
        pause = min(FIRST_PAUSE_SECONDS * 2 ** min(request["tries"], 16), LONGEST_PAUSE_SECONDS)
        since = time.time() - request.get("tried", 0)
        if request["tries"] and 0 <= since < pause:
            return pause - since
        if self._is_answered(request):
            path.unlink()
        elif time.time() - request["asked"] > GIVEN_UP_HOURS * 3600:
            logger.error("commitment %s: %s was not there for %d hours", path.stem, request["peer"], GIVEN_UP_HOURS)
            path.unlink()
        else:
            self._keep(path, request | {"tries": request["tries"] + 1, "tried": time.time()})
            return pause
        return LONGEST_PAUSE_SECONDS

    def _is_answered(self, request: dict[str, Any]) -> bool:
        peer = self._node.peers.get(request["peer"])
        if peer is None or not peer.host:
            return False
        event, answer = self._answer(request)
        try:
            return self._report(peer, event, answer)
        except Exception as error:  # of a peer that is not there, or not what it should be; another try follows
            logger.warning("commitment: %s could not be told (%s)", request["peer"], type(error).__name__)
            return False

    def _answer(self, request: dict[str, Any]) -> tuple[int, Dataset]:
        keys = {uid: self._spool.keys.object(uid) for _, uid in request["objects"]}
        known = self._ledger.known(tuple(keys.values()))
        safe, unsafe = [], []
        for kind, uid in request["objects"]:
            arrival = known.get(keys[uid])
            if arrival is None or not self._spool.path(arrival.place).exists():
                unsafe.append(_item(kind, uid, NOT_HERE))
            elif arrival.kind != kind:
                unsafe.append(_item(kind, uid, OTHER_CLASS))
            else:
                safe.append(_item(kind, uid))
        logger.info("commitment for %s: %d objects are safe, %d are not here", request["peer"], len(safe), len(unsafe))
        return _information(request["transaction"], safe, unsafe)

    def _report(self, peer: Peer, event: int, answer: Dataset) -> bool:
        entity = ApplicationEntity(self._node.receiving.aet)
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = self._node.receiving.silence_s
        entity.connection_timeout = self._node.receiving.silence_s
        entity.add_requested_context(StorageCommitmentPushModel)
        security = self._node.receiving.security
        tls = (client_side(security), peer.host) if peer.tls and security else None
        role = build_role(StorageCommitmentPushModel, scp_role=True)  # the one who asked for the association is the SCP
        association = entity.associate(peer.host, peer.port, ae_title=peer.aet, ext_neg=[role], tls_args=tls)
        if not association.is_established:
            return False
        try:
            kind, instance = StorageCommitmentPushModel, StorageCommitmentPushModelInstance
            status, _ = association.send_n_event_report(answer, event, kind, instance)
            return status.get("Status") == 0x0000
        finally:
            association.release()

    def _keep(self, path: Path, request: dict[str, Any]) -> None:
        """Whole, on the disk, under a name that says nothing."""
        draft = path.with_suffix(".part")
        with draft.open("w") as stream:
            json.dump(request, stream)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(path)
        sync(path.parent)


def _reference(item: Dataset) -> tuple[str, str]:
    kind, uid = str(item.get("ReferencedSOPClassUID") or ""), str(item.get("ReferencedSOPInstanceUID") or "")
    if not UID.fullmatch(kind) or not UID.fullmatch(uid):
        raise Refused(NOT_UNDERSTOOD)
    return kind, uid


def _item(kind: str, uid: str, failure: int | None = None) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = kind, uid
    if failure is not None:
        item.FailureReason = failure
    return item


def _information(transaction: str, safe: Sequence[Dataset], unsafe: Sequence[Dataset]) -> tuple[int, Dataset]:
    answer = Dataset()
    answer.TransactionUID = transaction
    if safe:
        answer.ReferencedSOPSequence = Items(safe)
    if unsafe:
        answer.FailedSOPSequence = Items(unsafe)
    return (SOME_NOT if unsafe else ALL_SAFE), answer
