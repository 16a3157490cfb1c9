"""Chat templates that ask for the time: one for a process, for a training and for a file of traces."""

from datetime import datetime

import pytest
import torch
from test_references import config
from tiny import char_tokenizer, llama
from transformers.utils import chat_template_utils

from sysdag import DataError, Input, PlanError, SerializationError, SysDPOTrainer, System, node
from sysdag.components import CausalLM, prompt_date
from sysdag.components.language.chat_template import ChatTemplate
from sysdag.components.language.messages import ChatPrompt
from sysdag.execution.batches import Runs
from sysdag.execution.execute import sample
from sysdag.execution.trace_file import TraceFile

ASKS = "{{ strftime_now('%d %m %Y') }} {% for m in messages %}{{ m['content'] }}{% endfor %}"
CHAT = [{"role": "user", "content": "abc"}]
FIRST, NEXT = datetime(2026, 1, 31, 23, 59), datetime(2026, 2, 1, 0, 1)


@pytest.fixture
def clock(monkeypatch):
    """Sets the time; a process that begins then knows of none before."""

    def set_to(when, begins=False):
        fake = type("Clock", (datetime,), {"now": classmethod(lambda cls, tz=None: when)})
        monkeypatch.setattr(chat_template_utils, "datetime", fake)
        monkeypatch.setattr(prompt_date, "datetime", fake)
        if begins:
            monkeypatch.setattr(prompt_date, "_settled", None)

    monkeypatch.delenv(prompt_date.VARIABLE, raising=False)
    set_to(FIRST, begins=True)
    return set_to


def tokenizer_that(template):
    tokenizer = char_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def made(template=ASKS):
    tokenizer = tokenizer_that(template)
    return CausalLM(llama(0, len(tokenizer), max_position_embeddings=128), tokenizer)


def plain(component, **kwargs):
    return component.tokenizer.apply_chat_template(
        CHAT, tokenize=True, return_dict=False, add_generation_prompt=True, **kwargs
    )


def test_a_prompt_tells_the_day_on_which_the_process_first_asked_and_stays(clock):
    component = made()
    first = component.prompt_ids([CHAT])
    assert first == [plain(component)]
    clock(NEXT)
    assert plain(component) != first[0]  # transformers asks anew
    assert component.prompt_ids([CHAT]) == made().prompt_ids([CHAT]) == first
    clock(NEXT, begins=True)
    assert component.prompt_ids([CHAT]) == [plain(component)]


@pytest.mark.parametrize(
    "template",
    [
        "\n" + ASKS,
        "  {% if true %}" + ASKS + "{% endif %}\n",
        "{%- if not date_string is defined %}\n    {%- if strftime_now is defined %}\n"
        '        {%- set date_string = strftime_now("%d %b %Y") %}\n    {%- endif %}\n{%- endif %}\n{{ date_string }}',
        "{% macro head(m) %}{{ strftime_now('%Y-%m-%d') }} {{ m['content'] }}{% endmacro %}{{ head(messages[0]) }}",
        "{%- set today = strftime_now('%-d %B, %A %j %H:%M:%S %% %y') %}{{- today.split(',')[0] + today }}",
        "{% set f = '%A' %}{% if add_generation_prompt %}{{ strftime_now(format=f) }}{% endif %}",
    ],
)
def test_a_template_that_asks_writes_what_it_writes_by_transformers(clock, template):
    tokenizer, chat = tokenizer_that(template), ChatPrompt(CHAT)
    options = {"add_generation_prompt": True, "tokenize": False}
    assert ChatTemplate("it", tokenizer)._rendered(chat, **options) == tokenizer.apply_chat_template(CHAT, **options)


def test_a_policy_and_its_reference_read_one_prompt_around_midnight(clock):
    policy = made()
    reference = policy.reference()
    draws = policy.observe(["ab"])
    before = policy.log_prob([CHAT], draws)
    clock(NEXT)
    assert torch.equal(reference.log_prob([CHAT], draws), before.detach())


