"""What makes numbers of the picture of a tile: any network of timm with weights that are on this machine, or none at all.

    hilum_texture          stains and their texture, from formulas: nothing to download, only for trying out
    timm:NAME              weights that timm's hub or torch's has on this machine already
    timm:NAME@WEIGHTS      a file of weights, .safetensors or a pickle that torch reads without running it
    timm:FOLDER            a model of the hub as it was downloaded: config.json and its weights

Nothing is downloaded, and no network answers with weights that nobody trained.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor, nn

from preprocessing.records import nearest

from ..errors import UsageError
from . import texture

logger = logging.getLogger(__name__)

BUILT_IN = "hilum_texture"
CAUTION = (
    "encoder hilum_texture knows colours and textures, not tissue: it is only for trying out. For real work give an encoder "
    "that was trained on slides: --encoder timm:NAME@WEIGHTS"
)
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""As files of weights are called on the hub, the better one first."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoder:
    """Pictures of tiles in, features out."""

    id: str
    """As --encoder names it, without any path."""
    sha256: str
    """Of its weights, and of how pictures are brought to it."""
    dimensions: int
    """Numbers per tile."""
    size_px: int | None
    """The side that pictures must have; None where any from least_px on will do."""
    least_px: int = 1
    caution: str
    """What whoever uses it must know."""
    device: torch.device
    run: Callable[[Tensor], Tensor]

    def embed(self, tiles: UInt8[np.ndarray, "b h w 3"]) -> Float32[np.ndarray, "b d"]:
        """Features of pictures."""
        with torch.inference_mode():
            pictures = torch.from_numpy(tiles).to(self.device).permute(0, 3, 1, 2)
            found: Float32[np.ndarray, "b d"] = self.run(pictures).float().cpu().numpy()
        return found

    def refuse_size(self, tile_px: int) -> None:
        """A picture of a size it was not made for is refused, not stretched."""
        if tile_px < self.least_px:
            raise UsageError(
                f"tiles of {tile_px} pixels were asked for; {self.id} takes {self.least_px} or more. Raise --tile_px."
            )
        if self.size_px is not None and tile_px != self.size_px:
            raise UsageError(
                f"tiles of {tile_px} pixels were asked for; {self.id} takes {self.size_px}. Give --tile_px {self.size_px}."
            )


def load_encoder(name: str, device: torch.device) -> Encoder:
    """The encoder of that name, on that device."""
    if name == BUILT_IN:
        return Encoder(
            id=BUILT_IN, sha256=texture.SHA256, dimensions=texture.DIMENSIONS, size_px=None, least_px=texture.LEAST_PX,
            caution=CAUTION, device=device, run=texture.describe,
        )  # fmt: skip
    kind, _, rest = name.partition(":")
    if kind != "timm" or not rest:
        raise UsageError(
            f"encoder {name!r} is not known{nearest(name, [BUILT_IN]) or '.'} {BUILT_IN}, timm:NAME, timm:NAME@WEIGHTS or "
            "timm:FOLDER is needed. Correct --encoder."
        )
    return _of_timm(_source(rest), device)


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A network of timm, and where its weights lie."""

    architecture: str
    weights: Path
    options: Mapping[str, Any]
    """Of the architecture."""
    told: Mapping[str, Any]
    """What is told beside the weights of the pictures they were trained on, where anything is."""


def _source(words: str) -> _Source:
    place, _, weights = words.partition("@")
    if Path(place).is_dir():
        return _downloaded(Path(place))
    if weights:
        _refuse_unknown(place)
        if not Path(weights).is_file():
            raise UsageError(f"{weights} is no file; the weights of {place} are needed there. Look at the spelling.")
        return _Source(architecture=place, weights=Path(weights), options={}, told={})
    return _on_this_machine(place)


