"""What tests of MLflow share: its server on a store, as `hilum ui` runs it, and a folder to register."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serving(
    uri: str, port: int, log: int | IO[Any] = subprocess.DEVNULL, environment: Mapping[str, str] | None = None
) -> subprocess.Popen:
    """A server that answers. The store goes by environment: a password in it shows in no list of processes."""
    code = f"import os, sys; from pipeline.tracking import serve; sys.exit(serve(os.environ['STORE'], port={port}))"
    surroundings = os.environ | {"STORE": uri} | (environment or {})
    server = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=log, stderr=log, env=surroundings)
    for _ in range(900):
        assert server.poll() is None
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return server
        except OSError:
            time.sleep(0.1)
    stop(server)
    pytest.fail("the server did not start")


def stop(server: subprocess.Popen) -> None:
    server.terminate()
    try:
        server.wait(30)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def a_package(folder: Path, content: bytes = bytes(range(256)) * 40) -> Path:
    folder.mkdir(parents=True)
    (folder / "package.json").write_text('{"name": "ü"}\n', encoding="utf-8")
    (folder / "weights-fold0.safetensors").write_bytes(content)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
