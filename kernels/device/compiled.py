"""The names of the kernels that Triton compiles."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton


@contextmanager
def compiled_kernels() -> Iterator[list[str]]:
    """Yields a list, which grows by a name for each kernel that is compiled inside, or found in Triton's cache on disk.

    In Triton's interpreter nothing is compiled.
    """
    names: list[str] = []
    runtime = triton.knobs.runtime
    previous = runtime.jit_post_compile_hook

    def note(*, fn: Any, **about: Any) -> Any:
        names.append(fn.name)
        return previous(fn=fn, **about) if previous else None

    runtime.jit_post_compile_hook = note
    try:
        yield names
    finally:
        runtime.jit_post_compile_hook = previous
