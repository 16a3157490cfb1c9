"""A pretrained causal language model with its tokenizer, and the adapter of whoever uses it: loaded late, saved whole.

Several components may share one loaded model, with an adapter each; `PretrainedLM` is one component's view of it.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import weakref
from collections.abc import Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from sysdag.components import adapter, adapter_files, adapter_layers, adapter_weights
from sysdag.components.language import model_source
from sysdag.components.language.model_description import ModelDescription, num_embeddings_of
from sysdag.components.loading_info import complete, without_new
from sysdag.errors import PlanError, SerializationError
from sysdag.files.atomic import beside
from sysdag.files.hub import reaching
from sysdag.files.saved_files import reading

logger = logging.getLogger(__name__)

# The component folder that each shared base was last written to, so that its other components can refer to it.
_bases_written: weakref.WeakKeyDictionary[Any, Path] = weakref.WeakKeyDictionary()


class PretrainedLM(ModelDescription):
    """One component's model, tokenizer and adapter.

    Attributes:
        adapter: the name of its adapter on the model; None without one, or before the model is loaded.
        adapter_off: whether it works without that adapter.
        is_reference: whether it is what another one is compared with.
    """

    @property
    def module(self) -> Any:
        """The model with the adapter, loaded on first access."""
        if self._model is None:
            with reading(self.saved_folder):
                self._model = self._load_model()
        return self._model

    @property
    def is_loaded(self) -> bool:
        """Whether the model is here already."""
        return self._model is not None

    @property
    def has_adapter(self) -> bool:
        """Whether it works with an adapter of its own, loaded or not."""
        return not self.adapter_off and (self.adapter is not None or self.adapter_config is not None)

    def _load_model(self) -> Any:
        model: Any = self._source if self._base_owner is None else self._base_owner.module
        if isinstance(model, (str, Path)):
            model = self._load_base()
        adapter.check_not_emptied(model, repr(self))
        owner = self._base_owner
        self._num_embeddings = num_embeddings_of(model) if owner is None else owner._num_embeddings
        if (adapter_config := self.adapter_config) is not None:
            if self._adapter_folder is not None:
                self._make_room(model, self._adapter_folder)
            self.adapter = adapter.attach(model, adapter_config, repr(self), new=self._adapter_folder is None)
            if self._adapter_folder is not None:
                adapter_files.load(model, self.adapter, self._adapter_folder)
        elif adapter.brought(model):
            model, self.adapter = adapter.adopt(model, repr(self))
        if self.adapter is not None:
            adapter.prepare_quantized(model)
        return model

    @classmethod
    def auto_class(cls) -> Any:
        """What of transformers loads such a model."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def loader(self) -> tuple[Any, dict[str, Any]]:
        """What of transformers loads this one, and further options for that."""
        return self.auto_class(), {}

    def _save_reader(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)

    def _load_base(self) -> Any:
        assert self.config is not None  # which refuses what is of another kind, before its weights are read
        options = {"trust_remote_code": False, **self.model_kwargs, "output_loading_info": True}
        options |= {"dtype": torch.float32} if self._trains_in_fp32 else {}
        options |= {"use_safetensors": True} if self._is_saved_here else {}
        with reaching(self._source):
            loader, given = self.loader()
            model = loader.from_pretrained(self._source, **options, **given)
        if self._is_saved_here:
            model = complete(model, self._source)
        else:
            model = without_new(model, repr(self), self._may_be_new)
        if "gguf_file" in self.model_kwargs:
            self.gguf.check_weights(model, repr(self))
            _forget_gguf(model)
        return model

    def _may_be_new(self, model: Any, name: str) -> bool:
        """Whether a parameter may begin at random, as that of a new head."""
        return False

    @property
    def _is_saved_here(self) -> bool:
        """Whether the base itself was saved with the system, by `save`."""
        return self.saved_folder is not None and (self._adapter_folder is None or self._saved_base is not None)

    def _make_room(self, model: Any, folder: Path) -> None:
        """For the embeddings that an adapter brings of a vocabulary which was extended."""
        if self._brought_rows > num_embeddings_of(model):
            model.resize_token_embeddings(self._brought_rows, mean_resizing=False)
        self._changed_base = self._saved_base is None and adapter_files.brings_embeddings(folder)

    def prepare_training(self) -> None:
        """Has weights that train by themselves be fp32, unless another dtype was asked for.

        Raises:
            PlanError: see `reference`.
        """
        self._resolve()
        if (
            not self.is_named
            or self.adapter_config is not None
            or model_source.chosen_dtype(self.model_kwargs) is not None
        ):
            return
        if isinstance(self.model_kwargs.get("dtype"), Mapping) or "quantization_config" in self.model_kwargs:
            return
        if self._model is not None:
            if getattr(self._model, "hf_quantizer", None) is None and self.adapter is None:
                self._model.float()
        elif getattr(self.config, "quantization_config", None) is None:
            self._trains_in_fp32 = True

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Those of its adapter, where it has one; none where that is switched off."""
        if self.adapter_off:
            return {}
        model = self.module
        return (
            dict(model.named_parameters()) if self.adapter is None else adapter_weights.parameters(model, self.adapter)
        )

    @contextlib.contextmanager
    def at_work(self) -> Iterator[Any]:
        """The model with this component's own adapter in charge, or none."""
        model = self.module
        if self.adapter_off or (self.adapter is None and adapter.names(model)):
            with adapter_layers.switched_off(model):
                yield model
        elif self.is_reference and self.adapter is not None:
            with adapter_layers.activated(model, self.adapter):
                yield model
        else:
            if self.adapter is not None:
                adapter_layers.activate(model, self.adapter)
            yield model

    def reference(self, *, moves: bool = False) -> Self:
        """The adapter switched off while it changes nothing yet, else a frozen copy of it, on the same model.

        Without an adapter the whole model is copied.

        Args:
            moves: whether it is to follow what trains, so that a new adapter is copied, too.

        Raises:
            PlanError: if the model's own weights cannot train: quantised, or under adapters of other components.
        """
        model, view = self.module, copy.copy(self)
        view.is_reference = True
        if self.adapter is None:
            if adapter.names(model):
                raise PlanError(
                    f"{self!r} would train all weights of a model that carries the adapters {adapter.names(model)}. "
                    "Give it a peft_config too, or a model of its own."
                )
            if adapter.is_quantized(model):
                raise PlanError(f"{self!r}: quantised weights cannot train. Pass a peft_config, or trainable=False.")
            view._model = copy.deepcopy(model).requires_grad_(False).eval()
        elif not moves and adapter_layers.is_identity(model, self.adapter):
            view.adapter_off = True
        else:
            view._model, view.adapter = adapter.freeze_copy(model, self.adapter)
        return view

    def fresh(self) -> Self:
        """The same model and adapter, not loaded yet; `share_base` tells of a base that another one loads."""
        view = copy.copy(self)
        view._model = view._config = view._base_owner = None
        view.adapter, view.adapter_off = None, False
        return view

    def save(self, folder: Path) -> dict[str, Any]:
        """Writes the model, or the adapter in peft's layout and beside it, in `base/`, a base that has no name.

        Components that share their base and are saved into one parent folder write it once.

        Returns:
            What `load` needs to find it again.
        """
        model = self.module  # whose loading tells whether there is an adapter
        self._save_reader(folder)
        if self.adapter is None:
            self._save_base(folder)
            return self._kept_options(weights_are_saved=True)
        adapter_files.save(model, self.adapter, folder)
        has_name = self.is_named and self._saved_base is None
        if has_name and not self._changed_base and self._num_embeddings == num_embeddings_of(model):
            return {"base": str(self._source), **self._kept_options(weights_are_saved=False)}
        options = self._kept_options(weights_are_saved=True)
        written = _bases_written.get(model)
        if written is not None and written.parent == folder.parent and written != folder and written.is_dir():
            return {"base": None, "base_of": written.name, **options}
        self._save_base(folder / "base")
        _bases_written[model] = folder
        return {"base": None, **options}

    def _kept_options(self, *, weights_are_saved: bool) -> dict[str, Any]:
        root = self if self._base_owner is None else self._base_owner
        kept = model_source.to_json(root.model_kwargs, weights_are_saved=weights_are_saved)
        if not weights_are_saved and (lost := model_source.not_saved(root.model_kwargs)):
            logger.warning(
                "%r: the options %s of model_kwargs are not saved; a system that loads the base by its name needs them "
                "in code (system.load).", self, lost,
            )  # fmt: skip
        return {"model_kwargs": kept} if kept else {}

    def _save_base(self, folder: Path) -> None:
        model = self.module
        carries = bool(self.adapter or adapter.names(model))
        with _as_a_whole(model):
            model.save_pretrained(folder, **({"state_dict": adapter_weights.base_state(model)} if carries else {}))

    @classmethod
    def load(cls, folder: Path, saved: Mapping[str, Any]) -> Self:
        """A view of what `save` wrote and returned; nothing loads yet.

        Raises:
            SerializationError: for a shared base that is no component beside it.
        """
        options = model_source.from_json(saved.get("model_kwargs", {}))
        if "base" not in saved:
            made = cls(folder, None, model_kwargs=options)
            made.was_saved = True
            return made
        base, owner = saved["base"], saved.get("base_of", folder.name)
        if not owner.replace("-", "_").isidentifier():
            raise SerializationError(f"base_of must name a component of the saved system, got {owner!r}.")
        place = beside(folder, owner, "system.json") / "base"
        if base is None and not place.is_dir():
            raise SerializationError(f"the folder {place} of its base model is missing.")
        made = cls(place if base is None else base, folder, model_kwargs=options)
        made.was_saved = True
        made._adapter_folder = folder
        made._saved_base = owner if base is None else None
        return made

    @property
    def base_component(self) -> str | None:
        """The saved component whose base it shares, which may be its own; None for a base with a name."""
        return self._saved_base

    @property
    def base_key(self) -> Hashable:
        """What tells whether another one works on the same loaded base."""
        if self._base_owner is not None:
            return self._base_owner.base_key
        if self.is_named:
            return id(self)
        model = self._source
        return id(model.get_base_model() if hasattr(model, "get_base_model") else model)

    def may_share_with(self, owner: PretrainedLM) -> bool:
        """Whether both put an adapter on the model of one name, loaded alike, and this one has not loaded it yet."""
        return (
            self._model is None
            and self._base_owner is None
            and owner.base_key != self.base_key
            and owner.kind == self.kind
            and all(each.is_named and each._has_own_adapter for each in (self, owner))
            and _place(self._source) == _place(owner._source)
            and self._comparable_options() == owner._comparable_options()
        )

    @property
    def _has_own_adapter(self) -> bool:
        if self._adapter_folder is not None:
            return not adapter_files.saved_embeddings(self._adapter_folder)
        return self._peft_config is not None

    def _comparable_options(self) -> dict[str, Any]:
        return {
            name: value.to_dict() if hasattr(value, "to_dict") else value for name, value in self.model_kwargs.items()
        }

    def share_base(self, owner: PretrainedLM) -> None:
        """Loads nothing of its own, but works on the base that another one loads."""
        self._base_owner = owner

    def share_base_of_one(self, owners: Iterable[PretrainedLM]) -> None:
        """Works on the base of the first of them with which it may share (see `may_share_with`), if there is one."""
        if (owner := next(filter(self.may_share_with, owners), None)) is not None:
            self.share_base(owner)

    def load_weights(self, folder: Path) -> None:
        """Replaces the weights in place by those that `save` wrote."""
        model = self.module
        if self.adapter is not None:
            adapter_files.load(model, self.adapter, folder)
            return
        own = adapter_weights.base_state(model)
        options = {"dtype": model.dtype, "use_safetensors": True, "output_loading_info": True}
        loaded = type(model).from_pretrained(folder, config=copy.deepcopy(model.config), **options)
        saved = complete(loaded, folder).state_dict()
        adapter_files.check_same_tensors(own, saved, folder)
        for key, tensor in own.items():
            tensor.copy_(saved[key])


def _place(source: str | Path) -> str:
    return str(Path(source).resolve()) if Path(source).exists() else str(source)


def _forget_gguf(model: Any) -> None:
    """Makes an ordinary model of one whose weights were read from a GGUF file; they are no longer quantised."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


@contextlib.contextmanager
def _as_a_whole(model: Any) -> Iterator[None]:
    """Has transformers save the model, and not the adapters alone that its own `add_adapter` put on."""
    flag = "_hf_peft_config_loaded"
    loaded = getattr(model, flag, False)
    if loaded:
        setattr(model, flag, False)
    try:
        yield
    finally:
        if loaded:
            setattr(model, flag, True)
