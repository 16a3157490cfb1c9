#!/usr/bin/env bash
# diffusers 0.42.1, ZImagePipeline: a call writes its chat template into the caller's list of prompts.
#
# Guess: a list of prompts is what it was after the call, so a second call with it gives the same image.
# Seen: each prompt has been replaced by its rendering; the second call renders that again, and gives another image.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1 transformers==5.23.0
"$folder/venv/bin/python" - <<'PY'
import diffusers
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

torch.manual_seed(0)
words = ["<pad>", "<unk>", "user", "a", "dark", "square"]
tokens = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
tokens.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", unk_token="<unk>")
tokenizer.chat_template = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
pipe = ZImagePipeline(
    scheduler=FlowMatchEulerDiscreteScheduler(),
    vae=AutoencoderKL(
        latent_channels=4, block_out_channels=(4, 4), norm_num_groups=2, sample_size=16, shift_factor=0.1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ),
    text_encoder=Qwen3Model(
        Qwen3Config(
            vocab_size=len(words), hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, head_dim=4,
        )
    ),
    tokenizer=tokenizer,
    transformer=ZImageTransformer2DModel(
        in_channels=4, dim=24, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=8,
        axes_dims=[4, 4, 4], axes_lens=[64, 16, 16],
    ),
)
pipe.set_progress_bar_config(disable=True)
for part in (pipe.transformer, pipe.text_encoder):
    for parameter in part.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
prompts, images = ["a dark square"], []
for _ in range(2):
    seeded = [torch.Generator().manual_seed(0)]
    options = dict(height=16, width=16, num_inference_steps=2, guidance_scale=0.0, output_type="latent")
    images.append(pipe(prompt=prompts, generator=seeded, **options)[0])
apart = float((images[0] - images[1]).abs().max() / images[0].std())
print(f"diffusers {diffusers.__version__}: the list is {prompts} now, the second image {apart:.2f} of the spread apart")
assert prompts != ["a dark square"], "the list is left alone now"
assert apart > 1e-3, "both calls give one image now"
PY
