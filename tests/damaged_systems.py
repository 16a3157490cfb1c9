"""Saved systems that were damaged at random, and what comes of loading them.

`python tests/damaged_systems.py COUNT [SEED]` prints how many load, how many are refused, and everything else.
"""

import json
import os
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from tiny import char_tokenizer, llama
from tiny_diffusion import autoencoder, clip, drift, scheduler_of, text_unet, word_tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification

from sysdag import Input, SerializationError, System, node
from sysdag.components import Categorical, CausalLM, Diffusion, Opaque, Tabular

PROMPT = Input("prompt", str)


def classifier():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForSequenceClassification(
            LlamaConfig(vocab_size=45, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                        num_labels=2, pad_token_id=0)
        )  # fmt: skip


def asked(value):
    return value


@node(CausalLM(llama(), char_tokenizer(chat=True), max_new_tokens=4, stop=["."], chat_template_kwargs={"mode": "a"}))
def draft(prompt):
    return prompt


@node(CausalLM(llama(1), char_tokenizer(), peft_config=LoraConfig(r=2, target_modules=["q_proj"]), max_new_tokens=4))
def answer(draft):
    return draft


@node(Categorical(["a", "b"], classifier(), char_tokenizer()))
def route(prompt):
    return prompt


@node(Categorical(["a", "b"], 3))
def choose(prompt):
    return [1.0, 2.0, 3.0]


@node(Tabular({"x": {"s": 0.5, 7: 0.5}, ("y", 1): {"s": 1.0}}))
def table(prompt):
    return "x"


@node(Opaque(asked))
def tool(prompt):
    return prompt


@node(
    Diffusion(
        text_unet(in_channels=1, out_channels=1), scheduler=scheduler_of("epsilon"), text_encoder=clip(),
        tokenizer=word_tokenizer(), vae=autoencoder(), peft_config=LoraConfig(r=2, target_modules=["to_q"]),
    )
)  # fmt: skip
def picture(answer):
    return answer


SYSTEM = System(PROMPT >> [draft, route, choose, table, tool], draft >> answer >> picture)

_VALUES = (
    None, True, False, -1, 0, 1, 3, 10**9, 10**30, -(10**400), 0.5, -1e308, "", "x", "a" * 10_000, "../..", "/", "a/b",
    "\ud800", "\0", "os:system", [], {}, [[]], {"": {}}, ["x", 1], {"a": None}, {"path": "os:system"},
)  # fmt: skip


def _deep(depth):
    return "[" * depth + "]" * depth


def _places(content, path=()):
    """Every place in JSON data, by the keys that lead there."""
    yield path
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(inner)[:50]:
        yield from _places(value, (*path, key))


def _changed(rng, content):
    """JSON text of the content with one place changed."""
    places = [path for path in _places(content) if path]
    if not places:
        return json.dumps(rng.choice(_VALUES))
    *outer, last = rng.choice(places)
    scope = content
    for key in outer:
        scope = scope[key]
    kind = rng.choice(["value", "value", "value", "gone", "more", "deep", "twice", "swapped", "infinite"])
    if kind == "value":
        scope[last] = rng.choice(_VALUES)
    elif kind == "gone":
        del scope[last]
    elif kind == "more" and isinstance(scope, dict):
        scope[rng.choice(["trust_remote_code", "x", "auto_map", "device_map", "decoder", "tokenizer", ""])] = "x"
    elif kind == "more":
        scope.append(scope[last])
    elif kind == "swapped":
        other = rng.choice(places)
        value = content
        for key in other:
            value = value[key]
        scope[last] = json.loads(json.dumps(value))
    else:
        scope[last] = "<here>"
        text = json.dumps(content)
        return {
            "deep": lambda: text.replace('"<here>"', _deep(rng.choice([30, 150, 5000]))),
            "twice": lambda: text.replace('"<here>"', '{"a": 1, "a": 2}'),
            "infinite": lambda: text.replace('"<here>"', rng.choice(["NaN", "Infinity", "1e999", "9" * 6000])),
        }[kind]()
    return json.dumps(content)


