"""Text encoders and autoencoders of tiny pipelines, and the register that the families write themselves in."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers

PIPELINES: dict[str, Callable[[], Any]] = {}
CALL: dict[str, dict[str, Any]] = {}
UNBUILT: dict[str, str] = {}


def pipeline(name: str, **call: Any) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Registers a builder under `name`, with what keeps its call tiny; all weights are drawn anew, and seeded."""

    def register(make: Callable[[], Any]) -> Callable[[], Any]:
        @functools.wraps(make)
        def build() -> Any:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                pipe = make()
                for part_name, part in pipe.components.items():
                    if isinstance(part, torch.nn.Module):
                        torch.manual_seed(zlib.crc32(part_name.encode()))
                        redraw(part.eval())
            pipe.set_progress_bar_config(disable=True)
            return pipe

        PIPELINES[name] = build
        if call:
            CALL[name] = call
        return build

    return register


def redraw(module: torch.nn.Module) -> None:
    """Weights large enough that the conditioning matters; nothing stays zero (gates, last layers) or as memory lay."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            elif "bias" in name:
                parameter.normal_(0, 0.1)
            elif name.endswith("_token") or not parameter.any():
                parameter.normal_(0, 0.3)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.3)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)


def clip(tokenizer: Any, width: int = 8, *, project: int | None = None, **options: Any) -> Any:
    """A CLIP text encoder; with `project`, one that projects its pooled state to so many."""
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        **({"projection_dim": project} if project else {}), **options,
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if project else transformers.CLIPTextModel)(config)


def t5(tokenizer: Any, width: int = 8, kind: str = "T5") -> Any:
    """The encoder of a T5 or a "UMT5"."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), d_model=width, d_kv=4, d_ff=16, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return getattr(transformers, f"{kind}EncoderModel")(config)


def decoder(kind: str, tokenizer: Any, width: int = 8, layers: int = 2, **options: Any) -> Any:
    """A decoder of transformers by its class (Gemma2Model, Qwen3ForCausalLM, LlamaForCausalLM, GlmModel ...)."""
    cls = getattr(transformers, kind)
    tiny = dict(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=16, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=4, max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    return cls(cls.config_class(**(tiny | options)))


def autoencoder(channels: int = 4, levels: int = 2, **options: Any) -> Any:
    """An AutoencoderKL that halves the sides `levels - 1` times."""
    tiny = dict(
        in_channels=3, out_channels=3, latent_channels=channels, block_out_channels=(4,) * levels, layers_per_block=1,
        norm_num_groups=2, sample_size=16, down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    )  # fmt: skip
    return diffusers.AutoencoderKL(**(tiny | options))


def flow(**options: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)
