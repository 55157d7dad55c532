"""A bundle is whole or refused: every byte of it is summed, by hilum, by coreutils, and by the script that installs it."""

import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pipeline import offline
from pipeline.cli import main
from pipeline.errors import PackageError, UsageError
from pipeline.node.service import read_config
from pipeline.offline import bundle, verify
from pipeline.package import ModelPackage
from pipeline.sbom import PLACE

BILL = {"bomFormat": "CycloneDX", "components": []}
ENGINE = """#!/bin/sh
echo "$@" >>{log}
[ "$1" != exec ] || exit ${{HEALTHY:-0}}
"""


def archive_of(path: Path, name: str = "localhost/hilum:cpu", bill: bytes | None = json.dumps(BILL).encode()) -> Path:
    """As `docker save` writes it, with two layers; the lower one has an older bill."""
    layers = [_tar({PLACE: b"an older one"}), _tar({PLACE: bill} if bill else {"opt/hilum/x": b""})]
    if bill is None:
        layers = layers[1:]
    files = {f"{number}.tar": layer for number, layer in enumerate(layers)}
    said = [{"Config": "config.json", "RepoTags": [name], "Layers": list(files)}]
    path.write_bytes(_tar({"manifest.json": json.dumps(said).encode(), "config.json": b"{}", **files}))
    return path


def oci_archive_of(path: Path) -> Path:
    """As `podman save --format oci-archive` writes it."""
    manifest = {"layers": [{"digest": "sha256:1a"}]}
    index = {
        "manifests": [
            {"digest": "sha256:2b", "annotations": {"org.opencontainers.image.ref.name": "localhost/hilum:cpu"}}
        ]
    }
    files = {"index.json": index, "blobs/sha256/2b": manifest}
    layer = _tar({f"./{PLACE}": json.dumps(BILL).encode()})
    path.write_bytes(
        _tar({name: json.dumps(said).encode() for name, said in files.items()} | {"blobs/sha256/1a": layer})
    )
    return path


