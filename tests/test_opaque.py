"""Tools and APIs as nodes: calls side by side, retried, kept on disk, and what an error says."""

import asyncio
import contextvars
import copy
import functools
import importlib
import json
import pickle
import subprocess
import sys
import threading
import time

import numpy
import opaque_tools
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from sysdag import DataError, Input, PlanError, SerializationError, System, Trace, node
from sysdag.cli import app
from sysdag.components import Opaque
from sysdag.errors import RunError, failed_element
from sysdag.execution.running import run


def values(tool, inputs):
    return [draw.value for draw in tool.sample(inputs)]


def one_node(function, **options):
    return System(Input("x") >> node(Opaque(function, **options), name="tool")(lambda x: x)).compile()


@pytest.fixture
def log(tmp_path, monkeypatch):
    """What the logged tool was called with, by calls of this process."""
    monkeypatch.setattr(opaque_tools, "LOG", tmp_path / "log.txt")
    (tmp_path / "log.txt").touch()
    return lambda: (tmp_path / "log.txt").read_text().split()


# Side by side


def test_calls_overlap_as_far_as_is_asked_and_results_keep_their_order():
    running, most, lock = [], [], threading.Lock()

    def call(number):
        with lock:
            running.append(number)
            most.append(len(running))
        time.sleep(0.02 * (5 - number % 5))
        with lock:
            running.remove(number)
        return number * number

    for concurrency in (1, 3, 8):
        most.clear()
        assert values(Opaque(call, concurrency=concurrency), range(12)) == [n * n for n in range(12)]
        assert max(most) == concurrency


def test_twenty_calls_of_a_tenth_of_a_second_take_three_of_them():
    began = time.perf_counter()
    assert values(Opaque(opaque_tools.slow), ["a"] * 20) == ["A"] * 20
    assert 0.3 <= time.perf_counter() - began < 1.0  # two seconds one after the other


def test_async_functions_are_awaited_side_by_side_on_one_loop():
    loops, barrier = set(), asyncio.Barrier(4)

    async def call(number):
        loops.add(asyncio.get_running_loop())
        await barrier.wait()  # passes only where four are under way
        return number + 1

    class Client:
        async def __call__(self, number):
            return await call(number)

    for function in (call, functools.partial(call), lambda number: call(number), Client()):
        assert values(Opaque(function, concurrency=4), range(8)) == list(range(1, 9))
    assert len(loops) == 1


@pytest.mark.parametrize("concurrency", [1, 8])
def test_an_async_function_runs_where_the_caller_is_in_a_loop(concurrency):
    async def notebook():
        return values(Opaque(opaque_tools.later, concurrency=concurrency), ["a", "b"])

    assert asyncio.run(notebook()) == ["A", "B"]
    assert asyncio.run(notebook()) == ["A", "B"]  # another loop of the caller's, the same of the calls


@pytest.mark.parametrize("concurrency", [1, 2])
def test_async_calls_inside_async_calls_are_refused_unless_they_leave_the_loop(concurrency):
    inner = Opaque(opaque_tools.later)

    async def blocking(text):
        return values(inner, [text])[0]

    async def leaving(text):
        return (await asyncio.to_thread(values, inner, [text]))[0]

    with pytest.raises(PlanError, match="asyncio.to_thread"):
        Opaque(blocking, concurrency=concurrency).sample(["a", "b"])
    assert values(Opaque(leaving, concurrency=concurrency), ["a", "b"]) == ["A", "B"]


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_call_sees_what_its_caller_set(concurrency, is_async):
    user = contextvars.ContextVar("user", default="nobody")

    def seen(_):
        mixed = torch.ones(2, 2) @ torch.ones(2, 2)
        return user.get(), torch.is_grad_enabled(), torch.is_inference_mode_enabled(), mixed.dtype

    async def awaited(_):
        return user.get()

    user.set("ada")
    if is_async:
        assert values(Opaque(awaited, concurrency=concurrency), range(4)) == ["ada"] * 4
        return
    tool = Opaque(seen, concurrency=concurrency)
    assert values(tool, range(4)) == [("ada", True, False, torch.float32)] * 4
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert values(tool, range(4)) == [("ada", False, False, torch.bfloat16)] * 4
    with torch.inference_mode():
        assert values(tool, range(4)) == [("ada", False, True, torch.float32)] * 4


