"""What one case adds to a dataset's fingerprint, from one look at voxels that were read anyway."""

import numpy as np
from jaxtyping import Integer, Shaped

from .plan import CaseFacts
from .steps import Orient, nonzero_box
from .volume import Case

RANKS = (np.arange(256) + 0.5) / 256
"""Each stands for as many voxels, so that their mean and percentiles are those of all voxels; as many for every case."""
ENOUGH = 100_000
"""Voxels that the ranks are taken from; of more, evenly spaced ones: 256 ranks cannot tell the difference."""

NOTHING = CaseFacts(shape=(1, 1, 1), spacing_mm=(1.0, 1.0, 1.0), cropped=(1, 1, 1), intensities=(), voxels={})
"""Of a case that could not be read."""


def facts_of(case: Case, ignored: int | None = None) -> CaseFacts:
    """Its grid in RAS order, what is left without its zero border, and the intensities under its labels."""
    assert case.labels is not None
    image = Orient().apply(case.image)
    labels = case.labels.voxels[0]
    inside = np.flatnonzero(labels if ignored is None else (labels != 0) & (labels != ignored))
    return CaseFacts(
        shape=image.geometry.shape,
        spacing_mm=image.geometry.spacing,
        cropped=nonzero_box(image, margin=0).shape,
        intensities=tuple(_ranked(voxels, inside) for voxels in case.image.voxels),
        voxels={},
    )


def label_counts(labels: Integer[np.ndarray, "..."]) -> dict[int, int]:
    """How many voxels carry each value that is not 0."""
    counts = np.zeros(int(labels.max(initial=0)) + 1, dtype=np.int64)
    for slab in labels:  # bincount takes eight bytes a voxel for itself
        for plane in slab:
            counts += np.bincount(plane.ravel(), minlength=len(counts))
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts) if value}


def _ranked(voxels: Shaped[np.ndarray, "i j k"], inside: Integer[np.ndarray, " n"]) -> tuple[float, ...]:
    """Intensities under the labels, of the whole scan where none is painted."""
    places = inside if len(inside) else np.arange(voxels.size)
    taken = voxels.ravel()[places[:: -(-len(places) // ENOUGH)]]
    return tuple(np.quantile(taken, RANKS).tolist())
