"""Tiny models with random weights under the names of real ones, to try every command without a network or a GPU.

    python examples/systems/stand_ins.py            # all names that the examples and the documents use
    python examples/systems/stand_ins.py NAME ...   # some of them

Each is a folder of that name below the current one, `Qwen/Qwen2.5-0.5B-Instruct` for instance. transformers and
diffusers take a folder before they ask the Hub, so everything run from here uses the stand-ins; delete the folders to
get the real models. What the stand-ins write means nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .,:;?!'-\n"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CHAT_TEMPLATE_OF_PARTS = """{% for m in messages %}{{ m['role'] }}: {% for part in m['content'] %}
{{- '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ '\n' }}{% endfor %}
{%- if add_generation_prompt %}assistant: {% endif %}"""


def tokenizer(longest: int) -> PreTrainedTokenizerFast:
    """One token a character, letters in lower case."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    vocabulary |= {character: len(vocabulary) + place for place, character in enumerate(CHARACTERS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=longest
    )
    return fast


def language_model(folder: Path, seed: int, thinks: bool = False) -> None:
    torch.manual_seed(seed)
    words = tokenizer(512)
    words.chat_template = CHAT_TEMPLATE
    if thinks:
        words.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    config = Qwen2Config(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        initializer_range=0.2,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    if thinks:  # one number of its states is the same everywhere, and has it end a thought often
        with torch.no_grad():
            model.model.embed_tokens.weight[:, 0] = 3.0
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
            model.lm_head.weight[:, 0] = 0.0
            model.lm_head.weight[words.convert_tokens_to_ids("</think>"), 0] = 3.0
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def thinking_model(folder: Path, seed: int) -> None:
    """With `<think>` and `</think>` as tokens, the latter written often."""
    language_model(folder, seed, thinks=True)


def encoder_decoder(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    words = tokenizer(512)
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", words.eos_token_id)]
    )
    config = T5Config(
        vocab_size=len(words), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0, initializer_factor=4.0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    words.save_pretrained(folder)


def text_encoder(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    words = tokenizer(256)
    config = BertConfig(
        vocab_size=len(words), hidden_size=384, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    words.save_pretrained(folder)


def text_to_image(folder: Path, seed: int) -> None:
    """Images of 16 by 16 pixels, latents of 8 by 8."""
    torch.manual_seed(seed)
    words = tokenizer(77)
    parts = {
        "unet": UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 8), layers_per_block=1,
            norm_num_groups=4, cross_attention_dim=16, attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        "vae": AutoencoderKL(
            in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(4, 4), layers_per_block=1,
            norm_num_groups=2, sample_size=16, down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        "text_encoder": CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                pad_token_id=0, bos_token_id=1, eos_token_id=1,
            )
        ),
        "tokenizer": words,
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
    }  # fmt: skip
    for name, part in parts.items():
        part.save_pretrained(folder / name)


def vision_language_model(folder: Path, seed: int) -> None:
    """Images of any size, seen at 16 by 16 pixels."""
    torch.manual_seed(seed)
    words = tokenizer(512)
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = {
        "model_type": "qwen2", "vocab_size": len(words), "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "initializer_range": 0.2,
    }  # fmt: skip
    tower = {
        "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
    }  # fmt: skip
    config = LlavaConfig(
        text_config=text, vision_config=tower, image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.generation_config.update(eos_token_id=1, pad_token_id=0)
    model.save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}), words, patch_size=4,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE_OF_PARTS,
    ).save_pretrained(folder)  # fmt: skip


KINDS: dict[str, Callable[[Path, int], None]] = {
    "Qwen/Qwen2.5-0.5B-Instruct": language_model,
    "Qwen/Qwen2.5-1.5B-Instruct": language_model,
    "sentence-transformers/all-MiniLM-L6-v2": text_encoder,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": text_to_image,
    "llava-hf/llava-interleave-qwen-0.5b-hf": vision_language_model,
    "google/flan-t5-small": encoder_decoder,
    "Qwen/Qwen3-0.6B": thinking_model,
}


def write(names: list[str], folder: Path) -> None:
    """Writes the stand-ins of these names, each with weights of its own, below a folder; those that are there stay.

    Raises:
        SystemExit: for a name that has none.
    """
    for name in names:
        if name not in KINDS:
            raise SystemExit(f"There is no stand-in for {name!r}; there are ones for: {', '.join(KINDS)}.")
        if not (folder / name).is_dir():
            with torch.random.fork_rng():
                KINDS[name](folder / name, list(KINDS).index(name))


if __name__ == "__main__":
    write(sys.argv[1:] or list(KINDS), Path())
