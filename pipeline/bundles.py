"""What others trained in MONAI, as a package of ours: a bundle's network, weights, transforms and labels, and no line of its code."""

import shutil
import stat
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from networks import monai_net
from preprocessing.declared import label_table
from preprocessing.plan import Label, Plan, Triple
from preprocessing.records import encode
from preprocessing.steps import Pad

from . import seal
from .bundle_steps import Ending, Preparation, ending, preparation
from .bundle_words import Target, Words
from .errors import PackageError, UsageError
from .package import ALL, FORMAT, Fold, ModelPackage, Package, build_network, card, library_versions, weights_file
from .postprocessing import Chosen, Largest, LargestOfAll, Rule
from .report import hilum_version
from .unpickling import unpickle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

NETWORK = "monai_net"
CONFIGS = ("configs/inference.json", "configs/inference.yaml", "configs/inference.yml")
METADATA = "configs/metadata.json"
WEIGHTS = ("models/model.pt", "models/model.pth", "models/model.ts")
"""Where a bundle keeps them, in the order in which they are looked for."""
UNDER = ("", "model", "state_dict", "network", "net")
"""Under which key of a checkpoint the weights may lie; the first: they are all of it."""
LARGEST_TEXT = 10_000_000
"""Bytes; a configuration has some thousand. What is larger is none."""


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the bundle leaves open, or hilum does otherwise."""

    resample: Literal["", "hilum"] = ""
    """hilum: where the bundle asks for MONAI's Spacing, hilum's own resampling takes its place; the package says so."""
    spacing_mm: tuple[float, float, float] | None = None
    """Of the scans it was trained on, where the bundle brings scans to none: only told in warnings, never resampled to."""


def import_monai(bundle: Path, out: Path, wishes: Wishes = Wishes()) -> ModelPackage:
    """A package from a MONAI bundle, a folder or a zip of one, whose network is one of networks/monai_net.py."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is there already; an import makes a new package. Give another --out, or move it away.")
    workshop = out.with_name(f".{out.name}.unpacked")
    with seal.alone(out), _swept(workshop):
        home = _opened(bundle, workshop)
        words, metadata = _read(home, *CONFIGS), _read(home, METADATA)
        plan, config, ends = _translated(words, metadata, wishes)
        network = _with_weights(_made(words, config, plan), home, workshop / "weights.safetensors")
        return _packed(out, network, config, plan, _chosen(ends, plan))


def _translated(words: Words, metadata: Words, wishes: Wishes) -> tuple[Plan, monai_net.Config, Ending]:
    config, inputs, outputs = _network(words)
    prepared, ends = preparation(words, inputs, wishes.resample), ending(words)
    patch = _patch(words, monai_net.divisor(config))
    spacing = prepared.spacing_mm or wishes.spacing_mm
    if spacing is None:
        raise UsageError(
            f"{words.file} brings scans to no voxel size, and nobody says that of the scans it was trained on; hilum warns of "
            "scans unlike them. Give it: --spacing-mm [1,1,1]."
        )
    plan = Plan(
        name=str(metadata.find("name") or "monai bundle"),
        channels=_channels(metadata, inputs),
        labels=_labels(metadata, outputs, ends.regions),
        steps=(*prepared.steps, Pad(shape=patch)),  # what the inferer does to a scan smaller than its window
        spacing_mm=spacing,
        patch=patch,
        batch=1,
        reasons={"origin": _origin(metadata, prepared)},
    )
    return plan, config, ends


def _origin(metadata: Words, prepared: Preparation) -> str:
    version, made_for = metadata.find("version"), metadata.find("monai_version")
    return " ".join(
        [
            f"A MONAI bundle, version {version or 'unknown'}, made with MONAI {made_for or 'unknown'}, imported.",
            *prepared.notes,
            "Its windows are laid and blended by hilum's rule; within a window the logits are MONAI's.",
        ]
    )


