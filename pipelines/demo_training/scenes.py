"""Draw random scenes of one to three objects; a scene is a prompt and the place of each object that it mentions.

The prompt decides the layout completely, so that a picture either obeys it or does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from zlib import crc32

from dma_diffusers.pipelines.demo_training.concepts import (
    BACKGROUNDS,
    HELD_OUT,
    SEEN,
    TINTS,
    plural,
    with_article,
)

MAX_OBJECTS = 3

_LEFT, _RIGHT, _TOP, _BOTTOM, _CENTRE = (0.26, 0.5), (0.74, 0.5), (0.5, 0.26), (0.5, 0.74), (0.5, 0.5)
_CORNERS = {
    "top left": (0.27, 0.27),
    "top right": (0.73, 0.27),
    "bottom left": (0.27, 0.73),
    "bottom right": (0.73, 0.73),
}
_ROW = ((0.18, 0.5), (0.5, 0.5), (0.82, 0.5))
_SPOTS = {
    "": _CENTRE,
    "in the middle": _CENTRE,
    "on the left": _LEFT,
    "on the right": _RIGHT,
    "at the top": _TOP,
    "at the bottom": _BOTTOM,
    **{f"in the {corner} corner": centre for corner, centre in _CORNERS.items()},
}
_RELATIONS = {
    "left of": (_LEFT, _RIGHT),
    "to the left of": (_LEFT, _RIGHT),
    "right of": (_RIGHT, _LEFT),
    "to the right of": (_RIGHT, _LEFT),
    "above": (_TOP, _BOTTOM),
    "over": (_TOP, _BOTTOM),
    "below": (_BOTTOM, _TOP),
    "under": (_BOTTOM, _TOP),
    "and": (_LEFT, _RIGHT),
    "next to": (_LEFT, _RIGHT),
}
# For each arrangement, these are the sides of a small, a usual and a big object, in canvas widths.
_SIZES = {
    "alone": (0.36, 0.6, 0.86),
    "spot": (0.26, 0.42, 0.5),
    "corner": (0.24, 0.36, 0.46),
    "row": (0.2, 0.3, 0.36),
}
_SIZE_WORDS = ("small", "", "big")


@dataclass(frozen=True)
class Mention:
    """A noun of the prompt, with its concept, its colour if the prompt names one, and the places of its objects.

    A place is (x, y, side) in canvas widths; x and y are the object's centre, and y points downwards.
    """

    concept: str
    tint: str | None
    noun: str
    places: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class Scene:
    """A prompt with its arrangement, background colour and mentions; it has at most ``MAX_OBJECTS`` objects."""

    prompt: str
    arrangement: str
    background: str
    mentions: tuple[Mention, ...]

    def combinations(self) -> list[str]:
        """Return the scene's combinations: ``concept|tint``, and ``first|second|axis`` for each pair of mentions."""
        keys = [f"{m.concept}|{m.tint}" for m in self.mentions if m.tint]
        for i, a in enumerate(self.mentions):
            for b in self.mentions[i + 1 :]:
                (ax, ay, _), (bx, by, _) = a.places[0], b.places[0]
                vertical = abs(ay - by) > abs(ax - bx)
                first, second = (a, b) if ((ay < by) if vertical else (ax < bx)) else (b, a)
                keys.append(f"{first.concept}|{second.concept}|{'vertical' if vertical else 'horizontal'}")
        return keys

    def is_held_out(self) -> bool:
        """Return True if one of the scene's combinations is in the tenth that training never draws."""
        return any(crc32(key.encode()) % 10 == 0 for key in self.combinations())


def sample_scene(rng: Random, words: Sequence[str] = tuple(SEEN)) -> Scene:
    """Draw a scene of any of `words`, whether its combinations are held out or not."""
    concepts = rng.sample(words, MAX_OBJECTS)
    arrangement = rng.choices(list(_ARRANGEMENTS), _WEIGHTS)[0]
    phrase, mentions = _ARRANGEMENTS[arrangement](rng, concepts)
    background = "white"
    if rng.random() < 0.8:
        background = rng.choice([colour for colour in BACKGROUNDS if all(colour != m.tint for m in mentions)])
        phrase = f"{phrase} {'on' if rng.random() < 0.8 else 'with'} {with_article(background)} background"
    return Scene(phrase, arrangement, background, tuple(mentions))


