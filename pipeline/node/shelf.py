"""The packages that a node works with: copies of its own under their ids, checked and vouched for before they come here.

What is on the shelf never changes, whatever becomes of the folder it came from: what was checked is what is used, in every
worker that shares the node's folder, and a package that served once can serve again.
"""

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import seal, signatures
from ..package import ModelPackage

DRAFT_SECONDS = 24 * 3600.0
"""No copy takes a day; one that is younger may be in another worker's hands."""


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """state/packages: a folder for each. Several processes may use it."""

    state: Path
    trusted: tuple[Path, ...] = ()
    """Public keys, one of which must have signed a package; none named: whoever can write the config is believed."""

    @property
    def folder(self) -> Path:
        return self.state / "packages"

    def take_in(self, package: Path) -> ModelPackage:
        """The copy of a package, made now if there is none; refused when a byte of it changed, or nobody vouches for it."""
        identity = self._checked(package).id
        if not self.place(identity).exists():
            self._copy(package, identity)
        return self.open(identity)

    def open(self, identity: str) -> ModelPackage:
        """One that is here, checked anew."""
        found = self._checked(self.place(identity))
        if found.id != identity:
            raise signatures.NotSigned(
                f"{self.place(identity)} holds another package than its name says; the one that was put there is needed. "
                "Remove that folder, and start the node again."
            )
        return found

    def place(self, identity: str) -> Path:
        """Where a package lies, or would."""
        return self.folder / identity

    def _checked(self, package: Path) -> ModelPackage:
        if self.trusted:
            signatures.refuse_unsigned(package, self.trusted)
        return ModelPackage.load(package)

    def _copy(self, package: Path, identity: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for left in self.folder.glob(".*"):  # half a copy, of a process that was killed
            if time.time() - left.stat().st_mtime > DRAFT_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".") as draft:
            building = Path(draft) / identity
            building.mkdir(mode=0o700)
            for name in _files_of(package):
                shutil.copyfile(package / name, building / name)
            self._checked(building)  # a byte that changed while it was copied is found here
            if not self.place(identity).exists():
                _put(building, self.place(identity))


def _files_of(package: Path) -> Sequence[str]:
    """What is sealed, the seal, and who vouches for it; nothing else that lies there."""
    names = [*ModelPackage.load(package).record.files, seal.FILE_NAME]
    return [*names, signatures.FILE_NAME] if (package / signatures.FILE_NAME).exists() else names


def _put(building: Path, place: Path) -> None:
    try:
        building.rename(place)
    except OSError:
        if not place.exists():  # another process was faster: the same id, the same bytes
            raise