def _network(words: Words) -> tuple[monai_net.Config, int, int]:
    """What would be built, its channels in and its channels out."""
    said = words.find("network_def", "network", "net")
    if not isinstance(said, Target):
        raise PackageError(
            f"{words.file} names no network by a _target_ under network_def; one of {', '.join(monai_net.NETS)} is needed. "
            "Write it out in a copy of the bundle."
        )
    modules = said.path.rpartition(".")[0]
    if said.name not in monai_net.NETS or not (modules == "" or modules.startswith("monai.networks.nets")):
        raise UsageError(
            f"{words.file} builds {said.path}; networks of MONAI that can be imported are {', '.join(monai_net.NETS)}: "
            "anything else is code of the bundle's, and no code is run. Use this bundle in MONAI."
        )
    arguments = words.arguments(said)
    if arguments.pop("spatial_dims", 3) != 3:
        raise UsageError(f"{words.file} builds a network of pictures; one of volumes is needed (spatial_dims 3).")
    channels = [arguments.pop(name, default) for name, default in (("in_channels", 1), ("out_channels", 2))]
    if not all(isinstance(number, int) and number > 0 for number in channels):
        raise PackageError(
            f"{words.file}: channels {channels} of the network were met; numbers are needed. Correct it."
        )
    try:
        return monai_net.Config(net=said.name, arguments=arguments), channels[0], channels[1]
    except ValueError as error:
        raise UsageError(f"{words.file}: {error}") from None


def _patch(words: Words, divisor: Triple) -> Triple:
    inferer = words.find("inferer")
    if not isinstance(inferer, Target) or not inferer.name.startswith("SlidingWindowInferer"):
        raise UsageError(
            f"{words.file} has no SlidingWindowInferer; hilum looks at scans in windows of one size, which its roi_size says. "
            "Write one out in a copy of the bundle."
        )
    said = words.value(inferer.arguments.get("roi_size"))
    sides = said if isinstance(said, list | tuple) else [said] * 3
    if len(sides) != 3 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise UsageError(f"{words.file}: roi_size is {said}; three numbers above 0 are needed. Write them out.")
    if any(side % step for side, step in zip(sides, divisor, strict=True)):
        raise UsageError(
            f"{words.file}: roi_size is {said}, and this network needs multiples of {divisor}. Take the next larger one."
        )
    i, j, k = sides
    return i, j, k


def _channels(metadata: Words, inputs: int) -> tuple[str, ...]:
    names = _defined(metadata, "inputs", "image")
    if len(names) != inputs:
        raise PackageError(
            f"{metadata.file} names the channels {names or 'of nothing'}, and the network takes {inputs}; a name for each is "
            "needed (network_data_format.inputs.image.channel_def). Add them in a copy."
        )
    return tuple(names)


def _labels(metadata: Words, outputs: int, regions: bool) -> tuple[Label, ...]:
    """Of classes all but the first, which is the background; of regions all."""
    names = _defined(metadata, "outputs", "pred")
    wanted = outputs + 1 if regions and len(names) == outputs + 1 and names[0].lower() == "background" else outputs
    if len(names) != wanted or (not regions and outputs < 2):
        raise PackageError(
            f"{metadata.file} names the outputs {names or 'of nothing'}, and the network has {outputs}; a name for each is "
            "needed (network_data_format.outputs.pred.channel_def), the background first. Add them in a copy."
        )
    found = names if regions and wanted == outputs else names[1:]
    table = label_table({name: number for number, name in enumerate(found, 1)})
    return tuple(replace(label, parts=(label.value,)) for label in table) if regions else table


def _defined(metadata: Words, way: str, name: str) -> list[str]:
    """The names of channels in their order."""
    said = metadata.find("network_data_format")
    there = said.get(way, {}) if isinstance(said, Mapping) else {}
    one = there.get(name) or (next(iter(there.values())) if len(there) == 1 else {})
    names = one.get("channel_def", {}) if isinstance(one, Mapping) else {}
    return [str(names[key]) for key in sorted(names, key=int)]


def _chosen(ends: Ending, plan: Plan) -> tuple[Chosen, ...]:
    names = {label.value: label.name for label in plan.labels}
    if unknown := sorted(set(ends.largest) - set(names)):
        raise PackageError(
            f"the bundle keeps the largest part of {unknown}, and has labels {names}. Correct it in a copy."
        )
    if ends.together and ends.largest and set(ends.largest) != set(names):
        raise UsageError(
            f"the bundle keeps the largest part of {ends.largest} taken together, and hilum that of one label or of all. "
            "Use this bundle in MONAI."
        )
    rules: Sequence[Rule] = (
        [LargestOfAll()] if ends.together else [Largest(label=names[value]) for value in ends.largest]
    )
    return tuple(
        Chosen(rule=rule, dice_before={}, dice_after={}, cases=0, better=0, worse=0, folds=()) for rule in rules
    )


def _made(words: Words, config: monai_net.Config, plan: Plan) -> "nn.Module":
    try:
        return build_network(NETWORK, encode(config), plan)
    except (ValueError, TypeError) as error:  # MONAI's own words on its arguments
        raise UsageError(
            f"{words.file}: MONAI makes no {config.net} of these arguments ({error}); those of the MONAI that is installed "
            "are needed. Use the version that the bundle names."
        ) from None


