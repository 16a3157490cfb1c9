"""The parts of a diffusion component: where they are from, with whom they are shared, and how they are saved."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import nn

from sysdag.components import adapter_files, adapter_weights
from sysdag.components.acceleration import uncompiled
from sysdag.components.component import Component, named_source
from sysdag.components.diffusion import component_folder, pipeline_folder, watching, whole_folder
from sysdag.components.diffusion.conditioning import Hook
from sysdag.components.diffusion.pipeline import Pipeline
from sysdag.components.diffusion.usage import usage
from sysdag.errors import PlanError, SerializationError
from sysdag.files.hub import is_repository
from sysdag.files.saved_files import reading

if TYPE_CHECKING:
    from peft import PeftConfig


class PretrainedDiffusion(Component):
    """A component whose model is a pipeline, loaded late.

    Args:
        source: the folder, Hub id or object that the pipeline is from.
        given: the parts that replace those of the source, by name.
        loading: `dtype`, `revision` and `variant` of what is loaded.
        peft_config, condition, train_text_encoder: see `Diffusion`.
    """

    def __init__(
        self,
        source: str | Path | Any,
        *,
        given: Mapping[str, Any],
        loading: Mapping[str, Any],
        peft_config: PeftConfig | None,
        condition: Hook | None,
        train_text_encoder: bool,
    ) -> None:
        self._source: Any = uncompiled(source)
        self._given = {name: uncompiled(part) for name, part in given.items()}
        self._loading: dict[str, Any] = dict(loading)
        self._peft_config = peft_config
        self.condition = condition
        self.train_text_encoder = train_text_encoder
        self._pipeline: Pipeline | None = None
        self._is_whole: bool | None = None
        # What a loaded system tells of the component: other places of its parts, and with whom it shares its base.
        self._index: pipeline_folder.Index | None = None
        self._adapter_folder: Path | None = None
        self._saved_parts: tuple[Path, pipeline_folder.Index] | None = None
        self._saved_here = False
        self._base_component: str | None = None
        self._base_owner: PretrainedDiffusion | None = None

    @property
    def base_model(self) -> str | None:
        return named_source(self._source)

    @property
    def pipeline(self) -> Pipeline:
        """The parts, loaded on first access."""
        if self._pipeline is None:
            with reading(self.saved_folder):
                self._pipeline = self._loaded()
        return self._pipeline

    def _loaded(self) -> Pipeline:
        options: dict[str, Any] = dict(
            peft_config=self._peft_config, trains_text_encoder=self.train_text_encoder,
            adapter_folder=self._adapter_folder,
        )  # fmt: skip
        if self._base_owner is not None:
            base = self._base_owner.pipeline
            if base.whole is not None:
                return Pipeline.of_whole(base.whole, **options)
            given = {name: part for name, part in base.parts.items() if part is not base.denoiser}
            return Pipeline.load(base.denoiser, given, **options)
        with self._naming_its_base():
            given = {**self._given, **self._loaded_parts()}
            if not self.is_whole:
                return Pipeline.load(self._source, given, index=self._index, **self._loading, **options)
            whole = self._source
            if isinstance(whole, (str, Path)):
                options["adapter_folder"] = self._adapter_folder or Path(whole) / pipeline_folder.ADAPTER
                whole = whole_folder.load(whole, given, **self._loading)
                if Path(self._source).is_dir():
                    whole_folder.check_read(whole, Path(self._source), given)
        return Pipeline.of_whole(whole, **options)

    def _loaded_parts(self) -> dict[str, Any]:
        """Those that were saved beside the base."""
        folder, index = self._saved_parts or (Path(), {})
        return {name: pipeline_folder.load_part(folder, name, entry) for name, entry in index.items()}

    @contextlib.contextmanager
    def _naming_its_base(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._saved_parts is None:
                raise
            raise PlanError(
                f"{self!r} was saved without its base model {str(self._source)!r}, which cannot be loaded "
                f"({type(error).__name__}: {error})."
            ) from error

    @property
    def is_whole(self) -> bool:
        """Whether everything is left to a pipeline of diffusers that samples from a prompt."""
        if self._base_owner is not None:
            return self._base_owner.is_whole
        if self._is_whole is None:
            named = isinstance(self._source, (str, Path))
            if named and self.condition is None and self._index is None:
                missing = not Path(self._source).exists() and not is_repository(self._source)
                if missing and self._saved_parts is None:
                    raise PlanError(
                        f"{self!r}: there is no folder {self._source}. Give a pipeline's folder or a Hub id."
                    )
                with reading(self.saved_folder), self._naming_its_base():
                    self._is_whole = whole_folder.pipeline_class(self._source, self._loading["revision"]) is not None
            else:
                self._is_whole = not named and not isinstance(self._source, nn.Module)
            if self._is_whole:
                self._check_whole()
        return self._is_whole

    def _check_whole(self) -> None:
        """Refuses options that a pipeline of diffusers decides by itself."""

    @property
    def module(self) -> nn.Module:
        """Denoiser, text encoder and VAE in one module; frozen parts require no gradient and stay in eval mode."""
        return self.pipeline.module

    @property
    def _saved_adapter(self) -> Path | None:
        """Where an adapter of its own would be that it gets back; None for a model that is no folder's."""
        if not isinstance(self._source, (str, Path)):
            return None
        return self._adapter_folder or Path(self._source) / pipeline_folder.ADAPTER

    @property
    def _adapter_config(self) -> PeftConfig | None:
        saved = self._saved_adapter
        if saved is None:
            return self._peft_config
        return adapter_files.read_config(saved) if saved.is_dir() else self._peft_config

    @property
    def base_key(self) -> Hashable:
        if self._base_owner is not None:
            return self._base_owner.base_key
        if isinstance(self._source, (str, Path)):
            return id(self)
        source = self._source
        return id(source if isinstance(source, nn.Module) else getattr(source, watching.denoiser_name(source)))

    def share_base(self, others: Iterable[Component]) -> None:
        """Puts its adapter on the pipeline of one of the others that names the same folder, loaded alike."""
        if self._pipeline is None and self._base_owner is None and self._named_base() is not None:
            same = (o for o in others if isinstance(o, PretrainedDiffusion) and o._named_base() == self._named_base())
            self._base_owner = next(same, None)

    def _named_base(self) -> Any:
        """What tells whether two that put a new adapter each on a denoiser load the same; None for others."""
        has_adapter = self._peft_config is not None or self._adapter_folder is not None
        named = isinstance(self._source, (str, Path)) and not self._saved_here
        if not named or not has_adapter or self._given or self._saved_parts_names or self.train_text_encoder:
            return None
        folder = Path(self._source)
        return str(folder.resolve() if folder.exists() else self._source), tuple(self._loading.values())

    @property
    def _saved_parts_names(self) -> list[str]:
        return [] if self._saved_parts is None else list(self._saved_parts[1])

    def connect(self, components: Mapping[str, Component]) -> None:
        """Shares the loaded base of the component that it was saved with."""
        owner = components.get(self._base_component or "")
        if owner is not self and isinstance(owner, PretrainedDiffusion):
            self._base_owner = owner

    def prepare_training(self) -> None:
        """Has what trains by itself be fp32, where it was loaded and no dtype was asked for."""
        self._widen(self.pipeline)

    def _widen(self, pipeline: Pipeline) -> None:
        if isinstance(self._source, (str, Path)) and self._loading["dtype"] is None:
            pipeline.widen([name for name in pipeline.trained if name not in self._given])

    def reference(self) -> Self:
        """This component frozen as it is now; its scores carry no gradient.

        A new adapter is switched off, in weights shared with this component. Otherwise (a full model, or an adapter
        that has been trained) what trains is copied. What is frozen is shared.
        """
        return self if self.pipeline.frozen else self._frozen(self.pipeline.reference())

    def moving_reference(self) -> Self:
        """As `reference`, with a frozen copy of a new adapter on the same denoiser."""
        return self if self.pipeline.frozen else self._frozen(self.pipeline.reference(moves=True))

    def _frozen(self, pipeline: Pipeline) -> Self:
        view = copy.copy(self)
        view._pipeline, view.winner_safeguard = pipeline, None
        return view

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Those of the denoiser's adapter, where it has one, and of a text encoder that trains with it."""
        pipeline = self.pipeline
        if pipeline.adapter is None:
            return super().own_parameters()
        found = {} if pipeline.adapter_off else adapter_weights.parameters(pipeline.denoiser, pipeline.adapter)
        own = {f"denoiser.{name}": parameter for name, parameter in found.items()}
        for encoder in pipeline.text_encoders if self.train_text_encoder else ():
            own |= {f"{encoder}.{name}": p for name, p in pipeline.parts[encoder].named_parameters()}
        return own

    def fresh(self) -> Component:
        if not isinstance(self._source, (str, Path)) or (self.train_text_encoder and "text_encoder" in self._given):
            return super().fresh()
        made = copy.copy(self)
        made._forget()
        return made

    def _forget(self) -> None:
        """Drops the models, and what was made of them."""
        self._pipeline = None

    def save_pretrained(self, folder: Path) -> Mapping[str, Any]:
        """Writes each part to the subfolder that its own library loads, and an adapter to `adapter/`.

        A LoRA node whose base has a name writes its adapter alone, for peft and for diffusers (see `component_folder`).

        Raises:
            SerializationError: for a reference, a part that is no class of diffusers or transformers, or a `condition`
                or `weighting` that cannot be imported again.
        """
        alone = self.pipeline.adapter is not None and not self._given and not self._saved_parts_names
        return self._save(Path(folder), only_what_trains=alone and not self.train_text_encoder)

    def save_checkpoint(self, folder: Path) -> Mapping[str, Any]:
        """As `save_pretrained`, without what is frozen and can be had by name."""
        return self._save(Path(folder), only_what_trains=True)

    def usage(self, folder: Path, options: Mapping[str, Any]) -> list[tuple[str, str]]:
        return [] if self._pipeline is None else usage(self._pipeline, folder, options)

    def _save(self, folder: Path, *, only_what_trains: bool) -> Mapping[str, Any]:
        pipeline = self.pipeline
        if pipeline.frozen:
            raise SerializationError(f"{self!r} is a reference; save the component that it was made from.")
        options = self._saved_options()
        base, only = None, None
        if only_what_trains and isinstance(self._source, (str, Path)) and not self._saved_here:
            loading = {name: value for name, value in self._loading.items() if value is not None}
            if "dtype" in loading:
                loading["dtype"] = str(loading["dtype"]).removeprefix("torch.")
            base = {"source": str(self._source), **loading}
            only = {*pipeline.trained, *self._given, *self._saved_parts_names}
        written = component_folder.save(pipeline, folder, base, only)
        return {**written, "adapter": pipeline.adapter is not None, **options}

    def _saved_options(self) -> dict[str, Any]:
        """What the constructor was told beside its parts, as JSON has it."""
        raise NotImplementedError

    def load_weights(self, folder: Path) -> None:
        """Replaces every tensor that was saved of denoiser, adapter, text encoder and VAE in place, bit by bit.

        Raises:
            SerializationError: if a part that trains is missing in the folder, or one has other tensors.
        """
        component_folder.load_weights(self.pipeline, Path(folder))
