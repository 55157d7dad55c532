"""How deep a network may go on a patch. Numbers alone: whoever plans needs no tensors."""

import math
from collections.abc import Sequence

Triple = tuple[int, int, int]


def topology(
    patch: tuple[float, float, float], spacing: tuple[float, float, float]
) -> tuple[tuple[Triple, ...], tuple[Triple, ...]]:
    """Stride and kernel of each stage, finest first, by nnU-Net v2's rule: halve the finest axes until they are short.

    An axis much coarser than the others waits, unhalved and with kernel 1, until the others have become as coarse.
    """
    size, step, kernel = list(patch), list(spacing), [1, 1, 1]
    strides: list[Triple] = [(1, 1, 1)]
    kernels: list[Triple] = []
    while True:
        long = [axis for axis in range(3) if size[axis] >= 8]  # 4 voxels must be left: UNet_featuremap_min_edge_length
        finest = min((step[axis] for axis in long), default=1.0)
        halved = [axis for axis in long if step[axis] / finest < 2]
        if not halved or (len(halved) == 1 and size[halved[0]] < 12):
            break
        finest = min(step)
        kernel = [3 if k == 3 or s / finest < 2 else 1 for k, s in zip(kernel, step, strict=True)]
        kernels.append(_triple(kernel))
        strides.append(_triple([2 if axis in halved else 1 for axis in range(3)]))
        for axis in halved:
            step[axis] *= 2
            size[axis] = math.ceil(size[axis] / 2)
    return tuple(strides), (*kernels, (3, 3, 3))


def stages_for(
    name: str, patch: Triple, spacing: tuple[float, float, float]
) -> tuple[tuple[Triple, ...], tuple[Triple, ...]]:
    """`topology` for a network that halves a patch at least once."""
    strides, kernels = topology(patch, spacing)
    if len(strides) < 2:
        raise ValueError(
            f"A patch of {patch} voxels was given; {name} halves it at least once, for which one axis must have 12 voxels, "
            "or two axes 8. Choose a larger patch, or pad small scans."
        )
    return strides, kernels


def refuse_unlike_stages(name: str, strides: Sequence[Triple], kernels: Sequence[Triple]) -> None:
    """A config's stages, unless it leaves them to `fit`."""
    unlike = len(strides) != len(kernels) or len(strides) == 1
    if unlike or (strides and tuple(strides[0]) != (1, 1, 1)):
        raise ValueError(
            f"{name} was given strides {strides} and kernels {kernels}; it needs one of each per stage, two stages or more, "
            "and a first stride of (1, 1, 1). Leave both out to have them chosen."
        )


def total_stride(strides: tuple[Triple, ...]) -> Triple:
    """The product of all strides per axis: what a patch must be a multiple of."""
    return _triple([math.prod(stride[axis] for stride in strides) for axis in range(3)])


def _triple(numbers: list[int]) -> Triple:
    d, h, w = numbers
    return d, h, w
