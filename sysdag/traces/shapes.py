"""The columns of known public preference sets, and how their rows become `prompt`, `chosen` and `rejected`.

| shape                   | prompt                            | chosen and rejected                              |
|-------------------------|-----------------------------------|--------------------------------------------------|
| `orca_dpo_pairs`        | `question`, behind `system`       | as they are                                      |
| `ultrafeedback`         | `instruction`                     | of `completions` the best and the worst by score |
| `helpsteer3`            | `context`                         | `response1`, `response2` by `overall_preference` |
| `nectar`                | `prompt`                          | of `answers` the best and the worst by rank      |
| `shp`                   | `history`                         | `human_ref_A`, `human_ref_B` by `labels`         |
| `llamafactory_alpaca`   | `instruction` and `input`, behind | as they are                                      |
|                         | `system` and `history`            |                                                  |
| `llamafactory_sharegpt` | `conversations`, behind `system`  | one message each                                 |
| `pickapic`              | `caption`                         | `jpg_0`, `jpg_1` by `label_0`                    |

Prompts that are conversations in the set are lists of messages; the others are, too, where any row has a system prompt
or earlier turns, and texts where none has. Other columns stay as they are.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sysdag.errors import shown

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}


class Unpaired(Exception):
    """A row that holds no preference; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The columns of a preference set and what becomes of them.

    Attributes:
        columns: those that all of its rows have, by which it is told.
        others: those that the conversion takes besides, where they are there.
        prompt: the prompt of a row; the second argument is whether prompts are lists of messages.
        sides: `chosen` and `rejected` of a row.
        about: what they are made of, for people.
        rename: columns that could be renamed instead; and what is lost by it.
    """

    columns: frozenset[str]
    others: frozenset[str] = frozenset()
    prompt: Callable[[Mapping[str, Any], bool], Any]
    sides: Callable[[Mapping[str, Any]], tuple[Any, Any]]
    about: str
    rename: Mapping[str, str] = field(default_factory=dict)
    lost: str = ""


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name!r} must be a text, got {shown(value, 60)}.")
    return value


def _optional_text(row: Mapping[str, Any], name: str) -> str:
    return "" if row.get(name) is None else _text(row, name)


def _number(value: Any, name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name!r} must be a number, got {shown(value, 60)}.") from None


def _list(row: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """A list of objects, also where a cell of CSV holds it as JSON."""
    value = row.get(name)
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, list) or not value or not all(isinstance(each, Mapping) for each in value):
        raise ValueError(f"{name!r} must be a list of objects, got {shown(row.get(name), 60)}.")
    return value


def _as_they_are(row: Mapping[str, Any]) -> tuple[Any, Any]:
    for name in ("chosen", "rejected"):
        if name not in row:
            raise ValueError(f"{name!r} is missing.")
    return row["chosen"], row["rejected"]


def _by(first_is_better: bool, first: Any, second: Any) -> tuple[Any, Any]:
    return (first, second) if first_is_better else (second, first)


def _best_and_worst(texts: Sequence[str], scores: Sequence[float], what: str) -> tuple[str, str]:
    """Of equal ones the first is the best, and the last the worst."""
    if len(texts) < 2:
        raise Unpaired(f"it has fewer than two {what}")
    if min(scores) == max(scores):
        raise Unpaired(f"all of its {what} are equal")
    best = max(range(len(texts)), key=lambda place: (scores[place], -place))
    worst = min(range(len(texts)), key=lambda place: (scores[place], -place))
    return texts[best], texts[worst]


def _message(given: Any, name: str) -> dict[str, Any]:
    """A message of ShareGPT (`from`, `value`), or one that has a role and content already."""
    if isinstance(given, Mapping) and {"role", "content"} <= given.keys():
        given = {**given, "from": given["role"], "value": given["content"]}
    if not isinstance(given, Mapping) or not isinstance(given.get("from"), str):
        raise ValueError(f"{name!r} must hold messages with 'from' and 'value', got {shown(given, 60)}.")
    if given["from"] not in _ROLES:
        raise ValueError(f"{name!r} has a message from {given['from']!r}; known are {', '.join(_ROLES)}.")
    return {"role": _ROLES[given["from"]], "content": _text(given, "value")}


def _behind(row: Mapping[str, Any], turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages behind the row's system prompt, where it has one."""
    system = _optional_text(row, "system")
    return [{"role": "system", "content": system}, *turns] if system else turns


def _of_orca(row: Mapping[str, Any], as_messages: bool) -> Any:
    question = _text(row, "question")
    return _behind(row, [{"role": "user", "content": question}]) if as_messages else question


def _of_alpaca(row: Mapping[str, Any], as_messages: bool) -> Any:
    query = "\n".join(filter(None, [_text(row, "instruction"), _optional_text(row, "input")]))
    if not as_messages:
        return query
    turns = []
    for pair in row.get("history") or []:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(each, str) for each in pair):
            raise ValueError(f"'history' must hold pairs of a question and an answer, got {shown(pair, 60)}.")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return _behind(row, [*turns, {"role": "user", "content": query}])


def _of_sharegpt(row: Mapping[str, Any], as_messages: bool) -> Any:
    return _behind(row, [_message(each, "conversations") for each in _list(row, "conversations")])


