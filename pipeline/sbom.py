"""What is really installed, as a bill of materials (CycloneDX 1.6): Python's distributions, Debian's packages, viewers.

    python -m pipeline.sbom FILE

It asks the installation itself, not a lock or a wish: whoever reads it learns what lies on this disk. docker/Dockerfile writes
it into the image, `hilum bundle` lays that one beside the image.
"""

import json
import platform
import re
import sys
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any
from urllib.parse import quote

PLACE = "usr/share/doc/hilum/sbom.json"
"""Where it lies in an image."""

OURS = "hilum"

LONGEST_LICENCE = 60
"""Letters of a licence's name: where a distribution gives more, it gives the whole text."""

VIEWERS = Path(__file__).parent / "outputs" / "_viewer"
"""Scripts of others that our wheel carries, each pinned by a JSON file."""

NUMBERS = uuid.UUID("5b7c8e0a-6c55-4f0f-9d3e-0d8a52b1f1c4")
"""The name space of our serial numbers: the same contents have the same number."""


def bill(root: Path = Path("/"), moment: datetime | None = None) -> dict[str, Any]:
    """Everything below that root and in this Python, each with version, licence where it says one, and address."""
    installed = [_Installed.read(one) for one in distributions()]
    parts = (*_python(installed), *_scripts(), *_debian(root), *_system(root))
    found = {one["bom-ref"]: one for one in parts}
    components = [found[reference] for reference in sorted(found)]
    ours = next((one["version"] for one in components if one["name"] == OURS), "unknown")
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(NUMBERS, json.dumps(components))}",
        "version": 1,
        "metadata": {
            "timestamp": (moment or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "tools": {"components": [{"type": "application", "name": "hilum sbom", "version": ours}]},
            "component": {"type": "container", "bom-ref": "image", "name": OURS, "version": ours},
        },
        "components": components,
        "dependencies": _dependencies(set(found), installed),
    }


def write(path: Path) -> None:
    """The bill of this installation, in a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(bill(), indent=1) + "\n")


@dataclass(frozen=True, kw_only=True)
class _Installed:
    """A distribution, its metadata read once: importlib reads the file anew for every word."""

    name: str
    version: str
    said: dict[str, Any]

    @classmethod
    def read(cls, one: Any) -> "_Installed":
        """Of importlib's, or of the package that takes its place once some library has loaded it."""
        said = one.metadata.json
        return cls(name=str(said["name"]), version=str(said["version"]), said=said)

    @property
    def address(self) -> str:
        return f"pkg:pypi/{_plain(self.name)}@{quote(self.version)}"


def _python(installed: Sequence[_Installed]) -> Iterator[dict[str, Any]]:
    version = platform.python_version()
    yield _component("application", "python", version, f"pkg:generic/python@{version}")
    for one in installed:
        yield _component("library", one.name, one.version, one.address) | _licences(one.said)


def _component(kind: str, name: str, version: str, address: str) -> dict[str, Any]:
    return {"type": kind, "bom-ref": address, "name": name, "version": version, "purl": address}


def _plain(name: str) -> str:
    """As the index spells it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _licences(said: dict[str, Any]) -> dict[str, Any]:
    """As the distribution says it: an SPDX expression, else a name; nothing is guessed."""
    if expression := said.get("license_expression"):
        return {"licenses": [{"expression": expression}]}
    name = str(said.get("license", "")).strip()
    if name and "\n" not in name and len(name) <= LONGEST_LICENCE:
        return {"licenses": [{"license": {"name": name}}]}
    sorts = [line for line in said.get("classifier", []) if line.startswith("License ::")]
    names = [{"license": {"name": line.rsplit(" :: ", 1)[1]}} for line in sorts]
    return {"licenses": names} if names else {}


def _scripts() -> Iterator[dict[str, Any]]:
    for path in sorted(VIEWERS.glob("*.json")):
        said = json.loads(path.read_text(encoding="utf-8"))
        if (VIEWERS / "npm" / Path(said["script"]).name).is_file():
            name = said["package"]
            address = f"pkg:npm/{quote(name, safe='/')}@{said['version']}"
            hashes = [{"alg": "SHA-256", "content": said["sha256"]}]
            licences = [{"license": {"name": said["licence"]}}]
            yield _component("library", name, said["version"], address) | {"hashes": hashes, "licenses": licences}


def _debian(root: Path) -> Iterator[dict[str, Any]]:
    """dpkg's own list; an image on another base has none."""
    path = root / "var/lib/dpkg/status"
    if not path.is_file():
        return
    for paragraph in path.read_text(encoding="utf-8", errors="replace").split("\n\n"):
        said = dict(line.split(": ", 1) for line in paragraph.splitlines() if re.match(r"[A-Z][\w-]*: ", line))
        if said.get("Status") == "install ok installed":
            version, kind = quote(said["Version"], safe=""), said["Architecture"]
            address = f"pkg:deb/debian/{quote(said['Package'])}@{version}?arch={kind}"
            yield _component("library", said["Package"], said["Version"], address)


def _system(root: Path) -> Iterator[dict[str, Any]]:
    path = root / "etc/os-release"
    if path.is_file():
        lines = [line.partition("=") for line in path.read_text().splitlines() if "=" in line]
        said = {name: value.strip('"') for name, _, value in lines}
        name, version = said.get("ID", "linux"), said.get("VERSION_ID", "unknown")
        one = _component("operating-system", name, version, f"pkg:generic/{name}@{version}")
        yield {key: value for key, value in one.items() if key != "purl"}


def _dependencies(known: set[str], installed: Sequence[_Installed]) -> list[dict[str, Any]]:
    """What needs what among Python's distributions; what an extra alone would need is left out."""
    addresses = {_plain(one.name): one.address for one in installed}
    needs = {one.address: sorted(_needed(one, addresses)) for one in installed}
    return [{"ref": "image", "dependsOn": sorted(known)}] + [
        {"ref": reference, "dependsOn": needed} for reference, needed in sorted(needs.items())
    ]


def _needed(one: _Installed, addresses: dict[str, str]) -> set[str]:
    asked = [line.partition(";") for line in one.said.get("requires_dist", [])]
    names = [re.match(r"[\w.-]+", line) for line, _, marker in asked if "extra" not in marker]
    return {addresses[_plain(name.group())] for name in names if name and _plain(name.group()) in addresses}


def main(words: Sequence[str]) -> int:
    """In the build of an image, where no verb is needed yet."""
    write(Path(words[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
