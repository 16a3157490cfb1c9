"""Tokenizers of text encoders, in their own classes, whose vocabulary is the words of one sentence."""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Sequence
from typing import Any

import transformers
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizer_families import CHATML, IM, LLAMA_3, THINK, THINKING
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

WORDS = "a dark light red square circle cube in on over the white room, two black words and an old friend of mine"
TEMPLATES = """system Describe the image by detailing the color, shape, size, texture, quantity, text, spatial
relationships of the objects and background: user assistant You are an assistant designed to generate superior images
with the superior degree of image-text alignment based on textual prompts or user prompts. Prompt Start"""
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
# Messages whose content is a text or a list of parts, as processors of vision-language models take them.
PARTS = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content is string %}
{{- m.content }}{% else %}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}
{%- elif part.type == 'image' %}
{{- '<|vision_start|><|image_pad|><|vision_end|>' }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

MISTRAL_PARTS = """<s>{% for m in messages %}{{ '[SYSTEM_PROMPT]' if m.role == 'system' else '[INST]' }}
{%- for part in m.content %}{{ part.text }}{% endfor %}
{{- '[/SYSTEM_PROMPT]' if m.role == 'system' else '[/INST]' }}{% endfor %}"""


def _words(kind: str) -> list[list[str]]:
    """The words of all texts as the tokenizers of a kind split them, each in its first pieces: bytes or letters.

    Args:
        kind: "bytes", "clip" (a word's last piece ends in `</w>`) or "marks" (words begin with "▁").
    """
    text = " ".join((WORDS, TEMPLATES, DEFAULT_PROMPT_TEMPLATE["template"]))
    if kind == "marks":
        return [list(f"▁{word}") for word in text.split()]
    if kind == "bytes":
        split = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return [list(word) for word, _ in split.pre_tokenize_str(text)]
    split = pre_tokenizers.Whitespace()
    return [[*word[:-1], f"{word[-1]}</w>"] for word, _ in split.pre_tokenize_str(text.lower())]


@functools.cache
def _merges(kind: str) -> list[tuple[str, str]]:
    """Merges of a BPE in which each of the words is one token, the same in every process (a trainer's ties are not)."""
    ranks: dict[tuple[str, str], int] = {}
    for pieces in _words(kind):
        while len(pieces) > 1:
            pairs = list(itertools.pairwise(pieces))
            best = min((pair for pair in pairs if pair in ranks), key=lambda pair: ranks[pair], default=pairs[0])
            ranks.setdefault(best, len(ranks))
            place = pairs.index(best)
            pieces[place : place + 2] = ["".join(best)]
    return list(ranks)


def _vocabulary(kind: str, first: Sequence[str] = (), last: Sequence[str] = ()) -> dict[str, int]:
    letters = {piece for pieces in _words(kind) for piece in pieces}
    if kind != "marks":
        letters |= {*BYTES, *(f"{byte}</w>" for byte in BYTES if kind == "clip")}
    merged = ["".join(pair) for pair in _merges(kind)]
    tokens = dict.fromkeys((*first, *sorted(letters), *merged, *last))
    return {token: place for place, token in enumerate(tokens)}


def clip(length: int = 16, **options: Any) -> Any:
    """As SD has it: the special tokens are the last two; as SDXL's second, with `pad_token="!"`."""
    words = _vocabulary("clip", last=("<|startoftext|>", "<|endoftext|>"))
    return transformers.CLIPTokenizer(vocab=words, merges=_merges("clip"), model_max_length=length, **options)


def _scored(first: Sequence[str]) -> list[tuple[str, float]]:
    """A table of pieces, of which the longer wins."""
    return [*((token, 0.0) for token in first), *((word, -1.0 / len(word)) for word in _vocabulary("marks"))]


def t5(length: int = 16) -> Any:
    table = _scored(("<pad>", "</s>", "<unk>"))
    return transformers.T5Tokenizer(vocab=table, extra_ids=0, model_max_length=length)


def xlm_roberta(length: int = 16) -> Any:
    table = _scored(("<s>", "<pad>", "</s>", "<unk>", "<mask>"))
    return transformers.XLMRobertaTokenizer(vocab=table, model_max_length=length)


def _byte_fallback(first: Sequence[str]) -> dict[str, int]:
    return _vocabulary("marks", first=[*first, *(f"<0x{value:02X}>" for value in range(256))])


def gemma(length: int = 64, template: str | None = None, **options: Any) -> Any:
    first = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")
    made = transformers.GemmaTokenizer(
        vocab=_byte_fallback(first), merges=_merges("marks"), add_bos_token=True, model_max_length=length, **options
    )
    made.chat_template = template
    return made


def llama(length: int = 64, pad: str = "</s>", **options: Any) -> Any:
    """SentencePiece with a beginning token, as Llama 2 and Pile-T5 have it."""
    vocabulary = _byte_fallback(("<unk>", "<s>", "</s>"))
    merges = _merges("marks")
    options = {"add_bos_token": True, "pad_token": pad, "model_max_length": length} | options
    return transformers.LlamaTokenizer(vocab=vocabulary, merges=merges, **options)


def qwen2(length: int = 256, template: str | None = CHATML, extra: Sequence[str] = (*THINK, *VISION)) -> Any:
    """Qwen2, Qwen2.5-VL and Qwen3: ChatML over byte-level BPE, padded with `<|endoftext|>`."""
    vocabulary = _vocabulary("bytes", last=tuple(dict.fromkeys((*IM, *extra))))
    made = transformers.Qwen2Tokenizer(
        vocab=vocabulary, merges=_merges("bytes"), eos_token="<|im_end|>", pad_token="<|endoftext|>",
        model_max_length=length, extra_special_tokens=list(dict.fromkeys((*IM, *extra))),
    )  # fmt: skip
    made.chat_template = template
    return made


def qwen3(length: int = 256) -> Any:
    return qwen2(length, THINKING)


def fast(
    specials: Sequence[str], length: int = 64, template: str | None = None, prefix: str = "", **options: Any
) -> Any:
    """A byte-level tokenizer of no class of its own (Llama 3, GLM, Mistral), `prefix` in front of every text."""
    core = Tokenizer(models.BPE(vocab=_vocabulary("bytes", last=specials), merges=_merges("bytes")))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if prefix:
        ids = [(token, core.token_to_id(token)) for token in specials if token in prefix]
        core.post_processor = processors.TemplateProcessing(single=f"{prefix} $A", special_tokens=ids)
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=length, extra_special_tokens=list(specials), **options
    )
    made.chat_template = template
    return made


