"""Other systems of the hospital: what a study should hold, whether they take an object, and whether they kept it."""

import json
import logging
import socket
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import UID

from .config import Node, Peer, Security
from .security import client_side

logger = logging.getLogger(__name__)


class PeerError(OSError):
    """A system could not be reached, or did not answer as the standard has it: worth another try later."""


class Refused(ValueError):
    """A system answered, and will not take or do this however often it is asked."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A peer, how the config calls it, and who we are when we call."""

    name: str
    peer: Peer
    aet: str
    security: Security | None = None

    @staticmethod
    def to(name: str, node: Node) -> "Line":
        """The line to a peer of that name."""
        return Line(name=name, peer=node.peers[name], aet=node.receiving.aet, security=node.receiving.security)


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What became of objects that were handed over, by SOP Instance UID."""

    stored: tuple[str, ...] = ()
    unwanted: dict[str, str] = field(default_factory=dict)
    """Refused for good, and why."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How many objects a source says that a study has, by SeriesInstanceUID."""

    series: dict[str, int]
    without_images: frozenset[str] = frozenset()
    """Those of them that hold no images, by their modality."""

    @property
    def objects(self) -> int:
        return sum(self.series.values())


def counts_of(study_uid: str, line: Line) -> Counts:
    """What the source has of a study, but for series that hold no images. UIDs are asked for and answered, never kept."""
    wanted = {"StudyInstanceUID": study_uid, "SeriesInstanceUID": "", "Modality": ""}
    wanted["NumberOfSeriesRelatedInstances"] = ""
    if line.peer.web:
        found = _answered(line, f"studies/{study_uid}/series", {"includefield": "NumberOfSeriesRelatedInstances"})
        # an archive need not say how many a series has; then its objects are counted
    else:
        found = _found("SERIES", wanted, line)
    series: dict[str, int] = {}
    for one in found:
        uid, count = str(one.get("SeriesInstanceUID", "")), one.get("NumberOfSeriesRelatedInstances")
        known = count not in (None, "")
        series[uid] = int(str(count)) if known else len(kept(study_uid, uid, line))
    without = frozenset(str(one.get("SeriesInstanceUID", "")) for one in found if one.get("Modality") in NO_IMAGES)
    return Counts(series=series, without_images=without)


NO_IMAGES = frozenset((
    "AU", "ANN", "ASMT", "DOC", "ECG", "EEG", "EMG", "EOG", "EPS", "FID", "HD", "KER", "KO", "LEN", "M3D", "OAM", "PLAN",
    "POS", "PR", "REG", "RESP", "RTDOSE", "RTPLAN", "RTRECORD", "RTSTRUCT", "RWV", "SEG", "SMR", "SR", "SRF", "STAIN",
    "TEXTUREMAP", "VA",
))  # fmt: skip
"""Modalities (PS3.3 C.7.3.1.1.1) whose series hold none."""


def kept(study_uid: str, series_uid: str, line: Line) -> frozenset[str]:
    """The objects of a series that a system has, by what it answers now: read back."""
    return frozenset(classes_of(study_uid, series_uid, line))


def classes_of(study_uid: str, series_uid: str, line: Line) -> dict[str, str]:
    """Of each object of a series its SOP class; empty where the system does not say, which it need not."""
    if line.peer.web:
        found = _answered(line, f"studies/{study_uid}/series/{series_uid}/instances", {})
    else:
        wanted = {
            "StudyInstanceUID": study_uid,
            "SeriesInstanceUID": series_uid,
            "SOPInstanceUID": "",
            "SOPClassUID": "",
        }
        found = _found("IMAGE", wanted, line)
    return {str(one.get("SOPInstanceUID", "")): str(one.get("SOPClassUID") or "") for one in found}


def accepted(kinds: Sequence[str], line: Line) -> frozenset[str]:
    """Which SOP classes a system would take, as it says when an association begins; the web does not tell beforehand."""
    if line.peer.web:
        return frozenset(kinds)
    with _associated(line, [(kind, ()) for kind in kinds]) as association:
        return frozenset(str(context.abstract_syntax) for context in association.accepted_contexts)


def echo(line: Line) -> None:
    """Whether it answers at all, as nothing else does: a C-ECHO, or a question to its web side that asks for one study."""
    if line.peer.web:
        _answered(line, "studies", {"limit": "1"})
        return
    from pynetdicom.sop_class import Verification

    with _associated(line, [(str(Verification), ())]) as association:
        if not association.accepted_contexts:
            raise Refused(f"{line.name} hears us, and does not answer C-ECHO. Nothing else may be wrong.")
        status = association.send_c_echo()
        if status.get("Status") != 0:
            raise PeerError(f"{line.name} answered {_code(status)} to a C-ECHO. Look at its log.")


