"""What users of peft do to a model before they hand it over: scores beside plain peft, and folders read back."""

import peft
import pytest
import torch
from adapter_methods import dense
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from tiny import char_tokenizer, llama
from transformers import AutoModelForCausalLM

from sysdag import PlanError
from sysdag.components import CausalLM
from sysdag.errors import SerializationError

TEXTS = [("ab c", "yes"), ("d", "no no")]


def lora(**options):
    return LoraConfig(**({"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "o_proj"]} | options))


def moved(model):
    """The same model, its adapters away from where they began."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens_delta", "hada_")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def put_on(config=None, model=None, **options):
    """A PeftModel that was trained before."""
    return moved(get_peft_model(llama() if model is None else model, config or lora(**options)))


def with_two(active, **second):
    model = get_peft_model(llama(), lora())
    model.add_adapter("other", lora(**{"r": 2, "target_modules": ["v_proj"]} | second))
    model.set_adapter(active)
    return moved(model)


@torch.no_grad()
def plain_scores(model):
    """By the model's own forward, of one row at a time."""
    tokenizer, found = char_tokenizer(), []
    for prompt, completion in TEXTS:
        start, ends = tokenizer(prompt)["input_ids"], [*tokenizer(completion)["input_ids"], 1]
        log_probs = model(input_ids=torch.tensor([start + ends])).logits[0].log_softmax(-1)
        found.append(
            float(log_probs[torch.arange(len(start) - 1, len(start) + len(ends) - 1), torch.tensor(ends)].sum())
        )
    return found


@torch.no_grad()
def scores(component):
    prompts, completions = zip(*TEXTS, strict=True)
    return component.log_prob(list(prompts), component.observe(list(completions))).tolist()


def check(given, folder, wanted=None, tokenizer=None):
    """Scores, reference and saved folder are those of the model that was given; by plain peft and transformers, too."""
    wanted = pytest.approx(plain_scores(given) if wanted is None else wanted, abs=1e-4)
    component = CausalLM(given, char_tokenizer())
    assert scores(component) == wanted
    assert scores(component.reference()) == wanted
    again = CausalLM.from_pretrained(folder, component.save_pretrained(folder))
    assert scores(again) == wanted
    base = folder / "base" if component.lm.adapter else folder
    opened = AutoModelForCausalLM.from_pretrained(base)
    assert plain_scores(PeftModel.from_pretrained(opened, folder) if component.lm.adapter else opened) == wanted
    return component


def merged(scale=None):
    model = put_on()
    if scale is not None:
        model.add_weighted_adapter(["default"], [scale], "scaled")
        model.set_adapter("scaled")
    return model.merge_and_unload()


def unloaded():
    return put_on().unload()


def after_deleting(deleted, active="default"):
    model = with_two(active)
    model.delete_adapter(deleted)
    return model


def fused_and_back():
    model = put_on()
    model.merge_adapter()
    model.unmerge_adapter()
    return model


def by_its_own_methods():
    model = llama()
    model.add_adapter(lora(), "first")
    model.add_adapter(lora(r=2), "second")
    model.set_adapter("first")
    return moved(model)


def mixed(*others):
    model = PeftMixedModel(llama(), lora(), "default")
    for name in others:
        model.add_adapter(name, peft.LoHaConfig(r=2, target_modules=["v_proj"]))
    model.set_adapter(["default", *others])
    return moved(model)


def weighted(how):
    model = get_peft_model(llama(), lora())
    model.add_adapter("other", lora())
    moved(model)
    density = {} if how in ("linear", "svd", "cat") else {"density": 0.5}
    model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "sum", combination_type=how, **density)
    model.set_adapter("sum")
    return model


GIVEN = {
    "one of two": lambda: with_two("other"),
    "two with other modules whole": lambda: with_two("other", modules_to_save=["norm"]),
    "of another name": lambda: moved(get_peft_model(llama(), lora(), adapter_name="mine")),
    "the last one deleted": lambda: after_deleting("other"),
    "the active one deleted": lambda: after_deleting("other", "other"),
    "merged and unmerged": fused_and_back,
    "merged": merged,
    "merged at a scale": lambda: merged(0.3),
    "unloaded": unloaded,
    "the model inside": lambda: put_on().get_base_model(),
    "add_adapter of transformers": by_its_own_methods,
    "a mixed model of one": mixed,
    "patterns and rslora": lambda: put_on(
        use_rslora=True, rank_pattern={"layers.0.*q_proj": 2}, alpha_pattern={"o_proj": 3}
    ),
    "a sum, linear": lambda: weighted("linear"),
    "a sum, svd": lambda: weighted("svd"),
    "a sum, cat": lambda: weighted("cat"),
    "a sum, ties": lambda: weighted("ties"),
    "a sum, dare_linear": lambda: weighted("dare_linear"),
    "a sum, magnitude_prune": lambda: weighted("magnitude_prune"),
}


@pytest.mark.parametrize("given", GIVEN)
def test_a_model_is_taken_as_it_is_given(given, tmp_path):
    check(GIVEN[given](), tmp_path)


EMBEDDINGS = {
    "adapted": {"target_modules": ["embed_tokens", "q_proj"]},
    "adapted, DoRA": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "adapted head": {"target_modules": ["lm_head"]},
    "both adapted": {"target_modules": ["embed_tokens", "lm_head"]},
    "whole": {"modules_to_save": ["embed_tokens"]},
    "whole head": {"modules_to_save": ["lm_head"]},
    "both whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "single tokens": {"trainable_token_indices": {"embed_tokens": [3, 4, 20]}},
}


def resized():
    model = llama()
    model.resize_token_embeddings(64)
    return model


@pytest.mark.parametrize("base", [llama, resized, lambda: dense(tie_word_embeddings=True)], ids=["", "resized", "tied"])
@pytest.mark.parametrize("options", EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_embeddings_of_every_kind_are_saved_as_they_score(options, base, tmp_path):
    check(put_on(model=base(), **options), tmp_path)


def scaled(how, config=None):
    model = put_on(config)
    for module in model.modules():
        if how == "set_scale" and hasattr(module, "set_scale"):
            module.set_scale("default", 0.3)
        if how == "scale_layer" and hasattr(module, "scale_layer"):
            module.scale_layer(0.3)
    return model


def emptied(*, own_methods=False):
    if own_methods:
        model = llama()
        model.add_adapter(lora())
    else:
        model = put_on()
    model.delete_adapter("default")
    return model


def switched_off():
    model = put_on()
    model.base_model.disable_adapter_layers()
    return model


def only_merged():
    model = put_on()
    model.merge_adapter()
    return model


def both_at_once():
    model = with_two("default")
    model.base_model.set_adapter(["default", "other"])
    return model


REFUSED = {
    "set_scale": (lambda: scaled("set_scale"), "scale of the adapter 'default' was changed.*add_weighted_adapter"),
    "scale_layer": (lambda: scaled("scale_layer"), "scale of the adapter 'default' was changed"),
    "a scale, LoHa": (
        lambda: scaled("set_scale", peft.LoHaConfig(r=2, target_modules=["q_proj"])),
        "scale of the adapter 'default' was changed",
    ),
    "all deleted": (emptied, r"its adapters were deleted.*unload\(\)"),
    "all deleted by transformers": (lambda: emptied(own_methods=True), "its adapters were deleted"),
    "switched off": (switched_off, "are switched off"),
    "merged, not unloaded": (only_merged, "unmerge_adapter"),
    "two at once": (both_at_once, r"active adapters \['default', 'other'\]"),
    "two kinds at once": (lambda: mixed("other"), r"active adapters \['default', 'other'\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_whose_folder_would_be_another_one_is_refused_by_name(case):
    make, message = REFUSED[case]
    with pytest.raises(PlanError, match=message):
        scores(CausalLM(make(), char_tokenizer()))


def test_a_scale_that_changes_later_is_not_saved_away(tmp_path):
    component = CausalLM(put_on(), char_tokenizer())
    with (
        peft.helpers.rescale_adapter_scale(component.module, 0.3),
        pytest.raises(PlanError, match="scale of the adapter"),
    ):
        component.save_pretrained(tmp_path / "scaled")
    assert component.save_pretrained(tmp_path / "plain")


def saved_adapter(folder, **options):
    """A base and an adapter in folders of peft and transformers; and the adapter's scores."""
    llama().save_pretrained(folder / "base")
    char_tokenizer().save_pretrained(folder / "base")
    model = put_on(model=AutoModelForCausalLM.from_pretrained(folder / "base"))
    model.save_pretrained(folder / "adapter", **options)
    return folder / "adapter", plain_scores(model)


def test_an_adapter_of_another_name_lies_in_a_folder_of_that_name(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    char_tokenizer().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = moved(get_peft_model(base, lora(), adapter_name="mine"))
    model.save_pretrained(tmp_path / "saved")
    wanted = pytest.approx(plain_scores(model), abs=1e-4)
    assert scores(CausalLM(tmp_path / "saved" / "mine")) == wanted
    component = CausalLM(tmp_path / "saved", model_kwargs={"subfolder": "mine"})
    assert scores(component) == wanted
    assert scores(CausalLM.from_pretrained(tmp_path / "ours", component.save_pretrained(tmp_path / "ours"))) == wanted
    base.save_pretrained(tmp_path / "whole" / "checkpoint-5")
    with pytest.raises(PlanError, match=r"holds checkpoints in folders of its own.*checkpoint-5"):
        scores(CausalLM(tmp_path / "whole"))
    with pytest.raises(PlanError, match=r"holds adapters in folders of its own.*one of \[.*mine'\]"):
        scores(CausalLM(tmp_path / "saved"))


def test_pickled_adapters_are_refused(tmp_path):
    folder, _ = saved_adapter(tmp_path, safe_serialization=False)
    with pytest.raises(SerializationError, match="read from safetensors only"):
        scores(CausalLM(folder))


def test_an_adapter_goes_on_to_train_and_is_saved_where_peft_finds_it(tmp_path):
    folder, wanted = saved_adapter(tmp_path)
    component = CausalLM(folder)
    assert scores(component) == pytest.approx(wanted, abs=1e-4)
    own = component.own_parameters()
    assert own
    assert all("lora_" in name for name in own)
    component.save_pretrained(tmp_path / "again")
    opened = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "again")
    assert plain_scores(opened) == pytest.approx(wanted, abs=1e-4)
