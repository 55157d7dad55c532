"""Bombs, lies and silence: refused, bounded in memory and time, nothing outside the spool, and the next is served."""

import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pydicom.encaps
import pytest
from pydicom.dataset import Dataset
from pydicom.filewriter import write_dataset
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    RLELossless,
    generate_uid,
)
from pynetdicom import AE

from pipeline.node import intake
from pipeline.node.ledger import open_ledger

from .scanner import Received, a_node, a_process, a_slice, a_study, storescu, until

pytestmark = pytest.mark.slow

KIND = str(CTImageStorage)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Received]:
    """One node for all of them: each must leave it as good as before."""
    with a_node(tmp_path_factory.mktemp("hostile") / "state", object_gb=0.02, silence_s=1.5) as made:
        yield made


@pytest.fixture(autouse=True)
def the_next_is_served(node: Received, tmp_path: Path) -> Iterator[None]:
    before = {path.name for path in node.node.state.iterdir()}
    around = {path.name for path in node.node.state.parent.iterdir()}
    yield
    (path,) = a_study(tmp_path / "next", slices=1)
    assert until(lambda: not node.parts(), 15), "a part file was left"
    kept = len(node.files())
    assert storescu(node.port, path).returncode == 0
    assert len(node.files()) == kept + 1
    assert {path.name for path in node.node.state.iterdir()} - before <= {"ledger.sqlite-wal", "ledger.sqlite-shm"}
    assert {path.name for path in node.node.state.parent.iterdir()} == around


class Caller:
    """Somebody with an association who says what he likes."""

    def __init__(self, port: int, syntax: str = ExplicitVRLittleEndian) -> None:
        entity = AE("SCANNER")
        entity.add_requested_context(KIND, syntax)
        self.association = entity.associate("127.0.0.1", port, ae_title="HILUM")
        assert self.association.is_established
        self.context = self.association.accepted_contexts[0].context_id
        self.line: socket.socket = self.association.dul.socket.socket

    def say(self, data: bytes, is_command: bool, is_last: bool = True) -> None:
        """One PDU of one piece of a message."""
        piece = struct.pack(">IBB", len(data) + 2, self.context, is_command | is_last << 1) + data
        self.line.sendall(b"\4\0" + struct.pack(">I", len(piece)) + piece)

    def announce(self, uid: str, kind: str = KIND) -> None:
        self.say(command(uid, kind), is_command=True)

    def is_out(self, seconds: float = 10) -> bool:
        """Whether the node hung up."""
        return until(lambda: not self.association.is_established, seconds)

    def close(self) -> None:
        self.association.abort()
        self.line.close()  # pynetdicom leaves it open where the other side hung up first


@contextmanager
def calling(node: Received, **words: Any) -> Iterator[Caller]:
    caller = Caller(node.port, **words)
    try:
        yield caller
    finally:
        caller.close()


def command(uid: str, kind: str = KIND) -> bytes:
    """A C-STORE request with exactly these bytes for a UID, whatever they are."""

    def element(number: int, value: bytes) -> bytes:
        value += bytes(len(value) % 2)
        return struct.pack("<HHI", 0, number, len(value)) + value

    numbers = (
        (0x100, 1),
        (0x110, 1),
        (0x700, 0),
        (0x800, 1),
    )  # C-STORE-RQ, message 1, medium priority, a data set follows
    rest = element(2, kind.encode()) + b"".join(element(tag, struct.pack("<H", value)) for tag, value in numbers)
    rest += element(0x1000, uid.encode())
    return element(0, struct.pack("<I", len(rest))) + rest


def body(data: Dataset) -> bytes:
    stream = pydicom.filebase.DicomBytesIO()
    stream.is_little_endian, stream.is_implicit_VR = True, False
    write_dataset(stream, data)
    return stream.getvalue()


def code_comes(node: Received, code: str, before: int = 0) -> bool:
    return until(lambda: node.codes().get(code, 0) > before, 10)


ODD_UIDS = {
    "upwards": "../../../etc/passwd",
    "absolute": "/tmp/owned",
    "empty": "",
    "overlong": "1." * 40,
    "control": "1.2\n3\x1b[2J",
    "windows": "..\\..\\owned",
    "letters": "1.2.abc",
    "dots": "..",
    "nul": "1.2\0.3",
}


