"""How a CPU process gets its memory: huge pages; freed blocks kept for the next step, or returned.

``minibert`` and ``train.py`` set this up for themselves. None of it changes a result.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress


def use_huge_pages() -> None:
    """Have torch ask Linux for 2 MB pages for large tensors: fewer TLB misses.

    Call it before the first large tensor: torch reads the variable once. A value that the user has
    set stays.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory() -> bool:
    """Have glibc keep freed blocks of up to 1 GB, 2 GB in total, so that the next ones reuse them.

    By default glibc returns large blocks to the system. A training step then fetches its gradients
    and activations again, with a page fault for every 4 kB.

    Returns:
        Whether it worked: False with another C library.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD in malloc.h
    kept = libc.mallopt(mmap_threshold, 1 << 30) and libc.mallopt(trim_threshold, (1 << 31) - 1)
    return bool(kept)


def release_freed_memory() -> None:
    """Have glibc return freed pages to the system, also those between blocks in use.

    What loading a model frees lies between packed weights of other sizes, which leave gaps.
    """
    with suppress(OSError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
