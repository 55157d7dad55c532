"""What the hospital node does in an hour: many small studies from several senders at once, into an archive and asked back.

    python benchmarks/node.py [--quick] [--studies 500] [--senders 4] [--workers 1] [--minutes 60]

dcmtk's storescu sends, an association per study; Debian's Orthanc is the archive, in a network of its own (root is needed for
that, and iproute2). The package is an untrained network of a few thousand weights, so that what is measured is the way and
not the network: receiving, whether a study is whole, choosing, reading, two outputs, sending, asking back, each step written
down. Memory is what each process holds, looked at again and again; `flat` compares its last quarter with its second.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import bench

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

PACKAGE = """
import sys
from pathlib import Path
from networks import residual_unet
from pipeline import package
from pipeline.package import Fold
from preprocessing.plan import Label, Plan
from preprocessing.records import encode
from preprocessing.steps import Normalise, Orient, Pad, Resample, Scale
config = residual_unet.Config(width=4, blocks=(1,), strides=((1, 1, 1), (2, 2, 2)), kernels=((3, 3, 3), (3, 3, 3)))
spacing = (3.0, 3.0, 3.0)
steps = (Orient(), Resample(spacing_mm=spacing), Normalise(channels=(Scale(by="scan"),)), Pad(shape=(16, 16, 16)))
plan = Plan(name="small", channels=("mr",), labels=(Label(value=1, name="liver", colour=(230, 159, 0)),), steps=steps,
            spacing_mm=spacing, patch=(16, 16, 16), batch=1, dataset="ab" * 32)
fold = Fold(weights="weights-fold0.safetensors", dice={}, cases_trained=1, cases_held_out=1, epochs=1, minutes=0.1, seed=0)
package.save(Path(sys.argv[1]), network=residual_unet.build(config, channels=1, classes=2), name="small",
             network_name="residual_unet", network_config=encode(config), plan=plan, fold_number=0, fold=fold)
"""
STUDIES = """
import sys
from pathlib import Path
from tests.pipeline.node.scanner import an_mr_study
for number in range(int(sys.argv[2])):
    an_mr_study(Path(sys.argv[1]) / f"{number:05d}", slices=int(sys.argv[3]), side=int(sys.argv[4]), seed=number)
"""
PAGE = "http://127.0.0.1:18080"
LOOK_SECONDS = 5.0
"""Between two looks at memory: /proc is read in a millisecond."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="twelve studies, to see that it runs")
    parser.add_argument("--studies", type=int, default=500)
    parser.add_argument("--senders", type=int, default=4, help="at once; each sends its share, study by study")
    parser.add_argument("--slices", type=int, default=10)
    parser.add_argument("--side", type=int, default=24, help="pixels")
    parser.add_argument("--workers", type=int, default=1, help="cases at once")
    parser.add_argument("--minutes", type=float, default=60.0, help="to give up after")
    parser.add_argument("--state", type=Path, help="where to work; by default the temporary folder's disk")
    asked = parser.parse_args()
    asked.studies = 12 if asked.quick else asked.studies
    from tests.pipeline.node.hospital import network_of_its_own

    print(bench.heading())
    with tempfile.TemporaryDirectory(dir=asked.state) as folder, network_of_its_own():
        measure(Path(folder), asked)


def measure(folder: Path, asked: argparse.Namespace) -> None:
    """Send everything, wait for everything, and say what it took."""
    made_by(PACKAGE, folder / "package")
    made_by(STUDIES, folder / "studies", asked.studies, asked.slices, asked.side)
    config = written(folder, asked.workers)
    studies = sorted((folder / "studies").iterdir())
    with archive(folder / "archive") as orthanc, node(config) as process, Memory(process.pid) as memory:
        wait_for_the_page(process)
        began = time.perf_counter()
        refused = sent(studies, asked.senders)
        received = time.perf_counter() - began
        ends = wait_for_the_end(process, len(studies), began + 60 * asked.minutes)
        seconds = time.perf_counter() - began
        series = Counter(one["MainDicomTags"]["Modality"] for one in orthanc.series())
    print(
        f"\n{len(studies)} studies of {asked.slices} slices of {asked.side} x {asked.side}, {asked.senders} senders, "
    )
    print(f"{asked.workers} case(s) at once: {refused} refused, ended {dict(ends)}, in the archive {dict(series)}")
    print(
        f"received in {received:.1f} s; all ended after {seconds:.1f} s: {3600 * len(studies) / seconds:.0f} studies per hour"
    )
    steps = seconds_per_state(folder / "state" / "ledger.sqlite")
    print("seconds per study, median: " + ", ".join(f"{state} {median:.2f}" for state, median in steps.items()))
    memory.tell()


