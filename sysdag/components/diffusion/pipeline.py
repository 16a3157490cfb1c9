"""The loaded parts of a diffusion model: denoiser, scheduler and, where there are any, text encoder and VAE."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sysdag.components import adapter as adapters
from sysdag.components import adapter_files, adapter_layers, precision
from sysdag.components.acceleration import uncompiled
from sysdag.components.component import evaluating
from sysdag.components.diffusion import autoencoder, pipeline_folder, rows
from sysdag.components.diffusion.lora_targets import with_targets
from sysdag.components.diffusion.pipeline_module import PipelineModule
from sysdag.components.diffusion.reverse_process import check_decoded
from sysdag.errors import PlanError

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True, eq=False)
class Pipeline:
    """The parts of one diffusion model.

    Attributes:
        parts: every part by the name of its subfolder: `unet` or `transformer`, `scheduler`, `text_encoder`,
            `tokenizer`, `vae`.
        adapter: the name of the denoiser's adapter that belongs to this component, if it has one.
        adapter_off: whether it is run without that adapter.
        frozen: whether it is always run in eval mode and without gradients.
        trains_text_encoder: whether gradients reach the text encoders.
        whole: the pipeline of diffusers that the parts are from, where that samples by its own call.
    """

    parts: Mapping[str, Any]
    adapter: str | None = None
    adapter_off: bool = False
    frozen: bool = False
    trains_text_encoder: bool = False
    whole: Any = None

    @classmethod
    def load(
        cls,
        source: str | Path | nn.Module,
        given: Mapping[str, Any],
        *,
        peft_config: PeftConfig | None,
        trains_text_encoder: bool,
        index: pipeline_folder.Index | None = None,
        adapter_folder: Path | None = None,
        **loading: Any,
    ) -> Self:
        """The parts that are given and, for a folder or Hub id, the rest from there, ready to train.

        What does not train is frozen. A folder that holds an adapter gets it back; an adapter that the denoiser's own
        `add_adapter` put on it is this component's.

        Args:
            adapter_folder: of an adapter that lies elsewhere.

        Raises:
            PlanError: if there is an adapter in the folder and a config for another, a text encoder is to be trained
                that does not exist, a part beside the denoiser carries an adapter, or the autoencoder is one whose
                latents only a pipeline knows to scale.
        """
        parts, saved_adapter = dict(given), adapter_folder
        if isinstance(source, nn.Module):
            parts["unet" if "UNet" in type(source).__name__ else "transformer"] = source
        else:
            saved_adapter = adapter_folder or Path(source) / pipeline_folder.ADAPTER
            index = index or pipeline_folder.read_index(source, loading.get("revision"))
            for name in index.keys() - parts.keys():
                parts[name] = pipeline_folder.load_part(source, name, index[name], **loading)
        if parts.get("vae") is not None:
            autoencoder.check(parts["vae"])
        made = cls(parts, trains_text_encoder=trains_text_encoder)
        return made._readied(peft_config, saved_adapter)

    @classmethod
    def of_whole(
        cls,
        whole: Any,
        *,
        peft_config: PeftConfig | None,
        trains_text_encoder: bool,
        adapter_folder: Path | None = None,
    ) -> Self:
        """A pipeline of diffusers, ready to train.

        Args:
            adapter_folder: of an adapter that its denoiser gets back; None for none.

        Raises:
            PlanError: as `load`.
        """
        for name, part in whole.components.items():
            if (inner := uncompiled(part)) is not part:
                setattr(whole, name, inner)
        parts = {name: part for name, part in whole.components.items() if part is not None}
        made = cls(parts, trains_text_encoder=trains_text_encoder, whole=whole)
        return made._readied(peft_config, adapter_folder)

    def _readied(self, peft_config: PeftConfig | None, saved_adapter: Path | None) -> Self:
        """What does not train frozen, and the adapter put in."""
        if self.trains_text_encoder and not self.text_encoders:
            raise PlanError(f"train_text_encoder=True needs a text encoder; the parts are {sorted(self.parts)}.")
        denoiser = self.denoiser
        owner = f"The {type(denoiser).__name__}"
        trained = self.text_encoders if self.trains_text_encoder else []
        for name, part in self.parts.items():
            if isinstance(part, nn.Module):
                adapters.check_not_emptied(part, f"The {name} ({type(part).__name__})")
                if part is not denoiser and name not in trained:
                    part.requires_grad_(False)
        adapter = None
        if saved_adapter is not None and saved_adapter.is_dir():
            if peft_config is not None:
                raise PlanError(f"{str(saved_adapter)!r} holds an adapter; leave peft_config out to train that one.")
            adapter = adapters.attach(denoiser, adapter_files.read_config(saved_adapter), new=False)
            adapter_files.load(denoiser, adapter, saved_adapter)
        elif peft_config is not None:
            adapter = adapters.attach(denoiser, with_targets(peft_config, denoiser, owner), owner)
        elif adapters.brought(denoiser):
            _, adapter = adapters.adopt(denoiser)
        for name, part in self.parts.items():
            if part is not denoiser and getattr(part, "peft_config", None):
                raise PlanError(
                    f"The {name} ({type(part).__name__}) carries the adapters {list(part.peft_config)}, which would be "
                    "neither trained nor saved. Merge them into its weights (fuse_lora and unload_lora) or delete them."
                )
        return replace(self, adapter=adapter)

    @property
    def text_encoders(self) -> list[str]:
        """The names of the parts that encode text."""
        return [name for name in self.parts if name.startswith("text_encoder") and self.parts[name] is not None]

    def now(self) -> Any:
        """The pipeline of diffusers with the parts as they are here: its own object, which shares them."""
        made = copy.copy(self.whole)
        for name, part in self.parts.items():
            if getattr(made, name) is not part:
                setattr(made, name, part)
        return made

    @cached_property
    def module(self) -> PipelineModule:
        """The parts that have weights."""
        models = {name: part for name, part in self.parts.items() if isinstance(part, nn.Module)}
        denoiser = models.pop(pipeline_folder.denoiser_name(self.parts))
        return PipelineModule(denoiser, models)

    @property
    def denoiser(self) -> Any:
        return self.parts[pipeline_folder.denoiser_name(self.parts)]

    @property
    def vae(self) -> Any:
        return self.parts.get("vae")

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that its decoder takes; 1 where it does not say."""
        config = getattr(self.vae or self.parts.get("movq"), "config", {})
        return config.get("latent_channels") or config.get("z_dim") or 1

    @property
    def trained(self) -> list[str]:
        """The parts whose own weights train."""
        denoiser = [] if self.adapter is not None else [pipeline_folder.denoiser_name(self.parts)]
        return [*denoiser, *(self.text_encoders if self.trains_text_encoder else [])]

    def widen(self, names: Collection[str]) -> None:
        """Casts parts of 16 bits to fp32, in place."""
        for name in names:
            if precision.is_half(self.parts[name].dtype):
                nn.Module.to(self.parts[name], torch.float32)

    @contextlib.contextmanager
    def running(self, *, evaluate: bool = False) -> Iterator[None]:
        """Puts the pipeline's own adapter (or none) in charge of weights that others may share.

        Args:
            evaluate: run in eval mode and without gradients, as a frozen pipeline always does; modes are restored.
        """
        with contextlib.ExitStack() as stack:
            if self.adapter_off:
                stack.enter_context(adapter_layers.switched_off(self.denoiser))
            elif self.adapter is not None and self.frozen:
                stack.enter_context(adapter_layers.activated(self.denoiser, self.adapter))
            elif self.adapter is not None:
                adapter_layers.activate(self.denoiser, self.adapter)
            if evaluate or self.frozen:
                stack.enter_context(evaluating(self.module))
                stack.enter_context(torch.no_grad())
            yield

    def predict(
        self, noisy: Float[Tensor, "n C H W"], times: Tensor, arguments: Mapping[str, Any]
    ) -> Float[Tensor, "n K H W"]:
        """The denoiser's output, fp32, computed in its own dtype on its own device. To be called inside `running`.

        Raises:
            PlanError: if it is not (n, C, H, W), or (n, 2C, H, W) with a learned variance.
        """
        weight = next(parameter for parameter in self.denoiser.parameters() if parameter.is_floating_point())
        device, dtype = weight.device, weight.dtype
        placed = rows.mapped_tensors(
            arguments, lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None)
        )
        output = self.denoiser(noisy.to(device, dtype), timestep=times.to(device), **placed, return_dict=False)[0]
        n, channels, *size = noisy.shape
        if tuple(output.shape) not in ((n, channels, *size), (n, 2 * channels, *size)):
            raise PlanError(
                f"{type(self.denoiser).__name__} made {tuple(output.shape)} of samples {tuple(noisy.shape)}; expected "
                "as many channels, or twice as many where it learns its variance too."
            )
        return output.float()

    def reference(self, *, moves: bool = False) -> Pipeline:
        """This pipeline frozen: a new adapter is switched off in shared weights, else what trains is copied.

        An adapter is copied onto the same denoiser. Frozen parts are shared.

        Args:
            moves: whether it is to follow what trains, so that a new adapter, too, is copied.
        """
        parts, adapter, adapter_off = dict(self.parts), self.adapter, False
        for name in self.trained:
            parts[name] = copy.deepcopy(parts[name]).requires_grad_(False).eval()
        if self.adapter is not None:
            adapter_off = not moves and adapter_layers.is_identity(self.denoiser, self.adapter)
            if not adapter_off:
                parts[pipeline_folder.denoiser_name(parts)], adapter = adapters.freeze_copy(self.denoiser, self.adapter)
        return replace(
            self, parts=parts, adapter=adapter, adapter_off=adapter_off, frozen=True, trains_text_encoder=False
        )

    # Pixels and latents

    def pixel_shape(self, sample_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W) of the images whose latents have `sample_shape`."""
        if self.vae is None:
            return sample_shape
        factor = autoencoder.compression(self.vae)
        return self.vae.config.in_channels, sample_shape[1] * factor, sample_shape[2] * factor

    @torch.no_grad()
    def encode(self, pixels: Float[Tensor, "n c h w"]) -> Float[Tensor, "n C H W"]:
        """Latents of images: the mode of the VAE's posterior, scaled; the pixels themselves where there is no VAE."""
        if self.vae is None:
            return pixels
        encoded = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype))
        mean, scale = autoencoder.latent_scale(self.vae)
        return (autoencoder.latents_of(encoded).float() - mean) * scale

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "n C H W"]) -> Float[Tensor, "n c h w"]:
        """Images of latents, pixels in [-1, 1]."""
        if self.vae is None:
            return latents
        mean, scale = autoencoder.latent_scale(self.vae)
        unscaled = (latents.to(self.vae.device) / scale + mean).to(self.vae.dtype)
        images = self.vae.decode(unscaled, return_dict=False)[0].float()
        check_decoded(self.vae, images)
        return images