def llama_3(length: int = 64) -> Any:
    specials = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    named = {"bos_token": specials[0], "eos_token": specials[4], "pad_token": specials[4]}
    return fast(specials, length, LLAMA_3, specials[0], **named)


def glm(length: int = 64) -> Any:
    specials = ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>")
    named = {"eos_token": specials[0], "pad_token": specials[0], "padding_side": "left"}
    return fast(specials, length, prefix="[gMASK] <sop>", **named)


def mistral(length: int = 64) -> Any:
    """Mistral 3 without its processor; messages hold a list of texts."""
    specials = ("<unk>", "<s>", "</s>", "<pad>", "[INST]", "[IMG]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
    named = {"bos_token": specials[1], "eos_token": specials[2], "pad_token": specials[3], "padding_side": "left"}
    return fast(specials, length, MISTRAL_PARTS, **named)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """For tokenizers that read their file anew when they are saved; lives as long as the process."""
    return tempfile.TemporaryDirectory()


def chatglm(length: int = 32) -> Any:
    """Kolors' tokenizer, on a SentencePiece model that is trained here."""
    import sentencepiece
    from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer

    prefix = f"{_folder().name}/tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS, *TEMPLATES.split("\n")]), model_prefix=prefix, vocab_size=120,
        model_type="bpe", minloglevel=2,
    )  # fmt: skip
    return ChatGLMTokenizer(vocab_file=f"{prefix}.model", model_max_length=length)


def bert(length: int = 16) -> Any:
    words = WORDS.replace(",", " ,").split()
    letters = sorted(set("".join(words)))
    specials = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    tokens = dict.fromkeys((*specials, *words, *letters, *(f"##{letter}" for letter in letters)))
    vocabulary = {token: place for place, token in enumerate(tokens)}
    return transformers.BertTokenizer(vocab=vocabulary, model_max_length=length)
