"""Which adapters of the peft library can be attached: those that act layer by layer and leave the base as it is."""

from __future__ import annotations

from typing import Any

from sysdag.errors import PlanError

_OPTIONS = {
    "alora_invocation_tokens": "is active from its invocation tokens on, which only PeftModel's own forward looks for",
    "arrow_config": "routes between other adapters of the same model, which only PeftModel's own forward sets up",
    "kasa_config": "takes a part of the base model's weights away",
    "layer_replication": "gives the base model more layers",
    "monteclora_config": "draws its weights at random in every forward of a training, and needs a loss of its own",
    "save_only_topk_weights": "saves too little to be trained further",
    "use_qalora": "acts on weights that GPTQ has quantised and is passed over by peft on others",
    "use_asa": "is told the step after each update (update_and_allocate), which no trainer here does",
}
_KINDS = {
    "ADALORA": "adds a loss in PeftModel's own forward and is told the step after each update (update_and_allocate)",
    "LILY": "routes by the mean over all tokens of a batch, so that a token's score depends on those behind it",
    "PVERA": "draws its weights at random in every forward of a training, so that no score belongs to its weights",
    "POLY": "chooses by the task_ids that only PeftModel's own forward takes",
    "SHADOW": "runs a second model in PeftModel's own forward",
    "XLORA": "mixes trained adapters in PeftModel's own forward",
}
# What peft makes from the weights themselves, or by numbers that it reads in the forward.
_NEED_NUMBERS = frozenset({"ADAMSS", "BOFT", "FOURIERFT", "FROD", "LOHA", "LOKR", "SHIRA", "WAVEFT"})
_RANDOM_STARTS = {  # and the option that starts at zero, where there is one
    "C3A": "init_weights",
    "FOURIERFT": "init_weights",
    "UNILORA": None,
    "VBLORA": None,
}
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")


def kind_of(config: Any) -> str:
    """The type of a config as peft spells it: `LORA`."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def shares_state(config: Any) -> bool:
    """Whether the adapter's layers share tensors that belong to none of them, as VeRA's projections do."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    return bool(getattr(tuner, "uses_shared_state", False)) or kind_of(config) == "RANDLORA"


def needs_numbers(config: Any) -> bool:
    """Whether an adapter cannot be made or run without numbers (on the meta device), so that its memory is not told."""
    return kind_of(config) in _NEED_NUMBERS or bool(getattr(config, "velora_config", None))


def check_config(config: Any, owner: str, *, new: bool = True) -> None:
    """Refuses a config whose adapter could not be scored, trained, saved and switched off like the others.

    Args:
        owner: what the adapter is for, to begin the message with.
        new: whether its weights are yet to be made; one that was made elsewhere may have started in more ways.

    Raises:
        PlanError: naming the type of adapter, the option and what to do.
    """
    kind = kind_of(config)
    reason = _KINDS.get(kind) or _of_its_own_forward(config)
    if reason is not None:
        raise PlanError(
            f"{owner}: peft_config is of type {kind}, which {reason}. Use LoraConfig or another config that adapts "
            "layers, each token by itself."
        )
    for option, reason in _OPTIONS.items():
        if getattr(config, option, None):
            raise PlanError(f"{owner}: peft_config ({kind}) has {option}, which {reason}. Leave {option} out.")
    bias, start = getattr(config, "bias", "none"), getattr(config, "init_lora_weights", True)
    if bias != "none":
        raise PlanError(
            f"{owner}: peft_config ({kind}) has bias={bias!r}, which trains biases of the base model: the reference "
            "could not be the adapter switched off. Use bias='none'."
        )
    kinds_option = _RANDOM_STARTS.get(kind)
    if new and kind in _RANDOM_STARTS and (kinds_option is None or getattr(config, kinds_option, None) is not True):
        raise PlanError(f"{owner}: {of_its_start(config)}")
    if start == "eva" and new:
        raise PlanError(
            f"{owner}: peft_config has init_lora_weights='eva', which needs data. Pass the model with the adapter on "
            "it (peft.get_peft_model, then peft.initialize_lora_eva_weights) and leave peft_config out."
        )
    if start == "mica":
        raise PlanError(
            f"{owner}: peft_config has init_lora_weights='mica', which trains one half of the adapter and keeps the "
            "other fixed; sysdag trains both. Use init_lora_weights=True."
        )
    if start not in _PLAIN_STARTS and start != "eva":
        raise PlanError(
            f"{owner}: peft_config has init_lora_weights={start!r}, which changes the base model's weights: switched "
            "off, the adapter would not leave the model that you gave. Use init_lora_weights=True."
        )


def of_its_start(config: Any) -> str:
    """What to say of a new adapter that changes the model before it has trained."""
    kind = kind_of(config)
    option = _RANDOM_STARTS.get(kind, "init_lora_weights" if hasattr(config, "init_lora_weights") else "init_weights")
    advice = (
        f"Set {option}=True, or pass" if option else "It cannot start at zero, where nothing of it would train; pass"
    )
    return (
        f"a new adapter of this peft_config ({kind}) makes another model of the one that you gave before it has "
        f"trained. {advice} the model with the adapter on it (peft.get_peft_model) and leave peft_config out: then the "
        "reference is that model as it starts."
    )


def of_zeros(layer: str) -> str:
    """What to say of DoRA on a layer that has outputs of zeros alone."""
    return (
        f"DoRA divides each output's weights by their length, and {layer} has outputs whose weights are all 0 (as in "
        "layers that were added to a model, or pruned): peft makes nan of them. Leave such layers out "
        "(exclude_modules), or set use_dora=False."
    )


def _of_its_own_forward(config: Any) -> str | None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    if getattr(config, "is_prompt_learning", False) or getattr(config, "is_adaption_prompt", False) or tuner is None:
        return "puts virtual tokens before each row or changes the model's forward"
    if getattr(tuner, "forward", BaseTuner.forward) is not BaseTuner.forward:
        return "works in PeftModel's own forward"
    return None
