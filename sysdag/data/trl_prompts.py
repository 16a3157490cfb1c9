"""TRL's implicit prompts: what `chosen` and `rejected` begin with alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sysdag.graph.plan import Plan


def explicit_prompt(plan: Plan, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with its implicit prompt told apart: what `chosen` and `rejected` begin with alike, as in TRL.

    A row whose prompt is a text beside whole conversations has an implicit one too: the messages; or the text, if the
    input is declared as `str` and the text is all that they say. Rows of a system with several inputs or outputs, and
    rows that are not so, come back as they are.
    """
    names = [given.name for given in plan.system.inputs]
    chosen: Any = row.get("chosen")
    rejected: Any = row.get("rejected")
    if len(names) != 1 or len(plan.system.outputs) != 1 or type(chosen) is not type(rejected):
        return row
    conversational = _is_conversation(chosen) and _is_conversation(rejected)
    prompts = [row[name] for name in (names[0], "prompt") if name in row]
    if not (conversational or (isinstance(chosen, str) and not prompts)):
        return row
    if prompts and (_is_conversation(prompts[0]) or len(chosen) == len(rejected) == 1):
        return row
    shared = 0
    while shared < min(len(chosen), len(rejected)) and _are_equal(chosen[shared], rejected[shared]):
        shared += 1
    if not conversational and shared > 0 and chosen[shared - 1] == " ":
        shared -= 1  # the space belongs to the completion
    if not shared or shared in (len(chosen), len(rejected)):
        return row
    prompt = chosen[:shared]
    wants_text = plan.system.inputs[0].value_type is str
    if wants_text and prompts and shared == 1 and prompt[0]["role"] == "user" and prompt[0]["content"] == prompts[0]:
        prompt = prompts[0]
    return {**row, names[0]: prompt, "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in value)
    )


def _are_equal(first: Any, second: Any) -> bool:
    try:
        return bool(first == second)
    except ValueError:  # a message's content is an array, whose comparison has no truth value
        return False
