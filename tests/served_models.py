"""A tiny language model behind a stand-in for vLLM, and what tests change of the answers."""

import torch
from tiny import char_tokenizer, llama
from vllm_stand_in import VllmStandIn

from sysdag.components import CausalLM, Server

MODEL, TOKENIZER = llama(), char_tokenizer(chat=True)
PROMPTS = ["what is it", "ab", "a longer prompt than that"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def component(server, *, weights=MODEL, max_new_tokens=8, adapter=None, **options):
    own = {name: options.pop(name) for name in ("stop", "temperature", "top_p", "top_k") if name in options}
    decoder = Server(server if isinstance(server, str) else server.url, **options)
    return CausalLM(weights, TOKENIZER, max_new_tokens=max_new_tokens, decoder=decoder, peft_config=adapter, **own)


def stand_in(**options):
    return VllmStandIn({"base": MODEL}, TOKENIZER, **options)


def shifted(by):
    def change(reply, body):
        del body
        told = reply["choices"][0]["logprobs"]
        told["token_logprobs"] = [each + by for each in told["token_logprobs"]]
        return reply

    return change


def changed(**fields):
    def change(reply, body):
        del body
        reply["choices"][0] |= {name: v(reply["choices"][0]) if callable(v) else v for name, v in fields.items()}
        return reply

    return change