def sample_training_scene(rng: Random) -> Scene:
    """Draw a scene without held-out combinations."""
    while (scene := sample_scene(rng)).is_held_out():
        pass
    return scene


def vocabulary() -> list[str]:
    """Return every word that a prompt can contain, sorted."""
    words = {"a", "an", "background", "between", "in", "on", "the", "three", "two", "with"}
    phrases = [*_SPOTS, *_RELATIONS, *_SIZE_WORDS, *TINTS, *BACKGROUNDS, *SEEN, *map(plural, SEEN)]
    words.update(word for phrase in phrases for word in phrase.split())
    return sorted(words)


def _mention(rng: Random, concept: str, centres, sizes: str) -> tuple[str, Mention]:
    size = rng.choices((0, 1, 2), (0.12, 0.76, 0.12))[0]
    tint = rng.choice(list(TINTS)) if rng.random() < 0.22 else None
    count = len(centres)
    noun = concept if count == 1 else plural(concept)
    words = " ".join(word for word in (_SIZE_WORDS[size], tint, noun) if word)
    phrase = with_article(words) if count == 1 else f"{('two', 'three')[count - 2]} {words}"
    side = _SIZES[sizes][size]
    return phrase, Mention(concept, tint, noun, tuple((x, y, side) for x, y in centres))


def _alone(rng: Random, concepts: list[str]):
    spot = rng.choice(list(_SPOTS))
    sizes = "alone" if _SPOTS[spot] is _CENTRE else "corner" if "corner" in spot else "spot"
    phrase, mention = _mention(rng, concepts[0], [_SPOTS[spot]], sizes)
    return f"{phrase} {spot}".strip(), [mention]


def _pair(rng: Random, concepts: list[str]):
    relation = rng.choice(list(_RELATIONS))
    first, second = _RELATIONS[relation]
    a, a_mention = _mention(rng, concepts[0], [first], "spot")
    b, b_mention = _mention(rng, concepts[1], [second], "spot")
    return f"{a} {relation} {b}", [a_mention, b_mention]


def _corners(rng: Random, concepts: list[str]):
    first, second = rng.sample(list(_CORNERS), 2)
    a, a_mention = _mention(rng, concepts[0], [_CORNERS[first]], "corner")
    b, b_mention = _mention(rng, concepts[1], [_CORNERS[second]], "corner")
    return f"{a} in the {first} corner and {b} in the {second} corner", [a_mention, b_mention]


def _between(rng: Random, concepts: list[str]):
    middle, left, right = (
        _mention(rng, concept, [_ROW[i]], "row") for concept, i in zip(concepts, (1, 0, 2), strict=True)
    )
    return f"{middle[0]} between {left[0]} and {right[0]}", [middle[1], left[1], right[1]]


def _three(rng: Random, concepts: list[str]):
    over = rng.random() < 0.5
    alone, row = (_TOP, "bottom") if over else (_BOTTOM, "top")
    a, a_mention = _mention(rng, concepts[0], [alone], "corner")
    b, b_mention = _mention(rng, concepts[1], [_CORNERS[f"{row} left"]], "corner")
    c, c_mention = _mention(rng, concepts[2], [_CORNERS[f"{row} right"]], "corner")
    return f"{a} {'above' if over else 'below'} {b} and {c}", [a_mention, b_mention, c_mention]


def _several(rng: Random, concepts: list[str]):
    centres = rng.choice([(_LEFT, _RIGHT), _ROW])
    phrase, mention = _mention(rng, concepts[0], centres, "spot" if len(centres) == 2 else "row")
    return phrase, [mention]


_ARRANGEMENTS = {
    "alone": _alone,
    "pair": _pair,
    "corners": _corners,
    "between": _between,
    "three": _three,
    "several": _several,
}
_WEIGHTS = (0.22, 0.42, 0.1, 0.1, 0.08, 0.08)

assert not SEEN.keys() & HELD_OUT.keys()
