"""Completions that are written in parts (see `sysdag.graph.parts`), as token ids.

A part ends with the token that completes its marker, and the next goes on from the very ids that were drawn; nothing of
them is rendered or tokenised again. Texts that were observed are tokenised as the whole completion would be, behind the
prompt's own tokens, and not by the chat template: many leave out or rewrite what an assistant has thought. A marker
that is no token's end there is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from sysdag.components.language.completions import CompletionEncoder, shared_tokens
from sysdag.components.language.messages import ChatPrompt
from sysdag.components.language.prompts import Prompt
from sysdag.components.language.stop_strings import StopStrings
from sysdag.components.language.text_prompts import spelled_in
from sysdag.errors import DataError, PlanError, shown
from sysdag.graph.parts import Partition, PartPrompt, opening
from sysdag.traces.cells import Draw


class PartEncoder:
    """Reads and writes the parts of one component's completions.

    Args:
        owner: whose they are, for errors.
        completions: encodes whole ones, and knows what ends them.
        max_new_tokens: most tokens of a part that says nothing of it.
        max_length: most tokens of prompt and completion together; None where nothing limits it.
    """

    def __init__(
        self, owner: str, completions: CompletionEncoder, *, max_new_tokens: int, max_length: int | None
    ) -> None:
        self.owner, self.completions, self.prompts = owner, completions, completions.prompts
        self.max_new_tokens, self.max_length = max_new_tokens, max_length
        self.tokenizer = completions.tokenizer
        self._own_stops = StopStrings(completions.stop, self.tokenizer) if completions.stop else None

    def budget(self, part: PartPrompt) -> int:
        """Most tokens of a part."""
        return self._budgets(part.partition)[part.place]

    def _budgets(self, partition: Partition) -> list[int]:
        return [self.max_new_tokens if most is None else most for most in partition.max_new_tokens]

    def stops(self, part: PartPrompt) -> list[str]:
        """The texts that end a part, beside the model's own end."""
        return [*([] if part.marker is None else [part.marker]), *self.completions.stop]

    def prompt(self, part: PartPrompt) -> Prompt:
        """What the whole completion follows, with room for all of its parts.

        Raises:
            DataError: for a prompt that has ended the first part already.
            PlanError: where the parts leave no room.
        """
        budgets = self._budgets(part.partition)
        room = None if self.max_length is None else self.max_length - sum(budgets)
        if room is not None and room < 1:
            most = dict(zip(part.partition.names, budgets, strict=True))
            raise PlanError(f"{self.owner}: max_new_tokens={most} leaves no room in {self.max_length} positions.")
        [prompt] = self.prompts([part.prompt], room)
        written, marker = self._written_by(prompt), part.partition.markers[0]
        is_past = marker in written if isinstance(prompt.given, ChatPrompt) else written.rstrip().endswith(marker)
        if is_past:
            raise DataError(
                f"{self.owner}: its prompt ends with {shown(written[-60:])}, where {marker!r} is written already, so "
                f"that nothing would end {part.partition.names[0]!r}. Let the prompt leave it to the model (a chat "
                "template's enable_thinking=True), or use a @node for the answer alone."
            )
        return prompt

    def ids(self, part: PartPrompt) -> list[int]:
        """The tokens that a part follows: those of the prompt and of the parts before it."""
        found = list(self.prompt(part).ids)
        for place, draw in enumerate(part.before):
            found += self.behind(_at(part, place), draw).record["token_ids"]
        if part.before and self.max_length is not None and len(found) >= self.max_length:
            raise DataError(
                f"{self.owner}: the prompt and {list(part.earlier)} take all {self.max_length} positions, and leave "
                f"none for {part.partition.names[part.place]!r} (max_length)."
            )
        return found

    def is_over(self, part: PartPrompt) -> bool:
        """Whether the completion ended in a part before this one."""
        return any(not self._is_closed(_at(part, place), draw) for place, draw in enumerate(part.before))

    def _is_closed(self, part: PartPrompt, draw: Draw) -> bool:
        """Whether a part has ended with its marker, so that the next one follows."""
        assert part.marker is not None
        ids = draw.record.get("token_ids")
        if ids is None:
            return isinstance(draw.value, str) and draw.value.endswith(part.marker)
        ended = self._own_stops is not None and self._own_stops.ends(ids)
        return StopStrings([part.marker], self.tokenizer).ends(ids) and not ended

    def drawn(self, part: PartPrompt, draw: Draw) -> Draw:
        """A draw of `Completer` as one of a part: with its marker, or without the separator in front."""
        text = draw.value
        if part.place:
            text = part.partition.value(self._spilled(part) + text)
        if part.marker is not None and self._is_closed(part, draw):
            text += part.marker
        return Draw(text, {**draw.record, "part": part.place}, draw.log_prob)

    def parted(self, partition: Partition, draw: Draw) -> list[Draw] | None:
        """A draw of a whole completion, cut at its tokens; None where a marker is missing.

        Raises:
            DataError: for one whose tokens are not all scored, or not all behind its prompt.
        """
        ids, found = list(draw.record["token_ids"]), []
        for place, marker in enumerate(partition.markers):
            end = StopStrings([marker], self.tokenizer).first_end(ids)
            if end is None:
                return None
            text = str(self.tokenizer.decode(ids[:end], skip_special_tokens=True))
            value = text if text.endswith(marker) else text.partition(marker)[0] + marker
            found.append(Draw(partition.value(value) if place else value, _record(ids[:end], True, place)))
            ids = ids[end:]
        if draw.record.keys() - {"token_ids", "finished"} or not ids:
            raise DataError(
                f"{self.owner}: a draw with the record {sorted(draw.record)} cannot be cut into the parts "
                f"{list(partition.names)}; give its text."
            )
        finished = bool(draw.record.get("finished", ids[-1] in self.completions.ends))
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        return [*found, Draw(partition.value(text), _record(ids, finished, len(found)))]

    def _spilled(self, part: PartPrompt) -> str:
        """What the token that completes the marker before a part has written behind it."""
        before, draw = _at(part, part.place - 1), part.before[-1]
        if "token_ids" not in draw.record:
            return ""
        text = str(self.tokenizer.decode(list(draw.record["token_ids"]), skip_special_tokens=False))
        return text.partition(before.marker or "")[2]

    def unwritten(self, part: PartPrompt) -> Draw:
        """The draw of a part that the completion did not come to, as it has ended before; its log-probability is 0."""
        return Draw("", _record([], bool(part.before[-1].record.get("finished", True)), part.place), 0.0)

    def behind(self, part: PartPrompt, draw: Draw) -> Draw:
        """An observed part with its tokens; a draw that has some stays.

        Raises:
            DataError: for a value that cannot stand there.
        """
        if "token_ids" in draw.record:
            return draw
        value, name = draw.value, part.partition.names[part.place]
        if not isinstance(value, str):
            raise DataError(f"{self.owner}: the part {name!r} of a completion is a text, got {shown(value)}.")
        for marker in part.partition.markers[: part.place]:
            if marker in value:
                raise DataError(
                    f"{self.owner}: {name!r} holds {marker!r}, which ends a part before it: {shown(value)}. Give it "
                    "alone, or a whole completion alone, without its other parts beside it."
                )
        if self.is_over(part):
            if value:
                last = part.earlier[-1]
                raise DataError(
                    f"{self.owner}: {name!r} is {shown(value)}, but {last!r} does not end with "
                    f"{part.partition.markers[part.place - 1]!r}, so nothing follows it. Give {last!r} as the model "
                    f"writes it, its marker included: {shown(part.before[-1].value)}."
                )
            return self.unwritten(part)
        prompt = self.prompt(part)
        ids = self._tokens(part, prompt, self._checked(part, value))
        stops = StopStrings(self.stops(part), self.tokenizer) if self.stops(part) else None
        stop = None if stops is None else stops.first_end(ids)
        if stop is None and part.marker is not None and value.endswith(part.marker):
            raise DataError(
                f"{self.owner}: its tokenizer has no tokens that say {part.marker!r}: {name!r} comes back as "
                f"{shown(self.tokenizer.decode(ids)[-60:])}. Add the marker as a token, or choose another."
            )
        if stop is None:
            ids = [*ids, *self.completions.end_behind(prompt)]
        elif stop < len(ids) and part.marker is not None:
            raise DataError(f"{self.owner}: {name!r} goes on behind {part.marker!r} or a stop string: {shown(value)}.")
        else:
            ids = ids[:stop]
        if not ids:
            raise DataError(f"{self.owner}: {name!r} is empty, and its turn has no end token to score.")
        return Draw(value, _record(ids, stop is not None or ids[-1] in self.completions.ends, part.place))

    def _checked(self, part: PartPrompt, value: str) -> str:
        """The text of a value, without an end token that it spells."""
        text = value.removesuffix(self.completions.spelled_end(value))
        return part.partition.text(text) if part.place else text

    def _tokens(self, part: PartPrompt, prompt: Prompt, text: str) -> list[int]:
        """The tokens of a text behind a prompt and the parts before it."""
        if part.place and "token_ids" in part.before[-1].record:
            context = part.partition.markers[part.place - 1]
            return self._behind(context, text, part, [])
        texts = [self._checked(_at(part, place), draw.value) for place, draw in enumerate(part.before)] + [text]
        texts[0] = self._continuing(part, prompt, texts[0])
        given = prompt.given
        start, spelled = (given, list(spelled_in(given))) if isinstance(given, str) else (self._context(prompt), [])
        return self._behind(start + "".join(texts[:-1]), texts[-1], part, spelled, start=len(start))

    def _behind(
        self, context: str, text: str, part: PartPrompt, spelled: list[tuple[int, int]], start: int = 0
    ) -> list[int]:
        """The tokens that a text has behind another.

        Args:
            spelled: where the context only spells a control token up to `start`.
            start: where what a model writes begins there.

        Raises:
            DataError: where tokens of the context are others with the text behind it.
        """
        found = [span for span in self._only_spelled(context + text, start, part.partition) if span[0] >= start]
        inside = [*spelled, *(span for span in found if span[1] <= len(context))]
        before = self.prompts.text_ids(context, inside)
        whole = self.prompts.text_ids(context + text, [*spelled, *found])
        shared = shared_tokens(before, whole)
        if shared < len(before):
            end = context[-40:]
            raise DataError(
                f"{self.owner}: {shown(end)} ends inside a token where {shown(text[:40])} follows, so that the "
                f"completion cannot be cut there at a token's end (parts {list(part.partition.names)}). Let the prompt "
                "and the markers end at the end of a token, as markers do that are tokens themselves; or score draws."
            )
        return whole[shared:]

    def _only_spelled(self, text: str, start: int, partition: Partition) -> list[tuple[int, int]]:
        """Where a completion only spells a special token: markers are meant, and what opens the first part."""
        if not self.completions.template.sanitizes:
            return []
        special = self.completions.template.controls_of_texts().spellings.special
        meant = {*partition.markers, *self.completions.stop}
        found = [match for match in special.finditer(text, start) if match.group() not in meant]
        return [m.span() for m in found if (m.start(), m.group()) != (start, opening(partition.markers[0]))]

    def _context(self, prompt: Prompt) -> str:
        """What a chat's prompt has written of the assistant's turn, where the tokenizer makes the same tokens of it."""
        written = self._written_by(prompt)
        ids = self.prompts.text_ids(written) if written else []
        return written if ids and prompt.ids[-len(ids) :] == ids else ""

    def _written_by(self, prompt: Prompt) -> str:
        """The text that a prompt ends in: of a chat, what the template writes of the turn that is to come."""
        if isinstance(prompt.given, str):
            return str(prompt.given)
        return str(self.tokenizer.decode(self.completions.opened(prompt), skip_special_tokens=False))

    def _continuing(self, part: PartPrompt, prompt: Prompt, text: str) -> str:
        """The first part's text without the opening that its prompt has written."""
        tag = opening(part.partition.markers[0])
        written = self._written_by(prompt)
        if not tag or not written.rstrip().endswith(tag) or not text.startswith(tag):
            return text
        there = written[written.rindex(tag) :]
        if not text.startswith(there):
            raise DataError(
                f"{self.owner}: the prompt ends with {there!r}, and {part.partition.names[0]!r} begins otherwise: "
                f"{shown(text[:40])}. Give it as the model goes on, without {tag!r}."
            )
        return text[len(there) :]


def _record(token_ids: list[int], finished: bool, place: int) -> dict[str, Any]:
    """What a draw of a part keeps; its place tells it from a whole completion's."""
    return {"token_ids": token_ids, "finished": finished, "part": place}


def _at(part: PartPrompt, place: int) -> PartPrompt:
    """An earlier part of the same completion."""
    return PartPrompt(part.prompt, part.partition, place, part.before[:place])


@contextlib.contextmanager
def of_places(places: Sequence[int]) -> Iterator[None]:
    """Context in which a `DataError` is about one of these places, by its number among them."""
    try:
        yield
    except DataError as error:
        error.element = places[error.element or 0] if error.element is not None or len(places) == 1 else None
        raise


def positions_of(parts: Sequence[Any]) -> list[tuple[PartPrompt | None, list[int]]]:
    """Inputs by the part that they ask for: one input of each kind, and the places of all; None for whole ones."""
    found: dict[Any, tuple[PartPrompt | None, list[int]]] = {}
    for place, each in enumerate(parts):
        is_part = isinstance(each, PartPrompt)
        key = (each.partition, each.place) if is_part else None
        found.setdefault(key, (each if is_part else None, []))[1].append(place)
    return list(found.values())
