"""A step of a choice whose memory can be measured, in a process of its own, and estimated."""

import torch
from peft import LoraConfig
from step_memory import model_of, peak_of
from tiny import char_tokenizer
from transformers import BertConfig, BertForSequenceClassification, BertModel

from sysdag import Input, System, node
from sysdag.components import BiEncoder, Choice, CrossEncoder
from sysdag.data.encoding import encode_pairs

PAIRS, LENGTH, OPTIONS = 2, 160, 6  # whose tensors are large enough to be given back to the system when they are freed
CONFIG = dict(
    vocab_size=50, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512,
    max_position_embeddings=LENGTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
CASES = {
    "bi-encoder, full": {"kind": "bi"},
    "bi-encoder, adapter": {"kind": "bi", "adapter": True},
    "bi-encoder, one pass": {"kind": "bi", "engine": "one_pass"},
    "two towers, full": {"kind": "bi", "towers": True},
    "two towers, adapters": {"kind": "bi", "towers": True, "adapter": True},
    "two towers, one pass": {"kind": "bi", "towers": True, "engine": "one_pass"},
    "cross-encoder, full": {"kind": "cross"},
    "cross-encoder, checkpointed": {"kind": "cross", "checkpointing": True},
}


def build(*, kind, adapter=False, towers=False):
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["query", "value"]) if adapter else None
    if kind == "bi":
        small = BertModel(BertConfig(**CONFIG | {"num_hidden_layers": 2, "intermediate_size": 256})) if towers else None
        scorer = BiEncoder(
            BertModel(BertConfig(**CONFIG)), char_tokenizer(), document_model=small,
            document_tokenizer=char_tokenizer() if towers else None, peft_config=lora,
        )  # fmt: skip
    else:
        model = BertForSequenceClassification(BertConfig(**CONFIG, num_labels=1))
        scorer = CrossEncoder(model, char_tokenizer(), peft_config=lora)

    @node(Choice(scorer))
    def found(question, passages):
        return question, passages

    question, passages = Input("question", str), Input("passages", list)
    return System((question & passages) >> found).compile()


def texts(kind):
    """A query and options that are as long as they may be, in pairs of a cross-encoder together."""
    length = LENGTH if kind == "bi" else LENGTH // 2
    words = [chr(97 + place) * length for place in range(OPTIONS + 1)]
    return words[0], words[1:]


def tokens(kind):
    """Of one row, as `Choice.micro_batches` counts them."""
    return LENGTH * (OPTIONS + 1 if kind == "bi" else OPTIONS)


def measured(case):
    """Bytes of one step beyond what is there after a first one."""
    options = dict(CASES[case])
    engine, checkpointing = options.pop("engine", "two_pass"), options.pop("checkpointing", False)
    plan, kind = build(**options), options["kind"]
    model = model_of(plan, engine, tokens(kind), checkpointing)
    question, passages = texts(kind)
    rows = [
        {"question": question, "passages": [text[:-1] + mark for text in passages], "chosen": 0, "rejected": 1}
        for mark in "yz"[:PAIRS]
    ]
    pairs = encode_pairs(plan, rows, "direct")
    return peak_of(model, lambda: model(pairs))


def estimated(case):
    """What the plan tells of the same."""
    options = dict(CASES[case])
    engine, checkpointing = options.pop("engine", "two_pass"), options.pop("checkpointing", False)
    kind = options["kind"]
    of_options = [LENGTH * OPTIONS] if options.get("towers") else []
    return build(**options).estimate(
        {"found": (tokens(kind) - 1, 1, *of_options)}, pairs=PAIRS, engine=engine, micro_batch_tokens=tokens(kind),
        gradient_checkpointing=checkpointing, device="cpu",
    )  # fmt: skip
