"""How fast the node receives beside dcmtk's storescp: the same objects, the same sender, in turn, in one run.

    python benchmarks/receiving.py [--quick] [--state FOLDER]

The sender is dcmtk's storescu, one or four at once. dcmtk's receiver is run as hospitals run it (`--fork`) and writes
files without making sure of them; the node answers only when file, folder and row are on the disk, and hashes what it
writes. How long the disk takes for that alone is measured too. Nothing but the standard library beside hilum itself.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import bench

REPOSITORY = Path(__file__).resolve().parents[1]
NODE = """
import json, sys
from pathlib import Path
from pipeline.node.config import Node, Peer, Receiving
from pipeline.node.listener import listening
node = Node(state=Path(sys.argv[1]), peers={"s": Peer(aet="SCANNER")}, receiving=Receiving(port=0, reserve_gb=0.0))
with listening(node) as listener:
    print(listener.port, flush=True)
    sys.stdin.read()
    print(json.dumps([int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")]))
"""
TIMES = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of few objects, to see that it runs")
    parser.add_argument("--state", type=Path, help="where to receive; by default the temporary folder's disk")
    asked = parser.parse_args()
    if missing := [name for name in ("storescu", "storescp") if shutil.which(name) is None]:
        sys.exit(f"{' and '.join(missing)} are not installed; dcmtk is needed. apt-get install dcmtk")
    print(bench.heading())
    print(subprocess.run(["storescu", "--version"], capture_output=True, text=True).stdout.splitlines()[0])
    with tempfile.TemporaryDirectory(dir=asked.state) as folder:
        measure(Path(folder), asked.quick)


def measure(folder: Path, quick: bool) -> None:
    """Each size with one and four senders: medians of five, receivers in turn."""
    print(
        f"\n{'objects':24}{'senders':>8}{'storescp':>12}{'node':>12}{'node/storescp':>15}{'disk alone':>12}{'node peak':>12}"
    )
    for name, side, count in (("CT slices, 0.5 MB", 512, 100), ("multi-frames, 64 MB", 5792, 4)):
        count = max(2, count // 10) if quick else count
        for senders in (1, 4):
            groups = [made(folder / f"in-{side}-{number}", side, count) for number in range(senders)]
            peer: list[float] = []
            ours: list[float] = []
            peaks: list[int] = []
            for _ in range(1 if quick else TIMES):
                with storescp(folder / "storescp") as port:
                    peer.append(sent(port, groups, "STORESCP"))
                with node(folder / "node", peaks.append) as port:
                    ours.append(sent(port, groups, "HILUM"))
            total = sum(path.stat().st_size for group in groups for path in group)
            disk = written(folder / "disk", groups)
            row = [f"{total / statistics.median(times) / 1e6:.0f} MB/s" for times in (peer, ours)]
            ratio = statistics.median(peer) / statistics.median(ours)
            print(
                f"{name:24}{senders:8}{row[0]:>12}{row[1]:>12}{ratio:15.2f}{total / disk / 1e6:7.0f} MB/s"
                f"{max(peaks) / 1e6:9.0f} MB"
            )


def made(folder: Path, side: int, count: int) -> list[Path]:
    """Slices of noise: what no file system packs."""
    import numpy as np
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    if folder.exists():
        return sorted(folder.iterdir())
    folder.mkdir(parents=True)
    study, series, noise = generate_uid(), generate_uid(), np.random.default_rng(0)
    for number in range(count):
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, generate_uid()
        data.StudyInstanceUID, data.SeriesInstanceUID, data.Modality = study, series, "CT"
        data.PatientName, data.PatientID, data.InstanceNumber = "Nobody", "0", number
        data.Rows = data.Columns = side
        data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
        data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
        data.PixelData = noise.bytes(2 * side * side)
        data.save_as(folder / f"{number:04d}.dcm", enforce_file_format=True)
    return sorted(folder.iterdir())


def sent(port: int, groups: list[list[Path]], called: str) -> float:
    """Seconds until every sender was told success for all it has."""
    began = time.perf_counter()
    words = ["storescu", "-aet", "SCANNER", "-aec", called, "127.0.0.1", str(port)]
    senders = [subprocess.Popen([*words, *map(str, paths)], stderr=subprocess.DEVNULL) for paths in groups]
    if any([sender.wait() for sender in senders]):
        sys.exit(f"{called} did not take everything; nothing is measured")
    return time.perf_counter() - began


@contextmanager
def storescp(folder: Path) -> Iterator[int]:
    folder.mkdir()
    port = bench_port()
    words = [
        "storescp",
        "--fork",
        "--accept-all",
        "--max-pdu",
        "131072",
        "-aet",
        "STORESCP",
        "-od",
        str(folder),
        str(port),
    ]
    receiver = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    try:
        wait_for(port)
        yield port
    finally:
        receiver.terminate()
        receiver.wait()
        shutil.rmtree(folder)


@contextmanager
def node(folder: Path, peak: Callable[[int], None]) -> Iterator[int]:
    words = [sys.executable, "-c", NODE, str(folder)]
    receiver = subprocess.Popen(words, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert receiver.stdout is not None and receiver.stdin is not None
    try:
        yield int(receiver.stdout.readline())
        receiver.stdin.close()
        peak(json.loads(receiver.stdout.readline())[0] * 1024)
    finally:
        receiver.terminate()
        receiver.wait()
        shutil.rmtree(folder)


def written(folder: Path, groups: list[list[Path]]) -> float:
    """Seconds that the disk takes to keep the same bytes for sure, one file after the other."""
    import os

    folder.mkdir()
    contents = [path.read_bytes() for group in groups for path in group]
    began = time.perf_counter()
    for number, content in enumerate(contents):
        with (folder / str(number)).open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    seconds = time.perf_counter() - began
    shutil.rmtree(folder)
    return seconds


def bench_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int) -> None:
    """Until somebody listens: an echo, for a connection alone would be counted by a forking receiver."""
    for _ in range(100):
        words = ["echoscu", "127.0.0.1", str(port)]
        if subprocess.run(words, stderr=subprocess.DEVNULL).returncode == 0:
            return
        time.sleep(0.1)
    sys.exit("storescp did not start")


if __name__ == "__main__":
    main()
