"""Tiny models that think before they answer, and their completions scored by plain transformers."""

import torch
from tiny import ALPHABET, char_tokenizer, llama
from tokenizers import AddedToken

from sysdag import Input, System, split
from sysdag.components import CausalLM

OPEN, CLOSE = "<think>", "</think>"
HEADER = (
    "{% for m in messages %}{{ m.role + ': ' + m.content }}<eos>{% endfor %}{% if add_generation_prompt %}assistant: "
)
# As Qwen3's; as DeepSeek-R1's, which opens the thought and leaves earlier ones out; and with a switch that closes it.
TEMPLATES = {
    "plain": HEADER + "{% endif %}",
    "opened": HEADER.replace("m.content", "m.content.split('</think>')[-1]") + "<think>\n{% endif %}",
    "switched": HEADER
    + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
}


def thinking_tokenizer(template: str = "plain"):
    tokenizer = char_tokenizer(ALPHABET + "</>")
    tokenizer.add_tokens([AddedToken(OPEN, normalized=False), AddedToken(CLOSE, normalized=False)])
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


def thinking_model(seed: int = 0, *, template: str = "plain", eager: float = 3.0, **options) -> CausalLM:
    """A model that writes `</think>` often, by `eager` nats, and its own end seldom."""
    tokenizer = thinking_tokenizer(template)
    model = llama(seed, len(tokenizer), max_position_embeddings=256)
    head = torch.nn.Linear(model.config.hidden_size, len(tokenizer))
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()
        head.bias[tokenizer.convert_tokens_to_ids(CLOSE)] = eager
    model.lm_head = head
    return CausalLM(model, tokenizer, **options)


def thinking_system(model: CausalLM, *, chat: bool = True, **options):
    """question >> solve, which thinks and answers."""
    question = Input("question", str)

    @split(model, reasoning=CLOSE, answer=None, **options)
    def solve(question):
        return [{"role": "user", "content": question}] if chat else f"q: {question}\na: "

    return System(question >> solve)


def token_log_probs(model: CausalLM, prompt, completion, *, grad: bool = False):
    """log p of each token of a completion, by one plain forward of transformers."""
    with torch.set_grad_enabled(grad):
        logits = model.lm.module(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].double()
        table = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        return table.gather(1, torch.tensor(completion)[:, None])[:, 0]
