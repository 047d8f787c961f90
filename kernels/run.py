"""How a kernel is run: at once, on the device, unless whoever calls has other plans (compile.py has)."""

from collections.abc import Callable
from typing import Any

Run = Callable[..., None]


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch `kernel` on its arguments' device."""
    kernel[grid](*arguments, **options)