def _changed_tensors(rng, raw):
    length = int.from_bytes(raw[:8], "little")
    header, rest = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    kind = rng.choice(["gone", "renamed", "shape", "json", "length", "dtype"])
    if kind == "gone":
        start, end = header.pop(name)["data_offsets"]
        rest = rest[:start] + rest[end:]
        for each in header.values():
            if "data_offsets" in each and each["data_offsets"][0] >= end:
                each["data_offsets"] = [offset - (end - start) for offset in each["data_offsets"]]
    elif kind == "renamed":
        header[f"x.{name}"] = header.pop(name)
    elif kind == "shape":
        header[name]["shape"] = [1, *header[name]["shape"]][:: rng.choice([1, -1])]
    elif kind == "dtype":
        header[name]["dtype"] = rng.choice(["I32", "F128", "BOOL", ""])
    text = (_changed(rng, header) if kind == "json" else json.dumps(header)).encode("utf-8", "surrogatepass")
    length = rng.choice([0, 1, 2**63]) if kind == "length" else len(text)
    return length.to_bytes(8, "little") + text + rest


def damage(rng, folder):
    """Damages one file of a saved system; returns its place in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    weights = [6 if path.name == "system.json" else 3 if path.name.endswith("config.json") else 1 for path in files]
    [path] = rng.choices(files, weights)
    raw = path.read_bytes()
    kind = rng.choice(["content", "content", "content", "content", "cut", "flipped", "gone", "empty", "bytes", "grown",
                       "folder", "other", "pickle"])  # fmt: skip
    if kind == "content" and path.suffix == ".json":
        path.write_bytes(_changed(rng, json.loads(raw)).encode("utf-8", "surrogatepass"))
    elif kind == "content" and path.suffix == ".safetensors":
        path.write_bytes(_changed_tensors(rng, raw))
    elif kind == "gone":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "other":
        path.write_bytes(rng.choice(files).read_bytes())
    elif kind == "pickle" and path.suffix == ".safetensors":
        torch.save({"a": torch.zeros(1)}, path.with_name("pytorch_model.bin"))
        path.unlink()
    else:
        at = rng.randrange(len(raw) or 1)
        flipped = raw[:at] + bytes([raw[at] ^ (1 << rng.randrange(8))]) + raw[at + 1 :] if raw else b"x"
        path.write_bytes({
            "cut": raw[:at], "empty": b"", "bytes": rng.randbytes(64), "grown": raw + raw[:at],
        }.get(kind, flipped))  # fmt: skip
    return path.relative_to(folder)


def load(folder, damaged):
    """Loads a system, and of what is damaged all that loads late."""
    system = System.from_pretrained(folder)
    for each in system.nodes:
        component = each.component
        if component is not None and (damaged.parts[0] in ("system.json", each.name)):
            for late in ("tokenizer", "config", "module", "is_whole", "eos_token_ids", "adapter_config"):
                getattr(component, late, None)
                getattr(getattr(component, "lm", None), late, None)


def outcome(folder, damaged):
    """`loaded`, `refused` or, of anything else, what it was."""
    try:
        load(folder, damaged)
    except SerializationError as error:
        told = str(error)
        if str(folder) not in told:
            return f"names no file: {damaged}: {told}"
        if damaged.parts[0] != "system.json" and f"Component {damaged.parts[0]!r}" not in told:
            return f"names no node: {damaged}: {told}"
        return "refused"
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        return f"{type(error).__name__}: {damaged}: {str(error)[:300]}"
    return "loaded"


def outcomes(count, seed, place):
    """How often each outcome comes of damage to a system saved in `place`."""
    drift(SYSTEM["picture"].component.module)
    SYSTEM.save_pretrained(place / "whole")
    assert outcome(place / "whole", Path("system.json")) == "loaded"
    found = Counter()
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        folder = place / "damaged"
        shutil.copytree(place / "whole", folder)
        found[outcome(folder, damage(rng, folder))] += 1
        shutil.rmtree(folder)
    return found


def refused(folder, message, node="draft"):
    """Asserts that a node of a saved system cannot be loaded, for which the error says why."""
    with pytest.raises(SerializationError, match=f"Component '{node}'.*{re.escape(message)}"):
        _ = System.from_pretrained(folder)[node].component.module


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.modules["damaged_systems"] = sys.modules["__main__"]
    import damaged_systems

    for name in ("draft", "answer", "route", "choose", "table", "tool", "picture", "asked"):
        value = getattr(damaged_systems, name)
        getattr(value, "function", value).__module__ = "damaged_systems"
    with tempfile.TemporaryDirectory() as temporary:
        for what, times in outcomes(int(sys.argv[1]), int((sys.argv[2:] or [0])[0]), Path(temporary)).most_common():
            print(f"{times:5} {what}")
