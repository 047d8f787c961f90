"""The syntax of policies' words: a dataclass is written as a call, `diagonal(window=128, sink=128)`, and read back."""

import re
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from typing import Any, get_args

_CALL = re.compile(r"\s*(\w+)\s*\(([^()]*)\)\s*")


def write_value(value: Any, separator: str = "x") -> str:
    """One value as a word. separator: stands between the items of a tuple, "x" or "/"."""
    if isinstance(value, Enum):
        return value.name.lower()
    return separator.join(map(str, value)) if isinstance(value, tuple) else str(value)


def write_call(name: str, values: Mapping[str, Any], separator: str = "x") -> str:
    """A call of `name` with these values, as `read_call` reads it."""
    words = [f"{key}={write_value(value, separator)}" for key, value in values.items()]
    return f"{name}({', '.join(words)})"


def read_call(text: str, kinds: Mapping[str, type[Any]]) -> Any:
    """The dataclass instance that a call names: a kind of `kinds`, with fields as keyword arguments.

    Raises ValueError, in one line, for an unknown kind or field, a missing argument, or a value that the kind refuses.
    """
    call = _CALL.fullmatch(text)
    if not call or call[1] not in kinds:
        raise ValueError(
            f"{text.strip()!r} is no policy: give {', '.join(f'{name}(…)' for name in kinds)}, or several with |"
        )
    kind, given = kinds[call[1]], {}
    types = {field.name: field.type for field in fields(kind)}
    for argument in filter(None, map(str.strip, call[2].split(","))):
        name, _, value = map(str.strip, argument.partition("="))
        if name not in types or not value:
            raise ValueError(f"{call[1]}({argument}): give {', '.join(f'{name}=…' for name in types)}")
        given[name] = _read_value(value, types[name])
    try:
        return kind(**given)
    except TypeError:
        missing = ", ".join(name for name in types if name not in given)
        raise ValueError(f"{call[1]} needs {missing}") from None


def _read_value(word: str, kind: Any) -> Any:
    """The value of a word: a member of an enumeration, a tuple of integers, a number, or else the word itself."""
    for each in get_args(kind) or (kind,):
        if isinstance(each, type) and issubclass(each, Enum):
            return each.__members__.get(word.upper(), word)
    for separator in "x/":
        if re.fullmatch(rf"\d+({separator}\d+)+", word):
            return tuple(map(int, word.split(separator)))
    for number in (int, float):
        try:
            return number(word)
        except ValueError:
            pass
    return word
