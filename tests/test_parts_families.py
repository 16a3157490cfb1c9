"""Completions in parts, family by family of tokenizers and templates, against TRL's tokens of whole ones."""

import pytest
from tokenizer_families import FAMILIES
from trl_rows import language_model, prepared

from sysdag import DataError, Draw, Input, System, Trace, split
from sysdag.execution.likelihood import aligned

THOUGHT, ANSWER = "<think>\na red cube\n</think>", "white room"
WHOLE = f"{THOUGHT}\n\n{ANSWER}"


def keeps(tokenizer, messages):
    """Whether a template writes an answer down as it is, behind what it begins an answer with."""
    header = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    answered = [*messages, {"role": "assistant", "content": WHOLE}]
    return tokenizer.apply_chat_template(answered, tokenize=False).startswith(header + WHOLE)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_parts_have_the_tokens_that_trl_gives_the_whole(family):
    tokenizer = family.tokenizer
    question = "a dark square\n"
    prompt = [{"role": "user", "content": question}] if family.is_chat else question
    if family.is_chat and not keeps(tokenizer, prompt):
        pytest.skip("its template writes thoughts in another way, or leaves them out")

    @split(language_model(family), reasoning="</think>", answer=None, max_new_tokens=40)
    def solve(question):
        return prompt

    plan = System(Input("question") >> solve).compile()
    can_say = "</think>" in tokenizer.decode(tokenizer("a</think>", add_special_tokens=False)["input_ids"])
    trace = Trace({"question": [question]}, {"reasoning": [Draw(THOUGHT)], "answer": [Draw(ANSWER)]})
    if not can_say:
        with pytest.raises(DataError, match="Node 'reasoning', row 0: .*has no tokens that say '</think>'"):
            plan.log_probs(trace)
        return
    [(inputs, [thought]), (_, [answer])] = [aligned(plan, trace, name) for name in ("reasoning", "answer")]
    before = solve.reasoning.component.prompt_ids(inputs.values)[0]
    ours = [*before, *thought.record["token_ids"], *answer.record["token_ids"]]
    completion = [{"role": "assistant", "content": WHOLE}] if family.is_chat else WHOLE
    [made] = prepared(tokenizer, [{"prompt": prompt, "chosen": completion, "rejected": completion}])
    theirs = made["prompt_ids"] + made["chosen_ids"]
    end = None if family.end is None else tokenizer.convert_tokens_to_ids(family.end)
    stop = len(theirs) if end is None else theirs.index(end, len(before)) + 1
    assert ours == theirs[:stop]