def _tar(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return made.getvalue()


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    image, database = archive_of(folder / "hilum.tar"), archive_of(folder / "db.tar", "localhost/hilum:database", None)
    return bundle([str(image), str(database)], [tiny], folder / "bundle").folder


@pytest.fixture
def carried(made: Path, tmp_path: Path) -> Path:
    """On the other machine."""
    return Path(shutil.copytree(made, tmp_path / "carried"))


def test_a_bundle_has_all_that_the_other_machine_needs(made: Path, tiny: Path) -> None:
    assert ModelPackage.load(made / "packages" / "tiny").id == ModelPackage.load(tiny).id
    assert json.loads((made / "sbom.json").read_text()) == BILL, "the bill of the uppermost layer"
    assert (
        made / ".env"
    ).read_text() == "HILUM_IMAGE=localhost/hilum:cpu\nHILUM_DATABASE_IMAGE=localhost/hilum:database\n"
    assert len(list((made / "images").glob("*.tar"))) == 2
    for name in ("compose.yaml", "compose.many.yaml"):
        services = yaml.safe_load((made / name).read_text())["services"]
        assert services and not [one for one, said in services.items() if "build" in said], name
    read_config(made / "config" / "node.yaml")


def test_an_archive_of_the_other_format_is_read_as_well(tiny: Path, tmp_path: Path) -> None:
    made = bundle([str(oci_archive_of(tmp_path / "hilum.tar"))], [tiny], tmp_path / "bundle")
    assert made.images == ("localhost/hilum:cpu",)


def test_coreutils_agrees_with_every_sum(made: Path) -> None:
    done = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=made, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = [path for path in made.rglob("*") if path.is_file()]
    assert done.stdout.count(": OK\n") == len(files) - 1


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def append(path: Path, words: str) -> None:
    path.write_text(path.read_text() + words)


def link(path: Path) -> None:
    target = path.with_name(path.name + ".kept")
    path.rename(target)
    path.symlink_to(target.name)


CHANGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit of the image": lambda folder: flip(folder / "images" / "0.tar"),
    "a flipped bit of the weights": lambda folder: flip(next((folder / "packages").glob("*/*.safetensors"))),
    "another script": lambda folder: append(folder / "install.sh", "id\n"),
    "a file more": lambda folder: (folder / "packages" / "more").write_text("x"),
    "a hidden file more": lambda folder: (folder / "images" / ".x.tar").write_text("x"),
    "a file less": lambda folder: (folder / "sbom.json").unlink(),
    "a link instead of a file": lambda folder: link(folder / "bundle.json"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_was_changed_on_the_way_is_found(carried: Path, change: str) -> None:
    CHANGES[change](carried)
    with pytest.raises((PackageError, UsageError), match="carried"):
        verify(carried)


@pytest.mark.parametrize("change", [change for change in CHANGES if change != "another script"])
def test_the_script_that_installs_it_finds_the_same_and_never_asks_the_engine(
    carried: Path, tmp_path: Path, change: str
) -> None:
    CHANGES[change](carried)
    done = install(carried, tmp_path)
    assert done.returncode == 2 and "install.sh: " in done.stderr
    assert not (tmp_path / "log").exists() and not (tmp_path / "srv").exists()


def test_sums_that_were_made_anew_are_not_those_that_were_announced(carried: Path, tmp_path: Path) -> None:
    announced = verify(carried).sum
    assert not install(carried, tmp_path, SUM=announced).stderr.startswith("install.sh: SHA256SUMS")
    flip(carried / "images" / "0.tar")
    names = [
        str(path.relative_to(carried)) for path in carried.rglob("*") if path.is_file() and path.name != "SHA256SUMS"
    ]
    sums = subprocess.run(["sha256sum", *sorted(names)], cwd=carried, capture_output=True, text=True, check=True)
    (carried / "SHA256SUMS").write_text(sums.stdout)
    assert verify(carried).sum != announced
    assert "not the one that was announced" in install(carried, tmp_path, SUM=announced).stderr


def install(bundle: Path, folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """With an engine that only writes down what it is asked: a real one runs in tests/test_docker.py."""
    engine = folder / "engine"
    engine.write_text(ENGINE.format(log=folder / "log"))
    engine.chmod(0o755)
    surroundings = os.environ | {"ENGINE": str(engine)} | settings
    words = ["sh", str(bundle / "install.sh"), str(folder / "srv")]
    return subprocess.run(words, env=surroundings, capture_output=True, text=True, check=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="folders are given to another user, which takes root")
def test_an_installation_asks_the_engine_for_a_container_that_may_do_nothing_else(
    carried: Path, tmp_path: Path
) -> None:
    done = install(carried, tmp_path)
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "log").read_text().splitlines()
    run = next(line for line in asked if line.startswith("run "))
    for word in ("--read-only", "--cap-drop all", "no-new-privileges", "--user 10001:10001", "127.0.0.1:8080:8080"):
        assert word in run
    assert sum(line.startswith("load ") for line in asked) == 2
    assert ModelPackage.load(tmp_path / "srv" / "packages" / "tiny").name == "tiny"
    assert (tmp_path / "srv" / "state").stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="folders are given to another user, which takes root")
def test_an_upgrade_keeps_the_config_and_all_that_was_received(carried: Path, tmp_path: Path) -> None:
    assert install(carried, tmp_path).returncode == 0
    ours = {
        "srv/config/node.yaml": "state: /state # ours",
        "srv/state/ledger": "rows",
        "srv/packages/other/x": "theirs",
    }
    for name, said in ours.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(said)
    flip(tmp_path / "srv" / "packages" / "tiny" / "package.json")
    assert install(carried, tmp_path).returncode == 0
    assert {name: (tmp_path / name).read_text() for name in ours} == ours
    assert ModelPackage.load(tmp_path / "srv" / "packages" / "tiny").name == "tiny"


def test_a_config_comes_along_if_its_packages_do(tiny: Path, tmp_path: Path) -> None:
    image, config = archive_of(tmp_path / "hilum.tar"), tmp_path / "node.yaml"
    route = {"package": "/packages/tiny", "take": {"mr": {}}}
    config.write_text(yaml.safe_dump({"state": "/state", "routes": {"brain": route}}))
    made = bundle([str(image)], [tiny], tmp_path / "bundle", config)
    assert (made.folder / "config" / "node.yaml").read_text() == config.read_text()
    config.write_text(yaml.safe_dump({"state": "/state", "routes": {"brain": route | {"package": "/packages/other"}}}))
    with pytest.raises(UsageError, match="/packages/other"):
        bundle([str(image)], [tiny], tmp_path / "another", config)
    assert not (tmp_path / "another").exists()


def test_what_is_no_image_of_ours_makes_no_bundle(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "none.tar").write_bytes(_tar({"hello": b""}))
    (tmp_path / "text.tar").write_text("hello")
    bare = archive_of(tmp_path / "bare.tar", bill=None)
    for path, words in (
        (tmp_path / "none.tar", "no archive"),
        (tmp_path / "text.tar", "no archive"),
        (bare, "none of"),
    ):
        with pytest.raises(UsageError, match=words):
            bundle([str(path)], [tiny], tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_damaged_package_makes_no_bundle(tiny: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(tiny, tmp_path / "damaged"))
    flip(next(damaged.glob("*.safetensors")))
    with pytest.raises(PackageError):
        bundle([str(archive_of(tmp_path / "hilum.tar"))], [damaged], tmp_path / "bundle")


def test_what_lies_in_a_package_and_not_in_its_seal_is_left_behind(tiny: Path, tmp_path: Path) -> None:
    package = Path(shutil.copytree(tiny, tmp_path / "tiny"))
    (package / "notes.txt").write_text("for me")
    (package / "signature.json").write_text("{}")
    made = bundle([str(archive_of(tmp_path / "hilum.tar"))], [package], tmp_path / "bundle").folder
    assert not (made / "packages" / "tiny" / "notes.txt").exists()
    assert (made / "packages" / "tiny" / "signature.json").exists()


def test_the_command_makes_one_checks_it_and_prints_the_sum_of_its_sums(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--image",
        str(archive_of(tmp_path / "hilum.tar")),
        "--package",
        str(tiny),
        "--out",
        str(tmp_path / "bundle"),
    ]
    assert main(["bundle", *words]) == 0
    printed = capsys.readouterr().out
    said = subprocess.run(["sha256sum", tmp_path / "bundle" / "SHA256SUMS"], capture_output=True, text=True, check=True)
    assert printed == said.stdout.split()[0] + "\n"
    assert main(["bundle", "--verify", str(tmp_path / "bundle")]) == 0
    assert capsys.readouterr().out == printed
    flip(tmp_path / "bundle" / "images" / "0.tar")
    assert main(["bundle", "--verify", str(tmp_path / "bundle")]) == 2
    assert main(["bundle"]) == 2
    assert main(["bundle", *words]) == 2 and offline.SUMS in {path.name for path in (tmp_path / "bundle").iterdir()}
