"""Families of tokenizers and chat templates, each trained or written here: small, and in the shape of a known one."""

# ruff: noqa: E501, RUF001 - templates in as few lines as they read well in; a family whose tokens hold a full-width bar

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

TEXTS = [
    "say hi there to the old friend of mine and then be quiet for a while",
    "two words are not many but they can be enough, said the judge, because there were no others",
    "question: what is the sum of 2 and 3? answer: it is 5, and 12 + 30 is 42.",
    "USER: hello ASSISTANT: hello\nuser\nassistant\nsystem\nmodel\ntool\n",
] * 4
BYTES = [f"<0x{value:02X}>" for value in range(256)]


def _fast(tokenizer: Tokenizer, template: str | None = None, extra: Sequence[str] = (), **tokens: str) -> Any:
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)
    made.add_special_tokens({"additional_special_tokens": list(extra)})
    made.chat_template = template
    return made


def _in_front(tokenizer: Tokenizer, bos: str, eos: str | None = None) -> None:
    ids = [(token, tokenizer.token_to_id(token)) for token in (bos, eos) if token]
    single = f"{bos} $A {eos}" if eos else f"{bos} $A"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)


def byte_level(specials: Sequence[str], bos: str | None = None) -> Tokenizer:
    """Byte-level BPE, as GPT-2, Qwen and Llama 3 have it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=list(specials), initial_alphabet=alphabet)
    )
    if bos:
        _in_front(made, bos)
    return made


def sentencepiece(how: str, specials: Sequence[str] = ("<unk>", "<s>", "</s>"), *, unigram: bool = False) -> Tokenizer:
    """SentencePiece in one of its three forms: a normaliser that prepends, or a Metaspace that does (always, first)."""
    made = Tokenizer(models.Unigram() if unigram else models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    if how == "prepend":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence(decoder)
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=how, split=unigram)
        made.decoder = (
            decoders.Metaspace(replacement="▁", prepend_scheme=how) if unigram else decoders.Sequence(decoder)
        )
    words = [f"{word} " for text in TEXTS for word in text.split(" ")]  # merges stay inside a word
    if unigram:
        trainer: Any = trainers.UnigramTrainer(vocab_size=130, special_tokens=list(specials), unk_token="<unk>")
    else:
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[*specials, *BYTES])
    made.train_from_iterator(words, trainer)
    told = json.loads(made.to_str())  # bytes are tokens of the model, and not added ones that a text can spell
    told["added_tokens"] = [token for token in told["added_tokens"] if token["content"] not in BYTES]
    return Tokenizer.from_str(json.dumps(told))


def llama_2() -> Any:
    core = sentencepiece("prepend")
    _in_front(core, "<s>")
    return _fast(core, INST, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def mistral(how: str, template: str) -> Any:
    core = sentencepiece(how, ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"))
    _in_front(core, "<s>")
    return _fast(core, template, ["[INST]", "[/INST]"], bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def gemma() -> Any:
    core = sentencepiece("never", ("<unk>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"))
    _in_front(core, "<bos>")
    extra = ["<start_of_turn>", "<end_of_turn>"]
    return _fast(core, GEMMA, extra, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


def bytes_with(template: str, specials: Sequence[str], eos: str, bos: str | None = None, adds: bool = False) -> Any:
    """A byte-level tokenizer with a template and its control tokens."""
    named = {"eos_token": eos, **({"bos_token": bos} if bos else {})}
    return _fast(byte_level(specials, bos if adds else None), template, specials, **named)


def unigram_t5() -> Any:
    core = sentencepiece("always", ("<pad>", "</s>", "<unk>"), unigram=True)
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return _fast(core, None, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def wordpiece() -> Any:
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    core.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special))
    _in_front(core, "[CLS]", "[SEP]")
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special, strict=True))
    return _fast(core, None, eos_token="[SEP]", **names)


def word_level() -> Any:
    core = Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=["<unk>", "<eos>"]))
    return _fast(core, PLAIN_TURNS, unk_token="<unk>", eos_token="<eos>")


def slow_bytes() -> Any:
    """A tokenizer in Python, without a Rust one behind it."""
    made = ByT5Tokenizer(extra_ids=0)
    made.chat_template = ZEPHYR
    return made


CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
TOOLS = """{% if tools %}{{ '<|im_start|>system\nfunctions:\n' }}{% for t in tools %}{{ t | tojson + '\n' }}{% endfor %}
{{- '<|im_end|>\n' }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\n' }}
{%- if m.role == 'tool' %}{{ '<tool_response>' + m.content + '</tool_response>' }}{% else %}{{ m.content or '' }}{% endif %}
{%- for c in m.tool_calls or [] %}{{ '<tool_call>' + c.function.name + c.function.arguments | tojson + '</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
THINKING = """{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}
{%- endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or m.reasoning_content) %}
{{- '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""
INST = """{{ bos_token }}{% set ns = namespace(lead='') %}{% for m in messages %}{% if m.role == 'system' %}
{%- set ns.lead = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}{% elif m.role == 'user' %}
{{- '[INST] ' + ns.lead + m.content | trim + ' [/INST]' }}{% set ns.lead = '' %}{% else %}
{{- ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"""
MISTRAL = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- elif m.role == 'assistant' %}{{ m.content + eos_token }}
{%- else %}{{ raise_exception('only user and assistant speak') }}{% endif %}{% endfor %}"""
MISTRAL_SPACED = MISTRAL.replace("{{ m.content + eos_token }}", "{{ ' ' + m.content + eos_token }}")
LLAMA_3 = """{{ bos_token }}{% for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
GEMMA = """{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}
{%- for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}
{{- '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
GEMMA_EMPTY_THOUGHT = GEMMA.replace("model\n' }}{% endif %}", "model\n<thought></thought>' }}{% endif %}")
PHI_3 = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""
ZEPHYR = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
VICUNA = """{% for m in messages %}{% if m.role == 'system' %}{{ m.content + ' ' }}
{%- elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
PLAIN_TURNS = """{% for m in messages %}{{ m.role + ' : ' + m.content + ' \n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"""
DEEPSEEK = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}
{%- elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}
{%- else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"""
GRANITE = """{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + eos_token + '\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"""
COMMAND = """{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' }}
{{- {'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>', 'system': '<|SYSTEM_TOKEN|>'}[m.role] }}
{{- m.content + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"""
CHANNELS = """{% for m in messages %}{% if m.role == 'assistant' %}{% if m.reasoning_content %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.reasoning_content + '<|end|>' }}{% endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}
{%- else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""
TRIMMING = """{% for m in messages %}{{ '[' + m.role + '] ' + m.content.strip() + '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"""

IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK = (*IM, "<think>", "</think>")
HEADERS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
PHI = ("<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
DEEP = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
ROLE = ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>")
TURN = ("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
        "<|SYSTEM_TOKEN|>")  # fmt: skip
CHANNEL = ("<|endoftext|>", "<|return|>", "<|call|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>")


@dataclass(frozen=True)
class Family:
    """A tokenizer, and its template where it has one.

    Attributes:
        name: in the shape of what.
        build: makes the tokenizer.
        end: how the token is spelled that ends an answer; None where the template writes none.
        ends: the tokens of `generation_config.eos_token_id`.
        system: whether the template takes a system message.
        behind: how many tokens the tokenizer puts behind every text.
    """

    name: str
    build: Callable[[], Any]
    end: str | None
    ends: tuple[str, ...]
    system: bool = True
    behind: int = 0

    @functools.cached_property
    def tokenizer(self) -> Any:
        return self.build()

    @property
    def is_chat(self) -> bool:
        return self.tokenizer.chat_template is not None

    @property
    def end_ids(self) -> list[int]:
        return [self.tokenizer.convert_tokens_to_ids(token) for token in self.ends]


def _bytes(*arguments: Any, **options: Any) -> Callable[[], Any]:
    return functools.partial(bytes_with, *arguments, **options)


FAMILIES = [
    Family("GPT-2: byte-level BPE, texts", _bytes(None, IM[:1], IM[0]), IM[0], IM[:1]),
    Family("Llama 3 base: byte-level BPE, texts, BOS", _bytes(None, HEADERS, HEADERS[1], HEADERS[0], adds=True),
           HEADERS[1], HEADERS[1:2]),
    Family("Llama 2 base: SentencePiece (Prepend + Replace), texts, BOS",
           lambda: _without_template(llama_2()), "</s>", ("</s>",)),
    Family("Mistral base: SentencePiece (Metaspace, always), texts, BOS",
           lambda: _without_template(mistral("always", MISTRAL)), "</s>", ("</s>",)),
    Family("Mistral base: SentencePiece (Metaspace, first), texts, BOS",
           lambda: _without_template(mistral("first", MISTRAL)), "</s>", ("</s>",)),
    Family("T5: Unigram, texts, EOS behind every text", unigram_t5, "</s>", ("</s>",), behind=1),
    Family("BERT: WordPiece, texts, `[CLS]` and `[SEP]` around", wordpiece, "[SEP]", ("[SEP]",), behind=1),
    Family("Qwen2, SmolLM2: ChatML", _bytes(CHATML, IM, IM[2]), IM[2], (IM[2], IM[0])),
    Family("ChatML on a base, whose eos is another", _bytes(CHATML, IM, IM[0]), IM[2], IM[:1]),
    Family("Qwen3: ChatML with an empty thought", _bytes(THINKING, THINK, IM[2]), IM[2], (IM[2], IM[0])),
    Family("Llama 2 chat: `[INST]`, SentencePiece (Prepend + Replace)", llama_2, "</s>", ("</s>",)),
    Family("Mistral instruct: `[INST]`, Metaspace always", functools.partial(mistral, "always", MISTRAL), "</s>",
           ("</s>",), system=False),
    Family("Mistral instruct: `[INST]`, Metaspace first, a space before the answer",
           functools.partial(mistral, "first", MISTRAL_SPACED), "</s>", ("</s>",), system=False),
    Family("Llama 3: headers, `<|eot_id|>`", _bytes(LLAMA_3, HEADERS, HEADERS[1], HEADERS[0], adds=True), HEADERS[4],
           (HEADERS[1], HEADERS[4])),
    Family("Gemma: no system role, `<end_of_turn>`", gemma, "<end_of_turn>", ("<eos>", "<end_of_turn>"), system=False),
    Family("Gemma with an empty thought before the answer alone",
           lambda: _with_template(gemma(), GEMMA_EMPTY_THOUGHT), "<end_of_turn>", ("<eos>", "<end_of_turn>"),
           system=False),
    Family("Phi-3: `<|end|>`, eos behind the conversation", _bytes(PHI_3, PHI, PHI[0]), PHI[1], PHI[:2]),
    Family("Zephyr: eos and a line break", _bytes(ZEPHYR, ("</s>",), "</s>"), "</s>", ("</s>",)),
    Family("Zephyr on a tokenizer in Python (bytes)", slow_bytes, "</s>", ("</s>",), behind=1),
    Family("Vicuna: turns of plain text", _bytes(VICUNA, ("</s>",), "</s>"), "</s>", ("</s>",)),
    Family("DeepSeek: thinking begun by the generation prompt", _bytes(DEEPSEEK, DEEP, DEEP[1], DEEP[0]), DEEP[1],
           DEEP[1:2]),
    Family("Granite: roles, eos", _bytes(GRANITE, ROLE, ROLE[0]), ROLE[0], ROLE[:1]),
    Family("Command R: turn tokens", _bytes(COMMAND, TURN, TURN[2], TURN[0], adds=True), TURN[2], TURN[2:3]),
    Family("GPT-OSS: channels, `<|return|>`", _bytes(CHANNELS, CHANNEL, CHANNEL[1]), CHANNEL[1],
           (CHANNEL[1], CHANNEL[0], CHANNEL[2])),
    Family("A template that trims, SentencePiece", lambda: _with_template(_trimmed(), TRIMMING), "<|end|>", ("<|end|>",)),
    Family("WordLevel: turns of plain text, no end token", word_level, None, ("<eos>",)),
]  # fmt: skip


def _without_template(tokenizer: Any) -> Any:
    return _with_template(tokenizer, None)


def _with_template(tokenizer: Any, template: str | None) -> Any:
    tokenizer.chat_template = template
    return tokenizer


def _trimmed() -> Any:
    core = sentencepiece("first", ("<unk>", "<s>", "</s>", "<|end|>"))
    return _fast(core, None, ["<|end|>"], bos_token="<s>", eos_token="<|end|>", unk_token="<unk>")


def family(name: str) -> Family:
    """The first whose name begins so."""
    return next(each for each in FAMILIES if each.name.startswith(name))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


ANSWERS = ("hi there", "B", " two words ", "it is 5,\nand 42.\n", "ünï ☃", "")


def rows_of(each: Family) -> list[dict[str, Any]]:
    """Preference rows in TRL's format: every answer is once chosen."""
    pairs = list(zip(ANSWERS, ANSWERS[1:] + ANSWERS[:1], strict=True))
    if not each.is_chat:
        prompts = ("A:\n", "say", "question: what is the sum? answer:", "two words, ")
        return [{"prompt": p, "chosen": one, "rejected": other} for p in prompts for one, other in pairs]
    chats: list[list[dict[str, Any]]] = [
        [user("say hi there")],
        [user("two words?\n"), assistant("there are"), user("12 + 30 ?")],
    ]
    if each.system:
        chats.append([{"role": "system", "content": "be quiet"}, user("what is it?")])
    return [
        {"prompt": c, "chosen": [assistant(one)], "rejected": [assistant(other)]} for c in chats for one, other in pairs
    ]
