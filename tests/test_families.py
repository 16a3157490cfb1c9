"""Observed completions, family by family, against TRL's preprocessing and transformers' forward."""

import importlib.util
import logging
import sys
from pathlib import Path

import pytest
from tokenizer_families import FAMILIES

ROOT = Path(__file__).parents[1]
pytest.importorskip("trl")


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR)


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_a_completion_has_the_tokens_that_trl_gives_it_and_the_score_of_a_plain_forward(name):
    from trl_rows import compared

    count, different = compared(name)
    assert count >= 24
    assert not different, "\n".join(different[:3])


def test_the_page_of_families_is_what_its_script_finds():
    spec = importlib.util.spec_from_file_location("pages_of_families", ROOT / "docs" / "families.py")
    page = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = page  # where dataclasses look for it
    spec.loader.exec_module(page)
    assert "\n".join(page.lines()) + "\n" == page.PAGE.read_text(encoding="utf-8")