def test_with_one_at_a_time_the_callers_thread_calls():
    threads = values(Opaque(lambda _: threading.get_ident(), concurrency=1), range(3))
    assert set(threads) == {threading.get_ident()}
    assert threading.get_ident() not in values(Opaque(lambda _: threading.get_ident()), range(3))


def test_plates_and_no_elements():
    draw = node(Opaque(str.upper), name="draw")(lambda words: words)
    plan = System(Input("words").each() >> draw).compile()
    assert plan.sample({"words": [["a", "b"], [], ["c"]]})["draw"] == [["A", "B"], [], ["C"]]
    assert Opaque(str.upper).sample([]) == []


# Errors


@pytest.mark.parametrize("concurrency", [1, 4])
def test_an_error_names_node_and_row_and_what_runs_is_waited_for(concurrency):
    begun, done = [], []

    def call(number):
        begun.append(number)
        time.sleep(0.02)
        if number in (2, 3):
            raise KeyError(f"no {number}")
        done.append(number)
        return number

    plan = one_node(call, concurrency=concurrency)
    with pytest.raises(KeyError, match="no 2") as error:
        plan.sample({"x": list(range(40))})
    assert error.value.__notes__ == ["In node 'tool', row 2."]
    assert sorted(begun) == sorted([*done, *(n for n in (2, 3) if n in begun)])  # nothing was left running
    assert len(begun) < 10
    with pytest.raises(RunError, match=r"KeyError: 'no 2'. In node 'tool', row 2, run 0.") as error:
        list(run(plan, {"x": list(range(40))}, batch_size=40))
    assert error.value.input_row == 2


@pytest.mark.parametrize("concurrency", [1, 4])
def test_an_error_in_a_plate_names_the_row_of_the_element(concurrency):
    def call(word):
        if word == "bad":
            raise OSError("down")

    draw = node(Opaque(call, concurrency=concurrency), name="draw")(lambda words: words)
    plan = System(Input("words").each() >> draw).compile()
    with pytest.raises(OSError, match="down") as error:
        plan.sample({"words": [["a", "b"], ["c", "bad"]]})
    assert error.value.__notes__ == ["In node 'draw', row 1."]


def test_errors_of_the_users_own_kind_keep_it():
    class Odd(Exception):
        def __init__(self, code, reason):
            super().__init__(reason)
            self.code = code

    def call(number):
        raise Odd(7, "odd")

    with pytest.raises(Odd) as error:
        Opaque(call).sample([1, 2])
    assert (error.value.code, failed_element(error.value)) == (7, 0)
    with pytest.raises(DataError, match="Node 'tool', row 1: mine"):
        one_node(lambda x: x if x else (_ for _ in ()).throw(DataError("mine", element=5))).sample({"x": [1, 0]})


def test_calls_are_tried_again_with_growing_waits():
    tries, began = [], time.perf_counter()

    def flaky(number):
        tries.append((number, time.perf_counter() - began))
        if sum(each == number for each, _ in tries) < 3:
            raise TimeoutError
        return number

    assert values(Opaque(flaky, retries=2, backoff=0.1), [0, 1]) == [0, 1]
    first, second, third = (when for number, when in tries if number == 0)
    assert 0.05 <= second - first <= 0.15
    assert 0.1 <= third - second <= 0.25
    tries.clear()
    with pytest.raises(TimeoutError):
        Opaque(flaky, retries=1, backoff=0).sample([0])
    assert len(tries) == 2
    tries.clear()
    with pytest.raises(TimeoutError):
        Opaque(flaky, retries=5, retry_on=(KeyError, ValueError)).sample([0])
    assert len(tries) == 1


def test_a_call_that_waits_for_its_next_try_is_given_up_where_another_failed():
    def call(number):
        raise (ValueError("for good") if number == 1 else TimeoutError())

    began = time.perf_counter()
    with pytest.raises(ValueError, match="for good") as error:
        one_node(call, retries=3, backoff=30.0, retry_on=TimeoutError).sample({"x": [0, 1]})
    assert error.value.__notes__ == ["In node 'tool', row 1."]
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"concurrency": 0}, "concurrency of an Opaque must be a whole number of 1 or more, got 0"),
        ({"concurrency": True}, "concurrency"),
        ({"concurrency": "8"}, "concurrency"),
        ({"retries": -1}, "retries of an Opaque must be a whole number of 0 or more, got -1"),
        ({"backoff": float("nan")}, "backoff of an Opaque must be a number of seconds"),
        ({"retry_on": "TimeoutError"}, "retry_on of an Opaque must be a class of exceptions"),
        ({"retry_on": KeyboardInterrupt}, "retry_on"),
        ({"version": "2"}, "name the file, cache="),
    ],
)
def test_options_out_of_range_are_named(options, said):
    with pytest.raises(PlanError, match=said):
        Opaque(str.upper, **options)


