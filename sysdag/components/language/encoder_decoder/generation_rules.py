"""What a model's generation config says about what may be written: part of the distribution, drawn and scored alike.

A BART that summarises is told to begin with `<s>`, to end at the limit, not to say an n-gram twice; `generate` obeys.
The model as it is used is the one under these rules, so a draw keeps to them, and its likelihood is over what they
allow: the logits of the tokens that they forbid are minus infinity, and a token that they force has probability 1.

Settings that say how to search or truncate (`num_beams`, `length_penalty`, `temperature`, `top_k`, ...) are no rules:
the component has options of its own for these. Settings that change the probabilities of what may be written
(`repetition_penalty`, ...) are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sysdag.errors import DataError, PlanError

# Settings that are neither rules nor ways to search, with the values at which they do nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "sequence_bias": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1.0,),
    "watermarking_config": (),
    "stop_strings": (),
    "constraints": (),
    "force_words_ids": (),
    "forced_decoder_ids": (),
}
_RULES = (
    "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens",
    "bad_words_ids", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens",
)  # fmt: skip
KNOWN = (*_RULES, *_REFUSED)
"""The settings of a generation config that are looked at."""


@dataclass(frozen=True, kw_only=True)
class GenerationRules:
    """Which tokens may follow, as a generation config of transformers has it.

    The decoder's tokens begin with `start`, and everything counts it, as `generate` does.

    Attributes:
        start: the decoder's first token.
        ends: the tokens that end a target.
        max_new_tokens: where `forced_end` stands.
        forced_first: the only token that may be written first.
        forced_end: the only token that may be written at the limit; None where that cuts instead.
        suppressed: tokens that are never written.
        suppressed_first: tokens that are not written first, or second behind `forced_first`.
        bad_words: token sequences that are never completed.
        ngram: the size of the n-grams that are not said twice; 0 for none.
        source_ngram: the size of the n-grams of the source that are not said; 0 for none.
        min_length: fewest of the decoder's tokens before an end.
        min_setting: the setting that says so.
    """

    start: int
    ends: tuple[int, ...]
    max_new_tokens: int
    forced_first: int | None = None
    forced_end: int | None = None
    suppressed: frozenset[int] = frozenset()
    suppressed_first: frozenset[int] = frozenset()
    bad_words: tuple[tuple[int, ...], ...] = ()
    ngram: int = 0
    source_ngram: int = 0
    min_length: int = 0
    min_setting: str = "min_length"

    @classmethod
    def of(
        cls, settings: Mapping[str, Any], *, start: int, ends: Sequence[int], max_new_tokens: int, owner: str
    ) -> GenerationRules:
        """The rules of a generation config.

        Args:
            settings: its values by name; those of `KNOWN` are looked at.
            start, ends, max_new_tokens: see the class.
            owner: whose it is, for errors.

        Raises:
            PlanError: naming a setting that changes probabilities in another way.
        """
        for name, idle in _REFUSED.items():
            value = settings.get(name)
            if value is not None and value not in idle and value != []:
                instead = f"{name!r}: {idle[0] if idle else None}"
                also = " Texts that end a completion are Seq2Seq's own option: stop=[...]." * (name == "stop_strings")
                raise PlanError(
                    f"{owner}: its generation config sets {name}={value!r}, which changes what is drawn in a way that "
                    f"sysdag does not score. Switch it off: Seq2Seq(..., generation_config={{{instead}}}).{also}"
                )
        forced = settings.get("forced_eos_token_id")
        if isinstance(forced, (list, tuple)):
            if len(forced) > 1:
                raise PlanError(f"{owner}: its generation config forces one of {list(forced)} at the limit; name one.")
            forced = forced[0] if forced else None
        least = settings.get("min_new_tokens")
        closing = [[end] for end in ends]  # which no bad word may forbid
        return cls(
            start=start,
            ends=tuple(ends),
            max_new_tokens=max_new_tokens,
            forced_first=settings.get("forced_bos_token_id"),
            forced_end=forced,
            suppressed=frozenset(settings.get("suppress_tokens") or ()),
            suppressed_first=frozenset(settings.get("begin_suppress_tokens") or ()),
            bad_words=tuple(tuple(word) for word in settings.get("bad_words_ids") or () if word not in closing),
            ngram=settings.get("no_repeat_ngram_size") or 0,
            source_ngram=settings.get("encoder_no_repeat_ngram_size") or 0,
            min_length=least + 1 if least is not None else settings.get("min_length") or 0,
            min_setting="min_length" if least is None else "min_new_tokens",
        )  # fmt: skip

    @property
    def forbid_nothing(self) -> bool:
        """Whether every token may stand everywhere."""
        return not (
            self.forced_first is not None or self.forced_end is not None or self.suppressed or self.suppressed_first
            or self.bad_words or self.ngram or self.source_ngram or self.min_length > 1
        )  # fmt: skip

    def forced(self, written: int) -> int | None:
        """The only token that may follow so many new ones; None where nothing is forced."""
        if written == 0 and self.forced_first is not None:
            return self.forced_first
        return self.forced_end if written == self.max_new_tokens - 1 else None

    def of_source(self, source: Sequence[int]) -> Ngrams:
        """What a source keeps from being said."""
        return Ngrams(self.source_ngram, source)

    def forbidden(self, of_source: Ngrams, target: Sequence[int]) -> dict[int, str]:
        """The tokens that may not follow new ones, each with the setting that forbids it; see `along`."""
        return self._forbidden((self.start, *target), Ngrams(self.ngram, (self.start, *target)), of_source)

    def along(self, source: Sequence[int], target: Sequence[int]) -> Iterator[dict[int, str]]:
        """At each token of a target those that may not stand there; nothing is said of what is `forced`."""
        if self.forbid_nothing:
            yield from ({} for _ in target)
            return
        said, of_source = Ngrams(self.ngram, (self.start,)), self.of_source(source)
        ids = [self.start]
        for token in target:
            yield self._forbidden(ids, said, of_source)
            ids.append(token)
            said.add(token)

    def _forbidden(self, ids: Sequence[int], said: Ngrams, of_source: Ngrams) -> dict[int, str]:
        found = dict.fromkeys(self.suppressed, "suppress_tokens")
        if len(ids) == (1 if self.forced_first is None else 2):
            found |= dict.fromkeys(self.suppressed_first, "begin_suppress_tokens")
        if len(ids) < self.min_length:
            found |= dict.fromkeys(self.ends, self.min_setting)
        for word in self.bad_words:
            before = word[:-1]
            if not before or tuple(ids[-len(before) :]) == before:
                found[word[-1]] = "bad_words_ids"
        found |= dict.fromkeys(said.following(ids), "no_repeat_ngram_size")
        return found | dict.fromkeys(of_source.following(ids), "encoder_no_repeat_ngram_size")

    def check(self, source: Sequence[int], target: Sequence[int], owner: str, words: Callable[[int], str]) -> None:
        """Refuses a target that the rules forbid: its probability is 0.

        Args:
            words: what spells a token.

        Raises:
            DataError: naming the token, its place and the setting.
        """
        if self.forbid_nothing:
            return
        for place, (token, forbidden) in enumerate(zip(target, self.along(source, target), strict=True)):
            forced = self.forced(place)
            if forced is not None:
                setting = "forced_bos_token_id" if place == 0 else "forced_eos_token_id"
                way = "Leave the row out" if place == 0 else f"Raise max_new_tokens={self.max_new_tokens}"
                if token == forced:
                    continue
            elif token in forbidden:
                setting, way = forbidden[token], "Leave the row out"
            else:
                continue
            raise DataError(
                f"{owner}: the generation config's {setting} forbids token {place + 1} of a completion, "
                f"{words(token)!r} (id {token}), so the model never writes it. {way}, or switch the setting off: "
                f"Seq2Seq(..., generation_config={{{setting!r}: None}})."
            )


class Ngrams:
    """What a text has said behind each n-1 tokens; with n = 0 nothing."""

    def __init__(self, size: int, ids: Sequence[int]) -> None:
        self._size, self._last = size, list[int]()
        self._following: dict[tuple[int, ...], list[int]] = {}
        for token in ids if size else ():
            self.add(token)

    def add(self, token: int) -> None:
        if self._size:
            self._last.append(token)
            if len(self._last) == self._size:
                self._following.setdefault(tuple(self._last[:-1]), []).append(token)
                del self._last[0]

    def following(self, ids: Sequence[int]) -> list[int]:
        """What has followed the last tokens of `ids`."""
        before = self._size - 1
        return self._following.get(tuple(ids[len(ids) - before :]), []) if 0 <= before <= len(ids) else []
