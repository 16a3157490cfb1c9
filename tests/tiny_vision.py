"""Tiny vision-language models of several families, with random weights, and their processors.

Image processors are the families' own at small sizes; tokenizers are byte-level ones that are built here.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy
import torch
import transformers
from PIL import Image
from tiny_tokenizers import PARTS, _merges, _vocabulary, qwen2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

FAMILIES = ("qwen2_vl", "gemma3", "smolvlm", "llava")
FURTHER = ("qwen2_5_vl", "qwen3_vl", "llava_next")
_ROWS = [f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)]
_TURNS = """{% for m in messages %}{{ '' if loop.first else '\n' }}{{ m.role + ':\n' }}
{%- for part in m.content %}{% if part.type == 'text' %}
{{- part.text }}{% elif part.type == 'image' %}{{ 'IMAGE' }}{% endif %}{% endfor %}{{ 'END' }}{% endfor %}
{%- if add_generation_prompt %}{{ '\nassistant:\n' }}{% endif %}"""
# As Qwen2-VL has it, but for the line break behind a turn, which TRL scores and sysdag does not.
_CHATML = (
    PARTS.replace("{{ '<|im_start|>'", "{{ ('' if loop.first else '\n') + '<|im_start|>'")
    .replace("'<|im_end|>\n'", "'<|im_end|>'")
    .replace("{{ '<|im_start|>assistant", "{{ '\n<|im_start|>assistant")
)
_PINS = {"image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


class ImagesOnly(transformers.Qwen2VLProcessor):
    """Qwen2-VL's processor without films, whose part needs torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        transformers.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def _scaled_pins(scale: int) -> dict[str, list[list[int]]]:
    return {name: [[scale * side for side in pin] for pin in pins] for name, pins in _PINS.items()}


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    """A colour image of noise."""
    levels = numpy.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=numpy.uint8)
    return Image.fromarray(levels)


def _tokenizer(specials: tuple[str, ...], image: str, end: str, **options: Any) -> Any:
    core = Tokenizer(models.BPE(vocab=_vocabulary("bytes", last=specials), merges=_merges("bytes")))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    options = {"extra_special_tokens": list(specials), "pad_token": "<pad>", "eos_token": end} | options
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=512, **options)
    made.chat_template = _TURNS.replace("IMAGE", image).replace("END", end)
    return made


def _seeded(model: Any, peaked: float) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
            elif "norm" not in name:
                parameter.normal_(0, 0.05)
        model.get_output_embeddings().weight.mul_(peaked)
    return model.eval()


def build(family: str, seed: int = 0, *, peaked: float = 3.0, scale: int = 1, **text: Any) -> tuple[Any, Any]:
    """A model and its processor; `text` changes the language model's config, `scale` all widths and sides of images."""
    processor = processors(family, scale)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        small = {name: size if name.startswith("num") else scale * size for name, size in SMALL.items()}
        config = _configs(family, processor, small | {"max_position_embeddings": 512 * scale} | text, scale)
        model = _seeded(transformers.AutoModelForImageTextToText.from_config(config), peaked)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model, processor


