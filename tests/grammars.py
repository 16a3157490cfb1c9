"""What tests of grammars share: models with few tokens, and completions that write given texts, by enumeration."""

import torch
from tiny import char_tokenizer, llama

from sysdag.components import CausalLM

PIECES = ["a", "b", "c", "ab", "bc", "x"]
PROMPT = "xx"


def lm(grammar, seed=0, pieces=PIECES, **options):
    """A component whose tokens are pieces of text; some texts have several tokenisations."""
    options.setdefault("max_new_tokens", 6)
    return CausalLM(llama(seed, vocab_size=len(pieces) + 3), char_tokenizer(pieces), grammar=grammar, **options)


def tokenisations(text, pieces):
    """All ways to write a text with pieces, as token ids."""
    if not text:
        return [()]
    starts = [(3 + n, piece) for n, piece in enumerate(pieces) if text.startswith(piece)]
    return [(n, *rest) for n, piece in starts for rest in tokenisations(text[len(piece) :], pieces)]


def completions(texts, pieces, eos=1):
    return [(*ids, eos) for text in texts for ids in tokenisations(text, pieces)]


def by_enumeration(model, prompt_ids, completions, temperature=1.0, top_k=None):
    """Log-probabilities of completions: a softmax over those next tokens that some completion goes on with."""
    beginnings = {completion[:place] for completion in completions for place in range(len(completion))}
    next_tokens = {
        before: sorted({c[len(before)] for c in completions if len(c) > len(before) and c[: len(before)] == before})
        for before in beginnings
    }
    scores = {}
    for before, allowed in next_tokens.items():
        logits = model(torch.tensor([[*prompt_ids, *before]])).logits[0, -1].float()[allowed] / temperature
        if top_k is not None and top_k < len(allowed):
            logits = torch.where(logits < logits.topk(top_k).values[-1], -torch.inf, logits)
        scores[before] = dict(zip(allowed, logits.log_softmax(-1), strict=True))
    return torch.stack([sum(scores[c[:place]][token] for place, token in enumerate(c)) for c in completions])
