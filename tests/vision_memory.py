"""A step of a vision-language model whose memory can be measured, in a process of its own, and estimated."""

from peft import LoraConfig
from step_memory import model_of, peak_of
from tiny_vision import FAMILIES, picture
from tiny_vision import build as build_model

from sysdag import Input, System, node
from sysdag.components import ImageTextToText
from sysdag.data.encoding import encode_pairs

SCALE = 4
SIZE = (160, 120)
PAIRS = 4
COMPLETION = 40
CASES = {
    **{f"{family}, full": {"family": family} for family in FAMILIES},
    **{f"{family}, adapter": {"family": family, "adapter": True} for family in FAMILIES},
    "qwen2_vl, one pass": {"family": "qwen2_vl", "engine": "one_pass"},
    "smolvlm, adapter, one pass": {"family": "smolvlm", "adapter": True, "engine": "one_pass"},
    "qwen2_vl, checkpointed": {"family": "qwen2_vl", "checkpointing": True},
}


def build(*, family, adapter=False):
    model, processor = build_model(family, scale=SCALE)
    lora = LoraConfig(r=4, target_modules=r".*(language|text)_model.*\.(q|v)_proj") if adapter else None

    @node(ImageTextToText(model, processor, peft_config=lora, max_new_tokens=COMPLETION))
    def answer(question, picture):
        return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]

    return System((Input("question") & Input("picture")) >> answer).compile()


def rows():
    return [
        {"question": letter * 12, "picture": picture(number, *SIZE), "chosen": "y" * (COMPLETION - 1),
         "rejected": "z" * (COMPLETION - 1)}
        for number, letter in enumerate("abcdefgh"[:PAIRS])
    ]  # fmt: skip


def lengths(plan):
    component = plan.system["answer"].component
    prompt = plan.system["answer"].function(*[rows()[0][name] for name in ("question", "picture")])
    return {"answer": (len(component.prompt_ids([prompt])[0]), COMPLETION)}


def micro_batch_tokens(plan):
    """Of two pairs."""
    return 2 * (lengths(plan)["answer"][0] + 2 * COMPLETION) + 10


def measured(case):
    """Bytes of one step beyond what is there after a first one."""
    options = dict(CASES[case])
    engine, checkpointing = options.pop("engine", "two_pass"), options.pop("checkpointing", False)
    plan = build(**options)
    model = model_of(plan, engine, micro_batch_tokens(plan), checkpointing)
    pairs = encode_pairs(plan, rows(), "direct")
    return peak_of(model, lambda: model(pairs))


def estimated(case):
    """What the plan tells of the same."""
    options = dict(CASES[case])
    engine, checkpointing = options.pop("engine", "two_pass"), options.pop("checkpointing", False)
    plan = build(**options)
    return plan.estimate(
        lengths(plan), images={"answer": [SIZE]}, pairs=PAIRS, engine=engine,
        micro_batch_tokens=micro_batch_tokens(plan), gradient_checkpointing=checkpointing, device="cpu",
    )  # fmt: skip
