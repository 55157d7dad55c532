"""Whether a map of where a network looked is to be believed: each is tested against chance, and against the mask itself."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Faithfulness:
    """What tests say of a map, in the window that holds most of what it explains. Shares of the score, 0 to 1."""

    deletion: float
    """Mean share of the score left while the map's highest voxels are taken away; lower is better."""
    deletion_random: float
    """The same of a random map as smooth as this one."""
    deletion_mask: float
    """The same of the predicted mask itself, which is nearly unbeatable: circular, and so the bar."""
    insertion: float
    """Mean share of the score that comes back while they are put in; higher is better."""
    insertion_random: float
    insertion_mask: float
    energy: float
    """Share of the map's positive importance inside the mask, a few voxels around it included."""
    energy_chance: float
    """What a map without any idea would have: the share of voxels there."""
    context: float
    """Share of the map's importance outside of that."""
    randomisation: float
    """Rank correlation with the map of the same network with random weights: near 0 where the map depends on what was learnt."""
    randomisation_scale: float
    """Peak of that map against this one's."""
    stability: float
    """Least rank correlation with maps of the scan with a little noise."""
    failed: tuple[str, ...] = ()
    """Which tests the map did not pass, in words; empty: all passed."""