def test_what_is_no_function_is_refused():
    with pytest.raises(PlanError, match="takes a function, got 'upper'"):
        Opaque("upper")


# Kept on disk


def test_answers_are_kept_and_equal_inputs_called_once(tmp_path, log):
    tool = Opaque(opaque_tools.logged, cache=tmp_path / "deep" / "calls.jsonl")
    assert values(tool, ["a", "b", "a"]) == ["A", "B", "A"]
    assert sorted(log()) == ["a", "b"]
    again = Opaque(opaque_tools.logged, cache=tmp_path / "deep" / "calls.jsonl")
    assert values(again, ["c", "b", "a"]) == ["C", "B", "A"]
    assert sorted(log()) == ["a", "b", "c"]


@pytest.mark.parametrize("concurrency", [1, 4])
def test_finished_calls_are_kept_where_one_fails(tmp_path, log, concurrency):
    tool = Opaque(opaque_tools.logged, cache=tmp_path / "calls.jsonl", concurrency=concurrency)
    with pytest.raises(OSError, match="down") as error:
        tool.sample(["a", "b", "bad", "c"])
    assert failed_element(error.value) == 2
    before = log()
    assert values(tool, ["a", "b", "c"]) == ["A", "B", "C"]
    assert sorted(each for each in log() if each != "bad") == ["a", "b", "c"]
    assert {"a", "b", "bad"} <= set(before)


def test_the_row_is_named_where_the_cache_answered_others(tmp_path, log):
    plan = one_node(opaque_tools.logged, cache=tmp_path / "calls.jsonl")
    plan.sample({"x": ["a"]})
    with pytest.raises(OSError, match="down") as error:
        plan.sample({"x": ["a", "a", "bad", "b"]})
    assert error.value.__notes__ == ["In node 'tool', row 2."]


EXIF = Image.Exif()
EXIF[0x010E] = "a cat"


def picture(seed=0, exif=None):
    made = Image.fromarray(numpy.full((2, 2, 3), seed, numpy.uint8))
    if exif is not None:
        made.info["exif"] = exif.tobytes()
    return made


DIFFERENT = [
    1, 1.0, True, "1", b"1", None, [], (), {}, [1], (1,), {"a": 1}, {"a": 1.0}, {1: "a"}, {"1": "a"}, "", [[]],
    [1, [2]], numpy.zeros(2), numpy.zeros(2, numpy.float32), numpy.zeros((2, 1)), numpy.float64(1), torch.zeros(2),
    torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, 1), torch.zeros(0), torch.tensor(1),
    torch.tensor([[1, 2], [3, 4]]).T,
    torch.tensor([1 + 2j]), torch.tensor([1 + 2j]).conj(), picture(), picture(1), picture(exif=EXIF),
    [picture(), picture(exif=EXIF)], {"image": picture(1)}, [{"role": "user", "content": "hi"}], float("nan"), 2**70,
    float("inf"), "\ud800",
]  # fmt: skip


def test_inputs_of_every_kind_have_answers_of_their_own(tmp_path):
    calls = []

    def call(value):
        calls.append(value)
        return len(calls)

    tool = Opaque(call, cache=tmp_path / "calls.jsonl", concurrency=1)
    assert values(tool, DIFFERENT) == list(range(1, len(DIFFERENT) + 1))
    assert values(tool, copy.deepcopy(DIFFERENT)) == list(range(1, len(DIFFERENT) + 1))
    assert len(calls) == len(DIFFERENT)


def plain(value):
    return value.tobytes() if hasattr(value, "tobytes") else value


@pytest.mark.parametrize("answer", DIFFERENT, ids=range(len(DIFFERENT)))
def test_answers_come_back_as_they_were(tmp_path, answer):
    for _ in range(2):
        [found] = values(Opaque(lambda _: answer, cache=tmp_path / "calls.jsonl"), ["x"])
        assert type(found) is type(answer) or isinstance(answer, Image.Image)
        if isinstance(answer, torch.Tensor):
            torch.testing.assert_close(found, answer.resolve_conj(), rtol=0, atol=0)
        elif isinstance(answer, numpy.ndarray):
            numpy.testing.assert_array_equal(found, answer)
        elif isinstance(answer, float) and answer != answer:
            assert found != found
        elif not (isinstance(answer, list) and any(isinstance(part, Image.Image) for part in answer)):
            assert plain(found) == plain(answer)


