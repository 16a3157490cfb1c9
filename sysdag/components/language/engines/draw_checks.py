"""Whether completions that another engine returned are draws of the model that is here."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from sysdag.components.language.completer import Completer
from sysdag.components.language.engines.teacher_forcing import ReadTokens
from sysdag.errors import EndpointError, shown

_MOST_OUTSIDE = 0.03  # of the tokens: at the edge of truncation others round otherwise
_UNSAID = re.compile("[\\s\ufffd]+")  # white space at the border to the prompt, and halves of characters


def kept_length(
    completer: Completer, where: str, token_ids: Sequence[int], finish_reason: str, end_token_ids: Sequence[int]
) -> int:
    """How many of the tokens are the draw: up to its end token or stop string, or all that there was room for.

    Args:
        where: who returned them, for errors.
        finish_reason: `stop` or `length`, as it was told.
        end_token_ids: of the model here.

    Raises:
        EndpointError: for ids that the model has not got, or a completion that ends elsewhere than it would.
    """
    size = completer.lm.num_embeddings
    if strange := [each for each in token_ids if each < 0 or (size is not None and each >= size)]:
        raise EndpointError(
            f"{where} returned the token id {strange[0]}, and the model here has {size}: it holds another model. Serve "
            "the one that the node names."
        )
    ends = [place + 1 for place, each in enumerate(token_ids) if each in end_token_ids][:1]
    if completer.stops is not None and (stop := completer.stops.first_end(token_ids)) is not None:
        ends.append(stop)
    if ends:
        return min(ends)
    room = completer.max_new_tokens
    if len(token_ids) >= room:
        return room
    last = token_ids[-1]
    if finish_reason == "length":
        raise EndpointError(
            f"{where} cut a completion at {len(token_ids)} tokens, and max_new_tokens is {room}. Start it with room "
            "for more (--max-model-len), without a max_new_tokens in its generation config; or lower max_new_tokens "
            "or max_length."
        )
    raise EndpointError(
        f"{where} ended a completion (finish_reason {finish_reason!r}) at token {last} "
        f"{completer.lm.tokenizer.convert_ids_to_tokens(last)!r}, where the model here goes on: its end tokens are "
        f"{list(end_token_ids)}. Give both the same eos_token_id in their generation_config.json."
    )


def check_text(completer: Completer, where: str, prompt: Sequence[int], token_ids: Sequence[int], text: str) -> None:
    """Compares the text that came with tokens with what they spell here.

    White space and incomplete characters are not compared, nor is the token that ended the completion, which servers
    leave out or not.

    Raises:
        EndpointError: where they are another text: the vocabulary is another one.
    """
    tokenizer = completer.lm.tokenizer

    def spelled(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    before = len(spelled(prompt))
    found = _UNSAID.sub("", text)
    forms = [spelled(token_ids), spelled(token_ids[:-1]), spelled([*prompt, *token_ids])[before:]]
    forms += [part.partition(stop)[0] for part in forms[:1] for stop in completer.stop_texts]
    if found not in [_UNSAID.sub("", form) for form in forms]:
        raise EndpointError(
            f"{where} returned the text {shown(text)} for token ids that spell {shown(forms[0])} here: its vocabulary "
            "is another one. Serve the model, and the tokenizer, that the node names."
        )


def difference(
    returned: Sequence[Sequence[float]], read: Sequence[ReadTokens], kinds: Sequence[str]
) -> tuple[float, int]:
    """How far log-probabilities that came with draws are from those of the model here.

    Args:
        returned: of each draw that was read, one a token.
        read: the same tokens, read here.
        kinds: attributes of `ReadTokens`, of which the one that fits best counts.

    Returns:
        The mean absolute difference a token, in nats; and of how many tokens.
    """
    told = torch.tensor([each for row in returned for each in row], dtype=torch.float64)
    here = [torch.cat([getattr(each, kind) for each in read]).double() for kind in kinds]
    return min(float((told - each).abs().mean()) for each in here), len(told)


def check_log_probs(
    where: str, returned: Sequence[Sequence[float]], read: Sequence[ReadTokens], tolerance: float
) -> None:
    """Compares log-probabilities that a server returned with those of the model here.

    Some servers tell those of the model (vLLM), some at the temperature of sampling (SGLang), some after truncation;
    one of the three must fit.

    Args:
        returned, read: see `difference`.
        tolerance: nats.

    Raises:
        EndpointError: if they differ by more.
    """
    least, count = difference(returned, read, ("model", "tempered", "proposal"))
    if not least <= tolerance:
        raise EndpointError(
            f"{where} gives its tokens log-probabilities {least:.3f} nats from those of the model here, on the mean of "
            f"{count} tokens, and the tolerance is {tolerance:g}: it holds another model, other weights, or another "
            "adapter. Serve the one that the node names; for one that is quantised, or in a narrow dtype, "
            "Server(tolerance=...)."
        )
    outside = int(torch.cat([each.outside for each in read]).sum())
    if outside > max(2, _MOST_OUTSIDE * count):
        raise EndpointError(
            f"{where} drew {outside} of {count} tokens that top_p or top_k leave out here, so it does not apply them "
            "as it was told. Leave them off, or decode here with decoder='local'."
        )
