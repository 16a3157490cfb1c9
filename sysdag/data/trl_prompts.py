"""TRL's implicit prompts: what `chosen` and `rejected` begin with alike, up to the last boundary of a turn or a word.

Messages are compared as a whole, as TRL's `extract_prompt` does. Of texts TRL takes all characters that both begin
with, which may end inside a word, or a token, that only one of them goes on with; here the prompt ends where a turn
does: in front of or behind a turn's header, or behind a token that ends one. Without turns, it ends with a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sysdag.graph.plan import Plan
from sysdag.traces.rows import changed

# Where the assistant begins to speak: the prompt ends behind these.
_HEADERS = re.compile(
    r"""\n\nAssistant: | <\|im_start\|>assistant\n | \[/INST\] | <start_of_turn>model\n
    | <\|start_header_id\|>assistant<\|end_header_id\|>\n\n | <\|assistant\|>\n? | <[|\uff5c]Assistant[|\uff5c]>
    | <\|START_OF_TURN_TOKEN\|><\|CHATBOT_TOKEN\|> | (?<!\S)ASSISTANT: | \#\#\#\ (?:Assistant|Response|Output):\n?""",
    re.VERBOSE,
)
# What ends a turn, with the line break that templates put behind it.
_ENDS = re.compile(
    r"""(?:<\|im_end\|> | <end_of_turn> | <\|eot_id\|> | <\|eom_id\|> | <\|end\|> | <\|endoftext\|> | </s>
    | <\|END_OF_TURN_TOKEN\|> | <\uff5cend\u2581of\u2581sentence\uff5c>)\n?""",
    re.VERBOSE,
)
_NEXT_TURN = re.compile(r"\n\nHuman:")  # the turn before it is over
_SPECIAL = re.compile(r"<[|\uff5c/]?[^<>\s]*$|\[/?[A-Z_]*$")  # a special token that has begun


@dataclass(frozen=True)
class Told:
    """A row with its prompt told apart.

    Attributes:
        row: the row, with the prompt under the input's name.
        identical: whether `chosen` and `rejected` are wholly the same, so that no prompt can be told.
        beginning: the side that is the beginning of the other one, or "".
    """

    row: Mapping[str, Any]
    identical: bool = False
    beginning: str = ""

    @property
    def has_no_prompt(self) -> bool:
        """Whether there is an implicit prompt, and nothing that it could be told by."""
        return self.identical or self.beginning != ""


def explicit_prompt(plan: Plan, row: Mapping[str, Any]) -> Told:
    """The row with its implicit prompt told apart.

    A row whose prompt is a text beside whole conversations has an implicit one too: the messages; or the text, if the
    input is declared as `str` and the text is all that they say. Rows of a system with several inputs or outputs, and
    rows that are not so, come back as they are.
    """
    names = [given.name for given in plan.system.inputs]
    chosen: Any = row.get("chosen")
    rejected: Any = row.get("rejected")
    if len(names) != 1 or len(plan.system.outputs) != 1 or type(chosen) is not type(rejected):
        return Told(row)
    conversational = _is_conversation(chosen) and _is_conversation(rejected)
    prompts = [row[name] for name in (names[0], "prompt") if name in row]
    if not (conversational or (isinstance(chosen, str) and not prompts)):
        return Told(row)
    if prompts and (_is_conversation(prompts[0]) or len(chosen) == len(rejected) == 1):
        return Told(row)
    if prompts and chosen[0].get("role") == "assistant":  # an answer of several messages, and no whole conversation
        return Told(row)
    shared = 0
    while shared < min(len(chosen), len(rejected)) and _are_equal(chosen[shared], rejected[shared]):
        shared += 1
    if shared and shared == len(chosen) == len(rejected):
        return Told(row, identical=True)
    if shared and shared in (len(chosen), len(rejected)):
        return Told(row, beginning="chosen" if shared == len(chosen) else "rejected")
    if not conversational:
        shared = _boundary(chosen, rejected, shared)
    if not shared:
        return Told(row)
    prompt = chosen[:shared]
    wants_text = plan.system.inputs[0].value_type is str
    if wants_text and prompts and shared == 1 and prompt[0]["role"] == "user":
        prompt = prompts[0] if prompt[0].get("content") == prompts[0] else prompt
    told = {**row, names[0]: prompt, "chosen": chosen[shared:], "rejected": rejected[shared:]}
    return Told(changed(row, told))


def _boundary(chosen: str, rejected: str, shared: int) -> int:
    """Where the prompt of two texts ends that are alike up to `shared`; 0 if there is no boundary.

    A space in front of the completion belongs to it, as in TRL.
    """
    last_turn = max(_turns(chosen, shared), default=0)
    if last_turn:
        return last_turn
    for is_boundary in (_is_between_words, _is_between_marks):
        for place in range(shared, 0, -1):
            if all(is_boundary(text, place) for text in (chosen, rejected)):
                return place - 1 if chosen[place - 1] == " " else place
    return 0


def _turns(text: str, shared: int) -> Iterator[int]:
    for pattern in (_HEADERS, _ENDS):
        yield from (found.end() for found in pattern.finditer(text, 0, shared))
    yield from (found.start() for found in _NEXT_TURN.finditer(text, 0, shared) if found.start() > 0)


def _is_between_words(text: str, place: int) -> bool:
    return (text[place].isspace() != text[place - 1].isspace()) and not _SPECIAL.search(
        text[max(0, place - 40) : place]
    )


def _is_between_marks(text: str, place: int) -> bool:
    """Whether one of two neighbours is no letter, digit or apostrophe."""
    return not (_is_of_word(text[place - 1]) and _is_of_word(text[place])) and not _SPECIAL.search(
        text[max(0, place - 40) : place]
    )


def _is_of_word(character: str) -> bool:
    return character.isalnum() or character in "_'\u2019-"


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in value)
    )


def _are_equal(first: Any, second: Any) -> bool:
    try:
        return bool(first == second)
    except ValueError:  # a message's content is an array, whose comparison has no truth value
        return False
