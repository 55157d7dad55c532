"""A folder that installs a node where there is no network: image, packages, config, bill of materials, sums of them all.

    hilum bundle --image hilum-cpu.tar --package PACKAGE --out FOLDER
    FOLDER/install.sh                                      on the other machine: checks every sum, loads, starts

Whoever carried it can have changed it all, sums included: the sum of the sums, which `hilum bundle` prints, goes another way.
"""

import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from . import seal
from .errors import DamagedPackage, UsageError
from .report import as_json, hilum_version, swap
from .sbom import PLACE
from .signatures import FILE_NAME as SIGNATURE

SUMS = "SHA256SUMS"
DOCKER = Path(__file__).resolve().parents[1] / "docker"
"""Of the checkout: who can make an image has one."""
FROM_DOCKER = ("install.sh", "README.md", "compose.yaml", "compose.many.yaml")
ENGINES = ("docker", "podman")
"""Whose `save` writes an image that is named instead of given as a file."""
IMAGES = "images"


@dataclass(frozen=True, kw_only=True)
class Image:
    """An archive of an image, as `docker save` and `podman save` write it."""

    path: Path
    name: str
    """As the engine that loads it will call it."""
    bill: bytes
    """What is installed in it; empty of one that is not hilum's."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What was made, or found whole."""

    folder: Path
    images: tuple[str, ...]
    packages: dict[str, str]
    """The id of each, by its name."""
    bytes: int
    sum: str
    """The SHA-256 of SHA256SUMS: whoever knows it knows whether anything was changed."""


def bundle(
    images: Sequence[str], packages: Sequence[Path], out: Path, config: Path | None = None
) -> Bundle:  # fmt: skip
    """Everything that another machine needs, in a new folder: whole under its name, or not there at all."""
    _refuse(images, packages, out)
    building = out.with_name(f".{out.name}.partial")
    shutil.rmtree(building, ignore_errors=True)
    (building / IMAGES).mkdir(parents=True)
    kept = [_kept(name, building / IMAGES / f"{number}.tar") for number, name in enumerate(images)]
    ours = next((image for image in kept if image.bill), None)
    if ours is None:
        raise UsageError(
            f"none of {', '.join(images)} holds /{PLACE}; an image of docker/Dockerfile is needed, which does. Build it anew."
        )
    (building / "sbom.json").write_bytes(ours.bill)
    ids = {package.resolve().name: _sealed_copy(package, building / "packages") for package in packages}
    _lay_out(building, ours, kept, ids, config)
    _sum_up(building)
    swap(building, out)
    return verify(out)


def _refuse(images: Sequence[str], packages: Sequence[Path], out: Path) -> None:
    if not (DOCKER / "install.sh").is_file():
        raise UsageError(
            f"{DOCKER} holds no install.sh; a bundle is made in a checkout, as its image is. Run hilum from there."
        )
    names = [package.resolve().name for package in packages]
    if len(set(names)) < len(names):
        raise UsageError(f"two packages are called {names}; each needs a name of its own. Rename a folder.")
    if out.exists():
        raise UsageError(f"{out} is there already; a bundle needs a new folder. Give another name, or remove it.")
    if not images or not packages:
        raise UsageError("an image and a package are needed at the least. Give --image and --package.")


def verify(folder: Path) -> Bundle:
    """A bundle of which every file is as it was made, and none was added; refused otherwise."""
    try:
        sums = (folder / SUMS).read_text().splitlines()
        said = {name: number for number, _, name in (line.partition("  ") for line in sums)}
        kept = json.loads((folder / "bundle.json").read_text())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{folder} is no bundle ({type(error).__name__}); a folder that `hilum bundle` made is needed. Name one."
        ) from None
    there = {
        str(path.relative_to(folder)): path for path in _files(folder) if path.name != SUMS or path.parent != folder
    }
    wrong = [name for name in sorted(said) if name in there and seal.sha256_of(there[name]) != said[name]]
    for words, names in (("changed", wrong), ("missing", said.keys() - there), ("not of it", there.keys() - said)):
        if names:
            raise DamagedPackage(
                f"{folder}: {', '.join(sorted(names)[:3])} {words} since it was made. A bundle must be what was made, byte for "
                "byte: carry it over again."
            )
    size = sum(path.stat().st_size for path in there.values())
    return Bundle(
        folder=folder, images=tuple(kept["images"]), packages=kept["packages"], bytes=size,
        sum=seal.sha256_of(folder / SUMS),
    )  # fmt: skip


