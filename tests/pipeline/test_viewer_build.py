"""How the viewers' scripts get into the package: the pinned ones or none, and never at the price of the build."""

import hashlib
import io
import os
import stat
import tarfile
from pathlib import Path

import pytest

from pipeline.outputs._viewer import build

NIIVUE, OPENSEADRAGON = build.PINNED
pytestmark = pytest.mark.skipif(os.name == "nt", reason="the stand-in for npm is a shell script")


def an_npm(folder: Path, does: str) -> Path:
    """A folder with nothing in it but a command `npm` that does this."""
    folder.mkdir()
    npm = folder / "npm"
    npm.write_text(f"#!/bin/sh\n{does}\n")
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    return folder


def a_package(path: Path, script: bytes) -> Path:
    with tarfile.open(path, "w:gz") as tarball:
        member = tarfile.TarInfo(f"package/{NIIVUE['script']}")
        member.size = len(script)
        tarball.addfile(member, io.BytesIO(script))
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the scripts shall lie, instead of in this checkout."""
    monkeypatch.setattr(build, "PLACE", tmp_path / "npm")
    return tmp_path / "npm" / "niivue.umd.js"


def test_a_package_other_than_the_pinned_one_is_not_taken(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = a_package(tmp_path / "other.tgz", b"alert(1)")
    monkeypatch.setenv("PATH", str(an_npm(tmp_path / "bin", f"/bin/cp {other} $5/niivue.tgz")))
    reason = build.fetch()
    assert "integrity" in reason and "built without a viewer" in reason and not place.exists()
    with pytest.raises(build.NotTheOne, match="another sha256"):
        build._taken(other.read_bytes(), NIIVUE)


def test_where_npm_fails_the_build_goes_on_and_names_no_address(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = "echo 'cannot reach https://user:secret@registry.example/niivue today' >&2; exit 1"
    monkeypatch.setenv("PATH", str(an_npm(tmp_path / "bin", fails)))
    reason = build.fetch()
    assert "npm failed: cannot reach today" in reason and "pictures instead" in reason and "secret" not in reason
    assert not place.exists()


def test_a_script_that_lies_there_is_checked_and_not_fetched_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(an_npm(tmp_path / "bin", "echo never asked >&2; exit 1")))
    place.parent.mkdir()
    place.write_bytes(b"as pinned")
    assert build.fetch().count("never asked") == 2
    monkeypatch.setitem(NIIVUE, "sha256", hashlib.sha256(b"as pinned").hexdigest())
    assert "niivue" not in build.fetch() and "openseadragon@" in build.fetch()
    place.with_name("openseadragon.min.js").write_bytes(b"as pinned")
    monkeypatch.setitem(OPENSEADRAGON, "sha256", hashlib.sha256(b"as pinned").hexdigest())
    assert build.fetch() == ""
