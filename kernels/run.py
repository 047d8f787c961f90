"""How a kernel is run: on the device at once, unless whoever calls has other plans for it (compile.py has)."""

from collections.abc import Callable
from typing import Any

Run = Callable[..., None]


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch `kernel` on its arguments' device."""
    kernel[grid](*arguments, **options)
