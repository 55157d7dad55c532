"""Which objects, in which transfer syntaxes, the node says yes to when an association is negotiated, and to which not."""

from typing import Literal

from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from pynetdicom import AllStoragePresentationContexts
from pynetdicom.presentation import PresentationContext, build_context
from pynetdicom.sop_class import (
    StorageCommitmentPushModel,
    Verification,
)

from preprocessing.dicom.headers import NO_SCAN, NO_SCAN_FAMILIES, STORAGE
from preprocessing.dicom.pixels import DECODERS

NATIVE = (
    str(ExplicitVRLittleEndian),
    str(ImplicitVRLittleEndian),
    str(ExplicitVRBigEndian),
    str(DeflatedExplicitVRLittleEndian),
)
"""The first that a caller offers is taken: one that offers uncompressed too need not be believed its compression."""

SYNTAXES = (*NATIVE, *sorted(DECODERS))
"""Every transfer syntax that preprocessing/dicom reads; films and whatever is younger than this table are refused."""

NO_IMAGES = (
    "4.2",
    "78.",
    "79.",
    "80.",
    "90.",
    "91.",
    "131",
    "200.",
    "481.",
    "77.1.5.3",
    "77.1.1.1",
    "77.1.2.1",
    "77.1.4.1",
)
"""Further classes without pictures of a patient, or with films: measurements of eyes, annotations, protocols, radiotherapy."""


def contexts(kinds: Literal["images", "all"]) -> list[PresentationContext]:
    """What is accepted: those objects in every syntax, C-ECHO, and storage commitment: a peer's requests, and its answers to
    ours, for which it proposes to be the one who serves."""
    natively = list(NATIVE[:3])
    vouching = build_context(StorageCommitmentPushModel, natively)
    vouching.scu_role = vouching.scp_role = True
    return [
        build_context(Verification, natively),
        vouching,
        *(build_context(kind, list(SYNTAXES)) for kind in stored(kinds)),
    ]


def stored(kinds: Literal["images", "all"]) -> list[str]:
    """The SOP classes that are accepted."""
    return [kind for kind in known() if kinds == "all" or is_image(kind)]


def known() -> list[str]:
    """Every SOP class of the standard that can be stored. Those of a vendor's own are refused: nobody here reads them."""
    return [str(context.abstract_syntax) for context in AllStoragePresentationContexts]


def is_image(kind: str) -> bool:
    """Whether objects of a class are pictures that may be a scan."""
    rest = kind.removeprefix(STORAGE)
    families = (*NO_SCAN_FAMILIES, *NO_IMAGES)
    return rest != kind and rest not in NO_SCAN and not any(_is_of(rest, family) for family in families)


def _is_of(rest: str, family: str) -> bool:
    return rest.startswith(family) if family.endswith(".") else rest == family or rest.startswith(f"{family}.")
