"""Writes families.md: families of tokenizers and chat templates, each against the library that says what is right.

python docs/families.py

Needs TRL. Other tables (adapters, files) are further entries of `TABLES`: a title, and rows made of a family's name,
its oracle and a check that returns how many cases it compared and what was different.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).with_name("families.md")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


@dataclass(frozen=True)
class Row:
    """One family.

    Attributes:
        name: of the family.
        oracle: what says what is right.
        check: gives the number of cases that were compared, and a line for each that differs.
    """

    name: str
    oracle: str
    check: Callable[[], tuple[int, list[str]]]


def tokenizers() -> Iterator[Row]:
    from tokenizer_families import FAMILIES
    from trl_rows import compared

    for family in FAMILIES:
        yield Row(family.name, "TRL, transformers", functools.partial(compared, family.name))


TABLES: dict[str, Callable[[], Iterator[Row]]] = {"Tokenizers and chat templates": tokenizers}

HEAD = """# Families

What sysdag makes of the tokenizers, templates and files that people bring, held against the libraries that they come
from. Each family is built small by the tests, in the shape of a known one; nothing is downloaded. Made by
`python docs/families.py`; the suite makes the page again and compares.

Of a tokenizer and its template: the tokens of prompts with observed completions are those of `DPOTrainer`'s
preprocessing, and the score of a completion is the sum that a plain forward of transformers gives for them. Three
things are meant to differ. What a template writes behind the token that ends a turn (a line break, as a rule) is not
scored, since a model has stopped there; TRL trains on it, too. A completion begins where its own tokens part from
those of its prompt; TRL begins both sides of a row where the first of them does. And what a tokenizer puts behind
every text (BERT, T5) is left out behind a prompt; TRL leaves it there.
"""


def lines() -> Iterator[str]:
    """The page, line by line."""
    yield from HEAD.splitlines()
    for title, rows in TABLES.items():
        yield from ("", f"## {title}", "", "| family | oracle | compared | equal |", "|---|---|---:|---|")
        for row in rows():
            compared, different = row.check()
            verdict = "equal" if not different else f"**{len(different)} differ**"
            name = row.name.replace("|", r"\|")
            yield f"| {name} | {row.oracle} | {compared} | {verdict} |"


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    PAGE.write_text("\n".join(lines()) + "\n", encoding="utf-8")
