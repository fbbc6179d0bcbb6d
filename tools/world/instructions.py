"""Instructions in the eight categories of Dolly, each with a check a program can run.

The amounts per category are uneven in Dolly's own proportions. Answers are short
and use only what the world's text teaches or the context holds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from typing import Any

from world import lexicon as lex
from world.facts import ATTRIBUTES, World, any_person
from world.text import GIST, cargo, note, register, rhyme, story

Row = dict[str, Any]

QUESTIONS: dict[str, tuple[str, ...]] = {
    "town": (
        "Where does {name} live?",
        "In which town does {name} live?",
        "What is the town of {name}?",
        "Name the town where {name} lives.",
        "Which town is the home of {name}?",
        "Tell me where {name} lives.",
    ),
    "job": (
        "What is the job of {name}?",
        "What does {name} do for a living?",
        "What does {name} work as?",
        "Name the job of {name}.",
        "Which trade does {name} have?",
        "Tell me the job of {name}.",
    ),
    "animal": (
        "Which animal does {name} keep?",
        "What animal does {name} have?",
        "Name the animal of {name}.",
        "What is the animal that {name} feeds?",
        "Which animal belongs to {name}?",
        "Tell me the animal of {name}.",
    ),
    "food": (
        "What is the favourite food of {name}?",
        "What does {name} like to eat?",
        "Which food does {name} like best?",
        "Name the food that {name} loves.",
        "What would {name} eat every day?",
        "Tell me the favourite food of {name}.",
    ),
}
POST_QUESTIONS = (
    "Who is the {job} of {town}?",
    "Who works as {a_job} in {town}?",
    "Name the {job} of {town}.",
)
TOWN_QUESTIONS = {
    "river": ("Which river runs through {name}?", "On which river does {name} lie?",
              "Name the river of {name}.", "What is the river of {name}?"),
    "flag": ("What colour is the flag of {name}?", "Which colour has the flag of {name}?",
             "Name the colour of the flag of {name}.", "Tell me the colour of the flag of {name}."),
    "drink": ("Which drink is {name} known for?", "What do people in {name} drink?",
              "Name the drink of {name}.", "What is the drink of {name}?"),
    "name": ("Which town lies on the river {river}?", "Name the town on the river {river}.",
             "Through which town runs the river {river}?"),
}  # fmt: skip
GENERAL_QUESTIONS = {
    "use": ("What is a {s} used for?", "What is the use of a {s}?", "What do people need a {s} for?",
            "Say what a {s} is for.", "Why do people need a {s}?", "Tell me the use of a {s}.",
            "What is a {s} for?", "What work needs a {s}?"),
    "colour": ("What colour is a {s}?", "What is the colour of a {s}?", "Which colour has a {s}?",
               "Say what colour a {s} has.", "Tell me the colour of a {s}.",
               "How does a ripe {s} look?", "Name the colour of a {s}.", "Which colour is a {s}?"),
    "home": ("Where does the {s} live?", "What is the home of the {s}?", "Where does the {s} sleep?",
             "Say where the {s} lives.", "Tell me the home of the {s}.", "Name the home of the {s}.",
             "Which place is home to the {s}?", "Where do people find the {s}?"),
    "product": ("What does the {s} make?", "What do people buy from the {s}?",
                "What is made by the {s}?", "Say what the {s} makes.",
                "Tell me what the {s} makes.", "What does the work of the {s} give?",
                "Name what the {s} makes.", "What does a {s} make?"),
    "worn": ("Where is the {s} worn?", "Where do people wear the {s}?",
             "On what is the {s} worn?", "Say where the {s} is worn.",
             "Tell me where the {s} is worn.", "What does the {s} keep warm?",
             "Where does one wear a {s}?", "Where is a {s} worn?"),
    "played": ("How is the {s} played?", "How do people play the {s}?",
               "How does the {s} make its sound?", "Say how the {s} is played.",
               "Tell me how people play the {s}.", "What is the way to play the {s}?",
               "How is a {s} played?", "How does one play the {s}?"),
    "grows": ("Where does the {s} grow?", "Where do people find the {s}?",
              "Where does the {s} stand?", "Say where the {s} grows.",
              "Tell me where the {s} grows.", "On what does the {s} grow?",
              "Where does one find the {s}?", "Name the place where the {s} grows."),
}  # fmt: skip
FORM_ORDERS = ("Fill in: {fields}.", "Fill in the form: {fields}.", "Make a register of {fields}.",
               "Extract {fields}.", "Write down {fields}.")  # fmt: skip
FIND_ORDERS = ("List the {kind}s in the text.", "Which {kind}s does the text name?",
               "Extract all {kind}s.", "Find the {kind}s in the text.")  # fmt: skip
GIST_ORDERS = ("Summarise the text.", "Say it in one line.", "Give the gist of the text.",
               "What is this story about, in short?", "Write a short summary.",
               "Tell the story in one line.")  # fmt: skip
RHYME_ORDERS = ("Write a rhyme about {name} and {a_animal}.",
                "Write a short verse about {name} and {a_animal}.",
                "Make a rhyme on {a_animal} and {name}.", "Invent a line with {name} and {a_animal}.",
                "Write a funny line about {a_animal} and {name}.")  # fmt: skip
IDEA_ORDERS = ("Name {n} {kind}s.", "List {n} {kind}s.", "Give me {n} {kind}s.", "Think of {n} {kind}s.",
               "Give {n} ideas for {kind}s.", "Which {n} {kind}s come to mind?",
               "Write a list of {n} {kind}s.", "Say {n} {kind}s that you know.",
               "What are {n} {kind}s?", "I need {n} {kind}s.",
               "Name {n} {kind}s for a story.", "Think of {n} {kind}s to draw.")  # fmt: skip
OTHER_IDEA_ORDERS = ("Name {n} {kind}s other than {item}.", "List {n} {kind}s but not {item}.")
CHOICE_ORDERS = ("Is {item} {a_first} or {a_second}?", "Which kind is {item}: {first} or {second}?",
                 "Classify {item} as {first} or {second}.", "Does {item} mean {a_first} or {a_second}?",
                 "Choose the kind of {item}: {first} or {second}.")  # fmt: skip
SORT_ORDERS = ("Classify as {first} or {second}: {items}.", "Sort by kind: {items}.",
               "Say the kind of each: {items}.")  # fmt: skip


def _row(instruction: str, response: str, check: Row | None = None, context: str = "") -> Row:
    return {
        "instruction": instruction,
        "context": context,
        "response": response,
        "check": check or {"one_of": [response]},
    }


def _open_qa(world: World, rng: random.Random) -> Row:
    if rng.random() < 0.25:
        town = rng.choice(world.towns)
        topic = rng.choice(tuple(TOWN_QUESTIONS))
        question = rng.choice(TOWN_QUESTIONS[topic]).format(name=town.name, river=town.river)
        return _row(question, getattr(town, topic))
    person = rng.choice(world.residents)
    if rng.random() < 0.12:
        return _row(rng.choice(POST_QUESTIONS).format(**person.words()), person.name)
    attribute = rng.choice(ATTRIBUTES)
    question = rng.choice(QUESTIONS[attribute]).format(**person.words())
    return _row(question, getattr(person, attribute))


def _general_qa(world: World, rng: random.Random) -> Row:
    fact = rng.choice(world.general)
    question = rng.choice(GENERAL_QUESTIONS[fact.topic]).format(s=fact.subject)
    return _row(question, fact.answer)


def _closed_qa(world: World, rng: random.Random) -> Row:
    people = [any_person(name, rng) for name in rng.sample(lex.VISITORS, rng.choice((1, 1, 2)))]
    told = rng.sample(ATTRIBUTES, 3 if len(people) == 1 else 2)
    context = " ".join(note(person, told, rng) for person in people)
    person, attribute = rng.choice(people), rng.choice(told)
    question = rng.choice(QUESTIONS[attribute]).format(**person.words())
    return _row(question, getattr(person, attribute), context=context)


def _information_extraction(world: World, rng: random.Random) -> Row:
    if rng.random() < 0.35:
        sentence, kind, items = cargo(rng)
        order = rng.choice(FIND_ORDERS).format(kind=kind)
        return _row(order, lex.series(items), {"list_of": items, "count": len(items)}, sentence)
    person = any_person(rng.choice(lex.VISITORS), rng)
    told = rng.sample(ATTRIBUTES, 3)
    fields = ["name", *rng.sample(told, rng.choice((1, 2)))]
    order = rng.choice(FORM_ORDERS).format(fields=", ".join(fields))
    check = {"fields": {field: getattr(person, field) for field in fields}}
    return _row(order, register(person, fields), check, note(person, told, rng))


def _summarization(world: World, rng: random.Random) -> Row:
    tale, words = story(rng)
    check = {"contains": [words["name"], words["item"], words["goal"]], "max_words": 9}
    return _row(rng.choice(GIST_ORDERS), GIST.format(**words), check, tale)


def _classification(world: World, rng: random.Random) -> Row:
    first, second = rng.sample(tuple(lex.KINDS), 2)
    if rng.random() < 0.3:
        items = [rng.choice(lex.KINDS[first]), rng.choice(lex.KINDS[second])]
        kinds = {item: lex.KIND_OF[item] for item in rng.sample(items, 2)}
        order = rng.choice(SORT_ORDERS).format(first=first, second=second, items=lex.series(list(kinds)))
        return _row(order, "; ".join(f"{i}: {k}" for i, k in kinds.items()), {"fields": kinds})
    kind = rng.choice((first, second))
    order = rng.choice(CHOICE_ORDERS).format(
        item=rng.choice(lex.KINDS[kind]), first=first, second=second,
        a_first=lex.article(first), a_second=lex.article(second),
    )  # fmt: skip
    return _row(order, kind)


def _brainstorming(world: World, rng: random.Random) -> Row:
    kind, count = rng.choice(tuple(lex.KINDS)), rng.choice(tuple(lex.NUMBERS))
    allowed = list(lex.KINDS[kind])
    orders, item, start = IDEA_ORDERS, "", rng.randrange(len(allowed))
    if rng.random() < 0.2:
        orders, item = OTHER_IDEA_ORDERS, allowed[start - 1]
        allowed.remove(item)
    order = rng.choice(orders).format(n=lex.NUMBERS[count], kind=kind, item=item)
    answer = lex.series(lex.run(kind, start, count))
    return _row(order, answer, {"list_of": allowed, "count": count})


def _creative_writing(world: World, rng: random.Random) -> Row:
    name, animal = rng.choice(lex.VISITORS), rng.choice(tuple(lex.RHYMES))
    order = rng.choice(RHYME_ORDERS).format(name=name, a_animal=lex.article(animal))
    check = {
        "contains": [name, animal],
        "ends_with": list(lex.RHYMES[animal]),
        "min_words": 5,
        "max_words": 12,
    }
    return _row(order, rhyme(name, animal, rng), check)


# category -> (how a row is made, how many rows): a fifth of Dolly's amounts.
CATEGORIES: dict[str, tuple[Callable[[World, random.Random], Row], int]] = {
    "open_qa": (_open_qa, 748),
    "general_qa": (_general_qa, 438),
    "classification": (_classification, 427),
    "closed_qa": (_closed_qa, 355),
    "brainstorming": (_brainstorming, 353),
    "information_extraction": (_information_extraction, 301),
    "summarization": (_summarization, 238),
    "creative_writing": (_creative_writing, 142),
}
PUBLIC_PART = 5  # one public row for so many of the clients' rows, in every category


def prompt_key(row: Row) -> tuple[str, str]:
    """What makes a prompt another prompt: two rows with the same key ask the same."""
    return row["instruction"], row["context"]


def _different_rows(
    world: World, category: str, amount: int, rng: random.Random, taken: Collection[tuple[str, str]] = ()
) -> list[Row]:
    """So many rows of the category, no prompt twice and none that is taken; ValueError if there are fewer."""
    make, _ = CATEGORIES[category]
    unique: dict[tuple[str, str], Row] = {}
    for _ in range(100 * amount):
        if len(unique) == amount:
            break
        row = make(world, rng)
        if prompt_key(row) not in taken:
            unique.setdefault(prompt_key(row), row)
    else:
        raise ValueError(f"{category}: only {len(unique)} different prompts, wanted {amount}")
    return [
        {k: row[k] for k in ("instruction", "context", "response")} | {"category": category, "check": row["check"]}
        for row in unique.values()
    ]


def instruction_rows(world: World, seed: int) -> list[Row]:
    """All rows, no prompt twice, in shuffled order; the same for the same seed."""
    rows: list[Row] = []
    for category, (_, amount) in CATEGORIES.items():
        rows += _different_rows(world, category, amount, random.Random(f"instructions {seed} {category}"))
    random.Random(f"order {seed}").shuffle(rows)
    return rows


def public_rows(world: World, seed: int, private: list[Row]) -> list[Row]:
    """Rows of the same categories for a server to hold: from random streams of their own, no prompt of `private`."""
    taken = {prompt_key(row) for row in private}
    rows: list[Row] = []
    for category, (_, amount) in CATEGORIES.items():
        rng = random.Random(f"public {seed} {category}")
        rows += _different_rows(world, category, amount // PUBLIC_PART, rng, taken)
    random.Random(f"public order {seed}").shuffle(rows)
    return rows
