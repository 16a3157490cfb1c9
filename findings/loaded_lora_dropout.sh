#!/usr/bin/env bash
# diffusers 0.42.1 with peft 0.21.2: a LoRA that `load_lora_weights` loads stays in train mode, and drops out.
#
# Guess: the pipeline's denoiser is in eval mode and stays so, so two calls with the same input are equal.
# Seen: where the file's metadata say `lora_dropout` the new layers are in train mode though the model's `training` is
# False: images are drawn with dropout.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 peft==0.21.2
"$folder/venv/bin/python" - <<'PY'
import tempfile

import diffusers
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict


def pipeline():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), cross_attention_dim=8, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    return StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=unet.eval(), scheduler=DDIMScheduler(clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )


def spread(dropout):
    """How far two calls of the loaded denoiser lie apart."""
    trained, loaded = pipeline(), pipeline()
    trained.unet.add_adapter(LoraConfig(r=4, lora_dropout=dropout, target_modules=["to_q", "to_v"]))
    for name, parameter in trained.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    with tempfile.TemporaryDirectory() as folder:
        StableDiffusionPipeline.save_lora_weights(
            folder, unet_lora_layers=get_peft_model_state_dict(trained.unet),
            **_collate_lora_metadata({"unet": trained.unet}),
        )
        loaded.load_lora_weights(folder)
    given = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 3, 8)
    with torch.no_grad():
        return loaded.unet.training, float((loaded.unet(*given).sample - loaded.unet(*given).sample).abs().max())


without, dropping = spread(0.0), spread(0.5)
print(f"diffusers {diffusers.__version__}: (training, two calls differ by) without dropout {without}, with {dropping}")
assert without == (False, 0.0)
assert not dropping[0] and dropping[1] > 1e-4, "loaded adapters are in eval mode now"
PY
