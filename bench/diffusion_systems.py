"""Pipelines of 30 to 60 million parameters at 64 x 64 latents, and diffusers' Diffusion-DPO step on them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from sysdag import Input, System, node
from sysdag.components import Diffusion
from sysdag.data.encoding import encode_pairs
from sysdag.engine.replay import accumulate_gradients
from sysdag.engine.step import EngineOptions, SystemModel
from sysdag.objectives.options import ObjectiveOptions

BETA = 2000.0
WORDS = (
    "<pad>", "<eos>", "<unk>", "a", "photo", "of", "dark", "light", "square", "circle", "on", "the", "left", "right",
)  # fmt: skip
CAPTIONS = ["a dark square on the left", "a light circle on the right", "a photo of the dark circle", "a light square"]
FACTOR = 8  # pixels to latents


class Case(NamedTuple):
    """What is measured: `model` is "unet" (as SD 1.5) or "transformer" (as PixArt)."""

    model: str
    lora: bool
    pairs: int = 1

    @property
    def trained(self) -> str:
        return "lora" if self.lora else "full"


def pipeline(model: str, side: int = 64) -> Any:
    """Random weights; latents 4 x side x side, images eight times as large.

    Encoding an image takes as many operations beside a forward as in the models' originals, by torch's counter at
    latents of 64 x 64: 1.41 times a forward of the UNet (Stable Diffusion 1.5: 1.39), 0.85 times one of the transformer
    (PixArt with the same autoencoder: 0.90).
    """
    import diffusers
    import transformers

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        latent_channels=4, block_out_channels=(32, 64, 64, 64), norm_num_groups=8,
        layers_per_block=1 if model == "unet" else 2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=side * FACTOR, scaling_factor=3.8,  # latents of variance 1, as trained ones have
    ).eval()  # fmt: skip
    if model == "unet":
        unet = diffusers.UNet2DConditionModel(
            sample_size=side, block_out_channels=(32, 64, 256, 448), layers_per_block=2, cross_attention_dim=256,
            attention_head_dim=8, norm_num_groups=32,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        ).eval()  # fmt: skip
        text_encoder = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=len(WORDS), hidden_size=256, intermediate_size=1024, num_hidden_layers=6,
                num_attention_heads=4, max_position_embeddings=77, bos_token_id=1, eos_token_id=1, pad_token_id=0,
            )
        ).eval()  # fmt: skip
        return diffusers.StableDiffusionPipeline(
            vae=vae, text_encoder=text_encoder, tokenizer=_words(77), unet=unet,
            scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1), safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=14, sample_size=side,
        patch_size=2, cross_attention_dim=384, caption_channels=256, norm_num_groups=32, num_embeds_ada_norm=1000,
        use_additional_conditions=False,
    ).eval()  # fmt: skip
    text_encoder = transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=len(WORDS), d_model=256, d_kv=64, d_ff=1024, num_layers=6, num_heads=4)
    ).eval()
    return diffusers.PixArtAlphaPipeline(
        tokenizer=_words(120), text_encoder=text_encoder, vae=vae, transformer=transformer,
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
    )  # fmt: skip


def _words(length: int) -> Any:
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=length
    )


class Step:
    """One case, ready to be computed by sysdag or in the style of diffusers' script on the same models and data."""

    def __init__(self, case: Case, side: int = 64, beta: float = BETA) -> None:
        self.case, self.pipe, self.beta = case, pipeline(case.model, side), beta
        lora = LoraConfig(r=16, lora_alpha=16, target_modules=["to_k", "to_q", "to_v", "to_out.0"])
        options: dict[str, Any] = {} if case.model == "unet" else {"pipeline_kwargs": {"use_resolution_binning": False}}
        component = Diffusion(self.pipe, convention="diffusion-dpo", peft_config=lora if case.lora else None, **options)

        @node(component)
        def image(caption: str) -> str:
            return caption

        plan = System(Input("caption") >> image).compile()
        self.model = SystemModel(
            plan, ObjectiveOptions(objective="direct", beta=beta), None, None,
            EngineOptions(engine="two_pass", micro_batch_tokens=side * side),
        )  # fmt: skip
        component.module.train()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in component.pipeline.denoiser.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.002 * torch.randn(parameter.shape, generator=generator))
        self.component = component
        self.reference = self.model.references["image"]
        self.captions = [CAPTIONS[pair % len(CAPTIONS)] for pair in range(case.pairs)]
        pixels = side * FACTOR
        noise = torch.rand(case.pairs, 3, pixels, pixels, generator=generator) * 2 - 1
        self.pixels = torch.stack([noise, torch.linspace(-1, 1, pixels).expand_as(noise)])
        rows = [
            {"caption": caption, "chosen": chosen.numpy(), "rejected": rejected.numpy()}
            for caption, chosen, rejected in zip(self.captions, *self.pixels, strict=True)
        ]
        self.pairs = encode_pairs(plan, rows, "direct")
        self.noise: Any = None
        draw_noise = component.noise

        def noise(*arguments: Any) -> Any:
            self.noise = draw_noise(*arguments)
            return self.noise

        component.noise = noise  # type: ignore[method-assign]
        self.encoded: Any = None

    def in_double(self) -> None:
        """Weights, and what the script gets, in fp64: in fp32 much of two sides' difference is rounding."""
        for component in (self.component, self.reference):
            component.module.double()  # type: ignore[union-attr]
        latents, text = self._encode_in_double()
        own = [self.component.observe(list(side.numpy())) for side in self.pixels]
        kept = torch.stack([torch.from_numpy(draw.record["latents"]).double() for side in own for draw in side])
        if float((kept - latents).abs().max()) > 1e-5:
            raise SystemExit(f"{self.case}: latents are not the script's; no speed is reported for a wrong result.")
        self.encoded = kept, text

    def _encode_in_double(self) -> tuple[Tensor, dict[str, Any]]:
        self.pixels = self.pixels.double()
        found = self._encode()
        self.pixels = self.pixels.float()
        return found

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=False)

    def gradients(self) -> dict[str, Tensor]:
        return {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}

    def run(self, name: str) -> Tensor:
        """Adds the step's gradients and returns its loss."""
        if name.startswith("script"):
            if name == "script" or self.encoded is None:
                self.encoded = self._encode()
            return self._script(*self.encoded)
        self.model.budget.keeps_graphs = name == "one pass"
        output = self.model(self.pairs, torch.Generator().manual_seed(2))
        accumulate_gradients(self.model, output)
        return output.loss.detach()

    @torch.no_grad()
    def _encode(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents of both sides, and the text's encoding, as the script makes them at each step."""
        vae = self.pipe.vae
        latents = vae.encode(self.pixels.flatten(0, 1)).latent_dist.mode() * vae.config.scaling_factor
        tokens = self.pipe.tokenizer(
            self.captions, padding="max_length", max_length=self.pipe.tokenizer.model_max_length, truncation=True,
            return_tensors="pt",
        )  # fmt: skip
        if self.case.model == "unet":
            return latents, {"encoder_hidden_states": self.pipe.text_encoder(tokens.input_ids)[0].repeat(2, 1, 1)}
        states = self.pipe.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        return latents, {
            "encoder_hidden_states": states.repeat(2, 1, 1),
            "encoder_attention_mask": tokens.attention_mask.repeat(2, 1),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }

    def _script(self, latents: Tensor, text: dict[str, Any]) -> Tensor:
        eps = self.noise.eps[: self.case.pairs].repeat(2, 1, 1, 1)
        times = self.noise.timesteps[: self.case.pairs].repeat(2)
        kept = self.pipe.scheduler.alphas_cumprod[times][:, None, None, None]
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * eps
        policy = self.component.pipeline
        with policy.running():
            predicted = policy.denoiser(noisy, timestep=times, **text).sample[:, :4]
        losses = F.mse_loss(predicted, eps, reduction="none").mean((1, 2, 3))
        reference = self.reference.pipeline  # type: ignore[union-attr]
        with torch.no_grad(), reference.running():
            predicted = reference.denoiser(noisy, timestep=times, **text).sample[:, :4]
            frozen = F.mse_loss(predicted, eps, reduction="none").mean((1, 2, 3))
        winner, loser = (losses - frozen).chunk(2)
        loss = -F.logsigmoid(-0.5 * self.beta * (winner - loser)).mean()
        loss.backward()
        return loss.detach()