@pytest.mark.parametrize("uid", ODD_UIDS.values(), ids=ODD_UIDS.keys())
def test_a_uid_that_is_none_writes_nothing(node: Received, uid: str) -> None:
    before = sum(node.codes().values())
    with calling(node) as caller:
        caller.announce(uid)
        caller.say(body(a_slice()), is_command=False)
        assert until(lambda: sum(node.codes().values()) > before, 10)


@pytest.mark.parametrize("tag", ["StudyInstanceUID", "SeriesInstanceUID"])
@pytest.mark.parametrize(
    "uid", ["../../../etc/passwd", "", "1." * 40, "1.2\n3"], ids=["upwards", "empty", "overlong", "control"]
)
def test_a_study_whose_uid_is_none_writes_nothing(node: Received, tag: str, uid: str) -> None:
    before = node.codes().get("no_study", 0)
    data = a_slice()
    with pytest.MonkeyPatch.context() as patch, calling(node) as caller:
        patch.setattr(pydicom.config.settings, "_writing_validation_mode", pydicom.config.IGNORE)
        data[tag]._value = uid
        caller.announce(data.SOPInstanceUID)
        caller.say(body(data), is_command=False)
        assert code_comes(node, "no_study", before)


def test_an_object_of_another_class_than_was_agreed_on_is_refused(node: Received) -> None:
    """Else a report could come in where only images were negotiated."""
    before, data = node.codes().get("other_object", 0), a_slice(SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11")
    with calling(node) as caller:
        caller.announce(data.SOPInstanceUID, data.SOPClassUID)
        caller.say(body(data), is_command=False)
        assert code_comes(node, "other_object", before)


TITLES = {
    "control": b"SCAN\nNER\x1b[2J",
    "empty": b"",
    "backslash": b"A\\B",
    "bytes": bytes(range(240, 250)),
    "path": b"../../x",
}


@pytest.mark.parametrize("title", TITLES.values(), ids=TITLES.keys())
def test_a_title_that_is_none_is_not_heard_and_not_quoted(
    node: Received, title: bytes, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("DEBUG")
    before = sum(node.codes().values())
    with socket.create_connection(("127.0.0.1", node.port)) as line:
        line.sendall(request(title.ljust(16)))
        line.settimeout(10)
        answer = line.recv(100)
    assert not answer or answer[0] in (3, 7), "rejected, aborted or hung up"
    assert until(lambda: sum(node.codes().values()) > before, 10)
    said = caplog.text + "".join(capfd.readouterr())
    assert "Traceback" not in said and "\x1b[2J" not in said and "../../x" not in said


def request(caller: bytes) -> bytes:
    """An A-ASSOCIATE-RQ for C-ECHO with any bytes for the caller's title."""

    def item(kind: int, value: bytes) -> bytes:
        return struct.pack(">BBH", kind, 0, len(value)) + value

    context = item(0x20, b"\1\0\0\0" + item(0x30, b"1.2.840.10008.1.1") + item(0x40, b"1.2.840.10008.1.2"))
    user = item(0x50, item(0x51, struct.pack(">I", 16384)) + item(0x52, b"1.2.3"))
    rest = b"\0\1\0\0" + b"HILUM".ljust(16) + caller + bytes(32) + item(0x10, b"1.2.840.10008.3.1.1.1") + context + user
    return b"\1\0" + struct.pack(">I", len(rest)) + rest


def test_bytes_that_are_no_dicom_at_all(node: Received) -> None:
    for nonsense in (b"GET / HTTP/1.0\r\n\r\n", bytes(100), b"\xff" * 100, b"\1\0\0\0\0\4abcd"):
        with socket.create_connection(("127.0.0.1", node.port)) as line:
            line.sendall(nonsense)
            line.settimeout(10)
            try:
                while line.recv(1000):
                    pass
            except ConnectionResetError:
                pass


def test_a_sender_that_stops_between_two_pieces(node: Received) -> None:
    before = node.codes().get("broken_off", 0)
    with calling(node) as caller:
        caller.announce(generate_uid())
        caller.say(bytes(1000), is_command=False, is_last=False)
        assert until(lambda: len(node.parts()) == 1)
        assert caller.is_out() and code_comes(node, "broken_off", before)
        assert until(lambda: not node.parts())


def test_a_sender_that_stops_in_the_middle_of_a_piece(node: Received) -> None:
    before = node.codes().get("broken_off", 0)
    with calling(node) as caller:
        caller.announce(generate_uid())
        caller.line.sendall(b"\4\0" + struct.pack(">I", 5000) + bytes(100))
        assert code_comes(node, "broken_off", before) and until(lambda: not node.parts())


def test_a_sender_that_hangs_up_in_the_middle(node: Received) -> None:
    before = node.codes().get("broken_off", 0)
    with calling(node) as caller:
        caller.announce(generate_uid())
        caller.say(bytes(1000), is_command=False, is_last=False)
        caller.line.shutdown(socket.SHUT_RDWR)
        assert code_comes(node, "broken_off", before) and until(lambda: not node.parts())


def test_a_sender_that_drips(node: Received, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then is not silence, and still comes to an end."""
    monkeypatch.setattr(intake.Line, "seconds", 2.0)
    before = node.codes().get("broken_off", 0)
    with calling(node) as caller:
        caller.announce(generate_uid())
        caller.line.sendall(b"\4\0" + struct.pack(">I", 5000))
        try:
            for _ in range(100):
                caller.line.sendall(b"\0")
                time.sleep(0.1)
        except OSError:
            pass
        assert code_comes(node, "broken_off", before)


def test_one_that_connects_and_says_nothing_keeps_nobody_out(node: Received, tmp_path: Path) -> None:
    lines = [socket.create_connection(("127.0.0.1", node.port)) for _ in range(10)]
    (path,) = a_study(tmp_path / "in", slices=1)
    assert storescu(node.port, path).returncode == 0
    for line in lines:
        line.settimeout(10)
        assert line.recv(10) == b"", "the node hangs up on one who says nothing"
        line.close()


def test_an_object_above_the_largest_ends_the_association(node: Received) -> None:
    before = node.codes().get("too_large", 0)
    with calling(node) as caller:
        caller.announce(generate_uid())
        with pytest.raises(OSError):  # the node hangs up on one who goes on for ever
            for _ in range(2000):
                caller.say(bytes(120_000), is_command=False, is_last=False)
        assert code_comes(node, "too_large", before) and until(lambda: not node.parts())


def test_one_who_does_not_wait_for_answers_is_stopped(node: Received) -> None:
    before = node.codes().get("misbehaved", 0)
    with calling(node) as caller:
        try:
            for _ in range(300):
                caller.announce(generate_uid())
                caller.say(bytes(200), is_command=False)
        except OSError:
            pass
        assert code_comes(node, "misbehaved", before) and until(lambda: not node.parts())


def test_a_command_without_end(node: Received) -> None:
    before = node.codes().get("misbehaved", 0)
    with calling(node) as caller:
        try:
            for _ in range(1000):
                caller.say(bytes(1000), is_command=True, is_last=False)
        except OSError:
            pass
        assert code_comes(node, "misbehaved", before)


def test_a_data_set_without_a_command_and_pieces_out_of_order(node: Received) -> None:
    for pieces in ([(bytes(100), False)], [(command("1.2.3"), True), (command("1.2.3"), True)], [(b"\1\2\3", True)]):
        before = sum(node.codes().values())
        with calling(node) as caller:
            for data, is_command in pieces:
                caller.say(data, is_command=is_command)
            assert until(lambda before=before: sum(node.codes().values()) > before, 10)


def test_bombs_cost_no_more_memory_than_their_bytes_on_the_wire(tmp_path: Path) -> None:
    """The first three of research/hospital.md 2.4, and a PDU that says it is four gigabytes long."""
    bombs = [
        (DeflatedExplicitVRLittleEndian, deflated(a_slice(), in_pixels=True), ""),
        (DeflatedExplicitVRLittleEndian, deflated(a_slice(), in_pixels=False), "not_readable"),
        (RLELossless, run_lengths(a_slice(Rows=16384, Columns=16384)), ""),
        (ExplicitVRLittleEndian, body(a_slice(Rows=65535, Columns=65535, PixelData=bytes(1000))), ""),
    ]
    with a_process(tmp_path / "state") as (process, port):
        assert storescu(port, *a_study(tmp_path / "first", slices=1)).returncode == 0
        before, expected = _peak(process.pid), 1
        for seen, (syntax, bomb, _) in enumerate(bombs, start=1):
            caller = Caller(port, syntax)
            caller.announce(_uid_in(bomb))
            for at in range(0, len(bomb), 100_000):
                caller.say(bomb[at : at + 100_000], is_command=False, is_last=at + 100_000 >= len(bomb))
            assert until(lambda seen=seen: outcomes(tmp_path / "state") == seen + 1, 30), "no answer came"
            caller.close()
        caller = Caller(port)
        with pytest.raises(OSError):
            caller.line.sendall(b"\4\0" + struct.pack(">I", 0xFFFFFFF0))
            while True:
                caller.line.sendall(bytes(1 << 20))
        caller.close()
        grown = _peak(process.pid) - before
        assert storescu(port, *a_study(tmp_path / "next", slices=1)).returncode == 0
        expected += 1 + sum(not code for *_, code in bombs)
        assert len(list((tmp_path / "state").glob("spool/*/*/*.dcm"))) == expected
    assert grown < 1 << 26, grown


def outcomes(state: Path) -> int:
    """Objects that were taken or refused."""
    ledger = open_ledger(state)
    try:
        return sum(ledger.refused().values()) + sum(study.objects for study in ledger.waiting())
    finally:
        ledger.close()


def _uid_in(bomb: bytes) -> str:
    """Of the object, from the plain data set or the beginning of a deflated one."""
    try:
        head = zlib.decompressobj(wbits=-15).decompress(bomb, 1000)
    except zlib.error:
        head = bomb[:1000]
    at = head.index(b"\x08\0\x18\0UI")
    return head[at + 8 : at + 8 + head[at + 6]].rstrip(b"\0").decode()


def _peak(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024


def deflated(data: Dataset, in_pixels: bool) -> bytes:
    """A quarter of a gigabyte of zeros in as many kilobytes: in the pixels, or in a private element before the UIDs that are needed."""
    plain, zeros = body(data), 1 << 28
    at = plain.index(b"\xe0\x7f\x10\0") if in_pixels else plain.index(b"\x10\0\x10\0")
    tag = b"\xe0\x7f\x10\0OW\0\0" if in_pixels else b"\x09\0\x10\x10OB\0\0"
    packer = zlib.compressobj(wbits=-15)
    pieces = [packer.compress(plain[:at] + tag + struct.pack("<I", zeros))]
    pieces += [packer.compress(bytes(1 << 24)) for _ in range(zeros >> 24)]
    packed = b"".join([*pieces, packer.compress(b"" if in_pixels else plain[at:]), packer.flush()])
    assert len(packed) < 1 << 21
    return packed + bytes(len(packed) % 2)


def run_lengths(data: Dataset) -> bytes:
    """Half a gigabyte of zeros in RLE."""
    segment = b"\x81\0" * (16384 * 16384 // 128)
    header = struct.pack("<16I", 2, 64, 64 + len(segment), *([0] * 13))
    data.PixelData = pydicom.encaps.encapsulate([header + segment + segment])
    data["PixelData"].VR = "OB"
    data["PixelData"].is_undefined_length = True
    return body(data)


@pytest.mark.parametrize("seed", range(3))
def test_noise_in_the_place_of_a_data_set(node: Received, seed: int) -> None:
    before = sum(node.codes().values())
    rng = np.random.default_rng(seed)
    with calling(node) as caller:
        for _ in range(5):
            caller.announce(generate_uid())
            caller.say(rng.bytes(2000), is_command=False)
            time.sleep(0.05)
        assert until(lambda: sum(node.codes().values()) >= before + 5, 10)


def test_senders_that_misbehave_at_once_keep_no_thread(node: Received) -> None:
    before = threading.active_count()
    for _ in range(5):
        caller = Caller(node.port)
        caller.announce(generate_uid())
        caller.line.close()
    assert until(lambda: threading.active_count() <= before, 20)
