"""Observed completions, family by family, against TRL's preprocessing and transformers' forward."""

import logging

import families_page as families
import pytest
from tokenizer_families import FAMILIES

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
    """The other tables are held where what they tell is tested."""
    families.check_page("Tokenizers and chat templates")
    assert families.page.PAGE.read_text(encoding="utf-8").startswith(families.page.HEAD)
    assert families.titles() == list(families.page.TABLES)
