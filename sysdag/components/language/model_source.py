"""What a language model is loaded from: what a name points at, and the options that its loading takes.

A folder or Hub id may hold a causal model, an adapter of the peft library, or something that is none; the last is
refused by what it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from sysdag.components.precision import dtype_name, dtype_named
from sysdag.errors import PlanError, SerializationError

# Options of `from_pretrained` that the tokenizer and the config are found by, too.
_OF_A_FILE = ("revision", "subfolder", "token", "cache_dir", "force_download", "local_files_only")
_FINDING = (*_OF_A_FILE, "trust_remote_code", "gguf_file")
# What a saved system may choose; everything else is the machine's (device_map, cache_dir) or must be said in code.
_SAVED = ("dtype", "revision", "subfolder", "variant", "attn_implementation", "quantization_config", "gguf_file")
_OF_THE_MODEL = ("dtype", "attn_implementation")  # those that still hold for the weights once they are saved
_OF_THE_MACHINE = (
    "device_map", "max_memory", "offload_folder", "offload_state_dict", "offload_buffers", "low_cpu_mem_usage",
    "tp_plan", "tp_size", "device_mesh", "token", "cache_dir", "force_download", "local_files_only", "proxies",
    "use_safetensors",
)  # fmt: skip
_ATTENTION = re.compile(r"(paged\|)?[a-z0-9_]+")
_PLAIN_FILE = re.compile(r"[\w.-]+")
_QUANTISERS = ("bitsandbytes",)


def loading_options(given: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Options of `from_pretrained`, `torch_dtype` under its name of today and dtypes as torch has them.

    Raises:
        PlanError: for a dtype that is none, or two that differ.
    """
    options = dict(given)
    old = options.pop("torch_dtype", None)
    named = options.get("dtype") if options.get("dtype") is not None else old
    if isinstance(named, Mapping):  # by part of a model, as transformers takes it
        options["dtype"] = dict(named)
    elif named is not None:
        options["dtype"] = named if named == "auto" else dtype_named(named, owner)
        both = old is not None and given.get("dtype") not in (None, "auto")
        if both and dtype_named(old, owner) != options["dtype"]:
            raise PlanError(f"{owner}: dtype={given['dtype']!r} and torch_dtype={old!r} differ; keep dtype.")
    else:
        options.pop("dtype", None)
    return options


