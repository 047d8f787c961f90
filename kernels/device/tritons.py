"""The version of Triton: which one is installed, and which ones the kernels were tested with (kernels/tritons.md)."""

import warnings
from functools import cache

Version = tuple[int, int]
OLDEST_TESTED, NEWEST_TESTED = (3, 6), (3, 9)


def _installed() -> Version:
    """The installed Triton's version; the newest tested one where there is none, for tables that depend on it."""
    try:
        import triton
    except ImportError:
        return NEWEST_TESTED
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


TRITON = _installed()


@cache
def warn_of_untested(triton: Version = TRITON) -> None:
    """Warn, once in a process, that the kernels were not tested with this version of Triton."""
    if OLDEST_TESTED <= triton <= NEWEST_TESTED:
        return
    given, oldest, newest = (".".join(map(str, v)) for v in (triton, OLDEST_TESTED, NEWEST_TESTED))
    warnings.warn(
        f"the attention kernels were tested with Triton {oldest} to {newest}, and this is Triton {given}: install a "
        "PyTorch that brings a tested Triton, or compare the output with lowering='reference'",
        stacklevel=2,
    )
