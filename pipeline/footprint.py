"""How much memory a training step takes at its peak: counted on tensors that have shapes and no voxels, so that nothing
is computed and nothing is held. A ledger writes down every tensor that comes to life and crosses it out when it dies."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from networks.parts.losses import DeepSupervision
from preprocessing.plan import Recipe, Triple

from .demand import Footprint, Precision

STATES = {"adamw": 2, "sgd": 1}
"""Numbers an optimiser keeps for every weight."""


def footprint(
    build: Callable[[], nn.Module],
    *,
    channels: int,
    patch: Triple,
    batch: int,
    recipe: Recipe = Recipe(),  # noqa: B008
    precision: Precision = "float32",
    loss: Callable[[Any, Tensor], Tensor] = DeepSupervision(),  # noqa: B008
) -> Footprint:
    """Of a step of that network. Whatever the plan's loss is, Dice and cross-entropy is counted: the others differ little."""
    with torch.device("meta"):
        network = build().train()
    with FakeTensorMode(), Ledger() as ledger:
        put_on_cpu(network)
        weights = [*network.parameters(), *network.buffers()]
        ledger.hold(sum(tensor.nbytes for tensor in weights) * (STATES[recipe.optimiser] + (recipe.average > 0)))
        held = ledger.now
        image = torch.empty(batch, channels, *patch)
        truth = torch.zeros(batch, *patch, dtype=torch.int64)
        with _Halved() if precision == "bfloat16" else nullcontext():
            total = loss(network(image), truth)
        total.backward()
    return Footprint(held=held, peak=ledger.peak)


def put_on_cpu(network: nn.Module) -> None:
    """A network built on no device at all, as if it lay on a CPU; Module.to cannot do it to tensors without voxels."""
    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(_like(weight), weight.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, _like(buffer))


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


class Ledger(TorchDispatchMode):
    """Bytes of the storages that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def enter(self, tensor: Tensor) -> None:
        """A tensor that may be new; views share the storage of what they show."""
        storage = tensor.untyped_storage()
        if storage not in self.seen:
            self.seen.add(storage)
            self.hold(storage.nbytes())
            weakref.finalize(storage, self.hold, -storage.nbytes())

    def hold(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1  # a number was asked of a tensor that has none: the largest label, whether all is finite
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self.enter(leaf)
        return made


class _Halved(TorchFunctionMode):
    """torch's mixed precision, which does nothing on tensors without voxels: products in bfloat16, norms in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        wanted = torch.bfloat16 if func in PRODUCTS else torch.float32 if func in NORMS else None
        if wanted is None:
            return func(*args, **(kwargs or {}))
        return func(*self._cast(args, wanted), **self._cast(kwargs or {}, wanted))

    def _cast(self, values: Any, wanted: torch.dtype) -> Any:
        return tree_map(lambda value: self._as(value, wanted), values)

    def _as(self, value: Any, wanted: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == wanted:
            return value
        if not isinstance(value, nn.Parameter):
            return value.to(wanted)
        if id(value) not in self.copies:  # a weight is copied once in a step
            self.copies[id(value)] = value.to(wanted)
        return self.copies[id(value)]


PRODUCTS = {
    torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose2d, torch.conv_transpose3d, torch.matmul, torch.mm,
    torch.bmm, torch.baddbmm, torch.addmm, torch.einsum, torch.Tensor.matmul, torch.Tensor.__matmul__,
    nn.functional.linear, nn.functional.scaled_dot_product_attention,
}  # fmt: skip
NORMS = {torch.group_norm, nn.functional.group_norm, nn.functional.layer_norm, torch.softmax, torch.log_softmax}
"""What CUDA's mixed precision computes in float32."""