def chosen_dtype(options: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that was asked for; None where it is the checkpoint's."""
    found = options.get("dtype")
    return found if isinstance(found, torch.dtype) else None


def finding_a_file(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that any file of the same repository is found by."""
    return {name: options[name] for name in _OF_A_FILE if name in options}


def finding(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that a tokenizer and a config of the same repository are found by."""
    return {"trust_remote_code": False} | {name: options[name] for name in _FINDING if name in options}


def to_json(options: Mapping[str, Any], *, weights_are_saved: bool) -> dict[str, Any]:
    """What a saved system keeps of the options, ready for JSON; see `from_json`.

    Args:
        weights_are_saved: keeps only what holds for the saved weights, too: not where the first ones came from.
    """
    kept = _OF_THE_MODEL if weights_are_saved else _SAVED
    found = {name: options[name] for name in kept if options.get(name) is not None}
    if isinstance(found.get("dtype"), torch.dtype):
        found["dtype"] = dtype_name(found["dtype"])
    if not isinstance(found.get("dtype", ""), str):
        del found["dtype"]  # by part
    if "attn_implementation" in found and not _is_attention(found["attn_implementation"]):
        del found["attn_implementation"]  # a kernel from the Hub is code, which a saved system does not choose
    if hasattr(found.get("quantization_config"), "to_dict"):
        found["quantization_config"] = found["quantization_config"].to_dict()
    if "quantization_config" in found and _quantiser(found["quantization_config"]) not in _QUANTISERS:
        del found["quantization_config"]
    return found


def not_saved(options: Mapping[str, Any]) -> list[str]:
    """The options that change what a model is and that a saved system does not keep."""
    kept = to_json(options, weights_are_saved=False)
    return sorted(name for name in options if name not in kept and name not in _OF_THE_MACHINE)


def from_json(saved: Any) -> dict[str, Any]:
    """Options of a saved system, which may choose among few: it must not run code or read other files.

    Raises:
        SerializationError: naming the option that is none of those, or whose value is no plain one.
    """
    if not isinstance(saved, Mapping):
        raise SerializationError(f"model_kwargs must be an object, got {saved!r}.")
    options = dict(saved)
    for name, value in saved.items():
        if name not in _SAVED:
            raise SerializationError(
                f"model_kwargs: a saved system may not choose {name!r}, only {list(_SAVED)}; give it in code."
            )
        if name == "quantization_config":
            options[name] = _read_quantisation(value)
        elif not isinstance(value, str):
            raise SerializationError(f"model_kwargs: {name} must be a text, got {value!r}.")
    if "dtype" in options:
        try:
            options = loading_options(options, "model_kwargs")
        except PlanError as error:
            raise SerializationError(str(error)) from error
    if not _is_attention(options.get("attn_implementation", "eager")):
        raise SerializationError(
            f"model_kwargs: attn_implementation={options['attn_implementation']!r} would load code from the Hub."
        )
    for name in ("gguf_file", "variant"):
        if name in options and not _PLAIN_FILE.fullmatch(options[name]):
            raise SerializationError(f"model_kwargs: {name} must be a file's plain name, got {options[name]!r}.")
    if "subfolder" in options and ".." in Path(options["subfolder"]).parts + (options["subfolder"][:1] == "/") * (
        "..",
    ):
        raise SerializationError(f"model_kwargs: subfolder={options['subfolder']!r} leads out of the repository.")
    return options


def _is_attention(name: Any) -> bool:
    return isinstance(name, str) and bool(_ATTENTION.fullmatch(name))


def _quantiser(config: Any) -> str | None:
    method = config.get("quant_method") if isinstance(config, Mapping) else None
    return getattr(method, "value", method)


def _read_quantisation(value: Any) -> Any:
    plain = (str, int, float, bool, type(None))
    items = value.items() if isinstance(value, Mapping) else [("", object())]
    for _, content in items:
        listed = isinstance(content, list) and all(isinstance(each, str) for each in content)
        if not isinstance(content, plain) and not listed:
            raise SerializationError(f"model_kwargs: quantization_config must hold plain values, got {value!r}.")
    if _quantiser(value) not in _QUANTISERS:
        raise SerializationError(
            f"model_kwargs: quantization_config must be of one of {list(_QUANTISERS)}, got {_quantiser(value)!r}."
        )
    from transformers import BitsAndBytesConfig

    known = BitsAndBytesConfig().to_dict()
    for field in value:
        if field not in known:
            raise SerializationError(f"model_kwargs: quantization_config has no field {field!r}.")
    return BitsAndBytesConfig.from_dict({name: each for name, each in value.items() if name != "quant_method"})


def check_name(name: str | Path, kind: str = "CausalLM") -> None:
    """Refuses a path to a folder that is not there.

    Raises:
        PlanError: for what can only be a path: a `Path`, or a text that begins as one or has more than one `/`.
    """
    text = str(name)
    is_path = isinstance(name, Path) or text.startswith((".", "/", "~", "\\")) or text.count("/") > 1 or "\\" in text
    if is_path and not Path(name).exists():
        expanded = " (~ is not expanded; use Path.expanduser)" if text.startswith("~") else ""
        raise PlanError(f"{kind}({text!r}): there is no folder {text}{expanded}. Give a model's folder or a Hub id.")


def check_folder(folder: Path, kind: str, check: Callable[[Mapping[str, Any]], None]) -> None:
    """Refuses a folder of something else than a model of a kind or an adapter, by what it is.

    Args:
        check: refuses a model by its config.

    Raises:
        PlanError: saying what takes it.
    """
    if (folder / "model_index.json").is_file():
        raise PlanError(f"{kind}({str(folder)!r}): a pipeline folder of diffusers; use Diffusion({str(folder)!r}).")
    if (folder / "system.json").is_file():
        raise PlanError(
            f"{kind}({str(folder)!r}): a saved system; use System.from_pretrained({str(folder)!r}), or give the "
            "folder of one of its components."
        )
    config = _read(folder / "config.json")
    if config is not None:
        check(config)
    elif not any((folder / name).is_file() for name in ("adapter_config.json", "modules.json")):
        for what, files in (("adapters", "*/adapter_config.json"), ("checkpoints", "checkpoint-*/config.json")):
            if inside := sorted(str(found.parent) for found in folder.glob(files)):
                raise PlanError(
                    f"{kind}({str(folder)!r}): the folder holds {what} in folders of its own, and no model itself. "
                    f"Give one of {inside}."
                )


def check_architecture(config: Mapping[str, Any], name: str) -> None:
    """Refuses models that are no causal language models, though transformers may load them as such.

    Args:
        config: a model's, as a dict.

    Raises:
        PlanError: for an encoder-decoder or an encoder that attends in both directions.
    """
    kind = config.get("model_type") or "?"
    if config.get("is_encoder_decoder"):
        raise PlanError(f"CausalLM({name!r}): {kind} is an encoder-decoder; use Seq2Seq({name!r}).")
    if _is_of_images(kind):
        raise PlanError(
            f"CausalLM({name!r}): {kind} is a vision-language model; use ImageTextToText({name!r}), whose prompts may "
            "hold images."
        )
    if _is_masked(kind) and not (config.get("is_decoder") or config.get("causal")):
        raise PlanError(
            f"CausalLM({name!r}): {kind} is an encoder, whose tokens attend to those that follow, so its outputs are "
            "no probabilities of a next token. Use a decoder-only model; for a checkpoint that was trained as a "
            "decoder, set is_decoder=True in its config."
        )


def _is_of_images(kind: str) -> bool:
    """Whether transformers knows models of this kind as vision-language models, and not as causal ones."""
    from transformers.models.auto import modeling_auto

    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return kind in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and kind not in causal


def _is_masked(kind: str) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def adapter_base(folder: Path, kind: str) -> str | None:
    """The base model of an adapter's folder; None for a folder that holds no adapter.

    Raises:
        PlanError: where the adapter does not say what it belongs to.
    """
    config = _read(folder / "adapter_config.json")
    if config is None:
        return None
    if (folder / "base" / "config.json").is_file():  # as `PretrainedLM.save` writes a base that has no name
        return str(folder / "base")
    base = config.get("base_model_name_or_path")
    if not base:
        raise PlanError(
            f"{kind}({str(folder)!r}): an adapter whose adapter_config.json names no base model. Give the base: "
            f"{kind}(base), with PeftModel.from_pretrained(base, folder) as the model."
        )
    return str(base)


def _read(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise PlanError(f"{file} is not valid JSON: {error}") from error
    return found if isinstance(found, dict) else None
