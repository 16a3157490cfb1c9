#!/usr/bin/env bash
# datasets 5.2.0: a folder whose README.md has a JSON and a CSV configuration reads the CSV one as JSON.
#
# Guess: each configuration of the card is read by its files' form, with its own `sep`.
# Seen: one builder is chosen for the whole folder; the CSV configuration fails as broken JSON, and alone it is read.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0
cd "$folder"
HF_HOME="$folder/cache" "$folder/venv/bin/python" - <<'PY'
from pathlib import Path

import datasets

JSON = "- config_name: lines\n  data_files: lines/*.jsonl\n"
CSV = '- config_name: table\n  data_files: table/*.csv\n  sep: "|"\n'


def folder(name, configs):
    for place in ("lines", "table"):
        (Path(name) / place).mkdir(parents=True)
    (Path(name) / "lines/a.jsonl").write_text('{"x": "1"}\n')
    (Path(name) / "table/a.csv").write_text("x|y\n1|2\n")
    (Path(name) / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return name


def read(name):
    try:
        return datasets.load_dataset(name, "table", split="train").column_names
    except Exception as error:
        return type(error).__name__


alone, both = read(folder("alone", CSV)), read(folder("both", JSON + CSV))
print(f"datasets {datasets.__version__}: alone {alone}, beside a JSON configuration {both}")
assert alone == ["x", "y"]
assert both != ["x", "y"], "each configuration has its builder now"
PY
