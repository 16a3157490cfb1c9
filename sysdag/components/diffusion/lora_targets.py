"""The layers that a LoRA adapts where its config names none: those of diffusers' scripts for the model's family."""

from __future__ import annotations

import copy
import logging
import re
from typing import TYPE_CHECKING, Any

from sysdag.components.adapter_support import kind_of
from sysdag.errors import PlanError

if TYPE_CHECKING:
    from peft import PeftConfig

logger = logging.getLogger(__name__)

_ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
_JOINT = (
    "attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0",
    "attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip
_FLUX_2_SINGLE = r"single_transformer_blocks\.\d+\.attn\.to_out"
# Names, or patterns of names, by the class of the denoiser: those of diffusers' dreambooth scripts.
_OF_FAMILY: dict[str, tuple[str, ...]] = {
    "UNet2DConditionModel": (*_ATTENTION, "add_k_proj", "add_v_proj"),
    "SD3Transformer2DModel": _JOINT,
    "FluxTransformer2DModel": (*_JOINT, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    "Flux2Transformer2DModel": (*_ATTENTION, "to_qkv_mlp_proj", _FLUX_2_SINGLE),
    "SanaTransformer2DModel": ("to_k", "to_q", "to_v"),
    "Lumina2Transformer2DModel": ("to_k", "to_q", "to_v"),
    "HiDreamImageTransformer2DModel": ("to_k", "to_q", "to_v", "to_out"),
}


def with_targets(config: PeftConfig, denoiser: Any, owner: str) -> PeftConfig:
    """The config, with the family's layers where it is a LoRA's that names none; the log says which.

    Args:
        owner: what an error names.

    Raises:
        PlanError: for a denoiser without any of them.
    """
    named = [getattr(config, option, None) for option in ("target_modules", "target_parameters")]
    if kind_of(config) != "LORA" or any(named):
        return config
    name = type(denoiser).__name__
    wanted = _OF_FAMILY.get(name, _ATTENTION)
    modules = [path for path, _ in denoiser.named_modules()]
    targets = [target for each in wanted for target in _found(each, modules)]
    if not targets:
        raise PlanError(
            f"{owner}: the LoraConfig has no target_modules, and {name} has none of the layers {list(wanted)} that "
            "diffusers' scripts adapt. Name its layers: target_modules=[...], or 'all-linear'."
        )
    if next(denoiser.parameters()).device.type != "meta":  # not of an outline, which is made often
        logger.info("%s: the LoraConfig names no target_modules; those of %s are taken: %s.", owner, name, targets)
    chosen = copy.copy(config)
    chosen.target_modules = set(targets)  # type: ignore[attr-defined]
    return chosen


def _found(wanted: str, modules: list[str]) -> list[str]:
    if "\\" in wanted:
        return [path for path in modules if re.fullmatch(wanted, path)]
    return [wanted] if any(path == wanted or path.endswith(f".{wanted}") for path in modules) else []
