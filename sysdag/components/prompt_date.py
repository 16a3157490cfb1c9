"""The date that chat templates write into prompts: one for a whole process, and for all of a training.

Templates of Llama 3.2, Mistral Small 3, Granite, SmolLM3, gpt-oss and others ask for the time (`strftime_now`) whenever
they render, and put the day into the system's turn. A policy and its reference would so read two prompts around
midnight, and reference scores on file, or a training that goes on the next day, would be of other prompts than those
that are scored. Here the time is taken once, and a checkpoint keeps it.
"""

from __future__ import annotations

import functools
import json
import os
import re
from datetime import datetime

from sysdag.errors import PlanError

FUNCTION = "strftime_now"
VARIABLE = "SYSDAG_PROMPT_DATE"  # an ISO date, or date and time, that all prompts tell
_DIRECTIVES = "aAbBcdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZ"
_FORMAT = re.compile(rf"{FUNCTION}\(\s*(['\"])(.*?)\1")

_settled: datetime | None = None


def moment() -> datetime:
    """The time that prompts tell: what `SYSDAG_PROMPT_DATE` says, or when it was first asked for.

    Raises:
        PlanError: for a variable that is no ISO date.
    """
    global _settled
    if given := os.environ.get(VARIABLE):
        try:
            return datetime.fromisoformat(given)
        except ValueError as error:
            raise PlanError(f"{VARIABLE}={given!r} is no ISO date, as 2026-01-31 is.") from error
    if _settled is None:
        _settled = datetime.now()
    return _settled


def settle(when: datetime | str) -> None:
    """Has prompts tell another time from now on: that of a training which goes on, or of the first process.

    Args:
        when: also as ISO has it.
    """
    global _settled
    _settled = datetime.fromisoformat(when) if isinstance(when, str) else when


def dated(template: str) -> str:
    """The template with a function of its own in the place of transformers', which tells `moment`.

    A macro, as transformers makes a text of a function among a template's variables.
    """
    return _dated(template, moment())


@functools.lru_cache(maxsize=8)
def _dated(template: str, when: datetime) -> str:
    told = {f"%{sign}{letter}": when.strftime(f"%{sign}{letter}") for sign in ("", "-") for letter in _DIRECTIVES}
    steps = [("%%", "\0"), *((code, text) for code, text in told.items() if text != code), ("\0", "%")]
    replaced = "".join(f".replace({json.dumps(code)}, {json.dumps(text)})" for code, text in steps)
    macro = f"{{%- macro {FUNCTION}(format) %}}{{{{ format{replaced} }}}}{{%- endmacro %}}"
    return f"{macro}\n{template}"  # of the line behind it, a block takes the end


def told(template: object) -> list[str]:
    """What a chat template's prompts say of the time; nothing where it does not ask.

    Args:
        template: its source, or several by name.
    """
    source = "\n".join(map(str, template.values())) if isinstance(template, dict) else str(template or "")
    calls = source.count(f"{FUNCTION}(")
    if not calls:
        return []
    found = [moment().strftime(match[2]) for match in _FORMAT.finditer(source)]
    return found if len(found) == calls else [*found, moment().isoformat(timespec="seconds")]