def made_by(script: str, folder: Path, *words: int) -> None:
    """In a process of its own: this one stays small."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script, str(folder), *map(str, words)], check=True, env=environment)


def written(folder: Path, workers: int) -> Path:
    """The node's config; YAML reads JSON."""
    said = {
        "state": str(folder / "state"),
        "receiving": {"aet": "HILUM", "port": 11112, "reserve_gb": 0.1},
        "peers": {"scanner": {"aet": "SCANNER"}, "archive": {"aet": "ORTHANC", "host": "127.0.0.1", "port": 14242}},
        "waiting": {"quiet_s": 10.0, "settled_s": 1.0},  # a machine that does much else stops in the middle of a study
        "working": {"workers": workers},
        "routes": {"small": {
            "package": str(folder / "package"), "take": {"mr": {"modality": ["MR"], "least_slices": 5}},
            "outputs": ["dicom_seg", "structured_report"], "targets": ["archive"],
        }},
        "showing": {"port": 18080},
    }  # fmt: skip
    (folder / "node.yaml").write_text(json.dumps(said))
    return folder / "node.yaml"


@contextmanager
def archive(folder: Path) -> Iterator["Orthanc"]:  # type: ignore[name-defined]  # noqa: F821
    from tests.pipeline.node.hospital import Orthanc

    orthanc = Orthanc(folder)
    orthanc.start()
    try:
        yield orthanc
    finally:
        orthanc.stop()


@contextmanager
def node(config: Path) -> Iterator[subprocess.Popen]:
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    words = [sys.executable, "-m", "pipeline", "node", "--config", str(config)]
    with (config.parent / "log").open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env=environment, cwd=REPOSITORY)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def sent(studies: list[Path], senders: int) -> int:
    """How many studies were refused; each sender takes every n-th, one after the other."""
    refused: list[int] = []

    def send(mine: list[Path]) -> None:
        for study in mine:
            words = ["storescu", "-aet", "SCANNER", "-aec", "HILUM", "+sd", "127.0.0.1", "11112", str(study)]
            refused.append(subprocess.run(words, stderr=subprocess.DEVNULL).returncode != 0)

    threads = [threading.Thread(target=send, args=(studies[number::senders],)) for number in range(senders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(refused)


def metrics() -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with suppress(OSError), opener.open(f"{PAGE}/metrics", timeout=30) as answer:
        return str(answer.read().decode())
    return ""


def wait_for_the_page(process: subprocess.Popen) -> None:
    while not metrics():
        if process.poll() is not None:
            sys.exit("the node ended before it began")
        time.sleep(0.2)


def wait_for_the_end(process: subprocess.Popen, studies: int, until: float) -> Counter[str]:
    """How many stories ended in which state, once all have."""
    ends: Counter[str] = Counter()
    while time.perf_counter() < until and process.poll() is None:
        time.sleep(1.0)
        ends, told = Counter(), metrics()
        for line in told.splitlines():
            if line.startswith("hilum_stories{"):
                state = line.split('state="')[1].split('"')[0]
                if state in ("done", "refused", "dead", "superseded"):
                    ends[state] += int(float(line.split()[-1]))
        if sum(ends.values()) >= studies and {"hilum_queue_depth 0", "hilum_studies_waiting 0"} <= {*told.splitlines()}:
            break
    return ends


def seconds_per_state(ledger: Path) -> dict[str, float]:
    """The median of how long stories were in each state."""
    import sqlite3

    spent: dict[str, list[float]] = {}
    for (facts,) in sqlite3.connect(ledger).execute("SELECT facts FROM node_stories"):
        moments = json.loads(facts).get("moments", [])
        for one, after in pairwise(moments):
            spent.setdefault(one["state"], []).append(after["at"] - one["at"])
    return {state: statistics.median(seconds) for state, seconds in spent.items()}


@dataclass
class Memory:
    """What the node and its rooms hold, every few seconds, from a thread."""

    pid: int
    began: float = field(default_factory=time.perf_counter)
    seen: list[tuple[float, dict[str, int]]] = field(default_factory=list)
    enough: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Memory":
        threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.enough.set()

    def _look(self) -> None:
        while not self.enough.wait(LOOK_SECONDS):
            rooms = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.pid)], capture_output=True, text=True).stdout
            held = {"node": resident(self.pid), "rooms": sum(resident(int(pid)) for pid in rooms.split())}
            self.seen.append((time.perf_counter() - self.began, held))

    def tell(self) -> None:
        """Minute by minute; then how much more the last quarter is than the second."""
        if not self.seen:
            return
        print("\nminute" + "".join(f"{name:>12}" for name in self.seen[0][1]))
        shown = -1
        for seconds, held in self.seen:
            if int(seconds // 60) > shown:
                shown = int(seconds // 60)
                print(f"{shown:6}" + "".join(f"{bytes_ / 1e6:9.0f} MB" for bytes_ in held.values()))
        quarter = max(1, len(self.seen) // 4)
        for name in self.seen[0][1]:
            second, last = (
                statistics.median(held[name] for _, held in part)
                for part in (self.seen[quarter : 2 * quarter] or self.seen, self.seen[-quarter:])
            )
            peak = max(held[name] for _, held in self.seen)
            print(
                f"{name}: peak {peak / 1e6:.0f} MB, flat: {(last - second) / 1e6:+.0f} MB from the second quarter to the last"
            )


def resident(pid: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