def _with_weights(network: "nn.Module", home: Path, weights: Path) -> "nn.Module":
    """Out of the bundle's checkpoint, in a process apart; every name and size must fit."""
    from safetensors.torch import load_file

    checkpoint = next((home / name for name in WEIGHTS if (home / name).is_file()), None)
    if checkpoint is None:
        raise PackageError(
            f"{home} holds no {' and no '.join(WEIGHTS)}; the weights are needed. Fetch the bundle whole."
        )
    _out_of_the_pickle(checkpoint, weights)
    state = {f"network.{name.removeprefix('module.')}": tensor for name, tensor in load_file(weights).items()}
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise PackageError(
            f"{checkpoint.name} holds no weights of the network that the bundle tells ({reason}); both of one training are "
            "needed. Fetch the bundle whole, and use the MONAI version that it names."
        ) from None
    return network.eval()


def _out_of_the_pickle(checkpoint: Path, weights: Path) -> None:
    """Bundles keep weights as they are, or under a key."""
    refused: list[PackageError] = []
    for key in UNDER:
        try:
            unpickle({checkpoint: weights}, key)
            return
        except PackageError as error:
            refused.append(error)
            if not any(words in str(error) for words in ("no table of tensors", "it has no")):
                break  # it is no such file under any key
    raise refused[0]


def _packed(
    out: Path, network: "nn.Module", config: monai_net.Config, plan: Plan, rules: tuple[Chosen, ...]
) -> ModelPackage:
    fold = Fold(
        weights=weights_file(ALL), dice={}, cases_trained=0, cases_held_out=0, epochs=0, minutes=0.0, seed=0
    )  # fmt: skip
    record = Package(
        format=FORMAT,
        hilum=hilum_version(),
        name=plan.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        network=NETWORK,
        network_config=encode(config),
        plan=plan,
        folds={ALL: fold},
        versions=library_versions(),
        postprocessing=rules,
        origin=plan.reasons["origin"],
    )

    def fill(building: Path, record: Package) -> None:
        seal.write_weights(network, building / fold.weights)
        (building / "card.md").write_text(card(record))

    seal.write(out, record, fill)
    return ModelPackage.load(out)


@contextmanager
def _swept(workshop: Path) -> "Iterator[None]":
    shutil.rmtree(workshop, ignore_errors=True)
    workshop.mkdir(parents=True)
    try:
        yield
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def _opened(bundle: Path, workshop: Path) -> Path:
    """The bundle's folder; of a zip only what is read here leaves it, into a folder of its own."""
    if bundle.is_dir():
        return bundle
    if not bundle.is_file() or not zipfile.is_zipfile(bundle):
        raise UsageError(f"{bundle} is neither a folder nor a zip; a MONAI bundle is needed. Look at the spelling.")
    home = workshop / "bundle"
    with zipfile.ZipFile(bundle) as archive:
        for member in archive.infolist():
            _refuse_outside(bundle, member)
        for wanted in (METADATA, *CONFIGS, *WEIGHTS):
            for member in archive.infolist():
                if PurePosixPath(member.filename).parts[-2:] == PurePosixPath(wanted).parts:
                    (home / wanted).parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(member) as source, (home / wanted).open("wb") as target:
                        shutil.copyfileobj(source, target)
    home.mkdir(exist_ok=True)
    return home


def _refuse_outside(bundle: Path, member: zipfile.ZipInfo) -> None:
    """Nothing here would be written there; but whoever made it meant harm, or it is broken."""
    path = PurePosixPath(member.filename.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in path.parts[0] or stat.S_ISLNK(member.external_attr >> 16):
        raise PackageError(
            f"{bundle.name} holds {member.filename!r}, which leads out of it; a bundle whose files lie within it is needed. "
            "Do not unpack it, and look at where it came from."
        )


def _read(home: Path, *names: str) -> Words:
    path = next((home / name for name in names if (home / name).is_file()), None)
    if path is None:
        raise UsageError(
            f"{home.name} holds no {' and no '.join(names)}; a MONAI bundle is needed. Give its top folder."
        )
    if path.stat().st_size > LARGEST_TEXT:
        raise PackageError(f"{path.name} is too large for a configuration; some thousand bytes are usual. Look at it.")
    try:
        return Words.read(path.name, path.read_text())
    except UnicodeDecodeError as error:
        raise PackageError(f"{path.name} is no text ({error}); JSON or YAML is needed. Copy it anew.") from None
