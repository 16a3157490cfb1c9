"""Constraints on an answer that a program can check, in the manner of IFEval (Zhou et al. 2023, arXiv 2311.07911).

A constraint is a sentence of the instruction and a rule that says of a text whether it holds. An empty answer meets
none. Words are compared without case; a word is a run of letters, digits and apostrophes.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
SENTENCE = re.compile(r"[.!?]+(?=\s|$)")
# Frequent words of each language that the others do not have.
FUNCTION_WORDS = {
    "English": "the and of to is that with for are was this you it as have from be not they which your",
    "Spanish": "el los las una por con para como más su pero muy también del al y es",
    "French": "le les une des dans pour avec est sur pas vous nous il elle aux cette sont du et",
    "German": "der die das und ist nicht mit ein eine für auf den sie wir zu sich auch als von im",
}  # fmt: skip


@dataclass(frozen=True)
class Constraint:
    """One demand.

    Attributes:
        kind: of `KINDS`.
        asks: the sentence that the instruction says it in.
        holds: of a text that is not empty.
    """

    kind: str
    asks: str
    holds: Callable[[str], bool]

    def met(self, text: str) -> bool:
        """Whether the text meets it."""
        return bool(text.strip()) and self.holds(text.strip())


def words(text: str) -> list[str]:
    return [word.lower() for word in WORD.findall(text)]


def sentences(text: str) -> int:
    """Stretches that a full stop, an exclamation or a question mark ends; an open end counts as one more."""
    return sum(bool(WORD.search(part)) for part in SENTENCE.split(text))


def items(text: str) -> list[str]:
    """The lines of a list with hyphens or stars."""
    return [line for line in map(str.strip, text.splitlines()) if re.match(r"[-*] +\S", line)]


def language(text: str) -> str:
    """The one whose frequent words are most of the text's; "" for a text that has none, or as many of two."""
    found = words(text)
    counts = {name: sum(word in set(listed.split()) for word in found) for name, listed in FUNCTION_WORDS.items()}
    best, second = sorted(counts, key=counts.__getitem__)[::-1][:2]
    return best if counts[best] > counts[second] else ""


def at_most(most: int) -> Constraint:
    return Constraint("at most", f"Use at most {most} words.", lambda text: len(words(text)) <= most)


def at_least(least: int) -> Constraint:
    return Constraint("at least", f"Use at least {least} words.", lambda text: len(words(text)) >= least)


def exactly(count: int) -> Constraint:
    told = "one sentence" if count == 1 else f"{count} sentences"
    return Constraint("sentences", f"Write exactly {told}.", lambda text: sentences(text) == count)


def use(word: str) -> Constraint:
    return Constraint("use", f'Use the word "{word}".', lambda text: word in words(text))


def avoid(word: str) -> Constraint:
    return Constraint("avoid", f'Do not use the word "{word}".', lambda text: word not in words(text))


def no_commas() -> Constraint:
    return Constraint("no commas", "Do not use any comma.", lambda text: "," not in text)


def lowercase() -> Constraint:
    return Constraint("case", "Use small letters only, no capitals.", lambda text: text == text.lower())


def capitals() -> Constraint:
    return Constraint("case", "Write everything in capital letters.", lambda text: text == text.upper())


def listed(count: int) -> Constraint:
    return Constraint(
        "list", f"Answer with a list of exactly {count} lines that each begin with a hyphen.",
        lambda text: len(items(text)) == count == len([line for line in text.splitlines() if line.strip()]),
    )  # fmt: skip


def quoted() -> Constraint:
    return Constraint(
        "quoted", 'Put the whole answer in double quotation marks.',
        lambda text: len(text) > 2 and text[0] == text[-1] == '"',
    )  # fmt: skip


def begins(word: str) -> Constraint:
    return Constraint("beginning", f'Begin with the word "{word}".', lambda text: words(text)[:1] == [word.lower()])


def ends(phrase: str) -> Constraint:
    def holds(text: str) -> bool:
        return words(text)[-len(words(phrase)) :] == words(phrase)

    return Constraint("ending", f'End with the words "{phrase}"', holds)


def in_order(first: str, second: str) -> Constraint:
    """Both words are there, and every use of the first stands before every use of the second."""

    def holds(text: str) -> bool:
        places = {word: [at for at, found in enumerate(words(text)) if found == word] for word in (first, second)}
        return bool(places[first] and places[second]) and max(places[first]) < min(places[second])

    return Constraint("order", f'Use the word "{first}" and, after it, the word "{second}".', holds)


def in_language(name: str) -> Constraint:
    return Constraint("language", f"Answer in {name}.", lambda text: language(text) == name)


