#!/usr/bin/env bash
# transformers 5.23.0: a saved tokenizer is read back as another one where a Qwen2 config lies beside it.
#
# Guess: `AutoTokenizer` reads what `save_pretrained` wrote, as the class that tokenizer_config.json names.
# Seen: beside a config of model_type qwen2 the folder is read as Qwen2Tokenizer, whose byte-level splitting replaces
# the white-space splitting of tokenizer.json: the same text has no tokens at all, without a warning. Beside a llama
# config, and without a config, it is read as it was saved.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0
FOLDER=$folder "$folder/venv/bin/python" - <<'PY'
import json
import os
from pathlib import Path

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

words = {"<unk>": 0, "<s>": 1, "</s>": 2, "red": 3, "cube": 4}
made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
saved = transformers.PreTrainedTokenizerFast(
    tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
)
found = {}
for kind in (None, "llama", "qwen2"):
    place = Path(os.environ["FOLDER"]) / str(kind)
    saved.save_pretrained(place)
    if kind is not None:
        (place / "config.json").write_text(json.dumps({"model_type": kind}))
    read = transformers.AutoTokenizer.from_pretrained(place)
    found[kind] = (type(read).__name__, read("red cube").input_ids)
print(f"transformers {transformers.__version__}: saved {saved('red cube').input_ids}, read {found}")
assert found[None][1] == found["llama"][1] == [3, 4]
assert found["qwen2"] == ("Qwen2Tokenizer", []), "it is read as it was saved now"
PY