def processors(family: str, scale: int = 1) -> Any:
    """A processor of a family; `scale` multiplies the sides of images."""
    side = 16 * scale
    match family:
        case "qwen2_vl" | "qwen2_5_vl" | "qwen3_vl":
            images = transformers.Qwen2VLImageProcessor(
                patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=8 * 8, max_pixels=(40 * scale) ** 2
            )
            tokenizer = qwen2(512, _CHATML)
            return ImagesOnly(images, tokenizer, chat_template=_CHATML)
        case "gemma3":
            named = {
                "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>",
            }  # fmt: skip
            specials = ("<pad>", "<bos>", "<end_of_turn>", *named.values())
            tokenizer = _tokenizer(
                specials, "<start_of_image>", "<end_of_turn>", bos_token="<bos>", extra_special_tokens=named
            )
            tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
            images = transformers.Gemma3ImageProcessor(size={"height": side, "width": side})
            return transformers.Gemma3Processor(
                images, tokenizer, chat_template=tokenizer.chat_template, image_seq_length=4 * scale**2
            )
        case "smolvlm":  # whose own processor asks for packages that read films
            specials = ("<pad>", "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *_ROWS)
            tokenizer = _tokenizer(specials, "<image>", "<end_of_utterance>")
            sizes = {"size": {"longest_edge": 2 * side}, "max_image_size": {"longest_edge": side}}
            images = transformers.Idefics3ImageProcessor(**sizes)
            return transformers.Idefics3Processor(
                images, tokenizer, chat_template=tokenizer.chat_template, image_seq_len=4 * scale**2
            )
    tokenizer = _tokenizer(("<pad>", "<image>", "</s>"), "<image>\n", "</s>")
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    images, made = transformers.CLIPImageProcessor(**sizes), transformers.LlavaProcessor
    if family == "llava_next":
        images, made = (
            transformers.LlavaNextImageProcessor(**_scaled_pins(scale), **sizes),
            transformers.LlavaNextProcessor,
        )
    return made(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="default",
        chat_template=tokenizer.chat_template, num_additional_image_tokens=1,
    )  # fmt: skip


def _configs(family: str, processor: Any, text: dict[str, Any], scale: int = 1) -> Any:
    tokenizer = processor.tokenizer
    ids = tokenizer.convert_tokens_to_ids
    text = {"vocab_size": len(tokenizer), "num_key_value_heads": 2, "pad_token_id": tokenizer.pad_token_id} | text
    width = {"hidden_size": 24 * scale, "intermediate_size": 32 * scale}
    tower = width | {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16 * scale, "patch_size": 4}
    match family:
        case "qwen2_vl" | "qwen2_5_vl" | "qwen3_vl":
            rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [scale, scale, 2 * scale]}
            vision = {"depth": 2, "num_heads": 2, "patch_size": 4}
            wide = width | {"out_hidden_size": text["hidden_size"]}
            vision |= {"embed_dim": 24 * scale, "hidden_size": text["hidden_size"]} if family == "qwen2_vl" else wide
            made = transformers.Qwen2VLConfig
            if family == "qwen2_5_vl":
                made, vision = (
                    transformers.Qwen2_5_VLConfig,
                    vision | {"window_size": 16 * scale, "fullatt_block_indexes": [1]},
                )
            if family == "qwen3_vl":
                made, text = transformers.Qwen3VLConfig, text | {"head_dim": 8 * scale}
                vision |= {"num_position_embeddings": 64 * scale**2, "deepstack_visual_indexes": [0]}
            return made(
                text_config=text | {"rope_parameters": rope}, vision_config=vision,
                image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
                vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
            )  # fmt: skip
        case "gemma3":
            local = {
                "head_dim": 8 * scale,
                "sliding_window": 24,
                "layer_types": ["sliding_attention", "full_attention"],
            }
            return transformers.Gemma3Config(
                text_config=text | local | {"query_pre_attn_scalar": 8 * scale}, vision_config=tower,
                mm_tokens_per_image=4 * scale**2,
                boi_token_index=ids("<start_of_image>"), eoi_token_index=ids("<end_of_image>"),
                image_token_index=ids("<image_soft_token>"), tie_word_embeddings=False,
            )  # fmt: skip
        case "smolvlm":
            return transformers.SmolVLMConfig(
                text_config=text | {"model_type": "llama"}, vision_config=tower, image_token_id=ids("<image>"),
                scale_factor=2, pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=False,
            )  # fmt: skip
    made, pins = (
        (transformers.LlavaNextConfig, _scaled_pins(scale))
        if family == "llava_next"
        else (transformers.LlavaConfig, {})
    )
    return made(
        text_config=text | {"model_type": "llama"}, vision_config=tower | {"model_type": "clip_vision_model"},
        image_token_index=ids("<image>"), image_seq_length=16 * scale**2, vision_feature_layer=-2, **pins,
    )  # fmt: skip


@functools.cache
def shared(family: str) -> tuple[Any, Any]:
    """A model that no test changes."""
    return build(family)
