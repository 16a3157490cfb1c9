"""Configuration files that are no plain mapping of options: each is refused with its line, none is read otherwise."""

import re
import time

import pytest

from sysdag.errors import OptionError
from sysdag.files.config_file import MAX_BYTES, MAX_DEPTH, read_settings

DEEP = MAX_DEPTH + 1


def refused(folder, text, message):
    file = folder / "c.yaml"
    file.write_text(text)
    with pytest.raises(OptionError, match=f"^{re.escape(str(file))}{re.escape(message)}"):
        read_settings(file, ["train"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beta: 1\nnodes:\n  answer: {beta: 1}\n  answer: {beta: 2}\n",
         ", line 4: nodes: 'answer' stands there a second time; the first is in line 3."),
        ("nodes:\n  answer:\n    beta: 1\n    scale: 2\n    beta: 3\n",
         ", line 5: nodes: 'beta' stands there a second time; the first is in line 3."),
        ("sweep: {beta: [1], 'beta': [2]}\n", ", line 1: sweep: 'beta' stands there a second time"),
        ("nodes:\n- {a: 1,\n   a: 2}\n", ", line 3: nodes: 'a' stands there a second time; the first is in line 2."),
        ("nodes: {1: a, 0x1: b}\n", ", line 1: nodes: '0x1' stands there a second time"),
        ("train:\n  beta: 1\n  beta: 2\n", ", line 3: beta stands there a second time"),
        ("train:\n  nodes: {a: 1, a: 2}\n", ", line 2: nodes: 'a' stands there a second time"),
    ],
)  # fmt: skip
def test_a_key_that_stands_twice(text, message, tmp_path):
    refused(tmp_path, text, message)


@pytest.mark.parametrize(
    "text",
    ["beta: !vault 3\n", "beta: !!python/name:os.getcwd ''\n", "nodes: {a: !env HOME}\n", "nodes: !x {a: 1}\n",
     "nodes: {a: [!b 1]}\n", "beta: ! 3\n", "nodes: {!k a: 1}\n"],
)  # fmt: skip
def test_a_tag_is_refused(text, tmp_path):
    refused(tmp_path, text, f", line 1: a tag ({re.search('![^ ]*', text)[0]}) is not taken; write the value alone.")


def test_the_tags_of_plain_values_are_taken(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("run_name: !!str 3\nnodes: !!map {a: !!float 1}\n")
    assert [setting.value for setting in read_settings(file)] == ["3", {"a": 1.0}]


@pytest.mark.parametrize(
    "text",
    ["nodes: &n {a: 1}\nsweep: *n\n", "nodes: {x: &x 1,\n y: *x}\n", "nodes: &n\n  - *n\n",
     "nodes: &a [1]\nsweep: [*a, *a]\n"],
)  # fmt: skip
def test_an_alias_is_refused(text, tmp_path):
    refused(tmp_path, text, ", line 2: an alias (*")


def test_a_merge_key_is_refused(tmp_path):
    refused(tmp_path, "nodes:\n  <<: {a: 1}\n", ", line 2: nodes: a merge key (<<) is not taken; write the keys out.")
    refused(tmp_path, "<<: {beta: 1}\n", ", line 1: a merge key (<<) is not taken; write the keys out.")


@pytest.mark.parametrize(
    "text",
    ["nodes: " + "[" * DEEP + "]" * DEEP, "nodes: " + "{a: " * DEEP + "1" + "}" * DEEP,
     "nodes: " + "[" * 100_000, "nodes:\n" + "".join(" " * n + "- \n" for n in range(1, DEEP + 2))],
)  # fmt: skip
def test_deep_nesting_is_refused_at_once(text, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    began = time.perf_counter()
    with pytest.raises(OptionError, match=rf"c\.yaml, line \d+: values are nested more than {MAX_DEPTH} deep\."):
        read_settings(tmp_path / "c.yaml")
    assert time.perf_counter() - began < 5


def test_a_file_that_is_too_large_is_not_parsed(tmp_path):
    refused(tmp_path, "a: " + "x" * MAX_BYTES, f" has more than {MAX_BYTES} bytes; that is no configuration file.")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nodes:\n  a: [{}, " + "9" * 5000 + "]\n", ", line 2: nodes: not a value: Exceeds the limit"),
        ("nodes:\n  ? [a]\n  : 1\n", ", line 2: nodes: a key must be a single value."),
        ("beta: 1\n---\nbeta: 2\n", ", line 2: not YAML: but found another document."),
        ("beta: \x07\n", ": not YAML: unacceptable character"),
    ],
)
def test_what_is_no_value(text, message, tmp_path):
    refused(tmp_path, text, message)


def test_dates_stay_texts(tmp_path):
    """JSON, which options with several values are read as, has none."""
    (tmp_path / "c.yaml").write_text("nodes: {a: 2026-11-27, b: 2026-99-99, c: =}\n")
    [setting] = read_settings(tmp_path / "c.yaml")
    assert setting.value == {"a": "2026-11-27", "b": "2026-99-99", "c": "="}
    assert setting.flags([dict]) == ['--nodes={"a": "2026-11-27", "b": "2026-99-99", "c": "="}']
