"""One adapter of the peft library on a model: put on, adopted, copied for a reference, taken off.

The layers are injected in place, so the model keeps its class and any model of torch can carry one. Several components
may put an adapter each on one base model. Its layers are `adapter_layers`'s, its tensors `adapter_weights`'s, and what
is saved of one `adapter_files`'s.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sysdag.components import adapter_support as support
from sysdag.components.adapter_effect import effect, is_rescaled
from sysdag.components.adapter_layers import activate, all_names, layers_of, settle_modes
from sysdag.components.adapter_weights import SHELL, base_storage, buffers, cast, fill, parameters, state
from sysdag.errors import PlanError

if TYPE_CHECKING:
    from peft import PeftConfig

_NAME, _REFERENCE = "sysdag", "reference"
_ROUNDING, _UNITS = 1e-4, 4  # by which a new adapter may change a layer's output: relative, and in machine precisions
_adopted: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()  # what PeftModels brought, by model


def attach(model: Any, config: PeftConfig, owner: str = "", *, new: bool = True) -> str:
    """Puts an adapter on `model` in place and returns its name; of the weights, only adapters require gradients.

    Its layers are in the mode, train or eval, of those that they adapt.

    Args:
        owner: what errors name; by default the class of the model.
        new: whether it starts to train from here; False for one whose weights `load` brings.

    Raises:
        PlanError: for a model that carries adapters from elsewhere, a config that peft cannot put on this model or that
            `check_config` refuses, or a new adapter that changes what the model computes before it has trained.
    """
    owner = owner or f"The {type(model).__name__}"
    support.check_config(config, owner, new=new)
    name = _attach(model, config, owner)
    size = effect(layers_of(model), name) if new else 0
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if size is not None and size > max(_ROUNDING, _UNITS * torch.finfo(dtype).eps):
        zeros = _without_direction(model) if getattr(config, "use_dora", False) else None
        _drop(model, name)
        raise PlanError(f"{owner}: {support.of_its_start(config) if zeros is None else support.of_zeros(zeros)}")
    return name


def _without_direction(model: nn.Module) -> str | None:
    """The first adapted layer whose weight has an output of zeros alone."""
    for name, layer in model.named_modules():
        weight = getattr(getattr(layer, "base_layer", None), "weight", None)
        if weight is not None and hasattr(layer, "lora_magnitude_vector") and not weight.flatten(1).any(1).all():
            return name
    return None


def _attach(model: Any, config: PeftConfig, owner: str) -> str:
    foreign = [name for name in all_names(model) if name not in names(model)]
    if foreign:
        raise PlanError(
            f"{owner}: the {type(model).__name__} already carries adapters {foreign} of its own. Merge them into its "
            "weights (merge_and_unload; fuse_lora and unload_lora in diffusers) before it gets one to train."
        )
    config = copy.deepcopy(config)  # peft writes into it, and several components may be given the same
    config.base_model_name_or_path = config.base_model_name_or_path or getattr(model, "name_or_path", None)
    config.inference_mode = False
    before = base_storage(model)
    name = _inject(model, config, _NAME, owner)
    if tied := getattr(config, "target_modules_to_tie", None):
        _drop(model, name)
        raise PlanError(
            f"{owner}: ensure_weight_tying with {sorted(tied)} among the target modules ties "
            "an adapter's tensors by views, which do not follow the model to a device or into a copy. Leave it out, or "
            "train the embeddings whole (modules_to_save)."
        )
    after = base_storage(model)
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    if changed:
        raise PlanError(
            f"{owner}: an adapter of this peft_config ({support.kind_of(config)}) changes the base model's weights "
            f"({len(changed)} of them, the first is {changed[0]!r}): switched off, it would not leave the model that "
            "you gave. Load the model anew and use a config that leaves it as it is."
        )
    return name


def adopt(given: Any, owner: str = "") -> tuple[Any, str]:
    """The model inside a PeftModel, or one that its own `add_adapter` put adapters on; and the active adapter's name.

    Raises:
        PlanError: for a kind of adapter that `attach` refuses, several active ones, none, or one that is merged or is
            scaled otherwise than its config says.
    """
    owner = owner or f"The {type(given).__name__}"
    model = given.get_base_model() if hasattr(given, "get_base_model") else given
    if type(given).__name__ == "PeftMixedModel":
        model = given.base_model.model
    for config in given.peft_config.values():
        support.check_config(config, owner, new=False)
    layers = layers_of(model)
    active = sorted({name for layer in layers for name in layer.active_adapters})
    if len(active) != 1:
        raise PlanError(
            f"{owner}: the {type(given).__name__} has the active adapters {active}; activate one (set_adapter)."
        )
    config = given.peft_config[active[0]]
    if any(getattr(layer, "merged", False) for layer in layers):
        raise PlanError(
            f"{owner}: the {type(given).__name__}'s adapter is merged into its weights; call unmerge_adapter() first."
        )
    if any(layer.disable_adapters for layer in layers):
        raise PlanError(f"{owner}: its adapters are switched off; switch them on (enable_adapters).")
    check_scale(model, active[0], owner)
    _adopted.setdefault(model, set()).add(active[0])
    if support.shares_state(config):
        object.__setattr__(model, SHELL, given)
    settle_modes(model)
    return model, active[0]


def check_scale(model: Any, name: str, owner: str) -> None:
    """Refuses an adapter whose scale was changed behind its config, which is all that a copy or a folder has of it."""
    if is_rescaled(layers_of(model), name, model.peft_config[name]):
        raise PlanError(
            f"{owner}: the scale of the adapter {name!r} was changed (set_scale, scale_layer; set_adapters in "
            "diffusers), which neither a saved adapter nor its reference would have. Set it back to 1, or put it into "
            "the weights: add_weighted_adapter([name], [scale], new_name), merge_and_unload(); fuse_lora and "
            "unload_lora_weights in diffusers."
        )


def check_not_emptied(model: Any, owner: str) -> None:
    """Refuses a model whose adapters were all deleted: peft's layers stay, and with them other names of its weights."""
    if not all_names(model) and layers_of(model):
        raise PlanError(
            f"{owner}: its adapters were deleted, and peft's layers are still around its weights, which would be saved "
            "under names that no library reads. Take them off as well (unload(); unload_lora_weights() in diffusers), "
            "or load the model anew."
        )


