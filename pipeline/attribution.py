"""What one window of a scan adds to a score, voxel by voxel. grad-cam combines channels, captum checks; the rest is ours.

A score is a function of a window's logits. Its maps are signed, keep their scale, and are never stretched: what several
windows add to one score may be added.
"""

import logging
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional

from preprocessing.records import nearest

from .errors import UsageError

logger = logging.getLogger(__name__)

Score = Callable[[Tensor], Tensor]
"""From a window's logits [K i j k] to the number that is explained."""

CAMS = {
    "hirescam": "HiResCAM",
    "gradcam": "GradCAM",
    "gradcam++": "GradCAMPlusPlus",
    "layercam": "LayerCAM",
    "xgradcam": "XGradCAM",
    "gradcam_elementwise": "GradCAMElementWise",
}
"""Methods that look at a layer, and what grad-cam calls them."""
AVERAGING = ("gradcam", "gradcam++", "xgradcam")
"""Those that give each channel one weight: they cannot say where in a channel it mattered."""
HEALTHY = 0.1
"""U-Nets with instance norm were measured at 0.04 and 0.05, with batch norm at 0.7."""
STEPS = 16
"""Points between a blurred scan and the scan at which captum takes gradients: of a trained U-Net the map of 16 had a
correlation of 0.999 with that of 128."""
SIDE = 8
"""captum hides an eighth of a window's side at a time, and blurs about as far: 512 places a window are the bearable most."""
LEAST_BLOCK = 4
"""Voxels; what is smaller a network hardly misses."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """What a network saw in a window."""

    map: Float[Tensor, "i j k"]
    """What each voxel adds to the score."""
    score: float
    gradient: Float[Tensor, " feature"]
    """Sums over places, per channel of the layer; empty of methods that go back to the scan."""
    size: float
    """Sum of the gradient's magnitudes."""


