"""The bill of materials says what is installed, in the words of CycloneDX 1.6."""

import json
import re
import shutil
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import pytest

from pipeline.sbom import bill, write

STATUS = """Package: libc6
Status: install ok installed
Architecture: amd64
Version: 2.36-9+deb12u9
Description: a library
 with: a longer line

Package: gone
Status: deinstall ok config-files
Architecture: amd64
Version: 1:2~3-1
"""
TYPES = {"application", "library", "container", "operating-system"}
"""Those of the schema's list that are used here."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """What dpkg and the release say in an image."""
    (tmp_path / "var/lib/dpkg").mkdir(parents=True)
    (tmp_path / "var/lib/dpkg/status").write_text(STATUS)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/os-release").write_text('NAME="Debian GNU/Linux"\nVERSION_ID="12"\nID=debian\n')
    return tmp_path


def test_every_distribution_is_there_with_the_version_that_is_installed(root: Path) -> None:
    found = {one["purl"] for one in bill(root)["components"] if one.get("purl", "").startswith("pkg:pypi/")}
    plain = {re.sub(r"[-_.]+", "-", one.name).lower(): one.version for one in metadata.distributions()}
    assert found == {f"pkg:pypi/{name}@{version}" for name, version in plain.items()}


def test_debians_packages_are_those_that_are_installed_and_the_release_is_named(root: Path) -> None:
    components = bill(root)["components"]
    assert [one["purl"] for one in components if one.get("purl", "").startswith("pkg:deb/")] == [
        "pkg:deb/debian/libc6@2.36-9%2Bdeb12u9?arch=amd64"
    ]
    assert [(one["name"], one["version"]) for one in components if one["type"] == "operating-system"] == [
        ("debian", "12")
    ]


@pytest.mark.skipif(shutil.which("dpkg-query") is None, reason="no dpkg on this machine")
def test_dpkg_itself_counts_the_same_packages() -> None:
    said = subprocess.run(
        ["dpkg-query", "-W", "-f", "${db:Status-Status} ${Package} ${Version}\n"],
        capture_output=True,
        text=True,
        check=True,
    )
    theirs = {tuple(line.split()[1:]) for line in said.stdout.splitlines() if line.startswith("installed ")}
    ours = {(one["name"], one["version"]) for one in bill()["components"] if one.get("purl", "").startswith("pkg:deb/")}
    assert ours == theirs


def test_it_has_what_the_schema_requires(root: Path) -> None:
    made = bill(root)
    assert (made["bomFormat"], made["specVersion"], made["version"]) == ("CycloneDX", "1.6", 1)
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", made["serialNumber"])
    components = [made["metadata"]["component"], *made["components"]]
    assert all(one["type"] in TYPES and one["name"] and one["version"] for one in components)
    references = [one["bom-ref"] for one in components]
    assert len(references) == len(set(references))
    named = [one["ref"] for one in made["dependencies"]] + [
        to for one in made["dependencies"] for to in one["dependsOn"]
    ]
    assert set(named) <= set(references)
    for one in components:
        kinds = [set(licence) for licence in one.get("licenses", [])]
        assert kinds in ([], [{"expression"}]) or all(kind == {"license"} for kind in kinds)


def test_what_needs_what_is_what_the_distributions_say(root: Path) -> None:
    needs = {one["ref"]: one["dependsOn"] for one in bill(root)["dependencies"]}
    ours = next(reference for reference in needs if reference.startswith("pkg:pypi/hilum@"))
    names = {reference.partition("@")[0].removeprefix("pkg:pypi/") for reference in needs[ours]}
    assert {"torch", "pydicom", "nibabel"} <= names and "pytest" not in names


def test_the_same_installation_has_the_same_number(root: Path) -> None:
    first, second = (bill(root, datetime(2026, 1, day, tzinfo=UTC)) for day in (1, 2))
    assert first["serialNumber"] == second["serialNumber"]
    (root / "var/lib/dpkg/status").write_text(STATUS.replace("u9", "u10"))
    assert bill(root)["serialNumber"] != first["serialNumber"]


def test_it_names_no_place_of_this_machine(tmp_path: Path) -> None:
    write(tmp_path / "doc" / "sbom.json")
    said = (tmp_path / "doc" / "sbom.json").read_text()
    assert json.loads(said)["components"] and str(Path.home()) not in said and str(tmp_path) not in said
