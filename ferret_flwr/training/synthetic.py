"""The built-in data `builtin:tasks`: small instruction tasks that need no file and no network.

Lookups (capitals, opposites, kinds) reward memory, list tasks (last, count, reversal) reward
attention, arithmetic is hard: so the eight categories differ, and so do clients that get
different shares of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .randomness import Draws

CAPITALS = {
    "France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Spain": "Madrid",
    "Egypt": "Cairo", "Peru": "Lima", "Kenya": "Nairobi", "Norway": "Oslo",
    "Greece": "Athens", "Cuba": "Havana", "Austria": "Vienna", "Poland": "Warsaw",
    "Canada": "Ottawa", "China": "Beijing", "Ireland": "Dublin", "Portugal": "Lisbon",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "old": "new",
    "light": "dark", "open": "closed", "high": "low", "hard": "soft",
    "early": "late", "full": "empty", "happy": "sad", "rich": "poor",
    "strong": "weak", "wet": "dry", "loud": "quiet", "sharp": "blunt",
}  # fmt: skip
KINDS = {
    "cat": "animal", "horse": "animal", "mouse": "animal", "wolf": "animal", "sheep": "animal",
    "pear": "fruit", "cherry": "fruit", "plum": "fruit", "peach": "fruit", "melon": "fruit",
    "hammer": "tool", "knife": "tool", "saw": "tool", "drill": "tool", "brush": "tool",
}  # fmt: skip
PLURALS = {
    "cat": "cats", "horse": "horses", "mouse": "mice", "wolf": "wolves", "sheep": "sheep",
    "pear": "pears", "cherry": "cherries", "plum": "plums", "peach": "peaches",
    "melon": "melons", "hammer": "hammers", "knife": "knives", "saw": "saws",
    "drill": "drills", "brush": "brushes",
}  # fmt: skip
WORDS = list(PLURALS)


@dataclass(frozen=True)
class Task:
    """One category: the ways to ask, and how an (input, output) pair is drawn."""

    instructions: tuple[str, ...]
    pair: Callable[[Draws], tuple[str, str]]


def _lookup(label: str, table: dict[str, str], answer: str) -> Callable[[Draws], tuple[str, str]]:
    """Return a drawer of questions about one or two rows of ``table``."""

    def pair(draws: Draws) -> tuple[str, str]:
        asked = draws.sample(list(table), 1 + draws.below(2))
        answers = [answer.format(key=key, value=table[key]) for key in asked]
        return f"{label}: {', '.join(asked)}", f"The {', the '.join(answers)}."

    return pair


def _last(draws: Draws) -> tuple[str, str]:
    words = draws.sample(WORDS, 2 + draws.below(4))
    return f"Words: {', '.join(words)}", f"The last word is {words[-1]}."


def _count(draws: Draws) -> tuple[str, str]:
    words = draws.sample(WORDS, 2 + draws.below(6))
    return f"Words: {', '.join(words)}", f"There are {len(words)} words in the list."


def _reverse(draws: Draws) -> tuple[str, str]:
    words = draws.sample(WORDS, 2 + draws.below(2))
    return f"Words: {', '.join(words)}", f"In reverse order: {', '.join(words[::-1])}."


def _sum(draws: Draws) -> tuple[str, str]:
    a, b = 1 + draws.below(12), 1 + draws.below(12)
    return f"Numbers: {a}, {b}", f"The sum of {a} and {b} is {a + b}."


TASKS: dict[str, Task] = {
    "capital": Task(
        ("Name the capital.", "What is the capital?", "Give the capital of each country."),
        _lookup("Countries", CAPITALS, "capital of {key} is {value}"),
    ),
    "opposite": Task(
        ("Name the opposite.", "What is the opposite?", "Give the opposite of each adjective."),
        _lookup("Adjectives", OPPOSITES, "opposite of {key} is {value}"),
    ),
    "plural": Task(
        ("Name the plural.", "What is the plural?", "Give the plural of each noun."),
        _lookup("Nouns", PLURALS, "plural of {key} is {value}"),
    ),
    "kind": Task(
        ("Is it an animal, a fruit or a tool?", "Sort into animals, fruits and tools."),
        _lookup("Things", KINDS, "{key} is a kind of {value}"),
    ),
    "last": Task(("Name the last word.", "Which word comes last?"), _last),
    "count": Task(("Count the words.", "How many words are there?"), _count),
    "reverse": Task(("Reverse the list.", "Write the words in reverse order."), _reverse),
    "sum": Task(
        ("Add the numbers.", "What is the sum?", "Work out the sum.", "How much is it together?"),
        _sum,
    ),
}


def tasks(seed: int, size: int = 4000) -> list[dict[str, str]]:
    """Return ``size`` different examples, the categories of `TASKS` taking turns.

    Parameters
    ----------
    seed
        The same seed gives the same list on every machine.
    size
        Number of rows. A category that runs out of different examples leaves its turns to the
        others.

    Returns
    -------
    list of dict
        Rows with ``instruction``, ``input``, ``output`` and ``category``.
    """
    draws = Draws("builtin:tasks", seed)
    rows: dict[tuple[str, str], dict[str, str]] = {}
    turn = 0
    while len(rows) < size:
        category, task = list(TASKS.items())[turn % len(TASKS)]
        turn += 1
        instruction = draws.choice(task.instructions)
        given, output = task.pair(draws)
        rows.setdefault(
            (instruction, given),
            {"instruction": instruction, "input": given, "output": output, "category": category},
        )
    return list(rows.values())


BUILTIN_DATASETS: dict[str, Callable[[int], list[dict[str, str]]]] = {"builtin:tasks": tasks}
