"""What dcmtk sends arrives as it was, is said to be safe when it is, and whoever is not known is not heard."""

import shutil
import socket
import subprocess
import threading
from pathlib import Path

import imagecodecs
import pydicom
import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)
from pynetdicom import AE

from pipeline.node import contexts
from pipeline.node.config import Node, Peer, Receiving
from pipeline.node.nouns import REASONS
from pipeline.node.spool import hash_of

from .scanner import SCANNER, a_node, a_slice, a_study, echoscu, read, storescu, until, write

pytestmark = pytest.mark.slow


def test_a_study_arrives_as_it_was_sent(tmp_path: Path) -> None:
    sent = a_study(tmp_path / "sent", slices=4, series=2)
    with a_node(tmp_path / "state") as node:
        assert echoscu(node.port).returncode == 0
        said = storescu(node.port, *sent)
        assert said.returncode == 0, said.stdout + said.stderr
        assert {read(path).SOPInstanceUID: read(path) for path in node.files()} == {
            read(path).SOPInstanceUID: read(path) for path in sent
        }
        (study,) = node.ledger.waiting()
        assert study.objects == 8 and sorted(study.series.values()) == [4, 4]
        assert [one.source for one in node.arrived] == ["scanner"] * 8
        assert all(hash_of(node.spool.path(one.place)) == one.sha256 for one in node.arrived)
        assert node.parts() == [] and node.codes() == {}


def test_sent_again_it_is_the_same_object_and_changed_it_is_refused(tmp_path: Path) -> None:
    (sent,) = a_study(tmp_path / "sent", slices=1)
    with a_node(tmp_path / "state") as node:
        for _ in range(2):
            assert storescu(node.port, sent).returncode == 0
        assert len(node.arrived) == 1
        changed = read(sent)
        changed.SeriesDescription = "changed"
        said = storescu(node.port, write(tmp_path / "changed.dcm", changed))
        assert said.returncode != 0 and "0x111" in said.stdout + said.stderr
        assert [read(path) for path in node.files()] == [read(sent)]
        assert node.codes() == {"other_bytes": 1} and node.parts() == []


def test_the_peer_is_told_why(tmp_path: Path) -> None:
    data = a_slice()
    with a_node(tmp_path / "state") as node, _associated(node.port, data) as association:
        assert association.send_c_store(data).Status == 0x0000
        data.SeriesDescription = "changed"
        answer = association.send_c_store(data)
        assert (answer.Status, answer.ErrorComment) == (0x0111, REASONS["other_bytes"].words[:64])


class _associated:
    """pynetdicom as the sender, for what dcmtk cannot be made to do."""

    def __init__(self, port: int, data: pydicom.Dataset) -> None:
        entity = AE("SCANNER")
        entity.add_requested_context(data.SOPClassUID, data.file_meta.TransferSyntaxUID)
        self.association = entity.associate("127.0.0.1", port, ae_title="HILUM")
        assert self.association.is_established

    def __enter__(self):
        return self.association

    def __exit__(self, *_: object) -> None:
        if self.association.is_established:
            self.association.release()


SYNTAXES = {
    "-xi": ImplicitVRLittleEndian,
    "-xb": ExplicitVRBigEndian,
    "-xd": DeflatedExplicitVRLittleEndian,
    "-xr": RLELossless,
    "-xv": JPEG2000Lossless,
}


@pytest.mark.parametrize("option", SYNTAXES)
def test_objects_come_in_the_transfer_syntax_they_were_sent_in(tmp_path: Path, option: str) -> None:
    syntax = SYNTAXES[option]
    data = a_slice(side=64)
    if syntax == JPEG2000Lossless:
        data.PixelData = encapsulate([imagecodecs.jpeg2k_encode(data.pixel_array, codecformat="j2k", reversible=True)])
    elif syntax == RLELossless:
        data.compress(syntax, generate_instance_uid=False)
    data.file_meta.TransferSyntaxUID = syntax
    data["PixelData"].VR = "OW" if not syntax.is_encapsulated else "OB"
    sent = tmp_path / "sent.dcm"
    pydicom.dcmwrite(sent, data, enforce_file_format=True)
    with a_node(tmp_path / "state") as node:
        said = storescu(node.port, sent, more=[option])
        assert said.returncode == 0, said.stdout + said.stderr
        (path,) = node.files()
        assert read(path).file_meta.TransferSyntaxUID == syntax
        assert read(path).PixelData == read(sent).PixelData


def test_what_preprocessing_reads_is_accepted_and_films_and_reports_are_not() -> None:
    images = contexts.stored("images")
    assert {"1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4.1", "1.2.840.10008.5.1.4.1.1.128"} <= set(images)
    for part in (
        "88.",
        "11.",
        "66",
        "104.",
        "9.",
        "481.",
    ):  # reports, presentation states, segmentations, PDFs, waveforms
        assert not [kind for kind in images if kind.startswith(f"1.2.840.10008.5.1.4.1.1.{part}")]
    everything = contexts.stored("all")
    assert set(images) < set(everything) and "1.2.840.10008.5.1.4.1.1.88.11" in everything
    assert {"1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.8.1"} <= set(contexts.SYNTAXES)
    assert "1.2.840.10008.1.2.4.100" not in contexts.SYNTAXES  # MPEG2


