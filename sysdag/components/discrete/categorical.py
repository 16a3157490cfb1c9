"""A choice among named options: a router, a retriever over a fixed set, a classifier."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sysdag.components.acceleration import uncompiled
from sysdag.components.component import named_source
from sysdag.components.discrete.values import Discrete
from sysdag.components.footprint import Footprint, bytes_of
from sysdag.components.loading_info import complete, is_of_head, without_new
from sysdag.components.precision import optimizer_bytes, widened
from sysdag.components.saved_tokenizer import read_tokenizer
from sysdag.components.text_batches import by_text
from sysdag.errors import DataError, DeclarationNeeded, PlanError, SerializationError, shown
from sysdag.files.hub import reaching
from sysdag.files.saved_files import only, reading, safetensors_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_SAVED: Mapping[str, tuple[type, ...]] = {
    "options": (list,), "max_length": (int, type(None)), "features": (int, type(None)),
}  # fmt: skip


class Categorical(Discrete):
    """One of several named options, by the logits of a classifier: exact.

    The node's function returns what the classifier reads: a string, where there is a tokenizer, or a vector of
    features (a list, array or tensor of one dimension).

    Args:
        options: the values, at least 2, all different.
        model: a sequence classifier of transformers (name, folder or object), the number of features of a linear
            classifier that starts uniform, or any module from features (n, D) to logits (n, options).
        tokenizer: of the sequence classifier; by default loaded from where the model is.
        max_length: longest input in tokens; longer ones lose tokens at their end.

    Raises:
        PlanError: for fewer than 2 options or repeated ones.
    """

    value_type = str

    def __init__(
        self,
        options: Sequence[str],
        model: str | Path | int | nn.Module,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        *,
        max_length: int | None = None,
    ) -> None:
        if len(options) < 2 or len(set(options)) < len(options):
            raise PlanError(f"Categorical needs at least 2 different options, got {list(options)}.")
        self.values = tuple(options)
        self._source = uncompiled(model)
        self._tokenizer_source = model if tokenizer is None and isinstance(model, (str, Path)) else tokenizer
        self._tokenizer: Any = None
        self._module: Any = None
        self.max_length = max_length
        self._trusts = self._was_saved = False

    def __repr__(self) -> str:
        return f"Categorical({list(self.values)})"

    @property
    def base_model(self) -> str | None:
        return named_source(self._source)

    @property
    def module(self) -> Any:
        if self._module is None:
            with reading(self.saved_folder):
                self._module = self._load_module()
        return self._module

    def _load_module(self) -> Any:
        if isinstance(self._source, nn.Module):
            return self._source
        if isinstance(self._source, int):
            linear = nn.Linear(self._source, len(self.values))
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
            return linear
        from transformers import AutoModelForSequenceClassification

        options: dict[str, Any] = {"num_labels": len(self.values), "trust_remote_code": self._trusts}
        options |= {"output_loading_info": True} | ({} if self.saved_folder is None else {"use_safetensors": True})
        try:
            with reaching(self._source):
                loaded = AutoModelForSequenceClassification.from_pretrained(self._source, **options)
        except (OSError, ValueError) as error:
            raise OSError(f"{self!r}: the model {str(self._source)!r} cannot be loaded. {error}") from error
        if self.saved_folder is None:
            return without_new(loaded, repr(self), is_of_head)
        return complete(loaded, self._source)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        if self._tokenizer is None and isinstance(self._tokenizer_source, (str, Path)):
            try:
                with reading(self.saved_folder), reaching(self._tokenizer_source):
                    self._tokenizer = read_tokenizer(
                        self._tokenizer_source, as_saved=self._was_saved, trust_remote_code=self._trusts
                    )
            except SerializationError:
                raise
            except (OSError, ValueError) as error:
                source = str(self._tokenizer_source)
                raise OSError(f"{self!r}: the tokenizer {source!r} cannot be loaded. {error}") from error
        elif self._tokenizer is None:
            self._tokenizer = self._tokenizer_source
        return self._tokenizer

    def tokens_of_any_draw(self) -> int | None:
        return 1 if isinstance(self._source, int) else None

    def footprint(self, *, tokens: int, labels: int, trains: bool, checkpoints: bool, device: str) -> Footprint | None:
        """See `Component`; of a linear classifier over features, of which a token is one input."""
        if not isinstance(self._source, int):
            return None
        numbers = [torch.empty(len(self.values), self._source + 1, device="meta")]  # the weight with the bias
        weights, saved = sum(map(bytes_of, numbers)), 4 * tokens * (self._source + 2 * len(self.values))
        return Footprint(
            weights=weights, trained=weights if trains else 0, optimizer=optimizer_bytes(numbers) if trains else 0,
            reference=weights if trains else 0, graph=saved if trains else 0, working=saved,
        )  # fmt: skip

    def logits(self, inputs: Sequence[Any]) -> Float[Tensor, "n values"]:
        if self.tokenizer is not None:
            for element, text in enumerate(inputs):
                if not isinstance(text, str):
                    raise DataError(f"{self!r} reads strings, got {text!r:.200}.", element=element)
            logits = self._read(list(inputs))
        else:
            logits = _logits(self.module(self._features(inputs)))
        if logits.shape != (len(inputs), len(self.values)):
            raise PlanError(
                f"{self!r}: the classifier must return logits of shape {(len(inputs), len(self.values))}, got "
                f"{tuple(logits.shape)}."
            )
        return widened(logits)

    def _read(self, texts: list[str]) -> Tensor:
        """The classifier's logits of each text, as it gives them for that text alone.

        Decoders classify at the last token that is not their config's padding, so without one each text is read alone.
        """
        assert self.tokenizer is not None
        config = getattr(self.module, "config", None)
        truncation = {"truncation": self.max_length is not None, "max_length": self.max_length}
        if config is None:  # a module of the user's own
            batch = self.tokenizer(texts, return_tensors="pt", padding=True, **truncation)
            return _logits(self.module(**batch.to(self.device)))
        rows = [self.tokenizer(text, **truncation) for text in texts]
        pad = getattr(config.get_text_config(), "pad_token_id", None)
        return by_text(self.module, rows, lambda batch: _logits(self.module(**batch)), device=self.device, pad=pad)

    def _features(self, inputs: Sequence[Any]) -> Float[Tensor, "n features"]:
        parameter = next(self.module.parameters())
        rows = []
        for element, row in enumerate(inputs):
            if isinstance(row, str):
                raise DataError(
                    f"{self!r} reads vectors (it has no tokenizer), got the string {row!r}.", element=element
                )
            rows.append(torch.as_tensor(row, dtype=parameter.dtype, device=parameter.device))
            if rows[-1].shape != rows[0].shape or rows[-1].ndim != 1:
                raise DataError(
                    f"{self!r} reads vectors of one length, got shape {tuple(rows[-1].shape)}.", element=element
                )
        return torch.stack(rows)

    def reference(self) -> Categorical:
        frozen = copy.copy(self)
        frozen._module = copy.deepcopy(self.module).requires_grad_(False).eval()
        return frozen

    def fresh(self) -> Categorical:
        if isinstance(self._source, nn.Module):
            super().fresh()
        made = copy.copy(self)
        made._module = None
        return made

    @property
    def _is_of_transformers(self) -> bool:
        """Whether transformers' auto classes build the classifier again from its folder."""
        return type(self.module).__module__.startswith("transformers.") and hasattr(self.module, "save_pretrained")

    def save_pretrained(self, folder: Path) -> Mapping[str, Any]:
        options = {"options": list(self.values), "max_length": self.max_length}
        if self._is_of_transformers:
            self.module.save_pretrained(folder)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
            return options
        from safetensors.torch import save_model

        save_model(self.module, str(folder / "model.safetensors"))
        return {**options, "features": self._source if isinstance(self._source, int) else None}

    @classmethod
    def from_pretrained(cls, folder: Path, options: Mapping[str, Any]) -> Self:
        options = only(options, _SAVED, cls.__name__, required=("options", "max_length"))
        if not all(isinstance(value, str) for value in options["options"]):
            raise SerializationError(
                f"{cls.__name__}: options must be a list of texts, got {shown(options['options'])}."
            )
        if "features" not in options:
            made = cls(options["options"], folder, max_length=options["max_length"])
            made._was_saved = True
            return made
        if options["features"] is None:
            raise DeclarationNeeded(
                f"{folder}: the classifier is a module of your own, which sysdag cannot build. Build the component and "
                "call its load_weights with this folder."
            )
        shape, expected = (
            safetensors_shapes(folder / "model.safetensors").get("weight"),
            (len(options["options"]), options["features"]),
        )
        if shape != expected:
            raise SerializationError(f"{folder}: the weight of its classifier has the shape {shape}, not {expected}.")
        made = cls(options["options"], options["features"], max_length=options["max_length"])
        made.load_weights(folder)
        return made

    @property
    def trusts_remote_code(self) -> bool:
        return self._trusts

    def read_from(self, folder: Path, *, trust_remote_code: bool) -> None:
        super().read_from(folder, trust_remote_code=trust_remote_code)
        self._trusts = trust_remote_code

    def refilled(self, folder: Path, options: Mapping[str, Any]) -> Self:
        if list(self.values) != options["options"]:
            raise SerializationError(
                f"{self!r} has other options than the one that was saved, {options['options']}; their order counts."
            )
        made = copy.copy(self)
        made._module = copy.deepcopy(self.module)
        made.max_length = options["max_length"]
        made.load_weights(folder)
        return made

    def load_weights(self, folder: Path) -> None:
        if self._is_of_transformers:
            given: dict[str, Any] = {"config": copy.deepcopy(self.module.config), "dtype": self.module.dtype}
            given |= {"use_safetensors": True, "output_loading_info": True}
            saved = complete(type(self.module).from_pretrained(folder, **given), folder)
            self.module.load_state_dict(saved.state_dict())
            return
        from safetensors.torch import load_model

        load_model(self.module, folder / "model.safetensors", device=str(self.device))


def _logits(output: Any) -> Tensor:
    return getattr(output, "logits", output)
