"""The alignment score learns from emoji, none of which is a concept of the demo model."""

import json
import re
from pathlib import Path
from zlib import crc32

from dma_diffusers.pipelines.demo_training.concepts import BACKGROUNDS, HELD_OUT, SEEN, TINTS, plural

ICON_SETS = {
    "fluent-emoji": "MIT",
    "fluent-emoji-flat": "MIT",
    "noto": "Apache-2.0",
    "noto-v1": "Apache-2.0",
    "fxemoji": "Apache-2.0",
}
"""It maps an iconify set to its licence."""

_RUN_TOGETHER = "fxemoji"  # its names have no hyphens, so it adds pictures of concepts that others name
_CATEGORIES = (
    "Activities",
    "Animals & Nature",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Travel & Places",
)
_OF_NO_WEIGHT = """
american americas and baby flying hot mobile musical o of running showing t top
"""
_SAME_THING = """
articulated-lorry bath kitten locomotive minibus mount-fuji sauropod sport-utility-vehicle telephone
telephone-receiver trolleybus
"""
_DESCRIPTIONS = re.compile(
    r"face|faces|oclock|thirty|skin|tone|light|medium|dark|man|men|mans|woman|women|womans|womens|person|people|"
    r"boy|girl|couple|family|kiss|hand|hands|button|with|without|in|at|on|of|and|for|from|the|not|facing|"
    r"japanese|up|down|left|right|.*ing|.*s(?<!ss)(?<!us)|.*\d.*"
)


def emoji(package: Path) -> tuple[dict[str, dict[str, str]], dict[str, dict]]:
    """Return concepts, sorted, as concept -> set -> the icon's name there; and the sets.

    A concept is an icon's name, in words. Left out are names that share a word with any concept of the demo model, the
    same things by another name, names of colours, which tints would contradict, and names that describe or count rather
    than name (people by their looks, faces by their mood, clocks, plurals).

    Args:
        package: the unpacked npm package @iconify/json.
    """
    sets = {name: json.loads((package / "json" / f"{name}.json").read_text()) for name in ICON_SETS}
    names = {
        icon
        for icon_set, icons in sets.items()
        if icon_set != _RUN_TOGETHER
        for category in _CATEGORIES
        for icon in icons.get("categories", {}).get(category, ())
    }
    found = {}
    for name in sorted(filter(_names_a_new_thing, names)):
        spellings = (name, name.replace("-", ""))
        found[name.replace("-", " ")] = {
            icon_set: icon for icon_set, icons in sets.items() for icon in spellings if icon in icons["icons"]
        }
    return found, sets


def is_validation(concept: str) -> bool:
    """Say if a concept is in the tenth that choices are made by and that is never trained on."""
    return crc32(concept.encode()) % 10 == 0


def _names_a_new_thing(icon: str) -> bool:
    words = icon.split("-")
    return (
        len(words) <= 3
        and icon not in _SAME_THING.split()
        and _DEMO_WORDS.isdisjoint(words)
        and not any(_DESCRIPTIONS.fullmatch(word) for word in words)
    )


_NAMES = {word for pair in (SEEN | HELD_OUT).items() for name in pair for word in name.split("-")}
_NAMES -= set(_OF_NO_WEIGHT.split())
_DEMO_WORDS = _NAMES | set(map(plural, _NAMES)) | BACKGROUNDS.keys() | TINTS.keys()
