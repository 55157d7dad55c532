"""A hospital to test against that nobody here wrote: Debian's Orthanc, in a network of its own."""

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

NEW_NETWORK = 0x40000000  # CLONE_NEWNET
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


@contextmanager
def network_of_its_own() -> Iterator[None]:
    """This Orthanc listens on every address it has: so it, and this thread, get a network with nothing but loopback."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        if libc.unshare(NEW_NETWORK) or shutil.which("ip") is None:
            pytest.skip("a network of its own needs root and iproute2")
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        yield
    finally:
        libc.setns(before, NEW_NETWORK)
        os.close(before)


class Orthanc:
    """One archive: REST on 18042, DIMSE on 14242, DICOMweb below /dicom-web."""

    aet, port, rest = "ORTHANC", 14242, "http://127.0.0.1:18042"

    def __init__(self, folder: Path, modalities: dict | None = None) -> None:
        if shutil.which("Orthanc") is None or not PLUGIN.exists():
            pytest.skip("Orthanc and its DICOMweb plugin are not installed (apt-get install orthanc orthanc-dicomweb)")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.config = folder / "orthanc.json"
        self.config.write_text(json.dumps({
            "Name": "archive", "StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db"),
            "HttpPort": 18042, "DicomPort": 14242, "DicomAet": self.aet, "DicomCheckCalledAet": False,
            "DicomAlwaysAllowStore": True, "DicomAlwaysAllowFind": True, "DicomAlwaysAllowMove": True,
            "RemoteAccessAllowed": False, "AuthenticationEnabled": False, "StableAge": 3,
            "DicomModalities": modalities or {}, "Plugins": [str(PLUGIN)], "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        }))  # fmt: skip
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(["Orthanc", str(self.config)], stdout=log, stderr=log)
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                self.ask("system")
                with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                    return
            except OSError:
                time.sleep(0.1)
        raise AssertionError((self.folder / "log").read_text()[-2000:])

    def kill(self) -> None:
        """As a power cut does it."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process = None

    def stop(self) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait(30)
            self.process = None

    def ask(self, place: str, data: bytes | None = None) -> object:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(urllib.request.Request(f"{self.rest}/{place}", data=data), timeout=20) as answer:
            return json.loads(answer.read())

    def series(self) -> list[dict]:
        """Every series it has, with what its headers say."""
        return [self.ask(f"series/{one}") for one in self.ask("series")]  # type: ignore[misc, attr-defined]


class Process:
    """`hilum node`, or a part of it, with what it says kept."""

    def __init__(self, config: Path, part: str = "", environment: Mapping[str, str] | None = None) -> None:
        self.config, self.part = config, part
        self.log = config.with_name(f"{part or 'node'}-{time.monotonic_ns()}.log")
        self.environment = dict(environment or {})
        self.process: subprocess.Popen | None = None

    def start(self) -> "Process":
        root = Path(__file__).parents[3]
        environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"} | self.environment
        words = [sys.executable, "-m", "pipeline", "node", "--config", str(self.config)]
        words += ["--only", self.part] if self.part else []
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
        return self

    def strike(self, number: signal.Signals) -> None:
        """A signal, to the process alone."""
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        self.strike(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()

    def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(60)

    def lives(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def children(self) -> list[int]:
        """The ids of its rooms."""
        assert self.process is not None
        found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True)
        return [int(line) for line in found.stdout.split()]

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def name(self) -> str:
        """What it calls itself; empty as long as it has not said."""
        _, found, rest = self.said().partition("this process is ")
        return rest.split()[0] if found and rest.split() else ""


def wait_until(holds: Callable[[], object], *processes: Process, seconds: float = 180) -> None:
    """Until it holds, as long as every process lives."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return
        for one in processes:
            assert one.lives(), one.said()[-3000:]
        time.sleep(0.1)
    raise AssertionError("\n".join(one.said()[-3000:] for one in processes))