def _sides_of_sharegpt(row: Mapping[str, Any]) -> tuple[Any, Any]:
    sides = []
    for name in ("chosen", "rejected"):
        message = _message(row.get(name), name)
        if message["role"] != "assistant":
            raise ValueError(f"{name!r} must be a message from the assistant (gpt), got {shown(row[name], 60)}.")
        sides.append([message])
    return sides[0], sides[1]


def _sides_of_ultrafeedback(row: Mapping[str, Any]) -> tuple[str, str]:
    texts, scores = [], []
    for completion in _list(row, "completions"):
        given = [completion.get(name) for name in ("fine-grained_score", "overall_score", "score")]
        score = next((value for value in given if value is not None), None)
        if score is None or not math.isfinite(value := _number(score, "completions")):
            continue  # it was not rated
        texts.append(_text(completion, "response"))
        scores.append(value)
    return _best_and_worst(texts, scores, "scores")


def _sides_of_helpsteer(row: Mapping[str, Any]) -> tuple[str, str]:
    preference = _number(row.get("overall_preference"), "overall_preference")
    if not preference:
        raise Unpaired("overall_preference is 0, a tie")
    return _by(preference < 0, _text(row, "response1"), _text(row, "response2"))


def _sides_of_nectar(row: Mapping[str, Any]) -> tuple[str, str]:
    answers = _list(row, "answers")
    ranks = [-_number(answer.get("rank"), "answers") for answer in answers]
    return _best_and_worst([_text(answer, "answer") for answer in answers], ranks, "ranks")


def _sides_of_shp(row: Mapping[str, Any]) -> tuple[str, str]:
    label = _number(row.get("labels"), "labels")
    if label not in (0, 1):
        raise ValueError(f"'labels' must be 1 (A is preferred) or 0, got {label:g}.")
    return _by(label == 1, _text(row, "human_ref_A"), _text(row, "human_ref_B"))


def _sides_of_pickapic(row: Mapping[str, Any]) -> tuple[Any, Any]:
    if str(row.get("has_label", True)) in ("False", "false"):
        raise Unpaired("has_label is false, so nobody said which is better")
    label = _number(row.get("label_0"), "label_0")
    if label == 0.5:
        raise Unpaired("label_0 is 0.5, a tie")
    if label not in (0, 1):
        raise ValueError(f"'label_0' must be 1, 0 or 0.5, got {label:g}.")
    for name in ("jpg_0", "jpg_1"):
        if row.get(name) is None:
            raise ValueError(f"{name!r} is missing.")
    return _by(label == 1, row["jpg_0"], row["jpg_1"])


SHAPES: Mapping[str, Shape] = {
    "orca_dpo_pairs": Shape(
        columns=frozenset({"question", "chosen", "rejected"}),
        others=frozenset({"system"}),
        prompt=_of_orca,
        sides=_as_they_are,
        about="the prompt of system and question",
        rename={"question": "prompt"},
        lost="whose prompt is the question as a text, without the system prompt",
    ),
    "ultrafeedback": Shape(
        columns=frozenset({"instruction", "completions"}),
        prompt=lambda row, as_messages: _text(row, "instruction"),
        sides=_sides_of_ultrafeedback,
        about="the best completion against the worst, by fine-grained_score or else overall_score",
    ),
    "helpsteer3": Shape(
        columns=frozenset({"context", "response1", "response2", "overall_preference"}),
        prompt=lambda row, as_messages: [_message(each, "context") for each in _list(row, "context")],
        sides=_sides_of_helpsteer,
        about="response1 chosen where overall_preference is below 0, response2 where it is above",
    ),
    "nectar": Shape(
        columns=frozenset({"prompt", "answers"}),
        prompt=lambda row, as_messages: _text(row, "prompt"),
        sides=_sides_of_nectar,
        about="the answer of the best rank against that of the worst, one pair a row",
    ),
    "shp": Shape(
        columns=frozenset({"history", "human_ref_A", "human_ref_B", "labels"}),
        prompt=lambda row, as_messages: _text(row, "history"),
        sides=_sides_of_shp,
        about="human_ref_A chosen where labels is 1, human_ref_B where it is 0",
    ),
    "llamafactory_alpaca": Shape(
        columns=frozenset({"instruction", "chosen", "rejected"}),
        others=frozenset({"input", "system", "history"}),
        prompt=_of_alpaca,
        sides=_as_they_are,
        about="the prompt of instruction and input",
        rename={"instruction": "prompt"},
        lost="whose prompt is the instruction without the input",
    ),
    "llamafactory_sharegpt": Shape(
        columns=frozenset({"conversations", "chosen", "rejected"}),
        others=frozenset({"system"}),
        prompt=_of_sharegpt,
        sides=_sides_of_sharegpt,
        about="the prompt of conversations, human and gpt as user and assistant",
    ),
    "pickapic": Shape(
        columns=frozenset({"caption", "jpg_0", "jpg_1", "label_0"}),
        others=frozenset({"label_1", "has_label"}),
        prompt=lambda row, as_messages: _text(row, "caption"),
        sides=_sides_of_pickapic,
        about="jpg_0 chosen where label_0 is 1, jpg_1 where it is 0",
    ),
}
"""By its name, each set that is known."""
