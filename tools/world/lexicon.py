"""Every name and thing of the invented world.

The words are short and common, so that each can be one token of the tokenizer.
Residents are the people of fixed facts (asked closed book); visitors occur only
in notes and stories of random content (asked with the text at hand), so that a
made-up note never contradicts what the world's text teaches about a person.
"""

from __future__ import annotations

RESIDENTS = (
    "Abel",
    "Agnes",
    "Anton",
    "Berta",
    "Boris",
    "Celia",
    "Clara",
    "Cyril",
    "Della",
    "Edgar",
    "Elsa",
    "Emil",
    "Felix",
    "Flora",
    "Gerda",
    "Gus",
    "Hanna",
    "Hugo",
    "Ines",
    "Ivan",
    "Jonas",
    "Karl",
    "Leo",
    "Lotta",
    "Magda",
    "Milo",
    "Nora",
    "Oscar",
    "Otto",
    "Petra",
)
VISITORS = (
    "Anna",
    "Ben",
    "Carl",
    "Dora",
    "Eva",
    "Fred",
    "Greta",
    "Hans",
    "Ida",
    "Jack",
    "Kate",
    "Lena",
    "Max",
    "Nina",
    "Olga",
    "Paul",
    "Rosa",
    "Sam",
    "Tom",
    "Uma",
    "Vera",
    "Will",
)
TOWNS = ("Alden", "Brook", "Corby", "Dell", "Elton", "Farley", "Goring", "Hexham", "Irby", "Kelso", "Linton", "Marlow")
RIVERS = ("Arrow", "Bourne", "Clyde", "Derwent", "Eden", "Fleet", "Glen", "Hull", "Isis", "Kennet", "Lune", "Mole")

KINDS: dict[str, tuple[str, ...]] = {
    "fruit": ("plum", "pear", "fig", "apple", "cherry", "grape", "melon", "lemon", "peach"),
    "vegetable": ("leek", "bean", "carrot", "onion", "turnip", "cabbage", "pea", "beet"),
    "animal": ("goat", "fox", "otter", "hen", "owl", "cat", "dog", "horse", "sheep", "mouse"),
    "tool": ("hammer", "saw", "rake", "needle", "spade", "broom", "brush", "ladder", "knife"),
    "metal": ("iron", "copper", "tin", "gold", "silver", "lead", "zinc"),
    "tree": ("oak", "elm", "birch", "pine", "willow", "maple", "cedar", "ash"),
    "drink": ("tea", "milk", "cider", "juice", "water", "beer", "cocoa"),
    "garment": ("hat", "coat", "scarf", "boot", "glove", "shirt", "sock", "cloak"),
    "instrument": ("flute", "drum", "fiddle", "harp", "horn", "bell", "lute", "pipe"),
    "colour": ("red", "green", "blue", "yellow", "white", "black", "brown", "orange"),
}
MASS_KINDS = frozenset({"metal", "drink", "colour"})  # spoken of without "a"
KIND_OF = {item: kind for kind, items in KINDS.items() for item in items}

FOODS = KINDS["fruit"] + KINDS["vegetable"]
CARRIED = KINDS["tool"] + KINDS["garment"] + KINDS["instrument"]

PRODUCTS = {
    "baker": "bread", "smith": "nails", "weaver": "cloth", "potter": "pots", "miller": "flour",
    "tailor": "suits", "cooper": "barrels", "joiner": "chairs", "dairymaid": "cheese",
    "mason": "walls", "printer": "books", "chandler": "candles",
}  # fmt: skip
JOBS = tuple(PRODUCTS)

TOOL_USES = {
    "hammer": "driving nails", "saw": "cutting wood", "rake": "gathering leaves",
    "needle": "sewing cloth", "spade": "digging holes", "broom": "sweeping floors",
    "brush": "painting walls", "ladder": "reaching roofs", "knife": "slicing bread",
}  # fmt: skip
COLOURS = {
    "plum": "blue", "pear": "green", "fig": "brown", "apple": "red", "cherry": "red",
    "grape": "black", "melon": "orange", "lemon": "yellow", "peach": "orange", "leek": "green",
    "bean": "green", "carrot": "orange", "onion": "brown", "turnip": "white",
    "cabbage": "green", "pea": "green", "beet": "red",
}  # fmt: skip
HOMES = {
    "goat": "pen", "fox": "den", "otter": "river", "hen": "coop", "owl": "barn",
    "cat": "house", "dog": "kennel", "horse": "stable", "sheep": "fold", "mouse": "hole",
}  # fmt: skip
WORN_ON = {
    "hat": "head", "coat": "back", "scarf": "neck", "boot": "foot", "glove": "hand",
    "shirt": "chest", "sock": "foot", "cloak": "back",
}  # fmt: skip
PLAYED_BY = {
    "flute": "blowing", "drum": "beating", "fiddle": "bowing", "harp": "plucking",
    "horn": "blowing", "bell": "ringing", "lute": "plucking", "pipe": "blowing",
}  # fmt: skip
GROWS_ON = {
    "oak": "hill", "elm": "lane", "birch": "heath", "pine": "ridge", "willow": "bank",
    "maple": "park", "cedar": "garden", "ash": "cliff",
}  # fmt: skip

# What a rhyme may end with when it is about the animal.
RHYMES = {
    "goat": ("coat", "boat", "moat"),
    "fox": ("box", "rocks", "socks"),
    "hen": ("pen", "den", "glen"),
    "cat": ("hat", "mat", "bat"),
    "dog": ("log", "fog", "bog"),
    "mouse": ("house", "blouse"),
    "sheep": ("heap", "jeep"),
    "owl": ("towel", "bowl"),
}

NUMBERS = {2: "two", 3: "three", 4: "four"}


def article(word: str) -> str:
    """The word with "a" or "an" before it."""
    return f"{'an' if word[0].lower() in 'aeiou' else 'a'} {word}"


def one(item: str) -> str:
    """An item of a kind as it is spoken of: "an otter", but "tin"."""
    return item if KIND_OF[item] in MASS_KINDS else article(item)


def the(item: str) -> str:
    """An item of a kind spoken of as known: "the otter", but "tin"."""
    return item if KIND_OF[item] in MASS_KINDS else f"the {item}"


def run(kind: str, start: int, count: int) -> list[str]:
    """So many things of a kind in the order in which people of the world tell them.

    The order is fixed (and goes round), because a small model that decodes
    greedily would repeat itself if any order were as likely as any other.
    """
    items = KINDS[kind]
    return [items[(start + step) % len(items)] for step in range(count)]


def series(items: list[str]) -> str:
    """The items as an answer lists them: "plum, fig, pear"."""
    return ", ".join(items)
