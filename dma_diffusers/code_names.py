"""The names that the code of a function asks for."""

from collections.abc import Iterator
from types import CodeType


def names_in(code: CodeType) -> Iterator[str]:
    """The names of globals and attributes in a function's code, and in that of functions inside of it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)
