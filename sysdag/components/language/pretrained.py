"""A pretrained causal language model with its tokenizer, and the adapter of whoever uses it: loaded late, saved whole.

Several components may share one loaded model, with an adapter each; `PretrainedLM` is one component's view of it.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import nn

from sysdag.components import adapter
from sysdag.components.adapter_support import check_config
from sysdag.components.component import named_source
from sysdag.errors import PlanError, SerializationError

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The component folder that each shared base was last written to, so that its other components can refer to it.
_bases_written: weakref.WeakKeyDictionary[Any, Path] = weakref.WeakKeyDictionary()


class PretrainedLM:
    """One component's model, tokenizer and adapter.

    Args:
        model, tokenizer, peft_config, model_kwargs: see `CausalLM`.

    Attributes:
        adapter: the name of its adapter on the model; None without one, or before the model is loaded.
        adapter_off: whether it works without that adapter.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: str | Path | PreTrainedTokenizerBase | None,
        *,
        peft_config: PeftConfig | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(model, (str, Path)) and tokenizer is None:
            raise PlanError("CausalLM(model) was given a loaded model; pass its tokenizer too.")
        self._source = model
        self._tokenizer_source = model if tokenizer is None else tokenizer
        self._peft_config = peft_config
        self._adapter_folder: Path | None = None
        self._saved_base: str | None = None
        self._base_owner: PretrainedLM | None = None
        self._is_reference = False
        self._model: Any = None
        self._config: Any = None
        self._tokenizer: Any = None
        self._named_ends: list[Any] | None = None
        self.adapter: str | None = None
        self.adapter_off = False
        self.model_kwargs = dict(model_kwargs or {})
        if peft_config is not None:
            check_config(peft_config, repr(self))

    def __repr__(self) -> str:
        name = self._source if isinstance(self._source, (str, Path)) else type(self._source).__name__
        adapted = " + adapter" if self._peft_config is not None or self._adapter_folder is not None else ""
        return f"CausalLM({str(name)!r}{adapted})"  # what users wrote: errors name it

    @property
    def base_model(self) -> str | None:
        """See `Component`."""
        return named_source(self._source) if self._base_owner is None else self._base_owner.base_model

    @property
    def module(self) -> Any:
        """The model with the adapter, loaded on first access."""
        if self._model is None:
            self._model = self._load_model()
        return self._model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            if isinstance(self._tokenizer_source, (str, Path)):
                from transformers import AutoTokenizer

                try:
                    self._tokenizer = AutoTokenizer.from_pretrained(self._tokenizer_source)
                except OSError as error:
                    raise OSError(f"{self!r}: its tokenizer cannot be loaded. {error}") from error
            else:
                self._tokenizer = self._tokenizer_source
            if self._tokenizer.eos_token_id is None:
                raise PlanError(f"{self!r}: the tokenizer has no end-of-sequence token; set tokenizer.eos_token.")
        return self._tokenizer

    @property
    def config(self) -> Any:
        """The model's config; no weights are loaded for it."""
        if self._model is None and self._base_owner is not None:
            return self._base_owner.config
        if self._model is None and self._config is None:
            if isinstance(self._source, (str, Path)):
                from transformers import AutoConfig

                try:
                    self._config = AutoConfig.from_pretrained(self._source)
                except OSError as error:
                    raise OSError(f"{self!r}: its config cannot be loaded. {error}") from error
            else:
                self._config = self._source.config
        return self._config if self._model is None else self._model.config

    @property
    def adapter_config(self) -> PeftConfig | None:
        """Of its adapter, a saved one or a new one; no weights are loaded for it."""
        return self._peft_config if self._adapter_folder is None else adapter.read_config(self._adapter_folder)

    def _load_model(self) -> Any:
        model: Any = self._source if self._base_owner is None else self._base_owner.module
        if isinstance(model, (str, Path)):
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(model, **self.model_kwargs)
        if (config := self.adapter_config) is not None:
            self.adapter = adapter.attach(model, config, repr(self), new=self._adapter_folder is None)
            if self._adapter_folder is not None:
                adapter.load(model, self.adapter, self._adapter_folder)
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model, self.adapter = adapter.adopt(model, repr(self))
        if self.adapter is not None:
            adapter.prepare_quantized(model)
        return model

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Those of its adapter, where it has one; none where that is switched off."""
        if self.adapter_off:
            return {}
        model = self.module
        return dict(model.named_parameters()) if self.adapter is None else adapter.parameters(model, self.adapter)

    @property
    def eos_token_ids(self) -> list[int]:
        """The tokens that end a completion: the tokenizer's, then those of the generation config."""
        configured = self._configured_ends()
        listed = configured if isinstance(configured, list) else [] if configured is None else [configured]
        return list(dict.fromkeys([self.tokenizer.eos_token_id, *listed]))

    def _configured_ends(self) -> Any:
        """Those of the model's generation config, or of its config where it has none; loads no weights."""
        if self._model is None and self._base_owner is not None:
            return self._base_owner._configured_ends()
        source = self._source if self._model is None else self._model
        if not isinstance(source, (str, Path)):
            return getattr(getattr(source, "generation_config", None), "eos_token_id", None)
        if self._named_ends is None:
            from transformers import GenerationConfig

            try:
                found = GenerationConfig.from_pretrained(source).eos_token_id
            except OSError:  # the model has none; transformers then makes one of its config
                found = getattr(self.config, "eos_token_id", None)
            self._named_ends = [found]
        return self._named_ends[0]

    @property
    def pad_token_id(self) -> int:
        """What fills a batch; the end of sequence where the tokenizer has no padding."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    @contextlib.contextmanager
    def at_work(self) -> Iterator[Any]:
        """The model with this component's own adapter in charge, or none."""
        model = self.module
        if self.adapter_off or (self.adapter is None and adapter.names(model)):
            with adapter.switched_off(model):
                yield model
        elif self._is_reference and self.adapter is not None:
            with adapter.activated(model, self.adapter):
                yield model
        else:
            if self.adapter is not None:
                adapter.activate(model, self.adapter)
            yield model

    def reference(self) -> Self:
        """The adapter switched off while it changes nothing yet, else a frozen copy of it, on the same model.

        Without an adapter the whole model is copied.

        Raises:
            PlanError: if the model's own weights cannot train: quantised, or under adapters of other components.
        """
        model, view = self.module, copy.copy(self)
        view._is_reference = True
        if self.adapter is None:
            if adapter.names(model):
                raise PlanError(
                    f"{self!r} would train all weights of a model that carries the adapters {adapter.names(model)}. "
                    "Give it a peft_config too, or a model of its own."
                )
            if adapter.is_quantized(model):
                raise PlanError(f"{self!r}: quantised weights cannot train. Pass a peft_config, or trainable=False.")
            view._model = copy.deepcopy(model).requires_grad_(False).eval()
        elif adapter.is_identity(model, self.adapter):
            view.adapter_off = True
        else:
            view._model, view.adapter = adapter.freeze_copy(model, self.adapter)
        return view

    @property
    def is_named(self) -> bool:
        """Whether the model is read from a name or folder, and not an object that was given."""
        return isinstance(self._source, (str, Path))

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
        self.tokenizer.save_pretrained(folder)
        if self.adapter is None:
            self._save_base(folder)
            return {}
        adapter.save(self.module, self.adapter, folder)
        if isinstance(self._source, (str, Path)) and self._saved_base is None:
            return {"base": str(self._source)}
        written = _bases_written.get(self.module)
        if written is not None and written.parent == folder.parent and written != folder and written.is_dir():
            return {"base": None, "base_of": written.name}
        self._save_base(folder / "base")
        _bases_written[self.module] = folder
        return {"base": None}

    def _save_base(self, folder: Path) -> None:
        carries = bool(self.adapter or adapter.names(self.module))
        self.module.save_pretrained(folder, **({"state_dict": adapter.base_state(self.module)} if carries else {}))

    @classmethod
    def load(cls, folder: Path, saved: Mapping[str, Any]) -> Self:
        """A view of what `save` wrote and returned; nothing loads yet.

        Raises:
            SerializationError: for a shared base that is no component beside it.
        """
        if "base" not in saved:
            return cls(folder, None)
        base, owner = saved["base"], saved.get("base_of", folder.name)
        if Path(owner).name != owner:
            raise SerializationError(f"base_of must name a component of the saved system, got {owner!r}.")
        made = cls(folder.parent / owner / "base" if base is None else base, folder)
        made._adapter_folder = folder
        made._saved_base = owner if base is None else None
        return made

    @property
    def base_component(self) -> str | None:
        """The saved component whose base it shares, which may be its own; None for a base with a name."""
        return self._saved_base

    def share_base(self, owner: PretrainedLM) -> None:
        """Loads nothing of its own, but works on the base that another one loads."""
        self._base_owner = owner

    def load_weights(self, folder: Path) -> None:
        """Replaces the weights in place by those that `save` wrote."""
        model = self.module
        if self.adapter is not None:
            adapter.load(model, self.adapter, folder)
            return
        own = adapter.base_state(model)
        saved = type(model).from_pretrained(folder, dtype=model.dtype).state_dict()
        adapter.check_same_tensors(own, saved, folder)
        for key, tensor in own.items():
            tensor.copy_(saved[key])