USED = (
    "simple",
    "time",
    "people",
    "first",
    "small",
    "often",
    "good",
    "together",
    "because",
    "example",
    "water",
    "work",
)
AVOIDED = ("the", "and", "is", "important", "can", "you", "it", "of", "very", "that")
STARTS = ("First", "Well", "Today", "Maybe", "Yes", "Sometimes", "Imagine", "Listen")
ENDS = ("that is all", "have fun", "good luck", "the end", "try it", "think about it")
PAIRS = (("small", "large"), ("first", "then"), ("morning", "night"), ("old", "new"), ("before", "after"))
KINDS: dict[str, Callable[[random.Random], Constraint]] = {
    "at most": lambda rng: at_most(rng.choice((10, 15, 20, 25))),
    "at least": lambda rng: at_least(rng.choice((20, 25, 30))),
    "sentences": lambda rng: exactly(rng.choice((1, 2, 3))),
    "use": lambda rng: use(rng.choice(USED)),
    "avoid": lambda rng: avoid(rng.choice(AVOIDED)),
    "no commas": lambda rng: no_commas(),
    "case": lambda rng: rng.choice((lowercase, capitals))(),
    "list": lambda rng: listed(rng.choice((2, 3))),
    "quoted": lambda rng: quoted(),
    "beginning": lambda rng: begins(rng.choice(STARTS)),
    "ending": lambda rng: ends(rng.choice(ENDS)),
    "order": lambda rng: in_order(*rng.choice(PAIRS)),
    "language": lambda rng: in_language(rng.choice(("Spanish", "French", "German"))),
}
# Kinds that one answer cannot meet together, or only by chance.
CONFLICTS = {
    frozenset(pair)
    for pair in (
        ("at most", "at least"), ("list", "sentences"), ("list", "quoted"), ("list", "beginning"), ("list", "ending"),
        *(("language", other) for other in ("use", "avoid", "beginning", "ending", "order", "at most", "list")),
        ("avoid", "order"), ("avoid", "ending"), ("use", "order"), ("order", "at most"),
    )
}  # fmt: skip


def drawn(rng: random.Random, count: int) -> list[Constraint]:
    """So many constraints of different kinds that one answer can meet."""
    chosen: list[str] = []
    while len(chosen) < count:
        kind = rng.choice(list(KINDS))
        if kind not in chosen and not any(frozenset((kind, other)) in CONFLICTS for other in chosen):
            chosen.append(kind)
    return [KINDS[kind](rng) for kind in chosen]


@dataclass(frozen=True)
class Demand:
    """An instruction with its constraints.

    Attributes:
        topic: what it is about; topics of different parts are different.
        text: what a system is asked.
        constraints: what an answer is judged by.
    """

    topic: str
    text: str
    constraints: Sequence[Constraint]

    def share(self, answer: str) -> float:
        """Of the constraints, how many an answer meets."""
        return sum(constraint.met(answer) for constraint in self.constraints) / len(self.constraints)


TASKS = (
    "Describe {topic} to a friend.",
    "Give advice to somebody who is interested in {topic}.",
    "Say why some people like {topic}.",
    "Write the beginning of a short story about {topic}.",
    "Explain {topic} to a child.",
    "Write a message to a colleague about {topic}.",
    "Write an advertisement for {topic}.",
    "Tell what is hard about {topic}.",
)
TOPICS = (
    "gardening", "chess", "swimming", "baking bread", "old maps", "the moon", "bicycles", "learning to read", "camping",
    "rain", "trains", "coffee", "photography", "keeping bees", "winter", "public libraries", "juggling", "cats",
    "mountain hiking", "radio", "painting walls", "lighthouses", "cheese", "learning Italian", "museums", "fishing",
    "origami", "street markets", "volcanoes", "dancing", "crossword puzzles", "windmills", "dogs", "sailing", "tea",
    "astronomy", "knitting", "rivers", "running", "board games", "bridges", "singing in a choir", "spices", "birds",
    "recycling", "clocks", "ice skating", "the sea", "poetry", "soap making", "tomatoes", "night buses", "kites",
    "carpentry", "snow", "beekeepers", "village fairs", "mushrooms", "folk music", "the first day of school",
    "balloons", "electric cars", "yoga", "cooking for ten", "letters on paper", "caves", "football", "sunsets",
    "moving house", "zoos", "breakfast", "magic tricks", "islands", "solar panels", "horses", "sewing", "theatre",
    "repairing shoes", "wild flowers", "airports",
)  # fmt: skip


def demands(training: int, choosing: int, heldout: int) -> dict[str, list[Demand]]:
    """The instructions by part, always the same ones; no topic is in two parts.

    Raises:
        ValueError: if there are fewer pairs of a topic and a task than are asked for.
    """
    rng = random.Random("constraints")
    topics = list(TOPICS)
    rng.shuffle(topics)
    counts = {"training": training, "choosing": choosing, "heldout": heldout}
    total, found, first = sum(counts.values()), {}, 0
    for place, (part, count) in enumerate(counts.items()):
        last = len(topics) if place == len(counts) - 1 else first + max(1, round(len(topics) * count / total))
        asked = [(topic, task) for task in TASKS for topic in topics[first:last]]
        if len(asked) < count:
            raise ValueError(f"{part}: {len(asked)} instructions can be made, {count} are needed.")
        rng.shuffle(asked)
        found[part] = [_demand(topic, task, rng) for topic, task in asked[:count]]
        first = last
    return found


def _demand(topic: str, task: str, rng: random.Random) -> Demand:
    constraints = drawn(rng, rng.choice((2, 3)))
    text = " ".join([task.format(topic=topic), *(constraint.asks for constraint in constraints)])
    return Demand(topic, text, constraints)