def names(model: Any) -> list[str]:
    """The adapters on the model that belong to components; not those that its owner put there."""
    adopted = _adopted.get(model, ())
    return [name for name in all_names(model) if name.startswith((_NAME, _REFERENCE)) or name in adopted]


def brought(model: Any) -> bool:
    """Whether the model carries adapters that no component put there: it is a PeftModel, or has used `add_adapter`."""
    return any(not name.startswith((_NAME, _REFERENCE)) for name in all_names(model))


def freeze_copy(model: Any, name: str) -> tuple[Any, str]:
    """A copy of an adapter as it is now, to be its reference; it never requires gradients.

    Returns:
        The model that carries it and its name there: the same model, or a copy of all of it where the adapter's layers
        share state, of which a model has one.
    """
    config = copy.deepcopy(model.peft_config[name])
    if _stands_alone(model, config):
        return copy.deepcopy(model).requires_grad_(False).eval(), name
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # the weights are replaced, so no costlier start is needed
    made = _inject(model, config, _REFERENCE, f"The {type(model).__name__}")
    weights = state(model, name)
    cast(model, state(model, made), {key: weights[key].dtype for key in weights})
    fill(model, made, weights)
    _copy_buffers(model, name, made)
    for parameter in parameters(model, made).values():
        parameter.requires_grad_(False)
    activate(model, name)
    return model, made


def _copy_buffers(model: nn.Module, name: str, other: str) -> None:
    """What an adapter holds beside its parameters: indices, masks and projections, some drawn at random."""
    theirs = buffers(model, other)
    with torch.no_grad():
        for key, buffer in buffers(model, name).items():
            theirs[key].copy_(buffer)


