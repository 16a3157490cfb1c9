"""Folders of sentence-transformers: what becomes of a text beside the transformer, read and written.

A folder lists its modules in modules.json: a Transformer, a Pooling, and any of Dense and Normalize behind it. Prompts
and the similarity are in config_sentence_transformers.json, the longest text in sentence_bert_config.json.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sysdag.components.precision import widened
from sysdag.errors import PlanError

logger = logging.getLogger(__name__)
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
"""Ways to pool, in the order in which sentence-transformers joins their vectors."""
_OLD_NAMES = {
    "cls": "pooling_mode_cls_token", "max": "pooling_mode_max_tokens", "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens", "lasttoken": "pooling_mode_lasttoken",
}  # fmt: skip
SIMILARITIES = ("cosine", "dot")
_OTHER_NAMES = ("passage", "corpus")  # of prompts that may be meant for documents


@dataclass(frozen=True)
class Dense:
    """A linear layer behind the pooling.

    Attributes:
        inputs, outputs: its width.
        bias: whether it has one.
        activation: the name of a class of `torch.nn`.
        folder: its weights'; None for new ones.
    """

    inputs: int
    outputs: int
    bias: bool
    activation: str
    folder: Path | None = None

    def build(self) -> nn.Sequential:
        """The layer with its weights."""
        made = nn.Sequential(nn.Linear(self.inputs, self.outputs, bias=self.bias), getattr(nn, self.activation)())
        if self.folder is not None:
            from safetensors.torch import load_file

            saved = load_file(self.folder / "model.safetensors")
            made[0].load_state_dict({name.removeprefix("linear."): tensor for name, tensor in saved.items()})
        return made


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What makes a vector of a text.

    Attributes:
        transformer: the folder of the transformer below that of the whole; "" for the same.
        pooling: ways to pool, whose vectors are joined.
        layers: behind the pooling; None is a normalisation to length 1.
        query_prompt, document_prompt: stand before every text of that kind.
        max_length: most tokens of a text; None leaves it to the tokenizer and the model.
        lower_case: whether texts are read in lower case.
        similarity: `cosine` or `dot`.
    """

    transformer: str = ""
    pooling: tuple[str, ...] = ("mean",)
    layers: tuple[Dense | None, ...] = ()
    query_prompt: str = ""
    document_prompt: str = ""
    max_length: int | None = None
    lower_case: bool = False
    similarity: str = "cosine"

    def changed(self, owner: str, **given: Any) -> Recipe:
        """With options of a user, where they are not None.

        Raises:
            PlanError: for one out of range.
        """
        if isinstance(given.get("pooling"), str):
            given["pooling"] = (given["pooling"],)
        made = replace(self, **{name: value for name, value in given.items() if value is not None})
        if not made.pooling or not set(made.pooling) <= set(MODES):
            raise PlanError(f"{owner}: pooling must be one or several of {list(MODES)}, got {list(made.pooling)}.")
        if made.similarity not in SIMILARITIES:
            raise PlanError(f"{owner}: similarity must be one of {list(SIMILARITIES)}, got {made.similarity!r}.")
        if made.max_length is not None and made.max_length < 1:
            raise PlanError(f"{owner}: max_length must be 1 or more, got {made.max_length}.")
        return made


def read(owner: str, found: Callable[[str], Path | None]) -> Recipe | None:
    """The recipe of a folder or repository; None where it has no modules.json.

    Args:
        owner: what errors name.
        found: the local path of one of its files; None where there is none.

    Raises:
        PlanError: for a module or an option that makes another vector than is made here, naming it.
    """
    listed = found("modules.json")
    if listed is None:
        return None
    recipe, pools = Recipe(), False
    for module in json.loads(listed.read_text(encoding="utf-8")):
        kind, path = str(module["type"]).rpartition(".")[2], str(module.get("path", ""))
        if not str(module["type"]).startswith("sentence_transformers."):
            raise PlanError(f"{owner}: its module {module['type']} is code of its own, which sysdag does not run.")
        options = _json(found, f"{path}/config.json".lstrip("/")) if kind in ("Pooling", "Dense") else {}
        if kind == "Transformer":
            recipe = replace(recipe, transformer=path, **_of_transformer(owner, found, path))
        elif kind == "Pooling":
            recipe, pools = replace(recipe, pooling=_modes(options)), True
            includes = options.get("include_prompt", True)
        elif kind == "Normalize" and pools:
            recipe = replace(recipe, layers=(*recipe.layers, None))
        elif kind == "Dense" and pools:
            weights = found(f"{path}/model.safetensors".lstrip("/"))
            recipe = replace(recipe, layers=(*recipe.layers, _dense(owner, options, path, weights)))
        else:
            raise PlanError(
                f"{owner}: its module {kind} (modules.json) makes another vector than a BiEncoder does, which knows a "
                "Transformer, then Pooling, Dense and Normalize. Use a scorer of your own."
            )
    if not pools:
        raise PlanError(f"{owner}: modules.json lists no Pooling, so it makes no vector of a text.")
    config = _json(found, "config_sentence_transformers.json")
    recipe = replace(recipe, **_prompts(owner, config.get("prompts") or {}))
    if not includes and (recipe.query_prompt or recipe.document_prompt):
        raise PlanError(
            f"{owner}: it leaves its prompts' tokens out of the pooling (include_prompt), which is not served. Give "
            "query_prompt='' and document_prompt='', or a scorer of your own."
        )
    return recipe.changed(owner, similarity=config.get("similarity_fn_name"))


