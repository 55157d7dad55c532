"""Checkpoints of a training as one safetensors file: tensors beside a JSON of everything else, and no pickle."""

import json
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from safetensors import safe_open
from safetensors.torch import save_file


class SafeCheckpoints(CheckpointIO):
    """Lightning's way to disk. A checkpoint appears whole or not at all, and running it through a reader runs no code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        tensors: dict[str, torch.Tensor] = {}
        tree = json.dumps(_taken_apart(checkpoint, "", tensors))
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        save_file(tensors, partial, metadata={"tree": tree})
        partial.replace(path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        with safe_open(path, framework="pt") as stored:
            return _put_together(json.loads(stored.metadata()["tree"]), stored)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def _taken_apart(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    """The value as JSON. Dicts become lists of pairs, since an optimiser's keys are numbers and JSON's are not."""
    if isinstance(value, torch.Tensor):
        name = f"{len(tensors)}{place}"  # numbered: a key may itself hold the stroke that divides keys
        tensors[name] = value.detach().cpu().contiguous().clone()  # safetensors refuses memory that is shared
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _taken_apart(item, f"{place}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_taken_apart(item, f"{place}/{n}", tensors) for n, item in enumerate(value)]}
    if isinstance(value, float | int | str | bool) or value is None:
        return value
    raise TypeError(f"a checkpoint holds {type(value).__name__} at {place}; only tensors and plain values are stored")


def _put_together(tree: Any, stored: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, inner),) = tree.items()
    if kind == "tensor":
        return stored.get_tensor(inner)
    if kind == "dict":
        return {key: _put_together(item, stored) for key, item in inner}
    items = [_put_together(item, stored) for item in inner]
    return tuple(items) if kind == "tuple" else items