def send(paths: Sequence[Path], line: Line) -> Sent:
    """Hand over objects. Sending again what is there already changes nothing: they keep their UIDs."""
    return _stowed(paths, line) if line.peer.web else _stored(paths, line)


def ask_commitment(references: Sequence[tuple[str, str]], line: Line, transaction: str) -> None:
    """Ask a system to vouch for objects (SOP class, SOP instance); its answer comes to our listener under that number."""
    from pynetdicom.sop_class import StorageCommitmentPushModel, StorageCommitmentPushModelInstance

    if not line.peer.host:
        raise Refused(
            f"{line.name} has no host to be asked to vouch at, for that goes by DIMSE. Let the route read back."
        )
    request = Dataset()
    request.TransactionUID = transaction
    request.ReferencedSOPSequence = [_reference(*one) for one in references]
    with _associated(line, [(str(StorageCommitmentPushModel), ())]) as association:
        if not association.accepted_contexts:
            raise Refused(
                f"{line.name} does not vouch for objects (storage commitment). Let the route read back instead."
            )
        status, _ = association.send_n_action(
            request, 1, StorageCommitmentPushModel, StorageCommitmentPushModelInstance
        )
        if status.get("Status") != 0:
            raise PeerError(
                f"{line.name} answered {_code(status)} when asked to vouch for objects. It is asked again later."
            )


def _reference(sop_class: str, instance: str) -> Dataset:
    one = Dataset()
    one.ReferencedSOPClassUID, one.ReferencedSOPInstanceUID = sop_class, instance
    return one


# by DIMSE


@contextmanager
def _associated(line: Line, contexts: Sequence[tuple[str, Sequence[str]]]) -> Iterator[Any]:
    """An association with these presentation contexts, ended however its use ends."""
    from pynetdicom import AE  # not at the top: whoever only reads rules needs no network

    _knock(line)
    entity = AE(ae_title=line.aet)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = entity.connection_timeout = (
        line.peer.timeout_s
    )
    for abstract, transfer in contexts:
        entity.add_requested_context(abstract, list(transfer) or None)
    tls = (client_side(line.security), line.peer.host) if line.security and line.peer.tls else None
    association = entity.associate(line.peer.host, line.peer.port, ae_title=line.peer.aet, tls_args=tls)
    if association.is_rejected:
        raise PeerError(
            f"{line.name} refuses associations by {line.aet} just now. Look whether it knows that AE title."
        )
    if not association.is_established:
        raise PeerError(f"{line.name} cannot be reached. Look at its host, port and TLS settings, and whether it runs.")
    try:
        yield association
    finally:
        association.release()


def _knock(line: Line) -> None:
    """Whether anybody is there, before pynetdicom asks: it leaves its socket open where nobody is."""
    try:
        socket.create_connection((line.peer.host, line.peer.port), timeout=line.peer.timeout_s).close()
    except OSError as error:
        raise PeerError(f"{line.name} cannot be reached ({type(error).__name__}). Look whether it runs.") from None


PENDING = (0xFF00, 0xFF01)


def _found(level: str, wanted: dict[str, str], line: Line) -> list[Dataset]:
    from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind as Find

    question = Dataset()
    question.QueryRetrieveLevel = level
    for keyword, value in wanted.items():
        setattr(question, keyword, value)
    found = []
    with _associated(line, [(str(Find), ())]) as association:
        if not association.accepted_contexts:
            raise Refused(f"{line.name} answers no questions (C-FIND). Let the route wait for quiet time instead.")
        for status, answer in association.send_c_find(question, Find):
            if status and status.Status in PENDING and answer is not None:
                found.append(answer)
            elif not status or status.Status != 0:
                raise PeerError(f"{line.name} answered {_code(status)} to a question. It is asked again later.")
    return found


TRANSIENT = range(0xA700, 0xA800)
"""PS3.4 B.2.3: out of resources. All other failures stay what they are."""