def _inject(model: Any, config: PeftConfig, wanted: str, owner: str) -> str:
    """Adds an adapter under a free name; what trained before still does, beside it only the new one."""
    from peft import PeftModel, inject_adapter_in_model

    taken, kind = all_names(model), support.kind_of(config)
    free = [wanted, *(f"{wanted}_{number}" for number in range(1, len(taken) + 1))]
    name = next(candidate for candidate in free if candidate not in taken)
    others = {support.kind_of(other) for other in _configs(model)} - {kind}
    alone = [support.kind_of(other) for other in [*_configs(model), config] if _stands_alone(model, other)]
    if taken and (others or alone):
        beside = (
            f"of type {alone[0]} stands alone" if alone else f"of type {kind} cannot lie beside one of {others.pop()}"
        )
        raise PlanError(
            f"{owner}: an adapter {beside} on a model, and this one carries {taken}. Give it a model of its own."
        )
    trained = {id(parameter): parameter.requires_grad and bool(taken) for parameter in model.parameters()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
        try:
            if support.shares_state(config):
                shell = PeftModel(model, config, adapter_name=name)
                object.__setattr__(model, SHELL, shell)  # no submodule of the model that it wraps
            else:
                inject_adapter_in_model(config, model, adapter_name=name)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, TypeError, RuntimeError, AttributeError, ImportError) as error:
            raise PlanError(f"{owner}: peft cannot put this adapter of type {kind} on it. {error}") from error
    _widen(model, name)
    for parameter in model.parameters():
        if id(parameter) in trained:  # some versions of peft freeze the adapters that were there
            parameter.requires_grad_(trained[id(parameter)])
    settle_modes(model)
    return name


def _configs(model: Any) -> list[Any]:
    return list(getattr(model, "peft_config", {}).values())


def _stands_alone(model: Any, config: Any) -> bool:
    """Whether peft can put no second adapter beside this one.

    Its layers share state, or it adapts embeddings that are tied to the head, which peft 0.21 ties for the first alone.
    """
    tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    ties = support.kind_of(config) == "TRAINABLE_TOKENS" or getattr(config, "ensure_weight_tying", False)
    return support.shares_state(config) or (tied and ties)


def _drop(model: Any, name: str) -> None:
    """Takes a refused adapter off again."""
    for layer in layers_of(model):
        layer.delete_adapter(name, *([[]] if hasattr(layer, "original_module") else []))
    del model.peft_config[name]
    model.__dict__.pop(SHELL, None)
    if not all_names(model):
        _unwrap(model)


def _unwrap(model: nn.Module) -> None:
    """Puts what peft's layers are around back into its place."""
    layers = {id(layer) for layer in layers_of(model)}
    taken: list[str] = []
    for name, layer in list(model.named_modules()):
        if id(layer) in layers and not name.startswith(tuple(f"{outer}." for outer in taken)):
            parent, _, own = name.rpartition(".")
            base = layer.original_module if hasattr(layer, "original_module") else layer.get_base_layer()
            setattr(model.get_submodule(parent), own, base)
            taken.append(name)


def _widen(model: Any, name: str) -> None:
    """Has an adapter on a 16-bit model be fp32, as in a PeftModel: in 16 bits most updates would be lost to rounding.

    LayerNorm tuning stays as it is: its copies of norms run in their place.
    """
    from peft.tuners.tuners_utils import cast_adapter_dtype

    kind = model.peft_config[name].peft_type
    if getattr(kind, "value", kind) != "LN_TUNING":
        cast_adapter_dtype(model, name)


def prepare_quantized(model: Any) -> None:
    """What training an adapter on a base that bitsandbytes quantised needs beyond `attach`.

    Of peft's `prepare_model_for_kbit_training`: inputs of the first layer require gradients, so that gradient
    checkpointing reaches the adapters (the base is frozen by `attach`). Its cast of every 16-bit weight to fp32 is left
    out: policy and reference share those weights, and autocast computes norms in fp32 by itself.
    """
    if is_quantized(model):
        model.enable_input_require_grads()


def is_quantized(model: Any) -> bool:
    """Whether bitsandbytes holds the model's weights in 4 or 8 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))
