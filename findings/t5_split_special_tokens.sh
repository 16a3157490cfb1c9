#!/usr/bin/env bash
# transformers 5.23.0, T5's tokenizer: a text's `</s>` is the end token, with `split_special_tokens=True`, too.
#
# Guess: the option spells a special token that stands in a text by other pieces, as it does for byte-level BPE.
# Seen: a Unigram vocabulary holds `</s>` as a piece, and the text's is tokenised as that piece: the id of the end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 sentencepiece protobuf
"$folder/venv/bin/python" - <<'PY'
import transformers
from transformers import T5TokenizerFast

pieces = ["<pad>", "</s>", "<unk>", "\u2581", "a", "b", "<", "/", "s", ">"]
tokenizer = T5TokenizerFast(vocab=[(piece, -float(n)) for n, piece in enumerate(pieces)], extra_ids=0)
found = {
    split: tokenizer("ab </s> a", split_special_tokens=split, add_special_tokens=False).input_ids
    for split in (False, True)
}
print(f"transformers {transformers.__version__}: {found}, the end is {tokenizer.eos_token_id}")
assert tokenizer.eos_token_id in found[False]
assert tokenizer.eos_token_id in found[True], "the text's </s> is split now"
PY
