"""Where the features of a slide come from when it is to be answered: those that lie there and fit the package, or made now."""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from preprocessing.slides import Slide, SlideFile, open_slide, stated_resolutions
from preprocessing.slides.slide import files_of, identity

from ..config import SlideClassify, SlideFeatures
from ..errors import UsageError
from ..prediction import choose_device
from ..progress import Progress
from .ahead import announced
from .encoders import load_encoder
from .feature_file import FILE_NAME, FeatureFile, UnreadableFeatures
from .features import Extractor
from .package import SlidePackage

Turn = TypeVar("Turn")


class Supply:
    """The features of slides, by the recipe of one package."""

    def __init__(
        self, package: SlidePackage, settings: SlideClassify, stack: ExitStack, progress: Progress, slides: int
    ) -> None:
        self.package, self.settings, self.stack = package, settings, stack
        self.progress, self.slides, self.turn = progress, slides, 0
        self.device = choose_device(settings.device)
        self.stated = stated_resolutions(settings.resolutions) if settings.resolutions else {}
        self.identities: dict[Path, str] = {}
        if settings.features is None:
            _ = self.extractor  # an encoder that does not fit is told now, not after the first slide

    @cached_property
    def extractor(self) -> Extractor:
        """With the package's own encoder and recipe; refused where it is another."""
        recipe = self.package.record.recipe
        encoder = load_encoder(self.settings.encoder or recipe.encoder, self.device)
        how = SlideFeatures(
            encoder=encoder.id, tile_um=recipe.tile_um, tile_px=recipe.tile_px, step_um=recipe.step_um,
            least_tissue=recipe.least_tissue, microns_per_pixel=self.settings.microns_per_pixel,
            workers=self.settings.workers, batch=self.settings.batch, device=self.settings.device,
        )  # fmt: skip
        extractor = self.stack.enter_context(Extractor(encoder, how, self.stated))
        if different := extractor.recipe.difference(recipe):
            raise UsageError(
                f"the features that {self.package.name} was trained on are not those this encoder gives ({different}); "
                f"{recipe.encoder} with sha256 {recipe.encoder_sha256[:16]} is needed. Give it with --encoder "
                "timm:NAME@WEIGHTS, the very weights of the training."
            )
        return extractor

    def ahead(self, looked_at: Iterator[tuple[SlideFile, Turn | None]]) -> Iterator[tuple[SlideFile, Turn | None]]:
        """The same turns; slides that will need features are read while those before them are answered."""
        for number, turn in enumerate(announced(looked_at, self._announce)):
            self.turn = number
            yield turn

    def features_of(self, slide: SlideFile, folder: Path) -> tuple[FeatureFile, str]:
        """The features of the slide, made in this folder where none lie ready; and where they are from, in words."""
        lying, why = self._lying(slide)
        if lying is not None:
            return lying, f"taken from {lying.path}"
        return self.extractor.features_of(slide, folder, self._told), f"made now{why}"

    def open(self, slide: SlideFile) -> Slide:
        """The slide itself, at the resolution its features were made at."""
        return open_slide(slide.path, self._stated_of(slide))

    def difference(self, sha256: str, said_by: str, found: tuple[float, float], slide: SlideFile) -> str:
        """'of another slide of the same name', say, of what was made of a slide; empty where it was this one."""
        stated = self._stated_of(slide)
        if (said_by == "stated") != (stated is not None) or stated not in (None, found[0]):
            return f"at another resolution ({found[0]:g} um/px, {said_by})"
        return "" if sha256 == self._identity(slide) else "of another slide of the same name"

    def _announce(self, slide: SlideFile) -> None:
        if self._lying(slide)[0] is None:
            self.extractor.announce(slide)

    def _told(self, stage: str, done: float, of: float, note: str = "") -> None:
        # nine tenths: the answer and its pictures are still to come
        self.progress(
            "classify", self.turn + 0.9 * done / of, self.slides, f"{done:.0f} of {of:.0f} tiles of this slide"
        )

    def _lying(self, slide: SlideFile) -> tuple[FeatureFile | None, str]:
        """The file of this slide by this recipe, where there is one; else why the one that lies there is none."""
        folder = self.settings.features
        if folder is None:
            return None, ""
        if not (folder / slide.id / FILE_NAME).exists():
            return None, f", for {folder} has none of this slide"
        try:
            file = FeatureFile.read(folder / slide.id)
        except UnreadableFeatures as reason:
            return None, f", for {reason}"
        if different := file.recipe.difference(self.package.record.recipe):
            return None, f", for those in {folder} are by another recipe ({different})"
        if other := self.difference(file.slide_sha256, file.resolution_from, file.slide_microns_per_pixel, slide):
            return None, f", for those in {folder} are {other}"
        return file, ""

    def _stated_of(self, slide: SlideFile) -> float | None:
        return self.stated.get(slide.id, self.settings.microns_per_pixel)

    def _identity(self, slide: SlideFile) -> str:
        if slide.path not in self.identities:
            self.identities[slide.path] = identity(files_of(slide.path))
        return self.identities[slide.path]