def test_what_a_cache_cannot_tell_or_keep_is_named(tmp_path):
    plan = one_node(lambda x: x, cache=tmp_path / "calls.jsonl")
    with pytest.raises(DataError, match=r"Node 'tool', row 1: The cache of calls cannot tell the input <object"):
        plan.sample({"x": ["a", object()]})
    plan = one_node(lambda x: {1, 2} if x else x, cache=tmp_path / "calls.jsonl")
    with pytest.raises(DataError, match=r"Node 'tool', row 1: The cache of calls cannot keep the answer \{1, 2\}"):
        plan.sample({"x": [0, 1]})


MODULE = """
MODEL = {model!r}

def helper(text):
    return text + {suffix!r}

def call(text, end={end!r}):
    CALLS.append(text)
    return helper(text) + MODEL + end

CALLS = []
"""


def changed(tmp_path, monkeypatch, **parts):
    """The function `call` of a module written anew."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "changing.py").write_text(MODULE.format(**{"model": "m", "suffix": "s", "end": "e"} | parts))
    importlib.invalidate_caches()
    sys.modules.pop("changing", None)
    import linecache

    linecache.clearcache()
    return importlib.import_module("changing").call


@pytest.mark.parametrize("part", ["model", "suffix", "end"])
def test_a_function_that_changed_is_called_again(tmp_path, monkeypatch, part):
    cache = tmp_path / "calls.jsonl"
    assert values(Opaque(changed(tmp_path, monkeypatch), cache=cache), ["a"]) == ["asme"]
    same = changed(tmp_path, monkeypatch)
    assert values(Opaque(same, cache=cache), ["a"]) == ["asme"]
    assert not same.__globals__["CALLS"]
    other = changed(tmp_path, monkeypatch, **{part: "X"})
    assert values(Opaque(other, cache=cache), ["a"]) == [
        "asme".replace({"model": "m", "suffix": "s", "end": "e"}[part], "X")
    ]


class Client:
    def __init__(self, model):
        self.model, self.calls = model, []

    def ask(self, text):
        self.calls.append(text)
        return self.model + text

    __call__ = ask


def test_what_a_function_is_bound_to_tells_its_answers_apart(tmp_path):
    cache = tmp_path / "calls.jsonl"

    def closing_over(model):
        return lambda text: model + text

    def joined(model, text):
        return model + text

    makers = [closing_over, lambda m: functools.partial(joined, m), lambda m: Client(m).ask, Client]
    for make in makers:
        assert [values(Opaque(make(model), cache=cache), ["x"]) for model in "abab"] == [["ax"], ["bx"], ["ax"], ["bx"]]
    client = Client("a")
    values(Opaque(client.ask, cache=cache), ["x"])
    assert client.calls == []  # another client of the same model was asked before


def test_another_version_is_called_again(tmp_path, log):
    for version in ("2026-01", "2026-02", "2026-01"):
        values(Opaque(opaque_tools.logged, cache=tmp_path / "calls.jsonl", version=version), ["a"])
    assert log() == ["a", "a"]


def test_functions_share_a_file(tmp_path):
    cache = tmp_path / "calls.jsonl"
    assert values(Opaque(str.upper, cache=cache), ["aB"]) == ["AB"]
    assert values(Opaque(str.lower, cache=cache), ["aB"]) == ["ab"]
    assert values(Opaque(str.upper, cache=cache), ["aB"]) == ["AB"]


def test_a_line_that_was_cut_off_is_called_again_and_said(tmp_path, log, caplog):
    cache = tmp_path / "calls.jsonl"
    values(Opaque(opaque_tools.logged, cache=cache, concurrency=1), ["a", "b"])
    whole = cache.read_bytes()
    cache.write_bytes(whole[:-5])
    assert values(Opaque(opaque_tools.logged, cache=cache), ["a", "b", "c"]) == ["A", "B", "C"]
    assert "1 line(s) hold no call's answer" in caplog.text
    assert sorted(log()) == ["a", "b", "b", "c"]
    assert values(Opaque(opaque_tools.logged, cache=cache), ["c", "b", "a"]) == ["C", "B", "A"]
    assert len(log()) == 4


def test_two_components_append_to_one_file(tmp_path, log):
    first, second = (Opaque(opaque_tools.logged, cache=tmp_path / "calls.jsonl") for _ in range(2))
    assert values(first, ["a"]) == ["A"]
    assert values(second, ["b", "bb"]) == ["B", "BB"]
    assert values(first, ["ccc", "a"]) == ["CCC", "A"]  # its own places are behind the other's lines
    assert values(second, ["b", "bb"]) == ["B", "BB"]
    assert values(first, ["ccc"]) == ["CCC"]
    assert len([json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]) == 4


def test_copies_for_other_processes_leave_out_what_is_open(tmp_path, log):
    tool = Opaque(opaque_tools.logged, cache=tmp_path / "calls.jsonl")
    values(tool, ["a"])
    for other in (pickle.loads(pickle.dumps(tool)), copy.deepcopy(tool)):
        assert values(other, ["a"]) == ["A"]
    assert log() == ["a"]


INTERRUPTED = """
import os, signal, sys, threading, time
from sysdag.components import Opaque

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs are started without
begun = []

