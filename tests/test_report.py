"""`sysdag report`: one HTML file that asks for nothing and runs nothing, what it shows, and damaged runs."""

import base64
import hashlib
import io
import itertools
import json
import math
import re
import struct
import subprocess
import sys
import zipfile
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy
import pytest
from PIL import Image
from report_runs import TWO_NODES, log, preference_line, record, system, write_run
from typer.testing import CliRunner

from sysdag import DataError, Draw, Trace
from sysdag.cli import app
from sysdag.reporting.history import best_evaluation
from sysdag.reporting.html import render, write_report
from sysdag.reporting.judgements import judgements
from sysdag.reporting.page import page
from sysdag.reporting.read import read_run
from sysdag.reporting.settings import differences, split_by_default
from sysdag.reporting.values import shown

ROOT = Path(__file__).resolve().parents[1]
ATTACKS = [
    "<script>alert(1)</script>", "</script><script>alert(2)</script>", '"><img src=x onerror=alert(3)>',
    "</style><style>body{display:none}</style>", "<svg onload=alert(4)>", "javascript:alert(5)", "{{ 7*7 }}{% x %}",
    "' onmouseover='alert(6)", "<!-- ", "]]>",
]  # fmt: skip


class Parsed(HTMLParser):
    """The elements of a page with their attributes, and its texts by element."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.texts, self._open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img"):
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, f"{tag} is closed where another element is open"

    def handle_data(self, data):
        self.texts.append((self._open[-1] if self._open else "", data))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def of_class(self, name):
        return [(tag, own) for tag, own in self.elements if name in (own.get("class") or "").split()]

    def text(self, tag=None):
        return "".join(data for name, data in self.texts if tag in (None, name) and name not in ("script", "style"))


def rendered(*folders, defaults=None, most=20):
    return render(page([read_run(folder) for folder in folders], defaults=defaults or {}, most_prompts=most))


def check_is_closed(text):
    """The page opens offline: nothing in it names an address, and its policy allows its own style and script alone."""
    parsed = Parsed(text)
    for _tag, attributes in parsed.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (name, value)
            assert name not in ("style", "srcset", "action", "formaction", "srcdoc", "ping", "background")
            if name in ("src", "href", "xlink:href", "data", "poster"):
                assert value.startswith(("data:image/png;base64,", "#")) or value == "data:,", value
    assert {"iframe", "object", "embed", "form", "base", "audio", "video"}.isdisjoint(tag for tag, _ in parsed.elements)
    assert [own for own in parsed.all("meta") if own.get("http-equiv", "").lower() == "refresh"] == []
    (policy,) = [own["content"] for own in parsed.all("meta") if own.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert "unsafe" not in policy
    assert "http" not in policy
    for tag in ("style", "script"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'" in policy
        assert not re.search(r"url\(|@import|https?:|fetch\(|XMLHttp|innerHTML|eval\(", content)
    return parsed


def draws(values):
    return [Draw(value) for value in values]


def trace(answer, draft="a draft", question="why?"):
    return Trace({"question": [question]}, {"draft": draws([draft]), "answer": draws([answer])})


def test_a_report_tells_of_the_run(tmp_path):
    write_run(tmp_path, traces={"before": trace("It is red."), "after": trace("It is blue.")})
    text = rendered(tmp_path, defaults={"beta": 0.1, "seed": 42, "objective": "direct", "learning_rate": 1e-6})
    parsed = check_is_closed(text)
    shown_text = parsed.text()
    titles = re.findall(r'<b id="chart\d+">(.*?)</b>', text)
    assert titles == [
        "Loss", "Margin", "Accuracy", "Rewards", "Log-probabilities", "Margin by node", "Reward on winners by node",
        "Reward on losers by node", "Effective sample size", "Responsibility gap", "Coverage", "Distinct-2",
        "Gradient norm", "Learning rate",
    ]  # fmt: skip
    shares = read_run(tmp_path)
    last = log()[-1]
    assert f"{last['eval_nodes/draft/rewards/chosen']:.3f}" in shown_text
    for expected in (
        "finished",
        "800 pairs",
        "took 1:02:03",
        "diverse_beam_search",
        "ab" * 32,
        "2.13",
        "not installed",
    ):
        assert expected in shown_text
    changed = [row.name for row in split_by_default(shares.config, {"beta": 0.1, "seed": 42, "learning_rate": 1e-6})[0]]
    assert changed == ["beta", "objective"]
    assert re.search(r"<code>beta</code></th><td><code>0.2</code></td><td class=\"weak\"><code>0.1</code>", text)
    assert [own["data-label"] for _, own in parsed.of_class("curve")][:2] == ["training", "evaluation"]
    step = best_evaluation(shares.history, {})[1]
    assert f"best step ({step})" in shown_text
    assert len(parsed.of_class("mark")) == len(titles)


def test_the_share_of_each_node_is_on_the_graph(tmp_path):
    lines = [preference_line(1, {"draft": (0.1, 0.4), "answer": (0.5, -0.4)}, prefix="eval_")]
    parsed = check_is_closed(rendered(write_run(tmp_path, lines)))
    assert "−25 % of the margin" in parsed.text("text").replace("-", "−")  # noqa: RUF001
    assert "75 % of the margin" in parsed.text("text")
    assert "Here signs are mixed." in parsed.text()
    bars = [own for tag, own in parsed.elements if tag == "rect" and own.get("height") == "4"]
    assert [own["class"] for own in bars] == ["minus", "plus"]
    assert float(bars[1]["width"]) == pytest.approx(3 * float(bars[0]["width"]), rel=0.01)
    assert float(parsed.of_class("plus")[0][1]["fill-opacity"]) > float(parsed.of_class("minus")[0][1]["fill-opacity"])


def test_a_node_and_its_component_have_one_colour_in_all_charts(tmp_path):
    nodes = {"plan": "plan", "write": "write", "critic[0]": "critic", "critic[1]": "critic"}
    graph = system(nodes, [("question", "plan"), *itertools.pairwise(nodes)])
    lines = [
        preference_line(step, dict.fromkeys(nodes, (0.1, -0.1)))
        | {f"nodes/{key}/grad_norm": 1.0 for key in ("critic", "write")}
        | {"grad_norm": 2.0}
        for step in range(1, 9)
    ]
    charts = page([read_run(write_run(tmp_path, lines, record(system=graph)))], defaults={}, most_prompts=1).charts
    legends = {chart.title: {label: colour for label, colour, _ in chart.legend} for chart in charts}
    margins, norms = legends["Margin by node"], legends["Gradient norm"]
    assert list(margins) == list(nodes)
    assert len({*margins.values()}) == 4
    assert norms["critic"] == margins["critic[0]"]
    assert norms["write"] == margins["write"]
    assert norms["all together"] not in margins.values()


def test_nothing_that_a_run_holds_can_run(tmp_path):
    def everywhere(at):
        return ATTACKS[at % len(ATTACKS)]

    def texts(at):
        return everywhere(at)

    def nested(at):
        return [everywhere(at), {everywhere(at + 1): everywhere(at)}]

    nodes = {everywhere(0) + "draft": everywhere(1), everywhere(2): everywhere(3), everywhere(8): None}
    names = list(nodes)
    graph = system(
        nodes, [(everywhere(4), names[0]), (names[0], names[1], True), (names[1], names[2])], (everywhere(4),)
    )
    run = record(
        system=graph,
        status=everywhere(0),
        started=everywhere(2),
        config={
            everywhere(1): everywhere(0), "nodes": {everywhere(3): {"beta": everywhere(2)}}, "objective": everywhere(4),
        },
        candidates={everywhere(5): everywhere(0)},
        versions={everywhere(2): everywhere(1)},
        data={everywhere(0): {everywhere(1): everywhere(2)}, "train": {"pairs": everywhere(4)}},
        resumed=[{"at": everywhere(0), "step": everywhere(2)}],
    )  # fmt: skip
    rows = range(len(ATTACKS))
    cells = [
        Trace(
            {everywhere(4): ATTACKS},
            {
                names[0]: draws(map(texts, rows)),
                names[1]: draws(map(nested, rows)),
                names[2]: draws(map(texts, turned)),
            },
        )
        for turned in (rows, reversed(rows))
    ]
    lines = [preference_line(step, {name: (0.3, -0.2) for name in names[:2]}) for step in range(1, 20)]
    lines += [{"step": 20, f"eval_nodes/{names[0]}/rewards/margins": None}]
    evaluation = {everywhere(0): {"estimate": 0.5, "low": 0.4, "high": 0.6}, everywhere(1): everywhere(2)}
    folder = write_run(tmp_path / "<b>run<b>", lines, run, {"before": cells[0], "after": cells[1]}, evaluation)
    text = rendered(folder)
    parsed = check_is_closed(text)
    assert len(parsed.all("script")) == len(parsed.all("style")) == 1
    assert {own["src"] for own in parsed.all("img")} == set()
    assert all("<script" not in own.get("class", "") for _, own in parsed.elements)
    shown_text = parsed.text()
    for attack in ATTACKS:
        assert attack in shown_text, attack
    assert "{{ 7*7 }}" in shown_text
    two = check_is_closed(rendered(folder, write_run(tmp_path / "other")))
    assert len(two.all("script")) == 1


def test_before_and_after_stand_side_by_side(tmp_path):
    traces = {"before": trace("The sky is red.", draft="same"), "after": trace("The sky is blue.", draft="same")}
    text = rendered(write_run(tmp_path, traces=traces))
    assert 'The sky is <span class="gone">red</span>.' in text
    assert 'The sky is <span class="new">blue</span>.' in text
    assert len(re.findall('class="both"><span class="text">same</span>', text.replace("\n", ""))) == 1
    assert text.index(">why?<") < text.index(">same<") < text.index(">red<")
    alone = rendered(write_run(tmp_path / "alone", traces={"before": traces["before"]}))
    assert alone.count("not there") == 2


def test_values_of_any_kind_are_shown(tmp_path):
    """Dicts of arrays, and half of a surrogate pair, which JSON can hold and UTF-8 cannot."""
    before = trace({"scores": numpy.arange(3)}, "half \ud83d", {"table": numpy.eye(2)})
    after = trace({"scores": numpy.arange(1, 4)}, "half \ud83d", {"table": numpy.eye(2)})
    write_run(tmp_path, traces={"before": before, "after": after})
    written = write_report([read_run(tmp_path)], tmp_path / "report.html")
    assert [step.changed for step in written.prompts[0].steps] == [False, True]
    parsed = check_is_closed((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "half ?" in parsed.text()


@pytest.mark.parametrize(
    ("changes", "expected", "unexpected"),
    [
        ({"started": "2026-03-04T10:00:00"}, "2026-03-04T10:00:00", "took"),
        ({"resumed": 3}, "took 1:02:03", "pauses"),
        ({"resumed": [{"at": "noon", "step": 4}, 5]}, "took 1:02:03, with the pauses", "from step None"),
    ],
)
def test_times_are_told_as_far_as_they_are_known(tmp_path, changes, expected, unexpected):
    text = Parsed(rendered(write_run(tmp_path, run=record(**changes)))).text()
    assert expected in text
    assert unexpected not in text


@pytest.mark.parametrize("value", [10**400, -1e301, 1.7e308])
def test_numbers_too_large_to_calculate_with_are_not_finite(tmp_path, value):
    lines = [{"step": step, "loss": value if step % 2 else 0.5} for step in range(1, 20)]
    assert "loss at steps 1, 3, 5" in Parsed(rendered(write_run(tmp_path, lines))).text()


def test_prompts_beyond_the_limit_are_counted(tmp_path):
    many = Trace({"question": [f"q{i}" for i in range(9)]}, {"answer": draws([f"reply {i}" for i in range(9)])})
    text = rendered(write_run(tmp_path, traces={"before": many, "after": many}), most=4)
    assert "reply 3" in text
    assert "reply 4" not in text
    assert "and 5 more prompts" in text
    assert "Prompt 1 · unchanged" in text


def test_images_are_inside_the_file(tmp_path):
    small, large = Image.new("L", (8, 8), 200), Image.new("RGB", (900, 300), (255, 0, 0))
    plate = [(Draw(small), Draw(large))]
    whole = Trace({"question": ["draw"]}, {"image": plate, "array": draws([numpy.zeros((4, 5, 3), numpy.uint8)])})
    parsed = check_is_closed(rendered(write_run(tmp_path, traces={"before": whole, "after": whole})))
    images = parsed.all("img")
    assert [(own["width"], own["height"]) for own in images] == [("72", "72"), ("320", "107"), ("75", "60")]
    decoded = [Image.open(io.BytesIO(base64.b64decode(own["src"].split(",")[1]))) for own in images]
    assert [image.size for image in decoded] == [(8, 8), (320, 107), (5, 4)]
    assert decoded[0].getpixel((3, 3)) == 200
    assert "900 by 300 pixels" in parsed.text()


def test_the_bytes_of_an_image_are_shown_as_the_image(tmp_path):
    buffer = io.BytesIO()
    Image.new("L", (8, 8), 200).save(buffer, format="PNG")
    whole = Trace({"seen": [[buffer.getvalue(), b"\x89PNG\r\n\x1a\n and no more"]]}, {"answer": draws(["gray"])})
    parsed = check_is_closed(rendered(write_run(tmp_path, traces={"before": whole, "after": whole})))
    [image] = parsed.all("img")
    assert Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))).getpixel((3, 3)) == 200
    assert "and no more" in parsed.text()


def test_images_in_messages_are_shown_among_their_parts(tmp_path):
    parts = [{"type": "image", "image": Image.new("L", (8, 8), 200)}, {"type": "text", "text": "what is it"}]
    whole = Trace(
        {"prompt": [[{"role": "user", "content": parts}]]}, {"answer": draws([[{"image": parts[0]["image"]}]])}
    )
    parsed = check_is_closed(rendered(write_run(tmp_path, traces={"before": whole, "after": whole})))
    images = parsed.all("img")
    assert len(images) == 2
    for image in images:
        assert Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))).getpixel((3, 3)) == 200
    text = parsed.text()
    assert "what is it" in text
    assert "PIL" not in text


def test_bytes_that_no_image_can_be_made_of_are_shown_as_they_are():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def header(side):
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))

    pixels = zlib.compress(bytes(9 * 8))
    large = header(60000) + chunk(b"IDAT", pixels)
    broken = header(8) + chunk(b"IDAT", pixels[:4]) + b"\0\0\0\4!!!!" + pixels[4:]
    for value in (large, broken):
        assert (shown(value).kind, shown(value).image) == ("text", "")


def test_numbers_beyond_a_float_are_shown_as_they_are():
    listed = shown([10**400, *range(8)])
    assert listed.elements[0].words == (("same", str(10**400)),)


def test_ten_thousand_lines_make_less_than_a_megabyte_and_keep_a_spike(tmp_path):
    nodes = {f"node_{i}": f"node_{i}" for i in range(6)}
    graph = system(nodes, [("question", "node_0"), *itertools.pairwise(nodes)])
    generator = numpy.random.default_rng(0)
    lines = []
    for step in range(1, 9501):
        noise = generator.normal(size=20).tolist()
        line = preference_line(step, {name: (noise[i], -noise[i + 1]) for i, name in enumerate(nodes)})
        line |= {f"nodes/{name}/grad_norm": abs(noise[10]) for name in nodes} | {"grad_norm": 1 + abs(noise[12])}
        line |= {f"candidates/{name}": abs(noise[13]) for name in ("coverage", "effective_sample_size")}
        lines.append(line)
        if step % 19 == 0:
            lines.append(preference_line(step, dict.fromkeys(nodes, (noise[0], noise[1])), prefix="eval_"))
    lines[5001]["grad_norm"] = 12345.0
    text = rendered(write_run(tmp_path, lines, record(system=graph)))
    assert len(lines) == 10_000
    assert len(text.encode()) < 1_000_000
    assert " 1.234e+04 " in text
    assert 'class="mean"' in text


def test_a_run_without_a_log_is_told_from_its_newest_checkpoint(tmp_path):
    for step, lines in ((5, log(5)), (20, log(20)), (100, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if lines:
            state = json.dumps({"log_history": [{**lines[0], "loss": math.nan}, *lines[1:]]})
            (folder / "trainer_state.json").write_text(state)
    run = read_run(tmp_path)
    assert run.history.last_step == 20
    assert math.isnan(run.history.train["loss"].values[0])
    assert any("that of checkpoint-20" in note for note in run.notes)
    assert any("no run.json" in note for note in run.notes)
    assert "The log is that of checkpoint-20" in Parsed(rendered(tmp_path)).text().replace("the log", "The log")


@pytest.mark.parametrize("missing", ["run", "lines", "evaluation"])
def test_missing_parts_are_left_out(tmp_path, missing):
    folder = write_run(tmp_path, **({} if missing == "evaluation" else {missing: False}))
    lines = [line for line in log() if "loss" in line] if missing == "evaluation" else None
    if lines:
        write_run(folder, lines)
    parsed = check_is_closed(rendered(folder))
    assert ("Curves" in parsed.text("h2")) == (missing != "lines")
    assert "Setup" in parsed.text("h2")
    assert "Before and after" not in parsed.text("h2")


def test_the_cut_off_last_line_of_a_killed_process_is_left_out(tmp_path):
    write_run(tmp_path)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 61, "lo')
    run = read_run(tmp_path)
    assert run.history.last_step == 60
    assert run.notes == ("The last line of log.jsonl was cut off, and is left out.",)


def damage_log(text):
    def write(folder):
        lines = (folder / "log.jsonl").read_text().splitlines()
        lines[6] = text
        (folder / "log.jsonl").write_text("\n".join(lines) + "\n")

    return write


def damage(name, text):
    def write(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (damage_log('{"step": 3'), "log.jsonl, line 7: not valid JSON"),
        (damage_log("[1]"), "log.jsonl, line 7: expected an object of metrics, got list"),
        (damage_log('{"loss": 1.0}'), "log.jsonl, line 7: 'step' must be a whole number, got None"),
        (damage_log('{"step": 1.5}'), "log.jsonl, line 7: 'step' must be a whole number, got 1.5"),
        (damage("run.json", '{"a":\n 1,}'), "run.json, line 2: not valid JSON"),
        (damage("run.json", "[]"), "run.json: expected a JSON object, got list"),
        (damage("run.json", '{"format_version": 9}'), "run.json: format_version is 9, and this version .* reads 1"),
        (
            damage("run.json", json.dumps(record(system={**TWO_NODES, "nodes": [{"visit": 1}]}))),
            r"run.json, 'system': nodes\[0\] must have 'base_name'",
        ),
        (
            damage("run.json", json.dumps(record(system=system({"a": "a"}, [("b", "a")])))),
            "run.json, 'system': 'b' is none of the system's inputs and nodes",
        ),
        (
            damage("run.json", json.dumps(record(system=system({"a": "a", "b": "b"}, [("a", "b"), ("b", "a")])))),
            "run.json, 'system': the edges form a cycle",
        ),
        (damage("traces/after.jsonl", "{}\n"), "traces/after.jsonl, line 1"),
        (damage("eval.json", "{"), "eval.json, line 1: not valid JSON"),
    ],
)  # fmt: skip
def test_damaged_files_are_named_with_the_line(tmp_path, write, message):
    write(write_run(tmp_path))
    with pytest.raises(DataError, match=message):
        read_run(tmp_path)
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert not (tmp_path / "report.html").exists()


def test_what_is_no_training_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no record of a training: expected run.json and log.jsonl"):
        read_run(tmp_path)
    with pytest.raises(DataError, match=r"nothing does not exist; give the output_dir of a training"):
        read_run(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file"):
        read_run(tmp_path / "file")
    bad = tmp_path / "checkpoint-3"
    bad.mkdir()
    (bad / "trainer_state.json").write_text("{}")
    with pytest.raises(DataError, match=r"trainer_state.json: expected a list 'log_history', got NoneType"):
        read_run(tmp_path)


def test_several_runs_over_each_other(tmp_path):
    folders = [
        write_run(tmp_path / "a" / "out", run=record(config={"beta": 0.1, "seed": 1})),
        write_run(tmp_path / "b" / "out", log(seed=1), record(config={"beta": 0.5, "seed": 1})),
        write_run(tmp_path / "c", [preference_line(step, {"other": (0.1, -0.1)}) for step in range(1, 30)]),
    ]  # fmt: skip
    text = rendered(*folders)
    parsed = check_is_closed(text)
    margin = re.search(r"<figure(?:(?!<figure).)*?>Margin</b>.*?</figure>", text, re.DOTALL)[0]
    labels = [own["data-label"] for _, own in Parsed(margin).of_class("curve")]
    assert labels == [str(folders[0])] * 2 + [str(folders[1])] * 2 + ["c"]
    assert "Margin by node: other" in text
    assert "Reward on winners by node: answer" in text
    rows = re.findall(r'<th scope="row"><i class="swatch c\d"></i>(.*?)</th>', text)
    assert rows == [str(folders[0]), str(folders[1]), "c"]
    assert re.search(r"<code>beta</code></th><td><code>0.1</code></td><td><code>0.5</code></td>", text)
    assert "<code>seed</code></th><td><code>1</code></td><td><code>1</code></td>" in text  # the third has another
    assert parsed.text().count("share of") >= 3


def test_settings_that_differ():
    configs = {"a": {"beta": 0.1, "seed": 1}, "b": {"beta": 0.2, "seed": 1, "new": None}}
    assert differences(configs) == [("beta", ["0.1", "0.2"]), ("new", ["not there", "null"])]


def test_the_figures_of_an_evaluation(tmp_path):
    interval = {"estimate": 0.612, "low": 0.55, "high": 0.67}
    evaluation = {
        "format_version": 1, "win_rate": interval, "wins": 31, "scores": {"difference": interval | {"low": None}},
        "outputs": ["a", "b"], "judge": {"by": "length"}, "rows": [{"outcome": 1}] * 500, "versions": {"torch": "2"},
    }  # fmt: skip
    assert [(j.name, j.value, j.interval) for j in judgements(evaluation)] == [
        ("win_rate", 0.612, (0.55, 0.67)), ("wins", 31, None), ("scores / difference", 0.612, None),
        ("outputs", "a, b", None), ("judge / by", "length", None),
    ]  # fmt: skip
    text = Parsed(rendered(write_run(tmp_path, evaluation=evaluation))).text()
    assert "0.55 to 0.67" in text


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ("loss", 20)),
        ({"metric_for_best_model": "eval_rewards/accuracies"}, ("rewards/accuracies", 10)),
        ({"metric_for_best_model": "rewards/margins", "greater_is_better": False}, ("rewards/margins", 30)),
        ({"metric_for_best_model": "unknown"}, ("loss", 20)),
    ],
)
def test_the_best_evaluation(tmp_path, config, expected):
    lines = [
        {"step": step, "eval_loss": loss, "eval_rewards/accuracies": accuracy, "eval_rewards/margins": margin}
        for step, loss, accuracy, margin in ((10, 0.6, 0.9, 3), (20, 0.5, 0.8, 2), (30, 0.55, 0.7, 1))
    ]
    assert best_evaluation(read_run(write_run(tmp_path, lines)).history, config) == expected


def test_the_command_writes_the_file_and_tells_the_findings(tmp_path):
    lines = [line | ({"logps/chosen": -20.0 - line["step"]} if "loss" in line else {}) for line in log()]
    lines = [line for line in lines if "loss" in line]
    write_run(tmp_path / "run", lines)
    result = CliRunner().invoke(app, ["report", str(tmp_path / "run"), "--output", str(tmp_path / "new" / "r.html")])
    assert result.exit_code == 0, result.output
    check_is_closed((tmp_path / "new" / "r.html").read_text())
    assert "WARNING: Chosen outputs become less likely" in result.output
    assert "Try: " in result.output
    assert re.search(r"^answer +\S+ +\S+ +\S+ +\d+ %$", result.output, re.MULTILINE)
    assert result.output.rstrip().endswith(f"report: {tmp_path / 'new' / 'r.html'}")
    other = write_run(tmp_path / "other")
    result = CliRunner().invoke(app, ["report", str(tmp_path / "run"), "--compare", str(other), "--json"])
    found = json.loads(result.stdout)
    assert found["report"] == str(tmp_path / "run" / "report.html")
    assert [run["folder"] for run in found["runs"]] == [str(tmp_path / "run"), str(other)]
    first, second = found["runs"]
    assert [diagnosis["kind"] for diagnosis in first["diagnoses"]] == ["chosen_log_probs_fall"]
    assert second["diagnoses"] == []
    assert first["best_evaluation"] is None
    assert second["best_evaluation"]["metric"] == "loss"
    assert second["metrics"]["margin"]["last"] == log()[-1]["eval_rewards/margins"]
    assert second["shares"]["nodes"][0]["name"] == "draft"


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "jinja2" else find(name, *rest)
    )
    result = CliRunner().invoke(app, ["report", str(write_run(tmp_path))])
    assert result.exit_code == 1
    assert 'A report needs jinja2: pip install "sysdag[report]".' in result.output


def test_an_older_report_is_as_it_was_after_an_error(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run")
    output = tmp_path / "report.html"
    output.write_text("old")
    import sysdag.reporting.html as html

    def fail(found):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(html, "render", fail)
    with pytest.raises(OSError, match="No space"):
        write_report([read_run(folder)], output)
    assert output.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run"]


def test_a_report_of_a_real_training(tmp_path):
    from trained_systems import rows, two_llms

    from sysdag import DiverseBeamSearch, SysDPOConfig, SysDPOTrainer

    SysDPOTrainer(
        two_llms(),
        SysDPOConfig(
            output_dir=str(tmp_path), objective="sampling", beta=0.3, max_steps=4, eval_strategy="steps", eval_steps=2,
            logging_steps=1, log_traces=2, per_device_train_batch_size=4, use_cpu=True, report_to=[],
            save_strategy="no", learning_rate=1e-3, disable_tqdm=True,
        ),
        candidates=DiverseBeamSearch(num_candidates=2),
        train_dataset=rows(8),
        eval_dataset=rows(4),
    ).train()  # fmt: skip
    found = write_report([read_run(tmp_path)], tmp_path / "report.html")
    parsed = check_is_closed((tmp_path / "report.html").read_text())
    assert [box.name for box in found.layout.boxes] == ["question", "draft", "answer"]
    assert [node.name for node in found.main.shares.nodes] == ["draft", "answer"]
    assert len(found.charts) == 14
    assert len(found.prompts) == 2
    assert [step.node for step in found.prompts[0].steps] == ["draft", "answer"]
    changed = {setting.name for setting in found.changed}
    assert {"beta", "objective", "max_steps", "learning_rate", "log_traces", "output_dir"} <= changed
    assert {"weight_decay", "label_smoothing", "loss_type", "seed"}.isdisjoint(changed)
    assert [diagnosis.kind for diagnosis in found.main.diagnoses][-1] == "too_short"
    assert "diverse_beam" in parsed.text()


def test_the_wheel_has_the_templates(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for folder in ("sysdag", "kernels"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix not in (".so", ".pyc"):
                target = source / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
    ours = {path.relative_to(source).as_posix() for path in (source / "sysdag").rglob("*") if path.is_file()}
    assert "sysdag/labelling/page/label.html" in ours  # pages, templates and schemas, too
    assert ours <= names
    templates = {p.relative_to(ROOT).as_posix() for p in (ROOT / "sysdag" / "reporting" / "templates").iterdir()}
    assert len(templates) == 6
    assert templates <= names


def test_a_report_has_no_column_without_a_number(tmp_path):
    lines = [line for line in log() if "loss" in line]
    for name, given in (("alone", lines), ("with", log())):
        folder = write_run(tmp_path / name, lines=given)
        write_report([read_run(folder)], tmp_path / f"{name}.html")
    alone, evaluated = ((tmp_path / f"{name}.html").read_text() for name in ("alone", "with"))
    heads = ("evaluation, first", "evaluation, last")
    assert all(head in evaluated for head in heads)
    assert not any(head in alone for head in heads)
    assert "training, last" in alone
    assert "best step" not in alone