def _files(folder: Path) -> Iterator[Path]:
    """A link could lead to what no sum is of, so it counts as a file that is not one of the bundle's."""
    return (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def _kept(named: str, path: Path) -> Image:
    """An archive, copied; or an image of this machine's engine, saved."""
    if Path(named).is_file():
        shutil.copyfile(named, path)
        return read_image(path)
    met = ""
    for engine in ENGINES:
        if shutil.which(engine):
            words = [engine, "save", "--output", str(path), named]
            saved = subprocess.run(words, capture_output=True, text=True, check=False)
            if saved.returncode == 0:
                return read_image(path)
            met += f" {engine}: {saved.stderr.strip()[-200:]}"
    raise UsageError(
        f"{named} is no file, and no image that docker or podman saves here ({met.strip() or 'neither is installed'}); an archive "
        "or the name of an image is needed. `docker images` lists them; or save it where it was built, and give the file."
    )


def read_image(path: Path) -> Image:
    """Its name, and its own bill of materials; refused where it is no archive of an image."""
    try:
        with tarfile.open(path) as archive:
            name, layers = _docker(archive) if "manifest.json" in archive.getnames() else _oci(archive)
            return Image(path=path, name=name, bill=_bill(archive, layers))
    except (tarfile.TarError, KeyError, IndexError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path.name} is no archive of one image with a name ({type(error).__name__}: {error}); what `docker save` or "
            "`podman save` writes is needed. Save it again."
        ) from None


def _docker(archive: tarfile.TarFile) -> tuple[str, list[str]]:
    (said,) = _json(archive, "manifest.json")
    return str(said["RepoTags"][0]), list(said["Layers"])


def _oci(archive: tarfile.TarFile) -> tuple[str, list[str]]:
    (said,) = _json(archive, "index.json")["manifests"]
    manifest = _json(archive, _blob(said["digest"]))
    return str(said["annotations"]["org.opencontainers.image.ref.name"]), [
        _blob(one["digest"]) for one in manifest["layers"]
    ]


def _blob(digest: str) -> str:
    kind, _, number = digest.partition(":")
    return f"blobs/{kind}/{number}"


def _json(archive: tarfile.TarFile, name: str) -> Any:
    return json.load(_member(archive, name))


def _member(archive: tarfile.TarFile, name: str) -> Any:
    found = archive.extractfile(name)
    if found is None:
        raise KeyError(name)
    return found


def _bill(archive: tarfile.TarFile, layers: list[str]) -> bytes:
    """From the last layer that has one: it covers those below."""
    for name in reversed(layers):
        with tarfile.open(fileobj=_member(archive, name)) as layer:
            for member in layer:
                if member.name.removeprefix("./") == PLACE:
                    found = layer.extractfile(member)
                    return found.read() if found else b""
    return b""


def _sealed_copy(package: Path, folder: Path) -> str:
    """What its seal names, no byte more; checked before and after."""
    before = _load(package)
    target = folder / package.resolve().name
    target.mkdir(parents=True)
    for name in (*before.files, seal.FILE_NAME, *(one for one in BESIDE if (package / one).is_file())):
        shutil.copyfile(package / name, target / name)
    after = _load(target)
    assert after.id == before.id
    return str(after.id)


BESIDE = (SIGNATURE,)
"""What belongs to a package and is in no seal, for it is of the seal."""


def _load(folder: Path) -> Any:
    if seal.kind_of(folder) == "scans":
        from .package import ModelPackage

        return ModelPackage.load(folder).record
    from .slides.package import SlidePackage

    return SlidePackage.load(folder).record


def _lay_out(folder: Path, ours: Image, images: list[Image], ids: dict[str, str], config: Path | None) -> None:
    for name in FROM_DOCKER:
        shutil.copy(DOCKER / name, folder / name)
    for compose in folder.glob("*.yaml"):  # images are loaded there, and never built
        compose.write_text(re.sub(r"^ +build: .*\n", "", compose.read_text(), flags=re.MULTILINE))
    (folder / "config").mkdir()
    (folder / "config" / "node.yaml").write_text(_config(config, ids))
    others = {f"HILUM_{_kind(image)}IMAGE": image.name for image in images if image is not ours}
    settings = {"HILUM_IMAGE": ours.name, **others}
    (folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    said = {"hilum": hilum_version(), "images": [image.name for image in images], "packages": ids}
    (folder / "bundle.json").write_text(as_json(said))


def _kind(image: Image) -> str:
    """hilum:database is HILUM_DATABASE_IMAGE."""
    return re.sub(r"\W", "_", image.name.rpartition(":")[2]).upper() + "_"


def _config(config: Path | None, ids: dict[str, str]) -> str:
    if config is None:
        return (DOCKER / "config" / "node.yaml").read_text()
    said = yaml.safe_load(config.read_text())
    asked = {name: str(route["package"]) for name, route in said.get("routes", {}).items()}
    for route, place in asked.items():
        if place not in {f"/packages/{name}" for name in ids}:
            raise UsageError(
                f"route {route} of {config} asks {place}; in the container packages lie at "
                f"{', '.join(f'/packages/{name}' for name in ids)}. Name one of these, or give --package."
            )
    return config.read_text()


def _sum_up(folder: Path) -> None:
    """As `sha256sum --check` reads it."""
    lines = [f"{seal.sha256_of(path)}  {path.relative_to(folder)}\n" for path in sorted(_files(folder))]
    (folder / SUMS).write_text("".join(lines))
