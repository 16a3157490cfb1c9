"""A system of two language models and one without, for commands that choose what decodes."""

from tiny import char_tokenizer, llama

from sysdag import Input, System, node
from sysdag.components import CausalLM, Tabular

MODEL, TOKENIZER = llama(), char_tokenizer(chat=True)
question = Input("question")


@node(CausalLM(MODEL, TOKENIZER, max_new_tokens=4))
def draft(question):
    return f"q {question}"


@node(Tabular({"a": {"a": 0.5, "b": 0.5}}))
def choice(question):
    return "a"


@node(CausalLM(MODEL, TOKENIZER, max_new_tokens=4))
def answer(draft, choice):
    return f"{choice} {draft}"


system = System(question >> draft, question >> choice, (draft & choice) >> answer)
