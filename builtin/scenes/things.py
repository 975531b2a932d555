"""What the model draws: everyday names, plurals and synonyms, and the Fluent Emoji drawing of each."""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32


@dataclass(frozen=True)
class Thing:
    """`name` is the everyday word that captions read back as; `icon` names the drawing."""

    name: str
    plural: str
    icon: str
    synonyms: tuple[tuple[str, str], ...] = ()  # (singular, plural)

    @property
    def words(self) -> tuple[tuple[str, str], ...]:
        return ((self.name, self.plural), *self.synonyms)


def _plural(word: str) -> str:
    if word in UNCHANGED:
        return word
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word.endswith(("s", "sh", "ch", "x")):
        return word + "es"
    return word[:-1] + "ies" if word.endswith("y") and word[-2] not in "aeiou" else word + "s"


UNCHANGED = {"fish", "broccoli", "grapes", "lightning"}
IRREGULAR = {"snowman": "snowmen", "cup of coffee": "cups of coffee", "slice of pizza": "slices of pizza"}

# one line a thing: word, synonyms with "/", then "=" and the icon where it is not the word itself
_LIST = """
fox | cat/kitten = cat-face | dog/puppy = dog-face | rabbit/bunny = rabbit-face | bear | panda | koala
tiger = tiger-face | lion | frog | monkey = monkey-face | cow = cow-face | pig = pig-face | penguin | owl
chick/baby bird = baby-chick | unicorn | bee/honeybee = honeybee | ladybug/ladybird = lady-beetle | butterfly | snail
turtle/tortoise | octopus | fish = tropical-fish | whale = spouting-whale | elephant | dinosaur = t-rex
apple = red-apple | pear | orange/tangerine = tangerine | lemon | banana | watermelon | grapes | strawberry
cherry = cherries | pineapple | carrot | broccoli | mushroom/toadstool | pizza/slice of pizza
burger/hamburger = hamburger | donut/doughnut = doughnut | cookie/biscuit = cookie | cake/birthday cake = birthday-cake
ice cream = ice-cream | coffee/cup of coffee = hot-beverage | sun | cloud | rainbow | star
moon/crescent moon = crescent-moon | snowman | fire/flame = fire | drop/raindrop = droplet | umbrella
lightning/lightning bolt = high-voltage | sunflower | rose | cactus | palm tree = palm-tree | tree = deciduous-tree
mountain = snow-capped-mountain | volcano | house | castle | heart = red-heart | car/automobile = automobile | bus
train/locomotive = locomotive | boat/sailboat = sailboat | rocket | plane/airplane = airplane | balloon
gift/present = wrapped-gift | crown | key | bell | camera | light bulb/lamp = light-bulb
clock/alarm clock = alarm-clock | ball/football = soccer-ball | diamond/gem = gem-stone
ghost | robot | pumpkin/jack-o'-lantern = jack-o-lantern
Christmas tree = christmas-tree | teddy bear/teddy = teddy-bear | hat/top hat = top-hat
"""


def _read(entry: str) -> Thing:
    words, _, icon = (part.strip() for part in entry.partition("="))
    name, *others = words.split("/")
    return Thing(name, _plural(name), icon or name, tuple((word, _plural(word)) for word in others))


THINGS = tuple(_read(entry) for line in _LIST.strip().splitlines() for entry in line.split("|"))
BY_NAME = {thing.name: thing for thing in THINGS}


# grounds of about a thing's own colour, on which it can hardly be seen (squared differences of a drawing at 25 x 25
# pixels sum to less than 26; the orange is there for its name)
_HIDDEN_ON = {
    "orange": "bell, cat, chick, fire, key, light bulb, lightning, moon, octopus, orange, pineapple, pizza, star, sun",
    "yellow": "banana, bell, chick, key, lemon, light bulb, lightning, moon, pineapple, star",
    "red": "balloon, heart, lightning, rose",
    "brown": "bear, lightning",
    "grey": "elephant, umbrella",
    "pink": "cloud",
    "purple": "umbrella",
    "white": "cloud",
    "grass": "cactus",
    "night": "grapes",
}
HIDDEN_ON = {ground: frozenset(names.split(", ")) for ground, names in _HIDDEN_ON.items()}


def is_kept_out(one: str, other: str) -> bool:
    """Whether two different things are never shown together in training: a tenth of the pairs, in either order."""
    return crc32("|".join(sorted((one, other))).encode()) % 10 == 0
