"""Every adapter method and option of the peft library on a tiny model: held to plain peft and transformers, or refused.

`METHODS` is the table, `compare` the oracles. `adapter_rows()` runs it for the documentation.
"""

import functools
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from tiny import char_tokenizer, llama
from trained_systems import draft_prompt, question
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from sysdag import PlanError, System
from sysdag.components import CausalLM

PROMPTS, TEXTS = ["ab", "a longer one", "z?"], ["x1", "", "some"]
ROUNDING = 1e-5  # of a text's log-probability in fp32, relative


def dense(**options: Any) -> Any:
    return llama(0, num_hidden_layers=1, **options)


def mixtral() -> Any:
    """A mixture of 4 experts, 2 of them a token, fused into 3-D parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = MixtralForCausalLM(
            MixtralConfig(
                vocab_size=45, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
                num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=128,
                pad_token_id=0, eos_token_id=1, bos_token_id=None,
            )
        )  # fmt: skip
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.3)
    return made.eval()


@dataclass(frozen=True)
class Method:
    """One row: a config of peft and the model it goes on.

    Attributes:
        refused: the words of its refusal, where it is refused.
        given: whether the component is given the PeftModel, whose start is the reference, rather than the config.
    """

    name: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    model: Callable[[], Any] = dense
    refused: str | None = None
    given: bool = False

    def make(self) -> Any:
        return getattr(peft, self.config)(**{"task_type": "CAUSAL_LM"} | self.options)

    def component(self) -> CausalLM:
        if self.given:
            return CausalLM(peft.get_peft_model(self.model(), self.make()), char_tokenizer())
        return CausalLM(self.model(), char_tokenizer(), peft_config=self.make())


ATTENTION = {"target_modules": ["q_proj", "o_proj"]}
LORA = {"r": 4, "lora_alpha": 16, **ATTENTION}


def tied() -> Any:
    return dense(tie_word_embeddings=True)


def lora(name: str, *, refused: str | None = None, model: Callable[[], Any] = dense, **options: Any) -> Method:
    return Method(f"LoRA, {name}", "LoraConfig", LORA | options, model, refused)


def virtual(name: str, config: str, **options: Any) -> Method:
    return Method(name, config, {"num_virtual_tokens": 3} | options, refused="virtual tokens")


METHODS = [
    Method("LoRA", "LoraConfig", LORA),
    lora("use_rslora", use_rslora=True),
    lora("use_dora", use_dora=True),
    lora("lora_bias", lora_bias=True),
    lora("lora_dropout", lora_dropout=0.5),
    lora("rank_pattern, alpha_pattern", rank_pattern={"q_proj": 2}, alpha_pattern={"o_proj": 3}),
    lora("exclude_modules", target_modules="all-linear", exclude_modules=["o_proj"]),
    lora("layers_to_transform", layers_to_transform=[0]),
    lora("all-linear", target_modules="all-linear"),
    lora("embeddings and head", target_modules=["embed_tokens", "lm_head"]),
    lora("modules_to_save", modules_to_save=["lm_head"]),
    lora("modules_to_save, tied", modules_to_save=["lm_head"], model=tied),
    lora("modules_to_save, both of a tie", modules_to_save=["embed_tokens", "lm_head"], model=tied),
    lora("ensure_weight_tying", modules_to_save=["embed_tokens"], ensure_weight_tying=True, model=tied),
    lora("ensure_weight_tying, tokens", trainable_token_indices=[3, 4], ensure_weight_tying=True, model=tied),
    lora("ensure_weight_tying, adapted embeddings", target_modules=["embed_tokens"], ensure_weight_tying=True,
         model=tied, refused="ensure_weight_tying.*modules_to_save"),
    lora("trainable_token_indices", trainable_token_indices=[3, 4, 5, 20]),
    lora("trainable_token_indices, tied", trainable_token_indices=[3, 4, 5, 20], model=tied),
    lora("init gaussian", init_lora_weights="gaussian"),
    lora("init orthogonal", init_lora_weights="orthogonal"),
    lora("init False", init_lora_weights=False, refused="before it has trained"),
    lora("init pissa", init_lora_weights="pissa", refused="init_lora_weights='pissa'"),
    lora("init pissa_niter", init_lora_weights="pissa_niter_4", refused="init_lora_weights='pissa_niter_4'"),
    lora("init olora", init_lora_weights="olora", refused="init_lora_weights='olora'"),
    lora("init corda", init_lora_weights="corda", refused="init_lora_weights='corda'"),
    lora("init loftq", init_lora_weights="loftq", loftq_config=peft.LoftQConfig(), refused="init_lora_weights='loftq'"),
    lora("init lora_ga", init_lora_weights="lora_ga", refused="init_lora_weights='lora_ga'"),
    lora("init mica", init_lora_weights="mica", refused="init_lora_weights='mica'.*keeps the other fixed"),
    lora("init eva", init_lora_weights="eva", refused="init_lora_weights='eva'.*initialize_lora_eva_weights"),
    lora("bias", bias="all", refused="bias='all'"),
    lora("alora_invocation_tokens", alora_invocation_tokens=[5, 6], refused="alora_invocation_tokens"),
    lora("layer_replication", layer_replication=[(0, 1), (0, 1)], refused="layer_replication"),
    lora("kasa_config", kasa_config=peft.KasaConfig(), refused="kasa_config"),
    lora("arrow_config", arrow_config=peft.ArrowConfig(), refused="arrow_config"),
    lora("monteclora_config", monteclora_config=peft.MontecloraConfig(), refused="monteclora_config"),
    lora("velora_config", velora_config=peft.tuners.lora.VeloraConfig()),
    lora("use_bdlora", use_bdlora=peft.tuners.lora.BdLoraConfig(["q_proj"], ["o_proj"], nblocks=2)),
    lora("use_qalora", use_qalora=True, qalora_group_size=4, refused="use_qalora"),
    lora("no such module", target_modules=["nowhere"], refused="LORA.*nowhere"),
    lora("experts, all-linear", target_modules="all-linear", model=mixtral),
    lora("experts, target_parameters", target_modules=["q_proj"],
         target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], model=mixtral),
    lora("one experts' parameter", target_modules=[], target_parameters=["experts.down_proj"], model=mixtral),
    Method("AdaLoRA", "AdaLoraConfig", {"total_step": 9, **ATTENTION}, refused="ADALORA.*update_and_allocate"),
    Method("AdaMSS", "AdamssConfig", {"r": 8, "num_subspaces": 2, "subspace_rank": 2, **ATTENTION}),
    Method("AdaMSS, use_asa", "AdamssConfig", {"use_asa": True, **ATTENTION}, refused="use_asa"),
    Method("BOFT", "BOFTConfig", {"boft_block_size": 4, **ATTENTION}),
    Method("LLaMA-Adapter", "AdaptionPromptConfig", {"adapter_len": 3, "adapter_layers": 1}, refused="ADAPTION_PROMPT"),
    Method("IA3", "IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    Method("BEFT", "BeftConfig", ATTENTION),
    Method("Lily", "LilyConfig", {"r": 4, **ATTENTION}, refused="LILY.*mean over all tokens"),
    Method("LoHa", "LoHaConfig", {"r": 4, **ATTENTION}),
    Method("LoKr", "LoKrConfig", {"r": 4, **ATTENTION}),
    Method("OFT", "OFTConfig", {"oft_block_size": 4, "r": 0, **ATTENTION}),
    Method("Poly", "PolyConfig", {"r": 4, "n_tasks": 2, **ATTENTION}, refused="POLY"),
    Method("LN tuning", "LNTuningConfig", {"target_modules": ["input_layernorm", "norm"]}),
    Method("VeRA", "VeraConfig", {"r": 4, **ATTENTION}),
    Method("VeRA, save_projection=False", "VeraConfig", {"r": 4, "save_projection": False, **ATTENTION}),
    Method("FRoD", "FrodConfig", {"progressbar": False, **ATTENTION}),
    Method("PVeRA", "PveraConfig", {"r": 4, **ATTENTION}, refused="PVERA"),
    Method("FourierFT", "FourierFTConfig", {"n_frequency": 40, "init_weights": True, **ATTENTION}),
    Method("FourierFT, random start", "FourierFTConfig", {"n_frequency": 40, **ATTENTION},
           refused="FOURIERFT.*init_weights=True"),
    Method("GLoRA", "GloraConfig", {"r": 4, **ATTENTION}),
    Method("X-LoRA", "XLoraConfig", {"hidden_size": 32, "adapters": {"0": "folder"}}, refused="XLORA"),
    Method("HRA", "HRAConfig", {"r": 4, **ATTENTION}),
    Method("VB-LoRA", "VBLoRAConfig", {"r": 2, "num_vectors": 8, "topk": 2, "vector_length": 8, **ATTENTION},
           refused="VBLORA.*get_peft_model"),
    Method("VB-LoRA, save_only_topk_weights", "VBLoRAConfig", {"vector_length": 8, "save_only_topk_weights": True},
           refused="VBLORA.*save_only_topk_weights"),
    Method("Uni-LoRA", "UniLoraConfig", {"r": 4, "theta_d_length": 64, **ATTENTION}, 
           refused="UNILORA.*get_peft_model"),
    Method("MiSS", "MissConfig", {"r": 4, **ATTENTION}),
    Method("MiSS, bat", "MissConfig", {"r": 4, "init_weights": "bat", **ATTENTION}),
    Method("MiSS, mini", "MissConfig", {"r": 4, "mini_r": 4, "init_weights": "mini", **ATTENTION}),
    Method("RandLoRA", "RandLoraConfig", {"r": 4, **ATTENTION}),
    Method("RoAd", "RoadConfig", {"group_size": 8, **ATTENTION}),
    Method("Trainable tokens", "TrainableTokensConfig", {"token_indices": [3, 4, 20]}),
    Method("Trainable tokens, tied", "TrainableTokensConfig", {"token_indices": [3, 4, 20]}, tied),
    Method("HiRA", "HiraConfig", {"r": 4, **ATTENTION}),
    Method("SHiRA", "ShiraConfig", {"r": 2, **ATTENTION}),
    Method("C3A", "C3AConfig", {"block_size": 8, "init_weights": True, **ATTENTION}),
    Method("C3A, random start", "C3AConfig", {"block_size": 8, **ATTENTION}, refused="C3A.*init_weights=True"),
    Method("WaveFT", "WaveFTConfig", {"n_frequency": 40, **ATTENTION}),
    Method("OSF", "OSFConfig", ATTENTION),
    Method("DeLoRA", "DeloraConfig", {"r": 4, **ATTENTION}),
    Method("GraLoRA", "GraloraConfig", {"r": 4, "gralora_k": 2, **ATTENTION}),
    Method("TinyLoRA", "TinyLoraConfig", {"r": 2, **ATTENTION}),
    Method("PSOFT", "PsoftConfig", {"r": 4, **ATTENTION}),
    Method("PEANuT", "PeanutConfig", {"r": 4, **ATTENTION}),
    Method("Shadow", "ShadowConfig", {}, refused="SHADOW"),
    Method("Supertuning", "SupertuningConfig", ATTENTION),
    Method("DEFT", "DeftConfig", {"r": 4, **ATTENTION}),
    virtual("Prompt tuning", "PromptTuningConfig"),
    virtual("Multitask prompt tuning", "MultitaskPromptTuningConfig"),
    virtual("P-tuning", "PromptEncoderConfig"),
    virtual("Prefix tuning", "PrefixTuningConfig"),
    Method("CPT", "CPTConfig", {"cpt_token_ids": [3, 4], "cpt_tokens_type_mask": [1, 2]}, refused="CPT"),
    virtual("Cartridge", "CartridgeConfig"),
]  # fmt: skip


GIVEN = (
    "LoRA, init False",
    "LoRA, init eva",
    "FourierFT, random start",
    "C3A, random start",
    "VB-LoRA",
    "Uni-LoRA",
    "VeRA",
)
METHODS += [
    replace(method, name=f"{method.name}, as a PeftModel", refused=None, given=True)
    for method in METHODS
    if method.name in GIVEN
]
METHODS += [
    replace(method, name=f"{method.name}, as a PeftModel", given=True)
    for method in METHODS
    if method.name in ("LoRA, init pissa", "LoRA, bias", "AdaLoRA", "Prompt tuning")
]


def expected(model: Any, component: CausalLM) -> torch.Tensor:
    """The texts' log-probabilities from the model's own forward, one row at a time."""
    rows = []
    draws = component.in_context(PROMPTS, component.observe(TEXTS))
    for prompt, draw in zip(component.prompt_ids(PROMPTS), draws, strict=True):
        completion = torch.tensor(draw.record["token_ids"])
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([[*prompt, *completion.tolist()]])).logits[0]
        scored = logits[len(prompt) - 1 : -1].log_softmax(-1)
        rows.append(scored.gather(1, completion[:, None]).sum())
    return torch.stack(rows)


def scores(component: CausalLM) -> torch.Tensor:
    with torch.no_grad():
        return component.log_prob(PROMPTS, component.observe(TEXTS))


def train(component: CausalLM) -> None:
    weights = [parameter for parameter in component.own_parameters().values() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.03, weight_decay=0)
    for _ in range(3):
        optimizer.zero_grad()
        (-component.log_prob(PROMPTS, component.observe(TEXTS)).sum()).backward()
        optimizer.step()


def compare(method: Method, folder: Path) -> Iterator[tuple[str, float]]:
    """The largest difference from each oracle, as a part of the log-probability, by the oracle's name.

    Raises:
        AssertionError: where training moved nothing, or a file holds a tensor that peft does not know.
    """
    torch.manual_seed(0)
    component = method.component()
    plain = expected(method.model(), component)
    if method.given:
        torch.manual_seed(0)
    start = expected(method.component().lm._source, component) if method.given else plain

    def worst(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one - other).abs().max() / other.abs().max())

    reference = component.reference()
    yield "the model that training starts from", worst(scores(reference), start)
    yield "margin before the first step, 0", worst(scores(component), scores(reference)) / 1e-30
    own = {id(parameter) for parameter in component.own_parameters().values() if parameter.requires_grad}
    assert own == {id(parameter) for parameter in component.module.parameters() if parameter.requires_grad}
    train(component)
    trained = scores(component)
    assert worst(trained, start) > 1e-3, "training moved nothing"
    yield "the same, after training", worst(scores(reference), start)
    saved = folder / "draft"
    System(question >> draft_prompt).with_components({"draft": component}).save_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(saved / "base")
    yield "the saved base, by transformers", worst(expected(base, component), plain)
    torch.manual_seed(1)
    theirs = peft.get_peft_model(method.model(), method.make())
    found = peft.set_peft_model_state_dict(theirs, load_file(saved / "adapter_model.safetensors"))
    assert not found.unexpected_keys, found.unexpected_keys
    yield "a PeftModel with the same state", worst(expected(theirs, component), trained)
    opened = peft.PeftModel.from_pretrained(base, saved)
    yield "PeftModel.from_pretrained", worst(expected(opened, component), trained)
    loaded = System.from_pretrained(folder)["draft"].component
    yield "System.from_pretrained", worst(scores(loaded), trained)
    yield "margin of the loaded one, 0", worst(scores(loaded), scores(loaded.reference())) / 1e-30
    fresh = method.component()
    fresh.load_weights(saved)
    yield "a checkpoint loaded into a new one", worst(scores(fresh), trained)


def refusal(method: Method) -> str | None:
    """What the component raises, or None."""
    try:
        method.component().module
    except PlanError as error:
        return str(error)
    return None


_COMPARED: dict[str, tuple[int, list[str]]] = {}


def compared(method: Method) -> tuple[int, list[str]]:
    """How many oracles a method was held to, and a line for each that says otherwise; once in a process."""
    if method.name not in _COMPARED:
        _COMPARED[method.name] = _compared(method)
    return _COMPARED[method.name]


def _compared(method: Method) -> tuple[int, list[str]]:
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        if method.refused is not None:
            said = refusal(method)
            right = said is not None and said.startswith("CausalLM('") and re.search(method.refused, said)
            return 1, [] if right else [f"expected a refusal that says {method.refused!r}, got {said!r}"]
        found = dict(compare(method, Path(folder)))
    return len(found), [f"{name}: {size:.2g}" for name, size in found.items() if not size <= ROUNDING]


def adapter_rows() -> Iterator[tuple[str, str, Callable[[], tuple[int, list[str]]]]]:
    """For the documentation: the method, what it is held to, and a check that gives cases and differences."""
    for method in METHODS:
        oracle = "plain peft, transformers" if method.refused is None else "refused by name"
        yield method.name, oracle, functools.partial(compared, method)
