"""Tiny diffusion models with random weights, and what tests of them share."""

import functools

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from sysdag.components.diffusion.diffusion_model import Diffusion

T = 50  # training times
WORDS = ["<pad>", "<eos>", "<unk>", "a", "dark", "light", "square", "circle"]
LORA = {"r": 2, "lora_alpha": 6, "target_modules": ["to_q", "to_v", "to_out.0", "conv1", "proj_in"]}


def seeded(make):
    """A model builder with random weights large enough that conditioning matters."""

    @functools.wraps(make)
    def build(*args, seed=0, **options):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = make(*args, **options)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.ndim > 1:
                        parameter.normal_(0, 0.7 / parameter[0].numel() ** 0.5)
                    elif "bias" in name:
                        parameter.normal_(0, 0.1)
        return model.eval()

    return build


@seeded
def text_unet(**options):
    return UNet2DConditionModel(
        **dict(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
        )
        | options
    )  # fmt: skip


class Unmasked(UNet2DConditionModel):
    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True):
        return super().forward(sample, timestep, encoder_hidden_states, return_dict=return_dict)


def unmasked_unet():
    return Unmasked.from_config(text_unet().config)


@seeded
def plain_unet(**options):
    return UNet2DModel(
        **dict(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=4,
        )
        | options
    )  # fmt: skip


@seeded
def dit(**options):
    return DiTTransformer2DModel(
        **dict(
            num_attention_heads=2, attention_head_dim=4, in_channels=2, out_channels=4, num_layers=1, sample_size=4,
            num_embeds_ada_norm=5, norm_num_groups=2,
        )
        | options
    )  # fmt: skip


@seeded
def pixart():
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=2, out_channels=4, num_layers=1, sample_size=4,
        patch_size=2, cross_attention_dim=8, caption_channels=8, norm_num_groups=2, num_embeds_ada_norm=T,
        use_additional_conditions=False,
    )  # fmt: skip


@seeded
def sd3():
    return SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=2, out_channels=2, num_layers=1, attention_head_dim=4,
        num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=6,
        pos_embed_max_size=4,
    )  # fmt: skip


@seeded
def autoencoder(channels=3, latents=1, **options):
    return AutoencoderKL(
        in_channels=channels, out_channels=channels, latent_channels=latents, block_out_channels=(4, 4),
        layers_per_block=1, norm_num_groups=2, sample_size=16, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, **({"scaling_factor": 0.4, "shift_factor": 0.2} | options),
    )  # fmt: skip


@seeded
def clip(**options):
    return CLIPTextModel(
        CLIPTextConfig(
            **dict(
                vocab_size=len(WORDS), hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                max_position_embeddings=8, bos_token_id=1, eos_token_id=1, pad_token_id=0,
            )
            | options
        )
    )  # fmt: skip


@seeded
def t5():
    return T5EncoderModel(
        T5Config(vocab_size=len(WORDS), d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.3)
    )


def word_tokenizer(**options):
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", "model_max_length": 8}
    return PreTrainedTokenizerFast(tokenizer_object=words, **(special | options))


def seed(number):
    return torch.Generator().manual_seed(number)


def scheduler_of(kind, **options):
    if kind == "flow":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=T, shift=3.0, **options)
    return DDPMScheduler(num_train_timesteps=T, prediction_type=kind, **options)


def from_text(unet=None, scheduler=None, **options):
    parts = {"text_encoder": clip(), "tokenizer": word_tokenizer()}
    scheduler = scheduler or DDIMScheduler(num_train_timesteps=T, clip_sample=False, steps_offset=1)
    return Diffusion(unet or text_unet(), scheduler=scheduler, **({"num_inference_steps": 4} | parts | options))


def from_vectors(kind="epsilon", **options):
    return Diffusion(text_unet(), scheduler=scheduler_of(kind), **({"num_inference_steps": 4} | options))


def images(count, shape=(1, 8, 8), number=1):
    return [torch.rand(shape, generator=seed(number + place)) * 2 - 1 for place in range(count)]


def vectors(count, number=5):
    return list(torch.randn(count, 8, generator=seed(number)))


def drift(module, number=9, size=0.1):
    """Moves every trainable parameter, as an optimizer step would."""
    generator = seed(number)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def latents_of(draws):
    return torch.stack([torch.as_tensor(draw.record["latents"]) for draw in draws])


def start_noise(count, shape, number=0):
    """The noise that `sample` starts from at this seed, and each sample's generator after it was drawn."""
    seeds = torch.randint(2**62, (count,), generator=seed(number)).tolist()
    generators = [torch.Generator().manual_seed(one) for one in seeds]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]), generators


def snr_plus_one(snr):
    return snr + 1


def pooled(inputs):
    """Made-up SD3 conditioning: hidden states and a pooled embedding for each number (None: zeros)."""
    value = torch.tensor([0.0 if x is None else x for x in inputs])
    return {
        "encoder_hidden_states": value[:, None, None].expand(-1, 3, 8) * torch.linspace(-1, 1, 8),
        "pooled_projections": value[:, None].expand(-1, 6),
    }


HOOKED = Diffusion(sd3(), scheduler=scheduler_of("flow"), condition=pooled, weighting=snr_plus_one)
