"""What other systems are asked and told, with Debian's Orthanc at the other end."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pydicom
import pytest
from pynetdicom import AE, evt
from pynetdicom.sop_class import StorageCommitmentPushModel  # type: ignore[attr-defined]

from pipeline.node.config import Peer
from pipeline.node.peers import Line, PeerError, accepted, ask_commitment, counts_of, kept, send

from .hospital import Orthanc, network_of_its_own

LABELMAP, BINARY = "1.2.840.10008.5.1.4.1.1.66.7", "1.2.840.10008.5.1.4.1.1.66.4"
OWN = "HILUM"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    with network_of_its_own():
        knows = {"hilum": {"AET": OWN, "Host": "127.0.0.1", "Port": 11113, "AllowStorageCommitment": True}}
        orthanc = Orthanc(tmp_path_factory.mktemp("orthanc"), knows)
        orthanc.start()
        yield orthanc
        orthanc.stop()


@pytest.fixture(scope="module")
def slices(shared: Path) -> list[Path]:
    folder = shared / "data/zoo/dicom_ct_siemens_j2k"
    return sorted(path for path in folder.rglob("*") if path.is_file() and pydicom.misc.is_dicom(path))[:4]


def line(**values: object) -> Line:
    return Line(name="archive", peer=Peer(**values), aet=OWN)


DIMSE = line(aet="ORTHANC", host="127.0.0.1", port=14242, timeout_s=20)
WEB = line(aet="ORTHANC", web="http://127.0.0.1:18042/dicom-web", timeout_s=20)


def uids(paths: list[Path]) -> set[str]:
    return {str(pydicom.dcmread(path, stop_before_pixels=True).file_meta.MediaStorageSOPInstanceUID) for path in paths}


@pytest.fixture(scope="module")
def whole(slices: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same slices with the UIDs that an anonymiser emptied."""
    folder, made = tmp_path_factory.mktemp("whole"), []
    for path in slices:
        dataset = pydicom.dcmread(path)
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.PatientID = "1.2.3.4", "1.2.3.4.5", "x"
        dataset.save_as(folder / f"{len(made)}.dcm")
        made.append(folder / f"{len(made)}.dcm")
    return made


@pytest.mark.parametrize("peer", [DIMSE, WEB], ids=["C-STORE", "STOW"])
def test_what_was_sent_is_there_and_sending_again_adds_nothing(archive: Orthanc, whole: list[Path], peer: Line) -> None:
    for _ in range(2):
        sent = send(whole, peer)
        assert set(sent.stored) == uids(whole) and not sent.unwanted
    assert len(archive.ask("instances")) == len(whole)  # type: ignore[arg-type]


@pytest.mark.parametrize("peer", [DIMSE, WEB], ids=["C-FIND", "QIDO"])
def test_an_archive_is_asked_how_much_a_study_has_and_what_it_kept(
    archive: Orthanc, whole: list[Path], peer: Line
) -> None:
    send(whole, DIMSE)
    assert counts_of("1.2.3.4", peer).series == {"1.2.3.4.5": len(whole)}
    assert kept("1.2.3.4", "1.2.3.4.5", peer) == uids(whole)
    assert counts_of("1.2.3.999", peer).objects == 0 and not kept("1.2.3.4", "1.2.3.999", peer)


def test_an_archive_says_beforehand_that_it_takes_no_label_maps(archive: Orthanc) -> None:
    assert accepted([LABELMAP, BINARY], DIMSE) == {BINARY}


def test_an_object_of_a_kind_it_does_not_take_is_told_and_the_others_are_stored(
    archive: Orthanc, whole: list[Path], tmp_path: Path
) -> None:
    odd = pydicom.dcmread(whole[0])
    odd.file_meta.MediaStorageSOPClassUID = odd.SOPClassUID = LABELMAP
    odd.file_meta.MediaStorageSOPInstanceUID = odd.SOPInstanceUID = "1.2.3.77"
    odd.save_as(tmp_path / "odd.dcm")
    sent = send([tmp_path / "odd.dcm", *whole[:2]], DIMSE)
    assert set(sent.stored) == uids(whole[:2])
    assert list(sent.unwanted) == ["1.2.3.77"] and "takes no" in sent.unwanted["1.2.3.77"]


def test_an_archive_vouches_for_what_it_has_and_for_nothing_else(archive: Orthanc, whole: list[Path]) -> None:
    send(whole, DIMSE)
    told, there = [], threading.Event()

    def answered(event: evt.Event) -> tuple[int, None]:
        told.append(event.event_information)
        there.set()
        return 0x0000, None

    listener = AE(ae_title=OWN)
    listener.add_supported_context(StorageCommitmentPushModel, scu_role=True, scp_role=True)
    server = listener.start_server(("127.0.0.1", 11113), block=False, evt_handlers=[(evt.EVT_N_EVENT_REPORT, answered)])
    try:
        kind = "1.2.840.10008.5.1.4.1.1.2"
        ask_commitment([*((kind, uid) for uid in sorted(uids(whole))), (kind, "1.2.3.999")], DIMSE, "1.2.3.4.5.6")
        assert there.wait(30)
    finally:
        server.shutdown()
    assert told[0].TransactionUID == "1.2.3.4.5.6"
    assert {one.ReferencedSOPInstanceUID for one in told[0].ReferencedSOPSequence} == uids(whole)
    assert [one.ReferencedSOPInstanceUID for one in told[0].FailedSOPSequence] == ["1.2.3.999"]


@pytest.mark.parametrize(
    "peer",
    [line(aet="X", host="127.0.0.1", port=1, timeout_s=2), line(aet="X", web="http://127.0.0.1:1/", timeout_s=2)],
)
@pytest.mark.filterwarnings(
    "ignore:unclosed <socket", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # pynetdicom's
def test_a_system_that_is_away_is_worth_another_try(peer: Line, whole: list[Path]) -> None:
    with pytest.raises(PeerError, match="cannot be reached"):
        send(whole[:1], peer)
    with pytest.raises(PeerError, match="cannot be reached"):
        counts_of("1.2.3", peer)
