"""Writes families.md: families of tokenizers, templates, adapters and files, each against what says what is right.

python docs/families.py

Needs TRL. A table is an entry of `TABLES`: a title, and rows made of a family's name, its oracle and a check that
returns how many cases it compared and what was different.
"""

from __future__ import annotations

import functools
import logging
import sys
import tempfile
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


def adapters() -> Iterator[Row]:
    from adapter_methods import adapter_rows

    return (Row(*row) for row in adapter_rows())


def files() -> Iterator[Row]:
    from test_shapes import CASES, check_pairs, endings_of

    def check(name: str) -> tuple[int, list[str]]:
        count, different = 0, []
        for ending in endings_of(name):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    count += check_pairs(Path(folder), name, ending)
                except AssertionError as error:
                    different.append(f"{ending}: {error}")
        return count, different

    for name in CASES:
        yield Row(f"`--shape {name}`", "pairs written by hand", functools.partial(check, name))


def pipelines() -> Iterator[Row]:
    from pipeline_checks import REFUSED, UNSCORED, checks_of, model_of
    from tiny_pipelines import PIPELINES, UNBUILT

    def check(name: str) -> tuple[int, list[str]]:
        count, different = 0, []
        with tempfile.TemporaryDirectory() as folder:
            model = model_of(name, folder)
            for each in checks_of(name):
                try:
                    count += each(model)
                except Exception as error:  # noqa: BLE001 - whatever it raises is what its row is about
                    different.append(f"{each.__name__}: {error}")
        return count, different

    for name in sorted(PIPELINES):
        oracle = f"refused: {REFUSED[name]}" if name in REFUSED else "the pipeline itself"
        oracle += f"; its score is refused: {UNSCORED[name]}" if name in UNSCORED else ""
        yield Row(f"`{name}`", oracle, functools.partial(check, name))
    for name, reason in sorted(UNBUILT.items()):
        yield Row(f"`{name}`", f"not built here: {reason}", lambda: (0, []))


TABLES: dict[str, Callable[[], Iterator[Row]]] = {
    "Tokenizers and chat templates": tokenizers,
    "Adapters": adapters,
    "Preference files": files,
    "Pipelines of diffusers": pipelines,
}

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

Of an adapter: on a tiny model, its score and its reference are those of plain peft and transformers before and after
training, its saved folder opens in both, and it comes back as it was; or it is refused by name when it is put on. Of a
known preference set: its rows, as JSON lines and Parquet, become the pairs that were written down by hand.

Of a pipeline of diffusers, tiny and with random weights: the images are those of its own call for each prompt; a score
is the error, by hand, of what the pipeline hands to its scheduler for that sample at that time, and so are the
gradients, which reach the denoiser alone; a trained one is saved as a pipeline of the same class with every part; an
observed image has the latents that the pipeline decodes to what its autoencoder makes of it. Or it is refused by name.
"""


def table(title: str) -> Iterator[str]:
    """One table of the page, line by line, with what is found now."""
    yield from ("| family | oracle | compared | equal |", "|---|---|---:|---|")
    for row in TABLES[title]():
        compared, different = row.check()
        verdict = ("equal" if compared else "not tried") if not different else f"**{len(different)} differ**"
        name = row.name.replace("|", r"\|")
        yield f"| {name} | {row.oracle} | {compared} | {verdict} |"


def lines() -> Iterator[str]:
    """The page, line by line."""
    yield from HEAD.splitlines()
    for title in TABLES:
        yield from ("", f"## {title}", "", *table(title))


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    PAGE.write_text("\n".join(lines()) + "\n", encoding="utf-8")
