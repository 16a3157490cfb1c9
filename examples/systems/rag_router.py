"""question -> route, document -> answer: a router and a retriever that learn from preferences about the answer.

A frozen encoder turns the question into features. Two classifiers read them: one decides whether to look anything up,
one picks a document. Both are `Categorical`, so the sum over all routes and documents is exact (`Exhaustive`): the
latents' models learn from answers alone, with no label for a route or a document.

    python examples/systems/rag_router.py --output aligned
    python examples/systems/rag_router.py --output tried --offline
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

import torch
from peft import LoraConfig

from sysdag import Exhaustive, Input, System, node
from sysdag.components import Categorical, CausalLM

ENCODER = os.environ.get("ENCODER", "sentence-transformers/all-MiniLM-L6-v2")
WRITER = os.environ.get("WRITER", "Qwen/Qwen2.5-0.5B-Instruct")
WIDTH = 384  # of the encoder's vectors

DOCUMENTS = {
    "opening hours": "The library is open from 9 to 18 on weekdays and from 10 to 14 on Saturdays.",
    "loans": "Books are lent for four weeks. A loan can be renewed twice unless somebody waits for the book.",
    "fees": "A late book costs 20 cents a day. A lost book costs its price and 5 euros.",
    "rooms": "Two rooms for groups can be booked at the desk, for three hours at most.",
}


@functools.cache
def encoder() -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    return AutoTokenizer.from_pretrained(ENCODER), AutoModel.from_pretrained(ENCODER).eval()


@torch.no_grad()
def embed(texts: Sequence[str]) -> torch.Tensor:
    """One vector of length 1 a text: the mean over its tokens."""
    tokenizer, model = encoder()
    batch = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    mask = batch["attention_mask"][..., None]
    vectors = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(vectors.float(), dim=-1)


question = Input("question", str)


@node
def features(question) -> list[float]:
    """Deterministic: recorded in the trace, so that scoring does not run the encoder again."""
    return embed([question])[0].tolist()


@node(Categorical(["look up", "answer at once"], WIDTH))
def route(features):
    return features


@node(Categorical(list(DOCUMENTS), WIDTH))
def document(features):
    return features


@node(
    CausalLM(
        WRITER,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        max_new_tokens=64,
    )
)
def answer(question, route, document):
    found = f"{DOCUMENTS[document]}\n" if route == "look up" else ""
    return [{"role": "user", "content": f"{found}Answer in one sentence: {question}"}]


system = System(question >> features >> [route, document], (question & route & document) >> answer)


def start_as_dense_retriever(sharpness: float = 20.0) -> None:
    """Gives the retriever the documents' vectors as weights: p(document) is a softmax of cosines times `sharpness`."""
    classifier = system["document"].component.module
    with torch.no_grad():
        classifier.weight.copy_(sharpness * embed(list(DOCUMENTS.values())))
        classifier.bias.zero_()


ANSWERS = {
    "When can I come on Saturday?": "On Saturdays the library is open from 10 to 14.",
    "How long may I keep a book?": "You may keep a book for four weeks and renew it twice.",
    "What does it cost to bring a book back late?": "A late book costs 20 cents a day.",
    "Can our study group meet here?": "Yes, you can book one of two rooms at the desk.",
    "What is two plus two?": "Two plus two is four.",
    "Who wrote Hamlet?": "William Shakespeare wrote Hamlet.",
}


def score(run: Mapping[str, Any]) -> float:
    """How much of the wanted answer's text the answer has, from 0 to 1."""
    return SequenceMatcher(None, run["answer"].lower(), ANSWERS[run["question"]].lower()).ratio()


INPUTS = {"question": list(ANSWERS)}
TRAINING = {
    "objective": "sampling",
    "beta": 0.1,
    "learning_rate": 5e-5,
    "nodes": {"route": {"learning_rate": 1e-2}, "document": {"learning_rate": 1e-2}},
}
CANDIDATES = Exhaustive()

if __name__ == "__main__":
    from whole_path import main

    outcome = main(__file__, [ENCODER, WRITER], prepare="start_as_dense_retriever")