def _downloaded(folder: Path) -> _Source:
    """A model of the hub as a folder: what it is stands in its config.json."""
    weights = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    try:
        told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architecture, options = told["architecture"], told.get("model_args", {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as mistake:
        raise UsageError(
            f"{folder} holds no config.json that names an architecture ({mistake}); a model of timm as the hub gives it is "
            "needed. Download it whole, or give timm:NAME@WEIGHTS."
        ) from None
    if not weights:
        raise UsageError(f"{folder} holds neither {' nor '.join(WEIGHTS)}; one is needed. Download the model whole.")
    _refuse_unknown(architecture)
    return _Source(architecture=architecture, weights=weights[0], options=options, told=told.get("pretrained_cfg", {}))


def _on_this_machine(name: str) -> _Source:
    """Weights that an earlier program fetched; the network is never asked."""
    import timm
    from huggingface_hub import try_to_load_from_cache

    if name.startswith("hf-hub:"):
        config = try_to_load_from_cache(name.removeprefix("hf-hub:"), "config.json")
        if isinstance(config, str):
            return _downloaded(Path(config).parent)
        raise _not_here(name)
    _refuse_unknown(name)
    known = timm.get_pretrained_cfg(name)
    places = [Path(torch.hub.get_dir()) / "checkpoints" / Path(known.url).name] if known and known.url else []
    if known and known.hf_hub_id:
        cached = [try_to_load_from_cache(known.hf_hub_id, file) for file in WEIGHTS]
        places = [*(Path(place) for place in cached if isinstance(place, str)), *places]
    for place in places:
        if place.is_file():
            return _Source(architecture=name, weights=place, options={}, told={})
    raise _not_here(name)


def _not_here(name: str) -> UsageError:
    return UsageError(
        f"timm:{name} has no weights on this machine, and hilum downloads none; without them its features would be noise. "
        f"Give timm:{name}@WEIGHTS with a file of them, or timm:FOLDER with a downloaded model."
    )


def _refuse_unknown(name: str) -> None:
    import timm

    plain = name.partition(".")[0]
    if not timm.is_model(plain):
        raise UsageError(
            f"timm has no network {name!r}{nearest(plain, timm.list_models()) or '.'} One of its names is needed: "
            "timm.list_models() gives them all."
        )


def _of_timm(source: _Source, device: torch.device) -> Encoder:
    import timm

    options = dict(source.options) | {"num_classes": 0}
    network = timm.create_model(source.architecture, pretrained=False, **options)
    pictures = dict(network.pretrained_cfg) | dict(source.told)
    _fill(network, source, str(pictures.get("classifier") or ""))
    size = int(pictures["input_size"][-1])
    fixed = bool(pictures.get("fixed_input_size")) and not options.get("dynamic_img_size")
    mean, sd = ([float(value) for value in pictures[name]] for name in ("mean", "std"))
    shown = {"architecture": source.architecture, "options": options, "mean": mean, "sd": sd}
    identity = _identity(network, shown)
    # channels last: convolutions on processors, and half-precision ones on GPUs, are fastest so
    network = network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    run = _shown(network, mean, sd, device)
    with torch.inference_mode():
        answer = run(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device))
    if answer.ndim != 2:
        raise UsageError(
            f"timm:{source.architecture} answers with {answer.ndim - 1} axes per tile; one row of features is needed. "
            "Give a network that pools."
        )
    return Encoder(
        id=f"timm:{source.architecture}", sha256=identity, dimensions=answer.shape[1],
        size_px=size if fixed else None, caution="", device=device, run=run,
    )  # fmt: skip


def _identity(network: nn.Module, shown: Mapping[str, Any]) -> str:
    """Over every weight, whatever file it came in, and over how pictures are brought to the network."""
    total = hashlib.sha256(json.dumps(shown, sort_keys=True).encode())
    for name, weight in sorted(network.state_dict().items()):
        total.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        total.update(weight.contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def _fill(network: nn.Module, source: _Source, classifier: str) -> None:
    """Every weight of the network from the file, and nothing in the file unused but the head of another task."""
    stored = _stored(source.weights)
    needed = network.state_dict()
    missing = sorted(set(needed) - set(stored))
    unused = sorted(
        name for name in set(stored) - set(needed) if not (classifier and name.startswith(f"{classifier}."))
    )
    others = [name for name in needed if name in stored and needed[name].shape != stored[name].shape]
    if missing or unused or others:
        raise UsageError(
            f"{source.weights.name} does not fit timm:{source.architecture}: {len(missing)} weights are missing, "
            f"{len(unused)} unknown, {len(others)} of another shape, as {[*missing, *unused, *others][0]}. Give the weights "
            "of that very network, or its folder from the hub, whose config.json says what else it needs."
        )
    network.load_state_dict({name: stored[name] for name in needed})


def _stored(weights: Path) -> dict[str, Tensor]:
    try:
        if weights.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(weights)
        found = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes its reader say
        raise UsageError(
            f"{weights.name} cannot be read as weights ({type(error).__name__}); .safetensors, or what torch.save made of a "
            "state dict, is needed. Download it again."
        ) from error
    while "state_dict" in found or "model" in found:
        found = found.get("state_dict", found.get("model"))
    return dict(found)


def _shown(network: nn.Module, mean: list[float], sd: list[float], device: torch.device) -> Callable[[Tensor], Tensor]:
    """The network, behind what brings bytes to the scale it was trained on."""
    shift = torch.tensor(mean, device=device).view(1, 3, 1, 1) * 255
    scale = 1 / (torch.tensor(sd, device=device).view(1, 3, 1, 1) * 255)
    # features are kept in half precision: on a GPU they are computed so, at several times the speed
    half = torch.autocast("cuda", dtype=torch.float16, enabled=device.type == "cuda")

    def run(tiles: Tensor) -> Tensor:
        with half:
            answer: Tensor = network(((tiles - shift) * scale).contiguous(memory_format=torch.channels_last))
        return answer

    return run
