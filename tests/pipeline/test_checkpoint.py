"""What a training stores it gets back exactly; what is half-written is no checkpoint; and nothing is a pickle."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint import SafeCheckpoints


def a_checkpoint() -> dict[str, Any]:
    """What Lightning hands over, in small: an optimiser numbers its states, a scheduler mixes types."""
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3)
    network(torch.rand(4, 3)).sum().backward()
    optimiser.step()
    shared = torch.arange(6.0)
    return {
        "epoch": 3,
        "global_step": 2**40,
        "pytorch-lightning_version": "2.6",
        "state_dict": network.state_dict(),
        "optimizer_states": [optimiser.state_dict()],
        "lr_schedulers": [{"base_lrs": [0.1, 1e-300, 1 / 3], "last_epoch": -1, "verbose": False, "by": None}],
        "loops": {"fit_loop": {"state": {}, "epochs": (1, (2, "three"), [])}},
        "odd": {"": 0, 7: {"7": True, 7: False}, "a/b": torch.zeros(()), "a": {"b": torch.ones(0, 3)}},
        "kinds": [torch.arange(3), torch.tensor([True]), torch.rand(2).half(), torch.rand(2).bfloat16()],
        "shared": [shared, shared, shared[::2], shared.reshape(2, 3).T],
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def test_a_nested_checkpoint_comes_back_exactly(tmp_path: Path) -> None:
    checkpoint = a_checkpoint()
    SafeCheckpoints().save_checkpoint(checkpoint, tmp_path / "deep" / "last.safetensors")
    assert same(checkpoint, SafeCheckpoints().load_checkpoint(tmp_path / "deep" / "last.safetensors"))


def test_a_network_and_its_optimiser_take_the_checkpoint_back(tmp_path: Path) -> None:
    SafeCheckpoints().save_checkpoint(a_checkpoint(), tmp_path / "last")
    stored = SafeCheckpoints().load_checkpoint(tmp_path / "last")
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    network.load_state_dict(stored["state_dict"], strict=True)
    optimiser = torch.optim.AdamW(network.parameters())
    optimiser.load_state_dict(stored["optimizer_states"][0])
    assert optimiser.param_groups[0]["lr"] == 1e-3 and len(optimiser.state) == 4


def test_nothing_is_pickled_and_what_cannot_be_stored_plainly_is_refused(tmp_path: Path) -> None:
    SafeCheckpoints().save_checkpoint(a_checkpoint(), tmp_path / "last")
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads((tmp_path / "last").read_bytes())
    with pytest.raises(TypeError, match="Path at /where"):
        SafeCheckpoints().save_checkpoint({"where": tmp_path}, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_write_that_fails_half_way_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last"
    SafeCheckpoints().save_checkpoint({"epoch": 1, "weight": torch.ones(2)}, path)

    def full_disk(tensors: Any, target: Path, metadata: Any) -> None:
        target.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("pipeline.checkpoint.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        SafeCheckpoints().save_checkpoint({"epoch": 2, "weight": torch.zeros(2)}, path)
    assert SafeCheckpoints().load_checkpoint(path)["epoch"] == 1


def test_a_checkpoint_is_removed_once_or_twice(tmp_path: Path) -> None:
    SafeCheckpoints().save_checkpoint({"epoch": 1}, tmp_path / "last")
    for _ in range(2):
        SafeCheckpoints().remove_checkpoint(tmp_path / "last")
        assert not (tmp_path / "last").exists()
