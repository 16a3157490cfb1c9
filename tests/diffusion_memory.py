"""A step of a diffusion model whose memory can be measured, in a process of its own, and estimated."""

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from step_memory import model_of, peak_of
from tiny_diffusion import clip, word_tokenizer

from sysdag import Input, System, node
from sysdag.components import Diffusion
from sysdag.data.encoding import encode_pairs

PAIRS = 2  # two micro-batches
TOKENS = 2 * 32 * 32
CASES = {
    "full": {},
    "adapter": {"adapter": True},
    "full, one pass": {"engine": "one_pass"},
    "checkpointed": {"checkpointing": True},
    "several noises": {"num_noise_draws": 2},
}


def build(*, adapter=False, num_noise_draws=1):
    unet = UNet2DConditionModel(
        sample_size=32, in_channels=3, out_channels=3, block_out_channels=(64, 96), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8, cross_attention_dim=8, attention_head_dim=8,
    )  # fmt: skip
    lora = LoraConfig(r=4, target_modules=["to_q", "to_v"]) if adapter else None

    @node(
        Diffusion(
            unet, scheduler=DDPMScheduler(num_train_timesteps=50), text_encoder=clip(), tokenizer=word_tokenizer(),
            peft_config=lora, num_noise_draws=num_noise_draws,
        )
    )  # fmt: skip
    def image(caption):
        return caption

    return System(Input("caption") >> image).compile()


def measured(case):
    """Bytes of one step beyond what is there after a first one."""
    options = dict(CASES[case])
    engine, checkpointing = options.pop("engine", "two_pass"), options.pop("checkpointing", False)
    plan = build(**options)
    model = model_of(plan, engine, TOKENS, checkpointing)
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(PAIRS, 2, 3, 32, 32, generator=generator).numpy()
    rows = [{"caption": "a dark square", "chosen": chosen, "rejected": rejected} for chosen, rejected in pictures]
    pairs = encode_pairs(plan, rows, "direct")
    return peak_of(model, lambda: model(pairs, torch.Generator().manual_seed(1)))


def estimated(case):
    options = dict(CASES[case])
    engine, checkpointing = options.pop("engine", "two_pass"), options.pop("checkpointing", False)
    return build(**options).estimate(
        {}, pairs=PAIRS, engine=engine, micro_batch_tokens=TOKENS, gradient_checkpointing=checkpointing, device="cpu"
    )
