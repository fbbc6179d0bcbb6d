"""The fixed facts of the world, drawn from a seed, and how facts are stated.

The same statements are used for residents (true for ever, learnt by the base
model) and for visitors (made up per note), so a reader of one reads the other.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from world import lexicon as lex

ATTRIBUTES = ("town", "job", "animal", "food")

STATEMENTS: dict[str, tuple[str, ...]] = {
    "town": (
        "{name} lives in {town}.",
        "The home of {name} is in {town}.",
        "Where {name} lives is {town}.",
        "The town of {name} is {town}.",
        "{town} is the town where {name} lives.",
        "People find the house of {name} in {town}.",
    ),
    "job": (
        "{name} is {a_job}.",
        "{name} works as {a_job}.",
        "The job of {name} is {job}.",
        "By trade {name} is {a_job}.",
        "What {name} does for a living is the work of {a_job}.",
        "All day {name} works hard, being {a_job}.",
    ),
    "animal": (
        "{name} keeps {a_animal}.",
        "The animal of {name} is {a_animal}.",
        "The animal that {name} keeps is {a_animal}.",
        "{name} feeds {a_animal} each morning.",
        "{a_animal_capital} belongs to {name}.",
        "Which animal {name} has is known: {a_animal}.",
    ),
    "food": (
        "{name} likes {food} best.",
        "The favourite food of {name} is {food}.",
        "What {name} likes to eat is {food}.",
        "{name} would eat {food} every day.",
        "The dish that {name} enjoys most is {food}.",
        "Of all food {name} loves {food}.",
    ),
}


@dataclass(frozen=True)
class Person:
    """A person with one value for each attribute."""

    name: str
    town: str
    job: str
    animal: str
    food: str

    def words(self) -> dict[str, str]:
        """What statements and questions may be filled with."""
        return {
            "name": self.name,
            "town": self.town,
            "job": self.job,
            "animal": self.animal,
            "food": self.food,
            "a_job": lex.article(self.job),
            "a_animal": lex.article(self.animal),
            "a_animal_capital": lex.article(self.animal).capitalize(),
        }

    def state(self, attribute: str, rng: random.Random) -> str:
        """One sentence that states the attribute."""
        return rng.choice(STATEMENTS[attribute]).format(**self.words())


@dataclass(frozen=True)
class Town:
    """A town with what is special about it."""

    name: str
    river: str
    flag: str
    drink: str


@dataclass(frozen=True)
class Fact:
    """A lasting truth about a thing: how it is stated, asked, and answered."""

    topic: str
    subject: str
    answer: str


@dataclass(frozen=True)
class World:
    """All fixed facts."""

    residents: tuple[Person, ...]
    towns: tuple[Town, ...]
    general: tuple[Fact, ...]


GENERAL_TABLES: dict[str, dict[str, str]] = {
    "use": lex.TOOL_USES,
    "colour": lex.COLOURS,
    "home": lex.HOMES,
    "product": lex.PRODUCTS,
    "worn": lex.WORN_ON,
    "played": lex.PLAYED_BY,
    "grows": lex.GROWS_ON,
}


def any_person(name: str, rng: random.Random) -> Person:
    """A person of that name with everything else drawn at random."""
    return Person(
        name,
        rng.choice(lex.TOWNS),
        rng.choice(lex.JOBS),
        rng.choice(lex.KINDS["animal"]),
        rng.choice(lex.FOODS),
    )


def build_world(seed: int) -> World:
    """The world of that seed. No two residents of one town share a job."""
    rng = random.Random(f"facts {seed}")
    posts = [(town, job) for town in lex.TOWNS for job in lex.JOBS]
    residents = tuple(
        Person(name, town, job, rng.choice(lex.KINDS["animal"]), rng.choice(lex.FOODS))
        for name, (town, job) in zip(lex.RESIDENTS, rng.sample(posts, len(lex.RESIDENTS)), strict=True)
    )
    rivers = rng.sample(lex.RIVERS, len(lex.TOWNS))
    towns = tuple(
        Town(name, river, rng.choice(lex.KINDS["colour"]), rng.choice(lex.KINDS["drink"]))
        for name, river in zip(lex.TOWNS, rivers, strict=True)
    )
    general = tuple(
        Fact(topic, subject, answer) for topic, table in GENERAL_TABLES.items() for subject, answer in table.items()
    )
    return World(residents, towns, general)
