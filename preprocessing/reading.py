"""What a person may allow or choose when scans are read. Without a word nothing is resampled, replaced or believed."""

from dataclasses import dataclass

REPAIRS = {
    "tilt": "slices or axes that do not meet at right angles (a tilted gantry, a sheared affine) are resampled to a straight grid",
    "uneven": "slices at uneven distances are interpolated onto even ones",
    "gaps": "missing slices are interpolated from their neighbours",
    "few": "two slices are read as a volume, though no third one confirms their distance",
    "nan": "voxels that are NaN or infinite become the lowest finite value",
    "sform": "where a NIfTI file's sform and qform disagree, the sform is believed",
    "qform": "where a NIfTI file's sform and qform disagree, the qform is believed",
}
"""Every repair that costs or believes something, and so needs a person's word."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How scans are read."""

    allow: tuple[str, ...] = ()
    """Repairs that are allowed: tilt, uneven, gaps, few, nan, sform or qform. Each is recorded with what it changed."""
    match: str = ""
    """The channel onto whose grid the others are resampled when they do not share one."""

    def __post_init__(self) -> None:
        unknown = [word for word in self.allow if word not in REPAIRS]
        if unknown:
            raise ValueError(f"no repair is called {unknown[0]!r}; {', '.join(REPAIRS)} can be allowed.")
        if {"sform", "qform"} <= set(self.allow):
            raise ValueError("both sform and qform were to be believed; they are allowed one at a time.")


STRICT = Reading()
"""Nothing allowed: what a hospital's night runs with."""
