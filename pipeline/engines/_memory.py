"""Memory that one layer gave back stays for the next: a window needs the same every time.

glibc fetches every piece above 32 MB from the system and gives it back at once, and the system clears each page of it anew: of
a window of 96 voxels' side through our default network that is a quarter of the time.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

MMAP_MAX, TRIM_THRESHOLD, MMAP_THRESHOLD = -4, -1, -3
"""Of malloc.h: how many pieces may come from the system directly, how much may lie free on top, from which size on."""
USUAL_PIECES, LARGEST = 65536, 32 << 20
"""glibc's own: what it allows, and the size up to which it keeps pieces once it has met them."""
NEVER = 2**31 - 1


@contextmanager
def kept() -> Iterator[None]:
    """What is given back inside stays with the process for the next time; what is fetched outside goes as it always did."""
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(MMAP_MAX, 0)
    try:
        yield
    finally:
        library.mallopt(MMAP_MAX, USUAL_PIECES)


def given_back() -> None:
    """All that was kept and is free goes back to the system."""
    if library := _glibc():
        library.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library where it is glibc, told once to keep what lies free."""
    library = ctypes.CDLL(None)
    try:
        library.gnu_get_libc_version  # noqa: B018
    except AttributeError:
        return None
    library.mallopt(TRIM_THRESHOLD, NEVER)
    library.mallopt(MMAP_THRESHOLD, LARGEST)  # to set either ends glibc's own search for this one
    return library