def _json(found: Callable[[str], Path | None], file: str) -> Any:
    path = found(file)
    return {} if path is None else json.loads(path.read_text(encoding="utf-8"))


def _of_transformer(owner: str, found: Callable[[str], Path | None], path: str) -> dict[str, Any]:
    options = _json(found, f"{path}/sentence_bert_config.json".lstrip("/"))
    task = options.get("transformer_task", "feature-extraction")
    if task != "feature-extraction":
        raise PlanError(f"{owner}: its transformer is for {task!r}, and gives no vectors of texts.")
    return {"max_length": options.get("max_seq_length"), "lower_case": bool(options.get("do_lower_case", False))}


def _modes(options: Mapping[str, Any]) -> tuple[str, ...]:
    named = options.get("pooling_mode")
    if named is not None:
        return (named,) if isinstance(named, str) else tuple(named)
    return tuple(mode for mode in MODES if options.get(_OLD_NAMES[mode])) or ("mean",)


def _dense(owner: str, options: Mapping[str, Any], path: str, weights: Path | None) -> Dense:
    activation = str(options.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")
    names = {options.get(name) or "sentence_embedding" for name in ("module_input_name", "module_output_name")}
    is_plain = activation[0].startswith("torch.nn.") and activation[2] in (*nn.modules.activation.__all__, "Identity")
    if not is_plain or options.get("use_residual") or names != {"sentence_embedding"} or weights is None:
        raise PlanError(
            f"{owner}: its Dense layer in {path!r} is not served: it needs model.safetensors, an activation of "
            "torch.nn and no residual, and to read and write the sentence's embedding."
        )
    return Dense(
        int(options["in_features"]), int(options["out_features"]), bool(options.get("bias", True)), activation[2],
        weights.parent,
    )  # fmt: skip


def _prompts(owner: str, prompts: Mapping[str, str | None]) -> dict[str, Any]:
    """Those named query and document, which `encode_query` and `encode_document` take."""
    others = [name for name in _OTHER_NAMES if prompts.get(name)]
    if others and not prompts.get("document"):
        logger.warning(
            "%s: its prompt %r is not put before options, as sentence-transformers' encode_document does not take it "
            "either; to have it there, give document_prompt=%r.", owner, others[0], prompts[others[0]],
        )  # fmt: skip
    return {"query_prompt": prompts.get("query") or "", "document_prompt": prompts.get("document") or ""}


def write(folder: Path, recipe: Recipe, layers: Sequence[nn.Module], width: int) -> None:
    """Writes all of a folder but the transformer, which lies in the folder itself.

    Args:
        layers: as `recipe.layers`, with their weights.
        width: of the transformer's vectors.
    """
    from safetensors.torch import save_file

    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    flags = {name: mode in recipe.pooling for mode, name in _OLD_NAMES.items()}
    pooling: dict[str, Any] = {"word_embedding_dimension": width, **flags, "include_prompt": True}
    if list(recipe.pooling) != [mode for mode in MODES if mode in recipe.pooling]:
        pooling["pooling_mode"] = list(recipe.pooling)  # an order that flags do not tell
    _write(folder / "1_Pooling" / "config.json", pooling)
    for place, (layer, module) in enumerate(zip(recipe.layers, layers, strict=True), start=2):
        name = f"{place}_{'Normalize' if layer is None else 'Dense'}"
        modules.append((name, name.partition("_")[2]))
        if layer is None:
            _write(folder / name / "config.json", {})
            continue
        kind = getattr(nn, layer.activation)
        options = {"in_features": layer.inputs, "out_features": layer.outputs, "bias": layer.bias}
        _write(folder / name / "config.json", {**options, "activation_function": f"{kind.__module__}.{kind.__name__}"})
        linear = module.get_submodule("0").state_dict()
        weights = {f"linear.{key}": tensor.detach().cpu().contiguous() for key, tensor in linear.items()}
        save_file(weights, folder / name / "model.safetensors")
    listed = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (path, kind) in enumerate(modules)
    ]
    _write(folder / "modules.json", listed)
    prompts = {"query": recipe.query_prompt, "document": recipe.document_prompt}
    config = {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": recipe.similarity}
    _write(folder / "config_sentence_transformers.json", config)
    _write(
        folder / "sentence_bert_config.json",
        {"max_seq_length": recipe.max_length, "do_lower_case": recipe.lower_case},
    )


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2), encoding="utf-8")


def pooled(hidden: torch.Tensor, mask: torch.Tensor, modes: Sequence[str]) -> torch.Tensor:
    """One vector a text.

    Args:
        hidden: of its tokens, (n, T, D), padded behind.
        mask: 1 for its tokens, (n, T).
        modes: of `MODES`; their vectors are joined in this order.
    """
    wide = widened(hidden)
    weights = mask.to(wide.dtype)[..., None]
    counts = weights.sum(1).clamp(min=1e-9)
    total = (wide * weights).sum(1)
    places = torch.arange(1, hidden.shape[1] + 1, device=hidden.device, dtype=wide.dtype)[None, :, None]

    def by(mode: str) -> torch.Tensor:
        match mode:
            case "cls":
                return wide[:, 0]
            case "max":
                return wide.masked_fill(weights == 0, -torch.inf).amax(1)
            case "mean":
                return total / counts
            case "mean_sqrt_len_tokens":
                return total / counts.sqrt()
            case "weightedmean":
                return (wide * weights * places).sum(1) / (weights * places).sum(1).clamp(min=1e-9)
        last = mask.sum(1).long() - 1
        return wide[torch.arange(len(wide), device=wide.device), last.clamp(min=0)]

    return torch.cat([by(mode) for mode in modes], -1)
