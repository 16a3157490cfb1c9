"""What a node's function gives to a choice: a query, and the options that there are in this row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sysdag.components.input_reader import Argument, InputReader
from sysdag.errors import DataError, shown
from sysdag.files.encoding import encode_value


@dataclass(frozen=True)
class ChoicePrompt:
    """A query and the options that one is chosen of, or several.

    Attributes:
        query: what a scorer compares the options with: a text; for `OptionLikelihood` any prompt of its language model,
            for `FeatureScorer` a vector.
        options: what may be chosen, at least one. Those that are equal are told apart by their places.
        read_as: what the scorer reads of each option, where that is not the option itself: the description of a tool,
            the vector of a passage.
    """

    query: Any
    options: Sequence[Any]
    read_as: Sequence[Any] | None = None

    @property
    def texts(self) -> Sequence[Any]:
        """What the scorer reads of each option."""
        return self.options if self.read_as is None else self.read_as


def read_prompt(owner: str, value: Any, least: int, element: int | None = None) -> ChoicePrompt:
    """What a node's function returned: a `ChoicePrompt`, or a query and a list of options.

    Args:
        owner: what errors name.
        least: how many options there must be.
        element: that the value is, for an error.

    Raises:
        DataError: for something else, no options, too few of them, or as many readings as there are not options.
    """
    if isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[1], (tuple, list)):
        value = ChoicePrompt(*value)
    if not isinstance(value, ChoicePrompt) or not isinstance(value.options, (tuple, list)):
        raise DataError(
            f"{owner}: the node's function must return a query and the list of options, as (question, passages), or a "
            f"ChoicePrompt; got {shown(value)}.",
            element=element,
        )
    count = len(value.options)
    if not count:
        raise DataError(
            f"{owner}: the list of options is empty, so nothing can be chosen. Leave the row out, or give it an option "
            "that stands for none.",
            element=element,
        )
    if count < least:
        raise DataError(
            f"{owner}: there are {count} options, and k={least} of them are to be chosen. Give the row more options, "
            "or choose fewer.",
            element=element,
        )
    if value.read_as is not None and (not isinstance(value.read_as, (tuple, list)) or len(value.read_as) != count):
        got = len(value.read_as) if isinstance(value.read_as, (tuple, list)) else shown(value.read_as)
        raise DataError(
            f"{owner}: read_as must be a list with one value for each of the {count} options, got {got}.",
            element=element,
        )
    return value


def same_value(one: Any, other: Any) -> bool:
    """Whether two options are equal, whatever they are made of."""
    if one is other:
        return True
    if isinstance(one, str) or isinstance(other, str):
        return isinstance(one, str) and isinstance(other, str) and str(one) == str(other)
    try:
        return encode_value(one, "option") == encode_value(other, "option")
    except DataError:  # a type that cannot be written down
        return False


class ChoiceReader(InputReader):
    """Reads a choice's inputs; the query is for a language model to read as a prompt.

    Args:
        owner: whose inputs they are, for errors.
        reader: of the language model.
    """

    def __init__(self, owner: str, reader: InputReader) -> None:
        self.owner, self.reader = owner, reader
        self.row_options = reader.row_options

    def with_row_options(self, input: Any, options: Mapping[str, Any]) -> Any:
        prompt = read_prompt(self.owner, input, 1)
        return replace(prompt, query=self.reader.with_row_options(prompt.query, options))

    def tell_apart(self, input: Any, function: Callable[..., Any], arguments: Mapping[str, Argument]) -> Any:
        """See `InputReader`; the options are completions, which spell no control token that acts."""
        prompt = read_prompt(self.owner, input, 1)

        def query(**values: Any) -> Any:
            return read_prompt(self.owner, function(**values), 1).query

        return replace(prompt, query=self.reader.tell_apart(prompt.query, query, arguments))
