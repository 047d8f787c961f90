"""Schedules: the fields of a configuration that hold at each noise level, in words that are read back.

    sigma>0.9: dense(); sigma>0.5: importance(budget=0.15) high=int8/bf16; importance(budget=0.05)

Each entry holds from its noise level up to that of the entry before, and the last one for all the rest.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

from dma_diffusers.kernels.precision import HIGH_PV, LOW_PV, Precisions
from dma_diffusers.kernels.tiling.policies import Diagonal, Policy, parse

MOST_ENTRIES = 4
"""For each entry that has more of its own than a policy, torch.compile makes a graph of a block, or of a model."""

_ENTRY = re.compile(r"\s*(?:sigma\s*>\s*([^:\s>=]+)\s*:)?\s*(\S.*)", re.DOTALL)
_CALL = r"\w+\s*\([^()]*\)"
_POLICY = re.compile(rf"{_CALL}(?:\s*\|\s*{_CALL})*")


class Part(NamedTuple):
    """One entry of a schedule.

    above: the noise level (0 to 1) above which it holds; 0 for the last one, which holds at 0 too.
    policy, high, low: in words. The others are fields of `DMAConfig`. None is for that of the configuration.
    """

    above: float
    policy: str | None
    high: str | None
    low: str | None
    rotation: str | None = None
    smooth_k: bool | None = None
    smooth_v: bool | None = None
    protect_text: bool | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of `DMAConfig` that it has of its own."""
        return {
            name: value for name, value in self._asdict().items() if name != "above" and value is not None
        }

    def __str__(self) -> str:
        return " ".join(
            value if name == "policy" else say(name, value) for name, value in self.fields.items()
        )


OF_ENTRIES = Part._fields[2:]
"""The fields beside its policy that an entry may have of its own."""
_KNOWN = ("policy", "high", "low", "window", "sink", *OF_ENTRIES[2:])
_FIELD = re.compile(rf"({'|'.join(_KNOWN[1:])})=(\S+)")


def say(name: str, value: Any) -> str:
    """A field in the words of an entry."""
    return f"{name}={str(value).lower() if isinstance(value, bool) else value}"


def read(schedule: Any) -> tuple[Part, ...]:
    """The entries of a schedule in words, or of pairs: a noise level, falling to 0, and the fields that hold above it.

    Fields are a policy, words as above, or a mapping with any of policy, high, low, window, sink, rotation, smooth_k,
    smooth_v and protect_text.
    Raises ValueError, in one line, for anything else, and for entries that leave a gap or overlap.
    """
    if isinstance(schedule, str):
        return _read_words(schedule)
    if not isinstance(schedule, Sequence) or not all(
        isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2 for pair in schedule
    ):
        raise ValueError(
            "schedule must be words, such as 'sigma>0.9: dense(); importance(budget=0.05)', or pairs of a noise level "
            f"and what holds above it, got {schedule!r:.100}"
        )
    return _checked([_part(above, fields) for above, fields in schedule])


def write(parts: Sequence[Part]) -> str:
    """The words that `read` reads as these entries."""
    return "; ".join(of_entries([(part.above, str(part)) for part in parts]))


def of_entries(entries: Sequence[tuple[float, str]]) -> tuple[str, ...]:
    """The words of each entry of a schedule: its noise level, but for the last, and what is said to hold above it."""
    *above, (_, rest) = entries
    return (*(f"sigma>{level}: {said}" for level, said in above), rest)


@cache
def _read_words(words: str) -> tuple[Part, ...]:
    parts = []
    for entry in words.split(";"):
        found = _ENTRY.fullmatch(entry)
        if not found or found[2].lstrip().startswith("sigma"):
            raise ValueError(
                f"schedule: {entry.strip()!r} is no entry: give sigma>LEVEL: and what holds above that noise level, as "
                "in sigma>0.9: dense()"
            )
        parts.append(_part(_level(found[1]) if found[1] else 0, found[2]))
    return _checked(parts)


def _level(word: str) -> Any:
    try:
        return float(word)
    except ValueError:
        return word


def _part(above: Any, given: Any) -> Part:
    """One entry, of a noise level and fields in any of the forms that `read` takes."""
    if isinstance(above, bool) or not isinstance(above, int | float) or not 0 <= above < 1:
        raise ValueError(f"schedule: a noise level is a number from 0 to less than 1, got {above!r}")
    fields = _fields(given) if isinstance(given, str) else given
    if isinstance(fields, Policy):
        fields = {"policy": fields}
    if not isinstance(fields, Mapping) or not fields or not set(fields) <= set(_KNOWN):
        raise ValueError(
            f"schedule: {given!r:.100} is no entry: give a policy, or any of {', '.join(_KNOWN)}"
        )
    try:
        high, low = Precisions.parse(fields.get("high", HIGH_PV), fields.get("low", LOW_PV)).words
        policy = _policy(fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"schedule: {error}") from None
    own = dict(fields) | {"high": high, "low": low}
    return Part(float(above), policy, *(own[name] if name in fields else None for name in OF_ENTRIES))


def _policy(fields: Mapping[str, Any]) -> str | None:
    """The policy's words, of a policy, or of a diagonal's window and sink."""
    diagonal = {name: fields[name] for name in ("window", "sink") if name in fields}
    if "policy" not in fields:
        return str(Diagonal(**diagonal)) if diagonal else None
    if diagonal:
        raise ValueError(f"window and sink are those of a diagonal: leave them out, or {fields['policy']}")
    policy = fields["policy"]
    if not isinstance(policy, str | Policy):
        raise ValueError(f"policy must be a policy or its words, got {policy!r}")
    return str(parse(policy) if isinstance(policy, str) else policy)


def _fields(words: str) -> dict[str, Any]:
    """The fields that the words of an entry say; empty if they are none."""
    found: dict[str, Any] = {}
    if policy := _POLICY.search(words):
        found["policy"] = policy[0]
        words = f"{words[: policy.start()]} {words[policy.end() :]}"
    for word in words.split():
        field = _FIELD.fullmatch(word)
        if field is None or field[1] in found:
            return {}
        found[field[1]] = _value(*field.groups())
    return found


def _value(name: str, word: str) -> Any:
    """A field's value: a number of tokens, or one for each head; true or false; else the word."""
    if name not in ("window", "sink"):
        return {"true": True, "false": False}.get(word, word)
    widths = tuple(int(width) if width.isdecimal() else width for width in word.split("/"))
    return widths if len(widths) > 1 else widths[0]


def _checked(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The entries. Raises ValueError where some overlap, leave a gap, or are too many."""
    if not parts:
        raise ValueError("schedule: give at least one entry, such as importance(budget=0.05)")
    for before, part in pairwise(parts):
        if part.above >= before.above:
            raise ValueError(
                f"schedule: sigma>{part.above} stands after sigma>{before.above}, so that both hold above "
                f"{max(part.above, before.above)}: entries overlap, give falling noise levels"
            )
    if last := parts[-1].above:
        raise ValueError(
            f"schedule: nothing holds from sigma {last} down to 0: after sigma>{last} give an entry for the rest"
        )
    if len(parts) > MOST_ENTRIES:
        raise ValueError(
            f"schedule: at most {MOST_ENTRIES} entries, for some are compiled apart, got {len(parts)}"
        )
    return tuple(parts)
