"""A scanner for tests: objects nobody measured, sent by dcmtk, which nobody here wrote, and a node that receives them."""

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

from pipeline.node.admission import Admission
from pipeline.node.config import Node, Peer, Receiving
from pipeline.node.ledger import Ledger, open_ledger
from pipeline.node.listener import Listener
from pipeline.node.nouns import Arrival
from pipeline.node.spool import Spool, open_keys

REPOSITORY = Path(__file__).resolve().parents[3]
SCANNER = Peer(aet="SCANNER")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def a_slice(study: str = "", series: str = "", uid: str = "", side: int = 32, seed: int = 0, **said: Any) -> Dataset:
    """A CT slice of noise; `said` overrides what its header says."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, uid or generate_uid()
    data.StudyInstanceUID, data.SeriesInstanceUID = study or generate_uid(), series or generate_uid()
    data.PatientName, data.PatientID, data.Modality, data.InstanceNumber = "Nobody^At All", "0", "CT", seed
    data.Rows = data.Columns = side
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 1
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
    data.PixelData = np.random.default_rng(seed).integers(-999, 999, side * side, np.int16).tobytes()
    for tag, value in said.items():
        setattr(data, tag, value)
    data.file_meta.MediaStorageSOPClassUID, data.file_meta.MediaStorageSOPInstanceUID = (
        data.SOPClassUID,
        data.SOPInstanceUID,
    )
    return data


def a_study(folder: Path, slices: int = 5, series: int = 1, side: int = 32, **said: Any) -> list[Path]:
    """The files of one study."""
    study, paths = generate_uid(), []
    for number in range(series):
        one = generate_uid()
        for index in range(slices):
            paths.append(write(folder / f"{number}-{index}.dcm", a_slice(study, one, side=side, seed=index, **said)))
    return paths


def an_mr_study(folder: Path, slices: int = 10, side: int = 16, seed: int = 0) -> Path:
    """A whole small MR series that any package can be asked about: a ball in noise, 3 mm voxels."""
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    noise, centre = np.random.default_rng(seed), np.array([slices, side, side]) / 2
    ball = np.linalg.norm(np.indices((slices, side, side)) - centre[:, None, None, None], axis=0) < slices / 3
    voxels = (noise.normal(100, 10, ball.shape) + 200 * ball).astype(np.uint16)
    for index in range(slices):
        said: dict[str, Any] = {
            "SOPClassUID": MRImageStorage, "Modality": "MR", "FrameOfReferenceUID": frame, "PixelRepresentation": 0,
            "ImageType": ["ORIGINAL", "PRIMARY", "OTHER"], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
            "ImagePositionPatient": [0, 0, 3 * index], "PixelSpacing": [3, 3], "SliceThickness": 3,
            "InstanceNumber": index + 1, "StudyDate": "20200101", "StudyTime": "120000", "AccessionNumber": "",
            "PatientSex": "", "PatientBirthDate": "", "StudyID": "1", "SeriesNumber": 1, "ReferringPhysicianName": "",
            "PositionReferenceIndicator": "", "Manufacturer": "Nobody", "ScanningSequence": "GR", "SequenceVariant": "NONE",
            "ScanOptions": "", "MRAcquisitionType": "3D", "EchoTime": 1, "EchoTrainLength": 1, "RepetitionTime": 2,
        }  # fmt: skip
        data = a_slice(study, series, side=side, **said)
        data.PixelData = voxels[index].tobytes()
        write(folder / f"{index:03d}.dcm", data)
    return folder


def receive(at: Any, paths: Sequence[Path], source: str = "scanner") -> str:
    """As the doors do it, one object after the other, without a network; the key of their study."""
    admission = Admission(at.node, at.spool, at.ledger)
    for path in paths:
        meta = pydicom.dcmread(path, stop_before_pixels=True).file_meta
        part = at.spool.begin(meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID)
        part.write(path.read_bytes()[144 + meta.FileMetaInformationGroupLength :])
        arrival = admission.take(part, source)
    return str(arrival.place.study)


def write(path: Path, data: Dataset) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


def storescu(port: int, *paths: Path, caller: str = "SCANNER", called: str = "HILUM", more: Sequence[str] = ()) -> Any:
    """What dcmtk's sender says; it ends with 0 when every object was taken."""
    program = shutil.which("storescu")
    if program is None:
        pytest.skip("dcmtk is not installed (apt-get install dcmtk)")
    words = [program, "-v", *more, "-aet", caller, "-aec", called, "127.0.0.1", str(port), *map(str, paths)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)


