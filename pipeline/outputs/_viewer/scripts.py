"""Scripts of others that pages carry: pinned in a JSON file each, fetched when hilum was built, packed into every page."""

import gzip
import hashlib
import json
from base64 import b64encode
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .._html import text

HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Script:
    """One script, and how it is known to be the one that was pinned."""

    name: str
    """As its authors call it."""
    package: str
    version: str
    sha256: str
    licence: str
    place: Path
    licences: Path

    @classmethod
    def pinned(cls, file: str, name: str, licences: str) -> "Script":
        """What this JSON file pins."""
        said = json.loads((HERE / file).read_text(encoding="utf-8"))
        return cls(
            name=name,
            place=HERE / "npm" / Path(said["script"]).name,
            licences=HERE / licences,
            **{key: said[key] for key in ("package", "version", "sha256", "licence")},
        )

    def missing(self) -> str:
        """Why there is no such viewer in this hilum; empty where there is."""
        if self.place.is_file() and hashlib.sha256(self.place.read_bytes()).hexdigest() == self.sha256:
            return ""
        met = "damaged" if self.place.is_file() else "missing"
        return (
            f"This hilum was built without its viewer: the script of {self.package} {self.version}, which comes from "
            f"npm, is {met}. Pages show the picture alone. Install hilum again where npm, or pip, can reach its registry; in "
            "a checkout, `python pipeline/outputs/_viewer/build.py` says what is wrong."
        )

    def source(self) -> str:
        return self.place.read_text(encoding="utf-8")

    def packed(self) -> str:
        """As text that a page can hold, a third of the size."""
        return _packed(self.place, self.sha256)

    def told(self) -> str:
        """Its licence and those of what is in it, as their authors ask; HTML."""
        words = self.licences.read_text(encoding="utf-8")
        return (
            f"<details><summary>The viewer is {text(self.name)} {text(self.version)} ({text(self.licence)})</summary>"
            f"<pre>{text(words)}</pre></details>"
        )


@cache
def _packed(place: Path, sha256: str) -> str:
    return b64encode(gzip.compress(place.read_bytes(), mtime=0)).decode("ascii")


NIIVUE = Script.pinned("niivue.json", "NiiVue", "LICENSES.txt")
OPENSEADRAGON = Script.pinned("openseadragon.json", "OpenSeadragon", "LICENSES-openseadragon.txt")