def _stored(paths: Sequence[Path], line: Line) -> Sent:
    metas = {path: pydicom.dcmread(path, stop_before_pixels=True).file_meta for path in paths}
    contexts: dict[str, set[str]] = {}
    for meta in metas.values():
        contexts.setdefault(str(meta.MediaStorageSOPClassUID), set()).add(str(meta.TransferSyntaxUID))
    stored, unwanted = [], {}
    with _associated(line, [(kind, sorted(syntaxes)) for kind, syntaxes in contexts.items()]) as association:
        taken = {
            (str(one.abstract_syntax), str(syntax))
            for one in association.accepted_contexts
            for syntax in one.transfer_syntax
        }
        for path, meta in metas.items():
            uid = str(meta.MediaStorageSOPInstanceUID)
            if (str(meta.MediaStorageSOPClassUID), str(meta.TransferSyntaxUID)) not in taken:
                unwanted[uid] = (
                    f"takes no {UID(meta.MediaStorageSOPClassUID).name} in {UID(meta.TransferSyntaxUID).name}"
                )
                continue
            status = association.send_c_store(path)
            code = status.get("Status")
            if code is None or code in TRANSIENT:
                raise PeerError(f"{line.name} answered {_code(status)} to an object. It is sent again later.")
            if code == 0 or 0xB000 <= code <= 0xBFFF:  # stored, and it changed an attribute or wants to say something
                stored.append(uid)
            else:
                unwanted[uid] = f"answered {_code(status)}"
    return Sent(stored=tuple(stored), unwanted=unwanted)


def _code(status: Dataset) -> str:
    code = status.get("Status") if status else None
    return "nothing" if code is None else f"0x{code:04X}"


# by DICOMweb


def _web(line: Line) -> Any:
    import requests

    session = requests.Session()
    session.trust_env = False  # a hospital's own addresses: no proxy of the surroundings
    if line.peer.token:
        session.headers["Authorization"] = f"Bearer {line.peer.token.read_text().strip()}"
    if line.security and line.peer.tls:
        session.cert = str(line.security.certificate), str(line.security.key)
        session.verify = str(line.security.authority)
    return session


def _asked(line: Line, method: str, place: str, **words: Any) -> Any:
    import requests

    try:
        with _web(line) as session:
            answer = session.request(
                method, f"{line.peer.web.rstrip('/')}/{place}", timeout=line.peer.timeout_s, **words
            )
    except requests.RequestException as error:
        raise PeerError(
            f"{line.name} cannot be reached ({type(error).__name__}). Look at its address and whether it runs."
        ) from None
    if answer.status_code in (408, 429) or answer.status_code >= 500:
        raise PeerError(f"{line.name} answered {answer.status_code}. It is asked again later.")
    if answer.status_code in (401, 403):
        raise Refused(f"{line.name} does not let us in ({answer.status_code}). Look at the token or certificate.")
    return answer


def _answered(line: Line, place: str, words: dict[str, str]) -> list[Dataset]:
    answer = _asked(line, "GET", place, params=words, headers={"Accept": "application/dicom+json"})
    if answer.status_code in (204, 404):
        return []
    if answer.status_code != 200:
        raise Refused(f"{line.name} answered {answer.status_code} to a question. Look at its address.")
    try:
        return [Dataset.from_json(one) for one in answer.json()]
    except (ValueError, TypeError, KeyError):
        raise PeerError(
            f"{line.name} answered a question with what is no DICOM JSON. It is asked again later."
        ) from None


def _stowed(paths: Sequence[Path], line: Line) -> Sent:
    """One request, from a file: an archive may need to know its length, and not all take it in pieces."""
    border = uuid.uuid4().hex
    with tempfile.TemporaryFile() as body:
        _write_parts(body, paths, border)
        body.seek(0)
        kind = f'multipart/related; type="application/dicom"; boundary={border}'
        answer = _asked(
            line, "POST", "studies", data=body, headers={"Content-Type": kind, "Accept": "application/dicom+json"}
        )
    if answer.status_code not in (200, 202, 409):
        raise Refused(f"{line.name} answered {answer.status_code} to objects. Look at what it accepts.")
    try:
        said = Dataset.from_json(json.loads(answer.text))
    except (ValueError, TypeError, KeyError):
        raise PeerError(f"{line.name} did not say what became of objects. They are sent again later.") from None
    unwanted = {
        str(one.get("ReferencedSOPInstanceUID", "")): f"answered 0x{int(one.get('FailureReason', 0)):04X}"
        for one in said.get("FailedSOPSequence") or ()
    }
    # 200 and an empty answer is no proof: what is not named was not stored
    stored = tuple(str(one.ReferencedSOPInstanceUID) for one in said.get("ReferencedSOPSequence") or ())
    return Sent(stored=stored, unwanted=unwanted)


def _write_parts(body: IO[bytes], paths: Sequence[Path], border: str) -> None:
    for path in paths:
        body.write(f"--{border}\r\nContent-Type: application/dicom\r\n\r\n".encode())
        with path.open("rb") as source:
            while piece := source.read(1 << 20):
                body.write(piece)
        body.write(b"\r\n")
    body.write(f"--{border}--\r\n".encode())
