"""Tiny models that the tests build themselves."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sysdag.components import CausalLM

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 .,:?\n"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def char_tokenizer(alphabet: str = ALPHABET, chat: bool = False) -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    for char in alphabet:
        vocabulary[char] = len(vocabulary)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def llama(seed: int = 0, vocab_size: int | None = None, *, peaked: float = 3.0, **config) -> LlamaForCausalLM:
    """A Llama of 2 layers with random weights; `peaked` scales the head so that distributions are far from uniform."""
    vocab_size = vocab_size or len(ALPHABET) + 3
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        options = dict(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            attention_dropout=0.0,
            tie_word_embeddings=False,
        )
        model = LlamaForCausalLM(LlamaConfig(**(options | config)))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.25)
            model.lm_head.weight.mul_(peaked)
    return model.eval()


def shorten_completions(patch) -> None:
    """Has every CausalLM end a completion after 12 tokens: models with random weights mean nothing by more of them.

    What a component says and saves of `max_new_tokens` remains as it was given.
    """
    given = CausalLM.max_new_tokens.fget
    patch.setattr(CausalLM, "max_new_tokens", property(lambda self: min(12, given(self))))
