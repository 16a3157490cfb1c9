"""question -> query -> two of five passages -> answer: rewriter, retriever and reader, trained jointly.

The passages come with the question, as a search engine would bring them. The rewriter makes a query of the question;
the retriever is a `Choice` of two of the passages by a sentence encoder, whose order counts; the reader answers from
them. Rewriting and passages are latent: all three learn from preferences about the answer alone, with no label for a
query or a passage.

    python examples/systems/rag_passages.py --output aligned
    python examples/systems/rag_passages.py --output tried --offline
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from difflib import SequenceMatcher
from typing import Any

from peft import LoraConfig

from sysdag import Input, MonteCarlo, System, node
from sysdag.components import BiEncoder, CausalLM, Choice

ENCODER = os.environ.get("ENCODER", "sentence-transformers/all-MiniLM-L6-v2")
REWRITER = os.environ.get("REWRITER", "Qwen/Qwen2.5-0.5B-Instruct")
READER = os.environ.get("READER", "Qwen/Qwen2.5-1.5B-Instruct")
LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")

question = Input("question", str)
passages = Input("passages", list)


@node(CausalLM(REWRITER, peft_config=LORA, max_new_tokens=24))
def query(question):
    return [{"role": "user", "content": f"Write a search query of a few words for: {question}"}]


@node(
    Choice(
        BiEncoder(ENCODER, peft_config=LoraConfig(r=8, target_modules=["query", "value"])),
        k=2,
        temperature=0.05,
    )
)
def found(question, query, passages):
    return f"{question} {query}", passages


@node(CausalLM(READER, peft_config=LORA, max_new_tokens=64))
def answer(question, found):
    return [{"role": "user", "content": "\n".join(found) + f"\nAnswer in one sentence: {question}"}]


system = System(question >> query, (question & query & passages) >> found, (question & found) >> answer)

LIBRARY = [
    "The library is open from 9 to 18 on weekdays and from 10 to 14 on Saturdays.",
    "Books are lent for four weeks. A loan can be renewed twice unless somebody waits for the book.",
    "A late book costs 20 cents a day. A lost book costs its price and 5 euros.",
    "Two rooms for groups can be booked at the desk, for three hours at most.",
    "The desk lends headphones, chargers and umbrellas for a day.",
]
MUSEUM = [
    "The museum is closed on Mondays. On Thursdays it is open until 21.",
    "A ticket costs 12 euros, and 6 for students. On the first Sunday of a month there is no charge.",
    "Photographs may be taken without a flash, except in the hall of drawings.",
    "Coats and large bags stay in the lockers, which take a coin.",
    "The café in the garden serves lunch from 12 to 14.",
]
ANSWERS = {
    "When can I come on Saturday?": (LIBRARY, "On Saturdays the library is open from 10 to 14."),
    "How long may I keep a book?": (LIBRARY, "You may keep a book for four weeks and renew it twice."),
    "What does a late book cost?": (LIBRARY, "A late book costs 20 cents a day."),
    "May I take pictures?": (MUSEUM, "You may take photographs without a flash, except in the hall of drawings."),
    "What does a student pay?": (MUSEUM, "A student pays 6 euros."),
    "How late can I come on Thursday?": (MUSEUM, "On Thursdays the museum is open until 21."),
}


def score(run: Mapping[str, Any]) -> float:
    """How much of the wanted answer's text the answer has, from 0 to 1."""
    return SequenceMatcher(None, run["answer"].lower(), ANSWERS[run["question"]][1].lower()).ratio()


INPUTS = {"question": list(ANSWERS), "passages": [found for found, _ in ANSWERS.values()]}
TRAINING = {
    "objective": "sampling",
    "beta": 0.1,
    "learning_rate": 5e-5,
    "nodes": {"found": {"learning_rate": 1e-4}},
}
CANDIDATES = MonteCarlo(num_candidates=8)

if __name__ == "__main__":
    from whole_path import main

    outcome = main(__file__, [ENCODER, REWRITER, READER])
