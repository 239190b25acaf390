"""Two tasks for the small base that tells children's stories: a style, and facts.

*Style*: go on in Shakespeare's manner; the loss on plays that were not trained on.

*Knowledge*: invented creatures, where they live and what they eat.  Each fact is a name, drawn from
syllables, and a word, drawn from sixteen.  It is trained in three phrasings and asked in others
that were never trained: whoever answers those knows the fact, and not the sentence.  Which of the
two facts of a name is asked for, only the phrasing tells.
"""

import random

from common import Base, Task, data_path, pairs, shares, texts

RATES = {"style": (1.6e-3, 4e-3, 1e-2, 2.5e-2), "knowledge": (7e-4, 2e-3, 6e-3, 1.8e-2)}
"""Learning rates to choose from: each 2.5 or 3 times the one before."""
NAMES, STEPS = 32, 200
"""How many names there are facts about, and for how many steps either task is trained."""
WORDS = {
    "home": "park forest garden barn tree lake cave castle shop school farm boat hill zoo box bed",
    "food": "cake apples soup bread eggs fish corn cheese grass nuts honey rice pie milk jam meat",
}
TRAINED = {
    "home": ("{} lives in the", "The home of {} is the", "{} had a house in the"),
    "food": ("{} likes to eat", "The food of {} is", "{} had a lunch of"),
}
ASKED = {
    "home": ("One day, {} went home to the", "Every day, {} sleeps in the", "{} stays in the"),
    "food": ("One day, {} wanted to eat", "Every day, {} eats", "{} loves the taste of"),
}
"""The first chooses learning rates; the others are reported."""


def style_task(base: Base, steps: int) -> Task:
    """Tiny Shakespeare; what is held out are its last plays."""
    text = data_path("tinyshakespeare/input.txt").read_text("utf-8")
    cut = len(text) * 9 // 10
    return text_task(base, "style", text[:cut], text[cut:], steps, "held-out plays")


def text_task(
    base: Base, name: str, read: str, held_out: str, steps: int, part: str = "held-out text"
) -> Task:
    """A text in pieces of 128 tokens; of another, 24,000 characters choose and as many test."""
    scenes = [held_out[i : i + 2000] for i in range(0, 48_000, 2000)]
    valid, test = shares(scenes, 12)
    return Task(
        name,
        train=texts(base, [read[:300_000]], 128),
        valid=texts(base, valid, 128),
        test={part: texts(base, test, 128)},
        steps=steps,
    )


def facts_task(base: Base, count: int, steps: int, seed: int = 0) -> Task:
    """Twice `count` facts, four bits each, as a task."""
    known = invented(count, seed)
    parts = {"trained phrasings": asked(known, TRAINED, slice(None))}
    parts["unseen phrasings"] = asked(known, ASKED, slice(1, None))
    return Task(
        "knowledge",
        train=pairs(base, parts["trained phrasings"]),
        valid=pairs(base, asked(known, ASKED, slice(1))),
        test={name: pairs(base, part) for name, part in parts.items()},
        steps=steps,
    )


def invented(count: int, seed: int) -> list[tuple[str, dict[str, str]]]:
    """Names and their facts."""
    rng = random.Random(seed)
    names: dict[str, None] = {}
    while len(names) < count:
        syllables = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3)]
        names["".join(syllables).capitalize()] = None
    return [(n, {kind: rng.choice(words.split()) for kind, words in WORDS.items()}) for n in names]


def asked(
    known: list[tuple[str, dict[str, str]]], phrasings: dict[str, tuple[str, ...]], which: slice
) -> list[tuple[str, str]]:
    """Beginnings of sentences, and how they end."""
    return [
        (phrasing.format(name), f" {facts[kind]}.")
        for name, facts in known
        for kind in facts
        for phrasing in phrasings[kind][which]
    ]