def test_the_date_can_be_set_and_a_rows_own_clock_comes_first(clock, monkeypatch):
    component = made("{% if date is defined %}{{ date }}{% else %}" + ASKS[: ASKS.index("}}") + 2] + "{% endif %}"
                     + "{% for m in messages %}{{ m['content'] }}{% endfor %}")  # fmt: skip
    monkeypatch.setenv(prompt_date.VARIABLE, "2024-07-26")
    clock(datetime(2024, 7, 26))
    assert component.prompt_ids([CHAT]) == [plain(component)]
    fixed = CausalLM(component.module, component.tokenizer, chat_template_kwargs={"date": "1 2 3"})
    assert fixed.prompt_ids([CHAT]) == [plain(component, date="1 2 3")]
    monkeypatch.setenv(prompt_date.VARIABLE, "July")
    with pytest.raises(PlanError, match="SYSDAG_PROMPT_DATE='July' is no ISO date"):
        made().prompt_ids([CHAT])


def test_what_a_template_says_of_the_time_is_part_of_what_its_scores_depend_on(clock):
    days, none, computed = made(), made("{{ messages[0]['content'] }}"), made("{% set f = '%Y' %}{{ strftime_now(f) }}")
    before = [each.reading() for each in (days, none, computed)]
    clock(NEXT, begins=True)
    after = [each.reading() for each in (days, none, computed)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, True, False]
    clock(datetime(2026, 2, 1, 9, 30), begins=True)
    assert days.reading() == after[0]  # another time of the same day


question = Input("question", str)


@node(CausalLM("unset"))
def answer(question):
    return [{"role": "user", "content": question}]


def system(template=ASKS):
    torch.manual_seed(0)
    return System(question >> answer).with_components({"answer": made(template)})


ROWS = [{"question": text, "chosen": text, "rejected": "z"} for text in ("ab", "bc", "cd", "de")]


def trainer(folder, made=None, **options):
    given = {"max_steps": 4, "per_device_train_batch_size": 1, "objective": "direct", "report_to": [], **options}
    return SysDPOTrainer(made or system(), config(folder, **given), train_dataset=ROWS)


def test_reference_scores_of_another_day_are_refused_and_that_day_can_be_told(clock, tmp_path, monkeypatch):
    trainer(tmp_path, precompute_ref_log_probs=True).train()
    clock(NEXT, begins=True)
    with pytest.raises(SerializationError, match="the date that prompts tell.*SYSDAG_PROMPT_DATE=2026-01-31"):
        trainer(tmp_path, precompute_ref_log_probs=True).train()
    monkeypatch.setenv(prompt_date.VARIABLE, "2026-01-31")
    trainer(tmp_path, precompute_ref_log_probs=True).train()


def test_reference_scores_of_prompts_without_a_time_are_of_every_day(clock, tmp_path):
    made().prompt_ids([CHAT])  # another's template asks
    timeless = ASKS[ASKS.index("}}") + 2 :]
    trainer(tmp_path, system(timeless), precompute_ref_log_probs=True).train()
    clock(NEXT, begins=True)
    trainer(tmp_path, system(timeless), precompute_ref_log_probs=True).train()


@pytest.mark.parametrize("stored", [False, True])
def test_a_training_that_goes_on_the_next_day_is_as_one_that_was_not_cut_off(clock, tmp_path, stored):
    saving = {"save_strategy": "steps", "save_steps": 2, "precompute_ref_log_probs": stored}
    whole = trainer(tmp_path, **saving)
    whole.train()
    clock(NEXT, begins=True)
    resumed = trainer(tmp_path, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = dict(whole.system["answer"].component.module.named_parameters())
    for name, parameter in resumed.system["answer"].component.module.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_a_file_of_traces_goes_on_with_the_day_that_it_was_begun_on(clock, tmp_path):
    plan = system().compile()
    runs = Runs(inputs={"question": ["ab", "bc"]}, batch_size=1)
    file = TraceFile(tmp_path / "traces.jsonl", plan, runs)
    first = plan.system["answer"].component.prompt_ids([CHAT])
    file.append(sample(plan, {"question": ["ab"]}, seed=0))
    clock(NEXT, begins=True)
    assert made().prompt_ids([CHAT]) != first
    TraceFile(tmp_path / "traces.jsonl", plan, runs, existing="resume")
    assert made().prompt_ids([CHAT]) == first
    side = tmp_path / "traces.jsonl.run.json"
    side.write_text(side.read_text().replace("2026-01-31T23:59:00", "yesterday"))
    with pytest.raises(DataError, match="cannot be read"):
        TraceFile(tmp_path / "traces.jsonl", plan, runs, existing="resume")
