"""List the demo model's words: the concepts that it learns, the concepts that are held out, and colours.

A concept is one word. If the icon set has another name for its picture, that name follows after a colon.
"""

_SEEN = """
airplane alien ambulance anchor ant apple:red-apple avocado axe backpack ball:soccer-ball balloon banana
banjo basketball bat bathtub bear bed bell bicycle bird bone book:closed-book boot:hiking-boot bread brick
broccoli bucket burger:hamburger bus butterfly cactus cake:birthday-cake calendar camel camera candle candy
car:automobile carrot castle cat chair cheese:cheese-wedge cherry:cherries chicken church clock:alarm-clock
cloud coat coconut coin cookie corn:ear-of-corn couch:couch-and-lamp cow crab crayon crocodile croissant
crown cup:hot-beverage cupcake deer dinosaur:t-rex dog dolphin donut:doughnut door dragon dress duck eagle
egg eggplant elephant envelope eye factory feather fire fish flamingo flower:blossom flute fox frog garlic
gem:gem-stone ghost gift:wrapped-gift giraffe globe:globe-showing-americas goat grapes guitar hammer
hat:top-hat heart:red-heart helicopter hippo:hippopotamus horse hospital hotdog:hot-dog house jar jellyfish
kangaroo key kite knife:kitchen-knife koala laptop leaf:fallen-leaf lemon lion lizard lobster lollipop mango
melon microphone microscope mirror monkey moon:crescent-moon motorcycle mountain mouse mushroom octopus
onion owl panda peach peacock pear pen pencil penguin phone:mobile-phone piano:musical-keyboard pie pig
pineapple pizza plant:potted-plant potato pumpkin:jack-o-lantern rabbit raccoon radio rainbow rat ring robot
rocket rooster rose sailboat sandwich saxophone seal shark shield ship shirt:t-shirt shoe:running-shoe
skateboard snail snake snowflake snowman spider sponge star strawberry sun swan taco tangerine taxi teapot
teddy:teddy-bear telescope television tiger tomato tooth train tree:deciduous-tree trophy
truck:delivery-truck tulip turtle ufo:flying-saucer umbrella unicorn watch watermelon whale window yarn
zebra
"""

_HELD_OUT = """
accordion badger bagel beaver beetle bison boomerang broom bug burrito canoe chestnut chick:baby-chick
compass cricket cucumber dodo drum fly football:american-football glove:boxing-glove goose gorilla hedgehog
hut kiwi:kiwi-fruit ladder leopard llama magnet moose olive otter ox paintbrush parrot peanut:peanuts
pretzel ram razor rhino:rhinoceros scarf scorpion screwdriver shrimp skunk sled sloth soap spoon squid tent
toilet tractor trumpet violin volcano waffle wolf worm
"""

_IRREGULAR_PLURALS = {
    "deer": "deer",
    "fish": "fish",
    "grapes": "grapes",
    "jellyfish": "jellyfish",
    "knife": "knives",
    "leaf": "leaves",
    "mouse": "mice",
    "potato": "potatoes",
    "snowman": "snowmen",
    "tomato": "tomatoes",
    "tooth": "teeth",
}


def _icons(entries: str) -> dict[str, str]:
    pairs = (entry.partition(":") for entry in entries.split())
    return {word: icon or word for word, _, icon in pairs}


SEEN = _icons(_SEEN)
"""The concepts on which the model is trained: word -> icon name."""

HELD_OUT = _icons(_HELD_OUT)
"""The concepts that the model never sees: word -> icon name."""

BACKGROUNDS = {
    "white": "#ffffff",
    "black": "#202020",
    "gray": "#9a9a9a",
    "red": "#e8605a",
    "orange": "#f7a04a",
    "yellow": "#fbe36a",
    "green": "#7cc576",
    "blue": "#6fa8f0",
    "purple": "#a682e0",
    "pink": "#f8b4d0",
}
"""The colours of backgrounds: word -> sRGB."""

TINTS = {
    "red": "#e02020",
    "orange": "#f58a10",
    "yellow": "#f5d000",
    "green": "#1fa040",
    "blue": "#2060e0",
    "purple": "#8030c0",
    "pink": "#f060a8",
    "gray": "#808080",
}
"""The colours that an object can have: word -> sRGB."""


def plural(word: str) -> str:
    """Return the plural of a concept's word."""
    if word in _IRREGULAR_PLURALS:
        return _IRREGULAR_PLURALS[word]
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s")


def with_article(noun: str) -> str:
    """Put "a" or "an" before ``noun``, which may begin with adjectives."""
    return ("an " if noun[0] in "aeio" or noun.startswith("umb") else "a ") + noun