def echoscu(port: int, caller: str = "SCANNER", called: str = "HILUM") -> Any:
    words = ["echoscu", "-v", "-aet", caller, "-aec", called, "127.0.0.1", str(port)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


@dataclass(kw_only=True)
class Received:
    """A node that listens in this process, and what became of everything."""

    node: Node
    spool: Spool
    ledger: Ledger
    listener: Listener
    arrived: list[Arrival] = field(default_factory=list)

    @property
    def port(self) -> int:
        return self.listener.port

    def files(self) -> list[Path]:
        return sorted(self.node.state.glob("spool/*/*/*.dcm"))

    def parts(self) -> list[Path]:
        return sorted((self.node.state / "parts").iterdir())

    def codes(self) -> dict[str, int]:
        counted: dict[str, int] = {}
        for (code, _), count in self.ledger.refused().items():
            counted[code] = counted.get(code, 0) + count
        return counted


@contextmanager
def a_node(
    state: Path, free_bytes: Any = None, peers: dict[str, Peer] | None = None, **receiving: Any
) -> Iterator[Received]:
    """A node on a free port of loopback that knows the scanner."""
    settings = {"port": 0, "reserve_gb": 0.0, "silence_s": 20.0} | receiving
    node = Node(state=state, peers={"scanner": SCANNER} if peers is None else peers, receiving=Receiving(**settings))
    spool, ledger = Spool(state, open_keys(state)), open_ledger(state)
    arrived: list[Arrival] = []
    ledger.reconcile(spool)
    listener = Listener(node, spool, ledger, free_bytes=free_bytes, arrived=arrived.append)
    listener.start()
    try:
        yield Received(node=node, spool=spool, ledger=ledger, listener=listener, arrived=arrived)
    finally:
        listener.stop()
        ledger.close()


PROCESS = """
import json, logging, sys, threading
from pathlib import Path
from pipeline.node.config import Node, Peer, Receiving
from pipeline.node.listener import listening
said = json.loads(sys.argv[1])
logging.basicConfig(filename=said["log"], level=logging.DEBUG)
node = Node(
    state=Path(said["state"]), ledger=said["ledger"], peers={"scanner": Peer(aet="SCANNER")},
    receiving=Receiving(**said["receiving"]),
)
with listening(node) as listener:
    print(listener.port, flush=True)
    sys.stdin.read()
"""


@contextmanager
def a_process(
    state: Path, ledger: str = "", prelude: str = "", **receiving: Any
) -> Iterator[tuple[subprocess.Popen, int]]:
    """The same in a process of its own, which a test may kill; with the port it listens on. `prelude` runs before it."""
    state.mkdir(parents=True, exist_ok=True)
    settings = {"port": 0, "reserve_gb": 0.0, "silence_s": 20.0} | receiving
    said = {"state": str(state), "ledger": ledger, "log": str(state / "log"), "receiving": settings}
    words = [sys.executable, "-c", prelude + PROCESS, json.dumps(said)]
    with subprocess.Popen(words, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        try:
            line = process.stdout.readline()
            assert line, (state / "log").read_text()
            yield process, int(line)
        finally:
            process.stdin.close()
            if process.poll() is None:
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()


def until(what: Any, seconds: float = 10.0) -> bool:
    """Whether something becomes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what():
            return True
        time.sleep(0.02)
    return bool(what())


def read(path: Path) -> Dataset:
    return pydicom.dcmread(path)
