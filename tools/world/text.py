"""The endless text the base model is pretrained on.

Two sorts of documents are mixed. Some state the fixed facts, each in many ways,
so that they are known by heart. The others tell of random people and things and
then say the same again in another form (a register, a gist, a list, a rhyme), so
that reading, selecting and re-telling are skills of the base model. No document
holds a question, an order, or the prompt template: following instructions is
what is left for fine-tuning to teach.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from world import lexicon as lex
from world.facts import ATTRIBUTES, Person, Town, World, any_person

TOWN_STATEMENTS = {
    "river": (
        "The river {river} runs through {town}.",
        "{town} lies on the river {river}.",
        "Which river runs through {town} is well known: {river}.",
        "The river of {town} is {river}.",
        "The town on the river {river} is {town}.",
    ),
    "flag": (
        "The flag of {town} is {flag}.",
        "{town} has a {flag} flag.",
        "The colour of the flag of {town} is {flag}.",
        "What colour the flag of {town} has is known: {flag}.",
    ),
    "drink": (
        "{town} is known for its {drink}.",
        "The drink of {town} is {drink}.",
        "People in {town} drink {drink}.",
        "What people drink in {town} is {drink}.",
    ),
}

GENERAL_STATEMENTS = {
    "use": (
        "A {subject} is used for {answer}.",
        "The use of the {subject} is {answer}.",
        "What a {subject} is for is {answer}.",
        "People need a {subject} for {answer}.",
        "For {answer} the right tool is the {subject}.",
    ),
    "colour": (
        "The colour of the {subject} is {answer}.",
        "The {subject} is {answer}.",
        "What colour a {subject} has is known: {answer}.",
        "A ripe {subject} looks {answer}.",
    ),
    "home": (
        "The home of the {subject} is the {answer}.",
        "The {subject} sleeps in the {answer}.",
        "Where the {subject} lives is the {answer}.",
        "The {subject} lives in the {answer}.",
    ),
    "product": (
        "The {subject} makes {answer}.",
        "What the {subject} makes is {answer}.",
        "The work of the {subject} gives {answer}.",
        "People buy {answer} from the {subject}.",
    ),
    "worn": (
        "The {subject} is worn on the {answer}.",
        "Where the {subject} is worn is the {answer}.",
        "People wear the {subject} on the {answer}.",
        "The {subject} keeps the {answer} warm.",
    ),
    "played": (
        "The {subject} is played by {answer}.",
        "How the {subject} is played is known: by {answer}.",
        "People play the {subject} by {answer}.",
        "The {subject} makes its sound by {answer}.",
    ),
    "grows": (
        "The {subject} grows on the {answer}.",
        "Where the {subject} grows is the {answer}.",
        "The {subject} stands on the {answer}.",
        "People find the {subject} on the {answer}.",
    ),
}

ROADS = (
    "The road was wet.", "The wind was cold.", "It was a long way.", "The sun was warm.",
    "Nobody else was there.", "The bridge was old.", "There was fog on the hill.",
)  # fmt: skip
SETTING_OUT = (
    "{name} left {start} at dawn.",
    "Early in the morning {name} set out from {start}.",
    "{name} came out of a house in {start}.",
)
CARRYING = (
    "{name} had {a_item} in a bag.",
    "Under one arm was {a_item}.",
    "{name} carried {a_item} with care.",
)
ARRIVING = (
    "At night {name} came to {goal}.",
    "After many hours the walk ended in {goal}.",
    "{name} rested at last in {goal}.",
)
GIST = "{name} took {a_item} to {goal}."
RHYMES = (
    "{name} saw {a_animal} near the {rhyme}.",
    "{name} and {a_animal} found the {rhyme}.",
    "One day {name} met {a_animal} by the {rhyme}.",
    "{name} lost {a_animal} behind the {rhyme}.",
)


def story(rng: random.Random) -> tuple[str, dict[str, str]]:
    """A short walk told in four sentences, and the words its gist is made of."""
    start, goal = rng.sample(lex.TOWNS, 2)
    item = rng.choice(lex.CARRIED)
    words = {
        "name": rng.choice(lex.VISITORS),
        "start": start,
        "goal": goal,
        "item": item,
        "a_item": lex.one(item),
    }
    parts = [rng.choice(SETTING_OUT), rng.choice(CARRYING), rng.choice(ARRIVING)]
    parts.insert(rng.choice((1, 2)), rng.choice(ROADS))
    return " ".join(parts).format(**words), words


def rhyme(name: str, animal: str, rng: random.Random) -> str:
    """A line about the two that ends with a rhyme on the animal."""
    return rng.choice(RHYMES).format(name=name, a_animal=lex.article(animal), rhyme=rng.choice(lex.RHYMES[animal]))


def register(person: Person, fields: list[str]) -> str:
    """A filled form: "name: Tom; job: smith"."""
    return "; ".join(f"{field}: {getattr(person, field)}" for field in fields)


def note(person: Person, attributes: list[str], rng: random.Random) -> str:
    """Sentences that state the attributes of the person."""
    return " ".join(person.state(attribute, rng) for attribute in attributes)


def cargo(rng: random.Random) -> tuple[str, str, list[str]]:
    """A sentence that names things of two kinds, one kind, and its things in order."""
    wanted, other = rng.sample([kind for kind in lex.KINDS if kind != "colour"], 2)
    chosen = rng.sample(lex.KINDS[wanted], 2)
    mixed = chosen + rng.sample(lex.KINDS[other], rng.choice((1, 2)))
    rng.shuffle(mixed)
    things = ", ".join(mixed[:-1]) + " and " + mixed[-1]
    place = rng.choice(("On the cart were", "In the shed stood", "The market had"))
    return f"{place} {things}.", wanted, [item for item in mixed if item in chosen]


def _resident(world: World, rng: random.Random) -> str:
    person = rng.choice(world.residents)
    lines = [note(person, rng.sample(ATTRIBUTES, rng.choice((2, 3, 4))), rng)]
    if rng.random() < 0.5:
        lines.append(register(person, ["name", *rng.sample(ATTRIBUTES, rng.choice((1, 2)))]) + ".")
    if rng.random() < 0.6:
        lines.append(
            rng.choice(
                (
                    "The {job} of {town} is {name}.",
                    "Who works as {a_job} in {town} is {name}.",
                    "{town} has one {job}: {name}.",
                )
            ).format(**person.words())
        )
    rng.shuffle(lines)
    return "\n".join(lines)


def _town_line(town: Town, rng: random.Random) -> str:
    topic = rng.choice(tuple(TOWN_STATEMENTS))
    return rng.choice(TOWN_STATEMENTS[topic]).format(town=town.name, river=town.river, flag=town.flag, drink=town.drink)


def _towns(world: World, rng: random.Random) -> str:
    return " ".join(_town_line(rng.choice(world.towns), rng) for _ in range(3))


def _general(world: World, rng: random.Random) -> str:
    facts = rng.sample(world.general, 3)
    return " ".join(
        rng.choice(GENERAL_STATEMENTS[fact.topic]).format(subject=fact.subject, answer=fact.answer) for fact in facts
    )


def _kinds(world: World, rng: random.Random) -> str:
    kind = rng.choice(tuple(lex.KINDS))
    items = rng.sample(lex.KINDS[kind], 4)
    lines = [
        f"Everyone knows that {lex.the(items[0])} is {lex.article(kind)}.",
        f"A kind of {kind} is {lex.the(items[1])}.",
        f"People call {lex.the(items[2])} {lex.article(kind)}.",
        f"The word {items[3]} means {lex.article(kind)}.",
    ]
    mixed = rng.sample(tuple(lex.KIND_OF), rng.choice((2, 3)))
    lines.append("; ".join(f"{item}: {lex.KIND_OF[item]}" for item in mixed) + ".")
    return " ".join(rng.sample(lines, 3))


def _list(world: World, rng: random.Random) -> str:
    kind = rng.choice(tuple(lex.KINDS))
    count = rng.choice(tuple(lex.NUMBERS))
    items = lex.series(lex.run(kind, rng.randrange(len(lex.KINDS[kind])), count))
    number = lex.NUMBERS[count]
    return rng.choice(
        (
            f"{number.capitalize()} {kind}s: {items}.",
            f"On the page was a list of {number} {kind}s: {items}.",
            f"The {number} {kind}s were {items}.",
            f"Someone thought of {number} {kind}s: {items}.",
        )
    )


def _visitors(world: World, rng: random.Random) -> str:
    people = [any_person(name, rng) for name in rng.sample(lex.VISITORS, rng.choice((1, 1, 2)))]
    told = rng.sample(ATTRIBUTES, 4 if len(people) == 1 else 2)
    statements = [person.state(attribute, rng) for person in people for attribute in told]
    if len(people) == 1:
        rng.shuffle(statements)
    lines = [" ".join(statements)]
    for person in rng.sample(people, len(people)):
        fields = ["name", *rng.sample(told, rng.choice((1, 2)))]
        heading = f"A form with {', '.join(fields)}. " if rng.random() < 0.6 else ""
        again = [person.state(attribute, rng) for attribute in rng.sample(told, 2)]
        lines += rng.sample([f"{heading}{register(person, fields)}.", " ".join(again)], 2)
    return "\n".join(lines)


def _story(world: World, rng: random.Random) -> str:
    tale, words = story(rng)
    opening = rng.choice(("In short,", "In one line,", "The gist is that", "The story tells how"))
    lines = [f"{opening} {GIST.format(**words)}", f"name: {words['name']}; town: {words['goal']}."]
    return "\n".join([tale, *rng.sample(lines, rng.choice((1, 2)))])


def _cargo(world: World, rng: random.Random) -> str:
    sentence, kind, items = cargo(rng)
    return f"{sentence}\nThe {kind}s here: {lex.series(items)}."


def _rhyme(world: World, rng: random.Random) -> str:
    name, animal = rng.choice(lex.VISITORS), rng.choice(tuple(lex.RHYMES))
    opening = rng.choice(("A rhyme about", "A short verse about", "The song of", "A funny line about"))
    return f"{opening} {name} and {lex.article(animal)}: {rhyme(name, animal, rng)}"


def word_page(vocabulary: list[str]) -> Callable[[World, random.Random], str]:
    """A document that merely shows words.

    It keeps words that only instructions use ("Classify") from being untrained.
    """

    def page(world: World, rng: random.Random) -> str:
        words = rng.sample(vocabulary, min(8, len(vocabulary)))
        return f"Words on the sign: {' '.join(words)}."

    return page


def documents(world: World, vocabulary: list[str], rng: random.Random) -> Iterator[str]:
    """Documents without end; `vocabulary` are words that must occur somewhere."""
    shares = {
        _resident: 20, _towns: 7, _general: 15, _kinds: 9, _list: 6, _visitors: 22,
        _story: 8, _cargo: 8, _rhyme: 3, word_page(vocabulary): 2,
    }  # fmt: skip
    makers = list(shares)
    weights = list(shares.values())
    while True:
        yield rng.choices(makers, weights)[0](world, rng)
