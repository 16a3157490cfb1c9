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
    found = []
    for completion in completions:
        total = 0.0
        for place, token in enumerate(completion):
            before = completion[:place]
            allowed = sorted({other[place] for other in completions if len(other) > place and other[:place] == before})
            logits = model(torch.tensor([[*prompt_ids, *before]])).logits[0, -1].float()[allowed] / temperature
            if top_k is not None and top_k < len(allowed):
                logits = torch.where(logits < logits.topk(top_k).values[-1], -torch.inf, logits)
            total = total + logits.log_softmax(-1)[allowed.index(token)]
        found.append(total)
    return torch.stack(found)
