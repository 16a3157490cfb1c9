"""A pretrained causal language model with its tokenizer, and the adapter of whoever uses it: loaded late, saved whole.

Several components may share one loaded model, with an adapter each; `PretrainedLM` is one component's view of it.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import weakref
from collections.abc import Collection, Hashable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from sysdag.components import adapter
from sysdag.components.adapter_support import check_config
from sysdag.components.component import named_source
from sysdag.components.language import model_source
from sysdag.components.precision import dtype_named
from sysdag.errors import DataError, PlanError, SerializationError

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# The component folder that each shared base was last written to, so that its other components can refer to it.
_bases_written: weakref.WeakKeyDictionary[Any, Path] = weakref.WeakKeyDictionary()


class PretrainedLM:
    """One component's model, tokenizer and adapter.

    Args:
        model, tokenizer, peft_config, model_kwargs: see `CausalLM`.

    Attributes:
        adapter: the name of its adapter on the model; None without one, or before the model is loaded.
        adapter_off: whether it works without that adapter.
        is_reference: whether it is what another one is compared with.
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
        self._given = str(model) if isinstance(model, (str, Path)) else type(model).__name__
        self._source: Any = model
        self._tokenizer_source: Any = model if tokenizer is None else tokenizer
        self._peft_config = peft_config
        self._adapter_folder: Path | None = None
        self._is_resolved = False
        self._trains_in_fp32 = False
        self._changed_base = False
        self._num_embeddings: int | None = None
        self._saved_base: str | None = None
        self._base_owner: PretrainedLM | None = None
        self.is_reference = False
        self._model: Any = None
        self._config: Any = None
        self._tokenizer: Any = None
        self._named_ends: list[Any] | None = None
        self.adapter: str | None = None
        self.adapter_off = False
        self.model_kwargs = model_source.loading_options(model_kwargs or {}, f"CausalLM({self._given!r})")
        if not isinstance(model, (str, Path)):
            model_source.check_architecture(_dict_of(model.config), self._given)
            if self.model_kwargs:
                raise PlanError(
                    f"CausalLM({self._given!r}): model_kwargs {sorted(self.model_kwargs)} choose how a model is "
                    "loaded, but this one is; leave them out."
                )
        elif Path(model).is_dir():
            self._resolve()
        if peft_config is not None:
            check_config(peft_config, repr(self))

    def _resolve(self) -> None:
        """Finds out what the name points at, once: an adapter's folder stands for its base with that adapter on it.

        Raises:
            PlanError: for a folder that is not there, or holds something else than a causal model or an adapter.
        """
        if self._is_resolved or not isinstance(self._source, (str, Path)):
            return
        folder = self._folder()
        if folder is not None:
            if "gguf_file" not in self.model_kwargs:
                model_source.check_folder(folder)
            base = model_source.adapter_base(folder)
            if base is not None:
                if self._peft_config is not None:
                    raise PlanError(
                        f"CausalLM({self._given!r}): an adapter, which trains as it is; leave peft_config out, or give "
                        f"the base {base!r} for a new one."
                    )
                revision = adapter.read_config(folder).revision
                self.model_kwargs = {name: v for name, v in self.model_kwargs.items() if name != "revision"}
                self.model_kwargs |= {"revision": revision} if revision else {}
                if self._tokenizer_source is self._source:
                    self._tokenizer_source = folder if (folder / "tokenizer_config.json").is_file() else base
                self._adapter_folder, self._source = folder, base
        self._is_resolved = True

    def _folder(self) -> Path | None:
        """The local folder that was named; for an adapter on the Hub the one in its cache; None for other names."""
        if Path(self._source).is_dir():
            return Path(self._source)
        model_source.check_name(self._source)
        from transformers.utils.peft_utils import find_adapter_config_file

        options = {k: v for k, v in model_source.finding(self.model_kwargs).items() if k in _OF_A_FILE}
        if find_adapter_config_file(str(self._source), **options) is None:
            return None
        from huggingface_hub import snapshot_download

        taken = {k: v for k, v in options.items() if k != "subfolder"}
        return Path(snapshot_download(str(self._source), allow_patterns=_ADAPTER_FILES, **taken))

    def __repr__(self) -> str:
        adapted = " + adapter" if self._peft_config is not None or self._adapter_folder is not None else ""
        return f"CausalLM({self._given!r}{adapted})"  # what users wrote: errors name it

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
            self._resolve()
            if isinstance(self._tokenizer_source, (str, Path)):
                from transformers import AutoTokenizer

                # Only of the model's own repository does a revision or a file say something.
                named = model_source.finding(self.model_kwargs) if self._tokenizer_source == self._source else {}
                try:
                    self._tokenizer = AutoTokenizer.from_pretrained(self._tokenizer_source, **named)
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
            self._resolve()
            if isinstance(self._source, (str, Path)):
                from transformers import AutoConfig

                try:
                    self._config = AutoConfig.from_pretrained(self._source, **model_source.finding(self.model_kwargs))
                except OSError as error:
                    raise OSError(f"{self!r}: its config cannot be loaded. {error}") from error
                model_source.check_architecture(_dict_of(self._config), self._given)
            else:
                self._config = self._source.config
        return self._config if self._model is None else self._model.config

    @property
    def adapter_config(self) -> PeftConfig | None:
        """Of its adapter, a saved one or a new one; no weights are loaded for it."""
        if self._peft_config is None and self._base_owner is None:
            self._resolve()
        return self._peft_config if self._adapter_folder is None else adapter.read_config(self._adapter_folder)

    def _load_model(self) -> Any:
        config = self.config
        model: Any = self._source if self._base_owner is None else self._base_owner.module
        if isinstance(model, (str, Path)):
            model = self._load_base(config)
        owner = self._base_owner
        self._num_embeddings = _num_embeddings(model) if owner is None else owner._num_embeddings
        if (adapter_config := self.adapter_config) is not None:
            if self._adapter_folder is not None:
                self._make_room(model, self._adapter_folder)
            self.adapter = adapter.attach(model, adapter_config, repr(self), new=self._adapter_folder is None)
            if self._adapter_folder is not None:
                adapter.load(model, self.adapter, self._adapter_folder)
        elif adapter.brought(model):
            model, self.adapter = adapter.adopt(model, repr(self))
        if self.adapter is not None:
            adapter.prepare_quantized(model)
        return model

    def _load_base(self, config: Any) -> Any:
        from transformers import AutoModelForCausalLM

        options = self.model_kwargs | ({"dtype": torch.float32} if self._trains_in_fp32 else {})
        model = AutoModelForCausalLM.from_pretrained(self._source, **options)
        if "gguf_file" in self.model_kwargs:
            _forget_gguf(model)
        return model

    def _make_room(self, model: Any, folder: Path) -> None:
        """For the embeddings that an adapter brings of a vocabulary which was extended."""
        if self._brought_rows > _num_embeddings(model):
            model.resize_token_embeddings(self._brought_rows, mean_resizing=False)
        self._changed_base = self._saved_base is None and adapter.brings_embeddings(folder)

    def prepare_training(self) -> None:
        """Has weights that train by themselves be fp32, unless another dtype was asked for.

        Raises:
            PlanError: see `reference`.
        """
        self._resolve()
        is_named = isinstance(self._source, (str, Path))
        if not is_named or self.adapter_config is not None or model_source.chosen_dtype(self.model_kwargs) is not None:
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

    def dtype(self, trains: bool) -> torch.dtype:
        """Of the model's weights, without loading them.

        Args:
            trains: whether they would train, if there is no adapter to do that (see `prepare_training`).
        """
        loaded = self._source if self._model is None else self._model
        if isinstance(loaded, nn.Module):
            return next(p.dtype for p in loaded.parameters() if p.is_floating_point())
        config = self.config
        if (chosen := model_source.chosen_dtype(self.model_kwargs)) is not None:
            return chosen
        named = getattr(config, "dtype", None)
        return (
            torch.float32
            if named is None or (trains and self.adapter_config is None)
            else dtype_named(named, repr(self))
        )

    @property
    def num_embeddings(self) -> int | None:
        """How many token ids the model knows; no weights are loaded for it."""
        if self._model is not None:
            return _num_embeddings(self._model)
        size = getattr(self.config.get_text_config(decoder=True), "vocab_size", None)
        return None if size is None else max(size, self._brought_rows)

    @cached_property
    def _brought_rows(self) -> int:
        """Of the embeddings that its saved adapter brings of a vocabulary which was extended."""
        found = {} if self._adapter_folder is None else adapter.saved_embeddings(self._adapter_folder)
        return max((shape[0] for shape in found.values()), default=0)

    def check_ids(self, ids: Collection[int], what: str, element: int) -> None:
        """Refuses a token that the model has no embedding for.

        Args:
            what: that the tokens are of.

        Raises:
            DataError: naming the token and the model's size.
        """
        size, largest = self.num_embeddings, max(ids, default=-1)
        if size is not None and largest >= size:
            token = self.tokenizer.convert_ids_to_tokens(largest) if largest < len(self.tokenizer) else None
            raise DataError(
                f"{self!r}: {what} has the token id {largest}, but the model has {size}"
                f"{'' if token is None else f' (the token is {token!r})'}. The tokenizer is of another model, or has "
                "tokens that were added: then make room for them before training "
                "(model.resize_token_embeddings(len(tokenizer))).",
                element=element,
            )

    @contextlib.contextmanager
    def at_work(self) -> Iterator[Any]:
        """The model with this component's own adapter in charge, or none."""
        model = self.module
        if self.adapter_off or (self.adapter is None and adapter.names(model)):
            with adapter.switched_off(model):
                yield model
        elif self.is_reference and self.adapter is not None:
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
        model = self.module  # whose loading tells whether there is an adapter
        self.tokenizer.save_pretrained(folder)
        if self.adapter is None:
            self._save_base(folder)
            return self._kept_options(weights_are_saved=True)
        adapter.save(model, self.adapter, folder)
        is_named = isinstance(self._source, (str, Path)) and self._saved_base is None
        if is_named and not self._changed_base and self._num_embeddings == _num_embeddings(model):
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
            model.save_pretrained(folder, **({"state_dict": adapter.base_state(model)} if carries else {}))

    @classmethod
    def load(cls, folder: Path, saved: Mapping[str, Any]) -> Self:
        """A view of what `save` wrote and returned; nothing loads yet.

        Raises:
            SerializationError: for a shared base that is no component beside it.
        """
        options = model_source.from_json(saved.get("model_kwargs", {}))
        if "base" not in saved:
            return cls(folder, None, model_kwargs=options)
        base, owner = saved["base"], saved.get("base_of", folder.name)
        if Path(owner).name != owner:
            raise SerializationError(f"base_of must name a component of the saved system, got {owner!r}.")
        made = cls(folder.parent / owner / "base" if base is None else base, folder, model_kwargs=options)
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
        if isinstance(self._source, (str, Path)):
            return id(self)
        model = self._source
        return id(model.get_base_model() if hasattr(model, "get_base_model") else model)

    def may_share_with(self, owner: PretrainedLM) -> bool:
        """Whether both put an adapter on the model of one name, loaded alike, and this one has not loaded it yet."""
        return (
            self._model is None
            and self._base_owner is None
            and owner.base_key != self.base_key
            and all(isinstance(each._source, (str, Path)) and each._has_own_adapter for each in (self, owner))
            and _place(self._source) == _place(owner._source)
            and self._comparable_options() == owner._comparable_options()
        )

    @property
    def _has_own_adapter(self) -> bool:
        if self._adapter_folder is not None:
            return not adapter.saved_embeddings(self._adapter_folder)
        return self._peft_config is not None

    def _comparable_options(self) -> dict[str, Any]:
        return {
            name: value.to_dict() if hasattr(value, "to_dict") else value for name, value in self.model_kwargs.items()
        }

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


# Of the options that a repository is found by, those of one of its files; and the files of an adapter there.
_OF_A_FILE = ("revision", "subfolder", "token", "cache_dir", "force_download", "local_files_only")
_ADAPTER_FILES = ["adapter_*", "*token*", "*.jinja", "vocab*", "merges.txt", "special_*"]


def _dict_of(config: Any) -> dict[str, Any]:
    return config.to_dict() if hasattr(config, "to_dict") else {}


def _num_embeddings(model: Any) -> int:
    return model.get_input_embeddings().weight.shape[0]


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
