"""A judge by its name and options, as commands and files of options give them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sysdag.errors import JudgeError, OptionError
from sysdag.evaluation.judges import ColumnScore, Judge, function_judge

OF_ENDPOINTS = (
    "model", "api_key_env", "criteria", "template", "request", "concurrency", "timeout", "retries", "cache",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class JudgeChoice:
    """Which judge is meant.

    Attributes:
        by: `FILE.py:function` or `package.module:function`; the URL of an OpenAI-compatible endpoint; or the name of a
            column of the traces that holds scores.
        lower_is_better: of scores.
        model, api_key_env, criteria, template, request, concurrency, timeout, retries, cache: of an endpoint; see
            `sysdag judge --help`. `request` is a dict of options of each request.
        spelling: how messages write an option's name, as `--{}`.

    Raises:
        OptionError: for options that do not fit together, or a number out of range.
    """

    by: str
    lower_is_better: bool = False
    model: str | None = None
    api_key_env: str | None = None
    criteria: str | None = None
    template: Path | None = None
    request: Mapping[str, Any] | None = None
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 6
    cache: Path | None = None
    spelling: str = "{}"

    def __post_init__(self) -> None:
        if not self.is_endpoint:
            default = {option.name: option.default for option in fields(self)}
            for name in OF_ENDPOINTS:
                if getattr(self, name) != default[name]:
                    raise OptionError(f"{self._called(name)} belongs to an endpoint: {self._called('by')} http://...")
            return
        if self.lower_is_better:
            raise OptionError(f"{self._called('lower_is_better')} belongs to scores; an endpoint compares runs.")
        if not self.model:
            raise OptionError(
                f"{self._called('by')} with an endpoint needs {self._called('model')}, the model as the endpoint calls "
                "it."
            )
        if self.request is not None and self.request.keys() & {"model", "messages", "stream", "n"}:
            raise OptionError(
                f"{self._called('request')}: expected options of a request without model, messages, stream and n, got "
                f"{dict(self.request)!r:.200}."
            )
        for name, least in (("concurrency", 1), ("timeout", 0.1), ("retries", 0)):
            if getattr(self, name) < least:
                raise OptionError(f"{self._called(name)} must be {least} or more, got {getattr(self, name)}.")

    @property
    def is_endpoint(self) -> bool:
        return self.by.startswith(("http://", "https://"))

    @property
    def is_column(self) -> bool:
        """Whether scores are taken that the traces hold."""
        return not (self.is_endpoint or ":" in self.by or self.by.endswith(".py"))

    def judge(self, output: Path | None, others: Iterable[Path] = ()) -> Judge:
        """The judge itself.

        Args:
            output: what is written; an endpoint's answers are kept beside it.
            others: files that answers must not be appended to.

        Raises:
            SysdagError: for a judge that is not there.
        """
        if self.is_column:
            return ColumnScore(self.by, self.lower_is_better)
        if not self.is_endpoint:
            return function_judge(self.by, lower_is_better=self.lower_is_better)

        from sysdag.endpoints.api_key import api_key_of
        from sysdag.evaluation.endpoint import OPTIONS, Endpoint
        from sysdag.evaluation.endpoint_judge import EndpointJudge
        from sysdag.evaluation.judge_prompt import CRITERIA, TEMPLATE

        cache = self.cache or (output and output.with_name(f"{output.name}.answers.jsonl"))
        if cache and any(cache.resolve() == path.resolve() for path in (*others, *filter(None, (output,)))):
            raise OptionError(
                f"{self._called('cache')} {cache} is a file of something else; answers go to a file of their own."
            )
        assert self.model is not None
        endpoint = Endpoint(
            url=self.by, model=self.model, api_key=api_key_of(self.api_key_env, self.by),
            options={**OPTIONS, **(self.request or {})}, timeout=self.timeout, retries=self.retries,
            concurrency=self.concurrency, cache=cache,
        )  # fmt: skip
        return EndpointJudge(
            endpoint=endpoint,
            criteria=self.criteria or CRITERIA,
            template=TEMPLATE if self.template is None else self._read(self.template),
            where=f"{self._called('template')} {self.template}",
        )

    def _called(self, name: str) -> str:
        """An option as the user wrote it."""
        return self.spelling.format(name.replace("_", "-") if self.spelling.startswith("--") else name)

    def _read(self, template: Path) -> str:
        try:
            return template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise JudgeError(f"{self._called('template')} {template} cannot be read: {error}") from error
