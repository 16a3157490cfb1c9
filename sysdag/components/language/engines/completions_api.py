"""Completions as OpenAI-compatible servers take and return them, with token ids: vLLM, SGLang, and what does alike.

The fields are those of vLLM 0.32.0 (`vllm/entrypoints/openai/completion/protocol.py`) and SGLang 0.5.23
(`sglang/srt/entrypoints/openai/protocol.py`). All options of sampling are said in every request: what is left out, a
server takes from the generation config of its model's folder, as a repetition penalty or a min_p.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sysdag.components.language.engines.choice import Server
from sysdag.endpoints.http_client import HttpClient, Refused, Unreadable
from sysdag.errors import EndpointError, PlanError, shown

_HOW_TO_NAME = "Name the model as the server calls it: Server(url, model=...), or --model."
_HOW_TO_SEND_A_KEY = "Name the environment variable that holds its key: Server(api_key_env=...), or --api-key-env."
LOWEST_TEMPERATURE = 0.01  # vLLM samples at this one where a lower one is asked for


@dataclass(frozen=True)
class Served:
    """What is at a URL.

    Attributes:
        model: as a request names it.
        known: all names that the server tells.
        family: `vllm`, `sglang`, or "" for another.
    """

    model: str
    known: tuple[str, ...]
    family: str


@dataclass(frozen=True)
class Reply:
    """A completion as a server returned it.

    Attributes:
        token_ids: with the end token, where one was drawn.
        log_probs: one a token.
        text: of the tokens; whether what ended it is in it differs between servers.
        finish_reason: `stop` or `length`.
        prompt_ids: the prompt that the server read, where it tells.
    """

    token_ids: list[int]
    log_probs: list[float]
    text: str
    finish_reason: str
    prompt_ids: list[int] | None


def served_model(owner: str, server: Server, client: HttpClient) -> Served:
    """The model to ask for: the one that is named, or else the only one there is.

    Args:
        owner: whose model it is, for errors.

    Raises:
        EndpointError: where none is named and there is none, or several.
    """
    asked = client if server.model is None else replace(client, max_retries=min(1, client.max_retries))
    try:
        listed = asked.request(client.at("/models"), None, _read_models)
    except EndpointError as error:
        if server.model is None:
            if error.status is None:
                raise EndpointError(f"{owner}: {error}. Is it running there?") from None
            said = f"{owner}: {error}, so which model it serves is not known. Does the URL end as it should (/v1)?"
            raise EndpointError(f"{said} {_HOW_TO_NAME}{_key_advice(error.status)}", status=error.status) from None
        listed = []  # a list is not needed, and some servers have none
    owners = {str(each.get("owned_by")) for each in listed}
    family = next((name for name in ("vllm", "sglang") if name in owners), "")
    known = tuple(str(each["id"]) for each in listed)
    if server.model is not None:
        return Served(server.model, known, family)
    bases = [each for each in listed if not each.get("parent")]
    roots = {str(each.get("root") or each["id"]) for each in bases}
    if len(roots) != 1:
        raise EndpointError(
            f"{owner}: {server.url} serves {list(known[:20])}, so which model to ask for must be said. {_HOW_TO_NAME}"
        )
    return Served(str(bases[0]["id"]), known, family)


def _key_advice(status: int | None) -> str:
    return f" {_HOW_TO_SEND_A_KEY}" if status in (401, 403) else ""


def _read_models(raw: bytes) -> list[dict[str, Any]]:
    try:
        listed = json.loads(raw)["data"]
        return [each for each in listed if isinstance(each["id"], str)]
    except (ValueError, LookupError, TypeError) as error:
        raise Unreadable(f"what it sent is no list of models: {raw[:200]!r}") from error


def check_sampling(owner: str, served: Served, temperature: float, top_p: float, top_k: int | None) -> None:
    """Refuses options that a server would read otherwise than sysdag does.

    Raises:
        PlanError: naming them.
    """
    if temperature < LOWEST_TEMPERATURE:
        raise PlanError(
            f"{owner}: temperature {temperature} is below {LOWEST_TEMPERATURE}, where servers sample at another one, "
            "or not at all. Use decoder='local', or a higher one."
        )
    if served.family == "sglang" and top_k and top_p < 1:
        raise PlanError(
            f"{owner}: SGLang takes top_p={top_p} of all tokens and top_k={top_k} beside it; here and in vLLM the "
            "nucleus is one of the top-k tokens. Use one of the two, or another decoder."
        )


def request_body(
    served: Served,
    prompt: Sequence[int],
    *,
    adapter: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int | None,
    stop: Sequence[str],
    end_token_ids: Sequence[int],
    seed: int,
) -> dict[str, Any]:
    """A request for one completion of one prompt.

    Args:
        adapter: the name of one that the server has loaded, in place of the model's own weights.
        stop: texts that end a completion.
        end_token_ids: tokens that end one.
        seed: of this completion; servers draw from it in ways of their own.
    """
    body = {
        "model": served.model if adapter is None else adapter,
        "prompt": list(prompt),
        "max_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k or -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": seed,
        "stop": list(stop),
        "stop_token_ids": list(end_token_ids),
        "n": 1,
        "logprobs": 1,
        "return_token_ids": True,
        "skip_special_tokens": False,
    }
    if served.family == "sglang":
        selected = {} if adapter is None else {"model": served.model, "lora_path": adapter}
        return {**body, "no_stop_trim": True, **selected}
    return {**body, "spaces_between_special_tokens": False}


def complete(owner: str, client: HttpClient, body: Mapping[str, Any]) -> Reply:
    """One completion.

    Raises:
        Refused: for a request that the server refuses.
        EndpointError: if it does not answer, or without what is needed.
    """
    raw = client.request(client.at("/completions"), dict(body), _read_choice)
    return read_reply(owner, client, raw, body)


def _read_choice(raw: bytes) -> dict[str, Any]:
    try:
        [choice] = json.loads(raw)["choices"]
        if isinstance(choice["text"], str):
            return choice
    except (ValueError, LookupError, TypeError):
        pass
    raise Unreadable(f"what it sent is no completion: {raw.decode('utf-8', 'replace')[:200]!r}")


def read_reply(owner: str, client: HttpClient, choice: Mapping[str, Any], body: Mapping[str, Any]) -> Reply:
    """What a server returned for a request, as far as that can be told without the model.

    Raises:
        EndpointError: without token ids or log-probabilities, or with some for another prompt or other tokens.
    """
    where = f"{owner}: {client.url}, asked for {body['model']!r},"
    token_ids, found = choice.get("token_ids"), choice.get("logprobs")
    if not isinstance(token_ids, list) or not token_ids or not all(type(each) is int for each in token_ids):
        raise EndpointError(
            f"{where} returned no token ids, got {shown(token_ids)}. A server that decodes must take "
            "'return_token_ids' at /v1/completions, as vLLM 0.10.2, SGLang 0.5.23 and newer ones do. Another one "
            "serves as a judge (sysdag judge --by); decode here with decoder='local' or 'continuous'."
        )
    log_probs = found.get("token_logprobs") if isinstance(found, Mapping) else None
    if not isinstance(log_probs, list) or not all(isinstance(each, (int, float)) for each in log_probs):
        raise EndpointError(
            f"{where} returned no log-probabilities of its tokens, got {shown(log_probs)}, so it cannot be told "
            "whether it holds the same model. Start it so that it answers 'logprobs', or decode here with "
            "decoder='local'."
        )
    ended = choice.get("stop_reason", choice.get("matched_stop"))
    if len(log_probs) == len(token_ids) + 1 and ended in body["stop_token_ids"]:
        token_ids = [*token_ids, ended]  # trimmed off
    if len(log_probs) != len(token_ids):
        raise EndpointError(f"{where} returned {len(log_probs)} log-probabilities of {len(token_ids)} tokens.")
    prompt_ids = choice.get("prompt_token_ids")
    if prompt_ids is not None and prompt_ids != body["prompt"]:
        raise EndpointError(
            f"{where} read another prompt than it was sent: {len(prompt_ids)} tokens, expected {len(body['prompt'])}. "
            "Start it without an option that cuts or changes prompts."
        )
    return Reply(token_ids, log_probs, choice["text"], str(choice.get("finish_reason")), prompt_ids)


def refused_all(owner: str, client: HttpClient, served: Served, body: Mapping[str, Any], error: EndpointError) -> str:
    """What to say where a server refuses requests, or knows no such model."""
    said = str(error).rstrip(".")
    where = f"{owner}: {client.url}, asked for {body['model']!r},"
    if error.status in (401, 403):
        return f"{where} wants a key: {said}. {_HOW_TO_SEND_A_KEY}"
    if error.status == 404:
        known = f"It serves {list(served.known[:20])}. " if served.known else ""
        return f"{where} does not know it: {said}. {known}{_HOW_TO_NAME}"
    if isinstance(error, Refused):
        asked = f"a completion of {len(body['prompt'])} token ids by up to {body['max_tokens']} more"
        if any(word in said for word in ("length", "max_model_len", "max_tokens")):
            return f"{where} refused {asked}: {said}. Lower max_new_tokens or max_length, or start it with more room."
        if any(word in said for word in ("prompt", "token_ids", "logprobs")):
            said += (
                ". A server that decodes must take prompts as token ids, and 'return_token_ids' and 'logprobs', as "
                "vLLM 0.10.2, SGLang 0.5.23 and newer ones do. Another one serves as a judge (sysdag judge --by)"
            )
        return f"{where} refused {asked}: {said}. Or decode here: decoder='local' or 'continuous'."
    return f"{owner}: {said}."
