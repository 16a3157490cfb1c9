"""What transformers leaves out of a GGUF file, though a model's numbers or a text's tokens depend on it.

transformers (5.20 to 5.24) makes a config of some of a file's entries, and reads the tensors that such a model has a
place for; the others are left out, at most with a note of level info. So the frequencies of Llama 3.1 and later (the
tensor `rope_freqs.weight`), every `rope.scaling` (YaRN, linear, long contexts of Phi), rotary bases and widths of some
families, biases of a Llama's projections, and experts of a Mixtral are lost, and what has no tensor is drawn at random.
Here each entry is set beside what the config says, and each number beside a weight; entries that are not known here are
taken as ones that matter.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sysdag.components import rotary
from sysdag.errors import PlanError

logger = logging.getLogger(__name__)

_EPSILON = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
_SAME = {  # an entry, and what configs call it: the first of these that a config has
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads", "num_attention_heads"),
    "attention.layer_norm_epsilon": _EPSILON,
    "attention.layer_norm_rms_epsilon": _EPSILON,
    "attention.relative_buckets_count": ("relative_attention_num_buckets",),
    "attention.shared_kv_layers": ("num_kv_shared_layers",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "embedding_length_per_layer_input": ("hidden_size_per_layer_input",),
    "expert_used_count": ("num_experts_per_tok",),
}
_HEAD_LENGTHS = [f"attention.{of}_length{layers}" for of in ("key", "value") for layers in ("", "_swa")]
# Lengths that the tensors have, too, so that a model of other ones does not load, and what says nothing of numbers.
_TOLD_BY_TENSORS = {
    "block_count", "context_length", "decoder_block_count", "decoder_start_token_id", "embedding_length",
    "expert_count", "expert_feed_forward_length", "expert_shared_feed_forward_length", "feed_forward_length",
    "full_attention_interval", "nextn_predict_layers", "shortconv.l_cache", "ssm.conv_kernel", "ssm.group_count",
    "ssm.inner_size", "ssm.state_size", "ssm.time_step_rank", "tensor_data_layout", "use_parallel_residual",
    "vocab_size",
}  # fmt: skip
_OF_OTHER_FREQUENCIES = {  # tensors, and the schemes of transformers that have such factors
    "rope_freqs.weight": ("llama3", "proportional"),
    "rope_factors_long.weight": ("longrope",),
    "rope_factors_short.weight": ("longrope",),
}
_GATES = {1: "softmax", 2: "sigmoid"}
_LAYERS_WITH_SCALED_QUERIES = {"gemma2": 46, "gemma3": 62}  # the 27B models, as llama.cpp tells them

# `tokenizer.ggml.pre` of byte-pair vocabularies, where transformers splits all as GPT-2 does: right for the first, for
# the second after each digit is taken by itself.
_AS_GPT2 = {
    "a.x-4.0", "gigachat", "gpt-2", "granite-docling", "jais", "mellum", "mpt", "olmo", "phi-2", "roberta-bpe",
    "trillion",
}  # fmt: skip
_DIGITS_APART = {"codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder"}


@dataclass(frozen=True)
class GgufFile:
    """What a file says of its model, without the weights.

    Attributes:
        name: of the file.
        architecture: as llama.cpp calls it.
        entries: those of the architecture, by name without it.
        tensors: how many numbers each has.
        of_ones: the factors of rotary frequencies that change none.
        vocabulary: the kind of its tokenizer.
        splits: how that splits texts; None where the file does not say.
    """

    name: str
    architecture: str
    entries: Mapping[str, Any]
    tensors: Mapping[str, int]
    of_ones: frozenset[str]
    vocabulary: str | None
    splits: str | None

    @classmethod
    def read(cls, path: Path, owner: str) -> GgufFile:
        """Of a file.

        Args:
            owner: whose file it is, for the message.

        Raises:
            PlanError: without the package gguf.
        """
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise PlanError(f"{owner}: {path.name} is read by the package gguf: pip install gguf.") from error
        reader = GGUFReader(path)

        def entry(name: str) -> Any:
            return reader.fields[name].contents() if name in reader.fields else None

        architecture = str(entry("general.architecture"))
        prefix = f"{architecture}."
        factors = [tensor for tensor in reader.tensors if tensor.name in _OF_OTHER_FREQUENCIES]
        return cls(
            name=path.name,
            architecture=architecture,
            entries={name.removeprefix(prefix): entry(name) for name in reader.fields if name.startswith(prefix)},
            tensors={tensor.name: int(tensor.n_elements) for tensor in reader.tensors},
            of_ones=frozenset(tensor.name for tensor in factors if (tensor.data == 1).all()),
            vocabulary=entry("tokenizer.ggml.model"),
            splits=entry("tokenizer.ggml.pre"),
        )

    def check_config(self, config: Any, owner: str) -> None:
        """Refuses a config that leaves out what the file says.

        Args:
            config: that transformers made of the file.
            owner: whose file it is, for the message.

        Raises:
            PlanError: naming every entry and tensor that is lost, and what the config has for it.
        """
        lost = list(self._lost(config.get_text_config(decoder=True)))
        if lost:
            raise PlanError(self._refusal(owner, "; ".join(lost)))

    def _refusal(self, owner: str, lost: str) -> str:
        return (
            f"{owner}: transformers leaves out what {self.name} says, so that the model would compute other numbers "
            f"than the one it was made of: {lost}. Use the original model's folder; or read the file with its config, "
            f"AutoModelForCausalLM.from_pretrained(folder, gguf_file={self.name!r}, config=AutoConfig."
            "from_pretrained(ORIGINAL)), and give that model and its tokenizer."
        )

    def _lost(self, config: Any) -> Iterator[str]:
        turned, lengths = _Rotary(config), _head_lengths(config)

        def width(value: int) -> str | None:
            return None if value in turned.widths() else str(min(turned.widths()))

        def length(value: int) -> str | None:
            return None if value in lengths else str(max(lengths))

        checks: dict[str, Callable[[Any], str | None]] = {
            "rope.freq_base": lambda value: _unless(turned.base("full_attention"), value),
            "rope.freq_base_swa": lambda value: _unless(turned.base("sliding_attention"), value),
            **dict.fromkeys(("rope.dimension_count", "rope.dimension_count_swa"), width),
            "rope.dimension_sections": lambda value: _unless(turned.sections(), [each for each in value if each]),
            **dict.fromkeys(_HEAD_LENGTHS, length),
            "attention.sliding_window": lambda value: self._window(config, value),
            "expert_gating_func": lambda value: _unless(_held(config, "scoring_func"), _GATES.get(value)),
            "attention.sliding_window_pattern": lambda value: _unless(_pattern(config), value),
        }
        for name, value in self.entries.items():
            if name in _TOLD_BY_TENSORS or name.startswith("rope.scaling."):
                continue
            if name in _SAME:
                if value == 0:  # of a model without attention
                    continue
                there = next((found for own in _SAME[name] if (found := _held(config, own)) is not None), None)
                other = _unless(there, max(value) if isinstance(value, list) and name.endswith("_kv") else value)
            else:
                other = checks[name](value) if name in checks else "no place that is known"
            if other is not None:
                yield f"{self.architecture}.{name} = {value!r} (the config has {other})"
        if (scaling := self._scaling()) is not None and (other := turned.differs(*scaling)) is not None:
            kind, factor = scaling
            yield f"{self.architecture}.rope.scaling of type {kind!r} by {factor:g} (the config has {other})"
        for name, schemes in _OF_OTHER_FREQUENCIES.items():
            if name in self.tensors and turned.scheme() not in schemes and name not in self.of_ones:
                yield f"the tensor {name}, which scales rotary frequencies (the config has {turned.scheme()!r})"
        if (scalar := self._query_scalar()) is not None:
            other = _unless(_held(config, "query_pre_attn_scalar"), scalar)
            if other is not None:
                yield f"queries of {self.architecture} scaled by 1 / sqrt({scalar:g}) (the config has {other})"

    def _scaling(self) -> tuple[str, float] | None:
        """The scheme of the rotary frequencies and its factor; None where they are not scaled."""
        factor = float(self.entries.get("rope.scaling.factor") or 1.0)
        kind = self.entries.get("rope.scaling.type", "none" if factor == 1 else "linear")
        return None if kind in ("none", "longrope") or factor == 1 else (str(kind), factor)

    def _window(self, config: Any, value: int) -> str | None:
        own = _held(config, "sliding_window")
        is_wide = not value or value >= self.entries.get("context_length", 0)
        return None if own == value or (own is None and is_wide) else str(own)

    def _query_scalar(self) -> float | None:
        """By which llama.cpp scales the queries of Gemma, which no entry says."""
        layers = _LAYERS_WITH_SCALED_QUERIES.get(self.architecture)
        if layers is None:
            return None
        if self.entries.get("block_count") == layers:
            return self.entries["embedding_length"] // self.entries["attention.head_count"]
        return self.entries.get("attention.key_length")

    def check_weights(self, model: Any, owner: str) -> None:
        """Refuses a model that has not as many weights as the file has numbers for it.

        Raises:
            PlanError: with both numbers.
        """
        state = model.state_dict()
        if any(tensor.dtype == torch.uint8 for tensor in state.values()):  # kept as the file's own blocks
            return
        own = {tensor.data_ptr() or name: tensor.numel() for name, tensor in state.items()}  # ties once
        layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 0)
        outputs, inputs = model.get_output_embeddings(), model.get_input_embeddings()
        unread = {"output.weight"} if outputs is None or outputs.weight is inputs.weight else set()
        there = sum(
            count for name, count in self.tensors.items()
            if name not in unread and "rope_freqs" not in name and name not in _OF_OTHER_FREQUENCIES
            and not (name.startswith("blk.") and int(name.split(".")[1]) >= layers)
        )  # fmt: skip
        if there != (needed := sum(own.values())):
            raise PlanError(self._refusal(owner, f"its tensors have {there} numbers, and the model has {needed}"))

    def fit_tokenizer(self, tokenizer: Any, owner: str) -> None:
        """Has a byte-pair tokenizer split texts as the file says (`tokenizer.ggml.pre`), in place.

        Raises:
            PlanError: for a way of splitting that neither transformers nor this knows.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if self.vocabulary != "gpt2" or backend is None or self.splits in _AS_GPT2:
            return
        from tokenizers import pre_tokenizers

        as_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        found = backend.pre_tokenizer
        if not isinstance(found, pre_tokenizers.ByteLevel) or not found.use_regex:
            return  # one that transformers chose for the name
        if self.splits in _DIGITS_APART:
            digits = pre_tokenizers.Digits(individual_digits=True)
            backend.pre_tokenizer = pre_tokenizers.Sequence([digits, as_gpt2])
        elif self.splits in (None, "default"):
            logger.warning(
                "%s: %s does not say how its tokenizer splits texts (tokenizer.ggml.pre), so they are split as GPT-2's "
                "are. Give the original model's: tokenizer=ORIGINAL.", owner, self.name,
            )  # fmt: skip
        else:
            raise PlanError(
                f"{owner}: {self.name} says that texts are split in the way {self.splits!r} (tokenizer.ggml.pre), "
                "which transformers does not know: it would split them as GPT-2 does, into other tokens than the model "
                "was trained with. Give the original model's tokenizer: tokenizer=ORIGINAL."
            )