def see(
    network: nn.Module,
    window: Float[Tensor, "channel i j k"],
    score: Score,
    method: str,
    layer: str,
    weights: Float[np.ndarray, "1 feature"] | None = None,
) -> Seen:
    """The map of one window by one network; `weights` are what methods that average have pooled over all windows."""
    if method in CAMS:
        felt = feel(network, window, score, layer)
        cam = _combined(method, felt.activations, felt.gradients, weights)
        gradients = felt.gradients[0].flatten(1)
        return Seen(
            map=_spread(cam, window.shape[1:]),
            score=felt.score,
            gradient=gradients.sum(dim=1),
            size=float(gradients.abs().sum()),
        )
    seen, value = INPUT_METHODS[method](network, window, score)
    return Seen(map=seen, score=value, gradient=torch.zeros(0), size=0.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Felt:
    """What a layer said of a window, and how the score would change with it."""

    activations: Float[Tensor, "1 feature d h w"]
    gradients: Float[Tensor, "1 feature d h w"]
    score: float


def feel(network: nn.Module, window: Float[Tensor, "channel i j k"], score: Score, layer: str) -> Felt:
    """One pass there, and back no farther than the layer: what lies before it keeps nothing."""
    kept: list[Tensor] = []

    def cut(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_(True))
        return kept[-1].clone()  # what follows may write over what it is given

    handle = layers(network)[layer].register_forward_hook(cut)
    try:
        value = score(network(window[None])[0].float())
    finally:
        handle.remove()
    (gradients,) = torch.autograd.grad(value, kept, allow_unused=True) if value.requires_grad else (None,)
    gradients = torch.zeros_like(kept[0]) if gradients is None else gradients
    activations, gradients = (_solid(tensor.detach(), window.shape[1:]).cpu() for tensor in (kept[0], gradients))
    return Felt(activations=activations, gradients=gradients, score=float(value.detach()))


def channel_weights(method: str, felt: Felt) -> Float[np.ndarray, "1 feature"]:
    """What a method that averages gives each channel in one window."""
    weights: np.ndarray = _cam(method).get_cam_weights(
        None, None, None, felt.activations.numpy(), felt.gradients.numpy()
    )
    return weights


def _combined(
    method: str,
    activations: Float[Tensor, "1 feature d h w"],
    gradients: Float[Tensor, "1 feature d h w"],
    weights: Float[np.ndarray, "1 feature"] | None,
) -> Float[Tensor, "d h w"]:
    """Channels into one map as grad-cam does it, without its ReLU, its stretching and its cubic zoom."""
    cam = _cam(method)
    if weights is not None:
        cam.get_cam_weights = lambda *_: weights
    image = cam.get_cam_image(None, None, None, activations.numpy(), gradients.numpy(), False)
    return torch.from_numpy(np.ascontiguousarray(image[0], np.float32))


def _cam(method: str) -> Any:
    """grad-cam's object, for its arithmetic alone: given a network of no consequence it hooks and changes nothing."""
    import pytorch_grad_cam  # not at the top: it brings OpenCV, matplotlib and scikit-learn

    return getattr(pytorch_grad_cam, CAMS[method])(model=nn.PReLU(), target_layers=[])


def _spread(cam: Float[Tensor, "d h w"], shape: Sequence[int]) -> Float[Tensor, "i j k"]:
    """Brought to the window's voxels, its sum kept: whole ratios make trilinear interpolation keep the mean exactly."""
    fine = functional.interpolate(cam[None, None], size=tuple(shape), mode="trilinear", align_corners=False)[0, 0]
    return fine * (cam.numel() / fine.numel())


def _solid(features: Tensor, shape: Sequence[int]) -> Tensor:
    """[1 C h w] of a network that takes a thin window for a plane as [1 C d h w]."""
    return features.unsqueeze(2 + list(shape).index(1)) if features.ndim == 4 and 1 in shape else features


# back to the scan


def _gradient_x_input(
    network: nn.Module, window: Float[Tensor, "channel i j k"], score: Score
) -> tuple[Float[Tensor, "i j k"], float]:
    given = window.detach().clone().requires_grad_(True)
    value = score(network(given[None])[0].float())
    (gradient,) = torch.autograd.grad(value, given)
    return (gradient * given.detach()).sum(dim=0).cpu(), float(value.detach())


def _integrated_gradients(
    network: nn.Module, window: Float[Tensor, "channel i j k"], score: Score
) -> tuple[Float[Tensor, "i j k"], float]:
    """From the window blurred to the window. From zero it would be gradient times input again: behind an instance norm
    a fainter window says the same."""
    from captum.attr import IntegratedGradients

    forward = _batched(network, score)
    given = window[None].detach().clone().requires_grad_(True)
    found = IntegratedGradients(forward, multiply_by_inputs=True).attribute(
        given, baselines=blurred(window)[None], n_steps=STEPS, internal_batch_size=1
    )
    with torch.no_grad():
        return found[0].detach().sum(dim=0).float().cpu(), float(forward(window[None]))


def _occlusion(
    network: nn.Module, window: Float[Tensor, "channel i j k"], score: Score
) -> tuple[Float[Tensor, "i j k"], float]:
    """How much of the score goes when a block is blurred, shared out among its voxels."""
    from captum.attr import Occlusion

    forward = _batched(network, score)
    block = (window.shape[0], *(min(side, max(LEAST_BLOCK, -(-side // SIDE))) for side in window.shape[1:]))
    found = Occlusion(forward).attribute(
        window[None], sliding_window_shapes=block, strides=block, baselines=blurred(window)[None]
    )
    with torch.no_grad():
        return found[0, 0].float().cpu() / float(np.prod(block[1:])), float(forward(window[None]))


INPUT_METHODS = {
    "gradient_x_input": _gradient_x_input,
    "integrated_gradients": _integrated_gradients,
    "occlusion": _occlusion,
}
METHODS = (*CAMS, *INPUT_METHODS)


def _batched(network: nn.Module, score: Score) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.stack([score(logits.float()) for logits in network(x)])


def blurred(window: Float[Tensor, "channel i j k"]) -> Float[Tensor, "channel i j k"]:
    """The window without anything smaller than an eighth of its side."""
    sigma = [side / SIDE if side > 1 else 0 for side in window.shape[1:]]
    channels = [ndimage.gaussian_filter(channel, sigma, mode="nearest") for channel in window.cpu().numpy()]
    return torch.from_numpy(np.stack(channels)).to(window.device)


# layers


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One of the layers that a network offers to be explained."""

    name: str
    fraction: float
    """Its resolution, as a share of the window's along each axis that is not thin."""
    is_last: bool
    """The last step before the answer: its map is the answer once more."""
    fault: str = ""
    """Why it cannot be explained."""


def layers(network: nn.Module) -> dict[str, nn.Module]:
    """By name, nearest to the answer first, as the network's own file says it."""
    file = sys.modules[type(network).__module__]
    if "explained" not in vars(file):
        raise UsageError(
            f"{type(network).__name__} does not say which of its layers can be explained; a file of networks/ does. "
            "Choose the method gradient_x_input, which needs no layer."
        )
    named: dict[str, nn.Module] = file.explained(network)
    return named


SUITED = 0.5
"""Of the resolution. At a quarter maps of lesions and of whole organs failed their tests (deletion 1.0 and 0.98, by chance
0.83) that passed at half (0.0; benchmarks/results/README.md): what decides in a U-Net leaves it by the finer skips."""


def chosen_layer(network: nn.Module, channels: int, patch: Sequence[int], wanted: str = "") -> Layer:
    """The layer of that name or, of those that are no last step, the one nearest to half of the resolution.

    Of two that are as near the one farther from the answer, which the encoder made, is the less circular.
    """
    offered = surveyed(network, channels, patch)
    sound = [layer for layer in offered if not layer.fault]
    if wanted:
        named = {layer.name: layer for layer in offered}
        if wanted not in named:
            raise UsageError(
                f"layer {wanted!r} is none of {', '.join(named)}{nearest(wanted, tuple(named)) or '.'} Choose one of "
                "these, or leave it out."
            )
        if named[wanted].fault:
            names = ", ".join(layer.name for layer in sound) or "another method: gradient_x_input needs no layer"
            raise UsageError(
                f"layer {wanted!r} {named[wanted].fault}; a map [channel i j k] whose sides divide the window's is "
                f"needed. Choose {names}."
            )
        return named[wanted]
    apart = [layer for layer in sound if not layer.is_last]
    if not apart:
        raise UsageError(
            f"{type(network).__name__} offers no layer but its last step, whose map would be the answer once more; one "
            "before it is needed. Choose the method gradient_x_input."
        )
    return min(reversed(apart), key=lambda layer: round(abs(np.log2(layer.fraction / SUITED)), 6))


def surveyed(network: nn.Module, channels: int, patch: Sequence[int]) -> list[Layer]:
    """What two empty windows tell of each layer, the second twice as long: what grows with it is space, and no channel."""
    longer = max(range(3), key=lambda axis: patch[axis] > 1)
    twice = [side * (1 + (axis == longer)) for axis, side in enumerate(patch)]
    made = _shapes(network, channels, patch)
    grown: dict[str, list[tuple[int, ...]]] = {}
    try:
        grown = _shapes(network, channels, twice)
    except (RuntimeError, ValueError) as error:  # some have weights for each slice
        logger.info(
            "%s takes no window of %s (%s): the places of channels are not checked",
            type(network).__name__,
            twice,
            error,
        )
    last = True
    found: list[Layer] = []
    for name, shapes in made.items():
        fault = _fault(shapes, grown.get(name, []), patch, longer)
        fraction = 0.0 if fault else _fraction(shapes[0], patch)
        last = last and (not found or fraction == 1.0)  # branches may end side by side
        found.append(Layer(name=name, fraction=fraction, is_last=last, fault=fault))
    return found


def _shapes(network: nn.Module, channels: int, patch: Sequence[int]) -> dict[str, list[tuple[int, ...]]]:
    """What each layer put out, every time it ran; nothing where a network takes no window of that size."""
    seen: dict[str, list[tuple[int, ...]]] = {name: [] for name in layers(network)}
    window = torch.zeros(1, channels, *patch, device=next((p.device for p in network.parameters()), None))

    def watch(name: str) -> Callable[..., None]:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            is_map = isinstance(output, Tensor)
            seen[name].append(tuple(_solid(output, patch).shape) if is_map else ())

        return note

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers(network).items()]
    try:
        with torch.no_grad():
            network(window)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _fault(
    shapes: Sequence[tuple[int, ...]], grown: Sequence[tuple[int, ...]], patch: Sequence[int], longer: int
) -> str:
    if len(shapes) != 1:
        return f"ran {len(shapes)} times for one window" if shapes else "did not run"
    (shape,) = shapes
    if len(shape) != 5:
        return f"puts out {list(shape)}, which is no map" if shape else "puts out several things"
    if any(side % size for side, size in zip(patch, shape[2:], strict=True)):
        return f"puts out {list(shape)} for a window of {list(patch)}"
    expected = tuple(size * (1 + (axis == longer + 2)) for axis, size in enumerate(shape))
    if grown and grown[0] != expected:
        return f"has its channels elsewhere: {list(shape)} became {list(grown[0])} for a window twice as long"
    return ""


def _fraction(shape: Sequence[int], patch: Sequence[int]) -> float:
    ratios = [size / side for size, side in zip(shape[2:], patch, strict=True) if side > 1]
    return float(np.prod(ratios) ** (1 / max(1, len(ratios))))


# nothing is disturbed


@contextmanager
def undisturbed(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Networks in evaluation, without gradients of their weights, in full precision, whatever is going on around; after
    it every mode, weight, gradient and random state is what it was."""
    parameters = [parameter for network in networks for parameter in network.parameters()]
    modes = [(module, module.training) for network in networks for module in network.modules()]
    needed = [parameter.requires_grad for parameter in parameters]
    drawn = random.getstate(), np.random.get_state()  # importing grad-cam draws from the first
    device = parameters[0].device if parameters else torch.device("cpu")
    devices = [device] if device.type == "cuda" else []
    try:
        for network in networks:
            network.eval()
        for parameter in parameters:
            parameter.requires_grad_(False)
        with (
            torch.random.fork_rng(devices),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, was in zip(parameters, needed, strict=True):
            parameter.requires_grad_(was)
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])


def unlearnt(network: nn.Module, seed: int = 0) -> nn.Module:
    """A copy that has forgotten: each weight drawn anew, as large as those around it."""
    chance = torch.Generator().manual_seed(seed)
    copy = deepcopy(network)
    with torch.no_grad():
        for weight in copy.parameters():
            drawn = torch.randn(weight.shape, generator=chance).to(weight)
            spread, mean = weight.std(correction=0), weight.mean()
            weight.copy_(drawn * spread + mean)
    return copy
