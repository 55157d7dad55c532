"""A hospital to test against that nobody here wrote: Debian's Orthanc, in a network of its own."""

import ctypes
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
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

    def stop(self) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait(30)
            self.process = None

    def ask(self, place: str, data: bytes | None = None) -> object:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(urllib.request.Request(f"{self.rest}/{place}", data=data), timeout=20) as answer:
            return json.loads(answer.read())