class _Rotary:
    """Rotary embeddings as a text config has them."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self._by_layer = rotary.by_layer(config)

    def _of(self, kind: str) -> Mapping[str, Any]:
        return self._by_layer.get(kind) or next(iter(self._by_layer.values()))

    def scheme(self) -> str:
        return str(self._of("full_attention").get("rope_type", "default"))

    def base(self, kind: str) -> Any:
        return self._of(kind).get("rope_theta", _held(self._config, "rope_theta"))

    def sections(self) -> Any:
        return self._of("full_attention").get("mrope_section")

    def widths(self) -> set[int]:
        """How many dimensions of a head are turned, by kind of layer; of frequencies of 0, all."""
        config = self._config
        if (width := _held(config, "rotary_dim")) is not None:
            return {int(width)}
        lengths = _head_lengths(config)
        found = {max(lengths)} if self.scheme() == "proportional" else set()
        for parameters in self._by_layer.values():
            share = parameters.get("partial_rotary_factor") or _held(config, "partial_rotary_factor") or 1.0
            if parameters.get("rope_type") != "proportional":
                found.add(int(min(lengths) * share))
        return found

    def differs(self, kind: str, factor: float) -> str | None:
        """What a scheme differs from; None where it is the config's."""
        own = self._of("full_attention")
        same = self.scheme() == kind and abs(float(own.get("factor", 1.0)) - factor) < 1e-6
        return None if same else repr(self.scheme())


def _unless(own: Any, value: Any) -> str | None:
    """What a config has, in words, where that is not the value."""
    if isinstance(own, (int, float)) and isinstance(value, (int, float)):
        return None if abs(own - value) <= 1e-5 * abs(value) else f"{own:g}"
    return None if own == value else repr(own)


def _held(config: Any, name: str) -> Any:
    """What a config holds; also where layers differ, of which transformers then tells by layer alone."""
    held = vars(config)
    return held[name] if name in held else getattr(config, name, None)


def _head_lengths(config: Any) -> set[int]:
    """Of a head's keys, by kind of layer."""
    of_layers = {_held(each, "head_dim") for each in getattr(config, "per_layer_config", ())}
    found = {each for each in (*of_layers, _held(config, "head_dim"), _held(config, "d_kv")) if each}
    return found or {config.hidden_size // (_held(config, "num_attention_heads") or 1)}


def _pattern(config: Any) -> list[bool] | None:
    kinds = _held(config, "layer_types")
    return None if kinds is None else [kind == "sliding_attention" for kind in kinds]
