"""Adapters of the peft library: each method and option is right by plain peft and transformers, or refused by name."""

import re

import pytest
from adapter_methods import METHODS, ROUNDING, compare, refusal
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

HELD = [method for method in METHODS if method.refused is None]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", HELD, ids=lambda method: method.name)
def test_an_adapter_is_what_plain_peft_makes_of_it(method, tmp_path):
    found = dict(compare(method, tmp_path))
    assert len(found) == 9
    assert {name: size for name, size in found.items() if not size <= ROUNDING} == {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", [m for m in METHODS if m.refused is not None], ids=lambda method: method.name)
def test_what_cannot_be_held_is_refused_by_name(method):
    said = refusal(method)
    assert said is not None
    assert re.search(method.refused, said)
    assert said.startswith("CausalLM('")


def test_every_type_of_the_library_is_in_the_table():
    known = {kind for kind in PeftType if kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert {method.make().peft_type for method in METHODS} == known
