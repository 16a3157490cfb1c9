"""A causal language model of transformers as a component: text in, text out, exact log-probabilities."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor

from sysdag.components.adapter_support import needs_numbers
from sysdag.components.language import footprint
from sysdag.components.language.completer import Completer
from sysdag.components.language.constrained_model import ConstrainedModel
from sysdag.components.language.decoder import PromptInputs
from sysdag.components.language.engines.choice import LOCAL, Decoder, Server, chosen_decoder, kind_of
from sysdag.components.language.engines.continuous import sample_continuously
from sysdag.components.language.engines.server_decoder import ServerDecoder
from sysdag.components.language.prefix_scorer import PrefixScorer
from sysdag.components.language.pretrained import PretrainedLM
from sysdag.components.language.router_loss import RouterLoss
from sysdag.components.language.sampling import MAX_BATCH_TOKENS
from sysdag.errors import PlanError
from sysdag.traces.cells import Draw

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TEXT_OPTIONS: Mapping[str, tuple[type, ...]] = {
    "max_length": (int, type(None)), "pack_prefixes": (bool,), "tools": (list, type(None)),
    "chat_template_kwargs": (dict,), "grammar": (str, dict),
}  # fmt: skip


class CausalLM(ConstrainedModel):
    """Any transformers causal language model.

    The node's function returns the prompt: a string, tokenised as it stands but for control tokens that the function's
    arguments spell (see `sysdag.components.language.text_prompts`); or a list of chat messages, or a
    `ChatPrompt`, rendered by the tokenizer's chat template with a generation prompt. A last message of the assistant
    is continued. The value of a sampled completion is its text; the draw's record holds the `token_ids` that were
    sampled (the end-of-sequence token included) and whether it `finished` or was cut at `max_new_tokens`. An observed
    completion is a text, or messages with what else they hold (calls, reasoning, results of tools, several turns); its
    tokens are those that its prompt continues with (see `sysdag.components.language.completions`).

    Args:
        model: a name on the Hub, a folder, or a loaded model. An adapter of the peft library, which names its base, is
            loaded with it and trains; so does one that a loaded model's own `add_adapter` put on it.
        tokenizer: a name, folder or tokenizer; by default the model's.
        peft_config: puts a new adapter of the peft library on the model; only the adapter trains, and the reference is
            the model with the adapter switched off. Several components may put one each on the same loaded model;
            those of a system that name one model, with equal `model_kwargs`, load it once. A PeftModel is taken as it
            is: its active adapter trains.
        max_new_tokens: most tokens of a completion; by default 256, or half of `max_length` where that is less.
        max_length: most tokens of prompt and completion together; by default the model's number of positions, of those
            whose frequencies are fixed (see `sysdag.components.rotary`; 4096 for Phi-3). A prompt that leaves no room
            for `max_new_tokens` loses tokens at its start, or if it is a chat whole turns of its middle; an observed
            completion that does not fit loses tokens at its end; all are logged.
        temperature, top_p, top_k: of sampling; log-probabilities are always the model's own. top_k=None or 0 is all
            tokens; the nucleus is one of the top-k tokens, as in transformers.
        stop: texts that end a completion. A draw ends at the token that completes one of them and is `finished`; its
            `token_ids` hold all tokens up to that one, and scoring is over exactly those; its text ends before the
            first of the strings, as in vLLM and OpenAI's interface. The candidates of a search end there, too, and an
            observed text that holds one; an observed text without any has an end token.
        max_batch_tokens: most tokens of the sequences that are decoded side by side, each with its prompt and all that
            it may draw: the keys and values of so many tokens are held (see docs/memory.md). Rows that have ended leave
            and waiting ones enter. What is drawn depends on none of this.
        batch_size: most sequences decoded side by side, where that is to be fewer; None leaves it to the tokens.
        pack_prefixes: scores what several sequences of a call begin with once, where the model can (see
            `sysdag.components.language.prefix_scorer`). In training mode they then share that part's dropout, too.
        model_kwargs: passed to `from_pretrained` (`dtype`, `revision`, `attn_implementation`, `quantization_config`,
            `device_map`, `gguf_file`, ...). A dtype also has its short name (`"bf16"`). Without one, or with `"auto"`,
            a frozen model, or one with an adapter, is in its checkpoint's dtype, and weights that train are fp32. In
            bfloat16 they train by fp32 copies that the optimizer keeps. A saved system keeps what finds and loads the
            model; not `device_map` and the like, and never `trust_remote_code`.
        tools: JSON schemas, or functions with type hints and a docstring, that the chat template tells the model of.
        chat_template_kwargs: variables of the chat template, as `{"enable_thinking": False}`. The columns `tools` and
            `chat_template_kwargs` of a row, and what a node's function gives in a `ChatPrompt`, come before these.
        sanitize_control_tokens: what only spells a control token, in a message, in a value that flowed into a string
            prompt, or in an observed completion, is text; False lets it be one, and end a turn.
        grammar: what a completion may be: a regular expression, or a JSON schema (dict), whose value is then what the
            text says, for the next node, too. Draws, searches and scores are of the model under the grammar (see
            docs/language.md). Needs `pip install "sysdag[grammar]"`.
        decoder: what draws: `local`, sysdag's own; `continuous`, transformers' `generate_batch`; or a `Server` or its
            URL, which holds the same model. Scores and searches are always the model's here. Not part of a saved
            system, no more than a device is.

    Raises:
        PlanError: for options out of range, or a folder of something else than a causal language model.
    """

    not_taken: ClassVar[Mapping[str, str]] = {
        "processor": "its prompts are texts; ImageTextToText(processor=...) reads images",
        "max_source_length": "prompt and completion share max_length; Seq2Seq(max_source_length=...) is for "
        "encoder-decoders",
        "max_target_length": "prompt and completion share max_length; Seq2Seq(max_target_length=...) is for "
        "encoder-decoders",
        "generation_config": "give temperature, top_p, top_k, stop and max_new_tokens; what is drawn is scored as the "
        "model says, whose logits no processor changes",
    }
    saved_options = (*ConstrainedModel.saved_options, "pack_prefixes")
    saved_types: ClassVar[Mapping[str, tuple[type, ...]]] = {**ConstrainedModel.saved_types, **_TEXT_OPTIONS}

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PretrainedLM,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        *,
        peft_config: PeftConfig | None = None,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        stop: str | Sequence[str] | None = None,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
        batch_size: int | None = None,
        pack_prefixes: bool = True,
        model_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        sanitize_control_tokens: bool = True,
        grammar: str | Mapping[str, Any] | None = None,
        decoder: Decoder = LOCAL,
    ) -> None:
        if (max_new_tokens is not None and max_new_tokens < 1) or (
            max_length is not None and max_length <= (max_new_tokens or 1)
        ):
            raise PlanError(
                "CausalLM needs max_new_tokens >= 1 and max_length > max_new_tokens, got "
                f"max_new_tokens={max_new_tokens}, max_length={max_length}."
            )
        if tools is not None and not all(isinstance(tool, Mapping) or callable(tool) for tool in tools):
            raise PlanError("CausalLM: tools must be JSON schemas or functions.")
        if not isinstance(chat_template_kwargs or {}, Mapping):
            raise PlanError(f"CausalLM: chat_template_kwargs must be a dict, got {chat_template_kwargs!r}.")
        if not isinstance(model, PretrainedLM):
            model = self.pretrained(model, tokenizer, peft_config=peft_config, model_kwargs=model_kwargs)
        super().__init__(
            model, temperature=temperature, top_p=top_p, top_k=top_k, max_batch_tokens=max_batch_tokens,
            batch_size=batch_size, max_new_tokens=max_new_tokens, max_length=max_length, stop=stop, tools=tools,
            chat_template_kwargs=chat_template_kwargs, sanitize_control_tokens=sanitize_control_tokens,
            grammar=grammar,
        )  # fmt: skip
        self._router_loss: RouterLoss | None = None
        self.pack_prefixes = pack_prefixes
        self._decoder = chosen_decoder(decoder)  # which no score depends on
        self._check_decoder(self._decoder)
        self._server_decoder: ServerDecoder | None = None

    def _sampled(
        self, completer: Completer, prompts: Sequence[Sequence[int]], options: Mapping[str, Any]
    ) -> list[Draw]:
        if self.decoder == LOCAL:
            return super()._sampled(completer, prompts, options)
        if isinstance(self.decoder, Server):
            return self._at_server(self.decoder).sample(completer, prompts, **options)
        return sample_continuously(repr(self), completer, prompts, **options)

    def with_decoder(self, decoder: Decoder) -> Self:
        """This component, the model with it, with another `decoder`."""
        self._check_decoder(chosen_decoder(decoder))
        view = copy.copy(self)
        view._decoder, view._server_decoder = chosen_decoder(decoder), None
        return view

    def _check_decoder(self, decoder: Decoder) -> None:
        if self.grammar is not None and decoder != LOCAL:
            raise PlanError(
                f"{self!r}: with a grammar only decoder='local' draws; decoder={kind_of(decoder)!r} does not know it."
            )

    def _at_server(self, server: Server) -> ServerDecoder:
        if self._server_decoder is None or self._server_decoder.server != server:
            self._server_decoder = ServerDecoder(repr(self), server)
        return self._server_decoder

    @property
    def decoder(self) -> Decoder:
        """What draws; see `with_decoder`."""
        return self._decoder

    @property
    def draws_without_weights(self) -> bool:
        """Whether a server draws, and nothing is read here."""
        return isinstance(self.decoder, Server) and not self.decoder.needs_weights and not self.lm.has_adapter

    def _completer(self, stop: str | Sequence[str] | None = None) -> Completer:
        return replace(super()._completer(stop), inputs=self.prompt_inputs)

    @property
    def parts_objection(self) -> str:
        return "" if self.grammar is None else "it has a grammar, which is of whole completions"

    @property
    def prompt_inputs(self) -> PromptInputs | None:
        """What its prompts hold beside text."""
        return None

    def search(
        self, inputs: Sequence[Any], num_candidates: int, diversity_penalty: float, ngram_size: int = 1
    ) -> list[list[Draw]]:
        """See `LanguageModel`.

        Raises:
            PlanError: where another `decoder` than `local` is to draw, which cannot search.
        """
        if self.decoder != LOCAL:
            raise PlanError(
                f"{self!r}: decoder={kind_of(self.decoder)!r} draws, and cannot search. Use MonteCarlo candidates, or "
                "decoder='local'."
            )
        return super().search(inputs, num_candidates, diversity_penalty, ngram_size)

    def _scored(
        self,
        inputs: Sequence[Any],
        draws: Sequence[Draw],
        *,
        weights: tuple[Sequence[int], float] | None = None,
        typicality: bool = False,
    ) -> Float[Tensor, " n"]:
        sequences, masks = self._scored_sequences(inputs, draws)
        balances = not typicality and not self.lm.is_reference
        with self.lm.at_work() as model:
            scorer = self._scorer_of(model)
            found = scorer(
                sequences, self.lm.pad_token_id, masks, balances=balances, weights=weights, typicality=typicality,
                grammar=self.token_grammar,
            )  # fmt: skip
            if not typicality:
                self._router_loss = scorer.router_loss if balances else None
            return found

    def take_auxiliary_loss(self) -> tuple[float, Tensor] | None:
        found, self._router_loss = self._router_loss, None
        return None if found is None else found.take()

    def shares_prefixes(self, longest: int) -> bool:
        return self.pack_prefixes and footprint.shares_prefixes(self.lm.auto_class(), self.config, longest)

    def footprint(
        self, *, tokens: int, labels: int, trains: bool, checkpoints: bool, device: str, **others: Any
    ) -> footprint.Footprint | None:
        """See `sysdag.components.language.footprint`; reads the config, and the adapter's where one was saved.

        None under an adapter that cannot be run without numbers (LoHa, BOFT, FourierFT and some others).
        """
        if self.lm.adapter_config is not None and needs_numbers(self.lm.adapter_config):
            return None
        return footprint.of_language_model(
            self.lm.auto_class(), self.config, self.lm.dtype(trains), self.lm.adapter_config, tokens=tokens,
            labels=labels, trains=trains, checkpoints=checkpoints, device=device,
            constrained=self.grammar is not None, **others,
        )  # fmt: skip

    def decoding_bytes(self, *, rows: int, tokens: int, device: str) -> int:
        """See `Component`; of the rows that `max_batch_tokens` and `batch_size` let be decoded side by side."""
        rows = self._rows_at_once(rows, tokens)
        return footprint.of_decoding(
            self.lm.auto_class(), self.config, self.lm.dtype(False), rows=rows, longest=tokens, device=device
        )

    def _scorer_of(self, model: Any) -> PrefixScorer:
        if self._scorer is None or not self._scorer.fits(model):
            opening = () if self.prompt_inputs is None else self.prompt_inputs.opening
            self._scorer = PrefixScorer(model, pack_prefixes=self.pack_prefixes, opening=opening)
        return self._scorer

    def _logits_after(self, model: Any, prompt: Sequence[int], written: Sequence[int]) -> Tensor:
        ids = torch.tensor([[*prompt, *written]], device=self.device)
        return model(input_ids=ids).logits[0, -1]

    def _on(self, lm: PretrainedLM) -> Self:
        view = super()._on(lm)
        view._server_decoder = None
        return view
