"""Control tokens in prompts that are texts: the function's own act, those that a value spells are text."""

import json
import logging
import pickle
import re
from dataclasses import dataclass

import pytest
from tiny import llama
from tokenizer_families import CHATML, FAMILIES, IM, THINK, THINKING, bytes_with, family, user
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from sysdag import DataError, Input, System, Trace, loop, node
from sysdag.components import CausalLM, Tabular
from sysdag.data import encode_pairs, validate_rows
from sysdag.engine.step import SystemModel
from sysdag.execution.execute import node_inputs
from sysdag.objectives.candidates import MonteCarlo
from sysdag.objectives.options import ObjectiveOptions

FAST = [each for each in FAMILIES if each.tokenizer.is_fast]
ATTACKS = ("say {}now", "{}", "two words{0}{0}\n", "it is {} 5.")


def language_model(tokenizer, **options):
    model = llama(vocab_size=len(tokenizer), max_position_embeddings=512, hidden_size=16, intermediate_size=16)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return CausalLM(model, tokenizer, **{"max_new_tokens": 8, **options})


def chatml(template=CHATML, specials=IM, **options):
    return language_model(bytes_with(template, specials, IM[2]), **options)


def inputs_of(lm, function, **values):
    """What the component gets of a function of inputs."""
    system = System(*(Input(name) >> node(lm, name="answer")(function) for name in values))
    return node_inputs(system.compile(), Trace({name: [value] for name, value in values.items()}, {}), "answer").values


def ids_of(lm, function, **values):
    [ids] = lm.prompt_ids(inputs_of(lm, function, **values))
    return ids


def pieces(lm, function, **values):
    return "|".join(lm.tokenizer.convert_ids_to_tokens(ids_of(lm, function, **values))).replace("Ġ", " ").replace("Ċ", "\n")


class Disarmed:
    """A tokenizer whose added tokens are spelled otherwise: what spells one of the first tokenizer's is any text."""

    def __init__(self, tokenizer):
        told = json.loads(tokenizer.backend_tokenizer.to_str())
        self.alias = {token["content"]: f"\ue000{token['id']}\ue001" for token in told["added_tokens"]}
        model = told["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self.alias.get(token, token): place for token, place in model["vocab"].items()}
        else:
            model["vocab"] = [[self.alias.get(token, token), score] for token, score in model["vocab"]]
        model["unk_token"] = self.alias.get(model.get("unk_token"), model.get("unk_token"))
        for token in told["added_tokens"]:
            token["content"] = self.alias[token["content"]]
        told["post_processor"] = None
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(told)))
        self.pattern = re.compile("|".join(map(re.escape, sorted(self.alias, key=len, reverse=True))))

    def armed(self, text):
        return self.pattern.sub(lambda found: self.alias[found.group()], text)

    def ids(self, text):
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def around(each):
    """What a prompt is made of by hand: the family's template around one user's text, or a question's form."""
    if not each.is_chat:
        return "Question: ", "\nAnswer:"
    rendered = each.tokenizer.apply_chat_template([user("@@")], add_generation_prompt=True, tokenize=False)
    return tuple(rendered.split("@@"))


@pytest.mark.parametrize("each", FAST, ids=[each.name for each in FAST])
def test_what_a_value_spells_is_text_and_what_the_function_writes_acts(each):
    """Against a tokenizer that knows the template's tokens by other spellings, and the value's by none."""
    lm, twin = language_model(each.tokenizer), Disarmed(each.tokenizer)
    before, after = around(each)
    tokens = [t.content for t in each.tokenizer.added_tokens_decoder.values()]
    special = [token for token in tokens if token not in (each.tokenizer.unk_token, each.tokenizer.pad_token)]
    bos = lm.prompt_ids(["say"])[0][: -len(twin.ids("say"))]
    for attack in ATTACKS:
        for token in special:
            value = attack.format(token)
            found = ids_of(lm, lambda question: f"{before}{question}{after}", question=value)
            expected = twin.ids(twin.armed(before) + value + twin.armed(after))
            if expected[: len(bos)] != bos:
                expected = [*bos, *expected]
            assert found == expected, (value, lm.tokenizer.convert_ids_to_tokens(found))
            acts = ids_of(
                language_model(each.tokenizer, sanitize_control_tokens=False),
                lambda question: f"{before}{question}{after}", question=value,
            )  # fmt: skip
            assert acts == lm.prompt_ids([f"{before}{value}{after}"])[0] != found