def call(number):
    begun.append(number)
    if number in (5, 15):  # the second is needed only where the first met code that passes nothing on (a callback)
        os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.2)
    return number

tool = Opaque(call, cache=sys.argv[1], concurrency=4)
try:
    tool.sample(list(range(40)))
except KeyboardInterrupt:
    print(sum(1 for _ in open(sys.argv[1])), len(begun), threading.active_count())
"""


def test_an_interrupt_keeps_what_was_under_way(tmp_path):
    script, cache = tmp_path / "script.py", tmp_path / "calls.jsonl"
    script.write_text(INTERRUPTED)
    done = subprocess.run([sys.executable, script, cache], capture_output=True, text=True, timeout=60)
    assert done.stdout, done.stderr
    kept, calls, threads = map(int, done.stdout.split())
    assert 6 <= kept == calls < 22
    assert threads == 1


# Runs and folders


def test_what_finished_before_a_failure_is_written_and_resumed(tmp_path, log, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    words = ["a", "b", "c", "d", "bad", "e"]
    rows.write_text("".join(json.dumps({"x": word}) + "\n" for word in words))
    system = f"{opaque_tools.__file__}:paid"
    common = ["sample", system, str(rows), "--output", str(tmp_path / "runs.jsonl"), "--batch-size", "2"]
    failed = CliRunner().invoke(app, common)
    assert failed.exit_code == 1
    assert "OSError: the service is down. In node 'bare', row 4" in failed.output
    assert Trace.from_jsonl(tmp_path / "runs.jsonl")["bare"] == ["A", "B", "C", "D"]
    done = CliRunner().invoke(app, [*common, "--resume", "--on-error", "skip"])
    assert done.exit_code == 0, done.output
    assert "Skipped 1 of 6 rows" in done.output
    assert Trace.from_jsonl(tmp_path / "runs.jsonl")["bare"] == ["A", "B", "C", "D", "E"]


def test_a_saved_tool_keeps_how_it_is_called(tmp_path):
    options = opaque_tools.SLOW.component.save_pretrained(tmp_path)
    assert {name: options[name] for name in ("concurrency", "retries", "backoff", "declared")} == {
        "concurrency": 4, "retries": 2, "backoff": 0.5, "declared": False,
    }  # fmt: skip
    assert Opaque.from_pretrained(tmp_path, options)._calls == opaque_tools.SLOW.component._calls
    older = {"function": options["function"]}
    assert Opaque.from_pretrained(tmp_path, older)._calls == Opaque(opaque_tools.slow)._calls
    with pytest.raises(SerializationError, match="concurrency"):
        Opaque.from_pretrained(tmp_path, options | {"concurrency": 0})


def test_a_folder_does_not_choose_where_answers_are_kept(tmp_path, log):
    opaque_tools.kept.save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved" / "system.json").read_text()
    assert "tool-calls" not in text
    loaded = System.from_pretrained(tmp_path / "saved")
    assert loaded["tool"].component._cache == opaque_tools.tool.component._cache
    with pytest.raises(SerializationError, match="calls another function"):
        Opaque(opaque_tools.later).refilled(tmp_path, opaque_tools.tool.component.save_pretrained(tmp_path))