def test_an_object_of_a_kind_that_is_refused_does_not_hold_up_the_others(tmp_path: Path) -> None:
    report = a_slice(SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11", Modality="SR")
    paths = [write(tmp_path / "a-report.dcm", report), *a_study(tmp_path / "b", slices=2)]
    with a_node(tmp_path / "state") as node:
        storescu(node.port, *paths, more=["-nh"])
        assert len(node.files()) == 2
    with a_node(tmp_path / "all", kinds="all") as node:
        assert storescu(node.port, *paths).returncode == 0
        assert len(node.files()) == 3


def test_strangers_and_those_who_ask_for_another_are_not_heard(tmp_path: Path) -> None:
    (sent,) = a_study(tmp_path / "sent", slices=1)
    with a_node(tmp_path / "state") as node:
        said = storescu(node.port, sent, caller="STRANGER")
        assert said.returncode != 0 and "Calling AE Title Not Recognized" in said.stdout + said.stderr
        said = storescu(node.port, sent, called="SOMEBODY")
        assert said.returncode != 0 and "Called AE Title Not Recognized" in said.stdout + said.stderr
        assert echoscu(node.port, caller="STRANGER").returncode != 0
        assert storescu(node.port, sent).returncode == 0
        assert node.codes() == {"unknown_caller": 2, "other_called": 1}
    with a_node(tmp_path / "open", strangers=True) as node:
        assert storescu(node.port, sent, caller="STRANGER").returncode == 0
        assert [one.source for one in node.arrived] == [""]


def test_a_peer_is_heard_from_its_own_address_alone(tmp_path: Path) -> None:
    (sent,) = a_study(tmp_path / "sent", slices=1)
    for address, heard in (("127.0.0.2", False), ("127.0.0.1", True)):
        peers = {"scanner": Peer(aet="SCANNER", calls_from=(address,))}
        with a_node(tmp_path / address, peers=peers) as node:
            assert (storescu(node.port, sent).returncode == 0) == heard


def test_below_the_reserve_callers_are_asked_to_come_again(tmp_path: Path) -> None:
    free = [10**10]
    sent = a_study(tmp_path / "sent", slices=3)
    with a_node(tmp_path / "state", free_bytes=lambda: free[0], reserve_gb=5.0) as node:
        assert storescu(node.port, sent[0]).returncode == 0
        free[0] = 10**9
        said = storescu(node.port, *sent)
        words = said.stdout + said.stderr
        assert said.returncode != 0 and "Rejected Transient" in words and "Temporary Congestion" in words
        free[0] = 10**10
        assert storescu(node.port, *sent).returncode == 0
        assert len(node.files()) == 3 and node.codes() == {"no_room": 1}


def test_a_disk_that_fills_up_in_the_middle_is_told_and_costs_nothing_that_was_there(tmp_path: Path) -> None:
    free = [10**10]
    one, two = a_slice(), a_slice()
    with (
        a_node(tmp_path / "state", free_bytes=lambda: free[0], reserve_gb=5.0) as node,
        _associated(node.port, one) as association,
    ):
        assert association.send_c_store(one).Status == 0x0000
        free[0] = 0
        assert association.send_c_store(two).Status == 0xA700
        free[0] = 10**10
        assert association.send_c_store(two).Status == 0x0000
        assert len(node.files()) == 2 and node.parts() == []


def test_more_associations_than_there_may_be_are_asked_to_come_again(tmp_path: Path) -> None:
    data = a_slice()
    with a_node(tmp_path / "state", associations=2) as node:
        with _associated(node.port, data) as first, _associated(node.port, data):
            said = echoscu(node.port)
            assert said.returncode != 0 and "Local Limit Exceeded" in said.stdout + said.stderr
            assert first.send_c_store(data).Status == 0x0000
        assert until(lambda: echoscu(node.port).returncode == 0)
        assert node.codes()["too_many"] >= 1


def test_many_send_at_once(tmp_path: Path) -> None:
    studies = [a_study(tmp_path / str(number), slices=10) for number in range(4)]
    ended: list[int] = []
    with a_node(tmp_path / "state") as node:
        threads = [
            threading.Thread(target=lambda paths=paths: ended.append(storescu(node.port, *paths).returncode))
            for paths in studies
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ended == [0] * 4 and len(node.files()) == 40
        assert sorted(study.objects for study in node.ledger.waiting()) == [10] * 4


def test_the_same_object_from_many_at_once_is_one(tmp_path: Path) -> None:
    sent, ended = a_study(tmp_path / "sent", slices=8), list[int]()
    with a_node(tmp_path / "state") as node:
        threads = [
            threading.Thread(target=lambda: ended.append(storescu(node.port, *sent).returncode)) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ended == [0] * 4 and len(node.files()) == len(node.arrived) == 8
        assert node.codes() == {} and node.parts() == []


def test_it_stops_at_once_and_leaves_no_half_object(tmp_path: Path) -> None:
    data = a_slice()
    with a_node(tmp_path / "state") as node, _associated(node.port, data) as association:
        assert association.send_c_store(data).Status == 0x0000
    assert until(lambda: not association.is_established)
    assert len(node.files()) == 1 and node.parts() == []
    assert not [thread.name for thread in threading.enumerate() if "Acceptor" in thread.name]


def test_one_who_only_looks_whether_somebody_listens_holds_no_thread(tmp_path: Path) -> None:
    """As load balancers do, every second."""
    with a_node(tmp_path / "state", silence_s=60.0) as node:
        before = threading.active_count()
        for _ in range(20):
            socket.create_connection(("127.0.0.1", node.port)).close()
        assert until(lambda: threading.active_count() <= before, 10)
        assert node.codes() == {}


CANARY = "Kanarienvogel"


def test_no_text_of_a_header_is_in_any_path_row_or_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("DEBUG")
    data = a_slice()
    texts = ("PatientName", "PatientID", "StudyDescription", "SeriesDescription", "AccessionNumber", "InstitutionName",
             "StudyID", "ProtocolName", "OperatorsName", "StationName", "PatientComments", "Manufacturer")  # fmt: skip
    for number, tag in enumerate(texts):
        setattr(data, tag, f"{CANARY}{number}"[-16:])
    path = write(tmp_path / "in.dcm", data)
    broken = write(tmp_path / "broken.dcm", a_slice(PatientName=CANARY, SeriesInstanceUID="../../etc/passwd"))
    with a_node(tmp_path / "state") as node:
        storescu(node.port, path)
        storescu(node.port, broken)
        data.PatientComments = f"{CANARY} again"
        storescu(node.port, write(tmp_path / "other.dcm", data))
        storescu(node.port, path, caller=CANARY[:16])
        storescu(node.port, path, called=CANARY[:16])
        codes = node.codes()
    assert set(codes) == {"no_study", "other_bytes", "unknown_caller", "other_called"}
    secrets = [CANARY.encode(), b"etc/passwd", *(str(uid).encode() for uid in _uids(data))]
    said = caplog.text + "".join(capfd.readouterr())
    places = [str(place.relative_to(tmp_path)) for place in (tmp_path / "state").rglob("*")]
    rows = b"".join(place.read_bytes() for place in (tmp_path / "state").glob("ledger.sqlite*"))
    for secret in secrets:
        assert secret not in said.encode() and secret not in rows
        assert not [place for place in places if secret.decode() in place]
    assert CANARY.encode() in next((tmp_path / "state").glob("spool/*/*/*.dcm")).read_bytes()


def _uids(data: pydicom.Dataset) -> list[str]:
    return [data.StudyInstanceUID, data.SeriesInstanceUID, data.SOPInstanceUID]


def test_memory_stays_flat_whatever_the_size_of_an_object(tmp_path: Path) -> None:
    """Against pynetdicom as it comes, which holds an object in memory several times over."""
    large = a_slice(side=4096)  # 32 MiB
    large.NumberOfFrames = 4
    large.PixelData = bytes(4 * 2 * 4096 * 4096)
    small = write(tmp_path / "small.dcm", a_slice())
    path = write(tmp_path / "large.dcm", large)
    from .scanner import a_process

    with a_process(tmp_path / "state") as (process, port):
        assert storescu(port, small).returncode == 0
        before = _peak(process.pid)
        assert storescu(port, path).returncode == 0
        grown = _peak(process.pid) - before
    assert path.stat().st_size > 1 << 27
    assert grown < 1 << 23, f"{grown} bytes for an object of {path.stat().st_size}"


def _peak(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024


def test_a_config_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    for words in ({"aet": ""}, {"aet": "A" * 17}, {"aet": "A\\B"}, {"port": 70000}, {"associations": 0}):
        with pytest.raises(ValueError, match=r"needed|must be"):
            Receiving(**words)
    with pytest.raises(ValueError, match="two peers have the AE title"):
        Node(state=tmp_path, peers={"one": SCANNER, "two": Peer(aet="SCANNER ")})


@pytest.mark.skipif(shutil.which("dcmsend") is None, reason="dcmtk is not installed")
def test_another_sender_of_dcmtks_is_understood_too(tmp_path: Path) -> None:
    a_study(tmp_path / "sent", slices=5)
    with a_node(tmp_path / "state") as node:
        words = [
            "dcmsend",
            "-aet",
            "SCANNER",
            "-aec",
            "HILUM",
            "+sd",
            "127.0.0.1",
            str(node.port),
            str(tmp_path / "sent"),
        ]
        assert subprocess.run(words, capture_output=True, timeout=60, check=False).returncode == 0
        assert len(node.files()) == 5
