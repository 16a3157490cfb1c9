"""How much of a prompt a pipeline's tokenizers cut off, learnt by watching what it gives them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sysdag.components.diffusion import watching


@dataclass(frozen=True, eq=False)
class PromptLimit:
    """What one tokenizer gets of a prompt, and where it cuts.

    Attributes:
        before, after: text around the prompt, of a template.
        longest: tokens that are kept.
    """

    tokenizer: Any
    before: str
    after: str
    adds_special_tokens: bool
    longest: int

    def lost(self, prompt: str) -> int:
        """Tokens of a prompt that are cut off."""
        encoded = self.tokenizer(
            self.before + prompt + self.after, add_special_tokens=self.adds_special_tokens, verbose=False
        )
        return max(0, len(encoded["input_ids"]) - self.longest)


def tokens_lost(limits: list[PromptLimit], prompt: str) -> int:
    """Tokens of a prompt that none of the tokenizers keeps; those that keep all are enough to keep it."""
    return min((limit.lost(prompt) for limit in limits), default=0)


@contextlib.contextmanager
def watched(pipe: Any, prompt: str) -> Iterator[list[PromptLimit]]:
    """Meanwhile the list fills with the tokenizers that get the prompt, and cut."""
    found: list[PromptLimit] = []
    with contextlib.ExitStack() as stack:
        for part in pipe.components.values():
            tokenizer = getattr(part, "tokenizer", part)
            if hasattr(tokenizer, "_encode_plus") and callable(tokenizer):
                made = functools.partial(_noting, found, tokenizer, prompt)
                stack.enter_context(watching.shadowed(tokenizer, "_encode_plus", made))
        yield found


def _noting(found: list[PromptLimit], tokenizer: Any, prompt: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def encode(text: Any = None, *args: Any, **kwargs: Any) -> Any:
        texts = [text] if isinstance(text, str) else text
        strategy = getattr(kwargs.get("truncation_strategy"), "value", None)
        longest = kwargs.get("max_length")
        if isinstance(texts, (list, tuple)) and strategy not in (None, "do_not_truncate") and longest is not None:
            for each in texts:
                if prompt and isinstance(each, str) and each.count(prompt) == 1:
                    before, _, after = each.partition(prompt)
                    adds = kwargs.get("add_special_tokens", True)
                    found.append(PromptLimit(tokenizer, before, after, adds, longest))
        return original(text, *args, **kwargs)

    return encode
