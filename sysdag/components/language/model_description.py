"""What is known of a pretrained language model without its weights: where it is, its config, tokenizer, adapter."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from sysdag.components import adapter_files
from sysdag.components.acceleration import uncompiled
from sysdag.components.adapter_support import check_config
from sysdag.components.component import named_source
from sysdag.components.language import model_source
from sysdag.components.language.gguf_file import GgufFile
from sysdag.components.precision import dtype_named
from sysdag.components.saved_tokenizer import read_tokenizer
from sysdag.errors import DataError, PlanError
from sysdag.files.hub import reaching
from sysdag.files.saved_files import is_a, reading

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Of an adapter in a repository.
_ADAPTER_FILES = ["adapter_*", "*token*", "*processor*", "*.jinja", "vocab*", "merges.txt", "special_*"]


class ModelDescription:
    """A model by its name, folder or object, as far as that says: no weights are loaded here.

    Args:
        model, tokenizer, peft_config, model_kwargs: see `CausalLM`.

    Class attributes:
        kind: the component that it is for, as users write it.
        reader: what they give beside a loaded model.
        reader_files: one of which a folder has that holds it.
    """

    kind: ClassVar[str] = "CausalLM"
    reader: ClassVar[str] = "tokenizer"
    reader_files: ClassVar[tuple[str, ...]] = ("tokenizer_config.json",)

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: str | Path | PreTrainedTokenizerBase | None,
        *,
        peft_config: PeftConfig | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(model, (str, Path)) and tokenizer is None:
            raise PlanError(f"{self.kind}(model) was given a loaded model; pass its {self.reader} too.")
        model = uncompiled(model)
        self._given = str(model) if isinstance(model, (str, Path)) else type(model).__name__
        self._source: Any = model
        self._tokenizer_source: Any = model if tokenizer is None else tokenizer
        self._peft_config = peft_config
        self._adapter_folder: Path | None = None
        self.saved_folder: Path | None = None
        self.was_saved = False  # whether it is a view of what `save` wrote
        self._is_resolved = False
        self._trains_in_fp32 = False
        self._changed_base = False
        self._num_embeddings: int | None = None
        self._saved_base: str | None = None
        self._base_owner: Any = None  # another `PretrainedLM`
        self.is_reference = False
        self._model: Any = None
        self._config: Any = None
        self._tokenizer: Any = None
        self._gguf: GgufFile | None = None
        self._generation_config: Any = None
        self.adapter: str | None = None
        self.adapter_off = False
        self.model_kwargs = model_source.loading_options(model_kwargs or {}, f"{self.kind}({self._given!r})")
        if not isinstance(model, (str, Path)):
            self._check_architecture(_dict_of(model.config))
            if self.model_kwargs:
                raise PlanError(
                    f"{self.kind}({self._given!r}): model_kwargs {sorted(self.model_kwargs)} choose how a model is "
                    "loaded, but this one is; leave them out."
                )
        elif Path(model).is_dir():
            self._resolve()
        if peft_config is not None:
            check_config(peft_config, repr(self))

    def read_from(self, folder: Path, *, trust_remote_code: bool) -> None:
        """See `Component`."""
        self.saved_folder = folder
        if trust_remote_code:
            self.model_kwargs["trust_remote_code"] = True

    @property
    def trusts_remote_code(self) -> bool:
        """Whether its repository's own code may run."""
        return self.model_kwargs.get("trust_remote_code") is True

    def _resolve(self) -> None:
        """Finds out what the name points at, once: an adapter's folder stands for its base with that adapter on it.

        Raises:
            PlanError: for a folder that is not there, or holds something else than a causal model or an adapter.
        """
        if self._is_resolved or not self.is_named:
            return
        folder = self._folder()
        if folder is not None:
            if "gguf_file" not in self.model_kwargs:
                model_source.check_folder(folder, self.kind, self._check_architecture)
            base = model_source.adapter_base(folder, self.kind)
            if base is not None:
                if self._peft_config is not None:
                    raise PlanError(
                        f"{self.kind}({self._given!r}): an adapter, which trains as it is; leave peft_config out, or "
                        f"give the base {base!r} for a new one."
                    )
                revision = adapter_files.read_config(folder).revision
                of_the_adapter = ("revision", "subfolder")
                self.model_kwargs = {name: v for name, v in self.model_kwargs.items() if name not in of_the_adapter}
                self.model_kwargs |= {"revision": revision} if revision else {}
                if self._tokenizer_source is self._source:
                    there = any((folder / name).is_file() for name in self.reader_files)
                    self._tokenizer_source = folder if there else base
                self._adapter_folder, self._source = folder, base
        self._is_resolved = True

    def _check_architecture(self, config: Mapping[str, Any]) -> None:
        """Refuses a model of another kind, by its config as a dict."""
        model_source.check_architecture(config, self._given)

    def _folder(self) -> Path | None:
        """The local folder that was named; for an adapter on the Hub the one in its cache; None for other names."""
        inside = self.model_kwargs.get("subfolder") or ""
        if Path(self._source).is_dir():
            return Path(self._source, inside)
        model_source.check_name(self._source, self.kind)
        from transformers.utils.peft_utils import find_adapter_config_file

        options = model_source.finding_a_file(self.model_kwargs)
        with reaching(self._source):
            if find_adapter_config_file(str(self._source), **options) is None:
                return None
            from huggingface_hub import snapshot_download

            taken = {k: v for k, v in options.items() if k != "subfolder"}
            files = [f"{inside}/{name}".lstrip("/") for name in _ADAPTER_FILES]
            return Path(snapshot_download(str(self._source), allow_patterns=files, **taken), inside)

    def __repr__(self) -> str:
        adapted = " + adapter" if self._peft_config is not None or self._adapter_folder is not None else ""
        return f"{self.kind}({self._given!r}{adapted})"  # what users wrote: errors name it

    @property
    def base_model(self) -> str | None:
        """See `Component`."""
        return named_source(self._source) if self._base_owner is None else self._base_owner.base_model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            self._resolve()
            if isinstance(self._tokenizer_source, (str, Path)):
                # Only of the model's own repository does a revision or a file say something.
                trusted = self.model_kwargs.get("trust_remote_code", False)
                named = model_source.finding(self.model_kwargs if self._tokenizer_source == self._source else {})
                named["trust_remote_code"] = trusted
                with reading(self.saved_folder):
                    try:
                        with reaching(self._tokenizer_source):
                            found = read_tokenizer(self._tokenizer_source, as_saved=self.was_saved, **named)
                    except (OSError, ValueError) as error:
                        raise OSError(f"{self!r}: its tokenizer cannot be loaded. {error}") from error
                if "gguf_file" in named:
                    self.gguf.fit_tokenizer(found, repr(self))
                self._tokenizer = found
            else:
                self._tokenizer = self._tokenizer_source
            with reading(self.saved_folder):
                self._check_tokenizer(self._tokenizer)
        return self._tokenizer

    def _check_tokenizer(self, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise PlanError(f"{self!r}: the tokenizer has no end-of-sequence token; set tokenizer.eos_token.")

    @property
    def config(self) -> Any:
        """The model's config; no weights are loaded for it."""
        if self._model is None and self._base_owner is not None:
            return self._base_owner.config
        if self._model is None and self._config is None:
            self._resolve()
            if self.is_named:
                from transformers import AutoConfig

                with reading(self.saved_folder):
                    try:
                        with reaching(self._source):
                            options = model_source.finding(self.model_kwargs)
                            found = AutoConfig.from_pretrained(self._source, **options)
                    except (OSError, ValueError) as error:
                        raise OSError(f"{self!r}: its config cannot be loaded. {error}") from error
                if "gguf_file" in options:
                    self.gguf.check_config(found, repr(self))
                self._config = found
                self._check_architecture(_dict_of(self._config))
            else:
                self._config = self._source.config
        return self._config if self._model is None else self._model.config

    @property
    def gguf(self) -> GgufFile:
        """What the file says that `gguf_file` names; see `sysdag.components.language.gguf_file`."""
        if self._gguf is None:
            from transformers.utils.hub import cached_file

            options = model_source.finding_a_file(self.model_kwargs)
            path = cached_file(str(self._source), self.model_kwargs["gguf_file"], **options)
            assert path is not None  # else cached_file raises
            self._gguf = GgufFile.read(Path(path), repr(self))
        return self._gguf

    @property
    def adapter_config(self) -> PeftConfig | None:
        """Of its adapter, a saved one or a new one; no weights are loaded for it."""
        if self._peft_config is None and self._base_owner is None:
            self._resolve()
        return self._peft_config if self._adapter_folder is None else adapter_files.read_config(self._adapter_folder)

    @property
    def eos_token_ids(self) -> list[int]:
        """The tokens that end a completion: the tokenizer's, then those of the generation config."""
        configured = self._configured_ends()
        listed = configured if isinstance(configured, list) else [] if configured is None else [configured]
        if not all(is_a(end, (int,)) for end in listed):
            with reading(self.saved_folder):
                raise PlanError(
                    f"{self!r}: eos_token_id of its generation config must be token ids, got {configured!r}."
                )
        return list(dict.fromkeys([self.tokenizer.eos_token_id, *listed]))

    def _configured_ends(self) -> Any:
        return getattr(self._configured(), "eos_token_id", None)

    def _configured(self) -> Any:
        """The model's generation config, one made of its config where it has none; loads no weights."""
        if self._model is None and self._base_owner is not None:
            return self._base_owner._configured()
        source = self._source if self._model is None else self._model
        if not isinstance(source, (str, Path)):
            return getattr(source, "generation_config", None)
        if self._generation_config is None:
            from transformers import GenerationConfig

            self._resolve()
            found = model_source.finding(self.model_kwargs)
            is_there = (Path(self._source) / "generation_config.json").exists()
            try:
                with reading(self.saved_folder if is_there else None), reaching(self._source):
                    self._generation_config = GenerationConfig.from_pretrained(self._source, **found)
            except OSError:  # the model has none; transformers then makes one of its config
                self._generation_config = GenerationConfig.from_model_config(self.config)
        return self._generation_config

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
            return num_embeddings_of(self._model)
        size = getattr(self.config.get_text_config(decoder=True), "vocab_size", None)
        return None if size is None else max(size, self._brought_rows)

    @property
    def num_target_embeddings(self) -> int | None:
        """As `num_embeddings`, of what is written, whose vocabulary may be another one than that of what is read."""
        return self.num_embeddings

    @cached_property
    def _brought_rows(self) -> int:
        """Of the embeddings that its saved adapter brings of a vocabulary which was extended."""
        found = {} if self._adapter_folder is None else adapter_files.saved_embeddings(self._adapter_folder)
        return max((shape[0] for shape in found.values()), default=0)

    def check_ids(self, ids: Collection[int], what: str, element: int) -> None:
        """Refuses a token that the model has no embedding for.

        Args:
            what: that the tokens are of.

        Raises:
            DataError: naming the token and the model's size.
        """
        self._check_below(self.num_embeddings, ids, what, element)

    def check_target_ids(self, ids: Collection[int], element: int) -> None:
        """As `check_ids`, of a completion."""
        self.check_ids(ids, "a completion", element)

    def _check_below(self, size: int | None, ids: Collection[int], what: str, element: int) -> None:
        largest = max(ids, default=-1)
        if size is not None and largest >= size:
            token = self.tokenizer.convert_ids_to_tokens(largest) if largest < len(self.tokenizer) else None
            raise DataError(
                f"{self!r}: {what} has the token id {largest}, but the model has {size}"
                f"{'' if token is None else f' (the token is {token!r})'}. The tokenizer is of another model, or has "
                "tokens that were added: then make room for them before training "
                "(model.resize_token_embeddings(len(tokenizer))).",
                element=element,
            )

    @property
    def is_named(self) -> bool:
        """Whether the model is read from a name or folder, and not an object that was given."""
        return isinstance(self._source, (str, Path))


def _dict_of(config: Any) -> dict[str, Any]:
    return config.to_dict() if hasattr(config, "to_dict") else {}


def num_embeddings_of(model: Any) -> int:
    """How many token ids a loaded model has a row for."""
    return model.get_input_embeddings().weight.shape[0]
