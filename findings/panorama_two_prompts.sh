#!/usr/bin/env bash
# diffusers 0.42.1, StableDiffusionPanoramaPipeline: two prompts in one call get each other's guidance.
#
# Guess: with two prompts and two generators the images are those of two calls with one each, to rounding.
# Seen: they are other images. The latents of a crop are doubled row by row and the prompts' states block by block, so
# that with guidance each half of the denoiser's answers belongs to another prompt than the code takes it for.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1 transformers==5.23.0
"$folder/venv/bin/python" - <<'PY'
import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPanoramaPipeline, StableDiffusionPipeline
from diffusers import UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

torch.manual_seed(0)
words = ["<pad>", "<eos>", "<unk>", "a", "dark", "light", "square", "circle"]
tokens = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
tokens.pre_tokenizer = pre_tokenizers.Whitespace()
parts = dict(
    tokenizer=PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=8
    ),
    text_encoder=CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words), hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=8, bos_token_id=1, eos_token_id=1, pad_token_id=0,
        )
    ),
    vae=AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=2, down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",), sample_size=16,
    ),
    unet=UNet2DConditionModel(
        sample_size=64, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
    scheduler=DDIMScheduler(clip_sample=False), safety_checker=None, feature_extractor=None,
)
for part in (parts["unet"], parts["text_encoder"]):
    for parameter in part.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.7 / parameter[0].numel() ** 0.5)


def apart(kind, **size):
    pipe = kind(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    prompts, options = ["a dark square", "a light circle"], dict(num_inference_steps=2, output_type="latent", **size)
    seeded = [torch.Generator().manual_seed(row) for row in (1, 2)]
    together = pipe(prompts, generator=seeded, **options)[0]
    alone = [
        pipe([prompt], generator=[torch.Generator().manual_seed(row)], **options)[0]
        for row, prompt in zip((1, 2), prompts)
    ]
    return float((together - torch.cat(alone)).abs().max() / together.std())


plain = apart(StableDiffusionPipeline, height=64, width=64)
panorama = apart(StableDiffusionPanoramaPipeline, height=64, width=128)
print(f"diffusers {diffusers.__version__}: StableDiffusionPipeline {plain:.1e} of the spread, panorama {panorama:.2f}")
assert plain < 1e-3, "the plain pipeline's prompts do not keep apart either"
assert panorama > 0.05, "the panorama's prompts keep apart now"
PY
